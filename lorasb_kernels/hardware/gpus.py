"""Known GPUs: the numbers in their datasheets, and what others measured of their rates.

Datasheet rates are dense (without structured sparsity), 16-bit products with fp32 accumulation, at
boost clock; bandwidth is that of device memory. Real devices reach less of both: `Rates` says how
much, each number with its source. Nothing here was measured by this library.

Sources of the rates:

    gemm     github.com/mag-/gpu_benchmark at 93322b7 (2024-10): best bf16 torch.matmul of a search
             over shapes; the median of 100 runs, L2 flushed
    bench    github.com/te42kyfo/gpu-benches at 1c36d50 (2024-06): gpu-stream (triad), gpu-l2-cache
             and gpu-cache (reads that fit L2), gpu-latency (dependent loads), gpu-small-kernels
             (64 KB in a CUDA graph, less the latency of L2)
    assumed  no published figure was found; the neighbour it is taken from is named
"""

import math
from dataclasses import dataclass, fields

# 23 to 33 clocks for a load from shared memory and 33 for a product (gpu-benches;
# arXiv:2402.13499), the rest for two barriers.
STALL = 100.0


@dataclass(frozen=True)
class Rates:
    """What a device sustains, as far as it is no datasheet number; `lorasb profile` fits these.

    Args:
        tensor: flops per second of 16-bit products in a large GEMM: sets the clock under load.
        bandwidth: bytes per second of device memory, read and written.
        l2: bytes per second between L2 and the multiprocessors.
        latency: seconds from a load to its data in device memory.
        launch: seconds between two kernels of a CUDA graph in which neither computes.
        stall: clocks that a step of a Triton loop waits beside its work: two barriers, the first
            load from shared memory and the last product overlap with nothing of the same block.
    """

    tensor: float
    bandwidth: float
    l2: float
    latency: float
    launch: float
    stall: float = STALL


RATES = tuple(field.name for field in fields(Rates))


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        key: short name, as `--gpu` takes it.
        device_name: the name that the driver reports.
        arch: `"sm_86"` and so on.
        multiprocessors: number of SMs.
        memory_gb: device memory, 10⁹ bytes.
        l2_bytes: size of the L2 cache.
        clock: boost clock in Hz.
        bandwidth: bytes per second.
        tensor_rate: flops per second of bf16 and fp16 tensor-core products.
        fp32_rate: flops per second of fp32 outside the tensor cores.
        source: the document the numbers are from.
        rates: what the device sustains.
        rates_source: where those are from, in the order of `RATES`, but for `stall`.
    """

    key: str
    device_name: str
    arch: str
    multiprocessors: int
    memory_gb: float
    l2_bytes: int
    clock: float
    bandwidth: float
    tensor_rate: float
    fp32_rate: float
    source: str
    rates: Rates
    rates_source: tuple[str, ...]

    def rate(self, dtype: str) -> float:
        """Flops per second of a matrix product with operands of `dtype` (`"bfloat16"`, …)."""
        return self.fp32_rate if dtype == "float32" else self.tensor_rate

    @property
    def flops_per_clock(self) -> float:
        """Flops per clock of one multiprocessor's tensor cores, 16-bit operands: a power of two."""
        return 2 ** round(math.log2(self.tensor_rate / (self.multiprocessors * self.clock)))

    @property
    def clock_under_load(self) -> float:
        """The clock at which the tensor cores reach the sustained rate, Hz."""
        return self.rates.tensor / (self.multiprocessors * self.flops_per_clock)


MB = 1 << 20
_GPUS = (
    Gpu(
        key="a6000",
        device_name="NVIDIA RTX A6000",
        arch="sm_86",
        multiprocessors=84,
        memory_gb=48,
        l2_bytes=6 * MB,
        clock=1.80e9,
        bandwidth=768e9,
        tensor_rate=154.8e12,
        fp32_rate=38.7e12,
        source="NVIDIA Ampere GA102 GPU Architecture whitepaper v2, RTX A6000",
        rates=Rates(131.2e12, 0.94 * 768e9, 2.43e12, 0.40e-6, 0.9e-6),
        rates_source=(
            "gemm",
            "bench: the A40, the same chip, reaches 94 %",
            "bench: A40",
            "assumed: as the A100",
            "bench: A40",
        ),
    ),
    Gpu(
        key="a100",
        device_name="NVIDIA A100-SXM4-80GB",
        arch="sm_80",
        multiprocessors=108,
        memory_gb=80,
        l2_bytes=40 * MB,
        clock=1.41e9,
        bandwidth=2039e9,
        tensor_rate=312e12,
        fp32_rate=19.5e12,
        source="NVIDIA A100 80GB datasheet, SXM",
        rates=Rates(267.9e12, 0.86 * 2039e9, 5.4e12, 0.40e-6, 1.2e-6),
        rates_source=("gemm", "bench: 86 %", "bench", "bench", "bench"),
    ),
    Gpu(
        key="l40s",
        device_name="NVIDIA L40S",
        arch="sm_89",
        multiprocessors=142,
        memory_gb=48,
        l2_bytes=96 * MB,
        clock=2.49e9,
        bandwidth=864e9,
        tensor_rate=362.05e12,
        fp32_rate=91.6e12,
        source="NVIDIA L40S datasheet",
        rates=Rates(252.0e12, 0.89 * 864e9, 5.2e12, 0.63e-6, 0.8e-6),
        rates_source=("gemm", *("bench: L40, the same chip",) * 4),
    ),
    Gpu(
        key="rtx4090",
        device_name="NVIDIA GeForce RTX 4090",
        arch="sm_89",
        multiprocessors=128,
        memory_gb=24,
        l2_bytes=72 * MB,
        clock=2.52e9,
        bandwidth=1008e9,
        tensor_rate=165.2e12,
        fp32_rate=82.6e12,
        source="NVIDIA Ada GPU Architecture whitepaper v2, GeForce RTX 4090",
        rates=Rates(178.8e12, 0.89 * 1008e9, 5.2e12, 0.63e-6, 0.8e-6),
        rates_source=(
            "gemm: above the datasheet, as the clock passes its boost",
            *("bench: L40, the same chip with 11 % more multiprocessors",) * 4,
        ),
    ),
    Gpu(
        key="rtx5090",
        device_name="NVIDIA GeForce RTX 5090",
        arch="sm_120",
        multiprocessors=170,
        memory_gb=32,
        l2_bytes=96 * MB,
        clock=2.407e9,
        bandwidth=1792e9,
        tensor_rate=209.5e12,
        fp32_rate=104.8e12,
        source="NVIDIA RTX Blackwell GPU Architecture whitepaper v1.1, GeForce RTX 5090",
        rates=Rates(0.95 * 209.5e12, 0.89 * 1792e9, 5.2e12, 0.63e-6, 0.8e-6),
        rates_source=("assumed: 95 % of the datasheet", *("assumed: as the RTX 4090",) * 4),
    ),
    Gpu(
        key="h100",
        device_name="NVIDIA H100 80GB HBM3",
        arch="sm_90",
        multiprocessors=132,
        memory_gb=80,
        l2_bytes=50 * MB,
        clock=1.83e9,
        bandwidth=3350e9,
        tensor_rate=989.4e12,
        fp32_rate=66.9e12,
        source="NVIDIA H100 datasheet, SXM",
        rates=Rates(821.2e12, 0.90 * 3350e9, 9.7e12, 0.37e-6, 1.2e-6),
        rates_source=(
            "gemm",
            "bench: H100 PCIe reaches 90 %",
            "bench: H200, the same chip",
            "bench: H100 PCIe",
            "bench: H200",
        ),
    ),
    Gpu(
        key="h200",
        device_name="NVIDIA H200",
        arch="sm_90",
        multiprocessors=132,
        memory_gb=141,
        l2_bytes=50 * MB,
        clock=1.83e9,
        bandwidth=4800e9,
        tensor_rate=989.4e12,
        fp32_rate=66.9e12,
        source="NVIDIA H200 datasheet, SXM",
        rates=Rates(821.2e12, 0.81 * 4800e9, 9.7e12, 0.37e-6, 1.2e-6),
        rates_source=(
            "assumed: as the H100",
            "bench: reads reach 81 %",
            "bench",
            "bench: H100 PCIe",
            "bench",
        ),
    ),
)
GPUS = {gpu.key: gpu for gpu in _GPUS}
# The device that stands for an architecture where only that is known, as in tile tables.
OF_ARCHITECTURE = {"sm_80": "a100", "sm_86": "a6000", "sm_89": "rtx4090", "sm_90": "h100"}


def find_gpu(name: str) -> Gpu:
    """The GPU with this key, with or without its `rtx`, or with the name that the driver gives.

    Raises:
        ValueError: an unknown GPU, or a part of a name: other devices' names begin with it, or it
            begins with theirs, as "NVIDIA GeForce RTX 4090 Laptop GPU" does.
    """
    wanted = name.lower()
    for gpu in GPUS.values():
        if wanted in (gpu.key, gpu.key.removeprefix("rtx"), gpu.device_name.lower()):
            return gpu
    alike = [
        f"{gpu.key} ({gpu.device_name})"
        for gpu in GPUS.values()
        if wanted and (wanted in gpu.device_name.lower() or gpu.device_name.lower() in wanted)
    ]
    expected = "the whole name of one of " if alike else "one of "
    raise ValueError(f"gpu is {name!r}; expected {expected}{', '.join(alike or GPUS)}")


__all__ = ["GPUS", "OF_ARCHITECTURE", "RATES", "Gpu", "Rates", "find_gpu"]
