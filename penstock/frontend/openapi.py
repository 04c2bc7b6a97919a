"""/openapi.json and /docs: the endpoints with the schemas of their requests and answers.

The schemas are made from the classes that decode the requests, so that a field cannot be missing here, nor
have other limits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape
from typing import Any, Final

import msgspec
from starlette.routing import Route

from penstock import __version__
from penstock.frontend.answers import ErrorAnswer
from penstock.frontend.endpoint import Operation, Shape
from penstock.shapes import JsonObject

OPENAPI_VERSION: Final = "3.1.0"  # the first whose schemas are JSON Schema, which msgspec writes
JSON_TYPE: Final = "application/json"
STREAM_TYPE: Final = "text/event-stream"

_REFERENCE: Final = "#/components/schemas/{name}"
_PARAMETER: Final = re.compile(r"\{(\w+)(?::\w+)?\}")
_KEYS: Final[JsonObject] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


class DescribedRoute(Route):
    """A route that says what it does. It has one method, and HEAD beside GET."""

    def __init__(self, method: str, path: str, endpoint: Any, operation: Operation) -> None:
        super().__init__(path, endpoint=endpoint, methods=[method])
        self.method = method
        self.operation = operation

    @property
    def template(self) -> str:
        """The path as OpenAPI writes it."""
        return _PARAMETER.sub(r"{\1}", self.path)


def openapi_document(routes: Iterable[DescribedRoute], root_path: str, *, keys: bool) -> JsonObject:
    """The description of these routes. `keys`: API keys are in use."""
    routes = list(routes)
    shapes = {
        shape: None
        for route in routes
        for shape in (route.operation.request, route.operation.answer, _error(route))
        if shape is not None
    }
    references, components = msgspec.json.schema_components(tuple(shapes), ref_template=_REFERENCE)
    schemas = dict(zip(shapes, references, strict=True))
    paths: dict[str, JsonObject] = {}
    for route in routes:
        paths.setdefault(route.template, {})[route.method.lower()] = _operation(route, schemas, keys=keys)
    return {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "Penstock", "version": __version__},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {"schemas": components, **({"securitySchemes": _KEYS} if keys else {})},
    }


def _error(route: DescribedRoute) -> Shape:
    return route.operation.error or ErrorAnswer


def _operation(route: DescribedRoute, schemas: dict[Shape, JsonObject], *, keys: bool) -> JsonObject:
    operation = route.operation
    schema: JsonObject = {"type": "string"} if operation.answer is None else schemas[operation.answer]
    content: JsonObject = {operation.content_type: {"schema": schema}}
    if operation.streams:
        content[STREAM_TYPE] = {"schema": {"type": "string"}}
    described: JsonObject = {
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.template}").strip("_"),
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {
                "description": "An error.",
                "content": {JSON_TYPE: {"schema": schemas[_error(route)]}},
            },
        },
    }
    in_path = {name: {"in": "path", "required": True} for name in _PARAMETER.findall(route.path)}
    parameters = in_path | {name: {"in": "query"} for name in operation.query}
    if parameters:
        described["parameters"] = [
            {"name": name, **where, "schema": {"type": "string"}} for name, where in parameters.items()
        ]
    if operation.request is not None:
        content = {JSON_TYPE: {"schema": schemas[operation.request]}}
        described["requestBody"] = {"required": True, "content": content}
    if keys and operation.needs_key:
        described["security"] = [{name: []} for name in _KEYS]
    return described


def docs_page(document: JsonObject) -> bytes:
    """The document as a page, without scripts or styles."""
    prefix = document["servers"][0]["url"].rstrip("/")
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Penstock: API</title>'
        f"<h1>Penstock {escape(document['info']['version'])}: API</h1>"
        f'<p>For programs: <a href="{escape(prefix)}/openapi.json">openapi.json</a></p><h2>Endpoints</h2>'
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            title = f"{method.upper()} {path}"
            parts.append(f"<h3><code>{escape(title)}</code></h3><p>{escape(operation['summary'])}</p><ul>")
            body = operation.get("requestBody", {}).get("content", {})
            for which, content in (
                ("Request", body),
                ("Answer", operation["responses"]["200"]["content"]),
                ("Error", operation["responses"]["default"]["content"]),
            ):
                for content_type, described in content.items():
                    shown = _shown_type(described["schema"])
                    parts.append(f"<li>{which}: {shown} (<code>{escape(content_type)}</code>)</li>")
            parts.append("</ul>")
    parts.append("<h2>Objects</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(_shown_object(name, schema))
    return "".join([*parts, "</html>\n"]).encode()


def _shown_object(name: str, schema: JsonObject) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{escape(field)}</code></td><td>{_shown_type(described)}</td>"
        f"<td>{'required' if field in required else ''}</td></tr>"
        for field, described in schema.get("properties", {}).items()
    )
    description = escape(schema.get("description", ""))
    return f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{description}</p><table>{rows}</table>'


_LIMITS: Final = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "maxProperties": "at most {}",
}


def _shown_type(schema: JsonObject) -> str:
    """A schema in words, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(map(_shown_type, schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in values)
    kind = escape(schema.get("type", "any"))
    if kind == "array":
        kind = f"list of ({_shown_type(schema.get('items') or {})})"
    limits = [words.format(schema[name]) for name, words in _LIMITS.items() if name in schema]
    return f"{kind}, {escape(', '.join(limits))}" if limits else kind
