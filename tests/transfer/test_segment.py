import dataclasses
import itertools
import json
import math
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rtk import Ticket, evaluate, models, transfer
from rtk.cli import main
from rtk.config import (
    AttackConfig,
    CertifyConfig,
    DataConfig,
    EvaluateConfig,
    SegmentConfig,
    TrainConfig,
    TransferConfig,
    segment_train,
)
from rtk.data import segmentation
from rtk.data.segmentation import IGNORED
from rtk.errors import Interrupted, RtkError
from rtk.identity import config_hash, from_dict, to_dict
from rtk.train import CHECKPOINT, Checkpoint, learning_rate, loop, make_optimizer
from rtk.transfer.segment import pixel_cross_entropy, segmentation_network

TRAIN = TrainConfig(epochs=2, batch_size=4, lr=0.05, milestones=(1,), weight_decay=5e-3)
SEGMENT = SegmentConfig(epoch_steps=3, crop_size=12, backbone_lr=0.01, backbone_bn_momentum=0.2)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Bright squares on a dark, noisy ground, framed by pixels to ignore: 3 classes."""
    rng = np.random.default_rng(0)
    arrays = {"class_names": np.array(["ground", "green", "red"])}
    for part, count in (("train", 10), ("test", 6)):
        images = rng.integers(0, 60, (count, 16, 20, 3), dtype=np.uint8)
        masks = np.zeros((count, 16, 20), np.uint8)
        for image, mask in zip(images, masks, strict=True):
            for colour in (1, 2):
                top, left = rng.integers(1, 8), rng.integers(1, 12)
                image[top : top + 7, left : left + 7, colour % 2] += 180
                mask[top : top + 7, left : left + 7] = colour
        masks[:, [0, -1]] = masks[:, :, [0, -1]] = IGNORED
        arrays |= {f"{part}_images": images, f"{part}_masks": masks}
    path = tmp_path_factory.mktemp("scenes") / "scenes.npz"
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.fixture
def make_config(tmp_path, pretrained, ticket, scenes):
    def make(out="run", **changes):
        values = {
            "out": str(tmp_path / out),
            "checkpoint": str(pretrained),
            "ticket": str(ticket),
            "mode": "segment",
            "data": DataConfig(scenes),
            "train": TRAIN,
            "segment": SEGMENT,
        }
        return TransferConfig(**{**values, **changes})

    return make


def start(config, classes=3):
    """Return the network that a transfer begins with."""
    torch.manual_seed(config.seed)
    model = Checkpoint.load(config.checkpoint).build_model()
    Ticket.load(f"{config.ticket}/ticket.safetensors").apply(model)
    return segmentation_network(model, classes, config.segment)


def numbers(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def test_the_backbone_starts_as_the_ticket(make_config, pretrained, ticket):
    config = make_config()
    network = start(config)
    source = Checkpoint.load(pretrained).section("model")
    drawn = Ticket.load(ticket / "ticket.safetensors")
    for name, weight in network.backbone.state_dict().items():
        layer = name.removesuffix(".weight")
        if name.endswith(".mask"):
            assert torch.equal(weight, drawn.masks[name.removesuffix(".mask")])
        elif layer in drawn.masks:
            assert torch.equal(weight, source[name] * drawn.masks[layer])
        else:
            assert torch.equal(weight, source[name])
    masks = {n.removesuffix(".mask") for n in network.state_dict() if n.endswith(".mask")}
    assert masks == {f"backbone.{name}" for name in drawn.masks}  # the head is dense
    assert network.spec.mean == Checkpoint.load(pretrained).spec.mean


def test_it_learns_and_pruned_weights_stay_zero(make_config):
    train = TrainConfig(
        epochs=6, batch_size=5, lr=0.1, momentum=0.95, weight_decay=0.05, milestones=(3,)
    )
    segment = dataclasses.replace(SEGMENT, epoch_steps=8, backbone_lr=0.1)
    config = make_config(train=train, segment=segment)
    path = transfer.run(config)
    ticket = Ticket.load(f"{config.ticket}/ticket.safetensors")
    model = Checkpoint.load(path).require_finished().build_model()
    before, after = start(config).state_dict(), model.state_dict()
    for name, mask in ticket.masks.items():
        layer = model.get_submodule(f"backbone.{name}")
        assert torch.equal(layer.mask, mask), name
        assert (layer.weight[~mask] == 0).all(), name
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.endswith(".mask")}
    first, *_, last = numbers(path.parent)
    assert last["loss"] < 0.6 * first["loss"]
    assert last["pixel_accuracy"] > 0.75 and last["miou"] > 0.45  # all ground: 0.68, 0.23


def test_it_is_sgd_with_two_rates_over_the_batches(make_config, scenes):
    """The loop's steps, written out: rates, schedule, loss, iterations beyond one pass."""
    config = make_config()
    path = transfer.run(config)
    model = start(config).train()
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.2
    optimizer = torch.optim.SGD(
        [{"params": model.classifier.parameters()}, {"params": model.backbone.parameters()}],
        0.05,
        momentum=0.9,
        weight_decay=5e-3,
    )
    batches = segmentation.SegmentationBatches(
        segmentation.load(DataConfig(scenes)).train,
        4,
        augment="scale_crop_flip",
        crop_size=12,
        epoch_steps=3,
    )
    losses = []
    for epoch in range(2):
        for step, (x, y) in enumerate(batches.epoch(epoch)):
            rate = learning_rate(TRAIN, epoch + step / 3)
            assert rate == pytest.approx(0.05 if epoch == 0 else 0.005)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.param_groups[1]["lr"] = rate * (0.01 / 0.05)
            loss = F.cross_entropy(model(x), y, ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    found = Checkpoint.load(path).section("model")
    for name, tensor in model.state_dict().items():
        assert torch.allclose(found[name], tensor, atol=2e-6), name
    logged = [record["loss"] for record in numbers(path.parent)]
    assert logged == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5)


@pytest.mark.parametrize("call", [2, 3, 5], ids=["mid_epoch", "epoch_end", "epoch_2"])
def test_a_stopped_run_ends_as_an_undisturbed_one(make_config, monkeypatch, call):
    """The head's dropout included: its generator is part of the checkpoint."""
    undisturbed = transfer.run(make_config("undisturbed")).parent
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
            transfer.run(make_config("stopped"))
    torch.manual_seed(77)
    stopped = transfer.run(make_config("stopped")).parent
    ours, theirs = Checkpoint.load(stopped), Checkpoint.load(undisturbed)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(t, theirs.tensors[n]) for n, t in ours.tensors.items())
    assert numbers(stopped) == numbers(undisturbed)


@pytest.mark.gpu
def test_on_a_gpu_its_steps_are_one_graph(make_config, monkeypatch):
    steps, make_step = [], loop.make_step
    monkeypatch.setattr(
        loop,
        "make_step",
        lambda *args, **kwargs: steps.append(make_step(*args, **kwargs)) or steps[0],
    )
    train = dataclasses.replace(TRAIN, epochs=6, schedule="constant")
    segment = dataclasses.replace(SEGMENT, epoch_steps=8, backbone_lr=0.05)
    config = make_config(device="cuda", train=train, segment=segment)
    path = transfer.run(config)
    assert steps[0].captured and steps[0].nonfinite.item() == 0
    model = Checkpoint.load(path).build_model()
    for name, mask in Ticket.load(f"{config.ticket}/ticket.safetensors").masks.items():
        assert (model.get_submodule(f"backbone.{name}").weight[~mask] == 0).all(), name
    first, *_, last = numbers(path.parent)
    assert last["loss"] < 0.8 * first["loss"]


def test_a_checkpoint_tells_what_it_is(make_config, pretrained):
    config = make_config(seed=4)
    checkpoint = Checkpoint.load(transfer.run(config))
    assert checkpoint.meta["classes"] == ["ground", "green", "red"]
    assert checkpoint.meta["config"] == to_dict(config)
    assert (checkpoint.spec.network, checkpoint.spec.output_stride) == ("deeplabv3plus", 4)
    lineage = checkpoint.lineage
    assert (lineage["transfer"], lineage["target"]) == ("segment", config.data.name)
    assert (lineage["sparsity"], lineage["seed"]) == (0.8, 4)


def test_fcn_dense_whole_images_and_one_pass_an_epoch(make_config):
    segment = SegmentConfig(network="fcn", output_stride=8, epoch_steps=None)
    data = dataclasses.replace(make_config().data, augment="none")
    train = dataclasses.replace(TRAIN, epochs=1)
    path = transfer.run(make_config(ticket=None, segment=segment, data=data, train=train))
    checkpoint = Checkpoint.load(path)
    assert (checkpoint.spec.network, checkpoint.spec.output_stride) == ("fcn", 8)
    assert not [name for name in checkpoint.section("model") if name.endswith(".mask")]
    assert checkpoint.lineage["scheme"] == "dense"


def test_windows_follow_the_stem(make_config, scenes):
    dataset = segmentation.load(DataConfig(scenes))
    segment = SegmentConfig()
    task = transfer.SegmentTask(dataset, "auto", TRAIN, segment, {"batch_size": 4})
    assert task.train_batches("7x7").crop_size == 513
    assert task.train_batches("3x3").crop_size == 16
    assert len(task.train_batches("3x3")) == 1000


def test_ignored_pixels_have_no_gradient_and_do_not_count():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    masks = torch.randint(0, 4, (2, 5, 6))
    masks[torch.rand(2, 5, 6) < 0.4] = IGNORED
    for smoothing in (0.0, 0.1):
        loss = pixel_cross_entropy(logits, masks, smoothing)
        counted = masks != IGNORED
        wanted = F.cross_entropy(
            logits.movedim(1, 3)[counted], masks[counted], label_smoothing=smoothing
        )
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad.movedim(1, 3)[~counted] == 0).all()
        assert (grad.movedim(1, 3)[counted] != 0).all()


def test_a_batch_with_nothing_to_learn_is_no_nan():
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    loss = pixel_cross_entropy(logits, torch.full((2, 5, 6), IGNORED))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


def test_a_group_has_its_own_share_of_the_rate():
    from rtk.train.optim import set_learning_rate

    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = make_optimizer([one], TRAIN)
    optimizer.add_param_group({"params": [two], "lr_factor": 0.1})
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, pytest.approx(0.05)]


# Evaluation


def evaluated(config, **changes):
    values = {"checkpoint": config.out, "out": f"{config.out}-evaluated"}
    values |= {"attack": AttackConfig(), **changes}
    return EvaluateConfig(**values)


def test_evaluate_writes_miou(make_config):
    config = make_config()
    folder = transfer.run(config).parent
    path = evaluate.run(evaluated(config))
    result = json.loads(path.read_text())
    logged = numbers(folder)[-1]
    assert result["miou"] == pytest.approx(logged["miou"], abs=1e-6)
    assert result["pixel_accuracy"] == pytest.approx(logged["pixel_accuracy"], abs=1e-6)
    assert list(result["class_iou"]) == ["green", "ground", "red"]  # JSON is written sorted
    present = [value for value in result["class_iou"].values() if value is not None]
    assert result["miou"] == pytest.approx(sum(present) / len(present))
    assert (result["images"], result["attack"], result["transfer"]) == (6, None, "segment")
    assert "top1" not in result
    written = path.stat().st_mtime_ns
    assert evaluate.run(evaluated(config)).stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attack": AttackConfig("pgd")}, "attack.name: expected none for a segmentation"),
        ({"certify": CertifyConfig(sigma=0.5)}, "certify.sigma: expected null"),
        ({"ood": ("svhn",)}, r"ood: expected \[\]"),
    ],
    ids=["attack", "certify", "ood"],
)
def test_what_is_not_measured_of_segmentation_is_refused(make_config, tmp_path, change, words):
    config = make_config(train=dataclasses.replace(TRAIN, epochs=0))
    transfer.run(config)
    with pytest.raises(RtkError, match=words):
        evaluate.run(evaluated(config, **change))
    assert not (tmp_path / "run-evaluated").exists()


def test_masks_of_more_classes_are_refused(make_config, tmp_path):
    config = make_config(train=dataclasses.replace(TRAIN, epochs=0))
    transfer.run(config)
    images, masks = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8), 3, np.uint8)
    values = {f"{part}_{kind}": array for part in ("train", "test")
              for kind, array in (("images", images), ("masks", masks))}  # fmt: skip
    np.savez(tmp_path / "more.npz", **values)
    with pytest.raises(RtkError, match=r"trained on 3 classes and .* has 4"):
        evaluate.run(evaluated(config, data=DataConfig(f"npz:{tmp_path}/more.npz")))


# Settings


def test_by_default_it_is_the_papers(make_config):
    config = TransferConfig(mode="segment")
    train = config.train
    assert train == segment_train()
    assert train.epochs * config.segment.epoch_steps == 30_000
    assert [m * config.segment.epoch_steps for m in train.milestones] == [18_000, 22_000]
    assert (train.batch_size, train.lr, train.momentum) == (4, 0.01, 0.9)
    assert (train.weight_decay, train.gamma, config.segment.backbone_lr) == (1e-4, 0.1, 0.001)
    assert TransferConfig().train.epochs == 150  # the other modes' own stays
    part = from_dict(TransferConfig, {"mode": "segment", "train": {"batch_size": 8}})
    assert part.train == dataclasses.replace(segment_train(), batch_size=8)
    assert from_dict(TransferConfig, to_dict(config)) == config
    replaced = dataclasses.replace(TransferConfig(), mode="segment")
    assert replaced.train == segment_train()
    own = TrainConfig()
    assert TransferConfig(mode="segment", train=own).train is own


def test_settings_of_segment_count_and_leave_other_modes_alone(make_config):
    hashes = {config_hash(make_config()), config_hash(make_config(segment=SegmentConfig()))}
    assert len(hashes) == 2
    # As it was before there was segmentation: a run in an old folder goes on.
    assert config_hash(TransferConfig()) == "06208b71b449"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"network": "unet"}, "unknown segmentation network 'unet'"),
        ({"crop_size": 0}, "segment.crop_size: expected at least 1, or null"),
        ({"epoch_steps": 0}, "segment.epoch_steps"),
        ({"output_stride": 0}, "segment.output_stride"),
        ({"backbone_lr": -1.0}, "segment.backbone_lr"),
        ({"backbone_lr": math.nan}, "segment.backbone_lr"),
        ({"backbone_bn_momentum": 1.5}, "segment.backbone_bn_momentum"),
    ],
    ids=str,
)
def test_bad_settings(values, words):
    with pytest.raises(RtkError, match=words):
        SegmentConfig(**values)


def test_settings_that_do_not_go_together():
    with pytest.raises(RtkError, match="no such settings beside mode finetune"):
        TransferConfig(segment=SegmentConfig(network="fcn"))
    with pytest.raises(RtkError, match=r"train.lr: expected a rate > 0"):
        TransferConfig(mode="segment", train=dataclasses.replace(TRAIN, lr=0.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": DataConfig("cifar10")}, "unknown segmentation set 'cifar10'"),
        ({"segment": SegmentConfig(output_stride=16)}, "output_stride: expected 4, 2, 8"),
        ({"augment": "crop"}, "data.augment: expected auto .* got 'crop'"),
    ],
    ids=["set", "stride", "augment"],
)
def test_bad_input_makes_no_folder(make_config, tmp_path, change, words):
    if "augment" in change:
        change = {"data": dataclasses.replace(make_config().data, **change)}
    with pytest.raises(RtkError, match=words):
        transfer.run(make_config(**change))
    assert not (tmp_path / "run").exists()


def test_one_image_is_not_enough(scenes):
    dataset = segmentation.load(DataConfig(scenes))
    one = segmentation.SegmentationSplit(dataset.train.images[:1], dataset.train.masks[:1])
    dataset = dataclasses.replace(dataset, train=one)
    with pytest.raises(RtkError, match="at least 2 training images"):
        transfer.SegmentTask(dataset, "auto", TRAIN, SEGMENT, {})


@pytest.mark.parametrize("mode", ["segment", "finetune"])
def test_a_segmentation_network_is_not_transferred_again(make_config, tmp_path, mode):
    config = make_config("first", train=dataclasses.replace(TRAIN, epochs=0))
    transfer.run(config)
    again = make_config("second", checkpoint=config.out, ticket=None, mode=mode,
                        segment=SegmentConfig())  # fmt: skip
    with pytest.raises(RtkError, match="is a segmentation network; transfer from the pretrained"):
        transfer.run(again)


def test_command_line(pretrained, ticket, scenes, tmp_path, capsys):
    words = (
        f"transfer --mode segment --checkpoint {pretrained} --ticket {ticket} --data.name {scenes}"
    )
    words += f" --out {tmp_path}/run --device cpu --train.epochs 1 --segment.epoch_steps 2"
    words += " --segment.crop_size 12 --segment.network fcn"
    assert main(words.split()) == 0
    config = Checkpoint.load(tmp_path / "run" / CHECKPOINT).meta["config"]
    assert (config["train"]["batch_size"], config["train"]["milestones"]) == (4, [18, 22])
    assert config["segment"] == {
        "network": "fcn",
        "output_stride": None,
        "crop_size": 12,
        "epoch_steps": 2,
        "backbone_lr": 0.001,
        "backbone_bn_momentum": 0.01,
    }
    words = f"evaluate --checkpoint {tmp_path}/run --out {tmp_path}/e --device cpu"
    assert main(words.split()) == 2
    assert "give --attack.name none" in capsys.readouterr().err
    assert main([*words.split(), "--attack.name", "none"]) == 0
    assert 0 <= json.loads((tmp_path / "e/result.json").read_text())["miou"] <= 1
    assert main(f"report {tmp_path}".split()) == 0
    assert "mean IoU %" in capsys.readouterr().out


def test_models_know_the_networks_that_the_configuration_knows():
    from rtk.config import SEGMENTATION_NETWORKS

    for network in SEGMENTATION_NETWORKS:
        spec = models.SegmentationSpec(
            "resnet18", "3x3", 0.0625, 3, (0.5,) * 3, (0.2,) * 3, network
        )
        assert models.create(spec)(torch.rand(1, 3, 8, 8).repeat(2, 1, 1, 1)).shape == (2, 3, 8, 8)
