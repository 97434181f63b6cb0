"""Turn a base model and a full fine-tune, or an adapter, into a LoRA, a LoRTA or a LatTE, after the fact and without training data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import adapt_convert.convert  # noqa: F401

# The public function and the folder share the name `convert`. Python binds a folder to its parent when it is first imported:
# that has just happened, without its contents, so from here on the name is free for the function.
globals().pop("convert", None)

if TYPE_CHECKING:
    from adapt_convert.convert.batch.batch import batch
    from adapt_convert.convert.bundle import bundle
    from adapt_convert.convert.conversion import Conversion, convert
    from adapt_convert.convert.demo import run_demo
    from adapt_convert.convert.inspection import inspect
    from adapt_convert.convert.merge import merge
    from adapt_convert.convert.planning.forecast import Forecast, plan
    from adapt_convert.convert.validation.result import Validation
    from adapt_convert.convert.validation.validate import validate
    from adapt_convert.formats.errors import AdaptError
    from adapt_convert.formats.hub import push
    from adapt_convert.formats.lint import lint
    from adapt_convert.kernels.attach import load, task_ids, unload

__all__ = [
    "AdaptError",
    "Conversion",
    "Forecast",
    "Validation",
    "batch",
    "bundle",
    "convert",
    "inspect",
    "lint",
    "load",
    "merge",
    "plan",
    "push",
    "run_demo",
    "task_ids",
    "unload",
    "validate",
]

_HOMES = {
    "AdaptError": "adapt_convert.formats.errors",
    "Conversion": "adapt_convert.convert.conversion",
    "Forecast": "adapt_convert.convert.planning.forecast",
    "Validation": "adapt_convert.convert.validation.result",
    "batch": "adapt_convert.convert.batch.batch",
    "bundle": "adapt_convert.convert.bundle",
    "convert": "adapt_convert.convert.conversion",
    "inspect": "adapt_convert.convert.inspection",
    "lint": "adapt_convert.formats.lint",
    "load": "adapt_convert.kernels.attach",
    "merge": "adapt_convert.convert.merge",
    "plan": "adapt_convert.convert.planning.forecast",
    "push": "adapt_convert.formats.hub",
    "run_demo": "adapt_convert.convert.demo",
    "task_ids": "adapt_convert.kernels.attach",
    "unload": "adapt_convert.kernels.attach",
    "validate": "adapt_convert.convert.validation.validate",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `adapt-convert --help` must not.
    from importlib import import_module

    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
