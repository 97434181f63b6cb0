"""Copying finished directories to wherever fsspec reaches: s3://, gs://, hf:// and others."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from adapt_convert.formats.errors import AdaptError

_LAST = "conversion.json"  # an object store has no rename: where this is, everything is
_SECRET = re.compile(r"(?<=//)[^/]*@|[?#].*")  # a user and password, and a query, which may hold a token


def copy_to(directory: Path, names: list[str], url: str, below: str = "") -> None:
    """Copy those files of a directory to `below` the URL, the report last. Raises `AdaptError`."""
    try:
        system, root = fsspec.core.url_to_fs(url)
        root = f"{root.rstrip('/')}/{below}".rstrip("/")
        system.makedirs(root, exist_ok=True)
        if _LAST in names and system.exists(f"{root}/{_LAST}"):
            system.rm_file(f"{root}/{_LAST}")  # until the new files are there, nothing is
        for name in sorted(names, key=lambda name: name == _LAST):
            system.put_file(str(directory / name), f"{root}/{name}")
    except Exception as error:  # each file system has errors of its own
        raise AdaptError(f"{shown(url)}: cannot be written: {_without_secrets(str(error), url)}") from None


def check_url(url: str, source: Path) -> None:
    """Refuse, before any work, what no installed file system of fsspec can reach, or what lies in the directory to be copied."""
    try:
        system, root = fsspec.core.url_to_fs(url)
    except Exception as error:  # each file system has errors of its own
        raise AdaptError(f"--copy-to {shown(url)}: {_without_secrets(str(error), url)}") from None
    if isinstance(system, LocalFileSystem) and source.resolve() in (target := Path(root).resolve(), *target.parents):
        raise AdaptError(f"--copy-to {shown(url)}: lies in {source}, which is to be copied there")


def shown(url: str) -> str:
    """The URL without the credentials that it may hold."""
    return _SECRET.sub("", url)


def _without_secrets(text: str, url: str) -> str:
    """What a file system says of a URL may repeat its credentials, whole or in parts, as written or decoded."""
    parts = {part for secret in _SECRET.findall(url) for part in (secret, *re.split(r"[:@?#&]|\w+=", secret))}
    for part in sorted({*parts, *map(unquote, parts)} - {""}, key=len, reverse=True):
        text = text.replace(part, "***")
    return text
