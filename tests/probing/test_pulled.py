"""Attention and GELU, whose cotangents take turns within one backward pass: against the float64 loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cape.probing import pulled
from cape.probing.per_sample import all_norms
from cape.probing.reference import per_sample_norms_reference
from tests.probing.test_per_sample import relative

ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "masked": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril()},
}


class Block(nn.Module):
    def __init__(self, checkpointed: bool = False, approximate: str = "none", **options: Any) -> None:
        super().__init__()
        self.qkv, self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(12, 10)
        self.checkpointed, self.approximate, self.options = checkpointed, approximate, options

    def features(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return F.gelu(self.inner(y.transpose(1, 2).flatten(2)), approximate=self.approximate)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.utils.checkpoint.checkpoint(self.features, x, use_reentrant=False) if self.checkpointed else None
        out: Tensor = self.outer((self.features(x) if made is None else made).mean(1))
        return out


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tau", ["true_logit", "full"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_norms_are_those_of_the_loop(name: str, tau: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options, asked = ATTENTIONS[name], []
    for kind in (pulled._Attention, pulled._Elementwise):

        def apply(*args: Any, kind: Any = kind, run: Any = kind.apply) -> Any:
            asked.append(kind.__name__)
            return run(*args)

        monkeypatch.setattr(kind, "apply", apply)
    model = Block(checkpointed, "tanh" if name == "causal" else "none", **options).double()
    batch = (torch.randn(5, 6, 8, dtype=torch.float64), torch.arange(5))
    norms = all_norms(model, batch, tau=tau)
    g2, trace = per_sample_norms_reference(model, batch, tau=tau)
    assert norms.fallback == ()
    assert relative(norms.g2, g2) < 1e-10
    assert relative(norms.tau if norms.tau_full is None else norms.tau_full, trace) < 1e-10
    assert set(asked) == ({"_Elementwise"} if name == "masked" else {"_Attention", "_Elementwise"})


def test_gradients_keep_the_memory_format_of_what_they_belong_to() -> None:
    x = torch.randn(3, 5, 2, 4).transpose(1, 2)
    room = pulled._room(2, x)
    assert room.shape == (2, *x.shape) and room[1].stride() == x.stride()
    assert pulled._room(2, x[..., :3]).is_contiguous()


def test_half_precision_and_autocast_are_left_to_torch() -> None:
    torch.manual_seed(0)
    model, batch = Block(), (torch.randn(5, 6, 8), torch.arange(5))
    exact = all_norms(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = all_norms(model, batch)
    assert relative(rough.g2, exact.g2) < 0.1
