"""What a LatTE can be made from, with what fidelity, and at which cost: LoRA, LoRTA, any cut into segments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import adapt_convert
from adapt_convert.convert import delta as delta_module
from adapt_convert.convert import pairs as pairs_module
from adapt_convert.convert import svd as svd_module
from adapt_convert.convert.conversion import convert
from adapt_convert.convert.delta import DenseDelta, LowRankDelta
from adapt_convert.convert.latte import basis as basis_module
from adapt_convert.convert.latte import segments as segments_module
from adapt_convert.convert.latte.basis import find_basis
from adapt_convert.convert.latte.deltas import Effective, Matrix
from adapt_convert.convert.lorta.cp import fit_cp
from adapt_convert.convert.lorta.cp_tensor import CPShape, Slab
from adapt_convert.convert.opening import open_pair
from adapt_convert.convert.options import Options
from adapt_convert.convert.pairs import Pairs
from adapt_convert.convert.preflight import make_plan
from adapt_convert.formats.errors import AdaptError
from adapt_convert.formats.peft import LoraAdapter

from .test_latte import Planted, batch, logits, save_planted

NORMS = ("input_layernorm", "post_attention_layernorm", "norm")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return save_planted(tmp_path_factory.mktemp("llama"), "llama", attention_bias=False)


def effective_of(case: Planted, source: Path) -> Effective:
    base, opened = open_pair(case.directory / "base", source)
    options = Options(to="latte", rank=4)
    return Effective(Pairs(base, opened, torch.device("cpu")), make_plan(base, opened, options))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of peft's own making
def test_a_lora_converts_exactly_at_the_rank_that_it_spans(case: Planted, tmp_path: Path) -> None:
    """Rank-1 LoRAs on two matrices of every layer: readers and writers together span at most six dims."""
    model = peft.get_peft_model(case.model(), peft.LoraConfig(r=1, lora_alpha=3, target_modules=["v_proj", "down_proj"]))
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(tmp_path / "lora")
    conversion = convert(case.directory / "base", tmp_path / "lora", to="latte", rank=16, dtype="float32")
    conversion.save(tmp_path / "latte")
    assert conversion.report["latte"]["segments"] == [{"layers": [0, 3], "rank": 6}]  # no dim more than there is
    assert conversion.report["captured_energy"] > 1 - 1e-9
    adapted = adapt_convert.load(case.model(), tmp_path / "latte")
    torch.testing.assert_close(logits(adapted, batch()), logits(model.eval(), batch()), atol=1e-4, rtol=0)


def fit_on_effective(case: Planted, rank: int) -> tuple[dict[str, LowRankDelta], int]:
    """The paper's CP tensor of q, k, v and o, fitted to the effective deltas; and the rank of its `A`."""
    effective = effective_of(case, case.directory / "ft1")
    matrices = [m for m in effective.matrices if "self_attn" in m.module]
    shape = CPShape(d=32, d_h=8, layers=3, heads=(4, 2), group=(0, 1, 1, 0))

    def load(matrix: Any) -> Any:
        delta = effective.delta(matrix)
        return delta.T if matrix.reads else delta

    order = ["q_proj", "k_proj", "v_proj", "o_proj"]
    slabs = [Slab(m.layer, order.index(m.module.rsplit(".", 1)[1]), lambda m=m: load(m)) for m in matrices]
    factors = fit_cp(slabs, shape, rank).factors
    fitted = {}
    for matrix, slab in zip(matrices, slabs, strict=True):
        part = factors.slab(shape.group, slab.layer, slab.matrix)
        fitted[matrix.module] = part.T if matrix.reads else part
    return fitted, int(torch.linalg.matrix_rank(factors.A))


def test_a_lorta_fitted_on_gain_folded_deltas_converts_exactly_at_the_rank_of_its_a(case: Planted, tmp_path: Path) -> None:
    """One `A` on the residual side of all matrices is one basis. The LoRTA's matrices, unfolded, are handed over as a LoRA."""
    fitted, rank = fit_on_effective(case, rank=5)
    gains = {name: value for name, value in case.model().state_dict().items() if name.endswith("input_layernorm.weight")}
    factors = {}
    merged = case.model()
    for module, delta in fitted.items():
        gain = gains[module.split("self_attn")[0] + "input_layernorm.weight"]
        raw = delta if module.endswith("o_proj") else LowRankDelta(delta.B, delta.A / gain)
        factors[module] = raw
        merged.get_submodule(module).weight.data += raw.dense()
    adapter = LoraAdapter(conv1d=False, all_modules=list(factors), factors=factors)
    (tmp_path / "lorta-as-lora").mkdir()
    adapter.write(tmp_path / "lorta-as-lora")
    exact = convert(case.directory / "base", tmp_path / "lorta-as-lora", to="latte", rank=rank, dtype="float32")
    assert exact.report["captured_energy"] > 1 - 1e-9
    exact.save(tmp_path / "latte")
    adapted = adapt_convert.load(case.model(), tmp_path / "latte")
    torch.testing.assert_close(logits(adapted, batch()), logits(merged, batch()), atol=1e-4, rtol=0)
    assert convert(case.directory / "base", tmp_path / "lorta-as-lora", to="latte", rank=rank - 1).report["captured_energy"] < 0.9999


def test_a_lorta_fitted_on_raw_deltas_needs_more_dims_and_gets_exact_with_them(case: Planted, tmp_path: Path) -> None:
    """Three layers with three gains turn one `A` into up to four bases: unfolded for o, and folded for each layer."""
    convert(case.directory / "base", case.directory / "ft1", to="lorta", rank=3, dtype="float32", exclude=NORMS).save(tmp_path / "lorta")
    narrow = convert(case.directory / "base", tmp_path / "lorta", to="latte", rank=3)
    wide = convert(case.directory / "base", tmp_path / "lorta", to="latte", rank=32, dtype="float32")
    assert narrow.report["captured_energy"] < 0.99999
    assert wide.report["captured_energy"] > 1 - 1e-9
    assert wide.report["latte"]["segments"][0]["rank"] <= 12
    layered = convert(case.directory / "base", tmp_path / "lorta", to="latte", rank=6, segments=3, dtype="float32")
    assert layered.report["captured_energy"] > 1 - 1e-9  # within a layer one norm feeds the attention: twice the rank is enough


@pytest.mark.parametrize(("overhead", "best"), [(0, 3), (50_000, 1)])
def test_auto_takes_the_cheapest_cut_that_it_tried(overhead: int, best: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer has a subspace of its own: one basis for all needs three times the dims, which only costly cuts outweigh."""
    monkeypatch.setattr(segments_module, "_CUT_OVERHEAD", overhead)
    case = save_planted(tmp_path, "llama", attention_bias=False)
    tuned = case.model()
    for number, layer in enumerate(tuned.model.layers):
        Q = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(number))).Q
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.data += Q @ torch.randn(2, writer.weight.shape[1])
    tuned.save_pretrained(tmp_path / "layered")
    report = convert(tmp_path / "base", tmp_path / "layered", to="latte", energy=0.9999, segments="auto").report
    rows = {row["segments"]: row for row in report["latte"]["searched"]}
    assert sorted(rows) == [1, 2, 3]
    assert rows[1]["ranks"] == [6]
    assert rows[3]["ranks"] == [2, 2, 2]
    chosen = len(report["latte"]["segments"])
    assert chosen == best
    assert rows[chosen]["predicted_cost"] == min(row["predicted_cost"] for row in rows.values())
    assert report["captured_energy"] > 0.9999 - 1e-6
    with pytest.raises(AdaptError, match=r"--segments auto looks for .*: give --energy"):
        convert(tmp_path / "base", tmp_path / "layered", to="latte", rank=4, segments="auto")


def test_more_segments_of_one_rank_never_capture_less(case: Planted) -> None:
    energies = [
        convert(case.directory / "base", case.directory / "ft1", to="latte", rank=2, segments=count).report["captured_energy"]
        for count in (1, 3)
    ]
    assert energies[1] > energies[0] - 1e-6


def test_the_report_sizes_a_lora_of_equal_energy(case: Planted, tmp_path: Path) -> None:
    conversion = convert(case.directory / "base", case.directory / "ft1", to="latte", rank=3, dtype="float32")
    conversion.save(tmp_path / "latte")
    latte = json.loads((tmp_path / "latte" / "conversion.json").read_text())["latte"]
    ranks, numbers = [], 0
    for matrix in effective_of(case, case.directory / "ft1").matrices:  # the least ranks, from the whole spectrum
        delta = effective_of(case, case.directory / "ft1").delta(matrix).dense()  # type: ignore[union-attr]
        shares = torch.linalg.svdvals(delta.double()).square().cumsum(0) / delta.double().square().sum()
        captured = conversion.report["tensors"][f"{matrix.module}.weight"]["captured_energy"]
        ranks.append(int((shares < captured * (1 - 1e-6)).sum()) + 1)
        numbers += ranks[-1] * sum(delta.shape)
    assert min(ranks) < max(ranks)  # else any of them would do
    assert latte["lora_of_equal_energy"] == {
        "parameters": numbers,
        "mean_rank": sum(ranks) / len(ranks),
        "largest_rank": max(ranks),
    }
    from safetensors.torch import load_file

    assert latte["parameters"] == sum(t.numel() for t in load_file(tmp_path / "latte" / "latte.safetensors").values())


@pytest.mark.parametrize("rough", [False, True])
@pytest.mark.parametrize(("rank", "common", "missed"), [(160, True, 1e-4), (160, False, 1e-4), (8, True, 1e-11), (8, False, 1e-4)])
def test_the_iteration_for_wide_models_finds_what_the_gram_matrix_finds(
    monkeypatch: pytest.MonkeyPatch, rank: int, common: bool, missed: float, rough: bool
) -> None:
    """Also with products in bfloat16; changes that span no more than the basis are found to float32."""
    torch.manual_seed(0)
    monkeypatch.setattr(delta_module, "_multiplies_bfloat16", lambda device: rough)
    values = torch.logspace(0, -3, 160)
    values[rank:] = 0
    shared = torch.linalg.qr(torch.randn(160, 160)).Q
    deltas = []
    for number in range(4):
        far, near = torch.linalg.qr(torch.randn(200, 160)).Q, shared if common else torch.linalg.qr(torch.randn(160, 160)).Q
        matrix = Matrix(f"{number}", number, number < 3, None, None)
        deltas.append((matrix, DenseDelta(far @ torch.diag(values) @ near.T if matrix.reads else near @ torch.diag(values) @ far.T)))

    def stream(work: Callable[[Matrix, Any], Any]) -> list[Any]:
        return [work(matrix, delta) for matrix, delta in deltas]

    exact, _, _ = find_basis(stream, 160, 8, None, 0, torch.device("cpu"))
    monkeypatch.setattr(basis_module, "GRAM_LIMIT", 0)
    iterated, _, spectra = find_basis(stream, 160, 8, None, 0, torch.device("cpu"))
    rest = []
    for Q in (exact, iterated):
        missing = (d.weight - d.weight @ Q @ Q.T if m.reads else d.weight - Q @ Q.T @ d.weight for m, d in deltas)
        rest.append(sum(float(part.double().square().sum()) for part in missing))
    assert rest[1] - rest[0] < missed * sum(delta.energy() for _, delta in deltas)
    assert (iterated.T @ iterated - torch.eye(8)).abs().max() < 1e-6
    for matrix, _ in deltas:
        torch.testing.assert_close(spectra[matrix], values[:8].double(), rtol=1e-4, atol=1e-6)


def test_the_iteration_goes_on_until_it_settles_and_starts_from_the_deltas_own_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve deltas, each with directions of its own in noise of twice their norm: more than the first block holds."""
    draw = torch.Generator().manual_seed(0)
    deltas = []
    for number in range(12):
        signal = torch.randn(300, 16, generator=draw) @ torch.randn(16, 700, generator=draw)
        noise = torch.randn(300, 700, generator=draw)
        deltas.append((Matrix(f"{number}", number, True, None, None), DenseDelta(signal + 2 * noise * signal.norm() / noise.norm())))
    passes = 0

    def stream(work: Callable[[Matrix, Any], Any]) -> list[Any]:
        nonlocal passes
        passes += 1
        return [work(matrix, delta) for matrix, delta in deltas]

    def energy(Q: torch.Tensor) -> float:
        return sum(float((delta.weight @ Q).double().square().sum()) for _, delta in deltas)

    exact, _, _ = find_basis(stream, 700, 16, None, 0, torch.device("cpu"))
    monkeypatch.setattr(basis_module, "GRAM_LIMIT", 0)
    passes = 0
    iterated, _, _ = find_basis(stream, 700, 16, None, 0, torch.device("cpu"))
    own = passes
    assert energy(iterated) > 0.9999 * energy(exact)
    assert 4 <= own < basis_module._PASSES  # one for the deltas' own directions, and three at least to see gains shrink
    monkeypatch.setattr(basis_module, "_leading", lambda rows, count, draw: torch.linalg.qr(torch.randn(700, count, generator=draw)).Q)
    passes = 0
    find_basis(stream, 700, 16, None, 0, torch.device("cpu"))
    assert passes > own


def test_rough_products_use_the_memory_of_the_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(delta_module, "_multiplies_bfloat16", lambda device: True)
    lent: list[bool] = []
    rough = DenseDelta.rough

    def seen(own: DenseDelta) -> Any:
        lent.append(own.spare is not None)
        return rough(own)

    monkeypatch.setattr(DenseDelta, "rough", seen)
    monkeypatch.setattr(svd_module, "_KRYLOV_SHARE", 100.0)
    monkeypatch.setattr(basis_module, "GRAM_LIMIT", 0)
    planted = save_planted(tmp_path / "gpt2", "gpt2")  # its matrices are stored transposed, and stripped of their mean
    for target, others in (("lora", 0), ("latte", 1)):  # the stack of the deltas' own directions is nobody's delta
        lent.clear()
        convert(planted.directory / "base", planted.directory / "ft1", to=target, rank=2)
        assert len(lent) >= 12
        assert lent.count(False) == others


def test_the_iteration_finds_some_basis_where_nothing_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run of layers that the fine-tune left alone."""
    monkeypatch.setattr(basis_module, "GRAM_LIMIT", 0)
    for deltas in ([], [(Matrix("0", 0, True, None, None), DenseDelta(torch.zeros(70, 160)))]):
        basis, values, _ = find_basis(lambda work, deltas=deltas: [work(*one) for one in deltas], 160, 8, None, 0, torch.device("cpu"))
        assert basis.shape == (160, 1)
        assert values.tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, r"--segments 0: must be auto or a whole number"),
        ({"construction": "spectral"}, r"--construction spectral: choose one of residual, score"),
        ({"budget": 1000, "construction": "score"}, r"--budget works for --construction residual"),
        ({"to": "lora", "segments": 2}, r"--segments is an option of --to latte"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdaptError, match=message):
        Options(**{"to": "latte", **options})


@pytest.mark.parametrize("name", ["llama", "vit", "gpt2", "bert"])
@pytest.mark.parametrize("gains", [True, False])
def test_deltas_in_passing_are_the_effective_ones(
    name: str, gains: bool, make_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Formed a few rows at a time from one reading, or at once from the difference, the base and the gains: the same numbers."""
    monkeypatch.setattr(pairs_module, "_BLOCK", 100)

    def change(model: Any) -> None:
        torch.manual_seed(1)
        for parameter in model.parameters():
            if gains or parameter.ndim > 1:
                parameter.data += 0.05 * torch.randn_like(parameter)

    pair = make_pair(tmp_path, name, change)
    base, source = open_pair(pair.base, pair.ft)
    effective = Effective(Pairs(base, source, torch.device("cpu")), make_plan(base, source, Options(to="latte", rank=4)))
    for matrix in effective.matrices:
        expected, got = effective.delta(matrix), effective._passing_delta(matrix)
        assert isinstance(expected, DenseDelta)
        assert isinstance(got, DenseDelta)
        torch.testing.assert_close(got.weight, expected.weight, rtol=1e-6, atol=1e-8)
