"""Load: what a frontend may assume each worker has to do."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import msgspec

from penstock.shapes import Load

GAIN = 0.02
"""Weight of the latest attempt in the mean numbers of tokens that they bring."""


class _Sent(msgspec.Struct):
    """An attempt on its way: the worker's load does not include it yet."""

    seq: int
    uncached_tokens: int
    context_tokens: int


@dataclass(slots=True)
class _Account:
    """One instance's load, as reported and as it must be by now."""

    load: Load = field(default_factory=Load)
    on_the_way: deque[_Sent] = field(default_factory=deque)  # at most what one link has in flight
    uncached_tokens: int = 0  # sums over on_the_way and booked
    context_tokens: int = 0
    booked: dict[str, int] = field(default_factory=dict)  # request id -> context tokens
    sent: int = 0  # attempts
    prompt_tokens: float = 0.0  # uncached, of an attempt: the mean of the last 50 or so
    output_tokens: float = 0.0  # expected, likewise


@dataclass(frozen=True, slots=True)
class AccountStatistics:
    """What a frontend adds to the load that one worker reported, and what it has sent there."""

    on_the_way: int  # attempts that were sent and that the reported load does not include yet
    booked: int  # requests that will decode there once their prefill is done
    uncached_tokens: int  # prompt tokens of the attempts on the way that the worker has to compute
    context_tokens: int  # tokens of all these that the worker will have KV for
    sent: int  # attempts that were sent since the link came up


class LoadBook:
    """Every instance's load as one frontend may assume it: what the worker last reported, plus what
    this frontend sent that the report does not include, plus what it has promised to send (a request
    whose prompt is still on a prefill worker). Without the last two, a burst between two reports would
    all go to the same worker.

    Instances appear with their first use and stay until `forget`.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}

    def statistics(self) -> dict[str, AccountStatistics]:
        """Counts as of now, by instance."""
        return {
            instance_id: AccountStatistics(
                len(account.on_the_way),
                len(account.booked),
                account.uncached_tokens,
                account.context_tokens,
                account.sent,
            )
            for instance_id, account in self._accounts.items()
        }

    def sent(
        self,
        instance_id: str,
        seq: int,
        uncached_tokens: int,
        context_tokens: int,
        output_tokens: float = 0.0,
    ) -> None:
        """A Generate left. `seq` as in wire/messages.py; tokens of its prompt that are to be computed
        there, all that it will have KV for, and its output as expected."""
        account = self._account(instance_id)
        account.on_the_way.append(_Sent(seq, uncached_tokens, context_tokens))
        account.uncached_tokens += uncached_tokens
        account.context_tokens += context_tokens
        account.sent += 1
        gain = max(GAIN, 1 / account.sent)
        account.prompt_tokens += gain * (uncached_tokens - account.prompt_tokens)
        account.output_tokens += gain * (output_tokens - account.output_tokens)

    def mean_tokens(self, instance_id: str) -> tuple[float, float]:
        """How many prompt tokens an attempt gives it to compute, and how many output tokens, on average. Of
        outputs it knows best itself, once some have ended there; until then, as expected of those sent."""
        account = self._accounts.get(instance_id)
        if account is None:
            return 0.0, 0.0
        return account.prompt_tokens, account.load.output_tokens or account.output_tokens

    def reported(self, instance_id: str, seen: int, load: Load) -> None:
        """The worker's load arrived; it includes every Generate up to `seen`."""
        account = self._account(instance_id)
        account.load = load
        on_the_way = account.on_the_way
        while on_the_way and on_the_way[0].seq <= seen:
            arrived = on_the_way.popleft()
            account.uncached_tokens -= arrived.uncached_tokens
            account.context_tokens -= arrived.context_tokens

    def book(self, instance_id: str, request_id: str, context_tokens: int) -> None:
        """A request will decode there once its prefill is done. Booking again replaces the booking."""
        self.release(instance_id, request_id)
        account = self._account(instance_id)
        account.booked[request_id] = context_tokens
        account.context_tokens += context_tokens

    def release(self, instance_id: str, request_id: str) -> None:
        """The booking was used (its Generate left) or is no longer wanted. Without one: ignored."""
        account = self._accounts.get(instance_id)
        if account is not None:
            account.context_tokens -= account.booked.pop(request_id, 0)

    def forget(self, instance_id: str) -> None:
        """The link is down: nothing is known of this instance any more."""
        self._accounts.pop(instance_id, None)

    def reported_load(self, instance_id: str) -> Load:
        """What the worker itself said last."""
        account = self._accounts.get(instance_id)
        return account.load if account is not None else Load()

    def requests(self, instance_id: str) -> int:
        """How many attempts it has: those that it last reported, and those on their way to it."""
        account = self._accounts.get(instance_id)
        return account.load.running + account.load.waiting + len(account.on_the_way) if account else 0

    def view(self, instance_id: str) -> Load:
        """The load to decide with. What is on its way or booked counts as waiting."""
        account = self._accounts.get(instance_id)
        if account is None:
            return Load()
        load = account.load
        extra = len(account.on_the_way) + len(account.booked)
        if not extra:
            return load
        return msgspec.structs.replace(
            load,
            waiting=load.waiting + extra,
            prefill_tokens=load.prefill_tokens + account.uncached_tokens,
            context_tokens=load.context_tokens + account.context_tokens,
        )

    def _account(self, instance_id: str) -> _Account:
        account = self._accounts.get(instance_id)
        if account is None:
            account = self._accounts[instance_id] = _Account()
        return account
