"""Known GPUs and the numbers in their datasheets, for predictions.

Rates are dense (without structured sparsity), 16-bit products with fp32 accumulation, at boost
clock; bandwidth is that of device memory. Real devices reach less of both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU's datasheet.

    Args:
        key: short name, as `--gpu` takes it.
        device_name: the name that the driver reports, or its beginning.
        arch: `"sm_86"` and so on.
        multiprocessors: number of SMs.
        memory_gb: device memory, 10⁹ bytes.
        bandwidth: bytes per second.
        tensor_rate: flops per second of bf16 and fp16 tensor-core products.
        fp32_rate: flops per second of fp32 outside the tensor cores.
        source: the document the numbers are from.
    """

    key: str
    device_name: str
    arch: str
    multiprocessors: int
    memory_gb: float
    bandwidth: float
    tensor_rate: float
    fp32_rate: float
    source: str

    def rate(self, dtype: str) -> float:
        """Flops per second of a matrix product with operands of `dtype` (`"bfloat16"`, …)."""
        return self.fp32_rate if dtype == "float32" else self.tensor_rate


GPUS = {
    gpu.key: gpu
    for gpu in (
        Gpu(
            key="a6000",
            device_name="NVIDIA RTX A6000",
            arch="sm_86",
            multiprocessors=84,
            memory_gb=48,
            bandwidth=768e9,
            tensor_rate=154.8e12,
            fp32_rate=38.7e12,
            source="NVIDIA Ampere GA102 GPU Architecture whitepaper v2, RTX A6000",
        ),
        Gpu(
            key="a100",
            device_name="NVIDIA A100-SXM4-80GB",
            arch="sm_80",
            multiprocessors=108,
            memory_gb=80,
            bandwidth=2039e9,
            tensor_rate=312e12,
            fp32_rate=19.5e12,
            source="NVIDIA A100 80GB datasheet, SXM",
        ),
        Gpu(
            key="l40s",
            device_name="NVIDIA L40S",
            arch="sm_89",
            multiprocessors=142,
            memory_gb=48,
            bandwidth=864e9,
            tensor_rate=362.05e12,
            fp32_rate=91.6e12,
            source="NVIDIA L40S datasheet",
        ),
        Gpu(
            key="rtx4090",
            device_name="NVIDIA GeForce RTX 4090",
            arch="sm_89",
            multiprocessors=128,
            memory_gb=24,
            bandwidth=1008e9,
            tensor_rate=165.2e12,
            fp32_rate=82.6e12,
            source="NVIDIA Ada GPU Architecture whitepaper v2, GeForce RTX 4090",
        ),
        Gpu(
            key="h100",
            device_name="NVIDIA H100 80GB HBM3",
            arch="sm_90",
            multiprocessors=132,
            memory_gb=80,
            bandwidth=3350e9,
            tensor_rate=989.4e12,
            fp32_rate=66.9e12,
            source="NVIDIA H100 datasheet, SXM",
        ),
        Gpu(
            key="h200",
            device_name="NVIDIA H200",
            arch="sm_90",
            multiprocessors=132,
            memory_gb=141,
            bandwidth=4800e9,
            tensor_rate=989.4e12,
            fp32_rate=66.9e12,
            source="NVIDIA H200 datasheet, SXM",
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """The GPU with this key, or with the name that the driver gives.

    Raises:
        ValueError: an unknown GPU.
    """
    for gpu in GPUS.values():
        if name.lower() == gpu.key or name.startswith(gpu.device_name):
            return gpu
    raise ValueError(f"gpu is {name!r}; expected one of {', '.join(GPUS)}")


__all__ = ["GPUS", "Gpu", "find_gpu"]
