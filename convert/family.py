"""What the architecture table says of a model family, as data types; the entries are in `table/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("gate", "up", "down")
WRITERS = ("o", "down")  # add to the residual stream; every other role reads from it
# Fused weights and the logical matrices in their output rows, in order. With `qkv_groups` that order repeats for every head of keys: the
# heads of queries that share it, the head itself and that of its values.
FUSED: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "qkv_groups": ("q", "k", "v"), "gate_up": ("gate", "up")}
NormKind = Literal["rms", "gemma", "layer"]


@dataclass(frozen=True)
class Block:
    """One repeated block: `path` has `{}` for the layer number; `roles` maps a role, or a fused one, to its module below `path`.

    Where releases named a module differently, the names stand side by side: `wi_1|wi`.
    """

    path: str
    roles: Mapping[str, str]

    def __post_init__(self) -> None:
        unknown = set(self.roles) - {*ATTENTION_ROLES, *MLP_ROLES, *FUSED}
        if unknown or self.path.count("{}") != 1:
            raise ValueError(f"{self.path}: needs one {{}} for the layer number and known roles; unknown: {sorted(unknown)}")


@dataclass(frozen=True)
class Stream:
    """The residual stream of a family's first block, as LatTE needs it.

    `norms` leads from a norm below the block to the roles that read its output; the key is empty where they read the stream as it is.
    `kind` says how a gain acts: `rms` multiplies by the weight, `gemma` by one plus the weight, `layer` also subtracts the mean and
    adds a bias. `post_norms` are those that follow the writers' additions, in order, of encoders that normalise the stream itself;
    no `final` norm is left then.
    """

    norms: Mapping[str, tuple[str, ...]]
    final: str
    kind: NormKind
    post_norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """Attention without rotary embeddings, as LatTE's score construction needs it: the module below the first block whose attribute
    `size` holds the head size."""

    owner: str
    size: str = "head_dim"


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, in one of two forms.

    `modules`: every expert's matrices are tensors of their own on disk, `path` with `{}` for the layer and for the expert, and are
    the names of gate, up and down below it; `transformers` stacks them in memory under `stacked`, as `gate_up_proj` and `down_proj`,
    and PEFT takes adapters by the names on disk; all but `by_parameter`, whose targets it has to be told as the parameters that they
    become. Without `modules` they are stacked on disk as in memory, as the `parameters` of
    `stacked`, in the order of the model class; `transposed` says that such a stack is `(experts, in, out)`.
    `router` is the module below the layer that chooses among them.
    """

    stacked: str
    router: str
    path: str = ""
    modules: tuple[str, str, str] | None = None
    parameters: tuple[str, ...] = ()
    transposed: bool = False
    by_parameter: bool = False

    def __post_init__(self) -> None:
        if (self.modules is None) == (not self.parameters) or bool(self.modules) != bool(self.path):
            raise ValueError(f"{self.stacked}: give either modules with a path, or parameters")


@dataclass(frozen=True)
class Family:
    """One model family, in the names of its modules in memory (transformers 5).

    `prefix` is the attribute that holds the backbone in a model with a head; `tied` leads from a parameter that checkpoints
    leave out to the one whose value it shares; `renames` lead from names on disk, or of other releases, to names in memory;
    `conv1d` says that weights are stored `(in, out)`; `whole` are matrices that PEFT takes no LoRA of, which are stored as they are.
    `rotary` and `why_no_latte` explain what LatTE refuses; a family without blocks says in `why_no_lorta` what LoRTA refuses.
    """

    model_types: tuple[str, ...]
    prefix: str
    blocks: tuple[Block, ...]
    tied: Mapping[str, str] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    conv1d: bool = False
    experts: Experts | None = None
    stream: Stream | None = None
    score: Score | None = None
    whole: tuple[str, ...] = ()
    rotary: bool = False
    why_no_latte: str = ""
    why_no_lorta: str = ""

    def __post_init__(self) -> None:
        if bool(self.blocks) == bool(self.why_no_lorta):
            raise ValueError(f"{self.model_types}: give either blocks or the reason why there are none")
