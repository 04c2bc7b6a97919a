"""Templates render as in transformers."""

import json

import jinja2
import pytest

from penstock.errors import Rejection, RequestRejected
from penstock.frontend.chat import template_input_of
from penstock.frontend.openai import decode_chat
from penstock.frontend.text.chat_template import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": None}}}]


def render(source, messages=None, **fields):
    messages = messages or [{"role": "user", "content": "Hi"}]
    request = decode_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode())
    return ChatTemplate(source, TOKENS).render(template_input_of(request))


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
    assert (raised.value.kind, raised.value.field) == (Rejection.INVALID, "messages")
    assert raised.value.code == "rejected_by_template"


def test_the_templates_own_words_reach_the_client():
    with pytest.raises(RequestRejected, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("content", ["The answer is", "  The answer is ", "x"])
def test_a_final_message_can_be_continued(content):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    prompt = render(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt == f"<user>x</><assistant>{content.strip()}"


PLAIN = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize("content", ["|", "<", "i", "end", "<|im_end|>", "\n", "", "a ", " ", "a\n\n"])
def test_a_continued_prompt_ends_with_the_message_whatever_the_template_writes_after_it(content):
    """A search for the content would find the same letters in `<|im_end|>`."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    prompt = render(PLAIN, messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt == f"<|user|>\nHi<|im_end|>\n<|assistant|>\n{content}"


def test_a_message_of_parts_and_one_without_content_can_be_continued():
    for content, text in ([{"type": "text", "text": "a"}, "b"], "a\nb"), (None, ""):
        messages = [{"role": "assistant", "content": content}]
        prompt = render(PLAIN, messages, add_generation_prompt=False, continue_final_message=True)
        assert prompt == f"<|assistant|>\n{text}"


def test_a_template_that_reorders_the_conversation_still_ends_at_its_last_message():
    source = "{{ messages[-1].content }}!{% for m in messages[:-1] %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    assert render(source, messages, add_generation_prompt=False, continue_final_message=True) == "x"


# --- developers -----------------------------------------------------------------------------------

SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{% if not loop.first %}{{ raise_exception('system must come first') }}{% endif %}"
    "[{{ m.content }}]{% elif m.role in ('user', 'assistant') %}<{{ m.content }}>{% endif %}{% endfor %}"
)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def test_a_developer_is_the_system_where_the_template_knows_no_developer():
    assert render(SYSTEM_FIRST, turns(("developer", "Be kind."), ("user", "Hi"))) == "[Be kind.]<Hi>"
    several = turns(("system", "A"), ("user", "x"), ("developer", "B"), ("developer", ""), ("user", "y"))
    assert render(SYSTEM_FIRST, several) == "[A\n\nB]<x><y>"
    assert (
        render(SYSTEM_FIRST, turns(("user", "x"), ("developer", [{"type": "text", "text": "B"}])))
        == "[B]<x>"
    )


def test_a_later_system_message_goes_to_the_front_where_the_template_wants_it_there():
    reminded = turns(("system", "A"), ("user", "x"), ("system", "B"), ("user", "y"))
    assert render(SYSTEM_FIRST, reminded) == "[A\n\nB]<x><y>"
    assert render(SYSTEM_FIRST, reminded[1:]) == "[B]<x><y>"
    anywhere = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    assert render(anywhere, reminded) == "sAuxsBuy"


def test_a_refusal_for_another_reason_keeps_its_words():
    source = "{{ raise_exception('%s' | format(messages[0].content)) }}"
    with pytest.raises(RequestRejected, match="refused the messages: x"):
        render(source, turns(("user", "x"), ("system", "B")))
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    with pytest.raises(RequestRejected, match="system must come first"):
        render(SYSTEM_FIRST, turns(("user", "x"), ("system", "B")), **continued)


def test_a_developer_stays_one_where_the_template_knows_the_role():
    source = "{% for m in messages %}{{ m.role if m.role == 'developer' }}{{ m.tools }}{% endfor %}"
    assert render(source, turns(("developer", "B"))) == "developerNone"
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "'name': 'f'" in render(source, [{"role": "developer", "content": "B", "tools": tools}])


def test_each_template_is_asked_by_itself():
    several = [
        {"name": "tool_use", "template": "{{ messages[0].role }} {# 'developer' #}"},
        {"name": "default", "template": "{{ messages[0].role }}"},
    ]
    template = ChatTemplate.of(assets({"chat_template": several}))
    messages = turns(("developer", "B"))
    assert rendered(template, messages=messages) == "system"
    assert rendered(template, messages=messages, tools=TOOLS) == "developer "


def test_several_systems_stay_where_they_are_without_a_developer():
    source = "{% for m in messages %}{{ m.role[0] }}{% endfor %}"
    assert render(source, turns(("system", "A"), ("user", "x"), ("system", "B"))) == "sus"


def test_documents_reach_the_template():
    assert render("{{ documents[0].text }}", documents=[{"title": "t", "text": "x"}]) == "x"
    assert render("{{ documents is none }}") == "True"


def test_a_final_message_that_the_template_drops_cannot_be_continued():
    with pytest.raises(RequestRejected, match="cannot be continued"):
        render("nothing", add_generation_prompt=False, continue_final_message=True)


def assets(config, **files):
    return {"tokenizer_config.json": json.dumps(config).encode(), **files}


def rendered(found, **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return found.render(template_input_of(decode_chat(json.dumps(body).encode())))


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
