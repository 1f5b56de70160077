import dataclasses
import json
import warnings

import pytest
import torch
from scipy.stats import norm
from torch import nn

from rtk import evaluate, report
from rtk.config import AttackConfig, CertifyConfig, EvaluateConfig
from rtk.data import Split
from rtk.errors import RtkError
from rtk.evaluate import Smoothed, certified_radius, certify_split, lower_bound


def test_cohens_numbers():
    """All of 100000 draws at alpha = .001: 3.8115 sigma; and a bound of statsmodels."""
    assert certified_radius(100_000, 100_000, 1.0, 0.001) == pytest.approx(3.8115, abs=5e-5)
    assert certified_radius(100_000, 100_000, 0.25, 0.001) == pytest.approx(3.8115 / 4, abs=2e-5)
    assert lower_bound(60_000, 100_000, 0.001) == pytest.approx(0.59520105, abs=5e-9)


def test_the_bound_is_where_the_binomials_tail_is_alpha():
    """The definition: P(at least `hits` of n | share = bound) = alpha."""
    from scipy.stats import binom

    for hits, n, alpha in ((1, 10, 0.05), (7, 10, 0.001), (10, 10, 0.01), (612, 1000, 0.001)):
        bound = lower_bound(hits, n, alpha)
        assert binom.sf(hits - 1, n, bound) == pytest.approx(alpha, rel=1e-6)
    assert lower_bound(0, 10, 0.05) == 0.0


def test_there_is_no_radius_without_a_majority():
    assert certified_radius(50_000, 100_000, 0.5, 0.001) == 0.0
    assert certified_radius(0, 100, 0.5, 0.001) == 0.0
    assert certified_radius(51_000, 100_000, 0.5, 0.001) > 0


class Threshold(nn.Module):
    """Class 1 where the first pixel is above `at`: its smoothed radius is (pixel - at), exactly."""

    def __init__(self, at=0.0):
        super().__init__()
        self.at = at
        self.sizes = []
        self.seen = []

    def forward(self, x):
        self.sizes.append(len(x))
        self.seen.append(x)
        margin = x[:, 0, 0, 0] - self.at
        return torch.stack([-margin, margin], 1)


def image(first_pixel):
    x = torch.full((3, 4, 4), 0.5)
    x[0, 0, 0] = first_pixel
    return x


def test_the_radius_is_right_and_nearly_tight():
    """The true radius is the pixel's distance from the threshold."""
    smoothed = Smoothed(Threshold(0.4), 0.5, batch_size=5000)
    winner, radius = smoothed.certify(image(0.9), 100, 40_000, 0.001, seed=1)
    assert winner == 1 and 0.5 * 0.95 < radius < 0.5
    winner, radius = smoothed.certify(image(0.0), 100, 40_000, 0.001, seed=1)
    assert winner == 0 and 0.4 * 0.95 < radius < 0.4


def test_the_edge_abstains():
    smoothed = Smoothed(Threshold(0.5), 0.5)
    assert smoothed.certify(image(0.5), 100, 1000, 0.001, seed=1) == (evaluate.certify.ABSTAIN, 0.0)
    assert smoothed.predict(image(0.5), 1000, 0.001, seed=1) == -1
    assert smoothed.predict(image(0.9), 1000, 0.001, seed=1) == 1
    assert smoothed.predict(image(0.1), 1000, 0.001, seed=1) == 0


def test_draws_come_in_batches_of_which_the_last_is_smaller():
    model = Threshold()
    Smoothed(model, 0.5, batch_size=64).certify(image(0.9), 10, 150, 0.001)
    assert model.sizes == [10, 64, 64, 22]


def test_every_draw_is_another_and_gaussian():
    model = Threshold()
    Smoothed(model, 0.5, batch_size=50).certify(image(0.9), 50, 100, 0.001, seed=2)
    noise = torch.cat(model.seen) - image(0.9)
    assert len(noise.flatten(1).unique(dim=0)) == 150
    assert noise.std().item() == pytest.approx(0.5, rel=0.03)
    assert (noise + image(0.9)).min() < 0  # not clipped


def test_counts_are_whole_and_complete():
    smoothed = Smoothed(Threshold(0.5), 0.5, batch_size=64)
    counts = smoothed._counts(image(0.6), 1000, torch.Generator().manual_seed(0))
    assert counts.dtype == torch.int64 and counts.sum() == 1000
    assert counts[1] / 1000 == pytest.approx(norm.cdf(0.2), abs=0.05)


def test_a_seed_fixes_the_draws():
    smoothed = Smoothed(Threshold(0.5), 0.5)
    first = smoothed.certify(image(0.9), 100, 500, 0.001, seed=1)
    assert smoothed.certify(image(0.9), 100, 500, 0.001, seed=1) == first
    radii = {smoothed.certify(image(0.9), 100, 500, 0.001, seed=s)[1] for s in range(5)}
    assert len(radii) > 1


def test_the_model_is_used_in_eval_mode_and_left_as_it_was():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), Threshold())
    model[0].eval()
    Smoothed(model, 0.5).predict(image(0.9), 20, 0.01)
    assert not model[0].training and model[1].training and model.training
    assert all(p.requires_grad for p in model.parameters())


def test_bad_arguments_are_refused():
    for sigma, batch in ((0.0, 10), (-1.0, 10), (float("nan"), 10), (0.5, 0)):
        with pytest.raises(RtkError, match="Smoothed: expected sigma > 0 and a batch"):
            Smoothed(Threshold(), sigma, batch)
    smoothed = Smoothed(Threshold(), 0.5)
    with pytest.raises(RtkError, match="expected one floating image"):
        smoothed.predict(torch.rand(1, 3, 4, 4), 10, 0.01)
    with pytest.raises(RtkError, match="expected one floating image"):
        smoothed.predict(torch.zeros(3, 4, 4, dtype=torch.uint8), 10, 0.01)
    with pytest.raises(RtkError, match="at least 1 draw"):
        smoothed.certify(image(0.9), 0, 10, 0.01)


def test_a_split_is_summed_up():
    pixels = torch.tensor([255, 255, 0, 0, 128, 255])
    labels = torch.tensor([1, 0, 0, 0, 1, 1])
    images = torch.full((6, 3, 4, 4), 128, dtype=torch.uint8)
    images[:, 0, 0, 0] = pixels
    config = CertifyConfig(
        0.5, n0=50, n=20_000, alpha=0.001, images=None, batch_size=5000, radii=(0.0, 0.4, 0.6)
    )
    result = certify_split(
        Threshold(128 / 255), Split(images, labels), config, seed=1, device=torch.device("cpu")
    )
    # Right with radius about 0.5: four of six. One is wrong, one lies on the edge.
    assert result["accuracy"] == pytest.approx(4 / 6)
    assert result["abstained"] == pytest.approx(1 / 6)
    assert result["certified_accuracy"] == pytest.approx([4 / 6, 4 / 6, 0.0])
    assert 0.45 * 4 / 6 < result["mean_radius"] < 0.5 * 4 / 6
    assert result["images"] == 6 and result["radii"] == [0.0, 0.4, 0.6]
    assert (result["sigma"], result["n0"], result["n"], result["alpha"]) == (0.5, 50, 20_000, 0.001)


def test_fewer_images_are_evenly_spaced():
    images = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(10) * 20
    model = Threshold()
    config = CertifyConfig(1e-6, n0=1, n=1, images=4, batch_size=1)
    split = Split(images, torch.zeros(10, dtype=torch.int64))
    assert certify_split(model, split, config, seed=0, device=torch.device("cpu"))["images"] == 4
    first = [round(x[0, 0, 0, 0].item() * 255 / 20) for x in model.seen[::2]]
    assert first == [0, 2, 5, 7]


@pytest.fixture
def config(tmp_path, transferred):
    return EvaluateConfig(
        out=str(tmp_path / "run"),
        checkpoint=str(transferred),
        attack=AttackConfig("none"),
        certify=CertifyConfig(0.1, n0=20, n=200, images=12, radii=(0.0, 0.1)),
    )


def test_rtk_evaluate_certifies(config, tmp_path):
    result = json.loads(evaluate.run(config).read_text())
    certified = result["certified"]
    assert certified["images"] == 12 and certified["sigma"] == 0.1
    at_0, at_01 = certified["certified_accuracy"]
    assert 0.5 < at_0 == certified["accuracy"] <= 1 and at_01 <= at_0
    assert certified["mean_radius"] <= certified_radius(200, 200, 0.1, 0.001)
    (row,) = report.read_results(tmp_path)
    assert row.extra["certified"] == certified
    again = dataclasses.replace(config, out=str(tmp_path / "again"))
    assert json.loads(evaluate.run(again).read_text())["certified"] == certified


def test_without_a_sigma_nothing_is_certified(config):
    config = dataclasses.replace(config, certify=CertifyConfig())
    assert "certified" not in json.loads(evaluate.run(config).read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": 0.0}, r"certify\.sigma: expected a deviation > 0"),
        ({"n0": 0}, r"certify\.n0: expected at least 1"),
        ({"n": 0}, r"certify\.n: expected at least 1"),
        ({"alpha": 1.0}, r"certify\.alpha: expected a probability"),
        ({"images": 0}, r"certify\.images"),
        ({"batch_size": 0}, r"certify\.batch_size"),
        ({"radii": (0.5, -0.1)}, r"certify\.radii: expected radii >= 0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(RtkError, match=message):
        CertifyConfig(**changes)


def test_nothing_is_warned_of(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.run(config)
