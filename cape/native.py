"""The native extension: whether it is there, and the shapes of what its operators return."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=1)
def native_module() -> Any | None:
    """Return the compiled extension, or ``None`` (with one warning) where it is not built."""
    try:
        module = importlib.import_module("cape._C")
    except ImportError as error:
        warnings.warn(
            f"CAPE's native extension is not available ({error}); the slower pure-torch operators run instead."
            " Build it with 'pip install --no-build-isolation .'.",
            stacklevel=2,
        )
        return None
    _register_fakes()
    return module


def _register_fakes() -> None:
    """Tell torch the shapes of the operators' results, for tracing without data."""

    def one_per_sample(x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], dtype=torch.float64)

    def one_per_cotangent_and_sample(first: Tensor, second: Tensor, *rest: Any) -> Tensor:
        g = max(first, second, key=lambda t: t.dim())
        return g.new_empty(g.shape[:2], dtype=torch.float64)

    def pair_of_each(xs: Sequence[Tensor]) -> Tensor:
        return xs[0].new_empty(len(xs), 2, dtype=torch.float64)

    torch.library.register_fake("cape::sq_norms", one_per_sample)
    torch.library.register_fake("cape::size_sums", pair_of_each)

    def lstm(pre: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, ...]:
        h = pre.new_empty(*pre.shape[:2], w_hh.shape[1])
        return h, pre.new_empty(pre.shape), torch.empty_like(h)

    def gru(pre: Tensor, w_hh: Tensor, b_hh: Tensor, h0: Tensor) -> tuple[Tensor, ...]:
        h = pre.new_empty(*pre.shape[:2], w_hh.shape[1])
        return h, pre.new_empty(pre.shape), torch.empty_like(h)

    def lstm_backward(grad_h: Tensor, grad_c: Tensor, gates: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        d_pre = gates.new_empty(*grad_h.shape[:3], gates.shape[2])
        return d_pre, gates.new_empty(grad_h.shape[1:]), gates.new_empty(grad_h.shape[1:])

    def gru_backward(grad_h: Tensor, gates: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        d_pre = gates.new_empty(*grad_h.shape[:3], gates.shape[2])
        return d_pre, torch.empty_like(d_pre), gates.new_empty(grad_h.shape[1:])

    def pairs(g: Tensor, x: Tensor) -> Tensor:
        return g.new_empty(2, *g.shape[:2], g.shape[3], dtype=torch.float64)

    def affine_pull(g: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return g.new_empty(g.shape), g.new_empty(g.shape[:2], dtype=torch.float64)

    torch.library.register_fake("cape::_pair_sums", pairs)
    torch.library.register_fake("cape::affine_pull", affine_pull)
    torch.library.register_fake("cape::lstm_sequence", lstm)
    torch.library.register_fake("cape::lstm_sequence_backward", lstm_backward)
    torch.library.register_fake("cape::gru_sequence", gru)
    torch.library.register_fake("cape::gru_sequence_backward", gru_backward)

    def batch_norm(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return torch.empty_like(x), x.new_empty(x.shape[0], x.shape[2]), x.new_empty(x.shape[0], x.shape[2])

    def batch_norm_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return batch_norm(x)

    def in_place(*rest: Any) -> None:
        pass

    torch.library.register_fake("cape::stacked_batch_norm", batch_norm)
    torch.library.register_fake("cape::stacked_batch_norm_backward", batch_norm_backward)
    for name in ("seed_draws_", "draw_ones_", "normal_"):
        torch.library.register_fake(f"cape::{name}", in_place)
    for name in ("linear_sq_norms", "conv_sq_norms", "affine_sq_norms"):
        torch.library.register_fake(f"cape::{name}", one_per_cotangent_and_sample)
