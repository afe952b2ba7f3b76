"""Text with obfuscated letters, as its reader reads it: "h0w", "s-t-e-a-l", "ｓｔｅａｌ", "st\\u200beal", base64.

Models read much of this, and a prober that was fitted on plain text does not know it. So the gate judges an obfuscated
turn a second time, in plain letters (judge.py). The steps, in order:

    NFC           accents join their letters
    base64        is decoded where it is text
    alphabets     full-width, mathematical, circled, small-capital ... letters become ASCII, odd blanks a blank
    escapes       such as "%20" become blanks, if there are four or more
    joined        five words or more with signs between them and no blank, or fourWordsLikeThese, are parted
    invisible     characters, and marks over and through a letter, go
    parted        one to three signs between two letters that no word has ("st%eal", "br||ew"), and what looks like a
                  special token ("br<|im_end|>ew"), go, if there are two or more
    look-alikes   Cyrillic, Greek and Armenian letters become ASCII, if a word mixes the two
    accents       and strokes go, if more than a fifth of the letters bear one
    spelled out   single letters between equal separators are joined, if four or more are in a row
    drawn out     three or more equal letters become one; but for "www" and "III"
    digits        all but 2, and @, $ and !, become letters, if one stands before a letter in a word

Plain text stays as it is, and costs nothing. What is taken for obfuscated by mistake ("log4j") is judged twice. The C++
side is src/obfuscation.hpp; tests/cpp/test_cpp_text.py compares the two on every character.
"""

from __future__ import annotations

import base64
import binascii
import re
import unicodedata

ALPHABETS = {  # the first of 26 letters, and what it stands for
    0x249C: "a",  # in parentheses
    0x24B6: "A",  # circled
    0x24D0: "a",
    0xFF21: "A",  # full-width
    0xFF41: "a",
    0x1F110: "A",  # in parentheses
    0x1F130: "A",  # squared
    0x1F150: "A",  # white on black
    0x1F170: "A",
    **{first: "Aa"[n % 2] for n, first in enumerate(range(0x1D400, 0x1D6A4, 26))},  # mathematical
}
SHAPES = (  # other shapes of letters, and the letters
    "ᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘꞯʀꜱᴛᴜᴠᴡʏᴢᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻᴬᴮᴰᴱᴳᴴᴵᴶᴷᴸᴹᴺᴼᴾᴿᵀᵁⱽᵂₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ"
    "ℂℊℋℌℍℎℐℑℒℓℕℙℚℛℜℝℤℨℬℭℯℰℱℳℴℹⅅⅆⅇⅈⅉⅠⅤⅩⅬⅭⅮⅯⅰⅴⅹⅼⅽⅾⅿ€¢"
    "\x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000",
    "abcdefghijklmnopqrstuvwyzabcdefghijklmnoprstuvwxyzABDEGHIJKLMNOPRTUVWaehijklmnoprstuvx"
    "CgHHHhIILlNPQRRRZZBCeEFMoiDdeijIVXLCDMivxlcdmec" + " " * 19,
)
STROKES = str.maketrans({a: f"{b}\u0335" for a, b in zip("øØłŁđĐħĦŧŦ", "oOlLdDhHtT", strict=True)})  # as marks
TAGS = range(0xE0020, 0xE007F)  # invisible copies of ASCII
IN_ASCII = (
    str.maketrans(*SHAPES)
    | {first + n: chr(ord(letter) + n) for first, letter in ALPHABETS.items() for n in range(26)}
    | {tag: chr(tag - 0xE0000) for tag in TAGS}
)
# In character classes: of letters, of characters that nobody sees, and of marks that stand on the letter before.
LETTERS = "A-Za-z\u00c0-\u024f\u1e00-\u1eff"
INVISIBLE = (
    "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u08e2\u115f\u1160"
    "\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff9-\ufffc\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
MARKS = "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"
NOT_IN_WORDS = (  # signs; not those that stand between words, as dashes and slashes do
    r"%\\^+|=#~*<>&\xa1-\xac\xae-\xbf\u2010-\u2012\u2020-\u2027\u2030-\u205e\u2190-\u2bff\U0001f000-\U0001faff"
)
LOOK_ALIKES = (
    "АВЕКМНОРСТУХЅІЈаеорсухѕіјһкмтԁԛԝѵӏΑΒΕΖΗΙΚΜΝΟΡΤΥΧαεικνορτυχօսհոɑɡ",
    "ABEKMHOPCTYXSIJaeopcyxsijhkmtdqwvlABEZHIKMNOPTYXaeikvoptuxouhnag",
)
USUAL_ACCENTS = 5  # plain text has them on one letter in five at most
DIGITS = {"11": "ll"} | dict(zip("013456789@$!", "oieasgtbgasi", strict=True))
UNITS = {
    *("am", "cm", "db", "fps", "ft", "gb", "hz", "kb", "kbps", "kcal", "kg", "khz", "km", "mb", "mbps", "mg", "mhz"),
    *("min", "ml", "mm", "mpg", "mph", "nd", "nm", "pm", "px", "rd", "sec", "st", "tb", "th"),
}

_BASE64 = re.compile("([A-Za-z0-9+/_-]{16,})={0,2}")
_HIDDEN = re.compile(f"(?<=[{LETTERS} \\t\\n])[{INVISIBLE}{MARKS}]+|(?<![{INVISIBLE}])[{INVISIBLE}]+(?=[{LETTERS}])")
_MIXED = re.compile(f"[A-Za-z][{LOOK_ALIKES[0]}]|[{LOOK_ALIKES[0]}][A-Za-z]")
_PARTED = re.compile(f"(?<=[A-Za-z])(?:<\\|[a-z_]{{1,20}}\\|>|[{NOT_IN_WORDS}]{{1,3}})(?=[A-Za-z])")
_ONE_WORD = "(?:[A-Za-z]{2,}|[aAiI])"
_JOINED = re.compile(f"(?<![A-Za-z0-9_-]){_ONE_WORD}(?:[^A-Za-z0-9 \\t-\\r]+{_ONE_WORD}){{4,}}(?![A-Za-z0-9])")
_CAPITALS = re.compile("(?<![A-Za-z0-9])[A-Za-z]?[a-z]+(?:[A-Z][a-z]+|[AI]){3,}(?![A-Za-z0-9])")
_CAPITAL = re.compile("(?<=[A-Za-z])[A-Z]")
_NO_WORDS = re.compile("[^A-Za-z]+")
_ESCAPES = re.compile("(?:%[0-9A-Fa-f]{2})+")
_ACCENTED = re.compile("([A-Za-z])[\u0300-\u036f]+")
_SPELLED = re.compile(
    "(?<![A-Za-z0-9])[A-Za-z]([ \\n\\t._*/|+~,-])[A-Za-z013456789]\\1[A-Za-z013456789]\\1[A-Za-z](?![A-Za-z0-9])"
)
_SINGLE_LETTERS = [  # first those between hyphens and the like, then those between blanks
    re.compile(f"(?<![A-Za-z0-9])[A-Za-z0-9]([{between}])[A-Za-z0-9](?:\\1[A-Za-z0-9])*(?:\\1[?!])?(?![A-Za-z0-9])")
    for between in ("._*/|+~,-", " \\n\\t")
]
_DRAWN_OUT = re.compile("([A-HJ-VX-Za-vx-z])\\1\\1+")
_WORD = re.compile("[A-Za-z0-9@$]+(?:!+[A-Za-z0-9@$]+)*")
_WITHIN = re.compile("[A-Za-z][013456789@$!]+[A-Za-z]")
_IN_FRONT = re.compile("[013456789]+([A-Za-z]{2,})")
_DIGITS = re.compile("11|[013456789@$!]")


def deobfuscated(text: str) -> str:
    """`text` in plain letters; `text` itself if nothing in it is obfuscated."""
    composed = unicodedata.normalize("NFC", text)
    plain = _decoded(composed).translate(IN_ASCII)
    plain = _ESCAPES.sub(" ", plain) if len(_ESCAPES.findall(plain)) > 3 else plain
    plain = _JOINED.sub(lambda run: _NO_WORDS.sub(" ", run[0]), plain)
    plain = _CAPITALS.sub(lambda run: _CAPITAL.sub(r" \g<0>", run[0]), plain)
    plain = _HIDDEN.sub("", plain)
    plain = _PARTED.sub("", plain) if len(_PARTED.findall(plain)) > 1 else plain
    if _MIXED.search(plain):
        plain = plain.translate(str.maketrans(*LOOK_ALIKES))
    plain = _DRAWN_OUT.sub(r"\1", _not_spelled_out(_without_accents(plain)))
    plain = _without_digits(plain)
    return text if plain == composed else plain


def _decoded(text: str) -> str:
    """Runs of base64, of either alphabet, decoded where they are text in UTF-8."""

    def decode(run: re.Match[str]) -> str:
        digits = run[1].replace("-", "+").replace("_", "/")
        try:
            said = base64.b64decode(digits + "=" * (-len(digits) % 4)).decode()
        except (binascii.Error, UnicodeDecodeError):
            return run[0]
        return run[0] if any(c < " " and c not in "\t\n\r" for c in said) else said

    return _BASE64.sub(decode, text)


def _without_accents(text: str) -> str:
    if text.isascii():
        return text
    apart = unicodedata.normalize("NFD", text).translate(STROKES)
    letters = sum(c.isascii() and c.isalpha() for c in apart)
    if len(_ACCENTED.findall(apart)) * USUAL_ACCENTS <= letters:
        return text
    return unicodedata.normalize("NFC", _ACCENTED.sub(r"\1", apart))


def _not_spelled_out(text: str) -> str:
    """Words that are spelled out, in one, if one of them has four letters or more."""
    if _SPELLED.search(text):
        for single_letters in _SINGLE_LETTERS:
            text = single_letters.sub(lambda run: run[0][::2], text)
    return text


def _without_digits(text: str) -> str:
    """Words of digits and letters, and single digits, in letters, if one of the words is certainly so."""

    def in_letters(word: re.Match[str]) -> str:
        number = word[0].isdigit() and len(word[0]) > 1
        return word[0] if number else _DIGITS.sub(lambda digit: DIGITS[digit[0]], word[0])

    return _WORD.sub(in_letters, text) if any(map(_has_digit_for_letter, _WORD.findall(text))) else text


def _has_digit_for_letter(word: str) -> bool:
    front = _IN_FRONT.fullmatch(word)
    return bool(_WITHIN.search(word)) or (front is not None and front[1].lower() not in UNITS)
