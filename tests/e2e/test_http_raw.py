# SPDX-License-Identifier: Apache-2.0
"""Hostile bytes at the door: each gets an error or a close, and other requests go on. (Promises 5 and 6.)"""
import pathlib, sys
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))
from tandem_e2e import *

BODY = b'{"prompt":"a","max_tokens":1}'


def send(data, pause=None, timeout=20):
    """First line of the answer, b"" when the server just closed."""
    with socket.create_connection((srv.host, srv.port), timeout * SLOW) as s:
        try:
            for part in data if isinstance(data, list) else [data]:
                s.sendall(part)
                if pause:
                    time.sleep(pause)
            out = b""
            while b"\r\n" not in out:
                more = s.recv(4096)
                if not more:
                    break
                out += more
            return out.split(b"\r\n")[0]
        except (BrokenPipeError, ConnectionResetError):
            return b""


def head(extra=b"", method=b"POST /v1/completions HTTP/1.1"):
    return method + b"\r\nHost: x\r\n" + extra + b"\r\n"


def refused(data, *codes):
    line = send(data)
    check(line == b"" or int(line.split()[1]) in codes, (data[:120], line))
    status = srv.json("POST", "/v1/completions", {"prompt": "still", "max_tokens": 1})
    check(status["choices"], "others go on")


def smuggling():
    n = str(len(BODY)).encode()
    refused(head(b"Content-Length: " + n + b"\r\nContent-Length: 3\r\n") + BODY, 400)
    refused(head(b"Content-Length: " + n + b"\r\nTransfer-Encoding: chunked\r\n") + BODY, 400)
    refused(head(b"Transfer-Encoding: xchunked\r\n") + BODY, 400, 501)
    refused(head(b"Content-Length : " + n + b"\r\n") + BODY, 400)
    refused(head(b"Content-Length: -1\r\n") + BODY, 400)
    refused(head(b"Content-Length: +" + n + b"\r\n") + BODY, 400)
    refused(head(b"Content-Length: 99999999999999999999\r\n") + BODY, 400, 413)
    refused(b"POST /v1/completions HTTP/1.1\r\nContent-Length: " + n + b"\r\n\r\n" + BODY, 400)  # no Host
    refused(b"POST /v1/completions HTTP/1.1\nHost: x\nContent-Length: " + n + b"\n\n" + BODY, 400)  # bare LF
    refused(head(b"X: a\r\n b\r\nContent-Length: " + n + b"\r\n") + BODY, 400)  # obs-fold
    refused(head(b"Transfer-Encoding: chunked\r\n") + b"zz\r\nabc\r\n0\r\n\r\n", 400)


def too_much():
    refused(head(b"X: " + b"a" * 70000 + b"\r\n"), 400, 431)
    refused(head(b"".join(b"X%d: y\r\n" % i for i in range(5000))), 400, 431)
    refused(b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400, 414, 431)
    deep = b'{"prompt":' + b"[" * 100000 + b"]" * 100000 + b"}"
    refused(head(b"Content-Length: %d\r\n" % len(deep)) + deep, 400)
    wide = b'{"prompt":[' + b"1," * 200000 + b"1]}"
    refused(head(b"Content-Length: %d\r\n" % len(wide)) + wide, 400)


def garbage():
    for data in (b"\x00" * 100, b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\r\n\r\n\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        refused(data, 400, 404, 405, 408, 505)


def slow_head_times_out():
    start = time.monotonic()
    with socket.create_connection((srv.host, srv.port), 60) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHo")
        s.settimeout(40 * SLOW)
        data = s.recv(4096)
        check(data == b"" or b" 408 " in data.split(b"\r\n")[0], data)
    check(time.monotonic() - start < 30 * SLOW, "a head that never ends is not cut off")


def pieces_are_fine():
    data = head(b"Content-Length: %d\r\n" % len(BODY)) + BODY
    check(b" 200 " in send([data[i:i + 1] for i in range(len(data))], 0.001), "byte by byte")


def pipelined():
    data = head(b"Content-Length: %d\r\n" % len(BODY)) + BODY
    with socket.create_connection((srv.host, srv.port), 20) as s:
        s.sendall(data * 3)
        got = b""
        while got.count(b"HTTP/1.1 200") < 3:
            more = s.recv(65536)
            check(more, got)
            got += more


if __name__ == "__main__":
    with Server() as srv:
        main(smuggling, too_much, garbage, slow_head_times_out, pieces_are_fine, pipelined)
