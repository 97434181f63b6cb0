"""What the `source` of a job stands for: one model, the matches of a pattern, those in a directory, or a Hub collection."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from adapt_convert.convert.opening import is_lora
from adapt_convert.convert.options import Options
from adapt_convert.formats.checkpoint import weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, is_hub_id, locate

_COLLECTION = re.compile(r"collections/([\w.-]+/[\w.-]+)", re.ASCII)


def find_sources(source: str, base: str, revision: str | None = None) -> list[str]:
    """The sources meant, of the Hub at `revision` if given; of several, the base is none. Raises `AdaptError` when there are none."""
    path = Path(source).expanduser()
    if path.is_dir() and not _is_model(path):
        children = sorted(str(child) for child in path.iterdir() if child.is_dir() and _is_model(child))
        return _without(base, children) or [source]  # one that is no model is refused for what it lacks, when its turn comes
    if path.exists():
        return [source]
    if collection := _COLLECTION.fullmatch(source):
        return _collection(source, collection[1])
    if is_hub_id(source, revision):
        return [source]
    found = sorted(name for name in glob.glob(str(path)) if Path(name).is_dir() or _is_model(Path(name)))
    if not _without(base, found):
        raise AdaptError(f"source: {source}: no such file or directory, and no pattern that matches any")
    return _without(base, found)


def source_name(source: str) -> str:
    """What to call a source in a path: its last component, without a revision or the ending of a file."""
    path = Path(os.path.abspath(Path(source).expanduser()))
    return path.name if path.is_dir() else path.stem if path.is_file() else source.partition("@")[0].rpartition("/")[2]


def default_output(source: str, options: Options) -> str:
    """The name of the output as `delta` gives it, with `{name}` for the source's.

    What the Hub holds is not known before it is fetched: a LoRA of it is named like a fine-tune.
    """
    try:
        kept = Path(source).expanduser().exists() and is_lora(locate(source))
    except AdaptError:  # what is damaged fails when its turn comes
        kept = False
    return options.output_name("{name}", kept)


def _without(base: str, sources: list[str]) -> list[str]:
    path = Path(base).expanduser()
    return [source for source in sources if not (path.exists() and path.samefile(source))]


def _is_model(path: Path) -> bool:
    try:
        location = Location(str(path), path) if path.is_dir() else Location(str(path), path.parent, path)
        return bool(weight_files(location))
    except AdaptError:
        return False


def _collection(source: str, slug: str) -> list[str]:
    from huggingface_hub import get_collection

    from adapt_convert.formats.hub import FAILURES, check_token, hub_message

    check_token(source)
    try:
        found = [item.item_id for item in get_collection(slug).items if item.item_type == "model"]
    except FAILURES as error:
        raise AdaptError(f"source: {source}: the Hub refused it: {hub_message(error)}") from None
    if not found:
        raise AdaptError(f"source: {source}: a collection without models")
    return found
