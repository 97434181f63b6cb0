"""Where what takes long to compute waits for the next conversion: a folder that the user can see and delete."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from adapt_convert.formats.errors import AdaptError, first_line


def cache_path(what: str, made_from: dict[str, Any]) -> Path:
    """A path below `$XDG_CACHE_HOME/adapt-convert/WHAT` (`~/.cache` if that is not set), named by a hash of what it is made from.

    Its folder exists afterwards. Raises `AdaptError` when it cannot be made.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adapt-convert" / what
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdaptError(f"{root}: cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder that can be written to") from None
    return root / hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file of the cache, whole or as it was before: the block writes to the path that it is given.

    Raises `AdaptError` when it cannot be written, as on a full disk.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield fresh
        os.replace(fresh, path)
    except (OSError, SafetensorError, RuntimeError) as error:  # the last is what `torch.save` makes of a full disk
        what = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise AdaptError(f"{path}: cannot be written ({what}); free some space, or set XDG_CACHE_HOME to a larger disk") from None
    finally:
        fresh.unlink(missing_ok=True)  # of an interrupt, too
