"""Well-known configs of other programs, written down from their documentation: nothing untrue is said of them.

``findings`` of each are all that is said, and all of it is so: old names, keys that DeepSpeed 0.19.8 reads and does not
use, and what a run here has itself.
"""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from codeparrot_ds.config.run_config import RunConfig
from codeparrot_ds.ds_config.facts import leaves
from codeparrot_ds.ds_config.file import DsFile, read_ds_config
from codeparrot_ds.ds_config.lint import lint, lint_file
from codeparrot_ds.ds_config.resolve import modern, resolve
from codeparrot_ds.errors import UserError

PUBLIC = json.loads(Path(__file__).with_name("public_configs.json").read_text())
# Files that public projects ship, named after them: what DeepSpeed's parser says of each (``takes``, or how its words
# begin), the errors of the check, and why the two differ where they do.
FILES = json.loads(Path(__file__).with_name("public_files.json").read_text())


def test_there_are_at_least_twelve():
    assert len(PUBLIC) >= 12
    assert all(entry["source"].startswith("https://") for entry in PUBLIC.values())


@pytest.mark.parametrize("name", PUBLIC)
def test_only_what_is_so_is_said(name):
    said = [[finding.severity, finding.key] for finding in lint(PUBLIC[name]["config"], name)]
    assert said == PUBLIC[name]["findings"]
    assert not [key for severity, key in said if severity == "error"]


@pytest.mark.parametrize("name", PUBLIC)
def test_deepspeed_takes_them_as_well(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    config = copy.deepcopy(PUBLIC[name]["config"])
    # "auto" of the batch is what the Trainer fills in; DeepSpeed drops or ignores the others at this point.
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.pop(key, None)
    config["train_batch_size"] = 1
    parsed = DeepSpeedConfig(config)
    assert parsed.zero_optimization_stage == PUBLIC[name]["config"].get("zero_optimization", {}).get("stage", 0)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.startswith(("transformers", "axolotl", "LLaMA"))])
def test_files_that_leave_the_run_to_the_run_can_train_here(name):
    file = DsFile(Path("public.json"), PUBLIC[name]["config"], {})
    resolved = resolve(file, RunConfig(), world_size=2, model_hidden_size=768).config
    assert "auto" not in dict(leaves(resolved)).values()
    assert not [f for f in lint(resolved, name, config=RunConfig(), world_size=2) if f.severity == "error"]


def test_old_names_mean_what_deepspeed_takes_them_for():
    from deepspeed.runtime.config import DeepSpeedConfig

    old = {
        "train_batch_size": 1,
        "bfloat16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "cpu_offload": True,
            "cpu_offload_param": True,
            "stage3_gather_fp16_weights_on_model_save": True,
            "prefetch_bucket_size": 7,
        },
    }
    now, renamed = modern(old)
    assert renamed["bf16",] == ("bfloat16",) and len(renamed) == 5
    by_old, by_new = DeepSpeedConfig(copy.deepcopy(old)), DeepSpeedConfig(copy.deepcopy(now))
    assert by_old.bfloat16_config == by_new.bfloat16_config
    for field in type(by_new.zero_config).model_fields:
        if not field.startswith("cpu_offload") and "fp16" not in field:
            assert getattr(by_old.zero_config, field) == getattr(by_new.zero_config, field), field
    switched_off, _ = modern({"zero_optimization": {"stage": 2, "cpu_offload": False}})
    assert switched_off == {"zero_optimization": {"stage": 2}}


# --------------------------------------------------------------------------------------------------------------------
# Files as DeepSpeed's parser takes them


def asked(path):
    """``takes``, or the words with which DeepSpeed's parser refuses a file."""
    import hjson
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    config = hjson.loads(path.read_text(), object_pairs_hook=dict_raise_error_on_duplicate_keys)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    for key in batch:  # the Trainer fills these in before DeepSpeed sees them
        if config.get(key) == "auto":
            del config[key]
    if not {*batch[:2]} & set(config):
        config["train_batch_size"] = 1
    # One rank of its own batch, whatever other tests of this process have started.
    ranks = SimpleNamespace(get_data_parallel_world_size=lambda: 1)
    try:
        DeepSpeedConfig(config, mpu=ranks)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "takes"


def errors(path):
    return [finding.key for finding in lint_file(read_ds_config(path)) if finding.severity == "error"]


@pytest.mark.parametrize("name", FILES)
def test_a_public_file_is_taken_where_deepspeed_takes_it(name, tmp_path):
    entry = FILES[name]
    path = tmp_path / "c.json"
    path.write_text(json.dumps(entry["config"]))
    assert asked(path).startswith(entry["deepspeed"])
    assert errors(path) == entry["errors"]
    assert ("reason" in entry) == (entry["deepspeed"] == "takes" and entry["errors"] != [])
    assert entry["deepspeed"] == "takes" or entry["errors"]


# What a file may look like otherwise, whether DeepSpeed takes it, and whether the check does.
TEXTS = {
    "a comment and trailing commas": ('{\n// one node\n"zero_optimization": {"stage": 2,},}', True, True),
    "other comments": ('{/* a */ "bf16": {"enabled": true}} # b', True, True),
    "single quotes": ("{'bf16': {'enabled': true}}", True, True),
    "keys without quotes": ("{bf16: {enabled: true}}", True, True),
    "no commas": ('{"bf16": {\n"enabled": true\n"check_grad_overflow": false}}', True, True),
    "no braces": ("bf16: {enabled: true}\nzero_optimization: {stage: 2}", True, True),
    "a byte order mark": ('\ufeff{"bf16": {"enabled": true}}', True, True),
    "a note": ('{"_comment": "one node", "__version": 2}', True, True),
    "a note where it refuses unknown keys": ('{"zero_optimization": {"_comment": "x"}}', False, False),
    "a text for a truth value": ('{"bf16": {"enabled": "true"}}', True, True),
    "a number for a truth value": ('{"zero_optimization": {"stage": 2, "overlap_comm": 1}}', True, True),
    "a number for a truth value, by hand": ('{"wall_clock_breakdown": 1}', True, True),
    "a text for a number": ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "50000000"}}', True, True),
    "a text for a number with an exponent": ('{"zero_optimization": {"reduce_bucket_size": "5e8"}}', False, False),
    "a text for a number of a choice": ('{"zero_optimization": {"stage": "2"}}', True, True),
    "a text for a list": ('{"zero_optimization": {"stage": 3, "leaf_module": {"names": "mlp"}}}', True, True),
    "true for ZeRO": ('{"zero_optimization": true}', True, True),
    "a number with a point": ('{"train_batch_size": 8.0}', True, True),
    "the same key twice": ('{"bf16": {}, // old\n"bf16": {}}', False, False),
    "a comma left out": ('{"zero_optimization": {"stage": 2 "overlap_comm": true}}', False, False),
    "a truth value in Python's words": ('{"bf16": {"enabled": True}}', False, False),
    # What it takes and does not mean what it says stays an error.
    "a text for a truth value, by hand": ('{"prescale_gradients": "false"}', True, False),
    "a text for a number, by hand": ('{"gradient_clipping": "1.0"}', True, False),
    "true for a number": ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": true}}', True, False),
    "a key that it ignores": ('{"gradient_cliping": 1.0}', True, False),
    "a line swallowed by a text": ('{"optimizer": {\n"type": AdamW, "params": {}\n}}', True, False),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_is_taken_as_deepspeed_takes_it(name, tmp_path):
    text, taken, taken_here = TEXTS[name]
    path = tmp_path / "c.json"
    path.write_text(text)
    try:
        says = asked(path)
    except ValueError as error:  # of its reader
        says = str(error)
    assert (says == "takes") == taken, says
    try:
        found = errors(path)
    except UserError as error:
        found = [str(error)]
    assert (found == []) == taken_here, found
