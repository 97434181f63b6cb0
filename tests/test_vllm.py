"""`--for vllm` and its `lint` against vLLM itself, on the CPU. Needs `VLLM_PYTHON` (docs/consumers.md); skipped without."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import Pair, save_pair
from families import tiny
from safetensors.torch import load_file, save_file
from servers import SERVERS
from test_consumers import assert_same, one_expert
from test_lint import ALL, MADE, configured, make, unconfigured
from vllm_server import PYTHON, Answer, packed_experts, reference, rules, serve

from adapt_convert import convert, lint, merge
from adapt_convert.formats.profiles import PROFILES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON names no Python with vLLM")
WIDE = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 32}  # vLLM's attention wants heads of 32
MAX_RANK = 16


def with_layers(*kept: str) -> Callable[[Path], None]:
    """Leaves the tensors whose name has one of the parts."""

    def edit(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = {name: value.clone() for name, value in load_file(path).items() if any(part in name for part in kept)}
        save_file(tensors, path, metadata={"format": "pt"})
        configured(init_lora_weights=True)(directory)  # zeros for what is missing, where PEFT would draw numbers

    return edit


EDITED: dict[str, Callable[[Path], None]] = {
    "one layer": with_layers("layers.1."),
    "one matrix": with_layers("layers.0.self_attn.k_proj"),
    "up without gate": with_layers("up_proj"),
    "no alpha": unconfigured("lora_alpha"),
    "no rank": unconfigured("r"),
    "no targets": unconfigured("target_modules"),
    "PiSSA": configured(init_lora_weights="pissa"),
    "OLoRA": configured(init_lora_weights="olora"),
    "LoftQ": configured(init_lora_weights="loftq"),
    "CorDA": configured(init_lora_weights="corda"),
    "a Gaussian start": configured(init_lora_weights="gaussian"),
    "an activated LoRA": configured(alora_invocation_tokens=[1]),
    "QALoRA": configured(use_qalora=True),
    "layers twice": configured(layer_replication=[[0, 1]]),
    "a bias in the config": configured(bias="lora_only"),
}


@dataclass
class Served:
    """A pair, the adapters that were offered by their case, and what vLLM answered."""

    pair: Pair
    adapters: dict[str, Path] = field(default_factory=dict)
    answers: dict[Path | None, Answer] = field(default_factory=dict)

    def __getitem__(self, case: str) -> Answer:
        return self.answers[self.adapters[case]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """One start of the server for each model; of `FULL` ones with everything that `lint` is tried on."""
    made: dict[str, Served] = {}

    def run(name: str) -> Served:
        if name not in made:
            model_type, _, tied = name.partition("-")
            directory = tmp_path_factory.mktemp(name)
            given = Served(save_pair(directory, *tiny(model_type, **WIDE, tie_word_embeddings=bool(tied))))
            base, ft = given.pair.base, given.pair.ft
            targets = "all-linear,embed_tokens" if MODELS[name] else "all-linear"
            given.adapters["ours"] = convert(base, ft, profile="vllm", rank=6, target_modules=targets).save(directory / "ours")
            given.adapters["for PEFT"] = convert(base, ft, rank=6).save(directory / "for-peft")
            if name in FULL:
                for number, (case, options) in enumerate(MADE.items()):
                    given.adapters[case] = make(given.pair, directory / f"made-{number}", options)
                for number, (case, edit) in enumerate(EDITED.items()):
                    given.adapters[case] = make(given.pair, directory / f"edited-{number}", {"target_modules": ALL})
                    edit(given.adapters[case])
                given.adapters["a rank too large"] = make(given.pair, directory / "large", {"target_modules": ["q_proj"], "r": 32})
            given.answers = serve(given.pair.base, given.adapters.values(), MAX_RANK)
            made[name] = given
        return made[name]

    return run


# Whether vLLM adapts the embeddings. It has a class of its own for all of them but OLMo 2, whose it takes from transformers.
MODELS = {
    "llama": True,
    "mistral": False,
    "qwen3": True,
    "llama-tied": True,
    "phi3": True,
    "olmo2": True,
}
FULL = ("mistral", "llama")


@pytest.mark.parametrize("name", MODELS)
def test_vllm_runs_what_is_written_for_it(name: str, served: Callable[[str], Served], tmp_path: Path) -> None:
    """To the tokens and log-probabilities of the merged model; what is written for PEFT it refuses, as `lint` says."""
    given = served(name)
    assert given.answers[None].same(reference(given.pair.load(given.pair.base)))
    merge(given.pair.base, given.adapters["ours"], tmp_path / "merged")
    merged = reference(given.pair.load(tmp_path / "merged"))
    assert not merged.same(given.answers[None])  # the adapter does something
    assert given["ours"].same(merged), given["ours"].refused
    assert lint(given.adapters["ours"], "vllm") == []
    written = load_file(given.adapters["ours"] / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in written) == MODELS[name]
    assert given["for PEFT"].refused
    assert lint(given.adapters["for PEFT"], "vllm") != []


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("case", [*MADE, *EDITED])
def test_lint_agrees_with_vllm(case: str, name: str, served: Callable[[str], Served]) -> None:
    """It finds something exactly where vLLM refuses, or runs another model than PEFT, in this release or in older ones."""
    given = served(name)
    adapter = given.adapters[case]
    findings = [finding for finding in lint(adapter, "vllm") if "before 0.32" not in str(finding)]
    if given[case].refused:
        assert findings, given[case].refused
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = reference(peft.PeftModel.from_pretrained(given.pair.load(given.pair.base), adapter).eval())
    assert given[case].same(expected) == (not findings), findings


@pytest.mark.parametrize("name", FULL)
def test_a_rank_above_the_servers_own_is_refused(name: str, served: Callable[[str], Served]) -> None:
    assert f"LoRA rank 32 is greater than max_lora_rank {MAX_RANK}" in served(name)["a rank too large"].refused


def test_the_profile_says_what_vllms_classes_say() -> None:
    profile, found = PROFILES["vllm"], rules()
    assert list(profile.ranks) == found["ranks"]
    types = found["types"]
    assert {name for name in types if not types[name]["lora"]} == set(profile.types_without) & set(types)
    for listed, table in ((profile.embedding_types, "embed_tokens"), (profile.head_types, "lm_head")):
        assert listed is not None
        assert [name for name in listed if name in types and table not in types[name]["tables"]] == []
    stacked = {name for name in types if types[name]["stacked"]}
    assert stacked <= set(profile.stacked_types)


def test_experts_are_packed_by_vllms_loader(tmp_path: Path) -> None:
    """It runs no LoRA of experts on a CPU; what it would run is what PEFT's rules say, and it refuses a layer with one expert less."""
    pair = save_pair(tmp_path, *tiny("qwen3_moe"), one_expert)
    whole, less = (convert(pair.base, pair.ft, profile="vllm", rank=4).save(tmp_path / name) for name in ("whole", "less"))
    with_layers("experts.0", "experts.1", "experts.2", "experts.3.gate_proj", "experts.3.down_proj")(less)
    found = packed_experts([whole, less], 4)
    assert found[less] == "AssertionError"
    expected = {name: delta for name, delta in SERVERS["vllm"](whole, "qwen3_moe").items() if ".experts." in name}
    assert_same(found[whole], expected)
    assert len(found[whole]) == len(expected)
