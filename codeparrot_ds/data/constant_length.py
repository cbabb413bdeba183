"""The recipe's packed data set, for those who bring their own documents and loader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from codeparrot_ds.data.packing import Packer
from codeparrot_ds.errors import UserError


class ConstantLengthDataset(IterableDataset):
    """Rows of exactly ``seq_length`` token ids, packed from a stream of documents.

    Fills a buffer with documents up to ``seq_length * chars_per_token * num_of_sequences`` characters, tokenizes it in
    one batch, joins the documents with the end-of-sequence token and cuts; the last partial row of each buffer is
    dropped. Every process that iterates it reads everything: training over several ranks uses
    ``codeparrot_ds.data.loader.TrainingLoader``, which drops nothing and reads each document once.

    Documents are encoded as ``tokenizer`` does it, which is the recipe's: a special token in a text is that token, and
    ``<|endoftext|>`` a border, as in runs with ``order_version`` 1 and unlike in those with 2.

    Args:
        tokenizer: a Hugging Face tokenizer with an end-of-sequence token.
        dataset: an iterable of ``{"content": str}``.
        infinite: start the data set again when it ends (a data set without documents raises a UserError); otherwise
            end after one pass.
    """

    def __init__(
        self,
        tokenizer: Any,
        dataset: Iterable[dict[str, Any]],
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        *,
        infinite: bool = True,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no eos_token, which joins the documents; set one.")
        self.tokenizer = tokenizer
        self.dataset = dataset
        self.seq_length = seq_length
        self.input_characters = seq_length * chars_per_token * num_of_sequences
        self.infinite = infinite

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields tensors of shape (seq_length,), torch.long."""
        documents = self._documents()
        while buffer := self._fill_buffer(documents):
            packer = Packer(self.seq_length, self.tokenizer.eos_token_id, "int64")
            yield from torch.from_numpy(packer.add(self.tokenizer(buffer, truncation=False)["input_ids"]).rows)

    def _documents(self) -> Iterator[str]:
        while True:
            empty = True
            for example in self.dataset:
                empty = False
                yield example["content"]
            if not self.infinite:
                return
            if empty:
                raise UserError("The data set has no documents (an iterator can be read once only; pass a data set).")

    def _fill_buffer(self, documents: Iterator[str]) -> list[str]:
        buffer: list[str] = []
        num_characters = 0
        while num_characters < self.input_characters:
            text = next(documents, None)
            if text is None:
                break
            buffer.append(text)
            num_characters += len(text)
        return buffer
