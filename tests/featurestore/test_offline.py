"""The offline store: atomic commits, versions, concurrent writers, compaction, evolution."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import uuid

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlfuncs.errors import Conflict, InvalidInput, NotFound, SpecError, StorageError
from mlfuncs.settings import Settings
from mlfuncs_featurestore import Entity, Expectation, FeatureStore, FeatureView

UTC = datetime.UTC
NOW = datetime.datetime(2024, 6, 1, tzinfo=UTC)
OLD = NOW - datetime.timedelta(hours=25)
USER = Entity("user_id", "int64")


@pytest.fixture
def store(tmp_path):
    return FeatureStore(Settings(home=tmp_path, project="shop"))


def spend(**changes):
    options = {"entities": [USER], "fields": {"amount": "float64", "merchant": "string"}, "buckets": 4}
    return FeatureView("spend", **{**options, **changes})


def frame(rows=10, start=0, **columns):
    users = np.arange(start, start + rows)
    times = pd.Timestamp("2024-01-01", tz="UTC") + pd.to_timedelta(users, unit="s")
    plain = {"user_id": users, "event_timestamp": times, "amount": users * 1.0, "merchant": users.astype(str)}
    return pd.DataFrame({**plain, **columns})


def stored(store, view, **options):
    tables = list(store.offline.read(view, store.offline.snapshot(view.name, **options)))
    return pa.concat_tables(tables).sort_by("__ingest") if tables else None


def test_rows_come_back_as_they_were_ingested(store):
    store.apply(spend())
    report = store.ingest("spend", frame(), now=NOW)
    assert report.rows == 10 and report.version == 1 and "10 rows" in str(report)
    rows = stored(store, spend())
    assert rows["user_id"].to_pylist() == list(range(10)) and rows["merchant"].to_pylist() == list("0123456789")


@pytest.mark.parametrize(
    "convert",
    [
        lambda f, tmp: pl.from_pandas(f),
        lambda f, tmp: pl.from_pandas(f).lazy(),
        lambda f, tmp: pa.Table.from_pandas(f, preserve_index=False),
        lambda f, tmp: pa.Table.from_pandas(f, preserve_index=False).to_batches()[0],
        lambda f, tmp: pa.Table.from_pandas(f, preserve_index=False).to_reader(),
        lambda f, tmp: f.to_dict("records"),
        lambda f, tmp: f.to_dict("list"),
        lambda f, tmp: iter([f.iloc[:3], f.iloc[3:]]),
        lambda f, tmp: f.to_parquet(tmp / "rows.parquet") or tmp / "rows.parquet",
        lambda f, tmp: f.to_parquet(tmp / "rows.parquet") or f"{tmp}/*.parquet",
        lambda f, tmp: f.to_parquet(tmp / "rows.parquet") or f"SELECT * FROM '{tmp}/rows.parquet'",
        lambda f, tmp: _delta(f, tmp),
    ],
    ids=["polars", "lazy", "arrow", "batch", "reader", "dicts", "columns", "iterator", "path", "glob", "sql", "delta"],
)
def test_rows_may_come_from_any_table(store, tmp_path, convert):
    store.apply(spend())
    store.ingest("spend", convert(frame(), tmp_path), now=NOW)
    rows = stored(store, spend())
    assert rows["amount"].to_pylist() == [float(n) for n in range(10)]


def _delta(rows, folder):
    import deltalake

    deltalake.write_deltalake(f"{folder}/given", pa.Table.from_pandas(rows, preserve_index=False))
    return f"delta:{folder}/given"


def test_a_duckdb_relation_is_a_table(store):
    import duckdb

    store.apply(spend())
    store.ingest("spend", duckdb.from_df(frame()), now=NOW)
    assert stored(store, spend()).num_rows == 10


def test_a_view_reads_its_own_source(store, tmp_path):
    frame().to_parquet(tmp_path / "a.parquet")
    store.apply(spend(source=f"{tmp_path}/*.parquet"))
    assert store.ingest("spend").rows == 10
    with pytest.raises(SpecError, match="no source"):
        store.apply(FeatureView("bare", entities=[USER], fields={"x": "int64"}))
        store.ingest("bare")


def test_time_travel_by_version_and_date(store):
    store.apply(spend())
    store.ingest("spend", frame(3), now=NOW)
    between = datetime.datetime.now(UTC)
    store.ingest("spend", frame(4, start=3), now=NOW)
    assert stored(store, spend()).num_rows == 7
    assert stored(store, spend(), version=1).num_rows == 3
    assert stored(store, spend(), at=between.isoformat()).num_rows == 3
    with pytest.raises(NotFound, match="versions 0 to 2"):
        store.offline.snapshot("spend", version=9)
    with pytest.raises(NotFound, match="did not exist then"):
        store.offline.snapshot("spend", at="2001-01-01T00:00:00")


def test_files_are_laid_out_for_the_join(store):
    store.apply(spend())
    store.ingest("spend", frame(1000).sample(frac=1, random_state=1), now=NOW)
    snapshot = store.offline.snapshot("spend")
    assert [file.bucket for file in snapshot.files] == [0, 1, 2, 3]
    for file in snapshot.files:
        parquet = pq.ParquetFile(f"{snapshot.uri}/{file.path}")
        keys = parquet.read(["user_id"])["user_id"].to_pylist()
        assert keys == sorted(keys) and file.low["user_id"] == keys[0]
        group = parquet.metadata.row_group(0)
        columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
        assert not columns["amount"].has_dictionary_page and columns["merchant"].has_dictionary_page


def test_an_iterator_of_batches_is_one_commit_and_never_held_whole(store):
    store.apply(spend())
    alive, most = [], 0

    def batches():
        nonlocal most
        for start in range(0, 1000, 100):
            alive.append(start)
            most = max(most, len(alive))
            yield frame(100, start=start)
            alive.clear()

    report = store.ingest("spend", batches(), now=NOW, batch_rows=200)
    assert report.rows == 1000 and report.version == 1 and most == 1
    assert stored(store, spend())["user_id"].to_pylist() == list(range(1000))


def test_a_failure_in_the_last_batch_leaves_nothing_behind(store):
    store.apply(spend())
    store.ingest("spend", frame(5), now=NOW)
    before = store.offline.snapshot("spend")
    with pytest.raises(InvalidInput, match="'merchant' is missing"):
        store.ingest("spend", iter([frame(100, start=10), frame(5).drop(columns="merchant")]), batch_rows=10, now=NOW)
    assert store.offline.snapshot("spend") == before
    files = {str(path) for path in _parquet_files(before.uri)}
    assert files == {f"{before.uri}/{file.path}" for file in before.files}


def _parquet_files(uri):
    import pathlib

    return pathlib.Path(uri).rglob("*.parquet")


# Eight forks of a process that has imported and loaded everything but has opened no table (deltalake's threads would
# not survive the fork); each appends four times.
WRITERS = """
import os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
import deltalake
import mlfuncs.progress, mlfuncs_featurestore.catalog, mlfuncs_featurestore.ingest
import test_offline as t
from mlfuncs_featurestore import offline, profile

rows = t.pa.Table.from_pandas(t.frame(1), preserve_index=False)
profile.Profile(["amount", "merchant"]).add(rows)
offline.bucket_of(t.spend(), rows)

def append(worker):
    store = t.FeatureStore(t.Settings(home=Path(sys.argv[1]), project="shop"))
    for index in range(4):
        store.ingest("spend", t.frame(5, start=1000 * worker + 10 * index), now=t.NOW)

children = []
for worker in range(8):
    child = os.fork()
    if child == 0:
        try:
            append(worker)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_eight_processes_append_to_one_table_and_no_row_is_lost(store, tmp_path):
    store.apply(spend(buckets=1))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-c", WRITERS, str(tmp_path), os.path.dirname(__file__)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = stored(store, spend(buckets=1))
    expected = {1000 * w + 10 * i + j for w in range(8) for i in range(4) for j in range(5)}
    assert rows.num_rows == 160 and set(rows["user_id"].to_pylist()) == expected


def test_compaction_merges_files_and_changes_no_row(store):
    store.apply(spend())
    for start in range(0, 50, 10):
        store.ingest("spend", frame(10, start=start), now=NOW)
    before, old = stored(store, spend()), store.offline.snapshot("spend").version
    assert store.offline.compact(spend()) >= 10
    assert len(store.offline.snapshot("spend").files) == 4
    assert stored(store, spend()).equals(before) and stored(store, spend(), version=old).equals(before)
    assert store.offline.compact(spend()) == 0


def test_compaction_holds_no_more_than_one_merged_file_at_a_time(store, monkeypatch):
    view = spend(buckets=1)
    store.apply(view)
    for start in range(0, 70, 10):
        store.ingest("spend", frame(10, start=start), now=NOW)
    before = stored(store, view)
    monkeypatch.setattr("mlfuncs_featurestore.offline.COMPACT_ROWS", 25)
    assert store.offline.compact(view) == 6  # the seventh is alone
    assert sorted(file.rows for file in store.offline.snapshot("spend").files) == [10, 30, 30]
    assert store.offline.compact(view) == 0
    assert stored(store, view).equals(before)


def test_every_commit_is_on_disk_before_the_next_one_stands_on_it(store, monkeypatch):
    """The one that makes the table, those that add and widen columns, and those of rows."""
    from mlfuncs_featurestore import delta_tables

    synced = []
    monkeypatch.setattr(delta_tables, "sync_file", lambda path: synced.append(os.path.basename(path)))
    for view in (
        spend(fields={"amount": "float32"}),
        spend(fields={"amount": "float32", "city": "string"}),
        spend(fields={"amount": "float64", "city": "string"}),
    ):
        store.apply(view)
        store.ingest("spend", frame(3, amount=0.5, city="x"), now=NOW)
    commits = sorted(os.listdir(f"{store.offline.uri('spend')}/_delta_log"))
    assert len(commits) == 6  # made, rows, column added, rows, widened, rows
    assert sorted(set(synced) - {"_delta_log"}) == commits


def test_a_commit_that_is_done_but_cannot_be_looked_up_says_so(store, monkeypatch):
    store.apply(spend())
    store.ingest("spend", frame(3), now=NOW)
    monkeypatch.setattr("mlfuncs_featurestore.delta_tables.find_commit", lambda *_: None)
    with pytest.raises(StorageError, match="done, but its log cannot be read; do not write the rows again"):
        store.ingest("spend", frame(3, start=3), now=NOW)
    assert stored(store, spend()).num_rows == 6


@pytest.mark.parametrize(
    "times",
    [
        pa.array([2**60], pa.timestamp("s")),
        pa.array([2**61, None], pa.timestamp("ms", "Europe/Berlin")),
        pa.array([2**31 - 1], pa.date32()),
    ],
)
def test_times_beyond_what_microseconds_count_are_refused_by_name(store, times):
    store.apply(spend())
    rows = pa.table({"user_id": [1] * len(times), "event_timestamp": times}).append_column(
        "amount", pa.nulls(len(times), pa.float64())
    )
    with pytest.raises(InvalidInput, match="'event_timestamp' has times beyond"):
        store.ingest("spend", rows.append_column("merchant", pa.nulls(len(times), pa.string())), now=NOW)
    if not times.null_count:
        with pytest.raises(InvalidInput, match="'event_timestamp' has times beyond"):
            store.get_historical_features(rows.select(["user_id", "event_timestamp"]), ["spend:amount"])


def test_statistics_of_the_largest_floats_are_made_without_a_warning(store):
    import warnings

    store.apply(spend())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.ingest("spend", frame(4, amount=[1.7e308, -1.7e308, 1.7e308, 1.7e308]), now=NOW)
    assert store.offline.statistics("spend")["amount"]["max"] == 1.7e308


def test_of_two_compactions_at_once_one_gives_way_and_no_row_doubles(store, monkeypatch):
    from mlfuncs_featurestore import delta_tables

    store.apply(spend(buckets=1))
    for start in range(0, 30, 10):
        store.ingest("spend", frame(10, start=start), now=NOW)
    commit, done = delta_tables.commit, []

    def after_the_other(uri, change):
        if not done:
            done.append(True)
            assert FeatureStore(store.settings).offline.compact(spend(buckets=1)) == 3
        return commit(uri, change)

    monkeypatch.setattr(delta_tables, "commit", after_the_other)
    assert store.offline.compact(spend(buckets=1)) == 0
    assert stored(store, spend(buckets=1))["user_id"].to_pylist() == list(range(30))


def test_changes_are_found_by_commit_also_after_compaction(store):
    store.apply(spend())
    first = store.ingest("spend", frame(10), now=NOW).version
    store.ingest("spend", frame(5, start=-100), now=NOW)  # older events: a run by event time would miss them
    store.offline.compact(spend())
    version, files = store.offline.changes("spend", first)
    assert sum(file.rows for file in files) == 5 and version == store.offline.snapshot("spend").version
    assert store.offline.changes("spend", version) == (version, [])
    assert sum(file.rows for file in store.offline.changes("spend", -1)[1]) == 15


def test_vacuum_deletes_what_no_version_needs(store):
    store.apply(spend(buckets=1))
    store.ingest("spend", frame(10), now=NOW)
    store.ingest("spend", frame(10, start=10), now=NOW)
    store.offline.compact(spend(buckets=1))
    assert len(store.offline.vacuum("spend", retention_hours=0, dry_run=True)) == 2
    store.offline.vacuum("spend", retention_hours=0)
    assert stored(store, spend(buckets=1)).num_rows == 20
    assert len(list(_parquet_files(store.offline.uri("spend")))) == 1


def test_fields_are_added_and_widened_in_the_table(store):
    store.apply(spend(fields={"amount": "float32", "count": "int32"}))
    store.ingest("spend", frame(3, amount=0.5, count=1), now=NOW)
    wider = spend(fields={"amount": "float64", "count": "int64", "city": "string"})
    store.apply(wider)
    store.ingest("spend", frame(3, start=3, amount=0.1, count=2**53 + 1, city="x"), now=NOW)
    rows = stored(store, wider)
    assert rows["count"].to_pylist() == [1, 1, 1, *[2**53 + 1] * 3]
    assert rows["amount"].to_pylist() == [0.5, 0.5, 0.5, 0.1, 0.1, 0.1]
    assert rows["city"].to_pylist() == [None, None, None, "x", "x", "x"]
    assert stored(store, wider, version=1).num_rows == 3


def test_a_store_with_the_old_definition_cannot_write_narrow_rows(store):
    from mlfuncs_featurestore.ingest import prepare_table

    old = spend(fields={"count": "int64"})
    prepare_table(store.offline.uri("spend"), old)
    with pytest.raises(Conflict, match="narrower than what is stored"):
        store.apply(old)
        store.ingest("spend", frame(1, count=2**40), now=NOW)
        prepare_table(store.offline.uri("spend"), spend(fields={"count": "int32"}))


def test_every_type_comes_back(store):
    fields = {
        "b": "bool", "i": "int8", "f": "float32", "t": "timestamp", "d": "date", "m": "decimal(20,3)",
        "l": "list<string>", "v": "vector<float32,2>", "s": "struct<a:int64,b:list<int64>>", "raw": "bytes",
    }  # fmt: skip
    view = FeatureView("all_types", entities=[Entity("k", uuid.UUID)], fields=fields)
    key = uuid.uuid4()
    import decimal

    row = {
        "k": key, "event_timestamp": NOW, "b": True, "i": -5, "f": 0.5, "t": NOW, "d": NOW.date(),
        "m": decimal.Decimal("12345678901234567.125"), "l": ["a", None], "v": [1.0, 2.0],
        "s": {"a": 2**53 + 1, "b": [1]}, "raw": b"\x00\xff",
    }  # fmt: skip
    store.apply(view)
    store.ingest("all_types", [row, {**dict.fromkeys(fields), "k": key, "event_timestamp": NOW}], now=NOW)
    rows = stored(store, view).to_pylist()
    assert {name: rows[0][name] for name in row} == {**row, "k": str(key)}
    assert all(rows[1][name] is None for name in fields)


def test_rows_that_do_not_fit_are_refused_with_every_reason(store):
    store.apply(spend())
    bad = frame(3, amount=["a", "b", "c"]).rename(columns={"merchant": "merchnt"})
    with pytest.raises(InvalidInput) as caught:
        store.ingest("spend", bad, now=NOW)
    assert {field["field"] for field in caught.value.fields} == {"amount", "merchant"}
    assert "is it 'merchnt'?" in str(caught.value)
    for changes, reason in [
        ({"user_id": [1, None, 3]}, "is null in 1 rows, first in row 1"),
        ({"event_timestamp": [NOW, None, NOW]}, "is null in 1 rows"),
        ({"event_timestamp": ["2024-01-01"] * 3}, "not a time"),
        ({"user_id": [1.5, 2.0, 3.0]}, "not a whole number"),
        ({"merchant": [1, 2, 3]}, "never made of numbers"),
    ]:
        with pytest.raises(InvalidInput, match=reason):
            store.ingest("spend", frame(3, **changes), now=NOW)
    assert store.offline.snapshot("spend").rows == 0


def test_naive_times_are_taken_as_utc_and_this_is_said_once(store):
    store.apply(spend(timestamp="naive_time"))
    rows = frame(2, naive_time=pd.to_datetime(["2024-01-01 00:00", "2024-01-01 01:00"]))
    with pytest.warns(UserWarning, match="taken as UTC"):
        store.ingest("spend", rows, now=NOW)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.ingest("spend", rows, now=NOW)
    times = stored(store, spend(timestamp="naive_time"))["naive_time"]
    assert times[0].as_py() == datetime.datetime(2024, 1, 1, tzinfo=UTC)


def test_future_events_are_warned_about_or_refused(store):
    store.apply(spend())
    future = frame(2, event_timestamp=[NOW, NOW + datetime.timedelta(seconds=1)])
    assert "lies in the future: 1 of 2" in store.ingest("spend", future, now=NOW).warnings[0]
    with pytest.raises(InvalidInput, match="lies in the future"):
        store.ingest("spend", future, now=NOW, future="reject")
    assert store.ingest("spend", future, now=NOW, future="quarantine").quarantined == 1
    assert store.ingest("spend", future, now=NOW, future="accept").warnings == ()
    with pytest.raises(SpecError, match="future is one of"):
        store.ingest("spend", future, future="maybe")
    with pytest.raises(SpecError, match="no option 'futur'"):
        store.ingest("spend", future, futur="reject")


@pytest.mark.parametrize(
    ("expectation", "bad"),
    [
        ({"column": "amount", "minimum": 0}, {"amount": [-0.1, 0.0, 1.0]}),
        ({"column": "amount", "maximum": 1}, {"amount": [1.5, 0.0, 1.0]}),
        ({"column": "amount", "minimum": 0}, {"amount": [float("nan"), 0.0, 1.0]}),
        ({"column": "amount", "not_null": True}, {"amount": pd.array([None, 0.0, 1.0], "Float64")}),
        ({"column": "merchant", "one_of": ["a", "b"]}, {"merchant": ["c", "a", None]}),
        ({"column": "merchant", "regex": "[ab]+"}, {"merchant": ["abc", "ab", None]}),
        ({"column": "event_timestamp", "fresh_within": "1d"}, {"event_timestamp": [OLD, NOW, NOW]}),
    ],
)
def test_an_expectation_rejects_quarantines_or_warns(tmp_path, expectation, bad):
    for action in ("reject", "quarantine", "warn"):
        store = FeatureStore(Settings(home=tmp_path / action, project="shop"))
        store.apply(spend(expectations=[Expectation(**expectation, action=action)]))
        rows = frame(3, **bad)
        if action == "reject":
            with pytest.raises(InvalidInput, match="1 of 3 rows do not hold, first row 0"):
                store.ingest("spend", rows, now=NOW)
            assert store.offline.snapshot("spend").rows == 0
            continue
        report = store.ingest("spend", rows, now=NOW)
        assert len(report.warnings) == 1
        aside = store.offline.quarantined("spend")
        assert (report.rows, aside.num_rows) == ((2, 1) if action == "quarantine" else (3, 0))
        if action == "quarantine":
            assert aside["user_id"].to_pylist() == [0]
            assert aside["__reason"].to_pylist() == [f"expected {Expectation(**expectation).describe()}"]


def test_each_commit_carries_statistics_of_its_features(store):
    store.apply(spend())
    amounts = pd.array([float(n) for n in range(98)] + [None, None], "Float64")
    store.ingest("spend", frame(100, amount=amounts), now=NOW)
    about = store.offline.statistics("spend")["amount"]
    assert (about["count"], about["nulls"], about["nans"], about["min"], about["max"]) == (100, 2, 0, 0.0, 97.0)
    assert about["mean"] == 48.5 and about["quantiles"]["0.5"] == 48.5 and about["distinct"] == pytest.approx(98, abs=3)
    assert sum(about["histogram"]["counts"]) == 98 and len(about["histogram"]["edges"]) == 21
    assert store.offline.statistics("spend")["merchant"]["distinct"] == pytest.approx(100, abs=3)
    history = store.offline.history("spend")
    assert (history[0]["version"], history[0]["operation"], history[0]["rows"]) == (1, "ingest", 100)


def test_statistics_over_batches_are_those_over_the_whole():
    from mlfuncs_featurestore.profile import Profile

    values = np.random.default_rng(1).normal(5, 2, 3000)
    whole, parts = Profile(["x"]), Profile(["x"])
    whole.add(pa.table({"x": values}))
    for start in range(0, 3000, 700):
        parts.add(pa.table({"x": values[start : start + 700]}))
    one, other = whole.to_dict()["x"], parts.to_dict()["x"]
    assert one["quantiles"] == other["quantiles"] and one["distinct"] == other["distinct"]
    assert one["std"] == pytest.approx(other["std"]) and one["std"] == pytest.approx(values.std(ddof=1))


def test_an_ingest_with_a_transaction_number_happens_once(store):
    store.apply(spend())
    for _ in range(2):
        store.ingest("spend", frame(5), now=NOW, transaction=("push-log", 7))
    assert stored(store, spend()).num_rows == 5
    store.ingest("spend", frame(5), now=NOW, transaction=("push-log", 8))
    assert stored(store, spend()).num_rows == 10


def test_ingest_order_grows_even_when_the_clock_goes_back(store, monkeypatch):
    import time

    store.apply(spend())
    store.ingest("spend", frame(5), now=NOW)
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    store.ingest("spend", frame(5, start=5), now=NOW)
    rows = stored(store, spend())
    assert rows["user_id"].to_pylist() == list(range(10)) and len(set(rows["__ingest"].to_pylist())) == 10
