"""`lorakit data`: look at the rows a recipe trains on, before it trains. Reads no weights.

The sets are those of the recipe: `train` and `eval` as training has them, from `data`, and `test`,
the rows of `eval.data`, which `lorakit eval` measures.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit.cli.command import AllowLocalCode, AllowRemoteCode, RecipeArgument, SetOption, command
from lorakit.cli.screen import Screen, usage
from lorakit.errors import CheckFailed
from lorakit.storage.redact import printable

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from lorakit.data.prepare import Dataset
    from lorakit.data.preview import Sample, Span
    from lorakit.recipe.sections import Recipe

# Findings that `data check` says no to; the other notices are remarks.
FINDINGS = frozenset("data.dropped data.cut data.eos-untrained data.overlap".split())
WIDEST_BAR = 40

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Split = Annotated[
    Literal["train", "eval", "test"],
    typer.Option("--split", help="Which set to look at; test: the rows of eval.data."),
]


@app.command("preview")
@command
def data_preview(
    screen: Screen,
    recipe: RecipeArgument = "",
    count: Annotated[int, typer.Option("-n", min=1, help="How many rows.")] = 3,
    index: Annotated[int | None, typer.Option("--index", min=0, help="Only this row.")] = None,
    split: Split = "train",
    ids: Annotated[bool, typer.Option("--ids", help="Show the token ids as well.")] = False,
    changes: SetOption = None,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Show rows as the model sees them: what is trained, what is masked, where they end."""
    from rich.console import Group

    from lorakit.data.items import Request, read
    from lorakit.data.prepare import longest_allowed, renderer_of
    from lorakit.data.preview import samples

    loaded, tokenizer, context = _opened(screen, recipe, changes, allow_remote_code)
    section, folder = loaded.data, loaded.origin.folder
    given = {"eval": ("data.eval", section.eval), "test": ("eval.data", loaded.eval.data)}
    key, sources = given.get(split, ("data.train", section.train))
    if not sources:
        raise usage(f"--split {split}: the recipe has no {key}")
    request = Request.of(
        loaded,
        offline=screen.offline,
        allow_local_code=allow_local_code,
        eval_sources=loaded.eval.data if split == "test" else None,
        only="train" if split == "train" else "eval",
    )
    found = read(request)
    rows = found.train if split == "train" else found.eval
    first = index or 0
    if first >= len(rows):
        raise usage(f"--split {split} has {len(rows)} rows; there is no row {first}")
    chosen = rows[first : first + (count if index is None else 1)]
    renderer = renderer_of(section, tokenizer, folder)
    max_length = longest_allowed(section, context)
    shown = list(samples(chosen, renderer, tokenizer, max_length))
    screen.notice(*found.notices)
    parts = [_shown(sample, section.too_long, ids=ids, color=screen.color) for sample in shown]
    screen.result(
        Group(_legend(color=screen.color), *parts), {"samples": [_facts(one) for one in shown]}
    )


@app.command("stats")
@command
def data_stats(
    screen: Screen,
    recipe: RecipeArgument = "",
    changes: SetOption = None,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Count rows and tokens: lengths, share trained, what is dropped, what packing saves."""
    from rich.text import Text

    dataset, test = _prepared(screen, recipe, changes, allow_local_code, allow_remote_code)
    screen.notice(*dataset.notices, *(test.notices if test else ()))
    lines, facts = dataset.report.lines(), dataset.report.facts()
    if test:
        lines += test.report.lines(held_out="test")
        facts["test"] = test.report.facts()["eval"]
    lines += _histogram(dataset.train.lengths.tolist())
    screen.result(Text("\n".join(lines)), facts)


@app.command("check")
@command
def data_check(
    screen: Screen,
    recipe: RecipeArgument = "",
    changes: SetOption = None,
    allow_local_code: AllowLocalCode = False,
    allow_remote_code: AllowRemoteCode = False,
) -> None:
    """Say no (exit 1) when rows are lost, answers do not end, or train overlaps another set."""
    from rich.text import Text

    from lorakit.data.prepare import overlapping, shared_rows

    dataset, test = _prepared(screen, recipe, changes, allow_local_code, allow_remote_code)
    notices = [*dataset.notices, *(test.notices if test else ())]
    if test and (overlap := shared_rows(dataset.train, test.eval)):
        notices.append(overlapping("test", overlap, len(test.eval)))
    screen.notice(*(notice for notice in notices if notice.id not in FINDINGS))
    findings = [notice for notice in notices if notice.id in FINDINGS]
    lines = [f"no  {notice.id}: {notice.message}" for notice in findings]
    exit = CheckFailed.exit_code if findings else 0
    said = "with the warnings above" if screen.notices else "nothing found"
    facts = {"findings": [{"id": one.id, "message": one.message} for one in findings]}
    screen.result(Text("\n".join(lines) or f"ok  {said}"), facts, exit=exit)
    if exit:
        if screen.json:
            raise typer.Exit(exit)
        raise CheckFailed("check.data", f"{len(findings)} findings, see above")


def _opened(
    screen: Screen, recipe: str, changes: Sequence[str] | None, allow_remote_code: bool
) -> "tuple[Recipe, PreTrainedTokenizerBase, int | None]":
    """Return the recipe, the base's tokenizer and the positions that there are for a row."""
    from lorakit import adapters
    from lorakit.cli.recipe_argument import base_of, read_recipe
    from lorakit.model import base

    loaded = read_recipe(screen, recipe, changes)
    found = base_of(screen, loaded, allow_remote_code=allow_remote_code)
    screen.notice(*found.notices)
    method = adapters.get(loaded.adapter.method)(loaded.adapter)
    return loaded, base.load_tokenizer(found), method.context(found.context)


def _prepared(
    screen: Screen,
    recipe: str,
    changes: Sequence[str] | None,
    allow_local_code: bool,
    allow_remote_code: bool,
) -> "tuple[Dataset, Dataset | None]":
    """Return what training reads, and the rows of `eval.data` where the recipe has them."""
    from lorakit.data.cache import prepared
    from lorakit.data.items import Request
    from lorakit.environment import cache_folder

    loaded, tokenizer, context = _opened(screen, recipe, changes, allow_remote_code)
    request = Request.of(loaded, offline=screen.offline, allow_local_code=allow_local_code)
    with screen.progress("Reading the data", None) as advance:
        dataset = prepared(cache_folder(), request, tokenizer, context, advance)
        if not loaded.eval.data:
            return dataset, None
        request = replace(request, eval_sources=loaded.eval.data, only="eval")
        return dataset, prepared(cache_folder(), request, tokenizer, context, advance)


def _legend(*, color: bool) -> "Text":
    from rich.text import Text

    if not color:
        return Text("⟦trained⟧ masked  ⏎ line end")
    parts = [("trained", "green"), ("masked", "dim"), ("special", "reverse")]
    legend = Text("  ").join(Text(name, style) for name, style in parts)
    return legend.append("  ⏎ line end")


def _shown(sample: "Sample", too_long: str, *, ids: bool, color: bool) -> "Text":
    """Lay one sample out: its text, its ids when asked for, and a line of facts."""
    from rich.text import Text

    text = Text("\n").append(f"{sample.place}\n", "bold" if color else "")
    trained = False
    for span in sample.spans:
        if not color and span.trained != trained:
            text.append("⟦" if span.trained else "⟧")
        trained = span.trained
        text.append(_visible(span.text), _style(span) if color else "")
    text.append("⟧" if trained and not color else "")
    if ids:
        text.append("\nids: " + " ".join(map(str, sample.ids)))
    cut = len(sample.ids) - sample.kept
    over = f", {cut:,} over max_length ({too_long})" if cut else ""
    end = "ends" if sample.ends_in_stop else "does NOT end"
    text.append(
        f"\n{len(sample.ids):,} tokens{over}, {sample.trained:,} trained, "
        f"{end} in a trained stop token"
    )
    return text


def _style(span: "Span") -> str:
    return f"{'green' if span.trained else 'dim'}{' reverse' if span.special else ''}"


def _visible(text: str) -> str:
    """Escape what could move the cursor; line ends are shown and made."""
    return "⏎\n".join(printable(line, 12 * len(line) + 1) for line in text.split("\n"))


def _facts(sample: "Sample") -> dict[str, Any]:
    return {
        "file": sample.place.file,
        "line": sample.place.line,
        "ids": list(sample.ids),
        "labels": list(sample.labels),
        "text": sample.text,
        "trained": sample.trained,
        "kept": sample.kept,
        "ends_in_stop": sample.ends_in_stop,
    }


def _histogram(lengths: Sequence[int], bins: int = 8) -> list[str]:
    """Return one line for each eighth of the longest row: how many rows are about so long."""
    width = -(-max(lengths) // bins)
    counts = [0] * bins
    for length in lengths:
        counts[(length - 1) // width] += 1
    most = max(counts)
    return [
        f"{at * width + 1:>7,} - {(at + 1) * width:>7,}  {count:>8,}  "
        f"{'█' * round(WIDEST_BAR * count / most)}"
        for at, count in enumerate(counts)
    ]
