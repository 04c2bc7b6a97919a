from __future__ import annotations

from typing import Any

import pytest

from penstock.operator.rendering.merge import merged


@pytest.mark.parametrize(
    ("base", "over", "expected"),
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}}, {"a": 1, "b": {"c": 2, "d": 3}}),
        ({"a": 1}, {"a": None}, {"a": 1}),
        ({"a": True}, {"a": False}, {"a": False}),
        # Named things merge by name, in the operator's order, and one with other fields is another thing.
        (
            {"volumes": [{"name": "a", "emptyDir": {}}, {"name": "b", "emptyDir": {}}]},
            {"volumes": [{"name": "c", "hostPath": {}}, {"name": "a", "configMap": {}}]},
            {
                "volumes": [
                    {"name": "a", "configMap": {}},
                    {"name": "b", "emptyDir": {}},
                    {"name": "c", "hostPath": {}},
                ]
            },
        ),
        (
            {"volumeMounts": [{"name": "a", "mountPath": "/tmp"}]},
            {"volumeMounts": [{"name": "b", "mountPath": "/tmp"}, {"name": "b", "mountPath": "/x"}]},
            {"volumeMounts": [{"name": "b", "mountPath": "/tmp"}, {"name": "b", "mountPath": "/x"}]},
        ),
        (
            {"containers": [{"name": "main", "image": "a", "ports": [{"containerPort": 1, "name": "x"}]}]},
            {"containers": [{"name": "main", "ports": [{"containerPort": 1}, {"containerPort": 2}]}]},
            {
                "containers": [
                    {
                        "name": "main",
                        "image": "a",
                        "ports": [{"containerPort": 1, "name": "x"}, {"containerPort": 2}],
                    }
                ]
            },
        ),
        # Lists without names replace each other, but for those to which one adds.
        ({"args": ["a"]}, {"args": ["b"]}, {"args": ["b"]}),
        (
            {"tolerations": [{"key": "a"}]},
            {"tolerations": [{"key": "b"}]},
            {"tolerations": [{"key": "a"}, {"key": "b"}]},
        ),
        # A probe is one choice: one with two handlers would be refused.
        (
            {"livenessProbe": {"httpGet": {"path": "/live"}, "periodSeconds": 5}},
            {"livenessProbe": {"tcpSocket": {"port": 1}}},
            {"livenessProbe": {"tcpSocket": {"port": 1}}},
        ),
        (
            {"lifecycle": {"preStop": {"exec": {"command": ["sleep", "5"]}}}},
            {"lifecycle": {"postStart": {"exec": {"command": ["true"]}}}},
            {
                "lifecycle": {
                    "preStop": {"exec": {"command": ["sleep", "5"]}},
                    "postStart": {"exec": {"command": ["true"]}},
                }
            },
        ),
    ],
)
def test_what_people_wrote_wins(
    base: dict[str, Any], over: dict[str, Any], expected: dict[str, Any]
) -> None:
    before = repr(base)
    assert merged(base, over) == expected
    assert repr(base) == before
