"""What callers set for a whole process or thread, kept away from numbers that must not depend on it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# The global generators, torch's flags and what a model holds are the process's: blocks of several threads take turns.
turns = threading.RLock()

_AUTOCASTING = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run a block, or a function that this decorates, beside no other thread's, without the caller's autocast.

    On a CPU float32 products stay so, whatever ``torch.set_float32_matmul_precision`` allows.
    """
    mkldnn: Any = torch.backends.mkldnn
    with turns, ExitStack() as off:
        for kind in _AUTOCASTING:
            if torch.is_autocast_enabled(kind):
                off.enter_context(torch.autocast(kind, enabled=False))
        rounding = [h for h in (mkldnn.matmul, mkldnn.conv, mkldnn.rnn) if h.fp32_precision not in ("none", "ieee")]
        off.enter_context(_products_in("ieee", rounding))
        yield


@contextmanager
def fixed_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Run a block ``undisturbed``, whose steps compute in what ``precision`` says.

    On CUDA, fix what it may do to float32 products and ask cuDNN for deterministic kernels.
    """
    with undisturbed():
        if device.type != "cuda":
            yield
            return
        cudnn: Any = torch.backends.cudnn
        flags = (cudnn.deterministic, cudnn.benchmark)
        wanted = "tf32" if precision == "tf32" else "ieee"
        with _products_in(wanted, (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)):
            try:
                cudnn.deterministic, cudnn.benchmark = True, False
                yield
            finally:
                cudnn.deterministic, cudnn.benchmark = flags


@contextmanager
def _products_in(precision: str, holders: Sequence[Any]) -> Iterator[None]:
    """Let some of torch's backends compute float32 products in a precision."""
    before = [h.fp32_precision for h in holders]
    try:
        for h in holders:
            h.fp32_precision = precision
        yield
    finally:
        for h, value in zip(holders, before, strict=True):
            h.fp32_precision = value
