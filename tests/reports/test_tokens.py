"""Samples as text and as a page: everything is shown, and nothing that is shown can act."""

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from llmrecipes.reports.tokens import ANSWER, PROMPT, REST, Shown, Token, page, samples_text, spaced, visible

HOSTILE = [
    "<script>alert(1)</script>",
    '" onmouseover="x',
    "\x1b[2J\x1b]0;x\x07",
    "[red]markup[/red]",
    "&amp;",
    "\u202eabc",
]


def token(position: int, text: str, segment: str = PROMPT, document: int = 1, control: bool = False) -> Token:
    return Token(position, document, 100 + position, text, segment, segment == ANSWER, control)


SHOWN = Shown(
    "train, sample 3",
    (
        token(0, "<s>", control=True),
        token(1, "Ask"),
        token(2, "\n"),
        token(3, " it", ANSWER),
        token(4, "</s>", ANSWER, control=True),
        token(5, "\n", REST),
    ),
    ("no end token: a lint",),
)


class Reader(HTMLParser):
    """Collects the tags, attributes and texts of a page, and demands that every tag is closed in order."""

    VOID = ("meta",)

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(content)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def terminal(shown: Shown, *, colours: bool, listed_tokens: int = 0) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=colours, color_system="standard" if colours else None, width=40)
    console.print(samples_text([shown], listed_tokens), soft_wrap=True, end="")
    return stream.getvalue()


def test_a_terminal_without_colours_shows_all_there_is() -> None:
    assert terminal(SHOWN, colours=False).splitlines() == [
        "train, sample 3: 6 tokens, 2 supervised, 2 control tokens",
        "  lint  no end token: a lint",
        "",
        "<s>Ask␊",
        "⟦ it</s>⟧␊",
        "",
        "",
        "document position       id  segment  supervised  text",
        "       1        0      100  prompt   -           <s>",
        "       1        1      101  prompt   -           Ask",
        "       1        2      102  prompt   -           ␊",
        "       1        3      103  answer   yes         ␣it",
        "       1        4      104  answer   yes         </s>",
        "       1        5      105  rest     -           ␊",
        "",
    ]


def test_colours_tell_what_is_supervised_and_what_is_control() -> None:
    coloured = terminal(SHOWN, colours=True)
    assert "\x1b[32m it\x1b[0m" in coloured
    assert "\x1b[1;35m<s>\x1b[0m" in coloured


def test_a_long_sample_is_listed_from_both_ends() -> None:
    shown = Shown("x", tuple(token(place, f"t{place}") for place in range(20)), ())
    listed = [
        line.split()[-1] for line in terminal(shown, colours=False, listed_tokens=5).splitlines() if " - " in line
    ]
    assert listed == ["t0", "t1", "t2", "t18", "t19"]
    assert "15 tokens left out" in terminal(shown, colours=False, listed_tokens=5)
    assert "left out" not in terminal(shown, colours=False, listed_tokens=20)


def test_a_page_needs_and_runs_nothing() -> None:
    content = page("title", [SHOWN])
    read = Reader(content)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in read.attributes
    assert not {"script", "link", "img", "iframe", "object", "form", "a"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "url(" not in content and "@import" not in content


def test_a_page_shows_every_token_with_all_that_is_known_of_it() -> None:
    read = Reader(page("title", [SHOWN]))
    assert "".join(read.texts["span"]).endswith("<s>Ask␊\n it</s>␊\n")
    titles = [value for name, value in read.attributes if name == "title"]
    assert titles[3] == "id 103, position 3, document 1, answer, supervised"
    assert titles[5] == "id 105, position 5, document 1, rest, not supervised"
    assert [cell for cell in read.texts["td"] if cell == "yes"] == ["yes"] * 2
    assert "no end token: a lint" in read.texts["p"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_token_holds_acts_on_nothing(text: str) -> None:
    shown = Shown(text, (token(0, text),), (text,))
    plain, content = terminal(shown, colours=False), page(text, [shown])
    assert not {"\x1b", "\x07", "\u202e"} & set(plain + content)
    read, harmless = Reader(content), Reader(page("a", [Shown("a", (token(0, "a"),), ("a",))]))
    assert read.tags == harmless.tags
    assert [name for name, _ in read.attributes] == [name for name, _ in harmless.attributes]
    assert visible(text) in "".join(read.texts["span"])
    assert visible(text) in plain


def test_a_document_border_is_seen() -> None:
    shown = Shown("x", (token(0, "a"), token(0, "b", document=2), token(1, "c", document=2)), ())
    classes = [value for name, value in Reader(page("x", [shown])).attributes if name == "class" and "border" in value]
    assert len(classes) == 1
    assert "\na\nbc\n" in terminal(shown, colours=False)
    assert "2 documents" in terminal(shown, colours=False)


def test_control_characters_become_pictures() -> None:
    assert visible("a\n\t\x1b\x7f\u2028é") == "a␊␉␛␡\ufffdé"
    assert spaced(" a b") == "␣a␣b"
