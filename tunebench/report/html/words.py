"""The words of the page in each language, from words.json: its own words, headings, and phrases of the tables."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("words.json")
LANGUAGES = ("en", "zh")
_DICTIONARY: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


class Words:
    """The words in one of LANGUAGES.

    words.json has `words` (the page's own, by key), `headings` (a table's English headings and what they are in
    Chinese), and `phrases` (patterns of the tables' English texts in the order of their use, and their replacements).
    Notes of rows, log lines and the names of setups stay as they are.
    """

    def __init__(self, language: str) -> None:
        self.language = language
        self.own: dict[str, str] = {key: texts[language] for key, texts in _DICTIONARY["words"].items()}

    def say(self, key: str, **values: Any) -> str:
        """The page's own text of this key."""
        return self.own[key].format(**values)

    def heading(self, title: str) -> str:
        """The heading of a table's column."""
        return title if self.language == "en" else _DICTIONARY["headings"].get(title, self.translated(title))

    def translated(self, text: str) -> str:
        """A text of a table: verdicts, statuses and caveats are translated."""
        if self.language != "en":
            for pattern, replacement in _DICTIONARY["phrases"]:
                text = re.sub(pattern, replacement, text)
        return text

    def say_status(self, ends: Sequence[str], statuses: Sequence[str | None], refusal: str | None) -> str:
        """The words for how a row ended. A side's status is named with its side."""
        parts = [
            self.say("side_status", side=side, status=self.say(f"status_{status}"))
            for side, status in zip(("Paddle", "Torch"), statuses, strict=True)
            if status not in (None, "ok")
        ]
        parts += [self.say(f"status_{end}") for end in ends if end in ("ok", "disturbed", "alone")]
        if "refused" in ends and refusal:
            parts.append(self.translated(refusal))
        return ", ".join(parts)
