"""NVIDIA's estimate beside the model's, where its package is installed."""

import pytest

from lorasb_kernels.hardware.gpus import GPUS
from lorasb_kernels.profiling.model_tables import vendor_table
from lorasb_kernels.profiling.shapes import PRESETS
from lorasb_kernels.profiling.vendor_estimate import installed, vendor_estimate


@pytest.mark.skipif(installed(), reason="the package is installed")
def test_without_the_package_it_says_which_is_missing():
    with pytest.raises(ModuleNotFoundError, match="nvMatmulHeuristics"):
        vendor_estimate(GPUS["a6000"], 512, 4096, 4096)


@pytest.mark.skipif(not installed(), reason="needs nvidia-matmul-heuristics")
def test_every_gpu_has_an_estimate_near_its_rates():
    for gpu in GPUS.values():
        seconds = vendor_estimate(gpu, 8192, 4096, 4096)
        assert 0.3 < 2 * 8192 * 4096**2 / seconds / gpu.tensor_rate < 1.1
    table = vendor_table(GPUS["a6000"], PRESETS["mistral-7b"].layers[:1], 512)
    assert "q_proj dx: 512×4096×4096" in table
