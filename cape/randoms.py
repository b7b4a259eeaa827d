"""torch's own random numbers on a CPU, faster: the same bits from the native extension, where it makes the same bits.

torch draws one number after the other (6 to 8 ns each). The extension makes a block of the Mersenne Twister's numbers
in vector registers and turns them into the same zeros and ones, and the same normal numbers. What torch does depends on
the processor and its version (on some, a vendor's library draws the masks), so that each function is compared with
torch's once in a process, and torch draws where a bit differs or the extension is not built.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cape.native import native_module

# What holds one Mersenne Twister: 624 numbers and how many of them are used up (csrc/include/cape/twister.h).
_STATE = 625
_FEWEST = 16  # normal numbers that torch makes by another formula, one by one


def normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill a tensor as ``tensor.normal_(0, std)`` does, from the global generator, and return it."""
    fits = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
    if fits and tensor.numel() >= _FEWEST and _normals_agree():
        torch.ops.cape.normal_(tensor.detach(), 0.0, std)
        return tensor
    with torch.no_grad():
        return tensor.normal_(0.0, std)


@lru_cache(maxsize=1)
def _normals_agree() -> bool:
    if native_module() is None:
        return False
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    made, expected = (torch.empty(4099, device="cpu") for _ in range(2))  # whatever device is the default
    for _ in range(2):  # what the first call leaves of the generator shows in the second
        try:
            torch.ops.cape.normal_(made, 0.0, 0.1, ours)
        except RuntimeError:  # a processor without its instructions
            return False
        if not torch.equal(made, expected.normal_(0.0, 0.1, generator=theirs)):
            return False
    return True


@lru_cache(maxsize=1)
def ones_agree() -> bool:
    """Return whether ``OnesDraws`` draws here what ``torch.Tensor.bernoulli_`` does."""
    if native_module() is None:
        return False
    draws, generator = OnesDraws(1), torch.Generator().manual_seed(1)
    draws.seed(0, 1)
    made, expected = torch.empty(1, 1001, device="cpu"), torch.empty(1001, device="cpu")
    return all(
        torch.equal(draws.fill(made, p)[0], expected.bernoulli_(p, generator=generator)) for p in (0.9, 0.8, 0.3)
    )


class OnesDraws:
    """Independent generators of zeros and ones, each as ``torch.Generator`` with ``bernoulli_``; see ``ones_agree``."""

    def __init__(self, generators: int) -> None:
        self._states = torch.zeros(generators, _STATE, dtype=torch.int32, device="cpu")

    def seed(self, index: int, seed: int) -> None:
        """Begin one of them, as ``torch.Generator().manual_seed(seed)``."""
        torch.ops.cape.seed_draws_(self._states, index, seed - 2**64 if seed >= 2**63 else seed)

    def copy(self, source: int, target: int) -> None:
        """Let one of them go on as another."""
        self._states[target].copy_(self._states[source])

    def fill(self, out: Tensor, probability: float) -> Tensor:
        """Fill row i of ``out`` [k, ...] (contiguous) by generator i, ones with a probability; return it."""
        torch.ops.cape.draw_ones_(out, self._states, probability)
        return out
