"""LSTM, GRU and plain recurrent layers, run step by step so that the gate gradients can be read.

Each cell takes the whole sequence's input projections in one product and keeps only what its backward needs. The
backward passes return the gradient at the gate pre-activations, [T, B, gates·H]: with the inputs and the previous
hidden states, that is all a per-sample norm of the four parameters needs. No weight gradient is ever formed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cape.probing.handlers import watched_linear
from cape.probing.intercept import Interceptor, handles
from cape.probing.layout import Layout
from cape.probing.raw import meet_raw
from cape.probing.uses import LinearUse, Part

Backward = TypeVar("Backward", bound=Callable[..., Any])
HiddenSink = Callable[[Tensor], None]


def _unwatched(backward: Backward) -> Backward:
    """Run a backward pass outside the function mode: its thousands of small operators hold no parameter use.

    What was saved is unpacked before, inside the mode: a checkpoint recomputes its forward pass there.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            return backward(ctx, saved, *grads)

    return cast(Backward, run)


class LSTMSequence(torch.autograd.Function):
    """h_t, c_t of an LSTM given its input projections.

    Inputs: ``pre`` [T, B, 4H] (gates i, f, g, o; both biases included), ``w_hh`` [4H, H], ``h0``, ``c0`` [B, H].
    Outputs: ``h`` [T, B, H], last cell state [B, H].
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor]:
        steps, batch, width = pre.shape
        hidden = width // 4
        gates = torch.empty_like(pre)
        h = pre.new_empty(steps, batch, hidden)
        c = pre.new_empty(steps, batch, hidden)
        h_prev, c_prev, w = h0, c0, w_hh.t()
        for t in range(steps):
            g = torch.addmm(pre[t], h_prev, w, out=gates[t])
            g[:, : 2 * hidden].sigmoid_()
            g[:, 2 * hidden : 3 * hidden].tanh_()
            g[:, 3 * hidden :].sigmoid_()
            i, f, n, o = g.chunk(4, 1)
            torch.mul(f, c_prev, out=c[t]).addcmul_(i, n)
            torch.tanh(c[t], out=h[t]).mul_(o)
            h_prev, c_prev = h[t], c[t]
        ctx.save_for_backward(gates, c, w_hh, c0)
        return h, c[-1].clone()

    @staticmethod
    @once_differentiable
    @_unwatched
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        grad_h, grad_c_last = grads
        gates, c, w_hh, c0 = saved
        steps, batch, width = gates.shape
        d_pre = torch.empty_like(gates)
        dh = torch.zeros_like(c0)
        dc = grad_c_last.clone()
        for t in range(steps - 1, -1, -1):
            i, f, n, o = gates[t].chunk(4, 1)
            di, df, dn, do = d_pre[t].chunk(4, 1)
            dh = dh + grad_h[t]
            tanh_c = c[t].tanh()
            torch.mul(dh, tanh_c, out=do).mul_(o).mul_(1 - o)
            dc.addcmul_(dh * o, 1 - tanh_c * tanh_c)
            torch.mul(dc, n, out=di).mul_(i).mul_(1 - i)
            torch.mul(dc, c[t - 1] if t else c0, out=df).mul_(f).mul_(1 - f)
            torch.mul(dc, i, out=dn).mul_(1 - n * n)
            dc = dc * f
            dh = d_pre[t] @ w_hh
        return d_pre, None, dh, dc


class GRUSequence(torch.autograd.Function):
    """h_t of a GRU given its input projections.

    Inputs: ``pre`` [T, B, 3H] (gates r, z, n; input biases included), ``w_hh`` [3H, H], ``b_hh`` [3H] or None, ``h0``
    [B, H], ``sink``. Output: ``h`` [T, B, H]. The hidden side of the new gate has a gradient of its own (it is
    multiplied by r); ``sink`` receives the hidden-side gradient [T, B, 3H] in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, w_hh: Tensor, b_hh: Tensor | None, h0: Tensor, sink: HiddenSink) -> Tensor:
        steps, batch, width = pre.shape
        hidden = width // 3
        gates = torch.empty_like(pre)
        hidden_n = pre.new_empty(steps, batch, hidden)
        h = pre.new_empty(steps, batch, hidden)
        h_prev, w = h0, w_hh.t()
        for t in range(steps):
            side = torch.mm(h_prev, w) if b_hh is None else torch.addmm(b_hh, h_prev, w)
            rz = torch.add(pre[t, :, : 2 * hidden], side[:, : 2 * hidden], out=gates[t, :, : 2 * hidden]).sigmoid_()
            hidden_n[t] = side[:, 2 * hidden :]
            r, z = rz.chunk(2, 1)
            n = gates[t, :, 2 * hidden :]
            torch.addcmul(pre[t, :, 2 * hidden :], r, hidden_n[t], out=n).tanh_()
            torch.lerp(n, h_prev, z, out=h[t])
            h_prev = h[t]
        ctx.save_for_backward(gates, hidden_n, h, w_hh, h0)
        ctx.sink = sink
        return h

    @staticmethod
    @once_differentiable
    @_unwatched
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, None, None, Tensor, None]:
        (grad_h,) = grads
        gates, hidden_n, h, w_hh, h0 = saved
        steps = gates.shape[0]
        d_pre = torch.empty_like(gates)
        d_side = torch.empty_like(gates)
        dh = torch.zeros_like(h0)
        for t in range(steps - 1, -1, -1):
            r, z, n = gates[t].chunk(3, 1)
            dr, dz, dn = d_pre[t].chunk(3, 1)
            dh = dh + grad_h[t]
            h_prev = h[t - 1] if t else h0
            torch.mul(dh, 1 - z, out=dn).mul_(1 - n * n)
            torch.mul(dh, h_prev - n, out=dz).mul_(z).mul_(1 - z)
            torch.mul(dn, hidden_n[t], out=dr).mul_(r).mul_(1 - r)
            d_side[t].copy_(d_pre[t])
            d_side[t].chunk(3, 1)[2].mul_(r)
            dh = torch.addmm(dh * z, d_side[t], w_hh)
        ctx.sink(d_side)
        return d_pre, None, None, dh, None


class ElmanSequence(torch.autograd.Function):
    """h_t = act(pre_t + W_hh h_{t-1}) for ``tanh`` or ``relu``. ``pre`` [T, B, H], ``w_hh`` [H, H], ``h0`` [B, H]."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, w_hh: Tensor, h0: Tensor, activation: str) -> Tensor:
        h = torch.empty_like(pre)
        h_prev, w = h0, w_hh.t()
        for t in range(pre.shape[0]):
            torch.addmm(pre[t], h_prev, w, out=h[t])
            h_prev = h[t].tanh_() if activation == "tanh" else h[t].relu_()
        ctx.save_for_backward(h, w_hh, h0)
        ctx.activation = activation
        return h

    @staticmethod
    @once_differentiable
    @_unwatched
    def backward(ctx: Any, saved: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (grad_h,) = grads
        h, w_hh, h0 = saved
        d_pre = torch.empty_like(h)
        dh = torch.zeros_like(h0)
        for t in range(h.shape[0] - 1, -1, -1):
            dh = dh + grad_h[t]
            slope = 1 - h[t] * h[t] if ctx.activation == "tanh" else (h[t] > 0).to(h.dtype)
            torch.mul(dh, slope, out=d_pre[t])
            dh = d_pre[t] @ w_hh
        return d_pre, None, dh, None


# ---- handlers ------------------------------------------------------------------------------------------------------


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
    time_first = mode.mark_data(x.detach().transpose(0, 1)) if batch_first else x
    states = [meet_raw(mode, "state", s, time_first, s.shape) if mode.of_parameters(s) else s for s in states]
    hx = tuple(states) if isinstance(hx, (list, tuple)) else states[0]
    verdict, layout = mode.verdict(func.__name__, x, list(weights))
    batch_dim = 0 if batch_first else 1
    if verdict == "live" or (layout is not None and layout.dim != batch_dim):
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
    out = seq.transpose(0, 1) if batch_first else seq
    return (out, *(torch.stack(kept) for kept in lasts))


def _run(
    mode: Interceptor, func: Any, x: Tensor, states: list[Tensor], weights: list[Tensor], layout: Layout | None
) -> tuple[Tensor, list[Tensor]]:
    """Run one direction of one layer over [T, B, d]; return h [T, B, H] and the last states."""
    w_ih, w_hh, *biases = (w.detach() for w in weights)
    fused_bias = func in (torch.lstm, torch.rnn_tanh, torch.rnn_relu)
    bias = None if not biases else biases[0] + biases[1] if fused_bias else biases[0]
    pre = F.linear(x, w_ih, bias)
    sinks: list[HiddenSink] = []
    mode.tap(pre, (lambda g: sinks[0](g)) if layout is not None else None)
    h0 = states[0]
    if func is torch.lstm:
        h, c_last = LSTMSequence.apply(pre, w_hh, h0, states[1])
        lasts = [h[-1], c_last]
    elif func is torch.gru:
        h = GRUSequence.apply(pre, w_hh, biases[1] if biases else None, h0, lambda g: sinks[1](g) if sinks else None)
        lasts = [h[-1]]
    else:
        h = ElmanSequence.apply(pre, w_hh, h0, "tanh" if func is torch.rnn_tanh else "relu")
        lasts = [h[-1]]
    if layout is not None:
        before = torch.cat([h0.detach().unsqueeze(0), h.detach()[:-1]])
        input_side = [(w, Part(x.detach() if i == 0 else None)) for i, w in enumerate(weights[::2])]
        hidden_side = [(w, Part(before if i == 0 else None)) for i, w in enumerate(weights[1::2])]
        groups = [input_side + hidden_side] if fused_bias else [input_side, hidden_side]
        for group in groups:
            use = LinearUse([w for w, _ in group], [part for _, part in group], layout)
            sinks.append(mode.register(use).arrive)
    return h, lasts


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
