# SPDX-License-Identifier: Apache-2.0
"""`tandem eval` counts what transformers counts: log loss, KL and agreement on a text (tests/goldens/eval), and the right
answers of models/eval, problem set by problem set."""
import pathlib, subprocess, sys, tempfile
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

GOLDEN = ROOT / "tests/goldens/eval"
F32 = ["--act", "f32", "--kv", "f32", "--index", "f32"]
TEMP = pathlib.Path(tempfile.mkdtemp(prefix="td_eval_"))


def tandem(*args, code=0):
    r = subprocess.run([TANDEM, *map(str, args)], capture_output=True, text=True, timeout=240 * SLOW)
    check(r.returncode == code, (args, r.returncode, r.stderr))
    return r.stdout if code == 0 else r.stderr


def row(out, name):
    line = next(x for x in out.splitlines() if x.startswith(name))
    return [float(x) for x in re.findall(r"[-+]?\d+\.\d+", line[24:])]


golden = json.loads((GOLDEN / "expected.json").read_text())
small = TEMP / "mxfp4"
tandem("quantize", MODEL, small)
out = tandem("eval", small, "--base", MODEL, "--text", GOLDEN / "text.txt", "--window", golden["window"], *F32)
print(out)
loss = row(out, "log loss")
check(abs(loss[0] - golden["base_loss"]) < 2e-4 and abs(loss[1] - golden["loss"]) < 2e-4, (loss, golden))
check(abs(row(out, "KL")[0] - golden["kl"]) < 1e-5, golden)
check(abs(row(out, "top-1")[0] - 100 * golden["agree"]) < 0.01 and f"({golden['tokens']} tokens)" in out, golden)
out = tandem("eval", MODEL, "--base", MODEL, "--text", GOLDEN / "text.txt")
check(row(out, "KL")[0] == 0 and row(out, "top-1")[0] == 100 and row(out, "log loss")[2] == 0, out)

# four problems of each skill: what transformers answered right is what is right here (committed with the answers)
EVAL = ROOT / "models/eval"
answers = {a["id"]: a for a in json.load(open(EVAL / "answers-f32.json"))["answers"]}
some, right, seen = [], {}, {}
for line in open(EVAL / "heldout.jsonl"):
    p = json.loads(line)
    seen[p["skill"]] = seen.get(p["skill"], 0) + 1
    if seen[p["skill"]] <= 4 and "field-long" not in p["skill"]:
        some.append(line)
        right[p["skill"]] = right.get(p["skill"], 0) + answers[p["id"]]["right"]
(TEMP / "some.jsonl").write_text("".join(some))
out = tandem("eval", MODEL, "--problems", TEMP / "some.jsonl", *F32)
for skill, n in right.items():
    check(row(out, f"{skill}, % of 4")[0] == 25.0 * n, (skill, n, out))

check("nothing to do" in tandem("eval", MODEL, code=2), "no text, no problems")
bad = TEMP / "bad.jsonl"
bad.write_text("\n")
check("no problems in it" in tandem("eval", MODEL, "--problems", bad, code=1), "an empty set")
bad.write_text('{"skill": "add", "question": "?"}\n')
check("bad.jsonl:1: skill, question or answer" in tandem("eval", MODEL, "--problems", bad, code=1), "a field is missing")
check("tokenizer.json" in tandem("eval", MODEL, "--base", ROOT / "tests/goldens/models/qwen3", "--text", bad, code=1),
      "a baseline without tokenizer")
subprocess.run(["rm", "-r", TEMP], check=True)
print("ok")
