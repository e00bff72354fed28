"""Row → conversation: one function a format, named as `data.format` names it.

A format knows rows and messages, nothing of tokenizers or masks. Whoever calls one adds the place
of the row to its errors.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from lorakit.errors import BadInput, one_of
from lorakit.storage.redact import printable

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}

_NO_TEXT = (
    "write it as text, or data.format: module:function with --allow-local-code; "
    "recipes/REFERENCE.md shows one"
)
_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
# Columns that people use for these fields: what the hint of `data.missing-column` proposes.
_USUAL = {
    "prompt": "prompt question instruction input query source context document article".split(),
    "completion": "completion answer output response target summary label solution chosen".split(),
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` matters for answers alone: false leaves this one out of the loss."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, and whether they need a chat template, can do without one, or never see one."""

    messages: tuple[Message, ...]
    template: Literal["needed", "optional", "unused"] = "needed"


@dataclass(frozen=True)
class Format:
    """A format: its function, the fields a row must have, and those it may have."""

    name: str
    read: Callable[[Mapping[str, Any]], Conversation]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def messages(row: Mapping[str, Any]) -> Conversation:
    """Read a list of `{role, content}`; `weight: 0` leaves an answer out of the loss.

    >>> messages({"messages": [{"role": "user", "content": "2 + 2?"},
    ...                        {"role": "assistant", "content": "4"}]}).messages[1].content
    '4'
    """
    turns = []
    for name, turn in _turns(row, "messages", "role and content"):
        role = _text(turn, "role", name)
        if role not in ROLES:
            raise _bad_role(role, f"{name}.role", ROLES)
        weight = turn.get("weight", 1)
        if weight not in (0, 1):
            raise BadInput("data.wrong-type", f"`{name}.weight` is {weight!r}; 0 or 1 expected")
        turns.append(Message(role, _text(turn, "content", name), bool(weight)))
    return _answered(turns, "messages")


def sharegpt(row: Mapping[str, Any]) -> Conversation:
    """Read a list of `{from, value}`, human and gpt; a `system` column may stand beside it.

    >>> sharegpt({"conversations": [{"from": "human", "value": "Hi"},
    ...                             {"from": "gpt", "value": "Hello"}]}).messages[0].role
    'user'
    """
    turns = _system(row)
    for name, turn in _turns(row, "conversations", "from and value"):
        role = _text(turn, "from", name)
        if role not in SHAREGPT_ROLES:
            raise _bad_role(role, f"{name}.from", SHAREGPT_ROLES)
        turns.append(Message(SHAREGPT_ROLES[role], _text(turn, "value", name)))
    return _answered(turns, "conversations")


def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """Read a prompt and its completion: two turns, or plain text where there is no template.

    >>> [turn.role for turn in prompt_completion({"prompt": "2 + 2?", "completion": "4"}).messages]
    ['user', 'assistant']
    """
    turns = (Message("user", _text(row, "prompt")), Message("assistant", _text(row, "completion")))
    return Conversation(turns, template="optional")


def alpaca(row: Mapping[str, Any]) -> Conversation:
    r"""Read an instruction, perhaps an input to it, and the output; `system` may stand beside it.

    >>> alpaca({"instruction": "Add.", "input": "2 2", "output": "4"}).messages[0].content
    'Add.\n\n2 2'
    """
    instruction, given = _text(row, "instruction"), row.get("input") and _text(row, "input")
    asked = f"{instruction}\n\n{given}" if given else instruction
    answer = Message("assistant", _text(row, "output"))
    return Conversation((*_system(row), Message("user", asked), answer))


def text(row: Mapping[str, Any]) -> Conversation:
    """Read plain text, which is trained as a whole, without a template.

    >>> text({"text": "Once upon a time"}).template
    'unused'
    """
    return Conversation((Message("assistant", _text(row, "text")),), template="unused")


# In the order of detection: the first whose columns are all there.
FORMATS = {
    format.name: format
    for format in (
        Format("messages", messages, ("messages",)),
        Format("sharegpt", sharegpt, ("conversations",), ("system",)),
        Format("prompt_completion", prompt_completion, ("prompt", "completion")),
        Format("alpaca", alpaca, ("instruction", "output"), ("input", "system")),
        Format("text", text, ("text",)),
    )
}


def find(name: str) -> Format:
    """Return the format of this name.

    Raises:
        BadInput: `recipe.bad-choice`, with the nearest name.
    """
    if name in FORMATS:
        return FORMATS[name]
    raise BadInput(
        "recipe.bad-choice",
        f"data.format: no format has the name '{printable(name)}'; "
        f"expected auto, {', '.join(FORMATS)} or module:function",
        help=_nearest(name, FORMATS),
    )


def detect(columns: Iterable[str]) -> Format:
    """Return the format whose columns are all there.

    Raises:
        BadInput: `data.missing-column` when there is none, with the columns found and expected.
    """
    found = list(columns)
    for format in FORMATS.values():
        if set(format.required) <= set(found):
            return format
    expected = "; ".join(f"{' and '.join(f.required)} ({f.name})" for f in FORMATS.values())
    raise _missing_columns(found, expected, FORMATS["prompt_completion"].required)


def require(format: Format, columns: Iterable[str]) -> None:
    """Check that at least some row has each column that the format needs.

    Raises:
        BadInput: `data.missing-column`, with the columns found and expected.
    """
    if not set(format.required) <= set(found := list(columns)):
        expected = f"{' and '.join(format.required)} ({format.name})"
        raise _missing_columns(found, expected, format.required)


def check_mapping(
    mapping: Mapping[str, str], columns: Iterable[str], format: Format | None
) -> None:
    """Check that `columns:` names fields that a format has, and columns that the file has.

    Raises:
        BadInput: `recipe.bad-choice` for a field, `data.missing-column` for a column.
    """
    found = list(columns)
    known = [format] if format else FORMATS.values()
    fields = [field for one in known for field in one.required + one.optional]
    for field, column in mapping.items():
        if fields and field not in fields:
            raise BadInput(
                "recipe.bad-choice",
                f"columns: '{printable(field)}' is no field of a format; expected {one_of(fields)}",
                help=_nearest(field, fields),
            )
        if column not in found:
            raise BadInput(
                "data.missing-column",
                f"columns: there is no column '{printable(column)}'; found {_listed(found)}",
                help=_nearest(column, found),
            )


def renamed(row: dict[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with each mapped column under the name of its field.

    >>> renamed({"question": "2 + 2?", "id": 7}, {"prompt": "question"})
    {'id': 7, 'prompt': '2 + 2?'}
    """
    if not mapping:
        return row
    rest = {name: value for name, value in row.items() if name not in mapping.values()}
    return rest | {field: row[column] for field, column in mapping.items() if column in row}


def extra_fields(row: Mapping[str, Any], format: Format) -> set[str]:
    """Return the fields that the format does not read, those of turns as `messages[].name`."""
    extra = set(row) - {*format.required, *format.optional}
    read = {"messages": {"role", "content", "weight"}, "conversations": {"from", "value"}}
    for name in read.keys() & set(format.required):
        turns = row.get(name)
        if isinstance(turns, list):
            keys = {key for turn in turns if isinstance(turn, dict) for key in turn}
            extra |= {f"{name}[].{key}" for key in keys - read[name]}
    return extra


def type_name(value: Any) -> str:
    """Say what a value is, in the words of JSON."""
    other = "a number" if isinstance(value, int | float) else "no JSON value"
    return _TYPES.get(type(value), other)


def _text(row: Mapping[str, Any], field: str, within: str = "") -> str:
    name = f"{within}.{field}" if within else field
    if field not in row:
        raise BadInput("data.missing-field", f"there is no field `{name}`; text expected")
    value = row[field]
    if value is None:
        raise BadInput("data.null", f"`{name}` is null; text expected")
    if not isinstance(value, str):
        message = f"`{name}` is {type_name(value)}; text expected"
        raise BadInput("data.wrong-type", message, help=_NO_TEXT)
    return value


def _turns(
    row: Mapping[str, Any], field: str, parts: str
) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Yield each turn with its name, such as `messages[2]`."""
    expected = f"a list of objects with {parts} expected"
    if field not in row:
        raise BadInput("data.missing-field", f"there is no field `{field}`; {expected}")
    value = row[field]
    if value is None:
        raise BadInput("data.null", f"`{field}` is null; {expected}")
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type_name(value)
        raise BadInput("data.bad-messages", f"`{field}` is {found}; {expected}")
    for index, turn in enumerate(value):
        name = f"{field}[{index}]"
        if not isinstance(turn, dict):
            raise BadInput("data.bad-messages", f"`{name}` is {type_name(turn)}; {expected}")
        yield name, turn


def _system(row: Mapping[str, Any]) -> list[Message]:
    return [Message("system", _text(row, "system"))] if row.get("system") else []


def _answered(turns: list[Message], field: str) -> Conversation:
    if all(turn.role != "assistant" for turn in turns):
        raise BadInput("data.no-assistant", f"`{field}` has no assistant turn to learn from")
    return Conversation(tuple(turns))


def _bad_role(role: str, name: str, roles: Iterable[str]) -> BadInput:
    message = f"`{name}` is '{printable(role)}'; expected {one_of(roles)}"
    return BadInput("data.bad-role", message)


def _missing_columns(found: list[str], expected: str, fields: Iterable[str]) -> BadInput:
    spare = list(found)
    hint = {}
    for field in fields:
        usual = [column for column in _USUAL.get(field, ()) if column in spare] or spare
        if usual:
            hint[field] = usual[0]
            spare.remove(usual[0])
    pairs = ", ".join(f"{field}: {printable(column)}" for field, column in hint.items())
    return BadInput(
        "data.missing-column",
        f"columns found: {_listed(found)}; columns expected: {expected}",
        help=f"say which column is which: `columns: {{{pairs}}}`" if pairs else None,
    )


def _nearest(name: str, names: Iterable[str]) -> str | None:
    near = get_close_matches(name, list(names), n=1)
    return f"did you mean '{printable(near[0])}'?" if near else None


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(printable(name, 40) for name in names[:20])
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "none"
