"""Reads every `result.json` under a folder and writes them as one `results.csv`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtk.config import TRANSFER_MODES
from rtk.errors import RtkError
from rtk.granularity import sort_key
from rtk.runs import read_json

SCHEMES = ("dense", "omp", "imp", "imp-us", "imp-ds", "a-imp", "a-imp-us", "a-imp-ds", "lmp")
MIOU = "miou"
OOD = "ood_auc."  # a metric is this and the name of the other set


@dataclass(frozen=True)
class Result:
    """One evaluated model. Accuracies and sparsities are fractions in [0, 1].

    The fields are the columns of `results.csv`, in this order.

    Args:
        run: the run's folder relative to the folder that was read.
        pretrain: natural, or the attack of robust pretraining, e.g. pgd-linf-0.1.
        robust: whether pretraining was robust.
        pretrain_seed: seed of pretraining.
        source: the task of pretraining.
        arch: the network.
        scheme: how the ticket was drawn, or dense.
        granularity: of the ticket; None for a dense one.
        sparsity: the sparsity that was asked for; 0 for dense.
        actual_sparsity: the sparsity that was reached.
        target: the downstream task; of a pretrained model its own.
        transfer: how the ticket was transferred; None for the pretrained model itself.
        seed: seed of the transfer.
        evaluated_on: the set whose test images these are; None stands for `target`.
        attack: the attack of `pgd_top1`.
        top1: accuracy on the test images; None of a segmentation, which has `miou` instead.
        mean_per_class: the mean of the classes' accuracies.
        pgd_top1: accuracy under `attack`; None where none was run.
        images: number of test images.
        config_hash: of the evaluation's configuration.
        rtk: the version that evaluated.
        checkpoint_sha256: of the checkpoint that was evaluated.
        extra: what else result.json holds, `ood_auc` by set and `miou` among it; columns after the
            others.
    """

    run: str
    pretrain: str
    robust: bool
    pretrain_seed: int | None
    source: str | None
    arch: str | None
    scheme: str
    granularity: str | None
    sparsity: float
    actual_sparsity: float | None
    target: str
    transfer: str | None
    seed: int | None
    evaluated_on: str | None
    attack: str | None
    top1: float | None
    mean_per_class: float | None
    pgd_top1: float | None
    images: int | None
    config_hash: str | None
    rtk: str | None
    checkpoint_sha256: str | None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def replicate(self) -> tuple[int | None, int | None]:
        """What repetitions of one setting differ in: (pretraining seed, transfer seed)."""
        return (self.pretrain_seed, self.seed)

    def value(self, metric: str) -> float | None:
        """Return a metric: a field, miou or `OOD` and a set; None where it has none."""
        if metric == MIOU:
            return self.extra.get(MIOU)
        if metric.startswith(OOD):
            return self.extra.get("ood_auc", {}).get(metric.removeprefix(OOD))
        return getattr(self, metric)

    @property
    def ood_metrics(self) -> list[str]:
        """The metrics of `ood_auc`."""
        return [OOD + name for name in self.extra.get("ood_auc", {})]

    @property
    def task(self) -> str:
        """The target, and the images of the test where those are others."""
        if self.evaluated_on in (None, self.target):
            return self.target
        return f"{self.target} tested on {self.evaluated_on}"


COLUMNS = tuple(f.name for f in dataclasses.fields(Result) if f.name != "extra")
_REQUIRED = ("pretrain", "target", "top1")
_FRACTIONS = ("sparsity", "actual_sparsity", "top1", "mean_per_class", "pgd_top1", MIOU)
_COUNTS = ("pretrain_seed", "seed", "images")


def _problem(name: str, value: Any) -> str | None:
    """Return what was expected where `value` cannot be column `name`, else None."""
    if value is None:
        return "a value" if name in _REQUIRED else None
    if name in _FRACTIONS or name.startswith(OOD):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            return "a fraction in [0, 1]"
        return "a sparsity below 1" if name == "sparsity" and value == 1 else None
    if name in _COUNTS:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole and value >= 0 else "a whole number >= 0"
    if name == "robust":
        return None if isinstance(value, bool) else "true or false"
    return None if isinstance(value, str) else "a text"


def _parse(values: Any, path: Path, run: str) -> Result:
    again = "run `rtk evaluate` again for it, or remove the file"
    if not isinstance(values, dict):
        raise RtkError(f"{path}: expected a JSON object, got {type(values).__name__}; {again}")
    known: dict[str, Any] = {name: values.get(name) for name in COLUMNS} | {"run": run}
    areas = values.get("ood_auc", {})
    if not isinstance(areas, dict):
        raise RtkError(f"{path}: ood_auc: expected areas by set, got {areas!r}; {again}")
    checked = known | {MIOU: values.get(MIOU)} | {OOD + name: areas[name] for name in areas}
    if checked[MIOU] is not None and known["top1"] is None:
        del checked["top1"]
    for name, value in checked.items():
        expected = _problem(name, value)
        if expected:
            raise RtkError(f"{path}: {name}: expected {expected}, got {value!r}; {again}")
    if known["robust"] is None:
        known["robust"] = known["pretrain"] != "natural"
    if known["sparsity"] is None:
        known["sparsity"] = 0.0
    if known["scheme"] is None:
        known["scheme"] = "ticket" if known["sparsity"] else "dense"
    if known["scheme"] == "dense":
        known["granularity"] = None  # nothing was pruned, in groups of whatever shape
    extra = {name: value for name, value in values.items() if name not in COLUMNS}
    return Result(**known, extra=extra)


def rank(name: str | None, known: tuple[str, ...]) -> tuple[int, str]:
    """Return a sort key: none first, then the known names in their order, then the others."""
    if name is None:
        return (-1, "")
    return (known.index(name) if name in known else len(known), name)


def _order(result: Result) -> tuple[Any, ...]:
    return (
        result.task,
        rank(result.transfer, TRANSFER_MODES),
        sort_key(result.granularity),
        rank(result.scheme, SCHEMES),
        result.sparsity,
        result.robust,
        result.pretrain,
        *(-1 if seed is None else seed for seed in result.replicate),
        result.run,
    )


def read_results(folder: str | Path) -> list[Result]:
    """Return every result under `folder`, in an order that depends on their contents only.

    Raises RtkError where there is no folder, no result in it, or one that cannot be used.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RtkError(f"report: {folder} is no folder; give the one that holds the runs")
    paths = [path for path in folder.rglob("result.json") if path.is_file()]
    if not paths:
        raise RtkError(
            f"report: no result.json under {folder}; run `rtk evaluate` on the models there first"
        )
    results = [
        _parse(read_json(path), path, path.parent.relative_to(folder).as_posix()) for path in paths
    ]
    return sorted(results, key=_order)


def read_runs(folder: str | Path, runs: Iterable[str]) -> list[Result]:
    """Return the results of some of the runs under `folder`, in the order in which they are named.

    Raises RtkError where one has no result, or one that cannot be used.
    """
    folder = Path(folder)
    paths = {run: folder / run / "result.json" for run in runs}
    return [_parse(read_json(path), path, run) for run, path in paths.items()]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def to_csv(results: list[Result]) -> str:
    """Return one row per result; numbers as result.json has them, empty where it has none."""
    extras = sorted({name for result in results for name in result.extra})
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *extras])
    for result in results:
        known = [_cell(getattr(result, name)) for name in COLUMNS]
        writer.writerow([*known, *(_cell(result.extra.get(name)) for name in extras)])
    return buffer.getvalue()
