"""How adversarial examples are made."""

from __future__ import annotations

from dataclasses import dataclass

from rtk.config.checks import require
from rtk.errors import check_choice

NORMS = ("linf", "l2")


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
        require(self.eps >= 0, "attack.eps", "a radius >= 0 in [0, 1] pixel scale", self.eps)
        require(
            self.step_size is None or self.step_size >= 0,
            "attack.step_size",
            "a length >= 0",
            self.step_size,
        )
        require(self.steps >= 0, "attack.steps", "a number of steps >= 0", self.steps)
        require(self.restarts >= 1, "attack.restarts", "at least 1 start", self.restarts)
        require(
            self.restarts == 1 or self.random_start,
            "attack.restarts",
            "1 without random_start, as starts from the image are all alike",
            self.restarts,
        )
        require(self.queries >= 0, "attack.queries", "a number of queries >= 0", self.queries)
        require(self.replays >= 1, "attack.replays", "at least 1 pass a batch", self.replays)
        require(self.sigma >= 0, "attack.sigma", "a deviation >= 0 in pixel scale", self.sigma)

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


def check_training_attack(attack: AttackConfig) -> None:
    require(
        not attack.early_stop,
        "attack.early_stop",
        "false while training, as it waits for the GPU in every iteration",
        attack.early_stop,
    )
