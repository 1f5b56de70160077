"""What a recipe is: a list of complete configurations, run in order, then a report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtk import draw, evaluate, pretrain, report, transfer
from rtk.config import DrawConfig, EvaluateConfig, PretrainConfig, StageConfig, TransferConfig

STAGES: dict[type[StageConfig], Callable[[Any], Path]] = {
    PretrainConfig: pretrain.run,
    DrawConfig: draw.run,
    TransferConfig: transfer.run,
    EvaluateConfig: evaluate.run,
}


@dataclass(frozen=True)
class Recipe:
    """An experiment from data to report.

    Args:
        title: of the report.
        note: what a reader of the numbers must know, in a sentence.
        folder: everything the recipe makes lands in it.
        stages: complete configurations in an order in which each finds what it reads.
    """

    title: str
    note: str
    folder: Path
    stages: tuple[StageConfig, ...]


def run(recipe: Recipe) -> Path:
    """Run the stages that are not done yet, write the report and return report.html's path.

    Stopped anywhere, even by SIGKILL, the same call goes on and ends in the same numbers.
    """
    for index, stage in enumerate(recipe.stages, start=1):
        print(
            f"[{index}/{len(recipe.stages)}] {type(stage).__name__.removesuffix('Config').lower()} "
            f"{Path(stage.out).relative_to(recipe.folder)}",
            file=sys.stderr,
            flush=True,
        )
        STAGES[type(stage)](stage)
    return report.write_report(recipe.folder, note=recipe.note, title=recipe.title)
