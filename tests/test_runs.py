import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtk.errors import RtkError, check_choice, did_you_mean
from rtk.registry import Registry
from rtk.runs import (
    JsonlLog,
    atomic_write,
    find_artefact,
    lock_folder,
    read_json,
    unlocked_after,
    write_json,
)


def test_writing_makes_folders_and_leaves_nothing_else(tmp_path):
    atomic_write(tmp_path / "a" / "b" / "file", "text\n")
    atomic_write(tmp_path / "a" / "b" / "bytes", b"\0\1")
    assert (tmp_path / "a" / "b" / "file").read_text() == "text\n"
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == b"\0\1"
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["bytes", "file"]
    assert (tmp_path / "a" / "b" / "file").stat().st_mode & 0o777 == 0o644


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")
    replace, seen = os.replace, []

    def look_first(source, target):
        seen.append((path.read_text(), Path(source).read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_first)
    atomic_write(path, "new" * 1000)
    assert seen == [("old", "new" * 1000)] and path.read_text() == "new" * 1000


def test_a_write_that_fails_keeps_the_old_file_and_cleans_up(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RtkError, match=r"cannot write .*file \(No space left on device\).*--out"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("below", ["below", "deep/below"])
def test_a_path_below_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(RtkError, match=r"cannot write .*a file is where a folder is needed"):
        atomic_write(tmp_path / "file" / below, "x")


def test_json_is_written_sorted_and_read_back(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"c": True}}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json") == value
    assert (tmp_path / "v.json").read_text().index('"a"') < 5


@pytest.mark.parametrize("text", [None, "", "{", "nonsense"], ids=["missing", "empty", "torn", "x"])
def test_json_that_cannot_be_read_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "v.json").write_text(text)
    with pytest.raises(RtkError, match=r"cannot read .*v\.json .*run the stage"):
        read_json(tmp_path / "v.json")


def test_a_log_gives_back_its_records(tmp_path):
    log = JsonlLog(tmp_path / "log")
    assert log.read() == []
    log.append(epoch=1, loss=1 / 3)
    log.append(epoch=2, loss=0.1 + 0.2)
    assert log.read() == [{"epoch": 1, "loss": 1 / 3}, {"epoch": 2, "loss": 0.1 + 0.2}]
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_torn_last_line_is_left_out_and_dropped(tmp_path):
    log = JsonlLog(tmp_path / "log")
    log.append(epoch=1)
    with log.path.open("a") as file:
        file.write('{"epoch": 2, "lo')
    assert log.read() == [{"epoch": 1}]
    log.keep(lambda record: True)
    log.append(epoch=2)
    assert log.read() == [{"epoch": 1}, {"epoch": 2}]


def test_keep_drops_what_is_not_wanted(tmp_path):
    log = JsonlLog(tmp_path / "log")
    for epoch in (1, 2, 3):
        log.append(epoch=epoch)
    log.keep(lambda record: record["epoch"] <= 2)
    assert log.read() == [{"epoch": 1}, {"epoch": 2}]


def test_keep_leaves_a_log_alone_that_is_as_wanted(tmp_path):
    log = JsonlLog(tmp_path / "log")
    log.append(epoch=1, loss=1e-7)
    before = log.path.stat().st_ino, log.path.stat().st_mtime_ns
    log.keep(lambda record: True)
    assert (log.path.stat().st_ino, log.path.stat().st_mtime_ns) == before


def test_keep_begins_an_empty_log(tmp_path):
    log = JsonlLog(tmp_path / "log")
    log.keep(lambda record: True)
    assert log.path.read_text() == ""


def test_an_artefact_is_named_by_its_folder_or_itself(tmp_path):
    assert find_artefact(tmp_path, "a.json") == tmp_path / "a.json"
    assert find_artefact(tmp_path / "a.json", "b.json") == tmp_path / "a.json"
    assert find_artefact(str(tmp_path), "a.json") == tmp_path / "a.json"


def test_the_nearest_name_is_suggested_if_any_is_near():
    assert did_you_mean("digist", ["cifar10", "digits"]) == "; did you mean 'digits'?"
    assert did_you_mean("zzz", ["cifar10", "digits"]) == ""


def test_a_choice_is_given_back_or_the_known_are_listed():
    assert check_choice("norm", "l2", ("linf", "l2")) == "l2"
    with pytest.raises(RtkError, match=r"unknown norm 'zz': expected one of linf, l2$"):
        check_choice("norm", "zz", ("linf", "l2"))


def test_a_registry_knows_its_entries():
    things: Registry[int] = Registry("thing")
    assert things.register("one")(1) == 1
    things.register("two")(2)
    assert (things.get("one"), things.names()) == (1, ["one", "two"])
    with pytest.raises(
        RtkError, match="unknown thing 'tow': expected one of one, two; did you mean"
    ):
        things.get("tow")
    with pytest.raises(AssertionError, match="thing 'one' is registered twice"):
        things.register("one")(3)


def test_an_error_of_rtk_is_a_value_error():
    assert issubclass(RtkError, ValueError)
    assert json.dumps(str(RtkError("x"))) == '"x"'


def test_a_folder_belongs_to_one_process_until_it_ends(tmp_path):
    code = (
        "import sys, pathlib; from rtk.runs import lock_folder; "
        "lock_folder(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RtkError, match=r"another process works in .*another --out"):
            lock_folder(tmp_path, patience=0.1)
        other.kill()
    lock_folder(tmp_path)
    lock_folder(tmp_path)  # our own lock is no obstacle


def test_half_written_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".checkpoint.safetensors.x1y2").write_bytes(b"half")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"whole")
    lock_folder(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoint.safetensors"]


def test_a_lock_that_is_given_up_is_free_for_others(tmp_path):
    other = (
        "import sys; from pathlib import Path; from rtk.runs import lock_folder; "
        "lock_folder(Path(sys.argv[1]), patience=0.2)"
    )

    def taken_by_another():
        command = [sys.executable, "-c", other, str(tmp_path)]
        return subprocess.run(command, capture_output=True).returncode == 0

    with unlocked_after(tmp_path):
        lock_folder(tmp_path)
        assert not taken_by_another()
    assert taken_by_another()
    lock_folder(tmp_path)
    with unlocked_after(tmp_path):
        lock_folder(tmp_path)
    assert not taken_by_another()  # it was taken before, and is not this one's to give up
