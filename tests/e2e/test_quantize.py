# SPDX-License-Identifier: Apache-2.0
"""`tandem quantize` writes, byte for byte, the tensors that AMD Quark (FP8: torch) wrote from the same checkpoint; what it
writes loads; bad input ends in a sentence and leaves nothing behind."""
import pathlib, struct, subprocess, sys, tempfile
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

MODELS = ROOT / "tests/goldens/models"
TEMP = pathlib.Path(tempfile.mkdtemp(prefix="td_quantize_"))


def tandem(*args):
    return subprocess.run([TANDEM, *map(str, args)], capture_output=True, text=True, timeout=120 * SLOW)


def tensors(folder):
    out = {}
    for f in sorted(folder.glob("*.safetensors")):
        data = f.read_bytes()
        n, = struct.unpack("<Q", data[:8])
        for name, t in json.loads(data[8:8 + n]).items():
            if name != "__metadata__":
                a, b = t["data_offsets"]
                out[name] = (t["dtype"], t["shape"], data[8 + n + a:8 + n + b])
    return out


def same_as_quark(source, golden, *args):
    out = TEMP / golden
    r = tandem("quantize", MODELS / source, out, *args)
    check(r.returncode == 0, r.stderr)
    ours, theirs = tensors(out), tensors(MODELS / golden)
    check(ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys())
    differ = [k for k in ours if ours[k] != theirs[k]]
    check(not differ and sum(t[0] == "U8" for t in ours.values()) > 20, differ)
    a, b = (json.loads((d / "config.json").read_text())["quantization_config"] for d in (out, MODELS / golden))
    check(a["exclude"] == b["exclude"], (a["exclude"], b["exclude"]))
    for key, value in a["global_quant_config"]["weight"].items():
        check(b["global_quant_config"]["weight"][key] == value, key)
    check(list(a["layer_quant_config"]) == list(b["layer_quant_config"]), a["layer_quant_config"])
    for glob, layer in a["layer_quant_config"].items():
        for key, value in layer["weight"].items():
            check(b["layer_quant_config"][glob]["weight"][key] == value, (glob, key))


def refused(named, *args):
    r = tandem("quantize", *args)
    check(r.returncode != 0 and named in r.stderr, (args, r.returncode, r.stderr))


same_as_quark("glm-shared", "glm-mxfp4")
same_as_quark("glm-mixed", "glm-mxfp4-all", "--exclude", "*lm_head,*mlp.gate")
same_as_quark("glm-shared", "glm-mxfp4-fp8", "--exclude", "*mlp.gate,*indexer*,*layers.{mtp}.*",
              "--fp8", "lm_head,model.embed_tokens,model.layers.[0-3].self_attn.*_proj*")
same_as_quark("qwen3-tied", "qwen3-mxfp4-fp8", "--exclude", "*lm_head", "--fp8", "model.embed_tokens")
print("tensors equal Quark's byte for byte")

fp8, report = TEMP / "fp8", TEMP / "report.csv"
r = tandem("quantize", ROOT / "models/glm-tiny", fp8, "--format", "fp8", "--report", report)
check(r.returncode == 0 and "mlp.experts.up_proj" in r.stdout, r.stderr)
rows = [line.split(",") for line in report.read_text().splitlines()[1:]]
check(len(rows) > 150 and all(0.02 < float(row[2]) < 0.04 for row in rows), rows[:2])  # e4m3: 2^-4 / sqrt(3) at most
for model in (fp8, TEMP / "glm-mxfp4"):
    r = tandem("profile", model)
    check(r.returncode == 0 and "weights.experts=" in r.stdout, r.stderr)
for model in ("glm-mxfp4-fp8", "qwen3-mxfp4-fp8"):
    r = tandem("profile", TEMP / model)
    check(r.returncode == 0 and "weights.embed=fp8\n" in r.stdout and "weights.head=fp8\n" in r.stdout
          and "weights.dense=mxfp4\n" in r.stdout, r.stdout + r.stderr)


def repeat_head(folder, spoil):
    """Some exporters write the tied matrix twice."""
    out, data = {}, b""
    for name, (dtype, shape, raw) in tensors(TEMP / "qwen3-mxfp4-fp8").items():
        for n in [name] + [name.replace("model.embed_tokens", "lm_head")] * ("embed_tokens" in name):
            raw = raw if n == name or spoil not in n else raw[:-1] + bytes([raw[-1] ^ 1])
            out[n] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
    header = json.dumps(out).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (folder / "config.json").write_text((TEMP / "qwen3-mxfp4-fp8/config.json").read_text())
    return tandem("profile", folder)


r = repeat_head(TEMP / "twice", "nothing")
check(r.returncode == 0, r.stderr)
r = repeat_head(TEMP / "twice", "_scale_inv")
check(r.returncode != 0 and "lm_head.weight_scale_inv differs" in r.stderr, r.stderr)

refused("quantization_config already", TEMP / "glm-mxfp4", TEMP / "x")
refused("does not exist", MODELS / "qwen3", fp8)
refused("matches no linear module", MODELS / "qwen3", TEMP / "x", "--exclude", "*nonsense*")
refused("nothing is left to quantise", MODELS / "qwen3", TEMP / "x", "--exclude", "*_proj,*lm_head")
refused("--fp8 lm_head matches no matrix", MODELS / "qwen3-tied", TEMP / "x", "--fp8", "lm_head")
refused("FP8 beside MXFP4", MODELS / "qwen3", TEMP / "x", "--format", "fp8", "--fp8", "lm_head")
refused("mlp.gate is a router", MODELS / "glm-shared", TEMP / "x", "--exclude", "*lm_head")
refused("mlp.gate is a router", MODELS / "glm-shared", TEMP / "x", "--fp8", "*mlp*")
refused("config.json", TEMP / "nowhere", TEMP / "x")
refused("format must be one of", MODELS / "qwen3", TEMP / "x", "--format", "int3")
refused("new directory", MODELS / "qwen3")
narrow = TEMP / "narrow"  # rows of 24 values cannot be cut into groups of 32
narrow.mkdir()
(narrow / "config.json").write_text((MODELS / "qwen3-tied/config.json").read_text())
header = json.dumps({"model.layers.0.mlp.experts.0.up_proj.weight": {"dtype": "BF16", "shape": [2, 24],
                                                          "data_offsets": [0, 96]}}).encode()
(narrow / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(96))
refused("not a multiple of 32; exclude module model.layers.0.mlp.experts.0.up_proj", narrow, TEMP / "x")
(narrow / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\xff\x7f" * 48)
refused("not finite", narrow, TEMP / "x", "--format", "fp8")
check(not (TEMP / "x").exists(), "a failed run left its directory")
subprocess.run(["rm", "-r", TEMP], check=True)
print("ok")
