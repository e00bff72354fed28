"""Chat templates run where they can neither reach the process nor fill its memory.

A template is a program that comes with a model, so it is a stranger's. It gets plain data, an
immutable sandbox and bounds on the operations that make much of little; what slips through those
meets the limits of the process that it runs in (`confined`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_indent, do_round
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lorakit.errors import BadInput
from lorakit.storage.redact import printable

MAX_SOURCE = 64 << 10
MAX_LENGTH = 1 << 20  # of a text or list made by an operator
MAX_BITS = 4096  # of a whole number made by an operator
MAX_INDENT = 64
MAX_PRECISION = 32  # digits that `round` keeps

# A clock would make the training tokens depend on the day; this is the day that Llama 3's own
# template falls back to.
TODAY = date(2024, 7, 26)

_FILTERS = """
    abs attr batch capitalize count default dictsort e escape first float groupby int items join
    last length list lower map max min reject rejectattr replace reverse round safe select
    selectattr slice sort string striptags sum title trim unique upper urlencode wordcount
""".split()
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)")


_LOADING: tuple[type[nodes.Node], ...] = (
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
)


class _Limit(Exception):
    """A bound of the sandbox was reached."""


class _Names(Namespace):
    """A namespace that takes no name with an underscore in front."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"the name {name!r} on a namespace is unsafe")
        super().__setitem__(name, value)


class _Generation(Extension):
    """Let `{% generation %}` blocks through: other tools mark answers with them."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own type

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not _is_small(operator, left, right):
            raise _Limit(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _is_small(operator: str, left: Any, right: Any) -> bool:
    lengths = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
    numbers = [side for side in (left, right) if isinstance(side, int)]
    if operator == "+":
        return sum(lengths) <= MAX_LENGTH
    if operator == "%":
        return not (isinstance(left, str) and _WIDE_FORMAT.search(left))
    if lengths:
        return lengths[0] * max(numbers, default=0) <= MAX_LENGTH
    if operator == "**":
        return len(numbers) < 2 or left.bit_length() * abs(right) <= MAX_BITS
    return sum(number.bit_length() for number in numbers) <= MAX_BITS


class Template:
    """A compiled chat template."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Compile.

        Args:
            source: the template's text.
            variables: what it sees beside the messages: special tokens by name.

        Raises:
            BadInput: `template.limit` when it is too long, `template.syntax` when it is none.
        """
        if len(source) > MAX_SOURCE:
            raise _limit(f"it has {len(source):,} characters, at most {MAX_SOURCE:,} are read")
        self.source = source
        self._variables = dict(variables)
        try:
            environment = _environment()
            if any(environment.parse(source).find(kind) for kind in _LOADING):
                raise SecurityError("it loads another template")
            self._compiled = environment.from_string(source)
        except TemplateSyntaxError as error:
            message = f"the chat template cannot be read: line {error.lineno}: {error.message}"
            raise BadInput("template.syntax", printable(message, 400)) from None
        except SecurityError as error:
            raise _unsafe(error) from None
        except (_Limit, RecursionError, OverflowError, MemoryError) as error:
            raise _limit(error) from None
        except Exception as error:  # of constants that jinja computes, or of Python's own compiler
            message = f"the chat template cannot be read: {error}"
            raise BadInput("template.syntax", printable(message, 400)) from None

    def render(self, messages: Sequence[Mapping[str, str]], *, generation: bool) -> str:
        """Return the text of the messages; with `generation`, up to where an answer would begin.

        Raises:
            BadInput: `template.unsafe`, `template.limit`, or `data.template-refused` with what the
                template says against these messages.
        """
        limit = 4 * sum(len(message["content"]) for message in messages) + MAX_SOURCE
        parts, length = [], 0
        variables = self._variables | {
            "messages": messages,
            "add_generation_prompt": generation,
            # What transformers says where there are none; templates test for None.
            "tools": None,
            "documents": None,
        }
        try:
            for part in self._compiled.generate(variables):
                parts.append(part)
                length += len(part)
                if length > limit:
                    raise _Limit(f"it makes more than {limit:,} characters of these messages")
        except SecurityError as error:
            raise _unsafe(error) from None
        except (_Limit, OverflowError, RecursionError, MemoryError) as error:
            raise _limit(error) from None
        except Exception as error:
            # Whatever else a template's own code runs into is its word on these messages.
            said = error.message if isinstance(error, TemplateError) else None
            said = printable(said or f"{type(error).__name__}: {error}", 200)
            message = f"the chat template refuses the conversation: {said}"
            raise BadInput("data.template-refused", message) from None
        return "".join(parts)


def _environment() -> _Sandbox:
    """Return an environment with what transformers offers to chat templates."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters = {
        name: function for name, function in environment.filters.items() if name in _FILTERS
    }
    environment.filters |= {"tojson": _tojson, "indent": _indent, "format": _format}
    environment.filters["round"] = _round
    del environment.globals["lipsum"]
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": TODAY.strftime,
        "namespace": _Names,
    }
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML, which no model was trained on.
    if (indent or 0) > MAX_INDENT:
        raise _Limit(f"tojson: an indent of {indent}, at most {MAX_INDENT}")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if width > MAX_INDENT:
        raise _Limit(f"indent: a width of {width}, at most {MAX_INDENT}")
    return do_indent(text, width, first, blank)


def _round(
    value: Any, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common"
) -> float:
    if abs(precision) > MAX_PRECISION:
        raise _Limit(f"round: {precision} digits, at most {MAX_PRECISION}")
    return do_round(value, precision, method)


def _format(pattern: str, *values: Any) -> str:
    if _WIDE_FORMAT.search(pattern):
        raise _Limit("format: a field is too wide")
    return pattern % values


def _unsafe(error: SecurityError) -> BadInput:
    said = printable(str(error), 200)
    return BadInput("template.unsafe", f"the chat template does something unsafe: {said}")


def _limit(error: Exception | str) -> BadInput:
    said = str(error) or "it takes too much memory"  # a MemoryError says nothing
    return BadInput("template.limit", f"the chat template goes beyond a limit: {said}")
