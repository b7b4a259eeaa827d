"""Many trials at once: each result is that of ``measure``, whatever else is in the stack."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cape import datasets, families
from cape.config import ModelSpec, StoppingRule, TrialSpec
from cape.convergence import Outcome, Subject, measure, measure_many
from cape.convergence import batched as batched_module
from cape.convergence import stack as stack_module
from cape.convergence.draws import CounterDraws
from cape.convergence.engine import make_stack, single_because, width_for
from cape.convergence.stack import LayerStack
from cape.convergence.vmapped import VmapStack
from cape.drawn import build_model
from cape.logs import log_once
from cape.tasks import Loss, LossLike

LRS = (5e-4, 1e-3, 2e-3)
IMAGE = (3, 16, 16)

CHAINS = {
    "mlp": ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 2, "width": 48, "activation": "gelu"}),
    "mlp relu": ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 1, "width": 32, "activation": "relu"}),
}
RECURRENT = {
    f"{kind} {layers} {'both' if both else 'one'}": ModelSpec(
        "rnn", kind, "rows", (8, 8), 10, options={"layers": layers, "hidden": 24, "bidirectional": both}
    )
    for kind in ("lstm", "gru")
    for layers in (1, 2)
    for both in (False, True)
}
VMAPPED = {
    "resnet": ModelSpec("cnn", "resnet", "image", IMAGE, 10, options={"base": 8, "repeats": [1, 1, 1], "dropout": 0.1}),
    "mobilenetv2": ModelSpec(
        "cnn", "mobilenetv2", "image", IMAGE, 10, options={"width": 0.5, "stem": 16, "repeats": [1, 1, 1]}
    ),
    "vit": ModelSpec(
        "transformer", "vit", "image", IMAGE, 10, options={"dim": 32, "depth": 2, "heads": 2, "dropout": 0.1}
    ),
    "pit": ModelSpec(
        "transformer", "pit", "image", IMAGE, 10, options={"dims": [32, 48], "depths": [1, 1], "heads": [2, 2]}
    ),
}


def subjects(spec: ModelSpec, count: int, batch: int = 16, **changes: object) -> list[Subject]:
    """Trials of one model on real digits, with three learning rates and a seed each."""
    images = torch.tensor(datasets.load("digits").batch(batch * count, 0, "vector")[0].numpy())
    labels = datasets.load("digits").batch(batch * count, 0, "vector")[1]
    made = []
    for i in range(count):
        torch.manual_seed(i)
        model = families.build(spec)
        x, y = images[i * batch : (i + 1) * batch], labels[i * batch : (i + 1) * batch]
        if spec.layout == "image":
            x = nn.functional.interpolate(x.view(-1, 1, 8, 8), IMAGE[1:]).expand(-1, 3, -1, -1).contiguous()
        elif spec.layout == "rows":
            x = x.view(-1, 8, 8)
        made.append(Subject(model, (x, y), lr=LRS[i % 3], seed=100 + i, **changes))  # type: ignore[arg-type]
    return made


def alone(subject: Subject, loss: LossLike = "cross_entropy") -> Outcome:
    trajectory = measure(
        subject.model, subject.batch, loss=loss, lr=subject.lr, epsilons=subject.epsilons, stopping=subject.stopping,
        seed=subject.seed,
    )  # fmt: skip
    return Outcome(0, trajectory)


def together(trials: list[Subject], **options: object) -> list[Outcome]:
    outcomes = list(measure_many(trials, step_seconds=1e-3, **options))  # type: ignore[arg-type]
    assert sorted(o.index for o in outcomes) == list(range(len(trials)))
    return sorted(outcomes, key=lambda o: o.index)


def losses(outcome: Outcome) -> np.ndarray:
    assert outcome.trajectory is not None, outcome.error
    return outcome.trajectory.losses


@pytest.mark.parametrize("name", list(CHAINS))
@pytest.mark.parametrize("width", [1, 3, 8])
def test_dense_stacks_are_the_plain_engine_bit_for_bit_dropout_included(name: str, width: int) -> None:
    trials = subjects(CHAINS[name], 7, epsilons=(0.6, 0.4))
    before = [copy.deepcopy(t.model.state_dict()) for t in trials]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for trial, outcome in zip(trials, together(trials, width=width), strict=True):
        expected = alone(trial).trajectory
        assert expected is not None and outcome.trajectory is not None
        np.testing.assert_array_equal(outcome.trajectory.losses, expected.losses)
        assert outcome.trajectory.t_star == expected.t_star
        assert outcome.trajectory.stop_reason == expected.stop_reason == "reached"
        assert outcome.trajectory.seconds > 0
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), state)
    for trial, held in zip(trials, before, strict=True):
        assert all(torch.equal(v, held[k]) for k, v in trial.model.state_dict().items())


@pytest.mark.parametrize("name", [*RECURRENT, *VMAPPED])
def test_other_stacks_follow_the_plain_engine_to_rounding(name: str) -> None:
    spec = {**RECURRENT, **VMAPPED}[name]
    trials = subjects(spec, 4, batch=8, stopping=StoppingRule(max_steps=25))
    expected_kind = LayerStack if name in RECURRENT else VmapStack
    assert isinstance(make_stack(trials[0], Loss("cross_entropy"), 2, "float32"), expected_kind)
    for trial, outcome in zip(trials, together(trials, width=3), strict=True):
        expected = losses(alone(trial))
        np.testing.assert_allclose(losses(outcome)[:6], expected[:6], rtol=1e-5)
        np.testing.assert_allclose(losses(outcome)[: len(expected)], expected[: len(losses(outcome))], rtol=0.02)


@pytest.mark.parametrize("name", ["mlp", "gru 2 both", "lstm 1 both", "vit"])
def test_a_trial_does_not_depend_on_its_neighbours_or_its_slot(name: str) -> None:
    trials = subjects({**CHAINS, **RECURRENT, **VMAPPED}[name], 5, batch=8, stopping=StoppingRule(max_steps=12))
    together_ = together(trials, width=4)
    backwards = together(trials[::-1], width=2)[::-1]
    for one, other in zip(together_, backwards, strict=True):
        if name == "mlp":
            np.testing.assert_array_equal(losses(one), losses(other))
        else:
            np.testing.assert_allclose(losses(one), losses(other), rtol=2e-4)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_the_gradients_of_stacked_cells_are_autograds(kind: str, both: bool, tokens: bool) -> None:
    if both and tokens:
        pytest.skip("a sequence model is never bidirectional")
    options: dict[str, object] = {"layers": 2, "hidden": 5, "bidirectional": both}
    layout, shape = ("tokens", (6,)) if tokens else ("rows", (6, 3))
    task, loss = ("sequence", "sequence_cross_entropy") if tokens else ("classification", "cross_entropy")
    if tokens:
        options["embedding"] = 4
    spec = ModelSpec("rnn", kind, layout, shape, 7, task=task, options=options)
    trials = []
    for i in range(3):
        torch.manual_seed(i)
        x = torch.randint(0, 7, (4, 6)) if tokens else torch.randn(4, 6, 3, dtype=torch.float64)
        y = torch.randint(0, 7, (4, 6) if tokens else (4,))
        trials.append(Subject(families.build(spec).double(), (x, y)))
    criterion = Loss(loss)
    stack = make_stack(trials[0], criterion, 3, "float32")
    assert isinstance(stack, LayerStack)
    for trial in trials:
        stack.load(trial)
    stack.forward()
    stacked = stack.losses()
    stack._optimizer.step = lambda parameters: None  # type: ignore[method-assign]  # leave the gradients to be read
    stack.update()
    for k, trial in enumerate(trials):
        loss_value = criterion.mean(trial.model(trial.batch[0]), trial.batch[1])
        loss_value.backward()
        torch.testing.assert_close(stacked[k], loss_value.detach(), rtol=1e-12, atol=0.0)
        parameters = [p for layer in stack._layers for p in layer.parameters]
        for p, held in zip(trial.model.parameters(), parameters, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(held.grad[k], p.grad, rtol=1e-10, atol=1e-14)


def test_bad_trials_are_recorded_and_disturb_nobody() -> None:
    trials = subjects(CHAINS["mlp"], 6, stopping=StoppingRule(max_steps=40))
    x, y = trials[1].batch
    nan = Subject(trials[1].model, (torch.full_like(x, float("nan")), y))
    labels = Subject(trials[2].model, (trials[2].batch[0], y + 90))
    wild = Subject(trials[3].model, trials[3].batch, lr=1e18)
    flat = Subject(trials[4].model, trials[4].batch, lr=1e-30, stopping=StoppingRule(max_steps=9))
    found = together([trials[0], nan, labels, wild, flat, trials[5]], width=6)
    for i in (0, 5):
        np.testing.assert_array_equal(losses(found[i]), losses(alone(trials[i])))
    nan_, wild_, flat_ = (found[i].trajectory for i in (1, 3, 4))
    assert nan_ is not None and (nan_.stop_reason, nan_.stopped_at) == ("diverged", 0)
    assert wild_ is not None and wild_.stop_reason in ("diverged", "plateau", "cap") and not any(wild_.t_star.values())
    assert flat_ is not None and (flat_.stop_reason, flat_.stopped_at) == ("cap", 9)
    assert found[2].trajectory is None and "labels must lie in 0..9" in str(found[2].error)


def test_trials_of_another_shape_run_beside_the_stack() -> None:
    trials = subjects(CHAINS["mlp"], 3)
    other = subjects(CHAINS["mlp relu"], 1)[0]
    found = together([trials[0], other, *trials[1:]])
    for trial, outcome in zip([trials[0], other, *trials[1:]], found, strict=True):
        np.testing.assert_array_equal(losses(outcome), losses(alone(trial)))


def test_out_of_memory_halves_the_stack_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = subjects(CHAINS["mlp"], 7, epsilons=(0.5,))
    forward, widths = LayerStack.forward, []

    def tight(self: LayerStack) -> Tensor:
        widths.append(self.width)
        if self.width > 2 and len(widths) > 3:  # some steps into the trajectories
            raise torch.OutOfMemoryError("no room for so many")
        return forward(self)

    monkeypatch.setattr(LayerStack, "forward", tight)
    found = together(trials, width=7)
    assert widths[0] == 7 and set(widths[-5:]) <= {1, 2, 3} and max(widths[4:]) <= 3
    for trial, outcome in zip(trials, found, strict=True):
        np.testing.assert_array_equal(losses(outcome), losses(alone(trial)))


def test_no_memory_for_a_single_trial_is_that_trials_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: LayerStack) -> Tensor:
        raise torch.OutOfMemoryError("full")

    def also_full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(LayerStack, "forward", full)
    monkeypatch.setattr(batched_module, "measure", also_full)
    found = together(subjects(CHAINS["mlp"], 3), width=2)
    assert all(isinstance(o.error, torch.OutOfMemoryError) for o in found)


class _Gated(nn.Module):
    """A model of a user's own, with a vendor's recurrent kernel inside."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.view(len(x), 8, 8))[0].mean(1))


class _Branching(nn.Module):
    """A model whose path depends on its data."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) if x.sum() > 0 else -self.head(x)


@pytest.mark.parametrize(("kind", "why"), [(_Gated, "no rule for LSTM"), (_Branching, "data-dependent")])
def test_what_cannot_be_stacked_runs_singly_and_one_line_says_why(
    kind: type[nn.Module], why: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_once.cache_clear()
    trials = [Subject(kind(), s.batch, stopping=StoppingRule(max_steps=6)) for s in subjects(CHAINS["mlp"], 3)]
    with caplog.at_level(logging.WARNING, logger="cape"):
        found = together(trials)
    for trial, outcome in zip(trials, found, strict=True):
        np.testing.assert_array_equal(losses(outcome), losses(alone(trial)))
    assert len(caplog.records) == 1
    assert f"{kind.__name__} runs singly" in caplog.text and why in caplog.text


def test_frozen_parameters_hooks_and_custom_losses_run_singly() -> None:
    trials = subjects(CHAINS["mlp"], 2)
    trials[0].model.get_parameter("0.bias").requires_grad_(False)
    found = together(trials)
    for trial, outcome in zip(trials, found, strict=True):
        np.testing.assert_array_equal(losses(outcome), losses(alone(trial)))
    seen: list[int] = []
    trials[1].model.register_forward_hook(lambda *_: seen.append(1))
    together(trials[1:])
    assert seen
    custom = list(measure_many(trials[1:], loss=nn.functional.cross_entropy))
    np.testing.assert_array_equal(losses(custom[0]), losses(alone(trials[1], nn.functional.cross_entropy)))


def test_trials_are_taken_as_slots_become_free() -> None:
    trials = subjects(CHAINS["mlp"], 6)
    taken: list[int] = []

    def lazily() -> Iterator[Subject]:
        for i, trial in enumerate(trials):
            taken.append(i)
            yield trial

    results = measure_many(lazily(), width=2, step_seconds=1e-3)
    next(results)
    assert len(taken) <= 4
    assert torch.is_grad_enabled()  # the caller's own code runs between two results
    assert len(list(results)) == 5 and taken == list(range(6))


def test_a_head_of_one_unit_is_the_plain_engines_bit_for_bit() -> None:
    trials = []
    for trial in subjects(CHAINS["mlp"], 5, stopping=StoppingRule(max_steps=6)):
        model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 1))
        trials.append(Subject(model, (trial.batch[0], trial.batch[1].float() / 9), trial.lr, stopping=trial.stopping))
    for trial, outcome in zip(trials, together(trials, loss="half_mse", width=3), strict=True):
        np.testing.assert_array_equal(losses(outcome), losses(alone(trial, "half_mse")))


def test_regression_and_multilabel_stack_too() -> None:
    trials = subjects(CHAINS["mlp"], 3, stopping=StoppingRule(max_steps=15))
    one_hot = []
    for trial in trials:
        x, y = trial.batch
        one_hot.append(Subject(trial.model, (x, nn.functional.one_hot(y, 10).float()), stopping=trial.stopping))
    for loss in ("binary_cross_entropy", "half_mse"):
        for trial, outcome in zip(one_hot, together(one_hot, loss=loss), strict=True):
            np.testing.assert_allclose(losses(outcome), losses(alone(trial, loss)), rtol=1e-5)


def test_counter_draws_leave_the_distribution_of_t_star_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does: masks by counters instead of the plain engine's. T* of 90 trials each, the same models."""
    from scipy.stats import ks_2samp

    trials = subjects(CHAINS["mlp"], 90, epsilons=(0.4,))
    same = [o.trajectory.t_star[0.4] for o in together(trials) if o.trajectory]
    monkeypatch.setattr(stack_module, "draws_for", lambda device, slots: CounterDraws(slots, device))
    other = [o.trajectory.t_star[0.4] for o in together(trials) if o.trajectory]
    assert same != other and len(same) == len(other) == 90
    assert ks_2samp(same, other).pvalue > 0.01


def test_the_rule_follows_from_the_model_and_the_device() -> None:
    def single(name: str, precision: str = "float32", count: int = 1) -> bool:
        subject = subjects({**CHAINS, **RECURRENT, **VMAPPED}[name], 1)[0]
        return single_because(subject, precision, count) is not None

    assert not single("mlp", count=2) and single("mlp", count=1) and single("mlp", "bf16", count=9)
    assert not single("gru 1 one") and not single("lstm 1 both") and single("lstm 1 one")
    assert single("resnet", count=50) and single("vit", count=50)
    dense = subjects(CHAINS["mlp"], 1)[0]
    assert width_for(dense, Loss("cross_entropy"), "float32") == 16
    assert width_for(subjects(RECURRENT["gru 1 one"], 1)[0], Loss("cross_entropy"), "float32") == 8


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mlp", "rnn"])
def test_t_star_on_real_images_is_the_plain_engines(family: str, data_root: Path) -> None:
    """Dropout off; real models of the family at B = 8. ``benchmarks.parity`` does it for 200 trials of each family."""
    dataset = datasets.load("cifar10", data_root)
    count, options = (12, {"depth": 2, "width": 128, "activation": "gelu", "dropout": 0.0})
    if family == "rnn":
        count, options = (5, {"layers": 1, "hidden": 128, "bidirectional": True})
    layout, shape = ("vector", (3072,)) if family == "mlp" else ("rows", dataset.sample_shape("rows"))
    spec = ModelSpec(family, "mlp" if family == "mlp" else "gru", layout, tuple(shape), 10, options=options)
    trials = []
    for i in range(count):
        trial = TrialSpec(family, "cifar10", 8, LRS[i % 3], seed=i)
        batch = dataset.batch(8, trial.seed_for("batch"), layout)
        trials.append(Subject(build_model(trial, spec), batch, trial.lr, seed=trial.seed_for("train")))
    for trial, outcome in zip(trials, together(trials), strict=True):
        expected = alone(trial).trajectory
        assert expected is not None and outcome.trajectory is not None
        pairs = [(outcome.trajectory.t_star[e], expected.t_star[e]) for e in trial.epsilons]
        assert all(a is not None and b is not None and abs(a - b) <= (family == "rnn") for a, b in pairs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mlp", "gru 1 both", "lstm 2 one", "resnet", "vit"])
def test_cuda_stacks_follow_the_plain_engine(name: str) -> None:
    spec = {**CHAINS, **RECURRENT, **VMAPPED}[name]
    if "dropout" in spec.options or spec.family == "mlp":
        spec = spec.replace(options={**spec.options, "dropout": 0.0})  # masks are not those of the plain engine there
    trials = [
        Subject(t.model.cuda(), (t.batch[0].cuda(), t.batch[1].cuda()), t.lr, stopping=StoppingRule(max_steps=12))
        for t in subjects(spec, 5, batch=8)
    ]
    for trial, outcome in zip(trials, together(trials), strict=True):
        expected = losses(alone(trial))
        np.testing.assert_allclose(losses(outcome)[:6], expected[:6], rtol=1e-3)
