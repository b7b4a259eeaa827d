"""What is refused and why, what a caller may do around the probe, and that no model is left changed."""

from __future__ import annotations

import contextlib
import gc
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cape
from cape.errors import ModelError, SpecError
from cape.probing.per_sample import all_norms
from cape.probing.reference import per_sample_norms_reference
from tests.cases import CASES, Case, Functional, labels, vectors, weight
from tests.probing.test_per_sample import relative

NAMED = {c.name: c for c in CASES}

# ---- samples that interact -----------------------------------------------------------------------------------------


def _forced(m: nn.Module, x: Tensor) -> Tensor:
    m.norm.train()  # type: ignore[union-attr,operator]
    return m.head(m.norm(m.body(x)))  # type: ignore[operator]


def _attention(m: nn.Module, x: Tensor) -> Tensor:
    x = x[:, None]  # [length, batch 1, features], which the caller took for [batch, length 1, features]
    return m.head(m.attention(x, x, x)[0][:, 0])  # type: ignore[operator]


def _head() -> nn.Linear:
    return nn.Linear(20, 10)


INTERACTING: dict[str, Callable[[], nn.Module]] = {
    "batch norm forced into train mode": lambda: Functional(
        _forced, body=nn.Linear(20, 30), norm=nn.BatchNorm1d(30), head=nn.Linear(30, 10)
    ),
    "batch norm of one channel": lambda: Functional(
        _forced, body=nn.Linear(20, 1), norm=nn.BatchNorm1d(1), head=nn.Linear(1, 10)
    ),
    "functional batch norm": lambda: Functional(
        lambda m, x: m.head(F.batch_norm(x, None, None, training=True)), head=_head()
    ),
    "batch norm without statistics": lambda: nn.Sequential(nn.BatchNorm1d(20, track_running_stats=False), _head()),
    "batch norm in a faint branch": lambda: Functional(
        lambda m, x: m.head(x + m.scale * m.norm(x)),
        scale=nn.Parameter(torch.full((20,), 1e-6)),
        norm=nn.BatchNorm1d(20, track_running_stats=False),
        head=_head(),
    ),
    "attention across the batch": lambda: Functional(_attention, attention=nn.MultiheadAttention(20, 2), head=_head()),
    "contrast": lambda: Functional(
        lambda m, x: (lambda z: z @ z.T)(F.normalize(m.head(x), dim=1)).tanh(), head=nn.Linear(20, 8)
    ),
    "centred outputs": lambda: Functional(lambda m, x: (lambda h: h - h.mean(0))(m.head(x)), head=_head()),
    "deviation over the batch": lambda: Functional(
        lambda m, x: m.head(torch.cat([x, x.std(0).mean().expand(len(x), 1)], 1)), head=nn.Linear(21, 10)
    ),
    "a neighbour": lambda: Functional(lambda m, x: m.head(x) + m.head(x.roll(1, 0)), head=_head()),
    "a neighbour but one": lambda: Functional(
        lambda m, x: m.head(x) + (m.head(x.roll(2, 0)) if len(x) > 2 else 0), head=_head()
    ),
    "the first sample": lambda: Functional(lambda m, x: m.head(x + x[:1]), head=_head()),
    "the last sample": lambda: Functional(lambda m, x: m.head(x + x[-1:]), head=_head()),
}


@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize("name", INTERACTING)
def test_samples_that_interact_are_refused(name: str, batch: int) -> None:
    if batch == 2 and name in ("batch norm of one channel", "a neighbour but one", "batch norm in a faint branch"):
        pytest.skip("of two samples, statistics are ±1 whatever they are, and there is no other neighbour")
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(INTERACTING[name](), (vectors(batch), labels(batch, 8)))


@pytest.mark.parametrize("where", range(6))
def test_the_largest_number_of_the_batch_is_found_wherever_it_is(where: int) -> None:
    model = Functional(lambda m, x: m.head(x / x.abs().max()), head=_head())
    x = vectors(6)
    x[where, 3] = 9.0
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(model, (x, labels(6)))


def test_a_model_that_does_not_run_on_two_samples_says_so() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        limit = x[:, 0].topk(3).values.min() if len(x) > 2 else x[:, 0].new_tensor([]).max()
        return m.head(torch.einsum("bi,ii->bi", x, m.w)) + 0 * limit

    model = Functional(forward, w=weight(20, 20), head=_head())
    with pytest.raises(ModelError, match="runs on 6 samples but not on two"):
        cape.per_sample_norms(model, (vectors(), labels(6)))


# ---- where the caller stands ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _default_double() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "anomaly": torch.autograd.detect_anomaly,
    "default float64": _default_double,
}
MODELS = ["mlp", "convolutions", "LSTM batch_first", "encoder", "parameters in a list"]


def _agrees(case: Case, model: nn.Module, batch: Any, reference: tuple[Tensor, Tensor]) -> None:
    norms = all_norms(model, batch, loss=case.loss)
    assert relative(norms.g2, reference[0]) < 1e-5 and relative(norms.tau, reference[1]) < 1e-5


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("around", AROUND)
def test_inside_any_context(around: str, name: str) -> None:
    case = NAMED[name]
    model, batch = case.make()
    reference = per_sample_norms_reference(model, batch, loss=case.loss)
    with AROUND[around]():
        _agrees(case, model, batch, reference)


@pytest.mark.parametrize("name", MODELS)
def test_any_kind_of_input_tensor(name: str) -> None:
    case = NAMED[name]
    model, (x, y) = case.make()
    reference = per_sample_norms_reference(model, (x, y), loss=case.loss)
    leaf = x.clone().requires_grad_()
    with torch.inference_mode():
        frozen = x.clone()
    for inputs in (leaf, leaf * 1.0, frozen, torch.stack([x, x], -1)[..., 0]):
        _agrees(case, model, (inputs, y), reference)
    assert leaf.grad is None


@pytest.mark.parametrize("name", ["mlp", "encoder"])
def test_any_wrapper(name: str) -> None:
    case = NAMED[name]
    model, batch = case.make()
    reference = per_sample_norms_reference(model, batch, loss=case.loss)
    compiled = torch.compile(model)  # never compiled: the probe runs it eagerly
    for wrapped in (compiled, nn.DataParallel(model), torch.optim.swa_utils.AveragedModel(model)):
        _agrees(case, wrapped, batch, reference)


def test_scripted_parts() -> None:
    """TorchScript runs where nothing sees its operators: its parameters alone take the fallback."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 20)
    model = nn.Sequential(nn.Linear(20, 20), layer, nn.Tanh(), _head())
    batch = (vectors(), labels(6))
    reference = per_sample_norms_reference(model, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = [torch.jit.script(layer), torch.jit.trace(layer, vectors())]
        whole = torch.jit.script(model)
    for part in parts:
        norms = all_norms(nn.Sequential(model[0], part, model[2], model[3]), batch)
        assert norms.fallback == ("1.bias", "1.weight")
        assert relative(norms.g2, reference[0]) < 1e-5 and relative(norms.tau, reference[1]) < 1e-5
    norms = all_norms(whole, batch)
    assert relative(norms.g2, reference[0]) < 1e-5 and whole.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "convolutions", "encoder"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Correct to what the type holds."""
    case = NAMED[name]
    model, (x, y) = case.make()
    norms = all_norms(model.to(dtype), (x.to(dtype), y))
    g2, tau = per_sample_norms_reference(model, (x.to(dtype), y))
    assert relative(norms.g2, g2) < 0.1 and relative(norms.tau, tau) < 0.1


def test_uninitialized_parameters_say_what_to_do() -> None:
    with pytest.raises(ModelError, match="run the model once"):
        cape.per_sample_norms(nn.Sequential(nn.LazyLinear(10)), (vectors(), labels(6)))


# ---- what is left behind -------------------------------------------------------------------------------------------


def _picture(model: nn.Module) -> list[Any]:
    """Return all there is to see of a model, by value or by identity."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        [(n, t.detach().clone(), t.requires_grad, id(t.grad), sorted(vars(t))) for n, t in tensors],
        [{k: id(v) for k, v in vars(m).items()} for m in model.modules()],
        [(len(m._forward_hooks), len(m._backward_hooks), m.training) for m in model.modules()],
        torch.random.get_rng_state(),
        str(random.getstate()) + str(np.random.get_state()),
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_model_is_changed(case: Case) -> None:
    """No value, flag, attribute, mark or hook, and no random state."""
    model, batch = case.make()
    before = _picture(model)
    all_norms(model, batch, loss=case.loss)
    assert _same(before, _picture(model))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_norms_of_a_model_that_draws_are_those_of_the_losses_that_it_drew(micro_batch: int | None) -> None:
    drawn: list[Tensor] = []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        mean, spread = m.encoder(x).chunk(2, 1)
        drawn.append(torch.randn_like(mean).detach())
        return m.decoder(mean + drawn[-1] * (spread / 2).exp())

    torch.manual_seed(0)
    model = Functional(forward, encoder=nn.Linear(20, 8), decoder=nn.Linear(4, 20))
    x, y = vectors(), vectors()
    found = all_norms(model, (x, y), loss="mse", micro_batch=micro_batch)
    assert torch.equal(found.g2, all_norms(model, (x, y), loss="mse", micro_batch=micro_batch).g2)
    for piece in [slice(0, 6)] if micro_batch is None else [slice(0, 3), slice(3, 6)]:
        wanted = []
        for noise in (n for n in drawn if len(n) == len(x[piece])):
            mean, spread = model.encoder(x[piece]).chunk(2, 1)
            out = model.decoder(mean + noise * (spread / 2).exp())
            losses = 0.5 * (out - y[piece]).square().mean(1)
            if torch.allclose(losses.double(), found.losses[piece].double(), atol=1e-6):
                for value in losses:
                    grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
                    wanted.append(sum(g.double().square().sum() for g in grads))
                break
        torch.testing.assert_close(found.g2[piece], torch.stack(wanted), rtol=1e-5, atol=0.0)


class _OwnNoise(nn.Module):
    """Noise that torch's global generator knows nothing of, before a parameter that takes the fallback."""

    def __init__(self, source: str, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.tell = tell
        self.weight, self.head, self.source = nn.Parameter(torch.randn(20, 20)), nn.Linear(20, 10), source
        self.of_torch, self.of_numpy = torch.Generator().manual_seed(3), np.random.default_rng(4)
        self.of_python = random.Random(5)

    def forward(self, x: Tensor) -> Tensor:
        if self.source == "torch":
            noise = torch.randn(x.shape, generator=self.of_torch)
        elif self.source.startswith("numpy"):
            made = np.random.randn(*x.shape) if self.source == "numpy's own" else self.of_numpy.normal(size=x.shape)
            noise = torch.from_numpy(made).to(x)
        else:
            draw = random.gauss if self.source == "python's own" else self.of_python.gauss
            noise = torch.tensor([draw(0.0, 1.0) for _ in range(x.numel())]).view_as(x)
        self.tell(noise)
        return self.head(torch.einsum("bi,ii->bi", x + noise, self.weight).tanh())


@pytest.mark.parametrize("source", ["torch", "numpy", "numpy's own", "python", "python's own"])
def test_draws_of_any_generator_are_those_of_the_losses(source: str) -> None:
    drawn: list[Tensor] = []
    torch.manual_seed(0)
    model = _OwnNoise(source, drawn.append)
    x, y = vectors(), labels(6)
    found = all_norms(model, (x, y))
    assert "weight" in found.fallback
    noise = next(n for n in drawn if len(n) == len(x))  # every pass over the whole batch draws the same
    diagonal = model.weight.diagonal()
    losses = F.cross_entropy(model.head(((x + noise) * diagonal).tanh()), y, reduction="none")
    torch.testing.assert_close(losses, found.losses, rtol=1e-5, atol=0.0)
    wanted = [
        sum(g.double().square().sum() for g in torch.autograd.grad(one, list(model.parameters()), retain_graph=True))
        for one in losses
    ]
    torch.testing.assert_close(found.g2, torch.stack(wanted), rtol=1e-5, atol=0.0)


def test_what_a_model_collects_is_taken_out_again() -> None:
    """Outputs in a list or a dict would keep a graph alive; a model that draws draws on where it was."""

    def forward(m: Any, x: Tensor) -> Tensor:
        noise = random.random() + float(np.random.random()) if m.training else 0.0
        m.log.append(m.head(x + noise))
        m.held["last"] = m.log[-1]
        m.seen.add(len(m.log))
        return m.log[-1]

    model = Functional(forward, log=["first"], held={"last": 1}, seen={0}, head=_head())
    data = vectors(), labels(6)
    before = _picture(model)
    found = [
        (cape.probe(model, data, lr=1e-3, dataset_size=100), cape.measure(model, data, epsilons=(0.9,)).losses.tolist())
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert (model.log, model.held, model.seen) == (["first"], {"last": 1}, {0})
    assert _same(before, _picture(model))


def test_a_frozen_copy_that_follows_in_the_forward_pass_is_put_back() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.slow.weight.mul_(0.9).add_(m.fast.weight, alpha=0.1)
        return m.head(m.fast(x).tanh() - m.slow(x).tanh())

    slow = nn.Linear(20, 20).requires_grad_(False)
    model, (x, y) = Functional(forward, fast=nn.Linear(20, 20), slow=slow, head=_head()), (vectors(), labels(6))
    before = _picture(model)
    ours = cape.per_sample_norms(model, (x, y))
    assert _same(before, _picture(model))
    alone = [per_sample_norms_reference(model, (x[i : i + 1], y[i : i + 1])) for i in range(6)]
    assert max(relative(a, torch.cat(r)) for a, r in zip(ours, zip(*alone, strict=True), strict=True)) < 1e-5


def test_adapters_that_merge_in_eval_mode_are_taken_apart_again() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = nn.Linear(20, 20).requires_grad_(False), weight(3, 20), weight(20, 3)
            self.head, self.merged = _head(), False

        def train(self, mode: bool = True) -> Adapted:
            if mode == self.merged:
                self.base.weight.data += (-1 if mode else 1) * (self.up.data @ self.down.data)
                self.merged = not mode
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            h = self.base(x) if self.merged else self.base(x) + x @ self.down.T @ self.up.T
            return self.head(h.tanh())

    model, data = Adapted(), (vectors(), labels(6))
    before, expected = _picture(model), per_sample_norms_reference(model, data)
    assert max(map(relative, cape.per_sample_norms(model, data), expected)) < 1e-5
    assert _same(before, _picture(model))


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("twice", [False, True])
def test_gradients_that_nearly_cancel(twice: bool, backend: str) -> None:
    """Of a difference between two inputs that are nearly the same."""

    def forward(m: Any, x: Tensor) -> Tensor:
        near = x + 0.1 * x.sin()
        a, b = (m.body(x), m.body(near)) if twice else m.body(torch.stack([x, near], 1)).unbind(1)
        return (a - b) @ m.mix

    torch.manual_seed(0)
    model, data = Functional(forward, body=nn.Linear(20, 16), mix=torch.randn(16, 10)), (vectors(), labels(6))
    ours, expected = cape.per_sample_norms(model, data, backend=backend), per_sample_norms_reference(model, data)
    assert max(map(relative, ours, expected)) < 1e-5


def test_a_batch_that_the_model_writes_into_is_left_alone() -> None:
    """Every pass sees the same inputs: as for the model that does not write."""

    def writes(m: nn.Module, x: Tensor) -> Tensor:
        return m.head(F.relu(x.sub_(0.3), inplace=True))

    head, x = _head(), vectors()
    found = []
    for forward in (writes, lambda m, x: m.head(F.relu(x - 0.3))):
        model, given = Functional(forward, head=head), x.clone()
        features = cape.probe(model, (given, labels(6)), lr=1e-2, dataset_size=100)
        found.append((features, cape.measure(model, (given, labels(6)), lr=1e-2, epsilons=(0.9,)).losses.tolist()))
        assert torch.equal(given, x)
    assert found[0][1] == found[1][1]
    first, second = ({k: v for k, v in one.as_dict().items() if v is not None} for one, _ in found)
    assert first == pytest.approx(second, rel=1e-6)


def test_a_forward_that_was_replaced_on_a_class_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 10)), (vectors(), labels(6))
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1.5 * plain(self, x))
    expected = per_sample_norms_reference(model, data)
    assert max(map(relative, cape.per_sample_norms(model, data), expected)) < 1e-5


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(ignore_index=3)])
def test_a_sample_without_a_label_has_no_gradient(loss: nn.CrossEntropyLoss) -> None:
    model, x, y = nn.Sequential(_head()), vectors(), labels(6)
    y[1] = loss.ignore_index
    g2, _ = cape.per_sample_norms(model, (x, y), loss=loss)
    named, _ = cape.per_sample_norms(model, (x, y.where(y != loss.ignore_index, -100)))
    assert g2[1] == 0.0 and torch.allclose(g2, named)


class _TakesTurns(torch.autograd.Function):
    """Identity whose backward pass looks at numbers, so that vmap cannot carry all cotangents through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.0 if float(grads[0].abs().max()) > 0 else grads[0]


@pytest.mark.parametrize("turns", [False, True])
def test_transposed_gradients_of_an_instance_norm(turns: bool) -> None:
    """torch's own backward pass mis-reads them (its gradient of the norm's weight is off by more than its size)."""

    def composed(norm: Any, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        return (x - mean) * (var + norm.eps).rsqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)

    torch.manual_seed(0)
    parts = {
        "conv": nn.Conv2d(3, 4, 3),
        "norm": nn.InstanceNorm2d(4, affine=True),
        "mix": nn.MultiheadAttention(4, 2, batch_first=True),
        "head": nn.Linear(4, 10),
    }

    def model(norm: Callable[[Any, Tensor], Tensor]) -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            t = norm(m.norm, m.conv(x)).tanh().flatten(2).mT
            out = m.head(m.mix(t, t, t)[0].mean(1))
            return _TakesTurns.apply(out) if turns else out

        return Functional(forward, **parts).double()

    data = torch.randn(3, 3, 7, 7, dtype=torch.float64), labels(3)
    ours = cape.per_sample_norms(model(lambda norm, x: norm(x)), data)
    expected = per_sample_norms_reference(model(composed), data)
    assert max(map(relative, ours, expected)) < 1e-10


def test_hooks_of_parameters_stay_silent() -> None:
    """An optimizer that steps in the backward pass must not step, nor may a hook bend a gradient."""
    case = NAMED["parameters in a list"]
    model, batch = case.make()
    reference = per_sample_norms_reference(model, batch)
    steps = []
    for p in model.parameters():
        p.register_hook(lambda g: g * 2)
        p.register_post_accumulate_grad_hook(lambda p: steps.append(p))
    _agrees(case, model, batch, reference)
    assert not steps
    model(batch[0]).sum().backward()
    assert len(steps) == len(list(model.parameters()))


def test_a_derivative_inside_the_model_leaves_no_graph_behind() -> None:
    """Its gradients reach the recorded uses before the probe's own do."""

    def tensors() -> set[int]:
        gc.collect()
        return {id(o) for o in gc.get_objects() if issubclass(type(o), Tensor)}

    case = NAMED["force of an energy"]
    model, batch = case.make()
    before = tensors()
    all_norms(model, batch, loss=case.loss)
    assert not tensors() - before


def test_a_loss_with_buffers_is_left_as_it_was_and_targets_may_be_made_in_inference_mode() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.cross_entropy(outputs, targets)

    model, (x, y) = NAMED["mlp"].make()
    loss = Counting()
    with torch.inference_mode():
        targets = y.clone()
        found = cape.probe(model, (x, targets), lr=1e-3, dataset_size=100, loss=loss)
    assert not loss.calls
    expected = cape.probe(model, (x, y), lr=1e-3, dataset_size=100)
    assert found.log_g2 == pytest.approx(expected.log_g2, rel=1e-5)


def test_a_learning_rate_that_no_parameter_holds_gets_one_sentence() -> None:
    model, batch = NAMED["mlp"].make()
    with pytest.raises(SpecError, match="beyond what their type holds"):
        cape.probe(model, batch, lr=1e300, dataset_size=100)
