"""How far a result may be from the truth: measured on densities whose truth is known.

    V(r)  = a s(r)^2 + b m(r)^2 + c     predicted variance of the error at voxel r            (1)
    (a, b, c) >= 0:  minimise  sum_r V - e^2 log V     over the voxels of the references      (2)
    |e| <= z sqrt(V) in 90 % of the molecule's voxels of the references                       (3)

s is the standard deviation of the samples and m their smoothed mean, 0 where negative. The samples
alone are too sure of themselves: their spread is a half to a fifth of the error, because the
network is not a perfect prior and steps are few. So we take reference densities of the checkpoint
(grey_scale.py), the sharpest of those that look like the map. They get its blur, its missing
coefficients and its noise, and are restored by the same steps. Their error e is known. (2) makes
the mean of V that of e^2. It is the deviance of a Poisson variable, and its multiplicative updates
are those of Lee & Seung (2001).

(3) is an empirical quantile, as in conformal prediction (Vovk et al. 2005). We do not split: z
comes from the voxels that (2) was fitted to, so it may be a little too small. All of it holds for a
map as far as the references resemble it. Ours, not from the papers.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import augment
import fourier
import fsc
import grey_scale
import posterior
import volume
from checkpoint import Prior
from posterior import Moments, Observation

COUNT = 4  # references that are restored
SMOOTH = 1.5  # voxels: standard deviation of the Gaussian that smooths m
MOLECULE = 0.1  # of the maximum: density above it counts as molecule
INSIDE = 0.9  # share of (3)


@dataclass(frozen=True)
class Uncertainty:
    """(1) with its numbers fitted, in the units and the spectrum of the map."""

    weights: Tensor  # a, b, c: (3,)
    interval: float  # z of (3)
    fsc: Tensor  # of restored references with their truth, shells 0 .. D/2, their mean
    box: int  # D, voxels per side of the references

    def std(self, moments: Moments) -> Tensor:
        """sqrt(V) of a restored map, from the moments of its samples."""
        return (features(moments) @ self.weights).sqrt().float()  # (1)


def measure(
    prior: Prior,
    observations: list[Observation],
    sampler: dict,
    samples: int,
    region: Tensor | None = None,
    tick=posterior.no_tick,
) -> Uncertainty:
    """(1) to (3), from references that are restored with as many samples as the map.

    observations: a map, or two half maps. The result is the mean of the samples of them all.
    sampler: as for posterior.draw_samples.
    region: boolean (D, H, W) in Fourier space; the FSC is that of these coefficients.
    The prior must have references.
    """
    # Half maps have one truth, that of the first: its blur, grey scale and spectrum.
    first = observations[0]
    moments, truths, curves = [], [], []
    # The sharpest of the references that look like the map: what a map may hold beyond its signal
    # is unknown, and sharp references are restored worst. They are kept from sharp to blurred.
    nearest = first.nearest or range(len(prior.references))
    crops = prior.references[sorted(nearest)[:COUNT]]
    for i, crop in enumerate(crops.float() / 255):
        # Blur the reference like the map, observe it likewise, and restore it.
        blur = grey_scale.expand(first.blur, crop.shape)
        x_0 = (fourier.apply_fourier(crop, blur) - prior.mean) / prior.std
        found = Moments()
        for j, observation in enumerate(observations):
            # Two seeds below 0, which no map has: of the noise in y, and of the samples.
            seed = -1 - 2 * (i * len(observations) + j)
            like_first = replace(observation, scale=first.scale, spectrum=first.spectrum)
            seen = observe_reference(like_first, x_0, seed)
            numbers = dict(samples=samples, seed=seed - 1, tick=tick)
            posterior.add_samples(prior, seen, sampler, found, **numbers)

        # Compare it with the truth, which has the map's grey scale and spectrum.
        truth = first.to_map(x_0)
        curves.append(fsc_of(found.mean, truth, region))
        moments.append(found)
        truths.append(truth)
    weights, interval = fit(moments, truths)
    return Uncertainty(weights, interval, torch.stack(curves).mean(0), crops.shape[-1])


def observe_reference(observation: Observation, x_0: Tensor, seed: int) -> Observation:
    """A density x_0 (D, D, D) in network scale, observed like a map: with its mask and noise."""
    # The mask and the noise, at the frequencies of the smaller grid.
    shape = x_0.shape
    mask = observation.measured.cpu().float()
    measured = grey_scale.same_frequencies(mask, shape) > 0.5
    sigma = torch.as_tensor(observation.sigma).cpu().float().expand(mask.shape)
    sigma = grey_scale.same_frequencies(sigma, shape)

    # y = A x + n. Missing coefficients are 0 in density, not in network scale.
    generator = augment.item_generator(seed, 0)
    noise = fourier.apply_fourier(torch.randn(shape, generator=generator), sigma)
    scale = observation.scale._replace(maximum=1.0)  # of references
    density = fourier.apply_fourier(volume.denormalise(x_0 + noise, scale), measured)
    start = observation.classical(density, measured, sigma * scale.std)

    device = observation.y.device
    return replace(
        observation,
        y=volume.to_network_scale(density, scale).to(device),
        measured=measured.to(device),
        sigma=sigma.to(device),
        start=volume.to_network_scale(start, scale).to(device),
    )


def features(moments: Moments) -> Tensor:
    """s^2, m^2 and 1 of (1) for samples (D, H, W): float64 (D, H, W, 3)."""
    mean = moments.mean.double()
    k = fourier.wavenumber(mean.shape)
    smooth = fourier.apply_fourier(mean, torch.exp(-2 * (torch.pi * SMOOTH * k) ** 2))
    variance = moments.std().double() ** 2
    return torch.stack([variance, smooth.clamp(min=0) ** 2, torch.ones_like(mean)], -1)


def fit(moments: list[Moments], truths: list[Tensor]) -> tuple[Tensor, float]:
    """(a, b, c) of (2) and z of (3) from restored references and their truths."""
    x = torch.cat([features(found).flatten(0, -2) for found in moments])
    error = torch.cat([(found.mean - truth).flatten() for found, truth in zip(moments, truths)])
    squares = error.double() ** 2

    # Updates that keep the weights positive. Units make no difference.                        (2)
    scale = x.mean(0).clamp(min=1e-300)
    x = x / scale
    weights = squares.mean().expand(3) / 3
    for _ in range(300):
        predicted = x @ weights
        gain = (x * (squares / predicted)[:, None]).mean(0)  # the mean of x itself is 1
        weights = weights * gain

    # z: 90 % of the molecule's voxels lie within it.                                          (3)
    molecule = torch.cat([(truth > MOLECULE * truth.max()).flatten() for truth in truths])
    ratio = error.abs() / (x @ weights).sqrt()
    interval = float(ratio[molecule].quantile(INSIDE))
    return weights / scale, interval


def fsc_of(x: Tensor, truth: Tensor, region: Tensor | None) -> Tensor:
    """FSC of two maps, of the Fourier coefficients in a region (on any grid) if there is one."""
    if region is not None:
        region = grey_scale.same_frequencies(region.float(), truth.shape) > 0.5
    return fsc.fsc(x, truth, region)
