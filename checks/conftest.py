"""Checks run as tests do: files that were renewed count at once, and nothing may hold up the event loop."""

from tests.conftest import files_that_were_renewed_count_at_once, nothing_holds_up_the_event_loop

__all__ = ["files_that_were_renewed_count_at_once", "nothing_holds_up_the_event_loop"]
