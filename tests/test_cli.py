"""The command line: what it prints, and that whatever is wrong is one sentence, exit code 2, and no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cape import cli, store
from cape.config import SweepSpec
from cape.evaluation import protocols
from cape.sweep.estimate import measured_seconds
from cape.sweep.plan import PRESETS, Plan

HERE = "tests.test_cli"
Run = Callable[..., tuple[int, str, str]]


# --- models that the commands below name as module:callable ---


def net(classes: int = 10, width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.GELU(), nn.Linear(width, classes))


def normalized() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


def pixels() -> nn.Module:
    return nn.Linear(64, 10)


class NotANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)) * float("nan")


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


class Fragile(nn.Module):
    """It runs some times, and then raises what is no error of torch's."""

    def __init__(self, error: str = "KeyError") -> None:
        super().__init__()
        self.head, self.error = nn.Linear(3 * 32 * 32, 10), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        FRAGILE[0] -= 1
        if FRAGILE[0] < 0:
            raise {"KeyError": KeyError, "SystemExit": SystemExit}[self.error]("broken")
        return self.head(x.flatten(1))


FRAGILE = [0]  # runs that are left


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x.flatten(1)).detach()


READY = net()


class Talkative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        print("made")
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        print("ran")
        return self.head(x.flatten(1))


def without_numbers() -> nn.Module:
    return net().to("meta")


def exits() -> nn.Module:
    sys.exit(3)


def not_a_module() -> int:
    return 3


def raises() -> nn.Module:
    raise RuntimeError("no weights\nmore lines")


NOT_CALLABLE = 3


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``cape ...`` in this process; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(Path(__file__).resolve().parents[1])
    monkeypatch.delenv("CAPE_DATA", raising=False)
    monkeypatch.delenv("CAPE_DEBUG", raising=False)

    def call(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def expect_sentence(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert err.startswith("cape: error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert len(err) > len("cape: error: ") + 15
    for word in words:
        assert word in err


def write_spec(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({"families": ["mlp"], "datasets": ["digits"], "trials_per_cell": 1, **changes}))
    return path


# --- wrong arguments ---

MODEL = f"{HERE}:net"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["predct"], ["predct"]),
        (["sweep", "demo"], ["--out"]),
        (["probe", MODEL, "--data", "digits", "--lr", "fast"], ["--lr", "fast"]),
        (["evaluate", "x", "--out", "y", "--protocol", "guess"], ["guess", "in-corpus"]),
        (["probe", MODEL, "--data", "digits", "--batch-size", "0"], ["batch size", "0"]),
        (["probe", MODEL, "--data", "digits", "--batch-size", "-3"], ["batch size", "-3"]),
        (["probe", MODEL, "--data", "digits", "--batch-size", "100000"], ["100000", "1797"]),
        (["probe", MODEL, "--data", "digits", "--lr", "-0.1"], ["learning rate", "-0.1"]),
        (["probe", MODEL, "--data", "digits", "--lr", "nan"], ["learning rate"]),
        (["probe", MODEL, "--data", "digits", "--seed", "-1"], ["seed"]),
        (["probe", MODEL, "--data", "digits", "--dataset-size", "0"], ["--dataset-size"]),
        (["probe", MODEL, "--data", "digits", "--loss", "cross_entrpy"], ["Did you mean 'cross_entropy'?"]),
        (["probe", MODEL, "--data", "digits", "--task", "clasification"], ["Did you mean 'classification'?"]),
        (["probe", MODEL, "--data", "digits", "--layout", "tokens"], ["digits", "tokens"]),
        (["probe", MODEL, "--data", "digits", "--device", "abacus"], ["abacus"]),
        (["probe", MODEL, "--data", "digits", "--device", "meta"], ["device", "meta"]),
        (["probe", f"{HERE}:without_numbers", "--data", "digits"], ["device", "meta"]),
        (["probe", f"{HERE}:exits", "--data", "digits"], ["SystemExit", "3"]),
        (["probe", "tests/test_cli.py:net", "--data", "digits"], ["not its file", "tests.test_cli:net"]),
        (["probe", "/no/such/file.py:net", "--data", "digits"], ["in /no/such: file:net"]),
        (["probe", MODEL, "--data", "digts"], ["digts", "Did you mean 'digits'?", ".parquet"]),
        (["probe", MODEL, "--data", "mnist", "--data-root", "/no/such/folder"], ["/no/such/folder"]),
        (["probe", MODEL, "--data", "/no/such/file.parquet"], ["/no/such/file.parquet"]),
        (["probe", "tests.test_cli", "--data", "digits"], ["module.path:callable"]),
        (["probe", "no_such_module:net", "--data", "digits"], ["no_such_module"]),
        (["probe", f"{HERE}:nett", "--data", "digits"], ["nett", "Did you mean 'net'?"]),
        (["probe", f"{HERE}:NOT_CALLABLE", "--data", "digits"], ["not callable"]),
        (["probe", f"{HERE}:not_a_module", "--data", "digits"], ["int", "Module"]),
        (["probe", f"{HERE}:raises", "--data", "digits"], ["RuntimeError", "no weights"]),
        (["probe", MODEL, "--data", "digits", "--kwargs", "{"], ["--kwargs", "JSON"]),
        (["probe", MODEL, "--data", "digits", "--kwargs", "[1]"], ["--kwargs", "object"]),
        (
            ["probe", MODEL, "--data", "digits", "--kwargs", '{"width": 8, "width": 9}'],
            ["--kwargs", "'width'", "2 times"],
        ),
        (["probe", MODEL, "--data", "digits", "--kwargs", '{"depth": 3}'], ["TypeError", "depth"]),
        (["probe", f"{HERE}:pixels", "--data", "digits"], ["image", "--layout"]),
        (["probe", f"{HERE}:NotANumber", "--data", "digits"], ["NaN"]),
        (["probe", MODEL, "--data", "digits", "--kwargs", '{"classes": 4}'], ["Labels", "0..3"]),
        (["measure", MODEL, "--data", "digits", "--kwargs", '{"classes": 4}'], ["Labels", "0..3"]),
        (["measure", f"{HERE}:NotANumber", "--data", "digits"], ["NaN"]),
        (["measure", MODEL, "--data", "digits", "--epsilon", "1.5"], ["1.5"]),
        (["measure", MODEL, "--data", "digits", "--epsilon", "0.1", "0"], ["0"]),
        (["measure", MODEL, "--data", "digits", "--max-steps", "0"], ["max_steps"]),
        (["predict", MODEL, "--data", "digits", "--epsilon", "1"], ["1.0"]),
        (["predict", MODEL, "--data", "digits", "--level", "90"], ["90"]),
        (["predict", MODEL, "--data", "digits", "--meta-model", "/no/such/model"], ["/no/such/model", "cape fit"]),
        (["rank", MODEL, "--data", "digits", "--lr", "1e-3", "-1"], ["learning rate"]),
        (["sweep", "papr", "--out", "/no/out"], ["papr", "Did you mean 'paper'?"]),
        (["sweep", "/no/such/spec.json", "--out", "/no/out"], ["/no/such/spec.json"]),
        (["sweep", "smoke", "--out", "/dev/null/x"], ["/dev/null"]),
        (["fit", "/no/such/meta", "--out", "/no/out"], ["/no/such/meta"]),
        (["fit", "/no/such/meta", "--out", "/no/out", "--preset", "papre"], ["Did you mean 'paper'?"]),
        (["fit", "/no/such/meta", "--out", "/no/out", "--workers", "0"], ["workers"]),
        (["fit", "/no/such/meta", "--out", "/no/out", "--seed", "-1"], ["seed", "-1"]),
        (["evaluate", "/no/such/meta", "--out", "/no/out"], ["/no/such/meta"]),
        (["evaluate", "/no/such/meta", "--out", "/no/out", "--rebuild", "-1"], ["rebuild", "-1"]),
        (["report", "/no/such/meta", "--out", "/no/out.html"], ["/no/such/meta"]),
        (["import-csv", "/no/such.csv", "--family", "cnn", "--out", "/no/out"], ["/no/such.csv"]),
        (["data", "--data-root", "/no/such/folder"], ["/no/such/folder"]),
        (["predict", f"{HERE}:normalized", "--data", "digits", "--batch-size", "1"], ["train mode", "at least 2"]),
        (["measure", f"{HERE}:normalized", "--data", "digits", "--batch-size", "1"], ["train mode", "at least 2"]),
        (["predict", MODEL, "--data", "digits", "--loss", "mse"], ["'mse'", "(128, 10)", "(128,)", "cross_entropy"]),
        (["measure", MODEL, "--data", "digits", "--loss", "bce"], ["'bce'", "cross_entropy"]),
        (["probe", MODEL, "--data", "digits", "--loss", "sequence_cross_entropy"], ["sequence_cross_entropy"]),
        (["predict", f"{HERE}:Detached", "--data", "digits"], ["do not depend on its parameters"]),
        (["measure", f"{HERE}:READY", "--data", "digits"], ["a model already"]),
        (["predict", "./tests/test_cli.py:net", "--data", "digits"], ["not its file", "tests.test_cli:net"]),
        (["predict", MODEL, "--data", "nowhere", "--import", "no_such_module"], ["no_such_module", "imported"]),
        (["predict", MODEL, "--data", "digits", "--family", "MLP"], ["MLP", "Did you mean 'mlp'?"]),
        (["predict", MODEL, "--data", "digits", "--usd-per-hour", "-1"], ["usd_per_hour", "-1"]),
        (["rank", MODEL, "--data", "digits", "--level", "2"], ["level", "2"]),
        (["store", "verify", "csrc"], ["csrc", "no meta-dataset"]),
        (["store", "path", "/no/such/meta"], ["/no/such/meta does not exist", "cape sweep"]),
        (["store", "path", "csrc"], ["csrc holds no rows"]),
        (["sweep", "smoke", "--dry-run", "--workers", "-1"], ["--workers", "-1"]),
        (["sweep", "smoke", "--out", "/no/out", "--address", "127.0.0.1:9"], ["127.0.0.1:9", "no Ray cluster"]),
        (["sweep", "smoke", "--out", "/no/out", "--address", "[::1]:9"], ["[::1]:9", "no Ray cluster"]),
        (["sweep", "smoke", "--out", "/no/out", "--address", "head"], ["'head'", "HOST:PORT"]),
        (["sweep", "smoke", "--out", "/no/out", "--address", "http://head:8265"], ["http://head:8265", "HOST:PORT"]),
        (["sweep", "smoke", "--out", "/no/out", "--gpus-per-worker", "nan"], ["gpus_per_worker", "nan"]),
        (["sweep", "smoke", "--out", "", "--inline"], ["names no folder"]),
        (["sweep", "smoke", "--out", "s3://", "--inline"], ["s3://", "names no folder"]),
        (["sweep", "csrc", "--out", "/no/out"], ["csrc", "directory"]),
        (["store", "verify", ""], ["names no folder"]),
        (["store", "verify", "a\udcff"], ["not UTF-8"]),
        (["sweep", "smoke", "--out", "/no/out", "--import", "tests/nets.py"], ["not its file: nets"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_a_wrong_argument_is_one_sentence(run: Run, argv: list[str], words: list[str]) -> None:
    expect_sentence(run(*argv), *words)


@pytest.mark.parametrize("error", ["KeyError", "SystemExit"])
def test_a_model_that_fails_while_it_is_trained_is_one_sentence(run: Run, error: str) -> None:
    FRAGILE[0] = 4
    kwargs = json.dumps({"error": error})
    found = run("measure", f"{HERE}:Fragile", "--data", "digits", "--batch-size", "8", "--kwargs", kwargs)
    expect_sentence(found, error, "broken")


def test_lazy_layers_get_their_shapes_from_the_batch(run: Run) -> None:
    code, out, err = run("measure", f"{HERE}:lazy", "--data", "digits", "--batch-size", "8", "--epsilon", "0.5")
    assert code == 0 and "stopped: reached" in out, err


def test_a_dataset_of_ones_own_is_found(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_spots.py").write_text(
        "import numpy as np\n"
        "from cape import datasets\n"
        "def load(root):\n"
        "    x = np.random.default_rng(0).integers(0, 255, (64, 8, 8)).astype(np.uint8)\n"
        "    return datasets.from_arrays('own_spots', x, np.arange(64) % 10)\n"
        "datasets.register('own_spots', load)\n"
    )
    monkeypatch.chdir(tmp_path)
    argv = ["measure", MODEL, "--data", "own_spots", "--batch-size", "8", "--epsilon", "0.5"]
    code, out, err = run(*argv, "--import", "own_spots")
    assert code == 0 and "stopped: reached" in out, err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": [32]}, ["batch_size", "Did you mean 'batch_sizes'?"]),
        ({"lrs": [-0.001]}, ["learning rate", "-0.001"]),
        ({"lrs": []}, ["lrs"]),
        ({"lrs": "0.1"}, ["lrs", "list"]),
        ({"families": "mlp"}, ["families", "list"]),
        ({"epsilons": [0.1, 1.0]}, ["1.0"]),
        ({"epsilons": [0]}, ["0"]),
        ({"batch_sizes": [0]}, ["batch_sizes", "0"]),
        ({"families": ["mpl"]}, ["mpl", "Did you mean 'mlp'?"]),
        ({"datasets": ["digts"]}, ["digts", "Did you mean 'digits'?"]),
        ({"datasets": ["数" * 40 + ".parquet"]}, ["no data file"]),
        ({"datasets": ["\ud800.parquet"]}, ["no data file"]),
        ({"batch_sizes": [5000]}, ["5000"]),
        ({"trials_per_cell": 10**8}, ["split it"]),
        ({"task": "regression"}, ["digits", "regression"]),
        ({"stopping": {"max_step": 3}}, ["max_step", "Did you mean 'max_steps'?"]),
    ],
    ids=str,
)
def test_a_wrong_spec_is_one_sentence_and_writes_nothing(
    run: Run, tmp_path: Path, changes: dict[str, object], words: list[str]
) -> None:
    spec = write_spec(tmp_path / "spec.json", **changes)
    expect_sentence(run("sweep", spec, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_what_cannot_run_and_says_what_it_could_not_check(run: Run, tmp_path: Path) -> None:
    for changes, words in (({"datasets": ["digts"]}, ["Did you mean 'digits'?"]), ({"task": "regression"}, ["digits"])):
        spec = write_spec(tmp_path / "spec.json", **changes)
        expect_sentence(run("sweep", spec, "--dry-run"), *words)
    expect_sentence(run("sweep", write_spec(tmp_path / "spec.json", trials_per_cell=10**20), "--dry-run"), "split it")
    code, printed, err = run("sweep", write_spec(tmp_path / "spec.json", batch_sizes=[5000]), "--dry-run")
    assert code == 0 and "worker-hours" in printed and "could not be checked" in err and "5000" in err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"lrs": NaN}'])
def test_a_spec_that_is_no_spec(run: Run, tmp_path: Path, content: bytes) -> None:
    spec = tmp_path / "spec.json"
    spec.write_bytes(content)
    expect_sentence(run("sweep", spec, "--out", tmp_path / "out"))


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing", b"x" * 4096])
def test_a_corrupt_parquet_file(run: Run, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.parquet"
    file.write_bytes(content)
    expect_sentence(run("probe", MODEL, "--data", file), str(file))


def test_an_empty_parquet_file(run: Run, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "empty.parquet"
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array([], image), "label": pa.array([], pa.int64())}), file)
    expect_sentence(run("probe", MODEL, "--data", file), str(file))


def test_a_data_root_without_the_dataset(run: Run, tmp_path: Path) -> None:
    expect_sentence(run("probe", MODEL, "--data", "cifar10", "--data-root", tmp_path), "cifar10")


def test_errors_show_their_traceback_when_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPE_DEBUG", "1")
    with pytest.raises(ValueError, match="learning rate"):
        run("probe", MODEL, "--data", "digits", "--lr", "-1")


def test_what_a_model_prints_is_not_in_the_result(run: Run) -> None:
    for command in ("probe", "predict", "rank", "measure"):
        options = ["--max-steps", "2"] if command == "measure" else []
        code, out, err = run(command, f"{HERE}:Talkative", "--data", "digits", "--batch-size", "4", "--json", *options)
        assert code == 0 and json.loads(out) and "made" in err and "ran" in err


def test_every_encoding_prints_every_character(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict"))
    argv = ["measure", f"{HERE}:net", "--data", "digits", "--batch-size", "4", "--max-steps", "1"]
    assert cli.main(argv) == 0 and cli.main([*argv, "--epsilon", "2"]) == 2
    assert b"\\u03b5 0.2" in sys.stdout.buffer.getvalue()  # type: ignore[attr-defined]


def test_an_error_that_nobody_can_read_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main(["sweep", "papr"]) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_a_closed_stdout_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["data"]) == 0


# --- around a sweep ---


def test_a_spec_with_a_byte_order_mark_is_read(run: Run, tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "spec.json")
    spec.write_bytes(b"\xef\xbb\xbf" + spec.read_bytes())
    assert run("sweep", spec, "--dry-run")[0] == 0


def test_a_dry_run_says_what_a_sweep_amounts_to_and_needs_no_data(run: Run, tmp_path: Path) -> None:
    code, printed, err = run("sweep", "paper", "--dry-run", "--workers", "64")
    assert code == 0, err
    assert printed.startswith("144 cells, 14400 trials, 43200 rows, ") and " shards\n" in printed
    groups = Plan(PRESETS["paper"]).groups
    hours = sum(g.count * measured_seconds(g.family, g.dataset, g.batch_size) for g in groups) / 3600
    assert f"about {hours:.3g} worker-hours" in printed and "AMD EPYC" in printed
    assert 20 < hours < 100  # of one core; the paper's own took 40 hours of one GPU
    code, printed, _ = run("sweep", "smoke", "--dry-run")
    seconds = 4 * measured_seconds("mlp", "digits", 16)
    assert code == 0 and f"about {seconds / 3600:.3g} worker-hours" in printed
    assert not list(tmp_path.iterdir())


def test_a_dry_run_takes_its_times_from_the_rows_that_are_there(run: Run, tmp_path: Path) -> None:
    out, spec = tmp_path / "meta", tmp_path / "spec.json"
    path = write_spec(spec, lrs=[1e-3], batch_sizes=[16], trials_per_cell=2)
    assert run("sweep", path, "--out", out, "--inline", "--quiet")[0] == 0
    larger = write_spec(spec, lrs=[1e-3], batch_sizes=[16], trials_per_cell=2000)
    code, printed, _ = run("sweep", larger, "--out", out, "--dry-run")
    assert code == 0 and "measured: 2 trials that" in printed
    rows = store.read(out, columns=["trial_id", "truth_seconds", "probe_seconds"]).to_pylist()
    spent = [t + p for t, p in {(r["truth_seconds"], r["probe_seconds"]) for r in rows}]
    hours = 2000 * sum(spent) / len(spent) / 3600
    assert float(printed.split("about ")[1].split()[0]) == pytest.approx(hours, rel=0.01)


def test_looking_after_a_meta_dataset(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "meta"
    spec = write_spec(tmp_path / "spec.json", lrs=[1e-3, 2e-3], batch_sizes=[16], trials_per_cell=2)
    code, printed, err = run("sweep", spec, "--out", out, "--inline", "--chunk-seconds", "0.01")
    assert code == 0 and "12 rows of 4 trials" in printed
    assert "4/4 trials" in err and "median T*" in err  # the last progress line, and the summary
    code, printed, _ = run("sweep", "status", out)
    assert code == 0 and printed.startswith("finished (process ") and "4/4 trials" in printed
    code, printed, _ = run("store", "verify", out)
    assert code == 0 and "12 rows of 4 trials, 4 planned, 0 missing" in printed and printed.endswith("sound\n")
    code, printed, _ = run("store", "compact", out)
    assert code == 0 and "files are 1 now" in printed
    code, printed, _ = run("store", "path", out)
    assert printed.strip() == str(out / "_rows.1")
    extended = write_spec(tmp_path / "extended.json", lrs=[1e-3, 2e-3], batch_sizes=[16, 32], trials_per_cell=3)
    code, printed, _ = run("sweep", extended, "--out", out, "--inline", "--quiet", "--resume")
    assert code == 0 and "36 rows of 12 trials" in printed
    assert run("store", "verify", out)[0] == 0
    expect_sentence(run("sweep", spec, "--out", out, "--inline", "--resume"), "batch_sizes is [16, 32] there")
    expect_sentence(run("sweep", "status", tmp_path / "absent"), "No sweep has run")
    expect_sentence(run("sweep", "status"), "cape sweep status DIR")
    expect_sentence(run("sweep", "smoke", "status", "--out", out), "one argument too many")
    code, printed, _ = run("store", "compact", out, "--out", tmp_path / "copy")
    assert code == 0 and run("sweep", "status", tmp_path / "copy")[1].endswith("12/12 trials are there\n")
    store.write_shard(store.read(out).to_pylist(), out)  # once more, in one chunk
    twice = run("store", "verify", out)
    expect_sentence(twice, f"`cape store compact {out}` leaves every row once")
    assert "resume" not in twice[2]
    (out / "_rows.1" / "family=mlp" / "dataset=digits" / "x.parquet").write_bytes(b"PAR1")
    expect_sentence(run("store", "verify", out), "--set-aside", "store compact")


# --- another sweep's directory ---


def test_an_out_directory_with_another_sweep_keeps_what_it_holds(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "meta"
    first = write_spec(tmp_path / "first.json", lrs=[1e-3], batch_sizes=[16], trials_per_cell=2)
    other = write_spec(tmp_path / "other.json", lrs=[2e-3], batch_sizes=[16], trials_per_cell=2)
    code, printed, err = run("sweep", first, "--out", out, "--inline", "--quiet")
    assert code == 0, err
    assert "6 rows of 2 trials" in printed
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for again in (["sweep", other, "--out", out, "--inline"], ["sweep", other, "--out", out, "--inline", "--resume"]):
        expect_sentence(run(*again), str(out))
    expect_sentence(run("sweep", first, "--out", out, "--inline"), "--resume")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert run("sweep", first, "--out", out, "--inline", "--resume", "--quiet")[0] == 0
    assert store.count_rows(out) == 6


# --- what it prints ---


def test_probe_prints_the_features(run: Run) -> None:
    code, out, err = run("probe", MODEL, "--data", "digits", "--batch-size", "16", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["log_p"] == pytest.approx(torch.tensor(3072 * 32 + 32 + 320 + 10.0).log().item(), rel=1e-6)
    assert values["log_n"] == pytest.approx(torch.tensor(1797.0).log().item(), rel=1e-6)
    assert run("probe", MODEL, "--data", "digits", "--batch-size", "16", "--json")[1] == out  # the seed decides
    code, out, _ = run("probe", MODEL, "--data", "digits", "--batch-size", "16")
    assert code == 0 and "log_tau_full      not computed" in out


def test_measure_counts_the_steps(run: Run) -> None:
    argv = ["measure", MODEL, "--data", "digits", "--batch-size", "16", "--lr", "1e-3", "--epsilon", "0.5", "0.2"]
    code, out, err = run(*argv, "--json")
    assert code == 0, err
    found = json.loads(out)
    first = {e: next(i for i, v in enumerate(found["losses"]) if v <= e * found["losses"][0]) for e in (0.5, 0.2)}
    assert found["t_star"] == {"0.5": first[0.5], "0.2": first[0.2]}
    code, out, _ = run(*argv)
    assert code == 0 and f"{first[0.2]} steps" in out
    code, out, _ = run(*argv, "--max-steps", "1")
    assert code == 0 and "not reached" in out
    code, out, _ = run(*argv, "0.20000001", "1e-7", "--max-steps", "1", "--json")
    assert code == 0 and list(json.loads(out)["t_star"]) == ["0.5", "0.20000001", "0.2", "1e-07"]


def test_import_csv_fit_predict_and_rank(run: Run, tmp_path: Path, ray_session: None) -> None:
    """The commands chained: a published CSV's columns become rows, rows a meta-regressor, that a prediction."""
    import csv

    import numpy as np

    rng = np.random.default_rng(0)
    names = ["dataset", "batch_size", "learning_rate", "epsilon", "T_star", "logP", "logG2", "logTau", "logN"]
    names += ["logLR", "logB"]
    with (tmp_path / "mlp.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for i in range(60):
            p, g2, tau = rng.uniform(9, 14), rng.uniform(0, 3), rng.uniform(3, 6)
            steps = 2 + int(20 * np.exp(-(p - 9) / 3))
            row = [("mnist", "cifar10")[i % 2], 32, 1e-3, 0.1, steps, p, g2, tau]
            writer.writerow([*row, np.log((60_000, 50_000)[i % 2]), np.log(1e-3), np.log(32)])
    assert run("import-csv", tmp_path / "mlp.csv", "--family", "mlp", "--out", tmp_path / "meta")[0] == 0
    code, out, err = run("fit", tmp_path / "meta", "--out", tmp_path / "model", "--preset", "paper")
    assert code == 0, err
    assert "60 rows of 60 trials" in out
    options = ["--data", "digits", "--batch-size", "32", "--meta-model", tmp_path / "model"]
    code, out, err = run("predict", MODEL, *options, "--json", "--dataset-size", "50000")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["steps"] >= 1 and answer["dataset_size"] == 50_000 and answer["family"] == "mlp"
    code, out, _ = run("predict", MODEL, *options, "--json", "--level", "0.5", "--usd-per-hour", "2.5")
    half, (low, high) = json.loads(out), answer["interval_90"]
    assert half["level"] == 0.5 and low < half["interval"][0] < half["interval"][1] < high
    assert half["usd"] == pytest.approx(half["seconds"] / 3600 * 2.5)
    code, out, _ = run("predict", MODEL, *options, "--usd-per-hour", "2.5")
    assert code == 0 and "90 % interval" in out and "USD" in out
    code, out, _ = run("rank", MODEL, *options, "--level", "0.5")
    assert code == 0 and "50 % interval" in out
    code, out, err = run("rank", MODEL, f"{HERE}:net", *options, "--lr", "1e-3", "2e-3", "--json")
    assert code == 0, err
    ranked = json.loads(out)
    assert len(ranked) == 4 and [r["rank"] for r in ranked] == [1, 2, 3, 4]
    assert [r["seconds"] for r in ranked] == sorted(r["seconds"] for r in ranked)


def test_data_and_info_name_what_is_there(run: Run) -> None:
    code, out, err = run("data")
    assert code == 0, err
    assert "digits" in out and "classification" in out and "diabetes" in out
    code, out, err = run("info")
    assert code == 0, err
    assert torch.__version__.split("+")[0] in out and "native" in out


def test_help_is_immediate_and_lists_every_command() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "cape.cli", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and time.monotonic() - started < 10
    commands = ("sweep", "store", "submit", "status", "stop", "fit", "evaluate", "predict", "rank", "probe", "measure")
    for name in (*commands, "data", "report", "import-csv"):
        assert name in done.stdout
    for heavy in ("torch", "ray", "numpy", "xgboost"):
        assert not any(line.split("|")[-1].strip() == heavy for line in done.stderr.splitlines()), heavy


def test_the_installed_command_exits_with_2() -> None:
    done = subprocess.run([sys.executable, "-m", "cape", "sweep", "demo"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("cape: error: ") and "Traceback" not in done.stderr
    done = subprocess.run([sys.executable, "-m", "cape.cli"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: cape" in done.stdout


def test_an_interrupt_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from cape import cli_commands

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_commands, "info", interrupt)
    code, _, err = run("info")
    assert code == 130 and err == "cape: interrupted.\n"


def test_the_protocols_are_those_that_there_are() -> None:
    assert tuple(protocols.PROTOCOLS) == cli.PROTOCOLS  # written twice, so that help needs no numpy


def test_presets_are_specs() -> None:

    assert {"demo", "paper"} <= set(PRESETS) and all(isinstance(s, SweepSpec) for s in PRESETS.values())
