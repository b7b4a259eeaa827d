"""Stacked LSTM and GRU, and the layers around them.

The vendors' fused recurrent kernels take one set of weights. Here the products with a layer's whole input are one
product per trial (all positions at once), only the recurrent products are made step by step, for all trials together,
and the gradients of all weights are products over all positions again. Of a layer of which only the last position is
used, the backward direction runs the one step that reaches it: the rest of that direction never reaches the loss, and
its gradients are zero (the plain engine computes those zeros).

Inputs and outputs are [k, B, T, d]; inside, positions come before samples, [k, T, B, d].
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cape.convergence.draws import Draws
from cape.convergence.layers import Layer, StackedParameter, product_of_transposed


class Direction(Layer):
    """One direction of one recurrent layer: four parameters, [k, T, B, d] -> [k, T, B, h] (or its end, [k, 1, B, h]).

    Args:
        parameters: weight_ih [gates * h, d], weight_hh [gates * h, h], bias_ih, bias_hh (or the two weights alone).
        reverse: read the positions from the last to the first.
        end: only the output at the last position is wanted.
    """

    gates: int

    def __init__(self, parameters: list[Tensor], capacity: int, *, reverse: bool, end: bool) -> None:
        super().__init__()
        self.parameters = [StackedParameter(p.detach(), capacity) for p in parameters]
        self._reverse, self._end = reverse, end
        self._hidden = parameters[1].shape[1]

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        if self._reverse and self._end:
            x = x[:, -1:]
        width, length, batch, _ = x.shape
        outputs = x.new_empty(width, length, batch, self._hidden)
        projected = self._project(x)
        hidden = x.new_zeros(width, batch, self._hidden)
        self.saved = [x, outputs, *self._buffers(outputs)]
        recurrent = self._values(1, width).transpose(1, 2)
        for step, t in enumerate(self._order(length)):
            hidden = self._step(projected[:, t], hidden if step else None, t, recurrent, outputs)
        return outputs[:, -1:] if self._end else outputs

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        x, outputs = self.saved[0], self.saved[1]
        width, length, batch, _ = x.shape
        d_input = x.new_empty(width, length, batch, self.gates * self._hidden)
        d_recurrent = self._recurrent_gradients(d_input)
        weight = self._values(1, width)
        order = list(self._order(length))
        carried: Tensor | None = None
        for step in range(length - 1, -1, -1):
            t = order[step]
            if not self._end:
                carried = grad[:, t] if carried is None else carried + grad[:, t]
            elif step == length - 1:
                carried = grad[:, 0]
            assert carried is not None
            carried = self._step_back(carried, t, order[step - 1] if step else None, d_input, d_recurrent)
            if step:
                product = torch.bmm(d_recurrent[:, t], weight)
                carried = product if carried is None else carried.add_(product)
        self._weight_gradients(x, outputs, order, d_input, d_recurrent)
        if not needs_input:
            return None
        dx = torch.bmm(d_input.flatten(1, 2), self._values(0, width)).view(width, length, batch, -1)
        return dx

    def _order(self, length: int) -> range:
        return range(length - 1, -1, -1) if self._reverse else range(length)

    def _values(self, index: int, width: int) -> Tensor:
        return self.parameters[index].value[:width]

    def _project(self, x: Tensor) -> Tensor:
        """Return the products of all positions' inputs with weight_ih, [k, T, B, gates * h], biases added."""
        width, length, batch, size = x.shape
        flat, weight = x.reshape(width, length * batch, size), self._values(0, width).transpose(1, 2)
        if len(self.parameters) == 2:
            return torch.bmm(flat, weight).view(width, length, batch, -1)
        return torch.baddbmm(self._input_bias(width)[:, None], flat, weight).view(width, length, batch, -1)

    def _weight_gradients(
        self, x: Tensor, outputs: Tensor, order: list[int], d_input: Tensor, d_recurrent: Tensor
    ) -> None:
        width, length = x.shape[:2]
        grads = [p.grad[:width] for p in self.parameters]
        flat = d_input.flatten(1, 2)
        product_of_transposed(flat, x.reshape(width, -1, x.shape[3]), grads[0])
        if length > 1:  # the first step's hidden state is zero
            before, after = (slice(1, None), slice(None, -1)) if self._reverse else (slice(None, -1), slice(1, None))
            product_of_transposed(d_recurrent[:, after].flatten(1, 2), outputs[:, before].flatten(1, 2), grads[1])
        else:
            grads[1].zero_()
        if len(grads) == 4:
            torch.sum(flat, 1, out=grads[2])
            torch.sum(d_recurrent.flatten(1, 2), 1, out=grads[3])

    @abstractmethod
    def _input_bias(self, width: int) -> Tensor:
        """Return what is added to the input projections, [k, gates·h]."""

    @abstractmethod
    def _buffers(self, outputs: Tensor) -> list[Tensor]:
        """Return what the steps keep for the backward pass."""

    @abstractmethod
    def _step(self, projected: Tensor, hidden: Tensor | None, t: int, recurrent: Tensor, outputs: Tensor) -> Tensor:
        """Return the hidden state after position t."""

    @abstractmethod
    def _recurrent_gradients(self, d_input: Tensor) -> Tensor:
        """Return where the gradients of the recurrent projections go."""

    @abstractmethod
    def _step_back(
        self, grad: Tensor, t: int, before: int | None, d_input: Tensor, d_recurrent: Tensor
    ) -> Tensor | None:
        """Fill both gradients at position t; return what reaches the hidden state before it past the product."""


class LSTMDirection(Direction):
    """i, f, o = σ(·), g = tanh(·) of x W_ihᵀ + b_ih + h W_hhᵀ + b_hh;  c = f c' + i g;  h = o tanh(c)."""

    gates = 4

    def _input_bias(self, width: int) -> Tensor:
        return self._values(2, width) + self._values(3, width)

    def _buffers(self, outputs: Tensor) -> list[Tensor]:
        width, length, batch, hidden = outputs.shape
        gates = outputs.new_empty(width, length, batch, 4 * hidden)
        return [gates, torch.empty_like(outputs), torch.empty_like(outputs)]  # gates, cells, tanh(cells)

    def _step(self, projected: Tensor, hidden: Tensor | None, t: int, recurrent: Tensor, outputs: Tensor) -> Tensor:
        h = self._hidden
        gates, cells, tanhs = (buffer[:, t] for buffer in self.saved[2:])
        before = projected if hidden is None else torch.baddbmm(projected, hidden, recurrent)
        torch.sigmoid(before, out=gates)  # that of g is overwritten: one pass less than leaving it out
        g = torch.tanh(before[..., 2 * h : 3 * h], out=gates[..., 2 * h : 3 * h])
        torch.mul(gates[..., :h], g, out=cells)
        if hidden is not None:
            cells.addcmul_(gates[..., h : 2 * h], self.saved[3][:, t + 1 if self._reverse else t - 1])
        torch.tanh(cells, out=tanhs)
        return torch.mul(gates[..., 3 * h :], tanhs, out=outputs[:, t])

    def _recurrent_gradients(self, d_input: Tensor) -> Tensor:
        self._d_cell: Tensor | None = None
        return d_input

    def _step_back(
        self, grad: Tensor, t: int, before: int | None, d_input: Tensor, d_recurrent: Tensor
    ) -> Tensor | None:
        h = self._hidden
        gates, cells, tanhs = self.saved[2:]
        now, out = gates[:, t], d_input[:, t]
        i, f, g, o = (now[..., n * h : (n + 1) * h] for n in range(4))
        tanh = tanhs[:, t]
        sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
        d_cell = tanh_backward(grad * o, tanh)
        if self._d_cell is not None:
            d_cell += self._d_cell
        sigmoid_backward.grad_input(d_cell * g, i, grad_input=out[..., :h])
        if before is None:
            out[..., h : 2 * h] = 0.0
        else:
            sigmoid_backward.grad_input(d_cell * cells[:, before], f, grad_input=out[..., h : 2 * h])
            self._d_cell = d_cell * f
        tanh_backward.grad_input(d_cell * i, g, grad_input=out[..., 2 * h : 3 * h])
        sigmoid_backward.grad_input(grad * tanh, o, grad_input=out[..., 3 * h :])
        return None


class GRUDirection(Direction):
    """r, z = σ(·) of x W_ihᵀ + b_ih + h W_hhᵀ + b_hh;  n = tanh(x_n + r h_n);  h = n + z (h' - n).

    x_n and h_n are the input's and the hidden state's share of n, each with its own bias.
    """

    gates = 3

    def _input_bias(self, width: int) -> Tensor:
        return self._values(2, width)

    def _buffers(self, outputs: Tensor) -> list[Tensor]:
        width, length, batch, hidden = outputs.shape
        gates = outputs.new_empty(width, length, batch, 3 * hidden)
        return [gates, torch.empty_like(outputs)]  # r, z, n; the hidden side of n

    def _hidden_bias(self, width: int) -> Tensor | None:
        return self._values(3, width)[:, None] if len(self.parameters) == 4 else None

    def _step(self, projected: Tensor, hidden: Tensor | None, t: int, recurrent: Tensor, outputs: Tensor) -> Tensor:
        h, width = self._hidden, len(projected)
        gates, kept = (buffer[:, t] for buffer in self.saved[2:])
        bias = self._hidden_bias(width)
        if hidden is None:
            state = projected.new_zeros(()).expand_as(projected) if bias is None else bias.expand_as(projected)
        else:
            state = torch.bmm(hidden, recurrent) if bias is None else torch.baddbmm(bias, hidden, recurrent)
        kept.copy_(state[..., 2 * h :])
        rz = torch.add(projected[..., : 2 * h], state[..., : 2 * h], out=gates[..., : 2 * h]).sigmoid_()
        n = torch.addcmul(projected[..., 2 * h :], rz[..., :h], kept, out=gates[..., 2 * h :]).tanh_()
        z = rz[..., h:]
        if hidden is None:
            return torch.addcmul(n, z, n, value=-1.0, out=outputs[:, t])
        return torch.mul(hidden - n, z, out=outputs[:, t]).add_(n)

    def _recurrent_gradients(self, d_input: Tensor) -> Tensor:
        return torch.empty_like(d_input)

    def _step_back(
        self, grad: Tensor, t: int, before: int | None, d_input: Tensor, d_recurrent: Tensor
    ) -> Tensor | None:
        h = self._hidden
        gates, kept = self.saved[2][:, t], self.saved[3][:, t]
        r, z, n = (gates[..., i * h : (i + 1) * h] for i in range(3))
        out, side = d_input[:, t], d_recurrent[:, t]
        sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
        through = grad * z
        d_n = tanh_backward.grad_input(grad - through, n, grad_input=out[..., 2 * h :])
        difference = -n if before is None else self.saved[1][:, before] - n
        sigmoid_backward.grad_input(grad * difference, z, grad_input=out[..., h : 2 * h])
        sigmoid_backward.grad_input(d_n * kept, r, grad_input=out[..., :h])
        side[..., : 2 * h] = out[..., : 2 * h]
        torch.mul(d_n, r, out=side[..., 2 * h :])
        return through


class Recurrent(Layer):
    """All layers and directions of an ``nn.LSTM`` or ``nn.GRU`` (batch first, no dropout, no projection).

    Args:
        module: its parameters give the shapes.
        last: hand on only the last position, [k, B, h * directions], as a head on the last row needs it.
    """

    def __init__(self, module: nn.RNNBase, capacity: int, *, last: bool) -> None:
        super().__init__()
        kind = LSTMDirection if isinstance(module, nn.LSTM) else GRUDirection
        per = 4 if module.bias else 2
        values: list[Tensor] = list(module.parameters())
        directions = 2 if module.bidirectional else 1
        self._last = last
        self._layers: list[list[Direction]] = []
        for layer in range(module.num_layers):
            made: list[Direction] = []
            for direction in range(directions):
                start = (layer * directions + direction) * per
                end = last and layer == module.num_layers - 1
                made.append(kind(values[start : start + per], capacity, reverse=direction == 1, end=end))
            self._layers.append(made)
        self.parameters = [p for made in self._layers for one in made for p in one.parameters]

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        x = x.transpose(1, 2)
        for made in self._layers:
            outputs = [one.forward(x, draws) for one in made]
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)
        return x[:, 0] if self._last else x.transpose(1, 2)

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        result: Tensor | None = grad[:, None] if self._last else grad.transpose(1, 2)
        for depth in range(len(self._layers) - 1, -1, -1):
            made = self._layers[depth]
            assert result is not None
            pieces = result.chunk(len(made), 3)
            length = made[0].saved[0].shape[1]
            total: Tensor | None = None
            for one, piece in zip(made, pieces, strict=True):
                dx = one.backward(piece, needs_input or depth > 0)
                if dx is None:
                    continue
                if total is None:
                    total = dx
                elif dx.shape[1] == length:
                    total += dx
                else:
                    total[:, -1:] += dx
            result = total
        if result is None:
            return None
        return result.transpose(1, 2)

    def move(self, source: int, target: int) -> None:
        for made in self._layers:
            for one in made:
                one.move(source, target)

    def narrow(self, width: int) -> None:
        for made in self._layers:
            for one in made:
                one.narrow(width)


class Embedding(Layer):
    """Rows of a table, [k, B, T] int64 -> [k, B, T, d]."""

    def __init__(self, module: nn.Embedding, capacity: int) -> None:
        super().__init__()
        self.parameters = [StackedParameter(module.weight.detach(), capacity)]

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        self.saved = [x]
        return torch.stack(
            [F.embedding(tokens, table) for table, tokens in zip(self.parameters[0].value, x, strict=False)]
        )

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        table = self.parameters[0]
        for i, tokens in enumerate(self.saved[0]):
            table.grad[i] = torch.ops.aten.embedding_dense_backward(grad[i], tokens, table.value.shape[1], -1, False)
        return None
