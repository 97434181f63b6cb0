"""Reading `pytorch_model.bin` without running what a pickle may contain."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from adapt_convert.formats.dtypes import file_name
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.safetensors_file import TensorInfo

_FORBIDDEN = re.compile(r"nsupported (?:global: )?GLOBAL (\S+)")  # how torch words its refusal of what a pickle would call


class PickleFile:
    """One open `.bin` file with the same face as `SafetensorsFile`: `infos`, and `read` for one tensor at a time.

    Tensors stay mapped from the disk until they are read; a file from before torch 1.6 is not a zip archive, cannot be mapped,
    and is loaded whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        state = self._load()
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise AdaptError(f"{path}: holds a {type(state).__name__}, not a state dict (name -> tensor)")
        self._tensors: dict[str, Tensor] = {name: t for name, t in state.items() if isinstance(t, Tensor)}
        self.infos = {name: self._info(name, tensor) for name, tensor in self._tensors.items()}

    def _load(self) -> object:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch thinks of an odd file is said by the error below
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(self.path))
        except OSError as error:
            raise AdaptError(f"{self.path}: cannot be opened: {error.strerror or error}") from None
        except pickle.UnpicklingError as error:
            called = _FORBIDDEN.search(str(error))
            if called:
                raise AdaptError(
                    f"{self.path}: is a pickle that would run code ({called[1]}), so it is not loaded; convert it to safetensors "
                    "in an environment where you trust it"
                ) from None
            raise AdaptError(f"{self.path}: is damaged or not a PyTorch file; fetch it again") from None
        except Exception as error:  # a damaged archive can raise almost anything
            if "TorchScript" in str(error):
                raise AdaptError(f"{self.path}: is a TorchScript program; save its state_dict() instead") from None
            raise AdaptError(f"{self.path}: is damaged or not a PyTorch file; fetch it again") from None

    def _info(self, name: str, tensor: Tensor) -> TensorInfo:
        dtype = file_name(tensor.dtype)
        if tensor.layout != torch.strided or tensor.is_quantized or dtype is None:
            raise AdaptError(f"{self.path}: {name!r} is a {tensor.dtype} {tensor.layout} tensor, which is not supported")
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes > self.path.stat().st_size:  # strides of zero make any shape out of one number
            raise AdaptError(f"{self.path}: {name!r} claims {nbytes} bytes, more than its file has")
        return TensorInfo(name, tuple(tensor.shape), dtype, nbytes)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, copied out of the mapping."""
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def blocks(self, name: str, elements: int) -> Iterator[Tensor]:
        """A tensor's elements in order, 1-D, at most `elements` at a time."""
        yield from torch.split(self._tensors[name].detach().reshape(-1), elements)

    def split(self, name: str, parts: list[str], shape: tuple[int, ...]) -> None:
        """Let a tensor appear as `parts`, consecutive pieces of it of one `shape`."""
        pieces = self._tensors.pop(name).reshape(len(parts), *shape)
        del self.infos[name]
        for part, piece in zip(parts, pieces, strict=True):
            self._tensors[part], self.infos[part] = piece, self._info(part, piece)
