"""A file is doubted for whatever it may read, keep or say without its being noted, and for nothing that people need."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from llmrecipes.data.purity import OWN, STANDARD, doubt, is_as_first_seen

HARMLESS = '''
"""What __subclasses__ are, open() and all: a docstring may say anything."""

from __future__ import annotations

import json
import logging
import math as maths
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from random import Random
from typing import Any, NamedTuple

from llmrecipes.config.options import option
from llmrecipes.data.conversations import layout_of, read_conversation
from llmrecipes.data.files import load_hub, load_rows, load_split, save_rows
from llmrecipes.data.mixing import draw_counts
from llmrecipes.data.rows import Row, Rows, text, with_text
from llmrecipes.errors import DataError
from llmrecipes.prompts import EncodedSamples, Piece, encode_pairs, encode_samples, end_piece

log = logging.getLogger("llmrecipes")
MARK = re.compile(r"### ?(Human|Assistant):")
ROLES = {"user": "User", "bot": "Assistant"}
WORDS = frozenset(["a", "b"]) | {"c"}
PROMPT = "\\n".join(["Say", "{q}"]).strip()
NAMES = [name.upper for name in ("a", "b")]
key = lambda row: row["q"].strip()


class Turn(NamedTuple):
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Options:
    rows: int = option(9, "rows", at_least=1)
    names: list[str] = option(["a"], "names")
    more: dict[str, int] = field(default_factory=dict)

    @property
    def first(self) -> str:
        return self.names[0]


class Set:
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def get_set(dataset_config: Any, tokenizer: Any, split: str, fields: tuple[str, ...] = ("q", "a")) -> Any:
    path = getattr(dataset_config, "data_path", "") or __file__
    rows = load_split(dataset_config, split, fields)
    left_out = 0

    def make(row: Row, seen: list[str] = []) -> tuple[str, str]:
        nonlocal left_out
        left_out += 1
        turn = json.loads(row["turns"])
        return PROMPT.format(q=text(row, "q")), str(turn["a"])

    generator = Random(7)
    order = sorted(rows, key=lambda row: random.random())
    counts = {}
    counts["a"] = maths.floor(generator.random())
    log.warning("%s: %d left out, %s", type(rows).__name__, left_out, path)
    chained = chain.from_iterable([order])
    return encode_pairs(tokenizer, rows.map(make))


if __name__ == "__main__":
    raise SystemExit
'''


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What a plug-in imports is there by the time it is judged."""
    for name in STANDARD + OWN:
        __import__(name)


def test_what_people_need_is_not_doubted() -> None:
    assert doubt(HARMLESS.encode()) == ""


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_ten_lines_of_the_readme_are_not_doubted(name: str) -> None:
    text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
    (example,) = [block for block in text.split("```") if block.startswith("python\n# colors.py")]
    assert doubt(example.removeprefix("python\n").encode()) == ""


@pytest.mark.parametrize("name", STANDARD + OWN)
def test_every_module_that_is_known_is_there_and_taken(name: str) -> None:
    assert doubt(f"import {name} as x".encode()) == ""


DOUBTED = [
    # other modules
    ("import pandas", "line 1: it imports pandas"),
    ("\nimport json, os", "line 2: it imports os"),
    ("import pathlib", "imports pathlib"),
    ("from os import environ", "imports os"),
    ("from . import helper", "imports ."),
    ("from .json import loads", "imports .json"),
    ("import collections.abc", "imports collections.abc"),
    ("import logging.handlers as handlers", "imports logging.handlers"),
    ("import llmrecipes.environment as e", "imports llmrecipes.environment"),
    ("from llmrecipes import environment", "imports llmrecipes"),
    ("from llmrecipes.models.loading import load_model", "imports llmrecipes.models.loading"),
    ("def f():\n    from safetensors import safe_open", "line 2: it imports safetensors"),
    ("try:\n    import orjson as json\nexcept ImportError:\n    import json", "imports orjson"),
    # what known modules have imported themselves
    ("from llmrecipes.data.files import Path", "takes Path from llmrecipes.data.files"),
    ("from llmrecipes.data.files import csv", "takes csv from llmrecipes.data.files"),
    ("from llmrecipes.data.files import *", "takes * from llmrecipes.data.files"),
    ("import llmrecipes.data.files as files\nx = files.Path", "line 2: it takes Path from llmrecipes.data.files"),
    ("import logging\nx = logging.os", "takes os from logging"),
    ("from json import codecs", "takes codecs from json"),
    ("import logging\nlogging.FileHandler", "takes FileHandler from logging"),
    ("from random import _urandom", "takes _urandom from random"),
    ("import logging\nlogs = logging\nlogs.os", "line 2: it hands on the module logging"),
    ("import json\ndef f(x):\n    return getattr(json, 'codecs')", "hands on the module json"),
    # built-ins, by whatever way
    ("def f(p):\n    return open(p)", "line 2: it uses open"),
    ("read = open", "uses open"),
    ("def f():\n    return eval('1')", "uses eval"),
    ("def f():\n    exec('1')", "uses exec"),
    ("def f():\n    return compile('1', '', 'eval')", "uses compile"),
    ("def f():\n    return __import__('os')", "uses __import__"),
    ("def f():\n    return globals()", "uses globals"),
    ("def f(x):\n    return vars(x)", "uses vars"),
    ("def f():\n    return input()", "uses input"),
    ("def f():\n    print('seen')", "uses print"),
    ("def f(q):\n    return hash(q) % 10 == 0", "uses hash"),
    ("def f(x):\n    setattr(x, 'a', 1)", "uses setattr"),
    ("def f():\n    return __builtins__", "uses __builtins__"),
    ("def f():\n    return __loader__.get_data('a')", "uses __loader__"),
    ("def f():\n    return f.__globals__", "uses __globals__"),
    ("def f(x):\n    return getattr(x, '__globals__')", "uses __globals__"),
    ("def f(x, y):\n    return getattr(x, y)", "uses getattr"),
    ("f = getattr", "uses getattr"),
    ("def f(x):\n    return '{0.__globals__}'.format(x)", "uses __globals__"),
    ("def f(x):\n    match x:\n        case object(__globals__=y):\n            return y", "uses __globals__"),
    ("from operator import attrgetter", "uses attrgetter"),
    ("import operator\ndef f(x):\n    return operator.methodcaller('open')(x)", "uses methodcaller"),
    ("from typing import get_type_hints", "uses get_type_hints"),
    ("from typing import ForwardRef", "uses ForwardRef"),
    ("from dataclasses import make_dataclass", "uses make_dataclass"),
    ("def f(rows):\n    return rows.gi_frame.f_builtins", "uses f_builtins"),
    ("def f(rows):\n    return rows.gi_frame.f_back.f_globals", "uses f_back"),
    ("class A:\n    def __init_subclass__(cls):\n        pass", "uses __init_subclass__"),
    # what reads, writes or draws by itself
    ("def f(t):\n    return t.from_pretrained('a')", "uses from_pretrained"),
    ("def f(t):\n    return getattr(t, 'from_file')('a')", "uses from_file"),
    ("def f(t):\n    t.save_pretrained('a')", "uses save_pretrained"),
    ("def f(t):\n    t.backend_tokenizer.save('a')", "uses save"),
    ("from random import SystemRandom", "uses SystemRandom"),
    ("from random import Random\ndef f():\n    return Random()", "draws by a seed of the machine's"),
    ("import random\ndef f():\n    random.seed()", "draws by a seed of the machine's"),
    ("from random import Random as R\ndef f():\n    return R()", "renames Random"),
    ("import logging\nlog = logging.getLogger(__name__)", "logs elsewhere than to llmrecipes"),
    # what is read while the file is imported
    ("from llmrecipes.data.files import load_rows\nROWS = list(load_rows('a.csv'))", "calls load_rows while"),
    ("def read():\n    return 1\nROWS = read()", "calls read while it is imported"),
    ("def dict():\n    return 1\nROWS = dict()", "calls dict while it is imported"),
    ("ROWS = (lambda: 1)()", "calls something while it is imported"),
    ("def read(f):\n    return f\n@read\ndef g():\n    pass", "calls read while it is imported"),
    ("class A:\n    x = sorted((1,))", "calls sorted while it is imported"),
    ("def f(x=max(1, 2)):\n    pass", "calls max while it is imported"),
    ("from functools import lru_cache\n@lru_cache\ndef f():\n    pass", "calls lru_cache while it is imported"),
    ("from functools import cache\n@cache\ndef f():\n    pass", "calls cache while it is imported"),
    ("LINES = (line for line in ['a'])", "makes a generator while it is imported"),
    # what is kept from one call to the next
    ("def f():\n    global seen\n    seen = 1", "keeps seen from one call to the next"),
    ("def f(seen=[]):\n    pass", "has a default that lasts"),
    ("def f(*, seen={}):\n    pass", "has a default that lasts"),
    ("f = lambda seen=set(): seen", "has a default that lasts"),
    ("async def f(seen=[]):\n    pass", "has a default that lasts"),
    ("class A:\n    seen = []", "has a default that lasts"),
    ("class A:\n    seen: dict = dict()", "has a default that lasts"),
    ("def f():\n    f.seen = 1", "changes f.seen"),
    ("def f(t):\n    t.pad_token = t.eos_token", "changes t.pad_token"),
    ("def f(t):\n    del t.a.b", "changes ....b"),
    ("def f(t):\n    t.count += 1", "changes t.count"),
    ("import random\nrandom.seed = 1", "changes random.seed"),
    # no Python
    ("def f(:", "its file cannot be parsed"),
    ("\0", "its file cannot be parsed"),
    ("x = " + "(" * 5000, "its file cannot be parsed"),
    ("x = " + "-" * 100_000 + "1", "its file cannot be parsed"),
]


@pytest.mark.parametrize(("source", "why"), DOUBTED, ids=[source[:60] for source, _ in DOUBTED])
def test_what_may_go_unnoted_is_doubted(source: str, why: str) -> None:
    assert why in doubt(source.encode())


def test_what_is_no_text_is_doubted() -> None:
    assert doubt(b"\x7fELF\x02\x01\xff\xfe") == "its file cannot be parsed"


def test_a_file_that_takes_the_name_of_a_known_module_is_doubted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doubt(b"import html") == ""
    (tmp_path / "html.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "html")
    __import__("html")
    assert doubt(b"import html") == "line 1: it imports html"


def test_what_a_module_holds_is_known_by_its_values() -> None:
    mine = ModuleType("mine")
    mine.seen, mine.made = {"a": [1]}, lambda: None  # type: ignore[attr-defined]
    assert is_as_first_seen(mine) and is_as_first_seen(mine)
    mine.seen["a"].append(2)  # type: ignore[attr-defined]
    assert not is_as_first_seen(mine) and not is_as_first_seen(mine)
    mine.seen["a"].pop()  # type: ignore[attr-defined]
    assert is_as_first_seen(mine)
