"""Files that appear whole or not at all, and never replace something by accident.

with atomic_write(path) as file:              one binary file, renamed to `path` at the end
    file.write(...)

with AtomicOutputs() as outputs:              several files that appear together
    with outputs.open(path) as file:          as often as needed; all are renamed at the end
        file.write(...)

with owned(paths):                            no other running program may write them meanwhile
with own_folder(path):                        the same for a folder, which it makes

write_json(path, value)                       NaN and infinity become null
refuse_existing(outputs, inputs, overwrite)   call it before the work, not after it
list_files(path, suffixes)                    the files of a folder, without hidden ones
entry_of(path)                                the name under which a file is held out from training
bare_name(path)                               the name of a file without its suffixes
stop_if_many_refused(path, what, ...)         a data set in which too much cannot be read
"""

import contextlib
import fcntl
import glob
import json
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


class AtomicOutputs:
    """Files that are written under temporary names and renamed together when the block ends.

    If anything fails before the renaming, no file appears and every old one is unchanged.
    A link is followed: what it points to is replaced, the link stays.
    A killed process can leave temporary files behind. They are hidden, and the next write to the
    same name removes them. Raises OSError, which names the file, if one cannot be written.
    """

    def __enter__(self) -> "AtomicOutputs":
        self.renames: dict[Path, Path] = {}  # temporary name -> name
        return self

    @contextlib.contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """A binary file for `path`. When the inner block ends, its content is on the disk."""
        path = Path(path).resolve()
        remove_leftovers(path)
        # Two runs that write the same name must not write into the same file.
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        self.renames[temporary] = path
        with named_errors(path), open(temporary, "xb") as file:
            with contextlib.suppress(OSError):  # a disk without locks
                lock(file)  # a sign that this file is not a leftover
            yield file
            # Wait until the disk has it, or a power cut after the renaming would lose it.
            file.flush()
            os.fsync(file.fileno())

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            # Every file is complete here, so only the renaming can still fail.
            if error_type is None:
                for temporary, path in self.renames.items():
                    with named_errors(path):
                        os.replace(temporary, path)
        finally:
            # Renamed files are gone from their temporary names.
            for temporary in self.renames:
                temporary.unlink(missing_ok=True)


def lock(file) -> bool:
    """Lock a file until it is closed; False if another running program has locked it.

    The lock of a killed process ends with it. Raises OSError where a disk knows no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files for `path` that killed processes left.

    They stay where a disk knows no locks, because there nobody can tell whether they are in use.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(leftover, "r+b") as file:
            if lock(file):
                leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(paths: Iterable[Path], say: Callable[[str], None] = print) -> Iterator[None]:
    """No other program that asks for one of these files gets it until the block ends.

    Each has a hidden file `.NAME.lock` beside it meanwhile. Raises as `hold` does.
    """
    with contextlib.ExitStack() as stack:
        for path in sorted({Path(path).resolve() for path in paths}):
            stack.enter_context(hold(path.with_name(f".{path.name}.lock"), path, say))
        yield


@contextlib.contextmanager
def own_folder(folder: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Make a folder and own it until the block ends, by the hidden file `.lock` in it.

    A folder that was made here and stays empty is removed. Raises as `hold` does.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold(folder / ".lock", folder, say):
            yield
    finally:
        if made and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def hold(path: Path, what: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Lock the file `path`, which says who owns `what`, until the block ends; then remove it.

    The kernel drops the lock when its process ends, also by kill -9. Raises BlockingIOError, which
    names the owner, if another running program holds it.
    """
    while True:
        with contextlib.ExitStack() as stack:
            # Not open(path, "w"), which would erase the owner's number.
            with named_errors(what):
                file = stack.enter_context(open(path, "a+"))
            try:
                free = lock(file)
            except OSError as error:  # some network file systems
                say(f"{what}: cannot be locked ({error.strerror}); start no second run that writes")
                free = True
            if not free:
                file.seek(0)
                owner = file.read().strip()
                raise BlockingIOError(
                    f"{what}: in use by another run ({owner}); wait for it or give another name"
                )

            # An owner that ended may have removed the file between our opening and locking it.
            if not is_file_at(path, file):
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def is_file_at(path: Path, file) -> bool:
    """Whether an open file is still the one that lies at a path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a failed write into one OSError that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        # The whole error of a disk would name the temporary file, too.
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"{path}: not written ({reason}); check free space and permissions. "
            "A file that was there before is unchanged"
        ) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that becomes `path` when the block ends without an error; see AtomicOutputs."""
    with AtomicOutputs() as outputs, outputs.open(path) as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    """Write dicts, lists, numbers and strings as JSON, atomically. NaN and infinity become null."""
    # Convert first, so that a value without a JSON form leaves the old file alone.
    text = json.dumps(without_nan(value), indent=1, allow_nan=False)
    with atomic_write(path) as file:
        file.write(f"{text}\n".encode())


def without_nan(value: Any) -> Any:
    """The same value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def refuse_existing(
    outputs: Iterable[Path], inputs: Iterable[Path] = (), overwrite: bool = False
) -> None:
    """Check the names of all files that a program will write, before it does any work.

    inputs: all files that it reads. Raises FileNotFoundError if a folder is missing,
    IsADirectoryError if a name is that of a folder, ValueError if two outputs share a name, and
    FileExistsError if a file is one of the inputs, or exists and overwrite is False.
    """
    # An input that does not exist is an error that its reader reports.
    existing_inputs = [path for path in inputs if path.exists()]
    seen = set()
    for path in outputs:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path.parent}: no such folder; make it first")
        if path.resolve() in seen:
            raise ValueError(f"{path}: two of the files to write have this name; give another")
        seen.add(path.resolve())
        if path.is_dir():
            raise IsADirectoryError(f"{path}: is a folder, where a file would be written; move it")
        if not path.exists():
            continue
        # samefile also finds an input behind a link.
        if any(path.samefile(source) for source in existing_inputs):
            raise FileExistsError(f"{path}: is the input and is never overwritten; give another -o")
        if not overwrite:
            raise FileExistsError(f"{path}: exists; give another name with -o, or --overwrite")


def stop_if_many_refused(path: str | Path, what: str, refused: list[str], count: int) -> None:
    """Raise ValueError if more than 1 % of the `count` files of a data set cannot be used.

    path: the data set; what: "maps", "models"; refused: a line for each file, with the reason.
    """
    if len(refused) > 0.01 * count:
        raise ValueError(
            f"{path}: {len(refused)} of {count} {what} cannot be used, more than 1 %; "
            f"repair or remove them, the first: {refused[0]}"
        )


def entry_of(path: Path) -> str:
    """The entry that a map file holds: its name in lower case without suffixes, emd_1234 or 3.2a.

    Entries are held out from training by this name, whether the file is a map as deposited
    (EMD-1234.map.gz) or prepared (emd_1234.npy).
    """
    return bare_name(path).lower().replace("emd-", "emd_")


def bare_name(path: Path) -> str:
    """The name of a file without its suffix and that of its packing: 3.2A of 3.2A.pdb.gz."""
    packed = path.suffix.lower() in (".gz", ".bz2")
    return Path(path.stem).stem if packed else path.stem


def list_files(path: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files of a folder that have one of the suffixes, sorted by name; or the one file given.

    suffixes are in lower case. Hidden files, such as macOS's `._map.mrc`, are skipped in folders.
    Raises FileNotFoundError if there is no such file or folder.
    """
    # A file that was named itself is taken as it is, even if it is hidden.
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    return [file for file in files if file.name.lower().endswith(suffixes)]
