"""What a scale is: the data, networks, training and attacks of every figure, in one place.

`paper` is the protocol of arXiv 2304.11834, `small` an hour or so of one GPU on 32-pixel images,
`smoke` a minute of a CPU on scikit-learn's digits. What the paper leaves open has a default here,
which docs/protocols.md lists; change it with `dataclasses.replace`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rtk.config import (
    PRESETS,
    AttackConfig,
    DataConfig,
    ModelConfig,
    SegmentConfig,
    TrainConfig,
    round_sparsity,
)
from rtk.registry import Registry


@dataclass(frozen=True)
class Scale:
    """Every setting that figures share.

    Args:
        name: paper, small or smoke.
        note: what a reader of its numbers must know.
        source: what networks are pretrained on.
        targets: downstream sets of all figures but the following.
        many_targets: of Fig. 9 and Tab. II.
        segmentation: of Fig. 7.
        models: the networks; the first stands for the paper's ResNet-18, the last for its
            ResNet-50.
        natural: training of natural pretraining.
        robust: of adversarial pretraining.
        smoothed: of pretraining on Gaussian noise.
        attack: what robust networks are pretrained on in most figures.
        sweep: further strengths, of the first network under linear evaluation, in Fig. 2, 9 and
            Tab. II, which show the best of all.
        sweep_all: the sweep is of all networks, and of finetuning (Fig. 1) too.
        smoothing: the noise of Fig. 6.
        finetune: training of all weights.
        linear: training of a new classifier.
        linear_mode: linear_bn_update or linear_frozen.
        lmp: training of a mask.
        upstream: how a round of IMP trains on the source.
        downstream: how it trains on the target.
        upstream_attack: what A-IMP trains on there.
        downstream_attack: likewise.
        rate: what a round of IMP prunes of the rest.
        rounds: the rounds whose tickets are transferred; the last one ends the drawing.
        segment: training of a segmentation.
        segmentation_settings: its network and windows.
        sparsities: of OMP and LMP, ascending; the dense network comes on top.
        structured: of Fig. 3, at granularities row, kernel and channel.
        high: from this sparsity on it counts as high.
        replicates: (pretraining seed, transfer seed) of each repetition.
        evaluation: the attack of Fig. 8 and Tab. I.
        ood: the other sets of Fig. 8 and Tab. I.
        weights: Inception's weights, for the Fréchet distances.
        features: or another network's run or checkpoint, whose features take their place.
        own_features: without either, measure distances in the first natural network's features.
        source_images: of the distances.
        machine: device and threads.
        networks: those of a figure, by its name, where they are not all of `models` (Fig. 3, 6 and
            7: not the last).
        deep_targets: of the last of several networks in Fig. 1 and 2; None is all `targets`.
        deep_sparsities: likewise; None is all `sparsities`.
        structured_targets: of Fig. 3; None is the first two of `targets`.
        epochs: of transfer and of drawing on a target, by the target's name, where they are not
            those of `finetune`, `linear`, `lmp` and `downstream`: small sets need more of them.
    """

    name: str
    note: str
    source: DataConfig
    targets: tuple[DataConfig, ...]
    many_targets: tuple[DataConfig, ...]
    segmentation: DataConfig
    models: tuple[ModelConfig, ...]
    natural: TrainConfig
    robust: TrainConfig
    smoothed: TrainConfig
    attack: AttackConfig
    sweep: tuple[AttackConfig, ...]
    smoothing: AttackConfig
    finetune: TrainConfig
    linear: TrainConfig
    lmp: TrainConfig
    upstream: TrainConfig
    downstream: TrainConfig
    upstream_attack: AttackConfig
    downstream_attack: AttackConfig
    rate: float
    rounds: tuple[int, ...]
    segment: TrainConfig
    segmentation_settings: SegmentConfig
    sparsities: tuple[float, ...]
    structured: tuple[float, ...]
    replicates: tuple[tuple[int, int], ...]
    evaluation: AttackConfig
    ood: tuple[str, ...]
    sweep_all: bool = False
    linear_mode: str = "linear_bn_update"
    high: float = 0.9
    weights: str | None = None
    features: str | None = None
    own_features: bool = True
    source_images: int = 8000
    machine: Mapping[str, Any] = field(default_factory=dict)
    networks: Mapping[str, tuple[ModelConfig, ...]] = field(default_factory=dict)
    deep_targets: tuple[DataConfig, ...] | None = None
    deep_sparsities: tuple[float, ...] | None = None
    structured_targets: tuple[DataConfig, ...] | None = None
    epochs: Mapping[str, int] = field(default_factory=dict)

    def models_of(self, figure: str, *, last: bool = False) -> tuple[ModelConfig, ...]:
        """Return the networks of a figure, by default all of them, or the last one."""
        return self.networks.get(figure, self.models[-1:] if last else self.models)

    def tickets_of(self, model: ModelConfig) -> tuple[tuple[DataConfig, ...], tuple[float, ...]]:
        """Return the targets and the sparsities of a network in Fig. 1 and 2."""
        targets, sparsities = self.targets, self.sparsities
        if len(self.models) > 1 and model == self.models[-1]:
            targets, sparsities = self.deep_targets or targets, self.deep_sparsities or sparsities
        return targets, sparsities

    def on(self, train: TrainConfig, target: DataConfig) -> TrainConfig:
        """Return how `train` goes on a target: as long as suits it."""
        return replace(train, epochs=self.epochs.get(target.name, train.epochs))

    def strengths(self, model: ModelConfig, linear: bool) -> tuple[AttackConfig, ...]:
        """Return the attacks of pretraining in the figures that choose the best of several."""
        swept = self.sweep if self.sweep_all or (linear and model == self.models[0]) else ()
        return tuple(dict.fromkeys((self.attack, *swept)))


SCALES: Registry[Scale] = Registry("scale")


def _pgd(norm: str, eps: float, steps: int = 3) -> AttackConfig:
    return AttackConfig("pgd", norm=norm, eps=eps, steps=steps)


def _paper() -> Scale:
    paper = PRESETS["paper"]
    robust, smoothed = paper["pretrain pgd"], paper["pretrain smoothing"]
    upstream, downstream = paper["draw a-imp upstream"], paper["draw a-imp downstream"]
    finetune = paper["transfer finetune"]
    cifar = tuple(finetune.fill_data(DataConfig(name)) for name in ("cifar10", "cifar100"))
    others = ("aircraft", "pets", "flowers", "cars", "food", "dtd", "birdsnap", "sun397")
    many = (*others, "caltech101", "caltech256")
    l2 = (0.01, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 3.0, 5.0)
    linf = (0.5, 1, 2, 4, 8)
    return Scale(
        name="paper",
        note="The protocol of arXiv 2304.11834; what it leaves open is in docs/protocols.md.",
        source=DataConfig("imagenet"),
        targets=cifar,
        many_targets=(*cifar, *(DataConfig(name) for name in many)),
        segmentation=DataConfig("voc2012"),
        models=(ModelConfig("resnet18", stem="7x7"), ModelConfig("resnet50", stem="7x7")),
        natural=paper["pretrain none"].train,
        robust=robust.train,
        smoothed=smoothed.train,
        attack=robust.attack,
        sweep=(*(_pgd("l2", eps) for eps in l2), *(_pgd("linf", eps / 255) for eps in linf)),
        sweep_all=True,
        smoothing=smoothed.attack,
        finetune=finetune.train,
        linear=paper["transfer linear_bn_update"].train,
        lmp=paper["draw lmp"].train,
        upstream=upstream.train,
        downstream=downstream.train,
        upstream_attack=upstream.attack,
        downstream_attack=downstream.attack,
        rate=upstream.rate,
        rounds=tuple(range(1, upstream.rounds + 1, 2)),
        segment=paper["transfer segment"].train,
        segmentation_settings=SegmentConfig(),
        sparsities=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.92, 0.95, 0.97, 0.99),
        structured=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
        replicates=((0, 0), (0, 1), (0, 2)),
        evaluation=_pgd("linf", 8 / 255, 20),
        ood=("svhn",),
        own_features=False,
    )


def _small() -> Scale:
    def arrays(name: str, augment: str = "crop", size: int | None = 32) -> DataConfig:
        return DataConfig(f"npz:{name}.npz", image_size=size, augment=augment)

    train = TrainConfig(
        epochs=24, batch_size=512, lr=0.2, schedule="cosine", warmup_epochs=2, weight_decay=5e-4
    )
    finetune = replace(train, epochs=4, batch_size=256, lr=0.02, warmup_epochs=0)
    cifar10, cifar100 = arrays("cifar10"), arrays("cifar100")
    # A mirrored traffic sign, digit or shoe is another thing or none at all.
    gtsrb, *far = (arrays(name, "shift") for name in ("gtsrb", "fashion_mnist", "mnist"))
    resnet18, resnet50 = (ModelConfig(arch, stem="3x3") for arch in ("resnet18", "resnet50"))
    return Scale(
        name="small",
        note=(
            "Reduced: 32-pixel images, Tiny-ImageNet in the place of ImageNet, short training. "
            "It tests the paper's direction, not its numbers."
        ),
        source=arrays("tinyimagenet32"),
        # A near and a far one first, which are also the quickest: Fig. 4, 5 and 8 take these two.
        targets=(cifar100, gtsrb, cifar10),
        many_targets=(cifar100, gtsrb, cifar10, *far),
        segmentation=DataConfig("npz:camvid.npz"),
        models=(resnet18, resnet50),
        natural=train,
        robust=replace(train, epochs=18),
        smoothed=train,
        attack=_pgd("l2", 0.5),
        sweep=(_pgd("l2", 0.25), _pgd("l2", 1.0), _pgd("linf", 2 / 255)),
        smoothing=AttackConfig("smoothing", sigma=0.1),
        finetune=finetune,
        linear=replace(finetune, lr=0.1, weight_decay=1e-4),
        lmp=replace(finetune, lr=0.1),
        upstream=replace(finetune, epochs=2, lr=0.01, schedule="constant"),
        downstream=replace(finetune, lr=0.05),
        upstream_attack=_pgd("l2", 0.5),
        downstream_attack=_pgd("l2", 0.5),
        rate=0.6,
        rounds=(1, 2, 4),
        segment=replace(
            finetune, epochs=6, batch_size=16, lr=0.05, schedule="multistep", milestones=(4, 5)
        ),
        segmentation_settings=SegmentConfig(
            epoch_steps=100, backbone_lr=0.01, backbone_bn_momentum=0.1
        ),
        # What the paper gives numbers of, 70 and 99 %, and two between: evenly spaced in a plot.
        sparsities=(0.7, 0.9, 0.97, 0.99),
        structured=(0.3, 0.6),
        replicates=((0, 0), (1, 1), (0, 2)),
        evaluation=_pgd("linf", 2 / 255, 20),
        ood=("npz:fashion_mnist.npz",),
        networks=dict.fromkeys(("fig4", "fig5", "fig6", "fig7", "fig8"), (resnet18,)),
        deep_targets=(cifar100, gtsrb),
        deep_sparsities=(0.7, 0.9),
        structured_targets=(cifar100,),
        epochs={cifar10.name: 3, gtsrb.name: 8},
    )


def _smoke() -> Scale:
    train = TrainConfig(
        epochs=3, batch_size=128, lr=0.1, schedule="cosine", warmup_epochs=1, weight_decay=5e-4
    )
    finetune = replace(train, epochs=2)
    attack = _pgd("linf", 0.1)  # 8/255 does nothing to 8x8 digits
    target = DataConfig("digits[5-9]")
    return Scale(
        name="smoke",
        note=(
            "8x8 digits, a narrow ResNet-18, seconds of training: it shows that the road works, "
            "not what the paper found."
        ),
        source=DataConfig("digits[0-4]"),
        targets=(target,),
        many_targets=(target, DataConfig("digits[5,6]"), DataConfig("digits[7-9]")),
        segmentation=DataConfig("digits"),
        models=(ModelConfig(stem="3x3", width=0.125),),
        natural=train,
        robust=train,
        smoothed=train,
        attack=attack,
        sweep=(_pgd("l2", 0.5),),
        smoothing=AttackConfig("smoothing", sigma=0.1),
        finetune=finetune,
        linear=finetune,
        lmp=finetune,
        upstream=replace(finetune, epochs=1),
        downstream=replace(finetune, epochs=1),
        upstream_attack=attack,
        downstream_attack=attack,
        rate=0.6,
        rounds=(1, 2),
        segment=replace(finetune, batch_size=16, schedule="constant"),
        segmentation_settings=SegmentConfig(
            epoch_steps=8, backbone_lr=0.02, backbone_bn_momentum=0.1
        ),
        sparsities=(0.5, 0.9),
        structured=(0.5,),
        replicates=((0, 0), (1, 1)),
        high=round_sparsity(2, 0.6),
        evaluation=replace(attack, steps=5),
        ood=("digits[0-4]",),
        source_images=500,
        machine={"device": "cpu", "threads": 1},
    )


for _build in (_paper, _small, _smoke):
    _scale = _build()
    SCALES.register(_scale.name)(_scale)
