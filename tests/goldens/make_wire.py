#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Golden bytes of every message in proto/*.proto, made by Google's Python protobuf.

Writes tests/goldens/wire/<Message>.<full|min>.bin with its values in .json, wire/preamble.bin, and seeds for the fuzzer.
Needs protoc and the Python package protobuf (Debian: protobuf-compiler python3-protobuf). Run it from anywhere after a change
of a .proto file; tests/unit/test_wire.c fails until a new message has its golden here and its row there.

JSON: field -> value; bytes as hex text, 64-bit integers as decimal text, enums as numbers, only fields that are present.
"""
import json
import pathlib
import struct
import subprocess
import tempfile

from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf import message_factory

ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/goldens/wire"
SEEDS = ROOT / "tests/fuzz/corpus/fuzz_rpc"
FRAMES = {  # td_frame_type: what stands behind the preamble
    "Hello": 1, "Welcome": 2, "Call": 3, "Data": 4, "Batch": 5, "Credit": 6, "Cancel": 8, "Status": 9, "Ping": 10, "Goaway": 12,
}


def load_messages():
    protos = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "proto").glob("*.proto"))
    with tempfile.NamedTemporaryFile() as f:
        subprocess.run(["protoc", f"-I{ROOT}", f"--descriptor_set_out={f.name}", *protos], check=True, cwd=ROOT)
        files = descriptor_pb2.FileDescriptorSet.FromString(f.read())
    pool = descriptor_pool.DescriptorPool()
    for fd in files.file:  # protoc writes dependencies first
        pool.Add(fd)
    names = [f"{fd.package}.{m.name}" for fd in files.file for m in fd.message_type]
    get = getattr(message_factory, "GetMessageClass", None)
    if get is None:  # protobuf 3.x
        get = message_factory.MessageFactory(pool).GetPrototype
    return [get(pool.FindMessageTypeByName(n)) for n in names]


def scalar(field, i):
    """A value that shows a wrong type, width or sign at once; i tells repeated entries apart."""
    t = field.type
    if t == field.TYPE_UINT64:
        return 2**64 - 1 - field.number - i
    if t in (field.TYPE_UINT32, field.TYPE_FIXED32):
        return 2**32 - 1 - field.number - i
    if t == field.TYPE_INT32:
        return -(2**31) + field.number + i
    if t == field.TYPE_FLOAT:
        return -0.15625 * (field.number + i)
    if t == field.TYPE_BOOL:
        return True
    if t == field.TYPE_ENUM:
        return field.enum_type.values[-1].number
    if t == field.TYPE_BYTES:
        return bytes([0, 255, field.number, i])
    if t == field.TYPE_STRING:
        return f"{field.name} \u00e9\u4e2d\U0001f600 {i}"
    raise SystemExit(f"{field.full_name}: no value for type {t}")


def is_repeated(field):
    return field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED


def is_required(field):
    return field.is_required if hasattr(field, "is_required") else field.label == field.LABEL_REQUIRED


def fill(m, full):
    for field in m.DESCRIPTOR.fields:
        if not full and not is_required(field):
            continue
        for i in range(2 if is_repeated(field) else 1):
            if field.message_type:
                fill(getattr(m, field.name).add() if is_repeated(field) else getattr(m, field.name), full)
                if not is_repeated(field):
                    getattr(m, field.name).SetInParent()
            elif is_repeated(field):
                getattr(m, field.name).append(scalar(field, i))
            else:
                setattr(m, field.name, scalar(field, i))


def dump_one(field, v):
    if field.message_type:
        return dump(v)
    if field.type == field.TYPE_UINT64:
        return str(v)
    return v.hex() if isinstance(v, bytes) else v


def dump(m):
    return {f.name: [dump_one(f, x) for x in v] if is_repeated(f) else dump_one(f, v) for f, v in m.ListFields()}


def preamble(kind, stream, sequence, session):
    return struct.pack("<HBBBBHQII", 0x4454, 1, 0, kind, 0, 0, stream, sequence, session)


def main():
    OUT.mkdir(exist_ok=True)
    SEEDS.mkdir(parents=True, exist_ok=True)
    for old in [*OUT.iterdir(), *SEEDS.iterdir()]:
        old.unlink()
    for cls in load_messages():
        name = cls.DESCRIPTOR.name
        for kind in ("full", "min"):
            m = cls()
            fill(m, kind == "full")
            data = m.SerializeToString()
            (OUT / f"{name}.{kind}.bin").write_bytes(data)
            (OUT / f"{name}.{kind}.json").write_text(json.dumps(dump(m), indent=1) + "\n")
            if name in FRAMES:
                seed = preamble(FRAMES[name], 2 if name in ("Call", "Data", "Cancel", "Status") else 0, 0, 1) + data
                (SEEDS / f"{name.lower()}_{kind}").write_bytes(seed)
    (OUT / "preamble.bin").write_bytes(preamble(4, 0x0102030405060708, 0x11121314, 0x21222324))


if __name__ == "__main__":
    main()
