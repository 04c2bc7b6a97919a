"""The stand-in for vLLM's parsers keeps their contract."""

import pytest

from tests.frontend.parser_contract import ParserContract
from tests.frontend.tag_parsers import TagParsers


class TestTagParsers(ParserContract):
    @pytest.fixture
    def parsers(self):
        return TagParsers()
