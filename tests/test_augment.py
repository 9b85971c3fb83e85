"""Tests of augment.py: random crops and orientations are the right ones, all equally likely."""

import itertools
import math

import numpy as np
import pytest
import torch

import augment
import degrade
import fourier
import volume


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def first_draws(seed, items):
    return [float(torch.rand((), generator=augment.item_generator(seed, i))) for i in items]


def test_splitmix64_gives_the_published_numbers():
    # The first outputs of Vigna's splitmix64.c from state 0, which adds its constant each time.
    step = 0x9E3779B97F4A7C15
    got = [augment.splitmix64(n * step) for n in range(3)]
    assert got == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_items_of_small_numbers_have_the_streams_of_earlier_versions():
    # Maps that were sampled with a seed can be drawn again.
    for seed, i in ((0, 0), (1, 7), (5, 1_000_002)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        assert first_draws(seed, [i]) == [float(torch.rand((), generator=generator))]


def test_a_large_item_number_does_not_repeat_the_items_of_the_next_seed():
    beyond = first_draws(0, range(1_000_003, 1_000_203))
    assert not set(beyond) & set(first_draws(1, range(200)))
    assert len(set(beyond)) == 200


@pytest.mark.parametrize("seed", [0, 1, 4294, 10**18])
def test_training_never_meets_the_streams_of_the_held_out_items(seed):
    # Offsets of the streams from the seed's first one, on the circle of 2^32.
    def offsets(of_seed):
        items = [*range(5), 1_000_002, *range(1_000_003, 1_002_000), 2**40, 2**62]
        starts = [augment.item_generator(of_seed, i).initial_seed() for i in items]
        return [(start - seed * 1_000_003) % 2**32 for start in starts]

    assert max(offsets(seed)) < 2**31 <= min(offsets(seed + augment.HELD_OUT))


def test_random_crops_reach_every_position_and_nothing_else(rng):
    x = torch.arange(3 * 4 * 5).view(3, 4, 5)
    corners = {int(augment.random_crop(x, 3, rng)[0, 0, 0]) for _ in range(100)}
    assert corners == {5 * y + x for y in range(2) for x in range(3)}


def test_the_random_crop_is_centred_on_a_voxel_of_the_mask(rng):
    x = torch.arange(20**3).view(20, 20, 20)
    mask = torch.zeros(20, 20, 20, dtype=torch.bool)
    mask[5, 10, 14] = mask[10, 10, 10] = mask[0, 19, 3] = True
    middles = {int(augment.random_crop(x, 6, rng, mask)[3, 3, 3]) for _ in range(60)}
    moved_inside = x[3, 17, 3]
    assert middles == {int(x[5, 10, 14]), int(x[10, 10, 10]), int(moved_inside)}
    with pytest.raises(ValueError, match="threshold"):
        augment.random_crop(x, 6, rng, mask & False)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_window_is_the_map_around_a_voxel_with_0_outside(kind):
    x = random(5, 6, 7).numpy().astype(kind)
    padded = np.pad(x, 10)
    for centre in itertools.product((0, 2, 4), (0, 3, 5), (0, 3, 6)):
        for side in (1, 4, 9):
            corner = [c + 10 - side // 2 for c in centre]
            expected = padded[tuple(slice(k, k + side) for k in corner)]
            found = augment.window(x, centre, side).numpy()
            assert found.dtype == kind
            np.testing.assert_array_equal(found, expected)


def test_rot24_draws_all_rotations_of_the_cube_and_no_reflection(rng):
    x = random(5, 5, 5)
    orders = itertools.permutations(range(3))
    signs = list(itertools.product((1, -1), repeat=3))
    matrices = [np.eye(3)[list(order)] * sign for order in orders for sign in signs]
    matrices = [torch.tensor(m, dtype=torch.float32) for m in matrices if np.linalg.det(m) > 0]
    turned = torch.stack([volume.rotate(x, matrix) for matrix in matrices])
    assert len(turned) == 24

    seen = set()
    for _ in range(200):
        distance = (augment.rot24(x, rng) - turned).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5
        seen.add(int(distance.argmin()))
    assert len(seen) == 24
    assert augment.rot24(random(2, 1, 4, 4, 4), rng).shape == (2, 1, 4, 4, 4)


def test_random_rotations_are_uniform_over_SO3(rng):
    R = torch.stack([augment.random_rotation(rng) for _ in range(4000)]).double()
    identity = torch.eye(3, dtype=R.dtype).expand_as(R)
    torch.testing.assert_close(R @ R.mT, identity, rtol=0, atol=1e-6)
    assert torch.linalg.det(R).min() > 0.999

    # Uniform: the angle has the distribution (a - sin a) / pi, and R times any fixed rotation too.
    fixed = augment.random_rotation(rng).double()
    for sample in (R, R @ fixed):
        trace = sample.diagonal(dim1=1, dim2=2).sum(1)
        angle = torch.acos(((trace - 1) / 2).clamp(-1, 1)).sort().values
        expected = (angle - angle.sin()) / math.pi
        gap = (expected - torch.arange(4000) / 4000).abs().max()
        assert gap < 1.63 / 4000**0.5  # Kolmogorov, 1 %


def test_flips_are_all_eight_and_keep_the_missing_wedge_in_its_place(rng):
    # What a tilt range of 50 degrees does not measure holds nothing, before and after.
    shape = (8, 10, 12)
    measured = fourier.hermitian_part(degrade.wedge_mask(shape, (-50, 50)))
    x = fourier.apply_fourier(random(*shape), measured)
    seen = set()
    for _ in range(100):
        y = augment.flip(x, rng)
        seen.add(tuple(y.flatten().tolist()))
        power = torch.fft.fftn(y).abs().square()
        assert power[~measured].sum() < 1e-9 * power.sum()
    assert len(seen) == 8
