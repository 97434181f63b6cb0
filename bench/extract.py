"""The same pair through `adapt-convert`, `mergekit-extract-lora` and PEFT's `convert_to_lora`: time, memory and fidelity.

    pip install -c constraints.txt '.[bench]' && python bench/extract.py --sizes 576 2048 4096 --json extract.json

For every hidden size a random bfloat16 Llama of four layers, and a fine-tune of it: a decaying spectrum and noise on all matrices of a
layer. The tools take turns, each run a process of its own, from start to exit. What they wrote is loaded by `peft` and
compared with the fine-tune: captured energy of the targeted matrices, and the error of the logits as a share of the base's.
PEFT converts only what is an adapter already, so the difference goes into a full-rank LoRA (A is the identity) first.
The peers take full SVDs: two to three minutes a layer at 4096 on two cores, which is why the models are so small.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all matrices of a layer: changed and extracted
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
BASELINE = "adapt-convert"


@dataclass(frozen=True)
class Size:
    """Shapes of a small Llama: those of a known model, but for the number of layers."""

    intermediate: int
    heads: int
    kv_heads: int


SIZES = {
    576: Size(1536, 9, 3),  # SmolLM2-135M
    2048: Size(5632, 32, 4),  # TinyLlama-1.1B
    4096: Size(14336, 32, 8),  # Llama-3-8B
}
LAYERS = 4


def make_pair(directory: Path, hidden: int) -> None:
    """`directory/base` and `directory/ft`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = SIZES[hidden]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=1024,
    )
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "base")
    for name, weight in model.named_parameters():
        if name.split(".")[-2] in MODULES:
            weight.data.copy_(weight.data.float() + random_delta(*weight.shape))
    model.save_pretrained(directory / "ft")


def random_delta(rows: int, columns: int) -> torch.Tensor:
    """`(rows, columns)` float32: 64 directions of falling weight, and noise of the same energy."""
    rank = min(64, rows, columns)
    low = (torch.randn(rows, rank) * torch.arange(1, rank + 1) ** -0.5) @ torch.randn(rank, columns)
    noise = torch.randn(rows, columns)
    return 2e-3 * (low / low.norm() + noise / noise.norm()) * (rows * columns) ** 0.5


def command_of(tool: str, directory: Path, output: Path, rank: int) -> list[str]:
    base, ft = str(directory / "base"), str(directory / "ft")
    if tool == "adapt-convert":
        options = ["--rank", str(rank), "--target-modules", ",".join(MODULES), "-o", str(output), "--overwrite"]
        return [_script("adapt-convert"), "delta", base, ft, *options]
    if tool == "mergekit":
        options = ["--model", ft, "--base-model", base, "--out-path", str(output), "--max-rank", str(rank)]
        left_out = [f"--exclude-regex={module}" for module in ("embed_tokens", "lm_head")]
        return [_script("mergekit-extract-lora"), *options, *left_out, "--no-write-model-card", "--no-copy-tokenizer"]
    return [sys.executable, __file__, "--peft", base, ft, str(output), "--rank", str(rank)]


def _script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@torch.no_grad()
def run_peft(base: str, ft: str, output: str, rank: int) -> None:
    """The whole of what a user of `convert_to_lora` has to write for a pair of checkpoints."""
    from peft import LoraConfig, get_peft_model, save_as_lora
    from transformers import AutoModelForCausalLM

    tuned = dict(AutoModelForCausalLM.from_pretrained(ft).named_parameters())
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    shapes = {name.removesuffix(".weight"): weight.shape for name, weight in tuned.items() if name.split(".")[-2] in MODULES}
    ranks = {name: min(shape) for name, shape in shapes.items()}
    config = LoraConfig(r=1, lora_alpha=1, target_modules=list(MODULES), rank_pattern=ranks, alpha_pattern=ranks)
    adapted: Any = get_peft_model(model, config)
    for name, shape in shapes.items():
        layer = adapted.get_submodule(f"base_model.model.{name}")
        difference = tuned[f"{name}.weight"].float() - layer.base_layer.weight.float()
        eye = torch.eye(min(shape))
        tall = shape[0] >= shape[1]
        layer.lora_A["default"].weight.copy_(eye if tall else difference)
        layer.lora_B["default"].weight.copy_(difference if tall else eye)
    save_as_lora(output, adapted, rank=rank)


@torch.no_grad()
def fidelity(directory: Path, adapters: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Captured energy of the targeted matrices and error of the logits, of the adapters as `peft` loads them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory / name, dtype=torch.float32).eval()

    tokens = torch.randint(0, 1024, (4, 64), generator=torch.Generator().manual_seed(1))
    tuned, base = load("ft"), load("base")
    expected, start = tuned(tokens).logits, base(tokens).logits
    old = {name: weight.clone() for name, weight in base.named_parameters()}
    found = {}
    for tool, path in adapters.items():
        model: Any = PeftModel.from_pretrained(load("base"), path).eval()
        logits = model(tokens).logits
        merged = dict(model.merge_and_unload().named_parameters())
        energy = missed = 0.0
        for name, weight in tuned.named_parameters():
            if name.split(".")[-2] in MODULES:
                energy += float((weight - old[name]).double().square().sum())
                missed += float((weight - merged[name]).double().square().sum())
        error = float((logits - expected).norm() / (start - expected).norm())
        found[tool] = {"captured_energy": 1 - missed / energy, "logits_error": error}
    return found


def measure(hidden: int, tools: list[str], rank: int, runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_pair(directory, hidden)
        adapters = {tool: directory / tool for tool in tools}
        times: dict[str, list[measuring.Run]] = {tool: [] for tool in tools}
        for _ in range(runs):
            for tool in tools:
                times[tool].append(measuring.run(command_of(tool, directory, adapters[tool], rank), OFFLINE))
                print(f"{hidden}: {tool} {times[tool][-1].seconds:.2f} s", file=sys.stderr, flush=True)
        kept = fidelity(directory, adapters)
    rows = {}
    for tool in tools:
        ratios = [other.seconds / own.seconds for other, own in zip(times[tool], times[BASELINE], strict=True)]
        rows[tool] = {
            "seconds": statistics.median(run.seconds for run in times[tool]),
            "all_seconds": [run.seconds for run in times[tool]],
            "peak_memory": max(run.peak for run in times[tool]),
            "times_slower": statistics.median(ratios),
            **kept[tool],
        }
    return {"hidden": hidden, "layers": LAYERS, "runs": runs, "tools": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[576], choices=SIZES)
    parser.add_argument("--tools", nargs="+", default=["adapt-convert", "mergekit", "peft"], choices=["adapt-convert", "mergekit", "peft"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peft", nargs=3, help=argparse.SUPPRESS)  # base, fine-tune and output of one run, in its own process
    args = parser.parse_args()
    if args.peft:
        run_peft(*args.peft, args.rank)
        return
    if BASELINE not in args.tools:
        parser.error(f"--tools: {BASELINE} is what the others are compared with")
    results = [measure(hidden, args.tools, args.rank, args.runs) for hidden in args.sizes]
    rows = [
        [
            str(result["hidden"]),
            tool,
            f"{row['seconds']:.2f}",
            f"{row['times_slower']:.1f}",
            f"{row['peak_memory'] / 1e6:.0f}",
            f"{row['captured_energy']:.6f}",
            f"{row['logits_error']:.4f}",
        ]
        for result in results
        for tool, row in result["tools"].items()
    ]
    print(measuring.table(["hidden size", "tool", "s", "x adapt-convert", "peak MB", "captured energy", "logits error"], rows))
    versions = measuring.machine("adapt-convert", "torch", "transformers", "peft", "mergekit")
    measuring.save({**versions, "rank": args.rank, "results": results}, args.json)


if __name__ == "__main__":
    main()
