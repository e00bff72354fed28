"""The arm of a merge as PEFT's documentation shows it: load, merge_and_unload, save_pretrained."""

import time

from measure import peak_memory, read_job, report

job, began = read_job(), time.perf_counter()

import torch  # noqa: E402  # the imports are part of the job
from peft import PeftModel  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

model = AutoModelForCausalLM.from_pretrained(job["base"])
merged = PeftModel.from_pretrained(model, job["adapter"]).merge_and_unload()
merged.save_pretrained(job["out"])
AutoTokenizer.from_pretrained(job["base"]).save_pretrained(job["out"])
report(seconds=time.perf_counter() - began, memory=peak_memory(torch, "cpu"))
