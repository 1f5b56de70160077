"""What a recipe of the paper ends in: its figure, its table, and the gallery over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtk import report
from rtk.config import AdviseConfig, PretrainConfig, StageConfig
from rtk.identity import config_hash, to_dict
from rtk.recipes.recipe import Recipe
from rtk.recipes.scale import Scale
from rtk.report import Figure
from rtk.report.study import short_name
from rtk.runs import read_json


@dataclass(frozen=True)
class Findings:
    """Called with a recipe that has run, writes its figure and the gallery.

    Args:
        figure: what is drawn.
        runs: the evaluations that it is made from, relative to the recipe's folder.
        scale: what was run.
        names: of all figures, in the order of the gallery.
    """

    figure: Figure
    runs: tuple[str, ...]
    scale: Scale
    names: tuple[str, ...]

    def __call__(self, recipe: Recipe) -> Path:
        """Return the path of the figure's report."""
        figure = self.figure
        measured, features = distances(recipe)
        report.write_figure(
            figure,
            report.read_runs(recipe.folder, self.runs),
            recipe.folder / figure.name,
            note=recipe.note,
            facts=self.facts(recipe),
            distances=measured,
            features=features,
        )
        title = f"arXiv 2304.11834 at scale {self.scale.name}"
        report.write_gallery(recipe.folder, self.names, title)
        return recipe.folder / figure.name / "report.html"

    def facts(self, recipe: Recipe) -> Mapping[str, str]:
        """Return the settings that a reader asks for first; config.yaml of a run has all."""
        scale = self.scale
        pretrained = [stage for stage in recipe.stages if isinstance(stage, PretrainConfig)]
        models = dict.fromkeys(stage.model for stage in pretrained)
        attacks = dict.fromkeys(s.attack for s in pretrained if s.attack.name != "none")
        replicates = (f"{first}/{seed}" for first, seed in scale.replicates)
        longer = (f"{short_name(name)} {number}" for name, number in scale.epochs.items())
        facts = {
            "Source": scale.source.name,
            "Networks": ", ".join(f"{m.arch} (width {m.width:g}, stem {m.stem})" for m in models),
            "Pretraining": _training(scale.natural),
            "Robust pretraining": f"{_training(scale.robust)}; "
            + "; ".join(attack.summary for attack in attacks),
            "Finetuning": _training(scale.finetune),
            "Linear": f"{scale.linear_mode}, {_training(scale.linear)}",
            "Epochs of some targets": ", ".join(longer),
            "Seeds": f"{', '.join(replicates)} (pretraining/transfer)",
            "Settings": "config.yaml in each run's folder",
        }
        return {heading: text for heading, text in facts.items() if text}


def distances(recipe: Recipe) -> tuple[dict[str, float], str]:
    """Return target -> distance from the source, and what they were measured with, if they were."""
    for stage in recipe.stages:
        if isinstance(stage, AdviseConfig):
            answer = answer_of(stage)
            measured = {target["target"]: target["distance"] for target in answer["targets"]}
            return measured, answer["features"].replace(f"{recipe.folder}/", "")
    return {}, ""


def answer_of(stage: StageConfig) -> Any:
    """Return what an AdviseConfig has measured."""
    return read_json(Path(stage.out) / f"advice-{config_hash(stage)}.json")


def _training(config: Any) -> str:
    values = to_dict(config)
    names = ("epochs", "batch_size", "lr", "schedule", "weight_decay")
    return ", ".join(f"{name} {values[name]}" for name in names)
