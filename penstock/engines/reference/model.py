"""The decoder in float32: Qwen3 (arXiv 2505.09388) and Llama (arXiv 2302.13971, 2407.21783).

All tokens of a batch, prefill chunks and decodes alike, go through each matrix as one stack of tiles;
attention runs window by window over the paged pool. A token's result depends on its own sequence only,
bit for bit: see `tiles` and `flat_batch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from penstock.engines.batch import BatchRow, Sequence, scored_tokens
from penstock.engines.reference.flat_batch import Cut, FlatBatch, QueryTile, Window, flatten
from penstock.engines.reference.kv import Integers, KvPool
from penstock.engines.reference.model_config import ModelConfig, Rope
from penstock.engines.reference.tiles import Floats, padded_rows, tiles
from penstock.engines.reference.weights import LayerWeights, Weights

_SCORED_AT_ONCE = 32  # tokens of a prompt: logits of a large vocabulary take a megabyte for each

Score = Callable[[Sequence, range, Floats], None]
"""Called with a sequence, positions of its tokens, and the logits of each, shape (positions, vocab), which
are valid during the call."""


class Model:
    """Weights and pool, and the one computation over both.

    Args:
        max_model_len: positions that rotary tables are made for.
    """

    def __init__(self, config: ModelConfig, weights: Weights, pool: KvPool, max_model_len: int) -> None:
        self.config = config
        self.pool = pool
        self._weights = weights
        self._turns = rotations(config.rope, config.head_dim, max_model_len)
        self._cut = Cut(pool.block_size, config.kv_heads * config.head_dim, config.heads)
        self._causal = np.triu(np.full((self._cut.span, self._cut.span), -np.inf, np.float32), 1)
        self._scratch = Scratch()

    def logits(self, batch: list[BatchRow], score: Score | None = None) -> Floats:
        """Compute the KV of all rows, and the logits of those that sample.

        Args:
            score: gets the logits of the prompt's tokens whose log-probabilities are wanted.

        Returns:
            Shape (rows that sample, vocab), in the batch's order; valid until the next call.
        """
        flat = flatten(batch, self._cut)
        if flat.fresh_blocks:
            self.pool.clear(flat.fresh_blocks)
        # A strongly negative gate overflows exp() to infinity, which then gives the right zero.
        with np.errstate(over="ignore"):
            hidden = self._decode(flat)
        if score is not None:
            for row, first in flat.scored:
                self._score(row, first, hidden, score)
        return self._head(hidden, flat.last)

    def _score(self, row: BatchRow, first: int, hidden: Floats, score: Score) -> None:
        """`first` is the index of the row's first token in the batch: its logits are the next token's."""
        positions = scored_tokens(row)
        for at in range(0, len(positions), _SCORED_AT_ONCE):
            piece = positions[at : at + _SCORED_AT_ONCE]
            places = range(first + at, first + at + len(piece))
            score(row.sequence, piece, self._head(hidden, list(places)))

    def _decode(self, flat: FlatBatch) -> Floats:
        """The residual stream after all layers, shape (padded tokens, hidden)."""
        hidden = self._scratch.floats("hidden", len(flat.token_ids), self.config.hidden_size)
        np.take(self._weights.embeddings, flat.token_ids, axis=0, out=hidden, mode="clip")
        turns = self._turns[flat.positions][:, None]
        slots = self.pool.slots(flat.block_ids, flat.positions[: flat.count])
        for number, layer in enumerate(self._weights.layers):
            hidden += self._attention(number, layer, hidden, flat, turns, slots)
            hidden += self._mlp(layer, hidden)
        return hidden

    def _attention(
        self,
        number: int,
        layer: LayerWeights,
        hidden: Floats,
        flat: FlatBatch,
        turns: NDArray[np.complex64],
        slots: Integers,
    ) -> Floats:
        """Attention's share of the residual stream. Writes the tokens' keys and values first, because
        tokens of one prefill read each other's.

        Args:
            number: the layer's, in the pool.
            turns: rotary turns, shape (padded tokens, 1, head_dim / 2).
            slots: see `KvPool.slots`.
        """
        config, rows, count = self.config, len(hidden), flat.count
        turned = config.heads + config.kv_heads
        normalised = self._normalised(hidden)
        qkv = self._scratch.floats("qkv", rows, layer.qkv.padded_columns)
        np.matmul(tiles(normalised), layer.qkv.panels, out=layer.qkv.split(qkv))
        heads = qkv[:, : turned * config.head_dim].reshape(rows, turned, config.head_dim)
        if layer.qk_gain is not None:
            heads /= root_of_squares(heads, config.norm_eps)
            heads *= layer.qk_gain
        pairs = heads.view(np.complex64)
        pairs *= turns
        key_values = qkv[:count, config.heads * config.head_dim : layer.qkv.columns]
        self.pool.write(number, slots, key_values.reshape(count, 2, -1))
        queries = heads[:, : config.heads].reshape(rows, config.kv_heads, config.group, config.head_dim)
        attended = self._scratch.floats("attended", rows, config.heads * config.head_dim)
        attended[count:] = 0.0
        for window in flat.windows:
            self._attend(number, window, queries, attended.reshape(queries.shape))
        out = self._scratch.floats("out", rows, layer.output.padded_columns)
        np.matmul(tiles(attended), layer.output.panels, out=layer.output.split(out))
        return out[:, : layer.output.columns]

    def _attend(self, number: int, window: Window, queries: Floats, attended: Floats) -> None:
        """Gather a window's keys and values, and let its queries read them."""
        config, span = self.config, self._cut.span
        sequences, blocks = window.block_ids.shape
        shape = (sequences * blocks, self.pool.block_size * config.kv_heads * config.head_dim)
        keys = self._scratch.floats("keys", *shape)
        values = self._scratch.floats("values", *shape)
        self.pool.gather(number, window.block_ids.reshape(-1), keys, values)
        keys = keys.reshape(sequences, -1, span, config.kv_heads, config.head_dim).transpose(0, 3, 1, 4, 2)
        values = values.reshape(sequences, -1, config.kv_heads, config.head_dim).transpose(0, 2, 1, 3)
        for tile in window.tiles:
            self._softmax_values(tile, keys, values, queries, attended)

    def _softmax_values(
        self, tile: QueryTile, keys: Floats, values: Floats, queries: Floats, attended: Floats
    ) -> None:
        """softmax(queries x keys) x values for one tile.

        Scores are computed span by span: some kernels are several times slower on long rows of keys.

        Args:
            keys: shape (sequences, kv_heads, spans, head_dim, span); 1 sequence is shared by all queries.
            values: shape (sequences, kv_heads, keys, head_dim).
            queries, attended: shape (tokens, kv_heads, group, head_dim); the tile's part is written.
        """
        rows, width, span = slice(tile.first, tile.stop), tile.width, self._cut.span
        shape = (tile.stop - tile.first, self.config.kv_heads, self.config.group, width // span, span)
        by_span = self._scratch.floats("scores", *shape)
        np.matmul(queries[rows, :, None], keys[:, :, : width // span], out=by_span.swapaxes(2, 3))
        by_span[..., -1, :] += self._causal[tile.offsets][:, None, None]
        scores = by_span.reshape(*shape[:3], width)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        sums = scores.sum(axis=-1, keepdims=True)
        out = attended[rows]
        np.matmul(scores, values[:, :, :width], out=out)
        out /= sums

    def _mlp(self, layer: LayerWeights, hidden: Floats) -> Floats:
        """down(silu(gate) * up), with silu(x) = x / (1 + exp(-x))."""
        rows, inner = len(hidden), self.config.intermediate_size
        normalised = self._normalised(hidden)
        gate_up = self._scratch.floats("gate_up", rows, layer.gate_up.padded_columns)
        np.matmul(tiles(normalised), layer.gate_up.panels, out=layer.gate_up.split(gate_up))
        gate, up = gate_up[:, :inner], gate_up[:, inner : 2 * inner]
        activated = self._scratch.floats("activated", rows, inner)
        np.negative(gate, out=activated)
        np.exp(activated, out=activated)
        activated += 1.0
        np.divide(gate, activated, out=activated)
        activated *= up
        out = self._scratch.floats("out", rows, layer.down.padded_columns)
        np.matmul(tiles(activated), layer.down.panels, out=layer.down.split(out))
        return out[:, : layer.down.columns]

    def _normalised(self, hidden: Floats) -> Floats:
        out = self._scratch.floats("normalised", *hidden.shape)
        return np.divide(hidden, root_of_squares(hidden, self.config.norm_eps), out=out)

    def _head(self, hidden: Floats, last: list[int]) -> Floats:
        head = self._weights.head
        rows = padded_rows(len(last))
        chosen = self._scratch.floats("chosen", rows, self.config.hidden_size)
        chosen[: len(last)] = hidden[last]
        chosen[len(last) :] = 1.0
        chosen /= root_of_squares(chosen, self.config.norm_eps)
        logits = self._scratch.floats("logits", rows, head.padded_columns)
        np.matmul(tiles(chosen), head.panels, out=head.split(logits))
        return logits[: len(last), : head.columns]


class Scratch:
    """Named buffers that grow to the largest batch seen, so that a step allocates next to nothing."""

    def __init__(self) -> None:
        self._buffers: dict[str, Floats] = {}

    def floats(self, name: str, *shape: int) -> Floats:
        """A contiguous array of this shape; what it holds is undefined."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name] = np.empty(size, np.float32)
        return buffer[:size].reshape(shape)


def root_of_squares(rows: Floats, eps: float) -> Floats:
    """sqrt(sum(x^2) + d * eps) over the last axis, shape (..., 1): RMSNorm's divisor, but for the root of
    the mean's 1/d, which is part of the weights."""
    squares: Floats = np.vecdot(rows, rows)
    squares += np.float32(rows.shape[-1] * eps)
    np.sqrt(squares, out=squares)
    return squares[..., None]


def rotations(rope: Rope, head_dim: int, positions: int) -> NDArray[np.complex64]:
    """cos + i sin of each position's angles, shape (positions, head_dim / 2) (RoPE, arXiv 2104.09864).

    Angles are rounded to float32 as transformers does, since that is what models were trained with.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = _scaled(rope, 1.0 / np.power(rope.theta, exponents.astype(np.float64)))
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)
    turns: NDArray[np.complex64] = np.exp(1j * angles.astype(np.float64)).astype(np.complex64)
    return turns


def _scaled(rope: Rope, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Context extension. llama3 is Llama 3.1's published rule: wavelengths longer than the original
    context's share by `low_freq_factor` are stretched by `factor`, those shorter than its share by
    `high_freq_factor` are kept, and between them the two are blended."""
    if rope.kind == "default":
        return frequencies
    stretched = frequencies / rope.factor
    if rope.kind == "linear":
        return stretched
    turns = rope.original_positions * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(blend, 0.0, 1.0)
    return (1 - kept) * stretched + kept * frequencies
