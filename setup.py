"""Package metadata, and the CUDA extension where it can be built; see `csrc/build.py`."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc"))
import build as cuda

TRAIN = ["transformers>=5.0", "accelerate>=1.10", "rich>=13", "pyyaml>=6", "matplotlib>=3.8"]
BENCH = ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.8", "peft>=0.19.1"]
DEMO = [*TRAIN, "gguf>=0.17", "peft>=0.19.1"]
QUANTIZED = ["bitsandbytes>=0.50", "torchao>=0.18"]
DOCS = ["pdoc>=16"]
TOOLS = ["pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.14"]
TEST = [*DEMO, *BENCH, *QUANTIZED, *DOCS, *TOOLS]
FULL = [*TEST, "trl>=1.16; python_version >= '3.11'", "liger-kernel>=0.8"]


class BuildCuda(build_ext):
    """Leaves the work to `csrc/build.py`; the file name carries no Python version."""

    def build_extension(self, ext):
        cuda.build(Path(self.get_ext_fullpath(ext.name)).resolve())

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"


class AnyPythonWheel(bdist_wheel):
    """With the extension the wheel is for one platform and, still, any Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


build_cuda = cuda.wanted()
setup(
    name="lorasb_kernels",
    version="0.1.0",
    description="Fused Triton and CUDA kernels for LoRA-SB adapters around frozen linear layers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["lorasb_kernels", "lorasb_kernels.*"]),
    package_data={"lorasb_kernels": ["**/*.json", "**/*.yaml"]},
    ext_modules=[Extension("lorasb_kernels._C", sources=[])] if build_cuda else [],
    cmdclass={"build_ext": BuildCuda, "bdist_wheel": AnyPythonWheel} if build_cuda else {},
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "safetensors",
    ],
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "bench": BENCH,
        "quantized": QUANTIZED,
        "docs": DOCS,
        "test": TEST,
        "full": FULL,
    },
    entry_points={"console_scripts": ["lorasb = lorasb_kernels.cli.main:main"]},
)
