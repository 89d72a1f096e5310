#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tokenizer goldens: small tokenizer.json files in the shapes of known models, and what the Python package `tokenizers`
makes of a multilingual corpus and of random texts with them. Run from anywhere; writes beside itself."""
import json
import os
import random
import unicodedata

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizers")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")
GLM = (r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
       r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+")
DEEPSEEK = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
         r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def corpus():
    lines = open(os.path.join(HERE, "corpus.txt"), encoding="utf-8").read().split("\n")[:-1]
    return [s.replace("\\n", "\n").replace("\\t", "\t") for s in lines]


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(**kw):
    kw.setdefault("add_prefix_space", False)
    return pre_tokenizers.ByteLevel(**kw)


def special(text, **kw):
    return AddedToken(text, special=True, normalized=False, **kw)


def train(pretok, normalizer=None, size=640, ignore_merges=False):
    tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tok.pre_tokenizer = pretok
    tok.decoder = decoders.ByteLevel()
    if normalizer:
        tok.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(corpus(), trainer)
    return tok


def make():
    seq = pre_tokenizers.Sequence
    glm = train(seq([split(GLM), byte_level(use_regex=False)]), ignore_merges=True)
    glm.add_special_tokens([special(t) for t in ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>")])
    glm.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    glm.post_processor = processors.ByteLevel(trim_offsets=False)
    yield "glm", glm

    llama = train(seq([split(LLAMA3), byte_level(use_regex=False)]), ignore_merges=True)
    llama.add_special_tokens([special("<|begin_of_text|>"), special("<|end_of_text|>"), special("<|user|>")])
    bos = llama.token_to_id("<|begin_of_text|>")
    llama.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B",
                                      special_tokens=[("<|begin_of_text|>", bos)])])
    yield "llama3", llama

    qwen = train(seq([split(QWEN), byte_level(use_regex=False)]), normalizers.NFC())
    qwen.add_special_tokens([special("<|endoftext|>"), special("<|user|>"), special("<|assistant|>")])
    qwen.add_tokens([AddedToken("<think>"), AddedToken("</think>", normalized=False), AddedToken("\u1e9b\u0323"), AddedToken("e\u0301")])
    yield "qwen", qwen

    gpt2 = train(byte_level())
    gpt2.add_special_tokens([special("<|endoftext|>")])
    yield "gpt2", gpt2

    spaced = train(byte_level(add_prefix_space=True), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    spaced.add_special_tokens([special("<mask>", lstrip=True), special("<pad>", rstrip=True), special("<both>", lstrip=True, rstrip=True)])
    spaced.add_tokens([AddedToken("<user>", single_word=True), AddedToken("llama", single_word=True), AddedToken("Hello"),
                       AddedToken("de", normalized=False), AddedToken("def", normalized=False), AddedToken("Fu\u00df", single_word=True, rstrip=True)])
    eos = spaced.token_to_id("<pad>")
    spaced.post_processor = processors.TemplateProcessing(single="$A <pad>", special_tokens=[("<pad>", eos)])
    yield "spaced", spaced

    deepseek = train(seq([split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), split(DEEPSEEK), byte_level(use_regex=False)]))
    deepseek.add_special_tokens([special("<\uff5cbegin\u2581of\u2581sentence\uff5c>"), special("<\uff5cUser\uff5c>")])
    yield "deepseek", deepseek

    yield "o200k", train(seq([split(O200K), byte_level(use_regex=False)]))

    behaviors = train(seq([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.Split("e", "merged_with_previous"),
                           split(r"\s+", "merged_with_next"), split("[,;.]", "removed"), split(r"\w+", "contiguous", True),
                           byte_level(use_regex=False, add_prefix_space=True)]),
                      normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Replace(Regex(r"\d+x"), "#"),
                                            normalizers.Replace("--", "\u2014"), normalizers.Strip(True, True), normalizers.Prepend("_")]))
    behaviors.add_tokens([AddedToken("--"), AddedToken("\u00e9\u00e9", normalized=True), AddedToken("ij", normalized=False)])
    yield "behaviors", behaviors


def texts():
    out = corpus() + ["\n".join(corpus()), "", " ", "\n", "\x00", "\x00a\x01b\x7f\u0085c\u009fd", " \n \r\n\t x\r\r\n", "a" * 300, " " * 300, "\u2029\u2028 \u180e x",
                      "\n" * 40 + " " * 40 + "\n x", "\U0001F600" * 60, "ab" * 100 + "1" * 50, "e\u0301" * 30, "\u0301\u0301", "Hello  <mask>  <pad>  <both>  <mask><pad> x",
                      " <both><both> \t<user>x <user> _<user> <user>\u00e9 llama llamas Hello hello defde Fu\u00df  Fu\u00dfx FUSS",
                      "<|user|><|endoftext|><|begin_of_text|>x<|end_of_text|>[gMASK]<sop><sop", "<\uff5cbegin\u2581of\u2581sentence\uff5c><\uff5cUser\uff5c>hi",
                      "--a--b---c e\u0301 \u00e9\u00e9 12x3x ij", "<think><think\u00e9></think></think"]
    rnd = random.Random(20240601)
    pool = "".join(corpus())
    parts = ["<think>", "<|user|>", "<mask>", "<pad>", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "12", "--", "e\u0301", "llama", "de", "def", "<both>", "ij", "\u00a0", "_"]
    for _ in range(150):
        out.append("".join(rnd.choice(parts) if rnd.random() < 0.4 else rnd.choice(pool) for _ in range(rnd.randint(1, 40))))
    for _ in range(90):  # any character, assigned or not
        out.append("".join(chr(c) for c in (rnd.choice((rnd.randrange(0x250), rnd.randrange(0x3000), rnd.randrange(0x10000), rnd.randrange(0x20000)))
                                            for _ in range(25)) if unicodedata.category(chr(c)) != "Cs"))
    return out


def main():
    rnd = random.Random(7)
    all_texts = texts()
    with open(os.path.join(HERE, "texts.json"), "w", encoding="utf-8") as f:
        json.dump(all_texts, f, ensure_ascii=False, indent=0)
    for name, tok in make():
        os.makedirs(os.path.join(HERE, name), exist_ok=True)
        tok.save(os.path.join(HERE, name, "tokenizer.json"), pretty=name in ("glm", "gpt2"))
        tok = Tokenizer.from_file(os.path.join(HERE, name, "tokenizer.json"))
        cases = {"tokenizers": tokenizers.__version__, "ids": [], "special": [], "plain": {}, "decode": []}
        for i, text in enumerate(all_texts):
            cases["ids"].append(tok.encode(text, add_special_tokens=False).ids)
            cases["special"].append(len(tok.encode(text, add_special_tokens=True).ids))
        cases["around"] = tok.encode("x", add_special_tokens=True).ids
        tok.encode_special_tokens = True
        for i, text in enumerate(all_texts):
            ids = tok.encode(text, add_special_tokens=False).ids
            if ids != cases["ids"][i]:
                cases["plain"][str(i)] = ids
        tok.encode_special_tokens = False
        size = tok.get_vocab_size()
        for n in [1] * 40 + [12] * 60:
            ids = [rnd.randrange(size) for _ in range(n)]
            cases["decode"].append([ids, tok.decode(ids, skip_special_tokens=False), tok.decode(ids, skip_special_tokens=True)])
        with open(os.path.join(HERE, name, "cases.json"), "w", encoding="utf-8") as f:
            json.dump(cases, f, ensure_ascii=False, separators=(",", ":"))
            f.write("\n")
        print(name, size, "tokens")


if __name__ == "__main__":
    main()
