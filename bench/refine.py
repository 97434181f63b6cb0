"""What calibration and refinement bring on a real model: SmolLM2-135M-Instruct and the fine-tune of bench/smollm2.py.

    pip install gguf && python bench/refine.py DIRECTORY [--cases lora-r4 lorta-r16 ...]

Fits to the first nine tenths of Python's language reference, or to text that the fine-tune writes, and measures with the validator on the
last tenth, which neither the fine-tune nor the conversions have seen. A finished conversion is used again; the table of all that are
there goes to standard output and, with the losses, to DIRECTORY/refine.json. A case takes 5 to 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from smollm2 import dequantise, fine_tune

TOOL = str(Path(sys.executable).with_name("adapt-convert"))
LORA = ("--to", "lora", "--rank", "4", "--target-modules", "all-linear")
LINEAR_ONLY = ("--exclude", "embed_tokens,lm_head,input_layernorm,post_attention_layernorm,norm")
LORTA = ("--to", "lorta", "--rank", "16")
LATTE = ("--to", "latte", "--rank", "32", "--segments", "1", "--target-modules", "all-linear", "--exclude", "embed_tokens,lm_head,norm")
WITH_TABLE = ("--to", "lora", "--rank", "14", "--target-modules", "all-linear,embed_tokens")
SEEN = ("--calib", "{seen}")
# name: options of `delta`; each is made as it is, calibrated, and refined in as many steps of 512 tokens
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lora-r4": ((*LORA, *LINEAR_ONLY), SEEN),
    "lorta-r16": ((*LORTA, *LINEAR_ONLY), SEEN),
    "latte-r32": (LATTE, SEEN),
    "lora-table-r14": (WITH_TABLE, SEEN),
    "lorta-mlp-r16": ((*LORTA, "--target-modules", "all-linear", *LINEAR_ONLY), SEEN),
    "lorta-r16-self": ((*LORTA, *LINEAR_ONLY), ("--calib", "self")),
}


def prepare(directory: Path, steps: int) -> None:
    """Base, fine-tune, the text it was trained on and the text that was held out."""
    from pydoc_data.topics import topics

    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "base" / "tokenizer_config.json").exists():
        dequantise(directory / "base")
    if not (directory / "ft" / "tokenizer_config.json").exists():
        fine_tune(directory / "base", directory / "ft", directory / "heldout.txt", steps)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    (directory / "seen.txt").write_text(text[: len(text) * 9 // 10], encoding="utf-8")


def convert(directory: Path, case: str, steps: int, tokens: int) -> list[Path]:
    """The case data-free and refined (which first compares data-free and whitened); conversions that are there stay."""
    options, text = CASES[case]
    calibration = [option.format(seen=directory / "seen.txt") for option in text]
    made = []
    for suffix, extra in (("", []), ("-refined", [*calibration, "--calib-tokens", str(tokens), "--refine", str(steps)])):
        output = directory / f"{case}{suffix}"
        if not output.exists():
            started = time.monotonic()
            subprocess.run([TOOL, "delta", str(directory / "base"), str(directory / "ft"), *options, *extra, "-o", str(output)], check=True)
            print(f"{output.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        made.append(output)
    return made


def validate(directory: Path, outputs: list[Path]) -> list[dict[str, Any]]:
    """The validator's rows of the base and of every output, on held-out text."""
    report = directory / "refine-report"
    options = ["--text", str(directory / "heldout.txt"), "--context", "128", "--max-tokens", "4096", "--dtype", "float32"]
    options += ["--no-speed", "--no-card", "--no-attribution", "-o", str(report)]
    subprocess.run([TOOL, "validate", str(directory / "base"), str(directory / "ft"), *map(str, outputs), *options], check=False)
    found = json.loads((report / "validation.json").read_text())
    return [found["base"], *found["candidates"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--fine-tune-steps", type=int, default=40)
    arguments = parser.parse_args()
    prepare(arguments.directory, arguments.fine_tune_steps)
    outputs = [path for case in arguments.cases for path in convert(arguments.directory, case, arguments.steps, arguments.tokens)]
    rows = validate(arguments.directory, outputs)
    print("| adapter | chosen | held-out KL while converting | KL | 95 % | recovered | top-1 | bytes |\n|---|---|---|---|---|---|---|---|")
    kept = []
    for row in rows:
        file = Path(row["path"]) / "conversion.json"
        about = json.loads(file.read_text()).get("calibration", {}) if file.exists() else {}
        tried = ", ".join(f"{name} {value:.4f}" for name, value in about.get("candidates", {}).items())
        low, high = row["kl_ci95"]
        print(
            f"| {Path(row['path']).name} | {about.get('chosen', '')} | {tried} | {row['kl']:.4f} | {low:.4f} to {high:.4f} "
            f"| {row['recovered']:.1%} | {row['top1']:.1%} | {row['bytes']} |"
        )
        kept.append({key: row[key] for key in ("path", "kl", "kl_ci95", "recovered", "top1", "bytes")} | {"calibration": about})
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    (arguments.directory / "refine.json").write_text(json.dumps({"threads": threads, "rows": kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
