# SPDX-License-Identifier: Apache-2.0
"""Writes formats/formats.json: what torch and amd-quark make of small floating-point formats.

    python3 tests/goldens/make_formats.py

e4m3: values of the 256 codes (NaN as null) and codes of float32 inputs, by torch. mx: groups of 32 values with the
scale and the codes that Quark's file-to-file quantiser gives them.
"""
import json
import pathlib
import struct
import tempfile

import torch
from safetensors.torch import load_file, save_file

import make_quantized

HERE = pathlib.Path(__file__).resolve().parent


def bits(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def e4m3():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    gen = torch.Generator().manual_seed(3)
    x = torch.cat([values[~values.isnan()], (values[:-1] + values[1:]).nan_to_num() / 2,
                   torch.randn(256, generator=gen) * torch.exp2(torch.randint(-12, 8, (256,), generator=gen).float())])
    x = x.clamp(-448, 448)
    codes = x.to(torch.float8_e4m3fn).view(torch.uint8)
    return {"values": [None if v != v else v for v in values.tolist()],
            "inputs": [bits(v) for v in x.tolist()], "codes": codes.tolist()}


def mx():
    gen = torch.Generator().manual_seed(4)
    x = torch.randn(64, 32, generator=gen) * torch.exp2(torch.randint(-20, 20, (64, 1), generator=gen).float())
    x[0] = 0.0
    x[1, :] = torch.linspace(-8, 8, 32)  # ties at every border
    x[2, :] = torch.linspace(-3.5, 3.5, 32)
    x[3, 0], x[3, 1:] = 1.75, 0.25  # the border of the rule "even"
    x[4, 0], x[4, 1:] = 1.7421875, 0.125
    x = x.bfloat16()
    with tempfile.TemporaryDirectory() as temp:
        source, target = pathlib.Path(temp) / "a", pathlib.Path(temp) / "b"
        source.mkdir()
        save_file({"model.layers.0.mlp.up_proj.weight": x}, source / "model.safetensors", {"format": "pt"})
        (source / "config.json").write_text(json.dumps({"model_type": "qwen3", "dtype": "bfloat16"}))
        version = make_quantized.quark(source, target, [])
        out = load_file(next(target.glob("*.safetensors")))
    codes, scale = out["model.layers.0.mlp.up_proj.weight"], out["model.layers.0.mlp.up_proj.weight_scale"]
    return {"inputs": [[bits(v) for v in row] for row in x.float().tolist()], "codes": codes.tolist(),
            "scales": scale.flatten().tolist()}, version


if __name__ == "__main__":
    groups, version = mx()
    folder = HERE / "formats"
    folder.mkdir(exist_ok=True)
    doc = {"made_by": {"torch": torch.__version__, **version}, "e4m3": e4m3(), "mx": groups}
    (folder / "formats.json").write_text(json.dumps(doc) + "\n")
