"""Run folders: atomic files, the JSONL log, and the rule that a run is never mixed with another.

A stage writes into one folder: `config.yaml` first, then its log and artefacts. The same stage
with the same configuration goes on where it was; another configuration is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rtk.errors import RtkError


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` so that a reader, or a crash, sees the old file or the new one, never a part.

    Raises RtkError where the folder cannot be made or written.
    """
    path = Path(path)
    payload = data.encode() if isinstance(data, str) else data
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise unwritable(path, error) from error


_locks: dict[Path, int] = {}  # of this process: folder -> open file that holds the lock


def lock_folder(folder: Path, patience: float = 3.0) -> None:
    """Make this process the only one that works in `folder`, until it ends or `unlocked_after`.

    Half-written files of a process that was killed are removed.

    Args:
        folder: made if need be.
        patience: seconds to wait for another process, e.g. one that was just killed.

    Raises:
        RtkError: if the folder cannot be written, or another process keeps it.
    """
    key = folder.resolve()
    if key in _locks:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise unwritable(folder, error) from error
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(handle)
                raise RtkError(
                    f"another process works in {folder}; wait for it, or choose another --out"
                ) from error
            time.sleep(0.05)
        except OSError:  # a file system without locks: then there is none to respect
            break
    _locks[key] = handle
    remove_half_written(folder)


@contextlib.contextmanager
def unlocked_after(folder: Path) -> Iterator[None]:
    """Give up after the `with` a lock of `folder` that was taken inside it.

    A lock is an open file: a process that runs a thousand stages must not keep them all.
    """
    key = folder.resolve()
    held = key in _locks
    try:
        yield
    finally:
        if not held and key in _locks:
            os.close(_locks.pop(key))


def remove_half_written(folder: Path) -> None:
    """Remove the files that a process which was killed did not finish; nobody else may write."""
    for leftover in folder.glob(".*.safetensors.*"):
        leftover.unlink(missing_ok=True)


def unwritable(path: Path, error: OSError) -> RtkError:
    """Return the error for a file or folder that could not be written."""
    in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
    reason = "a file is where a folder is needed" if in_the_way else error.strerror
    return RtkError(f"cannot write {path} ({reason}); choose a folder you can write with --out")


def write_json(path: str | Path, value: Any) -> None:
    atomic_write(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise RtkError(
            f"cannot read {path} ({error}); run the stage that writes it again"
        ) from error


class JsonlLog:
    """An append-only log of one JSON object a line, e.g. `metrics.jsonl`.

    A process killed while writing leaves a torn last line; `keep` drops it on the next start.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the whole records; a torn last line is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                records.append(json.loads(line))
        return records

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the records that `wanted` refuses, e.g. those past the checkpoint being resumed."""
        text = "".join(json.dumps(record) + "\n" for record in self.read() if wanted(record))
        if not self.path.exists() or self.path.read_text() != text:
            atomic_write(self.path, text)


def find_artefact(path: str | Path, name: str) -> Path:
    """Return `path`, or `path/name` where `path` is a run's folder."""
    path = Path(path)
    return path / name if path.is_dir() else path
