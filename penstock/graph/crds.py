"""Generates the CustomResourceDefinitions from the structs that check manifests.

`python -m penstock.graph.crds deploy/crds` writes the files. A test checks that they are up to date.

A field that is passed on to the cluster unchanged keeps all its content. All other fields are typed: the
API server refuses wrong values, and kubectl reports unknown fields.
"""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta, inspect

from penstock.graph import manifest, v1beta1
from penstock.graph.status import GraphStatus, ScalingAdapterStatus
from penstock.graph.versions import SERVICES_IN_V1BETA1

Schema = dict[str, Any]

GROUP = "nvidia.com"
CONVERSION_PATH = "/convert"
_PRESERVED = {"x-kubernetes-preserve-unknown-fields": True}

_PASSED_ON = frozenset({"Container", "PodContainer", "PodSpec", "PodTemplate", "TemplatePodSpec"})
"""Structs for objects of Kubernetes: fields that they do not define are kept."""

_LISTS_BY = {"components": "name", "conditions": "type"}
"""Lists whose entries have a key, so that two clients can own different entries."""

_DESCRIPTIONS = {
    "annotations": "Annotations of the objects that are made of it, or of its pods where it is a template.",
    "args": "Arguments of the command.",
    "autoscaling": "Ignored: a scaling adapter takes its place.",
    "backendFramework": "The engine. Penstock runs vllm.",
    "checkpoint": "Ignored: pods are not restored from checkpoints.",
    "claims": "Claims of dynamically allocated devices.",
    "command": "What runs. Dynamo's commands are translated to Penstock's.",
    "compilationCache": "A PersistentVolumeClaim that keeps what the engine compiles.",
    "componentType": "What the service is for. main is an older name of frontend.",
    "components": "The graph's components, each a set of equal pods.",
    "conditions": "What is so, by type: Ready says whether all replicas serve, and why not.",
    "containers": "The container named main is Penstock's; others run beside it.",
    "create": "Whether the claim is made with the graph.",
    "custom": "Other resources by name, for instance rdma/ib.",
    "dgdRef": "Whose replicas these are.",
    "dynamoNamespace": "Ignored in a cluster: the graph's name keeps graphs apart.",
    "env": "Environment variables. Later ones win, and may refer to earlier ones as $(NAME).",
    "envFromSecret": "A Secret whose entries become environment variables.",
    "envs": "Environment variables. Those of mainContainer win, and then these over the graph's.",
    "eppConfig": "Ignored: endpoint pickers are not run.",
    "extraPodMetadata": "Labels and annotations of the pods alone.",
    "extraPodSpec": "A PodSpec that is merged into the pods', and mainContainer, the container main.",
    "frontendSidecar": "Not run: the graph's frontend serves. A graph that has none gets one.",
    "gpu": "GPUs of one replica, on each of its nodes.",
    "gpuType": "The resource that gpu counts; nvidia.com/gpu when it is not set.",
    "image": "Replaced by the operator's image where it is not Penstock's.",
    "ingress": "How a frontend is reached from outside of the cluster.",
    "labels": "Labels of the objects that are made of it, or of its pods where it is a template.",
    "livenessProbe": "Replaces the liveness probe that a pod has by default.",
    "mainContainer": "The container main: its command, arguments, environment and more.",
    "message": "The reason in words, with what to change.",
    "modelRef": "Ignored: frontends learn of models from their workers.",
    "mountPath": "Where pods see it.",
    "mountPoint": "Where pods see it.",
    "multinode": "One worker that spans several nodes.",
    "nodeCount": "Nodes of one worker.",
    "observedGeneration": "The generation of the spec that this is about.",
    "podTemplate": "The pods, as in a Deployment. The container main is Penstock's.",
    "priorityClassName": "The priority class of the graph's pods.",
    "pvcs": "PersistentVolumeClaims that services mount.",
    "readinessProbe": "Replaces the readiness probe that a pod has by default.",
    "ready": "Ready replicas of those wanted, by role.",
    "replicas": "How many pods there are. A scaling adapter owns this number where there is one.",
    "resources": "What a pod asks for, and what it may use.",
    "restart": "A new id restarts the graph without losing a request.",
    "scalingAdapter": "An object of its own owns the replicas, for kubectl scale, HPA and KEDA to set.",
    "selector": "Selects the pods that these replicas are.",
    "serviceName": "The service, by its name in spec.services.",
    "services": "The graph's services by name, each a set of equal pods.",
    "sharedMemory": "The memory at /dev/shm.",
    "sharedMemorySize": "The size of /dev/shm; 0 for none.",
    "state": "How far the graph is.",
    "subComponentType": "A worker's role: prefill or decode.",
    "topologyConstraint": "Ignored: the annotation penstock.dev/topology-key places pods.",
    "type": "What it is for.",
    "useAsCompilationCache": "Whether the engine keeps there what it compiles.",
    "volumeMounts": "Claims of pvcs, mounted into the pods.",
}

_NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_READY = '.status.conditions[?(@.type=="Ready")]'
_COLUMNS = [
    {"name": "Ready", "type": "string", "jsonPath": f"{_READY}.status"},
    {"name": "Prefill", "type": "string", "jsonPath": ".status.ready.prefill"},
    {"name": "Decode", "type": "string", "jsonPath": ".status.ready.decode"},
    {"name": "Frontend", "type": "string", "jsonPath": ".status.ready.frontend"},
    {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    {"name": "Aggregated", "type": "string", "jsonPath": ".status.ready.aggregated", "priority": 1},
    {"name": "Message", "type": "string", "jsonPath": f"{_READY}.message", "priority": 1},
]
_ADAPTER_COLUMNS = [
    {"name": "DGD", "type": "string", "jsonPath": ".spec.dgdRef.name"},
    {"name": "SERVICE", "type": "string", "jsonPath": ".spec.dgdRef.serviceName"},
    {"name": "REPLICAS", "type": "integer", "jsonPath": ".status.replicas"},
    {"name": "AGE", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
]


class _ServiceReference(msgspec.Struct, frozen=True, rename="camel"):
    """One service of one graph."""

    name: Annotated[str, Meta(min_length=1)]
    service_name: Annotated[str, Meta(min_length=1)]


class _ScalingAdapterSpec(msgspec.Struct, frozen=True, rename="camel"):
    """The wanted number of replicas of a service."""

    replicas: Annotated[int, Meta(ge=0)]
    dgd_ref: _ServiceReference


def graph_crd() -> Schema:
    """The CRD of graphs. v1beta1 is not served here, since it needs a webhook (`with_conversion`).

    Nothing is said about conversion, so that applying this again leaves a webhook as it is.
    """
    old_spec, new_spec = _schema_of(manifest.Spec), _schema_of(v1beta1.GraphSpec)
    old_spec["properties"]["services"] |= {"minProperties": 1, "maxProperties": manifest.SERVICES_MAX}
    new_spec["properties"]["components"]["items"]["properties"]["multinode"]["properties"]["nodeCount"] |= {
        "default": 2
    }
    new_spec["properties"]["services"] = {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
        "description": SERVICES_IN_V1BETA1,
    }
    name = {"type": "string", "maxLength": manifest.NAME_CHARS_MAX, "pattern": _NAME_PATTERN}
    status = _schema_of(GraphStatus)
    new_status = copy.deepcopy(status)
    new_status["properties"]["components"] = new_status["properties"].pop("services")
    versions = [
        {
            "name": version,
            "served": is_stored,
            "storage": is_stored,
            "schema": {
                "openAPIV3Schema": _object_schema(spec, its_status, "A graph of inference services.", name)
            },
            "subresources": {"status": {}},
            "additionalPrinterColumns": _COLUMNS,
        }
        for version, is_stored, spec, its_status in (
            ("v1alpha1", True, old_spec, status),
            ("v1beta1", False, new_spec, new_status),
        )
    ]
    return _crd("DynamoGraphDeployment", "dgd", versions)


def scaling_adapter_crd() -> Schema:
    """The CRD of scaling adapters, in which `kubectl scale`, HPA and KEDA set replicas."""
    schema = _object_schema(
        _schema_of(_ScalingAdapterSpec),
        _schema_of(ScalingAdapterStatus),
        "The number of replicas of one service of a graph, for autoscalers to set.",
        name={},
    )
    scale = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    version = {
        "name": "v1alpha1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}, "scale": scale},
        "additionalPrinterColumns": _ADAPTER_COLUMNS,
    }
    return _crd("DynamoGraphDeploymentScalingAdapter", "dgdsa", [version])


def with_conversion(crd: Schema, namespace: str, service: str, ca_bundle: str) -> Schema:
    """A CRD with all versions served, and with a webhook that converts them.

    Args:
        namespace: of the webhook's Service.
        service: its name. It listens on port 443.
        ca_bundle: the certificate that signed the webhook's, PEM in base64.
    """
    changed = copy.deepcopy(crd)
    for version in changed["spec"]["versions"]:
        version["served"] = True
    reached_at = {"namespace": namespace, "name": service, "path": CONVERSION_PATH, "port": 443}
    changed["spec"]["conversion"] = {
        "strategy": "Webhook",
        "webhook": {
            "clientConfig": {"service": reached_at, "caBundle": ca_bundle},
            "conversionReviewVersions": ["v1"],
        },
    }
    return changed


def _crd(kind: str, short_name: str, versions: list[Schema]) -> Schema:
    plural = f"{kind.lower()}s"
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}", "labels": {"app.kubernetes.io/part-of": "penstock"}},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short_name],
            },
            "scope": "Namespaced",
            "versions": versions,
        },
    }


def _object_schema(spec: Schema, status: Schema, description: str, name: Schema) -> Schema:
    return {
        "type": "object",
        "description": description,
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", **({"properties": {"name": name}} if name else {})},
            "spec": spec,
            "status": status,
        },
        "required": ["spec"],
    }


def _schema_of(kind: Any) -> Schema:
    """The structural schema of a type."""
    kind = kind if isinstance(kind, inspect.Type) else inspect.type_info(kind)
    match kind:
        case inspect.Metadata():
            return _schema_of(kind.type)
        case inspect.StructType():
            return _struct_schema(kind)
        case inspect.DictType():
            values = _schema_of(kind.value_type)
            return {
                "type": "object",
                **(values if values == _PRESERVED else {"additionalProperties": values}),
            }
        case inspect.ListType() | inspect.VarTupleType():
            counts = {"minItems": kind.min_length or None, "maxItems": kind.max_length}
            return {"type": "array", "items": _schema_of(kind.item_type), **_set(counts)}
        case inspect.StrType():
            lengths = {"minLength": kind.min_length, "maxLength": kind.max_length}
            return {"type": "string", **_set({**lengths, "pattern": kind.pattern})}
        case inspect.IntType():
            return {"type": "integer", **_set({"minimum": kind.ge, "maximum": kind.le})}
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.LiteralType():
            return {"type": "string", "enum": list(kind.values)}
        case inspect.AnyType():
            return dict(_PRESERVED)
        case inspect.UnionType():
            return _union_schema(kind)
    raise TypeError(f"no schema for {kind}")


def _union_schema(kind: inspect.UnionType) -> Schema:
    options = [option for option in kind.types if not isinstance(option, inspect.NoneType)]
    if len(options) == 1:
        return _schema_of(options[0])
    if all(isinstance(option, inspect.StrType | inspect.IntType | inspect.FloatType) for option in options):
        return {"x-kubernetes-int-or-string": True}
    raise TypeError(f"no schema for {kind}")


def _struct_schema(kind: inspect.StructType) -> Schema:
    is_passed_on = kind.cls.__name__ in _PASSED_ON
    properties: dict[str, Schema] = {}
    for field in kind.fields:
        properties[field.encode_name] = _described(field.encode_name, _schema_of(field.type))
    if not is_passed_on:
        for name in sorted(getattr(kind.cls, "ACCEPTED", ())):
            properties[name] = _described(name, dict(_PRESERVED))
    required = [field.encode_name for field in kind.fields if field.required]
    summary = re.sub(r"\s+", " ", (kind.cls.__doc__ or "").strip())
    schema: Schema = {"type": "object", "description": summary, "properties": properties}
    if required:
        schema["required"] = required
    return {**schema, **(_PRESERVED if is_passed_on else {})}


def _described(name: str, schema: Schema) -> Schema:
    """The schema of a field. Its description is the field's purpose, not the docstring of its type."""
    if name in _LISTS_BY and schema.get("type") == "array":
        schema |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [_LISTS_BY[name]]}
    return {**schema, "description": _DESCRIPTIONS[name]} if name in _DESCRIPTIONS else schema


def _set(bounds: Schema) -> Schema:
    return {name: bound for name, bound in bounds.items() if bound is not None}


class _Dumper(yaml.SafeDumper):
    """A YAML dumper without aliases, which are hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def files() -> dict[str, str]:
    """The files of deploy/crds, by name."""
    found = {}
    for crd in (graph_crd(), scaling_adapter_crd()):
        text = yaml.dump(crd, Dumper=_Dumper, sort_keys=False, width=100)
        found[f"{GROUP}_{crd['spec']['names']['plural']}.yaml"] = (
            f"# Written by `python -m penstock.graph.crds deploy/crds`.\n{text}"
        )
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, text in files().items():
        (folder / file_name).write_text(text, encoding="utf-8")
