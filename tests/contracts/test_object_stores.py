"""What every object store must do; each adapter passes the same class."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlfuncs.errors import ArtifactError, StorageError, UntrustedError
from mlfuncs.objects import LocalObjects, ObjectStore, RemoteObjects, check_digest, key_of, open_objects

CONTENT = b"some bytes" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def store(objects: ObjectStore, content: bytes = CONTENT) -> str:
    digest = hashlib.sha256(content).hexdigest()
    with objects.stage() as staged:
        staged.write_bytes(content)
        objects.commit(staged, digest)
    return digest


class ObjectStoreContract:
    """Run on each adapter by a fixture `objects`."""

    def test_what_was_committed_is_there_whole(self, objects: ObjectStore) -> None:
        store(objects)
        assert objects.size(DIGEST) == len(CONTENT)
        assert objects.path(DIGEST).read_bytes() == CONTENT

    def test_absent_object_has_no_size_and_no_path(self, objects: ObjectStore) -> None:
        assert objects.size(DIGEST) is None
        with pytest.raises(ArtifactError, match=DIGEST):
            objects.path(DIGEST)

    def test_equal_content_is_committed_any_number_of_times(self, objects: ObjectStore) -> None:
        for _ in range(3):
            store(objects)
        assert objects.path(DIGEST).read_bytes() == CONTENT

    def test_empty_object_is_not_an_absent_one(self, objects: ObjectStore) -> None:
        assert objects.size(store(objects, b"")) == 0

    def test_staged_file_is_gone_when_it_was_not_committed(self, objects: ObjectStore) -> None:
        with pytest.raises(KeyError), objects.stage() as staged:
            staged.write_bytes(CONTENT)
            raise KeyError
        assert not staged.exists() and objects.size(DIGEST) is None

    @pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 63 + "\n"])
    def test_what_is_no_digest_never_becomes_a_path(self, objects: ObjectStore, digest: str) -> None:
        with pytest.raises(ArtifactError, match="64 hex digits"):
            objects.path(digest)
        with pytest.raises(ArtifactError, match="64 hex digits"):
            objects.size(digest)


class TestLocalObjects(ObjectStoreContract):
    @pytest.fixture
    def objects(self, tmp_path: Path) -> ObjectStore:
        return LocalObjects(tmp_path / "store")

    def test_objects_are_read_only_files_at_their_place(self, tmp_path: Path) -> None:
        objects = LocalObjects(tmp_path)
        store(objects)
        path = tmp_path / "objects" / DIGEST[:2] / DIGEST
        assert objects.path(DIGEST) == path and path.stat().st_mode & 0o777 == 0o444

    def test_torn_file_of_a_crashed_machine_is_replaced(self, tmp_path: Path) -> None:
        objects = LocalObjects(tmp_path)
        torn = tmp_path / key_of(DIGEST)
        torn.parent.mkdir(parents=True)
        torn.write_bytes(CONTENT[:7])
        store(objects)
        assert torn.read_bytes() == CONTENT

    def test_folder_that_cannot_be_made_is_a_storage_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StorageError, match="MLFUNCS_ARTIFACTS_URL"):
            store(LocalObjects(tmp_path / "file" / "store"))

    def test_leftovers_of_dead_processes_are_swept_by_age(self, tmp_path: Path) -> None:
        objects = LocalObjects(tmp_path)
        with objects.stage() as staged:
            now = staged.stat().st_mtime
            assert objects.sweep_staging(now + 3600) == 0 and staged.exists()
            assert objects.sweep_staging(now + 2 * 24 * 3600) == 1 and not staged.exists()

    def test_sixteen_processes_at_once_lose_and_tear_nothing(self, tmp_path: Path) -> None:
        with multiprocessing.get_context("fork").Pool(16) as pool:
            found = pool.map(_store_many, [tmp_path] * 16)
        assert len({tuple(digests) for digests in found}) == 1
        for digest in found[0]:
            content = LocalObjects(tmp_path).path(digest).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest
        assert not list((tmp_path / "staging").iterdir())

    def test_killed_writer_leaves_no_object(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path; from mlfuncs.objects import LocalObjects\n"
            "with LocalObjects(Path(sys.argv[1])).stage() as staged:\n"
            "    staged.write_bytes(b'half'); print('written', flush=True); time.sleep(60)\n"
        )
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"written\n"
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait(60)
        writer.stdout.close()
        assert not (tmp_path / "objects").exists()
        assert LocalObjects(tmp_path).sweep_staging(time.time() + 2 * 24 * 3600) == 1


def _store_many(root: Path) -> list[str]:
    objects = LocalObjects(root)
    return [store(objects, bytes([i]) * 50_000) for i in range(20)]


class TestRemoteObjects(ObjectStoreContract):
    @pytest.fixture
    def url(self) -> Iterator[str]:
        import fsspec

        url = f"memory://{uuid.uuid4().hex}/artifacts"
        yield url
        fsspec.filesystem("memory").rm(url, recursive=True) if fsspec.filesystem("memory").exists(url) else None

    @pytest.fixture
    def objects(self, url: str, tmp_path: Path) -> ObjectStore:
        return RemoteObjects(url, tmp_path / "cache")

    def test_another_machine_reads_what_one_wrote_and_keeps_it(self, url: str, tmp_path: Path) -> None:
        import fsspec

        store(RemoteObjects(url, tmp_path / "one"))
        two = RemoteObjects(url, tmp_path / "two")
        assert two.path(DIGEST).read_bytes() == CONTENT
        fsspec.filesystem("memory").rm(url, recursive=True)
        assert two.path(DIGEST).read_bytes() == CONTENT and two.size(DIGEST) is None

    def test_changed_bytes_never_reach_the_cache(self, url: str, tmp_path: Path) -> None:
        import fsspec

        store(RemoteObjects(url, tmp_path / "one"))
        fsspec.filesystem("memory").pipe_file(f"{url}/{key_of(DIGEST)}", b"x" * len(CONTENT))
        two = RemoteObjects(url, tmp_path / "two")
        with pytest.raises(UntrustedError, match="does not match its digest"):
            two.path(DIGEST)
        assert not list((tmp_path / "two").rglob("*/" + DIGEST))

    def test_equal_content_is_put_once(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        objects = RemoteObjects(url, tmp_path)
        store(objects)
        monkeypatch.setattr(objects._fs, "put_file", lambda *a, **k: pytest.fail("put a second time"), raising=True)
        store(objects)

    def test_unknown_protocol_is_a_storage_error(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="nowhere://"):
            RemoteObjects("nowhere://bucket", tmp_path)

    def test_store_that_is_away_is_a_storage_error(self, tmp_path: Path) -> None:
        objects = RemoteObjects("http://127.0.0.1:9/artifacts", tmp_path)
        with pytest.raises((StorageError, ArtifactError)):
            store(objects)


class TestS3Objects(ObjectStoreContract):
    @pytest.fixture
    def objects(self, s3_bucket: str, tmp_path: Path) -> ObjectStore:
        return RemoteObjects(f"{s3_bucket}/artifacts", tmp_path / "cache")

    def test_another_machine_reads_what_one_wrote(self, s3_bucket: str, tmp_path: Path) -> None:
        store(RemoteObjects(f"{s3_bucket}/artifacts", tmp_path / "one"))
        assert RemoteObjects(f"{s3_bucket}/artifacts", tmp_path / "two").path(DIGEST).read_bytes() == CONTENT

    def test_a_bucket_that_is_not_there_is_a_storage_error(self, s3_bucket: str, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="no-such-bucket"):
            store(RemoteObjects("s3://no-such-bucket/artifacts", tmp_path))


def test_url_chooses_the_adapter(tmp_path: Path) -> None:
    assert isinstance(open_objects(str(tmp_path), tmp_path), LocalObjects)
    assert isinstance(open_objects(f"file://{tmp_path}", tmp_path), LocalObjects)
    assert isinstance(open_objects("memory://x", tmp_path), RemoteObjects)


def test_digest_of_hex_is_taken() -> None:
    assert check_digest(DIGEST) == DIGEST
