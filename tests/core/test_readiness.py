"""Everything that waits for pipes and sockets works in a process that has very many of them."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

import mlfuncs as ml
from mlfuncs.readiness import readable


@pytest.fixture
def many_open_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"no process may open 2,048 files here, only {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    opened = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    yield
    for descriptor in opened:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_of_any_number_can_be_waited_for(many_open_files: None) -> None:
    reader, writer = os.pipe()
    assert reader > 1023
    assert readable([reader], 0) == []
    os.write(writer, b"x")
    assert readable([reader]) == [reader]
    os.close(writer)
    os.close(reader)


def double(x: int) -> int:
    return 2 * x


def test_runs_and_pipelines_work_in_a_process_with_many_open_files(many_open_files: None) -> None:
    function = ml.function(double)
    assert ml.run(function, {"x": 2}, isolation="process").output == 4

    @ml.pipeline
    def twice(x: int = 3):
        return function(function(x).output).output

    assert twice.run().output == 12
