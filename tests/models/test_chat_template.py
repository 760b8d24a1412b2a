from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate, ChatTemplateError

CHATML = """\
{%- if messages[0]['role'] != 'system' -%}
{{ bos_token + 'system\nBe brief.' + eos_token + '\n' }}
{%- endif -%}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('role ' + message.role + ' is not known') }}
    {%- endif %}
    {{- bos_token + message.role + '\n' }}{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token + '\n' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{ bos_token }}assistant
{% endif %}
"""
USER = [{"role": "user", "content": "Grüezi <b>&</b>"}]


def template(source: str = CHATML) -> ChatTemplate:
    return ChatTemplate(source, "<|im_start|>", "<|im_end|>")


def test_renders_as_transformers_does() -> None:
    prompt = template().render(USER)
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüezi <b>&</b><|im_end|>\n<|im_start|>assistant\n"
    assert prompt == expected
    assert template().render(USER, add_generation_prompt=False) == expected[: -len("<|im_start|>assistant\n")]


def test_tools_are_plain_json() -> None:
    tools = [{"type": "function", "function": {"name": "höhe", "description": "<tags> & 'quotes'"}}]
    prompt = template().render(USER, tools, add_generation_prompt=False)
    assert json.dumps(tools, ensure_ascii=False) in prompt


def test_a_template_has_loop_controls_time_and_variables() -> None:
    source = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ strftime_now('%Y') }}{{ thinking }}{% endfor %}"
    rendered = template(source).render([*USER, *USER], thinking=True)
    assert rendered[:2] == "20"
    assert rendered.endswith("True")
    assert len(rendered) == 8


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML, "role robot is not known"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ 'x' * 999999999 }}", "over .* characters"),
        ("{{ 9 ** 99999999 }}", "power"),
        ("{% for i in range(90000) %}{{ 'xxxxxxxxxx' * 10 }}{% endfor %}", "over .* characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "not done in"),
        ("{{ 1 / 0 }}", "division"),
    ],
)
def test_what_a_template_may_not_do_is_an_error(source: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason):
        template(source).render([{"role": "robot", "content": "x"}])


def test_what_is_no_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ChatTemplateError, match="not valid"):
        template("{% for %}")
    with pytest.raises(ChatTemplateError, match="at most"):
        template("x" * (MAX_TEMPLATE_BYTES + 1))
