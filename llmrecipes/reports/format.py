"""Numbers and text as a reader sees them: the one place for units, rounding and unsafe characters."""

import unicodedata

_MIB, _GIB = 2**20, 2**30
_LARGE_COUNTS = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
_BIDIRECTIONAL_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They reorder what stands on the screen: Boucher and Anderson 2021, Trojan Source, section III."""


def gib(byte_count: float) -> str:
    """Returns bytes as `1.9 GiB`, or as `52 MiB` below one GiB."""
    return f"{byte_count / _GIB:.1f} GiB" if byte_count >= _GIB else f"{byte_count / _MIB:.0f} MiB"


def duration(seconds: float) -> str:
    """Returns a time as its two largest units: `3d04h`, `1h02m`, `4m10s`, `12s`; below ten seconds `3.4s`."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def count(number: float) -> str:
    """Returns a count in full below a million (`9,500`), else with one decimal (`1.2 M`, `7.0 B`, `1.4 T`)."""
    for size, letter in _LARGE_COUNTS:
        if round(number / size, 1) >= 1:
            return f"{number / size:.1f} {letter}"
    return f"{number:,.0f}"


def percent(fraction: float) -> str:
    """Returns a fraction of 1 as `12.3 %`."""
    return f"{100 * fraction:.1f} %"


def is_unsafe(character: str) -> bool:
    """Tells control characters other than tab and line feed, bidirectional overrides and lone surrogates."""
    if character in "\n\t":
        return False
    return unicodedata.category(character) in ("Cc", "Cs") or character in _BIDIRECTIONAL_OVERRIDES


def printable(text: str) -> str:
    """Returns text that is safe on a terminal: without the characters that move, colour or hide what stands there.

    Goes character by character, so the pieces of a stream may be cleaned one at a time: of an escape sequence its
    harmless letters stay.
    """
    return "".join(character for character in text if not is_unsafe(character))
