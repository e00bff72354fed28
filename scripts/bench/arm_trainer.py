"""The arms that use a trainer: PEFT with transformers' Trainer, and TRL's SFTTrainer.

Both get the same rows, already tokenised and labelled, and otherwise the settings of the job and
their own defaults.
"""

from pathlib import Path
from typing import Any

import torch
from arm_peft import DTYPES, adapter_tensors, load_base, lora_config, pad, take_initial_values
from configs import CLIP, RATE, SEED
from measure import Clock, peak_memory, read_job, read_rows, report, settled
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

Rows = list[dict[str, Any]]


class Counting:
    """A collator that counts the tokens it makes, padding included."""

    def __init__(self, inner: Any) -> None:
        """Count what another collator makes."""
        self.inner, self.tokens, self.batches = inner, 0, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some rows."""
        batch = self.inner(rows)
        self.tokens += batch["input_ids"].numel()
        self.batches += 1
        return batch


class Timing(TrainerCallback):
    """Times the trainer's steps, stops it in time, and keeps the losses that it logs."""

    def __init__(self, clock: Clock, device: str) -> None:
        """Use the clock that every arm has."""
        self.clock, self.device = clock, device
        self.losses: list[float] = []
        self.loaded: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Start the clock."""
        self.loaded = settled(torch, self.device)
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """End a step, and the run when there are enough."""
        if self.clock.tick():
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """Keep the loss of a step."""
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))


def settings(job: dict[str, Any], rows: Rows, clock: Clock) -> dict[str, Any]:
    """Return the arguments that both trainers take."""
    units = len(rows)
    if job.get("packing"):
        units = -(-sum(len(row["input_ids"]) for row in rows) // job["longest"])
    return {
        "output_dir": str(Path(job["folder"]) / "run"),
        "per_device_train_batch_size": min(job["rows"], units),
        "gradient_accumulation_steps": -(-units // job["rows"]),
        "max_steps": clock.most,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
        "use_cpu": job["device"] == "cpu",
        "bf16": job["dtype"] == "bf16" and (job["stack"] == "trl" or bool(job.get("autocast"))),
        "gradient_checkpointing": bool(job.get("checkpointing")),
    }


def peft_trainer(job: dict[str, Any], rows: Rows, arguments: dict[str, Any]) -> Trainer:
    """Return transformers' Trainer over a PEFT model."""
    model = load_base(job)
    model.config.use_cache = False
    if job.get("nf4"):
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=bool(job.get("checkpointing"))
        )
    model = get_peft_model(model, lora_config())
    return Trainer(
        model=model, args=TrainingArguments(**arguments), train_dataset=rows, data_collator=pad
    )


def trl_trainer(job: dict[str, Any], rows: Rows, arguments: dict[str, Any]) -> Trainer:
    """Return TRL's SFTTrainer."""
    from datasets import Dataset  # neither is there where only transformers and peft are
    from trl import SFTConfig, SFTTrainer

    longest = job.get("longest") or max(len(row["input_ids"]) for row in rows)
    config = SFTConfig(max_length=longest, packing=bool(job.get("packing")), **arguments)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], local_files_only=True)
    return SFTTrainer(
        model=load_base(job),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )


def main() -> None:
    """Train as the job says and report the times."""
    job = read_job()
    rows, order = read_rows(job)
    if len(order) > 1:
        raise SystemExit("a trainer takes rows in its own order: give it one step's rows")
    clock = Clock(job, torch)
    make = {"trainer": peft_trainer, "trl": trl_trainer}[job["stack"]]
    trainer = make(job, rows, settings(job, rows, clock))
    take_initial_values(trainer.model, job["init_file"])
    counting = trainer.data_collator = Counting(trainer.data_collator)
    timing = Timing(clock, job["device"])
    trainer.add_callback(timing)
    trainer.train()
    names = sorted({str(p.dtype) for p in adapter_tensors(trainer.model).values()})
    report(
        losses=timing.losses,
        seconds=clock.seconds,
        padded=round(
            counting.tokens / max(1, counting.batches) * trainer.args.gradient_accumulation_steps
        ),
        memory=peak_memory(torch, job["device"]),
        loaded=timing.loaded,
        dtype=str(DTYPES[job["dtype"]]).removeprefix("torch."),
        adapter_dtype=", ".join(names),
        checkpointing=bool(trainer.args.gradient_checkpointing),
        threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    main()
