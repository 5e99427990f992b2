"""Adapters and base models that are damaged or malicious.

Whatever the files contain, loading or merging either works or raises the documented error with a
name in it, leaves the model unchanged, writes nothing outside the output folder, runs no code and
takes no more memory than the files.
"""

import contextlib
import json
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorasb_kernels import SignMatrix, export_peft, import_peft, load_adapter, merge_checkpoint
from lorasb_kernels.io.peft_names import TENSORS_FILE
from lorasb_kernels.io.subspace import ADAPTER_FILE
from lorasb_kernels.targets import adapted_layers
from tests.rewriting import restate, rewrite
from tests.trust.conftest import LITTLE, MUCH
from tests.trust.hostile_files import Layers, damage, read_raw, write_adapter, write_raw
from tests.trust.watching import bounded_memory, tree, watched

SIGNS_FILE = "signs.safetensors"
NAMED = (ValueError, FileNotFoundError)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Whole adapters of each format and a base model; everything has been called once."""
    folder = tmp_path_factory.mktemp("originals")
    for init in ("orthogonal", "lora-xs"):
        write_adapter(folder / init, init)
        load_adapter(Layers(), folder / init)
    write_published(folder / "published")
    import_peft(Layers(), folder / "published")
    export_peft(load_adapter(Layers(), folder / "orthogonal"), folder / "plain")
    import_peft(Layers(), folder / "plain", plain_lora=True)
    (folder / "signs").mkdir()
    SignMatrix.from_dense(torch.randn(5, 70)).save(folder / "signs" / SIGNS_FILE)
    SignMatrix.load(folder / "signs" / SIGNS_FILE) @ torch.ones(70, 1)
    (folder / "base").mkdir()
    weights = Layers().state_dict()
    index = {"weight_map": {name: f"{name[0]}.safetensors" for name in weights}}
    for part in "01":
        tensors = {name: t for name, t in weights.items() if name[0] == part}
        save_file(tensors, folder / "base" / f"{part}.safetensors")
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    merge_checkpoint(folder / "base", folder / "orthogonal", folder / "merged", progress=False)
    return folder


def write_published(folder):
    """An adapter as the published LoRA-SB code saves it: peft's files and R."""
    model = load_adapter(Layers(), folder.parent / "orthogonal")
    export_peft(model, folder)
    tensors = load_file(folder / TENSORS_FILE)
    for name in [name for name in tensors if "lora_A" in name]:
        core = name.replace("lora_A", "default_lora_latent_mapping")
        tensors[core] = torch.eye(tensors[name].shape[0])
    save_file(tensors, folder / TENSORS_FILE)


def check_loading(draw, originals, tmp_path, kind):
    folder = tmp_path / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals / kind, folder)
    damage(draw, folder)
    if kind in ("orthogonal", "lora-xs") and draw(st.booleans()):
        with contextlib.suppress(Exception):  # where the damage leaves nothing to state
            restate(folder)
    load = {"published": import_peft, "plain": partial(import_peft, plain_lora=True)}
    load = load.get(kind, load_adapter)
    model = Layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    files = tree(tmp_path)
    message = None
    with watched():
        try:
            load(model, folder)
        except NAMED as error:
            assert type(error) in NAMED, f"{type(error).__name__} says too little: {error}"  # noqa: PT017
            message = str(error)
    assert tree(tmp_path) == files
    state = model.state_dict()
    if message is None:
        assert all(tensor.isfinite().all() for tensor in state.values())
    else:
        assert len(message) < 3000
        assert not adapted_layers(model)
        assert state.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, state[name])


def check_merging(draw, originals, tmp_path):
    folder = tmp_path / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("base", "orthogonal"):
        shutil.copytree(originals / name, folder / name)
    damage(draw, folder / draw(st.sampled_from(["base", "orthogonal"])))
    if draw(st.booleans()):
        with contextlib.suppress(Exception):
            restate(folder / "orthogonal")
    files = tree(folder)
    with watched(folder):  # the output is built in a temporary folder next to it
        try:
            merge_checkpoint(folder / "base", folder / "orthogonal", folder / "out", progress=False)
        except NAMED as error:
            assert type(error) in NAMED, f"{type(error).__name__} says too little: {error}"  # noqa: PT017
            assert not (folder / "out").exists()
    shutil.rmtree(folder / "out", ignore_errors=True)
    assert tree(folder) == files


def check_signs(draw, originals, tmp_path):
    folder = tmp_path / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals / "signs", folder)
    damage(draw, folder)
    files = tree(folder)
    with watched():
        try:
            loaded = SignMatrix.load(folder / SIGNS_FILE)
        except NAMED as error:
            assert type(error) in NAMED, f"{type(error).__name__} says too little: {error}"  # noqa: PT017
        else:
            dense = loaded.to_dense()
            assert dense.shape == loaded.shape
            product = loaded @ torch.ones(dense.shape[1], 1)
            torch.testing.assert_close(product, dense.sum(1, keepdim=True), equal_nan=True)
    assert tree(folder) == files


@pytest.mark.parametrize("kind", ["orthogonal", "lora-xs", "published", "plain"])
def test_an_adapter_loads_or_is_named(originals, tmp_path, kind):
    def load(count: int) -> None:
        settings(LITTLE, max_examples=count)(
            given(st.data())(lambda d: check_loading(d.draw, originals, tmp_path, kind))
        )()

    load(8)  # what is imported at the first loads and errors is not the file's doing
    with bounded_memory(200):
        load(60)


def test_saved_signs_load_or_are_named(originals, tmp_path):
    with bounded_memory(200):
        given(st.data())(lambda d: check_signs(d.draw, originals, tmp_path))()


def test_a_base_model_is_merged_or_named(originals, tmp_path):
    with bounded_memory(200):
        settings(LITTLE, max_examples=60)(
            given(st.data())(lambda d: check_merging(d.draw, originals, tmp_path))
        )()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["orthogonal", "lora-xs", "published", "plain"])
def test_ten_thousand_adapters(originals, tmp_path, kind):
    with bounded_memory(300):
        settings(MUCH)(
            given(st.data())(lambda d: check_loading(d.draw, originals, tmp_path, kind))
        )()


@pytest.mark.slow
def test_ten_thousand_base_models(originals, tmp_path):
    with bounded_memory(300):
        settings(MUCH)(given(st.data())(lambda d: check_merging(d.draw, originals, tmp_path)))()


@pytest.mark.parametrize("name", ["../escaped.safetensors", "/tmp/escaped.safetensors", "x/y", ""])
def test_a_shard_cannot_name_a_file_elsewhere(originals, tmp_path, name):
    shutil.copytree(originals / "base", tmp_path / "base")
    index = tmp_path / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["0.weight"] = name
    index.write_text(json.dumps(content))
    (tmp_path / "escaped.safetensors").write_bytes(b"precious")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"index\.json.*expected the name of a file beside it"):
        merge_checkpoint(tmp_path / "base", originals / "orthogonal", tmp_path / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("length", [2**20, 2**40, 2**63, 2**64 - 1])
def test_a_declared_size_is_not_believed(originals, tmp_path, length):
    folder = tmp_path / "adapter"
    shutil.copytree(originals / "orthogonal", folder)
    header, data = read_raw(folder / ADAPTER_FILE)
    write_raw(folder / ADAPTER_FILE, header, data, length)
    with bounded_memory(50), pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(Layers(), folder)
    header["huge"] = {"dtype": "F32", "shape": [length], "data_offsets": [0, 4 * length]}
    write_raw(folder / ADAPTER_FILE, header, data)
    with bounded_memory(50), pytest.raises(ValueError, match="not a whole safetensors file"):
        load_adapter(Layers(), folder)


def test_numbers_that_overflow_the_layer_are_not_finite(originals, tmp_path):
    """1e300 is finite in the file's fp64 and infinite in the fp32 core."""
    folder = tmp_path / "adapter"
    shutil.copytree(originals / "orthogonal", folder)
    cores = {"cores": torch.full((2, 2, 2), 1e300, dtype=torch.float64)}
    rewrite(folder / ADAPTER_FILE, lambda tensors: tensors.update(cores))
    with pytest.raises(ValueError, match=r"0\.lora_R holds non-finite values"):
        load_adapter(Layers(), folder)
