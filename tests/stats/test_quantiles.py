"""Quantiles from series against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import betaincinv, stdtrit

from mixlens.core.quantiles import beta_quantile, t_quantile


@pytest.mark.parametrize("tail", [0.025, 0.975, 0.1, 0.001, 1e-7])
def test_of_beta_and_t_distributions(tail):
    rng = np.random.default_rng(0)
    a, b = 10 ** rng.uniform(-1, 7, (2, 40, 50))
    np.testing.assert_allclose(beta_quantile(a, b, tail), betaincinv(a, b, tail), rtol=5e-6, atol=1e-300)
    freedom = 1 + 10 ** rng.uniform(-3, 6, 500)
    np.testing.assert_allclose(t_quantile(freedom, tail), stdtrit(freedom, 1 - tail), rtol=1e-7)


def test_of_no_distribution_and_of_many_tails():
    assert np.isnan(beta_quantile(np.array([np.nan, 2.0]), np.array([1.0, np.nan]), 0.025)).all()
    tails = np.array([0.1, 0.2])
    np.testing.assert_array_equal(beta_quantile(np.array(3.0), np.array(4.0), tails), betaincinv(3.0, 4.0, tails))
