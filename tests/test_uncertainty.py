"""Promises of uncertainty.py: predicted errors are as large as the true ones."""

from dataclasses import replace

import pytest
import torch
from made_maps import close

import degrade
import fourier
import posterior
import uncertainty
from checkpoint import Prior
from classical import pocs
from posterior import Moments, Observation

SHAPE = (16, 16, 16)
EVERYWHERE = torch.ones(SHAPE, dtype=torch.bool)


def moments_of(samples: torch.Tensor) -> Moments:
    found = Moments()
    for x in samples:
        found.add(x)
    return found


def made_case(seed: int, weights) -> tuple[Moments, torch.Tensor]:
    """Samples of a density, and a truth whose error has the variance (1)."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.zeros(SHAPE)
    density[4:12, 4:12, 4:12] = torch.rand(8, 8, 8, generator=generator)
    spread = 0.02 + 0.05 * torch.rand(SHAPE, generator=generator)
    samples = density + spread * torch.randn(8, *SHAPE, generator=generator)
    found = moments_of(samples)
    variance = uncertainty.features(found) @ weights
    error = variance.sqrt() * torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    return found, found.mean + error.float()


def test_weights_and_interval_of_gaussian_errors_are_found():
    weights = torch.tensor([0.04, 5e-4, 1e-6], dtype=torch.float64)
    cases = [made_case(seed, weights) for seed in range(6)]
    found, interval = uncertainty.fit([m for m, _ in cases], [truth for _, truth in cases])
    assert interval == pytest.approx(1.645, rel=0.06)  # of a Gaussian

    # In a case that was not fitted, the variance is the true one, in the molecule and outside.
    m, _ = made_case(99, weights)
    ratio = (uncertainty.features(m) @ found) / (uncertainty.features(m) @ weights)
    # 6 x 512 voxels of molecule tell it within sqrt(2 / 3072) = 2.6 %.
    molecule = m.mean > 0.1
    assert float(ratio[molecule].mean()) == pytest.approx(1, abs=0.08)
    assert float(ratio[~molecule].mean()) == pytest.approx(1, abs=0.03)


def test_fit_does_not_depend_on_the_units_of_the_map():
    weights = torch.tensor([0.04, 5e-4, 1e-6], dtype=torch.float64)
    m, truth = made_case(0, weights)
    large = Moments()
    large.count, large.mean, large.square = m.count, 1e4 * m.mean, 1e8 * m.square
    one, z_1 = uncertainty.fit([m], [truth])
    other, z_2 = uncertainty.fit([large], [1e4 * truth])
    assert z_1 == pytest.approx(z_2, rel=1e-3)
    std = (uncertainty.features(m) @ one).sqrt()
    assert close((uncertainty.features(large) @ other).sqrt(), 1e4 * std, 1e-3)


def made_observation(measured: torch.Tensor, sigma) -> Observation:
    shape = measured.shape
    none = torch.zeros(shape)
    scale = posterior.Scale(5.0, 0.1, 0.2)
    return Observation(none, measured, sigma, none, scale, pocs)


def test_reference_is_observed_with_the_noise_and_the_missing_wedge_of_the_map():
    wedge = fourier.hermitian_part(degrade.wedge_mask((32, 32, 32), (-50, 50)))
    observation = made_observation(wedge, torch.tensor(0.3))
    x_0 = torch.randn(SHAPE)
    seen = uncertainty.observe_reference(observation, x_0, seed=1)

    # The density's coefficients in the wedge are 0, and the others are off by the noise.
    density = (seen.y * 0.2 + 0.1).double()
    assert float(fourier.apply_fourier(density, ~seen.measured).abs().max()) < 1e-5
    error = fourier.apply_fourier(seen.y - x_0, seen.measured)
    share = seen.measured.float().mean()
    assert float(error.std()) == pytest.approx(0.3 * float(share.sqrt()), rel=0.05)
    assert float(share) == pytest.approx(float(wedge.float().mean()), abs=0.03)
    assert seen.scale == observation.scale


def test_sharpest_of_the_references_like_the_map_are_restored(monkeypatch):
    # Reference i has density i / 255 everywhere. The nearest 8 in order of their distance.
    crops = torch.arange(12, dtype=torch.uint8)[:, None, None, None].expand(12, *SHAPE)
    prior = Prior(Shrink(), "hdit", 1.5, 16, 0.0, 1.0, "", references=crops)
    observation = made_observation(EVERYWHERE, torch.tensor(0.3))
    observation = replace(observation, nearest=[9, 2, 7, 10, 4, 11, 3, 8])

    restored = []
    observe = uncertainty.observe_reference

    def spy(like, x_0, seed):
        restored.append(round(float(x_0.mean()) * 255))
        return observe(like, x_0, seed)

    monkeypatch.setattr(uncertainty, "observe_reference", spy)
    uncertainty.measure(prior, [observation], posterior.PRIOR | {"steps": 2}, samples=2)
    assert restored == [2, 3, 4, 7]


class Shrink(torch.nn.Module):
    """The exact velocity for density that is Gaussian noise of standard deviation 1."""

    def forward(self, x, t):
        t = t[:, None, None, None, None]
        return x * (t - (1 - t)) / (t**2 + (1 - t) ** 2)


def test_measured_std_is_the_error_of_restored_maps():
    # 12 references of white noise, which is what this prior knows. Its samples have an error.
    generator = torch.Generator().manual_seed(0)
    noise = 0.5 + 0.1 * torch.randn(12, *SHAPE, generator=generator)
    crops = (255 * noise).clamp(0, 255).round().to(torch.uint8)
    prior = Prior(Shrink(), "hdit", 1.5, 16, 0.5, 0.1, "", references=crops)
    sampler = posterior.PRIOR | {"steps": 4, "inner": 0}

    x_0 = torch.randn(SHAPE, generator=generator)
    y = x_0 + 0.7 * torch.randn(SHAPE, generator=generator)
    scale = posterior.Scale(3.0, prior.mean, prior.std)
    observation = Observation(y, EVERYWHERE, torch.tensor(0.7), y, scale, pocs)
    found = uncertainty.measure(prior, [observation], sampler, samples=4)

    drawn = posterior.draw_samples(prior, observation, sampler, samples=4, seed=0)
    m = moments_of(torch.stack(list(drawn)))
    error = (m.mean - observation.to_map(x_0)).square().mean().sqrt()
    std = found.std(m).square().mean().sqrt()
    assert float(error / std) == pytest.approx(1, rel=0.15)
    assert len(found.fsc) == 9 and found.box == 16

    # Half maps: two observations of one density. Their mean has a smaller error.
    halves = [observation, replace(observation, y=y.flip(0))]
    both = uncertainty.measure(prior, halves, sampler, samples=4)
    assert float(both.fsc.mean()) > float(found.fsc.mean())
