"""Wrong arguments are named before anything runs."""

import numpy as np
import pytest

import ptxcheck
from ptxcheck.__main__ import main

TEXT = """
.version 8.0
.target sm_86
.address_size 64
.visible .entry copy(.param .u64 px, .param .u32 n)
{
    ret;
}
.visible .entry other(.param .u64 px)
.reqntid 64
{
    ret;
}
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cp_async": "eager"}, "cp_async is 'eager'; it must be one of 'strict', 'late', 'early'"),
        ({"stats": "all"}, "stats is 'all'"),
        ({"wgmma_registers": "no"}, "wgmma_registers is 'no'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ptxcheck.load(TEXT).launch("other", 1, 64, [None], **options)


@pytest.mark.parametrize(
    ("name", "block", "arguments", "message"),
    [
        ("copy", 32, [None], "takes 2 arguments"),
        ("copy", 32, [None, 2**40], "does not fit"),
        ("copy", 32, [None, np.zeros(4)], "buffer given for a 4-byte parameter"),
        ("copy", 2048, [None, 1], "bad block size"),
        ("other", 32, [None], "requires block"),
        ("missing", 32, [], "no kernel 'missing'; kernels: copy, other"),
        ("copy", 32, ["x", 1], "px is 'x'"),
        ("copy", 32, [None, 2.5], r"n is 2\.5; \.u32 is expected"),
    ],
)
def test_launches(name, block, arguments, message):
    with pytest.raises(ptxcheck.PtxError, match=message):
        ptxcheck.load(TEXT).launch(name, 1, block, arguments)


def test_a_source_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"there is no file absent\.cu"):
        ptxcheck.nvcc_ptx("absent.cu")


def test_buffers_do_not_overlap():
    memory = ptxcheck.Memory()
    data = np.zeros(64, np.uint8)
    memory.map_at(0x5000, data, "first")
    memory.map_at(0x5040, data, "next")
    for address, size in ((0x503F, 1), (0x4FF8, 9), (0x4000, 0x2000), (0x5010, 8)):
        with pytest.raises(ptxcheck.PtxError, match=r"third .* overlaps first"):
            memory.map_at(address, np.zeros(size, np.uint8), "third")
    assert memory.find(0x507F).name == "next"
    assert memory.find(0x5080) is None


def test_the_command_lists_kernels_and_what_is_not_supported(tmp_path, monkeypatch, capsys):
    path = tmp_path / "kernels.ptx"
    path.write_text(TEXT.replace("ret;", "tcgen05.fence::before_thread_sync;\n    ret;", 1))
    monkeypatch.setattr("sys.argv", ["ptxcheck", str(path)])
    assert main() == 1
    listed, fault, other = capsys.readouterr().out.splitlines()
    assert listed.endswith("kernels.ptx: copy(u64, u32)")
    assert fault.startswith("    unsupported: PTX line 7: tcgen05")
    assert other.endswith("kernels.ptx: other(u64)")
