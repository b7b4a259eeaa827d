"""What modules hold beside tensors: collections, arrays and generators, and how to put back what was in them."""

from __future__ import annotations

import operator
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from copy import copy
from typing import Any

import numpy as np
import torch

_COLLECTIONS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})
_GENERATORS = (torch.Generator, np.random.Generator, random.Random)


class Held:
    """The collections, arrays and generators among some values, and what was in them."""

    def __init__(self, values: Iterable[Any]) -> None:
        values = list(values)
        self._collections = [(c, copy(c)) for c in values if type(c) in _COLLECTIONS]
        self._arrays = [(a, a.copy()) for a in values if isinstance(a, np.ndarray)]
        self._generators = [(g, _state_of(g)) for g in values if isinstance(g, _GENERATORS)]

    def draws(self) -> list[Any]:
        """Return the states of the generators, as values that can be compared."""
        return [frozen(_state_of(generator)) for generator, _ in self._generators]

    def put_back(self) -> None:
        """Let them hold what they held."""
        for collection, items in self._collections:
            put_back(collection, items)
        for array, numbers in self._arrays:
            if array.tobytes() != numbers.tobytes():
                array[...] = numbers
        for generator, state in self._generators:
            _set_state(generator, state)


def within(values: Iterable[Any]) -> list[Any]:
    """Return some values, and what the collections among them hold, each collection and its values once."""
    found, seen = list(values), set()
    for value in found:  # grows while it is read
        if (type(value) in _COLLECTIONS or type(value) is tuple) and id(value) not in seen:
            seen.add(id(value))
            found += value.values() if isinstance(value, dict) else value
    return list({id(v): v for v in found}.values())


def put_back(collection: Any, items: Any) -> None:
    """Let a list, dict, set or deque hold the very objects that it held."""
    now, then = ([*c, *c.values()] if isinstance(c, dict) else list(c) for c in (collection, items))
    if len(now) == len(then) and all(map(operator.is_, now, then)):
        return
    collection.clear()
    (collection.extend if isinstance(collection, (list, deque)) else collection.update)(items)


def frozen(state: Any) -> Any:
    """Return a generator's state as a value that can be compared with another."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, np.ndarray):
        return state.tobytes()
    if isinstance(state, dict):
        return {name: frozen(value) for name, value in state.items()}
    return tuple(map(frozen, state)) if isinstance(state, tuple) else state


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.getstate()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        (generator.set_state if isinstance(generator, torch.Generator) else generator.setstate)(state)
