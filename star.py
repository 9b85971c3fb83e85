"""RELION star files.
"""
from pathlib import Path

import torch.utils.checkpoint
from torch import Tensor

import degrade


def read_orientations(path: str) -> Tensor:
    """Particle rotations (P, 3, 3) from a RELION star file, or from lines of rot, tilt, psi in degrees."""
    wanted, header, rows = ["_rlnAngleRot", "_rlnAngleTilt", "_rlnAnglePsi"], [], []
    try:
        lines = Path(path).read_text().splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text, but {' '.join(wanted)} are wanted") from None
    for line in lines:
        words = line.split()
        if words and words[0].startswith(("data_", "loop_")):
            if rows and set(wanted) <= set(header):
                break                                    # the table after the one with the angles
            header, rows = [], []
        elif words and words[0].startswith("_"):
            header.append(words[0])
        elif words and not words[0].startswith("#"):
            rows.append(words)
    try:
        columns = [header.index(name) for name in wanted] if header else range(3)
        angles = torch.tensor([[float(row[c]) for c in columns] for row in rows]).double()
    except (ValueError, IndexError):
        raise ValueError(f"{path}: neither a RELION star file with {', '.join(wanted)} nor lines of rot, tilt, psi") from None
    if not len(angles) or not angles.isfinite().all():
        raise ValueError(f"{path}: no orientations in it, or angles that are no numbers")
    return degrade.euler_matrix(angles)
