"""The commit of a checkout, as git tells it."""

import hashlib
import subprocess
from pathlib import Path

from tunebench.bootstrap import ROOT
from tunebench.record import Git

# The paths whose changes may change a run.
CODE = ("--", ".", *(f":(exclude){pattern}" for pattern in ("results", "docs", "*.md", "*.html", "traces")))


def read_git(root: Path = ROOT) -> Git:
    """The commit of a checkout (default: this one) and a digest of uncommitted changes.

    Documents and results are no part of it: reports, traces and packed records may come beside a series. None where git
    or its folder is missing.
    """

    def git(*arguments: str, given: bytes = b"") -> bytes | None:
        try:
            # git refuses another user's clone unless safe.directory names it.
            command = ["git", "-c", f"safe.directory={root}", "-C", str(root), *arguments]
            done = subprocess.run(command, input=given, capture_output=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout if done.returncode == 0 else None

    revision, status = git("rev-parse", "HEAD"), git("status", "--porcelain", *CODE)
    if revision is None or status is None:
        return Git(revision=None, dirty=None, changes=None)
    changes = hashlib.sha256(status + (git("diff", "HEAD", "--binary", *CODE) or b""))
    names = git("ls-files", "--others", "--exclude-standard", "--full-name", *CODE) or b""
    changes.update(git("hash-object", "--stdin-paths", given=names) or b"")
    return Git(
        revision=revision.decode().strip(), dirty=bool(status), changes=changes.hexdigest()[:12] if status else None
    )
