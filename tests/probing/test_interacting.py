"""Samples that meet where two samples in the middle of a batch do not show it are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cape
from cape.errors import ModelError
from cape.probing.reference import per_sample_norms_reference
from tests.cases.base import Functional

SIZE = 9


class _Normalized(torch.autograd.Function):
    """Identity whose backward pass normalizes the whole batch's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / grads[0].norm()


class _Own(torch.autograd.Function):
    """Identity whose backward pass normalizes each sample's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return F.normalize(grads[0], dim=-1)


def _hooked(h: Tensor) -> Tensor:
    h.register_hook(lambda g: g / g.norm())
    return h


def _sees(to: int, of: int) -> Callable[[Tensor], Tensor]:
    def between(h: Tensor) -> Tensor:
        mark = torch.zeros(len(h), 1)
        mark[to] = 1.0
        return h + mark * h[of]

    return between


def _capacity(h: Tensor) -> Tensor:
    """Switch routing, dense: an expert's late samples are dropped."""
    expert = F.one_hot(h[:, :2].argmax(1), 2).to(h.dtype)
    place = (expert.cumsum(0) * expert).sum(1, keepdim=True)
    return h * (place <= len(h) // 2)


class Model(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x).tanh()))


MEETING: dict[str, Callable[[Tensor], Tensor]] = {
    "the first sees the last": _sees(0, -1),
    "the first sees the second": _sees(0, 1),
    "the last sees the first": _sees(-1, 0),
    "late samples are dropped": _capacity,
    "a number of the batch clips some": lambda h: h.clamp(max=torch.quantile(h.detach(), 0.9)),
}
MEETING_BACKWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic that a detached value undoes": lambda h: h - h.mean(0) + h.mean(0).detach(),
    "a custom function": _Normalized.apply,
    "a hook": _hooked,
}


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(SIZE, 6, generator=generator), torch.randint(0, 3, (SIZE,), generator=generator)


@pytest.mark.parametrize("name", MEETING)
def test_samples_that_meet(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(Model(MEETING[name]), _batch())


def _clipped(h: Tensor) -> Tensor:
    centre, size = h.detach().mean(0), h.detach().std(0)
    return torch.minimum(torch.maximum(h, centre - 2.8 * size), centre + 2.8 * size)


def _second_sees_third(h: Tensor) -> Tensor:
    mark = torch.zeros(len(h), 1)
    mark[1] = 1.0
    return h + mark * h[min(2, len(h) - 1)]


@pytest.mark.parametrize(("between", "batch", "width"), [(_clipped, 32, 64), (_second_sees_third, 8, 16)])
def test_samples_that_meet_where_the_width_is_a_multiple_of_the_batch(
    between: Callable[[Tensor], Tensor], batch: int, width: int
) -> None:
    """A row of one sample has the shape of one number of every sample."""
    torch.manual_seed(0)
    model = Model(between)
    model.first, model.second = nn.Linear(6, width), nn.Linear(width, 3)
    x, y = torch.randn(batch, 6), torch.randint(0, 3, (batch,))
    x[3] *= 6.0
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(model, (x, y))


def test_gradients_divided_by_how_often_the_batch_has_a_row_are_refused() -> None:
    for kind in (nn.Embedding, nn.EmbeddingBag):
        model = nn.Sequential(kind(11, 8, scale_grad_by_freq=True), nn.Flatten())
        x = torch.randint(0, 11, (6, 1))
        with pytest.raises(ModelError, match="scale_grad_by_freq"):
            cape.per_sample_norms(model, (x, torch.arange(6)))


def _of_one_user(h: Tensor, x: Tensor, user: Tensor) -> Tensor:
    same = (user[:, None] == user[None]).to(h)
    return same @ h / same.sum(1, keepdim=True)


def _of_one_user_by_letters(h: Tensor, x: Tensor, user: Tensor) -> Tensor:
    same = (user.unsqueeze(1) == user).to(h)
    return torch.einsum("ij,jk->ik", same, h) / same.sum(1, keepdim=True)


def _by_user(h: Tensor, x: Tensor, user: Tensor) -> Tensor:
    one_hot = F.one_hot(user, 99).to(h)
    return one_hot @ (one_hot.T @ h)


def _without_twins(h: Tensor, x: Tensor, user: Tensor) -> Tensor:
    return h * (~(torch.cdist(x, x) < 0.2).tril(-1).any(1)).to(h)[:, None]


def _new_users(h: Tensor, x: Tensor, user: Tensor) -> Tensor:
    return h * (user != user.roll(1)).to(h)[:, None]


def _clipped_across(h: Tensor, x: Tensor, user: Tensor) -> Tensor:
    across = h.t()
    centre, size = across.detach().mean(1, keepdim=True), across.detach().std(1, keepdim=True)
    return torch.minimum(torch.maximum(across, centre - 2.8 * size), centre + 2.8 * size).t()


@pytest.mark.parametrize(
    "between", [_of_one_user, _of_one_user_by_letters, _by_user, _without_twins, _new_users, _clipped_across]
)
@pytest.mark.parametrize("batch", [20, 32])
def test_a_single_pair_that_meets(between: Callable[[Tensor, Tensor, Tensor], Tensor], batch: int) -> None:
    """Neither of the two is scanned, or at an end of the batch."""

    class Users(Model):
        def forward(self, x: Tensor, user: Tensor) -> Tensor:  # type: ignore[override]
            return self.second(between(self.first(x), x, user).tanh())

    torch.manual_seed(0)
    model = Users(nn.Identity())
    model.first, model.second = nn.Linear(6, 32), nn.Linear(32, 3)
    x, user, y = torch.randn(batch, 6), torch.arange(batch), torch.randint(0, 3, (batch,))
    cape.per_sample_norms(Model(nn.Identity()), (x, y))
    x[7], x[3], user[4] = x[6] + 1e-3, 6 * x[3], 3
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(model, ((x, user), y))


class Masked(nn.Module):
    """A batch's statistics, and one output that no action may take."""

    def __init__(self, value: float, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.value = nn.Linear(6, 8), norm, nn.Linear(8, 4), value

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh()).masked_fill(torch.arange(4) == 3, self.value)


@pytest.mark.parametrize("value", [0.0, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_large_constants_in_the_outputs_hide_nothing(value: float) -> None:

    torch.manual_seed(0)
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(Masked(value, nn.BatchNorm1d(8, track_running_stats=False)), _batch())
    model = Masked(value, nn.LayerNorm(8))
    ours = cape.per_sample_norms(model, _batch())[0]
    torch.testing.assert_close(ours, per_sample_norms_reference(model, _batch())[0], rtol=1e-5, atol=0.0)
    found = cape.probe(model, _batch(), lr=1e-3, dataset_size=100).as_dict()
    assert all(v is None or math.isfinite(v) for v in found.values())


def test_complex_outputs_that_meet() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(6, 8), nn.Parameter(torch.randn(5, 5, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            z = torch.fft.rfft(self.first(x).tanh()) @ self.weight
            return z - z.mean(0)

    torch.manual_seed(0)
    targets = torch.randn(6, 5, dtype=torch.cfloat)
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(
            Spectrum(), (torch.randn(6, 6), targets), loss=lambda o, t: (o - t).abs().square().mean(1)
        )


@pytest.mark.parametrize("seed", (2, 6))
def test_samples_that_vote(seed: int) -> None:
    """Most exchanges of samples leave a majority as it is."""
    torch.manual_seed(seed)
    model = Model(lambda h: h * (1.5 - (h[:, 0] > 0).to(h).mean().round()))
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(SIZE, 6, generator=generator), torch.randint(0, 3, (SIZE,), generator=generator)
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(model, batch)


@pytest.mark.parametrize("name", MEETING_BACKWARD)
def test_samples_that_meet_in_the_backward_pass(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="in its backward pass"):
        cape.per_sample_norms(Model(MEETING_BACKWARD[name]), _batch())


def test_a_module_hook_that_mixes_gradients_is_refused_and_one_that_scales_them_is_not() -> None:
    torch.manual_seed(0)
    model = Model(nn.Identity())
    plain = cape.per_sample_norms(model, _batch())
    handle = model.first.register_full_backward_hook(lambda m, i, o: None)
    assert torch.equal(cape.per_sample_norms(model, _batch())[0], plain[0])
    handle.remove()
    model.second.register_full_backward_hook(lambda m, i, o: (i[0] - i[0].mean(0),))
    with pytest.raises(ModelError, match="in its backward pass"):
        cape.per_sample_norms(model, _batch())


def test_functions_that_keep_samples_apart_are_taken() -> None:

    torch.manual_seed(0)
    model = Model(_Own.apply).double()
    x, y = _batch()
    ours = cape.per_sample_norms(model, (x.double(), y))
    for a, r in zip(ours, per_sample_norms_reference(model, (x.double(), y)), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-10, atol=0.0)


def _hard_ones(o: Tensor, t: Tensor) -> Tensor:
    values = F.cross_entropy(o, t, reduction="none")
    return values * (values >= values.detach().topk(len(values) // 2 or 1).values[-1])


@pytest.mark.parametrize(
    "loss",
    (
        _hard_ones,
        lambda o, t: F.cross_entropy(o, t, reduction="none") / len(o),
        lambda o, t: F.cross_entropy(o @ o.T, torch.arange(len(o)), reduction="none"),
    ),
)
def test_losses_that_couple_samples_are_refused(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="than alone"):
        cape.per_sample_norms(Model(nn.Identity()), _batch(), loss=loss)


@pytest.mark.parametrize("power", (1, 2))
def test_a_scalar_that_couples_samples_is_refused(power: int) -> None:
    """Contrastive losses: alone, a sample has none."""
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="no mean and no sum"):
        cape.per_sample_norms(
            Model(nn.Identity()), _batch(), loss=lambda o, t: F.cross_entropy(o @ o.T, torch.arange(len(o))) ** power
        )


def _dice(o: Tensor, t: Tensor) -> Tensor:
    hot = F.one_hot(t, o.shape[1])
    return 1 - (2 * (o.sigmoid() * hot).sum() + 1) / ((o.sigmoid() + hot).sum() + 1)


def _neighbours(o: Tensor, t: Tensor) -> Tensor:
    """InfoNCE: of two samples it is zero, as of one."""
    z, places = F.normalize(o, dim=1), torch.arange(len(o))
    return F.cross_entropy(z @ z.T / 0.1 - 1e4 * torch.eye(len(o)), (places + len(o) // 2) % len(o))


@pytest.mark.parametrize("pieces", [None, 2, 4])
@pytest.mark.parametrize("loss", [_dice, _neighbours])
def test_a_scalar_that_lies_among_the_samples_and_couples_them_is_refused(
    loss: Callable[[Tensor, Tensor], Tensor], pieces: int | None
) -> None:
    torch.manual_seed(0)
    with pytest.raises(ModelError, match="no mean and no sum"):
        cape.per_sample_norms(Model(nn.Identity()), _batch(), loss=loss, micro_batch=pieces)


class _Gated(nn.Module):
    """A branch in which samples meet, behind a gate that is closed."""

    def __init__(self, branch: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.branch, self.gate = branch, nn.Parameter(torch.zeros(8))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.gate * self.branch(h)


def _ones(h: Tensor) -> Tensor:
    return h.new_ones(len(h), len(h)) @ h


GATED: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "batch norm": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "batch norm without weights": lambda: nn.BatchNorm1d(8, affine=False, track_running_stats=False),
    "products of samples": lambda: lambda h: (h @ h.T).softmax(1) @ h,
    "a constant product": lambda: _ones,
    "softmax": lambda: lambda h: h.softmax(0),
    "softmax, transposed": lambda: lambda h: h.T.log_softmax(1).T,
    "normalize": lambda: lambda h: F.normalize(h, dim=0),
    "layer norm": lambda: lambda h: F.layer_norm(h.T, (len(h),)).T,
    "pooling": lambda: lambda h: F.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "fft": lambda: lambda h: torch.fft.fft(h, dim=0).real,
    "pad": lambda: lambda h: F.pad(h, (0, 0, 1, -1)),
    "attention": lambda: lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "convolution": lambda: Functional(lambda m, h: m.body(h.T[None])[0].T, body=nn.Conv1d(8, 8, 3, padding=1)),
    "lstm": lambda: Functional(lambda m, h: m.body(h[:, None])[0][:, 0], body=nn.LSTM(8, 8)),
}


@pytest.mark.parametrize("size", [2, 5, SIZE])
@pytest.mark.parametrize("name", GATED)
def test_samples_that_meet_behind_a_gate_of_zero_are_refused(name: str, size: int) -> None:
    torch.manual_seed(0)
    x, y = _batch()
    with pytest.raises(ModelError, match="influence each other"):
        cape.per_sample_norms(Model(_Gated(GATED[name]())).double(), (x[:size].double(), y[:size]))


def test_a_gate_of_zero_before_a_branch_of_each_sample_is_taken() -> None:
    torch.manual_seed(0)
    model = Model(_Gated(nn.LayerNorm(8))).double()
    x, y = _batch()
    batch = (x.double(), y)
    for a, r in zip(cape.per_sample_norms(model, batch), per_sample_norms_reference(model, batch), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(
    "loss",
    (
        lambda o, t: F.cross_entropy(o, t, reduction="sum"),
        lambda o, t: F.cross_entropy(o, t) / 7 - 3,
        lambda o, t: F.cross_entropy(o, t, weight=torch.tensor([1.0, 5.0, 0.1])),
        lambda o, t: F.mse_loss(o.sum(1), t.to(o)).sqrt(),
    ),
)
def test_scalars_that_are_means_or_sums_are_taken(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    assert bool((cape.per_sample_norms(Model(nn.Identity()), _batch(), loss=loss)[0] > 0).all())


def test_a_loss_with_parameters_of_the_model_is_refused_and_one_with_its_own_is_taken() -> None:
    torch.manual_seed(0)
    model, own = Model(nn.Identity()), nn.Parameter(torch.tensor(0.3))
    model.log_scale = nn.Parameter(torch.tensor(0.3))
    batch = (_batch()[0], torch.randn(SIZE, 3))

    def scaled(by: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda o, t: (o - t).square().mean(1) * torch.exp(-by) + by

    with pytest.raises(ModelError, match="parameters of the model itself"):
        cape.per_sample_norms(model, batch, loss=scaled(model.log_scale))
    assert bool((cape.per_sample_norms(model, batch, loss=scaled(own))[0] > 0).all()) and own.grad is None


def test_a_loss_by_position_is_none_by_sample() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 6, 12), torch.randint(0, 5, (6, 6))
    by_position = lambda o, t: F.cross_entropy(o.permute(1, 2, 0), t.T, reduction="none")  # noqa: E731
    with pytest.raises(ModelError, match="for one sample"):
        cape.per_sample_norms(nn.Linear(12, 5), (x, y), loss=by_position)


def test_losses_of_each_sample_alone_are_taken() -> None:
    torch.manual_seed(0)
    model = Model(nn.Identity())
    named = cape.per_sample_norms(model, _batch())
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="none")):
        torch.testing.assert_close(cape.per_sample_norms(model, _batch(), loss=loss)[0], named[0], rtol=1e-5, atol=0.0)
