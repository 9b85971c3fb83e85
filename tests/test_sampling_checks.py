"""What sampling_checks.py promises: what a map holds where a task expects nothing."""

from dataclasses import replace

import pytest
import torch
from made_maps import bright_solvent, degraded, filtered, molecule, random, wedge

import degrade
import fourier
import mrc
import posterior
import sampling_checks
from classical import wiener
from report import silent
from sampling_settings import NetworkWedgeSettings, WedgeSettings

SHAPE = (32, 32, 32)


def half_maps(truth, sigma):
    """Half maps, the noise power of each per coefficient, and the signal's per shell."""
    maps = [truth + sigma * random(truth.shape, i) for i in (1, 2)]
    powers, signal = posterior.noise_and_signal(maps)
    return maps, [degrade.expand_shells(power, truth.shape) for power in powers], signal


def test_half_maps_of_noise_are_no_signal():
    for seed in range(20):
        noise = [random(SHAPE, 2 * seed + i) for i in (0, 1)]
        with pytest.raises(ValueError, match="no signal"):
            sampling_checks.check_agreement(*noise, 1.5)
        truth = molecule(SHAPE)
        halves = [truth + 3 * truth.std() * x for x in noise]
        sampling_checks.check_agreement(*halves, 1.5)


def test_padding_and_hot_voxels_are_said_where_they_change_a_likelihood():
    map = molecule(SHAPE, resolution=5.0) + 0.03 * random(SHAPE)
    padded, hot = map.clone(), map.clone()
    padded[:8] = 0
    hot[0, 5, 31] = 3
    for x, words in ((map, []), (padded, ["25% of the voxels"]), (hot, ["voxel 0 5 31 (z y x)"])):
        said = []
        sampling_checks.say_unlike_a_map(x, said.append)
        assert len(said) == len(words)
        assert all(word in line for word, line in zip(words, said))


@pytest.mark.parametrize("brightness, method", [(0.5, "prior"), (8.0, "pocs")])
def test_a_map_without_detail_gets_the_classical_answer(brightness, method):
    # White noise is far brighter than what is estimated for a sharp density.
    start = torch.full((8, 8, 8), brightness)
    observation = posterior.Observation(start, start > 0, 0.1, start)
    said = []
    for asked, want in (("auto", method), ("prior", "prior")):
        settings = WedgeSettings(method=asked, steps=7)
        found = sampling_checks.without_detail(observation, settings, "prior", "POCS", said.append)
        assert found == want
    assert len(said) == (3 if method == "pocs" else 0)
    assert ("--steps: not used by method pocs" in said) == (method == "pocs")

    # Noise that was given may be wrong, and is named.
    assert not [line for line in said if "--noise" in line]
    settings = WedgeSettings(method="prior", noise=9.0)
    said.clear()
    sampling_checks.without_detail(observation, settings, "prior", "POCS", said.append)
    assert len(said) == (method == "pocs")
    assert all("--noise does not fit it" in line for line in said)


# ---- The wedge


def test_missing_power_is_the_share_that_was_let_through():
    # Noise has one power everywhere. The wedge's amplitudes are divided by 2, its power by 4.
    noise = random((24, 32, 40))
    voxel_size = (3.0, 1.5, 1.2)
    measured = wedge(noise.shape, (-50, 60), "x", voxel_size)
    y = filtered(noise, torch.where(measured, 1.0, 0.5)) + 7
    leak, share = sampling_checks.missing_power(mrc.Map(y, voxel_size), measured)
    missing = float((~measured).double().mean())
    assert leak == pytest.approx(0.25, rel=0.1)
    assert share == pytest.approx(missing / 4 / (missing / 4 + 1 - missing), rel=0.1)


@pytest.mark.parametrize("offset", [0, 5])
def test_a_wedge_in_float16_counts_as_empty(offset):
    y = degraded(molecule(SHAPE), wedge(SHAPE)) + offset
    map = mrc.Map(y.half().float(), 1.5)
    assert 0 < sampling_checks.missing_power(map, wedge(SHAPE))[0] < sampling_checks.LEAK_TO_NOTE
    settings = WedgeSettings()
    sampling_checks.check_wedge(map, wedge(SHAPE), settings, False, lambda line: pytest.fail(line))


@pytest.mark.parametrize(
    "axis, tilt, words",
    [
        ("x", 60, "Emptier is the region that --tilt-axis y --tilt-range -60 60 leaves out"),
        ("y", 40, "Emptier is the region that --tilt-axis y --tilt-range -60 60 leaves out"),
    ],
)
def test_measured_data_are_not_thrown_away_unless_told_to(axis, tilt, words):
    map = mrc.Map(degraded(molecule(SHAPE), wedge(SHAPE)), 1.5)
    settings = WedgeSettings(tilt_range=(-tilt, tilt), tilt_axis=axis)
    measured = settings.measured(map)
    with pytest.raises(ValueError, match=words):
        sampling_checks.check_wedge(map, measured, settings, False, silent)
    said = []
    sampling_checks.check_wedge(map, measured, settings, True, said.append)
    assert "% of the map's power" in said[0]


@pytest.mark.parametrize("given", [(-60, 60), (-40, 55), (-40, 50)])
def test_tilts_that_hold_nothing_are_said(given):
    shape = (32, 32, 32)
    map = mrc.Map(degraded(molecule(shape), wedge(shape, (-40, 50)), 0.05), 1.5)
    settings = WedgeSettings(tilt_range=given)
    said = []
    sampling_checks.check_wedge(map, settings.measured(map), settings, False, said.append)
    assert len(said) == (given != (-40, 50))
    assert all(line.startswith("warning") and "--tilt-range -40 50" in line for line in said)


def test_a_map_without_a_wedge_is_refused_and_a_crop_of_one_with_it_is_not():
    settings = WedgeSettings()
    map = mrc.Map(molecule(SHAPE), 1.5)
    with pytest.raises(ValueError, match="seems to have no missing wedge"):
        sampling_checks.check_wedge(map, wedge(SHAPE), settings, False, silent)

    # Noise fills the crop to its faces, where the wedge leaks.
    large = (64, 64, 64)
    cropped = degraded(molecule(large), wedge(large), 0.3)[16:48, 16:48, 16:48]
    said = []
    cropped = replace(map, density=cropped)
    sampling_checks.check_wedge(cropped, wedge(SHAPE), settings, False, said.append)
    assert "thrown away" in said[0]


# ---- Negative density


@pytest.mark.parametrize("sigma", [0.01, 0.02])
@pytest.mark.parametrize("share", [0, 1])
def test_negative_power_counts_signal_and_not_noise(sigma, share):
    truth = molecule(SHAPE) - 0.08 * share * bright_solvent(SHAPE)
    maps, powers, signal = half_maps(truth, sigma)
    clean = wiener(truth, powers[0], signal)
    wanted = float(clean.clamp(max=0).square().sum() / clean.square().sum())
    assert (wanted > sampling_checks.NEGATIVE_TO_REFUSE) == (share > 0)
    found = sampling_checks.negative_power(maps, powers, signal, 1.5)
    assert found == pytest.approx(wanted, abs=0.08)
    # One map is split by noise of the same power.
    found = sampling_checks.negative_power(maps[:1], powers[:1], signal, 1.5)
    assert found == pytest.approx(wanted, abs=0.08)


def test_hidden_signs_are_no_negative_power():
    # Two halves that share no signal: the sum of their product may be negative.
    a = random(SHAPE, 1)
    powers = [torch.full(SHAPE, 0.1)] * 2
    found = sampling_checks.negative_power([a, -a], powers, torch.ones(SHAPE[0] // 2), 1.5)
    assert found != found
    assert not found > sampling_checks.NEGATIVE_TO_REFUSE  # as sampling_half_maps.py asks


def test_a_filter_that_keeps_every_shell_keeps_the_fsc():
    maps, (noise, _), signal = half_maps(molecule(SHAPE), 0.3)
    assert not signal.all()  # shells of noise alone
    kept = sampling_checks.keeps_every_shell(noise, signal, 1.5)
    filtered = wiener(maps[0], noise, kept)
    ratio = fourier.fft3(filtered).abs() / fourier.fft3(maps[0]).abs()
    assert float(ratio.min()) == pytest.approx(0.02 / 1.02, rel=1e-3)


@pytest.mark.parametrize(
    "axis, words",
    [
        ("y", r"Emptier is the region that --tilt-range -60 60 leaves out \(0.0%\). To go on"),
        ("x", "--model scunet knows no other axis. To go on"),
    ],
)
def test_a_task_without_an_axis_to_set_is_not_told_to_set_one(axis, words):
    settings = NetworkWedgeSettings(tilt_range=(-40, 40))
    y = degraded(molecule(SHAPE), wedge(SHAPE, tilt_axis=axis))
    measured = settings.measured(mrc.Map(y, 1.5))
    with pytest.raises(ValueError, match=words) as caught:
        sampling_checks.check_wedge(mrc.Map(y, 1.5), measured, settings, False, silent)
    assert "--tilt-axis" not in str(caught.value)


@pytest.mark.parametrize("settings", [WedgeSettings, NetworkWedgeSettings])
def test_tilts_of_the_wrong_sign_are_named(settings):
    map = mrc.Map(degraded(molecule(SHAPE), wedge(SHAPE, (-40, 65))), 1.5)
    wrong = settings(tilt_range=(-65, 40))
    with pytest.raises(ValueError, match="--tilt-range -40 65, the other sign, leaves out"):
        sampling_checks.check_wedge(map, wrong.measured(map), wrong, False, silent)
