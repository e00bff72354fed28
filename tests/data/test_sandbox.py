"""What a chat template may not do, and that what it may do is what transformers lets it do."""

from pathlib import Path
from typing import Any

import pytest

from lorakit.data.formats import Conversation, Message
from lorakit.data.sandbox import MAX_SOURCE, Template
from lorakit.data.template import Renderer
from lorakit.errors import BadInput
from tests.data.given import LLAMA3, MISTRAL, STRIPPING, base_tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("source", "id"),
    [
        ("{{ cycler.__init__.__globals__ }}", "template.unsafe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "template.unsafe"),
        ("{{ messages.append(1) }}", "template.unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "template.unsafe"),
        ("{{ 'a' * 10**9 }}", "template.limit"),
        ("{{ [0] * 3 * 10**8 }}", "template.limit"),
        ("{{ 10**(10**7) }}", "template.limit"),
        ("{{ '%1000000000d' % 1 }}", "template.limit"),
        ("{{ '%1000000000d' | format(1) }}", "template.limit"),
        ("{{ 'a' | indent(10**9, true) }}", "template.limit"),
        ("{{ messages | tojson(indent=10**9) }}", "template.limit"),
        ("{% for i in range(10**6) %}{% endfor %}", "template.limit"),
        (
            "{% for i in range(999) %}{% for j in range(999) %}aaaa{% endfor %}{% endfor %}",
            "template.limit",
        ),
        ("{# " + "a" * MAX_SOURCE + " #}", "template.limit"),
        ("{% if %}", "template.syntax"),
        ("{{ 1 | nosuchfilter }}", "template.syntax"),
        ("{{ raise_exception('not like this') }}", "data.template-refused"),
        ("{{ messages[7].role.x }}", "data.template-refused"),
        ("{{ 1 / 0 }}", "data.template-refused"),
        ("{% include 'other' %}", "template.unsafe"),
        ("{{ lipsum() }}", "data.template-refused"),
    ],
)
def test_refused(source: str, id: str) -> None:
    with pytest.raises(BadInput) as caught:
        Template(source, {}).render(TURNS, generation=False)
    assert caught.value.id == id
    assert "template" in caught.value.message
    assert (id != "template.unsafe") or "unsafe" in caught.value.message
    assert (id != "data.template-refused") or ": " in caught.value.message


HELPERS = (
    "{{ messages | tojson }}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{% set ns = namespace(n=1) %}"
    "{% set ns.n = ns.n + 2 %}{{ ns.n }}{{ dict(a=1) | tojson(indent=2) }}{{ eos_token }}\n"
    "{{ 'a\nb' | indent(2) }}{{ '%s-%s' | format(1, 2) }}{% if tools is not none %}tools{% endif %}"
    "  {% if add_generation_prompt %}go{% endif %}\n{{ 'x' * 3 }}{{ '%s!' % 'y' }}"
)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, LLAMA3, MISTRAL, STRIPPING, HELPERS])
@pytest.mark.parametrize("generation", [False, True])
def test_renders_as_transformers_does(source: str, generation: bool) -> None:
    tokenizer = base_tokenizer()
    expected: Any = tokenizer.apply_chat_template(
        TURNS, chat_template=source, tokenize=False, add_generation_prompt=generation
    )
    template = Template(source, tokenizer.special_tokens_map)
    assert template.render(TURNS, generation=generation) == expected


def test_the_day_does_not_change_the_tokens() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    assert Template(source, {}).render(TURNS, generation=False) == "26 Jul 2024"


def test_choosing(tmp_path: Any) -> None:
    tokenizer = base_tokenizer()
    assert Renderer(tokenizer).template is None
    tokenizer.chat_template = {"default": "d", "tool_use": "t"}
    chosen = Renderer(tokenizer).template
    assert chosen is not None
    assert chosen.source == "d"
    assert Renderer(tokenizer, chat_template="none").template is None
    (tmp_path / "own.jinja").write_text("mine")
    own = Renderer(tokenizer, chat_template="own.jinja", folder=tmp_path).template
    assert own is not None
    assert own.source == "mine"
    for name, id in {"chatm": "recipe.bad-choice", "gone.jinja": "data.not-found"}.items():
        with pytest.raises(BadInput) as caught:
            Renderer(tokenizer, chat_template=name, folder=tmp_path)
        assert caught.value.id == id


def test_what_a_template_does_wrong_names_the_template_as_well_as_the_row(tmp_path: Path) -> None:
    for name, text in (("refuses", "{{ nothing.at.all }}"), ("loops", "{{ 'a' * 10 ** 9 }}")):
        (tmp_path / f"{name}.jinja").write_text(text)
        renderer = Renderer(tiny_tokenizer(), chat_template=f"{name}.jinja", folder=tmp_path)
        with pytest.raises(BadInput) as caught:
            renderer.render(Conversation((Message("user", "?"), Message("assistant", "!"))))
        assert caught.value.help == f"the chat template is {tmp_path / name}.jinja"


def test_a_template_that_is_not_there_is_said_to_be_relative_to_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        Renderer(tiny_tokenizer(), chat_template="none.jinja", folder=tmp_path)
    assert "paths are relative to the folder of the recipe" in str(caught.value.help)
