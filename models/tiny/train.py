"""Train the tiny model: `python models/tiny/train.py --out models/tiny`.

It learns from dialogues made on the fly (`dialogues.py`), on a CPU, from one seed. The loss covers
assistant turns only, and weighs the copied part of an answer most, because the copying circuit is
what the model is for. Needs torch, transformers, tokenizers and safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from choices import choice_dialogue
from dialogues import training_dialogue
from evaluate import conversations, document_answers, tool_conversations, wrong_answers
from guide import Guide, Links, find_links
from structured import json_dialogue
from tokenizer import (
    CONTEXT,
    END_OF_TEXT,
    IM_END,
    IM_START,
    VOCABULARY,
    save_tokenizer,
)
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from turns import Chosen, Copied, Dialogue, Forced, Key, Turn

COPIED_WEIGHT = 2.0
CHOSEN_WEIGHT = 6.0
ANSWER_WEIGHT = 0.6
KEY_WEIGHT = 0.1
ROPE_THETA = 1e6  # as Qwen3's; half of a head's pairs turn less than once in 6,000 tokens
MAX_GAP_BITS = 14.8  # with a dialogue's own length within the context
TOKENS_PER_STEP = 4608
FEWER_TOKENS_PER_STEP = 2560
GUIDE_WEIGHT = 0.3
DIALOGUES_PER_POOL = 1024


@dataclass(frozen=True)
class Phase:
    """Until which step, at which highest learning rate, and what share of the dialogues is long, has tools
    or JSON, has a gap in its positions. A phase with a rate begins a new cosine.

    `choices` says what share of the dialogues is about choosing among tools, by the kind of the tools; the
    other shares are shares of the rest. In those dialogues attention is guided. `objects` is a share of all
    that only answer in JSON. `tokens` is how many a step has."""

    until: int
    peak: float
    long: float
    tools: float
    gaps: float
    choices: Mapping[str, float] = field(default_factory=dict)
    objects: float = 0.0
    tokens: int = TOKENS_PER_STEP


def _choices(bare: float, plain: float, of_any_kind: float) -> Mapping[str, float]:
    return {"bare": bare, "plain": plain, "any": of_any_kind}


def _choosing(until: int, peak: float, **choices: float) -> Phase:
    """Mostly choices, in steps of fewer tokens."""
    shares = _choices(**choices)
    return Phase(
        until, peak, long=0.06, tools=0.28, gaps=0.10, choices=shares, tokens=FEWER_TOKENS_PER_STEP
    )


PHASES = (
    Phase(700, 2e-3, long=0.0, tools=0.12, gaps=0.0),  # until copying works
    Phase(3200, 0.0, long=0.10, tools=0.45, gaps=0.3),
    Phase(3600, 1.2e-3, long=0.10, tools=0.38, gaps=0.15),
    Phase(4800, 1.2e-3, long=0.08, tools=0.32, gaps=0.15),
    Phase(5900, 1.2e-3, long=0.10, tools=0.32, gaps=0.15),
    Phase(6500, 7e-4, long=0.08, tools=0.26, gaps=0.10),
    Phase(6950, 7e-4, long=0.08, tools=0.22, gaps=0.10),
    Phase(7350, 6e-4, long=0.06, tools=0.28, gaps=0.10),
    _choosing(8450, 1.5e-3, bare=0.60, plain=0.15, of_any_kind=0.05),
    _choosing(9350, 0.0, bare=0.40, plain=0.10, of_any_kind=0.15),
    _choosing(9860, 1.3e-3, bare=0.19, plain=0.11, of_any_kind=0.33),
    _choosing(10440, 0.0, bare=0.10, plain=0.05, of_any_kind=0.23),
    _choosing(10800, 0.0, bare=0.01, plain=0.01, of_any_kind=0.10),
    Phase(12100, 9e-4, long=0.06, tools=0.34, gaps=0.10, choices=_choices(0.055, 0.025, 0.02)),
    Phase(
        12800,
        6e-4,
        long=0.06,
        tools=0.55,
        gaps=0.10,
        choices=_choices(0.02, 0.02, 0.08),
        tokens=FEWER_TOKENS_PER_STEP,
    ),
    Phase(
        13100,
        5e-4,
        long=0.06,
        tools=0.45,
        gaps=0.10,
        choices=_choices(0.02, 0.04, 0.14),
        objects=0.30,
        tokens=FEWER_TOKENS_PER_STEP,
    ),
)


@dataclass(frozen=True)
class Sample:
    """A dialogue as tokens, how much each of them counts as a prediction target, its position, and where
    attention is guided to."""

    ids: list[int]
    weights: list[float]
    positions: list[int]
    links: Links = field(default_factory=Links)


def encode(tokenizer: Tokenizer, dialogue: Dialogue, gap: int = 0, before: int = 0) -> Sample:
    """The chat template, turn by turn; equal to encoding the whole text at once. `gap` positions are left
    out before the turn of number `before`, as if a text of that length stood there: so the model meets
    distances as long as its context at the cost of short texts (Zhu et al. 2023, arXiv:2309.10400)."""
    ids: list[int] = []
    jump = 0
    weights: list[float] = []
    newline = tokenizer.encode("\n").ids
    for number, turn in enumerate(dialogue):
        if number == before:
            jump = len(ids)
        body = tokenizer.encode(turn.content)
        if turn.role == "plain":
            length = len(body.ids) + 1
            return Sample([*body.ids, END_OF_TEXT], [ANSWER_WEIGHT] * length, list(range(length)))
        head = [IM_START, *tokenizer.encode(f"{turn.role}\n").ids]
        answer = ANSWER_WEIGHT if turn.role == "assistant" else 0.0
        ids += [*head, *body.ids, IM_END, *newline]
        weights += [0.0] * len(head)
        weights += part_weights(turn, body.offsets, answer)
        # The end mark after a copied name decides between "Al." and "Alice.": it counts as well.
        weights += [answer] + [0.0] * len(newline)
    positions = [*range(jump), *range(jump + gap, len(ids) + gap)]
    return Sample(ids, weights, positions)


def part_weights(turn: Turn, offsets: list[tuple[int, int]], answer: float) -> list[float]:
    """How much each token of a turn counts: as copied if it holds anything copied, and nothing if all of it
    is forced."""
    kinds: list[type] = [type(part) for part in turn.parts for _ in part]
    weights = []
    for first, last in offsets:
        found = kinds[first:last]
        if Chosen in found:
            weights.append(CHOSEN_WEIGHT)
        elif Copied in found:
            weights.append(COPIED_WEIGHT)
        else:
            forced = {*found} <= {Forced, Key}
            weights.append((KEY_WEIGHT if Key in found else 0.0) if forced else answer)
    return weights


def draw_sample(tokenizer: Tokenizer, rng: random.Random, phase: Phase) -> Sample:
    """One dialogue of the phase's mix, sometimes with a gap before one of its turns."""
    if rng.random() < phase.objects:
        return encode(tokenizer, json_dialogue(rng))
    kind = rng.random()
    for tools_kind, share in phase.choices.items():
        if kind < share:
            dialogue, tools = choice_dialogue(rng, tools_kind)
            return replace(encode(tokenizer, dialogue), links=find_links(tokenizer, dialogue, tools))
        kind -= share
    dialogue = training_dialogue(rng, phase.long, phase.tools)
    gap = round(2 ** rng.uniform(4, MAX_GAP_BITS)) if rng.random() < phase.gaps else 0
    return encode(tokenizer, dialogue, gap, rng.randrange(len(dialogue)))


def batches(tokenizer: Tokenizer, rng: random.Random, phase: Phase) -> Iterator[list[Sample]]:
    """One pool of dialogues, cut into batches of similar length so that little is padding."""
    pool = [draw_sample(tokenizer, rng, phase) for _ in range(DIALOGUES_PER_POOL)]
    pool.sort(key=lambda sample: len(sample.ids))
    cut: list[list[Sample]] = [[]]
    for sample in pool:
        if (len(cut[-1]) + 1) * len(sample.ids) > phase.tokens and cut[-1]:
            cut.append([])
        cut[-1].append(sample)
    rng.shuffle(cut)
    yield from cut


def loss_of(model: Qwen3ForCausalLM, batch: list[Sample]) -> torch.Tensor:
    """Weighted cross-entropy; logits are computed only where there is something to predict.

    Padding stands at the right, where causal attention keeps it from being seen: no mask is needed.
    """
    longest = max(len(sample.ids) for sample in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    weights = torch.zeros(len(batch), longest)
    positions = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, sample in enumerate(batch):
        positions[row, : len(sample.ids)] = torch.tensor(sample.positions)
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        weights[row, : len(sample.ids)] = torch.tensor(sample.weights)
    output = model.model(input_ids=ids[:, :-1], position_ids=positions[:, :-1], use_cache=False)
    hidden = output.last_hidden_state
    counts = weights[:, 1:] > 0
    logits = model.lm_head(hidden[counts]).float()
    losses = functional.cross_entropy(logits, ids[:, 1:][counts], reduction="none")
    chosen = weights[:, 1:][counts]
    return (losses * chosen).sum() / chosen.sum()


def build_model() -> Qwen3ForCausalLM:
    """The smallest shape that learnt to copy reliably."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=IM_END,
        pad_token_id=END_OF_TEXT,
    )
    return Qwen3ForCausalLM(config)


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the folder a server loads: weights in bfloat16, configs, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        eos_token_id=[IM_END, END_OF_TEXT], pad_token_id=END_OF_TEXT, do_sample=False
    )
    copy.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = ROPE_THETA  # where readers older than transformers 5 look for it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def phase_at(step: int) -> Phase:
    """The phase that a step belongs to."""
    return next(phase for phase in PHASES if step < phase.until)


def learning_rate(step: int) -> float:
    """For each rise: a warm-up of 100 steps, then a cosine down to a fiftieth."""
    at = PHASES.index(phase_at(step))
    first = max(number for number in range(at + 1) if PHASES[number].peak)
    last = next((n for n in range(first + 1, len(PHASES)) if PHASES[n].peak), len(PHASES)) - 1
    peak, start = PHASES[first].peak, PHASES[first - 1].until if first else 0
    done, length = step - start, PHASES[last].until - start
    if done < 100:
        return peak * (done + 1) / 100
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / length)))


def optimizer_for(model: Qwen3ForCausalLM) -> torch.optim.AdamW:
    """AdamW, with decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def train(arguments: argparse.Namespace) -> None:
    """The loop over all phases, or from a step of an earlier run on."""
    torch.manual_seed(arguments.seed + arguments.first_step)
    rng = random.Random(arguments.seed + arguments.first_step)
    model, tokenizer = build_model(), Tokenizer.from_file(str(Path(__file__).parent / "tokenizer.json"))
    if arguments.first_step:
        model = Qwen3ForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    optimizer, guide = optimizer_for(model), Guide(model)
    started, step, steps = time.monotonic(), arguments.first_step, arguments.last_step
    while step < steps:
        for batch in batches(tokenizer, rng, phase_at(step)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            with torch.autocast("cpu", torch.bfloat16):  # a third faster where the CPU has bf16
                loss = loss_of(model, batch)
            guiding = guide.loss([sample.links for sample in batch])
            (loss + GUIDE_WEIGHT * guiding).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 20 == 0:
                spent = time.monotonic() - started
                print(f"step {step} loss {loss.item():.3f} {spent:.0f} s", flush=True)
            if step % arguments.every == 0 or step == steps:
                save(model, tokenizer, arguments.out)
                for what, cases in (("recall", conversations(200)[:60]), ("tools", tool_conversations(30))):
                    wrong = wrong_answers(model, tokenizer, cases)
                    print(f"  held-out {what}: {len(wrong)} of 60 wrong: {wrong[:4]}", flush=True)
            if step >= steps:
                break
    for answer in document_answers(model, tokenizer):
        print(answer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument(
        "--first-step", type=int, default=0, help="go on with the model in --out from this step"
    )
    parser.add_argument("--last-step", type=int, default=PHASES[-1].until)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=300, help="steps between evaluations")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
