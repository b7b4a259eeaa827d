"""Cut a plan into shards: large ones first, smaller ones towards the end, so that no straggler holds the end up.

Guided self-scheduling (Polychronopoulos & Kuck, 1987): each shard takes a fixed part of the work that is then left. A
million trials for 64 workers are about a thousand shards, which matters because each costs the driver about 18 ms.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from cape.sweep.plan import Group, Shard

_SHARE = 3  # a shard is at most this part of what each worker still has ahead
# The driver starts one shard after the other, in about 18 ms: a shard keeps a worker busy twice as long as it takes to
# serve all the others.
_DRIVER_SECONDS = 0.036
LEAST_SECONDS = 2.0  # of a shard at the very end: short against a chunk, long against what a shard costs the driver


def cut(wholes: Sequence[Shard], workers: int, seconds: Callable[[Group], float] | None = None) -> list[Shard]:
    """Cut long shards into pieces, all groups interleaved, in the order in which they are to be started.

    Args:
        wholes: one shard of any length for each group.
        workers: how many run at the same time.
        seconds: expected time of one trial of a group; all the same where None.

    Returns:
        Shards of at least one trial, each of one group, that hold every trial once.
    """
    cost = [max(seconds(w.group), 1e-6) if seconds else 1.0 for w in wholes]
    least = max(LEAST_SECONDS, _DRIVER_SECONDS * workers) if seconds else 1.0
    total = left = sum(len(w) * c for w, c in zip(wholes, cost))
    taken = [0] * len(wholes)
    # The group that is furthest behind comes next, so that all end together and each one's ETA is worth reading. Of
    # those that have not begun, one of each family: what a family costs is then known early.
    ranks: Counter[str] = Counter()
    queue = []
    for i, whole in enumerate(wholes):
        if len(whole):
            queue.append((0.0, ranks[whole.group.family], i))
            ranks[whole.group.family] += 1
    heapq.heapify(queue)
    shards = []
    while queue:
        _, rank, i = heapq.heappop(queue)
        whole, start = wholes[i], taken[i]
        goal = max(left / (_SHARE * max(1, workers)), min(least, total / (4 * max(1, workers))))
        size = min(max(1, round(goal / cost[i])), len(whole) - start)
        shards.append(Shard(whole.group, whole.positions[start : start + size]))
        taken[i] += size
        left -= size * cost[i]
        if taken[i] < len(whole):
            heapq.heappush(queue, (taken[i] / len(whole), rank, i))
    return shards
