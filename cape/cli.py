"""The command line: ``cape COMMAND ...``.

Every command is a thin wrapper of one public function. What goes wrong on purpose is a ``CapeError``: it is printed
as one sentence on stderr, without a traceback, and the exit code is 2 (set ``CAPE_DEBUG=1`` to see the traceback).
Nothing heavy is imported before a command runs, so that ``cape --help`` is immediate.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from cape import __version__
from cape.errors import CapeError, SpecError

PROTOCOLS = ("in-corpus", "fresh", "lodo", "loao", "lofo", "held-out")
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Argparse that reports a wrong argument like every other error of ``cape``."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"{message}; `{self.prog} --help` lists the arguments.")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``run`` of what it parses names a function of ``cape.cli_commands``."""
    parser = _Parser(prog="cape", description="Predict how many optimizer steps a network needs, before training it.")
    parser.add_argument("--version", action="version", version=f"cape {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=_Parser)

    def command(name: str, help: str, description: str | None = None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=description or help)
        sub.set_defaults(run=name.replace("-", "_"))
        return sub

    sub = command("sweep", "measure features and T* of many models, through Ray Tune")
    sub.add_argument(
        "spec", metavar="SPEC.json|PRESET|status", help="a spec as JSON, a preset, or `status DIR`: how far a sweep is"
    )
    sub.add_argument("folder", nargs="?", metavar="DIR", help="only after `status`")
    sub.add_argument("--out", metavar="DIR", help="directory of the meta-dataset, or a URI such as s3://bucket/prefix")
    sub.add_argument("--resume", action="store_true", help="continue the sweep that DIR holds, or extend it")
    sub.add_argument("--dry-run", action="store_true", help="print what the sweep amounts to, and run nothing")
    sub.add_argument("--address", metavar="ADDRESS", help="Ray cluster to use, e.g. auto (default: a local one)")
    sub.add_argument("--workers", type=int, metavar="N", help="actors that run shards (default: what the cluster has)")
    sub.add_argument(
        "--gpus-per-worker", type=float, metavar="F", help="GPUs of each actor (default: 1 where there is one)"
    )
    sub.add_argument(
        "--trial-seconds",
        type=float,
        metavar="S",
        help="budget of one trial (default 10800; 0: none)",
    )
    sub.add_argument("--chunk-seconds", type=float, metavar="S", help="every worker commits so often (default 5)")
    sub.add_argument("--inline", action="store_true", help="run in this process, without Ray")
    sub.add_argument("--quiet", action="store_true", help="no progress line, no summary")
    _data_option(sub, "--data")

    sub = command("submit", "run a command as a Ray job on a cluster; submitting it while it runs attaches to it")
    sub.add_argument(
        "--address", metavar="URL", help="job server (default RAY_API_SERVER_ADDRESS, else 127.0.0.1:8265)"
    )
    sub.add_argument("--installed", action="store_true", help="every node has CAPE: do not send it as a wheel")
    sub.add_argument("--no-follow", action="store_true", help="return at once; default: print the log, exit as the job")
    sub.set_defaults(parse=parser.parse_args)
    sub.add_argument("job", metavar="sweep|fit|evaluate")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the command's own arguments")

    sub = command("status", "list CAPE's jobs on a cluster")
    sub.add_argument("id", nargs="?", metavar="ID")
    sub.add_argument("--address", metavar="URL", help="job server")

    sub = command("stop", "stop a job; what it committed is kept")
    sub.add_argument("id", metavar="ID")
    sub.add_argument("--address", metavar="URL", help="job server")

    sub = command("store", "look after a meta-dataset: verify its rows, merge its files, forget failed trials")
    sub.add_argument(
        "action",
        choices=("verify", "compact", "retry", "path", "reprobe"),
        help="retry: forget failed trials, so that a resume runs them again; path: what to give to another reader;"
        " reprobe: compute features anew, keep T*",
    )
    sub.add_argument("meta_dir", metavar="META_DIR")
    sub.add_argument("--set-aside", action="store_true", help="verify: move bad files to META_DIR/_corrupt")
    sub.add_argument("--out", metavar="DIR", help="compact: write there, leave META_DIR alone")
    sub.add_argument("--target-mb", type=float, default=64.0, metavar="MB", help="compact: size of a file (default 64)")
    sub.add_argument(
        "--keep-seconds", type=float, default=3600.0, metavar="S", help="readers keep old files so long (3600)"
    )
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="reprobe: processes (default 1)")
    _data_option(sub, "--data")

    sub = command("fit", "fit the meta-regressor on a meta-dataset, through Ray Train")
    _meta_dirs(sub)
    sub.add_argument("--out", required=True, metavar="MODEL_DIR")
    sub.add_argument("--preset", default="product", metavar="NAME", help="product (default), paper or paper_appendix")
    sub.add_argument("--workers", type=int, default=1, metavar="N", help="Ray Train workers (default 1)")
    sub.add_argument("--address", metavar="ADDRESS", help="Ray cluster to use (default: a local one)")
    sub.add_argument(
        "--early-stopping",
        type=int,
        metavar="N",
        help="end N rounds after the last gain (default: never)",
    )
    sub.add_argument("--seed", type=int, default=0, help="deals the trials to the folds of calibration (default 0)")

    sub = command("evaluate", "score the meta-regressor and the baselines by a protocol")
    _meta_dirs(sub)
    sub.add_argument("--protocol", choices=PROTOCOLS, default="in-corpus")
    sub.add_argument("--out", required=True, metavar="REPORT_DIR", help="tables (CSV, Markdown), figures (PNG)")
    sub.add_argument("--test", metavar="META_DIR", help="the meta-dataset to test on (protocols fresh and held-out)")
    sub.add_argument("--floor", metavar="META_DIR", help="replicates: trials that differ in nothing but the seed")
    sub.add_argument(
        "--full", action="store_true", help="also the regressors of appendix A.4 and the ablations (minutes more)"
    )
    sub.add_argument(
        "--rebuild",
        type=int,
        default=0,
        metavar="N",
        help="build N trials per family again, for the NTK spectrum and measured costs (default 0)",
    )
    _data_option(sub, "--data")

    sub = command("report", "write one self-contained HTML page about a meta-dataset")
    _meta_dirs(sub)
    sub.add_argument("--out", required=True, metavar="FILE.html")
    sub.add_argument("--meta-model", metavar="MODEL_DIR", help="what `cape fit` wrote (default: fit one now)")

    sub = command("predict", "predict the steps, time and cost of a model from one batch at initialization")
    _model_arguments(sub)
    _predict_options(sub)
    sub.add_argument("--family", metavar="NAME", help="default: inferred from the layers of the model")

    sub = command("rank", "order several models by predicted cost")
    _model_arguments(sub, several=True)
    _predict_options(sub)

    sub = command("probe", "print the features of a model")
    _model_arguments(sub)

    sub = command("measure", "train a model on one batch and count the steps: the ground truth")
    _model_arguments(sub)
    sub.add_argument(
        "--epsilon", type=float, nargs="+", default=[0.2, 0.15, 0.1], metavar="E", help="default: 0.2 0.15 0.1"
    )
    sub.add_argument("--max-steps", type=int, default=5000, metavar="N", help="cap on updates (default 5000)")

    sub = command("data", "list the datasets and where each is found")
    _data_option(sub, "--data")

    sub = command("import-csv", "turn one of the paper's published CSV files into a meta-dataset")
    sub.add_argument("csv", metavar="FILE.csv")
    sub.add_argument("--family", required=True, metavar="NAME")
    sub.add_argument("--out", required=True, metavar="META_DIR")

    sub = command("info", "say what is installed, built and found")
    _data_option(sub, "--data")
    return parser


def _meta_dirs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("meta_dir", metavar="META_DIR", nargs="+", help="one or more meta-datasets, read as one")


def _data_option(sub: argparse.ArgumentParser, *names: str) -> None:
    sub.add_argument("--data-root", *names, dest="data_root", metavar="DIR", help="folder of Parquet datasets")
    sub.add_argument(
        "--import",
        action="append",
        default=[],
        dest="imports",
        metavar="MODULE",
        help="register your own families and datasets: imported here, and in every worker (repeatable)",
    )


def _model_arguments(sub: argparse.ArgumentParser, several: bool = False) -> None:
    where = "a callable that returns an nn.Module, e.g. torchvision.models:resnet18"
    sub.add_argument("model", metavar="module.path:callable", nargs="+" if several else None, help=where)
    sub.add_argument("--data", required=True, metavar="FILE.parquet|DATASET[@SIZE]", help="where the batch comes from")
    _data_option(sub)
    sub.add_argument(
        "--kwargs", default="{}", metavar="JSON", help='arguments of the callable, e.g. {"num_classes": 10}'
    )
    sub.add_argument("--batch-size", type=int, default=128, metavar="B", help="default 128")
    if not several:
        sub.add_argument("--lr", type=float, default=1e-3, metavar="LR", help="AdamW learning rate (default 0.001)")
    else:
        sub.add_argument(
            "--lr", type=float, nargs="+", default=[1e-3], metavar="LR", help="one or more (default 0.001)"
        )
    sub.add_argument("--layout", choices=("image", "rows", "vector", "tokens"), help="what the model takes")
    sub.add_argument("--task", metavar="TASK", help="default: the dataset's own")
    sub.add_argument("--loss", metavar="NAME", help="default: the task's own, e.g. cross_entropy")
    sub.add_argument("--dataset-size", type=int, metavar="N", help="full training-set size (default: the dataset's)")
    sub.add_argument("--seed", type=int, default=0, help="of the initialization and the batch (default 0)")
    sub.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda, ... (default: cuda where there is one)"
    )
    sub.add_argument("--json", action="store_true", help="print JSON")


def _predict_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--epsilon", type=float, default=0.1, metavar="E", help="target fraction of the loss (default 0.1)"
    )
    sub.add_argument("--level", type=float, default=0.9, metavar="P", help="level of the interval (default 0.9)")
    sub.add_argument("--usd-per-hour", type=float, metavar="USD", help="price of the machine; prints the cost")
    sub.add_argument("--meta-model", metavar="MODEL_DIR", help="what `cape fit` wrote (default: the one shipped)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code (0, 2 for an error that names its cause, 130 when interrupted)."""
    _prepare_streams()
    arguments = argparse.Namespace(run=None)
    try:
        parser = build_parser()
        parser.parse_args(argv, namespace=arguments)
        if arguments.run is None:
            parser.print_help()
            return EXIT_ERROR
        from cape import cli_commands

        if getattr(arguments, "imports", None):
            _register(arguments.imports)
        getattr(cli_commands, arguments.run)(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted.", EXIT_INTERRUPTED)  # a sweep has said how to resume by now
    except BrokenPipeError:  # the reader of our output has gone; nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except (CapeError, OSError) as error:
        if os.environ.get("CAPE_DEBUG"):
            raise
        if isinstance(error, OSError) and not isinstance(error, CapeError):
            named = f"'{error.filename}': " if error.filename else ""
            return _fail(f"{named}{error.strerror or error}.", EXIT_ERROR)
        return _fail(str(error), EXIT_ERROR)


def _register(modules: Sequence[str]) -> None:
    """Import the user's modules, also from the working directory; raises ``SpecError`` where one cannot be."""
    from cape.cli_model import search_here
    from cape.sweep.job import load_imports

    search_here()
    load_imports(modules)


def _prepare_streams() -> None:
    """Let every character be printed, by its code where the stream's encoding lacks it, and also to a closed stream."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _fail(message: str, code: int) -> int:
    with suppress(OSError):  # a stream that nobody reads, or whose disk is full
        sys.stdout.flush()
    with suppress(OSError):
        text = f"cape: error: {' '.join(message.split())}" if code == EXIT_ERROR else f"cape: {message}"
        print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
