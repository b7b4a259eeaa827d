"""Which family a model is of: from the layers that it holds, and from what a meta-regressor knows of such models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cape.errors import SpecError, did_you_mean
from cape.family_names import LANGUAGE, TOKENS, related
from cape.metamodel.rows import row_from_features
from cape.state import tensors_of

if TYPE_CHECKING:
    from cape.metamodel.artifact import MetaModel
    from cape.state import Inputs

_ATTENTION = re.compile(r"attention|attn|transformer", re.IGNORECASE)
_NOT_ATTENTION = re.compile(r"channel|spatial|squeeze", re.IGNORECASE)  # gates of convolutional networks
_PROJECTIONS = {"qkv", "qkv_proj", "to_qkv", "wqkv", "c_attn"}  # of an attention that has no class of its own
_QUERY_AND_KEY = ({"q_proj", "k_proj"}, {"to_q", "to_k"}, {"wq", "wk"}, {"query", "key"})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_BETTER = 2.5
"""How many times better than its relative one of the paper's families must know a model that is then taken for its."""


def infer_family(model: nn.Module) -> str | None:
    """Return the family that a model looks like, from the layers it holds.

    Attention (``nn.MultiheadAttention``, a class named so, or projections named as an attention's) makes it a
    ``transformer``, with or without convolutions before it (patch embeddings are convolutions); recurrent layers an
    ``rnn``; convolutions a ``cnn``; anything else an ``mlp``. Recurrent layers beside attention or convolutions are
    mixed: None.
    """
    modules = list(model.modules())
    attention = any(
        isinstance(m, nn.MultiheadAttention) or _named_attention(type(m).__name__) or _has_projections(m)
        for m in modules
    )
    recurrent = any(isinstance(m, _RECURRENT) for m in modules)
    convolution = any(isinstance(m, _CONVOLUTIONS) for m in modules)
    if recurrent:
        return None if attention or convolution else "rnn"
    if attention:
        return "transformer"
    return "cnn" if convolution else "mlp"


def _named_attention(name: str) -> bool:
    return bool(_ATTENTION.search(name)) and not _NOT_ATTENTION.search(name)


def _has_projections(module: nn.Module) -> bool:
    """Whether a module's own layers or parameters are named as those of an attention."""
    names = {name.lower() for name in (*module._modules, *module._parameters)}
    return bool(names & _PROJECTIONS) or any(pair <= names for pair in _QUERY_AND_KEY)


def read_by(x: Inputs, y: Tensor) -> str:
    """Return ``TOKENS`` where a batch's first input is whole numbers [B, T], ``LANGUAGE`` where targets are; or ''."""
    first = next(iter(tensors_of(x)), None)
    if first is None or first.dim() != 2 or not _whole(first):
        return ""
    return LANGUAGE if y.dim() == 2 and _whole(y) else TOKENS


def _whole(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def known_best(
    regressor: MetaModel, kind: str | None, features: Mapping[str, Any], epsilon: float, read: str = ""
) -> str | None:
    """Return the family of a kind that a model is taken for, where the meta-regressor has several.

    A model of tokens is taken for one of those families (``read``, see ``read_by``) where the meta-regressor has any.
    How well one knows it is the width of its interval, times the model's distance where that is beyond its domain. The
    paper's families are of one make each, which features do not always tell from others: only where such a family knows
    a model ``_BETTER`` times better than the ordinary models beside it is it taken for one.
    """
    of_kind = [related(kind, end) for end in dict.fromkeys((read, ""))] if kind else []
    known = ([family for family in families if family in regressor.families] for families in of_kind)
    candidates = next(filter(None, known), [])
    if len(candidates) < 2 or regressor.domain is None:
        return candidates[0] if candidates else kind
    unsure = {}
    for family in candidates:
        row = row_from_features(features, family, epsilon)
        width = regressor.conformal.half_width(row["family"][0], 0.9)[0] * float(regressor.width(row)[0])
        unsure[family] = width * max(1.0, regressor.domain.check(row)[2]) * (_BETTER if family == kind else 1.0)
    return min(candidates, key=unsure.__getitem__)


def check_family(family: str | None, known: Sequence[str]) -> None:
    """Raise ``SpecError`` for what is no name, or a known family's name with a slip in it."""
    if family is None or family in known:
        return
    if not isinstance(family, str):
        raise SpecError(f"A family is a name, not {family!r}.")
    if difflib.get_close_matches(family.lower(), known, n=1, cutoff=0.75):
        raise SpecError(f"Unknown family '{family}'.{did_you_mean(family.lower(), known)}")
