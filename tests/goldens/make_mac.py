#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The golden message of tests/unit/test_mac.c: AES-128-GMAC as proto/kv.proto says, from the standards' text (FIPS 197, NIST SP
800-38D) in plain Python. Checks itself against test case 2 of the GCM submission and FIPS 197's example. Run it, paste the output."""
import hashlib
import struct


def make_sbox():
    p = q = 1
    box = [0] * 256
    while True:
        p ^= (p << 1 & 255) ^ (0x1B if p & 128 else 0)
        q ^= q << 1
        q ^= q << 2
        q ^= q << 4
        q &= 255
        if q & 128:
            q ^= 9
        x = q
        for k in range(1, 5):
            x ^= (q << k | q >> (8 - k)) & 255
        box[p] = x ^ 0x63
        if p == 1:
            break
    box[0] = 0x63
    return box


SBOX = make_sbox()


def xtime(a):
    return (a << 1 ^ (0x1B if a & 128 else 0)) & 255


def aes128(key, block):
    words = [list(key[i:i + 4]) for i in range(0, 16, 4)]
    rcon = 1
    for i in range(4, 44):
        w = list(words[i - 1])
        if i % 4 == 0:
            w = [SBOX[b] for b in w[1:] + w[:1]]
            w[0] ^= rcon
            rcon = xtime(rcon)
        words.append([a ^ b for a, b in zip(words[i - 4], w)])
    keys = [sum(words[r * 4:r * 4 + 4], []) for r in range(11)]
    s = [a ^ b for a, b in zip(block, keys[0])]
    for r in range(1, 11):
        s = [SBOX[b] for b in s]
        s = [s[(i + 4 * (i % 4)) % 16] for i in range(16)]
        if r < 10:
            t = []
            for c in range(0, 16, 4):
                a = s[c:c + 4]
                t += [xtime(a[i]) ^ xtime(a[(i + 1) % 4]) ^ a[(i + 1) % 4] ^ a[(i + 2) % 4] ^ a[(i + 3) % 4] for i in range(4)]
            s = t
        s = [a ^ b for a, b in zip(s, keys[r])]
    return bytes(s)


def multiply(x, y):
    z = 0
    for i in range(128):
        if x >> (127 - i) & 1:
            z ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return z


def ghash(h, data):
    y = 0
    for i in range(0, len(data), 16):
        y = multiply(y ^ int.from_bytes(data[i:i + 16].ljust(16, b"\0"), "big"), h)
    return y


def gcm_tag(key, nonce, aad, cipher=b""):
    h = int.from_bytes(aes128(key, bytes(16)), "big")
    padded = aad + bytes(-len(aad) % 16) + cipher + bytes(-len(cipher) % 16)
    s = ghash(h, padded + struct.pack(">QQ", len(aad) * 8, len(cipher) * 8))
    return (s ^ int.from_bytes(aes128(key, nonce + b"\0\0\0\1"), "big")).to_bytes(16, "big")


assert aes128(bytes(range(16)), bytes.fromhex("00112233445566778899aabbccddeeff")).hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"
assert gcm_tag(bytes(16), bytes(12), b"").hex() == "58e2fccefa7e3061367f1d57a4e7455a"
assert gcm_tag(bytes(16), bytes(12), b"", bytes.fromhex("0388dace60b6a392f328c2b971b2fe78")).hex() == "ab6e47d42cec13bdf53a67b21257bddf"

ticket_key, prefill, decode = bytes(range(16)), b"\xaa" * 16, b"\xdd" * 16
key = hashlib.blake2b(prefill + decode, key=ticket_key, digest_size=16).digest()
parts = [b"preamble" * 3, b"", bytes(i * 7 & 255 for i in range(1000))]
counter = 0x0102030405060708
aad = b"".join(struct.pack("<Q", len(p)) + p for p in parts)
nonce = b"\1\0\0\0" + struct.pack("<Q", counter)
print("key ", key.hex())
print("part", (b"\x82\x01\x18" + struct.pack("<Q", counter) + gcm_tag(key, nonce, aad)).hex())
