"""Claims of jepa.py: public schedules, positions, masks, losses, histograms with a gradient."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jepa
from jepa import JEPA, JEPAConfig
from model_scunet import SCUNet, SCUNetConfig

ORACLES = Path(__file__).parent / "oracles"
# Crops of 12^3 have 6^3 tokens of 16 channels.
SMALL = SCUNetConfig(width=8, depths=(1, 2, 1), d_head=4)
f64 = torch.float64


def oracle():
    return np.load(ORACLES / "jepa_schedules.npz")


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def grey(*shape, seed=1, dtype=torch.float32):
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def small_jepa(mask_at="input", seed=0):
    torch.manual_seed(seed)
    return JEPA(
        SCUNet(SMALL).encoder, SMALL.feature_width, (6, 6, 6), JEPAConfig(24, 2, 2, mask_at)
    )


# ---- Against the public code


def test_learning_rate_decay_and_momentum_are_i_jepas():
    z = oracle()
    steps = int(z["iterations_per_epoch"] * z["epochs"])
    warmup = int(z["iterations_per_epoch"] * z["warmup_epochs"])
    peak, start, end = (float(z[k]) for k in ("lr", "start_lr", "final_lr"))
    lr = [jepa.lr_at(n, steps, warmup, peak, start, end) for n in range(steps)]
    decay = [jepa.weight_decay_at(n, steps) for n in range(steps)]
    momentum = [jepa.momentum_at(n, steps) for n in range(steps)]
    np.testing.assert_allclose(lr, z["lr_per_step"][:steps], rtol=1e-12)
    np.testing.assert_allclose(decay, z["wd_per_step"][:steps], rtol=1e-12)
    np.testing.assert_allclose(momentum, z["ema_per_step"][:steps], rtol=1e-12)


@pytest.mark.parametrize("width, n", [(48, 6), (96, 4)])
def test_positions_are_v_jepas(width, n):
    expected = oracle()[f"pos3d_dim{width}_grid{n}"]
    np.testing.assert_allclose(
        jepa.positions((n, n, n), width).numpy(), expected, rtol=0, atol=1e-15
    )


def test_positions_are_cut_where_three_axes_do_not_share_the_width_evenly():
    # Of 20 columns, 2 ceil(20 / 6) = 8 are for z, 8 for y and the first 4 of 8 for x.
    grid = (2, 3, 4)
    expected = []
    for r in itertools.product(*map(range, grid)):
        row = []
        for n in r:
            angles = [n / 10000 ** (k / 4) for k in range(4)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        expected.append(row[:20])
    np.testing.assert_allclose(jepa.positions(grid, 20), expected, rtol=0, atol=1e-14)


# ---- Masks


def voxels(mask):
    """A mask of cells of 2^3 voxels (B, d, h, w) -> a mask of voxels."""
    return mask.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("grid, maps", [((6, 6, 6), 4000), ((6, 8, 5), 4000)])
def test_every_fitting_block_is_equally_likely_in_every_place(grid, maps):
    sides = []
    for side in itertools.product(*(range(1, n + 1) for n in grid)):
        share = math.prod(side) / math.prod(grid)
        if 0.15 <= share <= 0.2 and max(side) <= 1.5 * min(side):
            sides.append(side)

    # The probability that one block covers a cell, by enumeration.
    hidden = np.zeros(grid)
    for side in sides:
        corners = list(itertools.product(*(range(n - a + 1) for n, a in zip(grid, side))))
        for z, y, x in corners:
            cells = hidden[z : z + side[0], y : y + side[1], x : x + side[2]]
            cells += 1 / len(corners) / len(sides)
    for blocks in (1, 4):
        masks = jepa.block_masks(maps, grid, seeded(), blocks=blocks)
        assert masks.shape == (maps, *grid)
        assert masks.dtype == torch.bool
        p = (1 - hidden) ** blocks
        tolerance = 5 * np.sqrt(p * (1 - p) / maps) + 1e-9
        assert (np.abs(masks.double().mean(0).numpy() - p) < tolerance).all()

    # Every block is solid and has one of these shapes.
    for mask in jepa.block_masks(50, grid, seeded(2), blocks=1):
        cells = (~mask).nonzero()
        side = cells.amax(0) - cells.amin(0) + 1
        assert tuple(side.tolist()) in sides
        assert len(cells) == side.prod()


def test_masks_of_6_cells_leave_the_context_that_the_docstring_says():
    sides = jepa.block_sides((6, 6, 6), (0.15, 0.2), 1.5)
    assert sorted(sides.tolist()) == [[3, 3, 4], [3, 4, 3], [4, 3, 3]]
    visible = jepa.block_masks(500, (6, 6, 6), seeded()).sum((1, 2, 3))
    assert visible.min() >= 216 - 4 * 36
    assert 0.53 < visible.float().mean() / 216 < 0.555


def test_a_seed_fixes_the_masks():
    a, b, c = (jepa.block_masks(8, (6, 6, 6), seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_hiding_sets_the_cells_to_zero_and_leaves_the_rest():
    x, mask = noise(2, 1, 4, 6, 10), noise(2, 2, 3, 5) > 0
    assert torch.equal(jepa.hide(x, mask), torch.where(voxels(mask)[:, None], x, 0))


# ---- JEPA and MAE


@pytest.mark.parametrize("mask_at, leaks", [("input", False), ("embedding", True)])
def test_predictions_see_hidden_voxels_only_where_the_text_masks_after_the_encoder(mask_at, leaks):
    net, mask = small_jepa(mask_at), jepa.block_masks(2, (6, 6, 6), seeded())
    x = grey(2, 1, 12, 12, 12).requires_grad_()
    hidden_predictions = net(x, mask)[~mask.flatten(1)]
    (grad,) = torch.autograd.grad(hidden_predictions.square().sum(), x)
    assert jepa.hide(grad, mask).any()  # visible voxels count
    assert bool(jepa.hide(grad, ~mask).any()) == leaks


def test_predictor_is_given_visible_tokens_and_places_and_nothing_else():
    net, mask = small_jepa("embedding"), jepa.block_masks(1, (6, 6, 6), seeded())
    net.predictor = torch.nn.Identity()
    net.context.encoder = torch.nn.Conv3d(1, 16, 2, stride=2)
    net.context.embed = torch.nn.Linear(16, 16)
    x = grey(1, 1, 12, 12, 12)
    out = net(x, mask)[0]
    places = jepa.positions((6, 6, 6), 16).float()
    for i, (z, y, w) in enumerate(itertools.product(range(6), repeat=3)):
        token = net.mask_token
        if mask[0, z, y, w]:
            cell = x[:, :, 2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * w : 2 * w + 2]
            token = net.context.embed(net.context.encoder(cell).flatten())
        torch.testing.assert_close(out[i], token + places[i], rtol=0, atol=1e-6)


def test_jepa_loss_is_equation_3_over_hidden_tokens_alone():
    mask = jepa.block_masks(3, (6, 6, 6), seeded(), blocks=2)
    predictions = 3 * noise(3, 216, 5, dtype=f64)
    targets = noise(3, 216, 5, seed=2, dtype=f64).requires_grad_()
    expected = []
    for hidden, s, t in zip(~mask.flatten(1), predictions.numpy(), targets.detach().numpy()):
        terms = []
        for i in hidden.nonzero().flatten().tolist():
            target = (t[i] - t[i].mean()) / np.sqrt(t[i].var() + 1e-5)
            e = np.abs(s[i] - target)
            terms.append(np.where(e < 0.5, e**2, e - 0.25).mean())  # e^2 / (2 beta), e - beta / 2
        expected.append(np.mean(terms))
    x = noise(3, 1, 12, 12, 12)
    loss = jepa.jepa_loss(lambda x, m: predictions, lambda x: targets, x, mask, beta=0.5)
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-6)
    assert not loss.requires_grad  # the target encoder learns nothing from it
    # The maps hide different numbers of tokens, and weigh the same.
    assert len((~mask).sum((1, 2, 3)).unique()) > 1


def test_mae_loss_counts_hidden_voxels_alone():
    x, mask = noise(3, 1, 4, 4, 4), noise(3, 2, 2, 2) > 0
    seen = []

    def net(v):
        seen.append(v)
        return v + 0.5

    loss = jepa.mae_loss(net, x, mask)
    assert torch.equal(seen[0], jepa.hide(x, mask))
    expected = []
    for crop, visible in zip(x[:, 0], voxels(mask)):
        expected.append((0.5 - crop[~visible]).square().mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_every_parameter_takes_part_in_both_objectives():
    x, mask = grey(2, 1, 12, 12, 12), jepa.block_masks(2, (6, 6, 6), seeded())
    net, whole = small_jepa(), SCUNet(SMALL)
    target = copy.deepcopy(net.context).requires_grad_(False)
    jepa.jepa_loss(net, target, x, mask).backward()
    jepa.mae_loss(whole, x, mask).backward()
    for module in (net, whole):
        grads = [p.grad for p in module.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        assert sum(bool(grad.any()) for grad in grads) > 0.9 * len(grads)


def test_target_follows_the_context_by_equation_4():
    context = small_jepa(seed=1).context
    target = copy.deepcopy(small_jepa(seed=2).context).double()
    context.double()
    first, factor = copy.deepcopy(target), 1.0
    for n in range(5):
        jepa.update_target(target, context, jepa.momentum_at(n, 10, 0.5))
        factor *= 0.5 + 0.05 * n
    assert factor < 0.2
    for now, before, goal in zip(target.parameters(), first.parameters(), context.parameters()):
        torch.testing.assert_close(now, goal + factor * (before - goal), rtol=0, atol=1e-13)


def test_pretraining_learns_to_predict_hidden_cells_without_collapse():
    torch.manual_seed(0)
    r = torch.cartesian_prod(*[torch.arange(12.0)] * 3).view(12, 12, 12, 3)

    def waves(n, g):
        # Long plane waves: a part of one tells the rest.
        k = torch.randn(n, 3, generator=g) / 15
        phase = 2 * math.pi * torch.rand(n, 1, 1, 1, generator=g)
        return torch.sin(torch.einsum("zyxa,na->nzyx", r, k) + phase)[:, None]

    net = JEPA(torch.nn.Conv3d(1, 16, 2, stride=2), 16, (6, 6, 6), JEPAConfig(32, 1, 4))
    target, g = copy.deepcopy(net.context).requires_grad_(False), seeded()
    opt = torch.optim.AdamW(net.parameters(), 3e-3)
    losses = []
    for n in range(80):
        loss = jepa.jepa_loss(net, target, waves(16, g), jepa.block_masks(16, (6, 6, 6), g))
        opt.zero_grad()
        loss.backward()
        opt.step()
        jepa.update_target(target, net.context, jepa.momentum_at(n, 80))
        losses.append(float(loss.detach()))
    with torch.no_grad():
        tokens = target(waves(64, g))
    z = jepa.layer_norm(tokens)
    # What knowing nothing costs.
    constant = torch.nn.functional.smooth_l1_loss(z.mean((0, 1)).expand_as(z), z)
    assert np.mean(losses[-10:]) < 0.4 * float(constant)
    assert jepa.collapse(tokens)["std"] > 0.5


def test_bfloat16_autocast_stays_near_float32():
    net, x, mask = small_jepa(), grey(2, 1, 12, 12, 12), jepa.block_masks(2, (6, 6, 6), seeded())
    target = copy.deepcopy(net.context)
    expected = jepa.jepa_loss(net, target, x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        loss = jepa.jepa_loss(net, target, x, mask)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


# ---- Collapse


def hadamard(n):
    if n == 1:
        return torch.ones(1, 1)
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard(n // 2))


def test_rank_counts_the_directions_in_which_tokens_vary_and_std_says_how_far():
    # The rows are orthogonal, each of mean 0 and variance 1, so that LN leaves them.
    rows = hadamard(16)[1:]
    for k in (1, 3, 15):
        tokens = torch.cat((rows[:k], -rows[:k]))  # +- along k directions
        numbers = jepa.collapse(torch.stack((tokens, tokens.flip(0))))
        assert numbers["rank"] == pytest.approx(k, rel=1e-4)
        assert numbers["std"] == pytest.approx(1, abs=1e-4)
        assert numbers["constant"] == pytest.approx(0.5, abs=1e-4)  # each number is 1 off: x^2 / 2
    tokens = torch.cat((rows[:1].expand(9, 16), rows[1:2]))  # singular values 3 to 1
    rank = jepa.collapse(torch.stack((tokens, -tokens)))["rank"]
    assert rank == pytest.approx(4**0.25 * (4 / 3) ** 0.75, rel=1e-4)
    dead = jepa.collapse(rows[0].expand(2, 8, 16))
    assert dead == {"std": 0, "rank": 1, "maps": 0, "constant": 0}


def test_tokens_that_know_their_place_but_not_their_map_show():
    place, free = noise(1, 50, 16).expand(40, 50, 16), noise(40, 50, 16)
    numbers = jepa.collapse(place)
    assert numbers["maps"] < 1e-9
    assert numbers["rank"] > 12
    assert jepa.collapse(free)["maps"] == pytest.approx(1, abs=0.01)
    mixed = jepa.layer_norm(place) + jepa.layer_norm(free)  # half of the variance each
    assert jepa.collapse(mixed)["maps"] == pytest.approx(0.5, abs=0.04)


# ---- HistKL


def direct_histogram(x, bins, sigma):
    """(6) of a map."""
    centres = (np.arange(bins) + 0.5) / bins
    u = (x.double().numpy().reshape(-1, 1) - centres) / sigma
    return np.exp(-0.5 * u**2).mean(0)


def direct_js(h, k):
    """(7), (8) of two histograms."""
    p = h / h.sum()
    q = k / k.sum()
    m = (p + q) / 2
    return 0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum()


@pytest.fixture
def small_pieces(monkeypatch):
    """Even small maps take several pieces, and a shorter last one."""
    monkeypatch.setitem(jepa.PIECE, "cpu", 100)


@pytest.mark.parametrize("dtype, rtol", [(f64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("bins, sigma", [(16, None), (10, 0.03)])
def test_hist_kl_is_the_divergence_of_the_histograms_as_defined(
    small_pieces, dtype, rtol, bins, sigma
):
    x, y = grey(3, 1, 4, 5, 3, dtype=f64) ** 2, 1.2 * grey(3, 1, 4, 5, 3, seed=2, dtype=f64)
    each = []
    for a, b in zip(x, y):
        h, k = (direct_histogram(v, bins, sigma or 1 / bins) for v in (a, b))
        each.append(direct_js(h, k))
    x, y = x.to(dtype), y.to(dtype)
    divergence = jepa.hist_kl(x, y, bins, sigma)
    assert float(divergence) == pytest.approx(np.mean(each), rel=rtol)
    assert divergence.dtype == dtype
    torch.testing.assert_close(jepa.hist_kl(x, y), jepa.hist_kl(x, y, 64, 1 / 64), rtol=0, atol=0)


def test_hist_kl_has_the_gradient_of_its_value(small_pieces):
    x = (1.4 * grey(2, 1, 3, 3, 4, dtype=f64) - 0.2).requires_grad_()
    y = grey(2, 1, 3, 3, 4, seed=2, dtype=f64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: jepa.hist_kl(x, y, 12, 0.08), (x, y), atol=1e-7)


def test_float32_histograms_of_nearly_equal_maps_keep_their_digits():
    x = grey(1, 1, 24, 24, 24) ** 3
    values, grads = [], []
    for dtype in (torch.float32, f64):
        a = x.to(dtype, copy=True).requires_grad_()
        loss = jepa.hist_kl(a, (x + 1e-3).to(dtype))  # p - q is a thousandth of p
        values.append(float(loss.detach()))
        grads.append(torch.autograd.grad(loss, a)[0].double())
    assert 0 < values[1] < 1e-3 and values[0] == pytest.approx(values[1], rel=1e-3)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


def test_divergence_is_zero_for_shuffled_voxels_and_log_2_for_grey_values_apart():
    x = grey(2, 1, 8, 8, 8)
    shuffled = x.flatten(1)[:, torch.randperm(512, generator=seeded())].view_as(x)
    assert abs(float(jepa.hist_kl(x, shuffled))) < 1e-12
    low, high = 0.2 * x, 0.8 + 0.2 * x
    assert float(jepa.hist_kl(low, high)) == pytest.approx(math.log(2), rel=1e-5)
    # Erratum 1: without (7), (8) would be sum(h) log 2 here, and sum(h) is not 1 but sqrt(2 pi).
    assert direct_histogram(low, 64, 1 / 64).sum() == pytest.approx(
        math.sqrt(2 * math.pi), rel=0.05
    )
    a, b = grey(2, 1, 8, 8, 8, seed=3) ** 2, x
    assert float(jepa.hist_kl(a, b)) == pytest.approx(float(jepa.hist_kl(b, a)), rel=1e-9)


def test_hist_kl_is_the_mean_over_maps_each_with_its_own_histogram():
    x, y = (
        grey(3, 1, 6, 6, 6) ** torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1),
        grey(3, 1, 6, 6, 6, seed=2),
    )
    alone = [float(jepa.hist_kl(x[i : i + 1], y[i : i + 1])) for i in range(3)]
    assert float(jepa.hist_kl(x, y)) == pytest.approx(np.mean(alone), rel=1e-6)


def test_a_map_far_out_of_range_counts_as_uniform_and_is_not_pulled():
    x, y = torch.full((1, 1, 4, 4, 4), 50.0, requires_grad=True), grey(1, 1, 4, 4, 4)
    loss = jepa.hist_kl(x, y, 16)
    loss.backward()
    expected = direct_js(np.ones(16), direct_histogram(y, 16, 1 / 16))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert x.grad.abs().max() < 1e-9


def test_no_tensor_is_larger_than_a_piece_or_the_maps():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    x, y = grey(4, 1, 24, 24, 24).requires_grad_(), grey(4, 1, 24, 24, 24, seed=2)
    with Largest() as largest:
        jepa.hist_kl(x, y).backward()
    assert x.numel() < largest.numel <= jepa.PIECE["cpu"] < x.numel() * 64 // 10


def test_histograms_are_float32_under_autocast_and_of_half_precision_maps():
    x, y = grey(1, 1, 8, 8, 8), grey(1, 1, 8, 8, 8, seed=2)
    assert torch.equal(jepa.hist_kl(x.bfloat16(), y), jepa.hist_kl(x.bfloat16().float(), y))
    grads = []
    for on in (False, True):
        a = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = jepa.hist_kl(a, y)
        loss.backward()
        grads.append((loss.detach(), a.grad))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=0)


def test_composite_loss_weighs_squared_error_and_histograms():
    x, y = grey(2, 1, 6, 6, 6), grey(2, 1, 6, 6, 6, seed=2)
    mse, js = float((x - y).square().mean()), float(jepa.hist_kl(x, y, 32, 0.02))
    for alpha in (0.0, 0.3, 1.0):
        loss = float(jepa.composite_loss(x, y, alpha, 32, 0.02))
        assert loss == pytest.approx(alpha * mse + (1 - alpha) * js, rel=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: JEPAConfig(width=100), "width 100 cannot be shared by 6 heads"),
        (lambda: JEPAConfig(mask_at="output"), "choose 'input' or 'embedding'"),
        (lambda: jepa.block_masks(1, (3, 3, 3)), "no block of whole cells"),
        (
            lambda: jepa.block_masks(1, (6, 6, 6), blocks=6),
            "6 blocks can leave 0 of 216 tokens visible, want 8",
        ),
        (
            lambda: jepa.hide(torch.zeros(1, 1, 5, 6, 6), torch.ones(1, 3, 3, 3) > 0),
            "do not divide into cells",
        ),
        (
            lambda: small_jepa()(torch.zeros(1, 1, 24, 24, 24), torch.ones(1, 6, 6, 6) > 0),
            "give 1728 tokens",
        ),
        (lambda: jepa.collapse(torch.zeros(1, 8, 4)), "at least 2"),
        (lambda: jepa.hist_kl(torch.zeros(2, 8), torch.zeros(2, 9)), "want one shape"),
        (lambda: jepa.hist_kl(torch.zeros(2, 8), torch.zeros(2, 8), 0), "both must be positive"),
        (
            lambda: jepa.hist_kl(torch.zeros(2, 8), torch.zeros(2, 8), 8, -1),
            "both must be positive",
        ),
        (
            lambda: jepa.composite_loss(torch.zeros(2, 8), torch.zeros(2, 8), 1.5),
            "must lie in 0..1",
        ),
    ],
)
def test_wrong_values_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
