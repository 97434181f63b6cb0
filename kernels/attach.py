"""Putting an adapter onto a live `transformers` model, choosing adapters row by row, and taking it all off again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import locate, read_json
from adapt_convert.formats.loda_config import PEFT_TYPE as LODA
from adapt_convert.formats.peft import CONFIG, read_lora
from adapt_convert.formats.source import LORTA, Source, adapter_config_path, latte_config_path, shared_lora_config_path
from adapt_convert.kernels.latte import load_latte
from adapt_convert.kernels.loda_modules import load_loda
from adapt_convert.kernels.lora_modules import load_loras
from adapt_convert.kernels.lorta_modules import load_lorta
from adapt_convert.kernels.shared_lora_modules import load_shared_lora
from adapt_convert.kernels.surgery import STATE, Replaced


def load(model: nn.Module, adapter: str | Path | Sequence[str | Path], revision: str | None = None) -> nn.Module:
    """Add a LoRTA, LatTE, LoDA or shared LoRA directory to `model` in place and return it; `unload` takes it off.

    Several PEFT LoRAs at once, as a list, serve mixed batches: `task_ids` then chooses row by row. A single LoRA is loaded by
    `peft`, its own library. `model` is the base, loaded by `transformers`. Raises `AdaptError` when the adapter does not fit it;
    the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise AdaptError(
            f"load: {type(model).__name__} is no model; load it with transformers first, as AutoModelForCausalLM.from_pretrained does"
        )
    if hasattr(model, STATE):
        raise AdaptError("the model carries an adapter already; call adapt_convert.unload(model) first")
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
        return _load(model, adapter, revision)


def _load(model: nn.Module, adapter: str | Path | Sequence[str | Path], revision: str | None) -> nn.Module:
    if not isinstance(adapter, str | Path):
        if not isinstance(adapter, Sequence) or not all(isinstance(path, str | Path) for path in adapter):
            raise AdaptError(f"load: {adapter!r} is neither a path or Hub id nor a list of them")
        return load_loras(model, [_open_lora(path, revision) for path in adapter])
    location = locate(adapter, revision)
    if latte_config_path(location) is not None:
        return load_latte(model, location)
    if shared_lora_config_path(location) is not None:
        return load_shared_lora(model, location)
    path = adapter_config_path(location)
    if path is None:
        raise AdaptError(f"{adapter}: has no {CONFIG}; it is not an adapter")
    config = read_json(path)
    if config.get("peft_type") == LODA:
        return load_loda(model, location)
    if config.get("peft_type") != LORTA:
        raise AdaptError(f"{adapter}: is a {config.get('peft_type')} adapter; load it with peft.PeftModel.from_pretrained")
    return load_lorta(model, location, config)


def _open_lora(adapter: str | Path, revision: str | None) -> Source:
    location = locate(adapter, revision)
    path = adapter_config_path(location)
    if path is None or read_json(path).get("peft_type") != "LORA":
        raise AdaptError(f"{adapter}: is no LoRA; a list of adapters is for LoRAs, `adapt-convert bundle` makes one LatTE of several")
    return read_lora(location)


def unload(model: nn.Module) -> nn.Module:
    """Take the adapter off: every module and value is again what it was before `load`, bit for bit."""
    state = getattr(model, STATE, None)
    if state is None:
        raise AdaptError("the model carries no adapter")
    assert isinstance(state, Replaced)
    return state.restore(model)


@contextmanager
def task_ids(model: nn.Module, ids: Sequence[int] | torch.Tensor) -> Iterator[None]:
    """Within the block, row i of every batch is of task `ids[i]`: 0 is the base, 1 the first adapter, and so on.

    Without it every row of a single adapter is of task 1, and every row of several is the base's. `generate()` with beams or
    several sequences has more rows than prompts: give one id for each. Raises `AdaptError` when an id is out of range.
    """
    state = getattr(model, STATE, None)
    if state is None or state.tasks is None:
        raise AdaptError("the model carries no adapters to choose from; load a LatTE or a list of LoRAs with adapt_convert.load")
    rows = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(type(row) is int for row in rows):
        raise AdaptError(f"task_ids: {ids!r} is no list of whole numbers, one for each row of the batch")
    chosen = list(rows)
    count = state.tasks.count
    wrong = [i for i in chosen if not 0 <= i <= count]
    if wrong or not chosen:
        what = f"{wrong[0]} is out of range" if wrong else "no row is given"
        raise AdaptError(f"task_ids: {what}; there are {count} tasks, 1 to {count}, and 0 is the base")
    if 0 in chosen and state.for_all_rows:
        raise AdaptError(f"task_ids: no row can be the base's while {state.for_all_rows[0]} is replaced for all rows")
    before = state.tasks.ids
    device = next(model.parameters()).device
    state.tasks.set(torch.tensor(chosen, dtype=torch.long, device=device))
    try:
        yield
    finally:
        state.tasks.set(before)
