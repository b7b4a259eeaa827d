"""The Gaussian process's hyperparameters: the kernel, the gradient, and what is learned."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from scipy.special import gamma, kv

from cape.metamodel.process import Learned, Trials, average, learn, matern


def test_the_kernel_is_materns_of_five_halves() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 3)), rng.normal(size=(7, 3))
    distance = np.sqrt(5.0) * np.linalg.norm(a[:, None] - b[None], axis=2)
    wanted = 2.0**-1.5 / gamma(2.5) * distance**2.5 * kv(2.5, distance)
    np.testing.assert_allclose(matern(a, b), wanted, rtol=1e-12)
    np.testing.assert_allclose(np.diag(matern(a, a)), 1.0, atol=1e-6)
    assert matern(a[:0], b).shape == (0, 7)


@pytest.mark.parametrize("augmented", [0.0, 0.4, 1.0])
def test_the_gradient_is_exact(augmented: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    seen: dict[str, Any] = {}
    minimize = scipy.optimize.minimize

    def spy(loss: Any, start: np.ndarray, **options: Any) -> Any:
        seen.update(loss=lambda theta: loss(theta, *options["args"]), start=start)
        return minimize(loss, start, **options)

    monkeypatch.setattr(scipy.optimize, "minimize", spy)
    z = rng.normal(size=(30, 3))
    y, some = np.sin(z[:, 0]) + 0.1 * rng.normal(size=30), rng.random(30) < augmented
    learn(Trials(z, y, some, 0.1 * rng.random(30), rng.normal(size=30)))
    theta = seen["start"] + 0.3 * rng.normal(size=len(seen["start"]))
    step = 1e-5 * np.eye(len(theta))
    slopes = [(seen["loss"](theta + e)[0] - seen["loss"](theta - e)[0]) / 2e-5 for e in step]
    np.testing.assert_allclose(seen["loss"](theta)[1], slopes, rtol=1e-6, atol=1e-6)


def test_it_learns_what_matters_and_the_noise() -> None:
    rng = np.random.default_rng(1)
    z = rng.normal(size=(300, 3))
    y = np.sin(2.0 * z[:, 0]) + 0.1 * rng.normal(size=300)
    learned = learn(Trials(z, y, np.zeros(300, dtype=bool), np.zeros(300), np.zeros(300)))
    lengths = learned.lengths[0]
    assert lengths[0] < 2.0 and min(lengths[1:]) > 5.0 * lengths[0]
    assert learned.noise == pytest.approx(0.1, rel=0.2)
    assert learned.extra == 0.0 and learned.lengths.shape == (1, 3)


def test_trials_of_a_single_configuration_leave_the_lengths_as_they_were() -> None:
    learned = learn(Trials(np.zeros((10, 2)), np.zeros(10), np.zeros(10, dtype=bool), *np.zeros((2, 10))))
    np.testing.assert_allclose(learned.lengths, 2.0, rtol=1e-6)  # √(2k)


def test_what_is_known_of_an_error_is_not_learned_as_noise() -> None:
    rng = np.random.default_rng(2)
    z, plain = rng.normal(size=(300, 2)), np.zeros(300, dtype=bool)
    y = np.sin(2.0 * z[:, 0]) + 0.5 * rng.normal(size=300)
    assert learn(Trials(z, y, plain, *np.zeros((2, 300)))).noise == pytest.approx(0.5, rel=0.2)
    assert learn(Trials(z, y, plain, np.full(300, 0.25), np.zeros(300))).noise < 0.15


@pytest.mark.parametrize("fall", [0.0, 0.5])
def test_it_learns_how_the_noise_falls_as_the_batch_grows(fall: float) -> None:
    rng = np.random.default_rng(3)
    z, log_batch = rng.normal(size=(400, 2)), rng.choice(np.log([0.5, 1.0, 2.0]), size=400)
    y = np.sin(2.0 * z[:, 0]) + 0.2 * np.exp(-fall * log_batch) * rng.normal(size=400)
    learned = learn(Trials(z, y, np.zeros(400, dtype=bool), np.zeros(400), log_batch))
    assert learned.fall == pytest.approx(fall, abs=0.1)
    assert learned.noise == pytest.approx(0.2, rel=0.15)


def test_what_several_draws_say_is_their_geometric_mean() -> None:
    one = Learned(np.array([[1.0, 4.0]]), np.array([0.5]), 0.1, 0.0, 0.2)
    other = Learned(np.array([[4.0, 1.0]]), np.array([2.0]), 0.4, 0.0, 0.4)
    found = average([one, other])
    np.testing.assert_allclose(found.lengths, [[2.0, 2.0]])
    assert found.amplitudes.tolist() == pytest.approx([1.0])
    assert found.noise == pytest.approx(0.2) and found.extra == 0.0 and found.fall == pytest.approx(0.3)


def test_one_thread_holds_for_libraries_that_were_not_loaded_yet() -> None:
    """A process's first fit must round as its second: scipy brings a pool of its own."""
    code = """
from cape.metamodel.process import Trials, learn, one_thread
import numpy as np
from threadpoolctl import threadpool_info
with one_thread():
    z = np.random.default_rng(0).normal(size=(30, 2))
    learn(Trials(z, np.arange(30.0) % 3, np.zeros(30, bool), *np.zeros((2, 30))))
    pools = [p for p in threadpool_info() if p["user_api"] == "blas"]
print(len(pools), *{p["num_threads"] for p in pools}, max(p["num_threads"] for p in threadpool_info()))
"""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
    pools, threads, after = found.split()
    assert int(pools) >= 1 and (threads, after) == ("1", "2")
