"""A benchmark's table: a JSON file that grows case by case, and goes on after a stop."""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import rtk
from rtk.runs import atomic_write

RESULTS = Path(__file__).parent / "results"


def machine(device: str) -> str:
    """Return the name of results' folder: h200 for an NVIDIA H200; cpu."""
    if device == "cpu":
        return "cpu"
    name = re.search(r"[A-Z]+\d+\w*", torch.cuda.get_device_name())
    return name[0].lower() if name else "gpu"


class Table:
    """What was measured, by name, and what failed.

    Args:
        path: of the file. What is there of the same GPU, torch and rtk is kept, and measured no
            more; anything else is written over.
        what: the first line for whoever opens it.
        device: cuda or cpu.
        seconds: after which no case is begun; 0 is no limit.
    """

    def __init__(self, path: Path, what: str, device: str, seconds: float = 0.0) -> None:
        self.path = path
        self.head = {
            "what": what,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "torch": torch.__version__,
            "rtk": rtk.__version__,
        }
        self.rows: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}
        self.left: list[str] = []
        self._end = time.monotonic() + seconds if seconds else float("inf")
        self._broken = False
        if path.exists():
            there = json.loads(path.read_text())
            if {key: there.get(key) for key in self.head} == self.head:
                self.rows, self.failures = there["rows"], there["failures"]

    def measure(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return the row of that name, or None; `run` makes it where it is not there yet.

        Its failure is noted and printed. A case that failed in an earlier run is left alone: it may
        have taken the GPU down. Delete it from the file to try it again.
        """
        if name not in self.rows and name not in self.failures:
            if self._broken or time.monotonic() > self._end:
                self.left.append(name)
            else:
                self._measure(name, run)
        return self.rows.get(name)

    def _measure(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        try:
            self.rows[name] = run()
        except Exception as error:  # a bench goes on, whatever one case met
            self.failures[name] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
            print(f"FAILED {name}", flush=True)
            traceback.print_exc()
            try:
                if torch.cuda.is_available():
                    torch.rand(1, device="cuda").item()  # also fails behind a capture that failed
            except RuntimeError:
                self._broken = True
                print("the GPU's context is lost; run again to go on behind this case", flush=True)
            self.save()

    def save(self) -> None:
        """Write the file, one row a line."""
        rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in self.rows.items())
        head = "".join(f' "{key}": {json.dumps(value)},\n' for key, value in self.head.items())
        failures = json.dumps(self.failures, indent=1).replace("\n", "\n ")
        text = f'{{\n{head} "failures": {failures},\n "rows": {{\n{rows}\n }}\n}}\n'
        atomic_write(self.path, text)

    def assert_whole(self) -> None:
        """Save, say what is left, and fail where a case failed."""
        self.save()
        print(f"{len(self.rows)} rows, {len(self.failures)} failures, {len(self.left)} cases left")
        print(f"in {self.path}")
        if self.left:
            print("run again to go on; the first is", self.left[0])
        assert not self.failures, f"failed: {', '.join(self.failures)}"
        assert not self._broken
