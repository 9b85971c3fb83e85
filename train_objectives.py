"""What is learnt from what: data set, network and loss of each objective.
"""
from dataclasses import replace
from pathlib import Path

import torch.utils.flop_counter
from torch import Tensor

import atoms
import data
import data_chains
import data_pairs
import data_prepare
import files
import flow
import jepa
import mrc
from model_hdit import HDiT
from model_scunet import SCUNet
from train_config import PRETRAINING, RESTORATIONS, TrainConfig

HELD_OUT_TIMES = (0.05, 0.1, 0.2, 0.4, 0.8)              # as in the authors' release

TIME_BUCKETS = 5                                         # of the training loss in log.csv: t in 0..0.2, 0.2..0.4, ...


def datasets(cfg: TrainConfig, say=print):
    """(training, held-out) datasets of --data; items are (crops, 1, D, D, D), or (crops, 2, D, D, D) pairs.

    Raises OSError or ValueError if there is nothing to train on.
    """
    common = dict(crop=cfg.crop, crops=cfg.crops_per_map, mean=cfg.mean, std=cfg.std)
    simulated = dict(common, box=cfg.crop if cfg.center_crops else 2 * cfg.crop, voxel_size=cfg.voxel_size,
                     resolution=(cfg.resolution_min, cfg.resolution_max))
    simulate = lambda part, seed: data.SimulatedCrops(part, seed=seed, **simulated)
    if cfg.objective != "flow":                          # to pre-train, deposited maps: the first of a pair
        task = cfg.objective if cfg.objective in RESTORATIONS else "sharpen"
        simulate = lambda part, seed: data_pairs.SimulatedPairs(
            part, task=task, crop=cfg.crop, crops=cfg.crops_per_map, box=2 * cfg.crop, voxel_size=cfg.voxel_size,
            resolution=(cfg.resolution_min, cfg.resolution_max), missing=cfg.missing, seed=seed)
    if cfg.data == "procedural":
        return tuple(simulate(data_chains.ProceduralChains(seed), seed) for seed in (cfg.seed, cfg.seed + 1))
    if cfg.objective in RESTORATIONS and (Path(cfg.data) / data_pairs.PAIRS).exists():
        entries = data_pairs.read_pairs(cfg.data, cfg.objective, cfg.voxel_size)
        make = lambda part, seed: data_pairs.MapPairs(part, crop=cfg.crop, crops=cfg.crops_per_map, seed=seed)
    elif cfg.objective in RESTORATIONS and files.list_files(cfg.data, mrc.MAP_SUFFIXES):
        raise ValueError(f"{cfg.data}: maps without a {data_pairs.PAIRS} that names the model and the resolution of each (README)")
    elif files.list_files(cfg.data, mrc.MAP_SUFFIXES) or (Path(cfg.data) / data_prepare.SETTINGS).exists():    # before models
        entries, refused = data.read_volumes(cfg.data, cfg.voxel_size, cfg.crop if cfg.center_crops else None)
        for line in refused:
            say(f"skipped {line}")
        say(f"{cfg.data}: {len(refused)} maps skipped, {len(entries)} read at {cfg.voxel_size:g} Å per voxel")
        if entries and len(refused) > 0.01 * (len(refused) + len(entries)):
            raise ValueError(f"{cfg.data}: {len(refused)} of {len(refused) + len(entries)} maps cannot be used, more than "
                             f"1 %; repair or remove them, the first: {refused[0]}")
        make = lambda part, seed: data.MapCrops(part, center=cfg.center_crops, cubic=cfg.cubic, seed=seed, **common)
    else:
        entries = atoms.read_structures(cfg.data)
        make = simulate
    if not entries:
        raise ValueError(f"{cfg.data}: nothing to train on; give a folder of maps ({', '.join(mrc.SUFFIXES)}), "
                         "PDB or mmCIF files, an archive of structures (.npz), or 'procedural'")
    train, held_out = split(entries)
    say(f"{cfg.data}: {len(train)} to train on, {len(held_out)} held out"
        + (", the same one in other orientations" if len(train) == len(entries) else ""))
    return make(train, cfg.seed), make(held_out, cfg.seed + 1)


def split(entries: list) -> tuple[list, list]:
    """(training, held-out) entries: one label in twenty, by its hash, is never trained on.

    Among few labels that may be none, or all: then it is one of them. A single label is in both parts.
    """
    labels = {entry.label for entry in entries}
    held_out = {label for label in labels if data_prepare.held_out(label)}
    if len(held_out) in (0, len(labels)):
        held_out = {min(labels)}
    train = [entry for entry in entries if entry.label not in held_out]
    return train or entries, [entry for entry in entries if entry.label in held_out]


def split_batch(cfg: TrainConfig, world: int) -> tuple[int, int]:
    """(micro-batches of a rank per step, crops of each). Raises ValueError if the batch is not divisible."""
    share, rest = divmod(cfg.batch, world)
    sizes = range(cfg.crops_per_map, min(cfg.micro_batch, share) + 1, cfg.crops_per_map)
    micro = max((n for n in sizes if share % n == 0), default=0)
    if rest or not micro:
        raise ValueError(f"--batch {cfg.batch} must be a multiple of {world} rank(s) times a multiple of "
                         f"--crops-per-map {cfg.crops_per_map} that is at most --micro-batch {cfg.micro_batch}")
    return share // micro, micro


def build(cfg: TrainConfig) -> torch.nn.Module:
    """What the optimiser trains. Its average `ema` is of the same kind, but for "jepa" the target encoder."""
    if cfg.objective == "flow":
        return HDiT(cfg.net, cfg.activation_checkpointing)
    net = SCUNet(cfg.net)
    if cfg.objective != "jepa":
        return net
    return jepa.JEPA(net.encoder, cfg.net.feature_width, token_grid(cfg), replace(cfg.predictor, mask_at=cfg.mask_at))


def token_grid(cfg: TrainConfig) -> tuple[int, int, int]:
    return (cfg.crop // 2 ** cfg.net.levels,) * 3


def losses(net, ema, x: Tensor, cfg: TrainConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Losses (n,) of crops x (micro, C, D, D, D), of each crop or of all, and the columns of log.csv they count in (n,)."""
    if cfg.objective == "flow":
        t = flow.sample_t(len(x), cfg.time_law, generator, x.device)
        bucket = (t * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)
        return flow.loss(net, x, t=t, generator=generator, per_sample=True), bucket
    if cfg.objective in PRETRAINING:
        hidden = jepa.block_masks(len(x), token_grid(cfg), generator)
        loss = (jepa.jepa_loss(net, ema, x[:, :1], hidden) if cfg.objective == "jepa" else
                jepa.mae_loss(net, x[:, :1], hidden))
    else:
        loss = jepa.composite_loss(net(x[:, :1]), x[:, 1:], cfg.alpha, cfg.bins)
    return loss[None], torch.zeros(1, dtype=torch.long, device=x.device)


def held_out_columns(cfg: TrainConfig) -> list[str]:
    if cfg.objective == "flow":
        return [f"held_out_t{t}" for t in HELD_OUT_TIMES]
    return ["held_out", *{"jepa": ("constant", "std", "rank", "maps"), "mae": ()}.get(cfg.objective, ("mse", "js"))]


@torch.no_grad()
def held_out_losses(net, ema, x: Tensor, cfg: TrainConfig) -> list[float]:
    """`held_out_columns` of fixed held-out crops x with fixed times, noise and masks: of the average `ema`."""
    g = torch.Generator(x.device).manual_seed(0)
    mean = lambda of: float(torch.stack([of(part) for part in x.split(cfg.micro_batch)]).mean())
    if cfg.objective == "mae":
        return [mean(lambda part: losses(ema, None, part, cfg, g)[0][0])]
    if cfg.objective == "jepa":                          # by net's predictor, and what tells a collapse: jepa.collapse
        watch = jepa.collapse(torch.cat([ema(part[:, :1]) for part in x.split(cfg.micro_batch)]))
        return [mean(lambda part: losses(net, ema, part, cfg, g)[0][0]), *(watch[name] for name in held_out_columns(cfg)[1:])]
    if cfg.objective in RESTORATIONS:
        restored = [ema(part[:, :1]) for part in x.split(cfg.micro_batch)]
        mse, js = (sum(float(measure(a, b[:, 1:])) * len(a) for a, b in zip(restored, x.split(cfg.micro_batch))) / len(x)
                   for measure in (torch.nn.functional.mse_loss, lambda a, b: jepa.hist_kl(a, b, cfg.bins)))
        return [cfg.alpha * mse + (1 - cfg.alpha) * js, mse, js]
    values = []
    for t in HELD_OUT_TIMES:
        g = torch.Generator().manual_seed(0)
        parts = []
        for part in x.split(cfg.micro_batch):
            x_1 = torch.randn(part.shape, generator=g).to(x.device)
            with flow.autocast(x.device, cfg.bf16):
                times = torch.full((len(part),), t, device=x.device)
                parts.append(flow.loss(ema, part, t=times, x_1=x_1, per_sample=True))
        values.append(float(torch.cat(parts).mean()))
    return values
