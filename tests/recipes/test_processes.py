"""Several stages at a time: their order and their errors. Real processes are in test_kill.py."""

import itertools
import threading
import time
from multiprocessing import Pipe

import pytest

from rtk import recipes
from rtk.config import (
    AdviseConfig,
    DrawConfig,
    EvaluateConfig,
    PretrainConfig,
    TransferConfig,
)
from rtk.errors import Interrupted, RtkError
from rtk.recipes import Recipe
from rtk.recipes.processes import _attempt, _schedule, gpus_for

CHAIN = (
    PretrainConfig(out="net"),
    DrawConfig(out="one", checkpoint="net"),
    DrawConfig(out="two", checkpoint="net"),
    TransferConfig(out="t-one", checkpoint="net", ticket="one"),
    TransferConfig(out="t-two", checkpoint="net", ticket="two"),
    EvaluateConfig(out="e-one", checkpoint="t-one"),
)


class Workers:
    """Threads in the place of worker processes; they note when a stage begins and ends."""

    def __init__(self, count, runner):
        self.events, self.lock, self.runner = [], threading.Lock(), runner
        self.pipes = {}
        for _ in range(count):
            ours, theirs = Pipe()
            self.pipes[ours] = self
            threading.Thread(target=self._work, args=(theirs,), daemon=True).start()
        self.terminated = threading.Event()

    def _note(self, what, stage):
        with self.lock:
            self.events.append((what, stage.out))

    def _work(self, pipe):
        while True:
            stage = pipe.recv()
            self._note("begin", stage)
            if self.runner == "dies":
                pipe.close()
                return
            error = _attempt(self.runner, stage)
            self._note("end", stage)
            pipe.send(error)

    def terminate(self):
        self.terminated.set()

    def run(self, stages=CHAIN):
        started = []
        try:
            _schedule(list(stages), self.pipes, started.append)
        finally:
            self.started = [stage.out for stage in started]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_stage_begins_when_what_it_reads_is_made(count):
    workers = Workers(count, lambda stage: time.sleep(0.01))
    workers.run()
    position = {event: i for i, event in enumerate(workers.events)}
    assert len(workers.events) == 2 * len(CHAIN)
    for stage in CHAIN:
        for made in (getattr(stage, "checkpoint", None), getattr(stage, "ticket", None)):
            if made is not None:
                assert position["end", made] < position["begin", stage.out]
    steps = itertools.accumulate(1 if what == "begin" else -1 for what, _ in workers.events)
    assert max(steps) == min(count, 2)  # the recipe is two stages wide
    assert not workers.terminated.is_set()


def test_a_ticket_inside_a_folder_waits_for_what_makes_the_folder():
    rounds = (
        PretrainConfig(out="net"),
        DrawConfig(out="runs/imp", checkpoint="net"),
        TransferConfig(out="t", checkpoint="net", ticket="runs/imp/rounds/05"),
    )
    workers = Workers(3, lambda stage: time.sleep(0.01))
    workers.run(rounds)
    assert [event for event in workers.events if "net" not in event] == [
        ("begin", "runs/imp"),
        ("end", "runs/imp"),
        ("begin", "t"),
        ("end", "t"),
    ]


def test_distances_in_a_networks_features_wait_for_the_network():
    stages = (PretrainConfig(out="net"), AdviseConfig(out="advice", features="net"))
    workers = Workers(2, lambda stage: time.sleep(0.01))
    workers.run(stages)
    assert workers.events[1:3] == [("end", "net"), ("begin", "advice")]


def test_one_worker_keeps_the_order_of_the_recipe():
    workers = Workers(1, lambda stage: None)
    workers.run()
    assert workers.started == [stage.out for stage in CHAIN]


def test_an_error_ends_it_and_stops_the_others():
    def runner(stage):
        if stage.out == "one":
            raise RtkError("one is bad")
        if stage.out == "two":
            assert workers.terminated.wait(10)  # stopped while it is busy
            raise Interrupted("two has saved")

    workers = Workers(2, runner)
    with pytest.raises(RtkError, match="one is bad"):
        workers.run()
    assert set(workers.started) == {"net", "one", "two"}


def test_an_error_in_the_code_comes_with_its_traceback():
    def runner(stage):
        raise ZeroDivisionError("a bug")

    with pytest.raises(RuntimeError, match=r"(?s)in net:\nTraceback.*ZeroDivisionError: a bug"):
        Workers(2, runner).run()


def test_a_worker_that_is_killed_is_an_error():
    with pytest.raises(RtkError, match=r"ran net was killed \(out of memory\?\); the same command"):
        Workers(2, "dies").run()


@pytest.mark.parametrize(
    ("count", "visible", "named", "expected"),
    [
        (0, None, "auto", [None] * 3),
        (1, None, "auto", [None] * 3),
        (2, None, "auto", ["0", "1", "0"]),
        (4, None, "cuda", ["0", "1", "2"]),
        (2, "3, 5", "auto", ["3", "5", "3"]),
        (2, None, "cuda:1", [None] * 3),
        (2, None, "cpu", [None] * 3),
    ],
)
def test_workers_take_the_gpus_in_turns(monkeypatch, count, visible, named, expected):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus_for(3, [PretrainConfig(out="net", device=named)]) == expected


def test_less_than_one_job_is_refused(tmp_path):
    for jobs in (0, -1):
        with pytest.raises(RtkError, match=f"at least 1 stage at a time, got {jobs}"):
            recipes.run(Recipe("", "", tmp_path, ()), jobs)
