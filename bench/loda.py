"""LoDA on a real model: what its maps gain on a LoRA of the same rank, matrix by matrix and in the model's outputs, and what it costs.

    python bench/loda.py DIRECTORY

DIRECTORY is one of bench/smollm2.py or `adapt-convert demo`, with `base`, `ft` and `heldout.txt`: the first nine tenths of Python's
language reference, on which the fine-tune was trained, calibrate, and KL is measured on the held-out rest. Seed 0. A finished
conversion is used again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from adapters import convert_once, reference, validated
from measuring import machine, save, table

ROWS: dict[str, list[str]] = {
    "lora": ["--to", "lora"],
    "loda": ["--to", "loda"],
    "loda+": ["--to", "loda+"],
    "r-loda": ["--to", "r-loda", "--base-rank", "{base_rank}"],
    "s-loda, 60 % kept": ["--to", "s-loda", "--keep", "0.6"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--base-rank", type=int, default=96, metavar="K")
    parser.add_argument("--calib-tokens", type=int, default=8192)
    parser.add_argument("--refine", type=int, metavar="N", help="Also a LoRA and a LoDA with N steps of refinement.")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    text = arguments.directory / "calibration.txt"
    text.write_text(reference()[0], encoding="utf-8")
    calibrated = ["--calib", str(text), "--calib-tokens", str(arguments.calib_tokens)]
    rows = {
        name: [option.format(base_rank=arguments.base_rank) for option in options] + (calibrated if name != "lora" else [])
        for name, options in ROWS.items()
    }
    if arguments.refine:
        for target in ("lora", "loda"):
            rows[f"{target}, refined"] = ["--to", target, *calibrated, "--refine", str(arguments.refine)]
    adapters = {name: arguments.directory / f"loda-bench-{number}" for number, name in enumerate(rows)}
    for name, options in rows.items():
        convert_once(arguments.directory, adapters[name], [*options, "--rank", str(arguments.rank), "--exclude", "embed_tokens"])
    validation = validated(arguments.directory, list(adapters.values()), arguments.directory / "loda-report", max_tokens=8192)
    figures = [
        _figures(name, json.loads((path / "conversion.json").read_text()), candidate)
        for (name, path), candidate in zip(adapters.items(), validation["candidates"], strict=True)
    ]
    header = ["", "KL", "recovered", "MB", "fitted error / LoRA's: mean", "largest", "less in", "written", "MACs per token"]
    print(table(header, [_cells(row) for row in figures]))
    print(f"\nKL of the base: {validation['base']['kl']:.4f}; rank {arguments.rank}, {arguments.calib_tokens} tokens of calibration")
    save({"machine": machine("torch", "transformers"), "base_kl": validation["base"]["kl"], "rows": figures}, arguments.json)


def _figures(name: str, report: dict[str, Any], candidate: dict[str, Any]) -> dict[str, Any]:
    loda = report.get("loda")
    ratios = [row["least_error"] / row["lora_error"] for row in loda["matrices"].values()] if loda else []
    return {
        "name": name,
        "kl": candidate["kl"],
        "recovered": candidate["recovered"],
        "bytes": report["bytes"],
        "mean_ratio": statistics.fmean(ratios) if ratios else None,
        "largest_ratio": max(ratios) if ratios else None,
        "below": sum(ratio < 1 for ratio in ratios),
        "matrices": len(ratios),
        "macs": loda["macs_per_token"] if loda else None,
        "macs_of_lora": loda["macs_per_token_of_lora"] if loda else None,
        "chosen": report.get("calibration", {}).get("chosen"),
        "candidates": report.get("calibration", {}).get("candidates"),
    }


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["name"], f"{row['kl']:.4f}", f"{row['recovered']:.1%}", f"{row['bytes'] / 1e6:.2f}"]
    if row["mean_ratio"] is None:
        return [*cells, *"-" * 3, row["chosen"] or "-", "-"]
    return [
        *cells,
        f"{row['mean_ratio']:.3f}",
        f"{row['largest_ratio']:.3f}",
        f"{row['below']} of {row['matrices']}",
        row["chosen"],
        f"{row['macs'] / 1e6:.2f} M (LoRA {row['macs_of_lora'] / 1e6:.2f} M)",
    ]


if __name__ == "__main__":
    main()
