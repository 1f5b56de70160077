"""Artefacts: what was written is read back, and nothing else is."""

from __future__ import annotations

import gzip
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rtk import artifact
from rtk.errors import RtkError

META = {"recipe": {"lr": 0.375, "name": "ünïcode", "none": None, "list": [1, [2]]}}


def tensors() -> dict[str, torch.Tensor]:
    return {
        "float": torch.tensor([[1.5, float("nan")], [-0.0, float("inf")]]),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "bool": torch.rand(11) < 0.5,
        "bytes": torch.arange(7, dtype=torch.uint8),
        "number": torch.tensor(41),
        "nothing": torch.zeros(0, 3),
        "transposed": torch.randn(4, 3).t(),
    }


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "artefact.safetensors"


def test_round_trip(path):
    given = tensors()
    sha256 = artifact.save(path, "checkpoint", given, META)
    loaded, meta, read_sha256 = artifact.load(path, "checkpoint")
    assert_same(loaded, given)
    assert meta["recipe"] == META["recipe"]
    assert meta["kind"] == "checkpoint"
    assert read_sha256 == sha256
    assert list(path.parent.iterdir()) == [path]


def test_a_peek_is_at_metadata_and_hash_only(path):
    sha256 = artifact.save(path, "ticket", tensors(), META)
    _, meta, _ = artifact.load(path, "ticket")
    assert artifact.peek(path) == (meta, sha256)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # the tensors are not looked at
    assert artifact.peek(path) == (meta, sha256)
    for content in (b"", data[:5], data[:40], b"PK\x03\x04" + bytes(90), b"\xff" * 64):
        path.write_bytes(content)
        assert artifact.peek(path) is None
    save_file({"x": torch.zeros(1)}, path)  # not rtk's
    assert artifact.peek(path) is None
    assert artifact.peek(path.parent / "nothing") is None


def test_tensors_that_share_memory(path):
    whole = torch.randn(6)
    given = {"whole": whole, "same": whole, "part": whole[2:4], "view": whole.view(2, 3)}
    artifact.save(path, "checkpoint", given, {})
    assert_same(artifact.load(path, "checkpoint")[0], given)


def test_the_hash_is_of_the_content(path):
    def sha256(meta=META, **changes):
        return artifact.save(path, "checkpoint", tensors_ | changes, meta)

    tensors_ = tensors()
    base = sha256()
    assert sha256() == base
    assert sha256(meta=dict(reversed(META.items()))) == base
    assert sha256(float=tensors_["float"].abs()) != base, "the sign of zero counts"
    assert sha256(bytes=tensors_["bytes"].to(torch.int8)) != base
    assert sha256(nothing=torch.zeros(3, 0)) != base
    assert sha256(meta={}) != base


def test_every_truncation_is_refused(path):
    artifact.save(path, "ticket", {"mask": torch.arange(9, dtype=torch.uint8)}, META)
    data = path.read_bytes()
    for size in [*range(0, len(data), 7), len(data) - 2, len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(RtkError, match=r"artefact.safetensors"):
            artifact.load(path, "ticket")
    path.write_bytes(data + b"\0")
    with pytest.raises(RtkError, match="truncated or damaged"):
        artifact.load(path, "ticket")


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_is_refused_or_harmless(seed, path):
    given = tensors()
    artifact.save(path, "ticket", given, META)
    data = path.read_bytes()
    wanted = artifact.load(path, "ticket")
    dice = random.Random(seed)
    bits = {dice.randrange(8 * len(data)) for _ in range(400)} | set(
        range(seed * 16, seed * 16 + 16)
    )
    refused = 0
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded, *others = artifact.load(path, "ticket")
        except RtkError:
            refused += 1
        else:
            assert_same(loaded, given)
            assert others == list(wanted[1:])
    assert refused > 0.95 * len(bits)


def test_an_edited_value_is_refused(path):
    artifact.save(path, "ticket", tensors(), META)
    data = path.read_bytes()
    assert data.count(b"0.375") == 1
    path.write_bytes(data.replace(b"0.375", b"0.376"))
    with pytest.raises(RtkError, match="does not match its SHA-256"):
        artifact.load(path, "ticket")


class Trap:
    """A pickle that leaves a trace where it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


PICKLES = {
    **{f"protocol-{n}": lambda trap, n=n: pickle.dumps(trap, n) for n in range(6)},
    "gzip": lambda trap: gzip.compress(pickle.dumps(trap)),
    "brace-at-byte-8": lambda trap: pickle.dumps(("a{", trap), 2),  # as in safetensors
}


def assert_never_opened(path: Path, trace: Path) -> None:
    for kind in ("ticket", "checkpoint"):
        with pytest.raises(RtkError, match=r"pickle|damaged"):
            artifact.load(path, kind)
    assert not trace.exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_never_opened(kind, path, tmp_path):
    trace = tmp_path / "trace"
    data = PICKLES[kind](Trap(trace))
    assert (data[8:9] == b"{") == (kind == "brace-at-byte-8")
    path.write_bytes(data)
    assert_never_opened(path, trace)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_torch_save_file_is_never_opened(zipped, path, tmp_path):
    trace = tmp_path / "trace"
    torch.save({"w": torch.ones(2), "t": Trap(trace)}, path, _use_new_zipfile_serialization=zipped)
    assert_never_opened(path, trace)
    with pytest.raises(RtkError, match="is a pickle, which can run code when opened"):
        artifact.load(path, "checkpoint")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"rtk": "{}"}], ids=str)
def test_foreign_safetensors(metadata, path):
    save_file({"w": torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(RtkError, match="safetensors but was not written by rtk"):
        artifact.load(path, "ticket")


@pytest.mark.parametrize(
    ("written", "wanted"), [("checkpoint", "ticket"), ("ticket", "checkpoint")]
)
def test_another_kind(written, wanted, path):
    artifact.save(path, written, {"w": torch.ones(3)}, {})
    with pytest.raises(RtkError, match=f"is a {written}, expected a {wanted}"):
        artifact.load(path, wanted)


def test_a_newer_format(path, monkeypatch):
    monkeypatch.setattr(artifact, "FORMAT", artifact.FORMAT + 1)
    artifact.save(path, "ticket", {}, {})
    monkeypatch.undo()
    with pytest.raises(RtkError, match=r"format 2, written by rtk .* upgrade rtk"):
        artifact.load(path, "ticket")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"{}", b"GIF89a" * 50, json.dumps({"a": 1}).encode(), b"\xff" * 64, b"\0" * 64],
    ids=["empty", "two-bytes", "braces", "gif", "json", "ones", "zeros"],
)
def test_other_files(content, path):
    path.write_bytes(content)
    with pytest.raises(RtkError, match=r"artefact.safetensors is (truncated|a pickle)"):
        artifact.load(path, "ticket")


def test_a_missing_file_and_a_folder(path, tmp_path):
    with pytest.raises(RtkError, match=r"cannot be read \(No such file or directory\)"):
        artifact.load(path, "ticket")
    with pytest.raises(RtkError, match=r"cannot be read \(Is a directory\)"):
        artifact.load(tmp_path, "ticket")
