"""From a model to the layers of a stack, or the reason why it has none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from cape.convergence.layers import Activation, BatchNorm, Dropout, Flatten, Layer, Linear
from cape.convergence.recurrent import Embedding, Recurrent
from cape.families.rnn import RecurrentNet
from cape.probing.chain import ELEMENTWISE, ordinary
from cape.state import has_gradient_hooks, has_hooks, overrides


class Unstackable(Exception):
    """A model that cannot be trained in a stack; the message says why."""


_MAKERS: dict[type[nn.Module], Callable[[nn.Module, int], Layer]] = {
    nn.Linear: Linear,  # type: ignore[dict-item]
    nn.BatchNorm1d: BatchNorm,  # type: ignore[dict-item]
    nn.Dropout: lambda m, _: Dropout(m.p),  # type: ignore[arg-type]
    nn.Flatten: lambda m, _: _flatten(m),  # type: ignore[arg-type]
}


def _flatten(module: nn.Flatten) -> Layer:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise Unstackable("it flattens something else than its samples")
    return Flatten()


def layers_of(model: nn.Module, capacity: int) -> list[Layer]:
    """Return the stacked layers of a model, with room for ``capacity`` trials.

    Raises:
        Unstackable: the model is no chain of layers that have a written-out backward pass.
    """
    refuse_special(model)
    layers = [make(capacity) for make in _chain(model)]
    if len([p for layer in layers for p in layer.parameters]) != len(list(model.parameters())):
        raise Unstackable("two of its parameters are one")
    return layers


def _chain(model: nn.Module) -> list[Callable[[int], Layer]]:
    if not ordinary(model):
        raise Unstackable(f"a {type(model).__name__} has a forward of its own")
    if type(model) is nn.Sequential:
        return [make for child in model for make in _chain(child)]
    if type(model) is RecurrentNet:
        return _recurrent(model)
    if type(model) is nn.Identity or (type(model) is nn.Dropout and model.p == 0.0):
        return []
    if type(model) in ELEMENTWISE:
        return [lambda _: Activation(ELEMENTWISE[type(model)](model))]
    if type(model) not in _MAKERS:
        raise Unstackable(f"{type(model).__name__} has no stacked layer")
    return [partial(_MAKERS[type(model)], model)]


def _recurrent(model: RecurrentNet) -> list[Callable[[int], Layer]]:
    rnn = model.rnn
    if rnn.dropout or not rnn.batch_first or getattr(rnn, "proj_size", 0):
        raise Unstackable("a recurrent layer with dropout, a projection or the positions first has no stacked layer")
    tokens = model.embedding is not None
    front = [] if model.embedding is None else [partial(Embedding, model.embedding)]
    return [*front, partial(Recurrent, rnn, last=not tokens), *_chain(model.head)]


def special(model: nn.Module) -> str | None:
    """Return what a model has that no stack reproduces, frozen parameters, methods of its own or hooks, or None."""
    if any(not p.requires_grad for p in model.parameters()):
        return "it has frozen parameters"
    if any(overrides(m) for m in model.modules()):
        return "methods of its modules are replaced on these themselves"
    return "it has hooks" if has_hooks(model) or has_gradient_hooks(model.parameters()) else None


def refuse_special(model: nn.Module) -> None:
    """Raise ``Unstackable`` for what no stack reproduces, see ``special``."""
    why = special(model)
    if why is not None:
        raise Unstackable(why)
