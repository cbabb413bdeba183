import numpy as np
import pytest

from codeparrot_ds.data.packing import Packer


@pytest.mark.parametrize("seq_length", [1, 2, 7, 100])
def test_rows_are_the_joined_documents_cut(seq_length: int) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 60_000, size=size).tolist() for size in [0, 5, 1, 7, 13, 0, 0, 6, 30]]
    joined = [token for document in documents for token in [*document, 0]]
    packer = Packer(seq_length, 0, np.uint16)
    rows = []
    seen = 0
    for document in documents:
        for row, taken in packer.add(document):
            assert row.dtype == np.uint16
            rows.append(row)
            # The row ends where the number of the document's tokens says.
            assert len(rows) * seq_length == seen + taken
        seen += len(document) + 1
    num_rows = len(joined) // seq_length
    assert np.array_equal(np.array(rows).ravel(), joined[: num_rows * seq_length])
    assert packer.remainder.tolist() == joined[num_rows * seq_length :]


def test_a_document_goes_on_where_a_row_ended() -> None:
    ids = np.arange(1, 24)
    whole = list(Packer(5, 0, np.int32).add(ids))
    for place, (_, taken) in enumerate(whole):
        rest = list(Packer(5, 0, np.int32).add(ids, start=taken))
        assert [(row.tolist(), end) for row, end in rest] == [(row.tolist(), end) for row, end in whole[place + 1 :]]
