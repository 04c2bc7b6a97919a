"""A prefill and a decode engine under random work and random faults, in any order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.shapes import FinishReason
from tests.cards import changed
from tests.engines.rig import CARD, Rig, continued


class TwoEngines(RuleBasedStateMachine):
    """A prefill and a decode engine with small pools, random work and random faults. The rigs check
    every token's KV as it is attended to; here, that every attempt ends once and with the right text."""

    def __init__(self) -> None:
        super().__init__()
        small = changed(CARD, total_blocks=10, max_model_len=34)
        self.prefill = Rig("p", card=small, max_running=3, handoff_ttl_s=5.0)
        self.decode = Rig("d", card=small, max_running=4, pull_timeout_s=2.0)
        self.prompts: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"a{self.count}"

    @rule(
        prompt=st.lists(st.integers(2, 3), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        priority=st.integers(0, 1),
        where=st.sampled_from(["prefill", "decode"]),
        prefill_only=st.booleans(),
    )
    def submit(
        self, prompt: list[int], max_tokens: int, priority: int, where: str, prefill_only: bool
    ) -> None:
        prefill_only = prefill_only and where == "prefill"
        name = self.name()
        self.prompts[name] = prompt
        rig = self.prefill if where == "prefill" else self.decode
        rig.submit(
            name,
            prompt,
            max_tokens=max_tokens,
            priority=priority,
            prefill_only=prefill_only and rig is self.prefill,
        )

    @rule()
    def hand_over(self) -> None:
        """Every handoff that was given goes to the decode engine."""
        for name, outputs in list(self.prefill.outputs.items()):
            last = outputs[-1]
            if last.handoff is not None and name + "+" not in self.prompts:
                tokens = self.prompts[name] + self.prefill.text(name)
                self.prompts[name + "+"] = tokens
                self.decode.submit(name + "+", tokens, prompt_len=len(tokens) - 1, handoff=last.handoff)

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.prefill.step()
            self.decode.step()

    @precondition(lambda self: self.decode.pulls)
    @rule(error=st.sampled_from([None, None, "cut off"]))
    def finish_pull(self, error: str | None) -> None:
        self.decode.finish_pull(self.prefill, error)

    @rule(seconds=st.sampled_from([0.5, 3.5, 6.0]))
    def wait(self, seconds: float) -> None:
        self.prefill.now += seconds
        self.decode.now += seconds

    @precondition(lambda self: self.prompts)
    @rule(choice=st.data())
    def cancel(self, choice: st.DataObject) -> None:
        name = choice.draw(st.sampled_from(sorted(self.prompts)))
        self.cancelled.add(name)
        self.prefill.scheduler.cancel(name, self.prefill.now)
        self.decode.scheduler.cancel(name, self.decode.now)

    @precondition(lambda self: self.prompts)
    @rule(choice=st.data())
    def release(self, choice: st.DataObject) -> None:
        name = choice.draw(st.sampled_from(sorted(self.prompts)))
        self.prefill.scheduler.release(name, self.prefill.now)

    @invariant()
    def right_text(self) -> None:
        for rig in (self.prefill, self.decode):
            for name in rig.outputs:
                text = rig.text(name)
                assert text == continued(self.prompts[name], len(text))

    def teardown(self) -> None:
        for _ in range(1000):
            if self.prefill.scheduler.idle and self.decode.scheduler.idle:
                break
            self.step(1)
            if self.decode.pulls:
                self.decode.finish_pull(self.prefill)
            self.wait(0.1)
        self.step(1)  # reports what was cancelled last
        for name in self.prompts:
            ends = [
                output
                for rig in (self.prefill, self.decode)
                for output in rig.outputs[name]
                if output.finish_reason
            ]
            assert len(ends) == 1, name
            if name not in self.cancelled:
                assert ends[0].finish_reason in (FinishReason.LENGTH, FinishReason.PREFILLED)
        for rig in (self.prefill, self.decode):
            assert rig.scheduler.idle
            load = rig.scheduler.load()
            assert (load.used_blocks, load.prefill_tokens, load.held_handoffs) == (0, 0, 0)
            assert rig.cached == set(rig.scheduler.pool.cached_hashes())


TestTwoEngines = TwoEngines.TestCase
TestTwoEngines.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
