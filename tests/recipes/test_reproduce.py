import csv
import functools
import html
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sklearn.datasets

from rtk import cli, recipes, report, runs
from rtk.config import (
    AdviseConfig,
    AttackConfig,
    DrawConfig,
    EvaluateConfig,
    PretrainConfig,
    SegmentConfig,
    TransferConfig,
    imp_attack,
    imp_train,
    lmp_train,
    segment_train,
)
from rtk.errors import RtkError
from rtk.identity import config_hash
from rtk.recipes import FIGURES, SCALES, reproduce
from rtk.recipes.done import is_done, pending

SCRIPT = Path(__file__).parent / "shrunk_smoke.py"
SHRUNK = runpy.run_path(str(SCRIPT))["SHRUNK"]
NAMES = ["fig1", "fig2", "fig3", "fig4", "fig5", "fig6", "fig7", "fig8", "fig9", "tab1", "tab2"]
# The tables are made of the same stages as Fig. 8 and 9, which a test below asserts.
EVERY = [(name, scale) for scale in ("paper", "small", "smoke") for name in NAMES[:9]]


@functools.cache
def built(name, scale):
    return reproduce(name, scale, "somewhere")


def of(recipe, kind):
    return [stage for stage in recipe.stages if isinstance(stage, kind)]


def the(values):
    """Return the one value that all are."""
    (value,) = set(values)
    return value


def test_every_figure_and_table_of_the_paper_has_a_recipe():
    assert sorted(FIGURES.names()) == sorted(NAMES)


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_every_stage_reads_what_an_earlier_one_makes(name, scale):
    recipe = built(name, scale)
    made = set()
    for stage in recipe.stages:
        for path in [getattr(stage, key, None) for key in ("checkpoint", "ticket", "features")]:
            if path and path not in made:
                assert made & set(map(str, Path(path).parents)), (stage.out, path)
        made.add(stage.out)
    folders = [stage.out for stage in recipe.stages]
    assert len(set(folders)) == len(folders)
    assert all(Path(folder).parent.parent == Path("somewhere") for folder in folders)
    transferred = [stage.out for stage in of(recipe, TransferConfig)]
    assert sorted(transferred) == sorted(stage.checkpoint for stage in of(recipe, EvaluateConfig))


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_robust_and_natural_differ_in_nothing_but_the_pretraining(name, scale):
    """What each network is put through, with names and hashes of folders taken out."""
    recipe = built(name, scale)
    pretrained = {stage.out: stage for stage in of(recipe, PretrainConfig)}
    drawn = {stage.out: stage for stage in of(recipe, DrawConfig)}
    done = {}
    for stage in of(recipe, TransferConfig):
        network = pretrained[stage.checkpoint]
        ticket = None
        if stage.ticket is not None:
            folder, _, round_number = stage.ticket.partition("/rounds/")
            how = drawn[folder]
            assert how.checkpoint == stage.checkpoint
            scheme = "imp" if how.scheme == "a-imp" else how.scheme
            again = replace(how, scheme=scheme, attack=AttackConfig(), out="", checkpoint="")
            ticket = (repr(again), round_number)
        how = (
            network.model,
            network.seed,
            ticket,
            repr(replace(stage, out="", checkpoint="", ticket=None)),
        )
        done.setdefault(network.attack.label, []).append(how)
    natural = done.pop("natural")
    assert done and len(set(natural)) == len(natural)
    for transfers in done.values():
        # A sweep may be of some networks only.
        assert set(transfers) <= set(natural)
        models = {model for model, *_ in transfers}
        assert set(transfers) == {how for how in natural if how[0] in models}


@pytest.mark.parametrize("scale", ["paper", "small", "smoke"])
def test_figures_share_the_runs_that_are_the_same(scale):
    def outs(name, kind):
        return {stage.out for stage in of(built(name, scale), kind)}

    assert outs("fig2", PretrainConfig) >= outs("fig1", PretrainConfig)
    assert outs("fig2", DrawConfig) >= outs("fig1", DrawConfig)
    assert not outs("fig1", TransferConfig) & outs("fig2", TransferConfig)
    assert outs("fig4", TransferConfig) >= outs("fig8", TransferConfig)
    assert [s.out for s in built("fig8", scale).stages] == [
        s.out for s in built("tab1", scale).stages
    ]
    assert {s.out for s in built("fig9", scale).stages} == {
        s.out for s in built("tab2", scale).stages
    }


def test_a_changed_setting_is_another_folder_for_all_that_depends_on_it():
    smoke = SCALES.get("smoke")
    changed = replace(smoke, robust=replace(smoke.robust, epochs=5))
    ours, theirs = (
        {stage.out for stage in reproduce("fig1", scale, "x").stages} for scale in (changed, smoke)
    )
    assert {"pgd" in out for out in ours - theirs} == {True}
    assert {"natural" in out for out in ours & theirs} == {True}


def test_the_protocol_of_the_paper():
    """The numbers of the protocol card, figure by figure."""
    stages = {name: built(name, "paper") for name in NAMES[:9]}
    networks = of(stages["fig1"], PretrainConfig)
    assert {s.model.arch for s in networks} == {"resnet18", "resnet50"}
    assert {s.data.name for s in networks} == {"imagenet"} and {s.model.stem for s in networks} == {
        "7x7"
    }
    grid = {(s.attack.norm, round(s.attack.eps, 6)) for s in networks if s.attack.name == "pgd"}
    l2 = {("l2", eps) for eps in (0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 3, 5)}
    assert grid == l2 | {("linf", round(eps / 255, 6)) for eps in (0.5, 1, 2, 4, 8)}
    for network in networks:
        train, attack = network.train, network.attack
        assert (train.epochs, train.milestones, train.gamma) == (90, (30, 60), 0.1)
        if attack.name == "pgd":
            assert (attack.steps, attack.bn_mode, train.batch_size) == (3, "eval", 512)
            assert attack.resolved_step_size == 2 * attack.eps / 3

    tuned = the(s.train for s in of(stages["fig1"], TransferConfig))
    linear = the(s.train for s in of(stages["fig2"], TransferConfig))
    for train, lr in ((tuned, 0.001), (linear, 0.01)):
        assert (train.epochs, train.batch_size, train.lr, train.momentum) == (150, 64, lr, 0.9)
        assert (train.weight_decay, train.milestones, train.gamma) == (1e-4, (50, 100), 0.1)
    assert {s.data.name for s in of(stages["fig1"], TransferConfig)} == {"cifar10", "cifar100"}
    assert the((s.data.image_size, s.data.augment) for s in of(stages["fig1"], TransferConfig)) == (
        224,
        "resized_crop",
    )
    assert the(s.mode for s in of(stages["fig2"], TransferConfig)) == "linear_bn_update"
    drawn = of(stages["fig1"], DrawConfig)
    assert the((s.scheme, s.scope, s.include_first) for s in drawn) == ("omp", "global", False)
    assert {0.7, 0.92, 0.99} <= {s.sparsity for s in drawn}

    structured = of(stages["fig3"], DrawConfig)
    assert {s.granularity for s in structured} == {"row", "kernel", "channel"}
    assert the(s.model.arch for s in of(stages["fig3"], PretrainConfig)) == "resnet50"
    assert {s.mode for s in of(stages["fig3"], TransferConfig)} == {"finetune", "linear_bn_update"}

    rounds = of(stages["fig4"], DrawConfig)
    for stage in rounds:
        assert (stage.rate, stage.rounds) == (0.2, 19)
        assert stage.train == imp_train(stage.task)
        expected = imp_attack(stage.task) if stage.scheme == "a-imp" else AttackConfig()
        assert stage.attack == expected
    assert {(s.scheme, s.task) for s in rounds} == {
        (scheme, task) for scheme in ("imp", "a-imp") for task in ("upstream", "downstream")
    }

    masks = of(stages["fig5"], DrawConfig)
    assert the((s.scheme, s.scope, s.score_init) for s in masks) == ("lmp", "layer", "weight_rank")
    assert the(s.train for s in masks) == lmp_train()

    smoothed = [s for s in of(stages["fig6"], PretrainConfig) if s.attack.name == "smoothing"]
    assert the((s.train.batch_size, s.train.lr, s.train.weight_decay) for s in smoothed) == (
        400,
        0.1,
        1e-4,
    )
    assert the(s.attack.sigma for s in smoothed) in (0.25, 0.5, 1.0)

    segmented = of(stages["fig7"], TransferConfig)
    assert the((s.mode, s.data.name) for s in segmented) == ("segment", "voc2012")
    assert the(s.train for s in segmented) == segment_train()
    assert the(s.segment for s in segmented) == SegmentConfig()

    attacks = [s.attack for s in of(stages["fig8"], EvaluateConfig)]
    assert the(attacks) == AttackConfig("pgd", eps=8 / 255, steps=20)
    assert the(attacks).resolved_step_size == pytest.approx(2 / 255)

    asked = the(of(stages["fig9"], AdviseConfig))
    assert asked.source_images == 8000 and asked.features is None
    assert set(asked.targets) == {
        *("cifar10", "aircraft", "cifar100", "pets", "flowers", "cars", "food", "dtd"),
        *("birdsnap", "sun397", "caltech101", "caltech256"),
    }
    assert the(s.model.arch for s in of(stages["fig9"], PretrainConfig)) == "resnet18"


def test_the_reduced_scale():
    scale = SCALES.get("small")
    assert scale.source.name == "npz:tinyimagenet32.npz"
    attacks = {(a.norm, a.eps) for a in scale.strengths(scale.models[0], linear=True)}
    assert (
        sum(norm == "l2" for norm, _ in attacks) >= 3 and sum(n == "linf" for n, _ in attacks) == 1
    )
    assert len({seed for _, seed in scale.replicates}) == 3
    assert len({first for first, _ in scale.replicates}) == 2
    assert (scale.natural.epochs, scale.robust.epochs) == (24, 18)
    assert all(len({s.sparsity for s in of(built(n, "small"), DrawConfig)}) >= 4 for n in NAMES[:2])


def test_at_the_reduced_scale_the_large_network_takes_a_smaller_part():
    def transfers(name):
        recipe = built(name, "small")
        arch = {stage.out: stage.model.arch for stage in of(recipe, PretrainConfig)}
        sparsity = {s.out: s.sparsity for s in of(recipe, DrawConfig)} | {None: 0.0}
        found = {}
        for s in of(recipe, TransferConfig):
            ticket = s.ticket and s.ticket.split("/rounds/")[0]
            found.setdefault(arch[s.checkpoint], set()).add((s.data.name, sparsity[ticket]))
        return found

    for name in ("fig1", "fig2"):
        found = transfers(name)
        assert found["resnet50"] < found["resnet18"]
        assert len({target for target, _ in found["resnet50"]}) == 2
    assert set(transfers("fig3")) == {"resnet50"}
    assert all(set(transfers(name)) == {"resnet18"} for name in NAMES[3:9])


def test_small_sets_are_trained_on_for_longer():
    epochs = {s.data.name: s.train.epochs for s in of(built("fig9", "small"), TransferConfig)}
    assert epochs["npz:gtsrb.npz"] > epochs["npz:cifar100.npz"] > epochs["npz:cifar10.npz"]
    masks = {s.data.name: s.train.epochs for s in of(built("fig5", "small"), DrawConfig)}
    assert masks == {name: epochs[name] for name in masks} and len(masks) == 2
    rounds = [s for s in of(built("fig4", "small"), DrawConfig) if s.task == "downstream"]
    assert {s.data.name: s.train.epochs for s in rounds} == masks


def test_other_targets_are_those_of_all_networks():
    recipe = reproduce("fig1", "small", targets=["npz:b.npz"])
    assert {s.data.name for s in of(recipe, TransferConfig)} == {"npz:b.npz"}
    assert len(of(recipe, PretrainConfig)) == len(of(built("fig1", "small"), PretrainConfig))


def test_sets_and_weights_can_be_named():
    recipe = reproduce(
        "tab2",
        "small",
        source="npz:a.npz",
        targets=["npz:b.npz", "mnist"],
        weights="inception.pth",
        data_root="/images",
        device="cpu",
    )
    first, *_ = recipe.stages  # what may be missing shows before anything is trained
    assert isinstance(first, AdviseConfig) and first.weights == "inception.pth"
    assert (first.data.name, first.targets) == ("npz:a.npz", ("npz:b.npz", "mnist"))
    assert the(stage.data.root for stage in recipe.stages) == "/images"
    assert the(stage.device for stage in recipe.stages) == "cpu"
    assert {s.data.name for s in of(recipe, TransferConfig)} == {"npz:b.npz", "mnist"}


def test_distances_may_be_in_the_features_of_a_network_that_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = the(of(reproduce("tab2", "paper", "out", features="runs/net"), AdviseConfig))
    assert (asked.features, asked.weights) == (f"{tmp_path}/runs/net", None)
    with pytest.raises(RtkError, match="null beside weights"):
        reproduce("tab2", "paper", "out", features="runs/net", weights="w.pth")


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("fig10", "smoke", "unknown figure 'fig10'.*did you mean 'fig1'"),
        ("fig1", "smal", "unknown scale 'smal'.*did you mean 'small'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, scale, message):
    with pytest.raises(RtkError, match=message):
        reproduce(name, scale)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All eleven, run in one folder."""
    folder = tmp_path_factory.mktemp("reproduced")
    with pytest.MonkeyPatch.context() as patch:  # each stage reads the digits, from text
        patch.setattr(
            sklearn.datasets, "load_digits", functools.cache(sklearn.datasets.load_digits)
        )
        pages = {name: recipes.run(reproduce(name, SHRUNK, folder)) for name in NAMES}
    assert list(pages.values()) == [folder / name / "report.html" for name in NAMES]
    return folder


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_ends_in_its_figure_and_table(finished, name):
    folder = finished / name
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    table, runs = rows(folder / "table.csv"), rows(folder / "results.csv")
    figure = reproduce(name, SHRUNK, finished).finish.figure
    assert {row["line"] for row in table} == {line.label for line in figure.lines}
    for row in table:
        against = next(line.against for line in figure.lines if line.label == row["line"])
        assert row["n"] == "2" and float(row["sd"]) >= 0
        assert row["against"] == (against or "")
        assert row["pairs"] == ("2" if against else "")
        if against and float(row["se"]) > 0:
            assert 0 <= float(row["p (t-test)"]) <= 1
    page = (folder / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    for run in runs:
        assert (finished / run["run"] / "result.json").exists() and html.escape(run["run"]) in page


def test_every_number_is_that_of_its_runs(finished):
    checked = 0
    for name in NAMES:
        for row in rows(finished / name / "table.csv"):
            if row["metric"] not in ("top-1", "mean IoU"):
                continue
            key = "miou" if row["metric"] == "mean IoU" else "top1"
            results = [
                json.loads((finished / r / "result.json").read_text()) for r in row["runs"].split()
            ]
            assert float(row["mean"]) == pytest.approx(sum(r[key] for r in results) / len(results))
            assert {r["sparsity"] for r in results} == {float(row["sparsity"])}
            assert {r["pretrain"] for r in results} == {row["pretraining"]}
            checked += 1
    assert checked > 50


def test_what_each_figure_shows(finished):
    def column(name, column):
        return {row[column] for row in rows(finished / name / "table.csv")}

    assert column("fig3", "granularity") == {"row", "kernel", "channel"}
    assert column("fig3", "transfer") == {"finetune", "linear_bn_update"}
    assert column("fig4", "line") == {"natural US", "natural DS", "robust US", "robust DS"}
    assert column("fig6", "pretraining") == {"natural", "pgd-linf-0.1", "smoothing-0.1"}
    assert column("fig7", "metric") == {"mean IoU"}
    assert column("fig8", "metric") == {
        *("top-1", "PGD top-1 (pgd-linf-0.1, 2 steps)", "OoD AUC digits[0,1]")
    }
    assert len(column("tab2", "target")) == 3
    assert all(float(distance) > 0 for distance in column("tab2", "distance"))


def test_the_gallery_shows_all_that_are_done(finished):
    page = (finished / "index.html").read_text()
    assert [page.index(f'href="{name}/report.html"') for name in FIGURES.names()] == sorted(
        page.index(f'href="{name}/report.html"') for name in NAMES
    )
    assert page.count("data:image/png;base64,") == len(NAMES)
    assert "Not run yet" not in page


def files(folder):
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_no_lock_is_kept_of_a_stage_that_is_done(finished):
    """Each is an open file, of which a process may have a thousand or so."""
    assert not [folder for folder in runs._locks if folder.is_relative_to(finished.resolve())]


def test_a_second_call_does_nothing(finished, capsys):
    before = files(finished)
    for name in NAMES:
        assert pending(reproduce(name, SHRUNK, finished).stages) == []
        recipes.run(reproduce(name, SHRUNK, finished))
    assert files(finished) == before
    err = capsys.readouterr().err.splitlines()
    assert len(err) == len(NAMES) and all("stages are done" in line for line in err)


def test_what_is_missing_or_made_of_something_else_runs_again(finished):
    stages = reproduce("fig1", SHRUNK, finished).stages
    evaluated = next(s for s in stages if isinstance(s, EvaluateConfig))
    (first,) = {s for s in stages if s.out == evaluated.checkpoint}
    assert is_done(first) and is_done(evaluated)
    assert not is_done(replace(first, resume=False))
    assert not is_done(replace(first, seed=first.seed + 7))
    result = Path(evaluated.out, "result.json")
    text = result.read_text()
    result.write_text(json.dumps({**json.loads(text), "checkpoint_sha256": "0" * 64}))
    assert pending(stages) == [evaluated]
    result.write_text("{")
    assert pending(stages) == [evaluated]
    result.write_text(text)
    network = Path(stages[0].out, "checkpoint.safetensors")
    elsewhere = network.rename(network.with_suffix(".away"))
    again = pending(stages)
    elsewhere.rename(network)
    assert stages[0] in again and first in again and evaluated in again and len(again) < len(stages)
    assert pending(stages) == []


@pytest.fixture(scope="module")
def kept(finished, tmp_path_factory):
    """All eleven as CSVs, and what is made of these alone."""
    folder, out = (tmp_path_factory.mktemp(name) for name in ("kept", "rebuilt"))
    for name in NAMES:
        path = recipes.keep(reproduce(name, SHRUNK, finished), folder)
        assert path == folder / f"{name}.csv"
    report.rebuild(folder, out)
    return folder, out


@pytest.mark.parametrize("name", NAMES)
def test_of_the_kept_numbers_the_same_table_is_made_again(finished, kept, name):
    folder, out = kept
    rebuilt, first = (
        path.read_text() for path in (out / f"{name}-table.csv", finished / name / "table.csv")
    )
    assert rebuilt == first
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "README.md").read_text()
    assert f"\n## {name}\n" in page and f"]({name}.png)" in page
    assert str(finished) not in page + (folder / f"{name}.csv").read_text()


def test_what_is_kept_says_of_every_stage_what_it_was_and_took(finished, kept):
    folder, _ = kept
    for name in NAMES:
        recipe = reproduce(name, SHRUNK, finished)
        stages = {Path(s.out).relative_to(finished).as_posix(): s for s in recipe.stages}
        found = {}
        for row in rows(folder / f"{name}.csv"):
            if row["stage"] != "figure":
                found.setdefault(row["run"], row)
                assert row["config_hash"] == config_hash(stages[row["run"]])
        assert list(found) == list(stages)
        for run, row in found.items():
            stage = stages[run]
            assert row["stage"] == run.split("/")[0]
            assert float(row["device_seconds"]) == float(row["seconds"]) > 0
            if isinstance(stage, PretrainConfig):
                assert row["pretraining"] == stage.attack.label and row["network"] == "resnet18"
                sigma = stage.attack.sigma if stage.attack.name == "smoothing" else stage.attack.eps
                assert float(row["eps"]) == (sigma if stage.attack.name != "none" else 0.0)
                assert row["metric"] == "top1" and 0 < float(row["value"]) <= 1
            if isinstance(stage, TransferConfig):
                measured = found[
                    the(r for r in found if stages[r].out == evaluation_of(stage, recipe))
                ]
                same = ("pretraining", "sparsity", "target", "transfer", "pretrain_seed", "seed")
                assert [row[key] for key in same] == [measured[key] for key in same]


def evaluation_of(stage, recipe):
    return the(s.out for s in of(recipe, EvaluateConfig) if s.checkpoint == stage.out)


def test_a_figure_that_is_not_done_or_ran_otherwise_is_not_kept(finished, tmp_path):
    with pytest.raises(RtkError, match="36 of 36 stages of fig1 are not done"):
        recipes.keep(reproduce("fig1", "smoke", tmp_path), tmp_path)
    plain = reproduce("fig1", SHRUNK, finished, engine="off")
    with pytest.raises(RtkError, match="ran with the engine on, first pretrain/"):
        recipes.keep(plain, tmp_path)
    with pytest.raises(RtkError, match=r"demo.* is no figure"):
        recipes.keep(recipes.demo(str(finished)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_engine_off_has_a_folder_of_its_own_and_the_same_numbers(finished, kept, tmp_path):
    assert reproduce("fig1", "smoke").folder == Path("runs/reproduce-smoke")
    plain = reproduce("fig1", "smoke", engine="off")
    assert plain.folder == Path("runs/reproduce-smoke-engine-off") and not plain.engine
    with pytest.raises(RtkError, match=r"unknown engine 'of'.*did you mean 'off'"):
        reproduce("fig1", "smoke", engine="of")
    recipe = reproduce("fig1", SHRUNK, tmp_path / "off", engine="off")
    recipes.run(recipe)
    path = recipes.keep(recipe, tmp_path)
    assert path.name == "fig1-engine-off.csv"
    theirs = {(r["run"], r["metric"]): r for r in rows(kept[0] / "fig1.csv")}
    for row in rows(path):
        if row["stage"] == "evaluate":
            other = float(theirs[row["run"], row["metric"]]["value"])
            assert float(row["value"]) == pytest.approx(other, abs=0.03)


def test_a_killed_one_goes_on(finished, tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path), "fig5"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("transfer/*/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    recipe = reproduce("fig5", SHRUNK, tmp_path)
    assert 0 < len(pending(recipe.stages)) < len(recipe.stages)
    recipes.run(recipe)
    ours, theirs = (rows(folder / "fig5" / "table.csv") for folder in (tmp_path, finished))
    assert ours == theirs


def test_the_command_line(finished, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(SCALES._entries, "smoke", SHRUNK)
    common = ["--scale", "smoke", "--out", str(finished), "--jobs", "1"]
    assert cli.main(["reproduce", "fig1", "tab2", *common]) == 0
    out = capsys.readouterr().out
    assert f"fig1: {finished}/fig1/report.html" in out and "robust is ahead of natural" in out
    keeping = ["--keep", str(tmp_path)]
    assert cli.main(["reproduce", "fig1", *common, *keeping]) == 0
    out = capsys.readouterr().out
    assert f"kept: {tmp_path}/fig1.csv" in out and f"report: {tmp_path}/README.md" in out
    assert cli.main(["reproduce", "--list", *common]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[1:]] == FIGURES.names()
    assert cli.main(["reproduce", *common]) == 2
    assert "name a figure or table: fig1" in capsys.readouterr().err
    assert cli.main(["reproduce", "fgi2", *common]) == 2
    assert "did you mean 'fig2'" in capsys.readouterr().err
