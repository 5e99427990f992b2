"""Runs checks of compiled PTX, in a process without Triton's interpreter.

TRITON_INTERPRET=0 python -m tests.aot.run_checks sm_90 expand sign_matmul faults
"""

import sys

import torch

from tests.aot import experts_ptx_checks, fault_checks, ptx_checks, sign_ptx_checks


def main() -> None:
    arch, *names = sys.argv[1:]
    modules = (ptx_checks, sign_ptx_checks, experts_ptx_checks, fault_checks)
    checks = {name: check for module in modules for name, check in vars(module).items()}
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty returns NaN
    for name in names:
        checks[f"check_{name}"](arch)


if __name__ == "__main__":
    main()
