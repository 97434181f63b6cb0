"""The command line: parse, call one public function, print. Nothing here imports torch before a command runs."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapt_convert.options_cli import BASE_REVISION, JSON, OUT, OVERWRITE, REVISION, Commands, conversion_options, importing, path_option
from adapt_convert.plan_cli import plan
from adapt_convert.terminal import (
    batch_table,
    console,
    emit,
    fail,
    once_written,
    print_batch,
    print_bundles,
    print_demo,
    print_merge,
    print_plan,
    print_push,
    print_summary,
    progress,
    report_batch,
    report_lint,
    report_validation,
)
from adapt_convert.validate_cli import validate

if TYPE_CHECKING:
    from adapt_convert.convert.conversion import Conversion
    from adapt_convert.convert.validation.result import Validation


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="adapt-convert")
def main() -> None:
    """Turn fine-tunes into adapters after the fact: no training data, every tensor accounted for."""


main.add_command(plan)
main.add_command(validate)


@main.command()
@click.argument("base")
@click.argument("source")
@conversion_options
@OUT
@OVERWRITE
@REVISION
@BASE_REVISION
@click.option("--task", metavar="NAME", help="Of a shared LoRA the adapter to take, by name or number, in the bundle's rank or --rank.")
@click.option("--dry-run", is_flag=True, help="Stop after the preflight, which reads headers only.")
@click.option("--push", "repo", metavar="REPO", help="Then publish it as this Hub repository (org/name).")
@click.option("--validate", "rerun", is_flag=True, help="Then rerun base, source and adapter, and exit with 3 unless it is the same model.")
@JSON
def delta(
    base: str,
    source: str,
    output: Path | None,
    overwrite: bool,
    revision: str | None,
    base_revision: str | None,
    task: str | None,
    dry_run: bool,
    repo: str | None,
    rerun: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a fine-tune of BASE, into an adapter.

    BASE is a checkpoint or a diffusers pipeline; SOURCE the same, or an adapter of any kind (PEFT, LoRTA, kohya, LyCORIS): which
    one is detected. Either is a directory, a file or a Hub id (org/name). Without -o the adapter goes to ./NAME-TARGET-rN and the
    command says so.

    \b
    Example:
      adapt-convert delta ./base ./ft --to lorta --rank 16
    """
    from adapt_convert.convert.inspection import inspect as inspect_paths
    from adapt_convert.convert.opening import default_name, open_pair
    from adapt_convert.convert.options import Options
    from adapt_convert.formats.atomic import check_destination
    from adapt_convert.formats.checkpoint import hashing
    from adapt_convert.formats.location import locate

    parsed = Options(**options)
    parsed.require_text()
    directory = output or Path(default_name(locate(source, revision), parsed, task))
    check_destination(directory, overwrite, (base, source))
    if rerun:
        from adapt_convert.formats.diffusion import refuse_diffusion

        parsed.require_peft_form()
        refuse_diffusion(locate(base, base_revision))
    if repo:
        from adapt_convert.formats.hub import check_login, check_repo

        (check_repo if dry_run else check_login)(repo)
    if dry_run:
        planned = inspect_paths(base, source, revision=revision, base_revision=base_revision, task=task, **options)
        emit(planned, True) if as_json else print_plan(planned, console())
        return
    started = time.monotonic()
    with importing():
        opened = open_pair(base, source, revision, base_revision, task)
        with hashing(opened[0].store, opened[1].store):  # while torch is imported
            from adapt_convert.convert.conversion import convert_opened
    with progress(quiet=as_json) as track:
        conversion = convert_opened(*opened, parsed, started, progress=track, on_plan=None if as_json else _announce)
        conversion.save(directory, overwrite)
    if not as_json:
        print_summary(conversion, directory)
    result = _validate_conversion(base, source, directory, as_json, (base_revision, revision)) if rerun else None
    _deliver(conversion, directory, result, repo, as_json)


@main.command()
@click.argument("path")
@click.argument("path2", required=False)
@conversion_options
@REVISION
@BASE_REVISION
@JSON
def inspect(path: str, path2: str | None, revision: str | None, as_json: bool, **options: Any) -> None:
    """Say what PATH holds, or what converting PATH2 (a fine-tune of PATH) would do; reads headers only.

    \b
    Example:
      adapt-convert inspect ./base ./ft --to lorta
    """
    from adapt_convert.convert.inspection import inspect as inspect_paths

    result = inspect_paths(path, path2, revision=revision, **options)
    if path2 and not as_json:
        print_plan(result, console())
    else:
        emit(result, as_json)


@main.command()
@click.argument("adapter")
@click.option(
    "--for",
    "profile",
    metavar="CONSUMER",
    required=True,
    help="peft, vllm, sglang, llama.cpp, tensorrt-llm, diffusers or kohya.",
)
@REVISION
@JSON
def lint(adapter: str, profile: str, revision: str | None, as_json: bool) -> None:
    """Say whether CONSUMER would load ADAPTER, and run it as PEFT does; reads headers only.

    What it would refuse, run at another scale or leave out is listed line by line, and the exit code is 1.

    \b
    Example:
      adapt-convert lint ./ft-lora-r16 --for vllm
    """
    from adapt_convert.formats.lint import lint as lint_adapter

    report_lint(lint_adapter(adapter, profile, revision), adapter, profile, as_json)


@main.command()
@click.argument("base")
@click.argument("adapter")
@click.option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 for all weights; the base's own by default.")
@OUT
@OVERWRITE
@REVISION
@BASE_REVISION
@JSON
def merge(
    base: str,
    adapter: str,
    dtype: str | None,
    output: Path | None,
    overwrite: bool,
    revision: str | None,
    base_revision: str | None,
    as_json: bool,
) -> None:
    """Fold ADAPTER (of PEFT, LoRTA or a LoRA file) into BASE and write a checkpoint that runs without adapter code.

    Half precision rounds a small change away in part; how much was lost is said, and --dtype float32 keeps it.

    \b
    Example:
      adapt-convert merge ./base ./ft-lora-r16 -o ./merged
    """
    with importing():
        from adapt_convert.convert.merge import merge as merge_adapter
    from adapt_convert.formats.atomic import check_destination
    from adapt_convert.formats.location import locate

    directory = output or Path(f"{locate(adapter, revision).name}-merged")
    check_destination(directory, overwrite, (base, adapter))
    with progress(quiet=as_json) as track:
        revisions = {"revision": revision, "base_revision": base_revision}
        summary = merge_adapter(base, adapter, directory, **revisions, dtype=dtype, overwrite=overwrite, progress=track)
    print_merge(summary, as_json)


@main.command()
@click.argument("base")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@functools.partial(conversion_options, to="latte", targets="latte or shared-lora.")
@OUT
@OVERWRITE
@click.option("--dry-run", is_flag=True, help="Say what bundles of ranks 4 to 128, or of the given --rank, would hold; write none.")
@JSON
def bundle(base: str, sources: tuple[str, ...], output: Path | None, overwrite: bool, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Put several fine-tunes or adapters of BASE into one LatTE or shared LoRA whose tasks can be mixed in one batch, row by row.

    Task k is the k-th SOURCE, 0 the base itself: adapt_convert.task_ids(model, [1, 0, 2]). They share one basis of --rank dims
    (a LatTE), or two subspaces of --rank dims for each matrix (a shared LoRA), so adapters trained apart are exact only at the sum
    of their ranks. `delta BASE BUNDLE --task NAME` makes an adapter of a shared LoRA's one again, of the bundle's rank unless --rank
    says less.

    \b
    Example:
      adapt-convert bundle ./base ./adapter-a ./adapter-b --to latte --rank 32 -o ./bundle
    """
    with importing():
        from adapt_convert.convert.bundle import bundle as make_bundle
        from adapt_convert.convert.bundle import foresee_bundles
    from adapt_convert.formats.atomic import check_destination

    directory = output or Path(f"bundle-of-{len(sources)}-{options['to']}")
    check_destination(directory, overwrite, (base, *sources))
    if dry_run:
        with progress(quiet=as_json) as track:
            rows = list(foresee_bundles(base, sources, progress=track, **options))
        emit({"candidates": rows}, True) if as_json else print_bundles(rows)
        return
    with progress(quiet=as_json) as track:
        conversion = make_bundle(base, sources, progress=track, **options)
        conversion.save(directory, overwrite)
    if as_json:
        emit({"output": str(directory), **conversion.report}, True)
    else:
        print_summary(conversion, directory)


@main.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="REV", help="Branch to push to, made if need be; main by default.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of changing the branch.")
@click.option("--dry-run", is_flag=True, help="Print what would be sent, and ask nobody.")
@click.option("--force", is_flag=True, help="Also without a report, or with a validation that failed.")
@JSON
def push(directory: Path, repo: str, as_json: bool, **options: Any) -> None:
    """Publish the adapter in DIRECTORY as the Hub repository REPO (org/name), in one commit.

    The token is the Hub's own: HF_TOKEN, or `hf auth login`.

    \b
    Example:
      adapt-convert push ./ft-lora-r16 my-org/ft-lora --dry-run
    """
    from adapt_convert.formats.hub import push as push_directory

    result = push_directory(directory, repo, **options)
    emit(result, True) if as_json else print_push(result)


@main.command()
@click.argument("manifest", type=click.Path(path_type=Path))
@path_option("-o", "--output", required=True, help="Directory for the outputs of all jobs, and for batch.json and index.html.")
@click.option("--jobs", type=int, metavar="N", help="Processes at a time, as far as memory allows; 1, or all CPUs of a Ray cluster.")
@click.option("--retry", type=int, default=0, show_default=True, metavar="N", help="Times that a failed job is tried again.")
@click.option("--memory", metavar="SIZE", help="Memory for all processes together, like 20GB; by default what is free.")
@click.option("--engine", metavar="WHICH", default="local", show_default=True, help="local, or ray for an existing Ray cluster.")
@click.option("--address", metavar="HOST:PORT", help="The Ray cluster; the one of this machine by default.")
@click.option("--copy-to", metavar="URL", help="Copy finished outputs there too: s3://, gs://, hf:// ..., through fsspec.")
@click.option("--dry-run", is_flag=True, help="Check the manifest and plan every job from headers; convert nothing.")
@JSON
def batch(manifest: Path, output: Path, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Run the conversions listed in MANIFEST, a YAML or JSON file of `defaults` and `jobs` (docs/batch.md).

    A base is read once for all LoRAs made from it. Run again after an interruption or with more jobs, and what is finished
    stays. The exit code is 1 if a job failed, 3 if one failed its validation.

    \b
    Example:
      adapt-convert batch jobs.yaml -o ./adapters --jobs 4
    """
    with importing():
        from adapt_convert.convert.batch.batch import batch as run_batch

    try:
        with batch_table(quiet=as_json or dry_run) as on_event:
            result = run_batch(manifest, output, dry_run=dry_run, on_event=on_event, **options)
    except KeyboardInterrupt:
        fail("interrupted; what is finished stays, and the same command goes on from there", 130)
    if as_json:
        emit(result, True)
    else:
        print_batch(result, output)
    report_batch(result)


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

    with progress(quiet=as_json) as track:
        result = run_demo(directory, track)
    if as_json:
        emit(result, True)
        return
    print_demo(result)


def _validate_conversion(base: str, source: str, directory: Path, as_json: bool, revisions: tuple[str | None, str | None]) -> Validation:
    """Validate a conversion that was just written, on the built-in text; the report goes beside it and into its model card."""
    paths = [f"{path}@{revision}" if revision else path for path, revision in zip((base, source), revisions, strict=True)]
    with once_written(directory):
        from adapt_convert.convert.validation.validate import validate as run

        with progress(quiet=as_json) as track:
            result = run(*paths, directory, progress=track)
        result.save(directory)
        result.update_cards()
    return result


def _announce(*plan: Any) -> None:
    """What a conversion is about to do."""
    from adapt_convert.convert.inspection import describe_plan

    print_plan(describe_plan(*plan), console(stderr=True))


def _deliver(conversion: Conversion, directory: Path, result: Validation | None, repo: str | None, as_json: bool) -> None:
    """Publish a written conversion if asked to, say what became of it, and exit with the verdict of its validation."""
    # One that failed its validation stays here; `push --force` is there for whoever wants it published all the same.
    pushed = _push(directory, repo) if repo and (result is None or result.passed) else None
    if as_json:
        extra = {"validation": result.to_json()} if result else {}
        emit({"output": str(directory), **conversion.report} | extra | ({"push": pushed} if pushed else {}), True)
    elif pushed:
        print_push(pushed)
    if result:
        report_validation(result, as_table=not as_json)


def _push(directory: Path, repo: str) -> dict[str, Any]:
    with once_written(directory):
        from adapt_convert.formats.hub import push as push_directory

        return push_directory(directory, repo)


def run() -> None:
    """The console script: `main`, and the end of the process at once. Taking apart what torch has set up would take a tenth of a second."""
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        code = end.code
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # one that was closed from the start is None
        try:
            stream.flush()
        except OSError:  # the reader of our output has left, or the disk is full
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    run()
