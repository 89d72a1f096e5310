# SPDX-License-Identifier: Apache-2.0
"""Writes tiny random checkpoints (models/<name>/) and what transformers says about them (<name>/).

    python3 tests/goldens/make_models.py [name ...]

Needs torch, transformers (versions are recorded in golden.json) and safetensors. README.md describes the files.
Weights are random BF16 values; the golden is computed in float32 from them. transformers knows only the
interleaved rope of glm_moe_dsa; the half-split pairing is patched in here, in the formula of its rotate_half.
"""
import copy
import json
import pathlib
import platform
import shutil
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STEPS = 64
NOTHING_LEFT_OUT = 3e38

GLM = dict(
    vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16,
    intermediate_size=128, moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1,
    routed_scaling_factor=2.5, norm_topk_prob=True, index_n_heads=4, index_head_dim=16, index_topk=32,
    mlp_layer_types=["dense", "sparse", "sparse", "sparse"], indexer_types=["full", "shared", "full", "shared"],
    max_position_embeddings=2048, rms_norm_eps=1e-5, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    tie_word_embeddings=False, eos_token_id=[0, 1], pad_token_id=0, bos_token_id=None, initializer_range=0.02)
QWEN = dict(
    vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24,
    intermediate_size=160, max_position_embeddings=2048, rms_norm_eps=1e-6,
    rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"}, tie_word_embeddings=False, eos_token_id=0,
    pad_token_id=0, bos_token_id=None, initializer_range=0.02)

# name: class, configuration, keys of config.json that transformers does not know, shard size, with an MTP layer
MODELS = {
    "glm-shared": ("glm", GLM, {"rope_interleave": True, "indexer_rope_interleave": True, "head_dim": 24,
                                "num_nextn_predict_layers": 1}, None, True),
    "glm-groups": ("glm", dict(GLM, n_routed_experts=16, n_group=4, topk_group=2, tie_word_embeddings=True,
                               num_hidden_layers=3, mlp_layer_types=["dense", "sparse", "sparse"],
                               indexer_types=["full", "full", "shared"]),
                   {"rope_interleave": False, "indexer_rope_interleave": False, "head_dim": 24}, None, False),
    "glm-mixed": ("glm", dict(GLM, num_hidden_layers=3, mlp_layer_types=["sparse", "dense", "sparse"],
                              indexer_types=["full"] * 3, n_group=2, topk_group=1, n_shared_experts=2),
                  {"rope_interleave": True, "indexer_rope_interleave": False, "head_dim": 24}, "200KB", False),
    "qwen3-tied": ("qwen", dict(QWEN, tie_word_embeddings=True), {}, None, False),
    "qwen3": ("qwen", QWEN, {}, "150KB", False),
}
PROMPTS = {"glm": (7, 31, 33, 100), "qwen": (5, 90)}


def rope_pairs(interleave, index_interleave):
    """apply_rotary_pos_emb_interleave with a choice of pairing; the indexer is told by unsqueeze_dim=2."""
    def rotate(x, cos, sin, pairs):
        half = x.shape[-1] // 2
        a, b = (x[..., 0::2], x[..., 1::2]) if pairs else (x[..., :half], x[..., half:])
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        pairs = index_interleave if unsqueeze_dim == 2 else interleave
        cos = cos[..., : cos.shape[-1] // 2].unsqueeze(unsqueeze_dim)
        sin = sin[..., : sin.shape[-1] // 2].unsqueeze(unsqueeze_dim)
        return rotate(q, cos, sin, pairs), rotate(k, cos, sin, pairs)
    return apply


class Recorder:
    """Keeps what each full layer selected and each router chose in the last forward call."""

    def __init__(self):
        self.index, self.route = {}, {}

    def attach(self, model):
        for i, layer in enumerate(model.model.layers):
            if getattr(layer.self_attn, "indexer", None) is not None:
                layer.self_attn.indexer.register_forward_hook(self.on_index(i), with_kwargs=True)
            if hasattr(layer.mlp, "gate") and isinstance(layer.mlp.gate, glm.GlmMoeDsaTopkRouter):
                layer.mlp.gate.register_forward_hook(self.on_route(i))

    def on_index(self, i):
        def hook(module, args, kwargs, out):
            hidden, resid, (cos, sin) = args[0], args[1], args[2]
            r, d = module.qk_rope_head_dim, module.head_dim
            q = module.wq_b(resid).view(*hidden.shape[:2], module.n_heads, d)
            k = module.k_norm(module.wk(hidden)).unsqueeze(2)
            qr, kr = glm.apply_rotary_pos_emb_interleave(q[..., :r], k[..., :r], cos, sin, unsqueeze_dim=2)
            q, k = torch.cat([qr, q[..., r:]], -1), torch.cat([kr, k[..., r:]], -1).squeeze(2)
            s = torch.relu(torch.einsum("bthd,bsd->bhts", q, k) * module.softmax_scale)
            w = module.weights_proj(hidden) * module.n_heads ** -0.5
            scores = torch.einsum("bhts,bth->bts", s, w)
            # ReLU makes exact ties at 0, which torch.topk breaks by chance: here the lower position goes first
            future = torch.arange(scores.shape[-1])[None, :] > torch.arange(scores.shape[1])[:, None]
            order = scores.masked_fill(future, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
            chosen = order[..., : out.shape[-1]].to(out.dtype)
            self.index[i] = (chosen[0], scores[0])
            return chosen
        return hook

    def on_route(self, i):
        def hook(module, args, out):
            scores = out[0].sigmoid() + module.e_score_correction_bias
            self.route[i] = (out[2].clone(), scores, module.num_group, module.topk_group, module.top_k)
        return hook


def margin(values, k):
    """(k-th - next) / largest |value| of a 1-d tensor; nothing left out: 3e38."""
    if values.numel() <= k:
        return NOTHING_LEFT_OUT
    v = values.sort(descending=True).values
    return float((v[k - 1] - v[k]) / values[values.isfinite()].abs().max())


def selections(rec, n, topk, out, p):
    for layer, (chosen, scores) in rec.index.items():
        rows, margins = torch.full((n, topk), -1, dtype=torch.int32), torch.empty(n)
        for t in range(n):
            kept = sorted(int(s) for s in chosen[t] if s <= t)
            rows[t, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
            margins[t] = margin(scores[t, : t + 1], topk)
        out[f"{p}.select.{layer}"], out[f"{p}.select_margin.{layer}"] = rows, margins
    for layer, (chosen, scores, groups, kept_groups, k) in rec.route.items():
        rows, margins = torch.empty((n, k), dtype=torch.int32), torch.empty(n)
        for t in range(n):
            s, m = scores[t].clone(), NOTHING_LEFT_OUT
            if groups > 1:
                g = s.view(groups, -1).topk(2, dim=-1)[0].sum(-1)
                m = margin(g, kept_groups)
                dropped = g.argsort(descending=True)[kept_groups:]
                s.view(groups, -1)[dropped] = float("-inf")
            finite = s[s.isfinite()]
            margins[t] = min(m, margin(finite, k))
            rows[t] = torch.tensor(sorted(chosen[t].tolist(), key=lambda e: (-float(s[e]), e)), dtype=torch.int32)
        out[f"{p}.experts.{layer}"], out[f"{p}.experts_margin.{layer}"] = rows, margins


@torch.no_grad()
def greedy(model, prompt, steps):
    """Ids and the gap of every step; None when one gap is too small to be a golden."""
    ids, gaps = list(prompt), []
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        top = logits.topk(2).values
        gaps.append(float((top[0] - top[1]) / logits.abs().max()))
        if gaps[-1] <= 1e-3:
            return None
        ids.append(int(logits.argmax()))
    return ids, gaps


def golden(model, name, path, lengths, topk, steps=STEPS):
    rec, out, prompts = Recorder(), {}, []
    rec.attach(model)
    gen = torch.Generator().manual_seed(1)
    for p, length in enumerate(lengths):
        made = None
        while made is None:
            prompt = torch.randint(2, model.config.vocab_size, (length,), generator=gen).tolist()
            made = greedy(model, prompt, steps)
        ids, gaps = made
        n = len(ids) - 1
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[:n]]), use_cache=False).logits[0]
        rows = sorted(set(list(range(length - 1, n, 4)) + [n - 1]))
        out[f"{p}.ids"], out[f"{p}.gap"] = torch.tensor(ids, dtype=torch.int32), torch.tensor(gaps)
        out[f"{p}.rows"], out[f"{p}.logits"] = torch.tensor(rows, dtype=torch.int32), logits[rows].contiguous()
        selections(rec, n, topk, out, p)
        prompts.append({"name": f"{length} tokens", "n_prompt": length, "n_tokens": steps, "injections": 0,
                        "injections_bf16": 0})
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    old = json.loads((folder / "golden.json").read_text()) if (folder / "golden.json").exists() else None
    for new, was in zip(prompts, old["prompts"] if old else []):  # counts are filled in after the first comparison
        new["injections"], new["injections_bf16"] = was["injections"], was.get("injections_bf16", 0)
    save_file(out, folder / "golden.safetensors")
    doc = {"model": str(path.relative_to(ROOT)), "dtype": "f32", "prompts": prompts,
           "made_by": {"torch": torch.__version__, "transformers": transformers.__version__,
                       "python": platform.python_version()}}
    (folder / "golden.json").write_text(json.dumps(doc, indent=1) + "\n")


@torch.no_grad()
def randomize(model, seed):
    """Wide enough that attention, selection and routing have something to decide."""
    gen = torch.Generator().manual_seed(seed)
    for name, t in list(model.named_parameters()) + list(model.named_buffers()):
        if name.endswith("inv_freq"):
            continue
        noise = torch.randn(t.shape, generator=gen)
        if name.endswith("e_score_correction_bias"):
            t.copy_(noise * 0.1)
        elif "norm" in name:
            t.copy_(noise * 0.1 + (0.0 if name.endswith("bias") else 1.0))
        elif "embed" in name or "lm_head" in name:
            t.copy_(noise)
        else:
            into_residual = "o_proj" in name or "down_proj" in name
            t.copy_(noise * (0.5 if into_residual else 1.2) * t.shape[-1] ** -0.5)
        t.copy_(t.bfloat16().float())


def mtp_layer(tensors, n, hidden):
    """A copy of the last layer and the MTP tensors: they must be recognised, and change nothing."""
    last = f"model.layers.{n - 1}."
    full = "model.layers.2.self_attn.indexer."
    out = {k.replace(last, f"model.layers.{n}."): v.clone() for k, v in tensors.items() if k.startswith(last)}
    out |= {k.replace("layers.2.", f"layers.{n}."): v.clone() for k, v in tensors.items() if k.startswith(full)}
    for k in ("enorm", "hnorm", "shared_head.norm"):
        out[f"model.layers.{n}.{k}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    out[f"model.layers.{n}.eh_proj.weight"] = torch.randn(hidden, 2 * hidden).bfloat16()
    return out


def make(name):
    kind, conf, extra, shard, mtp = MODELS[name]
    path = HERE / "models" / name
    shutil.rmtree(path, ignore_errors=True)
    if kind == "glm":
        glm.apply_rotary_pos_emb_interleave = rope_pairs(extra["rope_interleave"], extra["indexer_rope_interleave"])
        model = transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**conf, attn_implementation="eager"))
    else:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**conf, attn_implementation="eager"))
    model = model.eval().float()
    randomize(model, len(name) * 1000 + sum(map(ord, name)))
    small = copy.deepcopy(model).bfloat16()
    for (k, v), (_, wide) in zip(small.named_buffers(), model.named_buffers()):
        if k.endswith("e_score_correction_bias"):
            v.data = wide.clone()  # stays F32 in the file, as in the original
    small.save_pretrained(path, max_shard_size=shard or "1GB")
    if mtp:
        file = path / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | mtp_layer(tensors, conf["num_hidden_layers"], conf["hidden_size"]), file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.update(extra)
    config["dtype"] = "bfloat16"
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    golden(model, name, path, PROMPTS[kind], conf.get("index_topk", 0))
    for f in [*path.iterdir(), *(HERE / name).iterdir()]:
        f.chmod(0o644)
    print(name, sum(f.stat().st_size for f in path.iterdir()), "bytes,",
          (HERE / name / "golden.safetensors").stat().st_size, "golden")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for which in sys.argv[1:] or MODELS:
        make(which)
