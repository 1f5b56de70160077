"""Every setting of every stage: frozen dataclasses that check themselves.

The command line, the YAML files and the recipes are all made of these. What a value may be is
checked here; whether a *name* is known is checked by the registry that holds the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rtk.errors import RtkError, check_choice
from rtk.granularity import Granularity

SCOPES = ("global", "layer")
SCORE_INITS = ("weight_rank", "kaiming")
NORMS = ("linf", "l2")
TRANSFER_MODES = ("finetune", "linear_bn_update", "linear_frozen")


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


@dataclass(frozen=True)
class DataConfig:
    """Which images a stage reads.

    Args:
        name: digits, cifar10, cifar100, npz:PATH or folder:PATH; a class subset in brackets,
            e.g. digits[0-4] or cifar10[0,2,5-7].
        root: folder that holds the named sets (else RTK_DATA, else ~/.cache/rtk/data).
        image_size: height and width in pixels that images are resized to; null keeps the set's.
        augment: none, flip, crop (pad by an eighth, random crop, flip), shift (the crop without
            the flip, for digits and signs), resized_crop (RandomResizedCrop and flip), or auto:
            what suits the set.
    """

    name: str = "digits"
    root: str | None = None
    image_size: int | None = None
    augment: str = "auto"

    def __post_init__(self) -> None:
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
        arch: resnet18 or resnet50.
        stem: 3x3 (small images, no max-pool), 7x7 (ImageNet) or auto: 3x3 up to 64 pixels.
        width: multiplier of every layer's channels, e.g. 0.25 for a small machine.
    """

    arch: str = "resnet18"
    stem: str = "auto"
    width: float = 1.0

    def __post_init__(self) -> None:
        check_choice("stem", self.stem, ("auto", "3x3", "7x7"))
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
        batch_size: images a step.
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
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
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
        _require(
            not self.attack.early_stop,
            "attack.early_stop",
            "false while training, as it waits for the GPU in every iteration",
            self.attack.early_stop,
        )


def lmp_train() -> TrainConfig:
    """What learns a mask: 150 epochs, batch 64, lr 0.1 (/ 10 at 50 and 100), wd 5e-4 (RST)."""
    return TrainConfig(epochs=150, batch_size=64, lr=0.1, weight_decay=5e-4, milestones=(50, 100))


def _unnamed() -> DataConfig:
    return DataConfig(name="")


@dataclass(frozen=True)
class DrawConfig(StageConfig):
    """Draw a ticket, a sparse subnetwork, out of a pretrained network.

    Args:
        checkpoint: the pretrained network: a run's folder or its checkpoint.safetensors.
        scheme: omp (one-shot magnitude pruning) or lmp (a mask learned on a task's images, under
            frozen weights).
        sparsity: fraction of the prunable weights that become zero, in [0, 1); null is 0.8, or
            what N:M means.
        granularity: element, row, kernel, channel, block-64 (or block-KxC: tiles of output and
            input channels) or 2:4 (or another N:M, not for lmp); docs/pruning.md tells them apart.
        scope: global (one ranking over all layers) or layer (the same sparsity in each); null is
            layer for lmp, else global.
        include_first: prune the first convolution too.
        data: of lmp: the task's images.
        train: of lmp: how scores and head are trained.
        score_init: of lmp: where scores start, weight_rank (random values in the order of the
            weights' magnitudes) or kaiming (random).
        save_scores: of lmp: keep the scores beside the ticket, in scores.safetensors.
    """

    checkpoint: str = ""
    scheme: str = "omp"
    sparsity: float | None = None
    granularity: str = "element"
    scope: str | None = None
    include_first: bool = False
    data: DataConfig = field(default_factory=_unnamed)
    train: TrainConfig = field(default_factory=lmp_train)
    score_init: str = "weight_rank"
    save_scores: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        granularity = Granularity.parse(self.granularity)
        asked = 0.8 if self.sparsity is None and granularity.sparsity is None else self.sparsity
        # Stored as what they stand for: "block" and "block-64" are one run, as null and 0.8 are.
        object.__setattr__(self, "sparsity", check_sparsity(asked, granularity.name))
        object.__setattr__(self, "granularity", granularity.name)
        if self.scope is None:
            object.__setattr__(self, "scope", "layer" if self.scheme == "lmp" else "global")
        check_choice("scope", str(self.scope), SCOPES)
        check_choice("score_init", self.score_init, SCORE_INITS)
        _require(
            self.scheme != "lmp" or granularity.n_of_m is None,
            "granularity",
            "element, row, kernel, channel or a block for lmp",
            granularity.name,
        )
        _require(
            self.scheme != "lmp" or bool(self.data.name),
            "data.name",
            "the images that lmp learns a mask on, e.g. --data.name digits[5-9]",
            self.data.name,
        )


def _transfer_train() -> TrainConfig:
    """The paper's finetuning: 150 epochs, batch 64, lr divided by 10 at 50 and 100."""
    return TrainConfig(epochs=150, batch_size=64, lr=0.01, milestones=(50, 100))


@dataclass(frozen=True)
class TransferConfig(StageConfig):
    """Transfer a ticket to a downstream task.

    Args:
        checkpoint: the pretrained network that the ticket was drawn from.
        ticket: the ticket: a run's folder or its ticket.safetensors; null transfers it dense.
        mode: finetune (all weights), linear_bn_update (a new classifier, batch norm in train
            mode) or linear_frozen (a new classifier on frozen eval-mode features).
        data: the downstream images.
        train: the optimisation.
    """

    checkpoint: str = ""
    ticket: str | None = None
    mode: str = "finetune"
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=_transfer_train)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("transfer mode", self.mode, TRANSFER_MODES)


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
        batch_size: images at a time.
    """

    checkpoint: str = ""
    data: DataConfig = field(default_factory=lambda: DataConfig(name=""))
    attack: AttackConfig = field(default_factory=_pgd20)
    certify: CertifyConfig = field(default_factory=CertifyConfig)
    batch_size: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.batch_size > 0, "batch_size", "at least 1 image", self.batch_size)
        _require(
            self.attack.bn_mode == "eval",
            "attack.bn_mode",
            "eval, as train would change the model that is measured",
            self.attack.bn_mode,
        )
