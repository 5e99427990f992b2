"""Fused kernels for low-rank adapters around frozen linear layers (LoRA-SB, LoRA-XS, LoRA).

Public names are imported at first use: `import lorasb_kernels` costs little more than
`import torch` and needs neither triton, nor transformers, nor a GPU.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasb_kernels import functional as functional
    from lorasb_kernels import init as init
    from lorasb_kernels.adaptation import adapt as adapt
    from lorasb_kernels.adaptation import merge_and_unload as merge_and_unload
    from lorasb_kernels.base_model import adapters_disabled as adapters_disabled
    from lorasb_kernels.base_model import reference_model as reference_model
    from lorasb_kernels.config import LoRASBConfig as LoRASBConfig
    from lorasb_kernels.description import describe as describe
    from lorasb_kernels.init import EstimationOptions as EstimationOptions
    from lorasb_kernels.init import SignMatrix as SignMatrix
    from lorasb_kernels.io.cores import load_cores as load_cores
    from lorasb_kernels.io.cores import sync_cores as sync_cores
    from lorasb_kernels.io.load import load_adapter as load_adapter
    from lorasb_kernels.io.merge_checkpoint import merge_checkpoint as merge_checkpoint
    from lorasb_kernels.io.peft_export import export_peft as export_peft
    from lorasb_kernels.io.peft_import import import_peft as import_peft
    from lorasb_kernels.io.save import save_adapter as save_adapter
    from lorasb_kernels.io.subspace import Subspace as Subspace
    from lorasb_kernels.nn import AdaptedLinear as AdaptedLinear
    from lorasb_kernels.nn import LoRALinear as LoRALinear
    from lorasb_kernels.nn import LoRASBLinear as LoRASBLinear
    from lorasb_kernels.ops.explain import explain as explain
    from lorasb_kernels.ops.extension import build_info as build_info
    from lorasb_kernels.optim.packed_cores import PackedCores as PackedCores
    from lorasb_kernels.optim.preconditioned import PreconditionedAdamW as PreconditionedAdamW

__version__ = "0.1.0"

_HOME = {
    "AdaptedLinear": "lorasb_kernels.nn",
    "EstimationOptions": "lorasb_kernels.init",
    "SignMatrix": "lorasb_kernels.init",
    "Subspace": "lorasb_kernels.io.subspace",
    "LoRALinear": "lorasb_kernels.nn",
    "LoRASBConfig": "lorasb_kernels.config",
    "LoRASBLinear": "lorasb_kernels.nn",
    "PackedCores": "lorasb_kernels.optim.packed_cores",
    "PreconditionedAdamW": "lorasb_kernels.optim.preconditioned",
    "adapt": "lorasb_kernels.adaptation",
    "adapters_disabled": "lorasb_kernels.base_model",
    "build_info": "lorasb_kernels.ops.extension",
    "describe": "lorasb_kernels.description",
    "explain": "lorasb_kernels.ops.explain",
    "export_peft": "lorasb_kernels.io.peft_export",
    "import_peft": "lorasb_kernels.io.peft_import",
    "load_adapter": "lorasb_kernels.io.load",
    "load_cores": "lorasb_kernels.io.cores",
    "merge_and_unload": "lorasb_kernels.adaptation",
    "merge_checkpoint": "lorasb_kernels.io.merge_checkpoint",
    "reference_model": "lorasb_kernels.base_model",
    "save_adapter": "lorasb_kernels.io.save",
    "sync_cores": "lorasb_kernels.io.cores",
}

_MODULES = ("functional", "init")

__all__ = ["__version__", *_MODULES, *_HOME]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
