"""A run that starts from the adapter of another task: cores and what fits of the head."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lorasb_kernels import load_adapter, save_adapter
from lorasb_kernels.targets import adapted_layers
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.errors import ConfigError
from lorasb_kernels.train.methods import prepare
from tests.train.conftest import reviews, tiny_config


def prepared(bert, tokenizer, folder, labels=2, **settings):
    config = tiny_config(bert, folder, task="classification", **settings)
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=labels)
    samples = Encoder(tokenizer, 32).labelled(reviews(16))
    return prepare(model, config, samples, 0, 1e-3, progress=False)


@pytest.mark.parametrize("method", ["lora-xs", "lora-sb", "lora"])
@pytest.mark.parametrize("labels", [2, 3])
def test_cores_and_what_fits_of_the_head_are_taken_over(bert, tokenizer, tmp_path, method, labels):
    source = prepared(bert, tokenizer, tmp_path / "mnli", labels, method=method)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    save_adapter(source, tmp_path / "mnli" / "adapter")
    settings = {"method": method, "seed": 5}
    new = prepared(bert, tokenizer, tmp_path / "new", **settings)
    started = prepared(
        bert, tokenizer, tmp_path / "rte", init_from=str(tmp_path / "mnli"), **settings
    )
    for name, layer in adapted_layers(source).items():
        own = started.get_submodule(name)
        for factor in ("lora_A", "lora_B", "lora_R"):
            if getattr(layer, factor) is not None:
                assert torch.equal(getattr(own, factor), getattr(layer, factor)), factor
    expected = source if labels == 2 else new
    assert torch.equal(started.classifier.weight, expected.classifier.weight)
    save_adapter(started, tmp_path / "saved")  # and can be loaded again
    again = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    load_adapter(again, tmp_path / "saved")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 2}, "its r is 4; expected 2"),
        ({"method": "lora-sb"}, "its init is 'lora-xs'; expected 'lora-sb'"),
        ({"target_modules": "all-linear"}, "expected the same layers"),
        ({"target_modules": ("query",)}, "too; expected the same layers"),
        ({"init_from": "/nowhere"}, "init_from is '/nowhere': /nowhere is missing"),
    ],
)
def test_another_kind_of_adapter_is_refused(bert, tokenizer, tmp_path, settings, message):
    own = {"method": "lora-xs", "target_modules": ("query", "value")}
    save_adapter(prepared(bert, tokenizer, tmp_path / "mnli", **own), tmp_path / "mnli" / "adapter")
    with pytest.raises(ConfigError, match=message):
        prepared(
            bert,
            tokenizer,
            tmp_path / "rte",
            **{**own, "init_from": str(tmp_path / "mnli"), **settings},
        )
