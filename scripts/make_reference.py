"""Write recipes/REFERENCE.md: all recipe keys from the schema, all methods from their files."""

import sys

from generated import ROOT, write_or_check

from lorakit import adapters
from lorakit.recipe import reference, schema

HEAD = """# Recipe keys

Every key of a recipe, what it may be, and what it is when a recipe does not name it.
Generated from `lorakit/recipe/schema.json` by `scripts/make_reference.py`.
Editors read the same schema: `lorakit recipes schema --out lorakit.schema.json`, and in the
recipe's first line `# yaml-language-server: $schema=lorakit.schema.json`.

"""

FORMAT = """
# Rows of another kind

Rows that no format reads, such as labels that are numbers, become text in a function of yours.
This one is `labels.py` in the working folder, the recipe says `data.format: labels:as_text`, and
`--allow-local-code` lets it run:

```python
LABELS = ("negative", "positive")


def as_text(row):
    return {"prompt": row["review"], "completion": LABELS[row["label"]]}
```

It returns a row of one of lorakit's formats: `prompt` and `completion`, or `messages`, or `text`.
"""

METHODS = """
# Methods

What `adapter.method` may be; `lorakit methods NAME` shows one with its settings.

| method | what it does |
| --- | --- |
"""

if __name__ == "__main__":
    rows = (f"| `{name}` | {adapters.summary(name)} |\n" for name in adapters.names())
    page = HEAD + reference.table(schema.shipped()) + FORMAT + METHODS + "".join(rows)
    sys.exit(write_or_check(ROOT / "recipes/REFERENCE.md", page))
