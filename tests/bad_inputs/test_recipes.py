"""Recipes that people get wrong: every one has its id, its place and its words."""
# ruff: noqa: E501  # a table: one row a line

import os
from collections.abc import Callable

import pytest

from tests.bad_inputs.cases import MINIMAL, Case, World, check_refused

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)

SECRET = "hf_" + "Q" * 34

# What the recipe says, where the problem is (from a colon on: in the recipe; None: nowhere), its id, parts of the message.
TEXTS: dict[str, tuple[str | bytes, str | None, str, tuple[str, ...]]] = {
    'R03 nothing': ("", '', 'recipe.empty', ('empty', 'model', 'data')),
    'R03 comments': ("# a\n# b\n", '', 'recipe.empty', ('empty', 'model', 'data')),
    'R03 markers': ("---\n", '', 'recipe.empty', ('empty',)),
    'R04 number': ("42", ':1:1', 'recipe.not-a-mapping', ('mapping', 'number')),
    'root is a list': ("- a\n- b", ':1:1', 'recipe.not-a-mapping', ('mapping', 'list')),
    'root is text': ("model", ':1:1', 'recipe.not-a-mapping', ('mapping', 'text')),
    'R05': ("model: a\ntrain:\n\tepochs: 1\n", ':3:1', 'recipe.syntax', ('tab', '3')),
    'R05 behind spaces': ("train:\n  seed: 1\n \tepochs: 1\n", ':3:2', 'recipe.syntax', ('tab',)),
    'R06': (MINIMAL + "train:\n  learning_rate: 1\n  epochs: 1\n  learning_rate: 2\n", ':7:3', 'recipe.duplicate-key', ('train.learning_rate', 'twice', '5')),
    'R06 quoted': (MINIMAL + '"seed": 1\nseed: 1\n', ':5:1', 'recipe.duplicate-key', ('seed', 'twice', '4')),
    'R07': (MINIMAL + "train:\n  learning_ratee: 1\n", ':5:3', 'recipe.unknown-key', ('train.learning_ratee', "did you mean 'learning_rate'")),
    'R08': (MINIMAL + "train:\n  learning_rate: fast\n", ':5:18', 'recipe.wrong-type', ('train.learning_rate', 'number', 'fast')),
    'R09 zero': (MINIMAL + "train: {learning_rate: 0}", ':4:24', 'recipe.out-of-range', ('train.learning_rate', 'greater than 0')),
    'R09 negative': (MINIMAL + "train: {learning_rate: -1e-4}", ':4:24', 'recipe.out-of-range', ('greater than 0', '-0.0001')),
    'infinite': (MINIMAL + "train: {learning_rate: .inf}", ':4:24', 'recipe.out-of-range', ('finite',)),
    'overflow': (MINIMAL + "train: {learning_rate: 1e999}", ':4:24', 'recipe.out-of-range', ('finite',)),
    'R10 epochs': (MINIMAL + "train: {epochs: 0}", ':4:17', 'recipe.out-of-range', ('train.epochs', 'greater than 0')),
    'R10 steps': (MINIMAL + "train: {max_steps: 0}", ':4:20', 'recipe.out-of-range', ('train.max_steps', 'greater than 0')),
    'epochs without end': (MINIMAL + "train: {epochs: 1e308}", ':4:17', 'recipe.out-of-range', ('train.epochs', 'must be at most 1000000, got 1e+308')),
    'samples without end': ("model: model\ndata: {train: {path: rows.jsonl, max_samples: " + "9" * 29 + "}}", ':2:47', 'recipe.out-of-range', ('data.train.max_samples', 'at most 1000000000000000')),
    'positions without end': (MINIMAL + "adapter: {method: prefix, tokens: " + "9" * 29 + "}", ':4:35', 'recipe.out-of-range', ('adapter.tokens', 'at most 1000000')),
    'R11': (MINIMAL + "train: {batch_size: true}", ':4:21', 'recipe.wrong-type', ('train.batch_size', 'integer', 'boolean true')),
    'R11 fraction': (MINIMAL + "train: {batch_size: 1.5}", ':4:21', 'recipe.wrong-type', ('integer', '1.5')),
    'R11 point zero': (MINIMAL + "train: {batch_size: 16.0}", ':4:21', 'recipe.wrong-type', ('integer', 'did you mean 16?')),
    'R12 zero': (MINIMAL + "adapter: {rank: 0}", ':4:17', 'recipe.out-of-range', ('adapter.rank', 'positive integer')),
    'R12 negative': (MINIMAL + "adapter: {rank: -1}", ':4:17', 'recipe.out-of-range', ('positive integer', '-1')),
    'R12 quoted': (MINIMAL + 'adapter: {rank: "8"}', ':4:17', 'recipe.wrong-type', ('positive integer', "'8'", 'did you mean 8?')),
    'R14 one': (MINIMAL + "adapter: {dropout: 1.0}", ':4:20', 'recipe.out-of-range', ('adapter.dropout', '[0, 1)')),
    'R14 two': (MINIMAL + "adapter: {dropout: 2}", ':4:20', 'recipe.out-of-range', ('must be in [0, 1), got 2; did you mean 0.02?',)),
    'R15': (MINIMAL + "adapter: {target_modules: []}", ':4:27', 'recipe.out-of-range', ('adapter.target_modules', 'all-linear')),
    'R17': ('a: !!python/object/apply:os.system ["id"]', ':1:4', 'recipe.tag', ('!!python/object/apply:os.system', 'plain YAML')),
    'R17 own': ("a: !x 1", ':1:4', 'recipe.tag', ('!x',)),
    'R17 harmless': ("a: !!float 1", ':1:4', 'recipe.tag', ('!!float',)),
    'R18': (BOMB, ':1:5', 'recipe.alias', ('anchor', 'extends')),
    'R18 self': ("&a a: *a", ':1:1', 'recipe.alias', ('anchor',)),
    'R19': ("a: " + "[" * 1000, ':1:68', 'recipe.too-large', ('nested', '64')),
    'R19 mappings': ("a: " + "{a: " * 70, ':1:260', 'recipe.too-large', ('nested', '64')),
    'too many values': ("a: [" + "1, " * 10_001 + "]", ':1:29996', 'recipe.too-large', ('10,000',)),
    'R20': (MINIMAL + "train: {epochs: 2024-13-45}", ':4:17', 'recipe.wrong-type', ('train.epochs', 'number', '2024-13-45')),
    'no': (MINIMAL + "merge: {enabled: no}", ':4:18', 'recipe.wrong-type', ('true', 'false', "'no'", 'did you mean false?')),
    'minutes': (MINIMAL + "seed: 12:30", ':4:7', 'recipe.wrong-type', ('integer', "'12:30'")),
    'octal': (MINIMAL + "seed: 010", ':4:7', 'recipe.wrong-type', ('integer', "'010'")),
    'hexadecimal': (MINIMAL + "seed: 0x10", ':4:7', 'recipe.wrong-type', ('integer', "'0x10'")),
    'long number': (MINIMAL + "seed: " + "1" * 5000, ':4:7', 'recipe.too-large', ('seed', '5000', '100')),
    'R21 latin-1': (b"model: caf\xe9\n", ':1', 'recipe.encoding', ('UTF-8', 'offset 10', '0xE9')),
    'R21 utf-16': ("model: x".encode("utf-16"), ':1', 'recipe.encoding', ('UTF-8', 'UTF-16', 'offset 0')),
    'utf-16 without a mark': ((MINIMAL).encode("utf-16-le"), ':1', 'recipe.encoding', ('UTF-8', 'looks like UTF-16')),
    'utf-16 the other way around': ((MINIMAL).encode("utf-16-be"), ':1', 'recipe.encoding', ('looks like UTF-16',)),
    'dropout that leaves nothing': (MINIMAL + "adapter: {dropout: 0.9999999999999}", ':4:20', 'recipe.out-of-range', ('adapter.dropout', 'at most 0.99', 'too little is left')),
    'control character': (MINIMAL + "seed: \x07", ':4:7', 'recipe.encoding', ('U+0007',)),
    'surrogate': (MINIMAL + 'output_dir: "\\ud800"', ':4:13', 'recipe.encoding', ('output_dir',)),
    'NUL': (MINIMAL + 'output_dir: "a\\0"', ':4:13', 'recipe.encoding', ('output_dir',)),
    'two documents': (MINIMAL + "---\nseed: 1", ':4:1', 'recipe.syntax', ('second document',)),
    'key that is a number': (MINIMAL + "train: {1: 2}", ':4:9', 'recipe.bad-key', ('text', '1')),
    'key that is a list': (MINIMAL + "? [a]\n: b\n", ':4:3', 'recipe.bad-key', ('text', 'list')),
    'open quote': (MINIMAL + "seed: 'a", ':4:9', 'recipe.syntax', ('quote', 'closed')),
    'open bracket': (MINIMAL + "eval: {metrics: [loss\n", ':5:1', 'recipe.syntax', ("']'",)),
    'colon in text': (MINIMAL + "output_dir: a: b", ':4:14', 'recipe.syntax', ('quote',)),
    'indentation': (MINIMAL + "train:\n  seed: 1\n epochs: 1\n", ':6:2', 'recipe.syntax', ('indentation',)),
    'gate as YAML reads it': (MINIMAL + "eval: \n  x: >= 5\n", ':5:7', 'recipe.syntax', ('quotes',)),
    'escape': (MINIMAL + 'output_dir: "\\q"', ':4:15', 'recipe.syntax', ('escape',)),
    'escape out of range': (MINIMAL + 'output_dir: "\\U00110000"', ':4:16', 'recipe.syntax', ('range',)),
    'missing': ("model: a\ndata: {}\n", ':2:1', 'recipe.missing-key', ('data.train', 'missing')),
    'no data': ("model: a\n", ':1:1', 'recipe.missing-key', ('data', 'missing')),
    'section without keys': (MINIMAL + "train:\n", ':4:7', 'recipe.wrong-type', ('train', 'mapping', 'null')),
    'choice': (MINIMAL + "merge: {enabled: true, dtype: bf61}", ':4:31', 'recipe.bad-choice', ('merge.dtype', "one of keep, bf16, fp16 or fp32, got 'bf61'", "did you mean 'bf16'?")),
    'wrong block': (MINIMAL + "learning_rate: 1\n", ':4:1', 'recipe.unknown-key', ('`learning_rate` belongs under `train:`',)),
    'wrong block, adapter': (MINIMAL + "alpha: 1\n", ':4:1', 'recipe.unknown-key', ('`alpha` belongs under `adapter:`',)),
    'wrong block, top': (MINIMAL + "train: {seed: 1}\n", ':4:9', 'recipe.unknown-key', ('`seed` belongs at the top level',)),
    'two blocks': (MINIMAL + "dtype: bf16\n", ':4:1', 'recipe.unknown-key', ('`model:` or under `merge:`',)),
    'foreign': (MINIMAL + "adapter: {lora_r: 1}\n", ':4:11', 'recipe.unknown-key', ('lorakit calls this adapter.rank',)),
    'foreign block': (MINIMAL + "lora: {r: 1}\n", ':4:1', 'recipe.unknown-key', ('adapter',)),
    'foreign misspelt': (MINIMAL + "lora_rnk: 1\n", ':4:1', 'recipe.unknown-key', ('did you mean adapter.rank?',)),
    'secret': (MINIMAL + "hf_token: abc\n", ':4:1', 'recipe.secret', ('HF_TOKEN',)),
    'method as text': (MINIMAL + "adapter: prefix\n", ':4:10', 'recipe.wrong-type', ('mapping', "{method: 'prefix'}")),
    'unknown method': (MINIMAL + "adapter: {method: lorra}\n", ':4:19', 'adapter.unknown-method', ('adapter.method', 'lorra', "did you mean 'lora'?")),
    'method is no text': (MINIMAL + "adapter: {method: 5}\n", ':4:19', 'recipe.wrong-type', ('adapter.method', '5')),
    'union, word': (MINIMAL + "train: {micro_batch_size: lots}", ':4:27', 'recipe.bad-choice', ("auto or a positive integer, got 'lots'",)),
    'union, zero': (MINIMAL + "train: {micro_batch_size: 0}", ':4:27', 'recipe.out-of-range', ('positive integer',)),
    'union, type': (MINIMAL + "train: {micro_batch_size: [1]}", ':4:27', 'recipe.wrong-type', ('auto or a positive integer',)),
    'union, packing': (MINIMAL.rstrip() + "\n  packing: tight\n", ':4:12', 'recipe.bad-choice', ("one of true, false, dense or auto, got 'tight'",)),
    'union, eval': (MINIMAL + "  eval: 1.5\n", ':4:9', 'recipe.out-of-range', ('(0,', '1)', '1.5', '0.015')),
    'union, source': (MINIMAL + "  eval: [{path: a, weight: 0}]\n", ':4:28', 'recipe.out-of-range', ('data.eval[0].weight', 'greater than 0')),
    'union, source key': (MINIMAL + "  eval: {path: a, wieght: 1}\n", ':4:19', 'recipe.unknown-key', ('data.eval.wieght', "'weight'")),
    'union, empty': (MINIMAL + "  eval: []\n", ':4:9', 'recipe.out-of-range', ('at least one',)),
    'union, skip': (MINIMAL + "train: {on_non_finite: {skip: 0}}", ':4:31', 'recipe.out-of-range', ('train.on_non_finite.skip',)),
    'union, pattern': (MINIMAL + "adapter: {target_modules: 're:'}", ':4:27', 'recipe.bad-choice', ('all-linear', 're:PATTERN')),
    'empty text': (MINIMAL + "output_dir: ''", ':4:13', 'recipe.out-of-range', ('output_dir', 'empty')),
    'list of wrong things': (MINIMAL + "adapter: {target_modules: [q, 3]}", ':4:31', 'recipe.wrong-type', ('adapter.target_modules[1]', 'text', '3')),
    'one target': (MINIMAL + "adapter: {target_modules: q_prj}", ':4:27', 'recipe.bad-choice', ("a list of one is written ['q_prj']",)),
    'text for a list': (MINIMAL + "eval: {metrics: loss}", ':4:17', 'recipe.wrong-type', ('list', 'loss', "['loss']")),
    'pattern value': (MINIMAL + "adapter: {rank_pattern: {q: 0}}", ':4:29', 'recipe.out-of-range', ('adapter.rank_pattern.q',)),
    'number as text': (MINIMAL + "train: {weight_decay: 1_0}", ':4:23', 'recipe.wrong-type', ('did you mean 10?',)),
    'text as number': ("model: {path: a, revision: 123}\ndata: {train: b}", ':1:28', 'recipe.wrong-type', ('model.revision', 'text', "'123'")),
    'gate without bound': (MINIMAL + "  eval: a\neval: {gates: {loss: {}}}", ':5:16', 'recipe.conflict', ('eval.gates.loss', 'min', 'max')),
    'gate without metric': (MINIMAL + "  eval: a\neval: {gates: {stop_rate: {min: 1}}}", ':5:16', 'recipe.conflict', ('eval.gates.stop_rate', 'add stop_rate to eval.metrics')),
    'gate of no metric': (MINIMAL + "  eval: a\neval: {gates: {los: {min: 1}}}", ':5:16', 'recipe.bad-choice', ('eval.gates.los', "'loss'")),
    'gate bound': (MINIMAL + "  eval: a\neval: {gates: {loss: {max: bass - 5%}}}", ':5:28', 'recipe.conflict', ('eval.gates.loss.max', 'base - 5%', 'bass')),
    'gate without rows': (MINIMAL + "eval: {gates: {loss: {max: 1}}}", ':4:8', 'recipe.conflict', ('eval.gates', 'data.eval: 0.05')),
    'metrics without rows': (MINIMAL + "eval: {metrics: [loss]}", ':4:17', 'recipe.conflict', ('eval.metrics', 'data.eval')),
    'micro-batch': (MINIMAL + "train: {batch_size: 4, micro_batch_size: 8}", ':4:42', 'recipe.conflict', ('8', '4', 'train.batch_size')),
    'placeholder': (MINIMAL + "output_dir: runs/{nam}", ':4:13', 'recipe.bad-choice', ("'{nam}'", '{name}', '{date}', '{seed}')),
    'open brace': (MINIMAL + "output_dir: runs/{name", ':4:13', 'recipe.bad-choice', ("'{'", '{{')),
    'out of the working folder': (MINIMAL + "output_dir: ../runs", ':4:13', 'security.path', ('output_dir', '../runs')),
    'the working folder': (MINIMAL + "output_dir: runs/..", ':4:13', 'recipe.conflict', ('output_dir',)),
    'merge over the adapter': (MINIMAL + "merge: {enabled: true, out: '{output_dir}/adapter'}", ':4:29', 'recipe.conflict', ('merge.out', 'runs/recipe/adapter')),
    'merge over the run': (MINIMAL + "merge: {enabled: true, out: runs}", ':4:29', 'recipe.conflict', ('merge.out',)),
    "keys within keys": ("? " * 400_000, ":1:131", "recipe.too-large", ("nested", "64")),
    "layers without end": (MINIMAL + "adapter: {layers: 0-99999999999999999999}", ":4:19", "recipe.bad-choice", ("adapter.layers", "'8-31'")),
    "layers beyond the model": (MINIMAL + "adapter: {layers: 0-99}", ":4:19", "target.no-match", ("adapter.layers: 2-99", "2 layers (0-1)")),
    "a home that is not there": ("model: ~nosuchuser/x\ndata: {train: rows.jsonl}", ":1:8", "model.not-found", ("~nosuchuser/x",)),
    "a model's name without end": ("model: " + "a/" * 3000 + "\ndata: {train: rows.jsonl}", ":1:8", "model.not-found", ("does not exist",)),
    "a model's name that nothing has": ("model: modle\ndata: {train: rows.jsonl}", ":1:8", "model.not-found", ("no folder modle",)),
    "a name that moves the cursor": ('model: "a\\n\\e[31mb"\ndata: {train: rows.jsonl}', ":1:8", "recipe.encoding", ("model.path", "U+000A")),
    "a folder that moves the cursor": (MINIMAL + 'output_dir: "a\\e[31mb"', ":4:13", "recipe.encoding", ("output_dir", "U+001B")),
    "a folder on two lines": (MINIMAL + 'output_dir: "a\\nb"', ":4:13", "recipe.encoding", ("output_dir", "U+000A")),
    "a merge written backwards": (MINIMAL + 'merge: {out: "a\u202eb"}', ":4:14", "recipe.encoding", ("merge.out", "U+202E")),
    "rows of a name with a bell": ("model: model\ndata: {train: [{path: \"a\\x07\"}]}", ":2:23", "recipe.encoding", ("data.train[0].path", "U+0007")),
    "a folder of a long name": (MINIMAL + "output_dir: runs/" + "x" * 300, ":4:13", "recipe.out-of-range", ("output_dir", "300 bytes", "255")),
    "a token in a text": (MINIMAL.rstrip() + f"\n  system: token {SECRET}\n", ":4:11", "recipe.secret", ("data.system", "HF_TOKEN")),
    "a token for a key": (f"model: model\ndata: {{train: {{path: rows.jsonl, columns: {{{SECRET}: prompt}}}}}}", ":2:44", "recipe.secret", ("data.train.columns", "a key")),
    "a token in a comment": (MINIMAL + f"# export HF_TOKEN={SECRET}\n", ":4:19", "recipe.secret", ("line",)),
    "a token spelt with escapes": (MINIMAL + f'output_dir: "\\x68{SECRET[1:]}"', ":4:13", "recipe.secret", ("output_dir",)),
    "a password in an address": (MINIMAL + "output_dir: s3://ada:pass@host/x", ":4:13", "recipe.secret", ("output_dir",)),
    "a weight without end": ("model: model\ndata: {train: {path: rows.jsonl, weight: 1e300}}", ":2:8", "recipe.out-of-range", ("data.train", "10,000,000")),
    "a split of nothing": ("model: model\ndata: {train: {path: rows.jsonl, split: 'train[5:1]'}}", "rows.jsonl", "data.empty", ("train[5:1]", "none of 20 rows")),
    "a split without end": ("model: model\ndata: {train: {path: rows.jsonl, split: 'train[" + "9" * 5000 + ":]'}}", None, "recipe.bad-choice", ("split",)),
    "a fraction in quotes": (MINIMAL + "  eval: '0.05'", ":4:9", "recipe.wrong-type", ("data.eval", "'0.05'", "without quotes")),
    "a gate of nothing": (MINIMAL + "  eval: 0.5\neval: {gates: {loss: {min: 2.0, max: 1.0}}}", ":5:16", "recipe.conflict", ("eval.gates.loss", "at least 2 and at most 1")),
    "a module to save misspelt": (MINIMAL + "adapter: {modules_to_save: [lm_hed]}", ":4:28", "target.no-match", ("`lm_hed`", "`lm_head`")),
    "a prefix as long as the context": (MINIMAL + "adapter: {method: prefix, tokens: 250}", None, "model.context-too-short", ("250 positions", "256")),
    "rows of eval that are not there": (MINIMAL + "eval: {data: rwos.jsonl}", "rwos.jsonl", "data.not-found", ("rows.jsonl",)),
    "an expression of a pattern": (MINIMAL + "adapter: {target_modules: [q_proj], rank_pattern: {'re:(': 2}}", ":4:27", "target.bad-pattern", ("re:(",)),
}  # fmt: skip


PREPARES = {"a weight without end", "a module to save misspelt", "a prefix as long as the context"}


def _place(written: str | None) -> str:
    """Return a place as `TEXTS` writes it: in the recipe, another, or none."""
    return (
        written or ""
        if written and written[0] != ":"
        else ""
        if written is None
        else f"recipe.yaml{written}"
    )


def _recipe(text: str | bytes) -> Callable[[World], list[str]]:
    def build(world: World) -> list[str]:
        world.write("recipe.yaml", text)
        return ["plan", "recipe.yaml"]

    return build


def _fifo(world: World) -> list[str]:
    os.mkfifo(world.path("pipe.yaml"))
    return ["plan", "pipe.yaml"]


def _variable(world: World) -> list[str]:
    patch = world.held.enter_context(pytest.MonkeyPatch.context())
    patch.setenv("GREETING", f"hello {SECRET}")
    world.write("recipe.yaml", MINIMAL.rstrip() + "\n  system: ${GREETING}\n")
    return ["train", "recipe.yaml", "--out", "runs/new"]


def _value(world: World) -> list[str]:
    patch = world.held.enter_context(pytest.MonkeyPatch.context())
    patch.setenv("MY_API_KEY", "correct-horse")
    world.write("recipe.yaml", MINIMAL.rstrip() + "\n  system: say correct-horse\n")
    return ["train", "recipe.yaml", "--out", "runs/new"]


TOO_LARGE = MINIMAL + "#" * (2**20 - len(MINIMAL) + 1)
Q = "adapter: {target_modules: [q_proj], "
CASES = [
    Case("R01 near file", lambda _: ["plan", "recpe.yaml"], ("did you mean recipe.yaml?",), "recpe.yaml"),
    Case("R01 near name", lambda _: ["plan", "quickstrat"], ("did you mean quickstart?",), "quickstrat"),
    Case("R01 nothing near", lambda _: ["plan", "zzz/zzz"], ("lorakit recipes list",), "zzz/zzz"),
    Case("R02", lambda _: ["plan", "model"], (), "model"),
    Case("a FIFO", _fifo, ("FIFO",), "pipe.yaml", "recipe.not-a-file"),
    Case("R13", _recipe(MINIMAL + Q + "rank: 33}"), ("rank 33", "layers.0.self_attn.q_proj", "32"), "recipe.yaml:4:27"),
    Case("R13 pattern", _recipe(MINIMAL + Q + "rank_pattern: {q_proj: 99}}"), ("rank 99", "q_proj", "32"), "recipe.yaml:4:27"),
    Case("R16", _recipe(MINIMAL + "adapter: {target_modules: [q_proj, q_prj]}"), ("`q_prj`", "q_proj", "15 linear layers"), "recipe.yaml:4:27"),
    Case("a variable that holds a token", _variable, ("data.system",), "recipe.yaml:4:11", "recipe.secret"),
    Case("the value of a secret variable", _value, ("data.system",), "recipe.yaml:4:11", "recipe.secret"),
    Case("what is hidden before a quote", lambda _: ["plan", "recipe.yaml", "-s", "data.system=the bearer of-crowns: x"], ("got {",), "--set data.system", "recipe.wrong-type"),
    Case("a token in --set", lambda _: ["train", "recipe.yaml", "-s", f"data.system=hi {SECRET}"], (), "--set data.system", "recipe.secret"),
    Case("--out that moves the cursor", lambda _: ["train", "recipe.yaml", "--out", "a\x1b[31mb"], ("U+001B",), "--set output_dir", "recipe.encoding"),
    Case("warm-up longer than the run", lambda _: ["plan", "recipe.yaml", "--strict", "-s", "train.warmup=100"], ("100 steps of warm-up in a run of 6",), "--set train.warmup", "usage.strict"),
    Case("R22", _recipe(TOO_LARGE), ("1,048,577 bytes",), "recipe.yaml"),
    *(
        Case(name, _recipe(text), says, _place(place), error, prepares=name in PREPARES)
        for name, (text, place, error, says) in TEXTS.items()
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.name))
def test_refused(case: Case, world: World) -> None:
    check_refused(case, world)
