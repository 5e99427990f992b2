"""The model card beside an adapter: what it says, and what it never says or overwrites."""

import re

import pytest
import yaml

from lorasb_kernels import LoRASBConfig, adapt, save_adapter
from tests.models import build


def adapted(name: str | None):
    model = build("llama")
    model.config._name_or_path = name
    return adapt(model, LoRASBConfig(r=4, init="orthogonal", target_modules=("q_proj", "v_proj")))


def test_the_card_names_base_method_and_targets(tmp_path):
    save_adapter(adapted("someone/some-model"), tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    _, front, text = card.split("---\n", 2)
    expected = {"base_model": "someone/some-model", "library_name": "lorasb_kernels"}
    assert yaml.safe_load(front) == expected | {"tags": ["orthogonal"]}
    for words in ("# orthogonal adapter of someone/some-model", "r = 4, s = 1", "q_proj, v_proj"):
        assert words in text


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_no_folder_of_this_machine_leaves_it(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret" / "base").mkdir(parents=True)
    name = str(tmp_path / "secret" / "base") if kind == "absolute" else "secret/base"
    save_adapter(adapted(name), tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        assert b"secret" not in file.read_bytes(), file.name
    card = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    assert "adapter of base" in card
    assert "base_model" not in card


def test_a_model_without_a_name_has_a_card_without_one(tmp_path):
    save_adapter(adapted(None), tmp_path)
    assert "a model without a name" in (tmp_path / "README.md").read_text("utf-8")


def test_a_card_of_the_user_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    save_adapter(adapted("someone/some-model"), tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_code_of_the_card_names_what_exists(tmp_path):
    save_adapter(adapted(None), tmp_path)
    import lorasb_kernels

    card = (tmp_path / "README.md").read_text("utf-8")
    for name in re.findall(r"(\w+)\(model", card):
        assert hasattr(lorasb_kernels, name), name
