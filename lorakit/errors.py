"""Every error lorakit raises on purpose, with its word id and exit code.

    LorakitError
    ├── CheckFailed        1   a check said no: a gate missed, a merge that does not verify
    ├── BadInput           2   wrong usage, recipe, data, template, model or adapter settings
    │   ├── RecipeError        every problem of one recipe at once, sorted by line
    │   └── UnknownMethod      an adapter method that there is not
    ├── RunFailed          3   the run failed: damaged bytes, not finite, disk full, lock held
    ├── EnvironmentLacks   4   an extra, the network, a dtype or a device is missing
    └── Interrupted       75   stopped by a signal after a checkpoint was written

Anything else that reaches the command line is a bug and exits 70. A `Notice` is a warning: rooms
return notices, the command line prints them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

BUG_EXIT_CODE = 70
BUG_ID = "bug.unexpected"


@dataclass(frozen=True)
class Place:
    """Where something stands: a file, and where known its line and column, both counted from 1."""

    file: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return ":".join(
            str(part) for part in (self.file, self.line, self.column) if part is not None
        )


class LorakitError(Exception):
    """An error with an id, a message of one sentence, a place and the next step to take."""

    exit_code: ClassVar[int]
    ids: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, id: str, message: str, *, where: Place | str | None = None, help: str | None = None
    ) -> None:
        if id not in self.ids:
            raise ValueError(f"{type(self).__name__} has no id {id!r}")
        super().__init__(message)
        self.id = id
        self.message = message
        self.where = Place(where) if isinstance(where, str) else where
        self.help = help


class CheckFailed(LorakitError):
    """A check said no; nothing is broken."""

    exit_code = 1
    ids = frozenset(
        """
        check.gate-missed check.merge check.data check.doctor plan.will-not-fit
        """.split()
    )


class BadInput(LorakitError):
    """What the user gave cannot be used; nothing was written."""

    exit_code = 2
    ids = frozenset(
        """
        usage usage.strict output.not-empty output.is-input
        recipe.not-found recipe.not-a-file recipe.empty recipe.not-a-mapping recipe.syntax
        recipe.encoding recipe.too-large recipe.alias recipe.tag recipe.bad-key
        recipe.duplicate-key recipe.unknown-key recipe.missing-key recipe.wrong-type
        recipe.out-of-range recipe.bad-choice recipe.unset-variable recipe.secret
        recipe.extends-cycle recipe.conflict recipe.invalid
        target.no-match target.bad-pattern target.rank-too-large target.nothing-trainable
        target.unsupported
        data.not-found data.not-a-file data.empty data.encoding data.compressed data.syntax
        data.not-an-object data.not-finite data.duplicate-key data.missing-column
        data.missing-field data.null data.wrong-type data.bad-messages data.bad-role
        data.no-assistant data.no-trained-tokens data.template-refused data.too-large data.too-long
        data.format-failed
        template.missing template.syntax template.unsafe template.limit template.inconsistent
        tokenizer.missing tokenizer.mismatch
        model.not-found model.bad-config model.unknown-type model.bad-index model.missing-tensor
        model.shape-mismatch model.context-too-short
        adapter.not-found adapter.missing-file adapter.bad-config adapter.unknown-type
        adapter.bad-setting adapter.bad-pattern adapter.missing-tensor adapter.unexpected-tensor
        adapter.shape-mismatch adapter.wrong-dtype adapter.wrong-base adapter.not-mergeable
        adapter.unknown-method
        checkpoint.none checkpoint.changed
        security.pickle security.remote-code security.import security.config security.path
        security.local-code
        eval.no-baseline eval.baseline-mismatch eval.no-data eval.not-computed
        """.split()
    )


class RecipeError(BadInput):
    """All problems of one recipe, each a `BadInput` with its own id and place."""

    def __init__(self, problems: Sequence[BadInput]) -> None:
        self.problems = tuple(
            sorted(problems, key=lambda p: _line_order(p.where) if p.where else ("", 0, 0))
        )
        first = self.problems[0]
        super().__init__(first.id, first.message, where=first.where, help=first.help)


class UnknownMethod(BadInput):
    """There is no adapter method of this name; `meant` is the one that was probably meant."""

    def __init__(self, id: str, message: str, *, help: str, meant: str | None = None) -> None:
        super().__init__(id, message, help=help)
        self.meant = meant


class RunFailed(LorakitError):
    """The run could not go on; what was published before is intact."""

    exit_code = 3
    ids = frozenset(
        """
        run.out-of-memory run.not-finite run.no-gradient run.worker-died run.locked
        storage.full storage.denied storage.io model.damaged model.not-finite
        adapter.damaged adapter.not-finite adapter.not-saved checkpoint.damaged
        """.split()
    )


class EnvironmentLacks(LorakitError):
    """Something outside the recipe is missing on this machine."""

    exit_code = 4
    ids = frozenset(
        """
        env.missing-package env.missing-device env.dtype env.offline env.gated checkpoint.newer
        """.split()
    )


class Interrupted(LorakitError):
    """A signal stopped the run after a checkpoint was written: safe to requeue."""

    exit_code = 75
    ids = frozenset({"run.interrupted"})


@dataclass(frozen=True)
class Notice:
    """A warning: a word id, one sentence, and where known its place and what to do."""

    id: str
    message: str
    where: Place | None = None
    help: str | None = None

    ids: ClassVar[frozenset[str]] = frozenset(
        """
        checkpoint.skipped checkpoint.inexact checkpoint.of-another output.open-to-all
        security.remote-code security.local-code
        data.dropped data.cut data.eos-untrained data.extra-fields data.overlap data.special-tokens
        data.trailing-turns data.unanswered
        adapter.base-unknown adapter.no-passport adapter.passport-changed merge.not-measured
        adapter.unknown-setting
        recipe.unusual-value recipe.no-effect
        target.uneven plan.does-not-fit run.packing-off run.optimizer run.no-offload
        run.slow-dtype
        plan.rough-estimate model.no-weights model.unused-tensors
        model.quantized-on-cpu model.experts-dense
        """.split()
    )

    def __post_init__(self) -> None:
        if self.id not in self.ids:
            raise ValueError(f"no notice has the id {self.id!r}")


def one_of(names: Iterable[str]) -> str:
    """Join names for a message: `a, b or c`."""
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else last


def _line_order(place: Place) -> tuple[str, int, int]:
    return (place.file, place.line or 0, place.column or 0)
