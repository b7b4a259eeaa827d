"""Every architecture on every layout: what it draws, builds, gives, and how it trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from cape import families
from cape.config import ModelSpec
from cape.errors import SpecError
from cape.families.cnn import MAX_PARAMETERS
from cape.families.transformer import PRESETS
from cape.tasks import TASK_LOSS, Loss


@dataclass(frozen=True)
class Info:
    """A dataset's description alone: sampling needs no data."""

    name: str
    task: str
    outputs: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    gray: bool = False
    vocabulary: int = 0

    @property
    def layouts(self) -> tuple[str, ...]:
        return tuple(layout for layout, _ in self.shapes)

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        return dict(self.shapes)[layout]


COLOUR = Info("colour", "classification", 10, (("vector", (3072,)), ("rows", (32, 96)), ("image", (3, 32, 32))))
GRAY = Info("gray", "classification", 10, (("vector", (784,)), ("rows", (28, 28)), ("image", (3, 32, 32))), True)
LABELS = Info("labels", "multilabel", 7, COLOUR.shapes)
TABLE = Info("table", "regression", 1, (("vector", (13,)), ("rows", (13, 1))))
TOKENS = Info("tokens", "sequence", 97, (("tokens", (24,)),), vocabulary=97)
WORDS = Info("words", "classification", 3, (("tokens", (24,)),), vocabulary=50)
INFOS = (COLOUR, GRAY, LABELS, TABLE, TOKENS, WORDS)


def draws(family: str, info: Info, count: int, reference: bool = False) -> list[ModelSpec]:
    sample = families.get(family).sample
    return [sample(np.random.default_rng(seed), info, reference=reference) for seed in range(count)]


def one_of_each() -> tuple[list[ModelSpec], list[ModelSpec]]:
    """Return the smallest draw of each architecture for each kind of dataset, and the largest for the main kinds."""
    small: list[ModelSpec] = []
    large: list[ModelSpec] = []
    for name in families.names():
        for info in INFOS:
            try:
                families.get(name).layout_for(info)
            except SpecError:
                continue
            by_architecture: dict[str, list[ModelSpec]] = {}
            for spec in draws(name, info, 40):
                by_architecture.setdefault(spec.architecture, []).append(spec)
            for specs in by_architecture.values():
                specs.sort(key=lambda s: (parameters(s), s.to_json()))
                small.append(specs[0])
                large += [specs[-1]] if info in (COLOUR, TOKENS) else []
    return small, large


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def parameters(spec: ModelSpec) -> int:
    return _parameters(spec.to_json())


@cache
def _parameters(spec_json: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in families.build(ModelSpec.from_json(spec_json)).parameters())


def built(spec: ModelSpec, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return families.build(spec)


def batch(spec: ModelSpec, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if spec.layout == "tokens":
        count = spec.outputs if spec.task == "sequence" else 50
        tokens = torch.randint(count, (size, spec.input_shape[0] + 1))
        return tokens[:, :-1], tokens[:, 1:] if spec.task == "sequence" else torch.randint(spec.outputs, (size,))
    x = torch.randn(size, *spec.input_shape)
    if spec.task == "regression":
        return x, torch.randn(size)
    if spec.task == "multilabel":
        return x, torch.randint(2, (size, spec.outputs)).float()
    return x, torch.randint(spec.outputs, (size,))


def ids(specs: list[ModelSpec]) -> list[str]:
    return [f"{s.architecture}-{s.layout}-{s.task}-{i}" for i, s in enumerate(specs)]


SPECS, LARGE = one_of_each()


def test_every_architecture_is_drawn() -> None:
    assert families.names() == (
        "mlp",
        "cnn",
        "rnn",
        "transformer",
        "dense",
        "convnet",
        "recurrent",
        "encoder",
        "backbone",
    )
    drawn = {(s.family, s.architecture) for s in SPECS}
    assert drawn == {(n, a) for n in families.names() for a in families.get(n).architectures}
    assert {(s.family, s.layout) for s in SPECS} == {
        ("mlp", "vector"), ("cnn", "image"), ("rnn", "rows"), ("rnn", "tokens"),
        ("transformer", "image"), ("transformer", "tokens"), ("dense", "vector"), ("convnet", "image"),
        ("recurrent", "rows"), ("encoder", "rows"), ("encoder", "image"), ("backbone", "image"),
        *((name, "tokens") for name in ("dense", "convnet", "recurrent", "encoder")),
    }  # fmt: skip


@pytest.mark.parametrize("spec", LARGE, ids=ids(LARGE))
def test_the_largest_of_each_round_trips(spec: ModelSpec) -> None:
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    assert same_state(built(spec), built(again))


@pytest.mark.parametrize("spec", SPECS, ids=ids(SPECS))
def test_shape_determinism_round_trip_and_step(spec: ModelSpec) -> None:
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    model, twin = built(spec), built(again)
    assert same_state(model, twin)
    assert not same_state(model, built(spec, seed=1))

    torch.manual_seed(5)
    x, y = batch(spec, 2)  # the smallest batch that batch norm trains on
    loss = Loss(TASK_LOSS[spec.task])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(2):  # the first moves the head alone where it starts at zero
        outputs = model.train()(x)
        assert outputs.shape[1:] == ((spec.input_shape[0],) if spec.task == "sequence" else ()) + (spec.outputs,)
        value = loss.mean(outputs, y)
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
    with torch.no_grad():
        assert torch.isfinite(value) and torch.isfinite(loss.mean(model(x), y))
    assert all(not torch.equal(before, after) for before, after in zip(twin.parameters(), model.parameters()))


@pytest.mark.parametrize("spec", SPECS, ids=ids(SPECS))
def test_samples_do_not_interact_in_eval_mode(spec: ModelSpec) -> None:
    model = built(spec).eval()
    x, _ = batch(spec, 2)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(x[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["lstm", "gru", "causal", "recurrent", "encoder"])
def test_sequence_models_do_not_see_the_future(architecture: str) -> None:
    spec = next(s for s in SPECS if s.architecture == architecture and s.task == "sequence")
    model = built(spec).eval()
    x, _ = batch(spec, 2)
    changed = x.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % spec.outputs
    with torch.no_grad():
        before, after = model(x), model(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[:, 15:], after[:, 15:], atol=1e-3)


def test_sampling_leaves_torch_alone_and_depends_on_the_rng_only() -> None:
    state = torch.get_rng_state()
    for name in families.names():
        assert draws(name, COLOUR if name != "mlp" else TABLE, 5) == draws(name, COLOUR if name != "mlp" else TABLE, 5)
    assert torch.equal(state, torch.get_rng_state())


def test_mlp_draws() -> None:
    gray, colour = draws("mlp", GRAY, 200), draws("mlp", COLOUR, 200)
    assert {(s.options["depth"], s.options["width"]) for s in gray} == {(d, w) for d in (2, 3) for w in (128, 256, 512)}
    assert {(s.options["depth"], s.options["width"]) for s in colour} == {
        (d, w) for d in (2, 3, 4) for w in (128, 256, 512, 1024)
    }
    assert {s.options["activation"] for s in gray} == {"gelu", "relu"}
    assert {s.options["dropout"] for s in gray} == {0.2}
    reference = draws("mlp", COLOUR, 100, reference=True)
    assert {s.options["activation"] for s in reference} == {"gelu"}
    assert {s.options["width"] for s in reference} == {256, 512, 1024}


def test_mlp_initialization_follows_the_activation() -> None:
    for activation, variance in (("gelu", 2 / (784 + 512)), ("relu", 2 / 784)):
        options = {"depth": 2, "width": 512, "activation": activation}
        layer = built(ModelSpec("mlp", "mlp", "vector", (784,), 10, options=options))[0]
        assert isinstance(layer, nn.Linear)
        assert float(layer.weight.detach().var()) == pytest.approx(variance, rel=0.02)
        assert not layer.bias.any()


def test_cnn_draws() -> None:
    specs = draws("cnn", COLOUR, 400)
    shares = {a: sum(s.architecture == a for s in specs) / len(specs) for a in ("vgg", "resnet", "mobilenetv2")}
    # A colour ResNet of repeats 222 exceeds 2 million parameters and is drawn again: .35 -> .175 / .825.
    assert shares["vgg"] == pytest.approx(0.5 / 0.825, abs=0.07)
    assert shares["resnet"] == pytest.approx(0.175 / 0.825, abs=0.07)
    assert shares["mobilenetv2"] == pytest.approx(0.15 / 0.825, abs=0.07)
    assert {tuple(s.options["repeats"]) for s in specs if s.architecture == "resnet"} == {(1, 1, 1)}
    assert {s.options["dropout"] for s in specs} == {0.0, 0.1}
    gray = draws("cnn", GRAY, 200)
    assert {tuple(s.options["repeats"]) for s in gray if s.architecture == "resnet"} == {(1, 1, 1), (2, 2, 2)}
    assert {tuple(s.options["channels"]) for s in gray if s.architecture == "vgg"} == {(32, 64, 128)}
    assert {tuple(s.options["repeats"]) for s in gray if s.architecture == "vgg"} == {(1, 1, 1), (2, 1, 1), (2, 2, 1)}
    assert {s.options["width"] for s in gray if s.architecture == "mobilenetv2"} == {0.5, 0.75}
    distinct = {s.to_json(): s for s in specs + gray}.values()
    assert max(parameters(s) for s in distinct) <= MAX_PARAMETERS


def test_a_cnn_that_cannot_stay_small_is_refused() -> None:
    with pytest.raises(SpecError, match="2,000,000 parameters"):
        draws("cnn", Info("huge", "classification", 100_000, COLOUR.shapes), 1)


def test_rnn_draws() -> None:
    specs = draws("rnn", COLOUR, 400)
    keys = {(s.architecture, s.options["layers"], s.options["hidden"], s.options["bidirectional"]) for s in specs}
    assert len(keys) == 2 * 3 * 3 * 2
    assert not any(s.options["bidirectional"] for s in draws("rnn", TOKENS, 50))


def test_transformer_draws() -> None:
    reference = draws("transformer", COLOUR, 60, reference=True)
    assert {s.architecture: dict(s.options) for s in reference} == {a: o.to_dict() for a, o in PRESETS.items()}
    specs = draws("transformer", COLOUR, 200)
    randomized = [s for s in specs if dict(s.options) != PRESETS[s.architecture].to_dict()]
    assert 0.15 < len(randomized) / len(specs) < 0.35
    assert len({s.to_json() for s in randomized}) > 30
    assert max(parameters(s) for s in {s.to_json(): s for s in specs}.values()) < 2_800_000
    # What the published presets add up to, worked out by hand from dims, depths and MLP ratio.
    block = {d: 8 * d * d + 11 * d for d in (96, 128, 192)}
    counts = {s.architecture: parameters(s) for s in reference}
    assert counts["vit"] == 6 * block[192] + (48 + 1) * 192 + 65 * 192 + 192 + 2 * 192 + 193 * 10
    assert counts["cct"] == 4 * block[128] + 27 * 64 + 128 + 64 * 9 * 128 + 256 + 256 * 128 + 256 + 129 * 10
    assert counts["pit"] == (
        2 * block[96] + 2 * block[192] + 49 * 96 + 64 * 96 + 97 * 192 + 16 * 192 + 2 * 192 + 193 * 10
    )


def test_images_of_any_size_are_cut_into_patches_that_make_them_up() -> None:
    def of_side(side: int) -> Info:
        return Info(f"digits@{side}", "classification", 10, (("image", (1, side, side)),))

    for family in ("encoder", "transformer"):
        whole = draws(family, of_side(32), 120)
        for side in (28, 12, 4):
            specs = draws(family, of_side(side), 120)
            assert not any(side % s.options.get("patch", 1) for s in specs)
            for spec, same in zip(specs, whole, strict=True):  # all that fits stays as it was drawn
                if spec.architecture == same.architecture:
                    changed = {k for k, v in spec.options.items() if v != same.options[k]}
                    assert changed <= {"patch"} and (not changed or side % same.options["patch"])
            for spec in {s.options.get("patch", s.architecture): s for s in specs}.values():
                assert built(spec)(torch.randn(2, 1, side, side)).shape == (2, 10)
    assert {s.architecture for s in draws("transformer", of_side(4), 40)} == {"vit", "cct"}  # a PiT pools
    assert {s.architecture for s in draws("transformer", of_side(30), 40)} == {"cct"}
    with pytest.raises(SpecError, match="patches of 4 or 8 pixels, .* 'digits@30', 30x30"):
        draws("encoder", of_side(30), 1)


def test_reference_preprocessing_differs_by_family() -> None:
    assert families.get("cnn").preprocess_for("reference") == "reference"
    assert families.get("transformer").preprocess_for("reference") == "reference_normalized"
    assert {families.get(n).preprocess_for("standard") for n in families.names()} == {"standard"}


def test_wrong_names_and_options_are_refused() -> None:
    with pytest.raises(SpecError, match="Did you mean 'transformer'"):
        families.get("transfomer")
    with pytest.raises(SpecError, match="'cnn' takes image"):
        families.get("cnn").layout_for(TABLE)
    with pytest.raises(SpecError, match="'mlp' takes vector"):
        families.get("mlp").layout_for(TOKENS)
    with pytest.raises(SpecError, match=r"takes rows or tokens \(sequence\), but the dataset 'words'"):
        families.get("rnn").layout_for(WORDS)
    good = SPECS[0]
    for changes, message in [
        ({"options": {**good.options, "widht": 3}}, "Did you mean 'width'"),
        ({"options": {**good.options, "depth": 0}}, "'depth' of an MLP cannot be 0"),
        ({"options": {"depth": 2}}, "needs the key 'width'"),
        ({"architecture": "mpl"}, "Did you mean 'mlp'"),
        ({"layout": "rows"}, "take vector, not 'rows'"),
        ({"input_shape": (2, 3)}, "input shape of 1 sizes"),
        ({"task": "sequence"}, "have no task 'sequence'"),
    ]:
        with pytest.raises(SpecError, match=message):
            families.build(good.replace(**changes))
    with pytest.raises(SpecError, match="of the family 'mlp'"):
        families.get("cnn").build(good)
    rnn = next(s for s in SPECS if s.family == "rnn" and s.layout == "tokens")
    with pytest.raises(SpecError, match="cannot be bidirectional"):
        families.build(rnn.replace(options={**rnn.options, "bidirectional": True}))
    vit = next(s for s in SPECS if s.architecture == "vit")
    for options, message in [({"heads": 5}, "'heads'"), ({"patch": 5}, "'patch'"), ({"dropout": 1.0}, "'dropout'")]:
        with pytest.raises(SpecError, match=message):
            families.build(vit.replace(options={**PRESETS["vit"].to_dict(), **options}))
    with pytest.raises(SpecError, match="does not take the layout"):
        families.build(vit.replace(architecture="causal", options={"dim": 8, "depth": 1, "heads": 1}))


def test_a_family_of_ones_own() -> None:
    class Linear(families.Family):
        name, layouts, architectures = "linear_test", ("vector",), ("linear",)

        def sample(self, rng, dataset, *, reference=False):  # type: ignore[no-untyped-def]
            return self.spec("linear", dataset, Empty())

        def build(self, spec):  # type: ignore[no-untyped-def]
            return nn.Linear(spec.input_shape[0], spec.outputs)

    from cape.families import registry
    from cape.jsonconfig import JsonConfig

    class Empty(JsonConfig):
        pass

    try:
        families.register(Linear())
        spec = draws("linear_test", TABLE, 1)[0]
        assert families.build(spec)(torch.zeros(2, 13)).shape == (2, 1)
    finally:
        registry._FAMILIES.pop("linear_test")
    with pytest.raises(SpecError, match="instance of"):
        families.register(Linear)  # type: ignore[arg-type]
    for name in ("", "a/b", "a, b", "x" * 65, 3):  # it is in the names of files and folders
        wrong = Linear()
        wrong.name = name  # type: ignore[misc, assignment]
        with pytest.raises(SpecError, match="1 to 64 letters, digits"):
            families.register(wrong)
