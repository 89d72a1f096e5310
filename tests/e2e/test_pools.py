# SPDX-License-Identifier: Apache-2.0
"""Several workers of each role; they join and leave while requests run; TCP as well as Unix sockets. Output does not depend on
which workers served a request. Promises 1 and 2."""
import pathlib, sys, threading
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

BODY = {"messages": [{"role": "user", "content": "What is 44 plus 17?"}], "temperature": 1.0, "seed": 11, "max_tokens": 40}


def answer(s):
    out, _, error = s.stream("/v1/chat/completions", BODY).collect()
    check(error is None, error)
    return out


def dial(kind, control, tmp, i):
    args = [TANDEM, kind, "--model", MODEL, "--control", control, "--log-level", "warn", "--name", f"extra-{kind}-{i}"]
    if kind == "decode-worker":
        args += ["--kv-listen", f"ipc://{tmp}/kv{i}.sock"]
    return subprocess.Popen(args, stderr=subprocess.DEVNULL)


def control_endpoint(s):
    args = cmdline(s.pids()["router"][0])
    return next(a.split("=", 1)[1] for a in args if a.startswith("--control="))


def n_workers(s):
    h = json.loads(s.request("GET", "/health")[2])
    return h.get("prefill_workers", 0), h.get("decode_workers", 0)


def wait_workers(s, want):
    end = time.monotonic() + 20 * SLOW
    while n_workers(s) != want:
        check(time.monotonic() < end, f"workers {n_workers(s)}, expected {want}")
        time.sleep(0.02)


def join_and_leave_under_load():
    with Server() as s, tempfile.TemporaryDirectory() as tmp:
        expected, problems, stop = answer(s), [], threading.Event()

        def client():
            while not stop.is_set():
                try:
                    if answer(s) != expected:
                        problems.append("other tokens")
                except Exception as e:
                    problems.append(repr(e))

        threads = [threading.Thread(target=client) for _ in range(6)]
        for t in threads:
            t.start()
        control = control_endpoint(s)
        extra = [dial(k, control, tmp, i) for i, k in enumerate(("prefill-worker", "decode-worker", "decode-worker"))]
        try:
            wait_workers(s, (2, 3))
            time.sleep(1)
            for p in extra:  # SIGTERM: they finish what they have, then leave
                p.terminate()
            for p in extra:
                check(p.wait(40 * SLOW) == 0, "a draining worker ended badly")
            wait_workers(s, (1, 1))
            time.sleep(0.3)
        finally:
            stop.set()
            for t in threads:
                t.join()
            for p in extra:
                p.kill()
        check(not problems, problems[:3])


def tcp_equals_ipc():
    with Server() as a:
        one = answer(a)
    with Server("--link", "tcp", "--prefill", "2", "--decode", "2") as b:
        wait_workers(b, (2, 2))
        check(all(answer(b) == one for _ in range(6)), "tokens depend on the link or the worker")


def wrong_model_is_refused():
    """A worker with other files never joins, and the router says why."""
    with Server("--log-level", "info") as s, tempfile.TemporaryDirectory() as tmp:
        import shutil
        other = pathlib.Path(tmp) / "model"
        shutil.copytree(MODEL, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config, indent=1))
        p = subprocess.Popen([TANDEM, "prefill-worker", "--model", str(other), "--control", control_endpoint(s), "--name", "stranger"],
                             stderr=subprocess.DEVNULL)
        try:
            end = time.monotonic() + 15 * SLOW
            while "stranger" not in s.messages() and time.monotonic() < end:
                time.sleep(0.05)
            check("config" in s.messages() and "stranger" in s.messages(), s.messages()[-1500:])
            check(n_workers(s) == (1, 1), n_workers(s))
        finally:
            p.kill()
            p.wait()


if __name__ == "__main__":
    main(join_and_leave_under_load, tcp_equals_ipc, wrong_model_is_refused)
