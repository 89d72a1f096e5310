# SPDX-License-Identifier: Apache-2.0
"""Goldens of a checkpoint from the unmodified transformers class (eager attention) and from mtp.py.

  make_goldens.py CHECKPOINT GOLDENS-DIRECTORY --corpus corpus.txt

Writes GOLDENS-DIRECTORY/glm-tiny (float32, with mtp.safetensors) and glm-tiny-bf16, in the format of
tests/goldens/README.md. Prompts lie below, at and far above index_topk.
"""
import argparse
import json
import os
import platform
import random

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer

import check
import data
import mtp
import probe
from data import P

STEPS = 64
NOTHING = 3e38
MODEL = "models/glm-tiny"
GAP = 1e-3
MARGIN = {"f32": 1e-4, "bf16": 4e-2}
WITH_CHOICES = {"f32": ("word3", "story", "prose-65", "field-300"), "bf16": ("word3", "story")}


def candidates(tok, corpus):
    """(name, prompt ids), several of each name, in a fixed order."""
    rng = random.Random("goldens")

    def chat(q):
        return tok.encode(f"[gMASK]<sop><|system|>Reasoning Effort: Max<|user|>{q}<|assistant|><think>",
                          add_special_tokens=False)

    def prose(n):
        ids = tok.encode("[gMASK]<sop>" + data.story(rng) + "\n" + "\n".join(
            rng.choice(corpus) for _ in range(n // 40 + 2)), add_special_tokens=False)
        return ids[:n]
    for _ in range(40):
        yield "word3", chat(P.gen_word3(rng, True)[0])
        yield "story", chat(f"Tell me a story about {rng.choice(P.NAMES)}.")
        yield "prose-64", prose(64)
        yield "prose-65", prose(65)
        yield "field-300", chat(P.gen_field(rng, True, filler=36, where=0.1)[0])
        yield "prose-1200", prose(1200)


@torch.no_grad()
def greedy(model, prompt, stop=()):
    """64 greedy ids, or up to a stop id."""
    x, past, ids, gaps = torch.tensor([prompt]), None, [], []
    while len(ids) < STEPS and not (ids and ids[-1] in stop):
        r = model(x, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = r.past_key_values
        row = r.logits[0, -1].float()
        top = row.topk(2).values
        best = int((row == top[0]).nonzero()[0, 0])  # ties to the lower id
        ids.append(best)
        gaps.append(float((top[0] - top[1]) / row.abs().max()))
        x = torch.tensor([[best]])
    return ids, gaps


def choices(pr, prefix, layers, cfg, out, limit):
    """Selections and expert choices of every row; returns how many margins are below the limit."""
    close = 0
    for i, (s, picked) in pr.index.items():
        T = s.shape[0]
        sel = torch.full((T, cfg.index_topk), -1, dtype=torch.int32)
        for t in range(T):
            at = picked[t].nonzero()[:, 0].int()
            sel[t, :len(at)] = at
        margin = pr.index_margins(cfg.index_topk)[i].clamp_max(NOTHING)
        out[f"{prefix}select.{layers[i]}"], out[f"{prefix}select_margin.{layers[i]}"] = sel, margin.float()
        close += int((margin < limit).sum())
    for i, (s, idx) in pr.experts.items():
        order = s.topk(cfg.num_experts_per_tok, -1).indices
        assert torch.equal(order.sort(-1).values, idx.sort(-1).values)
        v = s.sort(-1, descending=True).values
        k = cfg.num_experts_per_tok
        margin = (v[:, k - 1] - v[:, k]) / s.abs().amax(-1)
        out[f"{prefix}experts.{layers[i]}"], out[f"{prefix}experts_margin.{layers[i]}"] = order.int(), margin.float()
        close += int((margin < limit).sum())
    return close


def flipped(pr, theirs, cfg):
    """The largest margin of an expert choice or selection that the checkpoint in the other type makes differently."""
    worst = 0.0
    for margins, picked, also in (
            (pr.expert_margins(cfg.num_experts_per_tok), {i: x[1].sort(-1).values for i, x in pr.experts.items()},
             {i: x[1].sort(-1).values for i, x in theirs.experts.items()}),
            (pr.index_margins(cfg.index_topk), {i: x[1] for i, x in pr.index.items()},
             {i: x[1] for i, x in theirs.index.items()})):
        for i, m in margins.items():
            at = (picked[i] != also[i]).any(-1)
            worst = max([worst] + m[at].tolist())
    return worst


@torch.no_grad()
def write(model, other, head, prompts, kind, folder):
    """Goldens of model; other is the same checkpoint in the other type, for the bound of BF16 errors."""
    cfg = model.config
    tensors, extra, meta, worst, flip = {}, {}, [], 0.0, MARGIN["bf16"]
    for i, (name, prompt) in enumerate(prompts.items()):
        ids, gaps = greedy(model, prompt, cfg.eos_token_id if name.startswith("field") else ())
        n = len(prompt)
        with probe.Probe(model) as pr:
            states = model.model(torch.tensor([prompt + ids[:-1]])).last_hidden_state  # after the final norm
        logits = model.lm_head(states)[0].float()
        rows = sorted({n // 2, n - 1, n + len(ids) // 3, n + len(ids) - 2})
        with probe.Probe(other) as also:
            theirs = other(torch.tensor([prompt + ids[:-1]])).logits[0].float()
        worst = max(worst, float(((theirs - logits).abs().amax(-1) / logits.abs().amax(-1))[rows].max()))
        tensors[f"{i}.ids"] = torch.tensor(prompt + ids, dtype=torch.int32)
        tensors[f"{i}.gap"] = torch.tensor(gaps)
        tensors[f"{i}.rows"] = torch.tensor(rows, dtype=torch.int32)
        tensors[f"{i}.logits"] = logits[rows].clone()
        close, close_bf16 = 0, 0
        if name in WITH_CHOICES[kind]:
            flip = max(flip, flipped(pr, also, cfg))
            close = choices(pr, f"{i}.", list(range(cfg.num_hidden_layers)), cfg, tensors, MARGIN[kind])
            close_bf16 = sum(int((v < MARGIN["bf16"]).sum()) for k, v in tensors.items()
                             if k.startswith(f"{i}.") and "margin" in k)
        meta.append({"name": name, "n_prompt": n, "n_tokens": len(ids), "injections": close,
                     "injections_bf16": close_bf16})
        print(f"{kind} {name}: {n} ids, least gap {min(gaps):.2e}, close margins {close}")
        if kind == "f32":
            hidden = states[:, :n]
            drafts, dl = head.draft(hidden, torch.tensor([prompt + ids[:1]]), 5)
            holder = type("Model", (), {"model": type("Layers", (), {"layers": [head.block]})()})()
            with probe.Probe(holder) as pm:
                y = head(hidden, torch.tensor([prompt[1:] + ids[:1]]))
            at = [n // 2, n - 1]
            extra[f"{i}.tokens"] = torch.tensor(prompt[1:] + ids[:1], dtype=torch.int32)
            extra[f"{i}.rows"] = torch.tensor(at, dtype=torch.int32)
            extra[f"{i}.hidden"] = hidden[0, at].float()
            extra[f"{i}.logits"] = model.lm_head(y[0, at]).float()
            extra[f"{i}.drafts"] = drafts[0].int()
            top = dl[0].topk(2, -1).values
            extra[f"{i}.draft_gap"] = (top[:, 0] - top[:, 1]) / dl[0].abs().amax(-1)
            extra[f"{i}.draft_logits"] = dl[0]
            if name in WITH_CHOICES["bf16"]:
                choices(pm, f"{i}.", {0: cfg.num_hidden_layers}, cfg, extra, MARGIN[kind])
    os.makedirs(folder, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(folder, "golden.safetensors"))
    if extra:
        save_file({k: v.contiguous() for k, v in extra.items()}, os.path.join(folder, "mtp.safetensors"))
    with open(os.path.join(folder, "golden.json"), "w") as f:
        json.dump({"model": MODEL, "made_by": {"transformers": transformers.__version__, "torch": torch.__version__,
                                               "python": platform.python_version()},
                   "dtype": kind, "error_bf16": round(worst * (1.5 if kind == "f32" else 2), 4),
                   "margin_bf16": round(flip + 5e-5, 4), "prompts": meta}, f, indent=1)
        f.write("\n")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("checkpoint")
    ap.add_argument("out")
    ap.add_argument("--corpus", required=True)
    a = ap.parse_args()
    torch.set_num_threads(1)
    with open(a.corpus, encoding="utf-8") as f:
        corpus = [p for p in f.read().split("\n") if p]
    tok = AutoTokenizer.from_pretrained(a.checkpoint)
    exact, rough = check.hf(a.checkpoint, torch.float32), check.hf(a.checkpoint, torch.bfloat16)
    prompts = {}
    for name, prompt in candidates(tok, corpus):
        stop = exact.config.eos_token_id if name.startswith("field") else ()
        if name not in prompts and min(greedy(exact, prompt, stop)[1]) > GAP:
            prompts[name] = prompt
    prompts = {n: prompts[n] for n in sorted(prompts, key=lambda n: len(prompts[n]))}
    write(exact, rough, mtp.MTP(exact, a.checkpoint), prompts, "f32", os.path.join(a.out, "glm-tiny"))
    write(rough, exact, None, prompts, "bf16", os.path.join(a.out, "glm-tiny-bf16"))


if __name__ == "__main__":
    main()
