#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Which code points each regex class of tokenizer.json matches, by the Python package `tokenizers` (Oniguruma).
Writes tokenizers/classes.json: per class the runs [first, last]. With --newer FILE (lines "class code point ..." of what
PCRE2 misses, see tests/golden/test_classes.c) it prints text/pattern_newer.inc."""
import json
import os
import sys

from tokenizers import Regex, pre_tokenizers

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tokenizers")
CLASSES = [r"\p{L}", r"\p{N}", r"\p{M}", r"\p{P}", r"\p{S}", r"\p{Z}", r"\p{Lu}", r"\p{Lt}", r"\p{Lm}", r"\p{Lo}", r"\p{Ll}", r"\p{Nd}", r"\s", r"\S", r"\w", r"\W", r"\d", r"\P{L}",
           r"[^\r\n\p{L}\p{N}]", r"[^\s\p{L}\p{N}]", r"[\p{L}\p{M}]", r"[\p{P}\p{S}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\w]"]


def runs(points):
    out = []
    for c in points:
        if out and out[-1][1] == c - 1:
            out[-1][1] = c
        else:
            out.append([c, c])
    return out


def matched(pattern):
    everything = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    rest = set()
    for piece, _ in pre_tokenizers.Split(Regex(pattern), "removed").pre_tokenize_str("".join(everything)):
        rest.update(piece)
    return runs(ord(c) for c in everything if c not in rest)


def main():
    if sys.argv[1:2] == ["--newer"]:
        for line in open(sys.argv[2], encoding="utf-8"):
            name, *points = line.split()
            text = "".join(f"\\\\x{{{a:x}}}" + (f"-\\\\x{{{b:x}}}" if b > a else "") for a, b in runs(int(p, 16) for p in points))
            print(f'NEWER("{name}",\n      "{text}")')
        return
    with open(os.path.join(HERE, "classes.json"), "w", encoding="utf-8") as f:
        json.dump({c: matched(c) for c in CLASSES}, f, separators=(",", ":"))
        f.write("\n")


if __name__ == "__main__":
    main()
