"""NTK baselines against what they approximate: plain gradient descent on a model that is linear."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from cape.baselines.ntk import ntk_ode, ntkl, true_logit_gram
from cape.errors import ModelError, SpecError


def test_ntkl_is_log_over_the_mean_eigenvalue_and_at_least_one() -> None:
    gram = np.cov(np.random.default_rng(0).standard_normal((6, 50)))
    log_tau = math.log(np.trace(gram) / 6)
    mean_eigenvalue = np.linalg.eigvalsh(gram).mean()
    assert ntkl([log_tau], [0.001])[0] == pytest.approx(math.log(1000) / mean_eigenvalue)
    assert ntkl([7.0, 3.0], 0.1).tolist() == [1.0, 1.0]


def test_ode_predicts_gradient_descent_on_linear_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 40, generator=generator, dtype=torch.float64)
    y = torch.randn(24, generator=generator, dtype=torch.float64)
    weights = torch.zeros(40, dtype=torch.float64)
    lr, epsilon = 2e-3, 0.1
    first, steps = float((y**2).mean()), 0
    while float(((x @ weights - y) ** 2).mean()) > epsilon * first:
        weights -= lr * x.T @ (x @ weights - y) / len(y)  # gradient of ½·mean(r²)
        steps += 1
    assert steps > 100
    assert ntk_ode((x @ x.T).numpy(), -y.numpy(), lr, epsilon) == pytest.approx(steps, rel=0.02)


def test_ode_is_exact_for_one_eigenvalue_and_scales_with_lr() -> None:
    gram, residual = 3.0 * np.eye(4), np.ones(4)
    expected = math.log(1 / 0.2) / (2 * 0.01 * 3.0 / 4)
    assert ntk_ode(gram, residual, 0.01, 0.2) == pytest.approx(expected)
    assert ntk_ode(gram, residual, 0.02, 0.2) == pytest.approx(expected / 2)


def test_ode_never_arrives_when_the_null_space_holds_the_residual() -> None:
    gram = np.diag([5.0, 0.0])
    assert ntk_ode(gram, np.array([0.0, 1.0]), 0.1) == math.inf
    assert ntk_ode(gram, np.array([1.0, 0.2]), 0.1, 0.1) < math.inf
    assert ntk_ode(gram, np.zeros(2), 0.1) == 0.0


def test_ode_refuses_what_does_not_fit() -> None:
    with pytest.raises(ModelError, match=r"\[B, B\]"):
        ntk_ode(np.eye(3), np.ones(4), 0.1)
    with pytest.raises(ModelError, match="NaN"):
        ntk_ode(np.full((2, 2), np.nan), np.ones(2), 0.1)
    with pytest.raises(SpecError):
        ntk_ode(np.eye(2), np.ones(2), 0.1, 1.5)


def test_gram_of_real_digits_has_tau_as_its_mean_diagonal() -> None:
    from sklearn.datasets import load_digits

    from cape.probing import per_sample_norms

    digits = load_digits()
    x = torch.tensor(digits.data[:12] / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target[:12])
    model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 10))
    gram, residual = true_logit_gram(model, (x, y))
    assert gram.shape == (12, 12)
    np.testing.assert_allclose(gram, gram.T)
    _, tau = per_sample_norms(model, (x, y))
    np.testing.assert_allclose(np.diag(gram), tau.numpy(), rtol=1e-5)
    with torch.no_grad():
        p = model.eval()(x).softmax(1)[torch.arange(12), y]
    np.testing.assert_allclose(residual, (p - 1).numpy(), rtol=1e-5)
    assert 0 < ntk_ode(gram, residual, 1e-3) < math.inf
