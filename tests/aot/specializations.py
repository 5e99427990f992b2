"""Prints how many compilations each kernel needs for many numbers of rows, one line a kernel.

The key is Triton's own: the types and divisibility of the arguments, for sm_86.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import create_function_from_signature

from bench.kernel_resources.report import KERNELS, variants

ROWS = (1, 2, 15, 16, 17, 64, 511, 512, 8192, 20_000)
NUMBERS_OF_ROWS = ("M", "tokens", "splits", "steps_per_split", "rows_per_split")
ELEMENTS = {"*": torch.bfloat16, "*fp32": torch.float32, "*i32": torch.int32, "*i64": torch.int64}


def main() -> None:
    backend = CUDABackend(GPUTarget("cuda", 86, 32))
    for name in (
        *("projection", "gradient", "factor_gradient", "expand", "sign_gradient"),
        *("experts_projection", "experts_expand", "experts_gradient"),
    ):
        kernel, _ = KERNELS[name]
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        variant = next(variants("sm_86", "bfloat16", name))
        constants = {**variant.constants, **variant.tile.launch_options()}
        for option in ("num_warps", "num_stages"):
            del constants[option]
        fixed = {
            key: torch.empty(64, dtype=ELEMENTS[value]) if isinstance(value, str) else value
            for key, value in variant.arguments.items()
        }
        keys = set()
        for rows in ROWS:
            changing = {key: rows for key in NUMBERS_OF_ROWS if key in fixed}
            _, specialization, _ = bind(**{**fixed, **constants, **changing})
            keys.add(str(specialization))
        print(name, len(keys))


if __name__ == "__main__":
    main()
