"""A call's endings, one by one, without a server."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from penstock.errors import PenstockError, Rejection, RequestRejected
from penstock.frontend.call import ClientCall, LoopTurn
from penstock.frontend.choice import Choice
from penstock.metrics import Metrics
from penstock.shapes import Delta, FinishReason, ModelKey, Request, Sampling

LOST = RequestRejected("lost", kind=Rejection.UNAVAILABLE, code="no_worker")


class Echo:
    """Says `x` for every token."""

    def push(self, token_ids):
        return "x" * len(token_ids)

    def flush(self):
        return ""


@dataclass
class Submitted:
    on_delta: Callable[[Delta], None]
    on_error: Callable[[PenstockError], None]
    cancelled: int = 0
    complete: bool | None = None

    attempts = ()
    explain = None  # nobody asks here

    def cancel(self, *, complete=False):
        self.cancelled += 1
        self.complete = complete


@dataclass
class Router:
    tickets: list[Submitted] = field(default_factory=list)
    refuse_from: int = 99

    def submit(self, request, on_delta, on_error):
        if len(self.tickets) >= self.refuse_from:
            raise LOST
        self.tickets.append(Submitted(on_delta, on_error))
        return self.tickets[-1]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def begin(metrics):
    def start(choices=1, *, streaming=True, max_unsent_chars=100, on_overflow=lambda: None, router=None):
        router = router or Router()
        clock = Clock()
        sampling = Sampling(max_tokens=9)
        requests = [Request(str(index), ModelKey("m", "r"), [1], sampling) for index in range(choices)]
        call = ClientCall(
            [Choice(index, request, Echo()) for index, request in enumerate(requests)],
            metrics=metrics.frontend.of("m"),
            streaming=streaming,
            max_unsent_chars=max_unsent_chars,
            on_overflow=on_overflow,
            turn=LoopTurn(),
            now=clock,
        )
        call.start(router)
        return call, router.tickets, clock

    return start


def queued(metrics):
    return 'penstock_queued_requests{model="m"} 1.0' in metrics.render().decode()


async def test_one_wake_up_for_all_choices_of_a_step(begin):
    call, tickets, _ = begin(3)
    waiting = asyncio.ensure_future(call.changed())
    await asyncio.sleep(0)
    for ticket in (tickets[0], tickets[2]):
        ticket.on_delta(Delta([5]))
    tickets[0].on_delta(Delta([6]))
    changed = await waiting
    assert [answer.index for answer in changed] == [0, 2]
    assert changed[0].take()[0] == "xx"


async def test_what_came_before_the_wait_is_not_waited_for(begin):
    call, tickets, _ = begin()
    tickets[0].on_delta(Delta([5]))
    assert len(await call.changed()) == 1
    tickets[0].on_delta(Delta([5], finish_reason=FinishReason.STOP))
    assert len(await call.changed()) == 1
    assert call.ended
    assert await call.changed() == []


async def test_a_reader_that_keeps_up_is_not_waited_for(begin):
    call, tickets, _ = begin(2)
    pushed = []

    def push(changed):
        pushed.append([answer.take()[0] for answer in changed])
        return True

    call.push_with(push)
    waiting = asyncio.ensure_future(call.changed())
    await asyncio.sleep(0)
    for ticket in (*tickets, tickets[0]):  # two steps, read in one turn of the event loop
        ticket.on_delta(Delta([5]))
    assert pushed == []
    await asyncio.sleep(0)
    assert pushed == [["xx", "x"]]
    tickets[1].on_delta(Delta([5]))
    await asyncio.sleep(0)
    assert pushed == [["xx", "x"], ["x"]]
    assert not waiting.done()
    for ticket in tickets:
        ticket.on_delta(Delta([5], finish_reason=FinishReason.STOP))
    assert [answer.take()[0] for answer in await waiting] == ["x", "x"]
    assert len(pushed) == 2


async def test_a_reader_that_falls_behind_is_waited_for(begin):
    call, tickets, _ = begin()
    pushed = []
    call.push_with(pushed.append)  # whose None says that nothing was written
    waiting = asyncio.ensure_future(call.changed())
    await asyncio.sleep(0)
    tickets[0].on_delta(Delta([5]))
    tickets[0].on_delta(Delta([5]))
    assert await waiting == []  # `push` keeps what it took
    assert len(pushed) == 1
    tickets[0].on_delta(Delta([5]))
    await asyncio.sleep(0)
    assert len(pushed) == 1  # nobody waits: whoever writes is still at it
    assert len(await call.changed()) == 1


async def test_a_mistake_in_writing_is_raised_where_it_is_waited_for(begin):
    call, tickets, _ = begin()
    call.push_with(lambda changed: changed[1])
    waiting = asyncio.ensure_future(call.changed())
    await asyncio.sleep(0)
    tickets[0].on_delta(Delta([5]))
    with pytest.raises(IndexError):
        await waiting


async def test_a_whole_answer_wakes_once(begin):
    call, tickets, _ = begin(2, streaming=False)
    waiting = asyncio.ensure_future(call.changed())
    for ticket in tickets:
        ticket.on_delta(Delta([5, 6]))
        await asyncio.sleep(0)
        assert not waiting.done()
        ticket.on_delta(Delta([], finish_reason=FinishReason.LENGTH))
    assert len(await waiting) == 2
    assert [ticket.cancelled for ticket in tickets] == [0, 0]


async def test_a_failure_ends_it_once_and_cancels_the_rest(begin, metrics):
    call, tickets, _ = begin(2)
    assert queued(metrics)
    tickets[0].on_error(LOST)
    tickets[1].on_error(RequestRejected("second", kind=Rejection.INTERNAL))
    assert call.error is LOST
    assert tickets[1].cancelled == 1
    assert not queued(metrics)
    tickets[1].on_delta(Delta([5]))  # too late
    assert call.choices[1].output_tokens == 0


async def test_a_client_that_hangs_up_after_the_end_is_not_gone(begin):
    call, tickets, _ = begin()
    tickets[0].on_delta(Delta([5], finish_reason=FinishReason.STOP))
    call.hang_up()
    call.fail(LOST)
    assert not call.gone
    assert call.error is None


async def test_a_client_that_hangs_up_leaves_nothing_running(begin, metrics):
    call, tickets, _ = begin(2)
    tickets[0].on_delta(Delta([5], finish_reason=FinishReason.STOP))
    call.hang_up()
    assert call.gone
    assert [ticket.cancelled for ticket in tickets] == [0, 1]
    call.close()
    assert [ticket.cancelled for ticket in tickets] == [0, 1]
    assert not queued(metrics)


async def test_a_choice_that_is_refused_leaves_the_others_to_close(begin, metrics):
    router = Router(refuse_from=1)
    with pytest.raises(RequestRejected):
        begin(2, router=router)
    assert len(router.tickets) == 1


async def test_too_much_unread_ends_the_call(begin):
    overflows = []
    call, tickets, _ = begin(max_unsent_chars=3, on_overflow=lambda: overflows.append(True))
    tickets[0].on_delta(Delta([1, 2, 3]))
    assert overflows == []
    tickets[0].on_delta(Delta([4]))
    assert overflows == [True]
    assert call.gone
    assert tickets[0].cancelled == 1
    tickets[0].on_delta(Delta([5]))
    assert overflows == [True]


async def test_latencies_are_counted_per_token(begin, metrics):
    call, tickets, clock = begin()
    for now, tokens in ((1.0, 1), (1.5, 1), (3.5, 4), (9.0, 0)):
        clock.now = now
        tickets[0].on_delta(Delta(list(range(tokens))))
    assert call.first_token_at == 1.0
    series = metrics.frontend.of("m").inter_token_latency
    assert sum(series.counts) == 5
    assert series.total == pytest.approx(0.5 + 4 * 0.5)
    assert not queued(metrics)
