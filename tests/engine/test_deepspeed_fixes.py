"""Each correction of DeepSpeed is still needed: these tests fail when upstream mends what they
correct.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtune.engine.deepspeed_fixes import (
    allow_bf16_masters,
    grow_loss_scale_behind_step,
    share_weights_with_masters,
    undo_stage0_dummy_step,
)
from tests.support import ROOT, free_port, run


@pytest.mark.process
def test_stage_0_in_bf16_makes_a_dummy_step_that_is_taken_back(tmp_path: Path) -> None:
    """In a process of its own, because DeepSpeed wants a process group."""
    script = """
import os
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ["PORT"])
from llmtune.launch.launchers.environment import set_defaults
set_defaults("cpu", 1)
from tests.joined import join_ranks
join_ranks()
import deepspeed, torch
from llmtune.engine.deepspeed_fixes import undo_stage0_dummy_step
model = torch.nn.Linear(4, 4, bias=False)
start = model.weight.detach().to(torch.bfloat16).float()
adam = {"type": "AdamW", "params": {"lr": 0.5, "weight_decay": 0.5, "torch_adam": True}}
config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "optimizer": adam}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
master = engine.optimizer.fp32_groups[0][0]
state = engine.optimizer.optimizer.state
print("before", int(state[master]["step"]), torch.equal(master, start))
assert undo_stage0_dummy_step(engine.optimizer)
print("after", len(state), torch.equal(master, start))
"""  # noqa: E501
    import sys

    done = run([sys.executable, "-c", script], cwd=ROOT, env={"PORT": str(free_port())})
    assert "before 1 False" in done.out, done.err[-2000:]
    assert "after 0 True" in done.out


def test_an_optimizer_without_a_dummy_step_is_left_alone() -> None:
    assert undo_stage0_dummy_step(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])) is False


def test_deepspeed_still_sends_norms_through_fp32() -> None:
    """Where this fails, upstream has mended it: look at ``keep_norm_precision``, and drop what is
    no longer needed.
    """
    import inspect

    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for optimizer in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert "FloatTensor([float(total_norm)])" in inspect.getsource(
            optimizer.complete_grad_norm_calculation_for_cpu_offload
        )
    assert ".sum().float()" in inspect.getsource(DeepSpeedZeroOptimizer.get_grad_norm_direct)


def test_deepspeed_still_divides_by_a_loss_scale_that_stage_0_never_multiplied_by() -> None:
    """Where this fails, look at ``missing_loss_scale``; ``tests/cuda/test_engine.py`` compares the
    losses of all stages.
    """
    import inspect

    from deepspeed.runtime import engine
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    assert not issubclass(FP16_UnfusedOptimizer, ZeROOptimizer)
    assert "if isinstance(self.optimizer, ZeROOptimizer):" in inspect.getsource(engine)


def test_deepspeed_still_compares_a_device_with_a_text() -> None:
    """Where this fails, upstream lets weights be their own master weights: drop
    ``share_weights_with_masters``. ``tests/engine/test_states.py`` counts the bytes.
    """
    import inspect

    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    source = inspect.getsource(Stage3._create_fp32_partitions)
    assert "self.fp16_partitioned_groups_flat[i].device == self.device" in source
    assert "self.device = get_accelerator().current_device_name()" in inspect.getsource(Stage3)
    assert isinstance(get_accelerator().current_device_name(), str)


@pytest.mark.parametrize("offload", [False, True])
def test_weights_are_shared_within_one_method_alone(
    offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    seen: list[object] = []

    def create(self: SimpleNamespace) -> None:
        seen.append(self.device)

    monkeypatch.setattr(Stage3, "_create_fp32_partitions", create)
    optimizer = SimpleNamespace(device="cuda:0", offload_optimizer=offload)
    with share_weights_with_masters():
        Stage3._create_fp32_partitions(optimizer)
    assert seen == ["cuda:0" if offload else torch.device("cuda:0")]
    assert optimizer.device == "cuda:0"
    assert Stage3._create_fp32_partitions is create


def test_deepspeed_still_takes_bf16_masters_of_its_own_optimizer_only() -> None:
    """Where this fails, look at ``allow_bf16_masters``."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    def refuse() -> None:
        raise AssertionError("not DeepSpeedCPUAdam")

    settings = {"bf16_master_weights_and_gradients": True, "bf16_offload_validator": refuse}
    optimizer = SimpleNamespace(optimizer=None)
    with pytest.raises(AssertionError, match="not DeepSpeedCPUAdam"):
        ZeROOptimizer._configure_master_weights(optimizer, **settings)
    with allow_bf16_masters():
        dtype = ZeROOptimizer._configure_master_weights(optimizer, **settings)
    assert dtype is torch.bfloat16


def test_deepspeed_still_waits_for_the_device_with_every_offloaded_tensor() -> None:
    """Where this fails, look at ``keep_overflow_on_device``."""
    import inspect

    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedZeroOptimizer.update_offload_overflow_tracker)
    assert "if grad is not None and self._has_inf_or_nan(grad.data):" in source


@pytest.mark.parametrize(
    ("overflow", "divided_by", "left_at"), [(False, 8.0, 16.0), (True, 4.0, 4.0)]
)
def test_the_scale_grows_behind_a_step_and_shrinks_at_once(
    overflow: bool, divided_by: float, left_at: float
) -> None:
    """What overflows is thrown away, so that nothing is divided by what it shrinks to."""
    scaler = SimpleNamespace(dynamic=True, cur_scale=8.0)
    seen: list[float] = []

    def update(has_overflow: bool = False) -> None:
        scaler.cur_scale *= 0.5 if has_overflow else 2.0

    optimizer = SimpleNamespace(loss_scaler=scaler, _update_scale=update)

    def step() -> None:
        optimizer._update_scale(overflow)
        seen.append(scaler.cur_scale)

    optimizer.step = step
    assert grow_loss_scale_behind_step(optimizer)
    optimizer.step()
    assert (seen, scaler.cur_scale) == ([divided_by], left_at)


def test_a_scale_that_never_changes_is_left_alone() -> None:
    """That of bf16 and fp32."""
    assert not grow_loss_scale_behind_step(
        SimpleNamespace(loss_scaler=SimpleNamespace(dynamic=False))
    )
    assert not grow_loss_scale_behind_step(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]))


def test_deepspeed_still_lets_the_loss_scale_grow_before_it_divides_by_it() -> None:
    """Where this fails, look at ``grow_loss_scale_behind_step`` and at ``step_in_few_kernels``."""
    import inspect

    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for optimizer, update in (
        (FP16_UnfusedOptimizer, "self._update_scale(False)"),
        (DeepSpeedZeroOptimizer, "self._update_scale(self.overflow)"),
        (DeepSpeedZeroOptimizer_Stage3, "self._loss_scale_update_and_overflow_cleanup()"),
    ):
        # Of the class: a decorator hides that of the method.
        source = inspect.getsource(optimizer).partition("    def step(self, closure=None):")[2]
        assert 0 < source.index(update) < source.index("self.unscale_and_clip_grads("), optimizer
