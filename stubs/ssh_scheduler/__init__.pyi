# The types of the parts of ssh_scheduler.py that programs may use; everything else may change.
# `make check` compares them with the file, which has the docstrings, units and errors.
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, NoReturn, Optional

__version__: str

class SchedulerError(Exception):
    exit_code: ClassVar[int]

class UsageError(SchedulerError):
    usage: str
    def __init__(self, text: str, usage: str = "") -> None: ...

class MachineFileError(SchedulerError): ...
class BatchFileError(SchedulerError): ...
class FilesError(SchedulerError): ...
class ResultsError(SchedulerError): ...
class FolderInUse(ResultsError): ...
class DoesNotFit(SchedulerError): ...

class Machine(NamedTuple):
    name: str
    host: str = ""
    username: Optional[str] = None
    port: Optional[int] = None
    ssh_key_path: Optional[str] = None
    proxy_jump: Optional[str] = None
    ssh_options: tuple[tuple[str, str], ...] = ()
    workdir: str = ""
    setup: str = ""
    env: tuple[tuple[str, str], ...] = ()
    wrap: str = ""
    gpus: Optional[tuple[int, ...]] = None
    max_jobs: Optional[int] = None
    engine: str = ""
    engine_options: tuple[str, ...] = ()
    gpu_types: Optional[tuple[tuple[int, str], ...]] = None
    node_folder: str = ""
    word: str = ""
    @property
    def address(self) -> str: ...

class Gpu(NamedTuple):
    index: int  # type: ignore[assignment]  # a field, not the method of tuples
    memory_mb: int
    utilization: float = 0.0
    total_memory_mb: int = 0
    uuid: str = ""
    name: str = ""
    others: int = 0
    users: tuple[str, ...] = ()
    batch_jobs: int = 0
    reserved: bool = False
    exclusive: bool = False
    unified: bool = False
    hidden: bool = False

class Capacity(NamedTuple):
    cores: float
    memory_mb: int
    gpus: tuple[Gpu, ...] = ()
    total_cores: float = 0.0
    total_memory_mb: int = 0
    max_jobs: Optional[int] = None
    gpu_trouble: str = ""
    lost_gpus: str = ""
    batch_jobs: int = 0
    batch_users: tuple[str, ...] = ()
    reserved: bool = False
    limits: tuple[Any, ...] = ()
    queue: Optional[Any] = None

class Allocation(NamedTuple):
    cores: float = 1.0
    memory_mb: int = 2000
    reserve: bool = False
    gpus: int = 1
    gpu_memory_mb: int = 1000
    gpu_utilization: float = 0.75
    reserve_gpu: bool = True

class Placement(NamedTuple):
    number: int
    allocation: Allocation
    gpus: tuple[int, ...]
    @property
    def visible_gpus(self) -> Optional[str]: ...

class JobResult(NamedTuple):
    name: str
    machine: str
    exit_code: int
    wall_s: float
    gpus: Optional[str] = None
    cpu_s: Optional[float] = None
    peak_memory_mb: Optional[int] = None
    peak_gpu_memory_mb: Optional[int] = None
    started: Optional[float] = None

class MachineResources:
    available: Capacity
    def __init__(self, available_resources: Capacity) -> None: ...
    def update(self, available_resources: Capacity) -> None: ...
    @property
    def jobs(self) -> int: ...
    def score(self, allocation: Allocation) -> float: ...
    def allocate(self, allocation: Allocation) -> Placement: ...
    def take(self, allocation: Allocation, gpus: tuple[int, ...]) -> Placement: ...
    def deallocate(self, placement: Placement) -> None: ...
    def short_of(self, allocation: Allocation) -> str: ...
    def why_not(self, allocation: Allocation, is_idle: bool = False) -> str: ...

class MachineRunner:
    SIGNALS: ClassVar[dict[str, tuple[str, ...]]]
    machine: Machine
    ended: dict[str, JobResult]
    def __init__(
        self, machine_info: Machine, session: Optional[Any] = None, number: int = 0,
        spacing_s: float = 0.0,
    ) -> None: ...
    def __enter__(self) -> MachineRunner: ...
    def __exit__(
        self, exc_type: Optional[type[BaseException]], exc: Optional[BaseException],
        traceback: Optional[TracebackType], /,
    ) -> None: ...
    def register(self, event: str, callback: Callable[..., object]) -> None: ...
    def register_started(self, callback: Callable[[str], object]) -> None: ...
    def register_ended(self, callback: Callable[[str], object]) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def capacity(self) -> Optional[Capacity]: ...
    @property
    def running(self) -> list[str]: ...
    @property
    def unfinished(self) -> list[str]: ...
    @property
    def busy(self) -> bool: ...
    def connect(self, want_gpus: bool = True) -> None: ...
    def probe(self) -> None: ...
    def measure(self, within_s: float = 0.0) -> None: ...
    def close(self) -> None: ...
    def wait(self) -> None: ...
    def cancel(self) -> None: ...
    def queue_up(
        self, command: str, forward_loc: Sequence[str] = (),
        backward_loc: Optional[Sequence[str]] = None, job_name: Optional[str] = None, *,
        link_loc: Sequence[str] = (), exclude: Iterable[str] = (), gpus: Optional[str] = None,
        placement: Optional[Placement] = None,
        sink: Optional[Callable[[str, bytes], object]] = None, keep: bool = True, mode: str = "",
        source: Optional[int] = None, timeout_s: Optional[float] = None,
    ) -> None: ...

def find_machine(word: str) -> Machine: ...
def find_machines(words: Iterable[str]) -> tuple[list[Machine], list[str]]: ...
def main(argv: Optional[Sequence[str]] = None) -> NoReturn: ...
