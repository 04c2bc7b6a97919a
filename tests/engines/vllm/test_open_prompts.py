"""What is left of prompts that vLLM has not answered, by the blocks that its events name."""

from __future__ import annotations

from penstock.core.hashing import root_hash, sequence_hashes
from penstock.engines.vllm.open_prompts import OpenPrompts
from penstock.shapes import EngineCard, ModelCard

CARD = EngineCard("vllm", ModelCard("m", max_model_len=512, vocab_size=1000), block_size=4, total_blocks=20)
PROMPT = list(range(10, 28))  # four whole blocks and a half


def hashes(token_ids: list[int], salt: str = "") -> list[int]:
    return sequence_hashes(token_ids, CARD.block_size, root_hash("m", salt))


def test_cached_blocks_of_a_prompt_are_not_left_and_those_of_another_salt_are() -> None:
    prompts = OpenPrompts(CARD, set(hashes(PROMPT)[:3]))
    assert prompts.begin("a", PROMPT, "", scored=False) == 6
    assert prompts.work() == (6, 6 * (12 + 3))
    assert prompts.begin("b", PROMPT, "salt", scored=False) == 18


def test_the_last_token_of_a_prompt_that_is_cached_whole_is_left() -> None:
    prompts = OpenPrompts(CARD, set(hashes(PROMPT)))
    assert prompts.begin("a", PROMPT[:16], "", scored=False) == 4  # its last block is computed again
    assert prompts.cached_tokens(PROMPT[:16], "") == 12
    assert prompts.begin("b", PROMPT[:1], "", scored=False) == 1


def test_computed_chunks_and_evicted_hits_change_what_is_left_until_the_first_token() -> None:
    cached = set(hashes(PROMPT)[:2])
    prompts = OpenPrompts(CARD, cached)
    prompts.begin("a", PROMPT, "", scored=False)
    assert prompts.work().tokens == 10
    cached.remove(hashes(PROMPT)[1])
    assert prompts.work().tokens == 14
    cached.update(hashes(PROMPT)[1:4])
    assert prompts.work().tokens == 2
    prompts.end("a")
    prompts.end("a")
    assert prompts.work() == (0, 0)


def test_a_prompt_that_is_to_be_scored_is_left_whole_whatever_is_cached() -> None:
    prompts = OpenPrompts(CARD, set(hashes(PROMPT)))
    assert prompts.begin("a", PROMPT, "", scored=True) == 18
    assert prompts.work() == (18, 18 * 9)
