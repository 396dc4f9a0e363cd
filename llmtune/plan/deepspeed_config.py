"""Build DeepSpeed's configuration dictionary from the plan, with nothing left to ``"auto"``."""

from typing import Any

from llmtune.config.schema import Precision
from llmtune.plan.batch_sizes import BatchPlan
from llmtune.plan.memory.placement import Placement
from llmtune.plan.memory.zero_buffers import ZeroSizes


def to_deepspeed(
    placement: Placement,
    batch: BatchPlan,
    sizes: ZeroSizes,
    optimizer: dict[str, Any],
    precision: Precision,
    max_grad_norm: float,
) -> dict[str, Any]:
    """Build what ``deepspeed.initialize`` needs; :func:`with_nvme_path` fills in ``nvme_path``.

    Args:
        optimizer: What :meth:`llmtune.optimizer.optimizer.Optimizer.to_deepspeed` returns.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation_steps,
        # Always set, because DeepSpeed clips to 1.0 where the key is absent.
        "gradient_clipping": float(max_grad_norm),
        "steps_per_print": 2**31,
        # It would wait for the device twice per micro-batch, to print a speed that is measured here
        # anyway.
        "timers": {"throughput": {"enabled": False}},
        **optimizer,
        "zero_optimization": _zero(placement, sizes),
    }
    if placement.uses_nvme:
        config["aio"] = {
            "block_size": sizes.aio.block_size,
            "queue_depth": sizes.aio.queue_depth,
            "intra_op_parallelism": sizes.aio.intra_op_parallelism,
            "single_submit": False,
            "overlap_events": True,
            "use_gds": False,
        }
    if precision is not Precision.fp32:
        config[precision.value] = {"enabled": True, **config.get(precision.value, {})}
    return config


def with_nvme_path(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return a copy whose NVMe sections point to ``folder``."""
    zero = dict(config["zero_optimization"])
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            zero[section] = {**zero[section], "nvme_path": folder}
    return {**config, "zero_optimization": zero}


def _zero(placement: Placement, sizes: ZeroSizes) -> dict[str, Any]:
    if placement.zero_stage == 0:
        return {"stage": 0}
    zero: dict[str, Any] = {
        "stage": placement.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # Below stage 3 it is right under conditions (plan/memory/zero_buffers.py).
        "overlap_comm": sizes.overlaps,
        "reduce_bucket_size": sizes.reduce_bucket,
        "allgather_bucket_size": sizes.allgather_bucket,
    }

    # The optimizer's states.
    if placement.optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    elif placement.optimizer == "nvme":
        zero["offload_optimizer"] = {
            "device": "nvme",
            "pin_memory": True,
            "buffer_count": sizes.optimizer_buffers,
            "fast_init": False,
        }

    # Weights are partitioned, and may be elsewhere, in stage 3 alone.
    if placement.zero_stage < 3:
        return zero
    zero |= {
        "sub_group_size": sizes.sub_group,
        "stage3_max_live_parameters": sizes.max_live,
        "stage3_max_reuse_distance": sizes.max_reuse_distance,
        "stage3_prefetch_bucket_size": sizes.prefetch,
        "stage3_param_persistence_threshold": sizes.persistence_threshold,
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if placement.param == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    elif placement.param == "nvme":
        zero["offload_param"] = {
            "device": "nvme",
            "pin_memory": True,
            "buffer_count": sizes.param_buffers,
            "buffer_size": sizes.param_buffer,
            "max_in_cpu": sizes.max_in_cpu,
        }
    return zero
