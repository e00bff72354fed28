"""What other tools call the keys of a recipe; known only to say what lorakit calls them.

A method's own foreign names stand in the method's file and reach the reader as an argument.
"""

import re

from lorakit.recipe.sections import DEFAULT_METHOD

_TABLE = """
model: base_model model_name_or_path model_id checkpoint_dir pretrained_model
model.quantization: load_in_4bit load_in_8bit quantization_bit quantize bnb_4bit_quant_type
model.dtype: bf16 fp16 precision torch_dtype bnb_4bit_compute_dtype
model.attention: attn_implementation flash_attention flash_attn use_flash_attention_2 sdp_attention
adapter.method: peft_type finetuning_type adapter_type
adapter.rank: r lora_r lora_rank
adapter.alpha: lora_alpha
adapter.alpha (= scale x rank): scale
adapter.dropout: lora_dropout
adapter.target_modules: lora_target lora_target_modules lora_target_linear keys targets
    lora_attn_modules
adapter.layers: layers_to_transform num_layers lora_layers
adapter.modules_to_save: lora_modules_to_save additional_target
adapter.init: init_lora_weights pissa_init
data.train: dataset datasets dataset_name data_path train_file
data.eval: val_set_size val_size test_size eval_dataset val_split_fraction
data.max_length: sequence_len cutoff_len max_seq_len max_seq_length block_size
data.packing: sample_packing packed neat_packing
data.chat_template: template conversation chat_template_path
data.train_on: train_on_inputs train_on_input mask_prompt completion_only_loss assistant_only_loss
    train_on_prompt
train.epochs: num_epochs num_train_epochs
train.max_steps: iters
train.learning_rate: lr
train.micro_batch_size: per_device_train_batch_size
train.batch_size: global_batch_size
train.batch_size (sequences per optimizer step): gradient_accumulation_steps
    grad_accumulation_steps
train.schedule: lr_scheduler lr_scheduler_type scheduler
train.warmup (a fraction or steps): warmup_ratio warmup_steps lr_warmup_steps
train.optimizer: optim
train.gradient_checkpointing: activation_checkpointing grad_checkpoint
    enable_activation_checkpointing
train.max_grad_norm: gradient_clipping max_norm grad_clip
train.log_every: logging_steps
train.eval_every: eval_steps eval_strategy evaluation_strategy
train.save_every: save_steps save_strategy
train.keep_checkpoints: save_total_limit
output_dir: out_dir adapter_path save_dir
"""

FOREIGN = {
    name: key.strip()
    for key, names in re.findall(r"^(\w[^:]*):((?: +\S+)+(?:\n +.+)*)", _TABLE, re.MULTILINE)
    for name in names.split()
} | {DEFAULT_METHOD: "adapter (the method's name is adapter.method)"}

NOTES = {
    "resume_from_checkpoint": "not a recipe key: lorakit train RECIPE --resume",
    **dict.fromkeys(
        ("report_to", "wandb_project", "use_tensorboard", "logger_name", "enable_wandb"),
        "lorakit always writes metrics.jsonl and has no other tracker yet",
    ),
}

_SECRET = re.compile(
    r"(.*_)?(password|secret|credentials?|api_?key|access_key|(hf|hub|auth|access|api|wandb)_token)|token",
    re.IGNORECASE,
)


def names_secret(key: str) -> bool:
    """Tell whether a key is named like a secret: such a one never belongs into a recipe."""
    return bool(_SECRET.fullmatch(key))
