"""What a probe allocates is free again when it returns: the nodes of a graph and the interceptor know each other."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from torch import Tensor, nn

import cape
from tests.cases import CASES, Case


def outputs_alive(case: Case) -> list[str]:
    """Return the modules of which some output lives on after a probe and a collection."""
    model, batch = case.make()
    outputs: list[tuple[str, weakref.ref[Tensor]]] = []
    for name, module in model.named_modules():

        def note(_: nn.Module, __: Any, out: Any, name: str = name) -> None:
            if isinstance(out, Tensor):
                outputs.append((name, weakref.ref(out)))

        module.register_forward_hook(note)
    cape.per_sample_norms(model, batch, loss=case.loss)
    assert outputs
    gc.collect()
    return sorted({name for name, ref in outputs if ref() is not None})


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_output_outlives_the_probe(case: Case) -> None:
    assert outputs_alive(case) == []
