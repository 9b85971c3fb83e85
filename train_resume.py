"""Where a run starts and what it leaves: fresh weights, --init, --resume, checkpoints.

    checkpoint.pt, checkpoint_before.pt    the last two, for --resume
    checkpoint_STEP.pt                     every --keep-every steps, stays
    prior.pt, jepa.pt, ...                 the averaged weights in half precision, for use

All hold whole tensors, so a run with --shard resumes one without, and the other way round.
"""

import os
import time
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils._pytree import tree_map_only

import checkpoint
from train_config import PRETRAINING, TrainConfig, flag, used_by
from train_objectives import blocks_of, build, new_network, percentiles
from train_optim import averaged, has_fused, optimizers
from train_ranks import Ranks, own_part, parted, whole
from volume import LITERAL

# The newest first. "_new" is a whole file that a killed run had no time to rename.
CHECKPOINTS = ("checkpoint_new.pt", "checkpoint.pt", "checkpoint_before.pt")

# Of a checkpoint whose archive is whole but whose content is not.
DAMAGED = "its training state is damaged; resume from a copy, or --init another run with it"


@dataclass
class State:
    """Everything that a training step changes."""

    net: torch.nn.Module
    ema: torch.nn.Module  # averaged weights; of "jepa" the target encoder
    optimizers: list[torch.optim.Optimizer]
    plateau: ReduceLROnPlateau | None


def network_file(cfg: TrainConfig) -> str:
    """The name of the file for use, in half precision."""
    return "prior.pt" if cfg.objective == "flow" else f"{cfg.objective}.pt"


def read_training(out: Path, cfg: TrainConfig, micro: int, say=print) -> dict | None:
    """The newest whole checkpoint in `out`, to go on from, with its `path`; None without --resume.

    micro: crops of a micro-batch. Raises OSError if --resume finds no checkpoint, or if a new run
    would overwrite one; ValueError if all are damaged, or if it does not fit this run.
    """
    if not cfg.resume:
        refuse_existing_run(out, cfg)
        return None
    # Read the newest checkpoint. Refuse one without training state.
    saved = read_newest(out, say)
    path = saved["path"]
    training = saved.get("training")
    if not training:
        raise ValueError(
            f"{path}: holds no training state; --resume wants the checkpoint.pt of a run"
        )
    if not is_training(training):
        raise ValueError(f"{path}: {DAMAGED}")

    # The network cannot change, other settings may. Older checkpoints lack newer flags.
    flags = training["flags"]
    settings = asdict(cfg)
    flags = {**flags, "net": settings["net"] | flags["net"]}  # and newer fields of the network
    for name in ("net", "objective", "optimizer"):
        if flags.get(name, "flow") != settings[name]:
            raise ValueError(
                f"{path}: another network, objective or optimiser; "
                "give the --model and --optimizer it began with"
            )
    refuse_saved_settings(path, flags, cfg)

    # Say what goes on, and what has changed.
    say(f"resuming {path} after step {training['step']}")
    if cfg.init:
        say(f"  --init {cfg.init} is not read again")
    for option in fields(cfg):
        name = option.name
        same_place = name in ("out", "resume", "init")
        if used_by(option, cfg.objective) and not same_place:
            print_change(name, flags.get(name, settings[name]), settings[name], say)
    # Micro-batches also change with the number of ranks, which is no flag.
    before = training.get("micro", micro)  # older checkpoints lack it
    if before != micro:
        say(
            f"  changed: micro-batches of {before} crops -> {micro}; so noise, times and masks "
            "are others than in an unbroken run"
        )
    return saved


def read_newest(out: Path, say=print) -> dict:
    """The newest checkpoint that is whole, with its `path`. Errors: see `read_training`."""
    damages = []
    for path in (out / name for name in CHECKPOINTS):
        if not path.exists():
            continue
        try:
            return checkpoint.read(path) | dict(path=path)
        except ValueError as error:
            say(f"not resumed: {error}")
            damages.append(error)
    # None is whole, or there is none.
    if damages:
        raise damages[0]
    raise FileNotFoundError(
        f"{out / 'checkpoint.pt'}: no checkpoint to resume from; leave out --resume to start a run"
    )


def refuse_existing_run(out: Path, cfg: TrainConfig) -> None:
    """Raise OSError if a new run would replace a network, also if --init names that network."""
    for path in (out / name for name in CHECKPOINTS):
        if path.exists():
            raise FileExistsError(f"{path}: a run is there; --resume it, or give another --out")
    network = out / network_file(cfg)
    if network.exists():
        raise FileExistsError(f"{network}: exists and would be replaced; give another --out")


def is_training(training: dict) -> bool:
    """Whether a checkpoint's training state has the parts that `save` writes."""
    # Every part with its type.
    parts = {"net": dict, "optimizers": list, "step": int, "flags": dict}
    if not all(isinstance(training.get(name), kind) for name, kind in parts.items()):
        return False
    # Only fine-tuning has a plateau scheduler; it is None otherwise.
    return training["step"] >= 0 and isinstance(training.get("plateau"), dict | None)


def refuse_saved_settings(path: Path, flags: dict, cfg: TrainConfig) -> None:
    """Raise ValueError if a setting has changed that goes on as the optimisers' state has it."""
    # Pre-training sets its weight decay anew in every step, but neither begins nor ends one.
    names = ["beta2", "patience"]
    before = flags.get("weight_decay", cfg.weight_decay)
    if cfg.objective not in PRETRAINING or (before == 0) != (cfg.weight_decay == 0):
        names.append("weight_decay")
    # The plateau scheduler lowers the rate that it finds.
    if cfg.patience:
        names.append("lr")

    # Older checkpoints lack newer flags.
    for name in names:
        now = getattr(cfg, name)
        before = flags.get(name, now)
        if before != now:
            raise ValueError(
                f"{path}: {flag(name)} {now:g} comes too late, the saved optimiser state has "
                f"{before}; give {flag(name)} {before}, or start a new run with --init"
            )


def print_change(name: str, before, now, say) -> None:
    if before != now:
        say(f"  changed: {flag(name)} {before} -> {now}")


def begin(cfg: TrainConfig, saved: dict | None, ranks: Ranks) -> State:
    """The state before the first step: as saved, or from --init, or random.

    Raises ValueError if what was saved does not fit.
    """
    # The same random weights on every rank.
    torch.manual_seed(cfg.seed)
    net = build(cfg)
    if cfg.init and not saved:
        start_from(net, cfg, ranks.say)
    elif cfg.objective == "lfm" and not saved:
        raise ValueError(
            "this model learns the codes of a trained VAE; give its file: --init runs/vae/vae.pt"
        )
    ema = averaged(net, cfg)
    try:
        if saved:
            restore_weights(net, ema, saved)

        # On the device, whole or in parts, and then the optimisers of what is there.
        for module in (net, ema):
            if cfg.shard:
                ranks.shard(module, blocks_of(module))
            else:
                module.to(ranks.device)
        state = State(net, ema, optimizers(net, cfg), None)
        if cfg.patience:
            adam = state.optimizers[0]
            state.plateau = ReduceLROnPlateau(adam, factor=0.9, patience=cfg.patience)
        if saved:
            restore_optimizers(state, saved["training"])
    except checkpoint.UNFIT as error:
        if not saved:
            raise
        raise ValueError(f"{saved['path']}: {DAMAGED} ({type(error).__name__})") from error
    return state


def restore_weights(net: torch.nn.Module, ema: torch.nn.Module, saved: dict) -> None:
    """Raises one of checkpoint.UNFIT if a checkpoint's weights do not fit."""
    training = saved["training"]
    net.load_state_dict(training["net"])
    # Of "jepa" the checkpoint's own weights are a whole network, the target encoder is apart.
    ema.load_state_dict(training.get("target", saved["weights"]))


def restore_optimizers(state: State, training: dict) -> None:
    """Moments, learning rates and the plateau scheduler of a checkpoint.

    Raises one of checkpoint.UNFIT if they do not fit.
    """
    for optimizer, content in zip(state.optimizers, training["optimizers"], strict=True):
        # Whether steps are fused depends on this machine, not on the one that saved.
        for group in content["param_groups"]:
            if "fused" in group:
                group["fused"] = has_fused(optimizer.param_groups[0]["params"]) or None
        optimizer.load_state_dict(content)
        check_moments(optimizer)

        # Of a sharded weight, this rank's part of the moments.
        for p, moments in optimizer.state.items():
            for name, moment in moments.items():
                if torch.is_tensor(moment) and moment.ndim:
                    moments[name] = parted(moment, p)
    if state.plateau and training["plateau"]:
        state.plateau.load_state_dict(training["plateau"])


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if moments are missing or do not fit, which torch does not look at."""
    for group in optimizer.param_groups:
        # What a step multiplies with.
        for name in ("lr", "weight_decay"):
            if not isinstance(group[name], float | int):
                raise ValueError(f"{name} is {group[name]}")

        # Every weight has moments of its own shape, and all have the same ones.
        states = [optimizer.state[p] for p in group["params"]]
        for p, state in zip(group["params"], states):
            if not state or state.keys() != states[0].keys():
                raise ValueError("moments are missing")
            moments = [m for m in state.values() if not torch.is_tensor(m) or m.ndim]
            if not all(torch.is_tensor(m) and m.shape == p.shape for m in moments):
                raise ValueError("moments of another shape")


def start_from(net: torch.nn.Module, cfg: TrainConfig, say=print) -> None:
    """Load the averaged weights of --init; from another objective's pre-training only the encoder.

    Raises OSError without the file, ValueError if its network is another, or was fine-tuned for
    another task.
    """
    # A latent flow starts from a VAE, or from a latent flow.
    kind = checkpoint.kind_of(cfg.net)
    if kind == "lfm":
        prior = checkpoint.load(cfg.init)
        if prior.kind == "vae":
            start_from_vae(net, prior, cfg, say)
            return

    # Must be the same kind of network, of the same sizes.
    prior = checkpoint.load(cfg.init, kind=kind)
    sizes = prior.net.config
    if kind == "hdit":
        # How it rounds times and angles is no size. A new run does so as its flags say.
        plain = dict(time_phase="float32", rotary_phase="float32", whole_thousandths=False)
        sizes = replace(sizes, **plain)
    if sizes != cfg.net:
        raise ValueError(
            f"{cfg.init}: another network, {prior.net.config}; give the --model it was trained as"
        )

    # All weights if the objective is the same, or the encoder of pre-training.
    if cfg.objective == "flow" or prior.task == cfg.objective != "jepa":
        say(f"starting from {cfg.init}")
        net.load_state_dict(prior.net.state_dict())
    elif prior.task in PRETRAINING:
        say(f"starting from the encoder of {cfg.init}")
        encoder = net.context.encoder if cfg.objective == "jepa" else net.encoder
        encoder.load_state_dict(prior.net.encoder.state_dict())
    else:
        raise ValueError(
            f"{cfg.init}: fine-tuned for {prior.task}, not for {cfg.objective}; "
            "give a pre-trained network"
        )

    print_new_scales(prior, cfg, say)


def start_from_vae(net, prior: checkpoint.Prior, cfg: TrainConfig, say=print) -> None:
    """Put the VAE of --init into a latent flow; ValueError if it has other sizes."""
    sizes = asdict(prior.net.config)
    wanted = {name: value for name, value in asdict(cfg.net).items() if name in sizes}
    if sizes != wanted:
        raise ValueError(f"{cfg.init}: another VAE, {prior.net.config}; give one of {wanted}")
    say(f"learning the codes of {cfg.init}")
    net.vae.load_state_dict(prior.net.state_dict())
    print_new_scales(prior, cfg, say)


def print_new_scales(prior: checkpoint.Prior, cfg: TrainConfig, say=print) -> None:
    # The grey scale and the sampling may change, but not unseen.
    print_change("voxel_size", prior.voxel_size, cfg.voxel_size, say)
    print_change("crop", prior.box, cfg.crop, say)
    print_change("mean", prior.mean, cfg.mean, say)
    print_change("std", prior.std, cfg.std, say)
    if prior.kind == "hdit":
        law = "logit-normal" if prior.net.config.whole_thousandths else "uniform"
        print_change("time_law", law, cfg.time_law, say)
    literal = prior.percentiles == LITERAL
    print_change("literal_percentiles", literal, cfg.literal_percentiles, say)
    if prior.task == cfg.objective == "wedge3d":
        print_change("fill", prior.fill, cfg.fill, say)


def network_for_use(ema: torch.nn.Module, cfg: TrainConfig) -> torch.nn.Module:
    """The network that a checkpoint is for: `ema`, or around jepa's target encoder a whole SCUNet.

    Nothing has taught the decoder of the latter yet. It shares its weights with `ema`.
    """
    if cfg.objective != "jepa":
        return ema
    # A fresh decoder around the encoder, so that the file opens like any other SCUNet or ViT.
    network = new_network(cfg)
    network.encoder = ema.encoder
    return network


class Checkpoints:
    """Writes a run's files while the run goes on, from a copy of its state.

    saved: what the run resumed from; micro: crops of a micro-batch; writer: an Executor with one
    thread, which has written all files when it is shut down.
    """

    def __init__(self, state, saved: dict | None, cfg, micro: int, ranks: Ranks, writer: Executor):
        self.state = state
        self.network = network_for_use(state.ema, cfg)
        self.cfg = cfg
        self.out = Path(cfg.out)
        self.micro = micro
        self.ranks = ranks
        self.writer = writer
        self.references = None  # of checkpoint.py, set by the run
        self.job = None
        self.since = time.monotonic()
        # A damaged checkpoint.pt must not replace the whole one that the run resumed from.
        self.newest_is_whole = not saved or saved["path"].name != "checkpoint_before.pt"

    def due(self) -> bool:
        """Whether --save-minutes have passed since the last checkpoint and the writer is free.

        Raises the error of a checkpoint that could not be written.
        """
        if self.job and not self.job.done():
            return False
        self.wait()
        minutes = (time.monotonic() - self.since) / 60
        if not 0 < self.cfg.save_minutes <= minutes:
            return False
        self.since = time.monotonic()  # asked for once, though several ranks save a step later
        return True

    def wait(self) -> None:
        """Until the last checkpoint is written. Raises OSError if it could not be."""
        if self.job:
            self.job.result()

    def save(self, step: int) -> None:
        """Copy the state after `step` steps, and start to write it. All ranks call it together.

        Raises ValueError if the weights are not finite; then nothing is written. Waits only for an
        earlier checkpoint that is still being written.
        """
        refuse_lost_weights(self.state, self.ranks, self.cfg, step)
        self.since = time.monotonic()
        writes = self.ranks.rank == 0
        if not (writes or self.cfg.shard):
            return
        # Of a sharded network, every rank sends its parts, and the first one keeps the whole.
        weights = copied(self.network.state_dict(), writes)
        training = copied(training_state(self.state, self.cfg, self.micro, step), writes)
        if writes:
            self.wait()
            self.job = self.writer.submit(self.write, weights, training, step)

    def write(self, weights: dict, training: dict, step: int) -> None:
        """Write the files. The newest checkpoint appears whole, the one before stays."""
        cfg = self.cfg
        # A network of these weights, without a second copy of them.
        with torch.device("meta"):
            network = type(self.network)(self.network.config)
        network.load_state_dict(weights, assign=True)

        # All files open as networks. CryoLVM's say which task they are for.
        shared = dict(voxel_size=cfg.voxel_size, box=cfg.crop, mean=cfg.mean, std=cfg.std)
        shared["percentiles"] = percentiles(cfg)
        shared["references"] = self.references
        if cfg.objective != "flow":
            shared["task"] = cfg.objective
        if cfg.objective == "wedge3d":
            shared["fill"] = cfg.fill
        new, newest, before = (self.out / name for name in CHECKPOINTS)
        checkpoint.save(new, network, **shared, training=training)
        if newest.exists() and self.newest_is_whole:
            os.replace(newest, before)
        os.replace(new, newest)
        self.newest_is_whole = True

        # What stays, and what sampling.py reads.
        if every(step, cfg.keep_every):
            kept = self.out / f"checkpoint_{step:06d}.pt"
            checkpoint.save(kept, network, **shared, training=training)
        checkpoint.save(self.out / network_file(cfg), network, **shared, half=True)


def every(step: int, steps: int) -> bool:
    """Whether a step is one of every so many; of every 0 none is."""
    return bool(steps) and step % steps == 0


def training_state(state: State, cfg: TrainConfig, micro: int, step: int) -> dict:
    """What --resume needs beside the averaged weights."""
    training = dict(
        net=state.net.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in state.optimizers],
        step=step,
        plateau=state.plateau and state.plateau.state_dict(),
        flags=asdict(cfg),
        micro=micro,
    )
    if cfg.objective == "jepa":
        training["target"] = state.ema.state_dict()
    return training


def copied(tree, keep: bool):
    """A copy of nested dicts and lists whose tensors are whole and on the CPU.

    keep: False on a rank that only sends its parts, where tensors become None.
    """

    def copy(x):
        x = whole(x.detach())
        return x.to("cpu", copy=True) if keep else None

    return tree_map_only(torch.Tensor, copy, tree)


def refuse_lost_weights(state: State, ranks: Ranks, cfg: TrainConfig, step: int) -> None:
    """Raise ValueError on all ranks if a weight is nan, or larger than half precision holds."""
    # One number per tensor is enough: its largest. One is read, because reading waits for a GPU.
    weights = [own_part(p.detach()) for p in (*state.net.parameters(), *state.ema.parameters())]
    largest = torch.stack([p.abs().max() for p in weights if p.numel()]).max()
    limit = torch.finfo(torch.float16).max
    lost = not largest <= limit  # true for nan, too
    if ranks.reduce(torch.tensor(int(lost))):
        raise ValueError(
            f"after step {step} the weights are not finite, or beyond {limit:g}; "
            f"{what_is_kept(cfg)}"
        )


def what_is_kept(cfg: TrainConfig) -> str:
    """What to do after a run that failed, for the end of a message."""
    newest = Path(cfg.out) / "checkpoint.pt"
    if not newest.exists():
        return "nothing is saved: start again with a lower --lr"
    # With --patience the rate is part of what was saved.
    if cfg.patience:
        advice = f"begin a new run with --init {newest}, a lower --lr and another --out"
    else:
        advice = "--resume it with a lower --lr"
    return f"{newest} is still the one of an earlier step: {advice}"
