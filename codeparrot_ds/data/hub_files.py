"""What a command takes from the Hugging Face Hub, through its client's cache, with a command's patience.

The client itself asks a Hub that does not answer again and again, for minutes in all. Here it is asked once; where it
does not answer, what the cache holds is taken.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from codeparrot_ds.errors import UserError, first_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TIMEOUT_SECONDS = 10.0
"""Of silence."""


@functools.cache
def hub_tokenizer(name: str) -> Path:
    """The cached folder of a tokenizer on the Hub; says on standard error that it is taken from there.

    Args:
        name: ``gpt2`` or ``org/name``, maybe with ``@REVISION``.

    Raises:
        UserError: the Hub does not have it or does not answer.
    """
    first, *others = TOKENIZER_FILES
    path = hub_file(name, first, what="tokenizer")
    print(f"tokenizer {name} is taken from the Hugging Face Hub", file=sys.stderr)
    for other in others:  # that not every model has
        with contextlib.suppress(UserError):
            hub_file(f"{name.partition('@')[0]}@{path.parent.name}", other, what="tokenizer")
    return path.parent


def hub_file(name: str, file: str, *, what: str) -> Path:
    """A file of a model repository, in the client's cache.

    Args:
        name: of the repository, maybe with ``@REVISION``.
        file: its path in there.
        what: it is for, in messages.

    Raises:
        UserError: the Hub does not have it, or does not answer and it is not in the cache.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo, _, revision = name.partition("@")
    revision = revision or "main"
    with _user_errors(name, file, what):
        try:
            _ask(repo, file, revision)
        except (OSError, _http_error()) as error:
            cached = None if _is_refusal(error) else try_to_load_from_cache(repo, file, revision=revision)
            if not isinstance(cached, str):
                raise
            return Path(cached)
        return Path(hf_hub_download(repo, file, revision=revision, endpoint=_endpoint()))


@contextlib.contextmanager
def first_look(name: str, remedy: str) -> Iterator[None]:
    """Within, ``datasets`` takes a data set from the Hub that answers, else from its cache, and never waits for it.

    The library asks a Hub that does not answer for minutes. Here it is asked once, and where it does not answer the
    library is made to stay offline for this look.

    Args:
        name: ``org/name``; nothing is asked about a folder.
        remedy: what the reader can name instead.

    Raises:
        UserError: the Hub cannot be reached and the cache has no such data set.
    """
    if Path(name).is_dir():
        yield
        return
    import datasets
    from huggingface_hub import HfApi, constants, errors

    try:
        HfApi(endpoint=_endpoint()).dataset_info(name, timeout=TIMEOUT_SECONDS)
    except errors.HFValidationError:
        pass  # the library says what is wrong with the name
    except (OSError, _http_error()) as error:
        if not _is_refusal(error):  # and of one the library says more
            places = [(datasets.config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE")]
            before = [getattr(*place) for place in places]
            try:
                for place in places:
                    setattr(*place, True)
                yield
            except ConnectionError:
                here = f"there is no folder {name} here, and the Hub"
                raise UserError(
                    f"{here} is not asked offline (HF_HUB_OFFLINE): {remedy}"
                    if before[1]
                    else f"{here} at {_endpoint()} cannot be reached ({first_line(error)}): {remedy}, or try again"
                ) from error
            finally:
                for place, value in zip(places, before, strict=True):
                    setattr(*place, value)
            return
    yield


def _ask(repo: str, file: str, revision: str) -> None:
    """Whether the Hub has a file, in one request; raises the client's errors."""
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url

    url = hf_hub_url(repo, file, revision=revision, endpoint=_endpoint())
    get_hf_file_metadata(url, token=get_token(), timeout=TIMEOUT_SECONDS)


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")


def _http_error() -> type[Exception]:
    from huggingface_hub.utils import httpx

    return httpx.HTTPError


def _is_refusal(error: Exception) -> bool:
    """Whether the Hub has answered, and not only that it is busy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is not None and status < 500 and status != 429


@contextlib.contextmanager
def _user_errors(name: str, file: str, what: str) -> Iterator[None]:
    """One sentence for what the client raises."""
    from huggingface_hub import errors

    here = f"there is no folder {name} here, and the Hub"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(f"{here}'s {name} is gated: accept its terms there and log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"{here} has no model {name} that you can see: correct the name of the {what}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"the Hub's {name.replace('@', ' has no branch, tag or commit ')}") from error
    except errors.EntryNotFoundError as error:
        raise UserError(f"{here}'s {name} has no {file}: it cannot be used as a {what}") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError(f"{here} is not asked offline (HF_HUB_OFFLINE): name a folder of a {what}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        remedy = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise UserError(f"{here} does not give {name} (HTTP {status}): {remedy}") from error
    except errors.HFValidationError as error:
        raise UserError(f"there is no folder {name} here, and no model on the Hub can be named so") from error
    except (OSError, _http_error()) as error:
        raise UserError(
            f"{here} at {_endpoint()} cannot be reached ({first_line(error)}): name a folder, or try again"
        ) from error
