"""What a training run shows: a line and a row of log.csv every `log_every` steps, sample maps."""

import contextlib
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch

import flow
import mrc
from train_config import TrainConfig
from train_dry_run import Speed, peak_memory
from train_objectives import TIME_BUCKETS, held_out_columns

SAMPLES = 2
SAMPLE_STEPS = 32


class Tally:
    """Losses, gradient norms and time of the steps since the last log line.

    They stay tensors until the line is written, because reading a number would wait for the GPU.
    Evaluations, samples and checkpoints are not steps: the clock stands still in `paused`.
    accumulate: micro-batches of a step on this rank.
    """

    def __init__(self, device: torch.device, accumulate: int = 1):
        # Sum and count of the losses in each time bucket.
        self.losses = torch.zeros(2, TIME_BUCKETS, dtype=torch.float64, device=device)
        self.norms = []
        self.accumulate = accumulate
        self.finite = []  # of each step: is the loss of each micro-batch, then the gradient
        self.since = time.perf_counter()
        self.waited = 0.0  # seconds, for data

    @contextlib.contextmanager
    def paused(self):
        """A block whose time does not count."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    @contextlib.contextmanager
    def waiting(self):
        """A block that waits for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def steps_per_s(self) -> float:
        return len(self.norms) / (time.perf_counter() - self.since)

    def count(self, loss: torch.Tensor, bucket: torch.Tensor) -> None:
        """A micro-batch. loss, bucket: (n,), see `train_objectives.losses`."""
        loss = loss.detach().double()  # no .item() here: it would wait for the GPU
        self.losses.index_add_(1, bucket, torch.stack((loss, torch.ones_like(loss))))
        self.finite.append(loss.isfinite().all())

    def count_step(self, norm: torch.Tensor) -> None:
        """A step, whose gradient had this norm."""
        self.norms.append(norm)
        self.finite.append(norm.isfinite())

    def first_failure(self) -> tuple[int, int] | None:
        """(step, micro-batch) of the first loss or gradient that is not finite, None without one.

        Both count from 0 at the last log line, on this rank; micro-batch `accumulate` stands for
        the gradient. It waits for the GPU.
        """
        finite = torch.stack(self.finite).tolist()
        if all(finite):
            return None
        return divmod(finite.index(False), self.accumulate + 1)


def time_columns(cfg: TrainConfig) -> list[str]:
    """Names of the training loss per time bucket, of "flow" only."""
    if cfg.objective != "flow":
        return []
    # Equal parts of 0..1.
    edges = [i / TIME_BUCKETS for i in range(TIME_BUCKETS + 1)]
    return [f"loss_t{low:g}-{high:g}" for low, high in zip(edges, edges[1:])]


def log_columns(cfg: TrainConfig) -> list[str]:
    measured = ["step", "loss", "grad_norm", "lr", "crops_per_s"]
    machine = ["seconds", "data_wait", "mfu", "precision"]
    return [*measured, *held_out_columns(cfg), *time_columns(cfg), *machine]


class Log:
    """log.csv, what is printed, and TensorBoard and Weights & Biases if asked for.

    speed: what the steps are measured by, see `train_dry_run.Speed`.
    """

    def __init__(self, out: Path, cfg: TrainConfig, start: int, speed: Speed, say=print):
        # The file is open as long as the run lives.
        self.cfg = cfg
        self.say = say
        self.speed = speed
        self.path = out / "log.csv"
        self.file = open_log(self.path, log_columns(cfg), start)
        self.boards = []
        if cfg.tensorboard:
            self.boards.append(tensorboard(out, start))
        if cfg.wandb:
            self.boards.append(weights_and_biases(out, cfg))

    def write(self, step: int, tally: Tally, lr: float, held_out: list[float]) -> None:
        """One line. held_out: `held_out_losses`, or [] where they were not measured."""
        cfg = self.cfg
        steps_per_s = tally.steps_per_s()

        # Of all steps since the last line.
        loss_sum, loss_count = tally.losses
        values = {
            "loss": float(loss_sum.sum() / loss_count.sum()),
            "grad_norm": float(torch.stack(tally.norms).mean()),
            "lr": lr,
            "crops_per_s": steps_per_s * cfg.batch,
        }
        # Seconds of a step, and for how many of them it waited for data.
        machine = {
            "seconds": 1 / steps_per_s,
            "data_wait": tally.waited / len(tally.norms),
            "mfu": self.speed.mfu(values["crops_per_s"]),
        }
        measured = dict(zip(held_out_columns(cfg), held_out))
        per_time = dict(zip(time_columns(cfg), (loss_sum / loss_count).tolist()))

        # What is printed. The time left is that of the steps, without evaluations.
        left = timedelta(seconds=round((cfg.steps - step) / steps_per_s))
        memory = peak_memory(tally.losses.device.type == "cuda")
        line = (
            f"step {step:6d}  loss {values['loss']:.4f}  |g| {values['grad_norm']:.2f}  "
            f"lr {lr:.1e}  {steps_per_s:.2f} steps/s  {values['crops_per_s']:.1f} crops/s  "
            f"{memory:.1f} GiB  ETA {left}"
        )
        if machine["data_wait"] > 0.1 * machine["seconds"]:
            line += f"  waits for data {machine['data_wait']:.2f} s a step"
        if not math.isnan(machine["mfu"]):
            line += f"  MFU {machine['mfu']:.0%}"
        for name, value in measured.items():
            line += f"  {name.removeprefix('held_out_')} {value:.4f}"
        self.say(line)

        # What is written. A bucket that no time fell into has no loss (nan).
        values = {**values, **measured, **per_time, **machine}
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        self.write_row(step, values)
        for board in self.boards:
            board(values, step)

    def write_row(self, step: int, values: dict[str, float]) -> None:
        """A row of log.csv; a column without a value stays empty."""
        columns = log_columns(self.cfg)[1:-1]
        cells = [f"{values[name]:.6g}" if name in values else "" for name in columns]
        cells.append(self.speed.precision)
        # At once on the disk, so that a run can be watched and a kill loses nothing.
        try:
            print(step, *cells, sep=",", file=self.file, flush=True)
        except OSError as error:  # a full disk
            raise OSError(f"{self.path}: {error.strerror}") from None


def open_log(path: Path, columns: list[str], start: int):
    """log.csv, to append to. A resumed run writes the rows after step `start` again: cut them.

    The header is written again too, because older versions called column 4 maps_per_s.
    """
    # Rows of steps that the checkpoint has.
    rows = [",".join(columns)]
    if start and path.exists():
        for row in path.read_text().splitlines()[1:]:
            if row[:1].isdigit() and int(row.split(",")[0]) <= start:
                rows.append(row)

    # Header and old rows, then the new ones one by one.
    path.write_text("\n".join(rows) + "\n")
    return open(path, "a")


def tensorboard(out: Path, start: int) -> Callable[[dict, int], None]:
    """What writes the values of a step for TensorBoard. Raises ValueError if it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard: pip install tensorboard, or leave it out; log.csv holds the same"
        ) from None
    writer = SummaryWriter(str(out), purge_step=start + 1)

    def write(values: dict, step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write


def weights_and_biases(out: Path, cfg: TrainConfig) -> Callable[[dict, int], None]:
    """What sends the values of a step to Weights & Biases. Raises ValueError if it is missing.

    Its own settings (WANDB_PROJECT, WANDB_MODE=offline, ...) hold. A resumed run goes on as the
    same run, whose number is kept in OUT/wandb_id.txt.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError(
            "--wandb: pip install wandb, or leave it out; log.csv holds the same"
        ) from None
    # The number of this run.
    file = out / "wandb_id.txt"
    if not (cfg.resume and file.exists()):
        file.write_text(secrets.token_hex(4))
    wandb.init(id=file.read_text(), name=out.name, dir=str(out), resume="allow", config=asdict(cfg))
    return wandb.log


@torch.no_grad()
def draw_samples(net, cfg: TrainConfig, device: torch.device) -> torch.Tensor:
    """Densities on 0..1 that the network draws, from the same noise every time: (n, D, D, D)."""
    # From noise to network values, then to densities.
    generator = torch.Generator().manual_seed(0)
    x_1 = torch.randn(SAMPLES, 1, *[cfg.crop] * 3, generator=generator).to(device)
    with flow.autocast(device, cfg.bf16):
        parts = [flow.sample(net, part, SAMPLE_STEPS) for part in x_1.split(cfg.micro_batch)]
    x_0 = torch.cat(parts)[:, 0]
    return (x_0 * cfg.std + cfg.mean).float().cpu()


def write_samples(density: torch.Tensor, cfg: TrainConfig, folder: Path, step: int) -> None:
    """Densities (n, D, D, D) as .mrc; with matplotlib also a picture of their middle slices."""
    # The maps.
    folder.mkdir(exist_ok=True)
    for i, x in enumerate(density):
        path = folder / f"step_{step:06d}_{i}.mrc"
        mrc.write_map(path, mrc.Map(x, cfg.voxel_size), overwrite=True)

    # The picture. Matplotlib is optional.
    try:
        from matplotlib.image import imsave
    except ImportError:
        return
    # A column per sample: the slices across z, y and x below each other.
    middle = cfg.crop // 2
    columns = [torch.cat((x[middle], x[:, middle], x[:, :, middle])) for x in density]
    picture = torch.cat(columns, 1).numpy()
    imsave(folder / f"step_{step:06d}.png", picture, vmin=0, vmax=1, cmap="gray")
