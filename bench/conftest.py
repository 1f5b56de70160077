"""What the benchmarks share: the timer, the machine in every record, how a result is written down.

pytest bench --benchmark-json=bench/results/<machine>/<op>.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtk.ops import _compiled

ROUNDS, WARMUP = 50, 10
_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU


class _EventTimer:
    """pytest-benchmark's timer for a GPU: seconds of the GPU between two calls.

    It is called before and after every round. The first call of a pair fills the L2 cache with
    something else, by reading: what was written would be written back during the round. It keeps
    the GPU busy while Python queues the round, so that launches cost no time of the GPU. The second
    call waits and adds the time between the two events.
    """

    __name__ = "cuda_events"  # what pytest-benchmark writes down as the timer

    def __init__(self) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._running = False
        self._now = 0.0

    def __call__(self) -> float:
        if self._running:
            self._end.record()
            self._end.synchronize()
            self._now += self._start.elapsed_time(self._end) / 1e3
        else:
            self._flush.sum()
            torch.cuda._sleep(2_000_000)  # about a millisecond
            self._start.record()
        self._running = not self._running
        return self._now


@pytest.fixture(scope="session")
def copy_rate() -> float:
    """Bytes a second that a copy on the GPU reads and writes together, measured in this run."""
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    timer = _EventTimer()
    times = []
    for _ in range(20):
        start = timer()
        target.copy_(source)
        times.append(timer() - start)
    return 2 * source.numel() / sorted(times)[len(times) // 2]


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Time `function()` with warm-up and record bytes and FLOPs a call beside it.

    `setup()`, if any, runs before every call, outside of the time.

    With `device="cuda"` the time is the GPU's, between events, with a cold L2 cache, and the rate
    stands beside that of a copy in the same run.
    """

    def run(
        function: Callable[[], Any],
        *,
        bytes: int = 0,
        flops: int = 0,
        device: str = "cpu",
        setup: Callable[[], None] | None = None,
    ) -> Any:
        on_gpu = device == "cuda"
        if on_gpu:
            benchmark._timer = _EventTimer()
        result = benchmark.pedantic(
            function,
            setup=setup,
            rounds=ROUNDS if on_gpu else 30,
            warmup_rounds=WARMUP if on_gpu else 5,
            iterations=1,
        )
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(
            torch=torch.__version__,
            bytes=bytes,
            gb_per_s=round(bytes / median / 1e9, 2),
            gflop_per_s=round(flops / median / 1e9, 2),
        )
        if on_gpu:
            ceiling = request.getfixturevalue("copy_rate")
            benchmark.extra_info.update(
                gpu=torch.cuda.get_device_name(),
                tb_per_s=round(bytes / median / 1e12, 3),
                copy_tb_per_s=round(ceiling / 1e12, 3),
                percent_of_copy=round(100 * bytes / median / ceiling, 1),
            )
        else:
            benchmark.extra_info.update(
                threads=torch.get_num_threads(), cpu_isa=_compiled._C.cpu_isa()
            )
        return result

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Leave out what names one host: results are kept in the repository."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
