"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# A property's example may take as long as it takes: a busy machine is no failure.
settings.register_profile("penstock", deadline=None)
settings.load_profile("penstock")
