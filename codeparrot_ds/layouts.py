"""How people lay out data sets and name their columns: which file is of which split or no data, what a row holds.

Splits go by the words that the ``datasets`` library goes by (``SPLIT_KEYWORDS`` of ``datasets.data_files`` 5.2, which
takes a second to import), columns by the schemas of the published data sets of code.
"""

from __future__ import annotations

import functools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codeparrot_ds.errors import UserError
from codeparrot_ds.paths import did_you_mean

SPLITS = ("train", "validation", "test")
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_LETTERS = re.compile(r"[^\W\d_]+")
_MAX_DEPTH = 4  # of folders in folders, which also ends a circle of links
_MAX_NAMED = 5
CARD = "corpus.json"
"""Of a corpus, in its folder."""
# What `datasets`, `save_to_disk` and this program's own `corpus` and `tokenizer` write beside data.
_SIDECARS = {
    *("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"),
    *(CARD, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
}


# --------------------------------------------------------------------------------------------------------------------
# Splits


def is_sidecar(name: str) -> bool:
    """Whether a file lies beside data and is none, by its name: hidden files are a system's or a program's own."""
    return name in _SIDECARS or name.startswith((".", "_")) or name.endswith((".md", ".crc"))


def split_of(name: str) -> str | None:
    """The split that the name of a file or folder says, in a word that anything but letters bounds.

    Of several the one that is furthest from training: what may be held out is not trained on.
    """
    said = {_WORDS.get(word) for word in _LETTERS.findall(name.lower())}
    return next((split for split in reversed(SPLITS) if split in said), None)


def named_split(split: str, there: Collection[str], *, named: bool) -> str | None:
    """Which of the splits that are there is taken for one; None where none is.

    What somebody named to evaluate on is its validation split, else its test split, else the one split that it has:
    published sets to evaluate on, as codeparrot's, call that train.
    """
    if split in there or not named or split != "validation":
        return split if split in there else None
    return "test" if "test" in there else next(iter(there)) if len(there) == 1 else None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The files of data below a folder."""

    folder: Path
    splits: Mapping[str, list[Path]]
    """By split, sorted; where no name says a split, all are ``train``."""
    told_apart: bool
    """Whether any name says a split."""
    left_out: list[Path] = field(default_factory=list)
    """Files with the ending of data: sidecars, and what no name gives to a split where other names do."""

    def names(self, split: str) -> list[str]:
        """What identifies each file of a split wherever the folder lies: its path in the split's own folder, if any."""
        own = self.folder / split
        paths = self.splits[split]
        names = [str(path.relative_to(own if path.is_relative_to(own) else self.folder)) for path in paths]
        return names if len(set(names)) == len(names) else [str(path.relative_to(self.folder)) for path in paths]

    def describe(self) -> str | None:
        """What is taken for what, in a line; None for ``train`` and ``validation`` folders and nothing else."""
        plain = all(path.parent == self.folder / split for split, paths in self.splits.items() for path in paths)
        if plain and not self.left_out and "test" not in self.splits:
            return None
        if self.told_apart:
            counts = [f"{split} {len(self.splits[split]):,}" for split in SPLITS if split in self.splits]
            text = f"shards by their names: {', '.join(counts)}"
            text += " (test is not trained on)" if "test" in self.splits else ""
        else:
            text = f"no name tells splits apart: its {len(self.splits.get('train', ())):,} shard(s) are taken as one"
        if self.left_out:
            names = [str(path.relative_to(self.folder)) for path in self.left_out]
            more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
            text += f"; left out: {', '.join(names[:_MAX_NAMED])}{more}"
        return f"{self.folder}: {text}"


def lay_out(folder: Path, is_data: Callable[[str], bool]) -> Layout:
    """Which files below a folder are of which split.

    The outermost names that say a split count, of folders and files; a folder's name is that of all in it. Files whose
    name says none are ``train`` where no other name says that, and are left out where one does.

    Args:
        folder: to look at, and some folders below; what is hidden is not.
        is_data: whether a file of this name can be one of data.
    """
    left_out: list[Path] = []
    unsaid: list[Path] = []
    level = [folder]
    splits: dict[str, list[Path]] = {}
    for _ in range(_MAX_DEPTH):
        splits = defaultdict(list)
        deeper: list[Path] = []
        plain: list[Path] = []
        for entry in (entry for each in level for entry in _entries(each)):
            split, path = split_of(entry.name), Path(entry.path)
            if entry.is_dir():
                if split is None:
                    deeper.append(path)
                elif inside := list(_data_below(path, is_data, left_out)):
                    splits[split] += inside
            elif is_data(entry.name) and entry.is_file():
                chosen = left_out if is_sidecar(entry.name) else plain if split is None else splits[split]
                chosen.append(path)
        unsaid = unsaid or plain
        # A lone .json on the outside may describe what lies further in, as any other format does not.
        if splits or any(path.suffix != ".json" for path in plain):
            break
        level = deeper
    told_apart = bool(splits)
    if "train" in splits:
        left_out += unsaid
    elif unsaid:
        splits["train"] = unsaid
    found = {split: sorted(splits[split]) for split in SPLITS if split in splits}
    return Layout(
        folder=folder,
        splits=found,
        told_apart=told_apart,
        left_out=sorted(path for path in left_out if path.name != CARD),
    )


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Hidden folders are left out, as the commit log of a table and a clone's ``.git`` are.

    A directory's entries know what they are: a large folder on a network costs no question per file.
    """
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not (entry.name.startswith((".", "_")) and entry.is_dir()))


def _data_below(
    folder: Path, is_data: Callable[[str], bool], left_out: list[Path], depth: int = _MAX_DEPTH
) -> Iterator[Path]:
    for entry in _entries(folder):
        if entry.is_dir():
            if depth:
                yield from _data_below(Path(entry.path), is_data, left_out, depth - 1)
        elif is_data(entry.name) and entry.is_file():
            if is_sidecar(entry.name):
                left_out.append(Path(entry.path))
            else:
                yield Path(entry.path)


# --------------------------------------------------------------------------------------------------------------------
# Columns

COLUMNS = {
    # codeparrot and the recipe; The Stack and StarCoder data; The Stack's sample; github-code; The Stack v2's table
    "content": ("content", "code"),
    "repo": ("repo_name", "max_stars_repo_name", "repository_name"),
    "path": ("path", "max_stars_repo_path"),
    "license": ("license", "max_stars_repo_licenses", "licenses", "detected_licenses"),
    "copies": ("copies",),
}
"""What is read of a row, with the names that published data sets give it, the first that is there."""
_ONLY_BESIDE = {"code": "repo_name"}  # github-code: a column of this name alone can be anything
_IDS_OF_CONTENT = ("blob_id", "content_id")


@functools.lru_cache(maxsize=16)
def parse_columns(text: str) -> Mapping[str, str]:
    """The columns that ``content=code,license=terms`` names; a name alone is that of the text.

    Raises:
        UserError: a part that is no pair, with a word that means nothing, or that says one thing twice.
    """
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        what, equals, name = (word.strip() for word in part.partition("="))
        what, name = (what, name) if equals else ("content", what)
        if not what or not name:
            raise UserError(f"columns: {part!r} is not WHAT=COLUMN, as in content=code,license=terms")
        if what not in COLUMNS:
            raise UserError(f"columns: {what!r} is nothing that is read of a row{did_you_mean(what, COLUMNS)}")
        if what in columns:
            raise UserError(f"columns: {what} is named twice")
        columns[what] = name
    return columns


@functools.lru_cache(maxsize=256)
def find_columns(names: tuple[str, ...], columns: str) -> Mapping[str, str]:
    """What is there to read in rows with columns of these names, each with its column.

    Args:
        names: of the columns of a row.
        columns: as `parse_columns` takes them: they win over what published data sets have.
    """
    named, found = parse_columns(columns), {}
    for what, known in COLUMNS.items():
        if what in named:
            there = [named[what]] if named[what] in names else []
        else:
            there = [name for name in known if name in names and _ONLY_BESIDE.get(name, name) in names]
        if there:
            found[what] = there[0]
    return found


def columns_of_text(names: Sequence[str], columns: str) -> list[str]:
    """What is read of a table for its texts: their column, and what it is known by; nothing where there is none."""
    name = find_columns(tuple(names), columns).get("content")
    beside = () if name in parse_columns(columns).values() else (_ONLY_BESIDE.get(name or ""),)
    return [each for each in (name, *beside) if each is not None]


def no_text(names: tuple[str, ...], columns: str) -> str:
    """Why there is no text in rows with columns of these names, and what to do."""
    wanted = parse_columns(columns).get("content", "content")
    text = f"no column {wanted!r} (columns: {', '.join(map(str, names))})"
    if any(name in names for name in _IDS_OF_CONTENT):
        return f"{text}: these are ids of contents, as in The Stack v2, which has none: download the contents first"
    return f"{text}: name that of the text with --columns content=NAME"
