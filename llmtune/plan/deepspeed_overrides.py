"""``zero.deepspeed``: raw DeepSpeed keys that override the planned ones.

DeepSpeed ignores unknown keys; here they are refused.
"""

import difflib
from dataclasses import replace
from typing import Any

from llmtune.errors import ConfigError
from llmtune.plan.memory.zero_buffers import ZeroSizes

#: Section -> keys that DeepSpeed 0.19.8 reads; a test compares them with its own models.
KNOWN: dict[str, set[str]] = {
    "": {
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "seq_parallel_communication_data_type",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "steps_per_print",
        "disable_python_gc",
        *("zero_optimization", "aio", "comms_logger", "flops_profiler", "timers"),
    },
    "zero_optimization": {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
        *("round_robin_gradients", "stage3_allgather_sequential", "stage3_max_live_parameters"),
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        *("stage3_param_persistence_threshold", "stage3_prefetch_bucket_size"),
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
        *("zero_hpz_partition_size", "zero_quantized_gradients", "zero_quantized_weights"),
    },
    "zero_optimization.offload_optimizer": {"buffer_count", "pin_memory", "fast_init"},
    "zero_optimization.offload_param": {"buffer_count", "buffer_size", "max_in_cpu", "pin_memory"},
    "aio": {
        "block_size",
        "queue_depth",
        "intra_op_parallelism",
        "single_submit",
        "overlap_events",
        "use_gds",
    },
    "timers": {"throughput"},
    "timers.throughput": {"enabled", "synchronized"},
    "comms_logger": {"enabled", "verbose", "prof_all", "prof_ops", "debug"},
    "flops_profiler": {
        "enabled",
        "profile_step",
        "module_depth",
        "top_modules",
        "detailed",
        "output_file",
        "recompute_fwd_factor",
    },
}

#: Keys whose kernels need nvcc, and would be compiled in each rank; llmtune builds its ops before
#: any rank starts.
NEED_NVCC = {
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_weights",
}

#: Key that llmtune decides itself -> the key to set instead.
OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation_steps",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "optim.*",
    "scheduler": "schedule.*",
    "bf16": "precision",
    "fp16": "precision",
    "zero_optimization.stage": "zero=0, 1, 2 or 3",
    "zero_optimization.offload_optimizer.device": "offload=",
    "zero_optimization.offload_optimizer.nvme_path": "offload.nvme_path",
    "zero_optimization.offload_param.device": "offload=",
    "zero_optimization.offload_param.nvme_path": "offload.nvme_path",
}


def check_raw(raw: dict[str, Any]) -> None:
    """Refuse keys that would have no effect, or the wrong one.

    Raises:
        ConfigError: With every key that DeepSpeed does not read, or that llmtune decides.
    """
    problems = _find_problems(raw, "")
    if problems:
        raise ConfigError.from_problems(problems)


def resize(sizes: ZeroSizes, raw: dict[str, Any]) -> ZeroSizes:
    """Apply the raw keys to the planned sizes, so that memory is estimated for what will run."""
    zero, aio = raw.get("zero_optimization", {}), raw.get("aio", {})
    param = zero.get("offload_param", {})
    aio_keys = ("block_size", "queue_depth", "intra_op_parallelism")
    aio_sizes = {key: aio[key] for key in aio_keys if key in aio}
    overrides = {
        "reduce_bucket": zero.get("reduce_bucket_size"),
        "allgather_bucket": zero.get("allgather_bucket_size"),
        "sub_group": zero.get("sub_group_size"),
        "max_live": zero.get("stage3_max_live_parameters"),
        "max_reuse_distance": zero.get("stage3_max_reuse_distance"),
        "prefetch": zero.get("stage3_prefetch_bucket_size"),
        "persistence_threshold": zero.get("stage3_param_persistence_threshold"),
        "param_buffer": param.get("buffer_size"),
        "max_in_cpu": param.get("max_in_cpu"),
        "param_buffers": param.get("buffer_count"),
        "optimizer_buffers": zero.get("offload_optimizer", {}).get("buffer_count"),
        "overlaps": zero.get("overlap_comm"),
        "secondary_ranks": zero.get("zero_hpz_partition_size"),
        "aio": replace(sizes.aio, **aio_sizes),
    }
    found = replace(sizes, **{key: value for key, value in overrides.items() if value is not None})
    if overrides["overlaps"] is None and found.reduce_bucket < found.largest_gradient:
        # A gradient that no bucket holds is not reduced rightly with overlap.
        found = replace(found, overlaps=False)
    return found


def _find_problems(values: dict[str, Any], section: str) -> list[str]:
    problems: list[str] = []
    for key, value in values.items():
        path = f"{section}.{key}" if section else key
        if path in OWNED:
            problems.append(f"zero.deepspeed.{path}: llmtune decides this; set {OWNED[path]}")
        elif path in NEED_NVCC and value:
            problems.append(
                f"zero.deepspeed.{path}={value}: llmtune does not build DeepSpeed's quantizer,"
                " which needs the CUDA toolkit; leave the key out. zero_hpz_partition_size keeps"
                " gathers within a node without it"
            )
        elif key not in KNOWN[section]:
            close = difflib.get_close_matches(key, KNOWN[section], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            problems.append(
                f"zero.deepspeed.{path}: DeepSpeed would ignore this key or llmtune does not"
                f" support it{hint}"
            )
        elif path in KNOWN:
            if isinstance(value, dict):
                problems += _find_problems(value, path)
            else:
                problems.append(f"zero.deepspeed.{path}={value}: a section of keys")
    return problems


def merge_raw(config: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Return ``config`` overridden by checked raw keys, without sections of other placements."""
    result = dict(config)
    for key, value in raw.items():
        if key.startswith("offload_") and key not in config:
            continue
        result[key] = merge_raw(config.get(key, {}), value) if isinstance(value, dict) else value
    return result
