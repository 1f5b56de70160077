"""What a recipe is: a list of complete configurations, run in order, then a report."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtk import advise, convert, data, distributed, draw, evaluate, pretrain, report, transfer
from rtk.config import (
    AdviseConfig,
    ConvertConfig,
    DrawConfig,
    EvaluateConfig,
    PretrainConfig,
    StageConfig,
    TransferConfig,
)
from rtk.errors import RtkError
from rtk.ops import engine
from rtk.recipes.done import is_done, pending
from rtk.recipes.processes import run_in_processes
from rtk.recipes.times import noted
from rtk.runs import unlocked_after

STAGES: dict[type[StageConfig], Callable[[Any], Path]] = {
    PretrainConfig: pretrain.run,
    DrawConfig: draw.run,
    TransferConfig: transfer.run,
    EvaluateConfig: evaluate.run,
    ConvertConfig: convert.run,
    AdviseConfig: advise.run,
}


@dataclass(frozen=True)
class Recipe:
    """An experiment from data to report.

    Args:
        title: of the report.
        note: what a reader of the numbers must know, in a sentence.
        folder: everything the recipe makes lands in it.
        stages: complete configurations in an order in which each finds what it reads.
        finish: what is made of the results, and returns the page's path; by default the report of
            the whole folder.
        engine: False runs the stages by PyTorch alone (`rtk.ops.engine`).
    """

    title: str
    note: str
    folder: Path
    stages: tuple[StageConfig, ...]
    finish: Callable[[Recipe], Path] | None = None
    engine: bool = True


def run_stage(stage: StageConfig) -> Path:
    """Run one stage by its configuration's type and return the path of what it made.

    How long it took is noted beside it (`rtk.recipes.times`), unless it is done already.
    """
    runner = STAGES[type(stage)]
    with unlocked_after(Path(stage.out)):
        if isinstance(stage, ConvertConfig) or not distributed.speaks() or is_done(stage):
            return runner(stage)
        with noted(stage):
            return runner(stage)


def run_stage_plainly(stage: StageConfig) -> Path:
    """Run one stage with the engine off: by PyTorch alone, to see what the engine saves."""
    with engine.off():
        return run_stage(stage)


def run(recipe: Recipe, jobs: int = 1) -> Path:
    """Run the stages that are not done yet, write the report and return its path.

    Stopped anywhere, even by SIGKILL, the same call goes on and ends in the same numbers.

    Args:
        recipe: what to run.
        jobs: stages at a time; more than one run in processes of their own, and what they would
            print is in the folder's log.txt.

    Raises:
        RtkError: from a stage, for less than one job, or under torchrun.
        Interrupted: on Ctrl-C.
    """
    if jobs < 1:
        raise RtkError(f"jobs: expected at least 1 stage at a time, got {jobs}")
    if distributed.launched():
        raise RtkError(
            "a recipe has many stages, each of which torchrun can run in several processes; start "
            "the recipe without torchrun, or its large stages one by one with it"
        )
    runner = run_stage if recipe.engine else run_stage_plainly
    todo = pending(recipe.stages)
    number = {stage.out: i for i, stage in enumerate(recipe.stages, 1)}

    def started(stage: StageConfig) -> None:
        name = Path(stage.out).relative_to(recipe.folder)
        print(f"[{number[stage.out]}/{len(number)}] {name}", file=sys.stderr, flush=True)

    if len(todo) < len(recipe.stages):
        done = len(recipe.stages) - len(todo)
        print(f"{done} of {len(recipe.stages)} stages are done", file=sys.stderr, flush=True)
    if jobs == 1:
        with data.keep_loaded():
            for stage in todo:
                started(stage)
                runner(stage)
    elif todo:
        log = recipe.folder / "log.txt"
        run_in_processes(todo, runner, jobs, log=log, started=started)
    if recipe.finish is not None:
        return recipe.finish(recipe)
    return report.write_report(recipe.folder, note=recipe.note, title=recipe.title)
