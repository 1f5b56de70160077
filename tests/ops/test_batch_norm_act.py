"""batch_norm_act: PyTorch's batch norm, addition and ReLU, in values, gradients and buffers."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from rtk.errors import RtkError
from rtk.ops import _batch_norm_autograd as plain_calls
from rtk.ops import backend as forced
from rtk.ops import batch_norm_act

OP = "batch_norm_act"
module = sys.modules["rtk.ops.batch_norm_act"]
LAST = torch.channels_last
SHAPES = [
    (3, 24, 5, 4),
    (2, 8, 1, 1),
    (40, 16, 9, 9),
    (5, 264, 3, 3),
    (7, 512, 4, 4),
    (2, 2048, 1, 2),
]


def plain(x, residual, weight, bias, mean, var, training, relu):
    out = F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)
    out = out if residual is None else out + residual
    return out.relu() if relu else out


def given(shape, device, dtype=torch.float32, *, residual=True, affine=True, shift=0.0):
    c = shape[1]
    x = (torch.randn(shape) + shift).to(device, dtype).contiguous(memory_format=LAST)
    r = torch.randn(shape).to(device, dtype).contiguous(memory_format=LAST) if residual else None
    w, b = (torch.randn(c, device=device) if affine else None for _ in range(2))
    return [x, r, w, b]


def buffers(c, device):
    return torch.linspace(-1, 1, c, device=device), torch.linspace(0.5, 2, c, device=device)


def leaves(tensors, dtype=None):
    return [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def assert_like_double(function, tensors, training, relu, tolerance):
    """Compare with PyTorch in fp64; where the ReLU's argument is next to 0 both signs are right."""
    mine, exact = leaves(tensors), leaves(tensors, torch.float64)
    c, device = tensors[0].shape[1], tensors[0].device
    stats, exact_stats = buffers(c, device), [t.double() for t in buffers(c, device)]
    out = function(*mine, *stats, training, relu)
    before = plain(*exact, *exact_stats, training, False)
    expected = torch.where(out > 0, before, 0) if relu else before
    assert out.dtype == tensors[0].dtype and out.stride() == torch.empty_like(tensors[0]).stride()
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    if relu:
        assert (before[out == 0] < tolerance).all()
    upstream = torch.randn(out.shape, device=device).to(out.dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    for tensor, wanted in zip(mine, exact, strict=True):
        if tensor is not None:
            assert tensor.grad.dtype == tensor.dtype
            scale = max(1.0, wanted.grad.abs().max().item())
            torch.testing.assert_close(
                tensor.grad.double(), wanted.grad, rtol=tolerance, atol=tolerance * scale
            )
    for buffer, wanted in zip(stats, exact_stats, strict=True):
        torch.testing.assert_close(buffer.double(), wanted, rtol=1e-5, atol=1e-5)


def public(x, residual, weight, bias, mean, var, training, relu):
    return batch_norm_act(
        x, residual, weight, bias, mean, var, training=training, relu=relu, momentum=0.1
    )


def by_ops(x, residual, weight, bias, mean, var, training, relu):
    """The three ops, also where `batch_norm_act` takes PyTorch's."""
    return module._by_ops(x, residual, weight, bias, mean, var, training, relu, 0.1, 1e-5, None)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [public, by_ops], ids=["public", "ops"])
def test_values_gradients_and_buffers(function, shape, residual, training, relu, backend, device):
    tensors = given(shape, device, residual=residual)
    assert_like_double(function, tensors, training, relu, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_half_precision(dtype, training, affine, backend, device):
    tensors = given((8, 64, 7, 5), device, dtype, affine=affine)
    assert_like_double(by_ops, tensors, training, True, 0.02)


def test_a_mean_far_from_zero_cancels_nothing(backend, device):
    x = given((16, 32, 13, 11), device, shift=3000.0)[0]
    mean, var = module.batch_norm_stats_op(x, None, None, None, 0.1)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0)


def test_gradients_only_where_they_are_needed(backend, device):
    """Frozen weights, a frozen input, and a residual alone."""
    tensors = given((4, 16, 6, 5), device)
    wanted = leaves(tensors)
    by_ops(*wanted, *buffers(16, device), True, True).square().sum().backward()
    for kept in range(4):
        some = [t.requires_grad_(i == kept) for i, t in enumerate(leaves(tensors))]
        by_ops(*some, *buffers(16, device), True, True).square().sum().backward()
        assert torch.equal(some[kept].grad, wanted[kept].grad)
        assert all(t.grad is None for i, t in enumerate(some) if i != kept)


def test_the_same_bits_every_time(backend, device):
    tensors = given((33, 40, 9, 9), device)
    results = []
    for _ in range(2):
        mine = leaves(tensors)
        out = by_ops(*mine, *buffers(40, device), True, True)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in mine)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_on_a_cpu_it_is_pytorch_bit_for_bit():
    for training in (False, True):
        tensors = given((4, 24, 6, 5), "cpu")
        ours, theirs = leaves(tensors), leaves(tensors)
        stats, their_stats = buffers(24, "cpu"), buffers(24, "cpu")
        out = public(*ours, *stats, training, True)
        expected = plain(*theirs, *their_stats, training, True)
        out.square().sum().backward()
        expected.square().sum().backward()
        got = [out, *stats, *(t.grad for t in ours)]
        wanted = [expected, *their_stats, *(t.grad for t in theirs)]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_counts_batches_and_marks_buffers_as_changed(backend, device):
    x = given((2, 8, 3, 3), device)[0]
    stats, count = buffers(8, device), torch.tensor(4, device=device)
    versions = [t._version for t in (*stats, count)]
    module._by_ops(x, None, None, None, *stats, True, False, 0.1, 1e-5, count)
    assert count == 5
    assert all(t._version > v for t, v in zip((*stats, count), versions, strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 3, 3), (2, 8, 0, 3)])
def test_no_images(shape, device):
    x = torch.randn(shape, device=device).requires_grad_()
    out = batch_norm_act(x, None, None, None, *buffers(8, device), training=False, relu=True)
    out.sum().backward()
    assert out.shape == shape and x.grad.shape == shape


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training, backend, device):
    def function(x, r, w, b, mean, var):
        return by_ops(x * 2, r, w, b, mean, var, training, True)

    results = []
    torch._dynamo.reset()
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        mine, stats = leaves(given((4, 16, 6, 5), device)), buffers(16, device)
        out = run(*mine, *stats)
        out.square().sum().backward()
        results.append([out, *stats, *(t.grad for t in mine)])
    torch.testing.assert_close(*results)


def test_the_public_function_compiles(device):
    def function(x, r, w, b, mean, var):
        return public(x, r, w, b, mean, var, True, True)

    torch._dynamo.reset()
    tensors, stats = given((4, 16, 6, 5), device), buffers(16, device)
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors, *stats)
    torch.testing.assert_close(out, function(*tensors, *buffers(16, device)))


def by_plain_call(x, residual, weight, bias, mean, var, training, relu, count=None):
    """What a GPU takes eagerly; here by the references."""
    rest = training, relu, 0.1, 1e-5
    return plain_calls.plainly("reference", x, residual, weight, bias, mean, var, count, *rest)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plain_call_is_the_three_ops_bit_for_bit(dtype, residual, training, relu):
    tensors = given((3, 24, 5, 4), "cpu", dtype, residual=residual)
    for kept in ((0, 1, 2, 3), (0,), (1,), (2, 3)):
        results = []
        for function in (by_plain_call, by_ops):
            mine = [
                t if t is None else t.clone().requires_grad_(i in kept)
                for i, t in enumerate(tensors)
            ]
            stats = buffers(24, "cpu")
            out = function(*mine, *stats, training, relu)
            if out.requires_grad:
                out.square().sum().backward()
            results.append([out, *stats, *(None if t is None else t.grad for t in mine)])
            assert all(t is None or (t.grad is None) == (i not in kept) for i, t in enumerate(mine))
        for ours, theirs in zip(*results, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
            assert ours is None or ours.stride() == theirs.stride()


def test_a_plain_call_saves_nothing_without_gradients_and_counts_batches():
    tensors, stats = given((3, 24, 5, 4), "cpu"), buffers(24, "cpu")
    count = torch.tensor(4)
    versions = [t._version for t in (*stats, count)]
    with torch.no_grad():
        out = by_plain_call(*leaves(tensors), *stats, True, True, count)
    assert not out.requires_grad and count == 5
    assert all(t._version > v for t, v in zip((*stats, count), versions, strict=True))


def test_a_plain_call_differentiates_once():
    x = given((3, 8, 5, 4), "cpu")[0].requires_grad_()
    out = by_plain_call(x, None, None, None, *buffers(8, "cpu"), True, True)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_else_follows_a_call_makes_it_no_plain_one():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, seen = torch.rand(2, 8, 4, 4), []
    look = lambda x: seen.append(plain_calls.is_plain(x)) or x * 1  # noqa: E731
    assert plain_calls.is_plain(x, None, torch.nn.Parameter(x))
    assert not plain_calls.is_plain(type("Own", (torch.Tensor,), {})(x))
    torch.func.vmap(look)(x)
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.jvp(look, (x,), (x,))
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))
    torch.fx.experimental.proxy_tensor.make_fx(look)(x)
    with pytest.warns((DeprecationWarning, FutureWarning)):  # the latter from torch 2.14 on
        torch.jit.trace(look, x, check_trace=False)
    assert seen and not any(seen)

    def compiled(x):
        return x + plain_calls.is_plain(x)

    assert torch.equal(torch.compile(compiled, fullgraph=True, backend="eager")(x), x)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
def test_a_plain_call_on_a_gpu(monkeypatch, training):
    tensors, results = given((40, 64, 9, 9), "cuda", torch.bfloat16), []
    for function in (by_ops, public):
        mine, stats = leaves(tensors), buffers(64, "cuda")
        if function is public:  # it must not come to the ops
            monkeypatch.setattr(module, "_by_ops", None)
        out = function(*mine, *stats, training, True)
        out.square().sum().backward()
        results.append([out, *stats, *(t.grad for t in mine)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_a_count_on_the_cpu_is_refused_on_a_gpu():
    x, count = given((4, 8, 3, 3), "cuda")[0], torch.tensor(0)
    with pytest.raises(RtkError, match="num_batches_tracked is on cpu"):
        batch_norm_act(x, training=True, num_batches_tracked=count)


INTERPRETED = """
import torch
from rtk.ops._registry import ops

run = {n: {i.backend: i.run for i in ops[n].implementations} for n in ops}
both = ("triton", "reference")
for shape, shift in [((3, 24, 5, 4), 1000.0), ((2, 8, 1, 1), 0.0), ((70, 264, 4, 3), 0.0)]:
    c = shape[1]
    x, residual, grad = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in "xrg")
    weight, bias = torch.randn(c), torch.randn(c)
    found = []
    for backend in both:
        values = x + shift if backend == "triton" else (x + shift).double()
        buffers = torch.zeros(c), torch.ones(c), torch.tensor(3)
        found.append([*run["batch_norm_stats"][backend](values, *buffers, 0.3), *buffers])
    for ours, exact in zip(*found):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=1e-5, atol=1e-5)
    mean, var = torch.randn(c), torch.rand(c) + 0.1
    for given in ((residual, mean, var, weight, bias), (None, mean, var, None, None)):
        relu = given[0] is not None
        out = [run["batch_norm_act"][b](x, *given, True, 1e-5, relu, relu) for b in both]
        torch.testing.assert_close(*(values for values, _ in out), rtol=1e-4, atol=1e-4)
        assert (out[0][1] != out[1][1]).sum() < 3
        positive = out[0][1] if relu else None
        for training, needs in [(True, [True] * 4), (False, [True, False, False, True])]:
            numbers = mean, var, given[3], training, 1e-5, needs
            got = [run["batch_norm_act_bwd"][b](grad, x, positive, *numbers) for b in both]
            torch.testing.assert_close(*got, rtol=1e-4, atol=1e-3)
"""


def test_the_triton_kernels_under_the_interpreter(interpret):
    interpret(INTERPRETED)


IMAGES = ("x_ptr", "residual_ptr", "out_ptr", "grad_ptr", "x_grad_ptr", "residual_grad_ptr")
TYPES = dict.fromkeys(IMAGES, "*bf16") | {"bits_ptr": "*u8", "eps": "fp32"}
TYPES |= dict.fromkeys(("rows", "groups", "tiles_a_part"), "i32")


# What the interpreter takes and the compiler does not shows here too: optional tensors left out.
NO_WEIGHTS = dict.fromkeys(("weight_ptr", "bias_ptr"))
NO_BITS = {"bits_ptr": None}


@pytest.mark.parametrize(
    ("kernel", "constants", "loads", "stores"),
    [
        ("batch_norm_sums", {"U": 4}, 8, 0),
        ("batch_norm_apply", {"U": 2, "RELU": True}, 4, 2),
        ("batch_norm_apply", {"U": 2, "RELU": False, "residual_ptr": None} | NO_BITS, 2, 2),
        ("batch_norm_apply", {"U": 2, "RELU": True} | NO_WEIGHTS, 4, 2),
        ("batch_norm_bwd_sums", {"U": 2}, 4, 0),
        ("batch_norm_bwd_sums", {"U": 2} | NO_BITS, 4, 0),
        ("batch_norm_bwd_apply", {"U": 2, "TRAINING": True}, 4, 4),
        ("batch_norm_bwd_apply", {"U": 2, "TRAINING": True, "weight_ptr": None}, 4, 4),
        ("batch_norm_bwd_apply", {"U": 2, "TRAINING": False, "x_ptr": None} | NO_BITS, 2, 4),
    ],
)
def test_the_triton_kernels_move_16_bytes_a_thread(
    kernel, constants, loads, stores, compile_for_hopper
):
    import triton
    from packaging.version import Version
    from rtk.kernels import batch_norm_act as kernels

    function = getattr(kernels, kernel)
    types = {name: TYPES.get(name, "*fp32") for name in function.arg_names}
    tile = {"R": 8, "BLOCK_C": 256}
    built = compile_for_hopper(function, types, constants | tile, num_warps=8)
    accesses = built.accesses()
    assert accesses.count("ld.v4.b32") == loads and accesses.count("st.v4.b32") == stores
    assert built.resources["LOCAL"] == built.resources["STACK"] == 0
    # With 80 three programs of 256 threads share a multiprocessor. Triton 3.8 keeps more of a tile
    # alive in the reductions, so that one or two do.
    newer = Version(triton.__version__) >= Version("3.7")
    most = {"batch_norm_sums": 200, "batch_norm_bwd_sums": 128} if newer else {}
    assert built.resources["REG"] <= most.get(kernel, 80)


X, V = torch.rand(2, 8, 4, 4), torch.ones(8)


@pytest.mark.parametrize(
    ("tensors", "training", "words"),
    [
        ((X[0], None, None, None, V, V), True, r"x must be \(N, C, H, W\) and floating"),
        ((X.int(), None, None, None, V, V), True, "and floating, got .* torch.int32"),
        ((X, X[:1], None, None, V, V), True, "residual and x must have one shape, got"),
        ((X, X.to("meta"), None, None, V, V), True, "residual is on meta and x on cpu; move one"),
        ((X, None, V[:4], None, V, V), True, r"weight must be \(C,\) = \(8,\), got \(4,\)"),
        ((X, None, None, V[None], V, V), True, r"bias must be \(C,\) = \(8,\), got \(1, 8\)"),
        ((X, None, None, None, V, None), True, "come together; give both or neither"),
        ((X, None, None, None, None, None), False, "without training it needs running_mean"),
        ((X[:1, :, :1, :1], None, None, None, V, V), True, "more than 1 value per channel"),
    ],
    ids=["3-D", "int", "residual", "device", "weight", "bias", "one", "none", "one-value"],
)
def test_refused(tensors, training, words):
    with pytest.raises(RtkError, match=f"batch_norm_act: .*{words}"):
        public(*tensors, training, False)


def test_a_forced_backend_never_falls_back():
    with forced("triton"), pytest.raises(RtkError, match="'triton' cannot: the tensors are on cpu"):
        public(X, None, V, V, V, V, True, False)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [8, 64, 2048])
def test_large_tensors_on_a_gpu(channels):
    rows = 2**31 // channels // 49 + 3
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.empty((rows, channels, 7, 7), dtype=torch.bfloat16, device="cuda", memory_format=LAST)
    x.normal_()
    stats = buffers(channels, "cuda")
    with torch.no_grad():
        out = public(x, None, None, None, *stats, False, True)
        wanted = plain(x[-2:].float(), None, None, None, *stats, False, True)
        torch.testing.assert_close(out[-2:].float(), wanted, rtol=0.02, atol=0.02)
        mean, var = module.batch_norm_stats_op(x, None, None, None, 0.1)
    assert mean.abs().max() < 0.01 * (64 / channels) ** -0.5 + 0.01
    torch.testing.assert_close(var, torch.ones_like(var), rtol=0.02, atol=0)
