"""Ray nodes as a cluster has them, each started by ``ray start`` in processes of its own; and what a node counts."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Node:
    """A running node.

    Attributes:
        process: of ``ray start --block``; what it has started is in its process group.
        address: of the head, for other nodes and for drivers.
        temporary: its folder; short, since a Unix socket's name has room for about a hundred characters.
        log: what it says.
    """

    process: subprocess.Popen[bytes]
    address: str
    temporary: Path
    log: Path

    def raylet(self) -> int:
        """Return the process that is the node: when it dies, so does every worker of it."""
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().split(b"\0")
                # The processes that it starts are given the same folder; only its own program is the raylet.
                if words[0].endswith(b"/raylet") and f"--temp_dir={self.temporary}".encode() in words:
                    return int(path.name)
        raise AssertionError(f"no raylet of {self.temporary}: {self.log.read_text()[-2000:]}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def clean_environment(**more: str) -> dict[str, str]:
    """Return this environment without what Ray may have put there, with ``ray`` and ``python`` of this one first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"
    return {**kept, "OMP_NUM_THREADS": "1", **more}


@contextmanager
def ray_start(name: str, folder: Path, environment: Mapping[str, str], *options: str, head: str = "") -> Iterator[Node]:
    """Start a node (a head where ``head``, the address of one, is empty) and end all its processes after the block."""
    ray = Path(sys.executable).with_name("ray")
    if not ray.exists():
        pytest.skip("the program `ray` is not installed: pip install 'ray[default]'")
    temporary = Path("/tmp") / f"cape-{os.getpid()}-{name}"
    port, agent, client = free_ports(3)
    where = [f"--address={head}"] if head else ["--head", f"--port={port}", f"--ray-client-server-port={client}"]
    command = [str(ray), "start", "--block", "--disable-usage-stats", f"--temp-dir={temporary}"]
    command += [f"--dashboard-agent-listen-port={agent}", *where, *options]
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=dict(environment), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield Node(process, head or f"127.0.0.1:{port}", temporary, log)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
        shutil.rmtree(temporary, ignore_errors=True)
        from ray._private.utils import get_ray_address_file

        current = Path(get_ray_address_file(None))  # `ray start` notes there what `ray.init()` connects to
        if not head and current.is_file() and current.read_text().strip().endswith(f":{port}"):
            current.unlink()


def counters(family: str) -> dict[tuple[str, str], float]:
    """Return the sweep's counters by name and worker, as the node's own metrics endpoint tells them to Prometheus."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found = {}
    for line in urllib.request.urlopen(url, timeout=10).read().decode().splitlines():
        sample = re.match(r"(ray_cape_\w+)\{(.*)\} (\S+)", line)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', sample[2])) if sample else {}
        if sample and labels["family"] == family:
            found[sample[1], labels["WorkerId"]] = float(sample[3])
    return found
