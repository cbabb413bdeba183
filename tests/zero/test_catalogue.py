import pytest

from codeparrot_ds.zero.catalogue import TABLE_BEGIN, catalogue, render, render_readme, write_catalogue
from codeparrot_ds.zero.ds_config import (
    RUN_OWNED_KEYS,
    activation_checkpointing,
    ds_configs_folder,
    offload_device,
    precision,
    shipped_names,
    value_at,
    zero_stage,
)


def test_files_on_disk_are_the_generators():
    assert shipped_names() == sorted(catalogue())
    for name, entry in catalogue().items():
        assert (ds_configs_folder() / f"{name}.json").read_text() == render(entry.config), name
    readme = (ds_configs_folder() / "README.md").read_text()
    assert readme == render_readme(readme)


def test_writing_the_catalogue(tmp_path):
    (tmp_path / "README.md").write_text(f"before\n{TABLE_BEGIN}\nstale\n<!-- table: end -->\nafter\n")
    write_catalogue(tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == shipped_names()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    assert "| `zero3_offload.json` | 3 | bf16 | CPU | CPU |" in text


def test_every_stage_in_every_precision_is_there():
    configs = {name: entry.config for name, entry in catalogue().items()}
    for stage in range(4):
        for suffix, dtype in (("", "bf16"), ("_fp16", "fp16"), ("_fp32", "fp32")):
            config = configs[f"zero{stage}{suffix}"]
            assert (zero_stage(config), precision(config)) == (stage, dtype)
    assert offload_device(configs["zero2_offload"], "optimizer") == "cpu"
    assert offload_device(configs["zero3_offload"], "parameters") == "cpu"
    assert offload_device(configs["zero3_nvme"], "optimizer") == "nvme"
    assert activation_checkpointing(configs["zero2_activation_checkpointing"])
    assert activation_checkpointing(configs["zero3_activation_checkpointing"])


@pytest.mark.parametrize("name", shipped_names())
def test_no_file_holds_what_belongs_to_the_run(name):
    config = catalogue()[name].config
    assert not [path for path in RUN_OWNED_KEYS if value_at(config, path) is not None]
    assert "scheduler" not in config
