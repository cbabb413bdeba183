"""Write a folder beside its place and rename it into it, so that it is complete or not there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from codeparrot_ds.errors import UserError


@contextlib.contextmanager
def staged_folder(out: Path, *, marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``out`` when the block ends without an exception.

    An existing ``out`` with anything in it is refused before any work starts. ``overwrite`` lets it be replaced, but
    only where it holds ``marker`` (the file that a folder of this kind always has): ``--out ~`` must never delete a
    home. The old folder stays whole until the new one is complete.

    Raises:
        UserError: ``out`` may not be replaced, or the disk refuses (full, read-only, no permission).
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, not a folder; choose another --out")
    if out.is_dir() and any(out.iterdir()):
        if not (out / marker).is_file():
            raise UserError(f"{out} holds other files and no {marker}; choose a new or empty folder")
        if not overwrite:
            raise UserError(f"{out} already holds a {marker}; choose another folder or pass --overwrite to replace it")
    staging = out.with_name(f".{out.name}.staging-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        if out.is_dir():
            out.rename(replaced)
        staging.rename(out)
    except OSError as error:
        if replaced.is_dir() and not out.exists():
            replaced.rename(out)
        raise UserError(f"cannot write {out}: {error.strerror or error} ({error.filename or staging})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if out.is_dir():
            shutil.rmtree(replaced, ignore_errors=True)
