"""RELION star files, and the particle angles in them.

A star file holds blocks. A block holds columns: in a loop, one row a line, or one `_name value`.

    data_particles
    loop_
    _rlnAngleRot #1
    _rlnMicrographName #2
    12.5 "a name with blanks"      # a comment

Angles are RELION's: intrinsic ZYZ (rot, tilt, psi) in degrees, R = Rz(rot) Ry(tilt) Rz(psi).
RELION 4 and 5 may keep a second rotation for the subtomogram. With A = R^T, their
`ParticleSet::getMatrix3x3` is A_subtomogram A_particle, so

    R = R_particle R_subtomogram                                                     (1)
    a = a_1 a_2 - b_1 conj(b_2),   b = b_1 conj(a_2) + a_1 b_2     for R_1 R_2       (2)
        a = cos(tilt / 2) exp(i (rot + psi) / 2),   b = sin(tilt / 2) exp(i (rot - psi) / 2)

Not read: values over several lines (between `;`), which RELION never writes.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

PARTICLE_ANGLES = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
SUBTOMOGRAM_ANGLES = ("rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi")

# Only particles out of tomograms have these: RELION 4 and 5, and 3 (a volume of its CTF).
SUBTOMOGRAM_COLUMNS = ("rlnTomo", "rlnCoordinateZ", "rlnCtfImage")

# A comment, a value in quotes (which end only before a blank), or a word.
MARK = re.compile(r"""[#'"]""")
WORD = re.compile(r"""#.*|'.*?'(?!\S)|".*?"(?!\S)|\S+""")


def read_star(path: str | Path) -> dict[str, dict[str, list[str]]]:
    """All blocks of a star file: {block: {column: values}}, names without `data_` and `_`.

    What stands before the first `data_` line is in the block "".
    Raises OSError if there is no such file, and ValueError, with the number of the line, for a row
    that is longer or shorter than its loop.
    """
    lines = read_lines(path)
    try:
        return parse_star(lines)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_angles(path: str | Path, tilt_series: bool = False) -> Tensor:
    """Particle orientations (P, 3), float64: rot, tilt, psi in degrees.

    path is a RELION star file with the angles in any block, or text with lines of three numbers.
    Angles of subtomograms, where the block has them, are included by (1). They are those of the
    untilted view, so that the caller must know of the tilt series.
    Raises OSError if there is no such file, and ValueError (one line) if it holds no angles, or
    subtomograms without `tilt_series`.
    """
    lines = read_lines(path)
    try:
        # Read the particle's own rotation, and turn it by the subtomogram's.         (1)
        columns = angle_columns(lines)
        angles = to_tensor(columns, PARTICLE_ANGLES)
        if SUBTOMOGRAM_ANGLES[0] in columns:
            angles = compose(angles, to_tensor(columns, SUBTOMOGRAM_ANGLES))
    except ValueError as error:
        names = ", ".join(PARTICLE_ANGLES)
        raise ValueError(
            f"{path}: neither a RELION star file with {names} nor lines of rot, tilt, psi ({error})"
        ) from None
    subtomograms = [name for name in columns if name.startswith(SUBTOMOGRAM_COLUMNS)]
    if subtomograms and not tilt_series:
        raise ValueError(
            f"{path}: subtomograms (column {subtomograms[0]}), each seen along all directions of "
            "a tilt series, not along one; give its --tilt-range MIN MAX, too"
        )
    if not angles.isfinite().all():
        raise ValueError(f"{path}: some angles are no numbers; take these particles out")
    return angles


def read_lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: no text; give a RELION star file") from None


def parse_star(lines: list[str], first_number: int = 1) -> dict[str, dict[str, list[str]]]:
    """The blocks of `read_star`. first_number is the number of the first line, for messages."""
    block = {}
    blocks = {"": block}
    names, rows = None, []  # of the loop that a line is in
    for number, line in enumerate(lines, first_number):
        # Blank lines and comments may stand anywhere.
        words = split_line(line)
        if not words:
            continue

        # A new block or loop. Values may look like a block's name, so it must stand alone.
        if len(words) == 1 and words[0].startswith(("data_", "loop_")):
            add_columns(block, names, rows)
            names, rows = None, []
            if words[0] == "loop_":
                names = []
            else:
                block = blocks.setdefault(words[0].removeprefix("data_"), {})

        # The names of columns come before the first row. Outside of loops, a name has one value.
        elif words[0].startswith("_") and not rows:
            if names is None:
                block[words[0][1:]] = words[1:]
            else:
                names.append(words[0][1:])

        # A row of the loop.
        elif names and len(words) == len(names):
            rows.append(tuple(words))  # Python need not watch tuples of text: twice as fast
        else:
            wanted = f"{len(names)}, one a column" if names else "names of columns first"
            raise ValueError(f"line {number} has {len(words)} values; expected {wanted}")
    # The last loop ends with the file.
    add_columns(block, names, rows)
    return blocks


def add_columns(block: dict, names: list[str] | None, rows: list[list[str]]) -> None:
    """Put a finished loop into its block."""
    if rows:
        block.update(zip(names, map(list, zip(*rows))))


def split_line(line: str) -> list[str]:
    """The values of a line, without quotes and comments."""
    if not MARK.search(line):
        return line.split()  # the same, but faster
    # The expression matches quotes with what is inside, and a comment as one word.
    words = [word for word in WORD.findall(line) if word[0] != "#"]
    return [word[1:-1] if word[0] in "'\"" and word[-1] == word[0] else word for word in words]


def angle_columns(lines: list[str]) -> dict[str, list[str]]:
    """The columns of the first block that has particle angles; {} if there is none."""
    if any(line.lstrip().startswith(("data_", "loop_", "_")) for line in lines):
        blocks = parse_star(lines)
    else:
        # Plain numbers are a loop whose head is missing.
        head = ["loop_", *(f"_{name}" for name in PARTICLE_ANGLES)]
        blocks = parse_star(head + lines, 1 - len(head))

    # The block of the particles is `particles` in RELION 3.1, `images` or nothing before.
    with_angles = (block for block in blocks.values() if PARTICLE_ANGLES[0] in block)
    return next(with_angles, {})


def to_tensor(columns: dict[str, list[str]], names: tuple[str, ...]) -> Tensor:
    """Three columns as numbers, (P, 3) float64."""
    # A block with rot may lack tilt or psi.
    for name in names:
        if name not in columns:
            raise ValueError(f"no column {name}")
    numbers = [[float(value) for value in columns[name]] for name in names]
    return torch.tensor(numbers, dtype=torch.float64).T


def compose(angles_1: Tensor, angles_2: Tensor) -> Tensor:
    """The angles of R_1 R_2, all (P, 3) in degrees."""
    a_1, b_1 = half_angles(angles_1)
    a_2, b_2 = half_angles(angles_2)
    a = a_1 * a_2 - b_1 * b_2.conj()  # (2)
    b = b_1 * a_2.conj() + a_1 * b_2

    # The inverse of a and b above.
    rot = a.angle() + b.angle()
    tilt = 2 * torch.atan2(b.abs(), a.abs())
    psi = a.angle() - b.angle()
    return torch.rad2deg(torch.stack([rot, tilt, psi], -1))


def half_angles(angles: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of (2), complex (P,)."""
    rot, tilt, psi = torch.deg2rad(angles).unbind(-1)
    a = torch.polar(torch.cos(tilt / 2), (rot + psi) / 2)
    b = torch.polar(torch.sin(tilt / 2), (rot - psi) / 2)
    return a, b
