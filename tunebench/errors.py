"""How bad input is refused: one clear line, exit code 2, never a traceback."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tunebench.bootstrap import refuse

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
ADVICE = dict.fromkeys(NO_ROOM, "make room there") | dict.fromkeys(NOT_ALLOWED, "let this user in there")


class BadInput(Exception):
    """What the user gave cannot work. The message is one line that names the flag or file and what would work."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # a name in it may have line breaks


@contextlib.contextmanager
def one_line_refusals(program: str) -> Iterator[None]:
    """Ends the process with exit code 2 and the message alone when the body raises `BadInput`.

    The body prints: where nobody reads that any more, the process ends with 130, silently; where there is no room for
    it, with 2 and one line, as where a file may not be read or written.
    """
    try:
        yield
    except BadInput as refusal:
        refuse(f"{program}: {refusal}")
    except BrokenPipeError:  # as in `summarize.py | head`
        forget_stdout()
        sys.exit(130)
    except OSError as error:
        if error.errno not in ADVICE or (error.errno in NOT_ALLOWED and not error.filename):
            raise
        forget_stdout()
        where = error.filename or "what it prints"
        refuse(f"{program}: {where}: {error.strerror}; {ADVICE[error.errno]}")


def forget_stdout() -> None:
    """Sends what is still to be printed to nowhere, so that the interpreter does not fail over it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def cannot_write(path: Path, *otherwise: str) -> Iterator[None]:
    """Turns an OSError of the body, such as a full disk, into a `BadInput` that names `path`, and what would work."""
    try:
        yield
    except OSError as error:
        advice = " or ".join([ADVICE.get(error.errno or 0, "mend that"), *otherwise])
        raise BadInput(f"{path} cannot be written: {error.strerror}; {advice}, and run it again") from None
