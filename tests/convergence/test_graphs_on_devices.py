"""Graphs where they belong: what a device's step is made of, and the same trajectories with real CUDA graphs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cape import families
from cape.config import ModelSpec, StoppingRule
from cape.convergence import Subject, Trajectory, measure
from cape.convergence.convert import layers_of
from cape.convergence.graphed import CudaGraph, use_graphs
from cape.convergence.stack import LayerStack, Stack
from cape.convergence.vmapped import VmapStack
from cape.logs import log_once
from cape.state import tensors_of
from cape.tasks import Loss
from tests.convergence.test_batched import CHAINS, RECURRENT, VMAPPED, subjects, together
from tests.convergence.test_graphed import SPECS, Reading, model, same, uneven


class _OnDevice(TorchDispatchMode):
    """Refuses every operator that takes or makes a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = None if "_fused_adamw_" in str(func) else func(*args, **kwargs)  # it has no form without memory
        for tensor in tensors_of((args, kwargs, result)):
            assert tensor.device.type == "meta", f"{func} takes or makes a CPU tensor"
        self.operations += 1
        return result


TOKENS = ModelSpec("rnn", "gru", "tokens", (6,), 7, task="sequence", options={"layers": 1, "hidden": 5, "embedding": 4})


@pytest.mark.parametrize("name", [*CHAINS, *RECURRENT, *VMAPPED, "tokens"])
def test_a_step_on_a_device_leaves_the_host_alone(name: str) -> None:
    """Every operator of a device's step, without its memory: copies from or to the host and looks break a capture."""
    if name == "tokens":
        tokens = torch.randint(0, 7, (8, 6), device="meta")
        trials = [Subject(families.build(TOKENS).to("meta"), (tokens, tokens), lr, seed=1) for lr in (5e-4, 1e-3)]
    else:
        trials = [
            Subject(t.model.to("meta"), (t.batch[0].to("meta"), t.batch[1].to("meta")), t.lr, seed=t.seed)
            for t in subjects({**CHAINS, **RECURRENT, **VMAPPED}[name], 2, batch=8)
        ]
    criterion = Loss("sequence_cross_entropy" if name == "tokens" else "cross_entropy")
    with torch.no_grad():
        stack: Stack
        if name in VMAPPED:
            stack = VmapStack(trials[0], criterion, 2)
        else:
            stack = LayerStack(layers_of(trials[0].model, 2), trials[0], criterion, 2)
        for trial in trials:
            stack.load(trial)
        for for_capture in (False, True):
            with _OnDevice() as watched:
                assert stack.step(for_capture).shape == (2,)
            assert watched.operations > 50


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_torch_has_what_a_graph_asks_of_it() -> None:
    """Some of it is private to torch and used only where a capture fails: it must not be missing then."""
    graph = inspect.signature(torch.cuda.graph.__init__)
    graph.bind(None, None, pool=(0, 1), stream=None, capture_error_mode="thread_local")
    assert all(callable(getattr(torch._C, f"_cuda_{name}Pool")) for name in ("endAllocateTo", "release"))
    generator = torch.Generator
    assert callable(generator.clone_state) and callable(generator.graphsafe_set_state)
    for form in ("default", "tensor_lr"):
        assert form in torch.ops.aten._fused_adamw_.overloads()


def on_gpu(trials: list[Subject]) -> list[Subject]:
    return [
        Subject(t.model.cuda(), (t.batch[0].cuda(), t.batch[1].cuda()), t.lr, t.epsilons, t.stopping, t.seed)
        for t in trials
    ]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CudaGraph]]:
    """The real graphs, once for each replay."""
    seen: list[CudaGraph] = []
    replay = CudaGraph.replay

    def counted(self: CudaGraph) -> None:
        seen.append(self)
        replay(self)

    monkeypatch.setattr(CudaGraph, "replay", counted)
    log_once.cache_clear()
    yield seen


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", list(SPECS))
def test_cuda_graphs_make_the_same_trajectories(name: str, precision: str, replays: list[CudaGraph]) -> None:
    if precision == "bf16" and name in RECURRENT:
        pytest.skip("a recurrent model has no stack in bf16")
    trials = on_gpu(uneven(name, stretch=4))
    replayed = together(trials, width=3, precision=precision)
    assert len(replays) > 40 and len(set(replays)) >= 2
    with use_graphs(False):
        plain = together(trials, width=3, precision=precision)
    same(replayed, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_measure_is_the_same_with_a_cuda_graph(precision: str, replays: list[CudaGraph]) -> None:
    (trial,) = on_gpu(subjects(CHAINS["mlp"], 1, batch=32))
    trained, state = model().cuda(), torch.cuda.get_rng_state()
    before = {name: value.clone() for name, value in trained.state_dict().items()}

    def run() -> Trajectory:
        stopping = StoppingRule(max_steps=150)
        return measure(trained, trial.batch, epsilons=(1e-6,), stopping=stopping, seed=5, precision=precision)

    replayed = run()
    assert len(replays) > 80 and np.isfinite(replayed.step_seconds)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    with use_graphs(False):
        np.testing.assert_array_equal(replayed.losses, run().losses)  # dropout included: the same masks


@pytest.mark.gpu
def test_a_capture_that_cuda_refuses_is_said_once_and_the_steps_go_on(
    replays: list[CudaGraph], caplog: pytest.LogCaptureFixture
) -> None:
    (trial,) = on_gpu(subjects(CHAINS["mlp"], 1, batch=32))
    torch.manual_seed(0)
    odd = nn.Sequential(nn.Dropout(0.3), Reading(64, 10)).cuda()

    def run() -> Trajectory:
        return measure(odd, trial.batch, epsilons=(1e-6,), stopping=StoppingRule(max_steps=120), seed=5)

    with caplog.at_level(logging.WARNING, logger="cape"):
        found = run()
        run()
    assert not replays and len(caplog.records) == 1 and "without a CUDA graph" in caplog.text
    with use_graphs(False):
        np.testing.assert_array_equal(found.losses, run().losses)
    # The allocator is as it was: what is freed can be given back, and another graph is captured.
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    block = torch.empty(2**28, device="cuda")
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == held
    together(on_gpu(uneven("mlp", stretch=4)), width=3)
    assert replays


@pytest.mark.gpu
def test_the_memory_of_graphs_is_given_back(replays: list[CudaGraph]) -> None:
    trials = on_gpu(uneven("resnet", batch=32, stretch=4))
    together(trials, width=3)
    replays.clear()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    together(trials, width=3)
    assert len(set(replays)) >= 2
    replays.clear()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= held
