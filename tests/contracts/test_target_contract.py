"""One suite for every target that serves endpoints: the in-memory fake and processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import mlfuncs as ml
from mlfuncs import adapters
from mlfuncs.errors import NotFound
from mlfuncs.registry import open_registry
from mlfuncs.serving.endpoints import Endpoint, deploy, endpoint, list_endpoints
from mlfuncs.serving.targets import open_target
from mlfuncs.settings import Settings, read_settings


class TargetContract:
    """What holds for every target. A subclass names it; its fixtures stop what it started."""

    target = ""

    def put(self, factor: int) -> Endpoint:
        def scaled(x: int) -> int:
            return x * factor

        return deploy(scaled, name="scaled", target=self.target, scale=ml.Scale(min=1, max=2))

    def test_a_deployed_endpoint_is_ready_and_knows_its_revision(self):
        made = self.put(2)
        status = made.status()
        assert (status.name, status.project, status.state, status.revision) == ("scaled", "test", "ready", "rev-1")
        assert status.url == made.url
        assert status.traffic == {"rev-1": 100}
        assert [(replica.revision, replica.state) for replica in status.replicas] == [("rev-1", "ready")]
        assert [found.name for found in list_endpoints()] == ["scaled"]

    def test_traffic_is_in_force_when_the_call_returns(self):
        self.put(2)
        made = self.put(3)
        assert made.status().traffic == {"rev-2": 100}
        made.traffic({"rev-1": 30, "rev-2": 70})
        assert made.status().traffic == {"rev-1": 30, "rev-2": 70}
        assert {replica.revision for replica in made.status().replicas if replica.state == "ready"} == {
            "rev-1",
            "rev-2",
        }
        made.promote("rev-1")
        assert made.status().traffic == {"rev-1": 100}
        made.rollback()
        assert made.status().traffic == {"rev-2": 100}
        assert made.status().revisions == ("rev-1", "rev-2")

    def test_applying_again_changes_nothing(self, settings: Settings):
        made = self.put(2)
        before = made.status()
        row = open_registry(read_settings()).endpoints.get("scaled")
        open_target(self.target, read_settings()).apply(row)
        after = made.status()
        assert (after.traffic, after.replicas, after.revision) == (before.traffic, before.replicas, before.revision)

    def test_logs_are_lines(self):
        lines = list(self.put(2).logs(5))
        assert len(lines) <= 5
        assert all(isinstance(line, str) and "\n" not in line for line in lines)

    def test_a_deleted_endpoint_is_gone_and_its_tombstone_purged(self):
        self.put(2).delete()
        with pytest.raises(NotFound):
            endpoint("scaled")
        rows = open_registry(read_settings()).endpoints.changes(0)
        assert [row.name for row in rows] == []
        assert self.put(2).revision == "rev-1"


class TestMemoryTarget(TargetContract):
    target = "memory"


class TestProcessTarget(TargetContract):
    target = "process"

    @pytest.fixture(autouse=True)
    def live(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setenv("MLFUNCS_PORT", "0")
        yield
        adapters.load("target:process")(read_settings()).stop()
