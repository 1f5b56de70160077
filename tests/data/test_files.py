import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator
from torchvision.transforms import functional as F

from rtk.config import DataConfig
from rtk.data import Batches, FileSplit, Split, channel_stats, dataset, files, load
from rtk.data.augment import draw_boxes, draw_flips
from rtk.errors import RtkError

SIDE = 24
AUGMENTS = ["none", "flip", "crop", "shift", "resized_crop"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(10):
        size = (30 + 7 * i, 90 - 5 * i, 3)
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(root / f"{i}.png")
    return [str(root / f"{i}.png") for i in range(10)]


def split(paths, workers=0):
    return FileSplit(paths, torch.arange(len(paths)), SIDE, 28, workers)


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_images_are_read_as_torchvision_does(paths):
    got = split(paths).images
    for path, image in zip(paths, got, strict=True):
        expected = F.center_crop(F.resize(Image.open(path), 28), SIDE)
        assert torch.equal(image, F.pil_to_tensor(expected))


def test_random_parts_are_torchvisions_resized_crop(paths):
    ((got, _),) = Batches(split(paths), 10, augment="resized_crop", seed=3).epoch(5)
    one = Batches(split(paths), 10, seed=3)._random(5, 0)
    seeds = torch.randint(2**63 - 1, (10,), generator=one).tolist()
    for path, seed, image in zip(paths, seeds, got, strict=True):
        source = Image.open(path)
        generator = Generator().manual_seed(seed)
        box = draw_boxes(1, source.height, source.width, generator)[0].int().tolist()
        expected = F.resized_crop(source, *box, [SIDE, SIDE])
        if draw_flips(1, generator):
            expected = F.hflip(expected)
        assert torch.equal(image, F.pil_to_tensor(expected).float() / 255)


@pytest.mark.parametrize("augment", [name for name in AUGMENTS if name != "resized_crop"])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in-order", "shuffled"])
def test_batches_of_files_are_those_of_memory(paths, augment, shuffle):
    streamed = split(paths)
    held = Split(streamed.images, streamed.labels)
    options = {"augment": augment, "shuffle": shuffle, "seed": 4, "drop_last": True}
    assert equal(
        list(Batches(split(paths), 4, **options).epoch(1)),
        list(Batches(held, 4, **options).epoch(1)),
    )


@pytest.mark.parametrize("augment", ["none", "resized_crop"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_continues_bit_for_bit_from_any_step(paths, augment, workers):
    def batches(workers):
        return Batches(split(paths, workers), 3, augment=augment, shuffle=True, seed=7)

    whole = list(batches(0).epoch(2))
    assert [len(y) for _, y in whole] == [3, 3, 3, 1]
    for start in range(5):
        assert equal(list(batches(workers).epoch(2, start)), whole[start:])


def test_parts_differ_between_images_steps_epochs_and_seeds(paths):
    same = split([paths[0]] * 6)
    seen = [
        image
        for seed in (0, 1)
        for epoch in (0, 1)
        for x, _ in Batches(same, 3, augment="resized_crop", seed=seed).epoch(epoch)
        for image in x
    ]
    assert len(seen) == 24
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_neither_read_nor_changed(paths, workers):
    batches = Batches(split(paths, workers), 4, augment="resized_crop", shuffle=True)
    before = torch.get_rng_state()
    first = list(batches.epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal(list(batches.epoch(0)), first)


def test_an_epoch_that_is_left_leaves_no_process(paths):
    epoch = Batches(split(paths, 2), 1).epoch(0)
    next(epoch)
    assert len(multiprocessing.active_children()) == 2
    epoch.close()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_an_interrupt_is_the_main_processs_business(paths):
    epoch = Batches(split(paths, 1), 1).epoch(0)
    labels = [int(next(epoch)[1])]
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    labels += [int(y) for _, y in epoch]
    assert labels == list(range(10))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augment", ["none", "resized_crop"])
def test_a_damaged_file_is_named(paths, tmp_path, workers, augment):
    bad = tmp_path / "bad.png"
    bad.write_bytes(Path(paths[0]).read_bytes()[:900])
    with pytest.raises(RtkError) as error:
        list(Batches(split([*paths[:3], str(bad)], workers), 2, augment=augment).epoch(0))
    message = str(error.value)
    assert message.startswith(f"{bad} cannot be decoded")
    assert "rtk data check" in message and "data.skip_bad" in message


def test_workers_are_one_a_cpu_and_ranks_share_them(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(12))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert files._cpus() == 12
    for ranks, expected in ((4, 3), (16, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert files._cpus() == expected
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(999))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert files._cpus() == 16


def test_a_worker_that_dies_is_explained(paths, monkeypatch):
    monkeypatch.setattr(files, "_leave_interrupts_to_the_main_process", lambda _: os._exit(1))
    with pytest.raises(RtkError, match=r"decodes images died .*--shm-size.*data\.workers"):
        list(Batches(split(paths, 1), 2).epoch(0))


def test_select_relabel_and_sample(paths):
    whole = split(paths)
    some = whole.select(torch.tensor([4, 2]))
    assert some.files == [paths[4], paths[2]] and some.labels.tolist() == [4, 2]
    assert torch.equal(some.images, whole.images[[4, 2]])
    mask = torch.zeros(10, dtype=torch.bool)
    mask[3] = True
    assert whole.select(mask).files == [paths[3]]
    assert whole.relabel(torch.zeros(10).long()).labels.tolist() == [0] * 10
    assert torch.equal(whole.sample(3), whole.images[[0, 3, 6]])
    held = Split(whole.images, whole.labels)
    assert torch.equal(held.sample(3), whole.sample(3))
    assert torch.equal(whole.sample(99), whole.images)


def test_channel_stats_are_of_the_images_that_come_out(paths):
    streamed = split(paths)
    assert channel_stats(streamed) == channel_stats(Split(streamed.images, streamed.labels))


def test_bad_arguments(paths):
    with pytest.raises(RtkError, match="10 files but 3 labels"):
        FileSplit(paths, torch.arange(3), SIDE, 28)
    with pytest.raises(RtkError, match="no image"):
        FileSplit([], torch.arange(0), SIDE, 28)
    with pytest.raises(RtkError, match=r"data\.workers: expected a number of processes >= 0"):
        DataConfig(workers=-1)
    with pytest.raises(RtkError, match=r"unknown storage 'disk'.*auto, memory, stream"):
        DataConfig(storage="disk")


def test_all_images_at_once_must_fit(paths, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_BYTES", 1000)
    with pytest.raises(RtkError, match="reading all images at once: 10 images of 24x24"):
        split(paths).images  # noqa: B018


def tree(root, count=6):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (80 + i, 100, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")


def test_a_folder_is_streamed_on_demand(tmp_path):
    tree(tmp_path, 2)
    name = f"folder:{tmp_path}"
    data = load(DataConfig(name=name, storage="stream", image_size=70, workers=0))
    assert isinstance(data.train, FileSplit) and data.train.shorter == 80
    assert data.augment == "resized_crop"
    assert load(DataConfig(name=name, image_size=70)).train.streamed is False
    with pytest.raises(RtkError, match=r"storage stream needs data\.image_size"):
        load(DataConfig(name=name, storage="stream"))


def test_skip_bad_of_a_folder(tmp_path):
    tree(tmp_path, 2)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"no image")
    Image.new("RGB", (100, 80)).save(tmp_path / "train" / "cat" / "1.png")
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            file = tmp_path / part / name / "1.png"
            Image.open(file).convert("RGB").resize((100, 80)).save(file)
    with pytest.warns(UserWarning, match=r"1 of 8 images cannot be decoded .*cat/0\.png"):
        data = load(DataConfig(name=f"folder:{tmp_path}", skip_bad=True))
    assert data.train.labels.tolist() == [0, 1, 1] and data.train.size == (80, 100)


def test_skip_bad_with_nothing_left(tmp_path):
    tree(tmp_path, 1)
    for name in ("cat", "dog"):
        (tmp_path / "test" / name / "0.png").write_bytes(b"no image")
    with pytest.raises(RtkError, match="no test image can be decoded"):
        load(DataConfig(name=f"folder:{tmp_path}", skip_bad=True))


def test_stages_run_on_streamed_images(tmp_path, one_cpu_thread):
    """A pretraining that is interrupted inside an epoch goes on to the weights of one in one go."""
    from rtk import pretrain
    from rtk.config import ModelConfig, PretrainConfig, TrainConfig
    from rtk.errors import Interrupted
    from rtk.train import Checkpoint

    tree(tmp_path / "images")

    def config(out, workers, **train):
        return PretrainConfig(
            out=str(tmp_path / out),
            data=DataConfig(
                f"folder:{tmp_path / 'images'}", image_size=66, storage="stream", workers=workers
            ),
            model=ModelConfig(width=0.0625),
            train=TrainConfig(epochs=2, batch_size=4, **train),
        )

    with one_cpu_thread():
        whole = Checkpoint.load(pretrain.run(config("whole", 0)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batches, "epoch", _interrupted_after_two_steps(Batches.epoch))
            with pytest.raises(Interrupted):
                pretrain.run(config("stopped", 1, checkpoint_seconds=0.0))
        again = Checkpoint.load(pretrain.run(config("stopped", 0)))
    assert whole.spec.stem == "7x7"
    assert whole.meta["config_hash"] == again.meta["config_hash"]
    for name, tensor in whole.build_model().state_dict().items():
        assert torch.equal(tensor, again.build_model().state_dict()[name]), name


def _interrupted_after_two_steps(epoch):
    def steps(self, number, start=0, every=1):
        for step, batch in enumerate(epoch(self, number, start, every)):
            if self.shuffle and number == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    return steps
