"""What makes a task independent of the grey scale of its maps.

    work = sign (map - background)          before the task                                  (1)
    map = sign work + background            after it                                         (2)

The networks know protein that is bright above solvent at 0. Tomograms are bytes around 105, and
subtomogram averages often have dark protein. So background and sign are measured (volume.py), said,
taken out by (1) and given back by (2) in every map that a task returns. A map with background 0 and
bright protein passes through unchanged.
"""

import functools
import inspect
from dataclasses import replace

from torch import Tensor

import volume
from fsc_half_maps import match_half_maps, place_notes, shift_notes
from mrc import Map
from posterior import Observation
from report import Result
from sampling_settings import GreySettings
from volume import GreyScale


def in_work_scale(task):
    """The task of one map or two half maps, which then sees only work scale (1).

    The result's densities have the grey scale of the first map (2). Its report has `background` and
    `sign`. What it shows stays in work scale, because pictures and scores want bright protein.
    """
    signature = inspect.signature(task)

    @functools.wraps(task)
    def with_any_grey_scale(*args, **options) -> Result:
        # Take background and sign out of every map among the arguments.
        call = signature.bind(*args, **options)
        call.apply_defaults()
        given = call.arguments
        maps = {name: x for name, x in given.items() if isinstance(x, Map)}
        works, greys = [], []
        for map in maps.values():
            work, grey = to_work_scale(map, given["settings"], given["say"])
            works.append(work)
            greys.append(grey)
        if len(works) == 2:
            works[1] = matched(*works, given["say"])
        given |= zip(maps, works)

        # Do the task, and give them back. "_std" and "_snr" have no offset and no sign.
        result = task(*call.args, **call.kwargs)
        densities = {}
        for end, x in result.densities.items():
            densities[end] = x if end in ("_std", "_snr") else greys[0].to_map(x)
        return replace(result, densities=densities, report=result.report | facts_of(greys))

    return with_any_grey_scale


def to_work_scale(
    map: Map, settings: GreySettings, say=print, tolerance: float = 0.03
) -> tuple[Map, GreyScale]:
    """The map with background 0 and bright protein (1), and its own grey scale.

    tolerance: of `volume.find_grey_scale`.
    """
    name = map.path.name if map.path else "map"
    if settings.solvent:  # 0 leaves a map as it is, whatever its values
        check_solvent(map, settings.solvent, name)
    grey = volume.find_grey_scale(map.density, settings.solvent, settings.invert, tolerance)
    for note in grey.notes:
        say(f"{name}: {note}")
    if grey.contrary:
        looks, flag = ("bright", "--invert") if grey.sign < 0 else ("dark", "--no-invert")
        say(
            f"warning: protein of {name} looks {looks}, but {flag} was given; if that is wrong, "
            "the result means nothing"
        )
    if grey.unclear:
        say(f"{name}: if it is dark, give --invert; --no-invert silences this")
        say(
            f"warning: bright and dark density of {name} are alike, as in noise alone. If it is "
            "noise, every result of it means nothing"
        )
    return replace(map, density=grey.to_work(map.density)), grey


def check_solvent(map: Map, solvent: float, name: str) -> None:
    """Raises ValueError if a background that was given is none of the map's values."""
    low, high = float(map.density.min()), float(map.density.max())
    if not low <= solvent <= high:
        raise ValueError(
            f"a background of {solvent:g} is outside of the values of {name}, {low:g} to "
            f"{high:g}; give the value of its solvent, or leave it out"
        )


def say_scale(observation: Observation, settings: GreySettings, say=print) -> None:
    """One line on the maximum that the prior takes for 1."""
    maximum, error = observation.scale.maximum, observation.maximum_error
    if settings.maximum is not None:
        words = ", as given"
    elif error is None:
        words = " (the classical answer's, too low: no signal, or no references in --ckpt)"
    else:
        words = f", give or take {error / maximum:.0%}; --grey-scale sets it"
    kind = "a sharp map"
    if observation.spectrum is not None:
        kind = "a sharp map with detail weakened as follows"
    say(f"grey scale: in {kind} protein would reach {maximum:.4g} above solvent{words}")
    if error is not None and error > maximum / 2:
        say("warning: the brightness of protein cannot be told; this map may hold noise alone")


def say_spectrum(spectrum: Tensor | None, method: str, say=print) -> None:
    """One line on the spectrum (grey_scale.py (2)) in which a method works, if it is changed."""
    if spectrum is None:
        return
    words = "this map is sharpened more than those that the network knows"
    if method in ("pocs", "wiener"):
        words = "this map is much sharpened, so that non-negativity would not fit"
    low = float(spectrum.min())
    say(
        f"sharpening: {words}; fine detail is weakened, to {low:.2g} at most, and strengthened "
        "again at the end"
    )


def scale_facts(observations: list[Observation]) -> dict:
    """For the .json: numbers and lists, of two half maps lists of them, of no observation none."""
    if not observations:
        return {}
    facts = {
        "maximum": [o.scale.maximum for o in observations],
        "maximum_error": [o.maximum_error for o in observations],
        "spectrum": [None if o.spectrum is None else o.spectrum.tolist() for o in observations],
    }
    if len(observations) == 1:
        facts = {name: values[0] for name, values in facts.items()}
    return facts


def facts_of(greys: list[GreyScale]) -> dict:
    """For the .json: numbers, or lists of them for two half maps."""
    if len(greys) == 1:
        return {"background": greys[0].background, "sign": greys[0].sign}
    return {"background": [g.background for g in greys], "sign": [g.sign for g in greys]}


def matched(half_map_1: Map, half_map_2: Map, say=print) -> Map:
    """Half map 2 in the grey scale of half map 1. Raises ValueError if they are not independent."""
    # Half maps on different grids are refused later.
    if half_map_1.density.shape != half_map_2.density.shape:
        return half_map_2
    density, notes = match_half_maps(half_map_1.density, half_map_2.density)
    notes = [f"{note}: brought to it" for note in notes]
    for note in notes + place_notes(half_map_1, half_map_2):
        say(note)
    for note in shift_notes(half_map_1.density, density):
        say(f"warning: {note}")
    return replace(half_map_2, density=density)
