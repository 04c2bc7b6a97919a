"""The structs of the status that the operator writes into a DynamoGraphDeployment.

status:
  state: pending                    # pending, successful or failed
  observedGeneration: 3             # the generation that the status describes
  conditions:                       # by type: `Ready` says whether all replicas are ready, and why not
  - {type: Ready, status: "False", reason: some_resources_are_not_ready, message: "...", ...}
  services:                         # by name; `components` in v1beta1
    PrefillWorker:
      componentKind: Deployment     # kind and name of the object that runs it
      componentName: multinode-vllm-prefillworker
      replicas: 3
      updatedReplicas: 3
      readyReplicas: 2
      availableReplicas: 2
  ready:                            # ready replicas of those wanted, by role: the printer columns
    prefill: 2/3
    decode: 4/4
    frontend: 1/1
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

State = Literal["initializing", "pending", "successful", "failed"]
Replicas = Annotated[int, Meta(ge=0)]


class _StatusPart(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """The base of the structs: fields have camelCase names in JSON."""

    ACCEPTED: ClassVar[frozenset[str]] = frozenset()


class Condition(_StatusPart, frozen=True):
    """A condition of the graph, which is true, false or unknown."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str = ""
    message: str = ""
    last_transition_time: str = ""
    observed_generation: int | None = None


class ServiceStatus(_StatusPart, frozen=True):
    """The numbers of a service's replicas: all, updated, ready and available ones."""

    component_kind: str = ""
    component_names: tuple[str, ...] = ()
    replicas: Replicas = 0
    updated_replicas: Replicas = 0
    ready_replicas: Replicas | None = None
    available_replicas: Replicas | None = None

    ACCEPTED: ClassVar[frozenset[str]] = frozenset({"componentName", "scheduledReplicas"})


class ReadyReplicas(_StatusPart, frozen=True):
    """The ready replicas of those wanted, as text such as `2/3`. Roles that the graph lacks are left
    out."""

    prefill: str = ""
    decode: str = ""
    aggregated: str = ""
    frontend: str = ""


class GraphStatus(_StatusPart, frozen=True):
    """The status of a graph at the operator's last reconciliation."""

    state: State | None = None
    observed_generation: int | None = None
    conditions: tuple[Condition, ...] = ()
    services: dict[str, ServiceStatus] = {}
    ready: ReadyReplicas | None = None

    ACCEPTED: ClassVar[frozenset[str]] = frozenset({"checkpoints", "placement", "restart", "rollingUpdate"})


class ScalingAdapterStatus(_StatusPart, frozen=True):
    """What HPA and KEDA read of a DynamoGraphDeploymentScalingAdapter."""

    replicas: Replicas = 0
    selector: str = ""
    last_scale_time: str = ""
