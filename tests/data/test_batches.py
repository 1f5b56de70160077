import subprocess
import sys

import pytest
import torch

from rtk.data import Batches, Split
from rtk.errors import RtkError

AUGMENTS = ["none", "flip", "crop", "shift", "resized_crop"]


def split(n=10, side=8):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=g)
    return Split(images, torch.arange(n))


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(
    ("n", "drop_last", "sizes"),
    [
        (10, False, [4, 4, 2]),
        (10, True, [4, 4]),
        (8, False, [4, 4]),
        (8, True, [4, 4]),
        (3, False, [3]),
        (3, True, [3]),
    ],
)
def test_steps_of_an_epoch(n, drop_last, sizes):
    batches = Batches(split(n), 4, drop_last=drop_last)
    assert len(batches) == len(sizes)
    assert [len(y) for _, y in batches.epoch(0)] == sizes


def test_plain_batches_are_the_split_in_order():
    data = split()
    pairs = list(Batches(data, 4).epoch(3))
    assert torch.equal(torch.cat([y for _, y in pairs]), data.labels)
    images = torch.cat([x for x, _ in pairs])
    assert images.dtype == torch.float32
    assert torch.equal(images, data.images.float() / 255)
    assert images.min() == 0 and images.max() == 1


def test_shuffle_visits_each_image_once_and_differently_each_epoch_and_seed():
    def order(epoch, seed):
        batches = Batches(split(100), 7, shuffle=True, seed=seed)
        return torch.cat([y for _, y in batches.epoch(epoch)]).tolist()

    orders = [order(0, 0), order(1, 0), order(0, 1), order(1, 1)]
    assert all(sorted(o) == list(range(100)) for o in orders)
    assert len(set(map(tuple, orders))) == 4
    assert order(1, 0) == orders[1]


def test_images_keep_their_labels_when_shuffled():
    data = split()
    for x, y in Batches(data, 4, shuffle=True).epoch(0):
        assert torch.equal(x, data.images[y].float() / 255)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("shuffle", [False, True], ids=["in-order", "shuffled"])
def test_an_epoch_continues_bit_for_bit_from_any_step(augment, shuffle):
    batches = Batches(split(), 3, augment=augment, shuffle=shuffle, seed=7)
    whole = list(batches.epoch(2))
    for start in range(len(batches) + 1):
        fresh = Batches(split(), 3, augment=augment, shuffle=shuffle, seed=7)
        assert equal(list(fresh.epoch(2, start)), whole[start:])


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_augmentation_differs_between_steps_epochs_and_seeds(augment):
    one = Split(split(1).images.expand(6, -1, -1, -1).contiguous(), torch.zeros(6).long())
    seen = [
        x
        for seed in (0, 1)
        for epoch in (0, 1)
        for x, _ in Batches(one, 3, augment=augment, seed=seed).epoch(epoch)
    ]
    assert len(seen) == 8
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("augment", AUGMENTS)
def test_global_random_state_is_neither_read_nor_changed(augment):
    batches = Batches(split(), 4, augment=augment, shuffle=True)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = list(batches.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(list(batches.epoch(0)), first)


def test_order_is_the_same_in_another_process():
    code = (
        "import torch; from rtk.data import Batches, Split;"
        "s = Split(torch.zeros(20, 3, 2, 2, dtype=torch.uint8), torch.arange(20));"
        "print([y.tolist() for _, y in Batches(s, 20, shuffle=True, seed=3).epoch(1)][0])"
    )
    data = Split(torch.zeros(20, 3, 2, 2, dtype=torch.uint8), torch.arange(20))
    ((_, here),) = Batches(data, 20, shuffle=True, seed=3).epoch(1)
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(here.tolist())


def test_batches_leave_the_split_as_it_was():
    data = split()
    before = data.images.clone()
    for x, _ in Batches(data, 4).epoch(0):
        x.zero_()
    assert torch.equal(data.images, before)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_channels_last_changes_the_layout_only(augment):
    plain = Batches(split(), 4, augment=augment)
    last = Batches(split(), 4, augment=augment, channels_last=True)
    assert equal(list(plain.epoch(0)), list(last.epoch(0)))
    for (x, _), (z, _) in zip(plain.epoch(0), last.epoch(0), strict=True):
        assert x.is_contiguous()
        assert z.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("epoch", "start"), [(-1, 0), (0, -1), (0, 4)], ids=["epoch", "negative", "beyond"]
)
def test_out_of_range_is_refused_at_once(epoch, start):
    with pytest.raises(RtkError, match=r"start in 0\.\.3"):
        Batches(split(), 4).epoch(epoch, start)


def test_bad_arguments():
    with pytest.raises(RtkError, match="batch_size: expected at least 1 image, got 0"):
        Batches(split(), 0)
    with pytest.raises(RtkError, match="unknown augmentation 'auto'"):
        Batches(split(), 4, augment="auto")


@pytest.mark.gpu
def test_gpu_batches_equal_cpu_batches():
    on_cpu = list(Batches(split(), 4, augment="crop", shuffle=True).epoch(0))
    on_gpu = list(Batches(split(), 4, augment="crop", shuffle=True, device="cuda").epoch(0))
    assert all(x.is_cuda and y.is_cuda for x, y in on_gpu)
    for (x, y), (u, v) in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(y, v.cpu())
        assert torch.allclose(x, u.cpu(), atol=1e-7, rtol=0)
