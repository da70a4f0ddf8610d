"""The pure choices: which revision, which replica; and the route table's JSON form."""

from __future__ import annotations

import collections
import dataclasses
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlfuncs_runtime.router.http import BadRequest, RequestHead
from mlfuncs_runtime.router.split import Split, choose_replica
from mlfuncs_runtime.routes import Access, Limits, Replica, Route

names = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=12)
shares = st.dictionaries(names, st.integers(1, 100), min_size=1, max_size=5)


@given(shares)
def test_one_round_of_the_split_holds_exactly_the_shares(traffic: dict[str, int]) -> None:
    split = Split(traffic)
    assert collections.Counter(split.next() for _ in range(sum(traffic.values()))) == traffic


@given(shares, st.binary(max_size=40))
def test_a_key_always_gets_the_same_revision(traffic: dict[str, int], key: bytes) -> None:
    assert Split(traffic).of(key) == Split(dict(reversed(traffic.items()))).of(key)
    assert Split(traffic).of(key) in traffic


def test_sticky_callers_follow_the_shares_and_few_move() -> None:
    keys = [f"user-{number}".encode() for number in range(4000)]
    before, after = Split({"rev-1": 90, "rev-2": 10}), Split({"rev-1": 80, "rev-2": 20})
    lesser = sum(before.of(key) == "rev-2" for key in keys)
    moved = sum(before.of(key) != after.of(key) for key in keys)
    assert 0.08 < lesser / len(keys) < 0.12
    assert 0.08 < moved / len(keys) < 0.12


def test_no_shares_is_no_revision() -> None:
    with pytest.raises(LookupError):
        Split({}).next()
    with pytest.raises(LookupError):
        Split({"rev-1": 0}).of(b"key")


@dataclasses.dataclass
class Place:
    in_flight: int


@given(st.lists(st.integers(0, 12), max_size=8), st.integers(0, 10), st.integers(0, 2**32))
def test_a_replica_is_chosen_exactly_when_one_has_room(loads: list[int], limit: int, seed: int) -> None:
    places = [Place(load) for load in loads]
    chosen = choose_replica(places, limit, random.Random(seed).random)
    has_room = [place for place in places if not limit or place.in_flight < limit]
    assert (chosen is not None) == bool(has_room)
    assert chosen is None or any(chosen is place for place in has_room)


def test_small_limits_fill_the_first_replica_first() -> None:
    places = [Place(0), Place(0), Place(0)]
    for _ in range(4):
        chosen = choose_replica(places, 2, random.random)
        assert chosen is not None
        chosen.in_flight += 1
    assert [place.in_flight for place in places] == [2, 2, 0]


def test_two_choices_keep_the_most_loaded_near_the_mean() -> None:
    chance, places = random.Random(1), [Place(0) for _ in range(50)]
    for _ in range(5000):
        chosen = choose_replica(places, 0, chance.random)
        assert chosen is not None
        chosen.in_flight += 1
    assert max(place.in_flight for place in places) <= 100 + 6


routes = st.builds(
    Route,
    endpoint=names,
    project=names,
    traffic=shares,
    replicas=st.lists(st.builds(Replica, names, names, names), max_size=3).map(tuple),
    limits=st.builds(Limits, st.integers(0, 100), timeout_s=st.floats(0.1, 100)),
    access=st.builds(
        Access, st.lists(names).map(tuple), st.floats(0, 10), st.integers(0, 5), st.lists(names).map(tuple)
    ),
    tags=st.dictionaries(names, names, max_size=2),
    mirror=st.dictionaries(names, st.integers(1, 100), max_size=2),
    sticky_header=names,
    sticky_cookie=names,
    concurrency=st.dictionaries(names, st.integers(0, 9), max_size=3),
)


@given(routes)
def test_a_route_survives_its_json_form(route: Route) -> None:
    assert Route.from_dict(json.loads(json.dumps(route.to_dict()))) == route


def head(
    *headers: tuple[bytes, bytes], method: bytes = b"GET", target: bytes = b"/a", version: str = "1.1"
) -> RequestHead:
    return RequestHead(method, target, version, [(b"Host", b"a"), *headers], True)


def test_nominated_headers_go_no_further_but_framing_and_credentials_cannot_be_nominated() -> None:
    seen = head(
        (b"Connection", b"X-A, Host, Authorization, close"),
        (b"X-A", b"1"),
        (b"X-B", b"2"),
        (b"Authorization", b"Bearer t"),
    )
    assert b"".join(seen.lines) == b"X-B: 2\r\nHost: a\r\n"
    assert seen.authorization == b"Bearer t"


def test_cookies_that_came_apart_are_joined() -> None:
    assert head((b"Cookie", b"a=1"), (b"cookie", b"b=2")).cookie == b"a=1; b=2"


@pytest.mark.parametrize("value", [b"abc", b"-5", b"1e9", b"", b"9" * 30])
def test_a_deadline_that_is_no_number_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequest, match="milliseconds"):
        head((b"X-Mlfuncs-Timeout-Ms", value))
