"""compact on small networks, each with one thing that can go wrong."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import rtk
from rtk import RtkError
from rtk.nn import BatchNormAct2d, MaskedConv2d, compact

X = torch.linspace(-1, 1, 2 * 3 * 9 * 9).reshape(2, 3, 9, 9).sin()


def pruned(conv, *channels):
    """Return `conv` masked, without the output `channels`."""
    mask = torch.ones(conv.out_channels, 1, 1, 1, dtype=torch.bool)
    mask[list(channels)] = False
    return MaskedConv2d.from_conv(conv, mask)


def unread(conv, *channels):
    """Return `conv` masked, without the input `channels`."""
    mask = torch.ones(1, conv.in_channels, 1, 1, dtype=torch.bool)
    mask[:, list(channels)] = False
    return MaskedConv2d.from_conv(conv, mask.expand(conv.out_channels, -1, 1, 1))


def norm(constants, kind=nn.BatchNorm2d):
    """Return a batch norm that makes `constants` of channels that are 0."""
    layer = kind(len(constants))
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    with torch.no_grad():
        shift = layer.running_mean / (layer.running_var + layer.eps).sqrt() * layer.weight
        layer.bias.copy_(torch.tensor(constants) + shift)
    return layer


def widths(model):
    return {
        name: (m.weight.shape[1], m.weight.shape[0])
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    }


def chain(second, *, activation=None, constants=(1.0, -1.0, 2.0, 0.5, -0.3, 0.1)):
    """Return conv (0, 1 and 2 of 6 pruned), batch norm, activation, `second`, batch norm."""
    return nn.Sequential(
        pruned(nn.Conv2d(3, 6, 3, padding=1, bias=False), 0, 1, 2),
        norm(constants),
        activation or nn.ReLU(inplace=True),
        second,
        norm([0.0] * second.out_channels),
    )


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        pytest.param(nn.Conv2d(6, 4, 1), 3, id="1x1"),
        pytest.param(nn.Conv2d(6, 4, 3), 3, id="unpadded"),
        pytest.param(nn.Conv2d(6, 4, 3, padding="valid"), 3, id="valid"),
        pytest.param(nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), 3, id="reflect"),
        pytest.param(nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), 3, id="circular"),
        pytest.param(nn.Conv2d(6, 4, 3, padding=1), 4, id="padded"),
        pytest.param(nn.Conv2d(6, 4, 3, padding="same", dilation=2), 4, id="same"),
        pytest.param(nn.Conv2d(6, 4, (1, 3), padding=(0, 1), stride=2), 4, id="strided"),
        pytest.param(nn.Conv2d(6, 4, 1, padding=1), 4, id="1x1-padded"),
    ],
)
def test_constants_go_or_become_one_channel_at_borders(compacted, second, kept):
    """Channel 1 is 0 after the ReLU; 0 and 2 are constants that a padded layer sees end."""
    small, _ = compacted(chain(second), X)
    assert widths(small)["0"] == (3, kept)
    assert widths(small)["3"] == (kept, 4)
    assert small[1].num_features == kept


def test_negative_constants_are_merged_too(compacted):
    small, _ = compacted(chain(nn.Conv2d(6, 4, 3, padding=1), activation=nn.Identity()), X)
    assert widths(small)["0"] == (3, 4)


def test_the_largest_constant_stands_for_the_others():
    """Dividing by a tiny one would lose all digits in fp32."""
    model = chain(nn.Conv2d(6, 4, 3, padding=1), constants=(1e-7, 3.0, 2.0, 0.5, -0.3, 0.1)).eval()
    small = compact(model)
    torch.testing.assert_close(small(X), model(X), rtol=1e-5, atol=1e-5)
    assert small[1].num_features == 4


def test_constants_end_in_the_bias_or_in_the_batch_norm(compacted):
    small, _ = compacted(chain(nn.Conv2d(6, 4, 1, bias=False)), X)
    assert small[3].bias is None  # the batch norm's running mean took them
    model = chain(nn.Conv2d(6, 4, 1, bias=False))
    model[4] = nn.ReLU()
    small, _ = compacted(model, X)
    assert small[3].bias is not None  # there was no other place


def test_a_batch_norm_is_not_shifted_where_others_read_the_convolution_too(compacted):
    class TwoReaders(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = chain(nn.Conv2d(6, 4, 1, bias=False))

        def forward(self, x):
            y = self.chain[3](self.chain[2](self.chain[1](self.chain[0](x))))
            return self.chain[4](y), y

    small, _ = compacted(TwoReaders(), X)
    assert small.chain[3].bias is not None


def test_what_nobody_reads_goes_up_to_the_images(compacted):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        unread(nn.Conv2d(6, 5, 3), 1, 2),
        nn.ReLU(),
        unread(nn.Conv2d(5, 4, 3), 0),
    )
    small, _ = compacted(model, X)
    assert widths(small) == {"0": (3, 4), "2": (4, 4), "4": (4, 4)}


def test_what_only_unread_channels_read_goes(compacted):
    """Channel 0 of the first layer is read by channel 0 of the second alone, which nobody reads."""
    mask = torch.ones(5, 6, 1, 1, dtype=torch.bool)
    mask[1:, 0] = False
    middle = MaskedConv2d.from_conv(nn.Conv2d(6, 5, 3), mask)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), middle, unread(nn.Conv2d(5, 4, 3), 0))
    small, _ = compacted(model, X)
    assert widths(small) == {"0": (3, 5), "1": (5, 4), "2": (4, 4)}


def test_an_output_that_reads_constants_alone_is_a_constant(compacted):
    mask = torch.ones(4, 6, 1, 1, dtype=torch.bool)
    mask[0, 3:] = False  # reads the pruned channels only
    second = MaskedConv2d.from_conv(nn.Conv2d(6, 4, 1), mask)
    model = nn.Sequential(*chain(second), nn.Conv2d(4, 2, 1))
    small, _ = compacted(model, X)
    assert widths(small) == {"0": (3, 3), "3": (3, 3), "5": (3, 2)}


def test_at_borders_an_output_of_constants_is_none(compacted):
    mask = torch.ones(4, 6, 1, 1, dtype=torch.bool)
    mask[0, 3:] = False
    second = MaskedConv2d.from_conv(nn.Conv2d(6, 4, 3, padding=1), mask)
    small, _ = compacted(nn.Sequential(*chain(second), nn.Conv2d(4, 2, 1)), X)
    assert widths(small) == {"0": (3, 4), "3": (4, 4), "5": (4, 2)}


def test_a_batch_norm_of_weight_0_makes_a_constant(compacted):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm([0.5, 0.2, 0.1, 0.0]), nn.Conv2d(4, 2, 1))
    nn.init.zeros_(model[1].weight[:2])
    small, _ = compacted(model, X)
    assert widths(small) == {"0": (3, 2), "2": (2, 2)}


class Residual(nn.Module):
    """Two convolutions into one stream, and a reader."""

    def __init__(self, a, b, constants_a, constants_b, in_place=False):
        super().__init__()
        self.a, self.b = pruned(nn.Conv2d(3, 4, 3), *a), pruned(nn.Conv2d(3, 4, 3), *b)
        self.norm_a, self.norm_b = norm(constants_a), norm(constants_b)
        self.head = nn.Conv2d(4, 2, 1)
        self.in_place = in_place

    def forward(self, x):
        out = self.norm_a(self.a(x))
        if self.in_place:
            out += self.norm_b(self.b(x))
        else:
            out = out + self.norm_b(self.b(x))
        return self.head(F.relu(out))


@pytest.mark.parametrize("in_place", [False, True], ids=["add", "in-place"])
def test_a_stream_loses_what_every_writer_has_pruned(compacted, in_place):
    """Channel 0: -1 + .5 is 0 after the ReLU; channel 1: -1 + 3 is a constant; 2 is only a's."""
    model = Residual((0, 1, 2), (0, 1), (-1.0, -1.0, 1.0, 0.0), (0.5, 3.0, 0.0, 0.0), in_place)
    small, report = compacted(model, X)
    assert widths(small) == {"a": (3, 2), "b": (3, 2), "head": (2, 2)}
    assert [layer.idle for layer in report.layers] == [1, 0, 0]


def test_a_stream_keeps_what_one_writer_has(compacted):
    small, report = compacted(Residual((0,), (1,), (1.0,) * 4, (-1.0,) * 4), X)
    assert widths(small)["head"] == (4, 2)
    assert [layer.idle for layer in report.layers] == [1, 1, 0]


def test_batch_norm_act_with_a_residual(compacted):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = pruned(nn.Conv2d(3, 6, 1), 0, 1, 5)
            self.norm1 = norm((1.0, -1.0, 1.0, 0.0, 0.0, 2.0), BatchNormAct2d)
            self.conv = pruned(nn.Conv2d(6, 6, 3, padding=1), 0, 1, 2)
            self.norm2 = norm((-3.0, 1.0, 1.0, 0.0, 0.0, 0.0), BatchNormAct2d)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            x = self.norm1(self.first(x), relu=True)
            return self.head(self.norm2(self.conv(x), x, relu=True))

    small, _ = compacted(Block(), X)
    # 0 and 1 are constants in the stream and go. 5, which conv writes, stays; as an input of conv
    # it is a constant, too, and stands for 0.
    assert widths(small) == {"first": (3, 4), "conv": (4, 4), "head": (4, 2)}
    assert isinstance(small.norm2, BatchNormAct2d)


def test_a_reader_sees_what_was_changed_in_place(compacted):
    """As in pre-activation networks: the ReLU changes what the shortcut reads afterwards."""

    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = pruned(nn.Conv2d(3, 4, 3), 0, 1), norm((-2.0, 1.0, 0.0, 0.0))
            self.relu = nn.ReLU(inplace=True)
            self.a, self.b = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.norm(self.conv(x))
            before = self.a(x)
            self.relu(x)
            return before, self.b(x)

    small, _ = compacted(PreActivation(), X)
    assert widths(small)["conv"] == (3, 2)


@pytest.mark.parametrize("twice", [False, True])
def test_a_sum_in_place_that_the_trace_does_not_show(compacted, twice):
    """torch.fx traces `a += b` as `a + b`, so later readers of `a` must expect both."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = pruned(nn.Conv2d(3, 4, 3), 0, 1), norm((-1.0, 1.0, 0.0, 0.0))
            self.a, self.b = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            first = second = self.norm(self.conv(x))
            second += 1
            if twice:
                F.relu_(first)
            return self.a(first), self.b(second)

    small, _ = compacted(InPlace(), X)
    assert widths(small)["conv"] == (3, 4)


@pytest.mark.parametrize("whole", ["0", "3", "both"])
def test_a_layer_that_is_pruned_as_a_whole_keeps_one_channel(compacted, whole):
    model = chain(nn.Conv2d(6, 4, 3, padding=1), constants=(-1.0,) * 6)
    if whole in ("0", "both"):
        model[0] = pruned(nn.Conv2d(3, 6, 3), *range(6))
    if whole in ("3", "both"):
        model[3] = pruned(nn.Conv2d(6, 4, 3, padding=1), *range(4))
    model = nn.Sequential(*model, nn.Conv2d(4, 3, 1))
    small, _ = compacted(model, X)
    assert widths(small)["0"][1] == 1


def test_depthwise_convolutions_follow_their_channels(compacted):
    depthwise = pruned(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), 4)
    model = chain(depthwise, activation=nn.ReLU6())
    model = nn.Sequential(*model, nn.ReLU6(), nn.Conv2d(6, 4, 1))
    small, _ = compacted(model, X)
    # 1 is 0 and 4 is pruned here; 0 and 2 are constants that end at the borders, so they vary.
    assert (small[3].in_channels, small[3].out_channels, small[3].groups) == (4, 4, 4)
    assert widths(small)["0"] == (3, 4)


@pytest.mark.parametrize("groups", [2, 3])
def test_grouped_convolutions_stay(compacted, groups):
    model = chain(pruned(nn.Conv2d(6, 12, 3, padding=1, groups=groups), 0, 7))
    small, report = compacted(nn.Sequential(*model, nn.Conv2d(12, 2, 1)), X)
    assert widths(small)["0"] == (3, 6)
    assert small[3].groups == groups
    assert report.left == {"3": f"it has {groups} groups"}


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2),
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
        nn.AvgPool2d(3, 2, padding=1),
        nn.AdaptiveAvgPool2d(3),
        nn.AdaptiveMaxPool2d(3),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    ],
    ids=str,
)
def test_pools(compacted, pool):
    counts_zeros = isinstance(pool, nn.AvgPool2d) and pool.padding and pool.count_include_pad
    model = nn.Sequential(*chain(nn.Conv2d(6, 4, 1))[:3], pool, nn.Conv2d(6, 4, 1))
    small, _ = compacted(model, X)
    assert widths(small)["0"] == (3, 5 if counts_zeros else 3)


class Head(nn.Module):
    def __init__(self, flatten, features):
        super().__init__()
        self.body = chain(nn.Conv2d(6, 6, 1))[:3]
        self.flatten = flatten
        self.norm = nn.BatchNorm1d(features)
        self.hidden, self.out = nn.Linear(features, 5), nn.Linear(5, 2)
        nn.init.zeros_(self.hidden.weight[:2])

    def forward(self, x):
        x = self.hidden(self.norm(self.flatten(self.body(x))))
        return self.out(F.dropout(F.relu(x), training=self.training))


@pytest.mark.parametrize(
    ("flatten", "block"),
    [
        (lambda x: x.flatten(1), 81),
        (lambda x: torch.flatten(x, start_dim=1), 81),
        (nn.Flatten(), 81),
        (lambda x: x.view(x.size(0), -1), 81),
        (lambda x: x.reshape(x.shape[0], -1), 81),
        (lambda x: x.mean((2, 3)), 1),
        (lambda x: torch.mean(x, dim=[-1, -2], keepdim=True).flatten(1), 1),
        (lambda x: F.adaptive_avg_pool2d(x, (2, 1)).flatten(1), 2),
        (lambda x: F.max_pool2d(x, 3, 3).flatten(1), 9),
        (lambda x: F.interpolate(x, size=(1, 2)).flatten(1), 2),
    ],
)
def test_linear_heads(compacted, flatten, block):
    model = Head(flatten, 6 * block)
    model.norm.running_mean.normal_()
    small, report = compacted(model, X)
    assert widths(small) == {"body.0": (3, 3), "hidden": (3 * block, 3), "out": (3, 2)}
    assert report.left == {}


def test_several_heads_and_outputs(compacted):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = chain(nn.Conv2d(6, 4, 1))[:3]
            self.a, self.b = unread(nn.Conv2d(6, 2, 1), 3), unread(nn.Conv2d(6, 3, 1), 3, 4)

        def forward(self, x):
            x = self.body(x)
            return {"a": self.a(x), "b": [self.b(x)]}

    small, _ = compacted(Heads(), X)
    assert widths(small) == {"body.0": (3, 2), "a": (2, 2), "b": (2, 3)}


def test_concatenation_and_gates(compacted):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = chain(nn.Conv2d(6, 4, 1))[:3], chain(nn.Conv2d(6, 4, 1))[:3]
            self.squeeze, self.excite = nn.Conv2d(12, 2, 1), nn.Conv2d(2, 12, 1)
            self.head = nn.Conv2d(12, 2, 3, padding=1)

        def forward(self, x):
            x = torch.cat([self.a(x), self.b(x)], 1)
            gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
            return self.head(x * gate * 2 + 1)

    small, _ = compacted(Gate(), X)
    # 1 is 0, but 1 after the sum; a gated constant varies with the image. One of the ones stays.
    assert widths(small)["head"] == (11, 2)
    assert sorted([widths(small)["a.0"], widths(small)["b.0"]]) == [(3, 5), (3, 6)]


class Opaque(nn.Module):
    """`how` is something that compact does not look into."""

    def __init__(self, how):
        super().__init__()
        self.body, self.how = chain(nn.Conv2d(6, 4, 1))[:3], how
        self.conv, self.head = pruned(nn.Conv2d(6, 6, 3, padding=1), 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        return self.how(self, self.body(x))


def _slices(model, x):
    part = x[:, :3]
    part.mul_(2)  # writes into x, which conv reads afterwards
    return model.head(model.conv(x))


@pytest.mark.parametrize(
    ("how", "body"),
    [
        (_slices, 6),
        (lambda m, x: m.head(x.transpose(2, 3).flip(1)), 6),
        (lambda m, x: m.head(F.group_norm(x, 2)), 6),
        (lambda m, x: m.head(x.view(-1, 6, 9, 9)), 6),
        (lambda m, x: m.head(m.conv(F.relu(m.conv(x)))), 6),  # called twice
        (lambda m, x: F.conv2d(m.head(x), m.head.weight[:, :2]), 6),  # read from elsewhere
        (lambda m, x: m.head(x + x.mean(1, keepdim=True)), 6),
        (lambda m, x: m.head(x[:, :, ::2, ::2]), 6),
        (lambda m, x: m.head(x * x.shape[1]), 6),
        (lambda m, x: m.head(x * x.shape[2]), 6),
        (lambda m, x: m.head(F.interpolate(x, x.shape[-2:])), 3),
        (lambda m, x: m.head(x.add(x).mul(0.5)), 3),
    ],
)
def test_what_is_not_understood_keeps_its_channels(compacted, how, body):
    small, report = compacted(Opaque(how), X)
    assert widths(small)["body.0"] == (3, body)
    assert bool(report.left) == (body == 6)


def test_tied_weights_stay(compacted):
    model = nn.Sequential(*chain(nn.Conv2d(6, 6, 1))[:3], nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1))
    model[3].weight = model[4].weight
    small, report = compacted(model, X)
    assert "used elsewhere" in report.left["3"]
    assert small[3].weight is small[4].weight
    assert widths(small)["0"] == (3, 6)


@pytest.mark.parametrize("multiple", [1, 2, 4, 5, 8])
def test_multiple_of(compacted, multiple):
    model = chain(pruned(nn.Conv2d(6, 9, 3, padding=1), 0, 1, 2, 3))
    small, _ = compacted(nn.Sequential(*model, nn.Conv2d(9, 2, 1)), X, multiple_of=multiple)
    assert small[0].out_channels == min(6, -(-4 // multiple) * multiple)
    assert small[3].out_channels == min(9, -(-5 // multiple) * multiple)


@pytest.mark.parametrize("seed", range(12))
def test_random_masks_of_every_granularity(compacted, randomise, seed):
    torch.manual_seed(seed)
    model = randomise(rtk.models.create(SPEC))
    for name, conv in list(model.named_modules()):
        if isinstance(conv, nn.Conv2d):
            k, c, r, s = conv.weight.shape
            mask = (torch.rand(k, 1, 1, 1) < torch.rand(1)) & (torch.rand(1, c, 1, 1) < 0.7)
            mask = mask & (torch.rand(k, c, r, s) < 0.8)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, MaskedConv2d.from_conv(conv, mask))
    compacted(model, torch.rand(2, 3, 17, 20), multiple_of=1 + seed % 3)


SPEC = rtk.models.ModelSpec("resnet18", "7x7", 0.125, 5, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2))


def test_it_is_a_copy_of_the_same_class_with_the_same_keys(randomise):
    model = randomise(rtk.models.create(SPEC))
    rtk.draw.omp(model, 0.7, granularity="channel").apply(model)
    model.train()
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    model = model.to(memory_format=torch.channels_last)
    small = compact(model)
    assert type(small) is type(model)
    assert [k for k in model.state_dict() if not k.endswith(".mask")] == list(small.state_dict())
    assert {n: m.training for n, m in model.named_modules()} == {
        n: m.training for n, m in small.named_modules()
    }
    assert not small.fc.weight.requires_grad and small.conv1.weight.requires_grad
    assert small.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(isinstance(m, MaskedConv2d) for m in small.modules())
    ours = {p.data_ptr() for p in model.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in small.parameters())

    x = torch.rand(2, 3, 32, 32)
    small.eval()
    again = compact(model).eval()
    again.load_state_dict({k: torch.zeros_like(v) for k, v in again.state_dict().items()})
    again.load_state_dict(small.state_dict())
    for other in (again, copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(other(x), small(x))
    assert widths(compact(small)) == widths(small)  # nothing is left to remove


def test_train_mode_is_the_same_where_training_left_the_mean_of_what_is_pruned_at_0(randomise):
    model = randomise(rtk.models.create(SPEC)).double()
    rtk.draw.omp(model, 0.7, granularity="channel").apply(model)
    modules = dict(model.named_modules())
    for name, conv in modules.items():
        if isinstance(conv, MaskedConv2d):
            after = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
            modules[after].running_mean[~conv.mask.flatten()] = 0
    small = compact(model.train())
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_the_report():
    model = chain(nn.Conv2d(6, 4, 1, bias=False)).eval()
    small, report = compact(model, X, report=True)
    assert [(r.name, r.before, r.after) for r in report.layers] == [
        ("0", (3, 6), (3, 3)),
        ("3", (6, 4), (3, 4)),
    ]
    before, after = 2 * 81 * (3 * 6 * 9 + 6 * 4), 2 * 81 * (3 * 3 * 9 + 3 * 4)
    assert report.flops_left == after / before
    assert report.parameters_left == (81 + 6 + 12 + 8) / (162 + 12 + 24 + 8)
    assert "0  3 -> 6: 3 -> 3" in str(report)
    assert f"FLOPs left: {after / before:.1%}" in str(report)
    assert not any(m._forward_hooks for m in small.modules())
    assert compact(model, report=True)[1].flops_left is None


def test_half_precision_and_devices(device, randomise):
    model = randomise(rtk.models.create(SPEC)).to(device)
    rtk.draw.omp(model, 0.6, granularity="channel").apply(model)
    x = torch.rand(2, 3, 32, 32, device=device)
    expected = model.eval()(x)
    small = compact(model, x)
    tolerance = 1e-5 if device == "cpu" else 1e-4  # cuDNN may take another algorithm
    assert (small(x) - expected).abs().max() < tolerance * expected.abs().max()
    half = compact(model.bfloat16(), multiple_of=8)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert (half(x.bfloat16()) - expected).abs().max() < 0.1 * expected.abs().max()


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = chain(nn.Conv2d(6, 4, 1))[:3], nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.body(x)
        return self.head(x) if self.head.in_channels == 6 else x


def test_errors():
    with pytest.raises(RtkError, match="multiple_of of at least 1, got 0"):
        compact(nn.Conv2d(3, 3, 3), multiple_of=0)
    with pytest.raises(
        RtkError, match=r"torch\.fx cannot trace it.*compact the part that does not"
    ):
        compact(Branching())
    with pytest.raises(RtkError, match="depends on the sizes of its layers"):
        compact(Sized())
    hooked = nn.Sequential(nn.Conv2d(3, 3, 3))
    hooked[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RtkError, match=r"0 has hooks.*Remove hooks"):
        compact(hooked)
    with pytest.raises(RtkError, match=r"DataParallel; pass its \.module"):
        compact(nn.DataParallel(nn.Conv2d(3, 3, 3)))
    with pytest.raises(RtkError, match="compiled; pass the one"):
        compact(torch.compile(nn.Conv2d(3, 3, 3)))
    by_torch = nn.Sequential(nn.Conv2d(3, 3, 3))
    prune.l1_unstructured(by_torch[0], "weight", 0.5)
    with pytest.raises(RtkError, match=r"cannot be copied.*prune\.remove"):
        compact(by_torch)

    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand(3, 3)

    with pytest.raises(RtkError, match="outputs on example_input differ"):
        compact(Random(), torch.zeros(3, 3))
