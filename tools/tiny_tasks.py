"""What the tiny model is trained and measured on: public-domain prose and retrieval tasks in it.

A sequence is built from parts `(tokens, weight, answer)`: token ids as uint16, the weight of
their loss in quarters, and whether they are an answer that the measurements count. Bytes are
their own ids; four special tokens follow them.
"""
import random
import re
from pathlib import Path

import numpy as np

from make_texts import paragraphs, read_lazy_load

END_OF_TEXT, USER, ASSISTANT, END = 256, 257, 258, 259
SPECIALS = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB = 260

# The pass key's words are those of src/eval/samples.rs, the needles' those of src/eval/ruler.
HEAD = "Somewhere in this long text a pass key is hidden. Find it and memorize it.\n\n"
NEEDLE = "\n\nThe pass key is {0}. Do not forget it: {0} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key?"
CODES_HEAD = "A list of codes. Memorize them.\n\n"
CODES_QUESTION = "\n\nWhat are the codes?\n\n"
MAGIC_HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will "
    "quiz you about the numbers afterwards.\n"
)

FILLER, PLAIN, REPEATED, ANSWER = 0, 4, 6, 40  # weights in quarters
IS_ANSWER = 128


def ids(text):
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, dtype=np.uint8).astype(np.uint16)


def read_texts(rdata, verses):
    """(name, text) of Jane Austen's novels and of the King James Bible."""
    novels = sorted(read_lazy_load(rdata))
    texts = [(name, "\n\n".join(paragraphs(lines)) + "\n") for name, lines in novels]
    # A verse a line behind its place.
    bible = re.sub(r"^\d?[A-Za-z]+\s*\d+:\d+\s+", "", Path(verses).read_text(), flags=re.M)
    return [*texts, ("bible", bible)]


class Texts:
    """Prose as one long string of bytes."""

    def __init__(self, texts):
        self.data = "\n\n".join(texts).encode("ascii", errors="ignore")
        self.words = sorted({w for w in re.findall(rb"\b[a-z]{4,9}\b", self.data[:2_000_000])})

    def cut(self, rng, n):
        """`n` bytes from the beginning of some word on."""
        at = rng.randrange(len(self.data) - n - 64)
        space = self.data.find(b" ", at, at + 32)
        at = space + 1 if space >= 0 else at
        return self.data[at : at + n]


def spread(rng, texts, items, room):
    """Lines `items` spread over `room` bytes of prose, in order."""
    room = max(room, 0)
    ends = sorted(rng.randrange(room + 1) for _ in items)
    prose = texts.cut(rng, room)
    parts, at = [], 0
    for end, item in zip(ends, items):
        parts += [(prose[at:end], FILLER, False), (item, PLAIN, False)]
        at = end
    return [*parts, (prose[at:], FILLER, False)]


def size(parts):
    return sum(len(p[0]) for p in parts)


def asked(rng, question, answers, chat):
    """Question and answers as plain text, or as turns of a chat."""
    if not chat:
        return [(question, PLAIN, False), *answers, (b"\n", PLAIN, False)]
    turn = np.array([END, ASSISTANT], dtype=np.uint16)
    end = np.array([END], dtype=np.uint16)
    return [(question, PLAIN, False), (turn, PLAIN, False), *answers, (end, ANSWER // 4, False)]


def around(head, body, tail, chat):
    first = [np.array([USER], dtype=np.uint16)] if chat else []
    return [*((f, PLAIN, False) for f in first), (head, PLAIN, False), *body, *tail]


def prose(rng, texts, room, **_):
    return [(texts.cut(rng, room), PLAIN, False)]


def passkey(rng, texts, room, chat=False, **_):
    key = str(rng.randrange(10_000, 100_000))
    # In plain text the answer follows the question's own line.
    before = "The pass key is " if chat else " The pass key is "
    answers = [(before, PLAIN, False), (key, ANSWER, True), (".", PLAIN, False)]
    tail = asked(rng, QUESTION, answers, chat)
    needle = NEEDLE.format(key)
    body = spread(rng, texts, [needle], room - len(HEAD) - len(needle) - size(tail) - chat)
    return around(HEAD, body, tail, chat)


def codes(rng, texts, room, keys=None, questions=None, chat=False, **_):
    """Lines `QVX: 48213`, as a list before prose or spread over it, some of which are asked for."""
    line, fixed = 11, len(CODES_HEAD) + len(CODES_QUESTION) + 48
    most = max((room - fixed) // (2 * line), 1)
    keys = min(keys or round(8 * 8 ** rng.random()), most)
    names = set()
    while len(names) < keys:
        names.add("".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=3)))
    names = sorted(names)
    rng.shuffle(names)
    values = {n: str(rng.randrange(10_000, 100_000)) for n in names}
    lines = [f"\n{n}: {values[n]}\n" for n in names]
    if chat:
        name = rng.choice(names)
        tail = asked(rng, f"\n\nWhat is {name}?", [(values[name], ANSWER, True)], True)
    else:
        order = rng.sample(names, min(questions or 16, keys, (room - fixed) // line - keys))
        answers = []
        for i, name in enumerate(order):
            answers += [(f"{name}: ", FILLER, False), (values[name], ANSWER // (2 if i else 1), True)]
            answers += [("\n", PLAIN, False)]
        tail = asked(rng, CODES_QUESTION, answers, False)
    left = room - len(CODES_HEAD) - size(tail) - chat - sum(map(len, lines))
    if rng.random() < 0.3:
        body = [("".join(lines), FILLER, False), (texts.cut(rng, max(left, 0)), FILLER, False)]
    else:
        body = spread(rng, texts, lines, left)
    return around(CODES_HEAD, body, tail, chat)


def magic(rng, texts, room, keys=None, chat=False, **_):
    """RULER's needles of the kind multikey, with other words."""
    most = max((room - 400) // 120, 1)
    keys = min(keys or rng.choice([1, 2, 4, 4, 8, 16]), most)
    names = set()
    while len(names) < keys:
        names.add(b"-".join(rng.choices(texts.words, k=2)).decode())
    names = sorted(names)
    rng.shuffle(names)
    values = [str(rng.randrange(1_000_000, 10_000_000)) for _ in names]
    lines = [f"One of the special magic numbers for {n} is: {v}.\n" for n, v in zip(names, values)]
    name, value = rng.choice(list(zip(names, values)))
    question = f"\nWhat is the special magic number for {name} mentioned in the provided text?"
    start = f"The special magic number for {name} mentioned in the provided text is "
    answers = [(start if chat else " " + start, PLAIN, False), (value, ANSWER, True), (".", PLAIN, False)]
    tail = asked(rng, question, answers, chat)
    left = room - len(MAGIC_HEAD) - size(tail) - chat - sum(map(len, lines))
    return around(MAGIC_HEAD, spread(rng, texts, lines, left), tail, chat)


def babble(rng, texts, n):
    """`n` bytes that no prose predicts: letters, digits or words in random order."""
    kind = rng.randrange(3)
    if kind == 0:
        return bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz     ", k=n))
    if kind == 1:
        return bytes(rng.choices(b"0123456789ABCDEF\n ", k=n))
    return b" ".join(rng.choices(texts.words, k=n // 5 + 1))[:n]


def copy(rng, texts, room, **_):
    """A passage twice."""
    half, odd = divmod(room, 2)
    plain = rng.random() < 0.5
    passage = texts.cut(rng, half) if plain else babble(rng, texts, half)
    first = FILLER if plain else 0
    return [(passage, first, False), (passage, PLAIN, False), (b"\n" * odd, 0, False)]


def recur(rng, texts, room, **_):
    """Passages that come back somewhere in prose."""
    parts, seen, left = [], [], room
    while left > 0:
        n = min(rng.randrange(24, 160), left)
        if seen and rng.random() < 0.6:
            parts.append((rng.choice(seen)[:left], REPEATED, False))
        elif rng.random() < 0.6:
            seen.append(babble(rng, texts, n))
            parts.append((seen[-1], 0, False))
        else:
            parts.append((texts.cut(rng, n), FILLER, False))
        left -= len(parts[-1][0])
    return parts


MIX = [(prose, 0.12), (passkey, 0.18), (codes, 0.34), (magic, 0.16), (copy, 0.12), (recur, 0.08)]
CHAT = 0.25  # share of the tasks with a question that are turns of a chat


def sequence(rng, texts, length, task=None, **options):
    """`length + 1` tokens from END_OF_TEXT on, as (ids uint16, weights uint8)."""
    if task is None:
        task = rng.choices([t for t, _ in MIX], [w for _, w in MIX])[0]
        options = {"chat": rng.random() < CHAT}
    parts = task(rng, texts, length, **options)
    out = np.full(length + 1, END_OF_TEXT, dtype=np.uint16)
    weight = np.zeros(length + 1, dtype=np.uint8)
    at = 1
    for tokens, w, is_answer in parts:
        tokens = tokens if isinstance(tokens, np.ndarray) else ids(tokens)
        end = at + len(tokens)
        if end > length + 1:
            raise ValueError(f"{task.__name__} needs more than {length} tokens")
        out[at:end] = tokens
        weight[at:end] = w | (IS_ANSWER if is_answer else 0)
        at = end
    return out, weight


def batch(seed, texts, length, n, task=None, **options):
    """`n` sequences: ids [n, length + 1] and weights of the same shape."""
    rng = random.Random(seed)
    made = [sequence(rng, texts, length, task, **options) for _ in range(n)]
    return np.stack([m[0] for m in made]), np.stack([m[1] for m in made])
