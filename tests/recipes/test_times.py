"""What stages took: attempts that add up, and a device's time divided among those that share it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rtk.config import AdviseConfig, PretrainConfig
from rtk.errors import Interrupted
from rtk.identity import claim_folder
from rtk.recipes.times import TIMES, _device, noted, read_attempts, spent


def note(root, run, *attempts, device="GPU", engine="on", place="first"):
    folder = root / run
    folder.mkdir(parents=True, exist_ok=True)
    values = [
        {"begin": begin, "end": end, "device": device, "place": place, "engine": engine}
        for begin, end in attempts
    ]
    (folder / TIMES).write_text(json.dumps(values))
    return folder


def test_attempts_add_up(tmp_path):
    note(tmp_path, "pretrain/a", (100, 103), (200, 204.5))
    took = spent(tmp_path)["pretrain/a"]
    assert (took.wall, took.device_seconds) == (7.5, 7.5)
    assert (took.device, took.engine) == ("GPU", "on")


def test_a_device_is_divided_among_the_stages_that_share_it(tmp_path):
    note(tmp_path, "pretrain/a", (0, 10))
    note(tmp_path, "transfer/b", (4, 8))
    note(tmp_path, "transfer/c", (6, 12))
    note(tmp_path, "transfer/d", (0, 12), place="second")  # another GPU of the same name
    took = spent(tmp_path)
    assert took["pretrain/a"].device_seconds == pytest.approx(4 + 1 + 2 / 3 + 1)
    assert took["transfer/b"].device_seconds == pytest.approx(1 + 2 / 3)
    assert took["transfer/c"].device_seconds == pytest.approx(2 / 3 + 1 + 2)
    assert took["transfer/d"].device_seconds == 12
    assert sum(took[run].device_seconds for run in list(took)[:3]) == pytest.approx(12)
    assert took["transfer/c"].wall == 6


def test_several_devices_and_engines_are_all_named(tmp_path):
    folder = note(tmp_path, "draw/a", (0, 1), device="H100", engine="off")
    first = json.loads((folder / TIMES).read_text())
    note(tmp_path, "draw/a", (2, 3), device="H200")
    both = [*first, *json.loads((folder / TIMES).read_text())]
    (folder / TIMES).write_text(json.dumps(both))
    took = spent(tmp_path)["draw/a"]
    assert (took.device, took.engine) == ("H100+H200", "on+off")


def test_a_killed_attempt_ends_where_it_last_wrote(tmp_path):
    folder = note(tmp_path, "pretrain/a", (100, None))
    log = folder / "metrics.jsonl"
    log.write_text("{}\n")
    os.utime(log, (160, 160))
    assert spent(tmp_path)["pretrain/a"].wall == 60


def test_a_gpu_is_named_and_told_from_others(monkeypatch):
    gpus = [SimpleNamespace(name="H200", uuid=f"id-{i}") for i in range(2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    assert _device("cpu") == ("CPU", "CPU")
    assert _device("auto") == _device("cuda") == _device("cuda:0") == ("H200", "id-0")
    assert _device("cuda:1") == ("H200", "id-1")
    assert _device("cuda:9") == ("H200", "id-0")  # which the stage refuses by itself


@pytest.fixture
def stage(tmp_path):
    return PretrainConfig(out=str(tmp_path / "pretrain" / "a"), device="cpu")


def test_a_stage_is_noted_however_it_ends(tmp_path, stage):
    with pytest.raises(Interrupted), noted(stage):
        claim_folder(stage)
        raise Interrupted("stopped")
    (stopped,) = read_attempts(tmp_path / "pretrain" / "a")
    assert stopped.end >= stopped.begin and (stopped.device, stopped.engine) == ("CPU", "on")
    with noted(stage):
        _, open_one = read_attempts(tmp_path / "pretrain" / "a")
        assert open_one.end is None  # what a kill would leave
    first, second = read_attempts(tmp_path / "pretrain" / "a")
    assert first == stopped and second.begin >= first.end and second.end is not None


def test_a_stage_that_was_killed_before_anything_was_noted_counts(tmp_path, stage):
    folder = claim_folder(stage)
    os.utime(folder / "config.yaml", (1000, 1000))
    (folder / "metrics.jsonl").write_text("")
    os.utime(folder / "metrics.jsonl", (1030, 1030))
    os.utime(folder / ".lock", (1000, 1000))
    with noted(stage):
        pass
    lost, _ = read_attempts(folder)
    assert (lost.begin, lost.end) == (1000, 1030)


def test_starting_over_forgets_the_attempts_before(stage):
    with noted(stage):
        claim_folder(stage)
    before = read_attempts(Path(stage.out))
    with noted(replace(stage, resume=False)):
        pass
    (only,) = read_attempts(Path(stage.out))
    assert len(before) == 1 and only.begin >= before[0].end


def test_nothing_is_noted_in_a_folder_that_is_not_the_stages(tmp_path, stage):
    with pytest.raises(ZeroDivisionError), noted(stage):
        raise ZeroDivisionError  # before it claimed the folder
    assert not (tmp_path / "pretrain").exists()
    claim_folder(PretrainConfig(out=stage.out, device="cpu", seed=7))
    with noted(stage):
        pass
    assert read_attempts(tmp_path / "pretrain" / "a") == []


def test_distances_are_noted_in_their_folder(tmp_path):
    asked = AdviseConfig(out=str(tmp_path / "distances" / "own"), device="cpu")
    with noted(asked):
        (tmp_path / "distances" / "own").mkdir(parents=True)
    assert len(read_attempts(tmp_path / "distances" / "own")) == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"begin": 1}]'])
def test_a_damaged_note_is_none(tmp_path, text):
    folder = note(tmp_path, "draw/a")
    (folder / TIMES).write_text(text)
    assert read_attempts(folder) == [] and spent(tmp_path) == {}
