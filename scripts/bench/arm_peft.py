"""The arm of a bare PEFT loop: the model's own loss, fused AdamW, nothing else."""

from typing import Any

import torch
from configs import ALPHA, CLIP, RANK, RATE, TARGETS
from measure import Clock, peak_memory, read_job, read_rows, report, save_tensors, settled
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def lora_config() -> LoraConfig:
    """Return the settings that every arm has."""
    return LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )


def load_base(job: dict[str, Any]) -> Any:
    """Load the base in the dtype of the job, or in NF4 with that as the dtype of the products."""
    dtype = DTYPES[job["dtype"]]
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if job["device"] == "cuda":
        options["device_map"] = {"": 0}
    if job.get("nf4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(job["model"], local_files_only=True, **options)


def adapter_tensors(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the trained tensors by the names of the file of initial values."""
    return {
        name.removeprefix("base_model.model.")
        .replace(".default.weight", "")
        .replace(".lora_", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def take_initial_values(model: PeftModel, path: str) -> None:
    """Set A and B to the values that every arm starts with."""
    given, named = load_file(path), adapter_tensors(model)
    if given.keys() != named.keys():
        raise SystemExit(f"other tensors than expected: {sorted(given.keys() ^ named.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(given[name])


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return rows as a batch, padded on the right; without padding there is no mask."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])

    batch = {"input_ids": column("input_ids", 0), "labels": column("labels", -100)}
    if any(len(row["input_ids"]) < longest for row in rows):
        ones = [[1] * len(row["input_ids"]) for row in rows]
        batch["attention_mask"] = torch.tensor([one + [0] * (longest - len(one)) for one in ones])
    return batch


def main() -> None:
    """Train as the job says and report the times."""
    job = read_job()
    rows, order = read_rows(job)
    model = get_peft_model(load_base(job), lora_config()).train()
    model.config.use_cache = False
    take_initial_values(model, job["init_file"])
    parameters = list(adapter_tensors(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    loaded, losses, tokens = settled(torch, job["device"]), [], 0
    clock = Clock(job, torch)
    clock.start()
    for index in range(clock.most):
        some = [rows[row] for row in order[index % len(order)]]
        trained = sum(label != -100 for row in some for label in row["labels"][1:])
        batch = {name: tensor.to(model.device) for name, tensor in pad(some).items()}
        loss = model(**batch, num_items_in_batch=trained).loss
        loss.backward()
        if index == 0:
            tokens = batch["input_ids"].numel()
            if job.get("gradients"):
                named = adapter_tensors(model)
                save_tensors({n: p.grad for n, p in named.items()}, job["gradients"], save_file)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if clock.tick():
            break
    report(
        losses=losses,
        seconds=clock.seconds,
        padded=tokens,
        memory=peak_memory(torch, job["device"]),
        loaded=loaded,
        dtype=str(DTYPES[job["dtype"]]).removeprefix("torch."),
        checkpointing=False,
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
