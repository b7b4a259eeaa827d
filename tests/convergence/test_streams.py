"""Works that take turns, and trials of several models that train side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from cape import trial as trial_module
from cape.config import ModelSpec, StoppingRule, TrialSpec
from cape.convergence import Subject
from cape.convergence import batched as batched_module
from cape.convergence.engine import lanes_for
from cape.convergence.stack import LayerStack
from cape.convergence.streams import Readback, handed_over, on, side_stream, take_turns
from cape.convergence.training import Look, Training
from cape.trial import run_trials


def work(name: str, items: list[int | None], lanes: list[tuple[str, int]]) -> Callable[[int], Iterator[str | None]]:
    def run(lane: int) -> Iterator[str | None]:
        lanes.append((name, lane))
        for item in items:
            yield None if item is None else f"{name}{item}"

    return run


def test_works_take_turns_and_give_their_lane_to_the_next() -> None:
    lanes: list[tuple[str, int]] = []
    works = [
        work("a", [None, 1, None, 2], lanes),
        work("b", [3, None, 4], lanes),
        work("c", [None, 5, 6], lanes),
        work("d", [], lanes),
    ]
    assert list(take_turns(works, 2)) == ["b3", "a1", "b4", "a2", "c5", "c6"]
    assert lanes == [("a", 0), ("b", 1), ("c", 1), ("d", 0)]
    assert list(take_turns(works, 1)) == ["a1", "a2", "b3", "b4", "c5", "c6"]
    assert list(take_turns([], 3)) == []


def test_the_error_of_a_work_ends_all_of_them() -> None:
    def broken(lane: int) -> Iterator[str | None]:
        yield None
        raise ValueError("broken")

    lanes: list[tuple[str, int]] = []
    running = take_turns([broken, work("a", [1, None, 2], lanes)], 2)
    assert next(running) == "a1"
    with pytest.raises(ValueError, match="broken"):
        next(running)


def test_only_small_groups_of_a_gpu_train_side_by_side() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert lanes_for(1, gpu) == lanes_for(64, gpu) == 4
    assert lanes_for(65, gpu) == 1 and lanes_for(1, cpu) == 1


def test_a_cpu_has_no_streams() -> None:
    assert side_stream(torch.device("cpu"), 3) is None
    values = torch.arange(6.0).view(2, 3)
    with on(None), handed_over(None):
        np.testing.assert_array_equal(Readback(values[:, :2]).wait(), values[:, :2].numpy())


def shard() -> list[TrialSpec]:
    """Trials of three models: three or four may share a stack."""
    stop = StoppingRule(max_steps=25)
    made = []
    for i in range(10):
        options = {"depth": 1 + i % 3, "width": 16, "activation": "relu"}
        model = ModelSpec("mlp", "mlp", "vector", (64,), 10, options=options)
        made.append(TrialSpec("mlp", "digits", 16, (5e-4, 2e-3)[i % 2], seed=i, model=model, stopping=stop))
    return made


def rows_of(**options: object) -> dict[str, list[dict]]:
    times = ("probe_seconds", "truth_seconds", "step_seconds")
    found = {}
    for rows in run_trials(shard(), **options):  # type: ignore[arg-type]
        assert all(row["truth_seconds"] > 0.0 for row in rows)
        found[rows[0]["trial_id"]] = [{k: v for k, v in row.items() if k not in times} for row in rows]
    return found


def test_groups_side_by_side_give_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device: every stack waits after every look, and the next lane has its turn."""
    alone = rows_of()
    monkeypatch.setattr(trial_module, "lanes_for", lambda count, device: 2)
    monkeypatch.setattr(Training, "waits", True)
    looks: list[int] = []
    begin, end = Training.begin, Training.end
    pending: set[int] = set()
    most = 0

    def begun(self: Training) -> Look:
        nonlocal most
        pending.add(id(self))
        most = max(most, len(pending))
        looks.append(id(self))
        return begin(self)

    def ended(self: Training, look: Look) -> list[object]:
        pending.discard(id(self))
        return end(self, look)  # type: ignore[return-value]

    monkeypatch.setattr(Training, "begin", begun)
    monkeypatch.setattr(Training, "end", ended)
    side_by_side = rows_of()
    assert most == 2  # never more than there are lanes, and not one after the other
    assert sum(a != b for a, b in zip(looks, looks[1:])) > 10
    assert side_by_side == alone and len(alone) == 10


def test_an_error_in_one_lane_is_that_trials_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_module, "lanes_for", lambda count, device: 3)
    monkeypatch.setattr(Training, "waits", True)
    before = rows_of()
    failing = shard()[4]
    measure = batched_module.measure
    load = LayerStack.load

    def broken(self: LayerStack, subject: Subject) -> int:
        if subject.seed == failing.seed_for("train"):
            raise RuntimeError("no such trial")
        return load(self, subject)

    def also_broken(*args: object, **options: object) -> object:
        if options["seed"] == failing.seed_for("train"):
            raise RuntimeError("no such trial")
        return measure(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerStack, "load", broken)
    monkeypatch.setattr(batched_module, "measure", also_broken)
    after = {rows[0]["trial_id"]: rows for rows in run_trials(shard())}
    assert len(after) == 10 and "no such trial" in after[failing.trial_id][0]["error"]
    for trial_id, rows in before.items():
        if trial_id != failing.trial_id:
            assert [row["t_star"] for row in after[trial_id]] == [row["t_star"] for row in rows]
            assert after[trial_id][0]["losses"] == rows[0]["losses"]


@pytest.mark.gpu
def test_groups_on_streams_of_their_own_give_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: set[int] = set()
    begin = Training.begin

    def begun(self: Training) -> Look:
        assert self._stream is not None
        streams.add(self._stream.cuda_stream)
        return begin(self)

    monkeypatch.setattr(Training, "begin", begun)
    side_by_side = rows_of(device="cuda")
    assert len(streams) == 3
    monkeypatch.setattr(trial_module, "lanes_for", lambda count, device: 1)
    for trial_id, rows in rows_of(device="cuda").items():
        assert side_by_side[trial_id][0]["losses"] == rows[0]["losses"]
        assert [row["t_star"] for row in side_by_side[trial_id]] == [row["t_star"] for row in rows]


@pytest.mark.gpu
def test_memory_that_is_handed_over_is_not_used_again_too_soon() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    stream = side_stream(device, 1)
    assert stream is side_stream(device, 1) and stream is not side_stream(device, 2)
    kept = torch.zeros(2**20, device=device)
    for i in range(50):
        given = torch.full((2**20,), float(i), device=device)
        with handed_over(stream):
            torch.cuda._sleep(100_000)
            kept.copy_(given)
        del given
        torch.full((2**20,), -1.0, device=device)  # the caller's memory, written at once
        with on(stream):
            looked = Readback(kept)
            kept.fill_(-2.0)  # what is on its way is not written over
        assert (looked.wait() == i).all()
