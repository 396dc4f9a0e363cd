"""A power of the share of steps to come, from the peak down to ``lr_end``."""

from __future__ import annotations

from llmtune.train.schedule import SCHEDULES, Point, Schedule, check_end


def _share(point: Point) -> float:
    """Follow transformers' ``get_polynomial_decay_schedule_with_warmup``."""
    least = point.settings.lr_end / point.peak
    return float((1 - least) * (1 - point.done) ** point.settings.power + least)


def _check(point: Point) -> None:
    check_end("lr_end", point.settings.lr_end, point.peak)


SCHEDULES.register(
    Schedule(name="polynomial", share=_share, reads=("power", "lr_end"), check=_check)
)
