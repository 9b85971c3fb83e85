"""Tests of star.py: blocks and columns of star files, and the angles of particles in them."""

import numpy as np
import pytest
import torch

import degrade
import star

OPTICS = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnImagePixelSize #2
1 1.5

"""
PARTICLES = """
data_particles

loop_
_rlnMicrographName #1
_rlnAngleRot #2
_rlnAngleTilt #3
_rlnAnglePsi #4
_rlnCoordinateX #5
"""


def some_angles(count, seed=0):
    low, high = (-180, 0, -180), (180, 180, 180)
    return np.random.default_rng(seed).uniform(low, high, (count, 3))


def write(path, *parts):
    path.write_text("".join(parts))
    return path


def rows(angles, name="mic{}.mrc"):
    lines = [
        f"{name.format(i)} {rot} {tilt} {psi} 12.5\n" for i, (rot, tilt, psi) in enumerate(angles)
    ]
    return "".join(lines)


# ---- Blocks, loops and values


def test_blocks_columns_and_single_values_are_read_as_text(tmp_path):
    general = "data_general\n\n_rlnTomoSubTomosAre2DStacks   1\n_rlnNote 'two words' # why\n"
    path = write(tmp_path / "a.star", general, OPTICS, PARTICLES, "a.mrc 1 2 3 4\nb.mrc 5 6 7 8\n")
    assert star.read_star(path) == {
        "": {},
        "general": {"rlnTomoSubTomosAre2DStacks": ["1"], "rlnNote": ["two words"]},
        "optics": {"rlnOpticsGroup": ["1"], "rlnImagePixelSize": ["1.5"]},
        "particles": {
            "rlnMicrographName": ["a.mrc", "b.mrc"],
            "rlnAngleRot": ["1", "5"],
            "rlnAngleTilt": ["2", "6"],
            "rlnAnglePsi": ["3", "7"],
            "rlnCoordinateX": ["4", "8"],
        },
    }


@pytest.mark.parametrize(
    "line, values",
    [
        ("a b  c\t1", ["a", "b", "c", "1"]),
        ('"grid 2 17 38 .mrc" 1 2', ["grid 2 17 38 .mrc", "1", "2"]),
        ("'a \"b\" c' \"it's\" ''", ['a "b" c', "it's", ""]),
        ("'don't' 1", ["don't", "1"]),  # a quote ends only before a blank
        ("don't 2", ["don't", "2"]),
        ("1@a#2.mrc 3 # comment", ["1@a#2.mrc", "3"]),
        ("# only a comment", []),
        ("", []),
    ],
)
def test_a_line_is_split_at_blanks_outside_of_quotes_and_before_a_comment(line, values):
    assert star.split_line(line) == values


def test_a_value_may_look_like_the_name_of_a_block(tmp_path):
    path = write(tmp_path / "a.star", PARTICLES, "data_1.mrc 1 2 3 4\n_a.mrc 5 6 7 8\n")
    columns = star.read_star(path)["particles"]
    assert columns["rlnMicrographName"] == ["data_1.mrc", "_a.mrc"]


@pytest.mark.parametrize("row", ["a.mrc 1 2 3\n", "a b.mrc 1 2 3 4\n"])
def test_a_row_of_the_wrong_length_is_refused_with_its_line_number(tmp_path, row):
    path = write(tmp_path / "a.star", PARTICLES, "a.mrc 1 2 3 4\n", row)
    for read in (star.read_star, star.read_angles):
        with pytest.raises(ValueError, match="a.star: .*line 11 has . values; expected 5"):
            read(path)


def test_text_that_is_no_star_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a.star: line 1 has 3 values; expected names"):
        star.read_star(write(tmp_path / "a.star", "not a star\n"))
    (tmp_path / "b.star").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="b.star: no text"):
        star.read_star(tmp_path / "b.star")
    with pytest.raises(OSError, match="none.star"):
        star.read_star(tmp_path / "none.star")


# ---- Angles


def test_angles_are_found_in_every_kind_of_file(tmp_path):
    angles = some_angles(6)
    plain = "".join(f"{rot} {tilt} {psi}\n" for rot, tilt, psi in angles)
    later = "\ndata_other\n\n_rlnX 5\n"
    quoted = '"grid 2 17 38 {} .mrc"'
    kinds = {
        "3.1": OPTICS + PARTICLES + rows(angles) + later,
        "quoted": OPTICS + PARTICLES + rows(angles, quoted),
        "3.0": PARTICLES.replace("particles", "") + rows(angles),
        "no block": PARTICLES.replace("data_particles", "") + rows(angles),
        "byte-order mark": "\ufeff" + OPTICS + PARTICLES + rows(angles),
        "plain": "# rot tilt psi\n\n" + plain,
    }
    for name, text in kinds.items():
        found = star.read_angles(write(tmp_path / name, text))
        assert found.dtype == torch.float64
        np.testing.assert_array_equal(found, angles, err_msg=name)


def test_columns_may_come_in_any_order(tmp_path):
    head = "data_\nloop_\n_rlnAnglePsi #1\n_rlnAngleTilt #2\n_rlnImageName #3\n_rlnAngleRot #4\n"
    path = write(tmp_path / "a.star", head, "3 2 1@a.mrcs 1\n")
    assert star.read_angles(path).tolist() == [[1, 2, 3]]


def test_the_beam_of_rot_and_tilt_has_these_polar_coordinates(tmp_path):
    angles = [(30.0 * i, 15.0 * i, 5.0 * i) for i in range(12)]
    lines = [f"{rot} {tilt} {psi}\n" for rot, tilt, psi in angles]
    rotations = degrade.euler_matrix(star.read_angles(write(tmp_path / "a.txt", *lines)))
    for (rot, tilt, _), rotation in zip(np.deg2rad(angles), rotations.numpy()):
        beam = (np.cos(rot) * np.sin(tilt), np.sin(rot) * np.sin(tilt), np.cos(tilt))
        np.testing.assert_allclose(rotation[:, 2], beam, atol=1e-12)
        assert np.linalg.det(rotation) == pytest.approx(1)
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)


def test_subtomogram_angles_are_composed_as_relion_5_does(tmp_path):
    """RELION: A = A_subtomogram A_particle, each the transpose of our R, so R = R_p R_s."""
    particle, subtomogram = some_angles(50), some_angles(50, seed=1)
    particle[0] = subtomogram[1] = 0
    particle[2, 1] = subtomogram[2, 1] = 0
    names = [*star.PARTICLE_ANGLES, *star.SUBTOMOGRAM_ANGLES]
    head = "data_particles\nloop_\n" + "".join(f"_{name}\n" for name in names)
    both = np.concatenate([particle, subtomogram], 1)
    lines = [" ".join(map(str, row)) + "\n" for row in both]
    path = write(tmp_path / "a.star", head, *lines)
    angles = star.read_angles(path, tilt_series=True)

    r_particle = degrade.euler_matrix(torch.from_numpy(particle))
    r_subtomogram = degrade.euler_matrix(torch.from_numpy(subtomogram))
    wanted = r_particle @ r_subtomogram
    torch.testing.assert_close(degrade.euler_matrix(angles), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("column", ["rlnTomoName", "rlnTomoSubtomogramRot", "rlnCoordinateZ"])
def test_subtomograms_without_a_tilt_range_are_refused(tmp_path, column):
    names = [*star.PARTICLE_ANGLES, *star.SUBTOMOGRAM_ANGLES]
    names += [column] if column not in names else []
    head = "data_particles\nloop_\n" + "".join(f"_{name}\n" for name in names)
    path = write(tmp_path / "a.star", head, "1 2 3 4 5 6 7\n"[: 2 * len(names)] + "\n")
    with pytest.raises(ValueError, match="a.star: subtomograms .*--tilt-range MIN MAX"):
        star.read_angles(path)
    assert star.read_angles(path, tilt_series=True).shape == (1, 3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "neither a RELION star file .*no column rlnAngleRot"),
        ("0 90 nan\n", "no numbers"),
        ("not a number\n", "neither a RELION star file with rlnAngleRot, .* nor lines of rot"),
        ("1 2 3\n1 2\n", "line 2 has 2 values; expected 3"),
        (OPTICS, "neither a RELION star file"),
        (PARTICLES.replace("AnglePsi", "AnglePhi") + "a 1 2 3 4\n", "no column rlnAnglePsi"),
        (PARTICLES + "a one 2 3 4\n", "'one'"),
    ],
)
def test_a_file_without_angles_is_refused_in_one_line_with_its_name(tmp_path, text, message):
    path = write(tmp_path / "a.txt", text)
    with pytest.raises(ValueError, match=message) as caught:
        star.read_angles(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
