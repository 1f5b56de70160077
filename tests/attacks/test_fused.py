import contextlib
import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from rtk import draw, models
from rtk.attacks import PGD, fused
from rtk.attacks.fused import FusedProgram, NotApplicable, route, why_not
from rtk.attacks.gradient import autograd_gradient, cross_entropy, input_gradient
from rtk.attacks.graphed import GraphedAttack
from rtk.attacks.precision import CastImages
from rtk.config import DataConfig
from rtk.cuda_graph import WARM_UP
from rtk.data import load
from rtk.nn import MaskedConv2d
from rtk.nn._fused import program as forward_program
from rtk.nn._fused.reader import recognise

BF16 = torch.bfloat16


def create(arch, stem, width=0.125):
    spec = models.ModelSpec(arch, stem, width, 10, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    return as_trained(models.create(spec))


def as_trained(model):
    """Give batch norms statistics and weights that are not those of a start."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def batch(n, *size, device="cpu"):
    return torch.rand(n, 3, *size).to(device), (torch.arange(n) % 10).to(device)


def double_loss(logits, y):
    return F.cross_entropy(logits, y)


def assert_like_autograd(model, x, y, loss=double_loss):
    """In fp64: in fp32 an activation of 1e-7 may be 0 on one of the ways, which is no mistake."""
    model, x = model.double(), x.double()
    program = FusedProgram(model, torch.float64)
    program.refold()
    grad, logits = program.gradient(x, y, loss)
    expected, expected_logits = autograd_gradient(model, x, y, loss)
    assert grad.shape == x.shape and not grad.requires_grad and not logits.requires_grad
    assert_near(logits, expected_logits, 1e-10)
    assert_near(grad, expected, 1e-10)


def assert_near(actual, expected, tolerance):
    assert expected.norm() > 0
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("stem", "n", "size"),
    [("3x3", 3, (16, 16)), ("3x3", 1, (13, 18)), ("7x7", 2, (64, 64)), ("7x7", 1, (37, 50))],
)
def test_equals_autograd(arch, stem, n, size):
    assert_like_autograd(create(arch, stem), *batch(n, *size))


def test_equals_autograd_for_a_loss_an_image():
    assert_like_autograd(
        create("resnet18", "3x3"), *batch(3, 16, 16), lambda logits, y: logits[range(len(y)), y]
    )


@pytest.mark.parametrize("granularity", ["element", "channel"])
def test_equals_autograd_with_a_ticket(granularity):
    model = create("resnet18", "3x3", 0.25)
    draw.omp(model, 0.7, granularity).apply(model)
    assert any(isinstance(module, MaskedConv2d) for module in model.modules())
    assert_like_autograd(model, *batch(2, 16, 16))


@pytest.mark.parametrize(
    ("build", "normalise"),
    [
        (torchvision.models.resnet18, False),
        (torchvision.models.resnet18, True),
        (lambda: torchvision.models.resnet50(width_per_group=16), True),
    ],
    ids=["resnet18", "resnet18-normalised", "resnet50-normalised"],
)
def test_equals_autograd_on_torchvision(build, normalise):
    torch.manual_seed(1)
    model = build()
    if normalise:
        transform = torchvision.transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        model = nn.Sequential(transform, model)
    assert_like_autograd(as_trained(model), *batch(2, 48, 48))


class Small(nn.Module):
    """A stem and blocks in the functional style of many repositories, with what a test asks for."""

    def __init__(self, activation=F.relu, **conv):
        super().__init__()
        self.activation = activation
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn0 = nn.BatchNorm2d(8)
        conv = {"out_channels": 16, "kernel_size": 3, "padding": 1, "stride": 2, **conv}
        self.conv1 = nn.Conv2d(8, **conv)
        self.bn1 = nn.BatchNorm2d(16, affine=False)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.bn2 = nn.BatchNorm2d(16)
        self.short = nn.Conv2d(8, 16, 1, stride=2)
        self.bn3 = nn.BatchNorm2d(16)
        self.conv4 = nn.Conv2d(8, 8, 1)
        self.bn4 = nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential()
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.bn0(self.stem((x - 0.5) / 0.25)))
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        x = self.tangled(x, F.relu(self.bn3(self.short(x)) + out))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def tangled(self, x, y):
        return self.shortcut(y)


class Dense(Small):
    """Reads activations often, and in orders that residual networks do not."""

    def tangled(self, x, y):
        w = (self.bn4(self.conv4(x)) + x).relu()
        z = F.relu(y + self.bn2(self.conv2(y)))
        z = F.relu(self.bn3(self.short(w)) + z)
        z = F.relu(self.bn2(self.conv2(z)) + F.relu(self.bn3(self.short(x))))
        z = F.relu(torch.add(self.bn3(self.short(x)), self.bn2(self.conv2(z))))
        return F.relu(self.bn2(self.conv2(y)) + z)


@pytest.mark.parametrize("build", [Small, Dense])
def test_equals_autograd_on_any_graph_of_its_grammar(build):
    assert_like_autograd(as_trained(build()), *batch(2, 15, 12))


def altered(name, module):
    model = Small()
    setattr(model, name, module)
    return model


class TwoStems(Small):
    def forward(self, x):
        x = F.relu(self.bn0(self.stem(x))) + F.relu(self.bn0(self.stem(x)))
        return self.head(x.mean((2, 3)))


class TwoInputs(Small):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


class Unused(Small):
    def tangled(self, x, y):
        F.relu(self.bn2(self.conv2(y)))
        return y


class Skipping(Small):
    def tangled(self, x, y):
        return y + x.mean()


class PreActivation(Small):
    def tangled(self, x, y):
        return F.relu(self.bn2(self.conv2(self.bn1(y))))


class Kept(Small):
    """Reads a convolution twice."""

    def tangled(self, x, y):
        z = self.conv1(x)
        return F.relu(self.bn1(z)) + z


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Small(activation=F.gelu), "gelu after bn1 does not fit"),
        (lambda: Small(activation=nn.PReLU()), "activation after bn1 does not fit"),
        (lambda: Small(groups=4), "conv1: it has groups"),
        (lambda: Small(padding_mode="reflect"), "conv1: it has groups, dilation or a padding"),
        (lambda: Small(padding=(1, 0)), "conv1: its padding is 1 x 0, not square"),
        (
            lambda: torchvision.models.mobilenet_v3_small(),
            "features.0.2 after features.0.1 does not fit",
        ),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 10)), "0 after the images does not fit"),
        (lambda: Small(stride=3), "conv1: its stride is 3"),
        (lambda: Small(kernel_size=1, padding=1), "conv1: its padding is as large as its filter"),
        (lambda: Small(padding="same", stride=1), "conv1: its padding is 'same'"),
        (lambda: Small(out_channels=12), "conv1: 8 -> 12 channels are no multiples of 8"),
        (lambda: Small().to(BF16), "stem: its weight is torch.bfloat16"),
        (lambda: altered("stem", nn.Conv2d(1, 8, 3)), "stem: it reads images of 1 channels"),
        (lambda: altered("conv2", weight_norm(nn.Conv2d(16, 16, 1))), "it is a Parametrized"),
        (lambda: altered("bn2", nn.BatchNorm2d(16, track_running_stats=False)), "bn2: it has no"),
        (lambda: altered("conv2", MaskedConv2d(16, 16, 1, mask=torch.ones(16, 1, 1, 1))), "bool"),
        (lambda: Small().train(), "the model is in training mode"),
        (TwoStems, "stem is a second convolution of the images"),
        (TwoInputs, "its forward takes 2 arguments"),
        (Unused, "a layer's output is not used"),
        (Skipping, "what follows reads 2 activations"),
        (PreActivation, "conv2 reads what is not the output of a ReLU"),
        (Kept, "bn1 after conv1 does not fit"),
    ],
)
def test_says_why_another_network_is_none(build, reason):
    torch.manual_seed(0)
    model = build()
    if "training" not in reason:
        model.eval()
    with pytest.raises(NotApplicable, match=reason):
        recognise(model)
    assert why_not(model) is not None


class Branching(Small):
    def forward(self, x):
        return super().forward(x) if x.mean() > 0 else x


def test_a_network_that_cannot_be_traced_is_none():
    assert "torch.fx cannot trace it" in why_not(Branching().eval())


def test_a_hook_would_not_be_called():
    model = create("resnet18", "3x3")
    model.layer1.register_forward_hook(lambda *_: None)
    assert why_not(model) == "layer1 has hooks, which it would not call"


class Misnamed(Small):
    """A module called `relu` that is none."""

    def __init__(self):
        super().__init__()
        self.relu = nn.GELU()
        self.activation = lambda x: self.relu(x)


def test_a_name_is_no_evidence():
    assert "relu after bn1 does not fit" in why_not(Misnamed().eval())


class ConstantMean(Small):
    def __init__(self):
        super().__init__()
        self.mean = (torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1),)

    def forward(self, x):
        return super().forward(x - self.mean[0])


def test_the_model_is_untouched():
    """Also where fx notes a constant on it, as for a mean that is no buffer."""
    for model in (create("resnet18", "7x7"), as_trained(Small()), as_trained(ConstantMean())):
        attributes, state = dict(vars(model)), copy.deepcopy(model.state_dict())
        with contextlib.suppress(NotApplicable):
            program = FusedProgram(model, torch.float32)
            program.refold()
            program.gradient(*batch(1, 32, 32), cross_entropy)
        assert dict(vars(model)) == attributes
        assert all(parameter.grad is None for parameter in model.parameters())
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_refold_sees_new_weights_masks_and_statistics():
    model = create("resnet18", "3x3")
    draw.omp(model, 0.5).apply(model)
    program = FusedProgram(model, torch.float32)
    x, y = batch(2, 16, 16)
    program.refold()
    before, _ = program.gradient(x, y, cross_entropy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.mul_(1.3)
            if isinstance(module, MaskedConv2d):
                module.mask.copy_(module.mask.roll(1, 0))
    model.mean.add_(0.1)
    program.refold()
    after, _ = program.gradient(x, y, cross_entropy)
    assert_near(after, autograd_gradient(model, x, y, cross_entropy)[0], 1e-4)
    assert (after - before).norm() > 0.01 * before.norm()


def test_takes_two_launches_a_basic_block_and_three_a_bottleneck(monkeypatch):
    """One more each way where a block downsamples; and nothing is added or gated beside them."""
    from rtk.attacks.fused import backward

    for arch, expected in (("resnet18", 8 * 2 + 3), ("resnet50", 16 * 3 + 4)):
        calls = {"forward": 0, "backward": 0, "gate": 0}

        def counting(kind, function, calls=calls):
            def counted(*args, **kwargs):
                calls[kind] += 1
                return function(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            for module, name, kind in (
                (forward_program, "fused_conv2d", "forward"),
                (backward, "fused_conv2d", "backward"),
                (backward, "fused_conv2d_bwd_input", "backward"),
                (backward, "apply_gate", "gate"),
                (backward, "_plus", "gate"),
            ):
                patch.setattr(module, name, counting(kind, getattr(module, name)))
            of_program = FusedProgram(create(arch, "3x3"))
            of_program.refold()
            with torch.autocast("cpu"):
                of_program.gradient(*batch(1, 16, 16), cross_entropy)
        skips = sum(step.residual is not None for step in of_program.structure.steps)
        assert calls == {"forward": expected, "backward": expected, "gate": skips}


def cosine(a, b):
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0)


def assert_bf16_is_as_good_as_autocast(model, x, y):
    exact, exact_logits = autograd_gradient(model, x, y, cross_entropy)
    program = FusedProgram(model)
    program.refold()
    with torch.autocast(x.device.type, dtype=BF16):
        grad, logits = program.gradient(x, y, cross_entropy)
        plain, _ = autograd_gradient(model, x, y, cross_entropy)
    assert grad.dtype == BF16
    assert_near(logits.float(), exact_logits, 0.05)
    assert cosine(grad, exact) > min(0.9, cosine(plain, exact) - 0.05)


@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "3x3"), ("resnet50", "7x7")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bf16(arch, stem, layout, device):
    model = create(arch, stem).to(device)
    x, y = batch(4, 48, 40, device=device)
    assert_bf16_is_as_good_as_autocast(model, x.contiguous(memory_format=layout), y)


@pytest.fixture
def everywhere(monkeypatch):
    """Let the fused path serve on the CPU too, under any autocast to bf16."""
    monkeypatch.setattr(
        route, "serves", lambda x: len(x) > 0 and torch.is_autocast_enabled(x.device.type)
    )


def gradient_of(model, x, y):
    with torch.autocast(x.device.type, dtype=BF16), input_gradient(model) as gradient:
        return gradient(x, y)


def test_input_gradient_takes_the_program(everywhere, model, batch):
    x, y = batch
    grad, logits = gradient_of(model, x, y)
    assert grad.dtype == BF16
    with fused.enabled(False):
        plain, plain_logits = gradient_of(model, x, y)
    assert plain.dtype == torch.float32
    assert cosine(grad, plain) > 0.6
    assert_near(logits.float(), plain_logits.float(), 0.05)


@pytest.mark.parametrize("options", [{"bn_mode": "train"}, {}])
def test_input_gradient_is_autograds_elsewhere(model, batch, options):
    """In training mode, and without autocast."""
    with input_gradient(model, **options) as gradient:
        grad, _ = gradient(*batch)
    with fused.enabled(False), input_gradient(model, **options) as gradient:
        expected, _ = gradient(*batch)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)


def test_every_with_sees_the_weights_of_then(everywhere, model, batch, monkeypatch):
    """New values, new memory, new masks; and the comparison is made once."""
    verified = []
    monkeypatch.setattr(
        route, "verify", lambda *args, inner=route.verify: verified.append(inner(*args))
    )
    changes = [
        lambda: model.conv1.weight.data.mul_(-1),
        lambda: setattr(model.conv1.weight, "data", model.conv1.weight.data * -1),
        lambda: draw.omp(model, 0.5).apply(model),
        lambda: model.layer1[0].conv1.set_mask(torch.rand(8, 8, 3, 3) > 0.5),
    ]
    gradient_of(model, *batch)
    for change in changes:
        change()
        grad, _ = gradient_of(model, *batch)
        assert grad.dtype == BF16
        with fused.enabled(False):
            assert cosine(grad, gradient_of(model, *batch)[0]) > 0.6
    assert len(verified) == 2  # the second for the masked layers


def test_a_program_that_is_wrong_is_not_used(everywhere, model, batch, monkeypatch):
    monkeypatch.setattr(fused.program, "apply_gate", lambda grad, gate: -grad)
    with pytest.warns(UserWarning, match="attacked by autograd.*in fp32 its gradients have"):
        grad, _ = gradient_of(model, *batch)
    assert grad.dtype == torch.float32
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gradient_of(model, *batch)[0].dtype == torch.float32


def test_an_operator_that_fails_later_leaves_it_to_autograd(everywhere, model, batch, monkeypatch):
    gradient_of(model, *batch)

    def fail(*args):
        raise RuntimeError("no such kernel\nat line 1")

    monkeypatch.setattr(FusedProgram, "gradient", fail)
    with pytest.warns(UserWarning, match="attacked by autograd.*no such kernel$"):
        assert gradient_of(model, *batch)[0].dtype == torch.float32


def test_a_network_that_breaks_does_not_look_robust(everywhere, model, batch):
    x, y = batch
    assert gradient_of(model, x, y)[0].isfinite().all()
    model.layer3[0].bn1.weight.data[0] = torch.nan
    assert gradient_of(model, x, y)[0].isnan().all()


def test_wrappers_are_looked_through(everywhere, model, batch):
    x, y = batch
    expected, _ = gradient_of(model, x, y)
    for wrapped in (torch.compile(model, backend="eager"), CastImages(model, torch.float32)):
        torch.testing.assert_close(gradient_of(wrapped, x, y)[0], expected, rtol=0, atol=0)
    grad, _ = gradient_of(CastImages(model, torch.float32), x.double(), y)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("weights", "images", "served"),
    [
        (torch.float32, BF16, True),
        (torch.float32, torch.float64, True),
        (BF16, torch.float32, False),
    ],
    ids=str,
)
def test_a_route_is_found_again_behind_a_cast(
    everywhere, model, batch, monkeypatch, weights, images, served
):
    """The cast is a new wrapper in every call; a program, or that there is none, is the model's."""
    tried, model = [], model.to(weights)
    monkeypatch.setattr(
        route, "FusedProgram", lambda *args, **kw: tried.append(args) or FusedProgram(*args, **kw)
    )
    attack = PGD(steps=2, step_size=0.02)
    with torch.autocast("cpu", dtype=BF16):
        for _ in range(3):
            x_adv = attack(model, batch[0].to(images), batch[1])
    assert len(tried) == 1 and (route._entries[model].program is not None) == served
    assert x_adv.dtype == images and not torch.equal(x_adv, batch[0].to(images))
    assert (why_not(model) is None) == served


def test_a_model_that_is_gone_leaves_nothing(everywhere, batch):
    gc.collect()
    before = len(route._entries)
    model = create("resnet18", "3x3")
    gradient_of(model, *batch)
    assert len(route._entries) == before + 1
    del model
    gc.collect()
    assert len(route._entries) == before


def test_frozen_weights_are_cast_once(model, batch):
    """As autocast casts them, bit for bit; autocast itself does it in every call."""
    draw.omp(model, 0.5).apply(model)
    x, y = batch
    casts = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0] is weight():
                casts.append(func)
            return func(*args, **(kwargs or {}))

    def weight():
        return model.conv1.weight

    model.conv1.requires_grad_(True)
    with torch.autocast("cpu", dtype=BF16), input_gradient(model) as gradient, Count():
        first = gradient(x, y)
        second = gradient(x, y)
    casts_by_us = len(casts)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.autocast("cpu", dtype=BF16), Count():
        expected = autograd_gradient(model, x, y, cross_entropy)
        autograd_gradient(model, x, y, cross_entropy)
    for got in (first, second):
        torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
    assert len(casts) - casts_by_us == 2
    assert casts_by_us <= 1


class Fp32Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(x).mean((2, 3)).relu()
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float())


def test_weights_stay_fp32_where_the_model_turns_autocast_off(batch):
    with torch.autocast("cpu", dtype=BF16), input_gradient(Fp32Head()) as gradient:
        _, logits = gradient(*batch)
    assert logits.dtype == torch.float32


def test_what_is_not_ready_is_left_out_of_a_graph(everywhere, model, batch, monkeypatch):
    """And what a graph holds stays as long as the model."""
    monkeypatch.setattr(route, "_warned_of_capture", False)
    monkeypatch.setattr(route, "_capturing", lambda x: True)
    with pytest.warns(UserWarning, match="attack once before capturing"):
        assert gradient_of(model, *batch)[0].dtype == torch.float32
    monkeypatch.setattr(route, "_capturing", lambda x: False)
    gradient_of(model, *batch)
    monkeypatch.setattr(route, "_capturing", lambda x: True)
    assert gradient_of(model, *batch)[0].dtype == BF16
    (held,) = route._entries[model].in_graphs
    model.conv1.weight.data = model.conv1.weight.data.clone()
    assert gradient_of(model, *batch)[0].dtype == torch.float32
    monkeypatch.setattr(route, "_capturing", lambda x: False)
    gradient_of(model, *batch)
    assert route._entries[model].program is not held
    assert route._entries[model].in_graphs == [held]


@pytest.mark.gpu
def test_a_captured_attack_is_the_eager_one():
    model = create("resnet18", "3x3").to("cuda")
    attack = GraphedAttack(PGD(steps=3, random_start=False), graph=True)
    x, y = batch_of("cuda")
    with torch.autocast("cuda", dtype=BF16):
        expected = PGD(steps=3, random_start=False)(model, x, y)
        for _ in range(WARM_UP + 3):
            adversarial = attack(model, x, y)
        assert attack.captured
        torch.testing.assert_close(adversarial, expected, rtol=0, atol=0)
        with torch.no_grad():
            model.fc.weight.neg_()
            model.conv1.weight.neg_()
        torch.testing.assert_close(
            attack(model, x, y), PGD(steps=3, random_start=False)(model, x, y), rtol=0, atol=0
        )


def batch_of(device):
    return batch(8, 32, 32, device=device)


@pytest.mark.gpu
def test_a_capture_before_the_first_use_takes_autograd(monkeypatch):
    monkeypatch.setattr(route, "_warned_of_capture", False)
    model = create("resnet18", "3x3").to("cuda")
    x, y = batch_of("cuda")
    with fused.enabled(False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            gradient_of(model, x, y)
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="attack once before capturing"), torch.cuda.graph(graph):
        grad, _ = gradient_of(model, x, y)
    assert grad.dtype == torch.float32


@pytest.mark.gpu
def test_attacks_are_as_strong_as_autograds(trained):
    model, _, _ = trained
    model = copy.deepcopy(model).to("cuda")
    images = load(DataConfig("digits[0-4]")).test
    x = (images.images[:].float() / 255).to("cuda")
    y = images.labels[:].to("cuda")
    found = []
    for on in (True, False):
        torch.manual_seed(0)
        with fused.enabled(on), torch.autocast("cuda", dtype=BF16):
            adversarial = PGD(eps=0.1, step_size=0.02, steps=10)(model, x, y)
            with torch.no_grad():
                found.append((model(adversarial).argmax(1) == y).double().mean().item())
    assert 0.05 < found[1] < 0.95
    assert abs(found[0] - found[1]) <= 0.02
