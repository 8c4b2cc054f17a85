# The types of the parts of results_table.py that programs may use; everything else may change.
# `make check` compares them with the file, which has the docstrings, units and errors.
import os
from collections.abc import Callable, Iterable
from typing import ClassVar, Optional, Union

class TableError(Exception):
    exit_code: ClassVar[int]

class UsageError(TableError): ...

_Path = Union[str, bytes, os.PathLike[str], os.PathLike[bytes]]
_Texts = Union[str, Iterable[str]]

def results_table(
    *results: _Path, metric: _Texts = (), from_: _Texts = (), where: _Texts = (),
    mean_over: _Texts = (), unfinished: bool = False, sort: _Texts = (), columns: _Texts = (),
    earlier: bool = False, current: bool = False,
    report: Optional[Callable[[str], object]] = None, html: Optional[_Path] = None,
) -> list[dict[str, Union[str, int, float, None]]]: ...
def main() -> int: ...
