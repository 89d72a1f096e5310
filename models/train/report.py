# SPDX-License-Identifier: Apache-2.0
"""What the model card states besides accuracy: expert load, index recall, accepted drafts, prose loss.

  report.py CHECKPOINT ANSWERS.json --corpus corpus.txt

ANSWERS.json comes from answers.py (float32). Recall: share of the dense attention's mass, mean of
the heads, that the 64 selected positions hold, over rows with more than 64 positions.
"""
import argparse
import json
import os
import random

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import check
import data
import model as M
import mtp
import train


def loads_and_recall(model, tok, corpus):
    batches = train.Batches(tok, corpus, "report")
    load = torch.zeros(5, M.C.n_routed_experts)
    for i in range(12):
        ids, _, doc = batches.micro(f"load {i}", {})
        with torch.no_grad():
            model.trunk(ids, doc, sparse=True)
        load += torch.stack([m.load for m in model.moes()[:5]])
    out = {"expert_load": {str(i + 1): [round(float(x), 4) for x in row / row.sum()] for i, row in enumerate(load)}}
    src = data.Source(tok, corpus, "report recall")
    recall = {}
    for T in (256, 512, 1024):
        total = torch.zeros(M.C.num_hidden_layers)
        n = 0
        for i in range(6):
            if i % 2:
                ids, _ = src.encode(src.long_doc(T * 0.9))
            else:
                ids = tok.encode("[gMASK]<sop>" + src.prose_doc(T // 30), add_special_tokens=False).ids
            ids = torch.tensor([ids[:T]])
            with torch.no_grad():
                _, ctx = model.trunk(ids, torch.zeros_like(ids), kl=True, dtype=torch.float32)
            total += torch.tensor(ctx.recall)
            n += 1
        recall[str(T)] = [round(float(x), 4) for x in total / n]
    out["index_recall"] = recall
    loss = {}
    rng = random.Random("report prose")
    for name, sparse in (("dense", False), ("sparse", True)):
        rng.seed("report prose")
        s = n = 0
        for i in range(12):
            at = rng.randrange(len(corpus) - 20)
            ids = torch.tensor([tok.encode("[gMASK]<sop>" + "\n".join(corpus[at:at + 14]),
                                           add_special_tokens=False).ids[:512]])
            with torch.no_grad():
                h, _ = model.trunk(ids, torch.zeros_like(ids), sparse=sparse, dtype=torch.float32)
                l = torch.nn.functional.cross_entropy(model.logits(h, torch.float32)[0, :-1], ids[0, 1:])
            s += float(l) * (ids.shape[1] - 1)
            n += ids.shape[1] - 1
        loss[name] = round(s / n, 4)
    out["prose_loss_512"] = loss
    return out


@torch.no_grad()
def acceptance(directory, answers, per_skill):
    model = check.hf(directory)
    head = mtp.MTP(model, directory)
    count, rounds, first, accepted = {}, 0, 0, 0
    by_skill = {}
    for a in answers:
        skill = a["id"].rsplit("-", 1)[0]
        count[skill] = count.get(skill, 0) + 1
        if count[skill] > per_skill or len(a["prompt"]) > 300 or len(a["ids"]) < 2:
            continue
        seq = torch.tensor([a["prompt"] + a["ids"]])
        hidden = model.model(seq).last_hidden_state
        n = len(a["prompt"])
        end = n + len(a["ids"])
        at = n  # tokens 0 .. at are known, the last of them just sampled
        while at + 1 < end:
            drafts, _ = head.draft(hidden[:, :at], seq[:, :at + 1], min(5, end - at - 1))
            k = 0
            while k < drafts.shape[1] and int(drafts[0, k]) == int(seq[0, at + 1 + k]):
                k += 1
            rounds, first, accepted = rounds + 1, first + (k > 0), accepted + k
            s = by_skill.setdefault(skill, [0, 0])
            s[0], s[1] = s[0] + k, s[1] + 1
            at += k + 1
    return {"drafts_per_round": 5, "rounds": rounds, "mean_accepted": round(accepted / rounds, 3),
            "first_draft_accepted": round(first / rounds, 4),
            "by_skill": {k: round(s / n, 2) for k, (s, n) in by_skill.items()}}


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("checkpoint")
    ap.add_argument("answers")
    ap.add_argument("--corpus", required=True)
    ap.add_argument("--per-skill", type=int, default=6)
    a = ap.parse_args()
    torch.set_num_threads(1)
    M.KL_ROWS = 1 << 20  # compare at every position
    tok = Tokenizer.from_file(os.path.join(a.checkpoint, "tokenizer.json"))
    model = M.Model()
    M.load_export(model, load_file(os.path.join(a.checkpoint, "model.safetensors")))
    out = loads_and_recall(model, tok, train.load_corpus(a.corpus))
    with open(a.answers) as f:
        out["mtp"] = acceptance(a.checkpoint, json.load(f)["answers"], a.per_skill)
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
