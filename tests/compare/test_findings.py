"""The report of a comparison: figures, recommendation, escaping, partial and broken results, in all three forms."""

import dataclasses
import json
import math
import shlex
from html.parser import HTMLParser

import pytest

from codeparrot_ds.cli.main import build_parser
from codeparrot_ds.compare.charts import pictures_of
from codeparrot_ds.compare.findings import as_json, differences
from codeparrot_ds.compare.page import page_of, write_reports
from codeparrot_ds.compare.results import COMPARISON, Peak
from codeparrot_ds.compare.run import how_to_train
from codeparrot_ds.config.arguments import config_from_arguments
from codeparrot_ds.config.launch_options import launch_from_arguments
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.report.plots import LIGHT, LINE_STYLES, _of, marker_of, png_size
from tests.compare.fake_trial import STEPS, found, row


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
        "Take b on 1 rank: 1,000 tokens/s (1,000 to 1,000, 2 trials); in speed it is not told apart from a on 1, and "
        "takes less memory. To tell them apart, try the same command with --repeats 4."
    )


def test_the_proposed_command_trains_as_the_recommended_config_was_measured(compared):
    findings = compared({"zero1": 900.0, "zero2": 100.0}, world_sizes=(2,))
    assert findings.recommended == "zero1 on 2"
    candidate = findings.outcome("zero1 on 2").candidate
    candidate = dataclasses.replace(candidate, config=dataclasses.replace(candidate.config, run_name=None, seed=7))
    words = shlex.split(how_to_train(candidate))[1:]
    parsed = build_parser().parse_args(words)
    config = config_from_arguments(parsed)
    assert config == dataclasses.replace(candidate.config, deepspeed=str(candidate.ds_config))
    assert launch_from_arguments(parsed).num_gpus == 2 and candidate.ds_config.is_file()
    # A preset that says much of it in a word is taken; of a model that brings its tokenizer none is named.
    large = RunConfig(**PRESETS["large"], data="d", tokenizer="/tmp/gone", init_from="model")
    words = shlex.split(how_to_train(dataclasses.replace(candidate, config=large)))
    assert words[2] == "large" and len(words) < 14 and "/tmp/gone" not in " ".join(words)


def test_memory_that_is_hardly_less_is_no_reason(compared):
    memory = {"a": 200 * 10**6, "b": 210 * 10**6, "c": 195 * 10**6}
    findings = compared({"a": 980.0, "b": 1000.0, "c": 990.0}, memory=memory, repeats=1)
    assert findings.recommendation == (
        "Take c on 1 rank: 990 tokens/s (940 to 1,040, 1 trial); in speed it is not told apart from b on 1 and a on 1, "
        "and takes less memory than b on 1. To tell them apart, try the same command with --repeats 3."
    )


def test_a_recommendation_says_how_sure_it_is(compared):
    findings = compared({"a": 1000.0, "b": 1060.0, "c": 700.0}, repeats=1)
    assert findings.recommendation == (
        "Take b on 1 rank: 1,060 tokens/s (1,007 to 1,113, 1 trial); in speed it is not told apart from a on 1. "
        "To tell them apart, try the same command with --repeats 3."
    )
    assert as_json(findings)["ranking"] == [
        {"name": "b on 1", "tied_with": ["a on 1"]},
        {"name": "a on 1", "tied_with": ["b on 1"]},
        {"name": "c on 1", "tied_with": []},
    ]
    assert "in speed not told apart from a on 1" in findings.lines()[0] and "1 trial)" in findings.lines()[0]
    assert "| not told apart from |" in page_of("md", findings, [])


def test_a_single_trial_that_is_far_ahead_is_still_a_single_trial(compared):
    findings = compared({"a": 1000.0, "b": 2000.0}, repeats=1)
    assert findings.recommendation == (
        "Take b on 1 rank: 2,000 tokens/s (1,900 to 2,100, 1 trial), 2.00x (1.81x to 2.21x) the tokens/s of the "
        "reference a on 1. From a single trial that is not sure: the same command with --repeats 3 shows how far "
        "trials differ."
    )


def test_two_trials_that_agree_are_enough(compared):
    findings = compared({"a": 1000.0, "b": 1060.0})
    assert findings.recommendation == (
        "Take b on 1 rank: 1,060 tokens/s (1,060 to 1,060, 2 trials), 1.06x (1.06x to 1.06x) the tokens/s of the "
        "reference a on 1."
    )


# --------------------------------------------------------------------------------------------------------------------
# MFU and memory


def own_peaks(trial, found):
    """A machine that was idle during the trials of the fast config, and busy during those of the slow one."""
    idle = trial.candidate.label == "b"
    found |= {"flops_per_token": 1e6, "peak_flops": (4e9 if idle else 1e9) * trial.candidate.world_size}


@pytest.mark.parametrize("recorded", [True, False])
def test_mfu_orders_as_speed_does(compared, recorded):
    peak = Peak(flops=5e9, source="measured once", whole_machine=True)
    compared.folder.mkdir()
    (compared.folder / COMPARISON).write_text(json.dumps({"peak": dataclasses.asdict(peak)} if recorded else {}))
    findings = compared({"a": 1000.0, "b": 1100.0}, alter=own_peaks, world_sizes=(1, 2))
    report = as_json(findings)
    mfu = {config["name"]: config["mfu"] for config in report["configs"]}
    assert report["peak"]["flops"] == (5e9 if recorded else 8e9)  # an old comparison has the fastest of its trials
    for config in report["configs"]:
        expected = config["tokens_per_second"]["median"] * 1e6 / report["peak"]["flops"]
        assert config["mfu"] == pytest.approx(expected)
    assert sorted(mfu, key=mfu.get) == [name for name, _ in reversed(findings.ranking)]
    note = "one peak of 0.005 TFLOP/s of this machine (measured once)" if recorded else "the fastest that a trial"
    assert note in page_of("md", findings, []) and note in page_of("html", findings, [])


def test_mfu_of_gpus_is_against_so_many_of_them(compared):
    def on_gpus(trial, found):
        found |= {"flops_per_token": 1e6, "peak_flops": 1e15 * trial.candidate.world_size, "device": "NVIDIA H200"}

    findings = compared({"a": 1e8}, alter=on_gpus, world_sizes=(1, 4))
    assert [config["mfu"] for config in as_json(findings)["configs"]] == pytest.approx([0.1, 0.1])
    assert findings.peak == Peak(flops=1e15, source="the highest of a trial's", whole_machine=False)


def test_on_a_cpu_the_plan_is_beside_what_was_measured_and_not_compared(compared):
    findings = compared({"a": 1000.0, "b": 900.0}, memory={"a": 87 * 10**6})
    page = page_of("md", findings, [])
    table = page[page.index("## Memory") : page.index("## Settings")]
    assert "| config | this CPU, grown | this CPU, in all | a GPU, planned | its host, planned |" in table
    assert "| a on 1 | 87 MB | 187 MB |" in table and "%" not in table and "difference" not in table
    assert "two things that are not to be compared" in table
    assert "87 MB per rank beside its libraries" in findings.lines()[0]


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
    page = Page(page_of("html", findings, []))
    assert {"out of memory", "3", "5,000 MB", "in step 3, at a peak of 5.0 GB: no"} <= set(page.texts)
    assert "Not measured" in page_of("md", findings, [])


def test_texts_of_configs_are_escaped_in_html_and_in_markdown(compared):
    findings = compared({"<b>|a*": 1000.0})
    page = page_of("html", findings, pictures_of(findings))
    assert "<b>" not in page and "&lt;b&gt;|" in page
    assert Page(page).texts.count("<b>|a* on\xa01") >= 1
    row_of_it = next(line for line in page_of("md", findings, []).splitlines() if line.startswith("| 1 |"))
    assert "\\<b\\>\\|a\\* on 1" in row_of_it


def test_the_page_has_every_picture_in_both_themes_with_words_for_it(compared):
    findings = compared({"a": 1000.0, "b": 900.0}, world_sizes=(1, 2))
    pictures = pictures_of(findings)
    assert [picture.name for picture in pictures] == ["memory-speed", "scaling", "losses", "differences"]
    page = Page(page_of("html", findings, pictures))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert all(image["src"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert len(images) == 4 and sum(tag == "source" for tag, _ in page.tags) == 4
    for picture in pictures:
        assert picture.images["light"] != picture.images["dark"]
        assert {"a", "b"} <= set(picture.alternative.replace(":", " ").replace(";", " ").split())
    shown = [(int(image["width"]), int(image["height"])) for image in images]
    assert shown == [png_size(picture.images["dark"]) for picture in pictures] and {width for width, _ in shown} == {
        1120
    }


def test_settings_of_few_configs_have_columns_and_of_many_are_grouped_by_value(compared):
    findings = compared({"a": 1000.0, "b": 900.0}, world_sizes=(1, 2))
    (_, names), *rows = differences(findings)
    assert names == ["a on 1", "a on 2", "b on 1", "b on 2"]
    assert ("deepspeed: zero_optimization.stage", ["0", "0", "1", "1"]) in rows
    assert "| deepspeed: zero\\_optimization.stage | 0 | 0 | 1 | 1 |" in page_of("md", findings, [])


def test_settings_of_many_configs(compared):
    findings = compared(dict.fromkeys("abcdefgh", 1000.0), repeats=1, world_sizes=(1, 2))
    assert "| deepspeed: zero\\_optimization.stage | 0 | 1: b, f; 2: c, g; 3: d, h |" in page_of("md", findings, [])


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
    from codeparrot_ds.compare import findings as comparison_report

    monkeypatch.setattr(comparison_report, "smallest_gpu", lambda: ("GPU", 80 * 10**9))
    with_device = found([row(step, 10.0, False) for step in range(1, STEPS + 1)], 1) | {"device_peak_bytes": [10**10]}
    findings = compared({"a": 1000.0}, a={"found": with_device})
    assert "of the device to spare" in findings.recommendation
    assert findings.outcome("a on 1").memory_bytes == 10**10
    lines = [line for line in page_of("md", findings, []).splitlines() if line.startswith("| a on 1 |")]
    assert any("10.0 GB" in line and "%" in line for line in lines)


def test_sixty_four_lines_are_told_apart_without_colour_alone():
    assert len({(style % len(LIGHT), marker_of(style)) for style in range(64)}) == 64
    assert len({(style % len(LIGHT), str(_of(LINE_STYLES, style))) for style in range(32)}) == 32


def test_findings_of_a_search_are_listed(compared):
    findings = dataclasses.replace(compared({"a": 1000.0}), tried=["stage 1: <slower>"])
    assert "stage 1: &lt;slower&gt;" in page_of("html", findings, [])
    assert "- stage 1: \\<slower\\>" in page_of("md", findings, [])
