"""Attention and transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.cases.base import CASES, Batch, Case, case, labels, sequences


class _Attention(nn.Module):
    """Class token, positions, packed projection; batch first or not."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, add_bias_kv=not batch_first)
        self.head = nn.Linear(12, 10)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 8, 12))
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        if not self.batch_first:
            x = x.transpose(0, 1)
        out = self.attention(x, x, x)[0]
        return self.head(out[:, 0] if self.batch_first else out[0])


for _first in (True, False):
    CASES.append(
        Case(f"attention batch_first={_first}", lambda first=_first: (_Attention(first), (sequences(), labels(5))))  # type: ignore[misc]
    )
# Equal batch size and length: the layouts that shapes cannot tell apart.
CASES.append(Case("attention, T equals B", lambda: (_Attention(False), (sequences(7), labels(7)))))


@case("encoder")
def _encoder() -> tuple[nn.Module, Batch]:
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(84, 10)), (sequences(), labels(5))


class _Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(12, 2, 1, 1, 24, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(source, target).mean(1))


@case("encoder and decoder")
def _translator() -> tuple[nn.Module, Batch]:
    return _Translator(), ({"source": sequences(), "target": sequences(5, 4)}, labels(5))


class _RelativeBias(nn.Module):
    """A learned bias per relative position, looked up and added to the attention scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, 10)
        self.bias = nn.Parameter(torch.randn(13, 3) * 0.5)
        steps = torch.arange(7)
        self.register_buffer("index", steps[:, None] - steps[None, :] + 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.index].permute(2, 0, 1)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2).mean(1))


@case("relative position bias")
def _relative() -> tuple[nn.Module, Batch]:
    return _RelativeBias(), (sequences(), labels(5))


class _Attends(nn.Module):
    """Multi-head attention with its options, its weights used as well as its outputs."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, **options)
        self.keys, self.values = nn.Linear(12, options.get("kdim", 12)), nn.Linear(12, options.get("vdim", 12))
        self.head, self.call = nn.Linear(12, 10), call

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        out, weights = self.attention(x, self.keys(x), self.values(x), key_padding_mask=mask, **self.call)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        if weights is not None:
            out = out * (1 + weights.flatten(1)[:, :1, None])
        return self.head(out.tanh().mean(1))


_CAUSAL = torch.ones(7, 7, dtype=torch.bool).triu(1)
for _name, _call, _options in (
    ("sizes of keys and values", {}, {"kdim": 5, "vdim": 7, "batch_first": True}),
    ("sizes of keys and values, time first", {"need_weights": False}, {"kdim": 5, "vdim": 7}),
    ("key and value biases", {}, {"add_bias_kv": True, "batch_first": True}),
    ("zero attention", {"need_weights": False}, {"add_zero_attn": True, "bias": False}),
    ("weights per head", {"average_attn_weights": False}, {}),
    ("causal", {"need_weights": False, "attn_mask": _CAUSAL, "is_causal": True}, {"batch_first": True}),
):

    @case(f"attention: {_name}")
    def _attends(call: dict[str, Any] = _call, options: dict[str, Any] = _options) -> tuple[nn.Module, Batch]:
        return _Attends(call, **options), (sequences(), labels(5))


@case("attention: padding")
def _padding() -> tuple[nn.Module, Batch]:
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1, 4:] = mask[3, 2:] = True
    return _Attends({}, batch_first=True), ((sequences(), mask), labels(5))


class _Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = (
            nn.Embedding(30, 12, padding_idx=0),
            nn.Embedding(9, 12),
            nn.Embedding(2, 12),
        )
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 10)
        layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, norm_first=True, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False)
        self.register_buffer("position_ids", torch.arange(9).expand(1, -1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.words(input_ids) + self.places(self.position_ids) + self.kinds(token_type_ids)
        return self.head(self.body(self.norm(x), src_key_padding_mask=attention_mask == 0)[:, 0])


for _given in (True, False):

    @case(f"padded tokens, token types {'given' if _given else 'made inside'}")
    def _bert(given: bool = _given) -> tuple[nn.Module, Batch]:
        mask = torch.ones(5, 9, dtype=torch.long)
        mask[1, 4:] = mask[3, 2:] = 0
        ids = torch.randint(1, 30, (5, 9)) * mask
        types = {"token_type_ids": torch.zeros_like(ids)} if given else {}
        return _Bert(), ({"input_ids": ids, "attention_mask": mask, **types}, labels(5))


class _TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Transformer(12, 2, 1, 2, 24), nn.Linear(12, 10)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(target), source.device, source.dtype)
        return self.head(self.body(source, target, tgt_mask=mask, tgt_is_causal=True).transpose(0, 1))


@case("decoder with a causal mask, outputs of rank 3", loss="sequence_cross_entropy")
def _causal() -> tuple[nn.Module, Batch]:
    return _TimeFirst(), ((sequences(), sequences(5, 4)), torch.randint(0, 10, (5, 4)))


class _Queries(nn.Module):
    """Learned queries attend to the input: they are a parameter until they have met it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.norm = nn.Parameter(torch.randn(1, 3, 12)), nn.LayerNorm(12)
        self.attention, self.head = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.norm(self.queries.expand(len(x), -1, -1))
        return self.head(self.attention(queries, x, x)[0].mean(1))


@case("learned queries", intercepted=False)
def _queries() -> tuple[nn.Module, Batch]:
    return _Queries(), (sequences(), labels(5))
