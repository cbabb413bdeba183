"""The report of a comparison: figures, recommendation, escaping, partial and broken results, in all three forms."""

import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest
from fake_trial import found, row

from codeparrot_ds.config import RunConfig
from codeparrot_ds.run.comparison import Request, Results, candidates_of, reference_of, trials_of
from codeparrot_ds.run.comparison_charts import pictures_of
from codeparrot_ds.run.comparison_page import html_page, markdown_page
from codeparrot_ds.run.comparison_report import as_json, differences, judge_all, write_reports
from codeparrot_ds.run.plots import LIGHT, LINE_STYLES, _of, marker_of

STEPS, WARMUP_STEPS = 6, 2


class Page(HTMLParser):
    """The texts of a page, and its tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def compared(tmp_path, tokenizer_dir):
    """Findings of configs whose results are written down by the test."""
    folder = tmp_path / "out"

    def make(speeds, *, world_sizes=(1,), repeats=2, missing=(), memory=None, **changes):
        run = RunConfig(
            model="demo", tokenizer=str(tokenizer_dir), seq_length=32, global_batch_size=8, micro_batch_size=2,
            num_lanes=4,
        )  # fmt: skip
        paths = []
        for stage, name in enumerate(speeds):
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps({"zero_optimization": {"stage": stage % 4}}))
        request = Request(
            configs=[str(path) for path in paths], config=run, world_sizes=world_sizes, steps=STEPS,
            warmup_steps=WARMUP_STEPS, repeats=repeats,
        )  # fmt: skip
        candidates = candidates_of(request, folder, device="cpu")
        (folder / "initial").mkdir(exist_ok=True)
        (folder / "initial" / "fingerprints.json").write_text('{"float32": "same"}')
        for candidate in candidates:
            for trial in trials_of(candidate):
                if trial.name in missing:
                    continue
                speed = speeds[candidate.label] * candidate.world_size
                rows = [row(step, speed, False) | {"tokens_per_second": speed} for step in range(1, STEPS + 1)]
                rows[0]["tokens_per_second"] = 1.0  # warm-up
                result = {"status": "finished", "reason": None, "step": None, "peak_bytes": None, "seconds": 1.0}
                result |= {"name": trial.name, "repeat": trial.repeat, "found": found(rows, candidate.world_size)}
                for peak in range(candidate.world_size):
                    grown = (memory or {}).get(candidate.label, 2 * 10**8)
                    result["found"]["resident_peak_bytes"][peak] = 10**8 + grown
                result |= changes.get(candidate.label, {})
                place = folder / "trials" / trial.name
                place.mkdir(parents=True)
                (place / "result.json").write_text(json.dumps(result))
        results = Results(folder)
        return judge_all(request, results, candidates, reference_of(candidates, results))

    make.folder = folder
    return make


def test_the_figures_leave_the_warm_up_out(compared):
    findings = compared({"a": 1000.0, "b": 900.0})
    report = as_json(findings)
    first, second = report["configs"]
    assert first["tokens_per_second"] == {"median": 1000.0, "low": 1000.0, "high": 1000.0, "steps": 8, "trials": 2}
    assert second["memory"]["host_grown_bytes"] == 2 * 10**8 and second["memory"]["predicted_device_bytes"] > 10**6
    assert [place["name"] for place in report["ranking"]] == ["a on 1", "b on 1"]
    assert report["complete"]
    json.dumps(report, allow_nan=False)


def test_among_ties_the_one_with_less_memory_is_recommended(compared):
    findings = compared({"a": 1000.0, "b": 1000.0}, memory={"a": 3 * 10**8})
    assert findings.recommendation == (
        "Take b on 1 rank: 1,000 tokens/s, 1.00x the tokens/s of the reference a on 1; "
        "a on 1 is as fast within the spread, with more memory."
    )


def test_what_is_missing_is_said_in_all_forms(compared):
    findings = compared({"a": 1000.0, "b": 900.0}, missing=["b-on-1-0", "b-on-1-1", "a-on-1-1"])
    assert not findings.complete and "(so far: some trials have not been run)" in findings.recommendation
    write_reports(findings, compared.folder)
    for name in ("report.html", "report.md"):
        text = (compared.folder / name).read_text()
        assert "not run yet" in text and "1 of 2 trials" in text


def test_nothing_at_all_is_a_report_too(compared):
    findings = compared({"a": 1.0}, missing=["a-on-1-0", "a-on-1-1"])
    write_reports(findings, compared.folder)
    assert "No config was measured" in (compared.folder / "report.html").read_text()
    assert json.loads((compared.folder / "report.json").read_text())["reference"] is None


def test_what_broke_has_its_step_peak_and_reason(compared):
    broken = {"status": "out of memory", "reason": "in step 3, at a peak of 5.0 GB: no", "step": 3,
              "peak_bytes": 5 * 10**9, "found": None}  # fmt: skip
    findings = compared({"a": 1000.0, "b": 900.0}, b=broken)
    page = Page(html_page(findings, []))
    assert {"out of memory", "3", "5,000 MB", "in step 3, at a peak of 5.0 GB: no"} <= set(page.texts)
    assert "Not measured" in markdown_page(findings, [])


def test_texts_of_configs_are_escaped_in_html_and_in_markdown(compared):
    findings = compared({"<b>|a*": 1000.0})
    page = html_page(findings, pictures_of(findings))
    assert "<b>" not in page and "&lt;b&gt;|" in page
    assert Page(page).texts.count("<b>|a* on\xa01") >= 1
    row_of_it = next(line for line in markdown_page(findings, []).splitlines() if line.startswith("| 1 |"))
    assert "\\<b\\>\\|a\\* on 1" in row_of_it


def test_the_page_has_every_picture_in_both_themes_with_words_for_it(compared):
    findings = compared({"a": 1000.0, "b": 900.0}, world_sizes=(1, 2))
    pictures = pictures_of(findings)
    assert [picture.name for picture in pictures] == ["memory-speed", "scaling", "losses", "differences"]
    page = Page(html_page(findings, pictures))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert len(images) == 4 and sum(tag == "source" for tag, _ in page.tags) == 4
    for picture in pictures:
        assert picture.images["light"] != picture.images["dark"]
        assert {"a", "b"} <= set(picture.alternative.replace(":", " ").replace(";", " ").split())
        width, height = (int.from_bytes(picture.images["dark"][at : at + 4], "big") for at in (16, 20))
        assert (width, height) == (1120, picture.height)


def test_settings_of_few_configs_have_columns_and_of_many_are_grouped_by_value(compared):
    findings = compared({"a": 1000.0, "b": 900.0}, world_sizes=(1, 2))
    (_, names), *rows = differences(findings)
    assert names == ["a on 1", "a on 2", "b on 1", "b on 2"]
    assert ("deepspeed: zero_optimization.stage", ["0", "0", "1", "1"]) in rows
    assert "| deepspeed: zero\\_optimization.stage | 0 | 0 | 1 | 1 |" in markdown_page(findings, [])


def test_settings_of_many_configs(compared):
    findings = compared(dict.fromkeys("abcdefgh", 1000.0), repeats=1, world_sizes=(1, 2))
    assert "| deepspeed: zero\\_optimization.stage | 0 | 1: b, f; 2: c, g; 3: d, h |" in markdown_page(findings, [])


def test_a_loss_that_is_not_finite_is_a_text_in_json_and_a_verdict(compared):
    rows = [row(step, 10.0, False) for step in range(1, STEPS + 1)]
    rows[3]["loss"] = math.nan
    findings = compared({"a": 1000.0, "b": 900.0}, b={"found": found(rows, 1)})
    write_reports(findings, compared.folder)
    (_, second) = json.loads((compared.folder / "report.json").read_text())["configs"]
    assert second["losses"][3] == "nan" and second["verdict"]["kind"] == "different" and second["verdict"]["step"] == 4


def test_a_config_that_began_with_other_weights_is_told(compared):
    other = found([row(step, 10.0, False) for step in range(1, STEPS + 1)], 1)
    other["weights"]["sha256"] = "another"
    findings = compared({"a": 1000.0, "b": 900.0}, b={"found": other})
    assert "initial weights" in str(findings.outcome("b on 1").verdict)
    assert findings.front == ["a on 1"]


def test_the_spare_memory_of_a_gpu_is_told(compared, monkeypatch):
    from codeparrot_ds.run import comparison_report

    monkeypatch.setattr(comparison_report, "smallest_gpu", lambda: ("GPU", 80 * 10**9))
    with_device = found([row(step, 10.0, False) for step in range(1, STEPS + 1)], 1) | {"device_peak_bytes": [10**10]}
    findings = compared({"a": 1000.0}, a={"found": with_device})
    assert "of the device to spare" in findings.recommendation
    assert findings.outcome("a on 1").memory_bytes == 10**10
    lines = [line for line in markdown_page(findings, []).splitlines() if line.startswith("| a on 1 |")]
    assert any("10.0 GB" in line and "%" in line for line in lines)


def test_sixty_four_lines_are_told_apart_without_colour_alone():
    assert len({(style % len(LIGHT), marker_of(style)) for style in range(64)}) == 64
    assert len({(style % len(LIGHT), str(_of(LINE_STYLES, style))) for style in range(32)}) == 32


def test_findings_of_a_search_are_listed(compared):
    findings = dataclasses.replace(compared({"a": 1000.0}), tried=["stage 1: <slower>"])
    assert "stage 1: &lt;slower&gt;" in html_page(findings, [])
    assert "- stage 1: \\<slower\\>" in markdown_page(findings, [])
