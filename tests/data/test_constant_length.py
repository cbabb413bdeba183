from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from codeparrot_ds.data.constant_length import ConstantLengthDataset
from codeparrot_ds.errors import UserError
from tests.data.conftest import EOS, make_documents


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


def recipe_rows(
    tokenizer: Any, dataset: Any, seq_length: int, num_of_sequences: int, chars_per_token: float, infinite: bool
) -> Any:
    """The algorithm as the book tells it, transcribed without the project's packing."""
    iterator = iter(dataset)
    more_examples = True
    while more_examples:
        buffer, buffer_length = [], 0
        while buffer_length < seq_length * chars_per_token * num_of_sequences:
            try:
                text = next(iterator)["content"]
            except StopIteration:
                if not infinite:
                    more_examples = False
                    break
                iterator = iter(dataset)
            else:
                buffer.append(text)
                buffer_length += len(text)
        if not buffer:
            return  # the book's tokenizer took an empty batch, today's raises
        all_token_ids: list[int] = []
        for ids in tokenizer(buffer, truncation=False)["input_ids"]:
            all_token_ids += [*ids, tokenizer.eos_token_id]
        for start in range(0, len(all_token_ids), seq_length):
            row = all_token_ids[start : start + seq_length]
            if len(row) == seq_length:
                yield row


@pytest.mark.parametrize(
    ("seq_length", "num_of_sequences", "chars_per_token"), [(16, 4, 3.6), (64, 10, 2.5), (7, 1, 1)]
)
@pytest.mark.parametrize("infinite", [True, False])
def test_rows_are_the_recipes(
    tokenizer: Any, seq_length: int, num_of_sequences: int, chars_per_token: float, infinite: bool
) -> None:
    # Special tokens and byte order marks are what the recipe's tokenizer makes of them, as in ``order_version`` 1.
    marked = [f"a = 1 {EOS} b = 2\n", "\ufeffx = 1\n"]
    documents = [{"content": text} for text in make_documents(50) + marked]
    dataset = ConstantLengthDataset(
        tokenizer, documents, seq_length, num_of_sequences, chars_per_token, infinite=infinite
    )
    expected = recipe_rows(tokenizer, documents, seq_length, num_of_sequences, chars_per_token, infinite)
    limit = 3000 if infinite else None  # several passes over the documents
    rows, expected_rows = list(islice(dataset, limit)), list(islice(expected, limit))
    assert all(row.dtype == torch.long and row.shape == (seq_length,) for row in rows)
    assert len(rows) == len(expected_rows) > 20
    assert [row.tolist() for row in rows] == expected_rows


def test_the_recipes_example(tokenizer: Any) -> None:
    dataset = ConstantLengthDataset(tokenizer, [{"content": "x = 1\n" * 500}], num_of_sequences=10)
    assert dataset.input_characters == 36_864
    assert [len(row) for row in islice(dataset, 20)] == [1024] * 20


def test_defaults_repeat_for_ever(tokenizer: Any) -> None:
    dataset = ConstantLengthDataset(tokenizer, [{"content": "x = 1\n"}], seq_length=8, num_of_sequences=2)
    assert len(list(islice(dataset, 100))) == 100


def test_an_empty_data_set_raises(tokenizer: Any) -> None:
    assert list(ConstantLengthDataset(tokenizer, [], infinite=False)) == []
    with pytest.raises(UserError, match="no documents"):
        next(iter(ConstantLengthDataset(tokenizer, [])))
    with pytest.raises(UserError, match="iterator can be read once only"):
        list(ConstantLengthDataset(tokenizer, iter([{"content": "x"}])))
