"""SIGKILL anywhere, the same command again, and the results are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rtk import artifact, cli
from rtk.train import CHECKPOINT, Checkpoint

ARTEFACTS = {
    "pretrained/checkpoint.safetensors": "checkpoint",
    "ticket/ticket.safetensors": "ticket",
    "transferred/checkpoint.safetensors": "checkpoint",
}
LOGS = ("pretrained/metrics.jsonl", "transferred/metrics.jsonl")
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def road():
    """Return a function that runs the shrunk road in a folder and gives its exit status."""
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("shrunk_road.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )

    def run(folder, **job):
        process.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    with process:
        yield run
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(road, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert road(folder) == 0
    return folder


def numbers(path):
    timing = ("seconds", "images_per_second")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in timing} for record in records]


def log_is_ahead(folder):
    """Say whether the log has the record of an epoch whose checkpoint is not written yet."""
    if not (folder / CHECKPOINT).exists():
        return False
    done = Checkpoint.load(folder).meta["progress"]["epoch"]
    return len(numbers(folder / "metrics.jsonl")) > done


def assert_same(folder, undisturbed):
    for name, kind in ARTEFACTS.items():
        # The hash covers metadata and tensors, checked against both as they are read.
        ours, theirs = (artifact.load(where / name, kind)[2] for where in (folder, undisturbed))
        assert ours == theirs, name
    result = "evaluated/result.json"
    assert (folder / result).read_text() == (undisturbed / result).read_text()
    for name in LOGS:
        assert numbers(folder / name) == numbers(undisturbed / name), name


@pytest.mark.parametrize(
    ("kill_at", "after"), [(1, True), (3, False)], ids=["after_each_write", "before_the_third"]
)
def test_killed_at_every_single_write(road, undisturbed, tmp_path, kill_at, after):
    """Each process adds little and dies: after each write, and between a record and its checkpoint.

    Before the third write, not the second: dropping a record whose checkpoint is missing is one.
    """
    kills = log_ahead = 0
    while (status := road(tmp_path, kill_at=kill_at, after=after)) == KILLED:
        kills += 1
        log_ahead += any(log_is_ahead(tmp_path / name) for name in ("pretrained", "transferred"))
        assert kills < 60, "no progress"
    assert status == 0
    assert kills >= 10
    assert after or log_ahead
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize(
    ("watch", "changes"),
    [
        ("pretrained/checkpoint.safetensors", 1),
        ("pretrained/metrics.jsonl", 2),
        ("ticket/config.yaml", 1),
        ("transferred/checkpoint.safetensors", 4),
        ("transferred/metrics.jsonl", 3),
        ("evaluated/config.yaml", 1),
    ],
    ids=["pretrain", "pretrain-log", "draw", "transfer", "transfer-log", "evaluate"],
)
def test_killed_from_outside(road, undisturbed, tmp_path, watch, changes):
    assert road(tmp_path, watch=watch, changes=changes) == KILLED
    assert road(tmp_path) == 0
    assert_same(tmp_path, undisturbed)


def test_a_recipe_killed_in_its_report_ends_in_the_same_report(road, tmp_path):
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    assert road(whole, jobs=1) == 0
    assert road(folder, jobs=1, watch="results.csv", changes=1) == KILLED
    assert road(folder, jobs=1) == 0
    assert_same(folder, whole)
    assert (folder / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert (folder / "report.html").exists()


def left_behind(folder):
    """Return the ids of a road's processes that still run, once they had time to end."""
    deadline = time.monotonic() + 30
    while (found := running(folder)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def running(folder):
    mark, found = f"SHRUNK_ROAD={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(process.name)
        except OSError:  # it has ended, or is not ours
            pass
    return found


def test_worker_processes_end_with_a_parent_that_is_killed(road, undisturbed, tmp_path):
    assert road(tmp_path, jobs=2, watch="pretrained/checkpoint.safetensors", changes=2) == KILLED
    assert left_behind(tmp_path) == []
    assert road(tmp_path) == 0
    assert_same(tmp_path, undisturbed)


def test_worker_processes_save_on_ctrl_c(road, undisturbed, tmp_path):
    """SIGINT comes to all of them from the terminal, and SIGTERM to the workers from above."""
    watch = "pretrained/checkpoint.safetensors"
    assert road(tmp_path, jobs=2, watch=watch, changes=1, ctrl_c=True) == 130
    assert left_behind(tmp_path) == []
    progress = Checkpoint.load(tmp_path / "pretrained").meta["progress"]
    # The signal may come while the first checkpoint is being written: then that one stays.
    assert not progress["finished"] and (progress["epoch"], progress["step"]) >= (0, 1)
    assert (tmp_path / "log.txt").exists()
    assert road(tmp_path) == 0
    assert_same(tmp_path, undisturbed)


def test_a_finished_road_is_left_as_it_is(road, undisturbed):
    def files():
        return {
            path: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in undisturbed.rglob("*")
            if path.is_file()
        }

    before = files()
    assert road(undisturbed) == 0
    assert files() == before


def test_the_command_line_goes_on_after_sigkill(tmp_path, capsys):
    def command(out):
        return [
            *(
                "pretrain",
                "--out",
                str(out),
                "--data.name",
                "digits[0-1]",
                "--model.width",
                "0.0625",
            ),
            *("--train.epochs", "4", "--train.batch_size", "32", "--train.checkpoint_seconds", "0"),
        ]

    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = subprocess.Popen(
        [sys.executable, "-m", "rtk", *command(killed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.DEVNULL,
    )
    log = killed / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 1):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == KILLED
    assert not Checkpoint.load(killed).meta["progress"]["finished"]

    assert cli.main(command(killed)) == 0
    assert cli.main(command(undisturbed)) == 0
    ours, theirs = Checkpoint.load(killed), Checkpoint.load(undisturbed)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(t, theirs.tensors[n]) for n, t in ours.tensors.items())
    assert numbers(log) == numbers(undisturbed / "metrics.jsonl")
    assert capsys.readouterr().out.splitlines() == [
        str(killed / CHECKPOINT),
        str(undisturbed / CHECKPOINT),
    ]
