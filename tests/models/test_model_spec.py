import json

import pytest

from rtk.errors import RtkError
from rtk.models import ModelSpec, resolve_stem

VALUES = {
    "arch": "resnet18",
    "stem": "3x3",
    "width": 0.25,
    "num_classes": 10,
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.2, 0.1),
}


@pytest.mark.parametrize(
    ("stem", "size", "expected"),
    [
        ("auto", 8, "3x3"),
        ("auto", 64, "3x3"),
        ("auto", 65, "7x7"),
        ("7x7", 8, "7x7"),
        ("3x3", 224, "3x3"),
    ],
)
def test_resolve_stem(stem, size, expected):
    assert resolve_stem(stem, size) == expected


def test_resolve_stem_refuses_others():
    with pytest.raises(RtkError, match="unknown stem '5x5'"):
        resolve_stem("5x5", 32)


def test_a_spec_survives_json():
    spec = ModelSpec(**VALUES)
    back = ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert back == spec
    assert hash(back) == hash(spec)
    assert back.mean == (0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stem": "auto"}, "not resolved"),
        ({"stem": "5x5"}, "unknown stem '5x5'"),
        ({"width": 0}, "width: expected a positive multiplier, got 0"),
        ({"width": float("nan")}, "width: expected a positive multiplier"),
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"mean": (0.5, 0.5)}, "mean: expected 3 numbers"),
        ({"mean": None}, "mean: expected 3 numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std: expected 3 positive numbers"),
    ],
    ids=["auto", "stem", "width", "nan", "classes", "two-means", "no-mean", "zero-std"],
)
def test_bad_values(change, words):
    with pytest.raises(RtkError) as error:
        ModelSpec(**(VALUES | change))
    assert words in str(error.value)


def test_from_dict_names_unknown_and_missing_keys():
    with pytest.raises(RtkError, match=r"no key 'widht'; did you mean 'width'"):
        ModelSpec.from_dict(VALUES | {"widht": 1})
    with pytest.raises(RtkError, match="needs stem, std"):
        ModelSpec.from_dict({k: v for k, v in VALUES.items() if k not in ("stem", "std")})
