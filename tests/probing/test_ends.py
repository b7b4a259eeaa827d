"""What the first and the last weight see: against the formulas, and however a model is written."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cape.feature_names import END_FEATURES
from cape.probing import Features, probe
from cape.probing.ends import by_sample, end_signals
from cape.probing.separation import separation
from cape.probing.signals import FLOOR

B = 12


def sequences(steps: int = 16, width: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, steps, width, generator=generator), torch.randint(5, (B,), generator=generator)


def ends(model: nn.Module, batch: tuple[Tensor, Tensor], loss: str = "cross_entropy") -> dict[str, float]:
    found: Features = probe(model, batch, loss=loss, lr=1e-3, dataset_size=100)
    return {name: getattr(found, name) for name in END_FEATURES}


class Reader(nn.Module):
    """A recurrent network, read in one of several ways."""

    def __init__(self, read: str, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = nn.GRU(7, 9, batch_first=batch_first)
        self.head = nn.Linear(9, 5)
        self.read, self.batch_first = read, batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        outputs = self.rnn(x)[0]
        outputs = outputs if self.batch_first else outputs.transpose(0, 1)
        return self.head(outputs[:, -1] if self.read == "last" else outputs.mean(1))


def expected(x: Tensor, hidden: Tensor, outputs: Tensor, y: Tensor, positions: list[int]) -> dict[str, float]:
    """Return the formulas, of a float64 pass with gradients for x and hidden; ``positions``: dimensions of x."""
    loss = F.cross_entropy(outputs, y)
    of_hidden, of_entry = torch.autograd.grad(loss, [hidden, x])
    loss, hidden, x = loss.detach(), hidden.detach(), x.detach()
    count = math.prod(x.shape[d] for d in positions)
    each = of_entry.abs().sum([d for d in range(1, x.dim()) if d not in positions]).reshape(B, count)
    shares = (each / each.sum(1, keepdim=True)).mean(0)
    last = max(1, count // 8)
    return {
        "log_hidden_hardness": separation(hidden.detach(), y).hardness,
        "log_hidden_size": math.log(hidden.detach().square().mean().sqrt()),
        "log_hidden_pull": math.log((hidden * of_hidden).abs().sum() / loss),
        "log_entry_pull": math.log((x * of_entry).abs().sum() / loss),
        "log_late_share": math.log(shares[-last:].sum() / (last / count)),
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("read", ["last", "mean"])
def test_a_recurrent_network(read: str, batch_first: bool) -> None:
    model, (x, y) = Reader(read, batch_first), sequences()
    twin, seen = Reader(read, batch_first).double(), []
    twin.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    wide = x.double().requires_grad_()
    outputs = twin(wide)
    assert ends(model, (x, y)) == pytest.approx(expected(wide, seen[0], outputs, y, [1]), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shape", [(B, 3, 8, 9), (B, 2, 1, 1)])
def test_a_convolutional_network_in_train_mode(shape: tuple[int, ...]) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        first = [nn.Conv2d(shape[1], 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.3)]
        return nn.Sequential(*first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))

    x, y = torch.randn(shape, generator=torch.Generator().manual_seed(0)), sequences()[1]
    twin, wide = build().double(), x.double().requires_grad_()
    torch.manual_seed(0)  # the mask of the probe; float64 draws the same one
    hidden = twin[:-1](wide)
    wanted = expected(wide, hidden, twin[-1](hidden), y, [2, 3])
    assert ends(build(), (x, y)) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_vectors_have_no_positions_and_one_layer_is_both_ends() -> None:
    (x, y), model = sequences(), nn.Sequential(nn.Flatten(), nn.Linear(16 * 7, 5))
    found = ends(model, (x, y))
    assert found["log_entry_pull"] == found["log_late_share"] == 0.0
    assert found["log_hidden_hardness"] == pytest.approx(separation(x, y).hardness, abs=1e-6)
    assert found["log_hidden_size"] == pytest.approx(math.log(x.square().mean().sqrt()), abs=1e-6)


class Written(nn.Module):
    """A dense network on each position, with its weights used in one of many ways; ``modules`` is the plain one."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.how = nn.Linear(7, 8), nn.Linear(8, 5), how
        self.norm = nn.LayerNorm(8)
        if how == "weight norm":
            nn.utils.parametrizations.weight_norm(self.last)
        if how == "scripted part":
            self.norm = torch.jit.script(self.norm)  # type: ignore[assignment]

    def block(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.first, self.last
        if self.how == "functional":
            return F.linear(
                F.layer_norm(F.linear(x, first.weight, first.bias).tanh(), (8,)).mean(1), last.weight, last.bias
            )
        if self.how == "products":
            return self.norm((x @ first.weight.t() + first.bias).tanh()).mean(1) @ last.weight.mT + last.bias
        if self.how == "einsum":
            hidden = torch.einsum("btd,pd->btp", x, first.weight) + first.bias
            return torch.einsum("bp,cp->bc", self.norm(hidden.tanh()).mean(1), last.weight) + last.bias
        if self.how == "keyword":
            return F.linear(weight=last.weight, bias=last.bias, input=self.block(x).mean(1))
        if self.how == "checkpoint":
            return last(checkpoint(self.block, x, use_reentrant=False).mean(1))
        if self.how == "re-entrant checkpoint":  # whose block runs without a graph
            return last(checkpoint(lambda h: self.norm(h.tanh()), first(x), use_reentrant=True).mean(1))
        if self.how == "writes into its input":
            return last(self.block(x.mul_(1.0)).mean(1))
        if self.how == "through numpy":
            return last(self.block(torch.from_numpy(x.numpy() * 1)).mean(1))
        return last(self.block(x).mean(1))


WRITTEN = (
    *("functional", "products", "einsum", "keyword", "checkpoint", "re-entrant checkpoint"),
    *("writes into its input", "through numpy", "weight norm", "scripted part"),
)


@pytest.mark.parametrize("how", WRITTEN)
def test_however_the_model_is_written(how: str) -> None:
    batch = sequences()
    assert ends(Written(how), batch) == pytest.approx(ends(Written("modules"), batch), rel=1e-4, abs=1e-5)


def test_a_compiled_model_is_not_compiled() -> None:
    batch = sequences()
    found = ends(torch.compile(Reader("last")), batch)  # type: ignore[arg-type]
    assert found == ends(Reader("last"), batch)


def test_tokens_are_read_where_they_are_looked_up() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.reader = nn.Embedding(50, 7, padding_idx=0), Reader("last")

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(self.embedding(x))

    torch.manual_seed(0)
    model, y = Tokens(), sequences()[1]
    x = torch.randint(1, 50, (B, 16), generator=torch.Generator().manual_seed(0))
    inner = model.embedding(x).detach()
    assert ends(model, (x, y)) == pytest.approx(ends(model.reader, (inner, y)), rel=1e-5)


def test_of_a_frozen_model_the_head_is_both_ends() -> None:
    model, (x, y) = Reader("mean"), sequences()
    model.rnn.requires_grad_(False)
    found = ends(model, (x, y))
    assert found["log_entry_pull"] == found["log_late_share"] == 0.0  # what the head sees is a vector
    model.rnn.requires_grad_(True)
    plain = ends(model, (x, y))
    for name in ("log_hidden_hardness", "log_hidden_size", "log_hidden_pull"):
        assert found[name] == pytest.approx(plain[name], rel=1e-5)


def test_a_scripted_model_is_seen_at_its_outputs() -> None:
    (x, y), model = sequences(), Reader("last")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
    found = ends(scripted, (x, y))
    outputs = model(x).detach().requires_grad_()
    (pull,) = torch.autograd.grad(F.cross_entropy(outputs, y), outputs)
    assert found["log_hidden_size"] == pytest.approx(math.log(outputs.detach().square().mean().sqrt()), abs=1e-5)
    change = (outputs * pull).abs().sum() / F.cross_entropy(outputs, y)
    assert found["log_hidden_pull"] == pytest.approx(math.log(change), abs=1e-5)
    assert found["log_entry_pull"] == found["log_late_share"] == 0.0


def test_how_it_is_read_shows() -> None:
    """A network that is read at its end depends on its last positions, one that averages on all alike."""
    late = {read: ends(Reader(read), sequences(64))["log_late_share"] for read in ("last", "mean")}
    assert late["last"] > 1.5 and abs(late["mean"]) < 0.5


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_degenerate_numbers_stay_finite(value: float) -> None:
    y = sequences()[1]
    hidden = torch.full((B, 3), value)
    found = end_signals(hidden, torch.zeros(B, 3), y, 1.0)
    assert all(map(math.isfinite, vars(found).values()))
    assert found.hidden_size == pytest.approx(math.log(FLOOR) if value == 0.0 else -math.log(FLOOR))
    assert end_signals(hidden, None, y, 1.0).hidden_pull == math.log(FLOOR)


def test_where_the_batch_is() -> None:
    t = torch.arange(2.0 * B * 3).view(2, B, 3)
    assert by_sample(t[0], B) is not None
    found = by_sample(t, B)
    assert found is not None and torch.equal(found, t.transpose(0, 1))
    flat = by_sample(t.reshape(2 * B, 3), B)
    assert flat is not None and flat.shape == (B, 2, 3)
    assert by_sample(torch.zeros(5, 3), B) is None and by_sample(torch.zeros(()), B) is None


def test_complex_outputs_say_what_their_real_parts_say() -> None:
    class Complex(nn.Module):
        def __init__(self, parts: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight, self.parts = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64)), parts

        def forward(self, x: Tensor) -> Tensor:
            out = x @ self.weight
            return torch.view_as_real(out).flatten(1) if self.parts else out

    def square(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().square().sum(1)

    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(B, n, dtype=torch.complex64, generator=generator) for n in (5, 4))
    whole = probe(Complex(False), (x, y), loss=square, lr=1e-3, dataset_size=100)
    parts = probe(Complex(True), (x, torch.view_as_real(y).flatten(1)), loss=square, lr=1e-3, dataset_size=100)
    for name in END_FEATURES:
        assert getattr(whole, name) == pytest.approx(getattr(parts, name), rel=1e-5), name
