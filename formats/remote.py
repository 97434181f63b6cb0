"""Copying finished directories to wherever fsspec reaches: s3://, gs://, hf:// and others."""

from __future__ import annotations

from pathlib import Path

import fsspec

from adapt_convert.formats.errors import AdaptError

_LAST = "conversion.json"  # an object store has no rename: where this is, everything is


def copy_to(directory: Path, names: list[str], url: str) -> None:
    """Copy those files of a directory below `url`, the report last. Raises `AdaptError`."""
    try:
        system, root = fsspec.core.url_to_fs(url)
        system.makedirs(root, exist_ok=True)
        for name in sorted(names, key=lambda name: name == _LAST):
            system.put_file(str(directory / name), f"{root}/{name}")
    except Exception as error:  # each file system has errors of its own
        raise AdaptError(f"{url}: cannot be written: {error}") from None


def check_url(url: str) -> None:
    """Refuse what no installed file system of fsspec can reach, before any work."""
    try:
        fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise AdaptError(f"--copy-to {url}: {error}") from None
