#!/usr/bin/env python3
# ssh-scheduler: https://github.com/benblack769/ssh-scheduler.  MIT licence, see LICENSE.
# /// script
# requires-python = ">=3.9"
# dependencies = ["PyYAML", "docopt-ng", "tqdm"]
# ///
"""Run many commands on a handful of machines that can be reached with ssh.

            here                                            on each machine

     usage, files --> jobs, machines, policy
                          |
      View <--changed--- Run <--> Scheduler       REMOTE_RUNNER (bash), one for each contact
                          |  ^                       |  creates, watches and ends
                   start  |  | changed               v
                          v  |        requests     jobs, each in a process group of its own,
     Journal <--move-- Worker ----- Contact ---->  with their streams in files
     ResultStore          |       <---- events           |
          ^               +-- flows: rsync, tar, follow <+
          +---------------------------+

Each contact is ONE ssh.  It is the master that copies share, and its standard streams are the
channel: requests go down to a bash program that we send (REMOTE_RUNNER), events come up.  So the
number of ssh processes does not grow with the number of jobs, and a batch costs one login on each
machine.  Jobs do not depend on the channel.  When this program dies, the channel ends, and the
remote runner with it, but the jobs run on and leave their exit status in a file.

The life of a job on a machine is the life of an Attempt.  Its states stand in the table LIFE, and
only Lives.move changes them: it asserts the order, and writes the journal before anybody hears.

     waiting -> placed -> claimed -> running -> ended -> collected   then its folder there goes
                  |          |          |         +----> kept        results could not be fetched
                  v          +----------+
               returned                 +-> refused, held, absent    it never began, for certain
                                        +-> lost        gone, for certain, without a result
                                        +-> abandoned   no contact for too long (--lost-after)
                                        +-> stopping -> stopped -> cancelled    told to end
                                                    +-> dropped     and not seen to end

After returned, refused, held, absent, lost or abandoned the job may wait again, as a new Attempt.

The promises, and the functions that keep them:

    A job runs at most once.  The journal is on the disk before the start is sent (Lives.move,
    Journal.sync), and on the machine a job begins when its file cmd is created, which succeeds
    once (take).
    A rerun, a reconnect and an attach are one thing.  At contact, the machine is asked about each
    attempt that is claimed or running there (JobControl.ask); a start that never arrived is
    revoked with the same question, so that it never will.
    A result replaces nothing.  It arrives in a folder of its own, and appears by one rename
    (ResultStore.commit).  Only then may the original go (Collector.clean).
    Nothing of a contact outlives it.  Its processes and flows end with it (Flows.close); contact
    that is found again is a new Contact.
    Results belong to the command and the files that made them.  A line of a batch file is looked
    up by its command (match_lines), and the key of a job on a machine, NAME.ATTEMPT-IDENTITY,
    names the journal that claimed it.

Only Processes starts and waits for processes, in one thread.  Only Report prints.  Text meant for
a shell on a machine stands in constants: BOOTSTRAP in Connection, the programs at the end of the
file.  All else crosses as data, between NULs.  A section uses only what stands above it, but for
those programs.

    The promise    Usage, Errors
    The heart      Records, Life, Resources, Scheduler, Run
    What is seen   Report, Lines, Views
    The edges      Options, Machine files, Batch files, Files to send, Archives, Probe
    The work       Results, Processes, Wire, Connection, Client, Copies, Contact, Results on their
                   way, Worker, As a library
    The commands   Commands
    On a machine   The remote runner, which opens with the files of a job, requests and events

As a library: MachineResources and MachineRunner keep their documented methods; everything else may
change.  Importing has no effect: nothing is read, printed or started.
"""
import collections
import contextlib
import errno
import fcntl
import functools
import heapq
import itertools
import json
import math
import os
import random
import re
import selectors
import signal
import stat
import subprocess
import sys
import time
from typing import NamedTuple, Optional

__version__ = '0.1.0'
LINUX = sys.platform == 'linux'     # so jobs can run here, too; WSL is one


# ---- Usage: these texts are what docopt parses, and where every default stands ----

MACHINE_OPTIONS = """\
Machines:
  --machines=<machine>...     Each a machine file (as given, with .yaml, or in ~/.local/var/), a
                              name from ~/.ssh/config, user@host[:port], localhost, or @file: a file
                              with one of these a line.
"""

HARDWARE_OPTIONS = """\
Hardware that each job needs:
  --num-cpus=<cores>          Processor cores [default: 1].
  --memory-required=<mb>      Memory in MB [default: 2000].
  --reserve                   A machine to itself.
  --no-gpu-required           No GPU.
  --num-gpus=<number>         GPUs, all on one machine [default: 1].
  --gpu-memory-required=<mb>  Memory in MB on each GPU [default: 1000].
  --gpu-utilization=<share>   Share of each GPU's time, up to 1 [default: 0.75].
  --no-reserve-gpu            Other jobs may share its GPU, as far as memory and time go.
"""

FILE_OPTIONS = """\
Files:
  --copy-forwards=<path>...   Files and folders that go along, by default the current folder. Never
                              .git and job_results. With no path: none.
  --link-forwards=<path>...   The same for data that jobs only read: sent once to a machine, linked
                              into each job's folder, never brought back.
  --exclude=<pattern>...      What to leave out, as in rsync. So are .rsync-filter files.
  --copy-backwards=<path>...  What a job brings back, by default what it made or changed in its
                              folder. A dot: all of it. With no path: nothing.
"""

COMMON_OPTIONS = """\
  --verbose                   Show every command run and every event, on stderr.
  -h --help                   Show this.
  --version                   Show the version.
"""

EXECUTE_BATCH_USAGE = """\
Run each line of a batch file on one of many machines, where there is room.

Usage:
  execute_batch [options] [--machines=<machine>]... [--copy-forwards=<path>]...
                [--link-forwards=<path>]... [--exclude=<pattern>]...
                [--copy-backwards=<path>]... [--] (<batch> | --earlier=<action>)
  execute_batch --help | --version

  <batch> has one bash command a line; - is the standard input. Results go to ./job_results.
  A list takes all words up to the next option; -- ends it.

{machines}
{hardware}
{files}
Other:
  --nice=<number>             Niceness of the jobs over there, 0 to 19 [default: 10].
  --timeout=<seconds>         So long a job may run; then it is ended, and has failed.
  --halt-after=<number>       Start no more jobs after so many have failed.
  --retries=<number>          Start a job so often again that its machine has failed: was restarted,
                              or lost it [default: 1].
  --lost-after=<seconds>      Start the jobs of a machine elsewhere that was out of contact for so
                              long. When it is back, they are ended there. Otherwise they are
                              waited for.
  --max-result-size=<mb>      Bring back no more than that of what a job made; what is larger stays
                              over there. Without it: what has room here.
  --away-limit=<seconds>      So long contact with a machine is looked for; then it is left, and its
                              jobs for the next run of the same command [default: 600].
  --no-live                   Look once at what the machines have free, not again while jobs wait.
  --status                    Say how far the batch is, and what is where; ask nobody.
  --cancel                    Cancel all jobs of the batch, whether its client runs or was killed.
  --earlier=<action>          Jobs that the machines have of an earlier job_results of this folder:
                              show them, collect those that have ended, under free names, or
                              remove them (running ones are stopped).
  --dry-run                   Ask the machines, show what would start where, start nothing.
{common}
Exit status: 0 all jobs succeeded, 1 some failed or a machine file is wrong, 2 wrong usage or
configuration, 130 interrupted.
""".format(machines=MACHINE_OPTIONS, hardware=HARDWARE_OPTIONS, files=FILE_OPTIONS,
           common=COMMON_OPTIONS)

EXECUTE_REMOTE_USAGE = """\
Run one command on one machine, show its output, and exit with its exit status.

Usage:
  execute_remote [options] [--copy-forwards=<path>]... [--link-forwards=<path>]...
                 [--exclude=<pattern>]... [--copy-backwards=<path>]... [--] <command>
  execute_remote [options] (--attach=<name> | --cancel=<name>)
  execute_remote --help | --version

  <command> is bash, in quotes. Its results go to ./job_results, under the name of the job.
  A line of a batch file may be such a command, too, for a job with other files, another name or
  other hardware than the rest of the batch.
  A list takes all words up to the next option; -- ends it.

The job:
  --machine=<machine>         A machine file (as given, with .yaml, or in ~/.local/var/), a name
                              from ~/.ssh/config, user@host[:port], or localhost. Ignored in a batch
                              file.
  --job-name=<name>           Its name, and that of its results. While it runs, the same command
                              with the same name attaches to it; later it shows what there is.
  --stdin                     The command reads our standard input; else its input is empty.
  --tty                       The command has our terminal.
  --detach                    Start it, print its name, and leave it.
  --attach=<name>             Go on with a job that runs: show what it says, from the beginning.
                              Ctrl-C stops watching; the job runs on.
  --cancel=<name>             End a job that runs, and all that it started.

{hardware}
With one of these given it waits until there is room, and has GPUs of its own; else it starts at
once, and CUDA_VISIBLE_DEVICES is not set.

{files}
Other:
  --nice=<number>             Niceness over there, 0 to 19 [default: 0].
  --away-limit=<seconds>      So long contact with the machine is looked for [default: 600].
{common}
Exit status: the command's own; 125 if the machine could not be reached, or contact was lost; 2
wrong usage or configuration, 130 interrupted.
""".format(hardware=HARDWARE_OPTIONS, files=FILE_OPTIONS, common=COMMON_OPTIONS)

EXECUTE_TO_USAGE = """\
Run one command on many machines, on all at the same time.

Usage:
  execute_to [options] [--machines=<machine>]... [--copy-forwards=<path>]...
             [--link-forwards=<path>]... [--exclude=<pattern>]...
             [--copy-backwards=<path>]... [--] <command>
  execute_to --help | --version

  <command> is bash, in quotes. It ends when we do.
  A list takes all words up to the next option; -- ends it.

{machines}
Output:
  --gather                    When all have ended: equal outputs once, below the machines' names.
  --diff                      The same, and of other outputs how they differ from the first.

Files, by default none:
  --copy-forwards=<path>...   Files and folders that go along.
  --link-forwards=<path>...   The same for data that is only read: never sent twice.
  --exclude=<pattern>...      What to leave out, as in rsync. So are .rsync-filter files.
  --copy-backwards=<path>...  What comes back, to ./job_results/<name>_<machine>.
  --job-name=<name>           The name of the results.

Other:
  --fanout=<number>           At most so many machines at a time [default: 64].
  --timeout=<seconds>         So long each machine may take, from login to end.
  --nice=<number>             Niceness over there, 0 to 19 [default: 0].
{common}
Exit status: 0 all succeeded, 1 some failed or could not be reached, 2 wrong usage or configuration,
130 interrupted.
""".format(machines=MACHINE_OPTIONS, common=COMMON_OPTIONS)

QUERY_MACHINES_USAGE = """\
Show what is free on machines, and who uses their GPUs.

Usage:
  query_machines [options] [--machines=<machine>]... [--watch=<seconds>]...
  query_machines --help | --version

{machines}
{hardware}
With one of these given: how many such jobs would fit now.

Other:
  --watch=<seconds>...        Look again every so many seconds, 5 if no number follows.
  --json                      One JSON object for each machine, a line each.
{common}
Exit status: 0 all machines answered, 1 some did not, 2 wrong usage or configuration.
""".format(machines=MACHINE_OPTIONS, hardware=HARDWARE_OPTIONS, common=COMMON_OPTIONS)

OVERVIEW = """\
Run many commands on a handful of machines that can be reached with ssh.

Usage: ssh_scheduler.py <command> <its options and words>..., where <command> is one of
{commands}

ssh_scheduler.py <command> --help shows the options of a command. A link with the name of a command
that leads to ssh_scheduler.py is that command.
""".format(commands='\n'.join(
    f'  {usage.partition("Usage:")[2].split()[0]:14}  {usage.partition(chr(10))[0]}' for usage in (
        EXECUTE_BATCH_USAGE, EXECUTE_REMOTE_USAGE, EXECUTE_TO_USAGE, QUERY_MACHINES_USAGE)))


# ---- Errors: each a sentence, with what to do; how sentences are written ----

class SchedulerError(Exception):
    """Anything that a user can cause; shown without a traceback."""
    exit_code = 2


class HelpAsked(Exception):
    """The command line asks for help or the version: main prints the text and exits."""


class UsageError(SchedulerError):
    """The command line is wrong."""

    def __init__(self, text, usage=''):
        super().__init__(text)
        self.usage = usage              # the text that says how to write the command line


class MachineFileError(SchedulerError):
    """A machine is described wrongly, or not at all."""


class BatchFileError(SchedulerError):
    """The batch file cannot be used."""


class FilesError(SchedulerError):
    """A path to send or to bring back cannot be used."""


class ResultsError(SchedulerError):
    """The folder job_results cannot be used."""


class DoesNotFit(SchedulerError):
    """A job asks for more than the machine has free."""


def nearest(word, known):
    """Return ' (did you mean X?)' with the known words that this one may stand for, or ''.

    The word may be the beginning of a known one, have typing errors, or name its parts in another
    order.
    """
    import difflib

    def parts(text):
        return re.findall('[^-_]+', text.lower())

    typed, found = ''.join(parts(word)), {}

    def opposite(other):
        """Tell whether one of them says no to something: --no-x never stands for x."""
        if 'no' in parts(other):
            return not typed.startswith('no')
        # The word may be a known one that begins with n: noce for nice.
        return typed.startswith('no') and (parts(word)[0] == 'no' or parts(other)[0][0] != 'n')

    def likeness(other):
        for order in itertools.permutations(parts(other)):
            spelled = ''.join(order)
            for beginning in {spelled, spelled[:len(typed)]}:
                ratio = difflib.SequenceMatcher(None, typed, beginning).ratio()
                yield ratio, list(order) == parts(other), beginning == spelled

    for other in sorted(known) if typed else ():
        if not opposite(other):
            found.setdefault(max(likeness(other)), []).append(other)
    best = max(found, default=(0,))
    alike = found[best] if best[0] >= 0.7 else []
    return f' (did you mean {" or ".join(alike)}?)' if 0 < len(alike) < 4 else ''


def library(name):
    """Return a module that does not come with Python; say what to type if it is not there."""
    import importlib
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise SchedulerError(
            f'{sys.executable} has no module {name}. Try: {sys.executable} -m pip install '
            f'docopt-ng PyYAML tqdm, or use uv, which finds them by itself: uv run {__file__} '
            '<command> …') from None


def sentence(text):
    """Return the text with the one mark that ends it: a full stop, unless it has one.

    The reason at its end may come from elsewhere, with a full stop or without.  A question keeps
    its mark, and a command to type, which stands last behind 'Try: ', gets none.
    """
    end = text.rstrip('. ')
    if end.endswith(('?', '!')):
        return end
    return text if 'Try: ' in text else f'{end}.'


def printable(text):
    """Return the text on one line, fit for a terminal: no control characters, no escapes."""
    if text.isprintable():
        return text
    text = text.replace('\\\n', ' ')
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def reason_of(error):
    """Return what the system said, as 'No space left on device', without numbers."""
    return error.strerror or str(error)


def complaint_line(text, index=0):
    """Return the most telling line of a program's complaint: the first, not rsync's summary."""
    lines = [line for line in text.splitlines() if line.strip()
             and not line.startswith('--link-dest arg does not exist')]     # that is usual
    return printable(lines[index].strip())[:300] if lines else ''


def count_of(number, noun):
    """Return '1 file', '2 files', '3 processes'."""
    return f'{number:,} {noun}' + ('' if number == 1 else 'es' if noun.endswith('s') else 's')


def names_of(names):
    """Return 'a', 'a, b' or 'a and 5 more': for a line on the screen."""
    return ', '.join(names) if len(names) < 4 else f'{names[0]} and {len(names) - 1} more'


def size_of(size):
    """Return a number of bytes as people read it: 512 bytes, 3.4 MB."""
    for unit in ('bytes', 'kB', 'MB', 'GB', 'TB'):
        if size < 1000 or unit == 'TB':
            return f'{size:.0f} {unit}' if unit == 'bytes' else f'{size:.1f} {unit}'
        size /= 1000


# ---- Records: frozen ----

USER = re.compile(r'[\w.+][\w.+@-]*')   # nothing that a shell reads: a ProxyCommand may have %r
JUMP = re.compile(rf'({USER.pattern}@)?([A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9a-fA-F:.]+\])(:[0-9]+)?')
# Two machines with the same host are different ones where these options differ.
LEADING_SSH_OPTIONS = ('hostname', 'user', 'proxyjump', 'proxycommand')


class Machine(NamedTuple):
    """A machine as its file or name describes it.  host is '' for localhost, which needs no ssh."""
    name: str                       # as the user wrote it, or `name:` of the file
    host: str = ''
    username: Optional[str] = None
    port: Optional[int] = None
    ssh_key_path: Optional[str] = None
    proxy_jump: Optional[str] = None
    ssh_options: tuple = ()         # pairs (name, value) of ssh_config(5)
    workdir: str = ''               # the folder of jobs there; ~/.ssh_scheduler by default
    setup: str = ''                 # bash, run once a connection; jobs have what it exports
    env: tuple = ()                 # pairs (name, value)
    gpus: Optional[tuple] = None    # the indices that may be used; None: all
    max_jobs: Optional[int] = None
    word: str = ''                  # of the command line; find_machine finds the machine by it

    @property
    def address(self):
        """The account, as the journal names it: user@host:port and the way there; or localhost."""
        user = f'{self.username}@' if self.username else ''
        port = f':{self.port}' if self.port else ''
        way = f' via {self.proxy_jump}' if self.proxy_jump else ''
        way += ''.join(f' {name}={value}' for name, value in self.ssh_options
                       if name.lower() in LEADING_SSH_OPTIONS)
        return f'{user}{self.host}{port}{way}' if self.host else 'localhost'

    @property
    def jump(self):
        """The value of ProxyJump in the machine's file, or ''."""
        return self.proxy_jump or next((value for name, value in self.ssh_options
                                        if name.lower() == 'proxyjump'), '')

    @property
    def hops(self):
        """The jump hosts, the first one first: (user, host, port); user and port may be ''.

        Empty where ssh jumps over none, or has to find out what is wrong with them.
        """
        matches = [JUMP.fullmatch(part) for part in self.jump.split(',')]
        if not all(matches) or self.jump.lower() == 'none':
            return []
        return [((match[1] or '')[:-1], match[2], (match[3] or '')[1:]) for match in matches]


class Gpu(NamedTuple):
    """One GPU as a probe found it.  utilization is the share of its time that is used, 0 to 1."""
    index: int                      # nvidia-smi's, which is the order of the PCI bus
    memory_mb: int                  # free
    utilization: float = 0.0
    total_memory_mb: int = 0
    uuid: str = ''
    name: str = ''
    others: int = 0                 # processes on it that are not of this batch
    users: tuple = ()               # the owners of those
    batch_jobs: int = 0             # jobs of other batches that were placed on it
    reserved: bool = False          # one of those jobs has the GPU to itself
    exclusive: bool = False         # it takes one process only (compute mode Exclusive_Process)
    unified: bool = False           # its memory is the machine's


class Capacity(NamedTuple):
    """A machine's resources: in all, and free if no job of this batch ran there.

    Each probe adds to what is free what our jobs were seen to use, up to what they asked for, and
    subtracts what other batches need; MachineResources subtracts what it promised to our jobs.  So
    room in the books is room in the latest probe, and nothing is counted twice.
    """
    cores: float
    memory_mb: int
    gpus: tuple = ()
    total_cores: float = 0.0
    total_memory_mb: int = 0
    max_jobs: Optional[int] = None
    gpu_trouble: str = ''           # why no GPU is known; '' where any is
    lost_gpus: str = ''             # why further GPUs cannot be used
    batch_jobs: int = 0             # jobs of other batches on the machine
    reserved: bool = False          # one of those jobs has the machine to itself
    limits: tuple = ()              # of all batches together, as the request "limits" has them


class Allocation(NamedTuple):
    """The resources that a job asks for."""
    cores: float = 1.0
    memory_mb: int = 2000
    reserve: bool = False           # the machine to itself
    gpus: int = 1
    gpu_memory_mb: int = 1000
    gpu_utilization: float = 0.75   # a share of one GPU's time
    reserve_gpu: bool = True


class Placement(NamedTuple):
    """The resources that a job got, a token to be given back once.  gpus: their indices."""
    number: int
    allocation: Allocation
    gpus: tuple

    @property
    def visible_gpus(self):
        """The value of CUDA_VISIBLE_DEVICES, or None where it is not set."""
        if self.allocation.reserve or not self.gpus:
            return None
        return ','.join(map(str, self.gpus))


class Forwards(NamedTuple):
    """The files that a job gets: paths relative to the current folder, patterns as in rsync."""
    copy: tuple = ('.',)
    link: tuple = ()
    exclude: tuple = ()


class Job(NamedTuple):
    """One line of a batch.

    backwards: the paths to bring back; None: all that the job made or changed
    own: the options for files and hardware of a line that is an execute_remote command, as text
    """
    name: str
    command: str
    line: int
    allocation: Allocation
    forwards: Optional[Forwards]    # None: the line is gone, and the job is only collected
    backwards: Optional[tuple] = None
    own: str = ''

    @property
    def may_start(self):
        """Tell whether it may be started; else an earlier run has, and it is only collected."""
        return self.forwards is not None


class JobResult(NamedTuple):
    """How a job ended, and the resources that it used; None is unknown, a peak the most seen."""
    name: str
    machine: str
    exit_code: int
    wall_s: float
    gpus: Optional[str] = None
    cpu_s: Optional[float] = None
    peak_memory_mb: Optional[int] = None
    peak_gpu_memory_mb: Optional[int] = None


# ---- Life: how far each job is; the journal has it first ----

class State(NamedTuple):
    """One state of an attempt."""
    then: tuple                     # the states that may follow
    written: str = ''               # the journal's event of it, before anybody hears of it
    holds: bool = False             # the attempt holds its room on the machine


# A machine may say any of these, at any time, of an attempt that it was sent.
SAID_OF_FAILURE = ('refused', 'held', 'absent', 'lost')

LIFE = {
    'waiting':    State(('placed',)),           # inside Run.start only: who waits has no Attempt
    'placed':     State(('claimed', 'returned'), holds=True),   # its files are on their way
    'claimed':    State(('running', 'ended', 'stopping', 'abandoned', *SAID_OF_FAILURE), 'claimed',
                        holds=True),
    'running':    State(('ended', 'stopping', 'abandoned', *SAID_OF_FAILURE), holds=True),
    'ended':      State(('collected', 'kept'), 'ended'),        # its exit status is known
    'collected':  State((), 'collected'),       # its results lie in job_results
    'incomplete': State(('collected', 'unfetched')),    # it was collected but for some paths
    'unfetched':  State(()),                    # those paths stay on the machine
    'kept':       State(('cancelled', 'dropped')),      # its results stay there for the next run

    'returned':   State(()),                    # its start was never sent
    'refused':    State(('cancelled',), 'lost'),        # the machine could not start it
    'held':       State(('cancelled',), 'lost'),        # another batch took its room first
    'absent':     State(('cancelled',), 'lost'),        # its start never arrived, for certain
    'lost':       State(('cancelled',), 'lost'),        # it is gone, for certain, without a result
    'abandoned':  State((), 'lost'),            # there was no contact for too long (--lost-after)

    'stopping':   State(('stopped', 'dropped', *SAID_OF_FAILURE), holds=True),      # told to end
    'stopped':    State(('cancelled', 'dropped', 'kept')),      # it has ended, since it was told to
    'cancelled':  State((), 'cancelled'),       # what it left is set aside
    'dropped':    State((), 'cancelled'),       # told to end, and nobody waits: it may run on
}
UNSEEN = ('claimed', 'running')     # it runs, as far as is known, and nobody has told it to end
ALIVE = (*UNSEEN, 'stopping')       # at contact its machine is asked about it
UNCOLLECTED = (*ALIVE, 'ended', 'stopped')     # its results may still come
ARRIVING = ('ended', 'stopped', 'incomplete')       # its results are on their way
HOLDING = tuple(word for word, state in LIFE.items() if state.holds)
AWAITED = (*HOLDING, *ARRIVING)     # something is still to come of it
FORGOTTEN = ('collected', 'unfetched', 'returned', 'refused', 'held', 'absent', 'lost',
             'abandoned')


class Stream:
    """One output of an attempt, stdout or stderr: its first `here` bytes have arrived.

    Whoever brings bytes (a look, a follower, the event of the end, a copy) says from which byte on;
    bytes that arrived before are passed over.  So it does not matter who comes first.

    store: a function that adds bytes to job_results and tells whether it could, or None
    show: a function that is called with the bytes as they come, or None
    """

    def __init__(self, store=None, show=None):
        self.here = 0
        self.size = None                    # of the whole stream, once the job has ended
        self.content = None                 # the whole stream, if it came with the end
        self.stored = True                  # all that is here was stored, too
        self._store, self._show = store, show

    @property
    def shown(self):
        """Tell whether its bytes are passed on as they come."""
        return self._show is not None

    @property
    def whole(self):
        """Tell whether all of it is here."""
        return self.content is not None or self.here == self.size

    def bring(self, offset, data):
        """Take the bytes from `offset` on, as far as they are new."""
        new = data[self.here - offset:] if offset <= self.here else b''
        if not new:
            return
        if self.stored and self._store:
            self.stored = self._store(new)
        if self._show:
            self.here += len(new)
            self._show(new)
        elif self.stored:
            self.here += len(new)
        else:
            self.stored = True              # these bytes are brought again

    def complete(self, content, size):
        """Note the size, once the job has ended; content: all bytes, None if they come apart."""
        self.content, self.size = content, size
        if content is not None:
            self.show_rest([content[self.here:]])

    def show_rest(self, pieces):
        """Pass on the bytes that had not come, which are stored already."""
        for data in pieces if self._show else ():
            self.here += len(data)
            self._show(data)


class How(NamedTuple):
    """How an attempt is run, beside its command."""
    mode: str = ''                  # stdin: its input is what comes from `source`; tty: a terminal
    source: Optional[int] = None    # a file descriptor of this process
    timeout_s: Optional[float] = None
    keep: bool = True               # its streams are put into job_results
    show: Optional[object] = None   # called with ('out' or 'err', bytes) as they come


class Attempt:
    """One start of a job on a machine: the only record of how far it is.  See LIFE."""

    def __init__(self, job, machine, key, record, how=None):
        self.job, self.machine, self.how = job, machine, how or How()
        self.key = key                      # the name of its folder there
        self.record = record                # of its claim, as the journal has it or will have it
        self.state, self.why = 'waiting', ''
        self.placement = None               # what it holds, of MachineResources
        self.stage = None                   # its files; None if an earlier run has started it
        self.streams = {}                   # 'out', 'err' -> Stream
        self.peaks_mb = [None, None]        # the memory that was seen in use, and that of its GPUs
        self.result = None                  # a JobResult, once it has ended
        self.leavings = None                # Leavings: what it left there, once that is known

    @property
    def name(self):
        """The name of the job, and of its results."""
        return self.job.name

    @property
    def gpus(self):
        """The value of CUDA_VISIBLE_DEVICES, or None."""
        return self.record.get('gpus')

    @property
    def is_inherited(self):
        """Tell whether an earlier run has started it."""
        return self.stage is None

    @property
    def is_heard(self):
        """Tell whether all of its output is here."""
        return all(stream.whole for stream in self.streams.values())


class Lives:
    """All attempts of this run, by machine and state.

    Only `move` changes a state; `restore` sets the first one of an attempt of an earlier run.

    changed(attempt, before) is called after each change; before: the state that it was in.
    """

    def __init__(self, journal, changed):
        self._journal, self._changed = journal, changed
        self._attempts = collections.defaultdict(dict)        # (machine, state) -> {key: Attempt}

    def of(self, machine, *states):
        """Return the attempts on this machine that are in one of these states."""
        return [attempt for state in states
                for attempt in self._attempts.get((machine, state), {}).values()]

    def any_of(self, machine, *states):
        """Tell whether an attempt on this machine is in one of these states."""
        return any(self._attempts.get((machine, state)) for state in states)

    def all_of(self, *states):
        """Return the attempts on all machines that are in one of these states."""
        return [attempt for (_, state), found in list(self._attempts.items()) if state in states
                for attempt in found.values()]

    def get(self, machine, key, *states):
        """Return the attempt with this key, if it is in one of these states there; else None."""
        for state in states:
            attempt = self._attempts.get((machine, state), {}).get(key)
            if attempt:
                return attempt
        return None

    def restore(self, attempt, state):
        """Take up an attempt of an earlier run, in the state that the journal has."""
        attempt.state = state
        self._attempts[attempt.machine, state][attempt.key] = attempt

    def rebind(self, attempt, machine):
        """The attempt is found by another name of the same account."""
        self._attempts[attempt.machine, attempt.state].pop(attempt.key)
        attempt.machine = machine
        self._attempts[machine, attempt.state][attempt.key] = attempt

    def move(self, attempt, state, why='', /, **facts):
        """Put the attempt into this state; the journal has it, with the facts, before anybody.

        The facts may have the names of the parameters, such as attempt=2.
        """
        before = attempt.state
        assert state in LIFE[before].then, f'{attempt.key}: {before} -> {state} [this is a bug]'
        if LIFE[state].written:
            self._journal.write(event=LIFE[state].written, job=attempt.name, **facts)
        self._attempts[attempt.machine, before].pop(attempt.key, None)
        if state not in FORGOTTEN:          # nobody asks for them
            self._attempts[attempt.machine, state][attempt.key] = attempt
        attempt.state, attempt.why = state, why
        self._changed(attempt, before)


class Journal:
    """The events of the jobs of a job_results: a JSON object a line.  Each event is written before
    anything follows from it.

    jobs: name of a job -> its record, a dict: command, machine, attempt, key, state, …
    identity: 8 random hex digits of this journal, which its first line tells.  The folder of a job
    on a machine has them in its name.  So a job that another journal started, such as that of a
    job_results which was removed, is never taken for a job of this one.
    """

    def __init__(self, path):
        self.path = path
        self.jobs = {}
        self.identity, self._noted_identity = '', False
        self._remains = {}              # machine -> {key: state} of which folders are there
        self._fd = None
        self._unsynced = False

    # Reading and writing it

    def open(self):
        """Read what earlier runs did, and be ready to add to it.  Raises OSError."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._read()
        self._noted_identity = bool(self.identity)
        self.identity = self.identity or os.urandom(4).hex()

    def peek(self):
        """Only read what earlier runs did; another run may use the folder.  Raises OSError."""
        self._fd = os.open(self.path, os.O_RDONLY)
        try:
            self._read(cut=False)
        finally:
            self.close()

    def close(self):
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    @property
    def is_empty(self):
        """Tell whether the open journal has no line."""
        return self._fd is not None and not os.fstat(self._fd).st_size

    def write(self, **event):
        """Add an event.  Before an act that cannot be undone the caller waits for `sync`, too."""
        self.check()
        event['time'] = round(time.time(), 2)
        line = json.dumps(event).encode() + b'\n'
        if not self._noted_identity:
            first = {'event': 'journal', 'identity': self.identity}
            line = json.dumps(first).encode() + b'\n' + line
        try:
            written = os.write(self._fd, line)
            if written < len(line):     # the disk is full; what follows must not be glued to it
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self.unwritable(error) from None
        self._noted_identity = self._unsynced = True
        self._apply(event)

    def sync(self, results=False):
        """Have all events on the disk, even if the power fails; with results: the results, too.

        A start, and the removal of results from a machine, cannot be taken back: they wait for it.
        """
        try:
            if results:
                sync_file_system(self._fd)
            elif self._unsynced:
                os.fsync(self._fd)
        except OSError as error:
            raise self.unwritable(error) from None
        self._unsynced = False

    def check(self):
        """Raise if the file is not in its place any more: then nobody would find what follows."""
        try:
            in_place = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            in_place = False
        if not in_place:
            folder = self.path.partition('/.ssh_scheduler/')[0]
            raise ResultsError(f'{folder} was removed or moved away while it was in use. Jobs '
                               'that run keep running: move it back, and the same command collects '
                               'them. If it is gone: execute_batch --earlier=show --machines …')

    def unwritable(self, error):
        """Return the exception that says so."""
        return ResultsError(f'{self.path} cannot be written: {reason_of(error)}. Jobs that run go '
                            'on; the same command collects them.')

    def _read(self, cut=True):
        """Learn what earlier runs did.  A last line without an end was never acted upon: cut it."""
        with open(self._fd, 'rb', closefd=False) as file:
            whole = 0
            for number, line in enumerate(file, 1):
                if not line.endswith(b'\n'):
                    break
                try:
                    self._apply(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ResultsError(
                        f'{self.path}, line {number} cannot be read. It says what runs where: look '
                        'at it, or move job_results away to start afresh.') from None
                whole += len(line)
        if cut:
            os.ftruncate(self._fd, whole)
        for record in self.jobs.values():
            record['resumed'] = record['state'] != 'collected'

    def _apply(self, event):
        """Have the records tell what the event says."""
        if event['event'] == 'journal':
            self.identity = event['identity']
        elif event['event'] == 'claimed':
            if not {'command', 'machine', 'attempt'} <= event.keys():
                raise KeyError(event)
            former = self.jobs.get(event['job'], {})
            if former.get('kept'):      # its results were deleted here, so these may go, too
                self._remains.setdefault(former['machine'], {})[former['key']] = 'collected'
            self.jobs[event['job']] = {
                'key': self.key(event['job'], event['attempt']), **event, 'state': 'claimed',
                'resumed': former.get('resumed')}       # its streams here are an earlier run's
        elif event['event'] == 'tidied':
            self._remains.pop(event['machine'], None)
        elif event['event'] == 'committing':
            self.jobs[event['job']].update(inode=event['inode'], kept=event['kept'])
        else:
            record = self.jobs[event['job']]
            record['state'], record['kept'] = event['event'], event.get('kept')
            if event['event'] == 'ended':
                record['exit_code'] = event['exit_code']
            elif not event.get('kept'):
                self._remains.setdefault(record['machine'], {})[record['key']] = event['event']

    # Questions

    def record(self, name):
        """Return the record of a job; an empty dict if it was never claimed."""
        return self.jobs.get(name, {})

    def is_begun(self, name):
        """Tell whether the job was claimed, and neither collected nor given up."""
        return self.record(name).get('state') in ('claimed', 'ended')

    def key(self, name, attempt):
        """Return the name of the job's folder on a machine, for an attempt that is to be claimed.

        Attempts that a journal claimed before it had an identity have keys without one.
        """
        return f'{name}.{attempt}-{self.identity}' if self.identity else f'{name}.{attempt}'

    def new_attempt(self, job, worker, how, gpus, **noted):
        """Return the next Attempt of a job on a machine.

        gpus: the value of CUDA_VISIBLE_DEVICES, or None; noted: more that its record has
        """
        number = self.record(job.name).get('attempt', 0) + 1
        record = {'attempt': number, 'machine': worker.machine.address, 'gpus': gpus,
                  'command': job.command, 'where': worker.machine.word or worker.name, **noted}
        return Attempt(job, worker, self.key(job.name, number), record, how)

    def may_have_streams(self, name):
        """Tell whether an earlier attempt, or a run before, may have written the job's streams."""
        record = self.record(name)
        return record.get('attempt', 1) > 1 or bool(record.get('resumed'))

    def remains(self, machine):
        """Return (keys, keys) of folders that may lie on the machine and are of no use any more:

        those of collected jobs, and those of jobs that may even run (lost, cancelled).
        """
        found = self._remains.get(machine, {})
        return ([key for key, state in found.items() if state == 'collected'],
                [key for key, state in found.items() if state != 'collected'])

    def tidied(self, machine):
        """Note that no such folder lies on the machine any more."""
        if self._remains.get(machine):
            self.write(event='tidied', machine=machine)


def sync_file_system(fd):
    """Write to the disk what lies in the file system of this file: one call for many files."""
    syncfs = getattr(c_library(), 'syncfs', None)
    if syncfs is None:              # only Linux has it
        os.sync()
    elif syncfs(fd):
        import ctypes
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def c_library():
    """Return the C library, or None where this Python cannot call it."""
    try:
        import ctypes
        return ctypes.CDLL(None, use_errno=True)
    except (ImportError, OSError):
        return None


# ---- Resources: what a machine has left ----

CORES_OVERLOAD = 1.5        # processor time may be promised this many times ("a small overload")
GPU_OVERLOAD = 1.2          # and so may a GPU's; memory never
NO_ROOM = -math.inf


def thousandths(value):
    """Return the value in thousandths, as a whole number, which adds and subtracts exactly."""
    return round(value * 1000)


class GpuUse:
    """The promises on one GPU: a mutable tally of MachineResources."""
    __slots__ = ('jobs', 'memory_mb', 'time', 'reserved')

    def __init__(self):
        self.jobs = self.memory_mb = self.time = self.reserved = 0     # time in thousandths


class MachineResources:
    """The books of one machine: they alone know what is free there, and what is promised.

    available_resources: a Capacity, or anything with its fields.
    score(allocation)       how well it fits: a float, more is better; -inf where it does not fit
    allocate(allocation)    takes it and returns a Placement; raises DoesNotFit where it does not
    deallocate(placement)   gives back what allocate gave; each placement once
    update(available_resources)     the machine has more or less now; what is taken stays taken

    Memory of the machine and of its GPUs is never promised beyond what was free.  Processor time
    may be promised CORES_OVERLOAD times, a GPU's GPU_OVERLOAD times.  So that work always goes on,
    a machine on which none of our jobs runs takes one, however busy its processors are.
    """

    def __init__(self, available_resources):
        self._placements = {}
        self._number = 0
        self._cores = 0                             # thousandths that are promised
        self._memory_mb = 0                         # promised, apart from memory of GPUs
        self._reserved = 0                          # placements that have the machine to themselves
        self._gpus = collections.defaultdict(GpuUse)        # by index
        self.update(available_resources)

    def update(self, available_resources):
        """Note the machine's new Capacity; what is taken stays taken."""
        self.available = have = as_record(Capacity, available_resources)._replace(
            gpus=tuple(as_record(Gpu, gpu) for gpu in available_resources.gpus))
        self._total_cores = max(have.total_cores, have.cores)
        self._cores_limit = thousandths(have.cores * CORES_OVERLOAD)
        self._unified = frozenset(gpu.index for gpu in have.gpus if gpu.unified)
        self._others = any(gpu.others for gpu in have.gpus)

    @property
    def jobs(self):
        """The number of placements that were not given back yet."""
        return len(self._placements)

    def score(self, allocation):
        """Return the share that stays free of the resource that gets scarcest.

        A machine with GPUs scores less for a job without, so that GPUs last for others.  It scores
        least of all where the job would get a GPU that somebody else uses, too.
        """
        if self.short_of(allocation):
            return NO_ROOM
        have = self.available
        score = min(
            1 - (self._memory_mb + allocation.memory_mb) / max(have.memory_mb, 1),
            1 - (self._cores + 1000 * allocation.cores) /
            max(self._cores_limit, 1000 * self._total_cores, 1))
        if allocation.gpus:
            used = sum(1 for use in self._gpus.values() if use.jobs)
            score = min(score, 1 - (used + allocation.gpus) / len(have.gpus))
            if self._others and any(gpu.others for gpu in self._gpus_for(allocation)):
                score -= 2
        elif have.gpus:
            score -= 1
        return score

    def allocate(self, allocation):
        """Take the resources of the allocation and return the Placement."""
        why = self.why_not(allocation)
        if why:
            raise DoesNotFit(f'the machine {why}')
        return self.take(allocation, tuple(sorted(
            gpu.index for gpu in self._gpus_for(allocation))))

    def take(self, allocation, gpus):
        """Take the resources of a job that runs there, on these GPUs, whether they fit or not."""
        self._number += 1
        placement = Placement(self._number, allocation, gpus)
        self._placements[self._number] = placement
        self._count(placement, 1)
        return placement

    def deallocate(self, placement):
        """Give back a placement of allocate or take."""
        if self._placements.get(placement.number) != placement:
            raise ValueError(f'{placement} is not allocated here [this is a bug]')
        del self._placements[placement.number]
        self._count(placement, -1)

    def _count(self, placement, sign):
        wanted = placement.allocation
        self._cores += sign * thousandths(wanted.cores)
        self._memory_mb += sign * wanted.memory_mb
        self._reserved += sign * wanted.reserve
        for index in placement.gpus:
            use = self._gpus[index]
            use.jobs += sign
            use.memory_mb += sign * wanted.gpu_memory_mb
            use.time += sign * thousandths(wanted.gpu_utilization)
            use.reserved += sign * wanted.reserve_gpu

    def short_of(self, allocation):
        """Return the word for what is short: jobs, machine, memory, cores, gpu; '' if it fits."""
        have, jobs = self.available, len(self._placements)
        if have.max_jobs is not None and jobs >= have.max_jobs:
            return 'jobs'
        if have.reserved or self._reserved or (allocation.reserve and (jobs or have.batch_jobs)):
            return 'machine'
        if allocation.memory_mb > have.memory_mb - self._taken_mb():
            return 'memory'
        if allocation.cores > self._total_cores or (
                jobs and self._cores + thousandths(allocation.cores) > self._cores_limit):
            return 'cores'
        if allocation.gpus and not self._gpus_for(allocation):
            return 'gpu'
        return ''

    def _taken_mb(self):
        """Return how much memory of the machine is promised, that of unified GPUs included."""
        if not self._unified:
            return self._memory_mb
        return self._memory_mb + sum(self._gpus[index].memory_mb for index in self._unified)

    def _gpus_for(self, allocation):
        """Return the best GPUs for the allocation; none where too few have room."""
        fitting = []
        for gpu in self.available.gpus:
            use = self._gpus[gpu.index]
            alone = allocation.reserve_gpu or gpu.exclusive
            if (gpu.reserved or use.reserved or (alone and (use.jobs or gpu.batch_jobs))
                    or (gpu.exclusive and gpu.others)):
                continue
            left_mb = gpu.memory_mb - use.memory_mb
            left = thousandths((1 - gpu.utilization) * GPU_OVERLOAD) - use.time
            if left_mb >= allocation.gpu_memory_mb and (
                    left >= thousandths(allocation.gpu_utilization)):
                fitting.append((gpu.others > 0, use.jobs, -left, -left_mb, gpu.index, gpu))
        if len(fitting) < allocation.gpus:
            return []
        chosen = [gpu for *_, gpu in sorted(fitting)[:allocation.gpus]]
        if self._unified:       # the memory of those is the machine's
            shared = sum(gpu.unified for gpu in chosen) * allocation.gpu_memory_mb
            if shared + allocation.memory_mb > self.available.memory_mb - self._taken_mb():
                return []
        return chosen

    # In words

    def why_not(self, allocation):
        """Return why the allocation does not fit now, as 'has … free'; '' if it fits."""
        have, short = self.available, self.short_of(allocation)
        if short == 'jobs':
            return f'has its {have.max_jobs} jobs'
        if short == 'machine':
            return 'is in use, and was to be reserved'
        if short == 'memory':
            return f'has {max(have.memory_mb - self._taken_mb(), 0)} MB of memory free'
        if short == 'cores':
            return (f'has {max(have.cores - self._cores / 1000, 0):.1f} of '
                    f'{self._total_cores:g} cores free')
        if short == 'gpu':
            return have.gpu_trouble or ' and '.join(filter(None, (
                have.lost_gpus, self._gpu_shortage(allocation))))
        return ''

    def _gpu_shortage(self, allocation):
        gpus = self.available.gpus
        if len(gpus) < allocation.gpus:
            return f'has {count_of(len(gpus), "GPU")}' if gpus else 'has no GPU'
        states = [f'GPU {gpu.index} has {max(gpu.memory_mb - self._gpus[gpu.index].memory_mb, 0)} '
                  f'MB and {1 - gpu.utilization:.0%} of its time free' for gpu in gpus]
        return f'has too little GPU ({"; ".join(states)})'

    def holder(self, allocation):
        """Return who holds what is short, as 'has 2 in use by others, holds 1 of ours'."""
        have, short = self.available, self.short_of(allocation)
        ours = f'holds {self.jobs} of ours'
        if short == 'gpu':
            if len(have.gpus) < allocation.gpus:
                return self.why_not(allocation)
            held = sum(1 for gpu in have.gpus if self._gpus[gpu.index].jobs)
            others = sum(1 for gpu in have.gpus if not self._gpus[gpu.index].jobs and (
                gpu.others or gpu.batch_jobs or gpu.utilization or gpu.memory_mb <
                min(gpu.total_memory_mb, allocation.gpu_memory_mb)))
            parts = [f'has {others} in use by others'] if others else []
            parts += [f'holds {held} of ours'] if held else []
            return ', '.join(parts) or self.why_not(allocation)
        if short == 'machine' and not self.jobs:
            return 'is in use by another batch'
        if short in ('jobs', 'machine'):
            return ours
        return self.why_not(allocation) + (f', {ours}' if short and self.jobs else '')


def as_record(kind, value):
    """Return the value, or a record of this kind with those of its fields that the value has."""
    return value if isinstance(value, kind) else kind(**{
        name: getattr(value, name) for name in kind._fields if hasattr(value, name)})


def idle(capacity):
    """Return the Capacity that the machine would have if nobody used it.

    It decides which jobs are impossible there: what is free does not, since others may go.
    The driver keeps a part of a GPU's memory; where no more than 10 % is taken, all the rest is
    free for jobs.
    """
    gpus = tuple(gpu._replace(
        memory_mb=gpu.memory_mb if gpu.memory_mb > 0.9 * gpu.total_memory_mb else
        gpu.total_memory_mb, utilization=0.0, others=0, batch_jobs=0, reserved=False)
        for gpu in capacity.gpus)
    return capacity._replace(
        cores=max(capacity.total_cores, capacity.cores),
        memory_mb=max(capacity.total_memory_mb, capacity.memory_mb), gpus=gpus,
        batch_jobs=0, reserved=False)


def room_for(capacity, allocation):
    """Return (how many such jobs fit at a time, the GPU or GPUs of each)."""
    own, gpus, count = MachineResources(capacity), [], 0
    while count < 10000 and not own.short_of(allocation):
        indices = own.allocate(allocation).gpus
        if allocation.gpus == 1:
            gpus += indices
        elif indices:
            gpus.append(list(indices))
        count += 1
    return count, gpus


def describe(allocation):
    """Return the allocation in words: '1 core and 2000 MB of memory and a GPU of its own …'."""
    cores = f'{allocation.cores:g} core' + ('' if allocation.cores == 1 else 's')
    text = f'{cores} and {allocation.memory_mb} MB of memory'
    if allocation.gpus:
        text += (f' and {describe_gpu(allocation)} and {allocation.gpu_utilization:.0%} of its '
                 'time free')
    return text + (' on a machine of its own' if allocation.reserve else '')


def describe_gpu(allocation):
    """Return the GPUs of an allocation in words, without their time: 'a GPU of its own with …'."""
    if allocation.gpus == 1:
        text = 'a GPU of its own' if allocation.reserve_gpu else 'a share of a GPU'
    else:
        text = f'{allocation.gpus} GPUs' + (' of its own, each' if allocation.reserve_gpu else
                                            ', a share of each,')
    return f'{text} with {allocation.gpu_memory_mb} MB'


# ---- Scheduler: what waits, and where there is room; starts nothing ----

PATIENCE = 20               # later jobs that may start before a job that waits for its room


def gpus_of(text):
    """Return the GPUs' indices of a value of CUDA_VISIBLE_DEVICES, or of None."""
    return tuple(map(int, re.findall('[0-9]+', text or '')))


class Hold(NamedTuple):
    """A machine that is kept for a job: others start there only beside it."""
    allocation: Allocation          # what the job needs
    machine: object
    after: MachineResources         # the machine with that job, once what runs there now has ended
    beside: dict                    # number of a Placement -> its Placement in `after`


class Scheduler:
    """Owns what waits and what is free.  Machines are any hashable things.

    Jobs start in the order of their lines, but a job that finds room passes those that do not: no
    machine idles while a waiting job fits it.  A job that was passed PATIENCE times gets a machine
    on which it fits held: from then on only what fits beside it starts there.

    Jobs that need the same wait in one queue.  For each such kind there is a heap of the machines
    by score.  Its entries may be too good, as scores fall with each job that is placed, and are
    looked at again when they come up; where a score may have risen, the entry is replaced by one
    that is better than any.  So placing a job costs about log(machines), however many wait.
    """

    def __init__(self):
        self.resources = {}         # machine -> MachineResources, in the user's order
        self._places = {}           # machine -> its place in that order: ties break by it
        self._versions = {}         # machine -> how often its scores may have risen
        self._waiting = {}          # Allocation -> deque of jobs, in the order of their lines
        self._heaps = {}            # Allocation -> heap of (-score, place, version, machine)
        self._passed = collections.Counter()        # Allocation -> starts of later jobs
        self._hold = None

    # Machines

    def add_machine(self, machine, place, capacity):
        """Use this machine, too."""
        self._places[machine], self._versions[machine] = place, 0
        self.resources[machine] = MachineResources(capacity)
        self.resources = {m: self.resources[m] for m in sorted(
            self.resources, key=self._places.get)}
        self._risen(machine)

    def remove_machine(self, machine):
        """Place nothing there from now on."""
        self.resources.pop(machine, None)
        self._versions.pop(machine, None)
        if self._hold and self._hold.machine == machine:
            self._hold = None

    def update(self, machine, capacity):
        """Note that the machine has more or less free than before."""
        if machine not in self.resources:
            return
        self.resources[machine].update(capacity)
        self._risen(machine)
        if self._hold and self._hold.machine == machine:
            self._hold.after.update(capacity)
            if MachineResources(capacity).short_of(self._hold.allocation):
                self._hold = None

    def give_back(self, machine, placement):
        """Give back the room of a job on a machine."""
        if machine not in self.resources:
            return
        self.resources[machine].deallocate(placement)
        self._risen(machine)
        if self._hold and self._hold.machine == machine:
            beside = self._hold.beside.pop(placement.number, None)
            if beside:
                self._hold.after.deallocate(beside)

    def _risen(self, machine):
        self._versions[machine] += 1
        entry = (-math.inf, self._places[machine], self._versions[machine], machine)
        for allocation, heap in self._heaps.items():
            heapq.heappush(heap, entry)
            if len(heap) > 4 * len(self.resources) + 100:       # most are out of date
                self._heaps[allocation] = self._new_heap()

    def _new_heap(self):
        heap = [(-math.inf, self._places[machine], self._versions[machine], machine)
                for machine in self.resources]
        heapq.heapify(heap)
        return heap

    # Jobs

    def add(self, job, first=False):
        """Have the job wait behind its kind; first: at the place of its line."""
        queue = self._waiting.setdefault(job.allocation, collections.deque())
        place = 0 if first else len(queue)
        while place < len(queue) and queue[place].line < job.line:
            place += 1
        queue.insert(place, job)
        if job.allocation not in self._heaps:
            self._heaps[job.allocation] = self._new_heap()

    @property
    def waits(self):
        """How many jobs wait."""
        return sum(map(len, self._waiting.values()))

    def kinds(self):
        """Return {Allocation: the jobs that wait for it}, the first line first."""
        return dict(sorted(((allocation, tuple(queue)) for allocation, queue
                            in self._waiting.items()), key=lambda item: item[1][0].line))

    def choose(self):
        """Take and place each job for which there is room; yield (job, machine, Placement)."""
        held, begun = self._hold, False
        while not begun or (held and self._hold is not held):   # what was held back may start now
            held, begun = self._hold, True
            yield from self._choose()

    def _choose(self):
        kinds = [(queue[0].line, number, allocation, queue) for number, (allocation, queue)
                 in enumerate(self._waiting.items())]
        heapq.heapify(kinds)
        blocked = []
        while kinds:
            _, number, allocation, queue = kinds[0]
            machine = self._best(allocation)
            if machine is None:
                blocked.append(heapq.heappop(kinds)[2])
                continue
            job = queue.popleft()
            placement = self.resources[machine].allocate(allocation)
            self._passed.pop(allocation, None)
            if self._hold and allocation == self._hold.allocation:
                self._hold = None
            elif self._hold and machine == self._hold.machine:
                self._hold.beside[placement.number] = self._hold.after.allocate(allocation)
            if queue:
                heapq.heapreplace(kinds, (queue[0].line, number, allocation, queue))
            else:
                heapq.heappop(kinds)
                del self._waiting[allocation], self._heaps[allocation]
            for other in blocked:
                self._pass(other)
            yield job, machine, placement

    def _best(self, allocation):
        """Return the machine that has the best score, None where none has room."""
        heap, aside, best = self._heaps[allocation], [], None
        while heap:
            bound, place, version, machine = heap[0]
            if version != self._versions.get(machine):
                heapq.heappop(heap)
                continue
            score = self.resources[machine].score(allocation)
            if score == NO_ROOM:
                heapq.heappop(heap)
            elif -score > bound:
                heapq.heapreplace(heap, (-score, place, version, machine))
            elif self.keeps_from(machine, allocation):
                aside.append(heapq.heappop(heap))
            else:
                best = machine
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return best

    def keeps_from(self, machine, allocation):
        """Tell whether the machine is kept for a job that this allocation would delay."""
        hold = self._hold
        return bool(hold and machine == hold.machine and allocation != hold.allocation
                    and hold.after.short_of(allocation))

    def _pass(self, allocation):
        """A later job starts while the first of this kind waits."""
        self._passed[allocation] += 1
        if self._passed[allocation] % PATIENCE or self._hold:
            return
        for machine, own in sorted(self.resources.items(), key=lambda item: item[1].jobs):
            after = MachineResources(own.available)
            if not after.short_of(allocation):
                after.allocate(allocation)
                self._hold = Hold(allocation, machine, after, {})
                return


# ---- Run: the loop ----

LATECOMER_S = 2.0           # the first machine that answers waits this long for the others
INTERRUPT_S = 10.0          # for jobs to end that were told to
LAST_WORDS_S = 5.0          # for the output of jobs that were told to end
LIVE_S = 5.0                # between two looks at a machine while jobs wait
REFRESH_S = 2.0             # between two looks at what running jobs write and use
CALM_S = 30.0               # between two looks while none waits, to see what GPU jobs use
ASIDE_S, LONGEST_ASIDE_S = 30.0, 1800.0     # a machine that failed gets no jobs; it doubles
TROUBLES = 3                # jobs lost in a row after which a machine gets no more for a while
PATIENT_TROUBLES = 6        # after this many, half an hour, nobody waits for that machine alone


class Policy(NamedTuple):
    """The differences between the commands that run jobs."""
    probes: bool = True             # the machines are asked what they have free
    want_gpus: bool = False         # also of their GPUs
    asks_late: bool = False         # jobs of an earlier run are asked about after Run.open only
    patient: bool = False           # a machine that cannot be reached is tried again later
    forwards: Optional[Forwards] = None     # files that most jobs get: sent before there is room
    retries: int = 1                # starts again of a job that its machine has lost
    halt_after: Optional[int] = None        # failed jobs after which no more are started
    lost_after_s: Optional[float] = None    # without contact, until jobs are started elsewhere
    timeout_s: Optional[float] = None       # of each job; the machine ends it then
    machine_timeout_s: Optional[float] = None       # of each machine, from its login to its end
    at_once: Optional[int] = None   # machines that are in use at a time; None: all
    tied: bool = False              # the jobs end when we do
    interval_s: Optional[float] = None      # between two looks while jobs wait; None: LIVE_S
    wants_others: bool = False      # machines tell of jobs that other journals claimed
    how: How = How()
    noted: Optional[dict] = None    # what the journal has of each claim besides


class Standing:
    """How one machine stands in a Run, beside its contact."""

    def __init__(self):
        self.first = None           # its Capacity when it came
        self.troubles = 0           # jobs, or logins, that it failed in a row
        self.freed = False          # a job ended there, and none was placed since
        # (word, what) of its own job, whose Attempt is forgotten by then; see Fleet.note_outcome.
        self.outcome = None


class Fleet:
    """The machines of a run: when they are logged in to, which get jobs, which are tried again.

    bound: {worker: the Job that is its own}
    """

    def __init__(self, run, workers, bound):
        self.workers, self.bound = workers, bound
        self.standing = {worker: Standing() for worker in workers}
        self._run, self._client, self._view, self._policy = run, run.client, run.view, run.policy
        self._lives, self._scheduler = run.lives, run.scheduler
        for worker in workers:
            worker.run = run

    # Logging in

    def log_in(self):
        """Begin with as many machines as may be in use at a time."""
        at_once = self._policy.at_once or len(self.workers)
        used = sum(worker.state != 'new' and self.works(worker) for worker in self.workers)
        fresh = [worker for worker in self.workers if worker.state == 'new']
        fresh = fresh[:max(at_once - used, 0)]
        for worker in fresh:
            worker.connect(self._policy.want_gpus, self._policy.tied)
            if self._policy.machine_timeout_s is not None:
                self._client.processes.call_later(
                    self._policy.machine_timeout_s, functools.partial(self._too_late, worker))
        for worker in fresh:                # while the logins are under way
            self._begin(worker)
            if self._policy.probes:
                worker.probe()
            else:
                worker.enter()

    def _begin(self, worker):
        """Hand over what a machine can have before it answers."""
        if worker in self.bound:
            self._begin_bound(worker, self.bound[worker])
        elif self._policy.forwards and self._run.waits_with_files():
            worker.offer(self._policy.forwards)

    def _begin_bound(self, worker, job):
        if self._lives.any_of(worker, *UNSEEN):
            return
        if self._policy.probes:
            self._scheduler.add(job)
            worker.offer(job.forwards)
        else:
            self._run.start(job, worker)

    def meet(self):
        """Log in, and wait until each machine answered or failed; latecomers are not waited for."""
        self.log_in()
        waited, late = False, []
        while not self._run.interrupts and self.count('connecting') and not (
                late and self.count('ready')):
            if self.count('ready') and not waited:
                waited = True
                self._client.processes.call_later(LATECOMER_S, functools.partial(late.append, True))
            self._client.processes.wait()
        if self._run.interrupts:
            self._view.unanswered()
            raise KeyboardInterrupt
        if not self.count('ready'):
            raise SchedulerError('no machine can be used.')

    def let_go(self):
        """Close the machines of which nothing more is wanted."""
        for worker in self.bound:
            if worker.state in ('connecting', 'ready', 'away') and not self.works(worker):
                self._view.parted(worker)
                worker.close()

    # Questions

    def count(self, state):
        """Return how many machines are in this state."""
        return sum(1 for worker in self.workers if worker.state == state)

    def by_address(self):
        """Return {address: the first machine that has it}."""
        return {worker.machine.address: worker for worker in reversed(self.workers)}

    def works(self, worker):
        """Tell whether something is still to come of this machine."""
        if worker.state in ('connecting', 'ready', 'away') and (worker.busy or worker.is_stopping):
            return True
        return worker in self.bound and (
            not self.standing[worker].outcome or worker.state == 'closing')

    def at_best(self, worker):
        """Return the Capacity that decides what is impossible.

        Others may go, so that is what an idle machine has; with --no-live nobody looks again, and
        what is free decides.
        """
        return idle(self.standing[worker].first) if self._client.live else worker.capacity

    def resting_shortly(self):
        """Return the machines that rest, but those that have failed for half an hour."""
        return [worker for worker, standing in self.standing.items()
                if worker.state == 'ready' and worker not in self._scheduler.resources
                and standing.troubles <= PATIENT_TROUBLES]

    # Changes of machines

    def changed(self, worker, before):
        """A machine is in another state now, or was measured: act on it, and show it."""
        if worker.state == 'ready' and before == 'ready':
            self._measured(worker)
        elif worker.state == 'ready':
            self._ready(worker, again=before == 'away')
        elif worker.state == 'away':
            self._away(worker)
        elif worker.state == 'failed':
            self._failed(worker)
        if worker.state == 'ready' and worker in self.bound and self._scheduler.waits:
            self._look_at(worker, self.bound[worker])

    def _ready(self, worker, again):
        """Use a machine with which there is contact, for the first time or again."""
        standing = self.standing[worker]
        standing.first = worker.capacity
        if worker.capacity:
            self._use(worker)
        if again:
            self._view.came_back(worker)
        else:
            if self._policy.forwards and self._run.waits_with_files(
                    MachineResources(self.at_best(worker))):
                worker.prepare(self._policy.forwards)       # now, though there may be no room yet
            self._view.came(worker)
        if self._run.is_open:
            worker.ask()
        if again and self._run.interrupts:      # jobs that ended meanwhile are reported first
            self._client.processes.call_later(1, worker.stop)

    def _measured(self, worker):
        self._scheduler.update(worker, worker.capacity)
        self._view.measured(worker)

    def _use(self, worker):
        """Have the scheduler know the machine, and the room of the jobs that it has already."""
        self._scheduler.add_machine(worker, self.workers.index(worker), worker.capacity)
        self._book(worker, self._lives.of(worker, *HOLDING))

    def _book(self, worker, attempts):
        """Take the room of these attempts on a machine."""
        for attempt in attempts:
            allocation, before = attempt.job.allocation, attempt.placement
            attempt.placement = allocation and self._scheduler.resources[worker].take(
                allocation, before.gpus if before else gpus_of(attempt.gpus))

    def _look_at(self, worker, job):
        """Give up the machine if the job would not even fit there when nobody else uses it."""
        best = MachineResources(idle(worker.capacity))
        if best.short_of(job.allocation):
            self.note_outcome(
                worker, 'impossible', f'the job needs {describe(job.allocation)}, and '
                f'{worker.name} {best.why_not(job.allocation)}')
        else:
            worker.prepare(job.forwards)    # now, though there may be no room yet

    def _away(self, worker):
        self._scheduler.remove_machine(worker)
        self._view.away(worker)
        if self._policy.lost_after_s is not None:
            self._client.processes.call_later(
                self._policy.lost_after_s,
                functools.partial(self._give_up, worker, worker.away_since))

    def _give_up(self, worker, since):
        """--lost-after is over: have the jobs of this machine started elsewhere."""
        attempts = self._lives.of(worker, *UNSEEN)
        if worker.away_since != since or not attempts:      # it was in contact meanwhile
            return
        self._view.given_up(worker, len(attempts))
        for attempt in attempts:
            self._lives.move(attempt, 'abandoned')

    def _failed(self, worker):
        """A machine cannot be used: it was never reached, or contact was looked for long enough."""
        standing = self.standing[worker]
        self._scheduler.remove_machine(worker)
        self._view.failed(worker, self._lives.of(worker, *UNCOLLECTED)
                         if worker.was_ready else [])
        if worker.same_as:
            self._rebind(worker, worker.same_as)
        if worker.was_ready and self._lives.any_of(worker, *UNCOLLECTED):
            if worker in self.bound:
                standing.outcome = ('lost', worker.why)
        else:
            self.note_outcome(worker, 'left out' if worker.same_as else 'unreachable', worker.why)
        if self._policy.patient and worker.retry == 'later' and not worker.was_ready:
            standing.troubles += 1
            self._later(worker, worker.reconnect)
        self._view.after_failure(worker)

    def _rebind(self, worker, other):
        """Have the attempts of a machine found by the other name of its account."""
        attempts = self._lives.of(worker, *UNSEEN)
        for attempt in attempts:
            self._lives.rebind(attempt, other)
        if other in self._scheduler.resources:      # else it books them when it is used
            self._book(other, attempts)
        if other.state == 'ready' and self._run.is_open:
            other.ask()

    # Machines that fail

    def attempt_changed(self, attempt):
        """Note what the state of an attempt says of its machine."""
        standing = self.standing[attempt.machine]
        if attempt.state == 'placed':
            standing.freed = False
        elif attempt.state == 'ended':
            standing.troubles, standing.freed = 0, True
            self.note_outcome(attempt.machine, 'ended', attempt.result.exit_code)

    def note_outcome(self, worker, word, what):
        """Note the outcome of a machine's own job.

        The first word holds, but a job that has ended may still have failed.  Words: ended (what:
        the exit code), failed (it could not be started, or its results not be fetched),
        impossible (it never fits there), unreachable, left out (another name of its account is
        used), lost, timed out, or absent.
        """
        before = self.standing[worker].outcome
        if worker in self.bound and (not before or before[0] == 'ended' and word == 'failed'):
            self.standing[worker].outcome = (word, what)

    def blame(self, worker):
        """Note that a machine failed a job; return how many it has failed in a row."""
        self.standing[worker].troubles += 1
        return self.standing[worker].troubles

    def rest(self, worker, why):
        """Place nothing on a machine for a while; its jobs run on."""
        if worker.state == 'ready' and worker in self._scheduler.resources:
            self._scheduler.remove_machine(worker)
            self._view.rests(worker, why)
            self._later(worker, functools.partial(self.bring_back, worker))

    def _later(self, worker, try_again):
        """Try a machine again after a while, the longer the more often it failed in a row."""
        delay_s = min(ASIDE_S * 2 ** (self.standing[worker].troubles - 1), LONGEST_ASIDE_S)
        self._client.processes.call_later(delay_s * random.uniform(0.8, 1.2), try_again)

    def bring_back(self, worker):
        """Use a machine again that was to rest."""
        if worker.state == 'ready' and worker not in self._scheduler.resources:
            self._use(worker)

    def _too_late(self, worker):
        """A machine took longer than --timeout: end what runs there, and wait no longer for it."""
        if self.standing[worker].outcome:
            return
        self.note_outcome(worker, 'timed out', f'after {self._policy.machine_timeout_s:g} s')
        if worker.state == 'ready':
            worker.stop()
            self._client.processes.call_later(INTERRUPT_S, functools.partial(self._part, worker))
        else:
            worker.close()

    def _part(self, worker):
        """Wait no longer for the end of what took too long."""
        if worker.state == 'ready':
            for attempt in self._lives.of(worker, *ALIVE):
                self._view.unconfirmed(attempt)
            worker.jobs.give_up_output()
            worker.close()


class Run:
    """Has jobs run on machines until none is left, and knows how each went.

    First, start every job for which a machine has room.  Second, wait until something happened.
    Both again, until nothing waits, runs or is on its way back.

    workers: the machines, as Worker
    client: what they share; its processes and its journal
    view: what a person sees, a View
    bound: {worker: the Job that is its own}, where the policy has each job on a machine of its own
    """

    def __init__(self, jobs, workers, client, view, policy, bound=None):
        self.jobs = {job.name: job for job in jobs}
        self.client, self.view, self.policy = client, view, policy
        self.lives = Lives(client.journal, self.changed)
        self.scheduler = Scheduler()
        self.fleet = Fleet(self, workers, bound or {})
        self.ended = {}                     # job name -> JobResult; exit code -1: it is lost
        self.failures = []                  # those of them that failed
        self.interrupts = 0
        self.unconfirmed = []               # Attempts that were told to end, and may run on
        self.is_open = not policy.asks_late
        self._lost_by = collections.Counter()       # job name -> machines that lost it
        view.run = self

    @property
    def workers(self):
        """The machines."""
        return self.fleet.workers

    # Before the loop

    def take_up(self, job, worker, record):
        """Take up a job that an earlier run has claimed on this machine."""
        attempt = Attempt(job, worker, record['key'], record, self._how(worker))
        self.lives.restore(attempt, 'claimed')

    def open(self):
        """Ask about the jobs of an earlier run, now that the lines before theirs are printed."""
        self.is_open = True
        for worker in self.workers:
            if worker.state == 'ready':
                worker.ask()

    # The loop

    def loop(self, until=lambda: False):
        """Run all jobs, at most until until() or an interrupt."""
        while self.unfinished and not self.interrupts and not until():
            self.fleet.log_in()
            self.place()
            if self.stuck():
                self.view.stuck()
                break
            self.look_again()
            self.view.progress()
            self.client.processes.wait()
            self.fleet.let_go()
        self._check_books()

    def interrupt(self, *_):
        """Stop, in good order; a second time: now.  A signal handler."""
        self.interrupts += 1
        self.client.processes.wake()

    def place(self):
        """Start each job for which there is room."""
        for job, worker, placement in () if self.halted else self.scheduler.choose():
            self.start(job, worker, placement)

    def start(self, job, worker, placement=None):
        """Send one job off; the starts of one moment are sent together."""
        attempt = self.client.journal.new_attempt(
            job, worker, self._how(worker), placement and placement.visible_gpus,
            own=job.own, backwards=job.backwards, **(self.policy.noted or {}))
        attempt.placement = placement
        self.lives.move(attempt, 'placed')
        worker.start(attempt)

    def _how(self, worker):
        """Return how an attempt is run on a machine."""
        return self.policy.how._replace(timeout_s=self.policy.timeout_s,
                                        show=self.view.sink(worker))

    def look_again(self):
        """While jobs wait, see to it that machines are looked at again.

        That is at once where a job ended and nothing could start in its place.
        """
        if not self.client.live:
            return
        if self.scheduler.waits:
            for worker in self.scheduler.resources:
                worker.measure(0 if self.fleet.standing[worker].freed else
                               self.policy.interval_s or LIVE_S)
        else:
            for worker in {attempt.machine for attempt in self.lives.all_of(*HOLDING)
                           if attempt.placement and attempt.placement.gpus}:
                worker.measure(CALM_S)
        for standing in self.fleet.standing.values():
            standing.freed = False

    # Questions

    @property
    def unfinished(self):
        """Tell whether something is left to do or to wait for."""
        waits = self.scheduler.waits and not self.fleet.bound and not self.halted
        return bool(waits) or any(map(self.fleet.works, self.workers))

    @property
    def halted(self):
        """Tell whether as many jobs have failed as --halt-after allows."""
        return bool(self.policy.halt_after and len(self.failures) >= self.policy.halt_after)

    def waits_with_files(self, books=None):
        """Tell whether a job waits that gets the batch's own files, and fits these resources."""
        return any(job.forwards == self.policy.forwards
                   for allocation, jobs in self.scheduler.kinds().items()
                   if books is None or not books.short_of(allocation) for job in jobs)

    def stuck(self):
        """Tell whether jobs wait that no machine that is left could take."""
        fleet = self.fleet
        if fleet.bound or not self.scheduler.waits or self.halted or fleet.count(
                'connecting') or fleet.count('away') or any(map(fleet.works, fleet.workers)):
            return False
        usable = [MachineResources(fleet.at_best(worker))
                  for worker in (*self.scheduler.resources, *fleet.resting_shortly())]
        return all(books.short_of(kind) for books in usable for kind in self.scheduler.kinds())

    def _check_books(self):
        """Every allocation was given back, or its machine is gone."""
        for worker, books in self.scheduler.resources.items():
            if worker.state == 'ready':
                out = sum(1 for attempt in self.lives.of(worker, *HOLDING) if attempt.placement)
                assert books.jobs == out, f'{worker.name}: allocations leaked [this is a bug]'

    # Changes of attempts

    def changed(self, attempt, before):
        """An attempt is in another state now: act on it, and show it."""
        if LIFE[before].holds and not LIFE[attempt.state].holds and attempt.placement:
            self.scheduler.give_back(attempt.machine, attempt.placement)
        self.fleet.attempt_changed(attempt)
        if attempt.state == 'ended':
            self._note(attempt.result)
        self.view.changed(attempt, before)
        react = {'returned': self._returned, 'refused': self._refused, 'held': self._held,
                 'absent': self._wait_again, 'lost': self._lost, 'abandoned': self._wait_again,
                 'kept': self._kept}.get(attempt.state)
        if react and before not in ('stopping', 'stopped'):
            react(attempt)

    def _note(self, result):
        """Note how a job has ended."""
        self.ended[result.name] = result
        self.failures += [result] if result.exit_code else []

    def _kept(self, attempt):
        self.fleet.note_outcome(attempt.machine, 'failed', 'its results could not be fetched')

    def _returned(self, attempt):
        """Its start was never sent: contact was lost, or nothing is started any more."""
        if self.interrupts:
            return
        if not self.fleet.bound:
            self._wait_again(attempt)
        elif attempt.machine.state != 'failed':
            self.fleet.note_outcome(attempt.machine, 'failed', attempt.why)

    def _refused(self, attempt):
        """The machine could not start it."""
        worker = attempt.machine
        if self.interrupts:
            return
        if self.fleet.bound:
            self.fleet.note_outcome(worker, 'failed', attempt.why)
            return
        self._wait_again(attempt)
        if worker.state == 'ready' and worker in self.scheduler.resources:
            self.fleet.blame(worker)
            self.fleet.rest(worker, f'it cannot start {attempt.name}: {attempt.why}')

    def _held(self, attempt):
        """Another batch took that room first; look again before the next start there."""
        worker = attempt.machine
        if not self.policy.probes:          # a job that needs nothing is never held
            self.fleet.note_outcome(worker, 'failed', 'another batch has the machine')
            return
        self._wait_again(attempt)
        self.scheduler.update(worker, worker.capacity._replace(reserved=True))
        worker.measure(random.uniform(1, 3))        # so that two do not step back for ever

    def _lost(self, attempt):
        """Its machine failed it: the job is gone there, for certain, without a result."""
        worker, name = attempt.machine, attempt.name
        if self.interrupts:
            return
        if self.fleet.bound:
            self.fleet.note_outcome(worker, 'failed', f'it is gone: {attempt.why}')
            return
        self._lost_by[name] += 1
        again = self._lost_by[name] <= self.policy.retries
        is_over = attempt.job.may_start and not again
        if is_over:
            self._note(JobResult(name, worker.name, -1, 0.0))
        self.view.lost(attempt, again)
        if not is_over:
            self._wait_again(attempt)
        troubles = self.fleet.blame(worker)
        if troubles >= TROUBLES:
            self.fleet.rest(worker, f'it lost {troubles} in a row')

    def _wait_again(self, attempt):
        """Have the job wait that has no result, unless its line is gone from the batch file."""
        worker, job = attempt.machine, attempt.job
        if not job.may_start:
            self.jobs.pop(job.name, None)
            self.fleet.note_outcome(worker, 'absent', 'it was never started there')
        elif self.policy.probes or not self.fleet.bound:
            self.scheduler.add(job, first=True)
        elif not self.interrupts:
            self.start(job, worker)

    def machine_changed(self, worker, before):
        """A machine is in another state now, or was measured."""
        self.fleet.changed(worker, before)

    # The end

    def cancel(self):
        """End all jobs everywhere, within a time; return the Attempts that may not have ended.

        What they left is set aside.
        """
        running = [attempt for attempt in self.lives.all_of(*ALIVE)
                   if attempt.machine.was_ready]
        workers = [worker for worker in self.workers if worker.state == 'ready']
        for worker in workers:
            worker.stop()
        until = time.monotonic() + INTERRUPT_S
        self._wait(until, lambda worker: worker.is_stopping or self.lives.any_of(worker, *ALIVE))
        if any(worker.hears_output for worker in workers):
            until = max(until, time.monotonic() + 2 * LAST_WORDS_S)
            self._wait(time.monotonic() + LAST_WORDS_S, lambda worker: worker.hears_output)
        for worker in workers:
            worker.jobs.give_up_output()
        self._wait(until, lambda worker: worker.busy)
        self.unconfirmed = [attempt for attempt in running if LIFE[attempt.state].holds]
        for attempt in self.unconfirmed:
            self.view.unconfirmed(attempt)
        for attempt in running:
            # The journal has these as cancelled: should the next run find one ended on its machine,
            # that is no failure of the job.  It removes what is left, and starts the job again.
            state = next((word for word in ('dropped', 'cancelled')
                          if word in LIFE[attempt.state].then), None)
            if state and self.client.journal.record(attempt.name)['state'] != 'ended':
                self.lives.move(attempt, state, kept=())
                self.client.results.set_aside(attempt.name)
        return self.unconfirmed

    def _wait(self, until, unfinished):
        self.client.wait_while(
            lambda: any(worker.state == 'ready' and unfinished(worker) for worker in self.workers),
            until, lambda: self.interrupts > 1)

    def wait(self, unfinished):
        """Wait while unfinished(worker) is true of a machine, or for an interrupt."""
        while not self.interrupts and any(map(unfinished, self.workers)):
            self.client.processes.wait(1)

    # Jobs that are none of this run

    @property
    def wants_others(self):
        """Tell whether machines are asked for jobs that other journals claimed."""
        return self.policy.wants_others

    def others(self, worker, jobs):
        """A machine has these OtherJobs."""
        self.view.others(worker, jobs)


# ---- Report: the only place that prints ----

LONGEST_PRINTED = 64 * 1024         # bytes of a line of output that is printed in one piece


def shown_command(command, gpus):
    """Return the command as it is shown; gpus: the value of CUDA_VISIBLE_DEVICES, or None."""
    prefix = '' if gpus is None else f'export CUDA_VISIBLE_DEVICES={gpus} && '
    return prefix + printable(command)


class Reporter:
    """Events on stdout, one a line; diagnostics on stderr; a bar below them on a terminal."""

    def __init__(self, verbose=False, out=None, err=None, all_on_stderr=False):
        self._err, self.verbose = err or sys.stderr, verbose
        self._out = self._err if all_on_stderr else out or sys.stdout
        self._bar = None
        self.nobody_reads = False    # the reader of what is printed is gone
        self.trouble = ''           # or why it cannot be printed

    def line(self, text):
        """Print one line on stdout, now."""
        self._print(self._out, text)

    def note(self, text):
        """Print one line on stderr."""
        self._print(self._err, text)

    def trace(self, text):
        """Print one line on stderr, with --verbose."""
        if self.verbose:
            self._print(self._err, text)

    def warning(self, text):
        """Print one line on stderr that begins with WARNING."""
        self._print(self._err, f'WARNING: {text}')

    def raw(self, stream, data):
        """Print bytes on stdout or stderr, 'out' or 'err'."""
        stream = self._out if stream == 'out' else self._err
        try:
            stream.flush()
            stream.buffer.write(data)
            stream.buffer.flush()
        except OSError as error:
            self._silence(stream, error)

    def tint(self, text, number):
        """Return the text in one of some colours, on a terminal."""
        return self._coloured(text, 31 + number % 6)

    def sent(self, machine, stage):
        """The files of a Stage are on the machine."""
        files, size = stage.copy.files + stage.link.files, stage.copy.size + stage.link.size
        left_out = dict.fromkeys((*stage.copy.left_out, *stage.link.left_out))
        note = f' (left out: {", ".join(left_out)})' if left_out else ''
        self.note(f'{machine}: sent {count_of(files, "file")}, {size_of(size)}{note}')

    def left(self, machine, name, text):
        """A job ended, and these processes that it started there did not."""
        self.note(f'{machine}: {name} ended, but what it started goes on there: {text}')

    def survivors(self, machine, pids):
        """These were to be ended."""
        self.note(f'{machine}: could not be ended: process {pids}')

    def unconfirmed(self, machine, name):
        """A job was to be ended, and nobody knows whether it has."""
        self.note(f'{name}: could not be confirmed to have ended on {machine}')

    def others(self, machine, word, jobs):
        """A machine has these OtherJobs.  word: what finds the machine again."""
        if jobs:
            running = sum(job.state == 'running' for job in jobs)
            rest = len(jobs) - running
            run = f'{"runs" if running == 1 else "run"} there'
            more = f', and {rest} more {"has" if rest == 1 else "have"} ended' if rest else ''
            self.note(f'{machine}: {count_of(running or rest, "job")} of an earlier job_results of '
                      f'this folder {run + more if running else "left results there"}. This run '
                      'does not use them. To see them: execute_batch '
                      f'--machines {word} --earlier=show (or =collect, =remove)')

    def started(self, job, gpus, word='started'):
        """A job was started; with gpus, the value of CUDA_VISIBLE_DEVICES."""
        self.line(f'{word}: {job.name};  {shown_command(job.command, gpus)}')

    def running(self, name, machine, since):
        """A job was found that an earlier run started at this time, or None."""
        how = '%H:%M' if since and time.time() - since < 86400 / 2 else '%Y-%m-%d %H:%M'
        since = f' since {time.strftime(how, time.localtime(since))}' if since else ''
        self.note(f'running: {name} on {machine}{since}')

    def ended(self, job, exit_code):
        """A job ended."""
        self.line(f'{"failed" if exit_code else "finished"}: {job.name}; {printable(job.command)}')

    def paint(self, text, share):
        """Return the text in green, yellow or red by the share that is free, on a terminal."""
        return self._coloured(text, 32 if share > 0.5 else 33 if share > 0.1 else 31)

    def _coloured(self, text, code):
        plain = not self._out.isatty() or os.environ.get('NO_COLOR')
        return text if plain else f'\x1b[{code}m{text}\x1b[m'

    def show(self, lines, again):
        """Print the lines; `again`: in the place of those before, on a terminal."""
        if again and self._out.isatty():
            self._out.write('\x1b[H\x1b[2J')
        for line in lines:
            self.line(line)

    def begin(self, total):
        """Show a bar for this number of jobs, if there is a terminal."""
        if self._out.isatty() and self._err.isatty():
            try:
                import tqdm
            except ImportError:
                return
            self._bar = tqdm.tqdm(total=total, file=self._err, unit='job', dynamic_ncols=True)

    @property
    def has_bar(self):
        """Tell whether a bar is shown."""
        return self._bar is not None

    def progress(self, finished, failed, running, waiting):
        """Tell the bar how things stand."""
        if self._bar is not None:
            self._bar.set_postfix_str(f'{finished} finished, {failed} failed, {running} running, '
                                      f'{waiting} waiting', False)
            self._bar.update(finished + failed - self._bar.n)

    def hide(self):
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, stream, text):
        if self._bar is not None:
            self._bar.clear()
        try:
            stream.write(text + '\n')
            stream.flush()
        except OSError as error:    # as in `| head`, or on a full disk: the jobs matter more
            self._silence(stream, error)
        except UnicodeEncodeError:
            stream.write(text.encode('ascii', 'backslashreplace').decode() + '\n')
            stream.flush()
        if self._bar is not None:
            self._bar.refresh()

    def _silence(self, stream, error):
        self.nobody_reads = True
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        if stream is self._out and error.errno not in (errno.EPIPE, errno.EIO):
            self.trouble = reason_of(error)
            self.warning(f'what should be printed here cannot be: {self.trouble}')


def flush_streams():
    """Have everything written that was printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


class OwnStreams:
    """Our standard streams, for the output of a command: it is passed on unchanged."""

    def __init__(self, processes):
        self.nobody_reads = False        # the reader of stdout or stderr is gone
        self.trouble = ''               # or why it cannot be written
        self._processes = processes

    def write(self, stream, data):
        """Write it all, however slowly it is read; once interrupted, only what is read at once."""
        try:
            if not self.nobody_reads:
                self._processes.write_out(1 if stream == 'out' else 2, data)
        except OSError as error:
            self.nobody_reads = True
            if error.errno != errno.EPIPE:
                self.trouble = f'its std{stream} cannot be written here: {reason_of(error)}'
            self._processes.wake()

    def flush(self):
        """Nothing more comes."""


class Prefixer:
    """The output of a command on one machine, in whole lines that begin with the machine's name."""

    def __init__(self, reporter, head):
        self._reporter, self._head = reporter, head.encode() + b' '
        self._rest = {'out': b'', 'err': b''}

    def write(self, stream, data):
        """Print the lines that are complete with these bytes; very long ones come in parts."""
        *lines, rest = (self._rest[stream] + data).split(b'\n')
        if len(rest) > LONGEST_PRINTED:
            lines, rest = [*lines, rest], b''
        self._rest[stream] = rest
        self._print(stream, lines)

    def flush(self):
        """Print what is left without an end of line."""
        for stream, rest in self._rest.items():
            self._print(stream, [rest] if rest else [])
        self._rest = {'out': b'', 'err': b''}

    def _print(self, stream, lines):
        # Of what a progress bar has drawn over and over, the last is left.
        shown = [line.rstrip(b'\r').rpartition(b'\r')[2] for line in lines]
        if shown:
            self._reporter.raw(stream, b''.join(self._head + line + b'\n' for line in shown))


# ---- Lines: which jobs of a batch file an earlier run has run ----

class Lines(NamedTuple):
    """The lines of a batch file by what the journal knows; each Job has the name of its results."""
    waiting: tuple                  # Jobs to run
    begun: tuple                    # Jobs that an earlier run started, and that are not collected
    done: tuple                     # Jobs that have results
    gone: tuple                     # Jobs that were started, but whose line is gone from the file
    left: tuple                     # names of results whose line is gone
    usual: dict                     # name of a Job's results -> the name after its line

    @property
    def jobs(self):
        """All Jobs, in the order of the file."""
        return sorted((*self.waiting, *self.begun, *self.done), key=lambda job: job.line)


def match_lines(jobs, batch, results):
    """Return the Lines: which Jobs were run before, by what they run and not by their numbers.

    batch: the stem of the names of its jobs.

    A line that has no results is to be run; if another command's results have its name, it gets the
    next that is free: NAME-2.
    """
    journal = results.journal
    known = journal.jobs
    found, unmatched = find_results(jobs, batch, results)
    taken, of_lines = set(found.values()), {job.name for job in jobs}

    def is_taken(name, job):
        return (name in taken or journal.is_begun(name) or results.exists(name)
                or name != job.name and name in of_lines)

    waiting, begun, done, usual = [], [], [], {}
    for job in jobs:
        name = found.get(job.name)
        if name:
            (begun if journal.is_begun(name) else done).append(job._replace(name=name))
        elif job.name not in known and results.exists(job.name):        # of an unknown command
            name = job.name
            done.append(job)
        else:
            name = free_name(job.name, functools.partial(is_taken, job=job))
            taken.add(name)
            waiting.append(job._replace(name=name))
        usual[name] = job.name
    left = [name for name in unmatched if is_of_batch(name, known[name], batch)]
    gone = [Job(name, known[name]['command'], 0, None, None, as_paths(known[name].get('backwards')))
            for name in left if journal.is_begun(name)]
    return Lines(*map(tuple, (waiting, begun, done, gone)),
                 tuple(name for name in left if not journal.is_begun(name)), usual)


def find_results(jobs, batch, results):
    """Return ({a job's name after its line: the name of its results}, the names that are left).

    A line has the results that its own command made, with the same files and hardware where the
    line itself says which; not with those of the batch, since more memory for all lines must not
    run all of them again.  First each line gets those with its own number, then what is left in the
    order of the journal; so of equal lines each has its own.
    """
    known = results.journal.jobs
    unmatched = dict.fromkeys(name for name in known
                              if results.journal.is_begun(name) or results.is_done(name))
    found = {}

    def fits(job, name):
        return known[name]['command'] == job.command and known[name].get('own', job.own) == job.own

    def give(job, name):
        found[job.name] = name
        del unmatched[name]

    for job in jobs:
        if job.name in unmatched and fits(job, job.name):
            give(job, job.name)
    by_command = collections.defaultdict(list)
    for name in unmatched:
        if is_of_batch(name, known[name], batch):
            by_command[known[name]['command']].append(name)
    for job in jobs:
        names = by_command.get(job.command, ()) if job.name not in found else ()
        name = next((name for name in names if fits(job, name)), None)
        if name:
            names.remove(name)
            give(job, name)
    return found, list(unmatched)


def free_name(name, is_taken):
    """Return the first of NAME, NAME-2, NAME-3, … for which is_taken(name) is false."""
    names = itertools.chain([name], (f'{name}-{number}' for number in itertools.count(2)))
    return next(itertools.filterfalse(is_taken, names))


def is_of_batch(name, record, batch):
    """Tell whether the journal's record is of a job of this batch; old records do not say that."""
    return (record['batch'] == batch if 'batch' in record else
            bool(re.fullmatch(re.escape(batch) + r'\.[0-9]+', name)))


def as_paths(value):
    """Return the paths to bring back as the journal has them: a list, or None."""
    return None if value is None else tuple(value)


# ---- Views: what a person sees of a run ----

EXPLAIN_S = 5.0             # without a start; then the reason is printed


class Plan(NamedTuple):
    """The lines of a batch file, and what a run will do with each."""
    lines: Lines
    failed_before: tuple            # JobResults of those jobs with results that failed
    elsewhere: dict                 # name of a job that was begun -> its machine, which is not used
    warnings: tuple


def plan_lines(lines, results, addresses):
    """Return the Plan for the Lines on machines with these addresses."""
    journal, failed_before, elsewhere, warnings = results.journal, [], {}, []
    for job in sorted((*lines.begun, *lines.done), key=lambda job: job.line):
        known = journal.record(job.name)
        if not journal.is_begun(job.name):
            other = f' (done as {job.name})' if lines.usual[job.name] != job.name else ''
            warnings.append(f'WARNING: job results already exists for line {job.line}{other}, '
                            'skipping evaluation: delete if you wish to rerun')
            if known.get('exit_code'):
                failed_before.append(JobResult(
                    job.name, known.get('where') or known['machine'], known['exit_code'], 0.0))
        elif known['machine'] not in addresses:
            warnings.append(f'WARNING: line {job.line} was started on {known["machine"]} by a run '
                            'that was cut off; name that machine too, to collect it')
            elsewhere[job.name] = known['machine']
    for job in lines.gone:
        if journal.record(job.name)['machine'] not in addresses:
            elsewhere[job.name] = journal.record(job.name)['machine']
    return Plan(lines, tuple(failed_before), elsewhere, tuple(warnings))


class View:
    """A Run calls these methods.  Each view prints what concerns its user; this one nothing."""

    run = None                              # the Run, which sets this

    def changed(self, attempt, before):
        """An attempt is in another state now; before: the state that it was in."""

    def lost(self, attempt, again):
        """A job is gone without a result by the fault of its machine; again: it starts again."""

    def unconfirmed(self, attempt):
        """A job was told to end, and may run on."""

    def came(self, worker):
        """Contact with a machine was made for the first time."""

    def came_back(self, worker):
        """Contact was made again."""

    def measured(self, worker):
        """A machine has said again what it has free."""

    def away(self, worker):
        """Contact with a machine was lost; it is looked for."""

    def failed(self, worker, attempts):
        """A machine cannot be used, or not any more; these attempts may go on there."""

    def after_failure(self, worker):
        """A machine failed, and is out of the books."""

    def given_up(self, worker, jobs):
        """--lost-after is over for this number of jobs."""

    def rests(self, worker, why):
        """A machine failed jobs, and gets no more for a while."""

    def parted(self, worker):
        """Nothing more is wanted of a machine."""

    def sink(self, worker):
        """Return what is called with ('out' or 'err', bytes) of the output of its jobs, or None."""

    def others(self, worker, jobs):
        """A machine has these OtherJobs."""

    def progress(self):
        """The run is about to wait."""

    def stuck(self):
        """Jobs are left that no machine can run."""

    def unanswered(self):
        """Nothing more is waited for: machines may not have answered."""


class SpeakingView(View):
    """A view with a Reporter."""

    def __init__(self, reporter):
        self._report = reporter

    def unconfirmed(self, attempt):
        """Name the job and its machine."""
        self._report.unconfirmed(attempt.machine.name, attempt.name)

    def others(self, worker, jobs):
        """Say how many there are, and how to look at them."""
        self._report.others(worker.name, worker.machine.word, jobs)


class QuietView(SpeakingView):
    """Only what is wrong: for --cancel, and where no job is started."""

    def failed(self, worker, attempts):
        """Say why the machine cannot be used."""
        self._report.note(f'{worker.name}: cannot be used: {sentence(worker.why)}')


class EarlierView(QuietView):
    """The output of execute_batch --earlier."""

    def __init__(self, reporter):
        super().__init__(reporter)
        self.found = {}                         # worker -> its OtherJobs

    def others(self, worker, jobs):
        """Note them; `show` is called when all machines have answered."""
        self.found[worker] = jobs

    def changed(self, attempt, before):
        """Tell of a job that was collected."""
        if attempt.state == 'collected' and before == 'ended':
            self._report.line(f'collected: {attempt.name}; {printable(attempt.job.command)}')

    def show(self):
        """Print a line for each job."""
        for worker, jobs in self.found.items():
            for job in jobs:
                how = f' with exit code {job.exit_code}' if job.state == 'ended' else ''
                self._report.line(f'{job.state}{how}: {job.name} on {worker.name};  '
                                  f'{printable(job.command)}')

    def summary(self, action, status):
        """Say what was done; return the exit status, which is `status` if all is well."""
        for worker, jobs in self.found.items() if action == 'remove' else ():
            for job in jobs if worker.state == 'closed' else ():
                self._report.line(f'removed: {job.name} on {worker.name}')
        if not any(self.found.values()) and not self.run.interrupts:
            self._report.note('no jobs of an earlier job_results of this folder were found')
        ended = sum(job.state == 'ended' for jobs in self.found.values() for job in jobs)
        if action == 'collect' and ended < sum(map(len, self.found.values())):
            self._report.note('only jobs that have ended are collected')
        if self.run.interrupts:
            return 130
        whole = all(worker in self.found and worker.state != 'failed'
                    for worker in self.run.workers)
        return status if whole else 1


class Summary:
    """The last lines of execute_batch."""

    def __init__(self, run, reporter, results, plan):
        self._run, self._report, self._results, self._plan = run, reporter, results, plan

    def show(self, wall_s, advice):
        """Print it; return the exit status.  advice: lines of what to ask for next time."""
        run, report = self._run, self._report
        fates = self._fates()
        counted = collections.Counter(fates.values())
        before = self._plan.failed_before
        failed_too = f' ({len(before)} of them failed)' if before else ''
        counts = [f'{counted[fate]} {fate}{failed_too if fate == "skipped" else ""}' for fate in (
            'finished', 'failed', 'skipped', 'cancelled', 'not started', 'not collected')
            if counted[fate] or fate in ('finished', 'failed')]
        report.line(f'{"interrupted" if run.interrupts else "done"}: '
                    f'{count_of(len(run.jobs), "job")}: {", ".join(counts)}, '
                    f'{wall_s:.1f} s')
        if counted['cancelled']:
            report.note(
                f'partial results of {count_of(counted["cancelled"], "cancelled job")} are in '
                f'{self._results.inner}/cancelled. The same command runs these jobs from the start')
        self._say_failures()
        for text in advice:
            report.note(text)
        self._say_left()
        unknown = self._not_collected()
        for name, machine in unknown.items():
            known = '' if self._results.journal.record(name)['state'] == 'ended' else (
                'not known to have ')
            report.line(f'{name}: on {machine}, {known}ended: run the same command again to '
                        'collect it')
        if run.interrupts:
            return 130
        return 1 if run.failures or before or unknown or counted['not started'] else 0

    def _not_collected(self):
        """Return {name of a job: machine where it is or was}, of those that are not collected."""
        left = {attempt.name: attempt.machine for attempt in self._run.lives.all_of(
            *UNCOLLECTED, 'kept')}
        return {**self._plan.elsewhere, **{
            name: worker.name if worker.was_ready else worker.machine.address
            for name, worker in left.items()}}

    def _fates(self):
        """Return {name of a job: its fate in the words of the summary}."""
        fates = dict.fromkeys(self._run.jobs, 'not started')
        for fate, names in (
                ('skipped', [job.name for job in self._plan.lines.done]),
                ('failed', [job.name for job in self._run.failures]),
                ('finished', [name for name, result in self._run.ended.items()
                              if not result.exit_code]),
                ('cancelled', [attempt.name for attempt
                               in self._run.lives.all_of('cancelled', 'dropped')]),
                ('not collected', self._not_collected())):
            fates.update(dict.fromkeys(names, fate))
        return fates

    def _say_failures(self):
        before = self._plan.failed_before
        for result in (*self._run.failures, *before):
            if result.exit_code >= 0:
                when = ', in an earlier run' if result in before else ''
                err = os.path.join(self._results.folder, f'{result.name}.err')
                self._report.line(f'{result.name}: exit code {result.exit_code} on '
                                  f'{result.machine}{when}, see {err}')

    def _say_left(self):
        lines = self._plan.lines
        left = [*lines.left, *(job.name for job in lines.gone
                               if self._results.is_done(job.name))]
        if left:
            self._report.note(f'the results of {count_of(len(left), "line")} that '
                              f'{"is" if len(left) == 1 else "are"} no longer in the batch file '
                              f'stay in {self._results.folder}: {names_of(left)}')


class BatchView(SpeakingView):
    """The output of execute_batch: the events on stdout, all else on stderr.

    allocation: what the batch's own options ask for, which the limits are said for
    """

    def __init__(self, reporter, results, plan, allocation, path=''):
        super().__init__(reporter)
        self._results, self._plan = results, plan
        self._allocation, self._path = allocation, path
        self._began = self._last_start = time.monotonic()
        self._explained = ('', -math.inf)       # what was said last of why jobs wait, and when
        self._peaks = {}                        # Allocation -> [MB, MB of a GPU] seen at most
        self._lost_gpus = {}                    # worker -> what was said of GPUs that are none
        self._said_halt = False

    # Before the first start

    def names(self):
        """Tell which results get another name, are not whole, or have no record in the journal."""
        lines, results = self._plan.lines, self._results
        renamed = [f'line {job.line}: {job.name}' for job in lines.waiting
                   if lines.usual[job.name] != job.name]
        if renamed:
            self._report.note('new names for results, because other commands have the usual ones: '
                              f'{names_of(renamed)}')
        parts = [(job, here) for job in lines.done
                 for here, missing in [results.pieces(job.name)] if missing]
        if parts:
            found = [f'line {job.line}: {" and ".join(here)}' for job, here in parts]
            paths = itertools.chain.from_iterable(here for _, here in parts)
            self._report.note(f'only a part of the results is left for {names_of(found)}. To run '
                              f'{"this line" if len(parts) == 1 else "these lines"} again: rm -r '
                              f'{" ".join(paths)}')
        unknown = [job.name for job in lines.done if not results.journal.record(job.name)]
        if unknown:
            self._report.note(f'the journal does not know which commands made {names_of(unknown)}')

    def limits(self, workers):
        """Say how many jobs of the batch's own kind fit on these machines, and on which GPUs."""
        limits, choices = {}, []
        for worker in workers:
            count, gpus = room_for(worker.capacity, self._allocation)
            limits[worker.name] = count
            choices.append(gpus)
        self._report.line(f'machine limits:  {limits}')
        self._report.line(f'machine gpu choices: {choices}')

    def check_room(self):
        """Raise if jobs wait that would not even fit on a machine that nobody uses."""
        run = self.run
        empty = [(worker, MachineResources(run.fleet.at_best(worker)))
                 for worker in run.workers if worker.state == 'ready']
        for allocation, queue in run.scheduler.kinds().items():
            if any(not books.short_of(allocation) for _, books in empty):
                continue
            lines = f'line {queue[0].line}' + (
                f' (and {count_of(len(queue) - 1, "more line")})' if len(queue) > 1 else '')
            why = '; '.join(f'{worker.name} {books.why_not(allocation)}' for worker, books in empty)
            is_cpu_only = allocation.gpus and not any(books.available.gpus for _, books in empty)
            hint = ' For jobs that need no GPU: --no-gpu-required' if is_cpu_only else ''
            when = 'even when nobody uses it' if run.client.live else 'free'
            raise DoesNotFit(f'{lines} needs {describe(allocation)}, and no machine has that '
                             f'{when}: {sentence(why)}{hint}')

    def changed_files(self, files):
        """Tell, in one line, if jobs that were run before had other files than jobs get now.

        files: the Files that are sent
        """
        older, changed = [], set()
        for job in (*self._plan.lines.done, *self._plan.lines.begun):
            digest = self._results.journal.record(job.name).get('files')
            now = files.manifest(job.forwards)
            if digest not in (None, now.digest):
                before = self._results.manifests.get(digest)
                paths = set(now.changed(before) if before else ['(not recorded)'])
                paths.discard(os.path.normpath(self._path))     # whose lines are compared
                changed |= paths
                older += [job] if paths else []
        if not older:
            return
        ended = [job.name for job in older if not self._results.journal.is_begun(job.name)]
        running = len(older) - len(ended)
        parts = [f'{count_of(len(ended), "finished line")} had the older files'] * bool(ended)
        parts += [f'{count_of(running, "running line")} '
                  f'{"has" if running == 1 else "have"} them'] * bool(running)
        again = f'. To run them again: {removal_of(ended)}' if ended else ''
        self._report.note(f'files changed since: {names_of(sorted(map(printable, changed)))}: '
                          f'{" and ".join(parts)}{again}')

    def dry_run(self):
        """Say what would start where, now."""
        self.unanswered()
        for job, worker, placement in self.run.scheduler.choose():
            self._report.line(f'would start: {job.name} on {worker.name};  '
                              f'{shown_command(job.command, placement.visible_gpus)}')
        for queue in self.run.scheduler.kinds().values():
            for job in queue:
                self._report.line(f'would wait: {job.name};  {printable(job.command)}')

    def unanswered(self):
        """Name each machine of which nothing was said yet, since it has not answered."""
        for worker in self.run.workers:
            standing = self.run.fleet.standing[worker]
            if worker.state == 'connecting' and not worker.was_ready and not standing.troubles:
                so = 'interrupted' if self.run.interrupts else 'the batch ended without it'
                self._report.note(f'{worker.name}: {worker.unanswered(f"; {so}")}')

    # Changes of attempts

    def changed(self, attempt, before):
        """An attempt is in another state now."""
        if attempt.state == 'placed':
            self._last_start = time.monotonic()
            if self._report.verbose:
                scores = ', '.join(f'{worker.name} {books.score(attempt.job.allocation):.2f}'
                                   for worker, books in self.run.scheduler.resources.items())
                self._report.trace(f'{attempt.name}: to {attempt.machine.name}; scores for another '
                                   f'such job: {scores}')
        elif attempt.state == 'running':
            self._report.started(attempt.job, attempt.gpus,
                                 'running' if attempt.is_inherited else 'started')
        elif attempt.state == 'ended':
            self._say_halt()
            self._ended(attempt)

    def _ended(self, attempt):
        result = attempt.result
        self._report.ended(attempt.job, result.exit_code)
        seen = self._peaks.setdefault(attempt.job.allocation, [[], []])
        if not result.exit_code and result.wall_s > 2 * REFRESH_S:     # seen more than once
            for peaks, mb in zip(seen, (result.peak_memory_mb, result.peak_gpu_memory_mb)):
                peaks += [mb] if mb is not None else []

    def lost(self, attempt, again):
        """A job is gone without a result, by the fault of its machine."""
        name, why = attempt.name, sentence(attempt.why)
        if not attempt.job.may_start:
            what = 'Its line is not in the batch file any more, so it is not started again.'
        elif again:
            what = 'It will be started again.'
        else:
            what = 'The same command starts it again.'
            self._report.line(f'failed: {name}; {printable(attempt.job.command)}')
        self._report.note(f'{name}: lost on {attempt.machine.name}: {why} {what}')
        self._say_halt()

    def _say_halt(self):
        if self.run.halted and not self._said_halt:
            self._said_halt = True
            self._report.note(f'{count_of(len(self.run.failures), "job")} failed: no more are '
                              'started (--halt-after)')

    # Changes of machines

    def came(self, worker):
        """Contact with a machine was made for the first time."""
        self.measured(worker)
        if self.run.is_open and worker.capacity:
            self.limits([worker])

    def came_back(self, worker):
        """Contact was made again."""
        self.measured(worker)
        jobs = len(self.run.lives.of(worker, *ALIVE))
        self._report.note(f'{worker.name}: in contact again ({count_of(jobs, "job")} there)')

    def measured(self, worker):
        """Say, when it is news, that only a part of a machine's GPUs can be used."""
        have = worker.capacity
        if have and have.lost_gpus and have.lost_gpus != self._lost_gpus.get(worker):
            self._report.note(f'{worker.name} {have.lost_gpus}; '
                              f'{count_of(len(have.gpus), "other GPU")} can be used.')
        self._lost_gpus[worker] = have and have.lost_gpus

    def away(self, worker):
        """Contact with a machine was lost; it is looked for."""
        jobs = len(self.run.lives.of(worker, *UNCOLLECTED))
        self._report.note(f'{worker.name}: lost contact ({count_of(jobs, "job")} '
                          f'{"goes" if jobs == 1 else "go"} on there): {sentence(worker.why)} '
                          'Trying again.')

    def failed(self, worker, attempts):
        """A machine cannot be used, or not any more; these attempts may go on there."""
        if attempts:
            self._report.note(f'{worker.name}: lost contact ({count_of(len(attempts), "job")} may '
                              f'go on there): {sentence(worker.why)}')
        else:
            self._report.note(f'{worker.name}: cannot be used: {sentence(worker.why)}')

    def after_failure(self, worker):
        """Say it if jobs wait that fit on no machine that is left."""
        run = self.run
        if run.is_open and not run.fleet.count('connecting') and run.scheduler.resources:
            try:
                self.check_room()
            except DoesNotFit as error:
                self._report.note(f'{error}')

    def given_up(self, worker, jobs):
        """--lost-after is over."""
        self._report.note(f'{worker.name}: no contact for {self.run.policy.lost_after_s:g} s: '
                          f'{count_of(jobs, "job")} will be started elsewhere, and ended there '
                          'when it is back')

    def warn(self, text):
        """Show a warning."""
        self._report.warning(text)

    def rests(self, worker, why):
        """A machine failed jobs, and gets no more for a while."""
        self._report.note(f'{worker.name}: gets no more jobs for a while: {sentence(why)}')

    # While nothing happens

    def begin(self):
        """Show the bar, and from now on why nothing starts."""
        self._report.begin(len(self.run.jobs) - len(self._plan.lines.done))
        self.run.client.processes.call_later(EXPLAIN_S, self._explain)

    def progress(self):
        """Show how far the batch is, where there is a bar."""
        run, failed = self.run, len(self.run.failures)
        if not self._report.has_bar:
            return
        running = sum(1 for attempt in run.lives.all_of(*HOLDING) if attempt.placement)
        self._report.progress(len(run.ended) - failed, failed, running, run.scheduler.waits)

    def _explain(self):
        """Say why nothing starts, when that is news."""
        self.run.client.processes.call_later(EXPLAIN_S / 2, self._explain)
        now = time.monotonic()
        if (now - self._last_start < EXPLAIN_S or now - self._explained[1] < 2 * EXPLAIN_S
                or self.run.interrupts):
            return
        text = '\n'.join(self._waits_for(allocation, jobs)
                         for allocation, jobs in self.run.scheduler.kinds().items())
        if text != self._explained[0]:
            self._explained = (text, now)
            if text:
                self._report.note(text)

    def _waits_for(self, allocation, jobs):
        """Return for what these jobs wait: 'waiting: 2 jobs for a GPU …: lab1 has 1 in use by …'"""
        reasons, shorts = collections.defaultdict(list), set()
        for worker, books in self.run.scheduler.resources.items():
            short = books.short_of(allocation)
            shorts.add(short)
            reasons[books.holder(allocation) if short else 'is kept for a job that waits longer'
                    ].append(worker.name)
        what = {'gpu': describe_gpu(allocation), 'memory': f'{allocation.memory_mb} MB of memory',
                'cores': count_of(allocation.cores, 'core'), 'machine': 'a machine of its own'
                if allocation.reserve else ''}.get(*shorts) if len(shorts) == 1 else ''
        machines = '; '.join(f'{names_of(names)} {reason}' for reason, names in reasons.items())
        return (f'waiting: {count_of(len(jobs), "job")} for {what or describe(allocation)}: '
                f'{machines or "no machine is there"}')

    def stuck(self):
        """Say that jobs are left which no machine can run."""
        self._report.note(f'{count_of(self.run.scheduler.waits, "job")} not started: no machine is '
                          'left that could run them. Run the same command again when there is one.')

    # The end

    def stopping(self):
        """Say that an interrupt ends all jobs."""
        self._report.note('interrupted: ending all jobs (once more: leave them)')

    def summary(self):
        """Print how it went; return the exit status."""
        self.unanswered()
        return Summary(self.run, self._report, self._results, self._plan).show(
            time.monotonic() - self._began, advise(self.run, self._peaks))


class BoundView(SpeakingView):
    """The notes of execute_remote and execute_to, whose jobs each have a machine of their own.

    sinks: {worker: an object that has write(stream, bytes) and flush()}, for what the job writes
    on_running: called with an attempt when its command has begun
    """

    def __init__(self, reporter, sinks, on_running=None):
        super().__init__(reporter)
        self._sinks = sinks
        self._on_running = on_running or (lambda attempt: None)
        self._explained = False

    def warn_of_links(self, files):
        """Tell of links among the files to send that lead nowhere on a machine."""
        lost = files.lost_links({job.forwards for job in self.run.fleet.bound.values()
                                 if job.forwards})
        if lost:
            self._report.warning(lost)

    def changed(self, attempt, before):
        """An attempt is in another state now."""
        if attempt.state == 'running':
            self._on_running(attempt)

    def came_back(self, worker):
        """Contact was made again."""
        self._report.note(f'{worker.name}: in contact again')

    def away(self, worker):
        """Contact with a machine was lost; it is looked for."""
        self._report.note(f'{worker.name}: lost contact ({worker.why}). The job goes on there; '
                          'trying again')

    def progress(self):
        """Say once for what the job waits."""
        for allocation in () if self._explained else self.run.scheduler.kinds():
            for worker, books in self.run.scheduler.resources.items():
                if self.run.fleet.standing[worker].outcome:
                    continue                # it fits there never
                self._explained = True
                self._report.note(f'waiting for {describe(allocation)}: {worker.name} '
                                  f'{books.holder(allocation)}')

    def parted(self, worker):
        """Nothing more is wanted of a machine."""
        if worker in self._sinks:
            self._sinks[worker].flush()

    def sink(self, worker):
        """Return what passes on the output of the job."""
        return self._sinks[worker].write if worker in self._sinks else None

    def awaited(self):
        """Return {worker: how far it has come} of the machines without an outcome."""
        return {worker: 'not begun' if worker.state == 'new' else
                worker.unanswered() if worker.state == 'connecting' else
                'the command ran' if self.run.lives.any_of(worker, 'running') else
                'the command had not started'
                for worker in self.run.workers if not self.run.fleet.standing[worker].outcome}


def advise(run, peaks):
    """Yield a line for each kind of job that asked for far more memory than it used.

    peaks: {Allocation: ([MB], [MB of a GPU])} that jobs were seen to use
    """
    for allocation, (memory, gpu_memory) in peaks.items():
        less = allocation._replace(
            memory_mb=advised_mb(allocation.memory_mb, memory),
            gpu_memory_mb=allocation.gpu_memory_mb if allocation.reserve_gpu else
            advised_mb(allocation.gpu_memory_mb, gpu_memory))
        options = [(option, used, asked, new) for option, used, asked, new in (
            ('memory', memory, allocation.memory_mb, less.memory_mb),
            ('gpu-memory', gpu_memory, allocation.gpu_memory_mb, less.gpu_memory_mb))
            if new < asked]
        count = sum(1 for job in run.jobs.values() if job.allocation == allocation)
        for worker in run.scheduler.resources if options else ():
            before, _ = room_for(worker.capacity, allocation)
            after, _ = room_for(worker.capacity, less)
            if after > before and count > before:
                used = '; '.join(f'asked {asked} MB{" of a GPU" if "gpu" in option else ""}, '
                                 f'used at most {max(used)}'
                                 for option, used, asked, _ in options)
                words = ' '.join(f'--{option}-required={new}' for option, *_, new in options)
                yield f'{used}: with {words} {worker.name} would run {after} at once'
                break


def advised_mb(asked_mb, seen_mb):
    """Return what to ask for after such peaks: a good deal above them; asked_mb if not far off."""
    if not seen_mb:
        return asked_mb
    wanted = max(seen_mb) * 1.2
    step = 10 ** max(len(str(int(wanted))) - 1, 2) // (2 if wanted >= 1000 else 1)
    rounded = math.ceil(max(wanted, 1) / step) * step
    return rounded if rounded <= asked_mb / 2 else asked_mb


def removal_of(names):
    """Return the shell command that removes the results of these jobs, as short as may be."""
    numbers, words = collections.defaultdict(list), []
    for name in names:
        stem, _, end = name.rpartition('.')
        if end.isdigit():
            numbers[stem].append(int(end))
        else:
            words.append(name)
    for stem, found in numbers.items():
        ranges = []
        for number in sorted(found):
            if ranges and ranges[-1][1] == number - 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        parts = [f'{low}' if low == high else f'{low},{high}' if high == low + 1 else
                 f'{{{low}..{high}}}' for low, high in ranges]
        text = ','.join(parts)
        words.append(f'{stem}.' + (f'{{{text}}}' if ',' in text else text))
    return 'rm -rf ' + ' '.join(f'job_results/{word}{{,.out,.err}}' for word in words)


# ---- Options: argv -> dict; strings die here ----

class Options(dict):
    """Option or <positional> -> value.  A list is a tuple, or None where it was not given.

    given: the names of the options that the command line has; the others have their defaults.
    """
    given = frozenset()

    def number(self, name, *, above=None, least=None, most=None):
        """Return option `name` as a float within the bounds."""
        try:
            value = float(self[name])
        except ValueError:
            value = math.nan
        fits = (math.isfinite(value) and (above is None or value > above)
                and (least is None or value >= least) and (most is None or value <= most))
        if not fits:
            bounds = [f'above {above}' if above is not None else f'of at least {least}']
            bounds += [f'at most {most}'] if most is not None else []
            raise UsageError(f'{name} must be a number {" and ".join(bounds)}, not {self[name]!r}.')
        return value

    def whole_number(self, name, **bounds):
        """Return option `name` as an int within the bounds."""
        value = self.number(name, **bounds)
        if value != int(value):
            raise UsageError(f'{name} must be a whole number, not {self[name]!r}.')
        return int(value)


def option_kinds(usage):
    """Return {option: 'flag' | 'value' | 'list'} as the usage text describes them."""
    kinds = {}
    for line in usage.splitlines():
        match = re.match(r'  (-\w )?(--[a-z-]+)(=<\w+>)?(\.\.\.)?(  |$)', line)
        if match:
            kind = 'list' if match[4] else 'value' if match[3] else 'flag'
            kinds[match[2]] = kind
            if match[1]:
                kinds[match[1].strip()] = kind
    return kinds


def spell_out(argv, kinds, positionals):
    """Return (argv as docopt reads it, the names of the options in it).

    docopt reads --option=value, with one word of a list each, then -- and the other words.
    A list has all words up to the next option; `--` ends it; one without words is `--option=`.
    Words that are missing at the end are taken back from the last list: `--machines a b batch.sh`.
    """
    options, words = [], []             # options: (name, its values, or None for a flag)
    unread = collections.deque(argv)
    values = words                      # where the next word belongs
    while unread:
        word = unread.popleft()
        if word == '--':
            words += unread
            break
        if word.startswith('-') and word != '-':
            options.append(read_option(word, unread, kinds, {name for name, _ in options}))
            name, values = options[-1]
            values = values if kinds[name] == 'list' else words
        else:
            values.append(word)
    lists = [values for name, values in options if kinds[name] == 'list']
    missing = positionals - len(words)
    if lists and missing > 0:
        kept = max(len(lists[-1]) - missing, 0)
        words += lists[-1][kept:]
        del lists[-1][kept:]
    spelled = []
    for name, values in options:
        spelled += [name] if values is None else [f'{name}={value}' for value in values or ['']]
    return [*spelled, '--', *words], {name for name, _ in options}


def read_option(word, unread, kinds, before):
    """Return (name, its values, or None for a flag) of an option.

    unread: the words behind it, from which its value is taken; before: the options before it
    """
    name, equals, value = word.partition('=')
    if name not in kinds:
        raise UsageError(f'unknown option {name}{nearest(name, kinds)}.')
    if kinds[name] == 'list':
        return name, [value] if value else []
    if name in before:
        raise UsageError(f'{name} is there twice.')
    if kinds[name] == 'flag':
        if equals:
            raise UsageError(f'{name} takes no value.')
        return name, None
    if not equals:
        if not unread:
            raise UsageError(f'{name} needs a value.')
        value = unread.popleft()
    return name, [value]


def check_for_help(usage, command, words):
    """Raise HelpAsked if the words ask for help or the version."""
    if {'-h', '--help'} & {*words}:
        raise HelpAsked(usage.rstrip())
    if '--version' in words:
        raise HelpAsked(f'{command} {__version__}')


def read_options(usage, argv, may_help=True):
    """Return the Options of argv (without the program's name) by the usage text."""
    try:
        return parse_options(usage, argv, may_help)
    except UsageError as error:
        error.usage = usage
        raise


def parse_options(usage, argv, may_help):
    """Return the Options of argv; a UsageError of it does not have the usage text yet."""
    kinds = option_kinds(usage)
    pattern = usage.partition('Usage:')[2].partition('\n\n')[0]
    command = pattern.split()[0]
    positionals = re.findall(r'(?<![=\w])<(\w+)>', pattern)
    # Options that stand in the place of a word, as in (<word> | --this) or (--this | --that).
    instead = set(re.findall(r'(--[a-z-]+)=<\w+>(?= \||\))', pattern))
    if spell_out(argv, kinds, 0)[1] & instead:
        positionals = []
    spelled, given = spell_out(argv, kinds, len(positionals))
    if may_help:
        check_for_help(usage, command, given)
    words = spelled[spelled.index('--') + 1:]
    if len(words) < len(positionals):
        raise UsageError(f'<{positionals[len(words)]}> is missing.')
    if len(words) > len(positionals):
        raise UsageError(f'unexpected word {words[len(positionals)]!r}.')
    docopt = library('docopt')
    try:
        if not positionals:
            spelled.remove('--')        # docopt takes it for a word
        # docopt and docopt-ng name these differently: no help, no version, options anywhere.
        parsed = docopt.docopt(usage, spelled, False, None, False)
    except docopt.DocoptExit as error:
        unmatched = re.findall(r"Option\([^()]*'(--[a-z-]+)'", str(error))
        if unmatched:
            raise UsageError(f'{" and ".join(sorted({*unmatched}))} cannot be given with '
                             f'{" and ".join(sorted(given & instead - {*unmatched}))}.') from None
        raise UsageError(str(error).partition('Usage:')[0].strip() or 'wrong options.') from None
    options = Options(parsed)
    for name, kind in kinds.items():
        if kind == 'list':
            values = tuple(value for value in options[name] if value)
            options[name] = values if name in given else None
    options.given = frozenset(given)
    return options


# ---- Machine files ----

MACHINE_FOLDER = '~/.local/var'
# ssh takes the rest of the line as the value of these options, quotes included.
UNQUOTED_SSH_OPTIONS = ('proxycommand', 'localcommand', 'remotecommand', 'knownhostscommand',
                        'proxyjump')
HOST = re.compile(r'[A-Za-z0-9_][A-Za-z0-9._%-]*|(?=.*:.*:)[0-9a-fA-F:.]+(%[A-Za-z0-9_.-]+)?')


def is_text(value):
    """Tell whether the value is text that can cross to a machine."""
    return isinstance(value, str) and not re.search('[\0\ud800-\udfff]', value)


def is_word(value):
    """Tell whether the value is printable text that no program takes for an option."""
    return is_text(value) and value and not value.startswith('-') and value.isprintable()


def fits_quotes(value):
    """Tell whether the value can stand between quotes in an ssh_config, which has no escapes."""
    return not re.search(r'["\\]', str(value))


def is_whole_number(value, least=1, most=math.inf):
    """Tell whether the value is an int (True is one of Python's) within the bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def are_variables(value):
    """Tell whether the value is a mapping of names of variables to text or numbers."""
    return isinstance(value, dict) and all(
        is_text(k) and re.fullmatch(r'[A-Za-z_][A-Za-z0-9_]*', k)
        and (isinstance(v, (int, float)) or is_text(v)) for k, v in value.items())


def are_ssh_options(value):
    """Tell whether the value is a mapping of ssh_config(5) options that may stand in ours."""
    return are_variables(value) and all(
        name.lower() not in ('host', 'match', 'include') and str(v).isprintable()
        and (name.lower() in UNQUOTED_SSH_OPTIONS or fits_quotes(v)) for name, v in value.items())


def are_jumps(value):
    """Tell whether the value is a list of jump hosts, as ProxyJump has it."""
    return is_word(value) and all(JUMP.fullmatch(part) for part in value.split(','))


def are_gpus(value):
    """Tell whether the value is a list of indices of GPUs."""
    return isinstance(value, list) and all(is_whole_number(index, least=0) for index in value)


# Key of a machine's file -> (a description of its value for messages, the test of the value).
MACHINE_KEYS = {
    'ip': ('a host name or address', lambda v: is_text(v) and HOST.fullmatch(v)),
    'username': ('a user name', lambda v: is_text(v) and USER.fullmatch(v)),
    'port': ('a number from 1 to 65535', lambda v: is_whole_number(v, most=65535)),
    'ssh_key_path': ('the path of a private key, without quotes or backslashes',
                     lambda v: is_word(v) and fits_quotes(v)),
    'name': ('a name without control characters', is_word),
    'proxy_jump': ('[user@]host[:port], or several with commas', are_jumps),
    'ssh_options': ('a mapping of ssh_config(5) options to values', are_ssh_options),
    'workdir': ('an absolute path, or one that begins with ~/',
                lambda v: is_word(v) and re.match(r'/|~/|~$', v)),
    'setup': ('bash commands', is_text),
    'env': ('a mapping of variables to values', are_variables),
    'gpus': ('a list of GPU numbers', are_gpus),
    'max_jobs': ('a number of at least 1', is_whole_number),
}


def read_machine_file(path, name):
    """Return the Machine that the YAML file at `path` describes."""
    yaml = library('yaml')
    loader, node = parse_yaml(path)
    if not isinstance(node, yaml.MappingNode):
        raise MachineFileError(f'{path}: a machine file has lines such as "ip: lab1".')
    values = {}
    for key_node, value_node in node.value:
        key, where = key_node.value, f'{path}, line {key_node.start_mark.line + 1}'
        if not isinstance(key, str):
            raise MachineFileError(f'{where}: a key must be a word.')
        if key not in MACHINE_KEYS:
            raise MachineFileError(f'{where}: unknown key {key!r}{nearest(key, MACHINE_KEYS)}.')
        if key in values:
            raise MachineFileError(f'{where}: {key} is there twice.')
        values[key] = read_machine_value(loader, key, value_node, where)
    if 'ip' not in values:
        raise MachineFileError(f'{path}: the key ip (host name or address) is missing.')
    return machine_from(values, name, path)


def parse_yaml(path):
    """Return (loader, root node) of a YAML file; nodes know their lines."""
    yaml = library('yaml')
    try:
        with open(path, 'rb') as file:
            data = file.read()
        text = data.decode()
        loader = yaml.SafeLoader(text)
        return loader, loader.get_single_node()
    except OSError as error:
        raise MachineFileError(f'{path}: cannot be read: {reason_of(error)}.') from None
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise MachineFileError(f'{path}, line {line}: this is not UTF-8 text.') from None
    except yaml.reader.ReaderError as error:
        line = text.count('\n', 0, error.position) + 1
        raise MachineFileError(f'{path}, line {line}: there is a control character.') from None
    except yaml.MarkedYAMLError as error:
        line, what = explain_yaml(error, text)
        raise MachineFileError(f'{path}, line {line}: {sentence(what)}') from None
    except RecursionError:
        raise MachineFileError(f'{path}: this is nested too deeply.') from None
    except (ValueError, OverflowError):     # of chr(), for "\UFFFFFFFF"
        raise MachineFileError(f'{path}: an escape in it stands for no character.') from None


def read_machine_value(loader, key, node, where):
    """Return the checked value of a key.  where: the file and the line, for messages."""
    try:
        value = loader.construct_object(node, deep=True)
    except library('yaml').YAMLError as error:
        raise MachineFileError(f'{where}: {key}: {error.problem}.') from None
    except Exception:       # yaml itself fails at, say, 2020-13-32 or !!int x
        raise MachineFileError(f'{where}: {key}: its value is not YAML.') from None
    expected, fits = MACHINE_KEYS[key]
    if not fits(value):
        raise MachineFileError(f'{where}: {key} must be {expected}, not {value!r:.200}.')
    if isinstance(value, dict):     # as text, since the file may say 010 or 1.10
        return {name.value: text.value for name, text in node.value}
    return value


def explain_yaml(error, text):
    """Return (number of the line, what is wrong there) of a YAML error.

    YAML notices a missing colon, quote or bracket only at what follows, often in the next line.
    """
    yaml = library('yaml')
    mark, what = error.problem_mark or error.context_mark, f'this is not YAML: {error.problem}'
    scalars = []
    with contextlib.suppress(yaml.YAMLError):
        for token in yaml.scan(text):
            if isinstance(token, yaml.ScalarToken) and token.start_mark.index < mark.index:
                scalars.append(token.start_mark)
    unended = error.context_mark and re.match('while (scanning|parsing a flow)', error.context)
    begins = error.context_mark if unended else scalars[-1] if scalars else mark
    line_break = r'[\r\n\x85\u2028\u2029]'
    before = re.split(line_break, text[:begins.index])[-1]
    line = re.split(line_break, text[begins.index:])[0]
    line = re.split(r'\s#', line)[0].rstrip()
    is_key = not before.strip() and not re.search(r':(\s|$)|^[\[{]', line)     # but for a colon
    if is_key:
        return begins.line + 1, f'this is not "key: value": {line!r:.200}'
    return (begins if unended else mark).line + 1, what


def machine_from(values, name, path):
    """Return the Machine that a file's checked values describe; check its key file."""
    key_path = values.get('ssh_key_path')
    if key_path is not None:
        key_path = os.path.expanduser(key_path)
        check_key(key_path, path)
    return Machine(
        name=values.get('name', name), host=values['ip'], username=values.get('username'),
        port=values.get('port', 22), ssh_key_path=key_path, proxy_jump=values.get('proxy_jump'),
        ssh_options=tuple(values.get('ssh_options', {}).items()),
        workdir=values.get('workdir', ''), setup=values.get('setup', ''),
        env=tuple(values.get('env', {}).items()),
        gpus=tuple(values['gpus']) if 'gpus' in values else None, max_jobs=values.get('max_jobs'))


def check_key(key_path, path):
    """Raise if ssh could not use this private key without a question; ssh's words are less clear.

    path: the machine's file
    """
    where = f'{path}: the key {key_path}'
    try:
        with open(key_path, 'rb') as file:
            info, text = os.fstat(file.fileno()), file.read(65536)
    except OSError as error:
        raise MachineFileError(f'{where} cannot be read: {reason_of(error)}. '
                               'Make one with ssh-keygen, or correct ssh_key_path.') from None
    if not stat.S_ISREG(info.st_mode):
        raise MachineFileError(f'{where} is not a file.')
    if info.st_uid == os.getuid() and info.st_mode & 0o077:
        raise MachineFileError(f'{where} can be read by others, so ssh refuses it. '
                               f'Try: chmod 600 {key_path}')
    if b'PRIVATE KEY' not in text:
        hint = ' (this looks like the public key: leave out .pub)' if text[:4] in (
            b'ssh-', b'ecds', b'sk-s', b'sk-e') else ''
        raise MachineFileError(f'{where} is not a private key{hint}.')
    if key_has_passphrase(text):
        raise MachineFileError(f'{where} has a passphrase, which nobody could type here. Use a key '
                               'without one, or leave out ssh_key_path and load it in ssh-agent.')


def key_has_passphrase(text):
    """Tell whether the private key file `text` (bytes) is encrypted.

    The OpenSSH format names the cipher right after its magic (PROTOCOL.key in OpenSSH's source);
    the older PEM formats say ENCRYPTED.
    """
    import base64
    import binascii
    if b'BEGIN OPENSSH PRIVATE KEY' not in text:
        return b'ENCRYPTED' in text
    body = b''.join(line for line in text.splitlines() if b'-----' not in line)
    try:
        blob = base64.b64decode(body)
    except binascii.Error:
        return False
    magic = b'openssh-key-v1\0'
    return blob.startswith(magic) and blob[len(magic):].split(b'none', 1)[0] != b'\0\0\0\4'


def machine_paths(word):
    """Return the paths at which a machine file of this name may be."""
    folder = os.path.expanduser(MACHINE_FOLDER)
    return [word, f'{word}.yaml', os.path.join(folder, word), os.path.join(folder, f'{word}.yaml')]


def find_machine(word):
    """Return the Machine for one word of --machines; see its help text."""
    if word in ('localhost', ':'):
        if not LINUX:
            raise MachineFileError(f'{word}: jobs run on Linux machines only, and this is '
                                   f'{os.uname().sysname}. Name a machine that ssh can reach.')
        return Machine(name=word)
    candidates = machine_paths(word)
    for path in candidates:
        if os.path.isfile(path):
            return read_machine_file(path, word)
    if word.endswith(('.yaml', '.yml')) or '/' in word:
        raise MachineFileError(f'there is no machine file {word}, nor {candidates[2]}.')
    return machine_at(word)


def machine_at(word):
    """Return the Machine that [user@]host[:port] names."""
    user, at, host = word.rpartition('@')
    match = re.fullmatch(r'\[(.+)\](?::([0-9]{1,9}))?|([^:]*)(?::([0-9]{1,9}))?', host)
    host, port = (match[1] or match[3], match[2] or match[4]) if match else (host, None)
    if not HOST.fullmatch(host) or at and not USER.fullmatch(user) or (
            port and not 1 <= int(port) <= 65535):
        raise MachineFileError(f'{word!r} is neither a machine file nor [user@]host[:port].')
    return Machine(name=word, host=host, username=user or None, port=int(port) if port else None)


def machine_words(words):
    """Yield the words, and in the place of each @file its lines."""
    for word in words:
        if not word.startswith('@'):
            yield word
            continue
        try:
            with open(word[1:], encoding='utf-8') as file:
                lines = [line.strip() for line in file]
        except OSError as error:
            raise MachineFileError(f'the list of machines {word} cannot be read: '
                                   f'{reason_of(error)}.') from None
        except UnicodeDecodeError:
            raise MachineFileError(f'the list of machines {word} is not UTF-8 text.') from None
        lines = [line for line in lines if line and not line.startswith('#')]
        if not lines:
            raise MachineFileError(f'the list of machines {word} names none.')
        yield from lines


HERE_TOO = ' localhost is one.' if LINUX else ''


def check_machines(options, positional=None):
    """Raise unless machines are named.  positional: the word that may be missing instead."""
    if options['--machines'] is None:
        raise UsageError(f'--machines is missing: which machines?{HERE_TOO}')
    if not options['--machines']:
        raise UsageError('--machines names none' + (
            f', or <{positional}> is missing.' if positional else '.'))


def find_machines(words):
    """Return (the Machines, sentences on wrong machine files); raise where all files are wrong.

    A machine whose file is wrong is left out, so that the others can work.  A word that names
    nothing is an error, since a typing error should be seen before hours of work, and so is a
    machine that is named twice.
    """
    machines, wrong = [], {}
    for word in machine_words(words):
        try:
            machine = find_machine(word)._replace(word=word)
        except MachineFileError as error:
            if not any(os.path.lexists(path) and not os.path.isdir(path)
                       for path in machine_paths(word)):
                raise
            machine = Machine(word, f'file of {word}')      # an address that no other has
            wrong[word] = str(error)
        for other in machines:
            if machine.name == other.name:
                raise MachineFileError(f'the machine {machine.name} is named twice.')
            if machine.address == other.address:
                raise MachineFileError(f'{other.name} and {machine.name} are the same account, '
                                       f'{machine.address}: name one of them.')
        machines.append(machine)
    if wrong and len(wrong) == len(machines):
        raise MachineFileError('\n'.join(wrong.values()))
    return [machine for machine in machines if machine.name not in wrong], [*wrong.values()]


# ---- Batch files ----

def read_batch_text(path, stdin):
    """Return the text of the batch file; '-' is `stdin` (a binary stream)."""
    try:
        if path == '-':
            data = stdin.read()
        else:
            with open(path, 'rb') as file:
                data = file.read()
    except OSError as error:
        raise BatchFileError(f'the batch file {path} cannot be read: {reason_of(error)}.') from None
    try:
        text = data.decode().removeprefix('\ufeff')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise BatchFileError(f'{path}, line {line}: this is not UTF-8 text.') from None
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise BatchFileError(f'{path}, line {line}: there is a NUL character.')
    return text


def split_batch(text):
    """Yield (number of the first line, command) of each command of a batch file.

    Blank lines and lines that begin with # count, but are no commands.  A backslash at the end of
    a line continues the command; the command keeps it, since bash reads it in the same way.
    """
    command, first = '', 0
    for number, line in enumerate(text.replace('\r\n', '\n').split('\n'), 1):
        if not command:
            first = number
            if not line.strip() or line.lstrip().startswith('#'):
                continue
        command += line
        if (len(line) - len(line.rstrip('\\'))) % 2:
            command += '\n'
            continue
        yield first, command
        command = ''
    if command:
        yield first, command.rstrip('\n').rstrip('\\')


def name_of_batch(path):
    """Return how names of jobs begin: example/batch.sh -> example_batch.sh, - -> stdin."""
    if path == '-':
        return 'stdin'
    parts = [part for part in os.path.normpath(path).split('/') if part not in ('', '..')]
    return re.sub(r'[^A-Za-z0-9._+=@%-]', '_', '_'.join(parts)).lstrip('.-')[-150:] or 'batch'


def check_job_name(name, where, most=180):
    """Raise unless the name is a file name that is safe here and on machines.

    most: characters; fewer than file systems allow, since the program makes NAME-2 of NAME
    """
    if not re.fullmatch(r'[A-Za-z0-9_+=@%][A-Za-z0-9._+=@%-]*', name) or len(name) > most:
        raise BatchFileError(f'{where}: the job name {name!r} must have letters, digits and '
                             f'. _ - + = @ % only, at most {most}, and not begin with . or -.')


def read_allocation(options, base=None):
    """Return the Allocation that the options ask for; those given change `base`, if any."""
    def number(name, fallback, read=options.number, **bounds):
        if base and name not in options.given:
            return fallback
        return read(name, **bounds)

    start = base or Allocation()
    if options['--no-gpu-required'] and '--num-gpus' in options.given:
        raise UsageError('--no-gpu-required and --num-gpus: give one of them.')
    gpus = number('--num-gpus', start.gpus, options.whole_number, least=0)
    return Allocation(
        cores=number('--num-cpus', start.cores, above=0),
        memory_mb=math.ceil(number('--memory-required', start.memory_mb, least=0)),
        reserve=options['--reserve'] or start.reserve,
        gpus=0 if options['--no-gpu-required'] else gpus,
        gpu_memory_mb=math.ceil(number('--gpu-memory-required', start.gpu_memory_mb, least=0)),
        gpu_utilization=number('--gpu-utilization', start.gpu_utilization, above=0, most=1),
        reserve_gpu=start.reserve_gpu and not options['--no-reserve-gpu'])


def read_forwards(options, base=None):
    """Return the Forwards that the options ask for; those given change `base`, if any."""
    base = base or Forwards()

    def pick(name, fallback):
        return fallback if options[name] is None else options[name]

    return Forwards(
        copy=inside_paths(pick('--copy-forwards', base.copy), '--copy-forwards'),
        link=inside_paths(pick('--link-forwards', base.link), '--link-forwards'),
        exclude=pick('--exclude', base.exclude))


def inside_paths(paths, option):
    """Return the paths normalised; each must lie inside the current folder."""
    inside = []
    for path in paths:
        normal = os.path.normpath(path)
        if os.path.isabs(normal):
            normal = os.path.relpath(normal)
        if normal == '..' or normal.startswith('../'):
            raise FilesError(f'{option} {path}: this lies outside the current folder, and a job '
                             'has a copy of that only. Start from a folder that holds it.')
        inside.append(normal)
    return tuple(dict.fromkeys(inside))


def read_jobs(path, text, options, warn):
    """Return the Jobs of a batch file's text.  warn: called with a sentence."""
    stem, whole = name_of_batch(path), read_allocation(options)
    forwards, backwards = read_forwards(options), read_backwards(options)
    jobs, lines = [], {}
    for line, command in split_batch(text):
        where = f'{path}, line {line}'
        job = Job(f'{stem}.{line}', command, line, whole, forwards, backwards)
        if re.match(r'\s*execute_remote(\s|$)', command):
            job = read_partial(job, where, warn)
        check_job_name(job.name, where)
        if job.name in lines:
            raise BatchFileError(f'{path}: the lines {lines[job.name]} and {line} have the same '
                                 f'job name {job.name}; give one of them another --job-name.')
        lines[job.name] = line
        jobs.append(job)
    if not jobs:
        raise BatchFileError(f'the batch file {path} has no command.')
    for name in lines:
        stem, end = os.path.splitext(name)
        if end in ('.out', '.err') and stem in lines:
            raise BatchFileError(f'{path}: the results of the job {name}, line {lines[name]}, '
                                 f'would lie where {stem}, line {lines[stem]}, has a stream; give '
                                 'one of them another --job-name.')
    return jobs


# Options of a line that change the results of its job.  With its command they identify it in a
# later run of the batch.  Memory is not among them, nor are the options of the whole batch: more
# memory for all lines must not run 400 of them again.
DECISIVE_OPTIONS = ('--copy-forwards', '--link-forwards', '--exclude', '--copy-backwards',
                    '--num-gpus', '--no-gpu-required', '--reserve')


def without_continuations(command):
    """Return the command with continued lines joined as bash joins them; shlex would not."""
    def join(quoted):
        if quoted[0][0] == "'":
            return quoted[0]
        return re.sub(r'(?s)\\(.)', lambda m: '' if m[1] == '\n' else m[0], quoted[0])

    return re.sub(r"""(?s)'[^']*'|"(?:\\.|[^"\\])*"|\\.""", join, command)


def read_partial(job, where, warn):
    """Return the job as its line, an execute_remote command, changes it."""
    import shlex
    try:
        words = shlex.split(without_continuations(job.command))
        options = read_options(EXECUTE_REMOTE_USAGE, words[1:], may_help=False)
        if options['--machine'] is not None:
            warn(f'{where}: --machine is ignored: machines are allocated automatically')
        for name in options.given & {'--stdin', '--tty', '--detach', '--attach', '--cancel',
                                     '--nice', '--away-limit', '--verbose'}:
            raise UsageError(f'{name} has no meaning in a batch file.')
        backwards = options['--copy-backwards']
        return job._replace(
            name=options['--job-name'] or job.name, command=options['<command>'],
            allocation=read_allocation(options, job.allocation),
            forwards=read_forwards(options, job.forwards),
            backwards=job.backwards if backwards is None else read_backwards(options),
            own=' '.join(f'{name}={json.dumps(options[name])}' for name in DECISIVE_OPTIONS
                         if name in options.given))
    except (SchedulerError, ValueError) as error:
        raise BatchFileError(f'{where}: execute_remote: {sentence(str(error))} '
                             'The command is one word, in quotes.') from None


def read_backwards(options):
    """Return the paths that a job brings back; None for all files that it made or changed."""
    paths = options['--copy-backwards']
    return paths if paths is None else inside_paths(paths, '--copy-backwards')


# Simple commands with plain words, which bash accepts for certain.  They need no SYNTAX_CHECK, in
# which each line costs a fork: 0.2 s for 400 lines.
PLAIN_WORD = r"""(?:[^\s\\"'`$&|;<>(){}[\]!#]|\$\w+|"(?:[^"\\`$]|\$\w+)*"|'[^']*')+"""
PLAIN_COMMAND = (r'(?!(?:if|then|elif|else|fi|for|select|while|until|do|done|case|esac|in|function|'
                 r'time|coproc)(?![^\s;&|<>]))' + PLAIN_WORD +
                 rf'(?:[ \t]+{PLAIN_WORD}|[ \t]*(?:>[>&]?|<|&>>?)[ \t]*{PLAIN_WORD})*')
PLAIN_LINE = re.compile(
    rf'[ \t]*{PLAIN_COMMAND}(?:[ \t]*(?:;|&&|\|\|?)[ \t]*{PLAIN_COMMAND})*[ \t]*[;&]?[ \t]*')

# Reads commands that end with NUL; prints, also with a NUL, the number of each that bash refuses
# and why.  Behind set -n nothing is run.  Each command has a subshell of its own, since one could
# complete another if they were read together.  A bash before 4.0, as on macOS, refuses too much.
SYNTAX_CHECK = r"""
((BASH_VERSINFO[0] >= 4)) || exit
number=0
while IFS= read -rd '' command; do
  said=$({ eval $'set -n\n'"$command"; } 2>&1) || printf '%s %s\0' "$number" "$said"
  number=$((number + 1))
done
"""


def refuse_syntax(path, jobs, said):
    """Raise if bash refuses a command of the jobs.  said: what SYNTAX_CHECK printed (bytes)."""
    complaints = [text.split(' ', 1) for text in said.decode('utf-8', 'replace').split('\0')[:-1]]
    if complaints:
        first_line = complaints[0][1].split('\n')[0]       # bash: eval: line 2: why
        why = printable(first_line.rpartition(': line ')[2].partition(': ')[2])
        where = lines_of([jobs[int(number)] for number, _ in complaints])
        raise BatchFileError(
            sentence(f'{path}, {where}: bash refuses this: {why}') + ' Each line runs by itself: '
            'write an if, a loop or a function on one line, or end each of its lines but the last '
            'with a backslash.')


# (Pattern of commands that change only the shell that runs them, whether `setup` of a machine file
# can have them instead).
SETTINGS = (
    (r'(export|source|\.|declare|typeset|unset|eval) .+', True),
    (r'((?:conda|mamba|micromamba|pyenv) (?:activate|deactivate|shell)|(?:spack|ml|module) '
     r'(?:load|add|use|unload|rm|swap|switch|purge)|ml|workon)( .*)?', True),
    (r'(cd|pushd|popd)( .*)?', False),
    (r'(set|shopt|alias|unalias|ulimit|umask|trap) .+', False),
    (r'(NAME=value)( NAME=value)*', False))


def setting_of(command):
    """Return (how the command begins, whether `setup` can have it) if it only changes its shell.

    None for any other command.
    """
    import shlex
    lexer = shlex.shlex(without_continuations(command), posix=True, punctuation_chars=';&|()<>')
    lexer.whitespace_split = True
    parts = [[]]
    try:
        for word in lexer:
            if word in (';', '&&', '||'):
                parts.append([])
            elif not word.strip(';&|()<>'):
                return None                 # a pipe, a subshell or the like
            else:
                parts[-1].append('NAME=value' if re.match(r'[A-Za-z_]\w*\+?=', word) else
                                 re.sub(r'\s', '_', word))
    except ValueError:
        return None
    found = [match_setting(' '.join(part)) for part in parts if part]
    return found[0] if found and all(found) else None


def match_setting(command):
    """Return (how the command begins, whether `setup` can have it) by SETTINGS, or None."""
    for pattern, by_setup in SETTINGS:
        match = re.fullmatch(pattern, command)
        if match:
            return match[1], by_setup
    return None


def warn_of_settings(path, jobs, warn):
    """Warn, once for each kind, of lines that do nothing since each line has its own shell."""
    kinds = collections.defaultdict(list)
    for job in jobs:
        kinds[setting_of(job.command)].append(job)
    kinds.pop(None, None)
    for (begin, by_setup), useless in kinds.items():
        also = ', or put it into setup: of the machine file' if by_setup else ''
        warn(f'{path}, {lines_of(useless)}: {begin} alone changes nothing for the other lines, '
             f'since each line runs by itself. Write {begin} … && command on one line{also}')


def lines_of(jobs):
    """Return 'line 3', 'lines 3 and 7', or 'lines 3, 7 and 20 more'."""
    numbers = [str(job.line) for job in jobs]
    if len(numbers) > 5:
        numbers[4:] = [f'{len(numbers) - 4} more']
    if len(numbers) == 1:
        return f'line {numbers[0]}'
    return f'lines {", ".join(numbers[:-1])} and {numbers[-1]}'


# ---- Files to send: a walk with rsync's rules ----

NEVER_SENT = ('.git', 'job_results')
FILTER_FILE = '.rsync-filter'


class Rule(NamedTuple):
    """One exclude (or include) rule of rsync's.

    base: '', or 'folder/' of the folder whose filter file has the rule
    """
    include: bool
    folders_only: bool
    elements: int                   # how many of the path's last names it compares; 0: all
    below_base: bool                # names are counted from the base, else from the current folder
    slash_before: bool              # so that **/a matches a, too
    slash_behind: bool              # so that a/*** matches the folder a
    matches: object                 # a compiled pattern, of bytes as characters
    base: str

    def applies(self, path, is_folder):
        """Tell whether the rule matches this path (bytes_as_text), from the current folder."""
        if self.folders_only and not is_folder or not path.startswith(self.base):
            return False
        path = path[len(self.base):] if self.below_base else path
        if self.elements:
            names = path.rsplit('/', self.elements)[-self.elements:]
            if len(names) < self.elements:
                return False
            path = '/'.join(names)
        path = '/' * self.slash_before + path + '/' * (self.slash_behind and is_folder)
        return bool(self.matches.fullmatch(path))


def bytes_as_text(path):
    """Return one character for each byte of the path, since rsync compares bytes."""
    return os.fsencode(path).decode('latin-1')


def compile_rule(pattern, include=False, base=''):
    """Return the Rule of an rsync pattern (rsync(1), PATTERN MATCHING RULES)."""
    folders_only = pattern.endswith('/')
    body = bytes_as_text(pattern[:-1] if folders_only else pattern)
    anchored = body.startswith('/')
    wild = bool(re.search(r'[*?[]', body))      # without any of these, a backslash is a backslash
    text = wildcards(body[anchored:]) if wild else re.escape(body[anchored:])
    stars = '**' in body
    slash_before = body.startswith('**')
    if stars and not anchored and not slash_before:
        text = '(?:.*/)?' + text
    elements = 0 if anchored or stars else body.count('/') + 1
    return Rule(include, folders_only, elements, anchored, slash_before, body.endswith('***'),
                re.compile(text, re.DOTALL), bytes_as_text(base))


def wildcards(pattern):
    """Return the regular expression of an rsync pattern: * and ? stop at /, ** does not."""
    out, index = [], 0
    while index < len(pattern):
        char = pattern[index]
        index += 1
        if char == '*':
            stars = 1
            while pattern[index:index + 1] == '*':
                stars, index = stars + 1, index + 1
            out.append('[^/]*' if stars == 1 else '.*')
        elif char == '?':
            out.append('[^/]')
        elif char == '[':
            body, index = bracket(pattern, index)
            out.append(body)
        elif char == '\\':
            out.append(re.escape(pattern[index]) if index < len(pattern) else NOTHING)
            index += 1
        else:
            out.append(re.escape(char))
    return ''.join(out)


NOTHING = '(?!)'            # an incomplete pattern matches nothing
CLASSES = {'alpha': 'A-Za-z', 'digit': '0-9', 'alnum': 'A-Za-z0-9', 'upper': 'A-Z', 'lower': 'a-z',
           'space': r' \t-\r', 'xdigit': '0-9A-Fa-f', 'punct': r'!-/:-@\[-`{-~', 'blank': r' \t',
           'cntrl': r'\x00-\x1f\x7f', 'graph': '!-~', 'print': ' -~'}


def bracket(pattern, index):
    """Return (regular expression, next index) of the [...] whose [ stands before `index`."""
    negate = pattern[index:index + 1] in ('!', '^')
    first = index = index + negate
    out, low = [], ''           # low: the character with which a - begins a range
    while index < len(pattern) and (pattern[index] != ']' or index == first):
        char, index = pattern[index], index + 1
        name = re.match(r':([^]]*):\]', pattern[index:]) if char == '[' else None
        if name:
            out.append(CLASSES.get(name[1]))
            low, index = '', index + name.end()
            continue
        is_range = char == '-' and low and pattern[index:index + 1] not in ('', ']')
        if is_range:
            char, index = pattern[index], index + 1
        if char == '\\':
            char, index = pattern[index:index + 1], index + 1
        if is_range:
            out.append(f'{re.escape(low)}-{re.escape(char)}' if low <= char else '')
            low = ''
        else:
            out.append(re.escape(char))
            low = char
    if index >= len(pattern) or None in out:
        return NOTHING, len(pattern)
    return f'(?!/)[{"^" if negate else ""}{"".join(out)}]', index + 1


FILTER_WORDS = {'exclude': '-', 'include': '+', 'hide': 'H', 'show': 'S', 'protect': 'P',
                'risk': 'R', 'clear': '!'}


def read_filter_file(folder, path):
    """Return (the Rules of a folder's .rsync-filter, whether it clears those of folders above).

    path: the folder relative to the current one, '' for that itself
    """
    name = os.path.join(folder, FILTER_FILE)
    try:
        with open(name, 'rb') as file:
            lines = re.split('[\r\n]', os.fsdecode(file.read()))
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise FilesError(f'{name} cannot be read: {reason_of(error)}.') from None
    rules, cleared, base = [], False, f'{path}/' if path else ''
    for number, line in enumerate(lines, 1):
        if not line.strip() or line[0] in '#;':
            continue
        rule = parse_filter_line(line)
        if rule is None:
            raise FilesError(f'{name}, line {number}: {printable(line)!r}: only include, exclude, '
                             'hide, show, protect, risk and clear rules are understood here.')
        kind, modifiers, pattern = rule
        only_receiver = 'r' in modifiers and 's' not in modifiers
        if kind == '!':
            rules, cleared = [], True
        elif kind in '-+HS' and not only_receiver:      # P and R are the receiver's, too
            rules.append(compile_rule(pattern, kind in '+S', base))
    return rules, cleared


def parse_filter_line(line):
    """Return (a sign of FILTER_WORDS, its modifiers, pattern) of a rule; None if it is no rule."""
    match = re.match(r'([a-z]+|[-+HSPR!])(?:,?([spr]*))(?:[ _](.*))?$', line, re.DOTALL)
    kind = match and FILTER_WORDS.get(match[1], match[1])
    if not match or kind not in '-+HSPR!':
        return None
    complete = line == match[1] if kind == '!' else match[3]
    return (kind, match[2], match[3]) if complete else None


class Entry(NamedTuple):
    """A file ('f'), folder ('d') or symlink ('l') to send."""
    path: str
    kind: str
    size: int = 0
    mtime_ns: int = 0
    mode: int = 0
    target: str = ''


class Tree(NamedTuple):
    """The files to send: entries in an order in which each folder comes before what it holds."""
    entries: tuple
    left_out: tuple                 # why some are not sent, in words

    @property
    def files(self):
        """The number of files and links."""
        return sum(1 for entry in self.entries if entry.kind != 'd')

    @property
    def size(self):
        """The bytes of all files."""
        return sum(entry.size for entry in self.entries)


class Walk:
    """A walk through the files to send: it collects Entries, and why others are left out."""

    def __init__(self, exclude, option):
        self.entries = {}               # path -> Entry
        self.left_out = set()           # in words
        self._option = option           # for messages: who named the paths
        self._exclude = [compile_rule(pattern) for pattern in exclude]
        self._rules = {}                # folder -> the rules that hold inside it

    def add(self, path):
        """Add the path, the folders that lead to it, and what it holds; '': the current folder."""
        parts = path.split('/')
        for count in range(1, len(parts)):
            parent = '/'.join(parts[:count])
            self._note(parent, os.stat(parent), 'd')
        stack = [path]
        while stack:
            path = stack.pop()
            info = os.lstat(path or '.')
            kind = {stat.S_IFREG: 'f', stat.S_IFDIR: 'd', stat.S_IFLNK: 'l'}.get(
                stat.S_IFMT(info.st_mode))
            if path and not self._wanted(path, kind == 'd'):
                continue
            if kind is None:
                self.left_out.add('sockets, fifos and devices')
                continue
            self._check_readable(path, kind)
            if path:
                self._note(path, info, kind)
            if kind == 'd':
                names = os.listdir(path or '.')
                stack += [os.path.join(path, name) for name in sorted(names, reverse=True)]

    def _note(self, path, info, kind):
        target = os.readlink(path) if kind == 'l' else ''
        self.entries[path] = Entry(path, kind, info.st_size if kind == 'f' else 0,
                                   info.st_mtime_ns, stat.S_IMODE(info.st_mode), target)

    def _check_readable(self, path, kind):
        if kind == 'f' and not os.access(path, os.R_OK):
            raise FilesError(f'{self._option}: {path} may not be read. Leave it out with '
                             '--exclude.')
        if kind == 'd' and not os.access(path or '.', os.R_OK | os.X_OK):
            raise FilesError(f'{self._option}: the folder {path or "."} may not be read. Leave it '
                             'out with --exclude.')

    def _wanted(self, path, is_folder):
        """Tell whether the path is to be sent; note why not."""
        folder, _, name = path.rpartition('/')
        if name in NEVER_SENT:
            if path != 'job_results':       # the one in this folder is never sent, and always there
                self.left_out.add(name)
            return False
        text = bytes_as_text(path)
        for rule in [*self._exclude, *self._rules_inside(folder)]:
            if rule.applies(text, is_folder):
                if not rule.include:
                    self.left_out.add('what the exclude rules say')
                return rule.include
        return True

    def _rules_inside(self, folder):
        if folder not in self._rules:
            inherited = self._rules_inside(os.path.dirname(folder)) if folder else []
            own, cleared = read_filter_file(folder or '.', folder)
            self._rules[folder] = own if cleared else own + inherited
        return self._rules[folder]


def scan_tree(paths, exclude, option='--copy-forwards'):
    """Return the Tree of these paths, relative to the current folder.

    First .git and job_results are left out, then what `exclude` says, then what each folder's
    .rsync-filter does, nearest folder first; in each the first rule that applies decides.
    """
    walk = Walk(exclude, option)
    for path in paths:
        check_named(path, option)
        try:
            walk.add('' if path == '.' else path)
        except OSError as error:
            raise FilesError(f'{option} {path}: {error.filename} cannot be read: '
                             f'{reason_of(error)}.') from None
    return Tree(tuple(walk.entries.values()), tuple(sorted(walk.left_out)))


# A Manifest reads contents while logins are under way, and no more than it has time for then: of
# files up to CONTENT_BYTES, the CONTENTS smallest of them, CONTENTS_BYTES in all.
CONTENT_BYTES, CONTENTS, CONTENTS_BYTES = 64 * 1024, 5000, 32 * 2**20


class Manifest:
    """The files that a job was given, to be compared when a batch is continued later.

    files: {path: [mode, size, time of change in ns, digest of the content or '']}; files without a
    digest of their content are told apart by size and time
    digest: 16 hex digits of all that, without the times of files that have a digest
    """

    def __init__(self, files):
        import hashlib
        self.files = files
        rows = [[path, mode, size, content or ns]
                for path, (mode, size, ns, content) in sorted(files.items())]
        self.digest = hashlib.blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()

    @classmethod
    def of(cls, *trees):
        """Return the Manifest of the files of these Trees."""
        import hashlib
        entries = [entry for tree in trees for entry in tree.entries if entry.kind != 'd']
        read, total = {}, 0
        for entry in sorted(entries, key=lambda entry: (entry.size, entry.path))[:CONTENTS]:
            total += entry.size
            if entry.size > CONTENT_BYTES or total > CONTENTS_BYTES:
                break
            with contextlib.suppress(OSError):          # a file that is gone fails when it is sent
                content = os.fsencode(entry.target) if entry.kind == 'l' else None
                if content is None:
                    with open(entry.path, 'rb') as file:
                        content = file.read()
                read[entry.path] = hashlib.blake2b(content, digest_size=8).hexdigest()
        return cls({entry.path: [entry.mode, entry.size, entry.mtime_ns, read.get(entry.path, '')]
                    for entry in entries})

    def changed(self, older):
        """Return the paths that differ from an older Manifest, sorted."""
        def differ(path):
            one, other = self.files.get(path), older.files.get(path)
            if not (one and other) or one[:2] != other[:2]:
                return True
            return one[3] != other[3] if one[3] and other[3] else one[2] != other[2]

        return sorted(filter(differ, self.files.keys() | older.files.keys()))


SYSTEM_FOLDERS = ('/bin/', '/dev/', '/etc/', '/lib', '/proc/', '/sbin/', '/sys/', '/usr/')


def is_as_seen(entry):
    """Tell whether the file, folder or link of an Entry is as it was when the Entry was made."""
    try:
        info = os.lstat(entry.path)
    except OSError:
        return False
    same_size = entry.kind != 'f' or info.st_size == entry.size
    return (same_size and info.st_mtime_ns == entry.mtime_ns
            and stat.S_IMODE(info.st_mode) == entry.mode)


def present(entries):
    """Yield the Entries whose paths still exist, with the size, time and mode of files now."""
    for entry in entries:
        with contextlib.suppress(OSError):
            info = os.lstat(entry.path)
            yield entry if entry.kind != 'f' else entry._replace(
                size=info.st_size, mtime_ns=info.st_mtime_ns, mode=stat.S_IMODE(info.st_mode))


def lost_links(copy, link, linked):
    """Return the paths of the links in these Trees that lead somewhere here, and not on a machine.

    linked: the paths of --link-forwards, which are links from the one Tree into the other there.
    A link is lost if its target is not sent, or is a path of this computer; each machine has its
    own SYSTEM_FOLDERS.
    """
    # Path on the machine -> None, or the target of the link there; a tuple is from the top.
    targets = {}
    for part, tree in (('copy', copy), ('link', link)):
        for entry in tree.entries:
            targets[f'{part}/{entry.path}'] = entry.target if entry.kind == 'l' else None
    for path in linked:
        parts = path.split('/')
        targets.update((f'copy/{"/".join(parts[:count])}', None) for count in range(1, len(parts)))
        targets[f'copy/{path}'] = ('link', *parts)
    return [entry.path for part, tree in (('copy', copy), ('link', link)) for entry in tree.entries
            if entry.kind == 'l' and os.path.exists(entry.path)
            and not arrives(f'{part}/{entry.path}', targets)]


def arrives(path, targets):
    """Tell whether a path on the machine leads to something there.  targets: see lost_links."""
    top, *names = path.split('/')
    place, names = [top], names[::-1]       # the folder that was reached, and the names to come
    steps = 0
    while names:
        name = names.pop()
        if name == '..' and len(place) == 1:
            return False                    # out of all that was sent
        if name == '..':
            place.pop()
        if name in ('', '.', '..'):
            continue
        here, steps = '/'.join([*place, name]), steps + 1
        if here not in targets or steps > 10000:
            return False
        target = targets[here]
        if target is None:
            place.append(name)
        elif isinstance(target, tuple):
            place, names = ['link'], names + [*reversed(target[1:])]
        elif target.startswith('/'):
            return target.startswith(SYSTEM_FOLDERS)
        else:
            names += reversed(target.split('/'))
    return True


def check_named(path, option):
    """Raise unless the path that the user named exists and lies in the current folder."""
    here = os.path.realpath('.')
    if path == '.' and here in ('/', os.path.realpath(os.path.expanduser('~'))):
        raise FilesError(f'all of {here} would be sent to every machine. Start from a folder of '
                         'its own, or name the paths with --copy-forwards (alone: no files).')
    if not os.path.lexists(path):
        raise FilesError(f'{option} {path}: there is no such file or folder.')
    for part in path.split('/'):
        if part in NEVER_SENT:
            raise FilesError(f'{option} {path}: {part} is never sent. Copy what jobs need of it to '
                             'another folder.')
    real = os.path.realpath(path)
    if real != here and not real.startswith(here.rstrip('/') + '/'):
        raise FilesError(f'{option} {path}: this is {real}, which lies outside the current folder, '
                         'and a job has a copy of that only.')


def check_forwards(forwards):
    """Raise unless all paths of the Forwards exist and lie in the current folder."""
    for path in forwards.copy:
        check_named(path, '--copy-forwards')
    for path in forwards.link:
        check_named(path, '--link-forwards')


# ---- Archives: tar, for small trees, and where rsync is not at both ends ----

def archive(placed):
    """Yield a tar archive (POSIX pax) of (name in it, Entry) pairs, in pieces.

    A file that shrinks while it is read is filled with zeros, one that grows is cut, and one that
    is gone is left out: the archive stays whole, and rsync would not do better.
    """
    import tarfile
    for name, entry in placed:
        info = tarfile.TarInfo(name)
        info.mode, info.mtime = entry.mode, entry.mtime_ns // 10**9
        sign, ns = '-' * (entry.mtime_ns < 0), abs(entry.mtime_ns)
        info.pax_headers = {'mtime': f'{sign}{ns // 10**9}.{ns % 10**9:09}'}
        content = ()
        if entry.kind == 'd':
            info.type = tarfile.DIRTYPE
        elif entry.kind == 'l':
            info.type, info.linkname = tarfile.SYMTYPE, entry.target
        else:
            info.size = entry.size
            try:
                content = padded_file(open(entry.path, 'rb'), entry.size)
            except (FileNotFoundError, NotADirectoryError):
                continue
        yield info.tobuf(tarfile.PAX_FORMAT, 'utf-8', 'surrogateescape')
        yield from content
    yield bytes(2 * tarfile.BLOCKSIZE)


def padded_file(file, size):
    """Yield exactly `size` bytes of the open file, and zeros up to a block of 512; close it."""
    left = size
    with file:
        while left:
            piece = file.read(min(left, 2**16)) or bytes(min(left, 2**16))
            left -= len(piece)
            yield piece
    yield bytes(-size % 512)


def mtime_ns(member):
    """Return the time of change of an archive's member in ns; tarfile itself has it as a float."""
    text = member.pax_headers.get('mtime', '')
    match = re.fullmatch(r'(-?)([0-9]{1,11})(?:\.([0-9]{1,9})[0-9]*)?', text)
    if not match:
        return int(member.mtime) * 10**9 if 0 <= member.mtime < 10**11 else 0
    ns = int(match[2]) * 10**9 + int((match[3] or '0').ljust(9, '0'))
    return -ns if match[1] else ns


def make_parents(folder, names):
    """Return the folder with these names below `folder`, made as needed; None if one is no folder.

    Each is checked by itself: os.makedirs would go through a link, and out of the folder.
    """
    for name in names:
        folder = os.path.join(folder, name)
        try:
            os.mkdir(folder)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(folder).st_mode):
                return None
    return folder


def target_of(member, folder):
    """Return the path of an archive's member below `folder`; None if it is refused.

    The folders that lead to it are made, and itself where it is one.
    """
    names = [name for name in member.name.split('/') if name not in ('', '.')]
    plain = member.isreg() or member.isdir() or member.issym()
    if (not plain or '..' in names or member.name.startswith('/')
            or '\0' in member.name + member.linkname):
        return None
    if not names:
        return folder
    parent = make_parents(folder, names[:-1])
    if parent is None or member.isdir() and make_parents(parent, names[-1:]) is None:
        return None
    return os.path.join(parent, names[-1])


def unpack_file(tar, member, target):
    """Make the file or link `target`, which is not there yet, of an archive's member."""
    times = (mtime_ns(member),) * 2
    if member.issym():
        os.symlink(member.linkname, target)
        os.utime(target, ns=times, follow_symlinks=False)
        return
    with open(target, 'xb') as out, tar.extractfile(member) as data:
        while True:
            piece = data.read(2**20)
            if not piece:
                break
            out.write(piece)
    os.chmod(target, member.mode & 0o777)
    os.utime(target, ns=times)


def unpack_archive(path, folder):
    """Extract the tar file at `path` into `folder`, which is empty; return the refused names.

    Only files, folders and links are made, all inside, and nothing through a link: tarfile's own
    filter is no boundary (CVE-2025-4517 and its like).
    """
    import tarfile
    refused, folders = [], []
    with tarfile.open(path, 'r:', encoding='utf-8', errors='surrogateescape') as tar:
        for member in tar:
            target = target_of(member, folder)
            if target is None:
                refused.append(member.name)
            elif target == folder:
                continue
            elif member.isdir():
                folders.append((target, member))
            elif not os.path.lexists(target):       # else it is named twice
                unpack_file(tar, member, target)
    for target, member in reversed(folders):        # last, since files change the time of theirs
        os.chmod(target, member.mode & 0o777)
        os.utime(target, ns=(mtime_ns(member),) * 2)
    return refused


# ---- Probe: what a machine said of itself -> Capacity ----

FEWEST_TICKS = 4            # fewer ticks (1/100 s) than these say nothing about load
UNKNOWN_WORDS = ('[n/a]', 'n/a', '[not supported]')      # and not 'ERR!': such a GPU is broken


class Need(NamedTuple):
    """The resources that one job of any batch needs on a machine, and those it was seen to use.

    The job's runner notes it there, so that other batches see what was promised and not yet taken.
    """
    key: str                        # job.attempt of this project's jobs, '' of others'
    cores: float
    memory_mb: int
    reserve: bool
    gpus: dict                      # index -> (MB, share of time, whether it is reserved)
    used_mb: int
    ticks: int                      # processor time, in 1/100 s


class Sample(NamedTuple):
    """The numbers of a probe with which those of the next one are compared."""
    busy: int                       # processor ticks since boot, of all processors
    total: int
    ticks: dict                     # key of a Need -> ticks of its job; of others' jobs under ''
    gpu_free_mb: dict               # index -> MB, when none of our jobs was there yet


def parse_probe(facts, machine, ours=(), before=None, ended_ticks=0):
    """Return the Capacity that the probe's facts, a list of (key, text), give.

    ours: the keys (job.attempt) of this batch's jobs there, whose use is added to what is free
    before: the Sample of the last probe
    ended_ticks: the ticks that those of our jobs used that ended since then

    Never raises: a fact that cannot be read is unknown, and what is unknown is not there.
    """
    values, needs = dict(facts), read_needs(facts)
    others = [need for need in needs if need.key not in ours]
    processors, usable_cores, total_mb, available_mb = read_size(facts)
    # all_mb, all_cores: what all batches may use together.  Others' needs are subtracted whether
    # their jobs have taken them yet or not.
    all_mb = available_mb + sum(min(need.used_mb, need.memory_mb) for need in needs)
    all_mb = min(all_mb, total_mb)
    free_mb = max(all_mb - sum(need.memory_mb for need in others), 0)
    busy = busy_cores(values, needs, processors, before, ended_ticks)
    all_cores = max(min(usable_cores, processors - busy), 0.0)
    free_cores = max(all_cores - sum(need.cores for need in others) / CORES_OVERLOAD, 0.0)
    first_free_mb = before.gpu_free_mb if before else {}
    gpus, limits, trouble = parse_gpus(facts, machine, needs, ours, first_free_mb, free_mb)
    for index in [gpu.index for gpu in gpus if gpu.unified]:     # others need the machine's memory
        free_mb -= sum(need.gpus[index][0] for need in others if index in need.gpus)
    if machine.gpus is not None:
        gpus, trouble = only_listed(gpus, machine.gpus, trouble)
    return Capacity(
        cores=free_cores, memory_mb=max(free_mb, 0), gpus=gpus, total_cores=usable_cores,
        total_memory_mb=total_mb, max_jobs=machine.max_jobs,
        gpu_trouble='' if gpus else trouble, lost_gpus=trouble if gpus else '',
        batch_jobs=len(others), reserved=any(need.reserve for need in others),
        limits=(thousandths(all_cores * CORES_OVERLOAD), all_mb, *limits))


def read_size(facts):
    """Return (processors, cores that its cgroups leave of them, MB in all, MB available)."""
    values = dict(facts)
    processors = whole_number(values.get('cores'))
    total_mb = whole_number(values.get('MemTotal')) // 1024
    available_mb = min(whole_number(values.get('MemAvailable')) // 1024, total_mb)
    usable = float(processors)
    for key, text in facts:
        first, _, second = text.partition('/')
        if key == 'cgroup_cores' and whole_number(second):
            usable = min(usable, whole_number(first) / whole_number(second))
        elif key == 'cgroup_memory':
            available_mb = min(available_mb, whole_number(first) // 2**20)
            if whole_number(second):
                total_mb = min(total_mb, whole_number(second) // 2**20)
    return processors, usable, total_mb, available_mb


def busy_cores(values, needs, processors, before, ended_ticks):
    """Return how many cores are in use by processes of no batch."""
    now = two_numbers(values.get('ticks'))
    if before:
        used, total = now[0] - before.busy, now[1] - before.total
        if total >= FEWEST_TICKS:
            # The ticks of batches: /proc tells those of each job and its descendants, and the end
            # event of a job that ended meanwhile told its own.
            by_jobs = ended_ticks + sum(max(need.ticks - before.ticks.get(need.key, 0), 0)
                                        for need in needs if need.key)
            by_jobs += max(sum(need.ticks for need in needs if not need.key)
                           - before.ticks.get('', 0), 0)
            return min(max(used - by_jobs, 0) / total, 1) * processors
    load = decimal(values.get('load'), math.inf)
    begun = two_numbers(values.get('ticks_before')) if 'ticks_before' in values else now
    used, total = now[0] - begun[0], now[1] - begun[1]
    # Since the login began is a short time, in which the login itself shows; in the last minute's
    # load a job shows that has just ended.  Whoever really uses the machine shows in both.
    busy = min(load, used / total * processors) if total >= FEWEST_TICKS and used >= 0 else load
    busy = min(busy, processors) if math.isfinite(busy) else 0.0
    return max(busy - sum(need.cores for need in needs), 0.0)


def read_sample(facts, first_free_mb=None):
    """Return the Sample that the facts give.  first_free_mb: gpu_free_mb of an earlier one."""
    values, ticks, free_mb = dict(facts), collections.Counter(), {}
    for need in read_needs(facts):
        ticks[need.key] += need.ticks
    for key, line in facts:
        fields = line.split(',')
        if key == 'gpu' and len(fields) > 3:
            free_mb[whole_number(fields[0].strip())] = whole_number(fields[3].strip())
    return Sample(*two_numbers(values.get('ticks')), ticks,
                  free_mb if first_free_mb is None else first_free_mb)


def read_needs(facts):
    """Return the Needs among the facts; a text that makes no sense needs nothing."""
    needs = []
    for key, text in facts:
        match = key == 'claim' and re.fullmatch(
            r'(\d{1,15}) (\d{1,15}) (\S{1,400}) (\d{1,9}) (\d{1,9}) ([01])((?: [\d:]{7,40})*)',
            text, re.ASCII)
        if not match:
            continue
        used_kb, ticks, job, cores, memory_mb, reserve, words = match.groups()
        parts = [re.fullmatch(r'(\d+):(\d+):(\d+):([01])', word) for word in words.split()]
        gpus = {int(part[1]): (int(part[2]), int(part[3]) / 1000, part[4] == '1')
                for part in parts if part}
        needs.append(Need('' if job == '-' else job, int(cores) / 1000, int(memory_mb),
                          reserve == '1', gpus, int(used_kb) // 1024, int(ticks)))
    return needs


def whole_number(text):
    """Return the number that the text is, 0 for anything else."""
    return int(text) if text and re.fullmatch(r'[0-9]{1,18}', text) else 0


def two_numbers(text):
    """Return the two numbers of 'n/m', zeros for anything else."""
    first, _, second = (text or '').partition('/')
    return whole_number(first), whole_number(second)


def decimal(text, unknown):
    """Return the non-negative decimal number that the text is, `unknown` for anything else."""
    return float(text) if text and re.fullmatch(r'[0-9]{1,9}(\.[0-9]{1,9})?', text) else unknown


def parse_gpus(facts, machine, needs, ours, first_free_mb, memory_mb):
    """Return (the Gpus, their limits as text, why there are no others) of the facts of a probe.

    first_free_mb: {index: MB} when none of our jobs was there yet
    memory_mb: free memory of the machine, for GPUs that share it
    """
    values = dict(facts)
    trouble = gpu_trouble(values)
    if trouble:
        return (), (), trouble
    processes = gpu_processes(facts)
    gpus, limits, refused = {}, [], []
    extended = values.get('nvidia_smi') != 'old'
    for key, line in facts:
        if key != 'gpu' or 'No devices were found' in line:
            continue
        gpu = parse_gpu(line, extended, memory_mb, machine.gpus or ())
        if isinstance(gpu, str):
            refused.append(gpu)
        elif gpu.index not in gpus:
            gpus[gpu.index], limit = share_gpu(gpu, processes[gpu.uuid], needs, ours,
                                               first_free_mb.get(gpu.index, gpu.memory_mb))
            limits.append(limit)
    trouble = '; '.join(dict.fromkeys(refused))
    if not gpus and not trouble:
        trouble = ('has lost its GPUs' if values.get('nvidia_smi') == '15' else
                   'has an nvidia-smi, but no GPU')
    return tuple(gpus[index] for index in sorted(gpus)), tuple(limits), trouble


def share_gpu(gpu, processes, needs, ours, first_free_mb):
    """Return (the Gpu as it is for this batch, its limits for all batches as text).

    gpu: as nvidia-smi tells of it; processes: those on it, as gpu_processes has them
    """
    here = [need for need in needs if gpu.index in need.gpus]
    mine = [need.gpus[gpu.index] for need in here if need.key in ours]
    theirs = [need.gpus[gpu.index] for need in here if need.key not in ours]
    if processes:
        used, asked = collections.Counter(), collections.Counter()      # key of a Need -> MB
        for mb, _, key in processes:
            used[key] += mb
        for need in here:
            asked[need.key or 'other'] += need.gpus[gpu.index][0]
        taken_mb = sum(min(used[key], mb) for key, mb in asked.items())
    else:
        # In a container nvidia-smi names no process.  Our jobs are taken to have what is no longer
        # free since we came, up to what they were promised.
        taken_mb = min(max(first_free_mb - gpu.memory_mb, 0), sum(mb for mb, *_ in mine))
    foreign = [user for _, user, key in processes if key not in ours]
    all_mb = min(gpu.memory_mb + taken_mb, max(gpu.total_memory_mb, gpu.memory_mb))
    busy = max(gpu.utilization - sum(part for _, part, _ in mine + theirs), 0.0)
    limit = f'{gpu.index}:{all_mb}:{thousandths((1 - busy) * GPU_OVERLOAD)}'
    return gpu._replace(
        memory_mb=max(all_mb - sum(mb for mb, *_ in theirs), 0),
        utilization=min(busy + sum(part for _, part, _ in theirs) / GPU_OVERLOAD, 1.0),
        others=len(foreign), users=tuple(dict.fromkeys(foreign)), batch_jobs=len(theirs),
        reserved=any(alone for *_, alone in theirs)), limit


def only_listed(gpus, listed, trouble):
    """Return (those of the Gpus that the machine's file lists, why one of these is missing)."""
    found = tuple(gpu for gpu in gpus if gpu.index in listed)
    trouble = '' if len(found) == len(listed) else trouble
    return found, trouble or ('' if found else 'has none of the GPUs that its file lists')


def gpu_processes(facts):
    """Return {GPU's uuid: [(MB, owner, key of its Need)]} of the processes among the facts.

    MB is 0 where nvidia-smi does not tell.  The key is 'other' for a job of another project, and
    '' for a process of no batch.
    """
    found = collections.defaultdict(list)
    for key, line in facts:
        fields = line.split(' ')
        if key == 'gpu_process' and len(fields) >= 4:
            used = fields[1] if fields[1].isascii() and fields[1].isdigit() else ''
            found[fields[0]].append((int(used[:12] or 0), fields[-2], fields[-1]))
    return found


def gpu_trouble(values):
    """Return why nothing is known of GPUs; '' where nvidia-smi answered."""
    status = values.get('nvidia_smi')
    if status is None:
        return 'was not asked for its GPUs'
    if status == 'absent':
        makers = [word for word in values.get('other_gpus', '').split() if word in ('AMD', 'Intel')]
        what = ' and '.join(f'{count_of(makers.count(maker), "GPU")} of {maker}'
                            for maker in dict.fromkeys(makers))
        return ('has no nvidia-smi, so no GPU is known' if not makers else
                f'has {what}, which cannot be scheduled yet, and no nvidia-smi')
    if status == 'timeout':
        return 'has an nvidia-smi that does not answer'
    if status in ('0', 'old', '14', '15'):
        return ''
    words = printable(values.get('gpu_error', ''))[:200]
    if 'No devices were found' in words:
        return 'has an nvidia-smi, but no GPU'
    return f'has an nvidia-smi that fails with status {printable(status)[:20]}: {words}'


def parse_gpu(line, extended, memory_mb, listed):
    """Return the Gpu of a line of nvidia-smi, or why it cannot be used.

    extended: the line has compute and MIG mode, too
    listed: the indices in the machine's file, whose user vouches for what nvidia-smi does not tell
    """
    fields = [field.strip() for field in line.split(',', 7 if extended else 5)]
    if len(fields) != (8 if extended else 6) or not (
            fields[0].isascii() and fields[0].isdigit() and len(fields[0]) < 4):
        return explain_gpu_line(line)
    index, uuid, name = int(fields[0]), fields[1][:60], fields[-1][:80]
    mode, mig = fields[5:7] if extended else ('', '')
    if mig == 'Enabled':
        return f'has GPU {index} divided into parts (MIG), which cannot be scheduled yet'
    if mode == 'Prohibited':
        return f'has GPU {index} in compute mode Prohibited'
    if 'lost' in ' '.join(fields[2:5]):
        return f'has lost GPU {index} (nvidia-smi: {printable(fields[2])[:100]})'
    total, free, used = map(number_or_none, fields[2:5])
    unified = all(field.lower() in UNKNOWN_WORDS for field in fields[2:4])
    if unified:
        total, free = memory_mb, memory_mb          # as on GB10 and Jetson
    if total is None or free is None:
        return f'has GPU {index}, of which nvidia-smi does not tell the free memory'
    if used is None and index not in listed:
        return (f'has GPU {index}, of which nvidia-smi does not tell the free memory or the use; '
                f'"gpus: [{index}]" in its file vouches for it')
    used = used or 0
    if free > total or used > 100:
        return f'has GPU {index}, of which nvidia-smi tells what cannot be'
    return Gpu(index, free, used / 100, total, uuid, name, exclusive=mode == 'Exclusive_Process',
               unified=unified)


def number_or_none(text):
    """Return the number that a field of nvidia-smi is, or None."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None


def explain_gpu_line(line):
    """Return which GPUs cannot be used, of a line of nvidia-smi that describes none."""
    lost = re.search(r'handle for (GPU ?[0-9A-Fa-f:.]*[0-9A-Fa-f])\W+(.*)', line)
    if lost:
        return f'has lost {printable(lost[1])} (nvidia-smi: {printable(lost[2].strip())[:100]})'
    return 'has GPUs of which nvidia-smi tells nothing that can be read'


# ---- Results: the folder job_results ----

class ResultStore:
    """The folder job_results: its lock, and the files in it.  Replaces nothing.

    job_results/NAME.out, NAME.err    the streams; they grow while the job runs
    job_results/NAME/                 what it brought back; appears by one rename
    job_results/.ssh_scheduler/       journal, lock, incoming results

    part: a folder below that for the same: commands/NAME for a job of execute_remote, so that it
    runs beside a batch, and two clients of one job cannot both collect it.
    journal: the Journal of its jobs
    """

    def __init__(self, folder, part=''):
        self.folder, self.part = folder, part
        self.inner = os.path.join(folder, '.ssh_scheduler', part).rstrip('/')
        self.journal = Journal(os.path.join(self.inner, 'journal'))
        self.manifests = Manifests(self.inner, self.journal)
        self._lock = None
        self._grown = set()             # (name, stream) that we have begun to write
        self._growing = {}              # of these the one that grew last -> its open file

    # Its lock

    def open(self, run=''):
        """Make, lock and read the folder; return self.

        run: the batch or job of this client, by which --cancel finds it: see take_over
        """
        try:
            os.makedirs(self.inner, exist_ok=True)
            self._lock = os.open(os.path.join(self.inner, 'lock'), os.O_RDWR | os.O_CREAT, 0o666)
            self._take_lock(run)
            self.journal.open()
            self._end_commits()
            for name in os.listdir(self.inner):
                if name.startswith('incoming-'):        # of a run that was killed
                    path = os.path.join(self.inner, name)
                    if name.endswith('.tar'):
                        os.unlink(path)
                    else:
                        self.discard(path)
        except OSError as error:
            raise ResultsError(f'{self.folder}, where results go, cannot be used: '
                               f'{reason_of(error)}.') from None
        return self

    def peek(self):
        """Only read what earlier runs did; another run may use the folder.  Return self."""
        try:
            self.journal.peek()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ResultsError(f'{self.journal.path} cannot be read: {reason_of(error)}.') from None
        return self

    def close(self):
        """Let go of the lock; where nothing was started, leave nothing behind."""
        if self.journal.is_empty:
            try:
                for name in ('journal', 'lock'):
                    os.unlink(os.path.join(self.inner, name))
                folder = self.inner
                while folder != os.path.dirname(self.folder):
                    os.rmdir(folder)
                    folder = os.path.dirname(folder)
            except OSError:
                pass            # there is something else in it
        self._stop_growing()
        self.journal.close()
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _take_lock(self, run):
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = printable(read_lock(self._lock)[0])
            if self.part:
                raise ResultsError(f'{os.path.basename(self.part)} is in the hands of another '
                                   f'run ({holder}): end that with Ctrl-C or kill -9, '
                                   'with which the job goes on, or wait for it.') from None
            raise ResultsError(f'{self.folder} is in use by another run ({holder}). '
                               'Wait for it, or start from another folder.') from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):     # some network file systems
                raise
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f'process {os.getpid()} on {os.uname().nodename}\n{run}\n'.encode())

    def take_over(self, run, note):
        """Open it, but first have a client stop that has it open for the same `run`, and wait.

        note(text) tells of that.  Return what the journal said of the jobs before: name -> record.
        """
        before = {}
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self.inner, 'lock')) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                who, theirs = read_lock(lock.fileno())
                match = re.fullmatch(r'process ([0-9]+) on (.*)', who)
                if match and theirs == run:
                    before = ResultStore(self.folder, self.part).peek().journal.jobs
                    stop_client(int(match[1]), match[2], run, lock, note)
            except OSError:         # no locks there: then none keeps us out either
                pass
        self.open()
        return before

    # Lists of what attempts left

    def is_done(self, name):
        """Tell whether the job was collected, and its results are still here."""
        return self.journal.record(name).get('state') == 'collected' and self.exists(name)

    def exists(self, name):
        """Tell whether there are results of the job that a new run would have to replace."""
        if self.journal.record(name).get('state') in ('claimed', 'ended', 'lost', 'cancelled'):
            return os.path.lexists(self._path(name))    # its streams are what is left of that
        return any(os.path.lexists(self._path(name, end)) for end in ('', '.out', '.err'))

    def pieces(self, name):
        """Return (paths that are here, whether any is missing) of the results of a job."""
        ends = ('', '.out', '.err') if 'inode' in self.journal.record(name) else ('.out', '.err')
        here = [end for end in ('', '.out', '.err') if os.path.lexists(self._path(name, end))]
        return [self._path(name, end) for end in here], not set(ends) <= set(here)

    def identities(self):
        """Return the identities of all journals in the folder; '' if one had none at first."""
        top, found = os.path.join(self.folder, '.ssh_scheduler'), set()
        commands = os.path.join(top, 'commands')
        names = os.listdir(commands) if os.path.isdir(commands) else []
        for path in (top, *(os.path.join(commands, name) for name in names)):
            found |= identity_in(os.path.join(path, 'journal'))
        return found | {self.journal.identity}

    def kept(self, machine):
        """Return {name: record} of the collected jobs of which something could not be fetched from
        there; `kept` are its paths."""
        return {name: record for name, record in self.journal.jobs.items()
                if record['machine'] == machine and record['state'] == 'collected'
                and record.get('kept') and record['kept'] is not True
                and os.path.isdir(self._path(name))}

    # Streams

    def grow(self, name, stream, data):
        """Add to a stream of a job that runs; return whether that could be done."""
        key = (name, stream)
        mode = ('ab' if key in self._grown else
                'wb' if self.journal.may_have_streams(name) else 'xb')
        try:
            if key not in self._growing:
                self._stop_growing()
                self._growing[key] = open(self._path(name, f'.{stream}'), mode, buffering=0)
                self._grown.add(key)
            file, data = self._growing[key], memoryview(data)
            while data:
                data = data[file.write(data):]
        except OSError:
            self._stop_growing()
            return False        # a copy brings all of it at the end, and tells of a failure
        return True

    def has(self, name, stream, size):
        """Tell whether all of a stream, this many bytes, grew where it belongs."""
        try:
            return (name, stream) in self._grown and os.path.getsize(
                self._path(name, f'.{stream}')) == size
        except OSError:
            return False

    def read(self, name, stream, offset=0):
        """Yield the stream of a job, from this byte on, in pieces."""
        with open(self._path(name, f'.{stream}'), 'rb') as file:
            file.seek(offset)
            yield from iter(lambda: file.read(2**16), b'')

    def _stop_growing(self):
        for file in self._growing.values():
            file.close()
        self._growing = {}

    # Results that arrive

    def incoming(self):
        """Return a new empty folder for results that are on their way."""
        return private_folder(os.path.join(self.inner, 'incoming'))

    def discard(self, folder):
        """Remove what is left of an incoming folder."""
        import shutil
        shutil.rmtree(folder, onerror=make_removable)

    def commit(self, name, streams, folder, wants_folder, kept=()):
        """Put a job's results in place; the caller then moves the attempt to collected.

        streams: 'out' and 'err' -> bytes, the path of a file to move, or None where it grew there
        kept: the paths that could not be fetched, so that its folder stays there, or True: it all.
        The journal has these and not all paths, so that files deleted here do not come back.
        """
        self._stop_growing()
        for stream, content in streams.items():
            self._commit_stream(name, stream, content)
        if not wants_folder:
            return
        target = self._path(name)
        if os.path.lexists(target):
            raise ResultsError(f'{target} was made by something else while {name} ran: move it '
                               'away')
        if not (folder and os.path.isdir(folder)):
            folder = self.incoming()
        # On the machine it was private.  A folder that its owner may not write cannot be moved.
        os.chmod(folder, new_folder_mode())
        # A run that is killed after the rename is found out by the inode: see _end_commits.
        self.journal.write(event='committing', job=name, inode=os.stat(folder).st_ino, kept=kept)
        os.rename(folder, target)

    def _commit_stream(self, name, stream, content):
        """Move or write one stream; only what we wrote ourselves while it grew is replaced."""
        target = self._path(name, f'.{stream}')
        ours = (name, stream) in self._grown or self.journal.may_have_streams(name)
        self._grown.discard((name, stream))
        if content is None:
            return              # it grew there, to its end
        if not isinstance(content, bytes):
            if not ours and os.path.lexists(target):
                raise ResultsError(f'{target} was made by something else while {name} ran.')
            os.chmod(content, 0o666 & new_folder_mode())        # on the machine it was private
            os.replace(content, target)
            return
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if ours else os.O_EXCL)
        with open(os.open(target, flags, 0o666), 'wb') as file:
            file.write(content)

    def _end_commits(self):
        """Note what a run that was killed had put in place and not noted: by the folder's inode."""
        for name, record in self.journal.jobs.items():
            if record['state'] == 'ended' and 'inode' in record:
                with contextlib.suppress(FileNotFoundError):
                    if os.lstat(self._path(name)).st_ino == record['inode']:
                        self.journal.write(event='collected', job=name, kept=record['kept'])

    def add(self, name, folder):
        """Put what was kept until now to the other results of a job; return the paths that were in
        its way."""
        target = self._path(name)
        return [os.path.relpath(path, target) for path in merge(folder, target)] if folder else []

    def set_aside(self, name, streams=None, folder=None):
        """Move what there is of a job that was cancelled out of the way of its next run.

        streams, folder: what came of it from its machine, as for commit
        """
        self._stop_growing()
        try:
            self._move_aside(name, streams or {}, folder)
        except OSError as error:
            raise ResultsError(f'what {name} left could not be moved to {self.inner}/cancelled: '
                               f'{reason_of(error)}.') from None

    def _move_aside(self, name, streams, folder):
        aside = os.path.join(self.inner, 'cancelled', f'{name}.{time.time_ns()}')
        os.makedirs(os.path.dirname(aside), exist_ok=True)
        for stream in ('out', 'err'):
            path, content = self._path(name, f'.{stream}'), streams.get(stream)
            if isinstance(content, bytes):
                with open(f'{aside}.{stream}', 'xb') as file:
                    file.write(content)
            elif content is not None:
                os.chmod(content, 0o666 & new_folder_mode())
                os.replace(content, f'{aside}.{stream}')
            if (name, stream) in self._grown and os.path.lexists(path):
                if content is None:
                    os.replace(path, f'{aside}.{stream}')
                else:
                    os.unlink(path)
            self._grown.discard((name, stream))
        if folder and os.path.isdir(folder) and os.listdir(folder):
            os.chmod(folder, new_folder_mode())
            os.rename(folder, aside)

    def _path(self, name, end=''):
        return os.path.join(self.folder, name + end)


class Manifests:
    """The digests of the files that jobs had, with what they stand for: files/DIGEST.json."""

    def __init__(self, folder, journal):
        self._folder, self._journal = os.path.join(folder, 'files'), journal
        self._found = {}                # digest -> Manifest, None where that is not known

    def keep(self, manifest):
        """Keep what tells files apart, for the claims in the journal to refer to."""
        if self._found.get(manifest.digest):
            return
        path = self._path(manifest.digest)
        try:
            os.makedirs(self._folder, exist_ok=True)
            with open(f'{path}.new', 'w', encoding='utf-8') as file:
                json.dump(manifest.files, file)
            os.replace(f'{path}.new', path)
        except OSError as error:
            raise self._journal.unwritable(error) from None
        self._found[manifest.digest] = manifest

    def get(self, digest):
        """Return the Manifest that has this digest; None where it was not kept."""
        if digest not in self._found:
            self._found[digest] = None
            with contextlib.suppress(OSError, ValueError, TypeError):
                with open(self._path(digest), encoding='utf-8') as file:
                    self._found[digest] = Manifest(json.load(file))
        return self._found[digest]

    def _path(self, digest):
        return os.path.join(self._folder, f'{digest}.json')


def identity_in(path):
    """Return {the identity of the journal at this path}; '' too if its first lines had none."""
    found = set()
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        for number, line in enumerate(file):
            match = re.match(rb'{"event": "journal", "identity": "([0-9a-f]+)"', line)
            if match:
                return found | {match[1].decode()}
            found |= set() if number else {''}
    return found


def read_lock(fd):
    """Return (the process that has the lock, the batch or job that it runs), as the file says."""
    who, _, run = os.pread(fd, 1000, 0).decode('utf-8', 'replace').partition('\n')
    return who, run.rstrip('\n')


def stop_client(pid, computer, run, lock, note):
    """Have the client that holds the lock stop in good order, and wait until it has.

    Only who has the lock file open is sent a signal: the id alone may be another process's by now.
    """
    if computer != os.uname().nodename:
        raise ResultsError(f'{run} is run by process {pid} on {computer}: type the same command '
                           'there, in this folder.')
    def is_lock(path):
        try:
            return os.path.samestat(os.stat(path), os.fstat(lock.fileno()))
        except FileNotFoundError:       # it has just closed that
            return False

    fds = f'/proc/{pid}/fd'
    try:
        if os.path.isdir('/proc/self/fd') and not any(
                is_lock(f'{fds}/{fd}') for fd in os.listdir(fds)):
            return
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)        # it may have been stopped with Ctrl-Z
    except (FileNotFoundError, ProcessLookupError):     # it has just ended
        return
    except OSError as error:
        raise ResultsError(f'{run} is run by process {pid}, which cannot be told to stop: '
                           f'{reason_of(error)}.') from None
    note(f'{run}: process {pid} runs it, and is told to cancel')
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
    except KeyboardInterrupt:
        note(f'{run}: process {pid} keeps cancelling')
        raise


def private_folder(stem):
    """Return the path of a new folder of mode 0700 whose name begins with `stem`."""
    path = f'{stem}-{os.urandom(6).hex()}'
    os.mkdir(path, 0o700)
    return path


def new_folder_mode():
    """Return the mode that mkdir gives a folder here: all that the umask leaves."""
    mask = os.umask(0o77)
    os.umask(mask)
    return 0o777 & ~mask


def merge(source, target):
    """Move what lies in the folder `source` into another; yield the paths there that are in its
    way: not what is the same there already, such as what an earlier try had moved.
    """
    for name in sorted(os.listdir(source)):
        new, old = os.path.join(source, name), os.path.join(target, name)
        info = os.lstat(new)
        is_folder, there = stat.S_ISDIR(info.st_mode), os.path.lexists(old)
        if is_folder:
            os.chmod(new, 0o700)        # else it could neither be moved nor looked into
        if not there:
            os.rename(new, old)
            if is_folder:
                os.chmod(old, stat.S_IMODE(info.st_mode))
            continue
        other = os.lstat(old)
        if is_folder and stat.S_ISDIR(other.st_mode):
            os.chmod(old, 0o700)
            yield from merge(new, old)
            os.chmod(old, stat.S_IMODE(other.st_mode))
        elif (stat.S_IFMT(info.st_mode), info.st_size, info.st_mtime_ns) != (
                stat.S_IFMT(other.st_mode), other.st_size, other.st_mtime_ns):
            yield old


def make_removable(function, path, _):
    """Give a folder that a job made read-only the permissions that removing it needs."""
    try:
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        function(path)
    except OSError:
        pass


# ---- Processes: the one place that starts them and the one that waits ----

TICK_S = 1.0                # after this a child is noticed whose pipe another holds open
KEPT_STDERR = 64 * 1024


class Process:
    """A child: passive.  Processes reads and writes its streams; done is: ended, and all read."""

    def __init__(self, popen, on_output, on_error, on_exit, feed, keep_stdin, deadline):
        self.popen = popen
        self.on_output = on_output          # called with bytes
        self.on_error = on_error            # the same for stderr, or None: it is kept
        self.on_exit = on_exit              # called with (exit status, stderr as bytes); see Flows
        self.feed = feed                    # iterator of bytes for its stdin, or None
        self.source = None                  # a file descriptor, from which more of it comes
        self.keep_stdin = keep_stdin        # else closed when all is written
        self.deadline = deadline
        self.unsent = bytearray()
        self.complaint = bytearray()
        self.reads = {}                     # open streams of the child that we read

    def write(self, data):
        """Queue data for its stdin; it goes out in the next Processes.wait."""
        self.unsent += data

    def close_stdin(self):
        """Close its stdin as soon as all that was queued is written."""
        self.keep_stdin = False

    def kill(self):
        """End it and what it started, now."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):   # macOS says so of a zombie's group
            pass


def deaf(_number, _frame):
    """Ignore a signal as SIG_IGN does, which our children would inherit."""


class Processes:
    """All children of this program, and its timers: only here they start and are waited for."""

    def __init__(self, on_start=None, clock=time.monotonic):
        # Inherited as ignored, Popen would report success for every failure.
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # As in the background of a script: jobs on localhost would ignore them, too.
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
            if signal.getsignal(number) == signal.SIG_IGN:
                with contextlib.suppress(ValueError):       # only the main thread can change it
                    signal.signal(number, deaf)
        self._selector = selectors.DefaultSelector()
        self._children = set()
        self._timers = []                   # [due, function], few
        self._clock = clock
        self._on_start = on_start           # called with each argv
        self._outlets = {}                  # own stream -> (descriptor to write to, bytes at once)
        self._wakeup = os.pipe()
        for end in self._wakeup:
            os.set_blocking(end, False)
        self._selector.register(self._wakeup[0], selectors.EVENT_READ)

    def start(self, argv, on_output, on_exit, *, on_error=None, feed=None, keep_stdin=False,
              deadline_s=None, env=None, cwd=None, terminal=False, confined=None):
        """Start argv in a session of its own and return its Process.

        terminal: it has our streams, and with them the terminal, instead of pipes to us
        confined: what it calls first, from confine()
        """
        if self._on_start:
            self._on_start(argv)
        pipe = None if terminal else subprocess.PIPE
        try:
            popen = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0,
                                     start_new_session=not terminal, env=env, cwd=cwd,
                                     preexec_fn=confined)
        except FileNotFoundError as error:
            if cwd and error.filename == cwd:
                raise SchedulerError(f'the folder {cwd}, your HOME, is not there.') from None
            package = PACKAGES.get(argv[0], argv[0])
            raise SchedulerError(f'the program {argv[0]} is missing here. ' + (
                f'Try: apt install {package}' if LINUX else f'Install {package}.')) from None
        except OSError as error:
            raise SchedulerError(f'{argv[0]} could not be started: {reason_of(error)}.') from None
        finally:
            if confined:
                confined.close()
        due = None if deadline_s is None else self._clock() + deadline_s
        process = Process(popen, on_output, on_error, on_exit, feed, keep_stdin, due)
        for stream in (popen.stdin, popen.stdout, popen.stderr):
            if stream:
                os.set_blocking(stream.fileno(), False)
        for stream in filter(None, (popen.stdout, popen.stderr)):
            process.reads[stream.fileno()] = stream
            self._selector.register(stream, selectors.EVENT_READ, process)
        self._children.add(process)
        return process

    def pass_on(self, fd, process):
        """Feed the bytes of a file descriptor of this program to the process, to their end."""
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):      # of which kqueue does not tell the end
                raise PermissionError
            self._selector.register(fd, selectors.EVENT_READ, process)
            process.source = fd
        except OSError:                     # it never has to be waited for
            process.feed = iter(lambda: os.read(fd, 2**16), b'')

    def call_later(self, delay_s, function):
        """Have wait() call the function once, after this many seconds."""
        self._timers.append([self._clock() + delay_s, function])

    def write_out(self, fd, data):
        """Write to a stream of this program; wait until it is read, or for wake(); return the rest.

        Raises OSError where it cannot be written.
        """
        import select
        if fd not in self._outlets:
            kind = os.fstat(fd).st_mode
            free = fd
            if LINUX and stat.S_ISFIFO(kind):   # its own description: others share this one
                try:
                    free = os.open(f'/proc/self/fd/{fd}', os.O_WRONLY | os.O_NONBLOCK)
                except OSError:
                    pass
            # A pipe that is ready takes PIPE_BUF bytes at least; others than these take all of it.
            slow = stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(fd)
            piece = select.PIPE_BUF if slow and free == fd else 2**20
            self._outlets[fd] = (free, piece)
        free, piece = self._outlets[fd]
        poll = select.poll()
        poll.register(free, select.POLLOUT)
        poll.register(self._wakeup[0], select.POLLIN)
        data = memoryview(data)
        while data:
            ready = [key for key, _ in poll.poll()]
            if free in ready:
                data = data[os.write(free, data[:piece]):]
            else:
                return bytes(data)          # woken, and nobody reads
        return b''

    def wake(self):
        """End a wait() that is under way; may be called from a signal handler."""
        try:
            os.write(self._wakeup[1], b'!')
        except BlockingIOError:
            pass

    def wait(self, timeout_s=None):
        """Wait for the first event, at most timeout_s, and run its callbacks."""
        for process in self._children:
            self._offer(process)
        now = self._clock()
        dues = [due for due, _ in self._timers]
        dues += [process.deadline for process in self._children if process.deadline is not None]
        dues += [now + timeout_s] if timeout_s is not None else []
        dues += [now + TICK_S] if self._children else []
        for key, events in self._selector.select(max(min(dues) - now, 0) if dues else None):
            if key.data and key.data not in self._children:
                continue                    # an earlier callback has ended it
            if key.fd == self._wakeup[0]:
                os.read(key.fd, 4096)
            elif key.fd == key.data.source:
                self._read_source(key.data)
            elif events & selectors.EVENT_WRITE:
                self._write(key.data)
            else:
                self._read(key.data, key.fd)
        now = self._clock()
        for timer in [timer for timer in self._timers if timer[0] <= now]:
            self._timers.remove(timer)
            timer[1]()
        for process in list(self._children):
            if process not in self._children:
                continue
            if process.deadline is not None and process.deadline <= now:
                process.deadline = None
                process.kill()
            self._reap(process)

    def end(self, process):
        """End a child now; its on_exit is not called."""
        if process in self._children:
            process.kill()
            process.popen.wait()
            self._forget(process)

    def close(self):
        """End all children that are left."""
        for process in list(self._children):
            self.end(process)
        self._selector.close()
        for fd in (*self._wakeup, *(free for fd, (free, _) in self._outlets.items() if free != fd)):
            os.close(fd)

    def _offer(self, process):
        """See to it that what there is for the child's stdin is written when the pipe has room."""
        stdin = process.popen.stdin
        if not stdin or stdin.closed:
            process.unsent.clear()
            return
        if process.unsent or process.feed:
            if stdin.fileno() not in self._selector.get_map():
                self._selector.register(stdin, selectors.EVENT_WRITE, process)
        elif process.source is not None:
            if process.source not in self._selector.get_map():
                self._selector.register(process.source, selectors.EVENT_READ, process)
        elif not process.keep_stdin:
            self._close_stdin(process)

    def _read_source(self, process):
        """Read from its source; not again before that is written."""
        try:
            data = os.read(process.source, 2**16)
        except BlockingIOError:
            return
        except OSError:                     # as of a terminal that is gone
            data = b''
        process.unsent += data
        self._selector.unregister(process.source)
        process.source = process.source if data else None
        self._offer(process)

    def _close_stdin(self, process):
        if process.source is not None and process.source in self._selector.get_map():
            self._selector.unregister(process.source)
        process.source = None
        stdin = process.popen.stdin
        if stdin.fileno() in self._selector.get_map():
            self._selector.unregister(stdin)
        stdin.close()

    def _write(self, process):
        while process.feed and len(process.unsent) < 2**16:
            piece = next(process.feed, None)
            if piece is None:
                process.feed = None
            else:
                process.unsent += piece
        try:
            count = os.write(process.popen.stdin.fileno(), process.unsent[:2**18])
            del process.unsent[:count]
        except BlockingIOError:
            return
        except BrokenPipeError:
            process.feed = None
            process.unsent.clear()
            self._close_stdin(process)
            return
        if not process.unsent and not process.feed:
            self._selector.unregister(process.popen.stdin)
            self._offer(process)

    def _read(self, process, fd):
        try:
            data = os.read(fd, 2**18)
        except BlockingIOError:
            return
        if not data:
            stream = process.reads.pop(fd)
            self._selector.unregister(stream)
            stream.close()
        elif process.reads[fd] is process.popen.stdout:     # which may be closed before stderr is
            process.on_output(data)
        elif process.on_error:
            process.on_error(data)
        else:
            process.complaint += data
            del process.complaint[:-KEPT_STDERR]

    def _reap(self, process):
        """Finish with the child if it ended and all was read, or no child can write more."""
        if process.popen.poll() is None:
            if process.reads or not process.popen.stdout:
                return
            try:
                process.popen.wait(TICK_S)  # it closed its streams, so it is about to end
            except subprocess.TimeoutExpired:
                process.kill()
                process.popen.wait()
        for fd in list(process.reads):      # what is in the pipes; another may hold them open
            while fd in process.reads and self._readable(fd):
                self._read(process, fd)
        self._forget(process)
        process.on_exit(process.popen.returncode, bytes(process.complaint))

    @staticmethod
    def _readable(fd):
        import select
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(0))

    def _forget(self, process):
        self._children.discard(process)
        for stream in list(process.reads.values()):
            self._selector.unregister(stream)
            stream.close()
        process.reads.clear()
        if process.popen.stdin and not process.popen.stdin.closed:
            self._close_stdin(process)


class End(NamedTuple):
    """How a child ended."""
    status: int                     # its exit status, negative where a signal ended it
    text: str                       # its stderr
    full: bool = False              # it was ended because the disk here is full


class Flows:
    """Generators that wait, begun together and ended together.

    Such a flow yields a Process that it has started, and is sent its End; or a number of seconds,
    and goes on after these.  When the flows are closed, their children end and each flow is closed
    where it waits, so `finally` is the place to clean up.
    """

    def __init__(self, processes):
        self._processes = processes
        self._waiting = {}                  # flow -> the Process that it waits for, or None

    def start(self, flow):
        """Run a flow to its first wait."""
        self._waiting[flow] = None
        self._go_on(flow)

    def _go_on(self, flow, value=None):
        if flow not in self._waiting:
            return                          # it was closed, and this was a time
        self._waiting[flow] = None
        try:
            awaited = flow.send(value)
        except StopIteration:
            self._waiting.pop(flow, None)
            return
        if flow not in self._waiting:       # it had all flows closed itself
            if isinstance(awaited, Process):
                self._processes.end(awaited)
            flow.close()
        elif isinstance(awaited, Process):
            self._waiting[flow] = awaited
            awaited.on_exit = lambda status, complaint: self._go_on(
                flow, End(status, complaint.decode('utf-8', 'replace')))
        else:
            self._processes.call_later(awaited, functools.partial(self._go_on, flow))

    def close(self):
        """End all flows."""
        waiting, self._waiting = self._waiting, {}
        with contextlib.ExitStack() as stack:       # all are closed, even if one cannot clean up
            for flow, process in waiting.items():
                if process:
                    self._processes.end(process)
                if not flow.gi_running:     # else it ends when it waits next
                    stack.callback(flow.close)


def ignore(_data):
    """Take bytes that nobody wants."""


PACKAGES = {'ssh': 'openssh-client', 'rsync': 'rsync', 'bash': 'bash'}


# ---- Wire: the language of the channel ----

LONGEST_LINE = 64 * 1024
LONGEST_NOISE = 256 * 1024
LONGEST_DATA = 64 * 2**20


class WireError(Exception):
    """The other side said something that is not of this language."""


def request(verb, *fields):
    """Return the bytes of a request: its verb, the number of its fields, and these."""
    return nul_ended(verb, len(fields), *fields)


def nul_ended(*fields):
    """Return the fields as bytes, with a NUL behind each."""
    data = bytearray()
    for field in fields:
        raw = field if isinstance(field, bytes) else os.fsencode(str(field))
        if b'\0' in raw:
            raise ValueError('a NUL in a request [this is a bug]')
        data += raw + b'\0'
    return data


def text_of(raw):
    """Return a field as text for people."""
    return printable(os.fsdecode(raw))


def number_of(raw):
    """Return a number that is not negative, and not larger than any that makes sense."""
    number = int(raw) if len(raw) < 20 else -1
    if not 0 <= number < 2**60:
        raise ValueError(f'{raw[:20]!r} is out of bounds')
    return number


def status_of(raw):
    """Return the exit status of a job."""
    number = number_of(raw)
    if number > 999:
        raise ValueError(f'{number} is no exit status')
    return number


def stream_of(raw):
    """Return 'out' or 'err'."""
    if raw not in (b'out', b'err'):
        raise ValueError(f'no stream is called {raw!r}')
    return raw.decode()


def output_of(raw):
    """Return (bytes of a stream, or None where they come otherwise; its size): =TEXT or @SIZE."""
    return (raw[1:], len(raw) - 1) if raw[:1] == b'=' else (None, number_of(raw[1:]))


def entry_of(raw):
    """Return (mark, value) of an entry in the list of what a job left: see the remote runner.

    The value is the path; of 's' the number of bytes, of 'm' (mode, path).
    """
    mark, text = raw[:1].decode('ascii', 'replace'), os.fsdecode(raw[1:])
    if mark == 'm':
        mode, _, path = text.partition(' ')
        return mark, (int(mode, 8), path)
    return mark, number_of(raw[1:]) if mark == 's' else text


def list_of(raw):
    """Return the entries of a list, each of which ends with a NUL."""
    return [entry_of(entry) for entry in raw.split(b'\0')[:-1]]


class Fields(NamedTuple):
    """The fields of an event: functions that make values of them, or raise ValueError."""
    needed: tuple = ()
    optional: tuple = ()
    rest: Optional[object] = None       # of all further ones


# The events of the remote runner.  One that brings bytes is called data there, and has its own name
# here.  Each has a method on_EVENT in Worker, JobControl, Collector or Gauge.
EVENTS = {
    'account': Fields((bytes,)),
    'broken': Fields((text_of,), (bytes,)),
    'note': Fields((text_of,)),
    'probe': Fields((os.fsdecode, lambda raw: raw.decode('utf-8', 'replace'))),
    'ready': Fields((os.fsdecode, bytes)),
    'measured': Fields((number_of, number_of)),
    'staged': Fields((os.fsdecode,)),
    'stage_failed': Fields((os.fsdecode, text_of)),
    'started': Fields(rest=os.fsdecode),
    'refused': Fields((os.fsdecode, text_of)),
    'held': Fields((os.fsdecode,)),
    'absent': Fields((os.fsdecode,)),
    'lost': Fields((os.fsdecode, text_of)),
    'used': Fields((os.fsdecode, number_of)),
    'growth': Fields((os.fsdecode, stream_of, number_of, bytes)),
    'left': Fields((os.fsdecode, text_of)),
    'ended': Fields((os.fsdecode, status_of, number_of, number_of, output_of, output_of),
                    rest=entry_of),
    'back': Fields((os.fsdecode, list_of)),
    'unlistable': Fields((os.fsdecode,)),
    'cancelled': Fields((text_of,)),
    'others': Fields((), (bytes,)),
    'pong': Fields((bytes,)),
    'finished': Fields(),
}


def decode(fields):
    """Return (event, values) of the fields of an event; raises WireError where they are none."""
    word, *raw = (fields[1:] or [b'']) if fields[0] == b'data' else fields
    word = word.decode('ascii', 'replace')
    if word not in EVENTS:
        raise WireError('it said something that no runner says')
    needed, optional, rest = EVENTS[word]
    kinds = [*needed, *optional, *[rest] * (len(raw) if rest else 0)]
    try:
        if not len(needed) <= len(raw) <= len(kinds):
            raise ValueError(f'{len(raw)} fields')
        if any(b'\0' in field for kind, field in zip(kinds, raw)
               if kind not in (bytes, list_of, output_of)):
            raise ValueError('a NUL')       # a name with it could not be sent back
        return word, [kind(field) for kind, field in zip(kinds, raw)]
    except ValueError as error:
        raise WireError('it said something that cannot be understood '
                        f'({word}: {error!r})') from error


class EventReader:
    """Bytes from the channel -> events: lists of fields (bytes).  Bounded in memory.

    What comes before a line that is the token is noise of the login, kept in `noise`.  An event
    "data SIZE WHAT..." is given with its SIZE bytes as one more field.
    """

    def __init__(self, token):
        self.noise = b''
        self.greeted = False
        self._token = token.encode()
        self._buffer = b''
        self._data = None               # (fields, size) of an event whose bytes are still coming

    @property
    def pending(self):
        """The bytes that came and are no event yet."""
        return self._buffer

    def feed(self, data):
        """Yield the events that are complete with these bytes."""
        self._buffer += data
        if not self.greeted:
            before, found, after = self._buffer.partition(b'\n' + self._token + b'\n')
            if not found:
                if len(before) > LONGEST_NOISE:
                    raise WireError('its login says more than can be read')
                self.noise = before
                return
            self.greeted, self.noise, self._buffer = True, before, after
        start = 0
        try:
            while True:
                if self._data:
                    fields, size = self._data
                    if len(self._buffer) - start < size:
                        return
                    self._data, body = None, self._buffer[start:start + size]
                    start += size
                    yield [*fields, body]
                    continue
                end = self._buffer.find(b'\n', start)
                if (end if end >= 0 else len(self._buffer)) - start > LONGEST_LINE:
                    raise WireError('it said a line without an end')
                if end < 0:
                    return
                fields = [unescape(field) for field in self._buffer[start:end].split(b'\t')]
                start = end + 1
                if fields[0] == b'data':
                    size = whole_number(fields[1].decode('ascii', 'replace')) if fields[1:] else 0
                    if len(fields) < 3 or size > LONGEST_DATA:
                        raise WireError('it announced more than can be read')
                    self._data = (fields[:1] + fields[2:], size)
                else:
                    yield fields
        finally:
            self._buffer = self._buffer[start:]


def unescape(field):
    r"""Return the field with \t, \n and \\ as the characters they stand for."""
    if b'\\' not in field:
        return field
    return re.sub(rb'\\(.)', lambda m: {b't': b'\t', b'n': b'\n'}.get(m[1], m[1]), field)


# ---- Connection: argument lists and configuration of ssh and rsync; starts nothing ----

COPY_ALIAS = 'ssh-scheduler-copy'       # through the master, or not at all
NO_MASTER = 'SSH_SCHEDULER_NO_MASTER'
COPY_SILENCE_S = 600                    # an rsync that is silent for this time has failed
ALONE = ('-o', 'ControlMaster=no', '-o', 'ControlPath=none')    # a copy has a login of its own

# This text crosses a login shell: bash, dash, zsh, fish and tcsh read it alike.  The script follows
# on stdin, up to a NUL; bash's read takes a byte at a time, so nothing behind that is swallowed.
# -p: exported functions, BASH_ENV and SHELLOPTS do not change this bash; -t: nor does TMOUT.
BOOTSTRAP = 'read -rt 9999 -d ""; eval "$REPLY"'
BOOTSTRAP_BASH = ('bash', '-pc')

FORCED_SSH_OPTIONS = """\
  RequestTTY no
  RemoteCommand none
  SessionType default
  StdinNull no
  ForkAfterAuthentication no
  EscapeChar none
  PermitLocalCommand no
  ClearAllForwardings yes
  ForwardAgent no
  ForwardX11 no
  Tunnel no
  UpdateHostKeys no
  VisualHostKey no
  ControlPersist no
"""

HOP_LIMIT_S = 15        # for a connection; one through a jump host has more time
# An ssh before OpenSSH 8.7 does not know these forced options, and behaves as they ask.
LATER_SSH_OPTIONS = ('SessionType', 'StdinNull', 'ForkAfterAuthentication')

# LogLevel is that of jump hosts; with less than INFO ssh does not tell why it could not go further.
COMMON_SSH_OPTIONS = f"""\
Host *
  BatchMode yes
  NumberOfPasswordPrompts 0
  StrictHostKeyChecking accept-new
  ConnectTimeout {HOP_LIMIT_S}
  ServerAliveInterval 15
  ServerAliveCountMax 4
  LogLevel INFO
"""


class Connection:
    """The way to one machine: pure text and argument lists.

    A copy (an rsync, a tar, a follower) is a session beside the channel: through its login, or
    alone, with a login of its own.  Copies are alone where sshd allows one session a login: a tar
    through the channel would need a second protocol for the same thing.
    nice: an increment, as nice(1) has it
    """

    def __init__(self, machine, run_folder, number, nice=0):
        self.machine = machine
        # The whole remote runner is niced, and each copy: so no job costs a process for it.  Jobs
        # leave others their cores by placement; niceness counts at the moment when others come.
        self._nice = ['nice', '-n', str(nice)] if nice else []
        self.config_path = os.path.join(run_folder, f'{number}.config')
        self.jump_path = os.path.join(run_folder, f'{number}.jump')
        self.socket_path = os.path.join(run_folder, f'{number}')

    def config(self):
        """Return the text of the ssh_config.  ssh takes the first value of each option.

        IgnoreUnknown names the options that an older ssh does not know, and repeats what the files
        of the user name there, which would come second.
        """
        machine, hops = self.machine, self.machine.hops
        ignored = [words for path in self.user_configs() for words in ignored_options(path)]
        lines = ['IgnoreUnknown ' + ','.join([*LATER_SSH_OPTIONS, *ignored])]
        lines += [f'Host {machine.host}', FORCED_SSH_OPTIONS.rstrip()]
        lines += ['  ControlMaster yes', f'  ControlPath "{self.socket_path}"']
        if machine.username:
            lines.append(f'  User "{machine.username}"')
        if machine.port:
            lines.append(f'  Port {machine.port}')
        if machine.ssh_key_path:
            path = machine.ssh_key_path.replace('%', '%%')
            lines += [f'  IdentityFile "{path}"', '  IdentitiesOnly yes']
        options = [('ProxyJump', machine.proxy_jump)] if machine.proxy_jump else []
        for name, value in [*options, *machine.ssh_options]:
            if name.lower() == 'proxyjump' and hops:
                lines += [f'  ProxyCommand {self._through(hops)}', '  ProxyUseFdpass no']
            elif name.lower() in UNQUOTED_SSH_OPTIONS:
                lines.append(f'  {name} {value}')
            else:
                lines.append(f'  {name} "{value}"')
        lines += [f'  ConnectTimeout {HOP_LIMIT_S + 5 * len(hops)}', '  LogLevel ERROR']
        lines += [f'Host {COPY_ALIAS}', FORCED_SSH_OPTIONS.rstrip(), '  ControlMaster no',
                  f'  ControlPath "{self.socket_path}"', '  LogLevel ERROR',
                  f"  ProxyCommand sh -c 'echo {NO_MASTER} >&2; exit 1'", self.jump_config()]
        return '\n'.join(lines)

    def jump_config(self):
        """Return the text of the ssh_config of jump hosts: none of it is the machine's own."""
        return COMMON_SSH_OPTIONS + '  Include ' + ' '.join(
            f'"{path}"' for path in self.user_configs()) + '\n'

    def _through(self, hops):
        """Return the ProxyCommand that does what ProxyJump would do.

        With ProxyJump ssh gives a jump host the -F of the machine, and so the machine's `Host`
        block, which matches the jump host, too, where both have one address.  The first hop times
        out first, so that its complaint is heard: it says most.
        """
        *before, (user, host, port) = hops
        words = ['ssh', '-F', self.jump_path, '-o',
                 f'ConnectTimeout={HOP_LIMIT_S + 5 * len(before)}', '-W', "'[%h]:%p'"]
        words += ['-J', f"'{self.machine.jump.rpartition(',')[0]}'"] if before else []
        words += ['-l', user] if user else []
        words += ['-p', port] if port else []
        return ' '.join([*words, '--', host.strip('[]')])

    @staticmethod
    def user_configs():
        """Return the paths of the configurations of the user and of the computer."""
        return [os.path.expanduser('~/.ssh/config'), '/etc/ssh/ssh_config']

    def channel(self):
        """Return the argv of the channel."""
        return self._reach(self.machine.host, '-T')

    def copy(self, alone=False):
        """Return the argv of a program there that runs the script on its stdin, for one copy."""
        if alone:
            return self._reach(self.machine.host, '-T', *ALONE)
        return self._reach(COPY_ALIAS, '-T')

    def terminal(self, path):
        """Return the argv of a bash script there that has our terminal.

        path: of the script, without characters that a shell would read
        """
        if not self.machine.host:
            return [*self._nice, 'bash', '-p', path]
        return ['ssh', '-F', self.config_path, '-tt', '-o', 'EscapeChar ~', '--', COPY_ALIAS,
                ' '.join(['exec', *self._nice, 'bash', '-p', path])]

    def _reach(self, alias, *options):
        if not self.machine.host:
            return [*self._nice, *BOOTSTRAP_BASH, BOOTSTRAP]
        return ['ssh', '-F', self.config_path, *options, '--', alias,
                ' '.join(['exec', *self._nice, *BOOTSTRAP_BASH, f"'{BOOTSTRAP}'"])]

    def rsync(self, options, source, target, remote, alone=False):
        """Return the argv of an rsync; its list of paths comes on stdin, NUL-terminated.

        remote: the side that is on the machine, 'source' or 'target'
        """
        argv = ['rsync', '-lpt', '--no-D', '--from0', '--files-from=-',
                f'--timeout={COPY_SILENCE_S}', *options]
        if self.machine.host:
            argv += ['-e', ' '.join(['ssh', '-F', self.config_path, *(ALONE if alone else ())])]
            argv += ['--rsync-path', ' '.join([*self._nice, 'rsync'])] if self._nice else []
            host = self.machine.host if alone else COPY_ALIAS
            host = f'[{host}]' if ':' in host else host
            source = f'{host}:{source}' if remote == 'source' else source
            target = f'{host}:{target}' if remote == 'target' else target
        return [*argv, '--', source, target]


def session_refused(complaint):
    """Tell whether sshd refused a session beside the channel (MaxSessions).  complaint: stderr."""
    return 'open refused by peer' in complaint


def ignored_options(path, depth=0):
    """Yield the values of IgnoreUnknown in an ssh_config and in the files that it includes."""
    import glob
    try:
        with open(path, encoding='utf-8', errors='surrogateescape') as file:
            text = file.read()
    except OSError:
        return
    for word, value in re.findall(r'(?im)^[ \t]*(IgnoreUnknown|Include)[ \t=]+(\S.*)$', text):
        if word.lower() == 'ignoreunknown':
            yield value.strip().strip('"')
        elif depth < 16:                    # as ssh has it
            for pattern in value.split():
                pattern = os.path.expanduser(pattern.strip('"'))
                for inner in sorted(glob.glob(os.path.join(os.path.dirname(path), pattern))):
                    yield from ignored_options(inner, depth + 1)


# (Pattern of ssh's words, when to try again, our sentence).  'again' is at once, since sshd was
# only too busy; 'never', since a second try is no better and may be taken for an attack.  These
# words decide nothing else.
SSH_COMPLAINTS = (
    (r'Offending .* key in (.+):\d+\s(?:.*\n)*?Host key for (\S+) has changed', 'never',
     'the host key of {at} is not the one that is known, so this may be another machine. Was '
     'it reinstalled? Try: ssh-keygen -f "{0}" -R "{1}"'),
    (r'REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed', 'never',
     'the host key of {at} is not the one that is known, so this may be another machine'),
    (r'host key is known for \S+ and you', 'never',
     'the host key of {at} is not known: log in once with ssh, and compare the key'),
    (r'Host key verification failed', 'never', 'the host key of {at} could not be verified'),
    (r'Could not resolve hostname (\S+): Temporary failure', 'later',
     'no name server could be asked for the {kind} name {0}'),
    (r'Could not resolve hostname (\S+):', 'never', 'the {kind} name {0} is unknown'),
    (r'open failed: administratively prohibited', 'never',
     '{at} forbids connections to {next} (AllowTcpForwarding or PermitOpen in its sshd_config)'),
    (r'open failed: connect failed: Name or service not known', 'never',
     '{at} finds no address of {next}'),
    (r'open failed: connect failed: (.*)', 'later', '{at} cannot connect to {next}: {0}'),
    (r'stdio forwarding failed', 'later', '{at} could not connect to {next}'),
    (r'(\S+): Name or service not known', 'never', 'the host name that {0} looks for is unknown'),
    (r'(\S+): (?:command )?not found', 'never', 'its ProxyCommand needs {0}, which is not here'),
    (r'Connection refused', 'later', 'nothing listens at {at}'),
    (r'Permission denied \((.*?)\)', 'never',
     'the login as {user} at {at} was refused ({0} was tried): is the user name right, and is '
     'the key in its ~/.ssh/authorized_keys?'),
    (r'Too many authentication failures', 'never',
     'too many keys were offered to {at}: set ssh_key_path (for a jump host IdentityFile and '
     'IdentitiesOnly in ~/.ssh/config)'),
    (r'Unable to negotiate with .*?: (.*)', 'never', '{at} and ssh here have no method in '
     'common: {0}'),
    (r'No route to host|Network is unreachable', 'later',
     '{at} cannot be reached: is the machine on, and the VPN?'),
    (r'timed out', 'later', '{at} did not answer in time: is the machine on, and the VPN?'),
    (r'Bad owner or permissions on (\S+)', 'never', 'ssh refuses {0}: others may write it'),
    (r'[Bb]ad configuration option: (\S+)', 'never', 'ssh does not know the option {0}'),
    (r'(exec|shell) request failed', 'later',
     'the sshd of {at} could not start a shell: is the limit of processes of {user} reached?'),
    (r'kex_exchange_identification|Connection closed by|Connection reset', 'again',
     '{at} closed the connection before the login'),
)
CUT_OFF = re.compile(r'\w+_exchange_identification: Connection closed by remote host')
LOGIN_COMPLAINTS = (
    (r'[Cc]annot fork|fork failed|fork: (?!retry)', 'later',
     'this account can start no more processes: is the limit of {user} (ulimit -u) reached?'),
    (r'sftp connections only', 'never', 'this account allows sftp only, no commands'),
    (r'account is currently not available|nologin', 'never', 'this account allows no login'),
    (r'bash.*(not found|No such file)|[Uu]nknown command.*bash', 'never',
     '{at} has no bash'),
    (r': restricted', 'never', 'its login shell is a restricted one'),
)


FORCED = ('another command forced on this login, by ForceCommand in sshd_config or command= in '
          '~/.ssh/authorized_keys')


def explain_login(machine, status, noise, complaint):
    """Return (why no channel came up, when to try again); the sentence has no full stop.

    status: ssh's exit status; noise: what it wrote on stdout; complaint: its stderr
    """
    # Where a jump host fails, its ssh tells why.  Then each ssh behind it says that it was cut off;
    # these are counted, since messages do not always have names, and names may be equal.
    why, *cuts = CUT_OFF.split(complaint)
    if not any(re.search(pattern, why) for pattern, *_ in SSH_COMPLAINTS):
        why, cuts = complaint, []
    words = name_hops(machine, why, len(cuts))
    for table, text in ((LOGIN_COMPLAINTS, '' if cuts else noise + complaint),
                        (SSH_COMPLAINTS, why)):
        for pattern, retry, template in table:
            match = re.search(pattern, text)
            if match:
                return template.format(*match.groups(''), **words), retry
    last = printable((complaint.strip() or noise.strip()).rpartition('\n')[2])[:300].rstrip('. ')
    if status == 255:
        return last or 'the connection broke', 'later'
    said = f', after saying: {last}' if last else ''
    return ('its login shell ended before anything could run (is there an exit in one of its start '
            f'files, such as ~/.bashrc, or {FORCED}?){said}', 'never')


def name_hops(machine, why, cuts):
    """Return {word: text} for the sentences of SSH_COMPLAINTS: they name the hop that failed.

    why: the complaint of its ssh; cuts: how many ssh behind it were cut off
    """
    ways = machine.hops or ([('', '', '')] if cuts else [])     # or ~/.ssh/config has a way
    hops = [*ways, (machine.username, machine.host, machine.port)]
    place = max(len(ways) - cuts, 0)
    user, host, port = hops[place]
    kind = 'jump host' if place < len(ways) else 'host'
    who = re.search(r'(\S+)@(\S+): Permission denied', why)
    where = re.search(r'(?:host|to|by|from|with) (?!UNKNOWN)(\S+) port (\d+)', why)
    if not port and where:              # ~/.ssh/config may say more, and ssh knows
        host, port = where.groups()
    elif not port:
        host, port = who[2] if who else host, ''
    name = f'{kind} {host}'.rstrip() if kind == 'jump host' else host
    return {'user': who[1] if who else user or 'you', 'kind': kind, 'at': place_of(name, port),
            'next': place_of(*hops[min(place + 1, len(ways))][1:])}


def place_of(host, port):
    """Return how a sentence names a host and its port."""
    return f'{host} port {port}' if port else host


# ---- Client: what the machines of one run share ----

class Client:
    """All that the machines of one run share; `close` ends its processes and removes its files.

    live: what the machines have free is looked at again while jobs wait
    away_limit_s: how long contact that was lost is looked for
    max_result_bytes: of what a job brings back; None: what has room here
    """

    def __init__(self, results=None, trace=None, *, nice=0, live=True, project=None,
                 away_limit_s=0.0, max_result_bytes=None):
        self.nice, self.live = nice, live
        self.away_limit_s, self.max_result_bytes = away_limit_s, max_result_bytes
        self.trace = trace or (lambda text: None)
        self.processes = Processes(lambda argv: self.trace('+ ' + ' '.join(map(printable, argv))))
        self.flows = Flows(self.processes)
        self.run_folder = make_run_folder()
        self.batch_id = f'{time.strftime("%Y%m%dT%H%M%S")}.{os.getpid()}'
        self.project = project or project_name()
        self.accounts = {}              # what tells accounts apart -> the Worker that has it
        self.files = Files()
        self.results = results

    @property
    def journal(self):
        """The Journal of the results, or None where no job is run."""
        return self.results and self.results.journal

    @property
    def owner(self):
        """The owner that a remote runner notes on its machine.

        Another runner of this owner is left from an earlier run or a lost contact, and is ended.
        """
        if not self.results:
            return self.batch_id
        return f'{self.results.part or "batch"} {self.journal.identity}'

    def rsync_env(self):
        """Return the environment for rsync: nothing that changes what it does, nor a ~/.popt."""
        return {**{name: value for name, value in os.environ.items()
                   if not name.startswith('RSYNC_')}, 'HOME': self.run_folder}

    def wait_while(self, unfinished, until, hurried=lambda: False):
        """Wait while unfinished(), at most until that time (monotonic), and not once hurried()."""
        while unfinished() and not hurried() and time.monotonic() < until:
            self.processes.wait(0.2)

    def close(self):
        """End what still runs here and remove the run folder."""
        import shutil
        self.flows.close()
        self.processes.close()
        shutil.rmtree(self.run_folder, ignore_errors=True)


class Files:
    """The files that go along, by Forwards: looked at once for all machines."""

    def __init__(self):
        self._trees, self._archives, self._manifests = {}, {}, {}
        self._folder_times = {}             # Forwards -> when the current folder had changed then

    def trees(self, forwards):
        """Return (Tree to copy, Tree to link) of the Forwards; looked at once."""
        if forwards not in self._trees:
            self._trees[forwards] = self._scan(forwards)
        return self._trees[forwards]

    def look_again(self, forwards):
        """Have `trees` tell how the files are now, unless an archive of them was made already.

        A line's own files may be sent hours after the first look.
        """
        trees = self._trees.get(forwards)
        if trees is None or forwards in self._archives or (
                self._folder_times[forwards] == os.stat('.').st_mtime_ns
                and all(is_as_seen(entry) for tree in trees for entry in tree.entries)):
            return
        with contextlib.suppress(FilesError):       # then what is left of them is sent
            self._trees[forwards] = self._scan(forwards)
            self._manifests.pop(forwards, None)

    def _scan(self, forwards):
        self._folder_times[forwards] = os.stat('.').st_mtime_ns
        linked = tuple(f'/{path}' for path in forwards.link)
        return (scan_tree(forwards.copy, linked + forwards.exclude, '--copy-forwards'),
                scan_tree(forwards.link, forwards.exclude, '--link-forwards'))

    def lost_links(self, all_forwards):
        """Return a warning of links in these Forwards that lead nowhere on a machine; '' if none.
        """
        lost = sorted({path for forwards in all_forwards
                       for path in lost_links(*self.trees(forwards), forwards.link)})
        if not lost:
            return ''
        names = names_of([printable(f'{path} -> {os.readlink(path)}') for path in lost])
        here, remedy = os.path.realpath('.'), ''
        for path in lost:
            real = os.path.realpath(path)
            if os.path.isabs(os.readlink(path)) and real.startswith(f'{here}/'):
                remedy = (' A link into this folder must be relative: ln -srfn '
                          f'{printable(os.path.relpath(real))} {printable(path)}.')
        return (f'jobs cannot follow {count_of(len(lost), "link")}, because the target is not '
                f'sent: {names}.{remedy} Move the files into this folder (and name large data with '
                '--link-forwards), or leave out the links with --exclude')

    def manifest(self, forwards):
        """Return the Manifest of the Forwards; made once."""
        if forwards not in self._manifests:
            self._manifests[forwards] = Manifest.of(*self.trees(forwards))
        return self._manifests[forwards]

    def small_archive(self, forwards):
        """Return the files of the Forwards as one tar archive, for all machines the same."""
        if forwards not in self._archives:
            for _ in range(3):
                copy, link = trees = self.trees(forwards)
                placed = [(f'copy/{entry.path}', entry) for entry in copy.entries]
                placed += [(f'link/{entry.path}', entry) for entry in link.entries]
                data = b''.join(archive(placed))
                self.look_again(forwards)
                if self.trees(forwards) is trees:   # nothing changed while it was read
                    break
            self.manifest(forwards)
            self._archives[forwards] = data
        return self._archives[forwards]


def make_run_folder():
    """Return a new private folder whose path is short and plain, for sockets and configurations.

    A socket's path may have about 90 bytes, and neither rsync -e nor ssh_config likes blanks.
    """
    for base in (os.environ.get('XDG_RUNTIME_DIR'), os.environ.get('TMPDIR'), '/tmp'):
        if base and re.fullmatch(r'/[\w./-]{1,45}', base) and os.access(base, os.W_OK | os.X_OK):
            remove_dead_folders(base)
            with contextlib.suppress(OSError):      # it is full
                return private_folder(os.path.join(base, f'sshs.{os.getpid()}'))
    raise SchedulerError('there is no folder for temporary files: /tmp cannot be written.')


def remove_dead_folders(base):
    """Remove the run folders of killed runs of this user."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(base)):
            match = re.fullmatch(r'sshs\.([1-9][0-9]{0,8})-[0-9a-f]{12}', entry.name)
            if match and entry.is_dir(follow_symlinks=False) and (
                    entry.stat(follow_symlinks=False).st_uid == os.getuid()):
                try:
                    os.kill(int(match[1]), 0)
                except ProcessLookupError:
                    import shutil
                    shutil.rmtree(entry.path, ignore_errors=True)
                except PermissionError:
                    pass        # its number is another's by now: next time


def project_name():
    """Return the name of this folder's place on machines: readable, and of this folder only."""
    import hashlib
    here = os.path.realpath('.')
    who = f'{os.uname().nodename}\0{os.getuid()}\0{here}'
    readable = re.sub(r'[^A-Za-z0-9_-]', '_', os.path.basename(here))[:40] or 'root'
    return f'{readable}-{hashlib.sha256(os.fsencode(who)).hexdigest()[:12]}'


# ---- Copies: files there and back, by rsync or tar ----

# Smaller trees go through the channel as tar, behind the script, before the login has even ended.
# An rsync costs a session with the login's start files, in a small batch as much as all the rest.
SMALL_TREE_BYTES = 256 * 1024
SMALL_TREE_ENTRIES = 2000
COPY_LIMIT_S = 24 * 3600.0          # ServerAlive on the master ends a dead link much earlier
GUARD_S = 0.5                       # how often the disk is looked at while results come
MANY_NAMES = 5000                   # rsync takes 4.5 s to check 40,000, and 25 s for 100,000


class Way(NamedTuple):
    """One way to carry files."""
    by_rsync: bool                  # else with tar
    alone: bool                     # with a login of its own, else over that of the contact
    trusting: bool                  # rsync does not compare names; vet does, which is faster


def carry(contact, worker, copy, is_allowed=True, trusts=False):
    """A flow: copy in one way after another, until one has worked or failed for good.

    copy(way) is a flow that returns the End of the child; is_allowed: rsync may be tried; trusts:
    rsync may trust the sender.  Return (Way, End).

    What the rsync here can do is learnt from its failure: to ask first would cost a process.
    """
    while True:
        way = Way(is_allowed and contact.rsync_works, contact.alone, trusts)
        end = yield from copy(way)
        while end.status and not end.full and contact.is_gone:
            yield TICK_S            # this failed with the contact, and ends with it
        if end.status and not end.full and not way.alone and session_refused(end.text):
            contact.alone = True
        elif way.by_rsync and trusts and end.status == 1:       # an rsync before 3.2.5
            trusts = False
        elif way.by_rsync and end.status not in (0, 23, 24) and not end.full:
            refused = re.search(r'.*(unsafe pathname|invalid path|unrequested).*', end.text)
            if refused:
                worker.report.warning(
                    f'{worker.name}: rsync refused what came from there, so it comes with tar: '
                    f'{printable(refused[0])[:300]}')
            worker.client.trace(f'{worker.name}: rsync ended with {end.status}, now tar: '
                                f'{end.text}')
            contact.rsync_works = False
        else:
            return way, end


def is_small(copy, link):
    """Tell whether these Trees go through the channel."""
    return (copy.size + link.size <= SMALL_TREE_BYTES
            and len(copy.entries) + len(link.entries) <= SMALL_TREE_ENTRIES)


class Stage:
    """The files of one Forwards on one machine.  id is '' where there are none."""

    def __init__(self, stage_id, forwards, trees, manifest=None):
        self.forwards = forwards
        self.copy, self.link = trees
        self.manifest = manifest            # what is noted of the files that jobs have
        self.ready = not (self.copy.entries or self.link.entries)
        self.id = '' if self.ready else stage_id
        self.by_rsync = False
        self.looks = 0                      # how often files had changed while they were copied

    @property
    def small(self):
        """Tell whether it goes through the channel."""
        return is_small(self.copy, self.link)

    def changed(self):
        """Look again at the files here, at most three times; return whether any changed."""
        trees = [tree._replace(entries=tuple(present(tree.entries)))
                 for tree in (self.copy, self.link)]
        if self.looks > 2 or trees == [self.copy, self.link]:
            return False
        self.looks += 1
        self.copy, self.link = trees
        return True


class Stages:
    """The files that one contact has sent, or sends, by Forwards."""

    def __init__(self, contact, worker, former=()):
        self.former = [*former]             # Stages of former contacts: rsync compares with them
        self._contact, self._worker = contact, worker
        self._stages = {}                   # Forwards -> Stage
        self._may_copy = False              # the machine has said where and how

    @property
    def all(self):
        """The Stages that are there, or on their way, those of former contacts first."""
        return [*self.former, *(stage for stage in self._stages.values() if stage.id)]

    def prepare(self, forwards):
        """Return the Stage of these Forwards, and see to it that it is sent."""
        files = self._worker.client.files
        if forwards not in self._stages:
            files.look_again(forwards)
            if is_small(*files.trees(forwards)):
                data = files.small_archive(forwards)
            stage = self._stages[forwards] = self._stage(forwards)      # as the archive has them
            if stage.ready:
                pass
            elif stage.small:
                self._contact.send('unpack', stage.id, len(data), data=data)
                self._freeze(stage)
            elif self._may_copy and not self._contact.is_over:
                self._contact.flows.start(self._send(stage))
        return self._stages[forwards]

    def _stage(self, forwards):
        files = self._worker.client.files
        return Stage(f'{self._contact.id}.{len(self._stages)}', forwards, files.trees(forwards),
                     files.manifest(forwards))

    def begin(self):
        """Send what had to wait for the machine's answer."""
        self._may_copy = True
        for stage in self._stages.values():
            if not stage.ready and not stage.small:
                self._contact.flows.start(self._send(stage))

    def staged(self, stage_id):
        """The machine has all files of this stage."""
        for stage in self._stages.values():
            if stage.id == stage_id and not stage.ready:
                stage.ready = True
                self._worker.report.sent(self._worker.name, stage)

    def _freeze(self, stage):
        self._contact.send('freeze', stage.id, *stage.forwards.link)

    def _send(self, stage):
        """A flow: send a stage that is too large for the channel, and have it frozen."""
        worker = self._worker
        while True:
            why = yield from self._send_parts(stage)
            if not stage.changed():
                break
        if why:
            self._contact.send('unsent', f'the files could not be sent: {why}')
            return
        if stage.looks:
            before, stage.manifest = stage.manifest, Manifest.of(stage.copy, stage.link)
            names = names_of([*map(printable, stage.manifest.changed(before))])
            worker.report.warning(f'{worker.name}: {names} changed after this run began, so jobs '
                                  'there have the newer files')
        self._freeze(stage)

    def _send_parts(self, stage):
        """A flow: send both trees of a stage; return why that failed, or ''."""
        worker, stage.by_rsync = self._worker, True
        for tree, part in ((stage.copy, 'copy'), (stage.link, 'link')):
            if not tree.entries:
                continue
            way, end = yield from carry(self._contact, worker,
                                        functools.partial(self._send_tree, stage, tree, part))
            stage.by_rsync = stage.by_rsync and way.by_rsync
            if end.status == 24:
                worker.report.warning(f'{worker.name}: files vanished while they were sent: '
                                      f'{complaint_line(end.text)}')
            if end.status not in (0, 24):
                return complaint_line(end.text) or str(end.status)
        return ''

    def _send_tree(self, stage, tree, part, way):
        """A flow: send a tree in one way; return its End."""
        contact, folder = self._contact, f'stage/{stage.id}/{part}'
        target, output = f'{contact.home}/{folder}', bytearray()
        if way.by_rsync:
            # From our own list of files, so rsync and tar carry the same by construction; into a
            # fresh folder beside the cache, so nothing has to be deleted there.
            contact.send('folder', folder)
            paths = b''.join(b'./' + os.fsencode(entry.path) + b'\0' for entry in tree.entries)
            bases = [f'../../../cache/{part}', *(f'../../{other.id}/{part}' for other in
                                                 self.former[-3:] if other.by_rsync)]
            argv = contact.connection.rsync(['-@-1', *(f'--link-dest={base}' for base in bases)],
                                            '.', f'{target}/', 'target', way.alone)
            feed = iter([paths])
        else:
            argv = contact.connection.copy(way.alone)
            feed = chain_bytes(bytes(nul_ended(REMOTE_UNPACK, contact.token, target)),
                               archive((entry.path, entry) for entry in tree.entries))
        end = yield contact.start(argv, output.extend, feed=feed, deadline_s=COPY_LIMIT_S,
                                  env=self._worker.client.rsync_env())
        # The exit status of a login shell proves nothing, so what takes tar confirms it.
        confirmed = output.rpartition(f'\n{contact.token} '.encode())[2] == b'0\n'
        if way.by_rsync or confirmed or end.status not in (0, 24):
            return end
        return End(1, end.text or 'tar was not run there')


def chain_bytes(head, pieces):
    """Yield the head, then the pieces."""
    yield head
    yield from pieces


def fetch_tree(contact, worker, names, folder, receiver, way):
    """A flow: bring the paths ./NAME below jobs/ into an empty folder, in one way; return its End.

    receiver: a TarReceiver, for what comes without rsync
    """
    client, source = worker.client, f'{contact.home}/jobs'
    listed = b''.join(os.fsencode(name) + b'\0' for name in names)
    confined = confine(folder) if way.by_rsync else None
    if way.by_rsync:
        # rsync compares each name with all that were asked for, and so does vet, but faster.
        limit = client.max_result_bytes
        options = [*([] if limit is None else [f'--max-size={limit}']),
                   *(['--trust-sender'] if way.trusting and confined else [])]
        argv = contact.connection.rsync(options, f'{source}/', f'{folder}/', 'source', way.alone)
        feed, on_output = iter([listed]), ignore
    else:
        argv = contact.connection.copy(way.alone)
        feed = iter([bytes(nul_ended(REMOTE_PACK, contact.token, source)), listed])
        on_output = receiver.receive
    child = contact.start(argv, on_output, feed=feed, deadline_s=COPY_LIMIT_S,
                          env=client.rsync_env(), confined=confined)
    full = []
    contact.flows.start(guard_disk(child, folder, full))
    end = yield child
    return end._replace(full=bool(full))


def guard_disk(child, folder, full):
    """A flow: kill the child when the disk is full; a machine may send more than it announced."""
    while child.popen.poll() is None:
        yield GUARD_S
        with contextlib.suppress(FileNotFoundError):        # somebody removed the folder
            if child.popen.poll() is None and free_bytes(folder) <= 0:
                full.append(True)
                child.kill()


def vet(folder, wanted, modes=None):
    """Remove what must not be in a folder that came from a machine; yield (path, why) of each.

    wanted: the paths './a' that were asked for.  Where one of them did not come, why is ''.
    modes: {path: mode} of what had another one there than it came with.
    Only folders are opened and followed here.  A file that stays keeps the permissions that its job
    gave it, less those that the umask here takes: as with cp, and not as with git, since a file of
    mode 0600 must not become public.
    """
    missing = {spelled_here(path): path for path in map(os.path.normpath, wanted)}
    allowed = set()
    for path in missing:
        while path and path not in allowed:
            allowed.add(path)
            path = os.path.dirname(path)
    usual, shut = new_folder_mode(), []
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(parent, name)
            inner = spelled_here(os.path.relpath(path, folder))
            info, why = os.lstat(path), ''
            is_folder, has = stat.S_ISDIR(info.st_mode), stat.S_IMODE(info.st_mode)
            missing.pop(inner, None)
            if inner not in allowed:
                why = 'was not asked for'
            elif stat.S_ISLNK(info.st_mode):
                target = os.path.normpath(os.path.join(os.path.dirname(inner), os.readlink(path)))
                if os.path.isabs(target) or target.split('/')[0] == '..':
                    why = f'leads out of its folder, to {printable(os.readlink(path))}'
            elif is_folder or stat.S_ISREG(info.st_mode):
                mode = (modes or {}).get(inner, has) & usual
                if is_folder and mode & 0o700 != 0o700:     # open, until all below it was seen
                    shut.append((path, mode))
                    mode |= 0o700
                if mode != has:
                    os.chmod(path, mode)
            else:
                why = 'is no file, folder or link'
            if why:
                yield inner, why
                if is_folder:
                    import shutil
                    shutil.rmtree(path, onerror=make_removable)
                    folders.remove(name)
                else:
                    os.unlink(path)
    yield from ((path, '') for path in sorted(missing.values()))
    for path, mode in reversed(shut):
        os.chmod(path, mode)


def spelled_here(path):
    """Return the path in the one spelling in which paths are compared: HFS+ decomposes letters."""
    import unicodedata
    return path if LINUX else unicodedata.normalize('NFC', path)


def take_out_twins(folder, missing, wanted):
    """Remove files that may be others; return the paths of them and of these others.

    Where a file system ignores case, A and a are one file, with what came last.
    """
    lost = {path.casefold() for path in missing if os.path.lexists(os.path.join(folder, path))}
    twins = [path for path in wanted if path.casefold() in lost]
    for path in twins:
        with contextlib.suppress(OSError):      # it is a folder, or was removed with its twin
            os.unlink(os.path.join(folder, path))
    return sorted(twins)


def free_bytes(folder):
    """Return how many bytes may be written there: some are left for others."""
    info = os.statvfs(folder)
    return (info.f_bavail - min(info.f_blocks // 50, 2**26 // info.f_frsize)) * info.f_frsize


# Landlock (landlock(7)): the numbers are the same on all architectures but these.
OTHER_NUMBERS = ('alpha', 'mips')
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_WRITES = {1: 0b1111111110010, 2: 1 << 13, 3: 1 << 14}     # what each version adds
PR_SET_NO_NEW_PRIVS = 38


def confine(folder):
    """Return what a new process calls so that it can write in this folder only; None where the
    kernel cannot do that."""
    import struct
    libc = c_library() if LINUX and not os.uname().machine.startswith(OTHER_NUMBERS) else None
    if not hasattr(libc, 'prctl'):
        return None
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return None
    rights = sum(bits for least, bits in LANDLOCK_WRITES.items() if version >= least)
    rules = libc.syscall(LANDLOCK_CREATE, struct.pack('Q', rights), 8, 0)
    if rules < 0:
        return None
    for path, allowed in ((folder, rights), (os.devnull, 0b10)):
        fd = os.open(path, os.O_RDONLY)
        libc.syscall(LANDLOCK_ADD, rules, 1, struct.pack('=Qi', allowed, fd), 0)
        os.close(fd)

    def restrict():
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        libc.syscall(LANDLOCK_RESTRICT, rules, 0)

    restrict.close = lambda: os.close(rules)
    return restrict


class AfterToken:
    """The bytes behind a line that is the token; before it, a login may say anything."""

    def __init__(self, token):
        self.found = False
        self.head = b''
        self.count = 0                      # of the bytes behind the token so far
        self._mark = f'\n{token}\n'.encode()

    def receive(self, data):
        """Return the bytes of these that count."""
        data = data if self.found else self._behind(data)
        self.count += len(data)
        return data

    def _behind(self, data):
        self.head += data
        self.head, mark, data = self.head.partition(self._mark)
        self.found = bool(mark)
        if len(self.head) > LONGEST_NOISE:
            self.head = self.head[-len(self._mark):]
        return data


class TarReceiver:
    """A tar stream behind a line that is the token -> a file, since a pipe cannot be unpacked."""

    def __init__(self, path, token):
        self.trouble = ''                   # why it is not whole
        self._path, self._behind = path, AfterToken(token)
        self._file = None

    def receive(self, data):
        """Add bytes that came."""
        data = self._behind.receive(data)
        if not self._behind.found:
            return
        try:
            self._file = self._file or open(self._path, 'xb', buffering=0)
            while data:
                data = data[self._file.write(data):]
        except OSError as error:
            self.trouble = reason_of(error)

    def unpack(self, folder):
        """Extract what came into the folder and return the names that were refused."""
        if not self._file:
            self.trouble = self.trouble or 'nothing arrived'
            return []
        self._file.close()
        try:
            return unpack_archive(self._path, folder)
        except Exception as error:      # what came may be anything, and so is what tarfile raises
            self.trouble = self.trouble or printable(str(error)) or type(error).__name__
        finally:
            self._remove()
        return []

    def close(self):
        """Remove what came, if nothing was unpacked."""
        if self._file and not self._file.closed:
            self._file.close()
            self._remove()

    def _remove(self):
        with contextlib.suppress(FileNotFoundError):        # somebody removed job_results
            os.unlink(self._path)


def is_plain_file(path):
    """Tell whether there is a regular file, not a link to one."""
    return os.path.isfile(path) and not os.path.islink(path)


# ---- Contact: one login, and all that was begun over it ----

CONNECT_LIMIT_S = 60.0              # login, start files, environment and probe
SLOW_LOGIN_S = 10.0                 # after which a warning says why there is no answer
BEAT_S, SILENCE_LIMIT_S = 20.0, 90.0    # how often a silent machine is asked, and for how long


def is_program(name):
    """Tell whether a program of this name can be started here."""
    return any(os.access(os.path.join(folder, name), os.X_OK) for folder in os.get_exec_path())


class Contact:
    """One login to a machine, from connecting to its loss.

    Its ssh is the channel: requests go down to the remote runner, events come up.  Copies,
    followers and timers that were begun over it are its flows, and end with it.  When contact is
    looked for again, that is a new Contact, so nothing of an old one is ever heard.

    worker: worker.hear(event, values) is called for each event, worker.contact_lost(why, retry)
    once when nothing more comes; retry is 'again', 'later' or 'never', see SSH_COMPLAINTS.
    """

    def __init__(self, worker, number, former=()):
        client = worker.client
        self.connection = Connection(worker.machine, client.run_folder, f'{worker.number}.{number}',
                                     client.nice)
        self.id = f'{client.batch_id}.{worker.number}.{number}'
        self.token = os.urandom(16).hex()
        self.home = ''                      # the project's folder on the machine, when it is known
        self.rsync_works = False            # at both ends, as far as we know
        self.alone = False                  # each copy needs a login of its own (MaxSessions)
        self.is_over = False
        self.flows = Flows(client.processes)
        self.stages = Stages(self, worker, former)
        self._heard = time.monotonic()      # when something came
        self._worker, self._client = worker, client
        self._reader = EventReader(self.token)
        self._process = None

    def open(self, terms):
        """Begin to log in, and hand over the remote runner and what it has to know."""
        machine, client = self._worker.machine, self._client
        if machine.host:
            self._write_configurations()
        self._process = client.processes.start(
            self.connection.channel(), self._receive, self._ended, keep_stdin=True,
            cwd=None if machine.host else os.path.expanduser('~'))
        runner = REMOTE_RUNNER.encode()
        env = [f'{name}={value}' for name, value in machine.env]
        self._process.write(nul_ended(REMOTE_LOADER, len(runner)) + runner + nul_ended(
            self.token, machine.workdir, client.project, client.owner, self.id, machine.setup,
            int(terms.want_gpus), len(env), *env))
        if terms.tied:
            self.send('tie')
        self.flows.start(self._warn_of_silence())
        self.flows.start(self._await_answer())

    def _write_configurations(self):
        connection = self.connection
        for path, text in ((connection.config_path, connection.config()),
                           (connection.jump_path, connection.jump_config())):
            try:
                with open(path, 'w', encoding='utf-8',
                          opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                    file.write(text)
            except OSError as error:
                raise SchedulerError(f'there is no folder for temporary files: {path} cannot '
                                     f'be written: {reason_of(error)}.') from error

    def send(self, verb, *fields, data=b''):
        """Queue a request to the remote runner; data: bytes that follow it."""
        self._process.write(request(verb, *fields) + data)

    def start(self, argv, on_output, **settings):
        """Start a process that goes along with this contact, for a flow to yield."""
        return self._client.processes.start(argv, on_output, None, **settings)

    def become_ready(self, home, has_rsync):
        """The machine can be used: send the files that had to wait for that.

        home: the project's folder there; has_rsync: the machine has it
        """
        self.home = home
        self.rsync_works = (has_rsync and is_program('rsync') and self.is_quiet
                            and re.fullmatch(r'/[\w./+@-]*', home) is not None)
        self.stages.begin()
        self.flows.start(self._beat())

    def close(self):
        """Close the channel when all is sent; the remote runner then ends by itself."""
        self._process.close_stdin()

    def end(self):
        """End all of it now; the Worker is not told."""
        self.is_over = True
        self.flows.close()
        if self._process and self._process.popen.poll() is None:
            self._process.kill()

    def lose(self, why, retry='never'):
        """End all of it now, and tell why."""
        if not self.is_over:
            self.end()
            self._worker.contact_lost(why, retry)

    @property
    def is_gone(self):
        """Tell whether its ssh has ended, though that was not noticed yet."""
        return self._process.popen.poll() is not None

    @property
    def is_quiet(self):
        """Tell whether the login printed nothing: rsync cannot stand that it does."""
        return not self._reader.noise.strip()

    def hindrance(self):
        """Return why the machine has not reported its resources yet, if that is known."""
        if self._reader.greeted or not self._worker.machine.host:
            return ('bash runs there, but something takes long: its workdir, the start files of an '
                    'interactive login, such as ~/.bashrc, or nvidia-smi')
        if not os.path.exists(self.connection.socket_path):     # ssh makes it after the login
            return ''
        said = next(filter(None, (complaint_line(text.decode('utf-8', 'replace'), -1) for text in (
            self._process.complaint, self._reader.pending))), '')
        if 'fork: retry' in said:
            return 'this account can start no more processes (ulimit -u)'
        return ('the login succeeded, but no command runs: does one of its start files, such as '
                f'~/.bashrc, wait or read?{f" It says: {said}" if said else ""} Or is '
                f'{FORCED}?')

    def _warn_of_silence(self):
        """A flow: say why the machine does not answer, if that is known."""
        worker = self._worker
        yield SLOW_LOGIN_S
        if worker.state == 'connecting' and self.hindrance():
            worker.report.warning(f'{worker.name}: no answer within {SLOW_LOGIN_S:.0f} s, still '
                                  f'waiting: {self.hindrance()}')

    def _await_answer(self):
        """A flow: give up a machine that does not answer."""
        yield CONNECT_LIMIT_S
        if self._worker.state == 'connecting':
            why = self.hindrance()
            self.lose(f'it gave no answer within {CONNECT_LIMIT_S:.0f} s'
                      + (f': {why}' if why else ''), 'later')

    def _beat(self):
        """A flow: see to it that we notice when nothing comes any more."""
        while True:
            yield BEAT_S
            silent_s = time.monotonic() - self._heard
            if silent_s > SILENCE_LIMIT_S:
                self.lose('it does not answer any more', 'later')
            elif silent_s > BEAT_S / 2:
                self.send('ping', 0)

    def _receive(self, data):
        """Hand on the events that are complete with these bytes."""
        self._heard = time.monotonic()
        try:
            for fields in self._reader.feed(data):
                if not self.is_over:
                    self._hand_on(fields)
        except WireError as error:
            self.lose(str(error))

    def _hand_on(self, fields):
        shown = fields[:-1] if fields[0] == b'data' else fields
        self._client.trace(f'{self._worker.name}: '
                           + printable(b'  '.join(shown).decode('utf-8', 'replace'))[:400])
        self._worker.hear(*decode(fields))

    def _ended(self, status, complaint):
        """Its ssh has ended."""
        text = complaint.decode('utf-8', 'replace')
        if not self._reader.greeted:
            self.lose(*explain_login(self._worker.machine, status,
                                     self._reader.noise.decode('utf-8', 'replace'), text))
        else:
            last = complaint_line(text, -1)
            self.lose('the connection broke' + (f' ({last})' if last else ''), 'later')


# ---- Results on their way: from the machine into job_results ----

GATHER_S = 1.0                      # for which results wait for others, to come together
GATHER_JOBS = 200
CLEAN_JOBS = 50


class Leavings:
    """The files that an attempt left in its folder, as the remote runner lists them."""

    def __init__(self):
        self.back = []                      # paths './a' to fetch
        self.modes = {}                     # {path: mode} of what had to be opened to be fetched
        self.kept = []                      # paths that could not be fetched, and stay there
        self.size = 0                       # bytes, where that is much
        self.too_large = ''                 # why what it made stays there
        self.odd = []                       # (mark, path): '!' is not there, '?' is no file


def read_leavings(entries):
    """Return the Leavings of the entries of a list: a mark and a value each, see entry_of."""
    left = Leavings()
    for mark, value in entries:
        if mark == '+':
            left.back.append(value)
        elif mark == 's':
            left.size = value
        elif mark == 'm':
            mode, path = value
            left.modes[os.path.normpath(path)] = mode
        elif mark == '-':
            left.kept.append(os.path.normpath(value))
        else:
            left.odd.append((mark, value))
    return left


class Collector:
    """Brings the results of one machine: of many attempts with one copy.

    What is to be fetched are the attempts that ended and were listed.  When contact is lost, the
    copy ends with it, and that is still so.
    """

    def __init__(self, worker):
        self._worker, self._client = worker, worker.client
        self._due = None                    # when results have waited long enough for others
        self._under_way = False
        self._cleanable = []                # keys of folders that nobody needs any more

    # Lists of what attempts left

    def add(self, attempt, entries):
        """Collect an attempt that ended; entries: its list, or only @ if that comes on its own."""
        if entries == [('@', '')]:
            self._ask(attempt)
        else:
            self._list_came(attempt, entries)

    def add_kept(self):
        """Try to fetch what an earlier run could not."""
        worker = self._worker
        for name, record in self._client.results.kept(worker.machine.address).items():
            if not worker.lives.get(worker, record['key'], 'incomplete'):
                job = Job(name, record['command'], 0, None, None)
                attempt = Attempt(job, worker, record['key'], record)
                worker.lives.restore(attempt, 'incomplete')

    def resume(self):
        """At contact, ask for the lists that have not come, and fetch what is listed."""
        for attempt in self._worker.lives.of(self._worker, *ARRIVING):
            if attempt.leavings is None:
                self._ask(attempt)
        self.fetch_if_due()

    def _ask(self, attempt):
        if attempt.state == 'incomplete':
            self._worker.contact.send('again', attempt.key, *(
                path for path in attempt.record['kept'] if '\0' not in path))
        else:
            self._worker.contact.send('list', attempt.key)

    def on_back(self, key, entries):
        """The list of an attempt came on its own; nobody may have waited for it."""
        attempt = self._unlisted(key)
        if attempt:
            self._list_came(attempt, entries)

    def on_unlistable(self, key):
        """The list of an attempt cannot come."""
        attempt = self._unlisted(key)
        if attempt:
            self._keep(attempt, 'it made more files than can be listed')

    def _unlisted(self, key):
        attempt = self._worker.lives.get(self._worker, key, *ARRIVING)
        return attempt if attempt and attempt.leavings is None else None

    def _list_came(self, attempt, entries):
        left = attempt.leavings = read_leavings(entries)
        self._warn_of_odd(attempt)
        self._client.journal.check()
        if left.size > free_bytes(self._client.results.folder):
            self._keep(attempt, f'they are {size_of(left.size)}, and the disk here is too full')
            return
        limit = self._client.max_result_bytes
        if limit is not None and left.size > limit:
            left.too_large = (f'it is {size_of(left.size)}, and --max-result-size is '
                              f'{size_of(limit)}')
            self._warn_of(attempt, f'what it made is not brought back: {left.too_large}')
            left.back = []
        self.go_on(attempt)

    def go_on(self, attempt):
        """An attempt was listed, or its streams have come: put it in place, or have it fetched."""
        if attempt.leavings is None or attempt.state not in ARRIVING or (
                self._worker.jobs.is_followed(attempt)):
            return
        if not self._names(attempt):        # all of it came with the event that it ended
            self._commit(attempt, {}, None)
            return
        if self._due is None:
            self._due = time.monotonic() + GATHER_S
            self._client.processes.call_later(GATHER_S, self.fetch_if_due)
        self.fetch_if_due()

    def _warn_of_odd(self, attempt):
        """Tell of what cannot be brought back."""
        name, left, machine = attempt.name, attempt.leavings, self._worker.name
        for mark, path in left.odd:
            if mark == '!' and attempt.state == 'incomplete':
                self._worker.report.warning(f'{name}: {printable(path)}, which could not be '
                                            f'fetched before, is not on {machine} any more')
                continue
            why = ('it did not make {}' if mark == '!' else
                   '{} is no file, folder or link').format(printable(path))
            self._worker.report.warning(f'{name}: {why}, so that is not brought back')
        if left.kept:
            self._warn_of(attempt, f'the login on {machine} may not read '
                          f'{names_of([*map(printable, left.kept)])}, so this was not fetched. '
                          'Make it readable there and run the same command again')

    def _warn_of(self, attempt, what):
        self._worker.report.warning(
            f'{attempt.name}: {sentence(what)} It is kept on {self._worker.name}, in '
            f'{self._worker.contact.home}/jobs/{attempt.key}/work')

    # Fetching it

    def fetch_if_due(self):
        """Fetch what waits if it waited long enough, is much, or nothing else can come soon."""
        worker = self._worker
        if self._under_way or worker.state != 'ready' or worker.contact.is_gone:
            return
        waiting = [attempt for attempt in worker.lives.of(worker, *ARRIVING)
                   if attempt.leavings and not worker.jobs.is_followed(attempt)]
        is_due = self._due is None or time.monotonic() >= self._due
        if waiting and (is_due or len(waiting) >= GATHER_JOBS
                        or not worker.lives.any_of(worker, *HOLDING)):
            self._under_way, self._due = True, None
            worker.contact.flows.start(self._fetch(waiting))

    def _fetch(self, attempts):
        """A flow: bring what these attempts left into an empty folder, and then to its place."""
        worker, results = self._worker, self._client.results
        names = [name for attempt in attempts for name in self._names(attempt)]
        folders, receivers = [], []

        def copy(way):
            folders.append(results.incoming())
            receivers.append(TarReceiver(f'{folders[-1]}.tar', worker.contact.token))
            return (yield from fetch_tree(worker.contact, worker, names, folders[-1],
                                          receivers[-1], way))

        try:
            try:
                # Only Linux confines rsync, and the rsync of macOS writes wherever a machine says.
                way, end = yield from carry(worker.contact, worker, copy, LINUX,
                                            len(names) > MANY_NAMES)
            except OSError as error:        # no folder can be made
                for attempt in [one for one in attempts if one.state in ARRIVING]:
                    self._keep(attempt, reason_of(error))
                return
            trouble = '' if way.by_rsync else self._unpack(receivers[-1], folders[-1], end)
            if end.full:
                trouble = 'the disk here is full'
            for attempt in [one for one in attempts if one.state in ARRIVING]:
                if trouble:         # what is there of it may be cut off, and the rest is missing
                    self._keep(attempt, trouble)
                else:
                    self._collect(attempt, os.path.join(folders[-1], attempt.key),
                                  complaint_line(end.text))
        finally:            # also when contact is lost
            for folder, receiver in zip(folders, receivers):
                receiver.close()
                results.discard(folder)
            self._under_way = False
        self.fetch_if_due()

    def _unpack(self, receiver, folder, end):
        """Unpack what came as tar; return why it is not whole, or ''."""
        for name in receiver.unpack(folder):
            self._worker.report.warning(
                f'{self._worker.name}: refused what came as {printable(name)}')
        if end.status not in (0, 1, 2):         # tar's own, which name single files
            return complaint_line(end.text) or receiver.trouble or f'tar ended with {end.status}'
        return receiver.trouble

    def _missing_streams(self, attempt):
        """Return the streams, 'out' and 'err', that are not here in whole."""
        if attempt.state == 'incomplete':
            return []
        return [name for name, stream in attempt.streams.items()
                if stream.content is None and not self._has_grown(attempt, name, stream)]

    def _has_grown(self, attempt, name, stream):
        """Tell whether all of a stream was shown, and lies in job_results if it belongs there."""
        return stream.here == stream.size and (not attempt.how.keep or (
            stream.stored and self._client.results.has(attempt.name, name, stream.size)))

    def _names(self, attempt):
        """Return the paths to fetch for an attempt, below jobs/."""
        return [*(f'./{attempt.key}/{stream}' for stream in self._missing_streams(attempt)),
                *(f'./{attempt.key}/work/{path[2:]}' for path in attempt.leavings.back)]

    # Putting it in place

    def _collect(self, attempt, folder, complaint):
        """Put in place what came for one attempt into `folder`."""
        streams = {stream: os.path.join(folder, stream)
                   for stream in self._missing_streams(attempt)}
        complaint = complaint or 'it did not arrive'
        work, left = os.path.join(folder, 'work'), attempt.leavings
        # A machine may send anything: behind a link here would be files of the user.
        if os.path.islink(folder) or os.path.islink(work):
            self._keep(attempt, 'a link came in the place of its folder')
            return
        if not all(is_plain_file(path) for path in streams.values()):
            self._keep(attempt, complaint)
            return
        refused = collections.defaultdict(list)
        try:
            if os.path.isdir(work):
                os.chmod(work, 0o700)       # its job may have shut it
            for path, why in vet(work, left.back, left.modes):
                refused[why].append(path)
        except OSError as error:
            self._keep(attempt, reason_of(error))
            return
        missing = refused.pop('', [])
        for why, paths in refused.items():
            self._worker.report.warning(
                f'{attempt.name}: {names_of([*map(printable, paths)])} from '
                f'{self._worker.name} {why}, and was left out')
        twins = take_out_twins(work, missing, [*map(os.path.normpath, left.back)])
        missing = [path for path in missing if path not in twins]
        for paths, why, hint in (
                (missing, complaint, ' Run the same command again to try once more'),
                (twins, 'the file system here takes names for the same that differ in case only',
                 '')):
            if paths:
                left.kept += paths
                self._warn_of(attempt, f'{names_of([*map(printable, paths)])} could not be '
                              f'fetched: {sentence(why)}{hint}')
        self._commit(attempt, streams, work)

    def _commit(self, attempt, arrived, work):
        """Put the results in their final place; then their originals may go, unless kept.

        arrived: {stream: path} of the streams that a copy brought
        """
        kept = attempt.leavings.kept
        if attempt.leavings.too_large:
            kept = [*attempt.record.get('kept', ())] if attempt.state == 'incomplete' else True
        streams = {name: arrived.get(name, stream.content)
                   for name, stream in attempt.streams.items()}
        try:
            kept = self._put_in_place(attempt, streams, work, kept)
        except (ResultsError, OSError) as error:
            if attempt.state not in (*ARRIVING, 'cancelled'):
                raise                       # somebody who heard of it has failed
            self._keep(attempt, reason_of(error) if isinstance(error, OSError) else str(error))
            return
        if not kept:
            self._cleanable.append(attempt.key)
            self.clean(CLEAN_JOBS)

    def _put_in_place(self, attempt, streams, work, kept):
        """Move what came to where it belongs, and note that; return what stays on the machine."""
        results, lives, name = self._client.results, self._worker.lives, attempt.name
        if attempt.state == 'stopped':
            lives.move(attempt, 'cancelled', kept=kept)
            results.set_aside(name, streams, work)
            return kept
        if attempt.state == 'incomplete':
            kept = [*kept, *self._add(attempt, work)]
        else:
            results.commit(name, streams, work, attempt.job.backwards != (), kept)
        for stream, bytes_here in attempt.streams.items():
            if bytes_here.shown and bytes_here.here < bytes_here.size:
                bytes_here.show_rest(results.read(name, stream, bytes_here.here))
        lives.move(attempt, 'collected', kept=kept)
        return kept

    def _add(self, attempt, work):
        """Put what an earlier run could not fetch to its other results; return what is in the way.
        """
        others = self._client.results.add(attempt.name, work)
        if others:
            self._warn_of(attempt, f'job_results/{attempt.name} has another '
                          f'{names_of([*map(printable, others)])} than {self._worker.name}, so '
                          'that was not fetched. Move yours away and run the same command again')
        return others

    def _keep(self, attempt, why):
        """Leave the results of an attempt on its machine."""
        self._worker.report.warning(
            f'{attempt.name}: its results could not be fetched: {sentence(why)} They are kept on '
            f'{self._worker.name}, and the same command fetches them')
        if attempt.state == 'incomplete':       # all but the kept paths was collected before
            self._worker.lives.move(attempt, 'unfetched')
        elif attempt.state != 'cancelled':
            self._worker.lives.move(attempt, 'kept')

    # Tidying up

    def forget(self, *keys):
        """Nobody wants the results of these jobs: only have them removed."""
        self._cleanable += keys

    def clean(self, least=0):
        """Have the folders of collected jobs removed, many at a time."""
        if len(self._cleanable) > least:
            self._client.journal.sync(results=True)
            self._worker.contact.send('clean', *self._cleanable)
            self._cleanable = []


# ---- Worker: one machine, its contact and its jobs ----

SETTLED_S = 5.0                     # for a machine to tell how jobs ended that ran before
FOLLOW_AFTER_S = 0.08               # the output of a job that ends sooner comes with its end
BEYOND = 2**62                      # more bytes than any stream has
KILL_GRACE_S = 5
MEASURE_LEAST_S = 1.0               # between two looks at what a machine has free
MEASURE_SHARE = 0.01                # of a core, at most, for such looks
MEASURE_LIMIT_S = 60.0              # a look without an answer has failed; the most one is put off
DRAIN_S = 10.0                      # a follower silent this long after the end of its job is dead
FAREWELL_S = 30.0                   # for tidying up on the machine
RETRY_S, LONGEST_RETRY_S = 1.0, 60.0    # before contact is looked for again; it doubles


class Gauge:
    """The free resources of one machine: it is asked, and its facts become a Capacity.

    Asking costs the machine at most MEASURE_SHARE of a core.
    """

    def __init__(self, worker):
        self.capacity = None
        self._worker = worker
        self._facts = []                    # what the probe said so far
        self._is_asked = False              # a look is under way
        self._sample = None                 # what the next one is compared with
        self._ended_keys = set()            # of jobs that ended since it was asked
        self._ended_ticks = 0               # processor time that those used since then
        self._number, self._asked_at = 0, 0.0       # of the look that is under way, or was
        self._due = None                    # when it will be asked, or None
        self._cost_s = 0.0                  # what the last look took of a core

    def renew(self):
        """Forget a look that will not be answered, as one over a former contact."""
        self._facts, self._due, self._is_asked = [], None, False

    def on_probe(self, key, value):
        """Note one fact."""
        if len(self._facts) < 10000:
            self._facts.append((key, value))

    def ended(self, key, cpu_ticks):
        """A job has ended, after this processor time (1/100 s)."""
        self._ended_keys.add(key)
        known = self._sample.ticks.get(key, 0) if self._sample else 0
        self._ended_ticks += max(cpu_ticks - known, 0)

    def understand(self):
        """Make a Capacity of the facts; from now on other batches cannot take more than that."""
        worker = self._worker
        if not self._facts:
            raise WireError('it said something that cannot be understood (it is ready, and did '
                            'not say what it has)')
        ours = {attempt.key for attempt in worker.lives.of(worker, *ALIVE)} | self._ended_keys
        self.capacity = parse_probe(self._facts, worker.machine, ours, self._sample,
                                    self._ended_ticks)
        self._sample = read_sample(self._facts,
                                   self._sample.gpu_free_mb if self._sample else None)
        for key, mb in gpu_memory(self._facts).items():
            attempt = worker.lives.get(worker, key, *ALIVE)
            if attempt:
                attempt.peaks_mb[1] = max(mb, attempt.peaks_mb[1] or 0)
        self._facts, self._ended_keys, self._ended_ticks = [], set(), 0
        if worker.client.live:
            worker.contact.send('limits', *self.capacity.limits)

    def measure(self, within_s=0.0):
        """Ask again what is free, within this many seconds."""
        if self._has_failed:
            self.renew()
        earliest = min(max(MEASURE_LEAST_S, self._cost_s / MEASURE_SHARE), MEASURE_LIMIT_S)
        due = time.monotonic() + max(within_s, earliest if self._sample else 0)
        if self._due is None or due < self._due:
            self._due = due
            self._worker.client.processes.call_later(max(due - time.monotonic(), 0), self._ask)

    @property
    def is_awaited(self):
        """Tell whether it was asked, or will be, and has not answered."""
        return (self._worker.state == 'ready' and self._due is not None
                and not self._has_failed)

    @property
    def _has_failed(self):
        """Tell whether a look has had no answer for too long."""
        return self._is_asked and time.monotonic() > self._asked_at + MEASURE_LIMIT_S

    def _ask(self):
        now = time.monotonic()
        if self._worker.state != 'ready':
            self._due = None
        elif self._due is not None and self._due <= now + 0.001 and not self._is_asked:
            self._number, self._asked_at = self._number + 1, now
            self._facts, self._is_asked = [], True
            self._worker.contact.send('measure', self._number)

    def on_measured(self, number, cost_cs):
        """All facts of a look have come; it took this much of a core (1/100 s)."""
        if number != self._number:
            self._facts = []                # of a look that was given up
        elif self._is_asked:
            self._cost_s, self._due, self._is_asked = cost_cs / 100, None, False
            self.understand()
            self._worker.run.machine_changed(self._worker, 'ready')


class Terms(NamedTuple):
    """How a machine is logged in to."""
    want_gpus: bool = True          # nvidia-smi is asked
    tied: bool = False              # the jobs end with the contact


class Seeking:
    """How contact with a machine is looked for, how often, and since when."""

    def __init__(self, terms):
        self.terms = terms
        self.asks = True                    # the machine is asked what it has
        self.retry = 'never'                # when to try again, after it failed; see SSH_COMPLAINTS
        self.began = time.monotonic()       # when it was first tried
        self.was_ready = False              # there was contact
        self.contacts = 0
        self.tries = 0                      # since there was contact last
        self.away_since = None


KEY = re.compile(r'[A-Za-z0-9_+=@%][A-Za-z0-9._+=@%-]*\.[0-9]+(-[0-9a-f]+)?')       # of a job


class OtherJob(NamedTuple):
    """A job on a machine that a journal claimed which is not in this job_results."""
    key: str                            # NAME.ATTEMPT-IDENTITY; older versions left -IDENTITY out
    state: str                          # running, starting, ended, lost or damaged
    exit_code: int                      # where it has ended
    command: str

    @property
    def name(self):
        """The name that it had in its batch."""
        return self.key.rpartition('.')[0]

    @property
    def identity(self):
        """The identity of its journal, '' where that had none."""
        return self.key.rpartition('.')[2].partition('-')[2]


class Followers:
    """Sessions beside the channel, each of which brings the output of one attempt byte for byte.

    They belong to one contact, as its flows.  A job writes to files on its machine, and is followed
    from these: so execute_remote can be killed at any byte and attach again, and no job is held up
    by a slow reader or a broken link.  The price is disk on both sides.
    """

    def __init__(self, worker):
        self._worker = worker
        self._processes = {}                # key of an attempt -> the Process that brings output

    def has(self, attempt):
        """Tell whether output of this attempt is still brought."""
        return attempt.key in self._processes

    def start(self, attempt):
        """Bring its output from now on; an attempt that soon ends needs no session for that."""
        if not self.has(attempt):
            self._worker.contact.flows.start(self._follow(attempt))

    def _follow(self, attempt):
        """A flow: pass on what a job writes until it has ended."""
        contact, key = self._worker.contact, attempt.key
        yield FOLLOW_AFTER_S
        while (attempt.state in ALIVE and not self.has(attempt)
               and self._worker.state == 'ready'):
            alone = contact.alone
            heads = {stream: AfterToken(contact.token) for stream in ('out', 'err')}
            offsets = {stream: attempt.streams[stream].here for stream in heads}
            receive = {stream: functools.partial(self._receive, attempt, stream, heads[stream],
                                                 offsets[stream]) for stream in heads}
            child = contact.start(contact.connection.copy(alone), receive['out'],
                                  on_error=receive['err'], keep_stdin=True)
            child.write(nul_ended(REMOTE_FOLLOW, contact.token, f'{contact.home}/jobs/{key}',
                                  *offsets.values()))
            self._processes[key] = child
            end = yield child
            noise = heads['err'].head.decode('utf-8', 'replace')
            self._worker.client.trace(f'a follower ended with {end.status}: '
                                      f'{complaint_line(noise)}')
            if self._processes.pop(key, None) and attempt.state not in ALIVE:
                self._worker.collector.go_on(attempt)
            if alone or not session_refused(noise):
                break
            contact.alone = True

    def _receive(self, attempt, stream, head, start, data):
        """Take bytes that a follower brings; start: the offset of its first byte."""
        offset = start + head.count
        data = head.receive(data)
        if not data or not self.has(attempt):
            return
        attempt.streams[stream].bring(offset, data)
        if attempt.state not in ALIVE and attempt.is_heard:
            self.stop(attempt)

    def ended(self, attempt):
        """The job has ended: stop when all its output is here, or when no more of it comes."""
        if self.has(attempt):
            if attempt.is_heard:
                self.stop(attempt)
            else:
                self._worker.contact.flows.start(self._drain(attempt))

    def _drain(self, attempt):
        """A flow: see to it that a follower which has died on the machine holds nothing up."""
        while self.has(attempt):
            before = [stream.here for stream in attempt.streams.values()]
            yield DRAIN_S
            if before == [stream.here for stream in attempt.streams.values()]:
                self.stop(attempt)

    def stop(self, attempt):
        """Want no more: all has come, or the rest comes with a copy."""
        if self.has(attempt):
            self._processes.pop(attempt.key).close_stdin()
            self._worker.collector.go_on(attempt)

    def close(self):
        """Bring no more of any attempt: ssh ends only after the last session on its connection."""
        while self._processes:
            self._processes.popitem()[1].close_stdin()


# The remote runner writes this to the stderr of a job that was killed with what records its end.
KILLED_WITH_GROUP = b'with its whole process group'


class JobControl:
    """The attempts on one machine: it has them started, and hears what becomes of them."""

    def __init__(self, worker):
        self.is_stopping = False            # jobs were told to end, and no answer has come
        self._worker, self._client = worker, worker.client
        self._start_due = False             # what is placed is started in the next wait
        self._followers = Followers(worker)
        self._inherited, self._killed = set(), set()    # keys of jobs that ran before this contact

    def renew(self):
        """Begin anew, over a new contact."""
        self.is_stopping, self._followers = False, Followers(self._worker)
        for attempt in self._worker.lives.of(self._worker, 'placed'):
            if attempt.stage:
                self._prepare(attempt)      # its files are not on the machine

    def close(self):
        """Bring no more output: the contact is to be closed, and the jobs run on."""
        self._followers.close()

    # Starting

    def start(self, attempt):
        """Have an attempt that was placed started as soon as its files are there."""
        self._prepare(attempt)
        self._open_streams(attempt)
        if not self._start_due and self._worker.state == 'ready':
            self._start_due = True          # so all that are placed at this moment share one fsync
            self._client.processes.call_later(0, self.start_placed)

    def _prepare(self, attempt):
        attempt.stage = self._worker.contact.stages.prepare(attempt.job.forwards or Forwards(()))

    def _open_streams(self, attempt):
        how, grow = attempt.how, self._client.results.grow
        for stream in ('out', 'err'):
            attempt.streams[stream] = Stream(
                functools.partial(grow, attempt.name, stream) if how.keep else None,
                functools.partial(how.show, stream) if how.show else None)

    def start_placed(self):
        """Send the starts that are possible, once the journal has them."""
        self._start_due = False
        worker, results, starts = self._worker, self._client.results, []
        for attempt in worker.lives.of(worker, 'placed') if worker.state == 'ready' else ():
            if attempt.stage and attempt.stage.ready:
                former = results.journal.record(attempt.name)
                results.manifests.keep(attempt.stage.manifest)
                attempt.record['files'] = attempt.stage.manifest.digest
                worker.lives.move(attempt, 'claimed', **attempt.record)
                if former.get('kept') and former['machine'] == worker.machine.address:
                    worker.collector.forget(former['key'])      # its results were deleted here
                starts.append(attempt)
        if starts:
            results.journal.sync()
        for attempt in starts:
            self._send_start(attempt)

    def _send_start(self, attempt):
        backwards, how = attempt.job.backwards, attempt.how
        self._worker.contact.send(
            'start', attempt.key, attempt.stage.id, '-' if attempt.gpus is None else attempt.gpus,
            need_of(attempt.placement), how.mode,
            '' if how.timeout_s is None else f'{how.timeout_s:.3f}', attempt.job.command,
            'changed' if backwards is None else 'paths' if backwards else 'none',
            *(backwards or ()))

    def on_started(self, *keys):
        """These jobs run."""
        for key in keys:
            attempt = self._alive(key)
            if not attempt:
                continue
            if attempt.how.source is not None and attempt.state == 'claimed':
                self._worker.contact.flows.start(self._feed(attempt))
            if attempt.how.show:
                self._followers.start(attempt)
            if attempt.state == 'claimed':
                self._worker.lives.move(attempt, 'running')

    def _alive(self, key):
        """Return the attempt that was started, or asked about, over this contact; None if none."""
        attempt = self._worker.lives.get(self._worker, key, *ALIVE)
        return attempt if attempt and attempt.streams else None

    # Asking, after contact was lost or this program was started again

    def ask(self):
        """Ask about each attempt that may run there; a start that never arrived never will."""
        worker = self._worker
        attempts = worker.lives.of(worker, *ALIVE)
        self._inherited, self._killed = {attempt.key for attempt in attempts}, set()
        for attempt in attempts:
            if not attempt.streams:
                self._open_streams(attempt)
        if attempts:
            worker.contact.send('adopt', *self._inherited)
            worker.contact.flows.start(self._await_ends())

    def _await_ends(self):
        """A flow: say, when it is known how they ended, what may have ended them."""
        yield SETTLED_S
        self._explain_killed()

    def _explain_killed(self):
        """Say what may have ended jobs that ran before this contact: logind does that to all."""
        count, killed, lives = len(self._inherited), len(self._killed), self._worker.lives
        alive = {attempt.key for attempt in lives.of(self._worker, *ALIVE)}
        running, self._inherited, self._killed = self._inherited & alive, set(), set()
        if not running and (killed > 1 or 0 < killed == count):
            self._worker.report.warning(
                f'{self._worker.name}: {count_of(killed, "job")} that ran there '
                f'{"was" if killed == 1 else "were"} killed while there was no contact, '
                'though it was not restarted. If its logind ends all that a login leaves '
                '(KillUserProcesses=yes in /etc/systemd/logind.conf), ask for '
                'KillUserProcesses=no; with elogind, loginctl enable-linger is enough')

    def on_absent(self, key):
        """The start of a job never arrived, and never will."""
        self._gone('absent', key)

    # Output and input

    def watch(self):
        """A flow: ask again and again what the jobs have written, and whether they live."""
        worker = self._worker
        while True:
            attempts = worker.lives.of(worker, *ALIVE)
            yield REFRESH_S + len(attempts) / 100
            fields = []
            for attempt in worker.lives.of(worker, *ALIVE):
                known = [stream.here for stream in attempt.streams.values()]
                if not known or self.is_followed(attempt):
                    known = [BEYOND, BEYOND]        # what is followed comes by itself
                fields += [attempt.key, *known]
            if fields:
                worker.contact.send('watch', *fields)

    def on_growth(self, key, stream, offset, data):
        """A job has written this, from this byte on."""
        attempt = self._alive(key)
        if attempt and not self.is_followed(attempt):
            attempt.streams[stream].bring(offset, data)

    def is_followed(self, attempt):
        """Tell whether a follower still brings the output of an attempt."""
        return self._followers.has(attempt)

    def _feed(self, attempt):
        """A flow: pass on what comes for its input, and then that there is no more."""
        contact = self._worker.contact
        child = contact.start(contact.connection.copy(contact.alone), ignore)
        child.write(nul_ended(REMOTE_FEED, f'{contact.home}/jobs/{attempt.key}'))
        self._client.processes.pass_on(attempt.how.source, child)
        end = yield child
        if attempt.state not in ALIVE or contact.is_gone:
            return
        if end.status == 255:           # ssh's own; with others it was read to where it was wanted
            why = complaint_line(end.text) or 'ssh has failed'
            self._worker.report.warning(f'{attempt.name}: its input could not be passed on: '
                                        f'{sentence(why)} It is ended')
            contact.send('cancel', KILL_GRACE_S, attempt.key)
        else:
            contact.send('eof', attempt.key)

    def terminal(self, attempt):
        """A flow: give a job of mode tty our terminal, until it ends."""
        contact = self._worker.contact
        path = f'{contact.home}/jobs/{attempt.key}/tty'
        yield contact.start(contact.connection.terminal(path), None, terminal=True)

    # The end of a job

    def on_ended(self, key, status, time_cs, cpu_cs, out, err, *back):
        """A job has ended; back: what it left."""
        attempt = self._alive(key)
        if not attempt:
            return      # it was reported already, or another run's
        worker = self._worker
        worker.gauge.ended(key, cpu_cs)
        was_seen = time_cs > 0 or cpu_cs > 0        # not where a record is all there is
        result = attempt.result = JobResult(
            attempt.name, worker.name, status, time_cs / 100, attempt.gpus,
            cpu_cs / 100 if was_seen else None, *attempt.peaks_mb)
        attempt.streams['out'].complete(*out)
        attempt.streams['err'].complete(*err)
        # Before its results are put in place, so that `ended` always comes before `collected`.
        if attempt.state == 'stopping':
            worker.lives.move(attempt, 'stopped')
        else:
            if key in self._inherited and (
                    status in (129, 143) or KILLED_WITH_GROUP in (err[0] or b'')):
                self._killed.add(key)
            used = {name: getattr(result, name) for name in ('cpu_s', 'peak_memory_mb',
                                                             'peak_gpu_memory_mb')}
            worker.lives.move(attempt, 'ended', exit_code=status, wall_s=result.wall_s,
                              **{name: value for name, value in used.items() if value is not None})
        if self._killed and not any(self._alive(key) for key in self._inherited):
            self._explain_killed()
        worker.collector.add(attempt, list(back))
        self._followers.ended(attempt)

    def on_used(self, key, peak_kb):
        """The memory of a job's processes was seen at this size."""
        attempt = self._alive(key)
        if attempt:
            attempt.peaks_mb[0] = max(peak_kb // 1024, attempt.peaks_mb[0] or 0)

    def on_left(self, key, text):
        """A job is about to end, and processes that it started are not."""
        attempt = self._alive(key)
        if attempt and attempt.state != 'stopping':     # else that is being ended, too
            self._worker.report.left(self._worker.name, attempt.name, text)

    def on_held(self, key):
        """Another batch took the room of a job first; nothing of it is there."""
        attempt = self._alive(key)
        if attempt:
            self._worker.lives.move(attempt, 'held')

    def on_refused(self, key, why):
        """The machine could not start a job."""
        self._gone('refused', key, why)

    def on_lost(self, key, why):
        """A job is gone without a result."""
        self._gone('lost', key, why)

    def _gone(self, state, key, why=''):
        attempt = self._alive(key)
        if attempt:
            self._worker.collector.forget(key)
            self._worker.lives.move(attempt, state, why)

    # Ending jobs

    def stop(self):
        """End all jobs there, with all that they started; those not started are returned."""
        worker = self._worker
        for attempt in worker.lives.of(worker, 'placed'):
            worker.lives.move(attempt, 'returned', 'interrupted')
        if worker.state != 'ready':
            return                          # nobody can be told
        for attempt in worker.lives.of(worker, *UNSEEN):
            worker.lives.move(attempt, 'stopping')
        keys = [attempt.key for attempt in worker.lives.of(worker, 'stopping')]
        if keys:
            self.is_stopping = True
            worker.contact.send('cancel', KILL_GRACE_S, *keys)

    def on_cancelled(self, pids):
        """The jobs were ended, but for these processes."""
        self.is_stopping = False
        if pids:
            self._worker.report.survivors(self._worker.name, pids)

    @property
    def hears_output(self):
        """Tell whether output of jobs that were told to end still comes."""
        return any(map(self.is_followed, self._worker.lives.of(self._worker, 'stopped')))

    def give_up_output(self):
        """Give up the rest of the output of jobs that were told to end."""
        for attempt in self._worker.lives.of(self._worker, 'stopped'):
            self._followers.stop(attempt)


class Worker:
    """A machine at work for a run: the contact with it, and the jobs there.

    state: new, connecting, ready, away (contact was lost and is looked for), closing, closed or
    failed; `why` says why.

    report: what people are told: warning(text), sent(name, stage), left(name, job, text),
    survivors(name, pids)
    run: its owner, which has `lives`; it hears machine_changed(worker, before), and others(worker,
    OtherJobs) if it wants_others
    """

    def __init__(self, machine, client, number, report):
        self.machine, self.client, self.number, self.report = machine, client, number, report
        self.run = None
        self.state, self.why = 'new', ''
        self.same_as = None                 # the Worker that is used instead of this one
        self.contact = None
        self.gauge, self.collector, self.jobs = Gauge(self), Collector(self), JobControl(self)
        self._seeking = Seeking(Terms())

    @property
    def name(self):
        """The machine's name."""
        return self.machine.name

    @property
    def lives(self):
        """The attempts of the run."""
        return self.run.lives

    @property
    def capacity(self):
        """The Capacity that it had at the last look; None if it was not asked."""
        return self.gauge.capacity

    @property
    def busy(self):
        """Tell whether something is still to come of an attempt there."""
        return self.lives.any_of(self, *AWAITED)

    @property
    def is_stopping(self):
        """Tell whether its jobs were told to end, and it did not say what became of that."""
        return self.jobs.is_stopping

    @property
    def was_ready(self):
        """Tell whether there was contact in this run."""
        return self._seeking.was_ready

    @property
    def retry(self):
        """When to try again, after it failed: see SSH_COMPLAINTS."""
        return self._seeking.retry

    @property
    def hears_output(self):
        """Tell whether output of jobs that were told to end still comes."""
        return self.jobs.hears_output

    @property
    def away_since(self):
        """When contact was lost that is looked for; None if there is contact."""
        return self._seeking.away_since

    # Contact

    def connect(self, want_gpus=True, tied=False):
        """Begin to log in.  tied: the jobs end with the connection."""
        self._seeking = Seeking(Terms(want_gpus, tied))
        self._log_in()

    def _log_in(self):
        self.state = 'connecting'
        self._seeking.contacts += 1
        former = self.contact.stages.all if self.contact else ()
        self.contact = Contact(self, self._seeking.contacts, former)
        self.contact.open(self._seeking.terms)

    def reconnect(self):
        """Log in once more, after it failed or contact was lost."""
        if self.state in ('closing', 'closed') or not self.contact.is_over:
            return
        self.gauge.renew()
        self._log_in()
        self.jobs.renew()
        if self._seeking.asks:
            self.probe()
        else:
            self.enter()

    def probe(self):
        """Ask what the machine has; the answer makes it ready."""
        self._seeking.asks = True
        self.contact.send('probe')

    def enter(self):
        """Log in without asking that: there is no `capacity` then."""
        self._seeking.asks = False
        self.contact.send('enter')

    def unanswered(self, so=''):
        """Return that it has not answered yet, and so what; behind its name a sentence."""
        why = self.contact.hindrance() or (self.why if self._seeking.tries else '')
        return (f'did not answer within {time.monotonic() - self._seeking.began:.0f} s{so}'
                + (f': {why}' if why else ''))

    def contact_lost(self, why, retry):
        """Note that contact is lost: starts that were not sent are returned; jobs run on, unseen.

        If there was contact before, it is looked for again, for the client's away_limit_s.
        """
        if self.state == 'closing':
            self.state = 'closed'
        if self.state in ('failed', 'closed'):
            return
        self.why, self._seeking.retry = why, retry
        before, is_news = self.state, self._seeking.away_since is None
        self.state = self._after_loss(retry)
        if self.state == 'connecting':
            return
        for attempt in self.lives.of(self, 'placed'):
            self.lives.move(attempt, 'returned', why)
        if self.state == 'failed' or is_news:
            self.run.machine_changed(self, before)

    def _after_loss(self, retry):
        """Look for contact after a while, unless it is lost for good; return the next state."""
        # Time awake counts (CLOCK_MONOTONIC): a laptop may sleep as long as it likes.
        seeking, now = self._seeking, time.monotonic()
        if seeking.away_since is None:
            seeking.away_since = now
        seeking.tries += 1
        sshd_is_busy = retry == 'again' and seeking.tries < 5
        is_away = (seeking.was_ready and retry != 'never'
                   and now < seeking.away_since + self.client.away_limit_s)
        if seeking.terms.tied or not (sshd_is_busy or is_away):
            return 'failed'
        delay_s = min(RETRY_S * 2 ** (seeking.tries - 1), LONGEST_RETRY_S)
        self.client.processes.call_later(delay_s * random.uniform(0.7, 1.3), self.reconnect)
        return 'away' if seeking.was_ready else 'connecting'

    def close(self):
        """Have the machine tidied up and the contact closed; its jobs run on."""
        contact = self.contact
        if self.state == 'ready':
            self.state = 'closing'
            stages = contact.stages.all
            cached = [stage.id for stage in reversed(stages) if stage.by_rsync and stage.ready]
            self.collector.clean()
            self.jobs.close()
            if not self.busy and not self.lives.any_of(self, 'dropped'):
                contact.send('finish', cached[0] if cached else '', *(
                    stage.id for stage in stages))
            contact.close()
            self.client.processes.call_later(FAREWELL_S, functools.partial(contact.lose, ''))
        elif self.state != 'closing':
            self.state = 'closed' if self.state in ('new', 'away', 'connecting') else self.state
            if contact:
                contact.end()

    # Requests of a Run

    def prepare(self, forwards):
        """Send the files of these Forwards, if that was not done."""
        self.contact.stages.prepare(forwards)

    def offer(self, forwards):
        """Send them already while it is logged in, if they are small enough for the channel."""
        if is_small(*self.client.files.trees(forwards)):
            self.prepare(forwards)

    def start(self, attempt):
        """Start an attempt that was placed as soon as its files are there."""
        self.jobs.start(attempt)

    def ask(self):
        """Ask what became of each attempt that may run there."""
        self.jobs.ask()

    def measure(self, within_s=0.0):
        """Ask again what is free; the answer is machine_changed."""
        self.gauge.measure(within_s)

    def stop(self):
        """End all jobs there."""
        self.jobs.stop()

    # Events

    def hear(self, event, values):
        """Act on an event of the remote runner."""
        if self.state == 'closing' and event != 'finished':
            return          # nothing can be answered any more: it is for the next run
        # Exactly one of these parts has it: tests/test_structure.py.
        (handler,) = (getattr(part, f'on_{event}') for part in (
            self, self.jobs, self.collector, self.gauge) if hasattr(part, f'on_{event}'))
        handler(*values)

    def on_account(self, which):
        """Learn which account it is.  Of two names of one account only one is used.

        That is the first in the user's order, unless the other has jobs there or did its work.
        """
        other = self.client.accounts.get(which, self)
        self.client.accounts[which] = self
        if other is self or other.state == 'failed' or (
                other.state == 'away' and not other.is_at_work):
            return
        at_work = other.is_at_work or other.state in ('closing', 'closed')
        kept, left = (other, self) if at_work or other.number < self.number else (self, other)
        self.client.accounts[which] = kept
        left.same_as = kept
        left.contact.lose(f'{kept.name} and {left.name} are the same account, '
                          f'{kept.machine.address}: name one of them')

    @property
    def is_at_work(self):
        """Tell whether this run has started a job there, or heard of one."""
        return self._seeking.was_ready and any(
            not attempt.is_inherited or attempt.state != 'claimed'
            for attempt in self.lives.of(self, *UNCOLLECTED))

    def on_broken(self, why, retry=b'never'):
        """The remote runner cannot work."""
        self.contact.lose(why, 'later' if retry == b'later' else 'never')

    def on_note(self, text):
        """The remote runner has something to say."""
        self.report.warning(f'{self.name}: {text}')

    def on_ready(self, home, rsync):
        """The machine can be used; all facts have come, if they were asked for."""
        if self.state != 'connecting':
            raise WireError('it said twice that it is ready')
        if self._seeking.asks:
            self.gauge.understand()
        if self.run.wants_others and not self.was_ready:
            self.contact.send('others', self.client.journal.identity)
        before = 'away' if self.was_ready else 'connecting'
        self.state, self._seeking.was_ready = 'ready', True
        self._seeking.tries, self._seeking.away_since = 0, None
        self.contact.become_ready(home, rsync == b'1')
        if self.client.results:
            self._resume()
        self.run.machine_changed(self, before)
        self.jobs.start_placed()

    def _resume(self):
        """Take up what earlier runs, or earlier contacts, have left on the machine."""
        useless, stray = self.client.journal.remains(self.machine.address)
        self.collector.forget(*useless)     # of runs that were killed before they could tidy up
        if stray:
            self.contact.send('revoke', *stray)
        self.contact.flows.start(self.jobs.watch())
        self.collector.add_kept()
        self.collector.resume()

    def on_staged(self, stage_id):
        """The machine has all files of a stage."""
        self.contact.stages.staged(stage_id)
        self.jobs.start_placed()

    def on_stage_failed(self, _stage_id, why):
        """The machine could not store the files of a stage."""
        self.contact.lose(f'the files could not be stored there: {why}')

    def on_others(self, listed=b''):
        """Jobs that other journals claimed; the client's own commands have journals, too."""
        if not self.run.wants_others:
            raise WireError('it told of jobs of others, unasked')
        fields = listed.split(b'\0')[:-1]
        jobs = [OtherJob(os.fsdecode(key), word.decode('ascii', 'replace'),
                         whole_number(status.decode('ascii', 'replace')), os.fsdecode(command))
                for key, word, status, command in zip(*(iter(fields),) * 4)]
        # Keys become names of files here.
        jobs = list({job.key: job for job in jobs if KEY.fullmatch(job.key)}.values())
        if jobs:
            results = self.client.results
            known = results.identities()
            done = {record['key'] for name, record in results.journal.jobs.items()
                    if results.is_done(name)}
            jobs = [job for job in jobs if job.identity not in known and job.key not in done]
        self.run.others(self, jobs)

    def on_pong(self, _number):
        """It is there."""

    def on_finished(self):
        """All is tidy there; a farewell of ssh would take 40 ms."""
        if self.state != 'closing':
            raise WireError('it said that it has finished, unasked')
        self.state = 'closed'
        self.contact.end()
        if self.client.results:
            with contextlib.suppress(ResultsError):     # then it is tidied once more
                self.client.journal.tidied(self.machine.address)


def need_of(placement):
    """Return what a placement claims as the remote runner reads it: cores, MB, reserve, GPUs."""
    if placement is None:
        return '0 0 0'
    wanted = placement.allocation
    gpus = [f'{index}:{wanted.gpu_memory_mb}:{thousandths(wanted.gpu_utilization)}:'
            f'{int(wanted.reserve_gpu)}' for index in placement.gpus]
    return ' '.join([str(thousandths(wanted.cores)), str(wanted.memory_mb),
                     str(int(wanted.reserve)), *gpus])


def gpu_memory(facts):
    """Return {key of a job: MB that its processes have on GPUs} of the facts of a probe."""
    found = collections.Counter()
    for mb, _, key in itertools.chain.from_iterable(gpu_processes(facts).values()):
        if mb:
            found[key] += mb
    return found


# ---- As a library: a machine for a program of your own ----

class MachineRunner:
    """One machine and what runs there.

    machine_info    a Machine, from find_machine('lab1.yaml')
    queue_up(command, forward_loc, backward_loc, job_name, …)   start it as soon as possible
    register_started(callback(job_name))    it runs
    register_ended(callback(job_name))      it ended, and `ended[job_name]` is its JobResult

    Further signals: register(event, callback), with the events of SIGNALS.

    It does not wait: Processes.wait of its session calls back into it, or its own wait() does.
    spacing_s is the least time between two starts, in seconds; 0, the default, since a start over
    the channel is no login.

        with MachineRunner(find_machine('lab1')) as runner:
            runner.register_ended(lambda name: print(name, runner.ended[name].exit_code))
            runner.queue_up('python train.py', ['train.py'], ['model'], 'first')
            runner.wait()
    """

    SIGNALS = {                         # event -> the arguments of its callbacks
        'ready': (), 'measured': (),                    # there is, or may be, a new `capacity`
        'away': ('reason',),                            # contact was lost, and is looked for
        'failed': ('reason',),
        'started': ('job_name',), 'ended': ('job_name',),
        'collected': ('job_name',),                     # its results are in place here
        'uncollected': ('job_name',),                   # they could not be fetched
        'returned': ('job_name', 'reason'),             # it was not started
        'held': ('job_name',),                          # another batch took its room first
        'lost': ('job_name', 'reason'),                 # it is gone without a result
        'absent': ('job_name',),                        # its start never arrived
        'left': ('job_name', 'text'),                   # what it started did not end with it
        'survivors': ('text',),                         # processes that could not be ended
        'sent': ('stage',), 'warning': ('text',),
    }
    EVENT_OF = {'running': 'started', 'ended': 'ended', 'collected': 'collected',
                'kept': 'uncollected', 'returned': 'returned', 'refused': 'returned',
                'held': 'held', 'lost': 'lost', 'absent': 'absent'}     # by the state in LIFE
    wants_others = False

    def __init__(self, machine_info, session=None, number=0, spacing_s=0.0):
        self.machine = machine_info
        self.ended = {}                     # job name -> JobResult
        self.session = session or Client(ResultStore('job_results').open(), live=False)
        self.lives = Lives(self.session.journal, self._changed)
        self._worker = Worker(machine_info, self.session, number, self)
        self._worker.run = self
        self._owns_session = session is None
        self._callbacks = {event: [] for event in self.SIGNALS}
        self._spacing_s, self._next_start = spacing_s, 0.0
        self._queue = collections.deque()   # Attempts that were not handed on
        self._unheard = set()               # keys of those that ended before their sink has all

    def __enter__(self):
        self.connect()
        self.probe()
        return self

    def __exit__(self, *_):
        self.close()
        while self.state == 'closing':
            self.session.processes.wait()
        if self._owns_session:
            self.session.close()
            self.session.results.close()

    # Signals

    def register(self, event, callback):
        """Have the callback called at each such event, with the arguments that SIGNALS names."""
        if event not in self.SIGNALS:
            raise ValueError(f'there is no event {event!r}{nearest(event, self.SIGNALS)}')
        self._callbacks[event].append(callback)

    def register_started(self, callback):
        """Have callback(job_name) called when a job runs on the machine."""
        self.register('started', callback)

    def register_ended(self, callback):
        """Have callback(job_name) called when a job has ended on the machine."""
        self.register('ended', callback)

    def _signal(self, event, *values):
        for callback in self._callbacks[event]:
            callback(*values)

    def _changed(self, attempt, before):
        """Tell of an attempt that is in another state."""
        if before in ('stopping', 'stopped'):
            return
        if attempt.state == 'ended':
            self.ended[attempt.name] = attempt.result
            if attempt.how.show and not attempt.is_heard:
                self._unheard.add(attempt.key)      # its sink has the rest when it is collected
                return
        elif attempt.key in self._unheard:
            self._unheard.remove(attempt.key)
            self._signal('ended', attempt.name)
        event = self.EVENT_OF.get(attempt.state)
        if event:
            self._signal(event, *(attempt.name, attempt.why)[:len(self.SIGNALS[event])])

    def machine_changed(self, worker, before):
        """Tell of the machine's state."""
        event = 'measured' if before == worker.state == 'ready' else worker.state
        self._signal(event, *(worker.why,)[:len(self.SIGNALS[event])])
        if worker.state == 'ready':
            self._start_next()

    def warning(self, text):
        """Hand on a warning."""
        self._signal('warning', text)

    def sent(self, _name, stage):
        """Hand on that files were sent."""
        self._signal('sent', stage)

    def left(self, _name, job_name, text):
        """Hand on which processes outlive their job."""
        self._signal('left', job_name, text)

    def survivors(self, _name, pids):
        """Hand on which processes could not be ended."""
        self._signal('survivors', pids)

    # The machine

    @property
    def name(self):
        """The machine's name."""
        return self.machine.name

    @property
    def state(self):
        """The state of the machine, as Worker has it."""
        return self._worker.state

    @property
    def reason(self):
        """Why it failed."""
        return self._worker.why

    @property
    def capacity(self):
        """The Capacity that it had at the last look."""
        return self._worker.capacity

    def connect(self, want_gpus=True):
        """Begin to log in."""
        self._worker.connect(want_gpus)
        self._start_next()

    def probe(self):
        """Ask what the machine has; the answer makes it ready."""
        self._worker.probe()

    def measure(self, within_s=0.0):
        """Ask again what is free, within this many seconds; the answer is measured()."""
        self._worker.measure(within_s)

    def close(self):
        """Have the machine tidied up and the connection closed; its jobs run on."""
        self._worker.close()

    # Jobs

    @property
    def running(self):
        """The names of the jobs that were started there and have not ended."""
        return [attempt.name for attempt in self.lives.of(self._worker, *ALIVE)]

    @property
    def unfinished(self):
        """The names of the jobs that run there, or ran there and are not collected."""
        return [attempt.name for attempt in self.lives.of(
            self._worker, *UNCOLLECTED)]

    @property
    def busy(self):
        """Tell whether a job is not yet started, running, or not yet collected."""
        return self._worker.busy

    def wait(self):
        """Wait until all jobs that were queued are collected; raise if the machine fails."""
        while self.busy and self.state not in ('failed', 'closed'):
            self.session.processes.wait()
        if self.state == 'failed':
            raise SchedulerError(f'{self.name}: {sentence(self.reason)}')

    def cancel(self):
        """End all jobs there, with all that they started; give back those not started.

        Without contact only those not started are given back.
        What the others leave is set aside, and their end is no signal.  survivors(text) is, if
        something could not be ended.
        """
        self._worker.stop()

    def queue_up(self, command, forward_loc=(), backward_loc=None, job_name=None, *, link_loc=(),
                 exclude=(), gpus=None, placement=None, sink=None, keep=True, mode='',
                 source=None, timeout_s=None):
        """Start the bash command there as soon as its files are.

        forward_loc, link_loc  paths here, to copy or to link into the job's folder
        backward_loc           paths in its folder to bring back; None: what it made or changed
        job_name               the stem of its results' names; each name once in a job_results
        gpus                   the value of CUDA_VISIBLE_DEVICES, or None to leave it unset
        placement              what MachineResources gave it: other batches then count with it
        sink                   called with 'out' or 'err' and bytes, as they come, from the first on
        keep                   its streams are put into job_results, even though they have a sink
        mode                   'stdin': its input is what comes from the file descriptor `source`,
                               else it is empty
        timeout_s              seconds that it may run; then it is ended, with exit status 124
        """
        job_name = job_name or f'job.{os.getpid()}.{time.time_ns()}'
        check_job_name(job_name, 'queue_up', 200)
        forwards = Forwards(inside_paths(forward_loc, 'forward_loc'),
                            inside_paths(link_loc, 'link_loc'), tuple(exclude))
        backwards = None if backward_loc is None else inside_paths(backward_loc, 'backward_loc')
        if self.state != 'new':
            self._worker.prepare(forwards)
        attempt = self.session.journal.new_attempt(
            Job(job_name, command, 0, None, forwards, backwards), self._worker,
            How(mode, source, timeout_s, keep, sink), gpus)
        attempt.placement = placement
        self.lives.move(attempt, 'placed')
        self._queue.append(attempt)
        self._start_next()

    def _start_next(self):
        """Hand on the jobs that are to be started, with time between them."""
        now = time.monotonic()
        while self._queue and self._may_start(now):
            attempt = self._queue.popleft()
            if attempt.state == 'placed':   # else it was returned
                self._next_start = now + self._spacing_s
                self._worker.start(attempt)
        if self._queue and self._spacing_s and self.state == 'ready':
            self.session.processes.call_later(self._next_start - now, self._start_next)

    def _may_start(self, now):
        """Tell whether the next job may be handed on at this time (monotonic)."""
        if not self._spacing_s:
            return self.state != 'new'
        return self.state == 'ready' and now >= self._next_start


# ---- Commands ----

def execute_batch(argv):
    """Run a batch file; return the exit status."""
    options = read_options(EXECUTE_BATCH_USAGE, argv)
    reporter = Reporter(options['--verbose'])
    asked = [name for name in ('--status', '--cancel', '--dry-run') if options[name]]
    if len(asked) > 1:
        raise UsageError(f'{" and ".join(asked)}: give one of them.')
    if options['--earlier']:
        return earlier_jobs(options, reporter)
    if not (options['--status'] or options['--cancel']):
        check_machines(options, 'batch')
    text = read_batch_text(options['<batch>'], sys.stdin.buffer)
    jobs = read_jobs(options['<batch>'], text, options, reporter.warning)
    name = name_of_batch(options['<batch>'])
    if options['--status']:
        return show_status(jobs, name, ResultStore('job_results').peek(), reporter)
    if options['--cancel']:
        return cancel_batch(options, jobs, name, reporter)
    check_syntax(options['<batch>'], jobs)
    warn_of_settings(options['<batch>'], jobs, reporter.warning)
    machines, wrong = usable_machines(options['--machines'], reporter)
    allow_files(len(machines))
    for forwards in {job.forwards for job in jobs}:
        check_forwards(forwards)
    policy = read_policy(options)
    max_result = None if options['--max-result-size'] is None else int(
        options.number('--max-result-size', least=0) * 1e6)
    away_limit_s = options.number('--away-limit', least=0)
    if policy.lost_after_s is not None:     # contact must be looked for until then
        away_limit_s = max(away_limit_s, policy.lost_after_s + LONGEST_RETRY_S)
    nice = options.whole_number('--nice', least=0, most=19)
    results = ResultStore('job_results').open(name)
    client = Client(results, reporter.trace, nice=nice, live=not options['--no-live'],
                    away_limit_s=away_limit_s, max_result_bytes=max_result)
    try:
        return run_batch(options, machines, jobs, client, reporter, policy) or wrong
    finally:
        client.close()
        results.close()


def read_policy(options):
    """Return the Policy that the options of execute_batch say."""
    def given(name, read, **bounds):
        return None if options[name] is None else read(name, **bounds)

    return Policy(asks_late=True, wants_others=True, patient=True,
                  interval_s=LIVE_S * random.uniform(0.8, 1.2),
                  retries=options.whole_number('--retries', least=0),
                  lost_after_s=given('--lost-after', options.number, least=0),
                  timeout_s=given('--timeout', options.number, above=0),
                  halt_after=given('--halt-after', options.whole_number, least=1),
                  noted={'batch': name_of_batch(options['<batch>'])})


def usable_machines(words, reporter):
    """Return (Machines, exit status: 1 if others cannot be used); print why."""
    machines, complaints = find_machines(words)
    for complaint in complaints:
        reporter.note(f'cannot be used: {complaint}')
    return machines, int(bool(complaints))


def workers_for(machines, client, reporter):
    """Return a Worker for each Machine."""
    return [Worker(machine, client, number, reporter) for number, machine in enumerate(machines)]


def check_syntax(path, jobs):
    """Raise if bash refuses a command of the jobs; where no bash is here, they will see."""
    doubtful = [job for job in jobs if not PLAIN_LINE.fullmatch(job.command)]
    said, ended = bytearray(), []
    processes = Processes()
    try:
        with contextlib.suppress(SchedulerError):
            processes.start(
                ['bash', '-O', 'extglob', '-c', SYNTAX_CHECK], said.extend,
                lambda *_: ended.append(True), env={**os.environ, 'LC_ALL': 'C', 'BASH_ENV': ''},
                feed=(job.command.encode() + b'\0' for job in doubtful))
            while not ended:
                processes.wait()
    finally:
        processes.close()
    refuse_syntax(path, doubtful, said)


def run_batch(options, machines, jobs, client, reporter, policy):
    """Connect, place, run, collect, clean up; return the exit status."""
    results, path, dry = client.results, options['<batch>'], options['--dry-run']
    allocation = read_allocation(options)
    lines = match_lines(jobs, name_of_batch(path), results)
    lines = lines._replace(gone=tuple(job._replace(allocation=allocation._replace(gpus=len(gpus_of(
        results.journal.record(job.name)['gpus'])))) for job in lines.gone))
    plan = plan_lines(lines, results, {machine.address for machine in machines})
    policy = policy._replace(
        forwards=None if dry else read_forwards(options),
        want_gpus=allocation.gpus > 0 or any(job.allocation.gpus for job in lines.waiting))
    view = BatchView(reporter, results, plan, allocation, path)
    workers = workers_for(machines, client, reporter)
    run = Run((*lines.jobs, *lines.gone), workers, client, view, policy)
    with interruptible(run.interrupt):
        try:
            take_up_lines(run, plan)
            view.names()
            has_work = run.scheduler.waits or run.lives.all_of('claimed') or any(
                results.kept(worker.machine.address) for worker in workers)
            if has_work:
                begin_batch(run, client.files, lines)
                view.limits([worker for worker in workers if worker.state == 'ready'])
                if not run.fleet.count('connecting'):
                    view.check_room()
            for warning in plan.warnings:
                reporter.line(warning)
            if dry:
                view.dry_run()
                return 0
            with contextlib.suppress(*[FilesError] * (not has_work)):
                view.changed_files(client.files)
            return finish_batch(run, view, reporter, has_work)
        finally:
            close_all(workers, client, lambda: run.interrupts > 1)


def take_up_lines(run, plan):
    """Have the jobs of a Plan wait, or take up those that an earlier run has begun."""
    journal, lines = run.client.journal, plan.lines
    for job in lines.waiting:
        run.scheduler.add(job)
    by_address = run.fleet.by_address()
    for job in sorted((*lines.begun, *lines.gone), key=lambda job: job.line):
        if job.name not in plan.elsewhere:
            record = journal.record(job.name)
            run.take_up(job, by_address[record['machine']], record)


def begin_batch(run, files, lines):
    """Log in to all machines; meanwhile look at the files."""
    run.fleet.log_in()
    for job in lines.jobs:              # an unreadable file is an error before anything starts
        if run.policy.forwards:
            files.manifest(job.forwards)
    lost = run.policy.forwards and files.lost_links({
        job.forwards for jobs in run.scheduler.kinds().values() for job in jobs})
    if lost:
        run.view.warn(lost)
    run.fleet.meet()


def finish_batch(run, view, reporter, has_work):
    """Run what is left of a batch; return the exit status."""
    view.begin()
    try:
        if has_work:
            run.open()
            run.loop()
        if run.interrupts:
            view.stopping()
            run.cancel()
    finally:
        view.progress()
        reporter.hide()
    return view.summary()


def show_status(jobs, name, results, reporter):
    """Say what the journal knows of the jobs; return the exit status: 0 where all have finished."""
    counts, lines = collections.Counter(), []
    matched = match_lines(jobs, name, results)
    jobs = (*matched.jobs, *matched.gone)
    for job in jobs:
        known = results.journal.record(job.name)
        state, machine = known.get('state'), known.get('where') or known.get('machine')
        if state in ('claimed', 'ended'):
            word = 'on a machine'
            lines.append(f'{"ended" if state == "ended" else "started"}: {job.name}: on {machine}, '
                         'not collected yet')
        elif results.exists(job.name):
            code = known.get('exit_code', 0)
            word = 'failed' if code else 'finished'
            lines += [f'failed: {job.name}: exit code {code} on {machine}'] if code else []
        else:
            word = 'waiting'
            if state:
                lines.append(f'{state}: {job.name}: was on {machine}; the next run starts it from '
                             'the beginning')
        counts[word] += 1
    for line in lines:
        reporter.line(line)
    reporter.line(f'{count_of(len(jobs), "job")}: ' + ', '.join(
        f'{counts[word]} {word}' for word in ('finished', 'failed', 'on a machine', 'waiting')))
    return 0 if counts['finished'] == len(jobs) else 1


def cancel_batch(options, jobs, name, reporter):
    """End what runs of the jobs wherever it is; return the exit status: 0 where all has ended."""
    results, client = ResultStore('job_results'), None
    try:
        before = results.take_over(name, reporter.note)
        lines = match_lines(jobs, name, results)
        named = {job.name: job for job in (*lines.jobs, *lines.gone)}
        journal = results.journal
        claimed = {job: known for job, known in journal.jobs.items()
                   if (job in named or is_of_batch(job, known, name)) and (
                       journal.is_begun(job) or before and any(
                           known.get(key) != before.get(job, {}).get(key)
                           for key in ('state', 'attempt')))}
        words = options['--machines'] or dict.fromkeys(
            known['where'] for job, known in claimed.items()
            if known.get('where') and journal.is_begun(job))
        machines, wrong = usable_machines(words, reporter)
        client = Client(results, reporter.trace, live=False)
        workers = workers_for(machines, client, reporter)
        run = Run((), workers, client, QuietView(reporter), Policy(probes=False))
        with interruptible(run.interrupt):
            try:
                return cancel_claimed(run, claimed, named, reporter) or wrong
            finally:
                close_all(workers, client, lambda: run.interrupts > 1)
    finally:
        if client:
            client.close()
        results.close()


def cancel_claimed(run, claimed, named, reporter):
    """End what an earlier run has started; say what became of each job; return the exit status.

    claimed: {job name: what the journal knows of it}; named: {job name: Job} of the batch file
    """
    journal = run.client.journal
    # The client that was told to cancel may not have seen these end.
    unsure = {name for name, known in claimed.items()
              if known['key'] in journal.remains(known['machine'])[1]}
    by_address = run.fleet.by_address()
    for name, known in claimed.items():
        worker = by_address.get(known['machine'])
        if worker and journal.is_begun(name):
            run.take_up(named[name], worker, known)
    run.interrupts = 1                  # nothing that happens from now on starts anything
    run.fleet.log_in()
    run.client.wait_while(
        lambda: any(worker.state == 'connecting' or worker.state == 'ready' and (
            run.lives.any_of(worker, 'claimed')
            or worker.busy and not run.lives.any_of(worker, *ALIVE)) for worker in run.workers),
        time.monotonic() + CONNECT_LIMIT_S, lambda: run.interrupts > 1)
    unsure |= {attempt.name for attempt in run.cancel()}
    left = 0
    for name, known in claimed.items():
        state = journal.record(name)['state'] if name not in unsure else ''
        what = {'collected': 'had ended, and is collected', 'cancelled': 'ended',
                'lost': 'did not run'}.get(state)
        left += what is None
        reporter.line(f'{name}: {what or "not known to have ended"}, on '
                      f'{known.get("where") or known["machine"]}')
    reporter.line(f'cancelled: {count_of(len(claimed), "job")}, {left} not known to have ended')
    return 130 if run.interrupts > 1 else 1 if left else 0


def earlier_jobs(options, reporter):
    """Show, collect or remove jobs of other journals (--earlier); return the exit status."""
    action = options['--earlier']
    if action not in ('show', 'collect', 'remove'):
        raise UsageError(f'--earlier must be show, collect or remove, not {action!r}.')
    check_machines(options)
    machines, status = usable_machines(options['--machines'], reporter)
    results = ResultStore('job_results').open()
    client = Client(results, reporter.trace, live=False)
    workers = workers_for(machines, client, reporter)
    view = EarlierView(reporter)
    run = Run((), workers, client, view, Policy(probes=False, wants_others=True))
    with interruptible(run.interrupt):
        try:
            run.fleet.log_in()
            run.wait(lambda worker: worker.state == 'connecting' or (
                worker.state == 'ready' and worker not in view.found))
            view.show()
            for worker, jobs in view.found.items():
                if action == 'collect':
                    collect_others(run, worker, jobs)
                elif action == 'remove' and jobs:
                    worker.contact.send('revoke', *(job.key for job in jobs))
            run.wait(lambda worker: worker.state == 'ready' and worker.busy)
        finally:
            close_all(workers, client, lambda: run.interrupts)
            client.close()
            results.close()
    return view.summary(action, status)


def collect_others(run, worker, jobs):
    """Begin to fetch the results of those OtherJobs that have ended, under names that are free."""
    results, journal = run.client.results, run.client.journal
    names = {journal.record(name)['key']: name for name in journal.jobs if journal.is_begun(name)}
    for job in jobs:
        if job.state != 'ended':
            continue
        name = names.get(job.key)           # of a run that was cut off
        if not name or results.exists(name):
            name = free_name(f'{job.name}-earlier', lambda name: results.exists(name)
                             or name in journal.jobs)
        if name not in names.values():
            journal.write(event='claimed', job=name, attempt=1, machine=worker.machine.address,
                          gpus=None, command=job.command, key=job.key, where=worker.machine.word,
                          batch=None)
        run.take_up(Job(name, job.command, 0, None, None), worker, journal.record(name))
    worker.ask()


@contextlib.contextmanager
def interruptible(handler):
    """Have SIGINT and SIGTERM call the handler, unless we were started with them ignored."""
    before = {number: signal.signal(number, handler)
              for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) not in (signal.SIG_IGN, deaf)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


TRANSPORT_FAILED = 125      # what docker, timeout and env return where they themselves failed


def execute_remote(argv):
    """Run one command on one machine; return its exit status, or 2, 125 or 130."""
    options = read_options(EXECUTE_REMOTE_USAGE, argv)
    reporter = Reporter(options['--verbose'], all_on_stderr=True)
    named = {name for name in ('--job-name', '--attach', '--cancel') if options[name] is not None}
    if len(named) > 1:
        raise UsageError(f'{" and ".join(sorted(named))}: give one of them.')
    by_name = named & {'--attach', '--cancel'}
    if not by_name and not options['--machine']:
        raise UsageError(f'--machine is missing: on which machine?{HERE_TOO}')
    for one, other in (('--tty', '--detach'), ('--tty', '--stdin'), ('--detach', '--stdin'),
                       ('--detach', '--attach'), ('--tty', '--attach'), ('--stdin', '--attach')):
        if options[one] and options[other]:
            raise UsageError(f'{one} and {other}: give one of them.')
    name = options[next(iter(named))] if named else new_name(options['<command>'])
    check_job_name(name, next(iter(named), '--job-name'))
    results = ResultStore('job_results', f'commands/{name}')
    try:
        before = results.take_over(name, reporter.note) if options['--cancel'] else {}
        if not options['--cancel']:
            results.open(name)
        order = CommandOrder(name, options, results, reporter)
        answer = order.answer_from_journal(stopped=bool(before))
        return order.run() if answer is None else answer
    finally:
        results.close()


def new_name(command):
    """Return a name for a job that nobody named: readable, and not used before."""
    words = re.sub(r'[^A-Za-z0-9_.]+', '-', command.strip())[:30].strip('-.') or 'command'
    return f'{words}-{time.strftime("%m%d-%H%M%S")}-{os.urandom(2).hex()}'


class CommandOrder:
    """One call of execute_remote: it starts a job, attaches to it, shows it again or cancels it."""

    def __init__(self, name, options, results, reporter):
        self._name, self._options = name, options
        self._results, self._report = results, reporter
        self._known = results.journal.record(name)
        self._by_name = options['--attach'] or options['--cancel']
        self._mode = 'tty' if options['--tty'] else 'stdin' if options['--stdin'] else ''
        self._has_begun = self._lacks_terminal = False
        self._streams = None                # OwnStreams

    # Without asking the machine

    def answer_from_journal(self, stopped):
        """Return the exit status if the journal knows all; raise if it forbids this call; or None.

        stopped: another client of this job was stopped, to cancel it
        """
        options, name, known = self._options, self._name, self._known
        state, there = known.get('state'), self._results.exists(name)
        if self._by_name and not known:
            raise ResultsError(f'no job {name} was started from this folder: job_results knows '
                               'nothing of it.')
        if not self._by_name and known and known['command'] != options['<command>']:
            raise ResultsError(f'the job {name} is there, with another command: '
                               f'{printable(known["command"])}. Choose another --job-name, or '
                               'delete its results and job_results/.ssh_scheduler/commands/'
                               f'{name}.')
        if state == 'collected' and there:
            if self._results.kept(known['machine']) and not options['--cancel']:
                self._fetch_kept()
            return self._show_again()
        if there:
            raise ResultsError(f'there are results of {name} already: job_results/{name}. Choose '
                               'another --job-name, or delete them.')
        if stopped and state == 'cancelled':
            return self._tell_cancelled(
                known['where'],
                known['key'] not in self._results.journal.remains(known['machine'])[1])
        if self._by_name and state not in ('claimed', 'ended'):
            raise ResultsError(f'the job {name} does not run: it was {state}.')
        return None

    def _fetch_kept(self):
        """Try to fetch what could not be fetched when the job had ended."""
        word = self._options['--machine'] or self._known['where']
        machine = find_machine(word)._replace(word=word)
        client = Client(self._results, self._report.trace)
        workers = workers_for([machine], client, self._report)
        run = Run((), workers, client, QuietView(self._report), Policy(probes=False))
        try:
            run.fleet.log_in()
            run.wait(lambda worker: worker.state == 'connecting' or (
                worker.state == 'ready' and worker.busy))
            close_all(workers, client)
        finally:
            client.close()

    def _show_again(self):
        """The job ended in an earlier run: pass on what it said, and its exit status."""
        if self._options['--cancel']:
            self._report.note(f'{self._name}: it has ended already')
            return 0
        if self._options['--detach']:
            return self._print_name()
        self._report.warning(f'job results already exists for {self._name}, showing them: delete '
                             'if you wish to rerun')
        processes = Processes()
        streams = self._streams = OwnStreams(processes)
        try:
            for stream in ('out', 'err'):
                for data in self._results.read(self._name, stream):
                    streams.write(stream, data)
        except OSError as error:
            raise ResultsError(f'{error.filename}: {reason_of(error)}.') from None
        finally:
            processes.close()
        if streams.nobody_reads:
            return self._unread()
        return self._known.get('exit_code', TRANSPORT_FAILED)

    # With the machine

    def run(self):
        """Do it on the machine; return the exit status."""
        options, known = self._options, self._known
        word = options['--machine'] or known['where']
        machine = find_machine(word)._replace(word=word)
        running = self._results.journal.is_begun(self._name)
        if running and known['machine'] != machine.address:
            raise ResultsError(f'the job {self._name} was started on {known["machine"]}, not on '
                               f'{machine.address}: name that machine, or choose another '
                               '--job-name.')
        hardware = options.given & set(option_kinds(HARDWARE_OPTIONS))
        allocation = read_allocation(options) if hardware else None
        client = Client(self._results, self._report.trace, live=bool(hardware),
                        nice=options.whole_number('--nice', least=0, most=19),
                        away_limit_s=options.number('--away-limit', least=0))
        try:
            job = self._job(allocation)
            (worker,) = workers_for([machine], client, self._report)
            run = self._prepare(worker, job, client)
            if running:
                run.take_up(job, worker, known)
            return self._finish(run, worker)
        finally:
            client.close()

    def _job(self, allocation):
        """Return the Job; its forwards are None where it is only collected."""
        if self._by_name:
            return Job(self._name, self._known['command'], 0, allocation, None,
                       as_paths(self._known['backwards']))
        job = Job(self._name, self._options['<command>'], 0, allocation,
                  read_forwards(self._options), read_backwards(self._options))
        check_forwards(job.forwards)
        return job

    def _prepare(self, worker, job, client):
        """Return the Run for the one job."""
        options = self._options
        self._streams = OwnStreams(client.processes)
        is_silent = options['--detach'] or options['--cancel'] or self._mode == 'tty'
        how = How(self._mode, 0 if self._mode == 'stdin' else None)
        policy = Policy(
            probes=bool(job.allocation),
            want_gpus=bool(job.allocation and job.allocation.gpus), wants_others=True, how=how,
            noted={'where': self._known.get('where') or options['--machine'],
                   'detach': options['--detach']})
        view = BoundView(self._report, {} if is_silent else {worker: self._streams},
                         self._on_running)
        return Run([job], [worker], client, view, policy, {worker: job})

    def _on_running(self, attempt):
        """The command has begun, in this run or an earlier one."""
        self._has_begun = True
        if self._mode == 'tty' and not attempt.is_inherited:
            client = attempt.machine.client
            client.flows.start(self._give_terminal(attempt))
        if attempt.is_inherited and not self._options['--cancel']:
            self._report.running(self._name, attempt.machine.name, self._known.get('time'))

    def _give_terminal(self, attempt):
        """A flow: have the command use our terminal; it may be that none can be had."""
        yield from attempt.machine.jobs.terminal(attempt)
        yield 2
        self._lacks_terminal = attempt.state in ALIVE

    def _finish(self, run, worker):
        """Run the job to its end, or as far as is wanted; return the exit status."""
        options, name, streams = self._options, self._name, self._streams
        if not (options['--job-name'] or self._by_name or options['--detach']):
            self._report.note(f'job {name} on {worker.name}')
        if not self._results.journal.is_begun(self._name):
            run.view.warn_of_links(run.client.files)

        def until():
            return (streams.nobody_reads or self._lacks_terminal
                    or {'--detach', '--cancel'} & options.given and self._has_begun)

        def interrupt(number, _):
            # Keys that are typed are for the program that has the terminal, once that was started.
            if self._mode != 'tty' or number != signal.SIGINT or not self._has_begun:
                run.interrupt()

        with interruptible(interrupt):
            try:
                run.loop(until)
                stops = run.interrupts or streams.nobody_reads or self._lacks_terminal
                survives = not options['--cancel'] and (
                    options['--attach'] or self._results.journal.record(name).get('detach'))
                if options['--cancel'] or stops and not survives:
                    self._cancel(run, worker)
                elif stops:
                    self._tell_how_to_return(worker.name)
            finally:
                close_all([worker], run.client, lambda: run.interrupts > 1)
        return self._exit_status(run, worker)

    def _cancel(self, run, worker):
        """End the job, and tell what became of it."""
        name, journal = self._name, self._results.journal
        if worker.state == 'connecting':
            self._report.note(f'{worker.name}: {worker.unanswered("; interrupted")}')
        if not worker.busy or worker.state == 'failed' and not worker.was_ready or run.cancel():
            return
        state = journal.record(name).get('state')
        if state in ('claimed', 'ended'):
            self._tell_how_to_return(worker.name)
        elif state != 'collected' or self._options['--cancel']:
            self._tell_cancelled(worker.name)

    # Messages

    def _tell_cancelled(self, machine, surely=True):
        """Say that the job was ended, and where its partial results lie; return the exit status."""
        if not surely:
            self._report.unconfirmed(machine, self._name)
            return 1
        self._report.note(f'{self._name}: ended on {machine}. Partial results are in '
                          f'{self._results.inner}/cancelled')
        return 0

    def _tell_how_to_return(self, machine):
        """Say what to type to come back to the job, which is not followed any more."""
        name, state = self._name, self._results.journal.record(self._name).get('state')
        if state == 'ended':
            self._report.note(f'{name}: it has ended, and its results are on {machine}: '
                              f'execute_remote --attach={name} fetches them')
        elif state == 'claimed':
            self._report.note(f'{name} runs on {machine}. To watch it again: execute_remote '
                              f'--attach={name}  To cancel it: execute_remote --cancel={name}')

    def _unread(self):
        """Return the exit status where nobody reads what the command says."""
        if not self._streams.trouble:
            return 128 + signal.SIGPIPE
        self._report.note(f'{self._name}: {sentence(self._streams.trouble)}')
        return TRANSPORT_FAILED

    def _print_name(self):
        """Print the job's name on stdout; return the exit status."""
        reporter = Reporter()
        reporter.line(self._name)
        return TRANSPORT_FAILED if reporter.trouble else 0

    def _exit_status(self, run, worker):
        """Return the exit status, and say what is not as it should be."""
        name, options = self._name, self._options
        if run.interrupts:
            return 130
        if self._streams.nobody_reads:
            return self._unread()
        if self._lacks_terminal:
            self._report.note(f'{name}: no terminal could be had on {worker.name}.')
            return TRANSPORT_FAILED
        word, what = run.fleet.standing[worker].outcome or ('started', 0)
        if word == 'lost' and self._results.journal.record(name)['state'] == 'ended':
            what = (f'lost contact with {worker.name} ({what}). The job has ended, and its results '
                    f'are there; execute_remote --attach={name} fetches them')
        elif word == 'lost':
            what = (f'lost contact with {worker.name} ({what}). The job goes on there; '
                    f'execute_remote --attach={name} shows it')
        elif word == 'unreachable':
            what = f'{worker.name} cannot be used: {what}'
        if options['--cancel']:
            if word != 'started':
                self._report.note(f'{name}: it has ended already' if word == 'ended' else
                                  f'{name}: {what}')
            unsure = any(attempt.name == name for attempt in run.unconfirmed)
            return int(unsure or word not in ('started', 'ended', 'absent'))
        if word == 'started' or options['--detach'] and word == 'ended':
            return self._print_name()
        if word == 'ended':
            return what
        self._report.note(f'{name}: {sentence(what)}')
        if word == 'impossible':
            return DoesNotFit.exit_code
        ended = run.ended.get(name)
        return ended.exit_code if ended and ended.exit_code else TRANSPORT_FAILED


def execute_to(argv):
    """Run one command on many machines; return the exit status."""
    options = read_options(EXECUTE_TO_USAGE, argv)
    reporter = Reporter(options['--verbose'])
    check_machines(options, 'command')
    timeout_s = None if options['--timeout'] is None else options.number('--timeout', above=0)
    at_once = options.whole_number('--fanout', least=1)
    nice = options.whole_number('--nice', least=0, most=19)
    machines, wrong = usable_machines(options['--machines'], reporter)
    allow_files(min(len(machines), at_once))
    name = options['--job-name'] or new_name('to')
    check_job_name(name, '--job-name')
    backwards = read_backwards(options) or ()
    forwards = read_forwards(options, Forwards(()))
    check_forwards(forwards)
    is_kept = bool(backwards or options['--job-name'])
    policy = Policy(probes=False, tied=True, at_once=at_once,
                    machine_timeout_s=timeout_s, how=How(keep=is_kept))
    client = Client(None, reporter.trace, nice=nice, live=False)
    results = client.results = ResultStore(
        *(['job_results', f'commands/{name}'] if is_kept else [f'{client.run_folder}/results']))
    try:
        results.open()
        workers = workers_for(machines, client, reporter)
        jobs = {worker: Job(f'{name}_{plain_name(worker.name)}', options['<command>'], 0, None,
                            forwards, backwards) for worker in workers}
        check_new(jobs.values(), results)
        if backwards and not options['--job-name']:
            reporter.note(f'results go to job_results/{name}_<machine>')
        return run_everywhere(options, jobs, client, reporter, policy) or wrong
    finally:
        client.close()
        results.close()


def run_everywhere(options, jobs, client, reporter, policy):
    """Run each job on the machine that it is bound to; return the exit status."""
    is_gathered = options['--gather'] or options['--diff']
    width = max(len(printable(worker.name)) for worker in jobs)
    sinks = {} if is_gathered else {worker: Prefixer(reporter, reporter.tint(
        f'{printable(worker.name)}:'.ljust(width + 1), number))
        for number, worker in enumerate(jobs)}
    view = BoundView(reporter, sinks)
    policy = policy._replace(how=policy.how._replace(keep=policy.how.keep or is_gathered))
    run = Run(jobs.values(), list(jobs), client, view, policy, jobs)
    view.warn_of_links(client.files)
    with interruptible(run.interrupt):
        try:
            run.loop(lambda: reporter.nobody_reads)
            awaited = view.awaited()
            if run.interrupts or reporter.nobody_reads:
                run.cancel()
            for prefixer in sinks.values():
                prefixer.flush()
        finally:
            close_all(run.workers, client, lambda: run.interrupts > 1)
    outcomes = {worker: run.fleet.standing[worker].outcome for worker in jobs
                if run.fleet.standing[worker].outcome}
    if is_gathered:
        gather(jobs, outcomes, client.results, reporter, options['--diff'])
    if run.interrupts:
        outcomes.update({worker: ('interrupted', what) for worker, what in awaited.items()})
    failed = summary_of({worker: outcomes[worker] for worker in jobs if worker in outcomes},
                        reporter)
    return 130 if run.interrupts else 1 if failed or reporter.nobody_reads else 0


def plain_name(name):
    """Return a machine's name as a part of a job's."""
    return re.sub(r'[^A-Za-z0-9._+=@%-]', '_', name)[-100:]


def check_new(jobs, results):
    """Raise unless each job has a name and a place for its results of its own."""
    names = collections.Counter(job.name for job in jobs)
    for name, count in names.items():
        check_job_name(name, '--job-name', 200)
        if count > 1:
            raise MachineFileError(f'two machines have results of the same name {name}.')
        if results.exists(name) or results.journal.record(name):
            raise ResultsError(f'there are results of {name} already. Choose another --job-name, '
                               'or delete them.')


def gather(jobs, outcomes, results, reporter, differences):
    """Print equal outputs once; with differences, of the others how they differ from the first."""
    groups = collections.defaultdict(list)          # digests of out and err -> workers
    for worker, (word, _) in outcomes.items():
        if word == 'ended' and results.journal.record(jobs[worker].name)['state'] == 'collected':
            groups[tuple(digest_of(results.read(jobs[worker].name, stream))
                         for stream in ('out', 'err'))].append(worker)
    order = list(jobs)
    first = None
    for workers in sorted(groups.values(), key=lambda workers: order.index(workers[0])):
        workers.sort(key=order.index)
        names = ', '.join(printable(worker.name) for worker in workers)
        head = names + (f' ({len(workers)} machines)' if len(workers) > 1 else '')
        for stream in ('out', 'err'):
            pieces = results.read(jobs[workers[0]].name, stream)
            if first and differences:
                pieces = difference(results, jobs[first], jobs[workers[0]], stream,
                                    printable(first.name), names)
            print_group(head, stream, pieces, reporter)
        first = first or workers[0]


def print_group(head, stream, pieces, reporter):
    """Print an output below its head, and to the end of a line; nothing if there is none."""
    printed = b''
    for piece in pieces:
        if not printed:
            reporter.raw(stream, f'---- {head}\n'.encode())
        reporter.raw(stream, piece)
        printed = piece
    if printed and not printed.endswith(b'\n'):
        reporter.raw(stream, b'\n')


def digest_of(pieces):
    """Return what stands for the bytes."""
    import hashlib
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


LONGEST_DIFFERENCE = 2**20      # bytes; comparing takes the square of that time, at worst


def difference(results, first, other, stream, first_name, names):
    """Yield how the stream of another job differs from that of the first, as diff -u shows it."""
    import difflib
    texts = []
    for job in (first, other):
        data = b''.join(itertools.islice(results.read(job.name, stream),
                                         LONGEST_DIFFERENCE // 2**16 + 1))
        texts.append(data.decode('utf-8', 'surrogateescape').splitlines(True))
    if any(sum(map(len, lines)) > LONGEST_DIFFERENCE for lines in texts):
        yield b'too long to be compared\n'
        return
    for line in difflib.unified_diff(*texts, first_name, names):
        yield (line if line.endswith('\n') else line + '\n').encode('utf-8', 'surrogateescape')


def summary_of(outcomes, reporter):
    """Print a line for each kind of failure, with the machines' names; return how many failed."""
    kinds = collections.defaultdict(list)
    for runner, (word, what) in outcomes.items():
        if (word, what) != ('ended', 0):
            kinds[('failed', f'exit code {what}') if word == 'ended' else (word, what)
                  ].append(printable(runner.name))
    for (word, what), names in kinds.items():
        reporter.note(f'{word}: {", ".join(names)} ({what})')
    return sum(map(len, kinds.values()))


def query_machines(argv):
    """Show what is free on machines; return the exit status."""
    options = read_options(QUERY_MACHINES_USAGE, argv)
    reporter = Reporter(options['--verbose'])
    check_machines(options)
    interval = None
    if options['--watch'] is not None:
        if len(options['--watch']) > 1:
            raise UsageError('--watch takes one number of seconds.')
        options['--watch'] = (options['--watch'] or ('5',))[0]
        interval = options.number('--watch', least=MEASURE_LEAST_S)
    hardware = set(option_kinds(HARDWARE_OPTIONS))
    allocation = read_allocation(options) if options.given & hardware else None
    machines, wrong = usable_machines(options['--machines'], reporter)
    client = Client(None, reporter.trace, live=False, project=f'query-{os.urandom(8).hex()}')
    workers = workers_for(machines, client, reporter)
    run = Run((), workers, client, View(), Policy(want_gpus=True))
    with interruptible(run.interrupt):
        try:
            run.fleet.log_in()
            watch_machines(run, reporter, interval, allocation, options['--json'])
            if run.interrupts and interval is None:
                for worker in [worker for worker in workers if worker.state == 'connecting']:
                    reporter.note(f'{worker.name}: {worker.unanswered("; interrupted")}')
                return 130
            if reporter.trouble:
                return 1
            return wrong if all(worker.state == 'ready' for worker in workers) else 1
        finally:
            close_all(workers, client)
            client.close()


def watch_machines(run, reporter, interval, allocation, as_json):
    """Show what the machines have, once or at each interval in seconds, until an interrupt."""
    while True:
        run.wait(lambda worker: worker.state == 'connecting' or worker.gauge.is_awaited)
        if run.interrupts:
            return
        if as_json:
            reporter.show(json_lines(run.workers, allocation), False)
        else:
            reporter.show(machine_table(run.workers, allocation, reporter.paint), interval)
        if interval is None or reporter.nobody_reads:
            return
        run.client.wait_while(lambda: True, time.monotonic() + interval, lambda: run.interrupts)
        for worker in run.workers:
            worker.measure()


def close_all(workers, client, hurried=lambda: False):
    """Have all machines tidied up, and wait for that, or until hurried()."""
    for worker in workers:
        worker.close()
    client.wait_while(lambda: any(worker.state == 'closing' for worker in workers),
                      time.monotonic() + FAREWELL_S, hurried)


def json_lines(workers, allocation):
    """Yield one JSON object for each machine; memory in MB, times as shares."""
    for worker in workers:
        found = {'machine': worker.name}
        if worker.state != 'ready':
            yield json.dumps({**found, 'error': worker.why})
            continue
        have = worker.capacity
        found.update(
            cores_free=round(have.cores, 3), cores_total=have.total_cores,
            memory_free_mb=have.memory_mb, memory_total_mb=have.total_memory_mb,
            batch_jobs=have.batch_jobs, gpu_trouble=have.gpu_trouble or have.lost_gpus or None,
            gpus=[{'index': gpu.index, 'name': gpu.name, 'uuid': gpu.uuid,
                   'memory_free_mb': gpu.memory_mb, 'memory_total_mb': gpu.total_memory_mb,
                   'utilization': round(gpu.utilization, 3), 'users': list(gpu.users),
                   'processes': gpu.others, 'batch_jobs': gpu.batch_jobs} for gpu in have.gpus])
        if allocation:
            found['jobs_fit'] = room_for(have, allocation)[0]
        yield json.dumps(found)


def machine_table(workers, allocation, paint):
    """Yield the lines of a table: what each machine and each of its GPUs has free of what it has.

    paint(text, share) colours a text by the share that is free.
    """
    head = ['machine', 'cores', 'memory GB', 'GPU', 'memory GB', 'busy', 'used by']
    head[1:1] = ['jobs fit'] if allocation else []
    rows, said = [], {}
    for worker in workers:
        have = worker.capacity
        if worker.state != 'ready':
            rows.append([worker.name])
            said[len(rows) - 1] = f'cannot be used: {worker.why}'
            continue
        cells = [worker.name]
        if allocation:
            fit = room_for(have, allocation)[0]
            cells.append(paint(str(fit), 1.0 if fit else 0.0))
        cells.append(paint(f'{have.cores:.1f}/{have.total_cores:g}',
                           have.cores / max(have.total_cores, 0.01)))
        cells.append(free_of(have.memory_mb, have.total_memory_mb, paint))
        for gpu in have.gpus or (None,):
            if gpu is None:
                rows.append(cells)
                break
            users = ', '.join(map(printable, gpu.users)) + (
                f' ({count_of(gpu.others, "process")})' if gpu.others else '')
            users += f' {count_of(gpu.batch_jobs, "batch job")}' if gpu.batch_jobs else ''
            rows.append([*cells, printable(f'{gpu.index} {gpu.name}'),
                         free_of(gpu.memory_mb, gpu.total_memory_mb, paint),
                         paint(f'{gpu.utilization:.0%}', 1 - gpu.utilization), users.strip()])
            cells = [''] * len(cells)
        said[len(rows) - 1] = have.gpu_trouble or have.lost_gpus
    widths = [max([len(title), *(len(bare(row[column])) for row in rows if len(row) > column)])
              for column, title in enumerate(head)]
    for number, row in enumerate([head, *rows]):
        line = '  '.join(cell + ' ' * (width - len(bare(cell))) for cell, width
                         in zip(row, widths))
        yield f'{line}  {said.get(number - 1, "")}'.rstrip()


def free_of(free_mb, total_mb, paint):
    """Return 'free/total' in GB."""
    return paint(f'{free_mb / 1024:.1f}/{total_mb / 1024:.1f}', free_mb / max(total_mb, 1))


def bare(text):
    """Return the text without its colours."""
    return re.sub(r'\x1b\[\d*m', '', text)


def open_streams():
    """Open what was closed of the standard streams, or the next file would be taken for them."""
    for fd, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, 'w' if fd else 'r', closefd=False))


def check_surroundings():
    """Raise if the current folder is gone, or the locale is not UTF-8."""
    try:
        os.getcwd()
    except OSError:
        raise SchedulerError('the current folder is not there any more: cd to another.') from None
    if sys.getfilesystemencoding() != 'utf-8':      # else names and commands had other bytes there
        raise SchedulerError('the locale here is not UTF-8. Try: export PYTHONUTF8=1')


def allow_files(machines):
    """Raise the limit of open files as far as it goes; raise an error if that is too few."""
    import resource
    least = 32 + 16 * machines          # three pipes for each ssh, rsync, tar and follower
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for goal in (65536, 10240):         # macOS allows no more, whatever it says
        goal = goal if hard == resource.RLIM_INFINITY else min(goal, hard)
        with contextlib.suppress(ValueError, OSError):
            if soft != resource.RLIM_INFINITY and soft < goal:
                resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
                soft = goal
    if soft != resource.RLIM_INFINITY and soft < least:
        raise SchedulerError(f'only {soft} files may be open at a time here, and '
                             f'{count_of(machines, "machine")} may need {least}. '
                             f'Try: ulimit -n {least}, or name fewer machines.')


COMMANDS = {
    'execute_batch': execute_batch,
    'execute_remote': execute_remote,
    'execute_to': execute_to,
    'query_machines': query_machines,
}


def main(argv=None):
    """Run the command that argv (sys.argv) names by its first or second word; exit with its status.

    An installed executable or a link is named like the command; otherwise the next word is it:
    python3 ssh_scheduler.py execute_batch …  Without any, all commands are shown.
    """
    open_streams()
    is_called = argv is not None        # by another program
    argv = list(sys.argv if argv is None else argv)
    name = os.path.basename(argv[0])
    words = argv[1:]
    if name not in COMMANDS:
        name, words = (words[0] if words else ''), words[1:]
    try:
        check_surroundings()
        if name not in COMMANDS:
            check_for_help(OVERVIEW, 'ssh_scheduler', [name])
            raise UsageError(f'there is no command {printable(name)}{nearest(name, COMMANDS)}.'
                             if name else '<command> is missing.', OVERVIEW)
        status = COMMANDS[name](words)
    except HelpAsked as asked:
        Reporter().line(str(asked))
        status = 0
    except SchedulerError as error:
        reporter = Reporter()
        reporter.note(f'{name if name in COMMANDS else "ssh_scheduler"}: {error}')
        if isinstance(error, UsageError) and error.usage:
            reporter.note(error.usage.partition('\n\n')[2].partition('\n\n')[0])
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    if is_called:
        sys.exit(status)
    flush_streams()         # taking the interpreter apart would take as long as a tenth of a login
    os._exit(status)


# ---- The remote runner: runs there ----

# One runner serves one contact with a machine: it reads requests, starts jobs, and says what
# becomes of them.  A running job does not need it, since a process beside the job (run_job) records
# how it ends.  So all that must outlive the runner is in files.
#
# The folder of a project, WORKDIR/PROJECT:
#
#   jobs/KEY/   a job.  KEY is NAME.ATTEMPT-IDENTITY; IDENTITY is that of the journal that claimed
#               the job, since attempts alone begin anew when a job_results is removed
#   stage/ID/   copy/ and link/ as they were sent (`unpack`, or `folder` and rsync); in copy/ links
#               to link/, and beside it list, of all in copy/ (freeze).  `finish` removes it
#   cache/      copy/ and link/ of the last batch that went well (`finish`).  rsync compares the
#               next stage with it (--link-dest), so nothing is ever deleted in it
#   run.HOST.PID.RANDOM/        one runner; the next one removes what a killed one left (tidy):
#     self                      PID START BOOT_ID; its owner; the contact, BATCH.MACHINE.NUMBER
#     events, signals, log      FIFOs for what is said, and for what look_around began; complaints
#     environment*, functions   what jobs get from the login and the setup
#     login*, setup.*, gpus.*   what the login, the setup and nvidia-smi said
#     back.*, chunk.*, others.*, again.KEY/     bytes on their way to the client
#     cache/, claims/           the cache before, while it is removed; claims if /dev/shm has none
#
# The folder of a job, and who writes what:
#
#   cmd         the command.  The runner that creates it begins the job (take); one that creates it
#               with no command sees to it that the job never begins (revoke)
#   status      the record, see below (record); where a full disk refused that, its name says it
#   work/       where the job runs: empty (make_job_folders) or a copy of its stage (copy_stage)
#   alive       a FIFO that all that the job started has open (make_job_folders)
#   out, err    the output of the job; in err a line of the runner if it ended the job (run_job)
#   back        the list of what the job left, when it has ended (list_back)
#   in, eof     with --stdin: FIFOs, of the input and of its end (keep_input)
#   wait, tty   with a terminal: scripts, of which the first waits in the place of the job and the
#               other runs the job in the session that has the terminal (prepare_tty)
#   exports     with a terminal: the environment of the job, for tty (become_job)
#   code        with a terminal: a FIFO that hands the exit status from tty to wait (wait)
#   late        exists if the time limit was over (keep_time)
#   untold      exists if the job ended and nobody could be told (last_words_of)
#
# The folder of claims of a user, /dev/shm/ssh_scheduler.UID, for the batches of all users to read:
#
#   PROJECT.KEY             80 bytes: PID START BOOT_ID of the runner (claim_needs), then of the job
#                           (run_job); then CORES MB RESERVE GPU:MB:TIME:RESERVE..., which it needs.
#                           Empty when the job has ended; removed by `clean`
#   PROJECT.KEY.back/back   the list of what the job left, if the disk there is full (list_results)
#
# The record of a job, and what may follow:
#
#   starting PID START BOOT_ID    the runner has begun the job (take)           -> running, lost
#   running PID START BOOT_ID     the process that will record its end (run_job)  -> ended, lost
#   ended STATUS                  its exit status, 137 if its processes were killed with run_job
#   lost                          it is gone, and nobody knows how (ask_about, last_words_of)
#   revoked                       it never began, and never will (revoke)
#   damaged                       the file is not whole; it is read as this word  -> lost
#
# Requests.  Each is VERB COUNT FIELD..., with a NUL behind each; -> shows the events that answer.
#
#   probe                   say what the machine has, then do as `enter` does  -> probe
#   enter                   wait for the login, and be ready for jobs  -> note, broken, ready
#   tie                     end all jobs with the channel
#   measure NUMBER          say again what the machine has  -> probe, measured
#   limits CORES MB GPU:MB:TIME...      have no job start beyond these, together with other batches
#   unpack ID BYTES         take BYTES bytes of tar, which follow  -> stage_failed, broken
#   folder PATH             make a folder that rsync will fill
#   unsent WHY              say why files could not be sent, with what is known here  -> broken
#   freeze ID LINK...       a stage is complete; make its links  -> staged, stage_failed, broken
#   start KEY STAGE GPUS NEED MODE LIMIT COMMAND BACK PATH...
#                           start a job.  MODE: '', stdin or tty; LIMIT: '' or seconds; BACK: none,
#                           changed or paths  -> started, held, refused, left, note, and as `adopt`
#   cancel SECONDS KEY...   end jobs; kill them when the seconds are over  -> ended, cancelled
#   adopt KEY...            see to it that a job never begins, or say how it stands
#                           -> absent, started, ended, lost
#   revoke KEY...           see to it that a job never begins, or end it, and remove it
#   others IDENTITY         say which jobs of other journals are here  -> others, data
#   ping NUMBER             say something  -> pong
#   eof KEY                 the input of a job is complete
#   watch (KEY OUT ERR)...  look at jobs; OUT and ERR bytes of their streams are known
#                           -> used, data, and as `adopt`
#   list KEY                send the list of what a job left  -> data, unlistable
#   again KEY PATH...       send a list of what is there now of these paths  -> data, unlistable
#   clean KEY...            remove jobs whose results are safe
#   finish STAGE STAGE...   make the first, if it is not '', the cache; remove all  -> finished
#
# Events.  Each is a line of fields with tabs between them.
#
#   account WHICH           the first one; it is equal for two names of one account
#   broken WHY              the machine cannot be used; with `later` behind it, it may be later
#   note TEXT               a warning
#   probe NAME VALUE        something that the machine has
#   ready HOME RSYNC        jobs can start; HOME is the project's folder, RSYNC 1 or 0
#   measured NUMBER COST    what `measure` asked for is said; it took hundredths of a second
#   staged ID               jobs can have this stage
#   stage_failed ID WHY     the stage could not be stored
#   started KEY...          jobs run
#   held KEY                a job did not start, since other batches leave no room
#   refused KEY WHY         a job did not start
#   absent KEY              a job never began, and never will
#   lost KEY WHY            a job is gone without a result
#   ended KEY STATUS WALL CPU OUT ERR ENTRY...
#                           a job has ended.  WALL, CPU: hundredths of a second, 0 where a record is
#                           all there is; OUT, ERR: =TEXT or @BYTES; ENTRY: as in the list of what
#                           the job left, or only @ if that is long
#   left KEY PIDS           processes that a job started run on after it
#   used KEY KB             the most memory that a running job had
#   cancelled PIDS          `cancel` is done, and could not end these
#   unlistable KEY          the list is too long to be sent
#   others                  no job of other journals is here
#   pong NUMBER             the runner lives
#   finished                all is removed that nobody needs
#   data SIZE back KEY, data SIZE growth KEY STREAM OFFSET, data SIZE others
#                           SIZE bytes follow: a list; what a stream has grown by; of each job of
#                           another journal KEY, word, number and command.  A NUL ends each
#
# A list has +PATH, what was made; -PATH, what cannot be read; mMODE PATH, of what was opened to be
# read; !PATH, what is not there; ?PATH, what is no file, folder or link; sBYTES, how much it is.

# These variables change what bash, or a program that the scripts below use, does.  Tools keep all
# others of the login: LD_* and the like are how programs work on some machines.
REMOTE_CLEAN = r'''
set +o posix
unset -v POSIXLY_CORRECT TMOUT FUNCNEST GLOBIGNORE EXECIGNORE BASH_COMPAT CDPATH LANG "${!LC_@}" \
  TAR_OPTIONS TAPE GREP_OPTIONS QUOTING_STYLE TIME_STYLE BLOCK_SIZE BLOCKSIZE _POSIX2_VERSION
'''

# bash must read a pipe byte by byte, which would take 10 ms for the runner; head does not.
REMOTE_LOADER = 'read -rt 9999 -d ""; eval "$(head -c "$REPLY")"'

REMOTE_RUNNER = r'''
# The remote runner: runs there, under bash 4.2 or later, for as long as the channel is open.
# Its stdin: this text; then the header, and requests, of which each is VERB COUNT FIELD..., a NUL
# behind each.  Its stdout: one event a line, fields between tabs (\t, \n and \\ escaped), raw bytes
# after a line "data".  Only `writer` writes there, so that events never mix.
#
# shellcheck disable=SC2015     # A && B || continue: either is a reason to
# shellcheck disable=SC2016     # $ in single quotes: for another bash to expand
''' + REMOTE_CLEAN + r'''
JOB_OOM_SCORE=500           # so that a job is ended before what others run, when memory is short
GPU_LIMIT_S=20              # for nvidia-smi's answer
OLD_DAYS=14                 # after which what was sent is forgotten
LONGEST_LIST=60000000       # bytes: the names of what a job left, about a million files
# A machine that does not say its boot id has this one.  The time of the boot (btime) could not
# stand for it: that changes when the clock is set.
NO_BOOT_ID=00000000-0000-0000-0000-000000000000

# A variable that came with the environment stays exported, even if it gets another value.  The
# names of variables below are in lowercase.
while IFS= read -rd '' entry; do
  entry=${entry%%=*}
  [[ $entry == *[!a-z0-9_]* || $entry == _ ]] || unset -v "$entry"
done <"/proc/$$/environ" 2>/dev/null

LC_ALL=C IFS=$' \t\n'

# The functions share these variables.  First, the header:
token='' workdir='' project='' owner='' client='' setup='' want_gpus='' machine_environment=()
# The folders: of the project, of this runner, of the claims, and those of the system.
home='' run='' claims='' proc='' sys='' shared=''
# This runner: PID START BOOT_ID, its user and account, and the umask that jobs get.
self='' uid='' account='' boot_id='' mask=''
# File descriptors: of the requests, of the events, and of the FIFO that tells that the login shell
# or nvidia-smi is done.  How many of these two are waited for; the process group of the login
# shell.
requests='' events='' signals='' waiting=0 capturing=''
# What the machine has: the numbers of a probe, the limits for new jobs, the environment of jobs.
cores='' busy='' total='' busy_before='' total_before='' smi=nvidia-smi limits=()
environment=() assignments='' by_env=() dropped=()
# What the jobs of a stage find, and so did not make: "STAGE ENTRY" and "STAGE ./PATH".
declare -A sent=() linked=()
tied=''                     # 1 if the jobs end with the channel
arrived=()                  # the stages that came
removing=()                 # the pids of what removes something
survivors=''                # the pids of what end_processes could not end
declare -A begun=()         # the jobs that began under this runner: KEY -> the file of its claim
declare -A unbegun=()       # those of them that have no process yet
# The jobs that were asked for since the last start_pending, in order, and their fields by KEY.
pending=()
declare -A stage_of=() gpus_of=() need_of=() mode_of=() limit_of=() command_of=() back_of=()
declare -A paths_of=()

say() {                     # $1: an event of at most 4096 bytes, which a pipe never splits
  printf '%s\n' "$1" >&"$events"
}

say_text() {                # says the event $1 with the free texts that follow, escaped
  local event=$1 text
  shift
  for text; do
    escape "${text:0:1000}"
    event+=$'\t'$REPLY
  done
  say "$event"
}

escape() {                  # REPLY: the text $1 without tab and newline
  REPLY=${1//\\/\\\\}
  REPLY=${REPLY//$'\t'/\\t}
  REPLY=${REPLY//$'\n'/\\n}
}

beside() {                  # runs $@ in the background, so that the next request need not wait
  "$@" {requests}<&- &
  disown "$!"
}

complaint() {               # REPLY: the last complaint in the log, without "line 7: " in front
  # Fails, and starts no process itself, where none can be started.
  local line said=
  while IFS= read -r line; do           # tar's summary never has the reason
    case $line in
      *': Exiting with failure status'* | *': wait_for: No record of'*) ;;
      *) said=${line#*: line *: } ;;
    esac
  done <"$run/log"
  if [[ $said == *'fork: '* ]]; then
    no_process
    return 1
  fi
  explain_full "$said"
}

explain_full() {            # REPLY: the complaint $1, and what else than bytes is used up there
  local dir=$home total left blocks
  while [[ ! -e $dir && $dir == */* ]]; do dir=${dir%/*}; done
  IFS=: read -r total left blocks < <(stat -f -c %c:%d:%a -- "$dir/.")
  REPLY=$1
  [[ $blocks != 0 || $1 == *'No space left'* ]] || REPLY+=' (the disk there is full)'
  [[ $left != 0 || $total == 0 ]] || REPLY+=' (no inode is left for one more file: see df -i)'
  [[ $1 != *'quota exceeded'* ]] || REPLY+=' (of bytes, or of files: see quota -s)'
}

no_process() {              # REPLY: that no process can be started; starts none
  local line limit=
  while read -r line; do
    [[ $line != 'Max processes'* ]] || read -r _ _ limit _ <<<"$line"
  done </proc/self/limits
  REPLY="this account can start no more processes (ulimit -u: $limit)"
}

identify() {                # REPLY: pid, start time and boot id of process $1; fails if it is gone
  local stat fields
  { IFS= read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 1
  # shellcheck disable=SC2206            # numbers, behind a name with any blanks and brackets
  fields=(${stat##*) })
  [[ ${fields[0]} != Z ]] || return 1   # it has ended, though nobody has waited for it yet
  REPLY="$1 ${fields[19]} $boot_id"
}

centiseconds() {            # REPLY: hundredths of a second since boot
  read -r REPLY _ </proc/uptime
  REPLY=${REPLY/./}
}

# ---- Machine ----

# Text in front of a command in one line, NAME=VALUE ... COMMAND, is assigned after the words of the
# command were expanded.  So no name can meet a variable of this shell.  Unlike env(1) it costs no
# process (0.45 ms a job), and ps shows the values to nobody.
enter() {                   # becomes the program $@ in the environment that `assign` prepared
  exec 3>&2 2>/dev/null     # the program warns of a locale that is missing, too
  export -n SSH_SCHEDULER_CAPTURE "${dropped[@]}"
  eval "$assignments"'exec "${by_env[@]}" "$@" 2>&3 3>&-'
}

assign() {                  # sets assignments, by_env and dropped from $environment
  local entry name entries
  local -A given=()
  assignments='' by_env=() dropped=()
  for entry in "${environment[@]}"; do
    name=${entry%%=*}
    case $name in
      # bash cannot assign to these, or does more than that
      [0-9]* | *[!A-Za-z0-9_]* | BASHOPTS | SHELLOPTS | UID | EUID | PPID | GROUPS | \
        BASH_[!E]* | POSIXLY_CORRECT) by_env+=("$entry") ;;
      *)
        given[$name]=1
        printf -v entry '%s=%q ' "$name" "${entry#*=}"
        assignments+=$entry ;;
    esac
  done
  ((${#by_env[@]} == 0)) || by_env=(/usr/bin/env -- "${by_env[@]}")
  read_entries "/proc/$$/environ"
  for entry in "${entries[@]}"; do
    name=${entry%%=*}
    case $name in
      '' | [0-9]* | *[!A-Za-z0-9_]* | PWD | OLDPWD | SHLVL | _) ;;
      *) [[ ${given[$name]-} ]] || dropped+=("$name") ;;
    esac
  done
}

read_entries() {            # entries: what the file $1 holds, in which each ends with a NUL
  local entry
  entries=()
  while IFS= read -rd '' entry; do [[ $entry != [!=]*=* ]] || entries+=("$entry"); done <"$1"
}

read_environment() {        # environment: the entries of $1, without what each job has of its own
  local name entry entries word
  environment=()
  read_entries "$1"
  for entry in "${entries[@]}"; do
    name=${entry%%=*}
    case $name in
      PWD | OLDPWD | SHLVL | _ | CUDA_VISIBLE_DEVICES | SSH_CLIENT | SSH_CONNECTION) continue ;;
      SSH_SCHEDULER_CAPTURE | SSH_SCHEDULER_JOB | SSH_SCHEDULER_ID) continue ;;
      BASH_FUNC_*'%%' | BASH_FUNC_*'()') [[ ! -s $1.functions ]] || continue ;;
      SHELLOPTS | BASHOPTS)             # such as pipefail, but not what is for terminals
        entry=:${entry#*=}:
        for word in monitor history histexpand emacs vi login_shell expand_aliases; do
          entry=${entry/:"$word":/:}
        done
        entry=${entry#:}
        entry=$name=${entry%:} ;;
    esac
    environment+=("$entry")
  done
}

DUMP_FUNCTIONS='{
    \builtin echo shopt -s extglob; \builtin declare -f; \builtin shopt -p extglob
  } >"$SSH_SCHEDULER_CAPTURE.functions"'

capture_login() {           # leaves the environment of an interactive login in $run/environment
  local to=$run/environment shell=${SHELL:-$BASH} entries
  [[ ! $setup ]] || to=$run/login       # setup has the last word
  read_entries "/proc/$$/environ"
  ask_shell
  if [[ ! -s $to ]]; then
    printf '%s\0' "${entries[@]}" >"$to"
    printf '%s\n' "$shell" >"$run/login.silent"
  fi
  [[ ! $setup ]] || run_setup
}

ask_shell() {               # for capture_login: fills $to; sets shell to the one that was last
  local dump probe next how=-l
  # A start file may put another shell in the place of this one.  That shell reads its stdin.
  probe='(readlink "/proc/$PPID/exe"; tr "\0" " " <"/proc/$PPID/cmdline")'
  probe+=' >"$SSH_SCHEDULER_CAPTURE.shell"; exec /usr/bin/env -0 >"$SSH_SCHEDULER_CAPTURE.before"'
  probe="/bin/sh -c '$probe'"
  for _ in 1 2 3; do
    environment=("${entries[@]}" "SSH_SCHEDULER_CAPTURE=$to")
    assign
    next=
    dump='exec /usr/bin/env -0 >"$SSH_SCHEDULER_CAPTURE"'
    [[ $shell != */bash ]] || dump=${dump#exec }$'\n'$DUMP_FUNCTIONS
    case ${shell##*/} in                # csh takes -l alone, and with -c it has no $prompt
      *csh) (enter "$shell" "$how" <<<"$probe"$'\n'"$dump") ;;
      *) (enter "$shell" "${how/#-l/-il}c" "$dump" <<<"$probe") ;;
    esac 2>"$run/login.err"
    { IFS= read -r next && IFS= read -r how; } 2>/dev/null <"$to.shell"
    [[ $next && ! $next -ef $shell ]] || break
    [[ $how =~ ^-|\ -[a-z]*l|\ --login ]] && how=-l || how=-i
    read_entries "$to.before"
    shell=$next
    rm -f -- "$to" "$to.shell"
  done
}

run_setup() {               # for capture_login: $to, and what the setup of the machine file adds
  read_environment "$to"
  environment+=("SSH_SCHEDULER_CAPTURE=$run/environment")
  assign
  (enter "$BASH" -c '
    if [ -e "$2" ]; then . "$2"; fi
    eval "$1" || exit
    /usr/bin/env -0 >"$SSH_SCHEDULER_CAPTURE.new"
  '"$DUMP_FUNCTIONS" setup "$setup" "$to.functions") >"$run/setup.err" 2>&1
  echo "$?" >"$run/setup.status"
  mv -- "$run/environment.new" "$run/environment" 2>/dev/null
}

load_environment() {        # fills environment, for `enter`; tells where a part could not be had
  local entry name=$run/environment status
  if [[ $setup && ! -s $name ]]; then
    { read -r status <"$run/setup.status"; } || status='no answer in time'
    say_text broken "setup failed ($status): $(tail -n 1 "$run/setup.err")"
    return
  fi
  if [[ ! -s $name ]]; then
    say_text note 'the login shell did not give its environment in time'
    name=/proc/$$/environ
  elif IFS= read -r entry <"$run/login.silent"; then
    say_text note "the login shell did not give its environment: a start file of $entry ends it, \
or starts another program. So jobs have the environment of a command over ssh"
  fi
  read_environment "$name"
  environment+=("${machine_environment[@]}")
  load_functions
  environment=(PYTHONUNBUFFERED=1 "${environment[@]}")
  assign
} 2>/dev/null

# bash reads the functions at its start; programs that it runs inherit those that are exported.
load_functions() {          # for load_environment: has the bash of a job read them, by BASH_ENV
  local entry bash_env=
  for entry in "${environment[@]}"; do [[ $entry != BASH_ENV=* ]] || bash_env=${entry#*=}; done
  [[ $bash_env || -s $run/environment.functions ]] || return
  {
    if [[ $bash_env ]]; then            # it may choose GPUs, too, as .bashrc does for people
      printf 'export BASH_ENV=%q ssh_scheduler_gpus=${CUDA_VISIBLE_DEVICES-none}\n' "$bash_env"
      printf '. "$BASH_ENV"\nexport CUDA_VISIBLE_DEVICES=$ssh_scheduler_gpus\n'
      printf '[[ $ssh_scheduler_gpus != none ]] || unset -v CUDA_VISIBLE_DEVICES\n'
      printf 'unset -v ssh_scheduler_gpus\n'
    else
      printf 'builtin unset -v BASH_ENV\n'
    fi
    cat -- "$run/environment.functions"
  } >"$run/functions"
  environment+=("BASH_ENV=$run/functions")
}

read_ticks() {              # sets busy and total: processor ticks since boot
  local user nice system idle wait irq softirq steal
  read -r _ user nice system idle wait irq softirq steal _ <"$proc/stat"
  busy=$((user + nice + system + irq + softirq + steal))
  total=$((busy + idle + wait))
}

count_cores() {             # REPLY: the cores that this login may use
  local line count=0
  while read -r line _; do [[ $line == cpu[0-9]* ]] && count=$((count + 1)); done <"$proc/stat"
  REPLY=$count
  # nproc knows about affinity, but believes OMP_NUM_THREADS
  [[ $proc != /proc ]] || REPLY=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
}

nvidia() {                  # asks nvidia-smi $1; its answer goes to gpus.$2, its words to gpus.err
  {
    set -- "$smi" "$1" --format=csv,noheader,nounits
    [[ $smi != /* ]] || enter "$@"
    exec "$@"
  } >"$run/gpus.$2" 2>"$run/gpus.err" &
  echo "$!" >"$run/gpus.pid"
  wait "$!"
  local status=$?
  : >"$run/gpus.pid"
  return "$status"
}

# nvidia-smi may hang beyond kill.  So it is never waited for without a deadline, and its pid is in
# a file: when its time is over it is killed, and while that did not help nobody asks again.
query_gpus() {              # leaves what nvidia-smi says in $run/gpus.*
  local core=index,uuid,memory.total,memory.free,utilization.gpu status total free busy
  type -P "$smi" >/dev/null || { echo absent >"$run/gpus.status"; return; }
  nvidia --query-gpu="$core,compute_mode,mig.mode.current,name" list
  status=$?
  if ((status == 2)); then  # an old driver refuses all for one field that it does not know
    nvidia --query-gpu="$core,name" list
    status=$?
    ((status)) || status=old
  fi
  [[ $status != 137 ]] || return        # it was given up
  : >"$run/gpus.apps"
  case $status in
    0 | old | 14 | 15)      # where nothing of a GPU is taken, nobody is there to be asked for
      while IFS=', ' read -r _ _ total free busy _; do
        [[ $free != "$total" || $busy != 0 || $total == *[!0-9]* ]] || continue
        nvidia --query-compute-apps=gpu_uuid,pid,used_memory apps || (($? == 15)) ||
          : >"$run/gpus.apps"
        break
      done <"$run/gpus.list" ;;
  esac
  echo "$status" >"$run/gpus.status"
}

query_gpus_again() {        # with the environment of the jobs, where it is found only so
  local status line
  { read -r status <"$run/gpus.status"; } 2>/dev/null
  case $status in
    absent | 12 | 12[67]) ;;            # 12: it does not find its library
    *) return ;;
  esac
  line=$(enter /bin/sh -c 'command -v nvidia-smi')
  [[ $line == /* ]] || return
  smi=$line
  rm -f -- "$run/gpus.status"
  read -r -t "$GPU_LIMIT_S" line < <(query_gpus; echo) || give_up_gpus
}

give_up_gpus() {            # nvidia-smi does not answer: ends it, if it can be ended
  local pid
  read -r pid <"$run/gpus.pid" && kill -KILL "$pid"
  [[ ! -e $run/gpus.status ]] || rm -f -- "$run/gpus.status"
} 2>/dev/null

say_gpus() {                # says what query_gpus found; say_claims has filled claim_of by now
  local status line
  { read -r status <"$run/gpus.status"; } 2>/dev/null || status=timeout
  say_text probe nvidia_smi "$status"
  case $status in
    absent) say_other_gpus ;;
    timeout) ;;
    0 | old | 14 | 15)      # 14: a warning about its infoROM, with a valid answer; 15: one is lost
      while IFS= read -r line; do say_text probe gpu "$line"; done <"$run/gpus.list"
      ((status != 15)) ||
        while IFS= read -r line; do say_text probe gpu "$line"; done <"$run/gpus.err"
      say_gpu_processes ;;
    *) IFS= read -r line < <(cat "$run/gpus.err" "$run/gpus.list")
       say_text probe gpu_error "$line" ;;
  esac
}

say_other_gpus() {          # names GPUs that are not Nvidia's; those of bus 0 drive the screen
  local card vendor cards=
  for card in "$sys"/class/drm/card*/device; do
    [[ $card != */card*-*/* && $(readlink -f "$card") != */0000:00:* ]] || continue
    { read -r vendor <"$card/vendor"; } 2>/dev/null || continue
    case $vendor in 0x1002) cards+=' AMD' ;; 0x8086) cards+=' Intel' ;; esac
  done
  [[ ! $cards ]] || say_text probe other_gpus "${cards# }"
}

say_gpu_processes() {       # says who uses how much of which GPU
  local uuid pid used user pids=() users=()
  while IFS=', ' read -r uuid pid used; do
    [[ $pid == [1-9]* && $pid != *[!0-9]* ]] && pids+=("/proc/$pid") || continue
  done <"$run/gpus.apps"
  ((${#pids[@]} == 0)) || while read -r pid user; do
    users[${pid#/proc/}]=$user
  done < <(stat -c '%n %U' -- "${pids[@]}" 2>/dev/null)
  while IFS=', ' read -r uuid pid used; do
    [[ $pid == [1-9]* && $pid != *[!0-9]* ]] || continue
    say_text probe gpu_process "$uuid $used ${users[pid]:-?} ${claim_of[$pid]-}"
  done <"$run/gpus.apps"
}

say_cgroups() {             # what control groups, of version 1 or 2, leave of cores and memory
  local controllers path folder
  while IFS=: read -r _ controllers path; do
    case ,$controllers, in
      ,, | *,cpu,* | *,memory,*) folder=$sys/fs/cgroup${controllers:+/$controllers} ;;
      *) continue ;;
    esac
    [[ $controllers || ! -d $folder/unified ]] || folder+=/unified
    while :; do             # a container does not see the folders above its own
      say_cgroup "$folder$path"
      [[ $path == /?* ]] || break
      path=${path%/*}
    done
  done <"$proc/self/cgroup"
} 2>/dev/null

say_cgroup() {              # for say_cgroups: what the group with the folder $1 leaves
  local quota period limit used key value cache=0
  if { read -r quota period <"$1/cpu.max"; } && [[ $quota != max ]]; then
    say_text probe cgroup_cores "$quota/$period"
  elif { read -r quota <"$1/cpu.cfs_quota_us"; } && ((quota > 0)); then
    read -r period <"$1/cpu.cfs_period_us"
    say_text probe cgroup_cores "$quota/$period"
  fi
  if ! { read -r limit <"$1/memory.max" && read -r used <"$1/memory.current"; }; then
    read -r limit <"$1/memory.limit_in_bytes" && read -r used <"$1/memory.usage_in_bytes" ||
      limit=max
  fi
  # "unlimited" is a very large number in version 1
  [[ $limit != max ]] && ((${#limit} < 17)) || return
  while read -r key value; do           # what was read from files counts as used, and gives way
    [[ $key != inactive_file && $key != total_inactive_file ]] || cache=$value
  done <"$1/memory.stat"
  say_text probe cgroup_memory "$((limit > used - cache ? limit - used + cache : 0))/$limit"
}

# Processes that were forked share memory: the largest alone is certain to be taken, and at most the
# sum may be needed.  Too little taken only holds back other jobs; too much would promise it twice.
use_of() {                  # what process $1 and its descendants use: pids, rss, peak (kB), ticks
  local pid stat fields lines line file index
  pids=("$1") rss=0 peak=0 ticks=0
  for ((index = 0; index < ${#pids[@]} && index < 1000; index++)); do
    pid=${pids[index]}
    { IFS= read -r stat <"/proc/$pid/stat"; } || continue
    # shellcheck disable=SC2206          # numbers, behind a name with any blanks and brackets
    fields=(${stat##*) })
    # its own time, and that of the children for which it has waited
    ticks=$((ticks + fields[11] + fields[12] + fields[13] + fields[14]))
    mapfile -t lines <"/proc/$pid/status"
    for line in "${lines[@]:10:25}"; do
      case $line in
        VmHWM:*) line=${line//[!0-9]/}; peak=$((peak + line)) ;;
        VmRSS:*) line=${line//[!0-9]/}; rss=$((line > rss ? line : rss)); break ;;
      esac
    done
    for file in "/proc/$pid/task/"*/children; do
      read -ra fields <"$file"
      pids+=("${fields[@]}")
    done
  done
} 2>/dev/null

measure() {                 # says what the machine has, and what of it is free
  local key value busy total
  local -A claim_of=()      # pid -> the key of the job, or "other"
  read_ticks
  say_text probe ticks "$busy/$total"
  [[ $cores ]] || { count_cores; cores=$REPLY; }        # a process: once is enough
  say_text probe cores "$cores"
  read -r value _ <"$proc/loadavg"
  say_text probe load "$value"
  while read -r key value _; do
    case $key in MemTotal: | MemAvailable:) say_text probe "${key%:}" "$value" ;; esac
  done <"$proc/meminfo"
  say_cgroups
  say_claims
  [[ $want_gpus != 1 ]] || say_gpus
}

measure_again() {           # $1: its number; beside the loop, since nvidia-smi takes its time
  local began line pid
  if [[ $want_gpus == 1 ]]; then
    # where the last one still hangs, not even a kill has helped
    { read -r pid <"$run/gpus.pid" && kill -0 "$pid"; } ||
      read -r -t "$GPU_LIMIT_S" line < <(query_gpus; echo) || give_up_gpus
  fi
  centiseconds
  began=$REPLY
  measure
  centiseconds
  say_text measured "$1" "$((REPLY - began))"
} 2>/dev/null

probe() {                   # says what is here and free, if $1 is not empty, then "ready"
  local rsync word deadline=$((SECONDS + GPU_LIMIT_S)) missing=()
  while ((waiting > 0 && SECONDS < deadline)) &&
    read -r -t $((deadline - SECONDS)) word <&"$signals"; do
    waiting=$((waiting - 1))
    [[ $word != environment ]] || capturing=
  done
  # a login shell that waits for somebody would do so for ever
  [[ ! $capturing ]] || kill -KILL -- "-$capturing"
  capturing=
  [[ $want_gpus != 1 || -e $run/gpus.status ]] || give_up_gpus
  load_environment
  [[ $want_gpus != 1 ]] || query_gpus_again
  if [[ $1 ]]; then
    say_text probe ticks_before "$busy_before/$total_before"
    measure
  fi
  for word in find tar; do type -P "$word" >/dev/null || missing+=("$word"); done
  ((${#missing[@]} == 0)) || say_text broken "this program is missing there: ${missing[*]}"
  type -P rsync >/dev/null && rsync=1 || rsync=0
  say_text ready "$home" "$rsync"
}

# ---- Files ----

say_unstored() {            # says why the files of stage $1 could not be stored
  if complaint; then say_text stage_failed "$1" "$REPLY"; else say_text broken "$REPLY" later; fi
}

freeze() {                  # $1: a stage that has arrived; the rest: its linked paths
  local stage=$home/stage/$1 id=$1 path entry
  shift
  {
    mkdir -p -- "$stage/copy"
    for path; do
      [[ $path != */* ]] || mkdir -p -- "$stage/copy/${path%/*}"
      ln -s -- "$stage/link/$path" "$stage/copy/$path"
      linked["$id ./$path"]=1
    done
    (cd -- "$stage/copy" && listing .) >"$stage/list"
  } || { say_unstored "$id"; return; }
  while IFS= read -rd '' entry; do sent["$id $entry"]=1; done <"$stage/list"
  say_text staged "$id"
} 2>>"$run/log"

# A file that cannot be read is opened, where the login may do that, since rsync and tar need the
# bits; an "m" with the mode that it had stands before it.  A file that stays shut is "-": otherwise
# an empty folder would stand for all that lies in it.
listing() {                 # what lies below $1 in the current folder, as rsync sees changes
  find "$1" -mindepth "${2:-1}" "${@:3}" \
    '(' -type f ! -readable -o -type d '(' ! -readable -o ! -executable -o ! -perm -500 ')' ')' \
    -links +0 '(' -exec chmod u+rX '{}' ';' -o -true ')' \
    '(' '(' ! -readable -o -type d ! -executable ')' -printf '- %p\0' -prune -o \
    -printf 'm%m %p\0' ! -true ')' -o \
    -type d -printf 'd %p\0' -o -printf '%y %s %T@ %p\0'
}

# A job has no folder for its results: at its end it lists what it made or changed in its own
# folder, and one rsync with a list of files fetches that of many jobs.
# $1: job folder, $2: stage, $3: where the list goes, the rest: paths, or nothing: what changed
list_back() {               # fails if the list cannot be written
  local dir=$1 id=$2 to=$3 entry path kind failed='' found size=0
  shift 3
  [[ -r $dir/work && -x $dir/work ]] || chmod u+rwx -- "$dir/work"
  [[ -d $dir/work ]] || return 0
  cd -- "$dir/work" && [[ -r . ]] || { printf -- '-./.\0' >"$to/back"; return; }
  found=(*)
  (($# || ${#found[@]})) || return 0
  : >"$to/back" || return
  while IFS= read -rd '' entry; do
    (($#)) || [[ ! ${sent["$id $entry"]+known} ]] || continue
    kind=${entry%% *}
    path=./${entry#*./}
    [[ ! ${linked["$id $path"]+known} || ! -L $path ]] || continue
    case $kind in
      f) entry=${entry#f } size=$((size + ${entry%% *})) ;;&
      [fdl]) printf '+%s\0' "$path" ;;
      -) printf -- '-%s\0' "$path" ;;
      m*) printf '%s %s\0' "$kind" "$path" ;;
      '!'*) printf '%s\0' "$entry" ;;
      *) printf '?%s\0' "$path" ;;      # a socket, a fifo, a device
    esac || failed=1
  done < <(entries_of "$@") >>"$to/back"
  ((size < 1000000)) || printf 's%s\0' "$size" >>"$to/back" || failed=1
  [[ ! $failed ]]
}

entries_of() {              # lists the paths $@ as rsync sees changes, or all; ! is one not there
  local path above rest
  (($#)) || listing .
  for path; do
    above=. rest=$path
    while [[ -x $above && $rest == */* ]]; do
      above+=/${rest%%/*} rest=${rest#*/}
      [[ ! -d $above || -x $above ]] || listing "$above" 0 -maxdepth 0
    done
    if [[ $path == . ]]; then
      listing .
    elif [[ -e $path || -L $path ]]; then
      listing "./$path" 0
    elif [[ ! -d $above || -x $above ]]; then   # else it may be there
      printf '!%s\0' "$path"
    fi
  done
}

find_list() {               # REPLY: the file that lists what the job $1 left
  REPLY=$home/jobs/$1/back
  [[ ! -e $claims/$project.$1.back/back ]] || REPLY=$claims/$project.$1.back/back
}

send_list() {               # sends the list $2 of the job $1
  local bytes
  bytes=$(stat -c %s -- "$2")
  if ((${bytes:-0} > LONGEST_LIST)); then
    say "unlistable"$'\t'"$1"
    return
  fi
  bytes=$run/back.$1.$RANDOM            # the last one of it may still be on its way
  cp -- "$2" "$bytes" || { bytes=$2.sent; cp -- "$2" "$bytes"; }
  say "bulk"$'\t'"$bytes"$'\t'"back"$'\t'"$1"
}

list_again() {              # sends what there is now of some paths ($2...) of the job $1
  local key=$1 to=$run/again.$1
  shift
  mkdir -p -- "$to"
  : >"$to/back"
  if [[ -d $home/jobs/$key/work ]]; then
    (list_back "$home/jobs/$key" '' "$to" "$@")
  else
    printf '!%s\0' "$@" >"$to/back"
  fi
  send_list "$key" "$to/back"
} 2>/dev/null

# ---- Jobs ----

start_pending() {           # starts the jobs that were asked for since the last time
  local key dir held='' said='' starting=()
  ((${#pending[@]})) || return 0
  make_job_folders
  claim_needs || held=1
  for key in "${pending[@]}"; do
    dir=$home/jobs/$key
    if [[ $held && ! -e $dir/cmd ]]; then
      hold
    elif take; then
      ((${#said} < 3000)) || { say "started$said"; said=; }
      said+=$'\t'$key
      starting+=("$key") unbegun[$key]=1
      begun[$key]=$claims/$project.$key
    elif is_taken; then
      beside ask_about "$key"
    else
      refuse
    fi
  done
  [[ ! $said ]] || say "started$said"   # before the first can say that it ended
  for key in "${starting[@]}"; do
    beside run_job "$key"
    unset -v "unbegun[$key]"
  done
  pending=() stage_of=() gpus_of=() need_of=() mode_of=() limit_of=() command_of=() back_of=()
  paths_of=()
}

make_job_folders() {        # for start_pending: those of all pending jobs, with two processes
  local key dirs=() pipes=()
  for key in "${pending[@]}"; do
    dirs+=("$home/jobs/$key")
    [[ ${stage_of[$key]} ]] || dirs+=("$home/jobs/$key/work")
    pipes+=("$home/jobs/$key/alive")
  done
  in_groups make_some_folders "${dirs[@]}"
  in_groups make_pipes "${pipes[@]}"
}

make_some_folders() {
  mkdir -p -- "$@"
}

make_pipes() {              # some are there, where the job was started before
  mkfifo -- "$@"
} 2>/dev/null

hold() {                    # for start_pending: other batches leave no room for the job $key
  : >"$claims/$project.$key"
  rm -f -- "$dir/alive"
  rmdir -- "$dir/work" "$dir"
  say "held"$'\t'"$key"
}

# The runner that creates `cmd` begins the job, and no other ever does.  O_EXCL (set -C) is as
# atomic as mkdir, on NFS (version 3 and later) too, and needs no process: so one mkdir makes the
# folders of many jobs.
take() {                    # for start_pending: begins the job $key; fails if that cannot be
  set -C
  if ! : >"$dir/cmd"; then
    set +C
    return 1
  fi
  set +C
  printf '%-95s\n' "starting $self" >"$dir/status" && prepare_tty &&
    printf '%s\n' "${command_of[$key]}" >"$dir/cmd" && return
  rm -f -- "$dir/cmd"       # the disk is full: nothing was started
  return 1
}

is_taken() {                # for start_pending: tells whether the job $key was begun before
  local command
  command=$(<"$dir/cmd")
  [[ -e $dir/cmd && (! $command || $command == "${command_of[$key]}") ]]
} 2>/dev/null

refuse() {                  # for start_pending: says why the job $key could not be begun
  [[ -e $dir/cmd ]] || : >"$claims/$project.$key"
  complaint
  say_text refused "$key" "$REPLY"
}

# A terminal is a session of its own beside the channel, and runs `tty`.  `wait` stands in the place
# of the job; a FIFO tells it the exit status, or that the session was cut off.  So a job has one
# record of its end, whether it had a terminal or not.
prepare_tty() {             # for take: writes these two, if the job $key wants a terminal
  [[ ${mode_of[$key]} == tty ]] || return 0
  cat >"$dir/wait" <<'END' && cat >"$dir/tty" <<'END'
mkfifo ../code
read -r code <../code || code=129
exit "$code"
END
cd -- "${0%/*}/work" || exit
until [[ -p ../code ]]; do sleep 0.02; done
exec 8>../code 9>../alive
{ IFS= read -r assignments; IFS= read -r by_env; } <../exports
trap : INT QUIT                         # what is typed is for the job; this tells how that ended
set -- "$TERM" "$BASH"
eval "$assignments TERM=\$1 $by_env \"\$2\" ../cmd 8>&-"
echo "$?" >&8
END
}

# This process shares the process group of the job, and ignores what a job sends its own group
# ("kill 0" is common in scripts), since it must live to record how the job ended.  If it is killed
# all the same, the next `look` notices, and records 137.
run_job() {                 # KEY, in a process and a group of its own: runs it, and records its end
  local key=$1 dir=$home/jobs/$1 stage=${stage_of[$1]} mode=${mode_of[$1]} limit=${limit_of[$1]}
  local alive input keeper='' watchdog='' status=125 began
  trap : TERM INT HUP
  exec {events}>&- {signals}>&-         # or the writer would outlive a runner that was killed
  exec {alive}<>"$dir/alive"            # all that the job starts has it open, and is found by it
  centiseconds
  began=$REPLY
  identify "$BASHPID"
  record "$dir" "running $REPLY"
  printf '%-80s' "$REPLY" 1<>"$claims/$project.$key"    # the claim was the runner's until now
  # shellcheck disable=SC2064            # when it is run, there is no $key any more
  trap "last_words_of $key" EXIT
  if copy_stage; then
    exec {input}</dev/null
    [[ $mode != stdin ]] || keep_input
    [[ ! $limit ]] || keep_time
    # The streams go to files, so that no job waits for a slow reader or a broken link, and a client
    # can be killed at any byte and come back.  The price is disk on both sides.
    (become_job) <&"$input" >>"$dir/out" 2>>"$dir/err"
    status=$?
    # shellcheck disable=SC2064
    trap "last_words_of $key $status" EXIT
    end_keepers
  fi
  conclude
} 2>/dev/null

copy_stage() {              # for run_job: gives the job its copy of what was sent
  [[ $stage ]] || return 0
  cp -a --reflink=auto -- "$home/stage/$stage/copy" "$dir/work" 2>>"$dir/err" && return
  printf 'ssh-scheduler: its files could not be copied into the job folder\n' >>"$dir/err"
  return 1
}

become_job() {              # for run_job: becomes the bash of the job
  local own program=../cmd score
  exec {held}>"$dir/alive" {alive}<&- {input}<&-
  umask "$mask"
  read -r score </proc/self/oom_score_adj && ((score >= JOB_OOM_SCORE)) ||
    echo "$JOB_OOM_SCORE" >/proc/self/oom_score_adj
  cd -- "$dir/work" || exit
  printf -v own '%s=%q ' SSH_SCHEDULER_JOB "${key%.*}" SSH_SCHEDULER_ID "$project.$key"
  [[ ${gpus_of[$key]} == - ]] ||
    own+="CUDA_VISIBLE_DEVICES=${gpus_of[$key]} CUDA_DEVICE_ORDER=PCI_BUS_ID "
  assignments+=$own
  if [[ $mode == tty ]]; then
    program=../wait
    printf '%s\n' "$assignments" "${by_env:+$(printf '%q ' "${by_env[@]}")}" >../exports
  fi
  enter "$BASH" "$program"
}

# The input is a FIFO that a process beside the job holds open until `eof` says that it is complete:
# so a broken connection is no end of file.
keep_input() {              # for run_job: sets input and keeper
  local eof both
  mkfifo -- "$dir/eof" "$dir/in.new"
  # Both ends are open before what feeds it sees it, or that would be told that nobody reads.
  exec {eof}<>"$dir/eof" {both}<>"$dir/in.new" {input}<&-
  exec {input}<"$dir/in.new"
  mv -- "$dir/in.new" "$dir/in"
  # A cancel must not end this: the job would take its input for complete.
  { trap '' TERM; exec {alive}<&- {input}<&-; read -r <&"$eof"; } &
  keeper=$!
  disown "$keeper"
  exec {eof}<&- {both}<&-
}

# The time limit is kept beside the job, so that it holds when no client is connected.
keep_time() {               # for run_job: sets watchdog, which ends the job as a cancel does
  {
    trap '' TERM
    exec {input}<&-
    read -r -t "$limit" <&"$alive"      # nothing ever comes
    printf 'ssh-scheduler: ended after %s s, its time limit\n' "$limit" >>"$dir/err"
    : >"$dir/late"
    end_jobs 5 "$key"
  } &
  watchdog=$!
}

end_keepers() {             # for run_job: the job has ended; changes status if its time was over
  exec {input}<&-
  [[ ! $keeper ]] || kill -KILL "$keeper"
  if [[ -e $dir/late ]]; then
    wait "$watchdog"
    status=124              # as timeout(1) has it
  elif [[ $watchdog ]]; then
    kill -KILL "$watchdog"
  fi
}

conclude() {                # for run_job: records how the job ended, and says so
  local used wall
  # The 16th and 17th field are the time of the children for which this process has waited.
  IFS= read -r used </proc/self/stat
  # shellcheck disable=SC2206
  used=(${used##*) })
  [[ ${back_of[$key]} == none ]] || list_results
  : >"$claims/$project.$key"            # first: who reads the record may remove that
  record "$dir" "ended $status"
  centiseconds
  wall=$((REPLY - began))
  say_left
  say_ended "$key" "$status" "$wall" "$((used[13] + used[14]))"
  trap - EXIT
}

list_results() {            # for conclude: what the job left; if that cannot be, its status is 125
  local paths left=$claims/$project.$key.back   # this lies in memory
  eval "paths=(${paths_of[$key]})"
  ! list_back "$dir" "$stage" "$dir" "${paths[@]}" || return 0
  printf 'note\t%s: the disk there is full; what it wrote may not be whole\n' "${key%.*}" \
    1<>"$run/events"
  mkdir -p -- "$left" && list_back "$dir" "$stage" "$left" "${paths[@]}" || ((status)) ||
    status=125
}

say_left() {                # for conclude: says what the job started and did not wait for
  local left pid comm text='' count=0
  exec {left}<"$dir/alive" {alive}<&-
  # If nobody else has it open, that is known at once.  What is about to end is given a moment.
  read -r -t 0.1 <&"$left"
  (($? > 128)) || return
  while read -r pid; do
    [[ $pid != "$BASHPID" ]] && { read -r comm <"/proc/$pid/comm"; } || continue
    count=$((count + 1))
    escape "$comm"
    ((count > 5)) || text+="${text:+, }$REPLY ($pid)"
  done < <(exec {left}<&-; holders "$key")
  ((count < 6)) || text+=" and $((count - 5)) more"
  ((count == 0)) || printf 'left\t%s\t%s\n' "$key" "$text" 1<>"$run/events"
}

last_words_of() {           # the same for the run_job of $1; $2: the exit status, if the job ended
  local dir=$home/jobs/$1
  : >"$claims/$project.$1"
  if [[ $2 ]]; then
    record "$dir" "ended $2"
    : >"$dir/untold"        # the next look at it says so
  else
    record "$dir" lost
    no_process
    printf 'refused\t%s\t%s\n' "$1" "$REPLY" 1<>"$run/events"
  fi
}

# A record is written over the one before, not renamed into its place.  A rename costs a process,
# and a full disk refuses a new file, but not these 96 bytes, which were paid for when the job was
# taken.  A record that is not whole says nothing.
record() {                  # $1: job folder, $2: how the job stands, or how it ended
  # Where even that fails, the result goes into the name of the file, which costs nothing.
  printf '%-95s\n' "$2" 1<>"$1/status" || [[ $2 != ended* ]] || mv -- "$1/status" "$1/status $2"
}

read_record() {             # $1: job folder; sets word and value from its record, if it makes sense
  local file now
  word='' value=''
  for file in "$1/status" "$1/status ended "*; do
    [[ $file == */status ]] || { word=ended value=${file##* }; return; }
    read -r word value <"$file"
  done
  file='^(ended [0-9]{1,3}|(running|starting) [1-9][0-9]* [0-9]+( [0-9a-f-]+)?|revoked |lost )$'
  [[ "$word $value" =~ $file ]] || word=damaged value=''
  if [[ $value == *" $NO_BOOT_ID" ]]; then      # what began later than now began before a restart
    file=${value#* }
    read -r now _ </proc/uptime
    ((10#${file%% *} <= 10#${now/./})) || value=${value%% *}" ${file%% *} ${NO_BOOT_ID//0/f}"
  fi
}

lives() {                   # tells whether the job with the record $1 $2 has a process left
  local pid=${2%% *}
  [[ $1 == running && $pid == [1-9]* && $pid != *[!0-9]* && $pid != 1 ]] || return
  if identify "$pid"; then [[ $REPLY == "$2" ]]; else kill -0 -- "-$pid"; fi
} 2>/dev/null

is_runner() {               # tells whether the process that `identify` once named $1 is still there
  identify "${1%% *}" && [[ $REPLY == "$1" ]]
}

say_ended() {               # $1: key, $2: exit status, $3, $4: wall and processor time (cs)
  local dir=$home/jobs/$1 event entry back=
  event=ended$'\t'$1$'\t'$2$'\t'$3$'\t'$4
  stream_text "$dir/out"
  event+=$'\t'$REPLY
  stream_text "$dir/err"
  event+=$'\t'$REPLY
  find_list "$1"
  if [[ -s $REPLY ]]; then
    while ((${#back} < 1000)) && IFS= read -rd '' entry; do
      escape "$entry"
      back+=$'\t'$REPLY
    done <"$REPLY"
    ((${#back} < 1000)) || back=$'\t'@  # asked for with "list"
  fi
  # The FIFO is opened by name, since a job does not hold it open; without a runner nobody listens.
  printf '%s\n' "$event$back" 1<>"$run/events"
}

stream_text() {             # REPLY: "=TEXT" of the file $1 where that is short text, else "@BYTES"
  local text=
  if [[ ! -s $1 ]]; then
    REPLY='='
  elif IFS= read -rd '' -n 601 text <"$1" || ((${#text} > 600)); then
    REPLY=@$(stat -c %s -- "$1")        # longer than that, or with a NUL
  else
    escape "$text"
    REPLY="=$REPLY"
  fi
}

# How a job stands is decided once: if it runs, `look` notices its end, at most 2 s later.  To ask
# in a loop took 1.6 % of a core for each job.
ask_about() {               # says how the job $1 stands, which was begun before
  local key=$1 dir=$home/jobs/$1 word value tries why='it ended without a record of how'
  for ((tries = 0; tries < 20; tries++)); do
    is_runner "$self" || return         # nobody listens
    read_record "$dir"
    if [[ $word == revoked ]]; then
      say "absent"$'\t'"$key"           # again: who was told so may have lost contact before
      return
    elif [[ $word == ended ]]; then
      say_ended "$key" "$value" 0 0
      return
    elif [[ $value =~ ^[1-9][0-9]*\ [0-9]+\ ([0-9a-f-]{36})$ &&
      ${BASH_REMATCH[1]} != "$boot_id" ]]; then
      why='the machine was restarted'
      break
    elif lives "$word" "$value"; then
      say "started"$'\t'"$key"
      return
    elif [[ $word == running ]]; then
      read_record "$dir"                # what ends records that before it is gone
      [[ $word == ended ]] || { record_killed "$key"; return; }
      tries=0
    elif [[ $word == lost ]]; then
      break
    elif [[ $word == starting ]] && is_runner "$value"; then
      tries=0               # another runner will begin it, and has much to do
    fi
    sleep 0.1
  done
  record "$dir" lost        # so that it is not taken for one that was killed
  end_processes 5 "$key"    # what it started elsewhere may live, and it may be started again
  say_text lost "$key" "$why"
} 2>/dev/null

look() {                    # triples KEY OUT ERR, the known bytes of its streams: says the rest
  local files=() size file chunk count=0
  local -A since what
  while (($#)); do
    look_at "$1"
    for file in "out $2" "err $3"; do
      files+=("$home/jobs/$1/${file% *}")
      since["$home/jobs/$1/${file% *}"]=${file#* }
      what["$home/jobs/$1/${file% *}"]=$1$'\t'${file/ /$'\t'}
    done
    shift 3
  done
  while read -r size file; do
    ((size > since["$file"])) || continue
    count=$((count + 1))
    chunk=$run/chunk.$BASHPID.$count    # not below: a part of a pipe has a pid of its own
    tail -c "+$((since["$file"] + 1))" -- "$file" | head -c 262144 >"$chunk"
    say "bulk"$'\t'"$chunk"$'\t'"growth"$'\t'"${what["$file"]}"
  done < <(in_groups sizes_of "${files[@]}")
} 2>/dev/null

sizes_of() {
  stat -c '%s %n' -- "$@"
}

look_at() {                 # for look: says what the job $1 uses, or how it stands if it has ended
  local word value pids rss peak ticks
  read_record "$home/jobs/$1"
  if lives "$word" "$value"; then
    use_of "${value%% *}"
    ((peak == 0)) || say "used"$'\t'"$1"$'\t'"$peak"
  elif [[ $word == running || -e $home/jobs/$1/untold ||
    ($word != starting && ! ${begun[$1]-}) ]]; then
    ask_about "$1" &        # but of what began here run_job tells the end, and more of it
  fi
}

list_others() {             # says which jobs lie here that journals other than $1 claimed
  local dir id runner who word value list=$run/others.$RANDOM
  local -A led=()           # identities of journals whose clients are connected
  for dir in "$home"/run.*; do
    { read -r runner && IFS= read -r who; } <"$dir/self" || continue
    [[ $dir == */"run.${HOSTNAME:-here}."* ]] && ! is_runner "$runner" || led["${who##* }"]=1
  done
  for dir in "$home"/jobs/*; do
    id=${dir##*.}
    [[ $id == *-* ]] && id=${id##*-} || id=none         # journals had no identity once
    [[ $id != "$1" && ! ${led["$id"]-} ]] || continue
    read_record "$dir"
    if [[ $word == running ]] && ! lives "$word" "$value"; then
      read_record "$dir"                # it may have ended at this moment
      word=${word/running/lost}
    fi
    [[ $word == revoked ]] || printf '%s\0' "${dir##*/}" "$word" "${value%% *}" "$(<"$dir/cmd")"
  done >"$list"
  if [[ -s $list ]]; then
    say "bulk"$'\t'"$list"$'\t'"others"
  else
    say others
  fi
} 2>/dev/null

# ---- Needs of others ----

# Batches see each other by claims.  For each job a file says which process stands for it and what
# it needs, in a folder of the machine where no user can change another's files.  A start claims
# first and looks then; if all claims together are beyond the limits that the last probe gave, it
# takes its claim back.  Of two that start at once, at least one sees the other: so no lock is
# needed that a killed batch could leave behind.  A claim whose process is gone, that is empty or
# that makes no sense claims nothing.
own_claims() {              # makes the folder of claims; what another user may write is not used
  [[ -e $claims || -L $claims ]] || mkdir -m 755 -- "$claims"
  [[ -d $claims && ! -L $claims && -O $claims ]] || { claims=$run/claims; mkdir -p -- "$claims"; }
} 2>/dev/null

claim_needs() {             # claims what the pending jobs need; fails if others leave no room
  local key file
  own_claims                # another batch that ended may have taken the folder away
  umask 022
  for key in "${pending[@]}"; do
    [[ -e $home/jobs/$key/cmd ]] ||     # it was started before
      printf '%-80s%s\n' "$self" "${need_of[$key]}" >"$claims/$project.$key"
  done
  umask 077
  ((${#limits[@]})) || return 0
  for file in "$shared"/ssh_scheduler.*/*; do
    [[ $file == "$claims/$project."* ]] || { fits_all; return; }
  done
}

fits_all() {                # tells whether all that is claimed here is within the limits
  local file process need key word cores=0 memory=0 ours=0 all=0 alone=0 gpu mb time reserved
  local mine=() jobs=() gpu_mb=() gpu_time=() gpu_alone=()      # by the GPU's index
  for file in "$shared"/ssh_scheduler.*/*; do
    read_claim "$file" || continue
    # shellcheck disable=SC2086          # numbers and colons: read_claim saw to that
    set -- $need
    all=$((all + 1)) cores=$((cores + $1)) memory=$((memory + $2)) alone=$((alone + $3))
    [[ ! $key ]] || ours=$((ours + 1))
    shift 3
    for word; do
      IFS=: read -r gpu mb time reserved <<<"$word"
      [[ ! $key ]] || mine[gpu]=1
      ((jobs[gpu] += 1, gpu_mb[gpu] += mb, gpu_time[gpu] += time, gpu_alone[gpu] += reserved))
    done
  done
  ((alone == 0 || all == 1)) || return
  # one job may start on a machine however busy its processors are
  ((memory <= limits[1] && (cores <= limits[0] || ours == 1))) || return
  for word in "${limits[@]:2}"; do
    IFS=: read -r gpu mb time <<<"$word"
    [[ ${mine[gpu]-} ]] || continue
    ((jobs[gpu] == 1 || (gpu_alone[gpu] == 0 && gpu_time[gpu] <= time))) || return
    ((gpu_mb[gpu] <= mb)) || return
  done
}

read_claim() {              # what the file $1 claims: process, need, key; fails where nobody does
  local pid start boot number error
  [[ -f $1 && ! -L $1 ]] || return 1    # to open a FIFO would take for ever
  { read -r -n 4000 pid start boot need <"$1"; } 2>/dev/null || return 1
  # The claim of another user may say anything.
  number='(0|[1-9][0-9]{0,8})'
  [[ $need =~ ^$number\ $number\ [01](\ $number:$number:$number:[01])*$ ]] || return 1
  [[ $pid == [1-9]* && $pid != *[!0-9]* && ${#pid} -lt 10 ]] || return 1
  process=$pid key=
  [[ $1 != "$claims/$project."* ]] || key=${1#"$claims/$project."}
  if identify "$pid"; then
    [[ $REPLY == "$pid $start $boot" ]]
  else                      # where /proc hides the processes of others, kill tells
    error=$({ LC_ALL=C kill -0 "$pid"; } 2>&1)
    [[ $error == *permitted* && $boot == "$boot_id" ]]
  fi
}

say_claims() {              # says of each job, of whatever batch, what it claims and uses
  local file process need key pids rss peak ticks pid
  for file in "$shared"/ssh_scheduler.*/*; do
    read_claim "$file" || continue
    use_of "$process"
    for pid in "${pids[@]}"; do claim_of["$pid"]=${key:-other}; done
    say_text probe claim "$rss $ticks ${key:--} $need"
  done
}

# ---- Ending ----

revoke() {                  # begins the job $1 itself, so that it never starts; fails if it did
  local dir=$home/jobs/$1
  [[ ! -e $dir/cmd ]] && mkdir -p -- "$dir" && ( set -C; : >"$dir/cmd" ) &&
    printf '%-95s\n' revoked >"$dir/status"
} 2>/dev/null

# The client that holds the lock of a job_results owns its runners.  A runner that an earlier client
# had, or this one before contact was lost (sshd keeps that for minutes), must not act any more on
# what is left in its pipe: what it would start is placed again.
# The same client may have come by another name of this account: it hears so, and leaves one out.
end_old_runners() {         # ends such runners; the jobs that they started run on
  local dir runner who which tries
  for dir in "$home/run.${HOSTNAME:-here}."*; do
    which=                  # SESSION.MACHINE.CONNECTION
    { read -r runner && IFS= read -r who && { read -r which || :; }; } <"$dir/self" &&
      [[ $who == "$owner" ]] || continue
    [[ ${which%.*.*} != "${client%.*.*}" || ${which%.*} == "${client%.*}" ]] || continue
    for ((tries = 0; tries < 100; tries++)); do
      is_runner "$runner" || break
      kill -KILL "${runner%% *}"
      sleep 0.02
    done
  done
} 2>/dev/null

end_jobs() {                # $1: seconds from TERM to KILL, the rest: keys; sets survivors
  local key word value
  end_processes "$@"
  shift
  for key; do
    read_record "$home/jobs/$key"
    [[ $word == running ]] && ! lives "$word" "$value" || continue
    read_record "$home/jobs/$key"       # what ends records that before it is gone
    [[ $word == ended ]] || record_killed "$key"
  done
} 2>/dev/null

record_killed() {           # records the end of the job $1, of which nobody else is left to do so
  local dir=$home/jobs/$1
  echo 'ssh-scheduler: it was killed with its whole process group' >>"$dir/err"
  (list_back "$dir" '' "$dir" .)        # all: what was sent is not known any more
  record "$dir" 'ended 137'
  say_ended "$1" 137 0 0
}

end_processes() {           # end_jobs without a record: ends all that the jobs started
  local until=$((SECONDS + $1)) key signal=TERM tries=0 clear=0 pause=5 seconds
  local -A wrappers=()                  # pid of the run_job of a job -> its key
  local living=()
  shift
  for key; do find_wrapper; done
  # What a job started while it was looked for is found the next time.
  while ((clear < 2 && tries < 40)); do
    living=()
    find_living "$@"
    if ((${#living[@]} == 0)); then
      clear=$((clear + 1))
      continue
    fi
    clear=0
    if ((tries && SECONDS >= until)) && [[ $signal == TERM ]]; then
      signal=KILL
      say_killed
    fi
    if [[ $signal == KILL || $tries == 0 ]]; then
      kill "-$signal" "${living[@]}"
      tries=$((tries + 1))
    fi
    printf -v seconds '0.%02d' "$pause"
    sleep "$seconds"
    pause=$((pause < 30 ? pause + 5 : pause))
  done
  survivors=${living[*]}
} 2>/dev/null

find_wrapper() {            # for end_processes: adds the process that records the end of $key
  local word value
  while read_record "$home/jobs/$key"; [[ $word == starting ]] && is_runner "$value"; do
    sleep 0.02              # it is about to run
  done
  lives "$word" "$value" && wrappers[${value%% *}]=$key
}

say_killed() {              # for end_processes: in the streams of the jobs, before they can end
  local key
  for key in "${wrappers[@]}"; do
    echo 'ssh-scheduler: it did not end when it was told to, and was killed' \
      >>"$home/jobs/$key/err"
  done
}

# Processes are told to end in the order in which they began: a shell that hears of it after its
# child has ended goes on to its next command.  Not with a SIGSTOP first: if the runner died in
# between, they would stand for ever.
find_living() {             # living: the pids of what the jobs $@ started, but not their wrappers
  local pid fields index since=()       # by start time and pid
  local -A parent=() mine=()
  for pid in "${!wrappers[@]}" $(holders "$@"); do mine[$pid]=1; done
  read_processes
  for ((index = 1; index;)); do         # until no more child of theirs is found
    index=0
    for pid in "${!parent[@]}"; do
      [[ ! ${mine[$pid]-} && ${mine[${parent[$pid]}]-} ]] || continue
      mine[$pid]=1 index=1
    done
  done
  for pid in "${since[@]}"; do
    [[ ! ${mine[$pid]-} || ${wrappers[$pid]-} ]] || living+=("$pid")
  done
}

read_processes() {          # for find_living: parent and since of all; mine, if of a job's group
  local pid stat fields
  for stat in /proc/[1-9]*/stat; do
    { IFS= read -r fields <"$stat"; } || continue
    pid=${fields%% *}
    # shellcheck disable=SC2206            # numbers, behind a name with any blanks and brackets
    fields=(${fields##*) })
    [[ ${fields[0]} != Z ]] || { unset -v "mine[$pid]"; continue; }
    [[ $pid != "$BASHPID" ]] || continue
    parent[$pid]=${fields[1]} since[fields[19] << 22 | pid]=$pid
    [[ ! ${wrappers[${fields[2]}]-} ]] || mine[$pid]=1
  done
}

# A process that leaves its session, its parent and its environment still has the FIFO `alive` open,
# since it inherited that.  One that closes all files and clears its environment is not found; only
# control groups could do that.
holders() {                 # prints the pids of what the jobs $@ started
  in_groups holders_of_some "$@" | sort -u
}

holders_of_some() {
  local key pattern tests=() marks=()
  for key; do
    pattern=$home/jobs/$key/alive
    pattern=${pattern//\\/\\\\}
    pattern=${pattern//\[/\\[}
    pattern=${pattern//\*/\\*}
    tests+=(-o -lname "${pattern//\?/\\?}" -print)
    marks+=(-e "SSH_SCHEDULER_ID=$project.$key")
  done
  {
    find /proc/[1-9]*/fd "${tests[@]:1}"
    grep -lzsxF "${marks[@]}" /proc/[1-9]*/environ
  } | while IFS=/ read -r _ _ key _; do printf '%s\n' "$key"; done
} 2>/dev/null

# A program takes 2 MB of arguments: too few for the names of 25,000 jobs.
in_groups() {               # calls $1 with the rest, at most 1,000 at a time
  local call=$1
  shift
  while (($#)); do
    "$call" "${@:1:1000}"
    shift "$(($# < 1000 ? $# : 1000))"
  done
}

# Each process is named, since a bare wait waits for all, and for ever for a <(...) that just ended.
wait_removed() {            # waits until what is being removed is gone
  ((${#removing[@]} == 0)) || wait "${removing[@]}"
  removing=()
}

farewell() {                # removes what came, if no job needs it, though nobody said "finish"
  wait_removed
  give_up_gpus
  if [[ $tied ]] && ((${#begun[@]})); then
    end_jobs 5 "${!begun[@]}"
    (cd -- "$home/jobs" && remove "${!begun[@]}")
  fi
  rmdir -- "$home/jobs"
  [[ -e $home/jobs ]] || tidy "${arrived[@]}"
}

tidy() {                    # removes what is of use to nobody any more; $@: and this
  local dir value others='' gone=("$@" "$run" "${begun[@]}")
  [[ ! -e $home/jobs ]] || rmdir -- "$home/jobs"
  if [[ ! -e $home/jobs ]]; then        # a job that is left may need these files
    for dir in "$home"/run.*; do
      [[ $dir != "$run" ]] || continue
      { read -r value <"$dir/self"; } && ! is_runner "$value" &&
        [[ $dir == */"run.${HOSTNAME:-here}."* ]] && gone+=("$dir") || others=1
    done
    [[ $others ]] || gone+=("$home/stage" "$claims/$project."*)
  fi
  remove "${gone[@]}"
  rmdir -- "$claims" "$home/stage" "$home"
} 2>/dev/null

# What was sent last is kept for the next batch, not for ever.  Results that nobody fetched stay:
# a user may be away for three weeks.
forget_old() {              # removes what other folders' batches left, where that is two weeks old
  local dir entry hex='[0-9a-f][0-9a-f][0-9a-f][0-9a-f]'
  while IFS= read -rd '' dir; do
    # Each run changes the time of its folder.  One that holds anything else is of somebody else.
    [[ -O $dir && -d $dir/cache && $dir != "$home" ]] || continue
    for entry in "$dir"/* "$dir"/cache/*; do
      case ${entry#"$dir/"} in
        cache | cache/copy | cache/link | stage | run.*) ;;
        *) continue 2 ;;
      esac
    done
    remove "$dir"
  done < <(find "${home%/*}" -mindepth 1 -maxdepth 1 -type d -name "*-$hex$hex$hex" \
    -mtime "+$OLD_DAYS" -print0)
} 2>/dev/null

remove() {                  # also what a job has shut
  in_groups remove_some "$@"
}

remove_some() {
  rm -rf -- "$@" || { chmod -R u+rwx -- "$@"; rm -rf -- "$@"; }
} 2>/dev/null

# ---- Channel ----

main() {
  exec {requests}<&0 </dev/null         # nothing else may read what is asked
  read_header || return
  # This comes first, so that the client can tell "bash runs" from "ready".
  printf '\n%s\n' "$token"
  find_home
  end_old_runners
  make_folders || return 0
  open_events
  say_text account "$account"
  look_around
  serve
  start_pending
  farewell
  trap - EXIT
  say bye
}

read_header() {             # fails where the channel was cut
  local field count
  for field in token workdir project owner client setup want_gpus count; do
    IFS= read -rd '' -u "$requests" "$field" || return
  done
  while ((count-- > 0)); do
    IFS= read -rd '' -u "$requests" field || return
    machine_environment+=("$field")
  done
}

find_home() {               # sets where things are, and who this is
  local field
  # A container may have better numbers elsewhere; and so have the machines of the tests.
  proc=${SSH_SCHEDULER_PROC:-/proc} sys=${SSH_SCHEDULER_SYS:-/sys}
  shared=${SSH_SCHEDULER_SHARED:-/dev/shm}
  workdir=${workdir:-'~/.ssh_scheduler'}
  # shellcheck disable=SC2088            # the ~ that a machine file may begin its workdir with
  [[ $workdir != '~' && $workdir != '~/'* ]] || workdir=$HOME${workdir#'~'}
  home=$workdir/$project
  { IFS= read -r HOSTNAME <"/proc/sys/kernel/hostname"; } 2>/dev/null   # it may come from elsewhere
  while read -r field uid _ && [[ $field != Uid: ]]; do :; done </proc/self/status
  run=$home/run.${HOSTNAME:-here}.$$.$RANDOM$RANDOM     # pids begin anew after a restart
  mask=$(umask)
  umask 077
  { IFS= read -r boot_id <"$proc/sys/kernel/random/boot_id"; } 2>/dev/null
  boot_id=${boot_id:-$NO_BOOT_ID}
  identify "$$"
  self=$REPLY
}

# The client compares the accounts of its machines: to look for living runners here would miss two
# that run one after the other.
make_folders() {            # sets account and claims; says why, and fails, where that cannot be
  local said
  if ! said=$({ mkdir -p -- "$home/stage" "$home/jobs" "$run" &&
    mkfifo -- "$run/events" "$run/signals" && echo 'for no known reason' >"$run/log" &&
    { stat -L -c %d.%i -- "${home%/*}" /proc/self/ns/pid 2>/dev/null || :; }; } 2>&1); then
    said=${said##*$'\n'}
    if [[ $said == *fork:* ]]; then no_process; else explain_full "cannot write there: $said"; fi
    escape "$REPLY"
    printf 'broken\t%s\n' "$REPLY"
    return 1
  fi
  account="${HOSTNAME-} $boot_id $uid $said"
  [[ -w $shared ]] || shared=/tmp
  claims=$shared/ssh_scheduler.$uid
  own_claims
}

open_events() {             # from now on all is said through `writer`, and complaints go to the log
  exec {events}<>"$run/events" {signals}<>"$run/signals"
  printf '%s\n%s\n%s\n' "$self" "$owner" "$client" >"$run/self"
  set -m                    # every background process in a process group of its own
  # The writer does not hold its own pipe open: so it ends when nobody is left who could say
  # something.
  writer <"$run/events" 2>>"$run/log" {events}>&- {signals}>&- {requests}<&- &
  disown "$!"
  exec >/dev/null 2>>"$run/log"
  trap last_words EXIT
  shopt -s nullglob dotglob
}

writer() {                  # the only writer to the channel; reads from stdin what was said
  local line file size ready=
  while IFS= read -r line; do
    case $line in
      bulk$'\t'*)           # bulk FILE WHAT...: the file's bytes, behind their number
        printf %s "$ready"
        ready=
        line=${line#*$'\t'}
        file=${line%%$'\t'*}
        {                   # opened first: it may be removed at any moment
          size=$(stat -L -c %s /dev/stdin) && printf 'data\t%s\t%s\n' "$size" "${line#*$'\t'}" &&
            cat
        } <"$file"
        rm -f -- "$file" ;;
      bye) break ;;
      *)                    # what was said in one go crosses the network in one go
        ready+=$line$'\n'
        if ((${#ready} > 8000)) || ! read -r -t 0; then
          printf %s "$ready"
          ready=
        fi ;;
    esac
  done
  printf %s "$ready"
}

# Where bash cannot fork, it tries for 15 s and then ends.  It runs nothing more but its exit trap.
last_words() {              # says why the runner ends, and which jobs it did not begin
  local key
  [[ -e $run ]] || return 0
  ! complaint || return 0
  for key in "${!unbegun[@]}"; do
    : >"$claims/$project.$key"
    say_text refused "$key" "$REPLY"
  done
  say_text broken "$REPLY" later
}

look_around() {             # begins what takes long, before anybody asks for it
  read_ticks
  busy_before=$busy total_before=$total
  { capture_login; echo environment >&"$signals"; } {events}>&- {requests}<&- &
  capturing=$!
  disown "$!"
  waiting=1
  [[ $want_gpus == 1 ]] || return
  { query_gpus; echo gpus >&"$signals"; } {events}>&- {requests}<&- &
  disown "$!"
  waiting=2
}

serve() {                   # does what is asked for, until the channel ends
  local verb fields
  while :; do
    # Starts that came together share two processes, which make their folders.
    if ((${#pending[@]})) && ! read -r -t 0 -u "$requests"; then start_pending; fi
    read_request || return
    if declare -F "do_$verb"; then      # stdout is /dev/null
      "do_$verb" "${fields[@]}"
    else
      say_text broken "unknown request: $verb"
    fi
  done
}

read_request() {            # verb and fields: the next request; fails where it was cut off
  local count field
  fields=()
  IFS= read -rd '' -u "$requests" verb && IFS= read -rd '' -u "$requests" count || return
  while ((count-- > 0)); do
    IFS= read -rd '' -u "$requests" field || return
    fields+=("$field")
  done
}

do_probe() { probe measure; }

do_enter() { probe ''; }

do_tie() { tied=1; }

do_measure() { beside measure_again "$1"; }

do_limits() { limits=("$@"); }

do_unpack() {               # STAGE BYTES, and that many bytes of tar follow
  arrived+=("$home/stage/$1")
  mkdir -p -- "$home/stage/$1"
  # What is left of an archive that could not be unpacked must not be taken for requests.
  head -c "$2" <&"$requests" |
    { tar -xpo -f - -C "$home/stage/$1" || { cat >/dev/null; false; }; } ||
    say_unstored "$1"
}

do_folder() {               # PATH below the project's folder, which rsync will fill
  arrived+=("$home/${1%/*}")
  mkdir -p -- "$home/$1"
}

do_unsent() {               # WHY a folder could not be filled
  explain_full "$1"
  say_text broken "$REPLY"
}

do_freeze() { freeze "$@"; }

do_start() {                # KEY STAGE GPUS NEED MODE LIMIT COMMAND BACK PATH...
  pending+=("$1")
  stage_of[$1]=$2 gpus_of[$1]=$3 need_of[$1]=$4 mode_of[$1]=$5 limit_of[$1]=$6 command_of[$1]=$7
  back_of[$1]=$8
  REPLY=
  (($# == 8)) || printf -v REPLY '%q ' "${@:9}"
  paths_of[$1]=$REPLY
}

do_cancel() {               # SECONDS KEY...
  start_pending             # one of them may have come just now
  beside cancel "$@"
}

cancel() {
  end_jobs "$@"
  say "cancelled"$'\t'"$survivors"
}

do_adopt() {                # KEY...
  local key
  for key; do beside revoke_or_ask "$key"; done
}

# A job that may have been started is begun here before it is asked about.  If that succeeds, it
# never began and never will, and the client places it again as a new attempt.
revoke_or_ask() {
  if revoke "$1"; then say "absent"$'\t'"$1"; else ask_about "$1"; fi
}

do_revoke() {               # KEY...
  revoke_all "$@" &
  removing+=("$!")
}

revoke_all() {
  local key
  for key; do revoke "$key"; done
  end_processes 5 "$@"
  cd -- "$home/jobs" && remove "$@"
}

do_others() { beside list_others "$1"; }

do_ping() { say "pong"$'\t'"$1"; }

do_eof() {                  # KEY
  [[ ! -p $home/jobs/$1/eof ]] || echo 1<>"$home/jobs/$1/eof"
}

do_watch() { beside look "$@"; }

do_list() {                 # KEY
  find_list "$1"
  send_list "$1" "$REPLY"
}

do_again() { beside list_again "$@"; }

do_clean() {                # KEY...
  local key gone=("$@")
  for key; do gone+=("$claims/$project.$key"{,.back}); done
  (cd -- "$home/jobs" && remove "${gone[@]}") &
  removing+=("$!")
}

do_finish() {               # STAGE that becomes the cache, or "", STAGE... to remove
  local kept=$1
  shift
  give_up_gpus
  wait_removed
  if [[ $kept ]]; then
    mv -T -- "$home/cache" "$run/cache"
    mv -T -- "$home/stage/$kept" "$home/cache"
  fi
  tidy "${@/#/$home/stage/}"
  begun=()                  # what lies there now is kept
  say finished
  forget_old
}

main
'''

# Runs there, beside a job: says the rest of its streams, and what they grow by, while we listen.
REMOTE_FOLLOW = REMOTE_CLEAN + r'''
main() {                    # stdin: token, folder of the job, known bytes of out and of err
  local token dir out err
  IFS= read -rd '' token && IFS= read -rd '' dir && IFS= read -rd '' out && IFS= read -rd '' err ||
    return
  printf '\n%s\n' "$token"
  printf '\n%s\n' "$token" >&2
  until [[ -e $dir/out && -e $dir/err ]]; do    # they come when its files were copied
    read -r -t 0.02
    (($? > 128)) || return
  done
  tail -c "+$((out + 1))" -s 0.1 -f -- "$dir/out" </dev/null 2>/dev/null &
  tail -c "+$((err + 1))" -s 0.1 -f -- "$dir/err" </dev/null >&2 2>/dev/null &
  read -r
  kill %1 %2
}
set -m
main
'''

# Runs there, beside a job: takes what comes for its standard input.
REMOTE_FEED = REMOTE_CLEAN + r'''
main() {                    # stdin: folder of the job, then its input
  local dir
  IFS= read -rd '' dir || return
  until [[ -p $dir/in ]]; do
    [[ -e $dir ]] || return
    sleep 0.02
  done
  # Opened for both it does not block; then this side is closed, so that it is told when none reads.
  exec {both}<>"$dir/in"
  exec 1>"/dev/fd/$both" {both}<&-
  exec cat
}
main
'''

# Runs there, for one copy: takes a tar archive from stdin, or gives one of the paths on stdin.
REMOTE_UNPACK = REMOTE_CLEAN + r'''
main() {                    # stdin: token, folder, tar
  local token folder
  IFS= read -rd '' token && IFS= read -rd '' folder || return
  mkdir -p -- "$folder" && tar -xpo -f - -C "$folder"
  printf '\n%s %s\n' "$token" "$?"
}
main
'''
REMOTE_PACK = REMOTE_CLEAN + r'''
main() {                    # stdin: token, folder, paths that end with NUL
  local token folder
  IFS= read -rd '' token && IFS= read -rd '' folder || return
  printf '\n%s\n' "$token"
  exec tar -c -f - --format=posix --pax-option=delete=atime,delete=ctime --hard-dereference \
    -C "$folder" --null --no-recursion -T -
}
main
'''


if __name__ == '__main__':
    main()
