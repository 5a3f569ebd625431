"""Files and folders that appear at once: a reader sees the old one or the new one, never half of it.

Each is written beside its place under a name that begins with ``.tmp-``, synced to disk and renamed. Whatever dies on
the way, kill -9 and power cuts included, leaves what was there before, and at most a ``.tmp-`` file or folder.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from tinyllava_fast.errors import CheckpointError

TMP = ".tmp-"
"""The beginning of every name that is still being written to, or was when its writer died."""


@contextmanager
def atomic_file(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield an empty sibling file to write to; on success put it at ``path``, else remove it.

    durable: sync it to disk, so that a power cut does no harm either; False for what can be made again at any time.
    An OSError passes through, and names ``path`` where it would have named the sibling.
    """
    final = Path(path)
    temporary = _beside(final)
    try:
        temporary.open("xb").close()  # with the mode that the umask has
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(final)
        if durable:
            sync(final.parent)
    except OSError as error:
        if str(error.filename) == str(temporary):
            error.filename, error.filename2 = str(final), None
        raise
    finally:
        remove(temporary)


def write_file(path: str | Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file as ``atomic_file`` does."""
    with atomic_file(path, durable=durable) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_folder(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield an empty sibling folder to fill; on success put it at ``path``, else remove it.

    What was at ``path`` stays until the new folder is complete. durable: as for ``atomic_file``.
    Raises CheckpointError on a write error.
    """
    final = Path(path)
    temporary = _beside(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        readable = temporary.stat().st_mode & 0o666  # as the umask has it; safetensors makes its files private
        for inner in sorted(temporary.rglob("*")):
            if inner.is_file():
                inner.chmod(readable)
            if durable:
                sync(inner)
        if durable:
            sync(temporary)
        put_folder(temporary, final)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: cannot write the folder: {error}; what was there before is untouched. Free some space, "
            "mend the disk, or name another folder"
        ) from error
    finally:
        remove(temporary)


def put_folder(temporary: Path, final: Path) -> None:
    """Rename a complete folder and sync the folder that both are in. What was at ``final`` is then at ``temporary``.

    The two are swapped at once on Linux. Where the system cannot, a kill in between leaves the old one beside them.
    """
    if not final.exists():
        temporary.rename(final)
    elif not _exchange(temporary, final):
        aside = temporary.with_name(f"{temporary.name}-old")
        final.rename(aside)
        try:
            temporary.rename(final)
        except OSError:
            aside.rename(final)
            raise
        aside.rename(temporary)
    sync(final.parent)


def sync(path: Path) -> None:
    """Wait until a file is on disk, or the names in a folder, so that renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there and can be removed: what led here is the error to tell."""
    if os.path.isdir(path) and not os.path.islink(path):  # as Path has them, a name too long is an error
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _beside(final: Path) -> Path:
    """Return a name in the same folder that no other thread, process or machine uses."""
    return final.with_name(f"{TMP}{secrets.token_hex(4)}-{final.name}")


def _exchange(a: Path, b: Path) -> bool:
    """renameat2(RENAME_EXCHANGE); False where the system or file system lacks it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(cwd, os.fsencode(a), cwd, os.fsencode(b), exchange) == 0
