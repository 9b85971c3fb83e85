"""Tests of files.py: files appear whole or not at all, and nothing is replaced by accident."""

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import files


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def full_disk(*_):
    raise OSError("no space left on device")


def test_a_written_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "out.bin"
    with files.atomic_write(path) as file:
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert names(tmp_path) == ["out.bin"]


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("failed write")])
def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with (
        pytest.raises(OSError, match=r"out.bin: not written \(.*unchanged") as caught,
        files.atomic_write(path) as file,
    ):
        file.write(b"half of the new con")
        raise error
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out.bin"]


def test_a_program_error_leaves_the_old_file_and_keeps_its_type(tmp_path):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), files.atomic_write(path) as file:
        file.write(b"new")
        raise KeyError("a bug")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out.bin"]


def test_a_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full_disk)
    with (
        pytest.raises(OSError, match="out.bin: not written .no space"),
        files.atomic_write(path) as file,
    ):
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["out.bin"]


def test_the_next_write_removes_what_a_killed_process_left(tmp_path):
    path = tmp_path / "out[1].bin"
    killed = tmp_path / ".out[1].bin.99999999.tmp"
    other = tmp_path / ".other.bin.99999999.tmp"
    killed.write_bytes(b"half")
    other.write_bytes(b"half")
    with files.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == [other.name, path.name]


def test_several_outputs_appear_together(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    with files.AtomicOutputs() as outputs:
        with outputs.open(first) as file:
            file.write(b"1")
        assert names(tmp_path) != ["a"]
        with outputs.open(second) as file:
            file.write(b"2")
    assert first.read_bytes() == b"1"
    assert second.read_bytes() == b"2"
    assert names(tmp_path) == ["a", "b"]


def test_no_output_appears_when_a_later_one_fails(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="b: not written"), files.AtomicOutputs() as outputs:
        with outputs.open(tmp_path / "a") as file:
            file.write(b"new")
        with outputs.open(tmp_path / "b"):
            full_disk()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


# A process that owns the folder until it is killed.
OWNER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import files
with files.own_folder(Path(sys.argv[2])):
    print("owned", flush=True)
    time.sleep(300)
"""


def test_a_folder_has_one_owner_and_is_free_again_when_that_is_killed(tmp_path):
    folder = tmp_path / "run"
    root = Path(files.__file__).parent
    command = [sys.executable, "-c", OWNER, str(root), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline() == "owned\n"
        says = rf"run: in use by another run \(process {owner.pid} on "
        with pytest.raises(OSError, match=says), files.own_folder(folder):
            pass
        owner.kill()
    with files.own_folder(folder):
        (folder / "log.csv").write_text("step")
    assert names(folder) == ["log.csv"]


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("new", "old"):
        with pytest.raises(KeyError), files.own_folder(tmp_path / name):
            raise KeyError("a bug")
    assert names(tmp_path) == ["old"]


def test_json_is_written_with_null_for_nan_and_infinity(tmp_path):
    path = tmp_path / "out.json"
    numbers = {"a": [1, 2.5, math.nan], "b": {"c": (math.inf, -math.inf)}, "d": None, "e": "é"}
    files.write_json(path, numbers)
    text = path.read_text()
    assert text.endswith("}\n")
    expected = {"a": [1, 2.5, None], "b": {"c": [None, None]}, "d": None, "e": "é"}
    assert json.loads(text) == expected


def test_existing_outputs_are_refused_unless_overwriting_and_inputs_always(tmp_path):
    source, link, old = tmp_path / "in.mrc", tmp_path / "link.mrc", tmp_path / "old.mrc"
    source.write_bytes(b"in")
    old.write_bytes(b"old")
    link.symlink_to(source)
    missing = tmp_path / "missing.mrc"

    files.refuse_existing([tmp_path / "new.mrc"], [source, missing])
    files.refuse_existing([old], [source, missing], overwrite=True)
    with pytest.raises(FileExistsError, match="old.mrc: exists; .*--overwrite"):
        files.refuse_existing([old], [source])
    for path in (source, link):
        with pytest.raises(FileExistsError, match="is the input"):
            files.refuse_existing([path], [source], overwrite=True)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        files.refuse_existing([tmp_path / "nowhere" / "out.mrc"])


def test_a_folder_is_listed_by_suffix_in_any_case_without_hidden_files(tmp_path):
    for name in ("b.mrc", "a.MRC", "._b.mrc", ".hidden.mrc", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    listed = files.list_files(tmp_path, (".mrc",))
    assert [file.name for file in listed] == ["a.MRC", "b.mrc"]


@pytest.mark.parametrize(
    "name, entry",
    [
        ("EMD_1234.map.gz", "emd_1234"),  # as deposited
        ("emd_1234.npy", "emd_1234"),  # prepared
        ("maps/emd_1234.MRC", "emd_1234"),
        ("EMD-1234.map", "emd_1234"),
        ("3.2A.mrc", "3.2a"),  # 3.4A.mrc is another entry
        ("3.4A.mrc.bz2", "3.4a"),
    ],
)
def test_raw_and_prepared_files_of_an_entry_have_one_name(name, entry):
    assert files.entry_of(Path(name)) == entry


def test_one_file_is_listed_as_it_was_given(tmp_path):
    path = tmp_path / ".hidden.mrc"
    path.write_bytes(b"")
    assert files.list_files(path, (".mrc",)) == [path]
    assert files.list_files(str(path), (".pdb",)) == []
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        files.list_files(tmp_path / "none", (".mrc",))
    assert isinstance(files.list_files(str(path), (".mrc",))[0], Path)


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target.bin", tmp_path / "link.bin"
    link.symlink_to(target)
    with files.atomic_write(link) as file:
        file.write(b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert names(tmp_path / "disk") == ["target.bin"]


def test_two_writers_of_one_name_do_not_share_a_temporary_file(tmp_path):
    path = tmp_path / "out.bin"
    with files.atomic_write(path) as first:
        first.write(b"first")
        with files.atomic_write(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert names(tmp_path) == ["out.bin"]


def test_a_file_that_another_run_owns_is_refused_until_that_run_ends(tmp_path):
    path = tmp_path / "out.mrc"
    with files.owned([path]):
        says = rf"out.mrc: in use by another run \(process {os.getpid()} on "
        with pytest.raises(OSError, match=says), files.owned([path]):
            pass
        with files.owned([tmp_path / "other.mrc"]):
            pass
    (tmp_path / ".out.mrc.lock").write_bytes(b"")  # left by a killed process
    with files.owned([path]):
        pass
    assert names(tmp_path) == []


def test_on_a_disk_without_locks_the_work_goes_on_and_says_so(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    said = []
    path = tmp_path / "out.bin"
    leftover = tmp_path / ".out.bin.1-a.tmp"
    leftover.write_bytes(b"of a run that may go on")
    with files.owned([path], said.append), files.atomic_write(path) as file:
        file.write(b"content")
    with files.own_folder(tmp_path / "run", said.append):
        (tmp_path / "run" / "log.csv").write_text("step")
    assert [line.split(": cannot be locked (No locks")[0] for line in said] == [
        str(path), str(tmp_path / "run")
    ]  # fmt: skip
    assert path.read_bytes() == b"content"
    assert names(tmp_path) == [leftover.name, "out.bin", "run"]
    assert names(tmp_path / "run") == ["log.csv"]


def test_an_error_of_the_work_passes_through_owned_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError, match="^a bug$"), files.owned([tmp_path / "out.mrc"]):
        raise FileNotFoundError("a bug")
    assert names(tmp_path) == []


def test_names_of_folders_and_two_outputs_of_one_name_are_refused(tmp_path):
    (tmp_path / "out.json").mkdir()
    with pytest.raises(IsADirectoryError, match="out.json: is a folder"):
        files.refuse_existing([tmp_path / "out.json"], overwrite=True)
    same = tmp_path / "out.json" / ".." / "a.mrc"
    with pytest.raises(ValueError, match="two of the files"):
        files.refuse_existing([tmp_path / "a.mrc", same])


def test_a_failed_write_names_one_file(tmp_path):
    with (
        pytest.raises(OSError, match="out.bin: not written") as caught,
        files.atomic_write(tmp_path / "none" / "out.bin"),
    ):
        pass
    assert str(caught.value).count("out.bin") == 1
