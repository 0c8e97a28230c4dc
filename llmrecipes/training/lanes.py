"""Lanes: on a CPU, batches of a window side by side, each in a thread of its own.

A step of a small model is some ten thousand short operations. Threads that share each of them meet as many times, and
on a virtual machine every meeting costs a wake-up; threads that take a batch each meet once.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_lanes(function: Callable[[Item], Result], items: Sequence[Item], lanes: int) -> Iterator[Result]:
    """Yields `function(item)` of each item, in their order, `lanes` at a time; PyTorch's threads are shared out.

    `function` is called from several threads: it must change nothing that another call reads.
    """
    lanes = min(lanes, len(items))
    threads = torch.get_num_threads()
    # Counts for the threads that begin from now on, which are the pool's.
    torch.set_num_threads(max(1, threads // lanes))
    try:
        with ThreadPoolExecutor(lanes) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)


def lane_count(batch_rows: int, threads: int) -> int:
    """Returns how many batches a batch of `batch_rows` rows is cut into: as many as threads, all of one size."""
    return max(lanes for lanes in range(1, min(batch_rows, threads) + 1) if batch_rows % lanes == 0)
