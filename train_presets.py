"""Flat presets of `train.py --model`: what each network of the papers learns from, and how.

CryoFM (arXiv:2410.08631): "s" and "l" are Table 4, section 4.1 and appendix B.1; "p2-d1" and so on
are Table 7. "Release" names the authors' published code and configuration.
CryoLVM: "sharpen", "superres" and "wedge3d" are its Table 4. The paper says nothing about
pre-training, so "jepa" and "mae" follow the public I-JEPA (Assran et al. 2023).
The presets called "tiny" are ours: they train on a CPU.

Departure 1: the paper keeps the learning rate constant. "tiny" lets it fall to 0 over the second
    half, because a run of an hour needs that.
Departure 2: "tiny" gives the matrices of its blocks, merges and splits to Muon (Jordan et al.
    2024). In 150 steps that reached the loss that FairseqAdam alone reached in more than 250.
Departure 3: the "tiny-" restorations learn at 1e-3, falling to 0, not by plateaus. They learn by
    the squared error alone (alpha = 1), because with alpha = 0.5 the gradient of the histograms is
    about ten times as long.
Departure 4: fine-tuned networks are averaged too. CryoLVM's epochs are our `eval_every` steps. Its
    windows, 24 voxels apart in training and 48 in validation, are random crops here: half of them
    lie around the molecule. In validation they are the same crops every time.
Not stated: how many steps CryoLVM takes. 100,000 is our guess.
"""

import jepa
import model_hdit
import model_scunet
from train_config import TrainConfig

PRESETS = {
    # The shipped prior. mean and std are those of simulated maps.
    "tiny": TrainConfig(
        net=model_hdit.PRESETS["tiny"],
        steps=6000,
        batch=16,
        crop=32,
        crops_per_map=4,
        cubic=False,
        mean=0.05,
        std=0.13,
        optimizer="muon",  # Departure 2
        lr=2e-3,
        warmup=50,
        decay=0.5,  # Departure 1
        ema_decay=0.999,
    ),
    # The same for voxels of 3 Å, as "l". mean and std are those of simulated maps.
    "tiny-l": TrainConfig(
        net=model_hdit.PRESETS["tiny"],
        steps=6000,
        batch=16,
        crop=32,
        crops_per_map=4,
        cubic=False,
        voxel_size=3.0,
        resolution_min=6.0,
        resolution_max=20.0,
        mean=0.05,
        std=0.17,
        optimizer="muon",  # Departure 2
        lr=2e-3,
        warmup=50,
        decay=0.5,  # Departure 1
        ema_decay=0.999,
    ),
    # CryoFM-S: the defaults of train_config.py.
    "s": TrainConfig(),
    # CryoFM-L.
    "l": TrainConfig(
        net=model_hdit.PRESETS["l"],
        steps=300_000,  # Table 4
        micro_batch=4,
        crop=128,  # section 4.1
        crops_per_map=1,
        center_crops=True,  # appendix F.1
        cubic=False,  # release
        voxel_size=3.0,  # section 4.1
        resolution_min=6.0,  # of simulated maps: what the grid can hold
        resolution_max=6.0,
        time_law="logit-normal",  # release
    ),
    # Table 7: CryoFM-S with other patches (p) and numbers of levels (d).
    "p2-d1": TrainConfig(net=model_hdit.PRESETS["p2-d1"]),
    "p8-d1": TrainConfig(net=model_hdit.PRESETS["p8-d1"]),
    "p4-d0": TrainConfig(net=model_hdit.PRESETS["p4-d0"]),
    "p4-d2": TrainConfig(net=model_hdit.PRESETS["p4-d2"]),
    # CryoLVM's pre-training: predict the features of hidden cells. Crops as in Table 4.
    "jepa": TrainConfig(
        net=model_scunet.PRESETS["paper"],  # Table 5
        objective="jepa",
        steps=100_000,
        batch=32,  # appendix E; Table 4 has 35 per process
        micro_batch=32,
        crop=48,  # Table 4
        predictor=jepa.PRESETS["paper"],
        voxel_size=1.0,  # Table 4
        mean=0.0,  # densities on 0..1
        std=1.0,
        optimizer="adamw",  # I-JEPA
        lr=1e-3 * 32 / 2048,  # I-JEPA: 1e-3 for 2,048 images, in proportion to the batch
        warmup=2000,
        weight_decay=0.04,  # I-JEPA: at first
        beta2=0.999,
        held_out_crops=32,
        sample_every=0,
    ),
    # The comparator of CryoLVM's Table 11: predict the voxels of hidden cells.
    "mae": TrainConfig(
        net=model_scunet.PRESETS["paper"],  # Table 5
        objective="mae",
        steps=100_000,
        batch=32,  # appendix E; Table 4 has 35 per process
        micro_batch=32,
        crop=48,  # Table 4
        voxel_size=1.0,  # Table 4
        mean=0.0,  # densities on 0..1
        std=1.0,
        optimizer="adamw",  # I-JEPA
        lr=1e-3 * 32 / 2048,  # I-JEPA: 1e-3 for 2,048 images, in proportion to the batch
        warmup=2000,
        weight_decay=0.04,  # I-JEPA: at first
        beta2=0.999,
        ema_decay=0.999,
        held_out_crops=32,
        sample_every=0,
    ),
    # CryoLVM's fine-tuning (Table 4): crops of 48^3 voxels of 1 Å, densities on 0..1.
    "sharpen": TrainConfig(
        net=model_scunet.PRESETS["paper"],  # Table 5
        objective="sharpen",
        steps=100_000,
        batch=32,  # appendix E; Table 4 has 35 per process
        micro_batch=32,
        crop=48,  # Table 4
        voxel_size=1.0,  # Table 4
        resolution_min=3.0,
        resolution_max=6.0,
        mean=0.0,  # densities on 0..1
        std=1.0,
        optimizer="adamw",  # Table 4
        lr=3e-5,  # Table 4
        warmup=0,
        patience=5,  # Table 4
        weight_decay=1e-3,  # Table 4
        beta2=0.999,
        ema_decay=0.999,
        held_out_crops=32,
        sample_every=0,
    ),
    # Maps of 4 to 6 Å (section 4.3).
    "superres": TrainConfig(
        net=model_scunet.PRESETS["paper"],  # Table 5
        objective="superres",
        steps=100_000,
        batch=32,  # appendix E; Table 4 has 35 per process
        micro_batch=32,
        crop=48,  # Table 4
        voxel_size=1.0,  # Table 4
        resolution_min=4.0,
        resolution_max=6.0,
        mean=0.0,  # densities on 0..1
        std=1.0,
        optimizer="adamw",  # Table 4
        lr=3e-5,  # Table 4
        warmup=0,
        patience=5,  # Table 4
        weight_decay=1e-3,  # Table 4
        beta2=0.999,
        ema_decay=0.999,
        held_out_crops=32,
        sample_every=0,
    ),
    # Tomograms (section 4.4).
    "wedge3d": TrainConfig(
        net=model_scunet.PRESETS["paper"],  # Table 5
        objective="wedge3d",
        steps=100_000,
        batch=32,  # appendix E; Table 4 has 35 per process
        micro_batch=32,
        crop=48,  # Table 4
        voxel_size=4.0,
        resolution_min=8.0,
        resolution_max=15.0,
        mean=0.0,  # densities on 0..1
        std=1.0,
        optimizer="adamw",  # Table 4
        lr=3e-5,  # Table 4
        warmup=0,
        patience=5,  # Table 4
        weight_decay=1e-3,  # Table 4
        beta2=0.999,
        ema_decay=0.999,
        held_out_crops=32,
        sample_every=0,
    ),
    # The shipped SCUNets: a small network, a quarter of an hour to 80 minutes of one CPU core each.
    "tiny-jepa": TrainConfig(
        net=model_scunet.PRESETS["tiny"],
        objective="jepa",
        steps=500,
        batch=16,
        crop=24,
        crops_per_map=4,
        predictor=jepa.PRESETS["tiny"],
        momentum=0.998,  # of the target encoder; it rises to 1
        voxel_size=1.0,
        mean=0.0,
        std=1.0,
        optimizer="adamw",
        lr=3e-4,
        warmup=20,
        weight_decay=0.04,  # I-JEPA: at first
        beta2=0.999,
        workers=0,
        log_every=20,
        eval_every=100,
        held_out_crops=32,
        save_every=100,
        sample_every=0,
    ),
    # Its comparator.
    "tiny-mae": TrainConfig(
        net=model_scunet.PRESETS["tiny"],
        objective="mae",
        steps=500,
        batch=16,
        crop=24,
        crops_per_map=4,
        voxel_size=1.0,
        mean=0.0,
        std=1.0,
        optimizer="adamw",
        lr=1e-3,
        warmup=20,
        weight_decay=0.04,  # I-JEPA: at first
        beta2=0.999,
        workers=0,
        log_every=20,
        eval_every=100,
        held_out_crops=32,
        save_every=100,
        sample_every=0,
    ),
    # Deposited map -> sharp map, from 2.5 Å because users have such maps.
    "tiny-sharpen": TrainConfig(
        net=model_scunet.PRESETS["tiny"],
        objective="sharpen",
        steps=1900,
        batch=4,
        crop=36,
        voxel_size=1.0,
        resolution_max=6.0,
        mean=0.0,
        std=1.0,
        alpha=1.0,  # Departure 3
        optimizer="adamw",
        lr=1e-3,  # Departure 3
        warmup=0,
        decay=0.5,  # Departure 3
        weight_decay=1e-3,
        beta2=0.999,
        workers=0,
        log_every=20,
        eval_every=100,
        held_out_crops=32,
        save_every=100,
        sample_every=0,
    ),
    # Deposited map -> map of 1.8 Å.
    "tiny-superres": TrainConfig(
        net=model_scunet.PRESETS["tiny"],
        objective="superres",
        steps=2400,
        batch=4,
        crop=36,
        voxel_size=1.0,
        resolution_min=4.0,
        resolution_max=6.0,
        mean=0.0,
        std=1.0,
        alpha=1.0,  # Departure 3
        optimizer="adamw",
        lr=1e-3,  # Departure 3
        warmup=0,
        decay=0.5,  # Departure 3
        weight_decay=1e-3,
        beta2=0.999,
        workers=0,
        log_every=20,
        eval_every=100,
        held_out_crops=32,
        save_every=100,
        sample_every=0,
    ),
    # Tomogram with a missing wedge -> whole tomogram.
    "tiny-wedge3d": TrainConfig(
        net=model_scunet.PRESETS["tiny"],
        objective="wedge3d",
        steps=4000,
        batch=8,
        crop=24,
        crops_per_map=8,
        fill="pocs",  # Departure 1 of data_wedges.py
        voxel_size=4.0,
        resolution_min=8.0,
        resolution_max=15.0,
        mean=0.0,
        std=1.0,
        alpha=1.0,  # Departure 3
        optimizer="adamw",
        lr=1e-3,  # Departure 3
        warmup=0,
        decay=0.5,  # Departure 3
        weight_decay=1e-3,
        beta2=0.999,
        ema_decay=0.99,
        workers=0,
        log_every=20,
        eval_every=100,
        held_out_crops=32,
        save_every=100,
        sample_every=0,
    ),
}
