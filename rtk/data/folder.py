"""folder:PATH: an ImageFolder tree, decoded once and kept in memory, or read as it is needed."""

from __future__ import annotations

from pathlib import Path

from rtk.config import DataConfig
from rtk.data.dataset import DATA_SETS, Dataset, candidate_paths, check_memory, every_fifth
from rtk.data.files import Parts, from_files, without_bad
from rtk.data.images import class_folders, common_size, list_images, shorter_side
from rtk.errors import RtkError


def read_tree(root: Path) -> tuple[list[str], Parts]:
    """Return the classes of an ImageFolder tree and the files of its parts with their labels.

    The parts are train and test, and val where there are both val and test; `folder` tells the
    rules. Raises RtkError where it is no such tree, or class folders are empty or disagree.
    """
    parts = {part: root / part for part in ("train", "test", "val") if (root / part).is_dir()}
    if parts and "train" not in parts:
        raise RtkError(
            f"{root} holds {' and '.join(parts)} but no train folder; add train/<class>/"
        )
    if "val" in parts and "test" not in parts:
        parts["test"] = parts.pop("val")
    classes, found = read_parts(parts or {"all": root})
    if "test" in found:
        return classes, found
    ((files, labels),) = found.values()
    test = every_fifth(labels)
    if not test.any():
        raise RtkError(f"{root}: no class has 5 images to take a test image from; add test/")
    return classes, {
        part: ([files[i] for i in chosen.nonzero()[:, 0].tolist()], labels[chosen])
        for part, chosen in (("train", ~test), ("test", test))
    }


def read_parts(places: dict[str, Path]) -> tuple[list[str], Parts]:
    """Return the classes, sorted, and the files below each place's class folders, with labels.

    Raises RtkError where a place has no class folder, one is empty, or the places disagree.
    """
    base = next(iter(places.values()))
    classes = class_folders(base)
    for place in places.values():
        names = class_folders(place)
        if not names:
            raise RtkError(f"{place} holds no class folder; expected {place}/<class>/<image>")
        if names != classes:
            differ = ", ".join(sorted(set(names) ^ set(classes))[:8])
            raise RtkError(
                f"class folders of {base} and {place} do not agree ({differ} is in one only); "
                "give both the same classes"
            )
    return classes, {part: list_images(place, classes) for part, place in places.items()}


@DATA_SETS.register("folder")
def folder(path: str, config: DataConfig) -> Dataset:
    """Return the images of an ImageFolder tree, `PATH/train/<class>/*` and `PATH/test` or `val`.

    With both test and val, val validates; with val alone, val tests. With none of these, or
    train alone, the 5th, 10th, ... image of each class (sorted by path) tests. With
    data.image_size the shorter side is resized to it and the centre is cropped; without, all
    images must have one size. A relative path is tried as given and under the data root.

    With data.storage stream the images stay in their files: data.image_size is needed, the margin
    of large images is cut as for the named sets, and resized_crop takes parts of whole images.

    Raises RtkError where there is no tree, an image cannot be decoded, class folders disagree or
    the images need more than 16 GiB.
    """
    tried = candidate_paths(path, config)
    root = next((candidate for candidate in tried if candidate.is_dir()), None)
    if root is None:
        raise RtkError(
            f"no folder for folder:{path}; tried {' and '.join(map(str, tried))}; "
            "give a folder that holds train/<class>/ and test/<class>/, or <class>/"
        )
    classes, parts = read_tree(root)
    name, size = f"folder:{root}", config.image_size
    if config.skip_bad:
        parts = without_bad(name, parts)
    if config.storage == "stream":
        if size is None:
            raise RtkError(f"{name}: data.storage stream needs data.image_size, e.g. 224")
        side, shorter = (size, size), shorter_side(size)
        return from_files(name, classes, parts, config, side=side, shorter=shorter, stream=True)
    everything = [file for files, _ in parts.values() for file in files]
    width, height = (size, size) if size else common_size(everything)
    check_memory(name, len(everything), height, width)
    return from_files(
        name, classes, parts, config, side=(height, width), shorter=size, stream=False
    )
