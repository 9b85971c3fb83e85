"""The promises of atoms_records.py: what users' PDB and mmCIF files hold, and how it is read."""

import gzip

import pytest

import atoms
from atoms_records import one_location, read_atoms


def atom_line(name=" CA ", element=" C", *, record="ATOM  ", residue="ALA", x=1.0, **columns):
    """One line in the columns of the PDB format; name: 4 columns, element: 2."""
    start = columns.get("start", f"{record}    1 ")
    alternate = columns.get("alternate", " ")
    number = columns.get("number", 1)
    occupancy = columns.get("occupancy", 1.0)
    position = f"{x:8.3f}{2:8.3f}{3:8.3f}"
    middle = f"{name}{alternate}{residue:>3} A{number:4d}    {position}{occupancy:6.2f}"
    return f"{start}{middle}{20:6.2f}          {element}"


@pytest.fixture
def read(tmp_path):
    """Lines of a PDB file -> its atoms."""

    def through_a_file(*lines, notes=None):
        path = tmp_path / "a.pdb"
        path.write_text("\n".join(lines) + "\n")
        return read_atoms(path, [] if notes is None else notes)

    return through_a_file


# ---- Serial numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        "ATOM  99999 ",  # the format
        "ATOM 100000 ",  # six digits from column 6
        "ATOM  A0000 ",  # hybrid-36
        "ATOM  ***** ",
        "HETATMA0000 ",
        "ATOM  100000 ",  # six digits from column 7 move the rest by one column
        "ATOM 1000000 ",  # seven from column 6
        "HETATM100000 ",
    ],
)
def test_no_serial_number_loses_an_atom(read, start):
    (atom,) = read(atom_line(start=start, number=7, x=-12.345))
    assert (atom.name, atom.residue, atom.xyz[0]) == ("CA", ("A", "7"), -12.345)
    assert atom.polymer == start.startswith("ATOM")


# ---- Elements --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, residue, record, element",
    [
        (" CA ", "ALA", "ATOM  ", "C"),
        ("CA  ", "CA", "HETATM", "CA"),
        ("CA  ", "CA", "ATOM  ", "CA"),
        ("HG11", "VAL", "ATOM  ", "H"),
        ("1HB ", "ALA", "ATOM  ", "H"),
        ("FE  ", "HEM", "HETATM", "FE"),
        (" NA ", "HEM", "HETATM", "N"),
        ("CL1 ", "LIG", "HETATM", "CL"),
        ("CAA1", "LIG", "HETATM", "C"),
        ("HO5'", "LIG", "HETATM", "H"),
        ("SE  ", "MSE", "HETATM", "SE"),
        (" P  ", "DA", "ATOM  ", "P"),
    ],
)
def test_an_element_that_the_line_does_not_give_follows_from_the_name(
    read, name, residue, record, element
):
    notes = []
    backbone = atom_line(" CA ")
    *_, atom = read(backbone, atom_line(name, "", residue=residue, record=record), notes=notes)
    assert atom.element == element
    assert notes == ["1 atoms without an element (columns 77-78), taken from their names"]


@pytest.mark.parametrize(
    "name, residue, record, element",
    [
        ("CA  ", "ALA", "ATOM  ", "C"),
        ("CD1 ", "LEU", "ATOM  ", "C"),
        ("HG  ", "SER", "ATOM  ", "H"),
        ("NE2 ", "HIS", "ATOM  ", "N"),
        ("SE  ", "MSE", "ATOM  ", "SE"),
        ("NA  ", "HEM", "HETATM", "N"),
        ("FE  ", "HEM", "HETATM", "FE"),
        ("CD  ", "CD", "HETATM", "CD"),
        ("ZN  ", "ZN", "HETATM", "ZN"),
    ],
)
def test_names_of_left_aligned_files_do_not_become_metals(read, name, residue, record, element):
    backbone = atom_line("CA  ", "")
    *_, atom = read(backbone, atom_line(name, "", residue=residue, record=record))
    assert atom.element == element


def test_digits_in_the_columns_of_the_element_are_no_element(read):
    (atom,) = read(atom_line(" CA ", "12"))
    assert atom.element == "C"


# ---- Files -----------------------------------------------------------------------------------

CIF = """data_X
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_seq_id
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.auth_seq_id
_atom_site.auth_asym_id
ATOM 1 C CA . ALA A 1 1.0 2.0 3.0 1.0 20.0 1 A
"""


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize(
    "name", ["m.pdb", "M.PDB", "M.PDB.GZ", "M.Ent", "m.cif", "M.CIF", "M.CIF.GZ"]
)
def test_upper_case_names_and_byte_order_marks_are_read(tmp_path, name, mark):
    if "cif" in name.lower():
        pytest.importorskip("gemmi", reason="reading mmCIF needs gemmi")
    content = (CIF if "cif" in name.lower() else atom_line()).encode()
    content = mark + content
    (tmp_path / name).write_bytes(gzip.compress(content) if "GZ" in name else content)
    (atom,) = read_atoms(tmp_path / name, [])
    assert (atom.element, atom.xyz) == ("C", [1, 2, 3])
    (structure,) = atoms.read_structures(tmp_path)
    assert structure.label == name.split(".")[0]


def test_utf_16_is_read(tmp_path):
    (tmp_path / "a.pdb").write_bytes(atom_line().encode("utf-16"))
    assert len(read_atoms(tmp_path / "a.pdb", [])) == 1


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.pdb", atom_line()[:20], "line 1 ends before the position"),
        ("a.pdb", atom_line(x=float("nan")), "atom CA of residue A/1/ALA has position .nan"),
        ("a.pdb", atom_line(x=float("inf")), "atom CA of residue A/1/ALA has position .inf"),
        ("a.pdb", atom_line(occupancy=float("nan")), "occupancy nan"),
        ("a.pdb", "", "no atoms"),
        ("a.pdb.gz", gzip.compress(atom_line().encode(), mtime=0)[:-12], "damaged or cut short"),
        ("a.pdb.gz", gzip.compress(b"", mtime=0).replace(b"\x03", b"\x77"), "damaged or cut short"),
        ("a.cif", "", "no atom sites"),
        ("a.cif", "data_ABC\nloop_\n_chem_comp_atom.atom_id\nC1\n", "no atom sites"),
        ("a.cif", CIF.replace("1.0 2.0 3.0", "? ? ?"), "atom CA of residue A/1/ALA has position"),
        ("a.cif", "loop_ nonsense ;", "a.cif: "),
        ("a.cif", CIF.replace("_atom_site.id\n", "_atom_site.x\n"), "sites have no atoms"),
    ],
)
def test_files_that_cannot_be_read_are_one_line_that_names_them(tmp_path, name, content, says):
    if name == "a.cif":
        pytest.importorskip("gemmi", reason="reading mmCIF needs gemmi")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says) as error:
        read_atoms(path, [])
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


# ---- Alternate locations ---------------------------------------------------------------------


def test_the_most_occupied_location_stays_with_the_occupancy_of_all(read):
    lines = [
        atom_line(" N  ", " N", x=0),
        atom_line(" CA ", alternate="A", occupancy=0.3, x=1),
        atom_line(" CA ", alternate="B", occupancy=0.7, x=2),
        atom_line(" CB ", alternate="A", occupancy=0.5, x=3),
        atom_line(" CB ", alternate="B", occupancy=0.5, x=4),
        atom_line(" CG ", alternate="B", occupancy=0.25, x=5),
    ]
    kept = one_location(read(*lines))
    assert [atom.xyz[0] for atom in kept] == [0, 2, 3, 5]
    assert [atom.occupancy for atom in kept] == [1, 1, 1, 0.25]


def test_a_location_without_a_letter_is_one_of_its_set(read):
    lines = [atom_line(occupancy=0.6, x=1), atom_line(alternate="B", occupancy=0.4, x=2)]
    assert [atom.xyz[0] for atom in one_location(read(*lines))] == [1]


def test_atoms_of_chains_that_share_a_name_all_stay(read):
    pair = [atom_line(alternate="A", occupancy=0.5), atom_line(alternate="B", occupancy=0.5)]
    assert len(one_location(read(*pair, *pair))) == 2
    assert len(one_location(read(atom_line(), atom_line()))) == 2
