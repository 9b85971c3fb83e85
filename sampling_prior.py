"""The prior without an observation: new densities, and how likely a density is.

Both are plain functions of a prior and settings that return a Result, as in sampling_tasks.py.
CryoFM: arXiv:2410.08631, sections 4 and 5.5, appendix B.2; the equations are in flow.py.
"""

import math

import torch
from torch import Generator, Tensor

import augment
import flow
import mrc
import posterior
import volume
from checkpoint import Prior
from memory import check_memory
from mrc import Map
from report import Progress, Result, say_work
from sampling_checks import EQUAL_TO_NOTE, check_given_maximum, say_unlike_a_map
from sampling_grey_scale import facts_of, to_work_scale
from sampling_settings import GenerateSettings, LikelihoodSettings


def generate(prior: Prior, settings: GenerateSettings = GenerateSettings(), say=print) -> Result:
    """Densities from noise alone, (box, box, box) at the prior's voxel size.

    Their 99.999 percentile is about 1. Raises ValueError if memory is short.
    """
    # By default a density is as large as a training crop.
    box = settings.box or prior.box
    steps = settings.steps or 50
    needed = 4 * box**3 * (settings.samples + 10 * min(settings.samples, 8))
    words = f"{settings.samples} densities of {box}^3 voxels"
    check_memory(needed, words, "give a smaller --box or fewer --samples")
    say_work(prior, (box,) * 3, settings.samples, steps, settings.solver, say)
    tick = Progress(settings.samples * steps, say)

    # Eight at a time. Each depends on the seed and its number alone.
    found = []
    for first in range(0, settings.samples, 8):
        numbers = range(first, min(first + 8, settings.samples))
        generators = [augment.item_generator(settings.seed, i) for i in numbers]
        found += generate_together(prior, box, steps, settings.solver, generators, tick)

    # The picture is a contact sheet.
    shown = {f"{settings.seed}, {i + 1}": x for i, x in enumerate(found)}
    densities = dict(zip(settings.suffixes, found))
    facts = {"steps": steps, "box": box, "solver": settings.solver}
    return Result(Map(found[0], prior.voxel_size), densities, shown, facts)


def generate_together(
    prior: Prior, box: int, steps: int, solver: str, generators: list[Generator], tick
) -> Tensor:
    """Densities (K, box, box, box), one per generator, by flow.py (5)."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if box != prior.box:
            return posterior.tiled_velocity(prior, x, float(t[0]), generators)
        # A crop as in training: neither rolled nor turned.
        with flow.autocast(x.device):
            return prior.net(x[:, None], t)[:, 0]

    def counted(range_of_steps):
        for step in range_of_steps:
            yield step
            tick(len(generators))

    # Integrate from noise to data, and go to the scale of densities.
    noise = flow.draw_noise(generators, (box,) * 3, posterior.device_of(prior))
    x = flow.sample(velocity, noise, steps, solver, progress=counted)
    return x.cpu() * prior.std + prior.mean


def log_likelihood(
    map: Map, prior: Prior, settings: LikelihoodSettings = LikelihoodSettings(), say=print
) -> Result:
    """log p of the map's density, clipped and divided by its 99.999 percentile: flow.py (6)-(8).

    The map, padded with solvent, is taken for independent tiles of the prior's box. The result
    holds each tile's nats per voxel. The lower they are, the less expected is the tile.
    Raises ValueError if the voxels are far too coarse for the prior.
    """
    if max(map.voxel_size) > 2 * prior.voxel_size:
        raise ValueError(
            f"voxels of {max(map.voxel_size):g} Å hold none of the detail that this prior of "
            f"{prior.voxel_size:g} Å gives a likelihood to; give a finer map"
        )
    # A probe is as large as a tile.
    voxels = prior.box**3
    needed = 16 * voxels * min(settings.probes, voxels)
    check_memory(needed, f"{settings.probes} probes", "give fewer --probes")
    # The prior knows bright protein above solvent at 0. Voxels near 0 are clipped, so that log p
    # feels a background of less than a hundredth of the top. Subtract what is found, however small:
    # then a constant offset of the map changes nothing.
    work, grey = to_work_scale(map, settings, say, tolerance=0.0)
    say_unlike_a_map(work.density, say)

    # Cut the map into tiles. Its sides are filled up with solvent.
    box = prior.box
    # The prior knows one voxel size.
    work = mrc.resample_map(work, prior.voxel_size)
    check_given_maximum(volume.top_value(work.density, 99.999), settings, say)
    x, _ = volume.normalise(work.density, prior.mean, prior.std, maximum=settings.maximum)
    padded = torch.full([math.ceil(n / box) * box for n in x.shape], -prior.mean / prior.std)
    padded[tuple(slice(n) for n in x.shape)] = x
    corners = volume.tile_starts(padded.shape, box, box)
    device = posterior.device_of(prior)
    tiles = volume.cut_tiles(padded, corners, box)[:, None].to(device)  # (tiles, 1, box, box, box)
    share = 1 - x.numel() / padded.numel()
    if share > EQUAL_TO_NOTE:
        say(
            f"{share:.0%} of the voxels of these tiles are solvent around the map, which raises "
            "log p per voxel: compare maps of one box"
        )
    say(f"{len(tiles)} tile(s) of {box}^3 on {device}, {settings.probes} probes")

    # log p of each tile, with the standard error over the probes.
    # All tiles draw from one generator.
    generator = Generator().manual_seed(settings.seed)
    tick = Progress(len(tiles), say)
    found = []
    for tile in tiles:
        pair = flow.log_likelihood(
            prior.net,
            tile[None],
            probes=settings.probes,
            rtol=settings.tolerance,
            atol=settings.tolerance,
            std=prior.std,
            return_error=True,
            generator=generator,
        )
        found.append(torch.stack(pair).cpu())
        tick()

    # Tiles are independent, so their log p add up, and so do the squares of their errors.
    nats, errors = torch.cat(found, 1)
    total = float(nats.sum())
    error = float(errors.square().sum().sqrt())
    per_voxel = total / len(tiles) / box**3
    say(
        f"log p = {total:.0f} +- {error:.0f} nats ({len(tiles)} x {box**3} voxels), "
        f"{per_voxel:.4f} per voxel, by the prior of {prior.voxel_size:g} Å (log p of other priors "
        "cannot be compared)"
    )

    # Nearest neighbour back to the map's grid: a tile's value has no detail to keep.
    out = torch.empty_like(padded)
    for corner, value in zip(corners, nats / box**3):
        volume.crop(out, corner, box)[...] = value
    for dim, (n, m) in enumerate(zip(map.density.shape, x.shape)):
        out = out.index_select(dim, (torch.arange(n) * (m / n)).long())
    facts = {
        "method": "likelihood",
        "nats": total,
        "standard_error": error,
        "nats_per_voxel": per_voxel,
        "tiles": nats.tolist(),
        "corners": corners,
        "box": list(padded.shape),
    } | facts_of([grey])
    return Result(map, {"": out}, {"input": grey.to_work(map.density)}, facts)
