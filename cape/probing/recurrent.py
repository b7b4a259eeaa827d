"""LSTM, GRU and plain recurrent layers, run so that the gate gradients can be read.

A layer takes the whole sequence's input projections in one product and keeps only what its backward pass needs (see
``recurrent_ops``). The backward pass gives the gradient at the gate pre-activations for all cotangents: with the inputs
and the previous hidden states, that is all a per-sample norm of the four parameters needs. No weight gradient is ever
formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cape.probing import recurrent_ops
from cape.probing.cotangents import physical
from cape.probing.handlers import watched_linear
from cape.probing.intercept import Interceptor, handles
from cape.probing.layout import Layout
from cape.probing.operators import mark_data
from cape.probing.raw import meet_raw
from cape.probing.uses import LinearUse, Part

Sink = Callable[[Tensor], object]
_CELLS: dict[Any, recurrent_ops.Cell] = {
    torch.lstm: recurrent_ops.LSTM(),
    torch.gru: recurrent_ops.GRU(),
    torch.rnn_tanh: recurrent_ops.Elman("tanh"),
    torch.rnn_relu: recurrent_ops.Elman("relu"),
}
_LAYERS: dict[Any, recurrent_ops.Cell] = {
    func: recurrent_ops.TorchLayer(func, cell.own_hidden_side) for func, cell in _CELLS.items()
}


def cell_of(func: Any, x: Tensor) -> recurrent_ops.Cell:
    """Return how a layer's cells step through ``x``: cuDNN's way where it takes such a tensor."""
    return (_LAYERS if torch.backends.cudnn.is_acceptable(x) else _CELLS)[func]


class _Sequence(torch.autograd.Function):
    """One direction of one layer: x [T, B, d] and states [B, H] to h [T, B, H] (and the last cell state of an LSTM).

    ``sinks`` receive the gradients at the gates, [K, T, B, gates·H]: of the input side, and of the hidden side where
    the cell has one of its own. ``anchor`` makes autograd visit a layer whose inputs need no gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, cell: recurrent_ops.Cell, sinks: list[Sink], x: Tensor, *rest: Any) -> Any:
        w_ih, w_hh, b_ih, b_hh, *states = rest
        outputs, saved = cell.forward(F.linear(x, w_ih, b_ih), w_hh, b_hh, states)
        ctx.save_for_backward(w_ih, w_hh, *states, *(() if cell.saves_graph else saved))
        ctx.cell, ctx.sinks, ctx.states, ctx.graph = cell, sinks, len(states), saved if cell.saves_graph else ()
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        w_ih, w_hh, *rest = ctx.saved_tensors  # inside the mode: a checkpoint recomputes its forward pass here
        # Outside the function mode and the gradient tape: these many small operators hold no parameter use.
        with torch._C.DisableTorchFunction(), torch.no_grad():
            (grad_h, *grad_last), rewrap = physical(*grads)
            states, saved = rest[: ctx.states], (*rest[ctx.states :], *ctx.graph)
            sides, d_states = ctx.cell.backward(grad_h.transpose(0, 1), grad_last, w_hh, states, saved)
            for sink, side in zip(ctx.sinks, sides, strict=False):
                sink(side.transpose(0, 1))
            needs_x, needs_states = ctx.needs_input_grad[3], ctx.needs_input_grad[8:]
            d_x = rewrap((sides[0] @ w_ih).transpose(0, 1)) if needs_x else None
            back = [rewrap(d) if need else None for d, need in zip(d_states, needs_states, strict=True)]
        return (None, None, None, d_x, None, None, None, None, *back)


@handles(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def layers(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A whole (multi-layer, bidirectional) recurrent network: one use per layer and direction."""
    if kwargs or len(args) != 9 or isinstance(args[1], bool):
        return NotImplemented
    x, hx, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first = args
    if not isinstance(x, Tensor) or x.dim() != 3 or not isinstance(weights, (list, tuple)):
        return NotImplemented  # packed sequences have no rectangular batch
    directions = 2 if bidirectional else 1
    each = 4 if has_biases else 2
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    if len(weights) != each * num_layers * directions or (training and dropout > 0):
        return NotImplemented  # projections, dropout between layers
    if not all(mode.of_parameters(w) for w in weights):
        return NotImplemented
    time_first = mark_data(x.detach().transpose(0, 1)) if batch_first else x
    states = [meet_raw(mode, "state", s, time_first, s.shape) if mode.of_parameters(s) else s for s in states]
    hx = tuple(states) if isinstance(hx, (list, tuple)) else states[0]
    verdict, layout = mode.verdict(func.__name__, x, list(weights))
    batch_dim = 0 if batch_first else 1
    if verdict == "live" or (layout is not None and layout.dim != batch_dim):
        mode.met = mode.met or layout is not None  # the samples are the steps
        mode.undo(func.__name__, x, list(weights))
        return func(x, hx, *args[2:])
    watch = layout.on(1) if verdict == "record" and layout is not None else None
    seq = x.transpose(0, 1) if batch_first else x
    lasts: list[list[Tensor]] = [[] for _ in states]
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            k = layer * directions + direction
            ws = list(weights[k * each : (k + 1) * each])
            steps = seq.flip(0) if direction else seq
            h, last = _run(mode, func, steps, [s[k] for s in states], ws, watch)
            outputs.append(h.flip(0) if direction else h)
            for kept, value in zip(lasts, last, strict=True):
                kept.append(value)
        seq = torch.cat(outputs, 2) if bidirectional else outputs[0]
    if not bidirectional and len(states) == 1:
        seq = seq.clone()  # the backward pass reads these very states, and the model may write into what it is given
    out = seq.transpose(0, 1) if batch_first else seq
    return (out, *(torch.stack(kept) for kept in lasts))


def _run(
    mode: Interceptor, func: Any, x: Tensor, states: list[Tensor], weights: list[Tensor], layout: Layout | None
) -> tuple[Tensor, list[Tensor]]:
    """Run one direction of one layer over [T, B, d]; return h [T, B, H] and the last states."""
    w_ih, w_hh, *biases = (w.detach() for w in weights)
    cell = cell_of(func, x)
    b_ih, b_hh = biases or (None, None)
    if b_ih is not None and b_hh is not None and not cell.own_hidden_side:
        b_ih, b_hh = b_ih + b_hh, None
    sinks: list[Sink] = []
    out = _Sequence.apply(mode.anchor, cell, sinks, x, w_ih, w_hh, b_ih, b_hh, *states)
    h, *lasts = out if isinstance(out, tuple) else (out,)
    if layout is not None:
        before = torch.cat([states[0].detach().unsqueeze(0), h.detach()[:-1]])
        input_side = [(w, Part(x.detach() if i == 0 else None)) for i, w in enumerate(weights[::2])]
        hidden_side = [(w, Part(before if i == 0 else None)) for i, w in enumerate(weights[1::2])]
        groups = [input_side, hidden_side] if cell.own_hidden_side else [input_side + hidden_side]
        for group in groups:
            use = LinearUse([w for w, _ in group], [part for _, part in group], layout)
            sinks.append(mode.register(use).take)
    return h, [h[-1], *lasts]


@handles(torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)
def cell(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One step of a recurrent cell, as two watched linear maps that share the input's batch layout."""
    x, hx, w_ih, w_hh, *biases = args
    b_ih, b_hh = biases or (None, None)
    h = hx[0] if isinstance(hx, (list, tuple)) else hx
    if kwargs or x.dim() != 2 or not mode.is_data(x):
        return NotImplemented
    if not (mode.of_parameters(w_ih) and mode.of_parameters(w_hh)):
        return NotImplemented
    if mode.of_parameters(h):
        h = meet_raw(mode, "state", h, x, h.shape)
    left = watched_linear(mode, "cell_input", x, x, w_ih, b_ih)
    right = watched_linear(mode, "cell_hidden", x, h, w_hh, b_hh)
    if func is torch.lstm_cell:
        i, f, n, o = (left + right).chunk(4, 1)
        c_prev = meet_raw(mode, "state", hx[1], x, hx[1].shape) if mode.of_parameters(hx[1]) else hx[1]
        c = f.sigmoid() * c_prev + i.sigmoid() * n.tanh()
        return o.sigmoid() * c.tanh(), c
    if func is torch.gru_cell:
        (r, z, n), (hr, hz, hn) = left.chunk(3, 1), right.chunk(3, 1)
        new = (n + (r + hr).sigmoid() * hn).tanh()
        return torch.lerp(new, h, (z + hz).sigmoid())
    return (left + right).tanh() if func is torch.rnn_tanh_cell else (left + right).relu()
