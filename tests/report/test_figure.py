import csv
import dataclasses
import io
import math

import pytest
from scipy import stats

from rtk.errors import RtkError
from rtk.report import Figure, Line, read_runs, write_figure, write_gallery
from rtk.report.figure import reduce_results
from rtk.report.figure_table import comparison_rows, notes, sentences, table_csv
from rtk.report.results import COLUMNS, Result
from rtk.report.statistics import paired_test, rank_correlation

PAIR = (
    Line("natural", {"robust": False}),
    Line("robust", {"robust": True}, against="natural"),
)
FIGURE = Figure("fig0", "A figure", "robust wins.", PAIR)
NATURAL, ROBUST = "natural", "pgd-l2-0.5"


def result(top1, sparsity=0.0, pretrain=NATURAL, seeds=(0, 0), **columns):
    values = dict.fromkeys(COLUMNS)
    values |= {
        "run": f"evaluate/{pretrain}-{sparsity}-{seeds}-{columns}",
        "pretrain": pretrain,
        "robust": pretrain != NATURAL,
        "pretrain_seed": seeds[0],
        "seed": seeds[1],
        "arch": "resnet18",
        "scheme": "omp" if sparsity else "dense",
        "granularity": "element" if sparsity else None,
        "sparsity": sparsity,
        "target": "birds",
        "transfer": "finetune",
        "top1": top1,
    }
    return Result(**values | columns)


def line(name, *by_sparsity, **columns):
    """Results of one pretraining: accuracies by seed, at sparsity 0, 0.5, 0.9."""
    return [
        result(value, sparsity, name, (0, seed), **columns)
        for sparsity, values in zip((0.0, 0.5, 0.9), by_sparsity, strict=False)
        for seed, value in enumerate(values)
    ]


OURS = ((0.90, 0.92, 0.91), (0.85, 0.86, 0.88), (0.70, 0.75, 0.71))
THEIRS = ((0.91, 0.93, 0.90), (0.80, 0.83, 0.82), (0.60, 0.61, 0.66))
RESULTS = [*line(NATURAL, *THEIRS), *line(ROBUST, *OURS)]


def test_a_paired_test_is_scipys():
    ours, theirs = dict(enumerate(OURS[1])), dict(enumerate(THEIRS[1]))
    found = paired_test(ours, {**theirs, 7: 0.5})
    assert found.n == 3
    assert found.t == pytest.approx(stats.ttest_rel(OURS[1], THEIRS[1]).pvalue, rel=1e-12)
    assert found.wilcoxon == pytest.approx(stats.wilcoxon(OURS[1], THEIRS[1]).pvalue, rel=1e-12)
    differences = [a - b for a, b in zip(OURS[1], THEIRS[1], strict=True)]
    assert found.difference.mean == pytest.approx(sum(differences) / 3)
    # By hand: t = mean / (s / sqrt 3), with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    t = found.difference.mean / found.difference.spread
    assert found.t == pytest.approx(1 - t / math.sqrt(t * t + 2))


@pytest.mark.parametrize(
    ("ours", "theirs", "n"),
    [({0: 0.5}, {0: 0.25}, 1), ({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5}, 2)],
    ids=["one pair", "equal differences"],
)
def test_no_p_value_where_there_is_none(ours, theirs, n):
    found = paired_test(ours, theirs)
    assert (found.difference.mean, found.n, found.t, found.wilcoxon) == (0.25, n, None, None)
    assert paired_test(ours, {9: 0.1}) is None


def test_a_rank_correlation_is_scipys():
    x, y = [3.0, 1.0, 2.0, 5.0], [0.1, 0.2, 0.15, 0.4]
    assert rank_correlation(x, y) == pytest.approx(tuple(stats.spearmanr(x, y)))
    assert (
        rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None
    )


def test_points_are_means_over_seeds_tested_at_their_sparsity():
    data = reduce_results(FIGURE, RESULTS)
    assert [(p.line, p.sparsity) for p in data.points] == [
        (name, sparsity) for name in ("natural", "robust") for sparsity in (0, 0.5, 0.9)
    ]
    for point in data.points:
        values = (OURS if point.line == "robust" else THEIRS)[[0, 0.5, 0.9].index(point.sparsity)]
        assert tuple(point.values.values()) == values
        assert point.estimate.mean == pytest.approx(sum(values) / 3) and point.estimate.n == 3
        assert len(point.runs) == 3
    assert [point.test is None for point in data.points] == [True] * 3 + [False] * 3


def test_a_comparison_pairs_the_seeds_means_and_leaves_the_dense_out():
    every, high = reduce_results(FIGURE, RESULTS).comparisons
    differences = [
        [a - b for a, b in zip(x, y, strict=True)] for x, y in zip(OURS, THEIRS, strict=True)
    ]
    means = [(a + b) / 2 for a, b in zip(*differences[1:], strict=True)]
    assert (every.over, high.over) == ("all", "high")
    assert every.test.difference.mean == pytest.approx(sum(means) / 3)
    assert every.test.t == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    assert high.test.difference.mean == pytest.approx(sum(differences[2]) / 3)
    assert every.test.t < 0.05 and every.winner == "robust"
    assert high.test.t > 0.05 and high.winner == "match"


def test_the_loser_is_not_the_winner():
    swapped = [*line(NATURAL, *OURS), *line(ROBUST, *THEIRS)]
    assert reduce_results(FIGURE, swapped).comparisons[0].winner == "natural"


def test_of_several_strengths_the_best_dense_one_is_shown():
    worse = [tuple(v - 0.05 for v in OURS[0]), (0.99,) * 3, (0.99,) * 3]
    data = reduce_results(FIGURE, [*RESULTS, *line("pgd-l2-3", *worse)])
    assert {p.pretrain for p in data.points if p.line == "robust"} == {ROBUST}
    better = [tuple(v + 0.05 for v in OURS[0]), *OURS[1:]]
    data = reduce_results(FIGURE, [*RESULTS, *line("pgd-l2-3", *better)])
    assert {p.pretrain for p in data.points if p.line == "robust"} == {"pgd-l2-3"}
    assert any("a choice that favours robust" in note for note in notes(data))
    assert not any("favours" in note for note in notes(reduce_results(FIGURE, RESULTS)))


def test_a_dense_network_begins_every_line_and_panel_of_its_pretraining():
    def tickets(task, values):
        extra = {"draw_task": task}
        return [
            result(v, 0.5, NATURAL, (0, s), scheme="imp", extra=extra) for s, v in enumerate(values)
        ]

    figure = dataclasses.replace(
        FIGURE,
        lines=(
            Line("US", {"robust": False, "draw_task": "upstream"}),
            Line("DS", {"robust": False, "draw_task": "downstream"}, against="US"),
        ),
        panels=("granularity",),
    )
    dense = line(NATURAL, (0.9, 0.8))
    data = reduce_results(
        figure, [*dense, *tickets("upstream", (0.5, 0.6)), *tickets("downstream", (0.7, 0.65))]
    )
    assert data.panels == [("element",)]
    assert [(p.line, p.sparsity, [*p.values.values()]) for p in data.points] == [
        ("US", 0.0, [0.9, 0.8]),
        ("US", 0.5, [0.5, 0.6]),
        ("DS", 0.0, [0.9, 0.8]),
        ("DS", 0.5, [0.7, 0.65]),
    ]


def test_attacks_and_other_sets_have_rows_of_their_own():
    results = [
        dataclasses.replace(r, attack=attack, pgd_top1=value, extra={"ood_auc": {"noise": 0.75}})
        for r in line(NATURAL, (0.9,))
        for attack, value in (("weak", 0.5), ("strong", 0.25))
    ]
    figure = dataclasses.replace(FIGURE, lines=PAIR[:1], metrics=("top1", "pgd_top1", "ood_auc"))
    data = reduce_results(figure, results)
    assert [(p.measure.name, p.estimate.mean) for p in data.points] == [
        ("top-1", 0.9),
        ("PGD top-1 (weak)", 0.5),
        ("PGD top-1 (strong)", 0.25),
        ("OoD AUC noise", 0.75),
    ]


def test_distances_order_panels_and_are_correlated_with_the_gain():
    results = []
    for gain, target in ((0.01, "near"), (0.05, "far"), (0.02, "middle")):
        ours = [tuple(v + gain for v in values) for values in THEIRS]
        results += [*line(NATURAL, *THEIRS, target=target), *line(ROBUST, *ours, target=target)]
    distances = {"near": 1.0, "middle": 2.0, "far": 30.0}
    data = reduce_results(FIGURE, results, distances, "some features")
    assert [data.target(panel) for panel in data.panels] == ["far", "middle", "near"]
    assert [d for d, _ in data.by_distance()] == [30.0, 2.0, 1.0]
    assert data.correlation[0] == pytest.approx(1.0)
    assert data.panel_name(data.panels[0]) == "far, distance 30"
    assert "rank correlation +1.00 over 3 targets" in sentences(data)[-1]
    assert "Distances are in some features." in notes(data)
    assert next(csv.DictReader(io.StringIO(table_csv(data))))["distance"] == "30.0"


def test_pairs_that_share_a_pretraining_are_said_not_to_be_independent():
    assert any(
        "share 1 pretraining seed," in note for note in notes(reduce_results(FIGURE, RESULTS))
    )
    apart = [dataclasses.replace(r, pretrain_seed=r.seed) for r in RESULTS]
    assert not any("share" in note for note in notes(reduce_results(FIGURE, apart)))


def test_a_panel_is_called_by_what_tells_it_from_the_others():
    results = [
        dataclasses.replace(r, target=target)
        for target in ("npz:a/birds.npz", "digits[0-4]")
        for r in RESULTS
    ]
    data = reduce_results(FIGURE, results)
    assert [data.panel_name(panel) for panel in data.panels] == ["birds", "digits[0-4]"]
    (panel,) = reduce_results(FIGURE, RESULTS).panels
    assert reduce_results(FIGURE, RESULTS).panel_name(panel) == "resnet18, birds"


def test_the_table_has_exact_numbers_and_the_runs_behind_them():
    data = reduce_results(FIGURE, RESULTS)
    rows = [*csv.DictReader(io.StringIO(table_csv(data)))]
    last = rows[-1]
    assert float(last["mean"]) == data.points[-1].estimate.mean
    assert last["p (t-test)"] == repr(data.points[-1].test.t)
    assert float(last["difference"]) == data.points[-1].test.difference.mean
    assert last["runs"] == " ".join(r.run for r in RESULTS[-3:])
    assert comparison_rows(data)[0][-1] == "robust"


def test_a_figure_is_written_once_and_shown_in_the_gallery(tmp_path):
    for _ in range(2):
        write_figure(FIGURE, RESULTS, tmp_path / "fig0", note="<small>", facts={"Source": "x"})
        index = write_gallery(tmp_path, ["fig0", "fig9"], "All")
        stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}
        if _ == 0:
            before = stamps
    assert stamps == before
    assert {p.name for p in (tmp_path / "fig0").iterdir()} == {
        *("figure.png", "thumbnail.png", "figure.json", "table.csv", "results.csv", "report.html")
    }
    page, gallery = (tmp_path / "fig0" / "report.html").read_text(), index.read_text()
    assert "&lt;small&gt;" in page and "robust wins." in page
    assert "Not run yet: fig9." in gallery and 'href="fig0/report.html"' in gallery


def test_no_result_of_any_line_is_an_error(tmp_path):
    figure = dataclasses.replace(FIGURE, lines=(Line("none", {"pretrain": "smoothing-1"}),))
    with pytest.raises(RtkError, match="fig0: no result is of any of its lines"):
        write_figure(figure, RESULTS, tmp_path)


def test_a_run_without_a_result_is_named(tmp_path):
    with pytest.raises(RtkError, match=r"evaluate/a/result\.json"):
        read_runs(tmp_path, ["evaluate/a"])
