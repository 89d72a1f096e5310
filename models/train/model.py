# SPDX-License-Identifier: Apache-2.0
"""glm_moe_dsa in plain PyTorch, written for training: rows of packed documents, dense or sparse
attention, the indexer's Kullback-Leibler loss, the multi-token-prediction (MTP) block, and export
to the checkpoint's names. check.py compares it with the class in transformers.
"""
import json
import os

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "dtype": "bfloat16",
    "vocab_size": 3072, "hidden_size": 256, "num_hidden_layers": 6, "num_nextn_predict_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 64,
    "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "qk_head_dim": 64, "v_head_dim": 64,
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "intermediate_size": 768, "moe_intermediate_size": 128, "first_k_dense_replace": 1, "moe_layer_freq": 1,
    "mlp_layer_types": ["dense"] + ["sparse"] * 5, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_router_dtype": "float32",
    "index_n_heads": 4, "index_head_dim": 64, "index_topk": 64, "index_topk_freq": 2, "index_skip_topk_offset": 2,
    "index_topk_pattern": None, "indexer_types": ["full", "full", "shared", "full", "shared", "full"],
    "indexer_rope_interleave": True, "index_share_for_mtp_iteration": True,
    "rope_interleave": True, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False,
    "use_cache": True, "eos_token_id": [3036, 3043, 3045], "pad_token_id": 3036, "bos_token_id": None,
    "transformers_version": "5.16.1",
}


class C:
    pass


for _k, _v in CONFIG.items():
    setattr(C, _k, _v)

# Layers whose first head may be guided: one token back, behind any earlier copy of the token, behind the last one.
GUIDED = {0: "back", 1: "back", 2: "match", 3: "recent", 4: "match"}
LORA_EPS = 1e-6  # q_a_layernorm and kv_a_layernorm, as in transformers
KL_ROWS = 256  # positions of a row at which the indexer is compared with the attention
HALF = {}  # matrices in the compute type, kept until the next optimizer step


def fused(f):
    """Compile small elementwise functions when TRAIN_COMPILE is set (train.py sets it)."""
    if not os.environ.get("TRAIN_COMPILE"):
        return f
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(f, dynamic=True)


@fused
def rms(x, w, eps):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


@fused
def rms_to(x, w, eps, dtype):
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w).to(dtype)


def rotate(x, cos, sin):
    """Interleaved pairs (2i, 2i+1); x [..., heads, dims], cos and sin [..., 1, dims/2]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@fused
def swiglu(gu):
    g, u = gu.float().chunk(2, -1)
    return (g * torch.sigmoid(g) * u).to(gu.dtype)


@fused
def swiglu_back(gu, da):
    g, u = gu.float().chunk(2, -1)
    s = torch.sigmoid(g)
    d = da.float()
    return torch.cat([d * u * s * (1 + g * (1 - s)), d * g * s], -1).to(gu.dtype)


@fused
def heads(q, kv, e, cos, sin, H, N, R):
    """Queries, keys and values [B, H, T, dims] of the projections, rotated."""
    B, T = q.shape[:2]
    q = q.view(B, T, H, N + R)
    kpe = rotate(kv[..., None, -R:].float(), cos, sin).to(q.dtype)
    q = torch.cat([q[..., :N], rotate(q[..., N:].float(), cos, sin).to(q.dtype)], -1).transpose(1, 2)
    e = e.view(B, T, H, -1)
    k = torch.cat([e[..., :N], kpe.expand(B, T, H, R)], -1).transpose(1, 2)
    return q.contiguous(), k.contiguous(), e[..., N:].transpose(1, 2).contiguous()


def half(w, dtype):
    if w.dtype == dtype:
        return w.detach()
    got = HALF.get(id(w))
    if got is None or got[0] is not w:
        got = HALF[id(w)] = (w, w.detach().to(dtype))
    return got[1]


def give(w, g):
    """Add to a parameter's gradient in place, without a copy in between."""
    if w.grad is None:
        w.grad = g.to(w.dtype)
    else:
        w.grad.add_(g)


class Linear(torch.autograd.Function):
    """x @ w.T in the type of x; the gradient of w goes straight into w.grad."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        ctx.w, ctx.train = w, w.requires_grad
        return x @ half(w, x.dtype).T

    @staticmethod
    def backward(ctx, g):
        x, = ctx.saved_tensors
        if ctx.train:
            give(ctx.w, g.reshape(-1, g.shape[-1]).T @ x.reshape(-1, x.shape[-1]))
        return g @ half(ctx.w, g.dtype) if ctx.needs_input_grad[0] else None, None


class Experts(torch.autograd.Function):
    """Gated units of all experts on rows sorted by expert, n rows each."""

    @staticmethod
    def forward(ctx, x, gate_up, down, n):
        gu, dn = half(gate_up, x.dtype), half(down, x.dtype)
        h = torch.empty(x.shape[0], gu.shape[1], dtype=x.dtype)
        y = torch.empty(x.shape[0], dn.shape[1], dtype=x.dtype)
        at = 0
        for e, k in enumerate(n):
            torch.mm(x[at:at + k], gu[e].T, out=h[at:at + k])
            at += k
        a = swiglu(h)
        at = 0
        for e, k in enumerate(n):
            torch.mm(a[at:at + k], dn[e].T, out=y[at:at + k])
            at += k
        ctx.save_for_backward(x, h, a)
        ctx.gate_up, ctx.down, ctx.n, ctx.train = gate_up, down, n, gate_up.requires_grad
        return y

    @staticmethod
    def backward(ctx, g):
        x, h, a = ctx.saved_tensors
        gu, dn = half(ctx.gate_up, x.dtype), half(ctx.down, x.dtype)
        da = torch.empty_like(a)
        dx = torch.empty_like(x)
        at = 0
        for e, k in enumerate(ctx.n):
            torch.mm(g[at:at + k], dn[e], out=da[at:at + k])
            at += k
        dh = swiglu_back(h, da)
        at = 0
        if ctx.train:
            ggu, gdn = torch.empty_like(gu), torch.empty_like(dn)
        for e, k in enumerate(ctx.n):
            torch.mm(dh[at:at + k], gu[e], out=dx[at:at + k])
            if ctx.train:
                torch.mm(dh[at:at + k].T, x[at:at + k], out=ggu[e])
                torch.mm(g[at:at + k].T, a[at:at + k], out=gdn[e])
            at += k
        if ctx.train:
            give(ctx.gate_up, ggu)
            give(ctx.down, gdn)
        return dx, None, None, None


@fused
def combine(y, w, shared):
    return (y.float() * w[..., None]).sum(1) + shared.float()


class Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gu):
        ctx.save_for_backward(gu)
        return swiglu(gu)

    @staticmethod
    def backward(ctx, g):
        return swiglu_back(ctx.saved_tensors[0], g)


@fused
def soft(s, bias, scale):
    return (s.float() * scale + bias.float()).softmax(-1).to(s.dtype)


@fused
def soft_back(p, dp, scale):
    p, d = p.float(), dp.float()
    return (p * (d - (p * d).sum(-1, keepdim=True)) * scale).to(dp.dtype)


class Attend(torch.autograd.Function):
    """Attention of [B, H, T, dims] and the first head's weights."""

    @staticmethod
    def forward(ctx, q, k, v, bias):
        ctx.scale = C.qk_head_dim ** -0.5
        p = soft(q @ k.transpose(-1, -2), bias, ctx.scale)
        ctx.save_for_backward(q, k, v, p)
        return p @ v, p[:, 0].clone()

    @staticmethod
    def backward(ctx, g, g0):
        q, k, v, p = ctx.saved_tensors
        d = g @ v.transpose(-1, -2)
        if g0 is not None:
            d[:, 0] += g0
        s = soft_back(p, d, ctx.scale)
        return s @ k, s.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g, None


linear = Linear.apply


def param(*shape, std):
    return nn.Parameter(torch.randn(*shape) * std)


class Indexer(nn.Module):
    def __init__(self):
        super().__init__()
        self.wq_b = param(C.index_n_heads * C.index_head_dim, C.q_lora_rank, std=C.q_lora_rank ** -0.5)
        self.wk = param(C.index_head_dim, C.hidden_size, std=C.hidden_size ** -0.5)
        self.k_norm_w = nn.Parameter(torch.ones(C.index_head_dim))
        self.k_norm_b = nn.Parameter(torch.zeros(C.index_head_dim))
        self.weights_proj = param(C.index_n_heads, C.hidden_size, std=C.hidden_size ** -0.5)

    def forward(self, h, qr, cos, sin, rows=slice(None)):
        """Scores [B, rows, T] in float32, before masking."""
        R = C.qk_rope_head_dim
        qr = qr[:, rows]
        q = (qr @ self.wq_b.T.to(qr.dtype)).view(*qr.shape[:2], C.index_n_heads, C.index_head_dim)
        k = F.layer_norm((h @ self.wk.T.to(h.dtype)).float(), (C.index_head_dim,), self.k_norm_w, self.k_norm_b, 1e-6)
        q = torch.cat([rotate(q[..., :R].float(), cos[rows], sin[rows]), q[..., R:].float()], -1).to(h.dtype)
        k = torch.cat([rotate(k[..., None, :R], cos, sin)[..., 0, :], k[..., R:]], -1).to(h.dtype)
        w = (h[:, rows] @ self.weights_proj.T.to(h.dtype)).float() * (C.index_n_heads ** -0.5 * C.index_head_dim ** -0.5)
        s = F.relu(q.transpose(1, 2) @ k.transpose(1, 2)[:, None]).float()  # [B, heads, T, T]
        return torch.einsum("bth,bhts->bts", w, s)


class Attention(nn.Module):
    def __init__(self, full, depth):
        super().__init__()
        H, D = C.num_attention_heads, C.hidden_size
        self.q_a = param(C.q_lora_rank, D, std=D ** -0.5)
        self.q_a_norm = nn.Parameter(torch.ones(C.q_lora_rank))
        self.q_b = param(H * C.qk_head_dim, C.q_lora_rank, std=C.q_lora_rank ** -0.5)
        self.kv_a = param(C.kv_lora_rank + C.qk_rope_head_dim, D, std=D ** -0.5)
        self.kv_a_norm = nn.Parameter(torch.ones(C.kv_lora_rank))
        self.kv_b = param(H * (C.qk_nope_head_dim + C.v_head_dim), C.kv_lora_rank, std=C.kv_lora_rank ** -0.5)
        self.o = param(D, H * C.v_head_dim, std=(H * C.v_head_dim * 2 * depth) ** -0.5)
        self.indexer = Indexer() if full else None
        self.guide = None

    def forward(self, h, cos, sin, mask, ctx):
        """h [B, T, D] in the compute type; mask [B, T, T] True where attention is allowed."""
        B, T, _ = h.shape
        H, N, R, V = C.num_attention_heads, C.qk_nope_head_dim, C.qk_rope_head_dim, C.v_head_dim
        dt = h.dtype
        qr = rms_to(linear(h, self.q_a), self.q_a_norm, LORA_EPS, dt)
        kv = linear(h, self.kv_a)
        e = linear(rms_to(kv[..., :C.kv_lora_rank], self.kv_a_norm, LORA_EPS, dt), self.kv_b)
        q, k, v = heads(linear(qr, self.q_b), kv, e, cos, sin, H, N, R)
        if self.indexer is not None:
            self.choose(h.detach(), qr.detach(), cos, sin, mask, ctx)
        if ctx.kl is not None:
            self.compare(q.detach(), k.detach(), mask, ctx)
        if ctx.sparse:
            mask = ctx.selected
        bias = ctx.bias(mask, dt)
        guided = ctx.guide is not None and self.guide is not None
        if T <= 1024 or guided:
            o, first = Attend.apply(q, k, v, bias)
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=C.qk_head_dim ** -0.5)
        if guided:
            # The first head learns to look one token back, or behind an earlier copy of the token.
            where, some, n = ctx.guide[self.guide]
            mass = (first * where).sum(-1).float()
            ctx.guide_loss = ctx.guide_loss - (torch.log(mass + 1e-5) * some).sum() / n
        return linear(o.transpose(1, 2).reshape(B, T, H * V), self.o)

    def choose(self, h, qr, cos, sin, mask, ctx):
        """Leave the indexer's scores and selection in ctx, for this layer and those that share them."""
        def pick(score, mask):
            top = score.masked_fill(~mask, float("-inf")).topk(min(C.index_topk, mask.shape[-1]), dim=-1).indices
            return torch.zeros_like(mask).scatter_(-1, top, True) & mask

        if ctx.sparse:
            with torch.no_grad():
                ctx.selected = pick(self.indexer(h, qr, cos, sin), mask)
        if ctx.kl is not None:
            ctx.score = self.indexer(h, qr, cos, sin, ctx.rows)
            ctx.picked = pick(ctx.score.detach(), mask[:, ctx.rows])

    @staticmethod
    def compare(q, k, mask, ctx):
        """Append the divergence of the scores from the dense attention, and the recall of the selection."""
        mask = mask[:, ctx.rows]
        live = ctx.live[:, ctx.rows]
        with torch.no_grad():
            att = (q[:, :, ctx.rows] @ k.transpose(-1, -2)).float() * C.qk_head_dim ** -0.5
            p = att.masked_fill_(~mask[:, None], -1e30).softmax(-1)
            # The target looks at the best head of each position beside the mean of the heads: a head
            # that finds one token far back counts in full.
            best, mean = p.amax(1), p.mean(1)
            target = 0.5 * mean + 0.5 * best / best.sum(-1, keepdim=True)
            target *= live[..., None]
            far = (mask.sum(-1) > C.index_topk) & live  # rows where the selection leaves something out
            kept = (mean * ctx.picked).sum(-1)[far].sum() / far.sum() if far.any() else 1.0
            ctx.recall.append(float(kept))
        logq = ctx.score.masked_fill(~mask, -1e30).log_softmax(-1)
        ctx.kl.append((target * (torch.log(target + 1e-9) - logq)).sum() / live.sum().clamp_min(1))


class MLP(nn.Module):
    def __init__(self, inner, depth):
        super().__init__()
        D = C.hidden_size
        self.gate_up = param(2 * inner, D, std=D ** -0.5)
        self.down = param(D, inner, std=(inner * 2 * depth) ** -0.5)

    def forward(self, h):
        return linear(Swiglu.apply(linear(h, self.gate_up)), self.down)


class MoE(nn.Module):
    def __init__(self, depth):
        super().__init__()
        D, E, inner = C.hidden_size, C.n_routed_experts, C.moe_intermediate_size
        self.router = param(E, D, std=D ** -0.5)
        self.register_buffer("bias", torch.zeros(E))
        self.gate_up = param(E, 2 * inner, D, std=D ** -0.5)
        self.down = param(E, D, inner, std=(inner * 2 * depth * 2) ** -0.5)
        self.shared = MLP(inner * C.n_shared_experts, depth)
        self.load = None

    def forward(self, h32, dt, count=None):
        x = h32.reshape(-1, C.hidden_size)
        s = torch.sigmoid(x @ self.router.T)
        idx = (s.detach() + self.bias).topk(C.num_experts_per_tok, -1).indices
        w = s.gather(1, idx)
        w = w / (w.sum(-1, keepdim=True) + 1e-20) * C.routed_scaling_factor
        flat = idx.flatten()
        order = flat.argsort()
        n = torch.bincount(flat, minlength=C.n_routed_experts)
        self.load = n if count is None else torch.bincount(
            idx[count.flatten()].flatten(), minlength=C.n_routed_experts)
        # Each expert's rows are filled up to a multiple of 64 (token 0 with weight 0): few
        # different matrix shapes, which the library prepares once each.
        room = (n + 63) // 64 * 64
        place = torch.arange(flat.numel()) + (room.cumsum(0) - room - n.cumsum(0) + n)[flat[order]]
        token = torch.zeros(int(room.sum()), dtype=torch.long)
        token[place] = order // C.num_experts_per_tok
        back = torch.empty_like(order)
        back[order] = place  # row of each token's each choice
        xb = x.to(dt)
        y = Experts.apply(xb[token], self.gate_up, self.down, room.tolist())
        y = y[back].view(-1, C.num_experts_per_tok, C.hidden_size)
        return combine(y, w, self.shared(xb)).view(h32.shape)


class Block(nn.Module):
    def __init__(self, full, dense, depth):
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(C.hidden_size))
        self.norm2 = nn.Parameter(torch.ones(C.hidden_size))
        self.attn = Attention(full, depth)
        self.mlp = MLP(C.intermediate_size, depth) if dense else MoE(depth)

    def forward(self, x, cos, sin, mask, ctx):
        x = x + self.attn(rms_to(x, self.norm1, C.rms_norm_eps, ctx.dtype), cos, sin, mask, ctx)
        h = rms(x, self.norm2, C.rms_norm_eps)
        if isinstance(self.mlp, MoE):
            return x + self.mlp(h, ctx.dtype, ctx.live)
        return x + self.mlp(h.to(ctx.dtype))


class Ctx:
    def __init__(self, sparse, dtype, kl, live):
        self.sparse, self.dtype, self.live = sparse, dtype, live
        # The divergence is taken at up to KL_ROWS positions.
        self.rows = torch.randperm(live.shape[1])[:KL_ROWS].sort().values if kl else None
        self.kl = [] if kl else None
        self.recall = []
        self.guide, self.guide_loss = None, 0.0
        self.score = self.picked = self.selected = None
        self.biases = (None, None)

    def bias(self, mask, dtype):
        """The mask as numbers to add, made once for all layers that share it."""
        if self.biases[0] is not mask:
            self.biases = (mask, torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))[:, None])
        return self.biases[1]


class MTP(nn.Module):
    def __init__(self):
        super().__init__()
        D = C.hidden_size
        self.enorm = nn.Parameter(torch.ones(D))
        self.hnorm = nn.Parameter(torch.ones(D))
        self.eh_proj = param(D, 2 * D, std=(2 * D) ** -0.5)
        self.block = Block(True, False, C.num_hidden_layers)
        self.norm = nn.Parameter(torch.ones(D))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        n = C.num_hidden_layers
        self.embed = param(C.vocab_size, C.hidden_size, std=0.02)
        self.layers = nn.ModuleList(
            [Block(C.indexer_types[i] == "full", C.mlp_layer_types[i] == "dense", n) for i in range(n)])
        for i, what in GUIDED.items():
            self.layers[i].attn.guide = what
        self.norm = nn.Parameter(torch.ones(C.hidden_size))
        self.head = param(C.vocab_size, C.hidden_size, std=0.02)
        self.mtp = MTP()

    @staticmethod
    def angles(T):
        R = C.qk_rope_head_dim
        f = 1.0 / (C.rope_parameters["rope_theta"] ** (torch.arange(0, R, 2, dtype=torch.float) / R))
        a = torch.arange(T).float()[:, None] * f
        return a.cos()[:, None], a.sin()[:, None]  # [T, 1, R/2]

    @staticmethod
    def causal(doc):
        """doc [B, T]: number of the document of each token; -1 for padding."""
        T = doc.shape[1]
        return (doc[:, :, None] == doc[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()

    @staticmethod
    def guides(ids, live):
        """Per kind of guided head: where it should look [B, T, T], and for which positions there is such a place."""
        T = ids.shape[1]
        same = (ids[:, :, None] == ids[:, None, :]) & live
        after = torch.zeros_like(same)
        after[:, :, 1:] = same[:, :, :-1]
        after &= live
        last = (after * torch.arange(1, T + 1, dtype=torch.int16)).amax(-1, keepdim=True).long() - 1
        recent = torch.zeros_like(same).scatter_(-1, last.clamp_min(0), True) & after
        back = live & torch.ones(T, T, dtype=torch.bool).tril(-1).triu(-1)
        some = {"back": back, "match": after, "recent": recent}
        return {k: (v.to(torch.bfloat16), v.any(-1), v.any(-1).sum().clamp_min(1)) for k, v in some.items()}

    def trunk(self, ids, doc, sparse=False, dtype=torch.bfloat16, kl=False, guide=False):
        """Hidden states after the final norm (float32) and the context."""
        ctx = Ctx(sparse, dtype, kl, doc >= 0)
        cos, sin = self.angles(ids.shape[1])
        mask = self.causal(doc)
        if guide:
            ctx.guide = self.guides(ids, mask & (doc >= 0)[..., None])
        x = self.embed[ids]
        for layer in self.layers:
            x = layer(x, cos, sin, mask, ctx)
        return rms(x, self.norm, C.rms_norm_eps), ctx

    def predict(self, hidden, ids, doc, sparse=False, dtype=torch.bfloat16, kl=False):
        """MTP hidden states: row i takes hidden i and token i+1; rows 0 .. T-2."""
        ctx = Ctx(sparse, dtype, kl, doc[:, :-1] >= 0)
        m = self.mtp
        e = rms(self.embed[ids[:, 1:]], m.enorm, C.rms_norm_eps)
        h = rms(hidden[:, :-1], m.hnorm, C.rms_norm_eps)
        z = linear(torch.cat([e, h], -1).to(dtype), m.eh_proj).float()
        cos, sin = self.angles(z.shape[1])
        x = m.block(z, cos, sin, self.causal(doc[:, :-1]), ctx)
        return rms(x, m.norm, C.rms_norm_eps), ctx

    def logits(self, hidden, dtype=torch.bfloat16):
        return (hidden.to(dtype) @ self.head.T.to(dtype)).float()

    def moes(self):
        return [b.mlp for b in list(self.layers) + [self.mtp.block] if isinstance(b.mlp, MoE)]


def export(model):
    """Tensors under the names of the checkpoint format; F32 for the router bias, BF16 else."""
    out = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm, "lm_head.weight": model.head}

    def mlp(prefix, m):
        g, u = m.gate_up.chunk(2, 0)
        out[prefix + "gate_proj.weight"], out[prefix + "up_proj.weight"] = g, u
        out[prefix + "down_proj.weight"] = m.down

    blocks = list(model.layers) + [model.mtp.block]
    for i, b in enumerate(blocks):
        p = f"model.layers.{i}."
        out[p + "input_layernorm.weight"], out[p + "post_attention_layernorm.weight"] = b.norm1, b.norm2
        a, s = b.attn, p + "self_attn."
        out[s + "q_a_proj.weight"], out[s + "q_a_layernorm.weight"], out[s + "q_b_proj.weight"] = a.q_a, a.q_a_norm, a.q_b
        out[s + "kv_a_proj_with_mqa.weight"], out[s + "kv_a_layernorm.weight"] = a.kv_a, a.kv_a_norm
        out[s + "kv_b_proj.weight"], out[s + "o_proj.weight"] = a.kv_b, a.o
        if a.indexer is not None:
            x, s = a.indexer, s + "indexer."
            out[s + "wq_b.weight"], out[s + "wk.weight"], out[s + "weights_proj.weight"] = x.wq_b, x.wk, x.weights_proj
            out[s + "k_norm.weight"], out[s + "k_norm.bias"] = x.k_norm_w, x.k_norm_b
        if isinstance(b.mlp, MLP):
            mlp(p + "mlp.", b.mlp)
            continue
        m, s = b.mlp, p + "mlp."
        out[s + "gate.weight"], out[s + "gate.e_score_correction_bias"] = m.router, m.bias
        for e in range(C.n_routed_experts):
            g, u = m.gate_up[e].chunk(2, 0)
            out[f"{s}experts.{e}.gate_proj.weight"], out[f"{s}experts.{e}.up_proj.weight"] = g, u
            out[f"{s}experts.{e}.down_proj.weight"] = m.down[e]
        mlp(s + "shared_experts.", m.shared)
    p = f"model.layers.{C.num_hidden_layers}."
    m = model.mtp
    out[p + "enorm.weight"], out[p + "hnorm.weight"], out[p + "eh_proj.weight"] = m.enorm, m.hnorm, m.eh_proj
    out[p + "shared_head.norm.weight"] = m.norm
    return {k: v.detach().to(torch.float32 if k.endswith("correction_bias") else torch.bfloat16).contiguous().clone()
            for k, v in out.items()}


def load_export(model, tensors):
    """The inverse of export: fill the model with a checkpoint's values."""
    names = export(model)
    if set(names) != set(tensors):
        raise ValueError(f"checkpoint names differ: {sorted(set(names) ^ set(tensors))[:4]}")
    HALF.clear()
    with torch.no_grad():
        def put(dst, name):
            dst.copy_(tensors[name].float())

        def mlp(prefix, m):
            m.gate_up.copy_(torch.cat([tensors[prefix + "gate_proj.weight"], tensors[prefix + "up_proj.weight"]]).float())
            put(m.down, prefix + "down_proj.weight")

        put(model.embed, "model.embed_tokens.weight")
        put(model.norm, "model.norm.weight")
        put(model.head, "lm_head.weight")
        for i, b in enumerate(list(model.layers) + [model.mtp.block]):
            p = f"model.layers.{i}."
            put(b.norm1, p + "input_layernorm.weight")
            put(b.norm2, p + "post_attention_layernorm.weight")
            a, s = b.attn, p + "self_attn."
            for dst, n in ((a.q_a, "q_a_proj"), (a.q_a_norm, "q_a_layernorm"), (a.q_b, "q_b_proj"),
                           (a.kv_a, "kv_a_proj_with_mqa"), (a.kv_a_norm, "kv_a_layernorm"), (a.kv_b, "kv_b_proj"),
                           (a.o, "o_proj")):
                put(dst, s + n + ".weight")
            if a.indexer is not None:
                x, s = a.indexer, s + "indexer."
                put(x.wq_b, s + "wq_b.weight")
                put(x.wk, s + "wk.weight")
                put(x.weights_proj, s + "weights_proj.weight")
                put(x.k_norm_w, s + "k_norm.weight")
                put(x.k_norm_b, s + "k_norm.bias")
            if isinstance(b.mlp, MLP):
                mlp(p + "mlp.", b.mlp)
                continue
            m, s = b.mlp, p + "mlp."
            put(m.router, s + "gate.weight")
            put(m.bias, s + "gate.e_score_correction_bias")
            for e in range(C.n_routed_experts):
                t = f"{s}experts.{e}."
                m.gate_up[e].copy_(torch.cat([tensors[t + "gate_proj.weight"], tensors[t + "up_proj.weight"]]).float())
                put(m.down[e], t + "down_proj.weight")
            mlp(s + "shared_experts.", m.shared)
        p = f"model.layers.{C.num_hidden_layers}."
        m = model.mtp
        put(m.enorm, p + "enorm.weight")
        put(m.hnorm, p + "hnorm.weight")
        put(m.eh_proj, p + "eh_proj.weight")
        put(m.norm, p + "shared_head.norm.weight")


def write_config(path):
    with open(path, "w") as f:
        json.dump({k: v for k, v in CONFIG.items() if v is not None}, f, indent=2)
        f.write("\n")
