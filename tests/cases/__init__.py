"""The one list of models that every implementation of the probe must pass.

``CASES`` are quick; ``ARCHITECTURES`` are torchvision's. One file per theme; importing it adds its cases.
"""

from tests.cases import attention, changing, convolution, feedforward, products, recurrence, unusual
from tests.cases.architectures import ARCHITECTURES
from tests.cases.base import CASES, Batch, Case, Functional, labels, sequences, vectors, weight

THEMES = (attention, changing, convolution, feedforward, products, recurrence, unusual)

__all__ = [
    "ARCHITECTURES",
    "CASES",
    "THEMES",
    "Batch",
    "Case",
    "Functional",
    "labels",
    "sequences",
    "vectors",
    "weight",
]
