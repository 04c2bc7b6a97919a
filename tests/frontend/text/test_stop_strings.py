"""Stop strings against an oracle that looks at every character."""

from hypothesis import given
from hypothesis import strategies as st

from penstock.frontend.text.stop_strings import StopMatcher

STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)
PIECES = st.lists(st.text("ab\nc", max_size=5), max_size=12)


def oracle(text, stops, include):
    """The text up to the stop string that is complete first, of several the longest; and that string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(stops=STOPS, pieces=PIECES, include=st.booleans())
def test_the_outcome_does_not_depend_on_the_pieces(stops, pieces, include):
    matcher = StopMatcher(stops, include)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.matched:
            break
    else:
        shown += matcher.flush()
    assert (shown, matcher.matched) == oracle("".join(pieces), stops, include)


@given(stops=STOPS, pieces=PIECES)
def test_only_what_may_become_a_stop_string_is_held_back(stops, pieces):
    matcher = StopMatcher(stops, include=False)
    seen = shown = ""
    for piece in pieces:
        seen += piece
        shown += matcher.push(piece)
        if matcher.matched:
            return
        held = seen[len(shown) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)
        longer = [seen[start:] for start in range(len(shown))]
        assert not any(stop.startswith(ending) for stop in stops for ending in longer)


def test_text_without_a_beginning_of_a_stop_passes_at_once():
    matcher = StopMatcher(["END", "\n\n"], include=False)
    assert matcher.push("some text\n") == "some text"
    assert matcher.push("more E") == "\nmore "
    assert matcher.push("N") == ""
    assert matcher.push("D and more") == ""
    assert matcher.matched
