"""Protocols by name: the one place that has the papers' numbers.

- `paper`: Fu et al. 2023 (arXiv 2304.11834); what it leaves open is docs/protocols.md's choice.
- `salman2020`: pretraining and transfer of Salman et al. 2020, whom the paper follows.
- `chen2021`: drawing and finetuning of Chen et al. 2021 (IMP from pretrained networks).
- `doublewin2022`: Chen et al. 2022, "double-win" tickets: A-IMP, and finetuning.

A preset fills in what is not set; docs/protocols.md has all values as a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rtk.config.attack import AttackConfig
from rtk.config.data import DataConfig
from rtk.config.segment import SegmentConfig
from rtk.config.train import TrainConfig
from rtk.errors import RtkError, check_choice


@dataclass(frozen=True)
class Protocol:
    """What a preset says of one thing that a stage does; what it does not need is empty.

    Args:
        train: the optimisation.
        image_size: in pixels; None keeps the set's.
        augment: of training images; auto is what suits the set.
        rates: sets whose learning rate is another than `train`'s.
        attack: what is trained on.
        segment: of segmentation: the network and how it is trained.
        include_first: of drawing: prune the first convolution too.
        rate: of IMP: fraction of what remains that a round prunes.
        rounds: of IMP.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    image_size: int | None = None
    augment: str = "auto"
    rates: Mapping[str, float] = field(default_factory=dict)
    attack: AttackConfig = field(default_factory=AttackConfig)
    segment: SegmentConfig = field(default_factory=SegmentConfig)
    include_first: bool = False
    rate: float = 0.2
    rounds: int = 19

    def train_on(self, images: str) -> TrainConfig:
        """Return the optimisation for a set by its name, with or without classes in brackets."""
        return replace(self.train, lr=self.rates.get(images.split("[")[0], self.train.lr))

    def fill_data(self, data: DataConfig) -> DataConfig:
        """Return `data` with size and augmentation where it leaves them open: null and auto."""
        size = self.image_size if data.image_size is None else data.image_size
        augment = self.augment if data.augment == "auto" else data.augment
        return replace(data, image_size=size, augment=augment)

    def fill_segment(self, segment: SegmentConfig) -> SegmentConfig:
        """Return `segment` with stride and crop where it leaves them open: null."""
        names = ("output_stride", "crop_size")
        missing = {n: getattr(self.segment, n) for n in names if getattr(segment, n) is None}
        return replace(segment, **missing)


def _imagenet(batch_size: int, attack: AttackConfig) -> Protocol:
    train = TrainConfig(epochs=90, batch_size=batch_size, lr=0.1, milestones=(30, 60))
    return Protocol(train, 224, "resized_crop", attack=attack)


def _transfer(lr: float, weight_decay: float, rates: Mapping[str, float] | None = None) -> Protocol:
    train = TrainConfig(
        epochs=150, batch_size=64, lr=lr, weight_decay=weight_decay, milestones=(50, 100)
    )
    return Protocol(train, 224, "resized_crop", rates=rates or {})


def _downstream(batch_size: int, warmup_epochs: float) -> TrainConfig:
    return TrainConfig(
        epochs=182,
        batch_size=batch_size,
        lr=0.1,
        weight_decay=2e-4,
        milestones=(91, 136),
        warmup_epochs=warmup_epochs,
    )


def _upstream(epochs: int, batch_size: int, lr: float) -> TrainConfig:
    return TrainConfig(
        epochs=epochs, batch_size=batch_size, lr=lr, schedule="constant", milestones=()
    )


def _rounds(
    train: TrainConfig,
    attack: AttackConfig | None = None,
    image_size: int | None = 224,
    augment: str = "resized_crop",
    include_first: bool = False,
) -> Protocol:
    return Protocol(
        train,
        image_size,
        augment,
        attack=attack or AttackConfig(),
        include_first=include_first,
    )


def _linf(steps: int, bn_mode: str = "eval") -> AttackConfig:
    # 3 steps are of 2 eps / 3, 10 of eps / 4 = 2/255: `AttackConfig.resolved_step_size`.
    return AttackConfig("pgd", "linf", 8 / 255, steps=steps, bn_mode=bn_mode)


# Radius and norm are to be chosen for the task; Linf and L2 on a grid (docs/protocols.md).
_L2 = AttackConfig("pgd", "l2", 3.0, steps=3)
# Of whole networks; linear evaluation is at 0.01 everywhere.
_FINE = dict.fromkeys(("aircraft", "birdsnap", "flowers", "cars"), 0.01)
_UP, _DOWN = _upstream(10, 256, 1e-4), _downstream(256, 0.0)
_DOUBLE_WIN, _CHEN = _upstream(30, 2048, 5e-4), _downstream(256, 1.0)

PRESETS: Mapping[str, Mapping[str, Protocol]] = {
    "paper": {
        "pretrain none": _imagenet(256, AttackConfig()),
        "pretrain pgd": _imagenet(512, _L2),
        "pretrain smoothing": _imagenet(400, AttackConfig("smoothing", sigma=0.5)),
        "draw omp": Protocol(),
        "draw imp upstream": _rounds(_UP),
        "draw imp downstream": _rounds(_DOWN),
        "draw a-imp upstream": _rounds(_UP, _linf(3)),
        "draw a-imp downstream": _rounds(_DOWN, _linf(10)),
        "draw lmp": _transfer(0.1, 5e-4),
        "transfer finetune": _transfer(0.001, 1e-4, _FINE),
        "transfer linear_bn_update": _transfer(0.01, 1e-4),
        "transfer linear_frozen": _transfer(0.01, 1e-4),
        # 30 epochs of `epoch_steps` = 1000 iterations.
        "transfer segment": Protocol(
            TrainConfig(epochs=30, batch_size=4, lr=0.01, milestones=(18, 22)),
            segment=SegmentConfig(output_stride=16, crop_size=513),
        ),
    },
    "salman2020": {
        "pretrain none": _imagenet(512, AttackConfig()),
        "pretrain pgd": _imagenet(512, _L2),
        "transfer finetune": _transfer(0.001, 5e-4, _FINE),
        "transfer linear_bn_update": _transfer(0.01, 5e-4),
    },
    "chen2021": {
        "draw omp": Protocol(),
        "draw imp upstream": _rounds(_UP),
        "draw imp downstream": _rounds(_CHEN, image_size=None, augment="crop"),
        "transfer finetune": Protocol(_downstream(128, 1.0), augment="crop"),
    },
    "doublewin2022": {
        "draw omp": Protocol(include_first=True),
        "draw imp upstream": _rounds(_DOUBLE_WIN, include_first=True),
        "draw imp downstream": _rounds(_CHEN, include_first=True),
        "draw a-imp upstream": _rounds(_DOUBLE_WIN, _linf(3, "train"), include_first=True),
        "draw a-imp downstream": _rounds(_CHEN, _linf(10, "train"), include_first=True),
        "transfer finetune": _transfer(0.001, 5e-4),
    },
}


def find(preset: str, what: str) -> Protocol:
    """Return what a preset says.

    Args:
        preset: one of `PRESETS`.
        what: a stage and what it does: pretrain and an attack's name, draw, a scheme and, of imp
            and a-imp, the task, or transfer and a mode. E.g. "draw a-imp upstream".

    Raises:
        RtkError: for an unknown preset, or one that says nothing of that.
    """
    check_choice("preset", preset, PRESETS)
    if what not in PRESETS[preset]:
        others = [name for name, protocols in PRESETS.items() if what in protocols]
        stage = what.split()[0]
        own = [name for name in PRESETS[preset] if name.startswith(stage)] or [f"no {stage}"]
        raise RtkError(
            f"preset: expected one with numbers for {what} ({', '.join(others) or 'none has'}), "
            f"got {preset!r}, which has them for {', '.join(own)}; leave it out to set them one by "
            "one"
        )
    return PRESETS[preset][what]
