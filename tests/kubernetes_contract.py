"""What every API server must do for the `Api` port, a real one and the double. Subclasses provide the
fixtures `api` and `namespace` (one in which nothing else happens)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from penstock.kubernetes.api import Api, ApiError, Change, Kind, Object, is_being_deleted, name_of, uid_of
from penstock.kubernetes.kinds import CONFIG_MAPS, DEPLOYMENTS, INGRESSES, PODS
from tests.waiting import until

ANOTHER_UID = "7e6b1c3e-0000-4000-8000-000000000000"
IN_EACH_NAMESPACE = {"kube-root-ca.crt"}
CHANGE_S = 20.0  # controllers of a busy cluster take their time


def named(kind: Kind, namespace: str, name: str, **parts: Any) -> Object:
    """An object; `labels`, `annotations`, `finalizers` and `ownerReferences` go where they belong."""
    metadata: Object = {"name": name, "namespace": namespace}
    for part in ("labels", "annotations", "finalizers", "ownerReferences", "resourceVersion", "uid"):
        if part in parts:
            metadata[part] = parts.pop(part)
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **parts}


def config(namespace: str, name: str, **parts: Any) -> Object:
    return named(CONFIG_MAPS, namespace, name, **parts)


def unscheduled_pod(namespace: str, name: str, **parts: Any) -> Object:
    """A pod that no scheduler takes up, so that its status is the test's own."""
    port = {"name": "link", "containerPort": 7000}
    main = {"name": "main", "image": "penstock:dev", "ports": [port]}
    spec = {"schedulerName": "none", "automountServiceAccountToken": False, "containers": [main]}
    return named(PODS, namespace, name, **parts, spec=spec)


def ingress(namespace: str, name: str, port: int) -> Object:
    backend = {"service": {"name": "x", "port": {"number": port}}}
    return named(INGRESSES, namespace, name, spec={"defaultBackend": backend})


def deployment(namespace: str, name: str, replicas: int) -> Object:
    labels = {"app": name}
    pod = {"schedulerName": "none", "containers": [{"name": "main", "image": "penstock:dev"}]}
    spec = {
        "replicas": replicas,
        "paused": True,
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    return named(DEPLOYMENTS, namespace, name, spec=spec)


def version_of(item: Object) -> str:
    return str(item["metadata"]["resourceVersion"])


class Seen:
    """The changes of a watch, read in the background."""

    def __init__(self, changes: AsyncIterator[Change]) -> None:
        self.changes: list[Change] = []
        self.ended = asyncio.create_task(self._read(changes))

    async def _read(self, changes: AsyncIterator[Change]) -> None:
        async for change in changes:
            self.changes.append(change)

    def kinds(self) -> list[tuple[str, str]]:
        return [
            (change.type, name_of(change.object)) for change in self.changes if change.type != "BOOKMARK"
        ]

    async def until(self, *wanted: tuple[str, str]) -> None:
        await until(lambda: self.kinds() == list(wanted), lambda: f"{self.kinds()} instead of {wanted}")

    async def stop(self) -> None:
        self.ended.cancel()
        await asyncio.gather(self.ended, return_exceptions=True)


class ApiContract:
    async def test_objects_are_made_read_and_removed(self, api: Api, namespace: str) -> None:
        made = await api.create(CONFIG_MAPS, config(namespace, "a", data={"x": "1"}))
        read = await api.get(CONFIG_MAPS, "a", namespace)
        assert read["data"] == {"x": "1"}
        assert uid_of(read) == uid_of(made)
        assert (read["apiVersion"], read["kind"]) == ("v1", "ConfigMap")
        await api.delete(CONFIG_MAPS, "a", namespace)
        with pytest.raises(ApiError) as raised:
            await api.get(CONFIG_MAPS, "a", namespace)
        assert raised.value.is_not_found
        await api.delete(CONFIG_MAPS, "a", namespace)  # it is gone, which is what was wanted

    async def test_a_name_is_taken_once(self, api: Api, namespace: str) -> None:
        await api.create(CONFIG_MAPS, config(namespace, "a"))
        with pytest.raises(ApiError) as raised:
            await api.create(CONFIG_MAPS, config(namespace, "a"))
        assert raised.value.is_conflict
        assert raised.value.reason == "AlreadyExists"

    async def test_the_server_makes_up_a_name(self, api: Api, namespace: str) -> None:
        new = config(namespace, "", data={})
        new["metadata"] = {"namespace": namespace, "generateName": "made-up-"}
        names = {name_of(await api.create(CONFIG_MAPS, new)) for _ in range(2)}
        assert len(names) == 2
        assert all(name.startswith("made-up-") for name in names)

    async def test_a_name_that_cannot_be_is_refused(self, api: Api, namespace: str) -> None:
        with pytest.raises(ApiError) as raised:
            await api.create(CONFIG_MAPS, config(namespace, "No_Name"))
        assert raised.value.is_refused

    async def test_a_namespace_is_needed_and_must_be_there(self, api: Api, namespace: str) -> None:
        with pytest.raises(ApiError) as raised:
            await api.create(CONFIG_MAPS, config("", "a"))
        assert raised.value.status == 405
        with pytest.raises(ApiError) as raised:
            await api.create(CONFIG_MAPS, config("there-is-none", "a"))
        assert raised.value.is_not_found

    @pytest.mark.parametrize(
        ("labels", "found"),
        [
            ("", "abc"),
            ("role=prefill", "a"),
            ("role==prefill,graph=g", "a"),
            ("role!=prefill", "bc"),
            ("graph", "ab"),
            ("!graph", "c"),
            ("role in (prefill, decode),graph", "ab"),
            ("role notin (prefill)", "bc"),
            ("role=frontend", ""),
        ],
    )
    async def test_selectors(self, api: Api, namespace: str, labels: str, found: str) -> None:
        for name, own in {
            "a": {"graph": "g", "role": "prefill"},
            "b": {"graph": "g", "role": "decode"},
            "c": {"other": "x"},
        }.items():
            await api.create(CONFIG_MAPS, config(namespace, name, labels=own))
        listed = await api.list(CONFIG_MAPS, namespace, labels)
        own_names = {name_of(item) for item in listed.items} - {
            "kube-root-ca.crt"
        }  # every namespace has it
        assert own_names == set(found)
        assert all(item["kind"] == "ConfigMap" for item in listed.items)
        everywhere = await api.list(CONFIG_MAPS, "", labels)
        assert own_names <= {name_of(item) for item in everywhere.items}

    async def test_what_was_changed_meanwhile_is_not_replaced(self, api: Api, namespace: str) -> None:
        old = await api.create(CONFIG_MAPS, config(namespace, "a", data={"x": "1"}))
        new = await api.replace(CONFIG_MAPS, {**old, "data": {"x": "2"}})
        assert version_of(new) != version_of(old)
        with pytest.raises(ApiError) as raised:
            await api.replace(CONFIG_MAPS, {**old, "data": {"x": "3"}})
        assert raised.value.is_conflict
        assert version_of(await api.replace(CONFIG_MAPS, new)) == version_of(new)  # nothing changed
        assert (await api.get(CONFIG_MAPS, "a", namespace))["data"] == {"x": "2"}

    async def test_merge_patches(self, api: Api, namespace: str) -> None:
        old = await api.create(CONFIG_MAPS, config(namespace, "a", labels={"l": "1"}, data={"x": "1"}))
        changes = {"metadata": {"labels": {"m": "2"}}, "data": {"x": None, "y": "2"}}
        new = await api.patch(CONFIG_MAPS, "a", changes, namespace)
        assert new["data"] == {"y": "2"}
        assert new["metadata"]["labels"] == {"l": "1", "m": "2"}
        assert version_of(await api.patch(CONFIG_MAPS, "a", changes, namespace)) == version_of(new)
        stale = {"metadata": {"resourceVersion": version_of(old)}, "data": {"y": "3"}}
        with pytest.raises(ApiError) as raised:
            await api.patch(CONFIG_MAPS, "a", stale, namespace)
        assert raised.value.is_conflict
        with pytest.raises(ApiError) as raised:
            await api.patch(CONFIG_MAPS, "b", changes, namespace)
        assert raised.value.is_not_found

    # --- server-side apply --------------------------------------------------------------------------------

    async def test_apply_makes_and_then_changes_nothing(self, api: Api, namespace: str) -> None:
        wanted = config(namespace, "a", labels={"l": "1"}, data={"x": "1"})
        made = await api.apply(CONFIG_MAPS, wanted, "tester")
        assert made["data"] == {"x": "1"}
        again = await api.apply(CONFIG_MAPS, wanted, "tester")
        assert version_of(again) == version_of(made)
        assert uid_of(again) == uid_of(made)

    async def test_apply_removes_what_it_no_longer_wants(self, api: Api, namespace: str) -> None:
        await api.apply(
            CONFIG_MAPS, config(namespace, "a", labels={"l": "1"}, data={"x": "1", "y": "1"}), "tester"
        )
        await api.patch(CONFIG_MAPS, "a", {"data": {"z": "theirs"}}, namespace)
        new = await api.apply(CONFIG_MAPS, config(namespace, "a", data={"x": "2"}), "tester")
        assert new["data"] == {"x": "2", "z": "theirs"}
        assert not new["metadata"].get("labels")

    async def test_apply_takes_what_others_have(self, api: Api, namespace: str) -> None:
        await api.create(CONFIG_MAPS, config(namespace, "a", data={"x": "theirs"}))
        wanted = config(namespace, "a", data={"x": "1"})
        assert (await api.apply(CONFIG_MAPS, wanted, "tester"))["data"] == {"x": "1"}
        await api.patch(CONFIG_MAPS, "a", {"data": {"x": "theirs"}}, namespace)
        assert (await api.apply(CONFIG_MAPS, wanted, "tester"))["data"] == {"x": "1"}

    async def test_what_others_have_changed_stays_when_it_is_given_up(
        self, api: Api, namespace: str
    ) -> None:
        """So an autoscaler's replicas stay when the operator no longer applies any."""
        await api.apply(CONFIG_MAPS, config(namespace, "a", data={"x": "1", "y": "1"}), "tester")
        await api.patch(CONFIG_MAPS, "a", {"data": {"y": "theirs"}}, namespace)
        new = await api.apply(CONFIG_MAPS, config(namespace, "a", data={"x": "1"}), "tester")
        assert new["data"] == {"x": "1", "y": "theirs"}

    async def test_two_who_apply_the_same_both_have_it(self, api: Api, namespace: str) -> None:
        await api.apply(CONFIG_MAPS, config(namespace, "a", data={"x": "1"}), "one")
        await api.apply(CONFIG_MAPS, config(namespace, "a", data={"x": "1", "y": "1"}), "two")
        new = await api.apply(CONFIG_MAPS, config(namespace, "a"), "one")
        assert new["data"] == {"x": "1", "y": "1"}

    async def test_apply_to_an_object_that_is_gone_does_not_make_it_again(
        self, api: Api, namespace: str
    ) -> None:
        """Where the uid is said."""
        wanted = config(namespace, "a", uid=ANOTHER_UID, data={"x": "1"})
        with pytest.raises(ApiError) as raised:
            await api.apply(CONFIG_MAPS, wanted, "tester")
        assert raised.value.is_conflict
        await api.create(CONFIG_MAPS, config(namespace, "a"))
        with pytest.raises(ApiError) as raised:
            await api.apply(CONFIG_MAPS, wanted, "tester")
        assert raised.value.is_refused
        assert "data" not in await api.get(CONFIG_MAPS, "a", namespace)

    async def test_apply_to_what_was_changed_meanwhile(self, api: Api, namespace: str) -> None:
        """Where the resourceVersion is said."""
        old = await api.apply(CONFIG_MAPS, config(namespace, "a", data={"x": "1"}), "tester")
        await api.patch(CONFIG_MAPS, "a", {"data": {"y": "theirs"}}, namespace)
        stale = config(namespace, "a", resourceVersion=version_of(old), data={"x": "2"})
        with pytest.raises(ApiError) as raised:
            await api.apply(CONFIG_MAPS, stale, "tester")
        assert raised.value.is_conflict

    # --- status, scale, generation ------------------------------------------------------------------------

    async def test_status_and_spec_are_written_apart(self, api: Api, namespace: str) -> None:
        balanced = {"loadBalancer": {"ingress": [{"ip": "10.9.9.9"}]}}
        made = await api.create(INGRESSES, {**ingress(namespace, "a", 80), "status": balanced})
        assert made["metadata"]["generation"] == 1
        assert "ingress" not in made.get("status", {}).get("loadBalancer", {})
        both = {**ingress(namespace, "a", 81), "status": balanced}
        told = await api.patch(INGRESSES, "a", {"status": balanced}, namespace, subresource="status")
        assert told["status"] == balanced
        told = await api.patch(INGRESSES, "a", {"spec": both["spec"]}, namespace, subresource="status")
        assert told["spec"]["defaultBackend"]["service"]["port"]["number"] == 80
        assert told["metadata"]["generation"] == 1
        new = await api.patch(
            INGRESSES, "a", {"spec": both["spec"], "status": {"loadBalancer": None}}, namespace
        )
        assert new["status"] == balanced
        assert new["metadata"]["generation"] == 2
        labelled = await api.patch(INGRESSES, "a", {"metadata": {"labels": {"l": "1"}}}, namespace)
        assert labelled["metadata"]["generation"] == 2

    async def test_status_is_applied_by_a_manager_of_its_own(self, api: Api, namespace: str) -> None:
        await api.apply(INGRESSES, ingress(namespace, "a", 80), "tester")
        balanced = {"loadBalancer": {"ingress": [{"ip": "10.9.9.9"}]}}
        wanted = named(INGRESSES, namespace, "a", status=balanced)
        told = await api.apply(INGRESSES, wanted, "tester-status", subresource="status")
        assert told["status"] == wanted["status"]
        again = await api.apply(INGRESSES, wanted, "tester-status", subresource="status")
        assert version_of(again) == version_of(told)
        new = await api.apply(INGRESSES, ingress(namespace, "a", 81), "tester")
        assert new["status"] == balanced

    async def test_scale(self, api: Api, namespace: str) -> None:
        made = await api.create(DEPLOYMENTS, deployment(namespace, "a", 1))
        scale = await api.patch(DEPLOYMENTS, "a", {"spec": {"replicas": 3}}, namespace, subresource="scale")
        assert (scale["kind"], scale["spec"]["replicas"]) == ("Scale", 3)
        new = await api.get(DEPLOYMENTS, "a", namespace)
        assert new["spec"]["replicas"] == 3
        assert new["metadata"]["generation"] > made["metadata"]["generation"]

    async def test_a_pod_is_pending_until_its_status_says_more(self, api: Api, namespace: str) -> None:
        made = await api.create(PODS, unscheduled_pod(namespace, "a"))
        assert made["status"]["phase"] == "Pending"
        changes = {"status": {"phase": "Running", "podIP": "10.1.2.3"}}
        await api.patch(PODS, "a", changes, namespace, subresource="status")
        read = await api.get(PODS, "a", namespace)
        assert (read["status"]["phase"], read["status"]["podIP"]) == ("Running", "10.1.2.3")
        await api.delete(PODS, "a", namespace)
        with pytest.raises(ApiError):
            await api.get(PODS, "a", namespace)

    # --- deletion -----------------------------------------------------------------------------------------

    async def test_only_the_object_that_was_meant_is_deleted(self, api: Api, namespace: str) -> None:
        made = await api.create(CONFIG_MAPS, config(namespace, "a"))
        with pytest.raises(ApiError) as raised:
            await api.delete(CONFIG_MAPS, "a", namespace, uid=ANOTHER_UID)
        assert raised.value.is_conflict
        await api.delete(CONFIG_MAPS, "a", namespace, uid=uid_of(made))
        with pytest.raises(ApiError):
            await api.get(CONFIG_MAPS, "a", namespace)

    async def test_finalizers_hold_what_is_being_deleted(self, api: Api, namespace: str) -> None:
        await api.create(CONFIG_MAPS, config(namespace, "a", finalizers=["penstock.dev/test"]))
        await api.delete(CONFIG_MAPS, "a", namespace)
        held = await api.get(CONFIG_MAPS, "a", namespace)
        assert is_being_deleted(held)
        await api.delete(CONFIG_MAPS, "a", namespace)  # again: it changes nothing
        await api.patch(CONFIG_MAPS, "a", {"metadata": {"finalizers": None}}, namespace)
        with pytest.raises(ApiError) as raised:
            await api.get(CONFIG_MAPS, "a", namespace)
        assert raised.value.is_not_found

    async def test_what_an_owner_leaves_behind_goes_too(self, api: Api, namespace: str) -> None:
        owner = await api.create(CONFIG_MAPS, config(namespace, "owner"))
        reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid_of(owner)}
        await api.create(CONFIG_MAPS, config(namespace, "owned", ownerReferences=[reference]))
        await api.create(CONFIG_MAPS, config(namespace, "free"))
        await api.delete(CONFIG_MAPS, "owner", namespace)

        async def gone() -> bool:
            names = {name_of(item) for item in (await api.list(CONFIG_MAPS, namespace)).items}
            return names - IN_EACH_NAMESPACE == {"free"}

        await until(gone, "the owned object goes", look_s=0.1)

    # --- watches ------------------------------------------------------------------------------------------

    async def test_a_watch_goes_on_from_a_list(self, api: Api, namespace: str) -> None:
        await api.create(CONFIG_MAPS, config(namespace, "before"))
        listed = await api.list(CONFIG_MAPS, namespace)
        await api.create(CONFIG_MAPS, config(namespace, "a"))
        seen = Seen(api.watch(CONFIG_MAPS, listed.resource_version, namespace, timeout_s=2))
        await api.patch(CONFIG_MAPS, "a", {"data": {"x": "1"}}, namespace)
        await api.delete(CONFIG_MAPS, "a", namespace)
        await seen.until(("ADDED", "a"), ("MODIFIED", "a"), ("DELETED", "a"))
        versions = [int(version_of(change.object)) for change in seen.changes]
        assert versions == sorted(set(versions))
        assert versions[0] > int(listed.resource_version)
        async with asyncio.timeout(CHANGE_S):
            await seen.ended  # in about `timeout_s`, without an error

    async def test_a_watch_shows_what_begins_and_ends_to_match(self, api: Api, namespace: str) -> None:
        listed = await api.list(CONFIG_MAPS, namespace, "l=1")
        seen = Seen(api.watch(CONFIG_MAPS, listed.resource_version, namespace, "l=1"))
        await api.create(CONFIG_MAPS, config(namespace, "a", labels={"l": "2"}))
        for value in ("1", "2"):
            await api.patch(CONFIG_MAPS, "a", {"metadata": {"labels": {"l": value}}}, namespace)
        await api.delete(CONFIG_MAPS, "a", namespace)
        await seen.until(("ADDED", "a"), ("DELETED", "a"))
        await seen.stop()

    async def test_a_deletion_with_a_finalizer_is_first_a_change(self, api: Api, namespace: str) -> None:
        await api.create(CONFIG_MAPS, config(namespace, "a", finalizers=["penstock.dev/test"]))
        listed = await api.list(CONFIG_MAPS, namespace)
        seen = Seen(api.watch(CONFIG_MAPS, listed.resource_version, namespace))
        await api.delete(CONFIG_MAPS, "a", namespace)
        await seen.until(("MODIFIED", "a"))
        assert is_being_deleted(seen.changes[0].object)
        await api.patch(CONFIG_MAPS, "a", {"metadata": {"finalizers": []}}, namespace)
        await seen.until(("MODIFIED", "a"), ("DELETED", "a"))
        await seen.stop()

    async def test_a_watch_from_long_ago_must_list_again(self, api: Api, namespace: str) -> None:
        with pytest.raises(ApiError) as raised:
            async for _ in api.watch(CONFIG_MAPS, "1", namespace, timeout_s=2):
                pass
        assert raised.value.is_expired

    # --- kinds --------------------------------------------------------------------------------------------

    async def test_what_is_served(self, api: Api) -> None:
        assert await api.serves(CONFIG_MAPS)
        assert await api.serves(DEPLOYMENTS)
        assert not await api.serves(Kind("apps", "v1", "Nothing", "nothings"))
        assert not await api.serves(Kind("nothing.example", "v1", "Nothing", "nothings"))
