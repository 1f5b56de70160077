"""npz:PATH: anybody's arrays, in the layout that MedMNIST made common."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from rtk.config import DataConfig
from rtk.data.dataset import DATA_SETS, Dataset, Split, candidate_paths
from rtk.errors import RtkError

LAYOUT = (
    "expected train_images, train_labels, test_images, test_labels "
    "(and, if you have them, val_images, val_labels, class_names)"
)
# What zipfile, zlib and numpy raise on a damaged archive or array header.
_DAMAGE = (EOFError, ValueError, KeyError, SyntaxError, MemoryError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path, target: str = "labels") -> dict[str, np.ndarray]:
    """Return the arrays of the layout that the file holds; pickled objects are refused.

    Args:
        path: of the file.
        target: what each image has, in arrays of that name: labels, or masks for segmentation.
    """
    wanted = [f"{part}_{kind}" for part in ("train", "test", "val") for kind in ("images", target)]
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise RtkError(
                    f"{path} is not an npz file, or is truncated; write it with numpy.savez"
                )
        with np.load(path, allow_pickle=False) as archive:
            found = list(archive.files)
            missing = [name for name in wanted[:4] if name not in found]
            missing += [
                f"val_{kind}"
                for kind, other in (("images", target), (target, "images"))
                if f"val_{other}" in found and f"val_{kind}" not in found
            ]
            if missing:
                raise RtkError(
                    f"{path} has no array {', '.join(missing)}; "
                    f"{LAYOUT.replace('labels', target)}, "
                    f"found {', '.join(found) or 'nothing'}"
                )
            return {n: archive[n] for n in [*wanted, "class_names"] if n in found}
    except RtkError:
        raise
    except OSError as error:
        raise RtkError(f"{path} cannot be read ({error}); check the file and its rights") from error
    except _DAMAGE as error:
        if "allow_pickle" in str(error):
            raise RtkError(
                f"{path} holds an object array (a pickle, which can run code when opened): "
                "refused; save plain uint8, int64 and string arrays"
            ) from error
        raise RtkError(
            f"{path} cannot be read: truncated or damaged ({error}); write it again"
        ) from error


def to_images(path: Path, name: str, array: np.ndarray) -> torch.Tensor:
    """(N, H, W), (N, H, W, 1) or (N, H, W, 3) -> (N, 3, H, W) uint8."""
    if array.dtype != np.uint8:
        hint = (
            "scale them to 0..255, round and store them as uint8"
            if array.dtype.kind == "f"
            else "store them as uint8, 0..255"
        )
        raise RtkError(f"{path}: {name} are {array.dtype}, expected uint8; {hint}")
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3 and (array.ndim != 4 or array.shape[3] != 3):
        raise RtkError(
            f"{path}: {name} have shape {array.shape}, expected (N, H, W), (N, H, W, 1) or "
            "(N, H, W, 3), channels last"
        )
    if not array.size:
        raise RtkError(f"{path}: {name} are empty, of shape {array.shape}; at least one is needed")
    images = torch.from_numpy(np.ascontiguousarray(array))
    if images.ndim == 4:
        return images.permute(0, 3, 1, 2).contiguous()
    return images[:, None].expand(-1, 3, -1, -1).contiguous()


def _labels(path: Path, name: str, array: np.ndarray) -> torch.Tensor:
    """(N,) or (N, 1) of any integer type -> (N,) int64."""
    if array.dtype.kind not in "iu":
        raise RtkError(f"{path}: {name} are {array.dtype}, expected integers; store class indices")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise RtkError(
            f"{path}: {name} have shape {array.shape}, expected (N,) or (N, 1): one class an image"
        )
    return torch.from_numpy(array.astype(np.int64))


@DATA_SETS.register("npz")
def npz(path: str, config: DataConfig) -> Dataset:
    """Return the set in the file `path`: {train,test,val}_images and _labels, class_names.

    Images are uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3), labels integers (N,) or (N, 1);
    val and class_names may be absent. A relative path is tried as given and under the data root.
    Raises RtkError where the file is missing, damaged, pickled or of another layout.
    """
    tried = candidate_paths(path, config)
    found = next((candidate for candidate in tried if candidate.is_file()), None)
    if found is None:
        raise RtkError(
            f"no file for npz:{path}; tried {' and '.join(map(str, tried))}; "
            "give the path of an .npz file, absolute or below the data root"
        )
    arrays = read_arrays(found)
    if arrays["train_images"].ndim == 3 or arrays["train_images"].shape[-1] == 1:
        warnings.warn(f"{found}: grey images are repeated to 3 channels", stacklevel=2)
    splits: dict[str, Split] = {}
    for part in ("train", "test", "val"):
        if f"{part}_images" not in arrays:
            continue
        images = to_images(found, f"{part}_images", arrays.pop(f"{part}_images"))
        labels = _labels(found, f"{part}_labels", arrays.pop(f"{part}_labels"))
        if len(images) != len(labels):
            raise RtkError(
                f"{found}: lengths differ: {len(images)} {part}_images, {len(labels)} {part}_labels"
            )
        splits[part] = Split(images, labels)
    if "class_names" in arrays:
        names = arrays["class_names"]
        if names.ndim != 1 or names.dtype.kind not in "US":
            raise RtkError(
                f"{found}: class_names are {names.dtype} {names.shape}, expected strings (C,)"
            )
        classes = tuple(str(name) for name in names.astype(np.str_))
    else:
        classes = tuple(str(i) for i in range(int(splits["train"].labels.max()) + 1))
    name = f"npz:{found}"
    return Dataset(name, classes, splits["train"], splits["test"], splits.get("val"), "crop")
