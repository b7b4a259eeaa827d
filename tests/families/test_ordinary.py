"""Models as people write them: what is drawn, and that the probe and the engines know it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from cape import datasets, families
from cape.config import ModelSpec, SweepSpec
from cape.errors import SpecError
from cape.families import backbone, makes, recurrent
from cape.family_names import LANGUAGE, RELATIVES, related
from cape.probing.per_sample import per_sample_norms
from cape.probing.reference import per_sample_norms_reference
from cape.sweep.plan import Plan
from cape.tasks import TASK_LOSS, Loss
from cape.trial import run_trials
from tests.families.test_families import COLOUR, GRAY, LABELS, TABLE, TOKENS, WORDS, batch, built, parameters

NAMES = tuple(name for name in RELATIVES if name != "backbone")  # whose nets are large; `tests/probing` has them
SEVERAL = [(name, seed) for name in NAMES for seed in range(9)]


def drawn(family: str, seed: int, info: object = GRAY) -> ModelSpec:
    return families.get(family).sample(np.random.default_rng(seed), info)  # type: ignore[arg-type]


def test_every_make_is_drawn() -> None:
    made = {name: [drawn(name, seed) for seed in range(200)] for name in RELATIVES}
    seen = {n: {k: {str(s.options[k]) for s in specs} for k in specs[0].options} for n, specs in made.items()}
    assert seen["dense"]["norm"] == {"none", "batch", "layer"} and seen["convnet"]["norm"] == {"none", "batch", "group"}
    for name in ("dense", "convnet"):
        assert seen[name]["activation"] == set(makes.ACTIVATIONS)
        assert seen[name]["init"] == set(makes.INITS) - {"small"}
    assert seen["encoder"]["init"] == {"torch", "xavier_uniform", "small"}
    for name in NAMES:
        assert 0.1 < np.mean([s.options.get("head") == "zero" for s in made[name]]) < 0.25
    assert seen["convnet"]["pool"] == {"max", "avg", "stride"} and "0" in seen["convnet"]["hidden"]
    assert seen["recurrent"]["cell"] == set(recurrent.CELLS)
    assert seen["recurrent"]["readout"] == {"last", "mean", "max", "state"}
    assert seen["encoder"]["readout"] == {"mean", "last", "class"}
    assert seen["encoder"]["position"] == {"none", "learned", "sinusoidal"}
    assert {s.layout for s in made["encoder"]} == {"rows", "image"}
    assert {(s.options["net"], s.options["fine"]) for s in made["backbone"]} == {
        (net, fine) for net in backbone.NETS for fine in (False, True)
    }
    assert max(parameters(s) for name in NAMES for s in {t.to_json(): t for t in made[name]}.values()) < 4_000_000


def test_every_make_of_a_model_of_tokens_is_drawn() -> None:
    made = {name: [drawn(name, seed, WORDS) for seed in range(200)] for name in NAMES}
    for specs in made.values():
        assert {s.layout for s in specs} == {"tokens"} and {s.options.get("head", "init") for s in specs} == {"init"}
        lookups = [s.options["lookup"] for s in specs]
        assert {lookup["vocabulary"] for lookup in lookups} == {5, 25, 50, 100, 200}
        assert {lookup["std"] for lookup in lookups} == {1.0, 0.1, 0.02}
    assert {s.options["lookup"]["pooled"] for s in made["dense"]} == {"mean", "max", "flat"}
    assert {tuple(s.options.get("widths", ())) for s in made["convnet"]} == {(), (3, 4, 5)}
    following = {name: [drawn(name, seed, TOKENS) for seed in range(100)] for name in ("recurrent", "encoder")}
    assert {s.options["readout"] for specs in following.values() for s in specs} == {"each"}
    assert {s.options["lookup"]["vocabulary"] for specs in following.values() for s in specs} == {97}
    tied = [s for s in following["encoder"] if s.options.get("tied")]
    assert 0.2 < len(tied) / 100 < 0.5 and all(s.options["lookup"]["std"] == 0.02 for s in tied)
    model = built(tied[0])
    assert model.head.weight is model.embed.table.weight
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_tokens_beyond_a_vocabulary_are_read_as_the_unknown_one() -> None:
    spec = next(s for s in (drawn("dense", i, WORDS) for i in range(99)) if s.options["lookup"]["vocabulary"] == 25)
    model, (x, _) = built(spec).eval(), batch(spec, 4)
    with torch.no_grad():
        assert int(x.max()) >= 25 and torch.equal(model(x), model(x.where(x < 25, 1)))
        assert not torch.equal(model(x), model(x.where(x < 25, 2)))


@pytest.mark.parametrize(("name", "seed"), SEVERAL)
def test_it_builds_again_trains_and_is_probed_exactly(name: str, seed: int) -> None:
    of_tokens = (WORDS, WORDS, TOKENS if name in ("recurrent", "encoder") else WORDS)
    info = (GRAY, COLOUR, LABELS)[seed % 3] if seed < 6 else of_tokens[seed - 6]
    spec = min((drawn(name, s, info) for s in range(4 * seed, 4 * seed + 4)), key=parameters)
    assert ModelSpec.from_json(spec.to_json()) == spec
    model, again = built(spec), built(spec)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    torch.manual_seed(1)
    x, y = batch(spec, 3)
    loss = Loss(TASK_LOSS[spec.task])
    value = loss.mean(model.train()(x), y)
    value.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    found = per_sample_norms(again, (x, y), loss=TASK_LOSS[spec.task])
    g2, tau = per_sample_norms_reference(again, (x, y), loss=TASK_LOSS[spec.task])
    torch.testing.assert_close(found[0].double(), g2, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].double(), tau, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_trials_of_one_make_may_share_a_stack(name: str, data_root: Path) -> None:
    """Replicates have one model: whatever engine is chosen for them, T* is what each has alone."""
    spec = SweepSpec(
        families=(name,), datasets=("mnist",), lrs=(1e-3,), batch_sizes=(16,), epsilons=(0.5,), trials_per_cell=6,
        replicates=3, seed=3,
    )  # fmt: skip
    trials = list(Plan(spec).trials())
    assert len({t.model_seed for t in trials}) == 2
    stars = [
        {r["trial_id"]: r["t_star"] for rows in run_trials(trials, data_root=data_root, engine=engine) for r in rows}
        for engine in ("single", "auto")
    ]
    assert stars[0] == stars[1] and all(stars[0].values())


def test_an_initialization_is_what_its_name_says() -> None:
    options = {"widths": [400], "norm": "none", "activation": "relu"}
    spec = ModelSpec("dense", "dense", "vector", (784,), 10)
    bounds = {"torch": 784**-0.5, "kaiming_uniform": (6 / 784) ** 0.5, "xavier_uniform": (6 / 1184) ** 0.5}
    for init, bound in bounds.items():
        layer = built(spec.replace(options={**options, "init": init}))[0]
        assert isinstance(layer, nn.Linear)
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=1e-3)
        assert bool(layer.bias.detach().any()) == (init == "torch")
    options = recurrent.RecurrentOptions("gru", 1, 16, False, "mean", "orthogonal").to_dict()
    model = built(ModelSpec("recurrent", "recurrent", "rows", (28, 28), 10, options=options))
    weight = model.rnn.weight_hh_l0.detach()
    torch.testing.assert_close(weight.T @ weight, torch.eye(16), rtol=0, atol=1e-5)


def test_readouts_see_what_they_say() -> None:
    x = torch.randn(2, 5, 3)
    for readout in ("last", "mean", "max", "state"):
        options = recurrent.RecurrentOptions("lstm", 2, 4, True, readout, "torch").to_dict()
        model = built(ModelSpec("recurrent", "recurrent", "rows", (5, 3), 2, options=options)).eval()
        with torch.no_grad():
            outputs = model.rnn(x)[0]
            seen = {
                "last": outputs[:, -1],
                "mean": outputs.mean(1),
                "max": outputs.amax(1),
                "state": torch.cat([outputs[:, -1, :4], outputs[:, 0, 4:]], dim=1),
            }[readout]
            torch.testing.assert_close(model(x), model.head(seen))


def test_what_does_not_fit_is_refused() -> None:
    for name in ("dense", "convnet"):
        with pytest.raises(SpecError):
            drawn(name, 0, TOKENS)
    with pytest.raises(SpecError):
        drawn("convnet", 0, TABLE)
    assert drawn("encoder", 0, TABLE).layout == "rows"
    with pytest.raises(SpecError, match="does not say what its tokens are"):
        drawn("dense", 0, replace(WORDS, vocabulary=0))
    spec = drawn("encoder", 0, TABLE)
    with pytest.raises(SpecError, match="take rows or image or tokens, not 'vector'"):
        families.build(spec.replace(layout="vector"))
    with pytest.raises(SpecError, match="'lookup'"):
        families.build(spec.replace(layout="tokens", input_shape=(13,)))
    for name, option, value in (
        ("recurrent", "readout", "last"), ("encoder", "readout", "mean"), ("recurrent", "bidirectional", True),
        ("encoder", "lookup", {"vocabulary": 97, "dim": 4}), ("recurrent", "lookup", {"vocabulary": 1, "dim": 4}),
    ):  # fmt: skip
        spec = next(s for s in (drawn(name, i, TOKENS) for i in range(9)) if not s.options.get("tied"))
        with pytest.raises(SpecError, match="'vocabulary'" if value == {"vocabulary": 1, "dim": 4} else f"'{option}'"):
            families.build(spec.replace(options={**spec.options, option: value}))
    for name, option, value in (
        ("dense", "norm", "group"), ("convnet", "pool", "min"), ("recurrent", "readout", "first"),
        ("encoder", "heads", 5), ("dense", "init", "zeros"), ("convnet", "kernel", 4),
        ("backbone", "net", "vit_b_16"),
    ):  # fmt: skip
        spec = drawn(name, 0)
        with pytest.raises(SpecError, match=f"'{option}'"):
            families.build(spec.replace(options={**spec.options, option: value}))


def test_each_stands_beside_one_of_the_papers_families() -> None:
    assert (
        related("mlp") == ("mlp", "dense")
        and related("cnn") == ("cnn", "convnet", "backbone")
        and related("linear") == ("linear",)
        and related("rnn", LANGUAGE) == ("recurrent, language",)
    )
    assert set(RELATIVES.values()) == {"mlp", "cnn", "rnn", "transformer"}


def test_backbones_are_torchvisions(data_root: Path) -> None:
    small, large = datasets.load("mnist@28", data_root), datasets.load("cifar10@96", data_root)
    nets = {drawn("backbone", seed, small).options["net"] for seed in range(200)}
    assert nets == set(backbone.NETS) - {"densenet121", "convnext_tiny"}  # whose maps would vanish
    assert not any(drawn("backbone", seed, large).options["fine"] for seed in range(50))
    spec = ModelSpec("backbone", "backbone", "image", (3, 32, 32), 10, options={"net": "resnet18", "fine": False})
    torch.manual_seed(4)
    same = models.resnet18(num_classes=10)
    assert all(torch.equal(a, b) for a, b in zip(built(spec, 4).parameters(), same.parameters(), strict=True))
    fine = built(spec.replace(options={"net": "resnet18", "fine": True}, input_shape=(1, 28, 28)))
    stem = fine.conv1
    assert (stem.in_channels, stem.kernel_size, stem.stride) == (1, (3, 3), (1, 1))
    assert isinstance(fine.maxpool, nn.Identity) and fine.eval()(torch.randn(2, 1, 28, 28)).shape == (2, 10)
