import copy

import pytest
import torch
from torch import nn

from rtk import draw, models
from rtk.errors import RtkError
from rtk.nn import FusedModel, fold, fuse


def create(arch="resnet18", stem="3x3", width=0.125):
    torch.manual_seed(0)
    model = models.create(models.ModelSpec(arch, stem, width, 10, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def images(n=3, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def ticket(model, granularity="element", sparsity=0.8):
    return draw.omp(model, sparsity, granularity).apply(model)


@pytest.mark.parametrize(
    ("arch", "stem", "size"), [("resnet18", "3x3", 16), ("resnet50", "7x7", 64)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_computes_what_the_model_does(arch, stem, size, masked):
    model, x = create(arch, stem).double(), images(size=size).double()
    if masked:
        ticket(model)
    fused = fuse(model, x, dtype=torch.float64)
    logits = fused(x)
    assert isinstance(fused, FusedModel) and logits.dtype == torch.float64
    assert not logits.requires_grad
    torch.testing.assert_close(logits, model(x).detach(), atol=1e-10, rtol=1e-10)
    other = images(5, size + 8).double()  # another shape
    torch.testing.assert_close(fused(other), model(other).detach(), atol=1e-10, rtol=1e-10)


def test_bf16_returns_fp32_near_the_model():
    model, x = ticket(create()), images()
    logits, expected = fuse(model, x)(x), model(x).detach()
    assert logits.dtype == torch.float32
    assert (logits - expected).norm() < 0.03 * expected.norm()


def test_leaves_the_model_alone_and_reads_it_anew_when_told():
    model, x = ticket(create()), images()
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model, x, dtype=torch.float32)
    old = fused(x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        model.layer1[0].conv1.mask.fill_(False)
        model.layer2[0].bn1.bias.add_(1)
    torch.testing.assert_close(fused(x), old)
    fused.refold()
    assert (fused(x) - old).norm() > 0.01 * old.norm()
    torch.testing.assert_close(fused(x), model(x).detach(), atol=1e-4, rtol=1e-4)


def test_takes_a_folded_ticket():
    model, x = fold(ticket(create())), images()
    torch.testing.assert_close(fuse(model, x, dtype=torch.float32)(x), model(x).detach())


def test_refuses_what_it_cannot_do():
    x = images()
    with pytest.raises(RtkError, match=r"fuse: the model is in training mode; call model.eval\(\)"):
        fuse(create().train(), x)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()).eval()
    with pytest.raises(RtkError, match=r"fuse: Sequential cannot be fused: .* use the model as it"):
        fuse(plain, x)
    with pytest.raises(RtkError, match=r"images must be \(N, 3, H, W\), N at least 1"):
        fuse(create(), x[:0])
    with pytest.raises(RtkError, match=r"cannot be fused: its weights are torch\.float64"):
        fuse(create().double(), x)


def test_refuses_logits_that_are_wrong(monkeypatch):
    monkeypatch.setattr(FusedModel, "_run", lambda self, x: torch.ones(len(x), 10))
    with pytest.raises(RtkError, match=r"fuse: the logits differ by .* from the model's"):
        fuse(create(), images())


@pytest.mark.gpu
@pytest.mark.parametrize("stem", ["3x3", "7x7"])
def test_on_a_gpu_skips_dead_blocks_in_a_graph(stem):
    model, x = create("resnet18", stem, 1.0), images(64, 32 if stem == "3x3" else 96).cuda()
    ticket(model.cuda().to(memory_format=torch.channels_last), "block-64", 0.9)
    fused = fuse(model, x)
    assert len(fused.skipping) >= 3
    expected = model(x).detach()
    for _ in range(5):  # eager, captured, replayed
        logits = fused(x)
        assert (logits - expected).norm() < 0.03 * expected.norm()
    assert fused._forward.captured
    other = x.flip(0)
    assert (fused(other) - model(other)).norm() < 0.03 * expected.norm()
    with torch.no_grad():
        for name in fused.skipping:
            mask = model.get_submodule(name).mask
            mask.copy_(mask.roll(64, 0))
    fused.refold()
    expected = model(x).detach()
    assert (fused(x) - expected).norm() < 0.03 * expected.norm()
