"""Recipes as hypothesis writes them: every key, likely and unlikely values."""

from typing import Any

from hypothesis import strategies as st

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
WORDS = TEXT | st.sampled_from(
    ["null", "true", "1e3", "no", "${A}", "$${A}", "a: b", "# c", "- d", "~", "é"]
)
POSITIVE = st.floats(1e-300, 1e300)
COUNT = st.integers(1, 2**40)
# Absolute or like a hub id: a relative local path is meant to change when it is written out.
PATHS = st.from_regex(r"(/tmp/|hub/)[a-z0-9 é{}$#':-]{1,10}", fullmatch=True)


def some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


SOURCES = st.builds(
    lambda path, more: {"path": path, **more},
    PATHS,
    some(
        split=WORDS,
        format=WORDS,
        columns=st.dictionaries(WORDS, WORDS, max_size=2),
        weight=POSITIVE,
        max_samples=COUNT,
    ),
)
SEVERAL = PATHS | SOURCES | st.lists(PATHS | SOURCES, min_size=1, max_size=3)
STEPS = COUNT | st.just("epoch")
BOUND = st.floats(-1e9, 1e9) | st.sampled_from(["base", "baseline + 0.5", "base - 5%"])
METRICS = ["loss", "perplexity", "token_accuracy", "exact_match", "json_valid", "stop_rate"]

MODEL = PATHS | st.builds(
    lambda path, more: {"path": path, **more},
    PATHS,
    some(
        revision=st.none() | WORDS,
        dtype=st.sampled_from(["auto", "bf16"]),
        attention=st.sampled_from(["auto", "eager"]),
        trust_remote_code=st.booleans(),
    ),
)
ADAPTER = some(
    rank=COUNT,
    alpha=POSITIVE.filter(lambda alpha: alpha != 13),
    dropout=st.floats(0, 1, exclude_max=True),
    target_modules=st.just("mlp") | st.just("re:.*") | st.lists(WORDS, min_size=1, max_size=3),
    rank_pattern=st.dictionaries(WORDS, COUNT, max_size=3),
) | st.builds(lambda more: {"method": "virtual", **more}, some(tokens=COUNT))
DATA = st.builds(
    lambda train, more: {"train": train, **more},
    SEVERAL,
    some(
        eval=st.floats(0, 1, exclude_min=True, exclude_max=True) | SEVERAL,
        format=WORDS,
        chat_template=PATHS | st.just("auto"),
        system=st.none() | st.just("") | WORDS | st.text("a\n\t \"'\\", min_size=1),
        train_on=st.sampled_from(["completions", "last", "all"]),
        max_length=st.integers(8, 10**6) | st.just("auto"),
        too_long=st.sampled_from(["auto", "drop", "error"]),
        packing=st.booleans() | st.sampled_from(["dense", "auto"]),
    ),
)
TRAIN = some(
    epochs=st.floats(1e-300, 1e6),
    max_steps=st.none() | COUNT,
    batch_size=st.integers(10, 100),
    micro_batch_size=st.integers(1, 10) | st.just("auto"),
    learning_rate=POSITIVE,
    schedule=st.sampled_from(["cosine", "wsd"]),
    warmup=st.floats(0, 1e6),
    gradient_checkpointing=st.booleans() | st.just("auto"),
    on_non_finite=st.just("stop") | st.builds(lambda n: {"skip": n}, COUNT),
    log_every=COUNT,
    save_every=STEPS,
    keep_checkpoints=st.integers(2, 9),
)
EVAL = some(
    data=SEVERAL,
    metrics=st.just(METRICS),
    normalize=st.lists(st.sampled_from(["strip", "number"]), max_size=2),
    generate=some(max_new_tokens=COUNT, temperature=st.floats(0, 9)),
)
RECIPES = st.builds(
    lambda model, data, more: {"model": model, "data": data, **more},
    MODEL,
    DATA,
    some(
        adapter=ADAPTER,
        train=TRAIN,
        eval=EVAL,
        merge=some(
            enabled=st.booleans(),
            dtype=st.sampled_from(["keep", "fp16"]),
            base_weights=st.sampled_from(["original", "dequantised"]),
            measure=st.booleans(),
        ),
        output_dir=st.builds(
            lambda folder, end: f"{folder}/{end}",
            st.text("ab/ é$'\"", min_size=1, max_size=9),
            st.sampled_from(["{name}", "{seed}", "{{", "}}", "$", "x"]),
        ),
        seed=st.integers(0, 2**63 - 1),
    ),
)  # fmt: skip
