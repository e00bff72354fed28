"""Measure a model with its adapter on and off, in the same process, over the same batches."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorakit.adapters import switched_off
from lorakit.data.batches import eval_batches
from lorakit.data.tokens import Example, Prompt
from lorakit.errors import BadInput
from lorakit.evaluation.generation import Decoding, Generation, generate, stop_ids
from lorakit.evaluation.metrics import Tally, from_marks, from_scores, is_json, matches
from lorakit.evaluation.results import Measured, Results
from lorakit.recipe.sections import GENERATED, Eval
from lorakit.scoring import RowScore, score
from lorakit.storage.strict_json import dumps_line


@dataclass(frozen=True)
class Task:
    """What is measured: rows to score, prompts to answer, and the recipe's section.

    `packing` says whether scored rows may share a sequence; `stops` are ids that end an answer
    besides those of the tokenizer and of the generation settings; `taken` are the positions that
    the adapter stands on.
    """

    examples: Sequence[Example]
    prompts: Sequence[Prompt]
    section: Eval
    stops: frozenset[int]
    seed: int = 0
    packing: bool = True
    taken: int = 0

    @property
    def scores(self) -> bool:
        """Whether rows are scored for any metric."""
        return bool(set(self.section.metrics) - GENERATED)

    @property
    def generates(self) -> bool:
        """Whether prompts are answered for any metric."""
        return bool(set(self.section.metrics) & GENERATED)

    @property
    def sha256(self) -> str:
        """The digest of the rows: figures over other rows are not comparable."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.ids.tobytes() + example.labels.tobytes())
        for prompt in self.prompts:
            digest.update(dumps_line([prompt.ids, prompt.reference]).encode())
        return digest.hexdigest()

    @property
    def size(self) -> int:
        """The rows that one measurement goes over."""
        return self.scores * len(self.examples) + self.generates * len(self.prompts)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    base_only: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Results:
    """Compute the recipe's metrics of the model with its adapter and without.

    Order and batches are fixed, so that the same machine gives the same bits again. `advance`
    hears how many more rows are done.

    Raises:
        BadInput: `eval.no-data` when there is no row to score or to answer.
    """
    if (task.scores and not task.examples) or (task.generates and not task.prompts):
        wanted = "rows to score" if task.scores and not task.examples else "prompts to answer"
        raise BadInput("eval.no-data", f"there are no {wanted}", help="set eval.data or data.eval")
    model.train(False)

    def measure() -> Measured:
        scores = _scored(model, task, advance) if task.scores else []
        answers = _answered(model, tokenizer, task, advance) if task.generates else []
        metrics: dict[str, Tally] = {
            name: _tally(name, task, scores, answers) for name in task.section.metrics
        }
        return Measured(metrics, answers)

    adapter = None if base_only else measure()
    with switched_off(model):
        base = measure()
    return Results(adapter, base, [example.place for example in task.examples], task.prompts)


def _scored(model: PreTrainedModel, task: Task, advance: Callable[[int], None]) -> list[RowScore]:
    found: list[RowScore] = []
    for batch in eval_batches(task.examples, packing=task.packing):
        found += score(model, [batch])
        advance(len(batch.rows))
    return sorted(found, key=lambda one: one.row)


def _answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    advance: Callable[[int], None],
) -> list[Generation]:
    how = task.section.generate
    decoding = Decoding(how.max_new_tokens, how.temperature, seed=task.seed)
    prompts = [prompt.ids for prompt in task.prompts]
    stops = task.stops | stop_ids(model, tokenizer)
    return generate(
        model, tokenizer, prompts, decoding, stops=stops, taken=task.taken, advance=advance
    )


def _tally(
    name: str, task: Task, scores: Sequence[RowScore], answers: Sequence[Generation]
) -> Tally:
    if name not in GENERATED:
        return from_scores(name, scores)
    if name == "stop_rate":
        return from_marks([answer.stopped for answer in answers])
    if name == "json_valid":
        return from_marks([is_json(answer.text) for answer in answers])
    normalize = task.section.normalize
    return from_marks(
        [
            matches(answer.text, prompt.reference, normalize)
            for answer, prompt in zip(answers, task.prompts, strict=True)
        ]
    )
