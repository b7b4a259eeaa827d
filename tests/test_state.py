"""What is refused before a model runs, and what is put back after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cape.checks import check_batch, trainable
from cape.errors import ModelError
from cape.state import Kept, preserved


def test_what_holds_no_numbers_is_refused() -> None:
    with pytest.raises(ModelError, match="'weight' is on the device 'meta'"):
        trainable(nn.Linear(2, 2, device="meta"))
    x, y = torch.zeros(3, 2), torch.zeros(3)
    for batch in ((x.to("meta"), y), (x, y.to("meta"))):
        with pytest.raises(ModelError, match="The batch is on the device 'meta'"):
            check_batch(batch)


def test_what_no_optimizer_could_train_is_refused() -> None:
    shared = nn.Linear(4, 3)
    shared.bias = nn.Parameter(torch.zeros(1).expand(3))
    with pytest.raises(ModelError, match="'bias' share their memory"):
        trainable(shared)
    copied = copy.deepcopy(torch.jit.script(nn.Linear(4, 3)))
    with pytest.raises(ModelError, match="'weight' is computed from another tensor"):
        trainable(copied)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_buffer_that_nobody_wrote_into_is_not_written(sparse: bool) -> None:
    """A graph may hold it, and could not be differentiated any more."""
    model = nn.Linear(3, 2)
    table = torch.eye(3)
    model.register_buffer("table", table.to_sparse() if sparse else table)
    with preserved(model) as kept:
        version = model.table._version  # type: ignore[operator, union-attr]
        kept.rewind()
        assert model.table._version == version  # type: ignore[operator, union-attr]
        with torch.no_grad():
            model.table.mul_(2)  # type: ignore[operator]
        kept.rewind()
        assert model.table.to_dense().equal(table)  # type: ignore[operator]
        if not sparse:
            model.table.data[0] = 5.0  # type: ignore[operator, index]
    assert model.table.to_dense().equal(table)  # type: ignore[operator]


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.seen: dict[str, Any] = {"activations": [], "of": [{"passes": 0}], "mean": [torch.zeros(2)]}
        self.seen["itself"] = self.seen

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        self.seen["activations"].append(h)
        self.seen["of"][0]["passes"] += 1
        self.seen["mean"][0] += h.detach().mean(0)
        return h


class Restless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(2, 2), nn.Buffer(torch.zeros(3))
        self.layer.weight.register_hook(lambda g: g)
        self.kept: tuple[list[int], ...] = ([],)

    def forward(self, x: Tensor) -> Tensor:
        self.table.resize_(len(self.table) + 1)
        self.kept[0].append(1)
        self.layer.bias.seen = True  # type: ignore[attr-defined]
        for p in self.layer.parameters():
            p.register_hook(lambda g: g)
        self.layer.register_forward_hook(lambda *_: None)
        self.register_buffer("late", x.mean(0), persistent=False)
        return self.layer(x)


@pytest.mark.parametrize("parameters", [False, True])
def test_what_a_forward_pass_hangs_on_is_taken_off_again(parameters: bool) -> None:
    model = Restless()

    def picture() -> object:
        hooks = [list(p._backward_hooks or ()) for p in model.parameters()]  # type: ignore[call-overload]
        sets = [list(m._forward_hooks) + sorted(m._non_persistent_buffers_set) for m in model.modules()]
        return hooks, sets, model.table.tolist(), model.kept, [dict(vars(p)) for p in model.parameters()]

    before = str(picture())
    with preserved(model, parameters=parameters) as kept:
        for _ in range(2):
            model(torch.ones(3, 2))
            assert str(picture()) != before
            kept.rewind()
    assert str(picture()) == before


def test_collections_within_collections_are_put_back() -> None:
    model = Logging()
    activations, inner, mean = model.seen["activations"], model.seen["of"][0], model.seen["mean"][0]
    with preserved(model):
        model(torch.ones(3, 2))
        assert len(activations) == inner["passes"] == 1 and bool(mean.abs().sum() > 0)
    assert activations == [] and inner == {"passes": 0} and torch.equal(mean, torch.zeros(2))
    assert model.seen["activations"] is activations and model.seen["itself"] is model.seen


def with_gradient() -> nn.Linear:
    model = nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    model.weight.register_post_accumulate_grad_hook(lambda p: None)
    return model.eval()


def whole(model: nn.Linear) -> bool:
    grad = model.weight.grad
    return not model.training and grad is not None and bool(model.weight._post_accumulate_grad_hooks)


def test_an_interrupt_before_the_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    model = with_gradient()
    monkeypatch.setattr(torch.random, "fork_rng", interrupted)
    with pytest.raises(KeyboardInterrupt), preserved(model):
        pass
    assert whole(model)


def test_an_interrupt_while_a_model_is_put_back_is_raised_once_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_gradient()
    before, rewind = model.weight.detach().clone(), Kept.rewind
    interrupts = [KeyboardInterrupt()]

    def interrupted(kept: Kept) -> None:
        if interrupts:
            raise interrupts.pop()
        rewind(kept)

    with pytest.raises(KeyboardInterrupt), preserved(model, parameters=True):
        model.train()
        model.weight.detach().zero_()
        monkeypatch.setattr(Kept, "rewind", interrupted)
    assert whole(model) and model.weight.equal(before)
