"""atoms.read_structures: archives, PDB files and folders of them."""

import numpy as np
import pytest

import atoms


def test_archives_and_pdb_files_hold_the_same_structures(tmp_path):
    xyz = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9.25], [-1, 0, 1]])
    np.savez(tmp_path / "a.npz", label=["one", "two"], atom_start=[0, 3, 4], xyz=np.int16(100 * xyz),
             element=np.uint8([6, 7, 8, 16]), bfactor=np.uint8([1, 2, 3, 4]))
    one, two = atoms.read_structures(tmp_path / "a.npz")
    assert (one.label, two.label) == ("one", "two") and two.atomic_number.tolist() == [16]
    np.testing.assert_allclose(one.xyz, xyz[:3], atol=1e-6)
    lines = [f"ATOM  {i + 1:5d}  {e:<3} ALA A{i + 1:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00{i + 1:6.2f}          {e:>2}"
             for i, (e, (x, y, z)) in enumerate(zip("CNO", xyz))]
    (tmp_path / "one.pdb").write_text("\n".join(lines))
    (tmp_path / "notes.txt").write_text("not a model")
    read, = atoms.read_structures(tmp_path)               # a folder: of models, not of archives
    again, = atoms.read_structures(tmp_path / "one.pdb")
    for model in (read, again):
        assert model.label == "one"
        np.testing.assert_allclose(model.xyz, xyz[:3] - xyz[:3].mean(0), atol=1e-5)
        assert model.atomic_number.tolist() == one.atomic_number.tolist()
        assert model.b_factor.tolist() == one.b_factor.tolist()


def test_archives_that_are_none_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, label=["a"], xyz=np.zeros((1, 3)))
    with pytest.raises(ValueError, match="a.npz: no archive of structures, atom_start, bfactor, element missing"):
        atoms.read_structures(path)
    for content in (b"", b"junk", path.read_bytes()[:-20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.npz: not an .npz archive, or a truncated one"):
            atoms.read_structures(path)
    with pytest.raises(FileNotFoundError, match="none.npz: no such file"):
        atoms.read_structures(tmp_path / "none.npz")
