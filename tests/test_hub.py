"""The Hub: the real client, in processes of their own (it reads its environment when imported), against a loopback server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import Fault, Hub
from safetensors.torch import save_file

import adapt_convert
from adapt_convert import AdaptError

TOKEN = "hf_SENTINELsentinelSENTINEL0123456789"
WRITTEN = ["README.md", "adapter_config.json", "adapter_model.safetensors", "conversion.json"]
CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\ntags: [x]\n---\n# A base\n"


@pytest.fixture
def hub(pairs: Any) -> Iterator[Hub]:
    """A Hub that holds a base and its fine-tune, beside files that no conversion needs."""
    pair = pairs("llama")
    with Hub() as hub:
        for name, path in (("org/base", pair.base), ("org/ft", pair.ft)):
            files = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
            hub.add(name, files | {"README.md": CARD.encode(), "pytorch_model.bin": b"not needed", "picture.png": b"not needed"})
        yield hub


@pytest.fixture
def adapter(pairs: Any, tmp_path: Path) -> Path:
    return adapt_convert.convert(pairs("llama").base, pairs("llama").ft, rank=2).save(tmp_path / "adapter")


class Session:
    """Processes with one Hub, one cache and one token; all that they print and write is kept, to look for the token."""

    def __init__(self, hub: Hub, directory: Path) -> None:
        self.directory = directory
        self.printed = ""
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        self.environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(directory / "home")}
        self.environment |= {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}

    def python(self, code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            cwd=self.directory,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        self.printed += done.stdout + done.stderr
        return done

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.python("from adapt_convert.cli import main; main()", *arguments, **environment)

    def assert_no_token(self) -> None:
        assert TOKEN not in self.printed
        for path in self.directory.rglob("*"):
            assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.fixture
def session(hub: Hub, tmp_path: Path) -> Iterator[Session]:
    session = Session(hub, tmp_path)
    yield session
    session.assert_no_token()


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


LOADED = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 12)[None]
with torch.no_grad():
    local = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])(ids).logits
    hub = AutoPeftModelForCausalLM.from_pretrained("org/adapter")(ids).logits
    base = AutoModelForCausalLM.from_pretrained("org/base")(ids).logits
assert torch.equal(local, hub) and not torch.equal(base, hub)
"""


def test_from_hub_to_hub_and_into_peft(hub: Hub, session: Session, pairs: Any) -> None:
    done = session.run("delta", "org/base@main", "org/ft", "--rank", 4, "-o", "out", "--push", "org/adapter")
    assert done.returncode == 0, done.stderr
    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert "model.safetensors" in fetched
    assert not fetched & {"pytorch_model.bin", "picture.png"}
    assert f"Bearer {TOKEN}" in hub.tokens
    published = hub.repos["org/adapter"].files("main")
    assert sorted(published) == WRITTEN
    assert len(hub.repos["org/adapter"].commits) == 2  # the empty one, and one with everything
    for name in WRITTEN[1:]:
        assert published[name] == (session.directory / "out" / name).read_bytes()
    card = published["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == "org/base"
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft"
    assert {"lora", "adapt-convert"} <= set(metadata["tags"])
    assert [metadata[name] for name in ("license", "license_name", "license_link")] == ["other", "tiny", "LICENSE"]
    assert "captured energy" in card
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base"), "org/adapter")' in card
    loaded = session.python(LOADED, pairs("llama").base, session.directory / "out")
    assert loaded.returncode == 0, loaded.stderr
    again = session.run("delta", "org/base", "org/adapter@main", "--to", "lorta", "--rank", 2, "-o", "again")  # a LoRA is a source too
    assert again.returncode == 0, again.stderr


def test_the_cache_serves_without_a_network(hub: Hub, session: Session) -> None:
    assert session.run("delta", "org/base", "org/ft", "-o", "first").returncode == 0
    hub.requests.clear()
    done = session.run("delta", "org/base", "org/ft", "-o", "second", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    weights = [(session.directory / name / "adapter_model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    assert "local Hub cache" in one_line(session.run("delta", "org/base", "org/other", HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE" in one_line(session.run("push", "first", "org/adapter", HF_HUB_OFFLINE="1"))


def test_a_revision_that_the_hub_does_not_have(session: Session) -> None:
    assert "org/ft@v1: " in one_line(session.run("delta", "org/base", "org/ft@v1"))


TRANSIENT = [
    Fault("POST .*/preupload/", 500),
    Fault("PUT /lfs/", 500),
    Fault("PUT /lfs/", "drop"),
    Fault("POST .*/commit/", 500),
    Fault("POST .*/commit/", "drop"),
    Fault("POST .*/commit/", 409),
    Fault("POST .*/commit/", 412),
]


def test_what_passes_is_tried_again(hub: Hub, session: Session, adapter: Path) -> None:
    for number, fault in enumerate(TRANSIENT):
        hub.faults = [fault]
        hub.blobs.clear()
        done = session.run("push", adapter, f"org/adapter-{number}", "--json")
        assert done.returncode == 0, (fault, done.stderr)
        assert fault.times == 0
        held = hub.repos[f"org/adapter-{number}"]
        assert sorted(held.files("main")) == WRITTEN
        assert len(held.commits) == 2
        assert json.loads(done.stdout)["commit"] == held.refs["main"]


@pytest.mark.parametrize("fault", [Fault("/commit/", 409, 99, True), Fault("/commit/", 403, 99, True), Fault("/commit/", "drop", 99)])
def test_what_stays_is_one_line_and_nothing_is_half_published(hub: Hub, session: Session, adapter: Path, fault: Fault) -> None:
    hub.faults = [fault]
    for left in (" (the repository was made, and is empty)", ""):  # the second time it was there
        assert f"org/adapter: nothing was published{left}: " in one_line(session.run("push", adapter, "org/adapter"))
    assert hub.repos["org/adapter"].files("main") == {}


def test_before_the_work(hub: Hub, session: Session) -> None:
    """A push that cannot succeed is refused before the conversion: no token, a token that is refused, an existing output."""
    arguments = ("delta", "org/base", "org/ft", "-o", "out", "--push")
    assert "no Hub token" in one_line(session.run(*arguments, "org/adapter", HF_TOKEN=""))
    assert "no Hub id" in one_line(session.run(*arguments, "adapter"))
    (session.directory / "taken").mkdir()
    (session.directory / "taken" / "file").touch()
    assert "already exists" in one_line(session.run("delta", "org/base", "org/ft", "-o", "taken", "--push", "org/adapter"))
    hub.faults = [Fault("whoami", 401, 99, True)]
    assert "does not accept the token" in one_line(session.run(*arguments, "org/adapter"))
    assert not (session.directory / "out").exists()
    assert not any("/lfs" in request or "/commit/" in request for request in hub.requests)


def test_branches_pull_requests_and_private_repositories(hub: Hub, session: Session, adapter: Path) -> None:
    assert session.run("push", adapter, "org/a", "--private", "--revision", "v1").returncode == 0
    assert hub.repos["org/a"].private
    assert hub.repos["org/a"].files("main") == {}
    assert sorted(hub.repos["org/a"].files("v1")) == WRITTEN
    done = session.run("push", adapter, "org/a", "--create-pr")
    assert "/discussions/" in done.stdout
    assert hub.repos["org/a"].files("main") == {}
    one_line(session.run("push", adapter, "org/a", "--create-pr", "--revision", "v1"))


def test_the_dry_run_asks_nobody(hub: Hub, session: Session, adapter: Path) -> None:
    (adapter / "secret.txt").write_text("mine")
    done = session.run("push", adapter, "org/adapter", "--dry-run", HF_TOKEN="")
    assert done.returncode == 0
    assert all(name in done.stdout for name in WRITTEN)
    assert "secret.txt" not in done.stdout
    assert "library_name: peft" in done.stdout
    assert "names no base_model" in done.stdout
    assert hub.requests == []


def test_what_is_not_published(adapter: Path, tmp_path: Path) -> None:
    def push(**options: Any) -> dict[str, Any]:
        return adapt_convert.push(adapter, "org/adapter", dry_run=True, **options)

    (adapter / "validation.json").write_text('{"passed": false}')
    with pytest.raises(AdaptError, match="its validation failed"):
        push()
    assert "its validation failed" in push(force=True)["notes"]
    (adapter / "validation.json").write_text('{"passed": true}')
    push()
    (tmp_path / "conversion.json").write_text('{"target": "merged"}')  # as `merge` leaves it
    with pytest.raises(AdaptError, match="is a merged model, and only adapters are published"):
        adapt_convert.push(tmp_path, "org/adapter", dry_run=True)
    (adapter / "conversion.json").unlink()
    with pytest.raises(AdaptError, match=r"has no conversion\.json"):
        push()
    assert "conversion.json" not in push(force=True)["files"]
    (adapter / "adapter_model.safetensors").unlink()
    for directory in (adapter, tmp_path / "nowhere"):
        with pytest.raises(AdaptError):
            adapt_convert.push(directory, "org/adapter", dry_run=True, force=True)


def _break_report(adapter: Path, **changes: Any) -> None:
    report = json.loads((adapter / "conversion.json").read_text())
    (adapter / "conversion.json").write_text(json.dumps(report | changes))


BROKEN = {
    "truncated weights": lambda d: os.truncate(d / "adapter_model.safetensors", 100),
    "other weights": lambda d: save_file({"x": torch.zeros(3)}, d / "adapter_model.safetensors"),
    "no config": lambda d: (d / "adapter_config.json").unlink(),
    "a report of a LatTE": lambda d: _break_report(d, target="latte"),
    "a report of nothing": lambda d: _break_report(d, target=[]),
    "inputs that are a list": lambda d: _break_report(d, inputs=[]),
    "a base that is a text": lambda d: _break_report(d, inputs={"base": "b", "source": "s"}),
    "a size that is a text": lambda d: _break_report(d, bytes="many"),
    "a card in another encoding": lambda d: (d / "README.md").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_not_published(adapter: Path, name: str) -> None:
    BROKEN[name](adapter)
    with pytest.raises(AdaptError, match=str(adapter)):
        adapt_convert.push(adapter, "org/adapter", dry_run=True)


def test_no_local_path_and_no_empty_card_are_published(hub: Hub, session: Session, adapter: Path, pairs: Any) -> None:
    local = str(pairs("llama").base.parent)
    assert all(local in (adapter / name).read_text() for name in ("README.md", "conversion.json", "adapter_config.json"))
    validation = {"passed": True, "base": {"path": f"{local}/base"}, "text": "deep/held.txt", "command": f"x {local}/base deep/held.txt"}
    (adapter / "validation.json").write_text(json.dumps(validation))
    done = session.run("push", adapter, "org/adapter")
    assert done.returncode == 0, done.stderr
    published = hub.repos["org/adapter"].files("main")
    assert sorted(published) == sorted([*WRITTEN, "validation.json"])
    for name, content in published.items():
        assert local.encode() not in content
        assert b"deep/" not in content, name
    assert "Converted from `ft` on `base`" in published["README.md"].decode()
    assert json.loads(published["conversion.json"])["inputs"]["base"]["origin"] == "base"
    (adapter / "README.md").unlink()
    assert session.run("push", adapter, "org/bare", "--force").returncode == 0
    assert "README.md" not in hub.repos["org/bare"].files("main")


def test_a_token_that_no_header_can_carry(hub: Hub, session: Session, adapter: Path) -> None:
    token = "hf_sécret"
    for arguments in (("push", adapter, "org/adapter"), ("delta", "org/base", "org/ft")):
        line = one_line(session.run(*arguments, HF_TOKEN=token))
        assert "characters that no token has" in line
        assert token not in line


def test_a_revision_that_would_be_ignored(session: Session, pairs: Any) -> None:
    assert "names a revision itself" in one_line(session.run("delta", "org/base", "org/ft@main", "--revision", "v9"))
    assert "is a local path" in one_line(session.run("delta", pairs("llama").base, "org/ft", "--base-revision", "v9"))


def test_a_hub_that_cannot_be_reached(session: Session, adapter: Path) -> None:
    assert "cannot be reached" in one_line(session.run("push", adapter, "org/adapter", HF_ENDPOINT="http://127.0.0.1:9"))


def test_a_batch_publishes(hub: Hub, session: Session) -> None:
    job = {"base": "org/base", "source": "org/ft", "rank": 2, "push": "org/{name}-lora"}
    (session.directory / "jobs.yaml").write_text(yaml.safe_dump({"jobs": [job]}))
    assert "no Hub token" in one_line(session.run("batch", "jobs.yaml", "-o", "out", HF_TOKEN=""))
    assert not (session.directory / "out").exists()
    hub.faults = [Fault("/commit/", 403, 1, True)]
    done = session.run("batch", "jobs.yaml", "-o", "out")
    assert done.returncode == 1
    assert done.stderr.startswith("FAIL ft-lora-r2: org/ft-lora: nothing was published")
    assert session.run("batch", "jobs.yaml", "-o", "out").returncode == 0
    assert sorted(hub.repos["org/ft-lora"].files("main")) == WRITTEN
    assert sum("/commit/" in request for request in hub.requests) == 2
    assert session.run("batch", "jobs.yaml", "-o", "out").stdout.startswith("ft-lora-r2: converted (earlier)")
    assert sum("/commit/" in request for request in hub.requests) == 2
