"""Downloads: PDB entries -> an archive of structures, EMDB entries -> map files.

    python data_prepare.py structures structures/val.tsv          # -> structures/val.npz
    python data_prepare.py emdb EMD-6374 EMD-3488 maps            # -> maps/emd_6374.map.gz, ...

A downloaded file stays and is not downloaded again, so the same command goes on after a failure.
Not yet run against the PDB and EMDB from here: the tests put files where a server would answer.

An entry is cleaned like the structures that the shipped networks learnt from: first model, one
alternate location, no hydrogens, no water, no common buffer or cryoprotectant molecules. Other
ligands stay if they lie within 8 Å of the polymer. Symmetry copies are not added.
Departure 1: the shipped networks saw some entries only in part, as their sources prepared them.
Where the list names no chains we take the whole entry, and report if its size differs by over 5 %.
"""

import csv
import http.client
import re
import urllib.request
from collections import defaultdict
from pathlib import Path
from urllib.error import HTTPError

import numpy as np
import torch

from atoms import Structure
from atoms_records import ATOMIC_NUMBER, Atom, one_location, read_atoms
from files import atomic_write

PDB_URL = "https://files.rcsb.org/download"
EMDB_URL = "https://ftp.ebi.ac.uk/pub/databases/emdb/structures"

# Residue names of water, buffers, precipitants and cryoprotectants.
SOLVENT = """
    HOH DOD WAT GOL EDO PEG PGE PG4 PG0 1PE P6G P33 2PE MPD MRD SO4 PO4 ACT ACY FMT EOH IPA MOH
    DMS TRS EPE MES BME DTT CIT FLC TLA MLI BTB IMD NH4 NO3 AZI
"""


def download(url: str, path: Path) -> None:
    """Write what a URL returns to `path`, whole or not at all.

    Raises OSError without a connection, for a name that the server does not know, on a full disk.
    """
    # Reading all of it at once raises if the connection breaks off before the end.
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            content = response.read()
    except http.client.HTTPException as error:
        raise OSError(f"the connection broke off ({error!r})") from None
    with atomic_write(path) as file:
        file.write(content)


def read_list(path: str | Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a .tsv list. Raises OSError without the file, ValueError without a column."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", restval=""))
    missing = set(columns) - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; want a .tsv with rows")
    return rows


# ---- Maps from EMDB -----------------------------------------------------------------------------


def map_url(entry: str) -> str:
    """Where EMDB keeps the map of an entry EMD-1234."""
    label = entry.lower().replace("-", "_")
    return f"{EMDB_URL}/{entry}/map/{label}.map.gz"


def map_entries(names: list[str]) -> list[str]:
    """EMDB ids, each once, from ids and from .tsv lists with a column `emdb`.

    Raises ValueError for what is neither.
    """
    # A list may name an entry twice, because several parts of one map were cut out.
    entries = []
    for name in names:
        rows = read_list(name, ("emdb",)) if name.endswith(".tsv") else [dict(emdb=name)]
        entries += [row["emdb"] for row in rows if row["emdb"]]
    for entry in entries:
        if not re.fullmatch(r"EMD-\d+", entry):
            raise ValueError(f"{entry!r} is no EMDB entry; give EMD-1234, or a .tsv list of them")
    return list(dict.fromkeys(entries))


def fetch_maps(names: list[str], folder: str | Path, say=print) -> list[str]:
    """Download the maps of EMDB entries into a folder, and return a line per failure.

    names: as in `map_entries`. Raises OSError if every entry failed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = map_entries(names)

    # A failure is noted and does not stop the others.
    failed = []
    for entry in entries:
        url = map_url(entry)
        path = folder / url.rsplit("/", 1)[1]
        try:
            if not path.exists():
                download(url, path)
            say(f"{entry}: {path}")
        except OSError as error:
            failed.append(f"{entry}: {url}: {error}")
            say(failed[-1])
    say(f"{len(entries) - len(failed)} of {len(entries)} maps are in {folder}")
    if len(failed) == len(entries):
        raise OSError(f"no map was downloaded; {failed[0]}")
    return failed


# ---- One entry of the PDB -----------------------------------------------------------------------


def local_entries(folder: Path) -> dict[str, Path]:
    """PDB id -> its file in a folder: 1abc.pdb, pdb1abc.ent.gz, 1ABC.cif, ..."""
    pattern = re.compile(r"(?:pdb)?(\w{4})\.(cif|ent|pdb)(\.gz)?", re.IGNORECASE)
    # Where an entry has both, the PDB file comes later and replaces the mmCIF file.
    files = {}
    for file in sorted(folder.iterdir(), key=lambda file: ".cif" not in file.name.lower()):
        if match := pattern.fullmatch(file.name):
            files[match[1].upper()] = file
    return files


def fetch_entry(pdb_id: str, folder: Path) -> Path:
    """Download a PDB entry in PDB format, or as mmCIF where it is too large for that format."""
    # The server says 404, not found, for an entry without a PDB file.
    try:
        path = folder / f"{pdb_id}.pdb.gz"
        download(f"{PDB_URL}/{path.name}", path)
    except HTTPError as error:
        if error.code != 404:
            raise
        path = folder / f"{pdb_id}.cif.gz"
        download(f"{PDB_URL}/{path.name}", path)
    return path


def clean(atoms: list[Atom], chains: str = "") -> list[Atom]:
    """The atoms to train on, by the rules at the top. chains: "A,B" keeps these, "" keeps all.

    Raises ValueError if no polymer is left.
    """
    # Neither hydrogens nor unknown elements, no solvent, only the chains that are wanted.
    solvent = SOLVENT.split()
    kept = []
    for atom in atoms:
        heavy = ATOMIC_NUMBER.get(atom.element, 0) > 1
        wanted = not chains or atom.residue[0] in chains.split(",")
        if heavy and wanted and atom.residue_name not in solvent:
            kept.append(atom)

    kept = one_location(kept)

    # The polymer, by the file's own word (ATOM, not HETATM).
    polymer = torch.tensor([atom.xyz for atom in kept if atom.polymer])
    if len(polymer) == 0:
        raise ValueError(f"no polymer (chains: {chains or 'all'})")

    # The ligands near it. Modified residues count as such.
    ligands = defaultdict(list)
    for atom in kept:
        if not atom.polymer:
            ligands[atom.residue].append(atom.xyz)
    near = set()
    for residue, xyz in ligands.items():
        if torch.cdist(torch.tensor(xyz), polymer).min() <= 8:
            near.add(residue)
    return [atom for atom in kept if atom.polymer or atom.residue in near]


def to_structure(label: str, atoms: list[Atom]) -> Structure:
    """The structure of these atoms, about its centroid. Archives hold no occupancies."""
    xyz = np.array([atom.xyz for atom in atoms])
    number = np.array([ATOMIC_NUMBER[atom.element] for atom in atoms])
    b_factor = np.array([atom.b_factor for atom in atoms])
    return Structure(label, xyz - xyz.mean(0), number, b_factor)


# ---- An archive of entries ----------------------------------------------------------------------


def write_archive(path: Path, structures: list[Structure]) -> None:
    """The .npz file that atoms.read_archive reads.

    Positions in 0.01 Å as int16, so up to 327 Å from the centroid; B-factors from 0 to 255 Å^2.
    """
    # All atoms one after another; structure i begins at atom_start[i].
    lengths = [len(structure.xyz) for structure in structures]
    xyz = np.concatenate([structure.xyz for structure in structures])
    number = np.concatenate([structure.atomic_number for structure in structures])
    b_factor = np.concatenate([structure.b_factor for structure in structures])
    with atomic_write(path) as file:
        np.savez_compressed(
            file,
            label=[structure.label for structure in structures],
            atom_start=np.cumsum([0, *lengths]),
            xyz=np.rint(100 * xyz).astype(np.int16),
            element=number.astype(np.uint8),
            bfactor=np.rint(b_factor.clip(0, 255)).astype(np.uint8),
        )


def read_entry(
    row: dict[str, str], files: dict[str, Path], folder: Path, online: bool
) -> Structure:
    """The cleaned structure of one row of a list; files: PDB id -> file, of those at hand.

    Raises OSError or ValueError if it cannot be had.
    """
    # Find its file, or download it.
    pdb_id = row["pdb_id"].upper()
    if not pdb_id:
        raise ValueError("has no PDB id, so it cannot be downloaded")
    if pdb_id not in files and not online:
        raise ValueError(f"no file of {pdb_id} in {folder}")
    file = files.get(pdb_id) or fetch_entry(pdb_id, folder)

    # Read and clean it.
    try:
        atoms = read_atoms(file, [])
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}; delete it to download it again") from None
    try:
        structure = to_structure(row["label"], clean(atoms, row["chains"]))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if abs(structure.xyz).max() > 327:
        raise ValueError(f"{file}: reaches farther than 327 Å from its centroid")
    return structure


def build_archive(list_file, out=None, folder=None, say=print) -> list[str]:
    """Download and clean the PDB entries of a list, and write them as one archive.

    list_file: a .tsv with the columns label, pdb_id, chains ("A,B", or "" for all) and atoms (their
    number after cleaning, to compare). out: by default the list's name with .npz. folder: holds the
    files already, so that nothing is downloaded (by default they go to `files` beside the list).
    Returns a line for each entry that is missing, unreadable or of another size than listed.
    Raises ValueError if no entry is left.
    """
    list_file = Path(list_file)
    rows = read_list(list_file, ("label", "pdb_id", "chains", "atoms"))

    # What is at hand need not be downloaded.
    online = folder is None
    folder = Path(folder or list_file.parent / "files")
    if online:
        folder.mkdir(parents=True, exist_ok=True)
    files = local_entries(folder)

    # Read one entry after the other. A bad one must not stop the others.
    structures = []
    problems = []
    for row in rows:
        try:
            structure = read_entry(row, files, folder, online)
        except (OSError, ValueError) as error:
            problems.append(f"{row['label']}: {error}")
            say(f"missing: {problems[-1]}")
            continue
        structures.append(structure)

        # Compare the number of atoms with the list's.
        atoms = len(structure.xyz)
        listed = int(row["atoms"] or atoms)
        if abs(atoms - listed) > 0.05 * listed:
            problems.append(f"{row['label']}: {atoms} atoms, listed with {listed}")
            say(f"differs: {problems[-1]}")

    # Write what there is.
    missing = len(rows) - len(structures)
    if not structures:
        raise ValueError(f"{list_file}: none of its {missing} entries could be read")
    out = Path(out or list_file.with_suffix(".npz"))
    write_archive(out, structures)
    say(
        f"{len(structures)} of {len(rows)} structures are in {out}; {missing} are missing, "
        f"{len(problems) - missing} differ from the list by more than 5 % of their atoms"
    )
    return problems
