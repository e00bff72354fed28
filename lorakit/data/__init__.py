"""From rows to batches: source, formats, template, tokens, packing, batches."""
