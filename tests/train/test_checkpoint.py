import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from rtk import Ticket
from rtk.draw import omp
from rtk.errors import RtkError
from rtk.nn import MaskedConv2d
from rtk.train import CHECKPOINT, Checkpoint, load_state, make_step, save_checkpoint

FINISHED = {"progress": {"epoch": 1, "step": 0, "loss_sum": 0.0, "finished": True}}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture
def saved(tmp_path, make_model):
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, make_model(), None, FINISHED)
    return path


@pytest.mark.parametrize("granularity", [None, "element", "kernel"])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, make_model, batches, granularity):
    def start():
        model = make_model().train()
        if granularity is not None:
            omp(model, 0.6, granularity).apply(model)
        optimizer = sgd(model)
        return model, optimizer, make_step(model, optimizer, amp=None)

    model, optimizer, step = start()
    (x1, y1), (x2, y2), _ = batches.epoch(0)
    step(x1, y1)
    progress = {"epoch": 4, "step": 1, "loss_sum": 1 / 3, "finished": False}
    save_checkpoint(tmp_path / "c", model, optimizer, {"progress": progress})
    drawn = (torch.rand(3), np.random.rand())
    step(x2, y2)

    other, other_optimizer, other_step = start()
    torch.manual_seed(99)
    np.random.seed(99)
    assert Checkpoint.load(tmp_path / "c").restore(other, other_optimizer) == progress
    assert torch.equal(torch.rand(3), drawn[0]) and np.random.rand() == drawn[1]
    other_step(x2, y2)
    assert equal(model.state_dict(), other.state_dict())
    momenta, others = (o.state_dict()["state"] for o in (optimizer, other_optimizer))
    assert momenta.keys() == others.keys()
    assert all(equal(momenta[index], others[index]) for index in momenta)


def test_build_model_gives_weights_masks_and_spec_back(tmp_path, make_model):
    model = make_model()
    omp(model, 0.6, "row").apply(model)
    sha256 = save_checkpoint(
        tmp_path / CHECKPOINT, model, sgd(model), {**FINISHED, "lineage": {"a": 1}}
    )
    checkpoint = Checkpoint.load(tmp_path)  # the folder will do
    assert checkpoint.sha256 == sha256 and len(sha256) == 64
    assert checkpoint.path == tmp_path / CHECKPOINT
    assert checkpoint.spec == model.spec
    assert checkpoint.lineage == {"a": 1}
    built = checkpoint.build_model()
    assert equal(model.state_dict(), built.state_dict())
    assert isinstance(built.layer1[0].conv1, MaskedConv2d)
    assert not isinstance(built.conv1, MaskedConv2d)
    assert built.layer1[0].conv1.mask.shape[-1] == 1
    assert Ticket.from_model(built).sparsity == Ticket.from_model(model).sparsity


def test_missing_extra_and_misshapen_keys_are_all_listed(make_model):
    model = make_model()
    state = dict(model.state_dict())
    state["layer1.0.conv1.weigth"] = state.pop("layer1.0.conv1.weight")
    del state["bn1.bias"]
    state["fc.weight"] = torch.zeros(7, 32)
    state["fc.bias"] = torch.zeros(7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RtkError) as caught:
        load_state(model, state, "FILE")
    message = str(caught.value)
    assert message.startswith("FILE does not fit the model")
    assert "missing: bn1.bias, layer1.0.conv1.weight" in message
    assert "unexpected: layer1.0.conv1.weigth" in message
    assert "misshapen: fc.bias, fc.weight" in message
    assert equal(before, model.state_dict())


def test_the_nearest_extra_key_is_suggested(make_model):
    model = make_model()
    state = {n.replace("fc.", "fcs."): t for n, t in model.state_dict().items()}
    with pytest.raises(RtkError, match=r"fcs.bias, fcs.weight; did you mean 'fcs.bias'\?"):
        load_state(model, state, "FILE")


def test_an_unfinished_checkpoint_says_where_it_stopped(tmp_path, make_model):
    progress = {"epoch": 2, "step": 5, "loss_sum": 0.0, "finished": False}
    save_checkpoint(tmp_path / CHECKPOINT, make_model(), None, {"progress": progress})
    checkpoint = Checkpoint.load(tmp_path)
    with pytest.raises(RtkError, match="stopped at epoch 2; give the same command again"):
        checkpoint.require_finished()


def test_a_finished_one_passes(saved):
    checkpoint = Checkpoint.load(saved)
    assert checkpoint.require_finished() is checkpoint


def test_headers_of_every_length_are_read(tmp_path, make_model):
    """The first byte of the file is the header's length modulo 256: 0x80 also begins a pickle."""
    first_bytes = set()
    for extra in range(0, 256, 8):
        save_checkpoint(tmp_path / "c", make_model(), None, {**FINISHED, "note": "x" * extra})
        first_bytes.add((tmp_path / "c").read_bytes()[0])
        assert Checkpoint.load(tmp_path / "c").meta["note"] == "x" * extra
    assert 0x80 in first_bytes


def _flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGE = {
    "empty": (lambda data: b"", "truncated or damaged"),
    "first_4_bytes": (lambda data: data[:4], "truncated or damaged"),
    "half": (lambda data: data[: len(data) // 2], "truncated or damaged"),
    "last_byte_gone": (lambda data: data[:-1], "truncated or damaged"),
    "one_bit": (_flip, r"damaged: its content does not match its SHA-256"),
    "edited_meta": (lambda data: data.replace(b"resnet18", b"resnet50"), "does not match"),
    "text": (lambda data: b"not a checkpoint at all", "truncated or damaged"),
    "pickle": (lambda data: pickle.dumps({"a": 1}), "is a pickle, which can run code"),
    "foreign": (
        lambda data: safetensors.torch.save({"a": torch.zeros(2)}),
        "was not written by rtk",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_refused(saved, damage):
    spoil, message = DAMAGE[damage]
    saved.write_bytes(spoil(saved.read_bytes()))
    with pytest.raises(RtkError, match=f"{saved}.*{message}"):
        Checkpoint.load(saved)


def test_a_file_of_torch_save_is_refused(tmp_path, make_model):
    torch.save(make_model().state_dict(), tmp_path / "model.pt")
    with pytest.raises(RtkError, match=r"model\.pt is a pickle.*safetensors"):
        Checkpoint.load(tmp_path / "model.pt")


def test_a_ticket_is_no_checkpoint(tmp_path, make_model):
    omp(make_model(), 0.5).save(tmp_path / "t")
    with pytest.raises(RtkError, match="is a ticket, expected a checkpoint"):
        Checkpoint.load(tmp_path / "t")


def test_a_missing_checkpoint_names_the_path_that_was_tried(tmp_path):
    with pytest.raises(RtkError, match=f"{tmp_path}/{CHECKPOINT} cannot be read"):
        Checkpoint.load(tmp_path)
    with pytest.raises(RtkError, match="no checkpoint was given; name one with --checkpoint"):
        Checkpoint.load("")


def test_a_write_that_fails_leaves_the_old_checkpoint(saved, make_model, monkeypatch):
    before = saved.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RtkError, match=r"cannot write .* \(No space left on device\)"):
        save_checkpoint(saved, make_model(), None, {"progress": None})
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [CHECKPOINT]
