"""Samples token by token: as text for a terminal, coloured where it has colours, and as one self-contained HTML page.

Whatever the tokens hold acts on nothing: control characters are drawn as pictures, the page has no scripts and may
load nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from rich.text import Text

from llmrecipes.reports.format import is_unsafe

PROMPT, ANSWER, REST = "prompt", "answer", "rest"
"""Before a supervised stretch; supervised; behind the last one."""

STYLES = {PROMPT: "", ANSWER: "green", REST: "dim"}
CONTROL_STYLE = "bold magenta"
LINT_STYLE = "yellow"

OPENED, CLOSED = "⟦", "⟧"
"""Around what is supervised, for terminals without colours."""

_DELETE = 0x7F

PAGE_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1b1b1b;
  background: #fff; }
h2 { font-size: 1.05rem; margin: 2rem 0 .3rem; }
.lint { color: #8a4b00; margin: .1rem 0; }
.flow { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #ddd; padding: .6rem; }
.t { border-radius: 3px; box-shadow: inset 0 0 0 1px #e4e4e4; }
.answer { background: #c9efcf; } .prompt { background: #f3f3f3; } .rest { background: #fbe9d0; }
.control { color: #8b008b; font-weight: 600; }
.border { border-left: 3px solid #36c; padding-left: 3px; }
table { border-collapse: collapse; font: 13px/1.4 ui-monospace, monospace; margin-top: .5rem; }
td, th { border: 1px solid #ddd; padding: 0 .5rem; text-align: right; } td:last-child { text-align: left; }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #161616; }
  .flow, td, th { border-color: #444; }
  .answer { background: #1d4d28; } .prompt { background: #2a2a2a; } .rest { background: #4d3a1d; }
  .control { color: #ee9bee; } .lint { color: #ffc36b; } .t { box-shadow: inset 0 0 0 1px #3a3a3a; } }
"""


@dataclass(frozen=True)
class Token:
    """One token as it is shown."""

    position: int
    """place in its document, from 0: what the model is told"""
    document: int
    """1, 2, ... within a packed row"""
    id: int
    text: str
    segment: str
    """prompt, answer or rest"""
    supervised: bool
    """whether it enters the loss"""
    control: bool
    """a control token, and not text"""


@dataclass(frozen=True)
class Shown:
    """One sample, or one packed row."""

    title: str
    tokens: tuple[Token, ...]
    lints: tuple[str, ...]

    @property
    def figures(self) -> str:
        """How many tokens there are of each kind."""
        documents = len({token.document for token in self.tokens})
        supervised = sum(token.supervised for token in self.tokens)
        control = sum(token.control for token in self.tokens)
        told = f"{len(self.tokens):,} tokens, {supervised:,} supervised, {control:,} control tokens"
        return f"{told}, {documents} documents" if documents > 1 else told


def samples_text(samples: Sequence[Shown], listed_tokens: int) -> Text:
    """Returns the samples as text with styles: what they read like, then their tokens one a line.

    Of a sample's tokens at most `listed_tokens` are listed, from both ends; 0 lists all.
    """
    text = Text()
    for shown in samples:
        text.append(f"{visible(shown.title)}: {shown.figures}\n", style="bold")
        for lint in shown.lints:
            text.append(f"  lint  {visible(lint)}\n", style=LINT_STYLE)
        text.append("\n")
        _append_flow(text, shown.tokens)
        text.append("\n\n")
        _append_table(text, shown.tokens, listed_tokens)
        text.append("\n")
    return text


def page(title: str, samples: Sequence[Shown]) -> str:
    """Returns the samples as one HTML page that needs and runs nothing else; pointing at a token tells all of it."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    sections = "\n".join(_section(shown) for shown in samples)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_html(title)}</title>\n<style>{PAGE_STYLE}</style>\n</head>\n<body>\n<h1>{_html(title)}</h1>\n"
        '<p><span class="t prompt">prompt</span> <span class="t answer">supervised</span> '
        '<span class="t rest">behind the last answer</span> <span class="t control">control token</span></p>\n'
        f"{sections}\n</body>\n</html>\n"
    )


def visible(text: str) -> str:
    """Returns text whose control characters are drawn (ESC as \u241b, a line feed as \u240a) and no longer act."""
    return "".join(_drawn(character) for character in text)


def spaced(text: str) -> str:
    """Returns visible text whose blanks can be counted: each is drawn as \u2423."""
    return visible(text).replace(" ", "\u2423")


def _drawn(character: str) -> str:
    code = ord(character)
    if code < ord(" "):
        return chr(0x2400 + code)
    if code == _DELETE:
        return "\u2421"
    return "\ufffd" if is_unsafe(character) or character in "\u2028\u2029" else character


def _style(token: Token) -> str:
    return CONTROL_STYLE if token.control else STYLES[token.segment]


def _append_flow(text: Text, tokens: Sequence[Token]) -> None:
    """Appends what the tokens read like; a drawn line feed breaks the line as well, and so does a new document."""
    for place, ((_, supervised), run) in enumerate(groupby(tokens, key=lambda item: (item.document, item.supervised))):
        first, *others = run
        text.append("\n" if place and first.position == 0 else "")
        text.append(OPENED if supervised else "", style=STYLES[ANSWER])
        for token in (first, *others):
            text.append(visible(token.text).replace("\u240a", "\u240a\n"), style=_style(token))
        text.append(CLOSED if supervised else "", style=STYLES[ANSWER])


def _append_table(text: Text, tokens: Sequence[Token], listed_tokens: int) -> None:
    text.append(f"{'document':>8} {'position':>8} {'id':>8}  {'segment':8} {'supervised':10}  text\n", style="bold")
    for token in _ends(tokens, listed_tokens):
        if token is None:
            text.append(f"     ... {len(tokens) - listed_tokens:,} tokens left out; --listed_tokens 0 lists all\n")
            continue
        learned = "yes" if token.supervised else "-"
        line = f"{token.document:>8} {token.position:>8} {token.id:>8}  {token.segment:8} {learned:10}  "
        text.append(f"{line}{spaced(token.text)}\n", style=_style(token))


def _ends(tokens: Sequence[Token], count: int) -> Iterator[Token | None]:
    """Yields the tokens, or `count` of them from both ends and None in between."""
    if not 0 < count < len(tokens):
        yield from tokens
        return
    tail = count // 2
    yield from tokens[: count - tail]
    yield None
    yield from tokens[len(tokens) - tail :]


def _section(shown: Shown) -> str:
    lints = "".join(f'<p class="lint">{_html(lint)}</p>' for lint in shown.lints)
    flow = "".join(_span(token, before) for token, before in zip(shown.tokens, (None, *shown.tokens), strict=False))
    rows = "".join(map(_table_row, shown.tokens))
    names = "".join(f"<th>{name}</th>" for name in ("document", "position", "id", "segment", "supervised", "text"))
    return (
        f"<section>\n<h2>{_html(shown.title)}</h2>\n<p>{_html(shown.figures)}</p>{lints}\n"
        f'<div class="flow">{flow}</div>\n<details><summary>tokens</summary><table><tr>{names}</tr>{rows}</table>'
        "</details>\n</section>"
    )


def _table_row(token: Token) -> str:
    learned = "yes" if token.supervised else "-"
    cells = "".join(f"<td>{cell}</td>" for cell in (token.document, token.position, token.id, token.segment, learned))
    return f'<tr>{cells}<td class="{_classes(token)}">{_html(spaced(token.text))}</td></tr>'


def _span(token: Token, before: Token | None) -> str:
    learned = "supervised" if token.supervised else "not supervised"
    told = f"id {token.id}, position {token.position}, document {token.document}, {token.segment}, {learned}"
    border = " border" if before is not None and before.document != token.document else ""
    text = _html(token.text).replace("\u240a", "\u240a\n")
    return f'<span class="{_classes(token)}{border}" title="{escape(told)}">{text}</span>'


def _classes(token: Token) -> str:
    return f"t {escape(token.segment)}{' control' if token.control else ''}"


def _html(text: str) -> str:
    return escape(visible(text))
