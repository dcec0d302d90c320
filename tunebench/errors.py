"""How bad input is refused: one clear line, exit code 2, never a traceback."""

import contextlib
import sys
from collections.abc import Iterator


class BadInput(Exception):
    """What the user gave cannot work. The message is one line that names the flag or file and what would work."""


@contextlib.contextmanager
def one_line_refusals(program: str) -> Iterator[None]:
    """Ends the process with exit code 2 and the message alone when the body raises `BadInput`."""
    try:
        yield
    except BadInput as refusal:
        print(f"{program}: {refusal}", file=sys.stderr)
        sys.exit(2)
