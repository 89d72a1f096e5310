# SPDX-License-Identifier: Apache-2.0
"""The multi-token-prediction layer over the transformers class: reference for goldens and acceptance.

Row i takes the target's hidden state i (after the final norm) and token i+1:
  z = eh_proj [enorm(embed(token)) ; hnorm(hidden)], then one decoder block of the class itself
  (own attention, own indexer, mixture of experts), then shared_head.norm and the target's lm_head.
A draft's next row takes the state after shared_head.norm in place of the target's hidden state.
"""
import copy
import os

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as G


class MTP(nn.Module):
    def __init__(self, model, directory):
        super().__init__()
        cfg = copy.deepcopy(model.config)
        n = cfg.num_hidden_layers
        cfg.num_hidden_layers = n + 1
        cfg.indexer_types = list(cfg.indexer_types) + ["full"]
        cfg.mlp_layer_types = list(cfg.mlp_layer_types) + ["sparse"]
        cfg._attn_implementation = "eager"
        D = cfg.hidden_size
        self.topk = cfg.index_topk
        self.enorm, self.hnorm = G.GlmMoeDsaRMSNorm(D, cfg.rms_norm_eps), G.GlmMoeDsaRMSNorm(D, cfg.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.block = G.GlmMoeDsaDecoderLayer(cfg, n)
        self.norm = G.GlmMoeDsaRMSNorm(D, cfg.rms_norm_eps)
        self.target = [model]
        t = {k.removeprefix(f"model.layers.{n}."): v
             for k, v in load_file(os.path.join(directory, "model.safetensors")).items()
             if k.startswith(f"model.layers.{n}.")}
        own = {"enorm.weight": t.pop("enorm.weight"), "hnorm.weight": t.pop("hnorm.weight"),
               "eh_proj.weight": t.pop("eh_proj.weight"), "norm.weight": t.pop("shared_head.norm.weight")}
        ex = "mlp.experts."
        gate, up, down = ([t.pop(f"{ex}{e}.{p}_proj.weight") for e in range(cfg.n_routed_experts)]
                          for p in ("gate", "up", "down"))
        t[ex + "gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], 1)
        t[ex + "down_proj"] = torch.stack(down)
        own.update({"block." + k: v for k, v in t.items()})
        self.load_state_dict(own)
        dtype = model.dtype
        keep = self.block.mlp.gate.e_score_correction_bias.float()
        self.to(dtype)
        self.block.mlp.gate.e_score_correction_bias = keep
        self.block.self_attn.indexer.weights_proj.float()
        self.eval()

    @torch.no_grad()
    def forward(self, hidden, tokens):
        """hidden [B, T, D], tokens [B, T] (each the one after its row). Returns states after the norm."""
        model = self.target[0].model
        z = self.eh_proj(torch.cat([self.enorm(model.embed_tokens(tokens)), self.hnorm(hidden)], -1))
        T = z.shape[1]
        pos = torch.arange(T)[None].expand(z.shape[0], T)
        mask = torch.zeros(T, T, dtype=z.dtype).masked_fill(
            ~torch.ones(T, T, dtype=torch.bool).tril(), torch.finfo(z.dtype).min)[None, None]
        mask = mask.expand(z.shape[0], 1, T, T)
        x, _ = self.block(z, attention_mask=mask, position_ids=pos,
                          position_embeddings=model.rotary_emb(z, position_ids=pos))
        return self.norm(x)

    def draft(self, hidden, tokens, depth):
        """hidden of positions 0..n-1, tokens 0..n (the last one sampled). Returns the drafts and their logits."""
        out, logits = [], []
        h, t = hidden, tokens[:, 1:]
        for _ in range(depth):
            y = self.forward(h, t)
            l = self.target[0].lm_head(y[:, -1]).float()
            out.append(l.argmax(-1))
            logits.append(l)
            h = torch.cat([h, y[:, -1:]], 1)
            t = torch.cat([t, out[-1][:, None]], 1)
        return torch.stack(out, 1), torch.stack(logits, 1)
