"""SignMatrix: its dense matrix, counts, equality, saving and loading."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lorasb_kernels
from lorasb_kernels import SignMatrix
from lorasb_kernels.init import sign_matrix


def ternary(m, n, seed=0):
    return torch.randint(-1, 2, (m, n), generator=torch.Generator().manual_seed(seed)).float()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**32))
def test_stands_for_the_dense_signs(m, n, seed):
    dense = ternary(m, n, seed)
    S = SignMatrix.from_dense(dense * 7.5)
    assert S.shape == (m, n)
    assert torch.equal(S.to_dense(), dense)
    assert torch.equal(S.T.to_dense(), dense.T)
    assert S.T.T == S
    assert S.zeros() == int((dense == 0).sum())
    assert S.norm() == pytest.approx(dense.double().norm().item(), rel=1e-12)
    assert S.nonfinite() == 0
    assert torch.equal(S.gram(), dense @ dense.T)
    assert torch.equal(S.T.gram(), dense.T @ dense)


def test_two_bits_an_element():
    assert SignMatrix.from_dense(ternary(512, 1024)).nbytes == 512 * 1024 // 4


def test_transpose_shares_the_planes():
    S = SignMatrix.from_dense(ternary(20, 50))
    assert S.T.shape == (50, 20)
    assert S.T.positive.data_ptr() == S.positive.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dense_dtypes(dtype):
    dense = SignMatrix.from_dense(ternary(5, 40)).to_dense(dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense.float(), ternary(5, 40))
    with pytest.raises(TypeError, match="int8"):
        SignMatrix.from_dense(ternary(5, 40)).to_dense(torch.int8)


def test_equality():
    S = SignMatrix.from_dense(ternary(20, 50))
    assert SignMatrix.from_dense(ternary(20, 50)) == S
    assert SignMatrix.from_dense(ternary(20, 50, seed=1)) != S
    assert SignMatrix.from_dense(-ternary(20, 50)) != S
    assert S.T != S
    assert S != "a sign matrix"
    other_storage = SignMatrix.from_dense(ternary(20, 50).T)
    assert other_storage == S.T
    assert other_storage.T == S
    assert SignMatrix.from_dense(torch.zeros(2, 33)) != SignMatrix.from_dense(torch.zeros(2, 34))


def test_non_finite_elements_are_counted_and_stay():
    dense = ternary(6, 40)
    dense[2, 3], dense[4, 39], dense[5, 0] = math.nan, math.inf, -math.inf
    S = SignMatrix.from_dense(dense)
    assert S.nonfinite() == 3
    assert math.isnan(S.norm())
    assert torch.equal(S.to_dense().isnan(), ~dense.isfinite())


@pytest.mark.parametrize("matrix_units", [False, True])
def test_gram_is_exact_with_and_without_matrix_units(matrix_units, monkeypatch):
    """Over more than one step of 256 columns, also at the largest possible sums."""
    monkeypatch.setattr(sign_matrix, "_fast_bfloat16", lambda device: matrix_units)
    for dense in (ternary(30, 700), torch.ones(9, 1030)):
        S = SignMatrix.from_dense(dense)
        assert torch.equal(S.gram(), dense @ dense.T)
        assert torch.equal(S.T.gram(), dense.T @ dense)


def test_saves_and_loads(tmp_path):
    S = SignMatrix.from_dense(ternary(20, 50))
    for matrix in (S, S.T):
        matrix.save(tmp_path / "signs.safetensors")
        loaded = SignMatrix.load(tmp_path / "signs.safetensors")
        assert loaded == matrix
        assert loaded.shape == matrix.shape
    assert [path.name for path in tmp_path.iterdir()] == ["signs.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "signs.safetensors"
    S = SignMatrix.from_dense(ternary(20, 50))
    S.save(path)

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(OSError, match="disk full"):
        SignMatrix.from_dense(ternary(3, 4)).save(path)
    monkeypatch.undo()
    assert SignMatrix.load(path) == S
    assert list(tmp_path.iterdir()) == [path]


def test_loading_something_else_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        SignMatrix.load(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    save_file({"weight": torch.ones(2)}, tmp_path / "weights")
    planes = {name: torch.zeros(2, 2, dtype=torch.int32) for name in ("positive", "negative")}
    save_file(planes, tmp_path / "no metadata")
    save_file(planes, tmp_path / "wrong columns", {"columns": "20", "transposed": "0"})
    for name in ("text", "weights", "no metadata", "wrong columns"):
        with pytest.raises(ValueError, match=f"{name}.*expected a saved SignMatrix"):
            SignMatrix.load(tmp_path / name)


def test_bad_planes_are_named():
    planes = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"positive has shape \(2, 2\)"):
        SignMatrix(planes, planes, 20)
    with pytest.raises(TypeError, match="negative has dtype"):
        SignMatrix(planes, planes.long(), 50)


def test_is_public_and_prints_its_size():
    assert "SignMatrix" in lorasb_kernels.__all__
    assert repr(SignMatrix.from_dense(ternary(20, 50))) == "SignMatrix(20×50, 320 bytes on cpu)"
