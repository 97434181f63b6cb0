"""The models that are compared, and the one place in memory where they take turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.architectures import family_of, is_embedding, vocabulary_of
from adapt_convert.convert.opening import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.preflight import make_plan
from adapt_convert.convert.validation.live_model import load_model, quiet, read_config, release
from adapt_convert.formats.checkpoint import TensorStore, weight_files
from adapt_convert.formats.diffusion import refuse_diffusion
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, locate, read_json
from adapt_convert.formats.peft import PREFIX
from adapt_convert.formats.peft_experts import stacked_among
from adapt_convert.formats.source import LATTE_WEIGHTS, adapter_config_path, latte_config_path, shared_lora_config_path

OURS = ("lorta", "latte", "loda")  # loaded by adapt_convert.load; every other adapter is loaded by peft, its own library
CHECKPOINTS = ("base", "fine-tune", "merged")


@dataclass(frozen=True)
class Contender:
    """A model to run: `kind` is base, fine-tune, merged, or an adapter's `peft_type` in small letters."""

    path: str
    kind: str
    location: Location
    bytes: int
    task: str | None = None  # of a bundle that holds several

    @property
    def is_adapter(self) -> bool:
        return self.kind not in CHECKPOINTS


def open_contender(origin: str | Path, kind: str | None = None) -> Contender:
    """Find out what a path or Hub id holds; `kind` is given for the base and the fine-tune. Raises `AdaptError`."""
    location = locate(origin)
    refuse_diffusion(location)
    config_path = adapter_config_path(location)
    if kind == "base" and (config_path or latte_config_path(location)):
        raise AdaptError(f"{origin}: is an adapter; BASE has to be the full model that it was trained on")
    if shared_lora_config_path(location) is not None:
        raise AdaptError(f"{origin}: is a shared LoRA; validate one of its adapters: adapt-convert delta BASE {origin} --task NAME")
    if config_path:
        kind = str(read_json(config_path).get("peft_type", "adapter")).lower()
    latte = latte_config_path(location) is not None
    kind = "latte" if latte else kind
    files = [location.directory / LATTE_WEIGHTS] if latte else weight_files(location)
    try:
        size = sum(path.stat().st_size for path in files)
    except OSError as error:
        raise AdaptError(f"{error.filename}: cannot be read: {error.strerror}") from None
    return Contender(str(origin), kind or "merged", location, size)


def contenders_of(path: str | Path, tasks: Sequence[str]) -> list[Contender]:
    """A candidate, or those tasks of a bundle that are named: it holds the adapters of several fine-tunes. Raises `AdaptError`."""
    contender = open_contender(path)
    held = tasks_of(contender)
    if len(held) < 2:
        return [contender]
    if not tasks:
        raise AdaptError(f"{path}: is a bundle of {', '.join(held)}; say with --tasks which of them is the fine-tune's")
    chosen: dict[int, Contender] = {}  # a task may be named twice, also by its name and its number
    for task in tasks:
        each = replace(contender, task=task)
        chosen.setdefault(task_number(each), each)
    return list(chosen.values())


def check_configs(like: Contender, checkpoints: Sequence[Contender]) -> None:
    """Refuse models whose logits cannot be compared with those of `like`, or that its class would build with other weights.

    A base with fewer tokens will be enlarged. To tokens that only the other model has `like` gives no probability.
    """
    expected = read_config(like.location)
    for contender in checkpoints:
        config = read_config(contender.location)
        size, wanted = vocabulary_of(config), vocabulary_of(expected)
        if (size is None) != (wanted is None) or (contender.kind == "merged" and (size or 0) < (wanted or 0)):
            raise AdaptError(f"{contender.path} has a vocabulary of {size}, {like.path} one of {wanted}: their outputs cannot be compared")
        # A base may have another head than its fine-tune, or none.
        for name in ("model_type", "architectures") if contender.kind == "merged" else ("model_type",):
            found, theirs = config.get(name), expected.get(name)
            if found and theirs and found != theirs:
                raise AdaptError(f"{contender.path}: config.json says {name} {found}, that of {like.path} {theirs}: it is another model")


def tokens_of(base: Contender, fine_tune: Contender) -> tuple[int, int] | None:
    """How many tokens the base and the fine-tune know; None for models that read no text. Of an adapter its tables say it."""
    own = vocabulary_of(read_config(base.location))
    if own is None:
        return None
    if not fine_tune.is_adapter:
        return own, vocabulary_of(read_config(fine_tune.location)) or own
    try:
        opened, source = open_pair(base.path, fine_tune.path)
        entries = make_plan(opened, source, Options()).entries
    except AdaptError:  # of a kind that only its own library reads
        return own, own
    return own, max((entry.part.shape[0] for entry in entries if entry.rows_added and is_embedding(entry.module)), default=own)


class Stage:
    """Holds one model: the base, bare or wearing one adapter, or a whole checkpoint loaded in its place.

    `model` is what is called, `root` the `transformers` model inside it, whose modules carry their own names. The base serves
    all adapters in turn; taking one off puts back every module and value, bit for bit. Where the fine-tune knows more tokens, the base
    is enlarged as a user of the adapter enlarges it, bare and under every adapter: `enlarged` is then from and to how many.
    """

    model: Any
    root: nn.Module

    def __init__(self, base: Contender, fine_tune: Contender, model_class: Any, device: torch.device, dtype: torch.dtype | None) -> None:
        self.base = base
        self.fine_tune = fine_tune
        self.device = device
        self.dtype = dtype
        self.model_class = model_class
        tokens = tokens_of(base, fine_tune)
        self.enlarged = tokens if tokens and tokens[0] < tokens[1] else None
        self._checkpoint: Contender | None = None
        self._current: Contender | None = None
        self._detach: Callable[[], object] | None = None
        self._missing: frozenset[str] | None = None  # what the fine-tune, the first to be loaded, does not store either
        self.ignored: dict[Contender, tuple[str, ...]] = {}  # tensors of an adapter that its library did not load

    def show(self, contender: Contender) -> float:
        """Make `contender` the model that runs; returns the seconds that it took (0 when it was there already)."""
        if contender == self._current:
            return 0.0
        started = time.perf_counter()
        self._take_off()
        checkpoint = self.base if contender.is_adapter else contender
        if checkpoint != self._checkpoint:
            self.clear()
            self._load(checkpoint)
        if contender.is_adapter:
            with quiet():
                self._put_on(contender)
        self._current = contender
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def clear(self) -> None:
        """Forget the model, so that its memory is free."""
        self._take_off()
        if self._checkpoint is not None:
            del self.model, self.root
            self._checkpoint = None
        release(self.device)

    def _load(self, contender: Contender) -> None:
        like = self.fine_tune.location if contender.kind == "base" and not self.fine_tune.is_adapter else None
        tokens = self.enlarged[1] if self.enlarged and contender.kind == "base" else None
        self.model, missing = load_model(contender.location, self.model_class, self.device, self.dtype, like, tokens)
        self.root = self.model
        self.dtype = self.dtype or next(self.root.parameters()).dtype
        self._checkpoint = contender
        if self._missing is None:
            self._missing = missing
        elif contender.kind == "merged" and (lacking := sorted(missing - self._missing)):
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise AdaptError(f"{contender.path}: lacks {lacking[0]}{more}, which transformers would fill with random numbers")

    def _put_on(self, contender: Contender) -> None:
        if contender.kind in OURS:
            from adapt_convert.kernels.attach import load, unload

            model = load(self.root, contender.location.directory)
            self.model = TaskModel(model, task_number(contender)) if contender.task else model
            self._detach = lambda: unload(self.root)
            return
        snapshot = _Snapshot(self.root, contender.location)
        try:
            self.model = _load_peft(self.root, contender)
            self.ignored[contender] = _unloaded_keys(self.model, contender, snapshot)
        except BaseException:
            snapshot.restore(self.root)
            raise
        self._detach = lambda: snapshot.restore(self.root)

    def _take_off(self) -> None:
        if self._detach is not None:
            self._detach()
            self._detach = None
            self.model = self.root
            release(self.device)
        self._current = None


class TaskModel:
    """A model that wears a bundle, called as one of its tasks for every row."""

    def __init__(self, model: Any, number: int) -> None:
        self._model, self._number = model, number

    def __call__(self, **inputs: Any) -> Any:
        from adapt_convert.kernels.attach import task_ids

        with task_ids(self._model, [self._number] * len(inputs["input_ids"])):
            return self._model(**inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def tasks_of(contender: Contender) -> list[str]:
    """The names of the tasks in a LatTE directory."""
    path = latte_config_path(contender.location)
    tasks = read_json(path).get("tasks") if path else None
    return [str(task) for task in tasks] if isinstance(tasks, list) else []


def task_number(contender: Contender) -> int:
    """The number by which a model knows the contender's task, from 1; the task may be given by its name or by that number.

    Raises `AdaptError` for one that is not there.
    """
    names = tasks_of(contender)
    for known in (names, [str(number) for number in range(1, len(names) + 1)]):
        if contender.task in known:
            return known.index(contender.task) + 1
    raise AdaptError(f"--tasks {contender.task}: {contender.path} holds {', '.join(names) or 'none'}")


class _Snapshot:
    """The modules of a model by reference, and copies of the few values that loading an adapter writes over.

    `peft` puts its wrappers in place of modules and, for a tensor that it takes for the model's own (a norm outside
    `modules_to_save`, `base_layer.weight` of an embedding), overwrites the base. Its `unload` does not undo the latter.
    """

    def __init__(self, root: nn.Module, adapter: Location) -> None:
        self._modules = [(m, dict(m._modules), dict(m._parameters), dict(m._buffers)) for m in root.modules()]
        own = {**dict(root.named_parameters()), **dict(root.named_buffers())}
        keys = TensorStore(weight_files(adapter)).infos
        names = {key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in keys}
        self.overwritten = {name for name in names if name in own}
        self._values = {name: (own[name], own[name].detach().clone()) for name in self.overwritten}

    def restore(self, root: nn.Module) -> None:
        for module, modules, parameters, buffers in self._modules:
            module._modules, module._parameters, module._buffers = dict(modules), dict(parameters), dict(buffers)
        for tensor, value in self._values.values():
            tensor.data = value
        for name in ("peft_config", "_hf_peft_config_loaded"):
            with contextlib.suppress(AttributeError):
                delattr(root, name)


def _load_peft(root: nn.Module, contender: Contender) -> Any:
    import peft

    try:
        model = peft.PeftModel.from_pretrained(root, contender.location.directory)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        if "out of memory" in str(error):
            raise
        said = f"it fails on the key {error}" if isinstance(error, KeyError) else str(error)
        lines = said.strip().splitlines() or [type(error).__name__]
        raise AdaptError(f"{contender.path}: peft cannot load it onto the base: {' '.join(lines[:2])[:300]}") from None
    return model.eval()


def _unloaded_keys(model: Any, contender: Contender, snapshot: _Snapshot) -> tuple[str, ...]:
    """Tensors of the adapter file that reached neither the adapter nor the model: `peft` drops them without a word."""
    import peft

    stored: dict[str, Tensor] = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    family = family_of(model.config.to_dict())
    experts = family.experts if family else None
    names = ((key, key.removeprefix(PREFIX).replace(".base_layer.", ".")) for key in TensorStore(weight_files(contender.location)).infos)
    left = (key for key, name in names if key not in stored and name not in snapshot.overwritten)
    return tuple(sorted(key for key in left if not (experts and stacked_among(key, stored, experts))))


@contextlib.contextmanager
def staged(stage: Stage) -> Iterator[Stage]:
    """Clears the stage at the end, whatever happens."""
    try:
        yield stage
    finally:
        stage.clear()
