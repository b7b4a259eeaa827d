"""What the command line needs to turn ``module.path:callable`` and a dataset's name into a model and a batch."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cape.errors import CapeError, ModelError, SpecError, did_you_mean, first_line
from cape.jsonconfig import parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cape.datasets import Dataset

LAYOUT_ORDER = ("image", "tokens", "vector", "rows")


@dataclass(frozen=True)
class Setting:
    """A batch of a dataset on a device, and what follows from it.

    Attributes:
        batch: (inputs, targets) on ``device``.
        loss: name of the loss.
        dataset_size: full training-set size N.
    """

    dataset: Dataset
    batch: tuple[Tensor, Tensor]
    loss: str
    dataset_size: int
    layout: str
    device: torch.device


@contextmanager
def models_own() -> Iterator[None]:
    """Run what runs a user's model: what it prints goes to stderr, and what it raises becomes one sentence.

    Raises:
        ModelError: the model's code raised something, or asked to end the process.
    """
    with redirect_stdout(sys.stderr):
        try:
            yield
        except (Exception, SystemExit) as error:
            if isinstance(error, CapeError) or os.environ.get("CAPE_DEBUG"):
                raise
            raise ModelError(
                f"The model failed: {type(error).__name__}: {first_line(error)}. (CAPE_DEBUG=1 shows where.)"
            ) from error


def load_setting(args: argparse.Namespace) -> Setting:
    """Draw the batch that ``--data``, ``--batch-size``, ``--layout``, ``--task`` and ``--seed`` ask for.

    Raises:
        SpecError, DataError: an argument is wrong, or the data is missing or does not fit.
    """
    from cape import datasets
    from cape.config import TASKS
    from cape.tasks import TASK_LOSS, Loss

    if args.batch_size < 1:
        raise SpecError(f"The batch size must be a whole number of at least 1, not {args.batch_size}.")
    if args.dataset_size is not None and args.dataset_size < 1:
        raise SpecError(f"--dataset-size must be a whole number of at least 1, not {args.dataset_size}.")
    if args.task is not None and args.task not in TASKS:
        raise SpecError(f"Unknown task '{args.task}'.{did_you_mean(args.task, TASKS)}")
    if args.loss is not None:
        Loss(args.loss)  # an unknown name must fail before data is read
    device = pick_device(args.device)
    dataset = datasets.load(args.data, data_root=args.data_root)
    if args.task is not None:
        dataset = dataset.with_task(args.task)
    layout = args.layout or next(name for name in LAYOUT_ORDER if name in dataset.layouts)
    x, y = dataset.batch(args.batch_size, args.seed, layout)
    return Setting(
        dataset=dataset,
        batch=(x.to(device), y.to(device)),
        loss=args.loss or TASK_LOSS[dataset.task],
        dataset_size=args.dataset_size or dataset.full_train_size,
        layout=layout,
        device=device,
    )


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is CUDA where there is one. Raises ``SpecError`` for one not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # 'meta' has no numbers to give
    except (RuntimeError, AssertionError) as error:
        raise SpecError(f"The device '{name}' cannot be used here: {first_line(error)}.") from error
    return device


def load_model(path: str, kwargs: str, seed: int, setting: Setting) -> nn.Module:
    """Import ``module.path:callable``, call it, and check that the model takes the batch.

    Args:
        path: e.g. ``torchvision.models:resnet18``; the working directory is searched as well.
        kwargs: JSON object of keyword arguments.
        seed: seeds torch before the call, so that the same weights are drawn every time.

    Raises:
        SpecError: the path or the arguments are wrong.
        ModelError: the callable fails, returns no module, or the model cannot run on the batch.
    """
    import torch
    from torch import nn
    from torch.nn.parameter import is_lazy

    from cape.state import call, preserved

    if not -(2**63) <= seed < 2**64:
        raise SpecError(f"--seed must be a whole number of 64 bits, not {seed}.")
    factory = _import(path)
    arguments = _json_object(kwargs)
    torch.manual_seed(seed)
    try:
        model = factory(**arguments)
    except (Exception, SystemExit) as error:  # the user's own code: whatever it raises is the answer to show
        raise ModelError(f"{path} failed: {type(error).__name__}: {first_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{path} returned {type(model).__name__}, not a torch.nn.Module.")
    if any(p.is_meta for p in model.parameters()):
        raise ModelError(f"{path} returned a model on the device 'meta', which holds no numbers; build it on the CPU.")
    model = model.to(setting.device)
    x = setting.batch[0]
    lazy = any(is_lazy(t) for t in [*model.parameters(), *model.buffers()])  # the first pass gives them their shapes
    with nullcontext() if lazy else preserved(model), torch.no_grad():
        try:
            outputs = call(model.eval(), x)
        except (Exception, SystemExit) as error:  # likewise
            raise ModelError(
                f"{path} cannot run on {setting.layout} inputs of shape {tuple(x.shape)}"
                f" ({type(error).__name__}: {first_line(error)}); try --layout, --kwargs or, for images of another"
                " size and for words, --data NAME@SIZE."
            ) from error
    model.train()
    if isinstance(outputs, torch.Tensor) and not bool(torch.isfinite(outputs).all()):
        raise ModelError(f"{path} returns NaN or infinite outputs at initialization; check its inputs and weights.")
    return model


def search_here() -> None:
    """Let modules be imported from the working directory."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _import(path: str) -> Any:
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise SpecError(f"'{path}' is not of the form module.path:callable, e.g. torchvision.models:resnet18.")
    if module_name.endswith(".py") or "/" in module_name:
        file = Path(module_name.removesuffix(".py"))
        where, parts = (f" in {file.parent}", [file.name]) if file.is_absolute() else ("", file.parts)
        raise SpecError(f"'{path}' names a file. Name the module, not its file{where}: {'.'.join(parts)}:{name}.")
    search_here()
    try:
        target = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SpecError(f"There is no module '{error.name}' to import {path} from.") from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        raise SpecError(f"Importing {module_name} failed: {type(error).__name__}: {first_line(error)}.") from error
    for part in name.split("."):
        if not hasattr(target, part):
            raise SpecError(f"{module_name} has no '{name}'.{_similar(part, target)}")
        target = getattr(target, part)
    from torch import nn

    if isinstance(target, nn.Module):
        raise SpecError(f"{path} is a model already, which would be called on a batch; name its class, or a function.")
    if not callable(target):
        raise SpecError(f"{path} is not callable.")
    return target


def _similar(name: str, target: Any) -> str:
    public = [n for n in dir(target) if not n.startswith("_") and callable(getattr(target, n, None))]
    hint = did_you_mean(name, public)
    return hint if hint.startswith(" Did") else ""  # a whole module's names would help nobody


def _json_object(text: str) -> dict[str, Any]:
    value = parse_json(text, "--kwargs")
    if not isinstance(value, dict):
        raise SpecError("--kwargs must be a JSON object, e.g. '{\"num_classes\": 10}'.")
    return value
