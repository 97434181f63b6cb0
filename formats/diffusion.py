"""Diffusion models on disk and how the field spells their modules.

A module has one path in its model and many spellings in LoRA files: dots in PEFT's and diffusers' files, underscores under a
prefix in those of kohya, ComfyUI and LyCORIS. Underscores also occur in names, so a spelling is never taken apart: all modules of the base
are spelled out, and the file's names are looked up among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adapt_convert.formats.checkpoint import PIPELINE, Checkpoint
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import Location, read_json
from adapt_convert.formats.lora_names import plain_name
from adapt_convert.formats.original_unet import UNET, diffusers_path, layers_per_block

Layout = Literal["pipeline", "component", "single file", "other"]

# Of the original Stable Diffusion checkpoints: where in the file a component lies. OpenCLIP's text encoders (SD 2, the second of SDXL)
# are not among them: their fused q, k and v are three modules in every LoRA file.
_SINGLE_FILE = (
    (UNET, "unet"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("conditioner.embedders.0.transformer.", "text_encoder"),
)
DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {
    "unet": ("lora_unet_", "lycoris_unet_", "lycoris_"),
    "transformer": ("lora_unet_", "lora_transformer_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "lycoris_"),
    "text_encoder_2": ("lora_te2_", "lycoris_"),
    "text_encoder_3": ("lora_te3_", "lycoris_"),
    "": ("lycoris_", "lora_unet_"),
}


@dataclass(frozen=True)
class Module:
    """A module of the base: its `path` there, the pipeline's `component` (empty if unknown) and the path `inside` that, under which a
    LoRA is written; `other` is a second path inside that LoRA files know it by."""

    path: str
    component: str
    inside: str
    other: str | None = None


def refuse_diffusion(location: Location) -> None:
    """Refuse to validate a diffusion model, told by its files: the validator compares outputs over tokens and classes."""
    config = location.directory / "config.json"
    component = location.file is None and config.is_file() and "_class_name" in read_json(config)
    if component or (location.file is None and (location.directory / PIPELINE).is_file()):
        raise AdaptError(f"{location.origin}: is a diffusion model, which the validator does not run; compare what it paints")


def layout_of(base: Checkpoint) -> Layout:
    """How a base lies on the disk: a diffusers pipeline, one of its components, an original single file, or no diffusion model."""
    if base.is_pipeline:
        return "pipeline"
    if "_class_name" in base.config:
        return "component"
    return "single file" if base.is_diffusion else "other"


def located(path: str, base: Checkpoint, layout: Layout) -> Module:
    """Where in a pipeline a module of `base` belongs."""
    if layout == "pipeline":
        component, _, inside = path.partition(".")
        return Module(path, component, inside)
    if layout == "component":
        kind = str(base.config["_class_name"])
        return Module(path, "unet" if "UNet" in kind else "vae" if "Autoencoder" in kind else "transformer", path)
    if layout == "single file":
        for prefix, component in _SINGLE_FILE:
            if path.startswith(prefix):
                inside = path.removeprefix(prefix)
                return _of_original_unet(path, inside, base) if component == "unet" else Module(path, component, inside)
        return Module(path, "vae" if path.startswith("first_stage_model.") else "other", path)
    return Module(path, "", path)


def _of_original_unet(path: str, inside: str, base: Checkpoint) -> Module:
    """kohya's scripts name LoRAs of SD 1 and 2 after diffusers' UNet, and those of SDXL, which alone has `label_emb`, after the original:
    diffusers translates the latter, but takes block 1 of the longer rows of SD 1 for block 10."""
    theirs = diffusers_path(inside, layers_per_block(base.infos))
    if theirs is None or f"{UNET}label_emb.0.0.weight" in base.infos:
        return Module(path, "unet", inside, theirs)
    return Module(path, "unet", theirs, inside)


def spellings(base: Checkpoint, paths: Iterable[str]) -> dict[str, list[str]]:
    """Every spelling of the modules `paths` that LoRA files use -> the modules it may mean (more than one is ambiguous)."""
    layout = layout_of(base)
    found: dict[str, list[str]] = {}
    for path in paths:
        for spelling in set(_spelled(located(path, base, layout))):
            found.setdefault(spelling, []).append(path)
    return found


def _spelled(module: Module) -> Iterable[str]:
    yield module.path
    for inside in {module.inside, *_older(module)} | ({module.other} if module.other else set()):
        if module.component:
            yield f"{module.component}.{inside}"
        if module.component in DENOISERS:
            yield f"diffusion_model.{inside}"
        for prefix in _KOHYA.get(module.component, ()):
            yield prefix + inside.replace(".", "_")


def _older(module: Module) -> tuple[str, ...]:
    """CLIP's text model has a level `text_model` in older files, and none since transformers 5."""
    if module.component not in TEXT_ENCODERS:
        return ()
    return (module.inside.removeprefix("text_model."), f"text_model.{module.inside.removeprefix('text_model.')}")


def kohya_name(module: Module, two_encoders: bool) -> str | None:
    """What kohya's scripts and ComfyUI call a module, or None for one that their files have no place for (the VAE)."""
    if module.component in TEXT_ENCODERS:
        number = TEXT_ENCODERS.index(module.component) + 1
        return f"lora_te{number if two_encoders else ''}_{_older(module)[1]}".replace(".", "_")
    return f"lora_unet_{module.inside}".replace(".", "_") if module.component in DENOISERS else None


def diffusers_name(module: Module) -> str | None:
    """What `load_lora_weights` calls a module, or None for one that it loads no LoRA into."""
    return f"{module.component}.{module.inside}" if module.component in (*DENOISERS, *TEXT_ENCODERS) else None


def from_original_names(names: Iterable[str], unet: Mapping[str, object]) -> dict[str, str]:
    """kohya's names after the original UNet (`lora_unet_input_blocks_...`, as for SDXL) -> diffusers' module paths in its UNet.

    The mapping is diffusers' own, which works on the keys of a state dict. Raises `ImportError` without diffusers.
    """
    from types import SimpleNamespace

    from diffusers.loaders import lora_conversion_utils

    theirs: Any = lora_conversion_utils
    keys = {f"{name}.lora_down.weight": name for name in names}
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(dict(keys), SimpleNamespace(layers_per_block=unet.get("layers_per_block", 2)))
    found = {name: plain_name(theirs._convert_unet_lora_key(key)) for key, name in mapped.items()}
    return {name: plain[0] for name, plain in found.items() if plain}
