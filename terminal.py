"""What commands show: progress, plans, tables. On a terminal, in a pipe, or as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from adapt_convert.formats.sizes import size_text

if TYPE_CHECKING:
    from rich.console import Console

    from adapt_convert.convert.conversion import Conversion
    from adapt_convert.convert.validation.result import Validation
    from adapt_convert.formats.lint import Finding

MATERIAL = 0.01  # share of an adapter's energy whose loss in a merge is worth a line
FAILED = 3  # exit code of a candidate that is not the fine-tune


def fail(message: str, code: int = 1) -> NoReturn:
    """One line on standard error, and out."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


@contextmanager
def once_written(directory: Path) -> Iterator[None]:
    """Around what follows the writing of a `directory`: an interrupt there takes nothing back, and the last line must not say so."""
    try:
        yield
    except KeyboardInterrupt:
        fail(f"interrupted; {directory} was written before and stays", 130)


def console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Iterable[Any], str], Iterable[Any]]]:
    """A progress bar on a terminal, nothing in a pipe."""
    from rich.progress import Progress

    terminal = console(stderr=True)
    with Progress(console=terminal, transient=True, disable=quiet or not terminal.is_terminal) as bar:

        def track(items: Iterable[Any], what: str) -> Iterable[Any]:
            total = len(items) if isinstance(items, Sized) else None
            return bar.track(items, total=total, description=what)

        yield track


def print_plan(plan: dict[str, Any], terminal: Console) -> None:
    actions = plan["actions"]
    terminal.print(
        f"{plan['tensors']} tensors: {actions.get('factor', 0)} to factor, {actions.get('store', 0)} stored exactly "
        f"if changed, {actions.get('drop', 0)} left out if changed; {_predicted(plan)}",
        highlight=False,
        soft_wrap=True,
    )
    for note in plan["notes"][:12]:
        terminal.print(f"  note: {note}", highlight=False, markup=False, soft_wrap=True)
    if len(plan["notes"]) > 12:
        terminal.print(f"  and {len(plan['notes']) - 12} more notes; --json has all of them", highlight=False)


def _predicted(plan: dict[str, Any]) -> str:
    size, peak = size_text(plan["predicted_bytes"]), plan["predicted_peak_memory"]
    size = f"at most {size}" if plan["predicted_at_most"] else f"about {size} if all of it changed"
    return f"{size}, peak memory of the conversion {'above that of one model in float32' if peak is None else f'about {size_text(peak)}'}"


def print_summary(conversion: Conversion, directory: Path) -> None:
    from rich.table import Table

    report, terminal = conversion.report, console()
    statuses = Counter(record.status for record in conversion.records)
    table = Table(show_header=False)
    if "loda" in report:  # no change of weights: a share of what is measured on activations
        table.add_row("captured energy", f"{report['captured_energy']:.4%} of the outputs of the adapted matrices")
    else:
        share = report["captured_energy"]
        table.add_row("captured energy", f"{share:.4%} of the factored matrices" if share is not None else "nothing to factor had changed")
        table.add_row("", f"{report['captured_energy_of_all_changes']:.4%} of everything that changed")
    if "captured_energy_without_magnitude" in report:
        table.add_row("", f"{report['captured_energy_without_magnitude']:.4%} in the DoRA's factors without its magnitudes")
    if report.get("calibration", {}).get("chosen") == "refined":
        table.add_row("", "refined to the outputs: the share of the weights' change says little of it")
    ratio = report["inputs"]["source"]["bytes"] / report["bytes"]
    table.add_row("size", f"{size_text(report['bytes'])}, of which stored exactly {size_text(report['bytes_exact'])}")
    table.add_row("ratio", f"{ratio:.1f} (source / adapter)")
    if "loda" in report:
        macs, of_lora = report["loda"]["macs_per_token"], report["loda"]["macs_per_token_of_lora"]
        table.add_row("MACs per token", f"{macs:,} in the adapted matrices; a LoRA of that rank: {of_lora:,}")
    table.add_row("tensors", ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())))
    if "calibration" in report:
        about = report["calibration"]
        tried = ", ".join(f"{name} {value:.4g}" for name, value in about["candidates"].items())
        table.add_row("held-out KL", f"{tried} (base {about['kl_of_base']:.4g})")
        table.add_row("", f"{about['chosen']} is written: {1 - about['kl'] / about['kl_of_base']:.1%} of the base's KL removed")
    if quantised := report.get("quantised_base"):
        table.add_row("base", f"{quantised['format']}; its rounding is about {quantised['noise']:.1%} of the change that was factored")
    table.add_row("time", f"{report['seconds']:.1f} s")
    table.add_row("peak memory", size_text(report["peak_memory"]))
    terminal.print(table)
    by_reason: dict[str, list[str]] = {}
    for record in conversion.records:
        if record.status == "dropped":
            by_reason.setdefault(record.reason, []).append(record.entry.name)
    for reason, names in by_reason.items():
        listed = names[0] if len(names) == 1 else f"{len(names)} tensors, {names[0]} ... {names[-1]}"
        terminal.print(f"lost: {listed}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if "vocabulary" in report:
        terminal.print(f"resize the base before loading: model.resize_token_embeddings({report['vocabulary']})", highlight=False)
    if profile := report.get("profile"):
        started = f"; start it with {profile['serve']}" if profile["serve"] else ""
        line = f"for {profile['consumer']}: rank {profile['rank']}, {profile['left_out_energy']:.4%} of the change left out{started}"
        terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    terminal.print(f"written to {directory}", highlight=False, markup=False, soft_wrap=True)


def report_lint(findings: list[Finding], adapter: str, profile: str, as_json: bool) -> None:
    """Every finding on standard error, and exit code 1 if there is one."""
    if as_json:
        rows = [{"effect": each.effect, "what": each.what, "remedy": each.remedy} for each in findings]
        emit({"adapter": adapter, "profile": profile, "findings": rows}, True)
    elif not findings:
        click.echo(f"{adapter}: nothing found against {profile}")
    for finding in findings:
        click.echo(f"FAIL {finding}", err=True)
    if findings:
        sys.exit(1)


def emit(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        click.echo(f"{key}: {value if not isinstance(value, list | dict) else json.dumps(value)}")


def print_merge(summary: dict[str, Any], as_json: bool) -> None:
    """What a merge wrote, and on standard error what half precision lost of it."""
    emit(summary, as_json)
    loss = summary["rounding_loss"]
    if loss > MATERIAL:
        click.echo(
            f"Note: rounding to {summary['rounded_to']} lost {loss:.1%} of what the adapter changes (energy); "
            "--dtype float32 keeps it, and so does running the adapter unmerged",
            err=True,
        )


def print_demo(result: dict[str, Any]) -> None:
    """Perplexity and size of the demo's models, and the commands that made the adapters."""
    from rich.table import Table

    table = Table("model", "perplexity", "captured energy", "bytes")
    for row in result["models"]:
        captured = "-" if row["captured_energy"] is None else f"{row['captured_energy']:.2%}"
        table.add_row(row["name"], f"{row['perplexity']:.3f}", captured, size_text(row["bytes"]))
    terminal = console()
    terminal.print(table)
    for row in result["models"]:
        terminal.print(f"{row['name']}: {row['path']}", highlight=False, soft_wrap=True)
    for command in result["commands"]:
        terminal.print(command, highlight=False, soft_wrap=True)


def print_forecast(data: dict[str, Any]) -> None:
    """What changed and the candidates as tables, what was left out, and the recommendation last."""
    from adapt_convert.formats.plan_table import plan_tables, rounding_line

    terminal = console()
    for table in plan_tables(data):
        terminal.print(table)
    if noise := rounding_line(data):
        terminal.print(noise, highlight=False, soft_wrap=True)
    for name, reason in data["left_out"].items():
        terminal.print(f"not predicted: {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    terminal.print(data["recommendation"]["sentence"], highlight=False, markup=False, soft_wrap=True)


def print_bundles(rows: list[dict[str, Any]]) -> None:
    """What bundles of several sizes would take, in all and for each adapter, and hold of each."""
    from rich.table import Table

    table = Table("options", "size", "for each", *rows[0]["tasks"], title="captured energy of each adapter, in one bundle of all")
    for row in rows:
        shares = ["-" if share is None else f"{share:.2%}" for share in row["tasks"].values()]
        table.add_row(row["options"], size_text(row["bytes"]), size_text(row["bytes"] // len(shares)), *shares)
    console().print(table)


def print_push(result: dict[str, Any]) -> None:
    """What was sent, or would be; the card of a dry run last."""
    for name, size in result["files"].items():
        click.echo(f"{name}  {size_text(size)}")
    for note in result["notes"]:
        click.echo(f"note: {note}")
    if "card" in result:
        click.echo(f"would be sent to {result['repo']}, with this card:\n\n{result['card']}", nl=False)
    else:
        click.echo(f"published: {result.get('pull_request') or result['url']}")


def report_validation(result: Validation, as_table: bool, cards: bool = False) -> None:
    """Print the result as tables and every failing line on standard error, then update the model `cards`; exit with 3 if a line failed."""
    from adapt_convert.formats.errors import AdaptError
    from adapt_convert.formats.validation_table import count, enlarged_line, labelled, untimed_line, validation_tables

    if as_table:
        data, terminal = result.to_json(), console()
        threads = count(data["settings"]["threads"], "thread")
        for table in validation_tables(data):
            terminal.print(table)
        terminal.print(
            f"{data['tokens']} tokens of {data['text']}; {data['dtype']} on {data['device']}, {threads}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        models = labelled(data)
        for line in filter(None, (enlarged_line(data), untimed_line([models["base"], *models["candidates"]]))):
            terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    if result.warning:
        click.echo(f"Warning: {result.warning}", err=True)
    for line in result.failures:
        click.echo(f"FAIL {line}", err=True)
    try:
        if cards:
            result.update_cards()
    except AdaptError as error:
        click.echo(f"Warning: {error}", err=True)
    if not result.passed:
        sys.exit(FAILED)


@contextmanager
def batch_table(quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A live table of a batch on a terminal: what runs, what failed, and how many are done. Nothing in a pipe."""
    from rich.live import Live
    from rich.table import Table

    terminal = console(stderr=True)
    if quiet or not terminal.is_terminal:
        yield lambda event: None
        return
    running: dict[str, str] = {}
    done, failures = Counter[str](), list[str]()

    def draw() -> Table:
        table = Table(title=", ".join(f"{count} {event}" for event, count in done.items()) or "planning")
        table.add_column("job")
        table.add_column("state")
        for name, state in [*list(running.items())[-12:], *((line, "failed") for line in failures[-6:])]:
            table.add_row(name, state)
        return table

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "shared":
            running[event["base"]] = f"{event['left']} tensors to read"
            if not event["left"]:
                del running[event["base"]]
        elif event["event"] == "converting":
            running[event["job"]] = "converting"
        elif "job" in event:
            running.pop(event["job"], None)
            done[event["event"]] += 1
            failures.extend([f"{event['job']}: {event['error']}"] if event["event"] == "failed" else [])
        live.update(draw(), refresh=True)

    with Live(draw(), console=terminal, transient=True, auto_refresh=False) as live:
        yield on_event


def print_batch(result: dict[str, Any], directory: Path) -> None:
    """One line for each job, and for a run the counts and where its page is."""
    from adapt_convert.formats.batch_html import read_lines

    for row in result["jobs"]:
        details = f"  {size_text(row['bytes'])}" if "bytes" in row else ""
        if "predicted_bytes" in row:
            details = f"  {_predicted(row)}"
        if row["status"] != "failed":  # those are listed on standard error
            click.echo(f"{row['output']}: {row['status']}{' (earlier)' if row.get('skipped') else ''}{details}")
    if "bases" in result:
        for line in read_lines(result):
            click.echo(line)
        click.echo(f"written to {directory}; see {directory / 'index.html'}")


def report_batch(result: dict[str, Any]) -> None:
    """Every failed job in one line on standard error, and the exit code of the batch."""
    failed = [row for row in result["jobs"] if row["status"] == "failed"]
    for row in failed:
        click.echo(f"FAIL {row['output']}: {row['error']}", err=True)
    if "error" in result:
        click.echo(f"FAIL {result['error']}", err=True)
    code = result.get("exit_code", 1 if failed else 0)
    if code:
        sys.exit(code)
