"""Random draws that belong to trials, and memory that stays in the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cape.convergence.draws import CounterDraws, GeneratorDraws


def test_generator_draws_are_the_same_however_many_threads_make_them() -> None:
    draws = GeneratorDraws(4)
    for slot in range(4):
        draws.seed(slot, slot)
    large = draws.keep(torch.empty(4, 40, 500), 0.7)
    for slot in range(4):
        expected = torch.empty(40, 500).bernoulli_(0.7, generator=torch.Generator().manual_seed(slot))
        assert torch.equal(large[slot], expected)


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
from cape.memory import kept_memory

def faults_of_ten():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(2**24).fill_(1.0)  # 64 MiB, beyond what glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults_of_ten()
with kept_memory(torch.device("cpu")):
    faults_of_ten()
    within = faults_of_ten()
after = faults_of_ten()
with kept_memory(torch.device("cpu"), give_back=False):
    faults_of_ten()
with kept_memory(torch.device("cpu"), give_back=False):
    again = faults_of_ten()
print(before, within, after, again)
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    before, within, after, again = map(int, printed.split())
    assert 10 * within < before  # pages may be large, so their number is not fixed
    assert 10 * within < after
    assert 10 * again < after  # a worker's next shard finds it
