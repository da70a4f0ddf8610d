"""Greedy batching: the pure policy, the joining and parting of rows, and the shell around them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs.errors import DeadlineExceeded, InvalidInput
from mlfuncs.interface.signature import Signature
from mlfuncs.serving.request_context import RequestContext
from mlfuncs.spec import Batch
from mlfuncs_runtime.worker import batching
from mlfuncs_runtime.worker.batched import BatchedCalls
from mlfuncs_runtime.worker.batching import RowPlan, Selection, Waiting, part, row_plan, select, wait_for_more_s
from mlfuncs_runtime.worker.calls import ThreadCalls
from mlfuncs_runtime.worker.metrics import BATCH_BOUNDS, Histogram


def waiting(rows: int, key: str = "", since_s: float = 0.0, deadline_s: float = 100.0) -> Waiting:
    return Waiting(key, rows, since_s, deadline_s)


def test_takes_what_fits_in_order() -> None:
    queue = [waiting(2), waiting(3), waiting(4), waiting(1)]
    assert select(queue, 6, 0.0) == Selection((0, 1, 3), ())


def test_keeps_requests_with_other_options_apart() -> None:
    queue = [waiting(1, "a"), waiting(1, "b"), waiting(1, "a")]
    assert select(queue, 8, 0.0).batch == (0, 2)


def test_drops_what_is_too_late() -> None:
    queue = [waiting(1, deadline_s=1.0), waiting(1)]
    assert select(queue, 8, 1.0) == Selection((1,), (0,))


def test_a_request_larger_than_a_batch_goes_alone() -> None:
    assert select([waiting(99), waiting(1)], 8, 0.0).batch == (0,)


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from("ab"), st.floats(0, 2)), max_size=20), st.integers(1, 12))
def test_every_selection_makes_progress_and_keeps_to_its_bounds(items: list[Any], max_rows: int) -> None:
    queue = [waiting(rows, key, deadline_s=deadline) for rows, key, deadline in items]
    chosen = select(queue, max_rows, 1.0)
    batch = [queue[position] for position in chosen.batch]
    assert not set(chosen.batch) & set(chosen.expired)
    assert all(queue[position].deadline_s <= 1.0 for position in chosen.expired)
    assert all(item.deadline_s > 1.0 for item in batch)
    assert len({item.key for item in batch}) <= 1
    assert sum(item.rows for item in batch) <= max_rows or len(batch) == 1
    assert bool(batch) == any(item.deadline_s > 1.0 for item in queue)


def test_waits_only_while_a_batch_is_neither_full_nor_old() -> None:
    assert wait_for_more_s([waiting(1)], 8, 0.0, 0.0) == 0
    assert wait_for_more_s([waiting(8)], 8, 5.0, 0.0) == 0
    assert wait_for_more_s([waiting(1)], 8, 5.0, 2.0) == 3
    assert wait_for_more_s([waiting(1, deadline_s=2.5)], 8, 5.0, 2.0) == 0.5


@given(st.lists(st.lists(st.integers(), max_size=5), min_size=1, max_size=6))
def test_parting_a_joined_list_gives_the_requests_back(requests: list[list[int]]) -> None:
    counts = [len(request) for request in requests]
    joined = batching.join_rows(requests)
    assert part(joined, counts) == requests
    assert [piece.tolist() for piece in part(np.array(joined, dtype=object), counts)] == requests


def test_joins_and_parts_arrays_tables_and_several_outputs() -> None:
    arrays = [np.ones((2, 3)), np.zeros((1, 3))]
    assert [piece.shape for piece in part(batching.join_rows(arrays), [2, 1])] == [(2, 3), (1, 3)]
    frames = [pd.DataFrame({"a": [1, 2]}), pd.DataFrame({"a": [3]})]
    parts = part(batching.join_rows(frames), [2, 1])
    assert [piece["a"].tolist() for piece in parts] == [[1, 2], [3]]
    assert list(parts[1].index) == [0]
    assert part({"y": [1, 2, 3], "z": (4, 5, 6)}["y"], [1, 2]) == [[1], [2, 3]]
    assert part({"y": [1, 2, 3]}, [1, 2]) == [{"y": [1]}, {"y": [2, 3]}]
    assert part(([1, 2], [3, 4]), [1, 1]) == [([1], [3]), ([2], [4])]


def test_a_result_without_one_item_per_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 came for 3 rows"):
        part([1, 2], [1, 2])
    with pytest.raises(ValueError, match="not float"):
        part(1.5, [1])


def test_finds_the_row_parameters_or_says_why_there_are_none() -> None:
    def rows(x: list[list[float]], table: pd.DataFrame, scale: float = 1.0, names: list[str] = []) -> list[float]:  # noqa: B006
        return []

    def single(x: list[float]) -> float:
        return 0.0

    def scalar(x: float) -> list[float]:
        return []

    assert row_plan(Signature.of(rows)) == RowPlan(("x", "table"))
    assert "one result for all" in str(row_plan(Signature.of(single)))
    assert "no required list" in str(row_plan(Signature.of(scalar)))


def test_row_parameters_of_one_request_need_one_length() -> None:
    with pytest.raises(InvalidInput, match="x has 1, y has 2"):
        batching.count_rows({"x": [1], "y": [1, 2]}, RowPlan(("x", "y")))


class Gated:
    """A batched function that runs one call for each permit, and records the rows of each."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.permits = threading.Semaphore(0)

    def __call__(self, rows: list[int]) -> list[int]:
        self.permits.acquire(timeout=60)
        self.calls.append(list(rows))
        if 13 in rows:
            raise ValueError("unlucky")
        return [row * 10 for row in rows]


def batched(function: Any, **batch: Any) -> BatchedCalls:
    calls = ThreadCalls(queue_size=100)
    return BatchedCalls(function, RowPlan(("rows",)), Batch(**batch), calls, Histogram(BATCH_BOUNDS))


def request(timeout_s: float = 10.0) -> RequestContext:
    context = RequestContext("id", 0.0)
    context.extend(timeout_s)
    return context


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_queued_while_the_last_batch_ran_is_the_next_batch() -> None:
    async def scenario() -> tuple[list[Any], list[list[int]]]:
        gated = Gated()
        calls = batched(gated, max_size=4)
        first = asyncio.ensure_future(calls.call({"rows": [1]}, request()))
        await settle()
        rest = [asyncio.ensure_future(calls.call({"rows": [n]}, request())) for n in range(2, 8)]
        await settle()
        for _ in range(3):
            gated.permits.release()
        return [await answer for answer in [first, *rest]], gated.calls

    answers, calls = asyncio.run(scenario())
    assert answers == [[n * 10] for n in range(1, 8)]
    assert calls == [[1], [2, 3, 4, 5], [6, 7]]


def test_a_bad_row_fails_only_its_own_request() -> None:
    async def scenario() -> list[Any]:
        gated = Gated()
        for _ in range(10):
            gated.permits.release()
        calls = batched(gated, max_size=8, max_wait_ms=100)
        futures = [asyncio.ensure_future(calls.call({"rows": [n]}, request())) for n in (1, 13, 3)]
        return await asyncio.gather(*futures, return_exceptions=True)

    first, second, third = asyncio.run(scenario())
    assert (first, third) == ([10], [30])
    assert isinstance(second, ValueError)


def test_a_request_that_expires_while_it_waits_never_runs() -> None:
    async def scenario() -> tuple[Any, list[list[int]]]:
        gated = Gated()
        calls = batched(gated)
        first = asyncio.ensure_future(calls.call({"rows": [1]}, request()))
        await settle()
        with pytest.raises(DeadlineExceeded):
            await calls.call({"rows": [2]}, request(0.05))
        gated.permits.release()
        await first
        third = asyncio.ensure_future(calls.call({"rows": [3]}, request()))
        gated.permits.release()
        return await third, gated.calls

    answer, calls = asyncio.run(scenario())
    assert (answer, calls) == ([30], [[1], [3]])


def test_a_request_over_the_batch_size_is_run_in_pieces_and_answered_whole() -> None:
    async def scenario() -> tuple[Any, list[list[int]]]:
        gated = Gated()
        for _ in range(3):
            gated.permits.release()
        return await batched(gated, max_size=2).call({"rows": [1, 2, 3, 4, 5]}, request()), gated.calls

    assert asyncio.run(scenario()) == ([10, 20, 30, 40, 50], [[1, 2], [3, 4], [5]])
