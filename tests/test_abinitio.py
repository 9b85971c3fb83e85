"""Claims of abinitio.py: losses, densities from projections, Algorithm 3, and the program."""

import functools
import json

import mrcfile
import numpy as np
import pytest
import torch
from made_maps import prior_of
from test_abinitio_poses import density, projections, random_rotations, rng

import abinitio
import abinitio_poses
import checkpoint
import degrade
import fourier
import fsc
import mrc
import posterior
import sampling
from checkpoint import Prior
from model_hdit import HDiT, HDiTConfig
from sampling_settings import AbInitioSettings
from sampling_tasks import ab_initio

SMALL = HDiTConfig(depths=(1, 1), widths=(24, 48), d_head=12, patch_size=4)


# ---- Losses


def test_losses_equal_their_formulae():
    p, y = torch.randn(2, 3, 5, 5, generator=rng(), dtype=torch.float64)
    cor = []
    background = []
    for a, b in zip(p.flatten(1).numpy(), y.flatten(1).numpy()):
        cor.append(-a @ b / np.sqrt(a @ a * (b @ b)))
        background.append((a[b < np.quantile(b, 0.7)] ** 2).sum())
    np.testing.assert_allclose(abinitio.psi_cor(p, y), cor)
    np.testing.assert_allclose(abinitio.psi_sg(p, y), cor)
    np.testing.assert_allclose(abinitio.psi_bg(p, y, 0.7), background)
    assert abinitio.psi_bg(p, y, 0.0).eq(0).all()


def test_psi_sg_changes_the_norm_of_projections_and_psi_cor_does_not():
    p, y = torch.randn(2, 3, 5, 5, generator=rng(), dtype=torch.float64)
    p.requires_grad_()

    def slope_along_p(loss):
        (gradient,) = torch.autograd.grad(loss.sum(), p)
        return (gradient * p).sum((1, 2)).detach()

    cor = abinitio.psi_cor(p, y)
    zero = torch.zeros_like(cor)
    torch.testing.assert_close(slope_along_p(cor), zero, atol=1e-12, rtol=0)
    torch.testing.assert_close(slope_along_p(abinitio.psi_sg(p, y)), cor)


# ---- Densities


def test_a_density_comes_back_from_projections_of_known_pose():
    images, R, shift = projections()
    k = abinitio.frequencies(12)
    y = abinitio.coefficients(images, k) * abinitio.phase(k, -shift, 32)
    x = abinitio.fit(torch.zeros_like(density()), R, y, k, iterations=30)
    assert x.min() >= 0
    assert fsc.fsc(x, density())[1:12].min() > 0.97
    inside = density() > 0.1 * density().max()
    assert abs(x[inside].mean() / density()[inside].mean() - 1) < 0.05


def test_a_density_comes_back_from_projections_of_unknown_pose_up_to_its_hand():
    x, _ = abinitio.reconstruct(projections()[0], rng(), max_shift=2, radius=12, starts=1)
    aligned = abinitio.align(x, density()).density
    assert fsc.fsc(aligned, density())[1:10].min() > 0.9


# ---- With a prior


def make_prior(net=None, voxel_size=3.0, box=32):
    return Prior(
        net=net, kind="hdit", voxel_size=voxel_size, box=box, mean=0.05, std=0.13, sha256=""
    )


def test_algorithm_3_descends_the_loss_of_its_poses(monkeypatch):
    losses = []
    projection_loss = abinitio.projection_loss

    def record(*args, **settings):
        losses.append(projection_loss(*args, **settings))
        return losses[-1]

    monkeypatch.setattr(abinitio, "projection_loss", record)
    images = projections()[0][:6]
    settings = dict(max_shift=2, radius=6, steps=15, q=0.0)
    abinitio.algorithm_3(lambda x, t, g: 0 * x, make_prior(), images, [rng()], **settings)
    first = losses[0].mean()
    last = losses[-1].mean()
    assert last < first - 0.2
    assert last < -0.6


def test_without_shifts_no_sample_moves_an_image(monkeypatch):
    images = projections()[0][:6]
    asked = []

    def find_poses(volume, images, *, max_shift, start, **_):
        asked.append(max_shift)
        return start

    monkeypatch.setattr(abinitio, "find_poses", find_poses)
    prior = make_prior()
    poses = abinitio.Poses(random_rotations(6), torch.zeros(6, 3))
    N = images.shape[-1]
    settings = dict(radius=6, steps=5, t_start=0.5, iterations=1, max_shift=0)
    start = torch.rand(N, N, N, generator=rng())
    scale = abinitio.Scale(1.0, prior.mean, prior.std)
    samples = abinitio.restore_projections(
        lambda x, t, g: 0 * x, images, start, poses, scale, [rng()], **settings
    )
    assert asked == [0] and samples.isfinite().all()


@pytest.mark.parametrize("method, steps", [("prior", 6), ("paper", 2)])
def test_sample_i_does_not_depend_on_how_many_are_drawn_at_once(method, steps, monkeypatch):
    images = fourier.resample(projections()[0][:12], (12, 24, 24))
    net = HDiT(SMALL).requires_grad_(False)
    # An untrained network answers 0. Give it something to say.
    torch.nn.init.normal_(net.patch_out.proj.weight, std=0.05, generator=rng())
    prior = make_prior(net, 4.0, 24)

    def no_search(images, generator, **_):
        poses = abinitio.Poses(random_rotations(12), torch.zeros(12, 3))
        return torch.rand(24, 24, 24, generator=rng(5)), poses

    def velocity(x, t, generators):
        return posterior.tiled_velocity(prior, x, t, generators)

    def draw(per_call):
        settings = dict(samples=3, seed=1, max_shift=1, steps=steps, samples_per_call=per_call)
        found = abinitio.samples_of(velocity, prior, images, method, **settings)
        return torch.stack([x for name, x in found if name == method])

    # `align` would turn the samples of the paper's method, `reconstruct` takes long.
    monkeypatch.setattr(abinitio, "align", lambda x, frame: abinitio_poses.Aligned(x, False, 1.0))
    monkeypatch.setattr(abinitio, "reconstruct", no_search)
    together = draw(3)
    apart = draw(1)
    assert (together[0] - together[1]).norm() > 0.1 * together[0].norm()
    # Batches of other sizes round differently.
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4 * float(apart.abs().max()))


# ---- The program


def write(path, array, **header):
    """An MRC file of 3 Å voxels. header: fields that mrcfile would set otherwise."""
    with mrcfile.new(path, np.asarray(array, np.float32), overwrite=True) as f:
        f.voxel_size = 3.0
        for name, value in header.items():
            setattr(f.header, name, value)
    return path


def save_prior(path):
    """A checkpoint of an untrained network, whose velocity is 0."""
    checkpoint.save(path, HDiT(SMALL), voxel_size=3.0, box=24, mean=0.05, std=0.13)
    return str(path)


def test_the_program_writes_a_density_and_says_which_hand_it_has(tmp_path, monkeypatch, capsys):
    # Four balls, which have no symmetry.
    blobs = torch.zeros(24, 24, 24)
    for z, y, x in ((8, 9, 14), (15, 8, 10), (12, 16, 15), (13, 12, 7)):
        blobs[z, y, x] = 1 + x / 10
    truth = fourier.lowpass(blobs, 12.0, 3.0).clamp(min=0)
    stack = write(tmp_path / "in.mrcs", degrade.project(truth, random_rotations(20)))
    mrc.write_map(tmp_path / "in_truth.mrc", mrc.Map(truth, 3.0))
    quick = abinitio.METHODS["prior"] | {"steps": 1, "t_start": 0.05}
    monkeypatch.setitem(abinitio.METHODS, "prior", quick)
    monkeypatch.setattr(abinitio, "anneal", functools.partial(abinitio.anneal, iterations=20))
    ckpt = save_prior(tmp_path / "p.pt")
    sampling.main(["--task", "abinitio", str(stack), "--samples", "1", "--ckpt", ckpt])

    out = mrc.read_map(tmp_path / "in_abinitio.mrc")
    assert out.density.shape == (24,) * 3
    assert out.voxel_size == (3.0,) * 3
    report = json.loads((tmp_path / "in_abinitio.json").read_text())
    assert report["projections"] == 20
    assert report["fsc"]["classical"]["auc"] > 0.8
    assert min(report["fsc"]["classical"]["whole"][1:6]) > 0.9
    mirrored = abinitio.align(out.density, truth).mirrored
    assert report["mirrored"]["restored"] == mirrored
    printed = capsys.readouterr().out.split("restored")[1].splitlines()[0]
    assert ("mirrored" if mirrored else "as it is") in printed


@pytest.mark.parametrize(
    "size, method, warned", [(4, "prior", 1), (4, "classical", 0), (2, "prior", 0)]
)
def test_pixels_too_coarse_for_the_prior_get_a_warning(size, method, warned, monkeypatch):
    density = torch.zeros(24, 24, 24)
    monkeypatch.setattr(abinitio, "samples_of", lambda *_, **__: [(method, density)])
    prior = prior_of(torch.nn.Identity(), 16)  # of 1.5 Å
    said = []
    stack = mrc.Map(torch.ones(3, 24, 24), size)
    ab_initio(stack, prior, AbInitioSettings(method=method), said.append)
    assert sum(f"pixels of {size} Å hold no detail" in line for line in said) == warned


def test_a_row_of_table_6_reaches_algorithm_3_and_a_folder_its_default_name(tmp_path, monkeypatch):
    images = np.random.default_rng(0).random((3, 24, 24)).astype("f")
    stack = write(tmp_path / "in.mrcs", images * abinitio.ball(24)[12].numpy())
    asked = {}

    def no_samples(*_, **settings):
        asked.update(settings)
        return torch.zeros(1, 24, 24, 24)

    monkeypatch.setattr(abinitio, "algorithm_3", no_samples)
    (tmp_path / "out").mkdir()
    argv = ["--task", "abinitio", str(stack), "--method", "paper", "--losses", "10028"]
    argv += ["--samples", "1", "--ckpt", save_prior(tmp_path / "p.pt"), "-o", str(tmp_path / "out")]
    sampling.main(argv)
    assert asked["stop_gradient"] is True
    assert asked["q"] == 0
    assert (tmp_path / "out/in_abinitio.mrc").exists()
