"""What fills a wedge is scaled by how true it was where measured tilts were hidden."""

import pytest
import torch
from made_maps import close, fft, random, wedge

import fsc
import wedge_check
from mrc import Map
from sampling_settings import WedgeSettings

SHAPE = (20, 24, 22)
SETTINGS = WedgeSettings(tilt_range=(-60, 60))


@pytest.mark.parametrize("gain, factor", [(2.0, 0.5), (0.5, 1.0), (-1.0, 0.01)])
def test_the_factor_undoes_a_wrong_amplitude_and_never_raises_one(gain, factor):
    map = Map(random(SHAPE), 1.5)
    hidden = wedge(SHAPE) & ~wedge(SHAPE, (-50, 50))
    answer = wedge_check.compare(gain * map.density, map, hidden)
    torch.testing.assert_close(answer.factor, torch.full_like(answer.factor, factor))


def test_nothing_filled_in_is_not_scaled():
    map = Map(random(SHAPE), 1.5)
    hidden = wedge(SHAPE) & ~wedge(SHAPE, (-50, 50))
    assert (wedge_check.compare(torch.zeros(SHAPE), map, hidden).factor == 1).all()


def test_a_factor_below_1_by_chance_alone_is_1():
    # Right, but buried in noise: the scatter of r_k is as large as 1.
    map = Map(random(SHAPE) + 30 * random(SHAPE, 2), 1.5)
    hidden = wedge(SHAPE) & ~wedge(SHAPE, (-50, 50))
    assert wedge_check.compare(random(SHAPE), map, hidden).factor.mean() > 0.9


def test_noise_of_what_was_measured_does_not_change_the_factor():
    shape = (48, 48, 48)
    truth = random(shape, 1)
    hidden = wedge(shape) & ~wedge(shape, (-50, 50))
    noisy = Map(truth + random(shape, 2), 1.5)
    # A filling of which half of the power is right.
    answer = wedge_check.compare(truth + random(shape, 3), noisy, hidden)
    # Some 700 coefficients in each of the widest shells: one standard deviation is .03.
    assert answer.factor[16:24].mean() == pytest.approx(0.5, abs=0.05)


def test_a_method_sees_nothing_of_the_hidden_tilts():
    map = Map(random(SHAPE), 1.5)

    def fill(given, narrow):
        assert narrow.tilt_range == (-50, 50)
        seen = narrow.measured(map)
        assert close(fft(given.density), fft(map.density) * seen, 1e-5)
        return {"POCS": given.density, "oracle": map.density}

    answers = wedge_check.hide_tilts(map, SETTINGS, fill)
    assert answers["oracle"].auc == pytest.approx(1)
    assert abs(answers["POCS"].auc) < 0.1
    assert not wedge_check.pocs_is_better(answers, "oracle")


def test_only_missing_coefficients_are_scaled_each_by_the_factor_of_its_shell():
    x, measured = random(SHAPE), wedge(SHAPE)
    shell = fsc.shells(SHAPE, 1.5)
    factor = torch.linspace(1, 0, int(shell.max()) + 1)
    found = wedge_check.scale_missing(x, measured, factor, 1.5)
    want = fft(x) * torch.where(measured, 1.0, factor[shell].double())
    assert close(fft(found), want, 1e-5)
