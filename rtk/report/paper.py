"""What arXiv 2304.11834 found, a sentence a figure, and how it would show in numbers.

An expectation is the claim as a sign: over the seeds, the mean of a difference is above 0.
`rtk.report.verdict` puts it to the test.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL, MILD, HIGH = "all", "mild", "high"  # sparsities: above 0; below the figure's `high`; from it
FAR, NEAR = "far", "near"  # targets: beyond, or within, the median distance from the source

_Where = tuple[str, str]  # (a column of the panels, a value), or ("over", ...), ("distance", ...)


@dataclass(frozen=True)
class Expectation:
    """A difference that the paper's claim says is above 0.

    Args:
        text: in words.
        line: label of the line that is expected to be ahead.
        against: label of the line behind.
        over: the sparsities that count: all, mild or high.
        measure: top1, pgd_top1, ood_auc or miou; None is the figure's first.
        more: where the difference is expected to be larger, e.g. ("granularity", "row").
        less: and where smaller: then what is tested is how much larger.
        everywhere: whether one panel that shows the opposite contradicts it.
    """

    text: str
    line: str
    against: str
    over: str = ALL
    measure: str | None = None
    more: _Where | None = None
    less: _Where | None = None
    everywhere: bool = True


@dataclass(frozen=True)
class Finding:
    """What the paper found in a figure or table.

    Args:
        claim: in a sentence.
        expectations: what follows for the numbers.
    """

    claim: str
    expectations: tuple[Expectation, ...]


_ROBUST = Expectation("robust tickets are ahead of natural ones", "robust", "natural")
_PROPERTIES = tuple(
    Expectation(f"robust tickets have {what}", "robust A-IMP", "natural IMP", measure=measure)
    for what, measure in (
        ("the higher accuracy", "top1"),
        ("the higher adversarial accuracy", "pgd_top1"),
        ("the higher out-of-distribution ROC-AUC", "ood_auc"),
    )
)

PAPER: dict[str, Finding] = {
    "fig1": Finding(
        "robust tickets win at every sparsity: by 1.95 points for ResNet-50 on CIFAR-100 at 70 %, "
        "by 2.38 for ResNet-18 at 99 %.",
        (_ROBUST,),
    ),
    "fig2": Finding(
        "robust tickets win by far: at least 11.75 points for ResNet-50 on CIFAR-100 up to 92 %.",
        (_ROBUST,),
    ),
    "fig3": Finding(
        "robust tickets win at each granularity and in both ways of transferring, by less the "
        "coarser it is.",
        (
            _ROBUST,
            Expectation(
                "they gain more by rows than by channels",
                "robust",
                "natural",
                more=("granularity", "row"),
                less=("granularity", "channel"),
            ),
        ),
    ),
    "fig4": Finding(
        "robust tickets mostly win; US is best at mild sparsity, DS at high; for ResNet-50 on "
        "CIFAR-100 natural tickets win beyond 95 %.",
        (
            Expectation(
                "robust US tickets are ahead of natural US ones",
                "robust US",
                "natural US",
                everywhere=False,
            ),
            Expectation(
                "robust DS tickets are ahead of natural DS ones",
                "robust DS",
                "natural DS",
                everywhere=False,
            ),
            Expectation("US is ahead of DS at mild sparsity", "robust US", "robust DS", MILD),
            Expectation("DS is ahead of US at high sparsity", "robust DS", "robust US", HIGH),
        ),
    ),
    "fig5": Finding("robust tickets win throughout.", (_ROBUST,)),
    "fig6": Finding(
        "tickets of random smoothing lie between natural and adversarial ones.",
        (
            Expectation(
                "adversarial tickets are ahead of smoothed ones", "adversarial", "smoothing"
            ),
            Expectation("smoothed tickets are ahead of natural ones", "smoothing", "natural"),
        ),
    ),
    "fig7": Finding(
        "robust tickets reach a higher mIoU, most of all at mild sparsity.",
        (
            _ROBUST,
            Expectation(
                "they gain more at mild sparsity than at high",
                "robust",
                "natural",
                more=("over", MILD),
                less=("over", HIGH),
            ),
        ),
    ),
    "fig8": Finding(
        "robust tickets are better in accuracy, adversarial accuracy and ROC-AUC.", _PROPERTIES
    ),
    "fig9": Finding(
        "under high sparsity robust tickets win on 7 of 12 targets, match on 3 and lose on 2: "
        "they win where the target is far from the source.",
        (
            Expectation(
                "at high sparsity robust tickets are ahead on the average target",
                "robust",
                "natural",
                HIGH,
                everywhere=False,
            ),
        ),
    ),
    "tab1": Finding(
        "robust tickets are better in accuracy, adversarial accuracy and ROC-AUC.", _PROPERTIES
    ),
    "tab2": Finding(
        "robust tickets win on all six targets with an FID of 150.92 or more; of the nearer ones "
        "they win on one, match on three and lose on two.",
        (
            Expectation(
                "at high sparsity they gain more on the far targets than on the near ones",
                "robust",
                "natural",
                HIGH,
                more=("distance", FAR),
                less=("distance", NEAR),
            ),
        ),
    ),
}
