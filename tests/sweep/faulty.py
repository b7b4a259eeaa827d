"""Families whose trials end their process, hang, poison their device, or are just slow: by their seed, in any process.

``cape sweep --import faulty`` registers them in the driver and in every worker.
"""

from __future__ import annotations

import os
import signal
import time
from typing import ClassVar

import torch
from torch import nn

from cape import families
from cape.config import ModelSpec
from cape.families.mlp import MLP, MLPOptions


def is_bad(init_seed: int, family: str) -> bool:
    return init_seed % families.get(family).one_in == 0  # type: ignore[attr-defined]


class _Small(MLP):
    """A tiny MLP, for trials of a few milliseconds."""

    architectures: ClassVar[tuple[str, ...]] = ("mlp",)
    one_in: ClassVar[int] = 4  # every fourth seed or so is bad

    def sample(self, rng, dataset, *, reference=False) -> ModelSpec:  # type: ignore[no-untyped-def]
        return self.spec("mlp", dataset, MLPOptions(1, int(rng.integers(8, 32)), "gelu"))

    def fault(self) -> None: ...

    def build(self, spec: ModelSpec) -> nn.Module:
        if is_bad(torch.initial_seed(), self.name):
            self.fault()
        return super().build(spec)


class Crashing(_Small):
    name: ClassVar[str] = "crashing"

    def fault(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class CrashingAmongMany(Crashing):
    """All alike, so that many are trained side by side."""

    name: ClassVar[str] = "crashing_among_many"
    one_in: ClassVar[int] = 64

    def sample(self, rng, dataset, *, reference=False) -> ModelSpec:  # type: ignore[no-untyped-def]
        return self.spec("mlp", dataset, MLPOptions(1, 16, "gelu"))


class Hanging(_Small):
    name: ClassVar[str] = "hanging"

    def fault(self) -> None:
        time.sleep(3600)


class Poisoned(_Small):
    name: ClassVar[str] = "poisoned"

    def fault(self) -> None:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")


class Slow(_Small):
    name: ClassVar[str] = "slow"

    def build(self, spec: ModelSpec) -> nn.Module:
        time.sleep(0.1)
        return super().build(spec)


for _family in (Crashing(), CrashingAmongMany(), Hanging(), Poisoned(), Slow()):
    families.register(_family)
