"""`bench.svd_cost`: its captured energy is checked against the exact decomposition."""

import pytest
import torch

from bench.svd_cost import ACCURACY, best_energy, captured, measure, random_signs, table


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_captured_energy_is_that_of_the_exact_decomposition(shape):
    dense = random_signs(shape).to_dense()
    _, S, Vt = torch.linalg.svd(dense.double())
    energies = best_energy(dense)
    torch.testing.assert_close(energies, S.square().cumsum(0))
    assert captured(dense, Vt[:5].T, float(energies[4])) == pytest.approx(1)
    assert captured(dense, Vt[1:6].T, float(energies[4])) < 0.99


def test_a_row_of_the_table():
    signs = random_signs((70, 90))
    dense = signs.to_dense()
    row = measure(signs, dense, float(best_energy(dense)[7]), 8, turns=1)
    assert row["captured"] >= ACCURACY > row["svd_lowrank captured"]
    assert row["svd_lowrank niter at equal accuracy"] > 10
    lines = table([{"kind": "random"} | row]).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| random | 70 × 90 | 8 |")
