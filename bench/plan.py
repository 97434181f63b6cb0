"""What `plan` predicts beside what `delta` then writes: captured energies and bytes of every candidate, or of every n-th.

    python bench/plan.py BASE FT [--every 1] [--fit-seconds 120] [--json FILE]

Takes any pair, such as that of `adapt-convert demo` or of bench/smollm2.py. A conversion is made and removed again for each candidate.
"""

from __future__ import annotations

import argparse
import json
import shlex
import tempfile
from pathlib import Path
from typing import Any

import adapt_convert


def written(base: Path, ft: Path, options: str) -> dict[str, Any]:
    """The report of the adapter that the options of `delta` make."""
    words = shlex.split(options)
    given = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        conversion = adapt_convert.convert(base, ft, **given)  # type: ignore[arg-type]
        conversion.save(Path(folder) / "adapter")
        return conversion.report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("ft", type=Path)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--fit-seconds", type=float, default=120.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = adapt_convert.plan(arguments.base, arguments.ft, fit_seconds=arguments.fit_seconds).data
    print(data["recommendation"]["sentence"])
    rows = []
    for predicted in data["candidates"][:: arguments.every]:
        report = written(arguments.base, arguments.ft, predicted["options"])
        rows.append(
            {
                "options": predicted["options"],
                "predicted_energy": predicted["captured_energy"],
                "measured_energy": report["captured_energy"],
                "predicted_bytes": predicted["bytes"],
                "measured_bytes": report["bytes"],
            }
        )
        print("{options:58} {predicted_energy:.6f} {measured_energy:.6f} {predicted_bytes:>12} {measured_bytes:>12}".format(**rows[-1]))
    apart = max(abs(row["predicted_energy"] - row["measured_energy"]) for row in rows)
    wrong = sum(row["predicted_bytes"] != row["measured_bytes"] for row in rows)
    print(f"{len(rows)} candidates: energies at most {apart:.1e} apart, {wrong} sizes differ")
    if arguments.json:
        shared = {key: data[key] for key in ("rounding", "kinds", "full_bytes", "recommendation")}
        arguments.json.write_text(json.dumps(shared | {"candidates": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
