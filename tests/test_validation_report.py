"""What a validation leaves behind: JSON, tables, exit codes, model cards, speed, a page that a real browser renders; and its memory."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from test_validation_inputs import with_tokenizer, words

import adapt_convert
from adapt_convert.cli import main
from adapt_convert.formats.validation_html import validation_page

KEYS = {"path", "kind", "kl", "kl_ci95", "recovered", "top1", "perplexity", "bytes", "speed", "passed", "reasons"}


@pytest.fixture
def here(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `base`, `ft`, a good and a poor adapter, and token ids."""
    pair = pairs("qwen2")
    (tmp_path / "base").symlink_to(pair.base)
    (tmp_path / "ft").symlink_to(pair.ft)
    adapt_convert.convert(pair.base, pair.ft, rank=16).save(tmp_path / "good")
    adapt_convert.convert(pair.base, pair.ft, to="lorta", rank=2).save(tmp_path / "poor")
    rows = torch.randint(3, 96, (4, 20), generator=torch.Generator().manual_seed(1)).tolist()
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["validate", "base", "ft", *(str(a) for a in arguments), "--token-ids", "ids.jsonl"])


def test_keys_exit_codes_and_the_failing_line(here: Path) -> None:
    good = call("good", "-o", "out", "--max-slowdown", 1e9, "--json")
    assert good.exit_code == 0, good.output
    data = json.loads(good.stdout)
    assert data == json.loads((here / "out" / "validation.json").read_text())
    assert {"base", "candidates", "device", "dtype", "text", "tokens", "versions"} <= set(data)
    for row in (data["base"], *data["candidates"]):
        assert set(row) - {"details"} == KEYS
    assert (data["text"], data["tokens"], data["dtype"]) == ("ids.jsonl", 80, "float32")
    assert data["candidates"][0]["speed"]["verdict"] == "pass"
    again = CliRunner().invoke(main, [*shlex.split(data["command"])[1:], "--json", "--no-card"])
    assert json.loads(again.stdout)["candidates"][0]["kl"] == data["candidates"][0]["kl"]
    bad = call("good", "poor", "--no-card")
    assert bad.exit_code == 3
    assert "FAIL poor: recovered" in bad.stderr
    assert "\nNot timed, as another model's speed says nothing: poor.\n" in bad.stdout
    assert "Not timed" not in call("poor", "--no-speed", "--no-card").stdout
    assert call("good", "--max-kl", 0, "--no-speed", "--no-card").exit_code == 3
    slow = call("good", "--max-slowdown", 0, "--no-card")
    assert slow.exit_code == 3
    assert "x the base's time > 0 (--max-slowdown)" in slow.stderr
    refused = call("nowhere")
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("--html", "good", "good is a directory"),
        ("--html", "ids.jsonl/page.html", "ids.jsonl is not a directory"),
        ("-o", "ids.jsonl", "ids.jsonl is not a directory"),
        ("-o", "/proc/here", "/proc cannot be written to"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, option: str, path: str, message: str
) -> None:
    monkeypatch.setattr(sys.modules["adapt_convert.convert.validation.validate"], "open_contender", None)  # nothing is opened
    refused = call("good", option, path)
    assert (refused.exit_code, refused.stderr.count("\n")) == (1, 1), refused.output
    assert message in refused.stderr


def test_speed_of_the_base_and_of_those_that_pass(here: Path) -> None:
    result = adapt_convert.validate("base", "ft", "good", "poor", "ft", token_ids="ids.jsonl", batch=2)
    good, poor, merged = result.candidates
    assert poor.passed is False
    assert poor.speed is None
    for row in (result.base, good, merged):
        assert row.speed.prefill.low <= row.speed.prefill.median <= row.speed.prefill.high
        assert row.speed.per_token.median > 0
        assert row.speed.memory > 10**7
        assert row.speed.verdict is None
        assert row.speed.load > 0
    assert result.base.speed.slowdown == 1.0
    assert good.speed.switch > 0
    assert good.contender.bytes == (here / "good" / "adapter_model.safetensors").stat().st_size


def test_speed_within_the_positions_of_the_model_on_its_longest_rows(pairs: Any) -> None:
    pair = pairs("gpt2")  # 64 positions
    ids = [[(7 * i + 3 * j) % 90 + 3 for i in range(length)] for j, length in enumerate((5, 64, 64, 9))]
    result = adapt_convert.validate(pair.base, pair.ft, pair.ft, token_ids=ids, context=64, batch=2)
    for row in (result.base, *result.candidates):
        assert row.speed.per_token.median > 0
        assert (row.speed.rows, row.speed.length) == (2, 64)
    details = result.to_json()["candidates"][0]["details"]
    assert (details["attribution"]["rows"], details["attribution"]["tokens"]) == (2, 128)


def test_a_card_that_cannot_be_changed_costs_no_figures(here: Path) -> None:
    shutil.copytree(here / "good", here / "second")
    (here / "good" / "README.md").write_text("no metadata")
    done = call("good", "second", "--no-speed")
    assert done.exit_code == 0, done.output
    assert "recovered" in done.stdout
    assert "Warning: README.md of good: has no metadata block" in done.stderr
    assert "## Validation" in (here / "second" / "README.md").read_text()


def test_the_card_of_an_image_classifier_names_its_task(pairs: Any, tmp_path: Path) -> None:
    pair = pairs("vit")
    lora = adapt_convert.convert(pair.base, pair.ft, rank=8).save(tmp_path / "lora")
    (card,) = adapt_convert.validate(pair.base, pair.ft, lora, speed=False, attribution=False).update_cards()
    _, results = model_index_to_eval_results(yaml.safe_load(card.read_text().split("---\n")[1])["model-index"])
    assert {result.task_type for result in results} == {"image-classification"}


def test_names_are_shown_as_they_are_and_told_apart(here: Path) -> None:
    for name in ("x/l", "y/l", "lo[bold]"):
        shutil.copytree(here / "good", here / name)
    done = call("x/l", "y/l", "lo[bold]", "--no-speed", "--no-card", "--html", "page.html")
    assert all(name in done.stdout for name in ("x/l", "y/l", "lo[bold]"))
    page = (here / "page.html").read_text()
    assert "x/l" in page
    assert page.count("Recovered KL by matrix</h3>") == page.count("Of the matrices shown, ") == 3
    assert page.count("class=ramp") == 2  # one scale for all maps of a kind


def test_no_attribution(here: Path) -> None:
    done = call("good", "--no-speed", "--no-card", "--no-attribution", "--json")
    data = json.loads(done.stdout)
    assert data["candidates"][0]["details"]["attribution"] is None
    assert {row["recovered_kl"] for row in data["candidates"][0]["details"]["matrices"].values()} == {None}
    assert data["candidates"][0]["speed"] is None
    assert "Warning: only 80 tokens in 4 rows" in done.stderr
    assert data["warning"] in done.stderr


@pytest.mark.parametrize("name", ["built-in.txt", "token ids"])
def test_the_command_repeats_the_validation(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pair = pairs("llama")
    monkeypatch.chdir(tmp_path)
    with_tokenizer(pair.ft, tmp_path / "ft")
    (tmp_path / name).write_text(words(100))
    arguments = [pair.base, "ft", pair.ft, "--text", name, "--context", 20, "--no-speed", "--no-attribution", "--min-recovered"]
    done = CliRunner().invoke(main, ["validate", *map(str, arguments), "0.12345678901", "--json"])
    assert done.exit_code == 0, done.output
    first = json.loads(done.stdout)
    again = CliRunner().invoke(main, [*shlex.split(first["command"])[1:], "--json"])
    assert json.loads(again.stdout) == first
    rows = adapt_convert.validate(pair.base, pair.ft, pair.ft, token_ids=[[5, 6, 7]] * 2, speed=False)
    assert rows.command is None
    assert "From Python" in validation_page(rows.to_json())


def test_delta_validate(here: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    shutil.copytree(here / "ft", here / "ft-with-tokenizer")
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0} | {word: i for i, word in enumerate(["the", "of", "a", "is", "to", "in"], 1)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(here / "ft-with-tokenizer" / "tokenizer.json"))
    done = CliRunner().invoke(main, ["delta", "base", "ft-with-tokenizer", "--rank", "16", "-o", "new", "--validate", "--json"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["target"] == "lora"
    assert data["validation"]["text"].startswith("built-in")
    assert json.loads((here / "new" / "validation.json").read_text()) == data["validation"]
    assert "## Validation" in (here / "new" / "README.md").read_text()


def test_model_card_in_the_hubs_form(here: Path) -> None:
    before = (here / "good" / "README.md").read_text()
    for _ in range(2):  # a second validation replaces the figures of the first
        assert call("good", "--no-speed").exit_code == 0
    card = (here / "good" / "README.md").read_text()
    assert card.count("model-index:") == card.count("## Validation") == 1
    metadata = yaml.safe_load(card.split("---\n")[1])
    name, results = model_index_to_eval_results(metadata["model-index"])
    found = {result.metric_type: result.metric_value for result in results}
    data = json.loads(call("good", "--no-speed", "--json").stdout)["candidates"][0]
    assert name == "good"
    assert found["kl_divergence"] == pytest.approx(data["kl"], rel=1e-5)
    assert found["recovered_kl"] == pytest.approx(data["recovered"], rel=1e-5)
    assert {key: metadata[key] for key in ("library_name", "tags")} == {"library_name": "peft", "tags": ["lora", "adapt-convert"]}
    assert ModelCardData(**metadata).to_dict()["tags"] == ["lora", "adapt-convert"]
    assert before.split("---\n", 2)[2].strip() in card
    shutil.copytree(here / "good", here / "foreign")
    (here / "foreign" / "conversion.json").unlink()
    (here / "foreign" / "README.md").write_text("mine")
    call("foreign", "--no-speed")
    assert (here / "foreign" / "README.md").read_text() == "mine"


_MEASURE = """
import sys, torch, peft, transformers, adapt_convert
from transformers import LlamaForCausalLM
from adapt_convert import validate
torch.set_num_threads(1)
if sys.argv[1] == "plain":
    models = [LlamaForCausalLM.from_pretrained(path) for path in ("base", "ft")]
    for model in models:
        sum(float(p.sum()) for p in model.parameters())
elif sys.argv[1] == "validate":
    ids = [[(7 * i + 3 * j) % 900 + 3 for i in range(64)] for j in range(4)]
    assert len(validate("base", "ft", "lora", "lorta", "merged", token_ids=ids).candidates) == 3
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


# ru_maxrss would do elsewhere, but on Linux a child inherits its parent's, and the parent is pytest.
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_of_three_candidates(make_pair: Any, tmp_path: Path) -> None:
    """Above what importing takes, at most 1.3 times what loading base and fine-tune takes."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "layers" in name:
                parameter += 0.02 * torch.randn_like(parameter)

    pair = make_pair(
        tmp_path, "llama", change, vocab_size=16000, hidden_size=640, intermediate_size=1920, num_hidden_layers=8, num_attention_heads=10
    )
    lora = adapt_convert.convert(pair.base, pair.ft, rank=8).save(tmp_path / "lora")
    adapt_convert.convert(pair.base, lora, to="lorta", rank=2).save(tmp_path / "lorta")
    adapt_convert.merge(pair.base, lora, tmp_path / "merged")
    peaks = {
        what: int(subprocess.run([sys.executable, "-c", _MEASURE, what], cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
        for what in ("import", "plain", "validate")
    }
    assert peaks["plain"] - peaks["import"] > 200_000, peaks  # kilobytes: the models have to be what is measured
    assert peaks["validate"] - peaks["import"] <= 1.3 * (peaks["plain"] - peaks["import"]), peaks


def test_outside_text_is_escaped(here: Path) -> None:
    data = json.loads(call("good", "--no-speed", "--no-card", "--json").stdout)
    data["text"] = data["candidates"][0]["path"] = data["candidates"][0]["kind"] = "<script>alert(1)</script>"
    data["candidates"][0] |= {"passed": False, "reasons": ["<img src=x onerror=alert(1)>"]}
    page = validation_page(data)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


class Browser:
    """Chromium through chromedriver's own protocol, so that no further package is needed."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._url += "/session/" + self._post("/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, url: str, width: int, scheme: str) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._post("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._post("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": features})
        self._post("/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._post("/execute/sync", {"script": script, "args": []})

    def console(self) -> list[Any]:
        return self._post("/se/log", {"type": "browser"})

    def close(self) -> None:
        with urllib.request.urlopen(urllib.request.Request(self._url, method="DELETE"), timeout=60):
            pass


@pytest.fixture
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if not driver:
        pytest.skip("no chromedriver and chromium on this machine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        opened = Browser(port)
        yield opened
        opened.close()
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(here: Path, browser: Browser, width: int, scheme: str) -> None:
    result = adapt_convert.validate("base", "ft", "good", "poor", token_ids="ids.jsonl")
    page = result.save_html(here / "report.html")
    assert "http" not in page.read_text().replace("http-equiv", "")  # nothing to fetch
    browser.open(page.as_uri(), width, scheme)
    assert browser.console() == []
    assert browser.run("return document.querySelector('h1').textContent") == "1 of 2 candidates fails"
    assert browser.run("return document.querySelectorAll('svg').length") >= 8
    # Every chart is drawn, inside the screen; only marked boxes scroll sideways.
    assert browser.run("return [...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().height > 40)")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    size = "return Math.min(...[...document.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))"
    assert browser.run(size) >= 9  # pixels
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 21, 26)")
