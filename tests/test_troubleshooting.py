"""docs/troubleshooting.md quotes messages: every quote is raised here, every error is quoted."""

import dataclasses
import json
import re
from pathlib import Path

import bitsandbytes
import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import (
    Int4TilePackedTo4dTensor,
)
from transformers import Trainer, TrainingArguments

from lorasb_kernels import (
    EstimationOptions,
    LoRASBConfig,
    LoRASBLinear,
    PackedCores,
    adapt,
    export_peft,
    import_peft,
    load_adapter,
    merge_and_unload,
    merge_checkpoint,
    save_adapter,
)
from lorasb_kernels.integrations.peft import LoRASBPeftConfig
from lorasb_kernels.targets import adapted_layers
from lorasb_kernels.train.methods import prepare
from lorasb_kernels.train.output_folder import claim, difference, locked
from tests.ecosystem.quantizers import QUANTIZERS, quantize_model
from tests.models import batches, build
from tests.train.conftest import tiny_config

PAGE = Path(__file__).parents[1] / "docs" / "troubleshooting.md"
QUOTES = [
    " ".join(quote.split()) for quote in re.findall(r"\*\*`(.*?)`\*\*", PAGE.read_text(), re.DOTALL)
]
CONFIG = LoRASBConfig(r=4, target_modules=("q_proj",), init="orthogonal")
ERRORS = {}


def error(function):
    ERRORS[function.__name__] = function
    return function


def adapted(config=CONFIG, seed=0):
    return adapt(build("llama", seed), config, progress=False)


def of_one_layer(layer):
    return adapt(nn.ModuleDict({"proj": layer}), LoRASBConfig(r=4, init="orthogonal"))


@error
def nothing_matched(folder, patch):
    adapt(build("llama"), LoRASBConfig(r=4, target_modules=("q_project",)))


@error
def weight_of_another_kind(folder, patch):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    of_one_layer(layer)


@error
def sharded(folder, patch):
    model = adapted()
    save_adapter(model, folder)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        load_adapter(fully_shard(model, mesh=init_device_mesh("cpu", (1,))), folder)
    finally:
        dist.destroy_process_group()


@error
def repacked(folder, patch):
    layer = QUANTIZERS["bitsandbytes nf4"](nn.Linear(64, 96))
    layer.weight.data, _ = bitsandbytes.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    of_one_layer(layer)


@error
def packed_for_inference(folder, patch):
    layer = nn.Linear(64, 96)
    codes = torch.zeros(12, 4, 32, 4, dtype=torch.int32)
    weight = Int4TilePackedTo4dTensor(codes, torch.zeros(2, 96, 2), [1, 32], (96, 64))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    of_one_layer(layer)


@error
def merged_into_codes(folder, patch):
    model = quantize_model(build("llama"), "bitsandbytes nf4")
    merge_and_unload(adapt(model, CONFIG, progress=False))


@error
def merged_into_codes_on_disk(folder, patch):
    save_adapter(adapted(), folder / "adapter")
    (folder / "base").mkdir()
    tensors = {f"{name}.weight": torch.zeros(512, 1, dtype=torch.uint8) for name in layer_names()}
    save_file(tensors, folder / "base" / "model.safetensors")
    merge_checkpoint(folder / "base", folder / "adapter", folder / "out", progress=False)


def layer_names():
    return list(adapted_layers(adapted()))


@error
def another_forward(folder, patch):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    of_one_layer(Doubled(8, 8))


class PassesBy(nn.Module):
    """Calls one layer, and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


@error
def without_effect(folder, patch):
    options = EstimationOptions(loss_fn=lambda model, x: model(x).sum())
    config = LoRASBConfig(4, ("called", "read"), "orthogonal")
    adapt(PassesBy(), config, [torch.ones(2, 8)], estimation=options, progress=False)


@error
def unreached(folder, patch):
    model = adapt(PassesBy(), LoRASBConfig(4, init="lora-xs"), progress=False)
    model(torch.ones(2, 8)).sum().backward()
    with pytest.warns(UserWarning, match="had no gradient in the first step"):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    merge_and_unload(model)


@error
def tied(folder, patch):
    model = build("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    adapt(model, LoRASBConfig(r=4, target_modules=("lm_head",), init="orthogonal"))


@error
def no_batches(folder, patch):
    adapt(build("llama"), LoRASBConfig(r=4))


@error
def cast_core(folder, patch):
    layer = LoRASBLinear(8, 8, 2)
    layer.lora_R.data = layer.lora_R.data.bfloat16()
    layer(torch.randn(1, 8))


@error
def named_backend(folder, patch):
    patch.setenv("TRITON_INTERPRET", "0")
    LoRASBLinear(8, 8, 2, backend="triton")(torch.randn(1, 8))


@error
def quantized_in_the_trainer(folder, patch):
    model = build("llama")
    model.is_quantized = True
    Trainer(model, TrainingArguments(output_dir=str(folder), use_cpu=True))


PLUG_IN = LoRASBPeftConfig(r=4, target_modules=["q_proj"])


@error
def plug_in_not_imported(folder, patch):
    get_peft_model(build("llama"), PLUG_IN).save_pretrained(folder)
    patch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LORASB)  # as before the import
    PeftModel.from_pretrained(build("llama"), folder)


@error
def plug_in_without_gradients(folder, patch):
    get_peft_model(build("llama"), PLUG_IN)(**batches("llama")[0])


@error
def reentrant_checkpoint(folder, patch):
    layer = LoRASBLinear(8, 8, 2)
    checkpoint(layer, torch.randn(1, 8), use_reentrant=True).sum().backward()


@error
def moved_after_packing(folder, patch):
    model = adapted()
    packed = PackedCores(model)
    for layer in adapted_layers(model).values():
        layer.lora_R.data = layer.lora_R.data.clone()
    model(**batches("llama")[0]).loss.backward()
    assert packed.parameter.grad is not None


@error
def other_subspace(folder, patch):
    save_adapter(adapted(), folder)
    save_adapter(adapted(dataclasses.replace(CONFIG, seed=1)), folder / "b")
    (folder / "b" / "adapter.safetensors").replace(folder / "adapter.safetensors")
    load_adapter(build("llama"), folder)


@error
def edited(folder, patch):
    save_adapter(adapted(), folder)
    record = json.loads((folder / "lorasb_config.json").read_text())
    record["config"]["lora_alpha"] = 18
    (folder / "lorasb_config.json").write_text(json.dumps(record))
    load_adapter(build("llama"), folder)


@error
def without_its_subspace(folder, patch):
    save_adapter(adapted(), folder / "subspace")
    save_adapter(adapted(), folder / "tenant", subspace=folder / "subspace")
    (folder / "subspace").rename(folder / "moved")
    load_adapter(build("llama"), folder / "tenant")


@error
def damaged(folder, patch):
    save_adapter(adapted(), folder)
    content = bytearray((folder / "adapter.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(content)
    load_adapter(build("llama"), folder)


@error
def other_base(folder, patch):
    save_adapter(adapted(), folder)
    load_adapter(build("llama", seed=1), folder)


@error
def other_singular_vectors(folder, patch):
    save_adapter(adapted(LoRASBConfig(r=4, init="lora-xs")), folder)
    load_adapter(build("llama", seed=1), folder)


@error
def not_on_the_hub(folder, patch):
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_adapter(build("llama"), "user/name")


@error
def plain_lora(folder, patch):
    export_peft(adapted(), folder)
    import_peft(build("llama"), folder)


def peft_settings(folder, **settings):
    export_peft(adapted(), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    import_peft(build("llama"), folder, plain_lora=True)


@error
def pissa(folder, patch):
    peft_settings(folder, init_lora_weights="pissa")


@error
def dora(folder, patch):
    peft_settings(folder, use_dora=True)


@error
def beside_a_model(folder, patch):
    build("llama").save_pretrained(folder)
    adapted().save_pretrained(folder)


@error
def merged(folder, patch):
    model = adapted()
    next(iter(adapted_layers(model).values())).merge()
    save_adapter(model, folder)


@error
def new_head(folder, patch):
    config = LoRASBConfig(r=4, target_modules=("query",), init="orthogonal")
    save_adapter(adapt(build("roberta"), config, progress=False), folder / "adapter")
    build("llama").save_pretrained(folder / "base")
    merge_checkpoint(folder / "base", folder / "adapter", folder / "out", progress=False)


@error
def folder_in_use(folder, patch):
    with locked(folder), locked(folder):
        pass


@error
def other_settings(folder, patch):
    claim(folder, tiny_config("model", folder), ())
    (folder / "checkpoint-1").mkdir()
    difference(folder, tiny_config("model", folder, r=2), ())


@error
def another_adapter(folder, patch):
    save_adapter(adapted(), folder / "adapter")
    config = tiny_config("model", folder, method="orthogonal", r=2, target_modules=("q_proj",))
    prepare(build("llama"), config, (), 0, 1e-3, folder / "adapter")


def matches(quote, message):
    pattern = re.escape(quote).replace(re.escape("..."), ".*?")
    return re.match(pattern, " ".join(message.split())) is not None


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", ERRORS)
def test_what_is_raised_is_quoted(name, tmp_path, monkeypatch):
    with pytest.raises(Exception) as raised:  # noqa: PT011 - the page says which
        ERRORS[name](tmp_path, monkeypatch)
    quoted = [quote for quote in QUOTES if matches(quote, str(raised.value))]
    assert len(quoted) == 1, f"{raised.value!r} is quoted {len(quoted)} times"
    assert list(ERRORS).index(name) == QUOTES.index(quoted[0]), "the page has another order"


def test_every_quote_is_raised_here():
    assert len(QUOTES) == len(ERRORS)
