"""Make what the arms share: rows, initial values, and the bases and adapters that are synthetic.

Runs in lorakit's environment, in a process of its own so that the harness stays small: a child's
peak memory counts from its parent's size.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from configs import ALPHA, RANK, SEED, TARGETS
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit.data.batches import Steps
from lorakit.data.tokens import Example
from lorakit.errors import Place
from lorakit.model.inputs import MASKED

TEXT = Path(__file__).parents[2] / "recipes" / "data" / "support" / "train.jsonl"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"


def random_tokens(vocabulary: int, lengths: list[int]) -> list[NDArray[np.int64]]:
    """Return rows of random tokens."""
    random = np.random.default_rng(SEED)
    return [random.integers(3, vocabulary, length) for length in lengths]


def text_tokens(model: Path, lengths: list[int]) -> list[NDArray[np.int64]]:
    """Return rows of what the support data say, one message after the other."""
    messages = [json.loads(line)["messages"] for line in TEXT.read_text("utf-8").splitlines()]
    text = "\n".join(message["content"] for row in messages for message in row)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    if len(ids) < sum(lengths):
        sys.exit(f"the support data have {len(ids)} tokens, {sum(lengths)} are asked for")
    return np.split(np.array(ids[: sum(lengths)]), np.cumsum(lengths)[:-1])


def write_rows(
    path: Path, tokens: list[NDArray[np.int64]], batch: int, masked: float
) -> dict[str, Any]:
    """Write rows and the order in which lorakit's batches take them; return the first's counts."""
    rows = []
    for ids in tokens:
        length, labels = len(ids), ids.copy()
        labels[: max(1, round(masked * length))] = MASKED
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    examples = [
        Example(np.array(row["input_ids"], np.int32), np.array(row["labels"], np.int32), Place("?"))
        for row in rows
    ]
    made = Steps(examples, batch_size=batch, seed=SEED)
    order = [
        sorted(row for batch in made.step(index) for row in batch.rows)
        for index in range(made.total)
    ]
    path.write_text(json.dumps({"rows": rows, "order": order}), encoding="utf-8")
    first = [rows[row]["labels"] for row in order[0]]
    return {
        "tokens": sum(map(len, first)),
        "trained": sum(label != MASKED for labels in first for label in labels),
        "squares": sum(len(labels) ** 2 for labels in first),
    }


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a model's folder, from the headers of its files."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping, it has keys() alone
                found[name] = tuple(opened.get_slice(name).get_shape())
    return found


def targets(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the modules that are adapted and the shapes of their weights."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes(folder).items()
        if name.removesuffix(".weight").endswith(TARGETS)
    }


def write_initial_values(path: Path, folder: Path, *, started: bool) -> int:
    """Write A and B of every adapted module; return how many values they are."""
    generator, tensors = torch.Generator().manual_seed(SEED), {}
    for name, (outputs, inputs) in sorted(targets(folder).items()):
        bound = 1 / math.sqrt(inputs)
        tensors[f"{name}.A"] = torch.empty(RANK, inputs).uniform_(
            -bound, bound, generator=generator
        )
        tensors[f"{name}.B"] = torch.zeros(outputs, RANK)
        if started:
            tensors[f"{name}.B"].normal_(0.0, 0.01, generator=generator)
    save_file(tensors, path)
    return sum(tensor.numel() for tensor in tensors.values())


def write_model(folder: Path, shape: dict[str, Any], *, shard: str = "5GB") -> None:
    """Write a Llama of random bf16 weights with a small tokenizer, unless it is there."""
    if (folder / "tokenizer.json").is_file():
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    sizes = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **shape}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16)
    model.to_empty(device=device)
    pattern = torch.empty(1 << 22, dtype=torch.bfloat16, device=device).normal_(0.0, 0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                flat = parameter.view(-1)
                for start in range(0, flat.numel(), pattern.numel()):
                    part = flat[start : start + pattern.numel()]
                    part.copy_(pattern[: part.numel()].roll(start // pattern.numel()))
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that makes a token of each byte."""
    words = ["<|start|>", "<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_adapter(folder: Path, base: Path) -> None:
    """Write a PEFT folder with random A and B for a base."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, tensors = torch.Generator().manual_seed(SEED), {}
    for name, (outputs, inputs) in sorted(targets(base).items()):
        for part, size in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            values = torch.empty(size).normal_(0.0, 0.02, generator=generator)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def sizes(folder: Path) -> dict[str, int]:
    """Return the counts that the floor follows from: body and head products, attention widths."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "body": sum(outputs * inputs for outputs, inputs in targets(folder).values()),
        "head": config["vocab_size"] * config["hidden_size"],
        "attention": heads * head * config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "mlp": config["intermediate_size"],
        "keys": (config.get("num_key_value_heads") or heads) * head,
        "layers": config["num_hidden_layers"],
        "vocabulary": config["vocab_size"],
    }


def best_dtype() -> str:
    """Return what lorakit's `dtype: auto` means on this machine."""
    from lorakit.devices import best_dtype
    from lorakit.runtime import start

    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(best_dtype(start().device), "fp32")


def main() -> None:
    """Make what a task file asks for, and print what the harness needs to know of it."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for made in task.get("models", []):
        write_model(Path(made["folder"]), made["shape"], shard=made.get("shard", "5GB"))
    for adapter in task.get("adapters", []):
        write_adapter(Path(adapter["folder"]), Path(adapter["base"]))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts: dict[str, Any] = {"dtype": best_dtype(), "gpu": gpu, "configs": {}}
    if "model" in task:
        model = Path(task["model"])
        facts["sizes"] = sizes(model)
        for config in task["configs"]:
            lengths = config["lengths"] * config["steps"]
            if config["text"]:
                tokens = text_tokens(model, lengths)
            else:
                tokens = random_tokens(facts["sizes"]["vocabulary"], lengths)
            batch = len(config["lengths"])
            counts = write_rows(Path(config["rows_file"]), tokens, batch, config["masked"])
            write_initial_values(Path(config["init_file"]), model, started=config["started"])
            facts["configs"][config["id"]] = counts
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
