"""Plain LoRA, and adapters of the published LoRA-SB and LoRA-XS code, saved by the real peft."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file, save_file

from lorasb_kernels import export_peft, import_peft, load_adapter, save_adapter
from tests.models import batches, build

FILE = "adapter_model.safetensors"


def published(directory: Path, architecture: str, **options):
    """A peft LoRA model with a latent mapping as the published code adds it, and its logits."""
    torch.manual_seed(0)
    model = get_peft_model(build(architecture), LoraConfig(r=4, lora_alpha=8, **options)).eval()
    handles = []
    for layer in model.modules():
        if isinstance(layer, PeftLinear):
            layer.lora_B.default.weight.data.normal_(std=0.3)
            mapping = torch.nn.Linear(4, 4, bias=False)
            layer.default_lora_latent_mapping = mapping
            handles.append(
                layer.lora_A.default.register_forward_hook(lambda _, __, h, f=mapping: f(h))
            )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
        logits = model(**batches(architecture)[0]).logits
    model.save_pretrained(directory)
    return logits


def respell(directory: Path, spelling: str) -> None:
    tensors = load_file(directory / FILE)
    renamed = {}
    for key, tensor in tensors.items():
        layer, found, _ = key.partition(".default_lora_latent_mapping")
        if not found:
            layer, found, _ = key.partition("_lora_latent_mapping")
        renamed[f"{layer}{spelling}" if found else key] = tensor.contiguous()
    assert any(key.endswith(spelling) for key in renamed)
    save_file(renamed, directory / FILE)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("published")
    return directory, published(directory, "llama", target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize(
    "spelling",
    [
        "_lora_latent_mapping.weight",
        ".default_lora_latent_mapping.weight",
        ".lora_latent_mapping.weight",
    ],
)
def test_every_spelling_loads(llama, tmp_path, spelling):
    directory, logits = llama
    copy = shutil.copytree(directory, tmp_path / "copy")
    respell(copy, spelling)
    model = import_peft(build("llama"), copy)
    torch.testing.assert_close(model(**batches("llama")[0]).logits, logits)


def test_a_classifier_and_rank_stabilized_scaling(tmp_path):
    logits = published(
        tmp_path / "published",
        "roberta",
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        use_rslora=True,
    )
    model = import_peft(build("roberta"), tmp_path / "published")
    batch = batches("roberta")[0]
    torch.testing.assert_close(model(**batch).logits, logits)
    save_adapter(model, tmp_path / "ours")
    again = load_adapter(build("roberta"), tmp_path / "ours")
    assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_plain_lora_loads_and_goes_on_training(tmp_path, use_rslora):
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "down_proj"], "use_rslora": use_rslora}
    peft_model = get_peft_model(build("llama"), LoraConfig(r=4, lora_alpha=6, **options)).eval()
    for layer in peft_model.modules():
        if isinstance(layer, PeftLinear):
            layer.lora_B.default.weight.data.normal_(std=0.3)
    peft_model.save_pretrained(tmp_path)
    model = import_peft(build("llama"), tmp_path, plain_lora=True)
    batch = batches("llama")[0]
    ours, theirs = model(**batch), peft_model(**batch)
    torch.testing.assert_close(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    expected = {n: p.grad for n, p in peft_model.named_parameters() if p.requires_grad}
    assert len(gradients) == len(expected) == 8
    for name, gradient in expected.items():
        name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
        torch.testing.assert_close(gradients[name], gradient)
    export_peft(model, tmp_path / "exported")
    again = import_peft(build("llama"), tmp_path / "exported", plain_lora=True)
    torch.testing.assert_close(again(**batch).logits, theirs.logits)


def test_weights_that_are_stored_transposed(tmp_path):
    model = get_peft_model(build("gpt2"), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    batch = batches("gpt2")[0]
    ours = import_peft(build("gpt2"), tmp_path, plain_lora=True)
    torch.testing.assert_close(ours(**batch).logits, model.eval()(**batch).logits)


def test_a_core_is_not_dropped_for_plain_lora(llama):
    with pytest.raises(ValueError, match=r"has an R .*; expected none with plain_lora=True"):
        import_peft(build("llama"), llama[0], plain_lora=True)


def drop(part):
    def damage(tensors, config):
        del tensors[next(key for key in tensors if part in key)]

    return damage


def plain_lora(tensors, config):
    for key in [key for key in tensors if "latent" in key]:
        del tensors[key]


def not_finite(tensors, config):
    next(iter(tensors.values()))[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (plain_lora, r"has lora_A and lora_B but no R .*plain LoRA adapter"),
        (drop("latent"), r"has lora_A and lora_B but no R"),
        (drop("lora_A"), "has no lora_A"),
        (drop("lora_B"), "has no lora_B"),
        (not_finite, "non-finite"),
        (lambda t, c: t.update(stray=torch.ones(1)), r"unexpected tensors \['stray'\]"),
        (lambda t, c: c.update(use_dora=True), "use_dora is True; expected False"),
        (lambda t, c: c.update(bias="all"), "bias is 'all'; expected 'none'"),
        (lambda t, c: c.update(peft_type="LOHA"), "peft_type is 'LOHA'; expected 'LORA'"),
    ],
)
def test_nothing_is_dropped_in_silence(llama, tmp_path, damage, message):
    copy = shutil.copytree(llama[0], tmp_path / "copy")
    tensors = load_file(copy / FILE)
    config = json.loads((copy / "adapter_config.json").read_text())
    damage(tensors, config)
    save_file(tensors, copy / FILE)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    model = build("llama")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        import_peft(model, copy)
    assert list(model.state_dict()) == keys
