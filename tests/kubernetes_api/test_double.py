from __future__ import annotations

import pytest

from penstock.kubernetes.api import Kind
from tests.kubernetes_contract import ApiContract
from tests.kubernetes_double import KubernetesDouble

UNSERVED = (
    Kind("apps", "v1", "Nothing", "nothings"),
    Kind("nothing.example", "v1", "Nothing", "nothings"),
)


class TestTheDouble(ApiContract):
    @pytest.fixture
    def api(self) -> KubernetesDouble:
        double = KubernetesDouble(unserved=UNSERVED)
        double.missing_namespaces.add("there-is-none")
        return double

    @pytest.fixture
    def namespace(self) -> str:
        return "test"
