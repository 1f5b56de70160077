import dataclasses
import json
import signal

import pytest
import torch
import torch.nn.functional as F

from rtk.attacks import PGD
from rtk.data import Batches
from rtk.draw import omp
from rtk.errors import Interrupted, RtkError
from rtk.train import CHECKPOINT, Checkpoint, accuracy, learning_rate, make_step, train
from rtk.train.checkpoint import save_checkpoint

META = {"config_hash": "0123456789ab"}


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def numbers(folder):
    """Return what a log says of the training, but for how long it took."""
    timing = ("seconds", "images_per_second")
    return [{k: v for k, v in r.items() if k not in timing} for r in records(folder)]


def tensors(folder):
    return Checkpoint.load(folder).tensors


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


class Signals:
    """An attack that changes nothing but sends signals to its own process at one call."""

    def __init__(self, call, *signals):
        self.call = call
        self.signals = signals
        self.calls = 0

    def __call__(self, model, x, y):
        self.calls += 1
        if self.calls == self.call:
            for number in self.signals:
                signal.raise_signal(number)
        return x


def test_the_loop_is_the_hand_written_one_bit_for_bit(tmp_path, make_model, batches, config):
    torch.manual_seed(7)
    attack = PGD(eps=0.05, steps=2)
    ours = train(make_model(), batches, config, folder=tmp_path, meta=META, attack=attack)

    torch.manual_seed(7)
    theirs = make_model()
    optimizer = torch.optim.SGD(theirs.parameters(), config.lr, momentum=0.9, weight_decay=1e-4)
    expected = []
    for epoch in range(3):
        theirs.train()
        losses = []
        for step, (x, y) in enumerate(batches.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = learning_rate(config, epoch + step / 3)
            loss = F.cross_entropy(theirs(attack(theirs, x, y)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        expected.append(
            {
                "epoch": epoch + 1,
                "loss": sum(losses) / 3,
                "lr": learning_rate(config, epoch + 2 / 3),
            }
        )
    assert equal(ours.state_dict(), theirs.state_dict())
    assert numbers(tmp_path) == expected
    assert equal(ours.state_dict(), Checkpoint.load(tmp_path).section("model"))


def test_no_epochs_save_the_model_as_it_is(tmp_path, make_model, batches, config):
    config = dataclasses.replace(config, epochs=0)
    train(make_model(), batches, config, folder=tmp_path, meta=META)
    assert equal(make_model().state_dict(), Checkpoint.load(tmp_path).section("model"))
    assert Checkpoint.load(tmp_path).require_finished()
    assert records(tmp_path) == []


@pytest.mark.parametrize(("every", "epochs"), [(0, [3]), (1, [1, 2, 3]), (2, [2, 3])])
def test_the_test_images_are_looked_at_when_asked(
    tmp_path, make_model, batches, config, every, epochs
):
    config = dataclasses.replace(config, eval_every=every)
    looks = iter(range(9))
    train(
        make_model(),
        batches,
        config,
        folder=tmp_path,
        meta=META,
        evaluate=lambda model: {"top1": next(looks)},
    )
    found = {r["epoch"]: r["top1"] for r in records(tmp_path) if "top1" in r}
    assert found == {epoch: i for i, epoch in enumerate(epochs)}


def test_looking_at_test_images_changes_nothing(tmp_path, make_model, batches, split, config):
    config = dataclasses.replace(config, eval_every=1)
    test = Batches(split, 10)
    for name, evaluate in (
        ("plain", None),
        ("looking", lambda m: {"top1": accuracy(m, test).top1}),
    ):
        (tmp_path / name).mkdir()
        train(make_model(), batches, config, folder=tmp_path / name, meta=META, evaluate=evaluate)
    assert equal(tensors(tmp_path / "plain"), tensors(tmp_path / "looking"))


def test_pruned_weights_stay_exactly_zero(tmp_path, make_model, batches, config):
    config = dataclasses.replace(config, lr=0.5, weight_decay=0.1, momentum=0.95, nesterov=True)
    model = make_model()
    ticket = omp(model, 0.7, "kernel")
    ticket.apply(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, batches, config, folder=tmp_path, meta=META)
    for name, mask in ticket.masks.items():
        weight = model.get_submodule(name).weight
        assert (weight[~mask.expand_as(weight)] == 0).all(), name
        assert not torch.equal(weight, before[f"{name}.weight"]), name


def test_frozen_parameters_stay(tmp_path, make_model, batches, config):
    model = make_model()
    model.layer1.requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    train(model, batches, config, folder=tmp_path, meta=META)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("layer1."), name


@pytest.mark.parametrize("at", [1, 3, 5], ids=["first_step", "mid_epoch_1", "mid_epoch_2"])
def test_a_nan_loss_stops_and_leaves_the_last_good_checkpoint(
    tmp_path, make_model, batches, config, at, monkeypatch
):
    monkeypatch.setattr("rtk.train.loop._SHORT", 0.0)  # a checkpoint after every epoch
    calls = iter(range(1, 100))

    def attack(model, x, y):
        return x * torch.nan if next(calls) == at else x

    with pytest.raises(RtkError, match="NaN or infinite in epoch") as caught:
        train(make_model(), batches, config, folder=tmp_path, meta=META, attack=attack)
    epoch, step = divmod(at - 1, 3)
    assert f"in epoch {epoch + 1}, step {step + 1}" in str(caught.value)
    if epoch == 0:
        assert "nothing was saved yet" in str(caught.value)
        assert not (tmp_path / CHECKPOINT).exists()
    else:
        assert str(tmp_path / CHECKPOINT) in str(caught.value)
        checkpoint = Checkpoint.load(tmp_path)
        assert checkpoint.meta["progress"]["epoch"] == epoch
        assert all(t.isfinite().all() for t in checkpoint.section("model").values())


def test_a_step_that_ruins_the_weights_is_not_saved(tmp_path, make_model, split, config):
    """The loss of a step is computed before it: at the end of an epoch it is still finite."""
    config = dataclasses.replace(
        config, lr=3e38, weight_decay=100.0, schedule="constant", warmup_epochs=0.0, epochs=1
    )
    with pytest.raises(RtkError, match="a weight became NaN or infinite in epoch 1, step 1"):
        train(make_model(), Batches(split, 24), config, folder=tmp_path, meta=META)
    assert not (tmp_path / CHECKPOINT).exists()
    assert records(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "call", "epoch", "step"),
    [
        pytest.param(signal.SIGINT, 1, 0, 1, id="SIGINT-first_step"),
        pytest.param(signal.SIGINT, 3, 1, 0, id="SIGINT-epoch_end"),
        pytest.param(signal.SIGTERM, 5, 1, 2, id="SIGTERM-mid_epoch"),
        pytest.param(signal.SIGINT, 9, 3, 0, id="SIGINT-last_step"),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(
    tmp_path, make_model, batches, config, number, call, epoch, step
):
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    undisturbed.mkdir()
    stopped.mkdir()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(make_model(), batches, config, folder=undisturbed, meta=META)
    with pytest.raises(Interrupted, match=f"stopped at epoch {epoch}, step {step}; saved"):
        train(
            make_model(),
            batches,
            config,
            folder=stopped,
            meta=META,
            attack=Signals(call, number),
        )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    torch.manual_seed(1234)
    train(make_model(), batches, config, folder=stopped, meta=META)
    assert equal(
        Checkpoint.load(stopped).section("model"), Checkpoint.load(undisturbed).section("model")
    )
    assert equal(
        Checkpoint.load(stopped).section("optimizer"),
        Checkpoint.load(undisturbed).section("optimizer"),
    )
    assert numbers(stopped) == numbers(undisturbed)
    assert Checkpoint.load(stopped).meta == Checkpoint.load(undisturbed).meta


def test_two_kinds_of_signal_are_one_request(tmp_path, make_model, batches, config):
    """As when Ctrl-C reaches a process from the terminal and from the process above it."""
    attack = Signals(2, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped at epoch 0, step 2"):
        train(make_model(), batches, config, folder=tmp_path, meta=META, attack=attack)
    assert Checkpoint.load(tmp_path).meta["progress"]["step"] == 2


def test_asked_twice_it_stops_at_once(tmp_path, make_model, batches, config):
    attack = Signals(2, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(make_model(), batches, config, folder=tmp_path, meta=META, attack=attack)
    assert attack.calls == 2
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize(("seconds", "written"), [(0.0, 3), (3600.0, 1)], ids=["long", "short"])
def test_a_checkpoint_follows_long_epochs_and_the_last(
    tmp_path, make_model, batches, config, seconds, written, monkeypatch
):
    """Writing one takes as long as an epoch on a small set; the numbers are the same."""
    monkeypatch.setattr("rtk.train.loop._SHORT", seconds)
    saved = []
    monkeypatch.setattr(
        "rtk.train.loop.save_checkpoint",
        lambda *arguments: saved.append(arguments[-1]["progress"]) or save_checkpoint(*arguments),
    )
    train(make_model(), batches, dataclasses.replace(config, epochs=3), folder=tmp_path, meta=META)
    assert len(saved) == written and saved[-1]["finished"]
    assert [record["epoch"] for record in records(tmp_path)] == [1, 2, 3]


def test_checkpoints_are_written_inside_an_epoch(tmp_path, make_model, batches, config):
    seen = []

    def attack(model, x, y):
        if (tmp_path / CHECKPOINT).exists():
            progress = Checkpoint.load(tmp_path).meta["progress"]
            seen.append((progress["epoch"], progress["step"]))
        return x

    config = dataclasses.replace(config, checkpoint_seconds=0.0, epochs=2)
    train(make_model(), batches, config, folder=tmp_path, meta=META, attack=attack)
    assert seen == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path, make_model, batches, config):
    """As after a SIGKILL between a record and its checkpoint, in the middle of a line."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    undisturbed.mkdir()
    killed.mkdir()
    train(make_model(), batches, config, folder=undisturbed, meta=META)
    with pytest.raises(Interrupted):
        attack = Signals(3, signal.SIGINT)
        train(make_model(), batches, config, folder=killed, meta=META, attack=attack)
    with (killed / "metrics.jsonl").open("a") as log:
        log.write('{"epoch": 2, "loss": 99.0, "lr": 1.0}\n{"epoch": 3, "lo')
    train(make_model(), batches, config, folder=killed, meta=META)
    assert numbers(killed) == numbers(undisturbed)


def test_a_finished_run_is_left_as_it_is(tmp_path, make_model, batches, config):
    train(make_model(), batches, config, folder=tmp_path, meta=META)
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    steps = Signals(0)
    model = train(make_model(), batches, config, folder=tmp_path, meta=META, attack=steps)
    assert steps.calls == 0
    assert {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before
    assert equal(model.state_dict(), Checkpoint.load(tmp_path).section("model"))


def test_without_resume_it_starts_over(tmp_path, make_model, batches, config):
    train(make_model(), batches, config, folder=tmp_path, meta=META)
    weights, log = Checkpoint.load(tmp_path).section("model"), numbers(tmp_path)
    steps = Signals(0)
    train(make_model(), batches, config, folder=tmp_path, meta=META, attack=steps, resume=False)
    assert steps.calls == 9
    assert numbers(tmp_path) == log
    assert equal(Checkpoint.load(tmp_path).section("model"), weights)


def test_starting_over_drops_the_old_checkpoint_at_once(tmp_path, make_model, batches, config):
    """Killed before its first checkpoint, it must not leave the old one without its log."""
    train(make_model(), batches, config, folder=tmp_path, meta=META)

    def attack(model, x, y):
        raise MemoryError

    with pytest.raises(MemoryError):
        train(
            make_model(), batches, config, folder=tmp_path, meta=META, attack=attack, resume=False
        )
    assert not (tmp_path / CHECKPOINT).exists()
    assert records(tmp_path) == []


@pytest.mark.parametrize("key", ["config_hash", "source_sha256", "ticket_sha256"])
def test_a_checkpoint_made_of_something_else_is_refused(tmp_path, make_model, batches, config, key):
    train(make_model(), batches, config, folder=tmp_path, meta=META)
    with pytest.raises(RtkError, match=f"{key} differs.*--no_resume"):
        train(make_model(), batches, config, folder=tmp_path, meta={**META, key: "other"})


def test_a_part_of_the_model_can_be_trained(tmp_path, make_model, config):
    model = make_model()
    features = torch.rand(8, model.fc.in_features)
    labels = torch.arange(8) % 3

    class Features:
        def __len__(self):
            return 1

        def epoch(self, epoch, start=0):
            yield features, labels

    head = make_model().fc.train()
    step = make_step(
        head, torch.optim.SGD(head.parameters(), 0.05, 0.9, weight_decay=1e-4), amp=None
    )
    config = dataclasses.replace(config, schedule="constant", warmup_epochs=0.0)
    for _ in range(3):
        step(features, labels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(False).fc.requires_grad_(True)
    train(
        model,
        Features(),
        config,
        folder=tmp_path,
        meta=META,
        network=model.fc,
        set_mode=torch.nn.Module.eval,
    )
    for name, tensor in model.state_dict().items():
        expected = head.state_dict()[name[3:]] if name.startswith("fc.") else before[name]
        assert torch.equal(tensor, expected), name
