"""Every setting of every stage: frozen dataclasses that check themselves.

The command line, the YAML files and the recipes are all made of these. What a value may be is
checked here; whether a *name* is known is checked by the registry that holds the names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rtk.errors import RtkError, check_choice
from rtk.granularity import Granularity

SCOPES = ("global", "layer")
SCORE_INITS = ("weight_rank", "kaiming")
ITERATIVE = ("imp", "a-imp")
TASKS = ("upstream", "downstream")
NORMS = ("linf", "l2")
TRANSFER_MODES = ("finetune", "linear_bn_update", "linear_frozen", "segment")
SEGMENTATION_NETWORKS = ("deeplabv3plus", "fcn")


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise RtkError(f"{name}: expected {expected}, got {got!r}")


def check_sparsity(sparsity: float | None, granularity: str = "element") -> float:
    """Return `sparsity` if it lies in [0, 1), else raise an RtkError.

    N:M fixes it at 1 - N / M, which is returned where `sparsity` is None or that, to a thousandth.
    """
    fixed = Granularity.parse(granularity).sparsity
    if fixed is not None:
        if sparsity is not None and not abs(sparsity - fixed) < 1e-3:
            raise RtkError(
                f"sparsity: expected {fixed:.4g}, which is what {granularity} means, got "
                f"{sparsity!r}; leave it out, or take another granularity to choose it"
            )
        return fixed
    _require(
        sparsity is not None and 0 <= sparsity < 1,
        "sparsity",
        "a fraction of zeros in [0, 1), e.g. 0.8 for 80 %",
        sparsity,
    )
    assert sparsity is not None
    return sparsity


def check_rounds(
    sparsity: float | None = None, rounds: int | None = None, rate: float = 0.2
) -> tuple[float, int]:
    """Return the last sparsity and the number of rounds of iterative pruning.

    A round prunes `rate` of what remains, so that r rounds leave (1 - rate) ** r. A sparsity takes
    as many rounds as reach it, and the last one stops there. With neither, 19 rounds, which leave
    1.4 % at the default rate (Chen et al. 2021).

    Raises:
        RtkError: for a value out of range, or a sparsity that is not reached in the last of
            `rounds`.
    """
    _require(0 < rate < 1, "rate", "the fraction of the rest that a round prunes, in (0, 1)", rate)
    _require(rounds is None or rounds >= 1, "rounds", "at least 1 round of pruning", rounds)
    if sparsity is None:
        rounds = 19 if rounds is None else rounds
        sparsity = round_sparsity(rounds, rate)
        _require(sparsity < 1, "rounds", f"so few of rate {rate:.4g} that weights remain", rounds)
        return sparsity, rounds
    check_sparsity(sparsity)
    _require(sparsity > 0, "sparsity", "more than 0, which needs no round of pruning", sparsity)
    # What stands for a whole number of rounds must not take one more by its last digits.
    needed = max(1, math.ceil(math.log1p(-sparsity) / math.log1p(-rate) - 1e-6))
    if rounds not in (None, needed) and sparsity != round_sparsity(rounds, rate):  # type: ignore[arg-type]
        raise RtkError(
            f"sparsity {sparsity:g} is reached in {needed} rounds that prune {rate:.4g} of the "
            f"rest each, got rounds {rounds!r}; give one of them"
        )
    return sparsity, needed if rounds is None else rounds


def round_sparsity(rounds: int, rate: float) -> float:
    """Return the sparsity after so many rounds that each prune `rate` of what remains.

    To 12 digits, so that two rounds of 0.2 are 0.36 in a table.
    """
    return round(1 - (1 - rate) ** rounds, 12)


@dataclass(frozen=True)
class DataConfig:
    """Which images a stage reads.

    Args:
        name: digits, cifar10, food, ... (`rtk data list` shows all), npz:PATH or folder:PATH; a
            class subset in brackets, e.g. digits[0-4] or cifar10[0,2,5-7].
        root: folder that holds the named sets (else RTK_DATA, else ~/.cache/rtk/data).
        image_size: height and width in pixels that images are resized to; null keeps the set's.
        augment: none, flip, crop (pad by an eighth, random crop, flip), shift (the crop without
            the flip, for digits and signs), resized_crop (RandomResizedCrop and flip), or auto:
            what suits the set.
        storage: of image files: memory (decoded once), stream (decoded for each batch, crops taken
            from whole images) or auto: named sets stream above 64 pixels, the rest is in memory.
        skip_bad: leave out images that cannot be decoded and say so, instead of stopping; each
            image is decoded once beforehand.
        workers: processes that decode streamed images; null is one a CPU, at most 16, 0 is none.
        download: fetch a named set that is missing, where that is possible.
    """

    name: str = "digits"
    root: str | None = None
    image_size: int | None = None
    augment: str = "auto"
    storage: str = "auto"
    skip_bad: bool = False
    workers: int | None = None
    download: bool = False

    def __post_init__(self) -> None:
        check_choice("storage", self.storage, ("auto", "memory", "stream"))
        _require(
            self.workers is None or self.workers >= 0,
            "data.workers",
            "a number of processes >= 0",
            self.workers,
        )
        _require(
            self.image_size is None or self.image_size > 0,
            "data.image_size",
            "a positive number of pixels",
            self.image_size,
        )
        check_choice(
            "augmentation", self.augment, ("auto", "none", "flip", "crop", "shift", "resized_crop")
        )


@dataclass(frozen=True)
class ModelConfig:
    """Which network is trained.

    Args:
        arch: resnet18 or resnet50; or another network by name: a torchvision one, e.g. densenet121
            (torchvision:densenet121 in full), or timm:NAME.
        stem: of the ResNets: 3x3 (small images, no max-pool), 7x7 (ImageNet) or auto: 3x3 up to 64
            pixels. Other networks have one of their own, which auto stands for.
        width: multiplier of every layer's channels, e.g. 0.25 for a small machine; of the ResNets.
    """

    arch: str = "resnet18"
    stem: str = "auto"
    width: float = 1.0

    def __post_init__(self) -> None:
        check_choice("stem", self.stem, ("auto", "3x3", "7x7", "own"))
        _require(self.width > 0, "model.width", "a positive multiplier", self.width)


@dataclass(frozen=True)
class AttackConfig:
    """How adversarial examples are made; the radius is in [0, 1] pixel scale.

    Args:
        name: none, pgd, fgsm, fast, free (training only), apgd-ce, square, smoothing (Gaussian
            noise), autoattack or foolbox:CLASS; docs/attacks.md tells them apart.
        norm: linf or l2.
        eps: radius, e.g. 0.0314 (8/255).
        step_size: length of a step of pgd, fast or free; null is, for pgd, 2 eps / 3 where steps
            <= 3 and eps / 4 elsewhere, for fast 1.25 eps, for free eps.
        steps: number of gradient steps of pgd and apgd-ce (which wants 100 in an evaluation).
        random_start: start at a random point of the ball instead of at the image (pgd).
        bn_mode: batch norm while attacking: eval (running statistics) or train (batch statistics).
        restarts: random starts of pgd and apgd-ce; each image keeps the worst.
        keep_best: pgd keeps each image's iterate with the highest loss, not its last.
        early_stop: pgd keeps an image once it is misclassified (evaluation only).
        queries: of square, for each image.
        replays: of free: weight and image updates on each batch.
        sigma: of smoothing: standard deviation of the noise.
    """

    name: str = "none"
    norm: str = "linf"
    eps: float = 8 / 255
    step_size: float | None = None
    steps: int = 3
    random_start: bool = True
    bn_mode: str = "eval"
    restarts: int = 1
    keep_best: bool = False
    early_stop: bool = False
    queries: int = 5000
    replays: int = 4
    sigma: float = 0.25

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        check_choice("bn_mode", self.bn_mode, ("eval", "train"))
        _require(self.eps >= 0, "attack.eps", "a radius >= 0 in [0, 1] pixel scale", self.eps)
        _require(
            self.step_size is None or self.step_size >= 0,
            "attack.step_size",
            "a length >= 0",
            self.step_size,
        )
        _require(self.steps >= 0, "attack.steps", "a number of steps >= 0", self.steps)
        _require(self.restarts >= 1, "attack.restarts", "at least 1 start", self.restarts)
        _require(
            self.restarts == 1 or self.random_start,
            "attack.restarts",
            "1 without random_start, as starts from the image are all alike",
            self.restarts,
        )
        _require(self.queries >= 0, "attack.queries", "a number of queries >= 0", self.queries)
        _require(self.replays >= 1, "attack.replays", "at least 1 pass a batch", self.replays)
        _require(self.sigma >= 0, "attack.sigma", "a deviation >= 0 in pixel scale", self.sigma)

    @property
    def resolved_step_size(self) -> float:
        """`step_size`, or its default.

        For pgd 2 eps / 3 (Salman et al. 2020) or eps / 4, for fast 1.25 eps (Wong et al. 2020), for
        free eps (Shafahi et al. 2019).
        """
        if self.step_size is not None:
            return self.step_size
        if self.name in ("fast", "free"):
            return 1.25 * self.eps if self.name == "fast" else self.eps
        return 2 * self.eps / 3 if self.steps <= 3 else self.eps / 4

    @property
    def label(self) -> str:
        """A short name for tables and files: natural, pgd-linf-0.1, smoothing-0.25."""
        if self.name == "none":
            return "natural"
        if self.name == "smoothing":
            return f"smoothing-{self.sigma:.4g}"
        return f"{self.name.replace(':', '-')}-{self.norm}-{self.eps:.4g}"

    @property
    def summary(self) -> str:
        """The label and how hard the attack tries: pgd-linf-0.1, 20 steps, 5 restarts."""
        parts = [self.label]
        if self.name in ("pgd", "apgd-ce"):
            parts.append(f"{self.steps} steps")
            if self.restarts > 1:
                parts.append(f"{self.restarts} restarts")
        if self.name == "square":
            parts.append(f"{self.queries} queries")
        parts += [name for name in ("keep_best", "early_stop") if getattr(self, name)]
        return ", ".join(parts).replace("keep_best", "best iterate").replace("_", " ")


@dataclass(frozen=True)
class TrainConfig:
    """How a network is trained: SGD, its schedule and its arithmetic.

    Args:
        epochs: passes over the training images.
        batch_size: images a step; under torchrun those of all processes together.
        lr: learning rate at the start (after warm-up).
        momentum: of SGD.
        weight_decay: L2 penalty of SGD.
        nesterov: use Nesterov momentum.
        schedule: multistep, cosine or constant.
        milestones: epochs at which multistep multiplies the rate by gamma.
        gamma: factor of multistep.
        warmup_epochs: epochs over which the rate rises linearly from 0.
        label_smoothing: of the cross-entropy.
        amp: auto (bf16 on a GPU), bf16 or none (fp32).
        channels_last: auto (on a GPU), yes or no.
        graph: auto (on a GPU, one CUDA graph a training step where it can be captured) or no.
        eval_every: epochs between two looks at the test images; 0 looks once, at the end.
        checkpoint_seconds: seconds between two checkpoints inside an epoch (one also after each).
    """

    epochs: int = 90
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    schedule: str = "multistep"
    milestones: tuple[int, ...] = (30, 60)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    amp: str = "auto"
    channels_last: str = "auto"
    graph: str = "auto"
    eval_every: int = 0
    checkpoint_seconds: float = 300.0

    def __post_init__(self) -> None:
        _require(self.epochs >= 0, "train.epochs", "a number of epochs >= 0", self.epochs)
        _require(
            self.batch_size > 1,
            "train.batch_size",
            "at least 2 images, which batch norm needs",
            self.batch_size,
        )
        _require(self.lr >= 0, "train.lr", "a learning rate >= 0", self.lr)
        _require(0 <= self.momentum < 1, "train.momentum", "a value in [0, 1)", self.momentum)
        _require(self.weight_decay >= 0, "train.weight_decay", "a value >= 0", self.weight_decay)
        _require(
            not self.nesterov or self.momentum > 0,
            "train.nesterov",
            "momentum > 0 beside it",
            self.momentum,
        )
        _require(
            0 <= self.label_smoothing < 1,
            "train.label_smoothing",
            "a value in [0, 1)",
            self.label_smoothing,
        )
        _require(self.warmup_epochs >= 0, "train.warmup_epochs", ">= 0", self.warmup_epochs)
        _require(self.eval_every >= 0, "train.eval_every", ">= 0 epochs", self.eval_every)
        check_choice("schedule", self.schedule, ("multistep", "cosine", "constant"))
        check_choice("amp", self.amp, ("auto", "bf16", "none"))
        check_choice("channels_last", self.channels_last, ("auto", "yes", "no"))
        check_choice("graph", self.graph, ("auto", "no"))


@dataclass(frozen=True)
class StageConfig:
    """What every stage has.

    Args:
        out: folder of this run; everything the stage makes lands in it.
        seed: of initialisation, data order, augmentation and random starts.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N; under torchrun auto and cuda are
            one GPU a process.
        threads: of the CPU; 0 leaves it to torch. One is often fastest for tiny networks.
        resume: go on where an earlier, stopped run in the same folder was; else start over.
    """

    out: str = "runs/run"
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    resume: bool = True

    def __post_init__(self) -> None:
        _require(self.threads >= 0, "threads", "a number of CPU threads >= 0", self.threads)
        _require(0 <= self.seed < 2**63, "seed", "a whole number in [0, 2**63)", self.seed)

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sections (`train`, ...) whose defaults depend on other settings.

        Args:
            values: plain settings by name, as a file or the command line has them.
        """
        return {}


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """Train a network on a source task, naturally or on adversarial examples.

    Args:
        data: the source images.
        model: the network.
        train: the optimisation.
        attack: none for natural pretraining, pgd for robust pretraining; fast and free are cheaper,
            smoothing trains for certificates.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_training_attack(self.attack)


def _check_training_attack(attack: AttackConfig) -> None:
    _require(
        not attack.early_stop,
        "attack.early_stop",
        "false while training, as it waits for the GPU in every iteration",
        attack.early_stop,
    )


@dataclass(frozen=True)
class ConvertConfig(StageConfig):
    """Turn a published checkpoint into one of rtk's, and the masks in it into a ticket.

    Args:
        file: the checkpoint: safetensors, or what torch.save wrote (.pt, .pth, .ckpt, .tar).
        format: robustness, prune, hidden-networks, smoothing, torchvision or timm; auto tells them
            apart by the names of the tensors. docs/checkpoints.md says which is whose.
        arch: the network; null is the ResNet that the tensors fit, or what the file says.
        entry: of the file, the entry that holds the network; null is model or state_dict.
        sparsity: of hidden-networks: fraction of each layer that is pruned by its scores; null
            makes no ticket of them.
        mean: of the images' channels in [0, 1] scale; null is the file's own, else what its kind of
            network is trained with, which is said.
        std: of the channels, likewise.
        source: what the network was trained on, for reports; null is imagenet for 1000 classes,
            else unknown.
        pretrain: how, for reports, e.g. natural or pgd-l2-3; null reads it off names such as
            resnet50_l2_eps3.ckpt.
        trust: open a pickle that can run code, in a process of its own, as you trust its author.
    """

    file: str = ""
    format: str = "auto"
    arch: str | None = None
    entry: str | None = None
    sparsity: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    source: str | None = None
    pretrain: str | None = None
    trust: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.file), "file", "the path of a checkpoint", self.file)
        _require(
            (self.mean is None) == (self.std is None),
            "mean, std",
            "both or neither, as the file's own are left out with either",
            (self.mean, self.std),
        )
        for name in ("mean", "std"):
            values = getattr(self, name)
            _require(
                values is None or len(values) == 3, name, "3 numbers, e.g. [0.5,0.5,0.5]", values
            )
        if self.sparsity is not None:
            check_sparsity(self.sparsity)


def lmp_train() -> TrainConfig:
    """What learns a mask: 150 epochs, batch 64, lr 0.1 (/ 10 at 50 and 100), wd 5e-4 (RST)."""
    return TrainConfig(epochs=150, batch_size=64, lr=0.1, weight_decay=5e-4, milestones=(50, 100))


def imp_train(task: str = "downstream", preset: str = "chen2021") -> TrainConfig:
    """How a round of IMP trains.

    Upstream 10 epochs at lr 1e-4 (chen2021) or 30 at 5e-4 (doublewin2022), at a constant rate;
    downstream 182 epochs at lr 0.1 (/ 10 at 91 and 136), wd 2e-4 (chen2021, which doublewin2022
    stands for too). Batch 256. Upstream, the batch and the schedule are choices of ours.

    Raises:
        RtkError: for an unknown task or preset.
    """
    check_choice("task", task, TASKS)
    check_choice("preset", preset, ("chen2021", "doublewin2022"))
    if task == "downstream":
        return TrainConfig(
            epochs=182, batch_size=256, lr=0.1, weight_decay=2e-4, milestones=(91, 136)
        )
    epochs, lr = (10, 1e-4) if preset == "chen2021" else (30, 5e-4)
    return TrainConfig(epochs=epochs, batch_size=256, lr=lr, schedule="constant", milestones=())


def imp_attack(task: str = "downstream") -> AttackConfig:
    """What a round of A-IMP trains on: Linf 8/255 from a random start (doublewin2022).

    Upstream 3 steps of 2 eps / 3, downstream 10 of eps / 4 = 2/255.

    Raises:
        RtkError: for an unknown task.
    """
    steps = 3 if check_choice("task", task, TASKS) == "upstream" else 10
    return AttackConfig(name="pgd", eps=8 / 255, steps=steps)


_AS_THE_SCHEME = lmp_train()  # a DrawConfig that holds this very object was given no `train`


def _scheme_train() -> TrainConfig:
    return _AS_THE_SCHEME


def _unnamed() -> DataConfig:
    return DataConfig(name="")


@dataclass(frozen=True)
class DrawConfig(StageConfig):
    """Draw a ticket, a sparse subnetwork, out of a pretrained network.

    Args:
        checkpoint: the pretrained network: a run's folder or its checkpoint.safetensors.
        scheme: omp (one-shot magnitude pruning), lmp (a mask learned on a task's images, under
            frozen weights), imp (rounds of training, pruning and rewinding) or a-imp (imp on
            adversarial examples).
        sparsity: fraction of the prunable weights that become zero, in [0, 1); null is 0.8, or
            what N:M means, or what the rounds of imp leave.
        granularity: element, row, kernel, channel, block-64 (or block-KxC: tiles of output and
            input channels) or 2:4 (or another N:M, of omp only); docs/pruning.md tells them apart.
        scope: global (one ranking over all layers) or layer (the same sparsity in each); null is
            layer for lmp, else global.
        include_first: prune the first convolution too.
        data: of lmp and imp: the task's images; of imp upstream, no name takes those of the
            pretraining.
        train: of lmp: how scores and head are trained; of imp: how each round trains. By default as
            the scheme's papers do (and imp's task).
        score_init: of lmp: where scores start, weight_rank (random values in the order of the
            weights' magnitudes) or kaiming (random).
        save_scores: of lmp: keep the scores beside the ticket, in scores.safetensors.
        task: of imp: upstream (the network keeps its head, and is pruned before any training) or
            downstream (a new head, trained before it is pruned); null is downstream where data has
            a name.
        rounds: of imp; null is as many as reach the sparsity, or 19.
        rate: of imp: fraction of what remains that a round prunes; null is 0.2.
        attack: of imp: what the rounds train on; with one, imp is a-imp.
    """

    checkpoint: str = ""
    scheme: str = "omp"
    sparsity: float | None = None
    granularity: str = "element"
    scope: str | None = None
    include_first: bool = False
    data: DataConfig = field(default_factory=_unnamed)
    train: TrainConfig = field(default_factory=_scheme_train)
    score_init: str = "weight_rank"
    save_scores: bool = False
    task: str | None = None
    rounds: int | None = None
    rate: float | None = None
    attack: AttackConfig = field(default_factory=AttackConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        granularity = Granularity.parse(self.granularity)
        _require(
            self.scheme not in ("lmp", *ITERATIVE) or granularity.n_of_m is None,
            "granularity",
            f"element, row, kernel, channel or a block for {self.scheme}",
            granularity.name,
        )
        # Stored as what they stand for: "block" and "block-64" are one run, as null and 0.8 are.
        object.__setattr__(self, "granularity", granularity.name)
        if self.scheme in ITERATIVE:
            self._resolve_rounds()
        else:
            self._refuse_rounds()
            asked = self.sparsity
            if asked is None and granularity.sparsity is None:
                asked = 0.8
            object.__setattr__(self, "sparsity", check_sparsity(asked, granularity.name))
        if self.scope is None:
            object.__setattr__(self, "scope", "layer" if self.scheme == "lmp" else "global")
        check_choice("scope", str(self.scope), SCOPES)
        check_choice("score_init", self.score_init, SCORE_INITS)
        _require(
            self.scheme != "lmp" or bool(self.data.name),
            "data.name",
            "the images that lmp learns a mask on, e.g. --data.name digits[5-9]",
            self.data.name,
        )

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        scheme, data = values.get("scheme"), values.get("data")
        if scheme not in ITERATIVE:
            return {}
        task = values.get("task") or _task_of(data.get("name") if isinstance(data, dict) else None)
        attack = imp_attack(task)
        if scheme == "imp":
            attack = replace(attack, name="none")
        return {"train": imp_train(task), "attack": attack}

    def _resolve_rounds(self) -> None:
        """Make the settings of imp what they stand for."""
        task = _task_of(self.data.name) if self.task is None else self.task
        check_choice("task", task, TASKS)
        _require(
            task == "upstream" or bool(self.data.name),
            "data.name",
            f"the images that {self.scheme} trains on downstream, e.g. --data.name digits[5-9]",
            self.data.name,
        )
        rate = 0.2 if self.rate is None else self.rate
        sparsity, rounds = check_rounds(self.sparsity, self.rounds, rate)
        attack = self.attack
        if attack.name == "none":
            _require(
                self.scheme == "imp" or attack == AttackConfig(),
                "attack.name",
                "an attack for a-imp, e.g. pgd",
                attack.name,
            )
            attack = imp_attack(task) if self.scheme == "a-imp" else AttackConfig()
        _check_training_attack(attack)
        resolved = {
            "scheme": "imp" if attack.name == "none" else "a-imp",
            "task": task,
            "rate": rate,
            "sparsity": sparsity,
            "rounds": rounds,
            "attack": attack,
            "train": imp_train(task) if self.train is _AS_THE_SCHEME else self.train,
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)

    def _refuse_rounds(self) -> None:
        """Raise an RtkError for a setting of imp in another scheme."""
        given = {name: getattr(self, name) for name in ("task", "rounds", "rate")}
        given["attack.name"] = None if self.attack.name == "none" else self.attack.name
        for name, value in given.items():
            if value is not None:
                raise RtkError(
                    f"{name} is a setting of imp, got {value!r} beside scheme {self.scheme}; "
                    "leave it out, or take --scheme imp"
                )


def _task_of(images: str | None) -> str:
    """Return imp's task where it is not given: the pretraining's, where no images are."""
    return "downstream" if images else "upstream"


def _transfer_train() -> TrainConfig:
    """The paper's finetuning: 150 epochs, batch 64, lr divided by 10 at 50 and 100."""
    return TrainConfig(epochs=150, batch_size=64, lr=0.01, milestones=(50, 100))


def segment_train() -> TrainConfig:
    """The paper's segmentation, with CVL's rate for the head.

    30 epochs of `SegmentConfig.epoch_steps` = 1000 iterations, batch 4, lr / 10 after 18 and 22.
    """
    return TrainConfig(epochs=30, batch_size=4, lr=0.01, milestones=(18, 22))


_AS_THE_MODE = _transfer_train()  # the `train` of a TransferConfig that was given none


def _mode_train() -> TrainConfig:
    return _AS_THE_MODE


@dataclass(frozen=True)
class SegmentConfig:
    """Semantic segmentation with a ticket as its backbone.

    Args:
        network: deeplabv3plus or fcn.
        output_stride: pixels of the image between two of the backbone's last features: 16, 8 or 32
            with the 7x7 stem, 4, 2 or 8 with the 3x3 stem; null is the first of them.
        crop_size: side in pixels of the windows that are trained on; null is 513 with the 7x7 stem,
            the images' shorter side with the 3x3 stem.
        epoch_steps: iterations that make an epoch, by which epochs and milestones of train count;
            null is one pass over the images.
        backbone_lr: learning rate of the pretrained weights; train.lr is the head's, and the
            schedule is the same for both.
        backbone_bn_momentum: share of a batch in the running statistics of the backbone.
    """

    network: str = "deeplabv3plus"
    output_stride: int | None = None
    crop_size: int | None = None
    epoch_steps: int | None = 1000
    backbone_lr: float = 0.001
    backbone_bn_momentum: float = 0.01

    def __post_init__(self) -> None:
        check_choice("segmentation network", self.network, SEGMENTATION_NETWORKS)
        for name in ("output_stride", "crop_size", "epoch_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"segment.{name}", "at least 1, or null", value)
        _require(self.backbone_lr >= 0, "segment.backbone_lr", "a rate >= 0", self.backbone_lr)
        _require(
            0 <= self.backbone_bn_momentum <= 1,
            "segment.backbone_bn_momentum",
            "a share in [0, 1]",
            self.backbone_bn_momentum,
        )


@dataclass(frozen=True)
class TransferConfig(StageConfig):
    """Transfer a ticket to a downstream task.

    Args:
        checkpoint: the pretrained network that the ticket was drawn from.
        ticket: the ticket: a run's folder or its ticket.safetensors; null transfers it dense.
        mode: finetune (all weights), linear_bn_update (a new classifier, batch norm in train
            mode), linear_frozen (a new classifier on frozen eval-mode features) or segment (all
            weights and a segmentation head).
        data: the downstream images; of segment: npz:PATH with masks, voc2012 or voc2012+sbd.
        train: the optimisation; by default as the mode's papers do.
        segment: of segment: the network and how it is trained.
    """

    checkpoint: str = ""
    ticket: str | None = None
    mode: str = "finetune"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=_mode_train)
    segment: SegmentConfig = field(default_factory=SegmentConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("transfer mode", self.mode, TRANSFER_MODES)
        if self.mode != "segment":
            _require(
                self.segment == SegmentConfig(),
                "segment",
                f"no such settings beside mode {self.mode}; they are of --mode segment",
                self.segment,
            )
            return
        if self.train is _AS_THE_MODE:
            object.__setattr__(self, "train", segment_train())
        _require(
            self.train.lr > 0,
            "train.lr",
            "a rate > 0 of the head, beside segment.backbone_lr",
            self.train.lr,
        )

    @classmethod
    def defaults_for(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        return {"train": segment_train()} if values.get("mode") == "segment" else {}


def _pgd20() -> AttackConfig:
    return AttackConfig(name="pgd", eps=8 / 255, steps=20)  # its step is eps / 4 = 2 / 255


@dataclass(frozen=True)
class CertifyConfig:
    """Certified accuracy of the network smoothed by Gaussian noise (Cohen et al. 2019), in L2.

    Args:
        sigma: standard deviation of the noise in [0, 1] pixel scale, the one of the pretraining;
            null certifies nothing.
        n0: noisy copies of an image that select its class.
        n: noisy copies that estimate how often that class wins.
        alpha: probability that a certificate is wrong.
        images: how many test images are certified, evenly spaced; null is all.
        batch_size: noisy copies at a time.
        radii: L2 radii at which certified accuracy is reported.
    """

    sigma: float | None = None
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    images: int | None = 500
    batch_size: int = 1000
    radii: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        _require(
            self.sigma is None or self.sigma > 0,
            "certify.sigma",
            "a deviation > 0 in pixel scale, or null",
            self.sigma,
        )
        for name in ("n0", "n", "batch_size"):
            _require(getattr(self, name) >= 1, f"certify.{name}", "at least 1", getattr(self, name))
        _require(0 < self.alpha < 1, "certify.alpha", "a probability in (0, 1)", self.alpha)
        _require(
            self.images is None or self.images >= 1,
            "certify.images",
            "at least 1 image, or null",
            self.images,
        )
        _require(
            all(radius >= 0 for radius in self.radii), "certify.radii", "radii >= 0", self.radii
        )


@dataclass(frozen=True)
class EvaluateConfig(StageConfig):
    """Measure accuracy, natural, adversarial and certified, on the test images.

    Args:
        checkpoint: the network: a run's folder or its checkpoint.safetensors.
        data: the images; an empty name takes those the network was trained on.
        attack: pgd for adversarial accuracy (PGD-20, Linf 8/255 by default), apgd-ce or square for
            a stronger check, or none.
        certify: certified accuracy of the smoothed network; none by default.
        ood: other sets, e.g. [svhn,cifar100], whose test images are told from these by the
            network's confidence (ROC-AUC); names in brackets go in quotes, '["digits[5-9]"]'.
        batch_size: images at a time.
    """

    checkpoint: str = ""
    data: DataConfig = field(default_factory=lambda: DataConfig(name=""))
    attack: AttackConfig = field(default_factory=_pgd20)
    certify: CertifyConfig = field(default_factory=CertifyConfig)
    ood: tuple[str, ...] = ()
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.batch_size > 0, "batch_size", "at least 1 image", self.batch_size)
        _require(
            all(self.ood) and len(set(self.ood)) == len(self.ood),
            "ood",
            "names of data sets, each once",
            self.ood,
        )
        _require(
            self.attack.bn_mode == "eval",
            "attack.bn_mode",
            "eval, as train would change the model that is measured",
            self.attack.bn_mode,
        )


@dataclass(frozen=True)
class AdviseConfig(StageConfig):
    """Advise robust or natural tickets for a target, by its Fréchet distance from the source.

    Args:
        out: folder that keeps the statistics of sets and the answers; one serves all questions.
        data: the set of pretraining; but for the name, targets are read in the same way. Without
            an image_size each set keeps its own, and with features it is the one that the network
            was trained on, or else the source's.
        targets: the downstream sets.
        weights: file with Inception v3's weights, pytorch-fid's or torchvision's.
        features: a run or checkpoint whose own pooled features take the place of Inception's; its
            distances are on a scale of their own.
        source_images: training images of the source, chosen by the seed, the same for every target.
        batch_size: images at a time.
    """

    out: str = "runs/advise"
    data: DataConfig = field(default_factory=_unnamed)
    targets: tuple[str, ...] = ()
    weights: str | None = None
    features: str | None = None
    source_images: int = 8000
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            all(self.targets) and len(set(self.targets)) == len(self.targets),
            "targets",
            "names of data sets, each once",
            self.targets,
        )
        _require(self.source_images > 1, "source_images", "at least 2 images", self.source_images)
        _require(self.batch_size > 0, "batch_size", "at least 1 image", self.batch_size)
        _require(
            self.weights is None or self.features is None,
            "features",
            "null beside weights, as one network is measured with",
            self.features,
        )
