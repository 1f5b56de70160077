"""The data sets that have names: what they are, where they lie, how they are got.

A table, so that a set that torchvision reads is one entry here and nothing else (`rtk.data.named`
registers them).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtk.config import DataConfig
from rtk.data.dataset import METRICS, data_root
from rtk.errors import RtkError, check_choice


@dataclass(frozen=True)
class Entry:
    """A named data set.

    Args:
        name: as in data.name.
        folder: what must be there below the data root, or below a folder of the set's name in it.
        classes: their number.
        train: number of training images; None where it is not fixed.
        test: number of test images.
        reader: torchvision's class; empty where the set is read by its folders.
        parts: of torchvision's class: the arguments of the pieces that make up train and test.
        image_size: pixels that images are brought to where data.image_size is not set; None where
            all have one size already.
        augment: what "auto" stands for; None is by size.
        metric: what is customarily reported.
        download: size of the download.
        licence: as its authors state it.
        source: a page about it.
        by_hand: what to do where nothing can be downloaded; empty where `rtk data get` does it.
        layout: what `folder` looks like, for messages.
        segmentation: a set of masks, which `rtk.data.segmentation` reads.
        also: other files that must be there.
    """

    name: str
    folder: str
    classes: int
    train: int | None
    test: int | None
    reader: str = ""
    parts: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    image_size: int | None = 224
    augment: str | None = None
    metric: str = "top1"
    download: str = ""
    licence: str = "not stated"
    source: str = ""
    by_hand: str = ""
    layout: str = ""
    segmentation: bool = False
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, (*METRICS, "miou"))

    def tried(self, root: Path) -> list[Path]:
        """Return where the set is looked for: below the root, then below root/name."""
        return [root / self.folder, root / self.name / self.folder]

    def found(self, root: Path) -> Path | None:
        """Return the folder below which `folder` is there with all that belongs to it, or None."""
        for base in (root, root / self.name):
            if all((base / part).exists() for part in (self.folder, *self.also)):
                return base
        return None

    def missing(self, config: DataConfig) -> RtkError:
        """Return the error that says where the set was looked for and how to get it."""
        root = data_root(config)
        needs = f" (with {', '.join(self.also)} beside it)" if self.also else ""
        how = (
            f"By hand: {self.by_hand}"
            if self.by_hand
            else (
                f"`rtk data get {self.name}` or --download fetches it into {root} "
                f"({self.download}; licence: {self.licence})"
            )
        )
        return RtkError(
            f"{self.name} is not there; tried {' and '.join(map(str, self.tried(root)))}{needs}. "
            f"{how}; or name the folder that holds it with --data.root or RTK_DATA"
        )


def _splits(train: tuple[str, ...], test: str = "test", **more: Any) -> dict[str, Any]:
    """Return the arguments `split=...` of torchvision's classes."""
    return {
        "train": tuple({"split": part, **more} for part in train),
        "test": ({"split": test, **more},),
    }


_TRAIN: dict[str, tuple[dict[str, Any], ...]] = {
    "train": ({"train": True},),
    "test": ({"train": False},),
}
_RESEARCH = "non-commercial research"

# Splits and metrics are those of Kornblith et al. 2019 (arXiv 1805.08974, table 1), which Salman et
# al. 2020 and the paper follow: what is trained on includes the validation images.
_ENTRIES = (
    Entry(
        "cifar10",
        "cifar-10-batches-py",
        10,
        50_000,
        10_000,
        "CIFAR10",
        _TRAIN,
        image_size=None,
        augment="crop",
        download="163 MiB",
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    Entry(
        "cifar100",
        "cifar-100-python",
        100,
        50_000,
        10_000,
        "CIFAR100",
        _TRAIN,
        image_size=None,
        augment="crop",
        download="161 MiB",
        source="https://www.cs.toronto.edu/~kriz/cifar.html",
    ),
    Entry(
        "aircraft",
        "fgvc-aircraft-2013b",
        100,
        6_667,
        3_333,
        "FGVCAircraft",
        _splits(("trainval",), annotation_level="variant"),
        metric="mean_per_class",
        download="2.6 GiB",
        licence=_RESEARCH,
        source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        layout="data/variants.txt, data/images_variant_{trainval,test}.txt, data/images/*.jpg",
    ),
    Entry(
        "birdsnap",
        "birdsnap/train",
        500,
        None,
        None,
        licence="not stated (images of many owners)",
        source="https://thomasberg.org",
        by_hand="fetch its images by the list of addresses of thomasberg.org and sort them into "
        "birdsnap/train/<class>/ and birdsnap/test/<class>/",
        layout="train/<class>/*.jpg and test/<class>/*.jpg",
        also=("birdsnap/test",),
    ),
    Entry(
        "caltech101",
        "caltech101/101_ObjectCategories",
        101,
        3_030,
        5_647,
        "Caltech101",
        metric="mean_per_class",
        download="131 MiB",
        licence="CC BY 4.0",
        source="https://data.caltech.edu/records/mzrjq-6wc02",
        layout="<class>/image_*.jpg",
    ),
    Entry(
        "caltech256",
        "caltech256/256_ObjectCategories",
        257,
        15_420,
        15_187,
        "Caltech256",
        metric="mean_per_class",
        download="1.1 GiB",
        licence="CC BY 4.0",
        source="https://data.caltech.edu/records/nyy15-4j048",
        layout="<number>.<class>/<number>_*.jpg",
    ),
    Entry(
        "cars",
        "stanford_cars",
        196,
        8_144,
        8_041,
        "StanfordCars",
        _splits(("train",)),
        licence=_RESEARCH,
        source="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        by_hand="its page is gone: put cars_train.tgz, cars_test.tgz, car_devkit.tgz and "
        "cars_test_annos_withlabels.mat from a copy you trust into stanford_cars/ and unpack them",
        layout="devkit/cars_meta.mat, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, "
        "cars_train/*.jpg, cars_test/*.jpg",
    ),
    Entry(
        "dtd",
        "dtd/dtd/images",
        47,
        3_760,
        1_880,
        "DTD",
        _splits(("train", "val"), partition=1),
        download="596 MiB",
        licence="research",
        source="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        layout="<class>/*.jpg, ../labels/{train,val,test}1.txt",
        also=("dtd/dtd/labels",),
    ),
    Entry(
        "flowers",
        "flowers-102",
        102,
        2_040,
        6_149,
        "Flowers102",
        _splits(("train", "val")),
        metric="mean_per_class",
        download="329 MiB",
        source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        layout="setid.mat, imagelabels.mat, jpg/image_*.jpg",
    ),
    Entry(
        "food",
        "food-101",
        101,
        75_750,
        25_250,
        "Food101",
        _splits(("train",)),
        download="4.7 GiB",
        licence="fair use for research (Foodspotting's images)",
        source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        layout="meta/{train,test}.json, images/<class>/*.jpg",
    ),
    Entry(
        "pets",
        "oxford-iiit-pet",
        37,
        3_680,
        3_669,
        "OxfordIIITPet",
        _splits(("trainval",)),
        metric="mean_per_class",
        download="774 MiB",
        licence="CC BY-SA 4.0",
        source="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        layout="annotations/{trainval,test}.txt, images/*.jpg",
    ),
    Entry(
        "sun397",
        "SUN397",
        397,
        19_850,
        19_850,
        "SUN397",
        download="36 GiB",
        licence="research",
        source="https://vision.princeton.edu/projects/2010/SUN/",
        layout="ClassName.txt, <letter>/<class>/sun_*.jpg, Training_01.txt, Testing_01.txt",
    ),
    Entry(
        "imagenet",
        "imagenet/train",
        1_000,
        1_281_167,
        50_000,
        download="144 GiB",
        licence=_RESEARCH,
        source="https://image-net.org/challenges/LSVRC/2012/2012-downloads.php",
        by_hand="get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
        "ILSVRC2012_devkit_t12.tar.gz from image-net.org, put them into imagenet/ below the data "
        "root, and `rtk data get imagenet` unpacks them",
        layout="train/<class>/*.JPEG and val/<class>/*.JPEG",
        also=("imagenet/val",),
    ),
    Entry(
        "voc2012",
        "VOCdevkit/VOC2012",
        21,
        1_464,
        1_449,
        "VOCSegmentation",
        {
            "train": ({"year": "2012", "image_set": "train"},),
            "test": ({"year": "2012", "image_set": "val"},),
        },
        metric="miou",
        download="1.9 GiB",
        licence="Flickr's terms, research",
        source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        segmentation=True,
    ),
    Entry(
        "svhn",
        "train_32x32.mat",
        10,
        73_257,
        26_032,
        "SVHN",
        _splits(("train",)),
        image_size=None,
        augment="shift",
        download="235 MiB",
        licence=_RESEARCH,
        source="http://ufldl.stanford.edu/housenumbers/",
        also=("test_32x32.mat",),
    ),
    Entry(
        "mnist",
        "MNIST/raw",
        10,
        60_000,
        10_000,
        "MNIST",
        _TRAIN,
        image_size=None,
        augment="shift",
        download="11 MiB",
        source="http://yann.lecun.com/exdb/mnist/",
    ),
    Entry(
        "fashion-mnist",
        "FashionMNIST/raw",
        10,
        60_000,
        10_000,
        "FashionMNIST",
        _TRAIN,
        image_size=None,
        augment="crop",
        download="29 MiB",
        licence="MIT",
        source="https://github.com/zalandoresearch/fashion-mnist",
    ),
    Entry(
        "gtsrb",
        "gtsrb/GTSRB/Training",
        43,
        26_640,
        12_630,
        "GTSRB",
        _splits(("train",)),
        image_size=32,
        augment="shift",  # a sign's mirror image is another sign
        download="264 MiB",
        source="https://benchmark.ini.rub.de/",
        layout="Training/<class>/*.ppm, Final_Test/Images/*.ppm; ../GT-final_test.csv",
        also=("gtsrb/GTSRB/Final_Test/Images", "gtsrb/GT-final_test.csv"),
    ),
    Entry(
        "stl10",
        "stl10_binary",
        10,
        5_000,
        8_000,
        "STL10",
        _splits(("train",)),
        image_size=None,
        augment="crop",
        download="2.5 GiB",
        source="https://cs.stanford.edu/~acoates/stl10/",
    ),
)
CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
