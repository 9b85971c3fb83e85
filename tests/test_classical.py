"""classical.py: POCS equals an oracle and converges, the Wiener filters are exact."""

import math

import numpy as np
import torch
from made_maps import close, filtered, oracle, random, wedge

import degrade
import fourier
from classical import pocs, positive_wiener, wiener

SHAPE = (8, 8, 8)


def test_pocs_equals_50_iterations_of_the_oracle_inside_its_support():
    f = oracle("pocs_wedge.npz")
    shape = tuple(f["shape"].tolist())
    bits = np.unpackbits(f["support"].numpy(), count=math.prod(shape))
    support = torch.from_numpy(bits.reshape(shape).astype(bool))
    kz, _, kx = fourier.freq_grid(shape)
    measured = (kz.abs() <= kx.abs() * math.tan(math.radians(60))).expand(shape)
    assert close(pocs(f["degraded"], measured, iterations=50, support=support), f["pocs_50"])


def test_pocs_does_not_change_a_map_that_is_positive_and_empty_in_the_wedge():
    measured = wedge((10, 9, 8))
    y = filtered(random((10, 9, 8)), measured)
    y = y - y.min() + 0.1
    assert close(pocs(y, measured, iterations=20), y)


def test_every_pocs_iteration_comes_nearer_to_a_positive_truth():
    truth, measured = random((12, 12, 12)).clamp(min=0) ** 2, wedge((12, 12, 12))
    y = filtered(truth, measured)
    error = [float((pocs(y, measured, iterations=n) - truth).norm()) for n in (0, 1, 2, 5, 10, 30)]
    assert all(after < 0.99 * before for before, after in zip(error, error[1:]))


def test_the_wiener_filter_is_the_posterior_mean_of_a_gaussian():
    signal = torch.tensor([9.0, 4.0, 2.0, 0.0])  # per shell
    noise = torch.tensor([1.0, 4.0, 0.5, 2.0])
    y, shell = random(SHAPE), degrade.noise_shells(SHAPE).clamp(max=3)
    wanted = filtered(y, torch.tensor([0.9, 0.5, 0.8, 0.0])[shell])
    assert close(wiener(y, noise, signal), wanted)
    assert close(wiener(y, noise[shell], signal), wanted)


def test_the_wiener_filter_of_one_map_finds_the_signal_by_itself():
    # White signal of power 4 N and white noise of power N: every coefficient gets 4 / 5.
    shape = (32, 32, 32)
    everywhere = torch.ones(shape, dtype=torch.bool)
    noisy = 5**0.5 * random(shape)
    wanted = (0.8 * noisy).clamp(min=0)
    error = positive_wiener(noisy, everywhere, 1.0) - wanted
    # The power of a band is known to a few percent, where the band has many coefficients.
    assert float(error.norm() / wanted.norm()) < 0.02

    # With no measured coefficient there is nothing.
    nowhere = torch.zeros(shape, dtype=torch.bool)
    assert float(positive_wiener(noisy, nowhere, 1.0).abs().max()) == 0
