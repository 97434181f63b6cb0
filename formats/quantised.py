"""Quantised checkpoints: which format one is in, and its weights dequantised where the format's own library, or plain arithmetic, does it.

FP8 with one scale for a tensor, a row or a block of 128 x 128 (DeepSeek) and MXFP4 stacks (gpt-oss) are arithmetic; bitsandbytes is asked
for its own 4 and 8 bits (extra `quant`). Everything else is refused by name.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapt_convert.formats.dequantised import Dequantised, DequantisedFile, even_noise, float_noise, table_noise
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from adapt_convert.formats.checkpoint import TensorStore
    from adapt_convert.formats.dequantised import Pieces

FP8 = ("F8_E4M3", "F8_E5M2")
_BLOCK = 128  # rows and columns that share a scale, where config.json does not say
SCALES = (".weight_scale_inv", ".weight_scale")
ACTIVATIONS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".activation_scale")
_PACKED = "in codes that only its own library unpacks"
_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_packed": "compressed-tensors",
    "_blocks": "MXFP4",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
}


def refuse_quantised(origin: str, config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    """A fine-tune in quantised weights differs from its base by quantisation noise most of all: say which format it is, what to do."""
    found = quantisation_of(config, infos)
    if found:
        raise _refusal(origin, *found, "and differs from any base by its rounding most of all")


def dequantise(origin: str, config: Mapping[str, Any], store: TensorStore) -> str | None:
    """Let the quantised weights of a store appear in float32; returns the name of their format, None when there are none.

    Raises `AdaptError` for a format that is not dequantised here, and for one whose library is not installed.
    """
    found = quantisation_of(config, store.infos)
    if found is None:
        return None
    if any(name.endswith((".absmax", ".SCB")) for name in store.infos):
        weights, read, method = _bitsandbytes(origin, store), bitsandbytes_names(store.infos), "bitsandbytes"
    elif any(name.endswith("_blocks") for name in store.infos):
        weights, read, method = _mxfp4(origin, store), [name for name in store.infos if name.endswith(("_blocks", "_scales"))], "MXFP4"
    elif any(info.dtype in FP8 for info in store.infos.values()):
        weights, read, method = _fp8(origin, config, store), _fp8_names(store), "FP8"
    else:
        raise _refusal(origin, *found, _PACKED)
    store.replace(read, DequantisedFile(store.files[0], weights))
    left = quantisation_of({}, store.infos)
    if left:
        raise _refusal(origin, *left, _PACKED)
    return method


def quantisation_of(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> tuple[str, str] | None:
    """The name of the format and what shows it; None for plain weights."""
    quantisation = config.get("quantization_config")
    if quantisation:
        named = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        return str(named or "unnamed method"), "config.json: quantization_config"
    for name, info in infos.items():
        if name.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" not in infos:
            continue
        method = next((kind for suffix, kind in _SUFFIXES.items() if name.endswith(suffix)), None)
        if method is None and info.dtype.startswith(("F8_", "F6_", "F4")):
            method = info.dtype
        if method:
            return method, name
    return None


def _refusal(origin: str, method: str, evidence: str, why: str) -> AdaptError:
    return AdaptError(
        f"{origin}: is quantised ({method}; {evidence}), {why}; use the unquantised original, "
        "or dequantise it first (transformers: model.dequantize(), then save_pretrained)"
    )


def _fp8_names(store: TensorStore) -> list[str]:
    return [name for name, info in store.infos.items() if info.dtype in FP8 or name.endswith((*SCALES, *ACTIVATIONS))]


def _fp8(origin: str, config: Mapping[str, Any], store: TensorStore) -> dict[str, Dequantised]:
    """FP8 weights times their scales: one number, one for each row, or one for each block."""
    size = (config.get("quantization_config") or {}).get("weight_block_size") or [_BLOCK, _BLOCK]
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise AdaptError(f"{origin}: config.json has weight_block_size = {size!r}, expected two positive numbers")
    weights = {}
    for name, info in store.infos.items():
        if info.dtype not in FP8:
            continue
        scale = next((key for suffix in SCALES if (key := name.removesuffix(".weight") + suffix) in store.infos), None)
        if scale is None or len(info.shape) != 2:
            raise AdaptError(
                f"{origin}: is quantised ({info.dtype}; {name}) without the weight_scale or weight_scale_inv that belongs beside it"
            )
        rows, columns = info.shape
        shape = store.infos[scale].shape
        by_block = shape == (-(-rows // size[0]), -(-columns // size[1])) and shape not in ((1, 1), (rows, 1))
        if not by_block and shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise AdaptError(f"{origin}: {scale} is {list(shape)}, which fits neither rows nor blocks of {size} of {list(info.shape)}")
        weights[name] = Dequantised((rows, columns), _fp8_pieces(store.taker(name), store.taker(scale), tuple(size) if by_block else None))
    return weights


def _fp8_pieces(read: Callable[[], Tensor], read_scale: Callable[[], Tensor], block: tuple[int, ...] | None) -> Callable[[], Pieces]:
    def pieces() -> Pieces:
        codes, scale = read(), read_scale().float()
        height = block[0] if block else _BLOCK
        for start in range(0, len(codes), height):
            part = codes[start : start + height]
            if block:
                row = scale[start // height].repeat_interleave(block[1])[: codes.shape[1]]
            else:
                row = scale.view(-1, 1)[start : start + height] if scale.numel() > 1 else scale.view(1, 1)
            yield part.float() * row, float_noise(part, row)

    return pieces


# FP4 numbers by their codes, of E2M1: sign, two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, section 5.3.3).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _mxfp4(origin: str, store: TensorStore) -> dict[str, Dequantised]:
    """Stacks of experts `<name>_blocks (experts, out, in / 32, 16)`, two codes a byte, with `<name>_scales (experts, out, in / 32)`,
    exponents of two plus 127: as `(experts, in, out)`, the form of gpt-oss in memory."""
    weights = {}
    for name, info in store.infos.items():
        if not name.endswith("_blocks"):
            continue
        scales = name.removesuffix("_blocks") + "_scales"
        if info.dtype != "U8" or len(info.shape) != 4 or scales not in store.infos or store.infos[scales].shape != info.shape[:3]:
            raise AdaptError(
                f"{origin}: is quantised (MXFP4; {name}), and {name} {list(info.shape)} with its scales is no stack of experts"
            )
        count, rows, groups, width = info.shape
        read = store.rows_taker(name), store.rows_taker(scales)
        matrix = functools.partial(_mxfp4_matrix, *read)
        weights[name.removesuffix("_blocks")] = Dequantised(
            (count, groups * width * 2, rows), functools.partial(_each, matrix, count), matrix
        )
    return weights


def _each(matrix: Callable[[int], Pieces], count: int) -> Pieces:
    for number in range(count):
        yield from matrix(number)


def _mxfp4_matrix(read: Callable[[int], Tensor], read_scales: Callable[[int], Tensor], number: int) -> Pieces:
    import torch

    table = torch.tensor(_FP4)
    codes = read(number)  # (out, in / 32, 16)
    exponent = read_scales(number).unsqueeze(-1).int() - 127
    scale = torch.ldexp(torch.ones(exponent.shape), exponent)
    low, high = (codes & 15).long(), (codes >> 4).long()
    value = torch.stack([table[low], table[high]], dim=-1).flatten(2) * scale
    each = table_noise(table)
    yield value.flatten(1).T.contiguous(), float(((each[low] + each[high]) * scale.double().square()).sum())


def bitsandbytes_names(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Codes and all that belongs to them."""
    owners = {name.rpartition(".")[0] for name in infos if name.endswith((".absmax", ".SCB"))}  # a weight, or its module
    names = []
    for name in infos:
        parents = {name, name.removesuffix(".weight"), name.rpartition(".")[0], name.partition(".quant_state")[0]}
        own = parents & owners and not (name.endswith(".bias") and infos[name].is_float)
        names += [name] if own else []
    return names


def _bitsandbytes(origin: str, store: TensorStore) -> dict[str, Dequantised]:
    """4-bit (`<weight>.absmax`, `.quant_map`, `.quant_state.*`) and 8-bit weights (`<module>.SCB`), by bitsandbytes' own functions."""
    import torch

    library = _library(origin)
    weights = {}
    for name, info in store.infos.items():
        if name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            if weight not in store.infos or store.infos[weight].shape[:1] != info.shape:
                raise AdaptError(f"{origin}: {name} has no weight of as many rows beside it")
            rows, columns = store.infos[weight].shape
            weights[weight] = Dequantised((rows, columns), functools.partial(_int8, library, store.taker(weight), store.taker(name)))
        elif name.endswith(".absmax"):
            weight = name.removesuffix(".absmax")
            keys = [key for key in store.infos if key.startswith(f"{weight}.")]
            if weight not in store.infos:
                raise AdaptError(f"{origin}: {name} has no weight beside it")
            state = {key.removeprefix(f"{weight}."): store.taker(key)() for key in keys}  # small, and it alone knows the shape
            try:
                quant_state = library.QuantState.from_dict(state, device=torch.device("cpu"))
                shape = tuple(quant_state.shape)
                # On a CPU bitsandbytes 0.50 mixes up scales where a row is no whole number of blocks: rows of one block each are right.
                if torch.Size(shape).numel() % quant_state.blocksize == 0:
                    quant_state.shape = torch.Size((torch.Size(shape).numel() // quant_state.blocksize, quant_state.blocksize))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise AdaptError(f"{origin}: {weight} has a quantisation state that bitsandbytes cannot read: {error}") from None
            weights[weight] = Dequantised(shape, functools.partial(_four_bits, library, store.taker(weight), quant_state))
    return weights


def _library(origin: str) -> Any:
    try:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        with contextlib.redirect_stderr(io.StringIO()):
            from bitsandbytes import functional
    except ImportError:
        raise AdaptError(
            f"{origin}: is quantised by bitsandbytes, which dequantises it itself: pip install 'adapt-convert[quant]'"
        ) from None
    return functional


def _int8(library: Any, read: Callable[[], Tensor], read_scale: Callable[[], Tensor]) -> Pieces:
    codes, scale = read(), read_scale().float()
    yield library.int8_vectorwise_dequant(codes, scale).float(), even_noise(scale / 127, codes.shape[1])


def _four_bits(library: Any, read: Callable[[], Tensor], state: Any) -> Pieces:
    import torch

    codes = read()
    value = library.dequantize_4bit(codes, state).float()
    absmax = state.absmax
    if state.nested:
        absmax = library.dequantize_blockwise(state.absmax, state.state2) + state.offset
    each = table_noise(state.code)
    pairs = each[(codes.flatten() >> 4).long()] + each[(codes.flatten() & 15).long()]
    half = state.blocksize // 2
    by_block = torch.nn.functional.pad(pairs, (0, -len(pairs) % half)).view(-1, half).sum(1)
    yield value, float((by_block * absmax.double().square()).sum())
