"""Does what was measured agree with the paper? By one rule, the same for every figure.

An expectation (`rtk.report.paper`) is a difference that should be above 0. For each seed it is
averaged over the sparsities and then over the panels; over the seeds it is put to a paired t-test.

- agrees: the mean is above 0, p < 0.05, and no panel contradicts.
- disagrees: the mean is below 0 and p < 0.05; or a panel contradicts: its own mean over the
  sparsities is below 0 and, corrected for the number of panels after Holm, p < 0.05. (Not where the
  claim itself is about most of the panels only.)
- cannot tell: anything else, a single seed among it.

A figure agrees if all its expectations do, and disagrees if one does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtk.report.figure import (
    LEVEL,
    FigureData,
    Measure,
    PanelKey,
    is_out_of_distribution,
)
from rtk.report.paper import FAR, HIGH, MILD, NEAR, Expectation
from rtk.report.statistics import PairedTest, mean, paired_test
from rtk.report.study import Replicate

AGREES, DISAGREES, UNDECIDED = "agrees", "disagrees", "cannot tell"


@dataclass(frozen=True)
class Judgement:
    """What became of an expectation.

    Args:
        expectation: it.
        verdict: agrees, disagrees or cannot tell.
        test: of the difference over the seeds; None where the runs hold nothing of it.
        against: names of the panels that contradict.
        panels: how many panels it was averaged over.
        ahead: in how many of them the mean is above 0.
    """

    expectation: Expectation
    verdict: str
    test: PairedTest | None
    against: tuple[str, ...]
    panels: int
    ahead: int


@dataclass(frozen=True)
class _Gain:
    panel: PanelKey
    measure: Measure
    sparsity: float
    by_seed: Mapping[Replicate, float]


def judge(data: FigureData, expectations: Sequence[Expectation]) -> list[Judgement]:
    """Put expectations to the test; see the module for the rule."""
    return [_judge(data, expectation) for expectation in expectations]


def overall(judgements: Sequence[Judgement]) -> str:
    """Return the verdict of a figure."""
    verdicts = {judgement.verdict for judgement in judgements}
    if DISAGREES in verdicts:
        return DISAGREES
    return AGREES if verdicts == {AGREES} else UNDECIDED


def _judge(data: FigureData, expectation: Expectation) -> Judgement:
    gains = _gains(data, expectation)
    if expectation.more is not None and expectation.less is not None:
        test = _compared(
            _over_panels([g for g in gains if _is_in(data, g, expectation.more)]),
            _over_panels([g for g in gains if _is_in(data, g, expectation.less)]),
        )
        return Judgement(expectation, _verdict(test, ()), test, (), 1, 0)
    test = _compared(_over_panels(gains), None)
    tests: dict[str, PairedTest] = {}
    for key, own in _by_panel(gains).items():
        found = _compared(_over_sparsities(own), None)
        if found is not None:
            panel, measure = key
            named = data.panel_name(panel)
            tests[named if len(data.measures) == 1 else f"{named}: {measure.name}"] = found
    against = tuple(_contradicting(tests)) if expectation.everywhere else ()
    ahead = sum(found.difference.mean > 0 for found in tests.values())
    return Judgement(expectation, _verdict(test, against), test, against, len(tests), ahead)


def _verdict(test: PairedTest | None, against: Sequence[str]) -> str:
    clear = test is not None and test.t is not None and test.t < LEVEL
    if against or (clear and test is not None and test.difference.mean < 0):
        return DISAGREES
    return AGREES if clear else UNDECIDED


def _gains(data: FigureData, expectation: Expectation) -> list[_Gain]:
    """Return line minus line, seed by seed, at each point that counts."""
    points = {(p.panel, p.measure, p.sparsity, p.line): p for p in data.points}
    found = []
    for (panel, measure, sparsity, line), ours in points.items():
        theirs = points.get((panel, measure, sparsity, expectation.against))
        if line != expectation.line or theirs is None or sparsity == 0:
            continue
        if not _is_measured(data, measure, expectation.measure):
            continue
        if expectation.over != "all" and _part(data, sparsity) != expectation.over:
            continue
        by_seed = {
            seed: value - theirs.values[seed]
            for seed, value in ours.values.items()
            if seed in theirs.values
        }
        if by_seed:
            found.append(_Gain(panel, measure, sparsity, by_seed))
    return found


def _is_measured(data: FigureData, measure: Measure, wanted: str | None) -> bool:
    if wanted is None:
        return measure == data.measures[0]
    return measure.metric == wanted or (wanted == "ood_auc" and is_out_of_distribution(measure))


def _part(data: FigureData, sparsity: float) -> str:
    return HIGH if sparsity >= data.figure.high else MILD


def _is_in(data: FigureData, gain: _Gain, where: tuple[str, str]) -> bool:
    column, value = where
    if column == "over":
        return _part(data, gain.sparsity) == value
    if column == "distance":
        return _side(data, gain.panel) == value
    return gain.panel[data.figure.panels.index(column)] == value


def _side(data: FigureData, panel: PanelKey) -> str | None:
    """Say on which side of the median distance a target lies; the one in the middle on none."""
    targets = {data.target(panel) for panel in data.panels}
    known = sorted(data.distances[t] for t in targets if t in data.distances and t is not None)
    distance = data.distances.get(data.target(panel) or "")
    if distance is None or len(known) < 2:
        return None
    below, above = known[(len(known) - 1) // 2], known[len(known) // 2]
    if below == above == distance:
        return None
    return FAR if distance >= above else NEAR


def _by_panel(gains: Sequence[_Gain]) -> dict[tuple[PanelKey, Measure], list[_Gain]]:
    panels: dict[tuple[PanelKey, Measure], list[_Gain]] = defaultdict(list)
    for gain in gains:
        panels[gain.panel, gain.measure].append(gain)
    return panels


def _over_sparsities(gains: Sequence[_Gain]) -> dict[Replicate, float]:
    return _averaged([gain.by_seed for gain in gains])


def _over_panels(gains: Sequence[_Gain]) -> dict[Replicate, float]:
    return _averaged([_over_sparsities(own) for own in _by_panel(gains).values()])


def _averaged(parts: Sequence[Mapping[Replicate, float]]) -> dict[Replicate, float]:
    """Return each seed's mean over the parts, of the seeds that all parts have."""
    if not parts:
        return {}
    shared = [seed for seed in parts[0] if all(seed in part for part in parts)]
    return {seed: mean(part[seed] for part in parts) for seed in shared}


def _compared(
    ours: Mapping[Replicate, float], theirs: Mapping[Replicate, float] | None
) -> PairedTest | None:
    return paired_test(ours, dict.fromkeys(ours, 0.0) if theirs is None else theirs)


def _contradicting(tests: Mapping[str, PairedTest]) -> list[str]:
    """Return the panels that lie clearly below 0, by Holm's step-down correction."""
    known = sorted((test.t, name) for name, test in tests.items() if test.t is not None)
    found = []
    for place, (p, name) in enumerate(known):
        if p * (len(known) - place) >= LEVEL:
            break
        if tests[name].difference.mean < 0:
            found.append(name)
    return found
