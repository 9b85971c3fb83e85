"""data_download.py: PDB entries -> an archive, EMDB entries -> map files. No network is needed."""

import gzip
import http.client
import io
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import atoms
import atoms_records
import data_download
import data_prepare

COLUMNS = "label\tpdb_id\tchains\tsplit\tcategory\tatoms\n"


def line(chain, number, residue, name, xyz, *, record="ATOM", alternate="", b=20.0, element=None):
    """One atom in the columns of the PDB format."""
    x, y, z = xyz
    element = element or name[0]
    atom = f"{record:6}    1 {name:^4}{alternate or ' '}{residue:>3} {chain}{number:4d}"
    return f"{atom}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00{b:6.2f}          {element:>2}"


def chain(name, at=0.0, residues=3):
    """The atoms N, CA, C of some residues along x."""
    lines = []
    for i in range(residues):
        for j, atom in enumerate(("N", "CA", "C")):
            lines.append(line(name, i + 1, "ALA", atom, (at + 3.8 * i + 1.3 * j, 0, 0)))
    return lines


@pytest.fixture
def read(tmp_path):
    """Lines of a PDB file -> what `clean` keeps of them."""

    def through_a_file(lines, chains=""):
        path = tmp_path / "a.pdb"
        path.write_text("\n".join(lines) + "\n")
        return data_download.clean(atoms_records.read_atoms(path, []), chains)

    return through_a_file


# ---- Cleaning --------------------------------------------------------------------------------


def test_hydrogens_waters_buffers_and_unknown_elements_are_removed(read):
    het = dict(record="HETATM")
    lines = chain("A") + [
        line("A", 1, "ALA", "HA", (0, 1, 0), element="H"),
        line("A", 1, "ALA", "DA", (0, 1, 0), element="D"),
        line("A", 90, "HOH", "O", (0, 3, 0), **het),
        line("A", 91, "GOL", "C1", (0, 3, 0), **het),
        line("A", 92, "SO4", "S", (0, 3, 0), **het),
        line("A", 93, "UNX", "X", (0, 3, 0), **het),
    ]
    assert len(read(lines)) == 9


def test_a_ligand_stays_if_any_of_its_atoms_lies_within_8_angstrom_of_the_polymer(read):
    near = [
        line("A", 90, "HEM", "FE", (0, 7.9, 0), record="HETATM", element="FE"),
        line("A", 90, "HEM", "C1", (0, 20, 0), record="HETATM"),
    ]
    far = [line("A", 91, "ZN", "ZN", (0, 8.1, 0), record="HETATM", element="ZN")]
    kept = read(chain("A") + near + far)
    assert [atom.element for atom in kept[9:]] == ["FE", "C"]


def test_modified_residues_of_the_polymer_stay(read):
    lines = chain("A") + [line("A", 4, "MSE", "SE", (9, 1, 0), record="HETATM", element="SE")]
    assert read(lines)[-1].element == "SE"


def test_only_the_first_alternate_location_of_a_residue_is_kept(read):
    lines = chain("A") + [
        line("A", 4, "SER", "CB", (1, 1, 0), alternate="B"),
        line("A", 4, "SER", "OG", (2, 1, 0), alternate="B"),
        line("A", 4, "SER", "CB", (1, 2, 0), alternate="A"),
        line("A", 4, "SER", "CA", (1, 3, 0)),
    ]
    assert [atom.xyz[1] for atom in read(lines)[9:]] == [1, 1, 3]


def test_only_the_first_model_is_read(read):
    assert len(read(["MODEL        1", *chain("A"), "ENDMDL", "MODEL        2", *chain("A")])) == 9


def test_only_the_listed_chains_are_kept(read):
    lines = chain("A") + chain("B", 50) + chain("C", 100)
    assert {atom.residue[0] for atom in read(lines, "A,C")} == {"A", "C"}
    with pytest.raises(ValueError, match="no polymer .chains: X"):
        read(lines, "X")


def test_mmcif_and_pdb_files_of_one_entry_give_the_same_atoms(tmp_path):
    gemmi = pytest.importorskip("gemmi")
    alternate = line("A", 4, "SER", "CB", (1, 1, 0), alternate="B")
    ligand = line("A", 9, "HEM", "FE", (0, 5, 0), record="HETATM", element="FE")
    (tmp_path / "a.pdb").write_text("\n".join([*chain("A"), alternate, ligand]) + "\n")
    structure = gemmi.read_structure(str(tmp_path / "a.pdb"))
    structure.make_mmcif_document().write_file(str(tmp_path / "a.cif"))
    from_pdb = atoms_records.read_atoms(tmp_path / "a.pdb", [])
    assert atoms_records.read_atoms(tmp_path / "a.cif", []) == from_pdb
    assert len(from_pdb) == 11


# ---- The archive -----------------------------------------------------------------------------


@pytest.fixture
def entries(tmp_path):
    """A folder with three entries, and a list that names those and two more."""
    folder = tmp_path / "pdb"
    folder.mkdir()
    (folder / "1abc.pdb").write_text("\n".join(chain("A") + chain("B", 50)))
    (folder / "pdb2abc.ent.gz").write_bytes(gzip.compress("\n".join(chain("A")).encode()))
    (folder / "3ABC.pdb.gz").write_bytes(gzip.compress("\n".join(chain("A")).encode())[:-9])
    (tmp_path / "list.tsv").write_text(
        COLUMNS
        + "1ABC_B\t1ABC\tB\tval\tsmall\t9\n"
        + "2ABC\t2ABC\t\tval\tsmall\t100\n"
        + "3ABC\t3ABC\t\tval\tsmall\t9\n"
        + "4ABC\t4ABC\t\tval\tsmall\t9\n"
        + "RNA-Puzzle rp14\t\t\tval\tRNA/DNA\t9\n"
    )
    return tmp_path


def test_the_archive_holds_the_cleaned_entries_as_read_archive_reads_them(entries):
    data_download.build_archive(entries / "list.tsv", folder=entries / "pdb", say=lambda _: None)
    one, two = atoms.read_structures(entries / "list.npz")
    assert (one.label, two.label) == ("1ABC_B", "2ABC")
    want = np.array([3.8 * i + 1.3 * j for i in range(3) for j in range(3)])
    np.testing.assert_allclose(one.xyz[:, 0], want - want.mean(), atol=0.0051)  # 0.01 Å
    assert one.atomic_number.tolist() == [7, 6, 6] * 3 and set(one.b_factor) == {20}


def test_missing_unreadable_and_differing_entries_are_named_and_do_not_stop_the_others(entries):
    said = []
    problems = data_download.build_archive(
        entries / "list.tsv", entries / "out.npz", entries / "pdb", say=said.append
    )
    labels = [problem.split(":")[0] for problem in problems]
    assert labels == ["2ABC", "3ABC", "4ABC", "RNA-Puzzle rp14"]
    assert "9 atoms, listed with 100" in problems[0]
    assert "3ABC.pdb.gz" in problems[1] and "\n" not in problems[1]
    assert "no file of 4ABC" in problems[2] and "no PDB id" in problems[3]
    assert said[-1].startswith("2 of 5 structures are in") and "3 are missing, 1 differ" in said[-1]
    assert len(atoms.read_structures(entries / "out.npz")) == 2


def test_a_list_of_which_nothing_can_be_read_is_an_error(entries):
    (entries / "list.tsv").write_text(COLUMNS + "4ABC\t4ABC\t\tval\tsmall\t9\n")
    with pytest.raises(ValueError, match="none of its 1 entries could be read"):
        data_download.build_archive(entries / "list.tsv", folder=entries / "pdb")
    assert not (entries / "list.npz").exists()


def test_lists_without_the_columns_are_refused(tmp_path):
    (tmp_path / "list.tsv").write_text("pdb_id\tlabel\n1ABC\t1ABC\n")
    with pytest.raises(ValueError, match="list.tsv: no column atoms, chains"):
        data_download.build_archive(tmp_path / "list.tsv")


@pytest.mark.parametrize("name, count", [("train", 879), ("val", 56)])
def test_the_lists_of_the_repository_name_every_structure_once(name, count):
    folder = Path(data_download.__file__).parent / "structures"
    rows = data_download.read_list(folder / f"{name}.tsv", COLUMNS.split())
    assert len(rows) == count == len({row["label"] for row in rows})
    assert {row["split"] for row in rows} == {name} and all(int(row["atoms"]) > 0 for row in rows)


def test_an_entry_too_large_for_the_archive_is_named(entries):
    (entries / "pdb/4abc.pdb").write_text("\n".join(chain("A") + chain("B", 700)))
    problems = data_download.build_archive(
        entries / "list.tsv", folder=entries / "pdb", say=lambda _: None
    )
    assert any("4abc.pdb: reaches farther than 327 Å" in problem for problem in problems)


# ---- Downloads -------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    """A stub of the servers: `files` is url -> content or error, `asked` lists the requests."""
    files = {}
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        content = files.get(url, urllib.error.HTTPError(url, 404, "Not Found", {}, None))
        if isinstance(content, Exception):
            raise content
        return io.BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return SimpleNamespace(files=files, asked=asked)


def test_entries_are_downloaded_once_and_kept(tmp_path, server):
    url = "https://files.rcsb.org/download/1ABC.pdb.gz"
    server.files[url] = gzip.compress("\n".join(chain("A")).encode())
    (tmp_path / "list.tsv").write_text(COLUMNS + "1ABC\t1abc\t\tval\tsmall\t9\n")
    for _ in range(2):
        args = ["structures", str(tmp_path / "list.tsv"), "--overwrite"]
        assert data_prepare.main(args) is None
        (structure,) = atoms.read_structures(tmp_path / "list.npz")
        assert structure.label == "1ABC" and len(structure.xyz) == 9
    assert server.asked == [url]
    assert [file.name for file in (tmp_path / "files").iterdir()] == ["1ABC.pdb.gz"]


def test_an_entry_without_a_pdb_file_is_downloaded_as_mmcif(tmp_path, server):
    server.files["https://files.rcsb.org/download/1ABC.cif.gz"] = b"mmCIF"
    path = data_download.fetch_entry("1ABC", tmp_path)
    assert path.name == "1ABC.cif.gz" and path.read_bytes() == b"mmCIF"
    assert len(server.asked) == 2


def test_only_a_missing_pdb_file_makes_it_ask_for_mmcif(tmp_path, server):
    url = "https://files.rcsb.org/download/1ABC.pdb.gz"
    server.files[url] = urllib.error.HTTPError(url, 503, "Busy", {}, None)
    with pytest.raises(OSError, match="503"):
        data_download.fetch_entry("1ABC", tmp_path)
    assert len(server.asked) == 1 and not list(tmp_path.iterdir())


def test_a_connection_that_breaks_off_leaves_no_file(tmp_path, server):
    server.files["https://a/b"] = http.client.IncompleteRead(b"half")
    with pytest.raises(OSError, match="the connection broke off"):
        data_download.download("https://a/b", tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_maps_are_downloaded_once_and_failures_named(tmp_path, server, capsys):
    folder = "https://ftp.ebi.ac.uk/pub/databases/emdb/structures"
    server.files[f"{folder}/EMD-6374/map/emd_6374.map.gz"] = b"a map"
    (tmp_path / "maps.tsv").write_text("file\temdb\na\tEMD-6374\nb\t\nc\tEMD-6374\n")
    for _ in range(2):
        data_prepare.main(["emdb", str(tmp_path / "maps.tsv"), "EMD-1", str(tmp_path / "maps")])
    assert (tmp_path / "maps/emd_6374.map.gz").read_bytes() == b"a map"
    names = [url.split("/")[-1] for url in server.asked]
    assert names == ["emd_6374.map.gz", "emd_1.map.gz", "emd_1.map.gz"]
    out = capsys.readouterr().out
    assert "EMD-1: https" in out and "404" in out and "1 of 2 maps are in" in out


def test_it_is_an_error_if_no_map_could_be_downloaded_or_an_id_is_wrong(tmp_path, server):
    with pytest.raises(OSError, match="no map was downloaded; EMD-1: .*404"):
        data_download.fetch_maps(["EMD-1"], tmp_path)
    with pytest.raises(ValueError, match="'6374' is no EMDB entry"):
        data_download.fetch_maps(["6374"], tmp_path)
