"""Time per decoded token and per prefill: base, merged, unmerged LoRAs, and LatTE, with one and with eight tasks in the model.

    python bench/latte_decode.py --json latte_decode.json --profile

All variants hold the same adapter (planted in one subspace, so that LatTE is exact) on the same random model, Qwen2.5-0.5B-shaped
by default; no time is reported unless their logits agree first. The variants take turns token by token, so that what else the
machine does meets all of them alike, each time in another order; reported are medians, and medians of the ratios within a turn.
`--profile` then says what a token is spent on: weights read, operations called, time in matrix products and outside of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import platform
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import transformers

import adapt_convert
from adapt_convert.convert.delta import LowRankDelta
from adapt_convert.formats.latte import LatteAdapter, LatteTask, Segment, fingerprint
from adapt_convert.formats.peft import LoraAdapter

READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
TASKS = 8
TARGETS = [("LatTE 1 task", "base", 1.04), ("LatTE 1 task", "LoRA 1 task (peft)", 0.88), ("LatTE 8 tasks", "LatTE 1 task", 1.10)]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv")


def make_base(args: argparse.Namespace) -> Any:
    config = transformers.Qwen2Config(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).eval()
    return model.to(args.device, getattr(torch, args.dtype)).requires_grad_(False)


def make_adapter(model: Any, rank: int) -> LatteAdapter:
    """Eight random tasks within one random basis; about as large as a light fine-tune."""
    generator = torch.Generator().manual_seed(1)
    config = model.config
    Q = torch.linalg.qr(torch.randn(config.hidden_size, rank, generator=generator)).Q
    tasks = [LatteTask(f"task{number}") for number in range(1, TASKS + 1)]
    for task in tasks:
        for layer in range(config.num_hidden_layers):
            for name in (*READERS, *WRITERS):
                module = f"model.layers.{layer}.{name}"
                rows, columns = model.get_submodule(module).weight.shape
                if name in READERS:
                    task.readers[module] = 0.02 * torch.randn(rows, rank, generator=generator)
                else:
                    task.writers[module] = 0.02 * torch.randn(rank, columns, generator=generator)
    weights = {module: model.get_submodule(module).weight for module in (*tasks[0].readers, *tasks[0].writers)}
    prints = {module: fingerprint(weight, weight.dtype) for module, weight in weights.items()}
    return LatteAdapter("qwen2", [Segment(0, config.num_hidden_layers, Q)], tasks, prints)


def twin(base: Any) -> Any:
    """A copy of the base that shares its embedding table and nothing else."""
    table = base.model.embed_tokens.weight
    return copy.deepcopy(base, {id(table): table})


def merged(base: Any, adapter: LatteAdapter) -> Any:
    model, Q, task = twin(base), adapter.segments[0].Q, adapter.tasks[0]
    for module, block in task.readers.items():  # all norm gains of a fresh model are one
        weight = model.get_submodule(module).weight
        weight += (block @ Q.T).to(weight)
    for module, block in task.writers.items():
        weight = model.get_submodule(module).weight
        weight += (Q @ block).to(weight)
    return model


def write_loras(adapter: LatteAdapter, tasks: int, directory: Path) -> list[Path]:
    """The same adapters as PEFT LoRAs, one for each of the first `tasks`."""
    Q, paths = adapter.segments[0].Q, []
    for task in adapter.tasks[:tasks]:
        factors = {module: LowRankDelta(block, Q.T.contiguous()) for module, block in task.readers.items()}
        factors |= {module: LowRankDelta(Q, block) for module, block in task.writers.items()}
        paths.append(directory / task.name)
        paths[-1].mkdir()
        LoraAdapter(factors=factors, all_modules=list(factors)).write(paths[-1])
    return paths


def with_peft(base: Any, adapter: LatteAdapter, tasks: int) -> Any:
    with tempfile.TemporaryDirectory() as name:
        first, *others = write_loras(adapter, tasks, Path(name))
        model = peft.PeftModel.from_pretrained(twin(base), first, adapter_name=adapter.tasks[0].name)
        for task, path in zip(adapter.tasks[1:], others, strict=False):
            model.load_adapter(path, task.name)
    return model.eval().requires_grad_(False)


def with_grouped_loras(base: Any, adapter: LatteAdapter, tasks: int) -> Any:
    with tempfile.TemporaryDirectory() as name:
        return adapt_convert.load(twin(base), write_loras(adapter, tasks, Path(name)))


def with_latte(base: Any, adapter: LatteAdapter, tasks: int) -> Any:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "latte"
        directory.mkdir()
        part = LatteAdapter(adapter.model_type, adapter.segments, adapter.tasks[:tasks], adapter.fingerprints)
        part.write(directory)
        return adapt_convert.load(twin(base), directory)


def clock(device: str) -> Callable[[Callable[[], Any]], float]:
    """Seconds of one call: CUDA events on a GPU."""

    def on_cpu(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def on_gpu(call: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000

    return on_gpu if device.startswith("cuda") else on_cpu


class Runner:
    """One variant with its own cache; `rows` of the batch are of the tasks `ids`, where it has tasks to choose from."""

    def __init__(self, model: Any, ids: list[int] | None) -> None:
        self.model, self.ids, self.cache = model, ids, None

    def call(self, tokens: torch.Tensor, cache: Any) -> Any:
        chosen: Any = contextlib.nullcontext()
        extra = {}
        if self.ids is not None and isinstance(self.model, peft.PeftModel):
            extra = {"adapter_names": [f"task{number}" for number in self.ids]}
        elif self.ids is not None:
            chosen = adapt_convert.task_ids(self.model, self.ids)
        with chosen:
            return self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.call(tokens, transformers.DynamicCache())
        self.cache = out.past_key_values
        return out.logits[:, -1]

    def step(self, token: torch.Tensor) -> None:
        self.call(token, self.cache)


def measure(runners: dict[str, Runner], prompt: torch.Tensor, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    timed, shuffle = clock(args.device), random.Random(0)
    order = list(runners.items())
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "token": []} for name in runners}
    for turn in range(args.prefills + 1):
        shuffle.shuffle(order)
        for name, runner in order:
            seconds = timed(lambda runner=runner: runner.prefill(prompt))
            times[name]["prefill"] += [seconds] if turn else []
    token = prompt[:, :1]
    for turn in range(args.tokens + 2):
        shuffle.shuffle(order)
        for name, runner in order:
            seconds = timed(lambda runner=runner: runner.step(token))
            times[name]["token"] += [seconds] if turn > 1 else []
    return times


def check(runners: dict[str, Runner], prompt: torch.Tensor, dtype: str) -> None:
    """All adapted variants give the merged model's logits on the first row, which is of task 1."""
    expected = runners["merged"].prefill(prompt)[0].float()
    distance = (expected - runners["base"].prefill(prompt)[0].float()).norm() / expected.norm()
    for name, runner in runners.items():
        error = float((runner.prefill(prompt)[0].float() - expected).norm() / expected.norm())
        if name != "base" and error > (1e-4 if dtype == "float32" else 0.2) * float(distance):
            raise SystemExit(f"{name}: its logits are off by {error:.2e}, the adapter moves them by {float(distance):.2e}; not timed")


def profile(runners: dict[str, Runner], token: torch.Tensor, tokens: int = 10) -> list[dict[str, Any]]:
    """Of one decoded token: weights read, operations called, and milliseconds in products, in other operations and in Python."""
    rows = []
    for name, runner in runners.items():
        for _ in range(2):
            runner.step(token)
        start = time.perf_counter()
        for _ in range(tokens):
            runner.step(token)
        wall = (time.perf_counter() - start) * 1000 / tokens
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            for _ in range(tokens):
                runner.step(token)
        events = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
        own = {key: sum(e.self_cpu_time_total for e in events if (e.key in PRODUCTS) == key) / 1000 / tokens for key in (True, False)}
        rows.append(
            {
                "variant": name,
                "weights": sum(t.numel() for t in (*runner.model.parameters(), *runner.model.buffers())),
                "operations": sum(event.count for event in events) / tokens,
                "wall_ms": wall,
                "products_ms": own[True],
                "other_operations_ms": own[False],
            }
        )
    return rows


def print_profile(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'one token, batch 1':<24}{'M weights':>11}{'operations':>12}{'ms':>8}{'products':>10}{'other ops':>11}")
    for row in rows:
        numbers = f"{row['weights'] / 1e6:>11.1f}{row['operations']:>12.0f}{row['wall_ms']:>8.1f}"
        print(f"{row['variant']:<24}{numbers}{row['products_ms']:>10.1f}{row['other_operations_ms']:>11.1f}")


def summarise(times: dict[str, dict[str, list[float]]], batch: int) -> list[dict[str, Any]]:
    rows = []
    for name, own in times.items():
        row: dict[str, Any] = {"batch": batch, "variant": name}
        for what in ("token", "prefill"):
            row[f"{what}_ms"] = 1000 * statistics.median(own[what])
            for other in times:
                ratios = [a / b for a, b in zip(own[what], times[other][what], strict=True)]
                row.setdefault(f"{what}_over", {})[other] = statistics.median(ratios)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'batch':>5}  {'variant':<24}{'ms/token':>10}{'/ base':>8}{'prefill ms':>12}{'/ base':>8}")
    for row in rows:
        over = row["token_over"]["base"], row["prefill_over"]["base"]
        print(f"{row['batch']:>5}  {row['variant']:<24}{row['token_ms']:>10.2f}{over[0]:>8.3f}{row['prefill_ms']:>12.1f}{over[1]:>8.3f}")
    for name, other, target in TARGETS:
        for row in rows:
            if row["variant"] == name and other in row["token_over"] and other != name:
                value = row["token_over"][other]
                verdict = "reached" if value <= target else "not reached"
                print(f"batch {row['batch']}: {name} / {other}: {value:.3f} per token (to reach: {target}: {verdict})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 896, "intermediate": 4864, "layers": 24, "heads": 14, "kv-heads": 2, "vocab": 151936}
    for name, default in {**sizes, "rank": 16, "prompt": 128, "tokens": 24, "prefills": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        base = make_base(args)
        adapter = make_adapter(base, args.rank)
        single = {"base": base, "merged": merged(base, adapter), "LoRA 1 task (peft)": with_peft(base, adapter, 1)}
        single["LatTE 1 task"] = with_latte(base, adapter, 1)
        mixed = {"LoRA 8 tasks (peft)": with_peft(base, adapter, TASKS), "LoRA 8 tasks (grouped)": with_grouped_loras(base, adapter, TASKS)}
        mixed["LatTE 8 tasks"] = with_latte(base, adapter, TASKS)
        rows, profiled = [], []
        for batch in (1, TASKS):
            runners = {name: Runner(model, None) for name, model in single.items()}
            runners |= {name: Runner(model, list(range(1, batch + 1))) for name, model in mixed.items()}
            length = args.prompt if batch == 1 else args.prompt // TASKS
            prompt = torch.randint(0, args.vocab, (batch, length), generator=torch.Generator().manual_seed(2)).to(args.device)
            check(runners, prompt, args.dtype)
            rows += summarise(measure(runners, prompt, args), batch)
            if args.profile and batch == 1:
                profiled = profile(runners, prompt[:, :1])
    print_table(rows)
    if profiled:
        print_profile(profiled)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    result = {
        "device": device,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "arguments": vars(args) | {"json": None},
        "rows": rows,
        "profile": profiled,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
