"""Training steps by replay: on a GPU for real, on the CPU with a capture that only pretends."""

import contextlib
import dataclasses
import json
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtk import cuda_graph
from rtk.attacks import APGD, FGSM, PGD, Fast, Smoothing, Square
from rtk.attacks.graphed import GraphedAttack
from rtk.cuda_graph import WARM_UP, CannotCapture, Graphed, model_state, renew_accumulators
from rtk.data import Batches, Split
from rtk.draw import omp
from rtk.errors import RtkError
from rtk.train import Checkpoint, accuracy, make_step, save_checkpoint, train
from rtk.train.optim import match_layouts, set_learning_rate

# Powers of two, which fp32 holds exactly, and small: a larger rate lets rounding grow to chaos.
RATES = [rate / 64 for rate in (1, 0.5, 2, 1, 4, 2, 0.5, 1, 2, 0.25)]
CLASSES = 3


@pytest.fixture(autouse=True)
def _one_cpu_thread():
    """Take the place of the folder's fixture, which hides the GPU."""


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def sgd(model, **changes):
    settings = {"lr": 0.0625, "momentum": 0.9, "weight_decay": 5e-4, **changes}
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **settings)


def images(count, device, batch=16, size=16, seed=1):
    """Return `count` batches, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(batch, 3, size, size, generator=generator).to(device),
            torch.randint(0, CLASSES, (batch,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def follow(model, step, batches, rates, optimizer):
    """Train with a rate a batch; return the losses."""
    losses = []
    for (x, y), rate in zip(batches, rates, strict=True):
        set_learning_rate(optimizer, rate)
        losses.append(step(x, y))
    return torch.stack(losses)


def assert_alike(ours, theirs, tolerance):
    other = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance, msg=name)


class Small(nn.Module):
    """A network for what does not depend on the architecture."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.dropout(F.relu(self.bn(self.conv(x))).mean((2, 3))))


def small(device="cpu", **settings):
    torch.manual_seed(0)
    return Small(**settings).to(device)


class Pretended:
    """What stands in for a graph: it does the recorded work again at each replay."""

    def __init__(self):
        self.captures = 0
        self.replays = 0
        self.reason = None
        self.synchronises = False

    def capture(self, step, inputs, signature):
        step._captured = None
        if self.reason is not None:
            raise CannotCapture(self.reason)
        static = tuple(tensor.clone() for tensor in inputs)
        with step.recording():
            pass

        def replay():
            self.replays += 1
            captured.result = step.recorded(*static)

        self.captures += 1
        step._captures += 1
        graph = SimpleNamespace(replay=replay)
        nothing = torch.zeros(())
        captured = cuda_graph._Captured(graph, static, nothing, signature, step._state)
        step._captured = captured
        return captured

    @contextlib.contextmanager
    def synchronisations(self):
        yield [self.synchronises]


@pytest.fixture
def pretended(monkeypatch):
    """Let CPU tensors pass for GPU ones and captures always succeed."""
    fake = Pretended()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(cuda_graph, "_on_gpu", lambda tensors: True)
    monkeypatch.setattr(cuda_graph, "_synchronisations", fake.synchronisations)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(cuda_graph, "_side_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Graphed, "_capture", lambda self, *args: fake.capture(self, *args))
    return fake


def pretending_step(model, optimizer, attack=None, graph="auto"):
    step = make_step(model, optimizer, attack, amp=None)
    step._graph = graph  # the model is on the CPU, where make_step itself decides against it
    return step


class Noise:
    """An attack with a random start, as those of rtk.attacks: a function of its seed."""

    def __init__(self, scale=0.1):
        self.scale = scale
        self.seeds = []

    def draw_seed(self):
        return int(torch.randint(2**40, ()))

    def __call__(self, model, x, y, seed=None):
        number = self.draw_seed() if seed is None else int(seed)
        self.seeds.append(number)
        return (x + self.scale * (number % 97) / 97).clamp(0, 1)


# On the CPU.


def test_a_step_that_is_replayed_trains_as_an_eager_one(pretended):
    models = [small(), small()]
    losses, attacks = [], [Noise(), Noise()]
    for model, attack, pretend in zip(models, attacks, (True, False), strict=True):
        optimizer = sgd(model)
        step = pretending_step(model, optimizer, attack, graph="auto" if pretend else False)
        torch.manual_seed(3)
        losses.append(follow(model, step, images(10, "cpu"), RATES, optimizer))
    assert pretended.captures == 1 and pretended.replays == 10 - WARM_UP
    assert attacks[0].seeds == attacks[1].seeds and len(set(attacks[0].seeds)) == 10
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert_alike(*models, 1e-6)


def test_the_optimiser_looks_untouched_after_replays(pretended):
    model = small()
    optimizer = sgd(model)
    before = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "lr")}
    step = pretending_step(model, optimizer)
    follow(model, step, images(6, "cpu"), RATES[:6], optimizer)
    assert step.captured
    group = optimizer.state_dict()["param_groups"][0]
    assert type(group["lr"]) is float and group["lr"] == RATES[5]
    assert {k: v for k, v in group.items() if k not in ("params", "lr")} == before


def test_another_shape_runs_eagerly_and_the_graph_stays(pretended):
    model = small()
    step = pretending_step(model, sgd(model))
    (odd,) = images(1, "cpu", batch=5)
    for batch in images(4, "cpu"):
        step(*batch)
    for _ in range(6):
        step(*odd)
    step(*images(1, "cpu")[0])
    assert pretended.captures == 1 and pretended.replays == 2


def test_a_short_epochs_odd_batch_does_not_keep_the_others_from_a_graph(pretended):
    model = small()
    step = pretending_step(model, sgd(model))
    for _ in range(5):
        step(*images(1, "cpu")[0])
        step(*images(1, "cpu", batch=5)[0])
    assert pretended.captures == 1 and pretended.replays == 2
    assert step._captured.inputs[0].shape[0] == 16


CHANGES = {
    "mode": lambda model, optimizer, attack: model.bn.eval(),
    "frozen": lambda model, optimizer, attack: model.conv.requires_grad_(False),
    "memory": lambda model, optimizer, attack: setattr(
        model.conv.weight, "data", model.conv.weight.data.clone()
    ),
    "buffer": lambda model, optimizer, attack: setattr(
        model.bn, "running_mean", model.bn.running_mean.clone()
    ),
    "module": lambda model, optimizer, attack: setattr(model, "dropout", nn.Dropout(0.5)),
    "state": lambda model, optimizer, attack: optimizer.load_state_dict(optimizer.state_dict()),
    "setting": lambda model, optimizer, attack: optimizer.param_groups[0].update(momentum=0.5),
    "attack": lambda model, optimizer, attack: setattr(attack, "scale", 0.2),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_makes_steps_eager_and_then_a_new_graph(pretended, name):
    model, attack = small(), Noise()
    optimizer = sgd(model)
    step = pretending_step(model, optimizer, attack)
    batches = images(12, "cpu")
    for batch in batches[:5]:
        step(*batch)
    assert pretended.replays == 2
    if name == "state":  # load_state_dict copies tensors only where it has to
        for values in optimizer.state.values():
            values["momentum_buffer"] = values["momentum_buffer"].clone()
    CHANGES[name](model, optimizer, attack)
    for batch in batches[5 : 5 + WARM_UP]:
        step(*batch)
    assert pretended.replays == 2 and pretended.captures == 1
    for batch in batches[5 + WARM_UP : 10]:
        step(*batch)
    assert pretended.captures == 2 and pretended.replays == 4


def test_an_evaluation_in_between_changes_nothing(pretended):
    model = small()
    step = pretending_step(model, sgd(model))
    batches = images(6, "cpu")
    for batch in batches[:5]:
        step(*batch)
    model.eval()
    with torch.no_grad():
        model(batches[0][0])
    model.train()
    step(*batches[5])
    assert pretended.captures == 1 and pretended.replays == 3


def test_a_change_that_is_taken_back_finds_the_old_graph(pretended):
    model = small()
    step = pretending_step(model, sgd(model))
    batches = images(7, "cpu")
    for batch in batches[:5]:
        step(*batch)
    model.eval()
    step(*batches[5])
    model.train()
    step(*batches[6])
    assert pretended.captures == 1 and pretended.replays == 3


def test_a_model_that_changes_for_ever_is_not_captured_for_ever(pretended):
    model = small()
    optimizer = sgd(model)
    step = pretending_step(model, optimizer)
    (batch,) = images(1, "cpu", batch=4, size=4)
    for momentum in range(20):
        optimizer.param_groups[0]["momentum"] = momentum / 20
        for _ in range(WARM_UP + 2):
            step(*batch)
    assert pretended.captures == cuda_graph._MOST_CAPTURES


def test_what_cannot_be_captured_stays_eager_and_says_so_once(pretended):
    pretended.reason = "no luck"
    models = [small(), small()]
    optimizers = [sgd(model) for model in models]
    step = pretending_step(models[0], optimizers[0])
    with pytest.warns(UserWarning, match="without a CUDA graph, which is slower: no luck") as seen:
        losses = follow(models[0], step, images(10, "cpu"), RATES, optimizers[0])
    assert len(seen) == 1 and not step.captured
    eager = make_step(models[1], optimizers[1], amp=None, graph=False)
    assert torch.equal(losses, follow(models[1], eager, images(10, "cpu"), RATES, optimizers[1]))
    assert_alike(*models, 0)


def test_graph_true_raises_what_auto_would_only_say(pretended):
    pretended.reason = "no luck"
    model = small()
    step = pretending_step(model, sgd(model), graph=True)
    batches = images(4, "cpu")
    for batch in batches[:3]:
        step(*batch)
    with pytest.raises(RtkError, match=r"graph=True, but this cannot be captured .*: no luck"):
        step(*batches[3])


def test_a_step_that_waits_for_the_gpu_is_found_before_a_capture(pretended):
    pretended.synchronises = True
    model = small()
    step = pretending_step(model, sgd(model))
    with pytest.warns(UserWarning, match=r"it waits for the GPU, e\.g\. with \.item\(\)"):
        for batch in images(5, "cpu"):
            step(*batch)
    assert pretended.captures == 0


def test_gradients_after_an_eager_step_and_a_replay_are_that_steps(pretended):
    model = small()
    step = pretending_step(model, sgd(model))
    grads = [torch.full_like(p, 7.0) for p in model.parameters()]
    step._grads = list(zip(model.parameters(), grads, strict=True))
    step(*images(1, "cpu")[0])
    assert not any(p.grad is g for p, g in step._grads)
    step.refresh()
    assert all(p.grad is g for p, g in step._grads)


class Refused:
    """torch.cuda where CUDA refuses the capture, as in a model that calls .item()."""

    def __init__(self, monkeypatch):
        self.left = []
        self.restored = []
        generator = SimpleNamespace(
            clone_state=lambda: "before", graphsafe_set_state=self.restored.append
        )
        outer = self

        class Graph:
            def capture_begin(self, pool, capture_error_mode):
                pass

            def capture_end(self):
                if outer.broken:
                    raise RuntimeError("CUDA error: previous error during capture")

        self.broken = True
        for name, value in {
            "CUDAGraph": Graph,
            "graph_pool_handle": lambda: (0, 1),
            "default_generators": {None: generator},
            "synchronize": lambda device=None: None,
            "empty_cache": lambda: None,
            "device": lambda device: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(
                torch._C, name, lambda *a, name=name: self.left.append(name), raising=False
            )


@pytest.mark.parametrize("broken", [True, False], ids=["by_cuda", "by_python"])
def test_a_failed_capture_leaves_everything_as_it_was(pretended, monkeypatch, broken):
    real = vars(Graphed)["_capture"]  # the pretended one
    monkeypatch.undo()
    assert vars(Graphed)["_capture"] is not real
    model = small()
    optimizer = sgd(model)
    step = make_step(model, optimizer, amp=None)
    for batch in images(2, "cpu"):
        step(*batch)
    (inputs,) = images(1, "cpu")
    step._state = step.state()
    refused = Refused(monkeypatch)  # from here on: seeding would look for its generators
    refused.broken = broken
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda_graph, "_side_stream", lambda device: None)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
    drawn = torch.get_rng_state()

    def fails(*inputs):
        optimizer.state[model.fc.bias]["momentum_buffer"] = torch.zeros(1)
        model.fc.bias.grad = torch.ones(CLASSES)
        torch.rand(3)
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(step, "recorded", fails)
    with pytest.raises(CannotCapture, match=r"^first line$"):
        step._capture(inputs, ())
    assert not step.captured
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    now = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert len(now) == len(momenta) and all(a is b for a, b in zip(now, momenta, strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert torch.equal(torch.get_rng_state(), drawn)
    if broken:
        assert refused.left == ["_cuda_endAllocateToPool", "_cuda_releasePool"]
        assert refused.restored == ["before"]
    else:
        assert refused.left == [] and refused.restored == []


@pytest.mark.parametrize("source", ["torch", "random", "numpy"])
def test_draws_on_the_cpu_are_refused_and_taken_back(source):
    draw = {"torch": lambda: torch.rand(1), "random": random.random, "numpy": np.random.rand}
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    position = np.random.get_state()[2]
    with (
        pytest.raises(CannotCapture, match="random numbers on the CPU"),
        cuda_graph._host_randomness_unused(),
    ):
        draw[source]()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all() and np.random.get_state()[2] == position


def test_the_pgd_of_a_seed_draws_only_for_a_random_start():
    before = torch.get_rng_state()
    assert PGD(random_start=False).draw_seed() is None
    assert torch.equal(torch.get_rng_state(), before)
    model, (x, y) = small().eval(), images(1, "cpu")[0]
    torch.manual_seed(4)
    seed = PGD().draw_seed()
    torch.manual_seed(4)
    own = PGD(steps=1)(model, x, y)
    assert torch.equal(own, PGD(steps=1)(model, x, y, seed=seed))


def test_on_a_cpu_a_graphed_attack_is_the_attack():
    model, (x, y) = small().eval(), images(1, "cpu")[0]
    attack = PGD(steps=2)
    graphed = GraphedAttack(attack)
    for _ in range(5):
        torch.manual_seed(5)
        ours = graphed(model, x, y)
        torch.manual_seed(5)
        assert torch.equal(ours, attack(model, x, y))
    assert torch.equal(graphed(model, x, y, seed=9), attack(model, x, y, seed=9))
    assert not graphed.captured


def test_the_state_of_a_model_tells_modes_memory_and_modules():
    model = small()
    before = model_state(model)
    assert model_state(model) == before
    model.fc.bias.data.add_(1)
    assert model_state(model) == before
    model.eval()
    assert model_state(model) != before


def pixels(count, device="cpu", batch=8):
    """Return batches of random images, the last of them smaller."""
    total = count * batch + 3
    images = torch.randint(0, 256, (total, 3, 16, 16), dtype=torch.uint8)
    return Batches(Split(images, torch.arange(total) % CLASSES), batch, device=device)


def measure(model, batches, attack, graph):
    """Return the accuracy, and the images that the attack found."""
    torch.manual_seed(3)
    found = accuracy(model, batches, attack, graph=graph)
    torch.manual_seed(3)
    graphed = GraphedAttack(attack, graph=graph)
    images = [graphed(model, x, y) for x, y in batches.epoch(0)]
    assert graphed.captured == (graph is not False)
    return found, images


CAPTURED = {
    "pgd": lambda: PGD(steps=2, count_nonfinite=True),
    "pgd_l2": lambda: PGD("l2", 0.5, 0.1, 2, restarts=2, keep_best=True),
    "fgsm": FGSM,
    "fast": Fast,
    "apgd": lambda: APGD(steps=5),
    "smoothing": Smoothing,
}
EAGER = {
    "early_stop": lambda: PGD(steps=2, early_stop=True),
    "apgd_restarts": lambda: APGD(steps=2, restarts=2),
    "square": lambda: Square(queries=3),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_an_evaluation_replays_its_attack_to_the_same_images(pretended, name):
    model, batches = small().eval(), pixels(6)
    attack = CAPTURED[name]()
    attack(model, *next(batches.epoch(0)))  # only an attack's first batch is looked at
    (eager, theirs), (found, ours) = (
        measure(model, batches, attack, graph) for graph in (False, "auto")
    )
    assert pretended.captures == 2 and pretended.replays == 2 * (6 - WARM_UP)
    assert found == eager and len(ours) == 7
    assert all(torch.equal(x, other) for x, other in zip(ours, theirs, strict=True))


def test_batches_of_no_image_and_of_one_in_between(pretended):
    model, graphed = small().eval(), GraphedAttack(PGD(steps=1))
    x, y = images(1, "cpu")[0]
    for size in (16, 1, 16, 0, 16, 16, 1, 0, 16):
        assert graphed(model, x[:size], y[:size]).shape == x[:size].shape
    assert pretended.captures == 1 and pretended.replays == 2


@pytest.mark.parametrize("name", EAGER)
def test_an_attack_that_looks_at_values_is_evaluated_eagerly_without_a_word(pretended, name):
    model, batches = small().eval(), pixels(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = accuracy(model, batches, EAGER[name]())
    assert pretended.captures == 0 and found.images == 5 * 8 + 3
    with pytest.raises(RtkError, match=r"graph=True, but .*: it looks at values by design"):
        accuracy(model, batches, EAGER[name](), graph=True)


def test_an_attack_whose_settings_change_is_found_out(pretended):
    """Early stopping that is turned on later waits for the GPU: the rehearsal tells."""
    model, attack = small().eval(), PGD(steps=1)
    graphed = GraphedAttack(attack)
    for batch in images(5, "cpu"):
        graphed(model, *batch)
    assert pretended.replays == 2
    attack.early_stop = pretended.synchronises = True
    with pytest.warns(UserWarning, match="it waits for the GPU"):
        for batch in images(5, "cpu"):
            graphed(model, *batch)
    assert pretended.replays == 2


def test_an_evaluation_of_a_model_that_waits_says_so_once_and_goes_on(pretended):
    model, batches, attack = small().eval(), pixels(6), PGD(steps=2)
    torch.manual_seed(3)
    expected = accuracy(model, batches, attack, graph=False)
    pretended.synchronises = True
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="which is slower: it waits for the GPU") as told:
        assert accuracy(model, batches, attack) == expected
    assert len(told) == 1 and pretended.captures == 0


def test_an_evaluation_takes_a_graphed_attack_as_it_is(pretended):
    model, batches, graphed = small().eval(), pixels(5), GraphedAttack(PGD(steps=1))
    for _ in range(2):  # the graph of the first serves the second
        accuracy(model, batches, graphed)
    assert pretended.captures == 1 and pretended.replays == 5 - WARM_UP + 5


class NaNFrom(Small):
    """Its gradients become NaN, its logits not, once `broken` holds 1."""

    def __init__(self):
        super().__init__()
        self.register_buffer("broken", torch.zeros(()))

    def forward(self, x):
        return super().forward(x) + (x.flatten(1).sum(1, keepdim=True) * 0 + 1 - self.broken).sqrt()


def nan_from(device="cpu"):
    torch.manual_seed(0)
    return NaNFrom().to(device).eval()


@pytest.mark.parametrize("batch", [0, 5])
def test_gradients_that_are_nan_are_an_error_eagerly_and_counted_in_a_graph(pretended, batch):
    model, attack = nan_from(), PGD(steps=2, count_nonfinite=True)
    graphed = GraphedAttack(attack)
    for index, (x, y) in enumerate(images(7, "cpu")):
        model.broken.fill_(index == batch)
        if index == batch == 0:
            with pytest.raises(RtkError, match="is NaN or infinite in iteration 1 of 2"):
                graphed(model, x, y)
            return
        graphed(model, x, y)
    assert pretended.replays == 7 - WARM_UP
    with pytest.raises(RtkError, match=r"attack: 2 gradients .* were NaN or infinite"):
        attack.check_finite()
    attack.check_finite()


def test_gradients_that_are_nan_are_counted_in_a_step_that_is_replayed(pretended):
    """The step itself is as it was: its loss is finite."""
    model, attack = nan_from(), PGD(steps=2, count_nonfinite=True)
    step = pretending_step(model, sgd(model, lr=0.0), attack)
    for index, (x, y) in enumerate(images(7, "cpu")):
        model.broken.fill_(index in (5, 6))
        step(x, y)
    assert step.captured and step.nonfinite == 0
    with pytest.raises(RtkError, match="attack: 4 gradients"):
        attack.check_finite()


# On a GPU.


def make_masked(make_model):
    model = make_model()
    omp(model, 0.6, "element").apply(model)
    return model.cuda().train()


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, None], ids=["fused", "foreach"])
@pytest.mark.parametrize(
    "attack", [None, PGD("l2", 0.5, 0.2, steps=2)], ids=["natural", "adversarial"]
)
def test_graphed_steps_equal_eager_ones_in_fp32(make_model, fused, attack):
    models = [make_masked(make_model) for _ in range(2)]
    losses = []
    for model, graph in zip(models, (True, False), strict=True):
        optimizer = sgd(model, fused=fused)
        step = make_step(model, optimizer, attack, amp=None, graph=graph)
        torch.manual_seed(3)
        losses.append(follow(model, step, images(10, "cuda"), RATES, optimizer))
        assert step.captured == graph
        assert int(step.nonfinite) == 0
    # Without `fused`, eager steps take other kernels than the captured ones; rounding grows.
    tolerance = 2e-3 if not fused else 1e-5 if attack is None else 1e-4
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    assert_alike(*models, tolerance)
    for module in models[0].modules():
        if hasattr(module, "mask"):
            assert not module.weight[~module.mask].any()


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_graphed_steps_follow_eager_ones_in_bf16_and_channels_last(make_model, norm):
    losses = []
    for graph in (True, False):
        model = make_masked(make_model).to(memory_format=torch.channels_last)
        optimizer = sgd(model)
        attack = PGD(norm, 0.05, 0.02, steps=2)
        step = make_step(model, optimizer, attack, graph=graph)
        torch.manual_seed(3)
        batches = [
            (x.contiguous(memory_format=torch.channels_last), y) for x, y in images(10, "cuda")
        ]
        losses.append(follow(model, step, batches, RATES, optimizer))
        assert step.captured == graph
        assert losses[-1].dtype == torch.float32 and not losses[-1].requires_grad
    torch.testing.assert_close(*losses, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
def test_random_starts_differ_between_replays_and_equal_those_of_eager_steps():
    batch = images(1, "cuda")[0]
    losses = []
    for graph in (True, False):
        model = small("cuda").eval()
        step = make_step(
            model, sgd(model, lr=0.0, weight_decay=0), PGD(eps=0.3, steps=0), amp=None, graph=graph
        )
        torch.manual_seed(6)
        losses.append(torch.stack([step(*batch) for _ in range(9)]))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    assert losses[0].unique().numel() == 9


@pytest.mark.gpu
def test_an_attack_alone_is_replayed_with_eagers_starts():
    model, batch = small("cuda").eval(), images(1, "cuda")[0]
    attack = PGD("l2", 0.5, 0.2, steps=3)
    found = []
    for call, graphed in ((GraphedAttack(attack, graph=True), True), (attack, False)):
        torch.manual_seed(6)
        found.append([call(model, *batch) for _ in range(6)])
        assert not graphed or call.captured
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found[0][4], found[0][5])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CAPTURED)
def test_an_evaluation_by_replay_is_the_eager_one(name):
    model, batches = small("cuda").eval(), pixels(8, "cuda")
    attack = CAPTURED[name]()
    attack(model, *next(batches.epoch(0)))
    eager, theirs = measure(model, batches, attack, False)
    found, ours = measure(model, batches, attack, True)
    assert abs(found.top1 - eager.top1) <= 2 / found.images  # but for a choice rounded away
    for x, other in zip(ours, theirs, strict=True):
        assert ((x - other).abs() > 1e-4).float().mean() < 0.01
    if hasattr(attack, "check_finite"):
        attack.check_finite()


@pytest.mark.gpu
@pytest.mark.parametrize("name", EAGER)
def test_an_evaluation_with_an_attack_that_looks_at_values(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = accuracy(small("cuda").eval(), pixels(5, "cuda"), EAGER[name]())
    assert found.images == 5 * 8 + 3


@pytest.mark.gpu
def test_an_evaluation_of_a_model_that_branches_says_why_it_is_eager():
    model, batches = branching().eval(), pixels(6, "cuda")
    torch.manual_seed(3)
    expected = accuracy(model, batches, PGD(steps=2), graph=False)
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="which is slower: it waits for the GPU") as told:
        assert accuracy(model, batches, PGD(steps=2)) == expected
    assert len([w for w in told if "without a CUDA graph" in str(w.message)]) == 1
    with pytest.raises(RtkError, match="cannot be captured in a CUDA graph: it waits for the GPU"):
        accuracy(model, batches, PGD(steps=2), graph=True)


@pytest.mark.gpu
def test_nan_gradients_are_counted_by_a_step_of_one_graph():
    model, attack = nan_from("cuda"), PGD(steps=2, count_nonfinite=True)
    step = make_step(model, sgd(model, lr=0.0, fused=True), attack, amp=None, graph=True)
    for index, (x, y) in enumerate(images(7, "cuda")):
        model.broken.fill_(float(index in (5, 6)))
        step(x, y)
    assert step.captured
    with pytest.raises(RtkError, match="attack: 4 gradients"):
        attack.check_finite()


@pytest.mark.gpu
@pytest.mark.parametrize("attacked", [False, True])
def test_where_the_optimiser_cannot_be_captured_the_attack_is(attacked):
    losses, attack = [], PGD("l2", 0.3, 0.1, 2) if attacked else None
    words = "capturable=True, or use SGD" + ("; only the attack has one" if attacked else "")
    for graph in ("auto", False):
        model = small("cuda")
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        told = contextlib.nullcontext() if not graph else pytest.warns(UserWarning, match=words)
        with told:
            step = make_step(model, optimizer, attack, amp=None, graph=graph)
        torch.manual_seed(3)
        losses.append(torch.stack([step(*batch) for batch in images(8, "cuda")]))
        assert not step.captured
        assert getattr(step._attack, "captured", False) == (attacked and graph == "auto")
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_graphed_attack_follows_the_weights():
    model, batch = small("cuda").eval(), images(1, "cuda")[0]
    attack = PGD(steps=1, eps=0.1, step_size=0.1, random_start=False)
    graphed = GraphedAttack(attack, graph=True)
    for _ in range(5):
        graphed(model, *batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    assert torch.equal(graphed(model, *batch), attack(model, *batch))


@pytest.mark.gpu
def test_other_batches_and_evaluations_in_between(make_model):
    models, losses = [make_model().cuda().train() for _ in range(2)], []
    split = Split(torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8), torch.arange(20) % 3)
    for model, graph in zip(models, (True, False), strict=True):
        optimizer = sgd(model, fused=True)
        step = make_step(model, optimizer, amp=None, graph=graph)
        batches = images(12, "cuda")
        batches[5:5] = images(1, "cuda", batch=7, seed=8)
        batches[9:9] = images(1, "cuda", batch=7, seed=9)
        seen = []
        for index, (x, y) in enumerate(batches):
            seen.append(step(x, y))
            gradients = [p.grad.clone() for p in model.parameters()]
            assert all(g.isfinite().all() for g in gradients)
            if index % 4 == 3:
                found = accuracy(model, Batches(split, 8, device="cuda"))
                seen.append(torch.tensor(found.top1, device="cuda", dtype=torch.float32))
        losses.append(torch.stack(seen))
        losses[-1] = torch.cat([losses[-1], torch.stack([g.norm() for g in gradients])])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    assert_alike(*models, 1e-4)


class Branching(Small):
    def forward(self, x):
        logits = super().forward(x)
        return logits if logits.sum().item() < 1e9 else -logits


def branching():
    torch.manual_seed(0)
    return Branching(dropout=0.5).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("found_early", [True, False], ids=["rehearsal", "capture"])
def test_a_model_that_waits_falls_back_and_spoils_nothing(monkeypatch, found_early):
    """Where the rehearsal misses it the capture itself breaks off, and is cleaned up after."""
    if not found_early:
        monkeypatch.setattr(cuda_graph, "_SYNCHRONISES", "torch says something else")
    models, losses = [branching(), branching()], []
    for model, graph in zip(models, ("auto", False), strict=True):
        optimizer = sgd(model)
        step = make_step(model, optimizer, amp=None, graph=graph)
        torch.manual_seed(3)
        torch.cuda.manual_seed(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses.append(follow(model, step, images(10, "cuda"), RATES, optimizer))
        told = [w for w in caught if "without a CUDA graph" in str(w.message)]
        assert len(told) == (graph == "auto")
        assert not step.captured
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)  # dropout included
    assert_alike(*models, 1e-5)
    # The process is as good as before: dropout is served, and the next step is captured.
    model = small("cuda", dropout=0.5)
    step = make_step(model, sgd(model, lr=0.0), amp=None, graph=True)
    seen = torch.stack([step(*images(1, "cuda")[0]) for _ in range(8)])
    assert step.captured and seen.isfinite().all() and seen.unique().numel() == 8


@pytest.mark.gpu
def test_graph_true_says_why_a_model_that_waits_cannot_be_captured():
    model = branching()
    step = make_step(model, sgd(model), amp=None, graph=True)
    with pytest.raises(RtkError, match=r"cannot be captured.*\.item\(\)"):
        for batch in images(5, "cuda"):
            step(*batch)


@pytest.mark.gpu
def test_an_attack_that_draws_on_the_cpu_stays_eager():
    losses = []
    for graph in ("auto", False):
        model, told = small("cuda"), contextlib.nullcontext()
        step = make_step(
            model, sgd(model), lambda model, x, y: x * float(torch.rand(())), amp=None, graph=graph
        )
        if graph:
            told = pytest.warns(UserWarning, match="draws random numbers on the CPU")
        torch.manual_seed(1)
        with told:
            losses.append(torch.stack([step(*batch) for batch in images(6, "cuda")]))
        assert not step.captured
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_optimisers_are_captured_where_they_can_be():
    batches, losses = images(8, "cuda"), []
    for graph in (True, False):
        model = small("cuda")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, capturable=True)
        step = make_step(model, optimizer, amp=None, graph=graph)
        losses.append(follow(model, step, batches, [rate / 16 for rate in RATES[:8]], optimizer))
        assert step.captured == graph
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    model = small("cuda")
    with pytest.warns(UserWarning, match="Adam is not capturable; make it with capturable=True"):
        step = make_step(model, torch.optim.Adam(model.parameters()), amp=None)
    step(*batches[0])
    with pytest.raises(RtkError, match="Adam is not capturable"):
        make_step(model, torch.optim.Adam(model.parameters()), graph=True)


@pytest.mark.gpu
def test_a_checkpoint_saved_after_replays_goes_on(tmp_path, make_model):
    def start():
        model = make_model().cuda().to(memory_format=torch.channels_last).train()
        optimizer = sgd(model, fused=True)
        return model, optimizer, make_step(model, optimizer, PGD("l2", 0.3, 0.1, 1), graph=True)

    batches = images(12, "cuda")
    model, optimizer, step = start()
    torch.manual_seed(2)
    follow(model, step, batches[:6], RATES[:6], optimizer)
    assert step.captured
    progress = {"epoch": 0, "step": 6, "loss_sum": 0.0, "finished": False}
    save_checkpoint(tmp_path / "c", model, optimizer, {"progress": progress})
    losses = [follow(model, step, batches[6:], RATES[:6], optimizer)]

    other, other_optimizer, other_step = start()
    torch.manual_seed(99)
    Checkpoint.load(tmp_path / "c").restore(other, other_optimizer)
    match_layouts(other_optimizer)
    losses.append(follow(other, other_step, batches[6:], RATES[:6], other_optimizer))
    assert other_step.captured
    torch.testing.assert_close(*losses, rtol=3e-2, atol=3e-2)

    # Loading into the run that has a graph: the momentum lies elsewhere, so the graph is not used.
    Checkpoint.load(tmp_path / "c").restore(model, optimizer)
    match_layouts(optimizer)
    again = follow(model, step, batches[6:], RATES[:6], optimizer)
    torch.testing.assert_close(again, losses[1], rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
def test_losses_that_are_nan_are_counted_without_a_look_at_them():
    model = small("cuda").eval()
    step = make_step(model, sgd(model, lr=0.0), amp=None, graph=True)
    batches = images(8, "cuda")
    for index, (x, y) in enumerate(batches):
        step(x * torch.nan if index >= 5 else x, y)  # a rate of 0 times NaN is NaN: all later ones
    assert step.captured and int(step.nonfinite) == 3


@pytest.mark.gpu
def test_weights_that_are_frozen_later_stay():
    model = small("cuda")
    step = make_step(model, sgd(model, fused=True), amp=None, graph=True)
    batches = images(16, "cuda")
    for batch in batches[:6]:
        step(*batch)
    model.conv.requires_grad_(False)
    before, moving = model.conv.weight.clone(), model.fc.weight.clone()
    for batch in batches[6:]:
        step(*batch)
    assert step.captured and step._captures == 2
    assert torch.equal(model.conv.weight, before)
    assert not torch.equal(model.fc.weight, moving)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, "auto"], ids=str)
def test_graphs_that_somebody_keeps_are_no_obstacle(graph):
    """An evaluation with gradients, other batches in between, a module that keeps activations."""
    model = small("cuda")
    kept = []
    model.conv.register_forward_hook(lambda module, given, out: kept.append(out))
    step = make_step(model, sgd(model, fused=True), PGD(steps=2), amp=None, graph=graph)
    batches, others = images(12, "cuda"), images(3, "cuda", batch=5)
    held = [model(batches[0][0]), model(batches[1][0]).sum()]  # on the default stream
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="make_step")
        for batch in batches[:6]:
            step(*batch)
        assert step.captured
        for batch in others:
            step(*batch)
        held.append(model(batches[2][0]))
        model.eval()
        for batch in batches[6:]:
            step(*batch)
    assert step.captured and step._captures == 2
    assert kept and all(tensor.grad_fn is not None for tensor in held)


def test_a_renewed_accumulator_leaves_old_graphs_and_the_weight_as_they_were():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = nn.Parameter(torch.ones(3, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        calls = []
        weight.register_hook(lambda grad, calls=calls: calls.append("tensor"))
        weight.register_post_accumulate_grad_hook(lambda w, calls=calls: calls.append("grad"))
        old = weight * 2
        before = torch.autograd.graph.get_gradient_edge(weight).node
        where, version = weight.data_ptr(), weight._version
        renew_accumulators([weight])
        assert torch.autograd.graph.get_gradient_edge(weight).node is not before
        assert (weight.data_ptr(), weight._version) == (where, version)
        assert weight.dtype == dtype and weight.shape == (3,)
        (weight * 3).sum().backward()
        old.sum().backward()
        assert weight.grad.tolist() == [6, 6, 6]
        assert calls == ["tensor", "grad"] * 2


@pytest.mark.gpu
def test_a_step_takes_no_more_memory_than_eagerly_by_much(make_model):
    peaks = []
    for graph in (False, True):
        model = make_model().cuda().train()
        step = make_step(model, sgd(model), PGD(steps=2), graph=graph)
        (batch,) = images(1, "cuda", batch=256, size=32)
        for _ in range(3):
            step(*batch)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            step(*batch)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_reserved())
        del step, model, batch
        torch.cuda.empty_cache()
    assert peaks[1] < 1.3 * peaks[0] + 64 * 2**20


@pytest.mark.gpu
def test_the_loop_trains_alike_with_and_without(tmp_path, make_model, config):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (52, 3, 16, 16), generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.arange(52) % 3)
    batches = Batches(split, 8, augment="crop", shuffle=True, seed=3, device="cuda")
    logs = []
    for graph in ("auto", "no"):
        folder = tmp_path / graph
        folder.mkdir()
        train(
            make_model().cuda(),
            batches,
            dataclasses.replace(config, graph=graph, amp="none"),
            folder=folder,
            meta={"config_hash": "0123456789ab"},
            attack=PGD("l2", 0.3, 0.1, 1),
            evaluate=lambda model: {"top1": accuracy(model, batches).top1},
        )
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert logs[0] == pytest.approx(logs[1], rel=1e-2)
