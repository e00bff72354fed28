"""Templates that would take for ever, or all memory, are ended; others answer as in the sandbox."""

import os
import time

import pytest

from lorakit.data import confined
from lorakit.data.confined import ConfinedTemplate
from lorakit.data.sandbox import Template
from lorakit.errors import BadInput

TURNS = [{"role": "user", "content": "Grüße, \u202e\ufdd0 'ab' \ud800?"}]
SOURCE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("generation", [False, True])
def test_the_text_is_that_of_the_sandbox(generation: bool) -> None:
    templates = [kind(SOURCE, {"bos_token": "<s>"}) for kind in (Template, ConfinedTemplate)]
    first, second = (one.render(TURNS, generation=generation) for one in templates)
    assert first == second
    assert first.startswith("<s>user: Grüße")


def test_several_templates_share_a_child() -> None:
    one, other = ConfinedTemplate("one", {}), ConfinedTemplate("other", {})
    child = confined._workers[os.getpid()]
    assert one.render(TURNS, generation=False) == "one"
    assert other.render(TURNS, generation=False) == "other"
    assert confined._workers[os.getpid()] is child


@pytest.mark.parametrize(
    ("source", "id"),
    [
        ("{% for", "template.syntax"),
        ("{{ ''.__class__.__mro__ }}", "template.unsafe"),
        ("{{ 10 ** (10 ** 7) }}", "template.limit"),
        ("{{ raise_exception('no') }}", "data.template-refused"),
    ],
)
def test_refusals_are_those_of_the_sandbox(source: str, id: str) -> None:
    with pytest.raises(BadInput) as caught:
        ConfinedTemplate(source, {}).render(TURNS, generation=False)
    assert caught.value.id == id


@pytest.mark.slow  # each takes the processor time that it may
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
        "{% endfor %}{{ n.x | tojson }}",
    ],
)
def test_what_takes_too_much_is_ended_and_the_next_template_works(source: str) -> None:
    earlier = ConfinedTemplate(SOURCE, {"bos_token": ""})
    began = time.process_time()
    with pytest.raises(BadInput) as caught:
        ConfinedTemplate(source, {}).render(TURNS, generation=False)
    assert caught.value.id == "template.limit"
    assert time.process_time() - began < 1, "it ran in this process"
    assert earlier.render(TURNS, generation=False).startswith("user:")


def test_a_fork_has_a_child_of_its_own() -> None:
    template = ConfinedTemplate("mine", {})
    pid = os.fork()
    if not pid:
        same = template.render(TURNS, generation=False) == "mine"
        confined._workers[os.getpid()].close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert template.render(TURNS, generation=False) == "mine"


def test_a_fault_of_the_child_is_no_limit() -> None:
    with pytest.raises(RuntimeError, match="status 1"):
        ConfinedTemplate(5, {})  # type: ignore[arg-type]
    assert ConfinedTemplate("on", {}).render(TURNS, generation=False) == "on"


def test_renderings_have_a_pace_together(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = ConfinedTemplate(
        "{% for i in range(300) %}{% for j in range(300) %}{{ i * j }}{% endfor %}{% endfor %}", {}
    )
    quick = ConfinedTemplate("quick", {})
    monkeypatch.setattr(confined, "ALLOWANCE", 0.02)
    monkeypatch.setattr(confined, "PACE", 0.002)
    turns = [{"role": "user", "content": "x" * 100_000}]
    for _ in range(30):
        quick.render(turns, generation=False)

    def render_all() -> None:
        for _ in range(30):
            slow.render(turns, generation=False)

    with pytest.raises(BadInput, match=r"renderings took .* at most 2 ms each") as caught:
        render_all()
    assert caught.value.id == "template.limit"
