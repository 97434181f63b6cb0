"""A sharded bfloat16 pair with the shapes of a known model through `adapt-convert`, beside what the machine itself can do.

    python bench/scale.py DIRECTORY --shapes qwen2.5-0.5b --json scale.json      # 2 GB of disk, a few minutes
    python bench/scale.py DIRECTORY --shapes llama-2-7b                          # 28 GB of disk
    python bench/scale.py DIRECTORY --shapes llama-2-7b --layers 8               # eight of its layers

Where there is a GPU, it is used: to make the pair, by the conversions, and for the limits. The pair is made shard by shard and used
again by the next run: random weights, and a fine-tune that changes every tensor, every matrix by 32 directions of falling weight and by
noise of the same energy. Each conversion is a process of its own that finds none of the files in the page cache. In it a thread looks
every few milliseconds at what the others are at, which gives the split of their time. The limits are measured in the same run: reading
both checkpoints from start to end, one after the other, from the disk, and the operations that the conversion spent on products with
deltas, at the rate of a large square product in the same dtype on all cores or on the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import measuring
import torch

from adapt_convert.convert import delta as deltas
from adapt_convert.formats.safetensors_file import LazyTensor, write_safetensors

_SPREAD = 0.02  # standard deviation of the base's weights
_CHANGE = 0.05  # norm of a change, as a share of its matrix
_DIRECTIONS = 32
_LOOK = 0.005  # seconds
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = ("float32", "bfloat16")  # that products with deltas may be in
# By the innermost function of a thread that is named here; anything else below `convert` counts as solving.
_STAGES = {
    "read": {("safetensors_file.py", "read"), ("safetensors_file.py", "_fill"), ("safetensors_file.py", "_opened")},
    "hash": {("checkpoint.py", "read"), ("checkpoint.py", "blocks"), ("checkpoint.py", "_hash")},
    "subtract": {("pairs.py", "_subtract"), ("pairs.py", "_energy")},
    "sketch": {
        ("delta.py", "rough"),
        ("delta.py", "matmul"),
        ("delta.py", "rmatmul"),
        ("basis.py", "_own_gram"),
        ("cp_stream.py", "_gram"),
    },
    "measure": {("delta.py", "residual_energy"), ("delta.py", "inner_product"), ("delta.py", "energy")},
    "write": {("safetensors_file.py", "write_safetensors")},
}
_STAGE_OF = {place: stage for stage, places in _STAGES.items() for place in places}
_IDLE = {"wait", "_worker", "acquire", "result", "_wait_for_tstate_lock", "get"}


@dataclass(frozen=True)
class Shapes:
    """A decoder: `tied` says whether its head is the embedding, `bias` whether q, k and v have biases."""

    model_type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    bias: bool

    def layer(self) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer."""
        d, size = self.hidden, self.hidden // self.heads
        attention = {"q": self.heads * size, "k": self.kv_heads * size, "v": self.kv_heads * size}
        names = {f"self_attn.{role}_proj.weight": (rows, d) for role, rows in attention.items()}
        if self.bias:
            names |= {f"self_attn.{role}_proj.bias": (rows,) for role, rows in attention.items()}
        return names | {
            "self_attn.o_proj.weight": (d, self.heads * size),
            "mlp.gate_proj.weight": (self.intermediate, d),
            "mlp.up_proj.weight": (self.intermediate, d),
            "mlp.down_proj.weight": (d, self.intermediate),
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
        }

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        """Names and shapes of the tensors of every shard: the embeddings, then eight layers each."""
        ends = {"model.embed_tokens.weight": (self.vocab, self.hidden), "model.norm.weight": (self.hidden,)}
        yield ends if self.tied else ends | {"lm_head.weight": (self.vocab, self.hidden)}
        for start in range(0, self.layers, 8):
            layers = range(start, min(start + 8, self.layers))
            yield {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in self.layer().items()}

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM" if self.model_type == "llama" else "Qwen2ForCausalLM"],
            "model_type": self.model_type,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "dtype": "bfloat16",
        }


SHAPES = {
    "tiny": Shapes("llama", 256, 704, 4, 4, 2, 1024, True, False),
    "qwen2.5-0.5b": Shapes("qwen2", 896, 4864, 24, 14, 2, 151936, True, True),
    "llama-2-7b": Shapes("llama", 4096, 11008, 32, 32, 32, 32000, False, False),
    "qwen2.5-7b": Shapes("qwen2", 3584, 18944, 28, 28, 4, 152064, False, True),
}


def make_pair(directory: Path, shapes: Shapes) -> None:
    """`directory/base` and `directory/ft`, one tensor in memory at a time."""
    for side in ("base", "ft"):
        path = directory / side
        config = path / "config.json"
        if config.is_file():
            if json.loads(config.read_text()) != shapes.config():
                raise SystemExit(f"{path} holds a pair of other shapes; name another directory")
            continue
        path.mkdir(parents=True, exist_ok=True)
        weight_map = {}
        shards = list(shapes.shards())
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {name: LazyTensor(shape, torch.bfloat16, _maker(name, shape, side)) for name, shape in shard.items()}
            write_safetensors(path / file, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            print(f"{path / file}", file=sys.stderr, flush=True)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        config.write_text(json.dumps(shapes.config(), indent=1))


def _maker(name: str, shape: tuple[int, ...], side: str) -> Callable[[], torch.Tensor]:
    return lambda: make_tensor(name, shape, side)


def make_tensor(name: str, shape: tuple[int, ...], side: str) -> torch.Tensor:
    """A tensor of one side, bfloat16; the same base for both."""
    draw = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=draw, device=DEVICE)

    value = normal(*shape).mul_(_SPREAD)
    if len(shape) == 1:
        value += 1.0
    if side == "base":
        return value.bfloat16().cpu()
    value = value.bfloat16().float()  # what the base's file holds
    noise = normal(*shape).mul_(_SPREAD * _CHANGE)
    if len(shape) == 2:
        left = normal(shape[0], _DIRECTIONS) * torch.arange(1, _DIRECTIONS + 1, device=DEVICE) ** -0.5
        left *= _SPREAD * _CHANGE / float(left.square().sum(1).mean().sqrt())
        noise.addmm_(left, normal(_DIRECTIONS, shape[1]))
    return value.add_(noise).bfloat16().cpu()


class Watch:
    """Looks at all other threads every `_LOOK` seconds while the block runs: `stages` counts what they were at."""

    def __enter__(self) -> Watch:
        self.stages: Counter[str] = Counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        own, last = threading.get_ident(), time.perf_counter()
        while not self._done.wait(_LOOK):
            now = time.perf_counter()
            for thread, frame in sys._current_frames().items():
                stage = _stage(frame) if thread != own else None
                if stage:
                    self.stages[stage] += now - last  # type: ignore[assignment]
            last = now


def _stage(frame: FrameType | None) -> str | None:
    """What a thread is at; None for one that waits for work."""
    if frame is not None and frame.f_code.co_name in _IDLE:
        return None
    while frame is not None:
        place = (Path(frame.f_code.co_filename).name, frame.f_code.co_name)
        if place in _STAGE_OF:
            return _STAGE_OF[place]
        if place[1] == "convert":
            return "solve"
        frame = frame.f_back
    return "solve"


class Operations:
    """Counts the operations of products with dense deltas, which are all that grow with their size, by what they multiply in."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(DTYPES, 0)
        self._lock = threading.Lock()
        for kind, dtype in ((deltas.DenseDelta, "float32"), (deltas.RoughDelta, "bfloat16")):
            for name in ("matmul", "rmatmul"):
                setattr(kind, name, self._counted(getattr(kind, name), dtype))

    def _counted(self, product: Callable[[Any, torch.Tensor], torch.Tensor], dtype: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        def counted(own: Any, x: torch.Tensor) -> torch.Tensor:
            with self._lock:
                self.totals[dtype] += 2 * own.weight.numel() * x.shape[1]
            return product(own, x)

        counted.__name__ = product.__name__
        return counted


def convert_once(directory: Path, target: str, rank: int, output: Path) -> None:
    """One conversion, watched; prints its figures as JSON."""
    from adapt_convert.convert.conversion import convert

    operations = Operations()
    start = time.perf_counter()
    with Watch() as watch:
        conversion = convert(directory / "base", directory / "ft", to=target, rank=rank)
        conversion.save(output, overwrite=True)
    report = conversion.report
    figures = {
        "seconds": time.perf_counter() - start,
        "peak_memory": report["peak_memory"],
        "captured_energy": report["captured_energy"],
        "bytes": report["bytes"],
        "operations": operations.totals,
        "thread_seconds": {stage: round(seconds, 3) for stage, seconds in watch.stages.most_common()},
    }
    print(json.dumps(figures))


def read_seconds(files: list[Path]) -> float:
    """Reading the files from start to end, from the disk."""
    measuring.drop_from_cache(files)
    buffer = bytearray(2**24)
    start = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def gemm_rate(dtype: str, size: int = 4096) -> float:
    """Operations a second of a square product on all cores, or on the GPU."""
    a, b = (torch.randn(size, size, device=DEVICE).to(getattr(torch, dtype)) for _ in range(2))
    times = []
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def measure(directory: Path, targets: list[str], rank: int, runs: int) -> dict[str, Any]:
    files = sorted(path for side in ("base", "ft") for path in (directory / side).glob("*.safetensors"))
    found: dict[str, list[dict[str, Any]]] = {target: [] for target in targets}
    reads: list[float] = []
    rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    for _ in range(runs):
        reads.append(read_seconds(files))
        for dtype in DTYPES:
            rates[dtype].append(gemm_rate(dtype))
        for target in targets:
            measuring.drop_from_cache(files)
            with tempfile.TemporaryDirectory(dir=directory) as name:
                command = [sys.executable, __file__, str(directory), "--once", target, name, "--rank", str(rank)]
                found[target].append(json.loads(measuring.output(command).splitlines()[-1]))
            print(f"{target}: {found[target][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    read, rate = statistics.median(reads), {dtype: statistics.median(own) for dtype, own in rates.items()}
    rows = {}
    for target, results in found.items():
        middle = sorted(results, key=lambda result: result["seconds"])[len(results) // 2]
        products = sum(count / rate[dtype] for dtype, count in middle["operations"].items())
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(results, found[targets[0]], strict=True)]
        rows[target] = middle | {
            "all_seconds": [result["seconds"] for result in results],
            "peak_memory": max(result["peak_memory"] for result in results),
            "gemm_limit": products,
            "over_limits": middle["seconds"] / (read + products),
            f"over_{targets[0]}": statistics.median(ratios),
        }
    nbytes = sum(path.stat().st_size for path in files)
    return {"bytes": nbytes, "read_seconds": read, "read_rate": nbytes / read, "gemm_rate": rate, "targets": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shapes", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="so many instead of all")
    parser.add_argument("--targets", nargs="+", default=["lora", "lorta", "latte"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)  # target and output of one conversion, in its own process
    args = parser.parse_args()
    if args.once:
        convert_once(args.directory, args.once[0], args.rank, Path(args.once[1]) / "out")
        return
    shapes = replace(SHAPES[args.shapes], layers=args.layers or SHAPES[args.shapes].layers)
    make_pair(args.directory, shapes)
    result = measure(args.directory, args.targets, args.rank, args.runs)
    print(
        f"read {result['bytes'] / 1e9:.2f} GB from the disk in {result['read_seconds']:.2f} s ({result['read_rate'] / 1e9:.2f} GB/s); "
        f"square products: {', '.join(f'{rate / 1e9:.0f} GFLOP/s in {dtype}' for dtype, rate in result['gemm_rate'].items())}\n"
    )
    rows = []
    for target, row in result["targets"].items():
        split = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row["thread_seconds"].items())
        limits = f"{result['read_seconds']:.1f} + {row['gemm_limit']:.1f}"
        times = [f"{row['seconds']:.1f}", f"{row['over_' + args.targets[0]]:.2f}", limits, f"{row['over_limits']:.2f}"]
        rows.append([target, *times, f"{row['peak_memory'] / 1e6:.0f}", f"{row['captured_energy']:.4f}", split])
    header = [
        "target",
        "s",
        f"/ {args.targets[0]}",
        "read + products, s",
        "/ limits",
        "peak MB",
        "captured energy",
        "thread seconds",
    ]
    print(measuring.table(header, rows))
    machine = measuring.machine("adapt-convert", "torch") | {"gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None}
    measuring.save({**machine, "shapes": args.shapes, "layers": shapes.layers, "rank": args.rank, **result}, args.json)


if __name__ == "__main__":
    main()
