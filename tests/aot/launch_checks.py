"""Launches without a GPU: which compiled kernel each takes, and that it is not searched for.

    python -m tests.aot.launch_checks

The driver is a stub. Launches through `launch` are compared with Triton's own, `kernel[grid](...)`.
"""

import torch

from lorasb_kernels.ops.triton import core_backward, launching, projection
from tests.aot import stub_driver

SMALL = {"SPLIT": False, "BLOCK_R": 16, "PRECISION": "tf32", "num_warps": 4, "num_stages": 2}
# What differs from the first of these asks for another compiled kernel, except where it says so.
VARIANTS = {
    "first": {},
    "M, and the scaling": {"M": 4096, "scaling": 0.5, "same": True},
    "r, in whole sixteens": {"r": 32, "same": True},
    "r, not in sixteens": {"r": 24},
    "r = 1": {"r": 1},
    "dtype": {"dtype": torch.float16},
    "constexpr": {"constants": {"BLOCK_M": 32}},
    "option": {"constants": {"num_warps": 8}},
    "a wide M": {"M": 2**31},
    "a pointer past a multiple of 16 bytes": {"offset": 1},
}


def arguments(M=64, r=16, scaling=1.0, dtype=torch.bfloat16, offset=0, constants=None, same=False):
    """Pointers, numbers and constants of `gradient_kernel`; nothing is read."""
    g, h = (torch.empty(64, dtype=dtype)[offset:] for _ in range(2))
    pointers = (g, h, torch.empty(64), None, None)
    return pointers, (M, r, 1, 64, scaling), {**SMALL, "BLOCK_M": 64, **(constants or {})}


def same_kernels_as_triton() -> None:
    """Every variant, three times, in an order that would show a key too coarse."""
    kernel, found = core_backward.gradient_kernel, {}
    for name in [*VARIANTS, *reversed(VARIANTS), *VARIANTS]:
        pointers, numbers, constants = arguments(**VARIANTS[name])
        launching.launch(kernel, 3, pointers, numbers, constants)
        kernel[(3,)](*pointers, *numbers, **constants)
        ours, triton = stub_driver.launches[-2:]
        assert ours.function is triton.function, name
        assert ours.grid == triton.grid == (3, 1, 1), name
        assert all(a is b for a, b in zip(ours.arguments, triton.arguments, strict=True)), name
        found[name] = ours.function
    for name, variant in VARIANTS.items():
        assert (found[name] is found["first"]) == variant.get("same", name == "first"), name


def no_search() -> None:
    """What has been launched before is launched again without Triton's search."""
    x, a, core = torch.ones(64, 96).half(), torch.ones(16, 96).half(), torch.ones(16, 16)
    for module in (projection, core_backward):
        module.architecture = lambda device: "sm_86"
    projection.multiprocessors = lambda device: 84

    def layer() -> None:
        h, p = projection.project(x, a, core, 1.0, 0.0, None)
        core_backward.rank_gradient(p, h, 1.0)

    searches, kind = [], type(core_backward.gradient_kernel)
    run = kind.run

    def counting(*arguments, **options):
        searches.append(arguments)
        return run(*arguments, **options)

    kind.run = counting
    for expected in (2, 2, 2):
        layer()
        assert len(searches) == expected, len(searches)
        names = [launch.name for launch in stub_driver.launches[-2:]]
        assert names == ["projection_kernel", "gradient_kernel"], names
    kind.run = run


def main() -> None:
    stub_driver.install()
    same_kernels_as_triton()
    no_search()
    print(len(stub_driver.launches), "launches")


if __name__ == "__main__":
    main()
