"""Tests of volume.py: grey scale, crops, rotations and tiles."""

import itertools
import math

import numpy as np
import pytest
import torch

import augment
import volume


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_rotation(seed):
    return augment.random_rotation(torch.Generator().manual_seed(seed))


# ---- Grey scale


def test_normalise_is_equation_1_and_denormalise_its_inverse_but_for_clipping():
    x = random(30, 31, 32)
    values = x.double().numpy()
    top = np.percentile(values, 99.9)
    expected = (np.clip(values, 0, top) / top - 0.04) / 0.09

    y, scale = volume.normalise(x, 0.04, 0.09, percentile=99.9)
    assert scale.maximum == pytest.approx(top, rel=1e-6)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    clipped = x.clamp(0, scale.maximum)
    torch.testing.assert_close(volume.denormalise(y, scale), clipped, rtol=0, atol=1e-5)


def test_literal_percentiles_are_numpys_and_come_back_but_for_clipping():
    x = random(30, 31, 32) + 3
    bottom, top = np.percentile(x.double().numpy(), volume.LITERAL)
    low, high = volume.LITERAL
    y, scale = volume.normalise(x, 0, 1, high, low=low)
    expected = (np.clip(x.double().numpy(), bottom, top) - bottom) / (top - bottom)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    clipped = x.clamp(bottom, top)
    torch.testing.assert_close(volume.denormalise(y, scale), clipped, rtol=0, atol=1e-5)


def test_percentiles_that_are_equal_have_no_scale():
    x = torch.ones(10, 10, 10)
    with pytest.raises(ValueError, match="1.0 percentile is 1, and its maximum is no larger"):
        volume.normalise(x, 0, 1, 99.0, low=1.0)


@pytest.mark.parametrize("percentile", [0, 50, 99.999, 100])
def test_the_maximum_is_numpys_percentile(percentile):
    x = random(30, 31, 32) + 10
    _, scale = volume.normalise(x, 0, 1, percentile=percentile)
    assert scale.maximum == pytest.approx(np.percentile(x.numpy(), percentile), rel=1e-6)


def test_a_map_without_positive_density_has_no_network_scale():
    with pytest.raises(ValueError, match="must be positive"):
        volume.normalise(-random(30, 31, 32).abs(), 0.04, 0.09)


def blob(box=32, noise=0.1, seed=0):
    """A Gaussian of height 1 in noise: (box, box, box)."""
    i = torch.arange(box) - box / 2
    g = torch.exp(-(i**2) / 18)
    return g[:, None, None] * g[:, None] * g + noise * random(box, box, box, seed=seed)


@pytest.mark.parametrize("noise", [0, 0.03, 0.1, 0.2])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("background", [0.5, -3, 105])
def test_background_and_sign_of_a_noisy_map_are_found(noise, sign, background):
    grey = volume.find_grey_scale(sign * blob(noise=noise) + background)
    assert grey.background == pytest.approx(background, abs=0.025)
    assert (grey.sign, grey.unclear) == (sign, False)
    assert len(grey.notes) == (2 if sign < 0 else 1)


def test_a_map_with_background_near_0_is_left_as_it_is():
    x = blob()
    grey = volume.find_grey_scale(x)
    assert grey.to_work(x) is x and grey.to_map(x) is x and not grey.notes


def test_a_masked_map_has_exactly_the_background_outside_of_its_mask():
    x = blob(noise=0.1)
    x[:, :, :18] = 7.25
    assert volume.find_background(x) == 7.25


def test_work_scale_and_back_is_the_map():
    x = 105 - 20 * blob()
    grey = volume.find_grey_scale(x)
    torch.testing.assert_close(grey.to_map(grey.to_work(x)), x)
    assert grey.to_work(x).argmax() == x.argmin()


def test_noise_alone_has_no_sign_unless_it_is_given():
    x = random(32, 32, 32)
    assert volume.find_grey_scale(x).unclear
    assert volume.find_grey_scale(x, invert=True).sign == -1
    assert not volume.find_grey_scale(x, invert=False).unclear
    assert volume.find_grey_scale(x, background=2.0).background == 2
    assert "as given" in volume.find_grey_scale(x, background=2.0).notes[0]


def test_a_constant_map_has_no_sign():
    for background in (2.0, 0.0):
        assert volume.find_sign(torch.full((8, 8, 8), 2.0), background) == 0


def test_training_maps_lose_background_and_sign():
    x = blob(noise=0.02)
    want, _ = volume.cube(x)
    found, statistics = volume.cube(40 - 8 * x)
    assert (found.float() - want.float()).abs().max() < 0.02
    assert statistics["background"] == pytest.approx(40, abs=0.1)
    assert statistics["sign"] == -1


def test_what_is_no_density_above_a_background_is_not_trained_on():
    # A tomogram: as much above its background as below, everywhere.
    tomogram = (105 + 25 * random(32, 32, 32)).round().clamp(0, 255)
    # A local-resolution map: flat, far from 0, with other values in a few places.
    local = torch.full((32, 32, 32), 8.0)
    local[12:16, 12:16, 12:16] = 3 + 8 * torch.rand(4, 4, 4, generator=torch.manual_seed(0))
    # A tomogram with a dark and a bright particle in it, which has a sign.
    particles = 100 * blob(noise=0) - 80 * blob(noise=0).roll(16, 0) + 12 * random(32, 32, 32)
    assert not volume.find_grey_scale(particles).unclear
    for x in (tomogram, local, particles):
        with pytest.raises(ValueError, match="full of density"):
            volume.cube(x)


def test_the_density_mask_is_all_within_three_voxels_of_density():
    density = (random(12, 13, 14).abs() > 2.9).float() * 0.2 + 0.05
    mask = volume.density_mask(density)
    above = (density > 0.1).nonzero()
    assert 1 <= len(above) <= 20
    for voxel in itertools.product(range(12), range(13), range(14)):
        distances = (above - torch.tensor(voxel)).abs().max(1).values
        assert mask[voxel] == (distances.min() <= 3)


# ---- Crops


@pytest.mark.parametrize("n, box", [(4, 7), (4, 8), (5, 7), (5, 8)])
def test_center_crop_and_pad_keep_the_middle_and_undo_each_other(n, box):
    x = random(2, n, n, n)
    padded = volume.pad(x, box, value=-1.5)
    assert padded.shape[-3:] == (box, box, box)
    assert (padded == -1.5).sum() == 2 * (box**3 - n**3)
    new, old = box // 2, n // 2
    assert torch.equal(padded[:, new, new, new], x[:, old, old, old])
    assert torch.equal(volume.center_crop(padded, n), x)


def test_pad_lengthens_only_sides_that_are_too_short():
    x = random(3, 9, 6)
    padded = volume.pad(x, 6)
    assert padded.shape == (6, 9, 6)
    assert torch.equal(padded[2:5], x)
    with pytest.raises(ValueError, match="pad it first"):
        volume.center_crop(x, 6)


# ---- Rotations


def test_rotate_samples_the_map_at_R_r():
    """On a linear field trilinear interpolation is exact: out(r) = slope . R r inside the box."""
    shape = (9, 12, 11)
    slope = torch.tensor([0.3, -0.7, 0.5])  # along x, y, z
    centred = [torch.arange(n) - (n - 1) / 2 for n in shape]
    z, y, x = torch.meshgrid(*centred, indexing="ij")
    r = torch.stack((x, y, z), -1)
    R = some_rotation(3)
    turned = r @ R.T
    inside = (turned.abs() <= (torch.tensor(shape[::-1]) - 1) / 2).all(-1)
    assert 0.2 < inside.float().mean() < 0.9

    out = volume.rotate((r @ slope).expand(2, 1, *shape), R)
    expected = (turned @ slope).expand(2, 1, *shape)
    torch.testing.assert_close(out[..., inside], expected[..., inside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("cubic", [False, True])
def test_a_batch_is_turned_map_by_map_and_a_box_is_the_middle_of_the_result(cubic):
    x = random(3, 2, 13, 13, 13)
    R = torch.stack([some_rotation(seed) for seed in range(3)])
    full = torch.stack([volume.rotate(a, b, cubic=cubic) for a, b in zip(x, R)])
    middle = full[..., 3:10, 3:10, 3:10]
    torch.testing.assert_close(volume.rotate(x, R, cubic=cubic), full, rtol=0, atol=1e-5)
    torch.testing.assert_close(volume.rotate(x, R, box=7, cubic=cubic), middle, rtol=0, atol=1e-5)


def b_spline(x):
    """The cubic B-spline, defined by pieces: Unser 1999, eq. 4."""
    x = x.abs()
    inner = 2 / 3 - x**2 + x**3 / 2
    outer = (2 - x) ** 3 / 6
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


def test_cubic_rotation_equals_the_direct_sum_over_all_splines():
    shape = (6, 8, 7)
    R = some_rotation(1).double()
    x = random(*shape, dtype=torch.float64)

    # Coefficients c with sum_j c_j B(i - j) = x_i on every axis.
    i = [torch.arange(n, dtype=torch.float64) for n in shape]
    inverse = [torch.linalg.inv(b_spline(k - k[:, None])) for k in i]
    c = torch.einsum("ai,bj,ck,ijk->abc", *inverse, x)

    # Places R r, about the middle of the box, and every spline at every place.
    centred = [k - (n - 1) / 2 for k, n in zip(i, shape)]
    grid = torch.stack(torch.meshgrid(*centred, indexing="ij")[::-1], -1)  # x, y, z
    middle = torch.tensor([(n - 1) / 2 for n in shape])
    place = ((grid @ R.T).flip(-1) + middle).view(-1, 3)  # z, y, x
    taps = [b_spline(place[:, axis, None] - i[axis]) for axis in range(3)]
    expected = torch.einsum("pa,pb,pc,abc->p", *taps, c).view(shape)
    torch.testing.assert_close(volume.rotate(x, R, cubic=True), expected, rtol=0, atol=1e-12)


def test_cubic_interpolation_goes_through_the_voxels():
    x = random(6, 8, 7, dtype=torch.float64)
    same = volume.rotate(x, torch.eye(3), cubic=True)
    torch.testing.assert_close(same, x, rtol=0, atol=1e-12)


# ---- Tiles


@pytest.mark.parametrize(
    "shape, tile, stride", [((13, 17, 10), 8, 5), ((8, 8, 8), 8, 3), ((16, 9, 11), 4, 4)]
)
def test_tiles_blend_back_to_the_map_they_came_from(shape, tile, stride):
    x = random(2, *shape)
    corners = volume.tile_starts(shape, tile, stride)
    assert len(set(corners)) == len(corners)
    assert len(corners) == math.prod(math.ceil((n - tile) / stride) + 1 for n in shape)
    tiles = volume.cut_tiles(x, corners, tile)
    for given in (tiles, iter(tiles)):
        blended = volume.blend_tiles(given, corners, shape)
        torch.testing.assert_close(blended, x, rtol=0, atol=2e-6)


def test_blending_is_the_weighted_mean_of_every_tile_over_a_voxel():
    corners = volume.tile_starts((7, 6, 5), 4, 2)
    tiles = random(len(corners), 4, 4, 4)
    window = volume.gaussian_window(4)
    blended = volume.blend_tiles(tiles, corners, (7, 6, 5))
    for voxel in itertools.product(range(7), range(6), range(5)):
        total = weight = 0
        for tile, corner in zip(tiles, corners):
            inner = tuple(v - c for v, c in zip(voxel, corner))
            if all(0 <= a < 4 for a in inner):
                total += float(window[inner] * tile[inner])
                weight += float(window[inner])
        assert float(blended[voxel]) == pytest.approx(total / weight, abs=1e-6)


def test_the_blending_window_is_a_gaussian_between_1_and_3():
    w = volume.gaussian_window(9)
    assert w[4, 4, 4] == 3
    assert w[0, 0, 8] == 1

    def gaussian(z, y, x):
        distance = (z - 4) ** 2 + (y - 4) ** 2 + (x - 4) ** 2
        return math.exp(-distance / (2 * 2.25**2))

    low = gaussian(0, 0, 0)
    expected = 1 + 2 * (gaussian(3, 6, 5) - low) / (1 - low)
    assert float(w[3, 6, 5]) == pytest.approx(expected, rel=1e-6)


def test_tiles_that_cannot_cover_the_box_are_refused():
    with pytest.raises(ValueError, match="cannot cover"):
        volume.tile_starts((20, 64, 64), 32, 16)
    with pytest.raises(ValueError, match="cannot cover"):
        volume.tile_starts((64, 64, 64), 32, 33)


# ---- Masks


def test_a_mask_is_0_to_1_but_for_rounding_and_not_empty():
    mask = torch.tensor([0, 0.25, 1]).view(1, 1, 3)
    same, notes = volume.soft_mask(mask, "m.mrc")
    assert same is mask and notes == []

    clamped, notes = volume.soft_mask(mask * 1.00002 - 1e-5, "m.mrc")
    assert (clamped.min(), clamped.max()) == (0, 1)
    torch.testing.assert_close(clamped, mask, rtol=0, atol=2e-5)
    assert notes == ["m.mrc: values leave 0 to 1 by up to 1e-05, as rounding does; clamped"]

    for bad in (2 * mask, mask - 0.1, mask * math.nan):
        with pytest.raises(ValueError, match="m.mrc: values from .*; a mask is 0 to 1"):
            volume.soft_mask(bad, "m.mrc")
    for empty in (0 * mask, 0 * mask - 1e-6):
        with pytest.raises(ValueError, match="m.mrc: 0 everywhere"):
            volume.soft_mask(empty, "m.mrc")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("thickness", [1, 2])
def test_the_sign_of_a_map_of_one_or_two_slices_is_found(sign, thickness):
    slab = torch.zeros(thickness, 16, 16)
    slab[:, 6:9, 6:9] = sign
    assert volume.find_sign(slab, 0.0) == sign
