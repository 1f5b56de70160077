"""The stage: what it leaves, when it does nothing, and its command."""

import pytest
import torch
from torch.nn.utils import prune

from rtk import convert, draw
from rtk.cli import main
from rtk.config import ConvertConfig, DrawConfig
from rtk.convert.naming import pretrain_label
from rtk.errors import RtkError
from rtk.runs import read_json
from rtk.ticket import TICKET, Ticket
from rtk.train import CHECKPOINT, Checkpoint


@pytest.fixture
def pruned_file(peer, tmp_path):
    for name in ("layer1.0.conv1", "layer2.0.conv2"):
        prune.l1_unstructured(peer.network.get_submodule(name), "weight", amount=0.5)
    torch.save(peer.state, tmp_path / "pruned.pth")
    return tmp_path / "pruned.pth"


def test_a_second_call_does_nothing_and_a_killed_one_goes_on(pruned_file, tmp_path):
    config = ConvertConfig(out=str(tmp_path / "out"), file=str(pruned_file))
    path = convert.run(config)
    made = path.stat().st_mtime_ns, Ticket.load(path.parent / TICKET).meta["sha256"]
    convert.run(config)
    assert path.stat().st_mtime_ns == made[0]
    (path.parent / TICKET).unlink()  # as if killed between the two files
    convert.run(config)
    assert Ticket.load(path.parent / TICKET).meta["sha256"] == made[1]
    sha256 = Checkpoint.load(path).sha256
    pruned_file.write_bytes(pruned_file.read_bytes() + b"\0")  # another file of the same name
    convert.run(config)
    assert Checkpoint.load(path).meta["source_sha256"] != sha256
    assert Checkpoint.load(path).sha256 != sha256


def test_the_next_stages_take_it(peer, tmp_path):
    torch.save(peer.state, tmp_path / "net.pth")
    convert.run(ConvertConfig(out=str(tmp_path / "net"), file=str(tmp_path / "net.pth")))
    draw.run(
        DrawConfig(out=str(tmp_path / "ticket"), checkpoint=str(tmp_path / "net"), device="cpu")
    )
    assert Ticket.load(tmp_path / "ticket" / TICKET).sparsity == pytest.approx(0.8, abs=1e-4)


def test_the_command(pruned_file, tmp_path, capsys):
    out = tmp_path / "out"
    words = f"convert {pruned_file} --out {out} --mean [0.1,0.2,0.3] --std [0.4,0.5,0.6]".split()
    assert main([*words, "--source", "birds", "--pretrain", "pgd-l2-3", "--trust"]) == 0
    printed, said = capsys.readouterr()
    assert printed == f"{out / CHECKPOINT}\n"
    assert f"{pruned_file}: prune checkpoint of resnet18, stem 7x7, 7 classes" in said
    assert "normaliser: mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6), as asked for" in said
    assert f"{out / TICKET}: 2 layers, 50.00% pruned" in said
    lineage = Checkpoint.load(out).lineage
    assert (lineage["source"], lineage["pretrain"], lineage["robust"]) == (
        "birds",
        "pgd-l2-3",
        True,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--format robustnes", "did you mean 'robustness'?"),
        ("--arch resnet19", "unknown model 'resnet19'"),
        ("--sparsity 0.5", "expected none for"),
        ("--sparsity 1.5", "sparsity: expected a fraction of zeros in [0, 1)"),
        ("--mean [0.1,0.2] --std [1,1,1]", "mean: expected 3 numbers, e.g. [0.5,0.5,0.5]"),
        ("--mean 0.5 --std [1,1,1]", "mean: expected null or a list"),
        ("--mean [0.1,0.2,0.3]", "mean, std: expected both or neither"),
        ("--std [0,1,1] --mean [0,0,0]", "std: expected 3 positive numbers"),
    ],
)
def test_bad_settings(options, words, pruned_file, tmp_path, capsys):
    command = f"convert {pruned_file} --out {tmp_path / 'out'} {options}"
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_settings_is_refused(pruned_file, tmp_path):
    convert.run(ConvertConfig(out=str(tmp_path / "out"), file=str(pruned_file)))
    with pytest.raises(RtkError, match="holds a run with other settings"):
        convert.run(ConvertConfig(out=str(tmp_path / "out"), file=str(pruned_file), source="birds"))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("resnet50_l2_eps3.ckpt", "pgd-l2-3"),
        ("resnet18_l2_eps0.05.ckpt", "pgd-l2-0.05"),
        ("resnet50_linf_eps4.0.ckpt", "pgd-linf-0.01569"),  # 4/255, as AttackConfig's label
        ("resnet50_l2_eps0.ckpt", "natural"),
        ("imagenet/resnet50/noise_0.25/checkpoint.pth.tar", "smoothing-0.25"),
        ("resnet50/noise_0.00/checkpoint.pth.tar", "natural"),
        ("resnet50-19c8e357.pth", None),
    ],
)
def test_labels_that_names_tell(name, label, tmp_path):
    assert pretrain_label(tmp_path / name) == label


def test_its_configuration_is_a_file(pruned_file, tmp_path):
    convert.run(ConvertConfig(out=str(tmp_path / "out"), file=str(pruned_file)))
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert text.startswith("# ConvertConfig, hash ") and "pruned.pth" in text
    with pytest.raises(RtkError):
        read_json(tmp_path / "out" / "result.json")
