"""What rtk raises when the input, not the code, is at fault."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RtkError(ValueError):
    """Bad input: the message names the thing, what was expected and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


class Interrupted(RuntimeError):
    """A run was asked to stop (SIGINT or SIGTERM) and has saved its state first."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest known name, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(what: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is one of `known`, else raise an RtkError that lists them."""
    known = list(known)
    if name not in known:
        choices = ", ".join(known)
        raise RtkError(
            f"unknown {what} {name!r}: expected one of {choices}{did_you_mean(name, known)}"
        )
    return name
