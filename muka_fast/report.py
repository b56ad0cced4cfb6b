"""`muka-fast report DIR`: one self-contained HTML page about a run (no script, no network), from what the run wrote down."""

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from muka_fast import __version__
from muka_fast.config import ReportConfig, RunConfig
from muka_fast.errors import UserError
from muka_fast.files import write_text
from muka_fast.methods import unused_options
from muka_fast.runinfo import read_metrics, read_run

log = logging.getLogger("muka_fast")
TEMPLATES = Path(__file__).parent / "templates"
INK, ACCENT, PALE = "#1f2933", "#1b6ca8", "#9db8cc"
NOISY = 100  # lines of metrics from which on a centred mean over a twentieth of them is drawn
MOST_CLASSES = 400  # rows of the per-class table; a page of 10,000 helps nobody


def main(config: ReportConfig) -> int:
    """Write DIR/report.html and tell where it is."""
    path = write_report(Path(config.run))
    log.info("report: %s", path)
    return 0


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html, aside and then renamed; returns its path.

    Raises:
        UserError: no such folder, no run in it, a damaged run.json.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"report {folder}: no such folder; give the --output of a run")
    record = read_run(folder)
    if not record:
        raise UserError(f"report {folder}: holds no run.json; give the --output of a run that reached its training")
    try:
        page = render(record, read_metrics(folder / "metrics.jsonl"), folder.resolve().name)
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        raise UserError(f"report {folder}: run.json is damaged or of another version ({type(error).__name__}: {error})") from error
    try:
        write_text(folder / "report.html", page)
    except OSError as error:
        raise UserError(f"report {folder}: report.html cannot be written ({error.strerror or error})") from error
    return folder / "report.html"


def renew_report(folder: Path) -> None:
    """Write the page anew where there is one: it is of the run before it was resumed."""
    if (folder / "report.html").exists():
        write_report(folder)


def render(record: dict[str, Any], metrics: Sequence[dict[str, Any]], name: str) -> str:
    """The page. record: run.json; metrics: lines of metrics.jsonl. Every text in them is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "figure": figure}
    metrics = [line for line in metrics if isinstance(line.get("loss"), (int, float))]
    supervision = record.get("supervision") or {}
    student = record.get("metrics", {}).get("student") or {}
    several = len(record["teachers"]) > 1  # one alone is always chosen, by a margin of 1
    unused = unused_options(RunConfig.model_construct(**record["config"]))
    every = student.get("per_class") or {}
    classes = [(label, row) for label, row in every.items() if row["support"]]  # of the others the texts say nothing
    return environment.get_template("report.html.j2").render(
        name=name,
        version=__version__,
        record=record,
        configuration={option: value for option, value in record["config"].items() if option not in unused},
        several=several,
        student=student,
        classes=classes[:MOST_CLASSES],
        num_classes=len(classes),
        num_absent=len(every) - len(classes),
        supervision=supervision,
        head_tells=(record.get("uncertainty_head") or {}).get("tells", True),
        sampling=record.get("sampling"),
        coverage=record.get("coverage"),
        others={key: value for key, value in record.get("metrics", {}).items() if isinstance(value, (int, float))},
        last=metrics[-1] if metrics else None,
        loss_chart=chart(draw_loss, metrics) if metrics else None,
        margin_chart=chart(draw_margins, supervision["margin_histogram"]) if several and supervision.get("margin_histogram") else None,
        calibration_chart=chart(draw_calibration, student["calibration"]) if student.get("calibration") else None,
    )


def percent(value: float | None) -> str:
    """0.7312 -> 73.1 %."""
    return "–" if value is None else f"{100 * value:.1f} %"


def figure(value: Any) -> str:
    """A value for a table cell: four significant digits, lists joined, nothing for None."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "–"
    return str(value)


# ---- charts ----


def chart(draw: Callable[[Any, Any], None], data: Any) -> Markup:
    """An inline SVG whose text stays text; it holds numbers and our own captions only, never a text of the run."""
    import matplotlib
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "muka_fast", "text.parse_math": False}
    settings |= {"font.size": 10, "font.family": "sans-serif"}
    settings |= {"axes.edgecolor": PALE, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#e4e9ee"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = picture.add_subplot()
        axes.grid(axis="y")
        draw(axes, data)
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    return Markup(svg[svg.index("<svg") :])


def draw_loss(axes: Any, metrics: Sequence[dict[str, Any]]) -> None:
    steps, losses = [line["step"] for line in metrics], [line["loss"] for line in metrics]
    noisy = len(losses) >= NOISY
    axes.plot(steps, losses, color=PALE if noisy else ACCENT, linewidth=1.0 if noisy else 1.6, marker="o" if len(losses) < 2 else None)
    if noisy:
        half, lines, sums = len(losses) // 40, np.arange(len(losses)), np.cumsum([0.0, *losses])
        start, stop = np.maximum(0, lines - half), np.minimum(len(losses), lines + half + 1)
        axes.plot(steps, (sums[stop] - sums[start]) / (stop - start), color=ACCENT, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")


def draw_margins(axes: Any, histogram: Sequence[int]) -> None:
    width = 1 / len(histogram)
    axes.bar([(index + 0.5) * width for index in range(len(histogram))], histogram, width=0.9 * width, color=ACCENT)
    axes.set_xlim(0, 1)
    axes.set_xlabel("teacher margin (gap of the two best teacher scores)")
    axes.set_ylabel("texts")


def draw_calibration(axes: Any, bins: Sequence[dict[str, float]]) -> None:
    axes.plot([0, 1], [0, 1], color=PALE, linewidth=1.0, linestyle="--")
    most = max(bin_["count"] for bin_ in bins)
    sizes = [12 + 110 * bin_["count"] / most for bin_ in bins]
    points = [bin_["confidence"] for bin_ in bins], [bin_["accuracy"] for bin_ in bins]
    axes.plot(*points, color=ACCENT, linewidth=1.0)
    axes.scatter(*points, s=sizes, color=ACCENT)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("confidence of the student")
    axes.set_ylabel("accuracy")
