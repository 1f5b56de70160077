"""What figures took: seconds of the device, what they share, and what the engine saves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rtk.report.figure_table import p_value, plus_minus
from rtk.report.kept import Kept, Stage
from rtk.report.statistics import paired_test

_KINDS = ("pretrain", "draw", "transfer", "evaluate", "distances")
_OUTCOMES = ("top1", "miou", "pgd_top1")


@dataclass(frozen=True)
class Cost:
    """What a figure took.

    Args:
        stages: how many it is made of.
        seconds: device seconds of all of them.
        shared: of those that other figures use too.
        with_: the names of those figures.
        unknown: stages whose time was not noted.
    """

    stages: int
    seconds: float
    shared: float
    with_: tuple[str, ...]
    unknown: int


def cost(kept: Kept | None, others: Sequence[Kept]) -> Cost:
    """Return what a figure took beside others; without one, all others together, each stage once.

    Without one, `seconds` adds up the figures and `shared` the stages.
    """
    seen: dict[str, list[str]] = defaultdict(list)
    once: dict[str, Stage] = {}
    for other in others:
        for stage in other.stages:
            seen[stage.run].append(other.figure.name)
            once[stage.run] = stage
    if kept is None:
        stages = list(once.values())
        added = sum(_seconds(stage) * len(seen[stage.run]) for stage in stages)
        return _cost(stages, added, sum(map(_seconds, stages)), ())
    shared = [stage for stage in kept.stages if stage.run in seen]
    names = dict.fromkeys(name for stage in shared for name in seen[stage.run])
    own = sum(map(_seconds, kept.stages))
    return _cost(kept.stages, own, sum(map(_seconds, shared)), tuple(names))


def by_kind(kept: Kept) -> dict[str, float]:
    """Return the device seconds of a figure's stages by what they do."""
    found: dict[str, float] = defaultdict(float)
    for stage in sorted(kept.stages, key=lambda stage: _KINDS.index(stage.kind)):
        found[stage.kind] += _seconds(stage)
    return dict(found)


def taken(seconds: float) -> str:
    """Return seconds as text: whole ones, below ten with a digit."""
    return f"{seconds:.1f}" if seconds < 10 else f"{seconds:.0f}"


def engine_rows(on: Kept, off: Kept) -> tuple[list[str], list[list[str]]]:
    """Return a table of a figure's stages with the engine on and off: seconds, then accuracy.

    Only stages that both have, under the same name, are compared.
    """
    theirs = {stage.run: stage for stage in off.stages}
    pairs = [(stage, theirs[stage.run]) for stage in on.stages if stage.run in theirs]
    heads = ["", "stages", "engine on", "engine off", "off / on", "p"]
    rows = []
    for kind in (*_KINDS, None):
        timed = [
            (a.device_seconds, b.device_seconds)
            for a, b in pairs
            if kind in (None, a.kind) and a.device_seconds and b.device_seconds
        ]
        if timed:
            ours = sum(a for a, _ in timed)
            plain = sum(b for _, b in timed)
            what = f"{kind or 'all'}, seconds on {on.device}"
            rows.append(
                [what, str(len(timed)), taken(ours), taken(plain), f"{plain / ours:.2f} x", ""]
            )
    for metric in _OUTCOMES:
        found = paired_test(_values(on, metric), _values(off, metric))
        if found is None:
            continue
        ours_mean = 100 * _mean(on, off, metric)
        plain_mean = 100 * _mean(off, on, metric)
        difference = plus_minus(found.difference, "+")
        rows.append(
            [
                f"{metric}, mean over the runs (on - off: {difference} points)",
                str(found.n),
                f"{ours_mean:.2f} %",
                f"{plain_mean:.2f} %",
                "",
                p_value(found.t),
            ]
        )
    return heads, rows


def _cost(stages: Sequence[Stage], seconds: float, shared: float, with_: tuple[str, ...]) -> Cost:
    unknown = sum(stage.device_seconds is None for stage in stages)
    return Cost(len(stages), seconds, shared, with_, unknown)


def _seconds(stage: Stage) -> float:
    return stage.device_seconds or 0.0


def _values(kept: Kept, metric: str) -> dict[str, float]:
    return {
        stage.run: number.value
        for stage in kept.stages
        if stage.kind == "evaluate"
        for number in stage.numbers
        if number.metric == metric
    }


def _mean(kept: Kept, other: Kept, metric: str) -> float:
    own, theirs = _values(kept, metric), _values(other, metric)
    values = [value for run, value in own.items() if run in theirs]
    return sum(values) / len(values)
