import dataclasses
import json

import numpy as np
import pytest
from torch import nn

from rtk import advise, evaluate, pretrain
from rtk.advise import FAR, NEAR, TABLE_II
from rtk.cli import main
from rtk.config import AdviseConfig, DataConfig, ModelConfig, PretrainConfig, TrainConfig
from rtk.errors import RtkError
from rtk.evaluate import Extractor, Moments


@pytest.fixture(autouse=True)
def _one_cpu_thread(one_cpu_thread):
    with one_cpu_thread():
        yield


@pytest.fixture(scope="module")
def network(tmp_path_factory, one_cpu_thread):
    folder = tmp_path_factory.mktemp("network")
    config = PretrainConfig(
        out=str(folder),
        data=DataConfig("digits[0-1]"),
        model=ModelConfig(width=0.0625),
        train=TrainConfig(epochs=1, batch_size=64, lr=0.05),
    )
    with one_cpu_thread():
        pretrain.run(config)
    return str(folder)


@pytest.fixture
def config(tmp_path, network):
    return AdviseConfig(
        out=str(tmp_path / "advise"),
        data=DataConfig("digits[0-1]"),
        targets=("digits[2-3]", "digits[0-1]"),
        features=network,
        source_images=200,
    )


class Scaled(nn.Module):
    """Mean grey of an image, times `scale`: with it distances are of the size of FIDs."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return self.scale * x.mean((1, 2, 3))[:, None]


@pytest.fixture
def inception(monkeypatch):
    """Replace Inception by one feature; the file's name is the weights' kind."""

    def fake(path):
        return Extractor(Scaled(100.0), path, f"fake of {path}", "ab" * 32)

    monkeypatch.setattr(Extractor, "inception", staticmethod(fake))


def grey(folder, name, level):
    """A set whose images are near one grey."""
    noise = np.arange(8, dtype=np.uint8)[:, None, None, None] % 4
    images = np.broadcast_to(noise + np.uint8(level), (8, 6, 6, 3))
    labels = np.arange(8) % 2
    arrays = {"train_images": images, "test_images": images}
    np.savez(folder / f"{name}.npz", **arrays, train_labels=labels, test_labels=labels)
    return f"npz:{folder / name}.npz"


def test_the_table_is_the_papers():
    assert len(TABLE_II) == 12
    assert [known.distance for known in TABLE_II] == sorted(
        (known.distance for known in TABLE_II), reverse=True
    )
    by_winner = {
        name: {known.target for known in TABLE_II if known.winner == name}
        for name in ("robust", "natural", "match")
    }
    assert by_winner["natural"] == {"DTD", "SUN397"}
    assert by_winner["match"] == {"Food", "Birdsnap", "Caltech-256"}
    assert (NEAR, FAR) == (115.95, 150.92)


@pytest.mark.parametrize(
    ("distance", "scheme", "place"),
    [
        (300.0, "robust", "beyond all twelve, the farthest being CIFAR-10 (205.04, robust)"),
        (152.0, "robust", "between Flowers (153.76, robust) and Cars (150.92, robust)"),
        (150.92, "robust", "between Cars (150.92, robust) and Flowers (153.76, robust)"),
        (130.0, "undecided", "between Cars (150.92, robust) and Food (115.95, match)"),
        (115.95, "natural or either", "between Food (115.95, match) and Cars (150.92, robust)"),
        (60.0, "natural or either", "Caltech-101 (56.71, robust) and SUN397 (67.7, natural)"),
        (1.0, "natural or either", "nearer than all twelve, the nearest being Caltech-256"),
    ],
)
def test_what_the_table_says_of_a_distance(distance, scheme, place):
    found = advise.advise(distance)
    assert found.scheme == scheme
    assert all(part in found.place for part in place.removeprefix("between ").split(" and "))


def test_the_evidence_tells_how_little_it_is():
    """6 of 6: the share p with p^6 = 5 % is 61 %."""
    assert "all 6 sets" in advise.advise(200).evidence
    assert f"as few as {100 * 0.05 ** (1 / 6):.0f} %" in advise.advise(200).evidence
    near = advise.advise(50).evidence
    assert "of the paper's 6 sets at 115.95 or less natural won on 2, 3 were a match" in near
    assert "robust won on 1 (Caltech-101 at 56.71)" in near


def test_the_answer_has_the_distances_and_what_they_were_measured_with(config, network):
    answer = json.loads(advise.run(config).read_text())
    extractor = Extractor.of_checkpoint(network)

    def moments(name, count=None):
        return evaluate.statistics_of(DataConfig(name), extractor, config.out, images=count)

    source = moments("digits[0-1]", 200)
    for target in answer["targets"]:
        expected = evaluate.frechet_distance(source, moments(target["target"]))
        assert target["distance"] == pytest.approx(expected, rel=1e-6)
        assert "scheme" not in target
    two_three, own = answer["targets"]
    assert two_three["images"] == 360 and own["images"] == 360
    assert two_three["distance"] > own["distance"] >= 0
    assert (answer["source_images"], answer["source_available"]) == (200, 289)
    assert answer["features_kind"] == "own" and answer["features_sha256"] == extractor.sha256


def test_own_features_give_an_order_and_no_recommendation(config):
    path = advise.run(config)
    text = advise.describe(path)
    assert text.index("digits[2-3]") < text.index("\ndigits[0-1] ")  # farthest first
    assert "No table applies" in text and "an order only" in text
    assert "advice" not in text and "undecided" not in text and "natural or either" not in text
    one = advise.run(dataclasses.replace(config, targets=("digits[2-3]",)))
    assert "Name further targets" in advise.describe(one)
    assert "Name further targets" not in text


def test_a_second_call_does_nothing(config, tmp_path, monkeypatch):
    path = advise.run(config)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "advise").glob("[!.]*")}
    assert len(files) == 4  # the source, two targets, the answer

    def measured(*arguments):
        raise AssertionError("features were computed again")

    monkeypatch.setattr(Moments, "update", measured)
    assert advise.run(config) == path
    # Another question in the same folder finds the statistics of both sets.
    other = advise.run(dataclasses.replace(config, targets=("digits[0-1]",)))
    assert other != path
    assert {p: p.stat().st_mtime_ns for p in files} == files
    with pytest.raises(AssertionError, match="computed again"):
        advise.run(dataclasses.replace(config, resume=False))


def test_a_killed_call_goes_on(config, monkeypatch):
    update = Moments.update
    calls = []

    def killed(self, features):
        calls.append(self.name)
        if self.name == "digits[2-3]":
            raise KeyboardInterrupt
        update(self, features)

    monkeypatch.setattr(Moments, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        advise.run(config)
    monkeypatch.setattr(
        Moments, "update", lambda self, x: (calls.append(self.name), update(self, x))
    )
    calls.clear()
    answer = json.loads(advise.run(config).read_text())
    assert len(answer["targets"]) == 2
    assert calls[0] == "digits[2-3]"  # the source was there


def test_other_weights_are_another_answer(inception, tmp_path, monkeypatch):
    source, target = grey(tmp_path, "source", 0), grey(tmp_path, "target", 250)
    config = AdviseConfig(
        out=str(tmp_path / "a"), data=DataConfig(source), targets=(target,), weights="pytorch-fid"
    )
    path = advise.run(config)
    first = json.loads(path.read_text())["targets"][0]["distance"]

    def other(path):
        return Extractor(Scaled(50.0), path, "other", "cd" * 32)

    monkeypatch.setattr(Extractor, "inception", staticmethod(other))
    assert advise.run(config) == path
    assert json.loads(path.read_text())["targets"][0]["distance"] == pytest.approx(first / 4)


@pytest.mark.parametrize(
    ("level", "scheme"), [(20, "natural or either"), (29, "undecided"), (35, "robust")]
)
def test_with_inception_the_table_applies(inception, tmp_path, level, scheme):
    """One grey against another, of one spread: the distance is that of the means, squared."""
    source, target = grey(tmp_path, "source", 0), grey(tmp_path, "target", level)
    config = AdviseConfig(
        out=str(tmp_path / "a"), data=DataConfig(source), targets=(target,), weights="pytorch-fid"
    )
    path = advise.run(config)
    (answer,) = json.loads(path.read_text())["targets"]
    assert answer["distance"] == pytest.approx((100 * level / 255) ** 2, rel=1e-3)
    assert answer["scheme"] == scheme
    expected = dataclasses.asdict(advise.advise(answer["distance"]))
    assert {name: answer[name] for name in expected} == expected
    text = " ".join(advise.describe(path).split())
    assert expected["scheme"] in text and expected["place"] in text and expected["evidence"] in text
    assert "The paper's source is ImageNet and yours is npz:" in text
    assert "What decides is a run of both" in text
    assert "not those of the usual FID" not in text


def test_torchvisions_weights_are_another_scale(inception, tmp_path):
    source, target = grey(tmp_path, "source", 0), grey(tmp_path, "target", 50)
    config = AdviseConfig(
        out=str(tmp_path / "a"), data=DataConfig(source), targets=(target,), weights="torchvision"
    )
    assert "not those of the usual FID" in " ".join(advise.describe(advise.run(config)).split())


def test_own_features_see_all_sets_at_one_size(config, monkeypatch, tmp_path):
    seen = []
    forward = evaluate.frechet._Pooled.forward

    def watched(self, x):
        seen.append(tuple(x.shape[2:]))
        return forward(self, x)

    monkeypatch.setattr(evaluate.frechet._Pooled, "forward", watched)
    target = grey(tmp_path, "small", 50)
    with pytest.warns(UserWarning, match="16 images for"):
        advise.run(dataclasses.replace(config, targets=(target,)))
    assert set(seen) == {(8, 8)}
    seen.clear()
    data = dataclasses.replace(config.data, image_size=12)
    with pytest.warns(UserWarning, match="16 images for"):
        advise.run(dataclasses.replace(config, data=data, targets=(target,)))
    assert set(seen) == {(12, 12)}


def test_inception_sees_each_set_at_its_own_size(inception, tmp_path):
    config = AdviseConfig(
        out=str(tmp_path / "a"),
        data=DataConfig("digits[0-1]"),
        targets=(grey(tmp_path, "small", 50),),
        weights="pytorch-fid",
        source_images=100,
    )
    advise.run(config)
    sizes = sorted(
        evaluate.frechet.artifact.load(path, "statistics")[1]["size"]
        for path in (tmp_path / "a").glob("statistics-*")
    )
    assert sizes == [[6, 6], [8, 8]]


# id: (command, what its one line of error must say)
BAD = {
    "no_target": ("advise digits", ["arguments are required: targets"]),
    "no_network": (
        "advise digits[0-1] digits[2-3]",
        ["the FID needs Inception's weights", "pt_inception-2015-12-05", "--features RUN_OR_FILE"],
    ),
    "both": (
        "advise digits[0-1] digits[2-3] --weights w --features f",
        ["features: expected null beside weights"],
    ),
    "unknown_source": (
        "advise digist digits[0-1] --features NETWORK",
        ["unknown data set 'digist'", "did you mean 'digits'?"],
    ),
    "unknown_target": (
        "advise digits[0-1] npz:nowhere.npz --features NETWORK",
        ["no file for npz:nowhere.npz"],
    ),
    "no_class_left": (
        "advise digits[0-1] digits[12] --features NETWORK",
        ["unknown class 12 in the subset"],
    ),
    "a_target_twice": (
        "advise digits[0-1] digits[2] digits[2] --features NETWORK",
        ["targets: expected names of data sets, each once"],
    ),
    "one_image": (
        "advise digits[0-1] digits[2] --features NETWORK --source_images 1",
        ["source_images: expected at least 2 images, got 1"],
    ),
    "no_checkpoint": (
        "advise digits[0-1] digits[2] --features nowhere",
        ["checkpoint nowhere cannot be read"],
    ),
    "no_weights": (
        "advise digits[0-1] digits[2] --weights nowhere.pth",
        ["Inception weights nowhere.pth cannot be read (No such file or directory)"],
    ),
    "a_checkpoint_for_weights": (
        "advise digits[0-1] digits[2] --weights NETWORK/checkpoint.safetensors",
        ["/checkpoint.safetensors ", "Inception"],  # torch 2.14 reads such files
    ),
}


@pytest.mark.filterwarnings("ignore:.*feature dimensions")
@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_error_and_exit_code_2(bad, network, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, expected = BAD[bad]
    assert main(command.replace("NETWORK", network).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("rtk: error: ")]) == 1
    for text in expected:
        assert text in err


def test_the_command_prints_the_answer_and_where_it_is(network, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "advise digits[0-1] digits[2-3] digits[4] --source_images 250 --seed 3 --features"
    for _ in range(2):
        assert main([*command.split(), network]) == 0
        out = capsys.readouterr().out
        (path,) = (tmp_path / "runs" / "advise").glob("advice-*.json")
        assert out.startswith("source digits[0-1]: 250 of 289 training images (seed 3)\n")
        assert out.endswith(f"\n\nadvice: runs/advise/{path.name}\n")
        assert max(map(len, out.splitlines())) <= 100 or network in out
    assert len(json.loads(path.read_text())["targets"]) == 2


def test_an_empty_set_and_one_of_many_sizes_are_refused(config, tmp_path):
    from PIL import Image

    images, labels = np.zeros((0, 6, 6, 3), np.uint8), np.zeros(0, np.int64)
    parts = {f"{part}_images": images for part in ("train", "test")}
    np.savez(tmp_path / "empty.npz", **parts, train_labels=labels, test_labels=labels)
    with pytest.raises(RtkError, match="train_images are empty"):
        advise.run(dataclasses.replace(config, targets=(f"npz:{tmp_path}/empty.npz",)))
    for label in "ab":
        (tmp_path / "sizes" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (6 + i, 6)).save(tmp_path / "sizes" / label / f"{i}.png")
    target = f"folder:{tmp_path}/sizes"
    like = dataclasses.replace(config.data, image_size=None)
    config = dataclasses.replace(config, data=like, features=None, weights="fake")
    extractor = Extractor(Scaled(1.0), "pytorch-fid", "fake", "ab" * 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "inception", staticmethod(lambda path: extractor))
        with pytest.raises(RtkError, match=r"image sizes differ: .* set data\.image_size"):
            advise.run(dataclasses.replace(config, targets=(target,)))
        sized = dataclasses.replace(config.data, image_size=8)
        path = advise.run(dataclasses.replace(config, data=sized, targets=(target,)))
    assert json.loads(path.read_text())["targets"][0]["images"] == 10


def test_help_says_what_is_compared(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["advise", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("Table II", "source target [target ...]", "--weights WEIGHTS", "--no_resume"):
        assert part in text
