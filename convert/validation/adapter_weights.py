"""What an adapter's weights hold of the fine-tune's change, matrix by matrix, measured on the files as they are now."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapt_convert.convert.architectures import aliases_of, place_of
from adapt_convert.convert.delta import Delta, DenseDelta, LowRankDelta, difference
from adapt_convert.convert.latte.weights import LatteWeights
from adapt_convert.convert.opening import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import Entry, Plan, make_plan
from adapt_convert.convert.svd import factorise
from adapt_convert.convert.validation.attribution import Change, parameter_of
from adapt_convert.convert.validation.candidates import Contender
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.location import read_json

RECORD = "conversion.json"
EFFECTIVE = "energies are of the effective matrices, with the norms' gains folded in"
SPECTRUM_VALUES = 64
_SPECTRA = 7  # matrices whose singular values are computed: those of one layer in the middle
_RECORD_TOLERANCE = 0.02  # of captured energy; what was measured when the adapter was written repeats to rounding
_WHOLE = 0.999  # captured energy above which a matrix counts as stored, not approximated
_CHUNK = 2**22  # elements at a time


@dataclass(frozen=True)
class MatrixShare:
    """One tensor of the fine-tune: `energy` of its change, `captured` share of it that the candidate holds (negative when it
    moves away), `rank` of the candidate's factors; `inner` = `<change, candidate's change>`, `norm` = the latter's energy."""

    name: str
    role: str
    layer: int | None
    energy: float
    inner: float
    norm: float
    rank: int | None
    shape: tuple[int, ...]

    @property
    def captured(self) -> float:
        return (2 * self.inner - self.norm) / self.energy

    def to_json(self) -> dict[str, Any]:
        return {"role": self.role, "layer": self.layer, "energy": self.energy, "captured_energy": self.captured, "rank": self.rank}


@dataclass
class Holdings:
    """Everything that one candidate holds. `note` says what its energies are of when they are not of the plain weights, or why they
    could not be measured; `recorded` is then the captured energy by tensor that the `conversion.json` beside it states. `joint`
    marks factors that all matrices share, fitted to their sum. `damage` is what is wrong with the numbers themselves. `refined` says that
    the record beside it, made from this very pair, is of an adapter that was fitted to outputs and need not resemble the weights' change.
    """

    shares: list[MatrixShare] = field(default_factory=list)
    recorded: dict[str, float] = field(default_factory=dict)
    note: str | None = None
    record_errors: list[str] = field(default_factory=list)
    joint: bool = False
    damage: str | None = None
    refined: bool = False

    @property
    def captured(self) -> float | None:
        """Share of the energy of all changed matrices."""
        total = sum(share.energy for share in self.matrices)
        return sum(share.captured * share.energy for share in self.matrices) / total if total else None

    @property
    def matrices(self) -> list[MatrixShare]:
        return [share for share in self.shares if len(share.shape) == 2]

    @property
    def _adapted(self) -> list[MatrixShare]:
        """Matrices that the candidate approximates; one held whole (an embedding stored exactly) says nothing of its factors."""
        return [share for share in self.matrices if share.norm > 0 and share.captured < _WHOLE]

    @property
    def strength(self) -> float | None:
        """The factor by which the candidate's matrices would have to grow to fit the fine-tune's best: 1 for a projection
        (a truncated SVD, a least-squares fit), 2 for an adapter whose scale was halved."""
        norm = sum(share.norm for share in self._adapted)
        return sum(share.inner for share in self._adapted) / norm if norm > 0 else None

    @property
    def captured_of_adapted(self) -> float | None:
        """Share of the energy of the matrices that the candidate approximates."""
        return _captured(self._adapted) if self._adapted else None

    @property
    def least_captured(self) -> tuple[str, float] | None:
        """The adapted matrix that is farthest from the fine-tune, and its captured energy.

        A projection moves none away. One CP tensor is fitted to all of them in sum, which holds for each role and each layer (its
        factors for these are least-squares solutions) but for no single matrix: there, the worst role or layer.
        """
        groups: dict[str, list[MatrixShare]] = {}
        for share in self._adapted:
            names = [share.role, f"layer {share.layer}"] if self.joint else [share.name]
            for name in names:
                groups.setdefault(name, []).append(share)
        found = {name: _captured(shares) for name, shares in groups.items()}
        return min(found.items(), key=lambda pair: pair[1]) if found else None

    @property
    def zeroed(self) -> list[str]:
        """Matrices that changed and whose factors are all zero, in a role that the candidate adapts elsewhere."""
        roles = {share.role for share in self._adapted}
        return [share.name for share in self.matrices if share.rank and not share.norm and share.role in roles]


def _captured(shares: list[MatrixShare]) -> float:
    return sum(share.captured * share.energy for share in shares) / sum(share.energy for share in shares)


def measure_weights(
    base: Contender,
    fine_tune: Contender,
    candidates: Iterable[Contender],
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
    seed: int,
) -> tuple[dict[Contender, Holdings], dict[str, list[float]]]:
    """Captured energy of every candidate, and singular values of the change of one middle layer's matrices.

    Reads one tensor of each at a time. A candidate that the project cannot read as a change of weights gets a note instead, one
    whose numbers are damaged (NaN) the reason for its failure.
    """
    holdings = {candidate: Holdings(joint=candidate.kind == "lorta") for candidate in candidates}
    try:
        pairs, plan = _open(base, fine_tune)
    except AdaptError as error:
        if not fine_tune.is_adapter:  # a damaged file; adapters may be of a kind that only peft reads
            raise
        return {candidate: Holdings(note=str(error)) for candidate in holdings}, {}
    opened: dict[Contender, _Adapter | LatteWeights] = {}
    for candidate, held in holdings.items():
        try:
            opened[candidate] = _latte(candidate, pairs, plan) if candidate.kind == "latte" else _Adapter(*_open(base, candidate))
            if isinstance(weights := opened[candidate], LatteWeights) and weights.is_effective:
                held.shares, held.note = _effective_shares(weights, base, fine_tune, plan, progress), EFFECTIVE
        except AdaptError as error:
            if not candidate.is_adapter:
                raise
            opened.pop(candidate, None)
            held.note, held.recorded = str(error), _recorded(candidate)
    spectra: dict[str, list[float]] = {}
    wanted = _spectrum_entries(plan)
    for entry in progress([e for e in plan.entries if e.base_key and not e.tied_to], "weights"):
        change = _change(pairs, entry)
        if change is None or not (energy := change.energy()):
            continue
        for candidate, weights in list(opened.items()):
            if weights.is_effective and entry.name not in weights.values:
                continue
            try:
                mine, rank = weights.delta(entry), weights.rank(entry)
                holdings[candidate].shares.append(_share(entry.name, entry.module, plan, change, energy, mine, rank, entry.part.shape))
            except AdaptError as error:
                del opened[candidate]
                holdings[candidate] = Holdings(note=str(error), damage=str(error))
        if entry in wanted:
            rank = min(SPECTRUM_VALUES, *change.shape)
            spectra[entry.name] = factorise(change, rank, torch.Generator().manual_seed(seed)).values[:rank].tolist()
    for candidate in opened:
        holdings[candidate].record_errors = _against_record(candidate, holdings[candidate], pairs)
    return holdings, spectra


def changes_of(base: Contender, fine_tune: Contender, candidate: Contender, root: nn.Module) -> list[Change]:
    """Every parameter that a candidate changes, as `attribution` takes it; `root` is the base, live.

    Raises `AdaptError` for a candidate that cannot be read so.
    """
    if candidate.kind == "latte":
        return _latte(candidate, *_open(base, fine_tune)).changes(root)
    pairs, plan = _open(base, candidate)
    found = []
    for entry in plan.entries:
        change = _change(pairs, entry) if entry.base_key and not entry.rows_added else None
        if change is not None and change.energy():
            found.append(Change(entry.name, functools.partial(_change_again, pairs, entry), shared=plan.follows_ties))
        elif change is None and entry.part.kind == "replace" and entry.part.dtype.startswith(("F", "BF")):
            found += _against_live(root, entry, plan.follows_ties)
    return found


def _against_live(root: nn.Module, entry: Entry, shared: bool) -> list[Change]:
    """A parameter that the base does not store, or not all rows of it: the live base has random numbers in their place."""
    live = parameter_of(root, entry.name)
    if live is None or live.shape != entry.part.shape:
        return []
    value = entry.part.load()
    assert isinstance(value, Tensor)
    change = DenseDelta((value.float() - live.detach().cpu().float()).reshape(len(value), -1))
    return [Change(entry.name, lambda: change, shared=shared)]


def _change_again(pairs: Pairs, entry: Entry) -> Delta:
    change = _change(pairs, entry)
    assert change is not None
    return change


class _Adapter:
    """A candidate that is read as changes of the plain weights."""

    is_effective = False
    values: frozenset[str] = frozenset()

    def __init__(self, pairs: Pairs, plan: Plan) -> None:
        self._pairs, self._plan = pairs, plan

    def delta(self, entry: Entry) -> Delta | None:
        theirs = self._counterpart(entry.name)
        return _change(self._pairs, theirs) if theirs else None

    def rank(self, entry: Entry) -> int | None:
        theirs = self._counterpart(entry.name)
        return theirs.part.rank if theirs else None

    def _counterpart(self, name: str) -> Entry | None:
        """The entry of that name, or of a parameter that shares its value: PEFT can hold a shared bias by its alias alone. A head
        that shares the embedding's weight is no counterpart, as PEFT parts the two."""
        names = [name]
        if self._plan.follows_ties or name.endswith(".bias"):
            names += aliases_of(name, self._plan.family, self._plan.config)
        return next((self._plan.by_name[each] for each in names if each in self._plan.by_name), None)


def _open(base: Contender, other: Contender, options: Options | None = None) -> tuple[Pairs, Plan]:
    opened_base, source = open_pair(base.path, other.path)
    return Pairs(opened_base, source, torch.device("cpu")), make_plan(opened_base, source, options or Options())


def _latte(candidate: Contender, pairs: Pairs, plan: Plan) -> LatteWeights:
    """A LatTE as changes of the base that `pairs` opened. Raises `AdaptError` for one of other matrices, or of other shapes."""
    weights = LatteWeights(candidate, pairs, plan)
    known = plan.by_name
    matrices = {f"{module}.weight": delta.shape for module, delta in weights.matrices.items()}
    absent = next((name for name in matrices if name not in known and name not in plan.base_keys), None)
    if absent:
        raise AdaptError(f"{candidate.path}: {absent} is not in {pairs.base.origin}: made for another base")
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
        name: (shape, known[name].matrix_shape) for name, shape in matrices.items() if name in known
    }
    # Of what is held by value the rows may differ: tokens that the fine-tune added.
    shapes |= {name: (tuple(value.shape[1:]), known[name].part.shape[1:]) for name, value in weights.task.exact.items() if name in known}
    wrong = next((name for name, (held, expected) in shapes.items() if held != expected), None)
    if wrong:
        raise AdaptError(f"{candidate.path}: {wrong} has another shape than in {pairs.base.origin}: made for another base")
    return weights


def _effective_shares(
    weights: LatteWeights, base: Contender, fine_tune: Contender, plan: Plan, progress: Callable[[Iterable[Any], str], Iterable[Any]]
) -> list[MatrixShare]:
    found = []
    for matrix, change, mine in progress(weights.against(*_open(base, fine_tune, Options(to="latte", rank=1))), "effective weights"):
        if energy := change.energy():
            rank = mine.rank if mine else None
            found.append(_share(f"{matrix.module}.weight", matrix.module, plan, change, energy, mine, rank, change.shape))
    return found


def _change(pairs: Pairs, entry: Entry) -> Delta | None:
    """The change of one tensor, float32; a vector is a matrix of one column. None for integers and other shapes."""
    if entry.kind == "matrix" and not entry.rows_added:
        return pairs.delta(entry)
    if not entry.part.dtype.startswith(("F", "BF")) or entry.base_key is None:
        return None
    if entry.part.kind == "low_rank":
        loaded = entry.part.load()
        return loaded if isinstance(loaded, LowRankDelta) else None
    value = entry.part.load()
    assert isinstance(value, Tensor)
    if entry.part.kind == "replace":
        before = pairs.base.read(entry.base_key)
        if before.shape != value.shape and not entry.rows_added:
            return None
        value = difference(value, before)
    return DenseDelta(value.float().reshape(len(value) if value.ndim else 1, -1))


def _share(
    name: str, module: str, plan: Plan, change: Delta, energy: float, mine: Delta | None, rank: int | None, shape: tuple[int, ...]
) -> MatrixShare:
    place = place_of(module, plan.family) if plan.family else None
    role = place.role if place else module.rsplit(".", 1)[-1]
    inner, norm = (_inner(change, mine), mine.energy()) if mine is not None and mine.shape == change.shape else (0.0, 0.0)
    return MatrixShare(name, role, place.layer if place else None, energy, inner, norm, rank, shape)


def _inner(a: Delta, b: Delta) -> float:
    """`<a, b>`, through the factors of whichever has some."""
    if isinstance(a, LowRankDelta):
        a, b = b, a
    if isinstance(b, LowRankDelta):
        return float((a.rmatmul(b.B).double() * b.A.T.double()).sum())
    assert isinstance(a, DenseDelta)
    x, y = a.weight.reshape(-1), b.weight.reshape(-1)
    return sum(
        float(torch.dot(x[i : i + _CHUNK].double(), y[i : i + _CHUNK].double()))  # float32 loses what bf16 rounding leaves
        for i in range(0, len(x), _CHUNK)
    )


def _spectrum_entries(plan: Plan) -> set[Entry]:
    placed = [(e, place_of(e.module, plan.family)) for e in plan.entries if plan.family and e.kind == "matrix" and e.base_key]
    layers = sorted({place.layer for _, place in placed if place})
    middle = layers[len(layers) // 2] if layers else None
    return set([e for e, place in placed if place and place.layer == middle][:_SPECTRA])


def _recorded(candidate: Contender) -> dict[str, float]:
    path = Path(candidate.location.directory) / RECORD
    tensors = read_json(path).get("tensors") if path.is_file() else None
    rows = tensors.items() if isinstance(tensors, dict) else ()
    return {name: row["captured_energy"] for name, row in rows if isinstance(row.get("captured_energy"), float)}


def _against_record(candidate: Contender, holdings: Holdings, pairs: Pairs) -> list[str]:
    """Tensors that hold something else than the `conversion.json` beside them says; only for the pair that it was made from."""
    path = Path(candidate.location.directory) / RECORD
    if not candidate.is_adapter or not path.is_file():
        return []
    record = read_json(path)
    inputs, tensors = record.get("inputs"), record.get("tensors")
    if not isinstance(inputs, dict) or not isinstance(tensors, dict):
        return []
    for role, store in (("base", pairs.base.store), ("source", pairs.source.store)):
        if not isinstance(inputs.get(role), dict) or inputs[role].get("blake3") != store.content_hash():
            return []
    calibration = record.get("calibration")
    holdings.refined = isinstance(calibration, dict) and calibration.get("chosen") == "refined"
    errors = []
    for share in holdings.shares:
        row = tensors.get(share.name, {})
        said = 1.0 if row.get("status") == "exact" else row.get("captured_energy")
        tolerance = 0.5 if row.get("status") == "exact" else _RECORD_TOLERANCE  # a small change may round when stored in bf16
        if isinstance(said, int | float) and share.captured < said - tolerance:
            errors.append(f"{share.name} holds {share.captured:.1%} of its change, {RECORD} says {said:.1%}")
    return errors
