"""Server-sent events that have a name beside their data, as Anthropic's and the Responses API's have."""

import json


def named_events(text):
    """The fields of each event; its name must be their type."""
    events = []
    for event in text.strip().split("\n\n"):
        name, data = event.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        assert name == f"event: {fields['type']}"
        events.append(fields)
    return events
