"""Package metadata. The CUDA extension joins in `csrc/`."""

from setuptools import find_packages, setup

TRAIN = ["transformers>=5.0", "accelerate>=1.10", "rich>=13", "pyyaml>=6", "matplotlib>=3.8"]
BENCH = ["pytest>=8", "pytest-benchmark>=5", "matplotlib>=3.8", "peft>=0.18"]
TEST = [*TRAIN, *BENCH, "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.14", "gguf>=0.17"]

setup(
    name="lorasb_kernels",
    version="0.1.0",
    description="Fused Triton and CUDA kernels for LoRA-SB adapters around frozen linear layers",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["lorasb_kernels", "lorasb_kernels.*"]),
    package_data={"lorasb_kernels": ["_C.so", "**/*.json", "**/*.yaml"]},
    install_requires=[
        "torch>=2.10",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy",
        "safetensors",
    ],
    extras_require={"train": TRAIN, "bench": BENCH, "test": TEST},
    entry_points={"console_scripts": ["lorasb = lorasb_kernels.train.cli:main"]},
)
