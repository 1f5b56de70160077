"""Every figure and table of arXiv 2304.11834 as a recipe, by name.

A recipe takes a scale and a folder and returns complete configurations, and what is drawn of their
results. Figures in one folder share their runs: pretrained networks, tickets, transfers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from rtk.config import AttackConfig, DataConfig, ModelConfig
from rtk.recipes.findings import Findings
from rtk.recipes.recipe import Recipe
from rtk.recipes.road import Road
from rtk.recipes.scale import Scale
from rtk.registry import Registry
from rtk.report import PAPER, Figure, Line

NATURAL = AttackConfig()
ELEMENT = ("element",)
_Build = Callable[[Scale, Path, str | None], Recipe]
FIGURES: Registry[_Build] = Registry("figure")

_PAIR = (
    Line("natural", {"robust": False}),
    Line("robust", {"robust": True}, against="natural"),
)


@FIGURES.register("fig1")
def fig1(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """Finetuning of OMP tickets."""
    road = Road(scale)
    strengths = partial(scale.strengths, linear=False)
    for model in scale.models_of("fig1"):
        _omp(road, (model,), strengths, ("finetune",), *scale.tickets_of(model))
    figure = Figure(
        "fig1",
        "OMP tickets, all weights finetuned",
        PAPER["fig1"].claim,
        _PAIR,
        high=scale.high,
    )
    return _recipe(road, figure, out, data_root)


@FIGURES.register("fig2")
def fig2(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """Linear evaluation of OMP tickets."""
    road = Road(scale)
    strengths = partial(scale.strengths, linear=True)
    for model in scale.models_of("fig2"):
        _omp(road, (model,), strengths, (scale.linear_mode,), *scale.tickets_of(model))
    figure = Figure(
        "fig2",
        "OMP tickets, a linear classifier on fixed weights",
        PAPER["fig2"].claim,
        _PAIR,
        high=scale.high,
    )
    return _recipe(road, figure, out, data_root)


@FIGURES.register("fig3")
def fig3(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """Structured OMP tickets: rows, kernels, channels."""
    road = Road(scale)
    _omp(
        road,
        scale.models_of("fig3", last=True),
        lambda model: (scale.attack,),
        ("finetune", scale.linear_mode),
        scale.structured_targets or scale.targets[:2],
        scale.structured,
        ("row", "kernel", "channel"),
    )
    figure = Figure(
        "fig3",
        "Structured OMP tickets: rows, kernels and channels",
        PAPER["fig3"].claim,
        _PAIR,
        panels=("arch", "target", "transfer", "granularity"),
        high=scale.high,
    )
    return _recipe(road, figure, out, data_root)


@FIGURES.register("fig4")
def fig4(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """IMP and A-IMP, upstream and downstream."""
    road = Road(scale)
    models = scale.models_of("fig4")
    for network in _imp(road, models, ("upstream", "downstream")):
        road.evaluate(network)
    lines = [
        Line(
            f"{name} {short}",
            {"robust": name == "robust", "draw_task": task},
            against=f"natural {short}" if name == "robust" else None,
        )
        for name in ("natural", "robust")
        for task, short in (("upstream", "US"), ("downstream", "DS"))
    ]
    figure = Figure(
        "fig4",
        "IMP and A-IMP tickets, drawn upstream (US) or downstream (DS)",
        PAPER["fig4"].claim,
        tuple(lines),
        high=scale.high,
    )
    return _recipe(road, figure, out, data_root)


@FIGURES.register("fig5")
def fig5(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """LMP: masks learned on the target, under frozen weights."""
    road = Road(scale)
    models = scale.models_of("fig5")
    for network, target, seed in _networks(road, models, (NATURAL, scale.attack)):
        tickets = [road.lmp(network, sparsity, target, seed) for sparsity in scale.sparsities]
        for ticket in (None, *tickets):
            road.evaluate(road.transfer(network, ticket, scale.linear_mode, target, seed))
    figure = Figure(
        "fig5",
        "LMP tickets: masks learned on the target, under frozen weights",
        PAPER["fig5"].claim,
        _PAIR,
        high=scale.high,
    )
    return _recipe(road, figure, out, data_root)


@FIGURES.register("fig6")
def fig6(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """Natural, adversarial and smoothed pretraining."""
    road = Road(scale)
    _omp(
        road,
        scale.models_of("fig6", last=True),
        lambda model: (scale.attack, scale.smoothing),
        ("finetune", scale.linear_mode),
        scale.targets,
        scale.sparsities,
    )
    figure = Figure(
        "fig6",
        "OMP tickets of natural, adversarial and smoothed pretraining",
        PAPER["fig6"].claim,
        (
            Line("natural", {"robust": False}),
            Line("adversarial", {"pretrain": scale.attack.label}, against="natural"),
            Line("smoothing", {"pretrain": scale.smoothing.label}, against="natural"),
        ),
        panels=("arch", "target", "transfer"),
        high=scale.high,
    )
    return _recipe(road, figure, out, data_root)


@FIGURES.register("fig7")
def fig7(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """Segmentation with OMP tickets as backbones."""
    road = Road(scale)
    _omp(
        road,
        scale.models_of("fig7", last=True),
        lambda model: (scale.attack,),
        ("segment",),
        (scale.segmentation,),
        scale.sparsities,
    )
    figure = Figure(
        "fig7",
        "OMP tickets as backbones of a segmentation network",
        PAPER["fig7"].claim,
        _PAIR,
        metrics=("miou",),
        high=scale.high,
    )
    return _recipe(road, figure, out, data_root)


@FIGURES.register("fig8")
def fig8(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """Accuracy, adversarial accuracy and out-of-distribution AUC of IMP and A-IMP tickets."""
    return _properties("fig8", "IMP and A-IMP tickets: other properties", scale, out, data_root)


@FIGURES.register("fig9")
def fig9(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """Linear evaluation of OMP tickets on many targets."""
    title = "OMP tickets on many targets, a linear classifier on fixed weights"
    figure = Figure("fig9", title, PAPER["fig9"].claim, _PAIR, high=scale.high)
    return _many(figure, scale, out, data_root)


@FIGURES.register("tab1")
def tab1(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """The numbers behind Fig. 8."""
    return _properties("tab1", "The numbers behind Fig. 8", scale, out, data_root)


@FIGURES.register("tab2")
def tab2(scale: Scale, out: Path, data_root: str | None = None) -> Recipe:
    """Who wins on each target, by its Fréchet distance from the source."""
    title = "Robust minus natural at high sparsity, by the target's distance from the source"
    figure = Figure("tab2", title, PAPER["tab2"].claim, _PAIR, high=scale.high, scatter=True)
    return _many(figure, scale, out, data_root)


def _properties(name: str, title: str, scale: Scale, out: Path, data_root: str | None) -> Recipe:
    road = Road(scale)
    for network in _imp(road, scale.models_of("fig8"), ("upstream",)):
        road.evaluate(network, scale.evaluation, scale.ood)
    figure = Figure(
        name,
        title,
        PAPER[name].claim,
        (
            Line("natural IMP", {"robust": False}),
            Line("robust A-IMP", {"robust": True}, against="natural IMP"),
        ),
        metrics=("top1", "pgd_top1", "ood_auc"),
        high=scale.high,
    )
    return _recipe(road, figure, out, data_root)


def _many(figure: Figure, scale: Scale, out: Path, data_root: str | None) -> Recipe:
    road = Road(scale)
    # Measured first of all with Inception: where its weights are missing, that shows at once.
    network = scale.features
    if network is None and scale.weights is None and scale.own_features:
        network = road.pretrain(scale.models[0], NATURAL, scale.replicates[0][0])
    road.distances(scale.many_targets, network)
    strengths = partial(scale.strengths, linear=True)
    modes = (scale.linear_mode,)
    _omp(road, scale.models[:1], strengths, modes, scale.many_targets, scale.sparsities)
    return _recipe(road, figure, out, data_root)


def _omp(
    road: Road,
    models: Iterable[ModelConfig],
    attacks: Callable[[ModelConfig], tuple[AttackConfig, ...]],
    modes: tuple[str, ...],
    targets: tuple[DataConfig, ...],
    sparsities: tuple[float, ...],
    granularities: tuple[str, ...] = ELEMENT,
) -> None:
    """Pretrain naturally and on attacks, draw by magnitude, transfer and evaluate everything."""
    for model, (first, seed) in itertools.product(models, road.scale.replicates):
        for attack in (NATURAL, *attacks(model)):
            network = road.pretrain(model, attack, first)
            tickets = [
                road.omp(network, sparsity, granularity)
                for granularity, sparsity in itertools.product(granularities, sparsities)
            ]
            for target, mode in itertools.product(targets, modes):
                for ticket in (None, *tickets):
                    road.evaluate(road.transfer(network, ticket, mode, target, seed))


def _networks(
    road: Road, models: tuple[ModelConfig, ...], attacks: tuple[AttackConfig, ...]
) -> Iterable[tuple[str, DataConfig, int]]:
    """Yield a pretrained network, a target and a transfer seed, for all there are."""
    scale = road.scale
    for model, (first, seed) in itertools.product(models, scale.replicates):
        for target, attack in itertools.product(scale.targets[:2], attacks):
            yield road.pretrain(model, attack, first), target, seed


def _imp(road: Road, models: tuple[ModelConfig, ...], tasks: tuple[str, ...]) -> Iterable[str]:
    """Yield the finetuned tickets of IMP and A-IMP, and the dense networks."""
    scale = road.scale
    for attack in (NATURAL, scale.attack):
        for network, target, seed in _networks(road, models, (attack,)):
            yield road.transfer(network, None, "finetune", target, seed)
            for task in tasks:
                where = None if task == "upstream" else target
                # An upstream ticket is of the network alone: transfers of all seeds share it.
                drawn = road.imp(network, attack != NATURAL, where, 0 if where is None else seed)
                for ticket in drawn.values():
                    yield road.transfer(network, ticket, "finetune", target, seed)


def _recipe(
    road: Road,
    figure: Figure,
    out: Path,
    data_root: str | None,
) -> Recipe:
    return Recipe(
        title=f"{figure.name}: {figure.title}",
        note=road.scale.note,
        folder=out,
        stages=road.stages(out, data_root),
        finish=Findings(
            figure=figure,
            runs=tuple(road.evaluated),
            scale=road.scale,
            names=tuple(FIGURES.names()),
        ),
    )
