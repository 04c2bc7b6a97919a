"""The tables that translate Dynamo's flags and environment variables.

They contain the flags of Dynamo 1.6.1, and older ones that manifests still use. Each flag is one of these:

    served      Penstock has an equivalent flag, or does this without a flag
    ignored     it tunes what Penstock measures itself, or configures what Penstock lacks; a note says so
    refused     it changes what clients get, or who may connect; the graph does not start

Each switch `--name` has an opposite, `--no-name`. The opposite of a refused switch is accepted, since it
asks for what Penstock does anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from penstock.shapes import Role


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


class Meaning(msgspec.Struct, frozen=True):
    """The translation of a flag. Exactly one of `ours`, `engine`, `ignored`, `refused` and `not_run` is
    set."""

    ours: str = ""  # Penstock's flag with the same value
    engine: str = ""  # vLLM's flag with the same value, on every worker of the graph
    values: Mapping[str, str] = {}  # translations of values that vLLM names differently
    ignored: str = ""  # why it is ignored; NO_MEANING if that needs no explanation
    refused: str = ""  # why it is refused
    not_run: str = ""  # why a service with this flag is left out of the graph
    fine: frozenset[str] = frozenset()  # accepted values of a refused flag: Penstock does this anyway
    switch: bool = False  # whether the flag has no value
    variable: str = ""  # the environment variable that sets the flag


NO_MEANING = "no meaning here"
ONLY_IMAGES = "it is only for images"

ROLES = {
    "prefill": Role.PREFILL,
    "decode": Role.DECODE,
    "agg": Role.AGGREGATED,
    "aggregated": Role.AGGREGATED,
    "pd": Role.AGGREGATED,
}
"""Values of `--disaggregation-mode`."""
ENCODE = "encode"
"""A further value, of workers that only turn images into embeddings."""

ROLE_FLAGS = {"is-prefill-worker": Role.PREFILL, "is-decode-worker": Role.DECODE}

_TOOL_PARSERS = {
    "deepseek-v4": "deepseek_v4",
    "deepseek_v3_1": "deepseek_v31",
    "deepseek_v3_2": "deepseek_v32",
    "deepseekv4": "deepseek_v4",
    "gemma-4": "gemma4",
    "gpt_oss": "openai",
    "harmony": "openai",
    "nemotron_nano": "qwen3_coder",
    "phi4": "phi4_mini_json",
    "qwen25": "hermes",
}
_REASONING_PARSERS = {
    "basic": "qwen3",
    "gemma-4": "gemma4",
    "gpt_oss": "openai_gptoss",
    "kimi_k25": "kimi_k2",
    "minimax_append_think": "minimax_m2_append_think",
    "nemotron3": "nemotron_v3",
    "nemotron_nano": "deepseek_r1",
}

_OTHER_VARIABLES = {
    "custom-encoder-class": "DYN_CUSTOM_ENCODER_CLASS",
    "dyn-chat-processor": "DYN_CHAT_PROCESSOR",
    "dyn-debug-perf": "DYN_DEBUG_PERF",
    "dyn-default-thinking-mode": "DYN_DEFAULT_THINKING_MODE",
    "dyn-enable-structural-tag": "DYN_ENABLE_STRUCTURAL_TAG",
    "dyn-preprocess-workers": "DYN_PREPROCESS_WORKERS",
    "dyn-reasoning-parser": "DYN_REASONING_PARSER",
    "dyn-structural-tag": "DYN_STRUCTURAL_TAG",
    "dyn-structural-tag-schema": "DYN_STRUCTURAL_TAG_SCHEMA",
    "dyn-structural-tag-scope": "DYN_STRUCTURAL_TAG_SCOPE",
    "dyn-tool-call-parser": "DYN_TOOL_CALL_PARSER",
    "frontend-route-extension": "DYN_FRONTEND_ROUTE_EXTENSIONS",
    "kv-overlap-score-weight": "DYN_OVERLAP_SCORE_WEIGHT",
    "load-aware": "DYN_ROUTER_LOAD_AWARE",
    "model-express-url": "MODEL_EXPRESS_URL",
    "nats-tls-ca-cert-path": "NATS_TLS_CA_CERT_PATH",
    "nats-tls-client-cert-path": "NATS_TLS_CLIENT_CERT_PATH",
    "nats-tls-client-key-path": "NATS_TLS_CLIENT_KEY_PATH",
    "nats-tls-insecure": "NATS_TLS_INSECURE",
    "router-kv-events": "DYN_ROUTER_USE_KV_EVENTS",
    "tcp-tls-handshake-timeout": "DYN_TCP_TLS_HANDSHAKE_TIMEOUT_SECS",
    "tokenizer": "DYN_TOKENIZER",
    "use-vllm-tokenizer": "DYN_VLLM_USE_TOKENIZER",
}
"""Variables that are not DYN_ and the flag's name."""

_VLLM_VARIABLES = _names(
    """
    classify-worker disaggregation-mode embedding-frontend-tokenization embedding-transfer-mode
    embedding-worker embedding-worker-processes enable-multimodal frontend-decoding gms-shadow-mode
    headless mm-prompt-template realtime route-to-encoder
    """
)
"""Flags whose variables begin with DYN_VLLM_."""

_WITHOUT_VARIABLE = _names(
    """
    block-size chat-template dyn-endpoint-types enable-auto-tool-choice -i max-model-len
    max-num-batched-tokens max-num-seqs model omni reasoning-parser served-model-name tool-call-parser
    version
    """
)

READ_VARIABLES = _names(
    """
    DYN_HTTP_HOST DYN_HTTP_PORT DYN_LOG DYN_NAMESPACE DYN_ROUTER_MODE DYN_SYSTEM_PORT
    DYN_HEALTH_CHECK_ENABLED DYN_SYSTEM_ENABLED DYN_SYSTEM_STARTING_HEALTH_STATUS
    DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS
    """
)
"""Variables that Penstock's processes read by themselves, or that ask for what is always so here: every
worker has its probes."""


def _variable(name: str) -> str:
    if name in _WITHOUT_VARIABLE:
        return ""
    prefix = "DYN_VLLM_" if name in _VLLM_VARIABLES else "DYN_"
    return _OTHER_VARIABLES.get(name, prefix + name.upper().replace("-", "_"))


def _table(meanings: Mapping[str, Meaning]) -> dict[str, Meaning]:
    """By flag, each with its variable."""
    return {
        name: msgspec.structs.replace(meaning, variable=_variable(name))
        for name, meaning in meanings.items()
    }


def _ignored(names: str, why: str = NO_MEANING, *, switch: bool = False) -> dict[str, Meaning]:
    return dict.fromkeys(names.split(), Meaning(ignored=why, switch=switch))


def _refused(names: str, why: str, *, switch: bool = False, fine: Iterable[str] = ()) -> dict[str, Meaning]:
    return dict.fromkeys(names.split(), Meaning(refused=why, switch=switch, fine=frozenset(fine)))


_WIRING = {
    **_ignored(
        """
        discovery-backend dump-config-to endpoint event-plane kv-state-endpoint migration-limit
        migration-max-seq-len namespace namespace-prefix request-plane response-plane store-kv
        """
    ),
    **_ignored(
        """
        nats-tls-ca-cert-path nats-tls-client-cert-path nats-tls-client-key-path tcp-tls-ca-cert-path
        tcp-tls-cert-path tcp-tls-client-ca-cert-path tcp-tls-client-cert-path tcp-tls-client-key-path
        tcp-tls-handshake-timeout tcp-tls-server-name
        """,
        "the links between a graph's processes do not leave this machine",
    ),
    **_ignored("durable-kv-events enable-local-indexer nats-tls-insecure tcp-tls-insecure", switch=True),
}
"""How Dynamo's processes find and reach each other."""

_ROUTING = {
    "router-mode": Meaning(ours="router-mode"),
    **_ignored(
        """
        active-decode-blocks-threshold active-prefill-tokens-threshold active-prefill-tokens-threshold-frac
        admission-control busy-threshold kv-overlap-score-weight router-approximate-cache-policy
        router-conditional-disagg-config router-conditional-prefill-bypass-below-tokens
        router-conditional-prefill-policy router-decode-active-request-weight router-decode-policy
        router-disk-cache-hit-weight router-event-threads router-host-cache-hit-weight
        router-kv-overlap-score-credit router-kv-overlap-score-credit-decay router-kv-overlap-score-weight
        router-max-tree-size router-min-initial-workers router-policy-config router-predicted-ttl-secs
        router-prefill-load-model router-prefill-load-scale router-prefill-policy router-prune-target-ratio
        router-queue-policy router-queue-threshold router-session-affinity-mode
        router-session-affinity-ttl-secs router-snapshot-threshold router-temperature router-tracking-hash
        router-tracking-key-file router-tracking-key-id router-ttl router-ttl-secs shared-cache-multiplier
        shared-cache-type
        """
    ),
    **_ignored(
        """
        assume-kv-reuse decode-fallback enable-session-prefix-index enforce-disagg kv-events load-aware
        router-assume-kv-reuse router-conditional-disagg router-conditional-prefill router-decode-fallback
        router-durable-kv-events router-kv-events router-replica-sync router-reset-states
        router-track-active-blocks router-track-output-blocks router-track-prefill-tokens serve-indexer
        track-active-blocks track-output-blocks use-remote-indexer
        """,
        switch=True,
    ),
}
"""How Dynamo chooses workers. Penstock measures instead."""

_PREDICTIONS = _ignored(
    " ".join(
        f"{prefix}-{name}"
        for prefix in ("ais", "aic")
        for name in _names(
            "attention-dp-size backend backend-version model-path moe-ep-size moe-tp-size mtp-seed nextn"
            " nextn-accept-rates perf-config system tp-size"
        )
    )
)
_TOOLS_IN_PROMPT = _refused(
    "exclude-tools-when-tool-choice-none",
    "tools stay in the prompt when tool_choice is none, as in `vllm serve`",
    switch=True,
)

FRONTEND_FLAGS = _table(
    {
        "http-host": Meaning(ours="http-host"),
        "http-port": Meaning(ours="http-port"),
        "tls-cert-path": Meaning(ours="http-tls-cert"),
        "tls-key-path": Meaning(ours="http-tls-key"),
        # With `--dyn-chat-processor vllm` or `sglang`; here the workers name the parsers.
        "reasoning-parser": Meaning(engine="--reasoning-parser"),
        "tool-call-parser": Meaning(engine="--tool-call-parser"),
        **_WIRING,
        **_ROUTING,
        **_PREDICTIONS,
        **_TOOLS_IN_PROMPT,
        **_ignored(
            """
            custom-backend-metrics-endpoint custom-backend-metrics-polling-interval dyn-chat-processor
            dyn-preprocess-workers grpc-metrics-port kv-cache-block-size model-name model-path tokenizer
            """
        ),
        **_ignored(
            """
            dyn-debug-perf enable-auto-tool-choice tokenizer-fallback trust-remote-code
            """,
            switch=True,
        ),
        **_ignored(
            "strip-anthropic-preamble", "Claude Code's billing line is always left out", switch=True
        ),
        **_ignored("metrics-prefix", "metrics are called penstock_..."),
        **_ignored("enable-anthropic-api", "/v1/messages is always served", switch=True),
        **_refused("chat-template", "a model's own template is used; put this one into the model's folder"),
        **_refused("exp-python-factory frontend-route-extension", "code of your own is not loaded"),
        **_refused(
            "-i interactive", "a frontend has no chat in its terminal; use `penstock chat`", switch=True
        ),
        **_refused("kserve-grpc-server", "only HTTP is served", switch=True),
        **_refused(
            "enable-streaming-reasoning-dispatch enable-streaming-tool-dispatch",
            "streams have no such events",
            switch=True,
        ),
        **_refused(
            "reasoning-field-name", "the field is called reasoning, as in `vllm serve`", fine=["reasoning"]
        ),
        **_refused("tls-client-ca-cert-path", "clients' certificates are not checked; use --api-keys-file"),
        **_refused("version", "it asks for Dynamo's version"),
    }
)

WORKER_FLAGS = _table(
    {
        "block-size": Meaning(ours="block-size"),
        "max-model-len": Meaning(ours="max-model-len"),
        "max-num-batched-tokens": Meaning(ours="max-batch-tokens"),
        "max-num-seqs": Meaning(ours="max-running"),
        "model": Meaning(ours="model"),
        "served-model-name": Meaning(ours="served-model-name"),
        "disaggregation-mode": Meaning(ours="role"),
        "dyn-tool-call-parser": Meaning(engine="--tool-call-parser", values=_TOOL_PARSERS),
        "dyn-reasoning-parser": Meaning(engine="--reasoning-parser", values=_REASONING_PARSERS),
        **_WIRING,
        **_ROUTING,
        # A worker's own wish for the routing to it.
        "router-mode": Meaning(ignored="a frontend routes to all its workers alike"),
        **_TOOLS_IN_PROMPT,
        **_ignored(
            """
            benchmark-decode-batch-granularity benchmark-decode-length-granularity benchmark-max-batch-size
            benchmark-mode benchmark-output-path benchmark-points-file benchmark-prefill-batch-granularity
            benchmark-prefill-granularity benchmark-prefill-kv-read-granularity benchmark-timeout
            benchmark-warmup-iterations connector decode-max-batch-size-samples
            decode-max-kv-read-token-samples dyn-structural-tag-schema dyn-structural-tag-scope
            ec-connector-backend ec-extra-config ec-storage-path embedding-transfer-mode
            embedding-worker-processes engine-request-limit health-check-payload kv-events-config
            kv-transfer-config media-output-fs-url media-output-http-url mm-prompt-template
            model-express-url multimodal-embedding-cache-capacity-gb
            prefill-max-kv-read-token-samples prefill-max-new-token-samples prefix-max-batch-size-samples
            """
        ),
        **_ignored(
            """
            benchmark-collect-imbalanced benchmark-hybrid-live-state benchmark-randomize-kda-state
            embedding-frontend-tokenization fpm-trace frontend-decoding multimodal-embedding-cache-publisher
            use-vllm-tokenizer
            """,
            switch=True,
        ),
        **_refused(
            "custom-jinja-template", "a model's own template is used; put this one into the model's folder"
        ),
        **_refused(
            "dyn-default-thinking-mode",
            "the chat template decides; clients set chat_template_kwargs or reasoning_effort",
        ),
        **_ignored(
            "dyn-structural-tag",
            "response_format and tool_choice are held to a grammar as vLLM does it, request by request",
        ),
        **_ignored(
            "dyn-enable-structural-tag",
            "response_format and tool_choice are held to a grammar as vLLM does it, request by request",
            switch=True,
        ),
        **_refused(
            "dyn-endpoint-types endpoint-types",
            "only chat and completions are served",
            fine=["chat", "completions"],
        ),
        **_refused("output-modalities", "only text is served", fine=["text"]),
        **_refused("custom-encoder-class", "images are not served"),
        **dict.fromkeys(
            _names("ec-processor multimodal-encode-worker multimodal-processor vllm-native-encoder-worker"),
            Meaning(not_run=ONLY_IMAGES, switch=True),
        ),
        **_ignored(
            """
            ec-consumer-mode enable-multimodal multimodal-decode-worker multimodal-worker route-to-encoder
            """,
            "text is served, requests with images are refused",
            switch=True,
        ),
        **_refused("omni", "only text is served", switch=True),
        **_refused(
            "classify-worker embedding-worker realtime", "only chat and completions are served", switch=True
        ),
        **_refused("enable-rl", "answers have no token ids for training", switch=True),
        **_refused("gms-shadow-mode", "every worker of a graph serves, none stands by", switch=True),
        **_refused("headless", "one worker's engine is on one machine", switch=True),
        **_refused("version", "it asks for Dynamo's version"),
    }
)

MOCKER_FLAGS = {
    "block-size": Meaning(ours="block-size"),
    "max-model-len": Meaning(ours="max-model-len"),
    "max-num-batched-tokens": Meaning(ours="max-batch-tokens"),
    "max-num-seqs": Meaning(ours="max-running"),
    "model-name": Meaning(ours="served-model-name"),
    "model-path": Meaning(ours="model"),
    "speedup-ratio": Meaning(ours="sim-speedup"),
    "disaggregation-mode": Meaning(ours="role"),
    **_table({**_WIRING, **_ROUTING, "router-mode": WORKER_FLAGS["router-mode"]}),
    **_PREDICTIONS,
    **_ignored("num-workers stagger-delay", "a replica is one worker; replicas sets how many there are"),
    **_ignored("data-parallel-size", "a simulated worker is one engine"),
    **_ignored("extra-engine-args", "the file is Dynamo's"),
    **_ignored("planner-profile-data", "--sim-cost-model of a penstock worker names measured steps"),
    **_ignored("num-gpu-blocks-override", "--kv-cache-mib of a penstock worker says how much KV it has"),
    **_ignored(
        """
            bootstrap-ports decode-speedup-ratio engine-type free-gpu-memory-fraction gpu-memory-
            utilization host-offload-d2h-bandwidth-gbps host-offload-h2d-bandwidth-gbps kv-bytes-per-token
            kv-cache-dtype kv-transfer-bandwidth kv-transfer-timing-mode mem-fraction-static num-host-
            blocks preemption-mode sglang-chunked-prefill-size sglang-clip-max-new-tokens sglang-max-
            prefill-tokens sglang-page-size sglang-schedule-conservativeness sglang-schedule-policy
            startup-time trtllm-capacity-scheduler-policy watermark zmq-kv-events-ports zmq-replay-ports
            """
    ),
    **_ignored("aic-perf-model ais-perf-model enable-chunked-prefill enable-prefix-caching", switch=True),
    **_refused("reasoning", "simulated answers have no reasoning"),
    **_refused("response-replay-trace-path", "simulated answers are not read from a file"),
    **_refused("sglang-generate", "only chat and completions are served", switch=True),
    **_refused("version", "it asks for Dynamo's version"),
}
"""None of the mocker's own flags has a variable."""


class Program(msgspec.Struct, frozen=True):
    """One of Dynamo's programs that Penstock stands in for."""

    flags: Mapping[str, Meaning]
    engine: str = ""  # that its workers run; empty: it is a frontend
    hands_on: bool = False  # a flag that Dynamo does not have is the engine's own


PROGRAMS = {
    "dynamo.frontend": Program(FRONTEND_FLAGS),
    "dynamo.mocker": Program(MOCKER_FLAGS, engine="sim"),
    "dynamo.vllm": Program(WORKER_FLAGS, engine="vllm", hands_on=True),
}


def meaning_of(table: Mapping[str, Meaning], name: str) -> tuple[Meaning, bool] | None:
    """What a flag becomes, and whether it is the opposite of a switch. None: Dynamo has no such flag."""
    if name in table:
        return table[name], False
    opposite = table.get(name.removeprefix("no-"))
    return (opposite, True) if opposite is not None and opposite.switch else None


def flags_from(table: Mapping[str, Meaning], env: Mapping[str, str]) -> dict[str, tuple[str, list[str]]]:
    """The flags that variables stand for: by the flag's name, the variable and the flag's values."""
    found = {}
    for name, meaning in table.items():
        value = env.get(meaning.variable, "").strip()  # "" where a flag has no variable
        if not value or meaning.variable in READ_VARIABLES:
            continue
        if not meaning.switch:
            found[name] = (meaning.variable, [value])
        elif value.lower() in ("1", "true", "yes", "on"):
            found[name] = (meaning.variable, [])
        else:
            found[f"no-{name}"] = (meaning.variable, [])
    return found
