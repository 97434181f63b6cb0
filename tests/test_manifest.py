"""Manifests: what they expand to, what is refused, and that the published JSON Schema says the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hub_server import Hub
from test_hub import Session

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.convert.batch.job import Job
from adapt_convert.convert.batch.manifest import OPTION_SCHEMAS, parse_manifest, read_manifest, schema
from adapt_convert.convert.options import Options
from adapt_convert.formats.errors import AdaptError

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def here(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base").symlink_to(pairs("llama").base)
    for name in ("ft-a", "ft-b", "other"):
        (tmp_path / "fts").mkdir(exist_ok=True)
        (tmp_path / "fts" / name).symlink_to(pairs("llama").ft)
    (tmp_path / "fts" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jobs(*rows: dict[str, Any], **defaults: Any) -> list[Job]:
    return parse_manifest({"defaults": {"base": "base", **defaults}, "jobs": list(rows)})


def test_one_source_a_pattern_and_a_directory(here: Path) -> None:
    assert [(job.source, job.output) for job in jobs({"source": "fts/ft-a"})] == [("fts/ft-a", "ft-a-lora-r16")]
    assert [job.source for job in jobs({"source": "fts/ft-*"})] == ["fts/ft-a", "fts/ft-b"]
    assert [job.source for job in jobs({"source": "fts"})] == ["fts/ft-a", "fts/ft-b", "fts/other"]  # not the notes
    (job,) = jobs({"source": "org/ft@v1"})  # a Hub id
    assert job.output == "ft-lora-r16"


def test_outputs_are_named_as_delta_names_them(here: Path) -> None:
    adapt_convert.convert("base", "fts/ft-a", rank=2).save("style")
    assert [job.output for job in jobs({"source": "style"})] == ["style-lora"]  # which keeps its ranks
    assert [job.output for job in jobs({"source": "style", "profile": "vllm"})] == ["style-lora-vllm"]
    assert [job.output for job in jobs({"source": "style", "rank": 1}, to="lora")] == ["style-lora-r1"]
    assert [job.output for job in jobs({"source": "style", "to": "lorta"})] == ["style-lorta-r16"]
    (here / "style" / "adapter_config.json").write_text("{")  # fails alone, and later
    assert [job.output for job in jobs({"source": "style"})] == ["style-lora-r16"]


def test_local_collections_and_a_directory_with_its_base(here: Path) -> None:
    (here / "collections").symlink_to("fts")
    assert [job.source for job in jobs({"source": "./collections/ft-*"})] == ["collections/ft-a", "collections/ft-b"]
    assert [job.source for job in jobs({"source": "collections/ft-a"})] == ["collections/ft-a"]
    shutil.copytree(here / "base", here / "fts" / "base")
    assert [job.source for job in jobs({"source": "fts"}, base="fts/base")] == ["fts/ft-a", "fts/ft-b", "fts/other"]
    assert [job.source for job in jobs({"source": "fts/*a*"}, base="fts/base")] == ["fts/ft-a"]


UNREADABLE = {
    "broken.yaml": b"jobs: [\n",
    "bytes.yaml": b"\xff\xfe\x00",
    "date.yaml": b"jobs: [{source: 2026-99-99}]\n",
    "digits.json": b'{"jobs": [{"rank": ' + b"9" * 5000 + b"}]}",
    "digits.yaml": b"jobs: [{base: base, source: fts, rank: 0x" + b"f" * 5000 + b"}]\n",
    "deep.json": b"[" * 100000,
    "twice.yaml": b"jobs: [{source: fts, base: base, rank: 1, rank: 2}]\n",
    "twice.json": b'{"jobs": [{"source": "fts", "base": "base", "rank": 1, "rank": 2}]}',
    "aliases.yaml": b"jobs: [{base: base, source: fts, exclude: [&a [x], "
    + b", ".join(b"&%c [%s]" % (n, b", ".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 107))
    + b"]}]\n",
}


@pytest.mark.parametrize("name", [*UNREADABLE, "missing.yaml"])
def test_what_is_no_manifest_is_one_line(here: Path, name: str) -> None:
    if name in UNREADABLE:
        (here / name).write_bytes(UNREADABLE[name])
    with pytest.raises(AdaptError, match=name):
        read_manifest(name)


def test_options_by_their_names_and_defaults(here: Path) -> None:
    rows = [
        {"source": "fts/ft-a", "to": "latte", "segments": "auto", "energy": 0.5},
        {"source": "fts/ft-b", "budget": "20kB", "output": "deep/{name}", "push": "org/{name}", "exclude": ["lm_head"]},
    ]
    first, second = jobs(*rows, rank=8, seed=3, target_modules="q_proj,v_proj")
    assert first.options == Options(to="latte", segments="auto", energy=0.5, seed=3, target_modules=("q_proj", "v_proj"))
    assert second.options == Options(budget=20000, seed=3, target_modules=("q_proj", "v_proj"), exclude=("lm_head",))
    assert (second.output, second.push) == ("deep/ft-b", "org/ft-b")
    assert first.output == "ft-a-latte-e0.5"


def test_every_option_of_delta_has_its_place() -> None:
    """`--dry-run` and `--json` are the batch's own, and `--task` is for taking one adapter out of a bundle by hand."""
    named = {parameter.name for parameter in main.commands["delta"].params} - {"dry_run", "as_json", "task"}
    named = {{"rerun": "validate", "repo": "push"}.get(name, name) for name in named}
    assert named == set(schema()["properties"]["jobs"]["items"]["properties"])
    assert set(OPTION_SCHEMAS) == {field.name for field in fields(Options)}


def test_json_is_yaml(here: Path) -> None:
    content = {"defaults": {"base": "base"}, "jobs": [{"source": "fts/ft-a", "energy": 0.25}]}
    (here / "jobs.json").write_text(json.dumps(content, indent="\t"))
    (here / "jobs.yaml").write_text(yaml.safe_dump(content))
    assert read_manifest("jobs.json") == read_manifest("jobs.yaml") == parse_manifest(content)


def test_the_published_schema_is_current() -> None:
    assert json.loads((DOCS / "batch.schema.json").read_text()) == schema(), "run: python docs/make_batch_schema.py"


GOOD = [
    {"jobs": [{"base": "base", "source": "fts"}]},
    {"defaults": {"base": "base", "rank": "8", "strict": True}, "jobs": [{"source": "fts/ft-a", "exclude": "lm_head"}]},
    {"defaults": {"base": "base"}, "jobs": [{"source": "fts/ft-a", "budget": "1MB"}, {"source": "fts/ft-b", "budget": 10**6}]},
    {"defaults": {"base": "base"}, "jobs": [{"source": "fts/ft-a", "to": "lorta", "orientation": "reference", "dtype": "float16"}]},
    {"defaults": {"base": "base", "output": "x/{name}"}, "jobs": [{"source": "fts/ft-a", "target_modules": ["q_proj"], "seed": 1}]},
]
BAD_SHAPE = [
    ([], "expected `jobs:`"),
    ({"jobs": []}, "expected `jobs:`"),
    ({"jobs": {"source": "fts"}}, "expected `jobs:`"),
    ({"jobs": ["fts"]}, "jobs[0]: expected names and values"),
    ({"job": [], "jobs": [{"source": "fts"}]}, "job: unknown"),
    ({"jobs": [{"base": "base"}]}, "jobs[0]: source: is missing"),
    ({"defaults": {"source": "fts"}, "jobs": [{"source": "fts"}]}, "defaults: source: no such option here"),
    ({"defaults": {"rnak": 3}, "jobs": [{"source": "fts"}]}, "defaults: rnak: no such option here"),
    ({"jobs": [{"base": "base", "source": "fts", "target-modules": "x"}]}, "target-modules: no such option here"),
    ({"jobs": [{"base": "base", "source": "fts", "dry_run": True}]}, "dry_run: no such option here"),
    ({"jobs": [{"base": "base", "source": 3}]}, "source: 3 is no text"),
    ({"jobs": [{"base": "base", "source": ""}]}, "source: '' is no text"),
    ({"jobs": [{"base": "base", "source": "fts", "strict": "yes"}]}, "strict: 'yes' is neither true nor false"),
    ({"jobs": [{"base": "base", "source": "fts", "validate": 1}]}, "validate: 1 is neither"),
    ({"jobs": [{"base": "base", "source": "fts", "rank": None}]}, "rank: has no value"),
    ({"jobs": [{"base": "base", "source": "fts", "rank": "many"}]}, "(fts): --rank many: must be a whole number"),
    ({"jobs": [{"base": "base", "source": "fts", "rank": 1.5}]}, "--rank 1.5: must be a whole number"),
    ({"jobs": [{"base": "base", "source": "fts", "rank": True}]}, "--rank True"),
    ({"jobs": [{"base": "base", "source": "fts", "to": "dora"}]}, "--to dora: unknown target"),
    ({"jobs": [{"base": "base", "source": "fts", "dtype": "int8"}]}, "--dtype int8"),
    ({"jobs": [{"base": "base", "source": "fts", "exclude": [3]}]}, "--exclude [3]"),
    ({"jobs": [{"base": "base", "source": "fts", "orientation": "sideways"}]}, "--orientation sideways"),
]
RESERVED = ("batch.json", "batch.jsonl/x", "index.html/")
BAD_MEANING = [
    ({"jobs": [{"source": "fts"}]}, "base: is missing, here and in the defaults"),
    ({"jobs": [{"base": "base", "source": "fts", "rank": 0}]}, "--rank 0"),
    ({"jobs": [{"base": "base", "source": "fts", "rank": 2, "energy": 0.5}]}, "contradict each other"),
    ({"jobs": [{"base": "base", "source": "nowhere/*"}]}, "nowhere/*: no such file or directory, and no pattern"),
    ({"jobs": [{"base": "nowhere", "source": "fts"}]}, "base: nowhere: no such file"),
    ({"jobs": [{"base": "base", "source": "fts", "output": "one"}]}, "{name} in it stands for the source's name"),
    ({"jobs": [{"base": "base", "source": "fts/ft-a", "output": "../out"}]}, "below that of the batch"),
    *(
        ({"jobs": [{"base": "base", "source": f"fts/ft-{x}", "output": out} for x, out in (("a", "x/y"), ("b", spelt))]}, "output of both")
        for spelt in ("x/y/", "./x/y", "x//y", "x/./y")
    ),
    *(({"jobs": [{"base": "base", "source": "fts/ft-a", "output": name}]}, "the batch itself") for name in RESERVED),
    *(({"jobs": [{"base": "base", "source": "fts/ft-a", "output": name}]}, "can be printed") for name in ("a\0", "\udce9", "a\x1b[2J")),
    ({"jobs": [{"base": "base", "source": "fts/*", "push": "org/one"}]}, "both fts/ft-a and fts/ft-b would go there"),
    (
        {"jobs": [{"base": "base", "source": "fts/ft-a", "push": name, "output": name} for name in ("org/a", "Org/A")]},
        "Org/A: both fts/ft-a and fts/ft-a would go there",
    ),
    *(
        ({"jobs": [{"base": "base", "source": "fts/ft-a", "push": name}]}, "is no Hub id")
        for name in ("ft", "org/a--b", "org/a.git", f"org/{'a' * 100}", "org/ä")
    ),
    ({"jobs": [{"base": "base", "source": "fts/ft-a", "revision": "v9"}]}, "fts/ft-a: is a local path, which has no revision v9"),
    ({"jobs": [{"base": "base", "source": "org/ft", "base_revision": "v9"}]}, "base: is a local path, which has no revision"),
    ({"jobs": [{"base": "base", "source": "org/ft@v2", "revision": "v9"}]}, "org/ft@v2: names a revision itself"),
    ({"jobs": [{"base": "base", "source": "./collections/ft-*"}]}, "no such file or directory, and no pattern"),
    ({"jobs": [{"base": "base", "source": "a\0b"}]}, "no such file or directory"),
    ({"jobs": [{"base": "base\0", "source": "fts"}]}, "no such file or directory"),
    ({"jobs": [{"base": "base", "source": "fts/ft-a", "output": "/out"}]}, "below that of the batch"),
    ({"jobs": [{"base": "base", "source": "fts/ft-a", "output": ".adapt-convert/x"}]}, "below that of the batch"),
    (
        {"jobs": [{"base": "base", "source": f"fts/ft-{x}", "output": out} for x, out in (("a", "x"), ("b", "x/y"))]},
        "x/y: lies in the output of fts/ft-a",
    ),
]


@pytest.mark.parametrize("manifest", GOOD)
def test_schema_and_reader_accept(here: Path, manifest: Any) -> None:
    parse_manifest(manifest)
    jsonschema.validate(manifest, schema())


@pytest.mark.parametrize(("manifest", "message"), BAD_SHAPE)
def test_schema_and_reader_refuse(here: Path, manifest: Any, message: str) -> None:
    with pytest.raises(AdaptError) as refused:
        parse_manifest(manifest)
    assert message in str(refused.value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema())


@pytest.mark.parametrize(("manifest", "message"), BAD_MEANING)
def test_only_the_reader_can_refuse(here: Path, manifest: Any, message: str) -> None:
    with pytest.raises(AdaptError) as refused:
        parse_manifest(manifest)
    assert message in str(refused.value)
    jsonschema.validate(manifest, schema())


def test_the_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_problems_name_their_jobs_and_how_many_more_there_are(here: Path) -> None:
    rows = [
        {"source": "fts/ft-a"},
        {"source": "fts/ft-b", "rank": 0},
        {"source": "nowhere"},
        {"sorce": "fts/ft-a"},
        {"source": "no", "rank": 1},
    ]
    (here / "jobs.yaml").write_text(yaml.safe_dump({"defaults": {"base": "base"}, "jobs": rows[:3]}))
    first = r"^jobs\.yaml: jobs\[1\] \(fts/ft-b\): --rank 0: must be a .*; jobs\[2\] \(nowhere\): source: nowhere: no such file"
    with pytest.raises(AdaptError, match=first + r" or directory, and no pattern that matches any$"):
        read_manifest("jobs.yaml")
    (here / "jobs.yaml").write_text(yaml.safe_dump({"defaults": {"base": "base"}, "jobs": rows}))
    with pytest.raises(AdaptError, match=first + r".*; jobs\[3\]: sorce: .* \(and 2 more such\)$"):
        read_manifest("jobs.yaml")


def test_a_collection_of_the_hub(pairs: Any, tmp_path: Path) -> None:
    with Hub() as hub:
        pair = pairs("llama")
        for name, path in (("org/base", pair.base), ("org/ft-a", pair.ft), ("org/ft-b", pair.ft)):
            hub.add(name, {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()})
        hub.collections["org/fine-tunes-0123"] = ["org/ft-a", "org/ft-b"]
        manifest = {"defaults": {"base": "org/base", "rank": 2}, "jobs": [{"source": "collections/org/fine-tunes-0123"}]}
        (tmp_path / "jobs.yaml").write_text(yaml.safe_dump(manifest))
        session = Session(hub, tmp_path)
        done = session.run("batch", "jobs.yaml", "-o", "out")
        assert done.returncode == 0, done.stderr
        assert sorted(path.parent.name for path in (tmp_path / "out").glob("*/conversion.json")) == ["ft-a-lora-r2", "ft-b-lora-r2"]
        report = json.loads((tmp_path / "out" / "ft-a-lora-r2" / "conversion.json").read_text())
        assert report["inputs"]["source"]["revision"] == hub.repos["org/ft-a"].refs["main"]
        assert session.run("batch", "jobs.yaml", "-o", "out").stdout.count("(earlier)") == 2
        hub.add("org/ft-a", dict(hub.repos["org/ft-b"].files("main")) | {"new.txt": b""})  # another commit
        assert session.run("batch", "jobs.yaml", "-o", "out").stdout.count("(earlier)") == 1
        session.assert_no_token()
