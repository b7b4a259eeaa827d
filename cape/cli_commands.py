"""The commands of ``cape.cli``, each named as on the command line; every one takes the parsed arguments.

They check what is cheap to check, call the public function, and print. Nothing here computes. What a user's model
prints goes to stderr, so that stdout holds the result alone.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from cape.cli_sweep import status, stop, store, submit, sweep
from cape.config import check_epsilon, check_epsilons, check_lr
from cape.errors import CapeError, DependencyError, StoreError

if TYPE_CHECKING:
    from cape.predict import Prediction

__all__ = ["status", "stop", "store", "submit", "sweep"]  # and every function below


def fit(args: argparse.Namespace) -> None:
    """``cape fit META_DIR --out MODEL_DIR``."""
    from cape.metamodel.fit import fit as fit_model

    model = fit_model(
        args.meta_dir,
        args.out,
        preset=args.preset,
        workers=args.workers,
        early_stopping=args.early_stopping,
        seed=args.seed,
        address=args.address,
    )
    data = model.card["data"]
    print(f"Fitted '{model.preset.name}' on {data['rows']} rows of {data['trials']} trials; written to {args.out}")
    for family, scores in model.card["metrics"]["out_of_fold"].items():
        print(f"  {family:<12} {scores['rows']:>6} rows, out-of-fold MAE {scores['mae']:.2f} steps")


def evaluate(args: argparse.Namespace) -> None:
    """``cape evaluate META_DIR --protocol P --out REPORT_DIR``."""
    from cape.evaluation import evaluate as run_protocol
    from cape.evaluation.methods import COMPARATORS, FULL_PRESETS

    more: dict[str, Any] = {"presets": FULL_PRESETS, "comparators": COMPARATORS} if args.full else {}
    made = run_protocol(
        args.meta_dir,
        args.protocol,
        args.out,
        test_dir=args.test,
        floor_dir=args.floor,
        rebuild=args.rebuild,
        data_root=args.data_root,
        **more,
    )
    print(made.markdown())


def report(args: argparse.Namespace) -> None:
    """``cape report META_DIR --out FILE.html``."""
    from cape.evaluation import report as write_report

    print(f"Wrote {write_report(args.meta_dir, args.out, args.meta_model)}")


def predict(args: argparse.Namespace) -> None:
    """``cape predict module.path:callable --data DATASET``."""
    from cape.cli_model import load_model, load_setting, models_own
    from cape.metamodel.artifact import resolve
    from cape.metamodel.intervals import check_level
    from cape.predict import check_price
    from cape.predict import predict as predict_one

    check_lr(args.lr)
    check_epsilon(args.epsilon)
    check_level(args.level)
    if args.usd_per_hour is not None:
        check_price(args.usd_per_hour)
    meta_model = resolve(args.meta_model)
    setting = load_setting(args)
    with models_own():
        model = load_model(args.model, args.kwargs, args.seed, setting)
        prediction = predict_one(
            model,
            setting.batch,
            loss=setting.loss,
            lr=args.lr,
            dataset_size=setting.dataset_size,
            epsilon=args.epsilon,
            meta_model=meta_model,
            family=args.family,
        )
        prediction.time()  # times a few real steps, once
    if args.json:
        asked = {"level": args.level, "interval": list(prediction.interval(args.level))}
        if args.usd_per_hour is not None:
            asked["usd"] = prediction.cost(args.usd_per_hour)
        _print_json({"model": args.model, "data": setting.dataset.name, **prediction.to_dict(), **asked})
    else:
        print(f"{args.model} on {setting.dataset.name}: batch {args.batch_size}, lr {args.lr:g}, ε {args.epsilon:g}")
        for label, value in _prediction_lines(prediction, args):
            print(f"  {label:<22} {value}")


def _prediction_lines(p: Prediction, args: argparse.Namespace) -> list[tuple[str, str]]:
    from cape.predict import in_words

    low, high = p.interval(args.level)
    lines = [
        ("steps", in_words(p.steps)),
        (f"{100 * args.level:g} % interval", f"{low:.1f} to {high:.1f}" if math.isfinite(high) else "unknown"),
        ("epochs", f"{p.epochs:.3g}"),
        (
            "time on this machine",
            f"{p.time():.3g} s" if math.isfinite(p.time()) else "unknown: training diverges at once",
        ),
    ]
    if args.usd_per_hour is not None:
        lines.append(("cost", f"{p.cost(usd_per_hour=args.usd_per_hour):.3g} USD"))
    chance = f"{100 * p.p_reach:.0f} %" if math.isfinite(p.p_reach) else "unknown"
    lines += [("chance to reach ε", chance), ("in domain", "yes" if p.in_domain else "no")]
    return lines + [("warning", text) for text in p.warnings]


def rank(args: argparse.Namespace) -> None:
    """``cape rank A B ... --data DATASET --lr 1e-3 2e-3``: every model at every learning rate."""
    from cape.cli_model import load_model, load_setting, models_own
    from cape.metamodel.artifact import resolve
    from cape.predict import rank as rank_all

    check_epsilon(args.epsilon)
    for lr in args.lr:
        check_lr(lr)
    meta_model = resolve(args.meta_model)
    setting = load_setting(args)
    with models_own():
        candidates = [
            (f"{path} lr={lr:g}" if len(args.lr) > 1 else path, model, setting.batch, lr)
            for path in args.model
            for model in [load_model(path, args.kwargs, args.seed, setting)]
            for lr in args.lr
        ]
        table = rank_all(
            candidates,
            loss=setting.loss,
            dataset_size=setting.dataset_size,
            epsilon=args.epsilon,
            usd_per_hour=args.usd_per_hour,
            meta_model=meta_model,
            level=args.level,
        )
    if args.json:
        _print_json(table.to_dict())
    else:
        print(table)


def probe(args: argparse.Namespace) -> None:
    """``cape probe module.path:callable --data DATASET``."""
    from cape.cli_model import load_model, load_setting, models_own
    from cape.probing import probe as probe_model

    check_lr(args.lr)
    setting = load_setting(args)
    with models_own():
        model = load_model(args.model, args.kwargs, args.seed, setting)
        features = probe_model(model, setting.batch, loss=setting.loss, lr=args.lr, dataset_size=setting.dataset_size)
    values = features.as_dict()
    if args.json:
        _print_json(values)
    else:
        for name, value in values.items():
            print(f"{name:<17} {'not computed' if value is None else format(value, '.6g')}")


def measure(args: argparse.Namespace) -> None:
    """``cape measure module.path:callable --data DATASET``."""
    from cape.cli_model import load_model, load_setting, models_own
    from cape.config import StoppingRule
    from cape.convergence import measure as measure_model

    check_lr(args.lr)
    epsilons = check_epsilons(args.epsilon)
    stopping = StoppingRule(max_steps=args.max_steps)
    setting = load_setting(args)
    with models_own():
        model = load_model(args.model, args.kwargs, args.seed, setting)
        found = measure_model(
            model, setting.batch, loss=setting.loss, lr=args.lr, epsilons=epsilons, stopping=stopping, seed=args.seed
        )
    if args.json:
        _print_json(
            {
                "t_star": {e: found.t_star[e] for e in epsilons},
                "stop_reason": found.stop_reason,
                "stopped_at": found.stopped_at,
                "losses": [float(v) for v in found.losses],
                "seconds": found.seconds,
                "step_seconds": found.step_seconds,
            }
        )
        return
    for e in epsilons:
        steps = found.t_star[e]
        reached = "not reached" if steps is None else "1 step" if steps == 1 else f"{steps} steps"
        print(f"ε {e!r:<6} {reached}")
    print(
        f"stopped: {found.stop_reason} after {found.stopped_at} steps, {found.seconds:.2f} s,"
        f" loss {found.losses[0]:.4g} to {found.losses[-1]:.4g}"
    )


def data(args: argparse.Namespace) -> None:
    """``cape data``: the registered datasets and where each is found."""
    from cape import datasets
    from cape.datasets.known import known as known_as

    root = datasets.data_root(args.data_root)
    print(f"data root: {root or 'none (set CAPE_DATA, or give --data-root)'}")
    for name in datasets.names():
        known = known_as(name)
        if root is None and known is not None:  # loading it here would start a download
            print(f"  {name:<20} {'downloaded on first use' if known.torchvision else 'needs a data root'}")
            continue
        try:
            found = datasets.load(name, data_root=root)
        except CapeError as error:
            print(f"  {name:<20} not here: {error}")
        else:
            layouts = ", ".join(found.layouts)
            print(f"  {name:<20} {found.task:<15} {found.outputs:>4} outputs  N {found.full_train_size:>6}  {layouts}")


def import_csv(args: argparse.Namespace) -> None:
    """``cape import-csv FILE.csv --family cnn --out META_DIR``."""
    from cape.store.importers import import_csv as import_file
    from cape.store.location import Location

    where = Location.of(args.out)  # prints no credentials
    rows = import_file(args.csv, args.family, where)
    print(f"Imported {rows} rows of {args.csv} into {where}")


def info(args: argparse.Namespace) -> None:
    """``cape info``: versions, the native extension, devices, data root, weights."""
    import importlib.metadata
    import platform

    import torch

    import cape
    from cape import datasets
    from cape.metamodel.artifact import default_model

    print(f"cape {cape.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name in ("torch", "torchvision", "ray", "xgboost", "pyarrow", "numpy", "scikit-learn"):
        try:
            print(f"  {name:<14} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {name:<14} not installed")
    print(f"  {'native':<14} {_native()}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"  {'devices':<14} {', '.join([f'cpu ({torch.get_num_threads()} threads)', *devices])}")
    print(f"  {'data root':<14} {datasets.data_root(args.data_root) or 'none'}")
    try:
        card = default_model().card
    except (StoreError, DependencyError) as error:
        print(f"  {'weights':<14} {error}")
    else:
        print(f"  {'weights':<14} {card['name']}, {card['data']['rows']} rows of {', '.join(card['data']['datasets'])}")


def _native() -> str:
    try:
        from cape import _C
    except ImportError as error:
        return f"missing, the slower torch twins are used ({error})"
    built = _C.build_info()
    cuda = f"CUDA {built['cuda_archs']} ({built['cuda_compiler']})" if built["cuda"] else "CPU only"
    return f"{cuda}, {built['compiler']}, for torch {built['torch']}"


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    """Return a value that strict JSON can hold: what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
