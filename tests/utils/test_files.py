"""Atomic writing."""

import json
import os

import pytest
import torch
from safetensors import safe_open

from lorasb_kernels.utils.files import atomic_folder, replacing, write_tensors, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_a_plain_file(mask, tmp_path):
    before = os.umask(mask)
    try:
        (tmp_path / "plain").write_text("")
        write_text(tmp_path / "file", "")
        write_tensors(tmp_path / "tensors", {"R": torch.ones(2)})
    finally:
        os.umask(before)
    expected = (tmp_path / "plain").stat().st_mode
    assert expected & 0o777 == 0o666 & ~mask
    assert (tmp_path / "file").stat().st_mode == expected
    assert (tmp_path / "tensors").stat().st_mode == expected


def test_the_umask_of_the_process_is_never_changed(tmp_path, monkeypatch):
    """Not even briefly: another thread might create a file in it."""
    set_to = []
    monkeypatch.setattr(os, "umask", lambda mask: set_to.append(mask) or 0o022)
    write_text(tmp_path / "file", "")
    write_tensors(tmp_path / "tensors", {"R": torch.ones(2)})
    with atomic_folder(tmp_path / "folder"):
        pass
    assert set_to == []


def test_metadata_are_written_in_one_order(tmp_path):
    """safetensors itself writes them in another order in every process."""
    metadata = {name: f'{name} "é"\n\x1f' for name in "hgfedcba"}
    tensors = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.zeros(2, 5)}
    write_tensors(tmp_path / "x", tensors, metadata)
    content = (tmp_path / "x").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == sorted(metadata)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensors[name]) for name in tensors)
