"""What the benchmarks share: the machine in every record, and how a result is written down.

pytest bench --benchmark-json=bench/results/<machine>/<op>.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rtk.ops import _compiled


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., Any]:
    """Time `function()` with warm-up and record bytes and FLOPs a call beside it."""

    def run(function: Callable[[], Any], *, bytes: int = 0, flops: int = 0) -> Any:
        result = benchmark.pedantic(function, rounds=30, warmup_rounds=5, iterations=1)
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            cpu_isa=_compiled._C.cpu_isa(),
            gb_per_s=round(bytes / median / 1e9, 2),
            gflop_per_s=round(flops / median / 1e9, 2),
        )
        return result

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Leave out what names one host: results are kept in the repository."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
