"""The encoding of a table that somebody saved: UTF-8, UTF-16, or a code page, which nothing in the file names.

A code page is guessed, and a wrong guess would be other letters in every word. So a page has to make words of all of
the file: letters that stand in one language's alphabet together, no sign and no capital in the middle of a word. Where
two pages do, and their texts differ, the language that is written decides; where that cannot be told, nothing is
guessed.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from lora_dpo.data.language import LANGUAGES, language_of
from lora_dpo.errors import DataError
from lora_dpo.text import shown

SAMPLE = 256 << 10
"""Bytes of the lines with letters beyond ASCII from which a code page is guessed."""
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Byte order marks; the two of UTF-32 are looked for first, since one begins with a mark of UTF-16."""

_WESTERN = (
    "éèêëïîçñöüàâôûæœå",  # English has the words of others
    "äöüßé",
    "àâæçèéêëîïôœùûüÿ",  # French
    "áéíñóúüª",
    "ãáâàçéêíóôõúüª",  # Portuguese
    "àèéìíîòóù",
    "áèéëïíóöüçê",  # Dutch
    "åäöéàü",  # Swedish, Finnish
    "æøåéèêòóôäöü",  # Danish, Norwegian
    "áðéíóúýþæö",  # Icelandic
    "àçèéíïòóúü",  # Catalan
)
_CENTRAL = (
    "ąćęłńóśźż",
    "áčďéěíňóřšťúůýž",
    "áäčďéíĺľňóôŕšťúýž",  # Slovak
    "áéíóöőúüű",
    "ăâîşţșț",  # Romanian
    "čćđšž",
    "äöüßé",
)
_PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cp1252": ("Windows-1252 (Western European)", _WESTERN),
    "cp1250": ("Windows-1250 (Central European)", _CENTRAL),
    "cp1251": (
        "Windows-1251 (Cyrillic)",
        (
            "абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
            "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя",
            "абвгдђежзијклљмнњопрстћуфхцчџш",
            "абвгдѓежзѕијклљмнњопрстќуфхцчџш",
            "абвгдеёжзійклмнопрстуўфхцчшыьэюя",
        ),
    ),
    "cp1253": ("Windows-1253 (Greek)", ("αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ",)),
    "cp1254": ("Windows-1254 (Turkish)", ("çğıöşüâîûİ",)),
    "cp1255": ("Windows-1255 (Hebrew)", ("אבגדהוזחטיךכלםמןנסעףפץצקרשת",)),
    "cp1256": ("Windows-1256 (Arabic)", ("ءآأؤإئابةتثجحخدذرزسشصضطظعغفقكلمنهوىيپچژگکھہےںڈڑٹ",)),
    "cp1257": ("Windows-1257 (Baltic)", ("ąčęėįšųūž", "āčēģīķļņšūž", "äõöüšž")),
    "mac_roman": ("Mac Roman", _WESTERN),
    "cp850": ("DOS-850", _WESTERN),
    "cp932": ("Windows-932 (Japanese)", ()),
    "gb18030": ("GB18030 (Chinese)", ()),
    "big5": ("Big5 (Chinese)", ()),
    "cp949": ("Windows-949 (Korean)", ()),
}
"""Code pages by the name of their codec: what a person calls it, and the alphabets that are written in it."""
_NOT_LATIN = ("cp1251", "cp1253", "cp1255", "cp1256")
_IN_SCRIPT = 0.3
"""Share of the letters that are in the script of a page of another script than Latin."""
_RARE, _RARE_WORDS = ("mac_roman", "cp850"), 3
"""Pages that few programs write still: it takes so many words to be sure of them, and one to doubt another page."""
_COMMON = {
    "cp932": (re.compile("[ぁ-んァ-ヶ]"), 0.15),
    "gb18030": (re.compile("[的一是不了在有我他这为之大来以个中上们你什么吗]"), 0.08),
    "big5": (re.compile("[的一是不了在有我他這為之大來以個中上們你什麼嗎]"), 0.08),
    "cp949": (re.compile("[가-힣]"), 0.7),
}
"""What every text in an East Asian page is full of, and which share of its letters beyond ASCII that is at least."""
_LEGIBLE = 0.95
"""Share of words whose letters one alphabet of the page must have together; a foreign name has others."""
_AS_GOOD = 0.005
"""By how much the share of such cells may be less than that of the best page."""
_PART = 400
"""Characters of a part of a text whose language is told."""
_ODD = 0.02
"""Share of characters beyond ASCII that may stand where they do in no word."""
_CELL = re.compile(r"[\r\n\t;,|\"]+")
_WORD = re.compile(r"[^\W\d_]+")
_BEYOND = re.compile(r"[^\x00-\x7f]")
_NO_LETTERS = "ªºµƒ"
"""Letters to Unicode, signs to a reader."""
_SIGNS = frozenset((0x85, *range(0x91, 0x98), 0xA0))
"""What all of Windows' pages have for an ellipsis, curly quotes, a bullet, dashes and a fixed space."""
_WITHIN = "’‘´·…–—\u00ad\u00a0"
_BEHIND = _WITHIN + "“”„»«›‹•™®©°€¹ªº؟،؛"
_BEFORE = _WITHIN + "“”„‚»«›‹•¡¿©°€£¥§"
"""Signs that may stand between two letters, after a letter, and before one."""


def encoding_of(file: IO[bytes], path: Path) -> tuple[str, str | None]:
    """The codec of a file's text, and what to say if it is not plain UTF-8.

    Raises:
        DataError: it is in a code page, and which one cannot be told.
        UnicodeDecodeError: it is UTF-8 that is damaged.
    """
    head = file.read(4096)
    for mark, codec in _MARKS:
        if head.startswith(mark):
            return codec, None if codec == "utf-8-sig" else f"its text is {codec.upper()}"
    wide = _without_mark(head)
    if wide:
        return wide, f"its text is {wide.upper()}, by its zero bytes: it has no byte order mark"
    if _is_utf8(file):
        return "utf-8", None
    sample, plain = _sample(file)
    read = sample.decode("utf-8", "surrogateescape")
    stray = len(re.findall("[\udc80-\udcff]", read))
    if len(re.findall("[^\x00-\x7f]", read)) - stray > stray:  # most of it is UTF-8: another encoding would spoil that
        file.seek(0)
        file.read().decode("utf-8")
    codec = guess(sample, path, plain)
    words = dict.fromkeys(_beyond_ascii(sample.decode(codec, "replace")))
    such = ", ".join(list(words)[:3])
    seen = f": its letters make words such as {such}" if such else ""
    return codec, f"its text is not UTF-8 but, by a guess, {_PAGES[codec][0]}{seen}"


def name_of(codec: str) -> str:
    """What a person calls an encoding."""
    return _PAGES[codec][0] if codec in _PAGES else codec.upper().removesuffix("-SIG")


def _without_mark(head: bytes) -> str | None:
    """UTF-16 without a byte order mark, known by every second byte being zero, as in Latin text and at line ends."""
    pairs = len(head) // 2
    first, second = head[0 : 2 * pairs : 2].count(0), head[1 : 2 * pairs : 2].count(0)
    if pairs and max(first, second) > 0.3 * pairs and min(first, second) < 0.02 * pairs:
        return "utf-16-le" if second > first else "utf-16-be"
    return None


def _is_utf8(file: IO[bytes]) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    file.seek(0)
    try:
        while block := file.read(1 << 20):
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _sample(file: IO[bytes]) -> tuple[bytes, str]:
    """Lines with a byte beyond ASCII and lines without, as far as a guess needs them."""
    file.seek(0)
    beyond, plain = bytearray(), bytearray()
    while len(beyond) < SAMPLE and (line := file.readline(SAMPLE)):
        if not line.isascii():
            beyond += line
        elif len(plain) < SAMPLE:
            plain += line
    return bytes(beyond), plain.decode("ascii")


def guess(sample: bytes, path: Path, plain: str = "") -> str:
    """The code page of some lines.

    Args:
        plain: other lines of the text, all ASCII, which tell its language, too.

    Raises:
        DataError: no page makes words of the lines, or two that differ do.
    """
    read = {page: text for page in _PAGES if (text := _decoded(sample, page)) is not None}
    legible = {page: _legible(text, page) for page, text in read.items()}
    least = max(legible.values(), default=0.0) - _AS_GOOD
    texts = {page: text for page, text in read.items() if legible[page] and legible[page] >= least}
    if "cp1252" in texts and _SIGNS.issuperset(byte for byte in sample if byte > 0x7F):
        return "cp1252"
    if any(page.startswith("cp12") for page in texts):  # whatever DOS wrote is legible in none of Windows' pages
        texts.pop("cp850", None)
    if "cp1255" in texts:  # capitals and vowels of Russian and Greek are none of Hebrew's letters, Hebrew's are theirs
        texts = {page: text for page, text in texts.items() if page not in ("cp1251", "cp1253")}
    pages = _apart(texts)
    if len(pages) > 1:
        pages = _by_language(texts, plain) or pages
    if len(pages) == 1 and (pages[0] not in _RARE or len(_beyond_ascii(texts[pages[0]])) >= _RARE_WORDS):
        return pages[0]
    which = " or ".join(f"{_PAGES[page][0]} ({shown(_first_word(texts, page))})" for page in pages[:2])
    told = f"it could be {which}" if pages else "no code page that is known here makes words of it"
    raise DataError(f"{path} is not UTF-8, and {told}. Save it as UTF-8 (in Excel: 'CSV UTF-8').")


def _decoded(sample: bytes, page: str) -> str | None:
    try:
        return sample.decode(page)
    except UnicodeDecodeError:
        return None


def _legible(text: str, page: str) -> float:
    """The share of a text's cells that could be words in the letters of a page; 0 if there is too much that cannot."""
    beyond, words = _BEYOND.findall(text), _WORD.findall(text)
    letters = sum(map(_is_letter, beyond))
    if page in _NOT_LATIN or page in _COMMON:
        if not letters or letters < _IN_SCRIPT * sum(map(str.isalpha, text)):
            return 0.0
    elif page in _RARE and not letters:
        return 0.0
    if page in _COMMON:
        pattern, share = _COMMON[page]
        return float(not _oddities(text) and len(pattern.findall(text)) >= max(1, share * letters))
    mixed = sum(not word.isascii() and bool(re.search("[A-Za-z]", word)) for word in words)
    if _oddities(text) + (mixed if page in _NOT_LATIN else 0) > _ODD * len(beyond):
        return 0.0
    alphabets = [{*letters, *letters.upper()} for letters in _PAGES[page][1]]
    if _spelt(words, alphabets) < _LEGIBLE:
        return 0.0
    return _spelt(_CELL.split(text), alphabets)


def _spelt(parts: Sequence[str], alphabets: Sequence[set[str]]) -> float:
    """The share of words or cells with letters beyond ASCII whose such letters all stand in one alphabet."""
    seen = [letters for part in parts if (letters := set(filter(_is_letter, _BEYOND.findall(part))))]
    return sum(any(letters <= alphabet for alphabet in alphabets) for letters in seen) / len(seen) if seen else 1.0


def _beyond_ascii(text: str) -> list[str]:
    """Its words with letters beyond ASCII, in order."""
    return [word for word in _WORD.findall(text) if not word.isascii()]


def _is_letter(character: str) -> bool:
    return character.isalpha() and character not in _NO_LETTERS


def _oddities(text: str) -> int:
    """Characters that stand where they do in no word: a capital after a small letter, a sign between letters."""
    odd = 0
    for found in _BEYOND.finditer(text):
        sign, before, after = found[0], text[found.start() - 1 : found.start()], text[found.end() : found.end() + 1]
        if _is_letter(sign):
            odd += sign.isupper() and before.islower()
            odd += sign == "ς" and after.isalpha()  # a sigma that ends a word
            odd += sign > "\u2e7f" and _is_small(before) and _is_small(after)
        elif unicodedata.category(sign) in ("Cc", "Cn", "Co") or sign in "¤\ufffd":
            odd += 1
        elif sign < "\u2e80":  # East Asian signs may stand anywhere
            within = before.isalpha() and after.isalpha()
            fit = _WITHIN if within else _BEHIND if before.isalpha() else _BEFORE if after.isalpha() else sign
            odd += sign not in fit and not (sign in "²³" and before == "m")
    return odd


def _is_small(letter: str) -> bool:
    return letter.isascii() and letter.islower()


def _apart(texts: Mapping[str, str]) -> list[str]:
    """The first page of each text that differs from the others."""
    first: dict[str, str] = {}
    for page, text in texts.items():
        first.setdefault(text, page)
    return list(first.values())


def _by_language(texts: Mapping[str, str], plain: str) -> list[str]:
    """The Western page, if parts of the text tell their language and all of them a Western one."""
    parts = {text[start : start + _PART] for text in (*texts.values(), plain) for start in range(0, len(text), _PART)}
    told = {language for part in parts if (language := language_of(part)) in LANGUAGES}
    return ["cp1252"] if "cp1252" in texts and told and "Polish" not in told else []


def _first_word(texts: Mapping[str, str], page: str) -> str:
    """A word that this page spells in another way than the others."""
    others = {word for other, text in texts.items() if text != texts[page] for word in _WORD.findall(text)}
    words = _beyond_ascii(texts[page])
    return next((word for word in words if word not in others), words[0] if words else "")
