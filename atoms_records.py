"""The atoms that PDB and mmCIF files list: one parser for each format.

    read_atoms(path, notes)    all atoms of the first model, with all their alternate locations
    one_location(atoms)        one atom for each set of alternate locations

Alternate locations are places between which one atom of the specimen is divided. The file lists
the atom once for each place, with a letter and an occupancy, and the occupancies add up to 1.
Positions are (x, y, z) in Å, B-factors in Å². mmCIF is read by gemmi.

PDB: the columns of format 3.3 (wwPDB). Serial numbers are not read, so that neither hybrid-36 nor
six digits lose an atom. Six digits begin in column 6, or move the rest of the line by one column.
"""

import gzip
import io
import math
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

SYMBOLS = """
    H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br
    Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho
    Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu
"""

ATOMIC_NUMBER = {symbol.upper(): z for z, symbol in enumerate(SYMBOLS.split(), 1)}
ATOMIC_NUMBER["D"] = 1  # deuterium

# In lower case. Names of files may have any.
CIF_SUFFIXES = (".cif", ".cif.gz", ".mmcif", ".mmcif.gz")
MODEL_SUFFIXES = (".pdb", ".pdb.gz", ".ent", ".ent.gz", *CIF_SUFFIXES)

FARTHEST = 1e6  # Å; anything beyond is not a position


class Atom(NamedTuple):
    """One atom of a file. `alternate` is the letter of its location, "" where there is only one."""

    residue: tuple[str, str]  # chain, number with insertion code
    residue_name: str
    name: str
    alternate: str
    element: str  # in upper case, as in the file
    xyz: list[float]
    occupancy: float
    b_factor: float
    polymer: bool  # ATOM, not HETATM


def read_atoms(path: Path, notes: list[str]) -> list[Atom]:
    """All atoms of the first model of a PDB or mmCIF file, plain or gzipped.

    notes: gets a sentence for what was assumed. Raises OSError if there is no such file, and
    ValueError (one line) if it is damaged, holds no atoms or an atom without a finite position,
    or is mmCIF and gemmi is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    parse = cif_atoms if path.name.lower().endswith(CIF_SUFFIXES) else pdb_atoms
    try:
        atoms = parse(read_text(path), notes)
    except (ValueError, RuntimeError) as error:  # RuntimeError: gemmi
        line = " ".join(str(error).split())
        raise ValueError(f"{path}: {line}") from None
    if not atoms:
        raise ValueError(f"{path}: no atoms; give a PDB or mmCIF file")

    # One NaN would spread to the whole map.
    for atom in atoms:
        far = any(not abs(x) <= FARTHEST for x in atom.xyz)  # NaN compares as False
        if far or not math.isfinite(atom.occupancy + atom.b_factor):
            where = f"{atom.name} of residue {'/'.join((*atom.residue, atom.residue_name))}"
            numbers = f"position {atom.xyz}, occupancy {atom.occupancy}, B-factor {atom.b_factor}"
            raise ValueError(f"{path}: atom {where} has {numbers}; correct or remove it")
    return atoms


def read_text(path: Path) -> str:
    """The text of a file, unpacked if it is gzipped, without a byte-order mark."""
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"damaged or cut short ({error}); copy it again") from None
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    return content.decode("utf-16" if wide else "utf-8-sig", errors="replace")


# ---- PDB -------------------------------------------------------------------------------------


def pdb_atoms(text: str, notes: list[str]) -> list[Atom]:
    """All atoms of the first model, by the columns of the PDB format. Arguments: `read_atoms`."""
    # The lines of atoms, with their numbers in the file. Only the first model counts.
    lines = {}
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.startswith("ENDMDL"):
            break
        if line.startswith(("ATOM", "HETAT")):
            lines[number] = unshifted(line)

    # Files that align all names to the left hide which letters are the element.
    polymer_names = {line[12:16] for line in lines.values() if line.startswith("ATOM")}
    left_aligned = "CA  " in polymer_names and " CA " not in polymer_names

    atoms = []
    guessed = 0
    for number, line in lines.items():
        if len(line.rstrip()) < 54:
            raise ValueError(f"line {number} ends before the position of its atom: {line[:54]!r}")
        try:
            atom = pdb_atom(line)
        except ValueError as error:
            raise ValueError(f"could not read line {number} ({error})") from None
        # Older files leave columns 77-78 empty, or number their lines there.
        if not atom.element.isalpha():
            atom = atom._replace(element=element_of(line[12:16], atom, left_aligned))
            guessed += 1
        atoms.append(atom)
    if guessed:
        notes.append(f"{guessed} atoms without an element (columns 77-78), taken from their names")
    return atoms


def unshifted(line: str) -> str:
    """The line of an atom in the columns of the format, whatever its serial number.

    Six digits from column 7 on move the rest of the line by one column.
    """
    shifted = line[6:12].isdigit() and line[35:36] == "." and line[34:35] != "."
    return line[:11] + line[12:] if shifted else line


def pdb_atom(line: str) -> Atom:
    """The atom of one line, with whatever its columns 77-78 hold as the element."""
    # Occupancy and B-factor may be blank: 1 and 0.
    return Atom(
        residue=(line[21].strip(), line[22:27].strip()),
        residue_name=line[17:20].strip(),
        name=line[12:16].strip(),
        alternate=line[16].strip(),
        element=line[76:78].strip().upper(),
        xyz=[float(line[30:38]), float(line[38:46]), float(line[46:54])],
        occupancy=float(line[54:60].strip() or 1),
        b_factor=float(line[60:66].strip() or 0),
        polymer=line.startswith("ATOM"),
    )


def element_of(name: str, atom: Atom, left_aligned: bool) -> str:
    """The element of an atom whose line does not give it, from its name (columns 13-16).

    The format puts the element into columns 13-14, aligned to the right. So " CA " is a carbon and
    "CA  " calcium. Names of four letters and left-aligned files break this rule.
    """
    digits = "0123456789 "
    letters = name.upper().lstrip(digits)
    symbol = name[:2].upper().strip(digits)
    first = letters[:1]
    if len(symbol) < 2:
        return symbol or first

    # An ion is named like its residue. Selenium replaces the sulphur of two amino acids.
    if symbol == atom.residue_name or (symbol == "SE" and atom.residue_name in ("MSE", "SEC")):
        return symbol

    # A C, N, O, H, P or S of a polymer, whose second letter counts the bonds from the backbone.
    misplaced = left_aligned or name[3] != " "
    greek = misplaced and symbol[1] in "ABGDEZH"
    hydrogen = first == "H" and name[3] != " "
    if first in "CNOHPS" and (atom.polymer or greek or hydrogen):
        return first
    return symbol if symbol in ATOMIC_NUMBER or first not in ATOMIC_NUMBER else first


# ---- mmCIF -----------------------------------------------------------------------------------


def cif_atoms(text: str, notes: list[str]) -> list[Atom]:
    """As `pdb_atoms`, of the text of an mmCIF file, by gemmi."""
    try:
        import gemmi
    except ImportError:
        message = "reading mmCIF needs gemmi; pip install gemmi, or give a PDB file"
        raise ValueError(message) from None

    # The first block with atoms. Dictionaries of ligands have none.
    blocks = list(gemmi.cif.read_string(text))
    blocks = [block for block in blocks if len(block.find_values("_atom_site.Cartn_x"))]
    if not blocks:
        raise ValueError("no atom sites (_atom_site.Cartn_x); give an mmCIF file with coordinates")
    structure = gemmi.make_structure_from_block(blocks[0])
    structure.merge_chain_parts()  # as gemmi.read_structure does

    if len(structure) == 0:
        raise ValueError("its atom sites have no atoms; give an mmCIF file with coordinates")

    # [0] is the first model of the file.
    atoms = []
    for site in structure[0].all():
        atom = site.atom
        residue = site.residue
        atoms.append(
            Atom(
                residue=(site.chain.name, str(residue.seqid)),
                residue_name=residue.name,
                name=atom.name,
                alternate=atom.altloc.strip("\0"),
                element=atom.element.name.upper(),
                xyz=atom.pos.tolist(),
                occupancy=atom.occ,
                b_factor=atom.b_iso,
                polymer=residue.het_flag == "A",
            )
        )
    return atoms


# ---- Alternate locations ---------------------------------------------------------------------


def one_location(atoms: list[Atom]) -> list[Atom]:
    """One atom for each set of alternate locations: the most occupied one, the first of equals.

    Its occupancy is that of the whole set, 1 at most. Other atoms stay as they are.
    """
    # Sets of equal residue and name. A letter that comes again begins another set, because large
    # files use a chain's name twice.
    seen = Counter()
    places = defaultdict(list)
    for atom in atoms:
        place = (atom.residue, atom.name)
        copy = seen[place, atom.alternate]
        seen[place, atom.alternate] += 1
        places[place, copy].append(atom)

    kept = []
    for place in places.values():
        best = max(place, key=lambda atom: atom.occupancy)
        if len(place) > 1:
            best = best._replace(occupancy=min(1, sum(atom.occupancy for atom in place)))
        kept.append(best)
    return kept
