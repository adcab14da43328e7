"""The Penn Treebank tokenizer of the COCO caption metrics, without Java.

pycocoevalcap tokenizes with Stanford's PTBTokenizer 3.4.1 (`-preserveLines -lowerCase`) and then removes
punctuation. The rules here were written from the published conventions of the Penn Treebank and from the
output of that program, and give the same tokens on all reports of Indiana University and on random English
text (`tests/evals/reports/test_ptb.py`). The lexer takes, at each position, the rule with the longest match,
counted with its right context; the first of equal ones wins.

Three properties of the original are worth knowing, and kept:

- Round brackets stay, as `-lrb-` and `-rrb-`: the list of removed punctuation has them in capitals, and the
  tokens are in lower case.
- A missing space joins sentences: `normal.No` is one token.
- Some tokens contain a non-breaking space (`2\\xa01/2`), which BLEU and CIDEr split and ROUGE-L does not.

Scripts other than Latin, Greek and Cyrillic, and symbols outside Latin-1, may be tokenized differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Removed after tokenization, as in pycocoevalcap.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)


_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&LT;": "<", "&GT;": ">", "&nbsp;": ""}
_CURRENCY = {"\u00a2": "cents", "\u00a3": "#", **dict.fromkeys("\u0080\u00a4\u20a0\u20ac", "$")}
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_QUOTES = {
    **dict.fromkeys("`\u0091\u2018\u201b\u2039", "`"),
    **dict.fromkeys("'\u0092\u2019\u203a", "'"),
    **dict.fromkeys("\u0093\u201c\u00ab", "``"),
    **dict.fromkeys("\u0094\u201d\u00bb", "''"),
}
_APOSTROPHES = str.maketrans({quote: _QUOTES[quote] for quote in "\u0091\u0092\u2018\u2019\u201b"})

# Characters that Python's `\w` counts as letters, and that are numbers.
_NUMERALS = (
    "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070\u2074-\u2079\u2080-\u2089\u2150-\u2182\u2185-\u2189\u2460-\u249b"
    "\u24ea-\u24ff\u2776-\u2793"
)
_LETTER = rf"(?:[^\W\d_{_NUMERALS}]|\u00ad)"
_ALNUM = rf"(?:[^\W_{_NUMERALS}]|\u00ad)"
_APOSTROPHE = "(?:['\u0092\u2019]|&apos;)"
_QUOTE = "(?:['\u0092\u2019`\u0091\u2018\u201b]|&apos;)"
_ENDING = f"{_APOSTROPHE}(?i:[msd]|re|ve|ll)"
_NOT = f"[nN]{_QUOTE}[tT]"
_WORD = f"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"
_NUMBER = r"(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+)"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
_PART = f"(?:[dDoOlL]{_QUOTE}{_ALNUM})?{_ALNUM}+"
_COMPOUND = rf"{_PART}(?:[-_\u058a\u2010\u2011]{_PART})*"
_SLASH_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_NOT_IN_URL = '[^ \\t\\n\\f\\r"<>|.!?(){},-]'
_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_VALUE = "(?:'[^']*'|\"[^\"]*\")"

# Words in any case, before a full stop that belongs to them: titles, and names of months, places, companies.
_TITLES = (
    "adj|adm|adv|alex|assoc|asst|atty|attys|ave|brig|capt|cf|cie|cmdr|col|comdr|cpl|dept|det|dr|drs|elec|"
    "ens|ft|gen|gov|govs|hon|insp|invt|jos|lieut|lt|maj|messrs|mlle|mme|mr|mrs|ms|msgr|mt|natl|"
    "pfc|ph|pres|prof|profs|pvt|rep|reps|rev|sen|sens|sfc|sgt|spc|st|ste|supt|supts|treas|vs|wm"
)
_NAMES = (
    "al|ala|apr|ariz|assn|aug|bancorp|bhd|bldg|blvd|bros|calif|co|colo|conn|corp|cos|ct|dak|dec|esq|est|"
    "etc|ext|feb|fla|fri|ga|inc|ind|intl|jan|jr|jul|jun|kan|kans|ky|ltd|mar|md|mich|minn|mo|mon|mont|neb|"
    "nev|nov|oct|okla|penn|plc|rd|rt|sep|sept|seq|sq|sr|sys|tel|tenn|thu|thurs|tue|tues|univ|va|vt|wed|"
    "wis|wisc|wyo"
)
# In lower case these are words.
_CAPITALISED = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_BEFORE_A_NUMBER = "art|ca|figs?|nos?|op|pp|prop"
# Capitalised words that begin a sentence after a single letter and a full stop.
_STARTS = (
    "A|About|According|Additionally|After|An|As|At|But|Earlier|He|Her|Here|However|If|In|It|Last|Many|"
    "More|Now|Once|One|Other|Our|She|Since|So|Some|Such|That|The|Their|Then|There|These|They|This|We|"
    "What|When|While|Yet|You"
)
_EXTENSIONS = (
    "bat|bmp|cgi|cpp|c|dll|docx?|exe|gif|gz|html?|h|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|"
    "tar|txt|wav|xml|x|zip"
)


def _capitalised(words: str) -> str:
    """The alternatives with a capital first letter, and the others in any case."""
    return re.sub(r"([A-Z])([a-z]*)", r"\1(?i:\2)", words)


def _plain(text: str) -> str:
    """As `_raw`, with straight apostrophes."""
    return _raw(text.replace("&apos;", "'").translate(_APOSTROPHES))


def _raw(text: str) -> str:
    """The token in lower case, without soft hyphens."""
    return text.replace("\u00ad", "").lower()


def _unbroken(text: str) -> str:
    """Spaces inside a token become non-breaking ones."""
    return text.lower().replace(" ", "\u00a0")


def _bracketed(text: str) -> str:
    return _unbroken(text.replace("(", "-lrb-").replace(")", "-rrb-"))


def _nothing(text: str) -> str:
    return ""


def _fraction(text: str) -> str:
    return _unbroken(text.replace("\u2044", "/"))


def _mapped(mapping: dict[str, str]) -> Callable[[str], str]:
    return lambda text: mapping.get(text, text)


def _quotes(text: str) -> str:
    return "".join(_QUOTES.get(one, one) for one in text)


def _dashes(text: str) -> str:
    return "--" if len(text) in (3, 4) else text


# (rule, its token). A group is right context: it counts for the length of the match, and is read again. What
# becomes a mark of `PUNCTUATION` may be written as nothing, since it is removed anyway.
_RULES: Sequence[tuple[str, Callable[[str], str]]] = (
    # Words and their endings.
    (r"[cC][aA][nN](?=([nN][oO][tT]))", _raw),
    (r"(?i:gon|wan)(?=((?i:na)))|(?i:got)(?=((?i:ta)))|(?i:lem|gim)(?=((?i:me)))", _raw),
    (r"'[tT](?=((?i:is|was)))", _raw),
    (rf"{_WORD}(?=({_ENDING}))", _plain),
    (rf"{_LETTER}+(?=({_NOT}))", _plain),
    (_WORD, _plain),
    # Contractions that stay whole.
    (rf"{_APOSTROPHE}[nN]{_APOSTROPHE}?|[lLdDjJ]{_APOSTROPHE}|[oO][lL]{_APOSTROPHE}", _raw),
    (rf"{_APOSTROPHE}\d\d(?=([ \u00a0\n]))", _raw),
    (rf"(?i:{_APOSTROPHE}(?:em|[2-9]0s|till?|cause))", _raw),
    (rf"[A-HJ-XZn]{_QUOTE}{_LETTER}{{2,}}|{_LETTER}+[aeiouyAEIOUY]{_QUOTE}[aeiouA-Z]{_LETTER}*", _raw),
    (r"(?i:cont'd\.?|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)", _raw),
    (rf"[yY]{_APOSTROPHE}(?=({_LETTER}))", _raw),
    (rf"{_ENDING}(?=([^A-Za-z]))", _plain),
    (_NOT, _plain),
    # Addresses.
    (r"https?://[^ \t\n\f\r\"<>|(){}]+" + _NOT_IN_URL, _raw),
    (
        r"(?:www\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}"
        r"|(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(?:com|net|org|edu))"
        rf"(?:/[^ \t\n\f\r\"<>|()]+{_NOT_IN_URL})?",
        _raw,
    ),
    (
        r"(?:&lt;|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{}]*@(?:[^ \t\n\f\r\"<>|(){}.\u00a0]+\.)*"
        r"[^ \t\n\f\r\"<>|(){}\[\].,;:\u00a0]+(?:&gt;|>)?",
        _raw,
    ),
    (rf"@[A-Za-z][A-Za-z0-9_]*|#{_LETTER}+", _raw),
    # Numbers.
    (r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}", _raw),
    (rf"[-+]?{_NUMBER}", _plain),
    (r"[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)", _raw),
    (r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}", _fraction),
    (r"[\u00bc-\u00be\u2153-\u215e]", _mapped(_FRACTIONS)),
    (
        r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])"
        r"\d{3,4}[- \u00a0]?\d{3,5}"
        r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
        _bracketed,
    ),
    (r"[A-Z]*\$|[\u0080\u00a2\u00a3\u00a4\u20a0\u20ac]", lambda text: _CURRENCY.get(text, text.lower())),
    # Abbreviations.
    (rf"(?:(?i:{_TITLES})|[mM][fFtT]g)\.", _raw),
    (
        rf"(?:(?i:ed|ph)\.[dD]|(?i:{_NAMES})|{_capitalised(_CAPITALISED)}|[Pp]p?t[ye]s?)\.(?=(..))",
        _raw,
    ),
    # Compounds.
    (rf"{_SLASH_PART}(?:\\?/{_SLASH_PART}){{1,2}}", _raw),
    (rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_ACRONYM}\.|[A-Za-z0-9\u00ad]+))+", _plain),
    (_COMPOUND, _raw),
    (r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", lambda text: text.replace("&amp;", "&").lower()),
    (r"pro-|anti-|S&P-500|[cC](?:\+\+|#)", _raw),
    # Short forms.
    (rf"(?i:{_BEFORE_A_NUMBER})\.(?=([ \t\u00a0\n]?\d))", _raw),
    (rf"{_ACRONYM}\.?|[A-Za-z]\.", _raw),
    (
        rf"[A-Za-z](?=(\.[ \u00a0]+(?:{_capitalised(_STARTS)})[ \u00a0\n]))",
        _raw,
    ),
    (rf"(?:{_WORD}|{_COMPOUND})\.(?=([,;:\u3001]))", _raw),
    (rf"{_ALNUM}+(?:\.{_ALNUM}+)*\.(?i:{_EXTENSIONS})(?=([ \u00a0\n!,.?]))", _plain),
    # Marks.
    (
        rf"<{_NAME}(?:[ ]+{_NAME}(?:[ ]*=[ ]*{_VALUE})?)*[ ]*/?[ ]*>|</{_NAME}[ ]*>|<[!?][A-Za-z-][^>\r\n]*>",
        _unbroken,
    ),
    (r"&(?i:amp|lt|gt|nbsp);", _mapped(_ENTITIES)),
    (r"&#[0-9]+;", _raw),
    (r"&(?i:quot|mdash|ndash|md);|&apos;", _nothing),
    (r"'(?=([A-Za-z][^ \t\n\r\u00a0]))", _nothing),
    (_ENDING, _plain),
    ("[`\u0091-\u0094\u2018-\u201f\u2039\u203a\u00ab\u00bb]{1,2}", _quotes),
    (r"''|'", _nothing),
    (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?=([^A-Za-z0-9]))", _bracketed),
    (r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)", _bracketed),
    (r"[(){}\[\]]", _mapped(_BRACKETS)),
    (r"-+", _dashes),
    (r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.|\u2026", _nothing),
    (r"[?!]+", _raw),
    (r"@+|#+|\*+|(?:\\\*){1,3}|_+|<<|>>", _raw),
    # All other symbols of Latin-1, Greek, and the blocks of symbols; what is left is deleted.
    (
        "[%&+/<=>^|~\\\\\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bf\u00d7\u00f7"
        "\u02c2-\u02c5\u02d2-\u02df\u0300-\u036f\u0384\u0387\u03f6\u2016\u2017\u2020-\u2023\u2030-\u2038"
        "\u203b\u203e-\u2042\u2044\u207a-\u207e\u208a-\u208e\u20a4\u2100-\u214f\u2190-\u2bff\u3001\u3002]",
        _raw,
    ),
)
_COMPILED = tuple((re.compile(pattern, re.DOTALL), token) for pattern, token in _RULES)
_BREAK = re.compile(r"[\n\r\x0b\x0c\x85\u2028\u2029]")
# Most of a report: letters before a space. No rule matches more there, but for the words that are split.
_SIMPLE = re.compile(r"([A-Za-z]+)(?= )")
_SPLIT = frozenset(["cannot", "gonna", "wanna", "gotta", "lemme", "gimme"])


def tokenize(text: str) -> list[str]:
    """The tokens of `text`, in lower case and without punctuation.

    Line breaks count as spaces: the original reads one text per line.

    >>> tokenize("Heart size isn't enlarged (1.5cm).")
    ['heart', 'size', 'is', "n't", 'enlarged', '-lrb-', '1.5', 'cm', '-rrb-']
    """
    # Rules with right context see the end of the line, as in the original.
    text = _BREAK.sub(" ", text) + "\n\n"
    tokens = []
    at, end = 0, len(text) - 2
    while at < end:
        if text[at] == " ":
            at += 1
            continue
        simple = _SIMPLE.match(text, at)
        if simple and (word := simple[1].lower()) not in _SPLIT:
            at, token = simple.end() + 1, word
        else:
            length, token = _longest(text, at)
            at += length
        if token and token not in PUNCTUATION:
            tokens.append(token)
    return tokens


def _longest(text: str, at: int) -> tuple[int, str]:
    """Length and token of the rule that matches most at `at`; one character without a token if none does."""
    most, chosen, make = 0, "", _nothing
    for pattern, token in _COMPILED:
        match = pattern.match(text, at)
        if match:
            length = max(match.end(group) for group in range(pattern.groups + 1)) - at
            if length > most:
                most, chosen, make = length, match[0], token
    return (len(chosen), make(chosen)) if chosen else (1, "")


def joined(text: str) -> str:
    """The tokens of `text` joined by single spaces, as the metrics of `coco` take them."""
    return " ".join(tokenize(text))
