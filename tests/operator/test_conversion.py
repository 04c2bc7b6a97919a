import json
from typing import Any

import pytest

from penstock.errors import ConfigError
from penstock.operator.conversion import convert_review

V1ALPHA1, V1BETA1 = "nvidia.com/v1alpha1", "nvidia.com/v1beta1"


def graph(name: str, version: str = V1ALPHA1, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "n", "uid": "1", "resourceVersion": "7", "generation": 2}
    return {"apiVersion": version, "kind": "DynamoGraphDeployment", "metadata": metadata, "spec": spec}


def review(wanted: Any, *objects: Any) -> dict[str, Any]:
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "ConversionReview",
        "request": {"uid": "abc", "desiredAPIVersion": wanted, "objects": list(objects)},
    }


def test_objects_come_back_in_order_with_their_metadata() -> None:
    asked = [
        graph("b", services={"Worker": {"componentType": "worker", "ingress": {"enabled": True}}}),
        graph("a", services={"Frontend": {"componentType": "main"}}),
        graph("c", V1BETA1, components=[{"name": "X"}]),
    ]
    answer = convert_review(review(V1BETA1, *asked))
    assert (answer["apiVersion"], answer["kind"]) == ("apiextensions.k8s.io/v1", "ConversionReview")
    response = answer["response"]
    assert (response["uid"], response["result"]) == ("abc", {"status": "Success"})
    converted = response["convertedObjects"]
    assert [one["apiVersion"] for one in converted] == [V1BETA1] * 3
    assert [one["spec"]["components"][0]["name"] for one in converted] == ["Worker", "Frontend", "X"]
    for before, after in zip(asked, converted, strict=True):
        metadata = {key: value for key, value in after["metadata"].items() if key != "annotations"}
        assert metadata == before["metadata"]
    back = convert_review(json.loads(json.dumps(review(V1ALPHA1, *converted))))
    assert back["response"]["convertedObjects"][:2] == asked[:2]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (review(V1BETA1, graph("g", services=[])), "g: spec.services: expected an object, got []"),
        (
            review("nvidia.com/v2", graph("g")),
            "good: no conversion from nvidia.com/v1alpha1 to nvidia.com/v2 exists",
        ),
        (review(V1BETA1, {"kind": "Pod"}), "only DynamoGraphDeployments are converted, not 'Pod'"),
        (review(V1BETA1, None), "only DynamoGraphDeployments are converted, not None"),
        (review(None), "the request names no desiredAPIVersion or no objects"),
    ],
)
def test_what_cannot_be_converted_fails_the_request_with_a_message(asked: Any, message: str) -> None:
    good = graph("good", services={})
    asked["request"]["objects"] = [good, *asked["request"]["objects"]]
    response = convert_review(asked)["response"]
    assert response == {"uid": "abc", "result": {"status": "Failure", "message": message}}


@pytest.mark.parametrize("text", ["{}", '{"kind": "ConversionReview"}', '{"kind": "Pod", "request": {}}'])
def test_what_is_no_review_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a ConversionReview"):
        convert_review(json.loads(text))
