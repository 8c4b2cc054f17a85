# The types of the parts of combine_folders.py that programs may use; everything else may change.
# `make check` compares them with the file, which has the docstrings, units and errors.
import os
from collections.abc import Iterable
from typing import ClassVar, Literal, NamedTuple, Optional, Union

class CombineError(Exception):
    exit_code: ClassVar[int]

class UsageError(CombineError): ...
class Refused(CombineError): ...

class ConflictsFound(CombineError):
    conflicts: tuple[Conflict, ...]
    result: Result
    def __init__(self, conflicts: tuple[Conflict, ...], result: Result) -> None: ...

class Stopped(CombineError): ...

class Changed(Stopped):
    def __init__(self, path: str) -> None: ...

class Version(NamedTuple):
    source: str
    kind: str
    name: str
    size: int
    mtime_ns: int
    content: int

class Conflict(NamedTuple):
    path: str
    versions: tuple[Version, ...]

class Result(NamedTuple):
    files: int = 0
    bytes: int = 0
    duplicates: int = 0
    conflicts: int = 0
    skipped: int = 0
    renamed: tuple[tuple[str, str], ...] = ()

class Report:
    def say(self, line: str) -> None: ...
    def begin(self, doing: str, total_bytes: int = 0) -> None: ...
    def step(self, files: int, size: int) -> None: ...
    def end(self) -> None: ...

_Path = Union[str, bytes, os.PathLike[str], os.PathLike[bytes]]

def combine_folders(
    dest: _Path, *sources: _Path, dry_run: bool = False, link: bool = False, move: bool = False,
    on_conflict: Literal["error", "rename"] = "error", exclude: Iterable[str] = (),
    prefix: bool = False, skip_special: bool = False, report: Optional[Report] = None,
) -> Result: ...
def main() -> int: ...
