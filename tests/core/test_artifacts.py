"""The artifact store: what goes in comes out equal, once, whole, and only when it can be trusted."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import hashlib
import json
import multiprocessing
import os
import pickle
import resource
import signal
import stat
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import polars as pl
import pytest
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression

from mlfuncs.artifacts import ArtifactRef, ArtifactStore
from mlfuncs.codecs import pickled
from mlfuncs.errors import ArtifactError, InvalidInput, NotFound, StorageError, UntrustedError
from mlfuncs.objects import key_of
from mlfuncs.results import HTML, ClassificationMetrics, FigureImage, Markdown, Metrics
from mlfuncs.settings import Settings
from mlfuncs.signing import project_key

matplotlib.use("agg")


class Color(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Config:
    rate: float
    color: Color
    window: tuple[int, int]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", project="demo")


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return ArtifactStore.open(settings)


def object_path(settings: Settings, ref: ArtifactRef) -> Path:
    return Path(settings.resolved_artifacts_url) / key_of(ref.digest)


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


class Exploding:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("value", "kind"),
        [
            (None, "json"),
            ({"a": (1, {2}), 3: Color.RED}, "json"),
            (Config(0.1, Color.RED, (1, 2)), "json"),
            (datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=2))), "json"),
            ("text", "json"),
            (b"\x00\xff", "bytes"),
            (Metrics(auc=0.9), "metrics"),
            (ClassificationMetrics.from_predictions([0, 1], [0.1, 0.9]), "classification_metrics"),
            (HTML("<b>é</b>\r\n"), "html"),
            (Markdown("# é\n"), "markdown"),
            (range(3), "pickle"),
        ],
        ids=lambda value: str(value)[:20],
    )
    def test_value_comes_back_equal(self, store: ArtifactStore, value: Any, kind: str) -> None:
        ref = store.put(value)
        taken = store.get(ref)
        assert ref.kind == kind and taken == value and type(taken) is type(value)

    def test_table_and_array(self, store: ArtifactStore) -> None:
        frame = pd.DataFrame(
            {
                "n": pd.array([1, None, 2**53 + 1], dtype="Int64"),
                "t": pd.date_range("2024", periods=3, tz="Europe/Paris"),
            }
        )
        ref = store.put(frame)
        pd.testing.assert_frame_equal(store.get(ref), frame)
        assert ref.metadata["rows"] == 3 and ref.metadata["schema"]["t"] == "timestamp[us, tz=Europe/Paris]"
        assert isinstance(store.get(ref, pl.DataFrame), pl.DataFrame)
        array = store.put(np.arange(6.0).reshape(2, 3))
        assert array.metadata["shape"] == [2, 3] and array.metadata["dtype"] == "float64"
        np.testing.assert_array_equal(store.get(array), np.arange(6.0).reshape(2, 3))

    def test_estimator_is_a_model_with_what_is_worth_knowing(self, store: ArtifactStore) -> None:
        model = LogisticRegression().fit(pd.DataFrame({"age": [1.0, 2.0], "size": [3.0, 1.0]}), ["no", "yes"])
        ref = store.put(model)
        assert ref.kind == "model" and ref.type_name.endswith("LogisticRegression")
        assert ref.metadata["features"] == ["age", "size"] and ref.metadata["classes"] == ["no", "yes"]
        assert "sklearn" in ref.metadata["libraries"]
        np.testing.assert_array_equal(store.get(ref).coef_, model.coef_)

    def test_function_of_a_notebook_cell_is_pickled_by_value(self, store: ArtifactStore) -> None:
        factor = 3
        assert store.get(store.put(lambda x: x * factor))(2) == 6

    def test_table_that_parquet_would_change_is_pickled(self, store: ArtifactStore) -> None:
        frame = pd.DataFrame({"o": [1, "a", None]})
        ref = store.put(frame)
        assert ref.kind == "pickle"
        pd.testing.assert_frame_equal(store.get(ref), frame)

    def test_figure_comes_back_as_its_image(self, store: ArtifactStore) -> None:
        ref = store.put(Figure(figsize=(2, 1)))
        image = store.get(ref)
        assert isinstance(image, FigureImage) and image.size == (ref.metadata["width"], ref.metadata["height"])
        assert store.get(store.put(image)) == image

    def test_file_comes_back_under_its_name_and_read_only(self, store: ArtifactStore, tmp_path: Path) -> None:
        (tmp_path / "weights.bin").write_bytes(b"w" * 3_000_000)
        taken = store.get(store.put(tmp_path / "weights.bin"))
        assert taken.name == "weights.bin" and taken.read_bytes() == b"w" * 3_000_000
        assert not taken.stat().st_mode & 0o222
        assert store.get(store.put(tmp_path / "weights.bin")) == taken

    def test_directory_comes_back_whole(self, store: ArtifactStore, tmp_path: Path) -> None:
        (tmp_path / "model" / "sub").mkdir(parents=True)
        (tmp_path / "model" / "sub" / "a.txt").write_text("a")
        (tmp_path / "model" / "run.sh").write_text("#!/bin/sh")
        (tmp_path / "model" / "run.sh").chmod(0o755)
        (tmp_path / "model" / "empty").mkdir()
        taken = store.get(store.put(tmp_path / "model"))
        assert taken.name == "model" and (taken / "sub" / "a.txt").read_text() == "a"
        assert (taken / "run.sh").stat().st_mode & stat.S_IXUSR and (taken / "empty").is_dir()

    def test_name_in_the_metadata_cannot_leave_the_cache(self, store: ArtifactStore, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        ref = store.put(tmp_path / "f")
        for name in ("../../../evil", "/evil", "..", ".", ""):
            taken = store.get(dataclasses.replace(ref, metadata={"name": name}))
            assert "cache" in taken.parts and taken.read_text() == "x" and ".." not in taken.parts

    def test_same_content_under_two_names(self, store: ArtifactStore, tmp_path: Path) -> None:
        for name in ("a.txt", "b.txt"):
            (tmp_path / name).write_text("same")
            assert store.get(store.put(tmp_path / name)).name == name

    def test_text_hinted_as_a_page_is_a_page(self, store: ArtifactStore) -> None:
        assert store.get(store.put("<b>x</b>", HTML)) == HTML("<b>x</b>")
        assert store.get(store.put("# x", Markdown)) == Markdown("# x")

    def test_value_that_nothing_can_hold_says_so(self, store: ArtifactStore) -> None:
        with pytest.raises(ArtifactError, match=r"generator cannot be stored: .*cannot be pickled"):
            store.put(i for i in range(3))

    def test_local_dataclass_needs_a_hint_where_it_is_not_known(self, store: ArtifactStore) -> None:
        @dataclasses.dataclass
        class Local:
            a: int

        ref = store.put(Local(1))
        assert ref.kind == "json" and store.get(ref, Local) == Local(1)
        with pytest.raises(ArtifactError, match="pass hint="):
            store.get(ref)


class TestAddressing:
    def test_digest_is_of_the_bytes(self, store: ArtifactStore, settings: Settings) -> None:
        ref = store.put([1, 2])
        assert object_path(settings, ref).read_bytes() == b"[1,2]"
        assert ref.digest == hashlib.sha256(b"[1,2]").hexdigest() and ref.size_bytes == 5

    def test_equal_values_are_stored_once(self, store: ArtifactStore, settings: Settings) -> None:
        frame = pd.DataFrame({"a": np.arange(1000)})
        assert store.put(frame).digest == store.put(frame.copy()).digest
        assert len([p for p in Path(settings.resolved_artifacts_url).rglob("objects/*/*") if p.is_file()]) == 1

    def test_bytes_of_any_kind(self, store: ArtifactStore) -> None:
        ref = store.put_bytes(b"a log", "log")
        assert (ref.kind, ref.size_bytes) == ("log", 5)
        assert store.exists(ref.digest) and store.read_bytes(ref.digest) == b"a log"
        assert not store.exists("0" * 64)
        with pytest.raises(NotFound, match="log"):
            store.get(ref)

    def test_ref_comes_back_from_json(self, store: ArtifactStore) -> None:
        ref = store.put(np.arange(3))
        again = ArtifactRef.from_dict(json.loads(json.dumps(ref.to_dict())))
        assert again == ref and again.metadata == ref.metadata
        assert hash(again) == hash(ref)

    @pytest.mark.parametrize(
        "values", [{}, {"digest": "../x", "kind": "json"}, {"digest": "0" * 64, "kind": "a", "z": 1}]
    )
    def test_what_is_no_ref_is_refused(self, values: Any) -> None:
        with pytest.raises(ArtifactError):
            ArtifactRef.from_dict(values)

    def test_absent_artifact_is_named(self, store: ArtifactStore) -> None:
        with pytest.raises(ArtifactError, match="no artifact 00000"):
            store.get(ArtifactRef("0" * 64, "json"))

    def test_ref_shows_itself(self, store: ArtifactStore) -> None:
        shown = store.put(pd.DataFrame({"a": [1]}))._repr_html_()
        assert "parquet" in shown and "<th>rows</th><td>1</td>" in shown

    def test_local_path_is_the_object_itself(self, store: ArtifactStore, settings: Settings) -> None:
        ref = store.put(pd.DataFrame({"a": [1]}))
        assert store.local_path(ref) == object_path(settings, ref)
        assert pd.read_parquet(store.local_path(ref)).shape == (1, 1)


class TestTrust:
    def test_changed_bytes_of_a_safe_format_are_refused(self, store: ArtifactStore, settings: Settings) -> None:
        for value in ([1, 2], np.arange(3), pd.DataFrame({"a": [1]}), HTML("x"), b"abc"):
            ref = store.put(value)
            path = object_path(settings, ref)
            overwrite(path, path.read_bytes()[:-1] + b"!")
            with pytest.raises(UntrustedError, match="does not match its digest"):
                store.get(ref)

    def test_changed_file_is_not_unpacked(self, store: ArtifactStore, settings: Settings, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("x")
        ref = store.put(tmp_path / "f")
        overwrite(object_path(settings, ref), b"y")
        with pytest.raises(UntrustedError):
            store.get(ref)

    def test_pickle_with_changed_bytes_never_runs(
        self, store: ArtifactStore, settings: Settings, tmp_path: Path
    ) -> None:
        trap = tmp_path / "ran"
        ref = store.put(range(3))
        overwrite(object_path(settings, ref), pickle.dumps(Exploding(trap)))
        with pytest.raises(UntrustedError, match="does not match its digest"):
            store.get(ref)
        assert not trap.exists()

    def test_pickle_signed_by_a_foreign_key_never_runs(self, settings: Settings, tmp_path: Path) -> None:
        trap = tmp_path / "ran"
        shared = str(tmp_path / "shared")
        stranger = dataclasses.replace(settings, home=tmp_path / "stranger", artifacts_url=shared)
        reader = dataclasses.replace(settings, artifacts_url=shared)
        ref = ArtifactStore.open(stranger).put([Exploding(trap), object()])
        assert ref.kind == "pickle"
        with pytest.raises(UntrustedError, match="a key that is not trusted here"):
            ArtifactStore.open(reader).get(ref)
        assert not trap.exists()

    def test_key_that_the_reader_trusts_is_enough(self, settings: Settings, tmp_path: Path) -> None:
        shared = str(tmp_path / "shared")
        friend = dataclasses.replace(settings, home=tmp_path / "friend", artifacts_url=shared)
        ref = ArtifactStore.open(friend).put(range(3))
        trusting = dataclasses.replace(settings, artifacts_url=shared, trusted_keys=project_key(friend).public)
        assert ArtifactStore.open(trusting).get(ref) == range(3)

    @pytest.mark.parametrize("kind", ["pickle", "model"])
    def test_unsigned_pickle_never_runs(self, store: ArtifactStore, tmp_path: Path, kind: str) -> None:
        trap = tmp_path / "ran"
        ref = store.put_bytes(pickle.dumps(Exploding(trap)), kind)
        with pytest.raises(UntrustedError, match="is not signed"):
            store.get(ref)
        assert not trap.exists()

    def test_signature_of_other_bytes_or_of_another_kind_does_not_count(
        self, store: ArtifactStore, settings: Settings, tmp_path: Path
    ) -> None:
        trap = tmp_path / "ran"
        payload = pickle.dumps(Exploding(trap))
        key = project_key(settings)
        other = store.put_bytes(payload + pickled.seal("pickle", hashlib.sha256(b"other").hexdigest(), key), "pickle")
        model = store.put_bytes(payload + pickled.seal("model", hashlib.sha256(payload).hexdigest(), key), "pickle")
        garbled = store.put_bytes(payload + b"\n#mlfuncs-seal \xff\xfe\n", "pickle")
        for ref in (other, model, garbled):
            with pytest.raises(UntrustedError):
                store.get(ref)
        assert not trap.exists()

    def test_safe_artifact_said_to_be_a_pickle_is_refused(self, store: ArtifactStore, tmp_path: Path) -> None:
        trap = tmp_path / "ran"
        ref = store.put(pickle.dumps(Exploding(trap)))
        assert ref.kind == "bytes"
        with pytest.raises(UntrustedError):
            store.get(dataclasses.replace(ref, kind="pickle"))
        assert not trap.exists()

    @pytest.mark.parametrize("kind", ["parquet", "npy", "json", "metrics", "classification_metrics"])
    def test_reading_takes_one_format_and_never_another(self, store: ArtifactStore, tmp_path: Path, kind: str) -> None:
        trap = tmp_path / "ran"
        ref = store.put_bytes(pickle.dumps(Exploding(trap)), kind)
        with pytest.raises((ArtifactError, InvalidInput)):
            store.get(ref)
        assert not trap.exists()

    def test_sealed_pickle_is_still_a_pickle_for_other_tools(self, store: ArtifactStore) -> None:
        ref = store.put(range(3))
        with store.local_path(ref).open("rb") as file:
            assert pickle.load(file) == range(3)


class TestRemote:
    def test_every_kind_goes_through_a_remote_store(self, settings: Settings, tmp_path: Path) -> None:
        url = f"memory://artifacts-{os.getpid()}-{tmp_path.name}"
        one = ArtifactStore.open(dataclasses.replace(settings, artifacts_url=url))
        (tmp_path / "f.txt").write_text("x")
        frame = pd.DataFrame({"a": [1.5]})
        refs = [one.put(value) for value in ({"a": 1}, frame, np.arange(3), range(3), tmp_path / "f.txt")]
        other = dataclasses.replace(settings, home=tmp_path / "other", artifacts_url=url)
        trusting = dataclasses.replace(other, trusted_keys=project_key(settings).public)
        two = ArtifactStore.open(trusting)
        taken = [two.get(ref) for ref in refs]
        assert taken[0] == {"a": 1} and taken[3] == range(3) and taken[4].read_text() == "x"
        pd.testing.assert_frame_equal(taken[1], frame)
        assert two.local_path(refs[1]).is_relative_to(tmp_path / "other")


def _put_and_get(settings: Settings) -> list[str]:
    store = ArtifactStore.open(settings)
    refs = [store.put(value) for i in range(5) for value in ({"i": i}, np.full(1000, i), range(i))]
    for ref in refs:
        store.get(ref)
    return [ref.digest for ref in refs]


def test_sixteen_processes_share_a_store(settings: Settings) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside the threads of arrow is what is tried here
        with multiprocessing.get_context("fork").Pool(16) as pool:
            found = pool.map(_put_and_get, [settings] * 16, chunksize=1)
    assert len({tuple(digests) for digests in found}) == 1
    assert not list((Path(settings.resolved_artifacts_url) / "staging").iterdir())


@pytest.mark.parametrize(
    "value", [np.zeros(100_000), "x" * 100_000, LogisticRegression(C=2), pd.DataFrame({"a": range(99999)})]
)
def test_a_full_disk_is_said_and_leaves_nothing(store: ArtifactStore, settings: Settings, value: Any) -> None:
    store.put("first")
    before, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(StorageError, match="free some disk space"):
            store.put(value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert len([path for path in Path(settings.resolved_artifacts_url).rglob("*") if path.is_file()]) == 1
