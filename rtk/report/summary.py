"""Sentences about a study, made from its data: what was run, what came out, what is missing."""

from __future__ import annotations

from collections.abc import Iterable

from rtk.report.study import Study, metric_name
from rtk.report.table import percent


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values)) or "not recorded"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _range(values: list[float]) -> str:
    low, high = f"{min(values):+.1f}", f"{max(values):+.1f}"
    return f"is {low}" if low == high else f"ranges from {low} to {high}"


def _seeds(study: Study) -> str:
    transferred = [result for result in study.results if result.transfer] or study.results
    seeds = sorted({r.seed for r in transferred if r.seed is not None})
    pretrained = study.distinct("pretrain_seed")
    text = f"{_many(len(seeds), 'transfer seed')} ({_listed(seeds)})"
    if not any(result.transfer for result in study.results):
        text = f"{_many(len(seeds), 'seed')} ({_listed(seeds)})"
    text += f", {_many(len(pretrained), 'pretraining seed')} ({_listed(pretrained)})"
    if len(pretrained) == 1 and len(seeds) > 1:
        text += "; the spread does not cover how pretraining itself varies"
    if len(seeds) <= 1 and len(pretrained) <= 1:
        text += "; no spread can be given"
    return text


def _image_counts(study: Study) -> dict[str, list[int]]:
    """Return target -> the different numbers of test images its results are over."""
    counts: dict[str, set[int]] = {}
    for result in study.results:
        if result.images:
            counts.setdefault(result.task, set()).add(result.images)
    return {target: sorted(numbers) for target, numbers in counts.items()}


def _images(study: Study) -> str:
    targets: dict[int, list[str]] = {}
    for target, numbers in _image_counts(study).items():
        for number in numbers:
            targets.setdefault(number, []).append(target)
    return _listed(
        f"{number} of {' and '.join(names)} (one image is {100 / number:.2g} points)"
        for number, names in sorted(targets.items())
    )


def facts(study: Study) -> list[tuple[str, str]]:
    """Return what was run, as (heading, text)."""
    pretrained = sum(result.transfer is None for result in study.results)
    dense = sum(r.transfer is not None and r.scheme == "dense" for r in study.results)
    tickets = len(study.results) - pretrained - dense
    counts = [
        _many(tickets, "transferred ticket"),
        _many(dense, "transferred dense model"),
        _many(pretrained, "pretrained model"),
    ]
    shown = [text for text in counts if not text.startswith("0 ")]
    schemes = [name for name in study.distinct("scheme") if name != "dense"]
    granularities = study.distinct("granularity")
    drawn = f"{_listed(schemes)}; granularity {_listed(granularities)}" if schemes else "dense only"
    targets = {result.task for result in study.results if result.transfer}
    attacks = study.distinct("attack")
    return [
        ("Models evaluated", _listed(shown)),
        ("Source", _listed(study.distinct("source"))),
        ("Network", _listed(study.distinct("arch"))),
        ("Pretraining", _listed(study.variants)),
        ("Tickets", drawn),
        ("Sparsity", _listed(percent(sparsity) for sparsity in study.distinct("sparsity"))),
        ("Target", _listed(sorted(targets or study.distinct("task")))),
        ("Transfer", _listed(study.distinct("transfer")) if tickets + dense else "none"),
        ("Seeds", _seeds(study)),
        ("Test images", _images(study)),
        ("Attack", _listed(attacks) if "pgd_top1" in study.metrics else "none was run"),
    ]


def findings(study: Study) -> list[str]:
    """Return one sentence per variant and metric: how often it is ahead of natural, and by how far.

    Only transferred tickets and dense models count, not the pretrained models themselves.
    """
    sentences = []
    settings = [setting for setting in study.groups if setting.panel.transfer]
    for metric in study.metrics:
        for variant in study.variants:
            found = [study.difference(setting, variant, metric) for setting in settings]
            pairs = [difference for difference in found if difference]
            if not pairs:
                continue
            ahead = sum(pair.mean > 0 for pair in pairs)
            behind = sum(pair.mean < 0 for pair in pairs)
            name = metric_name(metric)
            text = (
                f"{name[0].upper()}{name[1:]}: {variant} is ahead of {study.baseline} in "
                f"{ahead} of {_many(len(pairs), 'setting')} and behind in {behind}; "
                f"the difference {_range([100 * pair.mean for pair in pairs])} points"
            )
            known = [(pair.mean, pair.spread) for pair in pairs if pair.spread is not None]
            if known:
                clear = [mean for mean, error in known if abs(mean) > 2 * error]
                text += (
                    f". It exceeds twice its standard error in {len(clear)} of {len(known)}"
                    f" ({sum(mean > 0 for mean in clear)} ahead, "
                    f"{sum(mean < 0 for mean in clear)} behind)"
                )
            sentences.append(text + ".")
    errors = [
        study.difference(setting, variant, study.metrics_of(setting)[0])
        for setting in settings
        for variant in study.variants
    ]
    counts = [error.n for error in errors if error]
    if counts and max(counts) == 1:
        sentences.append("With one pair each there is no spread: a difference may be chance.")
    counts = [count for count in counts if count > 1]
    if counts and min(counts) < 5:
        sentences.append(
            f"With {min(counts)} pairs a standard error is itself uncertain, and settings share "
            "models: read these counts as a description, not as a test."
        )
    return sentences


def warnings(study: Study) -> list[str]:
    """Return what a reader must know before comparing: gaps, and results that were averaged."""
    texts = []
    if study.baseline is None:
        texts.append("There is no naturally pretrained model here, so no difference is given.")
    elif len(study.variants) == 1:
        texts.append("There is no robustly pretrained model here, so there is nothing to compare.")
    gaps = []
    for setting in study.groups:
        seeds = [
            set(study.values(setting, variant, metric))
            for variant in study.variants
            for metric in study.metrics_of(setting)
        ]
        if any(found != seeds[0] for found in seeds):
            gaps.append(f"{', '.join(setting.panel.names)} at {percent(setting.sparsity)}")
    if gaps:
        texts.append(
            f"{_many(len(gaps), 'setting')} of {len(study.groups)} lack a pretraining, "
            f"a metric or some seeds, first {gaps[0]}: the means there are over different seeds."
        )
    duplicates = study.duplicates
    if duplicates:
        first = " and ".join(result.run for result in duplicates[0][:2])
        texts.append(
            f"{_many(len(duplicates), 'group')} of runs agree in setting and seeds "
            f"and were averaged, first {first}; if they differ in something else, "
            "report them from separate folders."
        )
    texts += [
        f"The results of {target} are over different numbers of test images: {_listed(numbers)}."
        for target, numbers in _image_counts(study).items()
        if len(numbers) > 1
    ]
    return texts
