"""Dropout masks of a stack of trials, keyed by trial: the same in every slot, whatever else is in the stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from cape.randoms import OnesDraws, ones_agree

# Constants of the splitmix64 finalizer (Steele, Lea and Flood, 2014), as signed 64-bit numbers.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64

_WORTH_THREADS = 2**16  # numbers: half a millisecond for one thread


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="cape-masks")


class Draws(ABC):
    """The random draws of the trials in a stack's slots."""

    @abstractmethod
    def seed(self, slot: int, seed: int) -> None:
        """Begin a trial in a slot."""

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Let the trial of one slot go on in another."""

    @abstractmethod
    def keep(self, out: Tensor, probability: float) -> Tensor:
        """Fill ``out`` [k, ...] with independent zeros and ones for the trials in slots 0..k-1; return it.

        Args:
            out: floating point; row i belongs to the trial in slot i.
            probability: of a one.
        """


class GeneratorDraws(Draws):
    """One CPU generator for each trial, asked in the order in which the plain engine asks the global one.

    A dropout mask is therefore, bit for bit, the mask that ``measure`` would have drawn with the trial's seed.
    """

    def __init__(self, slots: int) -> None:
        self._generators = [torch.Generator() for _ in range(slots)]

    def seed(self, slot: int, seed: int) -> None:
        self._generators[slot].manual_seed(seed)

    def move(self, source: int, target: int) -> None:
        held = self._generators
        held[source], held[target] = held[target], held[source]

    def keep(self, out: Tensor, probability: float) -> Tensor:
        def draw(row: Tensor, generator: torch.Generator) -> None:
            row.bernoulli_(probability, generator=generator)

        threads = min(torch.get_num_threads(), len(out))
        if threads > 1 and out.numel() >= _WORTH_THREADS:
            # A generator is serial (7 ns a number), but each trial has its own: up to a fifth of a step otherwise.
            list(_pool(threads).map(draw, out.unbind(), self._generators[: len(out)]))
        else:
            for row, generator in zip(out, self._generators, strict=False):
                draw(row, generator)
        return out


class NativeDraws(Draws):
    """The masks of ``GeneratorDraws``, bit for bit, at an eighth of their time (``randoms.ones_agree`` says where)."""

    def __init__(self, slots: int) -> None:
        self._draws = OnesDraws(slots)

    def seed(self, slot: int, seed: int) -> None:
        self._draws.seed(slot, seed)

    def move(self, source: int, target: int) -> None:
        self._draws.copy(source, target)

    def keep(self, out: Tensor, probability: float) -> Tensor:
        return self._draws.fill(out, probability)


class CounterDraws(Draws):
    """Counter-based draws: the hash of (trial's seed, number of the draw, element) decides, in one pass on the device.

    A few integer operations for all trials at once, where a generator for each trial would need a launch for each.
    The counter lives on the device, so that a captured CUDA graph draws anew each time it is replayed.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._keys = torch.zeros(slots, dtype=torch.int64, device=device)
        self._counts = torch.zeros(slots, dtype=torch.int64, device=device)

    def seed(self, slot: int, seed: int) -> None:
        self._keys[slot] = seed - 2**64 if seed >= 2**63 else seed
        self._counts[slot] = 0

    def move(self, source: int, target: int) -> None:
        self._keys[target] = self._keys[source]
        self._counts[target] = self._counts[source]

    def keep(self, out: Tensor, probability: float) -> Tensor:
        width, size = len(out), out[0].numel()
        counts = self._counts[:width]
        counts += 1
        keys = _mix(self._keys[:width] ^ _mix(counts * _GAMMA))
        elements = torch.arange(1, size + 1, dtype=torch.int64, device=out.device) * _GAMMA
        bits = _mix(keys[:, None] + elements) & 0xFFFFFF  # 24 bits: what a float32 uniform has
        out.copy_((bits < round(probability * 2**24)).view(out.shape))
        return out


def _mix(z: Tensor) -> Tensor:
    """Return the splitmix64 finalizer of int64 numbers (shifts are made logical by a mask)."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _MIX1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _MIX2
    return z ^ ((z >> 31) & (2**33 - 1))


def draws_for(device: torch.device, slots: int) -> Draws:
    """Return the draws of a stack of ``slots`` trials on a device."""
    if device.type != "cpu":
        return CounterDraws(slots, device)
    return NativeDraws(slots) if ones_agree() else GeneratorDraws(slots)
