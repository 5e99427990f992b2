"""Fused kernels for low-rank adapters around frozen linear layers (LoRA-SB, LoRA-XS, LoRA).

Public names are imported at first use: `import lorasb_kernels` costs little more than
`import torch` and needs neither triton, nor transformers, nor a GPU.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "SignMatrix": "lorasb_kernels.init",
    "LoRALinear": "lorasb_kernels.nn",
    "LoRASBConfig": "lorasb_kernels.config",
    "LoRASBLinear": "lorasb_kernels.nn",
    "PackedCores": "lorasb_kernels.optim.packed_cores",
    "PreconditionedAdamW": "lorasb_kernels.optim.preconditioned",
    "adapt": "lorasb_kernels.adaptation",
    "build_info": "lorasb_kernels.ops.extension",
    "describe": "lorasb_kernels.description",
    "explain": "lorasb_kernels.ops.explain",
    "export_peft": "lorasb_kernels.io.peft_format",
    "import_peft": "lorasb_kernels.io.peft_format",
    "load_adapter": "lorasb_kernels.io.checkpoint",
    "merge_and_unload": "lorasb_kernels.adaptation",
    "merge_checkpoint": "lorasb_kernels.io.merge_checkpoint",
    "save_adapter": "lorasb_kernels.io.checkpoint",
}

_MODULES = ("functional", "init")

__all__ = ["__version__", *_MODULES, *_HOME]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
