"""Two attention heads are told where to look while the model learns to choose among tools.

To choose takes two steps of attention, neither of which is of use alone. A loss on the answer alone did not
teach them. So one head gets a loss of its own for finding what a tool, or a question, is
about, and a head of the next layer one for finding the letter to write next, in the tool which is about the
same. The model that comes out is an ordinary one: only its training knows of this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer
from tools import Tool, description_first, dumps
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb
from turns import Chosen, Dialogue, Turn

SUBJECT_HEAD = (1, 5)
COPYING_HEAD = (2, 0)
"""Layer and head. They are those that looked there most when this training began."""
NAME = None
"""A tool's own name, where the others are those of its parameters."""


@dataclass(frozen=True)
class Link:
    """A token, and the tokens from `first` to before `end` that it has to attend to."""

    token: int
    first: int
    end: int


@dataclass
class Links:
    """What the two heads have to attend to in a dialogue."""

    subjects: list[Link] = field(default_factory=list)
    copies: list[Link] = field(default_factory=list)


Span = tuple[int, int]


def _tokens(offsets: Sequence[Span], first: int, end: int) -> Span:
    """The tokens of some characters."""
    touched = [number for number, (start, stop) in enumerate(offsets) if stop > first and start < end]
    return touched[0], touched[-1] + 1


def _subject(text: str, tool: Tool) -> Span | None:
    """The characters that say what a text is about, if they name this tool's topic."""
    for topic in sorted(tool.topics, key=lambda topic: (-len(topic), topic)):
        at = text.lower().find(topic)
        if at >= 0:
            return at, at + len(topic)
    return None


def _shifted(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _links_to(subject: Span, copied: Span) -> Iterable[Link]:
    """From the token before each letter, and from the letters, to what they are about."""
    return (Link(token, *subject) for token in range(copied[0] - 1, copied[1]))


class _Finder:
    """Goes through a dialogue turn by turn."""

    def __init__(self, tools: list[Tool]) -> None:
        self.links = Links()
        self._tools = tools
        self._places: dict[tuple[str, str | None], Span] = {}
        self._subject: Span | None = None

    def system(self, text: str, offsets: Sequence[Span], start: int) -> None:
        """The tools' definitions: where each name stands, and what it is about."""
        for tool in self._tools:
            line = dumps(description_first(tool.definition))
            at = text.index(line)
            places = {NAME: line.index(f'"name": "{tool.name}"') + len('"name": "')}
            properties = line.find('"properties": ')
            for parameter in tool.parameters:
                places[parameter.name] = line.index(f'"{parameter.name}": {{', properties) + 1
            for key, place in places.items():
                end = place + len(key or tool.name)
                self._places[tool.name, key] = _shifted(_tokens(offsets, at + place, at + end), start)
            described = tool.definition["function"].get("description", "")
            subject = _subject(described, tool)
            if subject:
                begin = at + line.index(f'"description": {dumps(described)}') + len('"description": "')
                span = _shifted(_tokens(offsets, *_shifted(subject, begin)), start)
                for key in places:
                    self.links.subjects += _links_to(span, self._places[tool.name, key])

    def user(self, text: str, offsets: Sequence[Span], start: int) -> None:
        """A question: what it is about."""
        found = [span for tool in self._tools if (span := _subject(text, tool))]
        self._subject = _shifted(_tokens(offsets, *found[-1]), start) if found else None

    def assistant(self, turn: Turn, offsets: Sequence[Span], start: int) -> None:
        """Calls: what their names are about, and where they are copied from."""
        at, before, tool, key = 0, "", "", NAME
        for part in turn.parts:
            if isinstance(part, Chosen) and part:
                written = _shifted(_tokens(offsets, at, at + len(part)), start)
                if self._subject:
                    self.links.subjects += _links_to(self._subject, written)
                named = before.endswith('"name": "')
                tool, key = (str(part), NAME) if named else (tool, str(part))
                copied = self._places.get((tool, key), (0, 0))
                if copied[1] - copied[0] == written[1] - written[0]:
                    pairs = zip(range(*written), range(*copied), strict=True)
                    self.links.copies += [Link(to - 1, source, source + 1) for to, source in pairs]
            at, before = at + len(part), part


def find_links(tokenizer: Tokenizer, dialogue: Dialogue, tools: list[Tool]) -> Links:
    """The links of a dialogue that offers these tools, as the chat template writes it, without gaps."""
    finder = _Finder(tools)
    at = 0
    newline = len(tokenizer.encode("\n").ids)
    for turn in dialogue:
        at += 1 + len(tokenizer.encode(f"{turn.role}\n").ids)  # the mark of the turn's begin, and its role
        body = tokenizer.encode(turn.content)
        if turn.role == "system":
            finder.system(turn.content, body.offsets, at)
        elif turn.role == "user":
            finder.user(turn.content, body.offsets, at)
        else:
            finder.assistant(turn, body.offsets, at)
        at += len(body.ids) + 1 + newline
    return finder.links


class Guide:
    """The losses of the two heads. It keeps what their layers read in the model's last forward pass."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self._layers = model.model.layers
        self._read: dict[int, dict[str, Any]] = {}
        for layer, _ in (SUBJECT_HEAD, COPYING_HEAD):
            attention = self._layers[layer].self_attn
            attention.register_forward_pre_hook(self._keep(layer), with_kwargs=True)

    def _keep(self, layer: int) -> Any:
        def keep(_module: object, _arguments: object, named: dict[str, Any]) -> None:
            self._read[layer] = named

        return keep

    def loss(self, batch: list[Links]) -> torch.Tensor:
        """How far the two heads look elsewhere: for each the mean negative log of the attention that is in
        the right place."""
        total = torch.zeros(())
        for head, links in (
            (SUBJECT_HEAD, [each.subjects for each in batch]),
            (COPYING_HEAD, [each.copies for each in batch]),
        ):
            if any(links):
                total = total + self._misses(*head, links)
        return total

    def _misses(self, layer: int, head: int, batch: list[list[Link]]) -> torch.Tensor:
        attention = self._layers[layer].self_attn
        hidden = self._read[layer]["hidden_states"].float()
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        queries = attention.q_norm(attention.q_proj(hidden).view(shape)).transpose(1, 2)
        keys = attention.k_norm(attention.k_proj(hidden).view(shape)).transpose(1, 2)
        cosine, sine = self._read[layer]["position_embeddings"]
        queries, keys = apply_rotary_pos_emb(queries, keys, cosine.float(), sine.float())
        found = []
        places = torch.arange(hidden.shape[1])
        for row, links in enumerate(batch):
            here = [link for link in links if link.token < len(places)]
            if not here:
                continue
            tokens, firsts, ends = (
                torch.tensor([getattr(link, name) for link in here])[:, None]
                for name in ("token", "first", "end")
            )
            chosen = queries[row, head, tokens[:, 0]] @ keys[row, head // attention.num_key_value_groups].T
            scores = (chosen * attention.scaling).masked_fill(places > tokens, -torch.inf)
            right = scores.masked_fill((places < firsts) | (places >= ends), -torch.inf)
            found.append(scores.logsumexp(-1) - right.logsumexp(-1))
        return torch.cat(found).mean()
