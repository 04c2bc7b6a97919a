"""Tools in the shape of another API: the error says which shape was expected, and which was sent."""

import pytest

SCHEMA = {"type": "object", "properties": {}}
TOOLS = {
    "/v1/chat/completions": {"type": "function", "function": {"name": "get", "parameters": SCHEMA}},
    "/v1/responses": {"type": "function", "name": "get", "parameters": SCHEMA},
    "/v1/messages": {"name": "get", "input_schema": SCHEMA},
}
CHOICES = {
    "/v1/chat/completions": {"type": "function", "function": {"name": "get"}},
    "/v1/responses": {"type": "function", "name": "get"},
    "/v1/messages": {"type": "tool", "name": "get"},
}
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "Hi"},
    "/v1/responses/input_tokens": {"input": "Hi"},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": MESSAGES},
}
PATHS = [(path, next(api for api in TOOLS if path.startswith(api))) for path in BODIES]


async def refusal(served, path, **fields):
    answer = await served.http.post(path, json={"model": "tiny", **BODIES[path], **fields})
    assert answer.status_code == 400
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "own"), PATHS)
@pytest.mark.parametrize("other", TOOLS)
async def test_tool_of_another_api_is_refused_with_both_shapes(served, path, own, other):
    tools = [TOOLS[own], TOOLS[other]]
    if other == own:
        tools[1] = {"type": "function"}
    message = await refusal(served, path, tools=tools)
    assert f"A tool of {own} is " in message
    assert "tools[1]" in message
    assert (f"; this is that of {other}." in message) == (other != own)


@pytest.mark.parametrize(("path", "own"), PATHS)
@pytest.mark.parametrize("other", CHOICES)
async def test_choice_of_another_api_is_refused_with_both_shapes(served, path, own, other):
    choice = CHOICES[other] if other != own else {"type": "x"}
    message = await refusal(served, path, tools=[TOOLS[own]], tool_choice=choice)
    assert f"`tool_choice` of {own} is " in message
    assert (f"; this is that of {other}." in message) == (other != own)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_allowed_tools_of_the_other_api_are_refused_with_both_shapes(served, path):
    allowed = {"mode": "auto", "tools": [CHOICES[path]]}
    nested, flat = {"type": "allowed_tools", "allowed_tools": allowed}, {"type": "allowed_tools", **allowed}
    is_chat = path == "/v1/chat/completions"
    other = "/v1/responses" if is_chat else "/v1/chat/completions"
    message = await refusal(served, path, tools=[TOOLS[path]], tool_choice=flat if is_chat else nested)
    assert f"this is that of {other}." in message


async def test_custom_tool_of_the_other_api_is_not_taken_for_one_without_a_schema(served):
    tool = {"type": "custom", **TOOLS["/v1/messages"]}
    message = await refusal(served, "/v1/responses", tools=[tool])
    assert "this is that of /v1/messages" in message


async def test_custom_tool_of_a_chat_is_told_where_there_are_some(served):
    tool = {"type": "custom", "custom": {"name": "calc"}}
    message = await refusal(served, "/v1/chat/completions", tools=[tool])
    assert message.endswith("; /v1/responses has custom tools.")


async def test_tool_of_the_right_shape_is_told_its_own_mistake_only(served):
    tool = {"type": "function", "function": {"name": ""}}
    message = await refusal(served, "/v1/chat/completions", tools=[tool])
    assert message == "`tools[0].function.name` must be a string of at least 1 character."
