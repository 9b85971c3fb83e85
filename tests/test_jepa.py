"""What jepa.py promises: the public schedules and positions, masks as defined, losses as written, histograms with a gradient."""

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
SMALL = SCUNetConfig(width=8, depths=(1, 2, 1), d_head=4)         # crops of 12^3 have 6^3 tokens of 16 channels
f64 = torch.float64


def fixture():
    path = ORACLES / "jepa_schedules.npz"
    if not path.exists():
        pytest.skip(f"needs {path}, which is not part of the project")
    return np.load(path)


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


def grey(*shape, seed=1, dtype=torch.float32):
    return torch.rand(shape, generator=seeded(seed), dtype=dtype)


def small_jepa(mask_at="input", seed=0):
    torch.manual_seed(seed)
    return JEPA(SCUNet(SMALL).encoder, SMALL.feature_width, (6, 6, 6), JEPAConfig(24, 2, 2, mask_at))


# ---- Against the public code -----------------------------------------------------------------------

def test_learning_rate_decay_and_momentum_are_i_jepas():
    z = fixture()
    steps = int(z["iterations_per_epoch"] * z["epochs"])
    warmup = int(z["iterations_per_epoch"] * z["warmup_epochs"])
    lr, start, end = (float(z[k]) for k in ("lr", "start_lr", "final_lr"))
    for n in range(steps):
        assert jepa.lr_at(n, steps, warmup, lr, start, end) == pytest.approx(z["lr_per_step"][n], rel=1e-12)
        assert jepa.weight_decay_at(n, steps) == pytest.approx(z["wd_per_step"][n], rel=1e-12)
        assert jepa.momentum_at(n, steps) == pytest.approx(z["ema_per_step"][n], rel=1e-12)


@pytest.mark.parametrize("width, n", [(48, 6), (96, 4)])
def test_positions_are_v_jepas(width, n):
    expected = fixture()[f"pos3d_dim{width}_grid{n}"]
    np.testing.assert_allclose(jepa.positions((n, n, n), width).numpy(), expected, rtol=0, atol=1e-15)


def test_positions_of_a_width_that_three_axes_do_not_share_evenly_are_cut():
    grid, width, part = (2, 3, 4), 20, 8                 # 2 ceil(20 / 6) = 8 for z, 8 for y, 4 of 8 for x
    table = jepa.positions(grid, width)
    for i, r in enumerate(itertools.product(*map(range, grid))):
        for column in range(width):
            axis, k = divmod(column, part)
            angle = r[axis] / 10000 ** (k % 4 / 4)
            assert float(table[i, column]) == pytest.approx(math.sin(angle) if k < 4 else math.cos(angle), abs=1e-14)


# ---- Masks -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("grid, maps", [((6, 6, 6), 4000), ((6, 8, 5), 4000)])
def test_every_fitting_block_is_equally_likely_in_every_place(grid, maps):
    sides = [s for s in itertools.product(*(range(1, n + 1) for n in grid))
             if 0.15 <= math.prod(s) / math.prod(grid) <= 0.2 and max(s) <= 1.5 * min(s)]
    hidden = np.zeros(grid)                              # probability that one block covers a cell, by enumeration
    for side in sides:
        corners = list(itertools.product(*(range(n - a + 1) for n, a in zip(grid, side))))
        for corner in corners:
            hidden[tuple(slice(c, c + a) for c, a in zip(corner, side))] += 1 / len(corners) / len(sides)
    for blocks in (1, 4):
        masks = jepa.block_masks(maps, grid, seeded(), blocks=blocks)
        assert masks.shape == (maps, *grid) and masks.dtype == torch.bool
        p = (1 - hidden) ** blocks
        assert (np.abs(masks.double().mean(0).numpy() - p) < 5 * np.sqrt(p * (1 - p) / maps) + 1e-9).all()
    for mask in jepa.block_masks(50, grid, seeded(2), blocks=1):
        cells = (~mask).nonzero()
        assert tuple((cells.amax(0) - cells.amin(0) + 1).tolist()) in sides
        assert len(cells) == (cells.amax(0) - cells.amin(0) + 1).prod()        # solid


def test_masks_of_6_cells_leave_the_context_that_the_docstring_says():
    assert sorted(jepa.block_sides((6, 6, 6), (0.15, 0.2), 1.5).tolist()) == [[3, 3, 4], [3, 4, 3], [4, 3, 3]]
    visible = jepa.block_masks(500, (6, 6, 6), seeded()).sum((1, 2, 3))
    assert visible.min() >= 216 - 4 * 36 and 0.53 < visible.float().mean() / 216 < 0.555


def test_a_seed_fixes_the_masks():
    draw = lambda seed: jepa.block_masks(8, (6, 6, 6), seeded(seed))
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


def test_hiding_sets_the_cells_to_zero_and_leaves_the_rest():
    x, mask = noise(2, 1, 4, 6, 10), noise(2, 2, 3, 5) > 0
    out = jepa.hide(x, mask)
    for b, z, y, w in itertools.product(range(2), range(4), range(6), range(10)):
        kept = mask[b, z // 2, y // 2, w // 2]
        assert out[b, 0, z, y, w] == (x[b, 0, z, y, w] if kept else 0)


# ---- JEPA and MAE ----------------------------------------------------------------------------------

@pytest.mark.parametrize("mask_at, leaks", [("input", False), ("embedding", True)])
def test_predictions_see_hidden_voxels_only_where_the_text_masks_after_the_encoder(mask_at, leaks):
    net, mask = small_jepa(mask_at), jepa.block_masks(2, (6, 6, 6), seeded())
    x = grey(2, 1, 12, 12, 12).requires_grad_()
    grad, = torch.autograd.grad((net(x, mask) * ~mask.flatten(1)[..., None]).square().sum(), x)
    assert jepa.hide(grad, mask).any()                   # visible voxels count
    assert bool(jepa.hide(grad, ~mask).any()) == leaks


def test_predictor_is_given_visible_tokens_and_places_and_nothing_else():
    net, mask = small_jepa("embedding"), jepa.block_masks(1, (6, 6, 6), seeded())
    net.predictor = torch.nn.Identity()
    net.context.encoder = torch.nn.Conv3d(1, 16, 2, stride=2)
    net.context.embed = torch.nn.Linear(16, 16)
    x, W = grey(1, 1, 12, 12, 12), net.context.embed
    out = net(x, mask)[0]
    places = jepa.positions((6, 6, 6), 16).float()
    for i, (z, y, w) in enumerate(itertools.product(range(6), repeat=3)):
        cell = x[:, :, 2 * z:2 * z + 2, 2 * y:2 * y + 2, 2 * w:2 * w + 2]
        token = W(net.context.encoder(cell).flatten()) if mask[0, z, y, w] else net.mask_token
        torch.testing.assert_close(out[i], token + places[i], rtol=0, atol=1e-6)


def test_jepa_loss_is_equation_3_over_hidden_tokens_alone():
    mask = jepa.block_masks(3, (6, 6, 6), seeded(), blocks=2)
    s, targets = 3 * noise(3, 216, 5, dtype=f64), torch.nn.Parameter(noise(3, 216, 5, seed=2, dtype=f64))
    expected = []
    for b in range(3):
        terms = []
        for i in (~mask[b].flatten()).nonzero().flatten().tolist():
            t = targets[b, i].detach().numpy()
            t = (t - t.mean()) / np.sqrt(t.var() + 1e-5)
            e = np.abs(s[b, i].numpy() - t)
            terms.append(np.where(e < 0.5, e ** 2, e - 0.25).mean())           # beta 0.5: e^2 / (2 beta), e - beta / 2
        expected.append(np.mean(terms))
    loss = jepa.jepa_loss(lambda x, m: s, lambda x: targets, noise(3, 1, 12, 12, 12), mask, beta=0.5)
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-6) and not loss.requires_grad
    assert len(set((~mask).flatten(1).sum(1).tolist())) > 1                    # maps weigh the same whatever they hide


def test_mae_loss_counts_hidden_voxels_alone():
    x, mask = noise(3, 1, 4, 4, 4), noise(3, 2, 2, 2) > 0
    seen = []
    loss = jepa.mae_loss(lambda v: seen.append(v) or v + 0.5, x, mask)
    assert torch.equal(seen[0], jepa.hide(x, mask))
    hidden = [x[b, 0][~mask[b].repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)] for b in range(3)]
    assert float(loss) == pytest.approx(float(torch.stack([(0.5 - v).square().mean() for v in hidden]).mean()), rel=1e-6)


def test_every_parameter_takes_part_in_both_objectives():
    x, mask = grey(2, 1, 12, 12, 12), jepa.block_masks(2, (6, 6, 6), seeded())
    net, whole = small_jepa(), SCUNet(SMALL)
    target = copy.deepcopy(net.context).requires_grad_(False)
    jepa.jepa_loss(net, target, x, mask).backward()
    jepa.mae_loss(whole, x, mask).backward()
    for module in (net, whole):
        assert [k for k, p in module.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        assert sum(bool(p.grad.any()) for p in module.parameters()) > 0.9 * len(list(module.parameters()))


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


def test_pretraining_learns_what_visible_cells_tell_of_hidden_ones_without_collapse():
    torch.manual_seed(0)
    r = torch.cartesian_prod(*[torch.arange(12.0)] * 3).view(12, 12, 12, 3)

    def waves(n, g):                                     # long plane waves: a part of one tells the rest
        k, phase = torch.randn(n, 3, generator=g) / 15, 2 * math.pi * torch.rand(n, 1, 1, 1, generator=g)
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
    constant = torch.nn.functional.smooth_l1_loss(z.mean((0, 1)).expand_as(z), z)          # what knowing nothing costs
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


# ---- Collapse --------------------------------------------------------------------------------------

def hadamard(n):
    return torch.ones(1, 1) if n == 1 else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard(n // 2))


def test_rank_counts_the_directions_in_which_tokens_vary_and_std_says_how_far():
    rows = hadamard(16)[1:]                              # orthogonal, each of mean 0 and variance 1: LN leaves them
    for k in (1, 3, 15):
        tokens = torch.cat((rows[:k], -rows[:k]))        # +- along k directions
        numbers = jepa.collapse(torch.stack((tokens, tokens.flip(0))))
        assert numbers["rank"] == pytest.approx(k, rel=1e-4) and numbers["std"] == pytest.approx(1, abs=1e-4)
        assert numbers["constant"] == pytest.approx(0.5, abs=1e-4)             # every number is 1 off: x^2 / 2
    tokens = torch.cat((rows[:1].expand(9, 16), rows[1:2]))                    # singular values 3 to 1
    rank = jepa.collapse(torch.stack((tokens, -tokens)))["rank"]
    assert rank == pytest.approx(4 ** 0.25 * (4 / 3) ** 0.75, rel=1e-4)
    dead = jepa.collapse(rows[0].expand(2, 8, 16))
    assert dead == {"std": 0, "rank": 1, "maps": 0, "constant": 0}


def test_tokens_that_know_their_place_but_not_their_map_show():
    place, free = noise(1, 50, 16).expand(40, 50, 16), noise(40, 50, 16)
    assert jepa.collapse(place)["maps"] < 1e-9 and jepa.collapse(place)["rank"] > 12
    assert jepa.collapse(free)["maps"] == pytest.approx(1, abs=0.01)
    mixed = jepa.layer_norm(place) + jepa.layer_norm(free)                     # half of the variance each
    assert jepa.collapse(mixed)["maps"] == pytest.approx(0.5, abs=0.04)


# ---- HistKL ----------------------------------------------------------------------------------------

def direct_histogram(x, bins, sigma):
    """(6), one value after the other."""
    return np.array([sum(math.exp(-0.5 * ((v - (j + 0.5) / bins) / sigma) ** 2) for v in x) / len(x) for j in range(bins)])


def direct_js(p, q):
    m = (p + q) / 2
    kl = lambda a: sum(a_j * math.log(a_j / m_j) for a_j, m_j in zip(a, m) if a_j > 0)
    return 0.5 * kl(p) + 0.5 * kl(q)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setitem(jepa.PIECE, "cpu", 100)          # so that even small maps take several, and a shorter last one


@pytest.mark.parametrize("dtype, rtol", [(f64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("bins, sigma", [(16, None), (10, 0.03)])
def test_hist_kl_is_the_divergence_of_the_histograms_as_defined(small_pieces, dtype, rtol, bins, sigma):
    x, y = grey(3, 1, 4, 5, 3, dtype=f64) ** 2, 1.2 * grey(3, 1, 4, 5, 3, seed=2, dtype=f64)
    each, literal = [], []
    for b in range(3):
        h, k = (direct_histogram(v[b].flatten().tolist(), bins, sigma or 1 / bins) for v in (x, y))
        each.append(direct_js(h / h.sum(), k / k.sum()))
        literal.append(direct_js(h, k))
    x, y = x.to(dtype), y.to(dtype)
    assert float(jepa.hist_kl(x, y, bins, sigma)) == pytest.approx(np.mean(each), rel=rtol)
    assert float(jepa.hist_kl(x, y, bins, sigma, normalise=False)) == pytest.approx(np.mean(literal), rel=rtol)
    assert jepa.hist_kl(x, y, bins, sigma).dtype == dtype
    assert float(jepa.hist_kl(x, y)) == pytest.approx(float(jepa.hist_kl(x, y, 64, 1 / 64)), rel=1e-12)


def test_hist_kl_has_the_gradient_of_its_value(small_pieces):
    x = (1.4 * grey(2, 1, 3, 3, 4, dtype=f64) - 0.2).requires_grad_()
    y = grey(2, 1, 3, 3, 4, seed=2, dtype=f64).requires_grad_()
    for normalise in (True, False):
        assert torch.autograd.gradcheck(lambda x, y: jepa.hist_kl(x, y, 12, 0.08, normalise=normalise), (x, y), atol=1e-7)


def test_float32_histograms_of_nearly_equal_maps_keep_their_digits():
    x = grey(1, 1, 24, 24, 24) ** 3
    values, grads = [], []
    for dtype in (torch.float32, f64):
        a = x.to(dtype, copy=True).requires_grad_()
        loss = jepa.hist_kl(a, (x + 1e-3).to(dtype))     # p - q is a thousandth of p
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
    assert float(jepa.hist_kl(low, high, normalise=False)) > 1                 # Erratum 1: no divergence of distributions
    a, b = grey(2, 1, 8, 8, 8, seed=3) ** 2, x
    assert float(jepa.hist_kl(a, b)) == pytest.approx(float(jepa.hist_kl(b, a)), rel=1e-9)


def test_hist_kl_is_the_mean_over_maps_each_with_its_own_histogram():
    x, y = grey(3, 1, 6, 6, 6) ** torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1), grey(3, 1, 6, 6, 6, seed=2)
    alone = [float(jepa.hist_kl(x[i:i + 1], y[i:i + 1])) for i in range(3)]
    assert float(jepa.hist_kl(x, y)) == pytest.approx(np.mean(alone), rel=1e-6)


def test_a_map_far_out_of_range_counts_as_uniform_and_is_not_pulled():
    x, y = torch.full((1, 1, 4, 4, 4), 50.0, requires_grad=True), grey(1, 1, 4, 4, 4)
    loss = jepa.hist_kl(x, y, 16)
    loss.backward()
    k = direct_histogram(y.flatten().tolist(), 16, 1 / 16)
    assert float(loss.detach()) == pytest.approx(direct_js(np.full(16, 1 / 16), k / k.sum()), rel=1e-5)
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
        assert float(jepa.composite_loss(x, y, alpha, 32, 0.02)) == pytest.approx(alpha * mse + (1 - alpha) * js, rel=1e-5)


@pytest.mark.parametrize("make, message", [
    (lambda: JEPAConfig(width=100), "width 100 cannot be shared by 6 heads"),
    (lambda: JEPAConfig(mask_at="output"), "choose 'input' or 'embedding'"),
    (lambda: jepa.block_masks(1, (3, 3, 3)), "no block of whole cells"),
    (lambda: jepa.block_masks(1, (6, 6, 6), blocks=6), "6 blocks can leave 0 of 216 tokens visible, want 8"),
    (lambda: jepa.hide(torch.zeros(1, 1, 5, 6, 6), torch.ones(1, 3, 3, 3, dtype=torch.bool)), "do not divide into cells"),
    (lambda: small_jepa()(torch.zeros(1, 1, 24, 24, 24), torch.ones(1, 6, 6, 6, dtype=torch.bool)), "give 1728 tokens"),
    (lambda: jepa.collapse(torch.zeros(1, 8, 4)), "at least 2"),
    (lambda: jepa.hist_kl(torch.zeros(2, 8), torch.zeros(2, 9)), "want one shape"),
    (lambda: jepa.hist_kl(torch.zeros(2, 8), torch.zeros(2, 8), 0), "both must be positive"),
    (lambda: jepa.hist_kl(torch.zeros(2, 8), torch.zeros(2, 8), 8, -1), "both must be positive"),
    (lambda: jepa.composite_loss(torch.zeros(2, 8), torch.zeros(2, 8), 1.5), "must lie in 0..1")])
def test_wrong_values_are_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
