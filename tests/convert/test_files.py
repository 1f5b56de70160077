"""What a file may be: foreign, truncated, a pickle that would run code, one of several networks."""

import argparse
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rtk import convert
from rtk.config import ConvertConfig
from rtk.convert import unpickle
from rtk.errors import RtkError
from rtk.train import save_checkpoint


class Evil:
    """Runs code where it is unpickled: writes the process's number into a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"import os; open({self.path!r}, 'w').write(str(os.getpid()))",)


def error_of(path, **settings):
    out = path.parent / "out"
    with pytest.raises(RtkError) as error:
        convert.run(ConvertConfig(out=str(out), file=str(path), **settings))
    assert not out.exists()  # what fails claims no folder
    return str(error.value)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "entry", "all"])
def test_a_malicious_file_is_never_executed_here(peer, tmp_path, legacy, place):
    trace, path = tmp_path / "executed", tmp_path / "evil.pth"
    evil = Evil(trace)
    content = {
        "value": {"state_dict": {**peer.state, "x": evil}},
        "entry": {"state_dict": peer.state, "epoch": evil},
        "all": evil,
    }[place]
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    text = error_of(path)
    assert "evil.pth holds more than tensors (exec)" in text and "--trust" in text
    assert not trace.exists()


def test_a_plain_pickle_is_not_opened_either(tmp_path):
    trace, path = tmp_path / "executed", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"params": {"w": np.ones(2)}, "note": Evil(trace)}))
    assert "--trust" in error_of(path)
    assert not trace.exists()


def test_arrays_in_a_plain_pickle_that_is_trusted(peer, pixels, tmp_path, converted, monkeypatch):
    arrays = {name: tensor.numpy() for name, tensor in peer.state.items()}
    (tmp_path / "arrays.pkl").write_bytes(pickle.dumps({"params": arrays, "arch": "resnet18"}))

    def here(command, **options):
        """A pickle without code, and the program that is started, without its process."""
        assert command[:2] == [sys.executable, "-P"] and command[2] == unpickle.__file__
        return subprocess.CompletedProcess(command, unpickle.main(*command[3:]), "", "")

    monkeypatch.setattr(subprocess, "run", here)
    checkpoint = converted(None, "arrays.pkl", trust=True)
    assert torch.equal(checkpoint.build_model().eval()(pixels), peer.answer(pixels))


def test_a_pickle_without_code_says_what_trust_would_do(tmp_path):
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "a pickle that torch.save did not write" in error_of(path)


def test_what_is_harmless_beside_weights_needs_no_trust(peer, pixels, converted):
    content = {
        "state_dict": peer.state,
        "best_acc1": np.float64(71.5),
        "epoch": np.int64(3),
        "args": argparse.Namespace(arch="resnet18", lr=0.1),
        "result": {"train": [1.0], "array": np.ones(2)},
    }
    assert torch.equal(converted(content).build_model().eval()(pixels), peer.answer(pixels))


def test_classes_that_are_not_installed_are_passed_over(tmp_path, monkeypatch):
    """In the process that unpickles: only tensors are wanted of a file."""
    module = types.ModuleType("not_installed")
    module.Absent = type("Absent", (), {"__module__": "not_installed"})
    content = {"model": {"w": torch.ones(2)}, "optimizer": {"w": torch.ones(9)}}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "not_installed", module)
        torch.save({**content, "args": module.Absent()}, tmp_path / "file.pt")
    out = tmp_path / "out.safetensors"
    assert unpickle.main(str(tmp_path / "file.pt"), str(out)) == 0
    found = load_file(out)
    assert list(found) == ["model/w"] and found["model/w"].tolist() == [1, 1]


def test_truncated_and_foreign_files(peer, tmp_path):
    torch.save(peer.state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    save_file(peer.state, tmp_path / "whole.safetensors")
    tensors = (tmp_path / "whole.safetensors").read_bytes()
    torch.save(peer.state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pth").read_bytes()
    for name, data, words in (
        ("cut.pth", whole[: len(whole) // 2], "truncated or damaged"),
        ("cut.safetensors", tensors[: len(tensors) // 2], "truncated or damaged"),
        ("cut-old.pth", old[: len(old) // 2], "truncated or damaged"),
        ("text.pth", b"<html>404 not found</html>", "no checkpoint that rtk can read"),
        ("empty.pth", b"", "no checkpoint that rtk can read"),
        ("zip.pth", b"PK\x03\x04" + bytes(100), "truncated or damaged"),
    ):
        (tmp_path / name).write_bytes(data)
        assert words in error_of(tmp_path / name), name
    assert "nowhere.pth cannot be read (No such file" in error_of(tmp_path / "nowhere.pth")


def test_rtks_own_checkpoint_is_left_alone(peer, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, peer.network, None, {})
    assert "is rtk's own already" in error_of(path)


def test_one_of_several_networks(peer, converted, tmp_path):
    old = {name: tensor * 0 for name, tensor in peer.state.items()}
    content = {"student": peer.state, "teacher": old, "epoch": 3}
    torch.save(content, tmp_path / "two.pth")
    assert "student, teacher; say with --entry" in error_of(tmp_path / "two.pth")
    text = error_of(tmp_path / "two.pth", entry="studnet")
    assert "no entry 'studnet'" in text and "did you mean 'student'" in text
    assert "no entry 'epoch' with tensors" in error_of(tmp_path / "two.pth", entry="epoch")
    model = converted(None, "two.pth", entry="student").build_model()
    assert torch.equal(model.conv1.weight, peer.network.conv1.weight)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}, torch.ones(3)])
def test_no_network(content, tmp_path):
    torch.save(content, tmp_path / "none.pth")
    assert "holds no network" in error_of(tmp_path / "none.pth")


def test_two_networks_under_one_key(peer, tmp_path):
    state = {**peer.state, **{f"module.{key}": tensor for key, tensor in peer.state.items()}}
    torch.save(state, tmp_path / "both.pth")
    assert "keys that differ only in `module.`" in error_of(tmp_path / "both.pth")
