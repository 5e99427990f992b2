"""Initializes adapters: update estimation, truncated SVD, the named methods."""

import importlib

_HOME = {
    "InitReport": "lorasb_kernels.init.report",
    "SignMatrix": "lorasb_kernels.init.sign_matrix",
    "TruncatedSVD": "lorasb_kernels.init.svd.truncated",
    "estimate_gradients": "lorasb_kernels.init.estimation.api",
    "estimate_updates": "lorasb_kernels.init.estimation.api",
    "predict_init": "lorasb_kernels.init.predict",
    "truncated_svd": "lorasb_kernels.init.svd.truncated",
    "truncated_svd_batch": "lorasb_kernels.init.svd.truncated",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
