"""What can be set about a frontend."""

from __future__ import annotations

import msgspec

from penstock.core.tokenizer_queue import TokenizerLimits


class FrontendSettings(msgspec.Struct, frozen=True):
    """How the HTTP side listens, what it accepts and how long it waits."""

    host: str = "127.0.0.1"
    """Address to listen on. Only this machine, unless the graph says otherwise."""

    port: int = 8000
    """0 takes any free port; -1: none, only the Unix socket."""

    uds: str = ""
    """Path of a Unix socket to listen on as well."""

    tls_cert: str = ""
    """Serve HTTPS with this certificate, a PEM file with its chain; empty: HTTP."""

    tls_key: str = ""
    """Its private key, PEM."""

    api_key: str = ""
    """A key that requests may bring (`Authorization: Bearer KEY`)."""

    api_keys_file: str = ""
    """File with the hashes of others (frontend/http/api_keys.py). Neither: none needed."""

    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the frontend from a browser; `*`: any."""

    root_path: str = ""
    """What a reverse proxy in front has before all paths; paths are served with and without it."""

    max_body_bytes: int = 16 * 1024 * 1024
    """Largest request body: a prompt of a million token ids fits."""

    max_reading_bytes: int = 256 * 1024 * 1024
    """Bodies that have begun to arrive, all together; what goes beyond it is answered with 429."""

    max_bodies_bytes: int = 1024 * 1024 * 1024
    """Bodies of all calls under way, which are kept to their
    end, as a call may have to begin again; what goes beyond it is answered with 429."""

    max_connections: int = 16_384
    """Clients connected at one time; the next one is answered with 503. Those at their TLS handshake count
    as well, and are dropped first. Less where the process may not have as many file descriptors
    (`ulimit -n`)."""

    body_timeout_s: float = 30.0
    """From a request's headers to the last byte of its body."""

    max_tls_handshakes: int = 2048
    """TLS handshakes at one time; a further one drops the oldest. As many as the kernel may hand over at
    once after a restart; strangers can cause them, and each takes 50 to 150 KiB until it ends."""

    tls_timeout_s: float = 10.0
    """From a connection's start to the end of its TLS handshake: two round trips, and a packet or two that
    got lost on a bad line."""

    header_timeout_s: float = 30.0
    """From a connection's start, or the end of its TLS handshake, to the end of its first request's
    headers."""

    keep_alive_s: float = 75.0
    """How long an idle connection is kept; longer than common load balancers' 60 s, so that they and not
    the server close first."""

    request_timeout_s: float = 3600.0
    """For a whole request, slow readers included: beyond every deadline of the router, as a last resort."""

    client_stall_s: float = 60.0
    """How long a stream's client may take no bytes at all before its request is cancelled."""

    sse_keep_alive_s: float = 40.0
    """How long a stream may send nothing before its response begins without a token, or has a comment.
    0: as long as it likes. Common proxies cut a connection after 60 s; a request that waits in vain for a
    worker is answered after 30 s, and should have its HTTP status."""

    max_unsent_chars: int = 1024 * 1024
    """Text a stream may hold for a client that reads too slowly, before its request is cancelled."""

    max_inflight: int = 8192
    """Requests at one time; the next one is answered with 429."""

    default_max_tokens: int = 32768
    """Most tokens a chat request gets that sets no max_tokens (less when the context ends before)."""

    segment_cache_bytes: int = 64 * 1024 * 1024
    """For token ids of prompt segments that were seen before."""

    long_text_chars: int = 8192
    """Text not seen before that is tokenized at once, of all calls in one turn of the event loop: some 2 ms
    of work. What is more waits for a thread, as it would hold up everybody's tokens."""

    tokenizing: TokenizerLimits = TokenizerLimits()
    """For such texts, which wait for that thread."""

    prepare_timeout_s: float = 30.0
    """From a request's last byte until its prompts are token ids: its tokenizer's loading, its turn, and
    the tokenizing itself."""

    max_stored_responses: int = 10_000
    """Responses of /v1/responses that this frontend keeps for their owners. What was not used for longest
    goes first, of the tenant who keeps most bytes."""

    max_stored_bytes: int = 256 * 1024 * 1024
    """The same, in bytes; a response that has more by itself is not kept."""

    stored_response_age_s: float = 24 * 3600.0
    """How long such a response is kept after it was made or last used."""
