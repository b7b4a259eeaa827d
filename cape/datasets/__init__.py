"""Datasets: a name or a Parquet file becomes probe batches in the layout that a model takes.

>>> from cape import datasets
>>> digits = datasets.load("digits")
>>> x, y = digits.batch(32, seed=0, layout="image")
>>> tuple(x.shape), tuple(y.shape)
((32, 3, 32, 32), (32,))
"""

from cape.datasets.augment import augmented
from cape.datasets.bundled import from_arrays
from cape.datasets.dataset import Dataset, Source
from cape.datasets.registry import data_root, load, names, register

__all__ = ["Dataset", "Source", "augmented", "data_root", "from_arrays", "load", "names", "register"]
