"""The order of the house: a module imports from its own room and from those above it, and from nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import cape

HOUSE = Path(cape.__file__).parent
ROOMS = (
    *(
        "_C",
        "errors",
        "paths",
        "jsonconfig",
        "logs",
        "memory",
        "held",
        "surroundings",
        "state",
        "samples",
        "checks",
        "native",
        "randoms",
        "cluster",
    ),
    *("dataset_names", "family_names", "feature_names"),
    *("config", "families", "tasks", "datasets", "probing", "convergence", "drawn", "trial", "store", "sweep"),
    *("metamodel", "baselines", "evaluation", "recognize", "timing", "predict"),
    *("cli_model", "cli_sweep", "cli_commands", "cli", "__main__", "demo", "__init__"),
)


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, room) of every import of a module's: at its top, in a function or for the type checker alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cape":
            names = [f"cape.{node.attr}"]
        else:
            continue
        for package, name, *_ in (f"{n}.".split(".") for n in names):
            # All may import the package itself: it says its version and place, and loads the rest on first use.
            if package == "cape" and name and not name.startswith("__"):
                yield node.lineno, cape._PUBLIC.get(name, f"cape.{name}").split(".")[1]


def test_every_module_has_a_room() -> None:
    found = {p.stem for p in HOUSE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert found | {"_C"} == set(ROOMS) and len(ROOMS) == len(set(ROOMS))


def test_modules_import_only_from_above() -> None:
    wrong, seen = [], set()
    for path in sorted(HOUSE.rglob("*.py")):
        room = path.relative_to(HOUSE).parts[0].removesuffix(".py")
        for line, other in imported(path.read_text(encoding="utf-8")):
            seen.add((room, other))
            if other not in ROOMS or ROOMS.index(other) > ROOMS.index(room):
                wrong.append(f"{path.relative_to(HOUSE)}:{line} imports from {other}")
    assert not wrong
    assert {("trial", "drawn"), ("demo", "predict"), ("cli_commands", "_C"), ("store", "config")} <= seen


def test_an_import_is_seen_wherever_it_stands() -> None:
    source = """
import os, cape, cape.store.reader
from cape import __version__, predict, tasks
def f():
    from cape.trial import run_trials
    return cape.measure(), cape.__version__
"""
    rooms = ["store", "predict", "tasks", "trial", "convergence"]
    assert sorted(room for _, room in imported(source)) == sorted(rooms)
