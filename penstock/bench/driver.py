"""Sends conversations to a server, and measures the answers.

In a closed loop, each of `concurrency` users starts a conversation when the last one has ended, so the load
adapts to the server. In an open loop, conversations start at given times, even if the server is slow.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec

from penstock.bench.answers import StreamedAnswer, TokenCounts
from penstock.bench.conversations import Arrival, PlannedConversation, PlannedTurn
from penstock.bench.http_client import HttpClient, RequestFailed
from penstock.bench.measurements import BenchReport, Measurements, RequestOutcome

LAG_PERIOD_S = 0.05
"""Interval between measurements of the event loop's lateness."""


class Limits(msgspec.Struct, frozen=True):
    """The limits of a run."""

    duration_s: float | None = None
    """Nothing is sent after this time; None: until all requests are sent."""

    requests: int | None = None
    """Requests (turns) to send; None: until the duration or the trace ends."""

    drain_s: float = 60.0
    """How long to wait for answers after `duration_s`. Requests without an answer then count as
    unfinished."""

    request_timeout_s: float = 600.0
    """Timeout from sending a request to the end of its answer, in seconds."""

    max_in_flight: int = 4096
    """Most conversations at once in an open loop. Further ones count as failures of the client."""


class Payload(msgspec.Struct, frozen=True):
    """The fields that are the same in every request."""

    model: str
    temperature: float = 0.0
    ignore_eos: bool = False  # an extension of vLLM: answers have exactly the requested length

    def encode(self, messages: list[dict[str, str]], output_tokens: int, *, stream: bool = True) -> bytes:
        body: dict[str, object] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": output_tokens,
            "temperature": self.temperature,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return msgspec.json.encode(body)


class Driver:
    """One run. Call `closed` or `open` once; then `measurements` are complete."""

    def __init__(
        self, client: HttpClient, payload: Payload, limits: Limits, measurements: Measurements
    ) -> None:
        self.measurements = measurements
        self.in_flight = 0
        self.sent = 0
        self.started_at = self.ended_at = time.perf_counter()
        self._cpu_s = time.process_time()
        self._client = client
        self._payload = payload
        self._limits = limits

    def report(self) -> BenchReport:
        """The report so far. Rates are from the start to the latest answer."""
        elapsed_s = time.perf_counter() - self.started_at
        cpu_share = (time.process_time() - self._cpu_s) / max(elapsed_s, 1e-9)
        return self.measurements.report(self.ended_at - self.started_at, cpu_share)

    async def closed(self, conversations: Iterator[PlannedConversation], concurrency: int) -> None:
        """Run `concurrency` users until a limit is reached."""
        async with self._run() as users:
            for _ in range(concurrency):
                users.create_task(self._user(conversations))

    async def open(self, arrivals: Iterator[Arrival]) -> None:
        """Start conversations at their times until a limit is reached."""
        async with self._run() as tasks:
            for arrival in arrivals:
                if self._limits.duration_s is not None and arrival.at_s >= self._limits.duration_s:
                    break
                # Also if it is late, so that conversations that run already can go on.
                await asyncio.sleep(max(0.0, self.started_at + arrival.at_s - time.perf_counter()))
                if not self._may_send():
                    break
                if self.in_flight >= self._limits.max_in_flight:
                    self.sent += 1
                    self.measurements.add(RequestOutcome("too many in flight"))
                    continue
                tasks.create_task(self._converse(arrival.conversation))

    @asynccontextmanager
    async def _run(self) -> AsyncIterator[asyncio.TaskGroup]:
        """A group for the tasks of a run, which are cancelled when its time is over. Measures the lag
        meanwhile."""
        self.started_at = self.ended_at = time.perf_counter()
        self._cpu_s = time.process_time()
        limit_s = self._limits.duration_s
        if limit_s is not None:
            limit_s += self._limits.drain_s
        watching = asyncio.create_task(self._watch_lag())
        try:
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as tasks:
                yield tasks
        except TimeoutError:
            pass  # cancelled requests have been counted as unfinished
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _watch_lag(self) -> None:
        while True:
            due_at = time.perf_counter() + LAG_PERIOD_S
            await asyncio.sleep(LAG_PERIOD_S)
            self.measurements.lag.add(max(0.0, time.perf_counter() - due_at))

    def _may_send(self) -> bool:
        limits = self._limits
        if limits.requests is not None and self.sent >= limits.requests:
            return False
        return limits.duration_s is None or time.perf_counter() < self.started_at + limits.duration_s

    async def _user(self, conversations: Iterator[PlannedConversation]) -> None:
        while self._may_send():
            conversation = next(conversations, None)
            if conversation is None:
                return
            await self._converse(conversation)

    async def _converse(self, conversation: PlannedConversation) -> None:
        messages = [{"role": "system", "content": conversation.system}] if conversation.system else []
        for turn in conversation.turns:
            if not self._may_send():
                return
            self.sent += 1
            self.in_flight += 1
            messages.append({"role": "user", "content": turn.text})
            keep_text = turn is not conversation.turns[-1]
            try:
                answer = await self._ask(messages, turn, keep_text=keep_text)
            finally:
                self.in_flight -= 1
            if answer is None:
                return  # the next turn would need this answer
            messages.append({"role": "assistant", "content": answer.text})

    async def _ask(
        self, messages: list[dict[str, str]], turn: PlannedTurn, *, keep_text: bool
    ) -> StreamedAnswer | None:
        """Send one request and record its outcome. Returns None if it failed."""
        body = self._payload.encode(messages, turn.output_tokens)
        answer = StreamedAnswer(self.measurements.gaps.add, keep_text=keep_text)
        sent_at = time.perf_counter()
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                await self._client.request("POST", "/v1/chat/completions", body, answer)
        except TimeoutError:
            answer.failure = ("timeout", f"no complete answer within {self._limits.request_timeout_s:g} s")
        except RequestFailed as error:
            answer.failure = answer.failure or (error.kind, str(error))
        except asyncio.CancelledError:
            self.measurements.add(RequestOutcome("unfinished"))
            raise
        self.ended_at = time.perf_counter()
        if not answer.complete:
            kind, message = answer.failure or ("truncated", "the stream ended without a finish_reason")
            self.measurements.add(RequestOutcome(kind), message)
            return None
        self.measurements.add(_outcome(answer, sent_at, self.ended_at))
        return answer


def _outcome(answer: StreamedAnswer, sent_at: float, ended_at: float) -> RequestOutcome:
    usage = answer.usage or TokenCounts(completion_tokens=answer.chunks)
    first_at = answer.first_at if answer.first_at is not None else ended_at  # an answer without text
    after_first = usage.completion_tokens - 1
    return RequestOutcome(
        ttft_s=first_at - sent_at,
        itl_s=(answer.last_at - first_at) / after_first if answer.chunks > 1 and after_first > 0 else 0.0,
        e2e_s=ended_at - sent_at,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        output_tokens=usage.completion_tokens,
    )
