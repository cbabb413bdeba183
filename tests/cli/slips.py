"""Slips of the hand, each with a part of the one sentence that it costs; `tests/cli/test_slips.py` makes them all.

To add one, add a row to one of the lists: what it is, the command as it is typed in the folder that `prepare` makes,
and words of the sentence. It must cost exit code 2, little CPU and no import of torch, and leave nothing behind.
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import IO, NamedTuple

from codeparrot_ds.checkpoint.folders import publish, sealed, staging_folder
from codeparrot_ds.config.files import save_config
from codeparrot_ds.config.run_config import PRESETS, RunConfig
from codeparrot_ds.durable import json_bytes, write_file
from codeparrot_ds.model.shapes import find_shape, parameter_shapes


class Slip(NamedTuple):
    """One mistake."""

    name: str
    command: str
    """Less ``codeparrot-ds``; read as a shell would, but for ``~`` and variables."""
    sentence: str


TRAIN = "train demo --data corpus --tokenizer tokenizer --num-lanes 2 --hub off --wandb off"
COMPARE = "--preset demo --tokenizer tokenizer --num-lanes 2"

VARIABLES = [
    Slip("an unknown variable", TRAIN + " --output-dir $SCRATSH/runs", "$SCRATSH is not set; did you mean '$SCRATCH'?"),
    Slip("in braces", TRAIN + " --eval-prompts ${NONE_SUCH}/p", "cannot be ${NONE_SUCH}/p: the variable $NONE_SUCH"),
    Slip("an empty variable", "train demo --data $EMPTY/corpus", "the variable $EMPTY is empty (see"),
    Slip("in a mixture", "train demo --data corpus=0.5,$NONE_SUCH/b=0.5", "the variable $NONE_SUCH is not set"),
    Slip("in a file", "train demo --config variable.yaml", "variable.yaml:2: output_dir cannot be $NONE_SUCH/runs"),
    Slip("for a corpus", "corpus src --out $NONE_SUCH/corpus", "argument --out: $NONE_SUCH/corpus: the variable"),
    Slip("for a source", "corpus $NONE_SUCH/src --out new", "argument SRC: $NONE_SUCH/src: the variable"),
    Slip("for a hostfile", "doctor --hostfile $NONE_SUCH/hosts", "argument --hostfile: $NONE_SUCH/hosts"),
    Slip("for a model", "evaluate $NONE_SUCH/first", "argument MODEL: $NONE_SUCH/first"),
    Slip("for a run", "checkpoint list $NONE_SUCH/first", "argument RUN: $NONE_SUCH/first"),
    Slip("for data to look at", "data inspect $NONE_SUCH/corpus", "the variable $NONE_SUCH is not set"),
    Slip("for a DeepSpeed JSON", "compare $NONE_SUCH/a.json,dropout=0.1", "the variable $NONE_SUCH is not set"),
    Slip("an unknown user", "train demo --data ~no-such-user/corpus", "there is no user 'no-such-user' here"),
]

ABSENT = [
    Slip("a corpus", "train demo --data corpsu --tokenizer tokenizer", "corpsu does not exist; did you mean 'corpus'?"),
    Slip(
        "a corpus of nothing alike", "train demo --data xyz --tokenizer tokenizer", "make a corpus with `codeparrot-ds"
    ),
    Slip("a split", "tokenizer --data corpus/trian --out new", "did you mean 'corpus/train'?"),
    Slip("a part of a mixture", TRAIN + " --data corpus=0.5,corpsu=0.5", "the data corpsu does not exist"),
    Slip("validation data", TRAIN + " --validation-data corpsu", "did you mean 'corpus'?"),
    Slip(
        "a CSV file", TRAIN + " --data rows.csv", "rows.csv is a file of a kind that is not read: the name of a shard"
    ),
    Slip("an empty shard", TRAIN + " --data empty.jsonl", "the shard empty.jsonl is empty"),
    Slip("one shard", TRAIN + " --data shard.jsonl", "without a validation split: name another with --validation-data"),
    Slip("shards of no split", TRAIN + " --data corpus/train", "Name what to evaluate on with --validation-data"),
    Slip(
        "shards of no split to look at",
        "data inspect corpus/train --split validation --tokenizer tokenizer",
        "no name tells",
    ),
    Slip(
        "a split to evaluate on",
        "evaluate first --data corpus --split test",
        "has no split 'test'; it has train, validation",
    ),
    Slip(
        "a column's use",
        TRAIN + " --columns contnt=text",
        "'contnt' is nothing that is read of a row; did you mean 'content'?",
    ),
    Slip("a column twice", "corpus src --out new --columns text,content=code", "content is named twice"),
    Slip("a column for evaluation", "evaluate first --columns content=", "'content=' is not WHAT=COLUMN"),
    Slip("a corpus for a tokenizer", "tokenizer --data corpsu --out new", "did you mean 'corpus'?"),
    Slip("a corpus to look at", "data inspect corpsu --tokenizer tokenizer", "did you mean 'corpus'?"),
    Slip("a corpus with problems", "data contamination corpsu", "did you mean 'corpus'?"),
    Slip("a corpus to evaluate on", "evaluate first --data corpsu", "did you mean 'corpus'?"),
    Slip(
        "a split of a saved data set", "corpus saved --out new", "several splits: name one, saved/test or saved/train"
    ),
    Slip("a file of a saved data set", TRAIN + " --data saved/train", "of which data.arrow is gone: save it again"),
    Slip("a source", "corpus srcc --out new", "source srcc does not exist; did you mean 'src'?"),
    Slip("a tokenizer", "train demo --data corpus --tokenizer tokenzier", "did you mean 'tokenizer'?"),
    Slip("a tokenizer's path", "train demo --data corpus --tokenizer ./tok", "make one with `codeparrot-ds tokenizer"),
    Slip(
        "a tokenizer's file", TRAIN + " --tokenizer tokenizer/tokenizer.json", "is a file: name the folder that holds"
    ),
    Slip("no tokenizer", TRAIN + " --tokenizer corpus", "corpus has no tokenizer.json"),
    Slip(
        "a tokenizer of the Hub", TRAIN + " --tokenizer absent", "there is no folder absent here, and the Hub at http"
    ),
    Slip(
        "one of an organisation",
        TRAIN + " --tokenizer org/absent",
        "there is no folder org/absent here, and the Hub at",
    ),
    Slip("a hostfile", TRAIN + " --hostfile hsots", "did you mean 'hosts'?"),
    Slip("a run config", "train --config rnu.yaml", "rnu.yaml: no such run config file; did you mean 'run.yaml'?"),
    Slip("a DeepSpeed JSON", TRAIN + " --deepspeed mien.json", "did you mean 'mine.json'?"),
    Slip("a DeepSpeed JSON to compare", f"compare mien.json {COMPARE} --data corpus", "did you mean 'mine.json'?"),
    Slip("a corpus to compare on", f"compare zero1 {COMPARE} --data corpsu", "did you mean 'corpus'?"),
    Slip("one shard to compare on", f"compare zero1 {COMPARE} --data shard.jsonl", "without a validation split"),
    Slip("a model's config", TRAIN + " --model modle/config.json", "did you mean 'model/config.json'?"),
    Slip("a model to plan", "plan modle/config.json", "did you mean 'model/config.json'?"),
    Slip("prompts", TRAIN + " --eval-prompts promtps.txt", "did you mean 'prompts.txt'?"),
    Slip("problems", TRAIN + " --eval-problems problms.jsonl --allow-execution", "did you mean 'problems.jsonl'?"),
    Slip("a file of a prompt", "complete first --file promtps.txt", "did you mean 'prompts.txt'?"),
    Slip(
        "problems to solve",
        "humaneval first --generate-only --problems problms.jsonl",
        "did you mean 'problems.jsonl'?",
    ),
    Slip("a DeepSpeed checkpoint", f"checkpoint import ckpt new {TRAIN[6:]}", "checkpoint ckpt does not exist"),
    Slip("a repository", "evaluate runs/hbu.git@first", "runs/hub.git'?"),
    Slip("a folder for a demo", "demo --workdir hosts", "--workdir hosts is a file: name a folder"),
]

RUNS = [
    Slip("to evaluate", "evaluate frist", "none of that name in runs; did you mean 'runs/first'?"),
    Slip("to complete with", "complete frist 'def f'", "did you mean 'runs/first'?"),
    Slip("to solve with", "humaneval frist --generate-only", "did you mean 'runs/first'?"),
    Slip(
        "by its path", "evaluate runs/frist", "there is no run or model folder runs/frist; did you mean 'runs/first'?"
    ),
    Slip("of another folder", "evaluate rnus/first", "did you mean 'runs/first'?"),
    Slip("to list", "checkpoint list frist", "did you mean 'runs/first'?"),
    Slip("to verify", "checkpoint verify runs/frist", "did you mean 'runs/first'?"),
    Slip("to export", "checkpoint export frist --out new", "did you mean 'runs/first'?"),
    Slip(
        "to export over others", "checkpoint export first --out corpus", "corpus holds other files and no config.json"
    ),
    Slip("to ask the branch of", "hub status frist", "did you mean 'runs/first'?"),
    Slip("to push", "hub push frist", "did you mean 'runs/first'?"),
    Slip("to publish", "hub publish frist", "did you mean 'runs/first'?"),
    Slip("to report", "report first frist", "did you mean 'runs/first'?"),
    Slip("to calibrate with", "plan --calibrate frist", "did you mean 'runs/first'?"),
    Slip("to look at", "data inspect frist", "did you mean 'runs/first'?"),
    Slip("to begin from", TRAIN + " --init-from frist", "--init-from frist: there is no run or model folder frist"),
    Slip("a bare name of the Hub", "evaluate gpt2", "a model on the Hub is named org/name"),
    Slip(
        "a data set of the Hub", "corpus org/absent:xyz --out new", "there is no folder org/absent here, and the Hub at"
    ),
    Slip(
        "problems of the Hub",
        "humaneval first --generate-only --problems org/nope",
        "): name a .jsonl file of problems",
    ),
    Slip("a public set", "humaneval first --generate-only --problems mbpp+", "such as MbppPlus.jsonl.gz of github.com"),
    Slip(
        "problems to fill in",
        "humaneval first --generate-only --problems infilling.jsonl",
        "infilling.jsonl, line 1: the row has a suffix",
    ),
    Slip("an unknown device", "evaluate first --device tpu", "choose cpu, cuda, cuda:N, mps or xpu"),
    Slip("a GPU that is not there", "complete first --device cuda:99", "device 'cuda:99': this machine"),
    Slip("rows longer than a model's", "evaluate first --seq-length 9999", "the model reads rows of 2 to"),
    Slip("a model of the Hub", "evaluate org/absent", "there is no folder org/absent here, and the Hub at http"),
    Slip(
        "the folder of runs",
        "checkpoint list runs",
        "runs is not a run: it has no run.json; it holds the runs broken, d",
    ),
    Slip("no run at all", "checkpoint verify corpus", "corpus is not a run: it has no run.json"),
    Slip("no model", "evaluate corpus", "corpus is no run, checkpoint or Hugging Face model"),
    Slip("without a checkpoint", "evaluate busy", "runs/busy has no checkpoint yet"),
]

STARTS = [
    Slip("from nowhere", TRAIN + " --resume nowhere", "--resume nowhere: there is no checkpoint or run nowhere"),
    Slip("from a run mistyped", TRAIN + " --resume frist", "did you mean 'runs/first'?"),
    Slip(
        "from a checkpoint mistyped",
        TRAIN + " --resume runs/first/checkpoints/step-00000040",
        "did you mean 'runs/first/checkpoints/step-00000004'?",
    ),
    Slip("from a folder", TRAIN + " --resume corpus", "--resume corpus: corpus is not a complete checkpoint"),
    Slip("from a run without", TRAIN + " --resume busy", "runs/busy has no checkpoint that can be read"),
    Slip("from one cut off", TRAIN + " --resume broken", "state.json has 2 bytes instead of 18"),
    Slip("of a run cut off", TRAIN + " --run-name broken", "no checkpoint of runs/broken is whole"),
    Slip("of a run that is in use", TRAIN + " --run-name busy", "runs/busy is in use by process 1 on a-host"),
    Slip("of a run of another seed", TRAIN + " --run-name first --seed 7", "seed is 1 there and 7 here"),
    Slip("of a later version", TRAIN + " --run-name later", "step-00000004 has format 2; this version reads up to 1"),
    Slip("from a later version", TRAIN + " --resume later", "--resume later: runs/later/checkpoints/step-00000004 has"),
    Slip("of a damaged record", TRAIN + " --run-name damaged", "runs/damaged/run.json is damaged"),
    Slip("from another model", TRAIN + " --resume first --model model/config.json", "step-00000004 belongs to another"),
    Slip("from weights of another", TRAIN + " --init-from model --model gpt2", "is another model than --model gpt2"),
    Slip("from weights in part", TRAIN + " --init-from model --model model", "has no weights for transformer.h.0.attn"),
]

OPTIONS = [
    Slip("of another trainer", "train --lr 3", "unknown option --lr; here it is --learning-rate"),
    Slip("of a precision", "train --bf16", "unknown option --bf16; here it is --deepspeed NAME, such as zero2"),
    Slip("like no other", "train --wet-run", "unknown option --wet-run (see"),
    Slip("of another command", "checkpoint verify first --step 9", "unknown option --step (see"),
    Slip("a command like no other", "walks", "cannot be 'walks' (see"),
    Slip("runs nowhere", "runs rnus", "there is no run or folder of runs rnus"),
    Slip("a run to follow", "runs frist --follow", "did you mean 'runs/first'?"),
    Slip("two at once", "train demo --dry-run --print-config", "--print-config: not allowed with argument --dry-run"),
    Slip("a dry run of nothing", "train demo --dry-run", "--data is missing"),
    Slip("a shell", "completion bsh", "did you mean 'bash'?"),
    Slip("a port", "doctor --master-port 99999999", "must be a whole number of at least 1 and at most 65535"),
    Slip("a port of a run", TRAIN + " --master-port 70000", "must be a whole number of at least 1 and at most 65535"),
    Slip("1e3", "tokenizer --data corpsu --out new --vocab-size 1e3", "did you mean 'corpus'?"),
    Slip("nothing asked", "complete", "the following arguments are required: MODEL (see"),
    Slip("a prompt behind an option", "complete frist --temperature 0 'def f('", "did you mean 'runs/first'?"),
    Slip("a config behind one", f"compare zero1 --warmup-steps 0 zero9 {COMPARE} --data corpus", "'zero9' is neither"),
    Slip("a source behind one", "corpus src --out new --num-workers 1 more", "source more does not exist"),
    Slip("a run behind one", "report first --out new runs/x", "there is no run runs/x"),
    Slip("a preset behind one", "train --seed 2 lrge", "did you mean 'large'?"),
    Slip("a run for a preset", "train first", "to continue a run write --config runs/first/config.yaml"),
    Slip("in a fast precision", TRAIN + " --deepspeed zro2:auto", "did you mean 'zero2:auto'?"),
    Slip("auto without a name", "plan small auto", "write NAME:auto, such as zero2:auto"),
    Slip("a CPU's", TRAIN + " --micro-batch-size auto,cpu=x", "must be a whole number or auto behind auto,cpu=, not"),
    Slip("lean", TRAIN + " --deepspeed zero3 --lean-step on", "lean_step on does not go with ZeRO stage 3"),
    Slip("a word for prompts", TRAIN + " --eval-prompts exampels", "did you mean 'examples'?"),
]

KINDS = [
    Slip("a picture in no folder", "plan small zero2 --out new/x.png", "--out new/x.png: there is no folder new"),
    Slip("a folder for a picture", "plan small zero2 --out corpus", "--out corpus is a folder: name a file in it"),
    Slip("another picture", "plan small zero2 --out x.txt", "--out x.txt: the picture is a PNG"),
    Slip("data for doctor", "doctor --data corpsu", "did you mean 'corpus'?"),
    Slip("a tokenizer for doctor", "doctor --tokenizer tokenzier", "did you mean 'tokenizer'?"),
    Slip("a folder of runs for doctor", "doctor --output-dir hosts", "hosts cannot be made"),
    Slip("a folder for a model", TRAIN + " --model corpus", "model corpus is a folder without a config.json"),
    Slip("a file for a model", TRAIN + " --model hosts", "model hosts is no GPT-2 config.json: line 1 is not JSON"),
    Slip("a run to plan", "plan runs/first", "model runs/first is a folder without a config.json"),
    Slip("a folder for prompts", TRAIN + " --eval-prompts corpus", "corpus is a folder: name a file of prompts"),
    Slip("a folder for a prompt", "complete first --file corpus", "corpus is a folder: name a file of prompts"),
    Slip("a file for a run", "report hosts", "hosts is a file; name the folder of a run"),
    Slip("a file for a branch", "hub status hosts", "hosts is a file; name the folder of a run"),
    Slip("a file for a checkpoint", TRAIN + " --resume hosts", "hosts is a file; name the folder of a checkpoint or"),
    Slip("all checkpoints for one", TRAIN + " --resume runs/first/checkpoints", "it has no manifest.json"),
    Slip(
        "a folder for a repository", TRAIN + " --init-from runs/hub.git@first", "hub.git is not a bare git repository"
    ),
    Slip("a repository's name for a run", TRAIN + " --run-name hub.git", "'hub.git' is a name of a repository, as hub"),
    Slip(
        "the tokenizers' for a run", TRAIN + " --run-name tokenizers", "is the folder of the runs' tokenizers: choose"
    ),
    Slip(
        "git's own for a run", TRAIN + " --run-name FETCH_HEAD", "'FETCH_HEAD' means something else in git: choose an"
    ),
    Slip("a model with code", "evaluate coded", "coded/config.json names code of its own ('auto_map'), and models"),
    Slip("one to complete with", "complete coded x", "and models and tokenizers that bring code are not taken"),
    Slip("one to solve with", "humaneval coded --generate-only", "coded/config.json names code of its own"),
    Slip("one to begin from", TRAIN + " --init-from coded", "coded/config.json names code of its own"),
    Slip(
        "a tokenizer with code",
        TRAIN + " --tokenizer coded-words",
        "coded-words/tokenizer_config.json names code of its",
    ),
    Slip(
        "a token in a URL", TRAIN + " --data https://me:secret@host/x", "the run config holds what looks like a secret"
    ),
    Slip(
        "a key in a DeepSpeed JSON", TRAIN + " --deepspeed comet.json", "comet.json holds a secret under api_key: remo"
    ),
    Slip("nothing to resume", TRAIN + " --resume ''", "--resume cannot be an empty text"),
    Slip("no config", TRAIN + " --deepspeed ''", "--deepspeed cannot be an empty text"),
    Slip("no folder of runs", TRAIN + " --output-dir ''", "--output-dir cannot be an empty text"),
    Slip("no folder of a demo", "demo --workdir ''", "--workdir cannot be an empty text"),
    Slip("~ without quotes", "train demo --config null.yaml", "null.yaml:1: output_dir must be text, and YAML reads ~"),
    Slip("a variable without a name", TRAIN + " --output-dir '${}/x'", "${} names no variable"),
]

IMPORT = "checkpoint import foreign/{} new " + TRAIN.removeprefix("train ")
BEGIN = TRAIN + " --init-from foreign/{}"

FOREIGN = [
    Slip("a Trainer's output", IMPORT.format("trainer"), "the newest is foreign/trainer/checkpoint-10"),
    Slip("one to begin from", BEGIN.format("trainer"), "import foreign/trainer/checkpoint-10 RUN`, and name RUN"),
    Slip("a folder of checkpoints", IMPORT.format("several"), "name one of them, the newest is foreign/several/run-2"),
    Slip("a universal one", IMPORT.format("ds/global_step4_universal"), "from, one of foreign/ds/global_step4"),
    Slip("one by its tag", IMPORT.format("ds") + " --tag global_step4_universal", "one of foreign/ds/global_step4"),
    Slip("one that latest names", IMPORT.format("universal"), "latest: foreign/universal/a holds a universal"),
    Slip("one alone", IMPORT.format("alone"), "alone/a holds a universal checkpoint of DeepSpeed's, which is not read"),
    Slip("a universal one to begin from", BEGIN.format("alone"), "make a RUN of the checkpoint that it was converted"),
    Slip("a tag of a tag", IMPORT.format("ds/global_step4") + " --tag global_step4", "leave --tag out, or name forei"),
    Slip("a file of one", IMPORT.format("ds/global_step4/mp_rank_00_model_states.pt"), "name its folder, foreign/ds/"),
    Slip("a node's share of one", IMPORT.format("share/global_step4"), "copy the files of all nodes into one folder"),
    Slip("DeepSpeed's to begin from", BEGIN.format("ds"), "with `codeparrot-ds checkpoint import foreign/ds RUN`"),
    Slip("DeepSpeed's to resume from", TRAIN + " --resume foreign/ds", "checkpoint import foreign/ds RUN`"),
    Slip("DeepSpeed's to evaluate", "evaluate foreign/ds", "holds a checkpoint of DeepSpeed's: make a run of it with"),
    Slip("a run", f"checkpoint import runs/first new {TRAIN[6:]}", "continue it with codeparrot-ds train --config"),
    Slip(
        "a checkpoint of a run",
        f"checkpoint import runs/first/checkpoints/step-00000004 new {TRAIN[6:]}",
        "is of this program's run first, not a checkpoint of DeepSpeed's",
    ),
    Slip("FSDP's", IMPORT.format("fsdp"), "merge-weights foreign/fsdp/pytorch_model_fsdp_0 DIR`"),
    Slip("FSDP's to begin from", BEGIN.format("fsdp"), "merge-weights foreign/fsdp/pytorch_model_fsdp_0 DIR`"),
    Slip("a .distcp", IMPORT.format("dcp"), "format_utils dcp_to_torch foreign/dcp/step-7 FILE`"),
    Slip("a .distcp to begin from", BEGIN.format("dcp/step-7"), "format_utils dcp_to_torch foreign/dcp/step-7 FILE`"),
    Slip("a file of it", BEGIN.format("dcp/step-7/__0_0.distcp"), "dcp_to_torch foreign/dcp/step-7 FILE`"),
    Slip("FSDP's as a pickle", BEGIN.format("whole"), "holds an FSDP checkpoint as a pickle: load it into the model"),
    Slip("Megatron's", IMPORT.format("megatron/iter_0000100"), "holds a checkpoint of Megatron-LM's, not what engine."),
    Slip("a model", f"checkpoint import model new {TRAIN[6:]}", "a run with the weights: `train --init-from model`"),
    Slip("an adapter", IMPORT.format("adapter"), "a PEFT adapter, which is a change to another model's w"),
    Slip("an adapter to begin from", BEGIN.format("adapter"), "merge it into that model with merge_and_unload()"),
    Slip("an adapter to evaluate", "evaluate foreign/adapter", "save_pretrained('DIR'), and name DIR"),
    Slip("pickled weights", BEGIN.format("bin"), "weights as pickles (pytorch_model.bin), which can run code"),
    Slip("a pickle", BEGIN.format("nano/ckpt.pt"), "holds a pickle of PyTorch's (*.pt), which can run code"),
    Slip("a folder of one", BEGIN.format("nano"), "holds a pickle of PyTorch's (*.pt), which can run code"),
    Slip("weights alone", BEGIN.format("alone-weights"), "holds weights without the config.json or the model.safetens"),
    Slip("a file of a model", BEGIN.format("cache/snapshots/a1/model.safetensors"), "name foreign/cache/snapshots/a1"),
    Slip("a GGUF file", BEGIN.format("gguf/model.gguf"), "holds a GGUF model, which is made for inference: take the"),
    Slip("the Hub's cache", BEGIN.format("cache"), "holds a model of the Hub's cache: name foreign/cache/snapshots/a1"),
    Slip("the Hub's cache to import", IMPORT.format("cache"), "`train --init-from foreign/cache/snapshots/a1`"),
    Slip("shards without an index", BEGIN.format("shards"), "the model.safetensors.index.json that belongs to them"),
]

SLIPS = [
    *(Slip(f"{kind}: {slip.name}", slip.command, slip.sentence)
      for kind, slips in (("variable", VARIABLES), ("absent", ABSENT), ("run", RUNS), ("start", STARTS),
                          ("option", OPTIONS), ("kind", KINDS), ("foreign", FOREIGN))
      for slip in slips),
]  # fmt: skip

ENVIRONMENT = {"SCRATCH": "/tmp", "EMPTY": "", "HF_ENDPOINT": "http://127.0.0.1:9"}
"""That the slips are made in; nothing listens on port 9."""


def prepare(folder: Path) -> IO[str]:
    """Fills the folder that the slips are made in; returns the lock that keeps its run ``busy`` in use."""
    documents = [json.dumps({"path": "a.py", "content": f"def f_{n}():\n    return {n}\n"}) + "\n" for n in range(40)]
    for split in ("train", "validation"):
        (folder / "corpus" / split).mkdir(parents=True)
        (folder / "corpus" / split / "part-0.jsonl").write_text("".join(documents))
    write_tokenizer(folder / "tokenizer")
    (folder / "src").mkdir()
    (folder / "src" / "a.py").write_text("x = 1\n")
    for split in ("train", "test"):
        (folder / "saved" / split).mkdir(parents=True)
    for name, content in {
        "saved/dataset_dict.json": json.dumps({"splits": ["train", "test"]}),
        "saved/train/state.json": json.dumps({"_data_files": [{"filename": "data.arrow"}]}),
        "shard.jsonl": documents[0],
        "empty.jsonl": "",
        "rows.csv": "content\nx = 1\n",
        "hosts": "alpha slots=1\n",
        "run.yaml": "seed: 2\n",
        "variable.yaml": "seed: 2\noutput_dir: $NONE_SUCH/runs\n",
        "null.yaml": "output_dir: ~\n",
        "mine.json": "{}",
        "comet.json": '{"comet": {"enabled": true, "api_key": "0123456789abcdef"}}',
        "prompts.txt": "def f():\n",
        "problems.jsonl": "{}\n",
        "infilling.jsonl": '{"task_id": "SingleLineInfilling/HumanEval/0/L0", "suffix": "    return 1"}',
    }.items():
        (folder / name).write_text(content)
    _write_model(folder / "model")
    _write_model(folder / "coded")
    write_tokenizer(folder / "coded-words")
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoTokenizer": ["words.Evil", None]}}
    (folder / "coded" / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 512, **code}))
    (folder / "coded-words" / "tokenizer_config.json").write_text(json.dumps(code))
    _write_foreign(folder / "foreign")
    _write_run(folder / "runs" / "first", parameter_shapes(find_shape("demo", vocab_size=257, seq_length=256)))
    _write_run(folder / "runs" / "broken", {})
    (folder / "runs" / "broken" / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    _write_run(folder / "runs" / "later", {})
    manifest = sealed({"format": 2, "step": 4, "created": "", "files": {}})
    write_file(folder / "runs" / "later" / "checkpoints" / "step-00000004" / "manifest.json", [json_bytes(manifest)])
    _write_run(folder / "runs" / "damaged", {})
    (folder / "runs" / "damaged" / "run.json").write_text("{")
    (folder / "runs" / "hub.git").mkdir()
    (folder / "runs" / "busy" / "checkpoints").mkdir(parents=True)
    lock = (folder / "runs" / "busy" / ".lock").open("a+")
    lock.write("process 1 on a-host\n")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def write_tokenizer(folder: Path) -> None:
    """257 tokens: the bytes and an end of sequence."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([""], trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_model(folder: Path) -> None:
    """A small GPT-2 with the weights of its embedding alone, and of these the header."""
    write_tokenizer(folder)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 512}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    header = json.dumps(
        {"transformer.wte.weight": {"dtype": "F32", "shape": [257, 16], "data_offsets": [0, 16448]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16448))


def _write_foreign(folder: Path) -> None:
    """Empty files with the names of other programs' (`tests/checkpoint/foreign_writers.py` has whole ones)."""
    states, universal = "mp_rank_00_model_states.pt", "zero/transformer.wte.weight/fp32.pt"
    for name in (
        *(f"trainer/checkpoint-{step}/global_step{step}/{states}" for step in (9, 10)),
        *("trainer/checkpoint-9/trainer_state.json", "trainer/checkpoint-10/trainer_state.json"),
        *(f"ds/global_step4/{states}", f"ds/global_step4_universal/{states}", f"ds/global_step4_universal/{universal}"),
        "share/global_step4/zero_pp_rank_8_mp_rank_00_optim_states.pt",
        *(f"several/run-{number}/global_step4/{states}" for number in (1, 2)),
        *(f"universal/a/{universal}", f"universal/b/{states}", f"alone/a/{states}", f"alone/a/{universal}"),
        *("fsdp/pytorch_model_fsdp_0/.metadata", "fsdp/pytorch_model_fsdp_0/__0_0.distcp"),
        *("fsdp/optimizer_0/__0_0.distcp", "fsdp/scheduler.bin", "fsdp/random_states_0.pkl"),
        *("dcp/step-7/.metadata", "dcp/step-7/__0_0.distcp", "whole/pytorch_model_fsdp.bin", "whole/optimizer.bin"),
        *("megatron/iter_0000100/mp_rank_00/model_optim_rng.pt", "megatron/latest_checkpointed_iteration.txt"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer.json"),
        *("bin/config.json", "bin/pytorch_model-00001-of-00002.bin", "nano/ckpt.pt", "gguf/model.gguf"),
        *("alone-weights/model.safetensors", "shards/config.json", "shards/model-00001-of-00002.safetensors"),
        *("cache/snapshots/a1/config.json", "cache/snapshots/a1/model.safetensors", "cache/snapshots/b2/config.json"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "ds" / "latest").write_text("global_step4")
    (folder / "universal" / "latest").write_text("a")
    (folder / "cache" / "refs").mkdir()
    (folder / "cache" / "refs" / "main").write_text("a1")


def _write_run(run: Path, parameters: dict[str, list[int]]) -> None:
    """A run with a checkpoint of step 4, which holds what is looked at before a rank starts."""
    run.mkdir(parents=True)
    options = {"data": "corpus", "tokenizer": "tokenizer", "num_lanes": 2, "hub": "off", "wandb": "off"}
    save_config(RunConfig(**PRESETS["demo"], **options, run_name=run.name), run / "config.yaml")
    (run / "run.json").write_text(json.dumps({"name": run.name, "hub": "off"}))
    (run / "checkpoints").mkdir()
    staging = staging_folder(run / "checkpoints", 4)
    (staging / "export").mkdir(parents=True)
    content = {"state.json": {"parameters": parameters}, "data.json": {}, "export/config.json": {"n_positions": 256}}
    files = {name: write_file(staging / name, [json.dumps(value).encode()]) for name, value in content.items()}
    publish(staging, 4, files)
