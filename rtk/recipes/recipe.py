"""What a recipe is: a list of complete configurations, run in order, then a report."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtk import draw, evaluate, pretrain, report, transfer
from rtk.config import DrawConfig, EvaluateConfig, PretrainConfig, StageConfig, TransferConfig
from rtk.errors import RtkError
from rtk.recipes.processes import run_in_processes

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


def run_stage(stage: StageConfig) -> Path:
    """Run one stage by its configuration's type and return the path of what it made."""
    return STAGES[type(stage)](stage)


def run(recipe: Recipe, jobs: int = 1) -> Path:
    """Run the stages that are not done yet, write the report and return report.html's path.

    Stopped anywhere, even by SIGKILL, the same call goes on and ends in the same numbers.

    Args:
        recipe: what to run.
        jobs: stages at a time; more than one run in processes of their own, and what they would
            print is in the folder's log.txt.

    Raises:
        RtkError: from a stage, or for less than one job.
        Interrupted: on Ctrl-C.
    """
    if jobs < 1:
        raise RtkError(f"jobs: expected at least 1 stage at a time, got {jobs}")
    count = itertools.count(1)

    def started(stage: StageConfig) -> None:
        print(
            f"[{next(count)}/{len(recipe.stages)}] {Path(stage.out).relative_to(recipe.folder)}",
            file=sys.stderr,
            flush=True,
        )

    if jobs == 1:
        for stage in recipe.stages:
            started(stage)
            run_stage(stage)
    else:
        log = recipe.folder / "log.txt"
        run_in_processes(recipe.stages, run_stage, jobs, log=log, started=started)
    return report.write_report(recipe.folder, note=recipe.note, title=recipe.title)
