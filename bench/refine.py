"""What calibration and refinement bring: on SmolLM2-135M-Instruct and the fine-tune of bench/smollm2.py, or on the pair of the demo.

    pip install gguf && python bench/refine.py DIRECTORY [--cases lora-r4 lorta-r16 ...]
    python bench/refine.py DIRECTORY --pair demo --steps 300

Fits to the nine tenths of Python's language reference that the fine-tune was trained on, to text that the fine-tune writes, or to unrelated
text, and measures with the validator on the last tenth, which neither the fine-tune nor the conversions have seen. A finished
conversion is used again; the table goes to standard output and, with the losses, to DIRECTORY/refine.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path

import torch
from adapters import TOOL, convert_once, reference, validated
from smollm2 import dequantise, fine_tune

LORA = ("--to", "lora", "--rank", "4", "--target-modules", "all-linear")
LINEAR_ONLY = ("--exclude", "embed_tokens,lm_head,input_layernorm,post_attention_layernorm,norm")
LORTA = ("--to", "lorta", "--rank", "16")
LATTE = ("--to", "latte", "--rank", "32", "--segments", "1", "--target-modules", "all-linear", "--exclude", "embed_tokens,lm_head,norm")
WITH_TABLE = ("--to", "lora", "--rank", "14", "--target-modules", "all-linear,embed_tokens")
STORED_WHOLE = ("--to", "lora", "--rank", "16", "--target-modules", "all-linear")  # embedding and head, as mergekit stores them
SEEN = ("--calib", "{seen}")
UNRELATED = ("--calib", "{unrelated}")
# name: options of `delta`, with which an adapter is made without text; and the text with which it is refined, if it is
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "lora-r4": ((*LORA, *LINEAR_ONLY), SEEN),
    "lorta-r16": ((*LORTA, *LINEAR_ONLY), SEEN),
    "latte-r32": (LATTE, SEEN),
    "lora-table-r14": (WITH_TABLE, SEEN),
    "lora-r16-stored": (STORED_WHOLE, ()),
    "lorta-mlp-r16": ((*LORTA, "--target-modules", "all-linear", *LINEAR_ONLY), SEEN),
    "lorta-r16-self": ((*LORTA, *LINEAR_ONLY), ("--calib", "self")),
    "lora-r4-unrelated": ((*LORA, *LINEAR_ONLY), UNRELATED),
    "lorta-r16-unrelated": ((*LORTA, *LINEAR_ONLY), UNRELATED),
}
UNRELATED_TOKENS = 65536


def prepare_demo(directory: Path) -> None:
    """The demo's pair in `directory`, the text its fine-tune was trained on and the text that was held out."""
    from adapt_convert.convert.demo import prose

    demo = directory / "demo"
    subprocess.run([TOOL, "demo", str(demo)], check=True)
    for name in ("base", "ft", "heldout.txt"):
        if not (directory / name).exists():
            (directory / name).symlink_to(demo / name)
    (directory / "seen.txt").write_bytes(prose()[0][0])


def prepare_smollm2(directory: Path, steps: int) -> None:
    """Base, fine-tune, the text it was trained on and the text that was held out."""
    if not (directory / "base" / "tokenizer_config.json").exists():
        dequantise(directory / "base")
    if not (directory / "ft" / "tokenizer_config.json").exists():
        fine_tune(directory / "base", directory / "ft", directory / "heldout.txt", steps)
    (directory / "seen.txt").write_text(reference()[0], encoding="utf-8")


def write_unrelated(directory: Path) -> None:
    """Rows of random tokens, every one as likely as any other: no text that a fine-tune was made for."""
    size = json.loads((directory / "base" / "config.json").read_text())["vocab_size"]
    rows = torch.randint(size, (UNRELATED_TOKENS // 128, 128), generator=torch.Generator().manual_seed(0)).tolist()
    (directory / "unrelated.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))


def convert(directory: Path, case: str, steps: int, tokens: int) -> list[Path]:
    """The case without text, and refined (which first compares data-free and whitened); conversions that are there stay."""
    options, text = CASES[case]
    calibration = [option.format(seen=directory / "seen.txt", unrelated=directory / "unrelated.jsonl") for option in text]
    made = []
    refined = [("-refined", [*calibration, "--calib-tokens", str(tokens), "--refine", str(steps)])] if text else []
    for suffix, extra in (("", list[str]()), *refined):
        made.append(directory / f"{case}{suffix}")
        convert_once(directory, made[-1], [*options, *extra])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pair", choices=("smollm2", "demo"), default="smollm2")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--fine-tune-steps", type=int, default=40)
    arguments = parser.parse_args()
    arguments.directory = arguments.directory.resolve()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    prepare_demo(arguments.directory) if arguments.pair == "demo" else prepare_smollm2(arguments.directory, arguments.fine_tune_steps)
    write_unrelated(arguments.directory)
    outputs = [path for case in arguments.cases for path in convert(arguments.directory, case, arguments.steps, arguments.tokens)]
    validation = validated(arguments.directory, outputs, arguments.directory / "refine-report", max_tokens=4096)
    print("| adapter | chosen | held-out KL while converting | KL | 95 % | recovered | top-1 | bytes |\n|---|---|---|---|---|---|---|---|")
    kept = []
    for row in (validation["base"], *validation["candidates"]):
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
