"""What several settings are checked by: ranges, sparsities, rounds of pruning."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rtk.errors import RtkError
from rtk.granularity import Granularity


def require(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise an RtkError that names the setting, what it must be and what it is."""
    if not condition:
        raise RtkError(f"{name}: expected {expected}, got {got!r}")


def check_sets(name: str, sets: Sequence[str]) -> None:
    """Raise an RtkError unless `sets` are names of data sets, each once."""
    require(all(sets) and len(set(sets)) == len(sets), name, "names of data sets, each once", sets)


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
    require(
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
    require(0 < rate < 1, "rate", "the fraction of the rest that a round prunes, in (0, 1)", rate)
    require(rounds is None or rounds >= 1, "rounds", "at least 1 round of pruning", rounds)
    if sparsity is None:
        rounds = 19 if rounds is None else rounds
        sparsity = round_sparsity(rounds, rate)
        require(sparsity < 1, "rounds", f"so few of rate {rate:.4g} that weights remain", rounds)
        return sparsity, rounds
    check_sparsity(sparsity)
    require(sparsity > 0, "sparsity", "more than 0, which needs no round of pruning", sparsity)
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
