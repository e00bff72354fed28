"""Write recipes/REFERENCE.md, the table of all recipe keys, from the shipped schema."""

import sys

from generated import ROOT, write_or_check

from lorakit.recipe import reference, schema

HEAD = """# Recipe keys

Every key of a recipe, what it may be, and what it is when a recipe does not name it.
Generated from `lorakit/recipe/schema.json` by `scripts/make_reference.py`.
Editors read the same schema: `lorakit recipes schema --out lorakit.schema.json`, and in the
recipe's first line `# yaml-language-server: $schema=lorakit.schema.json`.

"""

if __name__ == "__main__":
    page = HEAD + reference.table(schema.shipped())
    sys.exit(write_or_check(ROOT / "recipes/REFERENCE.md", page))
