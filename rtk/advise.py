"""Advise: robust or natural tickets for a target, by how far it lies from the source.

The finding of arXiv 2304.11834 (Table II): on targets far from ImageNet, by FID, robust tickets
transferred better than natural ones; on near ones they were matched or beaten.
"""

from __future__ import annotations

import dataclasses
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rtk._version import __version__
from rtk.config import AdviseConfig
from rtk.errors import RtkError
from rtk.evaluate import Extractor, Gaussian, frechet_distance, lower_bound, statistics_of
from rtk.evaluate.inception import PYTORCH_FID
from rtk.identity import config_hash, to_dict
from rtk.runs import lock_folder, read_json, write_json
from rtk.train import resolve_device, set_threads


@dataclass(frozen=True)
class Known:
    """A row of the paper's Table II: a target, its FID from ImageNet, and who won there."""

    target: str
    distance: float
    winner: str


TABLE_II = (
    Known("CIFAR-10", 205.04, "robust"),
    Known("Aircraft", 198.33, "robust"),
    Known("CIFAR-100", 190.31, "robust"),
    Known("Pets", 173.23, "robust"),
    Known("Flowers", 153.76, "robust"),
    Known("Cars", 150.92, "robust"),
    Known("Food", 115.95, "match"),
    Known("DTD", 97.33, "natural"),
    Known("Birdsnap", 92.64, "match"),
    Known("SUN397", 67.70, "natural"),
    Known("Caltech-101", 56.71, "robust"),
    Known("Caltech-256", 27.54, "match"),
)
NEAR = max(known.distance for known in TABLE_II if known.winner != "robust")
FAR = min(known.distance for known in TABLE_II if known.distance > NEAR)  # from here on robust won


@dataclass(frozen=True)
class Advice:
    """What the paper's twelve sets say of a distance.

    Args:
        scheme: "robust", "natural or either" or "undecided".
        place: where the distance lies among the twelve.
        evidence: what stands behind the scheme, and how little.
    """

    scheme: str
    place: str
    evidence: str


def advise(distance: float) -> Advice:
    """Return what Table II says of a target at that FID from ImageNet.

    Its thresholds are read off the twelve sets that are then the evidence: there are no others.
    """
    if distance >= FAR:
        far = [known for known in TABLE_II if known.distance >= FAR]
        share = lower_bound(len(far), len(far), 0.05)
        return Advice(
            "robust",
            _place(distance),
            f"robust won on all {len(far)} sets of the paper at {FAR:g} or more; as there are only "
            f"{len(far)}, it may win on as few as {100 * share:.0f} % of such targets (95 % "
            "confidence)",
        )
    if distance > NEAR:
        return Advice(
            "undecided",
            _place(distance),
            f"none of the paper's sets lies between {NEAR:g} and {FAR:g}: beyond, robust won, "
            "nearer it mostly did not; try both",
        )
    near = [known for known in TABLE_II if known.distance <= NEAR]
    won = {name: [k for k in near if k.winner == name] for name in ("natural", "match", "robust")}
    exceptions = ", ".join(f"{known.target} at {known.distance:g}" for known in won["robust"])
    return Advice(
        "natural or either",
        _place(distance),
        f"of the paper's {len(near)} sets at {NEAR:g} or less natural won on "
        f"{len(won['natural'])}, {len(won['match'])} were a match and robust won on "
        f"{len(won['robust'])} ({exceptions}): no clear rule, so try both where it matters",
    )


def _place(distance: float) -> str:
    farther = [known for known in TABLE_II if known.distance > distance]
    nearer = [known for known in TABLE_II if known.distance <= distance]
    if not farther:
        return f"beyond all twelve, the farthest being {_named(TABLE_II[0])}"
    if not nearer:
        return f"nearer than all twelve, the nearest being {_named(TABLE_II[-1])}"
    return f"between {_named(nearer[0])} and {_named(farther[-1])}"


def _named(known: Known) -> str:
    return f"{known.target} ({known.distance:g}, {known.winner})"


def run(config: AdviseConfig) -> Path:
    """Measure the distances that `config` asks for and return the path of the answer, a JSON file.

    Statistics of each set, and the answer, are kept in the folder; what is there is not computed
    again.

    Raises:
        RtkError: for bad settings, an unknown or missing set, or without a network to measure with.
    """
    if not config.data.name or not config.targets:
        raise RtkError("advise: name a source and at least one target, rtk advise SOURCE TARGET")
    device = resolve_device(config.device)
    set_threads(config.threads)
    extractor = _extractor(config)
    folder = Path(config.out)
    lock_folder(folder)
    path = folder / f"advice-{config_hash(config)}.json"
    if config.resume and path.exists():
        if read_json(path).get("features_sha256") == extractor.sha256:
            return path

    def measured(name: str, size: int | None, images: int | None) -> Gaussian:
        return statistics_of(
            replace(config.data, name=name, image_size=size),
            extractor,
            folder,
            images=images,
            seed=config.seed,
            batch_size=config.batch_size,
            device=device,
            resume=config.resume,
        )

    size = config.data.image_size or extractor.image_size
    source = measured(config.data.name, size, config.source_images)
    if extractor.kind == "own":
        size = source.meta["size"][0]
    write_json(
        path,
        {
            "source": config.data.name,
            "source_images": source.images,
            "source_available": source.meta["available"],
            "seed": config.seed,
            "features": extractor.label,
            "features_kind": extractor.kind,
            "features_sha256": extractor.sha256,
            "targets": [
                _answer(name, source, measured(name, size, None), extractor.kind)
                for name in config.targets
            ],
            "config": to_dict(config),
            "config_hash": config_hash(config),
            "rtk": __version__,
        },
    )
    return path


def _extractor(config: AdviseConfig) -> Extractor:
    if config.features is not None:
        return Extractor.of_checkpoint(config.features)
    if config.weights is not None:
        return Extractor.inception(config.weights)
    raise RtkError(
        "advise: the FID needs Inception's weights, which rtk neither brings nor downloads; get "
        f"{PYTORCH_FID} and name the file with --weights PATH, or measure with a network of "
        "your own: --features RUN_OR_FILE (on another scale, so no table applies)"
    )


def _answer(name: str, source: Gaussian, target: Gaussian, kind: str) -> dict[str, Any]:
    distance = frechet_distance(source, target)
    answer: dict[str, Any] = {"target": name, "images": target.images, "distance": distance}
    if kind == "own":
        return answer
    return {**answer, **dataclasses.asdict(advise(distance))}


def describe(path: str | Path) -> str:
    """Return an answer of `run` as text: distances, farthest first, advice, evidence and doubts."""
    answer = read_json(path)
    targets = sorted(answer["targets"], key=lambda target: -target["distance"])
    own = answer["features_kind"] == "own"
    lines = [
        f"source {answer['source']}: {answer['source_images']} of "
        f"{answer['source_available']} training images (seed {answer['seed']})",
        f"distance in {answer['features']}, SHA-256 {answer['features_sha256'][:12]}",
        "",
    ]
    rows = [("target", "images", "distance", "" if own else "advice")]
    for target in targets:
        distance = f"{target['distance']:.4g}" if own else f"{target['distance']:.2f}"
        rows.append((target["target"], str(target["images"]), distance, target.get("scheme") or ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, scheme in rows:
        cells = [name.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=False)]
        lines.append("  ".join([*cells, scheme]).rstrip())
    lines.append("")
    notes = _doubts(answer) if own else [*_evidence(targets), *_doubts(answer)]
    for note in notes:
        lines += textwrap.wrap(note, 100, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines)


def _evidence(targets: list[dict[str, Any]]) -> list[str]:
    places = [f"{target['target']} lies {target['place']}." for target in targets]
    reasons = dict.fromkeys(f"{target['scheme']}: {target['evidence']}." for target in targets)
    return [*places, *reasons]


def _doubts(answer: dict[str, Any]) -> list[str]:
    if answer["features_kind"] == "own":
        notes = [
            "No table applies: the paper's distances are in Inception's features, and these are "
            "others. Its finding gives an order only: the farther a target, the likelier robust "
            "tickets win on it."
        ]
        if len(answer["targets"]) == 1:
            notes.append("Name further targets whose winner you know, to see where this one lies.")
        return notes
    notes = []
    if not answer["source"].startswith("imagenet"):
        notes.append(
            f"The paper's source is ImageNet and yours is {answer['source']}: its distances are "
            "from another place, so take the advice as a guess."
        )
    if answer["features_kind"] != "pytorch-fid":
        notes.append(
            "The weights are not those of the usual FID (pytorch-fid's): distances are on a scale "
            "that is near but not the same, so the place is a rough one."
        )
    notes.append(
        "One paper, twelve sets, one source: a first guess. What decides is a run of both."
    )
    return notes
