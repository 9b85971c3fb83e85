"""What sampling.py promises: the data term, the tiled prior, the samplers, and the program on good and on bad input."""
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from mrcfile.dtypes import HEADER_DTYPE

import atoms
import checkpoint
import degrade
import fourier
import fsc
import fsc_score
import mrc
import posterior
import sampling
import volume
from checkpoint import Prior
from model_hdit import HDiT, HDiTConfig

ORACLES = Path(__file__).parent / "oracles"


def fixture(name):
    return {key: torch.from_numpy(value) for key, value in np.load(ORACLES / name).items()}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random(shape, seed=0):
    return torch.randn(shape, generator=rng(seed))


def fft(x):
    return torch.fft.fftn(x.double(), dim=(-3, -2, -1))


def filtered(x, weights):
    return torch.fft.ifftn(torch.fft.fftn(x) * weights).real


def wedge(shape, tilt_range=(-60, 60), tilt_axis="y", voxel_size=1.0):
    return fourier.hermitian_part(degrade.wedge_mask(shape, tilt_range, tilt_axis, voxel_size=voxel_size))


def close(a, b, tolerance=1e-5):
    """Within float32 rounding of values and of sums (FFTs), relative to the largest."""
    return float((a - b).abs().max()) < tolerance * float(b.abs().max())


# ---- The data term and POCS ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, tilt_range", [((8, 10, 12), (-60, 60)), ((9, 7, 11), (-60, 60)), ((8, 8, 8), (-40, 60))])
def test_put_back_takes_measured_coefficients_from_y_and_all_others_from_x(shape, tilt_range):
    x, y, measured = random(shape, 1), random(shape, 2), wedge(shape, tilt_range)
    once = fourier.put_back(x, y, measured)
    assert close(fft(once), torch.where(measured, fft(y), fft(x)))
    assert close(fourier.put_back(once, y, measured), once)
    assert close(fft(fourier.put_back(x, y, 0.25 * measured)), torch.where(measured, 0.75 * fft(x) + 0.25 * fft(y), fft(x)))


def test_pocs_equals_50_iterations_of_the_oracle_inside_its_support():
    f = fixture("pocs_wedge.npz")
    shape = tuple(f["shape"].tolist())
    support = torch.from_numpy(np.unpackbits(f["support"].numpy(), count=math.prod(shape)).reshape(shape).astype(bool))
    kz, _, kx = fourier.freq_grid(shape)
    measured = (kz.abs() <= kx.abs() * math.tan(math.radians(60))).expand(shape)
    assert close(posterior.pocs(f["degraded"], measured, 50, support), f["pocs_50"])


def test_pocs_leaves_alone_a_map_that_needs_nothing():
    measured = wedge((10, 9, 8))
    y = filtered(random((10, 9, 8)), measured)
    y = y - y.min() + 0.1                                       # not negative, nothing in the wedge: a fixed point
    assert close(posterior.pocs(y, measured, 20), y)


def test_every_pocs_iteration_comes_nearer_to_a_non_negative_truth():
    truth, measured = random((12, 12, 12)).clamp(min=0) ** 2, wedge((12, 12, 12))
    y = filtered(truth, measured)
    error = [float((posterior.pocs(y, measured, n) - truth).norm()) for n in (0, 1, 2, 5, 10, 30)]
    assert all(after < 0.99 * before for before, after in zip(error, error[1:]))


# ---- The prior, by tiles -------------------------------------------------------------------------------------------------

def stub(net, box):
    return Prior(net=net, kind="hdit", voxel_size=1.5, box=box, mean=0.04, std=0.09, sha256="")


@pytest.mark.parametrize("shape", [(8, 8, 8), (16, 8, 24), (9, 13, 20), (5, 8, 11), (3, 2, 7)])
def test_a_local_velocity_is_the_same_by_tiles_of_8_whatever_the_map(shape):
    prior = stub(lambda x, t: 3 * x + t[:, None, None, None, None], 8)
    x = random(shape)
    for seed in range(4):
        assert close(posterior.tiled_velocity(prior, x[None], 0.3, [rng(seed)])[0], 3 * x + 0.3, 1e-6)


def test_tiles_are_turned_back_as_they_were_turned():
    # Rolling the tile along its own axes tells all 48 orientations apart once it is turned back, and only the 24 of
    # determinant +1 may occur. One periodic tile is the whole map, so that its corner does not matter.
    prior = stub(lambda x, t: x.roll(1, -3) + 2 * x.roll(1, -2) + 4 * x.roll(1, -1), 4)
    x, seen = random((4, 4, 4)), set()
    wanted = torch.stack([sum(2 ** i * x.roll(sign, axis) for i, (axis, sign) in enumerate(zip(order, signs)))
                          for order, signs in volume.ROTATIONS_24])
    for seed in range(200):
        distance = (posterior.tiled_velocity(prior, x[None], 0.5, [rng(seed)])[0] - wanted).abs().amax((1, 2, 3))
        assert distance.min() < 1e-5
        seen.add(int(distance.argmin()))
    assert len(seen) == 24


def test_no_seam_stays_in_one_place():
    def faces(x, t):                                            # a network that marks the faces of its tile
        v = torch.ones_like(x)
        v[..., 1:-1, 1:-1, 1:-1] = 0
        return v

    calls, p = 400, 1 - (6 / 8) ** 3
    mean = sum(posterior.tiled_velocity(stub(faces, 8), torch.zeros(1, 8, 8, 8), 0.5, [g])[0] for g in map(rng, range(calls))) / calls
    assert (mean - p).abs().max() < 5 * math.sqrt(p * (1 - p) / calls)          # five standard errors


# ---- The samplers, with velocities in closed form --------------------------------------------------------------------------

def test_algorithm_2_goes_through_the_states_of_the_reference(monkeypatch):
    f, states = fixture("parity/posterior_sampling.npz"), []

    def velocity(prior, x, t, *_):
        states.append(x[0])
        return 0.8 * x - 1.5 * torch.tanh(x) * (1 - t) + 0.3 * t

    monkeypatch.setattr(posterior, "tiled_velocity", velocity)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: f["x1"])                # the reference's initial noise
    y = (f["y_wedge"] - f["z_mean"].float()) / f["z_std"].float()
    measured = wedge((8, 8, 8), tilt_axis="z")
    assert torch.equal(measured, torch.fft.ifftshift(f["mask"]))
    last = posterior.sample_posterior(stub(None, 8), y, measured, torch.zeros_like(y), [rng()], steps=20, t_start=1.0, sigma=0.0,
                                     fresh_noise=False, inner=0)[0]
    assert close(torch.stack(states[1:] + [last]), f["inpaint_x"])


def gaussian_prior(monkeypatch):
    """x_0 ~ N(mean, power per Fourier coefficient) on 8^3 voxels; its velocity in place of the network's."""
    kz, ky, kx = (k.float() for k in fourier.freq_grid((8, 8, 8)))
    k2 = kz ** 2 + ky ** 2 + kx ** 2
    power, mean = 0.5 + 2 * torch.exp(-8 * k2), filtered(random((8, 8, 8), 3), 2 * torch.exp(-10 * k2))

    def velocity(prior, x, t, *_):
        expected = mean + filtered(x - (1 - t) * mean, (1 - t) * power / ((1 - t) ** 2 * power + t ** 2))    # E[x_0 | x_t]
        return (x - expected) / t

    monkeypatch.setattr(posterior, "tiled_velocity", velocity)
    return mean, power


def gaussian_samples(y, measured, n, **settings):
    return posterior.sample_posterior(stub(None, 8), y, measured, y, list(map(rng, range(n))), steps=40, t_start=1.0, inner=0, **settings)


@pytest.mark.parametrize("fresh_noise", [False, True])
def test_samples_hold_what_was_measured_and_follow_a_gaussian_prior_where_nothing_was(monkeypatch, fresh_noise):
    mean, power = gaussian_prior(monkeypatch)
    measured, n = wedge((8, 8, 8)), 48
    y = filtered(mean + filtered(random((8, 8, 8), 5), power.sqrt()), measured)
    samples = gaussian_samples(y, measured, n, fresh_noise=fresh_noise)
    assert close(fft(samples)[:, measured], fft(y)[measured].expand(n, -1))
    # Coefficients are independent under this prior: the conditional mean of a missing one is its mean.
    variance = 512 * power[~measured]                           # of an unnormalised coefficient
    chi2 = (fft(samples.mean(0) - mean)[~measured].abs() ** 2 / (variance / n)).mean()
    assert chi2 < 1 + 5 * math.sqrt(2 / len(variance))          # real degrees of freedom: one per coefficient
    if not fresh_noise:                                         # the ODE keeps the spread; fresh noise narrows it
        spread = (fft(samples - samples.mean(0))[:, ~measured].abs() ** 2).sum(0) / (n - 1) / variance
        assert 0.85 < spread.mean() < 1.1                       # exact as steps -> infinity


@pytest.mark.parametrize("fresh_noise", [False, True])
def test_the_posterior_mean_takes_noise_out_of_the_measured_coefficients(monkeypatch, fresh_noise):
    mean, power = gaussian_prior(monkeypatch)
    measured, sigma = wedge((8, 8, 8)), 1.0
    truth = mean + filtered(random((8, 8, 8), 5), power.sqrt())
    y = filtered(truth + sigma * random((8, 8, 8), 6), measured)
    error = lambda x: float(fft(x - truth)[measured].abs().square().sum())
    wiener = mean + filtered(y - mean, power / (power + sigma ** 2))            # the exact posterior mean
    restored = gaussian_samples(y, measured, 24, fresh_noise=fresh_noise, sigma=sigma).mean(0)
    assert error(restored) < 1.6 * error(wiener) < 0.75 * error(y)


def test_least_rho_lets_in_as_much_noise_as_it_is_told_to():
    times = torch.linspace(0.5, 0, 41)[:-1]
    ratio = times / (1 - times)                                 # r
    white, everywhere = torch.tensor(0.3), torch.ones(8, 8, 8, dtype=bool)      # its worst time is inside: r = sigma rho^(1/2)
    assert posterior.least_rho(white, everywhere, ratio, 1) == pytest.approx(0.5, rel=0.01)         # 1 / (4 rho) = leak rho
    assert posterior.least_rho(white, everywhere, ratio, 1 / 8) == 1       # never more
    half = everywhere.clone()
    half[4:] = False                                            # half the noise: 1 / (8 rho)
    assert posterior.least_rho(white, half, ratio, 1) == pytest.approx(8 ** -0.5, rel=0.01)
    few = torch.where(wedge((8, 8, 8)), 50.0, 0.3)              # most coefficients are hopeless: the others are trusted more
    rho = posterior.least_rho(few, everywhere, ratio, 1 / 8)
    let_in = []
    for r in ratio.tolist():
        w = r ** 2 / (r ** 2 + rho * few.numpy().astype("f8") ** 2)
        let_in.append(np.mean(w ** 2 * few.numpy() ** 2) / r ** 2)
    assert max(let_in) == pytest.approx(rho / 8, rel=0.01) and rho < 1


def test_missed_is_the_error_that_y_betrays_beyond_its_noise():
    truth, measured = random((2, 16, 16, 16), 1) * 3, wedge((16, 16, 16))
    shell = degrade.noise_shells((16, 16, 16))
    sigma = torch.where(shell == 3, 9.0, 0.5)                   # as good as nothing known of shell 3
    error = filtered(random((2, 16, 16, 16), 2), torch.where((shell == 3) | (shell == 5), 2.0, 0.1))
    y = truth[0] + filtered(random((16, 16, 16), 3), sigma) + filtered(random((16, 16, 16), 4) * 99, ~measured)
    found = posterior.missed(truth[:1] + error[:1], y, measured, sigma)
    assert found.shape == (1, 16, 16, 16)
    assert float(found[0][shell == 5].mean()) == pytest.approx(4, rel=0.2)      # 2^2, though the noise adds 0.25
    assert not found[0][(shell != 5) & (shell > 0)].any()       # 0.01 in 0.25, or 4 in 81, may be chance; shell 0 is one number
    two = posterior.missed(truth[0] + error, y, measured, sigma)                 # each sample its own
    assert close(two[0], found[0], 1e-5) and not close(two[1], found[0], 1e-2)


def test_a_map_that_the_prior_deems_impossible_is_believed_where_its_noise_is_small(monkeypatch):
    mean, power = gaussian_prior(monkeypatch)
    shell, everywhere = degrade.noise_shells((8, 8, 8)), torch.ones(8, 8, 8, dtype=bool)
    truth = mean + filtered(random((8, 8, 8), 5), torch.where(shell == 1, 10.0, 1.0) * power.sqrt())
    sigma = torch.full((8, 8, 8), 0.5)
    y = truth + filtered(random((8, 8, 8), 6), sigma)
    error = lambda x: float(fft(x - truth)[shell == 1].abs().square().mean() / 512 / 0.25)         # in noise powers
    with_noise = lambda leak: error(gaussian_samples(y, everywhere, 8, sigma=sigma, leak=leak).mean(0))
    assert with_noise(None) > 10 and with_noise(1 / 8) < 3


@pytest.mark.parametrize("operator_noise", [False, True])
def test_algorithm_1_goes_through_the_states_of_the_reference(monkeypatch, operator_noise):
    f, states = fixture("parity/posterior_sampling.npz"), []
    roll = lambda x: torch.fft.ifftshift(x)                     # the reference's middle voxel and frequency, to ours

    def velocity(prior, x, t, *_):
        states.append(x.detach()[0])
        return 0.8 * x - 1.5 * torch.tanh(x) * (1 - t) + 0.3 * t

    drawn = iter([roll(f["x1"]), *map(roll, f["op_noise"])])
    monkeypatch.setattr(posterior, "tiled_velocity", velocity)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: next(drawn))
    y = roll((f["y_noisy"] - f["z_mean"].float()) / f["z_std"].float())
    sigma = (roll(f["noise_power"]) / 512).sqrt() / f["z_std"].float()
    last = posterior.algorithm_1(stub(None, 8), y, torch.ones(8, 8, 8, dtype=bool), [rng()], steps=20, sigma=sigma,
                                operator_noise=operator_noise)[0]
    wanted = f["denoise_with_op_noise_x" if operator_noise else "denoise_no_op_noise_x"]
    assert close(torch.stack(states[1:] + [last]), torch.stack(list(map(roll, wanted))), 1e-4)      # 20 normalised gradients


def test_the_weight_of_the_observation_does_not_depend_on_the_steps_where_asked(monkeypatch):
    monkeypatch.setattr(posterior, "tiled_velocity", lambda prior, x, t, g: 0 * x)
    y, everywhere = random((8, 8, 8), 3), torch.ones(8, 8, 8, dtype=bool)
    sample = lambda **kw: posterior.algorithm_1(stub(None, 8), y, everywhere, [rng()], sigma=torch.tensor(9.0), lambda_max=0.01, **kw)[0]
    moved = lambda steps, per_time: float((sample(steps=steps, per_time=per_time) - random((8, 8, 8))).norm())
    assert moved(50, True) == pytest.approx(moved(200, True), rel=0.05)         # 0.01 is always the lesser: 2 in all
    assert moved(200, False) == pytest.approx(4 * moved(50, False), rel=0.05)   # the paper's


@pytest.mark.parametrize("settings", [posterior.DENOISE["prior"] | {"steps": 3}, {"steps": 3}])       # and Algorithm 1
def test_samples_drawn_together_are_those_drawn_one_by_one(settings):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(1, 1, 3, padding=1).requires_grad_(False)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x, t):
            return self.conv(x) + t[:, None, None, None, None]

    prior, y = stub(Net(), 6), random((9, 8, 7)).abs()
    draw = lambda per_call: torch.stack(list(posterior.draw_samples(
        prior, y, torch.ones(y.shape, dtype=bool), y, torch.tensor(0.3), settings, samples=5, seed=1, samples_per_call=per_call)))
    together, alone = draw(4), draw(1)
    assert close(together, alone, 1e-5) and not close(together[0], together[1], 1e-2)


def test_the_wiener_filter_is_the_posterior_mean_of_a_gaussian():
    shape = (8, 8, 8)
    signal, noise = torch.tensor([9.0, 4.0, 2.0, 0.0]), torch.tensor([1.0, 4.0, 0.5, 2.0])     # per shell
    y, shell = random(shape), degrade.noise_shells(shape).clamp(max=3)
    assert close(posterior.wiener(y, noise, signal), filtered(y, torch.tensor([0.9, 0.5, 0.8, 0.0])[shell]))
    assert close(posterior.wiener(y, noise[shell], signal), posterior.wiener(y, noise, signal))


def test_trust_in_a_coefficient_follows_its_noise(monkeypatch):
    mean, power = gaussian_prior(monkeypatch)
    truth, everywhere = mean + filtered(random((8, 8, 8), 5), power.sqrt()), torch.ones(8, 8, 8, dtype=bool)
    sigma = torch.where(wedge((8, 8, 8)), 0.3, 3.0)
    y = truth + filtered(random((8, 8, 8), 6), sigma)
    error = lambda x: float(fft(x - truth).abs().square().sum())
    exact = mean + filtered(y - mean, power / (power + sigma ** 2))
    anisotropic = gaussian_samples(y, everywhere, 24, sigma=sigma).mean(0)
    isotropic = gaussian_samples(y, everywhere, 24, sigma=sigma.square().mean().sqrt()).mean(0)
    assert error(anisotropic) < 1.6 * error(exact) and error(anisotropic) < 0.7 * error(isotropic)


# ---- The noise -------------------------------------------------------------------------------------------------------------

def molecule(shape, voxel_size=(1.5, 1.5, 1.5), resolution=3.0, atom_count=80, radius=0.3, seed=0):
    """Random atoms in a ball (radius in shortest sides), simulated, maximum 1: (D, H, W)."""
    side = min(n * v for n, v in zip(shape, voxel_size))
    direction = torch.nn.functional.normalize(random((atom_count, 3), seed), dim=1)
    xyz = direction * torch.rand(atom_count, 1, generator=rng(seed)) ** (1 / 3) * radius * side
    density = atoms.molmap(xyz, torch.full((atom_count,), 7.0), resolution, voxel_size=voxel_size, shape=shape)[0]
    return density / density.max()


@pytest.mark.parametrize("sd", [0.03, 0.1])
def test_the_noise_of_a_simulated_molecule_is_estimated_within_15_percent(sd):
    shape = (48, 48, 48)
    y = filtered(molecule(shape, atom_count=500) + sd * random(shape, 1), wedge(shape))
    assert posterior.estimate_noise(y, wedge(shape)) == pytest.approx(sd, rel=0.15)


# ---- The program -----------------------------------------------------------------------------------------------------------

def write_mrc(path, density, voxel_size=(1.5, 1.5, 1.5), axes=(1, 2, 3)):
    """A map (z, y, x) in a file whose columns, rows and sections run along `axes` (1 = x, 2 = y, 3 = z)."""
    with mrcfile.new(path, overwrite=True) as file:
        file.set_data(np.ascontiguousarray(density.numpy().transpose([3 - a for a in axes[::-1]])))
        h = file.header
        h["mz"], h["my"], h["mx"] = density.shape
        h["cella"] = tuple(n * v for n, v in zip(density.shape, voxel_size))[::-1]
        h["mapc"], h["mapr"], h["maps"] = axes
        h["nxstart"], h["nystart"], h["nzstart"], h["origin"] = 5, -6, 7, (10.5, -20.0, 30.25)
        file.add_label("made by a test")
    return path


def degraded(truth, measured, noise=0.05):
    return filtered(truth + noise * random(truth.shape, 9), measured)


@pytest.fixture(scope="module", autouse=True)
def without_matplotlib():                                       # drawing takes longer than everything else
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        yield


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A random network, every weight of which matters."""
    torch.manual_seed(0)
    net = HDiT(HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, patch_size=4))
    for p in net.parameters():
        if not p.any():                                         # HDiT starts as v = 0
            torch.nn.init.normal_(p, std=0.2)
    path = tmp_path_factory.mktemp("ckpt") / "random.pt"
    checkpoint.save(path, net, voxel_size=1.5, box=16, mean=0.04, std=0.09)
    return path


@pytest.fixture
def run(ckpt):
    """The program on a small budget; what comes last on the command line counts."""
    return lambda *argv: sampling.main([str(a) for a in ("--ckpt", ckpt, "--steps", 2, "--samples", 2, *argv)])


@pytest.fixture
def small(tmp_path):
    """One tile: 16^3 voxels of 1.5 Å."""
    return write_mrc(tmp_path / "in.mrc", degraded(molecule((16, 16, 16)), wedge((16, 16, 16))))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def values(path):
    return mrc.read_map(path).density


@pytest.mark.parametrize("shape, voxel_size, axes, tilt_axis", [((20, 24, 28), (1.6, 1.4, 1.5), (2, 3, 1), "y"),
                                                                ((21, 15, 19), (2.0, 2.0, 2.0), (1, 2, 3), "x")])
def test_a_restored_map_is_the_input_with_its_wedge_filled(tmp_path, run, capsys, shape, voxel_size, axes, tilt_axis):
    truth, measured = molecule(shape, voxel_size, 4.0), wedge(shape, (-50, 60), tilt_axis, voxel_size=voxel_size)
    source, out = write_mrc(tmp_path / "in.mrc", 50 * degraded(truth, measured), voxel_size, axes), tmp_path / "in_wedge.mrc"
    write_mrc(tmp_path / "in_truth.mrc", truth, voxel_size, axes)               # found by its name
    assert run(source, "--tilt-range", -50, 60, "--tilt-axis", tilt_axis) == 0
    assert mrcfile.validate(out) and mrcfile.validate(tmp_path / "in_wedge_std.mrc")
    with mrcfile.open(source) as a, mrcfile.open(out) as b:
        assert a.data.shape == b.data.shape and b.data.dtype == np.float32
        for name in set(HEADER_DTYPE.names) - {"dmin", "dmax", "dmean", "rms"}:
            assert a.header[name].tobytes() == b.header[name].tobytes(), name

    x, y = fft(values(out)), fft(values(source))
    assert close(x[measured], y[measured])
    assert x[~measured].abs().square().mean() > 0.01 * y[measured].abs().square().mean()

    report = json.loads((tmp_path / "in_wedge.json").read_text())
    assert report["settings"]["tilt_range"] == [-50, 60] and report["settings"]["seed"] == 0 and report["steps"] == 2
    assert report["torch"] == torch.__version__ and report["python"] and report["seconds"] > 0
    assert report["checkpoint_sha256"] == checkpoint.load(report["settings"]["ckpt"]).sha256
    rows = [line.split() for line in capsys.readouterr().out.split("missing wedge\n")[1].splitlines()]
    assert {"input", "POCS", "restored"} <= set(report["fsc"])
    for label, scores in report["fsc"].items():
        assert [*label.split(), f"{scores['auc']:.3f}", f"{scores['fsc_05']:.2f}", "Å", f"{scores['auc_missing']:.3f}"] in rows
    if len(set(voxel_size)) == 1:
        for key, region in (("auc", None), ("auc_missing", ~measured)):
            wanted = float(fsc.auc(fsc.fsc(values(out), truth, region)))
            assert report["fsc"]["restored"][key] == pytest.approx(wanted, abs=1e-6)


def test_mean_and_spread_are_those_of_the_samples_and_sample_i_depends_on_seed_and_i_alone(tmp_path, small, run, ckpt):
    y, measured, prior = values(small), wedge((16, 16, 16)), checkpoint.load(ckpt)
    noise = 0.05 * volume.normalise(y, 0, 1)[1].maximum
    draw = lambda n: list(posterior.wedge_samples(prior, y, measured, "prior", samples=n, seed=4, noise=noise, steps=2))
    samples = torch.stack(draw(3))
    assert close(samples[0], draw(1)[0], 1e-5) and not close(samples[0], samples[1], 1e-2)         # other batches round otherwise
    run(small, "--samples", 3, "--seed", 4, "--noise", 0.05, "--method", "prior")
    assert close(values(tmp_path / "in_wedge.mrc"), fourier.put_back(samples.mean(0), y, measured))
    assert close(values(tmp_path / "in_wedge_mean.mrc"), samples.mean(0))
    assert close(values(tmp_path / "in_wedge_std.mrc"), samples.std(0))


def test_a_seed_fixes_every_byte_and_another_gives_another_map(tmp_path, small, run):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(small, "--seed", seed, "-o", tmp_path / f"{name}.mrc")
    a, b, c = ((tmp_path / f"{name}.mrc").read_bytes() for name in "abc")
    assert a == b and a != c
    assert (tmp_path / "a_std.mrc").read_bytes() == (tmp_path / "b_std.mrc").read_bytes()


def test_the_grey_scale_of_the_input_is_kept_whatever_its_unit(tmp_path, small, run):
    write_mrc(tmp_path / "big.mrc", 1024 * values(small))       # a power of two: the same rounding everywhere
    for name in ("in", "big"):
        run(tmp_path / f"{name}.mrc")
    for end in ("", "_std"):
        assert close(values(tmp_path / f"big_wedge{end}.mrc"), 1024 * values(tmp_path / f"in_wedge{end}.mrc"))


@pytest.mark.parametrize("voxel_size, side", [(1.5, 24), (1.0, 36), (2.0, 18), (2.6, 16)])
def test_any_voxel_size_is_restored_on_its_own_grid_and_its_noise_found(tmp_path, run, monkeypatch, voxel_size, side):
    shape, size, draw, given = (side,) * 3, (voxel_size,) * 3, posterior.wedge_samples, []
    monkeypatch.setattr(posterior, "wedge_samples", lambda *a, noise, **k: given.append(noise) or draw(*a, noise=noise, **k))
    y = degraded(molecule(shape, size, 3.0), wedge(shape), noise=0.2)
    write_mrc(tmp_path / "in.mrc", y, size)
    assert run(tmp_path / "in.mrc", "--samples", 1, "--steps", 1, "--method", "prior") == 0
    assert values(tmp_path / "in_wedge.mrc").shape == shape and "in_wedge_std.mrc" not in names(tmp_path)
    report = json.loads((tmp_path / "in_wedge.json").read_text())
    assert report["noise"] * volume.normalise(y, 0, 1)[1].maximum == pytest.approx(0.2, rel=0.25)
    # Resampling keeps |F|^2 / n^2 of every coefficient, n voxels in all: for white noise, variance / n.
    assert given[0] ** 2 / math.prod(report["box"]) == pytest.approx(0.2 ** 2 / side ** 3, rel=0.5)


def test_pocs_is_a_method_and_what_is_left_where_voxels_are_far_too_coarse_for_the_prior(tmp_path, small, run):
    run(small, "--method", "pocs")
    assert close(values(tmp_path / "in_wedge.mrc"), posterior.pocs(values(small), wedge((16, 16, 16))))
    run(small, "--voxel-size", 9, "-o", tmp_path / "coarse.mrc")
    assert json.loads((tmp_path / "coarse.json").read_text())["method"] == "pocs"


def test_quiet_prints_nothing_and_compressed_input_gives_the_same_map(tmp_path, small, run, capfd):
    (tmp_path / "packed.map.gz").write_bytes(gzip.compress(small.read_bytes()))
    run(small, "--quiet")
    run(tmp_path / "packed.map.gz", "--quiet")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "in_wedge.mrc").read_bytes() == (tmp_path / "packed_wedge.mrc").read_bytes()


def test_one_bad_file_does_not_stop_a_folder_but_is_said_and_counted(tmp_path, small, run, capsys):
    (tmp_path / "bad.mrc").write_bytes(small.read_bytes()[:5000])
    (tmp_path / "notes.txt").write_text("not a map")
    (tmp_path / "out").mkdir()
    write_mrc(tmp_path / "other.mrc", -values(small).flip(0))
    assert run(tmp_path, "-o", tmp_path / "out", "--method", "pocs") == 1
    assert {"in_wedge.mrc", "other_wedge.mrc"} == {n for n in names(tmp_path / "out") if n.endswith(".mrc")}
    [line] = capsys.readouterr().err.splitlines()
    assert "bad.mrc: truncated" in line


def test_a_folder_is_restored_from_its_inputs_alone(tmp_path, small, run):
    write_mrc(tmp_path / "in_truth.mrc", values(small))
    for _ in range(2):                                          # the second time it holds results, too
        run(tmp_path, "--overwrite", "--method", "pocs")
    assert {n for n in names(tmp_path) if n.endswith(".mrc")} == {"in.mrc", "in_truth.mrc", "in_wedge.mrc"}


def test_files_that_exist_stay_unless_told_otherwise_and_the_input_always(tmp_path, small, run):
    original = small.read_bytes()
    run(small, "--method", "pocs")
    first = (tmp_path / "in_wedge.mrc").read_bytes()
    with pytest.raises((ValueError, OSError), match="in_wedge.mrc: exists.*--overwrite"):
        run(small)
    assert (tmp_path / "in_wedge.mrc").read_bytes() == first
    run(small, "--overwrite")
    assert (tmp_path / "in_wedge.mrc").read_bytes() != first
    (tmp_path / "in_wedge.mrc").unlink()
    with pytest.raises((ValueError, OSError), match="in_wedge.*: exists.*--overwrite"):        # what lies beside it counts
        run(small)
    assert "in_wedge.mrc" not in names(tmp_path)
    with pytest.raises((ValueError, OSError), match="in.mrc: is the input"):
        run(small, "-o", small, "--overwrite")
    assert small.read_bytes() == original


def test_a_picture_is_drawn_where_matplotlib_is(tmp_path, small, run, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    pytest.importorskip("matplotlib.figure")
    run(small, "--method", "pocs", "--truth", small)
    assert (tmp_path / "in_wedge.png").read_bytes().startswith(b"\x89PNG")


# ---- Bad input -------------------------------------------------------------------------------------------------------------

def edited(folder, name="bad.mrc", **fields):
    """in.mrc with other header fields."""
    raw = bytearray((folder / "in.mrc").read_bytes())
    header = np.frombuffer(raw, HEADER_DTYPE, count=1)
    for key, value in fields.items():
        header[key] = value
    (folder / name).write_bytes(raw)
    return folder / name


def saved(folder, content):
    torch.save(content, folder / "bad.pt")
    return folder / "bad.pt"


def put(path, content):
    path.write_bytes(content)
    return path


DARK = -molecule((16, 16, 16)) - 0.1
BAD = {                                                         # what is wrong: the command line, what the message says
    "no such file": lambda d: ([d / "nope.mrc"], "nope.mrc: no such file"),
    "not an MRC": lambda d: ([put(d / "bad.mrc", b"text" * 999)], "bad.mrc: not an MRC"),
    "truncated": lambda d: ([put(d / "bad.mrc", (d / "in.mrc").read_bytes()[:-7])], "bad.mrc: truncated"),
    "NaN": lambda d: ([put(d / "bad.mrc", (d / "in.mrc").read_bytes()[:-4] + np.float32("nan").tobytes())],
                      "bad.mrc: 1 values are NaN"),
    "constant": lambda d: ([write_mrc(d / "bad.mrc", torch.full((16, 16, 16), 2.0))], "bad.mrc: every voxel is 2"),
    "zero voxel size": lambda d: ([edited(d, cella=(0, 0, 0))], "bad.mrc.*--voxel-size"),
    "complex": lambda d: ([edited(d, mode=4)], "bad.mrc: complex"),
    "image stack": lambda d: ([edited(d, "bad.mrcs", ispg=0, mz=1)], "bad.mrcs: a stack of 16 images"),
    "tilt beyond 90": lambda d: ([d / "in.mrc", "--tilt-range", -60, 90], "tilt range -60.* 90"),
    "tilt reversed": lambda d: ([d / "in.mrc", "--tilt-range", 60, -60], "tilt range 60.* -60"),
    "another kind": lambda d: ([d / "in.mrc", "--ckpt", saved(d, {"kind": "other", "weights": {}})], "bad.pt.*not a checkpoint"),
    "pickled code": lambda d: ([d / "in.mrc", "--ckpt", saved(d, Path("x"))], "bad.pt: not a checkpoint"),
    "random bytes": lambda d: ([d / "in.mrc", "--ckpt", put(d / "bad.pt", bytes(range(256)))], "bad.pt: not a checkpoint"),
    "no checkpoint": lambda d: ([d / "in.mrc", "--ckpt", d / "nope.pt"], "nope.pt"),
    "truth of another shape": lambda d: ([d / "in.mrc", "--truth", write_mrc(d / "bad.mrc", molecule((16, 16, 18)))],
                                         r"bad.mrc: \(16, 16, 18\)"),
    "no truth": lambda d: ([d / "in.mrc", "--truth", d / "nope.mrc"], "nope.mrc: no such file"),
    "no such folder": lambda d: ([d / "in.mrc", "-o", d / "nope" / "out.mrc"], "nope: no such folder"),
    "no map by its name": lambda d: ([d / "in.mrc", "-o", d / "out.txt"], "out.txt: maps are written as .mrc"),
    "one output for two": lambda d: ([d / "in.mrc", d / "nope.mrc", "-o", d / "out.mrc"], "-o .*out.mrc: for 2 inputs"),
    "no steps": lambda d: ([d / "in.mrc", "--steps", 0], "--steps 0"),
    "no samples": lambda d: ([d / "in.mrc", "--samples", 0], "--samples 0"),
    "noise": lambda d: ([d / "in.mrc", "--noise", "nan"], "--noise nan"),
    "voxel size": lambda d: ([d / "in.mrc", "--voxel-size", -1], "--voxel-size -1"),
    "seed": lambda d: ([d / "in.mrc", "--seed", 10 ** 20], "--seed 1"),
    "dark protein": lambda d: ([write_mrc(d / "bad.mrc", DARK)], "bad.mrc.*multiply"),
    "device": lambda d: ([d / "in.mrc", "--device", "toaster"], "--device toaster"),
    "device that is not here": lambda d: ([d / "in.mrc", "--device", "cuda:99"], "--device cuda:99"),
    "input is OUT_mean": lambda d: ([put(d / "a_mean.mrc", (d / "in.mrc").read_bytes()), "-o", d / "a.mrc", "--overwrite"],
                                    "a_mean.mrc: is the input"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_clear_line_and_leaves_no_file(tmp_path, small, run, case):
    argv, words = BAD[case](tmp_path)
    before = names(tmp_path)
    with pytest.raises((ValueError, OSError), match=words) as error:
        run(*argv)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == before


def test_the_flag_that_supplies_a_voxel_size_mends_a_header_without_one(tmp_path, small, run):
    run(edited(tmp_path, cella=(0, 0, 0)), "--voxel-size", 1.5, "--method", "pocs")
    assert mrc.read_map(tmp_path / "bad_wedge.mrc").voxel_size == pytest.approx((1.5, 1.5, 1.5))


# ---- Half maps, masks, generation, likelihood ----------------------------------------------------------------------------------

@pytest.fixture
def halves(tmp_path):
    """Two half maps of 16^3 voxels of 1.5 Å, and their truth."""
    truth = molecule((16, 16, 16))
    for i in (1, 2):
        write_mrc(tmp_path / f"half{i}.mrc", truth + 0.1 * random(truth.shape, i))
    write_mrc(tmp_path / "half1_truth.mrc", truth)
    return tmp_path / "half1.mrc", tmp_path / "half2.mrc"


def test_half_maps_are_restored_apart_and_their_mean_is_the_result(tmp_path, run, halves):
    run("--task", "denoise", *halves)
    out = {end: values(tmp_path / f"half1_denoise{end}.mrc") for end in ("", "_half1", "_half2")}
    assert close((out["_half1"] + out["_half2"]) / 2, out[""])
    a, b = (values(half) for half in halves)
    prior = checkpoint.load(json.loads((tmp_path / "half1_denoise.json").read_text())["settings"]["ckpt"])
    power, curve = degrade.noise_power(b, a), fsc.fsc(a, b, convention="cryofm")[1:]
    signal = (degrade.radial_power(a) - degrade.noise_power(a, b) + degrade.radial_power(b) - power).clamp(min=0) / 2
    first = posterior.wiener(b, power, signal * (curve >= 0.05).long().cumprod(0)).clamp(min=0)
    sigma = (degrade.expand_shells(power, b.shape) / b.numel()).sqrt()
    second = posterior.draw_samples(prior, b, torch.ones(b.shape, dtype=bool), first, sigma,
                                   posterior.DENOISE["prior"] | {"steps": 2}, samples=2, seed=1 << 32)
    assert close(torch.stack(list(second)).mean(0), out["_half2"], 1e-4)        # nothing of half 1 but its share of the FSC


def test_one_map_is_denoised_by_a_curve_from_fsc_py_or_by_a_ratio(tmp_path, run, halves):
    half = halves[0]
    rows = "".join(f"{k},{k / 24},{24 / max(k, 1)},0.1,0.5\n" for k in range(9))
    (tmp_path / "curve.csv").write_text("shell,per_angstrom,angstrom,corrected,unmasked\n" + rows)
    run("--task", "denoise", half, "--noise-from-fsc", tmp_path / "curve.csv", "-o", tmp_path / "a.mrc")
    run("--task", "denoise", half, "--snr", 2, "-o", tmp_path / "b.mrc")        # FSC 0.5: each half 1, their mean 2
    assert torch.equal(values(tmp_path / "a.mrc"), values(tmp_path / "b.mrc"))
    run("--task", "denoise", half, "--snr", 9, "-o", tmp_path / "c.mrc")
    difference = lambda name: float((values(tmp_path / name) - values(half)).square().sum())
    assert difference("c.mrc") < difference("b.mrc")                            # less noise, nearer to the input


def test_the_fsc_of_the_halves_gives_the_noise_of_their_mean_whatever_the_box(tmp_path, run, monkeypatch):
    truth, found = molecule((24, 32, 40)), []
    a, b = (truth + 0.1 * random(truth.shape, i) for i in (1, 2))
    for name, x in (("a.mrc", a), ("b.mrc", b), ("mean.mrc", (a + b) / 2)):
        write_mrc(tmp_path / name, x)
    fsc_score.main([str(tmp_path / "a.mrc"), str(tmp_path / "b.mrc"), "-o", str(tmp_path / "curve"), "--quiet"])
    monkeypatch.setattr(posterior, "noise_and_signal", lambda *x, f=posterior.noise_and_signal: found.append(f(*x)) or found[-1])
    run("--task", "denoise", tmp_path / "mean.mrc", "--noise-from-fsc", tmp_path / "curve.csv", "--method", "wiener")
    (power,), _, _ = found[0]
    # E|F n|^2 of the mean is N 0.1^2 / 2 in every shell; where a shell has enough coefficients the estimate is within 10 %.
    assert float((power / (truth.numel() * 0.005) - 1)[8:].abs().max()) < 0.1


def test_a_mask_holds_for_the_posterior_mean_and_for_what_is_said_of_it(tmp_path, run):
    truth = molecule((16, 16, 16))
    source = write_mrc(tmp_path / "in.mrc", truth + 0.1 * random(truth.shape, 1))
    write_mrc(tmp_path / "truth.mrc", truth), write_mrc(tmp_path / "nothing.mrc", torch.cat((torch.ones(1, 16, 16), torch.zeros(15, 16, 16))))
    run(source, "--mask", tmp_path / "nothing.mrc", "--truth", tmp_path / "truth.mrc")
    said = json.loads((tmp_path / "in_wedge.json").read_text())["fsc"]["posterior mean"]["auc"]
    assert said == pytest.approx(float(fsc.auc(fsc.fsc(values(tmp_path / "in_wedge_mean.mrc"), truth))), abs=1e-4)


def test_anisotropic_noise_comes_from_a_tilt_range_or_from_orientations(tmp_path, run, halves):
    angles = [(30.0 * i, 90.0, 5.0 * i) for i in range(12)]                     # side views only: kz is seen by all
    (tmp_path / "angles.txt").write_text("# rot tilt psi\n" + "".join("{} {} {}\n".format(*a) for a in angles))
    for i, flags in enumerate((("--tilt-range", -45, 45), ("--orientations", tmp_path / "angles.txt"),
                               ("--tilt-range", -60, 60, "--alpha", 1))):
        run("--task", "anisotropic", *halves, "-o", tmp_path / f"{i}.mrc", *flags)
    run("--task", "denoise", *halves, "-o", tmp_path / "same.mrc")
    assert close(values(tmp_path / "2.mrc"), values(tmp_path / "same.mrc"), 1e-4)          # alpha 1 is isotropic
    assert not close(values(tmp_path / "0.mrc"), values(tmp_path / "2.mrc"), 1e-2)
    assert not close(values(tmp_path / "1.mrc"), values(tmp_path / "0.mrc"), 1e-2)


def test_outside_of_a_mask_the_input_is_kept(tmp_path, small, run, halves):
    mask = torch.zeros(16, 16, 16)
    mask[4:12], mask[3] = 1, 0.5
    write_mrc(tmp_path / "mask.mrc", mask)
    for task, files, before in (("wedge", [small], values(small)), ("denoise", halves, sum(map(values, halves)) / 2)):
        run("--task", task, *files, "-o", tmp_path / "all.mrc", "--overwrite")
        run("--task", task, *files, "-o", tmp_path / "masked.mrc", "--mask", tmp_path / "mask.mrc", "--overwrite")
        full, masked = values(tmp_path / "all.mrc"), values(tmp_path / "masked.mrc")
        assert torch.equal(masked[12:], before[12:]) and torch.equal(masked[4:12], full[4:12])
        assert close(masked[3], (before[3] + full[3]) / 2)


@pytest.mark.parametrize("box", [16, 24])
def test_generated_maps_depend_on_seed_and_number_alone(tmp_path, run, monkeypatch, box):
    monkeypatch.chdir(tmp_path)
    run("--task", "generate", "--samples", 2, "--box", box, "--seed", 5)
    run("--task", "generate", "--samples", 1, "--box", box, "--seed", 5, "-o", "again.mrc")
    run("--task", "generate", "--samples", 1, "--box", box, "--seed", 6, "-o", "other.mrc")
    first = values("generate.mrc")
    assert first.shape == (box,) * 3 and mrcfile.validate("generate.mrc") and close(first, values("again.mrc"), 1e-5)
    assert not close(first, values("generate_2.mrc"), 0.1) and not close(first, values("other.mrc"), 0.1)
    report = json.loads(Path("generate.json").read_text())
    assert report["output"] == ["generate.mrc", "generate_2.mrc"] and report["steps"] == 2


def test_the_likelihood_of_an_untrained_network_is_that_of_white_noise(tmp_path, run):
    net = HDiT(HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, patch_size=4))        # v = 0: p_0 is p_1
    checkpoint.save(tmp_path / "zero.pt", net, voxel_size=1.5, box=16, mean=0.04, std=0.09)
    truth = molecule((16, 20, 16))
    source = write_mrc(tmp_path / "in.mrc", 7 * truth)                          # its scale does not matter
    run("--task", "likelihood", source, "--ckpt", tmp_path / "zero.pt")
    report, out = json.loads((tmp_path / "in_likelihood.json").read_text()), values(tmp_path / "in_likelihood.mrc")
    x = volume.normalise(truth, 0.04, 0.09)[0].double()
    log_p = lambda x: float(-0.5 * x.square().sum()) - x.numel() * (0.5 * math.log(2 * math.pi) + math.log(0.09))
    padded = torch.full((16, 32, 16), -0.04 / 0.09).double()
    padded[:, :20] = x
    assert report["nats"] == pytest.approx(log_p(padded), rel=1e-5) and report["standard_error"] == 0
    assert out.shape == truth.shape and out[:, :16].unique().tolist() == pytest.approx([log_p(padded[:, :16]) / 16 ** 3], rel=1e-5)
    assert float(out[0, 17, 0]) == pytest.approx(log_p(padded[:, 16:]) / 16 ** 3, rel=1e-5)


@pytest.mark.parametrize("argv, message", [
    (("--task", "denoise", "half1.mrc", "half1.mrc"), "half1.mrc: .*same map"),
    (("--task", "denoise", "half1.mrc", "other.mrc"), "half1.mrc: .*other.mrc has .*one grid"),
    (("--task", "denoise", "half1.mrc"), "wants two half maps, or one map with --noise-from-fsc or --snr; 1 given"),
    (("--task", "denoise", "half1.mrc", "--noise-from-fsc", "short.csv"), "short.csv: 3 shells; a box of 16 needs shells 1 to 8"),
    (("--task", "denoise", "half1.mrc", "--noise-from-fsc", "half1.mrc.txt"), "half1.mrc.txt: neither"),
    (("--task", "denoise", "half1.mrc", "half2.mrc", "--method", "pocs"), "pocs is no answer to --task denoise"),
    (("--task", "denoise", "half1.mrc", "--noise-from-fsc", "empty.csv"), "empty.csv: neither"),
    (("--task", "denoise", "half1.mrc", "--noise-from-fsc", "half2.mrc"), "half2.mrc: neither"),
    (("--task", "denoise", "half1.mrc", "--noise-from-fsc", "short.csv", "--snr", "1"), "--snr and --noise-from-fsc: give one"),
    (("--task", "denoise", "half1.mrc", "noise.mrc"), "no signal: the FSC is below 0.05"),
    (("--task", "denoise", "half1.mrc", "half2.mrc", "--orientations", "short.csv"), "--orientations: of --task anisotropic"),
    (("--task", "anisotropic", "half1.mrc", "half2.mrc"), "anisotropic wants --tilt-range with --alpha, or --orientations"),
    (("--task", "anisotropic", "half1.mrc", "half2.mrc", "--orientations", "half1.mrc.txt"), "half1.mrc.txt: neither a RELION star"),
    (("--task", "anisotropic", "half1.mrc", "half2.mrc", "--orientations", "half2.mrc"), "half2.mrc: no text"),
    (("--task", "anisotropic", "half1.mrc", "half2.mrc", "--orientations", "nan.txt"), "nan.txt: .*no numbers"),
    (("--task", "anisotropic", "half1.mrc", "half2.mrc", "--tilt-range", "-45", "45", "--alpha", "0"), "--alpha 0: want a positive number"),
    (("half1.mrc", "-o", "nowhere/a.mrc"), "nowhere: no such folder"), (("half1.mrc", "-o", "a.txt"), "a.txt: maps are written as .mrc"),
    (("--task", "likelihood", "half1.mrc", "--voxel-size", "12"), "half1.mrc: voxels of 12 Å hold none of the detail"),
    (("--task", "likelihood", "half1.mrc", "--mask", "half1.mrc"), "--mask: --task likelihood changes no map"),
    (("--task", "generate", "--box", "0"), "--box 0: at least one"),
    (("half1.mrc", "--mask", "other.mrc"), "other.mrc: .*20.* voxels, but half1.mrc has .*16"),
    (("half1.mrc", "--mask", "half2.mrc"), "half2.mrc: a mask is 0 to 1"),
    (("--task", "generate", "half1.mrc"), "wants no input; 1 given"), ((), "wants a map or more; 0 given")])
def test_what_a_task_cannot_use_is_said_in_one_line_and_leaves_no_file(tmp_path, run, halves, monkeypatch, argv, message):
    write_mrc(tmp_path / "other.mrc", molecule((20, 20, 20)))
    write_mrc(tmp_path / "noise.mrc", random((16, 16, 16), 9))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "nan.txt").write_text("0 90 nan\n")
    (tmp_path / "short.csv").write_text("0.9\n0.5\n0.1\n")
    (tmp_path / "half1.mrc.txt").write_text("not a number\n")
    monkeypatch.chdir(tmp_path)
    before = names(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run(*argv)
    assert "\n" not in str(caught.value) and names(tmp_path) == before


def test_an_error_ends_the_program_with_one_line_and_a_non_zero_status(tmp_path, ckpt):
    command = [sys.executable, sampling.__file__, "nope.mrc", "--ckpt", ckpt]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines() == ["sampling.py: nope.mrc: no such file"]
