"""Lists the kernels of PTX or .cu files, and the instructions that cannot be executed.

    python -m ptxcheck [--arch 90a] kernel.ptx kernel.cu

The exit status is 1 when there are such instructions.
"""

import argparse
import sys
from pathlib import Path

from . import load, nvcc_ptx


def main() -> int:
    parser = argparse.ArgumentParser(prog="ptxcheck", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="PTX text, or .cu for nvcc to compile")
    parser.add_argument("--arch", default="86", help="what .cu files are compiled for (86)")
    options = parser.parse_args()
    status = 0
    for path in options.files:
        text = nvcc_ptx(path, options.arch) if path.suffix == ".cu" else path.read_text()
        module = load(text)
        unsupported = module.unsupported()
        for name, parameters in module.kernels.items():
            types = ", ".join(t if size <= 8 else f"{size} bytes" for _, t, size in parameters)
            print(f"{path}: {name}({types})")
            for message in unsupported[name]:
                status = 1
                print(f"    unsupported: {message}")
    return status


if __name__ == "__main__":
    sys.exit(main())
