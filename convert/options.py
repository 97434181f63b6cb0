"""What a user can ask of a conversion, checked once."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapt_convert.convert.option_values import BUDGETS, PARSERS, budget_name
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.loda_config import VARIANTS as LODA_VARIANTS
from adapt_convert.formats.profiles import Profile, profile_named

if TYPE_CHECKING:
    import torch

    from adapt_convert.formats.lorta import Orientation

TARGETS = ("lora", "lorta", "latte", *LODA_VARIANTS)
CONSTRUCTIONS = ("residual", "score")
HEADS = ("wider", "more")
DEFAULT_RANK = 16
DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_CALIB_TOKENS = 32768
SELF = "self"  # the value of `calib` that asks for text from the fine-tune itself


@dataclass(frozen=True)
class Options:
    """Options of `adapt-convert delta`, by the same names; text as on the command line is understood too.

    At most one of `rank`, `energy` (share of each matrix, in (0, 1]), `budget` (for all factors together: bytes, or a float below 1 as
    a share of the base's bytes, "0.1%" as text; with one rank for all matrices it gives the largest that fits) and `target_kl` (nats per
    token) is given; without any the rank is 16, or that of a source in factors. `calib` (a file, or `self` for text that the fine-tune
    writes) gives `calib_tokens` tokens to fit to; `refine` counts steps of distillation. `dtype` None keeps the source's own. `segments`
    (a number, `auto`, or None for what suits the model), `construction` and `heads` are LatTE's, `base_rank` and `keep` those of R- and
    S-LoDA; `profile` is what a LoRA is written for (`--for`). Raises `AdaptError` on anything out of range.
    """

    to: str = "lora"
    rank: int | None = None
    energy: float | None = None
    budget: int | float | None = None
    target_modules: tuple[str, ...] = ()  # or one text with commas
    exclude: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    orientation: Orientation = "paper"
    strict: bool = False
    segments: int | str | None = None
    construction: str = "residual"
    heads: str = "wider"
    calib: str | None = None
    calib_tokens: int = DEFAULT_CALIB_TOKENS
    refine: int | None = None
    target_kl: float | None = None
    base_rank: int | None = None
    keep: float | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        for option in fields(self):  # whoever passes options on has None for those that were not given
            if getattr(self, option.name) is None:
                object.__setattr__(self, option.name, option.default)
        for name, parse in PARSERS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse(f"--{name.replace('_', '-')}", value))
        if self.to not in TARGETS:
            raise AdaptError(f"--to {self.to}: unknown target; choose one of {', '.join(TARGETS)}")
        given = [name for name in ("rank", "energy", "budget", "target_kl") if getattr(self, name) is not None]
        object.__setattr__(self, "_sized", bool(given))
        if len(given) > 1:
            first, second = (name.replace("_", "-") for name in given[:2])
            raise AdaptError(f"--{first} and --{second} contradict each other; give one")
        if not given:
            object.__setattr__(self, "rank", DEFAULT_RANK)
        if self.rank is not None and self.rank < 1:
            raise AdaptError(f"--rank {self.rank}: must be a whole number of at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdaptError(f"--energy {self.energy}: must be above 0 and at most 1")
        if self.budget is not None and not (0 < self.budget < 1 if isinstance(self.budget, float) else self.budget >= 1):
            raise AdaptError(f"--budget {self.budget}: must be {BUDGETS}")
        if not 0 <= self.seed < 2**63:
            raise AdaptError(f"--seed {self.seed}: must be a whole number from 0 to {2**63 - 1}")
        self._check_latte()
        self._check_calibration()
        self._check_loda()
        self._check_profile()
        if self.to == "lorta" and self.energy is not None:
            raise AdaptError("--energy works for --to lora; a LoRTA has one rank for all matrices: give --rank or --budget")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise AdaptError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        if self.orientation not in ("paper", "reference"):
            raise AdaptError(f"--orientation {self.orientation}: choose paper or reference")
        if self.device is not None:
            self.torch_device()

    def _check_latte(self) -> None:
        for name, choices in (("construction", CONSTRUCTIONS), ("heads", HEADS)):
            if getattr(self, name) not in choices:
                raise AdaptError(f"--{name} {getattr(self, name)}: choose one of {', '.join(choices)}")
        usual = {"segments": None, "construction": "residual", "heads": "wider"}
        given = next((name for name, value in usual.items() if getattr(self, name) != value), "")
        if given and self.to != "latte":
            raise AdaptError(f"--{given} is an option of --to latte")
        if self.heads != "wider" and self.construction != "score":
            raise AdaptError("--heads is an option of --construction score: the residual construction changes no head")
        if self.segments is not None and self.construction == "score":
            raise AdaptError("--segments is an option of --construction residual: the score construction has no basis to cut")
        if isinstance(self.segments, int) and self.segments < 1:
            raise AdaptError(f"--segments {self.segments}: must be auto or a whole number of at least 1")
        if self.segments == "auto" and self.energy is None:
            raise AdaptError("--segments auto looks for the cheapest segments of a given captured energy: give --energy")
        if self.budget is not None and self.construction == "score":
            raise AdaptError("--budget works for --construction residual: the score construction is exact or refused")

    def _check_calibration(self) -> None:
        if self.calib_tokens < 64:
            raise AdaptError(f"--calib-tokens {self.calib_tokens}: must be at least 64")
        if self.refine is not None and self.refine < 1:
            raise AdaptError(f"--refine {self.refine}: must be a whole number of at least 1, the steps of distillation")
        if self.target_kl is not None and not 0 < self.target_kl < float("inf"):
            raise AdaptError(f"--target-kl {self.target_kl}: must be above 0, in nats per token")
        needs = next((name for name in ("refine", "target_kl") if getattr(self, name) is not None), None)
        if needs and self.calib is None:
            raise AdaptError(f"--{needs.replace('_', '-')} runs the models on text: give --calib FILE, or --calib self")
        if self.calib is not None and self.construction == "score":
            raise AdaptError("--calib works for --construction residual: the score construction is exact or refused")

    def require_text(self) -> None:
        """Raise `AdaptError` when `calib` names no file that holds something, before anything else is opened."""
        if self.calib is None or self.calib == SELF:
            return
        path = Path(self.calib)
        if path.is_fifo():  # can be read once, and that is for later
            return
        try:
            with path.open("rb") as file:
                is_empty = not file.read(1)
        except OSError as error:
            raise AdaptError(f"--calib {self.calib}: cannot be read: {error.strerror}") from None
        if is_empty:
            raise AdaptError(f"--calib {self.calib}: is empty")

    def with_budget_in_bytes(self, whole: int) -> Options:
        """The same options with a budget that is a share of `whole` bytes turned into bytes."""
        return self.changed(budget=max(1, int(self.budget * whole))) if isinstance(self.budget, float) else self

    def _check_loda(self) -> None:
        for name, prefix in (("base_rank", "r-loda"), ("keep", "s-loda")):
            option, wanted = f"--{name.replace('_', '-')}", self.to.startswith(prefix)
            if wanted and getattr(self, name) is None:
                raise AdaptError(f"--to {self.to} replaces weights: say with {option} by how much")
            if not wanted and getattr(self, name) is not None:
                raise AdaptError(f"{option} is an option of --to {prefix}")
        if self.base_rank is not None and self.base_rank < 1:
            raise AdaptError(f"--base-rank {self.base_rank}: must be a whole number of at least 1")
        if self.keep is not None and not 0 < self.keep < 1:
            raise AdaptError(f"--keep {self.keep}: must be a share of the entries, above 0 and below 1")
        if self.to in LODA_VARIANTS and self.energy is not None:
            raise AdaptError(f"--to {self.to} takes --rank or --budget: its maps are fitted at one rank")
        if self.to in LODA_VARIANTS and self.calib is None:
            raise AdaptError(f"--to {self.to} is fitted to activations: give --calib FILE, or --calib self; without text use --to lora")

    @property
    def takes_any_matrix(self) -> bool:
        """Whether the target adapts every two-dimensional weight on its own, and not only those of a known place in a known family."""
        return self.to == "lora" or self.to in LODA_VARIANTS

    def changed(self, **fields: Any) -> Options:
        """The same options but for some `fields`; a rank that nobody asked for stays one, which `dataclasses.replace` would not know."""
        return Options(**self.as_given() | fields)

    def as_given(self) -> dict[str, Any]:
        """The options that make the same once more: all fields, but without a rank where none was asked for."""
        return asdict(self) | ({} if self.has_size else {"rank": None})

    def keeps(self, rank: int) -> bool:
        """Whether a matrix that comes in factors of this rank stays as it is: where no size or a larger rank was asked for."""
        return rank <= self.max_rank and (not self.has_size or (self.rank is not None and rank <= self.rank))

    @property
    def has_size(self) -> bool:
        """Whether a rank, energy, budget or KL was asked for."""
        return bool(self._sized)  # type: ignore[attr-defined]

    def _check_profile(self) -> None:
        consumer = self.consumer
        if consumer is None:
            return
        if self.to != "lora":
            raise AdaptError(f"--for {self.profile}: {consumer.title} takes a LoRA; use --to lora")
        if self.rank is not None and consumer.max_rank is not None and self.rank > consumer.max_rank:
            raise AdaptError(f"--rank {self.rank}: {consumer.title} takes at most {consumer.max_rank}")
        if self.budget is not None and consumer.uniform:
            raise AdaptError(f"--budget gives every matrix a rank of its own, and {consumer.title} wants one for all: give --rank")

    def require_peft_form(self) -> None:
        """Refuse to validate a LoRA in a form that `peft` does not run."""
        if self.consumer and self.consumer.layout != "peft":
            raise AdaptError(f"--for {self.profile}: the validator runs PEFT adapters; validate one of the same options without --for")

    @property
    def consumer(self) -> Profile | None:
        """The profile of the consumer that was named."""
        return profile_named(self.profile) if self.profile is not None else None

    @property
    def max_rank(self) -> int:
        """The largest rank that the consumer takes."""
        return (self.consumer and self.consumer.max_rank) or 2**31

    @property
    def size_name(self) -> str:
        """How large the adapter is to be, as its directory is named by default: `r16`, `e0.9`, `20MB`, `0.1pct` or `kl0.01`."""
        if self.rank is not None:
            return f"r{self.rank}"
        if self.energy is not None:
            return f"e{self.energy:g}"
        if self.target_kl is not None:
            return f"kl{self.target_kl:g}"
        assert self.budget is not None
        if isinstance(self.budget, float):
            return f"{100 * self.budget:g}pct"
        return budget_name(self.budget)

    def output_name(self, source: str, is_lora: bool = False) -> str:
        """How the output is named by default: `ft-lora-r16`, for a consumer `ft-lora-r16-vllm`; `style-lora` of a LoRA whose ranks stay
        what they are."""
        size = "" if is_lora and self.to == "lora" and not self.has_size else f"-{self.size_name}"
        return f"{source}-{self.to}{size}" + (f"-{self.profile}" if self.profile else "")

    def torch_device(self) -> torch.device:
        """The device asked for, or CUDA if there is one, or the CPU."""
        import torch

        name = self.device if self.device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
            if device.type not in ("cpu", "cuda", "mps"):
                raise RuntimeError
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError):
            raise AdaptError(f"--device {name}: there is no such device here") from None
        return device


def matches(module: str, pattern: str) -> bool:
    """Whether a module is meant by a name as PEFT means it: its full path, or whole last components of it."""
    return module == pattern or module.endswith("." + pattern)
