from __future__ import annotations

from collections.abc import Callable

import pytest

from penstock.core.catalog import revision_of
from penstock.core.membership import Connect, Disconnect, Membership, State
from penstock.shapes import Card, Incarnation, ModelKey, Registration, Role
from tests.builders import registration
from tests.cards import card

REVISION = revision_of(card("any"))


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
    assert membership.ready(ModelKey("m", REVISION)) == []
    membership.up("d0", card("d0"))
    assert membership.ready(ModelKey("m", REVISION)) == []
    membership.loaded("d0")
    assert [card.instance_id for card in membership.ready(ModelKey("m", REVISION))] == ["d0"]
    assert membership.ready(ModelKey("other", REVISION)) == []


def test_discovery_going_blank_does_not_touch_what_is_connected() -> None:
    membership = Membership()
    ready(membership, "d0")
    assert membership.discovered({}) == []
    assert len(membership.ready(ModelKey("m", REVISION))) == 1
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
    assert membership.ready(ModelKey("m", REVISION)) == []


def test_a_new_epoch_replaces_the_old_incarnation() -> None:
    membership = Membership()
    ready(membership, "d0")
    again = registration("d0", epoch=2)
    assert membership.discovered({"d0": again}) == [Disconnect("d0"), Connect(again)]
    assert membership.ready(ModelKey("m", REVISION)) == []


def test_draining_takes_no_more() -> None:
    membership = Membership()
    ready(membership, "d0")
    membership.draining("d0")
    assert membership.ready(ModelKey("m", REVISION)) == []
    membership.loaded("d0")  # a late asset does not undo it
    assert membership.ready(ModelKey("m", REVISION)) == []


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
    assert membership.ready(ModelKey("m", REVISION)) == []
    assert membership.missing([Role.DECODE]) == [Role.DECODE]
    membership.advancing("d0")
    assert len(membership.ready(ModelKey("m", REVISION))) == 1


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


# --- revisions of a model --------------------------------------------------------------------------

OLD, NEW = 50, 60  # vocabulary sizes: what makes two revisions here


def join(
    membership: Membership, instance_id: str, vocabulary: int, *, epoch: int = 1, role: Role = Role.DECODE
) -> None:
    """Another worker comes, and is loaded."""
    found = {name: member.registration for name, member in membership.members.items()}
    membership.discovered({**found, instance_id: registration(instance_id, epoch, role=role)})
    membership.up(instance_id, versioned(vocabulary, instance_id, epoch, role))
    membership.loaded(instance_id)
    membership.elect()


def versioned(vocabulary: int, instance_id: str = "any", epoch: int = 1, role: Role = Role.DECODE) -> Card:
    return card(instance_id, role, epoch=epoch, vocab_size=vocabulary)


def states(membership: Membership) -> dict[str, State]:
    return {name: member.state for name, member in membership.members.items()}


def takers(membership: Membership, vocabulary: int) -> list[str]:
    return [
        each.instance_id for each in membership.ready(ModelKey("m", revision_of(versioned(vocabulary))))
    ]


def test_of_two_workers_with_different_revisions_the_older_one_serves() -> None:
    for order in (("a", "b"), ("b", "a")):
        membership = Membership()
        for name in order:
            join(membership, name, OLD if name == "a" else NEW, epoch=1 if name == "a" else 2)
        assert states(membership) == {"a": State.READY, "b": State.STANDBY}
        assert membership.served == {"m": revision_of(versioned(OLD))}


def test_new_requests_change_over_when_most_decode_workers_have_the_new_revision() -> None:
    membership = Membership()
    for number in range(3):
        join(membership, f"old{number}", OLD)
    join(membership, "new0", NEW, epoch=2)
    assert states(membership)["new0"] is State.STANDBY
    membership.draining("old0")
    assert membership.elect() == []
    join(membership, "new1", NEW, epoch=2)  # two each: the older revision goes on
    assert membership.served["m"] == revision_of(versioned(OLD))
    membership.down("old1")
    assert membership.elect() == ["m"]
    assert membership.served["m"] == revision_of(versioned(NEW))
    assert states(membership)["old2"] is State.STANDBY
    assert takers(membership, NEW) == ["new0", "new1"]
    assert takers(membership, OLD) == ["old2"]  # for what was tokenized for it


def test_prefill_workers_have_no_say_and_follow_the_decode_workers() -> None:
    membership = Membership()
    for number in range(3):
        join(membership, f"p{number}", NEW, role=Role.PREFILL)
    assert membership.served == {}
    join(membership, "d0", OLD)
    assert membership.served["m"] == revision_of(versioned(OLD))
    assert states(membership)["p0"] is State.STANDBY
    join(membership, "p3", OLD, role=Role.PREFILL)
    assert takers(membership, OLD) == ["d0", "p3"]


@pytest.mark.parametrize("leave", [Membership.draining, Membership.down, Membership.advancing])
def test_another_revision_takes_over_while_the_older_one_cannot_serve(leave: Callable[..., object]) -> None:
    membership = Membership()
    join(membership, "old", OLD)
    join(membership, "new", NEW, epoch=2)
    if leave is Membership.advancing:
        membership.stuck("old", "no step")
        assert membership.elect() == ["m"]
        assert states(membership) == {"old": State.QUARANTINED, "new": State.READY}
        leave(membership, "old")
        assert membership.elect() == ["m"]
        assert states(membership) == {"old": State.READY, "new": State.STANDBY}
    else:
        leave(membership, "old")
        assert membership.elect() == ["m"]
        assert states(membership)["new"] is State.READY


def test_workers_of_a_revision_may_return_while_one_could_still_have_it() -> None:
    membership = Membership()
    join(membership, "old", OLD)
    join(membership, "new", NEW, epoch=2)
    revision = revision_of(versioned(OLD))
    membership.down("old")  # its link; discovery still lists it
    assert membership.may_return(ModelKey("m", revision))
    found = {name: member.registration for name, member in membership.members.items()}
    membership.discovered({**found, "old": registration("old", epoch=3)})  # a new process, silent so far
    assert membership.may_return(ModelKey("m", revision))
    membership.up("old", versioned(NEW, "old", 3))
    assert not membership.may_return(ModelKey("m", revision))
    assert not membership.may_return(ModelKey("another", revision))


def test_a_draining_worker_does_not_return() -> None:
    membership = Membership()
    join(membership, "old", OLD)
    membership.draining("old")
    assert not membership.may_return(ModelKey("m", revision_of(versioned(OLD))))


def pod(instance_id: str, process: str = "uid/0", started_ms: int = 1000, port: int = 7000) -> Registration:
    """As Kubernetes knows an instance: neither its epoch nor its model."""
    address = f"10.0.0.7:{port}"
    return Registration(instance_id, 0, Role.DECODE, "", address, process=process, started_ms=started_ms)


def at(epoch: int) -> Card:
    return card("d0", epoch=epoch)


@pytest.mark.parametrize(
    ("epoch", "after", "replaced"),
    [
        pytest.param(1500, pod("d0"), False, id="nothing new"),
        pytest.param(1500, pod("d0", "uid/1", 9000), True, id="its container was started again"),
        pytest.param(9300, pod("d0", "uid/1", 9000), False, id="and that one is connected already"),
        pytest.param(9300, pod("d0", "uid/1", 9000, port=7001), True, id="it listens elsewhere"),
        pytest.param(9300, pod("d0", "uid/1", 0), True, id="nobody knows when it was started"),
        pytest.param(None, pod("d0", "uid/1", 9000), True, id="its link is down: connect at once"),
        pytest.param(None, pod("d0"), False, id="nothing new, and its link is down"),
    ],
)
def test_instances_of_which_discovery_knows_no_epoch(
    epoch: int | None, after: Registration, replaced: bool
) -> None:
    membership = Membership()
    assert membership.discovered({"d0": pod("d0")}) == [Connect(pod("d0"))]
    if epoch is not None:
        membership.up("d0", at(epoch))
    assert membership.discovered({"d0": after}) == ([Disconnect("d0"), Connect(after)] if replaced else [])
    assert membership.discovered({"d0": after}) == []


def test_a_model_that_nobody_knows_yet_may_be_any() -> None:
    membership = Membership()
    membership.discovered({"d0": pod("d0")})
    assert membership.may_return(ModelKey("m", REVISION))
    membership.up("d0", at(1500))
    assert membership.members["d0"].model == "m"
    assert not membership.may_return(ModelKey("another", REVISION))
    assert membership.incarnations() == {Incarnation("d0", 1500)}
    membership.down("d0")
    assert membership.members["d0"].model == "m"  # it probably comes back with the same
