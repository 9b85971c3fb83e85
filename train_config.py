"""What a training run depends on: presets, flat, each number with its place in the paper.
"""
from dataclasses import dataclass, field, replace

import jepa
import model_hdit
import model_scunet
from jepa import JEPAConfig
from model_hdit import HDiTConfig
from model_scunet import SCUNetConfig

PRETRAINING = ("jepa", "mae")

RESTORATIONS = ("sharpen", "superres", "wedge3d")


def opt(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the defaults are CryoFM-S on procedural structures."""
    net: HDiTConfig | SCUNetConfig = HDiTConfig()
    objective: str = "flow"                                                         # or of PRETRAINING, RESTORATIONS
    predictor: JEPAConfig = JEPAConfig()                                            # of "jepa"
    data: str = opt("procedural", "folder of maps, PDB file or folder, .npz of structures, or 'procedural'")
    out: str = opt("runs/default", "folder for checkpoint.pt, prior.pt and log.csv")
    resume: bool = opt(False, "go on from OUT/checkpoint.pt")
    init: str = opt("", "start from the averaged weights of this checkpoint (of jepa.pt, mae.pt: the encoder's), with a "
                        "fresh optimiser")
    dry_run: bool = opt(False, "print size, memory, speed and days; take one step; write nothing")
    seed: int = opt(0, "of weights, data, noise and times")
    steps: int = opt(150_000, "optimiser steps")                                    # Table 4
    batch: int = opt(128, "crops per optimiser step, over all ranks and accumulation")        # Table 4
    micro_batch: int = opt(16, "crops per forward pass of one rank, at most")
    crop: int = opt(64, "voxels per side of a training crop")                       # section 4.1
    crops_per_map: int = opt(2, "crops cut from one map")                           # the release
    center_crops: bool = opt(False, "crop the centre of a map (CryoFM-L), not anywhere in the molecule")
    cubic: bool = opt(True, "turn maps by cubic splines, or else trilinearly")      # the release
    voxel_size: float = opt(1.5, "Å")                                               # section 4.1
    resolution_min: float = opt(2.5, "Å, best resolution of simulated maps")
    resolution_max: float = opt(4.0, "Å, worst resolution of simulated maps")
    mean: float = opt(0.04, "of the clipped density; network value = (density - mean) / std")  # section 4.2
    std: float = opt(0.09, "of the clipped density")                                # section 4.2
    time_law: str = opt("uniform", "of the training times: uniform or logit-normal")          # the release
    mask_at: str = opt("input", "jepa: hide cells of the map, or tokens after the encoder: input or embedding")
    momentum: float = opt(0.996, "jepa: of the target encoder, at first; it rises to 1")       # I-JEPA
    alpha: float = opt(0.5, "restorations: weight of the squared error; 1 - alpha is that of the histograms")
    bins: int = opt(64, "restorations: of the histograms")
    missing: str = opt("wedge", "wedge3d: a missing wedge, or cone, the paper's formula as printed")
    optimizer: str = opt("adam", "adam: FairseqAdam for all; muon: Muon for the matrices of the blocks; adamw: PyTorch's, "
                                 "without decay of 1-D parameters")
    lr: float = opt(1e-4, "peak learning rate")                                     # B.1
    warmup: int = opt(2000, "steps of linear warm-up from 0.01 lr")                 # B.1, the release
    decay: float = opt(0.0, "fraction of the steps, at the end, over which lr falls to 0")
    patience: int = opt(0, "evaluations without a lower held-out loss before lr falls by a tenth; 0: never")
    beta2: float = opt(0.98, "FairseqAdam; beta1 is 0.9")                           # B.1
    weight_decay: float = opt(0.01, "decoupled, on all parameters")                 # B.1
    clip: float = opt(1.0, "largest norm of the gradient")                          # the release
    ema_decay: float = opt(0.99, "of the averaged weights, the ones that are used")  # the release
    bf16: bool = opt(True, "autocast to bfloat16, where the hardware has it")      # Table 4
    activation_checkpointing: bool = opt(False, "recompute for the backward pass: less memory, a third slower")
    compile: bool = opt(False, "torch.compile the network")
    workers: int = opt(1, "processes per rank that make the data; 0: none")
    log_every: int = opt(50, "steps between log lines")
    eval_every: int = opt(500, "steps between held-out losses")
    held_out_crops: int = opt(64, "crops that the held-out losses are means of")
    save_every: int = opt(500, "steps between checkpoints")
    sample_every: int = opt(5000, "steps between samples drawn from the averaged weights, as .mrc and a picture; 0: none")
    tensorboard: bool = opt(False, "write what log.csv holds for TensorBoard too")

    def __post_init__(self):
        for name in ("steps", "batch", "micro_batch", "crops_per_map", "voxel_size", "std",
                     "log_every", "eval_every", "save_every", "held_out_crops", "bins"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: it must be positive")
        if self.crop < 1 or self.crop % self.net.multiple:
            raise ValueError(f"--crop {self.crop}: this network wants a multiple of {self.net.multiple}")
        if not 0 < self.resolution_min <= self.resolution_max:
            raise ValueError(f"--resolution-min {self.resolution_min:g} must be positive and at most "
                             f"--resolution-max {self.resolution_max:g}")
        if not 0 <= self.decay <= 1 or min(self.seed, self.warmup, self.workers, self.sample_every, self.patience) < 0:
            raise ValueError("--decay must be in 0..1, and --seed, --warmup, --workers, --sample-every and --patience at least 0")
        if not (0 <= self.alpha <= 1 and 0 <= self.momentum <= 1):
            raise ValueError(f"--alpha {self.alpha:g} and --momentum {self.momentum:g} must be in 0..1")
        for name, choices in (("time_law", ("uniform", "logit-normal")), ("optimizer", ("adam", "muon", "adamw")),
                              ("mask_at", ("input", "embedding")), ("missing", ("wedge", "cone"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: choose {' or '.join(choices)}")
        if self.objective != "flow" and (self.sample_every or self.activation_checkpointing):
            raise ValueError(f"--sample-every {self.sample_every} and --activation-checkpointing are for CryoFM's priors")


S = TrainConfig()                                                                   # CryoFM-S

PRESETS = {
    # The shipped prior; trains on a CPU. Mean and std are those of simulated maps.
    "tiny": TrainConfig(net=model_hdit.PRESETS["tiny"], steps=6000, batch=16, crop=32, crops_per_map=4, cubic=False,
                        mean=0.05, std=0.13, optimizer="muon", lr=2e-3, warmup=50, decay=0.5, ema_decay=0.999),
    "s": S,
    # CryoFM-L: Table 4, section 4.1; the resolution of simulated maps is that of its grid.
    "l": replace(S, net=model_hdit.PRESETS["l"], steps=300_000, micro_batch=4, crop=128, crops_per_map=1,
                 center_crops=True, cubic=False, voxel_size=3.0, resolution_min=6.0, resolution_max=6.0,
                 time_law="logit-normal"),
    **{name: replace(S, net=model_hdit.PRESETS[name])                               # Table 7
       for name in ("p2-d1", "p8-d1", "p4-d0", "p4-d2")},
}
# CryoLVM, Table 4: crops of 48^3 voxels of 1 Å on 0..1. How long is not stated.
LVM = TrainConfig(net=model_scunet.PRESETS["paper"], objective="sharpen", optimizer="adamw", steps=100_000, batch=32, micro_batch=32,
                  crop=48, mean=0.0, std=1.0, voxel_size=1.0, resolution_min=3.0, resolution_max=6.0, lr=3e-5, warmup=0,
                  weight_decay=1e-3, beta2=0.999, patience=5, ema_decay=0.999, held_out_crops=32, sample_every=0)
PRETRAINING_LVM = replace(LVM, resolution_min=2.5, resolution_max=4.0, patience=0, lr=1e-3 * 32 / 2048, warmup=2000)       # I-JEPA
PRESETS |= {
    "jepa": replace(PRETRAINING_LVM, objective="jepa"),
    "mae": replace(PRETRAINING_LVM, objective="mae"),
    "sharpen": LVM,
    "superres": replace(LVM, objective="superres", resolution_min=4.0),                   # 4.3: from 4 to 6 Å
    "wedge3d": replace(LVM, objective="wedge3d", voxel_size=4.0, resolution_min=8.0, resolution_max=15.0),
}
# The shipped ones: a small network, a quarter of an hour to 80 minutes of one CPU core each.
TINY = dict(net=model_scunet.PRESETS["tiny"], predictor=jepa.PRESETS["tiny"], alpha=1.0, batch=4, crop=36, lr=1e-3, patience=0,
            decay=0.5, ema_decay=0.99, micro_batch=16, workers=0, log_every=20, save_every=100, eval_every=100)
MASKED = TINY | dict(steps=500, batch=16, crop=24, crops_per_map=4, warmup=20)
for name, settings in {"jepa": MASKED | dict(lr=3e-4, momentum=0.998), "mae": MASKED,
                       "sharpen": TINY | dict(steps=1900, resolution_min=2.5), "superres": TINY | dict(steps=600),
                       "wedge3d": TINY | dict(steps=700, batch=8, crop=24, crops_per_map=4)}.items():
    PRESETS[f"tiny-{name}"] = replace(PRESETS[name], **settings)
