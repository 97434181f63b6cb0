"""vLLM as an oracle: what it makes of a base and of many adapters, in a process of its own and under a Python of its own.

`VLLM_PYTHON` names a Python in which `import vllm` works without a GPU (docs/consumers.md says how to make one): it wants another
release of transformers than this project is tested with.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PYTHON = os.environ.get("VLLM_PYTHON", "")
PROMPT = [1, 70, 80, 90, 10, 35]
TOKENS = 8
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_RUN = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

base, max_rank, prompt, tokens, adapters = json.loads(sys.argv[1])
llm = LLM(base, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2, max_logprobs=-1,
          enable_lora=True, max_lora_rank=max_rank)
sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=-1, detokenize=False, ignore_eos=True)

def answer(request):
    given = llm.generate([{"prompt_token_ids": prompt}], sampling, lora_request=request, use_tqdm=False)[0].outputs[0]
    return {"tokens": list(given.token_ids), "first": [given.logprobs[0][token].logprob for token in sorted(given.logprobs[0])]}

answers = {"": answer(None)}
for number, path in enumerate(adapters, 1):
    request = LoRARequest(path, number, path)
    try:
        llm.llm_engine.add_lora(request)
        answers[path] = answer(request)
    except Exception as error:
        answers[path] = {"refused": f"{type(error).__name__}: {error}"}
    llm.llm_engine.remove_lora(number)
print("ANSWER", json.dumps(answers))
"""
_RULES = """
import importlib, json, typing
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config.lora import MaxLoRARanks
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

types = {}
for model_type, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
    if architecture not in _TEXT_GENERATION_MODELS:
        continue
    module, name = _TEXT_GENERATION_MODELS[architecture]
    try:
        found = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    except ImportError:
        continue  # needs a GPU's libraries
    tables = sorted(getattr(found, "embedding_modules", None) or ()) if supports_lora(found) else []
    types[model_type] = {"lora": supports_lora(found), "tables": tables, "stacked": bool(getattr(found, "is_3d_moe_weight", False))}
print("ANSWER", json.dumps({"ranks": typing.get_args(MaxLoRARanks), "types": types}))
"""

_EXPERTS = """
import json, sys
import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper

found = {}
for path in sys.argv[2:]:
    names = ("gate_proj", "down_proj", "up_proj")  # w1, w2 and w3
    experts = [f"experts.{number}.{name}" for number in range(int(sys.argv[1])) for name in names]
    try:
        loaded = LoRAModel.from_local_checkpoint(path, {"q_proj", *experts}, PEFTHelper.from_local_dir(path, None), device="cpu")
        for stack in sorted({name.partition(".experts.")[0] for name in loaded.loras if ".experts." in name}):
            packed = PackedLoRALayerWeights.pack_moe([loaded.loras.get(f"{stack}.{name}") for name in experts], f"{stack}.experts")
            packed.optimize()
            for name, a, b in zip(names, packed.lora_a, packed.lora_b):
                for number, delta in enumerate(torch.bmm(b, a)):
                    found.setdefault(path, {})[f"{stack}.experts.{number}.{name}"] = delta.tolist()
    except Exception as error:
        found[path] = type(error).__name__
print("ANSWER", json.dumps(found))
"""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens after `PROMPT` and the log-probabilities of the first, `(vocabulary,)` float64; or why vLLM refused."""

    tokens: tuple[int, ...] = ()
    first: torch.Tensor | None = None
    refused: str = ""

    def same(self, other: Answer) -> bool:
        """Whether both ran, to the same tokens and the same log-probabilities up to float32 rounding."""
        if self.first is None or other.first is None or self.tokens != other.tokens:
            return False
        return torch.allclose(self.first, other.first, rtol=1e-5, atol=2e-5)


def serve(base: Path, adapters: Iterable[Path], max_rank: int) -> dict[Path | None, Answer]:
    """What vLLM answers with every adapter, and under None without; raises `CalledProcessError` where the server does not start."""
    arguments = json.dumps([str(base), max_rank, PROMPT, TOKENS, list(map(str, adapters))])
    answers = _ask(_RUN, arguments)
    return {
        Path(path) if path else None: Answer(refused=given["refused"])
        if "refused" in given
        else Answer(tuple(given["tokens"]), torch.tensor(given["first"], dtype=torch.float64))
        for path, given in answers.items()
    }


def rules() -> dict[str, Any]:
    """The sizes that `--max-lora-rank` takes, and of every model type what its class says of LoRA."""
    found: dict[str, Any] = _ask(_RULES)
    return found


def packed_experts(adapters: Iterable[Path], count: int) -> dict[Path, Any]:
    """The changes of `count` experts as vLLM packs them, `(out, in)` float64 by module; of an adapter that it refuses the error."""
    return {
        Path(path): given if isinstance(given, str) else {name: torch.tensor(delta, dtype=torch.float64) for name, delta in given.items()}
        for path, given in _ask(_EXPERTS, str(count), *map(str, adapters)).items()
    }


def _ask(program: str, *arguments: str) -> Any:
    # The paths of this project's own packages are none of its business.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | _ENVIRONMENT
    done = subprocess.run([PYTHON, "-c", program, *arguments], capture_output=True, text=True, env=environment, check=True, cwd="/")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))[7:])


@torch.no_grad()
def reference(model: Any) -> Answer:
    """The same of a model of transformers or PEFT."""
    prompt = torch.tensor([PROMPT])
    first = model(prompt).logits[0, -1].double().log_softmax(-1)
    tokens = list(PROMPT)
    for _ in range(TOKENS):  # `generate` would heed tokens that the config calls ends
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return Answer(tuple(tokens[len(PROMPT) :]), first)
