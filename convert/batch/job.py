"""One conversion of a batch, as its manifest asks for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from adapt_convert.convert.options import Options


@dataclass(frozen=True)
class Job:
    """One conversion: `source` on `base` with `options`, to the directory `output` below that of the batch."""

    base: str
    source: str
    output: str
    options: Options
    revision: str | None = None
    base_revision: str | None = None
    overwrite: bool = False
    validate: bool = False
    push: str | None = None

    @property
    def shares_its_base(self) -> bool:
        """Whether the base can be read once for this job and others: a LoRA, whose matrices are solved one by one.

        A budget is spent after a first pass over all matrices, so such a job reads the base for itself.
        """
        return self.options.to == "lora" and self.options.budget is None and self.options.calib is None

    def settings(self) -> dict[str, Any]:
        """What is asked for, but for the inputs; plain data."""
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.options).items()}
        return {"options": options, "validate": self.validate, "push": self.push}
