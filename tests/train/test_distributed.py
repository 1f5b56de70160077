"""Stages under torchrun: several processes do what one does, and end together."""

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rtk import data, distributed, draw, evaluate, pretrain, recipes, runs, transfer
from rtk.config import (
    AttackConfig,
    CertifyConfig,
    DataConfig,
    DrawConfig,
    EvaluateConfig,
    ModelConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
)
from rtk.data.files import FileSplit
from rtk.errors import Interrupted, RtkError
from rtk.identity import to_dict
from rtk.ticket import Ticket
from rtk.train import Checkpoint, check_batch_size, loop
from rtk.train.distributed import Share

SCRIPT = Path(__file__).parent / "torchrun_rank.py"
SECONDS = 150  # a pair of processes takes a tenth of it
HIDDEN = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True, scope="module")
def _one_cpu_thread_for_all(one_cpu_thread):
    with one_cpu_thread():
        yield


@pytest.fixture(autouse=True)
def _one_cpu_thread():
    """Take the place of the folder's fixture, which hides the GPU from the tests that need it."""


def torchrun(folder, jobs, gpus=False):
    """Run jobs (see the script) in two processes; return the finished process."""
    file = write_jobs(folder, jobs)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc_per_node=2", str(SCRIPT), str(file)],
        env=HIDDEN if not gpus else os.environ,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def write_jobs(folder, jobs):
    file = folder / f"jobs{len(list(folder.glob('jobs*.json')))}.json"
    file.write_text(json.dumps(jobs))
    return file


@pytest.fixture(scope="module")
def forked():
    """Return a function like `torchrun`, for CPUs, whose processes need not import anything."""
    server = subprocess.Popen(
        [sys.executable, SCRIPT],
        env=HIDDEN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def run(folder, jobs):
        file = write_jobs(folder, jobs)
        outputs = [file.with_suffix(".out"), file.with_suffix(".err")]
        print(file, *outputs, file=server.stdin, flush=True)
        returncode = int(server.stdout.readline())
        printed = [output.read_text() for output in outputs]
        return subprocess.CompletedProcess(file, returncode, *printed)

    yield run
    server.stdin.close()
    try:
        server.wait(timeout=20)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)


def command(name, config):
    """Return the words of the command that runs a stage."""
    path = Path(config.out).parent / f"{Path(config.out).name}.yaml"
    path.write_text(json.dumps(to_dict(config)))  # JSON is YAML
    return [name, "--config", str(path)]


def records(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "images_per_second", "processes")
    return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]


def losses(folder):
    return [record["loss"] for record in records(folder)]


def weights(folder):
    return {n: t for n, t in Checkpoint.load(folder).tensors.items() if n.startswith("model.")}


def assert_close(ours, theirs, tolerance):
    assert losses(ours) == pytest.approx(losses(theirs), rel=tolerance)
    alone = weights(theirs)
    for name, tensor in weights(ours).items():
        torch.testing.assert_close(tensor, alone[name], rtol=tolerance, atol=tolerance)


class Road:
    """The stages, and what they read: made by one process."""

    def __init__(self, folder):
        self.folder = folder
        machine = {"device": "cpu", "threads": 1}
        train = TrainConfig(epochs=2, batch_size=50, lr=0.02)
        short = dataclasses.replace(train, epochs=1)
        source = {"checkpoint": str(folder / "source"), "data": DataConfig("digits[2-4]")}
        attack = AttackConfig("pgd", eps=0.1, steps=1)
        self.source = PretrainConfig(
            out=str(folder / "source"),
            **machine,
            data=DataConfig("digits[0-1]"),
            model=ModelConfig(width=0.0625),
            train=TrainConfig(epochs=1, batch_size=64, lr=0.05),
        )

        def transferred(name, mode):
            return TransferConfig(
                out=str(folder / name), **machine, **source, mode=mode, train=train
            )

        def drawn(name, scheme, **settings):
            values = {**source, **settings}
            return DrawConfig(out=str(folder / name), **machine, scheme=scheme, **values)

        self.stages = {
            "pretrained": PretrainConfig(
                out=str(folder / "pretrained"),
                **machine,
                data=DataConfig("digits[0-1]"),
                model=ModelConfig(width=0.0625),
                train=dataclasses.replace(train, checkpoint_seconds=0.0),  # at each step
                attack=attack,
            ),
            "frozen": transferred("frozen", "linear_frozen"),
            "finetuned": transferred("finetuned", "finetune"),
            "omp": drawn("omp", "omp", sparsity=0.5),
            "lmp": drawn("lmp", "lmp", sparsity=0.5, train=short),
            "imp": drawn("imp", "imp", rounds=2, train=short),
            "evaluated": EvaluateConfig(
                out=str(folder / "evaluated"),
                **machine,
                checkpoint=str(folder / "source"),
                batch_size=8,
                attack=attack,
                ood=("digits[5-6]",),
                certify=CertifyConfig(sigma=0.1, images=5, n0=5, n=20, batch_size=20),
            ),
        }

    def command(self, name, out=None):
        """Return the command of a stage, perhaps with another folder to write to."""
        config = self.stages[name]
        words = command(
            {PretrainConfig: "pretrain", TransferConfig: "transfer", DrawConfig: "draw"}.get(
                type(config), "evaluate"
            ),
            config,
        )
        return [*words, "--out", str(self.folder / (out or name))]

    def alone(self, name):
        """Run a stage in this process and return its folder."""
        config = self.stages[name]
        folder = self.folder / "alone" / name
        run = {PretrainConfig: pretrain.run, TransferConfig: transfer.run, DrawConfig: draw.run}
        settings = {**vars(config), "out": str(folder)}
        run.get(type(config), evaluate.run)(type(config)(**settings))
        return folder


@pytest.fixture(scope="module")
def road(tmp_path_factory, one_cpu_thread):
    road = Road(tmp_path_factory.mktemp("road"))
    with one_cpu_thread():
        pretrain.run(road.source)
    return road


@pytest.fixture(scope="module")
def together(road, forked):
    """The road after two processes have been over it; what they printed."""
    alike = [
        {"call": "train_alike", "out": str(road.folder / attack), "attack": attack, "epochs": n}
        for attack, n in {"natural": 3, "pgd": 3, "free": 1}.items()
    ]
    stop = {"call": "stop", "step": 4, "words": road.command("frozen", "stopped")}
    stages = [road.command(name) for name in road.stages]
    done = forked(road.folder, [*alike, *stages, stop])
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def died(road):
    """What a pair printed of which one was killed within an epoch, and how long it took."""
    words = road.command("pretrained", "died")
    started = time.monotonic()
    done = torchrun(road.folder, [{"call": "die", "step": 4, "words": words, "how": "exit"}])
    return done, time.monotonic() - started


@pytest.fixture(scope="module")
def resumed(road, together, died, forked):
    """The runs that were stopped, gone on with; and a pair of which one raised."""
    stop_alone(road)
    again = [road.command("frozen", "stopped"), road.command("pretrained", "died")]
    words = road.command("finetuned", "failed")
    return forked(road.folder, [*again, {"call": "die", "step": 3, "words": words, "how": "raise"}])


def stop_alone(road):
    """Go on with the stopped run in this process, and stop that too, four steps later."""
    make_step, steps = loop.make_step, [0]

    def stopping(*arguments, **options):
        step = make_step(*arguments, **options)

        def counted(x, y):
            steps[0] += 1
            if steps[0] == 4:
                signal.raise_signal(signal.SIGTERM)
            return step(x, y)

        return counted

    config = road.stages["frozen"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "make_step", stopping)
        transfer.run(TransferConfig(**{**vars(config), "out": str(road.folder / "stopped")}))
    os.close(runs._locks.pop((road.folder / "stopped").resolve()))  # as if this process had ended


@pytest.mark.parametrize("attack", ["natural", "pgd"])
def test_two_processes_train_as_one_does(road, together, attack, tmp_path):
    runpy.run_path(str(SCRIPT))["train_alike"](str(tmp_path / "alone"), attack)
    assert_close(road.folder / attack, tmp_path / "alone", 2e-4)
    assert losses(tmp_path / "alone")[-1] < losses(tmp_path / "alone")[0]


def test_free_carries_the_perturbations_of_all_images(road, together, tmp_path):
    runpy.run_path(str(SCRIPT))["train_alike"](str(tmp_path / "alone"), "free", epochs=1)
    # Where the last batch is smaller, each process goes on with its own first images.
    assert losses(road.folder / "free") == pytest.approx(losses(tmp_path / "alone"), rel=0.02)


def test_batch_norm_makes_the_difference_and_a_small_one(road, together):
    for name in ("pretrained", "finetuned"):
        ours, alone = losses(road.folder / name), losses(road.alone(name))
        assert ours != alone
        assert ours == pytest.approx(alone, rel=0.15)


def test_linear_evaluation_on_frozen_features_is_that_of_one_process(road, together):
    assert_close(road.folder / "frozen", road.alone("frozen"), 1e-5)
    assert records(road.folder / "frozen")[-1]["top1"] == pytest.approx(
        records(road.folder / "alone" / "frozen")[-1]["top1"], abs=0.02
    )


def test_an_evaluation_is_that_of_one_process_in_every_number(road, together):
    alone = json.loads((road.alone("evaluated") / "result.json").read_text())
    assert json.loads((road.folder / "evaluated" / "result.json").read_text()) == alone
    assert 0 < alone["pgd_top1"] < 1 or alone["pgd_top1"] != alone["top1"]
    assert alone["images"] > 40 and alone["certified"]["images"] == 5


def test_every_scheme_leaves_one_ticket(road, together):
    alone = Ticket.load(road.alone("omp") / "ticket.safetensors")
    ours = Ticket.load(road.folder / "omp" / "ticket.safetensors")
    assert all(torch.equal(mask, alone.masks[name]) for name, mask in ours.masks.items())
    for scheme in ("lmp", "imp"):
        ticket = Ticket.load(road.folder / scheme / "ticket.safetensors")
        assert ticket.sparsity == pytest.approx(0.5 if scheme == "lmp" else 0.36, abs=1e-3)
        kept = Ticket.load(road.alone(scheme) / "ticket.safetensors")
        same = [(m == kept.masks[n]).float().mean() for n, m in ticket.masks.items()]
        assert torch.stack(same).mean() > 0.9
    rounds = [p.name for p in sorted((road.folder / "imp" / "rounds").iterdir())]
    assert rounds == ["01", "02"]
    assert not list(road.folder.glob("**/.*.safetensors.*"))


def test_one_process_talks_and_writes(road, together):
    printed = together.stdout.splitlines()
    for name in road.stages:
        assert sum(line.startswith(str(road.folder / name)) for line in printed) == 1
    assert together.stderr.count("pretrain pgd-linf-0.1 epoch 1/2") == 1
    assert together.stderr.count("rtk: stopped at epoch 0, step 4") == 1
    assert len(records(road.folder / "pretrained")) == 2


def test_two_processes_then_one_then_two_end_as_one_would(road, resumed):
    assert_close(road.folder / "stopped", road.alone("frozen"), 1e-5)


def test_a_process_that_dies_ends_the_run_which_goes_on_to_the_same_numbers(road, died, resumed):
    done, seconds = died
    assert done.returncode != 0 and seconds < 60
    told = done.stderr.count("rtk: error: process 0 lost another process of this run")
    # torchrun, too, looks whether processes live, and may end process 0 before it finds out.
    assert told == 1 or (told == 0 and "closing signal SIGTERM" in done.stderr)
    assert told == done.stderr.count("goes on from the last checkpoint")
    assert records(road.folder / "died") == records(road.folder / "pretrained")
    ours, theirs = (weights(road.folder / name) for name in ("died", "pretrained"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_process_that_raises_ends_the_run_with_its_one_line(resumed):
    assert resumed.returncode != 0
    assert resumed.stderr.count("rtk: error: ") == 1
    assert "rtk: error: image 7 cannot be decoded" in resumed.stderr
    assert "Traceback" not in resumed.stderr.split("rtk: error: ")[0]


def pieces(batches, epoch, ranks, **where):
    """Return the batches of an epoch, put together from the shares of several processes."""
    shares = [list(batches.share(rank, ranks).epoch(epoch, **where)) for rank in range(ranks)]
    return [
        tuple(torch.cat([share[step][part] for share in shares]) for part in (0, 1))
        for step in range(len(shares[0]))
    ]


@pytest.mark.parametrize("augment", ["none", "flip", "crop", "shift", "resized_crop"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_shares_put_together_are_the_batch(augment, ranks):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (31, 3, 8, 8), dtype=torch.uint8, generator=generator)
    split = data.Split(images, torch.arange(31))
    batches = data.Batches(split, 12, augment=augment, shuffle=True, seed=1)
    whole, put_together = list(batches.epoch(2)), pieces(batches, 2, ranks)
    assert [len(y) for _, y in whole] == [12, 12, 7]
    for (x, y), (our_x, our_y) in zip(whole, put_together, strict=True):
        assert torch.equal(x, our_x) and torch.equal(y, our_y)
    (last,) = pieces(batches, 2, ranks, start=2)
    assert torch.equal(last[0], whole[2][0])


@pytest.mark.parametrize("augment", ["crop", "resized_crop"])
def test_shares_of_files_put_together_are_the_batch(augment, tmp_path):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    files = []
    for index in range(6):
        pixels = torch.randint(0, 256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(pixels.numpy()).save(files[-1])
    split = FileSplit(files, torch.arange(6), 16, 18, workers=0)
    batches = data.Batches(split, 4, augment=augment, shuffle=True, drop_last=True)
    ((x, y),) = batches.epoch(0)
    ((our_x, our_y),) = pieces(batches, 0, 2)
    assert torch.equal(x, our_x) and torch.equal(y, our_y)


class Group:
    """What `rtk.distributed` says in one of several processes."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks, self.local_rank = rank, ranks, rank


def test_a_last_batch_too_small_to_share_is_everybodys(monkeypatch):
    split = data.Split(torch.zeros(11, 3, 4, 4, dtype=torch.uint8), torch.arange(11))
    batches = data.Batches(split, 8)
    counts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "_group", Group(rank, 2))
        share = Share(batches)
        counts.append([(y.tolist(), share.weight) for _, y in share.epoch(0)])
    assert counts[0] == [([0, 1, 2, 3], 1.0), ([8, 9, 10], 1.0)]
    assert counts[1] == [([4, 5, 6, 7], 1.0), ([8, 9, 10], 1.0)]
    monkeypatch.setattr(distributed, "_group", Group(1, 2))
    uneven = Share(data.Batches(split, 6))
    assert [(len(y), uneven.weight) for _, y in uneven.epoch(0, 1)] == [(3, pytest.approx(1.2))]


def test_a_source_that_knows_no_shares_is_cut(monkeypatch):
    class Source:
        def __len__(self):
            return 1

        def epoch(self, epoch, start=0):
            yield torch.arange(7), torch.arange(7)

    monkeypatch.setattr(distributed, "_group", Group(1, 2))
    share = Share(Source())
    assert [(x.tolist(), share.weight) for x, _ in share.epoch(0)] == [([3, 4, 5, 6], 8 / 7)]


@pytest.mark.parametrize(("size", "near"), [(130, 128), (2, 8), (6, 8)])
def test_a_batch_that_does_not_divide_is_refused(monkeypatch, size, near):
    monkeypatch.setattr(distributed, "_group", Group(0, 4))
    with pytest.raises(RtkError, match=f"of all 4 processes together .* give e.g. {near}"):
        check_batch_size(size)
    check_batch_size(8)


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_speaks", None)
    config = PretrainConfig(device="cuda:1")
    with pytest.raises(RtkError, match="'cuda:1' is one GPU for all processes"):
        distributed.stage(lambda config: Path())(config)
    assert distributed.speaks()


def test_a_recipe_is_refused_under_torchrun(monkeypatch, tmp_path):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RtkError, match="start the recipe without torchrun"):
        recipes.run(recipes.Recipe("", "", tmp_path, ()))


def test_alone_nothing_is_asked_of_anybody():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.is_main() and distributed.speaks() and not distributed.launched()
    assert distributed.from_main(lambda x: x + 1, 2) == 3
    assert distributed.largest(1.0, 2.0) == distributed.total(1.0, 2.0) == [1.0, 2.0]
    tensor = torch.arange(3)
    assert distributed.summed(tensor) is tensor
    distributed.broadcast([tensor])
    distributed.barrier()
    assert distributed.leave(2) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("attack", ["natural", "pgd"])
def test_two_gpus_train_as_one_process_does(attack, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    job = {"call": "train_alike", "out": str(tmp_path / "ours"), "attack": attack}
    done = torchrun(tmp_path, [{**job, "device": "cuda"}], gpus=True)
    assert done.returncode == 0, done.stderr
    runpy.run_path(str(SCRIPT))["train_alike"](str(tmp_path / "alone"), attack)
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "alone"), rel=1e-2)


@pytest.mark.gpu
def test_a_gpu_whose_process_dies_ends_the_run(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    config = PretrainConfig(
        out=str(tmp_path / "died"),
        data=DataConfig("digits"),
        model=ModelConfig(width=0.125),
        train=TrainConfig(epochs=2, batch_size=128),
    )
    words = command("pretrain", config)
    started = time.monotonic()
    done = torchrun(
        tmp_path, [{"call": "die", "step": 12, "words": words, "how": "exit"}], gpus=True
    )
    assert done.returncode != 0 and time.monotonic() - started < 90
    done = torchrun(tmp_path, [words], gpus=True)
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path / "died")) == 2
