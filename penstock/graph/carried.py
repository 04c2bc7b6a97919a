"""Conversions between two API versions that lose nothing, even if one version cannot express everything.

An object of version X is translated to version Y. If the translation loses something, the original part of
X is kept in an annotation of Y. For the conversion back, Y is compared with the translation of the
original. If nothing changed, the result is the original. If something changed, only that is changed in the
original. A change always wins over the original: if the change is not visible in the result, the original
is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.errors import ConfigError

Object = dict[str, Any]
Translation = Callable[[Object], Object]


def with_original(
    found: Object, translate: Translation, back: Translation, original: Object | None
) -> Object:
    """`found`, translated, with the parts of `original` that `found` cannot express.

    Args:
        found: the present object, of version X.
        translate: X to Y.
        back: Y to X.
        original: the object of version Y from which an earlier state of `found` was translated. None if
            that translation lost nothing, or if `found` was written in version X.
    """
    translated = translate(found)
    if original is None:
        return translated
    try:
        before = back(original)
        if before == found:
            return original
        merged: Object = with_changes(original, translate(before), translated)
        seen = back(merged)
    except ConfigError:  # somebody edited the annotation
        return translated
    return merged if seen == back(translated) else translated


def with_changes(original: Any, old: Any, new: Any) -> Any:
    """`original` with the differences between `old` and `new`. Lists of named items are compared by
    name."""
    if old == new:
        return original
    if isinstance(original, dict) and isinstance(old, dict) and isinstance(new, dict):
        return _with_changed_fields(original, old, new)
    ours, before, after = _by_name(original), _by_name(old), _by_name(new)
    if ours is None or before is None or after is None:
        return new
    merged = _with_changed_fields(ours, before, after)
    kept_order = [name for name in before if name in after] == [name for name in after if name in before]
    order = merged if kept_order else dict.fromkeys([*(name for name in after if name in merged), *merged])
    return [merged[name] for name in order]


def _with_changed_fields(original: Object, old: Object, new: Object) -> Object:
    result: Object = {}
    for name in {**original, **new}:
        if name not in new:
            if name not in old:
                result[name] = original[name]
        elif name not in old:
            result[name] = new[name]
        elif name in original:
            result[name] = with_changes(original[name], old[name], new[name])
        elif old[name] != new[name]:
            result[name] = new[name]
    return result


def _by_name(value: Any) -> dict[str, Object] | None:
    """The items of a list by their names. None if it is not a list of items with unique names."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return None
    names = [one.get("name") for one in value]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        return None
    return dict(zip(names, value, strict=True))
