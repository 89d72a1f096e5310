# SPDX-License-Identifier: Apache-2.0
"""Train tokenizer.json: byte-level BPE, 3,072 entries, GLM's split pattern and special tokens.

  tokenizer.py corpus.txt OUT-DIRECTORY

Digits are taken out of the text in which pairs are counted, so no entry joins digits.
"""
import json
import os
import random
import re
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data
from data import P

PATTERN = (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SIZE = 3072


def texts(corpus):
    rng = random.Random("tokenizer")
    names = sorted({w for t in (P.NAMES, P.THINGS, P.PLACES, P.WORDS, P.CITIES, P.FIELD_NAMES, P.DAYS, P.MONTHS,
                                *P.FIELDS.values(), P.CAPITALS, P.CAPITALS.values(), P.OPPOSITES,
                                P.OPPOSITES.values(), P.YOUNG.values(), P.SOUNDS.values()) for w in t})
    for _ in range(400):
        yield " " + " ".join(names)
    for _ in range(500):
        yield "\n".join(P.NAMES + P.CITIES)
    for _ in range(30000):
        kind = rng.choice(list(data.MIX))
        text = "".join(t for t, _ in data.chat(rng, kind))
        for s in data.SPECIALS:
            text = text.replace(s, "\n")
        yield re.sub(r"\d+", "", text)
    for p in corpus:
        yield re.sub(r"\d+", "", p)


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: tokenizer.py corpus.txt OUT-DIRECTORY")
    with open(sys.argv[1], encoding="utf-8") as f:
        corpus = f.read().split("\n")
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts(corpus), trainers.BpeTrainer(
        vocab_size=SIZE - len(data.SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    assert tok.get_vocab_size() == SIZE - len(data.SPECIALS), tok.get_vocab_size()
    for s in data.SPECIALS:
        tok.add_tokens([AddedToken(s, special=s not in data.PLAIN_TAGS, normalized=False)])
    assert [tok.token_to_id(s) for s in data.SPECIALS] == list(range(SIZE - len(data.SPECIALS), SIZE))
    assert not [t for t in tok.get_vocab() if len(t) > 1 and any(c.isdigit() for c in t)]
    out = sys.argv[2]
    tok.save(os.path.join(out, "tokenizer.json"))
    with open(os.path.join(out, "tokenizer_config.json"), "w") as f:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048,
                   "clean_up_tokenization_spaces": False, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
                   "additional_special_tokens": [s for s in data.SPECIALS if s not in data.PLAIN_TAGS]}, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main()
