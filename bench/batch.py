"""Batches measured: what a second process gains, that a killed batch ends the same, and what a matrix costs.

    python bench/batch.py speedup --rounds 5     # --jobs 2 against --jobs 1, equal jobs: ratio of the medians
    python bench/batch.py kill --points 20       # SIGKILL at random points, then a last run: the same bytes as undisturbed
    python bench/batch.py matrices               # CPU seconds per matrix and fine-tune, on one thread
    python bench/batch.py headers                # CPU seconds to open and plan a 70B pair

Everything is made in a temporary directory, and the last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapt_convert.convert.batch.inputs import find, foresee
from adapt_convert.convert.batch.manifest import parse_manifest
from adapt_convert.convert.batch.tasks import Group, share
from adapt_convert.convert.opening import open_base

RUN = [sys.executable, "-c", "from adapt_convert.cli import main; main()", "batch", "jobs.yaml", "-o"]


def make(root: Path, bases: int, fine_tunes: int, width: int, layers: int) -> None:
    """Random bases and fine-tunes of them, named as a Llama's tensors are, and a manifest of all pairs."""
    names = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": width, "num_hidden_layers": layers}
    config = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "intermediate_size": width, **heads})
    jobs = []
    for b in range(bases):
        keys = [f"model.layers.{layer}.{name}.weight" for layer in range(layers) for name in names]
        generator = torch.Generator().manual_seed(b)
        base = {key: torch.randn(width, width, generator=generator).bfloat16() for key in keys}
        save(root / f"base-{b}", base, config)
        for f in range(fine_tunes):
            save(
                root / f"ft-{b}-{f}",
                {key: v + 0.05 * torch.randn(v.shape, generator=generator).bfloat16() for key, v in base.items()},
                config,
            )
            jobs.append({"base": f"base-{b}", "source": f"ft-{b}-{f}"})
    (root / "jobs.yaml").write_text(json.dumps({"defaults": {"rank": 16}, "jobs": jobs}))


def save(directory: Path, tensors: dict[str, torch.Tensor], config: str) -> None:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(config)


def speedup(root: Path, rounds: int, width: int) -> dict[str, Any]:
    """One and two processes in turn, on the same jobs and from nothing; wall-clock seconds of the whole command."""
    make(root, bases=2, fine_tunes=16, width=width, layers=2)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for jobs, taken in seconds.items():
            started = time.perf_counter()
            subprocess.run([*RUN, "out", "--jobs", str(jobs)], cwd=root, check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - started)
            shutil.rmtree(root / "out")
    medians = {jobs: statistics.median(taken) for jobs, taken in seconds.items()}
    for jobs, taken in seconds.items():
        print(f"--jobs {jobs}: median {medians[jobs]:.2f} s of {', '.join(f'{value:.2f}' for value in taken)}")
    return {"seconds": seconds, "speedup_of_medians": medians[1] / medians[2]}


def kill(root: Path, points: int, width: int) -> dict[str, Any]:
    """Every point is a run of its own from nothing, killed and then taken up; its outputs against those undisturbed."""
    make(root, bases=2, fine_tunes=25, width=width, layers=2)
    subprocess.run([*RUN, "clean", "--jobs", "2"], cwd=root, check=True, stdout=subprocess.DEVNULL)
    events = len((root / "clean" / "batch.jsonl").read_text().splitlines())
    chance, same = random.Random(0), 0
    for point in range(points):
        after = chance.randrange(1, events)
        process = subprocess.Popen([*RUN, "killed", "--jobs", "2"], cwd=root, stdout=subprocess.DEVNULL)
        log = root / "killed" / "batch.jsonl"
        while process.poll() is None and (len(log.read_text().splitlines()) if log.is_file() else 0) < after:
            time.sleep(0.001)
        time.sleep(0.02 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        subprocess.run([*RUN, "killed", "--jobs", "2"], cwd=root, check=True, stdout=subprocess.DEVNULL)
        equal = contents(root / "killed") == contents(root / "clean")
        same += equal
        print(f"point {point}: killed after {after} of {events} events: {'the same bytes' if equal else 'DIFFERENT BYTES'}", flush=True)
        shutil.rmtree(root / "killed")
    return {"points": points, "same": same}


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.glob("*/*") if path.is_file() and not path.parent.name.startswith(".")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def matrices(root: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds of this process for one square bfloat16 matrix of a base with one and with four fine-tunes."""
    rows = []
    for width in (1024, 2048, 4096):
        place = root / str(width)
        place.mkdir()
        make(place, bases=1, fine_tunes=4, width=width, layers=1)
        manifest = json.loads((place / "jobs.yaml").read_text())
        for row in manifest["jobs"]:
            row |= {name: str(place / row[name]) for name in ("base", "source")}
        jobs = parse_manifest(manifest)
        taken = {1: [], 4: []}
        for number in range(rounds):
            for count, seconds in taken.items():
                group = Group(jobs[0].base, None, tuple(jobs[:count]), place / f"out-{number}-{count}")
                share(group, "model.layers.0.self_attn.q_proj.weight")  # opens the headers
                started = time.process_time()
                share(group, "model.layers.0.mlp.up_proj.weight")
                seconds.append(time.process_time() - started)
        one, four = (statistics.median(taken[count]) for count in (1, 4))
        each = (four - one) / 3
        row = {"width": width, "seconds_per_fine_tune": each, "seconds_for_base": one - each, "seconds_per_element": each / width**2}
        print(f"{width} x {width}: {each:.3f} s per fine-tune, {each / width**2 * 1e9:.2f} ns per element; {one - each:.3f} s for the base")
        rows.append(row)
        shutil.rmtree(place)
    return {"rank": 16, "dtype": "bfloat16", "rows": rows}


def headers(root: Path, rounds: int) -> dict[str, Any]:
    """Opening and planning a pair with the headers of a 70B Llama; its data are holes in sparse files."""
    shapes = {"model.embed_tokens": (128256, 8192), "lm_head": (128256, 8192), "model.norm": (8192,)}
    for layer in range(80):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj": (rows, 8192) for name, rows in (("q", 8192), ("k", 1024), ("v", 1024), ("o", 8192))}
        shapes |= {f"{block}.mlp.{name}_proj": (28672, 8192) for name in ("gate", "up")} | {f"{block}.mlp.down_proj": (8192, 28672)}
        shapes |= {f"{block}.{name}_layernorm": (8192,) for name in ("input", "post_attention")}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192, "num_hidden_layers": 80}
    for side in ("base", "ft"):
        save(root / side, {}, json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **heads}))
        position, header = 0, {}
        for name, shape in shapes.items():
            end = position + 2 * math.prod(shape)
            header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header).encode()
        with (root / side / "model.safetensors").open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + position)
    (job,) = parse_manifest({"jobs": [{"base": str(root / "base"), "source": str(root / "ft"), "exclude": "embed_tokens,lm_head"}]})
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        foreseen = foresee(find(job), open_base(job.base))
        seconds.append(time.process_time() - started)
    median = statistics.median(seconds)
    print(
        f"70B pair: opened and planned in {median:.3f} s; "
        f"predicted {foreseen.bytes / 1e6:.0f} MB, peak memory {foreseen.peak_memory / 1e9:.2f} GB per process"
    )
    return {"seconds": median, "predicted_bytes": foreseen.bytes, "predicted_peak_memory": foreseen.peak_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("speedup", "kill", "matrices", "headers"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--width", type=int, help="of the square matrices (speedup: 1024, kill: 64)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        if arguments.what == "speedup":
            result = speedup(root, arguments.rounds, arguments.width or 1024)
        elif arguments.what == "kill":
            result = kill(root, arguments.points, arguments.width or 64)
        else:
            result = (headers if arguments.what == "headers" else matrices)(root, arguments.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
