"""What commands share: how they fail, and the options that mean and say the same everywhere."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from adapt_convert.terminal import fail


class _NamedPath(click.Path):
    """A path; an empty one, which would be the working directory, is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            from adapt_convert.formats.errors import AdaptError

            raise AdaptError("-o: an empty path; name a directory")
        return super().convert(value, param, ctx)


OUT = click.option("-o", "--output", type=_NamedPath(path_type=Path), help="Directory to write; named after the input if left out.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an earlier output; it stays until the new one is whole.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
BASE_REVISION = click.option("--base-revision", metavar="REV", help="Branch, tag or commit of BASE when it is a Hub id.")
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit of the fine-tune or adapter when it is a Hub id.")
EXCLUDE = click.option("--exclude", multiple=True, metavar="NAME", help="Modules to leave as in the base; commas or repeats.")
DTYPE = click.option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; the source's own by default.")
CALIB_TOKENS = click.option("--calib-tokens", metavar="N", default="32768", show_default=True, help="Tokens taken from --calib.")
DEVICE = click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ...; a GPU if there is one by default.")
SEED = click.option("--seed", metavar="N", default="0", show_default=True, help="Seed of the randomised solvers.")

TARGETS_TEXT = "lora, lorta, latte, or loda, r-loda, s-loda, also with a + (docs/loda.md)."


@contextmanager
def importing() -> Iterator[None]:
    """Around imports that pull in torch. Looking for garbage among their objects, which all stay, would take an eighth of the time that
    they take, and a third of a second at the end of the process."""
    enabled, first = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
        if enabled:
            gc.enable()


class Commands(click.Group):
    """Turns every refusal of the library into one line and exit code 1; a wrong call exits with 2.

    Every option is read from `ADAPT_CONVERT_COMMAND_OPTION` as well. click's `auto_envvar_prefix` would name some of the
    variables after parameters of our functions (`as_json`) and not after the option as typed.
    """

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        for option in cmd.params:
            if isinstance(option, click.Option):
                typed = max(option.opts, key=len).removeprefix("--")
                option.envvar = f"adapt-convert-{name or cmd.name}-{typed}".upper().replace("-", "_")
        super().add_command(cmd, name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _refusals():  # --version and --help print here
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        from adapt_convert.formats.atomic import terminate_as_interrupt

        with _refusals(), terminate_as_interrupt():
            return super().invoke(ctx)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turns what is raised in the block into one line and an exit code."""
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; nothing was written", 130)
    except MemoryError:
        fail("out of memory; close other programs, or convert on a machine with more")
    except Exception as error:
        from adapt_convert.formats.errors import AdaptError

        if isinstance(error, BrokenPipeError):  # the reader of our output has left
            raise SystemExit(1) from None
        if isinstance(error, AdaptError):
            fail(str(error))
        if isinstance(error, RuntimeError) and "out of memory" in str(error):
            fail("out of memory; try --device cpu")
        if isinstance(error, OSError):
            fail(str(AdaptError(f"{error.filename or 'input or output'}: {error.strerror or error}")))
        raise


# Of what runs the models on text.
_CALIBRATION = [
    click.option("--target-kl", metavar="F", help="With --calib: the smallest rank whose KL on held-out text is at most this."),
    click.option("--calib", metavar="FILE", help="Text or token ids (.jsonl) to weigh errors by, or self: text from the fine-tune."),
    CALIB_TOKENS,
    click.option("--refine", metavar="N", help="With --calib: N steps of distilling the fine-tune's outputs into the adapter."),
]


def conversion_options(command: Callable[..., Any], to: str = "lora", targets: str = TARGETS_TEXT) -> Callable[..., Any]:
    """The options that decide what a conversion does, shared by `delta`, `inspect` and `bundle`; `to` is the usual target of `targets`."""
    options = [
        click.option("--to", metavar="TARGET", default=to, show_default=True, help=targets),
        click.option(
            "--for",
            "profile",
            metavar="CONSUMER",
            help="LoRA only: write what peft, vllm, sglang, llama.cpp, tensorrt-llm, diffusers or kohya (also ComfyUI) accepts, "
            "and say what that leaves out.",
        ),
        click.option("--rank", metavar="N", help="Rank of every factor pair (16 if nothing is said; a LoRA keeps its own)."),
        click.option("--energy", metavar="F", help="Per matrix: the least rank that captures this share."),
        click.option(
            "--budget",
            metavar="SIZE",
            help="One budget for all factors, like 20MB or 0.1% of the base: a LoRA's is spent where it captures most, others get the "
            "largest rank that fits.",
        ),
        *_CALIBRATION,
        click.option(
            "--target-modules",
            multiple=True,
            metavar="NAME",
            help="What to factor: all-linear, attention, mlp or module names; commas or repeats.",
        ),
        EXCLUDE,
        DTYPE,
        click.option(
            "--orientation",
            default="paper",
            show_default=True,
            metavar="WHICH",
            help="LoRTA only: paper, or reference for the layout of github.com/ihounie/lorta.",
        ),
        click.option(
            "--segments",
            metavar="N",
            help="LatTE only: runs of layers with a basis each (1; post-norm encoders: one per layer), or auto.",
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
        click.option("--base-rank", metavar="K", help="R-LoDA only: rank of the weights that replace q, k and v (or --target-modules)."),
        click.option("--keep", metavar="F", help="S-LoDA only: share of the entries that stay of q, k and v (or --target-modules)."),
        click.option("--strict", is_flag=True, help="Refuse when anything but --exclude'd modules would be lost."),
        DEVICE,
        SEED,
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def path_option(*names: str, help: str, required: bool = False) -> Callable[[Any], Any]:
    return click.option(*names, type=_NamedPath(path_type=Path), help=help, required=required)
