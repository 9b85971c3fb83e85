"""The picture beside a restored map: slices, their spread, Fourier power and the FSC.

    draw(result, content)      a figure of matplotlib; None where it is not installed

Slices go through the middle of the box, across `result.across`: for the wedge across the tilt axis,
where the wedge shows. All are in Å, in one grey scale. Fourier power is the central plane of the
same direction, its logarithm over five decades. `content` is that of the .json.
"""

import math
from typing import Any

import torch
from torch import Tensor

import fsc
from fsc_picture import draw_fsc

AXES = "zyx"
DECADES = 5  # of Fourier power that are shown


def draw(result, content: dict[str, Any]):
    """A figure of central slices in one grey scale, beside power and FSC; None without matplotlib.

    result: report.Result. content: of the .json.
    """
    # matplotlib is optional.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None

    # Every panel is a function that draws on an axis.
    maps, across = result.shown, result.across
    sides = [n * v for n, v in zip(result.grid.density.shape, result.grid.voxel_size)]
    top = max(brightest(x) for x in shown_for_scale(maps))
    panels = []
    for name, x in maps.items():
        panels.append((draw_slice, name, x, across, sides, -0.15 * top, top))
    if "_std" in result.densities:
        std = result.densities["_std"]
        highest = brightest(std)
        name = f"standard deviation, 0 to {highest:.2g}"
        panels.append((draw_slice, name, std, across, sides, 0, highest))
    if result.region is not None:
        # What was measured, and what was put beside it.
        for name in ("input", "restored"):
            if name in maps:
                panels.append((draw_power, name, maps[name], maps["restored"], across, sides))
    if content["fsc"]:
        shape = next(iter(maps.values())).shape
        box, voxel_size = fsc.shell_side(shape, content["truth_voxel_size"])
        panels.append((draw_scores, content["fsc"], box * voxel_size))
    elif "fsc_of_halves" in content:
        panels.append((draw_halves, content, min(sides)))

    # At most four panels in a row.
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(3.4 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (draw_panel, *what) in zip(axes, panels):
        draw_panel(axis, *what)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def shown_for_scale(maps: dict[str, Tensor]) -> list[Tensor]:
    """The maps that set the grey scale: the restored one, because noise would set it otherwise."""
    return [maps["restored"]] if "restored" in maps else list(maps.values())


def brightest(x: Tensor) -> float:
    """A value that hardly any voxel exceeds, from a part of the voxels."""
    return float(torch.quantile(x.flatten()[::7][: 10**7], 0.9995))


def draw_slice(axis, name: str, x: Tensor, across: int, sides, low: float, high: float) -> None:
    """The middle slice of x (D, H, W) across an axis, with a scale bar. sides: of the box, in Å."""
    up, right = (i for i in range(3) if i != across)
    middle = x.select(across, x.shape[across] // 2)
    extent = (0, sides[right], 0, sides[up])
    # The grey scale of a flat map must not be empty.
    high = max(high, low + 1e-30)
    axis.imshow(middle.numpy(), cmap="gray_r", vmin=low, vmax=high, origin="lower", extent=extent)
    axis.set_title(f"{name}\n{AXES[right]}{AXES[up]} slice", fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])

    # A bar of about a quarter of the width, in the lower left corner.
    length = round_length(sides[right] / 4)
    x_0 = 0.05 * sides[right]
    y_0 = 0.05 * sides[up]
    axis.plot([x_0, x_0 + length], [y_0, y_0], color="tab:red", lw=3, solid_capstyle="butt")
    above = y_0 + 0.02 * sides[up]
    axis.text(x_0, above, f"{length:g} Å", color="tab:red", fontsize=9)
    axis.set_xlim(0, sides[right])
    axis.set_ylim(0, sides[up])


def round_length(length: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is not longer."""
    power = 10 ** math.floor(math.log10(length))
    return max(step * power for step in (1, 2, 5) if step * power <= length)


def draw_power(axis, name: str, x: Tensor, brightest_map: Tensor, across: int, sides) -> None:
    """log |F x|^2 on the central plane across an axis, the zero frequency in the middle."""
    # The central plane of the transform is that of the projection.
    planes = []
    for density in (x, brightest_map):
        projection = density.double().mean(across)
        projection = projection - projection.mean()
        planes.append(torch.fft.fftshift(torch.fft.fft2(projection).abs().square()))

    # A plane without power has no logarithm.
    logs = [plane.clamp(min=1e-300).log10() for plane in planes]
    power = logs[0]
    highest = float(logs[1].max())

    # Pixel i of n is the frequency (i - n//2) / side, and it is one step wide.
    up, right = (i for i in range(3) if i != across)
    extent = []
    for i in (right, up):
        n = x.shape[i]
        extent += [(-(n // 2) - 0.5) / sides[i], (n - n // 2 - 0.5) / sides[i]]
    low = highest - DECADES
    axis.imshow(power.numpy(), cmap="magma", vmin=low, vmax=highest, origin="lower", extent=extent)
    axis.set_title(f"{name}: Fourier power\nk{AXES[right]} k{AXES[up]} plane (1/Å)", fontsize=10)
    axis.tick_params(labelsize=8)
    axis.locator_params(nbins=5)  # labels such as -0.075 need their room


def draw_halves(axis, content: dict[str, Any], side: float) -> None:
    """The FSC of the half maps before and after. side: of the box in Å, the shortest one."""
    # The curves begin with shell 1.
    curves = {"given": [1.0, *content["fsc_of_halves"]]}
    if "fsc_of_restored_halves" in content:
        curves["restored"] = [1.0, *content["fsc_of_restored_halves"]]
    frequency = [k / side for k in range(len(curves["given"]))]
    draw_fsc(axis, frequency, curves)
    axis.set_title("FSC of the half maps", fontsize=10)


def draw_scores(axis, scores: dict[str, dict], side: float) -> None:
    """The FSC of each map with the truth. Where a region was scored, it is drawn solid.

    side: of the box in Å, the one that makes the shells.
    """
    # A label that begins with "_" stays out of the legend.
    curves, styles = {}, {}
    for i, (name, values) in enumerate(scores.items()):
        label = f"{name} {values.get('auc_missing', values['auc']):.2f}"
        curves[label] = values.get("missing", values["whole"])
        styles[label] = {"color": f"C{i}"}
        if "missing" in values:
            curves[f"_{name}"] = values["whole"]
            styles[f"_{name}"] = {"color": f"C{i}", "lw": 0.8, "ls": "--"}

    # Shell k is at k cycles per box.
    shells = len(values["whole"])
    frequency = [k / side for k in range(shells)]
    draw_fsc(axis, frequency, curves, styles)
    has_region = "missing" in values
    title = "FSC: missing wedge (-), whole (--)" if has_region else "FSC with the truth"
    axis.set_title(title, fontsize=10)
