"""``loss.png`` beside a model card: the losses of the run up to the step that was exported."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_curves(records: Sequence[Mapping[str, Any]], picture: Path) -> bool:
    """Draw training and held-out loss; the same records make the same bytes.

    Returns:
        Whether there was anything to draw.
    """
    train = _points(records, "loss")
    held_out = _points(records, "eval_loss")
    if not train and len(held_out) < 2:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for points, style in (
        (train, {"color": "tab:blue", "linewidth": 1.2, "label": "training"}),
        (held_out, {"color": "tab:orange", "marker": "o", "label": "held out"}),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    # matplotlib would write its version into the file.
    canvas.print_png(str(picture), metadata={"Software": None})
    return True


def _points(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    found = [(record["step"], record.get(key)) for record in records]
    return [
        (step, value)
        for step, value in found
        if isinstance(value, int | float) and math.isfinite(value)
    ]
