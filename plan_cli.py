"""The command `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adapt_convert.options_cli import (
    BASE_REVISION,
    CALIB_TOKENS,
    DEVICE,
    DTYPE,
    EXCLUDE,
    JSON,
    OVERWRITE,
    REVISION,
    SEED,
    importing,
    path_option,
)
from adapt_convert.terminal import emit, print_forecast, progress


@click.command()
@click.argument("base")
@click.argument("ft")
@click.option("--capture", type=float, default=0.9, show_default=True, metavar="F", help="Share of the change that is to be kept.")
@click.option("--target-modules", multiple=True, metavar="NAME", help="What to factor, as in `delta`; all-linear if nothing is said.")
@EXCLUDE
@DTYPE
@click.option("--calib", metavar="FILE", help="Text or token ids (.jsonl) to weigh the change by, or self: text from the fine-tune.")
@CALIB_TOKENS
@DEVICE
@SEED
@click.option(
    "--fit-seconds", type=float, default=120.0, show_default=True, metavar="S", help="Begin no LoRTA fit later than this; 0 for none."
)
@path_option("--html", help="File for the plan as one self-contained page.")
@OVERWRITE
@REVISION
@BASE_REVISION
@click.option("--task", metavar="NAME", help="Of a shared LoRA the adapter to take, by name or number.")
@JSON
def plan(base: str, ft: str, html: Path | None, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Say what FT changed in BASE, what LoRAs, LoRTAs and LatTEs of it would hold and take, and which one to make.

    Everything is predicted from the weights, and the figures are those that `delta` with the same options would measure; no adapter
    is written. With --calib both models are run, and how the change reaches the outputs of the matrices is said beside it.

    \b
    Example:
      adapt-convert plan ./base ./ft --html plan.html
    """
    with importing():
        from adapt_convert.convert.planning.forecast import plan as forecast
    from adapt_convert.formats.atomic import check_new_file

    if html:
        check_new_file(html, overwrite)
    with progress(quiet=as_json) as track:
        result = forecast(base, ft, progress=track, **options)
    if html:
        result.save_html(html)
    emit(result.to_json(), True) if as_json else print_forecast(result.to_json())
