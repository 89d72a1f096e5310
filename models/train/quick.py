# SPDX-License-Identifier: Apache-2.0
"""Quick look at a checkpoint: share of problems whose canonical steps and answer are the greedy
choice at every token (teacher forcing; no generation, so a lower bound of the accuracy).

  quick.py DIRECTORY [N] [dense]
"""
import os
import random
import sys

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import data
import model as M
from data import P


def main():
    if len(sys.argv) < 2:
        sys.exit("usage: quick.py DIRECTORY [N] [dense]")
    torch.set_num_threads(1)
    d = sys.argv[1]
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 40
    here = os.path.dirname(os.path.abspath(__file__))
    tok = Tokenizer.from_file(os.path.join(here, "..", "glm-tiny", "tokenizer.json"))
    model = M.Model()
    M.load_export(model, load_file(os.path.join(d, "model.safetensors")))
    cases = [(s, t, g) for s, g in P.SKILLS.items() for t in (False, True)]
    for filler in (12, 25, 51, 102, 190):
        cases.append((f"field+{filler}", True, lambda r, t, f=filler: P.gen_field(r, t, filler=f, where=r.choice((0, .3, .6)))))
    line = {}
    for skill, test, gen in cases:
        rng = random.Random(f"quick {skill} {test}")
        rows, tokens = [], 0
        for _ in range(n if "+" not in skill else 12):
            q, steps, a = gen(rng, test)
            pre = tok.encode(f"[gMASK]<sop><|system|>Reasoning Effort: Max<|user|>{q}<|assistant|><think>",
                             add_special_tokens=False).ids
            ans = tok.encode(f"{steps}</think>{P.answer(a)}<|endoftext|>", add_special_tokens=False).ids
            rows.append((pre, ans))
        ok = 0
        size = 20 if "+" not in skill else 1
        for i in range(0, len(rows), size):
            part = rows[i:i + size]
            T = max(len(p) + len(s) for p, s in part)
            ids = torch.zeros(len(part), T, dtype=torch.long)
            doc = torch.full((len(part), T), -1)
            for r, (p, s) in enumerate(part):
                ids[r, :len(p) + len(s)] = torch.tensor(p + s)
                doc[r, :len(p) + len(s)] = 0
            with torch.no_grad():
                h, _ = model.trunk(ids, doc, sparse="dense" not in sys.argv)
            for r, (p, s) in enumerate(part):
                got = model.logits(h[r, len(p) - 1:len(p) + len(s) - 1]).argmax(-1)
                ok += got.tolist() == s
        line[(skill, test)] = 100 * ok // len(rows)
    print("  ".join(f"{s} {line[(s, False)]}/{line[(s, True)]}" for s in P.SKILLS))
    print("  ".join(f"{s} {v}" for (s, t), v in line.items() if "+" in s))


if __name__ == "__main__":
    main()
