"""imp and a-imp: what each round prunes, rewinding, resuming, and the stage around them."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn.utils import prune

from rtk import Ticket, cli, data, draw, evaluate, pretrain, transfer
from rtk.attacks import PGD
from rtk.config import (
    AttackConfig,
    DataConfig,
    DrawConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
    check_rounds,
    imp_attack,
    imp_train,
    lmp_train,
)
from rtk.draw import imp, mask_shape, omp, prunable_layers
from rtk.errors import Interrupted, RtkError
from rtk.identity import claim_folder, config_hash, from_dict, to_dict
from rtk.models import Classifier, ModelSpec, create
from rtk.nn import MaskedConv2d
from rtk.train import CHECKPOINT, Checkpoint, loop

SPEC = ModelSpec("resnet18", "3x3", 0.0625, 3, (0.5,) * 3, (0.25,) * 3)
TRAIN = TrainConfig(epochs=1, batch_size=128, lr=0.05, milestones=(), checkpoint_seconds=1e9)
STILL = dataclasses.replace(TRAIN, epochs=0)
MODULE = sys.modules["rtk.draw.imp"]  # the name in the package is the function's


class OneLayer(Classifier):
    """A first convolution, and one of 64 * 64 * 3 * 3 = 36,864 weights."""

    def __init__(self):
        super().__init__(ModelSpec("one", "3x3", 1.0, 3, (0.5,) * 3, (0.25,) * 3))
        self.first = nn.Conv2d(3, 64, 3)
        self.second = nn.Conv2d(64, 64, 3)
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        return self.fc(self.second(self.first(self.normalise(x)).relu()).mean((2, 3)))


class RandomBatches:
    """Batches of noise, the same in every epoch."""

    def __init__(self, steps=2, device="cpu"):
        self.steps, self.device = steps, device

    def __len__(self):
        return self.steps

    def epoch(self, epoch, start=0):
        for step in range(start, self.steps):
            generator = torch.Generator().manual_seed(step)
            x = torch.rand(8, 3, 8, 8, generator=generator)
            y = torch.randint(3, (8,), generator=generator)
            yield x.to(self.device), y.to(self.device)


def trained_networks(monkeypatch):
    """Record each training: the network's state before it, and the network after it."""
    calls, train = [], MODULE.train

    def spy(network, **loop_options):
        calls.append([{n: t.clone() for n, t in network.state_dict().items()}, None])
        calls[-1][1] = train(network, **loop_options)
        return calls[-1][1]

    monkeypatch.setattr(MODULE, "train", spy)
    return calls


def same(masks, others):
    return masks.keys() == others.keys() and all(torch.equal(masks[n], others[n]) for n in masks)


def pruned(ticket):
    return sum(
        int((~mask).expand(ticket.shapes[name]).sum()) for name, mask in ticket.masks.items()
    )


# What is pruned


@pytest.mark.parametrize("task", ["upstream", "downstream"])
def test_19_rounds_leave_a_fifth_less_each_to_the_weight(task):
    tickets, model = [], OneLayer()
    last = imp(model, RandomBatches(), task=task, config=STILL, on_round=tickets.append)
    assert len(tickets) == 19 and last is tickets[-1]
    peer = copy.deepcopy(model)
    for number, ticket in enumerate(tickets, 1):
        prune.global_unstructured([(peer.second, "weight")], prune.L1Unstructured, amount=0.2)
        kept = 36864 - pruned(ticket)
        assert kept == round(0.8**number * 36864)
        # torch's own rounds, each of which rounds to a whole weight
        assert abs(kept - int(peer.second.weight_mask.sum())) <= 2
        assert ticket.meta["round"] == number
        assert ticket.meta["sparsity"] == pytest.approx(1 - 0.8**number, abs=1e-11)
    assert 36864 - pruned(last) == 531
    assert [t.meta["sparsity"] for t in tickets[:3]] == [0.2, 0.36, 0.488]


def by_hand(layers, before, sparsity, granularity, scope):
    """Walk up each ranking: what is pruned first, then the others by their mean |w|."""
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    masks = {
        n: torch.ones(mask_shape(w, granularity), dtype=torch.bool) for n, w in weights.items()
    }
    for names in [list(weights)] if scope == "global" else [[name] for name in weights]:
        groups = []
        for name in names:
            count = masks[name].numel()
            means = weights[name].abs().reshape(count, -1).mean(1).tolist()
            alive = [True] * count if before is None else before.masks[name].flatten().tolist()
            size = weights[name].numel() // count
            groups += [
                (a, m, name, i, size) for i, (a, m) in enumerate(zip(alive, means, strict=True))
            ]
        target = round(sparsity * sum(weights[name].numel() for name in names))
        done = 0
        for alive, _, name, index, size in sorted(groups, key=lambda group: group[:2]):
            if done >= target and alive:
                break
            masks[name].view(-1)[index] = False
            done += size
    return masks


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("granularity", ["element", "row", "kernel", "channel"])
def test_a_round_prunes_the_smallest_groups_that_are_left(granularity, scope, monkeypatch):
    calls, tickets = trained_networks(monkeypatch), []
    model = create(SPEC)
    imp(
        model,
        RandomBatches(),
        0.7,
        granularity,
        scope,
        rate=0.4,
        config=dataclasses.replace(TRAIN, lr=0.5),
        include_first=True,
        on_round=tickets.append,
    )
    assert len(tickets) == len(calls) == 3
    for before, ticket, (_, network) in zip([None, *tickets], tickets, calls, strict=False):
        layers = prunable_layers(network, include_first=True)
        assert "conv1" in ticket.masks and ticket.granularity == granularity
        sparsity = ticket.meta["sparsity"]
        assert same(ticket.masks, by_hand(layers, before, sparsity, granularity, scope))
        sizes = [
            layer.weight[0].numel() if granularity == "channel" else 9 for layer in layers.values()
        ]
        target = round(sparsity * sum(layer.weight.numel() for layer in layers.values()))
        most = sum(sizes) if scope == "layer" else max(sizes)
        assert target - len(sizes) <= pruned(ticket) < target + most
    for before, after in pairwise(tickets):
        assert not any((after.masks[n] & ~before.masks[n]).any() for n in after.masks)
        assert pruned(after) > pruned(before)
    assert tickets[-1].meta["sparsity"] == 0.7
    assert not same(tickets[-1].masks, omp(model, 0.7, granularity, scope, True).masks)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_blocks(scope, monkeypatch):
    calls, tickets = trained_networks(monkeypatch), []
    imp(
        create(SPEC),
        RandomBatches(),
        granularity="block-4x3",
        scope=scope,
        rounds=3,
        rate=0.5,
        config=TRAIN,
        on_round=tickets.append,
    )
    assert [ticket.granularity for ticket in tickets] == ["block-4x3"] * 3
    for before, ticket, (_, network) in zip([None, *tickets], tickets, calls, strict=False):
        for name, layer in prunable_layers(network).items():
            mask = ticket.masks[name]
            if before is not None:
                assert not (mask & ~before.masks[name]).any()
            if scope == "layer":
                target = round(ticket.meta["sparsity"] * mask.numel())
                assert target <= int((~mask).sum()) < target + 12
            gone = ~mask if before is None else before.masks[name] & ~mask
            if scope == "layer" and gone.any() and mask.any():
                means = layer.weight.detach().abs()
                # of whole tiles the worst that stays is not worse than the best that goes
                tiles = means.shape[0] // 4 * 4, means.shape[1] // 3 * 3
                whole = means[: tiles[0], : tiles[1]].unflatten(0, (-1, 4)).unflatten(2, (-1, 3))
                score = whole.mean((1, 3))
                stays, goes = (m[: tiles[0] : 4, : tiles[1] : 3] for m in (mask, gone))
                if stays.any() and goes.any():
                    assert score[stays].min() >= score[goes].max() - 1e-6


def test_by_element_a_round_is_torchs_pruning_of_what_is_left(monkeypatch):
    """torch's PruningContainer ranks only what its mask keeps."""
    calls, tickets = trained_networks(monkeypatch), []
    imp(create(SPEC), RandomBatches(), rounds=3, config=TRAIN, on_round=tickets.append)
    for before, ticket, (_, network) in zip([None, *tickets], tickets, calls, strict=False):
        plain = create(SPEC)
        layers = prunable_layers(plain)
        for name, layer in layers.items():
            layer.weight.data.copy_(network.get_submodule(name).weight.detach())
        if before is not None:
            before.to_torch_prune(plain)
        more = pruned(ticket) - (0 if before is None else pruned(before))
        parameters = [(layer, "weight") for layer in layers.values()]
        prune.global_unstructured(parameters, prune.L1Unstructured, amount=more)
        assert same(ticket.masks, Ticket.from_torch_prune(plain).masks)


def test_a_weight_that_training_makes_small_is_not_taken_for_a_pruned_one(monkeypatch):
    """Pruned weights are 0; so is one that training drove there, and it must count as left."""

    def train(network, **_):
        with torch.no_grad():
            network.second.weight.zero_()
        return network

    monkeypatch.setattr(MODULE, "train", train)
    tickets = []
    imp(OneLayer(), RandomBatches(), rounds=4, config=TRAIN, on_round=tickets.append)
    for number, ticket in enumerate(tickets, 1):
        assert pruned(ticket) == 36864 - round(0.8**number * 36864)
    assert not any((b.masks["second"] & ~a.masks["second"]).any() for a, b in pairwise(tickets))


# Rewinding, upstream and downstream


@pytest.mark.parametrize("task", ["upstream", "downstream"])
def test_every_round_starts_from_the_pretrained_state(task, monkeypatch):
    calls, tickets, model = trained_networks(monkeypatch), [], create(SPEC)
    model.bn1.running_mean += 0.3
    pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    last = imp(model, RandomBatches(), rounds=3, task=task, config=TRAIN, on_round=tickets.append)
    assert torch.equal(torch.get_rng_state(), generator)
    under = tickets[:-1] if task == "upstream" else [None, *tickets[:-1]]
    assert len(calls) == len(under)
    for ticket, (start, network) in zip(under, calls, strict=True):
        for name, value in pretrained.items():
            mask = None if ticket is None else ticket.masks.get(name.removesuffix(".weight"))
            expected = value if mask is None else value * mask
            assert torch.equal(start[name], expected), name
            assert network.state_dict()[name].isfinite().all()
        assert not torch.equal(start["fc.weight"], network.fc.weight), "it does train"
        assert not torch.equal(start["bn1.running_mean"], network.bn1.running_mean)
    assert all(torch.equal(t, pretrained[n]) for n, t in model.state_dict().items())
    rewound = last.apply(copy.deepcopy(model))
    weight, mask = rewound.layer1[0].conv1.weight, last.masks["layer1.0.conv1"]
    assert isinstance(rewound.layer1[0].conv1, MaskedConv2d)
    assert torch.equal(weight[mask], pretrained["layer1.0.conv1.weight"][mask])


def test_upstream_prunes_before_any_training(tmp_path, monkeypatch):
    calls, tickets, model = trained_networks(monkeypatch), [], create(SPEC)
    options = {"rounds": 2, "config": TRAIN, "on_round": tickets.append}
    imp(model, RandomBatches(), task="upstream", folder=tmp_path, **options)
    assert same(tickets[0].masks, omp(model, 0.2).masks)
    assert len(calls) == 1 and not same(tickets[1].masks, omp(model, 0.36).masks)
    logs = [path.parent.name for path in tmp_path.rglob("metrics.jsonl")]
    assert logs == ["02"]
    tickets.clear()
    imp(model, RandomBatches(), task="downstream", **options)
    assert not same(tickets[0].masks, omp(model, 0.2).masks)
    assert len(calls) == 3


# A-IMP


def test_a_imp_at_eps_0_is_imp():
    def draw_with(attack):
        tickets = []
        options = {"rounds": 3, "config": TRAIN, "on_round": tickets.append}
        imp(create(SPEC), RandomBatches(), attack=attack, **options)
        return tickets

    torch.manual_seed(0)
    natural = draw_with(None)
    torch.manual_seed(0)
    still = draw_with(PGD(eps=0.0, step_size=0.0, steps=2))
    torch.manual_seed(0)
    adversarial = draw_with(PGD(eps=0.2, step_size=0.1, steps=2))
    assert all(same(a.masks, b.masks) for a, b in zip(natural, still, strict=True))
    assert not same(natural[-1].masks, adversarial[-1].masks)
    assert [t.meta["scheme"] for t in (natural[0], still[0])] == ["imp", "a-imp"]


@pytest.mark.gpu
def test_rounds_on_a_gpu_prune_exactly_and_keep_no_memory(monkeypatch):
    """Enough steps for each round's training to be captured in a CUDA graph of its own."""
    model = create(dataclasses.replace(SPEC, width=1.0)).cuda()
    pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls, tickets, memory = trained_networks(monkeypatch), [], []

    def on_round(ticket):
        tickets.append(ticket)
        calls.clear()  # holds the network
        memory.append(torch.cuda.memory_allocated())

    total = sum(layer.weight.numel() for layer in prunable_layers(model).values())
    imp(
        model,
        RandomBatches(8, "cuda"),
        rounds=4,
        attack=PGD(eps=0.1, step_size=0.05, steps=2),
        config=dataclasses.replace(TRAIN, epochs=2),
        on_round=on_round,
    )
    for number, ticket in enumerate(tickets, 1):
        assert pruned(ticket) == round(ticket.meta["sparsity"] * total)
        assert ticket.meta["round"] == number
    assert not any((b.masks[n] & ~a.masks[n]).any() for a, b in pairwise(tickets) for n in b.masks)
    assert all(torch.equal(t, pretrained[n]) for n, t in model.state_dict().items())
    weights = sum(tensor.nbytes for tensor in pretrained.values())
    assert memory[3] - memory[1] < weights


# Stopping and going on


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, one_cpu_thread):
    folder = tmp_path_factory.mktemp("pretrained")
    config = PretrainConfig(
        out=str(folder),
        data=DataConfig("digits[0-1]"),
        model=ModelConfig(width=0.0625),
        train=STILL,
    )
    with one_cpu_thread():
        pretrain.run(config)
    return folder


def configured(folder, pretrained):
    """Three rounds of two steps each, with a checkpoint after every step."""
    return DrawConfig(
        out=str(folder),
        device="cpu",
        checkpoint=str(pretrained),
        scheme="a-imp",
        rounds=3,
        data=DataConfig("digits[2-3]"),
        train=dataclasses.replace(TRAIN, checkpoint_seconds=0.0),
        attack=AttackConfig("pgd", eps=0.1, steps=1),
    )


@pytest.fixture
def config(tmp_path, pretrained):
    return configured(tmp_path / "drawn", pretrained)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, pretrained, one_cpu_thread):
    folder = tmp_path_factory.mktemp("undisturbed")
    with one_cpu_thread():
        draw.run(configured(folder, pretrained))
    return folder


@pytest.fixture
def drawn(config, undisturbed):
    """The folder of `config`, in which everything is done."""
    return Path(shutil.copytree(undisturbed, config.out))


FILES = ["ticket.safetensors", *(f"rounds/{n}/ticket.safetensors" for n in ("01", "02", "03"))]


def tickets_of(folder):
    return [Ticket.load(Path(folder, name)) for name in FILES]


def logs_of(folder):
    """Return the records of all rounds but what depends on the clock."""
    lines = [
        (path.parent.name, json.loads(line))
        for path in sorted(Path(folder).rglob("metrics.jsonl"))
        for line in path.read_text().splitlines()
    ]
    timing = ("seconds", "images_per_second")
    return [(at, {k: v for k, v in r.items() if k not in timing}) for at, r in lines]


def assert_like_undisturbed(folder, undisturbed):
    for mine, theirs in zip(tickets_of(folder), tickets_of(undisturbed), strict=True):
        assert same(mine.masks, theirs.masks)
        # all but the paths, and the hashes that these are part of
        assert mine.meta["lineage"] == theirs.meta["lineage"]
    assert logs_of(folder) == logs_of(undisturbed)
    left = {path.name for path in Path(folder).rglob("*") if path.is_file()}
    left.discard("times.json")  # which the command writes, and the function does not
    assert left == {".lock", "config.yaml", "ticket.safetensors", "metrics.jsonl"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and half-written files stay."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_single_write(config, undisturbed, monkeypatch, after):
    """Each attempt dies before its third write, or after its first.

    So once between a training's last checkpoint and the ticket, and once inside of every training.
    """
    replace, writes, inside = os.replace, [0], set()

    def dying(source, target):
        writes[0] += 1
        if writes[0] == (1 if after else 3):
            if after:
                replace(source, target)
            raise Killed
        replace(source, target)

    kills = 0
    while True:
        writes[0] = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                draw.run(config)
                break
            except Killed:
                kills += 1
                assert kills < 60, "no progress"
        for path in Path(config.out).rglob(CHECKPOINT):
            progress = Checkpoint.load(path).meta["progress"]
            if not progress["finished"]:
                inside.add((path.parent.name, progress["step"]))
    assert kills >= 5
    if after:
        assert inside == {("01", 1), ("02", 1), ("03", 1)}, "after one step of two"
    assert_like_undisturbed(config.out, undisturbed)


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_stopped_by_a_signal_inside_a_round(config, undisturbed, monkeypatch, steps):
    made, count = loop.make_step, [0]

    def make_step(*args, **options):
        inner = made(*args, **options)

        def step(x, y):
            count[0] += 1
            if count[0] == steps:
                loop.signal.raise_signal(loop.signal.SIGINT)
            return inner(x, y)

        return step

    monkeypatch.setattr(loop, "make_step", make_step)
    with pytest.raises(Interrupted, match="the same command goes on"):
        draw.run(config)
    assert len(list(Path(config.out).rglob(CHECKPOINT))) == 1
    draw.run(config)
    assert_like_undisturbed(config.out, undisturbed)


def test_the_command_goes_on_after_sigkill(config, undisturbed, pretrained):
    command = [
        *("draw", "--out", config.out, "--checkpoint", str(pretrained), "--device", "cpu"),
        *("--scheme", "a-imp", "--rounds", "3", "--data.name", "digits[2-3]"),
        *("--train.epochs", "1", "--train.batch_size", "128", "--train.lr", "0.05"),
        *("--train.weight_decay", "1e-4", "--train.milestones", "[]"),
        *("--train.checkpoint_seconds", "0", "--attack.eps", "0.1", "--attack.steps", "1"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "rtk", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.DEVNULL,
    )
    first = Path(config.out, FILES[1])
    while process.poll() is None and not first.exists():
        time.sleep(0.0005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert cli.main(command) == 0
    assert_like_undisturbed(config.out, undisturbed)


def test_a_finished_draw_is_left_as_it_is(config, drawn):
    before = {p: p.stat().st_mtime_ns for p in drawn.rglob("*") if p.is_file()}
    draw.run(config)
    assert {p: p.stat().st_mtime_ns for p in drawn.rglob("*") if p.is_file()} == before
    last, *_, third = tickets_of(drawn)
    assert last.meta == third.meta, "the ticket is the last round's, byte for byte"


def test_a_round_out_of_another_one_is_drawn_anew(config, drawn, undisturbed):
    for name in (FILES[0], FILES[2]):
        Path(drawn, name).unlink()
    second = Ticket.load(Path(drawn, FILES[1]))
    path = Path(drawn, FILES[2])
    dataclasses.replace(second, meta={**second.meta, "round": 2, "previous_sha256": "0"}).save(path)
    draw.run(config)
    assert_like_undisturbed(drawn, undisturbed)


def test_a_damaged_round_is_an_error_and_no_resume_starts_over(config, drawn):
    Path(drawn, FILES[0]).unlink()
    path = Path(drawn, FILES[2])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RtkError, match=r"02/ticket\.safetensors is damaged"):
        draw.run(config)
    first = Ticket.load(Path(drawn, FILES[1]))
    one = dataclasses.replace(config, rounds=1, sparsity=None, resume=False)
    assert same(Ticket.load(draw.run(one)).masks, first.masks)
    assert [p.name for p in Path(drawn, "rounds").iterdir()] == ["01"]
    assert Ticket.load(Path(drawn, FILES[1])).meta["config_hash"] == config_hash(one)


def test_the_library_goes_on_in_a_folder_and_to_more_rounds(tmp_path, monkeypatch):
    torch.manual_seed(1)
    model, options = create(SPEC), {"config": TRAIN, "folder": tmp_path, "seed": 3}
    two = imp(model, RandomBatches(), rounds=2, **options)
    calls, tickets = trained_networks(monkeypatch), []
    four = imp(model, RandomBatches(), rounds=4, on_round=tickets.append, **options)
    assert len(calls) == 2 and tickets[1].meta == two.meta
    whole = imp(model, RandomBatches(), rounds=4, config=TRAIN, seed=3)
    assert same(four.masks, whole.masks)
    imp(model, RandomBatches(), rounds=1, **{**options, "config": STILL})
    assert len(calls) == 7, "other settings do not take the tickets that are there"


# The stage


def test_what_a_round_says_of_itself(config, pretrained, drawn, undisturbed):
    source = Checkpoint.load(pretrained)
    for number, ticket in enumerate(tickets_of(drawn)[1:], 1):
        meta = ticket.meta
        assert meta["source_sha256"] == source.sha256
        assert meta["config"] == {**to_dict(config), "out": str(undisturbed)}
        assert meta["config_hash"] == config_hash(config)
        assert meta["model"] == dataclasses.replace(source.spec, num_classes=2).to_dict()
        assert meta["lineage"] == {
            "scheme": "a-imp-ds",
            "granularity": "element",
            "sparsity": [0.2, 0.36, 0.488][number - 1],
            "actual_sparsity": ticket.sparsity,
            "drawn_on": "digits[2-3]",
            "draw_task": "downstream",
            "draw_attack": "pgd-linf-0.1",
            "draw_round": number,
        }
    assert [record["epoch"] for _, record in logs_of(drawn)] == [1, 1, 1]
    assert all("top1" in record for _, record in logs_of(drawn))


def test_upstream_takes_the_images_and_the_head_of_the_pretraining(config, pretrained, monkeypatch):
    calls = trained_networks(monkeypatch)
    config = dataclasses.replace(
        config, scheme="imp", attack=AttackConfig(), task="upstream", data=DataConfig("")
    )
    ticket = Ticket.load(draw.run(config))
    source = Checkpoint.load(pretrained)
    assert ticket.meta["lineage"]["drawn_on"] == "digits[0-1]"
    assert ticket.meta["lineage"]["draw_task"] == "upstream"
    assert ticket.meta["lineage"]["scheme"] == "imp-us"
    assert ticket.meta["lineage"]["draw_attack"] == "natural"
    assert len(calls) == 2
    for start, _ in calls:
        assert torch.equal(start["fc.weight"], source.tensors["model.fc.weight"])
    first = tickets_of(config.out)[1]
    assert same(first.masks, omp(source.build_model(), 0.2).masks)


def test_upstream_needs_the_classes_of_its_head(config):
    upstream = dataclasses.replace(config, task="upstream")
    with pytest.warns(UserWarning, match="trained on the classes 0, 1; .* has 2, 3"):
        draw.run(dataclasses.replace(upstream, out=f"{config.out}-2", rounds=1, sparsity=None))
    five = dataclasses.replace(upstream, data=DataConfig("digits[0-4]"))
    with pytest.raises(RtkError, match=r"head of 2 classes, digits\[0-4\] has 5; .*downstream"):
        draw.run(five)


def test_downstream_on_the_images_of_the_pretraining_is_said(config):
    config = dataclasses.replace(config, data=DataConfig("digits[0-1]"), rounds=1, sparsity=None)
    with pytest.warns(UserWarning, match="what the network was pretrained on.*--task upstream"):
        draw.run(config)


@pytest.mark.parametrize("scheme", ["lmp", "imp"])
def test_only_networks_that_classify_are_trained(scheme, config):
    options = {"data": DataConfig(), "checkpoint": config.checkpoint}
    with pytest.raises(RtkError, match=f"{scheme} trains networks that classify, .* a Conv2d; .*"):
        draw.schemes.get(scheme)(nn.Conv2d(3, 3, 3), DrawConfig(scheme=scheme, **options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attack": AttackConfig("pdg")}, r"unknown attack 'pdg'.*did you mean 'pgd'"),
        ({"data": DataConfig("digts")}, "unknown data set 'digts'"),
        ({"sparsity": None, "rounds": 80}, "leaves none of the model's groups"),
        ({"checkpoint": "nowhere"}, "checkpoint nowhere/?.* cannot be read"),
    ],
    ids=["attack", "data", "rounds", "checkpoint"],
)
def test_what_cannot_be_drawn_claims_no_folder(change, message, config):
    with pytest.raises(RtkError, match=message):
        draw.run(dataclasses.replace(config, **change))
    assert not Path(config.out).exists()


def test_a_rounds_ticket_is_transferred_and_evaluated(drawn, pretrained, tmp_path):
    transferred = TransferConfig(
        out=str(tmp_path / "t"),
        device="cpu",
        checkpoint=str(pretrained),
        ticket=str(drawn / "rounds" / "02"),
        data=DataConfig("digits[4-5]"),
        train=TRAIN,
    )
    model = Checkpoint.load(transfer.run(transferred)).build_model()
    second = tickets_of(drawn)[2]
    assert same(Ticket.from_model(model).masks, second.masks)
    evaluated = EvaluateConfig(
        out=str(tmp_path / "e"), checkpoint=transferred.out, attack=AttackConfig()
    )
    result = json.loads(evaluate.run(evaluated).read_text())
    assert (result["scheme"], result["sparsity"]) == ("a-imp-ds", 0.36)
    assert (result["draw_task"], result["draw_round"]) == ("downstream", 2)
    assert result["actual_sparsity"] == second.sparsity and result["target"] == "digits[4-5]"


def test_the_command(tmp_path, pretrained, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [
        *("draw", "--out", "d", "--checkpoint", str(pretrained), "--scheme", "imp"),
        *(
            "--sparsity",
            "0.5",
            "--rate",
            "0.3",
            "--granularity",
            "kernel",
            "--include_first",
            "true",
        ),
        *("--train.epochs", "0", "--device", "cpu", "--threads", "1"),
    ]
    assert cli.main(command) == 0
    assert capsys.readouterr().out == "d/ticket.safetensors\n"
    ticket = Ticket.load("d/ticket.safetensors")
    assert ticket.granularity == "kernel" and "conv1" in ticket.masks
    assert ticket.meta["round"] == 2 and ticket.sparsity == pytest.approx(0.5, abs=1e-3)
    stored = yaml.safe_load(Path("d/config.yaml").read_text())
    assert (stored["task"], stored["rounds"], stored["train"]["lr"]) == ("upstream", 2, 1e-4)
    assert cli.main(["draw", "--config", "d/config.yaml"]) == 0
    assert cli.main([*command, "--rounds", "7"]) == 2
    assert "sparsity 0.5 is reached in 2 rounds" in capsys.readouterr().err


# Settings


def test_the_protocols_are_the_papers():
    us, ds = (
        DrawConfig(scheme="a-imp", task=t, data=DataConfig()) for t in ("upstream", "downstream")
    )
    assert us.train == imp_train("upstream") and ds.train == imp_train("downstream")
    assert (us.train.epochs, us.train.lr, us.train.schedule) == (10, 1e-4, "constant")
    assert (ds.train.epochs, ds.train.lr, ds.train.weight_decay) == (182, 0.1, 2e-4)
    assert (ds.train.milestones, ds.train.gamma, ds.train.batch_size) == ((91, 136), 0.1, 256)
    doublewin = imp_train("upstream", "doublewin2022")
    assert (doublewin.epochs, doublewin.lr) == (30, 5e-4)
    for config, steps, step_size in ((us, 3, 2 / 3 * 8 / 255), (ds, 10, 2 / 255)):
        attack = config.attack
        assert (attack.name, attack.norm, attack.eps, attack.steps) == (
            "pgd",
            "linf",
            8 / 255,
            steps,
        )
        assert attack.resolved_step_size == pytest.approx(step_size) and attack.random_start
        assert (config.rounds, config.rate, config.scope) == (19, 0.2, "global")
        assert config.sparsity == pytest.approx(1 - 0.8**19)
    assert imp_attack("upstream") == us.attack


@pytest.mark.parametrize(
    ("asked", "resolved"),
    [
        ((None, None, 0.2), (0.985588481192, 19)),
        ((None, 2, 0.2), (0.36, 2)),
        ((0.36, None, 0.2), (0.36, 2)),
        ((0.37, None, 0.2), (0.37, 3)),
        ((0.1, None, 0.2), (0.1, 1)),
        ((0.5, 4, 0.2), (0.5, 4)),
        ((0.9, None, 0.5), (0.9, 4)),
    ],
)
def test_rounds_and_sparsity(asked, resolved):
    assert check_rounds(*asked) == pytest.approx(resolved, abs=1e-9)


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.9])
def test_a_number_of_rounds_and_its_sparsity_are_one_setting(rate):
    for rounds in range(1, 12):
        sparsity, _ = check_rounds(None, rounds, rate)
        assert check_rounds(sparsity, None, rate) == (sparsity, rounds)
        assert check_rounds(sparsity, rounds, rate) == (sparsity, rounds)


@pytest.mark.parametrize("scheme", ["imp", "a-imp"])
def test_a_stored_configuration_comes_back(scheme):
    config = DrawConfig(scheme=scheme, data=DataConfig("digits[2-3]"), sparsity=0.9)
    values = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    assert from_dict(DrawConfig, values) == config
    assert dataclasses.replace(config) == config
    partly = {"scheme": scheme, "data": {"name": "digits[2-3]"}, "sparsity": 0.9, "train": {}}
    assert from_dict(DrawConfig, partly) == config


def test_imp_with_an_attack_is_a_imp():
    config = DrawConfig(scheme="imp", attack=imp_attack("upstream"))
    assert config == DrawConfig(scheme="a-imp") and config.scheme == "a-imp"
    assert config_hash(config) != config_hash(DrawConfig(scheme="imp"))


def test_settings_of_imp_leave_other_draws_what_they_were(tmp_path):
    config = DrawConfig(out=str(tmp_path), sparsity=0.9)
    assert config.train == DrawConfig(scheme="lmp", data=DataConfig()).train == lmp_train()
    claim_folder(config)
    path = tmp_path / "config.yaml"
    values = yaml.safe_load(path.read_text())
    older = {k: v for k, v in values.items() if k not in ("task", "rounds", "rate", "attack")}
    path.write_text(yaml.safe_dump(older))
    claim_folder(config)
    assert config_hash(DrawConfig()) == "0bc82881558f", "as before there was imp"
    with pytest.raises(RtkError, match=r"scheme is 'omp' there and 'imp' here"):
        claim_folder(dataclasses.replace(config, scheme="imp"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 0.9, "rounds": 3}, "sparsity 0.9 is reached in 11 rounds .*got rounds 3"),
        ({"sparsity": 0.0}, "sparsity: expected more than 0"),
        ({"sparsity": 1.0}, r"sparsity: expected .* in \[0, 1\)"),
        ({"rounds": 0}, "rounds: expected at least 1 round of pruning, got 0"),
        ({"rounds": 500}, "rounds: expected so few of rate 0.2 that weights remain, got 500"),
        ({"rate": 0.0}, r"rate: expected .* in \(0, 1\), got 0\.0"),
        ({"rate": 1.0}, r"rate: expected .* in \(0, 1\), got 1\.0"),
        ({"rate": float("nan")}, "rate: expected"),
        ({"granularity": "2:4"}, "granularity: expected .* or a block for imp, got '2:4'"),
        ({"task": "downstream"}, "data.name: expected the images that imp trains on downstream"),
        ({"task": "downsteam"}, "unknown task 'downsteam'.*did you mean 'downstream'"),
        ({"attack": AttackConfig("pgd", early_stop=True)}, "attack.early_stop: expected false"),
        ({"scheme": "a-imp", "attack": AttackConfig(eps=0.1)}, "attack.name: expected an attack"),
        ({"scheme": "omp", "rounds": 3}, "rounds is a setting of imp, got 3 beside scheme omp"),
        ({"scheme": "omp", "rate": 0.2}, "rate is a setting of imp, got 0.2"),
        ({"scheme": "lmp", "task": "upstream"}, "task is a setting of imp, got 'upstream'"),
        ({"scheme": "omp", "attack": AttackConfig("pgd")}, r"attack.name is a setting of imp, got"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(RtkError, match=message):
        DrawConfig(**{"scheme": "imp", **values})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "2:4"}, "2:4 is one sparsity and has no rounds"),
        ({"granularity": "rows"}, "unknown granularity 'rows'"),
        ({"scope": "layers"}, "unknown scope 'layers'"),
        ({"task": "up"}, "unknown task 'up'"),
        ({"rounds": 3, "sparsity": 0.9}, "give one of them"),
        ({"rounds": 80}, "leaves none of the model's groups"),
        ({"rounds": 19, "granularity": "block-1000"}, "leaves none of the model's groups"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_settings_of_the_function(options, message):
    with pytest.raises(RtkError, match=message):
        imp(OneLayer(), RandomBatches(), config=STILL, **options)


def test_bad_models():
    model = create(SPEC)
    with pytest.raises(RtkError, match=r"'layer1\.0\.conv1' is masked already; .*rtk\.nn\.fold"):
        imp(omp(model, 0.5).apply(copy.deepcopy(model)), RandomBatches(), config=STILL)
    with pytest.raises(RtkError, match=r"the model has no spec, .*within=ticket"):
        imp(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), RandomBatches(), config=STILL)
    model.layer2[0].conv1.weight.data[0] = torch.nan
    with pytest.raises(RtkError, match=r"imp: the weight of 'layer2\.0\.conv1' holds NaN"):
        imp(model, RandomBatches(), config=STILL)


def test_a_training_that_diverges_leaves_the_rounds_before(tmp_path):
    model = create(SPEC)
    wild = dataclasses.replace(TRAIN, lr=1e30, epochs=3)
    options = {"task": "upstream", "folder": tmp_path, "rounds": 3}
    with pytest.raises(RtkError, match="became NaN or infinite"):
        imp(model, RandomBatches(), config=wild, **options)
    assert [p.parent.name for p in tmp_path.rglob("ticket.safetensors")] == ["01"]


def test_images_that_a_checkpoint_does_not_name(pretrained):
    checkpoint = Checkpoint.load(pretrained)
    own = checkpoint.images(DataConfig("", image_size=16))
    assert own == DataConfig("digits[0-1]", image_size=16)
    assert checkpoint.images(DataConfig("cifar10")) == DataConfig("cifar10")
    assert data.load(own).image_size == 16
    without = dataclasses.replace(checkpoint, meta={})
    with pytest.raises(RtkError, match=r"does not say what it was trained on; .*--data\.name"):
        without.images(DataConfig(""))
