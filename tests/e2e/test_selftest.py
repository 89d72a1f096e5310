# SPDX-License-Identifier: Apache-2.0
"""tandem selftest, check and tune: every check passes on the CPU; without a GPU the error says what is missing; on a stand-in for the
driver that runs the kernels in an emulation the selftest drives a real start, and a table made for a model silences what is untuned."""
import json, pathlib, re, shutil, struct, sys
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

DRIVER = pathlib.Path(os.environ.get("TD_BINARY_DIR", ROOT / "build/release")) / "tests/fake_emulated"
GLM = ROOT / "bench/shapes/glm-5.2"
HEADER = "arch,cus,op,rows,n,k,heads,slices,dtype,experts,top_k,share,variant,us,error\n"


def tandem(*args, env=None, timeout=300):
    p = subprocess.run([TANDEM, *map(str, args)], capture_output=True, text=True, timeout=timeout * SLOW, env={**os.environ, **(env or {})})
    return p.returncode, p.stdout, p.stderr


def on_the_cpu():
    code, out, err = tandem("selftest", "--isa", "ref")
    check(code == 0 and re.search(r"\nPASS: \d+ passed, 0 failed, 5 not on this device\n$", out), out + err)
    check(len(re.findall(r"^scaled .* not on this device$", out, re.M)) == 5 and "no scaled matrix instruction" in out, out)
    for line in ("kv      FP8 rows are written to the bit", "gemm    FP8 and MXFP4 weights match float64", "share   GLM-5.2's experts with the widths of 1, 4 and 8 ranks",
                 "golden  logits and bytes of a model, bf16", "processor "):
        check(line in out, f"{line}\n{out}")
    code, out, err = tandem("selftest", ROOT / "tests/goldens/models/qwen3-mxfp4", "--isa", "auto")
    check(code == 0 and "FAIL" not in out, out + err)
    check("qwen3-mxfp4, against the reference kernels: it holds no golden.json" in out, out)
    code, out, err = tandem("selftest", "/nonexistent", "--isa", "ref")
    check(code == 1 and "FAIL: " in out and "/nonexistent" in out, out + err)


def against_transformers():
    """A golden folder: its checkpoint is found, ids and logits are compared, and a golden that says otherwise fails."""
    golden = ROOT / "tests/goldens/qwen3-mxfp4"
    code, out, err = tandem("selftest", golden, "--isa", "avx2")
    if "lacks it" in err:
        return
    check(code == 0 and "models/qwen3-mxfp4, computed by transformers " in out and "reference kernels" not in out, out + err)
    found = re.findall(r"^golden  .*: (\d+) ids, (\d+) rows, \d+ near ties, (f32|bf16 with int8 operands|bf16) .* PASS$", out, re.M)
    check(len(found) == 6 and {k for _, _, k in found} == {"f32", "bf16", "bf16 with int8 operands"}, out)
    check(all(int(ids) > 0 and int(rows) > 0 for ids, rows, _ in found), out)
    with tempfile.TemporaryDirectory() as tmp:
        model = pathlib.Path(tmp, "model")
        shutil.copytree(ROOT / "tests/goldens/models/qwen3-mxfp4", model)
        shutil.copy(golden / "golden.json", model)
        data = bytearray((golden / "golden.safetensors").read_bytes())
        n = int.from_bytes(data[:8], "little")
        header = json.loads(data[8:8 + n])
        at = 8 + n + header["1.logits"]["data_offsets"][0]
        data[at:at + 4] = struct.pack("<f", struct.unpack("<f", data[at:at + 4])[0] + 100)
        (model / "golden.safetensors").write_bytes(data)
        code, out, err = tandem("selftest", model, "--isa", "avx2")
        check(code == 1 and "logits are off by" in out and re.search(r"\nFAIL: \d+ passed, 3 failed", out), out + err)
        (model / "golden.json").write_text((golden / "golden.json").read_text().replace('"n_tokens": 32', '"n_tokens": 31'))
        code, out, err = tandem("selftest", model, "--isa", "avx2")
        check(code == 1 and "golden.safetensors: tensor 0.ids is not I32" in out, out + err)
        (model / "golden.json").write_text("{}")
        code, out, err = tandem("selftest", model, "--isa", "avx2")
        check(code == 1 and "golden.json: model is missing" in err, out + err)


def without_a_gpu():
    code, _, err = tandem("tune", GLM)
    check(code == 2 and "the CPU's kernels have one launch plan" in err, err)
    for command in (("selftest",), ("tune", GLM), ("check", GLM)):
        code, _, err = tandem(*command, "--device", "hip")
        if code == 0:
            print("this machine has a GPU: errors without one are not seen")
            return
        check(code == 1 and ("no AMD driver" in err or "no device" in err or "holds no kernels" in err), err)


def what_is_untuned():
    code, out, err = tandem("check", GLM)
    check(code == 0 and out.count("launches of up to 512 rows without a tuned plan") == 3, out + err)
    check("moe n=2048 k=6144 heads=1 slices=8 dtype=mxfp4 experts=256 top_k=8 share=tp1: untuned for rows 1 2 4 8" in out, out)
    check(tandem("check", GLM, "--strict")[0] == 1, "--strict does not fail")
    code, out, err = tandem("check", GLM, "--act-mxfp4", "fp8")
    check(code == 0 and out.count("refuses --act-mxfp4 fp8") == 2 and "dtype=mxfp4_fp8 experts=256" in out and "dtype=mxfp4 " not in out, out + err)


def table_of(out):
    """A table that has every shape that check named."""
    rows = []
    for m in re.finditer(r"^  (\w+) n=(\d+) k=(\d+) heads=(\d+) slices=(\d+) dtype=(\w+) experts=(\d+) top_k=(\d+) share=(\w+): untuned for rows ([\d ]+)$",
                         out, re.M):
        op, n, k, heads, slices, dtype, experts, top_k, share, counts = m.groups()
        rows += [f"gfx942,1,{op},{r},{n},{k},{heads},{slices},{dtype},{experts},{top_k},{share},few,1.000,0.000e+00\n" for r in counts.split()]
    check(rows, out)
    return HEADER + "".join(rows)


def in_the_emulation():
    env = {"LD_LIBRARY_PATH": str(DRIVER)}
    code, out, err = tandem("selftest", "--device", "hip", "--no-probe", env=env)
    first = out
    if "holds no kernels" in err:
        print("no code objects were built (clang++-22): no selftest through a driver")
        return
    check(code == 0 and re.search(r"\nPASS: \d+ passed, 0 failed, \d+ not on this device\n$", out), out + err)
    code, out, err = tandem("selftest", ROOT / "tests/goldens/glm-mxfp4", "--device", "hip", "--no-probe", env=env)
    check(code == 0 and len(re.findall(r"^golden  .*, (?:f32|bf16)[, ].* PASS$", out, re.M)) == 4, out + err)
    for line in ("device       emulation", "architecture gfx942, 1 compute units, waves of 64 lanes", "code object  gfx942, "):
        check(line in first, f"{line}\n{first}")
    with tempfile.TemporaryDirectory() as tmp:
        model = f"{tmp}/model"
        subprocess.run([TANDEM, "model", "random", ROOT / "tests/goldens/models/glm-shared/config.json", model], check=True, stdout=subprocess.DEVNULL)
        code, out, err = tandem("tune", model, "--device", "hip", "--rows", "1", "--repeats", "1", "--out", tmp, env=env)
        check(code == 1 and "time between events" in err, out + err)  # an emulation has no clock
        for words, dtype in (((), "mxfp4"), (("--act-mxfp4", "fp8"), "mxfp4_fp8")):
            code, out, err = tandem("check", ROOT / "tests/goldens/models/glm-mxfp4", "--device", "hip", *words, env=env)
            check(code == 0 and {"mxfp4", "mxfp4_fp8"} & set(re.findall(r"dtype=(\w+)", out)) == {dtype}, out + err)
        worker = ("prefill-worker", "--model", model, "--device", "hip", "--control", f"ipc://{tmp}/c.sock", "--kv-blocks", "8", "--strict",
                  "--max-seqs", "1", "--chunk", "16")
        code, _, err = tandem(*worker, env=env)
        check(code == 1 and "launches have no tuned plan for gfx942 with 1 compute units (the first: gemm rows=1 " in err, err)
        code, out, err = tandem("check", model, "--device", "hip", "--strict", env=env)
        check(code == 1, out + err)
        table = pathlib.Path(tmp, "gfx942.csv")
        table.write_text(table_of(out))
        code, out, err = tandem("check", model, "--device", "hip", "--strict", "--tuned", tmp, env=env)
        check(code == 0 and ": 0 launches of up to 512 rows without" in out, out + err)
        os.environ["LD_LIBRARY_PATH"] = str(DRIVER)
        options = ("--device", "hip", "--chunk", "16", "--kv-blocks", "8", "--max-seqs", "2", "--request-timeout", "900")
        body = {"prompt": "It was a bright cold day", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        answers = []
        for more in ((), ("--tuned", tmp)):
            with Server(*options, *more, model=model) as s:
                answers.append(s.json("POST", "/v1/completions", body)["choices"][0]["text"])
                log = s.messages()
            named = re.findall(r'event=untuned shape="([^"]*)"', log)
            if more:
                check(not named, log)
            else:  # each worker names each shape once
                check(named and max(map(named.count, named)) <= 2, log)
        check(answers[0] == answers[1], "a table changed tokens")
        table.write_text(HEADER + "gfx942,1,gemm,3,8,8,1,1,bf16,0,0,tp1,few,1,0\n")
        code, _, err = tandem(*worker, "--tuned", tmp, env=env)
        check(code == 1 and "gfx942.csv: line 2, field rows: '3' is not a power of two" in err, err)


on_the_cpu()
against_transformers()
without_a_gpu()
what_is_untuned()
if DRIVER.is_dir():
    in_the_emulation()
