"""Checkpoints and a bench for the reference engine, as its tests have them."""

from tests.engines.reference.conftest import case, case_name, make_bench, make_checkpoint

__all__ = ["case", "case_name", "make_bench", "make_checkpoint"]
