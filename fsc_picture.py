"""FSC curves on a matplotlib axis.

    draw_fsc(axis, frequency, curves, styles=None, legend_title=None)

The axis below shows the spatial frequency in 1/Å, the axis above the resolution in Å.
`fsc_score.py` draws a whole figure with it, `report.py` one panel of a larger figure.
"""

import torch

# Usual thresholds: two half maps (Rosenthal & Henderson 2003), a map and its truth or model.
THRESHOLDS = (0.143, 0.5)


def draw_fsc(axis, frequency, curves, styles=None, legend_title=None) -> None:
    """Draw FSC curves over spatial frequency, with a legend and lines at the usual thresholds.

    axis: of matplotlib; frequency: (n,) in 1/Å, rising from 0. curves: label -> (n,) values, lists
    or tensors, nan where unknown. A label that begins with "_" stays out of the legend.
    styles: label -> settings of matplotlib's `plot`, such as {"color": "black", "lw": 2}.
    """
    nyquist = frequency[-1]
    lowest = 0.0
    for label, curve in curves.items():
        curve = torch.as_tensor(curve)
        style = (styles or {}).get(label, {})
        axis.plot(frequency, curve, label=label, **style)
        lowest = min(lowest, float(curve[1:].nan_to_num(0).min()))

    # The thresholds, and the line of no correlation.
    for threshold in THRESHOLDS:
        axis.axhline(threshold, color="0.5", lw=0.8, ls="--")
        axis.annotate(
            f"{threshold:g}",
            (nyquist, threshold),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            color="0.4",
        )
    axis.axhline(0, color="0.8", lw=0.8, zorder=0)

    axis.set_xlim(0, nyquist)
    axis.set_ylim(min(-0.1, lowest - 0.05), 1.02)
    axis.set_xlabel("spatial frequency (1/Å)")
    axis.set_ylabel("Fourier shell correlation")
    axis.legend(frameon=False, title=legend_title)

    # Above each tick in 1/Å stands the same resolution in Å.
    ticks = [tick for tick in axis.get_xticks() if 0 < tick <= nyquist]
    top = axis.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{1 / tick:.3g}" for tick in ticks])
    top.set_xlabel("resolution (Å)")
