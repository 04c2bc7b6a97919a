"""Answers the requests of an API server to the conversion webhook: a ConversionReview in, a
ConversionReview out.

The server calls the webhook whenever an object is read or written in another version than it is stored in.
It accepts the answer only if the objects are in the same order, and of their metadata only labels and
annotations have changed. If one object cannot be converted, none is: the server then fails the client's
request with the webhook's message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.errors import ConfigError
from penstock.graph.manifest import KIND
from penstock.graph.v1beta1 import API_VERSION as V1BETA1
from penstock.graph.versions import V1ALPHA1, to_v1alpha1, to_v1beta1

REVIEW_VERSION = "apiextensions.k8s.io/v1"

_CONVERSIONS: Mapping[tuple[str, str], Callable[[dict[str, Any]], dict[str, Any]]] = {
    (V1ALPHA1, V1BETA1): to_v1beta1,
    (V1BETA1, V1ALPHA1): to_v1alpha1,
}


def convert_review(review: dict[str, Any]) -> dict[str, Any]:
    """Answer a ConversionReview.

    Raises:
        ConfigError: the request is not a ConversionReview.
    """
    request = review.get("request")
    if review.get("kind") != "ConversionReview" or not isinstance(request, dict):
        raise ConfigError(f"expected a ConversionReview with a request, got kind {review.get('kind')!r}")
    response: dict[str, Any] = {"uid": request.get("uid", "")}
    try:
        wanted, objects = request.get("desiredAPIVersion"), request.get("objects")
        if not isinstance(wanted, str) or not isinstance(objects, list):
            raise ConfigError("the request names no desiredAPIVersion or no objects")
        response["convertedObjects"] = [_converted(found, wanted) for found in objects]
        response["result"] = {"status": "Success"}
    except ConfigError as error:
        response.pop("convertedObjects", None)
        response["result"] = {"status": "Failure", "message": str(error)}
    return {"apiVersion": REVIEW_VERSION, "kind": "ConversionReview", "response": response}


def _converted(found: Any, wanted: str) -> dict[str, Any]:
    if not isinstance(found, dict) or found.get("kind") != KIND:
        kind = found.get("kind") if isinstance(found, dict) else found
        raise ConfigError(f"only {KIND}s are converted, not {kind!r}")
    version = found.get("apiVersion")
    if version == wanted:
        return found
    metadata = found.get("metadata")
    name = metadata.get("name", "") if isinstance(metadata, dict) else ""
    convert = _CONVERSIONS.get((str(version), wanted))
    if convert is None:
        raise ConfigError(f"{name}: no conversion from {version} to {wanted} exists")
    try:
        return convert(found)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
