"""The command line as a user meets it, in this process: `main(argv)` and what it prints."""

import dataclasses
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import docstring_parser
import numpy as np
import pytest
import torch
import yaml

import rtk
from rtk import cli, draw, pretrain, recipes
from rtk.cli import main
from rtk.config import (
    AttackConfig,
    DataConfig,
    DrawConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    StageConfig,
    TrainConfig,
    TransferConfig,
)
from rtk.errors import Interrupted, RtkError
from rtk.identity import from_dict, to_dict
from rtk.recipes import Recipe
from rtk.train import CHECKPOINT, Checkpoint, save_checkpoint

TINY = "--data.name digits[0-1] --model.width 0.0625 --train.epochs 0"
STAGES = {
    "pretrain": PretrainConfig,
    "draw": DrawConfig,
    "transfer": TransferConfig,
    "evaluate": EvaluateConfig,
}


def make_pretrained(out, **model):
    config = PretrainConfig(
        out=out,
        data=DataConfig("digits[0-1]"),
        model=ModelConfig(**{"width": 0.0625, **model}),
        train=TrainConfig(epochs=0),
    )
    pretrain.run(config)


@pytest.fixture(scope="module")
def site(tmp_path_factory, one_cpu_thread):
    """A folder with a pretrained network, tickets of it and of others, and broken files."""
    site = tmp_path_factory.mktemp("site")
    with one_cpu_thread(), chdir(site):
        make_pretrained("net")
        draw.run(DrawConfig(out="ticket", checkpoint="net"))
        for name, model in (
            ("arch", {"arch": "resnet50"}),
            ("stem", {"stem": "7x7"}),
            ("width", {"width": 0.125}),
        ):
            make_pretrained(f"net-{name}", **model)
            draw.run(DrawConfig(out=f"ticket-{name}", checkpoint=f"net-{name}"))
        checkpoint = Checkpoint.load("net")
        progress = {"epoch": 3, "step": 1, "loss_sum": 0.0, "finished": False}
        save_checkpoint("unfinished", checkpoint.build_model(), None, {"progress": progress})
        for name in ("net/checkpoint", "ticket/ticket"):
            data = bytearray(Path(f"{name}.safetensors").read_bytes())
            data[-3] ^= 4
            Path(f"flipped-{Path(name).name}").write_bytes(data)
            Path(f"cut-{Path(name).name}").write_bytes(data[:-100])
        Path("pickle.pt").write_bytes(pickle.dumps({"weight": 1}))
        torch.save({"weight": torch.zeros(2)}, "torch.pt")
        Path("file").write_text("a regular file\n")
        Path("empty").mkdir()
        Path("unknown.yaml").write_text("data:\n  nmae: digits\n")
        Path("wrong-type.yaml").write_text("train:\n  epochs: ten\n")
        Path("null.yaml").write_text("train: null\n")
        Path("broken.yaml").write_text("train: [\n")
        Path("base60.yaml").write_text("granularity: 2:4\n")
        np.savez("grey.npz", **grey())
    return site


def grey():
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_images"] = rng.integers(0, 256, (8, 8, 8), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(8) % 2
    return arrays


@pytest.fixture(autouse=True)
def _inside(site, monkeypatch, one_cpu_thread):
    monkeypatch.chdir(site)
    monkeypatch.delenv("RTK_DATA", raising=False)
    with one_cpu_thread():
        yield


# id: (command, what its one line of error must say)
BAD = {
    "no_command": ("", ["expected", "pretrain"]),
    "unknown_command": ("pretrian", ["'pretrian'", "choose from", "did you mean 'pretrain'?"]),
    "unknown_option": (
        f"pretrain {TINY} --train.epoch 2",
        ["--train.epoch 2", "did you mean '--train.epochs'?", "rtk pretrain --help"],
    ),
    "option_without_its_group": ("pretrain --lr 0.1", ["--lr", "did you mean '--train.lr'?"]),
    "hyphen_for_underscore": ("draw --no-resume", ["did you mean '--no_resume'?"]),
    "unknown_data": (
        f"pretrain --out o {TINY} --data.name digist",
        ["unknown data set 'digist'", "cifar100, digits", "npz:PATH", "did you mean 'digits'?"],
    ),
    "bad_class_subset": (
        f"pretrain --out o {TINY} --data.name digits[5-3]",
        ["[5-3] is malformed", "e.g. [0-4]"],
    ),
    "class_out_of_range": (
        f"pretrain --out o {TINY} --data.name digits[9-12]",
        ["unknown class 10", "0..9"],
    ),
    "data_group": ("pretrain --data digits", ["--data: 'digits' is no YAML file", "--data.NAME"]),
    "unknown_model": (
        f"pretrain --out o {TINY} --model.arch resnet19",
        ["unknown model 'resnet19'", "resnet18, resnet50", "did you mean"],
    ),
    "unknown_attack": (
        f"pretrain --out o {TINY} --attack.name pdg",
        ["unknown attack 'pdg'", "none, pgd", "did you mean 'pgd'?"],
    ),
    "unknown_norm": (
        f"pretrain --out o {TINY} --attack.norm l1",
        ["unknown norm 'l1'", "linf, l2", "did you mean 'l2'?"],
    ),
    "unknown_scheme": (
        "draw --out o --checkpoint net --scheme opm",
        ["unknown scheme 'opm'", "did you mean 'omp'?"],
    ),
    "unknown_granularity": (
        "draw --out o --checkpoint net --granularity kernels",
        ["unknown granularity 'kernels'", "element, row, kernel, channel", "mean 'kernel'?"],
    ),
    "misspelt_block": (
        "draw --out o --checkpoint net --granularity blocks-64",
        ["unknown granularity 'blocks-64'", "block-KxC", "2:4", "did you mean 'block-64'?"],
    ),
    "sparsity_beside_n_of_m": (
        "draw --out o --checkpoint net --granularity 2:4 --sparsity 0.9",
        ["sparsity: expected 0.5, which is what 2:4 means, got 0.9", "leave it out"],
    ),
    "n_of_m_without_quotes": (
        "draw --out o --checkpoint net --config base60.yaml",
        ["granularity: expected text, got '124'", "goes in quotes, as '2:4'"],
    ),
    "unknown_mode": (
        "transfer --out o --checkpoint net --mode finetun",
        ["unknown transfer mode 'finetun'", "linear_bn_update", "did you mean 'finetune'?"],
    ),
    "unknown_device": (
        f"pretrain --out o {TINY} --device gpu",
        ["unknown device 'gpu'", "auto, cpu, cuda or cuda:N"],
    ),
    "missing_gpu": (
        "evaluate --out o --checkpoint net --device cuda:99",
        ["device 'cuda:99'", "use --device cpu", "rtk doctor"],
    ),
    "sparsity_1": (
        "draw --out o --checkpoint net --sparsity 1.0",
        ["sparsity: expected a fraction of zeros in [0, 1)", "got 1.0"],
    ),
    "sparsity_negative": (
        "draw --out o --checkpoint net --sparsity -0.1",
        ["sparsity: expected a fraction of zeros in [0, 1)", "got -0.1"],
    ),
    "eps_negative": (
        f"pretrain --out o {TINY} --attack.eps -0.1",
        ["attack.eps: expected a radius >= 0 in [0, 1] pixel scale", "got -0.1"],
    ),
    "text_for_a_number": (
        f"pretrain --out o {TINY} --train.epochs ten",
        ["train.epochs: expected a whole number, got 'ten'"],
    ),
    "text_for_a_number_or_null": (
        f"pretrain --out o {TINY} --data.image_size big",
        ["data.image_size: expected a whole number or null, got 'big'"],
    ),
    "number_for_a_list": (
        f"pretrain --out o {TINY} --train.milestones 5",
        ["train.milestones: expected a list, e.g. [30,60], got '5'"],
    ),
    "seed_negative": (f"pretrain --out o {TINY} --seed -1", ["seed: expected", "got -1"]),
    "yaml_key": (
        "pretrain --out o --config unknown.yaml",
        ["data.nmae", "did you mean 'data.name'?"],
    ),
    "yaml_type": (
        "pretrain --out o --config wrong-type.yaml",
        ["train.epochs: expected a whole number, got 'ten'"],
    ),
    "yaml_null_section": (
        "pretrain --out o --config null.yaml",
        ["train: expected settings by name, got None"],
    ),
    "yaml_broken": ("pretrain --out o --config broken.yaml", ["Problems parsing config"]),
    "yaml_missing": ("pretrain --out o --config no.yaml", ["File does not exist", "no.yaml"]),
    "no_checkpoint": ("draw --out o", ["no checkpoint was given", "--checkpoint RUN_OR_FILE"]),
    "missing_checkpoint": (
        "draw --out o --checkpoint nowhere",
        ["checkpoint nowhere cannot be read (No such file or directory)", "that rtk wrote"],
    ),
    "folder_without_checkpoint": (
        "evaluate --out o --checkpoint empty",
        ["empty/checkpoint.safetensors cannot be read"],
    ),
    "missing_ticket": (
        "transfer --out o --checkpoint net --ticket nowhere",
        ["ticket nowhere cannot be read"],
    ),
    "ticket_for_checkpoint": (
        "draw --out o --checkpoint ticket/ticket.safetensors",
        ["ticket/ticket.safetensors is a ticket, expected a checkpoint"],
    ),
    "checkpoint_for_ticket": (
        "transfer --out o --checkpoint net --ticket net/checkpoint.safetensors",
        ["net/checkpoint.safetensors is a checkpoint, expected a ticket"],
    ),
    "ticket_of_another_arch": (
        "transfer --out o --checkpoint net --ticket ticket-arch",
        ["the ticket is for arch resnet50, the model has arch resnet18", "draw a ticket"],
    ),
    "ticket_of_another_stem": (
        "transfer --out o --checkpoint net --ticket ticket-stem",
        ["the ticket is for stem 7x7, the model has stem 3x3"],
    ),
    "ticket_of_another_width": (
        "transfer --out o --checkpoint net --ticket ticket-width",
        ["the ticket is for width 0.125, the model has width 0.0625"],
    ),
    "unfinished_checkpoint": (
        "draw --out o --checkpoint unfinished",
        ["stopped at epoch 3", "give the same command again to finish it"],
    ),
    "flipped_checkpoint": (
        "evaluate --out o --checkpoint flipped-checkpoint",
        ["flipped-checkpoint is damaged", "SHA-256", "restore a copy"],
    ),
    "cut_checkpoint": (
        "evaluate --out o --checkpoint cut-checkpoint",
        ["cut-checkpoint is truncated or damaged", "restore a copy"],
    ),
    "flipped_ticket": (
        "transfer --out o --checkpoint net --ticket flipped-ticket",
        ["ticket flipped-ticket is damaged", "SHA-256"],
    ),
    "cut_ticket": (
        "transfer --out o --checkpoint net --ticket cut-ticket",
        ["ticket cut-ticket is truncated or damaged"],
    ),
    "pickle": (
        "draw --out o --checkpoint pickle.pt",
        ["pickle.pt is a pickle, which can run code", "safetensors"],
    ),
    "torch_save": ("draw --out o --checkpoint torch.pt", ["torch.pt is a pickle"]),
    "text_file": ("draw --out o --checkpoint file", ["file is truncated or damaged"]),
    "no_cifar10": (
        f"pretrain --out o {TINY} --data.name cifar10 --data.root empty",
        ["cifar10 is not there", "empty/cifar-10-batches-py", "curl -L", "--data.root"],
    ),
    "no_npz": (
        f"pretrain --out o {TINY} --data.name npz:no.npz",
        ["no file for npz:no.npz", "give the path of an .npz file"],
    ),
    "out_below_a_file": (
        f"pretrain {TINY} --out file/run",
        ["cannot write file/run", "a file is where a folder is needed", "with --out"],
    ),
    "out_of_another_run": (
        f"pretrain {TINY} --out net --train.lr 0.3",
        ["net holds a run with other settings", "train.lr is 0.1 there and 0.3 here", "--out"],
    ),
    "out_of_another_stage": (
        "evaluate --checkpoint net --out ticket",
        ["ticket holds a run of another stage (DrawConfig", "--out"],
    ),
    "too_many_classes": (
        "evaluate --out o --checkpoint net --data.name digits",
        ["rtk: warning: the network was trained on the classes 0, 1", "labels must be in [0, 2)"],
    ),
    "bn_mode_train": (
        "evaluate --out o --checkpoint net --attack.bn_mode train",
        ["attack.bn_mode: expected eval"],
    ),
    "demo_without_jobs": ("demo --out o --jobs 0", ["jobs: expected at least 1", "got 0"]),
    "demo_below_a_file": ("demo --out file/demo", ["cannot write file/demo", "with --out"]),
    "demo_without_seeds": ("demo --out o --seeds 0", ["at least 1 seed, got 0"]),
    "report_without_folder": ("report", ["one of a folder of runs and --from FOLDER"]),
    "report_of_nothing": ("report nowhere", ["nowhere is no folder"]),
    "report_without_results": ("report empty", ["no result.json under empty", "rtk evaluate"]),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_error_and_exit_code_2(bad, capsys, site):
    command, expected = BAD[bad]
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(re.findall("^rtk: error: ", err, re.MULTILINE)) == 1
    assert "Traceback" not in err and "<class" not in err
    lines = {"no_cifar10": 3, "too_many_classes": 2}  # a command to copy; a warning before
    assert len(err.splitlines()) == lines.get(bad, 1)
    for text in expected:
        assert text in err
    shutil.rmtree(site / "o", ignore_errors=True)


@pytest.mark.parametrize("bad", ["unknown_data", "unknown_option", "no_checkpoint", "eps_negative"])
def test_debug_gives_the_traceback(bad):
    with pytest.raises(RtkError):
        main([*BAD[bad][0].split(), "--debug"])


def test_a_mistaken_command_can_be_corrected(site, capsys):
    """What failed has not claimed the folder, so the corrected command is not refused."""
    wrong = f"pretrain --out corrected {TINY} --attack.name pdg".split()
    assert main(wrong) == 2
    assert main([*wrong[:-1], "pgd"]) == 0
    assert capsys.readouterr().out == f"corrected/{CHECKPOINT}\n"


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-m", "rtk", "draw"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"rtk: error: no checkpoint was given; .*\n", done.stderr)


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"rtk {rtk.__version__}\n"


def squeezed(text):
    """Drop all blanks: help is wrapped at the terminal's width, even inside words with hyphens."""
    return "".join(text.split())


def described_fields(config):
    """Yield the option and the documented help of every setting of a stage."""
    for cls in reversed(config.__mro__[:-1]):
        for parameter in docstring_parser.parse(cls.__doc__ or "").params:
            default = {f.name: f for f in dataclasses.fields(config)}[parameter.arg_name]
            if default.default_factory is dataclasses.MISSING:
                yield parameter.arg_name, parameter.description
            else:
                group = type(default.default_factory())
                for inner in docstring_parser.parse(group.__doc__).params:
                    yield f"{parameter.arg_name}.{inner.arg_name}", inner.description


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_setting(stage, capsys):
    with pytest.raises(SystemExit) as caught:
        main([stage, "--help"])
    assert caught.value.code == 0
    text = squeezed(capsys.readouterr().out)
    fields = dict(described_fields(STAGES[stage]))
    assert {f.name for f in dataclasses.fields(StageConfig)} <= set(fields)
    for option, description in fields.items():
        assert f"--{option}" in text, option
        if option != "resume":  # it has a text of its own, with its opposite
            assert squeezed(description) in text, option
    assert "--no_resume" in text and "--config" in text and "--debug" in text
    assert "<class" not in text


def test_every_setting_is_documented():
    for config in (*STAGES.values(), DataConfig, ModelConfig, AttackConfig, TrainConfig):
        documented = set()
        for cls in config.__mro__[:-1]:
            documented |= {p.arg_name for p in docstring_parser.parse(cls.__doc__ or "").params}
        assert {f.name for f in dataclasses.fields(config)} == documented


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in ("demo", "doctor", "report", *STAGES):
        assert re.search(rf"^ +{command} +\S", text, re.MULTILINE), command


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("demo", ["--out OUT", "--seeds SEEDS", "no network, no GPU"]),
        ("doctor", ["which backend ops take"]),
        ("report", ["folder", "--title TITLE", "--note NOTE", "searched, with all its sub"]),
    ],
)
def test_help_of_the_other_commands(command, expected, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert all(part in text for part in expected)


OPTIONS = {
    "pretrain": "--out x --seed 3 --data.name digits[1-2] --data.image_size 16"
    " --model.arch resnet50 --train.milestones [1,2,3] --train.nesterov true --attack.name pgd"
    " --attack.step_size 0.01",
    "draw": "--checkpoint net --sparsity 0.35 --granularity row --scope layer --include_first true",
    "transfer": "--checkpoint net --ticket ticket --mode linear_frozen --train.lr 0.5 --device cpu",
    "evaluate": "--checkpoint net --attack.norm l2 --attack.eps 0.5 --batch_size 7 --no_resume",
}


def printed_config(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--print_config"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("options", ["defaults", "options"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_printed_configuration_is_read_back(stage, options, capsys, tmp_path):
    argv = [stage, *(OPTIONS[stage].split() if options == "options" else [])]
    text = printed_config(argv, capsys)
    (tmp_path / "c.yaml").write_text(text)
    assert printed_config([stage, "--config", str(tmp_path / "c.yaml")], capsys) == text
    values = yaml.safe_load(text)
    values.pop("debug")
    config = from_dict(STAGES[stage], values)
    if options == "defaults":
        assert config == STAGES[stage]()
    else:
        assert config != STAGES[stage]()


@pytest.mark.parametrize("granularity", ["block", "block-16x32", "2:4"])
def test_a_granularity_survives_the_command_line_and_a_file(granularity, capsys, tmp_path):
    text = printed_config(["draw", "--granularity", granularity], capsys)
    (tmp_path / "c.yaml").write_text(text)
    assert printed_config(["draw", "--config", str(tmp_path / "c.yaml")], capsys) == text
    assert yaml.safe_load(text)["granularity"] == granularity
    stored = yaml.safe_load(yaml.safe_dump(to_dict(DrawConfig(granularity=granularity))))
    assert from_dict(DrawConfig, stored) == DrawConfig(granularity=granularity)


def test_options_overlay_the_stages_own_defaults(capsys):
    values = yaml.safe_load(printed_config(["transfer", "--train.lr", "0.5"], capsys))
    values.pop("debug")
    expected = dataclasses.replace(TransferConfig().train, lr=0.5)
    assert from_dict(TransferConfig, values).train == expected


def test_options_after_a_file_win_and_a_file_after_them(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("seed: 7\ntrain:\n  lr: 0.7\n")
    path = str(tmp_path / "c.yaml")
    after = printed_config(["pretrain", "--config", path, "--seed", "8"], capsys)
    before = printed_config(["pretrain", "--seed", "8", "--config", path], capsys)
    assert yaml.safe_load(after)["seed"] == 8 and yaml.safe_load(before)["seed"] == 7
    assert yaml.safe_load(after)["train"]["lr"] == 0.7


def test_the_road_from_pretraining_to_the_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = (
        f"pretrain --out runs/p {TINY} --train.epochs 1 --train.batch_size 64",
        "draw --out runs/d --checkpoint runs/p --sparsity 0.9 --granularity kernel",
        "transfer --out runs/t --checkpoint runs/p --ticket runs/d --data.name digits[2-3]"
        " --train.epochs 1 --train.lr 0.05",
        "evaluate --out runs/e --checkpoint runs/t --attack.steps 1",
    )
    made = (
        "runs/p/checkpoint.safetensors",
        "runs/d/ticket.safetensors",
        "runs/t/checkpoint.safetensors",
        "runs/e/result.json",
    )
    for command, path in zip(commands, made, strict=True):
        assert main(command.split()) == 0
        assert capsys.readouterr().out == f"{path}\n" and Path(path).exists()

    files = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path("runs").rglob("*.*")}
    for command, path in zip(commands, made, strict=True):
        stage = command.split()[0]
        config = str(Path(path).parent / "config.yaml")
        assert main(command.split()) == 0
        assert main([stage, "--config", config]) == 0
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in Path("runs").rglob("*.*")} == files
    capsys.readouterr()

    assert main(["report", "runs", "--title", "A title"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("report: runs/report.html\n") and "kernel" in out
    assert "A title" in Path("runs/report.html").read_text()
    assert len(Path("runs/results.csv").read_text().splitlines()) == 2


def test_no_resume_in_a_runs_configuration_is_not_kept(tmp_path, capsys):
    """Else `--config RUN/config.yaml` would start that run over each time."""
    command = f"pretrain --out {tmp_path}/p {TINY}".split()
    assert main([*command, "--no_resume"]) == 0
    written = (tmp_path / "p" / CHECKPOINT).stat().st_mtime_ns
    assert main(["pretrain", "--config", f"{tmp_path}/p/config.yaml"]) == 0
    assert (tmp_path / "p" / CHECKPOINT).stat().st_mtime_ns == written
    assert main([*command, "--no_resume"]) == 0
    assert (tmp_path / "p" / CHECKPOINT).stat().st_mtime_ns > written


def test_a_warning_is_one_line(capsys):
    command = f"pretrain --out warned {TINY} --data.name npz:grey.npz".split()
    assert main(command) == 0
    err = capsys.readouterr().err
    assert err == "rtk: warning: grey.npz: grey images are repeated to 3 channels\n"


def test_the_demo_runs_its_recipe_and_prints_the_table(tmp_path, capsys, monkeypatch):
    asked = []

    def small(out, seeds):
        asked.append((out, seeds))
        stage = EvaluateConfig(out=f"{out}/e", checkpoint="net", attack=AttackConfig("none"))
        return Recipe("A small title", "A note.", Path(out), (stage,))

    monkeypatch.setattr(recipes, "demo", small)
    assert main(["demo", "--out", f"{tmp_path}/d", "--seeds", "2", "--jobs", "1"]) == 0
    assert asked == [(str(tmp_path / "d"), 2)]
    out, err = capsys.readouterr()
    assert err == "[1/1] e\n"
    assert "digits[0-1]" in out and out.endswith(f"report: {tmp_path}/d/report.html\n")
    assert "A small title" in (tmp_path / "d" / "report.html").read_text()


def test_doctor_prints_its_text(capsys):
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith(f"rtk {rtk.__version__}, Python ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Interrupted("stopped at epoch 3; the same command goes on"), "rtk: stopped at epoch 3"),
        (KeyboardInterrupt(), "rtk: interrupted\n"),
    ],
    ids=["Interrupted", "KeyboardInterrupt"],
)
def test_an_interrupted_command_exits_with_130(error, line, capsys, monkeypatch):
    def stop(arguments):
        raise error

    monkeypatch.setitem(cli._COMMANDS, "doctor", stop)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.startswith(line)
    with pytest.raises(type(error)):
        main(["doctor", "--debug"])


def test_an_error_that_is_not_the_users_is_not_hidden(monkeypatch):
    def bug(arguments):
        raise ZeroDivisionError

    monkeypatch.setitem(cli._COMMANDS, "doctor", bug)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize(
    ("words", "parsed"),
    [
        (["--attack.eps", "8/255"], ["--attack.eps", repr(8 / 255)]),
        (["--attack.eps=8/255"], ["--attack.eps=" + repr(8 / 255)]),
        (["--attack.step_size", "2/255"], ["--attack.step_size", repr(2 / 255)]),
        (["--attack.eps", "8/0"], ["--attack.eps", "8/0"]),
        (["--out", "8/255"], ["--out", "8/255"]),
        (["--data-root", "d", "--data-root=e"], ["--data.root", "d", "--data.root=e"]),
    ],
)
def test_fractions_and_the_data_root_are_taken_as_people_type_them(words, parsed):
    assert cli._as_parsed(words) == parsed
