"""Show the versions of the library and its dependencies, and how the CUDA extension was built."""

import argparse
import importlib.metadata
import platform

import lorasb_kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(options: argparse.Namespace) -> int:
    """Prints one line per package, then the build of the CUDA extension or why there is none."""
    print(f"lorasb_kernels {lorasb_kernels.__version__}")
    print(f"python {platform.python_version()}")
    for package in ("torch", "triton", "transformers", "accelerate", "peft"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} not installed")
    info = lorasb_kernels.build_info()
    if info["extension"] is None:
        print(f"cuda extension none: {info['reason']}")
    else:
        for key in ("architectures", "nvcc", "compiler", "torch_target"):
            print(f"cuda extension {key} {info[key]}")
    return 0
