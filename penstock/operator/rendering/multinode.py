"""Renders the follower pods of a worker that spans several nodes. They run vLLM with `--headless`."""

from __future__ import annotations

from penstock.graph.placeholders import for_kubelet
from penstock.kubernetes.api import Object
from penstock.operator import names
from penstock.operator.rendering.service_plan import ServicePlan
from penstock.operator.rendering.vllm_flags import follower_flags

_OF_THE_LEADER = ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "ports")
"""Fields that followers do not have: nothing listens in them, and if one ends, its group is started
anew."""


def follower_template(plan: ServicePlan, leader: Object) -> Object:
    """The leader's template, changed: frontends do not find the pods, no link secret is mounted, vLLM
    runs."""
    labels = {
        name: value for name, value in leader["metadata"]["labels"].items() if name != names.DISCOVERED_BY
    }
    spec = leader["spec"]
    containers = [
        _follower(plan, container) if container["name"] == names.MAIN else container
        for container in spec["containers"]
    ]
    volumes = [volume for volume in spec["volumes"] if volume["name"] != names.LINK_VOLUME]
    return {
        "metadata": leader["metadata"] | {"labels": labels},
        "spec": spec | {"containers": containers, "volumes": volumes},
    }


def _waits_for_leader(plan: ServicePlan) -> Object:
    """Delays SIGTERM until the leader has ended. A headless vLLM ends at once on SIGTERM, and with it the
    requests that the leader still drains. The leader counts as ended after two failed checks in a row,
    since a busy leader may miss one."""
    if plan.system_port <= 0:
        seconds = str(round(plan.options.drain_s))
        return {"preStop": {"exec": {"command": ["sleep", seconds]}}}
    live = f"curl -sf -m 2 -o /dev/null http://$LWS_LEADER_ADDRESS:{plan.system_port}/live"
    script = f"while {live} || {{ sleep 1; {live}; }}; do sleep 1; done"
    return {"preStop": {"exec": {"command": ["sh", "-c", script]}}}


def _follower(plan: ServicePlan, leader: Object) -> Object:
    container = {field: value for field, value in leader.items() if field not in _OF_THE_LEADER}
    flags = follower_flags(plan.worker_options, plan.manifest_engine_args, plan.nodes)
    return container | {
        "command": ["vllm"],
        "args": [for_kubelet(flag) for flag in flags],
        "lifecycle": _waits_for_leader(plan),
        "volumeMounts": [mount for mount in leader["volumeMounts"] if mount["name"] != names.LINK_VOLUME],
    }
