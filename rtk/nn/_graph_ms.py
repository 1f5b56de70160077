"""The clock by which a choice between kernels is made."""

from __future__ import annotations

from collections.abc import Callable

import torch

_CALLS, _REPLAYS, _WARM_UP = 10, 5, 3


def graph_ms(calls: Callable[[int], object]) -> float:
    """Return milliseconds of one call, as part of a replayed CUDA graph; synchronises.

    `calls(n)` does it n times. Not while a graph is captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls(_WARM_UP)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls(_CALLS)
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / _CALLS)
    return min(times)
