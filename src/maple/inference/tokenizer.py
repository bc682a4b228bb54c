"""CLIP's tokenizer from its published merges, without torch.

Source: openai/CLIP clip/simple_tokenizer.py and open_clip 3.3.0 src/open_clip/tokenizer.py `SimpleTokenizer`, whose ids
these are, for every string.
"""

import gzip
import html
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path

from maple.errors import CheckpointError, ClassNamesError, ConfigError, shortened

_MERGES = 49152 - 256 - 2
_START, _END = "<start_of_text>", "<end_of_text>"
_PIECES = rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"
_WORDS_KEPT = 4096


class ClipTokenizer:
    """Sentences to ids, as CLIP reads them.

    Args:
        merges: the published file of merges, `bpe_simple_vocab_16e6.txt.gz`.
        context_length: the longest sentence, start and end counted.

    Raises:
        CheckpointError: the file is missing, damaged, or not that of CLIP.
        ConfigError: the packages `ftfy` and `regex` are not installed.
    """

    def __init__(self, merges: Path, context_length: int) -> None:
        try:
            import ftfy
            import regex
        except ImportError as error:
            raise ConfigError(
                f"CLIP's tokenizer needs the package {error.name}: pip install 'maple-clip[onnx]'"
            ) from error
        self.context_length = context_length
        self._fix = ftfy.fix_text
        self._pieces = regex.compile(_PIECES, regex.IGNORECASE)
        self._bytes = byte_letters()
        ranked = _read_merges(merges)
        letters = list(self._bytes.values())
        words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, ranked), _START, _END]
        self._ids = {word: number for number, word in enumerate(words)}
        self._ranks = {pair: rank for rank, pair in enumerate(ranked)}
        self.end = self._ids[_END]
        self._merged = lru_cache(_WORDS_KEPT)(self._merge)

    def words(self, text: str) -> list[int]:
        """The ids of `text`, without start and end."""
        cleaned = html.unescape(html.unescape(self._fix(text))).strip()
        cleaned = " ".join(cleaned.split()).lower()
        found: list[int] = []
        for piece in self._pieces.findall(cleaned):
            found += self._merged("".join(self._bytes[byte] for byte in piece.encode("utf-8")))
        return found

    def sentence(self, text: str) -> list[int]:
        """The ids of `text`, start and end included.

        Raises:
            ClassNamesError: there are more than the context holds; it is never cut.
        """
        ids = [self._ids[_START], *self.words(text), self.end]
        if len(ids) > self.context_length:
            raise ClassNamesError(
                f"{shortened(text)!r} needs {len(ids)} tokens, but this CLIP reads at most {self.context_length}; "
                "shorten the class name, the template, or the prompt"
            )
        return ids

    def _merge(self, piece: str) -> tuple[int, ...]:
        """The ids of one piece: its letters, of which the pair that was merged first is joined again and again."""
        if piece in (_START, _END):
            return (self._ids[piece],)
        parts = [*piece[:-1], f"{piece[-1]}</w>"]
        while len(parts) > 1:
            pairs = set(pairwise(parts))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, _MERGES))
            if best not in self._ranks:
                break
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            parts = joined
        return tuple(self._ids[part] for part in parts)


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : _MERGES + 1]
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is no readable file of CLIP's merges: {error}; export the run again") from error
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) != _MERGES or any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{path} does not hold CLIP's {_MERGES} merges; export the run again")
    return pairs  # type: ignore[return-value]


@cache
def byte_letters() -> dict[int, str]:
    """A printable letter for every byte, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
