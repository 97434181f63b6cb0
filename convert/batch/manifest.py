"""The manifest of a batch, `jobs.yaml`: read, expanded to one job for each fine-tune, and checked whole before anything starts."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from adapt_convert.convert.batch.checks import output_problems, push_problems
from adapt_convert.convert.batch.job import Job
from adapt_convert.convert.batch.sources import default_output, find_sources, source_name
from adapt_convert.convert.options import CONSTRUCTIONS, DTYPES, HEADS, TARGETS, Options
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import is_hub_id, refuse_revision
from adapt_convert.formats.profiles import PROFILES

_NAMED = 3  # problems that a refusal names one by one
_SIZES = ("rank", "energy", "budget", "target_kl")
_WHOLE = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^\s*\d+\s*$"}]}
_NAMES = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_TEXT, _FLAG = {"type": "string", "minLength": 1}, {"type": "boolean"}
OPTION_SCHEMAS: dict[str, dict[str, Any]] = {
    "to": {"enum": list(TARGETS)},
    "rank": _WHOLE,
    "energy": {"anyOf": [{"type": "number"}, {"type": "string"}]},
    "budget": {"anyOf": [{"type": "number"}, {"type": "string"}]},
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
    "base_rank": _WHOLE,
    "keep": {"anyOf": [{"type": "number"}, {"type": "string"}]},
    "calib": _TEXT,
    "calib_tokens": _WHOLE,
    "refine": _WHOLE,
    "target_kl": {"anyOf": [{"type": "number"}, {"type": "string"}]},
    "profile": {"enum": list(PROFILES), "description": "The consumer that a LoRA is for; --for on the command line."},
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


def read_manifest(path: str | Path) -> list[Job]:
    """The jobs of a YAML or JSON file, in its order. Raises `AdaptError` with the first problem and the number of others."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        try:
            # YAML's parser takes JSON in part only: it refuses tabs, and 1e-3 is text to it.
            content = json.loads(text, object_pairs_hook=_unique)
        except ValueError:
            content = yaml.load(text, _Loader)
    except OSError as error:
        raise AdaptError(f"{path}: cannot be opened: {error.strerror}") from None
    except UnicodeDecodeError:
        raise AdaptError(f"{path}: is not text in UTF-8") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # the last: a date or number that cannot be
        raise AdaptError(f"{path}: is not valid YAML: {error}") from None
    except AdaptError as error:
        raise AdaptError(f"{path}: {error}") from None
    return parse_manifest(content, str(path))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML's safe types, and no name twice in one mapping, of which the last would win unseen."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        _refuse_twice([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return node


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([name for name, _ in pairs])
    return dict(pairs)


def _refuse_twice(names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise AdaptError(f"{twice[0]}: is given twice in one place")


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
    problems += output_problems(jobs)
    problems += push_problems(jobs)
    if problems:
        raise _refusal(origin, problems)
    return jobs


def _refusal(origin: str, problems: list[str]) -> AdaptError:
    more = f" (and {len(problems) - _NAMED} more such)" if len(problems) > _NAMED else ""
    return AdaptError(f"{origin}: {'; '.join(problems[:_NAMED])}{more}")


def _shape_problems(row: object, forbidden: tuple[str, ...] = ()) -> Iterator[str]:
    """What is wrong with a job or the defaults by itself; the values of options are checked by `Options`."""
    if not isinstance(row, dict):
        yield f"expected names and values, found {reprlib.repr(row)}"
        return
    for name, value in row.items():
        if name in forbidden or name not in {*_JOB_SCHEMAS, *OPTION_SCHEMAS}:
            yield f"{name}: no such option here; an option is named as on the command line, with _ for -"
        elif name in _FLAGS and not isinstance(value, bool):
            yield f"{name}: {reprlib.repr(value)} is neither true nor false"
        elif (
            (name in _JOB_SCHEMAS or name in ("to", "device", "dtype", "profile"))
            and name not in _FLAGS
            and not (isinstance(value, str) and value)
        ):
            yield f"{name}: {reprlib.repr(value)} is no text"
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
        sources = find_sources(merged["source"], merged["base"], merged.get("revision"))
        for path, name in [(merged["base"], "base_revision"), *((source, "revision") for source in sources)]:
            refuse_revision(path, merged.get(name))
        if not is_hub_id(merged["base"], merged.get("base_revision")) and not Path(merged["base"]).expanduser().exists():
            raise AdaptError(f"base: {merged['base']}: no such file or directory")
    except (AdaptError, OSError, ValueError) as error:  # the last: a path with a null character
        yield str(error)
        return
    settings = {n: merged[n] for n in ("revision", "base_revision", "overwrite", "validate") if n in merged}
    for source in sources:
        name = source_name(source)
        output = str(merged.get("output") or default_output(source, options)).replace("{name}", name)
        output = PurePosixPath(output).as_posix()  # one spelling: x/ and ./x are x
        push = merged["push"].replace("{name}", name) if "push" in merged else None
        jobs.append(Job(merged["base"], source, output, options, push=push, **settings))
