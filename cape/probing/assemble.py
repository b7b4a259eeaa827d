"""From uses to norms: which uses stand alone, and which share a parameter and need their cross terms.

‖Σ_uses g_use‖² is not Σ ‖g_use‖² where a parameter is used twice. Uses of disjoint parameters (or disjoint views of
one) stand alone and are reduced the moment their gradient arrives. The rest wait: repeated linear uses are joined
along T, anything else is summed as gradients of a few samples at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cape.memory import device_failed
from cape.probing import ops
from cape.probing.intercept import Recorded
from cape.probing.taps import parameters_behind
from cape.probing.uses import LinearUse, wide


@dataclass
class Item:
    """One target of one use, with the parameters it came from."""

    recorded: Recorded
    target: int
    bases: tuple[nn.Parameter, ...]
    region: tuple[int, int] | None  # storage interval of a plain view; None: a function of the parameters

    @property
    def tensor(self) -> Tensor:
        return self.recorded.use.targets[self.target]


@dataclass
class Plan:
    """Per recorded use, which of its targets stand alone; and the groups that wait."""

    alone: dict[int, list[bool]] = field(default_factory=dict)
    waits: set[int] = field(default_factory=set)
    groups: list[tuple[list[nn.Parameter], list[Item]]] = field(default_factory=list)


def _region(t: Tensor) -> tuple[int, int] | None:
    """Return the storage interval of a view that shows each element once, else ``None``."""
    start, extent = int(t.storage_offset()), 0
    if t.is_contiguous():
        return start, start + max(t.numel(), 1) - 1
    for stride, size in sorted((int(s), int(n)) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride <= extent:
            return None
        extent += stride * (size - 1)
    return start, start + extent


def _item(recorded: Recorded, target: int, parameters: dict[int, nn.Parameter]) -> Item:
    t = recorded.use.targets[target]
    if id(t) in parameters:
        return Item(recorded, target, (parameters[id(t)],), _region(t))
    base = t._base if t._is_view() else None
    if base is not None and id(base) in parameters and base.dtype == t.dtype:
        region = _region(t)
        if region is not None:
            return Item(recorded, target, (parameters[id(base)],), region)
    return Item(recorded, target, tuple(parameters_behind([t], parameters)), None)


def written_since(uses: Sequence[Recorded], parameters: dict[int, nn.Parameter]) -> set[int]:
    """Return the ids of the parameters behind targets that the model wrote into after their use.

    Such a tensor is another function of the parameters by now, and would pull the use's gradient back as that one.
    """
    return {
        id(base)
        for r in uses
        for i, version in enumerate(r.versions)
        if r.use.targets[i]._version != version
        for item in [_item(r, i, parameters)]
        if item.region is None
        for base in item.bases
    }


def plan(uses: Sequence[Recorded], parameters: dict[int, nn.Parameter], leaked: set[int]) -> Plan:
    """Sort the targets of all uses into those that stand alone and groups; ``leaked`` parameters are left out."""
    result = Plan()
    items = [_item(r, i, parameters) for r in uses for i in range(len(r.use.targets))]
    items = [i for i in items if any(id(b) not in leaked for b in i.bases)]
    by_parameter: dict[int, list[Item]] = {}
    for item in items:
        for base in item.bases:
            by_parameter.setdefault(id(base), []).append(item)
    joined = {p for p, own in by_parameter.items() if not _disjoint(own)}
    group_of: dict[int, int] = {}
    members: dict[int, set[int]] = {}
    for p in joined:
        group_of[p], members[p] = p, {p}
    for item in items:
        involved = [id(b) for b in item.bases]
        if not any(p in joined for p in involved):
            result.alone.setdefault(id(item.recorded), [False] * len(item.recorded.use.targets))[item.target] = True
            continue
        result.waits.add(id(item.recorded))
        for p in involved[1:]:  # every base of a derived target is joined
            a, b = group_of[involved[0]], group_of[p]
            if a != b:
                members[a] |= members.pop(b)
                group_of.update(dict.fromkeys(members[a], a))
    for root, ids in members.items():
        own = [i for i in items if group_of.get(id(i.bases[0])) == root]
        result.groups.append(([parameters[p] for p in ids if p not in leaked], own))
    return result


def _disjoint(items: Sequence[Item]) -> bool:
    regions = [i.region for i in items]
    known = sorted(r for r in regions if r is not None)
    return len(known) == len(regions) and all(a[1] < b[0] for a, b in zip(known, known[1:], strict=False))


def group_norms(parameters: Sequence[nn.Parameter], items: Sequence[Item], cotangents: int, batch_size: int) -> Tensor:
    """Return the squared per-sample norms of a group's summed gradients, [K, B] float64."""
    reached = [i for i in items if i.recorded.gradient is not None]
    if not reached:
        return torch.zeros(cotangents, batch_size, dtype=torch.float64, device=parameters[0].device)
    joined = _joined_linear(reached)
    if joined is not None:
        return joined
    return torch.stack([_summed(parameters, reached, k, batch_size) for k in range(cotangents)])


def _summed(parameters: Sequence[nn.Parameter], reached: Sequence[Item], k: int, batch_size: int) -> Tensor:
    """Return the norms [B] for one cotangent, from the gradients of a few samples at a time."""
    size = sum(p.numel() for p in parameters)
    step = max(1, 4 * ops.MATERIALIZE_ELEMENTS // size)
    parts = []
    for lo in range(0, batch_size, step):
        samples = slice(lo, min(lo + step, batch_size))
        sums: dict[int, Tensor] = {}
        for item in reached:
            for p, grads in _to_parameters(item, parameters, k, samples):
                sums[id(p)] = sums[id(p)] + grads if id(p) in sums else grads
        parts.append(torch.stack([ops.sq_norms(s) for s in sums.values()]).sum(0))
    return torch.cat(parts)


def _to_parameters(
    item: Item, parameters: Sequence[nn.Parameter], k: int, samples: slice
) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the gradients of a target's parameters for some samples, [b, *parameter.shape] each."""
    gradient = item.recorded.gradient
    assert gradient is not None
    grads = item.recorded.use.grads(gradient[k], item.target, samples)
    wanted = {id(p) for p in parameters}
    bases = [b for b in item.bases if id(b) in wanted]
    if len(item.bases) == 1 and item.tensor is item.bases[0]:
        return [(bases[0], grads)]
    grads = grads.to(item.tensor.dtype)

    def pull(v: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            item.tensor, bases, v, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )

    with torch.enable_grad():
        try:
            pulled = pull(grads, True)
        except RuntimeError as error:  # an operator without a batching rule: one sample at a time
            if device_failed(error):
                raise
            each = [pull(g, False) for g in grads]
            pulled = tuple(None if gs[0] is None else torch.stack(gs) for gs in zip(*each, strict=True))
    return [(b, g) for b, g in zip(bases, pulled, strict=True) if g is not None]


def _joined_linear(items: Sequence[Item]) -> Tensor | None:
    """‖Σ_u A_uᵀG_u‖² for repeated linear uses of one whole parameter: join the uses along T."""
    first = items[0]
    rows, gradients = [], []
    for item in items:
        use = item.recorded.use
        if not isinstance(use, LinearUse) or item.tensor is not first.tensor or item.region is None:
            return None
        part = use.parts[item.target]
        kind = use.parts[item.target].transposed if part.rows is not None else None
        other = first.recorded.use.parts[first.target]  # type: ignore[attr-defined]
        if kind != (other.transposed if other.rows is not None else None):
            return None
        gradient = item.recorded.gradient
        assert gradient is not None
        g4 = use.layout.rows(wide(gradient), 1, 1)
        if part.rows is None:
            g4 = g4.sum(2, keepdim=True)
        else:
            rows.append(use.rows_of(part.rows))
        gradients.append(g4)
    if not rows:
        return ops.sq_norms(torch.cat(gradients, 2).sum(2), 2)
    if len(rows) != len(gradients):
        return None
    return ops.linear_sq_norms(torch.cat(rows, 1), torch.cat(gradients, 2))
