#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Parse a KvSegment whose frames were concatenated, with Google's Python protobuf, and print what was found.

usage: check_kv_wire.py FILE. Exit 77: protobuf for Python or protoc is missing.
"""
import pathlib
import subprocess
import sys
import tempfile

try:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
except ImportError:
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parents[2]


def segment_class():
    with tempfile.NamedTemporaryFile() as f:
        try:
            subprocess.run(["protoc", f"-I{ROOT}", f"--descriptor_set_out={f.name}", "proto/kv.proto"], check=True, cwd=ROOT)
        except FileNotFoundError:
            sys.exit(77)
        files = descriptor_pb2.FileDescriptorSet.FromString(f.read())
    pool = descriptor_pool.DescriptorPool()
    for fd in files.file:
        pool.Add(fd)
    get = getattr(message_factory, "GetMessageClass", None) or message_factory.MessageFactory(pool).GetPrototype
    return get(pool.FindMessageTypeByName("tandem.v1.KvSegment"))


def main():
    m = segment_class().FromString(pathlib.Path(sys.argv[1]).read_bytes())
    assert m.IsInitialized()
    runs = ",".join(f"{r.block}:{r.rows}:{r.crc32c:08x}:{r.chain.hex() if r.HasField('chain') else '-'}" for r in m.runs)
    print(m.ticket.hex(), m.attempt, m.generation, m.prefill_epoch.hex(), m.decode_epoch.hex(), m.model_hash.hex(),
          m.profile_id.hex(), m.layout_hash.hex(), m.group, runs, len(m.payload), sum(m.payload) & 0xFFFFFFFF)


main()
