# SPDX-License-Identifier: Apache-2.0
"""glm_moe_dsa in plain PyTorch, written for training: rows of packed documents, dense or sparse
attention, the indexer's Kullback-Leibler loss, the multi-token-prediction (MTP) block, and export
to the checkpoint's names. check.py compares it with the class in transformers.
"""
import json
import math

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

GUIDED = {0: "back", 1: "back", 2: "match", 3: "match", 4: "match"}  # layers whose first head may be guided
LORA_EPS = 1e-6  # q_a_layernorm and kv_a_layernorm, as in transformers


def rms(x, w, eps):
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rotate(x, cos, sin):
    """Interleaved pairs (2i, 2i+1); x [..., heads, dims], cos and sin [..., 1, dims/2]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


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

    def forward(self, h, qr, cos, sin):
        """Scores [B, T, T] in float32, before masking."""
        B, T, _ = h.shape
        R = C.qk_rope_head_dim
        q = (qr @ self.wq_b.T.to(qr.dtype)).view(B, T, C.index_n_heads, C.index_head_dim)
        k = F.layer_norm((h @ self.wk.T.to(h.dtype)).float(), (C.index_head_dim,), self.k_norm_w, self.k_norm_b, 1e-6)
        q = torch.cat([rotate(q[..., :R].float(), cos, sin), q[..., R:].float()], -1).to(h.dtype)
        k = torch.cat([rotate(k[..., None, :R], cos, sin)[..., 0, :], k[..., R:]], -1).to(h.dtype)
        w = (h @ self.weights_proj.T.to(h.dtype)).float() * (C.index_n_heads ** -0.5 * C.index_head_dim ** -0.5)
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
        qr = rms(h @ self.q_a.T.to(dt), self.q_a_norm, LORA_EPS).to(dt)
        q = (qr @ self.q_b.T.to(dt)).view(B, T, H, N + R)
        kv = h @ self.kv_a.T.to(dt)
        lat = rms(kv[..., :C.kv_lora_rank], self.kv_a_norm, LORA_EPS).to(dt)
        kpe = rotate(kv[..., None, C.kv_lora_rank:].float(), cos, sin).to(dt)
        q = torch.cat([q[..., :N], rotate(q[..., N:].float(), cos, sin).to(dt)], -1).transpose(1, 2)
        e = (lat @ self.kv_b.T.to(dt)).view(B, T, H, N + V)
        k = torch.cat([e[..., :N], kpe.expand(B, T, H, R)], -1).transpose(1, 2)
        v = e[..., N:].transpose(1, 2)
        if self.indexer is not None and (ctx.sparse or ctx.kl is not None):
            with torch.set_grad_enabled(ctx.kl is not None):
                score = self.indexer(h.detach(), qr.detach(), cos, sin)
            ctx.score = score
            sel = score.detach().masked_fill(~mask, float("-inf"))
            top = sel.topk(min(C.index_topk, T), dim=-1).indices
            ctx.selected = torch.zeros_like(mask).scatter_(-1, top, True) & mask
        causal = mask
        if ctx.sparse:
            mask = ctx.selected
        att = (q @ k.transpose(-1, -2)).float() * C.qk_head_dim ** -0.5
        p = att.masked_fill(~mask[:, None], -1e30).softmax(-1)
        if ctx.guide is not None and self.guide is not None:
            # The first head learns to look one token back, or behind an earlier copy of the token.
            mass = (p[:, 0] * ctx.guide[self.guide]).sum(-1)
            some = ctx.guide[self.guide].any(-1)
            ctx.guide_loss = ctx.guide_loss - (torch.log(mass + 1e-6) * some).sum() / some.sum().clamp_min(1)
        if ctx.kl is not None:
            # The target looks at the best head of each position beside the mean of the heads: a head
            # that finds one token far back counts in full.
            full = p if not ctx.sparse else att.detach().masked_fill(~causal[:, None], -1e30).softmax(-1)
            full = full.detach()
            best = full.amax(1)
            target = 0.5 * full.mean(1) + 0.5 * best / best.sum(-1, keepdim=True)
            logq = ctx.score.masked_fill(~causal, -1e30).log_softmax(-1)
            rows = ctx.live[..., None]
            t = target * rows
            kl = (t * (torch.log(target + 1e-9) - logq)).sum() / rows.sum()
            ctx.kl.append(kl)
            t = full.mean(1) * rows
            far = (causal.sum(-1) > C.index_topk) & ctx.live  # rows where the selection leaves something out
            ctx.recall.append(float((t * ctx.selected)[far].sum() / t[far].sum()) if far.any() else 1.0)
        o = (p.to(dt) @ v).transpose(1, 2).reshape(B, T, H * V)
        return o @ self.o.T.to(dt)


class MLP(nn.Module):
    def __init__(self, inner, depth):
        super().__init__()
        D = C.hidden_size
        self.gate_up = param(2 * inner, D, std=D ** -0.5)
        self.down = param(D, inner, std=(inner * 2 * depth) ** -0.5)

    def forward(self, h):
        g, u = (h @ self.gate_up.T.to(h.dtype)).chunk(2, -1)
        return (F.silu(g) * u) @ self.down.T.to(h.dtype)


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
        w = torch.zeros(token.numel()).index_copy(0, place, w.flatten()[order])
        n = room.tolist()
        xb = x.to(dt)
        parts = xb[token].split(n)
        gu = self.gate_up.to(dt)
        dn = self.down.to(dt)
        g, u = torch.cat([p @ gu[e].T for e, p in enumerate(parts)]).chunk(2, -1)
        a = (F.silu(g) * u).split(n)
        y = torch.cat([p @ dn[e].T for e, p in enumerate(a)]).float() * w[:, None]
        out = torch.zeros_like(x).index_add(0, token, y)
        return (out + self.shared(xb).float()).view(h32.shape)


class Block(nn.Module):
    def __init__(self, full, dense, depth):
        super().__init__()
        self.norm1 = nn.Parameter(torch.ones(C.hidden_size))
        self.norm2 = nn.Parameter(torch.ones(C.hidden_size))
        self.attn = Attention(full, depth)
        self.mlp = MLP(C.intermediate_size, depth) if dense else MoE(depth)

    def forward(self, x, cos, sin, mask, ctx):
        x = x + self.attn(rms(x, self.norm1, C.rms_norm_eps).to(ctx.dtype), cos, sin, mask, ctx).float()
        h = rms(x, self.norm2, C.rms_norm_eps)
        if isinstance(self.mlp, MoE):
            return x + self.mlp(h, ctx.dtype, ctx.live)
        return x + self.mlp(h.to(ctx.dtype)).float()


class Ctx:
    def __init__(self, sparse, dtype, kl, live):
        self.sparse, self.dtype, self.live = sparse, dtype, live
        self.kl = [] if kl else None
        self.recall = []
        self.guide, self.guide_loss = None, 0.0
        self.score = self.selected = None


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

    def trunk(self, ids, doc, sparse=False, dtype=torch.bfloat16, kl=False, guide=False):
        """Hidden states after the final norm (float32) and the context."""
        ctx = Ctx(sparse, dtype, kl, doc >= 0)
        cos, sin = self.angles(ids.shape[1])
        mask = self.causal(doc)
        if guide:
            T = ids.shape[1]
            live = mask & (doc >= 0)[..., None]
            same = (ids[:, :, None] == ids[:, None, :]) & live & ~torch.eye(T, dtype=torch.bool)
            after = torch.zeros_like(same)
            after[:, :, 1:] = same[:, :, :-1]
            ctx.guide = {"back": live & torch.ones(T, T, dtype=torch.bool).tril(-1).triu(-1), "match": after & live}
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
        z = (torch.cat([e, h], -1).to(dtype) @ m.eh_proj.T.to(dtype)).float()
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
