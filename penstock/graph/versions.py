"""A DynamoGraphDeployment of `nvidia.com/v1alpha1` as one of `nvidia.com/v1beta1`, and back.

    v1alpha1                                     v1beta1
    spec.services.NAME                           spec.components[], by `name`
    spec.envs                                    spec.env
    componentType (main), subComponentType       type (frontend, prefill, decode, ...)
    extraPodSpec, its mainContainer              podTemplate.spec, its container `main`
    envs, envFromSecret, resources, probes       the same of the container `main`
    annotations, labels, extraPodMetadata        podTemplate.metadata
    volumeMounts                                 volumeMounts and volumes, or compilationCache
    sharedMemory {disabled, size}                sharedMemorySize, "0" for disabled
    scalingAdapter {enabled: true}               scalingAdapter {}
    frontendSidecar {image, args, envs, ...}     a container, and frontendSidecar, its name
    checkpoint                                   experimental.checkpoint
    status.services                              status.components

Parts that the other version cannot express are kept in an annotation (`carried.py` says how later changes
override them). Both directions are pure functions of raw objects, and never change their arguments.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from penstock.checked import shown
from penstock.errors import ConfigError
from penstock.graph.carried import Object, with_original
from penstock.graph.v1beta1 import API_VERSION as V1BETA1
from penstock.graph.v1beta1 import MAIN_CONTAINER

V1ALPHA1 = "nvidia.com/v1alpha1"

ORIGINALS = {V1ALPHA1: "penstock.dev/v1alpha1-spec", V1BETA1: "penstock.dev/v1beta1-spec"}
"""The annotation that holds the parts of a version that the other version cannot express."""

SERVICES_IN_V1BETA1 = "Changes by service, in the words of v1alpha1. Never there when a graph is read."
"""The description of `spec.services` in v1beta1. If a cluster serves two versions, kubectl uses the newer
one, whichever was applied. So `kubectl patch` with a path of v1alpha1 arrives as an object of v1beta1 that
has `services` beside its components, and must have the effect that the user intends."""

_SIDECAR = "sidecar-frontend"  # Dynamo's name for the container of a v1alpha1 frontendSidecar
_GPU = "nvidia.com/gpu"
_AMOUNTS = {"cpu": "cpu", "memory": "memory", "gpu": _GPU}
_OPERATORS_PREFIXES = ("penstock.dev/", "nvidia.com/")  # prefixes of annotations for an operator

_SAME_IN_SPECS = (
    "annotations",
    "backendFramework",
    "experimental",
    "labels",
    "priorityClassName",
    "restart",
    "topologyConstraint",
)
_SAME_IN_SERVICES = (
    "eppConfig",
    "globalDynamoNamespace",
    "modelRef",
    "multinode",
    "replicas",
    "topologyConstraint",
)


_MAIN = f"podTemplate.spec.containers[{MAIN_CONTAINER}]"
_WORDS_OF_V1BETA1 = (
    (re.compile(r"^spec\.services\.([-A-Za-z0-9]+)"), r"spec.components[\1]"),
    (re.compile(r"^spec\.services\b"), "spec.components"),
    (re.compile(r"^spec\.envs\b"), "spec.env"),
    (re.compile(r"\bcomponentType is\b"), "type is"),
    (re.compile(r"\bextraPodSpec\.mainContainer\b"), _MAIN),
    (re.compile(r"\bresources\.(limits|requests)\.gpu\b"), rf"{_MAIN}.resources.\1[{_GPU}]"),
)


def in_words_of(version: Any, line: str) -> str:
    """A message about a v1alpha1 manifest, with the field paths of the version in which the user wrote
    it."""
    if version == V1BETA1:
        for pattern, words in _WORDS_OF_V1BETA1:
            line = pattern.sub(words, line)
    return line


def to_v1beta1(found: Object) -> Object:
    """A graph of v1alpha1 as one of v1beta1.

    Raises:
        ConfigError: the object has another shape than its version allows.
    """
    services = _objects(_object(found, "spec"), "services", "spec.services")
    rest = {name: value for name, value in _object(found, "spec").items() if name != "services"}
    carried, metadata = _without_original(found, V1BETA1)
    saved = _objects(carried, "components", "components")
    order = [name for name in _list(carried, "order", "order") if name in services]
    names = dict.fromkeys([*order, *sorted(services)])
    spec = with_original(rest, _rest_to_v1beta1, _rest_to_v1alpha1, carried.get("spec"))
    components = {
        name: with_original(services[name], service_to_component, component_to_service, saved.get(name))
        for name in names
    }
    lost: Object = {
        "services": {
            name: services[name]
            for name, component in components.items()
            if component_to_service(component) != services[name]
        }
    }
    if _rest_to_v1alpha1(spec) != rest:
        lost["spec"] = rest
    if services:
        spec = {
            **spec,
            "components": [{"name": name, **component} for name, component in components.items()],
        }
    return _assembled(found, V1BETA1, metadata, spec, V1ALPHA1, lost)


def to_v1alpha1(found: Object) -> Object:
    """A graph of v1beta1 as one of v1alpha1.

    `spec.services` is not a field of v1beta1. If the object has it, it holds changes in the terms of
    v1alpha1 (see SERVICES_IN_V1BETA1).

    Raises:
        ConfigError: the object has another shape than its version allows.
    """
    components: dict[str, Object] = {}
    for index, component in enumerate(_list(_object(found, "spec"), "components", "spec.components")):
        path = f"spec.components[{index}]"
        name = component.get("name") if isinstance(component, dict) else None
        if not isinstance(name, str) or name in components:
            raise ConfigError(
                f"{path}.name: expected a name that no other component has, got {shown(name)}"
            )
        components[name] = {field: value for field, value in component.items() if field != "name"}
    changes = _objects(_object(found, "spec"), "services", "spec.services")
    if unknown := [name for name in changes if name not in components]:
        raise ConfigError(
            f"spec.services.{unknown[0]}: no component has this name, only {', '.join(components)}"
        )
    rest = {
        name: value
        for name, value in _object(found, "spec").items()
        if name not in ("components", "services")
    }
    carried, metadata = _without_original(found, V1ALPHA1)
    saved = _objects(carried, "services", "services")
    spec = with_original(rest, _rest_to_v1alpha1, _rest_to_v1beta1, carried.get("spec"))
    services = {
        name: with_original(component, component_to_service, service_to_component, saved.get(name))
        for name, component in components.items()
    }
    lost: Object = {
        "components": {
            name: components[name]
            for name, service in services.items()
            if service_to_component(service) != components[name]
        }
    }
    if _rest_to_v1beta1(spec) != rest:
        lost["spec"] = rest
    if list(components) != sorted(components):
        lost["order"] = list(components)
    services |= {name: merge_patched(services[name], changes[name]) for name in changes}
    return _assembled(found, V1ALPHA1, metadata, {**spec, "services": services}, V1BETA1, lost)


def merge_patched(found: Any, changes: Any) -> Any:
    """A JSON merge patch (RFC 7386): null removes a field, objects merge, all else replaces."""
    if not isinstance(changes, dict):
        return changes
    result = dict(found) if isinstance(found, dict) else {}
    for name, value in changes.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patched(result.get(name), value)
    return result


def _assembled(
    found: Object, version: str, metadata: Object, spec: Object, from_version: str, lost: Object
) -> Object:
    """The object of the other version, with what that version has no place for in an annotation."""
    if lost := {name: value for name, value in lost.items() if value}:
        annotation = msgspec.json.encode(lost, order="deterministic").decode()
        annotations = _object(metadata, "annotations", "metadata.annotations")
        metadata = {**metadata, "annotations": {**annotations, ORIGINALS[from_version]: annotation}}
    result = {**found, "apiVersion": version, "metadata": metadata, "spec": spec}
    if "status" in found:
        result["status"] = _status(_object(found, "status"), version)
    return result


def _without_original(found: Object, version: str) -> tuple[Object, Object]:
    """What an object carries of its state in another version, and its metadata without that."""
    metadata = _object(found, "metadata")
    annotations = _object(metadata, "annotations", "metadata.annotations")
    name = ORIGINALS[version]
    if name not in annotations:
        return {}, metadata
    others = {key: value for key, value in annotations.items() if key != name}
    metadata = {key: value for key, value in metadata.items() if key != "annotations"}
    try:
        carried = msgspec.json.decode(str(annotations[name]), type=dict[str, Any])
        _objects(carried, "services", "services")
        _objects(carried, "components", "components")
        _object(carried, "spec")
        _list(carried, "order", "order")
    except (
        msgspec.MsgspecError,
        ConfigError,
    ):  # a person wrote into it: there is nothing to be carried then
        carried = {}
    return carried, {**metadata, "annotations": others} if others else metadata


def _status(status: Object, version: str) -> Object:
    """Statuses differ in the name of one field, and of one within `rollingUpdate`."""
    words = {"services": "components", "updatedServices": "updatedComponents"}
    if version == V1ALPHA1:
        words = {new: old for old, new in words.items()}

    def renamed(fields: Object) -> Object:
        return {words.get(name, name): value for name, value in fields.items()}

    result = renamed(status)
    if isinstance(result.get("rollingUpdate"), dict):
        result["rollingUpdate"] = renamed(result["rollingUpdate"])
    return result


def _rest_to_v1beta1(rest: Object) -> Object:
    """A spec without its services."""
    spec = {name: rest[name] for name in _SAME_IN_SPECS if name in rest}
    return {**spec, "env": rest["envs"]} if "envs" in rest else spec


def _rest_to_v1alpha1(rest: Object) -> Object:
    """A spec without its components."""
    spec = {name: rest[name] for name in _SAME_IN_SPECS if name in rest}
    return {**spec, "envs": rest["env"]} if "env" in rest else spec


def service_to_component(service: Object) -> Object:
    """A service of v1alpha1 as a component of v1beta1, without its name."""
    component = {name: service[name] for name in _SAME_IN_SERVICES if name in service}
    kind, part = service.get("componentType"), service.get("subComponentType")
    if kind is not None:
        component["type"] = {"main": "frontend"}.get(kind, kind) if isinstance(kind, str) else kind
        if kind == "worker" and part in ("prefill", "decode"):
            component["type"] = part
    memory = _object(service, "sharedMemory")
    if memory.get("disabled") or memory.get("size") is not None:
        component["sharedMemorySize"] = "0" if memory.get("disabled") else memory["size"]
    if _object(service, "scalingAdapter").get("enabled"):
        component["scalingAdapter"] = {}
    if "checkpoint" in service:
        component["experimental"] = {"checkpoint": service["checkpoint"]}
    for mount in _mounts(service):
        if mount.get("useAsCompilationCache"):
            cache = {"pvcName": mount.get("name"), "mountPath": mount.get("mountPoint")}
            component["compilationCache"] = {name: it for name, it in cache.items() if it is not None}
            break
    if "frontendSidecar" in service:
        component["frontendSidecar"] = _SIDECAR
    if template := _pod_template(service):
        component["podTemplate"] = template
    return component


def _pod_template(service: Object) -> Object:
    pod = _object(service, "extraPodSpec")
    extra = _object(service, "extraPodMetadata")
    metadata = {}
    for name in ("annotations", "labels"):
        if together := {**_object(service, name), **_object(extra, name)}:
            metadata[name] = together
    spec = {name: value for name, value in pod.items() if name not in ("mainContainer", "containers")}
    main = _main_container(service, _object(pod, "mainContainer"))
    others = _list(pod, "containers", "extraPodSpec.containers")
    if "frontendSidecar" in service:
        others = [*others, _sidecar_container(_object(service, "frontendSidecar"))]
    is_main = bool(main) or "mainContainer" in pod
    if containers := [*([{"name": MAIN_CONTAINER, **main}] if is_main else []), *others]:
        spec["containers"] = containers
    claims = dict.fromkeys(
        _claim(mount) for mount in _mounts(service) if not mount.get("useAsCompilationCache")
    )
    if claims:
        volumes = [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims]
        spec["volumes"] = [*_list(pod, "volumes", "extraPodSpec.volumes"), *volumes]
    return {name: part for name, part in (("metadata", metadata), ("spec", spec)) if part}


def _main_container(service: Object, container: Object) -> Object:
    """`mainContainer`, with what a service says about it in fields of its own. The container's win."""
    main = {name: value for name, value in container.items() if name != "name"}
    own = _list(container, "env", "mainContainer.env")
    overridden = {one.get("name") for one in own if isinstance(one, dict)}
    envs = _list(service, "envs", "envs")
    if envs:
        main["env"] = [
            *(one for one in envs if not isinstance(one, dict) or one.get("name") not in overridden),
            *own,
        ]
    if secret := service.get("envFromSecret"):
        others = _list(container, "envFrom", "mainContainer.envFrom")
        main["envFrom"] = [*others, {"secretRef": {"name": secret}}]
    for probe in ("livenessProbe", "readinessProbe"):
        if probe in service and probe not in main:
            main[probe] = service[probe]
    if resources := _container_resources(_object(service, "resources"), _object(container, "resources")):
        main["resources"] = resources
    mounts = [
        {"name": _claim(mount), "mountPath": mount.get("mountPoint", "")}
        for mount in _mounts(service)
        if not mount.get("useAsCompilationCache")
    ]
    if mounts:
        main["volumeMounts"] = [*_list(container, "volumeMounts", "mainContainer.volumeMounts"), *mounts]
    return main


def _container_resources(resources: Object, own: Object) -> Object:
    result: Object = {name: value for name, value in own.items() if name not in ("requests", "limits")}
    for part in ("requests", "limits"):
        told = _object(resources, part)
        amounts = {ours: told[name] for name, ours in _AMOUNTS.items() if told.get(name) is not None}
        if _GPU in amounts and told.get("gpuType"):
            amounts[str(told["gpuType"])] = amounts.pop(_GPU)
        if amounts := {**amounts, **_object(told, "custom"), **_object(own, part)}:
            result[part] = amounts
    if "claims" in resources and "claims" not in own:
        result["claims"] = resources["claims"]
    return result


def _sidecar_container(sidecar: Object) -> Object:
    container: Object = {"name": _SIDECAR}
    container |= {name: sidecar[name] for name in ("image", "args") if name in sidecar}
    if "envs" in sidecar:
        container["env"] = sidecar["envs"]
    if "envFromSecret" in sidecar:
        container["envFrom"] = [{"secretRef": {"name": sidecar["envFromSecret"]}}]
    return container


def component_to_service(component: Object) -> Object:
    """A component of v1beta1, less its name, as a service of v1alpha1."""
    service = {name: component[name] for name in _SAME_IN_SERVICES if name in component}
    kind = component.get("type")
    if kind is not None:
        service["componentType"] = "worker" if kind in ("prefill", "decode") else kind
        if kind in ("prefill", "decode"):
            service["subComponentType"] = kind
    if "multinode" in component:
        service["multinode"] = {"nodeCount": 2, **_object(component, "multinode")}
    size = component.get("sharedMemorySize")
    if size is not None:
        service["sharedMemory"] = {"disabled": True} if str(size) == "0" else {"size": size}
    if component.get("scalingAdapter") is not None:
        service["scalingAdapter"] = {"enabled": True}
    experimental = _object(component, "experimental")
    if "checkpoint" in experimental:
        service["checkpoint"] = experimental["checkpoint"]
    cache = _object(component, "compilationCache")
    if cache.get("pvcName"):
        mount = {
            "name": cache["pvcName"],
            "mountPoint": cache.get("mountPath"),
            "useAsCompilationCache": True,
        }
        service["volumeMounts"] = [{name: value for name, value in mount.items() if value is not None}]
    template = _object(component, "podTemplate")
    service |= _service_metadata(_object(template, "metadata", "podTemplate.metadata"))
    spec = _object(template, "spec", "podTemplate.spec")
    containers = _list(spec, "containers", "podTemplate.spec.containers")
    if not all(isinstance(one, dict) for one in containers):
        raise ConfigError("podTemplate.spec.containers: expected a list of objects")
    pod = {name: value for name, value in spec.items() if name != "containers"}
    sidecar = component.get("frontendSidecar")
    others = []
    for container in containers:
        name = container.get("name")
        if name == MAIN_CONTAINER:
            pod["mainContainer"], service["resources"] = _service_container(container)
        elif name == sidecar and sidecar is not None:
            service["frontendSidecar"] = _service_sidecar(container)
        else:
            others.append(container)
    if not service.get("resources"):
        service.pop("resources", None)
    if others:
        pod["containers"] = others
    if pod:
        service["extraPodSpec"] = pod
    return service


def _service_metadata(metadata: Object) -> Object:
    """Labels and annotations of pods. Annotations that tell an operator something are for the service."""
    annotations = _object(metadata, "annotations", "podTemplate.metadata.annotations")
    told = {name: value for name, value in annotations.items() if name.startswith(_OPERATORS_PREFIXES)}
    others = {name: value for name, value in annotations.items() if name not in told}
    labels = _object(metadata, "labels", "podTemplate.metadata.labels")
    extra = {name: part for name, part in (("annotations", others), ("labels", labels)) if part}
    return {name: part for name, part in (("annotations", told), ("extraPodMetadata", extra)) if part}


def _service_container(container: Object) -> tuple[Object, Object]:
    """The container `main` as a service's mainContainer and resources."""
    main = {name: value for name, value in container.items() if name not in ("name", "resources")}
    found = _object(container, "resources", "podTemplate.spec.containers[main].resources")
    resources = {name: value for name, value in found.items() if name not in ("requests", "limits")}
    for part in ("requests", "limits"):
        amounts = _object(found, part)
        told: Object = {
            name: _text(amounts[theirs])
            for name, theirs in _AMOUNTS.items()
            if amounts.get(theirs) is not None
        }
        custom = {name: _text(it) for name, it in amounts.items() if name not in _AMOUNTS.values()}
        if custom:
            told["custom"] = custom
        if told:
            resources[part] = told
    return main, resources


def _service_sidecar(container: Object) -> Object:
    sidecar: Object = {name: container[name] for name in ("image", "args") if name in container}
    if "env" in container:
        sidecar["envs"] = container["env"]
    for source in _list(container, "envFrom", "envFrom"):
        secret = _object(source, "secretRef").get("name") if isinstance(source, dict) else None
        if secret is not None:
            sidecar["envFromSecret"] = secret
            break
    return sidecar


def _text(amount: Any) -> str:
    """An amount as v1alpha1 has it: always as text."""
    return f"{amount:g}" if isinstance(amount, float) else str(amount)


def _mounts(service: Object) -> list[Object]:
    mounts = _list(service, "volumeMounts", "volumeMounts")
    if not all(isinstance(mount, dict) for mount in mounts):
        raise ConfigError("volumeMounts: expected a list of objects")
    return mounts


def _claim(mount: Object) -> str:
    return str(mount.get("name", ""))


def _object(parent: Object, name: str, path: str = "") -> Object:
    """A field that holds an object; empty when it is absent or null."""
    value = parent.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path or name}: expected an object, got {shown(value)}")
    return value


def _objects(parent: Object, name: str, path: str) -> dict[str, Object]:
    """A field that holds an object of objects."""
    values = _object(parent, name, path)
    for key in values:
        if not isinstance(values[key], dict):
            raise ConfigError(f"{path}.{key}: expected an object, got {shown(values[key])}")
    return values


def _list(parent: Object, name: str, path: str) -> list[Any]:
    value = parent.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"{path}: expected a list, got {shown(value)}")
    return value
