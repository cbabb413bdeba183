import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from codeparrot_ds.data.encoder import Encoder, estimate_chars_per_token, load_encoder
from codeparrot_ds.errors import UserError
from tests.data.conftest import EOS, make_documents


def test_ids_are_the_tokenizers(tokenizer_dir: Path, encoder: Encoder) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    texts = [*make_documents(20), "", "😀 naïve\x00"]
    for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
        assert ids.dtype == np.uint16
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
    assert encoder.vocab_size == 320
    assert encoder.eos_token_id == tokenizer.token_to_id(EOS)
    data = (tokenizer_dir / "tokenizer.json").read_bytes()
    assert encoder.fingerprint == hashlib.sha256(data).hexdigest()


def test_decoding_keeps_special_tokens(encoder: Encoder) -> None:
    [ids] = encoder.encode_batch(["naïve = 1\n"])
    assert encoder.decode([*ids, encoder.eos_token_id]) == f"naïve = 1\n{EOS}"


def test_token_bytes_add_up_to_the_text(encoder: Encoder) -> None:
    sizes = encoder.token_bytes()
    assert sizes is not None and sizes.shape == (encoder.vocab_size,)
    for text in [*make_documents(20), "😀 naïve\x00\u2028"]:
        [ids] = encoder.encode_batch([text])
        assert sizes[ids].sum() == len(text.encode())
    assert sizes[encoder.eos_token_id] == 0


def test_token_bytes_need_a_byte_level_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({EOS: 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_encoder(tmp_path).token_bytes() is None


@pytest.mark.parametrize("eos_token", ["Ċ", {"content": "Ċ", "special": True}])
def test_the_config_names_the_eos_token(tokenizer_dir: Path, tmp_path: Path, eos_token: object) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    assert load_encoder(tmp_path).eos_token_id == load_encoder(tokenizer_dir).eos_token_id  # the usual one
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos_token}))
    newline = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("Ċ")
    assert load_encoder(tmp_path).eos_token_id == newline


def test_long_vocabularies_get_wider_ids(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({EOS: 0, "far": 70_000}, unk_token=EOS)).save(str(tmp_path / "tokenizer.json"))
    encoder = load_encoder(tmp_path)
    assert encoder.vocab_size == 70_001
    assert encoder.encode_batch(["far"])[0].tolist() == [70_000]


def test_what_is_missing_is_named(tokenizer_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; make one with"):
        load_encoder(tmp_path / "missing")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a tokenizer"):
        load_encoder(tmp_path)
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match="no end-of-sequence token '</s>'"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not a JSON object"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}))
    (tmp_path / "special_tokens_map.json").write_text("[]")  # an export needs it, hours later
    with pytest.raises(UserError, match=r"special_tokens_map\.json is not a JSON object"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("token", "token_id", "message"),
    [
        ("a", 2**31, r"tokenizer\.json has the token id 2,147,483,648; the highest can be 16,777,215\.$"),
        (
            EOS,
            5,
            rf"tokenizer\.json has one id for '{re.escape(EOS)}', its end-of-sequence token, and '.'; save it again\.$",
        ),
    ],
)
def test_ids_that_cannot_be_are_refused_before_memory_is_taken(
    tokenizer_dir: Path, tmp_path: Path, token: str, token_id: int, message: str
) -> None:
    description = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    description["added_tokens"] = []
    description["model"]["vocab"][token] = token_id
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    for _ in range(10):  # which of two tokens the library's list of ids keeps is chance, anew in each load
        with pytest.raises(UserError, match=message):
            load_encoder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"continuing_subword_prefix": "x" * 99},
        {"continuing_subword_prefix": "\0"},  # which would end the process, inside a letter of two bytes
        {"merges": [["line\nline", "x"]]},
        {"merges": [["1", "2"]]},
    ],
)
def test_what_the_library_makes_of_damage_is_a_sentence(tokenizer_dir: Path, tmp_path: Path, change: object) -> None:
    """Also where it panics, or finds the damage only when special tokens are taken out."""
    description = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    description["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(
        UserError, match=r"tokenizer\.json is not a tokenizer that the tokenizers library can read: ..*\.$"
    ):
        load_encoder(tmp_path).encode_batch(["x"])


def test_chars_per_token_as_in_the_recipe(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    texts = make_documents(30)
    characters = sum(len(text) for text in texts[:20])
    tokens = sum(len(tokenizer(text).tokens()) for text in texts[:20])
    dataset = ({"content": text} for text in texts)
    assert estimate_chars_per_token(dataset, tokenizer, num_documents=20) == characters / tokens
    with pytest.raises(UserError, match="no text"):
        estimate_chars_per_token([], tokenizer)


def with_special_tokens(tokenizer: Tokenizer, folder: Path) -> Encoder:
    """A tokenizer with three special tokens, of which one is no word of the model's, and an added one that is text."""
    tokenizer.add_special_tokens([EOS, "<pad>", "<|new|>"])
    tokenizer.add_tokens(["own word"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_encoder(folder)


WORDS = [EOS, "<pad>", "[UNK]", "a", "b", "<", "|", ">"]


@pytest.mark.parametrize("kind", ["byte-level", "words", "pieces", "merges that are not needed"])
def test_a_special_token_in_a_text_is_text(tokenizer_dir: Path, tmp_path: Path, kind: str) -> None:
    if kind == "byte-level":
        tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    elif kind == "words":
        tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "pieces":
        tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in WORDS], unk_id=2))
    else:
        tokenizer = Tokenizer(
            models.BPE({word: n for n, word in enumerate(WORDS)}, [], unk_token="[UNK]", ignore_merges=True)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = with_special_tokens(tokenizer, tmp_path)
    special = {tokenizer.token_to_id(token) for token in (EOS, "<pad>", "<|new|>")}
    own = tokenizer.token_to_id("own word")
    texts = [EOS, f"a {EOS} b", f"a{EOS}b<pad>", "<|new|> a", f"{EOS}{EOS}"]
    for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
        assert special.isdisjoint(ids.tolist()), text
        assert kind != "byte-level" or encoder.decode(ids) == text
    assert own in encoder.encode_batch(["a own word b"])[0].tolist()
    assert encoder.decode([encoder.eos_token_id]) == EOS
    for text, ids in zip(texts, encoder.in_version_1().encode_batch(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids
        assert not special.isdisjoint(ids.tolist())


def test_gigatoken_takes_a_special_token_for_text_as_well(tokenizer_dir: Path, tmp_path: Path) -> None:
    encoder = with_special_tokens(Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")), tmp_path)
    texts = [*make_documents(20), f"x = 1 {EOS}\n", f"{EOS}{EOS}<pad><|new|>", "own word"]
    expected = [ids.tolist() for ids in encoder.encode_batch(texts)]
    assert encoder.prove_fast_encoding([]) is None and encoder.name == "gigatoken"
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == expected
