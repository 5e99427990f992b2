"""What the compiler makes of the inner loops: counts that the kernels' design rests on."""

import pytest

from tests.cuda import sass
from tests.cuda import simulator as simulation

STEP = 2  # products of 16 contraction indices in a step of 32


def steps_of(loop: sass.Loop) -> list[sass.Loop]:
    """A loop's steps, each from its barrier on; the compiler may have put two into one loop."""
    barriers = [i for i, name in enumerate(loop.instructions) if name.startswith("BAR.SYNC")]
    ends = [*barriers[1:], len(loop.instructions)]
    return [sass.Loop(loop.instructions[a:b]) for a, b in zip(barriers, ends, strict=True)]


@pytest.fixture(scope="module")
def loops(toolkit):
    simulation.objects()
    found = {}
    for file in ("rank_forward", "rank_dropout", "rank_backward", "expand"):
        found |= sass.loops_of(simulation.BUILD / f"{file}.cubin")
    return found


@pytest.fixture(scope="module")
def projections(loops):
    """The steps of the main loops of the rank product's 16-bit kernels."""
    found = {}
    for kernel, own in loops.items():
        traits = sass.rank_product(kernel)
        if traits is not None and traits.dtype != "float32":
            found[traits] = steps_of(sass.main_loop(own, "HMMA.16816"))
    assert {traits.mode for traits in found} == {"forward", "dropout", "backward"}
    assert {traits.rank for traits in found} == {16, 32, 64, 96, 128, 256, 512}
    return found


def test_no_product_is_computed_twice(projections):
    """A step's mma over all warps are those of rows × rank × 32, at every rank tile."""
    for traits, steps in projections.items():
        for step in steps:
            computed = step.count("HMMA.16816") * traits.warps_m * traits.warps_n
            assert computed == traits.rows // 16 * traits.rank // 8 * STEP, traits


def test_each_fragment_is_loaded_once_a_step_and_warp(projections):
    """One ldmatrix for a row tile, one for 16 ranks."""
    for traits, steps in projections.items():
        own_ranks = traits.rank // traits.warps_n
        for step in steps:
            assert step.count("LDSM") == (traits.row_tiles + own_ranks // 16) * STEP, traits


def test_nothing_separates_the_loads_of_fragments_from_their_products(projections):
    """No branch between them: the loads of one product can be issued before the previous one."""
    for traits, steps in projections.items():
        for step in steps:
            names = step.instructions
            first = next(i for i, name in enumerate(names) if name.startswith("LDSM"))
            last = max(i for i, name in enumerate(names) if name.startswith("HMMA"))
            assert not any(name.startswith("BRA") for name in names[first:last]), traits


@pytest.mark.parametrize(("mode", "limit"), [("forward", 145), ("backward", 150)])
def test_instructions_of_a_step_at_rank_96(mode, limit, projections):
    """Before the tiles were known at compile time, and tensors with odd rows copied: 1114, for 32
    products of 16 rows. The copies of the last step are in it beside those of the others.
    """
    tall = ("bfloat16", 96, 128, mode)
    ((step,),) = (
        steps
        for traits, steps in projections.items()
        if (traits.dtype, traits.rank, traits.rows, traits.mode) == tall
    )
    assert step.count("HMMA.16816") == 48
    assert len(step.instructions) <= limit


def test_the_fused_product_loads_a_fragment_for_four_products(loops):
    """64×64 elements a warp: 16 ldmatrix for 64 mma in a step of 32."""
    large = [
        own
        for kernel, own in loops.items()
        if "ExpandTraits" in kernel and "Li128ELi128E" in kernel
    ]
    assert len(large) == 4  # of two dtypes and two orientations
    for own in large:
        for loop in sorted(own, key=lambda loop: loop.count("HMMA"))[-2:]:  # rank, then K
            assert loop.count("HMMA.16816") == 64
            assert loop.count("LDSM") == 16


def test_every_copy_is_of_16_bytes(toolkit):
    """Of the operands; the words of sign planes and row weights are copied by fours."""
    for kernel, text in simulation.kernel_texts().items():
        if "rank_product" in kernel or "ExpandTraits" in kernel:
            assert "cp.async.cg.shared.global" in text
            assert "cp.async.ca" not in text, kernel
