"""What kfp-kubernetes gives a pod: given here as well where that can be, else said before the first step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, kubernetes

from mlfuncs.settings import Settings
from mlfuncs_pipelines.run_log import PipelineRun
from mlfuncs_pipelines.runner import run_pipeline
from mlfuncs_pipelines.validate import InvalidPipeline, load_pipeline

Run = Callable[..., PipelineRun]
IMAGE = "python:3.11"


@dsl.component(base_image=IMAGE)
def shout(path: str):
    import os

    with open(path, "w") as file:
        file.write(f"{os.environ['PASSWORD']} {os.environ.get('LEVEL')} {os.environ.get('EXTRA')}")


@dsl.container_component
def print_password(path: str):
    return dsl.ContainerSpec(image="alpine", command=["sh", "-c", 'printf %s "$PASSWORD" > "$0"', path])


@dsl.component(base_image=IMAGE)
def size(data: dsl.Input[dsl.Dataset]) -> int:
    return len(open(data.path).read())


@dsl.pipeline(name="pods")
def pods(path: str):
    task = shout(path=path)
    kubernetes.use_secret_as_env(task, secret_name="db", secret_key_to_env={"password": "PASSWORD"})
    kubernetes.use_config_map_as_env(task, config_map_name="app", config_map_key_to_env={"log-level": "LEVEL"})
    kubernetes.use_secret_as_env(task, secret_name="x", secret_key_to_env={"k": "EXTRA"}, optional=True)


def test_secrets_and_config_maps_reach_the_step_and_are_written_nowhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSWORD", "correct horse battery")
    monkeypatch.setenv("LEVEL", "debug")
    done = run(pods, path=str(tmp_path / "seen"))
    assert done.status == "succeeded", done.error
    assert (tmp_path / "seen").read_text() == "correct horse battery debug None"
    kept = b"".join(path.read_bytes() for path in done.folder.rglob("*") if path.is_file())
    assert b"pods" in kept and b"correct horse battery" not in kept


def test_a_secret_comes_from_the_folder_of_secrets_as_a_cluster_mounts_it(
    compiled: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dsl.pipeline(name="mounted")
    def mounted(path: str):
        task = shout(path=path)
        kubernetes.use_secret_as_env(task, secret_name="db", secret_key_to_env={"pass-word": "PASSWORD"})

    monkeypatch.delenv("PASSWORD", raising=False)
    (tmp_path / "secrets" / "db").mkdir(parents=True)
    (tmp_path / "secrets" / "db" / "pass-word").write_text("from a file\n")
    settings = Settings(home=tmp_path / "home", project="tests", secrets_dir=str(tmp_path / "secrets"))
    done = run_pipeline(load_pipeline(compiled(mounted)), {"path": str(tmp_path / "seen")}, settings)
    assert done.status == "succeeded", done.error
    assert (tmp_path / "seen").read_text() == "from a file None None"  # nor what the engine's environment once had


def test_all_that_is_missing_is_said_before_the_first_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dsl.pipeline(name="lacking")
    def lacking(path: str, uri: str = "/nowhere/data.csv"):
        task = shout(path=path)
        kubernetes.use_secret_as_env(task, secret_name="db", secret_key_to_env={"password": "PASSWORD"})
        kubernetes.mount_pvc(task, pvc_name="disk", mount_path="/nowhere/disk")
        kubernetes.use_secret_as_volume(task, secret_name="tls", mount_path="/nowhere/tls", optional=True)
        size(data=dsl.importer(artifact_uri=uri, artifact_class=dsl.Dataset).output)

    monkeypatch.delenv("PASSWORD", raising=False)
    with pytest.raises(InvalidPipeline) as caught:
        run(lacking, path=str(tmp_path / "seen"))
    assert not (tmp_path / "seen").exists() and len(caught.value.problems) == 3
    text = str(caught.value)
    for words in (
        "'password' of the secret 'db'",
        "set PASSWORD",
        "/nowhere/disk",
        "finds nothing at '/nowhere/data.csv'",
    ):
        assert words in text
    assert "/nowhere/tls" not in text


def test_an_importer_of_a_remote_file_is_not_looked_for_here(run: Run) -> None:
    @dsl.component(base_image=IMAGE)
    def where(data: dsl.Input[dsl.Dataset]) -> str:
        return data.uri

    @dsl.pipeline(name="remote")
    def remote() -> str:
        return where(data=dsl.importer(artifact_uri="gs://bucket/data.csv", artifact_class=dsl.Dataset).output).output

    assert run(remote).outputs == {"Output": "gs://bucket/data.csv"}


def test_an_importer_of_what_a_step_makes_is_left_to_the_run(run: Run, tmp_path: Path) -> None:
    @dsl.component(base_image=IMAGE)
    def make(path: str):
        with open(path, "w") as file:
            file.write("12345")

    @dsl.pipeline(name="later")
    def later(path: str) -> int:
        made = make(path=path)
        data = dsl.importer(artifact_uri=path, artifact_class=dsl.Dataset, reimport=True).after(made)
        return size(data=data.output).output

    assert run(later, path=str(tmp_path / "made")).outputs == {"Output": 5}


def test_a_command_gets_its_secret_from_the_environment_not_from_its_words(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlfuncs_pipelines.engine import Options

    @dsl.pipeline(name="command")
    def command(path: str):
        task = print_password(path=path)
        kubernetes.use_secret_as_env(task, secret_name="db", secret_key_to_env={"password": "PASSWORD"})

    monkeypatch.setenv("PASSWORD", "tr0ub4dor")
    done = run(command, Options(containers="process"), path=str(tmp_path / "seen"))
    assert done.status == "succeeded" and (tmp_path / "seen").read_text() == "tr0ub4dor"
    started = [json.loads(line) for line in (done.folder / "journal.jsonl").read_text().splitlines()]
    assert any(event["event"] == "started" for event in started) and "tr0ub4dor" not in json.dumps(started)
