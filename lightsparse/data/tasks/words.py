"""Words, numbers and names for tasks in text."""

from __future__ import annotations

from lightsparse.data.tasks.draws import Draws

_ADJECTIVES_TEXT = (
    "able amber ancient bitter bold brave bright brisk calm clever coarse cold crisp curious dark deep distant dry "
    "eager early faint fair fierce firm fresh gentle golden grand grave green happy heavy hollow honest humble icy "
    "keen kind large late lively lonely lucky mellow mild narrow noble odd old pale patient plain polite proud quick "
    "quiet rapid rare rough round royal sharp shy silent silver simple sleepy slow smooth soft solid sour steady stern "
    "sweet swift tall tame tender thin tidy tiny vast warm weary wild wise young"
)
_NOUNS_TEXT = (
    "acorn anchor apple arrow badge basket beacon bell bench bird boat bottle branch bridge brook bucket button cabin "
    "candle canyon castle cellar chair cherry clock cloud coin comet copper corner cradle crown desert door dragon "
    "eagle engine falcon feather fence field flame forest fountain garden gate glove harbor hammer helmet hill island "
    "jacket kettle ladder lantern lemon letter lizard lodge market meadow mirror mountain needle oak orchard otter "
    "paper pebble pencil pepper pillow pocket pond prairie quarry rabbit river rocket saddle shadow shell spoon "
    "temple thunder ticket tunnel valley violin wagon whistle window winter"
)
_ADJECTIVES, _NOUNS = _ADJECTIVES_TEXT.split(), _NOUNS_TEXT.split()
_CONSONANTS, _VOWELS, _LETTERS = "bdfghjklmnprstvz", "aeiou", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def key_words(draws: Draws) -> str:
    """`quiet-river`."""
    return f"{draws.pick(_ADJECTIVES)}-{draws.pick(_NOUNS)}"


def number(draws: Draws) -> str:
    """Seven digits, the first no zero."""
    return str(1_000_000 + draws.one_below(9_000_000))


def uuid(draws: Draws) -> str:
    """32 hex digits in groups of 8, 4, 4, 4 and 12."""
    digits = "".join("0123456789abcdef"[i] for i in draws.below(16, 32).tolist())
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def coded_words(draws: Draws, count: int) -> list[str]:
    """`count` different words of six letters that mean nothing, such as `tovamu`."""
    syllables = len(_CONSONANTS) * len(_VOWELS)
    words = []
    for code in draws.distinct(syllables**3, count).tolist():
        parts = (code // syllables**i % syllables for i in range(3))
        words.append("".join(_CONSONANTS[part // len(_VOWELS)] + _VOWELS[part % len(_VOWELS)] for part in parts))
    return words


def variable_names(draws: Draws, count: int) -> list[str]:
    """`count` different names of five capital letters."""
    codes = draws.distinct(26**5, count).tolist()
    return ["".join(_LETTERS[code // 26**i % 26] for i in range(5)) for code in codes]
