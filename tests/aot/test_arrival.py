"""`arrives_last` in PTX: every thread's stores come before the count that releases them.

A missing barrier may not change any result in an emulator or an interpreter, and on a GPU only
occasionally; so its place in the compiled code is asserted.
"""

import re

import triton
import triton.language as tl

from lorasb_kernels.ops.triton.parts import arrives_last
from tests.aot.process import run_compiling


@triton.jit
def arrival_kernel(x_ptr, partial_ptr, arrived_ptr, y_ptr, blocks, BLOCK: tl.constexpr):
    """Stores in the layout of its loads, so that only the arrival needs a barrier."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial_ptr + offsets, 2.0 * tl.load(x_ptr + offsets))
    if arrives_last(arrived_ptr, blocks):
        first = tl.arange(0, BLOCK)
        tl.store(y_ptr + first, tl.load(partial_ptr + first))


def steps(ptx: str) -> str:
    """The order of stores (S), barriers (B) and counts (A) in the code."""
    letters = {"st.global": "S", "bar.sync": "B", "atom.global": "A"}
    found = re.findall(r"^\s*(?:@%p\d+ )?(st\.global|bar\.sync|atom\.global)", ptx, re.MULTILINE)
    return "".join(letters[instruction] for instruction in found)


def test_a_barrier_stands_between_the_stores_and_the_count():
    orders = run_compiling("tests.aot.test_arrival").split()
    assert len(orders) == 4
    for order in orders:
        assert re.search("SB+A", order), order


def main() -> None:
    """Prints the order for the kernel above and for one that sums partials, on two devices."""
    from bench.kernel_resources.report import compile_kernel, compile_variant, variants

    pointers = dict.fromkeys(("x_ptr", "partial_ptr", "y_ptr"), "*fp32")
    arguments = {**pointers, "arrived_ptr": "*i32", "blocks": 7}
    constants = {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}
    for arch in ("sm_86", "sm_90"):
        print(steps(compile_kernel(arrival_kernel, arguments, constants, arch).asm["ptx"]))
        variant = next(variants(arch, "bfloat16", "gradient"))
        print(steps(compile_variant(variant).asm["ptx"]))


if __name__ == "__main__":
    main()
