"""The course of a run as a picture: its loss, or what else was measured."""

import json
from pathlib import Path

MOST_MARKERS = 60  # points of a line that are still told apart

# What is measured of a run beside its loss: key in the records -> what it is called.
COURSE = {
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "memory_gib": "memory, GiB",
    "router_max_violation": "router violation",
    "router_entropy": "router entropy",
}


def read_metrics(path: Path) -> list[dict]:
    """The records of a `metrics.jsonl`, oldest first, without a line that a killed run left unfinished."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def draw_curve(records: list[dict], path: Path, title: str) -> bool:
    """Draws training and validation loss over tokens, in nats and in bits per byte.

    Args:
        records: with `tokens` and `loss`, or with `tokens`, `val_loss` and `val_bits_per_byte`.
        path: the PNG to write.
        title: above the picture.

    Returns:
        Whether it was drawn; matplotlib comes with the extra `train`.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError:
        return False
    train = [(r["tokens"], r["loss"]) for r in records if "loss" in r]
    val = [(r["tokens"], r["val_loss"], r["val_bits_per_byte"]) for r in records if "val_loss" in r]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9db8d2", linewidth=1.2, label="training, smoothed")
    if val:
        tokens, loss, bits = zip(*val, strict=True)
        label = f"validation: {loss[-1]:.3f} nats, {bits[-1]:.3f} bits per byte"
        axes.plot(tokens, loss, color="#1f4e79", marker="o", markersize=4, label=label)
        ratio = bits[-1] / max(loss[-1], 1e-9) or 1.0
        second = axes.secondary_yaxis("right", functions=(lambda y: y * ratio, lambda y: y / ratio))
        second.set_ylabel("bits per byte")
    losses = [y for _, y in train] + [y for _, y, _ in val]
    if losses:
        # The first steps are far above the rest and would flatten it.
        low, top = min(losses), sorted(losses)[int(0.9 * (len(losses) - 1))]
        margin = 0.12 * (top - low) + 0.02
        axes.set_ylim(low - margin, top + margin)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(loc="best")
    figure.savefig(path, dpi=120)
    return True


def draw_measures(records: list[dict], path: Path, title: str, measures: dict[str, str]) -> bool:
    """Draws measures over steps, one below the other.

    Args:
        records: of `metrics.jsonl`.
        path: the PNG to write.
        title: above the picture.
        measures: key in the records -> what it is called.

    Returns:
        Whether it was drawn; matplotlib comes with the extra `train`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 2.1 * len(measures) + 0.6), layout="constrained")
    for axes, (key, name) in zip(
        figure.subplots(len(measures), sharex=True, squeeze=False)[:, 0], measures.items(), strict=True
    ):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            marker = "o" if len(points) <= MOST_MARKERS else None
            axes.plot(*zip(*points, strict=True), color="#1f4e79", marker=marker, markersize=3, linewidth=1.2)
        axes.set_ylabel(name)
        axes.grid(alpha=0.25)
    axes.set_xlabel("steps")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    return True


def draw_course(records: list[dict], path: Path, title: str) -> bool:
    """Draws what else was measured of a run: `COURSE`, as far as it is in the records.

    Returns:
        Whether it was drawn: there is something to draw, and matplotlib is installed.
    """
    measures = {key: name for key, name in COURSE.items() if any(key in record for record in records)}
    return bool(measures) and draw_measures(records, path, title, measures)
