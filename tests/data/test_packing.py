import numpy as np
import pytest

from codeparrot_ds.data.packing import Packer

SIZES = [0, 5, 1, 7, 13, 0, 0, 6, 30]


@pytest.mark.parametrize("seq_length", [1, 2, 7, 100])
@pytest.mark.parametrize("group", [1, 2, 4, 9])
def test_rows_are_the_joined_documents_cut(seq_length: int, group: int) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 60_000, size=size).astype(np.uint32) for size in SIZES]
    joined = [token for document in documents for token in [*document.tolist(), 0]]
    packer = Packer(seq_length, 0, np.uint16)
    rows: list[list[int]] = []
    for start in range(0, len(documents), group):
        some = documents[start : start + group]
        ends = np.cumsum([0, *(len(document) + 1 for document in documents)])
        packed = packer.add(some)
        assert packed.rows.dtype == np.uint16 and packed.rows.shape[1] == seq_length
        for row, finished, taken in zip(*packed, strict=True):
            rows.append(row.tolist())
            # The row ends where it says: so many documents of the group, and so many tokens of the next.
            assert len(rows) * seq_length == ends[start + finished] + taken
            assert start + finished == len(documents) or taken < len(documents[start + finished]) + 1
    num_rows = len(joined) // seq_length
    assert [token for row in rows for token in row] == joined[: num_rows * seq_length]
    assert packer.remainder.tolist() == joined[num_rows * seq_length :]


def test_nothing_is_packed_of_nothing() -> None:
    packer = Packer(5, 0, np.int32)
    packer.add([[1, 2]])
    packed = packer.add([])
    assert packed.rows.shape == (0, 5) and packer.remainder.tolist() == [1, 2, 0]
