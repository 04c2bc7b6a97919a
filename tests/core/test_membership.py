from __future__ import annotations

from penstock.core.membership import Connect, Disconnect, Membership, State
from penstock.structs import Card, Registration, Role


def registration(instance_id: str, epoch: int = 1, role: Role = Role.DECODE) -> Registration:
    return Registration(instance_id, epoch, role, "m", f"127.0.0.1:{epoch}")


def card(instance_id: str, role: Role = Role.DECODE, model: str = "m") -> Card:
    return Card(instance_id, 1, role, model, "reference", 16, 100, 4096, 1024)


def ready(membership: Membership, instance_id: str, role: Role = Role.DECODE) -> None:
    membership.discovered(
        {
            **{k: m.registration for k, m in membership.members.items()},
            instance_id: registration(instance_id),
        }
    )
    membership.up(instance_id, card(instance_id, role))
    membership.loaded(instance_id)


def test_connects_to_what_is_discovered_once() -> None:
    membership = Membership()
    found = {"d0": registration("d0")}
    assert membership.discovered(found) == [Connect(found["d0"])]
    assert membership.discovered(found) == []


def test_takes_part_only_when_loaded() -> None:
    membership = Membership()
    membership.discovered({"d0": registration("d0")})
    assert membership.ready("m") == []
    membership.up("d0", card("d0"))
    assert membership.ready("m") == []
    membership.loaded("d0")
    assert [card.instance_id for card in membership.ready("m")] == ["d0"]
    assert membership.ready("other") == []


def test_discovery_going_blank_does_not_touch_what_is_connected() -> None:
    membership = Membership()
    ready(membership, "d0")
    assert membership.discovered({}) == []
    assert len(membership.ready("m")) == 1
    assert membership.down("d0") == [Disconnect("d0")]
    assert membership.members == {}


def test_an_unlisted_instance_that_is_not_connected_is_forgotten() -> None:
    membership = Membership()
    membership.discovered({"d0": registration("d0")})
    assert membership.discovered({}) == [Disconnect("d0")]


def test_a_listed_instance_stays_when_its_link_drops() -> None:
    membership = Membership()
    ready(membership, "d0")
    assert membership.down("d0") == []
    assert membership.members["d0"].state is State.CONNECTING
    assert membership.ready("m") == []


def test_a_new_epoch_replaces_the_old_incarnation() -> None:
    membership = Membership()
    ready(membership, "d0")
    again = registration("d0", epoch=2)
    assert membership.discovered({"d0": again}) == [Disconnect("d0"), Connect(again)]
    assert membership.ready("m") == []


def test_draining_takes_no_more() -> None:
    membership = Membership()
    ready(membership, "d0")
    membership.draining("d0")
    assert membership.ready("m") == []
    membership.loaded("d0")  # a late asset does not undo it
    assert membership.ready("m") == []


def test_missing_roles() -> None:
    membership = Membership()
    assert membership.missing([]) == [Role.DECODE]
    ready(membership, "d0", Role.DECODE)
    assert membership.missing([]) == []
    assert membership.missing([Role.PREFILL, Role.DECODE]) == [Role.PREFILL]
    ready(membership, "p0", Role.PREFILL)
    assert membership.missing([Role.PREFILL, Role.DECODE]) == []


def test_a_stuck_instance_takes_nothing_until_it_advances() -> None:
    membership = Membership()
    ready(membership, "d0")
    membership.stuck("d0", "no step for 3 s")
    assert membership.members["d0"].state is State.QUARANTINED
    assert membership.ready("m") == []
    assert membership.missing([Role.DECODE]) == [Role.DECODE]
    membership.advancing("d0")
    assert len(membership.ready("m")) == 1


def test_a_stuck_instance_that_loads_or_drains_is_not_taken_for_ready() -> None:
    membership = Membership()
    membership.discovered({"d0": registration("d0")})
    membership.up("d0", card("d0"))
    membership.stuck("d0", "no step")
    membership.loaded("d0")
    assert membership.members["d0"].state is State.QUARANTINED
    membership.draining("d0")
    membership.advancing("d0")
    assert membership.members["d0"].state is State.DRAINING
    membership.stuck("d0", "no step")
    membership.down("d0")
    membership.up("d0", card("d0"))
    membership.loaded("d0")
    assert membership.members["d0"].state is State.READY
