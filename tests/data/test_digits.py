import numpy as np
import torch

from rtk.config import DataConfig
from rtk.data import load


def test_digits_are_the_bundled_images_scaled_and_repeated():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    digits = load(DataConfig(name="digits"))
    assert digits.name == "digits"
    assert digits.classes == tuple("0123456789")
    assert digits.val is None
    assert digits.augment == "shift"
    assert digits.train.images.shape == (1442, 3, 8, 8)
    assert len(digits.test) == 355
    # The fifth zero of the set is the first zero that tests.
    fifth_zero = np.flatnonzero(bunch.target == 0)[4]
    first = (digits.test.labels == 0).nonzero()[0, 0]
    expected = np.round(bunch.images[fifth_zero] * 255 / 16).astype(np.uint8)
    for channel in digits.test.images[first]:
        assert np.array_equal(channel.numpy(), expected)
    assert digits.train.images.max() == 255


def test_digits_split_is_stratified_and_loses_nothing():
    digits = load(DataConfig(name="digits"))
    train, test = (torch.bincount(s.labels) for s in (digits.train, digits.test))
    assert (train + test).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.equal(test, (train + test) // 5)


def test_digits_split_is_fixed():
    digits = load(DataConfig(name="digits"))
    assert digits.test.labels[:12].tolist() == [5, 0, 9, 8, 7, 1, 2, 6, 3, 4, 0, 2]
    assert int(digits.test.images.sum()) == 5_315_379
