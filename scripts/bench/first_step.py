"""The quick start as a script with PEFT and Trainer, to time its first step: model, data, step."""

import sys
import time

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

model_folder, data_file, dtype, out = sys.argv[1:]


class FirstStep(TrainerCallback):
    """Says when the first step is done."""

    def on_step_end(self, args, state, control, **rest):
        """Print the time."""
        print(time.monotonic(), flush=True)


def encode(row):
    """Tokenise a conversation; only its answer is trained."""
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    prompt = tokenizer.apply_chat_template(
        row["messages"][:-1], add_generation_prompt=True, return_dict=False
    )
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}


tokenizer = AutoTokenizer.from_pretrained(model_folder)
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
rows = load_dataset("json", data_files=data_file, split="train")
rows = rows.map(encode, remove_columns=rows.column_names)
trainer = Trainer(
    model=model,
    args=TrainingArguments(out, max_steps=1, per_device_train_batch_size=4, report_to="none"),
    train_dataset=rows,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[FirstStep()],
)
trainer.train()
