"""The learning rate as a pure function of the step, so that a resume needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from llmtune.config.groups.schedule import ScheduleConfig
from llmtune.errors import ConfigError
from llmtune.plan.steps import StepsPlan
from llmtune.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """An optimizer step behind the warm-up, and what its learning rate depends on."""

    step: int
    """Counted from 0."""
    warmup_steps: int
    total_steps: int
    peak: float
    """Peak learning rate."""
    settings: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def done(self) -> float:
        """Return the share of the steps after warm-up that are done, from 0 to 1."""
        return (self.step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One shape of the learning rate after warm-up."""

    name: str
    """Its value of ``schedule.lr_scheduler_type``."""
    share: Callable[[Point], float]
    """Return the share of the peak at a point."""
    reads: tuple[str, ...] = ()
    """The keys of ``schedule`` that it reads beside those of the warm-up."""
    check: Callable[[Point], None] | None = None
    """Raise a ``ConfigError`` where steps, peak and settings do not fit together.

    It is called with the point behind the warm-up.
    """

    def __post_init__(self) -> None:
        if unknown := set(self.reads) - _KEYS:
            raise ValueError(f"{self.name} reads schedule.{min(unknown)}, which is no key")
        for step in (0, 50, 100):
            share: object = self.share(
                Point(step=step, warmup_steps=0, total_steps=100, peak=1.0, settings=_TYPICAL)
            )
            if not (isinstance(share, int | float) and math.isfinite(share) and share >= 0):
                raise ValueError(
                    f"the share of the schedule {self.name} must be a number from 0 on, and is"
                    f" {share!r} at step {step} of 100"
                )

    def find_problems(self, settings: ScheduleConfig) -> list[str]:
        """Find keys of ``schedule`` that are set and would have no effect."""
        defaults = ScheduleConfig()
        return [
            f"schedule.{key}={getattr(settings, key)}: {self.name} does not read it; leave it out"
            for key in sorted(_KEYS - set(self.reads))
            if getattr(settings, key) != getattr(defaults, key)
        ]

    def check_settings(self, settings: ScheduleConfig, max_steps: int | None) -> None:
        """Refuse settings that fit no learning rate, or no run of so many steps.

        Raises:
            ConfigError: As ``check`` raises it.
        """
        if self.check is not None:
            steps = max_steps or _MANY_STEPS
            self.check(
                Point(step=0, warmup_steps=0, total_steps=steps, peak=math.inf, settings=settings)
            )

    def describe(self, settings: ScheduleConfig) -> str:
        """Describe it with its settings in a phrase, for the page before step 1."""
        set_keys = [key for key in self.reads if getattr(settings, key) is not None]
        described = [f"{key} {getattr(settings, key)}" for key in set_keys]
        return f"{self.name} ({', '.join(described)})" if described else self.name


_KEYS = {item.name for item in fields(ScheduleConfig)} - {
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
}
#: The length of a run whose rows are not counted yet.
_MANY_STEPS = 10**9
#: Settings with which every schedule can be tried.
_TYPICAL = ScheduleConfig(min_lr_rate=0.1)

SCHEDULES: Registry[Schedule] = Registry(
    "schedule.lr_scheduler_type", "llmtune.train.schedules", interface=Schedule
)


def learning_rate_at(step: int, steps: StepsPlan, peak: float, settings: ScheduleConfig) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0.

    Warm-up rises linearly and reaches the peak at step ``warmup_steps``. The decay would reach its
    end at step ``total_steps``, one after the last. This follows transformers'
    ``get_*_schedule_with_warmup`` (``optimization.py``), except for its first step, whose rate is 0
    there.
    """
    if step < steps.warmup_steps:
        return peak * (step + 1) / (steps.warmup_steps + 1)
    schedule = SCHEDULES.find(settings.lr_scheduler_type)
    return peak * schedule.share(_point(step, steps, peak, settings))


def check_schedule(settings: ScheduleConfig, steps: StepsPlan, peak: float) -> None:
    """Refuse settings that do not fit the length of the run, or its peak learning rate.

    Raises:
        ConfigError: With the key, its value and the limit.
    """
    check = SCHEDULES.find(settings.lr_scheduler_type).check
    if check is not None:
        check(_point(steps.warmup_steps, steps, peak, settings))


def describe_extension(
    settings: ScheduleConfig, step: int, before: StepsPlan, now: StepsPlan
) -> str:
    """Say what more steps than before change in the learning rate.

    Args:
        step: Optimizer steps that are done.
    """
    text = f"longer than before: {before.total_steps} -> {now.total_steps} steps"
    if step >= before.total_steps:
        rate = learning_rate_at(step, now, 1.0, settings)
        return f"{text}; the learning rate of the next step is {rate:.4g} of its peak"
    old, new = (learning_rate_at(step, steps, 1.0, settings) for steps in (before, now))
    ahead = range(step, before.total_steps)
    if all(
        learning_rate_at(s, before, 1.0, settings) == learning_rate_at(s, now, 1.0, settings)
        for s in ahead
    ):
        return f"{text}; the learning rate of the steps up to the old end is unchanged"
    return (
        f"{text}; the schedule now runs to the new end: the learning rate of the next step is"
        f" {new:.4g} of its peak, not {old:.4g}"
    )


def check_end(key: str, end: float | None, peak: float) -> None:
    """Refuse a learning rate at the end that is not below the peak.

    Args:
        key: The key of ``schedule`` that sets ``end``.

    Raises:
        ConfigError: With both rates.
    """
    if end is not None and end >= peak:
        raise ConfigError(
            f"schedule.{key}={end:g}: not below the peak learning rate of {peak:g}; take a smaller"
            f" schedule.{key}, or a larger optim.learning_rate"
        )


def _point(step: int, steps: StepsPlan, peak: float, settings: ScheduleConfig) -> Point:
    return Point(
        step=step,
        warmup_steps=steps.warmup_steps,
        total_steps=steps.total_steps,
        peak=peak,
        settings=settings,
    )
