"""`rtk reproduce`: a figure or table of the paper, by name, at a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtk.config import DataConfig
from rtk.errors import check_choice
from rtk.recipes.done import pending
from rtk.recipes.figures import FIGURES
from rtk.recipes.recipe import Recipe
from rtk.recipes.scale import SCALES, Scale
from rtk.report.figure_page import SUMMARY
from rtk.report.figure_table import text_table
from rtk.runs import read_json


def reproduce(
    name: str,
    scale: str | Scale = "small",
    out: str | Path | None = None,
    *,
    data_root: str | None = None,
    source: str | None = None,
    targets: Sequence[str] = (),
    segmentation: str | None = None,
    ood: Sequence[str] = (),
    weights: str | None = None,
    features: str | None = None,
    device: str | None = None,
    engine: str = "on",
) -> Recipe:
    """Return the recipe of a figure or table; `rtk.recipes.run` runs it.

    Args:
        name: fig1 to fig9, tab1 or tab2.
        scale: paper, small or smoke, or a scale of your own: `replace(SCALES.get("small"), ...)`.
        out: the folder, which figures of one scale share; by default runs/reproduce-<scale>, and
            runs/reproduce-<scale>-engine-off with the engine off.
        data_root: folder of the data sets (else RTK_DATA, else ~/.cache/rtk/data).
        source: another set to pretrain on, as `data.name`.
        targets: other downstream sets, of all figures.
        segmentation: another set with masks.
        ood: other sets to tell the targets from, in Fig. 8 and Tab. I.
        weights: file with Inception's weights, for the distances of Fig. 9 and Tab. II.
        features: or a run or checkpoint whose own features take their place.
        device: auto, cpu, cuda or cuda:N; by default the scale's.
        engine: on, or off: the same stages with the same seeds by PyTorch alone
            (`rtk.ops.engine`), to measure what the engine saves.

    Raises:
        RtkError: for an unknown figure or scale, or both weights and features.
    """
    check_choice("engine", engine, ("on", "off"))
    build = FIGURES.get(name)
    settings = SCALES.get(scale) if isinstance(scale, str) else scale
    if source is not None:
        settings = replace(settings, source=_named(settings.source, source))
    if targets:
        named = tuple(_named(settings.targets[0], target) for target in targets)
        settings = replace(
            settings, targets=named, many_targets=named, deep_targets=None, structured_targets=None
        )
    if segmentation is not None:
        settings = replace(settings, segmentation=replace(settings.segmentation, name=segmentation))
    if ood:
        settings = replace(settings, ood=tuple(ood))
    if weights is not None:
        settings = replace(settings, weights=weights)
    if features is not None:
        settings = replace(settings, features=str(Path(features).absolute()))
    if device is not None:
        settings = replace(settings, machine={**settings.machine, "device": device})
    plainly = engine == "off"
    default = f"runs/reproduce-{settings.name}{'-engine-off' if plainly else ''}"
    recipe = build(settings, Path(default if out is None else out), data_root)
    return replace(recipe, engine=not plainly)


def list_figures(scale: str | Scale = "small", **settings: Any) -> str:
    """Return a line for each figure: its name, what it is, its stages and how many are done.

    Args:
        scale: as of `reproduce`.
        settings: the others of `reproduce`.
    """
    lines = []
    for name in FIGURES.names():
        recipe = reproduce(name, scale, **settings)
        done = len(recipe.stages) - len(pending(recipe.stages))
        what = (FIGURES.get(name).__doc__ or "").strip().rstrip(".")
        lines.append((name, what, f"{done} of {len(recipe.stages)} stages done"))
    return text_table(("name", "what", "stages"), lines)


def summary(recipe: Recipe, name: str) -> str:
    """Return what came out of a recipe that has run, in sentences."""
    return "\n".join(read_json(recipe.folder / name / SUMMARY)["findings"])


def _named(like: DataConfig, name: str) -> DataConfig:
    """Return a set of another name, read alike but for the augmentation, which is as suits it."""
    return replace(like, name=name, augment="auto")
