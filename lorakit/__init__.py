"""lorakit: LoRA fine-tuning from a YAML recipe, from plan to verified merge."""

__version__ = "0.1.0"
