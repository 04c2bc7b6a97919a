"""Templates render as in transformers."""

import json

import jinja2
import pytest

from penstock.errors import RequestRejected
from penstock.frontend.chat_template import ChatTemplate
from penstock.frontend.openai import decode_chat

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": None}}}]


def render(source, messages=None, **fields):
    messages = messages or [{"role": "user", "content": "Hi"}]
    request = decode_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode())
    return ChatTemplate(source, TOKENS).render(request)


def test_special_tokens_messages_and_the_generation_prompt():
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render(source) == "<s>[user] Hi</s>[assistant]"
    assert render(source, add_generation_prompt=False) == "<s>[user] Hi</s>"


def test_blocks_leave_no_blank_lines():
    assert render("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n") == "x\n"


def test_loop_controls_and_generation_blocks():
    source = "{% for i in [1,2,3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source) == "1"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}!") == "Hi!"


def test_tojson_does_not_escape_html():
    assert render("{{ messages[0].content | tojson }}", [{"role": "user", "content": "<é>&"}]) == '"<é>&"'
    assert render("{{ {'b': 1, 'a': [2]} | tojson(indent=1) }}") == '{\n "b": 1,\n "a": [\n  2\n ]\n}'


def test_strftime_now():
    assert len(render("{{ strftime_now('%d %b %Y') }}")) == len("01 Jan 2026")


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"


def test_tool_calls_have_their_arguments_as_objects():
    call = {"id": "c", "function": {"name": "f", "arguments": '{"x": "y"}'}}
    messages = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
    ]
    source = (
        "{{ messages[0].content is string }} {{ messages[0].tool_calls[0].function.arguments.x }}"
        " {{ messages[1].tool_call_id }} {{ messages[1].name is defined }}"
    )
    assert render(source, messages) == "True y c False"
    call["function"]["arguments"] = "{"
    with pytest.raises(RequestRejected) as raised:
        render(source, messages)
    assert raised.value.field == "messages[0].tool_calls[0].function.arguments"


def test_tools_come_whole_whether_or_not_they_may_be_called():
    assert render("{{ tools | tojson }}", tools=TOOLS) == (
        '[{"type": "function", "function":'
        ' {"name": "f", "description": null, "parameters": {"b": 1, "a": null}}}]'
    )
    assert render("{{ tools | length }}", tools=TOOLS, tool_choice="none") == "1"
    assert render("{{ tools is none }}") == render("{{ tools is none }}", tools=[]) == "True"
    strict = [{"function": {"name": "f", "strict": True}}]
    assert render("{{ tools[0].function.strict }}", tools=strict) == "True"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_earlier_reasoning_has_both_names(name):
    messages = [{"role": "assistant", "content": "x", name: "why"}]
    assert render("{{ messages[0].reasoning }} {{ messages[0].reasoning_content }}", messages) == "why why"


def test_the_client_may_set_variables_but_not_the_messages():
    kwargs = {"enable_thinking": False, "messages": [], "bos_token": "<own>"}
    source = "{{ enable_thinking }} {{ messages | length }} {{ bos_token }}"
    assert render(source, chat_template_kwargs=kwargs) == "False 1 <own>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ strftime_now(3) }}",
    ],
)
def test_what_a_template_cannot_do_is_the_requests_fault(source):
    with pytest.raises(RequestRejected) as raised:
        render(source)
    assert (raised.value.status, raised.value.field) == (400, "messages")


def test_the_templates_own_words_reach_the_client():
    with pytest.raises(RequestRejected, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("content", ["The answer is", "  The answer is ", "x"])
def test_a_final_message_can_be_continued(content):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    prompt = render(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt == f"<user>x</><assistant>{content.strip()}"


def test_a_final_message_that_the_template_drops_cannot_be_continued():
    with pytest.raises(RequestRejected, match="cannot be continued"):
        render("nothing", add_generation_prompt=False, continue_final_message=True)


def assets(config, **files):
    return {"tokenizer_config.json": json.dumps(config).encode(), **files}


def rendered(found, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return found.render(decode_chat(json.dumps(body).encode()))


def test_where_a_template_is_found():
    assert ChatTemplate.of({}) is None
    assert ChatTemplate.of(assets({})) is None
    assert rendered(ChatTemplate.of(assets({"chat_template": "one"}))) == "one"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert rendered(ChatTemplate.of(assets({"chat_template": several}))) == "default"
    assert rendered(ChatTemplate.of(assets({"chat_template": several})), tools=TOOLS) == "tools"
    assert ChatTemplate.of(assets({"chat_template": several[:1]})) is None
    files = assets({"chat_template": "one"}, **{"chat_template.jinja": b"own file"})
    assert rendered(ChatTemplate.of(files)) == "own file"


def test_special_tokens_are_texts_or_objects():
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None}
    config["chat_template"] = "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}"
    assert rendered(ChatTemplate.of(assets(config))) == "<s></s>False"


def test_a_broken_template_is_told_apart():
    with pytest.raises(jinja2.TemplateSyntaxError):
        ChatTemplate("{% if %}", {})
