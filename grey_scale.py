"""The grey scale and the radial spectrum of an observation, beside those that the prior knows.

    S(k) = mean over shell k of |F y|^2 - P             signal power of an observation y        (1)
    g(k) = sqrt(T(k) / S(k)) / c,  T: of the references  y' = F^-1[g F y] has their spectrum    (2)
    w    = m S / (S + P)                                 the Wiener filter                      (3)
    maximum = p(F^-1[w F y']) / median_r p(F^-1[w (F r + F n_r)]) / p(r)                        (4)

The prior knows densities r whose 99.999 percentile p is 1. An observation is blurred and noisy, so
that its own percentile is a third of that of the sharp density, or less. (4) measures what blur
and noise do to the percentile on `references`, densities the prior was trained on, which the
checkpoint carries: they go through the same filter, with noise n_r of the same share per shell.
Maps are sharpened in many ways. g brings y to the radial power that the prior knows. It commutes
with every operator of posterior.py and is undone exactly afterwards. c makes the mean of log g 0
between 25 and 5 Å.

Ours. What each step gains: RESULTS.md, "Grey scale".
"""

from torch import Tensor

import fourier


def expand(spectrum: Tensor, shape, zoom: float = 1.0) -> Tensor:
    """A radial filter (n,) on a grid: float32 (D, H, W). Values lie at (i + 1/2) / 2n cycles/voxel.

    zoom: voxel size of the grid over that of the prior. Between the values log g is linear.
    """
    n = len(spectrum)
    k = fourier.wavenumber(shape, zoom) * 2 * n - 0.5
    k = k.clamp(0, n - 1)
    low = k.long().clamp(max=n - 2)
    log = spectrum.double().log()
    return (log[low] + (k - low) * (log[low + 1] - log[low])).exp().float()
