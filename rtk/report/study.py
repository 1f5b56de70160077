"""Groups results into settings: what is compared with what, and which seeds belong together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from rtk.config import TRANSFER_MODES
from rtk.granularity import sort_key
from rtk.report.results import MIOU, OOD, SCHEMES, Result, rank
from rtk.report.statistics import Estimate, mean, paired_difference, summarize

# And OOD + the name of any other set.
METRICS = {"top1": "top-1", "pgd_top1": "PGD top-1", MIOU: "mean IoU"}

# Results that differ in one of these are never averaged. Where all agree it is not shown either.
_CONTEXT = ("arch", "source", "attack")
_ORDER: dict[str, Callable[[str], Any]] = {
    "scheme": partial(rank, known=SCHEMES),
    "granularity": sort_key,
    "transfer": partial(rank, known=TRANSFER_MODES),
}

Replicate = tuple[int | None, int | None]


def metric_name(metric: str) -> str:
    """Return what a metric is called: top-1, PGD top-1, OoD AUC svhn."""
    if metric.startswith(OOD):
        return f"OoD AUC {short_name(metric.removeprefix(OOD))}"
    return METRICS[metric]


def short_name(value: object) -> str:
    """Return a set's name without the path and ending of its file: npz:a/birds.npz is birds."""
    return re.sub(r"^(?:npz|folder):(?:.*/)?", "", str(value)).removesuffix(".npz")


@dataclass(frozen=True)
class Panel:
    """What one plot shows: accuracy against sparsity for one way of transferring to one target.

    Args:
        target: the task, as in `Result.task`.
        transfer: finetune, ...; None for the pretrained model itself.
        granularity: of the tickets; None where there are only dense ones.
        context: the values of `Study.varying`, e.g. ("resnet18",); empty where all runs agree.
    """

    target: str
    transfer: str | None
    granularity: str | None
    context: tuple[str | None, ...] = ()

    @property
    def order(self) -> tuple[Any, ...]:
        """A sort key."""
        return (
            self.target,
            [value or "" for value in self.context],
            rank(self.transfer, TRANSFER_MODES),
            sort_key(self.granularity),
        )

    @property
    def task(self) -> tuple[Any, ...]:
        """The panel but for its granularity: what dense and pruned tickets share."""
        return (self.target, self.transfer, self.context)

    @property
    def names(self) -> list[str]:
        """Its parts for a title, from the general to the special."""
        transfer = self.transfer or "pretrained model, not transferred"
        parts = [self.target, *self.context, transfer, self.granularity]
        return [part for part in parts if part]


@dataclass(frozen=True)
class Setting:
    """One row of the table: a panel, a scheme and a sparsity; what remains are variants and seeds.

    Args:
        panel: target, transfer, granularity (None for a dense ticket) and context.
        scheme: how the ticket was drawn, or dense.
        sparsity: the fraction of zeros that was asked for.
    """

    panel: Panel
    scheme: str
    sparsity: float

    @property
    def order(self) -> tuple[Any, ...]:
        """A sort key."""
        return (*self.panel.order, rank(self.scheme, SCHEMES), self.sparsity)


class Study:
    """Results grouped for comparison.

    Args:
        results: as `read_results` gives them, at least one.
    """

    def __init__(self, results: list[Result]) -> None:
        self.results = results
        pretrained = sorted({(result.robust, result.pretrain) for result in results})
        self.variants = list(dict.fromkeys(name for _, name in pretrained))
        naturals = [name for robust, name in pretrained if not robust]
        self.baseline = "natural" if "natural" in naturals else next(iter(naturals), None)
        self.metrics = [m for m in METRICS if any(r.value(m) is not None for r in results)]
        self.metrics += sorted({metric for result in results for metric in result.ood_metrics})
        self.varying = [name for name in _CONTEXT if len(self.distinct(name)) > 1]

    def distinct(self, name: str) -> list[Any]:
        """Return the values of one column without None, names that rtk knows in their order."""
        values = {getattr(result, name) for result in self.results} - {None}
        return sorted(values, key=_ORDER.get(name))

    @cached_property
    def groups(self) -> dict[Setting, list[Result]]:
        """Every setting with its results, in the order of the table."""
        groups: dict[Setting, list[Result]] = defaultdict(list)
        for result in self.results:
            context = tuple(getattr(result, name) for name in self.varying)
            panel = Panel(result.task, result.transfer, result.granularity, context)
            groups[Setting(panel, result.scheme, result.sparsity)].append(result)
        return dict(sorted(groups.items(), key=lambda item: item[0].order))

    def values(self, setting: Setting, variant: str, metric: str) -> dict[Replicate, float]:
        """Return seed -> value; several results of one seed (see `duplicates`) are averaged."""
        found: dict[Replicate, list[float]] = defaultdict(list)
        for result in self.groups[setting]:
            value = result.value(metric)
            if result.pretrain == variant and value is not None:
                found[result.replicate].append(value)
        return {seed: mean(values) for seed, values in found.items()}

    def metrics_of(self, setting: Setting) -> list[str]:
        """Return the metrics that one may expect: mean IoU of a segmentation, else the others."""
        segmented = all(result.top1 is None for result in self.groups[setting])
        return [metric for metric in self.metrics if (metric == MIOU) == segmented]

    def panel_metrics(self, panel: Panel) -> list[str]:
        """Return `metrics_of` the settings of a panel."""
        settings = [setting for line in self.series(panel).values() for setting in line]
        found = {metric for setting in settings for metric in self.metrics_of(setting)}
        return [metric for metric in self.metrics if metric in found]

    def seeds(self, setting: Setting, variant: str) -> int:
        """Return how many repetitions there are."""
        return len({r.replicate for r in self.groups[setting] if r.pretrain == variant})

    def estimate(self, setting: Setting, variant: str, metric: str) -> Estimate | None:
        """Return mean and sample standard deviation over the seeds."""
        return summarize(self.values(setting, variant, metric).values())

    def difference(self, setting: Setting, variant: str, metric: str) -> Estimate | None:
        """Return variant - natural with its paired standard error; None without pairs."""
        if self.baseline is None or variant == self.baseline:
            return None
        ours = self.values(setting, variant, metric)
        return paired_difference(ours, self.values(setting, self.baseline, metric))

    @property
    def duplicates(self) -> list[list[Result]]:
        """Results that differ neither in setting nor in seed, e.g. by a learning rate only."""
        found: dict[Any, list[Result]] = defaultdict(list)
        for setting, results in self.groups.items():
            for result in results:
                found[(setting, result.pretrain, result.replicate)].append(result)
        return [results for results in found.values() if len(results) > 1]

    @property
    def panels(self) -> list[Panel]:
        """What to plot: the pretrained models on their own task, one point each, are left out."""
        groups = [s for s in self.groups if s.panel.transfer or s.sparsity > 0] or [*self.groups]
        panels = {setting.panel for setting in groups}
        pruned = {panel.task for panel in panels if panel.granularity}
        dense = {panel for panel in panels if panel.granularity is None and panel.task in pruned}
        return sorted(panels - dense, key=lambda panel: panel.order)

    def series(self, panel: Panel) -> dict[str, list[Setting]]:
        """Return scheme -> settings by sparsity; a dense ticket begins each scheme's line."""
        lines: dict[str, list[Setting]] = defaultdict(list)
        dense: list[Setting] = []
        for setting in self.groups:
            if setting.panel.task != panel.task:
                continue
            if setting.scheme == "dense":
                dense.append(setting)
            elif setting.panel.granularity == panel.granularity:
                lines[setting.scheme].append(setting)
        if not lines:
            return {"dense": dense}
        return {
            scheme: settings if settings[0].sparsity == 0 else dense + settings
            for scheme, settings in lines.items()
        }
