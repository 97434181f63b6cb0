"""The manifest of a batch, `jobs.yaml`: read, expanded to one job for each fine-tune, and checked whole before anything starts."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from adapt_convert.convert.options import CONSTRUCTIONS, DTYPES, HEADS, TARGETS, Options
from adapt_convert.formats.checkpoint import weight_files
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, is_hub_id

_SIZES = ("rank", "energy", "budget")
_COLLECTION = "collections/"
_WHOLE = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^\s*\d+\s*$"}]}
_NAMES = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_TEXT, _FLAG = {"type": "string", "minLength": 1}, {"type": "boolean"}
OPTION_SCHEMAS: dict[str, dict[str, Any]] = {
    "to": {"enum": list(TARGETS)},
    "rank": _WHOLE,
    "energy": {"anyOf": [{"type": "number"}, {"type": "string"}]},
    "budget": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
    "target_modules": _NAMES,
    "exclude": _NAMES,
    "dtype": {"enum": list(DTYPES)},
    "device": _TEXT,
    "seed": _WHOLE,
    "orientation": {"enum": ["paper", "reference"]},
    "strict": _FLAG,
    "segments": {"anyOf": [*_WHOLE["anyOf"], {"const": "auto"}]},
    "construction": {"enum": list(CONSTRUCTIONS)},
    "heads": {"enum": list(HEADS)},
}
_JOB_SCHEMAS: dict[str, dict[str, Any]] = {
    "base": _TEXT | {"description": "The model that the fine-tune was made from: a directory, a file or a Hub id."},
    "source": _TEXT
    | {"description": "A fine-tune or adapter; a pattern or a directory of several; or collections/ORG/SLUG for one of the Hub's."},
    "output": _TEXT | {"description": "Directory below -o; {name} stands for the source's name. As `delta` would name it by default."},
    "revision": _TEXT,
    "base_revision": _TEXT,
    "overwrite": _FLAG | {"description": "Replace an output that another run has left there."},
    "validate": _FLAG | {"description": "Rerun base, source and adapter afterwards."},
    "push": _TEXT | {"description": "Hub repository to publish to; {name} stands for the source's name."},
}
_FLAGS = ("overwrite", "validate", "strict")


def schema() -> dict[str, Any]:
    """The JSON Schema of a manifest, as published in docs/batch.schema.json."""
    properties = {**_JOB_SCHEMAS, **OPTION_SCHEMAS}
    defaults = {name: value for name, value in properties.items() if name != "source"}
    shape = {"type": "object", "additionalProperties": False}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Jobs of `adapt-convert batch`",
        **shape,
        "required": ["jobs"],
        "properties": {
            "defaults": {**shape, "properties": defaults},
            "jobs": {"type": "array", "minItems": 1, "items": {**shape, "properties": properties, "required": ["source"]}},
        },
    }


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
        return self.options.to == "lora" and self.options.budget is None

    def settings(self) -> dict[str, Any]:
        """What is asked for, but for the inputs; plain data."""
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.options).items()}
        return {"options": options, "validate": self.validate, "push": self.push}


def read_manifest(path: str | Path) -> list[Job]:
    """The jobs of a YAML or JSON file, in its order. Raises `AdaptError` with the first problem and the number of others."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            content = json.loads(text)  # which YAML's parser takes in part only: it refuses tabs, and 1e-3 is text to it
        except ValueError:
            content = yaml.safe_load(text)
    except OSError as error:
        raise AdaptError(f"{path}: cannot be opened: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AdaptError(f"{path}: is not text in UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise AdaptError(f"{path}: is not valid YAML: {error}") from None
    return parse_manifest(content, str(path))


def parse_manifest(content: object, origin: str = "manifest") -> list[Job]:
    """The jobs of a manifest that was read already. Raises `AdaptError`."""
    problems: list[str] = []
    jobs: list[Job] = []
    if not isinstance(content, dict) or not isinstance(content.get("jobs"), list) or not content["jobs"]:
        raise AdaptError(f"{origin}: expected `jobs:` with a list of jobs, and `defaults:` if need be")
    unknown = sorted(str(name) for name in content if name not in ("defaults", "jobs"))
    problems += [f"{name}: unknown; a manifest has defaults and jobs" for name in unknown]
    defaults = content.get("defaults", {})
    problems += [f"defaults: {problem}" for problem in _shape_problems(defaults, ("source",))]
    if problems:
        raise _refusal(origin, problems)
    for number, row in enumerate(content["jobs"]):
        found = [f"jobs[{number}]: {problem}" for problem in _shape_problems(row)]
        if not found:
            found = [f"jobs[{number}] ({row['source']}): {problem}" for problem in _expand(defaults, row, jobs)]
        problems += found
    problems += _clashes(jobs)
    if problems:
        raise _refusal(origin, problems)
    return jobs


def _refusal(origin: str, problems: list[str]) -> AdaptError:
    more = f" (and {len(problems) - 1} more such)" if len(problems) > 1 else ""
    return AdaptError(f"{origin}: {problems[0]}{more}")


def _shape_problems(row: object, forbidden: tuple[str, ...] = ()) -> Iterator[str]:
    """What is wrong with a job or the defaults by itself; the values of options are checked by `Options`."""
    if not isinstance(row, dict):
        yield f"expected names and values, found {row!r}"
        return
    for name, value in row.items():
        if name in forbidden or name not in {*_JOB_SCHEMAS, *OPTION_SCHEMAS}:
            yield f"{name}: no such option here; an option is named as on the command line, with _ for -"
        elif name in _FLAGS and not isinstance(value, bool):
            yield f"{name}: {value!r} is neither true nor false"
        elif (name in _JOB_SCHEMAS or name in ("to", "device", "dtype")) and name not in _FLAGS and not (isinstance(value, str) and value):
            yield f"{name}: {value!r} is no text"
        elif value is None:
            yield f"{name}: has no value"
    if not forbidden and "source" not in row:
        yield "source: is missing"


def _expand(defaults: Mapping[str, Any], row: Mapping[str, Any], jobs: list[Job]) -> Iterator[str]:
    """Append the jobs of one row; yields what is wrong with it."""
    # A job that says how large its adapter is means that instead of what the defaults say.
    inherited = {n: v for n, v in defaults.items() if n not in _SIZES or not any(size in row for size in _SIZES)}
    merged = inherited | dict(row)
    if "base" not in merged:
        yield "base: is missing, here and in the defaults"
        return
    try:
        options = Options(**{field.name: merged[field.name] for field in fields(Options) if field.name in merged})
        sources = _sources(merged["source"])
        if not is_hub_id(merged["base"]) and not Path(merged["base"]).expanduser().exists():
            raise AdaptError(f"base: {merged['base']}: no such file or directory")
    except (AdaptError, OSError) as error:
        yield str(error)
        return
    settings = {n: merged[n] for n in ("revision", "base_revision", "overwrite", "validate") if n in merged}
    for source in sources:
        name = _name(source)
        output = str(merged.get("output", f"{{name}}-{options.to}-{options.size_name}")).replace("{name}", name)
        push = merged["push"].replace("{name}", name) if "push" in merged else None
        jobs.append(Job(merged["base"], source, output, options, push=push, **settings))


def _sources(source: str) -> list[str]:
    """The one source named; the matches of a pattern; the models in a directory; the models of a Hub collection."""
    path = Path(source).expanduser()
    if _COLLECTION in source and not path.exists():
        return _collection(source)
    if path.is_dir() and not _is_model(path):
        found = sorted(str(child) for child in path.iterdir() if child.is_dir() and _is_model(child))
        return found or [source]  # one that is no model is refused for what it lacks, when its turn comes
    if path.exists() or is_hub_id(source):
        return [source]
    found = sorted(name for name in glob.glob(str(path)) if Path(name).is_dir() or _is_model(Path(name)))
    if not found:
        raise AdaptError(f"source: {source}: no such file or directory, and no pattern that matches any")
    return found


def _is_model(path: Path) -> bool:
    try:
        location = Location(str(path), path) if path.is_dir() else Location(str(path), path.parent, path)
        return bool(weight_files(location))
    except AdaptError:
        return False


def _collection(source: str) -> list[str]:
    from huggingface_hub import get_collection

    from adapt_convert.formats.hub import FAILURES, hub_message

    slug = source.partition(_COLLECTION)[2]
    try:
        found = [item.item_id for item in get_collection(slug).items if item.item_type == "model"]
    except FAILURES as error:
        raise AdaptError(f"source: {source}: the Hub refused it: {hub_message(error)}") from None
    if not found:
        raise AdaptError(f"source: {source}: a collection without models")
    return found


def _name(source: str) -> str:
    """What to call a source in a path: its last component, without a revision or the ending of a file."""
    path = Path(os.path.abspath(Path(source).expanduser()))
    return path.name if path.is_dir() else path.stem if path.is_file() else source.partition("@")[0].rpartition("/")[2]


def _clashes(jobs: list[Job]) -> Iterator[str]:
    """Outputs that are no directories below that of the batch, or that are, or hold, those of other jobs."""
    taken: dict[str, Job] = {}
    for job in jobs:
        parts = Path(job.output).parts
        if Path(job.output).is_absolute() or not parts or any(part.startswith(".") for part in parts):
            yield f"{job.output}: the output of {job.source} has to be a directory below that of the batch"
        elif job.output in taken:
            yield f"{job.output}: is the output of both {taken[job.output].source} and {job.source}; use {{name}} in it"
        taken[job.output] = job
    for job in jobs:
        for parent in Path(job.output).parents:
            if str(parent) in taken:
                yield f"{job.output}: lies in the output of {taken[str(parent)].source}"
