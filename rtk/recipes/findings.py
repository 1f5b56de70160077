"""What a recipe of the paper ends in: its figure, its table, and the gallery over all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rtk import report
from rtk.config import AdviseConfig
from rtk.identity import config_hash, to_dict
from rtk.recipes.recipe import Recipe
from rtk.recipes.scale import Scale
from rtk.report import Figure
from rtk.runs import read_json


def write(
    recipe: Recipe,
    *,
    figure: Figure,
    runs: tuple[str, ...],
    scale: Scale,
    names: tuple[str, ...],
) -> Path:
    """Write a figure and the gallery, and return the path of the figure's report.

    Args:
        recipe: it has run.
        figure: what is drawn.
        runs: the evaluations that it is made from, relative to the recipe's folder.
        scale: what was run.
        names: of all figures, in the order of the gallery.
    """
    measured: dict[str, float] = {}
    features = ""
    for stage in recipe.stages:
        if not isinstance(stage, AdviseConfig):
            continue
        answer = read_json(Path(stage.out) / f"advice-{config_hash(stage)}.json")
        measured = {target["target"]: target["distance"] for target in answer["targets"]}
        features = answer["features"].replace(f"{recipe.folder}/", "")
    report.write_figure(
        figure,
        report.read_runs(recipe.folder, runs),
        recipe.folder / figure.name,
        note=recipe.note,
        facts=_facts(scale),
        distances=measured,
        features=features,
    )
    report.write_gallery(recipe.folder, names, f"arXiv 2304.11834 at scale {scale.name}")
    return recipe.folder / figure.name / "report.html"


def _facts(scale: Scale) -> Mapping[str, str]:
    """Return the settings that a reader asks for first; config.yaml of a run has all."""

    def training(config: Any) -> str:
        values = to_dict(config)
        names = ("epochs", "batch_size", "lr", "schedule", "weight_decay")
        return ", ".join(f"{name} {values[name]}" for name in names)

    return {
        "Source": scale.source.name,
        "Networks": ", ".join(f"{m.arch} (width {m.width:g}, stem {m.stem})" for m in scale.models),
        "Pretraining": training(scale.natural),
        "Robust pretraining": f"{scale.attack.summary}; {training(scale.robust)}",
        "Finetuning": training(scale.finetune),
        "Linear": f"{scale.linear_mode}, {training(scale.linear)}",
        "Seeds": ", ".join(f"{first}/{seed}" for first, seed in scale.replicates)
        + " (pretraining/transfer)",
        "Settings": "config.yaml in each run's folder",
    }
