"""Presets of the networks that the papers compare against (model_baselines.py).

CryoLVM's appendix G.1 trains a ViT "using identical hyperparameters": the SCUNet's preset with
another network. CryoFM's appendix F.4 trains a VAE, then a flow on its codes:

    python train.py --model vae-4 --data maps --out runs/vae-4
    python train.py --model lfm-4 --data maps --init runs/vae-4/vae.pt --out runs/lfm-4

Not stated: data, crops, batch and optimiser of F.4. We take CryoFM-S's, and of Stable Diffusion
its learning rate for an autoencoder and its weight of the KL divergence.
The presets called "tiny" are ours: they train on a CPU.
"""

from dataclasses import replace

import model_baselines
from train_config import TrainConfig
from train_presets import PRESETS

VAE_4 = TrainConfig(
    net=model_baselines.PRESETS["vae-4"],
    objective="vae",
    steps=588_480,  # Table 10
    lr=4.5e-6 * 128,  # Stable Diffusion: for one map, in proportion to the batch
    ema_decay=0.999,
    sample_every=0,
)
LFM_4 = TrainConfig(
    net=model_baselines.PRESETS["lfm-4"],
    objective="lfm",
    steps=300_000,  # F.4.1
    sample_every=0,
)
TINY_VAE_4 = TrainConfig(
    net=model_baselines.PRESETS["tiny-vae-4"],
    objective="vae",
    steps=800,
    batch=4,
    crop=16,
    crops_per_map=4,
    cubic=False,
    mean=0.05,  # as "tiny"
    std=0.13,
    lr=2e-3,
    warmup=20,
    decay=0.5,
    ema_decay=0.99,
    workers=0,
    log_every=50,
    eval_every=200,
    save_every=200,
    sample_every=0,
)
TINY_LFM_4 = TrainConfig(
    net=model_baselines.PRESETS["tiny-lfm-4"],
    objective="lfm",
    steps=500,
    batch=8,
    crop=16,
    crops_per_map=4,
    cubic=False,
    mean=0.05,
    std=0.13,
    lr=1e-3,
    warmup=20,
    decay=0.5,
    ema_decay=0.99,
    workers=0,
    log_every=50,
    eval_every=200,
    save_every=200,
    sample_every=0,
)

BASELINES = {
    # CryoLVM, G.1.
    "vit-jepa": replace(PRESETS["jepa"], net=model_baselines.PRESETS["vit"]),
    "vit-sharpen": replace(PRESETS["sharpen"], net=model_baselines.PRESETS["vit"]),
    "tiny-vit-jepa": replace(PRESETS["tiny-jepa"], net=model_baselines.PRESETS["tiny-vit"]),
    "tiny-vit-sharpen": replace(PRESETS["tiny-sharpen"], net=model_baselines.PRESETS["tiny-vit"]),
    # CryoFM, F.4.
    "vae-4": VAE_4,
    "vae-8": replace(VAE_4, net=model_baselines.PRESETS["vae-8"], steps=1_097_872),  # Table 10
    "lfm-4": LFM_4,
    "lfm-8": replace(LFM_4, net=model_baselines.PRESETS["lfm-8"]),
    "tiny-vae-4": TINY_VAE_4,
    "tiny-vae-8": replace(TINY_VAE_4, net=model_baselines.PRESETS["tiny-vae-8"]),
    "tiny-lfm-4": TINY_LFM_4,
    "tiny-lfm-8": replace(TINY_LFM_4, net=model_baselines.PRESETS["tiny-lfm-8"]),
}
