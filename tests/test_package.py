"""What is installed, and that the folders at the top level disturb nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "tests"])
def test_transformers_works_from_the_repository(cwd: Path) -> None:
    """A regular package `kernels` on the path would be taken for Hugging Face's; a namespace folder is not."""
    run = python("import transformers, peft; from transformers import LlamaForCausalLM", cwd)
    assert run.returncode == 0, run.stderr


def test_only_one_name_is_installed(tmp_path: Path) -> None:
    run = python("import importlib.util as u; print([u.find_spec(n) for n in ('convert', 'formats', 'kernels', 'cli')])", tmp_path)
    assert run.stdout.strip() == "[None, None, None, None]"


def test_the_public_names(tmp_path: Path) -> None:
    """The function `convert` and the folder `convert` share a name; either may be imported first."""
    for first in ("from adapt_convert.convert import svd", "import adapt_convert.convert.merge", "pass"):
        run = python(f"{first}\nimport adapt_convert as a\nfor n in a.__all__: assert callable(getattr(a, n)), n", tmp_path)
        assert run.returncode == 0, run.stderr


def test_folders_are_namespaces() -> None:
    assert not [path for folder in ("convert", "formats", "kernels") for path in (ROOT / folder).glob("__init__.py")]
