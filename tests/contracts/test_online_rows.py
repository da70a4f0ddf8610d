"""What every online store does with bytes by key: the one in Redis and the one in memory."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs.settings import Settings
from mlfuncs_featurestore.ahead import LIMIT, due_rows, rows_in
from mlfuncs_featurestore.online_port import MemoryRows
from mlfuncs_featurestore.redis_client import RedisLink
from mlfuncs_featurestore.redis_embedded import stop_embedded
from mlfuncs_featurestore.redis_keys import ViewKeys
from mlfuncs_featurestore.redis_store import RedisOnlineStore
from mlfuncs_featurestore.rows import RowCodec, Stamp, read_stamp
from mlfuncs_featurestore.stream_windows import STATE, new_header
from mlfuncs_featurestore.types import parse_type

CODEC = RowCodec({"amount": parse_type("float64")})
KEYS = ViewKeys("shop", "spend", "r")


@pytest.fixture(scope="module", params=["memory", "redis"])
def rows(request, tmp_path_factory):
    if request.param == "memory":
        yield MemoryRows()
        return
    here = Settings(home=tmp_path_factory.mktemp("contract"), project="shop")
    link = RedisLink(here)
    yield RedisOnlineStore(link)
    link.close()
    stop_embedded(here)


def row(event, created=0, sequence=0, amount=0.0):
    return CODEC.encode({"amount": amount}, Stamp(event, created, sequence))


def keys(*names):
    return KEYS.of([f"s{name}".encode() for name in names])


def test_reads_in_order_with_gaps_and_duplicates(rows):
    a, b, missing = keys("a", "b", "missing")
    assert rows.write_newest([a, b], [row(1), row(2)]) == 2
    assert rows.read([b, missing, a, b]) == [row(2), None, row(1), row(2)]
    assert rows.read([]) == []
    rows.delete([a, missing])
    assert rows.read([a]) == [None]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0, 1, -1, 2**53, 2**53 + 1, 2**62, -(2**62), 2**32])] * 3), min_size=1))
def test_the_greatest_stamp_wins_and_an_equal_one_replaces(rows, stamps):
    (key,) = keys("hypothesis")
    rows.delete([key])
    for number, stamp in enumerate(stamps):
        rows.write_newest([key], [row(*stamp, amount=float(number))])
    stored = rows.read([key])[0]
    best = max(stamps)
    assert read_stamp(stored).order == best
    assert CODEC.decode(stored)[1]["amount"] == max(n for n, stamp in enumerate(stamps) if stamp == best)


def test_a_large_batch_is_stored_whole(rows):
    many = keys(*range(5000))
    assert rows.write_newest(many, [row(number) for number in range(5000)]) == 5000
    assert rows.read(many) == [row(number) for number in range(5000)]
    assert rows.write_newest(many, [row(-1)] * 5000) == 0


def test_parts_are_written_one_after_another(rows):
    many = keys(*(f"part{number}" for number in range(4500)))
    rows.delete(many)

    def parts(event):
        for start in range(0, len(many), 2000):
            mine = many[start : start + 2000]
            yield mine, [row(event, sequence=number) for number in range(len(mine))]

    assert rows.stream_newest(parts(2)) == 4500
    assert rows.stream_newest(parts(1)) == 0
    assert rows.stream_newest(iter([])) == 0
    assert rows.read(many)[2000:2002] == [row(2), row(2, sequence=1)]


def test_a_part_that_cannot_be_made_leaves_those_before_it_and_the_store_usable(rows):
    (a,) = keys("unmade")
    rows.delete([a])

    def parts():
        yield [a], [row(1)]
        raise ValueError("a bad value")

    with pytest.raises(ValueError, match="a bad value"):
        rows.stream_newest(parts())
    assert rows.write_newest([a], [row(2)]) == 1
    assert rows.read([a]) == [row(2)]


moments = st.integers(-4, 12)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(moments, st.integers(0, 1), st.integers(0, 2)), min_size=1, max_size=12))
def test_a_row_ahead_of_the_clock_waits_beside_the_one_before_it(rows, writes):
    (key,) = keys("ahead")
    rows.delete([key])
    now, written = 0, []
    for number, (event, created, later) in enumerate(writes):
        now += later
        new = row(event, created, amount=float(number))
        rows.write_newest([key], [new], now)
        written.append((event, created, number, event > now, new))
    for at in range(now, 14):
        counts = [one for one in written if not one[3] or one[0] <= at]
        wanted = max(counts, key=lambda one: one[:3])[4] if counts else None
        assert due_rows(rows.read([key]), at) == [wanted]


def test_of_too_many_rows_ahead_of_the_clock_the_oldest_count_at_once(rows):
    (key,) = keys("crowd")
    rows.delete([key])
    for event in range(1, LIMIT + 3):
        rows.write_newest([key], [row(event)], 0)
    value = rows.read([key])[0]
    assert len(rows_in(value)) == LIMIT and due_rows([value], 0) == [row(3)]
    rows.write_newest([key], [row(50)], 60)
    assert rows_in(rows.read([key])[0]) == [*map(row, range(LIMIT + 2, 59, -1))]
    rows.write_newest([key], [row(100)], 100)
    assert rows.read([key]) == [row(100)]


def test_appends_of_many_writers_are_all_there(rows):
    (key,) = keys("appended")
    rows.delete([key])

    def write(letter):
        for _ in range(50):
            rows.append([key], [letter], new_header(), 10**9)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"x", b"y")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    value = rows.read([key])[0]
    assert value[: STATE.size] == new_header() and sorted(value[STATE.size :]) == sorted(b"x" * 50 + b"y" * 50)


def test_says_which_values_have_doubled(rows):
    small, large = keys("small", "large")
    rows.delete([small, large])
    assert rows.append([small, large], [b"a", b"b" * 100], new_header(), 50) == []
    assert rows.append([small, large], [b"a", b"b"], new_header(), 50) == [large]
    seen = rows.read([large])[0]
    assert rows.swap(large, seen, new_header(size=100) + b"c" * 100)
    assert rows.append([large], [b"d"], new_header(), 50) == []
    assert rows.append([large], [b"d" * 100], new_header(), 50) == [large]


def test_swaps_only_what_was_seen(rows):
    (key,) = keys("swapped")
    rows.delete([key])
    assert not rows.swap(key, b"", b"new")
    rows.append([key], [b"one"], new_header(), 10**9)
    seen = rows.read([key])[0]
    rows.append([key], [b"two"], new_header(), 10**9)
    assert not rows.swap(key, seen, b"lost") and rows.swap(key, rows.read([key])[0], b"new")
    assert rows.read([key]) == [b"new"]
