"""The plan as DeepSpeed's configuration dictionary, with nothing left to ``"auto"``.

Bucket and prefetch sizes are in elements and follow the model: a decoder layer, a hidden-square matrix, an adapter.
"""

from __future__ import annotations

from typing import Any

from llmtune.config.schema import OptimConfig, Precision
from llmtune.plan.batch import BatchPlan
from llmtune.plan.memory import Placement
from llmtune.plan.shape import ModelShape


def to_deepspeed(
    placement: Placement,
    batch: BatchPlan,
    shape: ModelShape,
    optimizer: dict[str, Any],
    precision: Precision,
    max_grad_norm: float,
) -> dict[str, Any]:
    """Everything that ``deepspeed.initialize`` needs."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch.micro_batch_size,
        "gradient_accumulation_steps": batch.accumulation_steps,
        # Said aloud, because DeepSpeed clips to 1.0 where the key is absent.
        "gradient_clipping": float(max_grad_norm),
        "steps_per_print": 2**31,
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": _zero(placement, shape),
    }
    if precision is not Precision.fp32:
        config[precision.value] = {"enabled": True}
    return config


def adamw_parameters(optim: OptimConfig, learning_rate: float, offload_optimizer: bool) -> dict[str, Any]:
    """AdamW's settings in DeepSpeed's spelling."""
    params: dict[str, Any] = {
        "lr": learning_rate,
        "betas": list(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    if not offload_optimizer:
        # torch's AdamW resumes to the bit; DeepSpeed's CPU kernels keep beta^t as a running product and do not.
        params["torch_adam"] = True
    return params


def _zero(placement: Placement, shape: ModelShape) -> dict[str, Any]:
    if placement.zero_stage == 0:
        return {"stage": 0}
    zero: dict[str, Any] = {
        "stage": placement.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        # Races in overlapped reduction gave NaN gradients in the field; every peer ships it off below stage 3.
        "overlap_comm": placement.zero_stage == 3,
        "reduce_bucket_size": min(shape.trainable_parameters, 500_000_000),
        "allgather_bucket_size": min(shape.trainable_parameters, 500_000_000),
    }
    if placement.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if placement.zero_stage < 3:
        return zero
    zero |= {
        "reduce_bucket_size": max(shape.hidden_size**2, shape.largest_adapter_tensor, 1_000_000),
        "sub_group_size": 100_000_000,
        # A layer in use and the next one in flight; reuse between recomputation and its backward pass.
        "stage3_max_live_parameters": 2 * shape.layer_parameters + shape.largest_tensor,
        "stage3_max_reuse_distance": max(1_000_000_000, 2 * shape.layer_parameters),
        "stage3_prefetch_bucket_size": max(shape.layer_parameters * 7 // 20, 1),
        # Adapters stay on every rank: gathering them one by one is bound by latency, not by bytes.
        "stage3_param_persistence_threshold": max(shape.largest_adapter_tensor, 10 * shape.hidden_size),
        "stage3_gather_16bit_weights_on_model_save": False,
    }
    if placement.offload_param:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return zero
