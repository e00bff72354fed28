"""Write lorakit/recipe/schema.json from the recipe's sections and every method's settings."""

import sys

from generated import write_or_check

from lorakit import adapters
from lorakit.recipe import schema

if __name__ == "__main__":
    made = schema.json_schema({name: adapters.settings_for(name) for name in adapters.names()})
    sys.exit(write_or_check(schema.FILE, schema.written(made)))
