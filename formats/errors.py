"""The one error that this package raises for anything a user can cause or mend, and what it quotes of others."""

from __future__ import annotations

_LONGEST = 1000  # characters: file and tensor names come from files, and may be of any length


class AdaptError(Exception):
    """Names the file and tensor, what was found, what was expected and what to do - in one line of printable text."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        # A name in a damaged or hostile file can hold what drives a terminal, or what no encoding can write.
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))


def first_line(error: BaseException) -> str:
    """The first line of what an exception of another library says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
