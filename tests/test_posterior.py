"""What posterior.py promises: the data term, the tiled prior, samplers."""

import functools
import math

import pytest
import torch
from made_maps import close, fft, filtered, molecule, oracle, prior_of, random, rng, wedge
from torch import nn

import augment
import degrade
import fourier
import posterior
import volume
from posterior import Observation

SHAPE = (8, 8, 8)
EVERYWHERE = torch.ones(SHAPE, dtype=torch.bool)

# ---- The data term


@pytest.mark.parametrize("shape", [(8, 10, 12), (9, 7, 11)])
@pytest.mark.parametrize("tilt_range", [(-60, 60), (-40, 60)])
def test_put_back_takes_measured_coefficients_from_y_and_others_from_x(shape, tilt_range):
    x, y, measured = random(shape, 1), random(shape, 2), wedge(shape, tilt_range)
    once = fourier.put_back(x, y, measured)
    assert close(fft(once), torch.where(measured, fft(y), fft(x)))
    assert close(fourier.put_back(once, y, measured), once)
    quarter = fft(fourier.put_back(x, y, 0.25 * measured))
    assert close(quarter, torch.where(measured, 0.75 * fft(x) + 0.25 * fft(y), fft(x)))


@pytest.mark.parametrize("sigma", [0.03, 0.1])
def test_the_noise_of_a_simulated_molecule_is_estimated_within_15_percent(sigma):
    shape = (48, 48, 48)
    y = filtered(molecule(shape, atom_count=500) + sigma * random(shape, 1), wedge(shape))
    assert posterior.estimate_noise(y, wedge(shape)) == pytest.approx(sigma, rel=0.15)


def test_noise_without_a_measured_corner_is_refused_with_the_flag_that_gives_it():
    shape = (16, 16, 16)
    y = random(shape)
    inside = fourier.wavenumber(shape) <= 0.5
    with pytest.raises(ValueError, match="beyond Nyquist.*give --noise"):
        posterior.estimate_noise(y, inside)

    # One pair of coefficients beyond it is enough for a number.
    inside[8, 8, 7] = inside[8, 8, 9] = True
    assert posterior.estimate_noise(y, inside) > 0


# ---- The prior, by tiles


@pytest.mark.parametrize("shape", [SHAPE, (16, 8, 24), (9, 13, 20), (5, 8, 11), (3, 2, 7)])
def test_a_local_velocity_does_not_depend_on_the_tiles(shape):
    prior = prior_of(Local(), 8)
    x = random(shape)
    for seed in range(4):
        velocity = posterior.tiled_velocity(prior, x[None], 0.3, [rng(seed)])[0]
        assert close(velocity, 3 * x + 0.3, 1e-6)


class Local(nn.Module):
    def forward(self, x, t):
        return 3 * x + t[:, None, None, None, None]


def test_tiles_are_turned_back_as_they_were_turned():
    # Rolling a tile along its own axes tells all 48 orientations apart once it is turned back, and
    # only the 24 of determinant +1 may occur. One periodic tile is the whole map.
    prior = prior_of(lambda x, t: x.roll(1, -3) + 2 * x.roll(1, -2) + 4 * x.roll(1, -1), 4)
    x = random((4, 4, 4))
    wanted = []
    for order, signs in volume.ROTATIONS_24:
        rolled = [2**i * x.roll(signs[i], order[i]) for i in range(3)]
        wanted.append(sum(rolled))
    seen = set()
    for seed in range(200):
        velocity = posterior.tiled_velocity(prior, x[None], 0.5, [rng(seed)])[0]
        distance = (velocity - torch.stack(wanted)).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5
        seen.add(int(distance.argmin()))
    assert len(seen) == 24


def test_no_seam_between_tiles_stays_in_one_place():
    def faces(x, t):
        """A network that marks the faces of its tile."""
        v = torch.ones_like(x)
        v[..., 1:-1, 1:-1, 1:-1] = 0
        return v

    calls, p = 400, 1 - (6 / 8) ** 3
    prior, x = prior_of(faces, 8), torch.zeros(1, *SHAPE)
    found = [posterior.tiled_velocity(prior, x, 0.5, [rng(seed)])[0] for seed in range(calls)]
    standard_error = math.sqrt(p * (1 - p) / calls)
    assert (sum(found) / calls - p).abs().max() < 5 * standard_error


def tile_seen(x, box, t=0.0, seed=0, **settings):
    """The only tile that a network of this box is shown of a map x (D, H, W)."""
    seen = []

    def network(tiles, t):
        seen.append(tiles)
        return tiles

    prior = prior_of(network, box, mean=0.05, std=0.1)  # solvent is -0.5
    velocity = posterior.tiled_velocity(prior, x[None], t, [rng(seed)], **settings)[0]
    assert torch.equal(velocity, x)  # cut out again where it was put in
    (tiles,) = seen
    return tiles[0, 0]


def test_a_map_smaller_than_the_box_has_solvent_around_it_and_no_copies_of_itself():
    x = 1 + random((5, 6, 7)).abs()
    places = set()
    for seed in range(50):
        tile = tile_seen(x, 8, seed=seed)
        assert torch.equal(tile[tile != -0.5].sort().values, x.flatten().sort().values)
        # In one piece: the cuboid that encloses it is as large as the map.
        where = (tile != -0.5).nonzero()
        sides = where.amax(0) - where.amin(0) + 1
        assert sorted(sides.tolist()) == [5, 6, 7]
        places.add(tuple(where.amin(0).tolist()))
    assert len(places) > 10  # at a random place
    around = tile_seen(torch.zeros(2, 2, 2), 32, t=0.5)
    assert float(around.mean()) == pytest.approx(-0.25, abs=0.02)
    assert float(around.std()) == pytest.approx(0.5, abs=0.02)


def test_without_turns_a_map_that_fits_is_seen_as_it_is():
    x = random((8, 8, 8))
    assert torch.equal(tile_seen(x, 8, turned=False), x)
    assert not torch.equal(tile_seen(x, 8, turned=True), x)
    small = tile_seen(x, 10, turned=False)
    assert torch.equal(small[1:9, 1:9, 1:9], x)  # voxel 4 of 8 is voxel 5 of 10


@pytest.mark.parametrize("settings", [posterior.WEDGE["paper"], posterior.DENOISE["paper"]])
def test_the_papers_methods_do_not_turn_maps(settings):
    seen = []

    def network(tiles, t):
        seen.append(tiles)
        return 0 * tiles

    x, prior = random(SHAPE), prior_of(network, 8)
    observation = Observation(x, EVERYWHERE, torch.tensor(0.1), x)
    settings = settings | {"steps": 1}
    list(posterior.draw_samples(prior, observation, settings, samples=1, seed=3))
    noise = torch.randn(SHAPE, generator=augment.item_generator(3, 0))
    assert torch.equal(seen[0][0, 0], noise)


# ---- The samplers, with velocities in closed form


def parity_velocity(states):
    """The velocity that the reference was run with; it records what it is asked."""

    def velocity(prior, x, t, generators, turned):
        states.append(x.detach()[0])
        return 0.8 * x - 1.5 * torch.tanh(x) * (1 - t) + 0.3 * t

    return velocity


def test_algorithm_2_goes_through_the_states_of_the_reference(monkeypatch):
    f, states = oracle("parity/posterior_sampling.npz"), []
    monkeypatch.setattr(posterior, "tiled_velocity", parity_velocity(states))
    monkeypatch.setattr(torch, "randn", lambda *a, **k: f["x1"])  # the reference's first noise
    y = (f["y_wedge"] - f["z_mean"].float()) / f["z_std"].float()
    measured = wedge(SHAPE, tilt_axis="z")
    assert torch.equal(measured, torch.fft.ifftshift(f["mask"]))
    observation = Observation(y, measured, 0.0, torch.zeros_like(y))
    settings = posterior.WEDGE["paper"] | {"steps": 20}
    last = posterior.sample_posterior(prior_of(None, 8), observation, [rng()], **settings)[0]
    assert close(torch.stack(states[1:] + [last]), f["inpaint_x"])


@pytest.mark.parametrize("operator_noise", [False, True])
def test_algorithm_1_goes_through_the_states_of_the_reference(monkeypatch, operator_noise):
    f, states = oracle("parity/posterior_sampling.npz"), []
    roll = torch.fft.ifftshift  # the reference's middle voxel and frequency, to ours
    drawn = iter([roll(f["x1"]), *[roll(noise) for noise in f["op_noise"]]])
    monkeypatch.setattr(posterior, "tiled_velocity", parity_velocity(states))
    monkeypatch.setattr(torch, "randn", lambda *a, **k: next(drawn))
    std = f["z_std"].float()
    y = roll((f["y_noisy"] - f["z_mean"].float()) / std)
    sigma = (roll(f["noise_power"]) / 512).sqrt() / std
    observation = Observation(y, EVERYWHERE, sigma, y)
    last = posterior.algorithm_1(
        prior_of(None, 8), observation, [rng()], steps=20, operator_noise=operator_noise
    )[0]
    wanted = f["denoise_with_op_noise_x" if operator_noise else "denoise_no_op_noise_x"]
    wanted = torch.stack([roll(x) for x in wanted])
    assert close(torch.stack(states[1:] + [last]), wanted, 1e-4)  # 20 normalised gradients


def test_per_time_makes_the_weight_of_the_observation_independent_of_the_steps(monkeypatch):
    monkeypatch.setattr(posterior, "tiled_velocity", lambda prior, x, *_, **__: 0 * x)
    observation = Observation(random(SHAPE, 3), EVERYWHERE, torch.tensor(9.0), random(SHAPE, 3))

    def moved(steps, per_time):
        x = posterior.algorithm_1(
            prior_of(None, 8), observation, [rng()], steps=steps, lambda_max=0.01, per_time=per_time
        )
        return float((x[0] - random(SHAPE)).norm())

    assert moved(50, True) == pytest.approx(moved(200, True), rel=0.05)
    assert moved(200, False) == pytest.approx(4 * moved(50, False), rel=0.05)  # as printed


@pytest.fixture
def gaussian(monkeypatch):
    """x_0 ~ N(mean, power per coefficient); its velocity in place of the network's."""
    k2 = fourier.wavenumber(SHAPE).float() ** 2
    power = 0.5 + 2 * torch.exp(-8 * k2)
    mean = filtered(random(SHAPE, 3), 2 * torch.exp(-10 * k2))

    def velocity(prior, x, t, *_, **__):
        weight = (1 - t) * power / ((1 - t) ** 2 * power + t**2)
        expected = mean + filtered(x - (1 - t) * mean, weight)  # E[x_0 | x_t]
        return (x - expected) / t

    monkeypatch.setattr(posterior, "tiled_velocity", velocity)
    return mean, power


def gaussian_samples(y, measured, count, sigma=0.0, **settings):
    generators = [rng(i) for i in range(count)]
    observation = Observation(y, measured, sigma, y)
    return posterior.sample_posterior(
        prior_of(None, 8), observation, generators, steps=40, t_start=1.0, **settings
    )


def squared_error(x, truth, region=EVERYWHERE):
    return float(fft(x - truth)[region].abs().square().sum())


@pytest.mark.parametrize("fresh_noise", [False, True])
def test_samples_hold_what_was_measured_and_follow_the_prior_elsewhere(gaussian, fresh_noise):
    mean, power = gaussian
    measured, n = wedge(SHAPE), 48
    y = filtered(mean + filtered(random(SHAPE, 5), power.sqrt()), measured)
    samples = gaussian_samples(y, measured, n, fresh_noise=fresh_noise)
    assert close(fft(samples)[:, measured], fft(y)[measured].expand(n, -1))

    # Coefficients are independent under this prior: the mean of a missing one is the prior's.
    variance = 512 * power[~measured]  # of an unnormalised coefficient
    chi2 = (fft(samples.mean(0) - mean)[~measured].abs() ** 2 / (variance / n)).mean()
    assert chi2 < 1 + 5 * math.sqrt(2 / len(variance))  # real degrees of freedom: one each
    if not fresh_noise:  # the ODE keeps the spread, fresh noise narrows it
        deviation = fft(samples - samples.mean(0))[:, ~measured]
        spread = (deviation.abs() ** 2).sum(0) / (n - 1) / variance
        assert 0.85 < spread.mean() < 1.1  # exact as steps -> infinity


@pytest.mark.parametrize("fresh_noise", [False, True])
def test_the_posterior_mean_takes_noise_out_of_measured_coefficients(gaussian, fresh_noise):
    mean, power = gaussian
    measured, sigma = wedge(SHAPE), 1.0
    truth = mean + filtered(random(SHAPE, 5), power.sqrt())
    y = filtered(truth + sigma * random(SHAPE, 6), measured)
    exact = mean + filtered(y - mean, power / (power + sigma**2))
    restored = gaussian_samples(y, measured, 24, sigma, fresh_noise=fresh_noise).mean(0)
    error = functools.partial(squared_error, truth=truth, region=measured)
    assert error(restored) < 1.6 * error(exact) < 0.75 * error(y)


def test_trust_in_a_coefficient_follows_its_noise(gaussian):
    mean, power = gaussian
    truth = mean + filtered(random(SHAPE, 5), power.sqrt())
    sigma = torch.where(wedge(SHAPE), 0.3, 3.0)
    y = truth + filtered(random(SHAPE, 6), sigma)
    exact = mean + filtered(y - mean, power / (power + sigma**2))
    anisotropic = gaussian_samples(y, EVERYWHERE, 24, sigma).mean(0)
    isotropic = gaussian_samples(y, EVERYWHERE, 24, sigma.square().mean().sqrt()).mean(0)
    assert squared_error(anisotropic, truth) < 1.6 * squared_error(exact, truth)
    assert squared_error(anisotropic, truth) < 0.7 * squared_error(isotropic, truth)


def test_a_map_that_the_prior_finds_impossible_is_believed_where_its_noise_is_small(
    gaussian, monkeypatch
):
    mean, power = gaussian
    shell = degrade.noise_shells(SHAPE)
    unlikely = torch.where(shell == 1, 10.0, 1.0) * power.sqrt()
    truth = mean + filtered(random(SHAPE, 5), unlikely)
    sigma = torch.full(SHAPE, 0.5)
    y = truth + filtered(random(SHAPE, 6), sigma)

    def error():  # in noise powers
        x = gaussian_samples(y, EVERYWHERE, 8, sigma).mean(0)
        return squared_error(x, truth, shell == 1) / (shell == 1).sum() / 512 / 0.25

    assert error() < 3
    nothing = torch.zeros(1, *fourier.stored_half(truth).shape)
    monkeypatch.setattr(posterior, "Missed", lambda *_: lambda x: nothing.clone())
    assert error() > 10


def test_least_rho_copies_as_much_noise_as_it_is_told_to():
    times = torch.linspace(0.5, 0, 41)[:-1]
    ratio = times / (1 - times)  # r
    white = torch.tensor(0.3)
    rho = functools.partial(posterior.least_rho, r=ratio)
    assert rho(white, EVERYWHERE, leak=1) == pytest.approx(0.5, rel=0.01)  # 1 / (4 rho) = rho
    assert rho(white, EVERYWHERE, leak=1 / 8) == 1  # never more
    half = EVERYWHERE.clone()
    half[4:] = False  # half the noise: 1 / (8 rho)
    assert rho(white, half, leak=1) == pytest.approx(8**-0.5, rel=0.01)

    # Where most coefficients are hopeless the others are trusted more.
    few = torch.where(wedge(SHAPE), 50.0, 0.3)
    found = rho(few, EVERYWHERE, leak=1 / 8)
    variance, r2 = few.double() ** 2, ratio.double()[:, None, None, None] ** 2
    trust = r2 / (r2 + found * variance)
    copied = (trust**2 * variance / r2).mean((1, 2, 3))
    assert float(copied.max()) == pytest.approx(found / 8, rel=0.01)
    assert found < 1


def test_missed_is_the_error_that_y_shows_beyond_its_noise():
    shape = (16, 16, 16)
    truth, measured = random((2, *shape), 1) * 3, wedge(shape)
    shell = degrade.noise_shells(shape)
    half = fourier.stored_half(shell)
    sigma = torch.where(shell == 3, 9.0, 0.5)  # as good as nothing is known of shell 3
    size = torch.where((shell == 3) | (shell == 5), 2.0, 0.1)
    error = filtered(random((2, *shape), 2), size)
    y = truth[0] + filtered(random(shape, 3), sigma) + filtered(random(shape, 4) * 99, ~measured)
    missed = posterior.Missed(y, *map(fourier.stored_half, (measured, sigma**2)))
    found = missed(truth[:1] + error[:1])
    assert found.shape == (1, *half.shape)
    assert float(found[0][half == 5].mean()) == pytest.approx(4, rel=0.2)  # 2^2, noise is 0.25
    # 0.01 in 0.25, or 4 in 81, may be chance. Shell 0 is one number.
    assert not found[0][(half != 5) & (half > 0)].any()
    two = missed(truth[0] + error)
    assert close(two[0], found[0])
    assert not close(two[1], found[0], 1e-2)  # each sample has its own


class Blur(nn.Module):
    """A small network in float32, whatever autocast says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 1, 3, padding=1).requires_grad_(False)

    def forward(self, x, t):
        with torch.autocast("cpu", enabled=False):
            return self.conv(x) + t[:, None, None, None, None]


def as_it_is(y, *_):
    return y


def positive(y, *_):
    return y.relu()


@pytest.mark.parametrize("settings", [posterior.DENOISE["prior"], posterior.DENOISE["paper"]])
def test_samples_drawn_together_equal_samples_drawn_one_by_one(settings):
    prior, y = prior_of(Blur(), 6), random((9, 8, 7)).abs()
    everywhere = torch.ones(y.shape, dtype=torch.bool)
    observation = posterior.observe(prior, y, everywhere, torch.tensor(0.3), as_it_is)
    draw = functools.partial(
        posterior.draw_samples, prior, observation, settings | {"steps": 3}, samples=5, seed=1
    )
    together, alone = (torch.stack(list(draw(samples_per_call=n))) for n in (4, 1))
    assert close(together, alone)
    assert not close(together[0], together[1], 1e-2)


def test_an_observation_goes_to_network_scale_and_back():
    prior, y = prior_of(Blur(), 8), random(SHAPE)
    start = y.clamp(min=0)
    observation = posterior.observe(prior, y, EVERYWHERE, torch.tensor(0.3), positive)
    assert close(observation.to_map(observation.y), y)
    scale = volume.normalise(start, prior.mean, prior.std)[1]
    assert observation.scale == scale
    assert float(observation.sigma) == pytest.approx(0.3 / scale.maximum / prior.std)


def test_algorithm_1_refuses_an_observation_without_noise():
    one_shell = torch.ones(SHAPE)
    one_shell[0, 0, 1] = 0
    for sigma in (0.0, one_shell):
        observation = Observation(random(SHAPE), EVERYWHERE, sigma, random(SHAPE))
        with pytest.raises(ValueError, match="divides by the noise"):
            posterior.algorithm_1(prior_of(None, 8), observation, [rng()], steps=1)


def test_white_noise_of_the_operator_may_be_one_number(monkeypatch):
    monkeypatch.setattr(posterior, "tiled_velocity", lambda prior, x, *_, **__: 0 * x)
    found = []
    for sigma in (0.5, torch.full(SHAPE, 0.5)):
        observation = Observation(random(SHAPE, 3), EVERYWHERE, sigma, random(SHAPE, 3))
        settings = dict(steps=3, operator_noise=True)
        found.append(posterior.algorithm_1(prior_of(None, 8), observation, [rng()], **settings))
    assert torch.equal(*found)


def test_fewer_than_two_samples_have_no_standard_deviation():
    found = posterior.Moments()
    for _ in range(2):
        with pytest.raises(ValueError, match="draw two or more"):
            found.std()
        found.add(torch.ones(SHAPE))
    assert torch.equal(found.std(), torch.zeros(SHAPE))
