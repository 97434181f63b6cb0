"""Matrices side by side: order, the bound on what is held, errors, and results that do not depend on threads."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapt_convert
from adapt_convert.convert import side_by_side as module
from adapt_convert.convert.side_by_side import side_by_side, single_thread

CPU = torch.device("cpu")


def test_results_come_in_order_whatever_finishes_first() -> None:
    def work(item: int, loaded: int) -> int:
        time.sleep(0.02 * (item % 3 == 0))
        return loaded + 1

    found = list(side_by_side(range(20), lambda item: 1, lambda item: item * item, work, CPU))
    assert found == [(item, item * item + 1) for item in range(20)]


def test_no_more_is_held_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_FLIGHT", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    sizes, held, most, lock = [40, 40, 40, 500, 40, 40], 0, 0, threading.Lock()

    def load(item: int) -> int:
        nonlocal held, most
        with lock:
            held += sizes[item]
            most = max(most, held if sizes[item] < 100 else 0)
            alone = held == sizes[item]
        time.sleep(0.01)
        return int(alone)

    def work(item: int, alone: int) -> int:
        nonlocal held
        with lock:
            held -= sizes[item]
        return alone

    found = dict(side_by_side(range(6), sizes.__getitem__, load, work, CPU))
    assert most <= 100
    assert found[3] == 1  # what is larger than the limit is worked on by itself


@pytest.mark.parametrize("function", ["load", "work"])
def test_an_error_is_raised_where_the_results_are_taken(function: str) -> None:
    def fails(*arguments: Any) -> Any:
        if arguments[0] == 3:
            raise ValueError("the third")
        return arguments[0]

    functions = {"load": lambda item: item, "work": lambda item, loaded: loaded} | {function: fails}
    before, found = torch.get_num_threads(), []
    with pytest.raises(ValueError, match="the third"):
        found.extend(side_by_side(range(6), lambda item: 1, functions["load"], functions["work"], CPU))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("waits", [False, True])
def test_a_thread_more_than_cores_only_where_one_waits(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    busy, most, lock = 0, 0, threading.Lock()

    def load(item: int) -> int:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        end = time.thread_time() + 0.02
        while not waits and time.thread_time() < end:
            pass
        if waits:
            time.sleep(0.02)
        return item

    def work(item: int, loaded: int) -> int:
        nonlocal busy
        time.sleep(0.01)
        with lock:
            busy -= 1
        return loaded

    monkeypatch.setattr(module, "_BUSY", 0.3)  # other programs may keep a thread from its core, too
    assert [result for _, result in side_by_side(range(8), lambda item: 1, load, work, CPU)] == list(range(8))
    assert most == 1 + waits


def test_single_thread_restores_what_was_set() -> None:
    before = torch.get_num_threads()
    with single_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("to", ["lora", "lorta", "latte"])
def test_the_number_of_threads_changes_no_byte(pairs: Any, tmp_path: Path, to: str) -> None:
    pair, before, written = pairs("llama"), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = adapt_convert.convert(pair.base, pair.ft, to=to, rank=4).save(tmp_path / f"{threads}")
            written.append(load_file(next(out.glob("*.safetensors"))))
    finally:
        torch.set_num_threads(before)
    assert written[0].keys() == written[1].keys()
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0])
