"""The grey scale and the radial spectrum of an observation, matched to those that the prior knows.

    S(k) = mean over a band of |F y|^2 - P              signal power of an observation y        (1)
    g(k) = c sqrt(T(k) / S(k)),  T: of the references   y' = F^-1[g F y] has their spectrum     (2)
    w    = m S / (S + P)                                Wiener filter, m: what was measured     (3)
    p(F^-1[w F y']) = p(F^-1[w (a h F r + g F n)])      maximum: the median of a                (4)
    h    = g sqrt(S / T) / c                            the blur that is left after g           (5)

The prior knows densities whose 99.999 percentile p is 1. An observation is blurred, so that its
percentile is a half to a fifth of the sharp density's. We compare it with `references`: densities
r that the prior was trained on. Only the 8 whose spectra are most like S are used, each brought to
spectrum T and percentile 1. (4) sends one, times a number a, through the same filter as the
observation, with noise n like that of y, and asks for which a both are equally bright. The spread
of log a gives the error.

Maps are sharpened in many ways, and much sharpened ones have negative density, which the prior does
not know. g brings them to the prior's spectrum. It commutes with every operator of posterior.py and
is undone exactly afterwards. We fit log g by a line in k^2, a B-factor, between 25 and 5 Å. c makes
that line 0 at k = 0, so the bulk of the molecule keeps its brightness. We smooth log g, and keep it
constant at frequencies below 1/25 Å. h blurs a sharp density until it looks like y': the references
of (4), and those that uncertainty.py restores.

P: noise power as in posterior.py (1). Bands are the shells of the references' boxes, which have
n = box / 2: band i goes from i / 2n to (i + 1) / 2n cycles per voxel, on any grid. Ours.
Measurements: RESULTS.md, "Grey scale".
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor

import degrade
import fourier
import volume

# Numbers chosen on held-out training structures and on half of the real maps.
COUNT = 64  # references
NEAREST = 8  # of them count for one observation
COMPARED = 1 / 15  # 1/Å: spectra are compared from here on. The molecule's shape sets them below
LARGEST = 64  # their side in voxels, at most
LEAST_SIGNAL = 0.05  # share of a band's power; the signal ends where it is below
FITTED = 1 / 25, 1 / 5  # 1/Å: where c is fitted; below, g is constant
RIDGE = 3e-4  # 1/Å^4: of the fit, keeps slopes small
GAIN = 0.2, 1.0  # the limits of g; noise is never raised
LEAST_REMOVED = 0.03  # g is used only if it lowers `negative_share` by this


class Match(NamedTuple):
    """What brings an observation to the prior's grey scale and spectrum."""

    maximum: float | None = None  # 99.999 percentile of the sharp density y', in the units of y
    error: float | None = None  # its standard deviation
    spectrum: Tensor | None = None  # g in n bands; None is 1
    blur: Tensor | None = None  # h in n bands: what makes a reference as blurred as y'
    nearest: list[int] | None = None  # the references that were compared, from the nearest on


def references(dataset) -> Tensor:
    """Densities for (4) from a data set of data.py: uint8 (R, D, D, D), 255 for density 1.

    R is COUNT, or less if the data set has fewer that hold a molecule.

    They are the first crops of twice as many items, thinned out so that sharp and blurred ones
    are equally many: `match` wants some that look like the observation, whatever that is. The
    sharpest are first.
    """
    crops = []
    for i in range(2 * COUNT):
        item = dataset[i]
        if not torch.is_tensor(item):  # windows and rotations, see data.MapCrops
            item = dataset.rotate_windows(*item)
        x = (item[0, 0] * dataset.std + dataset.mean).clamp(0, 1)
        crops.append(volume.center_crop(x, min(len(x), LARGEST)))

    # Leave out crops that hardly touch a molecule, unless nearly all are such.
    bright = [x for x in crops if x.max() >= 0.5]
    if len(bright) >= 2:
        crops = bright

    # How much of a crop's maximum is left after a low-pass to 4 voxels: 1 if it was blurred before.
    blurredness = []
    for x in crops:
        blurred = fourier.lowpass(x, 4.0, 1.0, edge=4)
        blurredness.append(blurred.max() / x.max().clamp(min=1e-6))
    blurredness = torch.stack(blurredness)

    # Take the crop nearest to each of evenly spaced values.
    chosen = []
    count = min(COUNT, len(crops))
    for wanted in torch.linspace(float(blurredness.min()), float(blurredness.max()), count):
        distance = (blurredness - wanted).abs()
        distance[chosen] = math.inf
        chosen.append(int(distance.argmin()))
    chosen.sort(key=blurredness.tolist().__getitem__)
    return (torch.stack([crops[i] for i in chosen]) * 255).round().to(torch.uint8)


# ---- Radial bands


def frequencies(shape, relative_voxel_size=1.0) -> Iterator[Tensor]:
    """|k| of every coefficient in cycles per voxel, one plane (H, W) after the other.

    So a large map needs no more memory for it. relative_voxel_size: as in `expand`.
    """
    kz, ky, kx = fourier.freq_grid(shape, relative_voxel_size)
    for k in kz:
        yield (k**2 + ky[0] ** 2 + kx[0] ** 2).sqrt()


def middles(n: int, prior_voxel_size: float) -> Tensor:
    """The frequency in the middle of each of n bands of the prior: float64 (n,) in 1/Å."""
    return (torch.arange(n).double() + 0.5) / (2 * n * prior_voxel_size)


def band_mean(values: Tensor, weight: Tensor, n: int) -> Tensor:
    """Weighted mean of values (D, H, W) in each of n bands: float64 (n,).

    A small grid has no coefficient in some bands. These have the mean of the band below them, but
    0 beyond the last band with weight.
    """
    total, count = torch.zeros(2, n + 1, dtype=torch.float64)
    for value, share, k in zip(values, weight, frequencies(values.shape)):
        # What lies beyond the bands goes to one more. 1e-9: rounding must not lower a whole number.
        band = (k * 2 * n + 1e-9).long().clamp(max=n).flatten()
        share = share.double()
        total.index_add_(0, band, (value * share).flatten())
        count.index_add_(0, band, share.flatten())
    mean = total[:n] / count[:n].clamp(min=1e-9)

    # The band itself, or the nearest one below it that is not empty.
    band = torch.arange(n)
    source = torch.where(count[:n] > 0, band, 0).cummax(0).values
    return torch.where(band <= source.max(), mean[source], 0)


def expand(spectrum: Tensor | None, shape, relative_voxel_size=1.0) -> Tensor:
    """A radial filter (n,), positive, on a grid: float32 (D, H, W). Its log is linear in |k|.

    None is 1. relative_voxel_size: that of the grid over the prior's, one number or (z, y, x). The
    values lie in the middle of their bands.
    """
    if spectrum is None:
        return torch.ones(tuple(shape))
    n = len(spectrum)
    log = spectrum.double().log()
    planes = []
    for k in frequencies(shape, relative_voxel_size):
        place = (k * 2 * n - 0.5).clamp(0, n - 1)
        low = place.long().clamp(max=n - 2)
        planes.append((log[low] + (place - low) * (log[low + 1] - log[low])).exp().float())
    return torch.stack(planes)


def in_spectrum(
    spectrum: Tensor | None, x: Tensor, task: Callable[[Tensor], Tensor], relative_voxel_size=1.0
) -> Tensor:
    """What a task makes of a map x (D, H, W) in the spectrum (2), brought back to that of x."""
    if spectrum is None:
        return task(x)
    gain = expand(spectrum, x.shape, relative_voxel_size)
    return fourier.apply_fourier(task(fourier.apply_fourier(x, gain)), 1 / gain)


def same_frequencies(weights: Tensor, shape) -> Tensor:
    """Weights (D, H, W), even in k, at the nearest frequencies of another grid (D', H', W')."""
    for dim in range(3):
        n = weights.shape[dim]
        nearest = (torch.fft.fftfreq(shape[dim]) * n).round().long() % n
        weights = weights.index_select(dim, nearest)
    return (weights + fourier.mirror(weights)) / 2


# ---- Matching


def signal_power(y: Tensor, measured: Tensor, noise: Tensor, n: int, voxel_size=1.0) -> Tensor:
    """(1) in n bands, positive up to the end of the signal and 0 beyond.

    noise: P, (D, H, W). Where it differs between directions, only coefficients of at most
    average noise are used. voxel_size: that of y, in any unit, one number or (z, y, x). It says
    which coefficients have one frequency.
    """
    mean_noise = degrade.shell_mean(noise, voxel_size)
    mean_noise = degrade.expand_shells(mean_noise, y.shape, voxel_size)
    seen = measured & (noise <= 1.001 * mean_noise)  # 1.001: the mean is rounded
    power = band_mean(fourier.fft3(y).abs().square(), seen, n)
    excess = power - band_mean(noise, seen, n)  # (1)
    # The first band always counts.
    held = excess > LEAST_SIGNAL * power
    held[0] = True
    held = held.long().cumprod(0)
    return excess.clamp(min=LEAST_SIGNAL * power + 1e-30) * held


def match_spectrum(
    signal: Tensor, target: Tensor, prior_voxel_size: float
) -> tuple[Tensor, Tensor]:
    """g of (2) and h of (5) from S and T in n bands. prior_voxel_size: in Å.

    Both are 1 if fewer than 3 bands are in FITTED.
    """
    n = len(signal)
    held = int((signal > 0).sum())
    frequency = middles(n, prior_voxel_size)

    fitted = (frequency >= FITTED[0]) & (frequency <= FITTED[1]) & (signal > 0)
    if fitted.sum() < 3:
        return torch.ones(n), torch.ones(n)

    # log (g / c), smooth, and constant below 25 Å, where the molecule's shape sets the power.
    log = (target.log() - signal.clamp(min=1e-30).log()) / 2
    log[1 : held - 1] = (log[: held - 2] + 2 * log[1 : held - 1] + log[2:held]) / 4
    first = int(fitted.long().argmax())
    log[:first] = log[first]

    # c, by a straight line in the square of the frequency. Few bands do not tell its slope, so
    # that a steep one has a price.
    squares = frequency[fitted] ** 2
    deviation = squares - squares.mean()
    slope = (deviation @ log[fitted]) / (deviation @ deviation + RIDGE)
    log = log - (log[fitted].mean() - slope * squares.mean())

    # Beyond the signal S is unknown. For h, the line goes on where it rises, so that references are
    # blurred there, too.
    rise = frequency[held:] ** 2 - frequency[held - 1] ** 2
    log[held:] = log[held - 1] + max(float(slope), 0.0) * rise

    # g is limited, and constant beyond the signal.                                            (2)
    low, high = GAIN
    g = log.exp().clamp(low, high)
    g[held:] = g[held - 1]
    return g, (g.log() - log).exp()  # (5)


def nearest(signal: Tensor, powers: Tensor, prior_voxel_size: float) -> list[int]:
    """The NEAREST of references whose spectra, powers (R, n), have the shape of S, (n,).

    All references, if S has fewer than 3 bands beyond COMPARED.
    """
    n = len(signal)
    frequency = middles(n, prior_voxel_size)
    used = (frequency >= COMPARED) & (signal > 0)
    if used.sum() < 3:
        return list(range(len(powers)))

    # A factor is no difference of shape.
    log = signal[used].log() - powers[:, used].log()
    deviation = log - log.mean(1, keepdim=True)
    return deviation.square().mean(1).argsort()[:NEAREST].tolist()


def match(
    y: Tensor,
    measured: Tensor,
    sigma: Tensor | float,
    crops: Tensor,
    prior_voxel_size: float,
    voxel_size=1.0,
) -> Match:
    """The maximum (4), its error, and g, from an observation y (D, H, W) on the prior's grid.

    measured, sigma: as in posterior.Observation, in the units of y. crops: `references`.
    prior_voxel_size: in Å. voxel_size: that of y, as in `signal_power`. g is None if it does not
    lower `negative_share` by LEAST_REMOVED. All is None if there is no density above 0.
    """
    crops = crops.float() / 255
    n = crops.shape[-1] // 2
    shape, small = y.shape, crops.shape[1:]
    noise = (torch.as_tensor(sigma).float().square() * y.numel()).expand(shape)

    # S and T. T is a mean of shapes, so that all references count alike.
    signal = signal_power(y, measured, noise, n, voxel_size)
    everything = torch.ones(small)
    powers = [band_mean(fourier.fft3(r).abs().square(), everything, n) for r in crops]
    powers = [p.clamp(min=1e-30) / p[1 : n // 2].mean() for p in powers]
    chosen = nearest(signal, torch.stack(powers), prior_voxel_size)
    crops = crops[chosen]
    powers = [powers[i] for i in chosen]
    target = torch.stack(powers).mean(0)
    g, h = match_spectrum(signal, target, prior_voxel_size)

    # The observation, filtered.
    S = expand(signal.clamp(min=1e-30), shape)
    w = measured * (S / (S + noise))  # (3)
    filtered = fourier.apply_fourier(y, w)
    flattened = fourier.apply_fourier(filtered, expand(g, shape))
    if negative_share(filtered) - negative_share(flattened) < LEAST_REMOVED:
        h = h / g
        g = None
    else:
        filtered = flattened

    # The same for the references, which get the spectrum T first. Each says which maximum would
    # make it, with the noise, as bright as the observation.
    top = volume.top_value(filtered, 99.999)
    if not top > 0:
        return Match()
    w = same_frequencies(w, small)
    noise = same_frequencies(noise, small) * math.prod(small) / y.numel()
    found = []
    for i, (r, power) in enumerate(zip(crops, powers)):
        sharp = fourier.apply_fourier(r, expand((target / power).sqrt(), small))
        sharp = sharp / volume.top_value(sharp, 99.999)
        white = torch.randn(small, generator=Generator().manual_seed(i))
        n_r = degrade.add_spectral_noise(torch.zeros(small), noise, noise=white)
        blurred = fourier.apply_fourier(sharp, w * expand(h, small))
        noisy = fourier.apply_fourier(n_r, w * expand(g, small))
        found.append(solve_maximum(top, blurred, noisy))  # (4)
    found = torch.tensor(found)
    maximum = float(found.median())
    return Match(maximum, maximum * float(found.log().std(correction=0)), g, h, chosen)


def solve_maximum(top: float, blurred: Tensor, noise: Tensor) -> float:
    """The number a of (4): p(a blurred + noise) = top. top / 4 where a would be less.

    blurred, noise: (D, H, W). By bisection, to 1e-6 of the largest a.
    """
    low, high = top / 4, top / volume.top_value(blurred, 99.999)
    for _ in range(20):
        middle = (low + high) / 2
        if volume.top_value(middle * blurred + noise, 99.999) < top:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def negative_share(x: Tensor) -> float:
    """The share of a map's power that is negative density."""
    return float(x.clamp(max=0).square().sum() / x.square().sum())
