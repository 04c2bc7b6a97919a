"""The calls of APIs that only need a model's template and tokenizer, and no worker."""

from __future__ import annotations

import logging
import time

import msgspec

from penstock.frontend.completer import Completer
from penstock.frontend.endpoint import PromptApi, PromptEncoder
from penstock.frontend.http.exchange import HttpExchange
from penstock.frontend.sessions import session_in_headers
from penstock.frontend.settings import FrontendSettings
from penstock.frontend.text.model_text import ModelTexts
from penstock.frontend.text.tokenizing import Caller
from penstock.metrics import FrontendMetrics

log = logging.getLogger("penstock.frontend")


class PromptServer:
    """Serves these endpoints. What they may hold up is limited as for APIs that generate text: the bodies,
    the time for tokenizing, and whose turn it is there."""

    def __init__(
        self, completer: Completer, texts: ModelTexts, settings: FrontendSettings, metrics: FrontendMetrics
    ) -> None:
        self._completer = completer
        self._texts = texts
        self._settings = settings
        self._metrics = metrics

    async def serve(self, api: PromptApi, exchange: HttpExchange, tenant: str) -> None:
        """Answer one request. Raises RequestRejected."""
        try:
            content = await exchange.body()
            began = time.perf_counter()
            endpoint = api.decode(content)
            view = self._completer.model(endpoint.model)
            limit_s = self._settings.prepare_timeout_s
            caller = Caller(tenant, 0, began, limit_s, session_in_headers(exchange))
            text = await self._texts.of(view, caller)
            answer = await endpoint.answer(PromptEncoder(model=view.card, text=text, caller=caller))
            await exchange.respond(200, msgspec.json.encode(answer))
        finally:
            exchange.close()
        self._metrics.requests.labels(view.card.name, api.name, 200, "ok").inc()
        log.info(
            "request_id=%s endpoint=%s model=%s status=200 outcome=ok duration_ms=%.1f",
            exchange.request_id.decode(),
            api.name,
            view.card.name,
            (time.perf_counter() - began) * 1e3,
        )
