"""The finished pieces of a conversion that is not finished: what lets an interrupted one go on, and several share one read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """What was worked out for one tensor: `tensors` on the CPU, `figures` as plain data.

    `digests` are the BLAKE3 hashes of the tensors of `base` and `source` that it was made from, by name.
    """

    tensors: dict[str, Tensor]
    figures: dict[str, Any]
    digests: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Pieces:
    """Pieces as files of one directory, each whole or not there; `base_digests` is what is known of the base beforehand."""

    directory: Path
    base_digests: Mapping[str, str] = field(default_factory=dict)

    def load(self, what: str) -> Piece | None:
        """The piece of that name, or None when it was not finished (or the disk lost it)."""
        path = self._path(what)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["about"])
                return Piece({name: file.get_tensor(name) for name in file.keys()}, about["figures"], about["digests"])  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, what: str, piece: Piece) -> None:
        path = self._path(what)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        tensors = {name: tensor.contiguous() for name, tensor in piece.tensors.items()}
        save_file(tensors, fresh, {"about": json.dumps({"figures": piece.figures, "digests": piece.digests})})
        os.replace(fresh, path)

    def _path(self, what: str) -> Path:
        return self.directory / f"{hashlib.sha256(what.encode()).hexdigest()[:40]}.safetensors"
