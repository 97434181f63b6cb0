"""The demonstration: a small model, a fine-tune of all its weights, the conversions, and what they keep; without a network."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sysconfig
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.conversion import convert
from adapt_convert.convert.progress import Progress, silent
from adapt_convert.convert.side_by_side import single_thread
from adapt_convert.convert.validation.live_model import quiet
from adapt_convert.formats.atomic import atomic_directory
from adapt_convert.formats.errors import AdaptError
from adapt_convert.kernels.attach import load

TARGETS = {"lorta": "LoRTA", "lora": "LoRA"}
RANK = 16
END = 256  # the one token that is no byte: it separates documents
END_TEXT = "<|endoftext|>"
HELDOUT_SHARE = 0.1  # of the prose, kept from the fine-tune
MARKER = "demo.json"
_CHECKPOINT_FILES = (MARKER, "heldout.txt", "base/model.safetensors", "ft/model.safetensors")


@dataclass(frozen=True)
class Recipe:
    """What the demo trains: a Llama of these sizes, for so many steps of `batch` windows of `context` bytes.

    `code_bytes` caps the text of the base; `base_rate` and `tune_rate` are the peak learning rates.
    """

    width: int = 96
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    mlp: int = 256
    context: int = 128
    batch: int = 8
    base_steps: int = 800
    tune_steps: int = 300
    base_rate: float = 4e-3
    tune_rate: float = 2e-3
    code_bytes: int = 1_500_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.key_value_heads or (self.width // self.heads) % 2:
            raise AdaptError(f"{self}: heads must divide width into even parts, and key_value_heads must divide heads")

    def digest(self) -> str:
        """By this a later run knows whether the checkpoints that it finds are the ones it would train."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


DEFAULT = Recipe()


def run_demo(directory: Path, progress: Progress = silent, recipe: Recipe = DEFAULT) -> dict[str, Any]:
    """Train a base and a fine-tune in `directory` (or use those of an earlier run), convert, and measure.

    Returns `models`, one row {name, perplexity, captured_energy, bytes, path} for the base, the fine-tune and each adapter
    (perplexity per byte of `heldout`; captured energy of the factored matrices, None for a checkpoint), and `commands`, the
    shell lines that do the same conversions. Raises `AdaptError` when the directory holds anything else, or without the extra `run`.
    """
    _require_run_extra()
    finished = _is_finished(directory, recipe)
    with quiet(), single_thread(), torch.random.fork_rng(devices=[]):
        if not finished:
            _make_checkpoints(directory, recipe, progress)
        heldout = directory / "heldout.txt"
        windows = _windows(_tokens([heldout.read_bytes()]), recipe.context)
        rows = [_checkpoint_row(name, directory / part, windows) for name, part in (("base", "base"), ("fine-tune", "ft"))]
        rows += [_adapter_row(directory, target, windows, progress) for target in TARGETS]
    return {"models": rows, "commands": [_command(directory, target) for target in TARGETS], "heldout": str(heldout)}


def _require_run_extra() -> None:
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing:
        raise AdaptError(f"the demo runs models and needs {' and '.join(missing)}: pip install 'adapt-convert[run]'")


def _is_finished(directory: Path, recipe: Recipe) -> bool:
    """Whether the checkpoints are there. Raises `AdaptError` rather than touch a directory that holds anything else."""
    if not directory.exists() and not directory.is_symlink():
        return False
    if not directory.is_dir():
        raise AdaptError(f"{directory} is not a directory; name another one for the demo")
    if not any(directory.iterdir()):
        return False
    if not (directory / MARKER).is_file():
        raise AdaptError(f"{directory} holds files that are not the demo's; name another directory, or one that does not exist yet")
    if (directory / MARKER).read_text(encoding="utf-8") != _marker(recipe):
        raise AdaptError(f"{directory} holds the demo of another version; remove it, or name another directory")
    lost = next((name for name in _CHECKPOINT_FILES if not (directory / name).is_file()), None)
    if lost:
        raise AdaptError(f"{directory / lost} is gone; remove {directory} to train it again")
    return True


def _marker(recipe: Recipe) -> str:
    return json.dumps({"recipe": asdict(recipe), "sha256": recipe.digest()}, indent=1) + "\n"


def _make_checkpoints(directory: Path, recipe: Recipe, progress: Progress) -> None:
    """Train both models into `directory`, all or nothing: an interrupted run leaves no directory that looks finished."""
    code, (tuned, heldout) = _code(recipe.code_bytes), prose()
    with atomic_directory(directory, overwrite=True) as staging:
        torch.manual_seed(recipe.seed)
        model = _new_model(recipe)
        _train(model, _tokens(code), recipe.base_steps, recipe.base_rate, recipe, progress, "training the base")
        _save(model, staging / "base")
        _train(model, _tokens(tuned), recipe.tune_steps, recipe.tune_rate, recipe, progress, "fine-tuning it")
        _save(model, staging / "ft")
        (staging / "heldout.txt").write_bytes(heldout)
        (staging / MARKER).write_text(_marker(recipe), encoding="utf-8")


def _code(size: int) -> list[bytes]:
    """At most `size` bytes of the standard library's own source, the start of each file in the order of names."""
    root = Path(sysconfig.get_path("stdlib"))
    documents: list[bytes] = []
    for path in sorted(root.glob("*.py")):
        documents.append(path.read_bytes()[: min(40_000, size - sum(map(len, documents)))])
    documents = [document for document in documents if document]
    if sum(map(len, documents)) < min(size, 100_000):
        raise AdaptError(f"{root}: this Python comes without the sources of its library, on which the demo trains")
    return documents


def prose() -> tuple[list[bytes], bytes]:
    """The language reference in `pydoc_data`: paragraphs to train on, and the last of them to measure on.

    Topics quote each other at length; each paragraph is kept once, so that nothing held out has been trained on.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise AdaptError("this Python comes without pydoc_data, on which the demo fine-tunes") from None
    paragraphs = [part.strip("\n") for name in sorted(topics) for part in topics[name].split("\n\n") if part.strip()]
    kept = list({" ".join(part.split()): part for part in paragraphs}.values())
    cut = round(len(kept) * (1 - HELDOUT_SHARE))
    return ["\n\n".join(kept[:cut]).encode()], "\n\n".join(kept[cut:]).encode()


def _tokens(documents: list[bytes]) -> Tensor:
    """One token per byte, its value; END after each document but the last."""
    return torch.tensor([token for document in documents for token in (END, *document)][1:])


def _windows(tokens: Tensor, context: int) -> Tensor:
    """`(n, context)`: the tokens in consecutive windows; the rest that fills none is left out."""
    return tokens[: len(tokens) // context * context].view(-1, context)


def _new_model(recipe: Recipe) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=recipe.width,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=4 * recipe.context,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def _save(model: Any, directory: Path) -> None:
    """An ordinary checkpoint with its tokenizer."""
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)


def _tokenizer() -> Any:
    """Bytes as tokens, in the form that `AutoTokenizer` reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level tokenizers write a byte as a printable character: itself, or else the next one from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_TEXT)
    wrap: Any = PreTrainedTokenizerFast
    return wrap(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _train(model: nn.Module, tokens: Tensor, steps: int, rate: float, recipe: Recipe, progress: Progress, what: str) -> None:
    """AdamW on random windows; the rate rises over the first twentieth of the steps and then falls to nothing."""
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / (steps / 20), 1 - step / steps))
    model.train()
    for _ in progress(range(steps), what):
        starts = torch.randint(len(tokens) - recipe.context, (recipe.batch, 1), generator=generator)
        torch.autograd.backward(_loss(model, tokens[starts + torch.arange(recipe.context)]))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, in nats."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def _perplexity(model: nn.Module, windows: Tensor) -> float:
    """Perplexity per byte."""
    model.eval()
    batches = [windows[start : start + 32] for start in range(0, len(windows), 32)]
    return math.exp(sum(_loss(model, batch).item() * len(batch) for batch in batches) / len(windows))


def _read_model(directory: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model


def _checkpoint_row(name: str, directory: Path, windows: Tensor) -> dict[str, Any]:
    return {
        "name": name,
        "perplexity": _perplexity(_read_model(directory), windows),
        "captured_energy": None,
        "bytes": (directory / "model.safetensors").stat().st_size,
        "path": str(directory),
    }


def _adapter_row(directory: Path, target: str, windows: Tensor, progress: Progress) -> dict[str, Any]:
    """Convert, write, and load what was written back onto a fresh base."""
    output = _output(directory, target)
    conversion = convert(directory / "base", directory / "ft", to=target, rank=RANK, progress=progress)
    conversion.save(output, overwrite=True)
    return {
        "name": f"{TARGETS[target]} of rank {RANK}",
        "perplexity": _perplexity(_with_adapter(_read_model(directory / "base"), target, output), windows),
        "captured_energy": conversion.report["captured_energy"],
        "bytes": conversion.report["bytes"],
        "path": str(output),
    }


def _with_adapter(model: nn.Module, target: str, adapter: Path) -> nn.Module:
    if target == "lorta":
        return load(model, adapter)
    from peft import PeftModel

    adapted: nn.Module = PeftModel.from_pretrained(model, adapter)
    return adapted


def _output(directory: Path, target: str) -> Path:
    return directory / f"ft-{target}-r{RANK}"


def _command(directory: Path, target: str) -> str:
    base, tuned, output = (shlex.quote(str(path)) for path in (directory / "base", directory / "ft", _output(directory, target)))
    return f"adapt-convert delta {base} {tuned} --to {target} --rank {RANK} -o {output} --overwrite"
