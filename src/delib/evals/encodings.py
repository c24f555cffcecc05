"""Ways to hide a request in plain sight: text in, the same text in another writing out, and back where there is a way.

Nothing here asks a model anything (attacks.py does) and nothing draws at random without a seed, so that a prompt is
encoded alike in every run. What a writing has no sign for stays as it is: ROT13, Caesar, leetspeak, look-alikes and
pig Latin change the letters a to z alone, and Morse has its letters, digits and punctuation. Base64, hex, URL and
decimal write the bytes of UTF-8 and so hold any text.
"""

import hashlib
import random
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from string import ascii_lowercase, ascii_uppercase
from urllib.parse import unquote_to_bytes

Recode = Callable[[str], str]

CAESAR_SHIFT = 3
"""Caesar's own, and so the one that models know best."""


def caesar(text: str, shift: int) -> str:
    """Each letter of a to z moved `shift` places on, wrapping round; undone by -shift."""
    turn = shift % 26
    moved = "".join(letters[turn:] + letters[:turn] for letters in (ascii_lowercase, ascii_uppercase))
    return text.translate(str.maketrans(ascii_lowercase + ascii_uppercase, moved))


def rot13(text: str) -> str:
    """Caesar's cipher by half the alphabet, its own inverse."""
    return caesar(text, 13)


def base64(text: str) -> str:
    return b64encode(text.encode()).decode()


def from_base64(text: str) -> str:
    return b64decode(text, validate=True).decode()


def hexadecimal(text: str) -> str:
    return text.encode().hex()


def from_hexadecimal(text: str) -> str:
    return bytes.fromhex(text).decode()


_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_UNLEET = str.maketrans("431057", "aeiost")


def leetspeak(text: str) -> str:
    """Digits for six letters, as the shipped shifted prompts have it."""
    return text.translate(_LEET)


def from_leetspeak(text: str) -> str:
    """Exact for a text without the digits 0, 1, 3, 4, 5 and 7, whose a, e, i, o, s and t are lower case."""
    return text.translate(_UNLEET)


def reverse(text: str) -> str:
    """By code point, so that it is its own inverse; a combining accent ends up on the letter before."""
    return text[::-1]


_SIGNS = {
    **{"a": ".-", "b": "-...", "c": "-.-.", "d": "-..", "e": ".", "f": "..-.", "g": "--.", "h": "....", "i": ".."},
    **{"j": ".---", "k": "-.-", "l": ".-..", "m": "--", "n": "-.", "o": "---", "p": ".--.", "q": "--.-", "r": ".-."},
    **{"s": "...", "t": "-", "u": "..-", "v": "...-", "w": ".--", "x": "-..-", "y": "-.--", "z": "--.."},
    **{"0": "-----", "1": ".----", "2": "..---", "3": "...--", "4": "....-"},
    **{"5": ".....", "6": "-....", "7": "--...", "8": "---..", "9": "----."},
    **{".": ".-.-.-", ",": "--..--", "?": "..--..", "'": ".----.", "!": "-.-.--", "/": "-..-.", "(": "-.--."},
    **{")": "-.--.-", "&": ".-...", ":": "---...", ";": "-.-.-.", "=": "-...-", "+": ".-.-.", "-": "-....-"},
    **{"_": "..--.-", '"': ".-..-.", "$": "...-..-", "@": ".--.-."},
}
_MORSE = _SIGNS | {letter.upper(): _SIGNS[letter] for letter in ascii_lowercase} | {" ": "/"}
_UNMORSE = {sign: character for character, sign in _SIGNS.items()} | {"/": " "}


def morse(text: str) -> str:
    """International Morse code: signs parted by a space, a space written as /, lines kept; other characters as they
    are."""
    return "\n".join(" ".join(_MORSE.get(character, character) for character in line) for line in text.split("\n"))


def from_morse(text: str) -> str:
    """Exact for a text whose a to z are lower case: Morse has one case."""
    lines = (line.split(" ") if line else [] for line in text.split("\n"))
    return "\n".join("".join(_UNMORSE.get(sign, sign) for sign in line) for line in lines)


def url(text: str) -> str:
    """Every byte percent-encoded, those that need none too."""
    return "".join(f"%{byte:02X}" for byte in text.encode())


def from_url(text: str) -> str:
    return unquote_to_bytes(text).decode()


_LATIN = "acdeghijlopqsvwxy" + "ABCEHIJKMNOPSTXYZ"
_TWINS = "асԁеɡһіјӏорԛѕѵԝху" + "АВСЕНІЈКМΝОРЅТХҮΖ"
"""Cyrillic, Greek and phonetic letters that common fonts draw like the Latin ones above them."""


def lookalikes(text: str) -> str:
    """Every letter that has a twin in another script written with it."""
    return text.translate(str.maketrans(_LATIN, _TWINS))


def from_lookalikes(text: str) -> str:
    """Exact for a text that held none of the twins."""
    return text.translate(str.maketrans(_TWINS, _LATIN))


def decimal(text: str) -> str:
    """The numbers of the bytes, parted by spaces: ASCII codes where the text is ASCII."""
    return " ".join(str(byte) for byte in text.encode())


def from_decimal(text: str) -> str:
    return bytes(int(number) for number in text.split()).decode()


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_OPENING = re.compile(r"[^aeiouy]*qu|y?[^aeiouy]+|y(?=[aeiou])|", re.IGNORECASE)


def pig_latin(text: str) -> str:
    """The consonants that open a word (qu among them) go to its end, with "ay"; a word that opens with a vowel takes
    "way". A capital stays in front. A word with a letter outside a to z stays. There is no way back: "ashway" may have
    been "wash" or "ash"."""
    return _WORD.sub(lambda found: _pig(found.group()), text)


def _pig(word: str) -> str:
    if not word.replace("’", "'").isascii():
        return word
    moved = _OPENING.match(word).group()  # type: ignore[union-attr]  # it matches the empty text too
    made = word[len(moved) :] + moved + ("ay" if moved else "way")
    if len(word) > 1 and word.isupper():
        return made.upper()
    return made[0].upper() + made[1:].lower() if word[0].isupper() else made


def mixed(text: str, seed: int = 0) -> str:
    """Every word, or every sentence, in a writing of its own; the white space between stays.

    The text itself and the seed decide which: two prompts are mixed differently, one prompt always alike. A prompt of
    one sentence is mixed by word. The writings are dealt like cards, so that two neighbours never share one.
    """
    drawn = random.Random(hashlib.sha256(f"{seed}\n{text}".encode()).digest())
    sentences = re.split(r"(?<=[.!?])(\s+)(?=\S)", text)
    by_sentence = len(sentences) > 1 and drawn.random() < 0.5
    parts = sentences if by_sentence else re.split(r"(\s+)", text)
    deck = list(_SENTENCE_WRITINGS if by_sentence else _WORD_WRITINGS)
    drawn.shuffle(deck)
    for place in range(0, len(parts), 2):
        parts[place] = ENCODINGS[deck[place // 2 % len(deck)]](parts[place])
    return "".join(parts)


ENCODINGS: dict[str, Recode] = {
    "rot13": rot13,
    "base64": base64,
    "hex": hexadecimal,
    "leetspeak": leetspeak,
    "reversed": reverse,
    "caesar": lambda text: caesar(text, CAESAR_SHIFT),
    "morse": morse,
    "url": url,
    "lookalikes": lookalikes,
    "decimal": decimal,
    "pig_latin": pig_latin,
    "mixed": mixed,
}
"""All of them, in the order in which figures list them."""

DECODINGS: dict[str, Recode] = {
    "rot13": rot13,
    "base64": from_base64,
    "hex": from_hexadecimal,
    "leetspeak": from_leetspeak,
    "reversed": reverse,
    "caesar": lambda text: caesar(text, -CAESAR_SHIFT),
    "morse": from_morse,
    "url": from_url,
    "lookalikes": from_lookalikes,
    "decimal": from_decimal,
}
"""The way back, for those that have one; each says of which texts it is exact, and says nothing where of all."""

_SENTENCE_WRITINGS = tuple(name for name in ENCODINGS if name != "mixed")
_WORD_WRITINGS = tuple(name for name in _SENTENCE_WRITINGS if name not in ("morse", "decimal"))
"""Those that put no white space into a word, which would blur where it ends."""
