"""Chains of dense layers: the float64 loop's numbers, and nothing that is no such chain."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cape.probing import ops
from cape.probing.chain import ELEMENTWISE, chain_norms, chain_of
from cape.probing.per_sample import all_norms
from cape.probing.reference import per_sample_norms_reference
from cape.probing.wanted import Wanted
from cape.tasks import Loss
from tests.probing.test_per_sample import relative


def used(layer: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """Give a batch norm statistics and scales that tell it from the identity."""
    assert layer.running_mean is not None and layer.running_var is not None
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias)
    return layer


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        layer.get_parameter(name).requires_grad_(False)
    return layer


def deep() -> nn.Module:
    inner = nn.Sequential(nn.Linear(33, 17), used(nn.BatchNorm1d(17)), nn.Dropout(0.3), nn.GELU(approximate="tanh"))
    return nn.Sequential(nn.Flatten(), nn.Sequential(inner, nn.Identity()), nn.Linear(17, 7))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(33, 7)),
    "one unit": lambda: nn.Sequential(nn.Flatten(), nn.Linear(33, 1), nn.Tanh(), nn.Linear(1, 7)),
    "nested": deep,
    "no bias, no affine": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(33, 20, bias=False), used(nn.BatchNorm1d(20, affine=False)), nn.ReLU(), nn.Linear(20, 7)
    ),
    "norms first and last": lambda: nn.Sequential(
        nn.Flatten(), used(nn.BatchNorm1d(33)), nn.Linear(33, 7), used(nn.BatchNorm1d(7, eps=0.1))
    ),
    "frozen": lambda: nn.Sequential(
        nn.Flatten(),
        frozen(nn.Linear(33, 20), "weight", "bias"),
        frozen(used(nn.BatchNorm1d(20)), "bias"),
        nn.Sigmoid(),
        frozen(nn.Linear(20, 20), "weight"),
        frozen(used(nn.BatchNorm1d(20)), "weight"),
        nn.SiLU(),
        frozen(nn.Linear(20, 7), "bias"),
    ),
    "every function": lambda: nn.Sequential(
        nn.Flatten(), *(layer for kind in ELEMENTWISE for layer in (nn.Linear(33, 33), kind())), nn.Linear(33, 7)
    ),
    "wide": lambda: nn.Sequential(nn.Flatten(), nn.Linear(33, 700), nn.GELU(), nn.Linear(700, 7)),
}


def made(name: str, batch: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(batch)
        x = torch.randn(batch, 11, 3).transpose(1, 2)  # not contiguous
        return MODELS[name]().to(dtype), x.to(dtype), torch.randint(0, 7, (batch,))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("batch", [1, 2, 5, 130])
@pytest.mark.parametrize("name", MODELS)
def test_against_the_loop(name: str, batch: int, backend: str) -> None:
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, x, y = made(name, batch, dtype)
        assert chain_of(model, x) is not None
        norms = all_norms(model, (x, y), backend=backend)
        g2, tau = per_sample_norms_reference(model, (x, y))
        assert relative(norms.g2, g2) < bound
        assert relative(norms.tau, tau) < bound
        assert norms.fallback == ()


@pytest.mark.parametrize("tau", ["full", "hutchinson"])
def test_the_whole_jacobian(tau: str) -> None:
    model, x, y = made("nested", 5)
    full = all_norms(model, (x, y), tau=tau).tau_full
    assert full is not None
    _, reference = per_sample_norms_reference(model, (x, y), tau="full")
    followed = all_norms(nn.Sequential(Plain(), *model), (x, y), tau=tau).tau_full
    assert followed is not None
    assert relative(full, followed) < 1e-5
    if tau == "full":
        assert relative(full, reference) < 1e-5


class Plain(nn.Module):
    """An identity that is not known: with it the model is followed, not recognized."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda out, y: F.cross_entropy(F.dropout(out, 0.5), y, reduction="none"),
    ],
    ids=["module", "draws"],
)
def test_any_loss_and_nothing_is_changed(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, x, y = made("nested", 6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = all_norms(model, (x, y), loss=loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and all(m.training for m in model.modules())
    followed = all_norms(nn.Sequential(Plain(), *model), (x, y), loss=loss)
    assert relative(found.g2, followed.g2) < 1e-5
    assert relative(found.tau, followed.tau) < 1e-5
    assert torch.equal(found.losses, followed.losses) or float((found.losses - followed.losses).abs().max()) < 1e-6


def test_micro_batches_change_nothing() -> None:
    model, x, y = made("nested", 40)
    whole, pieces = all_norms(model, (x, y)), all_norms(model, (x, y), micro_batch=7)
    assert relative(whole.g2, pieces.g2) < 1e-6 and relative(whole.tau, pieces.tau) < 1e-6


@pytest.mark.parametrize("name", ["nested", "no bias, no affine", "frozen"])
def test_several_at_once_are_each_alone(name: str) -> None:
    wanted = Wanted(Loss("cross_entropy"), "full")
    trials = [made(name, 32) for _ in range(3)]
    with torch.no_grad():
        for i, (model, x, _) in enumerate(trials):
            x += i
            for p in model.parameters():
                p *= 1 + 0.1 * i
    chains = [chain_of(model, x) or [] for model, x, _ in trials]
    x, y = torch.stack([x for _, x, _ in trials]), torch.stack([y for _, _, y in trials])
    together = chain_norms(chains, x, y, wanted)
    for i, norms in enumerate(together):
        (alone,) = chain_norms([chains[i]], x[i : i + 1], y[i : i + 1], wanted)
        assert norms.tau_full is not None and alone.tau_full is not None
        for a, b in ((norms.g2, alone.g2), (norms.tau, alone.tau), (norms.tau_full, alone.tau_full)):
            assert torch.equal(a, b)


def hooked(model: nn.Module) -> nn.Module:
    model[1].register_forward_hook(lambda module, args, out: 2 * out)  # type: ignore[index]
    return model


def own_forward(model: nn.Module) -> nn.Module:
    model[1].forward = lambda x: x[:, :20] * 3  # type: ignore[index]
    return model


def shared() -> nn.Module:
    layer = nn.Linear(33, 33)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), layer, nn.Linear(33, 7))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Extra(nn.Parameter):
    pass


def of_another_type() -> nn.Module:
    layer = nn.Linear(33, 7)
    layer.weight = Extra(layer.weight.detach())
    return nn.Sequential(nn.Flatten(), layer)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "hook": lambda: hooked(nn.Sequential(nn.Flatten(), nn.Linear(33, 20), nn.Linear(20, 7))),
    "own forward": lambda: own_forward(nn.Sequential(nn.Flatten(), nn.Linear(33, 20), nn.Linear(20, 7))),
    "shared layer": shared,
    "subclass": lambda: nn.Sequential(nn.Flatten(), Doubled(33, 7)),
    "parametrization": lambda: nn.Sequential(nn.Flatten(), parametrizations.weight_norm(nn.Linear(33, 7))),
    "positions": lambda: nn.Sequential(nn.Linear(11, 5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 7)),
    "flattened positions": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(11, 5), nn.Flatten(), nn.Linear(15, 7)),
    "unknown function": lambda: nn.Sequential(nn.Flatten(), nn.Linear(33, 9), nn.Softplus(), nn.Linear(9, 7)),
    "parameter type": of_another_type,
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_followed(name: str) -> None:
    model = OTHERS[name]()
    x, y = torch.randn(6, 3, 11), torch.arange(6)
    assert chain_of(model, x) is None
    norms = all_norms(model, (x, y))
    g2, tau = per_sample_norms_reference(model, (x, y))
    assert relative(norms.g2, g2) < 1e-5
    assert relative(norms.tau, tau) < 1e-5


def test_what_the_surroundings_change_is_followed() -> None:
    model, x, _ = made("one layer", 4)
    assert chain_of(model, x) is not None
    assert chain_of(model.double(), x) is None
    model.float()
    assert chain_of(model, {"x": x}) is None
    with torch.autocast("cpu"):
        assert chain_of(model, x) is None
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        assert chain_of(model, x) is None
    finally:
        handle.remove()
    unseen = nn.Sequential(nn.Flatten(), nn.Linear(33, 7), nn.BatchNorm1d(7, track_running_stats=False))
    assert chain_of(unseen, x) is None
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert chain_of(model, x) is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_on_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, x, y = made(name, 37)
    g2, tau = per_sample_norms_reference(model, (x, y))
    assert chain_of(model.cuda(), x.cuda()) is not None
    norms = all_norms(model, (x.cuda(), y.cuda()))
    assert relative(norms.g2.cpu(), g2) < 1e-5
    assert relative(norms.tau.cpu(), tau) < 1e-5


def test_the_native_operators_are_used() -> None:
    model, x, y = made("nested", 6)
    if ops.native_module() is None:
        pytest.skip("the native extension is not built")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        all_norms(model, (x, y))
    names = {event.key for event in seen.key_averages()}
    assert {"cape::sq_norms", "cape::affine_pull"} <= names
