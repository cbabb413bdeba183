"""Every picture of the product: all of it inside, what is announced drawn, the tables' units, colours told apart."""

import itertools
import json
import math

import pytest

from codeparrot_ds.cli import main as cli
from codeparrot_ds.compare.charts import pictures_of
from codeparrot_ds.compare.page import page_of
from codeparrot_ds.memory.device import Overhead
from codeparrot_ds.memory.plan import PlanRequest, in_gigabytes, make_plan
from codeparrot_ds.report import plots
from codeparrot_ds.report import run_report as report
from codeparrot_ds.report.plan_chart import draw_plan
from codeparrot_ds.report.plots import (
    THEMES,
    WIDTH_POINTS,
    Chart,
    Series,
    draw,
    new_figure,
    png_size,
    text_width,
    wrapped,
)
from codeparrot_ds.report.run_report import write_report
from tests.compare.fake_trial import STEPS
from tests.report.pictures import APART, EYES, contrast, distance, drawn, problems, texts_of
from tests.report.test_run_report import evaluation_row, training_row, write_run

GB = 10**9
LONG = "an-extraordinarily-long-name-of-an-experiment-with-offloading-bf16-states-and-a-learning-rate-of-0.0003"


@pytest.fixture
def one_theme(monkeypatch):
    """The light theme alone, where colours are not what is looked at."""
    light = {"light": THEMES["light"]}
    monkeypatch.setattr(plots, "THEMES", light)
    written = report.page_of
    # The HTML page shows both.
    monkeypatch.setattr(report, "page_of", lambda form, *parts: "" if form == "html" else written(form, *parts))
    return light


def look_at(figures):
    """Fails with what is wrong with any of the figures."""
    wrong = {figure.axes[0].get_title(loc="left"): found for figure in figures if (found := problems(figure))}
    assert figures and not wrong, wrong


def words_of(figure):
    return [text for text, _ in texts_of(figure)]


# --------------------------------------------------------------------------------------------------------------------
# Colours and texts


@pytest.mark.parametrize("theme", THEMES)
def test_any_two_colours_stay_apart_for_every_eye_and_from_the_paper(theme):
    colours = THEMES[theme]
    everything = [*colours["palette"], colours["rest"], colours["ink"], colours["paper"]]
    for one, other in itertools.combinations(everything, 2):
        assert distance(one, other) > APART, (one, other)
    for (one, other), eye in itertools.product(itertools.combinations([*colours["palette"], colours["ink"]], 2), EYES):
        assert distance(one, other, eye) > 12, (one, other, eye)
    assert all(contrast(colour, colours["paper"]) > 3 for colour in colours["palette"])


def test_the_distance_of_colours_is_that_of_cie_lab():
    assert distance("#ffffff", "#000000") == pytest.approx(100, abs=0.1)
    assert distance("#ff0000", "#00ff00") == pytest.approx(170.6, abs=0.5)
    assert distance("#0072b2", "#4b7fb8") < APART  # two blues that no picture has any more


def test_a_text_is_broken_where_it_has_parts_and_anywhere_else():
    lines = wrapped("zero3_offload_activation-checkpointing on 16", 9, 100).split("\n")
    assert lines == ["zero3_offload_", "activation-", "checkpointing on 16"]
    for text in (LONG, "W" * 200, "a b", ""):
        lines = wrapped(text, 9, 100).split("\n")
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(text_width(line, 9) <= 100 for line in lines)
    assert text_width("a" * 20, 9) < text_width("W" * 20, 9) < WIDTH_POINTS


# --------------------------------------------------------------------------------------------------------------------
# Plans


SEVERAL = ("zero0_fp32", "zero1", "zero2_offload_activation_checkpointing", "zero3_offload")
PLANS = {
    "many ranks": {"model": "large", "world_sizes": (1, 8, 64), "device_memory": 80 * GB},
    "many ranks, no device": {"model": "large", "world_sizes": (1, 64)},
    "tiny on a huge device": {"model": "demo", "device_memory": 141 * GB},
    "what does not fit": {"model": "gpt2-xl", "world_sizes": (2,), "device_memory": 24 * GB},
    "one config": {"model": "small", "ds_configs": ("zero2",), "device_memory": 12 * 2**30},
    "micro-batches": {"model": "small", "world_sizes": (2,), "micro_batch_sizes": (1, 12), "device_memory": 24 * GB},
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan(case):
    plan = make_plan(PlanRequest(**{"ds_configs": SEVERAL, **PLANS[case]}), Overhead())
    with drawn() as figures:
        draw_plan(plan)
    look_at(figures)
    (figure,) = figures
    words = words_of(figure)
    shown = [row for ranks in plan.request.world_sizes for row in plan.shown(ranks)]
    for row in shown:  # as the table's "needed" has it
        assert any(word.split()[0] == in_gigabytes(row.needed_bytes) for word in words), row
    assert sum(word.endswith("does not fit") for word in words) == sum(row.fits is False for row in shown)
    assert {axes.get_xlim() for axes in figure.axes} == {figure.axes[0].get_xlim()}
    notes = [word for word in words if word.startswith("GB a rank needs at the peak of a step")]
    assert len(notes) == len(plan.request.world_sizes)
    told = {"tiny on a huge device": "a device has 141.0 GB, beyond this axis", "many ranks, no device": "of a step"}
    told |= {"one config": "dashed: 12.9 GB of a device", "micro-batches": "dashed: 24.0 GB of a device"}
    if case in told:
        assert all(note.replace("\n", " ").endswith(told[case]) for note in notes)


def test_a_plan_of_a_model_with_a_long_path(tmp_path, capsys):
    model = tmp_path / LONG / "config.json"
    model.parent.mkdir()
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2}
    model.write_text(json.dumps({"model_type": "gpt2", **sizes}))
    config = tmp_path / f"{LONG}.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}))
    with drawn() as figures:
        out = tmp_path / "plan.png"
        code = cli.main(["plan", str(model), str(config), "--world-size", "1,2", "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    look_at(figures)
    assert png_size(out.read_bytes())[0] == 1120


def test_a_picture_that_is_higher_than_matplotlib_draws_has_fewer_pixels():
    width, height = new_figure("light", 1500.0).canvas.get_width_height()
    assert height < 2**16 and width > 250


# --------------------------------------------------------------------------------------------------------------------
# Runs


def steps(count, **changes):
    return [training_row(step, **{key: value(step) for key, value in changes.items()}) for step in range(1, count + 1)]


def loss(step):
    return "nan" if step == 3 or 40 <= step < 60 else 9 - 0.02 * step


RUNS = {
    "one run": {"brave-otter-1": [evaluation_row(0, 10.4), *steps(150, loss=loss), evaluation_row(150, 5.1)]},
    "a single row": {"brave-otter-1": [training_row(1)]},
    "the start alone": {"brave-otter-1": [evaluation_row(0, 10.4)]},
    "two long names": {
        f"{LONG}-{number}": [*steps(3), evaluation_row(1, 8.0), evaluation_row(3, 5.0 + 0.001 * number)]
        for number in (1, 2)
    },
    "five runs": {
        f"_run-{number}": [*steps(5, loss=lambda step: "nan" if step % 2 else 7.0), evaluation_row(5, 5.0 + number)]
        for number in range(5)
    },
    "huge values": {"calm-fox-2": steps(3, loss=lambda step: 1e7 * step, grad_norm=lambda step: 1e16)
                    + [evaluation_row(150_000, 80.0), evaluation_row(150_001, 2.0)]},
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_a_run(case, tmp_path, one_theme):
    with drawn() as figures:
        write_report([write_run(tmp_path / name, rows) for name, rows in RUNS[case].items()], tmp_path / "out")
    look_at(figures)
    titles = [figure.axes[0].get_title(loc="left") for figure in figures]
    losses = {"a single row": "Training loss", "the start alone": "Validation loss"}
    losses |= {"one run": "Training and validation loss", "huge values": "Training and validation loss"}
    assert losses.get(case, "Validation loss") in titles
    memory = [words_of(figure) for figure in figures if "Peak memory" in words_of(figure)]
    assert all("GB" in words and "1" in words for words in memory)  # as the table has 1.07 GB


@pytest.mark.parametrize("theme", THEMES)
def test_a_value_between_gaps_is_seen_and_many_lines_are_named(theme):
    y = [math.nan, 2.0, math.nan, math.nan, 3.0, math.nan]
    lines = tuple(Series(label=f"run {number}", x=range(6), y=[number, *y[1:]], style=number) for number in range(20))
    with drawn() as figures:
        draw(Chart(name="a", title="A", unit="b", x_label="step", series=lines), theme)
    look_at(figures)
    marked = [line for line in figures[0].axes[0].lines if line.get_linestyle() == "None"]
    assert [list(line.get_xdata()) for line in marked] == [[4]] * 20


# --------------------------------------------------------------------------------------------------------------------
# Comparisons


def with_parts(trial, found):
    """A trial that was taken apart; one without communication."""
    seconds = {"forward": 0.3, "backward": 0.5, "communication": 0.0, "optimizer": 0.1, "data": 0.02}
    found["parts"] = {
        "steps": 3,
        "seconds": seconds,
        "total_seconds": 0.92,
        "sent_bytes": 0,
        "payload_bytes": {},
        "calls": {},
    }
    for row in found["rows"]:
        row["loss"] += 1e-6 * row["step"] * (3 if trial.perturbed else trial.candidate.world_size)


def broken(trial, found):
    with_parts(trial, found)
    if trial.candidate.label == "b":
        for row in found["rows"][STEPS // 2 :]:
            row["loss"] = "nan"


TWELVE = {f"zero{stage}{kind}": 1000.0 + stage for stage in range(4) for kind in ("", "_fp32", "_offload")}
COMPARISONS = {
    "one": {"speeds": {"a": 1000.0}, "repeats": 1},
    "twelve on two numbers of ranks": {"speeds": TWELVE, "world_sizes": (1, 2), "repeats": 1},
    "long names": {"speeds": {f"{LONG}_a": 1000.0, f"{LONG}_b": 1200.0}},
    "a loss that is not a number": {"speeds": {"a": 1000.0, "b": 900.0, "c": 800.0}, "alter": broken},
    "GPUs": {"speeds": {"a": 1e5, "b": 2e5}, "memory": {"a": 7 * 10**10, "b": 3 * 10**10}},
}


@pytest.mark.parametrize("case", COMPARISONS)
def test_a_comparison(case, compared, one_theme):
    findings = compared(**{"bands": True, "alter": with_parts, **COMPARISONS[case]})
    with drawn() as figures:
        pictures = pictures_of(findings)
    look_at(figures)
    by_name = {figure.axes[0].get_title(loc="left").split("\n")[0]: figure for figure in figures}
    table = page_of("md", findings, [])
    unit = findings.memory_unit[0]
    assert any(word.startswith(f"{unit} a rank (") for word in words_of(by_name["Memory and speed"]))
    assert f" {unit} |" in table and unit == ("GB" if case == "GPUs" else "MB")
    parts = words_of(by_name["Parts of a step"])
    assert "ms" in parts and "communication" not in parts and "| 300.0 | 500.0 | 0.0 | 100.0 | 20.0 |" in table
    longest = max(patch.get_x() + patch.get_width() for patch in by_name["Parts of a step"].axes[0].patches)
    assert longest == pytest.approx(920)
    assert [picture.name for picture in pictures][0] == "memory-speed"


def test_a_loss_that_is_not_a_number_is_no_loss_that_is_equal(compared, one_theme):
    findings = compared({"a": 1000.0, "b": 900.0}, alter=broken, repeats=1)
    with drawn() as figures:
        pictures_of(findings)
    (figure,) = [figure for figure in figures if "Distance" in figure.axes[0].get_title(loc="left")]
    (line,) = [line for line in figure.axes[0].lines if line.get_label() == "b on 1"]
    assert [math.isnan(y) for y in line.get_ydata()] == [False] * (STEPS // 2) + [True] * (STEPS // 2)
