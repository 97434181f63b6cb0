"""Batches: one reading of a base for its jobs, failures that stay alone, and runs that are killed and taken up again."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.convert.batch import run as batch_run
from adapt_convert.convert.batch import tasks as batch_tasks
from adapt_convert.convert.batch.inputs import Found, find, foresee
from adapt_convert.convert.batch.job import Job
from adapt_convert.convert.batch.manifest import parse_manifest
from adapt_convert.convert.batch.scheduler import LocalPool, Task
from adapt_convert.convert.batch.state import HIDDEN
from adapt_convert.convert.opening import open_base

RUN = [sys.executable, "-c", "from adapt_convert.cli import main; main()", "batch"]


def fine_tunes(base: Path, directory: Path, count: int) -> None:
    """Fine-tunes of a base, every tensor of which has changed."""
    tensors = load_file(base / "model.safetensors")
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        changed = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
        (directory / f"{base.name}-{number:02d}").mkdir(parents=True)
        save_file(changed, directory / f"{base.name}-{number:02d}" / "model.safetensors", {"format": "pt"})
        shutil.copy(base / "config.json", directory / f"{base.name}-{number:02d}")


@pytest.fixture(scope="session")
def many(pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases with 25 fine-tunes each, one of them damaged, and the manifest of 51 jobs."""
    root = tmp_path_factory.mktemp("many")
    for name in ("llama", "qwen2"):  # the second has biases
        shutil.copytree(pairs(name).base, root / name)
        fine_tunes(root / name, root / "fts" / name, 25)
    (weights := root / "fts" / "llama" / "llama-07" / "model.safetensors").write_bytes(weights.read_bytes()[:-100])
    jobs = [
        {"source": "fts/llama"},
        {"source": "fts/qwen2/*", "base": "qwen2", "exclude": ["embed_tokens", "lm_head"]},
        {"source": "fts/llama/llama-00", "to": "latte", "rank": 99, "output": "impossible"},
    ]
    (root / "jobs.yaml").write_text(yaml.safe_dump({"defaults": {"base": "llama", "rank": 3}, "jobs": jobs}))
    return root


def save_tokenizer(directory: Path) -> None:
    words = models.WordLevel({"[UNK]": 0} | {word: i for i, word in enumerate(["the", "of", "a", "is", "to", "in"], 1)}, "[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))


def run(root: Path, output: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*RUN, "jobs.yaml", "-o", output, *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def outputs(directory: Path) -> dict[str, bytes]:
    """Everything that the jobs of a batch have written, by path."""
    files = {str(path.relative_to(directory)): path for path in directory.glob("*/**/*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(HIDDEN)}


@pytest.fixture(scope="session")
def clean(many: Path) -> subprocess.CompletedProcess[str]:
    """The undisturbed run, with two processes."""
    return run(many, "clean", "--jobs", 2)


def test_failures_stay_alone_in_one_line_each(many: Path, clean: subprocess.CompletedProcess[str]) -> None:
    assert clean.returncode == 1
    lines = clean.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("FAIL llama-07-lora-r3: ")
    assert "model.safetensors" in lines[0]
    assert lines[1] == "FAIL impossible: --rank 99: the residual stream of llama is 32 wide; a basis of it has at most 32 dims"
    summary = json.loads((many / "clean" / "batch.json").read_text())
    assert summary["counts"] == {"converted": 49, "failed": 2}
    made = {path.parent.name for path in (many / "clean").glob("*/conversion.json")}
    assert made == {row["output"] for row in summary["jobs"] if row["status"] == "converted"}
    page = (many / "clean" / "index.html").read_text()
    assert all(f'href="{name}/conversion.json"' in page for name in made)
    assert [json.loads(line)["event"] for line in (many / "clean" / "batch.jsonl").read_text().splitlines()].count("failed") == 2


def test_each_tensor_of_a_base_is_read_once(many: Path, clean: subprocess.CompletedProcess[str]) -> None:
    rows = {row["base"]: row for row in json.loads((many / "clean" / "batch.json").read_text())["bases"]}
    for name, jobs in (("llama", 24), ("qwen2", 25)):
        assert rows[name]["tensors"] == rows[name]["shared_reads"] == len(load_file(many / name / "model.safetensors"))
        assert (rows[name]["sharing_jobs"], rows[name]["other_jobs"], rows[name]["other_reads"]) == (jobs, 0, 0)


def test_the_same_bytes_as_a_single_conversion(many: Path, clean: subprocess.CompletedProcess[str]) -> None:
    for base, source, options in (("llama", "llama-03", {}), ("qwen2", "qwen2-11", {"exclude": "embed_tokens,lm_head"})):
        alone = adapt_convert.convert(many / base, many / "fts" / base / source, rank=3, **options).save(many / f"alone-{source}")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            expected = (alone / name).read_bytes().replace(str(many / base).encode(), base.encode())
            assert (many / "clean" / f"{source}-lora-r3" / name).read_bytes() == expected
        report, expected = (json.loads((d / "conversion.json").read_text()) for d in (many / "clean" / f"{source}-lora-r3", alone))
        assert report["tensors"] == expected["tensors"]
        assert report["inputs"]["base"]["blake3"] == expected["inputs"]["base"]["blake3"]
        assert "seconds" not in report


def test_what_is_finished_is_left_alone(many: Path, clean: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    shutil.copytree(many / "clean", many / "again")
    before = {path: path.stat().st_mtime_ns for path in (many / "again").glob("*/conversion.json")}
    done = run(many, "again")
    assert done.stdout.count("converted (earlier)") == 49
    assert {path: path.stat().st_mtime_ns for path in (many / "again").glob("*/conversion.json")} == before
    os.utime(many / "fts" / "llama" / "llama-00" / "model.safetensors")  # another time, the same content
    shutil.rmtree(many / "again" / "llama-01-lora-r3")
    weights = many / "again" / "llama-02-lora-r3" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = run(many, "again")
    assert done.stdout.count("converted (earlier)") == 47
    assert outputs(many / "again") == outputs(many / "clean")


def disturb(root: Path, output: str, seed: int, *arguments: object) -> int:
    """Start the batch, and kill its process with SIGKILL at a random point of its log; returns how it ended."""
    chance = random.Random(seed)
    log = root / output / "batch.jsonl"
    before = len(log.read_text().splitlines()) if log.is_file() else 0
    process = subprocess.Popen([*RUN, "jobs.yaml", "-o", output, *map(str, arguments)], cwd=root, stdout=subprocess.DEVNULL)
    lines = chance.randrange(1, 100)
    while process.poll() is None and (len(log.read_text().splitlines()) if log.is_file() else 0) < before + lines:
        time.sleep(0.001)
    time.sleep(chance.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def test_killed_at_any_point_the_result_is_the_same(many: Path, clean: subprocess.CompletedProcess[str]) -> None:
    ended = [disturb(many, "killed", seed, "--jobs", 1 + seed % 2) for seed in range(5)]
    assert ended.count(-signal.SIGKILL) >= 3, ended  # the others were over before they could be killed
    done = run(many, "killed", "--jobs", 2)
    assert done.returncode == 1
    assert outputs(many / "killed") == outputs(many / "clean")
    left = [path for path in (many / "killed").rglob("*") if path.is_dir() and path.name in ("pieces", "made", "old")]
    assert left == []


def test_ctrl_c_is_one_line_and_ends_every_process(many: Path) -> None:
    process = subprocess.Popen([*RUN, "jobs.yaml", "-o", "stopped", "--jobs", "2"], cwd=many, stderr=subprocess.PIPE, text=True)
    log = many / "stopped" / "batch.jsonl"
    while not (log.is_file() and '"event": "shared"' in log.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "Error: interrupted; what is finished stays, and the same command goes on from there\n"
    assert process.returncode == 130
    assert psutil.wait_procs(workers, timeout=20)[1] == []


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1])
def test_ctrl_c_in_a_terminal_reaches_every_process(many: Path, delay: float) -> None:
    """As a terminal sends it: to the whole group, workers that are just starting among them."""
    output = f"terminal-{delay}"
    command = [*RUN, "jobs.yaml", "-o", output, "--jobs", "2"]
    process = subprocess.Popen(command, cwd=many, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not _workers(process.pid):
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "Error: interrupted; what is finished stays, and the same command goes on from there\n"
    assert process.returncode == 130


def test_half_done_jobs_go_on_by_matrix(many: Path, tmp_path: Path) -> None:
    manifest = {"defaults": {"base": str(many / "llama"), "rank": 3}, "jobs": [{"source": str(many / "fts" / "llama" / "llama-00")}]}
    (job,) = parse_manifest(manifest)
    group = batch_tasks.Group(job.base, None, (job,), tmp_path)
    names = sorted(load_file(many / "llama" / "model.safetensors"))
    first = [batch_tasks.share(group, name) for name in names[:8]]
    assert [result["reads"] for result in first] == [1] * 8
    batch_tasks._open.cache_clear()
    again = [batch_tasks.share(group, name) for name in names]
    assert [result["reads"] for result in again] == [0] * 8 + [1] * (len(names) - 8)
    assert [result["digests"] for result in again[:8]] == [result["digests"] for result in first]


def test_stale_jobs_are_done_again(many: Path, tmp_path: Path) -> None:
    shutil.copytree(many / "fts" / "llama" / "llama-00", tmp_path / "ft")
    manifest = {"defaults": {"base": str(many / "llama"), "rank": 2}, "jobs": [{"source": str(tmp_path / "ft"), "output": "out"}]}

    def weights() -> bytes:
        result = adapt_convert.batch(manifest, tmp_path / "batch")
        assert result["exit_code"] == 0
        return (tmp_path / "batch" / "out" / "adapter_model.safetensors").read_bytes()

    first = weights()
    manifest["defaults"]["rank"] = 3
    second = weights()
    assert len(second) > len(first)
    shutil.copy(many / "fts" / "llama" / "llama-01" / "model.safetensors", tmp_path / "ft")
    assert weights() not in (first, second)


def test_a_killed_worker_costs_nothing_but_time(many: Path, clean: subprocess.CompletedProcess[str]) -> None:
    log = many / "worker" / "batch.jsonl"
    process = subprocess.Popen(
        [*RUN, "jobs.yaml", "-o", "worker", "--jobs", "2"], cwd=many, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for event in ("shared", "converting"):
        while not (log.is_file() and f'"event": "{event}"' in log.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        _kill_a_worker(process.pid)
    _, stderr = process.communicate(timeout=120)
    assert stderr == clean.stderr
    assert outputs(many / "worker") == outputs(many / "clean")


def _workers(parent: int) -> list[psutil.Process]:
    return [child for child in psutil.Process(parent).children() if "spawn_main" in " ".join(child.cmdline())]


def _kill_a_worker(parent: int) -> None:
    while not (workers := _workers(parent)):
        pass
    workers[0].kill()


def test_memory_admits_as_many_as_fit(many: Path, tmp_path: Path) -> None:
    jobs = [{"source": str(many / "fts" / "llama" / f"llama-0{n}")} for n in range(4)]
    manifest = {"defaults": {"base": str(many / "llama"), "rank": 2, "to": "lorta"}, "jobs": jobs}
    running, most = set(), 0

    def watch(event: dict[str, Any]) -> None:
        nonlocal most
        if event["event"] == "converting":
            running.add(event["job"])
        elif event["event"] in ("converted", "failed"):
            running.discard(event["job"])
        most = max(most, len(running))

    planned = adapt_convert.batch(manifest, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    peak = max(row["predicted_peak_memory"] for row in planned["jobs"])
    assert adapt_convert.batch(manifest, tmp_path / "out", jobs=2, memory=2 * peak - 1, on_event=watch)["exit_code"] == 0
    assert most == 1
    refused = adapt_convert.batch(manifest, tmp_path / "small", memory=peak // 2)
    assert {row["status"] for row in refused["jobs"]} == {"failed"}
    assert all("MiB of memory" in row["error"] for row in refused["jobs"])


def test_models_that_are_run_count_as_memory(many: Path, tmp_path: Path) -> None:
    source = shutil.copytree(many / "fts" / "llama" / "llama-00", tmp_path / "ft")
    save_tokenizer(source)
    weights = load_file(source / "model.safetensors").values()
    job = {"base": str(many / "llama"), "source": str(source), "rank": 2}

    def peak(**extra: Any) -> int:
        (parsed,) = parse_manifest({"jobs": [job | extra]})
        return foresee(find(parsed), open_base(job["base"])).peak_memory

    plain = peak()
    assert peak(validate=True) - plain == sum(tensor.nbytes for tensor in weights)
    assert peak(calib="self") - plain == 4 * sum(tensor.numel() for tensor in weights)
    refused = adapt_convert.batch({"jobs": [job | {"calib": "self"}]}, tmp_path / "out", memory=plain)
    assert "MiB of memory" in refused["jobs"][0]["error"]


def test_temporary_files_end_with_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pool = LocalPool(1, 2**40)
    made = pool.submit(Task(tempfile.mkdtemp, (), 0, print, print)).result()
    assert Path(made).is_dir()
    assert tmp_path in Path(made).parents
    pool.close()
    assert list(tmp_path.iterdir()) == []


def test_one_batch_at_a_time(many: Path, tmp_path: Path) -> None:
    manifest = {"jobs": [{"base": str(many / "llama"), "source": str(many / "fts" / "llama" / "llama-00")}]}
    (tmp_path / HIDDEN).mkdir()
    with (tmp_path / HIDDEN / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(adapt_convert.AdaptError, match="another batch is running there"):
            adapt_convert.batch(manifest, tmp_path)


def test_retries(many: Path, tmp_path: Path) -> None:
    """A source that is mended meanwhile converts; one that stays as it is fails after so many tries."""
    for name in ("mended", "not-finite"):
        shutil.copytree(many / "fts" / "llama" / "llama-00", tmp_path / name)
    whole = (tmp_path / "mended" / "model.safetensors").read_bytes()
    (tmp_path / "mended" / "model.safetensors").write_bytes(whole[:-1])
    tensors = load_file(tmp_path / "not-finite" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "not-finite" / "model.safetensors", {"format": "pt"})
    events: list[tuple[str, str]] = []

    def mend(event: dict[str, Any]) -> None:
        events.append((event["event"], event.get("job", "")))
        if event["event"] == "retrying":
            (tmp_path / "mended" / "model.safetensors").write_bytes(whole)

    jobs = [{"source": str(tmp_path / name), "output": name} for name in ("mended", "not-finite")]
    result = adapt_convert.batch({"defaults": {"base": str(many / "llama")}, "jobs": jobs}, tmp_path / "out", retry=2, on_event=mend)
    assert [row["status"] for row in result["jobs"]] == ["converted", "failed"]
    assert "model.layers.1.mlp.down_proj.weight: the change from base" in result["jobs"][1]["error"]
    assert [events.count(("retrying", name)) for name in ("mended", "not-finite")] == [1, 2]


def test_a_failed_validation_is_exit_code_3(many: Path, tmp_path: Path) -> None:
    shutil.copytree(many / "fts" / "llama" / "llama-00", tmp_path / "ft")
    save_tokenizer(tmp_path / "ft")
    defaults = {"base": str(many / "llama"), "source": str(tmp_path / "ft"), "validate": True}
    manifest = {"jobs": [{**defaults, "rank": rank} for rank in (32, 1)]}
    for skipped in (False, True):
        result = adapt_convert.batch(manifest, tmp_path / "out")
        assert result["exit_code"] == 3
        assert [row["status"] for row in result["jobs"]] == ["converted", "failed validation"]
        assert [row["skipped"] for row in result["jobs"]] == [skipped] * 2
    for rank, passed in ((32, True), (1, False)):
        made = tmp_path / "out" / f"ft-lora-r{rank}"
        assert json.loads((made / "validation.json").read_text())["passed"] is passed
        assert f'href="ft-lora-r{rank}/validation.html"' in (tmp_path / "out" / "index.html").read_text()


def test_the_unforeseen_stays_alone_too(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(job: Job) -> Found:
        if job.output == "cursed":
            raise KeyError("nobody thought of this")
        return real(job)

    real = batch_run.find
    monkeypatch.setattr(batch_run, "find", find)
    source = str(many / "fts" / "llama" / "llama-00")
    manifest = {"jobs": [{"base": str(many / "llama"), "source": source, "rank": 2, "output": name} for name in ("cursed", "blessed")]}
    result = adapt_convert.batch(manifest, tmp_path / "out")
    assert [row["status"] for row in result["jobs"]] == ["failed", "converted"]
    assert result["jobs"][0]["error"] == "KeyError: 'nobody thought of this'"
    monkeypatch.undo()
    monkeypatch.setattr(batch_tasks, "_publish", lambda state: {}[state.output])
    (job,) = parse_manifest({"jobs": [manifest["jobs"][0]]})
    with pytest.raises(adapt_convert.AdaptError, match=r"^KeyError: .*traceback\.txt\)$"):
        batch_tasks.finish(job, tmp_path / "alone", {})


def test_an_input_that_changes_meanwhile(many: Path, tmp_path: Path) -> None:
    shutil.copytree(many / "fts" / "llama" / "llama-00", tmp_path / "ft")

    def rewrite(event: dict[str, Any]) -> None:
        if event["event"] == "converting":
            os.utime(tmp_path / "ft" / "model.safetensors")

    manifest = {"jobs": [{"base": str(many / "llama"), "source": str(tmp_path / "ft"), "rank": 2}]}
    result = adapt_convert.batch(manifest, tmp_path / "out", on_event=rewrite)
    assert result["jobs"][0]["error"] == "an input was changed while it was read"


def test_the_table_of_a_terminal(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [{"source": str(many / "fts" / "llama" / f"llama-0{n}"), "output": f"job-{n}"} for n in (6, 7)]  # the second is damaged
    (tmp_path / "jobs.json").write_text(json.dumps({"defaults": {"base": str(many / "llama"), "rank": 2}, "jobs": jobs}))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("FORCE_COLOR", "1")  # which is how rich is told that it writes to a terminal
    done = CliRunner().invoke(main, ["batch", str(tmp_path / "jobs.json"), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    for shown in ("tensors to read", "converting", "1 failed, 1 converted", "job-7: "):
        assert shown in done.stderr
    monkeypatch.undo()
    quiet = CliRunner().invoke(main, ["batch", str(tmp_path / "jobs.json"), "-o", str(tmp_path / "again"), "--json"])
    assert json.loads(quiet.stdout)["counts"] == {"converted": 1, "failed": 1}
    assert quiet.stderr.startswith("FAIL job-7: ")
    assert quiet.stderr.count("\n") == 1
