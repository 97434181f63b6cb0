"""The one error that this package raises for anything a user can cause or mend."""

from __future__ import annotations


class AdaptError(Exception):
    """Names the file and tensor, what was found, what was expected and what to do - in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
