"""Plain professional English, one word for one thing: the first edition's own words stay out (CONTRIBUTING)."""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(
    path for folder in ("src", "benchmarks", "scripts", "examples") for path in (ROOT / folder).rglob("*.py")
)
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("*.html*"),
        *(ROOT / "src").rglob("*.js"),
    ]
)
# Lines that must name a word: the table of words in CONTRIBUTING, old names in CHANGELOG, training data of the packaged
# CLIP, method names of Python's files, and keys of JSON that are part of an interface.
ALLOWED = [
    ("CONTRIBUTING.md", r"^\| .* \| .* \|$"),
    ("CHANGELOG.md", r"^\| `.*` \|"),
    ("scripts/small_clip/captions.py", r"a picture of a {}\."),
    ("src/maple/archives/", r"readline and tell"),
    ("src/maple/", r"^.(mended|broken).$"),
]
WORDS = {
    r"(?<!there )(?<!there's )\b(is|are|was) no\b(?! longer| more| less| doubt)": "is not a",
    r"\btold\b|\btells?\b": "say, report, or distinguish",
    r"\bbesides?\b": "next to, with, or in addition to",
    r"\b(lies|lie) (in|at|on|under|outside|beside|there|where)\b": "is, or is stored",
    r"\bspeaks? of\b|\bspoken of\b": "is about, or supports",
    r"\b(goes|go|went) on\b": "continues",
    r"\b(somebody|nobody)\b": "the user, a user",
    r"\bstrangers?\b": "untrusted, unknown",
    r"\bso many\b": "that many, or the number",
    r"\bpictures?\b": "image",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bfoundr(y|ies)\b": "style, or drawing set",
    r"\bat hand\b": "available",
    r"\bof the moment\b": "given with the request",
    r"\bask(s|ed)? (it|them|about)\b": "predict, or evaluate on",
}
# Bindings that say nothing about what they hold.
EMPTY_NAMES = {"found", "one", "what", "own", "told"}


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Each string and comment of a program, or each line of a page, with its line number."""
    if path.suffix != ".py":
        yield from enumerate(path.read_text().splitlines(), 1)
        return
    # From Python 3.12 on, the text of f-strings comes in tokens of its own.
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in kinds:
                yield token.start[0], token.string


@pytest.mark.parametrize("path", [*PROGRAMS, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_plain_words(path: Path) -> None:
    bad = []
    name = path.relative_to(ROOT).as_posix()
    allowed = [re.compile(pattern) for start, pattern in ALLOWED if name.startswith(start)]
    for line, text in texts(path):
        if any(pattern.search(text) for pattern in allowed):
            continue
        flat = re.sub(r"\s+", " ", text)
        for pattern, better in WORDS.items():
            bad += [
                f"{name}:{line}: {match[0]!r} in {flat[max(match.start() - 30, 0) : match.end() + 20]!r}: {better}?"
                for match in re.finditer(pattern, flat, re.IGNORECASE)
            ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_variables_say_what_they_hold(path: Path) -> None:
    names = [
        (node.lineno, node.id if isinstance(node, ast.Name) else node.arg)
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)) or isinstance(node, ast.arg)
    ]
    assert not [(line, name) for line, name in names if name in EMPTY_NAMES]
