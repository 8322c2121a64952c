"""What a caption is: text, of one line; and what CLIP's original tokenizer would have replaced in it."""

from __future__ import annotations

import codecs
import html
import re
import unicodedata
from collections.abc import Iterable

from sushi_research.errors import some

# Longest first: the mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NONCHARACTERS = "".join(chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF))
# Control characters but tab, line feed and carriage return; halves of surrogate pairs; the replacement character.
_NOT_TEXT = re.compile(f"[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffd{_NONCHARACTERS}]")
_LINE_END = re.compile("\r\n|\r|\n")
# What `ftfy.fix_text` replaces by default, of what the tokenizer of transformers does not (both normalize to NFC): curled quotes,
# Latin ligatures, half-width and full-width forms, and some invisible characters. It also repairs text that was decoded
# wrongly, which needs its statistics. Wide spaces and Unicode's line separators become one space in both.
_QUOTES = "\u02bc\u2018-\u201b\u201c-\u201f"
_LIGATURES = "\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06"
_WIDTHS = "".join(chr(code) for code in range(0xFF01, 0xFFF0) if unicodedata.normalize("NFKC", chr(code)) != chr(code))
_INVISIBLE = "\u206a-\u206f\ufeff\ufff9-\ufffb"
_REPLACED = re.compile(f"[{_QUOTES}{_LIGATURES}{_WIDTHS}{_INVISIBLE}]")
# CLIP reads 77 tokens, about 400 letters. The longest captions of the models that write them have some thousand letters, and a file
# can hold several. Tokenizing 10 million letters takes minutes and gigabytes.
MOST_LETTERS = 65_536
# Such a text in UTF-32, with its byte order mark.
MOST_BYTES = 4 * MOST_LETTERS + 4
UNDECODABLE = "cannot be read as UTF-8 text"
# How many different characters a note lists.
_SHOWN = 5


class NotText(ValueError):
    """A caption that is not text; `reason` completes the sentence "its caption ..."."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Raises NotText for any other bytes."""
    try:
        return data.decode(encoding_of(data))
    except UnicodeDecodeError:
        raise NotText(UNDECODABLE) from None


def encoding_of(start: bytes) -> str:
    """The encoding of a file that begins with these bytes, by its byte order mark; UTF-8 without one."""
    return next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), "utf-8")


def problem(text: str) -> str | None:
    """Why `text` is not the text of a caption, naming its first wrong character; None if it is. Line breaks and tabs are text."""
    if len(text) > MOST_LETTERS:
        return f"has {len(text):,} letters, and at most {MOST_LETTERS:,} are read"
    found = _NOT_TEXT.search(text)
    if found is None:
        return None
    code = ord(found[0])
    if unicodedata.category(found[0]) == "Cc":
        kind = "the control character"
    elif 0xD800 <= code <= 0xDFFF:
        kind = "half of a surrogate pair:"
    elif code == 0xFFFD:
        kind = "the mark of a lost character:"
    else:
        kind = "the noncharacter"
    return f"is not text ({kind} U+{code:04X})"


def lines(text: str) -> tuple[str, ...]:
    """The lines of a text that are not blank, without spaces around them.

    A line of nothing but spaces and invisible characters, such as a second byte order mark, is blank. Raises NotText if `text` is
    not text.
    """
    reason = problem(text)
    if reason is not None:
        raise NotText(reason)
    return tuple(line.strip() for line in _LINE_END.split(text) if any(map(_is_visible, line)))


def _is_visible(char: str) -> bool:
    return not char.isspace() and unicodedata.category(char) != "Cf"


def note_replaced(captions: Iterable[tuple[str, str]]) -> list[str]:
    """A note with the number of captions in which CLIP's original tokenizer would have replaced characters; [] if none.

    `captions` are (name, caption). OpenAI's `simple_tokenizer.py` calls `ftfy.fix_text` and then `html.unescape`, so CLIP was
    trained without these characters. The tokenizers of transformers 5, which this suite uses, encode them as they are.
    """
    names, found = [], {}
    for name, caption in captions:
        replaced = _replaced(caption)
        if replaced:
            names.append(name)
            found |= dict.fromkeys(replaced)
    if not names:
        return []
    count = "1 caption has" if len(names) == 1 else f"{len(names)} captions have"
    shown = some(list(found), _SHOWN)
    return [
        f"{count} characters that CLIP's original tokenizer replaced ({shown}; first in {names[0]}): they are encoded as they "
        "are unless captions.fix_text is true, which replaces them in the same way"
    ]


def _replaced(caption: str) -> list[str]:
    """Descriptions, in ASCII, of the characters and HTML entities that would have been replaced."""
    found = [f"U+{ord(char):04X} {unicodedata.name(char, '').lower()}".strip() for char in _REPLACED.findall(caption)]
    entities = re.findall(r"&#?[0-9A-Za-z]{1,32};?", caption)
    return found + [entity for entity in entities if html.unescape(entity) != entity]
