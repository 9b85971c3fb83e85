"""What a training run depends on: one frozen dataclass, one flag per field.

CryoFM (arXiv:2410.08631): the defaults are CryoFM-S's of Table 4, section 4.1 and appendix B.1.
"Release" names the authors' published code and configuration. The presets that `--model` names are
in train_presets.py and train_baselines.py.
"""

from dataclasses import dataclass, field, fields

from augment import AUGMENTATIONS
from jepa import JEPAConfig, fitting_sides
from model_baselines import LatentFlowConfig, VAEConfig, ViTConfig
from model_hdit import HDiTConfig
from model_scunet import SCUNetConfig

PRETRAINING = ("jepa", "mae")
RESTORATIONS = ("sharpen", "superres", "wedge3d")

# Which objectives use a flag: `only` of opt.
FLOW = ("flow",)
FLOWS = ("flow", "lfm")
GENERATIVE = (*FLOWS, "vae")
LVM = (*PRETRAINING, *RESTORATIONS)
ON_MAPS = (*GENERATIVE, *PRETRAINING, "wedge3d")
SCHEDULED = (*GENERATIVE, *RESTORATIONS)
AVERAGED = (*GENERATIVE, "mae", *RESTORATIONS)


def opt(default, help, within="", choices=(), only=()):
    """A field that is also a flag of train.py.

    within: the interval of a number, where "(" and ")" exclude the end. choices: those of a word.
    only: the objectives that use the flag, () for all. `train.parse` refuses it for any other.
    """
    metadata = dict(help=help, within=within, choices=choices, only=only)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; the defaults are CryoFM-S on procedural structures.

    Raises ValueError if a number is outside its interval, or if two settings contradict each other.
    """

    net: HDiTConfig | SCUNetConfig | ViTConfig | VAEConfig | LatentFlowConfig = HDiTConfig()
    objective: str = "flow"  # or one of GENERATIVE, PRETRAINING, RESTORATIONS
    predictor: JEPAConfig = JEPAConfig()  # of "jepa"

    # Where the run reads and writes.
    typed: tuple[str, ...] = ()  # the flags of the command line
    data: str = opt("procedural", "folder of maps, PDB file or folder, .npz, or 'procedural'")
    out: str = opt("runs/default", "folder for checkpoint.pt, prior.pt and log.csv")
    resume: bool = opt(False, "go on from OUT/checkpoint.pt")
    init: str = opt("", "start from this checkpoint's averaged weights (jepa.pt: its encoder's)")
    dry_run: bool = opt(False, "print size, memory, speed and days; take one step; write nothing")
    seed: int = opt(0, "of weights, data, noise and times", "[0, 1e18]")

    # How long, and how many crops a step takes.
    steps: int = opt(150_000, "optimiser steps", "[1, inf)")  # Table 4
    batch: int = opt(128, "crops per optimiser step, over all ranks", "[1, inf)")  # Table 4
    micro_batch: int = opt(16, "crops per forward pass of one rank, at most", "[1, inf)")

    # The crops.
    crop: int = opt(64, "voxels per side of a training crop", "[1, inf)")  # section 4.1
    crops_per_map: int = opt(2, "crops cut from one map", "[1, inf)")  # release
    center_crops: bool = opt(False, "crop the centre, not anywhere in the molecule", only=ON_MAPS)
    augmentation: str = opt(
        "so3",
        "crops of maps, turned at will (so3), to 24 orientations, not (random); or their centres",
        choices=AUGMENTATIONS,
        only=ON_MAPS,
    )  # appendix F.1
    cubic: bool = opt(True, "turn maps by cubic splines, or else trilinearly", only=ON_MAPS)
    voxel_size: float = opt(1.5, "Å", "(0, inf)")  # section 4.1
    resolution_min: float = opt(2.5, "Å, best resolution of simulated maps", "(0, inf)")
    resolution_max: float = opt(4.0, "Å, worst resolution of simulated maps", "(0, inf)")
    as_deposited: float = opt(
        0.0,
        "share of simulated maps that look deposited (data_deposited.py)",
        "[0, 1]",
        only=(*FLOW, "wedge3d"),
    )

    # The grey scale: network value = (clipped density - mean) / std.            section 4.2
    mean: float = opt(0.04, "of the clipped density", "(-inf, inf)", only=GENERATIVE)
    std: float = opt(0.09, "of the clipped density", "(0, inf)", only=GENERATIVE)
    literal_percentiles: bool = opt(False, "clip to percentiles 1 and 99", only=LVM)  # D.1

    # The objective.
    time_law: str = opt("uniform", "of times", choices=("uniform", "logit-normal"), only=FLOWS)
    beta: float = opt(1e-6, "weight of the KL divergence", "[0, inf)", only=("vae",))  # kl-f4
    mask_at: str = opt(
        "input",
        "hide cells of the map (input), or tokens after the encoder (embedding)",
        choices=("input", "embedding"),
        only=("jepa",),
    )
    momentum: float = opt(0.996, "of the target encoder; rises to 1", "[0, 1]", only=("jepa",))
    alpha: float = opt(0.5, "weight of the squared error, not of JS", "[0, 1]", only=RESTORATIONS)
    bins: int = opt(64, "of the histograms", "[1, inf)", only=RESTORATIONS)
    missing: str = opt(
        "wedge",
        "what is missing: a wedge, or a cone, the paper's formula as printed",
        choices=("wedge", "cone"),
        only=("wedge3d",),
    )
    fill: str = opt(
        "zeros",
        "what the network sees there: zeros, or POCS",
        choices=("zeros", "pocs"),
        only=("wedge3d",),
    )

    # The optimiser.
    optimizer: str = opt(
        "adam",
        "adam: FairseqAdam for all; muon: Muon for the inner matrices, FairseqAdam for the rest; "
        " adamw: PyTorch's, without decay of 1-D parameters",
        choices=("adam", "muon", "adamw"),
    )
    lr: float = opt(1e-4, "peak learning rate", "(0, inf)")  # B.1
    warmup: int = opt(2000, "steps over which lr rises linearly", "[0, inf)")  # B.1, release
    decay: float = opt(0.0, "last fraction of steps, lr falls to 0", "[0, 1]", only=SCHEDULED)
    patience: int = opt(
        0,
        "evaluations without a lower held-out loss before lr falls by a tenth; 0: never",
        "[0, inf)",
        only=RESTORATIONS,
    )
    beta2: float = opt(0.98, "of Adam; beta1 is 0.9", "[0, 1)")  # B.1
    weight_decay: float = opt(0.01, "decoupled (pre-training: to 0.4), 0: none", "[0, inf)")  # B.1
    clip: float = opt(1.0, "largest norm of the gradient", "(0, inf]")  # release
    ema_decay: float = opt(0.99, "of the averaged weights", "[0, 1]", only=AVERAGED)  # release

    # The machine.
    bf16: bool = opt(True, "autocast to bfloat16, where the hardware has it")  # Table 4
    activation_checkpointing: bool = opt(False, "less memory, a third slower", only=FLOW)
    compile: bool = opt(False, "torch.compile each block of the network")
    shard: bool = opt(False, "each rank holds a part of every weight, not all (FSDP2)")
    workers: int = opt(1, "processes per rank that make the data; 0: none", "[0, 512]")

    # What the run writes.
    log_every: int = opt(50, "steps between log lines", "[1, inf)")
    eval_every: int = opt(500, "steps between held-out losses", "[1, inf)")
    held_out_crops: int = opt(64, "crops that the held-out losses are means of", "[1, inf)")
    save_minutes: float = opt(20.0, "minutes between checkpoints; 0: none", "[0, inf)")
    save_every: int = opt(0, "steps between checkpoints beside these; 0: none", "[0, inf)")
    keep_every: int = opt(
        50_000, "steps between checkpoints that stay, as checkpoint_STEP.pt; 0: none", "[0, inf)"
    )
    sample_every: int = opt(5000, "steps between sample maps; 0: none", "[0, inf)", only=FLOW)
    tensorboard: bool = opt(False, "write what log.csv holds for TensorBoard too")
    wandb: bool = opt(False, "send what log.csv holds to Weights & Biases too")

    def __post_init__(self):
        # Each number alone, then those that depend on each other.
        for option in fields(self):
            if option.metadata:
                check(option, getattr(self, option.name))
        if self.dry_run and self.resume:
            raise ValueError("--dry-run --resume: a dry run reads no checkpoint; drop one of them")
        if self.crop % self.net.multiple:
            raise ValueError(
                f"--crop {self.crop}: this network wants a multiple of {self.net.multiple}"
            )
        if self.resolution_min > self.resolution_max:
            raise ValueError(
                f"--resolution-min {self.resolution_min:g} must be at most "
                f"--resolution-max {self.resolution_max:g}"
            )
        # The plateau scheduler overrules the schedule, and it knows the first optimiser only.
        if self.patience and (self.warmup or self.decay or self.optimizer == "muon"):
            raise ValueError(
                f"--patience {self.patience}: the held-out loss lowers the learning rate, so give "
                "--warmup 0, --decay 0 and --optimizer adam or adamw as well (now "
                f"{self.warmup}, {self.decay:g} and {self.optimizer}), or --patience 0"
            )
        # Masks of pre-training must fit into the grid of features.
        if self.objective in PRETRAINING:
            try:
                fitting_sides(token_grid(self))
            except ValueError as error:
                raise ValueError(f"--crop {self.crop}: {error}") from None
        if self.objective == "jepa" and self.held_out_crops < 2:
            raise ValueError(
                f"--held-out-crops {self.held_out_crops}: the collapse metrics of jepa compare "
                "crops with each other; give at least 2"
            )


def flag(name: str) -> str:
    """A field's name as it is typed: micro_batch -> --micro-batch."""
    return "--" + name.replace("_", "-")


def check(option, value) -> None:
    """Raise ValueError if a flag's value is not one of its choices, or outside its interval."""
    # Words.
    choices = option.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{flag(option.name)} {value}: choose {' or '.join(choices)}")
    # Numbers, of which nan lies in no interval.
    interval = option.metadata["within"]
    if interval and not inside(value, interval):
        raise ValueError(f"{flag(option.name)} {value}: it must lie in {interval}")


def inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval such as "[0, 1)"; nan lies in none."""
    # Brackets include the end, round ones do not.
    low, high = map(float, interval[1:-1].split(", "))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def used_by(option, objective: str) -> bool:
    """Whether a field is a flag that changes a run with this objective."""
    if not option.metadata:
        return False
    # Without a list of objectives, all use it.
    only = option.metadata["only"]
    return not only or objective in only


def token_grid(cfg: TrainConfig) -> tuple[int, int, int]:
    """Cells of the SCUNet's innermost grid, or the ViT's, along z, y and x."""
    return (cfg.crop // 2**cfg.net.levels,) * 3
