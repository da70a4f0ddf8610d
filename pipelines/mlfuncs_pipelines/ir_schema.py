"""The fields of a kfp v2 pipeline file, as data: message name to field to kind.

A kind is "string", "boolean", "integer", "number", "any" (a JSON value), "struct" (a JSON object), "duration",
"enum:A|B", the name of a message, "[kind]" for a list or "{kind}" for a map with free keys. The source is
pipeline_spec.proto of Kubeflow Pipelines; a test compares this table with the descriptor that kfp ships.
"""

from __future__ import annotations

_PARAMETER_TYPE = (
    "enum:PARAMETER_TYPE_ENUM_UNSPECIFIED|NUMBER_DOUBLE|NUMBER_INTEGER|STRING|BOOLEAN|LIST|STRUCT"
    "|TASK_FINAL_STATUS|TASK_CONFIG"
)
_PASSTHROUGH = (
    "enum:NONE|RESOURCES|ENV|KUBERNETES_AFFINITY|KUBERNETES_TOLERATIONS|KUBERNETES_NODE_SELECTOR|KUBERNETES_VOLUMES"
)

MESSAGES: dict[str, dict[str, str]] = {
    "PipelineSpec": {
        "pipelineInfo": "PipelineInfo",
        "deploymentSpec": "PipelineDeploymentConfig",
        "sdkVersion": "string",
        "schemaVersion": "string",
        "components": "{ComponentSpec}",
        "root": "ComponentSpec",
        "defaultPipelineRoot": "string",
    },
    "PipelineInfo": {"name": "string", "displayName": "string", "description": "string"},
    "ComponentSpec": {
        "inputDefinitions": "ComponentInputsSpec",
        "outputDefinitions": "ComponentOutputsSpec",
        "dag": "DagSpec",
        "executorLabel": "string",
        "singlePlatformSpecs": "[SinglePlatformSpec]",
        "taskConfigPassthroughs": "[TaskConfigPassthrough]",
    },
    "ComponentInputsSpec": {
        "artifacts": "{ComponentInputsSpecArtifactSpec}",
        "parameters": "{ComponentInputsSpecParameterSpec}",
    },
    "ComponentInputsSpecArtifactSpec": {
        "artifactType": "ArtifactTypeSchema",
        "isArtifactList": "boolean",
        "isOptional": "boolean",
        "description": "string",
    },
    "ArtifactTypeSchema": {
        "schemaTitle": "string",
        "schemaUri": "string",
        "instanceSchema": "string",
        "schemaVersion": "string",
    },
    "ComponentInputsSpecParameterSpec": {
        "type": "enum:PRIMITIVE_TYPE_UNSPECIFIED|INT|DOUBLE|STRING",
        "parameterType": _PARAMETER_TYPE,
        "defaultValue": "any",
        "isOptional": "boolean",
        "description": "string",
        "literals": "[any]",
    },
    "ComponentOutputsSpec": {
        "artifacts": "{ComponentOutputsSpecArtifactSpec}",
        "parameters": "{ComponentOutputsSpecParameterSpec}",
    },
    "ComponentOutputsSpecArtifactSpec": {
        "artifactType": "ArtifactTypeSchema",
        "properties": "{ValueOrRuntimeParameter}",
        "customProperties": "{ValueOrRuntimeParameter}",
        "metadata": "struct",
        "isArtifactList": "boolean",
        "description": "string",
    },
    "ValueOrRuntimeParameter": {"constantValue": "Value", "runtimeParameter": "string", "constant": "any"},
    "Value": {"intValue": "integer", "doubleValue": "number", "stringValue": "string"},
    "ComponentOutputsSpecParameterSpec": {
        "type": "enum:PRIMITIVE_TYPE_UNSPECIFIED|INT|DOUBLE|STRING",
        "parameterType": _PARAMETER_TYPE,
        "description": "string",
    },
    "DagSpec": {"tasks": "{PipelineTaskSpec}", "outputs": "DagOutputsSpec"},
    "PipelineTaskSpec": {
        "taskInfo": "PipelineTaskInfo",
        "inputs": "TaskInputsSpec",
        "dependentTasks": "[string]",
        "cachingOptions": "CachingOptions",
        "componentRef": "ComponentRef",
        "triggerPolicy": "TriggerPolicy",
        "artifactIterator": "ArtifactIteratorSpec",
        "parameterIterator": "ParameterIteratorSpec",
        "retryPolicy": "RetryPolicy",
        "iteratorPolicy": "IteratorPolicy",
    },
    "PipelineTaskInfo": {"name": "string"},
    "TaskInputsSpec": {"parameters": "{InputParameterSpec}", "artifacts": "{InputArtifactSpec}"},
    "InputParameterSpec": {
        "taskOutputParameter": "TaskOutputParameterSpec",
        "runtimeValue": "ValueOrRuntimeParameter",
        "componentInputParameter": "string",
        "taskFinalStatus": "TaskFinalStatus",
        "parameterExpressionSelector": "string",
    },
    "TaskOutputParameterSpec": {"producerTask": "string", "outputParameterKey": "string"},
    "TaskFinalStatus": {"producerTask": "string"},
    "InputArtifactSpec": {"taskOutputArtifact": "TaskOutputArtifactSpec", "componentInputArtifact": "string"},
    "TaskOutputArtifactSpec": {"producerTask": "string", "outputArtifactKey": "string"},
    "CachingOptions": {"enableCache": "boolean", "cacheKey": "string"},
    "ComponentRef": {"name": "string"},
    "TriggerPolicy": {
        "condition": "string",
        "strategy": "enum:TRIGGER_STRATEGY_UNSPECIFIED|ALL_UPSTREAM_TASKS_SUCCEEDED|ALL_UPSTREAM_TASKS_COMPLETED",
    },
    "ArtifactIteratorSpec": {"items": "ArtifactIteratorSpecItemsSpec", "itemInput": "string"},
    "ArtifactIteratorSpecItemsSpec": {"inputArtifact": "string"},
    "ParameterIteratorSpec": {"items": "ParameterIteratorSpecItemsSpec", "itemInput": "string"},
    "ParameterIteratorSpecItemsSpec": {"raw": "string", "inputParameter": "string"},
    "RetryPolicy": {
        "maxRetryCount": "integer",
        "backoffDuration": "duration",
        "backoffFactor": "number",
        "backoffMaxDuration": "duration",
    },
    "IteratorPolicy": {"parallelismLimit": "integer"},
    "DagOutputsSpec": {"artifacts": "{DagOutputArtifactSpec}", "parameters": "{DagOutputParameterSpec}"},
    "DagOutputArtifactSpec": {"artifactSelectors": "[ArtifactSelectorSpec]"},
    "ArtifactSelectorSpec": {"producerSubtask": "string", "outputArtifactKey": "string"},
    "DagOutputParameterSpec": {
        "valueFromParameter": "ParameterSelectorSpec",
        "valueFromOneof": "ParameterSelectorsSpec",
    },
    "ParameterSelectorSpec": {"producerSubtask": "string", "outputParameterKey": "string"},
    "ParameterSelectorsSpec": {"parameterSelectors": "[ParameterSelectorSpec]"},
    "SinglePlatformSpec": {
        "deploymentSpec": "PlatformDeploymentConfig",
        "platform": "string",
        "config": "struct",
        "pipelineConfig": "PipelineConfig",
    },
    "PlatformDeploymentConfig": {"executors": "{struct}"},
    "PipelineConfig": {
        "resourceTtlOnCompletion": "integer",
        "workspace": "WorkspaceConfig",
        "resourceTtlOnSuccess": "integer",
        "resourceTtlOnFailure": "integer",
        "activeDeadlineSeconds": "integer",
    },
    "WorkspaceConfig": {"size": "string", "kubernetes": "KubernetesWorkspaceConfig"},
    "KubernetesWorkspaceConfig": {"pvcSpecPatch": "struct"},
    "TaskConfigPassthrough": {
        "field": _PASSTHROUGH,
        "applyToTask": "boolean",
    },
    "PipelineDeploymentConfig": {"executors": "{ExecutorSpec}"},
    "ExecutorSpec": {
        "container": "PipelineContainerSpec",
        "importer": "ImporterSpec",
        "resolver": "ResolverSpec",
        "customJob": "AIPlatformCustomJobSpec",
    },
    "PipelineContainerSpec": {
        "image": "string",
        "command": "[string]",
        "args": "[string]",
        "lifecycle": "Lifecycle",
        "resources": "ResourceSpec",
        "env": "[EnvVar]",
    },
    "Lifecycle": {"preCacheCheck": "Exec"},
    "Exec": {"command": "[string]", "args": "[string]"},
    "ResourceSpec": {
        "cpuLimit": "number",
        "memoryLimit": "number",
        "cpuRequest": "number",
        "memoryRequest": "number",
        "resourceCpuLimit": "string",
        "resourceMemoryLimit": "string",
        "resourceCpuRequest": "string",
        "resourceMemoryRequest": "string",
        "accelerator": "AcceleratorConfig",
    },
    "AcceleratorConfig": {"type": "string", "count": "integer", "resourceType": "string", "resourceCount": "string"},
    "EnvVar": {"name": "string", "value": "string"},
    "ImporterSpec": {
        "artifactUri": "ValueOrRuntimeParameter",
        "typeSchema": "ArtifactTypeSchema",
        "properties": "{ValueOrRuntimeParameter}",
        "customProperties": "{ValueOrRuntimeParameter}",
        "reimport": "boolean",
        "metadata": "struct",
        "downloadToWorkspace": "boolean",
    },
    "ResolverSpec": {"outputArtifactQueries": "{ArtifactQuerySpec}"},
    "ArtifactQuerySpec": {"filter": "string", "limit": "integer"},
    "AIPlatformCustomJobSpec": {"customJob": "struct"},
    "PlatformSpec": {"platforms": "{SinglePlatformSpec}"},
}
ONE_OF: dict[str, list[list[str]]] = {
    "ArtifactTypeSchema": [["schemaTitle", "schemaUri", "instanceSchema"]],
    "Value": [["intValue", "doubleValue", "stringValue"]],
    "ValueOrRuntimeParameter": [["constantValue", "runtimeParameter", "constant"]],
    "InputParameterSpec": [["taskOutputParameter", "runtimeValue", "componentInputParameter", "taskFinalStatus"]],
    "InputArtifactSpec": [["taskOutputArtifact", "componentInputArtifact"]],
    "ParameterIteratorSpecItemsSpec": [["raw", "inputParameter"]],
    "PipelineTaskSpec": [["artifactIterator", "parameterIterator"]],
    "DagOutputParameterSpec": [["valueFromParameter", "valueFromOneof"]],
    "ComponentSpec": [["dag", "executorLabel"]],
    "ExecutorSpec": [["container", "importer", "resolver", "customJob"]],
}
