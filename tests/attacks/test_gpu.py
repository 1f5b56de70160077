"""On a GPU: nothing waits for it, a CUDA graph holds the attacks, and the results are the CPU's."""

import copy

import pytest
import torch

from rtk.attacks import APGD, FGSM, PGD, Fast, Free, Smoothing, Square
from rtk.attacks.graphed import GraphedAttack
from rtk.evaluate import Smoothed
from rtk.train import make_free_step

pytestmark = pytest.mark.gpu

WITHOUT_WAITING = {
    "pgd": lambda: PGD(steps=3),
    "pgd_l2": lambda: PGD("l2", 0.5, 0.1, 3),
    "pgd_in_train_mode": lambda: PGD(steps=3, bn_mode="train"),
    "pgd_with_all_but_early_stop": lambda: PGD(
        steps=3, restarts=2, keep_best=True, targeted=True, count_nonfinite=True
    ),
    "fgsm": FGSM,
    "fast": Fast,
    "apgd": lambda: APGD(steps=10, count_nonfinite=True),
    "apgd_l2": lambda: APGD("l2", 0.5, steps=10),
    "smoothing": Smoothing,
}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture
def on_gpu(model, batch):
    return copy.deepcopy(model).cuda(), *(tensor.cuda() for tensor in batch)


@pytest.fixture
def never_wait():
    """Return a function that calls another one, in which waiting for the GPU is an error."""

    def call(function, *arguments):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_nothing_waits_for_the_gpu_after_the_first_batch(on_gpu, never_wait, name):
    model, x, y = on_gpu
    attack = WITHOUT_WAITING[name]()
    attack(model, x, y)
    x_adv = never_wait(attack, model, x, y)
    assert x_adv.isfinite().all() and not torch.equal(x_adv, x)


@pytest.mark.parametrize("name", [n for n in WITHOUT_WAITING if n != "pgd_in_train_mode"])
def test_a_graph_holds_the_attack(on_gpu, name):
    """The same seeds give the same images, but where another kernel rounds a choice away."""
    model, x, y = on_gpu
    attack = WITHOUT_WAITING[name]()
    graphed = GraphedAttack(attack, graph=True)
    torch.manual_seed(5)
    replayed = [graphed(model, x, y) for _ in range(6)]
    assert graphed.captured
    torch.manual_seed(5)
    eager = [attack(model, x, y) for _ in range(6)]
    for one, other in zip(replayed, eager, strict=True):
        assert ((one - other).abs() > 1e-4).float().mean() < 0.1
    if hasattr(attack, "check_finite"):
        attack.check_finite()


def test_bad_gradients_are_counted_in_a_graph(on_gpu):
    model, x, y = on_gpu
    attack = PGD(steps=3, count_nonfinite=True)
    graphed = GraphedAttack(attack, graph=True)
    for _ in range(5):
        graphed(model, x, y)
    attack.check_finite()
    with torch.no_grad():
        model.fc.weight.fill_(torch.nan)  # in place: the graph stays
    graphed(model, x, y)
    assert graphed.captured
    with pytest.raises(ValueError, match="3 gradients"):
        attack.check_finite()


def test_the_free_step_does_not_wait(on_gpu, never_wait):
    model, x, y = on_gpu
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    step = make_free_step(model, optimizer, Free(eps=0.05, replays=3))
    step(x, y)
    losses = [never_wait(step, x, y) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_certification_waits_once_an_image(on_gpu, never_wait):
    model, x, _ = on_gpu
    smoothed = Smoothed(model, 0.25, batch_size=16)
    generator = torch.Generator().manual_seed(0)
    smoothed._counts(x[0], 16, generator)
    counts = never_wait(smoothed._counts, x[0], 100, generator)
    assert counts.sum() == 100


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_finds_on_a_gpu_what_it_finds_on_a_cpu(model, on_gpu, batch, norm):
    """All random numbers are drawn on the CPU."""
    _, x, y = on_gpu
    attack = Square(norm, 0.1, 30)
    by_cpu = attack(model, *batch, seed=3)
    by_gpu = attack(on_gpu[0], x, y, seed=3).cpu()
    # Where two margins are nearly equal the two may keep another square.
    same = (by_gpu - by_cpu).flatten(1).abs().amax(1) < 1e-4
    assert same.float().mean() >= 0.75


def test_early_stop_and_restarts_of_apgd_work_on_a_gpu(on_gpu):
    model, x, y = on_gpu
    for attack in (PGD(steps=5, early_stop=True, restarts=2), APGD(steps=5, restarts=2)):
        x_adv = attack(model, x, y)
        assert (x_adv - x).abs().max() <= 8 / 255 * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_model_in_half_precision(on_gpu, dtype):
    model, x, y = on_gpu
    x_adv = PGD(steps=3)(model.to(dtype), x, y)
    assert x_adv.dtype == torch.float32 and 0 < (x_adv - x).abs().max() <= 8 / 255 * (1 + 1e-5)
