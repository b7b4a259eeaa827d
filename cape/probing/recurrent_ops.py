"""Recurrent cells over a whole sequence: forward, and backward to the gates for K cotangents at once.

``pre`` [T, B, gates·H] holds the input projections, biases included; gradients are [T, K, B, ...]. On a CPU a native
operator runs each cell's steps, on a GPU cuDNN's layer; elsewhere, and as the operator's twin, plain torch does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from cape.probing import ops


class Cell(Protocol):
    """How one kind of recurrent layer steps."""

    own_hidden_side: bool  # the hidden projections' gradient differs from that of the input projections
    saves_graph: bool  # what is saved holds a graph, which a checkpoint would cut off

    def forward(
        self, pre: Tensor, w_hh: Tensor, b_hh: Tensor | None, states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return h [T, B, H], with an LSTM's last cell state [B, H], and what ``backward`` needs."""

    def backward(
        self,
        grad_h: Tensor,
        grad_last: Sequence[Tensor],
        w_hh: Tensor,
        states: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients at the gates [T, K, B, gates·H] and those of the initial states [K, B, H]."""


class LSTM:
    """Gates i, f, g, o."""

    own_hidden_side = False
    saves_graph = False

    def forward(
        self, pre: Tensor, w_hh: Tensor, b_hh: Tensor | None, states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        h0, c0 = states
        h, gates, c = _op("lstm_sequence", pre, pre, w_hh, h0, c0)
        return (h, c[-1].clone()), (gates, c)

    def backward(
        self,
        grad_h: Tensor,
        grad_last: Sequence[Tensor],
        w_hh: Tensor,
        states: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        gates, c = saved
        d_pre, d_h0, d_c0 = _op("lstm_sequence_backward", gates, grad_h, grad_last[0], gates, c, w_hh, states[1])
        return [d_pre], [d_h0, d_c0]


class GRU:
    """Gates r, z, n. The hidden side of the new gate is multiplied by r, so it has a gradient of its own."""

    own_hidden_side = True
    saves_graph = False

    def forward(
        self, pre: Tensor, w_hh: Tensor, b_hh: Tensor | None, states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        bias = pre.new_zeros(w_hh.shape[0]) if b_hh is None else b_hh
        h, gates, side = _op("gru_sequence", pre, pre, w_hh, bias, states[0])
        return (h,), (gates, side, h)

    def backward(
        self,
        grad_h: Tensor,
        grad_last: Sequence[Tensor],
        w_hh: Tensor,
        states: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        gates, side, h = saved
        d_pre, d_side, d_h0 = _op("gru_sequence_backward", gates, grad_h, gates, side, h, w_hh, states[0])
        return [d_pre, d_side], [d_h0]


class Elman:
    """h_t = act(pre_t + W_hh h_{t-1}) for ``tanh`` or ``relu``."""

    own_hidden_side = False
    saves_graph = False

    def __init__(self, activation: str) -> None:
        self.activation = activation

    def forward(
        self, pre: Tensor, w_hh: Tensor, b_hh: Tensor | None, states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        h, h_prev, w = torch.empty_like(pre), states[0], w_hh.t()
        for t in range(pre.shape[0]):
            torch.addmm(pre[t], h_prev, w, out=h[t])
            h_prev = h[t].tanh_() if self.activation == "tanh" else h[t].relu_()
        return (h,), (h,)

    def backward(
        self,
        grad_h: Tensor,
        grad_last: Sequence[Tensor],
        w_hh: Tensor,
        states: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        (h,) = saved
        d_pre = torch.empty_like(grad_h, memory_format=torch.contiguous_format)
        dh = torch.zeros_like(grad_h[0])
        for t in range(h.shape[0] - 1, -1, -1):
            slope = 1 - h[t] * h[t] if self.activation == "tanh" else (h[t] > 0).to(h.dtype)
            torch.mul(dh + grad_h[t], slope, out=d_pre[t])
            dh = d_pre[t] @ w_hh
        return [d_pre], [dh]


class TorchLayer:
    """Any of these cells by torch's own layer: on a GPU that is cuDNN's, a few launches for a whole sequence.

    Under an identity for W_ih, which is exact, the gradients at the layer's inputs are those at the gates; those of its
    weights are never asked for. The cotangents take turns.
    """

    saves_graph = True

    def __init__(self, layer: Callable[..., tuple[Tensor, ...]], own_hidden_side: bool = False) -> None:
        """Args: ``layer`` is ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``."""
        self.layer = layer
        self.own_hidden_side = own_hidden_side

    def forward(
        self, pre: Tensor, w_hh: Tensor, b_hh: Tensor | None, states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        weights = [torch.eye(len(w_hh), dtype=w_hh.dtype, device=w_hh.device), w_hh]
        if b_hh is not None:
            weights += [torch.zeros_like(b_hh), b_hh]
        leaves = [t.detach().requires_grad_() for t in (pre, *states)]
        with torch.enable_grad(), _exact(pre.device), saved_tensors_hooks(_itself, _itself):
            first = tuple(s.unsqueeze(0) for s in leaves[1:])
            h, *last = self.layer(
                leaves[0], first if len(first) > 1 else first[0], weights, b_hh is not None, 1, 0.0, True, False, False
            )
            outputs = [h, *(state.squeeze(0) for state in last[1:])]  # an LSTM's cell state
        return tuple(t.detach() for t in outputs), (*outputs, *leaves, *weights[3:])

    def backward(
        self,
        grad_h: Tensor,
        grad_last: Sequence[Tensor],
        w_hh: Tensor,
        states: Sequence[Tensor],
        saved: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        made = 1 + len(grad_last)
        outputs, leaves, bias = saved[:made], saved[made : made + 1 + len(states)], saved[made + 1 + len(states) :]
        with _exact(grad_h.device):
            turns = [
                torch.autograd.grad(outputs, leaves, (g, *one), retain_graph=True)
                for g, *one in zip(grad_h.unbind(1), *grad_last, strict=True)
            ]
        d_pre, *d_states = (torch.stack(grads, 0 if i else 1) for i, grads in enumerate(zip(*turns, strict=True)))
        if not self.own_hidden_side:
            return [d_pre], d_states
        hidden = w_hh.shape[1]  # a GRU: the hidden side of its new gate is multiplied by the reset gate
        before = torch.cat([states[0].unsqueeze(0), outputs[0].detach()[:-1]])
        reset = leaves[0].detach()[..., :hidden] + before @ w_hh[:hidden].t()
        d_side = d_pre.clone()
        d_side[..., 2 * hidden :] *= (reset + bias[0][:hidden] if bias else reset).sigmoid_().unsqueeze(1)
        return [d_pre, d_side], d_states


def _itself(t: Tensor) -> Tensor:
    return t


@contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Keep cuDNN from rounding float32 to TF32, its default, and quiet about weights that lie apart."""
    if device.type != "cuda":
        yield
        return
    layers: Any = torch.backends.cudnn.rnn
    before = layers.fp32_precision
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        layers.fp32_precision = "ieee"
        try:
            yield
        finally:
            layers.fp32_precision = before


def _op(name: str, like: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    """Run the native operator on a CPU, else its twin."""
    if like.device.type == "cpu" and ops.native(*args):
        return getattr(torch.ops.cape, name)(*args)
    return TWINS[name](*args)


def lstm_sequence_torch(pre: Tensor, w_hh: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return h, c [T, B, H] and the gates after their activations [T, B, 4H]."""
    steps, batch, width = pre.shape
    hidden = width // 4
    gates = torch.empty_like(pre)
    h, c = pre.new_empty(steps, batch, hidden), pre.new_empty(steps, batch, hidden)
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
    return h, gates, c


def lstm_sequence_backward_torch(
    grad_h: Tensor, grad_c: Tensor, gates: Tensor, c: Tensor, w_hh: Tensor, c0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at the gates [T, K, B, 4H] and of h0 and c0 [K, B, H].

    Args: grad_h [T, K, B, H], grad_c [K, B, H] (of the last cell state).
    """
    steps, cotangents, batch, hidden = grad_h.shape
    d_pre = gates.new_empty(steps, cotangents, batch, 4 * hidden)
    dh, dc = torch.zeros_like(grad_c), grad_c
    for t in range(steps - 1, -1, -1):
        i, f, n, o = gates[t].chunk(4, 1)
        di, df, dn, do = d_pre[t].chunk(4, 2)
        dh = dh + grad_h[t]
        tanh_c = c[t].tanh()
        torch.mul(dh, tanh_c * o * (1 - o), out=do)
        dc = dc + dh * (o * (1 - tanh_c * tanh_c))
        torch.mul(dc, n * i * (1 - i), out=di)
        torch.mul(dc, (c[t - 1] if t else c0) * f * (1 - f), out=df)
        torch.mul(dc, i * (1 - n * n), out=dn)
        dc = dc * f
        dh = d_pre[t] @ w_hh
    return d_pre, dh, dc


def gru_sequence_torch(pre: Tensor, w_hh: Tensor, b_hh: Tensor, h0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return h [T, B, H], the gates after their activations [T, B, 3H] and the new gate's hidden side [T, B, H]."""
    steps, batch, width = pre.shape
    hidden = width // 3
    gates = torch.empty_like(pre)
    side, h = pre.new_empty(steps, batch, hidden), pre.new_empty(steps, batch, hidden)
    h_prev, w = h0, w_hh.t()
    for t in range(steps):
        projected = torch.addmm(b_hh, h_prev, w)
        rz = torch.add(pre[t, :, : 2 * hidden], projected[:, : 2 * hidden], out=gates[t, :, : 2 * hidden]).sigmoid_()
        side[t] = projected[:, 2 * hidden :]
        r, z = rz.chunk(2, 1)
        n = torch.addcmul(pre[t, :, 2 * hidden :], r, side[t], out=gates[t, :, 2 * hidden :]).tanh_()
        torch.lerp(n, h_prev, z, out=h[t])
        h_prev = h[t]
    return h, gates, side


def gru_sequence_backward_torch(
    grad_h: Tensor, gates: Tensor, side: Tensor, h: Tensor, w_hh: Tensor, h0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients at the gates' input side and hidden side [T, K, B, 3H] and of h0 [K, B, H]."""
    steps, cotangents, batch, hidden = grad_h.shape
    d_pre = gates.new_empty(steps, cotangents, batch, 3 * hidden)
    d_side = torch.empty_like(d_pre)
    dh = torch.zeros_like(grad_h[0])
    for t in range(steps - 1, -1, -1):
        r, z, n = gates[t].chunk(3, 1)
        dr, dz, dn = d_pre[t].chunk(3, 2)
        dh = dh + grad_h[t]
        torch.mul(dh, (1 - z) * (1 - n * n), out=dn)
        torch.mul(dh, ((h[t - 1] if t else h0) - n) * z * (1 - z), out=dz)
        torch.mul(dn, side[t] * r * (1 - r), out=dr)
        d_side[t].copy_(d_pre[t])
        d_side[t][..., 2 * hidden :].mul_(r)
        dh = dh * z + d_side[t] @ w_hh
    return d_pre, d_side, dh


TWINS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm_sequence": lstm_sequence_torch,
    "lstm_sequence_backward": lstm_sequence_backward_torch,
    "gru_sequence": gru_sequence_torch,
    "gru_sequence_backward": gru_sequence_backward_torch,
}
