"""Loss by position and class of token, and accuracy, against counting token by token."""

import numpy as np
import pytest
import torch

from codeparrot_ds.data.encoder import load_encoder
from codeparrot_ds.data.shards import find_shards
from codeparrot_ds.data.validation import ValidationLoader
from codeparrot_ds.evaluation.details import TOKEN_CLASSES, Details, TokenClasses
from codeparrot_ds.evaluation.models import load_model
from codeparrot_ds.evaluation.perplexity import evaluate_batches, evaluate_model, token_losses, token_ranks

SOURCE = (
    b'def f(x, s="a b"):\n    """Doc\n    more."""\n    # note it\n    return x[0x1f] + 1.5e-3 or None  # end\n'
    b"@deco\nclass A:\n\tpass\n"
)
# Whole words and signs, as GPT-2's pattern cuts them, each with its class.
EXPECTED = [
    ("def", "keyword"), (" f", "identifier"), ("(", "operator"), ("x", "identifier"), (",", "operator"),
    (" s", "identifier"), ("=", "operator"), ('"', "literal"), ("a", "literal"), (" b", "literal"), ('"', "literal"),
    ("):", "operator"), ("\n   ", "indentation"), (' """', "literal"), ("Doc", "literal"), ("\n   ", "literal"),
    (" more", "literal"), ('."""', "literal"), ("\n   ", "indentation"), (" #", "comment"), (" note", "comment"),
    (" it", "comment"), ("\n   ", "indentation"), (" return", "keyword"), (" x", "identifier"), ("[", "operator"),
    ("0", "literal"), ("x1f", "literal"), ("]", "operator"), (" +", "operator"), (" 1", "literal"), (".", "literal"),
    ("5e", "literal"), ("-", "literal"), ("3", "literal"), (" or", "keyword"), (" None", "keyword"), (" ", "other"),
    (" #", "comment"), (" end", "comment"), ("\n", "indentation"), ("@", "operator"), ("deco", "identifier"),
    ("\n", "indentation"), ("class", "keyword"), (" A", "identifier"), (":", "operator"), ("\n", "indentation"),
    ("\t", "indentation"), ("pass", "keyword"), ("\n", "indentation"),
]  # fmt: skip


def test_tokens_of_source_have_the_classes_of_python():
    pieces = [text.encode() for text, _ in EXPECTED]
    assert b"".join(pieces) == SOURCE
    classes = TokenClasses([b"", *pieces], eos_token_id=0)
    ids = np.array([*range(1, len(pieces) + 1), 0, 1, 2])  # the end of a text, and the beginning of another
    found = [TOKEN_CLASSES[number] for number in classes.classify(ids)]
    assert found == [name for _, name in EXPECTED] + ["other", "keyword", "identifier"]
    assert set(found) == set(TOKEN_CLASSES)


@pytest.mark.parametrize(
    "text", [b"'never closed\nx = 1", b'"""open', b"\xff\xfe\x00 \xc3", b"'\\", b"1.2.3e", b"\r\n \r"]
)
def test_no_text_is_too_odd_to_classify(text):
    classes = TokenClasses([b"", *(bytes([byte]) for byte in range(256))], eos_token_id=0)
    found = classes.classify(np.array([byte + 1 for byte in text]))
    assert len(found) == len(text) and found.max() < len(TOKEN_CLASSES)


def test_figures_are_those_of_counting_one_by_one(model_folder, corpus_folder):
    model, _ = load_model(model_folder)
    encoder = load_encoder(model_folder)
    shards = find_shards(corpus_folder, "validation")
    classes = TokenClasses(encoder.bytes_of_tokens(), encoder.eos_token_id)
    by_position, by_class, everything = {}, {}, []
    for input_ids, labels in ValidationLoader(shards, encoder, seq_length=64, num_lanes=2, batch_size=3):
        with torch.no_grad():
            scores = model(input_ids).logits.log_softmax(-1)
        for row, ids in enumerate(input_ids.tolist()):
            kinds = classes.classify(input_ids[row].numpy())
            for place in range(1, 64):
                if labels[row, place] == -100:
                    continue
                score = scores[row, place - 1]
                figures = (-score[ids[place]].item(), ids[place] in score.topk(1)[1], ids[place] in score.topk(5)[1])
                by_position.setdefault(place.bit_length() - 1, []).append(figures)
                by_class.setdefault(TOKEN_CLASSES[kinds[place]], []).append(figures)
                everything.append(figures)
    result = evaluate_model(model_folder, data=corpus_folder, seq_length=64, num_lanes=2, batch_size=5)
    assert (result["top_1_accuracy"], result["top_5_accuracy"]) == pytest.approx(np.mean(everything, axis=0)[1:])
    assert [(row["first"], row["last"]) for row in result["loss_by_position"]] == [
        (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 63),
    ]  # fmt: skip
    assert set(result["loss_by_class"]) == set(by_class) > {"keyword", "identifier", "comment", "indentation"}
    pairs = [(row, by_position[power]) for power, row in enumerate(result["loss_by_position"])]
    pairs += [(result["loss_by_class"][name], rows) for name, rows in by_class.items()]
    for row, expected in pairs:
        assert row["tokens"] == len(expected)
        assert (row["loss"], row["top_1"], row["top_5"]) == pytest.approx(np.mean(expected, axis=0), abs=1e-5)
    tokens = sum(row["tokens"] for row in result["loss_by_class"].values())
    assert tokens == sum(row["tokens"] for row in result["loss_by_position"]) == result["eval_tokens"]


def test_ranks_add_their_details_and_ranks_of_tokens_count_the_more_probable():
    logits = torch.tensor([[[0.0, 3.0, 1.0, 2.0]] * 3])
    ids = torch.tensor([[0, 3, 1]])
    assert token_ranks(logits, ids)[0, :2].tolist() == [1, 0]
    details = Details(3, None, "cpu")

    def loss_fn(input_ids, labels):
        losses = token_losses(logits, labels)
        details.add(input_ids, torch.tensor([[True, True, False]]), losses, token_ranks(logits, labels))
        return losses

    def two_alike(tensor):
        tensor *= 2

    result = evaluate_batches(
        loss_fn, iter([(ids, ids)]), reduce=lambda t: two_alike(t) if t.numel() > 1 else t, details=details
    )
    figures = details.result()
    assert result.eval_tokens == 4 and sum(row["tokens"] for row in figures["loss_by_position"]) == 4
    assert (figures["top_1_accuracy"], figures["top_5_accuracy"]) == (0.5, 1.0)
    assert figures["loss_by_class"] is None
