import dataclasses

import pytest
import yaml

from rtk.config import (
    AttackConfig,
    DataConfig,
    DrawConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
    check_sparsity,
)
from rtk.errors import RtkError
from rtk.identity import claim_folder, config_hash, from_dict, to_dict

STAGES = (PretrainConfig, DrawConfig, TransferConfig, EvaluateConfig)
NAN = float("nan")

PRETRAIN = PretrainConfig(
    seed=3,
    data=DataConfig("digits[0-1]", root="/data", image_size=16, augment="flip"),
    model=ModelConfig("resnet50", "7x7", 0.5),
    train=TrainConfig(epochs=7, milestones=(1, 2, 3), nesterov=True, lr=1e-3),
    attack=AttackConfig("pgd", "l2", 0.5, 0.1, 7, False, "train"),
)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (DataConfig, {"image_size": 0}, r"data\.image_size: expected a positive.*got 0"),
        (DataConfig, {"augment": "flips"}, "unknown augmentation 'flips'.*did you mean 'flip'"),
        (ModelConfig, {"stem": "3x4"}, "unknown stem '3x4'.*did you mean '3x3'"),
        (ModelConfig, {"width": 0.0}, r"model\.width: expected a positive multiplier, got 0\.0"),
        (ModelConfig, {"width": NAN}, r"model\.width"),
        (AttackConfig, {"norm": "linfinity"}, "unknown norm 'linfinity'.*did you mean 'linf'"),
        (AttackConfig, {"bn_mode": "test"}, "unknown bn_mode 'test': expected one of eval, train"),
        (AttackConfig, {"eps": -0.1}, r"attack\.eps: expected a radius >= 0 .*got -0\.1"),
        (AttackConfig, {"eps": NAN}, r"attack\.eps"),
        (AttackConfig, {"step_size": -1.0}, r"attack\.step_size: expected a length >= 0"),
        (AttackConfig, {"steps": -1}, r"attack\.steps: expected a number of steps >= 0, got -1"),
        (TrainConfig, {"epochs": -1}, r"train\.epochs: expected a number of epochs >= 0"),
        (TrainConfig, {"batch_size": 1}, r"train\.batch_size: expected at least 2 images.* got 1"),
        (TrainConfig, {"lr": -0.1}, r"train\.lr: expected a learning rate >= 0"),
        (TrainConfig, {"lr": NAN}, r"train\.lr"),
        (TrainConfig, {"momentum": 1.0}, r"train\.momentum: expected a value in \[0, 1\)"),
        (TrainConfig, {"weight_decay": -1.0}, r"train\.weight_decay: expected a value >= 0"),
        (TrainConfig, {"nesterov": True, "momentum": 0.0}, r"train\.nesterov: expected momentum"),
        (TrainConfig, {"label_smoothing": 1.0}, r"train\.label_smoothing: expected a value in"),
        (TrainConfig, {"warmup_epochs": -1.0}, r"train\.warmup_epochs: expected >= 0"),
        (TrainConfig, {"eval_every": -1}, r"train\.eval_every: expected >= 0 epochs"),
        (TrainConfig, {"schedule": "multi"}, "unknown schedule 'multi'.*did you mean 'multistep'"),
        (TrainConfig, {"amp": "bf61"}, "unknown amp 'bf61'.*did you mean 'bf16'"),
        (TrainConfig, {"channels_last": "maybe"}, "unknown channels_last 'maybe'"),
        (PretrainConfig, {"seed": -1}, r"seed: expected a whole number in \[0, 2\*\*63\), got -1"),
        (TransferConfig, {"seed": 2**63}, "seed: expected a whole number"),
        (DrawConfig, {"seed": -1}, "seed: expected a whole number"),
        (EvaluateConfig, {"seed": -1}, "seed: expected a whole number"),
        (DrawConfig, {"sparsity": 1.0}, r"sparsity: expected .* in \[0, 1\).*got 1\.0"),
        (DrawConfig, {"sparsity": -0.1}, r"sparsity: expected .* in \[0, 1\).*got -0\.1"),
        (DrawConfig, {"granularity": "rows"}, "unknown granularity 'rows'.*did you mean 'row'"),
        (DrawConfig, {"granularity": "block-0"}, "'block-0': expected a tile of at least 1 x 1"),
        (DrawConfig, {"granularity": "2:4", "sparsity": 0.8}, r"expected 0\.5, which is what 2:4"),
        (DrawConfig, {"scope": "local"}, "unknown scope 'local': expected one of global, layer"),
        (
            TransferConfig,
            {"mode": "linear"},
            "unknown transfer mode 'linear'.*did you mean 'linear",
        ),
        (EvaluateConfig, {"batch_size": 0}, "batch_size: expected at least 1 image, got 0"),
        (EvaluateConfig, {"attack": AttackConfig("pgd", bn_mode="train")}, r"attack\.bn_mode"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_value_out_of_range_is_refused(config, values, message):
    with pytest.raises(RtkError, match=message):
        config(**values)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_a_sparsity_in_range_is_given_back(sparsity):
    assert check_sparsity(sparsity) == sparsity


@pytest.mark.parametrize("granularity", ["element", "block-64"])
def test_only_n_of_m_implies_a_sparsity(granularity):
    with pytest.raises(RtkError, match=r"sparsity: expected a fraction .* got None"):
        check_sparsity(None, granularity)


@pytest.mark.parametrize(
    ("granularity", "asked", "sparsity"),
    [("2:4", None, 0.5), ("2:4", 0.5, 0.5), ("1:4", 0.75, 0.75), ("1:3", 0.667, 2 / 3)],
)
def test_n_of_m_fixes_the_sparsity(granularity, asked, sparsity):
    assert check_sparsity(asked, granularity) == pytest.approx(sparsity, abs=1e-12)
    assert DrawConfig(granularity=granularity, sparsity=asked).sparsity == pytest.approx(sparsity)


@pytest.mark.parametrize("sparsity", [0.4, 0.8, 0.0, NAN])
def test_another_sparsity_than_n_of_ms_is_refused(sparsity):
    with pytest.raises(
        RtkError, match=r"expected 0\.5, which is what 2:4 means, got .*leave it out"
    ):
        check_sparsity(sparsity, "2:4")


def test_settings_that_mean_the_same_are_the_same_run():
    block = DrawConfig(granularity="block-64")
    assert block == DrawConfig(granularity="block", sparsity=0.8)
    assert config_hash(DrawConfig(granularity="block-64x64")) == config_hash(block)
    assert DrawConfig() == DrawConfig(sparsity=0.8)
    assert to_dict(DrawConfig(granularity="2:4"))["sparsity"] == 0.5


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_valid_and_frozen(stage):
    config = stage()
    assert config.resume and config.device == "auto"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_the_default_protocols_are_the_papers():
    pretrain, finetune = PretrainConfig().train, TransferConfig().train
    assert (pretrain.epochs, pretrain.lr, pretrain.milestones) == (90, 0.1, (30, 60))
    assert (finetune.epochs, finetune.batch_size, finetune.milestones) == (150, 64, (50, 100))
    for train in (pretrain, finetune):
        assert (train.momentum, train.weight_decay, train.gamma) == (0.9, 1e-4, 0.1)


@pytest.mark.parametrize(
    ("eps", "steps", "step_size", "resolved"),
    [
        (0.3, 1, None, 0.2),
        (0.3, 3, None, 0.2),
        (0.4, 4, None, 0.1),
        (8 / 255, 20, None, 2 / 255),
        (0.3, 3, 0.05, 0.05),
        (0.3, 3, 0.0, 0.0),
    ],
)
def test_the_default_step_is_two_thirds_or_a_quarter_of_the_radius(eps, steps, step_size, resolved):
    config = AttackConfig("pgd", eps=eps, steps=steps, step_size=step_size)
    assert config.resolved_step_size == pytest.approx(resolved, rel=1e-15)


def test_labels_name_the_attack():
    assert AttackConfig().label == "natural"
    assert AttackConfig("pgd").label == "pgd-linf-0.03137"
    assert AttackConfig("pgd", "l2", 0.5).label == "pgd-l2-0.5"


@pytest.mark.parametrize("config", [PRETRAIN, *(stage() for stage in STAGES)])
def test_plain_values_and_back(config):
    values = to_dict(config)
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    assert from_dict(type(config), values) == config


def test_plain_values_are_nested_and_without_resume():
    values = to_dict(PRETRAIN)
    assert values["train"]["milestones"] == [1, 2, 3]
    assert values["attack"]["eps"] == 0.5
    assert "resume" not in values
    assert from_dict(PretrainConfig, {**values, "resume": False}).resume is False


def test_missing_values_are_the_defaults_of_the_stage():
    config = from_dict(TransferConfig, {"train": {"lr": 0.5}})
    assert config.train == dataclasses.replace(TransferConfig().train, lr=0.5)
    assert from_dict(EvaluateConfig, {}) == EvaluateConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "PretrainConfig has no setting 'sed'; did you mean 'seed'"),
        ({"train": {"epoch": 1}}, "TrainConfig has no setting 'epoch'; did you mean 'epochs'"),
        ({"train": None}, "train: expected settings by name, got None"),
        ({"data": "digits"}, "data: expected settings by name, got 'digits'"),
    ],
    ids=["unknown", "unknown_nested", "null_section", "text_section"],
)
def test_plain_values_that_do_not_fit_are_refused(values, message):
    with pytest.raises(RtkError, match=message):
        from_dict(PretrainConfig, values)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"data": dataclasses.replace(PRETRAIN.data, name="digits")},
        {"train": dataclasses.replace(PRETRAIN.train, lr=2e-3)},
        {"attack": dataclasses.replace(PRETRAIN.attack, eps=0.6)},
    ],
    ids=["seed", "data", "lr", "eps"],
)
def test_the_hash_tells_what_is_computed(change):
    assert config_hash(dataclasses.replace(PRETRAIN, **change)) != config_hash(PRETRAIN)


@pytest.mark.parametrize(
    "change",
    [
        {"out": "elsewhere"},
        {"device": "cuda:1"},
        {"resume": False},
        {"train": dataclasses.replace(PRETRAIN.train, checkpoint_seconds=1.0)},
    ],
    ids=["out", "device", "resume", "checkpoint_seconds"],
)
def test_the_hash_does_not_tell_how_it_is_run(change):
    assert config_hash(dataclasses.replace(PRETRAIN, **change)) == config_hash(PRETRAIN)


def test_the_hash_is_12_digits_and_repeats():
    assert config_hash(PretrainConfig()) == config_hash(PretrainConfig())
    assert len(config_hash(PRETRAIN)) == 12 and int(config_hash(PRETRAIN), 16)


def test_claiming_writes_the_configuration(tmp_path):
    config = dataclasses.replace(PRETRAIN, out=str(tmp_path / "a" / "b"))
    assert claim_folder(config) == tmp_path / "a" / "b"
    text = (tmp_path / "a" / "b" / "config.yaml").read_text()
    assert text.startswith(f"# PretrainConfig, hash {config_hash(config)}\n")
    assert from_dict(PretrainConfig, yaml.safe_load(text)) == config


def test_claiming_again_with_the_same_settings_writes_nothing(tmp_path):
    config = dataclasses.replace(PRETRAIN, out=str(tmp_path))
    claim_folder(config)
    path = tmp_path / "config.yaml"
    before = path.stat().st_ino, path.stat().st_mtime_ns
    claim_folder(dataclasses.replace(config, device="cpu"))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before


def test_other_settings_are_refused_by_name(tmp_path):
    claim_folder(dataclasses.replace(PRETRAIN, out=str(tmp_path)))
    other = dataclasses.replace(
        PRETRAIN, out=str(tmp_path), seed=9, train=dataclasses.replace(PRETRAIN.train, epochs=8)
    )
    with pytest.raises(RtkError) as caught:
        claim_folder(other)
    message = str(caught.value)
    assert "seed is 3 there and 9 here, train.epochs is 7 there and 8 here" in message
    assert str(tmp_path) in message and "another --out or remove the folder" in message
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 3


def test_another_stage_is_refused_as_such(tmp_path):
    claim_folder(DrawConfig(out=str(tmp_path)))
    with pytest.raises(RtkError, match=r"holds a run of another stage .DrawConfig, this is a Pre"):
        claim_folder(PretrainConfig(out=str(tmp_path)))


def test_without_resume_the_folder_is_taken_over(tmp_path):
    claim_folder(DrawConfig(out=str(tmp_path)))
    claim_folder(PretrainConfig(out=str(tmp_path), seed=5, resume=False))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 5


@pytest.mark.parametrize(
    "text", ["a: [b\n", "\0", "# DrawConfig\n: :\n -"], ids=["yaml", "nul", "x"]
)
def test_a_configuration_that_cannot_be_read_is_an_error(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RtkError, match=r"cannot read .*config\.yaml"):
        claim_folder(DrawConfig(out=str(tmp_path)))


@pytest.mark.parametrize("text", ["", "5\n", "- a\n"], ids=["empty", "number", "list"])
def test_a_configuration_that_says_nothing_differs_from_ours(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RtkError, match="holds a run with other settings"):
        claim_folder(DrawConfig(out=str(tmp_path)))
