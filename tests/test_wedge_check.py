"""What fills a wedge is scaled by how true it was where measured tilts were hidden."""

import pytest
import torch
from made_maps import close, fft, filtered, random, wedge

import fsc
import wedge_check
from mrc import Map
from report import silent
from sampling_settings import WedgeSettings
from wedge_check import HiddenTilts

SHAPE = (20, 24, 22)
SETTINGS = WedgeSettings(tilt_range=(-60, 60))


@pytest.mark.parametrize("gain, factor", [(2.0, 0.5), (0.5, 1.0), (-1.0, 0.01)])
def test_the_factor_undoes_a_wrong_amplitude_and_never_raises_one(gain, factor):
    map = Map(random(SHAPE), 1.5)
    hidden = wedge(SHAPE) & ~wedge(SHAPE, (-50, 50))
    answer = wedge_check.compare(gain * map.density, map, hidden)
    # e_k is that of rounding.
    torch.testing.assert_close(
        answer.factor, torch.full_like(answer.factor, factor), rtol=1e-5, atol=0
    )


def test_nothing_filled_in_is_not_scaled():
    map = Map(random(SHAPE), 1.5)
    hidden = wedge(SHAPE) & ~wedge(SHAPE, (-50, 50))
    assert (wedge_check.compare(torch.zeros(SHAPE), map, hidden).factor == 1).all()


@pytest.mark.parametrize("emptied", [0.0, 1e-6])
def test_an_empty_shell_does_not_rule_the_others(emptied):
    # A filling of half the right amplitude in all shells but the fifth, which is (nearly) empty.
    map = Map(random(SHAPE), 1.5)
    hidden = wedge(SHAPE) & ~wedge(SHAPE, (-50, 50))
    x = filtered(2 * map.density, torch.where(fsc.shells(SHAPE) == 5, emptied, 1.0))
    factor = wedge_check.compare(x, map, hidden).factor
    assert (factor[8:] < 0.6).all()


def test_nothing_hidden_is_said(capsys):
    map = Map(random((16, 16, 16)), 1.5)
    settings = WedgeSettings(tilt_range=(-5, 5))
    tests = wedge_check.try_on_hidden_tilts(map, settings, lambda y, _: {"POCS": y.density})
    wedge_check.say_tests(tests, settings)
    assert "too few tilts" in capsys.readouterr().out
    assert (tests["POCS"].factor == 1).all()


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

    tests = wedge_check.try_on_hidden_tilts(map, SETTINGS, fill)
    assert tests["oracle"].auc == pytest.approx(1)
    assert abs(tests["POCS"].auc) < 0.1
    assert not wedge_check.pocs_is_better(tests, "oracle")


@pytest.mark.parametrize(
    "name, pocs, better", [("prior", 0.51, False), ("prior", 0.53, True), ("network", 0.51, True)]
)
def test_pocs_must_beat_the_prior_by_a_margin_and_the_network_by_none(name, pocs, better):
    none = torch.ones(1)
    tests = {"POCS": HiddenTilts(pocs, none), name: HiddenTilts(0.5, none)}
    assert wedge_check.pocs_is_better(tests, name, silent) == better


def test_only_missing_coefficients_are_scaled_each_by_the_factor_of_its_shell():
    x, measured = random(SHAPE), wedge(SHAPE)
    shell = fsc.shells(SHAPE, 1.5)
    factor = torch.linspace(1, 0, int(shell.max()) + 1)
    found = wedge_check.scale_missing(x, measured, factor, 1.5)
    want = fft(x) * torch.where(measured, 1.0, factor[shell].double())
    assert close(fft(found), want, 1e-5)
