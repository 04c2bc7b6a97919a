"""Renders the PersistentVolumeClaims that a manifest asks for."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.errors import ConfigError
from penstock.graph.manifest import Claim, Manifest
from penstock.kubernetes.api import Object
from penstock.operator import names


def volume_claims(manifest: Manifest) -> list[Object]:
    """The claims with `create: true`. Others must exist already.

    Raises:
        ConfigError: one line for each missing field, and for each claim that differs from one of its name.
    """
    wrong: list[str] = []
    found: dict[str, Claim] = {}
    for where, claim in _claims(manifest):
        if not claim.create:
            continue
        wrong += [f"{where}.{field}: missing, and create is true" for field in _missing(claim)]
        if claim.name in found and _sized(found[claim.name]) != _sized(claim):
            wrong.append(f"{where}: another claim of the name {claim.name} differs from it")
        found[claim.name] = claim
    if wrong:
        raise ConfigError("\n".join(wrong))
    return [_claim_object(manifest.metadata.name, claim) for claim in found.values()]


def _claims(manifest: Manifest) -> Iterator[tuple[str, Claim]]:
    """Each claim with its path in the manifest."""
    for index, claim in enumerate(manifest.spec.pvcs):
        yield f"spec.pvcs[{index}]", claim
    for name, spec in manifest.spec.services.items():
        for index, claim in enumerate(spec.pvcs):
            yield f"spec.services.{name}.pvcs[{index}]", claim
        if spec.pvc is not None:
            yield f"spec.services.{name}.pvc", spec.pvc


def _missing(claim: Claim) -> list[str]:
    """The required fields that the claim lacks. Without a storage class, the cluster's default is used."""
    fields = {"size": claim.size, "volumeAccessMode": claim.volume_access_mode}
    return [field for field, value in fields.items() if value is None]


def _sized(claim: Claim) -> tuple[object, ...]:
    return (claim.size, claim.volume_access_mode, claim.storage_class)


def _claim_object(graph: str, claim: Claim) -> Object:
    spec: Object = {
        "accessModes": [claim.volume_access_mode],
        "resources": {"requests": {"storage": str(claim.size)}},
    }
    if claim.storage_class:
        spec["storageClassName"] = claim.storage_class
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": claim.name, "labels": names.common_labels(graph, "storage")},
        "spec": spec,
    }
