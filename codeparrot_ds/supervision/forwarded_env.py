"""What a rank on another host needs of the command's environment, in a file that only its user can read. No torch.

DeepSpeed writes the variables that it knows of into the command line that it gives to ssh, where every user of a host
sees them, prints them in its log, and forgets ``HF_*`` and ``WANDB_*``. Here they travel through ssh's standard input
into a file of mode 0600 on each host; its ranks read it and remove it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import UserError

FILE = "CODEPARROT_DS_ENVIRONMENT"
"""Environment variable: where the file is; on each host with the number of the host behind it, as in ``….1``."""
RESOLVED_RUN = "--resolved-run"
"""Option of a rank: the private file that holds its `ResolvedRun`. Only `codeparrot-ds` gives it."""
PREFIXES = (
    "HF_ HUGGING_FACE_ HUGGINGFACE_ TRANSFORMERS_ TOKENIZERS_ DATASETS_ WANDB_ MLFLOW_ TENSORBOARD_ AWS_ "
    "OMP_ MKL_ ONEDNN_ DNNL_ ATEN_ KMP_ GOMP_ NCCL_ RCCL_ GLOO_ UCX_ TP_ CUDA_ NVIDIA_ TORCH_ TORCHINDUCTOR_ PYTORCH_ "
    "TRITON_ DS_ DEEPSPEED_ CODEPARROT_ PYTHON LD_LIBRARY_PATH LD_PRELOAD MALLOC_ XDG_CACHE_HOME NETRC LANG LC_"
).split()
NAMES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
NOT_CARRIED = (
    # DeepSpeed's launcher gives each host its own devices.
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
    *(FILE, "CODEPARROT_DS_LAUNCHER_LEADS", "DS_ENV_FILE", "TORCH_EXTENSIONS_DIR"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE"),
)


def carried(environment: MutableMapping[str, str]) -> dict[str, str]:
    """The variables of an environment that its ranks on other hosts need."""
    return {
        name: value
        for name, value in environment.items()
        if name not in NOT_CARRIED and (name in NAMES or name.startswith(tuple(PREFIXES)))
    }


def write_private(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON into a new file that only this user can read."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(content, file)


@contextlib.contextmanager
def in_memory(content: dict[str, Any]) -> Iterator[Path]:
    """The same without a place on a disk, as long as this process lives: a kill leaves nothing behind."""
    descriptor = os.memfd_create("codeparrot-ds")
    try:
        os.fchmod(descriptor, 0o600)
        with os.fdopen(os.dup(descriptor), "w", encoding="utf-8") as file:
            json.dump(content, file)
        yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


def file_of_this_host(environment: MutableMapping[str, str]) -> Path | None:
    """The file that was forwarded to this host; None where none was."""
    base = environment.get(FILE)
    return None if base is None else Path(f"{base}.{environment.get('CROSS_RANK', '0')}")


def take_carried(environment: MutableMapping[str, str]) -> dict[str, Any] | None:
    """Puts what was carried into a rank's environment; returns the run that came along, None without a file.

    Raises:
        UserError: the file is missing, or another user could have written it.
    """
    path = file_of_this_host(environment)
    if path is None:
        return None
    content = read_private(path)
    environment.update(content["variables"])
    return dict(content["run"])


def read_private(path: Path) -> dict[str, Any]:
    """What `write_private` wrote; `UserError` where it cannot be read, or another user could have written it."""
    try:
        with path.open(encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise UserError(f"{path} is not this user's alone: nothing of the run is taken from it")
            return dict(json.load(file))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"what the launcher's command left for this rank cannot be read: {error}") from error
