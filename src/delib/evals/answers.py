"""What can be read off an answer by rule: a number, the chosen option, a short fact, a refusal's words.

In: an answer's text. Out: what it says, or None where it says nothing that can be read.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Literal

Fact = Literal["correct", "incorrect", "not_attempted"]

OPENING = 160
"""Characters in which a refusal shows itself, if it does."""
REFUSALS = (
    r"i(?:'m| am) (?:so |very |really |truly )?sorry",
    r"(?:^|[.!?\n]\s*)sorry[,.]",
    r"my apologies|apologies[,.]|i apologi[sz]e",
    r"i (?:can(?:'t|not| not)|won't|will not|am unable to|am not able to)\b",
    r"i'm (?:unable|not able|not willing|not going) to\b",
    r"i (?:must|have to|need to) (?:decline|refuse)",
    r"i(?:'d| would) rather not",
    r"i (?:do not|don't) feel comfortable",
    r"as an ai\b|as a language model",
    r"(?:it is|it's|that is|that's) (?:not (?:appropriate|ethical|legal)|unethical|illegal|against)",
)
"""How refusals open; the way of published string matches, in our own words."""
UNKNOWN = (
    r"(?:do not|don't|didn't|can't|cannot) (?:know|recall|remember|find|determine|verify|confirm|say)",
    r"(?:not|un)(?: entirely| quite)? ?(?:sure|certain)\b",
    r"no (?:idea|information|reliable)",
    r"(?:do not|don't) have (?:any |enough |the |that )?(?:information|data|access)",
)
_REFUSAL = re.compile("|".join(REFUSALS), re.I)
_UNKNOWN = re.compile("|".join(UNKNOWN), re.I)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def plain(text: str) -> str:
    """Typographic apostrophes as plain ones."""
    return text.replace("’", "'").replace("‘", "'")


def refuses(answer: str) -> bool:
    """Whether an answer opens with the words of a refusal."""
    return _REFUSAL.search(plain(answer).strip()[:OPENING]) is not None


def number(text: str) -> Decimal | None:
    """The number that an answer ends on: the one after the last "ANSWER:" or "####", else the last of all."""
    marked = re.split(r"answer\s*:|####", text, flags=re.I)
    found = _NUMBER.findall(marked[-1])
    if len(marked) > 1 and found:
        return _decimal(found[0])
    found = _NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", ""))


def chosen(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer chooses.

    A letter that is said to be the answer counts first, then one that the answer opens with or is put in brackets, then
    the text of exactly one option. Two that contradict each other are no choice. In lower case a letter must be said to
    be the answer or stand in brackets, and an "a" with a word after it is the article.
    """
    letters = "".join(options)
    text = plain(answer).strip()
    marked, lower = r"(?i:answer|option|choice)(?i: is)?\s*:?\s*[*(]*", letters.lower()
    for pattern in (
        rf"{marked}([{letters}])\b(?!')",
        rf"{marked}([{lower}])(?![\w'/-]|\.\w)(?!(?<=a)[ \t]+\S)",
        rf"^\W*([{letters}])(?:[).:*]|\s*$)",
        rf"\(([{letters}{letters.lower()}])\)",
    ):
        if found := {letter.upper() for letter in re.findall(pattern, text)}:
            return found.pop() if len(found) == 1 and not _listed(text, letters) else None
    flat = normal(text)
    said = [letter for letter, option in options.items() if _holds(flat, normal(option))]
    # The text of a longer option holds that of a shorter one: "the old man" holds "the man".
    longest = [a for a in said if not any(a != b and normal(options[a]) in normal(options[b]) for b in said)]
    return longest[0] if len(longest) == 1 else None


def _listed(text: str, letters: str) -> bool:
    """Whether an answer only gives the options back: it opens with the first one, and the second follows as such."""
    return re.search(rf"^\W*{letters[0]}[).:].*?[\s(]{letters[1]}[).:]", text, re.DOTALL) is not None


def normal(text: str) -> str:
    """Lower case without accents, articles, punctuation and thousands separators."""
    flat = unicodedata.normalize("NFKD", plain(text).lower().replace("can't", "cannot").replace("n't", " not"))
    flat = "".join(c for c in flat if not unicodedata.combining(c))
    flat = re.sub(r"(?<=\d),(?=\d{3})", "", flat)
    flat = re.sub(r"\b(?:a|an|the)\b", " ", re.sub(r"[^\w\s.]|\.(?!\d)", " ", flat))
    return " ".join(flat.split())


def _holds(text: str, part: str) -> bool:
    return bool(part) and re.search(rf"(?<![\w.]){re.escape(part)}(?!\w)", text) is not None


def fact(answer: str, expected: Sequence[str]) -> Fact:
    """Whether a short factual answer is right, wrong or none."""
    if not re.search(r"\w", answer):
        return "not_attempted"
    flat = normal(answer)
    if any(_holds(flat, normal(one)) for one in expected):
        return "correct"
    return "not_attempted" if refuses(answer) or _UNKNOWN.search(plain(answer)) else "incorrect"
