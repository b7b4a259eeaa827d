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
from cape.state import Inputs, call, map_tensors, slice_inputs


def fallback_norms(
    model: nn.Module,
    x: Inputs,
    cotangents: Sequence[Tensor],
    parameters: Mapping[str, nn.Parameter],
    batch_size: int,
    rewind: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return Σ over ``parameters`` of ‖∂⟨v_kb, f(x_b)⟩/∂θ‖² for each cotangent k and sample b, [K, B] float64.

    ``rewind`` is called before each forward pass: it puts back what the model's earlier ones changed.
    """
    if batch_size > 1:
        rewind()
        try:
            norms = _vmapped(model, x, cotangents, parameters, batch_size)
        except Exception as error:  # no batching rule, control flow on data: the loop says what is wrong, if anything
            if isinstance(error, torch.AcceleratorError):  # full memory is no reason: the loop takes less of it
                raise
            return _looped(model, x, cotangents, parameters, range(batch_size), batch_size, rewind)
        # torch.func sees no hooks, and of some batching rules only the first sample is right: the last one must agree.
        check = _looped(model, x, cotangents, parameters, range(batch_size - 1, batch_size), batch_size, rewind)
        far = (norms[:, -1:] - check).abs() > torch.finfo(cotangents[0].dtype).eps ** 0.4 * check
        if not bool(far.any()):
            return norms
    return _looped(model, x, cotangents, parameters, range(batch_size), batch_size, rewind)


def drawn_norms(
    model: nn.Module,
    x: Inputs,
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
    out = call(model, map_tensors(Tensor.clone, x))
    scale = outputs.abs().amax().nan_to_num(0.0, 0.0, 0.0)
    if bool(((out.detach() - outputs).abs() > torch.finfo(out.dtype).eps ** 0.7 * scale).any()):
        raise ModelError(
            "The model draws random numbers in eval mode, others in every pass whatever the seed, so that its gradients"
            " cannot be told; let it draw from torch's global generator."
        )
    params = list(parameters.values())
    result = torch.zeros(len(cotangents), len(out), dtype=torch.float64, device=out.device)
    if not out.requires_grad:
        return result
    model.zero_grad(set_to_none=True)
    with gradients_kept(leaves_behind([out])):
        for k, v in enumerate(cotangents):
            for b in range(len(out)):
                last = (k, b) == (len(cotangents) - 1, len(out) - 1)
                only = torch.zeros_like(v)
                only[b] = v[b]
                result[k, b] = _pulled(model, out, only, params, retain_graph=not last)
    return result


def _looped(
    model: nn.Module,
    x: Inputs,
    cotangents: Sequence[Tensor],
    parameters: Mapping[str, nn.Parameter],
    samples: range,
    batch_size: int,
    rewind: Callable[[], None],
) -> Tensor:
    params = list(parameters.values())
    result = torch.zeros(len(cotangents), len(samples), dtype=torch.float64, device=cotangents[0].device)
    model.zero_grad(set_to_none=True)
    for i, b in enumerate(samples):
        rewind()
        # Two copies: torch's batch-norm backward mis-reads transposed gradients of a batch of one (see reference.py).
        try:
            out = call(model, slice_inputs(x, torch.tensor([b, b]), batch_size))
        except (RuntimeError, IndexError, ValueError, AssertionError) as error:
            if device_failed(error) or batch_size <= 2:
                raise
            raise ModelError(
                f"The model runs on {batch_size} samples but not on two ({error}), so that no sample can be looked at"
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
    model: nn.Module, x: Inputs, cotangents: Sequence[Tensor], parameters: Mapping[str, nn.Parameter], batch_size: int
) -> Tensor:
    held = {n: p.detach() for n, p in parameters.items()}
    rest = {n: p.detach() for n, p in model.named_parameters() if n not in held}
    buffers = dict(model.named_buffers())

    def batched(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch_size

    keyword = isinstance(x, Mapping)
    names = list(x) if isinstance(x, Mapping) else []
    values = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, (tuple, list)) else [x]
    values = map_tensors(Tensor.clone, values)  # the model may write into them
    dims = [0 if batched(v) else None for v in values]

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
    run = torch.func.vmap(of_one, in_dims=(0, *dims), out_dims=(1, 0), chunk_size=min(chunk, batch_size))
    norms, out = run(tuple(cotangents), *values)
    if out.requires_grad:
        raise ValueError("the model holds parameters elsewhere, which torch.func does not see")
    return norms
