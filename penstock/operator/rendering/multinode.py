"""The pods that serve one worker together with its leader: vLLM without a head, on the other nodes."""

from __future__ import annotations

from penstock.graph.placeholders import for_kubelet
from penstock.kubernetes.api import Object
from penstock.operator import names
from penstock.operator.rendering.service_plan import ServicePlan
from penstock.operator.rendering.vllm_flags import follower_flags

_OF_THE_LEADER = ("livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "ports")
"""Nothing listens in the others. Their group is started anew when one of them ends."""


def follower_template(plan: ServicePlan, leader: Object) -> Object:
    """As the leader's, but found by nobody, without the link's secrets, and running vLLM itself."""
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
    """vLLM without a head ends at once on SIGTERM, and the leader's requests with it, for which the leader
    would still have had its drain. So the signal is held back until the leader is gone. Two silences count:
    a leader that is busy may miss one."""
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
