"""The base model: found, checked and loaded; its sites, its attention and its loss."""
