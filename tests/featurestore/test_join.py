"""The point-in-time join against a slow, obvious version, and its interface."""

from __future__ import annotations

import datetime
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlfuncs.errors import Conflict, InvalidInput, NotFound, SpecError
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Aggregation, Entity, FeatureService, FeatureStore, FeatureView, on_demand
from mlfuncs_featurestore.training import TrainingRecord

UTC = datetime.UTC
EPOCH = datetime.datetime(2024, 1, 1, tzinfo=UTC)
NOW = datetime.datetime(2024, 6, 1, tzinfo=UTC)
USER = Entity("user_id", "int64")
PAIR = Entity("pair", keys={"user_id": "int64", "shop": "string"})


def second(n):
    return EPOCH + datetime.timedelta(seconds=n)


def open_store(folder):
    return FeatureStore(Settings(home=Path(folder), project="shop"))


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path)


SHOPS = ["", "a", "007"]
ROW = st.tuples(
    st.integers(0, 2),  # user
    st.sampled_from(SHOPS),
    st.integers(0, 12),  # event second
    st.integers(0, 15),  # created second
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2),  # event id
    st.booleans(),  # deleted
)
SPINE_ROW = st.tuples(st.none() | st.integers(0, 3), st.none() | st.sampled_from([*SHOPS, "7"]), st.integers(0, 20))
SPINE = st.lists(SPINE_ROW, max_size=12)


@st.composite
def cases(draw):
    return {
        "batches": draw(st.lists(st.lists(ROW, min_size=1, max_size=8), max_size=3)),
        "spine": draw(SPINE),
        "composite": draw(st.booleans()),
        "created": draw(st.booleans()),
        "aware": draw(st.booleans()),
        "ttl": draw(st.none() | st.integers(1, 6)),
        "event_id": draw(st.booleans()),
        "compact": draw(st.booleans()),
    }


def slow_join(case, rows):
    """Word by word: rows are (user, shop, event, created, value, event id, deleted) in ingest order."""
    out = []
    for user, shop, t in case["spine"]:
        best = None
        if user is None or (case["composite"] and shop is None):
            out.append((None, "NOT_FOUND"))
            continue
        mine = [r for r in rows if r[0] == user and (not case["composite"] or r[1] == shop)]
        timed = case["created"] and case["aware"]
        known = [r for r in mine if not timed or r[3] <= t]
        if case["event_id"]:
            newest = {}
            for number, row in enumerate(known):
                order = (row[3] if case["created"] else 0, number)
                if row[5] not in newest or order > newest[row[5]][0]:
                    newest[row[5]] = (order, row)
            chosen = [row for _, row in newest.values()]
            known = [row for row in known if any(row is one for one in chosen) and not row[6]]
        for number, row in enumerate(known):
            order = (row[2], row[3] if case["created"] else 0, number)
            if row[2] <= t and (best is None or order > best[0]):
                best = (order, row)
        if best is None:
            out.append((None, "NOT_FOUND"))
        elif case["ttl"] is not None and t - best[1][2] > case["ttl"]:
            out.append((None, "EXPIRED"))
        else:
            out.append((best[1][4], "NULL" if best[1][4] is None else "PRESENT"))
    return out


def view_of(case):
    return FeatureView(
        "spend",
        entities=[PAIR if case["composite"] else USER],
        fields={"amount": "int64", "tx": "int64"},
        created_timestamp="created" if case["created"] else None,
        ttl=None if case["ttl"] is None else f"{case['ttl']}s",
        event_id="tx" if case["event_id"] else None,
        buckets=2,
    )


def ingest_rows(store, case):
    """Ingest the batches; a batch with deletes goes in as two, so that ingest order is that of the list."""
    ordered = []
    for batch in case["batches"]:
        for deleted in (False, True) if case["event_id"] else (None,):
            rows = [r for r in batch if deleted is None or r[6] == deleted]
            if not rows:
                continue
            ordered += rows
            table = {
                "user_id": pa.array([r[0] for r in rows], pa.int64()),
                "shop": pa.array([r[1] for r in rows]),
                "event_timestamp": pa.array([second(r[2]) for r in rows]),
                "created": pa.array([second(r[3]) for r in rows]),
                "amount": pa.array([r[4] for r in rows], pa.int64()),
                "tx": pa.array([r[5] for r in rows], pa.int64()),
            }
            store.ingest("spend", pa.table(table), now=NOW, deleted=bool(deleted))
    return ordered


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_join_equals_the_slow_one(case):
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        view = view_of(case)
        store.apply(view)
        rows = ingest_rows(store, case)
        if case["compact"]:
            store.offline.compact(view)
        spine = pa.table(
            {
                "row": pa.array(range(len(case["spine"])), pa.int64()),
                "user_id": pa.array([s[0] for s in case["spine"]], pa.int64()),
                "shop": pa.array([s[1] for s in case["spine"]], pa.string()),
                "event_timestamp": pa.array([second(s[2]) for s in case["spine"]], pa.timestamp("ns", "UTC")),
            }
        )
        got = store.get_historical_features(spine, ["spend:amount"], status=True, use_created=case["aware"]).to_arrow()
        assert got["row"].to_pylist() == list(range(len(case["spine"])))
        actual = list(zip(got["amount"].to_pylist(), got["amount__status"].to_pylist(), strict=True))
        assert actual == slow_join(case, rows)


def spend(**changes):
    options = {"entities": [USER], "fields": {"amount": "float64", "merchant": "string"}, "buckets": 4}
    return FeatureView("spend", **{**options, **changes})


def history(rows=200, users=20, seed=0):
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user_id": random.integers(0, users, rows),
            "event_timestamp": [second(int(s)) for s in random.integers(0, 1000, rows)],
            "amount": random.normal(size=rows),
            "merchant": random.choice(["a", "b", "c"], rows),
        }
    )


def spine_of(rows=50, users=22, seed=1):
    random = np.random.default_rng(seed)
    times = [second(int(s)) for s in random.integers(0, 1200, rows)]
    return pd.DataFrame({"user_id": random.integers(0, users, rows), "event_timestamp": times, "label": range(rows)})


@pytest.fixture
def filled(store):
    risk = FeatureView("risk", entities=[USER], fields={"amount": "int64", "score": "vector<float32,2>"})
    store.apply([spend(), risk])
    store.ingest("spend", history(), now=NOW)
    rows = history(seed=5).drop(columns="merchant")
    store.ingest("risk", rows.assign(amount=range(200), score=[[n, 0.5] for n in range(200)]), now=NOW)
    return store


@pytest.mark.parametrize(
    "convert",
    [
        lambda s, tmp: pl.from_pandas(s),
        lambda s, tmp: pa.Table.from_pandas(s, preserve_index=False),
        lambda s, tmp: s.to_parquet(tmp / "spine.parquet") or str(tmp / "spine.parquet"),
        lambda s, tmp: s.to_parquet(tmp / "spine.parquet") or f"SELECT * FROM '{tmp}/spine.parquet'",
        lambda s, tmp: __import__("duckdb").from_df(s),
        lambda s, tmp: s.to_dict("records"),
    ],
    ids=["polars", "arrow", "path", "sql", "duckdb", "dicts"],
)
def test_a_spine_may_be_any_table(filled, tmp_path, convert):
    expected = filled.get_historical_features(spine_of(), "spend").to_arrow()["amount"]
    got = filled.get_historical_features(convert(spine_of(), tmp_path), "spend").to_arrow()
    assert got["amount"].equals(expected) and got["label"].to_pylist() == list(range(50))


def test_results_come_as_pandas_arrow_and_polars(filled):
    spine = spine_of().set_index(pd.Index(range(100, 150)))
    result = filled.get_historical_features(spine, ["spend:amount", "spend:merchant"])
    frame = result.to_pandas()
    assert list(frame.columns) == ["user_id", "event_timestamp", "label", "amount", "merchant"]
    assert frame.index.equals(spine.index) and frame["label"].dtype == spine["label"].dtype
    assert frame["amount"].dtype == np.float64
    assert result.to_polars()["merchant"].to_list() == result.to_arrow()["merchant"].to_pylist()
    assert "amount" in repr(result)


def test_columns_are_named_by_feature_and_by_view_where_names_clash(filled):
    spine = spine_of()
    both = filled.get_historical_features(spine, ["spend", "risk:amount"]).features
    assert both.column_names == ["spend__amount", "merchant", "risk__amount"]
    full = filled.get_historical_features(spine, ["spend:merchant"], full_feature_names=True).features
    assert full.column_names == ["spend__merchant"]
    taken = filled.get_historical_features(spine.assign(merchant="x"), ["spend:merchant"]).to_arrow()
    assert taken.column_names[-2:] == ["merchant", "spend__merchant"]


def test_services_and_views_may_be_asked_for_together(filled):
    filled.apply(FeatureService("churn", ["spend:amount", "risk:score"]))
    names = filled.get_historical_features(spine_of(), "churn").features.column_names
    assert names == ["amount", "score"]
    again = filled.get_historical_features(spine_of(), ["churn@1", "spend:merchant", "risk:*"]).features.column_names
    assert again == ["spend__amount", "score", "merchant", "risk__amount"]


def test_what_is_not_there_is_named_with_what_is_near(filled):
    for features, near in [
        (["spend:amuont"], "'amount'"),
        (["spned:amount"], "'spend'"),
        ("rsik", "'risk'"),
    ]:
        with pytest.raises(NotFound, match=f"did you mean {near}"):
            filled.get_historical_features(spine_of(), features)
    with pytest.raises(NotFound, match="spine column is named 'user_id'"):
        filled.get_historical_features(spine_of().rename(columns={"user_id": "uid"}), "spend")
    with pytest.raises(InvalidInput, match="which column of the spine is the time"):
        filled.get_historical_features(spine_of().drop(columns="event_timestamp"), "spend")
    with pytest.raises(InvalidInput, match="null in 1 rows"):
        spine = spine_of(3)
        spine.loc[1, "event_timestamp"] = None
        filled.get_historical_features(spine, "spend")
    with pytest.raises(SpecError, match="no option 'stats'"):
        filled.get_historical_features(spine_of(), "spend", stats=True)
    with pytest.raises(SpecError, match="engine is one of"):
        filled.get_historical_features(spine_of(), "spend", engine="spark")


def test_a_view_with_no_rows_gives_nulls_and_says_not_found(store):
    store.apply(spend())
    result = store.get_historical_features(spine_of(3), "spend", status=True).features
    assert result["amount"].to_pylist() == [None] * 3 and result["merchant__status"].to_pylist() == ["NOT_FOUND"] * 3


def test_an_empty_spine_gives_an_empty_result(filled):
    result = filled.get_historical_features(spine_of().iloc[:0], ["spend", "risk"])
    assert result.features.num_rows == 0 and len(result.features.column_names) == 4


def test_threads_and_one_thread_give_the_same(filled):
    one = filled.get_historical_features(spine_of(500), ["spend", "risk"], workers=1).to_arrow()
    assert one.equals(filled.get_historical_features(spine_of(500), ["spend", "risk"], workers=4).to_arrow())


def windowed():
    aggregations = [
        Aggregation("amount", ["sum", "count", "mean", "min", "max", "std", "first", "last"], windows=["60s", "10m"]),
        Aggregation("merchant", ["count_distinct", "top_k"], windows=["10m"], k=2),
    ]
    return spend(aggregations=aggregations)


def test_window_features_are_evaluated_at_the_spine_time(store):
    store.apply(windowed())
    rows = history()
    store.ingest("spend", rows.iloc[:120], now=NOW)
    store.ingest("spend", rows.iloc[120:], now=NOW)
    spine = spine_of()
    got = store.get_historical_features(spine, "spend").to_pandas()
    for number, one in spine.iterrows():
        t = one.event_timestamp
        mine = rows[(rows.user_id == one.user_id) & (rows.event_timestamp <= t)]
        mine = mine.sort_values("event_timestamp", kind="stable")
        inside = mine[mine.event_timestamp > t - pd.Timedelta("600s")]
        if mine.empty:
            assert pd.isna(got.amount_count_10m[number]) and got.merchant_top_k_10m[number] is None
            continue
        assert got.amount_count_10m[number] == len(inside)
        assert got.merchant_count_distinct_10m[number] == inside.merchant.nunique()
        import math

        assert got.amount_sum_10m[number] == math.fsum(inside.amount)
        if len(inside):
            assert got.amount_last_10m[number] == inside.amount.iloc[-1]
            assert got.amount_max_10m[number] == inside.amount.max()
        else:
            assert np.isnan(got.amount_last_10m[number])


def test_corrections_and_deletes_count_in_windows_from_when_they_were_known(store):
    view = FeatureView(
        "pay",
        entities=[USER],
        fields={"tx": "string", "amount": "float64"},
        event_id="tx",
        created_timestamp="created",
        aggregations=[Aggregation("amount", ["sum", "count"], windows=["1h"])],
    )
    store.apply(view)

    def row(tx, amount, event, created):
        return {"user_id": 1, "tx": tx, "amount": amount, "event_timestamp": second(event), "created": second(created)}

    store.ingest("pay", [row("a", 1.0, 0, 0), row("b", 10.0, 1, 1)], now=NOW)
    store.ingest("pay", [row("a", 2.0, 0, 5)], now=NOW)  # a correction, known at 5
    store.ingest("pay", [row("b", None, 1, 8)], now=NOW, deleted=True)  # a delete, known at 8
    spine = pd.DataFrame({"user_id": 1, "event_timestamp": [second(s) for s in (0, 1, 4, 5, 7, 8)]})
    got = store.get_historical_features(spine, ["pay:amount_sum_1h", "pay:amount_count_1h", "pay:amount"]).features
    assert got["amount_sum_1h"].to_pylist() == [1.0, 11.0, 11.0, 12.0, 12.0, 2.0]
    assert got["amount_count_1h"].to_pylist() == [1, 2, 2, 2, 2, 1]
    assert got["amount"].to_pylist() == [1.0, 10.0, 10.0, 10.0, 10.0, 2.0]


def test_a_delete_known_in_time_counts_even_if_it_moves_the_event_later(store):
    fields = {"tx": "string", "amount": "int64"}
    view = FeatureView("pay", entities=[USER], fields=fields, event_id="tx", created_timestamp="created")
    store.apply(view)
    event = {"user_id": 1, "tx": "a", "amount": 6, "event_timestamp": second(2), "created": second(3)}
    store.ingest("pay", [event], now=NOW)
    store.ingest("pay", [{**event, "event_timestamp": second(10), "created": second(4)}], now=NOW, deleted=True)
    spine = pd.DataFrame({"user_id": 1, "event_timestamp": [second(3), second(5)]})
    assert store.get_historical_features(spine, ["pay:amount"]).features["amount"].to_pylist() == [6, None]


def test_a_training_set_is_rebuilt_bit_for_bit_after_everything_changed(filled):
    result = filled.get_historical_features(spine_of(), ["spend", "risk"], status=True)
    record = TrainingRecord.from_dict(json.loads(json.dumps(result.record.to_dict())))
    assert record.versions == {"spend": 1, "risk": 1} and set(record.definition_digests) == {"spend", "risk"}
    filled.apply(spend(fields={"amount": "float64", "merchant": "string", "city": "string"}, ttl="1s"))
    filled.ingest("spend", history(seed=9).assign(city="x"), now=NOW)
    filled.offline.compact(filled.catalog.view("spend"))
    again = filled.rebuild(record)
    assert again.to_arrow().equals(result.to_arrow()) and again.record.result_digest == record.result_digest
    assert filled.rebuild(record.to_dict(), spine_of()).to_arrow().equals(result.to_arrow())
    with pytest.raises(Conflict, match="not the recorded one"):
        filled.rebuild(record, spine_of(seed=7))
    with pytest.raises(SpecError, match="not a training record"):
        filled.rebuild({"features": []})


def test_a_training_set_whose_files_were_vacuumed_says_so(filled):
    record = filled.get_historical_features(spine_of(), "spend").record
    filled.ingest("spend", history(seed=2), now=NOW)
    filled.offline.compact(filled.catalog.view("spend"))
    filled.offline.vacuum("spend", retention_hours=0)
    with pytest.raises(NotFound, match="vacuumed"):
        filled.rebuild(record)


def test_an_older_version_may_be_read(filled):
    before = filled.get_historical_features(spine_of(), "spend").to_arrow()
    filled.ingest("spend", history(seed=3), now=NOW)
    assert filled.get_historical_features(spine_of(), "spend", versions={"spend": 1}).to_arrow().equals(before)
    with pytest.raises(NotFound, match="view in versions"):
        filled.get_historical_features(spine_of(), "spend", versions={"spent": 1})


@on_demand(sources=["spend:amount"], request={"limit": "float64"}, fields={"share": "float64", "over": "bool"})
def usage(amount, limit):
    """How much of the limit is used."""
    return {"share": amount / limit, "over": amount > limit}


def test_on_demand_features_are_computed_from_stored_and_request_data(filled):
    filled.apply(usage)
    spine = spine_of().assign(limit=2.0)
    got = filled.get_historical_features(spine, ["usage", "spend:merchant"]).to_pandas()
    amounts = filled.get_historical_features(spine, ["spend:amount"]).to_pandas()["amount"]
    assert list(got.columns[-3:]) == ["share", "over", "merchant"]
    np.testing.assert_array_equal(got["share"], amounts / 2.0)
    with pytest.raises(NotFound, match="takes it from the request"):
        filled.get_historical_features(spine_of(), ["usage"])
    record = filled.get_historical_features(spine, ["usage:share"]).record
    fresh = FeatureStore(filled.settings)  # the function comes from its signed bundle
    expected = filled.get_historical_features(spine, ["usage:share"]).features
    assert fresh.rebuild(record).features.equals(expected)


@pytest.mark.parametrize("mode", ["numpy", "arrow"])
def test_on_demand_functions_may_take_numpy_or_arrow(filled, mode):
    import pyarrow.compute as pc

    @on_demand(sources=["spend:amount"], fields={"twice": "float64"}, mode=mode)
    def doubled(amount):
        return amount * 2 if mode == "numpy" else pc.multiply(amount, 2.0)

    filled.apply(doubled)
    got = filled.get_historical_features(spine_of(), ["doubled", "spend:amount"]).to_pandas()
    np.testing.assert_array_equal(got["twice"], got["amount"] * 2)


def test_a_transform_is_the_way_in(store):
    from mlfuncs_featurestore import feature_view

    @feature_view(entities=[USER], fields={"cents": "int64"})
    def spend_cents(frame):
        return frame.assign(cents=(frame["amount"] * 100).astype("int64[pyarrow]"))

    store.apply(spend_cents)
    rows = pd.DataFrame({"user_id": [1, 2], "event_timestamp": [EPOCH, EPOCH], "amount": [1.25, 2.5]})
    FeatureStore(store.settings).ingest("spend_cents", rows, now=NOW)
    spine = pd.DataFrame({"user_id": [2, 1], "event_timestamp": [NOW, NOW]})
    assert store.get_historical_features(spine, "spend_cents").features["cents"].to_pylist() == [250, 125]


def test_a_table_that_was_never_ingested_is_joined_as_if_it_were(store, tmp_path):
    rows = pd.DataFrame(
        {"k": [1, 1, 2], "event_timestamp": [NOW - datetime.timedelta(hours=1), NOW, NOW], "amount": [1.0, 2.0, 3.0]}
    )
    rows.to_parquet(tmp_path / "spend.parquet")
    windows = [Aggregation("amount", ["sum"], ["2h"])]
    options = {"entities": [Entity("k", int)], "fields": {"amount": "float64"}, "aggregations": windows, "buckets": 2}
    store.apply(
        [FeatureView("handed", **options), FeatureView("sourced", source=tmp_path / "spend.parquet", **options)]
    )
    spine = pd.DataFrame({"k": [2, 1, 9], "event_timestamp": [NOW] * 3})
    wanted = ["handed:amount_sum_2h", "sourced:amount_sum_2h"]
    found = store.get_historical_features(spine, wanted, tables={"handed": rows}).to_arrow()
    assert found["handed__amount_sum_2h"].to_pylist() == [3.0, 3.0, None]
    assert found["sourced__amount_sum_2h"].to_pylist() == [3.0, 3.0, None]
    assert store.offline.snapshot("handed").version == store.offline.snapshot("sourced").version == -1
    result = store.get_historical_features(spine, ["sourced:amount"])
    with pytest.raises(SpecError, match="never ingested; ingest it"):
        result.record  # noqa: B018
    with pytest.raises(InvalidInput, match="'amount' is missing"):
        store.get_historical_features(spine, ["handed:amount"], tables={"handed": rows.drop(columns="amount")})
    with pytest.raises(NotFound, match="view in tables"):
        store.get_historical_features(spine, ["handed:amount"], tables={"other": rows})
    store.ingest("sourced", rows.tail(1), now=NOW)  # from now on its table counts, not the source
    assert store.get_historical_features(spine, ["sourced:amount"]).to_arrow()["amount"].to_pylist() == [
        3.0,
        None,
        None,
    ]
    assert store.get_historical_features(spine, ["sourced:amount"]).record.versions == {"sourced": 1}
