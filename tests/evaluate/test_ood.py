import dataclasses
import json

import pytest
import torch
from torch import nn

from rtk import data, evaluate
from rtk.config import AttackConfig, DataConfig, EvaluateConfig
from rtk.data import Batches, Split
from rtk.errors import RtkError
from rtk.evaluate import confidences, roc_auc
from rtk.identity import config_hash
from rtk.train import Checkpoint


def by_pairs(inside, outside):
    """The definition: over all pairs, how often the score inside is higher, ties counted half."""
    difference = inside[:, None] - outside[None, :]
    return ((difference > 0).double() + (difference == 0).double() / 2).mean().item()


@pytest.mark.parametrize("decimals", [0, 1, 6], ids=["two-values", "many-ties", "no-ties"])
def test_the_area_is_that_over_all_pairs(decimals):
    inside, outside = torch.rand(70).double().sqrt(), torch.rand(41).double()
    inside, outside = inside.round(decimals=decimals), outside.round(decimals=decimals)
    assert roc_auc(inside, outside) == pytest.approx(by_pairs(inside, outside), abs=1e-12)
    assert roc_auc(outside, inside) == pytest.approx(1 - roc_auc(inside, outside), abs=1e-12)


def test_the_ends_and_the_middle():
    high, low = torch.tensor([0.9, 0.8]), torch.tensor([0.7, 0.5, 0.6])
    assert roc_auc(high, low) == 1.0
    assert roc_auc(low, high) == 0.0
    assert roc_auc(high[:1], high[:1]) == 0.5


class Margin(nn.Module):
    """Logits 0 and `scale` times the first pixel: a confidence that is known."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.dropout = nn.Dropout(0.9)

    def forward(self, x):
        margin = self.scale * x[:, 0, 0, 0]
        return self.dropout(torch.stack([torch.zeros_like(margin), margin], 1))


def of_pixels(pixels, batch_size=3):
    images = torch.zeros(len(pixels), 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor(pixels, dtype=torch.uint8)
    return Batches(Split(images, torch.zeros(len(pixels), dtype=torch.int64)), batch_size)


def test_a_confidence_is_the_maximum_softmax_probability():
    found = confidences(Margin(2.0), of_pixels([0, 255, 51, 102]))
    margins = 2 * torch.tensor([0.0, 1.0, 0.2, 0.4], dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.sigmoid(margins), rtol=1e-6, atol=0)


def test_confident_images_do_not_tie():
    """In fp32 a softmax is 1 from a margin of 17 on, and ROC-AUC would be 0.5."""
    inside = confidences(Margin(30.0), of_pixels([255] * 4))
    outside = confidences(Margin(30.0), of_pixels([230] * 4))
    assert inside.float().unique().tolist() == outside.float().unique().tolist() == [1.0]
    assert roc_auc(inside, outside) == 1.0


def test_the_model_is_left_as_it_was():
    model = Margin(1.0)
    confidences(model, of_pixels([0, 255]))
    assert model.training and model.dropout.training


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(RtkError, match="not finite on 2 of 2 images"):
        confidences(Margin(float("inf")), of_pixels([0, 255]))


@pytest.fixture
def config(tmp_path, transferred):
    return EvaluateConfig(
        out=str(tmp_path / "run"),
        checkpoint=str(transferred),
        attack=AttackConfig("none"),
        ood=("digits[0-1]", "digits[4,6]"),
        batch_size=32,
    )


def test_rtk_evaluate_writes_the_area_of_each_set(config, transferred):
    from sklearn.metrics import roc_auc_score

    areas = json.loads(evaluate.run(config).read_text())["ood_auc"]
    model = Checkpoint.load(transferred).build_model().eval()

    def scores(name):
        images = data.load(DataConfig(name)).test.images
        with torch.no_grad():
            return model(images.float() / 255).double().softmax(1).max(1).values.tolist()

    inside = scores("digits[2-3]")
    assert [*areas] == ["digits[0-1]", "digits[4,6]"]
    for name, area in areas.items():
        outside = scores(name)
        labels = [1] * len(inside) + [0] * len(outside)
        assert area == pytest.approx(roc_auc_score(labels, inside + outside), abs=1e-4)


def test_other_sets_are_resized(config, tmp_path, monkeypatch):
    """To the size of the images they are told from, whatever that is."""
    seen = []
    monkeypatch.setattr(evaluate, "roc_auc", lambda inside, outside: 0.5)
    monkeypatch.setattr(
        evaluate, "confidences", lambda model, batches: seen.append(batches.images.shape[2:])
    )
    evaluate.run(dataclasses.replace(config, data=DataConfig("digits[2-3]", image_size=12)))
    assert seen == [(12, 12)] * 3


def test_without_other_sets_there_is_no_area_and_the_run_is_the_one_it_was(config):
    plain = dataclasses.replace(config, ood=())
    assert "ood_auc" not in json.loads(evaluate.run(plain).read_text())
    assert config_hash(plain) != config_hash(config)
    text = config.out + "/config.yaml"
    with open(text) as file:
        lines = [line for line in file if not line.startswith("ood")]
    with open(text, "w") as file:
        file.writelines(lines)  # as a run from before there was `ood` has it
    evaluate.run(plain)


@pytest.mark.parametrize(
    ("ood", "message"),
    [
        (("digits[2-3]",), r"digits\[2-3\] is the set that is evaluated on"),
        (("digist",), r"unknown data set 'digist'.*did you mean 'digits'\?"),
        (("digits[4,12]",), "unknown class 12"),
        (("npz:nowhere.npz",), "no file for npz:nowhere.npz"),
    ],
)
def test_bad_sets_are_refused_before_anything_is_measured(config, tmp_path, ood, message):
    with pytest.raises(RtkError, match=message):
        evaluate.run(dataclasses.replace(config, ood=ood))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ood", [("",), ("digits", "digits")])
def test_names_that_are_none_are_refused(ood):
    with pytest.raises(RtkError, match="ood: expected names of data sets, each once"):
        EvaluateConfig(ood=ood)
