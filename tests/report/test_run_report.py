import base64
import datetime
import json
import math
import pickle
import re
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import data_account
from codeparrot_ds.errors import UserError
from codeparrot_ds.report import plots
from codeparrot_ds.report.plots import LINE_STYLES, MARKERS, draw
from codeparrot_ds.report.run_report import charts, read_run, summarize, write_report

START = 1_700_000_000.0
STEP_SECONDS = 2.0


def training_row(step: int, **changes) -> dict:
    row = {
        "step": step, "tokens": step * 8192, "epoch": 0, "loss": 8.0 - step / 20, "learning_rate": 1e-3 * step,
        "grad_norm": 1.5, "tokens_per_second": 4096.0 + step, "mfu": 0.25, "step_seconds": STEP_SECONDS,
        "data_wait_seconds": 0.02, "memory_bytes": 2**30, "skipped_steps": 0, "loss_scale": None,
        "time": START + step * STEP_SECONDS,
    }  # fmt: skip
    return {**row, **changes}


def evaluation_row(step: int, loss: float) -> dict:
    return {
        "step": step, "tokens": step * 8192, "eval_loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 2,
        "eval_tokens": 1000, "time": START + step * STEP_SECONDS,
    }  # fmt: skip


ROWS = [
    evaluation_row(0, 8.5),
    *(training_row(step) for step in (5, 10, 15, 20)),
    evaluation_row(20, 5.0),
    *(training_row(step) for step in (25, 30)),
    evaluation_row(30, 5.5),
]


def iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")


def write_run(path: Path, rows: list[dict] = ROWS, tail: str = "", stage: int = 2, **config) -> Path:
    path.mkdir(parents=True)
    save_config(
        RunConfig(
            model="demo", seq_length=256, global_batch_size=32, micro_batch_size=16, max_train_steps=30, **config
        ),
        path / "config.yaml",
    )
    record = {
        "name": path.name, "parameters": 5_000_000, "world_size": 2, "zero_stage": stage, "precision": "bf16",
        "starts": [{"time": iso(START)}], "hub": "runs/hub.git", "outcome": {"status": "finished", "step": 30},
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(record))
    (path / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    (path / "checkpoints" / "step-00000030").mkdir(parents=True)
    return path


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture(scope="module", autouse=True)
def draw_once():
    """Draws equal charts once: most reports here show the same rows, and pictures are nearly all of their time."""
    drawn = {}

    def draw_or_remember(chart, theme):
        key = pickle.dumps((chart, theme))
        if key not in drawn:
            drawn[key] = draw(chart, theme)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", draw_or_remember)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = write_run(tmp_path_factory.mktemp("runs") / "brave-otter-1")
    assert write_report([path]) == path / "report" / "report.html"
    return path


def test_a_phone_has_labels_of_a_legible_size_and_values_that_wrap(run):
    """At a width of 390 pixels; a picture that is wider than the screen scrolls beside its neighbours, not the page."""
    style = re.sub(r"\s+", " ", (run / "report" / "report.html").read_text())
    phone = style.partition("@media screen and (max-width: 40rem) {")[2].partition("} @media")[0]
    rules = dict(re.findall(r"([^{}]+?) \{ ([^}]*)\}", phone))
    width = float(re.search(r"width: ([\d.]+)rem; max-width: none", rules[" figure img"])[1]) * 16
    assert plots.LEGEND_POINTS / plots.WIDTH_POINTS * width >= 9  # pixels high
    assert "overflow-x: auto" in rules[" figure"] and "white-space: normal" in rules[" th, td"]


def test_every_chart_of_a_run_is_a_png(run):
    names = {"perplexity", "loss", "learning_rate", "grad_norm", "tokens_per_second", "mfu", "data_wait", "memory"}
    files = {path.stem: path.read_bytes() for path in (run / "report").glob("*.png")}
    assert set(files) == names
    for data in files.values():
        assert data.startswith(b"\x89PNG") and len(data) > 5000
        assert [int.from_bytes(data[at : at + 4], "big") for at in (16, 20)] == [1120, 640]


def test_html_needs_nothing_else_and_has_both_themes(run):
    page = Page(run / "report" / "report.html")
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    dark = [attributes for tag, attributes in page.tags if tag == "source"]
    assert len(images) == len(dark) == 8
    for url, attributes in zip(images, dark, strict=True):
        pictures = [
            base64.b64decode(each.removeprefix("data:image/png;base64,")) for each in (url, attributes["srcset"])
        ]
        assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]
        assert "prefers-color-scheme: dark" in attributes["media"]
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    outside = re.sub(r'data:image/png;base64,[^"]*', "", page.source)
    assert "http:" not in outside and "https:" not in outside and "url(" not in outside
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert "Validation perplexity (log scale) by optimizer step: brave-otter-1 from 4,915 at 0 to 244.7 at 30" in [
        attributes["alt"] for tag, attributes in page.tags if tag == "img"
    ]


def test_figures(run):
    (figures,) = json.loads((run / "report" / "report.json").read_text())["runs"]
    expected = {
        "name": "brave-otter-1", "status": "finished", "model": "demo", "parameters": 5_000_000, "world_size": 2,
        "zero_stage": 2, "precision": "bf16", "global_batch_size": 32, "steps": 30, "tokens": 30 * 8192,
        "first_eval_loss": 8.5, "last_eval_loss": 5.5, "best_eval_loss": 5.0, "best_step": 20,
        "first_perplexity": math.exp(8.5), "last_perplexity": math.exp(5.5), "best_perplexity": math.exp(5.0),
        "bits_per_byte": 2.75, "last_loss": 6.5, "tokens_per_second": 4096 + 17.5, "mfu": 0.25,
        "memory_bytes": 2**30, "checkpoints": [30], "branch": "brave-otter-1", "unreadable_rows": 0,
    }  # fmt: skip
    assert {key: figures[key] for key in expected} == expected
    assert figures["data_wait_fraction"] == pytest.approx(0.01)
    assert figures["total_hours"] == pytest.approx(60 / 3600)


def test_the_slowest_rank_is_named(tmp_path):
    times = {"rank_seconds_median": 1.0, "slowest_rank": 1}
    rows = [training_row(step, **times, rank_seconds_max=1.4 + step / 10) for step in (1, 2, 3)]
    rows.append(training_row(4, rank_seconds_median=1.0, rank_seconds_max=1.1, slowest_rank=0))
    path = write_run(tmp_path / "brave-otter-1", rows)
    record = json.loads((path / "run.json").read_text()) | {"rank_hosts": ["alpha", "beta"]}
    (path / "run.json").write_text(json.dumps(record))
    figures = summarize(read_run(path))
    assert figures["slowest_rank"] == {"rank": 1, "host": "beta", "share": 0.75, "factor": pytest.approx(1.6)}
    (chart,) = [chart for chart in charts([read_run(path)]) if chart.name == "slowest_rank"]
    assert chart.series[0].y == pytest.approx([1.5, 1.6, 1.7, 1.1])
    write_report([path])
    assert "1 on beta: 1.60 × the median rank, in 75% of rows" in (path / "report" / "report.md").read_text()


def test_the_peak_that_mfu_is_held_against_is_beside_it(tmp_path):
    paths = [write_run(tmp_path / name) for name in ("old", "new")]
    record = json.loads((paths[1] / "run.json").read_text())
    (paths[1] / "run.json").write_text(json.dumps(record | {"peak_flops": 1.234e12}))
    write_report(paths, tmp_path / "out")
    table = (tmp_path / "out" / "report.md").read_text()
    assert (
        "| model FLOPs utilization (median) | 25% | 25% |\n| peak that it is held against | – | 1.23 TFLOP/s |" in table
    )


def test_tables_and_settings_in_html_and_markdown(run):
    page = Page(run / "report" / "report.html")
    markdown = (run / "report" / "report.md").read_text()
    for text in (page.text, markdown):
        for value in (
            "5,000,000",
            "32 × 256",
            "5.0000 at step 20",
            "244.7",
            "1.07 GB",
            "max_train_steps: 30",
            '"stage": 2',
        ):
            assert value in text
    assert [tag for tag, _ in page.tags].count("details") == 2
    for name in re.findall(r"\]\((\S+\.png)\)", markdown):
        assert (run / "report" / name).is_file()
    assert markdown.count(".png)") == 8


def test_time_between_two_starts_is_left_out(tmp_path):
    late = [{**row, "time": row["time"] + 5000} for row in ROWS[6:]]
    path = write_run(tmp_path / "run", rows=[*ROWS[:6], *late])
    record = json.loads((path / "run.json").read_text())
    record["starts"] = [{"time": iso(START)}, {"time": iso(START + 5040)}]
    (path / "run.json").write_text(json.dumps(record))
    assert summarize(read_run(path))["total_hours"] == pytest.approx(60 / 3600)


def test_several_runs_are_overlaid_and_told_apart_without_colour(tmp_path):
    runs = [write_run(tmp_path / name, stage=stage) for stage, name in enumerate(("one-1", "two-2", "three-3"))]
    drawn = {chart.name: chart for chart in charts([read_run(path) for path in runs])}
    assert {"eval_loss", "loss", "perplexity"} <= set(drawn)
    for chart in drawn.values():
        assert [series.label for series in chart.series] == ["one-1", "two-2", "three-3"]
        styles = [series.style for series in chart.series]
        assert len({str(LINE_STYLES[style]) for style in styles}) == len({MARKERS[style] for style in styles}) == 3
    path = write_report(runs)
    assert path == tmp_path / "report" / "report.html"
    page = Page(path)
    assert "deepspeed: zero_optimization.stage" in page.text and "Settings that differ" in page.text
    assert len(json.loads((path.parent / "report.json").read_text())["runs"]) == 3


def test_a_run_keeps_its_style_where_another_has_no_value(tmp_path):
    without = write_run(tmp_path / "a", rows=[training_row(5), training_row(10)])
    runs = [read_run(without), read_run(write_run(tmp_path / "b"))]
    perplexity = next(chart for chart in charts(runs) if chart.name == "perplexity")
    assert [(series.label, series.style) for series in perplexity.series] == [("b", 1)]


def test_runs_with_other_batches_share_an_axis_of_tokens(tmp_path):
    runs = [read_run(write_run(tmp_path / "a")), read_run(write_run(tmp_path / "b", num_warmup_steps=1))]
    assert {chart.x_label for chart in charts(runs)} == {"optimizer step"}
    runs[1].config["global_batch_size"] = 64
    loss = next(chart for chart in charts(runs) if chart.name == "loss")
    assert loss.x_label == "tokens" and loss.series[0].x[0] == 5 * 8192


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / place / "same-1") for place in ("here", "there")]
    write_report([*runs, runs[0]], tmp_path / "out")
    names = [each["name"] for each in json.loads((tmp_path / "out" / "report.json").read_text())["runs"]]
    assert names == ["here/same-1", "there/same-1"]


def test_run_without_evaluation(tmp_path):
    path = write_run(tmp_path / "run", rows=[training_row(5), training_row(10)])
    page = Page(write_report([path]))
    assert "training loss: last" in page.text and "perplexity: first" not in page.text
    assert not (path / "report" / "perplexity.png").exists()


def test_run_with_evaluation_alone(tmp_path):
    path = write_run(tmp_path / "run", rows=[evaluation_row(0, 8.5)])
    write_report([path])
    assert {file.stem for file in (path / "report").glob("*.png")} == {"perplexity", "loss"}


def test_truncated_last_line_costs_that_line(tmp_path):
    path = write_run(tmp_path / "run", tail='{"step": 35, "lo')
    page = Page(write_report([path]))
    (figures,) = json.loads((path / "report" / "report.json").read_text())["runs"]
    assert figures["unreadable_rows"] == 1 and figures["steps"] == 30
    assert "unreadable rows of metrics" in page.text


@pytest.mark.parametrize("bad", ["nan", "inf", float("nan")])
def test_non_finite_values_are_gaps_and_counted(tmp_path, bad):
    rows = [training_row(5), training_row(10, loss=bad, grad_norm=bad), training_row(15), evaluation_row(15, 700.0)]
    rows[-1]["perplexity"] = "inf"
    path = write_run(tmp_path / "run", rows=rows)
    write_report([path])
    (figures,) = json.loads((path / "report" / "report.json").read_text())["runs"]
    assert figures["non_finite_losses"] == 1 and figures["last_perplexity"] == "inf"
    assert not (path / "report" / "perplexity.png").exists()
    loss = next(chart for chart in charts([read_run(path)]) if chart.name == "loss")
    assert list(loss.series[0].x) == [5, 10, 15] and not math.isfinite(loss.series[0].y[1])


def test_a_run_with_nothing_logged(tmp_path):
    empty = write_run(tmp_path / "empty", rows=[])
    with pytest.raises(UserError, match=r"empty has no metrics yet"):
        write_report([empty])
    assert not (empty / "report").exists()
    page = Page(write_report([write_run(tmp_path / "full"), empty], tmp_path / "out"))
    assert "empty" in page.text


def with_data(path: Path, num_bad: int = 0, **changes) -> Path:
    """A run that says what it read."""
    lost = [f"/data/part-{number}.jsonl, line {number}: broken JSON" for number in range(num_bad)]
    totals = {"documents": 1234, "characters": 7_654_321, "bytes": 8_100_000, "tokens": 2_222_222, "epoch": 1}
    totals["tokens_of_documents"] = 2_222_000
    account = data_account([totals], bad_documents=lost, rows_per_lane={0: 1085, 1: 1087, 2: 1086}, encoder="gigatoken")
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"data": account | changes}))
    return path


def between(text: str, start: str, end: str) -> str:
    return text[text.index(start) : text.index(end, text.index(start))]


def test_what_a_run_read(tmp_path):
    path = with_data(write_run(tmp_path / "run"), num_bad=23)
    page, markdown = Page(write_report([path])), (path / "report" / "report.md").read_text()
    for text in (between(page.text, " Data ", " Settings "), between(markdown, "## Data", "![")):
        for value in (
            *("1,234", "7,654,321 characters, 8.1 MB", "2,222,222", "1,801", "3.445", "1,085–1,087", "gigatoken"),
            *("part-0.jsonl, line 0: broken JSON", "part-19.jsonl", "and 3 more"),
        ):
            assert value in text, value
        assert "part-20.jsonl" not in text
    assert [tag for tag, _ in page.tags].count("li") == 21
    (figures,) = json.loads((path / "report" / "report.json").read_text())["runs"]
    assert figures["data"]["documents"] == 1234 and len(figures["data"]["bad_documents"]) == 23


def test_nothing_is_said_of_unreadable_documents_where_there_are_none(tmp_path):
    path = with_data(write_run(tmp_path / "run"), rows_per_lane=[7, 7])
    page, markdown = Page(write_report([path])), (path / "report" / "report.md").read_text()
    assert "li" not in {tag for tag, _ in page.tags} and "which were skipped" not in page.text + markdown
    assert "| rows per lane | 7 |" in markdown and "| unreadable documents | 0 |" in markdown


@pytest.mark.parametrize("data", [None, {"documents": 5, "epoch": 0}, "text"])
def test_runs_that_do_not_say_what_they_read(tmp_path, data):
    path, other = write_run(tmp_path / "old"), with_data(write_run(tmp_path / "new"), num_bad=1)
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"data": data}))
    page = Page(write_report([path]))
    assert " Data " not in page.text and "## Data" not in (path / "report" / "report.md").read_text()
    write_report([path, other], tmp_path / "both")
    markdown = (tmp_path / "both" / "report.md").read_text()
    assert "| documents finished | – | 1,234 |" in markdown and "| unreadable documents | – | 1 |" in markdown
    assert "new: unreadable documents" in markdown and "old: unreadable documents" not in markdown


def test_the_account_of_a_run_without_a_finished_document(tmp_path):
    path = write_run(tmp_path / "run")
    zeros = dict.fromkeys(("documents", "characters", "bytes", "tokens"), 0)
    with_data(path, **zeros | {"tokens": 640}, tokens_per_document=None, chars_per_token=None, rows_per_lane=[])
    write_report([path])
    markdown = (path / "report" / "report.md").read_text()
    assert "| tokens per document | – |" in markdown and "| characters per token | – |" in markdown


def test_metrics_alone_make_a_report(tmp_path):
    path = tmp_path / "bare"
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert "Run bare" in Page(write_report([path])).text


def test_what_is_no_run_is_named(tmp_path):
    write_run(tmp_path / "runs" / "brave-otter-1")
    with pytest.raises(UserError, match="there is no run .*missing"):
        write_report([tmp_path / "missing"])
    with pytest.raises(UserError, match=r"runs is not a run: .*did you mean .*runs/brave-otter-1\?"):
        write_report([tmp_path / "runs"])
    with pytest.raises(UserError, match="no run given"):
        write_report([])


@pytest.mark.parametrize(("name", "text"), [("run.json", "{"), ("config.yaml", "a: [1"), ("ds_config.json", "[]")])
def test_damaged_file_is_named(tmp_path, name, text):
    path = write_run(tmp_path / "run")
    (path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        write_report([path])


def test_halves_of_characters_are_replaced(tmp_path):
    """As a damaged file has them, or a folder whose name is of another encoding."""
    path = write_run(tmp_path / "run")
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"name": "otter\ud800", "precision": "bf\udfff"}))
    sample = {"step": 4, "prompt": "def f\ud800", "completion": "()", "parses": True}
    (path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = write_report([path]).read_text(encoding="utf-8")
    assert "otter?" in page and "def f?" in page


def test_place_that_cannot_be_written(tmp_path):
    path = write_run(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the report to .*file"):
        write_report([path], tmp_path / "file")


def test_text_of_a_run_is_escaped(tmp_path):
    path = write_run(tmp_path / "run")
    record = json.loads((path / "run.json").read_text())
    record["name"] = "<script>alert(1)</script> $a_b$ | *x* \"'"
    (path / "run.json").write_text(json.dumps(record))
    (path / "config.yaml").write_text("model: '</pre><img src=x>'\n")
    with_data(path, bad_documents=["</li><img src=x>"], encoder="<iframe>")
    page = Page(write_report([path]))
    assert not {"script", "iframe"} & {tag for tag, _ in page.tags} and "<script>" in page.text
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    markdown = (path / "report" / "report.md").read_text()
    title = markdown.splitlines()[0]
    assert "<script>" not in title and r"\|" in title and r"\*x\*" in title


def test_many_rows_are_drawn_smoothed_and_quickly(tmp_path):
    rows = [training_row(step, loss=5 + (-1) ** step) for step in range(1, 20_001)]
    started = time.process_time()
    path = write_run(tmp_path / "run", rows=rows)
    write_report([path])
    assert (path / "report" / "loss.png").stat().st_size > 5000
    assert time.process_time() - started < 20


def test_rows_are_read_one_by_one_and_kept_as_numbers(tmp_path):
    """A million rows as objects took 2.5 GB."""
    path = write_run(tmp_path / "long")
    count = 20_000
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(count):
            row = dict.fromkeys(("loss", "learning_rate", "grad_norm", "mfu", "step_seconds", "data_wait_seconds"), 0.5)
            file.write(json.dumps({"step": step, "tokens": step, "time": START + step, **row}) + "\n")
    read_run(write_run(tmp_path / "short"))  # imports what it needs
    tracemalloc.start()
    try:
        record = read_run(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(record.training) == count and peak < 250 * count
    assert summarize(record)["steps"] == count - 1


def test_a_line_of_many_points_is_the_same_picture_of_fewer(tmp_path):
    """Its lowest and highest points and its gaps stay."""
    x = np.arange(100_000)
    y = np.sin(x / 5000)
    y[77_777], y[30_000:40_000] = 9.0, np.nan
    few, kept = plots._extremes(x, y, gaps=True)
    assert len(few) < 3000 and kept[few == 77_777] == 9.0
    gaps = few[np.isnan(kept)]
    assert len(gaps) and (gaps >= 30_000).all() and (gaps < 40_000).all()
    at, mean = plots._running_mean(x, np.where(np.isnan(y), np.nan, 1.0), 2000)
    assert len(at) == 4 * plots.STRETCHES and np.allclose(mean[~np.isnan(mean)], 1.0)
