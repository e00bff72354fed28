"""`lorakit generate`: answers of an adapter, from the prompts that its training saw."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli.command import AdapterArgument, AllowRemoteCode, command
from lorakit.cli.merge import BaseOption
from lorakit.cli.screen import Screen, usage
from lorakit.cli.streams import write_result
from lorakit.errors import BadInput, Place
from lorakit.storage import strict_json
from lorakit.storage.redact import printable
from lorakit.storage.text import decode, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lorakit.adapters import Saved
    from lorakit.evaluation.generation import Decoding, Generation
    from lorakit.model.base import Base


@command
def generate(
    screen: Screen,
    adapter: AdapterArgument,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Prompts, one a line; of a .jsonl file its field `prompt`."),
    ] = None,
    base: BaseOption = None,
    system: Annotated[
        str | None, typer.Option(help="A system message; else that of the training.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base's answer too.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=1e6, help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of the likeliest tokens to draw from; else 1."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of the draws; else 0.")
    ] = None,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Answer prompts with an adapter; stdout carries the text alone."""
    texts = _texts(prompt, prompt_file)

    from lorakit import adapters
    from lorakit.cli.adapter_base import find_base

    decoding = _decoding(max_new_tokens, temperature, top_p, seed)
    saved = adapters.read(adapter)
    found = find_base(screen, saved, base, allow_remote_code=allow_remote_code)
    notice = adapters.check_base(saved, found)
    screen.notice(*saved.notices, *found.notices, *([notice] if notice else []))
    facts = _answered(screen, saved, found, texts, decoding, system=system, compare=compare)
    if screen.json:
        screen.result("", facts[0] if prompt is not None else {"generations": facts})
    else:
        # Not through rich, which would replace tabs and :names:.
        text = _safe("\n\n".join(map(_told, facts)), terminal=screen.out.is_terminal)
        write_result(f"{text}\n")


def _answered(
    screen: Screen,
    saved: "Saved",
    base: "Base",
    texts: list[str],
    decoding: "Decoding",
    *,
    system: str | None,
    compare: bool,
) -> list[dict[str, Any]]:
    """Load the model and answer all texts, with the base as well when it is compared."""
    from lorakit.adapters import attach_saved, switched_off
    from lorakit.devices import resolve_dtype
    from lorakit.evaluation import generation, prompts
    from lorakit.model.base import load
    from lorakit.model.quantized import Quantization
    from lorakit.model.sites import find_sites
    from lorakit.runtime import start

    tokenizer = _tokenizer(saved, base)
    passport: Any = saved.passport or {}
    recipe = passport.get("recipe", {})
    data = recipe.get("data", {})
    asked, ends = prompts.encode(
        texts,
        tokenizer,
        plain=saved.trained_on_text,
        system=data.get("system") if system is None else system,
        template_sha256=passport.get("template_sha256"),
        where=Place(str(saved.folder)),
    )
    device = start().device
    dtype = resolve_dtype(recipe.get("model", {}).get("dtype", "auto"), device)
    if how := base.stored or Quantization.recorded(passport):
        screen.say(f"The base is held as in training: {how}")
    model = load(base, device=device, dtype=dtype, quantization=how)
    taken = attach_saved(saved, model, find_sites(model)).positions()
    ids, stops = [one.ids for one in asked], ends | generation.stop_ids(model, tokenizer)
    with screen.progress("Generating", len(asked) * (1 + compare)) as advance:

        def answers() -> "list[Generation]":
            return generation.generate(
                model, tokenizer, ids, decoding, stops=stops, taken=taken, advance=advance
            )

        ours = answers()
        with switched_off(model):
            theirs = answers() if compare else [None] * len(ours)
    return [_facts(*one) for one in zip(texts, ours, theirs, strict=True)]


def _decoding(
    max_new_tokens: int, temperature: float, top_p: float | None, seed: int | None
) -> "Decoding":
    """Return how tokens are chosen.

    Raises:
        BadInput: `usage` when an option for draws is given, and nothing is drawn.
    """
    from lorakit.evaluation.generation import Decoding

    given = {"top_p": top_p, "seed": seed}
    asked: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    decoding = Decoding(max_new_tokens, temperature, **asked)
    if asked and decoding.is_greedy:
        option = f"--{next(iter(asked)).replace('_', '-')}"
        message = f"{option} is for draws, but --temperature {temperature:g} draws nothing"
        raise usage(message, "add --temperature 0.7, say")
    return decoding


def _texts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the prompts that were given, in one of the three ways.

    Raises:
        BadInput: when there are none, or they come in two ways.
    """
    if (prompt is None) == (file is None):
        raise usage("give a prompt, - for stdin, or --prompt-file")
    if file is None:
        return [_from_stdin() if prompt == "-" else prompt or ""]
    if file.suffix == ".jsonl":
        rows = list(strict_json.read_lines(file))
        for line, row in rows:
            if not isinstance(row.get("prompt"), str):
                message = "expected a text in the field `prompt`"
                help = 'write a row as {"prompt": "…"}'
                raise BadInput(
                    "data.missing-field", message, where=Place(str(file), line), help=help
                )
        return [row["prompt"] for _, row in rows]
    texts = [line for line in read_text(file, "data").splitlines() if line.strip()]
    if not texts:
        help = "write one prompt a line"
        raise BadInput("data.empty", "the file holds no prompts", where=str(file), help=help)
    return texts


def _from_stdin() -> str:
    """Return what stdin holds, strictly as UTF-8 as every other text.

    Raises:
        BadInput: when it does not, or stdin is closed.
    """
    if sys.stdin is None:
        raise usage("- stands for stdin, which is closed", "give the prompt itself")
    return decode(sys.stdin.buffer.read(), Place("stdin"), "data").removesuffix("\n")


def _tokenizer(saved: "Saved", base: "Base") -> "PreTrainedTokenizerBase":
    """Return the tokenizer that lies beside the adapter, the base's where there is none."""
    from lorakit.model.base import load_tokenizer
    from lorakit.model.tokenizer import VOCABULARIES, read_tokenizer

    if any((saved.folder / name).is_file() for name in VOCABULARIES):
        return read_tokenizer(
            saved.folder,
            base.config,
            code_allowed=base.remote_code,
            links_into=saved.links_into,
        )
    return load_tokenizer(base)


def _facts(prompt: str, ours: "Generation", base: "Generation | None") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": ours.text,
        "base_text": base.text if base else None,
        "tokens": len(ours.tokens),
        "stopped": ours.stopped,
    }


def _told(facts: Mapping[str, Any]) -> str:
    if facts["base_text"] is None:
        return str(facts["text"])
    return f"adapter:\n{facts['text']}\n\nbase:\n{facts['base_text']}"


def _safe(text: str, *, terminal: bool) -> str:
    """Escape what could take over a terminal; a pipe gets the text as it is."""
    if not terminal:
        return text
    return "\n".join(printable(line, 12 * len(line) + 1) for line in text.split("\n"))
