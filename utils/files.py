"""Files and directories that are either whole or not there: written aside, then renamed."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a text file in one step: a reader, or a kill, finds the old one or the new one."""
    with replace_file(path) as aside:
        aside.write_text(text)


@contextlib.contextmanager
def replace_file(target: Path) -> Iterator[Path]:
    """The same for any file: a path to write to, renamed to `target` at the end; on any error it is removed.

    OSError, which names the file, where it could not be written, such as on a full disk.
    """
    aside = target.with_name(f".{target.name}.writing")
    try:
        yield aside
        rename_whole(aside, target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(aside), aside):  # said otherwise, or of another file
            raise
        reason = os.strerror(error.errno)
        raise OSError(f"{target}: could not be written ({reason}): make room there, or give another name") from error
    finally:
        aside.unlink(missing_ok=True)


def append_whole(path: Path, content: bytes) -> None:
    """Add to the end of a file, or, with OSError, leave it as it was: on a full disk too no part of the content stays."""
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
        except OSError:
            file.truncate(end)
            raise


def rename_whole(aside: Path, target: Path) -> None:
    """Rename a file so that its new name, should the power fail, is there with its content or not at all."""
    _to_disk(aside)
    os.replace(aside, target)
    _to_disk(target.parent)


def check_writable(path: str | Path) -> None:
    """ValueError before anything is computed where a file or folder of this name could not be made."""
    _check_folder_takes_files(Path(path).absolute().parent, path)


def check_file(path: str | Path, flag: str, overwrite: bool) -> None:
    """The same for a file, which replaces one that is there if it may."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a directory: give {flag} the name of a file")
    if Path(path).exists() and not overwrite:
        raise ValueError(f"{path}: is there already: give another {flag}, or --overwrite")
    check_writable(path)


def check_folder(path: str | Path, flag: str) -> None:
    """The same for a folder that files will be put into, whether it is there or not."""
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(f"{path}: is a file: give {flag} the name of a directory")
    _check_folder_takes_files(Path(path).absolute(), path)


def _check_folder_takes_files(folder: Path, path: str | Path) -> None:
    """ValueError, about `path`, where no file can be made in a folder, or in what there is of those around it."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir():
        raise ValueError(f"{path}: {existing} is a file and no folder: give another name")
    try:  # rights alone do not tell: the disk may be one that is only read
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{path}: {existing} cannot be written to ({error.strerror}): give another name") from error


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep others out of a directory. ValueError where another process that is still running has locked it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: helpers that outlive it do not keep it
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"{directory}: another process is writing there: end it first, or give another directory"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


def aside_of(target: Path) -> Path:
    """An empty directory to write into what is to become `target`; what a killed process left of it is removed."""
    aside = target.parent / f".{target.name}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def put_in_place(aside: Path, target: Path) -> None:
    """Rename a directory to `target`, replacing what is there, once everything in it is on disk."""
    replaced = target.parent / f".{target.name}.replaced"
    for path in [*aside.rglob("*"), aside]:
        _to_disk(path)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(aside, target)
    _to_disk(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new directory to write into, renamed to `target` once everything in it is on disk; on any error it is removed."""
    aside = aside_of(target)
    try:
        yield aside
        put_in_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
