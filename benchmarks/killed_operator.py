"""An operator that is killed again and again while its graphs change: is all in the end as it should be?

    python -m benchmarks.killed_operator [--rounds 50] [--seed 1]

Starts a control plane of its own without nodes (control_plane.py). In each round, graphs are created,
patched, deleted, and robbed of their objects, and the operator gets SIGKILL at a random moment; its lease
is taken away, so that the next one begins at once. Then one operator works undisturbed, and makes the same
graphs once more in another namespace: both namespaces must have the same objects. Exit code 1 when they
differ. 50 rounds take three minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.control_plane import ControlPlane, control_plane
from benchmarks.many_graphs import NAMESPACE, Operator, install_definitions, manifest, quiet
from penstock.kubernetes.api import ApiError, Kind, Object, name_of
from penstock.kubernetes.client import HttpsApi, connect
from penstock.kubernetes.kinds import (
    DEPLOYMENTS,
    EVENTS,
    GRAPHS,
    LEASES,
    ROLE_BINDINGS,
    ROLES,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
)

NAMESPACES = Kind("", "v1", "Namespace", "namespaces", namespaced=False)
KILLED, CALM = "killed", "calm"
COMPARED = (GRAPHS, DEPLOYMENTS, SERVICES, SECRETS, SERVICE_ACCOUNTS, ROLES, ROLE_BINDINGS)
OWN_LABEL = "app.kubernetes.io/managed-by=penstock-operator"
GRAPHS_MAX = 8
ROUND_S = (0.9, 2.5)
"""How long an operator lives, in seconds: from before it has its caches until after it is done."""


async def change(api: HttpsApi, draw: random.Random) -> None:
    """One thing that a user does."""
    name = f"graph-{draw.randrange(GRAPHS_MAX):04}"
    match draw.choice(["apply", "apply", "scale", "scale", "relays", "delete", "rob", "again"]):
        case "apply":
            await api.apply(GRAPHS, _variant(name, draw), "kubectl")
        case "scale":
            replicas = {"replicas": draw.randrange(4)}
            if "PrefillWorker" not in (await api.get(GRAPHS, name, KILLED))["spec"]["services"]:
                return
            await api.patch(GRAPHS, name, {"spec": {"services": {"PrefillWorker": replicas}}}, KILLED)
        case "relays":
            annotations = {"penstock.dev/log-relays": draw.choice(["true", "false"])}
            await api.patch(GRAPHS, name, {"metadata": {"annotations": annotations}}, KILLED)
        case "delete":
            await api.delete(GRAPHS, name, KILLED)
        case "rob":
            kind = draw.choice([DEPLOYMENTS, SERVICES, SECRETS, ROLES])
            found = (await api.list(kind, KILLED, OWN_LABEL)).items
            if found:
                await api.delete(kind, name_of(draw.choice(found)), KILLED)
        case "again":
            await api.delete(GRAPHS, name, KILLED)
            await api.apply(GRAPHS, _variant(name, draw), "kubectl")


def _variant(name: str, draw: random.Random) -> Object:
    graph = manifest(0)
    graph["metadata"] = {"name": name, "namespace": KILLED}
    services = graph["spec"]["services"]
    if draw.random() < 0.3:
        del services["PrefillWorker"]
    services["DecodeWorker"]["envs"] = [{"name": "DRAWN", "value": str(draw.randrange(1000))}]
    return graph


async def kill_again_and_again(
    plane: ControlPlane, api: HttpsApi, rounds: int, draw: random.Random
) -> None:
    for _ in range(rounds):
        operator = Operator(plane)
        ends = time.monotonic() + draw.uniform(*ROUND_S)
        while time.monotonic() < ends:
            with contextlib.suppress(ApiError):  # of a graph that is not there, as users' commands are
                await change(api, draw)
            await asyncio.sleep(draw.uniform(0, 0.2))
        operator.process.kill()
        operator.process.wait()
        await api.delete(LEASES, "penstock-operator", NAMESPACE)


async def essence(api: HttpsApi, namespace: str) -> dict[str, Any]:
    """What the operator made there, without what differs each time."""
    found = {}
    for kind in COMPARED:
        for item in (await api.list(kind, namespace, "" if kind == GRAPHS else OWN_LABEL)).items:
            metadata, status = item["metadata"], item.get("status") or {}
            spec = {key: value for key, value in (item.get("spec") or {}).items() if key[:9] != "clusterIP"}
            kept = {
                "labels": metadata.get("labels"),
                "owner": [owner["name"] for owner in metadata.get("ownerReferences") or ()],
                "spec": spec,
                "access": [item.get("rules"), item.get("subjects"), item.get("roleRef")],
                "keys": sorted(item.get("data") or {}),
                "ready": status.get("ready") if kind == GRAPHS else None,
            }
            text = json.dumps(kept, sort_keys=True).replace(f'"{KILLED}"', f'"{CALM}"')
            found[f"{kind.name} {name_of(item)}"] = _without_empty(json.loads(text))
    return found


def _without_empty(value: Any) -> Any:
    """Where the last field of an object is given up, server-side apply leaves the object, empty."""
    if isinstance(value, dict):
        kept = {key: _without_empty(part) for key, part in value.items()}
        return {key: part for key, part in kept.items() if part not in ({}, [], None)}
    return [_without_empty(part) for part in value] if isinstance(value, list) else value


def _first_difference(one: Any, other: Any, path: str = "") -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{path}.{key}")
    return f"{path or 'the object'}: {one}, undisturbed: {other}"


async def measure(plane: ControlPlane, rounds: int, seed: int) -> bool:
    api = connect(plane.kubeconfig("admin"))
    await install_definitions(api)
    for namespace in (KILLED, CALM):
        await api.create(NAMESPACES, {"metadata": {"name": namespace}})
    began = time.monotonic()
    await kill_again_and_again(plane, api, rounds, random.Random(seed))
    print(f"{rounds} operators killed in {time.monotonic() - began:.0f} s")
    operator = Operator(plane)
    try:
        await asyncio.sleep(5.0)
        for graph in (await api.list(GRAPHS, KILLED)).items:
            kept = {
                key: graph["metadata"][key] for key in ("name", "annotations") if key in graph["metadata"]
            }
            copied = {"apiVersion": graph["apiVersion"], "kind": graph["kind"], "spec": graph["spec"]}
            await api.create(GRAPHS, {**copied, "metadata": kept | {"namespace": CALM}})
        await quiet(plane)
        await asyncio.sleep(5.0)  # the garbage collector is not the operator
        killed, calm = await essence(api, KILLED), await essence(api, CALM)
    finally:
        operator.stop()
    differing = [name for name in sorted({*killed, *calm}) if killed.get(name) != calm.get(name)]
    for name in differing:
        print(f"{name} differs: {_first_difference(killed.get(name), calm.get(name))}")
    events = len((await api.list(EVENTS, KILLED)).items)
    print(f"{len(calm)} objects of undisturbed graphs, {len(differing)} differ; {events} events")
    log = (plane.folder / "operator.log").read_text()
    print(f"stack traces in the log: {log.count('Traceback')}")
    await api.close()
    return not differing and "Traceback" not in log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="penstock-killed-operator-") as folder,
        control_plane(Path(folder)) as plane,
    ):
        same = asyncio.run(measure(plane, given.rounds, given.seed))
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
