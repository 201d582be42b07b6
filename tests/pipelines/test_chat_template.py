"""A chat template is a program that came with the checkpoint: it gets a time limit and one-line errors."""

import signal
import threading

import jinja2
import pytest

from benchmarks.miniature.parts import byte_tokenizer
from dopsd.errors import InputError
from pipelines import chat_template
from pipelines.chat_template import apply_chat_template


@pytest.fixture
def apply(monkeypatch):
    """Applies a template with a short limit."""
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)

    def call(template, content="a ball"):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        return apply_chat_template(tokenizer, content)

    return call


def test_the_chat_text_is_the_tokenizers(apply):
    tokenizer = byte_tokenizer()
    for content in ("a ball", " two\nlines \u00e9 ** ", ""):
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert apply_chat_template(tokenizer, content, enable_thinking=False) == expected
    assert apply("{# 2 ** 3 #}** {{ messages[0].content }}") == "** a ball"


ENDLESS = {
    "a long range": "{% for i in range(10**12) %}x{% endfor %}",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "only for some prompts": "{% if 'ball' in messages[0].content %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a power of a power": "{{ 10 ** 10 ** 9 }}",
    "a long text": "{{ 'x' * 10000000000000000 }}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_without_end_is_stopped(apply, case):
    with pytest.raises(
        InputError, match="^the tokenizer's chat template .*; use the tokenizer of the published"
    ) as caught:
        apply(ENDLESS[case])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    if "loops" in case:
        assert "takes more than 0.2 s" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "access to attribute '__class__' of 'str' object is unsafe",
        ),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{{ raise_exception('no\nsystem') }}", "(no system)"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ a.b.c }}", "undefined"),
        ("{% if", "unexpected"),
        ("{{ 'x' + 1 }}", "concatenate"),
        ("always the same", "drops the message"),
        (None, "chat_template is not set"),
    ],
)
def test_what_a_template_raises_is_one_line(apply, template, words):
    with pytest.raises(InputError, match="^the tokenizer's chat template ") as caught:
        apply(template)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_no_alarm_remains(apply):
    before = signal.getsignal(signal.SIGALRM)
    apply("{{ messages[0].content }}")
    with pytest.raises(InputError):
        apply(ENDLESS["loops in loops"])
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_template_is_applied_in_other_threads_without_a_limit(apply):
    results = []
    thread = threading.Thread(target=lambda: results.append(apply("{{ messages[0].content }}")))
    thread.start()
    thread.join()
    assert results == ["a ball"]


def test_a_template_that_adds_too_much_is_refused(apply):
    loop = "{{ messages[0].content }}{% for i in range(9999) %}xxxx{% endfor %}"
    with pytest.raises(InputError, match="adds 39,996 characters; use the tokenizer of the published checkpoint"):
        apply(loop)


@pytest.mark.parametrize("operation", ["'a' * 3000000000", "9 ** 9 ** 9", "x * 2"])
def test_a_template_that_multiplies_is_refused_before_it_is_applied(apply, operation):
    with pytest.raises(InputError, match="it multiplies, for which a chat has no use"):
        apply("{{ messages[0].content }}{{ " + operation + " }}")


def test_a_template_is_searched_for_products_once(apply, monkeypatch):
    searched, lex = [], jinja2.Environment.lex
    monkeypatch.setattr(jinja2.Environment, "lex", lambda self, source: searched.append(source) or lex(self, source))
    template = "{{ messages[0].content }}, searched once"
    assert [apply(template, content) for content in "ab"] == ["a, searched once", "b, searched once"]
    assert searched == [template]
