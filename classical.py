"""The classical answers, which every result of a network is compared with.

An observation y is a map whose Fourier coefficients k have noise of power P_k, where A measured
them (posterior.py (1)).

    u <- A y + (1 - A) max(u, 0)          POCS, for the missing wedge                            (1)
    u  = F^-1[S / (S + P) F y]            Wiener filter, S is the signal's power per shell       (2)

(1): projections onto convex sets, Youla & Webb 1982. Maps are (D, H, W), masks and noise per
coefficient (D, H, W) in `fftfreq` layout.
"""

import torch
from torch import Tensor

import degrade
import fourier
import grey_scale
from fourier import put_back


def pocs(
    y: Tensor,
    measured: Tensor,
    sigma: Tensor | float = 0.0,
    *,
    iterations: int = 100,
    support: Tensor | None = None,
) -> Tensor:
    """(1): projections onto convex sets, starting from y itself: (D, H, W).

    sigma is ignored; it is here because `posterior.observe` calls all classical answers alike.
    support: boolean (D, H, W) in real space; the density is 0 outside of it. The last step is (1),
    so a little negative density is left.
    """
    # What y holds outside of the measured coefficients is noise. Remove it.
    measured = fourier.hermitian_part(measured)
    y = fourier.apply_fourier(y, measured)
    u = y
    for _ in range(iterations):
        # Project onto maps without negative density, then onto those that agree with y.     (1)
        u = u.clamp(min=0)
        if support is not None:
            u = u * support
        u = put_back(u, y, measured)
    return u


def fill_in(y: Tensor, measured: Tensor, fill: str) -> Tensor:
    """The measured coefficients of y (D, H, W), and in the others "zeros" or "pocs", (1).

    It is what a wedge network sees, in training (data_wedges.py) and later.
    """
    if fill == "pocs":
        return pocs(y, measured)
    return fourier.apply_fourier(y, measured)


def wiener(y: Tensor, noise: Tensor, signal: Tensor, voxel_size=1.0) -> Tensor:
    """(2) for a map (D, H, W). noise, signal: powers |F|^2 per shell, or (D, H, W).

    voxel_size: in Å, or in any unit; one number or (z, y, x), because shells are spheres in 1/Å.
    """

    def on_grid(power: Tensor) -> Tensor:
        return power if power.ndim == 3 else degrade.expand_shells(power, y.shape, voxel_size)

    P = on_grid(noise)
    S = on_grid(signal)
    return fourier.apply_fourier(y, torch.where(S > 0, S / (S + P), 0))


def positive_wiener(y: Tensor, measured: Tensor, sigma: Tensor | float, voxel_size=1.0) -> Tensor:
    """(2), then negative density set to 0: (D, H, W).

    S is estimated from y itself (grey_scale.py (1)), because there is no second half map. measured,
    sigma: as in `posterior.observe`. voxel_size: as in `grey_scale.signal_power`.
    """
    noise = (torch.as_tensor(sigma).float().square() * y.numel()).expand(y.shape)
    signal = grey_scale.signal_power(y, measured, noise, min(y.shape) // 2, voxel_size)
    S = grey_scale.expand(signal.clamp(min=1e-30), y.shape)
    return wiener(y, noise, measured * S).clamp(min=0)
