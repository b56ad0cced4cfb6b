"""The report page: everything a run wrote down is on it, and nothing in it is live."""

import copy
import html
import json
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from muka_fast import report
from muka_fast.config import RunConfig
from muka_fast.errors import UserError

NASTY = '<script>alert("x")</script> & $\\frac{1}{0}$ "quotes" </svg></td>'


@pytest.fixture
def record() -> dict:
    """run.json of a finished run, every text of which is hostile."""
    example = {"example_id": 7, "text": NASTY, "teacher": NASTY, "margin": 0.25, "says": NASTY, "probability": 0.5, "label": NASTY}
    block = {"num_classes": 1, "support": 2, "accuracy": 0.5, "in_block": 1.0, "within_block": None}
    per_class = {NASTY: {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 12}}
    bins = [{"count": 3, "confidence": 0.3, "accuracy": 0.2}, {"count": 9, "confidence": 0.9, "accuracy": 0.8}]
    figures = {"accuracy": 0.7312, "macro_f1": 0.7, "nll": 0.9, "ece": 0.05, "num_texts": 12, "calibration": bins}
    figures |= {"per_class": per_class, "per_teacher_block": {NASTY: block, "other": block}}
    return {
        "state": "complete",
        "config": {"method": "muka-soft", "margin": True, "texts": NASTY, "label_map": None},
        "labels": [NASTY],
        "overlaps": [NASTY],
        "teachers": [{"name": name, "fingerprint": "f", "labels": [NASTY]} for name in (NASTY, "other")],
        "data": {"source": NASTY, "texts": 1200, "blank": 0, "fingerprint": "f"},
        "layout": {"processes": 2},
        "versions": {"torch": NASTY},
        "seconds": {"train": 12.5},
        "coverage": {"texts": 1, "share": 1 / 1200, "examples": [{"example_id": 7, "text": NASTY}]},
        "metrics": {"student": figures, "selection_accuracy": 0.9, "target_accuracy": 0.8, "num_labelled_texts": 1100},
        "supervision": {
            "source": "muka-soft",
            "shares": {NASTY: 0.75, "other": 0.25},
            "margin_histogram": [0, 3, 9],
            "margin_mean": 0.5,
            "lowest_margin": [example],
            "highest_margin": [example],
        },
    }


def metrics(steps: int) -> list[dict]:
    return [{"step": step, "epoch": step / 10, "loss": 1 / step, "lr": 1e-3} for step in range(1, steps + 1)]


class Tags(HTMLParser):
    """Collects tags and attributes, and checks that every element is closed in its order."""

    VOID = ("meta", "br", "path", "use", "rect", "circle", "line")

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("steps", [1, 5, 300])
def test_every_text_is_escaped_and_the_page_is_self_contained(record, steps):
    page = report.render(record, metrics(steps), NASTY)
    parser = Tags()
    parser.feed(page)
    assert not parser.open and not parser.seen & {"script", "img", "link", "iframe", "object", "embed"}
    assert not [name for name, _ in parser.attributes if name.startswith("on")]
    links = [value for name, value in parser.attributes if name in ("href", "src", "xlink:href", "srcset", "action")]
    assert all(value.startswith("#") for value in links)  # markers inside of a chart
    assert not re.search(r"url\((?!#)|@import", page)
    assert NASTY not in page and html.escape(NASTY) in page.replace("&#34;", "&quot;")
    assert page.count("alert(") >= 10  # titles, tables and examples show it, as text


def test_figures_charts_and_tables_are_there(record):
    page = report.render(record, metrics(50), "my run")
    assert page.count("<svg") == 3 and "73.1 %" in page and "33.3 %" in page and "0.250" in page
    titles = ("Training loss", "Calibration", "Least clear texts", "Clearest texts", "Classes", "Configuration", "Seconds per stage")
    assert all(title in page for title in titles)
    assert "muka-soft + margin" in page
    other = report.render(record | {"config": record["config"] | {"method": "muka-auto"}}, metrics(50), "my run")
    assert "muka-auto" in other and "muka-auto + margin" not in other
    assert "label_map" not in page  # options that are not set do not fill the table


def test_classes_that_no_text_has_are_counted_and_not_measured(record):
    per_class = record["metrics"]["student"]["per_class"]
    assert "do not occur" not in report.render(record, metrics(5), "my run")
    per_class |= {"absent": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}}
    page = report.render(record, metrics(5), "my run")
    assert "1 more classes do not occur in these texts" in page and ">absent<" not in page


@pytest.mark.parametrize("count", [200, 333])
def test_the_line_through_a_noisy_loss_is_its_mean_over_a_twentieth(count):
    drawn = Figure().add_subplot()
    losses = [(7 * i) % 11 for i in range(count)]
    report.draw_loss(drawn, [{"step": i, "loss": loss} for i, loss in enumerate(losses)])
    half = count // 40
    around = [losses[max(0, i - half) : i + half + 1] for i in range(count)]
    assert drawn.lines[1].get_ydata() == pytest.approx([sum(window) / len(window) for window in around])


def test_a_mark_of_the_calibration_grows_with_its_texts():
    drawn = Figure().add_subplot()
    report.draw_calibration(drawn, [{"count": count, "confidence": 0.5, "accuracy": 0.5} for count in (1, 100, 50)])
    few, most, half = drawn.collections[0].get_sizes()
    assert 0 < few < half < most


def test_figures_tell_how_many_texts_they_rest_on(record):
    page = report.render(record, metrics(3), "my run")
    assert page.count(", of 1,100 texts with a known label<") == 2 and "12 evaluation texts<" in page
    record["metrics"]["student"]["num_unknown"] = 1234
    assert "12 evaluation texts; 1,234 more left out, of labels that the student" in report.render(record, metrics(3), "my run")
    del record["metrics"]["num_labelled_texts"]  # a run of an earlier version
    assert "composed target is right<" in report.render(record, metrics(3), "my run")


def test_doubt_is_told_where_it_was_measured(record):
    assert "Doubt" not in report.render(record, metrics(3), "my run")
    head = {"wrong_auroc": 0.81234, "unknown_auroc": None, "unknown_fpr95": None}
    record["metrics"]["student"]["doubt"] = {"uncertainty head": head, "softmax": head | {"wrong_auroc": 0.75}}
    page = report.render(record, metrics(3), "my run")
    row = '<tr><td>{}</td><td class="n">{}</td><td class="n">–</td><td class="n">–</td></tr>'
    assert "<h2>Doubt</h2>" in page and row.format("uncertainty head", "0.8123") in page and row.format("softmax", "0.75") in page
    assert "every text gets the same doubt" not in page
    record["uncertainty_head"] = {"tells": False}
    assert "every text gets the same doubt" in report.render(record, metrics(3), "my run")
    del record["metrics"]  # a run without --eval
    page = report.render(record, metrics(3), "my run")
    assert "every text gets the same doubt" in page and "AUROC" not in page


def test_one_teacher_alone_is_compared_with_nobody(record):
    choice = ("Least clear texts", "Clearest texts", "How often each teacher", "Mean margin", "How clear the choice was", "75.0 %")
    page = report.render(record, metrics(3), "my run")
    assert all(told in page for told in choice)
    record["teachers"] = record["teachers"][:1]
    page = report.render(record, metrics(3), "my run")
    assert not [told for told in choice if told in page] and "1 teacher merged" in page and page.count("<svg") == 2
    assert "within block" in page  # what it knows, and how well the student does there


def test_who_chose_the_teachers_is_a_sentence(record):
    record["supervision"]["source"] = "predictive entropy"
    page = report.render(record, metrics(3), "my run")
    assert "each teacher was chosen (by predictive entropy; method muka-soft itself selects nobody). Mean margin: 0.5." in page


@pytest.mark.parametrize("method", ["uhc", "vkd", "mean", "muka-soft"])
def test_the_configuration_holds_only_what_the_method_looks_at(record, method):
    record["config"] = RunConfig(method=method, uncertainty="mutual_information").resolved()
    shown = lambda: "<td>uncertainty</td>" in report.render(record, metrics(3), "my run")
    assert shown() is (method == "muka-soft")
    record["config"]["uncertainty_head"] = True  # its doubt is of that measure
    assert shown() and "<td>kd_temperature</td>" in report.render(record, metrics(3), "my run")


def test_what_an_early_end_of_the_passes_saved(record):
    assert "Passes ended early" not in report.render(record, metrics(3), "my run")
    record["config"]["mc_stop"] = 0.02
    record["sampling"] = {"mc_samples": 16, "mean_samples": 5.25, "samples_saved": 0.671875}
    record["sampling"]["texts_by_samples"] = {"4": 1100, "16": 100}
    page = " ".join(report.render(record, metrics(3), "my run").split())
    assert "Passes ended early (mc_stop 0.02): 5.25 of 16 a text and teacher, 67.2 % saved." in page
    assert "Texts by passes: 4: 1,100, 16: 100." in page


def test_a_run_that_is_under_way_has_a_page(record):
    for key in ("metrics", "supervision", "seconds"):
        del record[key]
    page = report.render(record | {"state": "training"}, metrics(3), "my run")
    assert "not finished: 3 steps are done" in page and page.count("<svg") == 1
    assert "not finished" in report.render(record | {"state": "training"}, [], "my run")


def test_written_beside_the_run_and_damaged_files_are_told(record, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        report.write_report(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"holds no run\.json"):
        report.write_report(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "epoch": 0.1}\n{"step": 2, "lo')  # cut off by a kill
    assert "step 1" in report.write_report(tmp_path).read_text()
    for key in ("teachers", "config", "data"):
        damaged = copy.deepcopy(record)
        damaged[key] = None
        (tmp_path / "run.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match=r"damaged or of another version|is not the record of a run"):
            report.write_report(tmp_path)
    (tmp_path / "run.json").write_text("[1")
    with pytest.raises(UserError, match="cannot be read"):
        report.write_report(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html cannot be written \(Is a directory\)"):
        report.write_report(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_a_coverage_hole_is_told_and_only_where_it_was_asked_for(record):
    page = report.render(record, metrics(5), "run")
    assert "Coverage hole" in page and "1 text belongs to no teacher (0.1 %)" in page
    record["coverage"] = {"texts": 0, "share": 0.0, "examples": []}
    assert "0 texts belong to no teacher (0.0 %)" in report.render(record, metrics(5), "run")
    del record["coverage"]
    assert "Coverage hole" not in report.render(record, metrics(5), "run")


def test_the_page_of_an_unfinished_run_is_renewed_when_it_is_complete(go, stop_at, monkeypatch):
    stop_at(3)
    page = report.write_report(go("cut", epochs=1).output)
    assert "not finished" in page.read_text()
    monkeypatch.undo()
    go("cut", epochs=1, resume=True)
    assert "not finished" not in page.read_text()
    page.unlink()
    report.renew_report(page.parent)
    assert not page.exists()  # none was asked for


@pytest.mark.parametrize("label", ["?", None])
def test_figures_of_the_targets_rest_on_known_labels_alone(go, world, tmp_path, label):
    rows = [json.loads(line) for line in (world / "texts.jsonl").read_text().splitlines()]
    rows[:20] = [row | {"label": label} for row in rows[:20]]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = go("some", texts=str(tmp_path / "some.jsonl"), epochs=1).metrics
    assert found["num_labelled_texts"] == 75 - 19 and {"selection_accuracy", "target_accuracy"} < found.keys()  # one of 20 is blank
