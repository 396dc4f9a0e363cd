"""The units of keys that take a number."""

from __future__ import annotations

ROWS, STEPS, TOKENS, BYTES, SHARE = "rows", "optimizer steps", "tokens", "bytes", "share"
RATE, SECONDS = "bytes per second", "seconds"

_KEYS_OF_UNITS: dict[str, tuple[str, ...]] = {
    ROWS: (
        *("train.global_batch_size", "train.per_device_train_batch_size"),
        *("train.per_device_eval_batch_size", "train.eval_max_rows"),
        *("data.shuffle_buffer", "predict.batch_size"),
    ),
    "rows, or a share": ("data.val_set_size",),
    TOKENS: ("data.max_seq_length", "chat.max_new_tokens", "predict.max_new_tokens"),
    STEPS: (
        *("train.max_steps", "train.logging_steps", "train.eval_steps", "train.save_steps"),
        *("schedule.warmup_steps", "schedule.timescale", "schedule.num_decay_steps"),
        *("checkpoint.keep_every", "profile.steps", "profile.warmup_steps"),
        "hparams_search.pruner_warmup_steps",
    ),
    "micro-batches": ("train.gradient_accumulation_steps",),
    "steps or tokens, and rows": ("train.batch_schedule",),
    "epochs": ("train.num_train_epochs",),
    "evaluations": ("train.early_stopping_patience",),
    "of the metric": ("train.early_stopping_threshold",),
    "checkpoints": ("train.save_total_limit",),
    SHARE: (
        *("data.max_overlong_share", "train.label_smoothing", "schedule.warmup_ratio"),
        *("schedule.decay_ratio", "hardware.compute_efficiency"),
    ),
    "share of the peak": ("schedule.min_lr_rate",),
    "probability": ("tuner.lora_dropout", "predict.top_p"),
    "learning rate": ("optim.learning_rate", "schedule.min_lr", "schedule.lr_end"),
    "share per step": ("optim.betas", "optim.momentum"),
    BYTES: (
        *("hardware.gpu_memory_bytes", "hardware.host_memory_bytes", "hardware.nvme_bytes"),
        *("launch.memory_limit", "tracker.artifact_max_bytes", "export.max_shard_bytes"),
    ),
    RATE: (
        *("hardware.gpu_link_bandwidth", "hardware.pcie_bandwidth", "hardware.network_bandwidth"),
        *("hardware.host_memory_bandwidth", "hardware.nvme_read_bandwidth"),
        "hardware.nvme_write_bandwidth",
    ),
    "operations per second": ("hardware.gpu_flops",),
    "price of an hour": ("hardware.gpu_hour_price",),
    "machines": ("hardware.nodes",),
    "GPUs": ("hardware.gpus_per_node",),
    "processes": (
        *("launch.nproc", "launch.sequence_parallel_size"),
        *("data.num_workers", "data.dataloader_num_workers"),
    ),
    SECONDS: ("launch.hang_timeout", "launch.stop_timeout", "hparams_search.timeout"),
    "restarts": ("launch.max_restarts",),
    "layers": (
        *("train.gradient_checkpointing", "tuner.freeze.last_layers"),
        "tuner.layers_to_transform",
    ),
    "classes": ("predict.top_k",),
    "days": ("runs.unused_days",),
    "trials": ("hparams_search.trials", "hparams_search.pruner_startup_trials"),
    "relative difference": ("export.parity_bound",),
}

#: Key -> unit.
UNITS: dict[str, str] = {key: unit for unit, keys in _KEYS_OF_UNITS.items() for key in keys}

#: Keys that take a number without a unit.
WITHOUT_UNIT: frozenset[str] = frozenset(
    [
        *("seed", "predict.seed", "hparams_search.seed", "zero.stage"),
        *("tuner.lora_r", "tuner.lora_alpha", "tuner.lora_plus_ratio"),
        *("train.max_grad_norm", "train.neftune_noise_alpha"),
        *("optim.weight_decay", "optim.eps", "schedule.num_cycles", "schedule.power"),
        *("chat.temperature", "predict.temperature", "tracker.prometheus_port"),
        "serve.port",
        *("data.class_weights", "tuner.trainable_token_indices"),
    ]
)
