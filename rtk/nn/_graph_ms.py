"""The clock by which a choice between kernels is made."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

_CALLS, _REPLAYS, _WARM_UP = 10, 5, 3
_FEW = 3


def graph_ms(calls: Callable[[int], object], *, enough: float = math.inf) -> float:
    """Return milliseconds of one call, as part of a replayed CUDA graph; synchronises.

    `calls(n)` does it n times. Where a few of them took more than `enough` milliseconds each, that
    rough number is the answer. Not while a graph is captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls(_WARM_UP)
    torch.cuda.current_stream().wait_stream(side)
    if enough < math.inf:
        first = _replayed_ms(calls, _FEW, 1)
        if first > enough:
            return first
    return _replayed_ms(calls, _CALLS, _REPLAYS)


def _replayed_ms(calls: Callable[[int], object], count: int, replays: int) -> float:
    """Return milliseconds of one of `count` calls in a graph, in the fastest of the replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls(count)
    graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return min(times)
