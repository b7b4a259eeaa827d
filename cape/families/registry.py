"""What a family is, and the registry of families.

A family draws architectures (``sample``) and makes them (``build``). The two meet in a ``ModelSpec``: JSON that
determines the architecture completely, so that a model drawn here can be built in any process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
from torch import nn

from cape.config import TASKS, ModelSpec
from cape.errors import SpecError, did_you_mean
from cape.family_names import check_family_name
from cape.jsonconfig import JsonConfig

T = TypeVar("T")
Options = TypeVar("Options", bound=JsonConfig)


class DatasetInfo(Protocol):
    """What a family needs to know of a dataset (``cape.datasets.Dataset`` has it all)."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def outputs(self) -> int: ...
    @property
    def layouts(self) -> tuple[str, ...]: ...
    @property
    def gray(self) -> bool: ...
    @property
    def vocabulary(self) -> int: ...
    def sample_shape(self, layout: str) -> tuple[int, ...]: ...


class Family(ABC):
    """A family of architectures.

    Subclass it, set ``name`` and ``layouts``, and pass an instance to :func:`register` to add your own.

    Attributes:
        name: the name in specs, plans and rows.
        layouts: the layouts that its models take, the preferred one first.
        architectures: the names that ``sample`` can put into a spec.
        token_tasks: the tasks for which its models take tokens, where ``tokens`` is among the layouts.
    """

    name: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]]
    architectures: ClassVar[tuple[str, ...]]
    token_tasks: ClassVar[tuple[str, ...]] = TASKS

    def layout_for(self, dataset: DatasetInfo) -> str:
        """Return the layout in which models of this family take a dataset.

        Raises:
            SpecError: the dataset has no layout that the family takes.
        """
        for layout in self.layouts:
            if layout in dataset.layouts and self._serves(layout, dataset.task):
                return layout
        only = "" if self.token_tasks == TASKS else f" ({', '.join(self.token_tasks)})"
        takes = [f"tokens{only}" if layout == "tokens" else layout for layout in self.layouts]
        raise SpecError(
            f"The family '{self.name}' takes {' or '.join(takes)}, but the dataset '{dataset.name}'"
            f" (task {dataset.task}) offers {', '.join(dataset.layouts)}; choose another family or dataset."
        )

    def _serves(self, layout: str, task: str) -> bool:
        """Whether models of a layout are made for a task: sequences are tokens, tokens what ``token_tasks`` says."""
        return task in self.token_tasks if layout == "tokens" else task != "sequence"

    def preprocess_for(self, preprocess: str) -> str:
        """Return the dataset's ``preprocess`` that serves a trial's ``preprocess`` in this family."""
        return preprocess

    @abstractmethod
    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        """Draw one architecture that fits a dataset.

        Args:
            rng: the only source of randomness (torch's RNG is neither read nor advanced).
            dataset: what the model has to take and give.
            reference: draw only what the authors' published generators draw.

        Raises:
            SpecError: the dataset does not fit the family.
        """

    @abstractmethod
    def build(self, spec: ModelSpec) -> nn.Module:
        """Make the model, initialized from torch's global RNG (seed it before the call).

        Raises:
            SpecError: the spec is of another family, or its options are not what the architecture needs.
        """

    def spec(self, architecture: str, dataset: DatasetInfo, options: JsonConfig) -> ModelSpec:
        """Return the ``ModelSpec`` of an architecture of this family for a dataset."""
        layout = self.layout_for(dataset)
        return ModelSpec(
            family=self.name,
            architecture=architecture,
            layout=layout,
            input_shape=tuple(dataset.sample_shape(layout)),
            outputs=dataset.outputs,
            task=dataset.task,
            options=options.to_dict(),
        )

    def options(self, spec: ModelSpec, classes: Mapping[str, type[Options]]) -> Options:
        """Return the checked options of a spec; ``classes`` maps each architecture to its options' class."""
        if spec.family != self.name:
            raise SpecError(f"The spec is of the family '{spec.family}', not '{self.name}'.")
        if spec.architecture not in classes:
            raise SpecError(
                f"The family '{self.name}' has no architecture '{spec.architecture}'."
                f"{did_you_mean(spec.architecture, classes)}"
            )
        if spec.layout not in self.layouts:
            raise SpecError(f"Models of '{self.name}' take {' or '.join(self.layouts)}, not '{spec.layout}'.")
        if not self._serves(spec.layout, spec.task):
            raise SpecError(f"Models of '{self.name}' for the layout '{spec.layout}' have no task '{spec.task}'.")
        dims = {"vector": 1, "rows": 2, "image": 3, "tokens": 1}[spec.layout]
        if len(spec.input_shape) != dims or min(spec.input_shape) < 1:
            raise SpecError(f"Layout '{spec.layout}' has an input shape of {dims} sizes, not {list(spec.input_shape)}.")
        return classes[spec.architecture].from_dict(spec.options)


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add a family (or replace the one of the same name) and return it; raises ``SpecError`` for what cannot be one."""
    if not isinstance(family, Family):
        raise SpecError(f"A family is an instance of cape.families.Family, not {family!r}.")
    _FAMILIES[check_family_name(getattr(family, "name", None))] = family
    return family


def names() -> tuple[str, ...]:
    """Return the names of the registered families, in order of registration."""
    return tuple(_FAMILIES)


def get(name: str) -> Family:
    """Return a family by name; raises ``SpecError`` where there is none."""
    if name not in _FAMILIES:
        raise SpecError(f"Unknown family '{name}'.{did_you_mean(name, _FAMILIES)}")
    return _FAMILIES[name]


def build(spec: ModelSpec) -> nn.Module:
    """Make the model of a spec, whatever its family (see :meth:`Family.build`)."""
    return get(spec.family).build(spec)


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """Return one of ``choices`` with equal chances (a plain Python value, so that it is JSON)."""
    return choices[int(rng.integers(len(choices)))]


def made_of(patch: int, shape: Sequence[int]) -> bool:
    """Return whether square patches of a side make up images [C, H, W] of a shape."""
    return patch >= 1 and all(size % patch == 0 for size in shape[1:])


def check_options(what: str, **rules: tuple[Any, bool]) -> None:
    """Raise ``SpecError`` for the first option whose rule ``(value, is valid)`` does not hold."""
    for name, (value, valid) in rules.items():
        if not valid:
            raise SpecError(f"The option '{name}' of {what} cannot be {value!r}.")
