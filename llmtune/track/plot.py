"""Draw ``loss.png``: training and held-out loss over the steps."""

from pathlib import Path

from llmtune.track.metrics import read_metrics


def write_loss_plot(metrics: Path, picture: Path, title: str) -> None:
    """Draw the curves of a metrics file; draws nothing before the first training record."""
    # pyplot would look for a screen, and keep every figure.
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    held_out = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
    if not train:
        return
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per trained token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture)
