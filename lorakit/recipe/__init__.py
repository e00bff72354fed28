"""The YAML language of recipes: sections, reader, messages and schema."""
