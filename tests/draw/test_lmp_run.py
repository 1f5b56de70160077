"""lmp in the training loop, and as a stage: resuming, files, lineage."""

import dataclasses
import json

import pytest
import torch

from rtk import Ticket, artifact, cli, data, draw, evaluate
from rtk.config import DataConfig, DrawConfig, EvaluateConfig, TrainConfig
from rtk.draw import lmp
from rtk.errors import Interrupted, RtkError
from rtk.models import replace_head
from rtk.train import Checkpoint, loop

TRAIN = TrainConfig(
    epochs=2, batch_size=32, lr=0.1, weight_decay=5e-4, milestones=(1,), checkpoint_seconds=1e9
)


@pytest.fixture
def config(tmp_path, pretrained):
    return DrawConfig(
        out=str(tmp_path / "ticket"),
        checkpoint=str(pretrained),
        scheme="lmp",
        sparsity=0.5,
        data=DataConfig("digits[5-7]"),
        train=TRAIN,
    )


def stop_after(monkeypatch, steps):
    """Make the loop stop as by SIGTERM after so many steps."""
    made = loop.make_step

    def make_step(*args, **kwargs):
        inner, count = made(*args, **kwargs), [0]

        def step(x, y):
            count[0] += 1
            if count[0] == steps:
                loop.signal.raise_signal(loop.signal.SIGTERM)
            return inner(x, y)

        return step

    monkeypatch.setattr(loop, "make_step", make_step)


@pytest.mark.parametrize(
    ("granularity", "steps"), [("element", 3), ("element", 17), ("block-8", 9)]
)
def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path, monkeypatch, granularity, steps):
    config = dataclasses.replace(config, granularity=granularity, save_scores=True)
    whole = draw.run(config)
    other = dataclasses.replace(config, out=str(tmp_path / "again"))
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        with pytest.raises(Interrupted, match="the same command goes on"):
            draw.run(other)
    half = Checkpoint.load(other.out)
    assert not half.meta["progress"]["finished"] and "optimizer.0.scores" in half.tensors
    resumed = draw.run(other)
    one, two = Ticket.load(whole), Ticket.load(resumed)
    assert one.masks.keys() == two.masks.keys()
    assert all(torch.equal(mask, two.masks[name]) for name, mask in one.masks.items())
    for name in ("scores", "checkpoint"):
        a, b = (
            artifact.load(path.parent / f"{name}.safetensors", name)[0] for path in (whole, resumed)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a if key != "rng.cuda")


def test_the_checkpoint_is_the_network_under_the_ticket(config, pretrained, tmp_path):
    ticket = Ticket.load(draw.run(config))
    source = Checkpoint.load(pretrained)
    learned = Checkpoint.load(config.out).require_finished()
    assert not learned.section("optimizer")
    before = source.section("model")
    for name, mask in ticket.masks.items():
        assert torch.equal(learned.tensors[f"model.{name}.weight"], before[f"{name}.weight"])
        assert torch.equal(learned.tensors[f"model.{name}.mask"], mask)
        assert mask.sum() == mask.numel() - round(0.5 * mask.numel())
    assert torch.equal(learned.tensors["model.bn1.weight"], before["bn1.weight"])
    assert not torch.equal(learned.tensors["model.bn1.running_mean"], before["bn1.running_mean"])
    assert learned.tensors["model.fc.weight"].shape[0] == 3
    lineage = learned.lineage
    assert (lineage["scheme"], lineage["granularity"], lineage["sparsity"]) == (
        "lmp",
        "element",
        0.5,
    )
    assert (lineage["target"], lineage["transfer"]) == ("digits[5-7]", "lmp")
    assert lineage["actual_sparsity"] == ticket.sparsity
    assert ticket.meta["lineage"]["drawn_on"] == "digits[5-7]"
    assert ticket.meta["source_sha256"] == source.sha256 and ticket.meta["scope"] == "layer"
    out = str(tmp_path / "evaluated")
    result = json.loads(evaluate.run(EvaluateConfig(out=out, checkpoint=config.out)).read_text())
    last = json.loads((tmp_path / "ticket/metrics.jsonl").read_text().splitlines()[-1])
    assert result["top1"] == last["top1"] and last["epoch"] == 2
    assert result["scheme"] == "lmp"


def test_a_finished_run_is_left_as_it_is(config):
    path = draw.run(config)
    ticket = Ticket.load(path)
    written = path.stat().st_mtime_ns
    assert draw.run(config) == path and path.stat().st_mtime_ns == written
    path.unlink()  # as of a process that died before it wrote the ticket
    again = Ticket.load(draw.run(config))
    assert all(torch.equal(mask, again.masks[name]) for name, mask in ticket.masks.items())
    with pytest.raises(RtkError, match="finished without keeping its scores"):
        lmp_on(config, save_scores=True)


def lmp_on(config, **options):
    checkpoint = Checkpoint.load(config.checkpoint)
    dataset = data.load(config.data)
    model = checkpoint.build_model()
    replace_head(model, 3, generator=torch.Generator().manual_seed(0))
    stored = Checkpoint.load(config.out).meta
    batches = data.Batches(dataset.train, 32, shuffle=True, drop_last=True)
    return lmp(model, batches, 0.5, config=TRAIN, folder=config.out, meta=stored, **options)


def test_lmp_without_a_folder(pretrained):
    dataset = data.load(DataConfig("digits[5-7]"))
    model = replace_head(Checkpoint.load(pretrained).build_model(), 3)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "fc" not in n}
    batches = data.Batches(dataset.train, 32, shuffle=True, drop_last=True)
    config = dataclasses.replace(TRAIN, epochs=1)
    ticket = lmp(model, batches, 0.9, "channel", config=config, score_init="kaiming")
    assert ticket.granularity == "channel" and ticket.sparsity >= 0.8
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    ticket.apply(model)
    with pytest.raises(RtkError, match="save_scores needs a folder"):
        lmp(model, batches, 0.9, save_scores=True)
    with pytest.raises(RtkError, match="has no spec"):
        lmp(torch.nn.Conv2d(3, 3, 3), batches, 0.9)


def test_settings():
    with pytest.raises(RtkError, match=r"data\.name: expected the images that lmp"):
        DrawConfig(scheme="lmp")
    with pytest.raises(RtkError, match="granularity: expected element"):
        DrawConfig(scheme="lmp", granularity="2:4", data=DataConfig())
    with pytest.raises(RtkError, match="unknown score_init"):
        DrawConfig(score_init="random")
    assert DrawConfig(scheme="lmp", data=DataConfig()).scope == "layer"
    assert DrawConfig().scope == "global"


def test_the_command(tmp_path, pretrained, capsys):
    code = cli.main(
        [
            *["draw", "--out", str(tmp_path / "d"), "--checkpoint", str(pretrained)],
            *["--scheme", "lmp", "--sparsity", "0.9", "--granularity", "row", "--threads", "1"],
            *["--data.name", "digits[5-6]", "--train.epochs", "1", "--device", "cpu"],
        ]
    )
    assert code == 0
    ticket = Ticket.load(capsys.readouterr().out.strip())
    assert ticket.meta["scheme"] == "lmp" and ticket.granularity == "row"
    config = tmp_path / "d/config.yaml"
    assert "scheme: lmp" in config.read_text()
    assert cli.main(["draw", "--config", str(config)]) == 0
