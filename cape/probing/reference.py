"""The slow, obviously right way: one sample at a time, in float64, with ordinary autograd.

Tests hold every other implementation against this one; the engine itself never calls it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cape.checks import check_batch, trainable
from cape.samples import Samples
from cape.state import Inputs, call, map_tensors, without_fast_path
from cape.tasks import Loss, LossLike


def _to_double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.to(torch.cdouble) if t.is_complex() else t


def per_sample_norms_reference(
    model: nn.Module, batch: tuple[Inputs, Tensor], *, loss: LossLike = "cross_entropy", tau: str = "true_logit"
) -> tuple[Tensor, Tensor]:
    """Return (g2, tau), each [B] float64: ‖∇θ ℓ_b‖² (Eq. 10) and the squared norm of τ's gradient (Eq. 11).

    Each sample runs as a batch of two copies, of which only the first is differentiated: torch's batch-norm backward
    mis-reads transposed gradients when the batch is one (seen in 2.14.1; a test holds this against finite differences).

    Args:
        model: any module; it is copied, converted to float64 and put into eval mode.
        batch: (inputs, targets).
        loss: name, module or callable.
        tau: ``true_logit`` or ``full`` (the whole output Jacobian, one backward pass per output).
    """
    x, y, batch_size = check_batch(batch)
    # What a module keeps of an earlier computation (the weight of a weight norm) has a graph, which cannot be copied.
    kept = {
        id(t): t.detach().clone()
        for m in model.modules()
        for t in vars(m).values()
        if isinstance(t, Tensor) and t.grad_fn is not None
    }
    clone = copy.deepcopy(model, kept).double().eval()
    for t in [*clone.parameters(), *clone.buffers()]:
        t.data = _to_double(t.data)  # complex ones too, which double() leaves alone
    criterion = Loss(loss)
    params = list(trainable(clone).values())
    x, y = map_tensors(_to_double, (x, y))
    samples = Samples.of(x, batch_size)
    g2, traces = [], []
    for b in range(batch_size):
        with without_fast_path():
            out = call(clone, samples.take(torch.tensor([b, b])).inputs)[:1]
        yb = y[b : b + 1]
        g2.append(_sq(criterion.per_sample(out, yb)[0], params))
        if tau == "full":
            traces.append(torch.stack([_sq(f, params) for f in out.reshape(-1)]).sum())
        else:
            traces.append(_sq(criterion.target_logit(out, yb)[0], params))
    return torch.stack(g2), torch.stack(traces)


def _sq(scalar: Tensor, params: list[nn.Parameter]) -> Tensor:
    """Return the squared norm of a scalar's gradient in the parameters."""
    for p in params:
        p.grad = None
    scalar.backward(retain_graph=True)
    return torch.stack([p.grad.to_dense().abs().square().sum() for p in params if p.grad is not None]).sum()
