"""Presets: their numbers, what overrides them, and what a run keeps of them."""

import dataclasses
from contextlib import chdir
from pathlib import Path

import pytest
import yaml

from rtk import cli, pretrain, transfer
from rtk.config import (
    PRESETS,
    AttackConfig,
    DataConfig,
    DrawConfig,
    ModelConfig,
    PretrainConfig,
    SegmentConfig,
    TrainConfig,
    TransferConfig,
    imp_attack,
    imp_train,
    lmp_train,
    segment_train,
)
from rtk.config.presets import find
from rtk.errors import RtkError
from rtk.identity import claim_folder, config_hash, from_dict, from_preset, to_dict
from rtk.recipes import SCALES
from rtk.train import Checkpoint

DOCS = Path(__file__).parents[1] / "docs" / "protocols.md"
CROP_224 = (224, "resized_crop")
FINE = {"aircraft": 0.01, "birdsnap": 0.01, "flowers": 0.01, "cars": 0.01}
STAGES = {"pretrain": PretrainConfig, "draw": DrawConfig, "transfer": TransferConfig}

# The protocol card: epochs, batch, lr, milestones, weight decay, warm-up, images; then the rest.
NUMBERS = {
    "paper": {
        "pretrain none": (90, 256, 0.1, (30, 60), 1e-4, 0, CROP_224),
        "pretrain pgd": (90, 512, 0.1, (30, 60), 1e-4, 0, CROP_224),
        "pretrain smoothing": (90, 400, 0.1, (30, 60), 1e-4, 0, CROP_224),
        "draw omp": None,
        "draw imp upstream": (10, 256, 1e-4, (), 1e-4, 0, CROP_224),
        "draw imp downstream": (182, 256, 0.1, (91, 136), 2e-4, 0, CROP_224),
        "draw a-imp upstream": (10, 256, 1e-4, (), 1e-4, 0, CROP_224),
        "draw a-imp downstream": (182, 256, 0.1, (91, 136), 2e-4, 0, CROP_224),
        "draw lmp": (150, 64, 0.1, (50, 100), 5e-4, 0, CROP_224),
        "transfer finetune": (150, 64, 0.001, (50, 100), 1e-4, 0, CROP_224),
        "transfer linear_bn_update": (150, 64, 0.01, (50, 100), 1e-4, 0, CROP_224),
        "transfer linear_frozen": (150, 64, 0.01, (50, 100), 1e-4, 0, CROP_224),
        "transfer segment": (30, 4, 0.01, (18, 22), 1e-4, 0, (None, "auto")),
    },
    "salman2020": {
        "pretrain none": (90, 512, 0.1, (30, 60), 1e-4, 0, CROP_224),
        "pretrain pgd": (90, 512, 0.1, (30, 60), 1e-4, 0, CROP_224),
        "transfer finetune": (150, 64, 0.001, (50, 100), 5e-4, 0, CROP_224),
        "transfer linear_bn_update": (150, 64, 0.01, (50, 100), 5e-4, 0, CROP_224),
    },
    "chen2021": {
        "draw omp": None,
        "draw imp upstream": (10, 256, 1e-4, (), 1e-4, 0, CROP_224),
        "draw imp downstream": (182, 256, 0.1, (91, 136), 2e-4, 1, (None, "crop")),
        "transfer finetune": (182, 128, 0.1, (91, 136), 2e-4, 1, (None, "crop")),
    },
    "doublewin2022": {
        "draw omp": None,
        "draw imp upstream": (30, 2048, 5e-4, (), 1e-4, 0, CROP_224),
        "draw imp downstream": (182, 256, 0.1, (91, 136), 2e-4, 1, CROP_224),
        "draw a-imp upstream": (30, 2048, 5e-4, (), 1e-4, 0, CROP_224),
        "draw a-imp downstream": (182, 256, 0.1, (91, 136), 2e-4, 1, CROP_224),
        "transfer finetune": (150, 64, 0.001, (50, 100), 5e-4, 0, CROP_224),
    },
}
EVERY = [(preset, what) for preset, table in NUMBERS.items() for what in table]


def settings(what):
    """Return the plain settings that a protocol is for."""
    stage, kind, *task = what.split()
    data = {"name": "cifar10"}
    if stage == "pretrain":
        return {"data": data, "attack": {"name": kind}}
    if stage == "transfer":
        return {"data": data, "mode": kind}
    if kind == "omp":
        return {"scheme": kind}
    return {"scheme": kind, "data": data, **({"task": task[0]} if task else {})}


def made(preset, what, **more):
    return from_preset(STAGES[what.split()[0]], preset, **{**settings(what), **more})


def test_there_are_no_other_presets():
    assert {name: set(table) for name, table in PRESETS.items()} == {
        name: set(table) for name, table in NUMBERS.items()
    }


@pytest.mark.parametrize(("preset", "what"), EVERY)
def test_the_numbers_are_the_protocol_cards(preset, what):
    numbers, config = NUMBERS[preset][what], made(preset, what)
    assert config.preset == preset
    if numbers is None:
        return
    train, data = config.train, config.data
    assert (train.epochs, train.batch_size, train.lr, train.milestones) == numbers[:4]
    assert (train.weight_decay, train.warmup_epochs) == numbers[4:6]
    assert (data.image_size, data.augment) == numbers[6]
    assert train.schedule == ("multistep" if train.milestones else "constant")
    assert (train.momentum, train.gamma, train.nesterov, train.label_smoothing) == (0.9, 0.1, 0, 0)


def attack_of(preset, what):
    attack = made(preset, what).attack
    return attack.name, attack.norm, attack.eps, attack.steps, attack.bn_mode


def test_what_is_attacked():
    for preset in ("paper", "salman2020"):
        assert attack_of(preset, "pretrain pgd") == ("pgd", "l2", 3.0, 3, "eval")
        assert made(preset, "pretrain pgd").attack.resolved_step_size == 2.0
        assert made(preset, "pretrain none").attack == AttackConfig()
    smoothing = made("paper", "pretrain smoothing").attack
    assert (smoothing.name, smoothing.sigma) == ("smoothing", 0.5)
    for preset, bn_mode in (("paper", "eval"), ("doublewin2022", "train")):
        up, down = (f"draw a-imp {task}" for task in ("upstream", "downstream"))
        assert attack_of(preset, up) == ("pgd", "linf", 8 / 255, 3, bn_mode)
        assert attack_of(preset, down) == ("pgd", "linf", 8 / 255, 10, bn_mode)
        step = made(preset, up).attack.resolved_step_size
        assert step == pytest.approx(2 / 3 * 8 / 255)
        assert made(preset, down).attack.resolved_step_size == pytest.approx(2 / 255)
        for what in (up, down):
            assert made(preset, what).attack.random_start
    for preset in ("paper", "chen2021", "doublewin2022"):
        assert made(preset, "draw imp upstream").attack == AttackConfig()


def test_how_is_drawn():
    for preset, first in (("paper", False), ("chen2021", False), ("doublewin2022", True)):
        for what in (name for name in NUMBERS[preset] if name.startswith("draw")):
            config = made(preset, what)
            assert config.include_first is first
            assert config.scope == ("layer" if "lmp" in what else "global")
            if "imp" in what:
                assert (config.rate, config.rounds) == (0.2, 19)
                assert config.sparsity == pytest.approx(1 - 0.8**19)
                assert made(preset, what, sparsity=0.5).rounds == 4
    assert made("paper", "draw lmp").score_init == "weight_rank"


def test_what_a_segmentation_is():
    segment = made("paper", "transfer segment").segment
    assert segment == SegmentConfig("deeplabv3plus", 16, 513, 1000, 0.001, 0.01)


@pytest.mark.parametrize("preset", ["paper", "salman2020"])
def test_the_rate_of_finetuning_is_the_sets(preset):
    rates = {
        name: made(preset, "transfer finetune", data={"name": name}).train.lr
        for name in (*FINE, "pets", "flowers[0-9]")
    }
    assert rates == {**FINE, "pets": 0.001, "flowers[0-9]": 0.01}
    assert made(preset, "transfer linear_bn_update", data={"name": "pets"}).train.lr == 0.01


def test_there_is_one_place_for_the_numbers():
    paper, scale = PRESETS["paper"], SCALES.get("paper")
    assert lmp_train() == paper["draw lmp"].train == scale.lmp
    assert segment_train() == paper["transfer segment"].train == scale.segment
    assert (
        imp_train("upstream", "doublewin2022")
        == PRESETS["doublewin2022"]["draw imp upstream"].train
    )
    for task, train, attack in (
        ("upstream", scale.upstream, scale.upstream_attack),
        ("downstream", scale.downstream, scale.downstream_attack),
    ):
        assert imp_train(task) == paper[f"draw imp {task}"].train == train
        assert imp_attack(task) == paper[f"draw a-imp {task}"].attack == attack
    config = made("paper", "transfer finetune")
    assert (config.data, config.train) == (scale.targets[0], scale.finetune)
    assert made("paper", "transfer linear_bn_update").train == scale.linear
    robust = made("paper", "pretrain pgd")
    assert (robust.train, robust.attack) == (scale.robust, scale.attack)


# What overrides what


def test_what_is_set_goes_before_the_preset_and_the_preset_before_the_defaults():
    values = {"train": {"lr": 0.5, "epochs": 3}, "data": {"name": "cifar10", "augment": "flip"}}
    config = made("paper", "transfer finetune", **values)
    finetune = find("paper", "transfer finetune").train
    assert config.train == dataclasses.replace(finetune, lr=0.5, epochs=3)
    assert (config.data.image_size, config.data.augment) == (224, "flip")
    drawn = made("doublewin2022", "draw imp downstream", rate=0.5, include_first=False, rounds=3)
    assert (drawn.rate, drawn.rounds, drawn.include_first) == (0.5, 3, False)
    robust = made("paper", "pretrain pgd", attack={"name": "pgd", "norm": "linf", "eps": 4 / 255})
    assert robust.attack == AttackConfig("pgd", "linf", 4 / 255, steps=3)
    windows = made("paper", "transfer segment", segment={"crop_size": 257})
    assert (windows.segment.crop_size, windows.segment.output_stride) == (257, 16)


def test_a_section_that_is_an_object_is_taken_whole():
    train = TrainConfig(epochs=2)
    for config in (
        TransferConfig(preset="paper", data=DataConfig("cifar10"), train=train),
        made("paper", "transfer finetune", train=train, data=DataConfig("cifar10")),
    ):
        assert config.train == train
        assert (config.data.image_size, config.data.augment) == CROP_224


@pytest.mark.parametrize(
    ("preset", "what"),
    [e for e in EVERY if e[1] not in ("pretrain pgd", "pretrain smoothing")],
)
def test_the_classes_take_a_preset_as_files_do(preset, what):
    """But the attack of a pretraining, which is given as an object there, with all its values."""
    values = settings(what)
    for name, section in (("data", DataConfig), ("attack", AttackConfig)):
        if name in values:
            values[name] = section(**values[name])
    stage = STAGES[what.split()[0]]
    assert stage(preset=preset, **values) == made(preset, what)


def test_the_attack_of_a_draw_decides_whose_numbers_it_takes():
    config = from_dict(
        DrawConfig, {"preset": "doublewin2022", "scheme": "imp", "attack": {"name": "pgd"}}
    )
    assert config == DrawConfig(preset="doublewin2022", scheme="a-imp")
    with pytest.raises(RtkError, match=r"numbers for draw a-imp upstream .paper, doublewin2022"):
        DrawConfig(preset="chen2021", scheme="imp", attack=AttackConfig("pgd"))


def test_no_preset_leaves_everything_as_it_was():
    assert TransferConfig().preset is None and TransferConfig().train.lr == 0.01
    assert PretrainConfig().train == TrainConfig() and PretrainConfig().data == DataConfig()
    assert DrawConfig().include_first is False
    assert [config_hash(stage()) for stage in STAGES.values()] == [
        "c5f1ea368ba7",
        "0bc82881558f",
        "06208b71b449",
    ]


def test_images_without_a_name_are_left_to_the_pretraining():
    assert DrawConfig(preset="paper", scheme="imp").data == DataConfig(name="")


# What is wrong


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TransferConfig(preset="papr"),
            "unknown preset 'papr': expected one of paper, salman2020, chen2021, doublewin2022; "
            "did you mean 'paper'",
        ),
        (lambda: from_dict(PretrainConfig, {"preset": "x"}), "unknown preset 'x'"),
        (lambda: DrawConfig(preset=""), "unknown preset ''"),
        (
            lambda: TransferConfig(preset="salman2020", mode="segment"),
            r"numbers for transfer segment \(paper\), got 'salman2020', which has them for "
            "transfer finetune, transfer linear_bn_update; leave it out",
        ),
        (
            lambda: DrawConfig(preset="salman2020"),
            r"draw omp \(paper, chen2021, doublewin2022\), got 'salman2020'.* for no draw;",
        ),
        (
            lambda: PretrainConfig(preset="paper", attack=AttackConfig("fast")),
            r"numbers for pretrain fast \(none has\), got 'paper'",
        ),
        (
            lambda: TransferConfig(preset="paper", mode="linear"),
            "unknown transfer mode 'linear'.*did you mean",
        ),
        (
            lambda: made("paper", "pretrain pgd", attack={"name": "pgd", "norm": "linf"}),
            r"attack\.eps: expected a radius of Linf in \[0, 1\].*got 3\.0",
        ),
        (
            lambda: made("paper", "transfer finetune", train={"epoch": 3}),
            "TrainConfig has no setting 'epoch'",
        ),
    ],
    ids=[
        "unknown",
        "unknown_in_a_file",
        "empty",
        "segment",
        "draw",
        "fast",
        "mode",
        "radius_of_another_norm",
        "setting",
    ],
)
def test_mistakes_are_explained(make, message):
    with pytest.raises(RtkError, match=message):
        make()


# What a run keeps


@pytest.mark.parametrize(("preset", "what"), EVERY)
def test_a_stored_configuration_comes_back(preset, what):
    config = made(preset, what)
    values = yaml.safe_load(yaml.safe_dump(to_dict(config)))
    assert values["preset"] == preset
    assert from_dict(type(config), values) == config == dataclasses.replace(config)


def test_the_name_is_no_part_of_what_is_computed(tmp_path):
    named = made("paper", "transfer finetune", out=str(tmp_path))
    values = {name: value for name, value in to_dict(named).items() if name != "preset"}
    unnamed = from_dict(TransferConfig, values)
    assert unnamed.preset is None and config_hash(unnamed) == config_hash(named)
    claim_folder(named)
    claim_folder(unnamed)  # the same run goes on
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored["preset"] == "paper" and stored["train"]["lr"] == 0.001
    assert stored["data"]["augment"] == "resized_crop"
    other = made("salman2020", "transfer finetune", out=str(tmp_path))
    with pytest.raises(RtkError, match=r"train\.weight_decay is 0\.0001 there and 0\.0005 here"):
        claim_folder(other)


# The command line


@pytest.fixture(scope="module")
def site(tmp_path_factory, one_cpu_thread):
    """A folder with a pretrained network."""
    site = tmp_path_factory.mktemp("presets")
    with one_cpu_thread(), chdir(site):
        pretrain.run(
            PretrainConfig(
                out="net",
                data=DataConfig("digits[0-1]"),
                model=ModelConfig(width=0.0625),
                train=TrainConfig(epochs=0),
            )
        )
    return site


TRANSFER = "transfer --checkpoint net --data.name digits[2-3] --data.image_size 8 --device cpu"


def test_a_run_by_name_keeps_every_value(site, monkeypatch, capsys):
    monkeypatch.chdir(site)
    command = f"{TRANSFER} --preset paper --train.epochs 0 --data.augment shift --out tuned".split()
    assert cli.main(command) == 0
    stored = yaml.safe_load(Path("tuned/config.yaml").read_text())
    assert stored["preset"] == "paper"
    finetune = dataclasses.replace(find("paper", "transfer finetune").train, epochs=0)
    assert stored["train"] == to_dict(finetune)
    assert stored["data"]["image_size"] == 8 and stored["data"]["augment"] == "shift"
    assert Checkpoint.load("tuned").meta["config"] == stored
    made_at = Path("tuned/checkpoint.safetensors").stat().st_mtime_ns
    for again in (command, ["transfer", "--config", "tuned/config.yaml"]):
        assert cli.main(again) == 0
    assert Path("tuned/checkpoint.safetensors").stat().st_mtime_ns == made_at
    transfer.run(from_dict(TransferConfig, {**stored, "resume": True}))
    capsys.readouterr()
    assert cli.main([*command, "--preset", "salman2020"]) == 2
    assert "train.weight_decay is 0.0001 there and 0.0005 here" in capsys.readouterr().err


def printed(command, capsys):
    with pytest.raises(SystemExit):
        cli.main(command)
    values = yaml.safe_load(capsys.readouterr().out)
    return {name: value for name, value in values.items() if name not in ("resume", "debug")}


def test_lines_go_before_files_and_files_before_the_preset(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        "preset: salman2020\ntrain:\n  lr: 0.3\n  epochs: 7\ndata:\n  name: flowers\n"
    )
    command = ["transfer", "--config", "mine.yaml", "--train.epochs", "9", "--print_config"]
    values = printed(command, capsys)
    train = dataclasses.replace(find("salman2020", "transfer finetune").train, lr=0.3, epochs=9)
    assert values["preset"] == "salman2020" and values["train"] == to_dict(train)
    config = from_dict(TransferConfig, values)
    assert config == made("salman2020", "transfer finetune", data={"name": "flowers"}, train=train)


def test_a_draw_and_a_pretraining_by_name(capsys):
    for command, expected in (
        ("draw --preset doublewin2022 --scheme a-imp", "draw a-imp upstream"),
        ("pretrain --preset salman2020 --attack.name pgd --data.name cifar10", "pretrain pgd"),
    ):
        values = printed([*command.split(), "--print_config"], capsys)
        stage = STAGES[expected.split()[0]]
        found = find(values["preset"], expected)
        config = from_dict(stage, values)
        assert (config.train, config.attack) == (found.train, found.attack)


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        (f"{TRANSFER} --preset papr", "unknown preset 'papr': expected one of paper, salman2020"),
        (f"{TRANSFER} --preset salman2020 --mode segment", "numbers for transfer segment (paper)"),
        ("draw --checkpoint net --preset salman2020", "numbers for draw omp (paper, chen2021"),
    ],
    ids=["unknown", "segment", "draw"],
)
def test_a_bad_name_is_one_line_and_exit_code_2(command, wanted, site, monkeypatch, capsys):
    monkeypatch.chdir(site)
    assert cli.main([*command.split(), "--out", "bad"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("rtk: error: ") and error.count("\n") == 1 and wanted in error
    assert not Path("bad").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_the_presets_that_a_stage_has(stage, capsys):
    with pytest.raises(SystemExit):
        cli.main([stage, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    text = text[text.index("--preset PRESET") : text.index("docs/protocols.md has the values")]
    for name, table in PRESETS.items():
        assert (name in text) == any(what.startswith(stage) for what in table)


# The page


def row(preset, what):
    """Return the line of the page's table."""
    found = find(preset, what)
    train = found.train
    images = f"{found.image_size or 'own'}, {found.augment}"
    steps = ", ".join(map(str, train.milestones)) or "constant"
    numbers = [train.epochs, train.batch_size, f"{train.lr:g}", steps, f"{train.weight_decay:g}"]
    numbers += [f"{train.warmup_epochs:g}", images]
    if what == "draw omp":
        numbers = [""] * len(numbers)
    more = [found.attack.label] if found.attack.name != "none" else []
    if found.attack.name == "pgd":
        more += [f"{found.attack.steps} steps", f"bn {found.attack.bn_mode}"]
    if " imp " in what or "a-imp" in what:
        more += [f"{found.rounds} rounds of {found.rate:g}"]
    if found.include_first:
        more += ["first convolution too"]
    if found.rates:
        more += [f"lr {the(found.rates.values()):g} on {', '.join(found.rates)}"]
    if "segment" in what:
        segment = found.segment
        more += [
            f"{segment.network}, stride {segment.output_stride}, crop {segment.crop_size}",
            f"{segment.epoch_steps} iterations an epoch",
            f"backbone at {segment.backbone_lr:g}, its bn momentum {segment.backbone_bn_momentum}",
        ]
    cells = [f"`{preset}`", what, *map(str, numbers), "; ".join(more)]
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def the(values):
    (value,) = set(values)
    return value


def test_the_page_has_every_value():
    names = tuple(f"| `{name}` |" for name in PRESETS)
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith(names)]
    assert [line for line in rows if line.count("|") > 3] == [row(*each) for each in EVERY]
