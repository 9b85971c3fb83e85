"""How well two maps, or a map and an atomic model, agree: all numbers and curves at once.

    compare_half_maps     FSC of two half maps, corrected for a mask
    compare_with_truth    FSC of a map with what it should be
    compare_with_model    FSC, correlations and Q-scores of a map with an atomic model

Each takes tensors and returns an `Agreement`. The numbers themselves are those of fsc.py,
fsc_half_maps.py, fsc_model.py and fsc_mtriage.py.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atoms import Model, atoms_inside
from atoms_records import SYMBOLS
from fsc import auc, fsc, resolution, shell_side
from fsc_half_maps import (
    directional_fsc,
    guinier_b_factor,
    masked_fsc,
    match_half_maps,
    sharpen,
    sphericity,
)
from fsc_model import correlation, has_factors, map_model_cc, q_score, structure_factors
from fsc_mtriage import map_model_resolution
from mrc import Map
from volume import find_grey_scale


@dataclass
class Agreement:
    """What a comparison found.

    numbers: in the order to print, lengths in Å. "box" and "voxel_size" are those of the side that
    makes the shells. curves: FSC (box//2 + 1,) by name, the best one first. residues: (label,
    number of atoms, mean Q-score) each. threshold: of the FSC, the usual one for such maps.
    maps: to write, by the name of the file, each with the label for its header.
    """

    numbers: dict[str, float]
    curves: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    residues: list[tuple] = field(default_factory=list)
    threshold: float = 0.5
    maps: dict[str, tuple[Map, str]] = field(default_factory=dict)


# ---- The three comparisons. Maps and masks are (D, H, W); a mask goes from 0 to 1; lengths in Å.


def compare_half_maps(half_map_1, half_map_2, voxel_size, mask=None, convention="ours", seed=0):
    """`Agreement` of two half maps: FSC, corrected for the mask if there is one.

    seed: of the random phases. Raises ValueError if the maps are equal or the mask does not fit.
    """
    if torch.equal(half_map_1, half_map_2):
        raise ValueError("both files hold the same map; give two independent half maps")
    # An FSC does not see a factor, but it has to be said.
    _, notes = match_half_maps(half_map_1, half_map_2)
    how = {"convention": convention, "voxel_size": voxel_size}
    box, voxel = shell_side(half_map_1.shape, voxel_size, convention)
    found = Agreement({"box": box, "voxel_size": voxel}, {}, notes, threshold=0.143)
    if mask is None:
        found.curves["unmasked"] = fsc(half_map_1, half_map_2, **how)
        return found

    # Four curves, and the shell from which on phases were random.
    *curves, first_random = masked_fsc(half_map_1, half_map_2, mask, seed=seed, **how)
    found.curves |= zip(("corrected", "unmasked", "masked", "randomised"), curves)
    found.numbers["phases_randomised_from"] = box * voxel / first_random

    # A tight mask correlates by itself, more than the correction can take out.
    corrected, _, masked, randomised = curves
    found.notes += mask_notes(corrected, randomised, voxel, box, convention)
    lost = corrected.isnan() & ~masked.isnan()
    if lost.any():
        found.notes.append(
            f"corrected: nan in {int(lost.sum())} shells where the mask alone correlates too much "
            "to be corrected, so no resolution and no FSC_AUC; use a softer or wider mask"
        )
    return found


def mask_notes(curve, randomised, voxel_size, box, convention) -> list[str]:
    """A note if the mask alone correlates over 0.1 at the resolution of the curve (n,)."""
    end = box * voxel_size / resolution(curve, voxel_size, box=box, convention=convention)
    at_end = float(randomised[(torch.arange(len(randomised)) - end).abs().argmin()])
    if not at_end > 0.1:
        return []
    correlates = f"the mask alone correlates {at_end:.2f} at the resolution"
    return [f"{correlates}: use a softer or wider mask"]


def compare_with_truth(density, truth, voxel_size, mask=None, convention="ours"):
    """`Agreement` of a map with what it should be: FSC and correlation.

    The two are not independent, so the FSC is not corrected for the mask.
    """
    how = {"convention": convention, "voxel_size": voxel_size}
    box, voxel = shell_side(density.shape, voxel_size, convention)
    numbers = {"box": box, "voxel_size": voxel, "correlation": correlation(density, truth)}
    if mask is None:
        return Agreement(numbers, {"unmasked": fsc(density, truth, **how)})
    # Only the two curves that no correction has changed.
    curves = masked_fsc(density, truth, mask, **how)
    notes = mask_notes(curves.masked, curves.randomised, voxel, box, convention)
    return Agreement(numbers, {"masked": curves.masked, "unmasked": curves.unmasked}, notes)


def compare_with_model(density, model: Model, voxel_size, corner, d_min=None, convention="ours"):
    """`Agreement` of a map with an atomic model: FSC, resolutions, correlations and Q-scores.

    corner: the centre of voxel (0, 0, 0) in the frame of the model; d_min: the resolution of the
    correlations, default d_model. Atoms without scattering factors are left out, which a note says.
    Raises ValueError if no atom lies in the map.
    """
    # The atoms in the map.
    inside = atoms_inside(model.xyz, density.shape, voxel_size, corner)
    if not inside.any():
        raise ValueError("no atom lies in the map; bring the model into the frame of the map")
    known = has_factors(model.atomic_number)
    used = inside & known
    if not (model.occupancy[used] > 0).any():
        raise ValueError(
            f"none of the {int(inside.sum())} atoms in the map has scattering factors and an "
            "occupancy above 0; correct the model"
        )
    notes = left_out(model, inside, known)

    # Leave out the others, and give the rest to each measure.
    model = Model(*(x[used] for x in model[:5]), model.labels)
    grid = {"voxel_size": voxel_size, "origin": corner}
    atoms = {name: getattr(model, name) for name in model._fields[:4]} | grid
    residue, labels = model.residue, model.labels

    # The resolution, and the correlations there.
    box, voxel = shell_side(density.shape, voxel_size, convention)
    numbers = {"box": box, "voxel_size": voxel, "atoms": len(residue)}
    numbers |= map_model_resolution(density, **atoms)
    del numbers["curve"]
    numbers["resolution"] = d_min or numbers["d_model"]
    numbers |= map_model_cc(density, resolution=numbers["resolution"], **atoms)

    # Q-scores of all atoms but hydrogens, and their mean in each residue.
    q = torch.full_like(model.b_iso, math.nan)
    heavy = model.atomic_number > 1
    q[heavy] = q_score(density, model.xyz[heavy], **grid)
    numbers["q_score_mean"] = float(q.nanmean())
    residues = []
    for i in residue.unique().tolist():
        scores = q[residue == i]
        residues.append((labels[i], len(scores), float(scores.nanmean())))

    # The plain map-model FSC: the model's map to Nyquist, our shells, no smoothing.
    full = torch.fft.irfftn(structure_factors(density.shape, **atoms), s=density.shape)
    curve = fsc(density, full, convention=convention, voxel_size=voxel_size)
    found = Agreement(numbers, {"map_model": curve}, notes, residues)
    if d_min is None:
        d_model = f"{numbers['d_model']:g} Å, the map's d_model"
        found.notes.append(f"no --resolution given: correlations at {d_model}")
    return found


def left_out(model: Model, inside: Tensor, known: Tensor) -> list[str]:
    """Notes of a model: on how it was read, and on atoms outside the map or without factors."""
    notes = list(model.notes)
    outside = int((~inside).sum())
    if outside:
        notes.append(f"{outside} of {len(inside)} atoms lie outside the map and are left out")
    numbers, counts = model.atomic_number[inside & ~known].unique(return_counts=True)
    if len(numbers):
        symbols = [SYMBOLS.split()[number - 1] for number in numbers.tolist()]
        names = ", ".join(f"{count} {name}" for count, name in zip(counts.tolist(), symbols))
        notes.append(f"atoms without scattering factors are left out: {names}")
    return notes


# ---- More about two maps


def directional_numbers(a, b, voxel_size) -> dict[str, float]:
    """Sphericity, and the resolutions of the best and the worst direction."""
    box, voxel = shell_side(a.shape, voxel_size)
    # The FSC in cones around many directions, and the resolution in each.
    curves = directional_fsc(a, b, voxel_size=voxel_size)
    curves[..., 1:5] = math.nan  # fewer than 20 coefficients in a cone: chance
    each = resolution(curves, voxel, box=box)
    best, worst = float(each.min()), float(each.max())
    return {"sphericity": sphericity(each), "best_direction": best, "worst_direction": worst}


def sharpened_mean(half_map_1, half_map_2, curve, voxel_size, b_factor=None):
    """(The mean of two half maps, weighted by their FSC and sharpened; the B-factor in Å²).

    Without a B-factor, it is fitted.
    """
    # End the map where RELION would: at a whole shell.
    half_map_2, _ = match_half_maps(half_map_1, half_map_2)
    mean = (half_map_1 + half_map_2) / 2
    end = float(resolution(curve, voxel_size, box=min(mean.shape), convention="relion"))
    if b_factor is None:
        b_factor = guinier_b_factor(mean, curve, voxel_size, end)
    return sharpen(mean, curve, voxel_size, b_factor, end), b_factor


def score_curves(found: Agreement, convention: str) -> dict[str, dict]:
    """Resolutions in Å and FSC_AUC of each curve. Adds a note for a curve that never falls."""
    box, voxel = found.numbers["box"], found.numbers["voxel_size"]
    scores = {}
    for name, curve in found.curves.items():
        if name == "randomised":
            continue
        # Where the curve falls below each threshold.
        at = {}
        for t in (0.143, 0.5):
            at[t] = float(resolution(curve, voxel, t, box=box, convention=convention))
        scores[name] = {"resolution_0143": at[0.143], "resolution_05": at[0.5]}
        scores[name]["auc"] = float(auc(curve))

        # A correction that failed in some shells says nothing about the whole curve.
        masked = found.curves.get("masked", curve)
        if name == "corrected" and (curve.isnan() & ~masked.isnan()).any():
            scores[name] = dict.fromkeys(scores[name], math.nan)
            continue

        # `resolution` then returns the last shell.
        if not (curve[1:] < found.threshold).any():
            limit = f"{at[found.threshold]:.2f} Å is the grid's limit, not the map's"
            found.notes.append(f"{name}: never below {found.threshold:g}; {limit}")
    return scores


def without_background(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Two maps with background 0, and a note for each whose background was not."""
    densities, notes = [], []
    for i, x in enumerate((a, b), 1):
        # An inverted map stays inverted: its FSC with another one says so.
        grey = find_grey_scale(x)
        background = grey.background
        if background != 0:
            notes.append(f"map {i}: background {background:.5g} found and subtracted")
            x = x - background
        densities.append(x)
    return *densities, notes
