"""What clients ask for, and what they must get: the answer is a function of the request alone."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from penstock.core.deadlines import Deadlines
from penstock.core.suspects import MAX_DEATHS
from penstock.engines.sim import SimRunner, SimSettings, load_sim
from penstock.errors import ModelReplaced, PenstockError, RequestRejected
from penstock.frontend.generation import MAX_BEGINNINGS
from penstock.router.router import Ticket
from penstock.shapes import Delta, FinishReason, Request, Sampling

FIRST_TOKEN_ID = 1
"""Token 0 is the EOS."""

NOT_SERVED = {"hung up", "lost with its frontend"}
"""Ends that say nothing about the workers."""

MOST_DOSES = MAX_DEATHS + Deadlines().max_attempts
"""Steps that one request may make fail."""


@dataclass(slots=True)
class SimulatedCall:
    """A client's call: one request for each seed."""

    at: float
    frontend: int  # a number; the frontends that there are then share them
    token_ids: list[int]
    samplings: list[Sampling]
    priority: int = 0
    cache_salt: str = ""
    hang_up_s: float | None = None  # after so long the client has had enough


def draw_calls(rng: random.Random, count: int, duration_s: float, vocab_size: int) -> list[SimulatedCall]:
    """Calls with shared prefixes, of several lengths and kinds, over `duration_s`."""
    prefixes = [
        draw_tokens(rng, rng.choice((8, 16, 40, 64, 120)), vocab_size) for _ in range(1 + count // 8)
    ]
    calls = []
    for _ in range(count):
        prefix = rng.choice(prefixes) if rng.random() < 0.8 else []
        prompt = prefix[: rng.randint(0, len(prefix))] if rng.random() < 0.2 else prefix
        prompt = prompt + draw_tokens(rng, rng.randint(1, 24), vocab_size)
        greedy = rng.random() < 0.3
        sampling = Sampling(
            max_tokens=rng.choice((1, 2, 8, 16, 24, 40, 100)),
            min_tokens=rng.choice((0, 0, 0, 4)),
            temperature=0.0 if greedy else 1.0,
            ignore_eos=rng.random() < 0.2,
            stop_token_ids=(rng.randrange(FIRST_TOKEN_ID, vocab_size),) if rng.random() < 0.1 else (),
            reproducible=rng.random() < 0.5,
        )
        choices = 1 if rng.random() < 0.85 else rng.randint(2, 3)
        calls.append(
            SimulatedCall(
                at=rng.uniform(0.0, duration_s),
                frontend=rng.randrange(1 << 16),
                token_ids=prompt,
                samplings=[replace(sampling, seed=rng.randrange(1 << 40)) for _ in range(choices)],
                priority=rng.choice((0, 0, 0, 0, -5, 5)),
                cache_salt=rng.choice(("", "", "", "salt")),
                hang_up_s=rng.expovariate(1.0) if rng.random() < 0.05 else None,
            )
        )
    return sorted(calls, key=lambda call: call.at)


def draw_tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """Of a text that has nothing in common with others."""
    return [rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(count)]


class Oracle:
    """Knows every answer."""

    def __init__(self, settings: SimSettings) -> None:
        runner = load_sim(settings, None).runner
        assert isinstance(runner, SimRunner)
        self._settings = settings
        self._runner = runner

    def answer(self, prompt_tokens: int, sampling: Sampling) -> tuple[list[int], FinishReason]:
        """The tokens, and why they end."""
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(self._settings.eos_token_ids)
        tokens: list[int] = []
        most = min(sampling.max_tokens, self._settings.max_model_len - prompt_tokens)
        while len(tokens) < most:
            token_id = self._runner.draw(len(tokens), sampling)
            tokens.append(token_id)
            if token_id in stops and len(tokens) >= sampling.min_tokens:
                return tokens, FinishReason.STOP
        return tokens, FinishReason.LENGTH


@dataclass(slots=True, eq=False)
class Asked:
    """A request on its way, with what its client got so far. `violate` is called when that is wrong."""

    request: Request
    frontend: str
    at: float
    note: Callable[..., None]
    violate: Callable[[str, str], None]
    now: Callable[[], float]
    wanted: list[int] = field(default_factory=list)  # of the model's version that it was submitted for
    reason: FinishReason = FinishReason.LENGTH
    beginnings: int = 1
    got: int = 0  # tokens
    ended: str = ""  # ok, an error's code, hung up, or lost with its frontend
    ended_at: float = 0.0
    error: PenstockError | None = None
    deltas: int = 0
    sends: int = 0  # attempts since its last token
    poison_steps: int = 0  # steps in a row that fail at whoever computes it
    doses: Counter[str] = field(default_factory=Counter)  # steps that it made fail, by the request's name
    defect: bool = False  # its frontend cannot handle what comes for it
    ticket: Ticket | None = None  # once it is submitted
    cancel: Callable[[], None] | None = None
    failures: Callable[[], int] = lambda: 0  # attempts that were lost so far
    refused: Callable[[str, str], None] = lambda request_id, why: None  # called when it is refused
    begin_again: Callable[[Asked], None] = lambda asked: None  # its model was replaced

    def on_delta(self, delta: Delta) -> None:
        """As Router.submit's."""
        name = self.request.request_id
        if self.ended:
            self.violate("one end", f"{name} gets {delta} after its end ({self.ended})")
        upto = self.got + len(delta.token_ids)
        if delta.token_ids != self.wanted[self.got : upto]:
            wanted = self.wanted[self.got : upto]
            self.violate("tokens", f"{name} gets {delta.token_ids} instead of {wanted} at {self.got}")
        self.got = upto
        self.sends = 0 if delta.token_ids else self.sends
        if self.poison_steps:
            self.violate("poison is stopped", f"{name} gets {delta}")
        if delta.cached_tokens is not None:
            if self.deltas:
                self.violate("usage", f"{name} hears of cached tokens in delta {self.deltas}")
            if not 0 <= delta.cached_tokens <= len(self.request.token_ids):
                self.violate("usage", f"{name} has {delta.cached_tokens} cached tokens")
        self.deltas += 1
        if delta.finish_reason is not None:
            if delta.finish_reason is not self.reason or self.got != len(self.wanted):
                self.violate(
                    "tokens",
                    f"{name} ends with {delta.finish_reason} after {self.got} tokens "
                    f"instead of {self.reason} after {len(self.wanted)}",
                )
            self.end("ok")

    def on_error(self, error: PenstockError) -> None:
        """As Router.submit's."""
        if self.ended:
            self.violate("one end", f"{self.request.request_id} fails after its end: {error}")
        if isinstance(error, ModelReplaced) and not self.got and self.beginnings < MAX_BEGINNINGS:
            self.begin_again(self)
            return
        self.error = error
        code = error.code if isinstance(error, RequestRejected) else None
        if code == "overloaded":
            self.refused(self.request.request_id, str(error))
        self.end(code or type(error).__name__)

    def poisons(self, request_id: str) -> int:
        """It is computed under this name. Returns how many steps in a row fail because of it."""
        self.doses[request_id] += 1
        if self.doses[request_id] > MOST_DOSES:
            self.violate("poison is stopped", f"{request_id} fails {self.doses[request_id]} engines")
        return self.poison_steps

    def hang_up(self) -> None:
        """Its client has had enough."""
        if self.cancel is not None:
            self.cancel()

    def end(self, how: str) -> None:
        self.note("end", self.request.request_id, how, self.got)
        self.ended = how
        self.ended_at = self.now()
