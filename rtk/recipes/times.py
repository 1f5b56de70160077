"""How long stages ran: every attempt is noted in times.json, beside what the stage made.

A run that was stopped and goes on has several attempts, which add up. The times are no part of a
run's identity, and of no artefact: the same run on another machine is still the same.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rtk.config import AdviseConfig, StageConfig
from rtk.identity import config_hash
from rtk.ops import engine
from rtk.runs import lock_folder, write_json

TIMES = "times.json"


@dataclass(frozen=True)
class Attempt:
    """One process's work on a stage.

    Args:
        begin: in seconds since 1970.
        end: likewise; None as long as it lasts, or where the process was killed.
        device: a GPU's name, or CPU.
        place: which one it was, of several alike.
        engine: on, or off where PyTorch alone did the work.
    """

    begin: float
    end: float | None
    device: str
    place: str
    engine: str


@dataclass(frozen=True)
class Spent:
    """What a stage took, all attempts together.

    Args:
        wall: seconds from beginning to end, of each attempt.
        device_seconds: its share of the device: where n stages ran on one device at the same time,
            each counts for an n-th. Over all stages that is how long the device was taken.
        device: a GPU's name, or CPU; of several all, joined by +.
        engine: on or off, or on+off.
    """

    wall: float
    device_seconds: float
    device: str
    engine: str


@contextlib.contextmanager
def noted(stage: StageConfig) -> Iterator[None]:
    """Note the attempt that runs inside the `with`, however it ends.

    A process that is killed leaves its attempt without an end; the next one ends it where the
    killed one last wrote a file. Nothing is noted where the stage did not come to claim its folder.
    """
    folder, begin = Path(stage.out), time.time()
    now = Attempt(begin, None, *_device(stage.device), "on" if engine.is_on() else "off")
    before: list[Attempt] = []
    if _is_of(folder, stage):
        lock_folder(folder)  # whoever works there does so still
        if stage.resume:  # else what the earlier ones did is thrown away
            before = _ended(folder, read_attempts(folder)) or _lost(folder, now)
        _write(folder, [*before, now])
    try:
        yield
    finally:
        if _is_of(folder, stage):
            _write(folder, [*before, replace(now, end=time.time())])


def read_attempts(folder: Path) -> list[Attempt]:
    """Return what is noted in a run's folder; of a damaged file nothing."""
    try:
        return [Attempt(**values) for values in json.loads((folder / TIMES).read_text())]
    except (OSError, ValueError, TypeError):
        return []


def spent(root: Path) -> dict[str, Spent]:
    """Return what the stages below `root` took, by folder relative to it (pretrain/NAME)."""
    attempts = {
        path.parent.relative_to(root).as_posix(): _ended(path.parent, read_attempts(path.parent))
        for path in sorted(root.glob(f"*/*/{TIMES}"))
    }
    shares = _shares(attempts)
    return {
        run: Spent(
            wall=sum(_length(attempt) for attempt in own),
            device_seconds=shares[run],
            device="+".join(dict.fromkeys(attempt.device for attempt in own)),
            engine="+".join(sorted({attempt.engine for attempt in own}, reverse=True)),
        )
        for run, own in attempts.items()
        if own
    }


def _shares(attempts: Mapping[str, list[Attempt]]) -> dict[str, float]:
    """Divide each moment of a device among the attempts that run on it."""
    changes: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for run, own in attempts.items():
        for attempt in own:
            changes[attempt.place] += [
                (attempt.begin, 1, run),
                (attempt.begin + _length(attempt), -1, run),
            ]
    shares = dict.fromkeys(attempts, 0.0)
    for of_device in changes.values():
        running: dict[str, int] = defaultdict(int)
        last = 0.0
        for moment, change, run in sorted(of_device):
            at_once = sum(running.values())
            for busy, count in running.items():
                shares[busy] += (moment - last) * count / at_once if count else 0.0
            running[run] += change
            last = moment
            if not running[run]:
                del running[run]
    return shares


def _length(attempt: Attempt) -> float:
    return max(0.0, (attempt.begin if attempt.end is None else attempt.end) - attempt.begin)


def _device(name: str) -> tuple[str, str]:
    """Return what a stage's `device` is, by the rule of `rtk.train.resolve_device`, and which."""
    if name == "cpu" or not torch.cuda.is_available():
        return "CPU", "CPU"
    index = name.partition(":")[2]
    known = index.isdecimal() and int(index) < torch.cuda.device_count()
    found = torch.cuda.get_device_properties(int(index) if known else torch.cuda.current_device())
    return found.name, str(found.uuid)  # the same for all processes, whatever each of them sees


def _is_of(folder: Path, stage: StageConfig) -> bool:
    """Whether `stage` has claimed the folder, now or in an earlier process."""
    if isinstance(stage, AdviseConfig):  # several questions share its folder
        return folder.is_dir()
    try:
        with (folder / "config.yaml").open() as file:
            return config_hash(stage) in file.readline()
    except (OSError, ValueError):
        return False


def _ended(folder: Path, attempts: list[Attempt]) -> list[Attempt]:
    """Return the attempts, one that was killed ended where it last wrote a file."""
    return [
        replace(attempt, end=max(attempt.begin, _last_written(folder)))
        if attempt.end is None
        else attempt
        for attempt in attempts
    ]


def _lost(folder: Path, like: Attempt) -> list[Attempt]:
    """Return the attempt that was killed before anything was noted, which began by claiming."""
    claimed = folder / "config.yaml"
    if not claimed.exists():
        return []
    return [replace(like, begin=claimed.stat().st_mtime, end=_last_written(folder))]


def _last_written(folder: Path) -> float:
    files = [path for path in folder.iterdir() if path.is_file() and path.name != TIMES]
    return max((path.stat().st_mtime for path in files), default=0.0)


def _write(folder: Path, attempts: list[Attempt]) -> None:
    values: list[dict[str, Any]] = [asdict(attempt) for attempt in attempts]
    write_json(folder / TIMES, values)
