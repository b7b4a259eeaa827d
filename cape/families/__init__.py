"""Model families: each draws architectures as JSON (``sample``) and makes them (``build``).

>>> import numpy as np
>>> from cape import datasets, families
>>> family = families.get("mlp")
>>> spec = family.sample(np.random.default_rng(0), datasets.load("digits"))
>>> spec.family, spec.layout, spec.input_shape
('mlp', 'vector', (64,))
"""

from cape.families.backbone import Backbone
from cape.families.cnn import CNN
from cape.families.convnet import ConvNet
from cape.families.dense import Dense
from cape.families.encoder import Encoder
from cape.families.mlp import MLP
from cape.families.recurrent import Recurrent
from cape.families.registry import DatasetInfo, Family, build, get, names, register
from cape.families.rnn import RNN
from cape.families.transformer import Transformer

for _family in (MLP(), CNN(), RNN(), Transformer(), Dense(), ConvNet(), Recurrent(), Encoder(), Backbone()):
    register(_family)

__all__ = [
    "CNN",
    "MLP",
    "RNN",
    "Backbone",
    "ConvNet",
    "DatasetInfo",
    "Dense",
    "Encoder",
    "Family",
    "Recurrent",
    "Transformer",
    "build",
    "get",
    "names",
    "register",
]
