import math

import pytest

from rtk.report.statistics import mean, paired_difference, sample_std, summarize


def test_mean_and_std_by_hand():
    # deviations -2, 0, 2: variance 8 / 2
    assert mean([1.0, 3.0, 5.0]) == 3.0
    assert sample_std([1.0, 3.0, 5.0]) == 2.0


@pytest.mark.parametrize("values", [[], [0.4]], ids=["none", "one"])
def test_std_needs_two_values(values):
    assert sample_std(values) is None


def test_summarize_by_hand():
    estimate = summarize([0.9, 0.94])
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.92)
    assert estimate.spread == pytest.approx(0.02 * math.sqrt(2))
    assert estimate.n == 2
    assert summarize([]) is None


def test_paired_difference_takes_common_seeds():
    ours = {0: 0.9, 1: 0.8, 2: 0.7, 9: 0.1}
    theirs = {2: 0.6, 1: 0.6, 0: 0.6, 8: 0.9}
    estimate = paired_difference(ours, theirs)
    assert estimate is not None
    # differences .3, .2, .1: std .1, standard error .1 / sqrt 3
    assert estimate.mean == pytest.approx(0.2)
    assert estimate.spread == pytest.approx(0.1 / math.sqrt(3))
    assert estimate.n == 3


def test_pairing_removes_what_both_share():
    estimate = paired_difference({0: 0.91, 1: 0.51}, {0: 0.90, 1: 0.50})
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.01)
    assert estimate.spread == pytest.approx(0.0, abs=1e-12)


def test_one_pair_has_no_error_and_no_pair_no_difference():
    estimate = paired_difference({0: 0.5}, {0: 0.25})
    assert estimate is not None
    assert (estimate.mean, estimate.spread, estimate.n) == (0.25, None, 1)
    assert paired_difference({0: 0.5}, {1: 0.5}) is None
