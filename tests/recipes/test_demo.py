from pathlib import Path

import pytest

from rtk import advise, convert, draw, evaluate, pretrain, recipes, transfer
from rtk.config import (
    AdviseConfig,
    ConvertConfig,
    DrawConfig,
    EvaluateConfig,
    PretrainConfig,
    TransferConfig,
)
from rtk.errors import RtkError
from rtk.recipes.demo import SPARSITIES


def of(recipe, kind):
    return [stage for stage in recipe.stages if isinstance(stage, kind)]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_demo_has_every_stage_for_every_seed(seeds):
    recipe = recipes.demo("runs/demo", seeds)
    # Natural and robust; dense and some sparsities, each finetuned and linear.
    tickets = len(SPARSITIES)
    assert len(of(recipe, PretrainConfig)) == 2 * seeds
    assert len(of(recipe, DrawConfig)) == 2 * tickets * seeds
    assert len(of(recipe, TransferConfig)) == 2 * (tickets + 1) * 2 * seeds
    assert len(of(recipe, EvaluateConfig)) == 2 * (tickets + 1) * 2 * seeds
    assert {stage.seed for stage in recipe.stages} == set(range(seeds))


def test_every_stage_has_its_own_folder_inside_the_recipes():
    recipe = recipes.demo("somewhere/demo", 2)
    folders = [stage.out for stage in recipe.stages]
    assert len(set(folders)) == len(folders)
    assert all(Path(folder).is_relative_to("somewhere/demo") for folder in folders)
    assert not [a for a in folders for b in folders if Path(a) in Path(b).parents]


def test_every_stage_reads_what_an_earlier_one_of_its_seed_made():
    made = {}
    for stage in recipes.demo("demo", 2).stages:
        if not isinstance(stage, PretrainConfig):
            assert made[stage.checkpoint] == stage.seed
        if isinstance(stage, TransferConfig) and stage.ticket is not None:
            assert made[stage.ticket] == stage.seed
        made[stage.out] = stage.seed


def test_source_and_target_share_no_class():
    recipe = recipes.demo()
    assert {stage.data.name for stage in of(recipe, PretrainConfig)} == {"digits[0-4]"}
    assert {stage.data.name for stage in of(recipe, TransferConfig)} == {"digits[5-9]"}
    assert {stage.attack.name for stage in of(recipe, PretrainConfig)} == {"none", "pgd"}


def test_the_evaluation_attacks_with_the_radius_of_pretraining_and_more_steps():
    recipe = recipes.demo()
    (training,) = {s.attack for s in of(recipe, PretrainConfig) if s.attack.name == "pgd"}
    (attack,) = {stage.attack for stage in of(recipe, EvaluateConfig)}
    assert (attack.name, attack.norm, attack.eps) == ("pgd", training.norm, training.eps)
    assert attack.steps > training.steps and attack.resolved_step_size == attack.eps / 4


@pytest.mark.parametrize("seeds", [0, -1])
def test_no_repetition_is_refused(seeds):
    with pytest.raises(RtkError, match=f"at least 1 seed, got {seeds}"):
        recipes.demo("demo", seeds)


def test_each_configuration_has_its_stage():
    assert {
        PretrainConfig: pretrain.run,
        DrawConfig: draw.run,
        TransferConfig: transfer.run,
        EvaluateConfig: evaluate.run,
        ConvertConfig: convert.run,
        AdviseConfig: advise.run,
    } == recipes.STAGES
