"""The shapes that travel between modules and over the link.

Words: a *request* is a client's call; a *choice* is one of its `n` answers; an *attempt* is one try at a
choice on one instance. Token counts are in tokens, times in seconds (`_s`) or milliseconds (`_ms`),
block counts in KV blocks of `block_size` tokens. Fields are only ever added, with defaults, so that a
frontend and a worker of neighbouring versions understand each other.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

import msgspec

JsonObject = dict[str, Any]  # decoded, and not checked yet


class Role(StrEnum):
    """What a worker does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"

    @property
    def decodes(self) -> bool:
        """Whether a request may end here (prefill workers only hand over)."""
        return self is not Role.PREFILL


class FinishReason(StrEnum):
    """Why an attempt ended."""

    STOP = "stop"  # EOS, a stop token id, or (in the frontend) a stop string
    LENGTH = "length"  # max_tokens or the model's context length
    PREFILLED = "prefilled"  # a prefill attempt has its first token and its handoff
    CANCELLED = "cancelled"  # the frontend cancelled it
    ERROR = "error"  # the engine could not go on with this attempt; see `Output.error`
    REJECTED = "rejected"  # no instance could serve it: what it asks for is wrong; see `Output.error`


class StructuredOutput(msgspec.Struct, frozen=True):
    """What the whole output must look like. The kinds and their specs are vLLM's `structured_outputs`."""

    kind: Literal["json", "json_object", "regex", "choice", "grammar", "structural_tag"]
    spec: str = ""
    """json, structural_tag: a JSON text; choice: a JSON list of strings; regex and grammar: as they are;
    json_object: empty."""
    reasoning_ended: bool | None = None
    """Whether the prompt leaves the model beyond its reasoning, to which none of this applies; None: the
    engine looks for itself."""
    template_variables: JsonObject = {}
    """What the chat template was told beside the messages: some models reason or not by that."""


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. The same shape and defaults for every engine.

    `seed` is always set by the frontend for sampled requests. An engine that continues another attempt's
    output draws as if it had drawn all of it by itself, if it can do so at little cost or the request is
    `reproducible`; else it may draw anew from there, which is as good a sample.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0  # over output tokens, as in OpenAI's API
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output tokens, as in CTRL (arXiv 1909.05858)
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()  # beside the model's EOS
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the chosen token and the k most likely
    structured: StructuredOutput | None = None  # only for engines whose card says `structured_output`
    reproducible: bool = False  # the client gave the seed: the same tokens whatever happens on the way


class TokenLogprob(msgspec.Struct, array_like=True):
    """One output token's log-probability and the alternatives' (natural logarithm)."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """A part of one call of a tool: its beginning (`id` and `name` are set), or more of its arguments."""

    index: int  # among the answer's calls
    id: str | None = None
    name: str | None = None
    arguments: str | None = None  # JSON, in the making


class Parsed(msgspec.Struct):
    """A part of an answer, or all of it, taken apart."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] = []


class Handoff(msgspec.Struct):
    """The right to pull one prompt's KV from a prefill instance, once, before it expires.

    A decode worker recomputes instead of pulling whenever any of these does not match what it sees.
    """

    handoff_id: str  # the prefill attempt's id
    instance_id: str  # who holds the blocks
    epoch: int  # that instance's incarnation
    num_tokens: int  # KV exists for token_ids[:num_tokens]
    block_size: int
    last_hash: int  # sequence hash of the last block, whole or partial (core/hashing.py)
    layout: str  # fingerprint of weights and KV geometry; both sides must be equal
    ttl_s: float  # what was left of its life when this message was sent
    transport: str  # which KvTransfer can read it
    address: str  # where that transport listens
    params: bytes = b""  # the transport's own, opaque to everyone else


class Attempt(msgspec.Struct):
    """One try at a choice on one instance.

    `token_ids[:prompt_len]` is the client's prompt; what follows was generated by earlier attempts and
    counts as output (penalties, seeds, min_tokens and max_tokens all continue).
    """

    attempt_id: str
    request_id: str
    token_ids: list[int]
    prompt_len: int
    sampling: Sampling
    prefill_only: bool = False  # stop after one token, keep the KV, answer with a Handoff
    handoff: Handoff | None = None
    cache_salt: str = ""
    priority: int = 0  # lower goes first
    suspect_tokens: int = 0  # it may be what killed workers, until it has given so many; 0: it is not


class Output(msgspec.Struct, array_like=True):
    """What one step gave to one attempt."""

    attempt_id: str
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None  # set exactly once, on the attempt's last output
    cached_tokens: int | None = None  # on the first output: prompt tokens whose KV was not computed here
    logprobs: list[TokenLogprob] | None = None  # one per token when asked for
    handoff: Handoff | None = None  # with PREFILLED
    error: str | None = None  # with ERROR and REJECTED
    transferred_blocks: int | None = None  # on the first output: blocks pulled from a prefill worker


class Rates(msgspec.Struct, array_like=True, frozen=True):
    """What a worker has measured of itself. A step takes about
    `step_ms + prefill_token_ms * prefill tokens + decode_request_ms * decoding requests`;
    a pull takes about `transfer_ms + transfer_block_ms * blocks`."""

    step_ms: float = 1.0
    prefill_token_ms: float = 0.02
    decode_request_ms: float = 0.02
    transfer_ms: float = 2.0
    transfer_block_ms: float = 0.05


class Load(msgspec.Struct, array_like=True, frozen=True):
    """A worker's load after its latest step, whoever sent the work."""

    running: int = 0  # requests that hold blocks
    waiting: int = 0  # admitted, but holding no blocks yet
    prefill_tokens: int = 0  # prompt tokens still to compute, running and waiting together
    used_blocks: int = 0  # referenced by requests or held for handoffs
    total_blocks: int = 0
    context_tokens: int = 0  # tokens with KV, over running requests
    held_handoffs: int = 0
    steps: int = 0  # turns that the engine took: that it grows while there is work is its sign of life
    rates: Rates = Rates()
    submitted: int = 0  # attempts submitted to the engine so far that this load includes
    suspects: int = 0  # attempts that may be what killed other workers (core/suspects.py)
    output_tokens: float = 0.0  # of an output that ended here, on average; 0: none has


class EngineStep(msgspec.Struct):
    """Everything one engine step has to say: tokens of all attempts, KV events and load."""

    outputs: list[Output] = []
    stored: list[int] = []  # sequence hashes of blocks now in the cache
    removed: list[int] = []  # sequence hashes evicted; within one step, removed before stored
    cleared: bool = False  # the whole cache was dropped, before `stored`
    load: Load = Load()


class EngineCard(msgspec.Struct):
    """What an engine is, once started."""

    engine: str  # name and version, e.g. "reference 0.1.0"
    model: str  # default served name
    block_size: int
    total_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int] = []
    layout: str = ""  # see Handoff.layout
    transport: str = ""  # name of its KvTransfer; empty when it cannot hand over
    sampling_defaults: dict[str, float] = {}  # from generation_config.json: temperature, top_p, ...
    assets: dict[str, bytes] = {}  # tokenizer.json, tokenizer_config.json, ... as files
    structured_output: bool = False  # whether it takes Sampling.structured
    tool_parser: str = ""  # name of vLLM's parser for this model's tool calls; empty: none
    reasoning_parser: str = ""  # the same for its reasoning
    max_batch_tokens: int = 0  # most tokens of one step; 0: unknown
    max_running: int = 0  # requests in one step; 0: not known
    weights: str = ""  # fingerprint of the model's weights; empty: the engine has none


class Card(msgspec.Struct):
    """What a worker tells each frontend of itself on connecting."""

    instance_id: str
    epoch: int  # milliseconds since 1970 at the worker's start; grows with every incarnation
    role: Role
    model: str  # served name; also seeds the block hashes
    engine: str
    block_size: int
    total_blocks: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int] = []
    layout: str = ""
    transport: str = ""
    sampling_defaults: dict[str, float] = {}
    assets: dict[str, str] = {}  # file name -> sha256 hex of its content, fetched with AssetRequest
    structured_output: bool = False  # this and all that follow as in EngineCard
    tool_parser: str = ""
    reasoning_parser: str = ""
    max_batch_tokens: int = 0
    max_running: int = 0
    weights: str = ""


class Registration(msgspec.Struct, frozen=True):
    """What discovery holds of one instance: where it listens, nothing else that could go stale."""

    instance_id: str
    epoch: int
    role: Role
    model: str
    address: str  # host:port of its link
    pid: int = 0  # on this machine, for the file directory's liveness check; 0: unknown
    host: str = ""
    tls: bool = False

    @property
    def incarnation(self) -> str:
        """This process, and none before or after it, in words."""
        return f"{self.instance_id}@{self.epoch}"


class Request(msgspec.Struct):
    """One choice of a client's call, checked and tokenized: what the router serves."""

    request_id: str
    model: str
    revision: str  # of the model, for which it was tokenized (core/catalog.py)
    token_ids: list[int]
    sampling: Sampling
    cache_salt: str = ""
    priority: int = 0  # lower goes first
    tenant: str = ""  # the name of the API key that it came with; empty where none are needed
    call_id: str = ""  # shared by the choices of a call, which are admitted together
    age_s: float = 0.0  # since the frontend had read its call: deadlines count from then


class Delta(msgspec.Struct):
    """New output of a request, free of attempts: what the frontend turns into text."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None  # STOP or LENGTH, on the last delta
    cached_tokens: int | None = None  # on the first delta


class ModelView(msgspec.Struct):
    """One revision of a served model, as the frontend needs it to render, check and tokenize."""

    name: str
    revision: str  # changes when anything else here does, or the weights (core/catalog.py)
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    sampling_defaults: dict[str, float]
    assets: dict[str, bytes]  # file name -> content
    structured_output: bool = False  # this and the next two as in EngineCard
    tool_parser: str = ""
    reasoning_parser: str = ""


class InstanceView(msgspec.Struct):
    """One instance as the router sees it, for /health."""

    instance_id: str
    role: Role
    model: str
    state: str  # core/membership.py: State
    address: str
    load: Load
    reason: str = ""  # why it takes no attempts, where that is not plain from the state
