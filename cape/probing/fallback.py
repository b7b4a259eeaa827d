"""The exact way for parameters that interception cannot follow: per-sample vector-Jacobian products.

``torch.func`` where the model allows it, else one sample at a time with ordinary autograd. Slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cape.errors import ModelError
from cape.memory import device_failed
from cape.probing import ops
from cape.probing.taps import gradients_kept, leaves_behind
from cape.samples import Samples
from cape.state import call, map_tensors


def fallback_norms(
    model: nn.Module,
    samples: Samples,
    cotangents: Sequence[Tensor],
    parameters: Mapping[str, nn.Parameter],
    rewind: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return Σ over ``parameters`` of ‖∂⟨v_kb, f(x_b)⟩/∂θ‖² for each cotangent k and sample b, [K, B] float64.

    ``rewind`` is called before each forward pass: it puts back what the model's earlier ones changed.
    """
    count = len(samples)
    if count > 1:
        rewind()
        try:
            norms = _vmapped(model, samples, cotangents, parameters)
        except Exception as error:  # no batching rule, control flow on data: the loop says what is wrong, if anything
            if isinstance(error, torch.AcceleratorError):  # full memory is no reason: the loop takes less of it
                raise
            return _looped(model, samples, cotangents, parameters, range(count), rewind)
        # torch.func sees no hooks, and of some batching rules only the first sample is right: the last one must agree.
        check = _looped(model, samples, cotangents, parameters, range(count - 1, count), rewind)
        far = (norms[:, -1:] - check).abs() > torch.finfo(cotangents[0].dtype).eps ** 0.4 * check
        if not bool(far.any()):
            return norms
    return _looped(model, samples, cotangents, parameters, range(count), rewind)


def drawn_norms(
    model: nn.Module,
    samples: Samples,
    cotangents: Sequence[Tensor],
    parameters: Mapping[str, nn.Parameter],
    outputs: Tensor,
) -> Tensor:
    """Like ``fallback_norms``, all through the graph of one pass over the batch, whose draws cannot be had again alone.

    It costs a backward pass over the whole batch for each sample.

    Args:
        outputs: that the pass must give, with the model's state and the generators as they are.

    Raises:
        ModelError: the pass gives others.
    """
    norms = norms_together(model, samples, cotangents, parameters, range(len(samples)), outputs)
    if norms is None:
        raise ModelError(
            "The model draws random numbers in eval mode, others in every pass whatever the seed, so that its gradients"
            " cannot be told; let it draw from torch's global generator."
        )
    return norms


def norms_together(
    model: nn.Module,
    samples: Samples,
    cotangents: Sequence[Tensor],
    parameters: Mapping[str, nn.Parameter],
    chosen: Sequence[int],
    outputs: Tensor,
) -> Tensor | None:
    """Return the norms of some samples, [K, chosen] float64, in the graph of one pass over all, whatever they share.

    ``None`` where the pass gives other ``outputs`` than these.
    """
    out = call(model, map_tensors(Tensor.clone, samples.inputs))
    scale = outputs.abs().amax().nan_to_num(0.0, 0.0, 0.0)
    if bool(((out.detach() - outputs).abs() > torch.finfo(out.dtype).eps ** 0.7 * scale).any()):
        return None
    params = list(parameters.values())
    result = torch.zeros(len(cotangents), len(chosen), dtype=torch.float64, device=out.device)
    if not out.requires_grad:
        return result
    model.zero_grad(set_to_none=True)
    with gradients_kept(leaves_behind([out])):
        for k, v in enumerate(cotangents):
            for i, b in enumerate(chosen):
                last = (k, i) == (len(cotangents) - 1, len(chosen) - 1)
                only = torch.zeros_like(v)
                only[b] = v[b]
                result[k, i] = _pulled(model, out, only, params, retain_graph=not last)
    return result


def _looped(
    model: nn.Module,
    samples: Samples,
    cotangents: Sequence[Tensor],
    parameters: Mapping[str, nn.Parameter],
    chosen: range,
    rewind: Callable[[], None],
) -> Tensor:
    params = list(parameters.values())
    result = torch.zeros(len(cotangents), len(chosen), dtype=torch.float64, device=cotangents[0].device)
    model.zero_grad(set_to_none=True)
    for i, b in enumerate(chosen):
        rewind()
        # Two copies: torch's batch-norm backward mis-reads transposed gradients of a batch of one (see reference.py).
        try:
            out = call(model, samples.take(torch.tensor([b, b])).inputs)
        except (RuntimeError, IndexError, ValueError, AssertionError) as error:
            if device_failed(error) or len(samples) <= 2:
                raise
            raise ModelError(
                f"The model runs on {len(samples)} samples but not on two ({error}), so that no sample can be looked at"
                " alone."
            ) from error
        if not out.requires_grad:
            continue
        with gradients_kept(leaves_behind([out])):  # of tensors that are no parameters; the caller holds those of these
            for k, v in enumerate(cotangents):
                last = k == len(cotangents) - 1
                first = torch.stack([v[b], torch.zeros_like(v[b])])
                result[k, i] = _pulled(model, out, first, params, retain_graph=not last)
    return result


def _pulled(
    model: nn.Module, out: Tensor, cotangent: Tensor, parameters: Sequence[nn.Parameter], retain_graph: bool
) -> Tensor:
    """Return the squared norm of the parameters' gradient, [] float64, and leave no gradient behind."""
    # backward() rather than grad(): re-entrant checkpoints know no other.
    torch.autograd.backward(out, cotangent, retain_graph=retain_graph)
    total = torch.zeros((), dtype=torch.float64, device=out.device)
    for p in parameters:
        if p.grad is not None:
            total += _square(p.grad)
    model.zero_grad(set_to_none=True)
    return total


def _square(gradient: Tensor) -> Tensor:
    """Return the squared norm of a dense or sparse, real or complex gradient, float64."""
    dense = gradient.coalesce().values() if gradient.is_sparse else gradient
    return ops.sq_norms(dense.reshape(1, -1))[0]


def _vmapped(
    model: nn.Module, samples: Samples, cotangents: Sequence[Tensor], parameters: Mapping[str, nn.Parameter]
) -> Tensor:
    held = {n: p.detach() for n, p in parameters.items()}
    rest = {n: p.detach() for n, p in model.named_parameters() if n not in held}
    buffers = dict(model.named_buffers())

    x, own = samples.inputs, {id(t) for t in samples.tensors()}
    keyword = isinstance(x, Mapping)
    names = list(x) if isinstance(x, Mapping) else []
    values = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, (tuple, list)) else [x]
    dims = [0 if id(v) in own else None for v in values]
    values = map_tensors(Tensor.clone, values)  # the model may write into them

    def of_one(vs: tuple[Tensor, ...], *inputs: Any) -> tuple[Tensor, Tensor]:
        one = [v.unsqueeze(0) if d == 0 else v for v, d in zip(inputs, dims, strict=True)]

        def forward(ps: dict[str, Tensor]) -> Tensor:
            state = {**rest, **buffers, **ps}
            args, kwargs = ((), dict(zip(names, one, strict=True))) if keyword else (tuple(one), {})
            return torch.func.functional_call(model, state, args, kwargs)

        out, pull, *_ = torch.func.vjp(forward, held)
        norms = []
        for v in vs:
            (grads,) = pull(v.unsqueeze(0))
            norms.append(torch.stack([ops.sq_norms_torch(g.reshape(1, -1))[0] for g in grads.values()]).sum())
        return torch.stack(norms), out

    chunk = max(1, 4 * ops.MATERIALIZE_ELEMENTS // max(1, sum(p.numel() for p in held.values())))
    run = torch.func.vmap(of_one, in_dims=(0, *dims), out_dims=(1, 0), chunk_size=min(chunk, len(samples)))
    norms, out = run(tuple(cotangents), *values)
    if out.requires_grad:
        raise ValueError("the model holds parameters elsewhere, which torch.func does not see")
    return norms
