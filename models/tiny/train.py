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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from dialogues import Dialogue, training_dialogue
from evaluate import document_answers, held_out_recall
from tokenizer import (
    CONTEXT,
    END_OF_TEXT,
    IM_END,
    IM_START,
    VOCABULARY,
    save_tokenizer,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

COPIED_WEIGHT = 2.0
ANSWER_WEIGHT = 0.6
TOKENS_PER_STEP = 4608
DIALOGUES_PER_POOL = 1024


@dataclass(frozen=True)
class Sample:
    """A dialogue as tokens, and how much each of them counts as a prediction target."""

    ids: list[int]
    weights: list[float]


def encode(tokenizer: Tokenizer, dialogue: Dialogue) -> Sample:
    """The chat template, turn by turn; equal to encoding the whole text at once."""
    ids: list[int] = []
    weights: list[float] = []
    newline = tokenizer.encode("\n").ids
    for turn in dialogue:
        body = tokenizer.encode(turn.content)
        if turn.role == "plain":
            return Sample([*body.ids, END_OF_TEXT], [ANSWER_WEIGHT] * (len(body.ids) + 1))
        head = [IM_START, *tokenizer.encode(f"{turn.role}\n").ids]
        answer = ANSWER_WEIGHT if turn.role == "assistant" else 0.0
        start = turn.content.rindex(turn.copied) if turn.copied else -1
        end = start + len(turn.copied)
        ids += [*head, *body.ids, IM_END, *newline]
        weights += [0.0] * len(head)
        weights += [
            COPIED_WEIGHT if turn.copied and last > start and first < end else answer
            for first, last in body.offsets
        ]
        # The end mark after a copied name decides between "Al." and "Alice.": it counts as well.
        weights += [answer] + [0.0] * len(newline)
    return Sample(ids, weights)


def batches(tokenizer: Tokenizer, rng: random.Random, long_share: float) -> Iterator[list[Sample]]:
    """One pool of dialogues, cut into batches of similar length so that little is padding."""
    dialogues = [training_dialogue(rng, long_share) for _ in range(DIALOGUES_PER_POOL)]
    pool = [encode(tokenizer, dialogue) for dialogue in dialogues]
    pool.sort(key=lambda sample: len(sample.ids))
    cut: list[list[Sample]] = [[]]
    for sample in pool:
        if (len(cut[-1]) + 1) * len(sample.ids) > TOKENS_PER_STEP and cut[-1]:
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
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        weights[row, : len(sample.ids)] = torch.tensor(sample.weights)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
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
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
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
    config["rope_theta"] = 10000.0  # where readers older than transformers 5 look for it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_tokenizer(tokenizer, folder)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, then a cosine down to a fiftieth."""
    if step < 100:
        return peak * (step + 1) / 100
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def optimizer_for(model: Qwen3ForCausalLM) -> torch.optim.AdamW:
    """AdamW, with decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def train(arguments: argparse.Namespace) -> None:
    """The loop: short dialogues first, until copying works, then longer ones as well."""
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    tokenizer = train_tokenizer()
    model = build_model()
    optimizer = optimizer_for(model)
    started, step = time.monotonic(), 0
    while step < arguments.steps:
        long_share = 0.0 if step < arguments.short_steps else 0.12
        for batch in batches(tokenizer, rng, long_share):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arguments.steps, arguments.peak)
            with torch.autocast("cpu", torch.bfloat16):  # a third faster where the CPU has bf16
                loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 20 == 0:
                spent = time.monotonic() - started
                print(f"step {step} loss {loss.item():.3f} {spent:.0f} s", flush=True)
            if step % arguments.every == 0 or step == arguments.steps:
                save(model, tokenizer, arguments.out)
                right, wrong = held_out_recall(model, tokenizer, count=60)
                print(f"  held-out recall {right}/60; wrong: {wrong[:4]}", flush=True)
            if step >= arguments.steps:
                break
    for answer in document_answers(model, tokenizer):
        print(answer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--short-steps", type=int, default=700, help="steps without long dialogues")
    parser.add_argument("--peak", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=300, help="steps between evaluations")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
