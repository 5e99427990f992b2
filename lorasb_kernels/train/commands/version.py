"""Show the versions of the library, Python, torch and the packages training uses."""

import argparse
import importlib.metadata
import platform

import lorasb_kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(options: argparse.Namespace) -> int:
    """Prints one line a package."""
    print(f"lorasb_kernels {lorasb_kernels.__version__}")
    print(f"python {platform.python_version()}")
    for package in ("torch", "triton", "transformers", "accelerate", "peft"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} not installed")
    return 0
