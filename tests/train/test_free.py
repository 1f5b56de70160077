"""Free adversarial training, and the hook after an epoch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from rtk import ops
from rtk.attacks import PGD, Free
from rtk.errors import Interrupted, RtkError
from rtk.train import CHECKPOINT, Checkpoint, make_free_step, train


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def equal_states(one, two):
    other = two.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


def carried(optimizer):
    (state,) = (s["free_delta"] for s in optimizer.state.values() if "free_delta" in s)
    return state


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("replays", [1, 3])
def test_a_step_is_the_hand_written_one_bit_for_bit(make_model, batches, norm, replays):
    """With one replay: FGSM training whose perturbation is that of the batch before."""
    ours, theirs = make_model().train(), make_model().train()
    free = Free(norm, 0.1, replays=replays)
    step = make_free_step(ours, sgd(ours), free, amp=None, label_smoothing=0.1)
    optimizer = sgd(theirs)
    delta = torch.zeros(8, 3, 8, 8)
    for x, y in batches.epoch(0):
        losses = []
        x_adv = (x + delta).clamp(0, 1)
        for _ in range(replays):
            leaf = x_adv.clone().requires_grad_()
            loss = F.cross_entropy(theirs(leaf), y, label_smoothing=0.1)
            parameters = list(theirs.parameters())
            image, *weights = torch.autograd.grad(loss, [leaf, *parameters])
            for parameter, grad in zip(parameters, weights, strict=True):
                parameter.grad = grad
            optimizer.step()
            x_adv = ops.pgd_step(x_adv, image, x, eps=0.1, step_size=0.1, norm=norm)
            losses.append(loss.detach())
        delta = x_adv - x
        assert torch.equal(step(x, y), sum(losses) / replays)
    assert equal_states(ours, theirs)
    assert delta.abs().max() > 0.01


def test_the_perturbation_stays_in_the_ball_and_is_carried(make_model, batches):
    model = make_model().train()
    optimizer = sgd(model)
    step = make_free_step(model, optimizer, Free(eps=0.1, step_size=0.07), amp=None)
    seen = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    for x, y in batches.epoch(0):
        del seen[:]
        before = carried(optimizer).clone() if optimizer.state else torch.zeros_like(x)
        step(x, y)
        assert torch.equal(seen[0], (x + before).clamp(0, 1)) and len(seen) == 4
        assert all((x_adv - x).abs().max() <= 0.1 + 1e-6 for x_adv in seen)
        assert all(x_adv.min() >= 0 and x_adv.max() <= 1 for x_adv in seen)
    hook.remove()


def test_batches_may_shrink_and_grow(make_model, batches):
    model = make_model().train()
    optimizer = sgd(model)
    step = make_free_step(model, optimizer, Free(eps=0.1), amp=None)
    x, y = next(batches.epoch(0))
    step(x[:4], y[:4])
    four = carried(optimizer).clone()
    step(x[:2], y[:2])
    assert torch.equal(carried(optimizer)[2:], four[2:])
    step(x, y)
    assert carried(optimizer).shape == x.shape


def test_steps_reduce_the_loss(make_model, batches):
    model = make_model().train()
    step = make_free_step(model, sgd(model), Free(eps=0.02, replays=2))
    x, y = next(batches.epoch(0))
    losses = [step(x, y) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    assert losses[0].shape == () and not losses[0].requires_grad
    assert losses[0].dtype == torch.float32


def test_bad_arguments_are_refused(make_model):
    model = make_model()
    with pytest.raises(RtkError, match="make_free_step: amp must be a floating dtype"):
        make_free_step(model, sgd(model), Free(), amp=torch.int8)
    with pytest.raises(RtkError, match="make_free_step: runs eagerly"):
        make_free_step(model, sgd(model), Free(), graph=True)


class StopsAfter:
    """Batches that ask the loop to stop after some steps of the first epoch."""

    def __init__(self, batches, steps, stop):
        self._batches, self._steps, self._stop = batches, steps, stop

    def __len__(self):
        return len(self._batches)

    def epoch(self, epoch, start=0):
        for step, batch in enumerate(self._batches.epoch(epoch, start), start):
            if (epoch, step) == (0, self._steps):
                self._stop()
            yield batch


@pytest.mark.filterwarnings("ignore")
def test_a_stopped_run_goes_on_bit_for_bit(make_model, batches, config, tmp_path):
    """The carried perturbation is in the checkpoint."""
    import signal

    free, config = Free(eps=0.1, replays=2), dataclasses.replace(config, epochs=2)

    def run(name, batches):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        return train(make_model(), batches, config, folder=folder, meta={}, attack=free)

    whole = run("whole", batches)
    stopping = StopsAfter(batches, 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run("stopped", stopping)
    tensors = Checkpoint.load(tmp_path / "stopped" / CHECKPOINT).section("optimizer")
    assert any(name.endswith("free_delta") for name in tensors)
    assert equal_states(run("stopped", batches), whole)


def test_the_loop_trains_with_the_free_step(make_model, batches, config, tmp_path):
    config = dataclasses.replace(config, epochs=1, warmup_epochs=0, schedule="constant")
    model = train(
        make_model(), batches, config, folder=tmp_path, meta={}, attack=Free(eps=0.1, replays=3)
    )
    assert model.bn1.num_batches_tracked == 3 * len(batches)


def test_the_loop_calls_after_epoch_with_the_last_batch(make_model, batches, config, tmp_path):
    calls = []

    class Watching(PGD):
        def after_epoch(self, model, x, y):
            calls.append((model, x, y))

    model = make_model()
    attack = Watching(eps=0.1, steps=1)
    train(model, batches, config, folder=tmp_path, meta={}, attack=attack)
    assert len(calls) == config.epochs
    for epoch, (network, x, y) in enumerate(calls):
        *_, (last_x, last_y) = batches.epoch(epoch)
        assert network is model and torch.equal(x, last_x) and torch.equal(y, last_y)
