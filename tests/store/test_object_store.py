"""A meta-dataset on S3: a real server (moto's) on loopback, real requests through pyarrow.fs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cape.cli import main
from cape.config import StoppingRule, SweepSpec
from cape.errors import SpecError, StoreError
from cape.metamodel.rows import read_rows
from cape.store import claims, reader, writer
from cape.store.compact import compact
from cape.store.location import Location
from cape.store.verify import verify
from cape.sweep.inline import run_inline
from cape.sweep.plan import Plan

MakeRows = Callable[..., list[dict[str, Any]]]
SPEC = SweepSpec(
    families=("mlp",),
    datasets=("digits",),
    lrs=(1e-3, 2e-3),
    batch_sizes=(8,),
    epsilons=(0.6, 0.5),
    trials_per_cell=2,
    stopping=StoppingRule(max_steps=30),
)


@pytest.fixture(scope="module")
def server_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server says of each request."""
    return tmp_path_factory.mktemp("moto") / "log"


@pytest.fixture(scope="module")
def endpoint(server_log: Path) -> Iterator[str]:
    """The address of an S3 server; moto has an environment of its own (`make s3`): it needs an older dateutil."""
    places = [os.environ.get("CAPE_MOTO_SERVER"), f"{sys.prefix}/s3/bin/moto_server", f"{sys.prefix}/bin/moto_server"]
    server = next((place for place in places if place and Path(place).exists()), None)
    if server is None:
        pytest.skip("no S3 server: run `make s3`, or let CAPE_MOTO_SERVER name a moto_server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = server_log.open("w")
    process = subprocess.Popen([server, "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT)
    try:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/runs", method="PUT")  # makes the bucket
        for _ in range(100):
            try:
                urllib.request.urlopen(request, timeout=2)
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "moto_server ended"
                time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
        log.close()


@pytest.fixture
def uri(endpoint: str, request: pytest.FixtureRequest) -> str:
    return f"s3://KEYID:SECRETKEY@runs/{request.node.name}?endpoint_override={endpoint}&scheme=http&region=us-east-1"


def test_rows_go_there_and_come_back(make_rows: MakeRows, uri: str) -> None:
    assert reader.count_rows(uri) == 0
    (name,) = writer.write_shard(make_rows(3), uri)
    assert name.startswith("rows/family=mlp/dataset=digits/")
    assert reader.count_rows(uri) == 6
    assert sorted(reader.read(uri)["t_star"].to_pylist()) == [0, 1, 10, 11, 20, 21]
    assert len(reader.done_ids(uri)) == 3 and len(reader.done_trials(uri, "mlp", "digits")) == 3


def test_a_chunk_is_one_request(make_rows: MakeRows, uri: str, server_log: Path) -> None:
    writer.write_shard(make_rows(3), uri)
    sent = [line for line in server_log.read_text().splitlines() if "test_a_chunk_is_one_request" in line]
    puts = [line for line in sent if '"PUT ' in line or '"POST ' in line]
    assert len(puts) == 1 and ".parquet" in puts[0], sent  # not begun, sent and completed in three


def test_a_large_file_goes_up_in_parts_and_is_whole(uri: str) -> None:
    content = bytes(range(256)) * (50 * 1024)  # 12.5 MiB, above what pyarrow sends at once
    location = Location.of(uri)
    location.write("large", content)
    assert location.read("large") == content and location.list() == ["large"]


def test_a_sweep_is_run_resumed_extended_verified_and_copied(uri: str, tmp_path: Path) -> None:
    result = run_inline(SPEC, uri, progress=False)
    assert (result.rows, result.trials) == (8, 4)
    assert "SECRETKEY" not in f"{result} {result!r}" and "KEYID" not in f"{result} {result!r}"
    location = Location.of(uri)
    for name in (claims.STATUS_FILE, "_spec.json"):
        assert b"SECRET" not in (location.read(name) or b"")
    with pytest.raises(StoreError, match="--resume") as refused:
        run_inline(SPEC, uri, progress=False)
    assert "SECRET" not in str(refused.value)
    location.delete(reader.list_chunks(uri)[0])
    larger = SPEC.replace(trials_per_cell=3)
    assert run_inline(larger, uri, resume=True, progress=False).rows == 12
    found = verify(uri, lambda spec: Plan(spec).all_ids())
    assert found.sound and (found.rows, found.missing) == (12, 0)
    with pytest.raises(StoreError, match="--out FOLDER"):
        compact(uri)
    assert compact(uri, out=tmp_path / "local").rows == 12
    assert verify(tmp_path / "local", lambda spec: Plan(spec).all_ids()).sound
    local = run_inline(larger, tmp_path / "again", progress=False)
    columns = ["trial_id", "epsilon", "t_star"]
    here, there = (
        {(r["trial_id"], r["epsilon"]): r["t_star"] for r in reader.read(w, columns=columns).to_pylist()}
        for w in (local.out, uri)
    )
    assert here == there


def test_what_fits_and_scores_reads_it_and_no_message_holds_its_key(
    make_rows: MakeRows, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["fit", uri, "--out", str(tmp_path / "m")], ["store", "verify", uri], ["sweep", "status", uri]):
        assert main(command) == 2
    said = capsys.readouterr().err
    assert "holds no meta-dataset" in said and said.count("runs/") >= 3 and "SECRET" not in said
    writer.write_shard(make_rows(3), uri)
    writer.write_shard(make_rows(2, first_seed=3), tmp_path / "more")
    assert len(read_rows(uri)) == 6 and len(read_rows([uri, tmp_path / "more"])) == 10
    writer.write_shard(make_rows(2), uri)
    assert main(["store", "verify", uri]) == 2
    assert re.search(r"`cape store compact s3://runs/\S+ --out FOLDER`", capsys.readouterr().err)


def test_models_and_reports_are_written_to_no_uri(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        ["fit", "meta", "--out", uri],
        ["evaluate", "meta", "--out", uri],
        ["report", "meta", "--out", f"{uri}.html"],
        ["predict", "torch.nn:Linear", "--data", "digits", "--meta-model", uri],
        ["import-csv", uri, "--family", "mlp", "--out", "meta"],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "local folder and not at a URI (s3://...)" in said and "SECRET" not in said, said
    assert not list(tmp_path.iterdir())


def test_a_place_that_pyarrow_does_not_know_is_one_sentence() -> None:
    with pytest.raises(SpecError, match="no place that pyarrow can open") as refused:
        Location.of("foo://user:password@bucket/x")
    assert "password" not in str(refused.value)
