"""The status that a cluster's operator writes into a DynamoGraphDeployment, in one place.

status:
  state: pending                    # pending, successful or failed
  observedGeneration: 3             # the generation that all of this is about
  conditions:                       # by type: `Ready` says whether all replicas serve, and why not
  - {type: Ready, status: "False", reason: some_resources_are_not_ready, message: "...", ...}
  services:                         # by name; `components` in v1beta1
    PrefillWorker:
      componentKind: Deployment     # what runs it, and under which name
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
    """Base: camelCase names."""

    ACCEPTED: ClassVar[frozenset[str]] = frozenset()


class Condition(_StatusPart, frozen=True):
    """One thing that is so, or not, or not known."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str = ""
    message: str = ""
    last_transition_time: str = ""
    observed_generation: int | None = None


class ServiceStatus(_StatusPart, frozen=True):
    """How many replicas of a service there are, and how many of those do what."""

    component_kind: str = ""
    component_names: tuple[str, ...] = ()
    replicas: Replicas = 0
    updated_replicas: Replicas = 0
    ready_replicas: Replicas | None = None
    available_replicas: Replicas | None = None

    ACCEPTED: ClassVar[frozenset[str]] = frozenset({"componentName", "scheduledReplicas"})


class ReadyReplicas(_StatusPart, frozen=True):
    """Ready replicas of those wanted, as text: `2/3`. A role that the graph does not have is left out."""

    prefill: str = ""
    decode: str = ""
    aggregated: str = ""
    frontend: str = ""


class GraphStatus(_StatusPart, frozen=True):
    """What the operator saw of a graph when it last looked."""

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
