import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rtk.attacks import PGD
from rtk.errors import RtkError
from rtk.train import make_step


def sgd(model, **changes):
    return torch.optim.SGD(
        model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, **changes}
    )


def equal_states(one, two):
    other = two.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("attack", [None, PGD(eps=0.05, steps=2)], ids=["natural", "adversarial"])
def test_a_step_is_the_hand_written_one_bit_for_bit(make_model, batches, attack):
    ours, theirs = make_model().train(), make_model().train()
    step = make_step(ours, sgd(ours), attack, amp=None, label_smoothing=0.1)
    losses = []
    torch.manual_seed(5)
    for x, y in batches.epoch(0):
        losses.append(step(x, y))
    optimizer = sgd(theirs)
    torch.manual_seed(5)
    for (x, y), loss in zip(batches.epoch(0), losses, strict=True):
        if attack is not None:
            x = attack(theirs, x, y)
        expected = F.cross_entropy(theirs(x), y, label_smoothing=0.1)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert torch.equal(loss, expected.detach())
    assert equal_states(ours, theirs)


@pytest.mark.parametrize(
    "attack", [None, PGD(eps=0.02, step_size=0.01, steps=2)], ids=["natural", "adversarial"]
)
def test_steps_reduce_the_loss(make_model, batches, attack):
    model = make_model().train()
    step = make_step(model, sgd(model, weight_decay=0), attack, amp=None)
    x, y = next(batches.epoch(0))
    losses = [step(x, y).item() for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]


def test_adversarial_steps_train_on_the_attacks_images(make_model, batches):
    model = make_model().train()
    x, y = next(batches.epoch(0))
    seen = []

    def attack(network, images, labels):
        assert network is model and images is x and labels is y
        seen.append(torch.zeros_like(images))
        return seen[-1]

    loss = make_step(model, sgd(model, lr=0.0), attack, amp=None)(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(model(torch.zeros_like(x)), y).detach())
    assert len(seen) == 1


def test_the_loss_is_a_detached_scalar(make_model, batches):
    model = make_model().train()
    loss = make_step(model, sgd(model), amp=None)(*next(batches.epoch(0)))
    assert loss.shape == () and not loss.requires_grad and loss.dtype == torch.float32


def test_modules_stay_in_their_modes(make_model, batches):
    model = make_model().train()
    model.layer3.eval()
    frozen = model.layer3[0].bn1.running_mean.clone()
    moving = model.bn1.running_mean.clone()
    make_step(model, sgd(model), PGD(steps=1), amp=None)(*next(batches.epoch(0)))
    assert not model.layer3.training and model.training
    assert torch.equal(model.layer3[0].bn1.running_mean, frozen)
    assert not torch.equal(model.bn1.running_mean, moving)


def test_old_gradients_do_not_count(make_model, batches):
    ours, theirs = make_model().train(), make_model().train()
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)
    x, y = next(batches.epoch(0))
    make_step(ours, sgd(ours), amp=None)(x, y)
    make_step(theirs, sgd(theirs), amp=None)(x, y)
    assert equal_states(ours, theirs)


def test_amp_computes_in_bfloat16_and_keeps_fp32_weights(make_model, batches):
    seen = []
    model = make_model().train()
    model.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step = make_step(model, sgd(model))
    losses = [step(*next(batches.epoch(0))) for _ in range(10)]
    assert seen == [torch.bfloat16] * 10
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert losses[0].dtype == torch.float32 and losses[-1] < losses[0]


def test_on_a_cpu_graph_true_is_refused_and_auto_and_false_are_alike(make_model, batches):
    model = make_model()
    with pytest.raises(RtkError, match=r"the model is on cpu.*; use graph='auto' or False"):
        make_step(model, sgd(model), graph=True)
    with pytest.raises(RtkError, match="graph must be 'auto', True or False, got 'always'"):
        make_step(model, sgd(model), graph="always")
    models = [make_model().train(), make_model().train()]
    for model, graph in zip(models, ("auto", False), strict=True):
        torch.manual_seed(6)
        step = make_step(model, sgd(model), PGD(steps=1), amp=None, graph=graph)
        for epoch in range(2):
            for x, y in batches.epoch(epoch):
                step(x, y)
        assert not step.captured
    assert equal_states(*models)


def test_losses_that_are_nan_are_counted(make_model, batches):
    model = make_model().train()
    step = make_step(model, sgd(model, lr=0.0), amp=None)
    for index, (x, y) in enumerate(batches.epoch(0)):
        step(x * torch.nan if index == 1 else x, y)
    assert step.nonfinite.dtype == torch.int64 and step.nonfinite.shape == ()
    assert step.nonfinite.item() == 2  # the running statistics are spoiled too


def test_an_amp_dtype_that_is_not_floating_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(RtkError, match=r"amp must be a floating dtype or None, got torch\.int8"):
        make_step(model, sgd(model), amp=torch.int8)
