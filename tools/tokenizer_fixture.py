#!/usr/bin/env python3
"""Writes tests/data/tokenizer_smollm2.json: texts and the ids the reference tokenizer gives them.

usage: tokenizer_fixture.py TOKENIZER.json OUT.json
needs: pip install tokenizers

TOKENIZER.json is the model's own file, or one written from the metadata of its GGUF file. Each
entry has the ids with special tokens read as text and with special tokens parsed.
"""
import json
import sys

from tokenizers import Tokenizer

TEXTS = [
    "",
    "The capital of France is",
    "Hello, world! It's 12345.678 degrees; isn't it?",
    "  two  spaces\tand\ttabs\r\n\r\nnew lines \n \n",
    "def f(x):\n    return [i**2 for i in range(x)]  # \u00e9t\u00e9\n",
    "na\u00efve caf\u00e9 \u00fcber stra\u00dfe \u0141\u00f3d\u017a \u0395\u03bb\u03bb\u03ac\u03b4\u03b1 \u041c\u043e\u0441\u043a\u0432\u0430",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \u4e2d\u6587 \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u2028 \u00a0x\u3000y",
    "1 22 333 4444 55555 3.14e-10 0xdeadbeef \u0661\u0662\u0663 \u00bd",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "text with <|endoftext|> inside and <|not_a_token|>",
    # Bytes the vocabulary lacks are dropped.
    "a\x04b\x06c\x13\x14\x16\x1dd \U00040000\U000bffff\U0010ffff",
    "".join(chr(c) for c in range(0x20, 0x180)),
    "It was the best of times, it was the worst of times. " * 3,
]

tokenizer = Tokenizer.from_file(sys.argv[1])
out = []
for text in TEXTS:
    tokenizer.encode_special_tokens = True
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.encode_special_tokens = False
    parsed = tokenizer.encode(text, add_special_tokens=False).ids
    decoded = tokenizer.decode(parsed, skip_special_tokens=True)
    out.append({"text": text, "ids": plain, "ids_special": parsed, "decoded": decoded})
with open(sys.argv[2], "w") as f:
    f.write("[\n" + ",\n".join(json.dumps(case) for case in out) + "\n]\n")
