# SPDX-License-Identifier: Apache-2.0
"""Harness for tests against real processes: start `tandem serve` or single services, speak HTTP by hand (an own SSE reader,
so that a lenient client library hides nothing), look at /proc. Standard library only."""
import contextlib, http.client, json, os, pathlib, re, signal, socket, subprocess, sys, tempfile, time

ROOT = pathlib.Path(os.environ.get("TD_SOURCE_DIR") or pathlib.Path(__file__).resolve().parents[2])
TANDEM = os.environ.get("TD_TANDEM") or str(ROOT / "build/release/tandem")
MODEL = os.environ.get("TD_MODEL") or str(ROOT / "models/glm-tiny")
SLOW = 10 if "asan" in TANDEM or "tsan" in TANDEM else 1


def skip(reason):
    name = pathlib.Path(sys.argv[0]).name
    print(f"SKIP {name}: {reason}")
    sys.exit(77)


def check(cond, text):
    if not cond:
        raise AssertionError(text)


def children(pid):
    out = []
    for d in os.listdir("/proc"):
        if d.isdigit():
            with contextlib.suppress(OSError):
                stat = open(f"/proc/{d}/stat").read()
                if int(stat.rsplit(")", 1)[1].split()[1]) == pid:
                    out.append(int(d))
    return sorted(out)


def cmdline(pid):
    with contextlib.suppress(OSError):
        return open(f"/proc/{pid}/cmdline").read().split("\0")
    return []


def rss_kib(pid):
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def n_fds(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


class Server:
    """`tandem serve MODEL` on a free port."""

    def __init__(self, *options, model=MODEL, timeout=30):
        self.log = tempfile.NamedTemporaryFile(mode="w+", suffix=".log", delete=False)
        self.proc = subprocess.Popen([TANDEM, "serve", model, "--listen", "127.0.0.1:0", *options],
                                     stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.started = time.monotonic()
        line = self._first_line(timeout * SLOW)
        m = re.match(r"ready in .*: http://([0-9.]+):([0-9]+)", line)
        if not m:
            self.stop()
            raise AssertionError(f"not ready: {line!r}\n{self.messages()}")
        self.host, self.port = m.group(1), int(m.group(2))
        self.ready_s = time.monotonic() - self.started

    def _first_line(self, timeout):
        import select
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if select.select([self.proc.stdout], [], [], 0.1)[0]:
                return self.proc.stdout.readline()
            if self.proc.poll() is not None:
                return ""
        return ""

    def messages(self):
        return open(self.log.name).read()

    def pids(self):
        """{"router": [pid], "prefill-worker": [...], "decode-worker": [...]}"""
        out = {"router": [], "prefill-worker": [], "decode-worker": []}
        for pid in children(self.proc.pid):
            args = cmdline(pid)
            if len(args) > 1 and args[1] in out:
                out[args[1]].append(pid)
        return out

    def stop(self, timeout=40):
        if self.proc.poll() is None:
            self.proc.send_signal(signal.SIGTERM)
            try:
                self.proc.wait(timeout * SLOW)
            except subprocess.TimeoutExpired:
                self.proc.kill()
                self.proc.wait()
                raise AssertionError("the server did not stop on SIGTERM\n" + self.messages())
        self.proc.stdout.close()
        os.unlink(self.log.name) if os.path.exists(self.log.name) else None
        return self.proc.returncode

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind:
            print(self.messages()[-4000:], file=sys.stderr)
        self.stop()

    # ---- HTTP ----

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, bytes)"""
        c = http.client.HTTPConnection(self.host, self.port, timeout=timeout * SLOW)
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        c.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        r = c.getresponse()
        out = r.status, dict((k.lower(), v) for k, v in r.getheaders()), r.read()
        c.close()
        return out

    def json(self, method, path, body=None, expect=200, headers=None):
        status, _, data = self.request(method, path, body, headers)
        check(status == expect, f"{method} {path}: {status}, expected {expect}: {data[:500]!r}")
        return json.loads(data)

    def chat(self, text, **more):
        return self.json("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more})

    def stream(self, path, body, timeout=60):
        return Stream(self.host, self.port, path, {**body, "stream": True}, timeout * SLOW)

    def wait_health(self, status, timeout=20):
        end = time.monotonic() + timeout * SLOW
        while time.monotonic() < end:
            got = self.request("GET", "/health")[0]
            if got == status:
                return
            time.sleep(0.02)
        raise AssertionError(f"/health did not become {status} within {timeout} s\n{self.messages()[-2000:]}")

    def metric(self, name):
        text = self.request("GET", "/metrics")[2].decode()
        return sum(float(l.rsplit(" ", 1)[1]) for l in text.splitlines()
                   if l.startswith(name) and l[len(name):len(name) + 1] in ("{", " "))


class Stream:
    """One SSE answer over a raw socket: chunked decoding and event rules checked byte by byte."""

    def __init__(self, host, port, path, body, timeout=60):
        data = json.dumps(body).encode()
        self.sock = socket.create_connection((host, port), timeout)
        self.sock.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                          f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.buf = b""
        head = self._until(b"\r\n\r\n").decode()
        lines = head.split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {l.split(":", 1)[0].lower(): l.split(":", 1)[1].strip() for l in lines[1:] if ":" in l}
        self.clean_end = False
        self.done = False
        self.events = []

    def _fill(self):
        more = self.sock.recv(65536)
        if not more:
            raise EOFError
        self.buf += more

    def _until(self, mark):
        while mark not in self.buf:
            self._fill()
        out, self.buf = self.buf.split(mark, 1)
        return out

    def body(self):
        while len(self.buf) < int(self.headers["content-length"]):
            self._fill()
        return self.buf[:int(self.headers["content-length"])]

    def _chunks(self):
        try:
            while True:
                n = int(self._until(b"\r\n"), 16)
                while len(self.buf) < n + 2:
                    self._fill()
                data, self.buf = self.buf[:n], self.buf[n:]
                check(self.buf[:2] == b"\r\n", "chunk without CRLF")
                self.buf = self.buf[2:]
                if n == 0:
                    self.clean_end = True
                    return
                yield data
        except EOFError:
            return

    def __iter__(self):
        text = b""
        for chunk in self._chunks():
            text += chunk
            while b"\n\n" in text:
                event, text = text.split(b"\n\n", 1)
                if event.startswith(b":"):
                    continue
                check(event.startswith(b"data: ") and b"\n" not in event, f"event is not one data line: {event!r}")
                data = event[6:]
                check(not self.done, "data after [DONE]")
                if data == b"[DONE]":
                    self.done = True
                    continue
                e = json.loads(data)
                self.events.append(e)
                yield e
        check(text == b"", f"rest without an event end: {text!r}")

    def collect(self):
        """Read to the end: dict of index -> {content, reasoning, finish}; usage; error."""
        if self.status != 200:  # refused before the first byte
            error = json.loads(self.body())["error"]
            self.close()
            raise AssertionError(f"status {self.status}: {error}")
        out, usage, error = {}, None, None
        for e in self:
            if "error" in e:
                error = e["error"]
                continue
            if e.get("usage"):
                usage = e["usage"]
            for c in e["choices"]:
                o = out.setdefault(c["index"], {"content": "", "reasoning": "", "finish": None, "ids": []})
                d = c.get("delta", {})
                check(o["finish"] is None, "a choice goes on after its finish_reason")
                o["content"] += d.get("content") or c.get("text") or ""
                o["reasoning"] += d.get("reasoning_content") or ""
                o["ids"] += c.get("token_ids") or []
                o["finish"] = c["finish_reason"]
        self.close()
        if error is None:
            check(self.done and self.clean_end, "the stream ended without [DONE] or the last chunk")
            check(all(o["finish"] for o in out.values()), "a choice without finish_reason")
        return out, usage, error

    def close(self):
        self.sock.close()


def main(*tests):
    """Run the given functions; print each; exit 1 on the first failure."""
    for t in tests:
        start = time.monotonic()
        t()
        print(f"ok {t.__name__} ({time.monotonic() - start:.1f} s)", flush=True)
