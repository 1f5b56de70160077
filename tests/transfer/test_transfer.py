import dataclasses
import itertools
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rtk import Ticket, data, draw, models, transfer
from rtk.config import TRANSFER_MODES, DataConfig, DrawConfig, TrainConfig, TransferConfig
from rtk.errors import Interrupted, RtkError
from rtk.identity import config_hash, to_dict
from rtk.train import CHECKPOINT, Checkpoint, learning_rate, loop, save_checkpoint
from rtk.transfer.task import Task

CLASSIFYING = [mode for mode in TRANSFER_MODES if mode != "segment"]
TARGET = DataConfig("digits[2-3]")
TRAIN = TrainConfig(epochs=2, batch_size=64, lr=0.05, schedule="cosine", weight_decay=5e-3)


@pytest.fixture
def make_config(tmp_path, pretrained, ticket):
    def make(out="run", **changes):
        values = {
            "out": str(tmp_path / out),
            "checkpoint": str(pretrained),
            "ticket": str(ticket),
            "data": TARGET,
            "train": TRAIN,
        }
        return TransferConfig(**{**values, **changes})

    return make


def start(config):
    """Return the model that a transfer begins with: checkpoint, ticket, new head."""
    model = Checkpoint.load(config.checkpoint).build_model()
    Ticket.load(f"{config.ticket}/ticket.safetensors").apply(model)
    generator = torch.Generator().manual_seed(config.seed)
    return models.replace_head(model, 2, generator=generator)


def changed(path, config):
    """Return the names of what the transfer changed in the model."""
    before = start(config).state_dict()
    after = Checkpoint.load(path).section("model")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def numbers(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def test_finetuning_trains_all_but_what_is_pruned(make_config):
    config = make_config(train=dataclasses.replace(TRAIN, momentum=0.95, weight_decay=0.1))
    path = transfer.run(config)
    ticket = Ticket.load(f"{config.ticket}/ticket.safetensors")
    model = Checkpoint.load(path).build_model()
    for name, mask in ticket.masks.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.mask, mask), name
        assert (layer.weight[~mask] == 0).all(), name
    masks = {name for name in model.state_dict() if name.endswith(".mask")}
    assert changed(path, config) == set(model.state_dict()) - masks
    first, last = numbers(path.parent)
    assert last["loss"] < first["loss"]


def test_a_bn_updating_linear_evaluation_changes_head_and_statistics(make_config):
    config = make_config(mode="linear_bn_update")
    path = transfer.run(config)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    names = set(start(config).state_dict())
    wanted = {n for n in names if n.startswith("fc.") or n.rsplit(".", 1)[-1] in statistics}
    assert changed(path, config) == wanted
    assert len(wanted) == 2 + 3 * 20


def test_a_frozen_linear_evaluation_is_head_training_on_eval_features(make_config):
    config = make_config(mode="linear_frozen")
    path = transfer.run(config)
    assert changed(path, config) == {"fc.weight", "fc.bias"}

    model = start(config).eval()
    images = data.Batches(data.load(TARGET).train, 64)
    with torch.no_grad():
        pairs = [(model.forward_features(x), y) for x, y in images.epoch(0)]
    features, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    optimizer = torch.optim.SGD(model.fc.parameters(), 0.05, momentum=0.9, weight_decay=5e-3)
    steps = len(labels) // 64
    for epoch in range(2):
        order = data.epoch_order(len(labels), config.seed, epoch)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = learning_rate(TRAIN, epoch + step / steps)
            chosen = order[64 * step : 64 * (step + 1)]
            loss = F.cross_entropy(model.fc(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = Checkpoint.load(path).section("model")
    assert torch.equal(found["fc.weight"], model.fc.weight)
    assert torch.equal(found["fc.bias"], model.fc.bias)


@pytest.mark.parametrize("call", [2, 5, 7], ids=["mid_epoch", "epoch_end", "epoch_2"])
@pytest.mark.parametrize("mode", CLASSIFYING)
def test_a_stopped_transfer_ends_as_an_undisturbed_one(make_config, monkeypatch, mode, call):
    if mode == "linear_frozen" and call > 2:
        call -= 1  # it leaves out the last, smaller batch: four steps, not five
    undisturbed = transfer.run(make_config("undisturbed", mode=mode)).parent
    make_step = loop.make_step

    def make(*args, **kwargs):
        step, calls = make_step(*args, **kwargs), itertools.count(1)

        def counted(x, y):
            loss = step(x, y)
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return loss

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", make)
        with pytest.raises(Interrupted):
            transfer.run(make_config("stopped", mode=mode))
    torch.manual_seed(77)
    stopped = transfer.run(make_config("stopped", mode=mode)).parent
    ours, theirs = Checkpoint.load(stopped), Checkpoint.load(undisturbed)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(t, theirs.tensors[n]) for n, t in ours.tensors.items())
    assert numbers(stopped) == numbers(undisturbed)


def test_it_tells_what_the_model_has_been_through(make_config, pretrained, ticket):
    config = make_config(seed=4)
    checkpoint = Checkpoint.load(transfer.run(config)).require_finished()
    drawn = Ticket.load(ticket / "ticket.safetensors")
    assert checkpoint.meta["source_sha256"] == Checkpoint.load(pretrained).sha256
    assert checkpoint.meta["ticket_sha256"] == drawn.meta["sha256"]
    assert checkpoint.meta["config"] == to_dict(config)
    assert checkpoint.meta["config_hash"] == config_hash(config)
    assert checkpoint.meta["classes"] == ["2", "3"]
    assert checkpoint.lineage == {
        "arch": "resnet18",
        "source": "digits[0-1]",
        "pretrain": "natural",
        "robust": False,
        "pretrain_seed": 0,
        "scheme": "omp",
        "granularity": "element",
        "sparsity": 0.8,
        "actual_sparsity": drawn.sparsity,
        "target": "digits[2-3]",
        "transfer": "finetune",
        "seed": 4,
    }


def test_without_a_ticket_the_dense_network_is_transferred(make_config):
    checkpoint = Checkpoint.load(transfer.run(make_config(ticket=None)))
    assert not [name for name in checkpoint.section("model") if name.endswith(".mask")]
    lineage = checkpoint.lineage
    assert (lineage["scheme"], lineage["granularity"], lineage["sparsity"]) == ("dense", None, 0.0)
    assert checkpoint.meta["ticket_sha256"] is None


def test_a_finished_transfer_is_left_as_it_is(make_config):
    folder = transfer.run(make_config()).parent
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}
    assert transfer.run(make_config()) == folder / CHECKPOINT
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()} == before


def test_no_resume_starts_over(make_config):
    path = transfer.run(make_config())
    written, weights = path.stat().st_mtime_ns, Checkpoint.load(path).section("model")
    transfer.run(make_config(resume=False))
    assert path.stat().st_mtime_ns > written
    again = Checkpoint.load(path).section("model")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())


def test_other_settings_in_the_same_folder_are_refused(make_config):
    transfer.run(make_config())
    with pytest.raises(RtkError, match="mode is 'finetune' there and 'linear_frozen' here"):
        transfer.run(make_config(mode="linear_frozen"))


@pytest.mark.filterwarnings("ignore:the ticket .* was drawn from another checkpoint")
def test_a_source_that_has_changed_is_refused(make_config, tmp_path, pretrained, make_pretrained):
    """The old result would not be of the checkpoint that is named."""
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    transfer.run(make_config(checkpoint=str(source)))
    shutil.copy(make_pretrained() / CHECKPOINT, source / CHECKPOINT)
    with pytest.raises(RtkError, match=r"source_sha256 differs.*--no_resume"):
        transfer.run(make_config(checkpoint=str(source)))
    transfer.run(make_config(checkpoint=str(source), resume=False))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"arch": "resnet50"}, "ticket is for arch resnet50, the model has arch resnet18"),
        ({"stem": "7x7"}, "ticket is for stem 7x7, the model has stem 3x3"),
        ({"width": 0.125}, "ticket is for width 0.125, the model has width 0.0625"),
    ],
    ids=["arch", "stem", "width"],
)
def test_a_ticket_for_another_network_is_refused(
    make_config, make_pretrained, tmp_path, model, message
):
    other = make_pretrained(**model)
    draw.run(DrawConfig(out=str(tmp_path / "other"), checkpoint=str(other)))
    with pytest.raises(RtkError, match=f"{message}; draw a ticket from this model"):
        transfer.run(make_config(ticket=str(tmp_path / "other")))
    assert not (tmp_path / "run").exists()


def test_a_ticket_of_another_checkpoint_is_pointed_out(make_config, make_pretrained, recwarn):
    transfer.run(make_config())
    assert not [w for w in recwarn if "ticket" in str(w.message)]
    with pytest.warns(UserWarning, match="drawn from another checkpoint"):
        transfer.run(make_config("other", checkpoint=str(make_pretrained())))


def test_an_unfinished_checkpoint_is_refused(make_config, tmp_path, pretrained):
    checkpoint = Checkpoint.load(pretrained)
    progress = {"epoch": 3, "step": 1, "loss_sum": 0.0, "finished": False}
    path = tmp_path / "unfinished.safetensors"
    save_checkpoint(path, checkpoint.build_model(), None, {"progress": progress})
    with pytest.raises(RtkError, match="stopped at epoch 3; give the same command again"):
        transfer.run(make_config(checkpoint=str(path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("mode", CLASSIFYING)
def test_a_last_batch_of_one_image_does_no_harm(make_config, tmp_path, mode):
    """On 8x8 images the last layers have one value a channel, of which there is no variance."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 17), ("test", 6)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(count) % 2
    np.savez(tmp_path / "few.npz", **arrays)
    train = dataclasses.replace(TRAIN, batch_size=8)
    config = make_config(data=DataConfig(f"npz:{tmp_path}/few.npz"), train=train, mode=mode)
    Checkpoint.load(transfer.run(config)).require_finished()


@pytest.mark.parametrize(("size", "sizes"), [(16, [16] * 2 + [8]), (13, [13] * 3), (8, [8] * 5)])
def test_all_images_are_trained_on_but_a_single_last_one(size, sizes):
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)
    split = data.Split(images.contiguous(), torch.arange(40) % 2)
    dataset = data.Dataset("forty", ("a", "b"), split, split, None, "none")
    task = Task(dataset, "none", TRAIN, {"batch_size": size, "seed": 1})
    batches = list(task.train_batches().epoch(0))
    assert [len(y) for _, y in batches] == sizes
    seen = torch.cat([x[:, 0, 0, 0] for x, _ in batches]) * 255
    assert len(seen.round().unique()) == sum(sizes)


def test_a_data_set_smaller_than_a_batch_is_one_step(make_config):
    train = dataclasses.replace(TRAIN, batch_size=1000, epochs=1)
    folder = transfer.run(make_config(train=train)).parent
    assert len(numbers(folder)) == 1


def test_modes_are_registered_as_the_configuration_knows_them():
    assert tuple(transfer.modes.names()) == TRANSFER_MODES
