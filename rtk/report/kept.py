"""A finished figure as one small CSV: every stage, every number, what it took, and no arrays.

From it alone the figure, its table and its tests are made again. A row is a number of a stage;
`stage` says whose: pretrain, draw, transfer and evaluate (whose numbers the figure is made of),
distances, or figure, whose rows are the figure's own settings, as text.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rtk.errors import RtkError
from rtk.report.figure import Figure, Line
from rtk.report.paper import PAPER
from rtk.report.results import MIOU, OOD, Result
from rtk.runs import atomic_write

COLUMNS = (
    "stage",
    "run",
    "network",
    "pretraining",
    "eps",
    "robust",
    "source",
    "scheme",
    "granularity",
    "draw_task",
    "sparsity",
    "target",
    "transfer",
    "pretrain_seed",
    "seed",
    "metric",
    "of",
    "value",
    "images",
    "seconds",
    "device_seconds",
    "config_hash",
)
_OF_RUN = COLUMNS[2:15]  # what a stage is, apart from its numbers
_METRICS = ("top1", "mean_per_class", "pgd_top1", MIOU, "pixel_accuracy", "actual_sparsity")
OFF = "-engine-off"  # ends the name of a figure's file whose stages ran by PyTorch alone


@dataclass(frozen=True)
class Number:
    """A number of a stage.

    Args:
        metric: top1, ..., ood_auc, distance.
        value: a fraction, or a distance.
        of: the attack of pgd_top1, the other set of ood_auc.
    """

    metric: str
    value: float
    of: str = ""


@dataclass(frozen=True)
class Stage:
    """A stage that a figure was made of.

    Args:
        kind: pretrain, draw, transfer, evaluate or distances.
        run: its folder, relative to the recipe's.
        columns: what it is: some of network, pretraining, eps, robust, ...
        numbers: what came out; may be none.
        images: test images behind them.
        seconds: from its beginning to its end; None where it was not noted.
        device_seconds: its share of the device's time.
        config_hash: of its configuration.
    """

    kind: str
    run: str
    columns: Mapping[str, Any]
    numbers: tuple[Number, ...]
    images: int | None
    seconds: float | None
    device_seconds: float | None
    config_hash: str


@dataclass(frozen=True)
class Kept:
    """A figure as it is kept.

    Args:
        figure: what is drawn and compared.
        scale: what was run.
        engine: on, or off where PyTorch alone did the work.
        device: what it ran on.
        stages: all that it was made of.
        note: what a reader must know.
        facts: what was run, by heading.
        features: what distances were measured with.
    """

    figure: Figure
    scale: str
    engine: str
    device: str
    stages: tuple[Stage, ...]
    note: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    features: str = ""

    @property
    def name(self) -> str:
        """The name of its file, without the ending."""
        return self.figure.name + ("" if self.engine == "on" else OFF)

    @property
    def results(self) -> list[Result]:
        """The numbers of its evaluations, in the order of the file."""
        return [_result(stage) for stage in self.stages if stage.kind == "evaluate"]

    @property
    def distances(self) -> dict[str, float]:
        """Target -> Fréchet distance from the source."""
        return {
            number.of: number.value
            for stage in self.stages
            if stage.kind == "distances"
            for number in stage.numbers
        }


def public_name(name: str) -> str:
    """Return a set's name without the folder of its file, which is of one machine."""
    return re.sub(r"^(npz|folder):(?:.*/)", r"\1:", name)


def numbers_of(result: Result) -> tuple[Number, ...]:
    """Return the numbers of an evaluation, without those of single classes."""
    found = []
    for metric in _METRICS:
        value = result.extra.get(metric) if metric == "pixel_accuracy" else result.value(metric)
        if value is not None:
            attack = (result.attack or "") if metric == "pgd_top1" else ""
            found.append(Number(metric, float(value), attack))
    areas = result.extra.get("ood_auc", {})
    found += [Number("ood_auc", float(area), public_name(name)) for name, area in areas.items()]
    return tuple(found)


def write_kept(kept: Kept, folder: str | Path) -> Path:
    """Write a figure's CSV atomically and return its path."""
    path = Path(folder) / f"{kept.name}.csv"
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(_settings(kept))
    for stage in kept.stages:
        writer.writerows(_rows(stage))
    atomic_write(path, buffer.getvalue())
    return path


def read_kept(path: str | Path) -> Kept:
    """Return the figure that `write_kept` wrote.

    Raises:
        RtkError: where there is no such file, or something in it is not what was written.
    """
    path = Path(path)
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RtkError(f"cannot read {path} ({error}); keep the figure again") from error
    try:
        return _kept(rows)
    except (KeyError, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RtkError(
            f"{path} is not a figure that `rtk reproduce --keep` wrote ({reason}); keep it again"
        ) from error


def _settings(kept: Kept) -> Iterator[dict[str, Any]]:
    figure = kept.figure
    definition = {
        "title": figure.title,
        "lines": [asdict(line) for line in figure.lines],
        "panels": figure.panels,
        "metrics": figure.metrics,
        "high": figure.high,
        "scatter": figure.scatter,
    }
    values = {
        "definition": json.dumps(definition),
        "scale": kept.scale,
        "engine": kept.engine,
        "device": kept.device,
        "note": kept.note,
        "facts": json.dumps(dict(kept.facts)),
        "features": kept.features,
    }
    for name, value in values.items():
        yield {"stage": "figure", "run": figure.name, "metric": name, "value": value}


def _rows(stage: Stage) -> Iterator[dict[str, Any]]:
    """Yield a row a number, at least one; what the stage took stands in the first, to be summed."""
    common = {
        "stage": stage.kind,
        "run": stage.run,
        **{name: _text(stage.columns.get(name)) for name in _OF_RUN},
        "images": _text(stage.images),
        "config_hash": stage.config_hash,
    }
    took = {
        "seconds": _seconds(stage.seconds),
        "device_seconds": _seconds(stage.device_seconds),
    }
    for number in stage.numbers or (None,):
        shown = {}
        if number is not None:
            shown = {"metric": number.metric, "of": number.of, "value": repr(number.value)}
        yield {**common, **shown, **took}
        took = {}


def _text(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _kept(rows: Iterable[dict[str, str]]) -> Kept:
    settings: dict[str, str] = {}
    name = ""
    stages: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        if row["stage"] == "figure":
            name = row["run"]
            settings[row["metric"]] = row["value"]
        else:
            stages.setdefault(row["run"], []).append(row)
    definition = json.loads(settings["definition"])
    claim = PAPER[name].claim if name in PAPER else ""
    figure = Figure(
        name=name,
        title=definition["title"],
        claim=claim,
        lines=tuple(Line(**line) for line in definition["lines"]),
        panels=tuple(definition["panels"]),
        metrics=tuple(definition["metrics"]),
        high=float(definition["high"]),
        scatter=bool(definition["scatter"]),
    )
    return Kept(
        figure=figure,
        scale=settings["scale"],
        engine=settings["engine"],
        device=settings["device"],
        stages=tuple(_stage(own) for own in stages.values()),
        note=settings["note"],
        facts=json.loads(settings["facts"]),
        features=settings["features"],
    )


_KINDS: dict[str, Any] = {
    "eps": float,
    "sparsity": float,
    "robust": lambda text: text == "true",
    "pretrain_seed": int,
    "seed": int,
}


def _stage(rows: list[dict[str, str]]) -> Stage:
    first = rows[0]
    columns = {
        name: _KINDS.get(name, str)(first[name]) if first[name] else None for name in _OF_RUN
    }
    return Stage(
        kind=first["stage"],
        run=first["run"],
        columns=columns,
        numbers=tuple(
            Number(row["metric"], float(row["value"]), row["of"]) for row in rows if row["metric"]
        ),
        images=int(first["images"]) if first["images"] else None,
        seconds=float(first["seconds"]) if first["seconds"] else None,
        device_seconds=float(first["device_seconds"]) if first["device_seconds"] else None,
        config_hash=first["config_hash"],
    )


def _result(stage: Stage) -> Result:
    columns = stage.columns
    values = {number.metric: number.value for number in stage.numbers if not number.of}
    attacked = next((n for n in stage.numbers if n.metric == "pgd_top1"), None)
    areas = {n.of: n.value for n in stage.numbers if n.metric == OOD.rstrip(".")}
    extra: dict[str, Any] = {"draw_task": columns["draw_task"]}
    extra |= {name: values[name] for name in (MIOU, "pixel_accuracy") if name in values}
    if areas:
        extra["ood_auc"] = areas
    return Result(
        run=stage.run,
        pretrain=columns["pretraining"],
        robust=columns["robust"],
        pretrain_seed=columns["pretrain_seed"],
        source=columns["source"],
        arch=columns["network"],
        scheme=columns["scheme"],
        granularity=columns["granularity"],
        sparsity=columns["sparsity"],
        actual_sparsity=values.get("actual_sparsity"),
        target=columns["target"],
        transfer=columns["transfer"],
        seed=columns["seed"],
        evaluated_on=None,
        attack=None if attacked is None else attacked.of or None,
        top1=values.get("top1"),
        mean_per_class=values.get("mean_per_class"),
        pgd_top1=None if attacked is None else attacked.value,
        images=stage.images,
        config_hash=stage.config_hash,
        rtk=None,
        checkpoint_sha256=None,
        extra=extra,
    )
