"""Loading real `transformers` models to run them; nothing here is imported before a model is asked for."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from adapt_convert.formats.errors import AdaptError, first_line
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.peft_methods import quiet_bitsandbytes

Task = Literal["causal", "masked", "seq2seq", "classes", "features"]
_TASKS: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "causal"),
    ("LMHeadModel", "causal"),
    ("ForMaskedLM", "masked"),
    ("ForSequenceClassification", "classes"),
    ("ForTokenClassification", "classes"),
    ("ForImageClassification", "classes"),
)
_LABELS = ("num_labels", "id2label", "label2id", "problem_type")


def require_run_extra(who: str = "validation runs the models") -> None:
    """Refuse when `transformers` or `peft`, which run models, are not installed; `who` begins the line that says so."""
    quiet_bitsandbytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft  # noqa: F401
            import transformers  # noqa: F401
    except ImportError as error:
        raise AdaptError(f"{who} and needs {error.name}: pip install 'adapt-convert[run]'") from None


def read_config(location: Location) -> dict[str, Any]:
    """`config.json` beside the weights. Raises `AdaptError` when a model cannot be built for want of it."""
    if location.file:
        raise AdaptError(f"{location.origin}: give the directory; a model is built from the config.json beside its weights")
    path = location.directory / "config.json"
    if not path.is_file():
        raise AdaptError(f"{location.origin}: has no config.json, so the model cannot be built and run")
    return read_json(path)


def model_class_of(location: Location) -> Any:
    """The `transformers` class that `config.json` names; code inside the checkpoint is never run."""
    import transformers

    names = read_config(location).get("architectures") or ["nothing"]
    found = getattr(transformers, str(names[0]), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise AdaptError(f"{location.origin}: config.json names {names[0]} as its class, which transformers does not have")
    return found


def task_of(model_class: Any, config: Mapping[str, Any]) -> Task:
    """What kind of output the class has: next-token logits, class logits, or hidden states alone."""
    name: str = model_class.__name__
    if name.endswith("ForConditionalGeneration"):
        return "seq2seq" if config.get("is_encoder_decoder") else "causal"
    return next((task for suffix, task in _TASKS if name.endswith(suffix)), "features")


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Number of tokens that a model reads at most; None where its configuration sets no limit."""
    limit = next((int(config[k]) for k in ("max_position_embeddings", "n_positions") if isinstance(config.get(k), int)), None)
    if limit is not None and "roberta" in str(config.get("model_type")):
        limit -= 2  # its positions start behind the padding index
    return limit


def load_model(
    location: Location,
    model_class: Any,
    device: torch.device,
    dtype: torch.dtype | None,
    like: Location | None = None,
    vocabulary: int | None = None,
) -> tuple[Any, frozenset[str]]:
    """A model in evaluation mode on `device`, and the parameters that its checkpoint lacks, which are random from a fixed seed.

    `dtype` None is the checkpoint's own. `like` lends the number and names of classes to a base whose head is another one. With
    `vocabulary` the model is given that many tokens as one does before loading an adapter with more of them than the base has; the new
    rows are transformers' own, close to the mean of the others. Raises `AdaptError` for what cannot be loaded.
    """
    with quiet():
        config = model_class.config_class.from_pretrained(location.directory, local_files_only=True)
    if like is not None:
        with quiet():
            theirs = model_class.config_class.from_pretrained(like.directory, local_files_only=True)
        for name in _LABELS:
            if getattr(theirs, name, None) is not None and getattr(config, name, None) != getattr(theirs, name):
                setattr(config, name, getattr(theirs, name))
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # A head of another shape in the base is replaced like one that it lacks.
            options: dict[str, Any] = {"config": config, "dtype": dtype or "auto", "local_files_only": True, "output_loading_info": True}
            options |= {"ignore_mismatched_sizes": True} if like is not None else {}
            loaded, report = model_class.from_pretrained(location.directory, **options)
            if vocabulary is not None:
                loaded.resize_token_embeddings(vocabulary)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise AdaptError(f"{location.origin}: transformers cannot load it: {first_line(error)[:300]}") from None
    model: nn.Module = loaded.eval().requires_grad_(False)
    return model.to(device), frozenset(report["missing_keys"])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is how PyTorch, on either device, or Python says that memory ran out."""
    text = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars, log lines and warnings of `transformers` and `peft` while they load."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def release(device: torch.device) -> None:
    """Give the memory of dropped models back now, not when the collector gets to it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
