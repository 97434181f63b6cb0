"""`adapt-convert validate`, and what `delta --validate` prints: parse, call `validate`, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from adapt_convert.convert.validation_result import Validation

FAILED = 3  # exit code of a candidate that is not the fine-tune


def _path_option(*names: str, help: str) -> Callable[[Any], Any]:
    return click.option(*names, type=click.Path(path_type=Path), help=help)


@click.command()
@click.argument("base")
@click.argument("ft")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE...")
@_path_option("--text", help='Text to run on: plain, or .jsonl with {"text"} lines; Python\'s language reference if nothing is said.')
@_path_option("--token-ids", help='Token ids to run on, .jsonl with {"input_ids": [...]} lines; needs no tokenizer.')
@click.option("--context", type=int, metavar="N", help="Tokens per row (256, or what the model or the text allows).")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Rows at a time.")
@click.option("--max-tokens", type=int, default=16384, show_default=True, metavar="N", help="Stop after so many tokens of the text.")
@click.option("--tasks", multiple=True, metavar="NAME", help="Tasks of a LatTE bundle to validate; commas or repeats.")
@click.option("--min-recovered", type=float, default=0.5, show_default=True, metavar="F", help="Least share of the base's KL removed.")
@click.option("--max-kl", type=float, metavar="F", help="Largest KL to the fine-tune, in nats per token.")
@click.option("--min-top1", type=float, metavar="F", help="Least share of equal most likely tokens.")
@click.option("--max-slowdown", type=float, metavar="F", help="Largest ratio of a candidate's times to the base's.")
@click.option("--no-speed", is_flag=True, help="Leave out the timing.")
@click.option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 to run in; the fine-tune's own by default.")
@click.option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ...; a GPU if there is one by default.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap and of masked positions.")
@_path_option("-o", "--output", help="Directory to write validation.json into.")
@_path_option("--html", help="File for the report as one self-contained page.")
@click.option("--no-card", is_flag=True, help="Leave the README.md of the candidates as it is.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
def validate(
    base: str,
    ft: str,
    candidates: tuple[str, ...],
    output: Path | None,
    html: Path | None,
    no_card: bool,
    no_speed: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Rerun BASE, its fine-tune FT and every CANDIDATE, and say whether a candidate is the fine-tune.

    A CANDIDATE is an adapter (PEFT, LoRTA, LatTE) or a merged checkpoint; all are directories or Hub ids. The exit code is the
    verdict of the worst: 0 if all pass, 3 if one fails. The figures go into the model card of candidates that this tool wrote.

    \b
    Example:
      adapt-convert validate ./base ./ft ./ft-lora-r16 --text heldout.txt --min-recovered 0.9 -o ./report --html report.html
    """
    from adapt_convert.cli import _progress
    from adapt_convert.convert.validation import validate as run
    from adapt_convert.convert.verdict import Thresholds

    limits = {name: options.pop(name) for name in ("min_recovered", "max_kl", "min_top1", "max_slowdown")}
    tasks = [name.strip() for value in options.pop("tasks") for name in value.split(",") if name.strip()]
    with _progress(quiet=as_json) as progress:
        result = run(base, ft, *candidates, tasks=tasks, thresholds=Thresholds(**limits), speed=not no_speed, progress=progress, **options)
    if output:
        result.save(output)
    if html:
        result.save_html(html)
    if not no_card:
        result.update_cards()
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=1))
    report_validation(result, as_table=not as_json)


def report_validation(result: Validation, as_table: bool) -> None:
    """Print the result as tables, every failing line on standard error, and exit with 3 if there is one."""
    from adapt_convert.cli import _console
    from adapt_convert.formats.validation_table import validation_tables

    if as_table:
        data, console = result.to_json(), _console()
        for table in validation_tables(data):
            console.print(table)
        console.print(
            f"{data['tokens']} tokens of {data['text']}; {data['dtype']} on {data['device']}, {data['settings']['threads']} threads",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    for line in result.failures:
        click.echo(f"FAIL {line}", err=True)
    if not result.passed:
        sys.exit(FAILED)


def validate_conversion(base: str, source: str, directory: Path, as_json: bool, revisions: tuple[str | None, str | None]) -> Validation:
    """Validate a conversion that was just written, on the built-in text; the report goes beside it and into its model card."""
    from adapt_convert.cli import _progress
    from adapt_convert.convert.validation import validate as run

    paths = [f"{path}@{revision}" if revision else path for path, revision in zip((base, source), revisions, strict=True)]
    with _progress(quiet=as_json) as progress:
        result = run(*paths, directory, progress=progress)
    result.save(directory)
    result.update_cards()
    return result
