# SPDX-License-Identifier: Apache-2.0
"""64 concurrent streams for 20 s (60 s with TD_ALL=1): every stream complete and equal to its undisturbed run; memory back to
its start level; no descriptor leaked. Promises 1, 2 and 5."""
import pathlib, sys, threading
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

N = 64
SECONDS = 60 if os.environ.get("TD_ALL") else 20
CASES = [{"messages": [{"role": "user", "content": f"What is {a} plus {b}?"}], "temperature": t, "seed": a * 100 + b,
          "max_tokens": 48, "return_token_ids": True}
         for a, b, t in [(12, 7, 0), (23, 48, 0.7), (55, 31, 1.0), (9, 90, 0), (31, 16, 1.0), (77, 20, 0.9), (64, 5, 0), (18, 81, 1.0)]]
CASES += [{"messages": [{"role": "user", "content": "Read this. " * n + "What does it say?"}], "temperature": 1.0, "seed": n,
           "max_tokens": 32, "return_token_ids": True} for n in (5, 20, 60, 100)]


def result(body):
    out, _, error = srv.stream("/v1/chat/completions", body, timeout=120).collect()
    check(error is None, error)
    return out


def footprint():
    pids = [p for v in srv.pids().values() for p in v]
    return {p: (rss_kib(p), n_fds(p)) for p in pids}


def exact_under_load():
    expected = [result(b) for b in CASES]
    problems, counts, end = [], [0] * N, time.monotonic() + SECONDS

    def client(k):
        i = k
        while time.monotonic() < end and not problems:
            try:
                case = i % len(CASES)
                if result(CASES[case]) != expected[case]:
                    problems.append(f"client {k}: case {case} differs from its undisturbed run")
                counts[k] += 1
            except Exception as e:
                problems.append(f"client {k}: {e!r}")
            i += 1

    round_trip(client)
    check(not problems, problems[:3])
    check(min(counts) >= 1, counts)
    print(f"   {sum(counts)} streams in {SECONDS} s")


def round_trip(client):
    threads = [threading.Thread(target=client, args=(k,)) for k in range(N)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


def back_to_start_level():
    """Pools fill once (KV pages are touched, buffers grow to their bound); a second round must not add."""
    first = footprint()
    exact_under_load()
    time.sleep(0.5)
    second = footprint()
    check(first.keys() == second.keys(), "a process was replaced")
    for pid in first:
        name = cmdline(pid)[1]
        check(second[pid][1] <= first[pid][1], f"{name}: descriptors {first[pid][1]} -> {second[pid][1]}")
        check(second[pid][0] <= first[pid][0] * 1.10 + 4096, f"{name}: resident KiB {first[pid][0]} -> {second[pid][0]}")


if __name__ == "__main__":
    with Server() as srv:
        result(CASES[0])  # the first request dials the KV socket
        time.sleep(0.5)
        idle = {p: f for p, (_, f) in footprint().items()}
        main(exact_under_load)
        time.sleep(0.5)
        main(back_to_start_level)
        after = {p: f for p, (_, f) in footprint().items()}
        check(after == idle, f"descriptors: idle {idle}, after {after}")
