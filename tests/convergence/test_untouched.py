"""Awkward models through ``measure``: the plain loop's numbers, and everything left as it was found."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cape
from cape.config import StoppingRule
from cape.convergence import Subject, measure, measure_many
from cape.errors import ModelError, SpecError
from tests.convergence.test_single import plain_loop

SHORT = StoppingRule(max_steps=8)
BATCH = (torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).tanh())
        return out


def test_parameters_with_gaps_in_memory_train_as_the_loop_says_and_nothing_beside_them_changes() -> None:
    """torch's fused AdamW reads no strides on a CPU."""
    big = torch.randn(12, 16)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    model[0].weight = nn.Parameter(big[:, :8])
    model[2].weight = nn.Parameter(torch.randn(12, 4).t())
    before = big.clone()
    result = measure(model, BATCH, lr=1e-2, stopping=SHORT)
    np.testing.assert_allclose(result.losses, plain_loop(model, BATCH, 1e-2, 8, 0), rtol=1e-5)
    assert torch.equal(big, before)


def test_a_parameter_of_which_numbers_share_their_memory_is_refused() -> None:
    model = Base()
    model.b.weight = nn.Parameter(torch.randn(4, 1).expand(4, 12))
    with pytest.raises(ModelError, match=r"'b\.weight' share their memory"):
        measure(model, BATCH, stopping=SHORT)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_buffers_are_put_back(layout: torch.layout) -> None:
    class Graph(Base):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("adjacent", torch.eye(16).to_sparse(layout=layout))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.sparse.mm(self.adjacent, x))

    model = Graph().eval()
    model.a.weight.grad = torch.ones(12, 8)
    measure(model, BATCH, stopping=SHORT)
    assert not model.training and torch.equal(model.a.weight.grad, torch.ones(12, 8))


def test_all_else_is_put_back_where_a_value_cannot_be() -> None:
    class Frozen(Base):
        def __init__(self) -> None:
            super().__init__()
            self.table = np.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            self.table[0] += 1
            self.table.setflags(write=False)
            return super().forward(x)

    model = Frozen().eval()
    with pytest.raises(Exception, match="read-only"):
        measure(model, BATCH, stopping=SHORT)
    assert not model.training


class Changing(Base):
    """Keeps numbers of its own in every way that modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.array = torch.zeros(3), np.zeros(3)
        self.spread = torch.full((1,), float("nan")).expand(4)
        self.recent: deque[int] = deque([1, 2], maxlen=2)
        self.seen: Counter[str] = Counter(first=1)
        self.own = torch.Generator().manual_seed(3)
        self.of_numpy, self.of_python = np.random.default_rng(3), random.Random(3)
        self.register_buffer("shadow", torch.full((12, 8), 0.01))

    def forward(self, x: Tensor) -> Tensor:
        self.plain += 1
        self.array += 1
        self.recent.append(7)
        self.seen["more"] += 1
        self.a.weight.data = self.shadow
        scale = 1 + float(self.plain[0]) + self.of_numpy.random() + self.of_python.random()
        return super().forward(x * scale + torch.randn(x.shape, generator=self.own))


def test_what_a_model_changes_of_itself_is_put_back() -> None:
    model = Changing()
    weight, place = model.a.weight.detach().clone(), model.a.weight.data_ptr()

    def generators() -> tuple[Any, ...]:
        return model.own.get_state().tolist(), model.of_numpy.bit_generator.state, model.of_python.getstate()

    before = generators()
    first = measure(model, BATCH, stopping=SHORT).losses
    assert torch.equal(model.a.weight, weight) and model.a.weight.data_ptr() == place
    assert not model.plain.any() and not model.array.any()
    assert list(model.recent) == [1, 2] and model.seen == {"first": 1}
    assert generators() == before
    assert measure(model, BATCH, stopping=SHORT).losses.tolist() == first.tolist()


def test_a_loss_with_parameters_and_buffers_is_put_back() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            return self.scale * nn.functional.cross_entropy(outputs, targets) * (1 + 0.1 * self.calls)

    loss = Weighted()
    first = measure(Base(), BATCH, loss=loss, stopping=SHORT).losses
    assert loss.scale.grad is None and not loss.calls
    assert measure(Base(), BATCH, loss=loss, stopping=SHORT).losses.tolist() == first.tolist()
    assert first[0] == pytest.approx(1.1 * float(nn.functional.cross_entropy(Base()(BATCH[0]), BATCH[1])), rel=1e-5)


def test_a_loss_that_draws_is_called_once_for_each_step() -> None:
    def noisy(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs + 0.1 * torch.randn_like(outputs), targets)

    model = Base()
    torch.manual_seed(5)
    expected = float(noisy(model(BATCH[0]), BATCH[1]))
    assert measure(model, BATCH, loss=noisy, seed=5, stopping=SHORT).l0 == pytest.approx(expected, rel=1e-6)


def test_the_callers_autocast_is_not_part_of_it() -> None:
    plain = measure(Base(), BATCH, stopping=SHORT).losses
    with torch.autocast("cpu", torch.bfloat16):
        within = measure(Base(), BATCH, stopping=SHORT).losses
    assert within.tolist() == plain.tolist()


@pytest.mark.parametrize("read_every", [1, 2, 8])
def test_steps_after_the_end_cannot_fail_a_trial(read_every: int) -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            if not self.w.isfinite().all() or abs(float(self.w)) > 1e10:
                raise ValueError("a weight is no number")
            return self.w * x

    batch = (torch.ones(4, 1), torch.zeros(4, 1))
    result = measure(Strict(), batch, loss="mse", lr=0.95, epsilons=(0.01,), read_every=read_every)
    assert result.stop_reason == "reached"

    class Breaks(Strict):
        def forward(self, x: Tensor) -> Tensor:
            if abs(float(self.w)) < 0.5:  # at the end, L is a hundredth of L_0: later steps fail
                raise ValueError("too small")
            return (self.w - 0.9) * x

    ends = measure(Breaks(), batch, loss="mse", lr=0.1, epsilons=(0.5,), read_every=read_every)
    assert ends.stop_reason == "reached" and ends.t_star == {0.5: 1}
    with pytest.raises(ValueError, match="too small"):
        measure(Breaks(), batch, loss="mse", lr=0.8, epsilons=(1e-9,), read_every=read_every)


def test_targets_made_in_inference_mode_and_nested_inputs_are_taken() -> None:
    class Nested(Base):
        def forward(self, x: Tensor, more: dict[str, list[Tensor]]) -> Tensor:
            return super().forward(x + more["a"][0])

    with torch.inference_mode():
        y = torch.arange(16) % 4
    given = (BATCH[0], {"a": [BATCH[0]]})
    assert measure(Nested(), (given, y), stopping=SHORT).l0 > 0


def test_a_model_without_gradients_gets_one_sentence() -> None:
    class Detached(Base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(ModelError, match="do not depend on its parameters"):
        measure(Detached(), BATCH, stopping=SHORT)


def test_a_loss_of_minus_infinity_is_divergence() -> None:
    result = measure(Base(), BATCH, loss=lambda o, t: (o * 0).sum() - torch.tensor(float("inf")), stopping=SHORT)
    assert result.stop_reason == "diverged" and not result.reached(0.5)


@pytest.mark.parametrize(
    "wrong", [{"plateau_window": 5.0}, {"plateau_window": "a"}, {"plateau_window": 1}, {"plateau_tolerance": "x"}]
)
def test_a_stopping_rule_of_the_wrong_type_gets_one_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="plateau_"):
        StoppingRule(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"read_every": 2.5}, {"epsilons": None}, {"epsilons": "0.1"}, {"epsilons": torch.tensor(0.1)}),
        *({"epsilons": np.array(0.1)}, {"seed": True}, {"seed": "a"}, {"seed": None}, {"seed": 2**64}),
        *({"stopping": {"max_steps": 3}}, {"stopping": {}}),
    ],
)
def test_arguments_of_the_wrong_type_get_one_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="must be|is a StoppingRule"):
        measure(Base(), BATCH, **wrong)


def test_a_seed_may_be_numpys() -> None:
    drops = nn.Sequential(Base(), nn.Dropout(0.5))
    found, plain = (measure(drops, BATCH, seed=seed, stopping=SHORT) for seed in (np.int64(3), 3))
    assert found.losses.tolist() == plain.losses.tolist()


def test_a_loss_that_writes_into_its_targets_has_its_own() -> None:
    given = BATCH[1].clone()
    given[0] = 255

    def marked(outputs: Tensor, targets: Tensor) -> Tensor:
        targets[targets == 255] = -100
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def shifts(outputs: Tensor, targets: Tensor) -> Tensor:
        targets -= 1
        return nn.functional.cross_entropy(outputs, targets)

    cape.predict(Base(), (BATCH[0], given), loss=marked, lr=1e-3, dataset_size=2000)
    measure(Base(), (BATCH[0], given), loss=marked, stopping=SHORT)
    assert given[0] == 255
    moved = measure(Base(), (BATCH[0], BATCH[1] + 1), loss=shifts, stopping=SHORT).losses
    plain = measure(Base(), BATCH, loss=nn.functional.cross_entropy, stopping=SHORT).losses
    assert moved.tolist() == plain.tolist()


def test_sparse_gradients_are_refused_in_one_sentence() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(12, 4))
    batch = (torch.arange(48).view(16, 3) % 9, BATCH[1])
    with pytest.raises(ModelError, match="AdamW takes no sparse gradients"):
        measure(model, batch, stopping=SHORT)
    both = measure_many([Subject(model, batch, stopping=SHORT)] * 2, step_seconds=1e-3)
    assert all(isinstance(o.error, ModelError) for o in both)
    with pytest.raises(ModelError, match="AdamW takes no sparse gradients"):
        cape.predict(model, batch, lr=1e-3, dataset_size=2000).time()


@pytest.mark.parametrize("write", [lambda x: x.data.mul_(2), lambda x: x.detach().numpy().__imul__(2)])
def test_what_is_written_into_the_inputs_unseen_is_gone_in_the_next_pass(write: Any) -> None:
    class Doubles(Base):
        def forward(self, x: Tensor) -> Tensor:
            write(x)
            return super().forward(x)

    doubled = (BATCH[0] * 2, BATCH[1])
    plain = measure(Base(), doubled, stopping=SHORT).losses
    assert measure(Doubles(), BATCH, stopping=SHORT).losses.tolist() == plain.tolist()


def test_a_teacher_and_what_a_loss_reads_get_no_gradient() -> None:
    teacher, heat = nn.Linear(8, 4), nn.Parameter(torch.ones(()))
    heat.grad = torch.ones(())
    targets = teacher(BATCH[0]).softmax(1)

    def warmed(outputs: Tensor, given: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs * heat, given)

    found = measure(Base(), (BATCH[0], targets), loss=warmed, stopping=SHORT).losses
    assert found.tolist() == measure(Base(), (BATCH[0], targets.detach()), loss=warmed, stopping=SHORT).losses.tolist()
    assert teacher.weight.grad is None and heat.grad.equal(torch.ones(()))
    cape.predict(Base(), (BATCH[0], targets), loss=warmed, lr=1e-3, dataset_size=2000)
    assert teacher.weight.grad is None and heat.grad.equal(torch.ones(()))


def test_a_module_that_is_hidden_in_a_list_gets_no_gradient() -> None:
    class Hides(Base):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [nn.Linear(8, 8)]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.parts[0](x))

    model = Hides()
    measure(model, BATCH, stopping=SHORT)
    assert model.parts[0].weight.grad is None


def test_train_may_return_nothing() -> None:
    class Silent(Base):
        def train(self, mode: bool = True) -> None:  # type: ignore[override]
            super().train(mode)

    assert (
        measure(Silent(), BATCH, stopping=SHORT).losses.tolist()
        == measure(Base(), BATCH, stopping=SHORT).losses.tolist()
    )


def test_a_model_made_in_inference_mode_is_refused_and_left_alone() -> None:
    with torch.inference_mode():
        model = Base().eval()
    with pytest.raises(ModelError, match=r"'a\.weight' was made in inference mode"):
        measure(model, BATCH, stopping=SHORT)
    with pytest.raises(ModelError, match="build the model outside"):
        cape.predict(model, BATCH, lr=1e-3, dataset_size=2000)
    assert not model.training
