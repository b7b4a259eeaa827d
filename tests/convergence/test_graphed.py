"""A replayed step is the step: the same trajectories with graphs and without, whatever comes into the slots."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cape.config import ModelSpec, StoppingRule
from cape.convergence import Outcome, Subject, Trajectory, measure
from cape.convergence import graphed as graphed_module
from cape.convergence import single as single_module
from cape.convergence import stack as stack_module
from cape.convergence import training as training_module
from cape.convergence import vmapped as vmapped_module
from cape.convergence.draws import CounterDraws
from cape.convergence.graphed import LOOKS_BEFORE_CAPTURE, RepeatedStep, use_graphs
from cape.convergence.training import Live
from cape.logs import log_once
from tests.convergence.recording import RecordedGraph
from tests.convergence.test_batched import CHAINS, RECURRENT, VMAPPED, losses, subjects, together

SPECS: dict[str, ModelSpec] = {
    "mlp": CHAINS["mlp"],  # batch norm, and dropout by counters
    "gru 2 both": RECURRENT["gru 2 both"],
    "lstm 1 one": RECURRENT["lstm 1 one"],
    "resnet": VMAPPED["resnet"],  # autograd below vmap, dropout in the head
    "vit": VMAPPED["vit"],
}
LENGTHS = (9, 23, 14, 31, 17)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedGraph]]:
    """Emulated graphs on the CPU, and looks as on a device: the graphs that were made."""
    made: list[RecordedGraph] = []
    monkeypatch.setattr(RecordedGraph, "made", made)
    _emulate(monkeypatch, RecordedGraph)
    yield made


def _emulate(monkeypatch: pytest.MonkeyPatch, graph: Callable[[], object]) -> None:
    def maker(device: torch.device) -> object:
        return graph if graphed_module._enabled.get() else None

    def steps(running: list[Live]) -> int:
        return 1 + min(len(one.scan) for one in running) % 3  # looks of several steps, as on a device

    monkeypatch.setattr(training_module, "graph_maker", maker)
    monkeypatch.setattr(single_module, "graph_maker", maker)
    monkeypatch.setattr(training_module, "_steps", steps)
    log_once.cache_clear()
    for module in (stack_module, vmapped_module):  # a device's draws: those of a CPU keep their state in Python
        monkeypatch.setattr(module, "draws_for", lambda device, slots: CounterDraws(slots, device))


def uneven(name: str, count: int = 5, batch: int = 8, stretch: int = 1) -> list[Subject]:
    """Trials of one model with three learning rates that end at different times, so that slots change hands."""
    trials = subjects(SPECS[name], count, batch=batch, epsilons=(1e-6,))
    stops = [StoppingRule(max_steps=stretch * LENGTHS[i % len(LENGTHS)]) for i in range(count)]
    return [Subject(t.model, t.batch, t.lr, t.epsilons, stop, t.seed) for t, stop in zip(trials, stops)]


def same(one: list[Outcome], other: list[Outcome]) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(losses(a), losses(b))
        assert a.trajectory is not None and b.trajectory is not None
        assert (a.trajectory.stop_reason, a.trajectory.t_star) == (b.trajectory.stop_reason, b.trajectory.t_star)


@pytest.mark.parametrize("name", list(SPECS))
def test_a_graphed_stack_makes_the_same_trajectories(name: str, graphs: list[RecordedGraph]) -> None:
    trials = uneven(name)
    replayed = together(trials, width=3)
    # Three trials, then two and at last one: one graph for each width, also where slots and learning rates change hands
    # (the first lasts from the seventh step on: the trials of 9 and of 14 updates leave it, two others come).
    assert 2 <= len(graphs) <= 3 and graphs[0].replays > 14
    with use_graphs(False):
        same(replayed, together(trials, width=3))


def test_without_dropout_a_graphed_stack_is_the_plain_engine(graphs: list[RecordedGraph]) -> None:
    spec = CHAINS["mlp"].replace(options={**CHAINS["mlp"].options, "dropout": 0.0})
    trials = [
        Subject(t.model, t.batch, t.lr, (1e-6,), StoppingRule(max_steps=25), t.seed)
        for t in subjects(spec, 3, batch=32)
    ]
    found = together(trials, width=2)
    assert graphs and graphs[0].replays > 5
    with use_graphs(False):
        for trial, outcome in zip(trials, found, strict=True):
            alone = measure(trial.model, trial.batch, lr=trial.lr, epsilons=(1e-6,), stopping=trial.stopping)
            np.testing.assert_array_equal(losses(outcome), alone.losses)


def test_misfits_and_divergence_beside_a_graph_disturb_nobody(graphs: list[RecordedGraph]) -> None:
    trials = uneven("mlp", 6)
    x, y = trials[4].batch
    trials[4] = Subject(trials[4].model, (x, y + 90), stopping=trials[4].stopping)  # comes when a graph is running
    x, y = trials[5].batch
    trials[5] = Subject(trials[5].model, (torch.full_like(x, float("nan")), y), stopping=trials[5].stopping)
    found = together(trials, width=2)
    assert sum(graph.replays for graph in graphs) > 10
    assert found[4].trajectory is None and "labels must lie in 0..9" in str(found[4].error)
    assert found[5].trajectory is not None and found[5].trajectory.stop_reason == "diverged"
    with use_graphs(False):
        same(found[:4], together(trials[:4], width=2))


class _Broken(RecordedGraph):
    """A graph whose capture breaks off half way, when memory has been written to."""

    refused = "_fused_adamw_"


BROKEN = "is trained without a CUDA graph: CUDA out of memory at _fused_adamw_."


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_capture_that_fails_is_said_once_and_the_steps_go_on(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RecordedGraph, "made", [])
    _emulate(monkeypatch, _Broken)
    trials = uneven(name)
    with caplog.at_level(logging.WARNING, logger="cape"):
        found = [together(trials, width=3) for _ in range(2)][0]
    assert [record.getMessage() for record in caplog.records] == [
        f"A stack of {type(trials[0].model).__name__} {BROKEN}"
    ]
    assert len(RecordedGraph.made) == 2  # one for each stack, none after it has failed
    with use_graphs(False):
        same(found, together(trials, width=3))


def model(dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.GELU(),
        nn.Dropout(dropout), nn.Linear(32, 10),
    )  # fmt: skip


def follow(of: nn.Module, read_every: int | None = 3, **options: object) -> Trajectory:
    (trial,) = subjects(CHAINS["mlp"], 1, batch=32)
    stopping = StoppingRule(max_steps=40)
    return measure(of, trial.batch, epsilons=(1e-6,), stopping=stopping, seed=5, read_every=read_every, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("read_every", [1, 3, None])
def test_measure_is_the_same_with_a_graph(precision: str, read_every: int | None, graphs: list[RecordedGraph]) -> None:
    trained = model()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    replayed = follow(trained, read_every, precision=precision)
    assert len(graphs) == 1 and graphs[0].replays >= 40 - (LOOKS_BEFORE_CAPTURE + 1) * (read_every or 1)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(p.grad is None for p in trained.parameters())
    assert np.isfinite(replayed.step_seconds)  # of the steps that were made one by one
    with use_graphs(False):
        plain = follow(trained, read_every, precision=precision)
    np.testing.assert_array_equal(replayed.losses, plain.losses)
    assert (replayed.stop_reason, replayed.stopped_at) == (plain.stop_reason, plain.stopped_at) == ("cap", 40)


def test_measure_goes_on_where_a_capture_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _emulate(monkeypatch, _Broken)
    with caplog.at_level(logging.WARNING, logger="cape"):
        found = follow(model())
    assert [record.getMessage() for record in caplog.records] == [f"Sequential {BROKEN}"]
    with use_graphs(False):
        np.testing.assert_array_equal(found.losses, follow(model()).losses)


def test_a_short_trajectory_pays_for_no_graph(graphs: list[RecordedGraph]) -> None:
    short = StoppingRule(max_steps=LOOKS_BEFORE_CAPTURE - 1)
    trials = [Subject(t.model, t.batch, t.lr, stopping=short) for t in subjects(CHAINS["mlp"], 3, batch=32)]
    measure(trials[0].model, trials[0].batch, stopping=short)
    together(trials, width=3)
    assert not graphs


class Reading(nn.Linear):
    """Looks at a value of its own while it computes."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(y.detach().abs().max()) < 1e6 else y / 2


class _Annealed(nn.Linear):
    """Keeps a number that changes from pass to pass."""

    heat = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.heat *= 0.99
        return super().forward(x) * self.heat


class _Moving(nn.Linear):
    """Puts another tensor in the place of a buffer in every pass."""

    def __init__(self) -> None:
        super().__init__(64, 10)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return super().forward(x - self.mean)


class _Skipping(nn.Linear):
    """Leaves a layer out at random, as Python draws."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if random.random() < 0.9 else 0.9)


class _Noisy(nn.Linear):
    """Draws from NumPy."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 + 0.01 * np.random.rand())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (lambda: Reading(64, 10), "not permitted when stream is capturing"),
        (lambda: _Annealed(64, 10), "changes something on the host"),
        (_Moving, "changes something on the host"),
        (lambda: _Skipping(64, 10), "changes something on the host"),
        (lambda: _Noisy(64, 10), "changes something on the host"),
    ],
)
def test_what_a_graph_cannot_hold_is_found_out(
    kind: Callable[[], nn.Module], why: str, graphs: list[RecordedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    odd = kind()

    def again() -> Trajectory:
        random.seed(3)
        np.random.seed(3)
        return follow(odd)

    with caplog.at_level(logging.WARNING, logger="cape"):
        found = again()
    assert not sum(graph.replays for graph in graphs)
    assert len(caplog.records) == 1 and why in caplog.text and type(odd).__name__ in caplog.text
    with use_graphs(False):
        np.testing.assert_array_equal(found.losses, again().losses)


def test_hooks_and_custom_losses_are_called_in_every_step(
    graphs: list[RecordedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    hooked, seen = model(), []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    follow(hooked)
    called: list[int] = []

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        called.append(1)
        return nn.functional.cross_entropy(outputs, targets)

    follow(model(), loss=own)
    assert not graphs and len(seen) >= 41 and len(called) >= 41
    assert "it has hooks" in caplog.text and "the loss 'own'" in caplog.text


def test_a_step_finds_its_row_and_a_new_width_a_new_graph(graphs: list[RecordedGraph]) -> None:
    state = torch.zeros(4, dtype=torch.float64)
    asked: list[bool] = []

    def step(for_capture: bool) -> Tensor:
        asked.append(for_capture)
        state.add_(1.0)
        return state[: repeated._width] * 10.0

    repeated = RepeatedStep(step, RecordedGraph, name="x", rows=5, columns=4, device=state.device)
    count = 0
    for width in (4, 2):
        for look in range(LOOKS_BEFORE_CAPTURE + 3):
            steps = 1 + look % 5
            table = repeated.run(steps, width)
            expected = 10.0 * torch.arange(count + 1, count + steps + 1, dtype=torch.float64)
            assert torch.equal(table, expected[:, None].expand(steps, width))
            assert repeated.captured == (look >= LOOKS_BEFORE_CAPTURE)
            count += steps
    assert len(graphs) == 2
    # Fit for a capture in the look before it, which warms it up, and in the capture.
    warm = [1 + look % 5 for look in range(LOOKS_BEFORE_CAPTURE)]
    assert asked == 2 * ([False] * sum(warm[:-1]) + [True] * warm[-1] + [True])


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_no_graph_outlives_what_it_trains(graphs: list[RecordedGraph], no_collector: None) -> None:
    """Its memory is that of a whole step, and must not wait for Python's collector."""
    follow(model())
    together(uneven("mlp"), width=3)
    together(uneven("resnet"), width=3)
    held = [weakref.ref(graph) for graph in graphs]
    assert len(held) >= 5
    graphs.clear()
    assert not [graph for graph in held if graph() is not None]


def test_a_graph_goes_with_its_width(graphs: list[RecordedGraph], no_collector: None) -> None:
    losses = torch.zeros(3)
    repeated = RepeatedStep(lambda _: losses * 1.0, RecordedGraph, name="x", rows=1, columns=3, device=losses.device)
    for _ in range(LOOKS_BEFORE_CAPTURE + 1):
        repeated.run(1, 3)
    held = weakref.ref(graphs.pop())
    assert held() is not None and repeated.captured
    losses = losses[:2]
    repeated.run(1, 2)
    assert held() is None and not repeated.captured


def test_the_emulation_fixes_what_python_computed(graphs: list[RecordedGraph]) -> None:
    """What the tests above rely on: a step that is not fit to be replayed gives other numbers."""
    python, device = 0.0, torch.zeros(1)

    def step(_: bool) -> Tensor:
        nonlocal python
        python += 1.0
        device.add_(1.0)
        return device + python

    repeated = RepeatedStep(step, RecordedGraph, name="x", rows=1, columns=1, device=device.device)
    found = [float(repeated.run(1)) for _ in range(LOOKS_BEFORE_CAPTURE + 3)]
    assert found[:LOOKS_BEFORE_CAPTURE] == [2.0 * (i + 1) for i in range(LOOKS_BEFORE_CAPTURE)]
    fixed = LOOKS_BEFORE_CAPTURE + 1
    assert found[LOOKS_BEFORE_CAPTURE:] == [fixed + i + fixed for i in range(3)]


def test_the_emulation_lets_nothing_last_in_a_graphs_own_memory(graphs: list[RecordedGraph]) -> None:
    """As above: a step that goes on from what the one before has left, or reads what it has not written."""

    def found(step: Callable[[bool], Tensor]) -> list[float]:
        repeated = RepeatedStep(step, RecordedGraph, name="x", rows=1, columns=1, device=torch.device("cpu"))
        return [float(repeated.run(1)) for _ in range(LOOKS_BEFORE_CAPTURE + 2)]

    held = torch.ones(1)

    def follows(_: bool) -> Tensor:
        nonlocal held
        before, held = held, held + 1.0
        return before

    first = LOOKS_BEFORE_CAPTURE + 1.0
    assert found(follows)[-2:] == [first, first]
    assert all(np.isnan(found(lambda _: torch.empty(1))[-2:]))
