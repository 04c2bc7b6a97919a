"""The prefix of a proxy, and what a request is told whose path is not served, or not with its method."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final

from starlette.routing import Route

from penstock.errors import Rejection, RequestRejected

MAX_SHOWN_PATH_CHARS: Final = 200  # of a path in an error and in the log
MAX_COMPARED_CHARS: Final = 64  # longer paths are not compared by their letters, which takes quadratic time
SIMILAR: Final = 0.85  # as difflib measures it, from 0 to 1
API_PREFIX: Final = "/v1"


class Paths:
    """The paths of a frontend's routes."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._routes = routes
        self._methods = {route.path: _method(route) for route in routes if "{" not in route.path}

    def methods(self, path: str) -> list[str]:
        """The methods with which a path is served; none: it is not."""
        matching = [route for route in self._routes if route.path_regex.match(path)]
        return sorted({method for route in matching for method in route.methods or ()})

    def not_served(self, method: str, path: str) -> RequestRejected:
        """For a path without an endpoint."""
        asked = f"`{method} {path[:MAX_SHOWN_PATH_CHARS]}`"
        meant = self._meant(path[:MAX_SHOWN_PATH_CHARS])
        if meant is not None:
            message = f"Penstock does not serve {asked}; did you mean `{self._methods[meant]} {meant}`?"
        else:
            under_v1 = [path for path in self._methods if path.startswith(API_PREFIX)]
            served = ", ".join(f"{self._methods[path]} {path}" for path in under_v1)
            message = f"Penstock does not serve {asked}; it serves {served}."
        return RequestRejected(message, kind=Rejection.NOT_FOUND)

    def _meant(self, path: str) -> str | None:
        """The served path that a client seems to mean: it has left out `/v1` or has it twice, has a proxy's
        prefix before it, or has other letters."""
        parts = [part for part in path.lower().split("/") if part]
        for first in range(len(parts)):
            end = "/" + "/".join(parts[first:])
            for candidate in (end, API_PREFIX + end):
                if candidate in self._methods:
                    return candidate
        asked = "/" + "/".join(parts)
        if not parts or len(asked) > MAX_COMPARED_CHARS:
            return None
        return next(iter(difflib.get_close_matches(asked, self._methods, n=1, cutoff=SIMILAR)), None)


def without_prefix(path: str, prefix: str) -> str:
    """The path as it is served. A proxy in front may have cut off its prefix already."""
    if not prefix or not path.startswith(prefix):
        return path
    rest = path[len(prefix) :]
    return rest or "/" if rest[:1] in ("", "/") else path


def wrong_method(method: str, path: str, allowed: Sequence[str]) -> RequestRejected:
    """For a path that is served with other methods only."""
    asked = f"`{method} {path[:MAX_SHOWN_PATH_CHARS]}`"
    message = f"{asked} is not served; use {', '.join(allowed)}."
    return RequestRejected(message, kind=Rejection.METHOD_NOT_ALLOWED)


def _method(route: Route) -> str:
    """The one to name: HEAD goes along with GET."""
    methods = route.methods or set()
    return "GET" if "GET" in methods else next(iter(methods))
