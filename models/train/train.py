# SPDX-License-Identifier: Apache-2.0
"""Train glm-tiny.

  train.py --run DIR --tokenizer tokenizer.json --corpus corpus.txt [--ranks 2] [--recipe recipe.json]

Stages and their lengths stand in the recipe. DIR holds the state (resumed when present) and log.txt.
Every rank is one process with one thread; each optimizer step is a fixed list of micro-batches, of
which a rank takes every second one. Documents and random choices depend on the seed, the step and the
number of the micro-batch only, and sums have a fixed order: the same machine, libraries and number of
ranks give the same weights to the bit, interrupted or not.
"""
import argparse
import json
import math
import os
import random
import sys
import time

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

import check
import data
import model as M

MICRO = 2048  # tokens of one micro-batch


def load_corpus(path):
    with open(path, encoding="utf-8") as f:
        return [p for p in f.read().split("\n") if p]


class Batches:
    """Packed micro-batches: rows of T tokens that hold whole documents."""

    def __init__(self, tok, corpus, seed):
        self.tok, self.corpus, self.seed = tok, corpus, seed
        self.short = {}
        for tens in (False, True):
            probe = data.Source(tok, corpus, f"{seed} probe", tens=tens)
            sizes = [len(probe.next()[0]) for _ in range(1500)]
            self.short[tens] = sum(n for n in sizes if n <= 128) / sum(sizes)

    def micro(self, name, stage):
        rng = random.Random(f"{self.seed} {name}")
        tens = stage.get("tens", False)
        src = data.Source(self.tok, self.corpus, f"{self.seed} {name} doc", prose=stage.get("prose", 0.08),
                          stories=stage.get("stories", 0.03),
                          drills=stage.get("drills", 0.0), hard=stage.get("hard", 0.0), tens=tens)
        long = rng.random() < stage.get("long_share", 0)
        if long:
            T = rng.choice(stage["lengths"])
            low, high = 0, T
        elif rng.random() < 1 - (1 - self.short[tens]) / 0.7:
            T, low, high = 128, 0, 128
        else:  # one document above 128 a row, filled up with any
            T, low, high = 256, 129, 256
        rows = max(1, MICRO // T)
        free = [T] * rows
        packed = [[] for _ in range(rows)]
        misses = 0
        first = rows if long else 0
        while misses < 24:
            if T == 256 and all(packed):
                low = 0
            if first:
                first -= 1
                ids, w = src.encode(src.long_doc(T * rng.uniform(0.55, 0.85)))
                w = [x * stage.get("long_weight", 1) for x in w]  # few of its tokens count
            else:
                ids, w = src.next()
                if not long and not low <= len(ids) <= high:
                    continue
            fits = [r for r in range(rows) if free[r] >= len(ids)]
            if not fits:
                misses += 1
                continue
            r = max(fits, key=lambda i: free[i]) if long else min(fits, key=lambda i: free[i])
            packed[r].append((ids, w))
            free[r] -= len(ids)
            if sum(free) < 30:
                break
        ids = torch.zeros(rows, T, dtype=torch.long)
        weight = torch.zeros(rows, T)
        doc = torch.full((rows, T), -1, dtype=torch.long)
        for r, docs in enumerate(packed):
            at = 0
            for n, (i, w) in enumerate(docs):
                ids[r, at:at + len(i)] = torch.tensor(i)
                weight[r, at:at + len(i)] = torch.tensor(w, dtype=torch.float)
                doc[r, at:at + len(i)] = n
                at += len(i)
        return ids, weight, doc


class CrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies; float32 softmax, computed once."""

    @staticmethod
    def forward(ctx, logits, target, weight):
        p = logits.float().softmax(-1)
        ctx.save_for_backward(p, target, weight)
        ctx.dtype = logits.dtype
        return -(p.gather(1, target[:, None])[:, 0].clamp_min(1e-30).log() * weight).sum()

    @staticmethod
    def backward(ctx, g):
        p, target, weight = ctx.saved_tensors
        p[torch.arange(p.shape[0]), target] -= 1
        return p.mul_(weight[:, None] * g).to(ctx.dtype), None, None


def lm_loss(model, hidden, ids, weight, doc, shift=1, count=True):
    """Summed cross-entropy of the tokens shift places on, within documents; the summed weights; and with
    count, how many of the fully weighted tokens are the likeliest."""
    n = hidden.shape[1]
    n = min(n, ids.shape[1] - shift)
    w = weight[:, shift:shift + n] * (doc[:, :n] == doc[:, shift:shift + n])
    at = w.flatten().nonzero()[:, 0]
    at = torch.cat([at, at.new_zeros(-len(at) % 128)])  # few different shapes
    w = w.flatten().clone()
    w[0] = 0  # the first token of a row is never a target
    h = hidden[:, :n].reshape(-1, hidden.shape[-1])[at]
    target = ids[:, shift:shift + n].flatten()[at]
    w = w[at]
    logits = h.to(torch.bfloat16) @ model.head.T.to(torch.bfloat16)
    loss = CrossEntropy.apply(logits, target, w)
    if not count:
        return loss, w.sum(), torch.tensor(0), torch.tensor(0)
    hits = ((logits.detach().argmax(-1) == target) * (w >= 1)).sum()
    return loss, w.sum(), hits, (w >= 1).sum()


def orthogonal(g):
    """Newton-Schulz iteration of Muon on a stack of matrices."""
    x = g.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.transpose(-1, -2)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(5):
        a = x @ x.transpose(-1, -2)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.transpose(-1, -2) if tall else x).contiguous()


class Optimizer:
    """Muon for the matrices, AdamW for embeddings, head, router and vectors."""

    def __init__(self, named):
        self.muon, self.adam = {}, []
        for name, p in named:
            if p.ndim >= 2 and not any(s in name for s in ("embed", "head", "router", "weights_proj")):
                shape = tuple(p.shape)
                if "gate_up" in name:
                    shape = (-1, p.shape[-2] // 2, p.shape[-1])
                view = p.data.view(-1, *shape[-2:])
                self.muon.setdefault(tuple(view.shape[-2:]), []).append((p, view.shape))
            else:
                self.adam.append(p)
        self.state = {"step": 0, "mu": {}, "m": [torch.zeros_like(p) for p in self.adam],
                      "v": [torch.zeros_like(p) for p in self.adam]}

    @torch.no_grad()
    def step(self, muon_lr, adam_lr, momentum=0.95, betas=(0.9, 0.98)):
        st = self.state
        st["step"] += 1
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        sent = [[] for _ in range(ranks)]  # every rank turns a share of the matrices into updates
        for shape, group in self.muon.items():
            g = torch.cat([p.grad.view(s) for p, s in group])
            buf = st["mu"].get(shape)
            if buf is None:
                buf = st["mu"][shape] = torch.zeros_like(g)
            buf.lerp_(g, 1 - momentum)
            x = torch.lerp(g, buf, momentum)
            for r in range(ranks):
                part = x[len(x) * r // ranks:len(x) * (r + 1) // ranks]
                sent[r].append(orthogonal(part) if r == rank and len(part) else
                               torch.empty(part.shape, dtype=torch.bfloat16))
        for r in range(ranks):
            flat = torch.cat([x.flatten() for x in sent[r]])
            if ranks > 1:
                dist.broadcast(flat.view(torch.int32), r)
            sent[r] = list(flat.split([x.numel() for x in sent[r]]))
        for i, (shape, group) in enumerate(self.muon.items()):
            u = torch.cat([sent[r][i] for r in range(ranks)]).view(-1, *shape).float()
            u *= muon_lr * math.sqrt(max(1.0, shape[0] / shape[1]))
            at = 0
            for p, s in group:
                p.data.view(s).sub_(u[at:at + s[0]])
                at += s[0]
        t = st["step"]
        torch._foreach_lerp_(st["m"], [p.grad for p in self.adam], 1 - betas[0])
        for p, m, v in zip(self.adam, st["m"], st["v"]):
            v.mul_(betas[1]).addcmul_(p.grad, p.grad, value=1 - betas[1])
            d = (v / (1 - betas[1] ** t)).sqrt_().add_(1e-8)
            p.data.addcdiv_(m, d, value=-adam_lr / (1 - betas[0] ** t))


def trainable(model, stage):
    """Which parameters a stage changes."""
    kind = stage["kind"]
    out = []
    for name, p in model.named_parameters():
        mtp, index = name.startswith("mtp."), ".indexer." in name
        if mtp:
            on = kind == "mtp" or (stage.get("mtp", 0) > 0 and not index)
        else:
            on = {"lm": not index or stage.get("kl", False), "kl": index, "mtp": False}[kind]
        p.requires_grad_(on)
        if on:
            out.append((name, p))
    return out


def run_micro(model, stage, batch, name=""):
    """Accumulate the gradients of one micro-batch; returns the sums for the log."""
    ids, weight, doc = batch
    kind = stage["kind"]
    rng = random.Random(name)
    torch.manual_seed(rng.getrandbits(32))
    sparse = rng.random() < stage.get("sparse", 0)  # share of the micro-batches with selected positions only
    if kind == "lm":
        kl = stage.get("kl", False)
        hidden, ctx = model.trunk(ids, doc, sparse=sparse, kl=kl, guide=bool(stage.get("guide")))
        loss, w, hits, n = lm_loss(model, hidden, ids, weight, doc, count=name.endswith(" 0"))
        total = loss + stage.get("guide", 0) * ctx.guide_loss * w
        if kl:
            total = total + sum(ctx.kl) * w
        if stage.get("mtp"):
            h, _ = model.predict(hidden, ids, doc)
            total = total + stage["mtp"] * lm_loss(model, h, ids, weight, doc, shift=2, count=False)[0]
        total.backward()
    elif kind == "kl":
        hidden, ctx = model.trunk(ids, doc, sparse=False, kl=True)
        loss = sum(ctx.kl)
        w, hits, n = torch.tensor(1.0), torch.tensor(sum(ctx.recall) / len(ctx.recall)), torch.tensor(1.0)
        loss.backward()
    else:
        with torch.no_grad():
            hidden, _ = model.trunk(ids, doc, sparse=True)
        total = 0.0
        for k, share in enumerate(stage["drafts"]):
            # Row j of the k-th pass takes the state that the pass before left at row j - 1, as drafting does.
            h, c = model.predict(hidden, ids, doc, sparse=sparse, kl=k == 0)
            part = lm_loss(model, h, ids, weight, doc, shift=2)
            total = total + share * part[0]
            if k == 0:
                ctx, (loss, w, hits, n) = c, part
                total = total + sum(ctx.kl) * w
            hidden = torch.cat([hidden[:, :1], h], 1)
        total.backward()
    extra = float(ctx.guide_loss.detach()) if stage.get("guide") else float(sum(ctx.kl).detach()) if ctx.kl else 0.0
    return [float(loss.detach()), float(w), float(hits), float(n), float((doc >= 0).sum()), extra, 1.0]


def worker(rank, a, recipe):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", a.port, a.ranks, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=a.ranks)
    torch.manual_seed(recipe["seed"])
    model = M.Model()
    tok = Tokenizer.from_file(a.tokenizer)
    batches = Batches(tok, load_corpus(a.corpus), recipe["seed"])
    path = os.path.join(a.run, "state.pt")
    at, start, opt_state, seconds = 0, 0, None, 0.0
    if os.path.exists(path):
        s = torch.load(path, weights_only=True)
        model.load_state_dict(s["model"])
        at, start, opt_state, seconds = s["stage"], s["step"], s["opt"], s["seconds"]

    def log(text):
        if rank == 0:
            with open(os.path.join(a.run, "log.txt"), "a") as f:
                f.write(text + "\n")
            print(text, flush=True)

    def save(stage, step, opt):
        if rank == 0:
            torch.save({"model": model.state_dict(), "stage": stage, "step": step, "seconds": seconds,
                        "opt": opt.state if opt else None}, path + ".tmp")
            os.replace(path + ".tmp", path)
            check.save(model, os.path.join(a.run, "export"))

    opt = None
    while at < len(recipe["stages"]):
        stage = recipe["stages"][at]
        if stage.get("copy_mtp") and start == 0:
            # The MTP block starts as the last layer, on hidden states alone.
            with torch.no_grad():
                model.mtp.block.load_state_dict(model.layers[-1].state_dict())
                model.mtp.norm.copy_(model.norm)
                model.mtp.eh_proj.mul_(0.3)
                model.mtp.eh_proj[:, M.C.hidden_size:] += torch.eye(M.C.hidden_size)
        named = trainable(model, stage)
        params = [p for _, p in named]
        if opt is not None:
            opt_state = opt.state
        opt = Optimizer(named)
        if opt_state is not None and (start or stage.get("keep_optimizer")):
            opt.state = opt_state
        opt_state = None
        moes = [m for m in model.moes() if m.router.requires_grad]
        sums, clock, t0 = [0.0] * 7, time.time(), time.time()
        loads = torch.zeros(len(moes), M.C.n_routed_experts)
        for step in range(start, stage["steps"]):
            mine = [0.0] * 7
            for p in params:
                p.grad = None
            load = torch.zeros(max(1, len(moes)), M.C.n_routed_experts)
            for m in range(rank, stage["micros"], a.ranks):
                name = f"{stage['name']} {step} {m}"
                got = run_micro(model, stage, batches.micro(name, stage), name)
                mine = [x + y for x, y in zip(mine, got)]
                for i, moe in enumerate(moes):
                    load[i] += moe.load
            flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in params]
                             + [load.flatten(), torch.tensor(mine)])
            dist.all_reduce(flat)
            got = flat[-7:].tolist()
            flat_w = 1.0 / max(got[1], 1.0)
            i = 0
            for p in params:
                p.grad = flat[i:i + p.numel()].view_as(p) * flat_w
                i += p.numel()
            warm = min(1.0, (step + 1) / stage.get("warmup", 1))
            left = (stage["steps"] - step) / stage["steps"]
            lr = warm * (stage["end"] + (1 - stage["end"]) * left if "end" in stage else 1.0)
            opt.step(stage["muon_lr"] * lr, stage["adam_lr"] * lr)
            M.HALF.clear()
            load = flat[i:i + load.numel()].view_as(load)
            for k, moe in enumerate(moes):
                moe.bias += stage.get("balance", 0.005) * torch.sign(load[k].mean() - load[k])
                moe.bias -= moe.bias.mean()
                loads[k] = 0.9 * loads[k] + 0.1 * load[k] / load[k].sum()
            sums = [x + y for x, y in zip(sums, got)]
            if (step + 1) % 20 == 0 or step + 1 == stage["steps"]:
                now = time.time()
                low = float((loads / loads.sum(-1, keepdim=True)).min()) if len(moes) else 0
                log(f"{time.strftime('%H:%M:%S')} {stage['name']} {step + 1} loss {sums[0] / max(sums[1], 1):.4f} "
                    f"hits {sums[2] / max(sums[3], 1):.4f} extra {sums[5] / sums[6]:.3f} min load {low:.3f} "
                    f"tok/s {sums[4] / (now - clock):.0f}")
                sums, clock = [0.0] * 7, now
            if (step + 1) % 100 == 0:
                seconds, t0 = seconds + time.time() - t0, time.time()
                save(at, step + 1, opt)
        seconds += time.time() - t0
        at, start = at + 1, 0
        save(at, 0, opt)
        if rank == 0:
            torch.save(model.state_dict(), os.path.join(a.run, f"after-{stage['name']}.pt"))
        log(f"{stage['name']} done, {seconds:.0f} s of training")
    dist.barrier()


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    ap = argparse.ArgumentParser(description="Train glm-tiny.")
    ap.add_argument("--run", required=True)
    ap.add_argument("--tokenizer", required=True)
    ap.add_argument("--corpus", required=True)
    ap.add_argument("--recipe", default=os.path.join(here, "recipe.json"))
    ap.add_argument("--ranks", type=int, default=2)
    ap.add_argument("--port", type=int, default=29611)
    a = ap.parse_args()
    for path in (a.tokenizer, a.corpus, a.recipe):
        if not os.path.isfile(path):
            sys.exit(f"train.py: no file {path}")
    with open(a.recipe) as f:
        recipe = json.load(f)
    os.makedirs(a.run, exist_ok=True)
    # Keep freed memory instead of returning and faulting it in again at every operation.
    os.environ.update({"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000",
                       "OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192", "TRAIN_COMPILE": "1",
                       "TORCHINDUCTOR_COMPILE_THREADS": "1"})
    torch.multiprocessing.spawn(worker, (a, recipe), a.ranks)


if __name__ == "__main__":
    main()
