"""Runs a small recipe in forked processes and kills them where a test says. Not a test itself.

Reads lines of JSON and answers each with the exit status of a process that runs the recipe in
"folder". With "kill_at": n it sends itself SIGKILL at its n-th atomic write, before or ("after")
behind it. With "watch": FILE and "changes": n it is sent SIGKILL once that file has changed n
times: wherever it happens to be. With "jobs": n it runs the stages in n processes of their own,
and with "ctrl_c" it and they are sent SIGINT, as from a terminal, instead of SIGKILL. Importing
once and forking makes many kills affordable.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from rtk import data, recipes
from rtk.config import (
    AttackConfig,
    DataConfig,
    DrawConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
)
from rtk.errors import Interrupted
from rtk.recipes import Recipe

# A checkpoint after each step: the more writes, the more places to die in.
TRAIN = TrainConfig(epochs=2, batch_size=96, lr=0.05, checkpoint_seconds=0.0, eval_every=1)
ATTACK = AttackConfig("pgd", eps=0.1, steps=1)
MACHINE = {"device": "cpu", "threads": 1}

ROAD = Recipe(
    title="shrunk",
    note="",
    folder=Path(),
    stages=(
        PretrainConfig(
            out="pretrained",
            **MACHINE,
            data=DataConfig("digits[0-1]"),
            model=ModelConfig(width=0.0625),
            train=TRAIN,
            attack=ATTACK,
        ),
        DrawConfig(out="ticket", **MACHINE, checkpoint="pretrained"),
        TransferConfig(
            out="transferred",
            **MACHINE,
            checkpoint="pretrained",
            ticket="ticket",
            data=DataConfig("digits[2-3]"),
            train=TRAIN,
        ),
        EvaluateConfig(out="evaluated", **MACHINE, checkpoint="transferred", attack=ATTACK),
    ),
)


def die_at_write(number, after):
    replace, writes = os.replace, [0]

    def counted(source, target):
        writes[0] += 1
        if writes[0] == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if writes[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted


def stamp(path):
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for_changes(path, changes, child):
    """Return whether they came before the process was over, with or without an error."""
    seen = stamp(path)
    while changes:
        if ended(child):
            return False
        time.sleep(0.0005)
        if stamp(path) != seen:
            seen = stamp(path)
            changes -= 1
    return True


def run(job):
    os.setsid()  # a process group of its own
    os.environ["SHRUNK_ROAD"] = job["folder"]  # by which a test finds processes left behind
    os.makedirs(job["folder"], exist_ok=True)
    os.chdir(job["folder"])  # so that paths, and with them hashes, are the same in every folder
    if "kill_at" in job:
        die_at_write(job["kill_at"], job["after"])
    if "jobs" in job:
        recipes.run(ROAD, job["jobs"])
    else:
        for stage in ROAD.stages:
            recipes.STAGES[type(stage)](stage)


def main():
    torch.set_num_threads(1)
    data.load(DataConfig("digits"))  # scikit-learn is imported before the fork
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(job)
            except Interrupted:
                os._exit(130)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        if "watch" in job and wait_for_changes(
            Path(job["folder"], job["watch"]), job["changes"], child
        ):
            if job.get("ctrl_c"):
                os.killpg(child, signal.SIGINT)
            else:
                os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
