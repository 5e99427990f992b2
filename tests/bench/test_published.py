"""The model's error on GEMMs that others have published: pinned, and quoted in its page."""

import pytest

from bench.published import comparisons, sources, summary


def test_the_error_on_published_gemms():
    found = comparisons()
    square = [c for c in found if min(c.sizes) >= 512]
    skinny = [c for c in found if min(c.sizes) < 512]
    assert (len(square), len(skinny)) == (12, 9)
    assert summary(square) == pytest.approx((0.038, 0.145), abs=0.005)
    assert summary(skinny) == pytest.approx((0.253, 0.593), abs=0.005)


def test_every_table_names_its_source():
    assert all("github.com/" in source for _, source in sources())
