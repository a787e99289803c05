"""What a saved directory consists of: a manifest with the SHA-256 of every file in it, written last.

A directory without one was not finished, or was written by a version that had none; one whose files are others than
its manifest says is damaged. Nothing here knows what the files hold.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
PARTIAL = f"{MANIFEST}.partial"
ABSENT = f"has no {MANIFEST}"
"""What is said of a directory without one."""
THREADS = 4
"""Files read at a time; hashing lets go of the interpreter's lock."""


class NoManifestError(ValueError):
    """The directory has no manifest: it was not finished, or an older version wrote it."""


def digests(place: Path, share: int = 0, shares: int = 1) -> dict[str, str]:
    """SHA-256 by path of the files in a directory, brought to the disk if they were not on it yet.

    Args:
        place: the directory.
        share: which part of the files.
        shares: in how many parts hosts divide them.
    """
    files = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    mine = [name for name in files if name not in (MANIFEST, PARTIAL)][share::shares]
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(mine, pool.map(lambda name: _digest(place / name, sync=True), mine), strict=True))


def seal(place: Path, label: str, files: Mapping[str, str]) -> None:
    """Write the manifest, whole or not at all.

    Args:
        place: the directory.
        label: what it is, such as its step, so that another's directory in its place is noticed.
        files: the digests of all its files.
    """
    partial = place / PARTIAL
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"of": label, "files": dict(sorted(files.items()))}, file, indent=1)
        file.flush()
        _to_disk(file.fileno())
    partial.replace(place / MANIFEST)
    with contextlib.suppress(OSError):  # some file systems open no directory
        folder = os.open(place, os.O_RDONLY)
        _to_disk(folder)
        os.close(folder)


def fault(place: Path, label: str, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a sealed directory, the file named; None where it is sound.

    Args:
        place: the directory.
        label: what it should be.
        share: which part of its files is read.
        shares: in how many parts hosts divide them.

    Raises:
        NoManifestError: nobody can know.
    """
    try:
        table = json.loads((place / MANIFEST).read_bytes())
        of, files = table["of"], sorted(table["files"].items())
    except FileNotFoundError as error:
        raise NoManifestError(f"{place} {ABSENT}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    if of != label:
        return f"{MANIFEST} is that of {of!r}"
    if not files:
        return f"{MANIFEST} names no file"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda item: _wrong(place / item[0], item[1]), files[share::shares])
        return next(
            (f"{name} {wrong}" for (name, _), wrong in zip(files[share::shares], found, strict=True) if wrong), None
        )


def _wrong(path: Path, digest: str) -> str | None:
    try:
        return None if _digest(path) == digest else "has other bytes than were written"
    except FileNotFoundError:
        return "is missing"
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as file:
        if sync:
            _to_disk(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # not every file system can be asked to
        os.fsync(descriptor)
