"""CLIP's tokenizer from its published merges, without torch.

Source: openai/CLIP clip/simple_tokenizer.py and open_clip 3.3.0 src/open_clip/tokenizer.py `SimpleTokenizer`, whose ids
these are, for every string.
"""

import gzip
import html
import zlib
from collections.abc import Sequence
from pathlib import Path

from tokenizers.models import BPE

from maple import files
from maple.errors import CheckpointError, ClassNamesError, ConfigError, first_line, shortened
from maple.names import refuse_long

_MERGES = 49152 - 256 - 2
_MOST_BYTES = 16 * 1024**2  # of the decompressed file; CLIP's has three
_AGAIN = "export the run again"
_START, _END = "<start_of_text>", "<end_of_text>"
_PIECES = rf"{_START}|{_END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+"


class ClipTokenizer:
    """From sentences to at most `context_length` ids, with the published `merges` (`bpe_simple_vocab_16e6.txt.gz`).

    Raises:
        CheckpointError: the file is missing, damaged, or not that of CLIP.
        ConfigError: the packages `ftfy` and `regex` are not installed.
    """

    def __init__(self, merges: Path, context_length: int) -> None:
        try:
            import ftfy
            import regex
        except ImportError as error:
            advice = "pip install 'maple-clip[onnx]'"
            raise ConfigError(f"CLIP's tokenizer needs the package {error.name}: {advice}") from error
        self.context_length = context_length
        self._fix = ftfy.fix_text
        # tokenizers' own regular expressions know another version of Unicode: they split 17,000 characters otherwise.
        self._pieces = regex.compile(_PIECES, regex.IGNORECASE)
        self._letters = str.maketrans(dict(enumerate(byte_letters())))
        vocabulary, pairs = read_vocabulary(merges, (_START, _END))
        self._special = {word: vocabulary[word] for word in (_START, _END)}
        self._vocabulary = vocabulary
        try:
            self._bpe = BPE(vocabulary, pairs, end_of_word_suffix="</w>")
        except Exception as error:  # the library has no class of its own
            raise CheckpointError(
                f"{merges} does not hold CLIP's merges ({first_line(error)[:100]}); {_AGAIN}"
            ) from error

    def words(self, text: str) -> list[int]:
        """The ids of `text`, without start and end."""
        cleaned = " ".join(html.unescape(html.unescape(self._fix(text))).split()).lower()
        ids: list[int] = []
        for piece in self._pieces.findall(cleaned):
            # Latin-1 makes one character of each byte, which is then exchanged for the byte's printable letter.
            letters = piece.encode("utf-8").decode("latin-1").translate(self._letters)
            special = self._special.get(letters)
            ids += [token.id for token in self._bpe.tokenize(letters)] if special is None else [special]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a word ends with a space.

        Source: open_clip 3.3.0 src/open_clip/tokenizer.py `SimpleTokenizer.decode`.
        """
        tokens, letters = list(self._vocabulary), {letter: byte for byte, letter in enumerate(byte_letters())}
        joined = "".join(tokens[index] for index in ids)
        return bytes(letters[letter] for letter in joined).decode("utf-8", "replace").replace("</w>", " ")

    def sentence(self, text: str, *, truncate: bool = False) -> list[int]:
        """The ids of `text`, with start and end.

        Args:
            truncate: leave out the last words that the context does not hold.

        Raises:
            ClassNamesError: there are more than the context holds, and none is left out.
        """
        refuse_long([text])
        ids = [self._special[_START], *self.words(text), self._special[_END]]
        if truncate and len(ids) > self.context_length:
            return [*ids[: self.context_length - 1], self._special[_END]]
        if len(ids) > self.context_length:
            raise ClassNamesError(
                f"{shortened(text)!r} needs {len(ids)} tokens, but this CLIP reads at most {self.context_length}; "
                "shorten the class name, the template, or the prompt"
            )
        return ids


def read_vocabulary(merges: Path, ends: tuple[str, str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read CLIP's vocabulary, {token: id}, with `ends` for start and end, and its merges, the first applied first.

    Raises:
        CheckpointError: the file is missing, damaged, or not that of CLIP.
    """
    try:
        with gzip.open(files.regular(merges)) as file:
            text = file.read(_MOST_BYTES)
        lines = text.decode("utf-8").split("\n", _MERGES + 1)[1 : _MERGES + 1]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        problem = f"is not a readable file of CLIP's merges: {error}"
        raise CheckpointError(f"{merges} {problem}; {_AGAIN}") from error
    pairs = [(words[0], words[1]) for words in map(str.split, lines) if len(words) == 2]
    if len(set(pairs)) != _MERGES:
        raise CheckpointError(f"{merges} does not hold CLIP's {_MERGES} merges; {_AGAIN}")
    letters = sorted(byte_letters())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs), *ends]
    return {token: number for number, token in enumerate(tokens)}, pairs


def byte_letters() -> list[str]:
    """A printable letter for each of the 256 bytes: its own Latin-1 character if printable, else one above 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
