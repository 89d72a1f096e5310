# SPDX-License-Identifier: Apache-2.0
"""--device hip with whole processes, on a stand-in for the driver that runs the kernels in an emulation: blocks leave one device's
memory and enter another's, and no token changes; a worker on another device is refused with the reason. 77 = no GPU kernels."""
import pathlib, sys, threading, urllib.request
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

DRIVER = pathlib.Path(os.environ.get("TD_BINARY_DIR", ROOT / "build/release")) / "tests/fake_emulated"
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 2
BODIES = [{"prompt": TEXT, "max_tokens": 4, "temperature": 1.0, "seed": 5, "ignore_eos": True, "n": 2, "logprobs": 1},
          {"prompt": TEXT + TEXT[:40], "max_tokens": 3, "temperature": 0, "ignore_eos": True}]


def answers(s):
    out = []
    for b in BODIES:
        a = s.json("POST", "/v1/completions", b)
        out.append([(c["index"], c["text"], c["finish_reason"], c["logprobs"]) for c in a["choices"]])
    return out


# Streams that come and go at different steps.
STREAMS = [{"prompt": TEXT[:50 + 9 * i], "max_tokens": 5 + 3 * i, "temperature": 1.0, "seed": i, "ignore_eos": True,
            "frequency_penalty": i} for i in range(3)]


def steps_are_begun_ahead(s, port):
    text = lambda b: s.json("POST", "/v1/completions", b)["choices"][0]["text"]
    counted = lambda: [int(re.search(rf"^tandem_decode_steps_{w}_total (\d+)", page, re.M).group(1)) for w in ("ahead", "waited")
                       for page in [urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()]]
    want = [text({**b, "logprobs": 1}) for b in STREAMS]
    alone = counted()
    check(alone[0] > sum(b["max_tokens"] - 3 for b in STREAMS), f"no step was begun ahead: {alone}")
    got = [None] * len(STREAMS)

    def ask(i):
        got[i] = text(STREAMS[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(STREAMS))]
    dropped = s.stream("/v1/completions", {**STREAMS[2], "max_tokens": 200})
    next(iter(dropped))
    for t in threads:
        t.start()
        time.sleep(0.1)
    dropped.close()
    for t in threads:
        t.join()
    check(got == want, f"tokens depend on who comes and goes: {got} {want}")
    check(counted()[0] > alone[0] + 5, f"no step was begun ahead: {alone} {counted()}")


def free_port():
    with socket.socket() as k:
        k.bind(("127.0.0.1", 0))
        return k.getsockname()[1]


def main():
    if not DRIVER.is_dir():
        skip("no emulation was built (a C++ compiler)")
    os.environ["LD_LIBRARY_PATH"] = str(DRIVER)
    with tempfile.TemporaryDirectory() as tmp:
        model = f"{tmp}/model"
        subprocess.run([TANDEM, "model", "random", ROOT / "tests/goldens/models/glm-shared/config.json", model], check=True,
                       stdout=subprocess.DEVNULL)
        p = subprocess.run([TANDEM, "profile", model, "--device", "hip"], capture_output=True, text=True, timeout=60 * SLOW)
        if "holds no kernels" in p.stderr:
            skip("no code objects were built (clang++-22)")
        check(p.returncode == 0 and "device hip: emulation" in p.stderr and "isa=gfx942" in p.stdout, p.stdout + p.stderr)
        options = ("--device", "hip", "--chunk", "64", "--kv-blocks", "24", "--max-seqs", "4", "--log-level", "info", "--request-timeout", "900")
        with Server(*options, "--local-prefill-tokens", "65536", model=model) as s: # nothing leaves a device
            want = answers(s)
        port = free_port()
        os.environ["TANDEM_DECODE_METRICS_LISTEN"] = f"127.0.0.1:{port}"
        with Server(*options, model=model) as s:
            steps_are_begun_ahead(s, port)
            check(answers(s) == want, "a handoff between devices changed tokens")
            check(s.messages().count("event=device ") == 2, s.messages())
            check('transport=zmq why="our pool is in a device' in s.messages(), s.messages())
            check("kv_shm_fallback" not in s.messages(), s.messages())
        del os.environ["TANDEM_DECODE_METRICS_LISTEN"]
        control = f"ipc://{tmp}/control.sock"
        router = subprocess.Popen([TANDEM, "router", "--model", model, "--control", control, "--listen", "127.0.0.1:0"],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        common = ("--model", model, "--control", control, "--kv-blocks", "8", "--max-seqs", "2")
        workers = [subprocess.Popen([TANDEM, "prefill-worker", *common, "--device", "hip", "--name", "p"], stderr=subprocess.DEVNULL)]
        time.sleep(2 * SLOW)
        workers.append(subprocess.Popen([TANDEM, "decode-worker", *common, "--kv-listen", f"ipc://{tmp}/kv.sock", "--name", "d"],
                                        stderr=subprocess.DEVNULL))
        time.sleep(2 * SLOW)
        for w in [router, *workers]:
            w.terminate()
        log = router.communicate(timeout=60 * SLOW)[1]
        for w in workers:
            w.wait(60 * SLOW)
        check("backend=hip isa=gfx942" in log and "backend=cpu" in log and "--device" in log, log)


main()
