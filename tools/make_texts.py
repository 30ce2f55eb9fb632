#!/usr/bin/env python3
"""Cut the public-domain texts that the tests, the demo and the evaluations read.

Source: the Debian package r-cran-janeaustenr (1.0.0-1), whose data set holds the Project
Gutenberg editions of Jane Austen's novels without their headers. R is not needed: this
script reads R's lazy-load database itself.

    apt-get download r-cran-janeaustenr
    dpkg -x r-cran-janeaustenr_*.deb austen
    python3 tools/make_texts.py austen/usr/lib/R/site-library/janeaustenr/data/Rdata .

Writes tests/data/texts/*.txt and assets/demo.txt below the last argument. Paragraphs are
unwrapped to one line each, a blank line apart; every file begins at a chapter heading and
ends with a whole paragraph. Standard library only; the output is the same on every run.
"""
import argparse
import bz2
import lzma
import re
import struct
import zlib
from pathlib import Path

# name in the package, file written, heading of chapter 1, least number of characters
EXCERPTS = [
    ("emma", "tests/data/texts/emma.txt", "CHAPTER I", 48_000),
    ("mansfieldpark", "tests/data/texts/mansfield_park.txt", "CHAPTER I", 48_000),
    ("persuasion", "tests/data/texts/persuasion.txt", "Chapter 1", 48_000),
    ("northangerabbey", "tests/data/texts/northanger_abbey.txt", "CHAPTER 1", 48_000),
    ("prideprejudice", "tests/data/texts/pride_and_prejudice.txt", "Chapter 1", 48_000),
    ("sensesensibility", "assets/demo.txt", "CHAPTER 1", 20_000),
]

# Paragraphs put into assets/demo.txt (not Austen's), each after the first paragraph that ends
# beyond this share of the text: facts that are told once, for the demo to ask about.
PLANTED = [
    (0.50, "The cat of the house was called Marmalade."),
    (0.68, "The key of the garden gate was kept in a blue teapot."),
]

# R serialisation item types that occur in the package
SYM, LISTSXP, CHARSXP, LGL, INT, REAL, STR, VEC = 1, 2, 9, 10, 13, 14, 16, 19
NIL_VALUE, REFERENCE = 254, 255


class Unserialiser:
    """R's serialisation format in XDR form, versions 2 and 3: what string vectors need."""

    def __init__(self, data):
        if data[:2] != b"X\n":
            raise ValueError("not an XDR serialisation")
        self.data, self.pos, self.refs = data, 2, []

    def int(self):
        (value,) = struct.unpack_from(">i", self.data, self.pos)
        self.pos += 4
        return value

    def root(self):
        version = self.int()
        self.pos += 8  # writer version, least reader version
        if version == 3:
            size = self.int()
            self.pos += size  # name of the native encoding
        return self.item()

    def pairlist(self, flags):
        out = {}
        while flags & 255 != NIL_VALUE:
            if flags & 0x200:
                self.item()
            tag = self.item() if flags & 0x400 else None
            out[tag] = self.item()
            flags = self.int()
        return out

    def item(self):
        flags = self.int()
        kind = flags & 255
        if kind == NIL_VALUE:
            return None
        if kind == REFERENCE:
            return self.refs[((flags >> 8) or self.int()) - 1]
        if kind == SYM:
            self.refs.append(self.item())
            return self.refs[-1]
        if kind == LISTSXP:
            return self.pairlist(flags)
        if kind == CHARSXP:
            size = self.int()
            if size < 0:
                return None
            self.pos += size
            return self.data[self.pos - size : self.pos].decode("utf-8")
        if kind in (LGL, INT):
            count = self.int()
            value = list(struct.unpack_from(f">{count}i", self.data, self.pos))
            self.pos += 4 * count
        elif kind == REAL:
            count = self.int()
            value = list(struct.unpack_from(f">{count}d", self.data, self.pos))
            self.pos += 8 * count
        elif kind in (STR, VEC):
            value = [self.item() for _ in range(self.int())]
        else:
            raise ValueError(f"R item type {kind} is not supported")
        if flags & 0x200:
            attributes = self.item() or {}
            if kind == VEC and "names" in attributes:
                value = dict(zip(attributes["names"], value))
        return value


def read_lazy_load(base):
    """Yields (name, lines) of every string vector in the database `base`.rdx / .rdb."""
    index = Unserialiser(zlib.decompress(Path(f"{base}.rdx").read_bytes(), 31)).root()
    blob = Path(f"{base}.rdb").read_bytes()
    for name, (offset, size) in index["variables"].items():
        chunk = blob[offset : offset + size]
        kind = chunk[4:5]
        if kind == b"2":
            data = bz2.decompress(chunk[5:])
        elif kind == b"Z":
            filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
            data = lzma.decompress(chunk[5:], format=lzma.FORMAT_RAW, filters=filters)
        else:
            data = zlib.decompress(chunk[4:])
        yield name, Unserialiser(data).root()


def paragraphs(lines):
    """Unwraps hard-wrapped lines; blank lines part the paragraphs."""
    out, current = [], []
    for line in [*lines, ""]:
        line = line.rstrip()
        if line:
            current.append(line)
        elif current:
            out.append(" ".join(current))
            current = []
    return out


def excerpt(paras, heading, least):
    """Whole paragraphs from `heading` on, until at least `least` characters are taken."""
    text = ""
    for para in paras[paras.index(heading) :]:
        text += para + "\n\n"
        if len(text) >= least and not re.match(r"(?i)chapter\b", para):
            return text[:-1]
    raise ValueError("the novel is too short")


def plant(text, facts):
    paras = text.rstrip("\n").split("\n\n")
    out, end, waiting = [], 0, list(facts)
    for para in paras:
        out.append(para)
        end += len(para) + 2
        if waiting and end >= waiting[0][0] * len(text):
            out.append(waiting.pop(0)[1])
    return "\n\n".join(out) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rdata", help="the data base without its ending: .../data/Rdata")
    parser.add_argument("root", type=Path, help="root of the repository to write below")
    args = parser.parse_args()
    novels = dict(read_lazy_load(args.rdata))
    for name, path, heading, least in EXCERPTS:
        text = excerpt(paragraphs(novels[name]), heading, least)
        if path == "assets/demo.txt":
            text = plant(text, PLANTED)
        data = text.encode("ascii")  # fails, rather than replaces, on anything else
        (args.root / path).write_bytes(data)
        print(f"{path}: {len(data)} bytes")


if __name__ == "__main__":
    main()
