"""Keeps a finished figure as one CSV: what each of its stages was, found and took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtk import report
from rtk.config import (
    AdviseConfig,
    AttackConfig,
    DrawConfig,
    EvaluateConfig,
    PretrainConfig,
    StageConfig,
    TransferConfig,
    round_sparsity,
)
from rtk.errors import RtkError
from rtk.identity import config_hash
from rtk.recipes.done import pending
from rtk.recipes.findings import Findings, answer_of, distances
from rtk.recipes.recipe import Recipe
from rtk.recipes.times import Spent, spent
from rtk.report import Number, numbers_of, public_name
from rtk.runs import JsonlLog

_LAST = ("top1", "miou")  # of a training's log


def keep(recipe: Recipe, folder: str | Path) -> Path:
    """Write a figure that has run as FOLDER/NAME.csv and return the path.

    With the engine off it is NAME-engine-off.csv, beside the other one.

    Raises:
        RtkError: where the recipe is no figure, has not run to its end, or holds stages that ran
            with the engine on where it is off, or the other way round.
    """
    findings = recipe.finish
    if not isinstance(findings, Findings):
        raise RtkError(f"keep: {recipe.title} is no figure or table of the paper")
    todo = pending(recipe.stages)
    if todo:
        raise RtkError(
            f"keep: {len(todo)} of {len(recipe.stages)} stages of {findings.figure.name} are not "
            "done; run it first"
        )
    took = spent(recipe.folder)
    wanted = "on" if recipe.engine else "off"
    names = [Path(stage.out).relative_to(recipe.folder).as_posix() for stage in recipe.stages]
    other = [name for name in names if name in took and took[name].engine != wanted]
    if other:
        raise RtkError(
            f"keep: {len(other)} of {len(names)} stages in {recipe.folder} ran with the engine "
            f"{took[other[0]].engine}, first {other[0]}; give each its own --out"
        )
    measured, features = distances(recipe)
    results = dict(zip(findings.runs, report.read_runs(recipe.folder, findings.runs), strict=True))
    about = _About(recipe)
    stages = [
        report.Stage(
            kind=name.split("/")[0],
            run=name,
            columns=about.columns(stage, results.get(name)),
            numbers=_numbers(stage, results.get(name), measured),
            images=None if name not in results else results[name].images,
            seconds=took[name].wall if name in took else None,
            device_seconds=took[name].device_seconds if name in took else None,
            config_hash=config_hash(stage),
        )
        for name, stage in zip(names, recipe.stages, strict=True)
    ]
    return report.write_kept(
        report.Kept(
            figure=findings.figure,
            scale=findings.scale.name,
            engine=wanted,
            device=_devices(names, took),
            stages=tuple(stages),
            note=recipe.note,
            facts={heading: public_name(text) for heading, text in findings.facts(recipe).items()},
            features=features,
        ),
        folder,
    )


def _devices(names: list[str], took: Mapping[str, Spent]) -> str:
    found = dict.fromkeys(took[name].device for name in names if name in took)
    return ", ".join(found) or "a device that was not noted"


def _numbers(
    stage: StageConfig, result: report.Result | None, measured: Mapping[str, float]
) -> tuple[Number, ...]:
    if result is not None:
        return numbers_of(result)
    if isinstance(stage, AdviseConfig):
        found = answer_of(stage)["targets"]
        return tuple(
            Number("distance", measured[target["target"]], public_name(target["target"]))
            for target in found
        )
    log = JsonlLog(Path(stage.out) / "metrics.jsonl").read()
    last = log[-1] if log else {}
    return tuple(Number(name, last[name]) for name in _LAST if name in last)


class _About:
    """Says of each stage of a recipe which network, ticket and data it is about."""

    def __init__(self, recipe: Recipe) -> None:
        self.stages = {stage.out: stage for stage in recipe.stages}
        self.strengths = {
            stage.attack.label: _strength(stage.attack)
            for stage in recipe.stages
            if isinstance(stage, PretrainConfig)
        }

    def columns(self, stage: StageConfig, result: report.Result | None) -> dict[str, Any]:
        """Return the columns of `rtk.report.kept` that say what a stage is."""
        if result is not None:
            return {
                "network": result.arch,
                "pretraining": result.pretrain,
                "eps": self.strengths.get(result.pretrain),
                "robust": result.robust,
                "source": _public(result.source),
                "scheme": result.scheme,
                "granularity": result.granularity,
                "draw_task": result.extra.get("draw_task"),
                "sparsity": result.sparsity,
                "target": _public(result.target),
                "transfer": result.transfer,
                "pretrain_seed": result.pretrain_seed,
                "seed": result.seed,
            }
        if isinstance(stage, PretrainConfig):
            return {
                "network": stage.model.arch,
                "pretraining": stage.attack.label,
                "eps": _strength(stage.attack),
                "robust": stage.attack.name != "none",
                "source": _public(stage.data.name),
                "pretrain_seed": stage.seed,
            }
        if isinstance(stage, DrawConfig):
            return {
                **self.columns(self.stages[stage.checkpoint], None),
                "scheme": stage.scheme,
                "granularity": stage.granularity,
                "draw_task": stage.task,
                "sparsity": stage.sparsity,
                "target": _public(stage.data.name) or None,
                "seed": stage.seed,
            }
        if isinstance(stage, TransferConfig):
            return {
                **self.columns(self.stages[stage.checkpoint], None),
                **self._ticket(stage.ticket),
                "target": _public(stage.data.name),
                "transfer": stage.mode,
                "seed": stage.seed,
            }
        if isinstance(stage, EvaluateConfig):
            return self.columns(self.stages[stage.checkpoint], None)
        return {"source": _public(stage.data.name)} if isinstance(stage, AdviseConfig) else {}

    def _ticket(self, ticket: str | None) -> dict[str, Any]:
        """Return what a ticket is; of a round of IMP the sparsity is not the drawing's last."""
        if ticket is None:
            return {"scheme": "dense", "sparsity": 0.0}
        folder, rounds, number = ticket.partition("/rounds/")
        drawn = self.stages[folder]
        columns = self.columns(drawn, None)
        names = ("scheme", "granularity", "draw_task", "sparsity")
        found = {name: columns[name] for name in names}
        if rounds and isinstance(drawn, DrawConfig):
            assert drawn.rate is not None
            found["sparsity"] = round_sparsity(int(number), drawn.rate)
        return found


def _strength(attack: AttackConfig) -> float:
    if attack.name == "none":
        return 0.0
    return attack.sigma if attack.name == "smoothing" else attack.eps


def _public(name: str | None) -> str | None:
    return None if name is None else public_name(name)
