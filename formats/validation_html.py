"""A validation as one self-contained page: no network, no script, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from adapt_convert.formats.sizes import size_text
from adapt_convert.formats.svg import bars, heat_map, lines, scatter
from adapt_convert.formats.validation_table import count, enlarged_line, label, labelled, share_text, untimed_line

CSS = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1b1f24;--soft:#5b6470;--line:#dfe3e8;--good:#1a7f4b;--bad:#c4381c;
--heat:#0b6bcb;--s0:#0b6bcb;--s1:#c2570c;--s2:#1a7f4b;--s3:#8b3fc7;--s4:#b3246b;--s5:#6b6f00;--s6:#0a7f8c}
@media (prefers-color-scheme:dark){:root{--bg:#12151a;--card:#1b2027;--ink:#e7eaee;--soft:#a0a9b5;--line:#323a45;--good:#4cc38a;
--bad:#ff7a5c;--heat:#4ea1f5;--s0:#4ea1f5;--s1:#f0924a;--s2:#4cc38a;--s3:#bf8cf0;--s4:#f075ae;--s5:#c9c44a;--s6:#3fc1cf}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 48px}h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.15rem;margin:2em 0 .4em}
h3{font-size:1rem;margin:1.1em 0 .3em}.card h3:first-child{margin-top:0}p{margin:.4em 0}.soft{color:var(--soft)}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.verdict{border-left:6px solid var(--good)}.verdict.bad{border-left-color:var(--bad)}.verdict b{color:var(--good)}
.verdict.bad b{color:var(--bad)}
.verdict ul{margin:.3em 0 0;padding-left:1.2em}.wrap{overflow-wrap:anywhere}.scroll{overflow-x:auto}
svg{width:100%;height:auto;display:block}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:600;white-space:normal;min-width:6em}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.88rem}
.tick{font-size:12px;fill:var(--soft)}.axis{font-size:13px;fill:var(--soft)}.name{font-size:13px;fill:var(--ink)}
.grid{stroke:var(--line)}.mark{stroke:var(--soft);stroke-dasharray:4 3}.whisker{stroke:var(--ink);stroke-width:2}
.cell{stroke:var(--line);stroke-width:.6}
.ramp{display:inline-block;width:90px;height:.8em;vertical-align:-.1em;border:1px solid var(--line);
background:linear-gradient(90deg,transparent,var(--heat))}
.names td:first-child,.names th:first-child{position:sticky;left:0;background:var(--card)}
@media (max-width:520px){.tick{font-size:16px}.axis,.name{font-size:17px}.scroll .tick{font-size:12px}}
"""
_SPEEDS = (
    ("prefill, tokens per second (more is better)", "prefill_tokens_per_second", 1.0, "/s"),
    ("time per output token (less is better)", "seconds_per_output_token", 1000.0, "ms"),
)


def validation_page(data: Mapping[str, Any]) -> str:
    """The page for the content of `validation.json`. Everything that came from outside is escaped."""
    data = labelled(data)
    rows = [data["base"], *data["candidates"]]
    numbers = {label(row): number for number, row in enumerate(rows)}  # one colour for a model in all charts
    sections = [_verdict(data), _figures(data, rows), _size_and_speed(rows, numbers), _inside(data, numbers), _spectra(data), _repeat(data)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{"Pass" if data["passed"] else "Fail"}: {escape(_name(data["fine_tune"]["path"]))}</title>
<style>{CSS}</style></head><body><main>
{"".join(section for section in sections if section)}
</main></body></html>
"""


def _name(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _verdict(data: Mapping[str, Any]) -> str:
    failed = [row for row in data["candidates"] if not row["passed"]]
    count = len(data["candidates"])
    title = (
        f"{'All' if count > 1 else 'The'} {count if count > 1 else ''} candidate{'s' if count > 1 else ''} pass{'' if count > 1 else 'es'}"
    )
    if failed:
        title = f"{len(failed)} of {count} candidates fail{'s' if len(failed) == 1 else ''}"
    cards = []
    for row in data["candidates"]:
        said = f"removes {share_text(row['recovered'])} of the base's distance to the fine-tune" if row["recovered"] is not None else ""
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in row["reasons"])
        cards.append(
            f'<div class="card verdict{"" if row["passed"] else " bad"} wrap"><b>{"PASS" if row["passed"] else "FAIL"}</b> '
            f"{escape(label(row))} <span class=soft>({escape(row['kind'])}, {size_text(row['bytes'])})</span><br>{said}"
            f"{f'<ul>{reasons}</ul>' if reasons else ''}</div>"
        )
    fine_tune = data["fine_tune"]["path"]
    enlarged = enlarged_line(data)
    said = f"<p class='soft wrap'>{enlarged}</p>" if enlarged else ""
    warning = f"<p class='card verdict bad wrap'>{escape(data['warning'].capitalize())}.</p>" if data["warning"] else ""
    return (
        f"<h1>{' '.join(title.split())}</h1><p class='soft wrap'>Is it still <b>{escape(_name(fine_tune))}</b>? Rerun on {data['tokens']} "
        f"tokens of {escape(data['text'])}; {escape(data['dtype'])} on {escape(data['device'])}.</p>{said}{warning}"
        f"<div class=grid2>{''.join(cards)}</div>"
    )


def _figures(data: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    is_kl = rows[0]["kl"] is not None
    heads = ["", "KL to the fine-tune" if is_kl else "output error", "95 % interval", "recovered", "top-1", "perplexity"]
    heads += ["largest logit difference", "greedy agreement", "captured energy of the weights", "size"]
    lines_of_table = []
    for row in rows:
        details, interval = row["details"], row["kl_ci95"]
        cells = [
            escape(label(row)) + (" (base)" if row["kind"] == "base" else ""),
            _number(row["kl"] if is_kl else details["error"]),
            f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else "-",
            share_text(row["recovered"]),
            share_text(row["top1"]),
            _number(row["perplexity"], ".3f"),
            _number(details["max_logit_difference"], ".3g"),
            share_text(details["greedy_agreement"]),
            share_text(details["captured_energy"]),
            size_text(row["bytes"]),
        ]
        lines_of_table.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    table = f"<tr>{''.join(f'<th>{title}</th>' for title in heads)}</tr>{''.join(lines_of_table)}"
    note = (
        f"The fine-tune's own perplexity is {_number(data['fine_tune']['perplexity'], '.3f')}." if data["fine_tune"]["perplexity"] else ""
    )
    return f"<h2>Fidelity</h2><div class='card scroll names'><table>{table}</table></div><p class=soft>{note}</p>"


def _size_and_speed(rows: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> str:
    points = [
        (label(row), float(row["bytes"]), row["recovered"], row["details"]["recovered_ci95"])
        for row in rows
        if row["recovered"] is not None
    ]
    cards = []
    if points:
        cards.append(f"<div class=card><h3>Size against fidelity</h3>{scatter(points, 'bytes on disk', 'recovered share', numbers)}</div>")
    for title, key, factor, unit in _SPEEDS:
        timed = [(label(row), row["speed"][key]) for row in rows if row["speed"] and row["speed"][key]]
        if timed:
            shown = [(name, *(factor * spread[part] for part in ("median", "low", "high"))) for name, spread in timed]
            cards.append(f"<div class=card><h3>Speed: {title}</h3>{bars(shown, unit, title, numbers)}</div>")
    untimed = untimed_line(rows)
    note = f"<p class='soft wrap'>{escape(untimed)}</p>" if untimed else ""
    note += "<p class=soft>Whiskers: the 95 % interval of a recovered share; the range over the rounds of a time.</p>"
    return f"<h2>Size and speed</h2><div class=grid2>{''.join(cards)}</div>{note}"


def _inside(data: Mapping[str, Any], numbers: Mapping[str, int]) -> str:
    """Heat maps by layer and matrix, hidden states by layer, and where energy and function disagree."""
    parts = []
    shares = [abs(share) for row in data["candidates"] for share in _cells(row["details"]["matrices"], "recovered_kl").values()]
    full = max(shares, default=0.0) or 1.0  # one scale for all maps, so that they compare
    for row in data["candidates"]:
        drawn = [_energy_map(row["details"]), _kl_map(row["details"], full)]
        if any(drawn):
            apart = _apart(row["details"]["disagreements"])
            parts.append(f"<div class=card><p class=wrap><b>{escape(label(row))}</b></p>{''.join(drawn)}{apart}</div>")
    hidden = [(label(row), _by_layer(row["details"]["hidden_recovered"])) for row in data["candidates"]]
    hidden = [(name, points) for name, points in hidden if len(points) > 1]
    if hidden:
        curves = lines(hidden, ("layer", "recovered hidden state"), log_y=False, marks={}, share=True, numbers=numbers)
        others = [label(row) for row in data["candidates"] if label(row) not in dict(hidden)]
        note = f"<p class='soft wrap'>Not compared, their states have another width: {escape(', '.join(others))}.</p>" if others else ""
        parts.append(f"<div class=card><h3>Hidden states: share of the base's squared error that is gone</h3>{curves}{note}</div>")
    scale = (
        f"<p class=soft>Energy: {_ramp('100%')}; red is below 0%, farther from the fine-tune than the base."
        + (f" KL: {_ramp(share_text(full, 2))} in all maps; red adds to the base's KL." if shares else "")
        + "</p>"
    )
    return f"<h2>By layer and matrix</h2>{scale}<div class=grid2>{''.join(parts)}</div>" if parts else ""


def _ramp(high: str) -> str:
    return f"0% <span class=ramp></span> {high}"


def _energy_map(details: Mapping[str, Any]) -> str:
    cells = _cells(details["matrices"], "captured_energy")
    if not cells:
        return ""
    note = f"<p class='soft wrap'>{escape(details['weights_note'].capitalize())}.</p>" if details["weights_note"] else ""
    title = "Captured energy of the weights"
    return f"<h3>{title}</h3><div class=scroll>{_map(cells, title)}</div>{note}"


def _kl_map(details: Mapping[str, Any], full: float) -> str:
    """Whose share of the base's KL each matrix removes, with the sum beside what was measured; `full` has the full colour."""
    found = details["attribution"]
    cells = _cells(details["matrices"], "recovered_kl")
    title = "Recovered KL by matrix"
    if not found or not cells:
        note = found["note"] if found else None
        return f"<h3>{title}</h3><p class='soft wrap'>Left out: {escape(note)}.</p>" if note else ""
    others = share_text(found["sum"] - sum(cells.values()))
    role, layer = max(cells, key=lambda place: cells[place])
    rows = "row" if found["rows"] == 1 else f"{found['rows']} rows"
    name, share = found["largest_other"] or ("", 0.0)
    most = f", most of all {escape(name)} with {share_text(share, 2)}" if share > 0 else ""
    return (
        f"<h3>{title}</h3><div class=scroll>{_map(cells, title, full)}</div><p class='soft wrap'>Of the matrices shown, {escape(role)} of "
        f"layer {layer} removes most, {share_text(cells[role, layer], 2)} of the base's KL. What is not shown (embeddings, heads, norms, "
        f"biases) removes {others}{most}. All sum to {share_text(found['sum'])}; {share_text(found['measured'])} was measured on the same "
        f"{rows}.</p>"
    )


def _cells(matrices: Mapping[str, Mapping[str, Any]], key: str) -> dict[tuple[str, int], float]:
    return {
        (str(row["role"]), int(row["layer"])): float(row[key])
        for row in matrices.values()
        if row.get("layer") is not None and row.get(key) is not None
    }


def _map(cells: dict[tuple[str, int], float], title: str, full: float = 1.0) -> str:
    order = {role: number for number, role in enumerate(("q", "k", "v", "qkv", "o", "gate", "up", "down"))}
    roles = sorted({role for role, _ in cells}, key=lambda role: order.get(role, len(order)))
    return heat_map(cells, roles, sorted({layer for _, layer in cells}), title, full)


def _by_layer(recovered: Mapping[str, float | None]) -> list[tuple[float, float]]:
    return [(float(name), max(value, -1.0)) for name, value in recovered.items() if name.isdigit() and value is not None]


def _apart(disagreements: Sequence[Mapping[str, Any]]) -> str:
    if not disagreements:
        return ""
    worst = disagreements[0]
    energy, output = share_text(worst["captured_energy"]), share_text(worst["recovered_output"])
    return (
        f"<p class='soft wrap'>Weights and function are more than 25 points apart in {len(disagreements)} matrices, most in "
        f"{escape(worst['matrix'])}: {energy} of the energy, {output} of the output.</p>"
    )


def _spectra(data: Mapping[str, Any]) -> str:
    spectra = data["spectra"]
    if not spectra:
        return ""
    series = [
        (name.removesuffix(".weight").rsplit(".", 1)[-1], [(n + 1.0, value) for n, value in enumerate(values)])
        for name, values in spectra.items()
    ]
    marks: dict[str, float] = {}
    for row in data["candidates"]:
        ranks = {matrix["rank"] for name, matrix in row["details"]["matrices"].items() if name in spectra and matrix.get("rank")}
        marks |= {f"rank {rank}": float(rank) for rank in sorted(ranks)}
    layer = next(iter(spectra)).rsplit(".", 3)[0]
    chart = lines(
        series, ("singular value", "size"), log_y=True, marks=marks, share=False, numbers={name: n for n, (name, _) in enumerate(series)}
    )
    return (
        f"<h2>Singular values of the change, and the chosen ranks</h2><div class=grid2><div class=card>"
        f"<p class='soft wrap'>One layer in the middle: {escape(layer)}</p>{chart}</div></div>"
    )


def _repeat(data: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{escape(name)} {escape(number)}" for name, number in data["versions"].items())
    settings = data["settings"]
    command = f"<pre>{escape(data['command'])}</pre>" if data["command"] else "<p>From Python, with the same rows of token ids.</p>"
    return (
        f"<h2>Repeat it</h2>{command}<p class='soft wrap'>{escape(settings['device_name'])}, "
        f"{count(settings['threads'], 'thread')}, seed {settings['seed']}; {versions}.</p>"
    )
