"""Output directories that exist whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import require_utf8

_PREFIX = ".adapt-convert-"  # of temporary directories; short, so that any legal name can be written


def check_destination(path: Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse a destination before any work: it exists, its parent cannot be written to, or it is one of the `inputs`."""
    require_utf8(str(path))
    try:
        _check_existing(path, overwrite)
    except OSError as error:  # a name that is too long, a directory that may not be searched
        raise AdaptError(f"{path}: cannot be written: {error.strerror}") from None
    for read in map(Path, inputs):
        if path.exists() and read.exists() and path.resolve() in (read.resolve(), *read.resolve().parents):
            raise AdaptError(f"{path} is read by this run and cannot be replaced by it; choose another with -o")
    _check_parent(path)


def check_file(path: Path) -> None:
    """Refuse a file that could not be written, before any work. One that is there may be replaced."""
    require_utf8(str(path))
    if path.is_dir():
        raise AdaptError(f"{path} is a directory; name a file in it")
    _check_parent(path)


def check_new_file(path: Path, overwrite: bool) -> None:
    """The same, and refuse one that is there already unless it is to be replaced."""
    check_file(path)
    if path.exists() and not overwrite:
        raise AdaptError(f"{path} already exists; choose another name, or replace it with --overwrite")


def _check_parent(path: Path) -> None:
    parent = _existing_ancestor(path)
    if broken := next((above for above in path.absolute().parents if above.is_symlink() and not above.exists()), None):
        raise AdaptError(f"{broken} is a link to nothing, so {path} cannot be written")
    if not parent.is_dir():
        raise AdaptError(f"{parent} is not a directory, so {path} cannot be written")
    try:  # asked of the file system: access() says yes to root even on a read-only mount
        os.rmdir(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise AdaptError(f"{parent} cannot be written to: {error.strerror}") from None


def _check_existing(path: Path, overwrite: bool) -> None:
    if (path.exists() or path.is_symlink()) and not overwrite:
        raise AdaptError(f"{path} already exists; choose another with -o, or replace it with --overwrite")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise AdaptError(f"{path} is not a directory; choose another with -o")
    if path.exists() and (path.resolve() == Path.cwd() or not _is_our_output(path)):
        raise AdaptError(f"{path} was not written by adapt-convert; it is not replaced, choose another with -o")


def _is_our_output(path: Path) -> bool:
    """`--overwrite` replaces a conversion, a merged model or an empty directory, never somebody's files."""
    return not any(path.iterdir()) or (path / "conversion.json").is_file()


def _existing_ancestor(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return parent


def write_text(path: Path, text: str) -> None:
    """A text file in UTF-8, all or nothing: written beside its place and renamed. One that is there is replaced."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise AdaptError(f"{path}: cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A directory beside `path` to write into; renamed to `path` when the block ends well, removed when it does not.

    An interrupt (Ctrl-C, SIGTERM) removes it too. With `overwrite` the old directory is replaced only at the very end.
    """
    check_destination(path, overwrite)
    created = _make_parents(path.absolute().parent)
    staging = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path.absolute().parent))
    try:
        with terminate_as_interrupt():
            yield staging
            staging.chmod(0o777 & ~_umask())
            _publish(staging, path, overwrite)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        for directory in reversed(created):
            with contextlib.suppress(OSError):
                directory.rmdir()
        if isinstance(error, OSError):
            raise AdaptError(f"{path}: cannot be written: {error.strerror or error}") from None
        raise


def _publish(staging: Path, path: Path, overwrite: bool) -> None:
    if not (overwrite and path.exists()):
        staging.rename(path)  # fails if somebody has put files there meanwhile
        return
    old = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path.absolute().parent))
    path.rename(old / path.name)
    try:
        staging.rename(path)
    except BaseException:
        (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents, outermost first; what was created is returned, so that a failure can take it back."""
    missing: list[Path] = []
    while not parent.exists():
        missing.insert(0, parent)
        parent = parent.parent
    for directory in missing:
        try:
            directory.mkdir()
        except OSError as error:
            raise AdaptError(f"{directory}: cannot be created: {error.strerror}") from None
    return missing


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that temporary files are removed, unless it is ignored; only the main thread may set handlers."""
    ignored = signal.getsignal(signal.SIGTERM) in (signal.SIG_IGN, None)  # None: a handler that is not Python's
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
