import dataclasses

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from rtk import data, models
from rtk.config import DataConfig
from rtk.errors import RtkError
from rtk.evaluate import Extractor, Gaussian, Moments, frechet_distance, statistics_of
from rtk.train import Checkpoint, save_checkpoint


def gaussian(mean, covariance, images=100):
    return Gaussian(torch.as_tensor(mean).double(), torch.as_tensor(covariance).double(), images)


def of(features, batch_size=64):
    moments = Moments()
    for batch in features.split(batch_size):
        moments.update(batch)
    return moments.gaussian()


def test_identities_a_one_apart_in_each_of_2048_dimensions():
    eye = torch.eye(2048, dtype=torch.float64)
    one, other = gaussian(torch.zeros(2048), eye), gaussian(torch.ones(2048), eye)
    assert frechet_distance(one, other) == pytest.approx(2048, rel=1e-12)


def test_of_diagonals_it_is_the_difference_of_the_deviations():
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    m1, m2 = torch.randn(2, 6).double()
    s1, s2 = torch.rand(2, 6).double()
    expected = ((m1 - m2) ** 2 + (s1 - s2) ** 2).sum().item()
    found = frechet_distance(gaussian(m1, (s1**2).diag()), gaussian(m2, (s2**2).diag()))
    assert found == pytest.approx(expected, rel=1e-12)


def test_of_any_covariances_it_is_the_matrix_square_root():
    a, b = torch.randn(2, 8, 8).double()
    one, other = gaussian(torch.zeros(8), a @ a.T), gaussian(torch.ones(8), b @ b.T)
    root = sqrtm((one.covariance @ other.covariance).numpy()).real
    expected = 8 + np.trace((one.covariance + other.covariance).numpy() - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances():
    """Rank 3 in 40 dimensions; along one direction the roots are known."""
    basis = torch.linalg.qr(torch.randn(40, 3).double()).Q
    flat = basis @ torch.diag(torch.tensor([4.0, 1.0, 9.0]).double()) @ basis.T
    zero = torch.zeros(40)
    one = gaussian(zero, flat)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(one, gaussian(zero, 4 * flat)) == pytest.approx(14, abs=1e-5)
    assert frechet_distance(one, gaussian(zero, torch.zeros(40, 40))) == pytest.approx(14)
    # Of all rank: tr C1 + tr C2 - 2 sum of roots
    eye = torch.eye(40)
    for pair in ((one, gaussian(zero, eye)), (gaussian(zero, eye), one)):
        assert frechet_distance(*pair) == pytest.approx(14 + 40 - 2 * (2 + 1 + 3), abs=1e-5)


def test_equal_sets_are_not_below_zero():
    for _ in range(10):
        one = of(torch.randn(5, 30))
        assert 0 <= frechet_distance(one, one) < 1e-5


class Flat(nn.Module):
    num_features = 12

    def forward(self, images):
        return images.flatten(1)


def test_it_is_torchmetrics(device):
    ours, theirs = torch.rand(90, 3, 2, 2).double(), 0.7 * torch.rand(70, 3, 2, 2).double() + 0.2
    peer = FrechetInceptionDistance(feature=Flat()).set_dtype(torch.float64)
    peer.update(ours, real=True)
    peer.update(theirs, real=False)
    features = [Flat()(images).to(device) for images in (ours, theirs)]
    found = frechet_distance(of(features[0], 40), of(features[1], 40))
    assert found == pytest.approx(peer.compute().item(), rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_moments_are_numpys_whatever_the_batches(device, batch_size):
    features = torch.randn(50, 6, device=device) * 0.01 + 1000
    found = of(features, batch_size)
    numbers = features.double().cpu().numpy()
    assert found.images == 50
    assert found.mean.dtype == found.covariance.dtype == torch.float64
    np.testing.assert_allclose(found.mean.cpu(), numbers.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance.cpu(), np.cov(numbers.T), rtol=1e-7, atol=1e-13)


def test_other_numbers_of_features_are_refused():
    with pytest.raises(RtkError, match="one set has 3 features and the other 4"):
        frechet_distance(of(torch.randn(9, 3)), of(torch.randn(9, 4)))


def test_too_few_or_broken_features_are_refused():
    for moments in (Moments("a set"), Moments("a set")):
        with pytest.raises(RtkError, match="a set: a covariance needs at least 2 images, got 0"):
            moments.gaussian()
        moments.update(torch.randn(1, 3))
        with pytest.raises(RtkError, match="at least 2 images, got 1"):
            moments.gaussian()
    with pytest.raises(RtkError, match="features are not finite"):
        of(torch.tensor([[1.0, 2.0], [torch.nan, 1.0]]))


class Means(nn.Module):
    """Two features: mean of the upper and of the lower half. It counts the images it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        half = x.shape[2] // 2
        return torch.stack([x[:, :, :half].mean((1, 2, 3)), x[:, :, half:].mean((1, 2, 3))], 1)


@pytest.fixture
def extractor():
    return Extractor(Means(), "own", "means", "ab" * 32)


def halves(images):
    return Means()(images.float() / 255).double()


def test_all_splits_of_a_target_are_taken(extractor, tmp_path):
    found = statistics_of(DataConfig("digits[0-4]"), extractor, tmp_path)
    dataset = data.load(DataConfig("digits[0-4]"))
    features = halves(torch.cat([dataset.train.images, dataset.test.images]))
    assert found.images == found.meta["available"] == len(features)
    torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.covariance, features.T.cov(), rtol=1e-5, atol=1e-9)


def test_training_images_of_a_source_are_chosen_by_the_seed(extractor, tmp_path):
    def chosen(seed, images=100):
        return statistics_of(DataConfig("digits"), extractor, tmp_path, images=images, seed=seed)

    one, again, other = chosen(0), chosen(0), chosen(1)
    assert one.images == 100 and one.meta["chosen"] == {"images": 100, "seed": 0}
    assert torch.equal(one.mean, again.mean) and not torch.equal(one.mean, other.mean)
    train = data.load(DataConfig("digits")).train
    index = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:100]
    torch.testing.assert_close(one.mean, halves(train.images[index]).mean(0), rtol=1e-6, atol=0)
    everything = chosen(0, images=10_000)
    assert everything.images == everything.meta["available"] == len(train)


def test_what_was_computed_is_read_back(extractor, tmp_path):
    config = DataConfig("digits[0-1]")
    first = statistics_of(config, extractor, tmp_path)
    seen = extractor.network.seen
    again = statistics_of(config, extractor, tmp_path)
    assert extractor.network.seen == seen == first.images
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.covariance, again.covariance)
    assert {k: again.meta[k] for k in first.meta} == first.meta
    statistics_of(config, extractor, tmp_path, resume=False)
    assert extractor.network.seen == 2 * seen


def test_another_question_has_another_file(extractor, tmp_path):
    ask = DataConfig("digits[0-1]")
    other = dataclasses.replace(extractor, sha256="cd" * 32)
    statistics_of(ask, extractor, tmp_path)
    statistics_of(ask, other, tmp_path)
    statistics_of(dataclasses.replace(ask, image_size=16), extractor, tmp_path)
    statistics_of(dataclasses.replace(ask, root="elsewhere"), extractor, tmp_path)
    statistics_of(ask, extractor, tmp_path, images=50)
    statistics_of(ask, extractor, tmp_path, images=50, seed=1)
    assert len([*tmp_path.glob("statistics-digits-0-1-*.safetensors")]) == 6


def test_a_damaged_file_is_refused(extractor, tmp_path):
    statistics_of(DataConfig("digits[0-1]"), extractor, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RtkError, match=r"statistics .* is truncated or damaged"):
        statistics_of(DataConfig("digits[0-1]"), extractor, tmp_path)


def test_fewer_images_than_features_are_warned_of(pretrained, tmp_path):
    extractor = Extractor.of_checkpoint(pretrained)
    with pytest.warns(UserWarning, match=r"digits\[0-1\]: 20 images for 64 feature dimensions"):
        statistics_of(DataConfig("digits[0-1]"), extractor, tmp_path, images=20)


@pytest.mark.filterwarnings("error")
def test_a_networks_own_features(pretrained, tmp_path):
    extractor = Extractor.of_checkpoint(pretrained)
    checkpoint = Checkpoint.load(pretrained)
    assert extractor.kind == "own" and extractor.sha256 == checkpoint.sha256
    assert extractor.image_size is None and "resnet18" in extractor.label
    found = statistics_of(DataConfig("digits[0-1]"), extractor, tmp_path, images=200)
    model = checkpoint.build_model().eval()
    train = data.load(DataConfig("digits[0-1]")).train
    index = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:200]
    with torch.no_grad():
        features = model.forward_features(train.images[index].float() / 255).double()
    torch.testing.assert_close(found.mean, features.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.covariance, features.T.cov(), rtol=1e-3, atol=1e-6)


def test_the_size_that_a_network_was_trained_on(pretrained, tmp_path):
    checkpoint = Checkpoint.load(pretrained)
    settings = {**checkpoint.meta["config"]}
    settings["data"] = {**settings["data"], "image_size": 16}
    path = tmp_path / "c"
    meta = {"config": settings, "progress": {"finished": True}}
    save_checkpoint(path, checkpoint.build_model(), None, meta)
    assert Extractor.of_checkpoint(path).image_size == 16


def test_a_network_that_is_half_trained_is_refused(pretrained, tmp_path):
    path = tmp_path / "half"
    progress = {"epoch": 1, "step": 3, "loss_sum": 0.0, "finished": False}
    model = Checkpoint.load(pretrained).build_model()
    assert isinstance(model, models.Classifier)
    save_checkpoint(path, model, None, {"progress": progress})
    with pytest.raises(RtkError, match="stopped at epoch 1"):
        Extractor.of_checkpoint(path)
