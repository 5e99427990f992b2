"""Initializes adapters: update estimation, truncated SVD, the named methods."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasb_kernels.init.estimation.api import estimate_gradients as estimate_gradients
    from lorasb_kernels.init.estimation.api import estimate_updates as estimate_updates
    from lorasb_kernels.init.estimation.noise_scale import NoiseScale as NoiseScale
    from lorasb_kernels.init.estimation.noise_scale import noise_scale as noise_scale
    from lorasb_kernels.init.estimation.options import EstimationOptions as EstimationOptions
    from lorasb_kernels.init.predict import predict_init as predict_init
    from lorasb_kernels.init.report import InitReport as InitReport
    from lorasb_kernels.init.sign_matrix import SignMatrix as SignMatrix
    from lorasb_kernels.init.svd.truncated import TruncatedSVD as TruncatedSVD
    from lorasb_kernels.init.svd.truncated import truncated_svd as truncated_svd
    from lorasb_kernels.init.svd.truncated import truncated_svd_batch as truncated_svd_batch

_HOME = {
    "EstimationOptions": "lorasb_kernels.init.estimation.options",
    "InitReport": "lorasb_kernels.init.report",
    "NoiseScale": "lorasb_kernels.init.estimation.noise_scale",
    "SignMatrix": "lorasb_kernels.init.sign_matrix",
    "TruncatedSVD": "lorasb_kernels.init.svd.truncated",
    "estimate_gradients": "lorasb_kernels.init.estimation.api",
    "estimate_updates": "lorasb_kernels.init.estimation.api",
    "noise_scale": "lorasb_kernels.init.estimation.noise_scale",
    "predict_init": "lorasb_kernels.init.predict",
    "truncated_svd": "lorasb_kernels.init.svd.truncated",
    "truncated_svd_batch": "lorasb_kernels.init.svd.truncated",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
