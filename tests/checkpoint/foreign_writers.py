"""Checkpoints and models as other trainers leave them, written by those trainers' own code.

    python -m tests.checkpoint.foreign_writers FOLDER TOKENIZER

A process of its own: transformers and accelerate keep what they find in it for as long as it lives.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

SIZES = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 257}
DEEPSPEED = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,  # the Trainer's, PyTorch's AdamW
    "gradient_clipping": 1.0,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "train_batch_size": "auto",
}


def write_all(folder: Path, tokenizer_dir: Path) -> None:
    """Writes ``trainer``, ``plain-trainer``, ``fsdp``, ``fsdp-whole``, ``dcp``, ``fp32``, ``bin`` and ``sharded``."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(tokenizer_dir))
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, bos_token_id=256, eos_token_id=256))
    write_models(folder, model)
    write_distributed(folder, model)
    write_trainer(folder / "plain-trainer", model, tokenizer)
    write_trainer(folder / "trainer", model, tokenizer, deepspeed=DEEPSPEED)
    write_conversions(folder, folder / "trainer" / "checkpoint-4")
    for name in ("merged", "by-hand", "sharded"):  # what the sentences say to put beside the weights
        shutil.copy(tokenizer_dir / "tokenizer.json", folder / name)
    model.config.save_pretrained(folder / "merged")


def write_models(folder: Path, model) -> None:
    """In several files, and as a pickle of PyTorch's, as transformers wrote it by default until 2023."""
    import torch

    model.save_pretrained(folder / "sharded", max_shard_size="8KB")
    model.config.save_pretrained(folder / "bin")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")


def write_trainer(folder: Path, model, tokenizer, **settings) -> None:
    """The output folder of a transformers Trainer after four steps, with two checkpoints."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    rows = [{"input_ids": [n % 256] * 16, "labels": [n % 256] * 16} for n in range(16)]
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], **settings
    )
    data = {"train_dataset": rows, "data_collator": default_data_collator}
    Trainer(model=model, args=arguments, processing_class=tokenizer, **data).train()


def write_distributed(folder: Path, model) -> None:
    """What accelerate writes for FSDP, sharded and whole; what PyTorch's Distributed Checkpoint writes; and what the
    sentences about both propose."""
    import torch
    import torch.distributed.checkpoint as dcp
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import merge_fsdp_weights, save_fsdp_model, save_fsdp_optimizer
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    accelerator = Accelerator(cpu=True)
    for name, kind in (("fsdp", "SHARDED_STATE_DICT"), ("fsdp-whole", "FULL_STATE_DICT")):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        save_fsdp_model(plugin, accelerator, model, str(folder / name))
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, str(folder / name))
    merge_fsdp_weights(str(folder / "fsdp" / "pytorch_model_fsdp_0"), str(folder / "merged"))
    dcp.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=folder / "dcp" / "step-7"
    )
    dcp_to_torch_save(folder / "dcp" / "step-7", folder / "whole.pt")
    model.load_state_dict(torch.load(folder / "whole.pt")["model"])
    model.save_pretrained(folder / "by-hand")


def write_conversions(folder: Path, checkpoint: Path) -> None:
    """What DeepSpeed's own tools make of its checkpoint: a universal one beside it, and fp32 weights as a pickle."""
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), str(folder / "fp32"))
    arguments = argparse.Namespace(
        input_folder=str(checkpoint / "global_step4"),
        output_folder=str(checkpoint / "global_step4_universal"),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    ds_to_universal.main(arguments)


if __name__ == "__main__":
    write_all(*map(Path, sys.argv[1:]))
