"""The refusal of bad input: one clear line and exit code 2, never a traceback."""

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
    """Input that cannot work. The message is one line. It names the flag or file, and what would work."""

    def __str__(self) -> str:
        return " ".join(super().__str__().splitlines())  # file names may contain line breaks


@contextlib.contextmanager
def one_line_refusals(program: str) -> Iterator[None]:
    """Ends the process with exit code 2 and the message alone when the body raises `BadInput`.

    It does the same where the disk is full or a file may not be read or written. Where the reader of stdout is gone,
    the process ends silently with exit code 130.
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
    """Redirects stdout to the null device. Otherwise the interpreter fails at exit when it flushes what is left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def cannot_write(path: Path, *otherwise: str) -> Iterator[None]:
    """Turns an OSError of the body, such as a full disk, into a `BadInput` that names `path` and what would work."""
    try:
        yield
    except OSError as error:
        advice = " or ".join([ADVICE.get(error.errno or 0, "mend that"), *otherwise])
        raise BadInput(f"{path} cannot be written: {error.strerror}; {advice}, and run it again") from None
