# SPDX-License-Identifier: Apache-2.0
"""Writes eval/expected.json: log loss of models/glm-tiny on eval/text.txt, and KL and agreement against an MXFP4 copy's
decoded weights, by transformers in float32.

    python3 tests/goldens/make_eval.py

Windows of index_topk ids: beyond it torch.topk breaks the index scores' exact ties by chance. Needs what
make_quantized.py needs. To be made again whenever models/glm-tiny changes.
"""
import json
import pathlib
import tempfile

import torch
import transformers

import make_quantized

HERE = pathlib.Path(__file__).resolve().parent
MODEL = HERE.parent.parent / "models/glm-tiny"
WINDOW, EXCLUDE = 64, [p.replace("4", "6") if "layers.4" in p else p for p in make_quantized.GLM52]


@torch.no_grad()
def windows(model, ids):
    for at in range(0, len(ids) - 1, WINDOW):
        part = torch.tensor([ids[at:at + WINDOW]])
        yield part[0, 1:], model(part, use_cache=False).logits[0, :-1].log_softmax(-1).double()


if __name__ == "__main__":
    text = (HERE / "eval/text.txt").read_text()
    ids = transformers.AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False)["input_ids"]
    base = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        path = pathlib.Path(a) / "q"
        make_quantized.quark(MODEL, path, EXCLUDE)
        small, _ = make_quantized.reference(path, pathlib.Path(b))
        n = nll = small_nll = kl = agree = 0
        for (want, p), (_, q) in zip(windows(base.eval(), ids), windows(small, ids)):
            n += len(want)
            nll -= p.gather(1, want[:, None]).sum().item()
            small_nll -= q.gather(1, want[:, None]).sum().item()
            kl += (p.exp() * (p - q)).sum().item()
            agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
    doc = {"window": WINDOW, "tokens": n, "base_loss": nll / n, "loss": small_nll / n, "kl": kl / n, "agree": agree / n,
           "made_by": {"torch": torch.__version__, "transformers": transformers.__version__}}
    (HERE / "eval/expected.json").write_text(json.dumps(doc, indent=1) + "\n")
