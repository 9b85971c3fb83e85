"""What is learnt from what: data set, network and loss of each objective.

    flow                        HDiT     the flow-matching loss, (3) of flow.py
    jepa, mae                   SCUNet   predict what is hidden, (3) and (5) of jepa.py
    sharpen, superres, wedge3d  SCUNet   from pairs of observed and wanted maps, (9) of jepa.py;
                                         data_pairs.py, data_wedges.py
    vae, lfm                    VAE, DiT reconstruct maps; flow matching of their codes

Presets whose names hold "vit" have a ViT for the SCUNet. vae and lfm: (3) and (5) of
model_baselines.py.

`net` is what the optimiser trains, `ema` its average; for "jepa" `ema` is the target encoder.
Batches x are (micro, 1, D, D, D) maps, or (micro, 2, D, D, D) pairs: observed, wanted.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import atoms
import augment
import data
import data_chains
import data_pairs
import data_prepare
import data_wedges
import files
import flow
import jepa
import mrc
from checkpoint import NETWORKS, kind_of
from model_baselines import vae_loss
from model_hdit import Block, HDiT
from model_scunet import SwinConvBlock
from train_config import (
    FLOWS,
    GENERATIVE,
    PRETRAINING,
    RESTORATIONS,
    TrainConfig,
    flag,
    token_grid,
)
from volume import CLIP, LITERAL

HELD_OUT_TIMES = (0.05, 0.1, 0.2, 0.4, 0.8)  # as in the authors' release
MOST_RAW_MAPS = 16  # that several ranks read without data_prepare.py
# What a network repeats: compiled once per shape, and sharded one by one.
BLOCKS = (Block, SwinConvBlock, torch.nn.TransformerEncoderLayer)
TIME_BUCKETS = 5  # of the training loss in log.csv: t in 0..0.2, 0.2..0.4, ...


# ---- Data ------------------------------------------------------------------------------------


def datasets(cfg: TrainConfig, say=print):
    """(training, held-out) datasets of --data; items are (crops, 1 or 2, D, D, D).

    Raises OSError or ValueError if there is nothing to train on.
    """
    # Made-up chains differ by their seed alone.
    if cfg.data == "procedural":
        refuse_unused(cfg, simulated)
        seeds = (cfg.seed, cfg.seed + augment.HELD_OUT)
        return tuple(simulated(data_chains.ProceduralChains(seed), seed, cfg) for seed in seeds)

    # What is on the disk is split by its labels.
    entries, make = read_entries(cfg, say)
    refuse_unused(cfg, make)
    if not entries:
        raise ValueError(
            f"{cfg.data}: nothing to train on; give a folder of maps ({', '.join(mrc.SUFFIXES)}), "
            "PDB or mmCIF files, an archive of structures (.npz), or 'procedural'"
        )
    train, held_out = split(entries)
    shared = ", the same one in other orientations" if len(train) == len(entries) else ""
    say(f"{cfg.data}: {len(train)} to train on, {len(held_out)} held out{shared}")
    return make(train, cfg.seed, cfg), make(held_out, cfg.seed + augment.HELD_OUT, cfg)


def refuse_unused(cfg: TrainConfig, make: Callable) -> None:
    """Raise ValueError if a flag was typed that the datasets of `make` do not use."""
    if make is simulated:
        kind = "simulated maps"
        unused = ["cubic"]
        if cfg.objective not in GENERATIVE:
            unused.append("center_crops")
    else:
        kind = "real maps"
        unused = ["resolution_min", "resolution_max", "as_deposited"]
    for name in unused:
        if name in cfg.typed:
            raise ValueError(f"{flag(name)}: training on {kind} does not use it; drop it")


def read_entries(cfg: TrainConfig, say) -> tuple[list, Callable]:
    """What --data holds, and which function makes a dataset (entries, seed, cfg) of it."""
    path = Path(cfg.data)
    # A wedge can be taken out of any map.
    wants_pairs = cfg.objective in RESTORATIONS and cfg.objective != "wedge3d"

    # Maps with their models, listed.
    if wants_pairs and (path / data_pairs.PAIRS).exists():
        clip = percentiles(cfg)
        pairs = data_pairs.read_pairs(cfg.data, cfg.objective, cfg.voxel_size, say, clip)
        return pairs, crops_of_pairs

    # Maps alone, which sharpening cannot learn from. They come before models beside them.
    holds_maps = bool(files.list_files(cfg.data, mrc.MAP_SUFFIXES))
    prepared = (path / data_prepare.SETTINGS).exists()
    if wants_pairs and (holds_maps or prepared):
        raise ValueError(
            f"{cfg.data}: maps without a {data_pairs.PAIRS} that names the model and the "
            "resolution of each (README)"
        )
    models = files.list_files(cfg.data, (".npz", *atoms.MODEL_SUFFIXES))
    if holds_maps or prepared:
        if models:
            say(f"{cfg.data}: {len(models)} models or archives beside the maps are not used")
        return read_maps(cfg, say), wedges_of_maps if cfg.objective == "wedge3d" else crops_of_maps

    # Atomic models.
    return atoms.read_structures(cfg.data, say), simulated


def refuse_raw_maps(cfg: TrainConfig, world: int) -> None:
    """Raise ValueError if several ranks would each read and resample a folder of raw maps."""
    # One rank, atomic models and prepared folders are fine.
    folder = Path(cfg.data)
    if world == 1 or not folder.is_dir() or (folder / data_prepare.SETTINGS).exists():
        return
    count = len(files.list_files(folder, mrc.MAP_SUFFIXES))
    if count > MOST_RAW_MAPS and not (folder / data_pairs.PAIRS).exists():
        raise ValueError(
            f"{folder}: {count} raw maps, which each of {world} ranks would read, resample and "
            f"hold in memory. Prepare them once: python data_prepare.py maps {folder} "
            f"{folder}_prepared --voxel-size {cfg.voxel_size:g}, then --data {folder}_prepared"
        )


def read_maps(cfg: TrainConfig, say) -> list[data.Volume]:
    """The maps of --data. Raises ValueError if more than 1 % of them cannot be used."""
    center = cfg.center_crops or cfg.augmentation == "center"
    box = cfg.crop if center else None
    volumes, refused = data.read_volumes(cfg.data, cfg.voxel_size, box, percentiles(cfg))
    for volume in volumes:
        for note in volume.notes:
            say(f"{volume.label}: {note}")
    # Say which maps are left out, and why.
    for line in refused:
        say(f"skipped {line}")
    say(
        f"{cfg.data}: {len(refused)} maps skipped, {len(volumes)} read at "
        f"{cfg.voxel_size:g} Å per voxel"
    )
    if refused and not volumes:
        raise ValueError(f"{cfg.data}: no map can be used, the first: {refused[0]}")
    # A few bad maps are normal, more hint at a bad download or a wrong folder.
    files.stop_if_many_refused(cfg.data, "maps", refused, len(refused) + len(volumes))
    return volumes


def simulated(structures, seed: int, cfg: TrainConfig):
    """A dataset of maps, or pairs of maps, that are simulated from atomic models.

    Raises ValueError for an augmentation other than so3: each item turns its model anew.
    """
    if cfg.augmentation != "so3":
        raise ValueError(f"--augmentation {cfg.augmentation}: for maps; models are always turned")
    # What maps and pairs have in common.
    common = dict(
        crop=cfg.crop,
        crops=cfg.crops_per_map,
        voxel_size=cfg.voxel_size,
        resolution=(cfg.resolution_min, cfg.resolution_max),
        seed=seed,
    )
    if cfg.objective in GENERATIVE:
        # Crops are cut from anywhere in a box of twice their side.
        box = cfg.crop if cfg.center_crops else 2 * cfg.crop
        scale = dict(mean=cfg.mean, std=cfg.std)
        return data.SimulatedCrops(
            structures, box=box, as_deposited=cfg.as_deposited, **scale, **common
        )
    if cfg.objective == "wedge3d":
        return data_wedges.SimulatedWedges(
            structures,
            box=2 * cfg.crop,
            as_deposited=cfg.as_deposited,
            **wedge(cfg),
            **common,
        )
    # Pre-training uses the first map of a pair: what a deposited map looks like.
    task = cfg.objective if cfg.objective in RESTORATIONS else "sharpen"
    return data_pairs.SimulatedPairs(
        structures,
        task=task,
        box=2 * cfg.crop,
        percentiles=percentiles(cfg),
        **common,
    )


def percentiles(cfg: TrainConfig) -> tuple[float, float]:
    """The percentiles of a map that become 0 and 1."""
    return LITERAL if cfg.literal_percentiles else CLIP


def crops_of_maps(volumes, seed: int, cfg: TrainConfig):
    return data.MapCrops(
        volumes,
        crop=cfg.crop,
        crops=cfg.crops_per_map,
        center=cfg.center_crops,
        augmentation=cfg.augmentation,
        cubic=cfg.cubic,
        mean=cfg.mean,
        std=cfg.std,
        seed=seed,
    )


def wedge(cfg: TrainConfig) -> dict:
    """Settings of both kinds of wedge pairs."""
    return dict(missing=cfg.missing, fill=cfg.fill, percentiles=percentiles(cfg))


def wedges_of_maps(volumes, seed: int, cfg: TrainConfig):
    # The wedge is lost in a crop of twice the side, and the crops are cut out of that.
    maps = crops_of_maps(volumes, seed, replace(cfg, crop=2 * cfg.crop, crops_per_map=1))
    return data_wedges.WedgedMaps(
        volumes, maps=maps, crop=cfg.crop, crops=cfg.crops_per_map, seed=seed, **wedge(cfg)
    )


def crops_of_pairs(pairs, seed: int, cfg: TrainConfig):
    return data_pairs.MapPairs(pairs, crop=cfg.crop, crops=cfg.crops_per_map, seed=seed)


def split(entries: list) -> tuple[list, list]:
    """(training, held-out) entries: one label in twenty, chosen by its hash, is never trained on.

    If that leaves no label in one of the parts, a single label is held out. The only label of a
    data set is in both parts.
    """
    # The hash of a label does not change when a data set grows.
    labels = {entry.label for entry in entries}
    chosen = {label for label in labels if data_prepare.held_out(label)}
    if len(chosen) in (0, len(labels)):
        chosen = {min(labels)}
    train = [entry for entry in entries if entry.label not in chosen]
    held_out = [entry for entry in entries if entry.label in chosen]
    return train or entries, held_out


def split_batch(cfg: TrainConfig, world: int) -> tuple[int, int]:
    """(micro-batches of a rank per step, crops of each). Raises ValueError if it does not divide.

    The micro-batch is the largest that --micro-batch allows.
    """
    # Of this rank's share, the largest part that whole maps fill and that divides it.
    share, rest = divmod(cfg.batch, world)
    largest = min(cfg.micro_batch, share)
    sizes = range(cfg.crops_per_map, largest + 1, cfg.crops_per_map)
    micro = max((n for n in sizes if share % n == 0), default=0)
    if rest or not micro:
        raise ValueError(
            f"--batch {cfg.batch} must be a multiple of {world} rank(s) times a multiple of "
            f"--crops-per-map {cfg.crops_per_map} that is at most --micro-batch {cfg.micro_batch}"
        )
    return share // micro, micro


# ---- Network and loss ------------------------------------------------------------------------


def build(cfg: TrainConfig) -> torch.nn.Module:
    """The network that the optimiser trains, with random weights."""
    # HDiT for flows. Otherwise the network of the preset; jepa puts a predictor on its encoder.
    if cfg.objective == "flow":
        # The checkpoint records which times the network learns.
        whole = cfg.time_law == "logit-normal"
        return HDiT(replace(cfg.net, whole_thousandths=whole), cfg.activation_checkpointing)
    net = new_network(cfg)
    if cfg.objective != "jepa":
        return net
    predictor = replace(cfg.predictor, mask_at=cfg.mask_at)
    return jepa.JEPA(net.encoder, cfg.net.feature_width, token_grid(cfg), predictor)


def blocks_of(net: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that a network repeats, in order."""
    return [module for module in net.modules() if isinstance(module, BLOCKS)]


def compile_blocks(net: torch.nn.Module) -> None:
    """torch.compile each block. The blocks of a level share one program."""
    # Static shapes: otherwise the second level would make the program of the first one general.
    for block in blocks_of(net):
        block.forward = torch.compile(block.forward, dynamic=False)


def new_network(cfg: TrainConfig) -> torch.nn.Module:
    """A network of the sizes in cfg.net, of the kind that a checkpoint of it holds."""
    network, _ = NETWORKS[kind_of(cfg.net)]
    return network(cfg.net)


def losses(net, ema, x: Tensor, cfg: TrainConfig, generator) -> tuple[Tensor, Tensor]:
    """(losses, time buckets), both (n,): one per crop for GENERATIVE, else n = 1 and bucket 0.

    x: (micro, 1 or 2, D, D, D); generator: of times, noise and masks, on any device.
    """
    if cfg.objective == "vae":
        loss, _ = vae_loss(net, x, code_noise(x, cfg, generator), cfg.beta)
        return loss, torch.zeros_like(loss, dtype=torch.long)

    # Flows, of maps or of codes: one loss per crop, counted at its time.
    if cfg.objective == "lfm":
        x = ema.encode(x)  # `ema` has the same frozen VAE as `net`
    if cfg.objective in FLOWS:
        t = flow.sample_t(len(x), cfg.time_law, generator, x.device)
        bucket = (t * TIME_BUCKETS).long().clamp(max=TIME_BUCKETS - 1)
        return flow.loss(net, x, t=t, generator=generator, per_sample=True), bucket

    # CryoLVM: one loss for the whole micro-batch.
    observed = x[:, :1]
    if cfg.objective in PRETRAINING:
        visible = jepa.block_masks(len(x), token_grid(cfg), generator)
        visible = visible.to(x.device, non_blocking=True)

    # Pre-training guesses what is hidden, fine-tuning the map that is wanted.
    if cfg.objective == "jepa":
        loss = jepa.jepa_loss(net, ema, observed, visible)
    elif cfg.objective == "mae":
        loss = jepa.mae_loss(net, observed, visible)
    else:
        loss = jepa.composite_loss(net(observed), x[:, 1:], cfg.alpha, cfg.bins)
    bucket = torch.zeros(1, dtype=torch.long, device=x.device)
    return loss[None], bucket


def code_noise(x: Tensor, cfg: TrainConfig, generator) -> Tensor:
    """e of (2) of model_baselines.py for maps x (B, 1, D, D, D)."""
    cells = [n // cfg.net.factor for n in x.shape[2:]]
    e = torch.randn(len(x), cfg.net.channels, *cells, generator=generator, device=generator.device)
    return e.to(x.device)


# ---- Held-out losses -------------------------------------------------------------------------


def held_out_columns(cfg: TrainConfig) -> list[str]:
    """What `held_out_losses` returns, as names of columns of log.csv."""
    if cfg.objective in FLOWS:
        return [f"held_out_t{t}" for t in HELD_OUT_TIMES]
    if cfg.objective == "vae":
        return ["held_out", "l1"]
    if cfg.objective == "jepa":
        return ["held_out", "constant", "std", "rank", "maps"]
    if cfg.objective == "mae":
        return ["held_out"]
    return ["held_out", "mse", "js"]


@torch.no_grad()
def held_out_losses(net, ema, x: Tensor, cfg: TrainConfig) -> list[float]:
    """`held_out_columns` of fixed held-out crops x with fixed times, noise and masks.

    They are those of the averaged weights; for "jepa" of its predictor and the target encoder.
    """
    # As many crops at once as in training.
    parts = x.split(cfg.micro_batch)
    if cfg.objective == "lfm":
        parts = [ema.encode(part) for part in parts]
    if cfg.objective == "vae":
        return reconstruction_losses(ema, parts, cfg)
    if cfg.objective in FLOWS:
        return [held_out_at(t, ema, parts, cfg) for t in HELD_OUT_TIMES]
    if cfg.objective in RESTORATIONS:
        return restoration_losses(ema, parts, cfg)

    # The same masks every time.
    generator = torch.Generator().manual_seed(0)
    trained = net if cfg.objective == "jepa" else ema
    loss = 0.0
    for part in parts:
        # Parts may be unequal, and every crop counts the same.
        loss += float(losses(trained, ema, part, cfg, generator)[0]) * len(part) / len(x)
    if cfg.objective == "mae":
        return [loss]

    # Metrics that detect representation collapse, from the tokens of the target encoder.
    metrics = jepa.collapse(torch.cat([ema(part[:, :1]) for part in parts]))
    return [loss, *(metrics[name] for name in held_out_columns(cfg)[1:])]


def held_out_at(t: float, ema, parts: tuple[Tensor, ...], cfg: TrainConfig) -> float:
    """The flow-matching loss of crops at one time t, with the same noise every time."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for part in parts:
        x_1 = torch.randn(part.shape, generator=generator).to(part.device)
        times = torch.full((len(part),), t, device=part.device)
        with flow.autocast(part.device, cfg.bf16):
            values.append(flow.loss(ema, part, t=times, x_1=x_1, per_sample=True))
    return float(torch.cat(values).mean())


def reconstruction_losses(ema, parts: tuple[Tensor, ...], cfg: TrainConfig) -> list[float]:
    """The loss (3) of model_baselines.py and its first term, with the same noise every time."""
    generator = torch.Generator(parts[0].device).manual_seed(0)
    found = [vae_loss(ema, part, code_noise(part, cfg, generator), cfg.beta) for part in parts]
    return [float(torch.cat(values).mean()) for values in zip(*found)]


def restoration_losses(ema, parts: tuple[Tensor, ...], cfg: TrainConfig) -> list[float]:
    """The loss (9) of jepa.py and its terms, squared error and histogram divergence."""
    # Parts may be unequal, so sum over crops and divide at the end.
    mse = js = 0.0
    for part in parts:
        restored = ema(part[:, :1])
        wanted = part[:, 1:]
        mse += float(F.mse_loss(restored, wanted)) * len(part)
        js += float(jepa.hist_kl(restored, wanted, cfg.bins)) * len(part)
    count = sum(len(part) for part in parts)
    mse = mse / count
    js = js / count
    return [cfg.alpha * mse + (1 - cfg.alpha) * js, mse, js]
