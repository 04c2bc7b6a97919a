"""What the scheduler asks the KV transfer to do. Each effect names the method that takes the answer."""

from __future__ import annotations

import msgspec

from penstock.shapes import Handoff


class Export(msgspec.Struct):
    """Let one reader pull these blocks: `Scheduler.exported` or `export_failed`."""

    handoff: Handoff
    block_ids: list[int]


class Retract(msgspec.Struct):
    """Let nobody pull them any more: `Scheduler.retracted`."""

    handoff_id: str


class Pull(msgspec.Struct):
    """Read the handoff's blocks number `source_indices` into `block_ids`; none, when everything is here
    already and the holder may let go: `Scheduler.pull_done`."""

    attempt_id: str
    handoff: Handoff
    source_indices: list[int]
    block_ids: list[int]
    timeout_s: float


Effect = Export | Retract | Pull
