import pytest
import torch
import torchattacks
from torch import nn

from rtk.attacks import Square
from rtk.attacks.square_moves import L2Moves, LinfMoves
from rtk.errors import RtkError

THEIR_NORM = {"linf": "Linf", "l2": "L2"}


def distance(x_adv, x, norm):
    delta = (x_adv - x).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


@pytest.fixture
def right(trained, wrong):
    """The trained model and the images that it classifies right."""
    model, x, y = trained
    chosen = ~wrong(model, x, y)
    return model, x[chosen], y[chosen]


@pytest.mark.parametrize("size", [8, 17])
@pytest.mark.parametrize(("norm", "eps", "tolerance"), [("linf", 0.03, 0), ("l2", 0.02, 2e-6)])
def test_it_is_torchattacks_from_the_same_seed(right, norm, eps, tolerance, size):
    """Linf to the bit. In L2 none may be fooled: theirs draws signs for those that are left."""
    model, x, y = right
    x = nn.functional.interpolate(x, size)
    with torch.no_grad():
        (first, second), (y, _) = (pair.unbind(1) for pair in model(x).topk(2))
    x, y = x[first - second > 1], y[first - second > 1]
    assert len(x) > 10
    theirs = torchattacks.Square(model, norm=THEIR_NORM[norm], eps=eps, n_queries=60)
    torch.manual_seed(5)
    theirs.init_hyperparam(x)
    _, expected = theirs.attack_single_run(x, y)
    with torch.no_grad():
        chosen = model(expected).argmax(1) == y
    ours = Square(norm, eps, 60)(model, x, y, seed=5)
    assert chosen.all() if norm == "l2" else chosen.float().mean() > 0.5
    assert distance(expected, x, norm).min() > 0.5 * eps
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm", THEIR_NORM)
def test_a_seed_finds_the_same_images(right, norm):
    model, x, y = right
    attack = Square(norm, 0.1, 50)
    before = torch.get_rng_state()
    first = attack(model, x, y, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(attack(model, x, y, seed=1), first)
    assert torch.equal(Square(norm, 0.1, 50)(model, x, y, seed=1), first)
    assert not torch.equal(attack(model, x, y, seed=2), first)
    torch.manual_seed(3)
    drawn = attack(model, x, y)
    torch.manual_seed(3)
    assert torch.equal(attack(model, x, y), drawn)


@pytest.mark.parametrize("height", [5, 7, 8, 9, 14, 32])
@pytest.mark.parametrize("norm", THEIR_NORM)
def test_images_stay_in_the_ball_and_in_range_at_any_size(batch, norm, height):
    x = torch.rand(4, 3, height, 9)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27 * height, 3))
    with torch.no_grad():
        y = model(x).argmax(1)
    eps = 0.2
    x_adv = Square(norm, eps, 30)(model, x, y)
    assert x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert 0.3 * eps < distance(x_adv, x, norm).max() <= eps * (1 + 1e-5)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 1.5)])
def test_more_queries_lower_the_margin_and_fool_more(right, wrong, norm, eps):
    model, x, y = right

    def margin(x_adv):
        with torch.no_grad():
            logits = model(x_adv)
        others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
        return logits.gather(1, y[:, None])[:, 0] - others

    # The schedule of sizes is that of 200 queries in both: the shorter one is the beginning.
    attack = Square(norm, eps, 200)
    short = Square(norm, eps, 200)
    short._share, short.queries = attack._share, 40
    few, many = short(model, x, y, seed=1), attack(model, x, y, seed=1)
    going = margin(few) > 0
    assert going.any() and not going.all()
    torch.testing.assert_close(few[~going], many[~going], rtol=0, atol=1e-5)  # they are done
    assert (margin(many)[going] <= margin(few)[going] + 1e-4).all()
    assert wrong(model, many, y).sum() > wrong(model, few, y).sum() > 0


def test_only_logits_are_asked_for(right):
    """A step function has no gradient to climb, and is searched through all the same."""
    model, x, y = right

    class Rounded(nn.Module):
        def forward(self, x):
            return (model(x) * 8).round() / 8

    with torch.no_grad():
        before = (Rounded()(x).argmax(1) == y).float().mean()
        after = (Rounded()(Square(eps=0.2, queries=100)(Rounded(), x, y)).argmax(1) == y).float()
    assert after.mean() < before - 0.2


def test_finished_images_are_computed_no_longer(right):
    model, x, y = right
    sizes = []
    hook = model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    Square(eps=0.3, queries=400)(model, x, y)
    hook.remove()
    assert sizes[1] == len(x) and sizes[-1] <= len(x) // 2


def test_the_model_is_left_as_it_was(model, batch):
    model.train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.bn1.running_mean.clone()
    Square(queries=3)(model, *batch)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.bn1.running_mean, statistics)
    assert all(p.requires_grad for p in model.parameters())


def test_the_share_of_a_square_falls_as_in_the_paper():
    attack = Square(queries=10000, p=0.8)
    at = {0: 1, 10: 1, 11: 2, 50: 2, 51: 4, 500: 8, 501: 16, 4001: 128, 8000: 256, 8001: 512}
    assert {query: 0.8 / attack._share(query) for query in at} == pytest.approx(at)
    assert Square(queries=100, p=0.8)._share(50) == attack._share(5000)
    moves = LinfMoves(0.1, torch.Generator())
    image = torch.zeros(1, 3, 32, 32)
    assert [moves.side(image, share) for share in (0.8, 0.05, 1e-6)] == [29, 7, 1]
    assert L2Moves(0.1, torch.Generator()).side(image, 1e-6) == 3
    assert moves.side(torch.zeros(1, 3, 4, 100), 1.0) == 4


def test_no_queries_give_the_start_and_no_radius_the_image(right):
    model, x, y = right
    start = Square(eps=0.1, queries=0)(model, x, y, seed=1)
    stripes = start - x
    inner = (x > 0.1) & (x < 0.9)
    torch.testing.assert_close(stripes[inner].abs(), torch.full_like(stripes[inner], 0.1))
    for norm in THEIR_NORM:
        torch.testing.assert_close(Square(norm, 0.0, 3)(model, x, y), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"eps": -1.0}, "Square: eps must be >= 0, got -1"),
        ({"queries": -1}, "Square: queries must be >= 0"),
        ({"p": 0.0}, r"Square: p must be a share in \(0, 1\], got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(RtkError, match=message):
        Square(**arguments)


def test_images_that_are_too_small_for_l2_are_refused(model, batch):
    x, y = batch
    with pytest.raises(RtkError, match="for l2 of 5 pixels and more"):
        Square("l2")(model, x[:, :, :4], y)
