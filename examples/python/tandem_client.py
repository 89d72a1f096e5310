#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Ask Tandem over its RPC and print the answer as it is made.

    tandem_client.py --endpoint ipc:///run/tandem/rpc.sock "Why is the sky blue?"
    tandem_client.py --endpoint tcp://192.0.2.10:7071 --secret client-1.secret --server router.public "..."

Needs Debian's python3-zmq, python3-protobuf and protobuf-compiler; the bindings are made from Tandem's own .proto files at
start. The protocol: proto/README.md. Ctrl-C cancels the call on the server.
"""
import argparse
import os
import pathlib
import secrets
import struct
import subprocess
import sys
import tempfile
import time

import zmq
from zmq.utils.monitor import recv_monitor_message

ROOT = pathlib.Path(__file__).resolve().parents[2]
HELLO, WELCOME, CALL, DATA, BATCH, CREDIT, CANCEL, STATUS, PING, PONG, GOAWAY = 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12
CODES = ("OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED RESOURCE_EXHAUSTED "
         "FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED").split()
WINDOW_BYTES = 1 << 20  # of the session: what the server may send ahead
WINDOW_MESSAGES = 64    # of one call


def bindings():
    """rpc.proto and inference.proto as Python modules."""
    with tempfile.TemporaryDirectory(prefix="tandem-proto-") as out:
        subprocess.run(["protoc", f"-I{ROOT}", f"--python_out={out}", "proto/common.proto", "proto/rpc.proto",
                        "proto/inference.proto"], check=True, cwd=ROOT)
        sys.path.insert(0, out)
        from proto import inference_pb2, rpc_pb2
        sys.path.remove(out)
    return rpc_pb2, inference_pb2


class RpcError(Exception):
    def __init__(self, code, text):
        super().__init__(f"{CODES[code] if code < len(CODES) else code}: {text}")
        self.code = code


class Session:
    """One connection and its session; one call at a time. Every frame is [24-byte preamble][protobuf body]."""

    def __init__(self, endpoint, rpc, timeout=10.0, secret=None, server=None):
        """secret: our secret key, server: the router's public key, both Z85 as `tandem keys` writes them; None: no keys."""
        self.rpc = rpc
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 200)  # the last CANCEL or GOAWAY goes out
        self.socket.setsockopt(zmq.MAXMSGSIZE, 17 << 20)
        self.socket.setsockopt(zmq.IPV6, 1)  # also IPv4
        self.has_keys = bool(secret)
        if secret:
            self.socket.curve_secretkey = secret
            self.socket.curve_publickey = zmq.curve_public(secret)
            self.socket.curve_serverkey = server
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL |
                                                      zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        self.socket.connect(endpoint)
        self.number = 0           # from WELCOME
        self.next_stream = 2      # even ids are the dialling side's
        self.sequence = {}        # next number to send, per stream (0 is the session)
        self.expected = {}        # next number to receive, per stream
        self.owed = 0             # bytes consumed and not granted again
        self.hello(timeout)

    def send(self, kind, body, stream=0):
        n = 0
        if kind != HELLO:  # HELLO stands before the numbering
            n = self.sequence.get(stream, 0)
            self.sequence[stream] = n + 1
        head = struct.pack("<HBBBBHQII", 0x4454, 1, 0, kind, 0, 0, stream, n, self.number)
        self.socket.send_multipart([head, body.SerializeToString()])

    def receive(self, timeout):
        """Next (type, stream, sequence, session, body), or None."""
        end = time.monotonic() + timeout
        while not self.socket.poll(max(0, min(100, int(1000 * (end - time.monotonic()))))):
            if not self.number and self.monitor.poll(0):
                self.turned_away(recv_monitor_message(self.monitor)["event"])
            if time.monotonic() >= end:
                return None
        parts = self.socket.recv_multipart()
        if len(parts) != 2 or len(parts[0]) != 24:
            raise RpcError(13, "not a Tandem frame")
        magic, major, _, kind, _, _, stream, sequence, session = struct.unpack("<HBBBBHQII", parts[0])
        if magic != 0x4454 or major != 1:
            raise RpcError(13, "not a Tandem frame, or another major version")
        return kind, stream, sequence, session, parts[1]

    def turned_away(self, event):
        """libzmq does not try again after the first two, and nothing else would tell us."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise RpcError(16, "the router refused our key: is it a client in its curve-peers?")
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or not self.has_keys:
            raise RpcError(16, "one side has keys and the other not (--secret, --server)")
        raise RpcError(16, "the router broke the handshake off: is --server its key?")

    def hello(self, timeout):
        self.send(HELLO, self.rpc.Hello(major=1, minor=0, role=self.rpc.ROLE_CLIENT, epoch=secrets.token_bytes(16),
                                        name=b"python-%d" % os.getpid()))
        end = time.monotonic() + timeout
        while (frame := self.receive(end - time.monotonic())):
            if frame[0] == WELCOME:
                self.welcome = self.rpc.Welcome.FromString(frame[4])
                self.number = self.welcome.session
                self.ping_s, self.dead_s = self.welcome.ping_ms / 1000, self.welcome.dead_ms / 1000
                self.last_ping = 0.0
                self.send(CREDIT, self.rpc.Credit(bytes=WINDOW_BYTES))  # the server sends DATA only on credit
                return
            if frame[0] == STATUS:
                status = self.rpc.Status.FromString(frame[4])
                raise RpcError(status.code, "refused: " + status.message.decode(errors="replace"))
        raise RpcError(14, f"no answer within {timeout:g} s: is a router listening there (--rpc-listen)?")

    def close(self):
        self.send(GOAWAY, self.rpc.Goaway(drain_ms=0, reason=b"the client is done"))
        self.socket.disable_monitor()
        self.socket.close()

    def upkeep(self):
        """Both sides PING; whoever hears nothing for dead_ms gives the other up."""
        if time.monotonic() - self.last_ping >= self.ping_s:
            self.last_ping = time.monotonic()
            self.send(PING, self.rpc.Ping(nonce=secrets.randbits(32)))

    def session_frame(self, kind, body):
        if kind == PING:
            self.send(PONG, self.rpc.Ping(nonce=self.rpc.Ping.FromString(body).nonce))
        elif kind == STATUS or (kind == GOAWAY and not self.rpc.Goaway.FromString(body).drain_ms):
            raise RpcError(14, "the server ended the session")

    def consumed(self, stream, n_bytes, n_messages):
        """Give credit back: bytes to the session, messages to the call, when half of a window is used."""
        self.owed += n_bytes
        if self.owed * 2 >= WINDOW_BYTES:
            self.send(CREDIT, self.rpc.Credit(bytes=self.owed))
            self.owed = 0
        if n_messages * 2 >= WINDOW_MESSAGES:
            self.send(CREDIT, self.rpc.Credit(messages=n_messages), stream)
            n_messages = 0
        return n_messages

    def call(self, method, request, timeout):
        """Generator of packed response messages. Ends at STATUS OK, else raises RpcError. Leaving it early cancels."""
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        end, heard, unpaid, done = time.monotonic() + timeout, time.monotonic(), 0, False
        self.send(CALL, self.rpc.Call(method=method.encode(), timeout_ms=max(1, int(timeout * 1000)), credit=WINDOW_MESSAGES,
                                      request_id=secrets.token_hex(8).encode(), message=request.SerializeToString()), stream)
        try:
            while True:
                self.upkeep()
                frame = self.receive(min(self.ping_s, end - time.monotonic()))
                now = time.monotonic()
                if frame is None:
                    if now >= end:
                        raise RpcError(4, f"no end within {timeout:g} s")
                    if now - heard > self.dead_s + self.ping_s:
                        done = True
                        raise RpcError(14, "the server is silent")
                    continue
                kind, at, sequence, session, body = frame
                if session != self.number:
                    continue  # of an earlier session
                heard = now
                if at not in (0, stream):
                    continue  # late frame of a call that has ended
                if sequence != self.expected.get(at, 0):
                    raise RpcError(15, "frames were lost")
                self.expected[at] = sequence + 1
                if at == 0:
                    items = [(i.stream, i.sequence, i.message) for i in self.rpc.Batch.FromString(body).items] if kind == BATCH else []
                    self.session_frame(kind, body)
                elif kind == DATA:
                    items = [(at, None, self.rpc.Data.FromString(body).message)]
                elif kind == STATUS:
                    status, done = self.rpc.Status.FromString(body), True
                    if status.code:
                        raise RpcError(status.code, status.message.decode(errors="replace"))
                    return
                for item_stream, item_sequence, message in items:
                    if item_stream == stream and item_sequence is not None:
                        if item_sequence != self.expected.get(stream, 0):
                            raise RpcError(15, "frames were lost")
                        self.expected[stream] = item_sequence + 1
                    unpaid = self.consumed(stream, len(message), unpaid + (item_stream == stream))
                    if item_stream == stream:
                        yield message
        finally:
            if not done:
                self.send(CANCEL, self.rpc.Cancel(reason=b"client"), stream)
                self.drain(stream)
            self.sequence.pop(stream, None)
            self.expected.pop(stream, None)

    def drain(self, stream, timeout=2.0):
        """After CANCEL one STATUS still comes: wait for it, so that the server has let go of everything."""
        end = time.monotonic() + timeout
        while (frame := self.receive(end - time.monotonic())):
            kind, at, sequence, session, body = frame
            if at == 0 and session == self.number:
                self.expected[0] = sequence + 1
                self.session_frame(kind, body)
            if at == stream and kind == STATUS:
                return


def key_of(path):
    """The key is the last word of what `tandem keys` writes: NAME.secret, NAME.public."""
    return pathlib.Path(path).read_text().split()[-1].encode() if path else None


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--endpoint", default="ipc:///run/tandem/rpc.sock", help="the router's --rpc-listen")
    p.add_argument("--secret", metavar="FILE", help="our secret key, NAME.secret of tandem keys")
    p.add_argument("--server", metavar="FILE", help="the router's public key, router.public of tandem keys")
    p.add_argument("--timeout", type=float, default=60.0, metavar="S", help="deadline of the whole call")
    p.add_argument("--max-tokens", type=int)
    p.add_argument("--temperature", type=float)
    p.add_argument("--seed", type=int)
    p.add_argument("--no-thinking", action="store_true")
    p.add_argument("prompt")
    a = p.parse_args()
    if bool(a.secret) != bool(a.server):
        p.error("--secret and --server go together")
    rpc, inference = bindings()
    request = inference.GenerateRequest(messages=[inference.ChatMessage(role="user", content=a.prompt)])
    for name in ("max_tokens", "temperature", "seed"):
        if getattr(a, name) is not None:
            setattr(request, name, getattr(a, name))
    request.thinking = not a.no_thinking
    try:
        session = Session(a.endpoint, rpc, min(a.timeout, 10), key_of(a.secret), key_of(a.server))
        for message in session.call("tandem.v1.Inference/Generate", request, a.timeout):
            reply = inference.GenerateReply.FromString(message)
            if reply.reasoning:
                print(f"\033[2m{reply.reasoning}\033[0m" if sys.stdout.isatty() else reply.reasoning, end="", flush=True)
            print(reply.text, end="", flush=True)
            if reply.HasField("finish_reason"):
                print(f"\n[{reply.finish_reason}: {reply.prompt_tokens} + {reply.completion_tokens} tokens]", file=sys.stderr)
        session.close()
    except RpcError as e:
        sys.exit(f"\ntandem_client: {e}")
    except KeyboardInterrupt:
        sys.exit("\ntandem_client: cancelled")


if __name__ == "__main__":
    main()
