"""The command line: parse, call one public function, print. Nothing here imports torch before a command runs."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapt_convert.cli_validate import report_validation, validate, validate_conversion

if TYPE_CHECKING:
    from rich.console import Console

    from adapt_convert.convert.conversion import Conversion

OUT = click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory to write; it must not exist yet.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an earlier output; it stays until the new one is whole.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
REVISION = click.option("--revision", metavar="REV", help="Branch, tag or commit when SOURCE is a Hub id.")


class _Commands(click.Group):
    """Turns every refusal of the library into one line and exit code 1; a wrong call exits with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            _fail("interrupted; nothing was written", 130)
        except MemoryError:
            _fail("out of memory; close other programs, or convert on a machine with more")
        except Exception as error:
            from adapt_convert.formats.errors import AdaptError

            if isinstance(error, AdaptError):
                _fail(str(error))
            if isinstance(error, RuntimeError) and "out of memory" in str(error):
                _fail("out of memory; try --device cpu")
            if isinstance(error, OSError):
                _fail(str(AdaptError(f"{error.filename or 'input or output'}: {error.strerror or error}")))
            raise


def _fail(message: str, code: int = 1) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adapt-convert")
def main() -> None:
    """Turn fine-tunes into adapters after the fact: no training data, every tensor accounted for."""


def _conversion_options(command: Callable[..., Any], to: str = "lora") -> Callable[..., Any]:
    """The options that decide what a conversion does, shared by `delta`, `inspect` and `bundle`; `to` is the usual target."""
    options = [
        click.option("--to", metavar="TARGET", default=to, show_default=True, help="lora, lorta or latte."),
        click.option("--rank", type=int, metavar="N", help="Rank of every factor pair (16 if nothing is said)."),
        click.option("--energy", type=float, metavar="F", help="Per matrix: the least rank that captures this share."),
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
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of the randomised solvers."),
    ]
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@main.command()
@click.argument("base")
@click.argument("source")
@_conversion_options
@OUT
@OVERWRITE
@REVISION
@click.option("--base-revision", metavar="REV", help="Branch, tag or commit when BASE is a Hub id.")
@click.option("--dry-run", is_flag=True, help="Stop after the preflight, which reads headers only.")
@click.option("--validate", "rerun", is_flag=True, help="Then rerun base, source and adapter, and exit with 3 unless it is the same model.")
@JSON
def delta(
    base: str,
    source: str,
    output: Path | None,
    overwrite: bool,
    revision: str | None,
    base_revision: str | None,
    dry_run: bool,
    rerun: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a fine-tune of BASE, into an adapter.

    BASE is a checkpoint; SOURCE a checkpoint or a LoRA or LoRTA directory: which one is detected. Either is a directory, a
    file or a Hub id (org/name). Without -o the adapter goes to ./NAME-TARGET-rN and the command says so.

    \b
    Example:
      adapt-convert delta ./base ./ft --to lorta --rank 16
    """
    from adapt_convert.convert.conversion import convert
    from adapt_convert.convert.inspection import describe_plan
    from adapt_convert.convert.inspection import inspect as inspect_paths
    from adapt_convert.convert.options import Options
    from adapt_convert.formats.atomic import check_destination
    from adapt_convert.formats.location import locate

    chosen = _clean(options)
    parsed = Options(**chosen)
    directory = output or Path(f"{locate(source, revision).name}-{parsed.to}-{_size_name(parsed, options)}")
    if dry_run:
        plan = inspect_paths(base, source, revision=revision, base_revision=base_revision, **chosen)
        _emit(plan, True) if as_json else _print_plan(plan, _console())
        return
    check_destination(directory, overwrite, (base, source))

    def announce(*plan: Any) -> None:
        if not as_json:
            _print_plan(describe_plan(*plan), _console(stderr=True))

    with _progress(quiet=as_json) as progress:
        conversion = convert(base, source, revision=revision, base_revision=base_revision, progress=progress, on_plan=announce, **chosen)
        conversion.save(directory, overwrite)
    if not as_json:
        _print_summary(conversion, directory)
    result = validate_conversion(base, source, directory, as_json, (base_revision, revision)) if rerun else None
    if as_json:
        _emit({"output": str(directory), **conversion.report} | ({"validation": result.to_json()} if result else {}), True)
    if result:
        report_validation(result, as_table=not as_json)


@main.command()
@click.argument("path")
@click.argument("path2", required=False)
@_conversion_options
@REVISION
@JSON
def inspect(path: str, path2: str | None, revision: str | None, as_json: bool, **options: Any) -> None:
    """Say what PATH holds, or what converting PATH2 (a fine-tune of PATH) would do; reads headers only.

    \b
    Example:
      adapt-convert inspect ./base ./ft --to lorta
    """
    from adapt_convert.convert.inspection import inspect as inspect_paths

    result = inspect_paths(path, path2, revision=revision, **_clean(options))
    if path2 and not as_json:
        _print_plan(result, _console())
    else:
        _emit(result, as_json)


@main.command()
@click.argument("base")
@click.argument("adapter")
@OUT
@OVERWRITE
@REVISION
@JSON
def merge(base: str, adapter: str, output: Path | None, overwrite: bool, revision: str | None, as_json: bool) -> None:
    """Fold ADAPTER (LoRA or LoRTA) into BASE and write a checkpoint that runs without adapter code.

    \b
    Example:
      adapt-convert merge ./base ./ft-lora-r16 -o ./merged
    """
    from adapt_convert.convert.merge import merge as merge_adapter
    from adapt_convert.formats.atomic import check_destination
    from adapt_convert.formats.location import locate

    directory = output or Path(f"{locate(adapter, revision).name}-merged")
    check_destination(directory, overwrite, (base, adapter))
    with _progress(quiet=as_json) as progress:
        summary = merge_adapter(base, adapter, directory, revision=revision, overwrite=overwrite, progress=progress)
    _emit(summary, as_json)


@main.command()
@click.argument("base")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@functools.partial(_conversion_options, to="latte")
@OUT
@OVERWRITE
@JSON
def bundle(base: str, sources: tuple[str, ...], output: Path | None, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Put several fine-tunes or adapters of BASE into one LatTE whose tasks can be mixed in one batch, row by row.

    Task k is the k-th SOURCE, 0 the base itself: adapt_convert.task_ids(model, [1, 0, 2]). They share one basis of --rank dims,
    so adapters trained apart are exact only at the sum of their ranks.

    \b
    Example:
      adapt-convert bundle ./base ./adapter-a ./adapter-b --to latte --rank 32 -o ./bundle
    """
    from adapt_convert.convert.latte_bundle import bundle as make_bundle
    from adapt_convert.formats.atomic import check_destination

    directory = output or Path(f"bundle-of-{len(sources)}-latte")
    check_destination(directory, overwrite, (base, *sources))
    with _progress(quiet=as_json) as progress:
        conversion = make_bundle(base, sources, progress=progress, **_clean(options))
        conversion.save(directory, overwrite)
    if as_json:
        _emit({"output": str(directory), **conversion.report}, True)
    else:
        _print_summary(conversion, directory)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path), default=Path("demo"))
@JSON
def demo(directory: Path, as_json: bool) -> None:
    """Train a small model and a fine-tune of it in DIRECTORY, convert it, and measure what the adapters kept.

    Needs no network and a few minutes; a second run uses what the first one trained. Needs the extra `run`
    (transformers and peft).

    \b
    Example:
      adapt-convert demo ./demo
    """
    from adapt_convert.convert.demo import run_demo

    with _progress(quiet=as_json) as progress:
        result = run_demo(directory, progress)
    if as_json:
        _emit(result, True)
        return
    from rich.table import Table

    table = Table("model", "perplexity", "captured energy", "bytes")
    table.add_column("where", overflow="fold")
    for row in result["models"]:
        captured = "-" if row["captured_energy"] is None else f"{row['captured_energy']:.2%}"
        table.add_row(row["name"], f"{row['perplexity']:.3f}", captured, _bytes(row["bytes"]), row["path"])
    console = _console()
    console.print(table)
    for command in result["commands"]:
        console.print(command, highlight=False, soft_wrap=True)


def _clean(options: dict[str, Any]) -> dict[str, Any]:
    """Command-line values as `Options` takes them: lists split at commas, the budget in bytes."""
    from adapt_convert.convert.options import parse_size

    cleaned = dict(options)
    cleaned["segments"] = int(options["segments"]) if options["segments"].isdecimal() else options["segments"]
    for name in ("target_modules", "exclude"):
        cleaned[name] = tuple(part.strip() for value in options[name] for part in value.split(",") if part.strip())
    if options["budget"] is not None:
        cleaned["budget"] = parse_size(options["budget"])
    return cleaned


def _size_name(parsed: Any, options: dict[str, Any]) -> str:
    if parsed.rank is not None:
        return f"r{parsed.rank}"
    return f"e{parsed.energy:g}" if parsed.energy is not None else f"{options['budget'].replace(' ', '')}"


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Iterable[Any], str], Iterable[Any]]]:
    """A progress bar on a terminal, nothing in a pipe."""
    from rich.progress import Progress

    console = _console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:

        def track(items: Iterable[Any], what: str) -> Iterable[Any]:
            total = len(items) if isinstance(items, Sized) else None
            return bar.track(items, total=total, description=what)

        yield track


def _print_plan(plan: dict[str, Any], console: Console) -> None:
    actions = plan["actions"]
    console.print(
        f"{plan['tensors']} tensors: {actions.get('factor', 0)} to factor, {actions.get('store', 0)} stored exactly "
        f"if changed, {actions.get('drop', 0)} left out if changed; at most {_bytes(plan['predicted_bytes'])}, "
        f"peak memory about {_bytes(plan['predicted_peak_memory'])}",
        highlight=False,
        soft_wrap=True,
    )
    for note in plan["notes"][:12]:
        console.print(f"  note: {note}", highlight=False, markup=False, soft_wrap=True)
    if len(plan["notes"]) > 12:
        console.print(f"  and {len(plan['notes']) - 12} more notes; --json has all of them", highlight=False)


def _print_summary(conversion: Conversion, directory: Path) -> None:
    from collections import Counter

    from rich.table import Table

    report, console = conversion.report, _console()
    statuses = Counter(record.status for record in conversion.records)
    table = Table(show_header=False)
    table.add_row("captured energy", f"{report['captured_energy']:.4%} of the factored matrices")
    table.add_row("", f"{report['captured_energy_of_all_changes']:.4%} of everything that changed")
    ratio = report["inputs"]["source"]["bytes"] / report["bytes"]
    table.add_row("size", f"{_bytes(report['bytes'])}, of which stored exactly {_bytes(report['bytes_exact'])}")
    table.add_row("ratio", f"{ratio:.1f} (source / adapter)")
    table.add_row("tensors", ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())))
    table.add_row("time", f"{report['seconds']:.1f} s")
    table.add_row("peak memory", _bytes(report["peak_memory"]))
    console.print(table)
    by_reason: dict[str, list[str]] = {}
    for record in conversion.records:
        if record.status == "dropped" or record.entry.rows_lost:
            by_reason.setdefault(record.reason, []).append(record.entry.name)
    for reason, names in by_reason.items():
        listed = names[0] if len(names) == 1 else f"{len(names)} tensors, {names[0]} ... {names[-1]}"
        console.print(f"lost: {listed}: {reason}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to {directory}", highlight=False, markup=False, soft_wrap=True)


def _emit(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        click.echo(f"{key}: {value if not isinstance(value, list | dict) else json.dumps(value)}")


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


main.add_command(validate)
