"""predict() and rank(): a meta-regressor from published rows, a real model, real images, and T* measured."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from authors import rows
from torch import Tensor, nn

import cape
from cape import datasets
from cape.config import StoppingRule
from cape.convergence.later import with_later
from cape.errors import ModelError, SpecError, StoreError
from cape.family_names import RELATIVES
from cape.feature_names import LATER_COLUMNS, LATER_FEATURES
from cape.metamodel.artifact import WEIGHTS, MetaModel
from cape.metamodel.fit import fit_table
from cape.metamodel.presets import PRESETS
from cape.metamodel.rows import row_from_features
from cape.predict import predict, rank
from cape.recognize import infer_family
from cape.timing import StepTimer


@pytest.fixture(scope="module")
def meta_model() -> MetaModel:
    return fit_table(
        rows(every=4), PRESETS["product"].replace(trees=150, learning_rate=0.1, select=False, per_family=True)
    )


@pytest.fixture(scope="module")
def batch(data_root: Path) -> tuple[Tensor, Tensor]:
    return datasets.load("mnist", data_root).batch(64, seed=1, layout="vector")


def mlp(width: int = 128, seed: int = 0) -> nn.Module:
    """The MLP of the published rows: two hidden layers, batch norm, GELU, dropout 0.2, Xavier normal."""
    torch.manual_seed(seed)

    def block(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(0.2)]

    model = nn.Sequential(*block(784), *block(width), nn.Linear(width, 10))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss that no sweep trained with."""
    losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses


@pytest.mark.parametrize("width", [128, 256, 512])
def test_prediction_is_close_to_what_training_measures(
    width: int, meta_model: MetaModel, batch: tuple[Tensor, Tensor]
) -> None:
    model = mlp(width)
    made = predict(model, batch, lr=1e-3, dataset_size=60_000, epsilon=0.1, meta_model=meta_model)
    truth = cape.measure(model, batch, lr=1e-3, epsilons=(0.1,)).t_star[0.1]
    assert truth is not None
    assert abs(made.steps - truth) <= max(1.5, 0.3 * truth)
    assert made.in_domain and made.warnings == ()
    assert made.family == "mlp"
    assert made.p_reach > 0.99
    assert made.epochs == pytest.approx(made.steps * 64 / 60_000)


def test_the_model_and_the_rng_are_left_as_they_were(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    made = predict(model, batch, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    assert made.time() > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_intervals_nest_and_hold_the_prediction(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    made = predict(mlp(), batch, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    narrow, wide = made.interval(0.5), made.interval(0.95)
    assert 1 <= wide[0] < narrow[0] <= made.steps <= narrow[1] < wide[1] < math.inf
    assert made.steps == round(made.steps)
    with pytest.raises(SpecError, match="level"):
        made.interval(1.0)


def test_smaller_epsilon_never_takes_fewer_steps(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    steps = [
        predict(mlp(), batch, lr=1e-3, dataset_size=60_000, epsilon=e, meta_model=meta_model).steps
        for e in (0.2, 0.15, 0.1)
    ]
    assert steps == sorted(steps) and steps[0] < steps[-1]


def test_time_and_cost(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    made = predict(mlp(), batch, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    assert made.to_dict()["seconds"] is None  # nothing is trained until someone asks
    assert made.time(step_seconds=0.5) == pytest.approx(made.steps / 2)
    assert made.cost(usd_per_hour=3600.0, step_seconds=1.0) == pytest.approx(made.steps)
    assert made.time() == made.time()  # measured once
    assert made.to_dict()["seconds"] == pytest.approx(made.time())
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(SpecError, match="positive"):
            made.cost(usd_per_hour=bad)


def test_to_dict_is_strict_json(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    made = predict(mlp(), batch, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    again = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert again["steps"] == made.steps and again["family"] == "mlp"
    assert again["features"]["log_lr"] == pytest.approx(math.log(1e-3))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 1.0}, "learning rate 1 is outside"),
        ({"dataset_size": 500}, "training set size 500"),
        ({"epsilon": 0.9}, "ε = 0.9"),
        ({"family": "diffusion"}, "family 'diffusion'"),
        ({"loss": focal}, "loss 'focal'"),
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "without smoothing or weights"),
        ({"loss": nn.CrossEntropyLoss(weight=torch.linspace(0.2, 2.0, 10), reduction="none")}, "'CrossEntropyLoss'"),
    ],
)
def test_what_was_never_seen_is_said(
    changes: dict[str, object], says: str, meta_model: MetaModel, batch: tuple[Tensor, Tensor]
) -> None:
    arguments = {"lr": 1e-3, "dataset_size": 60_000, "meta_model": meta_model, **changes}
    made = predict(mlp(), batch, **arguments)  # type: ignore[arg-type]
    assert not made.in_domain
    assert any(says in w for w in made.warnings), made.warnings
    assert math.isnan(made.p_reach) and made.to_dict()["p_reach"] is None  # nobody knows what happens out there
    assert math.isinf(made.interval()[1]) == (changes.get("family") is not None)


def test_a_loss_is_known_by_what_it_does(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    ways = [
        nn.CrossEntropyLoss(),
        lambda o, t: nn.functional.cross_entropy(o, t),
        lambda o, t: nn.functional.nll_loss(o.log_softmax(1), t, reduction="none"),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda o, t: 1000 * nn.functional.cross_entropy(o, t),
    ]
    named = predict(mlp(), batch, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    for loss in ways:
        made = predict(mlp(), batch, loss=loss, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
        assert made.in_domain and made.steps == named.steps
    ended = nn.Sequential(mlp(), nn.LogSoftmax(1))
    made = predict(ended, batch, loss=nn.NLLLoss(), lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    assert not any("loss" in w for w in made.warnings)
    weighted = nn.CrossEntropyLoss(weight=torch.linspace(0.1, 1.0, 10))
    made = predict(mlp(), batch, loss=weighted, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    assert any("not one of those" in w for w in made.warnings)

    def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        return focal(outputs, targets)

    made = predict(mlp(), batch, loss=cross_entropy, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    assert not made.in_domain


def test_out_of_the_domain_no_interval_is_a_point(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    made = predict(mlp(), batch, lr=1.0, dataset_size=60_000, meta_model=meta_model)
    spans = [made.interval(level) for level in (0.1, 0.5, 0.9, 0.95)]
    assert spans[0][0] < spans[0][1]
    assert all(a[0] >= b[0] and a[1] <= b[1] for a, b in zip(spans, spans[1:], strict=False))


def test_a_misspelt_family_is_no_family_of_ones_own(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    for wrong, says in (("MLP", "Did you mean 'mlp'"), ("r n n", "'rnn'"), (3, "a name, not 3")):
        with pytest.raises(SpecError, match=says):
            predict(mlp(), batch, lr=1e-3, dataset_size=100, meta_model=meta_model, family=wrong)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    plain = predict(mlp(), batch, lr=1e-3, dataset_size=60_000, epsilon=0.125, meta_model=meta_model)
    typed = predict(
        mlp(), batch, lr=np.float64(1e-3), dataset_size=np.int64(60_000), epsilon=np.float32(0.125),
        meta_model=meta_model,
    )  # type: ignore[arg-type]  # fmt: skip
    assert typed == plain


@pytest.mark.parametrize(
    ("loss", "targets", "says"),
    [
        ("mse", torch.arange(16) % 10, "targets of the same shape"),
        (nn.MSELoss(), torch.arange(16) % 10, "'MSELoss' cannot be computed"),
        (nn.BCEWithLogitsLoss(), torch.arange(16) % 10, "'BCEWithLogitsLoss' cannot be computed"),
        ("cross_entropy", torch.linspace(0.0, 1.0, 16), "'cross_entropy' cannot be computed"),
        (lambda outputs, targets: 1.0, torch.arange(16) % 10, "returned float; return a tensor"),
        (lambda outputs, targets: outputs.detach().mean(), torch.arange(16) % 10, "does not depend on the outputs"),
    ],
    ids=["shape", "mean of squares", "binary", "fractions for labels", "a number", "detached"],
)
def test_a_loss_that_does_not_fit_is_one_clear_error(
    loss: Any, targets: Tensor, says: str, meta_model: MetaModel, batch: tuple[Tensor, Tensor]
) -> None:
    data = batch[0][:16], targets
    for call in (
        lambda: predict(mlp(), data, loss=loss, lr=1e-3, dataset_size=100, meta_model=meta_model),
        lambda: cape.measure(mlp(), data, loss=loss),
        lambda: cape.per_sample_norms(mlp(), data, loss=loss),
    ):
        with pytest.raises(ModelError, match=says):
            call()


def test_whole_numbers_serve_a_single_output_and_any_integers_are_labels(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch[0][:16], torch.arange(16) % 2
    one = nn.Sequential(*list(mlp())[:-1], nn.Linear(128, 1))
    for loss in ("bce", "mse", "one_hot_mse"):
        whole, real = (cape.per_sample_norms(one, (x, t), loss=loss) for t in (y, y.float()[:, None]))
        assert all(map(torch.equal, whole, real))
    labels = [cape.per_sample_norms(mlp(), (x, y.to(kind))) for kind in (torch.int64, torch.int32, torch.uint8)]
    assert all(torch.equal(a[0], labels[0][0]) for a in labels)


def test_a_fifty_times_larger_model_is_out_of_domain(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    made = predict(mlp(4096), batch, lr=1e-3, dataset_size=60_000, meta_model=meta_model)
    assert not made.in_domain and any("parameter count" in w for w in made.warnings)


def test_bad_input_is_one_clear_error(meta_model: MetaModel, batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    good = {"lr": 1e-3, "dataset_size": 60_000, "meta_model": meta_model}
    for change in ({"lr": -1.0}, {"epsilon": 1.0}, {"dataset_size": 0}, {"dataset_size": 1.5}):
        with pytest.raises(SpecError):
            predict(mlp(), batch, **{**good, **change})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="empty"):
        predict(mlp(), (batch[0][:0], batch[1][:0]), **good)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="cape fit"):
        predict(mlp(), batch, lr=1e-3, dataset_size=60_000, meta_model=tmp_path / "none")
    with pytest.raises(SpecError, match=r"nn\.Module"):
        predict("resnet18", batch, **good)  # type: ignore[arg-type]


def test_short_steps_are_timed_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    from cape import convergence

    asked: list[int] = []

    def measured(model: float, _: object, *, stopping: StoppingRule, **__: object) -> SimpleNamespace:
        asked.append(stopping.max_steps)
        return SimpleNamespace(step_seconds=model)

    monkeypatch.setattr(convergence, "measure", measured)
    for takes, steps in ((1e-3, [4, 50]), (0.01, [4, 10]), (0.1, [4]), (math.nan, [4])):
        asked.clear()
        StepTimer(takes, (None, None), "mse", 1e-3).seconds()  # type: ignore[arg-type]
        assert asked == steps


def test_an_error_names_its_candidate(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    good, bad = ("good", mlp(), batch, 1e-3), ("second", mlp(), batch, -1.0)
    with pytest.raises(SpecError, match="The candidate 'second': The learning rate"):
        rank([good, bad], dataset_size=60_000, meta_model=meta_model)
    with pytest.raises(SpecError, match=r"tuples \(name, model, batch, lr\), not None"):
        rank(None, dataset_size=60_000, meta_model=meta_model)  # type: ignore[arg-type]


def test_rank_orders_by_cost(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    model = mlp()
    candidates = [(f"lr {lr:g}", model, batch, lr) for lr in (5e-4, 2e-3, 1e-3)]
    table = rank(candidates, dataset_size=60_000, usd_per_hour=2.5, meta_model=meta_model)
    assert [r.seconds for r in table] == sorted(r.seconds for r in table)
    assert len(table) == 3
    lines = str(table).splitlines()
    assert len(lines) == 4 and "USD" in lines[0] and table[0].name in lines[1]
    assert json.loads(json.dumps(table.to_dict(), allow_nan=False))[0]["rank"] == 1
    wild = rank([("wild", model, batch, 1e30), *candidates], dataset_size=60_000, meta_model=meta_model)
    assert wild[-1].name == "wild" and wild.to_dict()[-1]["seconds"] is None
    with pytest.raises(SpecError, match="nothing to rank"):
        rank([], dataset_size=60_000, meta_model=meta_model)
    with pytest.raises(SpecError, match="tuple"):
        rank([(model, batch)], dataset_size=60_000, meta_model=meta_model)  # type: ignore[list-item]


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Conv1d(3, 4, 3), nn.GRU(4, 4)


class ChannelAttention(nn.Module):
    """A gate of a convolutional network, no transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(4, 4, 1)


def _block(**parts: nn.Module) -> nn.Module:
    """A module of no telling class, with parts of these names, in a network."""
    block = nn.Module()
    for name, part in parts.items():
        block.add_module(name, part)
    return nn.Sequential(nn.Linear(4, 4), block)


@pytest.mark.parametrize(
    ("build", "family"),
    [
        (lambda: _block(qkv=nn.Linear(4, 12)), "transformer"),
        (lambda: _block(q_proj=nn.Linear(4, 4), k_proj=nn.Linear(4, 4)), "transformer"),
        (lambda: _block(query=nn.Linear(4, 4), document=nn.Linear(4, 4)), "mlp"),  # two towers
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), "mlp"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), "cnn"),
        (lambda: nn.LSTM(4, 4), "rnn"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 4), nn.TransformerEncoderLayer(8, 2)), "transformer"),
        (ChannelAttention, "cnn"),
        (_Mixed, None),
    ],
)
def test_family_is_what_the_layers_say(build: object, family: str | None) -> None:
    assert infer_family(build()) == family  # type: ignore[operator]


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn", "transformer", *RELATIVES])
def test_our_own_families_are_recognized(name: str, data_root: Path) -> None:
    import numpy as np

    from cape import families

    family = families.get(name)
    dataset = datasets.load("mnist", data_root)
    for seed in range(4):
        model = family.build(family.sample(np.random.default_rng(seed), dataset))
        assert infer_family(model) == RELATIVES.get(name, name)


def test_importing_the_module_does_not_hide_the_function() -> None:
    code = (
        "import cape\nfrom cape.predict import rank\nimport cape.predict\n"
        "assert cape.rank is rank and callable(cape.predict)\n"
        "try:\n    cape.predict(None, None, lr=-1.0, dataset_size=1)\n"
        "except cape.SpecError as error:\n    assert 'learning rate' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_shipped_model_takes_a_model_for_an_ordinary_one_unless_it_knows_the_papers_far_better(
    data_root: Path,
) -> None:
    from cape import families

    mnist = datasets.load("mnist", data_root)
    batch = mnist.batch(64, 0, "vector")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    papers = families.get("mlp").sample(np.random.default_rng(0), mnist)
    torch.manual_seed(0)
    made = [predict(model, batch, lr=1e-3, dataset_size=60_000) for model in (plain, families.build(papers))]
    assert [m.family for m in made] == ["dense", "mlp"] and all(m.in_domain for m in made)
    named = predict(plain, batch, lr=1e-3, dataset_size=60_000, family="mlp")
    assert named.family == "mlp" and not named.in_domain


def test_a_model_whose_head_starts_at_zero_is_judged_by_its_second_look(batch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = predict(model, batch, lr=1e-3, dataset_size=60_000)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert made.family == "dense, head at zero" and made.in_domain
    told = with_later(made.features, model, batch, loss="cross_entropy", lr=1e-3, dataset_size=60_000)
    shipped = MetaModel.load(WEIGHTS)
    assert made.steps == shipped.predict(row_from_features(told, "dense", 0.1))[0]
    at_first = {**told, **{column: told[name] for name, column in zip(LATER_FEATURES, LATER_COLUMNS, strict=True)}}
    assert not shipped.domain.check(row_from_features(at_first, "dense", 0.1))[0]  # type: ignore[union-attr]
