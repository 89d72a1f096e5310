# SPDX-License-Identifier: Apache-2.0
"""Paragraphs of English prose from the HTML of unpacked Debian packages.

  apt-get download python3.11-doc postgresql-doc-15
  for d in *.deb; do dpkg -x $d unpacked; done
  corpus.py unpacked corpus.txt

python3.11-doc is under the PSF licence, postgresql-doc-15 under the PostgreSQL licence.
"""
import hashlib
import html
import os
import re
import sys

FUNCTION_WORDS = set("a an the of to in is are be that this it as for with on by or and not if can from which at "
                     "has have will was when you used all one any may its than then".split())


def good(text):
    if not 90 <= len(text) <= 1500 or not text[0].isupper() or text[-1] not in ".!?":
        return False
    plain = sum(c.isalpha() or c in " ,.;:'\"()-!?" for c in text)
    if plain < 0.97 * len(text) or sum(c.isdigit() for c in text) > 0.02 * len(text):
        return False
    words = re.findall(r"[A-Za-z]+", text)
    return len(words) > 12 and sum(w.lower() in FUNCTION_WORDS for w in words) >= 0.28 * len(words)


def paragraphs(root):
    seen = set()
    for folder, dirs, files in sorted(os.walk(root)):
        dirs.sort()
        for name in sorted(files):
            if not name.endswith(".html"):
                continue
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as f:
                page = f.read()
            for m in re.finditer(r"<p\b[^>]*>(.*?)</p>", page, re.S | re.I):
                text = html.unescape(re.sub(r"<[^>]+>", "", m.group(1)))
                text = re.sub(r"\s+", " ", text).strip().translate(
                    {0x2019: "'", 0x2018: "'", 0x201c: '"', 0x201d: '"', 0x2014: "-", 0x2013: "-"})
                if not text or not text.isascii() or not good(text):
                    continue
                key = hashlib.md5(text.encode()).digest()
                if key not in seen:
                    seen.add(key)
                    yield text


def main():
    if len(sys.argv) != 3 or not os.path.isdir(sys.argv[1]):
        sys.exit("usage: corpus.py UNPACKED-DIRECTORY OUT.txt")
    with open(sys.argv[2], "w", encoding="utf-8") as f:
        n = size = 0
        for p in paragraphs(sys.argv[1]):
            f.write(p + "\n")
            n += 1
            size += len(p)
    if n == 0:
        sys.exit("corpus.py: no paragraph found; are the packages unpacked there?")
    print(f"{n} paragraphs, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
