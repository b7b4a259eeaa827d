"""Random draws that belong to trials, and memory that stays in the process."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from cape import randoms
from cape.convergence.draws import CounterDraws, GeneratorDraws
from cape.native import native_module


def test_generator_draws_are_the_same_however_many_threads_make_them() -> None:
    draws = GeneratorDraws(4)
    for slot in range(4):
        draws.seed(slot, slot)
    large = draws.keep(torch.empty(4, 40, 500), 0.7)
    for slot in range(4):
        expected = torch.empty(40, 500).bernoulli_(0.7, generator=torch.Generator().manual_seed(slot))
        assert torch.equal(large[slot], expected)


def test_native_draws_refuse_what_no_generator_has() -> None:
    native_module()
    out, states = torch.zeros(1, 32), torch.zeros(1, 625, dtype=torch.int32)
    torch.ops.cape.seed_draws_(states, 0, 1)
    for probability in (-0.5, 1.5, math.nan):
        with pytest.raises(RuntimeError, match="probability"):
            torch.ops.cape.draw_ones_(out, states, probability)
    for used in (-1, 625, 100_000):
        states[0, -1] = used
        with pytest.raises(RuntimeError, match="used numbers"):
            torch.ops.cape.draw_ones_(out, states, 0.5)
    for std in (-1.0, math.nan):
        with pytest.raises(RuntimeError, match="std must not be negative"):
            torch.ops.cape.normal_(out, 0.0, std)
    assert not out.any()


def test_opcheck() -> None:
    native_module()
    out, states = torch.zeros(1, 32), torch.zeros(1, 625, dtype=torch.int32)
    torch.library.opcheck(torch.ops.cape.seed_draws_, (states, 0, 1))
    torch.ops.cape.seed_draws_(states, 0, 1)
    torch.library.opcheck(torch.ops.cape.draw_ones_, (out, states, 0.5))
    repeated = ("test_schema", "test_autograd_registration", "test_faketensor")  # two calls draw other numbers
    torch.library.opcheck(torch.ops.cape.normal_, (out, 0.0, 1.0), test_utils=repeated)


def test_native_draws_count_as_writes() -> None:
    native_module()
    out, states = torch.zeros(1, 32), torch.zeros(1, 625, dtype=torch.int32)
    torch.ops.cape.seed_draws_(states, 0, 1)
    torch.ops.cape.draw_ones_(out, states, 0.5)
    assert (out._version, states._version) == (1, 2)
    randoms.normal_(out, 1.0)
    assert out._version == 2


def test_counter_draws_are_keyed_by_trial_and_have_the_right_rate() -> None:
    device = torch.device("cpu")
    draws = CounterDraws(4, device)
    for slot, seed in enumerate((11, 12, 2**63 - 1, 0)):
        draws.seed(slot, seed)
    first = draws.keep(torch.empty(4, 50, 400), 0.8).clone()
    second = draws.keep(torch.empty(4, 50, 400), 0.8).clone()
    assert set(first.unique().tolist()) == {0.0, 1.0}
    # 20,000 draws a trial: a standard deviation of 0.0028.
    assert all(abs(float(row.mean()) - 0.8) < 0.012 for row in (*first, *second))
    assert abs(float(((first - 0.8) * (second - 0.8)).mean())) < 0.003
    assert abs(float(((first[0] - 0.8) * (first[1] - 0.8)).mean())) < 0.006
    other = CounterDraws(2, device)
    other.seed(1, 11)
    assert torch.equal(other.keep(torch.empty(2, 50, 400), 0.8)[1], first[0])
    other.move(1, 0)
    assert torch.equal(other.keep(torch.empty(1, 50, 400), 0.8)[0], second[0])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_asked_for_again() -> None:
    # A process of its own: what the heap of this one already holds, other tests have decided.
    program = """
import resource, torch
from pathlib import Path
from cape.memory import kept_memory

def faults_of_ten():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(2**24).fill_(1.0)  # 64 MiB, beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20

before = faults_of_ten()
with kept_memory(torch.device("cpu")):
    faults_of_ten()
    within = faults_of_ten()
with kept_memory(torch.device("cpu")):
    again = faults_of_ten()
    many = [torch.ones(2**24) for _ in range(20)]
    del many
    kept = resident()
print(before, within, again, kept, resident())
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    before, within, again, kept, given_back = map(int, printed.split())
    assert 10 * within < before  # pages may be large, so their number is not fixed
    assert 10 * again < before  # what was left is found again
    assert given_back < kept - 1000  # more than a gigabyte does not
