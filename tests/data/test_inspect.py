import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from codeparrot_ds.cli.main import main
from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.data.datasets import open_datasets, stream_of
from codeparrot_ds.data.encoder import Encoder
from codeparrot_ds.data.inspect import InspectedRow, RowPrinter, RowReader, inspection_config
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.validation import ValidationLoader
from codeparrot_ds.errors import UserError
from codeparrot_ds.terminal import uses_colour
from tests.data.conftest import make_documents, write_shard
from tests.data.streams import RowStream

DOCUMENTS = make_documents(60)


@pytest.fixture
def config(make_corpus: Callable[..., Path], tokenizer_dir: Path) -> RunConfig:
    make_corpus(DOCUMENTS[:15], split="validation")
    corpus = make_corpus(DOCUMENTS)
    return RunConfig(
        data=str(corpus), tokenizer=str(tokenizer_dir), seq_length=32, num_lanes=4, shuffle_buffer=8, seed=3
    )


def training_rows(config: RunConfig, encoder: Encoder) -> Iterator[tuple[int, np.ndarray, int]]:
    """Lane, ids and epoch of the run's rows, as training reads them."""
    for row in RowStream(stream_of(config, open_datasets(config), encoder)):
        yield row.lane, row.ids, row.states[0].epoch


def on_disk(config: RunConfig, path: Path) -> Path:
    """The folder of a run with this config."""
    path.mkdir()
    (path / "run.json").write_text("{}")
    save_config(config, path / "config.yaml")
    return path


@pytest.mark.parametrize(("start", "count"), [(0, 3), (5, 2), (6, 11), (150, 9)])
def test_rows_are_those_of_training(config: RunConfig, encoder: Encoder, start: int, count: int) -> None:
    rows = list(RowReader(config, "train").rows(start, count))
    expected = list(islice(training_rows(config, encoder), start, start + count))
    assert [row.index for row in rows] == list(range(start, start + count))
    for row, (lane, ids, epoch) in zip(rows, expected, strict=True):
        assert (row.lane, row.epoch, row.padding) == (lane, epoch, 0)
        assert np.array_equal(row.ids, ids)
    assert start < 150 or expected[-1][2] > 0, "no second epoch was seen"


def test_a_row_says_whether_it_begins_inside_a_document(config: RunConfig, encoder: Encoder) -> None:
    last = dict.fromkeys(range(config.num_lanes), encoder.eos_token_id)
    for row in RowReader(config, "train").rows(0, 80):
        assert row.continued == (last[row.lane] != encoder.eos_token_id)
        last[row.lane] = row.ids[-1]


def test_the_text_of_a_lane_is_its_documents(config: RunConfig, encoder: Encoder) -> None:
    reader = RowReader(config, "train")
    ids = np.concatenate([row.ids for row in reader.rows(0, 80) if row.lane == 2])
    ends = np.flatnonzero(ids == encoder.eos_token_id)
    texts = [reader.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]
    assert len(texts) >= 15 and set(texts) <= set(DOCUMENTS)


@pytest.mark.parametrize(("start", "count"), [(0, 3), (9, 1000), (14, 2)])
def test_rows_of_validation_have_their_global_index(config: RunConfig, start: int, count: int) -> None:
    reader = RowReader(config, "validation")
    fields = {"seq_length": 32, "num_lanes": 4, "batch_size": 1}
    expected: dict[int, list[int]] = {}
    for lane in range(4):
        loader = ValidationLoader(
            find_shards(config.data, "validation"), reader.encoder, rank=lane, world_size=4, **fields
        )
        for place, row in enumerate(loader.rows()):
            expected[4 * place + lane] = row.ids[: row.num_valid_tokens].tolist()
    assert sorted(expected) != list(range(len(expected))), "no lane has ended before another"
    rows = list(reader.rows(start, count))
    assert [row.index for row in rows] == sorted(index for index in expected if index >= start)[:count]
    assert all(row.ids.tolist() == expected[row.index] for row in rows)
    assert all(len(row.ids) + row.padding == 32 and row.epoch is None for row in rows)
    assert all(row.continued == (row.index >= 4 and expected[row.index - 4][-1] != 0) for row in rows)


def test_rows_after_the_end_of_validation_are_refused(config: RunConfig) -> None:
    with pytest.raises(UserError, match="validation split of .*corpus ends before row 4000"):
        list(RowReader(config, "validation").rows(4000, 3))


def test_a_mixture_names_the_data_set_of_each_row(config: RunConfig, tmp_path: Path) -> None:
    write_shard(tmp_path / "other" / "a.jsonl", [f"# other {number}\n" for number in range(50)])
    mixture = f"{config.data}=0.75,{tmp_path / 'other'}=0.25"
    reader = RowReader(inspection_config(mixture, tokenizer=config.tokenizer, num_lanes=4, seq_length=32), "train")
    rows = list(reader.rows(0, 160))
    for row in rows:
        assert ("# other" in reader.decode(row.ids)) == row.dataset.endswith("other")
    assert sum(row.dataset.endswith("other") for row in rows) == pytest.approx(40, abs=4)


def test_progress_counts_the_rows_before(config: RunConfig) -> None:
    seen = []
    rows = RowReader(config, "train").rows(41, 2, lambda phase, done, total: seen.append((done, total)))
    assert seen == [(number, 20) for number in range(1, 21)]  # lanes 1 and 2, 10 rows each
    assert [row.index for row in rows] == [41, 42]


def page(reader: RowReader, encoder: Encoder, texts: list[str], *, tail: str = "", ids: bool = False, **fields) -> str:
    parts = [np.append(ids, encoder.eos_token_id) for ids in encoder.encode_batch(texts)]
    values = {"index": 70, "lane": 6, "dataset": "corpus", "epoch": 1, "continued": False, "padding": 0, **fields}
    tokens = np.concatenate([*parts, *encoder.encode_batch([tail])])
    return RowPrinter(reader, ids=ids).row(InspectedRow(ids=tokens, **values))


def rules(text: str) -> list[str]:
    return re.findall(r"^──── (.*?) ─+$", text, flags=re.MULTILINE)


def test_borders_are_marked(config: RunConfig, encoder: Encoder) -> None:
    reader = RowReader(config, "train")
    shown = page(reader, encoder, ["x = 1\n", "y = 2\n\n", ""], tail="z = ", continued=True)
    lines = shown.splitlines()
    assert re.fullmatch(r"row 70 · lane 6 · epoch 1 · \d+ tokens · documents begun 3, ended 3 · corpus", lines[0])
    end, on = "end of document", "end of the row: this document continues"
    assert rules(shown) == ["continued: this document began in an earlier row", end, end, end, on]
    assert [line for line in lines[1:] if "────" not in line] == ["x = 1", "y = 2", "", "", "z = "]
    assert all(len(line) == 80 for line in lines if "────" in line)
    assert "documents begun 2, ended 2" in page(reader, encoder, ["a", "b"])
    assert rules(page(reader, encoder, ["a", "b"])) == [end, end]
    assert rules(page(reader, encoder, ["a"], padding=1200)) == [end, "1,200 tokens of padding"]


def test_token_ids_stand_below_each_document(config: RunConfig, encoder: Encoder) -> None:
    (ids,) = encoder.encode_batch(["value"])
    shown = page(RowReader(config, "train"), encoder, ["value", "value"], ids=True)
    assert shown.splitlines().count(" ".join(map(str, [*ids, encoder.eos_token_id]))) == 2


def test_a_terminal_is_not_commanded_by_the_corpus(config: RunConfig, encoder: Encoder) -> None:
    shown = page(RowReader(config, "train"), encoder, ["a\x1b[31mb\x9b1m\x7f\r\n\tc"])
    assert "a␛[31mb\\x9b1m␡␍\n\tc" in shown and "\x1b" not in shown and "\x9b" not in shown


def test_colour_changes_nothing_but_the_colour(config: RunConfig) -> None:
    reader = RowReader(config, "train")
    rows = list(reader.rows(0, 4))
    plain, coloured = RowPrinter(reader, ids=True), RowPrinter(reader, ids=True, colour=True)
    for row in rows:
        shown = coloured.row(row)
        assert re.sub(r"\x1b\[\dm", "", shown) == plain.row(row) != shown
    assert [uses_colour(True, {}), uses_colour(False, {})] == [True, False]
    assert not uses_colour(True, {"NO_COLOR": "1"}) and not uses_colour(True, {"TERM": "dumb"})


def test_summary_of_what_was_shown(config: RunConfig, encoder: Encoder) -> None:
    shard = Path(config.data) / "train" / "part-00000.jsonl"
    shard.write_text("{broken\n" + shard.read_text())
    reader = RowReader(config, "train")
    printer = RowPrinter(reader)
    for row in reader.rows(0, 4):
        printer.row(row)
    found = re.fullmatch(
        r"4 rows, 128 tokens, (\S+) characters per token; encoded by gigatoken; 1 unreadable documents skipped, "
        r"the first: \S+part-00000.jsonl, line 1: broken JSON .*",
        printer.summary(),
    )
    assert found and 1 < float(found[1]) < 5


def test_a_tokenizer_that_gigatoken_cannot_read_is_said(config: RunConfig, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(DOCUMENTS, trainers.WordLevelTrainer(special_tokens=["<|endoftext|>", "<unk>"]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    reader = RowReader(inspection_config(config.data, tokenizer=str(tmp_path), num_lanes=4, seq_length=16), "train")
    assert "encoded by tokenizers (gigatoken cannot be used" in RowPrinter(reader).summary()


def test_a_run_gives_its_settings_and_options_win(config: RunConfig, tmp_path: Path, encoder: Encoder) -> None:
    run = str(on_disk(config, tmp_path / "run"))
    assert inspection_config(run) == config
    changed = inspection_config(run, seq_length=16, num_lanes=None, seed=9)
    assert (changed.seq_length, changed.num_lanes, changed.seed) == (16, 4, 9)
    plain = inspection_config(config.data, tokenizer="tok", num_lanes=2)
    assert plain == RunConfig(data=config.data, tokenizer="tok", num_lanes=2)


def test_the_command(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(on_disk(config, tmp_path / "run"))
    assert main(["data", "inspect", run, "--rows", "2", "--start-row", "6"]) == 0
    shown = capsys.readouterr().out
    assert re.findall(r"^row (\d+) · lane (\d)", shown, flags=re.MULTILINE) == [("6", "2"), ("7", "3")]
    assert shown.splitlines()[-1].startswith("2 rows, 64 tokens, ") and "\x1b" not in shown
    assert main(["data", "inspect", run, "--split", "validation", "--seq-length", "64", "--ids"]) == 0
    assert "3 rows, 192 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{data}"], "{data} is not a run, so its tokenizer must be named with --tokenizer DIR"),
        (["absent", "--tokenizer", "{tokenizer}"], "there is no run or data absent"),
        (["{data}", "--tokenizer", "./absent"], "the tokenizer folder ./absent does not exist"),
        (["{bare}"], "{bare} is a run without config.yaml"),
        (["{run}", "--split", "tests"], "cannot be 'tests'"),
        (["{run}", "--split", "test"], "has no split 'test'; it has train, validation"),
        (["{run}", "--seq-length", "1"], "seq_length must be at least 2"),
        (["{run}", "--start-row", "-1"], "must be a whole number of at least 0"),
        (["{run}", "--rows", "0"], "must be a whole number of at least 1"),
        (["{run}", "--num-lanes", "100"], "num_lanes=100 has no document"),
        (["{run}", "--split", "validation", "--start-row", "500"], "ends before row 500"),
        (["{data}=0.5,{run}=x", "--tokenizer", "{tokenizer}"], "is not NAME=WEIGHT"),
    ],
)
def test_a_mistake_is_one_sentence(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "run.json").write_text("{}")
    names = {
        "data": config.data,
        "tokenizer": config.tokenizer,
        "run": str(on_disk(config, tmp_path / "run")),
        "bare": str(tmp_path / "bare"),
    }
    try:
        code = main(["data", "inspect", *(argument.format(**names) for argument in arguments)])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1
    assert sentence.format(**names) in said


def command(run: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "codeparrot_ds", "data", "inspect", str(run), *arguments]


def test_a_reader_that_leaves_ends_it(config: RunConfig, tmp_path: Path) -> None:
    line = " ".join(command(on_disk(config, tmp_path / "run"), "--rows", "100000000"))
    result = subprocess.run(
        ["bash", "-c", f"{line} | head -n 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert result.stdout.startswith("row 0 · ") and (result.returncode, result.stderr) == (141, "")


def test_an_interrupt_ends_it(config: RunConfig, tmp_path: Path) -> None:
    run = on_disk(config, tmp_path / "run")
    # Rows are shown, so it is past its start; then it reads on and on.
    with subprocess.Popen(
        command(run, "--rows", "100000000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        assert process.stdout.readline().startswith(b"row 0")
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        process.communicate(timeout=30)
        assert time.monotonic() - started < 10 and process.returncode == 130


def test_text_that_the_terminal_cannot_write_is_no_error(config: RunConfig, tmp_path: Path) -> None:
    run = on_disk(config, tmp_path / "run")
    result = subprocess.run(
        command(run, "--rows", "20"), capture_output=True, env={"PYTHONIOENCODING": "ascii"}, timeout=60
    )
    assert result.returncode == 0 and b"\\u2500" in result.stdout and b"na\\xefve" in result.stdout


def test_no_torch(config: RunConfig, tmp_path: Path) -> None:
    run = on_disk(config, tmp_path / "run")
    script = (
        "import json, sys\nfrom codeparrot_ds.cli.main import main\n"
        "main(sys.argv[1:])\nprint(json.dumps([*sys.modules]))"
    )
    for split in ("train", "validation"):
        result = subprocess.run(
            [sys.executable, "-c", script, "data", "inspect", str(run), "--split", split],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert not {"torch", "transformers", "deepspeed", "datasets"} & set(json.loads(result.stdout.splitlines()[-1]))
