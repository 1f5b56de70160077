import pytest
import torch

from rtk.config import DataConfig
from rtk.data import load
from rtk.data.subset import parse_classes, split_name
from rtk.errors import RtkError


@pytest.mark.parametrize(
    ("text", "picks"),
    [("0-4", [0, 1, 2, 3, 4]), ("0,2,5-7", [0, 2, 5, 6, 7]), (" 3 , 1 ", [3, 1]), ("4-4", [4])],
)
def test_parse_classes(text, picks):
    assert parse_classes(text, "digits") == picks


@pytest.mark.parametrize(
    ("name", "base", "text"),
    [
        ("digits", "digits", None),
        ("digits[0-4]", "digits", "0-4"),
        ("npz:/a[1]/b.npz", "npz:/a[1]/b.npz", None),
        ("npz:/a[1]/b.npz[0,3]", "npz:/a[1]/b.npz", "0,3"),
    ],
)
def test_split_name(name, base, text):
    assert split_name(name) == (base, text)


def test_labels_follow_the_given_order():
    whole = load(DataConfig(name="digits"))
    part = load(DataConfig(name="digits[7,0-1]"))
    assert part.name == "digits[7,0-1]"
    assert part.classes == ("7", "0", "1")
    for old, new in ((7, 0), (0, 1), (1, 2)):
        for a, b in ((whole.train, part.train), (whole.test, part.test)):
            assert torch.equal(a.images[a.labels == old], b.images[b.labels == new])
    assert len(part.train) == sum(int((whole.train.labels == c).sum()) for c in (7, 0, 1))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digits[10]", "unknown class 10 in the subset; its classes are 0..9"),
        ("digits[8-12]", "unknown class 10"),
        ("digits[]", "the class subset is empty"),
        ("digits[a]", "malformed at 'a'"),
        ("digits[0,]", "malformed at ''"),
        ("digits[4-0]", "malformed at '4-0'"),
        ("digits[-1]", "malformed at '-1'"),
        ("digits[0-4", "the class subset is malformed"),
        ("digits]0-4[", "the class subset is malformed"),
        ("digits[0][1]", "unknown data set"),
        ("digits[1,0-2]", "names class 1 twice"),
    ],
)
def test_bad_subsets(name, words):
    with pytest.raises(RtkError) as error:
        load(DataConfig(name=name))
    assert words in str(error.value)
