"""Every model, against the float64 loop."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cape
from cape import datasets, families
from cape.errors import ModelError, SpecError
from cape.probing.per_sample import all_norms
from cape.probing.reference import per_sample_norms_reference
from cape.state import map_tensors
from tests.cases import ARCHITECTURES, CASES, Case, labels, sequences, vectors


def relative(ours: Tensor, reference: Tensor) -> float:
    """Largest relative error; zero norms must be zero to the same absolute scale."""
    scale = reference.abs().clamp(min=1e-12 * float(reference.abs().max().clamp(min=1e-300)))
    return float(((ours - reference).abs() / scale).max())


def check_fallback(case: Case, fallback: tuple[str, ...]) -> None:
    if case.intercepted:
        assert fallback == ()
    elif case.fallback is not None:
        assert fallback == case.fallback


def to_double(value: object) -> object:
    if isinstance(value, nn.Module):
        for t in [*value.double().parameters(), *value.buffers()]:
            t.data = t.data.to(torch.complex128) if t.is_complex() else t.data  # double() leaves these alone
        return value
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, value)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float32(case: Case, backend: str) -> None:
    model, batch = case.make()
    norms = all_norms(model, batch, loss=case.loss, backend=backend)
    g2, tau = per_sample_norms_reference(model, batch, loss=case.loss)
    assert relative(norms.g2, g2) < 1e-5
    assert relative(norms.tau, tau) < 1e-5
    check_fallback(case, norms.fallback)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64(case: Case) -> None:
    model, batch = case.make(1)
    model, batch = to_double(model), to_double(batch)
    norms = all_norms(model, batch, loss=case.loss)
    g2, tau = per_sample_norms_reference(model, batch, loss=case.loss)
    assert relative(norms.g2, g2) < 1e-10
    assert relative(norms.tau, tau) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("case", ARCHITECTURES, ids=lambda c: c.name)
def test_architectures(case: Case) -> None:
    """In float64: a single ReLU that flips in float32 moves one sample's norm by more than rounding does."""
    model, batch = case.make()
    model, batch = to_double(model), to_double(batch)
    norms = all_norms(model, batch, loss=case.loss)
    g2, tau = per_sample_norms_reference(model, batch, loss=case.loss)
    assert relative(norms.g2, g2) < 1e-10
    assert relative(norms.tau, tau) < 1e-10
    check_fallback(case, norms.fallback)


def to_cuda(value: object) -> object:
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, tuple):
        return tuple(to_cuda(v) for v in value)
    return {k: to_cuda(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_on_cuda(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model, batch = case.make()
    loss = copy.deepcopy(case.loss).cuda() if isinstance(case.loss, nn.Module) else case.loss
    g2, tau = per_sample_norms_reference(model, batch, loss=case.loss)
    norms = all_norms(model.cuda(), to_cuda(batch), loss=loss)  # type: ignore[arg-type]
    assert relative(norms.g2.cpu(), g2) < 1e-5
    assert relative(norms.tau.cpu(), tau) < 1e-5


@pytest.mark.parametrize("name", ["mlp", "convolutions", "GRU batch_first", "attention batch_first=False"])
def test_full_jacobian_trace(name: str) -> None:
    model, batch = next(c for c in CASES if c.name == name).make()
    _, tau = cape.per_sample_norms(model, batch, tau="full")
    _, reference = per_sample_norms_reference(model, batch, tau="full")
    assert relative(tau, reference) < 1e-5


def test_hutchinson_estimates_the_full_trace() -> None:
    model, batch = CASES[0].make()
    _, full = cape.per_sample_norms(model, batch, tau="full")
    _, estimate = cape.per_sample_norms(model, batch, tau="hutchinson", probes=400)
    assert relative(estimate, full) < 0.35
    assert abs(float(estimate.mean() / full.mean()) - 1) < 0.1


@pytest.mark.parametrize("name", ["convolutions", "LSTM batch_first", "shared layer", "raw parameters"])
def test_micro_batches_change_nothing(name: str) -> None:
    model, batch = next(c for c in CASES if c.name == name).make()
    whole = all_norms(model, batch, micro_batch=100)
    pieces = all_norms(model, batch, micro_batch=2)
    assert relative(pieces.g2, whole.g2) < 1e-6
    assert relative(pieces.tau, whole.tau) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "shared layer"])
def test_random_signs_do_not_depend_on_how_a_batch_is_cut(name: str) -> None:
    model, batch = next(c for c in CASES if c.name == name).make()
    whole, pieces = (all_norms(model, batch, tau="hutchinson", micro_batch=n).tau_full for n in (100, 2))
    assert whole is not None and pieces is not None
    assert relative(pieces, whole) < 1e-6


def test_repeats_bit_for_bit() -> None:
    for case in CASES[:12]:
        model, batch = case.make()
        first, second = all_norms(model, batch, loss=case.loss), all_norms(model, batch, loss=case.loss)
        assert torch.equal(first.g2, second.g2) and torch.equal(first.tau, second.tau)


def test_leaves_everything_as_it_was() -> None:
    model, batch = next(c for c in CASES if c.name == "convolutions").make()
    model.train()
    model[1].eval()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 != 0)
        p.grad = torch.full_like(p, 2.0) if i % 2 else None
    before = copy.deepcopy(model)  # without the gradients
    inputs = batch[0].clone()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    cape.per_sample_norms(model, batch)
    cape.probe(model, batch, lr=1e-3, dataset_size=1000)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(batch[0], inputs)
    for old, new in zip(before.modules(), model.modules(), strict=True):
        assert old.training == new.training
        assert not new._forward_hooks and not new._backward_hooks and not new._forward_pre_hooks
    for i, (old, new) in enumerate(zip(before.parameters(), model.parameters(), strict=True)):
        assert torch.equal(old, new) and old.requires_grad == new.requires_grad
        assert (new.grad is not None) == (i % 2 == 1)
        assert new.grad is None or bool((new.grad == 2.0).all())
    for old, new in zip(before.buffers(), model.buffers(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x, y: (m, x[:0], y[:0]), "empty"),
        (lambda m, x, y: (m, x, y + 8), "0..9"),
        (lambda m, x, y: (m, x * float("nan"), y), "NaN"),
        (lambda m, x, y: (m, x[:4], y), "samples"),
        (lambda m, x, y: (nn.Flatten(), x, y), "no trainable parameter"),
    ],
)
def test_bad_batches_say_what_is_wrong(change: object, message: str) -> None:
    model, x, y = change(nn.Linear(20, 10), vectors(), labels(6))  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        cape.per_sample_norms(model, (x, y))


def test_unknown_names() -> None:
    model, batch = nn.Linear(20, 10), (vectors(), labels(6))
    with pytest.raises(SpecError, match="Did you mean 'cross_entropy'"):
        cape.per_sample_norms(model, batch, loss="crossentropy")
    with pytest.raises(SpecError, match="Unknown tau"):
        cape.per_sample_norms(model, batch, tau="trace")
    with pytest.raises(SpecError, match="Unknown backend"):
        cape.per_sample_norms(model, batch, backend="cuda")


def test_the_reference_agrees_with_finite_differences() -> None:
    """Where torch's own backward pass of a batch of one does not (batch norm, then tokens)."""
    case = next(c for c in CASES if c.name == "one sample, tokens after batch norm")
    model, (x, y) = case.make()
    model, x = model.double().eval(), x.double()
    total, h = 0.0, 1e-5
    with torch.no_grad():
        for p in model.parameters():
            for i in range(p.numel()):
                losses = []
                for sign in (1, -2, 1):  # up, down, and back again
                    p.view(-1)[i] += sign * h
                    losses.append(float(nn.functional.cross_entropy(model(x), y)))
                total += ((losses[0] - losses[1]) / (2 * h)) ** 2
    g2, _ = per_sample_norms_reference(model, (x, y))
    assert float(g2) == pytest.approx(total, rel=1e-6)


def family_cases() -> list[Case]:
    """Every architecture of every family, drawn as a sweep draws it, on the bundled digits (or characters)."""
    draws: dict[str, tuple[Any, Any]] = {}
    digits = datasets.load("digits")
    for name in families.names():
        for seed in range(60):
            spec = families.get(name).sample(np.random.default_rng(seed), digits)
            shape = dict(spec.options)
            draws.setdefault(f"{name}/{spec.architecture}/{shape.get('bidirectional', '')}", (name, spec))
    return [
        # As in `cases/architectures.py`: other statistics saturate torchvision's squeeze-and-excite gates.
        Case(
            key,
            functools.partial(lambda s: (families.build(s), digits.batch(3, 0, s.layout)), spec),
            randomized=name != "backbone",
        )
        for key, (name, spec) in sorted(draws.items())
    ]


@pytest.mark.parametrize("case", family_cases(), ids=lambda c: c.name)
def test_families(case: Case) -> None:
    model, batch = case.make()
    norms = all_norms(model, batch)
    g2, tau = per_sample_norms_reference(model, batch)
    assert relative(norms.g2, g2) < 1e-5
    assert relative(norms.tau, tau) < 1e-5
    assert norms.fallback == ()


def test_tau_is_not_g2() -> None:
    """One published script built τ from the loss gradients, so that τ ≡ g²; ours must not."""
    model, batch = CASES[0].make()
    g2, tau = cape.per_sample_norms(model, batch)
    assert float(((g2 - tau).abs() / tau).min()) > 1e-3


def test_recurrent_state_reaches_the_next_network() -> None:
    """The encoder's last state starts the decoder: gradients flow through h0 and c0."""

    class Seq2Seq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.LSTM(12, 8, batch_first=True), nn.LSTM(12, 8, batch_first=True)
            self.head = nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            _, state = self.encoder(x)
            return self.head(self.decoder(x.flip(1), state)[0][:, -1])

    model, batch = Seq2Seq(), (sequences(), labels(5))
    norms = all_norms(model, batch)
    g2, tau = per_sample_norms_reference(model, batch)
    assert norms.fallback == ()
    assert relative(norms.g2, g2) < 1e-5 and relative(norms.tau, tau) < 1e-5
