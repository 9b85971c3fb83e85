"""The picture of held-out losses against core-hours, and what more training would bring.

    python tests/picture_losses.py "name=runs/tiny/log.csv" "other=runs/other/log.csv" -o losses.png

Reads the log.csv of finished runs, from a step on where one is given: name=log.csv@4000. (A run
that was resumed with other held-out crops has a jump there.) Hours follow from the crops per second
of each log line, so time for evaluations is left out.

While the learning rate is constant, we fit L_0 + a s^-b to the loss after s steps, by least
squares. We use the second half of these points alone, because a run that starts from trained
weights first gets worse. Printed: that curve at the end of the run and after four times as many
steps, and what the fall of the learning rate brought.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

COLUMN = "held_out_t0.2"
EXPONENTS = np.linspace(0.05, 2, 40)  # b


class Curve(NamedTuple):
    """Held-out losses of a run: arrays of one length."""

    step: np.ndarray
    hours: np.ndarray
    loss: np.ndarray
    rate: np.ndarray  # learning rate over its maximum


def read_log(path: Path, batch: int, first: float) -> Curve:
    """The lines of a log.csv with a held-out loss, from step `first` on.

    Raises ValueError if there are none.
    """
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    # Add up the time of all lines.
    step = np.array([float(row["step"]) for row in rows])
    # Older logs call the speed maps_per_s.
    speed = np.array([float(row.get("crops_per_s") or row["maps_per_s"]) for row in rows])
    hours = np.cumsum(np.diff(step, prepend=0) * batch / speed) / 3600
    rate = np.array([float(row["lr"]) for row in rows])
    rate = rate / rate.max()

    loss = np.array([float(row.get(COLUMN) or "nan") for row in rows])
    chosen = np.isfinite(loss) & (step > 0) & (step >= first)
    if not chosen.any():
        raise ValueError(f"{path}: no line with {COLUMN} from step {first:g} on")
    return Curve(step[chosen], hours[chosen], loss[chosen], rate[chosen])


def power_law(step: np.ndarray, loss: np.ndarray) -> Callable:
    """The function of s, L_0 + a s^-b with a >= 0, that is nearest to the points."""
    best = None
    for b in EXPONENTS:
        terms = np.stack([np.ones_like(step), step**-b], 1)
        (floor, a), *_ = np.linalg.lstsq(terms, loss, rcond=None)
        error = float(np.square(terms @ [floor, a] - loss).sum())
        if a >= 0 and (best is None or error < best[0]):
            best = error, floor, a, b
    if best is None:  # the loss does not fall
        return lambda s: np.full_like(np.asarray(s, float), loss.mean())
    _, floor, a, b = best
    return lambda s: floor + a * np.asarray(s, float) ** -b


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("logs", nargs="+", metavar="NAME=LOG[@STEP]", help="name of a run and its log.csv")
    add("--batch", type=int, default=16, help="crops per step")
    add("-o", "--out", default="losses.png")
    args = cli.parse_args()

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for number, argument in enumerate(args.logs):
        name, equals, path = argument.partition("=")
        if not equals:
            cli.error(f"{argument}: wants NAME=LOG")
        path, _, first = path.partition("@")
        try:
            curve = read_log(Path(path), args.batch, float(first or 0))
        except (OSError, ValueError) as error:
            cli.error(str(error))
        colour = f"C{number}"
        axis.plot(curve.hours, curve.loss, ".-", color=colour, label=name)
        print(f"{name}: {curve.step[-1]:.0f} steps, {curve.hours[-1]:.2f} h, {curve.loss[-1]:.4f}")

        # Only the part before the learning rate falls can be extrapolated.
        constant = (curve.rate > 0.999).nonzero()[0]
        used = constant[len(constant) // 2 :]
        if len(used) < 4:
            print("  too few losses at a constant learning rate to go on from")
            continue
        fit = power_law(curve.step[used], curve.loss[used])
        last = curve.step[-1]
        now, later = (float(fit(s)) for s in (last, 4 * last))
        print(f"  without the fall of the rate {now:.4f}, after 4 times as many steps {later:.4f}")
        print(f"  the fall brought {now - curve.loss[-1]:.4f}")
        steps = np.geomspace(curve.step[used[0]], 4 * last, 50)
        axis.plot(steps * curve.hours[-1] / last, fit(steps), ":", color=colour)

    axis.set(xlabel="hours of one core", ylabel="held-out loss per voxel at t = 0.2", xscale="log")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
