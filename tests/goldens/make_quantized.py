# SPDX-License-Identifier: Apache-2.0
"""Writes tiny quantised checkpoints (models/<name>/) and what transformers says about them (<name>/).

    python3 tests/goldens/make_quantized.py [name ...]

Needs what make_models.py needs, and amd-quark (its version is in golden.json): MXFP4 checkpoints are written by Quark
itself, file to file. FP8 checkpoints follow the layout of the published ones (e4m3, 128 x 128 blocks, weight_scale_inv,
modules_to_not_convert) and are quantised with torch. Mixed ones are Quark's with some modules in FP8 by torch and Quark's
own layer_quant_config for these. The golden is transformers in float32 on the values that torch
decodes from the quantised file.
"""
import fnmatch
import json
import pathlib
import shutil
import sys
import tempfile

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

import make_models as base

# wide enough for ragged blocks of 128: kv_b has 4 heads of 40 rows, so heads do not align with blocks
WIDE = dict(base.GLM, hidden_size=160, q_lora_rank=136, kv_lora_rank=136, intermediate_size=192, moe_intermediate_size=48,
            n_routed_experts=4, num_hidden_layers=2, mlp_layer_types=["dense", "sparse"], indexer_types=["full", "full"],
            vocab_size=128)
INTERLEAVED = {"rope_interleave": True, "indexer_rope_interleave": True, "head_dim": 24}
GLM52 = ["*self_attn*", "*mlp.gate", "*lm_head", "*mlp.gate_proj", "*mlp.up_proj", "*mlp.down_proj", "*layers.4.*"]

# name: committed BF16 checkpoint it is made of (None: WIDE), how, modules that stay as they are, modules in FP8
MODELS = {
    # the published recipe: routed and shared experts only, the MTP layer excluded
    "glm-mxfp4": ("glm-shared", "quark", GLM52),
    # everything that can be: attention, indexer, dense MLP, experts; shards
    "glm-mxfp4-all": ("glm-mixed", "quark", ["*lm_head", "*mlp.gate"]),
    "qwen3-mxfp4": ("qwen3-tied", "quark", []),
    # a tied embedding in 8 bits
    "qwen3-mxfp4-fp8": ("qwen3-tied", "quark", [], ["model.embed_tokens"]),
    # head, embedding and attention (with kv_b) in 8 bits
    "glm-mxfp4-fp8": ("glm-shared", "quark", ["*mlp.gate", "*indexer*", "*layers.4.*"],
                      ["lm_head", "model.embed_tokens", "model.layers.[0-3].self_attn.*_proj*"]),
    "glm-fp8": (None, "fp8",
                # as published: the indexer's entry has a name that no module has
                ["lm_head", "model.layers.1.mlp.gate", "model.layers.0.self_attn.indexers_proj",
                 "model.layers.1.self_attn.indexers_proj"]),
}
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def quark(source, target, exclude):
    import quark.torch  # noqa: F401
    from quark.torch.quantization.config.config import OCP_MXFP4Spec, QConfig, QLayerConfig
    from quark.torch.quantization.file2file_quantization import quantize_model_per_safetensor
    spec = {d: OCP_MXFP4Spec(ch_axis=-1, is_dynamic=d).to_quantization_spec() for d in (False, True)}
    config = QConfig(global_quant_config=QLayerConfig(weight=spec[False], input_tensors=spec[True]), exclude=exclude)
    quantize_model_per_safetensor(str(source), config, str(target), device="cpu")
    import importlib.metadata
    return {"amd-quark": importlib.metadata.version("amd-quark")}


def fp8_blocks(w):
    """e4m3 codes and the scale of each block of 128 x 128."""
    n, k = w.shape
    blocks = -(-n // 128), -(-k // 128)
    wide = torch.zeros(blocks[0] * 128, blocks[1] * 128)
    wide[:n, :k] = w.float()
    tiles = wide.view(blocks[0], 128, blocks[1], 128)
    scale = tiles.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    codes = (tiles / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(blocks[0] * 128, blocks[1] * 128)[:n, :k].contiguous(), scale


def quark_fp8_layer():
    """What Quark writes into layer_quant_config for e4m3 in blocks."""
    from quark.torch.quantization.config.config import QLayerConfig, QTensorConfig
    from quark.torch.quantization.config.type import Dtype, QSchemeType, RoundType, ScaleType
    from quark.torch.quantization.observer import PerBlock2DMinMaxObserver
    weight = QTensorConfig(dtype=Dtype.fp8_e4m3, is_dynamic=False, observer_cls=PerBlock2DMinMaxObserver, symmetric=True,
                           qscheme=QSchemeType.per_block, block_size=[128, 128], round_method=RoundType.half_even,
                           scale_type=ScaleType.float)
    return QLayerConfig(weight=weight).to_dict()


def quark_and_fp8(source, target, exclude, globs):
    versions = quark(source, target, exclude + globs)
    for file in target.glob("*.safetensors"):
        out = {}
        for name, w in load_file(file).items():
            out[name] = w
            if w.dim() == 2 and any(fnmatch.fnmatch(name.removesuffix(".weight"), g) for g in globs):
                out[name], out[name + "_scale_inv"] = fp8_blocks(w)
        save_file(out, file, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    q = config["quantization_config"]
    q["exclude"] = [m for m in q["exclude"] if not any(fnmatch.fnmatch(m, g) for g in globs)]
    q["layer_quant_config"] = {g: quark_fp8_layer() for g in globs}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return versions


def fp8(source, target, exclude):
    tensors, out = load_file(source / "model.safetensors"), {}
    for name, w in tensors.items():
        module = name.removesuffix(".weight")
        out[name] = w
        if not (w.dim() != 2 or "embed_tokens" in name or "weights_proj" in name or module in exclude):
            out[name], out[name + "_scale_inv"] = fp8_blocks(w)
    target.mkdir()
    save_file(out, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                     "weight_block_size": [128, 128], "modules_to_not_convert": exclude}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(source / "generation_config.json", target)
    return {}


def decode(tensors):
    """Float32 values of every tensor, by torch."""
    out = {}
    for name, w in tensors.items():
        if name.endswith(("_scale", "_scale_inv")):
            continue
        if w.dtype == torch.uint8:
            codes = torch.stack([w & 15, w >> 4], dim=-1).flatten(-2).long()
            value = torch.tensor(E2M1 + [-v for v in E2M1])[codes]
            scale = torch.exp2(tensors[name + "_scale"].float() - 127)
            out[name] = value * scale.repeat_interleave(32, dim=-1)
        elif w.dtype == torch.float8_e4m3fn:
            scale = tensors[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            out[name] = w.float() * scale[: w.shape[0], : w.shape[1]]
        else:
            out[name] = w.float()
    return out


def wide(path):
    model = transformers.GlmMoeDsaForCausalLM(transformers.GlmMoeDsaConfig(**WIDE)).eval().float()
    base.randomize(model, 8008)
    model.bfloat16().save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config.update(INTERLEAVED, dtype="bfloat16")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def all_tensors(path):
    out = {}
    for file in sorted(path.glob("*.safetensors")):
        out |= load_file(file)
    return out


def reference(path, plain):
    """The class that transformers makes, loaded by its own rules from the decoded checkpoint."""
    values = {k: v.contiguous() for k, v in decode(all_tensors(path)).items()}
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config")
    config["dtype"] = "float32"
    (plain / "config.json").write_text(json.dumps(config))
    if "index_topk" in config:
        glm.apply_rotary_pos_emb_interleave = base.rope_pairs(config["rope_interleave"],
                                                              config["indexer_rope_interleave"])
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager", dtype=torch.float32)
    return model.eval(), config.get("index_topk", 0)


def make(name):
    source, how, exclude, *globs = MODELS[name]
    path = base.HERE / "models" / name
    shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temp:
        if source is None:
            wide(pathlib.Path(temp))
        folder = base.HERE / "models" / source if source else pathlib.Path(temp)
        make_it = quark_and_fp8 if globs else quark if how == "quark" else fp8
        versions = make_it(folder, path, exclude, *globs)
    if len(list(path.glob("*.safetensors"))) == 1:
        (path / "model.safetensors.index.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as temp:
        model, topk = reference(path, pathlib.Path(temp))
    base.golden(model, name, path, (7, 100), topk, steps=32)
    golden = base.HERE / name / "golden.json"
    doc = json.loads(golden.read_text())
    doc["made_by"].update(versions)
    golden.write_text(json.dumps(doc, indent=1) + "\n")
    for f in [*path.iterdir(), *(base.HERE / name).iterdir()]:
        f.chmod(0o644)
    print(name, sum(f.stat().st_size for f in path.iterdir()), "bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for which in sys.argv[1:] or MODELS:
        make(which)
