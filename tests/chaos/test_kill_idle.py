# SPDX-License-Identifier: Apache-2.0
"""A worker is killed while idle: 503 with Retry-After while its role is missing, then serving again, same tokens. And a
worker that dies with streams aboard: every stream still ends in exactly one terminal, exact or typed. Promises 1 and 2."""
import pathlib, sys, threading
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

BODY = {"messages": [{"role": "user", "content": "What is 31 plus 12?"}], "temperature": 1.0, "seed": 5, "max_tokens": 40}


class Services:
    """Router, prefill and decode worker as single services: nobody starts a dead one again."""

    def __init__(self, tmp):
        self.tmp, self.procs = tmp, {}
        self.control = f"ipc://{tmp}/control.sock"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.host, self.port = s.getsockname()
        for role in ("router", "prefill-worker", "decode-worker"):
            self.start(role)

    def start(self, role):
        args = [TANDEM, role, "--model", MODEL, "--control", self.control, "--log-level", "warn"]
        if role == "router":
            args += ["--listen", f"{self.host}:{self.port}"]
        if role == "decode-worker":
            args += ["--kv-listen", f"ipc://{self.tmp}/kv.sock"]
        self.procs[role] = subprocess.Popen(args, stderr=subprocess.DEVNULL)

    def kill(self, role, signo=signal.SIGKILL):
        self.procs[role].send_signal(signo)
        self.procs[role].wait()

    def messages(self):
        return ""


Services.request, Services.json, Services.chat, Services.wait_health = Server.request, Server.json, Server.chat, Server.wait_health


def connected(s):
    end = time.monotonic() + 20 * SLOW
    while time.monotonic() < end:
        try:
            return s.wait_health(200)
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise AssertionError("the router does not listen")


def kill_idle(role, code):
    with tempfile.TemporaryDirectory() as tmp:
        s = Services(tmp)
        try:
            connected(s)
            before = s.json("POST", "/v1/chat/completions", BODY)["choices"]
            s.kill(role)
            s.wait_health(503)
            for _ in range(3):
                status, headers, data = s.request("POST", "/v1/chat/completions", BODY)
                check(status == 503 and 1 <= int(headers["retry-after"]) <= 30, (status, headers, data))
                check(json.loads(data)["error"]["code"] == code, data)
            s.start(role)
            s.wait_health(200)
            check(s.json("POST", "/v1/chat/completions", BODY)["choices"] == before, "other tokens after the restart")
        finally:
            for r in s.procs:
                s.kill(r)


def kill_idle_prefill():
    kill_idle("prefill-worker", "no_prefill_worker")


def kill_idle_decode():
    kill_idle("decode-worker", "no_decode_worker")


def kill_router():
    """Workers outlive the router and join the next one."""
    with tempfile.TemporaryDirectory() as tmp:
        s = Services(tmp)
        try:
            connected(s)
            before = s.json("POST", "/v1/chat/completions", BODY)["choices"]
            s.kill("router")
            s.start("router")
            connected(s)
            check(s.json("POST", "/v1/chat/completions", BODY)["choices"] == before, "other tokens from the new router")
        finally:
            for r in s.procs:
                s.kill(r)


def supervised():
    """Under `tandem serve` a killed worker comes back by itself."""
    for role in ("prefill-worker", "decode-worker"):
        pid = srv.pids()[role][0]
        before = srv.json("POST", "/v1/chat/completions", BODY)["choices"]
        os.kill(pid, signal.SIGKILL)
        end = time.monotonic() + 20 * SLOW
        while srv.pids()[role] in ([], [pid]):
            check(time.monotonic() < end, f"{role} was not started again")
            time.sleep(0.02)
        srv.wait_health(200)
        check(srv.json("POST", "/v1/chat/completions", BODY)["choices"] == before, "other tokens after the restart")


def kill_busy():
    """Streams aboard a killed decode worker: complete and exact, or a typed error; never a silent close."""
    body = {**BODY, "max_tokens": 200, "ignore_eos": True}
    expected, _, error = srv.stream("/v1/chat/completions", body).collect()
    check(error is None, error)
    ends = []

    def client():
        try:
            s = srv.stream("/v1/chat/completions", body)
            ends.append(("refused", s.status) if s.status != 200 else s.collect())
        except Exception as e:
            ends.append(("broken", repr(e)))

    threads = [threading.Thread(target=client) for _ in range(8)]
    for t in threads:
        t.start()
    time.sleep(0.15)
    os.kill(srv.pids()["decode-worker"][0], signal.SIGKILL)
    for t in threads:
        t.join()
    for e in ends:
        check(e[0] != "broken", e)
        if e[0] == "refused":
            check(e[1] == 503, e)
        elif e[2] is None:
            check(e[0] == expected, "a stream that ended well has other tokens")
        else:
            check(e[2]["code"] in ("worker_lost", "no_decode_worker", "no_prefill_worker", "overloaded"), e[2])
    srv.wait_health(200)




def drain_finishes_streams():
    """SIGTERM: new requests are refused, running streams end whole, then everything exits with 0."""
    with Server() as s:
        expected, _, _ = s.stream("/v1/chat/completions", {**BODY, "max_tokens": 300, "ignore_eos": True}).collect()
        st = s.stream("/v1/chat/completions", {**BODY, "max_tokens": 300, "ignore_eos": True})
        s.proc.send_signal(signal.SIGTERM)
        out, _, error = st.collect()
        check(error is None and out == expected, error or "the drained stream has other tokens")
        check(s.proc.wait(40 * SLOW) == 0, s.proc.returncode)


if __name__ == "__main__":
    main(kill_idle_prefill, kill_idle_decode, kill_router, drain_finishes_streams)
    with Server() as srv:
        main(supervised, kill_busy)
