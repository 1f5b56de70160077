"""A figure kept as one CSV, and everything made of it again."""

import csv
import dataclasses
import re

import pytest
from PIL import Image

from rtk import cli
from rtk.errors import RtkError
from rtk.report import Figure, Kept, Line, Number, Stage, rebuild, write_kept
from rtk.report.compare import agreement
from rtk.report.cost import by_kind, cost, engine_rows
from rtk.report.kept import COLUMNS, public_name, read_kept

PAIR = (
    Line("natural", {"robust": False}),
    Line("robust", {"robust": True}, against="natural"),
)
FIGURE = Figure("fig1", "A figure | of tickets", "", PAIR, high=0.9)
SEEDS = ((0, 0), (1, 1), (0, 2))


def stage(kind, run, *numbers, seconds=1.0, **columns):
    return Stage(kind, f"{kind}/{run}", columns, numbers, 200, 2 * seconds, seconds, "0123456789ab")


def evaluation(robust, sparsity, seeds, value, **columns):
    about = {
        "network": "resnet18",
        "pretraining": "pgd-l2-0.5" if robust else "natural",
        "eps": 0.5 if robust else 0.0,
        "robust": robust,
        "source": "npz:source.npz",
        "scheme": "omp" if sparsity else "dense",
        "granularity": "element" if sparsity else None,
        "sparsity": sparsity,
        "target": "npz:birds.npz",
        "transfer": "finetune",
        "pretrain_seed": seeds[0],
        "seed": seeds[1],
    }
    run = f"{'robust' if robust else 'natural'}-{sparsity}-{seeds[0]}-{seeds[1]}"
    return stage("evaluate", run, Number("top1", value), **about | columns)


def kept(engine="on", shift=0.0, seconds=1.0, figure=FIGURE):
    stages = [
        stage(
            "pretrain", "natural", Number("top1", 0.5), seconds=30 * seconds, pretraining="natural"
        ),
        stage("draw", "ticket", seconds=0.5 * seconds),
    ]
    for robust in (False, True):
        for sparsity in (0.0, 0.5, 0.95):
            for i, seeds in enumerate(SEEDS):
                value = 0.8 - sparsity / 3 + robust * (0.02 + 0.001 * i) + shift * (i - 0.9)
                stages.append(evaluation(robust, sparsity, seeds, value))
    facts = {"Source": "npz:source.npz"}
    return Kept(figure, "small", engine, "A GPU", tuple(stages), "Reduced.", facts)


def test_it_is_read_as_it_was_written(tmp_path):
    numbers = (
        Number("top1", 1 / 3),
        Number("pgd_top1", 0.1, "pgd-linf-0.1, 20 steps"),
        Number("ood_auc", 0.75, "npz:noise.npz"),
    )
    first = evaluation(True, 0.9375, (1, 2), 0.0, scheme="a-imp-us", draw_task="upstream")
    first = dataclasses.replace(first, numbers=numbers, seconds=1.25, device_seconds=0.125)
    far = stage("distances", "own", Number("distance", 12.5, "npz:birds.npz"))
    untimed = dataclasses.replace(stage("draw", "t"), seconds=None, device_seconds=None)
    figure = dataclasses.replace(
        FIGURE, metrics=("top1", "pgd_top1", "ood_auc"), scatter=True, panels=("target",)
    )
    written = Kept(figure, "small", "on", "A GPU", (first, far, untimed), features="own features")
    path = write_kept(written, tmp_path)
    assert path.name == "fig1.csv"
    read = read_kept(path)
    assert read.figure == dataclasses.replace(figure, claim=read.figure.claim)
    assert "robust tickets win at every sparsity" in read.figure.claim  # the code's, not the file's
    assert [s.numbers for s in read.stages] == [s.numbers for s in written.stages]
    assert [(s.run, s.seconds, s.device_seconds) for s in read.stages] == [
        (s.run, s.seconds, s.device_seconds) for s in written.stages
    ]
    assert read.distances == {"npz:birds.npz": 12.5} and read.features == "own features"
    (result,) = read.results
    assert (result.top1, result.pgd_top1, result.attack) == (1 / 3, 0.1, "pgd-linf-0.1, 20 steps")
    assert result.extra["ood_auc"] == {"npz:noise.npz": 0.75}
    assert (result.sparsity, result.replicate, result.robust) == (0.9375, (1, 2), True)
    assert (result.scheme, result.extra["draw_task"]) == ("a-imp-us", "upstream")
    assert write_kept(read, tmp_path).read_text() == path.read_text()


def test_what_a_stage_took_is_summed_once(tmp_path):
    numbers = (Number("top1", 0.5), Number("mean_per_class", 0.4))
    several = dataclasses.replace(evaluation(True, 0.5, (0, 0), 0.0), numbers=numbers)
    path = write_kept(Kept(FIGURE, "small", "on", "CPU", (several, stage("draw", "t"))), tmp_path)
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] != "figure"]
    assert tuple(rows[0]) == COLUMNS
    assert [row["metric"] for row in rows] == ["top1", "mean_per_class", ""]
    assert sum(float(row["device_seconds"] or 0) for row in rows) == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "not a figure that `rtk reproduce --keep` wrote"),
        (lambda text: "a,b\n1,2\n", "not a figure"),
        (lambda text: text.replace(",0.5053333333333334,", ",much,"), "not a figure.*much"),
        (lambda text: text.replace('""panels""', '""walls""'), "not a figure.*panels"),
        (
            lambda text: text.replace("\nevaluate,", "\ntransfer,"),
            "no result is of any line of fig1",
        ),
    ],
    ids=["empty", "other_columns", "not_a_number", "no_panels", "no_results"],
)
def test_a_damaged_file_is_named(tmp_path, change, message):
    path = write_kept(kept(), tmp_path)
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(RtkError, match=f"fig1.csv.*{message}"):
        rebuild(tmp_path)


def test_nothing_kept_is_an_error(tmp_path):
    with pytest.raises(RtkError, match=r"no kept figure in .*; `rtk reproduce fig1 --keep FOLDER`"):
        rebuild(tmp_path)
    write_kept(kept("off"), tmp_path)
    with pytest.raises(RtkError, match="fig1 is there with the engine off only"):
        rebuild(tmp_path)


def test_everything_is_made_again_of_the_csv_alone(tmp_path):
    write_kept(kept(), tmp_path / "kept")
    page = rebuild(tmp_path / "kept", tmp_path / "out").read_text()
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {"README.md", "fig1.png", "fig1-table.csv"}
    with Image.open(tmp_path / "out" / "fig1.png") as image:
        assert image.mode == "P" and image.width > 400
    assert (tmp_path / "out" / "fig1.png").stat().st_size < 30_000
    with (tmp_path / "out" / "fig1-table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert float(rows[-1]["difference"]) == pytest.approx(0.021)
    assert "**Verdict: agrees.**" in page
    expected = "| robust tickets are ahead of natural ones | +2.10 ± 0.06 | 3 | < 0.001 | 1 of 1 |"
    assert expected in page
    assert "**The paper:** robust tickets win at every sparsity" in page
    assert "48 GPU seconds over 20 stages (pretrain 30, draw 0.5, evaluate 18)" in page
    assert "| [fig1](#fig1) | A figure / of tickets | **agrees** | 20 | 48 | 0.0 |  |" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    rebuild(tmp_path / "kept", tmp_path / "out")
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}


def test_shared_stages_are_counted_and_said(tmp_path):
    first = kept()
    second = kept(figure=dataclasses.replace(FIGURE, name="fig2"))
    own = dataclasses.replace(evaluation(True, 0.5, (0, 0), 0.7), run="evaluate/own")
    second = dataclasses.replace(
        second, stages=(*second.stages[:1], stage("transfer", "more", seconds=5.0), own)
    )
    found = cost(second, [first])
    assert (found.stages, found.seconds, found.shared, found.with_) == (3, 36.0, 30.0, ("fig1",))
    together = cost(None, [first, second])
    assert (together.stages, together.seconds, together.shared) == (22, 84.5, 54.5)
    assert by_kind(second) == {"pretrain": 30.0, "transfer": 5.0, "evaluate": 1.0}
    for each in (first, second):
        write_kept(each, tmp_path)
    second_page = rebuild(tmp_path).read_text()
    assert "30 of them are of stages shared with fig1." in second_page
    assert "All figures together: 22 stages, 54 GPU seconds." in second_page


def test_the_engine_on_and_off_stand_side_by_side(tmp_path):
    on, off = kept(), kept("off", shift=0.001, seconds=2.0)
    heads, rows = engine_rows(on, off)
    by_name = {row[0]: row[1:] for row in rows}
    assert heads[2:4] == ["engine on", "engine off"]
    assert by_name["pretrain, seconds on A GPU"] == ["1", "30", "60", "2.00 x", ""]
    assert by_name["evaluate, seconds on A GPU"] == ["18", "18", "18", "1.00 x", ""]
    (accuracy,) = [row for row in rows if row[0].startswith("top1")]
    assert accuracy[1:4] == ["18", "64.94 %", "64.95 %"] and "-0.01 ± " in accuracy[0]
    assert float(accuracy[-1]) > 0.05  # within noise
    for each in (on, off):
        write_kept(each, tmp_path)
    page = rebuild(tmp_path).read_text()
    assert "**What the engine saves:**" in page
    assert "| [fig1](#fig1) | A figure / of tickets | **agrees** | 20 | 48 | 0.0 | 79 |" in page


def test_a_second_run_is_compared_point_by_point(tmp_path, capsys):
    """At the sd that three seeds have here, .1 points, 2 standard errors are .16 points."""
    first, near, far = (tmp_path / name for name in ("first", "near", "far"))
    write_kept(kept(), first)
    moved = {near: 0.001, far: 0.01}
    for folder, by in moved.items():
        stages = [
            dataclasses.replace(s, numbers=tuple(Number("top1", n.value + by) for n in s.numbers))
            for s in kept().stages
        ]
        write_kept(dataclasses.replace(kept(), stages=tuple(stages)), folder)
    (same,), (close,), (off,) = (agreement(first, folder) for folder in (first, near, far))
    assert (same.points, same.within, same.largest) == (6, 6, 0.0)
    # Natural networks have no spread here at all, so there only equal means are within it.
    assert (close.within, off.within) == (3, 0)
    assert close.largest == pytest.approx(0.001) and off.largest == pytest.approx(0.01)
    assert same.typical == pytest.approx(0.0005)
    assert cli.main(["report", "--from", str(first), "--against", str(near)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["fig1", "6", "3", "0.10", "0.05"]
    assert cli.main(["report", "--from", str(first), "--against", str(tmp_path)]) == 2
    assert "no kept figure in common" in capsys.readouterr().err
    assert cli.main(["report", str(first), "--against", str(near)]) == 2
    assert "give --from too" in capsys.readouterr().err


def test_names_of_files_are_kept_without_their_folder():
    assert public_name("npz:/home/me/a.npz") == public_name("npz:me/a.npz") == "npz:a.npz"
    assert public_name("digits[0-4]") == "digits[0-4]"
    assert public_name("folder:/home/me/birds") == "folder:birds"


def test_the_command_line(tmp_path, capsys):
    write_kept(kept(), tmp_path)
    assert cli.main(["report", "--from", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"report: {tmp_path}/out/README.md\n"
    for arguments in ([], [str(tmp_path), "--from", str(tmp_path)]):
        assert cli.main(["report", *arguments]) == 2
        assert "one of a folder of runs and --from FOLDER" in capsys.readouterr().err
