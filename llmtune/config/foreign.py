"""Translate keys of transformers, peft, TRL, axolotl, LLaMA-Factory, torchtune and Unsloth."""

from __future__ import annotations

from llmtune.config.keys import ALIASES
from llmtune.config.nearest import nearest

_IN_4_BITS = "tuner=qlora (its weights are in NF4, and computed with in the run's precision)"
_NO_QUANTIZED = "tuner=qlora (4 bits, NF4; 8 bits are not there)"
_NO_PREFERENCES = "nothing: llmtune does supervised fine-tuning and no other stage"

#: Foreign name, without its group and in lower case -> what to write instead. A bare key takes the
#: value that was given; ``nothing`` marks what there is no key for, with the reason.
MEANINGS: dict[str, str] = {
    # Model.
    "base_model": "model.name_or_path",
    "model_id": "model.name_or_path",
    "model_name": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "model_path": "model.name_or_path",
    "pretrained_model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "attention": "model.attn_implementation",
    "flash_attention": "model.attn_implementation=flash_attention_2",
    "flash_attention_2": "model.attn_implementation=flash_attention_2",
    "flash_attn": "model.attn_implementation=flash_attention_2",
    "use_flash_attention": "model.attn_implementation=flash_attention_2",
    "use_flash_attention_2": "model.attn_implementation=flash_attention_2",
    "use_flash_attn": "model.attn_implementation=flash_attention_2",
    "sdp_attention": "model.attn_implementation=sdpa",
    "eager_attention": "model.attn_implementation=eager",
    "tokenizer": "nothing: the tokenizer is the model's own (model.name_or_path)",
    "tokenizer_name_or_path": "nothing: the tokenizer is the model's own (model.name_or_path)",
    # Precision.
    "bf16": "precision=bf16 (or fp16, fp32)",
    "fp16": "precision=fp16 (or bf16, fp32)",
    "fp32": "precision=fp32 (or bf16, fp16)",
    "float16": "precision=fp16 (or bf16, fp32)",
    "bfloat16": "precision=bf16 (or fp16, fp32)",
    "dtype": "precision=bf16 (or fp16, fp32)",
    "mixed_precision": "precision=bf16 (or fp16, fp32)",
    "pure_bf16": "precision=bf16 (or fp16, fp32)",
    "torch_dtype": "precision=bf16 (or fp16, fp32)",
    "tf32": "precision=bf16 (or fp16, fp32)",
    "load_in_4bit": _IN_4_BITS,
    "load_in_8bit": _NO_QUANTIZED,
    "use_4bit": _IN_4_BITS,
    "bnb_4bit_quant_type": _IN_4_BITS,
    "bnb_4bit_compute_dtype": _IN_4_BITS,
    "quantization_bit": _NO_QUANTIZED,
    "quantization_method": _NO_QUANTIZED,
    # Adapters.
    "lora": "tuner=lora",
    "use_lora": "tuner=lora",
    "use_peft": "tuner=lora",
    "peft_type": "tuner=lora (or full)",
    "finetuning_type": "tuner=lora (or full, freeze)",
    "freeze_trainable_layers": "tuner.freeze.last_layers",
    "freeze_trainable_modules": "tuner.freeze.pattern",
    "unfrozen_parameters": "tuner.freeze.pattern",
    "qlora": "tuner=qlora",
    "r": "tuner.lora_r",
    "rank": "tuner.lora_r",
    "lora_dim": "tuner.lora_r",
    "lora_rank": "tuner.lora_r",
    "alpha": "tuner.lora_alpha",
    "lora_scaling": "tuner.lora_alpha",
    "dropout": "tuner.lora_dropout",
    "lora_attn_modules": "tuner.target_modules",
    "lora_modules": "tuner.target_modules",
    "lora_target": "tuner.target_modules",
    "lora_target_linear": "tuner.target_modules=all-linear",
    "lora_target_modules": "tuner.target_modules",
    "adapter_name_or_path": "tuner.adapter_path",
    "lora_model_dir": "tuner.adapter_path",
    "rslora": "tuner.use_rslora",
    "peft_use_rslora": "tuner.use_rslora",
    "use_dora": "tuner.use_dora",
    "peft_use_dora": "tuner.use_dora",
    "loraplus_lr_ratio": "tuner.lora_plus_ratio",
    "pissa_init": "tuner=pissa",
    "init_lora_weights": "tuner.init_lora_weights",
    "modules_to_save": "tuner.modules_to_save",
    "lora_modules_to_save": "tuner.modules_to_save",
    "additional_target": "tuner.modules_to_save",
    "trainable_token_indices": "tuner.trainable_token_indices",
    "new_tokens": "tuner.new_tokens",
    "add_tokens": "tuner.new_tokens",
    # Data.
    "data_path": "data.train",
    "dataset": "data.train",
    "dataset_dir": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "datasets": "data.train",
    "train_data": "data.train",
    "train_dataset": "data.train",
    "train_file": "data.train",
    "training_data": "data.train",
    "eval_dataset": "data.eval",
    "eval_file": "data.eval",
    "test_datasets": "data.eval",
    "val_data": "data.eval",
    "valid_file": "data.eval",
    "validation_data": "data.eval",
    "validation_file": "data.eval",
    "eval_split": "data.val_set_size",
    "val_size": "data.val_set_size",
    "test_size": "data.val_set_size",
    "validation_split": "data.val_set_size",
    "validation_split_percentage": "data.val_set_size (a share below 1, or rows)",
    "block_size": "data.max_seq_length",
    "context_length": "data.max_seq_length",
    "cutoff_len": "data.max_seq_length",
    "max_len": "data.max_seq_length",
    "max_length": "data.max_seq_length",
    "max_seq_len": "data.max_seq_length",
    "model_max_length": "data.max_seq_length",
    "seq_len": "data.max_seq_length",
    "seq_length": "data.max_seq_length",
    "sequence_len": "data.max_seq_length",
    "sequence_length": "data.max_seq_length",
    "multipack": "data.packing",
    "neat_packing": "data.packing",
    "sample_packing": "data.packing",
    "pack": "data.packing",
    "prompt_template": "data.chat_template",
    "template": "data.chat_template",
    "train_on_prompt": "data.train_on_inputs",
    "completion_only_loss": "nothing: only answers are trained, unless data.train_on_inputs=true",
    "assistant_only_loss": "nothing: only answers are trained, unless data.train_on_inputs=true",
    "mask_inputs": "nothing: only answers are trained, unless data.train_on_inputs=true",
    "dataset_num_proc": "data.num_workers",
    "dataset_processes": "data.num_workers",
    "preprocessing_num_workers": "data.num_workers",
    "dataloader_pin_memory": "data.pin_memory",
    "max_samples": "data.train=NAME@ROWS",
    "max_train_samples": "data.train=NAME@ROWS",
    "max_eval_samples": "train.eval_max_rows",
    "stage": _NO_PREFERENCES,
    "rl": _NO_PREFERENCES,
    # Batches.
    "batch_size": (
        "train.global_batch_size (all ranks and micro-batches; one forward pass is "
        "train.per_device_train_batch_size)"
    ),
    "total_batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "per_device_batch_size": "train.per_device_train_batch_size",
    "per_gpu_train_batch_size": "train.per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "per_gpu_eval_batch_size": "train.per_device_eval_batch_size",
    "accumulate_grad_batches": "train.gradient_accumulation_steps",
    "grad_accum": "train.gradient_accumulation_steps",
    "grad_accum_steps": "train.gradient_accumulation_steps",
    "gradient_accumulation": "train.gradient_accumulation_steps",
    "grad_accumulation_steps": "train.gradient_accumulation_steps",
    "rampup_batch_size": "train.batch_schedule",
    "batch_size_warmup": "train.batch_schedule",
    "batch_size_schedule": "train.batch_schedule",
    # Length, saving, evaluation.
    "epochs": "train.num_train_epochs",
    "max_epochs": "train.num_train_epochs",
    "n_epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "num_train_steps": "train.max_steps",
    "max_iters": "train.max_steps",
    "max_train_steps": "train.max_steps",
    "num_steps": "train.max_steps",
    "total_steps": "train.max_steps",
    "clip_grad": "train.max_grad_norm",
    "grad_clip": "train.max_grad_norm",
    "gradient_clip_val": "train.max_grad_norm",
    "gradient_clipping": "train.max_grad_norm",
    "activation_checkpointing": "train.gradient_checkpointing",
    "enable_activation_checkpointing": "train.gradient_checkpointing",
    "use_gradient_checkpointing": "train.gradient_checkpointing",
    "eval_interval": "train.eval_steps",
    "evals_per_epoch": "train.eval_strategy=epoch (or train.eval_steps, optimizer steps)",
    "evaluation_strategy": "train.eval_strategy",
    "save_interval": "train.save_steps",
    "saves_per_epoch": "train.save_strategy=epoch (or train.save_steps, optimizer steps)",
    "checkpointing_steps": "train.save_steps",
    "save_max": "train.save_total_limit",
    "log_every_n_steps": "train.logging_steps",
    "log_interval": "train.logging_steps",
    "logging_strategy": "train.logging_steps (optimizer steps between lines)",
    "early_stopping": "train.early_stopping_patience (evaluations without an improvement)",
    "patience": "train.early_stopping_patience",
    "min_delta": "train.early_stopping_threshold",
    "best_model_metric": "checkpoint.metric_for_best_model",
    "auto_resume_from_checkpoints": "resume_from_checkpoint=auto (the default)",
    "overwrite_output_dir": "output_dir=NEW (a run folder is never overwritten)",
    "resume": "resume_from_checkpoint",
    "resume_from": "resume_from_checkpoint",
    # Optimizer and schedule.
    "lr": "optim.learning_rate",
    "max_lr": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "adam_beta1": "optim.betas=[BETA1,BETA2]",
    "adam_beta2": "optim.betas=[BETA1,BETA2]",
    "beta1": "optim.betas=[BETA1,BETA2]",
    "beta2": "optim.betas=[BETA1,BETA2]",
    "adam_epsilon": "optim.eps",
    "adam_eps": "optim.eps",
    "epsilon": "optim.eps",
    "optimizer": "optim=adamw (the default; or lion)",
    "optim_type": "optim=adamw (the default; or lion)",
    "lr_scheduler": "schedule.lr_scheduler_type",
    "scheduler": "schedule.lr_scheduler_type",
    "scheduler_type": "schedule.lr_scheduler_type",
    "num_warmup_steps": "schedule.warmup_steps",
    "warmup": "schedule.warmup_steps",
    "label_smoothing_factor": "train.label_smoothing",
    "min_lr_ratio": "schedule.min_lr_rate",
    "decay_steps": "schedule.num_decay_steps",
    "warmup_proportion": "schedule.warmup_ratio",
    # Search.
    "n_trials": "hparams_search.trials",
    "num_trials": "hparams_search.trials",
    "search_space": "hparams_search.space",
    # Machine.
    "deepspeed": "zero=3 (or 0, 1, 2; raw keys of a DeepSpeed file go into zero.deepspeed={...})",
    "deepspeed_config": (
        "zero=3 (or 0, 1, 2; raw keys of a DeepSpeed file go into zero.deepspeed={...})"
    ),
    "fsdp": "zero=3 (the partitioning of DeepSpeed)",
    "fsdp_config": "zero=3 (the partitioning of DeepSpeed)",
    "zero_stage": "zero",
    "offload_optimizer": "offload=optimizer_cpu",
    "cpu_offload": "offload=cpu",
    "offload_param": "offload=cpu",
    "device": "hardware.accelerator",
    "no_cuda": "hardware.accelerator=cpu",
    "use_cpu": "hardware.accelerator=cpu",
    "gpus": "launch.nproc",
    "devices": "launch.nproc",
    "n_gpus": "launch.nproc",
    "num_gpus": "launch.nproc",
    "num_processes": "launch.nproc",
    "nproc_per_node": "launch.nproc",
    "nnodes": "hardware.nodes",
    "num_machines": "hardware.nodes",
    "num_nodes": "hardware.nodes",
    "cache": "paths.cache_dir",
    "dataset_prepared_path": "paths.cache_dir",
    # The run and its results.
    "logging_dir": "output_dir",
    "out_dir": "output_dir",
    "output": "output_dir",
    "output_path": "output_dir",
    "save_dir": "output_dir",
    "name": "run_name",
    "experiment_name": "run_name",
    "random_seed": "seed",
    "data_seed": "seed",
    "report_to": "tracker=wandb (or none)",
    "logger": "tracker=wandb (or none)",
    "use_wandb": "tracker=wandb",
    "wandb": "tracker=wandb",
    "wandb_entity": "tracker.entity",
    "wandb_project": "tracker.project",
    "wandb_name": "run_name",
    "wandb_run_id": "run_name",
    "wandb_mode": "tracker.mode",
    "export_dir": "output_dir",
    "hub_model_id": "export.upload=hf://USER/NAME",
    "push_to_hub": "export.upload=hf://USER/NAME",
    "hub_private_repo": "export.upload_private",
    "merge_lora": "export=safetensors (the default)",
    "max_new_token": "chat.max_new_tokens",
    "system_prompt": "chat.system",
    "prompt": "chat.prompt",
}

_NO_PAGES = (
    "CUDA's driver pages such states out as it likes, which no plan can count; optim=adamw_8bit"
    " takes as many bytes, which ZeRO divides among the ranks, and offload=optimizer_cpu holds them"
    " in host memory"
)

#: Option of a group that llmtune has not, as other fine-tuners name it -> why, and what to take.
#: The group's dotted key (:class:`llmtune.registry.Registry`) refuses it with the same words.
ABSENT_OPTIONS: dict[str, dict[str, str]] = {
    "optim": dict.fromkeys(("adamw_paged_8bit", "paged_adamw_8bit"), _NO_PAGES)
}


def meant_by(key: str, known: set[str]) -> str:
    """Suggest a key for an unknown one, as the end of a message: ``": did you mean ...?"``.

    Args:
        key: Dotted; its group may be a foreign one too.
        known: Keys and groups that there are.
    """
    name = key.lower().replace("-", "_").rsplit(".", 1)[-1]
    text = MEANINGS.get(name)
    if text is None:
        # Only the group is wrong; where several groups have the key, none is more likely.
        own = {ALIASES.get(other, other) for other in known if other.rsplit(".", 1)[-1] == name}
        return f": did you mean {own.pop()!r}?" if len(own) == 1 else nearest(key, known)
    if text.startswith("nothing: "):
        return f"; {text.removeprefix('nothing: ')}"
    # A mapping in braces may hold blanks; a remark is in brackets.
    target, space, remark = text.partition(" (")
    return f": did you mean {target!r}{space}{remark}?"
