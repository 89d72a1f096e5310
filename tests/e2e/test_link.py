# SPDX-License-Identifier: Apache-2.0
"""Keys on the sockets between processes and machines: a cluster on an address beyond loopback gives the answers it gives on one
machine; who has no key, a foreign key or another role's key gets in nowhere and is told so; nothing hangs and nothing grows.
Promise 6."""
import pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

try:
    import zmq, google.protobuf  # noqa: F401
except ImportError as e:
    skip(f"{e.name} is missing (python3-zmq, python3-protobuf)")

EXAMPLE = ROOT / "examples/python/tandem_client.py"
BODY = {"messages": [{"role": "user", "content": "What is 44 plus 17?"}], "temperature": 1.0, "seed": 11, "max_tokens": 60}


def own_address():
    """An address of this machine beyond loopback, or None. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        with contextlib.suppress(OSError):
            s.connect(("198.51.100.1", 9))
            if not s.getsockname()[0].startswith("127."):
                return s.getsockname()[0]
    return None


def free_port(host):
    with socket.socket() as s:
        s.bind((host, 0))
        return s.getsockname()[1]


def make_keys(directory, *options):
    r = subprocess.run([TANDEM, "keys", str(directory), *options], capture_output=True, text=True, timeout=20 * SLOW)
    check(r.returncode == 0, r.stderr)


def key(directory, name):
    return (pathlib.Path(directory) / name).read_text().split()[-1].encode()


class Cluster:
    """Router, prefill and decode worker as an operator starts them on three machines; here all on one address."""
    request, stream, metric, wait_health, json, chat = (Server.request, Server.stream, Server.metric, Server.wait_health,
                                                        Server.json, Server.chat)

    kv_host, transport = None, "zmq"  # as between two hosts: all blocks cross the KV link

    def __init__(self, keys, host, peers=None, start=("router", "prefill", "decode"), extra=None):
        self.extra = extra or {}  # role -> more options
        self.keys, self.link_host, self.peers, self.procs, self.logs = pathlib.Path(keys), host, peers or {}, {}, {}
        self.tmp = tempfile.TemporaryDirectory()
        try:
            self.open_doors()
            for name in start:
                if name != "router":
                    self.start(name)
        except BaseException:
            self.__exit__(True, None, None)
            raise

    def open_doors(self):
        """The router on ports that are free; somebody else may take one before it does."""
        for _ in range(5):
            self.control, self.rpc = (f"tcp://{self.link_host}:{free_port(self.link_host)}" for _ in range(2))
            self.start("router")
            if m := self.first_log("router"):
                self.host, self.port = "127.0.0.1", int(m)
                return
        raise AssertionError(self.messages())

    def first_log(self, name):
        """The HTTP port, or None when the process ended because a port was taken."""
        end = time.monotonic() + 20 * SLOW
        while self.procs[name].poll() is None:
            check(time.monotonic() < end, f"{name} is silent:\n{self.log(name)}")
            if m := re.search(r"http=127.0.0.1:(\d+)", self.log(name)):
                return m.group(1)
            time.sleep(0.02)
        check("already in use" in self.log(name), self.log(name))
        return None

    def start(self, role, name=None, secret=None):
        name = name or (role if role == "router" else role + "-1")
        curve = ["--curve-secret", str(secret or self.keys / f"{name}.secret"), "--curve-peers", str(self.peers.get(role, self.keys / "peers"))]
        args = {"router": ["router", "--listen", "127.0.0.1:0", "--rpc-listen", self.rpc],
                "prefill": ["prefill-worker", "--name", name],
                "decode": ["decode-worker", "--name", name, "--kv-listen", f"tcp://{self.kv_host or self.link_host}:0"]}[role]
        log = open(f"{self.tmp.name}/{name}.log", "w")
        self.logs[name] = log.name
        if role != "router":
            args += ["--kv-transport", self.transport]
        self.procs[name] = subprocess.Popen([TANDEM, *args, "--model", MODEL, "--control", self.control, *curve, *self.extra.get(role, ())], stderr=log)

    def log(self, name):
        return open(self.logs[name]).read()

    def messages(self):
        return "\n".join(self.log(n) for n in self.logs)

    def wait_log(self, name, pattern, timeout=20):
        end = time.monotonic() + timeout * SLOW
        while time.monotonic() < end:
            if m := re.search(pattern, self.log(name)):
                return m.group(1) if m.groups() else m.group(0)
            time.sleep(0.02)
        raise AssertionError(f"{name} did not say {pattern!r}:\n{self.messages()[-3000:]}")

    def denied(self, door, reason):
        text = self.request("GET", "/metrics")[2].decode()
        return int(re.search(rf'tandem_link_denied_total{{door="{door}",reason="{reason}"}} (\d+)', text).group(1))

    def wait_denied(self, door, reason, more_than):
        end = time.monotonic() + 15 * SLOW
        while self.denied(door, reason) <= more_than:
            check(time.monotonic() < end, f"nothing counted at {door} for {reason}\n{self.messages()[-2000:]}")
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind:
            print(self.messages()[-6000:], file=sys.stderr)
        for p in self.procs.values():
            p.terminate()
        for p in self.procs.values():
            try:
                p.wait(20 * SLOW)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        ends = {name: p.returncode for name, p in self.procs.items()}
        said = self.messages()[-4000:]
        self.tmp.cleanup()
        check(kind or not any(ends.values()), f"not all ended well: {ends}\n{said}")


def answer(s):
    out, usage, error = s.stream("/v1/chat/completions", BODY).collect()
    check(error is None, error)
    return out, usage["completion_tokens"] if usage else None


def example(endpoint, *args, expect=0):
    r = subprocess.run([sys.executable, "-B", str(EXAMPLE), "--endpoint", endpoint, "--temperature", "0", *args, "What is 23 + 48?"],
                       capture_output=True, text=True, timeout=60 * SLOW)
    check(r.returncode == expect, (args, r.returncode, r.stdout, r.stderr))
    return r


def beyond_loopback_as_on_one_machine():
    with Server() as s:
        one, http = answer(s), s.chat("What is 23 + 48?", temperature=0)["choices"][0]["message"]["content"]
    hosts = ["127.0.0.1"] + [h for h in [own_address()] if h]
    if len(hosts) == 1:
        print("  this machine has no address beyond loopback: tried on loopback only")
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys")
        for host in hosts:
            with Cluster(f"{tmp}/keys", host) as c:
                c.wait_health(200)
                check(answer(c) == one, "tokens depend on the link")
                client = ("--secret", f"{tmp}/keys/client-1.secret", "--server", f"{tmp}/keys/router.public")
                check(http.strip() in example(c.rpc, *client).stdout, "the RPC client's answer")
                for door in ("control", "client"):
                    for reason in ("unknown_key", "wrong_role", "handshake"):
                        check(c.denied(door, reason) == 0, "nobody was to be denied")


def shared_memory_beside_keys():
    """On one host blocks may pass the KV link by; tickets, commits and answers on it are secured all the same."""
    with Server() as s:
        one = answer(s)
    Cluster.transport = "shm"
    try:
        with tempfile.TemporaryDirectory() as tmp:
            make_keys(f"{tmp}/keys")
            for private in ((), ("--kv-link", "private", "--kv-private", "127.0.0.0/8")):
                with Cluster(f"{tmp}/keys", "127.0.0.1", extra={"prefill": private, "decode": private}) as c:
                    c.wait_health(200)
                    check(answer(c) == one, f"tokens depend on the link {private}")
    finally:
        Cluster.transport = "zmq"


def keys_in_serve():
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys", "--prefill", "2")
        with Server() as s:
            one = answer(s)
        with Server("--keys", f"{tmp}/keys", "--prefill", "2", "--rpc-listen", f"ipc://{tmp}/rpc.sock") as s:
            check(answer(s) == one, "tokens depend on keys")
            example(f"ipc://{tmp}/rpc.sock", "--secret", f"{tmp}/keys/client-1.secret", "--server", f"{tmp}/keys/router.public")
            r = example(f"ipc://{tmp}/rpc.sock", "--timeout", "5", expect=1)
            check("one side has keys" in r.stderr, r.stderr)


def intruder(c, door, secret, server, raw=b"\x00" * 24):
    """A DEALER that says HELLO at a door for one second. What it heard, and whether it was ever connected."""
    s = zmq.Context.instance().socket(zmq.DEALER)
    s.linger, s.immediate = 0, 1
    if secret:
        s.curve_secretkey, s.curve_publickey, s.curve_serverkey = secret, zmq.curve_public(secret), server
    s.connect(door)
    connected = s.poll(250 if SLOW == 1 else 600, zmq.POLLOUT)
    if connected:
        s.send_multipart([raw, b""])
    heard = s.poll(300, zmq.POLLIN)
    s.close()
    return connected, heard


def intruders_get_in_nowhere():
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys", "--prefill", "2")
        with Cluster(f"{tmp}/keys", own_address() or "127.0.0.1") as c:
            c.wait_health(200)
            one = answer(c)
            kv = c.wait_log("decode-1", r" kv=(tcp://\S+)")
            router, decode = key(c.keys, "router.public"), key(c.keys, "decode-1.public")
            foreign = zmq.curve_keypair()[1]
            doors = [("control", c.control, router, "client-1"), ("client", c.rpc, router, "prefill-2"), ("kv", kv, decode, "decode-1")]
            for door, endpoint, server, other in doors:
                for secret in (None, foreign, key(c.keys, other + ".secret")):
                    check(intruder(c, endpoint, secret, server) == (0, 0), f"somebody came in at {door}")
                check(intruder(c, endpoint, foreign, zmq.curve_keypair()[0]) == (0, 0), f"a wrong server key at {door}")
            for door in ("control", "client"):
                for reason in ("unknown_key", "wrong_role", "handshake"):
                    c.wait_denied(door, reason, 0)
            check(c.link_host in c.wait_log("router", "link_denied .*reason=unknown_key.*"), "the log names the address")
            c.wait_log("decode-1", "link_denied door=kv .*reason=wrong_role name=decode-1|event=link_denied door=kv.*wrong_role")
            check(answer(c) == one, "the cluster goes on")


def strangers_cost_nothing():
    """Bytes and connections without a key: bounded memory, bounded descriptors, and the cluster serves on."""
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys")
        with Cluster(f"{tmp}/keys", "127.0.0.1") as c:
            c.wait_health(200)
            one, pid = answer(c), c.procs["router"].pid
            port = int(c.control.rsplit(":", 1)[1])
            rss, fds, socks = rss_kib(pid), n_fds(pid), []
            for i in range(200):  # half open handshakes, half a greeting, and garbage
                s = socket.create_connection(("127.0.0.1", port))
                with contextlib.suppress(OSError):
                    s.sendall([b"", b"\xff\0\0\0\0\0\0\0\1\x7f\3", b"GET / HTTP/1.1\r\n\r\n"][i % 3])
                socks.append(s)
            flood = socket.create_connection(("127.0.0.1", port))  # a whole NULL greeting, then frames without an end
            with contextlib.suppress(OSError):
                flood.settimeout(2)
                flood.sendall(b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32))
                for _ in range(64):
                    flood.sendall(b"\1\xff" * (1 << 19))
            check(answer(c) == one, "the cluster serves meanwhile")
            end = time.monotonic() + 10 * SLOW  # ZMQ_HANDSHAKE_IVL closes what does not finish
            while n_fds(pid) > fds + 10 and time.monotonic() < end:
                time.sleep(0.1)
            check(n_fds(pid) <= fds + 10, f"{n_fds(pid)} descriptors, {fds} before")
            check(rss_kib(pid) < rss + 32 * 1024 * (SLOW > 1 and 8 or 1), f"{rss_kib(pid)} KiB, {rss} before")
            for s in [*socks, flood]:
                s.close()


def added_and_removed_by_sighup():
    """A worker whose key is missing says who refused it; it joins when the list has it, and goes when the list loses it."""
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys")
        old = pathlib.Path(tmp) / "old-peers"
        old.write_bytes((pathlib.Path(tmp) / "keys/peers").read_bytes())
        make_keys(f"{tmp}/keys", "prefill", "late")
        with Cluster(f"{tmp}/keys", "127.0.0.1", peers={"router": old, "decode": old}, start=("router", "decode")) as c:
            c.start("prefill", "late")
            c.wait_log("late", r"link_refused.*the router at tcp://\S+ refused our key")
            c.wait_log("router", r"link_denied door=control address=127.0.0.1 reason=unknown_key")
            old.write_bytes((c.keys / "peers").read_bytes())
            for name in ("router", "decode-1"):
                c.procs[name].send_signal(signal.SIGHUP)
            c.wait_health(200)
            answer(c)
            old.write_text("nonsense\n")
            c.procs["router"].send_signal(signal.SIGHUP)
            c.wait_log("router", "reload_failed.*old-peers")
            answer(c)
            old.write_text("".join(l for l in (c.keys / "peers").read_text().splitlines(True) if " late " not in l))
            c.procs["router"].send_signal(signal.SIGHUP)
            c.wait_log("router", "left curve-peers")
            c.wait_health(503)


def processes_come_back():
    """With keys as without: whoever is killed comes back, and nobody takes it for a refusal for good."""
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys")
        with Cluster(f"{tmp}/keys", "127.0.0.1") as c:
            c.wait_health(200)
            one = answer(c)
            for name, role in (("router", "router"), ("decode-1", "decode"), ("prefill-1", "prefill")):
                c.procs[name].kill()
                c.procs[name].wait()
                c.start(role)
                if role == "router":
                    c.port = int(c.wait_log("router", r"http=127.0.0.1:(\d+)"))
                else:
                    c.wait_log(name, "router_up")
                c.wait_health(200)
                check(answer(c) == one, f"after {name}")
            check("link_denied" not in c.messages(), c.messages())


def refused_at_the_kv_door():
    """The decode worker does not know the prefill worker: the client gets a typed error soon, and both logs say why."""
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys")
        less = pathlib.Path(tmp) / "less"
        less.write_text("".join(l for l in (pathlib.Path(tmp) / "keys/peers").read_text().splitlines(True) if "prefill-1" not in l))
        with Cluster(f"{tmp}/keys", "127.0.0.1", peers={"decode": less}) as c:
            c.wait_health(200)
            start = time.monotonic()
            status, _, data = c.request("POST", "/v1/chat/completions", {**BODY, "stream": False})
            check(status >= 500 and json.loads(data)["error"]["code"], (status, data))
            check(time.monotonic() - start < 20 * SLOW, "the client waited too long")
            c.wait_log("prefill-1", r"link_refused door=kv .*the decode worker at tcp://\S+ refused our key")
            c.wait_log("decode-1", r"link_denied door=kv address=127.0.0.1 reason=unknown_key")


def private_kv_link():
    """KV blocks readable and authenticated on a network of one's own: the same answers; who is outside gets in nowhere."""
    with Server() as s:
        one = answer(s)
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys")
        host = own_address() or "127.0.0.1"
        private = ("--kv-link", "private", "--kv-private", f"{host}/32")
        with Cluster(f"{tmp}/keys", host, extra={"prefill": private, "decode": private}) as c:
            c.wait_health(200)
            check(answer(c) == one and answer(c) == one, "tokens depend on the link")
            kv = c.wait_log("decode-1", r" kv=(tcp://\S+)")
            check(intruder(c, kv, key(c.keys, "prefill-1.secret"), key(c.keys, "decode-1.public")) == (0, 0), "CURVE at a plain door")
            connected, heard = intruder(c, kv, None, None)
            check(connected and not heard, "a stranger of the network gets no answer")
            check(answer(c) == one, "the cluster goes on")
        # one side private, the other not: said at once, and the client gets a typed error
        with Cluster(f"{tmp}/keys", host, extra={"decode": private}) as c:
            c.wait_health(200)
            status, _, data = c.request("POST", "/v1/chat/completions", {**BODY, "stream": False})
            check(status >= 500 and json.loads(data)["error"]["code"], (status, data))
            c.wait_log("prefill-1", "push_refused .*its KV link is private and ours is curve")
        # 127.0.0.1 dials 127.0.0.9: not of its network
        private = ("--kv-link", "private", "--kv-private", "127.0.0.8/29")
        Cluster.kv_host = "127.0.0.9"
        try:
            with Cluster(f"{tmp}/keys", "127.0.0.1", extra={"prefill": private, "decode": private}) as c:
                c.wait_health(200)
                status, _, data = c.request("POST", "/v1/chat/completions", {**BODY, "stream": False})
                check(status >= 500 and json.loads(data)["error"]["code"], (status, data))
                c.wait_log("decode-1", "link_denied door=kv address=127.0.0.1 reason=address")
                c.wait_log("prefill-1", "link_refused door=kv .*would not have us")
        finally:
            Cluster.kv_host = None


def mistakes_are_explained():
    with tempfile.TemporaryDirectory() as tmp:
        make_keys(f"{tmp}/keys")
        k, bad = pathlib.Path(tmp) / "keys", pathlib.Path(tmp) / "bad"
        router = ["router", "--model", MODEL, "--listen", "127.0.0.1:0", "--control", f"ipc://{tmp}/c.sock"]

        def says(text, *args):
            r = subprocess.run([TANDEM, *args], capture_output=True, text=True, timeout=20 * SLOW)
            check(r.returncode != 0 and text in r.stderr, (text, args, r.returncode, r.stderr))

        says("tandem keys", *router[:-1], "tcp://192.0.2.1:7070")
        says("curve-peers is missing", *router, "--curve-secret", str(k / "router.secret"))
        says("curve-secret is missing", *router, "--curve-peers", str(k / "peers"))
        says("is the key of decode-1, a decode", *router, "--curve-secret", str(k / "decode-1.secret"), "--curve-peers", str(k / "peers"))
        bad.write_text("too short\n")
        bad.chmod(0o600)
        says("9 characters", *router, "--curve-secret", str(bad), "--curve-peers", str(k / "peers"))
        (k / "router.secret").chmod(0o640)
        says("chmod 600", *router, "--curve-secret", str(k / "router.secret"), "--curve-peers", str(k / "peers"))
        (k / "router.secret").chmod(0o600)
        (k / "peers").chmod(0o666)
        says("others can write it", *router, "--curve-secret", str(k / "router.secret"), "--curve-peers", str(k / "peers"))
        (k / "peers").chmod(0o644)
        decode = ["decode-worker", "--model", MODEL, "--control", f"ipc://{tmp}/c.sock", "--kv-link", "private"]
        curve = ["--curve-secret", str(k / "decode-1.secret"), "--curve-peers", str(k / "peers")]
        says("needs kv-private", *decode, *curve)
        says("needs curve-secret", *decode, "--kv-private", "10.0.0.0/8")
        says("at least /8", *decode, *curve, "--kv-private", "0.0.0.0/0")
        says("does nothing with kv-link = curve", *decode[:-2], *curve, "--kv-private", "10.0.0.0/8")
        says("not in the network", *decode, *curve, "--kv-private", "10.0.0.0/8", "--kv-listen", "tcp://127.0.0.1:0")
        says("is a tcp:// address", *decode, *curve, "--kv-private", "10.0.0.0/8", "--kv-listen", f"ipc://{tmp}/kv.sock")
        says("is there already", "keys", str(k))
        says("the name client-1 is taken", "keys", str(k), "client", "client-1")
        says("no role", "keys", str(k), "boss", "b")
        check(all((k / f).stat().st_mode & 0o777 == 0o600 for f in os.listdir(k) if f.endswith(".secret")), "mode of secrets")


if __name__ == "__main__":
    main(mistakes_are_explained, beyond_loopback_as_on_one_machine, shared_memory_beside_keys, keys_in_serve,
         intruders_get_in_nowhere, strangers_cost_nothing, added_and_removed_by_sighup, processes_come_back, refused_at_the_kv_door, private_kv_link)
