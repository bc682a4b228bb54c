"""Whether the CLIP of a fit can read the class names, before anything large is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maple.clip.checkpoints.configurations import sentence_limit
from maple.config import RunSettings
from maple.data import template_of
from maple.errors import ClassNamesError, shortened
from maple.names import clean_class_names


def require_readable_names(settings: RunSettings, class_names: Sequence[str]) -> None:
    """Refuse the class names that the CLIP of a fit could not read, without loading it where its size is known.

    Raises:
        ClassNamesError: a sentence is longer than this CLIP reads.
    """
    limit = sentence_limit(settings.backbone.name)
    if limit is None:
        return
    count, most = limit

    def templates(description: Mapping[str, Any]) -> Iterator[str]:
        for value in description.values():
            if isinstance(value, Mapping):
                yield from templates(value)
            texts = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else []
            yield from (text for text in texts if isinstance(text, str) and text.count("{}") == 1)
        length = description.get("prompt_length") or description.get("text_prompt_length")
        if isinstance(length, int):
            # Which of them the sentence begins with depends on the method; no name is refused that it can read.
            words = (description.get("init_text"), " ".join(["X"] * length))
            yield min(filter(None, words), key=count) + " {}."

    name = max(clean_class_names(class_names), key=count)
    for template in (template_of(settings.data.dataset or "") or "a photo of a {}.", *templates(settings.method)):
        sentence = template.replace("{}", name)
        if count(sentence) > most:
            raise ClassNamesError(
                f"{shortened(sentence)!r} needs {count(sentence)} tokens, but this CLIP reads at most {most}; shorten "
                "the class name (--class-names names.json gives other words), the template, or the prompt"
            )
