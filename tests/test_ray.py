"""The same manifest on a Ray cluster of two nodes: the same bytes, also when a worker is killed on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from test_batch import RUN, fine_tunes, outputs

pytest.importorskip("ray")

# Ray's own means of testing: a head and a second node, of one CPU each, on this machine.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
cluster.add_node(**node)
print("at", cluster.address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def work(pairs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    base = pairs("llama").base
    (root / "base").symlink_to(base)
    fine_tunes(base, root / "fts", 6)
    broken = root / "fts" / "base-03" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    jobs = [{"source": "fts"}, {"source": "fts/base-00", "to": "lorta", "rank": 2}]
    (root / "jobs.yaml").write_text(yaml.safe_dump({"defaults": {"base": "base", "rank": 3}, "jobs": jobs}))
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, int]]:
    """Its address, and the process that all of it hangs from."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("at "):
            break
    yield line.split()[1], process.pid
    for part in [*psutil.Process(process.pid).children(recursive=True), process]:
        part.kill()
    process.communicate()


def start(work: Path, output: str, *arguments: str) -> subprocess.Popen[str]:
    command = [*RUN, "jobs.yaml", "-o", output, *arguments]
    return subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_same_bytes_as_locally_and_a_killed_worker_is_made_up_for(work: Path, cluster: tuple[str, int]) -> None:
    address, owner = cluster
    local = start(work, "local").communicate()
    ray = start(work, "ray", "--engine", "ray", "--address", address)
    assert (ray.communicate()[1], ray.returncode) == (local[1], 1)
    assert local[1].startswith("FAIL base-03-lora-r3: ")
    assert len(outputs(work / "local")) == 6 * 4
    assert outputs(work / "ray") == outputs(work / "local")
    (base,) = json.loads((work / "ray" / "batch.json").read_text())["bases"]
    assert base["shared_reads"] == base["tensors"]
    again = start(work, "killed", "--engine", "ray", "--address", address)
    log = work / "killed" / "batch.jsonl"
    while not (log.is_file() and '"event": "shared"' in log.read_text()):
        assert again.poll() is None
        time.sleep(0.005)
    killed = 0
    while not killed:
        for process in psutil.Process(owner).children(recursive=True):
            if process.name().startswith("ray::_call"):
                process.kill()
                killed += 1
        assert again.poll() is None, "it was over before a worker could be killed"
    assert (again.communicate()[1], again.returncode) == (local[1], 1)
    assert outputs(work / "killed") == outputs(work / "local")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nonsense"])
def test_no_cluster_is_one_line(work: Path, address: str) -> None:
    done = start(work, "nowhere", "--engine", "ray", "--address", address)
    stderr = done.communicate()[1]
    assert done.returncode == 1
    assert stderr.startswith(f"Error: --engine ray: no cluster at {address}: ")
    assert stderr.count("\n") == 1
    assert not (work / "nowhere").exists()
