"""Renders a graph: computes the objects that it should have, from its manifest, the operator's settings and
facts about the cluster. Pure.

The commands come from `graph/`, which `penstock up` uses as well. For the rest of a pod, the manifest
overrides the operator's defaults. A note says what the manifest asks for and does not get. A ConfigError
has a line for each mistake in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from penstock.checked import shown
from penstock.errors import ConfigError
from penstock.graph import ClusterRules, Graph, Manifest, Overrides, build_graph
from penstock.graph.manifest import checked_document, manifest_of
from penstock.graph.versions import in_words_of
from penstock.kubernetes.api import Kind, Object
from penstock.kubernetes.kinds import ADAPTERS, DEPLOYMENTS, INGRESSES, LEADER_WORKER_SETS
from penstock.operator import names
from penstock.operator.rendering import access, networking, relays, storage, workloads
from penstock.operator.rendering.containers import grace_period_s
from penstock.operator.rendering.pods import reserved_labels
from penstock.operator.rendering.quantities import wrong_quantities
from penstock.operator.rendering.resources import spared_amounts
from penstock.operator.rendering.service_plan import ServicePlan, ServicePlanner, serving_roles
from penstock.operator.settings import (
    ClusterFacts,
    Desired,
    Note,
    RenderedService,
    RenderSettings,
)
from penstock.shapes import Role

T = TypeVar("T")
P = ParamSpec("P")

_ENGINES = ("reference", "vllm", "sim")
_VARIABLES = (*names.POD_VARIABLES, "LWS_LEADER_ADDRESS", "LWS_WORKER_INDEX", "LWS_GROUP_SIZE")
_WITHOUT_EFFECT = {
    "autoscaling": "a scaling adapter (scalingAdapter) and an HPA or KEDA object do it",
    "checkpoint": "pods are not restored from checkpoints",
    "eppConfig": "endpoint pickers are not run",
    "failover": "every worker serves, none stands by; lost ones are replaced and their requests continued",
    "globalDynamoNamespace": "a frontend serves the workers of its own graph",
    "gpuMemoryService": "each worker has its GPUs to itself",
    "modelRef": "models are found by the frontends themselves",
    "topologyConstraint": f"the annotation {names.TOPOLOGY_KEY} names the domain that workers prefer",
}
"""Fields of a service that have no effect, with the reason. graph/ notes a frontendSidecar."""


def desired(manifest_object: Mapping[str, Any], settings: RenderSettings, cluster: ClusterFacts) -> Desired:
    """The objects that a graph should have.

    Args:
        manifest_object: a DynamoGraphDeployment from the API server, of any version.

    Raises:
        ConfigError: one line for each mistake, with the field or annotation.
    """
    document = checked_document(manifest_object, "")
    manifest = manifest_of(document, manifest_object["apiVersion"])
    _raise(manifest, _wrong_annotations(manifest))
    graph = build_graph(manifest, _overrides(manifest.metadata.annotations), "", _rules(manifest))
    planner = ServicePlanner(manifest, graph, document, settings, cluster)
    plans = planner.plans()
    wrong = [*planner.wrong, *wrong_quantities(document["spec"])]
    strategies = {plan.name: _tried(wrong, plan.name, _strategy, planner, plan) for plan in plans}
    claims = _tried(wrong, "", storage.volume_claims, manifest)
    _raise(manifest, wrong)
    roles = serving_roles(plans)
    namespace = manifest.metadata.namespace or ""
    objects: list[Object] = [*(claims or ())]
    if any(plan.discovers_by_api for plan in plans):
        accounts = [plan.own_account for plan in plans if plan.discovers_by_api]
        objects += access.frontend_access(graph.name, namespace, accounts)
    for plan in plans:
        objects += _service_objects(plan, settings, cluster, roles, strategies[plan.name] or {})
    if _of_graph(manifest, names.LOG_RELAYS) == "true":
        objects += access.relay_access(graph.name, namespace)
        image = _of_graph(manifest, names.IMAGE) or settings.image
        objects += [relays.log_relay(graph.name, role, image, settings) for role in roles]
    return Desired(
        objects=tuple(objects),
        adapters=tuple(_adapter(plan) for plan in plans if _has_adapter(plan)),
        services=tuple(_rendered(plan, cluster) for plan in plans),
        notes=(
            *_graph_notes(manifest, document, graph),
            *planner.notes,
            *_service_notes(plans, settings, cluster, document),
        ),
        roles=roles,
    )


# --- the annotations ----------------------------------------------------------------------------------


def _overrides(annotations: Mapping[str, str]) -> Overrides:
    return Overrides(annotations.get(names.ENGINE, ""), annotations.get(names.MODEL, ""))


def _rules(manifest: Manifest) -> ClusterRules:
    """The overrides of each service. A service's annotations take precedence over the graph's."""
    overrides = {}
    for name, spec in manifest.spec.services.items():
        pods = spec.extra_pod_metadata
        own = manifest.spec.annotations | spec.annotations | (pods.annotations if pods else {})
        overrides[name] = _overrides(own)
    return ClusterRules(_VARIABLES, overrides)


def _wrong_annotations(manifest: Manifest) -> list[str]:
    places = {
        "metadata": manifest.metadata.annotations,
        "spec": manifest.spec.annotations,
    }
    for name, spec in manifest.spec.services.items():
        places[f"spec.services.{name}"] = spec.annotations
        if spec.extra_pod_metadata is not None:
            places[f"spec.services.{name}.extraPodMetadata"] = spec.extra_pod_metadata.annotations
    wrong = []
    for place, given in places.items():
        engine = given.get(names.ENGINE)
        if engine is not None and engine not in _ENGINES:
            expected = ", ".join(_ENGINES)
            wrong.append(
                f"{place}.annotations.{names.ENGINE}: expected one of {expected}, got {shown(engine)}"
            )
        relays_asked = given.get(names.LOG_RELAYS)
        if relays_asked is not None and relays_asked not in ("true", "false"):
            wrong.append(
                f"{place}.annotations.{names.LOG_RELAYS}: expected true or false, got {shown(relays_asked)}"
            )
    return wrong


def _of_graph(manifest: Manifest, annotation: str) -> str:
    return (manifest.metadata.annotations | manifest.spec.annotations).get(annotation, "")


def _strategy(planner: ServicePlanner, plan: ServicePlan) -> Object:
    return workloads.rollout_strategy(
        planner.control(plan.name, names.STRATEGY),
        planner.control(plan.name, names.MAX_SURGE),
        planner.control(plan.name, names.MAX_UNAVAILABLE),
    )


def _tried(
    wrong: list[str], service: str, make: Callable[P, T], *args: P.args, **named: P.kwargs
) -> T | None:
    """What `make` returns. The lines of a ConfigError that it raises are added to `wrong`."""
    try:
        return make(*args, **named)
    except ConfigError as error:
        where = f"spec.services.{service}: " if service else ""
        wrong += [f"{where}{line}" for line in str(error).splitlines()]
        return None


def _raise(manifest: Manifest, wrong: Sequence[str]) -> None:
    if wrong:
        raise ConfigError("\n".join(in_words_of(manifest.api_version, line) for line in wrong))


# --- objects of a service -----------------------------------------------------------------------------


def _service_objects(
    plan: ServicePlan,
    settings: RenderSettings,
    cluster: ClusterFacts,
    roles: tuple[str, ...],
    strategy: Object,
) -> list[Object]:
    if _missing_api(plan, cluster):
        return []
    objects = []
    if plan.nodes > 1:
        objects.append(workloads.leader_worker_set(plan, settings, roles))
    else:
        objects.append(workloads.deployment(plan, settings, roles, strategy))
    if plan.is_frontend:
        objects.append(networking.service(plan))
    if plan.is_frontend and plan.spec.ingress and plan.spec.ingress.enabled and INGRESSES in cluster.served:
        objects.append(networking.ingress(plan, plan.spec.ingress))
    if plan.replicas > 1 and cluster.disruption_budgets:
        objects.append(workloads.disruption_budget(plan, cluster.disruption_budgets))
    return objects


def _missing_api(plan: ServicePlan, cluster: ClusterFacts) -> str:
    """The kind that this service needs and the cluster does not serve; empty if there is none."""
    if plan.nodes > 1 and LEADER_WORKER_SETS not in cluster.served:
        return _with_version(LEADER_WORKER_SETS)
    return ""


def _with_version(kind: Kind) -> str:
    return f"{kind.name} ({kind.api_version})"


def _has_adapter(plan: ServicePlan) -> bool:
    return plan.spec.scaling_adapter is not None and plan.spec.scaling_adapter.enabled


def _adapter(plan: ServicePlan) -> Object:
    return {
        "apiVersion": ADAPTERS.api_version,
        "kind": ADAPTERS.name,
        "metadata": {
            "name": plan.object_name,
            "labels": names.common_labels(plan.graph.name, plan.role),
        },
        "spec": {
            "replicas": plan.replicas,
            "dgdRef": {"name": plan.graph.name, "serviceName": plan.name},
        },
    }


def _rendered(plan: ServicePlan, cluster: ClusterFacts) -> RenderedService:
    return RenderedService(
        name=plan.name,
        component_type=plan.component_type,
        role=plan.role,
        kind=(LEADER_WORKER_SETS if plan.nodes > 1 else DEPLOYMENTS).name,
        object_name=plan.object_name,
        replicas=plan.replicas,
        nodes=plan.nodes,
        missing_api=_missing_api(plan, cluster),
    )


# --- notes --------------------------------------------------------------------------------------------


def _graph_notes(manifest: Manifest, document: Mapping[str, Any], graph: Graph) -> Iterable[Note]:
    for line in graph.notes:
        yield Note("CommandTranslated", line)
    spec = document["spec"]
    for field in ("dynamoGraph", "experimental", "topologyConstraint"):
        if spec.get(field):
            yield Note("FieldIgnored", f"spec.{field} has no effect")
    if manifest.spec.restart is not None and (spec["restart"].get("strategy") or {}).get("order"):
        yield Note(
            "FieldIgnored", "spec.restart.strategy.order has no effect: services restart side by side"
        )


def _service_notes(
    plans: Iterable[ServicePlan],
    settings: RenderSettings,
    cluster: ClusterFacts,
    document: Mapping[str, Any],
) -> Iterable[Note]:
    for plan in plans:
        raw = document["spec"]["services"][plan.name]
        for reason, message in (
            *_notes_on_amounts(plan, settings),
            *_notes_on_apis(plan, cluster),
            *(
                ("FieldIgnored", f"{field} has no effect: {instead}")
                for field, instead in _WITHOUT_EFFECT.items()
                if raw.get(field)
            ),
        ):
            yield Note(reason, message, plan.name)


def _notes_on_amounts(plan: ServicePlan, settings: RenderSettings) -> Iterable[tuple[str, str]]:
    if spared := spared_amounts(plan):
        if plan.sized_for_other_engine:
            why = "the manifest's amounts are for another engine"
        elif plan.is_frontend:
            why = "a frontend needs none"
        else:
            why = f"the {plan.worker_options.engine} engine runs on the CPU"
        yield "ResourcesNotRequested", f"{', '.join(spared)} not requested: {why}"
    if labels := reserved_labels(plan):
        yield "LabelIgnored", f"{', '.join(labels)}: the operator finds pods by it"
    given_s = plan.pod_spec.get("terminationGracePeriodSeconds")
    needed_s = grace_period_s(plan, settings)
    if given_s is not None and given_s < needed_s:
        yield (
            "GracePeriodRaised",
            f"terminationGracePeriodSeconds is {needed_s}, not {given_s}: requests get"
            f" {plan.options.drain_s:g} s to end (--drain-s)",
        )


def _notes_on_apis(plan: ServicePlan, cluster: ClusterFacts) -> Iterable[tuple[str, str]]:
    if plan.nodes > 1 and plan.role != Role.AGGREGATED:
        yield (
            "HandoffsRecomputed",
            "workers that span nodes do not hand over KV yet: prompts are computed again where they go on",
        )
    if missing := _missing_api(plan, cluster):
        yield "ApiMissing", f"multinode needs {missing}, which this cluster does not have"
    ingress = plan.spec.ingress
    if ingress is None or not ingress.enabled:
        return
    if ingress.use_virtual_service:
        yield "FieldIgnored", "ingress.useVirtualService has no effect: an Ingress is made"
    if not plan.is_frontend:
        yield "FieldIgnored", "ingress has no effect: only frontends serve HTTP"
    elif INGRESSES not in cluster.served:
        yield "ApiMissing", f"ingress needs {_with_version(INGRESSES)}, which this cluster does not have"
