"""The shapes that travel between modules and over the link.

Words: a *request* is a client's call; a *choice* is one of its `n` answers; an *attempt* is one try at a
choice on one instance. Token counts are in tokens, times in seconds (`_s`) or milliseconds (`_ms`),
block counts in KV blocks of `block_size` tokens. Fields are only ever added, with defaults, so that a
frontend and a worker of neighbouring versions understand each other.

Types carry their limits. msgspec checks those when it decodes what another process sent, and only then:
objects that are made here are not checked. A range also refuses NaN and infinities.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

MAX_PROMPT_TOKENS = 16 * 1024 * 1024
"""Longest prompt with its output: a frame of the link has no room for more."""

MAX_ASSETS = 32  # most files that come with a model; five are known (engines/assets.py)

MAX_POOL_BLOCKS = 16 * 1024 * 1024
"""Largest KV pool of one worker: far above any (a million blocks are 16 million tokens)."""

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
"""Of tokens, blocks or requests that there are at one time."""

Total = Annotated[int, Meta(ge=0, le=2**53)]
"""What is counted from a process's start on, and milliseconds since 1970."""

BlockSize = Annotated[int, Meta(ge=1, le=2**20)]
"""Tokens per KV block."""

TokenId = Annotated[int, Meta(ge=0, le=2**32 - 1)]
"""As block hashes take them (core/hashing.py); a model's vocabulary is smaller."""

BlockHash = Annotated[int, Meta(ge=0)]
"""64 bits, unsigned: msgpack has no larger numbers."""

Milliseconds = Annotated[float, Meta(ge=0, le=1e9)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
MeanTokens = Annotated[float, Meta(ge=0, le=2**31)]

MAX_LOGPROB = 1e9
Logprob = Annotated[float, Meta(le=MAX_LOGPROB)]
"""-inf for a token that is ruled out; above 0 where an engine gives logits in place of probabilities."""

MAX_LOGPROBS = 128  # most alternatives per token; clients may ask for 20

# How the next token is drawn, see Sampling.
Temperature = Annotated[float, Meta(ge=0, le=100)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-100, le=100)]
RepetitionPenalty = Annotated[float, Meta(gt=0, le=100)]

Name = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
"""Of an instance, a model, a request. Names stand in logs and metrics: no control characters."""

Aliases = Annotated[tuple[Name, ...], Meta(max_length=32)]  # of a model; only clients use them

Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
"""The digest of a file's content, in hex."""

FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,127}\Z")]
"""Of a model's file: no path, as engines' parsers write these files to a folder of their own."""

Word = Annotated[str, Meta(max_length=512)]
"""A short text that is compared or shown."""

MAX_TEXT_CHARS = 4096
Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]
"""A sentence for people: why something was not done. `shortened` makes one of any text."""

TokenIds = Annotated[list[TokenId], Meta(max_length=MAX_PROMPT_TOKENS)]
BlockHashes = Annotated[list[BlockHash], Meta(max_length=MAX_POOL_BLOCKS)]

JsonObject = dict[str, Any]  # decoded, and not checked yet


def shortened(text: str) -> Text:
    """A text for people, cut to what the other side of a link takes."""
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - 3] + "..."


class Role(StrEnum):
    """What a worker does for a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"

    decodes: bool
    """Whether a request may end here (prefill workers only hand over)."""

    def __init__(self, value: str) -> None:
        self.decodes = value != "prefill"


class FinishReason(StrEnum):
    """Why an attempt ended."""

    STOP = "stop"  # EOS, a stop token id, or (in the frontend) a stop string
    LENGTH = "length"  # max_tokens or the model's context length
    PREFILLED = "prefilled"  # a prefill attempt has its first token and its handoff
    CANCELLED = "cancelled"  # the frontend cancelled it
    ERROR = "error"  # the engine could not go on with this attempt; see `Output.error`
    REJECTED = "rejected"  # no instance could serve it: what it asks for is wrong; see `Output.error`


class StructuredOutput(msgspec.Struct, frozen=True, omit_defaults=True):
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
    disable_any_whitespace: bool = False
    """json, json_object: no white space but what is in strings."""
    whitespace_pattern: Word = ""
    """json, json_object: a regular expression of what white space may be; empty: the engine's own."""


MAX_BAD_SEQUENCES = 128
"""As many as vLLM takes."""

MAX_PROMPT_LOGPROBS = 256 * 1024
"""Most numbers in the log-probabilities of a prompt: one for each token and alternative. As a message they
have a third of a frame's limit."""

MAX_ALLOWED_TOKENS = 16 * 1024

TokenSequence = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=1024)]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is drawn. The same shape and defaults for every engine.

    `seed` is always set by the frontend for sampled requests. An engine that continues another attempt's
    output draws as if it had drawn all of it by itself, if it can do so at little cost or the request is
    `reproducible`; else it may draw anew from there, which is as good a sample.
    """

    max_tokens: Count
    min_tokens: Count = 0
    temperature: Temperature = 1.0  # 0 is greedy
    top_p: Probability = 1.0
    top_k: Count = 0  # 0: off
    min_p: Probability = 0.0
    seed: Annotated[int, Meta(ge=0)] = 0
    presence_penalty: Penalty = 0.0  # over output tokens, as in OpenAI's API
    frequency_penalty: Penalty = 0.0
    # Over prompt and output tokens, as in CTRL (arXiv 1909.05858).
    repetition_penalty: RepetitionPenalty = 1.0
    logit_bias: Annotated[dict[TokenId, Penalty], Meta(max_length=1024)] = {}
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=1024)] = ()  # beside the model's EOS
    ignore_eos: bool = False
    # None: none; k: the chosen token's, and those of the k most likely, or of the named ones.
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    logprob_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_LOGPROBS)] = ()
    structured: StructuredOutput | None = None  # only for engines whose card says `structured_output`
    reproducible: bool = False  # the client gave the seed: the same tokens whatever happens on the way
    # Sequences of tokens that the output must not contain: the last of each is held back.
    bad_words: Annotated[tuple[TokenSequence, ...], Meta(max_length=MAX_BAD_SEQUENCES)] = ()
    # Empty: all.
    allowed_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_ALLOWED_TOKENS)] = ()
    # As `logprobs`, of the prompt's tokens. For them the whole prompt is computed, whatever is cached.
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    # Most tokens of reasoning, which the engine then ends. Only for engines whose card says so.
    thinking_budget: Count | None = None


class TokenLogprob(msgspec.Struct, array_like=True):
    """One token's log-probability and the alternatives' (natural logarithm)."""

    token_id: TokenId
    logprob: Logprob
    top: Annotated[list[tuple[TokenId, Logprob]], Meta(max_length=MAX_LOGPROBS)] = []


class PromptLogprob(TokenLogprob, array_like=True):
    """The same of a token of the prompt."""

    rank: Annotated[int, Meta(ge=1)] = 1
    """1 is the most likely token's. Tokens that are equally likely all have the last of their ranks."""


class ToolCallDelta(msgspec.Struct, omit_defaults=True):
    """A part of one call of a tool: its beginning (`id` and `name` are set), or more of its arguments."""

    index: int  # among the answer's calls
    id: str | None = None  # with the prefix, unless the model's format has ids of its own
    name: str | None = None
    arguments: str | None = None  # JSON, in the making


class Parsed(msgspec.Struct):
    """A part of an answer, or all of it, taken apart."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] = []


class Incarnation(msgspec.Struct, frozen=True):
    """One process of an instance. Its successors bear the same name, and are no incarnation of before."""

    instance_id: Name
    epoch: Total  # milliseconds since 1970 at its start; 0 where that is not known yet

    def __str__(self) -> str:
        return f"{self.instance_id}@{self.epoch}"

    def may_be(self, other: Incarnation) -> bool:
        """Whether this process may be the other one, of which the epoch is perhaps not known."""
        return self.instance_id == other.instance_id and other.epoch in (0, self.epoch)


class Handoff(msgspec.Struct):
    """The right to pull one prompt's KV from a prefill instance, once, before it expires.

    A decode worker recomputes instead of pulling whenever any of these does not match what it sees.
    """

    handoff_id: Name  # the prefill attempt's id
    holder: Incarnation  # who has the blocks
    num_tokens: Count  # KV exists for token_ids[:num_tokens]
    block_size: BlockSize
    last_hash: BlockHash  # sequence hash of the last block, whole or partial (core/hashing.py)
    layout: Word  # fingerprint of weights and KV geometry; both sides must be equal
    ttl_s: Seconds  # what was left of its life when this message was sent
    transport: Word  # which KvTransfer can read it
    address: Word  # where that transport listens
    params: Annotated[bytes, Meta(max_length=2**21)] = b""  # the transport's own, opaque to everyone else


class TraceContext(msgspec.Struct, frozen=True):
    """Of which trace something is a part, as in the HTTP headers of these names (W3C Trace Context)."""

    traceparent: Word
    tracestate: Word = ""


class Attempt(msgspec.Struct):
    """One try at a choice on one instance.

    `token_ids[:prompt_len]` is the client's prompt; what follows was generated by earlier attempts and
    counts as output (penalties, seeds, min_tokens and max_tokens all continue).
    """

    attempt_id: Name
    request_id: Name
    token_ids: TokenIds
    prompt_len: Count
    sampling: Sampling
    prefill_only: bool = False  # stop after one token, keep the KV, answer with a Handoff
    handoff: Handoff | None = None
    cache_salt: Word = ""
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0  # lower goes first
    trace: TraceContext | None = None


class Output(msgspec.Struct, array_like=True):
    """What one step gave to one attempt."""

    attempt_id: str  # its limit is what was sent: it must be among that (wire/reports.py)
    token_ids: TokenIds = []
    finish_reason: FinishReason | None = None  # set exactly once, on the attempt's last output
    cached_tokens: Count | None = None  # on the first output: prompt tokens whose KV was not computed here
    logprobs: list[TokenLogprob] | None = None  # one per token when asked for
    handoff: Handoff | None = None  # with PREFILLED
    error: Text | None = None  # with ERROR and REJECTED
    transferred_blocks: Count | None = None  # on the first output: blocks pulled from a prefill worker
    # With the first token of all, when asked for: those of the prompt's tokens, from its second one on.
    prompt_logprobs: Annotated[list[PromptLogprob], Meta(max_length=MAX_PROMPT_LOGPROBS)] | None = None
    # With the finish_reason, if the engine had begun with it: the EngineTimes of core/attempt_phases.py.
    took: tuple[Milliseconds, Milliseconds, Milliseconds, Milliseconds] | None = None


class Rates(msgspec.Struct, array_like=True, frozen=True):
    """What a worker has measured of itself, as the coefficients of two formulas (engines/step_times.py)."""

    step_ms: Milliseconds = 1.0
    prefill_token_ms: Milliseconds = 0.02
    decode_request_ms: Milliseconds = 0.02
    transfer_ms: Milliseconds = 0.5
    transfer_block_ms: Milliseconds = 0.01
    prefill_context_ms: Milliseconds = 1e-6  # per prompt token and token before it
    decode_context_ms: Milliseconds = 2e-5  # per token of context of the requests that decode


class Load(msgspec.Struct, array_like=True, frozen=True):
    """A worker's load after its latest step, whoever sent the work."""

    running: Count = 0  # requests that hold blocks
    waiting: Count = 0  # admitted, but holding no blocks yet
    prefill_tokens: Count = 0  # prompt tokens still to compute, running and waiting together
    used_blocks: Count = 0  # referenced by requests or held for handoffs
    total_blocks: Count = 0
    context_tokens: Total = 0  # tokens with KV, over running requests
    held_handoffs: Count = 0
    steps: Total = 0  # turns that the engine took: that it grows while there is work is its sign of life
    rates: Rates = Rates()
    submitted: Total = 0  # attempts submitted to the engine so far that this load includes
    output_tokens: MeanTokens = 0.0  # of an output that ended here, on average; 0: none has
    prefill_context_tokens: Total = 0  # over prefill_tokens: tokens before each, which its attention reads


class AttemptReport(msgspec.Struct):
    """What an attempt that an engine has ended took there. Times in seconds of the machine's monotonic
    clock, None where it never came to that."""

    attempt_id: str
    submitted_at: float
    began_at: float | None  # it had its KV blocks, for the first time
    pulled_at: float | None  # the pull of its handoff's KV had ended
    first_token_at: float | None
    ended_at: float
    output_tokens: int


class SamplingDefaults(msgspec.Struct, frozen=True, omit_defaults=True):
    """Values of Sampling that a model's generation_config.json recommends: requests that leave them out are
    sent with them. None: nothing is recommended."""

    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Count | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None


class Answering(msgspec.Struct, frozen=True):
    """How a model's answers are drawn and read. Workers that only prefill need not know it."""

    sampling_defaults: SamplingDefaults = SamplingDefaults()
    structured_output: bool = False  # whether the engine takes Sampling.structured
    tool_parser: Word = ""  # name of vLLM's parser for this model's tool calls; empty: none
    reasoning_parser: Word = ""  # the same for its reasoning
    thinking_budget: bool = False  # whether the engine takes Sampling.thinking_budget


class ModelCard(msgspec.Struct, frozen=True):
    """A model as one worker serves it. Its revision is computed from all of this (core/catalog.py), so all
    that an answer depends on belongs here, and nothing else."""

    name: Name  # as clients call it; also seeds the block hashes
    max_model_len: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    vocab_size: Annotated[int, Meta(ge=1, le=2**32)]
    eos_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] = []  # in ascending order
    weights: Word = ""  # fingerprint of the weights; empty: the engine has none
    # Tokenizer and templates, by file name; the content is fetched with an AssetRequest.
    assets: Annotated[dict[FileName, Sha256], Meta(max_length=MAX_ASSETS)] = {}
    answering: Answering = Answering()


class EngineCard(msgspec.Struct, frozen=True):
    """What an engine is, once started."""

    name: Word  # with its version, e.g. "reference 0.1.0"
    model: ModelCard
    block_size: BlockSize
    total_blocks: Annotated[int, Meta(ge=1, le=MAX_POOL_BLOCKS)]
    layout: Word = ""  # see Handoff.layout
    transport: Word = ""  # name of its KvTransfer; empty when it cannot hand over
    max_batch_tokens: Count = 0  # most tokens of one step; 0: unknown
    max_running: Count = 0  # requests in one step; 0: unknown
    kv_events: bool = True  # whether frontends are told what it has cached

    @property
    def cache_tokens(self) -> int:
        """That its KV cache holds."""
        return self.total_blocks * self.block_size

    def __str__(self) -> str:
        """For logs."""
        blocks = f"{self.total_blocks} blocks of {self.block_size} tokens"
        return f"{self.name}, model {self.model.name}, {blocks}, transport {self.transport or 'none'}"


class Card(msgspec.Struct, frozen=True):
    """What a worker tells each frontend of itself on connecting."""

    incarnation: Incarnation
    role: Role
    engine: EngineCard
    aliases: Aliases = ()  # of its model

    @property
    def instance_id(self) -> str:
        """The name of its instance."""
        return self.incarnation.instance_id

    @property
    def model(self) -> ModelCard:
        """What it serves."""
        return self.engine.model


class Registration(msgspec.Struct, frozen=True):
    """What discovery holds of one instance: where it listens, nothing else that could go stale.

    Workers that register say their epoch and their model. Where others speak for them (Kubernetes, of its
    pods), both are unknown until the instance is connected: `epoch` is 0 and `model` is empty.
    """

    instance_id: Name
    epoch: Total
    role: Role
    model: Name
    address: Word  # host:port of its link
    pid: Count = 0  # on this machine, for the file directory's liveness check; 0: unknown
    host: Word = ""
    tls: bool = False
    # These two where the epoch is unknown:
    process: Word = ""  # another one for each process that bears this instance's name
    started_ms: Total = 0  # milliseconds since 1970, by the clock that epochs are of: it began after that
    aliases: Aliases = ()  # of its model

    @property
    def incarnation(self) -> Incarnation:
        """The registered process, as far as it is known."""
        return Incarnation(self.instance_id, self.epoch)

    def describes(self, card: Card) -> bool:
        """Whether a process that shows this card may be the registered one, and is none before it."""
        epoch = card.incarnation.epoch
        return epoch == self.epoch if self.epoch else epoch >= self.started_ms > 0


class ModelKey(NamedTuple):
    """One revision of a model. A request runs only on workers of the one that it was tokenized for."""

    name: str
    revision: str  # core/catalog.py


class Request(msgspec.Struct):
    """One choice of a client's call, checked and tokenized: what the router serves."""

    request_id: str
    model: ModelKey
    token_ids: list[int]
    sampling: Sampling
    cache_salt: str = ""
    priority: int = 0  # lower goes first
    tenant: str = ""  # the name of the API key that it came with; empty where none are needed
    call_id: str = ""  # shared by the choices of a call, which are admitted together
    client_id: str = ""  # the x-request-id of that call
    age_s: float = 0.0  # since the frontend had read its call: deadlines count from then
    trace: TraceContext | None = None
    session: str = ""  # a hash of the name that its client gives its session; empty: it gives none


class Delta(msgspec.Struct):
    """New output of a request, free of attempts: what the frontend turns into text."""

    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None  # STOP or LENGTH, on the last delta
    cached_tokens: int | None = None  # on the first delta
    prompt_logprobs: list[PromptLogprob] | None = None  # as in Output


class ModelView(msgspec.Struct):
    """One revision of a served model, as the frontend needs it to render, check and tokenize."""

    card: ModelCard
    revision: str  # core/catalog.py
    assets: dict[str, bytes]  # file name -> content

    @property
    def key(self) -> ModelKey:
        return ModelKey(self.card.name, self.revision)


class InstanceView(msgspec.Struct):
    """One instance as the router sees it, for /health."""

    instance_id: str
    role: Role
    model: str
    state: str  # core/membership.py: State
    address: str
    load: Load
    reason: str = ""  # why it takes no attempts, where that is not plain from the state
    distrusted: str = ""  # why its cache events are not believed (core/overlap_check.py); empty: they are
    cache_tokens: int = 0  # that its KV cache holds; 0: not known yet
