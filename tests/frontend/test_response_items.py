"""Items as messages, and the store of responses."""

import msgspec
import pytest

from penstock.frontend.responses_api.input_items import carried, messages_of
from penstock.frontend.responses_api.request_body import InputItem
from penstock.frontend.responses_api.store import ENTRY_BYTES, MemoryResponseStore, StoredResponse

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "42"}
REASONING = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}], "summary": []}


def messages(*items):
    items = msgspec.convert(list(items), list[InputItem])
    return messages_of([(item, f"input[{index}]") for index, item in enumerate(items)])


def test_reasoning_text_and_calls_are_one_message():
    said = {"role": "assistant", "type": "message", "content": [{"type": "output_text", "text": "ok"}]}
    turn, result = messages(REASONING, said, CALL, CALL | {"call_id": "c2"}, OUTPUT)[:2]
    assert (turn.reasoning, turn.content) == ("hm", "ok")
    assert [(call.id, call.function.arguments) for call in turn.tool_calls] == [
        ("c1", {"a": 1}),
        ("c2", {"a": 1}),
    ]
    assert (result.role, result.content, result.tool_call_id) == ("tool", "42", "c1")


def test_text_after_calls_is_another_message():
    said = {"role": "assistant", "content": "done"}
    assert [message.content for message in messages(CALL, said, said)] == [None, "done", "done"]


@pytest.mark.parametrize("arguments", ['{"a": ', "[]", "null", None, "", 5])
def test_cut_or_odd_arguments_refuse_nothing(arguments):
    (turn,) = messages(CALL | {"arguments": arguments})
    assert turn.tool_calls[0].function.arguments == {}


@pytest.mark.parametrize(
    ("item", "reasoning"),
    [
        ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}]}, "short"),
        ({"type": "reasoning", "summary": [], "encrypted_content": carried("hm, 😀")}, "hm, 😀"),
    ],
)
def test_reasoning_is_found_where_the_client_has_it(item, reasoning):
    assert messages(item)[0].reasoning == reasoning


@pytest.mark.parametrize("encrypted", [None, "gAAAA", "penstock:%", "penstock:gICA"])
def test_reasoning_that_others_encrypted_is_left_out(encrypted):
    assert messages({"type": "reasoning", "summary": [], "encrypted_content": encrypted}) == []


def test_refusals_and_empty_texts_of_a_model_are_accepted():
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}
    assert [message.content for message in messages(refused, {"role": "assistant"})] == ["no", ""]


def test_custom_call_and_its_output_in_parts():
    call = {"type": "custom_tool_call", "call_id": "c", "name": "p", "input": "x"}
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    output = {"type": "custom_tool_call_output", "call_id": "c", "output": parts}
    turn, result = messages(call, output)
    assert turn.tool_calls[0].function.arguments == {"input": "x"}
    assert result.content == "a\nb"


# --- the store ------------------------------------------------------------------------------------


def stored(name, size=0):
    return StoredResponse(name, b"x" * size, b"", "")


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


async def kept(store, tenant, *names):
    return [name for name in names if await store.get(tenant, name) is not None]


async def test_store_beyond_its_count_forgets_what_was_not_used_for_longest():
    store = MemoryResponseStore(2, 10**6, 60.0)
    await store.put("t", stored("a"))
    await store.put("t", stored("b"))
    await store.get("t", "a")
    await store.put("t", stored("c"))
    assert await kept(store, "t", "a", "b", "c") == ["a", "c"]


async def test_store_beyond_its_bytes_takes_from_who_keeps_most():
    store = MemoryResponseStore(100, 10 * ENTRY_BYTES, 60.0)
    await store.put("small", stored("s"))
    for number in range(5):
        await store.put("large", stored(str(number), 2 * ENTRY_BYTES))
    assert await kept(store, "small", "s") == ["s"]
    assert await kept(store, "large", *"01234") == ["2", "3", "4"]
    assert (store.count, store.bytes) == (4, 10 * ENTRY_BYTES)


async def test_store_forgets_what_is_too_old_and_keeps_nothing_too_large():
    clock = Clock()
    store = MemoryResponseStore(100, 10 * ENTRY_BYTES, 60.0, clock)
    await store.put("t", stored("a"))
    await store.put("t", stored("huge", 20 * ENTRY_BYTES))
    clock.now = 59.0
    assert await kept(store, "t", "a", "huge") == ["a"]
    clock.now = 118.0
    assert await kept(store, "t", "a") == ["a"]
    clock.now = 179.0
    assert await kept(store, "t", "a") == []
    assert (store.count, store.bytes) == (0, 0)


async def test_store_deletes_once_and_for_the_owner_only():
    store = MemoryResponseStore(100, 10**6, 60.0)
    await store.put("t", stored("a"))
    assert not await store.delete("u", "a")
    assert await store.delete("t", "a")
    assert not await store.delete("t", "a")
