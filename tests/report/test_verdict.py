"""The rule that says whether a figure agrees with the paper."""

import dataclasses

import pytest
from scipy import stats

from rtk.report import PAPER, Figure, Line, Result
from rtk.report.figure import reduce_results
from rtk.report.paper import FAR, HIGH, MILD, NEAR, Expectation
from rtk.report.results import COLUMNS
from rtk.report.verdict import judge, overall

PAIR = (
    Line("natural", {"robust": False}),
    Line("robust", {"robust": True}, against="natural"),
)
FIGURE = Figure("fig0", "A figure", "robust wins.", PAIR, panels=("target",))
ROBUST = Expectation("robust is ahead", "robust", "natural")
SEEDS = ((0, 0), (1, 1), (0, 2))
BASE = 0.5


def results(gains, target="birds", sparsities=(0.0, 0.5, 0.95), **columns):
    """Natural at 50 %, robust ahead by a gain a seed: {sparsity: gains} or the same for all."""
    found = []
    for robust in (False, True):
        for sparsity in sparsities:
            of = gains[sparsity] if isinstance(gains, dict) else gains
            for seeds, gain in zip(SEEDS, of, strict=False):
                values = dict.fromkeys(COLUMNS)
                values |= {
                    "run": f"{target}-{robust}-{sparsity}-{seeds}-{columns}",
                    "pretrain": "pgd" if robust else "natural",
                    "robust": robust,
                    "pretrain_seed": seeds[0],
                    "seed": seeds[1],
                    "scheme": "omp" if sparsity else "dense",
                    "sparsity": sparsity,
                    "target": target,
                    "top1": BASE + (gain if robust else 0.0),
                }
                found.append(Result(**values | columns))
    return found


def judged(figure_results, expectation=ROBUST, figure=FIGURE, distances=None):
    (judgement,) = judge(reduce_results(figure, figure_results, distances), (expectation,))
    return judgement


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.03, 0.032, 0.028), "agrees"),
        ((-0.03, -0.032, -0.028), "disagrees"),
        ((0.03, -0.01, 0.02), "cannot tell"),
        ((-0.03, 0.01, -0.02), "cannot tell"),
        ((0.03,), "cannot tell"),
        ((0.03, 0.03, 0.03), "cannot tell"),  # a test of equal numbers has no p
    ],
    ids=["ahead", "behind", "mostly_ahead", "mostly_behind", "one_seed", "no_spread"],
)
def test_sign_and_p_over_the_seeds_decide(gains, verdict):
    found = judged(results(gains))
    assert found.verdict == verdict
    assert found.test.difference.mean == pytest.approx(sum(gains) / len(gains))
    assert found.test.n == len(gains)


def test_a_seed_is_one_number_whatever_the_sparsities_and_panels():
    """Not one for each: more sparsities or targets make no p smaller by themselves."""
    near, far = {0.0: (9, 9, 9), 0.5: (0.01, 0.03, 0.02), 0.95: (0.05, 0.01, 0.06)}, {}
    far = {s: tuple(3 * gain for gain in gains) for s, gains in near.items()}
    found = judged([*results(near), *results(far, "signs")])
    by_seed = [2 * (a + b) / 2 for a, b in zip(near[0.5], near[0.95], strict=True)]
    assert found.test.n == 3
    assert found.test.difference.mean == pytest.approx(sum(by_seed) / 3)
    assert found.test.t == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)
    assert (found.ahead, found.panels) == (2, 2)


def test_a_panel_that_shows_the_opposite_contradicts():
    data = [*results((0.3, 0.31, 0.32)), *results((-0.05, -0.052, -0.051), "signs")]
    found = judged(data)
    assert (found.verdict, found.against) == ("disagrees", ("signs",))
    mostly = dataclasses.replace(ROBUST, everywhere=False)
    assert judged(data, mostly).verdict == "agrees" and judged(data, mostly).against == ()


def test_contradictions_are_corrected_for_the_number_of_panels():
    gains = (-0.05, -0.03, -0.06)
    p = stats.ttest_1samp(gains, 0).pvalue
    assert 0.025 < p < 0.05
    unclear = (0.4, 0.9, 0.2)
    assert judged([*results(unclear, "a"), *results(gains, "b")]).against == ()
    assert judged(results(gains, "b")).against == ("b",)


def test_sparsities_are_parted_where_high_begins():
    gains = {0.0: (9, 9, 9), 0.5: (0.05, 0.051, 0.052), 0.95: (-0.05, -0.051, -0.052)}
    data = results(gains)
    mild, high = (dataclasses.replace(ROBUST, over=over) for over in (MILD, HIGH))
    assert judged(data, mild).verdict == "agrees" and judged(data, high).verdict == "disagrees"
    more = dataclasses.replace(ROBUST, more=("over", MILD), less=("over", HIGH))
    assert judged(data, more).verdict == "agrees"
    assert judged(data, more).test.difference.mean == pytest.approx(0.102)


def test_gains_are_compared_between_granularities():
    figure = dataclasses.replace(FIGURE, panels=("target", "granularity"))
    data = [
        *results((0.05, 0.06, 0.055), granularity="row", sparsities=(0.5,)),
        *results((0.01, 0.02, 0.014), granularity="channel", sparsities=(0.5,)),
    ]
    more = dataclasses.replace(ROBUST, more=("granularity", "row"), less=("granularity", "channel"))
    less = dataclasses.replace(ROBUST, more=more.less, less=more.more)
    assert judged(data, more, figure).verdict == "agrees"
    assert judged(data, less, figure).verdict == "disagrees"


def test_gains_are_compared_between_far_and_near_targets():
    gains = {"a": 0.01, "b": 0.9, "c": 0.05}
    data = [r for name, g in gains.items() for r in results((g, g + 0.001, g + 0.003), target=name)]
    far = dataclasses.replace(ROBUST, more=("distance", FAR), less=("distance", NEAR))
    found = judged(data, far, distances={"a": 1.0, "b": 2.0, "c": 3.0})
    assert found.test.difference.mean == pytest.approx(0.04)  # b, in the middle, is on no side
    found = judged(data, far, distances={"a": 1.0, "b": 2.0})
    assert found.test.difference.mean == pytest.approx(0.89)
    found = judged(data, far)
    assert found.test is None and found.verdict == "cannot tell"


def test_a_measure_that_was_not_taken_decides_nothing():
    found = judged(results((0.1, 0.2, 0.3)), dataclasses.replace(ROBUST, measure="pgd_top1"))
    assert found.test is None and found.verdict == "cannot tell"


def test_a_figure_agrees_if_all_do_and_disagrees_if_one_does():
    yes, no, open_one = (
        judged(results(gains))
        for gains in ((0.03, 0.031, 0.032), (-0.03, -0.031, -0.032), (0.1, -0.1, 0.0))
    )
    assert overall([yes, yes]) == "agrees"
    assert overall([yes, no, open_one]) == "disagrees"
    assert overall([yes, open_one]) == overall([]) == "cannot tell"


def test_every_figure_of_the_paper_has_a_claim_and_expectations_of_its_lines():
    from rtk.recipes import FIGURES, reproduce

    assert list(PAPER) == FIGURES.names()
    for name, finding in PAPER.items():
        figure = reproduce(name, "smoke", "x").finish.figure
        labels = {line.label for line in figure.lines}
        assert figure.claim == finding.claim and finding.expectations
        for expectation in finding.expectations:
            assert {expectation.line, expectation.against} <= labels
            assert (expectation.more is None) == (expectation.less is None)
            for where in (expectation.more, expectation.less):
                assert where is None or where[0] in (*figure.panels, "over", "distance")
