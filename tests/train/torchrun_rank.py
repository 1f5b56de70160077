"""One process of several, for test_distributed.py. Not a test itself.

    torchrun --nproc_per_node N torchrun_rank.py JOBS

JOBS is a file with a list in JSON. A list of words in it is a command of rtk's; an object is a call
of one of the functions below, by name, with its arguments.

    torchrun_rank.py

does the same again and again, without the cost of importing: each line that it reads names JOBS, a
file for what is printed and one for what is said of errors. It is answered with the exit status of
torchrun's agent, which runs two processes.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rtk import cli, data, distributed, models
from rtk.attacks import PGD, Free
from rtk.config import DataConfig, StageConfig, TrainConfig
from rtk.train import distributed as training
from rtk.train import loop, train

SPEC = models.ModelSpec("resnet18", "3x3", 0.0625, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
# The last batch of an epoch has 5 images, which two processes cannot share equally.
TRAIN = TrainConfig(epochs=3, batch_size=8, lr=0.05, schedule="constant")
ATTACKS = {
    "natural": None,
    "pgd": PGD(eps=0.1, step_size=0.05, steps=2, random_start=False),
    "free": Free(eps=0.1, replays=2),
}


def batches(device="cpu"):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (29, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split = data.Split(images, torch.arange(29) % 3)
    return data.Batches(split, 8, augment="crop", shuffle=True, seed=3, device=device)


def train_alike(out, attack="natural", device="cpu", epochs=3):
    """Train with batch norm in eval mode, where several processes do what one does."""

    @distributed.stage
    def run(config):
        torch.manual_seed(0)
        place = f"cuda:{distributed.rank()}" if device == "cuda" else "cpu"
        model = models.create(SPEC).to(place)
        Path(out).mkdir(exist_ok=True)
        settings = TrainConfig(**{**vars(TRAIN), "amp": "none", "epochs": epochs})
        train(
            model,
            batches(place),
            settings,
            folder=Path(out),
            meta={"config_hash": "0"},
            attack=ATTACKS[attack],
            set_mode=nn.Module.eval,
        )

    run(StageConfig(out=out, device=device))


def at_step(count, action):
    """Do `action` in the `count`th training step of what is run next."""
    make_step, steps = loop.make_step, [0]

    def counted(*arguments, **options):
        step = make_step(*arguments, **options)

        def counting(x, y):
            steps[0] += 1
            if steps[0] == count:
                action()
            return step(x, y)

        return counting

    loop.make_step = counted


def stop(step, words):
    """Run a command and send it SIGTERM in a step."""
    make_step = loop.make_step
    at_step(step, lambda: signal.raise_signal(signal.SIGTERM))
    assert cli.main(words) == 130
    loop.make_step = make_step


def die(step, words, how):
    """Run a command; process 1 fails in a step."""
    from rtk.errors import RtkError

    def fail():
        if how == "raise":
            raise RtkError("image 7 cannot be decoded")
        os._exit(9)

    if os.environ["RANK"] == "1":
        at_step(step, fail)
    sys.exit(cli.main(words))


def main(jobs):
    torch.set_num_threads(1)
    training._AGREE_EVERY = 0  # in every step, so that a stop comes where a test says
    for job in json.loads(Path(jobs).read_text()):
        if isinstance(job, list):
            assert cli.main(job) == 0, job
        else:
            globals()[job.pop("call")](**job)


def agent(jobs):
    """Do what torchrun does, with processes that are forked."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    try:
        elastic_launch(config, main)(jobs)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def serve():
    data.load(DataConfig("digits"))  # scikit-learn is imported before the forks
    for line in sys.stdin:
        jobs, *outputs = line.split()
        child = os.fork()
        if child == 0:
            for number, file in enumerate(outputs, 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            status = agent(jobs)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) > 1 else serve()
