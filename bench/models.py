"""The papers' models with random weights, and the timed ways to adapt them."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.contenders import Published
from lorasb_kernels import LoRASBConfig, adapt
from lorasb_kernels.profiling.workload import Operands
from lorasb_kernels.targets import find_targets

PEFT_RANK = 32  # the LoRA that the LoRA-SB paper compares with


def configuration(key: str, layers: int | None = None):
    """The transformers configuration of a preset, with fewer blocks if asked."""
    import transformers as hf

    base, fields = {
        "llama-3.2-3b": (
            hf.LlamaConfig,
            {
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "num_hidden_layers": 28,
                "num_attention_heads": 24,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 128256,
                "tie_word_embeddings": True,
            },
        ),
        "mistral-7b": (
            hf.MistralConfig,
            {
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 32000,
            },
        ),
        "gemma-2-9b": (
            hf.Gemma2Config,
            {
                "hidden_size": 3584,
                "intermediate_size": 14336,
                "num_hidden_layers": 42,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "head_dim": 256,
                "vocab_size": 256000,
            },
        ),
        "roberta-large": (
            hf.RobertaConfig,
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "vocab_size": 50265,
                "max_position_embeddings": 514,
                "pad_token_id": 1,
            },
        ),
        "smollm2-135m": (
            hf.LlamaConfig,
            {
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "vocab_size": 49152,
                "tie_word_embeddings": True,
            },
        ),
        "tiny": (
            hf.LlamaConfig,
            {
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "vocab_size": 64,
            },
        ),
    }[key]
    if layers is not None:
        fields = {**fields, "num_hidden_layers": layers}
    return base(**fields)


def random_model(
    key: str, device: torch.device, dtype: torch.dtype, layers: int | None = None
) -> nn.Module:
    """A preset with random weights on `device`, frozen; a classifier if it is an encoder."""
    import transformers as hf

    config = configuration(key, layers)
    kind = hf.AutoModelForCausalLM
    if isinstance(config, hf.RobertaConfig):
        kind = hf.AutoModelForSequenceClassification
    with torch.device(device):
        model = kind.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def blocks_that_fit(
    key: str, device: torch.device, dtype: torch.dtype, full: bool = False
) -> int | None:
    """How many blocks fit in 70 % of the free device memory; None for all of them.

    The rest is for activations of one micro-batch under gradient checkpointing. With `full`
    fine-tuning a weight comes with its gradient and two moments.
    """
    if device.type != "cuda":
        return None
    config = configuration(key)
    with torch.device("meta"):
        sizes = [_parameters(key, layers) * dtype.itemsize for layers in (1, 2)]
    block = sizes[1] - sizes[0]
    free = (0.7 / 4 if full else 0.7) * torch.cuda.mem_get_info(device)[0]
    return max(1, min(config.num_hidden_layers, int((free - sizes[0]) / block) + 1))


def _parameters(key: str, layers: int) -> int:
    model = random_model(key, torch.device("meta"), torch.bfloat16, layers)
    return sum(parameter.numel() for parameter in model.parameters())


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares all weights."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@dataclass(frozen=True)
class Method:
    """A way to train: `adapt(model, r)` changes the model in place and returns it.

    `full`: trains copies of the weights. `needs`: a package that may not be installed; it needs a
    GPU.
    """

    name: str
    adapt: Callable[[nn.Module, int], nn.Module]
    autocast: bool = False
    full: bool = False
    needs: str | None = None

    def obstacle(self, device: torch.device) -> str | None:
        """Why it cannot run on a device; None when it can."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.needs is not None and device.type != "cuda":
            return f"{self.needs} needs a CUDA device"
        return None


def _bound(model: nn.Module, r: int) -> nn.Module:
    """No adapter; the input of the first block gets a gradient, so all of backward runs."""
    model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: output.requires_grad_()
    )
    return model


def _published(model: nn.Module, r: int) -> nn.Module:
    for name, linear in find_targets(model, "all-linear").items():
        m, n = linear.weight.shape
        options = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        operands = Operands(
            weight=linear.weight,
            bias=linear.bias,
            lora_A=torch.randn(r, n, **options) * n**-0.5,
            lora_R=torch.zeros(r, r, **options),
            lora_B=torch.randn(m, r, **options) * m**-0.5,
            scaling=1.0,
        )
        model.set_submodule(name, Published(operands))
    return model


def _peft(model: nn.Module, r: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = sorted({name.rpartition(".")[2] for name in find_targets(model, "all-linear")})
    rank = min(PEFT_RANK, r)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def _ours(model: nn.Module, r: int, backend: str, shared: bool) -> nn.Module:
    config = LoRASBConfig(r, init="orthogonal", backend=backend, share_inputs=shared)
    return adapt(model, config, progress=False)


def _full(model: nn.Module, r: int) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # twins share their weights
    return model.requires_grad_(True)


def _with_liger(adapted: Callable[[nn.Module, int], nn.Module]):
    """Liger-Kernel's norms, activations and loss in the model before it is adapted.

    It also replaces names in the module that defines the model, which other contenders use; they
    are put back, so its rotation is not among what is measured.
    """

    def patched(model: nn.Module, r: int) -> nn.Module:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        names = vars(sys.modules[type(model).__module__])
        before = dict(names)
        _apply_liger_kernel_to_instance(model=model)
        names.update(before)
        return adapted(model, r)

    return patched


METHODS = {
    method.name: method
    for method in (
        Method("frozen", _bound),
        Method("published", _published),
        Method(f"peft r={PEFT_RANK}, autocast", _peft, autocast=True),
        Method("lorasb auto", lambda model, r: _ours(model, r, "auto", False)),
        Method("lorasb auto, shared input", lambda model, r: _ours(model, r, "auto", True)),
        Method("full fine-tuning", _full, full=True),
        Method(
            name=f"peft r={PEFT_RANK}, autocast, Liger",
            adapt=_with_liger(_peft),
            autocast=True,
            needs="liger_kernel",
        ),
        Method(
            name="lorasb auto, shared input, Liger",
            adapt=_with_liger(lambda model, r: _ours(model, r, "auto", True)),
            needs="liger_kernel",
        ),
    )
}

__all__ = ["METHODS", "Method", "blocks_that_fit", "random_model", "twin"]
