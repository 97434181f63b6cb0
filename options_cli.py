"""Options that several commands share, defined once so that they mean and say the same everywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

OUT = click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write; named after the input if left out.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an earlier output; it stays until the new one is whole.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
BASE_REVISION = click.option("--base-revision", metavar="REV", help="Branch, tag or commit of BASE when it is a Hub id.")
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of the fine-tune or adapter when it is a Hub id.")


def conversion_options(command: Callable[..., Any], to: str = "lora") -> Callable[..., Any]:
    """The options that decide what a conversion does, shared by `delta`, `inspect` and `bundle`; `to` is the usual target."""
    options = [
        click.option("--to", metavar="TARGET", default=to, show_default=True, help="lora, lorta or latte."),
        click.option("--rank", metavar="N", help="Rank of every factor pair (16 if nothing is said)."),
        click.option("--energy", metavar="F", help="Per matrix: the least rank that captures this share."),
        click.option("--budget", metavar="SIZE", help="One budget for all factors, like 20MB, spent where it captures most."),
        click.option(
            "--target-modules",
            multiple=True,
            metavar="NAME",
            help="What to factor: all-linear, attention, mlp or module names; commas or repeats.",
        ),
        click.option("--exclude", multiple=True, metavar="NAME", help="Modules to leave as in the base; commas or repeats."),
        click.option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; the source's own by default."),
        click.option(
            "--orientation",
            default="paper",
            show_default=True,
            metavar="WHICH",
            help="LoRTA only: paper, or reference for the layout of github.com/ihounie/lorta.",
        ),
        click.option(
            "--segments", metavar="N", default="1", show_default=True, help="LatTE only: runs of layers with a basis each, or auto."
        ),
        click.option(
            "--construction",
            metavar="WHICH",
            default="residual",
            show_default=True,
            help="LatTE only: residual, or score (the paper's Theorem 2; no rotary embeddings).",
        ),
        click.option(
            "--heads", metavar="HOW", default="wider", show_default=True, help="LatTE's score construction: wider heads, or more of them."
        ),
        click.option("--strict", is_flag=True, help="Refuse when anything but --exclude'd modules would be lost."),
        click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ...; a GPU if there is one by default."),
        click.option("--seed", metavar="N", default="0", show_default=True, help="Seed of the randomised solvers."),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def path_option(*names: str, help: str, required: bool = False) -> Callable[[Any], Any]:
    return click.option(*names, type=click.Path(path_type=Path), help=help, required=required)
