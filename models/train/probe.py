# SPDX-License-Identifier: Apache-2.0
"""Hooks on the unmodified transformers class: index scores, selected sets and expert choices.

The class applies the indexer without returning its scores; a hook computes them again from the
module's own parts and checks that the class selected the same set.
"""
import torch
import torch.nn.functional as F
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as G


class Probe:
    """Use as a context around forward passes over whole sequences (batch 1, no cache)."""

    def __init__(self, model):
        self.model, self.handles = model, []
        self.index, self.experts, self.attention = {}, {}, {}

    def __enter__(self):
        for i, layer in enumerate(self.model.model.layers):
            if layer.self_attn.indexer is not None:
                self.handles.append(layer.self_attn.indexer.register_forward_hook(self.on_index(i), with_kwargs=True))
            if hasattr(layer.mlp, "gate") and isinstance(layer.mlp.gate, G.GlmMoeDsaTopkRouter):
                self.handles.append(layer.mlp.gate.register_forward_hook(self.on_router(i)))
        return self

    def __exit__(self, *_):
        for h in self.handles:
            h.remove()

    def on_index(self, i):
        def hook(m, args, kwargs, out):
            names = ("hidden_states", "q_resid", "position_embeddings")
            got = dict(zip(names, args))
            got.update({k: kwargs[k] for k in names if k in kwargs})
            h, qr, (cos, sin) = (got[n] for n in names)
            B, T, _ = h.shape
            R = m.qk_rope_head_dim
            q = m.wq_b(qr).view(B, T, m.n_heads, m.head_dim)
            k = m.k_norm(m.wk(h)).unsqueeze(2)
            qa, ka = G.apply_rotary_pos_emb_interleave(q[..., :R], k[..., :R], cos, sin, unsqueeze_dim=2)
            q, k = torch.cat([qa, q[..., R:]], -1), torch.cat([ka, k[..., R:]], -1).squeeze(2)
            s = F.relu(torch.matmul(q.float(), k.transpose(-1, -2).float().unsqueeze(1)) * m.softmax_scale)
            w = m.weights_proj(h.to(m.weights_proj.weight.dtype)).float() * m.n_heads ** -0.5
            s = torch.matmul(w.unsqueeze(-2), s).squeeze(-2)[0]
            causal = torch.ones(T, T, dtype=torch.bool).tril()
            s = s.masked_fill(~causal, float("-inf"))
            picked = torch.zeros(T, T, dtype=torch.bool).scatter_(-1, out[0].long(), True) & causal
            self.index[i] = (s, picked)
        return hook

    def on_router(self, i):
        def hook(m, args, out):
            s = out[0].sigmoid() + m.e_score_correction_bias
            self.experts[i] = (s, out[2])
        return hook

    def index_margins(self, topk):
        """Per full layer: (k-th - next) / largest score at every position; infinity where nothing is left out."""
        out = {}
        for i, (s, _) in self.index.items():
            T = s.shape[0]
            m = torch.full((T,), float("inf"))
            if T > topk:
                v = s.sort(-1, descending=True).values
                big = v.masked_fill(v.isinf(), 0).abs().amax(-1).clamp_min(1e-30)
                gap = (v[:, topk - 1] - v[:, topk]) / big
                m[topk:] = gap[topk:]
            out[i] = m
        return out

    def expert_margins(self, k):
        out = {}
        for i, (s, _) in self.experts.items():
            v = s.sort(-1, descending=True).values
            out[i] = (v[:, k - 1] - v[:, k]) / v[:, 0].abs()
        return out
