"""LoRAs of diffusion models: in which form they are written, and what that form has no place for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from adapt_convert.formats.checkpoint import Checkpoint
from adapt_convert.formats.diffusion import diffusers_name, kohya_name, layout_of, located
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.profiles import IMAGE_FORMS, ImageForm

if TYPE_CHECKING:
    from adapt_convert.convert.preflight import Entry
    from adapt_convert.formats.image_lora import ImageLora
    from adapt_convert.formats.peft import LoraAdapter

Form = Literal["peft"] | ImageForm
_USUAL: dict[str, Form] = {"pipeline": "diffusers", "component": "diffusers", "single file": "kohya", "other": "peft"}
_TABLES = ("token_embedding", "position_embedding")  # CLIP's


def form_of(base: Checkpoint, profile: str | None) -> Form:
    """The form asked for by name, or what suits the base. Raises `AdaptError` for one that cannot hold an adapter of it."""
    layout = layout_of(base)
    if profile not in (None, "peft", *IMAGE_FORMS) and layout != "other":
        raise AdaptError(f"--for {profile}: serves language models, and {base.origin} is a diffusion model; --for diffusers or kohya")
    form: Form = profile if profile in ("peft", *IMAGE_FORMS) else _USUAL[layout]  # type: ignore[assignment]
    if layout == "other" and form != "peft":
        raise AdaptError(f"--for {form}: {base.origin} is no diffusion model; its adapters are PEFT's")
    if layout == "pipeline" and form == "peft":
        raise AdaptError(
            f"--for peft: an adapter of PEFT is of one model, and {base.origin} is a pipeline of several; name one, as in BASE/unet"
        )
    if layout == "single file" and form != "kohya":
        raise AdaptError(
            f"--for {form}: {base.origin} has the original's module names; --for kohya keeps them, and diffusers loads that too"
        )
    return form


def namer(base: Checkpoint, form: ImageForm) -> Callable[[str], str | None]:
    """What the modules of the base are called in a file of that form, None for those that have no place in it."""
    layout = layout_of(base)
    if form == "diffusers":
        return lambda path: diffusers_name(located(path, base, layout))
    two_encoders = any(key.startswith(("text_encoder_2.", "conditioner.embedders.1.")) for key in base.infos)
    return lambda path: kohya_name(located(path, base, layout), two_encoders)


def cannot_hold(entry: Entry, name_of: Callable[[str], str | None]) -> str | None:
    """Why a LoRA file of a diffusion model cannot hold a tensor; None when it can, or when it is left out already."""
    if entry.action == "drop":
        return None
    if entry.action == "store" or entry.kind == "embedding" or entry.module.endswith(_TABLES):
        return "holds factors of matrices and convolutions alone"
    return "has no names for this part of the model" if name_of(entry.module) is None else None


def in_form(adapter: LoraAdapter, base: Checkpoint, form: ImageForm) -> ImageLora:
    """The adapter in the names of a form; factors stay what they are, to the bit."""
    from adapt_convert.formats.image_lora import ImageLora

    name_of = namer(base, form)
    names = {module: name_of(module) for module in adapter.factors}
    return ImageLora(adapter, {module: name for module, name in names.items() if name}, form)
