"""What sampling.py and its tasks promise, on good and on bad input."""

import gzip
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from made_maps import (
    bright_solvent,
    close,
    degraded,
    fft,
    filtered,
    molecule,
    names,
    prior_of,
    random,
    values,
    wedge,
    write_mrc,
)
from mrcfile.dtypes import HEADER_DTYPE
from test_sliding_windows import Uneven, dense
from torch import nn

import augment
import checkpoint
import degrade
import fourier
import fsc
import fsc_score
import mrc
import posterior
import report
import sampling
import sampling_half_maps
import sampling_tasks
import volume
import wedge_check
from classical import pocs, positive_wiener
from model_hdit import HDiT, HDiTConfig
from model_scunet import SCUNet, SCUNetConfig
from report import silent
from sampling_networks import sharpen, super_resolve
from sampling_prior import log_likelihood
from sampling_settings import (
    AnisotropicSettings,
    DenoiseSettings,
    LikelihoodSettings,
    NetworkSettings,
    WedgeSettings,
)

SHAPE = (16, 16, 16)
SMALL_HDIT = HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, patch_size=4)
SMALL_SCUNET = SCUNetConfig(width=16, depths=(1, 1, 2, 1, 1), d_head=8)
VOXEL_SIZE = {"sharpen": 1.0, "superres": 1.0, "wedge": 4.0}


@pytest.fixture(scope="module", autouse=True)
def without_matplotlib():
    """Drawing takes longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        yield


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A random network, every weight of which matters."""
    torch.manual_seed(0)
    net = HDiT(SMALL_HDIT)
    for weight in net.parameters():
        if not weight.any():  # HDiT starts as v = 0
            nn.init.normal_(weight, std=0.2)
    path = tmp_path_factory.mktemp("ckpt") / "random.pt"
    checkpoint.save(path, net, voxel_size=1.5, box=16, mean=0.04, std=0.09)
    return path


@pytest.fixture
def run(ckpt, tmp_path, monkeypatch):
    """run("wedge in.mrc", flags): the program in tmp_path on a small budget."""
    monkeypatch.chdir(tmp_path)

    def start(command, *flags):
        task, *words = command.split()
        argv = ["--task", task, "--ckpt", ckpt, *words, *flags]
        if task != "likelihood":
            argv[2:2] = ["--steps", 2, "--samples", 2]
        return sampling.main([str(word) for word in argv])

    return start


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """ask("sharpen in.mrc", net): the program with a function as CryoLVM's network."""
    monkeypatch.chdir(tmp_path)

    def start(command, net=None):
        task, *words = command.split()
        trained = sampling.TASKS["wedge --model scunet" if task == "wedge" else task].trained_for
        prior = prior_of(net or nn.Identity(), 12, "scunet", VOXEL_SIZE[task], 0, 1, trained)
        monkeypatch.setattr(checkpoint, "load", lambda *_, **__: prior)
        return sampling.main(["--task", task, "--model", "scunet", "--device", "cpu", *words])

    return start


class Seen(nn.Module):
    """A function as a network that keeps what it was shown."""

    def __init__(self, function):
        super().__init__()
        self.function, self.tiles = function, []

    def forward(self, tiles):
        self.tiles.append(tiles)
        return self.function(tiles)


@pytest.fixture
def small(tmp_path):
    """in.mrc is one tile, 16^3 voxels of 1.5 Å."""
    return write_mrc(tmp_path / "in.mrc", degraded(molecule(SHAPE), wedge(SHAPE)))


@pytest.fixture
def halves(tmp_path):
    """half1.mrc and half2.mrc, 16^3 voxels of 1.5 Å, and the truth of half1."""
    truth = molecule(SHAPE)
    write_mrc(tmp_path / "half1_truth.mrc", truth)
    maps = [truth + 0.1 * random(SHAPE, i) for i in (1, 2)]
    for i, x in enumerate(maps, 1):
        write_mrc(tmp_path / f"half{i}.mrc", x)
    return maps


def report_of(name):
    return json.loads(Path(f"{name}.json").read_text())


def same_header(path_1, path_2):
    with mrcfile.open(path_1) as a, mrcfile.open(path_2) as b:
        statistics = {"dmin", "dmax", "dmean", "rms", "label", "nlabl"}
        for name in set(HEADER_DTYPE.names) - statistics:
            assert a.header[name].tobytes() == b.header[name].tobytes(), name
        assert b.data.dtype == np.float32
        assert a.header.label[:2].tobytes() == b.header.label[:2].tobytes()
        assert b"sampling.py" in b.header.label[2]
    assert mrcfile.validate(path_2)


# ---- The missing wedge


@pytest.mark.parametrize(
    "shape, voxel_size, axes, tilt_axis",
    [
        ((20, 24, 28), (1.6, 1.4, 1.5), (2, 3, 1), "y"),
        ((21, 15, 19), (2.0, 2.0, 2.0), (1, 2, 3), "x"),
    ],
)
def test_a_restored_map_is_the_input_with_its_wedge_filled(
    run, capsys, shape, voxel_size, axes, tilt_axis
):
    truth = molecule(shape, voxel_size, 4.0)
    measured = wedge(shape, (-50, 60), tilt_axis, voxel_size)
    write_mrc("in.mrc", 50 * degraded(truth, measured), voxel_size, axes)
    write_mrc("in_truth.mrc", truth, voxel_size, axes)  # found by its name
    assert run(f"wedge in.mrc --tilt-range -50 60 --tilt-axis {tilt_axis} --method prior") == 0
    same_header("in.mrc", "in_wedge.mrc")
    same_header("in.mrc", "in_wedge_std.mrc")

    x, y = fft(values("in_wedge.mrc")), fft(values("in.mrc"))
    assert close(x[measured], y[measured])
    power = y[measured].abs().square().mean()
    assert x[~measured].abs().square().mean() > 0.01 * power

    report = report_of("in_wedge")
    assert report["settings"]["tilt_range"] == [-50, 60]
    assert report["settings"]["seed"] == 0
    assert report["steps"] == 2
    assert report["checkpoint_sha256"] == checkpoint.load(report["settings"]["ckpt"]).sha256
    assert list(report["fsc"]) == ["input", "POCS", "restored", "posterior mean"]
    printed = capsys.readouterr().out
    for name, score in report["fsc"].items():
        assert f"  {name:27} {score['auc']:8.3f}" in printed
    restored = values("in_wedge.mrc")
    for key, region in (("auc", None), ("auc_missing", ~measured)):
        curve = fsc.fsc(restored, truth, region, voxel_size=voxel_size)
        assert report["fsc"]["restored"][key] == pytest.approx(float(fsc.auc(curve)), abs=1e-6)
    # fsc.py says the same.
    fsc_score.main(["in_wedge.mrc", "--truth", "in_truth.mrc", "-o", "check", "--quiet"])
    found = report["fsc"]["restored"]["fsc_05"]
    assert found == pytest.approx(report_of("check")["unmasked"]["resolution_05"], rel=1e-4)


def test_mean_and_spread_are_those_of_samples_that_depend_on_seed_and_number_alone(
    small, run, ckpt
):
    map, prior = mrc.read_map(small), checkpoint.load(ckpt)
    settings = WedgeSettings(noise=0.05, steps=2)
    observation, _ = sampling_tasks.observe_wedge(map, prior, settings)
    sampler = posterior.WEDGE["prior"] | {"steps": 2}
    draw = posterior.draw_samples
    samples = torch.stack(list(draw(prior, observation, sampler, samples=3, seed=4)))
    (first,) = draw(prior, observation, sampler, samples=1, seed=4)
    assert close(samples[0], first)  # other batches round otherwise
    assert not close(samples[0], samples[1], 1e-2)
    run("wedge in.mrc --samples 3 --seed 4 --noise 0.05 --method prior")
    factor = torch.tensor(report_of("in_wedge")["fill_factor"]["prior"])
    mean = wedge_check.scale_missing(samples.mean(0), wedge(SHAPE), factor, 1.5)
    assert close(values("in_wedge.mrc"), fourier.put_back(mean, map.density, wedge(SHAPE)))
    assert close(values("in_wedge_mean.mrc"), mean)
    assert close(values("in_wedge_std.mrc"), samples.std(0))


def test_the_largest_noise_is_not_refused_in_the_test_on_hidden_tilts(small, run):
    # Hidden tilts lower the maximum, so that there the noise is more than 10 times it.
    run("wedge in.mrc --samples 2 --noise 10 --method prior")
    assert report_of("in_wedge")["noise"] == 10


def test_the_function_gives_what_the_program_writes(small, run, ckpt):
    run("wedge in.mrc --seed 1 --tilt-range -60 65")
    settings = WedgeSettings(tilt_range=(-60, 65), seed=1, steps=2, samples=2)
    map, prior = mrc.read_map("in.mrc"), checkpoint.load(ckpt)
    result = sampling.restore_wedge(map, prior, settings, say=lambda line: None)
    assert torch.equal(result.maps[""].density, values("in_wedge.mrc"))


def test_a_seed_fixes_every_byte_and_another_seed_gives_another_map(small, run):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(f"wedge in.mrc --seed {seed} -o {name}.mrc --method prior")
    a, b, c = (Path(f"{name}.mrc").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert Path("a_std.mrc").read_bytes() == Path("b_std.mrc").read_bytes()


def test_the_grey_scale_of_the_input_is_kept(small, run):
    write_mrc("big.mrc", 1024 * values(small))  # a power of two: the same rounding everywhere
    for name in ("in", "big"):
        run(f"wedge {name}.mrc --method prior")
    for end in ("", "_std"):
        assert close(values(f"big_wedge{end}.mrc"), 1024 * values(f"in_wedge{end}.mrc"))


@pytest.mark.parametrize("voxel_size, side", [(1.5, 24), (1.0, 36), (2.0, 18), (2.6, 16)])
def test_any_voxel_size_is_restored_on_its_own_grid_and_its_noise_is_found(
    run, ckpt, voxel_size, side
):
    shape, size = (side,) * 3, (voxel_size,) * 3
    y = degraded(molecule(shape, size, 3.0), wedge(shape), noise=0.2)
    write_mrc("in.mrc", y, size)
    run("wedge in.mrc --samples 1 --steps 1 --method prior")
    assert values("in_wedge.mrc").shape == shape
    assert "in_wedge_std.mrc" not in names(Path())
    maximum = volume.positive_maximum(y)
    assert report_of("in_wedge")["noise"] * maximum == pytest.approx(0.2, rel=0.25)

    # Resampling keeps |F|^2 / n^2 of every coefficient, n voxels: for white noise variance / n.
    map, prior = mrc.read_map("in.mrc"), checkpoint.load(ckpt)
    observation, _ = sampling_tasks.observe_wedge(map, prior, WedgeSettings())
    sigma = float(observation.sigma) * prior.std * observation.scale.maximum
    assert sigma**2 / observation.y.numel() == pytest.approx(0.2**2 / side**3, rel=0.5)


def test_pocs_is_a_method_and_the_answer_where_voxels_are_too_coarse(small, run, capsys):
    run("wedge in.mrc --method pocs")
    factor = torch.tensor(report_of("in_wedge")["fill_factor"]["POCS"])
    answer = pocs(values(small), wedge(SHAPE))
    want = wedge_check.scale_missing(answer, wedge(SHAPE), factor, 1.5)
    assert close(values("in_wedge.mrc"), want)
    capsys.readouterr()
    run("wedge in.mrc --voxel-size 9 -o coarse.mrc --grey-scale 2 --noise 0.1")
    assert report_of("coarse")["method"] == "pocs"
    # The fixture gives two of these flags.
    said = capsys.readouterr().out
    assert "--samples, --steps, --grey-scale: not used by method pocs" in said
    assert "--noise: not used by method pocs on coarse voxels" in said


def test_a_wrong_filling_fades_out_and_auto_takes_pocs_instead(small, run, monkeypatch, capsys):
    # A prior that answers with noise as strong as the map.
    def noise(prior, observation, sampler, moments, samples, seed, tick):
        for _ in range(samples):
            moments.add(observation.to_map(random(observation.y.shape, seed % 1000)))

    monkeypatch.setattr(posterior, "add_samples", noise)
    write_mrc("in_truth.mrc", molecule(SHAPE))
    run("wedge in.mrc --method prior -o prior.mrc")
    whole = {name: score["auc"] for name, score in report_of("prior")["fsc"].items()}
    # Noise at full strength in the wedge costs .09. Chance in the few coefficients of this box
    # leaves .02 of it.
    assert whole["restored"] > whole["input"] - 0.04

    capsys.readouterr()
    run("wedge in.mrc")
    assert "POCS was better in this test" in capsys.readouterr().out
    run("wedge in.mrc --method pocs -o pocs.mrc")
    assert report_of("in_wedge")["method"] == "pocs"
    assert close(values("in_wedge.mrc"), values("pocs.mrc"))


# ---- Half maps


def test_half_maps_are_restored_apart_and_their_mean_is_the_result(run, halves, ckpt):
    run("denoise half1.mrc half2.mrc")
    restored = [values(f"half_mean_denoise_half{i}.mrc") for i in (1, 2)]
    assert close((restored[0] + restored[1]) / 2, values("half_mean_denoise.mrc"))

    # Of half 1, half 2 knows nothing but its noise.
    a, b = halves
    power = degrade.noise_power(b, a)
    sigma = (degrade.expand_shells(power, SHAPE) / b.numel()).sqrt()
    prior, everywhere = checkpoint.load(ckpt), torch.ones(SHAPE, dtype=torch.bool)

    observation = posterior.observe(prior, b, everywhere, sigma, positive_wiener)
    sampler = posterior.DENOISE["prior"] | {"steps": 2}
    samples = posterior.draw_samples(prior, observation, sampler, samples=2, seed=augment.HELD_OUT)
    assert close(torch.stack(list(samples)).mean(0), restored[1], 1e-4)


def test_auto_writes_the_filter_if_the_halves_expect_more_of_it(run, halves, monkeypatch, capsys):
    # A prior that answers with noise.
    def noise(prior, observation, sampler, moments, pooled, samples, seed, tick):
        generator = torch.Generator().manual_seed(seed % 1000)
        for found in (moments, pooled):
            found.add(torch.randn(SHAPE, generator=generator))

    monkeypatch.setattr(posterior, "add_samples", noise)
    Path("half1_truth.mrc").unlink()
    maps = "denoise half1.mrc half2.mrc"
    run(f"{maps} -o wiener.mrc --method wiener")
    run(f"{maps} -o prior.mrc --method prior")
    assert "better than the result (restored)" in capsys.readouterr().out
    run(f"{maps} -o auto.mrc")
    assert "is written, and --method prior writes the other" in capsys.readouterr().out
    assert close(values("auto.mrc"), values("wiener.mrc"))
    assert report_of("auto")["method"] == "wiener"
    assert list(report_of("auto")["expected_auc"])[-2:] == ["prior", "Wiener, positive"]


def test_likelihood_takes_a_given_background(small, run):
    write_mrc("offset.mrc", values(small) + 3)
    top = float(volume.top_value(values(small), 99.999))
    run(f"likelihood in.mrc --grey-scale {top} 0 --probes 2")
    run(f"likelihood offset.mrc --grey-scale {top} 3 --probes 2")
    first, second = (report_of(f"{name}_likelihood") for name in ("in", "offset"))
    # To what the solver tolerates.
    assert first["nats_per_voxel"] == pytest.approx(second["nats_per_voxel"], rel=0.05)


def test_a_truth_whose_sign_is_not_clear_has_that_of_the_input(run):
    # As much bright as dark in the truth; the input lost some of what is bright.
    truth = molecule(SHAPE) - molecule(SHAPE).flip(0)
    write_mrc("in.mrc", filtered(truth, wedge(SHAPE)).clamp(max=0.5))
    write_mrc("in_truth.mrc", truth)
    run("wedge in.mrc --method pocs --discard-measured --invert")
    assert report_of("in_wedge")["fsc"]["input"]["auc"] > 0.3


def test_a_sign_that_contradicts_the_map_comes_with_a_warning(run, capsys):
    write_mrc("in.mrc", filtered(molecule(SHAPE), wedge(SHAPE)))
    run("wedge in.mrc --method pocs --invert")
    said = capsys.readouterr().out
    assert "protein of in.mrc looks bright, but --invert was given" in said
    run("wedge in.mrc --method pocs --no-invert -o plain.mrc")
    assert "looks" not in capsys.readouterr().out


def test_no_resolution_is_printed_beyond_the_box(small, run, capsys):
    write_mrc("truth.mrc", molecule(SHAPE).roll(8, 0))
    run("wedge in.mrc --method pocs --truth truth.mrc")
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("with truth.mrc"))
    assert all("> 24.00 Å" in line for line in lines[first + 1 : first + 4])


def test_the_grey_scale_of_the_prior_is_not_said_of_a_wiener_filter(run, halves, capsys):
    for method in ("wiener", "prior"):
        run(f"denoise half1.mrc half2.mrc -o {method}.mrc --method {method}")
        said = "protein would reach" in capsys.readouterr().out
        assert said == (method == "prior")


def test_half_maps_share_no_noise_of_the_sampler(run, halves, monkeypatch):
    seeds = []

    def draw_samples(prior, observation, settings, *, seed, **_):
        seeds.append(seed)
        yield torch.zeros(SHAPE)

    monkeypatch.setattr(posterior, "draw_samples", draw_samples)
    run("denoise half1.mrc half2.mrc --samples 1")
    first, second = (torch.randn(9, generator=augment.item_generator(seed, 0)) for seed in seeds)
    assert not torch.equal(first, second)


def test_one_map_is_denoised_by_a_curve_of_fsc_py_or_by_a_ratio(run, halves):
    rows = [f"{k},{k / 24},{24 / max(k, 1)},0.1,0.5" for k in range(9)]
    header = "shell,per_angstrom,angstrom,corrected,unmasked"
    Path("curve.csv").write_text("\n".join([header, *rows]) + "\n")
    run("denoise half1.mrc --noise-from-fsc curve.csv -o a.mrc")
    run("denoise half1.mrc --snr 2 -o b.mrc")  # FSC 0.5: each half 1, their mean 2
    run("denoise half1.mrc --snr 9 -o c.mrc")
    a, b, c = (values(f"{name}.mrc") for name in "abc")
    assert torch.equal(a, b)
    assert (c - halves[0]).norm() < (b - halves[0]).norm()  # less noise, nearer to the input


def test_the_fsc_of_the_halves_gives_the_noise_of_their_mean_whatever_the_box(run):
    truth = molecule((24, 32, 40))
    a, b = (truth + 0.1 * random(truth.shape, i) for i in (1, 2))
    for name, x in (("a.mrc", a), ("b.mrc", b), ("mean.mrc", (a + b) / 2)):
        write_mrc(name, x)
    fsc_score.main(["a.mrc", "b.mrc", "-o", "curve", "--quiet"])
    mean = mrc.read_map("mean.mrc")
    settings = sampling.read_files(DenoiseSettings(noise_from_fsc="curve.csv"), mean, {})
    (power,), _ = sampling_half_maps.noise_of_half_maps([mean], settings)
    # E|F n|^2 of the mean is N 0.1^2 / 2 in every shell; large shells find it within 10 %.
    assert float((power / (truth.numel() * 0.005) - 1)[8:].abs().max()) < 0.1


@pytest.mark.parametrize("shape, sides", [(SHAPE, (1.5, 1.5, 1.5)), ((24, 16, 20), (1.5, 2, 1.2))])
def test_half_maps_have_the_resolution_that_fsc_py_finds(run, shape, sides):
    truth = molecule(shape, sides)
    for i in (1, 2):
        write_mrc(f"a{i}.mrc", truth + 0.2 * random(shape, i), sides)
    run("denoise a1.mrc a2.mrc")
    found = report_of("a_mean_denoise")
    for name, stem in (("given", "a"), ("restored", "a_mean_denoise_half")):
        fsc_score.main([f"{stem}1.mrc", f"{stem}2.mrc", "-o", name])
        wanted = report_of(name)["unmasked"]
        assert found[f"halves_{name}_0143"] == pytest.approx(wanted["resolution_0143"], rel=1e-4)
        assert found[f"halves_{name}_auc"] == pytest.approx(wanted["auc"], abs=1e-4)


def test_anisotropic_noise_comes_from_a_tilt_range_or_from_orientations(run, halves):
    angles = [f"{30 * i} 90 {5 * i}" for i in range(12)]  # side views only: all see kz
    Path("angles.txt").write_text("\n".join(["# rot tilt psi", *angles]))
    maps = "half1.mrc half2.mrc"
    run(f"anisotropic {maps} -o tilt.mrc --tilt-range -45 45")
    run(f"anisotropic {maps} -o angles.mrc --orientations angles.txt")
    run(f"anisotropic {maps} -o one.mrc --tilt-range -60 60 --alpha 1")
    run(f"denoise {maps} -o same.mrc")
    tilt, angles, one = (values(f"{name}.mrc") for name in ("tilt", "angles", "one"))
    assert close(one, values("same.mrc"), 1e-4)  # alpha 1 is isotropic
    # A Wiener filter by direction is an answer of its own.
    assert "Wiener" in report_of("tilt")["expected_auc"]
    assert not close(tilt, one, 1e-2)
    assert not close(angles, tilt, 1e-2)


def test_negative_density_gets_the_classical_answer_without_clamps(run, capsys):
    shape = (32, 32, 32)
    truth = molecule(shape) - 0.08 * bright_solvent(shape)
    halves = [truth + 0.02 * random(shape, i) for i in (1, 2)]
    for i, x in enumerate(halves, 1):
        write_mrc(f"a{i}.mrc", x)
    run("denoise a1.mrc a2.mrc")
    report = report_of("a_mean_denoise")
    assert report["method"] == "wiener"
    share = float(truth.clamp(max=0).square().sum() / truth.square().sum())
    assert report["negative_power"] == pytest.approx(share, abs=0.1)
    said = capsys.readouterr().out
    assert "of the signal's power is negative density" in said
    # The fixture gives these flags.
    assert "--samples, --steps: not used by method wiener" in said

    # In every shell it is the average times one number.
    restored = values("a_mean_denoise.mrc")
    average = fsc.auc(fsc.fsc(sum(halves) / 2, truth))
    assert float(fsc.auc(fsc.fsc(restored, truth))) == pytest.approx(float(average), abs=0.01)
    positive = fsc.auc(fsc.fsc(restored.clamp(min=0), truth))
    assert float(positive) < float(average) - 0.05
    run("denoise a1.mrc a2.mrc --method prior -o prior.mrc")
    assert report_of("prior")["method"] == "prior"


@pytest.mark.parametrize(
    "shape, voxel_size", [((44, 52, 40), (1.1, 1.1, 1.1)), ((16, 24, 30), (3.0, 1.5, 1.2))]
)
@pytest.mark.parametrize("orientations", [None, torch.eye(3)[None]])
def test_noise_per_shell_reaches_the_priors_grid_by_spatial_frequency(
    shape, voxel_size, orientations
):
    settings = AnisotropicSettings(tilt_range=(-45, 45), orientations=orientations)
    half = mrc.Map(molecule(shape, voxel_size), voxel_size)
    shells = shape[2] // 2
    power = 1.3 ** -torch.arange(shells, dtype=torch.float64)
    prior = prior_of(nn.Identity(), 16)
    observation = sampling_half_maps.observe_half_map(half, power, prior, settings)

    # Shell k begins at k / side of the x axis, whatever the voxels. n'^2 / n^2: resampling.
    work = mrc.resample_map(half, 1.5)
    k = [np.fft.fftfreq(n, v) for n, v in zip(work.density.shape, work.voxel_size)]
    frequency = np.sqrt(sum(axis**2 for axis in np.meshgrid(*k, indexing="ij")))
    shell = (frequency * shape[2] * voxel_size[2] + 1e-9).astype(int)
    noise = (observation.sigma * observation.scale.maximum * prior.std).double() ** 2
    found = noise * work.density.numel() * (half.density.numel() / work.density.numel()) ** 2
    for i in range(min(shells, work.density.shape[2] // 2)):
        assert float(found[shell == i].mean()) == pytest.approx(float(power[i]), rel=1e-4)
    assert float(found[shell == 5].max() / found[shell == 5].min()) > 10  # it has a direction


# ---- Masks


@pytest.mark.parametrize("command", ["wedge in.mrc", "denoise half1.mrc half2.mrc"])
def test_outside_of_a_mask_the_input_is_kept(small, run, halves, command):
    mask = torch.zeros(SHAPE)
    mask[4:12] = 1
    mask[3] = 0.5
    write_mrc("mask.mrc", mask)
    run(f"{command} -o all.mrc")
    run(f"{command} -o masked.mrc --mask mask.mrc")
    before = values(small) if "wedge" in command else sum(halves) / 2
    full, masked = values("all.mrc"), values("masked.mrc")
    assert torch.equal(masked[12:], before[12:])
    assert torch.equal(masked[4:12], full[4:12])
    assert close(masked[3], (before[3] + full[3]) / 2)


def test_a_mask_counts_in_what_is_expected_and_in_the_standard_deviation(run, halves, capsys):
    mask = torch.zeros(SHAPE)
    mask[4:12] = 1
    write_mrc("mask.mrc", mask)
    run("denoise half1.mrc half2.mrc --mask mask.mrc --method prior --background 0")
    written = [values(f"half_mean_denoise_half{i}.mrc") for i in (1, 2)]
    found = report_of("half_mean_denoise")
    expected = report.expected_auc(halves, {"restored": written}, 1.5)
    assert found["expected_auc"]["restored"] == pytest.approx(expected["restored"], abs=1e-5)
    curve = fsc.fsc(*written)[1:]
    assert found["fsc_of_restored_halves"] == pytest.approx(curve.tolist(), abs=1e-5)
    assert found["std_outside_mask"] == 0
    assert not values("half_mean_denoise_std.mrc")[mask == 0].any()
    assert "_std and _snr are 0 outside of --mask" in capsys.readouterr().out


def test_scores_are_those_of_the_masked_maps(run):
    truth, mask = molecule(SHAPE), torch.zeros(SHAPE)
    mask[0] = 1
    for name, x in (("in", truth + 0.1 * random(SHAPE, 1)), ("truth", truth), ("mask", mask)):
        write_mrc(f"{name}.mrc", x)
    run("wedge in.mrc --mask mask.mrc --truth truth.mrc --discard-measured")
    wanted = float(fsc.auc(fsc.fsc(values("in_wedge_mean.mrc"), truth)))
    found = report_of("in_wedge")["fsc"]["posterior mean"]["auc"]
    assert found == pytest.approx(wanted, abs=1e-4)


# ---- The prior by itself


@pytest.mark.parametrize("box", [16, 24])
def test_generated_maps_depend_on_seed_and_number_alone(run, box):
    run(f"generate --box {box} --seed 5")
    run(f"generate --box {box} --seed 5 --samples 1 -o again.mrc")
    run(f"generate --box {box} --seed 6 --samples 1 -o other.mrc")
    first = values("generate.mrc")
    assert first.shape == (box,) * 3
    assert mrcfile.validate("generate.mrc")
    assert close(first, values("again.mrc"), 1e-4)  # other batches round otherwise
    assert not close(first, values("generate_2.mrc"), 0.1)
    assert not close(first, values("other.mrc"), 0.1)
    report = report_of("generate")
    assert report["output"] == ["generate.mrc", "generate_2.mrc"]
    assert report["steps"] == 2


def test_the_likelihood_of_an_untrained_network_is_that_of_white_noise():
    prior = prior_of(HDiT(SMALL_HDIT).eval(), 16)  # v = 0: p_0 is p_1
    truth = molecule((16, 20, 16))
    map = mrc.Map(7 * truth, 1.5)  # its scale does not matter
    said = []
    result = log_likelihood(map, prior, LikelihoodSettings(), said.append)
    x = volume.normalise(truth, 0.04, 0.09)[0].double()
    padded = torch.full((16, 32, 16), -0.04 / 0.09).double()
    padded[:, :20] = x

    def log_p(x):
        constant = 0.5 * math.log(2 * math.pi) + math.log(0.09)
        return float(-0.5 * x.square().sum()) - x.numel() * constant

    # What raises it, and what it may be compared with, is said.
    assert any(line.startswith("38% of the voxels of these tiles are solvent") for line in said)
    assert any("by the prior of 1.5 Å" in line for line in said)
    out, report = result.densities[""], result.report
    assert report["nats"] == pytest.approx(log_p(padded), rel=1e-5)
    assert report["standard_error"] == 0
    assert out.shape == truth.shape
    (first,) = out[:, :16].unique().tolist()
    assert first == pytest.approx(log_p(padded[:, :16]) / 16**3, rel=1e-5)
    assert float(out[0, 17, 0]) == pytest.approx(log_p(padded[:, 16:]) / 16**3, rel=1e-5)


def test_a_constant_offset_does_not_change_the_likelihood():
    # Solvent whose level lies a little off 0, where log p is steep because x is clipped at 0.
    prior = prior_of(HDiT(SMALL_HDIT).eval(), 16)
    density = molecule((16, 16, 16)) + 0.05 * random((16, 16, 16)) + 0.01
    nats = []
    for offset in (0, 5):
        said = []
        map = mrc.Map(density + offset, 1.5)
        result = log_likelihood(map, prior, LikelihoodSettings(), said.append)
        nats.append(result.report["nats"])
        assert not [line for line in said if "as given" in line]
    assert nats[0] == pytest.approx(nats[1], rel=1e-5)


# ---- Fine-tuned networks


def clipped(x, percentile=99.999):
    return x.clamp(0, float(np.percentile(x.numpy(), percentile)))


@pytest.mark.parametrize("shape, axes", [((13, 10, 15), (2, 3, 1)), ((16, 12, 14), (1, 2, 3))])
def test_sharpening_by_the_identity_clips_the_map_and_keeps_header_and_grey_scale(ask, shape, axes):
    y = 50 * molecule(shape, (1.0,) * 3) + random(shape)
    write_mrc("in.mrc", y, (1.0,) * 3, axes)
    assert ask("sharpen in.mrc") == 0
    assert close(values("in_sharpen.mrc"), clipped(y), 1e-6)
    same_header("in.mrc", "in_sharpen.mrc")
    ask("sharpen in.mrc --percentile 90 -o 90.mrc")
    assert close(values("90.mrc"), clipped(y, 90), 1e-6)
    report = report_of("in_sharpen")
    found = [report[name] for name in ("stride", "fusion", "percentile", "box")]
    assert found == [12, "gaussian", 99.999, list(shape)]


@pytest.mark.parametrize("task", [sharpen, super_resolve])
def test_a_map_is_clipped_to_the_percentiles_that_the_network_was_trained_with(task):
    y = 50 * molecule((24, 24, 24), (1.0,) * 3) + random((24, 24, 24))
    network = prior_of(Seen(lambda tiles: tiles), 24, "scunet", 1.0, 0, 1, "sharpen")
    network = replace(network, percentiles=(1.0, 99.0))
    settings = NetworkSettings(background=0.0, invert=False)
    result = task(mrc.Map(y, 1.0), network, settings, silent)
    bottom, top = np.percentile(y.numpy(), (1, 99))
    clipped = y.clamp(bottom, top)
    assert close(network.net.tiles[0][0, 0], (clipped - bottom) / (top - bottom), 1e-5)
    # The identity gives the clipped map back.
    assert close(result.densities[""], clipped, 1e-5)


@pytest.mark.parametrize("task", ["sharpen", "superres"])
def test_a_network_that_changes_what_it_should_keep_gets_a_warning(ask, capsys, task):
    y = molecule((32, 32, 32), (1.0,) * 3)
    write_mrc("in.mrc", y, (1.0,) * 3)
    for name, net in (("kept", lambda x: x), ("changed", lambda x: x.roll(3, -1))):
        ask(f"{task} in.mrc -o {name}.mrc", Seen(net))
        out = capsys.readouterr().out
        assert ("warning: between 5 and 10 Å" in out) == (name == "changed")
    kept = report_of("kept")["fsc_with_input_5_to_10"]
    assert kept == pytest.approx(1, abs=0.01)


def test_super_resolution_keeps_the_grey_scale_of_what_map_and_answer_share(ask):
    y = molecule((24, 24, 24), (1.0,) * 3)
    write_mrc("in.mrc", y, (1.0,) * 3)
    ask("superres in.mrc", Seen(lambda tiles: tiles / 7))
    assert close(values("in_superres.mrc"), clipped(y), 1e-4)
    assert report_of("in_superres")["grey_scale_factor"] == pytest.approx(7, rel=1e-4)


@pytest.mark.parametrize("task", ["sharpen", "superres"])
@pytest.mark.parametrize("background, sign", [(0.5, 1), (105, 1), (0, -1), (3, -1)])
def test_background_and_sign_are_found_said_and_given_back(ask, capsys, task, background, sign):
    y = molecule((24, 24, 24), (1.0,) * 3)
    write_mrc("in.mrc", sign * y + background, (1.0,) * 3)
    ask(f"{task} in.mrc")
    # The identity as network returns the map, but for what it clips.
    found = values(f"in_{task}.mrc")
    assert close(sign * (found - background), clipped(y), 1e-4)
    report = report_of(f"in_{task}")
    assert report["background"] == pytest.approx(background, abs=1e-4)
    assert report["sign"] == sign
    out = capsys.readouterr().out
    assert ("found and subtracted" in out) == (background != 0)
    assert ("protein is dark: inverted" in out) == (sign < 0)


def test_a_wedge_is_filled_the_same_whatever_the_grey_scale(run):
    # Multiples of 1/1024 and a power of two: the same rounding everywhere.
    y = (degraded(molecule(SHAPE), wedge(SHAPE)) * 1024).round() / 1024
    write_mrc("in.mrc", y)
    write_mrc("other.mrc", 40 - 8 * y)
    for name in ("in", "other"):
        background = 0 if name == "in" else 40
        run(f"wedge {name}.mrc --noise 0.05 --background {background} --method prior")
    for end in ("", "_mean"):
        want = values(f"in_wedge{end}.mrc")
        assert close((40 - values(f"other_wedge{end}.mrc")) / 8, want)
    # A standard deviation has no background and no sign.
    assert close(values("other_wedge_std.mrc") / 8, values("in_wedge_std.mrc"))


def test_a_given_grey_scale_is_that_of_the_network_and_of_the_report(run, halves, capsys):
    write_mrc("in.mrc", degraded(molecule(SHAPE), wedge(SHAPE)) + 40)
    run("wedge in.mrc --grey-scale 2.5 40 --method prior")
    report = report_of("in_wedge")
    assert (report["maximum"], report["maximum_error"], report["spectrum"]) == (2.5, 0, None)
    assert report["background"] == 40
    assert "protein would reach 2.5 above solvent, as given" in capsys.readouterr().out

    # It changes the result. Half maps have one each.
    given = values("in_wedge_mean.mrc")
    run("wedge in.mrc -o other.mrc --background 40 --method prior")
    assert not close(values("other_mean.mrc"), given, 1e-3)
    run("denoise half1.mrc half2.mrc --grey-scale 3")
    assert report_of("half_mean_denoise")["maximum"] == [3, 3]


@pytest.mark.parametrize("task", ["wedge in.mrc", "likelihood in.mrc"])
def test_a_grey_scale_far_from_the_map_is_refused_or_gets_a_warning(run, task, capsys):
    write_mrc("in.mrc", degraded(molecule(SHAPE), wedge(SHAPE)))
    if "likelihood" in task:
        task += " --probes 2 --tolerance 10"
    for maximum in ("1e30", "1e-30"):
        with pytest.raises(ValueError, match="in.mrc: --grey-scale .* give another MAX"):
            run(f"{task} --grey-scale {maximum} 0")
    run(f"{task} --grey-scale 50 0")
    assert "warning: --grey-scale 50" in capsys.readouterr().out
    name = task.split()[0]
    (warning,) = report_of(f"in_{name}")["warnings"]
    assert warning.startswith("--grey-scale 50")
    run(f"{task} --grey-scale 2 0 -o usual.mrc")
    assert not report_of("usual")["warnings"]


def test_networks_of_one_pass_take_a_given_grey_scale(ask):
    y = molecule((24, 24, 24), (1.0,) * 3)
    write_mrc("in.mrc", y, (1.0,) * 3)
    seen = Seen(lambda tiles: tiles)
    ask("sharpen in.mrc --grey-scale 20", seen)
    assert report_of("in_sharpen")["maximum"] == 20
    # Nothing is clipped at 20, so the identity returns all density above 0.
    assert close(values("in_sharpen.mrc"), y.clamp(min=0), 1e-4)


@pytest.mark.parametrize("words", ["0", "-1", "nan", "1 2 3", "1 2 --background 2"])
def test_a_grey_scale_that_cannot_be_is_refused(words):
    with pytest.raises(ValueError, match="--grey-scale"):
        sampling.parse(["--task", "wedge", "in.mrc", "--grey-scale", *words.split()])


def test_a_dark_truth_scores_as_a_bright_one(run):
    y, truth = degraded(molecule(SHAPE), wedge(SHAPE)), molecule(SHAPE)
    write_mrc("bright.mrc", y)
    write_mrc("dark.mrc", -y)
    scores = []
    for name, sign in (("bright", 1), ("dark", -1)):
        write_mrc(f"{name}_truth.mrc", sign * truth)
        run(f"wedge {name}.mrc")
        scores.append(report_of(f"{name}_wedge")["fsc"]["restored"]["auc"])
    assert scores[0] > 0 and scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_half_maps_are_brought_to_one_grey_scale(run, halves, capsys):
    run("denoise half1.mrc half2.mrc -o plain.mrc --background 0")
    write_mrc("other.mrc", 10 * values("half2.mrc"))
    capsys.readouterr()
    run("denoise half1.mrc other.mrc -o matched.mrc --background 0")
    assert "times the grey scale of half map 1: brought to it" in capsys.readouterr().out
    # The ratio of two noisy maps' amplitudes is known to some per cent.
    assert close(values("matched.mrc"), values("plain.mrc"), 0.1)


def test_the_network_sees_its_own_voxel_size_and_values_from_0_to_1(ask):
    y, net = 7 * molecule((12, 12, 12), (2.0,) * 3) - 0.5, Seen(lambda tiles: 1 - tiles)
    for name, unit in (("in", 1), ("big", 1024)):  # a power of two: the same rounding everywhere
        write_mrc(f"{name}.mrc", unit * y, (2.0,) * 3)
        ask(f"sharpen {name}.mrc --background 0", net)  # so that -0.5 is clipped
    fine = clipped(fourier.resample(y, (24, 24, 24)))
    top = float(fine.max())
    corners = list(itertools.product((0, 12), repeat=3))
    first, second = torch.cat(net.tiles)[:, 0].chunk(2)
    assert torch.equal(first, second)
    assert close(first, volume.cut_tiles(fine / top, corners, 12))
    assert close(values("in_sharpen.mrc"), fourier.resample(top - fine, (12, 12, 12)))
    assert torch.equal(values("big_sharpen.mrc"), 1024 * values("in_sharpen.mrc"))
    assert mrc.read_map("in_sharpen.mrc").voxel_size == (2.0,) * 3


@pytest.mark.parametrize(
    "flags, stride, fusion", [("", 12, "gaussian"), ("--stride 5 --fusion mean", 5, "mean")]
)
def test_stride_and_fusion_are_those_of_the_flags(ask, flags, stride, fusion):
    y = molecule((16, 13, 12), (1.0,) * 3)
    write_mrc("in.mrc", y, (1.0,) * 3)
    ask(f"sharpen in.mrc {flags}", Uneven())
    y = clipped(y)
    top = float(y.max())
    assert close(values("in_sharpen.mrc"), top * dense(Uneven(), y / top, 12, stride, fusion))


@pytest.mark.parametrize(
    "voxel_size, side, networks", [(1.5, 16, 24), (2.0, 13, 26), (1.0, 13, 13), (0.5, 26, 13)]
)
def test_super_resolution_is_on_the_finer_of_the_two_grids(ask, voxel_size, side, networks):
    y = molecule((side,) * 3, (voxel_size,) * 3)
    write_mrc("in.mrc", y, (voxel_size,) * 3)
    ask("superres in.mrc")
    before, after = mrc.read_map("in.mrc"), mrc.read_map("in_superres.mrc")
    finer = max(side, networks)
    assert after.density.shape == (finer,) * 3
    assert mrcfile.validate("in_superres.mrc")
    assert after.voxel_size == pytest.approx([v * side / finer for v in before.voxel_size])
    assert after.corner == pytest.approx(before.corner)
    seen = clipped(fourier.resample(y, (networks,) * 3))
    assert close(after.density, fourier.resample(seen, (finer,) * 3), 2e-6)
    ask("sharpen in.mrc")
    assert values("in_sharpen.mrc").shape == (side,) * 3


def test_super_resolution_is_scored_on_the_grid_of_the_truth_and_masked_on_its_own(ask):
    y, truth = molecule((12, 12, 12), (2.0,) * 3, 5.0), molecule((24, 24, 24), (1.0,) * 3)
    write_mrc("in.mrc", y, (2.0,) * 3)
    for voxel_size, wanted in ((1.0, truth), (2.0, fourier.resample(truth, (12,) * 3))):
        write_mrc("truth.mrc", wanted, (voxel_size,) * 3)
        ask("superres in.mrc --truth truth.mrc --overwrite")
        report = report_of("in_superres")
        assert report["truth_voxel_size"] == [voxel_size] * 3
        assert report["voxel_size"] == [1.0] * 3
        for name, x in (("restored", values("in_superres.mrc")), ("input", y)):
            curve = fsc.fsc(fourier.resample(x, wanted.shape), wanted)
            assert report["fsc"][name]["auc"] == pytest.approx(float(fsc.auc(curve)), abs=1e-5)
    mask = torch.ones(12, 12, 12)
    mask[0] = 0.5
    write_mrc("mask.mrc", mask, (2.0,) * 3)
    ask("superres in.mrc --mask mask.mrc --overwrite", Seen(torch.zeros_like))
    soft = fourier.resample(mask, (24,) * 3).clamp(0, 1)
    assert close(values("in_superres.mrc"), (1 - soft) * fourier.resample(y, (24,) * 3))


@pytest.mark.parametrize("voxel_size, side", [(4.0, 16), (3.0, 16), (5.0, 14)])
def test_the_network_fills_the_wedge_and_what_was_measured_stays(ask, voxel_size, side):
    shape, size = (side,) * 3, (voxel_size,) * 3
    truth, measured = molecule(shape, size, 10.0), wedge(shape, (-50, 60))
    y = 9 * (filtered(truth, measured) + 0.05 * random(shape))  # noise in the wedge, too
    write_mrc("in.mrc", y, size)
    write_mrc("in_truth.mrc", truth, size)
    net = Seen(lambda tiles: tiles.clamp(max=0.5))
    ask("wedge in.mrc --tilt-range -50 60 --discard-measured --method network", net)
    shown_after_the_test = net.tiles[len(net.tiles) // 2]

    # The network sees the measured coefficients that both grids hold.
    n = round(side * voxel_size / 4)
    k = torch.fft.fftfreq(n) * n
    held = k.abs() < side / 2 if side < n else k == k
    known = wedge((n,) * 3, (-50, 60)) & held[:, None, None] & held[:, None] & held
    shown = clipped(filtered(fourier.resample(y, (n,) * 3), known))
    top = float(shown.max())
    first_tile = volume.pad(shown / top, 12)[:12, :12, :12]
    assert close(shown_after_the_test[0, 0], first_tile)
    alone = fourier.resample(shown.clamp(max=0.5 * top), shape)
    assert close(values("in_wedge_network.mrc"), alone)
    x = fft(values("in_wedge.mrc"))
    assert close(x[measured], fft(y)[measured])
    if n == side:
        factor = torch.tensor(report_of("in_wedge")["fill_factor"]["network"])
        want = wedge_check.scale_missing(alone, measured, factor, size)
        assert close(x[~measured], fft(want)[~measured])
    assert list(report_of("in_wedge")["fsc"]) == ["input", "POCS", "restored", "network"]


def test_detail_that_the_networks_grid_cannot_hold_comes_from_pocs(ask):
    shape, size = (32, 32, 32), (2.0,) * 3  # Nyquist 4 Å; the network's 8 Å
    measured = wedge(shape)
    y = filtered(molecule(shape, size, 5.0), measured)
    write_mrc("in.mrc", y, size)
    ask("wedge in.mrc --method network")
    largest = torch.stack(torch.broadcast_tensors(*fourier.freq_grid(shape))).abs().amax(0)
    beyond = ~measured & (largest > 0.25)
    factor = torch.tensor(report_of("in_wedge")["fill_factor"]["network"])
    want = wedge_check.scale_missing(pocs(y, measured), measured, factor, size)
    assert close(fft(values("in_wedge.mrc"))[beyond], fft(want)[beyond], 1e-3)


def save_scunet(task, fill="zeros"):
    torch.manual_seed(0)
    grid = dict(voxel_size=4.0 if task == "wedge3d" else 1.0, box=12)
    checkpoint.save(f"{task}.pt", SCUNet(SMALL_SCUNET), mean=0, std=1, task=task, fill=fill, **grid)


@pytest.mark.parametrize(
    "task, trained, name, fill",
    [
        ("sharpen", "sharpen", "in_sharpen", "zeros"),
        ("superres", "superres", "in_superres", "zeros"),
        ("wedge --model scunet --method network", "wedge3d", "in_wedge_network", "zeros"),
        ("wedge --model scunet --method network", "wedge3d", "in_wedge_network", "pocs"),
    ],
)
def test_a_map_of_one_tile_becomes_what_its_network_makes_of_it(
    tmp_path, monkeypatch, task, trained, name, fill
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRYO_BF16", "0")
    save_scunet(trained, fill)
    network = checkpoint.load(f"{trained}.pt")
    size = (network.voxel_size,) * 3
    y = 3 * filtered(molecule((12, 12, 12), size, 3 * size[0]), wedge((12, 12, 12)))
    write_mrc("in.mrc", y, size)
    command = f"--task {task} --ckpt {trained}.pt --device cpu in.mrc"
    assert sampling.main(command.split()) == 0
    if fill == "pocs":
        y = pocs(y, wedge((12, 12, 12)))
    top = float(clipped(y).max())
    assert close(values(f"{name}.mrc"), top * network.net(clipped(y)[None, None] / top)[0, 0])
    report = report_of(name.removesuffix("_network"))
    assert report["checkpoint_sha256"] == network.sha256
    assert report["settings"]["model"] == "scunet"


# ---- Files


def test_quiet_prints_nothing_and_compressed_input_gives_the_same_map(small, run, capfd):
    Path("packed.map.gz").write_bytes(gzip.compress(small.read_bytes()))
    run("wedge in.mrc --quiet")
    run("wedge packed.map.gz --quiet")
    assert capfd.readouterr() == ("", "")
    assert Path("in_wedge.mrc").read_bytes() == Path("packed_wedge.mrc").read_bytes()


def test_one_bad_file_in_a_folder_is_named_and_counted_and_stops_nothing(small, run, capsys):
    Path("bad.mrc").write_bytes(small.read_bytes()[:5000])
    Path("notes.txt").write_text("not a map")
    Path("out").mkdir()
    write_mrc("other.mrc", -values(small).flip(0))
    assert run("wedge . -o out --method pocs") == 1
    maps = [name for name in names(Path("out")) if name.endswith(".mrc")]
    assert maps == ["in_wedge.mrc", "other_wedge.mrc"]
    (line,) = capsys.readouterr().err.splitlines()
    assert "bad.mrc" in line


def test_a_folder_is_restored_from_its_inputs_alone(small, run):
    write_mrc("in_truth.mrc", values(small))
    for _ in range(2):  # the second time it holds results, too
        run("wedge . --overwrite --method prior")
    maps = [name for name in names(Path()) if name.endswith(".mrc")]
    assert maps == ["in.mrc", "in_truth.mrc"] + [
        f"in_wedge{end}.mrc" for end in ("", "_mean", "_snr", "_std")
    ]


def test_existing_files_stay_without_overwrite_and_the_input_always(small, run):
    original = small.read_bytes()
    run("wedge in.mrc --method pocs")
    first = Path("in_wedge.mrc").read_bytes()
    with pytest.raises(OSError, match="in_wedge.mrc: exists.*--overwrite"):
        run("wedge in.mrc")
    assert Path("in_wedge.mrc").read_bytes() == first
    run("wedge in.mrc --overwrite --method prior")
    assert Path("in_wedge.mrc").read_bytes() != first
    Path("in_wedge.mrc").unlink()
    with pytest.raises(OSError, match="in_wedge_mean.mrc: exists"):  # files beside it count
        run("wedge in.mrc")
    assert "in_wedge.mrc" not in names(Path())
    for name in ("in.mrc", "in_mean.mrc"):
        write_mrc("in_mean.mrc", values(small))
        with pytest.raises(OSError, match=f"{name}: is the input"):
            run(f"wedge {name} -o in.mrc --overwrite")
    assert small.read_bytes() == original


def test_a_voxel_size_from_the_command_line_mends_a_header_without_one(small, run):
    with mrcfile.open(small, "r+") as file:
        file.header.cella = (0, 0, 0)
    run("wedge in.mrc --voxel-size 1.5 --method pocs")
    assert mrc.read_map("in_wedge.mrc").voxel_size == pytest.approx((1.5, 1.5, 1.5))


# ---- The command line

REFUSED = {
    "wedge nope.mrc": "nope.mrc: no such file",
    "wedge cut.mrc": "cut.mrc",
    "wedge dark.mrc --no-invert --background 0": "dark.mrc.*darker",
    "wedge in.mrc --tilt-range -60 90": "tilt range -60.* 90",
    "wedge in.mrc --tilt-range 60 -60": "tilt range 60.* -60",
    "wedge in.mrc --tilt-axis w": "--tilt-axis is w; give x, y, z",
    "wedge in.mrc --ckpt cut.mrc": "cut.mrc: not a checkpoint",
    "wedge in.mrc --ckpt nope.pt": "nope.pt",
    "wedge in.mrc --truth other.mrc": r"other.mrc: \(20, 20, 20\).* \(16, 16, 16\)",
    "wedge in.mrc --truth nope.mrc": "nope.mrc: no such file",
    "wedge in.mrc --mask other.mrc": r"other.mrc: \(20, 20, 20\).* \(16, 16, 16\)",
    "wedge in.mrc --mask half2.mrc": "half2.mrc: .*a mask is 0 to 1",
    "wedge in.mrc -o nope/out.mrc": "nope: no such folder",
    "wedge in.mrc -o out.txt": "out.txt: maps are written as .mrc",
    "wedge in.mrc half1.mrc -o out.mrc": "-o out.mrc: for 2 inputs",
    "wedge empty": "empty: no map",
    "wedge": "wants one map or more; 0 given",
    "wedge in.mrc --steps 0": "steps is 0; give 1 to 10000",
    "wedge in.mrc --samples 0": "samples is 0; give 1 to 1000",
    "wedge in.mrc --background 9": "a background of 9 is outside of the values of in.mrc",
    "wedge in.mrc --noise nan": "noise is nan; give 0 to 10",
    "wedge in.mrc --voxel-size -1": "give 0.1 to 100 Å",
    "wedge in.mrc --seed 5000000000": "seed is 5e[+]09; give 0 to",
    "wedge in.mrc --device toaster": "--device toaster: no such device",
    "wedge in.mrc --device cuda:99": "--device cuda:99: no such device",
    "wedge in.mrc --method wiener": "method is wiener; give auto, prior, paper, pocs",
    "wedge in.mrc --orientations angles.txt": "--orientations: --task wedge does not use it",
    "wedge in.mrc --ckpt wedge3d.pt": "wedge3d.pt: holds a scunet network, wanted is hdit",
    "wedge in.mrc --model scunet --ckpt superres.pt": "superres.pt: .*needs wedge3d",
    "wedge in.mrc --model scunet --tilt-axis x": "--tilt-axis: .*wedge --model scunet does not",
    "wedge in.mrc --model scunet --method paper": "method is paper; give auto, network, pocs",
    "denoise half1.mrc half1.mrc": "half1.mrc: .*same map",
    "denoise half1.mrc other.mrc": "half1.mrc: .*other.mrc has .*one grid",
    "denoise half1.mrc": "give two half maps, or one map with --noise-from-fsc or --snr",
    "denoise half1.mrc half2.mrc --snr 1": "give two half maps, or one map with",
    "denoise half1.mrc half2.mrc in.mrc": "wants two half maps, a folder .*; 3 given",
    "denoise half1.mrc --noise-from-fsc short.csv": "short.csv: .* shells",
    "denoise half1.mrc --noise-from-fsc empty.csv": "empty.csv",
    "denoise half1.mrc --noise-from-fsc half2.mrc": "half2.mrc",
    "denoise half1.mrc --noise-from-fsc short.csv --snr 1": "--snr and --noise-from-fsc: give one",
    "denoise half1.mrc --snr 0": "snr is 0; give 0.053 or more",
    "denoise half1.mrc noise.mrc": "no signal: the FSC is below 0.05",
    "denoise half1.mrc half2.mrc --tilt-range -60 60": "--tilt-range: --task denoise does not",
    "anisotropic half1.mrc half2.mrc": "give --tilt-range MIN MAX .*or --orientations FILE",
    "anisotropic half1.mrc half2.mrc --orientations half2.mrc": "half2.mrc",
    "anisotropic half1.mrc half2.mrc --tilt-range -45 45 --alpha 0": "alpha is 0; give a positive",
    "sharpen in.mrc --ckpt jepa.pt": "jepa.pt: trained for jepa, the task needs sharpen",
    "sharpen in.mrc --ckpt superres.pt": "superres.pt: trained for superres",
    "sharpen in.mrc --ckpt hdit.pt": "hdit.pt: holds a hdit network, wanted is scunet",
    "sharpen in.mrc --model hdit": "--model hdit does not know --task sharpen",
    "sharpen in.mrc --ckpt sharpen.pt --stride 13": "in.mrc: --stride 13: give 12 at most",
    "sharpen in.mrc --ckpt sharpen.pt --stride 0": "stride is 0; give 1 or more",
    "sharpen in.mrc --percentile 0": "percentile is 0; give a number above 0",
    "sharpen in.mrc --stride 99 --ckpt sharpen.pt": "--stride 99: give 12 at most",
    "sharpen in.mrc --method pocs": "--method: --task sharpen does not use it",
    "sharpen dark.mrc --no-invert --background 0 --ckpt sharpen.pt": "dark.mrc.*darker",
    "superres in.mrc --ckpt superres.pt --truth other.mrc": r"\(20, 20, 20\).* or \(24, 24, 24\)",
    "wedge in.mrc --method pocs --grey-scale 2": "--method pocs does not use --grey-scale",
    "wedge in.mrc --model scunet --method pocs --stride 6": "--method pocs does not use --stride",
    "denoise half1.mrc half2.mrc --method wiener --grey-scale 2 0": "wiener does not use --grey",
    "anisotropic half1.mrc half2.mrc --orientations a.txt --tilt-axis x": "--tilt-axis goes with",
    "sharpen in.mrc --percentile 99 --grey-scale 2": "--percentile and --grey-scale MAX: give one",
    "abinitio in.mrc --losses 10028": "--method prior does not use --losses",
    "generate --model scunet": "--model scunet does not know --task generate",
    "generate --box 0": "box is 0; give 1 or more",
    "generate --voxel-size 2": "--voxel-size: --task generate does not use it",
    "generate in.mrc": "wants no input; 1 given",
    "likelihood in.mrc --voxel-size 12": "in.mrc: voxels of 12 Å hold none of the detail",
    "likelihood in.mrc --mask half1.mrc": "--mask: --task likelihood does not use it",
    "likelihood in.mrc --truth half1.mrc": "--truth: --task likelihood does not use it",
    "abinitio in.mrc": "in.mrc.* volume",
    "abinitio in.mrc in.mrc": "wants one stack; 2 given",
    "abinitio in.mrc --method pocs": "method is pocs; give prior, paper, classical",
    "abinitio in.mrc --max-shift -1": "--max-shift is -1; give 0 or more",
    "abinitio in.mrc --mask in.mrc": "--mask: --task abinitio does not use it",
}


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory, ckpt):
    """A folder with maps and files that no task can use, beside good ones."""
    folder = tmp_path_factory.mktemp("odd")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for i, name in enumerate(("in", "half1", "half2")):
            write_mrc(f"{name}.mrc", molecule(SHAPE) + 0.1 * random(SHAPE, i))
        write_mrc("noise.mrc", random(SHAPE, 9))
        write_mrc("other.mrc", molecule((20, 20, 20)))
        write_mrc("dark.mrc", -molecule(SHAPE) - 1)
        Path("cut.mrc").write_bytes(Path("in.mrc").read_bytes()[:-7])
        Path("hdit.pt").write_bytes(ckpt.read_bytes())
        Path("empty.csv").write_text("")
        Path("short.csv").write_text("0.9\n0.5\n0.1\n")
        Path("empty").mkdir()
        for task in ("jepa", "sharpen", "superres", "wedge3d"):
            save_scunet(task)
        yield folder


@pytest.mark.parametrize("command, message", REFUSED.items())
def test_what_cannot_work_is_said_in_one_line_and_leaves_no_file(
    odd_folder, monkeypatch, command, message
):
    monkeypatch.chdir(odd_folder)
    task, *words = command.split()
    before = names(odd_folder)
    with pytest.raises((ValueError, OSError), match=message) as error:
        sampling.main(["--task", task, "--device", "cpu", *words])
    assert "\n" not in str(error.value)
    assert names(odd_folder) == before


def test_the_task_is_required(small, capsys):
    with pytest.raises(SystemExit):
        sampling.main([str(small)])
    assert "required: --task" in capsys.readouterr().err


def test_the_help_shows_every_flag_and_an_example_of_every_task(capsys):
    with pytest.raises(SystemExit):
        sampling.main(["--help"])
    text = capsys.readouterr().out
    for name, task in sampling.TASKS.items():
        assert f"python sampling.py --task {name} {task.example}" in text
        for flag in task.settings.__dataclass_fields__:
            assert f"{sampling.flag_of(flag)} " in text


def test_settings_in_a_notebook_are_checked_as_flags_are():
    with pytest.raises(ValueError, match="alpha is -1; give a positive number"):
        AnisotropicSettings(tilt_range=(-60, 60), alpha=-1)


def test_an_error_ends_the_program_with_one_line_and_a_non_zero_status(tmp_path, ckpt):
    command = [sys.executable, sampling.__file__, "--task", "wedge", "nope.mrc", "--ckpt", ckpt]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["sampling.py: nope.mrc: no such file"]


@pytest.mark.parametrize(
    "command",
    [
        "wedge in.mrc --truth other.mrc -o other.mrc",
        "wedge in.mrc --mask other.mrc -o other.mrc",
        "wedge in.mrc -o in_truth.mrc",
        "wedge in.mrc in_wedge.mrc",
        "wedge in.mrc --truth out_std.mrc -o out.mrc",
    ],
)
def test_no_file_that_is_read_is_ever_written(small, run, command):
    before = {}
    for name in ("other", "in_truth", "in_wedge", "out_std"):
        path = write_mrc(Path(f"{name}.mrc"), molecule(SHAPE))
        before[path] = path.read_bytes()
    with pytest.raises(FileExistsError, match="is the input"):
        run(command, "--overwrite", "--method", "pocs")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_finished_maps_are_skipped_when_asked(small, run, capsys):
    write_mrc(Path("other.mrc"), values(small))
    run("wedge other.mrc --method pocs")
    before = Path("other_wedge.mrc").stat().st_mtime_ns
    capsys.readouterr()
    assert run("wedge . --method pocs --skip-existing") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 of 2" in lines and "2 of 2" in lines
    assert "other_wedge.mrc: exists, skipped" in lines
    assert Path("in_wedge.mrc").exists()
    assert Path("other_wedge.mrc").stat().st_mtime_ns == before


def test_a_folder_of_half_maps_is_denoised_pair_by_pair(halves, run):
    for i in (1, 2):
        write_mrc(Path(f"b_half{i}.mrc"), halves[i - 1])
    assert run("denoise . --method wiener") == 0
    assert Path("half_mean_denoise.mrc").exists() and Path("b_half_mean_denoise.mrc").exists()


def test_a_home_folder_is_expanded_and_maps_keep_the_ending_that_was_asked_for(
    small, run, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("wedge ~/in.mrc -o ~/gen.map.gz --method prior")
    assert {"gen.map.gz", "gen_mean.map.gz", "gen_std.map.gz", "gen.json"} <= set(names(tmp_path))


@pytest.mark.parametrize("device", ["meta", "hpu", "nonsense"])
def test_devices_that_give_no_numbers_are_refused(small, device):
    with pytest.raises(ValueError, match=f"--device {device}: no such device"):
        sampling.parse(["--task", "wedge", "in.mrc", "--device", device])


@pytest.mark.parametrize("flag", ["--voxel-size=1e-30", "--voxel-size=nan", "--samples=99999999"])
def test_numbers_that_would_take_all_memory_or_time_are_refused(flag):
    with pytest.raises(ValueError, match="give"):
        sampling.parse(["--task", "wedge", "in.mrc", flag])


@pytest.mark.parametrize(
    "asked, phase", [([], "float16"), (["--time-phase", "bfloat16"], "bfloat16")]
)
def test_public_weights_are_used_in_the_precision_of_their_training_or_as_asked(
    asked, phase, tmp_path, monkeypatch, capsys
):
    save_file = pytest.importorskip("safetensors.torch").save_file
    monkeypatch.chdir(tmp_path)
    save_file(HDiT(SMALL_HDIT).state_dict(), "model.safetensors")
    Path("config.yaml").write_text("pl_trainer:\n  precision: 16-mixed\n")
    command = "--task generate --samples 1 --steps 1 --box 16 --ckpt model.safetensors -o out.mrc"
    assert not sampling.main([*command.split(), *asked])
    lines = [line for line in capsys.readouterr().out.splitlines() if "time phases" in line]
    assert len(lines) == 1 and f"time phases in {phase}" in lines[0]
    Path("out.mrc").unlink()
    sampling.main([*command.split(), *asked, "--quiet", "--overwrite"])
    assert not capsys.readouterr().out


def test_a_time_phase_for_a_checkpoint_of_ours_is_refused(ckpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="drop --time-phase"):
        sampling.main(["--task", "generate", "--ckpt", str(ckpt), "--time-phase", "float16"])
