import pytest
import torch
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from rtk.errors import RtkError
from rtk.train import ConfusionMatrix


def batches(classes, missing=None, count=3):
    """Logits and labels of some batches, a fifth of the pixels to ignore; one class left out."""
    found = []
    for _ in range(count):
        logits = torch.randn(2, classes, 9, 7)
        labels = torch.randint(classes, (2, 9, 7))
        if missing is not None:
            logits[:, missing] = -100
            labels[labels == missing] = 0
        labels[torch.rand(2, 9, 7) < 0.2] = 255
        found.append((logits, labels))
    return found


@pytest.mark.parametrize("missing", [None, 2], ids=["all-classes", "one-class-never-occurs"])
def test_it_is_torchmetrics(device, missing):
    matrix = ConfusionMatrix(5, device=device)
    jaccard = MulticlassJaccardIndex(5, ignore_index=255)
    by_class = MulticlassJaccardIndex(5, average="none", ignore_index=255)
    peer = MulticlassConfusionMatrix(5, ignore_index=255)
    for logits, labels in batches(5, missing):
        matrix.update(logits.to(device), labels.to(device))
        for metric in (jaccard, by_class, peer):
            metric.update(logits, labels)
    assert torch.equal(matrix.counts.cpu(), peer.compute())
    assert matrix.mean_iou() == pytest.approx(jaccard.compute().item(), abs=1e-6)
    torch.testing.assert_close(matrix.iou().nan_to_num().float(), by_class.compute())
    assert bool(matrix.iou().isnan()[2]) == (missing == 2)


def test_by_hand():
    matrix = ConfusionMatrix(3)
    predicted = torch.tensor([[0, 0, 1], [1, 1, 2]])
    labels = torch.tensor([[0, 1, 1], [1, 255, 0]])
    matrix.update(predicted, labels)
    assert matrix.counts.tolist() == [[1, 0, 1], [1, 2, 0], [0, 0, 0]]
    # Class 2 was given once and never right.
    assert matrix.iou().tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert matrix.mean_iou() == pytest.approx(1 / 3)


def test_labels_of_bytes_and_another_label_to_ignore():
    matrix = ConfusionMatrix(2, ignore=-1)
    matrix.update(torch.tensor([0, 1, 1], dtype=torch.uint8), torch.tensor([0, 1, -1]))
    assert matrix.mean_iou() == 1.0
    masks = ConfusionMatrix(2)
    masks.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 255], dtype=torch.uint8))
    assert masks.mean_iou() == 1.0


@pytest.mark.parametrize("label", [3, 7, -1])
def test_labels_of_no_class_are_refused_when_the_matrix_is_read(label):
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, label]))
    with pytest.raises(RtkError, match=r"1 pixels have a label or a prediction outside 0\.\.2"):
        matrix.mean_iou()


def test_nothing_but_ignored_pixels_is_refused():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.zeros(4, dtype=torch.int64), torch.full((4,), 255))
    with pytest.raises(RtkError, match="no pixel has a class"):
        matrix.mean_iou()


def test_bad_arguments_are_refused():
    with pytest.raises(RtkError, match="at least 1 class and a label to ignore"):
        ConfusionMatrix(0)
    with pytest.raises(RtkError, match="at least 1 class and a label to ignore"):
        ConfusionMatrix(256)
    matrix = ConfusionMatrix(3)
    with pytest.raises(RtkError, match=r"expected logits \(N, 3, \.\.\.\), got \(2, 4, 5, 5\)"):
        matrix.update(torch.zeros(2, 4, 5, 5), torch.zeros(2, 5, 5, dtype=torch.int64))
    with pytest.raises(RtkError, match="resize the logits to the size of the labels"):
        matrix.update(torch.zeros(2, 3, 5, 5), torch.zeros(2, 10, 10, dtype=torch.int64))
