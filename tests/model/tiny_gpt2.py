"""A GPT-2 of some thousand parameters, and rows for it."""

import dataclasses

import torch

from codeparrot_ds.model.gpt2 import build_model
from codeparrot_ds.model.shapes import GPT2Shape

TINY = GPT2Shape(n_layer=3, n_embd=64, n_head=4, vocab_size=300, n_positions=48)
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False, n_inner=100)
EOS = 7


def build(shape=TINY, seed=1, **kwargs):
    return build_model(shape, eos_token_id=EOS, seed=seed, **kwargs)


def rows(batch=3, tokens=33, vocab_size=300, seed=0):
    return torch.randint(vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(seed))
