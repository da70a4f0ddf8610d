"""Files written by hand in the older form of the IR, schemaVersion 2.0.0: `type`, `constantValue`, primitive values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlfuncs.errors import InvalidInput
from mlfuncs.settings import Settings
from mlfuncs_pipelines.engine import Options
from mlfuncs_pipelines.runner import run_pipeline
from mlfuncs_pipelines.validate import check_file, load_pipeline

FILE = """
schemaVersion: 2.0.0
sdkVersion: kfp-1.8.22
pipelineInfo: {name: by-hand}
root:
  inputDefinitions:
    parameters:
      n: {type: INT}
      word: {type: STRING}
  outputDefinitions:
    parameters:
      total: {type: INT}
  dag:
    outputs:
      parameters:
        total: {valueFromParameter: {producerSubtask: second, outputParameterKey: sum}}
    tasks:
      first:
        taskInfo: {name: first}
        componentRef: {name: comp-add}
        inputs:
          parameters:
            a: {componentInputParameter: n}
            b: {runtimeValue: {constantValue: {intValue: '40'}}}
      second:
        taskInfo: {name: second}
        componentRef: {name: comp-add}
        dependentTasks: [first]
        triggerPolicy:
          condition: "inputs.parameters['a'].int_value > 0"
        inputs:
          parameters:
            a: {taskOutputParameter: {producerTask: first, outputParameterKey: sum}}
            b: {runtimeValue: {constantValue: {intValue: '1'}}}
      third:
        taskInfo: {name: third}
        componentRef: {name: comp-say}
        inputs:
          parameters:
            word: {componentInputParameter: word}
            share: {runtimeValue: {constantValue: {doubleValue: 0.5}}}
            end: {runtimeValue: {constantValue: {stringValue: '!'}}}
components:
  comp-add:
    executorLabel: exec-add
    inputDefinitions: {parameters: {a: {type: INT}, b: {type: INT}}}
    outputDefinitions: {parameters: {sum: {type: INT}}}
  comp-say:
    executorLabel: exec-say
    inputDefinitions: {parameters: {word: {type: STRING}, share: {type: DOUBLE}, end: {type: STRING}}}
    outputDefinitions: {parameters: {said: {type: STRING}}}
deploymentSpec:
  executors:
    exec-add:
      container:
        image: busybox
        command: [sh, -c, 'echo $(($0 + $1)) > "$2"']
        args:
          - "{{$.inputs.parameters['a']}}"
          - "{{$.inputs.parameters['b']}}"
          - "{{$.outputs.parameters['sum'].output_file}}"
    exec-say:
      container:
        image: busybox
        command: [sh, -c, 'printf "%s %s%s" "$0" "$1" "$2" > "$3"']
        args:
          - "{{$.inputs.parameters['word']}}"
          - "{{$.inputs.parameters['share']}}"
          - "{{$.inputs.parameters['end']}}"
          - "{{$.outputs.parameters['said'].output_file}}"
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[[dict[str, Any] | None], Path]:
    def write(document: dict[str, Any] | None = None) -> Path:
        path = tmp_path / "by-hand.yaml"
        path.write_text(json.dumps(document) if document else FILE)
        return path

    return write


def test_a_file_of_the_older_schema_runs_and_validate_says_what_to_do(written: Any, settings: Settings) -> None:
    path = written()
    problems = check_file(path)[1]
    assert [problem.place for problem in problems] == ["schemaVersion"] and "2.1.0" in str(problems[0])
    done = run_pipeline(load_pipeline(path), {"n": 1, "word": "well"}, settings, Options(containers="process"))
    assert done.status == "succeeded", done.error
    assert done.outputs == {"total": 42} and type(done.outputs["total"]) is int
    assert done.steps["third"].outputs.parameters == {"said": "well 0.5!"}


def test_conditions_on_the_older_values_are_evaluated(written: Any, settings: Settings) -> None:
    done = run_pipeline(load_pipeline(written()), {"n": -50, "word": ""}, settings, Options(containers="process"))
    assert done.steps["second"].status == "skipped" and done.status == "succeeded" and done.outputs == {}


def test_the_older_types_are_checked_before_the_first_step(written: Any, settings: Settings) -> None:
    with pytest.raises(InvalidInput, match="n"):
        run_pipeline(load_pipeline(written()), {"n": "many", "word": ""}, settings, Options(containers="process"))
    with pytest.raises(InvalidInput, match="word"):
        run_pipeline(load_pipeline(written()), {"n": 1}, settings, Options(containers="process"))


def test_declarations_of_both_forms_may_stand_in_one_file(written: Any, settings: Settings) -> None:
    document = yaml.safe_load(FILE.replace("schemaVersion: 2.0.0", "schemaVersion: '2.0.0'"))
    document["root"]["inputDefinitions"]["parameters"]["word"] = {"parameterType": "STRING", "defaultValue": "there"}
    done = run_pipeline(load_pipeline(written(document)), {"n": 2}, settings, Options(containers="process"))
    assert done.steps["third"].outputs.parameters == {"said": "there 0.5!"} and done.outputs == {"total": 43}
