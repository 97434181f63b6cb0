"""The command `validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from adapt_convert.options_cli import DEVICE, JSON, importing, path_option
from adapt_convert.terminal import progress, report_validation


@click.command()
@click.argument("base")
@click.argument("ft")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE...")
@path_option("--text", help='Text to run on: plain, or .jsonl with {"text"} lines; Python\'s language reference if nothing is said.')
@path_option("--token-ids", help='Token ids to run on, .jsonl with {"input_ids": [...]} lines; needs no tokenizer.')
@click.option("--context", type=int, metavar="N", help="Tokens per row (256, or what the model or the text allows).")
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Rows at a time.")
@click.option("--max-tokens", type=int, default=16384, show_default=True, metavar="N", help="Stop after so many tokens of the text.")
@click.option("--tasks", multiple=True, metavar="NAME", help="Tasks of a LatTE bundle to validate, by name or number; commas or repeats.")
@click.option("--min-recovered", type=float, default=0.5, show_default=True, metavar="F", help="Least share of the base's KL removed.")
@click.option("--max-kl", type=float, metavar="F", help="Largest KL to the fine-tune, in nats per token.")
@click.option("--min-top1", type=float, metavar="F", help="Least share of equal most likely tokens.")
@click.option("--max-slowdown", type=float, metavar="F", help="Largest ratio of a candidate's times to the base's.")
@click.option("--no-speed", is_flag=True, help="Leave out the timing.")
@click.option("--no-attribution", is_flag=True, help="Leave out the KL by matrix, which runs the base 4 times forth and back.")
@click.option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 to run in; the fine-tune's own by default.")
@DEVICE
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the bootstrap and of masked positions.")
@path_option("-o", "--output", help="Directory to write validation.json into.")
@path_option("--html", help="File for the report as one self-contained page.")
@click.option("--no-card", is_flag=True, help="Leave the README.md of the candidates as it is.")
@JSON
def validate(
    base: str,
    ft: str,
    candidates: tuple[str, ...],
    output: Path | None,
    html: Path | None,
    no_card: bool,
    no_speed: bool,
    no_attribution: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Rerun BASE, its fine-tune FT and every CANDIDATE, and say whether a candidate is the fine-tune.

    A CANDIDATE is an adapter (PEFT, LoRTA, LatTE, LoDA) or a merged checkpoint; all are directories or Hub ids. The exit code is the
    verdict of the worst: 0 if all pass, 3 if one fails. The figures go into the model card of candidates that this tool wrote.

    \b
    Example:
      adapt-convert validate ./base ./ft ./ft-lora-r16 --text heldout.txt --min-recovered 0.9 -o ./report --html report.html
    """
    with importing():
        from adapt_convert.convert.validation.result import FILE
        from adapt_convert.convert.validation.validate import validate as run
        from adapt_convert.convert.validation.verdict import Thresholds
    from adapt_convert.formats.atomic import check_file

    for path in ([output / FILE] if output else []) + ([html] if html else []):
        check_file(path)
    limits = {name: options.pop(name) for name in ("min_recovered", "max_kl", "min_top1", "max_slowdown")}
    tasks = [name.strip() for value in options.pop("tasks") for name in value.split(",") if name.strip()]
    with progress(quiet=as_json) as track:
        options |= {"speed": not no_speed, "attribution": not no_attribution}
        result = run(base, ft, *candidates, tasks=tasks, thresholds=Thresholds(**limits), progress=track, **options)
    if output:
        result.save(output)
    if html:
        result.save_html(html)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=1))
    report_validation(result, as_table=not as_json, cards=not no_card)
