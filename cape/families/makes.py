"""What ordinary models share: how a family of them draws and builds; activations, initializations, dropouts.

``dense``, ``convnet``, ``recurrent`` and ``encoder`` are models as people write them, ``backbone`` as they take them
from torchvision, each family beside one of the paper's (``family_names.RELATIVES``). The paper's are of one make each:
batch norm in every dense and convolutional block, one initialization, one way to read the output. Here norm,
initialization, activation, sizes and readout are drawn. All but ``backbone`` take tokens as well (``lookup``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import numpy as np
from torch import Tensor, nn

from cape.config import TASKS, ModelSpec
from cape.families.registry import DatasetInfo, Family, check_options, pick
from cape.jsonconfig import JsonConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
}
INITS: dict[str, Callable[[Tensor], object] | None] = {
    "torch": None,
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
    "small": lambda weight: nn.init.normal_(weight, std=0.02),  # GPT's and BERT's; drawn for transformers alone
}
HEADS = ("init", "zero")
LABELLED = tuple(task for task in TASKS if task != "sequence")
DROPOUTS = (0.0, 0.0, 0.0, 0.1, 0.2, 0.5)


Options = TypeVar("Options", bound="OrdinaryOptions")


class OrdinaryOptions(JsonConfig, ABC):
    """Options of an ordinary model, which draw themselves and make the model."""

    LATER: ClassVar[tuple[str, ...]] = ("head",)

    @classmethod
    @abstractmethod
    def draw(cls, rng: np.random.Generator) -> OrdinaryOptions:
        """Draw a make and its sizes."""

    def started(self: Options, rng: np.random.Generator) -> Options:
        """Draw how the head starts: like the other layers, or in one of six draws at zero.

        After all else: a trial's draws before it are what they were when all heads started like the other layers.
        """
        return self.replace(head=pick(rng, ("init",) * 5 + ("zero",)))

    @abstractmethod
    def model(self, spec: ModelSpec) -> nn.Module:
        """Return the model of a spec that has these options."""


class TokenOptions(OrdinaryOptions):
    """Options of an ordinary model that may take tokens."""

    LATER: ClassVar[tuple[str, ...]] = (*OrdinaryOptions.LATER, "lookup")

    @abstractmethod
    def reading(self, rng: np.random.Generator, dataset: DatasetInfo) -> TokenOptions:
        """Draw what a model of tokens has beside all else, an embedding (``lookup``); its head starts as other layers.

        Last, as ``started``, and for the same reason.
        """


class Ordinary(Family):
    """A family of ordinary models: one architecture, of its name, in any of its layouts that a dataset offers."""

    drawn: ClassVar[type[OrdinaryOptions]]

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        options = self.drawn.draw(rng)
        spec = self.spec(self.name, dataset, options)  # which raises where the dataset does not fit
        layout = pick(
            rng, [name for name in self.layouts if name in dataset.layouts and self._serves(name, dataset.task)]
        )
        shape, options = tuple(dataset.sample_shape(layout)), options.started(rng)
        if layout == "tokens":
            assert isinstance(options, TokenOptions)
            options = options.reading(rng, dataset)
        return spec.replace(layout=layout, input_shape=shape, options=options.to_dict())

    def build(self, spec: ModelSpec) -> nn.Module:
        return self.options(spec, {self.name: self.drawn}).model(spec)


def initialized(model: nn.Module, how: str, head: str) -> nn.Module:
    """Initialize every matrix and kernel of dense, convolutional, recurrent and attention layers, with zero biases.

    ``torch`` leaves what the layers have by themselves. Norms and positions stay in any case. Where the ``head`` is
    ``zero``, the last dense layer gives zeros (torchvision's vision transformer; MLP-Mixer, Tolstikhin et al. 2021).
    """
    rule = INITS[how]
    if rule is not None:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.RNNBase, nn.MultiheadAttention)):
                for name, p in module.named_parameters(recurse=False):
                    if p.dim() >= 2:
                        rule(p)
                    elif "bias" in name:
                        nn.init.zeros_(p)
    if head == "zero":
        *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


def check_make(what: str, activation: str, init: str, head: str, dropout: float) -> None:
    check_options(
        what,
        activation=(activation, activation in ACTIVATIONS),
        init=(init, init in INITS),
        head=(head, head in HEADS),
        dropout=(dropout, 0.0 <= dropout < 1.0),
    )


def draw_make(rng: np.random.Generator) -> tuple[str, str, float]:
    """Return an activation, an initialization (torch's own in half of all draws) and a dropout."""
    activation = pick(rng, ("relu", "relu", "relu", *ACTIVATIONS))
    rules = [name for name in INITS if name not in ("torch", "small")]
    return activation, pick(rng, ["torch"] * len(rules) + rules), pick(rng, DROPOUTS)
