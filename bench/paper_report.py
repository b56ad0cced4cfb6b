"""Tables and plots of bench/paper.py from its cells: means and spreads over seeds, paired differences to the best published method."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from settings import BASELINES, UPPER_LINES

Cells = list[dict[str, Any]]
GROUPS = {
    "development": "rules and numbers may be chosen here",
    "confirmation": "what was seen of these sets: docs/selection.md",
    "kept-aside": "nothing was chosen or tried on these sets",
}


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def mean_spread(values: Sequence[float | None]) -> str:
    """Mean of shares in percent, with the standard deviation over seeds where there are several; "-" where one is missing."""
    if not values or None in values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return percent(statistics.mean(values)) + spread


def values_of(cells: Cells, setting: str, method: str, key: str) -> dict[int, Any]:
    """Seed -> figure of the cells of one setting and method."""
    return {cell["seed"]: cell.get(key) for cell in cells if (cell["setting"], cell["method"]) == (setting, method)}


def methods_in(cells: Cells) -> list[str]:
    return list(dict.fromkeys(cell["method"] for cell in cells))


def setting_mean(cells: Cells, setting: str, method: str, key: str) -> float | None:
    values = list(values_of(cells, setting, method, key).values())
    return None if not values or None in values else statistics.mean(values)


def best_published(cells: Cells, settings: Sequence[str], key: str) -> str | None:
    """The published method with the best mean over all these settings, among those that have the figure in each."""
    means = {}
    for method in BASELINES:
        values = [setting_mean(cells, setting, method, key) for setting in settings]
        if values and None not in values:
            means[method] = statistics.mean(values)
    return max(means, key=means.get) if means else None


def paired(cells: Cells, settings: Sequence[str], method: str, reference: str, key: str) -> dict[str, list[float]]:
    """Setting -> differences of a figure between two methods, one per seed that both have; without settings that have none."""
    differences = {}
    for setting in settings:
        mine, other = (values_of(cells, setting, name, key) for name in (method, reference))
        differences[setting] = [mine[seed] - other[seed] for seed in mine if None not in (mine[seed], other.get(seed))]
    return {setting: found for setting, found in differences.items() if found}


def with_error(differences: dict[str, list[float]]) -> str:
    """Mean difference in points, and its standard error: over the settings, of which each is one draw whatever its seeds, or over
    the seeds of the only one."""
    points = [100 * statistics.mean(found) for found in differences.values()]
    if not points:
        return "-"
    drawn = points if len(points) > 1 else [100 * value for value in next(iter(differences.values()))]
    error = f" ± {statistics.stdev(drawn) / len(drawn) ** 0.5:.1f}" if len(drawn) > 1 else ""
    return f"{statistics.mean(points):+.1f}{error}"


def worst_regret(cells: Cells, settings: Sequence[str], method: str, key: str) -> str:
    """The largest loss against the best published method of a setting, mean over seeds, and where it is."""
    losses = {}
    for setting in settings:
        mine = setting_mean(cells, setting, method, key)
        others = [setting_mean(cells, setting, other, key) for other in BASELINES if other != method]
        others = [value for value in others if value is not None]
        if mine is not None and others:
            losses[setting] = mine - max(others)
    if not losses:
        return "-"
    where = min(losses, key=losses.get)
    return f"{100 * losses[where]:+.1f} ({where})"


def way_to_oracle(cells: Cells, settings: Sequence[str], method: str) -> str:
    """Share of the way from muka-hard to the oracle that the targets take, as means over the settings."""
    means = {}
    for name in (method, "muka-hard", "oracle"):
        values = [setting_mean(cells, setting, name, "target") for setting in settings]
        if not values or None in values:
            return "-"
        means[name] = statistics.mean(values)
    way = means["oracle"] - means["muka-hard"]
    return percent((means[method] - means["muka-hard"]) / way) if way > 0 else "-"


def summary(cells: Cells, settings: Sequence[str], key: str) -> list[str]:
    """One line per method over several settings."""
    reference = best_published(cells, settings, key)
    lines = [
        "| method | selection | target | way to the oracle | student | macro-F1 "
        f"| against {reference or 'the best published'} | worst setting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods_in(cells):
        kept = [name for name in settings if values_of(cells, name, method, "target")]
        if len(kept) < len(settings):  # a method for some settings only has no mean over all
            continue
        cellsof = [[setting_mean(cells, name, method, part) for name in kept] for part in ("selection", "target", "accuracy")]
        cellsof.append([setting_mean(cells, name, method, "macro_f1") for name in kept])
        means = [percent(statistics.mean(values)) if values and None not in values else "-" for values in cellsof]
        means.insert(2, way_to_oracle(cells, kept, method))
        difference = with_error(paired(cells, settings, method, reference, key)) if reference else "-"
        lines.append("| " + " | ".join([method, *means, difference, worst_regret(cells, settings, method, key)]) + " |")
    return lines


def setting_table(cells: Cells, name: str, entry: dict[str, Any]) -> list[str]:
    """Every method on one setting, with the recall of each teacher."""
    sizes = entry["seeds"][0]
    lines = [
        "",
        f"## {name}: {entry['what']} ({entry['group']})",
        "",
        f"Pool {sizes['pool']} texts, test {sizes['test']}. Teachers: "
        + "; ".join(
            f"{teacher['encoder']}, {len(teacher['labels'])} labels of {teacher['set']}, "
            + mean_spread([found["teachers"][i]["accuracy"] for found in entry["seeds"]])
            + " % on their texts"
            for i, teacher in enumerate(sizes["teachers"])
        )
        + ".",
        "",
        "| method | selection | recall of each teacher | target | student | macro-F1 |",
        "|---|---|---|---|---|---|",
    ]
    for method in methods_in([cell for cell in cells if cell["setting"] == name]):
        get = lambda key, method=method: list(values_of(cells, name, method, key).values())
        recalls = [recall for recall in get("recall") if recall is not None]
        columns = [[value for value in column if value is not None] for column in zip(*recalls, strict=True)]
        recall = " / ".join(percent(statistics.mean(column)) if column else "-" for column in columns) or "-"
        figures = [mean_spread(get(key)) for key in ("target", "accuracy", "macro_f1")]
        lines.append("| " + " | ".join([method, mean_spread(get("selection")), recall, *figures]) + " |")
    return lines


def score_key(results: dict[str, Any]) -> str:
    """What methods are compared by: their students, or where these are not trained everywhere their targets."""
    return "accuracy" if best_published(results["cells"], list(results["settings"]), "accuracy") else "target"


def markdown(results: dict[str, Any]) -> str:
    """All tables, with what they were measured on."""
    cells, settings, options = results["cells"], results["settings"], results["options"]
    lines = [
        "# Every method on every setting",
        "",
        f"All figures in percent; means ± standard deviation over {options['seeds']} seed(s) of teachers, pools and students. "
        "Selection: the most trusted teacher owns the true label. Target: the composed target is right (both on the pool). Student: "
        "on held-out texts of all teachers' labels. Way: of the mean targets from muka-hard's to the oracle's. Differences are paired "
        "by setting and seed, ± their standard error over the settings. oracle and supervised see the pool's labels; dawid-skene "
        "learns from labels of its own making. The commit below is that of this table; cells that were finished before may be of "
        "earlier ones.",
        "",
        "Options: " + ", ".join(f"{name} {value}" for name, value in options.items() if value is not None) + ".",
    ]
    for group, told in GROUPS.items():
        names = [name for name, entry in settings.items() if entry["group"] == group]
        if names:
            lines += ["", f"## Mean over the {group} settings ({told}): {', '.join(names)}", ""]
            lines += summary(cells, names, score_key(results))
    for name, entry in settings.items():
        lines += setting_table(cells, name, entry)
    return "\n".join(lines) + "\n"


def plots(results: dict[str, Any], path: Path) -> list[Path]:
    """Beside the table `path`: difference of each method to the best published one per setting; target against student."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    cells, names, key = results["cells"], list(results["settings"]), score_key(results)
    reference, written = best_published(cells, names, key), []
    others = [] if reference is None else [name for name in methods_in(cells) if name not in (reference, *UPPER_LINES)]
    found = {method: paired(cells, names, method, reference, key).values() for method in others}
    differences = {method: [100 * statistics.mean(pairs) for pairs in settings] for method, settings in found.items() if settings}
    if differences:
        figure, axes = pyplot.subplots(figsize=(8, 1.5 + 0.32 * len(differences)), layout="constrained")
        for row, points in enumerate(differences.values()):
            axes.plot(points, [row] * len(points), "o", alpha=0.5)
            axes.plot(statistics.mean(points), row, "k|", markersize=14)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(differences)), differences)
        axes.invert_yaxis()
        axes.set_xlabel(f"points against {reference} ({key}); one dot per setting, bar: mean")
        written.append(save(figure, path.with_name(path.stem + "_differences.svg")))
    points = [cell for cell in cells if cell.get("target") is not None and cell.get("accuracy") is not None]
    if points:
        figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
        for method in methods_in(points):
            mine = [cell for cell in points if cell["method"] == method]
            axes.plot([100 * c["target"] for c in mine], [100 * c["accuracy"] for c in mine], "o", alpha=0.6, label=method)
        axes.set_xlabel("target accuracy on the pool")
        axes.set_ylabel("student accuracy")
        axes.legend(fontsize="small")
        written.append(save(figure, path.with_name(path.stem + "_students.svg")))
    return written


def save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path)
    pyplot.close(figure)
    return path
