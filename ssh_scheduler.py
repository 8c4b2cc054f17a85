#!/usr/bin/env python3
# ssh-scheduler: https://github.com/benblack769/ssh-scheduler.  MIT licence, see LICENSE.
# /// script
# requires-python = ">=3.9"
# dependencies = ["PyYAML", "docopt-ng", "rich"]
# ///
"""Run many commands on a handful of machines that can be reached with ssh.

            here                                            on each machine

     usage, files --> jobs, machines, policy
                          |
      View <--changed--- Run <--> Scheduler       REMOTE_RUNNER (bash), one for each contact
                          |  ^                       |  asks workers, watches and ends
                   start  |  | changed               v
                          v  |        requests     jobs, each in a process group of its own,
     Journal <--move-- Worker ----- Contact ---->  with their streams in files
     ResultStore          |       <---- events           |
          ^               +-- flows: rsync, tar, follow <+
          +---------------------------+

Each contact is ONE ssh.  It is the master connection that copies share, and its standard streams
are the channel: requests go down to a bash program that the client sends (REMOTE_RUNNER), events
come up.  So the number of ssh processes does not grow with the number of jobs, and a batch costs
one login on each machine.  Jobs do not depend on the channel.  When this program dies, the channel
closes and the remote runner exits, but the jobs keep running and write their exit status to a file.

An Attempt is one start of a job on a machine.  The table LIFE has its states.  Only Lives.move
changes the state: it asserts the order, and writes the journal before it calls anything else.

     waiting -> placed -> claimed -> running -> ended -> collected   its files there are deleted
                  |          |          |         +----> kept        results could not be fetched
                  v          +----------+
               returned                 +-> refused, held, absent    it never began, for certain
                                        +-> lost, preempted     gone, for certain, without a result
                                        +-> abandoned   no contact for too long (--lost-after)
                                        +-> stopping -> stopped -> cancelled    told to stop
                                                    +-> dropped     told to stop, unconfirmed

At a cluster an attempt is `queued` between claimed and running, in the queue of its engine.
After returned, refused, held, absent, lost, preempted or abandoned the job may wait again, as a new
Attempt.

The promises, and the functions that keep them:

    A job runs at most once.  The journal is on the disk before the start is sent (Lives.move,
    Journal.sync), and on the machine a job begins by creating its file, which succeeds only once
    (take).
    A rerun, a reconnect and an attach work in the same way.  At contact, the client asks the
    machine about each attempt that is claimed or running there (JobControl.ask).  The same request
    revokes a start that has not arrived: that attempt never begins.  A folder that was moved finds
    its jobs, since the journal has the name of their folder on machines (Origin, project_of).
    A result replaces nothing.  It arrives in a folder of its own, and appears by one rename
    (ResultStore.commit).  Only then may the original be deleted (Collector.clean).
    The processes and flows of a contact stop with the contact (Flows.close).  A reconnect makes a
    new Contact.
    The client acts once on a request of another command.  It writes the effect and then the id to
    the journal before it answers (Desk.look, Inbox.answer).
    Results belong to the command and the files that made them.  A line of a batch file is looked
    up by its command (match_lines), and the key of a job on a machine, NAME.ATTEMPT-IDENTITY,
    names the journal that claimed it.  Sent files are kept at the time of sending (Keeper, Sent),
    and checked against their digests before they are sent again (Rebuilt).

Only Processes starts and waits for processes, in one thread.  Only Report prints.  Programs for a
shell on a machine are constants: BOOTSTRAP in Connection, the programs at the end of the file.
Everything else is sent as data, between NULs.  A section uses only names defined above it, except
for those programs.

    The promise    Usage, Errors
    The heart      Records, Life, Resources, Scheduler, Run
    What is seen   Phrases, Report, Lines, Views, Status
    The edges      Completion, Options, Machine files, Batch files, Files to send, Archives, Probe
    The work       Results, Processes, Job log, Hooks, Wire, Connection, Client, Copies, Contact,
                   Results on their way, Worker, Visits, As a library, Requests, Past
    The commands   Commands
    On a machine   The remote runner, which opens with the files of a job, requests and events

As a library: MachineResources and MachineRunner keep their documented methods; everything else may
change.  Importing has no effect: nothing is read, printed or started.
"""
import bisect
import codecs
import collections
import collections.abc
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

__version__ = '0.2.0'
LINUX = sys.platform == 'linux'     # then jobs can run here, too; WSL counts as Linux


# ---- Usage: docopt parses these texts; every default is in them ----

MACHINE_OPTIONS = """\
Machines:
  --machines=<machine>...       Each is a machine file (as given, with .yaml, or
                                in ~/.local/var/), a name from ~/.ssh/config,
                                user@host[:port], localhost, or @file: a file
                                that has one of these on each line.
"""

HARDWARE_OPTIONS = """\
Hardware that each job needs:
  --num-cpus=<cores>            Processor cores [default: 1].
  --memory-required=<size>      Memory: 8G, 500M, or a number of MB
                                [default: 2000].
  --reserve                     A whole machine.
  --no-gpu-required             No GPU.
  --num-gpus=<number>           GPUs, all on one machine [default: 1].
  --gpu-memory-required=<size>  Memory on each GPU: 8G, 500M, or a number of MB
                                [default: 1000].
  --gpu-utilization=<share>     Share of a GPU's time that must be free for the
                                job, up to 1 [default: 0.75].
  --no-reserve-gpu              Jobs may share a GPU, as far as its memory and
                                time suffice.
"""

FILE_OPTIONS = """\
Files:
  --copy-forwards=<path>...     Send these files and folders; by default the
                                current folder, since most commands need files
                                of it. Never .git and job_results. Without a
                                path: send nothing.
  --link-forwards=<path>...     Send data that jobs only read, such as data
                                sets: once to each machine, linked into the
                                folder of each job, never fetched.
  --exclude=<pattern>...        Do not send files that match these patterns of
                                rsync. The rules of .rsync-filter files apply,
                                too.
  --copy-backwards=<path>...    Fetch these files of each job, or those that a
                                pattern such as '*.csv' matches. By default:
                                those that the job made or changed in its
                                folder. A dot fetches all files. Without a path:
                                fetch nothing.
  --keep-files=<size>           Keep copies of the sent files in job_results,
                                the smallest first, up to this size in all. With
                                them execute_batch can reproduce a job
                                [default: 20].
"""

# How to write a size and a time in the options of all commands; see size_mb and seconds.
UNITS = """\
  A size is a number of MB, or has a unit: 500M, 8G, 1T. G is 1024 MB.
  A time is a number of seconds, or has units: 90s, 10m, 2h, 1h30m, 1d.
"""

COMMON_OPTIONS = """\
  --verbose                     Show each command and each event, on stderr.
  -h --help                     Show this help.
  --version                     Show the version.
  --completion=<shell>          Print the script by which bash, zsh or fish
                                completes this command; the shell reads it at
                                its start.
"""

EXECUTE_BATCH_USAGE = """\
Run each line of a batch file on one of many machines.

Usage:
  execute_batch [options] [--machines=<machine>]... [--copy-forwards=<path>]...
                [--link-forwards=<path>]... [--exclude=<pattern>]...
                [--copy-backwards=<path>]... [--sync-back=<path>]...
                [--watch=<time>]... [--cancel=<job>]... [--rerun=<job>]...
                [--drop-machine=<machine>]... [--]
                (<batch> | [<batch>] --what=<job> | [<batch>] --reproduce=<job>
                 | --earlier=<action> | --check)
  execute_batch --help | --version | --completion=<shell>

  <batch> is a file with one bash command on each line; - is the standard input.
  Results are in ./job_results. An option with several values takes all words up
  to the next option or up to --; the last word is <batch> if that is missing.
{units}
{machines}
{hardware}
{files}
From any terminal, while the batch runs or later. A job is its number in the
batch, 57, or its whole name:
  --status                      Show state, machine, time and last line of each
                                job. This connects to no machine.
  --failed                      With --status: show only jobs that failed.
  --running                     With --status: show only jobs on a machine.
  --waiting                     With --status: show only jobs that wait.
  --watch=<time>...             With --status: show it again at this interval, 5
                                seconds by default, until all jobs have ended.
                                With --report: write it at this interval.
  --json                        With --status: print one JSON object for each
                                job, on a line of its own. With --check: one for
                                each machine.
  --follow=<job>                Show what a job prints, from beginning to end;
                                exit with its exit code. Ctrl-C stops watching.
  --cancel=<job>...             Cancel these jobs, whether they run or wait.
                                Without a name: all jobs of the batch.
  --rerun=<job>...              Run these jobs again. Their earlier results are
                                kept: those of batch.sh.57 as batch.sh.57~1.
  --rerun-failed                Run all failed jobs again, in the same way.
  --wait                        Wait until the batch that runs has ended; exit
                                with its exit code.
  --drop-machine=<machine>...   Start no more jobs on these machines.
  --now                         With --drop-machine: stop the jobs of these
                                machines, and start them on other machines.
The same command again, with other lines or --machines, changes the batch that
runs: new lines wait, deleted lines do not start, new machines join.

Later, also without the batch file:
  --what=<job>                  Show how a job ran: its command, files, git
                                commit, machine and times.
  --reproduce=<job>             Run a job once more, with the files that it had
                                then, as <job>-again; by default on the same
                                machine. Then show all differences.
  --earlier=<action>            For jobs that an earlier job_results of this
                                folder left on the machines. show: list them.
                                collect: fetch the results of those that have
                                ended, under new names. remove: stop them and
                                delete their files.

Before the first batch, and when a machine cannot be used:
  --check                       Check the machines and print each fact, each
                                error and what to type: machine file, login,
                                programs, disk, GPUs, clock. On a cluster, run a
                                short job. Needs no <batch>.

Other:
  --dry-run                     Show which job would start on which machine;
                                start nothing.
  --timeout=<time>              Stop a job that runs longer than this; it counts
                                as failed (exit 124).
  --halt-after=<number>         Start no more jobs after this number of failed
                                jobs.
  --retries=<number>            Start a job again, at most this number of times,
                                if its machine was restarted or lost the job
                                [default: 1].
  --away-limit=<time>           Try to reconnect to a lost machine for this
                                time. Then give up: its jobs keep running, and
                                the next run of the same command collects them
                                [default: 600].
  --lost-after=<time>           Start the jobs of a machine on other machines
                                after this time without a connection. When the
                                machine is back, stop its old jobs. By default:
                                wait for the machine.
  --max-result-size=<size>      Fetch no files of a job that are larger than
                                this in all; they stay on the machine, and the
                                same command without this option fetches them.
                                By default only the free space here is the
                                limit.
  --cluster-after=<time>        Send a job to a cluster when no other machine
                                has had room for the job for this time
                                [default: 30].
  --sync-back=<path>...         While jobs run, fetch these files and folders of
                                their folders again and again, to
                                job_results/<job>.partial. When the results
                                arrive, that folder is removed.
  --every=<time>                With --sync-back: fetch at this interval
                                [default: 60].
  --nice=<number>               Niceness of the jobs, 0 to 19 [default: 10]: the
                                programs of people at the machine come first.
  --no-live                     Check the free cores, memory and GPUs only once,
                                at the start, not again while jobs wait.
  --report=<file>               Write an HTML page on all results when the batch
                                has ended; with --watch=<time> also at that
                                interval while the batch runs. A good place is
                                job_results/report.html.

For other programs:
  --joblog=<file>               Append a line for each job that ends, with tabs:
                                the columns of GNU parallel's joblog, then Name,
                                GPUs, PeakMemoryMB, PeakGPUMemoryMB, Attempt.
  --on-finish=<command>         Run this bash command on this computer when the
                                batch has ended, also after Ctrl-C. Variables
                                such as $SSH_SCHEDULER_FAILED have the numbers
                                of jobs: see docs/watching.md.
  --on-failure=<command>        Run this bash command on this computer when the
                                first job has failed. $SSH_SCHEDULER_STDERR is
                                the file with the errors of the job.
{common}
Exit code: 0 all jobs succeeded, 1 some failed or a machine file is wrong,
2 wrong usage or configuration, 130 interrupted.

Example:
  execute_batch batch.sh --machines lab1 lab2 --memory-required 8G --timeout 2h
""".format(units=UNITS, machines=MACHINE_OPTIONS, hardware=HARDWARE_OPTIONS, files=FILE_OPTIONS,
           common=COMMON_OPTIONS)

EXECUTE_REMOTE_USAGE = """\
Run one command on one machine, as if it ran here.

Usage:
  execute_remote [options] [--copy-forwards=<path>]...
                 [--link-forwards=<path>]... [--exclude=<pattern>]...
                 [--copy-backwards=<path>]... [--forward=<port>]... [--]
                 <command>
  execute_remote [options] [--forward=<port>]...
                 (--attach=<name> | --cancel=<name> | --shell=<name>)
  execute_remote --help | --version | --completion=<shell>

  <command> is a bash command in quotes. execute_remote shows its output and
  exits with its exit code. Ctrl-C stops the command with all processes that it
  started; if the connection is lost, the command keeps running (not with
  --tty). Results are in ./job_results, under the name of the job. A line of a
  batch file may be such a command, too, for a job with other files, another
  name or other hardware than the rest of the batch. An option with several
  values takes all words up to the next option or up to --; the last word is
  <command> if that is missing.
{units}
The job:
  --machine=<machine>           A machine file (as given, with .yaml, or in
                                ~/.local/var/), a name from ~/.ssh/config,
                                user@host[:port], localhost, or @file: a file
                                with one of these. Ignored in a batch file.
  --job-name=<name>             The name of the job and of its results; by
                                default a short name made of the command. While
                                the job runs, the same command with the same
                                name attaches to it; later it shows the results.
  --stdin                       Send the standard input of execute_remote to the
                                command. By default its input is empty.
  --tty                         Connect the command to this terminal. Its output
                                is not kept.
  --detach                      Start the job, print its name, and do not wait.
  --attach=<name>               Show the output of a job that runs, from the
                                beginning. Ctrl-C stops watching; the job keeps
                                running.
  --cancel=<name>               Stop a job that runs, with all its processes. A
                                name is needed: a folder may have many such
                                jobs.
  --shell=<name>                Open a shell beside a job that runs, also of a
                                batch: bash in the folder of the job, with its
                                environment and GPUs. The shell does not belong
                                to the job. Without a terminal bash runs the
                                commands on stdin.
  --forward=<port>...           Forward a port of localhost here to the same
                                port of the machine, until execute_remote ends;
                                8888:6006 forwards port 8888 to its port 6006.

{hardware}
With any of these options the job waits until there is room, and has GPUs of its
own. Without them the job starts at once, and CUDA_VISIBLE_DEVICES is not set.

{files}
Other:
  --timeout=<time>              Stop a job that runs longer than this; its exit
                                code is 124.
  --away-limit=<time>           Try to reconnect to a lost machine for this time
                                [default: 600].
  --nice=<number>               Niceness of the command, 0 to 19 [default: 0].
                                Lower than in a batch: a person waits for this
                                command.
{common}
Exit code: that of the command; 125 the machine could not be reached, or the
connection was lost; 2 wrong usage or configuration; 130 interrupted.

Example:
  execute_remote --machine lab1 --job-name try1 'python3 train.py lr=0.1'
""".format(units=UNITS, hardware=HARDWARE_OPTIONS, files=FILE_OPTIONS, common=COMMON_OPTIONS)

EXECUTE_TO_USAGE = """\
Run one command on many machines, on all at the same time.

Usage:
  execute_to [options] [--machines=<machine>]... [--copy-forwards=<path>]...
             [--link-forwards=<path>]... [--exclude=<pattern>]...
             [--copy-backwards=<path>]... [--]
             (<command> | --init=<host>)
  execute_to --help | --version | --completion=<shell>

  <command> is a bash command in quotes. Ctrl-C stops it on all machines, so
  there is nothing to cancel later. An option with several values takes all
  words up to the next option or up to --; the last word is <command> if that is
  missing.
{units}
{machines}
Output:
  --gather                      Wait for all machines. Then print equal outputs
                                once, below the names of the machines.
  --diff                        Like --gather, but print other outputs as their
                                differences from the first.

Files; by default none, since most such commands are for the machine itself:
  --copy-forwards=<path>...     Send these files and folders.
  --link-forwards=<path>...     Send data that the command only reads: once to
                                each machine.
  --exclude=<pattern>...        Do not send files that match these patterns of
                                rsync. The rules of .rsync-filter files apply,
                                too.
  --copy-backwards=<path>...    Fetch these files, to
                                ./job_results/<name>_<machine>.
  --job-name=<name>             The name of the results.

Other:
  --fanout=<number>             Connect to at most this number of machines at a
                                time [default: 64].
  --timeout=<time>              Give up a machine that takes longer than this,
                                login included: no machine delays the others.
  --nice=<number>               Niceness of the command, 0 to 19 [default: 0].
                                Lower than in a batch: a person waits for this
                                command.
  --init=<host>                 Log in to a host, [user@]host[:port] or a name
                                from ~/.ssh/config, and write a machine file for
                                it to ~/.local/var/. Never replaces a file.
{common}
Exit code: 0 all succeeded, 1 some failed or could not be reached, 2 wrong usage
or configuration, 130 interrupted.

Example:
  execute_to --machines lab1 lab2 --gather -- 'nvidia-smi -L'
""".format(units=UNITS, machines=MACHINE_OPTIONS, common=COMMON_OPTIONS)

QUERY_MACHINES_USAGE = """\
Show the free resources of machines, and who uses them.

Usage:
  query_machines [options] [--machines=<machine>]... [--watch=<time>]...
  query_machines --help | --version | --completion=<shell>

  An option with several values takes all words up to the next option.
{units}
{machines}
{hardware}
With any of these options query_machines shows how many such jobs would fit now.

Other:
  --watch=<time>...             Show it again at this interval, 5 seconds by
                                default, until Ctrl-C.
  --json                        Print one JSON object for each machine, on a
                                line of its own.
{common}
Exit code: 0 all machines answered, 1 some did not, 2 wrong usage or
configuration.

Example:
  query_machines --machines lab1 lab2 --gpu-memory-required 8G
""".format(units=UNITS, machines=MACHINE_OPTIONS, hardware=HARDWARE_OPTIONS, common=COMMON_OPTIONS)

OVERVIEW = """\
Run many commands on a handful of machines that can be reached with ssh.

Usage: ssh_scheduler.py <command> <options and words of the command>...
<command> is one of
{commands}

ssh_scheduler.py <command> --help shows the options of a command. A link to
ssh_scheduler.py with the name of a command runs that command.

Example:
  ssh_scheduler.py execute_batch batch.sh --machines lab1 lab2
""".format(commands='\n'.join(
    f'  {usage.partition("Usage:")[2].split()[0]:14}  {usage.partition(chr(10))[0]}' for usage in (
        EXECUTE_BATCH_USAGE, EXECUTE_REMOTE_USAGE, EXECUTE_TO_USAGE, QUERY_MACHINES_USAGE)))


# ---- Errors: sentences that tell what to do, and the functions that write sentences ----

TRANSPORT_FAILED = 125      # as docker, timeout and env return when they fail themselves


class SchedulerError(Exception):
    """An error that a user can cause; main prints it without a traceback."""
    exit_code = 2


class HelpAsked(Exception):
    """The command line asks for help or the version: main prints the text and exits."""


class UsageError(SchedulerError):
    """The command line is wrong."""
    guess = ''      # what to type in place of a wrong word, unless it belongs to a command

    def __init__(self, text, usage=''):
        super().__init__(text)
        self.usage = usage              # the text that says how to write the command line


class WordMissing(UsageError):
    """A word is missing that the usage text has, such as <batch>."""


class MachineFileError(SchedulerError):
    """A machine is described wrongly, or not at all."""


class KeyFileError(MachineFileError):
    """ssh could not use the private key that a machine's file names."""


class BatchFileError(SchedulerError):
    """The batch file cannot be used."""


class WrongLines(BatchFileError):
    """Lines of the batch file are wrong."""

    def __init__(self, complaints, jobs=()):
        """Take [(number of the first line, sentence)], and the Jobs of the other lines."""
        self.complaints, self.jobs = sorted(complaints), jobs
        super().__init__(first_of([text for _, text in self.complaints]))


class FilesError(SchedulerError):
    """A path to send or to fetch cannot be used."""


class ResultsError(SchedulerError):
    """The folder job_results cannot be used."""


class FolderInUse(ResultsError):
    """Another client uses the folder job_results."""


class DoesNotFit(SchedulerError):
    """A job asks for more than the machine has free."""


class Unreachable(SchedulerError):
    """There is no contact with a machine."""
    exit_code = TRANSPORT_FAILED


def nearest(word, known):
    """Return ' (did you mean X?)' with the known words that this one may mean, or ''.

    The word may be the beginning of a known one, have typing errors, or name its parts in another
    order.
    """
    import difflib

    def parts(text):
        return re.findall('[^-_]+', text.lower())

    typed, found = ''.join(parts(word)), {}

    def opposite(other):
        """Tell whether only one of the two words negates: --no-x never stands for x."""
        if 'no' in parts(other):
            return not typed.startswith('no')
        # A word that begins with no may be a typing error: noce for nice.
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
    """Return a module from outside the standard library; the error says how to install it."""
    import importlib
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise SchedulerError(
            f'{sys.executable} has no module {name}. Try: {sys.executable} -m pip install '
            f'docopt-ng PyYAML rich, or use uv, which finds them by itself: uv run {__file__} '
            '<command> …') from None


def sentence(text):
    """Return the text with exactly one mark at its end: a full stop, or its own ? or !.

    A reason at its end may be another program's text, with a full stop or without.  A text with
    'Try: ' ends with a command to type and gets no mark.
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
    """Return the system's text of an error, as 'No space left on device', without numbers."""
    return error.strerror or str(error)


def complaint_line(text, index=0):
    """Return the most useful line of a program's errors: the first, not rsync's summary."""
    lines = [line for line in text.splitlines() if line.strip()
             and not line.startswith('--link-dest arg does not exist')]     # harmless
    return printable(lines[index].strip())[:300] if lines else ''


def count_of(number, noun):
    """Return '1 file', '2 files', '3 processes'."""
    return f'{number:,} {noun}' + ('' if number == 1 else 'es' if noun.endswith('s') else 's')


def names_of(names):
    """Return 'a', 'a, b' or 'a and 5 more': for a line on the screen."""
    return ', '.join(names) if len(names) < 4 else f'{names[0]} and {len(names) - 1} more'


def first_of(complaints, most=5):
    """Return the first of many complaints, each on its own line, and how many lines follow."""
    more = [f'and {count_of(len(complaints) - most, "more line")}.'] * (len(complaints) > most)
    return '\n'.join([*complaints[:most], *more])


def size_of(size):
    """Return a number of bytes as people read it: 512 bytes, 3.4 MB."""
    for unit in ('bytes', 'kB', 'MB', 'GB', 'TB'):
        if size < 1000 or unit == 'TB':
            return f'{size:.0f} {unit}' if unit == 'bytes' else f'{size:.1f} {unit}'
        size /= 1000


# ---- Records: frozen ----

USER = re.compile(r'[\w.+][\w.+@-]*')   # safe in the shell of a ProxyCommand that has %r
JUMP = re.compile(rf'({USER.pattern}@)?([A-Za-z0-9_][A-Za-z0-9._-]*|\[[0-9a-fA-F:.]+\])(:[0-9]+)?')
# Machines with the same host are different machines if these options differ.
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
    workdir: str = ''               # the folder of jobs on it; ~/.ssh_scheduler by default
    setup: str = ''                 # bash, run once per connection; jobs get its exports
    env: tuple = ()                 # pairs (name, value)
    wrap: str = ''                  # words of bash put before each job; see check_wrap
    gpus: Optional[tuple] = None    # the indices that may be used; None: all
    max_jobs: Optional[int] = None
    engine: str = ''                # slurm, if the machine is the login node of a cluster
    engine_options: tuple = ()      # words for the engine's command
    gpu_types: Optional[tuple] = None       # pairs (MB of one, name), the smallest first
    node_folder: str = ''           # for the folders of jobs on a node; '' for the workdir
    word: str = ''                  # from the command line: find_machine finds this machine by it

    @property
    def address(self):
        """The account, as the journal has it: user@host:port with jumps and proxy; or localhost."""
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

        Empty if there are none, or if one cannot be parsed: then ssh reports the error.
        """
        matches = [JUMP.fullmatch(part) for part in self.jump.split(',')]
        if not all(matches) or self.jump.lower() == 'none':
            return []
        return [((match[1] or '')[:-1], match[2], (match[3] or '')[1:]) for match in matches]


class Gpu(NamedTuple):
    """One GPU as a probe found it.  utilization is the share of its time that is used, 0 to 1."""
    index: int                      # as in nvidia-smi, in the order of the PCI bus
    memory_mb: int                  # free
    utilization: float = 0.0
    total_memory_mb: int = 0
    uuid: str = ''
    name: str = ''
    others: int = 0                 # processes on it that do not belong to this batch
    users: tuple = ()               # the owners of those processes
    batch_jobs: int = 0             # jobs of other batches that were placed on it
    reserved: bool = False          # one of those jobs has the GPU to itself
    exclusive: bool = False         # one process at a time (compute mode Exclusive_Process)
    unified: bool = False           # it shares the memory of the machine
    hidden: bool = False            # nvidia-smi does not tell what each process uses of it


class Queue(NamedTuple):
    """Which jobs the engine of a cluster accepts, and its state."""
    engine: str                     # its name and version
    max_jobs: int                   # the most jobs of this batch in its queue
    gpu_types: Optional[tuple] = None       # as in Machine
    refusals: tuple = ()            # pairs (result of `cluster_need`, why it refuses such jobs)
    partitions: tuple = ()          # Partition records
    own_jobs: tuple = (0, 0)        # of this account: (running, waiting)


# States of sinfo(1) in which a node begins no job, until an administrator or Slurm changes that.
OUT_STATES = ('down', 'drain', 'drained', 'draining', 'fail', 'failing', 'error', 'inval', 'maint',
              'unknown')


class Partition(NamedTuple):
    """The nodes of one partition of a cluster that are in one state."""
    name: str
    is_up: bool
    nodes: int
    state: str                      # of these nodes: idle, mixed, allocated, down, …
    idle_cores: int
    cores: int                      # in all
    gpus: str                       # of each node, as the engine writes it; '' for none
    is_default: bool = False
    reason: str = ''                # why an administrator, or the engine, took these nodes out

    @property
    def is_out(self):
        """Tell whether these nodes begin no jobs now; a node that sleeps to save power does."""
        return self.state in OUT_STATES

    @property
    def gpu_types(self):
        """The types of the GPUs of each node: gpu:a100:4(S:0-1),gpu:2 has the type a100."""
        words = [word.split(':') for word in re.sub(r'\([^)]*\)', '', self.gpus).split(',')]
        return [word[1] for word in words if word[0] == 'gpu' and (
            len(word) > 2 or len(word) == 2 and not re.fullmatch('[0-9]+[KMG]?', word[1]))]


class Capacity(NamedTuple):
    """A machine's resources: the totals, and what would be free without jobs of this batch.

    A probe takes the free resources, adds what this batch's jobs use, at most what they requested,
    and subtracts what other batches need.  MachineResources subtracts what it promised to this
    batch's jobs.  So each job of this batch is subtracted exactly once.
    """
    cores: float
    memory_mb: int
    gpus: tuple = ()
    total_cores: float = 0.0
    total_memory_mb: int = 0
    max_jobs: Optional[int] = None
    gpu_trouble: str = ''           # why no GPU is known; '' if one is
    lost_gpus: str = ''             # why further GPUs cannot be used
    batch_jobs: int = 0             # jobs of other batches on the machine
    batch_users: tuple = ()         # the users of those jobs, one per job; '' is the account's own
    reserved: bool = False          # one of those jobs has the machine to itself
    limits: tuple = ()              # for all batches together, as in the request "limits"
    queue: Optional[Queue] = None   # of a cluster: only its engine knows the free resources


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
    """The resources that a job got: a token to give back once.  gpus: their indices."""
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
    edition: int = 0                # higher for lines that were added to a running batch


class Job(NamedTuple):
    """One line of a batch.

    backwards: the paths to fetch; None: all that the job made or changed
    own: the options for files and hardware of a line that is an execute_remote command, as text
    """
    name: str
    command: str
    line: int
    allocation: Optional[Allocation]        # None: not known, and not needed
    forwards: Optional[Forwards]    # None: the line is gone, and the job is only collected
    backwards: Optional[tuple] = None
    own: str = ''

    @property
    def may_start(self):
        """Tell whether the job may start; else an earlier run started it: only collect it."""
        return self.forwards is not None


class JobResult(NamedTuple):
    """How a job ended, and its use of resources.  None: unknown; peak: the most that was seen.

    started: when the client sent its start, in seconds since 1970 by this computer's clock
    """
    name: str
    machine: str
    exit_code: int
    wall_s: float
    gpus: Optional[str] = None
    cpu_s: Optional[float] = None
    peak_memory_mb: Optional[int] = None
    peak_gpu_memory_mb: Optional[int] = None
    started: Optional[float] = None


# ---- Life: the states of a job; the journal gets each change first ----

class State(NamedTuple):
    """One state of an attempt."""
    then: tuple                     # the states that may follow
    written: str = ''               # its event, which the journal gets first
    holds: bool = False             # the attempt occupies its room on the machine


# A machine may report any of these, at any time, for an attempt that was sent to it.
SAID_OF_FAILURE = ('refused', 'held', 'absent', 'lost', 'preempted')

LIFE = {
    'waiting':    State(('placed',)),           # in Run.start only: a waiting job has no Attempt
    'placed':     State(('claimed', 'returned'), holds=True),   # its files are on their way
    'claimed':    State(('queued', 'running', 'ended', 'stopping', 'abandoned', *SAID_OF_FAILURE),
                        'claimed', holds=True),
    'queued':     State(('queued', 'running', 'ended', 'stopping', 'abandoned', *SAID_OF_FAILURE),
                        'queued', holds=True),      # it is in the queue of a cluster
    'running':    State(('ended', 'stopping', 'abandoned', *SAID_OF_FAILURE), holds=True),
    'ended':      State(('collected', 'kept'), 'ended'),        # its exit status is known
    'collected':  State((), 'collected'),       # its results lie in job_results
    'incomplete': State(('collected', 'unfetched')),    # collected, except for some paths
    'unfetched':  State(()),                    # those paths stay on the machine
    'kept':       State(('cancelled', 'dropped')),      # the next run fetches its results

    'returned':   State(()),                    # its start was never sent
    'refused':    State(('cancelled',), 'lost'),        # the machine could not start it
    'held':       State(('cancelled',), 'lost'),        # another batch took its room first
    'absent':     State(('cancelled',), 'lost'),        # its start never arrived, for certain
    'lost':       State(('cancelled',), 'lost'),        # it is gone for certain, without a result
    'preempted':  State(('cancelled',), 'lost'),        # the same, by no fault of job or machine
    'abandoned':  State((), 'lost'),            # there was no contact for too long (--lost-after)

    'stopping':   State(('stopped', 'dropped', 'abandoned', *SAID_OF_FAILURE), 'stopping',
                        holds=True),            # it was told to stop
    'stopped':    State(('cancelled', 'dropped', 'kept')),      # it stopped, as it was told to
    'cancelled':  State((), 'cancelled'),       # its partial results are set aside
    'dropped':    State((), 'cancelled'),       # told to stop, unconfirmed: it may still run
}
UNSEEN = ('claimed', 'queued', 'running')   # it may run or begin to run: nobody stopped it
ALIVE = (*UNSEEN, 'stopping')       # at contact the client asks its machine about it
UNCOLLECTED = (*ALIVE, 'ended', 'stopped')     # its results may still arrive
ARRIVING = ('ended', 'stopped', 'incomplete')       # its results are on their way
HOLDING = tuple(word for word, state in LIFE.items() if state.holds)
AWAITED = (*HOLDING, *ARRIVING)     # its end or its results are still to come
FORGOTTEN = ('collected', 'unfetched', 'returned', 'refused', 'held', 'absent', 'lost',
             'preempted', 'abandoned')


TAIL_BYTES = 400            # kept from the end of an output, for its last line


class Stream:
    """One output of an attempt, stdout or stderr: its first `here` bytes have arrived.

    Bytes come from a look, a follower, the event of the end or a copy, each with its offset; bytes
    that arrived before are skipped.  So the order of these sources does not matter.

    store: a function that appends bytes to job_results and returns whether it succeeded, or None
    show: a function that is called with the bytes as they arrive, or None
    """

    def __init__(self, store=None, show=None):
        self.here = 0
        self.size = None                    # of the whole stream, once the job has ended
        self.content = None                 # the whole stream, if the event of the end had it
        self.stored = True                  # all bytes that arrived are stored, too
        self.tail, self.moved = b'', 0.0    # the last bytes, and when they came (time.monotonic)
        self._store, self._show = store, show

    @property
    def shown(self):
        """Tell whether its bytes are passed on as they arrive."""
        return self._show is not None

    @property
    def whole(self):
        """Tell whether the whole stream has arrived."""
        return self.content is not None or self.here == self.size

    def bring(self, offset, data):
        """Take bytes that begin at `offset`, as far as they are new."""
        new = data[self.here - offset:] if offset <= self.here else b''
        if not new:
            return
        self.tail, self.moved = (self.tail + new[-TAIL_BYTES:])[-TAIL_BYTES:], time.monotonic()
        if self.stored and self._store:
            self.stored = self._store(new)
        if self._show:
            self.here += len(new)
            self._show(new)
        elif self.stored:
            self.here += len(new)
        else:
            self.stored = True              # `here` did not move: these bytes come again

    def complete(self, content, size):
        """Note the size, once the job has ended; content: all bytes, None if they come later."""
        self.content, self.size = content, size
        if content is not None:
            self.show_rest([content[self.here:]])

    def show_rest(self, pieces):
        """Pass on the bytes that did not arrive before, without storing them."""
        for data in pieces if self._show else ():
            self.here += len(data)
            self._show(data)


class How(NamedTuple):
    """How an attempt is run, beside its command."""
    mode: str = ''                  # stdin: its input comes from `source`; tty: from a terminal
    source: Optional[int] = None    # a file descriptor of this process
    timeout_s: Optional[float] = None
    keep: bool = True               # store its streams in job_results
    show: Optional[object] = None   # called with ('out' or 'err', bytes) as they arrive


class Place(NamedTuple):
    """The place of an attempt in the queue of a cluster."""
    number: str                     # as the engine gave it
    why: str = ''                   # why it does not run yet, in words; '' if unknown
    start: Optional[int] = None     # when the engine expects to start it, in seconds since 1970
    moves_to: Optional[object] = None       # it is withdrawn, to run on this machine
    is_told: bool = False           # the view has shown it
    node: str = ''                  # the node where it has begun; '' before that


class Attempt:
    """One start of a job on a machine: the only record of how far it is.  See LIFE."""

    def __init__(self, job, machine, key, record, how=None):
        self.job, self.machine, self.how = job, machine, how or How()
        self.key = key                      # the name of its files on the machine
        self.record = record                # its claim, as the journal has or will have it
        self.state, self.why = 'waiting', ''
        self.placement = None               # the room that it holds, from MachineResources
        self.stage = None                   # its Stage; None if an earlier run started it
        self.streams = {}                   # 'out', 'err' -> Stream
        self.peaks_mb = [None, None]        # most memory seen in use: [by the job, on its GPUs]
        self.result = None                  # a JobResult, once it has ended
        self.leavings = None                # Leavings: what it left on the machine, once known
        self.place = None                   # its Place in the queue of a cluster

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
    def never_began(self):
        """Tell whether it has only waited in the queue of a cluster."""
        return self.place is not None and not self.place.node

    @property
    def is_heard(self):
        """Tell whether all of its output has arrived."""
        return all(stream.whole for stream in self.streams.values())


class Lives:
    """All attempts of this run, by machine and state.

    Only `move` changes a state; `restore` sets the first state of an attempt of an earlier run.

    changed(attempt, before) is called after each change; before: the former state.
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
        """Add an attempt of an earlier run, in the state that the journal has."""
        attempt.state = state
        self._attempts[attempt.machine, state][attempt.key] = attempt

    def rebind(self, attempt, machine):
        """Give the attempt to another worker, whose machine is the same account."""
        self._attempts[attempt.machine, attempt.state].pop(attempt.key)
        attempt.machine = machine
        self._attempts[machine, attempt.state][attempt.key] = attempt

    def move(self, attempt, state, why='', /, **facts):
        """Put the attempt into this state; first write it, with the facts, to the journal.

        The facts may have the names of the parameters, such as attempt=2.
        """
        before = attempt.state
        assert state in LIFE[before].then, f'{attempt.key}: {before} -> {state} [this is a bug]'
        if LIFE[state].written:
            how = {'how': state} if LIFE[state].written == 'lost' else {}
            self._journal.write(event=LIFE[state].written, job=attempt.name, **how, **facts)
        self._attempts[attempt.machine, before].pop(attempt.key, None)
        if state not in FORGOTTEN:          # nothing looks these up
            self._attempts[attempt.machine, state][attempt.key] = attempt
        attempt.state, attempt.why = state, why
        self._changed(attempt, before)


class Record(collections.abc.MutableMapping):
    """The facts that the journal has about a job: its last claim, and the events after that claim.

    There may be 50,000 records, so one takes a fifth of the memory of a dict with its own strings.

    state: the last event about the job's progress.  again: its results were put aside under the
    name `aside`; earlier: this record describes such results
    resumed: the job was not collected when this run began
    kept, inode: see ResultStore.commit; inode of a collected job: only whether it had a folder
    cancelling: somebody asked to cancel this attempt; stopping: it was told to stop
    queued: its place in the queue of a cluster, [number, why, start], until it runs there
    here: which of its results are in job_results, see Presence
    how: of a lost job, its state in LIFE: held, absent, …
    time, ended_at, wall_s: when it was claimed and ended, in seconds since 1970, and how long it
    took.  Journal.peek(times=True) keeps them; a run forgets them.
    """

    __slots__ = ('attempt', 'machine', 'gpus', 'command', 'key', 'where', 'own', 'backwards',
                 'batch', 'detach', 'files', 'time', 'state', 'resumed', 'exit_code', 'kept',
                 'inode', 'here', 'ended_at', 'wall_s', 'aside', 'cancelling',
                 'stopping', 'queued', 'how')
    KNOWN = frozenset(__slots__)
    SHARED = frozenset(('machine', 'gpus', 'where', 'own', 'batch', 'files'))   # by many records

    def __init__(self, facts):
        for name, value in facts.items():
            if name in self.SHARED and isinstance(value, str):
                value = sys.intern(value)
            if name in self.KNOWN:
                setattr(self, name, value)

    def __getitem__(self, name):
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def get(self, name, default=None):
        """Return the fact of this name, if it is known."""
        return getattr(self, name, default)

    def __setitem__(self, name, value):
        setattr(self, name, value)

    def __delitem__(self, name):
        delattr(self, name)

    def __iter__(self):
        return (name for name in self.__slots__ if hasattr(self, name))

    def __len__(self):
        return sum(1 for _ in self)

    def __bool__(self):
        return True


def as_json(value):
    """Return JSON as bytes, with an end of line."""
    return json.dumps(value).encode() + b'\n'


def unwritable(path, error):
    """Return the exception for a file that must be written before a job starts, and cannot."""
    return ResultsError(f'{path} cannot be written: {reason_of(error)}. Running jobs keep '
                        'running; the '
                        'same command collects them.')


JOURNAL_VERSION = 2         # docs/results.md, "The journal"


def project_name():
    """Return the name for this folder on machines: readable, and no other folder has it."""
    import hashlib
    here = os.path.realpath('.')
    who = f'{os.uname().nodename}\0{os.getuid()}\0{here}'
    readable = re.sub(r'[^A-Za-z0-9_-]', '_', os.path.basename(here))[:40] or 'root'
    return f'{readable}-{hashlib.sha256(os.fsencode(who)).hexdigest()[:12]}'


class Origin(NamedTuple):
    """Where a journal began, as its first line has it; older versions wrote only `identity`.

    identity: 8 random hex digits, in the names of the files of its jobs on a machine.  So a job of
    another journal, for example of a removed job_results, is never mistaken for a job of this one
    project: the name of the folder of its jobs on machines
    node, folder: this computer and the current folder, at that time
    inode: of the file; a copy has another one
    """

    identity: str = ''
    project: str = ''
    node: str = ''
    folder: str = ''
    inode: int = 0

    @classmethod
    def of(cls, fd):
        """Return the Origin of a new journal, which is open here."""
        return cls(os.urandom(4).hex(), project_name(), os.uname().nodename,
                   os.path.realpath('.'), os.fstat(fd).st_ino)


class Journal:
    """The events of the jobs of a job_results, one JSON object per line.  The client writes each
    event before it acts on it.

    jobs: name of a job -> its Record
    answered: the ids of requests that were acted on, see Inbox
    unwanted: name of a cancelled job -> process id of the client that must not start it
    machines: address -> facts of the machine: kernel, driver, python, cores, memory_mb, gpus
    preface: events that are written before the next claim, if there is one
    origin: the Origin
    """

    def __init__(self, path):
        self.path = path
        self.jobs, self.answered, self.unwanted = {}, set(), {}
        self.machines, self.preface = {}, []
        self.origin, self._noted_origin = Origin(), False
        self._remains = {}              # machine -> {key: state} of jobs whose files may be on it
        self._fd = None
        self._lines = self._bytes = 0   # of the file, read so far
        self._unsynced = self._keeps_times = False

    # Reading and writing it

    def open(self):
        """Read what earlier runs did, and keep the file open for writing.  Raises OSError."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._read()
        self._noted_origin = bool(self.identity)
        self.origin = self.origin if self.identity else Origin.of(self._fd)

    def peek(self, times=False):
        """Only read what earlier runs did; another run may use the folder.  Raises OSError.

        times: keep when jobs began and ended, see Record
        """
        self._keeps_times = times
        self._fd = os.open(self.path, os.O_RDONLY)
        try:
            self._read(cut=False)
        finally:
            self.close()

    def read_on(self):
        """Read what was added since `peek`.  Raises OSError."""
        if os.stat(self.path).st_size > self._bytes:
            self.peek(self._keeps_times)

    def close(self):
        """Close the file."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    @property
    def identity(self):
        """The identity of its Origin."""
        return self.origin.identity

    @property
    def is_empty(self):
        """Tell whether the open journal has no line."""
        return self._fd is not None and not os.fstat(self._fd).st_size

    def write(self, **event):
        """Add an event.  Before an act that cannot be undone the caller calls `sync`, too."""
        if self.preface and event['event'] == 'claimed':
            preface, self.preface = self.preface, []
            for before in preface:
                self.write(**before)
        self.check()
        event.setdefault('time', round(time.time(), 3))
        line = as_json(event)
        if not self._noted_origin:
            identity, *place = self.origin
            line = as_json({'event': 'journal', 'identity': identity, 'version': JOURNAL_VERSION,
                            **dict(zip(Origin._fields[1:], place))}) + line
        try:
            written = os.write(self._fd, line)
            if written < len(line):     # disk full: a part of a line would spoil the next
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._noted_origin = self._unsynced = True
        self._apply(event)

    def become_own(self):
        """Note a new Origin in a copy: its jobs have a folder of their own on machines from now on.

        The identity stays, since the keys of earlier attempts have it.
        """
        self.write(event='journal', version=JOURNAL_VERSION,
                   **Origin.of(self._fd)._replace(identity=self.identity)._asdict())

    def sync(self, results=False):
        """Write all events to the disk, against a power failure; with results: the results, too.

        Callers do so before a start, and before they delete results on a machine.
        """
        try:
            if results:
                sync_file_system(self._fd)
            elif self._unsynced:
                os.fsync(self._fd)
        except OSError as error:
            raise unwritable(self.path, error) from None
        self._unsynced = False

    def check(self):
        """Raise if the file was moved or deleted: the next run would not find new events."""
        try:
            in_place = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except OSError:
            in_place = False
        if not in_place:
            folder = self.path.partition('/.ssh_scheduler/')[0]
            raise ResultsError(f'{folder} was removed or moved away while it was in '
                               'use. Running jobs keep running: move it back, and the same '
                               'command collects them. If it is gone: execute_batch '
                               '--earlier=show --machines …')

    def _read(self, cut=True):
        """Apply all new lines.  Cut a last line without an end of line: no client acted on it."""
        decode = json.JSONDecoder().raw_decode      # json.loads would take three times as long
        is_first = not self._lines
        with open(self._fd, 'rb', closefd=False) as file:
            file.seek(self._bytes)
            for line in file:
                if not line.endswith(b'\n'):
                    break
                self._lines += 1
                try:
                    event, end = decode(line.decode())
                    if end != len(line) - 1 and line[end:].strip():
                        raise ValueError(line)
                    self._apply(event)
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ResultsError(
                        f'{self.path}, line {self._lines} cannot be read. The file records which '
                        'job runs on which machine. Correct the line, or move job_results away '
                        'to start from the beginning.') from None
                self._bytes += len(line)
        if cut:
            os.ftruncate(self._fd, self._bytes)
        for record in self.jobs.values() if is_first else ():
            record.resumed = record.state not in ('collected', 'earlier')

    def _apply(self, event):
        """Update the records by an event."""
        word = sys.intern(event['event'])
        if word == 'journal':
            self.origin = Origin(**{fact: event[fact] for fact in Origin._fields if fact in event})
        elif word == 'claimed':
            self._claim(event['job'], event)
        elif word == 'tidied':
            self._remains.pop(event['machine'], None)
        elif word == 'answered':
            self.answered.add(event['id'])
        elif word == 'machine':
            self.machines[event['machine']] = event['facts']
        elif word == 'begun':
            pass                            # only for programs that read when jobs began to wait
        elif word == 'unwanted':
            self.unwanted.update(dict.fromkeys(event['jobs'], event['client']))
        elif word == 'wanted':
            for name in event['jobs']:
                self.unwanted.pop(name, None)
        elif word == 'committing':
            record = self.jobs[event['job']]
            record.inode, record.kept = event['inode'], event['kept']
        elif word == 'renamed':
            self._rename(event['job'], event['to'])
        elif word in ('cancelling', 'stopping'):
            self.jobs[event['job']][word] = True
        elif word == 'queued':
            self.jobs[event['job']].queued = [event.get(fact) for fact in (
                'number', 'why', 'start')]
        elif word == 'running':             # the time counts from here, not from its claim
            record = self.jobs[event['job']]
            record.queued, record.time = None, event.get('time')
        else:
            record = self.jobs[event['job']]
            record.kept = event.get('kept') or None
            if record.state != 'earlier':       # else a late part of its results came
                record.state = word
            if word == 'lost':
                record.how = event.get('how')
            if word == 'ended':
                record.exit_code = event['exit_code']
                if self._keeps_times:
                    record.ended_at, record.wall_s = event.get('time'), event.get('wall_s')
            elif word == 'collected' and not self._keeps_times:
                # this saves 3 MB for 50,000 records
                record.time, record.inode = None, record.get('inode') and True
            if word != 'ended' and not record.kept:
                self._remains.setdefault(record.machine, {})[record.key] = word

    def _rename(self, name, kept):
        """Give the record of a job's results the name `kept`, and the job a new record."""
        record = self.jobs[kept] = self.jobs[name]
        facts = {fact: value for fact, value in record.items() if fact in (
            'attempt', 'machine', 'key', 'command', 'where', 'own', 'backwards', 'batch')}
        self.jobs[name] = Record({**facts, 'state': 'again', 'aside': kept})
        record.state = 'earlier'

    def _claim(self, name, event):
        if not {'command', 'machine', 'attempt'} <= event.keys():
            raise KeyError(event)
        former = self.jobs.get(name, {})
        self.unwanted.pop(name, None)
        if former.get('kept'):      # deleted in job_results: also delete the rest on the machine
            self._remains.setdefault(former['machine'], {})[former['key']] = 'collected'
        record = self.jobs[name] = Record(event)
        record.state = 'claimed'
        record.resumed = former.get('resumed')      # an earlier run wrote its streams here
        if 'key' not in event:
            record.key = self.key(name, event['attempt'])

    # Questions

    def record(self, name):
        """Return the record of a job; an empty dict if it was never claimed."""
        return self.jobs.get(name, {})

    def is_begun(self, name):
        """Tell whether the job was claimed, and neither collected nor given up."""
        return name in self.jobs and self.jobs[name].state in ('claimed', 'ended')

    def key(self, name, attempt):
        """Return the name of the job's files on a machine, for an attempt that is to be claimed.

        Attempts that a journal claimed before it had an identity have keys without one.
        """
        return f'{name}.{attempt}-{self.identity}' if self.identity else f'{name}.{attempt}'

    def started(self, name):
        """Return when the start of the last attempt of a job was sent; None if that is unknown."""
        return self.record(name).get('time')

    def new_attempt(self, job, worker, how, gpus, **noted):
        """Return the next Attempt of a job on a machine.

        gpus: the value of CUDA_VISIBLE_DEVICES, or None; noted: further facts for its record
        """
        number = self.record(job.name).get('attempt', 0) + 1
        record = {'attempt': number, 'machine': worker.machine.address, 'gpus': gpus,
                  'command': job.command, 'where': worker.machine.word or worker.name, **noted}
        return Attempt(job, worker, self.key(job.name, number), record, how)

    def note_machine(self, address, facts, since):
        """Note the facts of a machine, unless they are known.  since: when they became true."""
        if self.machines.get(address) != facts:
            self.write(event='machine', machine=address, facts=facts, time=round(since, 3))

    def may_have_streams(self, name):
        """Tell whether an earlier attempt or an earlier run may have written the job's streams."""
        record = self.record(name)
        return record.get('attempt', 1) > 1 or bool(record.get('resumed'))

    def remains(self, machine):
        """Return the keys of jobs whose useless files may be on the machine, as two lists:

        those of collected jobs, and those of jobs that may still run (lost, cancelled).
        """
        found = self._remains.get(machine, {})
        return ([key for key, state in found.items() if state == 'collected'],
                [key for key, state in found.items() if state != 'collected'])

    def tidied(self, machine):
        """Note that the files of all jobs in `remains` are gone from the machine."""
        if self._remains.get(machine):
            self.write(event='tidied', machine=machine)


def sync_file_system(fd):
    """Write the whole file system of this file to the disk: one call for many files."""
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


# ---- Resources: the books of what each machine has free ----

CORES_OVERLOAD = 1.5        # processor time may be promised this many times ("a small overload")
GPU_OVERLOAD = 1.2          # a GPU's time, too; memory is never promised twice
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
    """The books of one machine: the only record of its free and its promised resources.

    available_resources: a Capacity, or anything with its fields.
    score(allocation)       how well it fits: a float, more is better; -inf where it does not fit
    allocate(allocation)    takes it and returns a Placement; raises DoesNotFit where it does not
    deallocate(placement)   gives back what allocate gave; each placement once
    update(available_resources)     the machine has more or less now; placements stay

    Memory of the machine and of its GPUs is never promised beyond what was free.  Processor time
    may be promised CORES_OVERLOAD times, a GPU's GPU_OVERLOAD times.  A machine without a job of
    this batch takes one however busy its processors are, so that work never stops.
    """

    def __init__(self, available_resources):
        self._placements = {}
        self._number = 0
        self._cores = 0                             # promised thousandths
        self._memory_mb = 0                         # promised, apart from memory of GPUs
        self._reserved = 0                          # placements that have the machine to themselves
        self._gpus = collections.defaultdict(GpuUse)        # by index
        self.update(available_resources)

    def update(self, available_resources):
        """Note the machine's new Capacity; placements stay."""
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
        """Return the share of the scarcest resource that would stay free.

        A machine with GPUs scores less for a job without GPUs, so that its GPUs stay free for other
        jobs.  It scores least if the job would get a GPU that other people's processes use.
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
        """Take the resources, on these GPUs, without a check: the job may run there already."""
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
        """Return what is short: jobs, machine, memory, cores, gpu; '' if it fits."""
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

    def _fitting_gpus(self, allocation):
        """Return the GPUs that have room for the allocation, the best first."""
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
        return [gpu for *_, gpu in sorted(fitting)]

    def _gpus_for(self, allocation):
        """Return the best GPUs for the allocation; none where too few have room."""
        chosen = self._fitting_gpus(allocation)[:allocation.gpus]
        if len(chosen) < allocation.gpus:
            return []
        if self._unified:       # these share the memory of the machine
            shared = sum(gpu.unified for gpu in chosen) * allocation.gpu_memory_mb
            if shared + allocation.memory_mb > self.available.memory_mb - self._taken_mb():
                return []
        return chosen

    # In words

    def why_not(self, allocation, is_idle=False):
        """Return why the allocation does not fit, as 'has 2 of 8 cores free'; '' if it fits.

        is_idle: nobody uses the machine of these books, so the text is 'has 8 cores'
        """
        have, short, free = self.available, self.short_of(allocation), ' free' * (not is_idle)
        if short == 'jobs':
            return f'already has {count_of(have.max_jobs, "job")}, its limit'
        if short == 'machine':
            return 'is in use, and the job reserves the machine'
        if short == 'memory':
            return f'has {max(have.memory_mb - self._taken_mb(), 0)} MB of memory{free}'
        if short == 'cores':
            cores = max(have.cores - self._cores / 1000, 0)
            return (f'has {self._total_cores:g} cores' if is_idle else
                    f'has {cores:.1f} of {self._total_cores:g} cores free')
        if short == 'gpu':
            return have.gpu_trouble or ' and '.join(filter(None, (
                have.lost_gpus, self._gpu_shortage(allocation, is_idle))))
        return ''

    def _gpu_shortage(self, allocation, is_idle=False):
        gpus = self.available.gpus
        if len(gpus) < allocation.gpus:
            return f'has {count_of(len(gpus), "GPU")}' if gpus else 'has no GPU'
        states = [f'GPU {gpu.index} has {max(gpu.memory_mb - self._gpus[gpu.index].memory_mb, 0)} '
                  'MB' + ('' if is_idle else f' and {1 - gpu.utilization:.0%} of its time free')
                  for gpu in gpus]
        fitting = len(self._fitting_gpus(allocation))
        if fitting >= allocation.gpus:          # they share the memory of the machine
            return 'has too little memory for the job and its GPU'
        return (f'has {fitting or "no"} such GPU{"s" * (fitting > 1)}{" free" * (not is_idle)} '
                f'({"; ".join(states)})')

    def holder(self, allocation):
        """Return who holds the missing resource, as 'has 2 in use by others, 1 by this batch'."""
        have, short = self.available, self.short_of(allocation)
        own = f'runs {self.jobs} job{"s" * (self.jobs > 1)} of this batch'
        if short == 'gpu':
            if len(have.gpus) < allocation.gpus:
                return self.why_not(allocation)
            held = sum(1 for gpu in have.gpus if self._gpus[gpu.index].jobs)
            others = sum(1 for gpu in have.gpus if not self._gpus[gpu.index].jobs and (
                gpu.others or gpu.batch_jobs or gpu.utilization or gpu.memory_mb <
                min(gpu.total_memory_mb, allocation.gpu_memory_mb)))
            parts = [f'{others} in use by others'] * bool(others)
            parts += [f'{held} {"" if others else "in use "}by this batch'] * bool(held)
            return f'has {", ".join(parts)}' if parts else self.why_not(allocation)
        if short == 'machine' and not self.jobs:
            return 'is in use by another batch'
        if short in ('jobs', 'machine'):
            return own
        return self.why_not(allocation) + (f', {own}' if short and self.jobs else '')


SPARE_PENDING = 5           # jobs that may wait in a queue, plus one for each that started lately
LATELY_S = 600.0
GROWTH, GROWTH_S = 10, 5.0  # a queue may grow by this many jobs in this time: two a second
MOST_JOIN = 50              # the most in that time, when they replace jobs that left
FULL_S = 30.0               # before a full queue is tried again, if no job of this batch ends
LAST_RESORT = -10.0         # the score of a cluster: machines with room come first


class ClusterResources(MachineResources):
    """The books of a cluster: how many jobs of this batch are in its queue, and how many wait.

    clock: as time.monotonic
    """

    def __init__(self, available_resources, clock=time.monotonic):
        self._clock = clock
        self._begun = set()                 # numbers of the placements whose jobs run
        self._starts = collections.deque()  # when jobs began, in the last LATELY_S
        self._joined = collections.deque()  # when jobs came into the queue, in the last GROWTH_S
        self._left = collections.deque()    # when jobs left it, in the same time
        self._full_until = -math.inf        # after a refusal, when to try the engine again
        super().__init__(available_resources)

    def began(self, placement):
        """Note that a job in the queue has begun to run."""
        if placement.number not in self._begun:
            self._begun.add(placement.number)
            self._starts.append(self._clock())

    def take(self, allocation, gpus):
        """Take a place in the queue."""
        self._joined.append(self._clock())
        return super().take(allocation, ())

    def deallocate(self, placement):
        """Give back a placement; another job may take its place at once."""
        super().deallocate(placement)
        self._begun.discard(placement.number)
        self._full_until = -math.inf
        self._left.append(self._clock())

    def note_full(self):
        """Note that the engine takes no more jobs until one of this batch has ended.

        Jobs of others may count, too, so try again in FULL_S.
        """
        self._full_until = self._clock() + FULL_S

    def score(self, allocation):
        """Return less than any machine with room scores; an emptier queue is better."""
        if self.short_of(allocation):
            return NO_ROOM
        return LAST_RESORT - self.jobs / self.available.queue.max_jobs

    def allocate(self, allocation):
        """Take a place in the queue, and return the Placement."""
        why = self.why_not(allocation)
        if why:
            raise DoesNotFit(f'the cluster {why}')
        return self.take(allocation, ())

    def short_of(self, allocation):
        """Return what is short: engine, gpu, jobs, full, starts or time; '' if it fits."""
        queue = self.available.queue
        if self.refusal(allocation):
            return 'engine'
        if gpu_type_for(allocation, queue.gpu_types) is None:
            return 'gpu'
        if self.jobs >= queue.max_jobs:
            return 'jobs'
        now = self._clock()
        if now < self._full_until:
            return 'full'
        while self._starts and self._starts[0] < now - LATELY_S:
            self._starts.popleft()
        if self.jobs - len(self._begun) >= SPARE_PENDING + len(self._starts):
            return 'starts'
        for times in (self._joined, self._left):
            while times and times[0] <= now - GROWTH_S:
                times.popleft()
        may_join = min(GROWTH + len(self._left), MOST_JOIN)
        return 'time' if len(self._joined) >= may_join else ''

    def refusal(self, allocation):
        """Return why the engine refuses such jobs; '' if it does not."""
        queue = self.available.queue
        return dict(queue.refusals).get(cluster_need(allocation, queue.gpu_types), '')

    def why_not(self, allocation, is_idle=False):
        """Return why the allocation does not fit now, as 'has …'; '' if it fits."""
        queue, short = self.available.queue, self.short_of(allocation)
        if short == 'engine':
            kind = gpu_type_for(allocation, queue.gpu_types)
            return (f'refuses the job{f" with a GPU of type {kind}" if kind else ""} '
                    f'({queue.engine}: {self.refusal(allocation)})')
        if short == 'gpu':
            return (f'has no GPU type with {allocation.gpu_memory_mb} MB (gpu_types of its machine '
                    'file)')
        if short == 'jobs':
            return f'has {count_of(self.jobs, "job")} of this batch in its queue'
        waiting = self.jobs - len(self._begun)
        return {'': '', 'starts': f'has {waiting} of this batch that wait there',
                'full': 'takes no more jobs of this account now',
                'time': 'gets its next job in a moment'}[short]

    def holder(self, allocation):
        """Return who holds the missing resource."""
        return self.why_not(allocation)


def gpu_type_for(allocation, gpu_types):
    """Return the type of GPU that a cluster gives to a job: '' for any, None if none suffices.

    gpu_types: as in Machine
    """
    if not allocation.gpus or gpu_types is None:
        return ''
    return next((name for mb, name in gpu_types if mb >= allocation.gpu_memory_mb), None)


def cluster_need(allocation, gpu_types):
    """Return what an allocation needs, in the form for engines: CORES MB RESERVE GPUS TYPE."""
    return (f'{max(math.ceil(allocation.cores), 1)} {allocation.memory_mb} '
            f'{int(allocation.reserve)} {allocation.gpus} '
            f'{gpu_type_for(allocation, gpu_types) or ""}').rstrip()


def books_of(capacity):
    """Return new books for a machine, or a cluster, with this Capacity."""
    is_cluster = getattr(capacity, 'queue', None) is not None
    return (ClusterResources if is_cluster else MachineResources)(capacity)


def as_record(kind, value):
    """Return the value, or a record of this kind with those of its fields that the value has."""
    return value if isinstance(value, kind) else kind(**{
        name: getattr(value, name) for name in kind._fields if hasattr(value, name)})


def idle(capacity):
    """Return the Capacity that the machine would have if nobody used it.

    This Capacity decides which jobs are impossible on the machine.  The free resources do not,
    since other people's programs may end.  If less than 10 % of a GPU's memory is taken, the driver
    has it: that part stays subtracted.
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
    own, gpus, count = books_of(capacity), [], 0
    if capacity.queue:
        return 0 if own.short_of(allocation) else capacity.queue.max_jobs, []
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
    text = f'{describe_cores(allocation)} and {describe_memory(allocation)}'
    if allocation.gpus:
        text += (f' and {describe_gpu(allocation)} and {allocation.gpu_utilization:.0%} of its '
                 'time free')
    return text + (' on a machine of its own' if allocation.reserve else '')


def describe_cores(allocation):
    """Return the cores in words: '1 core'."""
    return f'{allocation.cores:g} core' + ('' if allocation.cores == 1 else 's')


def describe_memory(allocation):
    """Return the memory in words; also in GB where it was probably typed so."""
    mb = allocation.memory_mb
    return f'{mb} MB{f" ({mb // 1024} GB)" if mb and not mb % 1024 else ""} of memory'


def describe_gpu(allocation):
    """Return the GPUs of an allocation in words, without their time: 'a GPU of its own with …'."""
    each = ', each' if allocation.gpus > 1 else ''
    return f'{name_gpu(allocation)}{each} with {allocation.gpu_memory_mb} MB'


def name_gpu(allocation):
    """Return the GPUs of an allocation in few words: 'a GPU of its own'."""
    gpus = 'a GPU' if allocation.gpus == 1 else f'{allocation.gpus} GPUs'
    return f'{gpus} of its own' if allocation.reserve_gpu else f'a share of {gpus}'


def describe_briefly(allocation):
    """Return the main thing that a job waits for, for a table: 'a GPU of its own'."""
    if allocation.reserve:
        return 'a machine of its own'
    if allocation.gpus:
        return name_gpu(allocation)
    return f'{describe_cores(allocation)}, {allocation.memory_mb} MB of memory'


def describe_short(allocation, shorts):
    """Return (what of the allocation is short, in words; the option for it, or '').

    shorts: what short_of returned for each machine; if they differ, the words are of all needs
    """
    words, option = {
        'memory': (describe_memory(allocation), '--memory-required'),
        'cores': (describe_cores(allocation), '--num-cpus'),
        'machine': ('a machine of its own' if allocation.reserve else '', '--reserve'),
        'gpu': (describe_gpu(allocation), ''),
    }.get(*shorts, ('', '')) if len(shorts) == 1 else ('', '')
    return (words, option) if words else (describe(allocation), '')


def needs_in_words(allocation, shorts):
    """Return the words of describe_short, with the option."""
    words, option = describe_short(allocation, shorts)
    return f'{words} ({option})' if option else words


# ---- Scheduler: which jobs wait, and which machines have room; starts nothing ----

PATIENCE = 20               # later jobs that may start before a job that waits for its room


def gpus_of(text):
    """Return the GPUs' indices of a value of CUDA_VISIBLE_DEVICES, or of None."""
    return tuple(map(int, re.findall('[0-9]+', text or '')))


class Hold(NamedTuple):
    """A machine that is kept for a job: others start there only if they fit beside it."""
    allocation: Allocation          # what the job needs
    machine: object
    after: MachineResources         # its books with that job, once all present jobs have ended
    beside: dict                    # number of a Placement -> its Placement in `after`


CLUSTER_AFTER_S = 30.0      # a job waits this long for a machine before a cluster gets it


class Scheduler:
    """Owns the waiting jobs and the free resources.  Machines are any hashable things.

    Jobs start in the order of their lines, but a job that finds room passes those that do not: no
    machine idles while a waiting job fits it.  When a job was passed PATIENCE times, the scheduler
    holds a machine on which it fits: from then on only jobs that fit beside it start there.

    Jobs with the same needs wait in one queue.  Each such kind has a heap of the machines by score.
    A score falls with each placed job, so an entry may be too good: it is checked when it comes up.
    Where a score may have risen, a new entry, better than any, replaces the old one.  So placing a
    job costs about log(machines), however many jobs wait.

    A cluster gets a job that no other machine can take, or that has waited for cluster_after_s.

    clock: as time.monotonic
    may_fit(allocation): whether some machine that is no cluster may have room for it later
    """

    def __init__(self, cluster_after_s=CLUSTER_AFTER_S, clock=time.monotonic):
        self.cluster_after_s, self._clock = cluster_after_s, clock
        self.may_fit = lambda allocation: any(
            not own.available.queue and not MachineResources(idle(own.available)).short_of(
                allocation) for own in self.resources.values())
        self._since = {}            # name of a job -> when it began to wait
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
        self.resources[machine] = books_of(capacity)
        self.resources = {m: self.resources[m] for m in sorted(
            self.resources, key=self._places.get)}
        self._risen(machine)

    def remove_machine(self, machine):
        """Place no more jobs on this machine."""
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
            if books_of(capacity).short_of(self._hold.allocation):
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

    def began(self, machine, placement):
        """Note that a job in the queue of a cluster has begun to run."""
        if machine in self.resources:
            self.resources[machine].began(placement)
            self._risen(machine)

    def note_full(self, machine):
        """Note that a cluster takes no more jobs for now."""
        if machine in self.resources:
            self.resources[machine].note_full()

    @property
    def clusters(self):
        """The machines that are clusters."""
        return [machine for machine, own in self.resources.items() if own.available.queue]

    def wait_s(self):
        """Return the seconds until time alone may let a job start; None if it never does."""
        if not self._waiting or not self.clusters:
            return None
        now = self._clock()
        due = [self._since[queue[0].name] + self.cluster_after_s for queue
               in self._waiting.values() if queue]
        return max(min([at for at in due if at > now], default=now + 1) - now, 0.1)

    def room_beside_clusters(self, allocation, taken):
        """Return a machine that is no cluster and has room; None if there is none.

        taken: machines to leave out
        """
        scores = [(own.score(allocation), -self._places[machine], machine)
                  for machine, own in self.resources.items()
                  if not own.available.queue and machine not in taken
                  and not self.keeps_from(machine, allocation)]
        best = max(scores, key=lambda entry: entry[:2], default=(NO_ROOM,))
        return best[2] if best[0] > NO_ROOM else None

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
        """Queue the job behind all of its kind; first: at the place of its line."""
        queue = self._waiting.setdefault(job.allocation, collections.deque())
        place = 0 if first else len(queue)
        while place < len(queue) and queue[place].line < job.line:
            place += 1
        # A job that returns must not delay those behind it, which have waited for longer.
        self._since[job.name] = min(self._clock(), self._since[queue[place].name] if place < len(
            queue) else math.inf)
        queue.insert(place, job)
        if job.allocation not in self._heaps:
            self._heaps[job.allocation] = self._new_heap()

    def remove(self, names):
        """Take the jobs with these names out; return those that waited."""
        taken = []
        for allocation, queue in list(self._waiting.items()):
            found = [job for job in queue if job.name in names]
            taken += found
            for job in found:
                del self._since[job.name]
            if len(found) == len(queue):
                del self._waiting[allocation], self._heaps[allocation]
                self._passed.pop(allocation, None)
                if self._hold and self._hold.allocation == allocation:
                    self._hold = None
            elif found:
                self._waiting[allocation] = collections.deque(
                    job for job in queue if job.name not in names)
        return taken

    @property
    def waits(self):
        """The number of jobs that wait."""
        return sum(map(len, self._waiting.values()))

    def kinds(self):
        """Return {Allocation: the jobs that wait for it}, the first line first."""
        return dict(sorted(((allocation, tuple(queue)) for allocation, queue
                            in self._waiting.items()), key=lambda item: item[1][0].line))

    def choose(self):
        """Take and place each job for which there is room; yield (job, machine, Placement)."""
        for machine in self.clusters:
            self._risen(machine)            # time alone may raise its score
        held, begun = self._hold, False
        while not begun or (held and self._hold is not held):   # a hold has ended
            held, begun = self._hold, True
            yield from self._choose()

    def _choose(self):
        kinds = [(queue[0].line, number, allocation, queue) for number, (allocation, queue)
                 in enumerate(self._waiting.items())]
        heapq.heapify(kinds)
        blocked = []
        while kinds:
            _, number, allocation, queue = kinds[0]
            machine = self._best(allocation, queue[0])
            if machine is None:
                blocked.append(heapq.heappop(kinds)[2])
                continue
            job = queue.popleft()
            del self._since[job.name]
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

    def _best(self, allocation, job):
        """Return the machine that has the best score for a job, None if none has room."""
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
            elif self.keeps_from(machine, allocation) or self._is_too_soon(machine, job):
                aside.append(heapq.heappop(heap))
            else:
                best = machine
                break
        for entry in aside:
            heapq.heappush(heap, entry)
        return best

    def _is_too_soon(self, machine, job):
        """Tell whether a job still has to wait for machines other than this cluster."""
        return bool(self.resources[machine].available.queue
                    and self._clock() < self._since[job.name] + self.cluster_after_s
                    and self.may_fit(job.allocation))

    def keeps_from(self, machine, allocation):
        """Tell whether the machine is kept for a job that this allocation would delay."""
        hold = self._hold
        return bool(hold and machine == hold.machine and allocation != hold.allocation
                    and hold.after.short_of(allocation))

    def will_start(self, allocation):
        """Tell whether the next choice starts such a job on a machine that is not a cluster."""
        return any(not (own.available.queue or own.short_of(allocation)
                        or self.keeps_from(machine, allocation))
                   for machine, own in self.resources.items())

    def _pass(self, allocation):
        """Count the start of a later job while this kind waits; hold a machine at PATIENCE."""
        self._passed[allocation] += 1
        if self._passed[allocation] % PATIENCE or self._hold:
            return
        for machine, own in sorted(self.resources.items(), key=lambda item: item[1].jobs):
            after = MachineResources(own.available)
            if not own.available.queue and not after.short_of(allocation):
                after.allocate(allocation)
                self._hold = Hold(allocation, machine, after, {})
                return


# ---- Run: the loop ----

LATECOMER_S = 2.0           # the first machine that answers waits this long for the others
INTERRUPT_S = 10.0          # wait this long for jobs to stop
LAST_WORDS_S = 5.0          # and this long for the rest of their output
LIVE_S = 5.0                # between two looks at a machine while jobs wait
REFRESH_S = 2.0             # between two looks at what running jobs write and use
HASTY_S = 0.5               # the same at a cluster if jobs began or ended lately
CALM_S = 30.0               # between two looks while no job waits, to see what jobs use
ASIDE_S, LONGEST_ASIDE_S = 30.0, 1800.0     # a failed machine gets no jobs; doubled each time
TROUBLES = 3                # lost jobs in a row after which a machine gets no more for a while
PATIENT_TROUBLES = 6        # with more, after half an hour, a run does not wait for it alone


class Policy(NamedTuple):
    """The differences between the commands that run jobs."""
    probes: bool = True             # ask the machines for their free resources
    want_gpus: bool = False         # and for their GPUs
    asks_late: bool = False         # ask about jobs of an earlier run after Run.open only
    patient: bool = False           # a machine that cannot be reached is tried again later
    forwards: Optional[Forwards] = None     # files of most jobs: sent before there is room
    retries: int = 1                # restarts of a job that its machine lost
    halt_after: Optional[int] = None        # number of failed jobs after which none starts
    lost_after_s: Optional[float] = None    # time without contact until jobs restart elsewhere
    timeout_s: Optional[float] = None       # of each job; the machine stops it then
    machine_timeout_s: Optional[float] = None       # of each machine, from its login to its end
    at_once: Optional[int] = None   # machines in use at a time; None: all
    tied: bool = False              # the jobs stop when this client does
    interval_s: Optional[float] = None      # between two looks while jobs wait; None: LIVE_S
    cluster_after_s: float = CLUSTER_AFTER_S        # before a cluster gets a job
    wants_others: bool = False      # machines report jobs that other journals claimed
    how: How = How()
    noted: Optional[dict] = None    # further facts for each claim in the journal


class Standing:
    """What a Run knows about one machine, beside its contact."""

    def __init__(self):
        self.first = None           # its Capacity when it last connected
        self.troubles = 0           # failed jobs, or logins, in a row
        self.freed = False          # a job ended there, and none was placed since then
        self.is_given_back = False  # it gets no more jobs; closed when its jobs have ended
        # (word, what): how its own job went; the Attempt may be gone.  See Fleet.note_outcome.
        self.outcome = None


class Fleet:
    """The machines of a run: when to log in to them, which get jobs, which to try again.

    bound: {worker: the Job that is its own}
    """

    def __init__(self, run, workers, bound):
        self.workers, self.bound, self.standing = [], bound, {}
        self._run, self._client, self._view, self._policy = run, run.client, run.view, run.policy
        self._lives, self._scheduler = run.lives, run.scheduler
        self.clusters = Clusters(run, self)
        for worker in workers:
            self.join(worker)

    # Which machines

    def join(self, worker):
        """Use this machine, too."""
        self.workers.append(worker)
        self.standing[worker], worker.run = Standing(), self._run

    def take_back(self, worker):
        """Use a machine again that was given back."""
        self.standing[worker].is_given_back = False
        if worker.state == 'ready':
            self._use(worker)

    def give_back(self, worker):
        """Place nothing on this machine any more."""
        self.standing[worker].is_given_back = True
        self._scheduler.remove_machine(worker)
        for attempt in self._lives.of(worker, 'placed'):
            self._lives.move(attempt, 'returned', 'the machine is given back')
        worker.queue.withdraw_all()

    # Logging in

    def log_in(self):
        """Log in to new machines, up to the number that may be in use at a time."""
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
        """Give a machine its own job, or files, before it answers."""
        if worker in self.bound:
            self._begin_bound(worker, self.bound[worker])
        elif self._policy.forwards and self._run.waits_with_files():
            worker.offer(self._policy.forwards)

    def _begin_bound(self, worker, job):
        if self._lives.any_of(worker, *ALIVE):
            return
        if self._policy.probes:
            self._scheduler.add(job)
            worker.offer(job.forwards)
        else:
            self._run.start(job, worker)

    def meet(self):
        """Log in, and wait until each machine answered or failed, but not for latecomers."""
        self.log_in()
        waited, late = False, []
        while not self._run.interrupts and self.count('connecting') and not (
                late and self.count('ready')):
            if self.count('ready') and not waited:
                waited = True
                self._client.processes.call_later(LATECOMER_S, functools.partial(late.append, True))
            self._client.processes.wait()
            self.log_in()                   # to those that joined
            self.let_go()
            if self._run.wishes.cancelled and not self._run.unfinished:
                return
        if self._run.interrupts:
            self._view.unanswered()
            raise KeyboardInterrupt
        if not self.count('ready'):
            raise SchedulerError('no machine can be used.')

    def let_go(self):
        """Close the machines that have nothing more to do."""
        for worker in self.workers:
            if (worker in self.bound or self.standing[worker].is_given_back) and (
                    worker.state in ('connecting', 'ready', 'away') and not self.works(worker)):
                self._view.parted(worker)
                worker.close()

    # Questions

    def count(self, state):
        """Return how many machines are in this state."""
        return sum(1 for worker in self.workers if worker.state == state)

    def works(self, worker):
        """Tell whether the run still waits for something from this machine."""
        if worker.state in ('connecting', 'ready', 'away') and (worker.busy or worker.is_stopping):
            return True
        return worker in self.bound and (
            not self.standing[worker].outcome or worker.state == 'closing')

    def at_best(self, worker):
        """Return the Capacity that decides which jobs are impossible.

        Other people may leave, so these are the resources of the idle machine; with --no-live the
        client does not look again, and the free resources decide.
        """
        if worker.capacity.queue or not self._client.live:
            return worker.capacity
        return idle(self.standing[worker].first)

    def resting_shortly(self):
        """Return the machines that rest, except those that have failed for half an hour."""
        return [worker for worker, standing in self.standing.items()
                if worker.state == 'ready' and worker not in self._scheduler.resources
                and standing.troubles <= PATIENT_TROUBLES]

    # Changes of machines

    def changed(self, worker, before):
        """React to a machine that changed its state or was measured, and show it."""
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
        """Use a machine that has connected, for the first time or again."""
        standing = self.standing[worker]
        standing.first = worker.capacity
        if worker.capacity:
            self._use(worker)
        if again:
            self._view.came_back(worker)
        else:
            if self._policy.forwards and not standing.is_given_back and self._run.waits_with_files(
                    books_of(self.at_best(worker))):
                worker.prepare(self._policy.forwards)       # even if there is no room yet
            self._view.came(worker)
        if self._run.is_open:
            worker.ask()
        if again and self._run.interrupts:      # the machine first reports ended jobs
            self._client.processes.call_later(1, worker.stop)

    def _measured(self, worker):
        self._scheduler.update(worker, worker.capacity)
        self._view.measured(worker)

    def _use(self, worker):
        """Add the machine to the scheduler, with the room that its present jobs hold."""
        if self.standing[worker].is_given_back:
            return
        self._scheduler.add_machine(worker, self.workers.index(worker), worker.capacity)
        self._book(worker, self._lives.of(worker, *HOLDING))

    def _book(self, worker, attempts):
        """Take the room of these attempts on a machine."""
        for attempt in attempts:
            allocation, before = attempt.job.allocation, attempt.placement
            attempt.placement = allocation and self._scheduler.resources[worker].take(
                allocation, before.gpus if before else gpus_of(attempt.gpus))

    def _look_at(self, worker, job):
        """Give up the machine if the job would not fit there even if nobody else used it."""
        best = books_of(idle(worker.capacity))
        short = best.short_of(job.allocation)
        if short:
            self.note_outcome(
                worker, 'impossible', f'the job needs {needs_in_words(job.allocation, {short})}, '
                f'and {worker.name} {best.why_not(job.allocation, is_idle=True)}')
        else:
            worker.prepare(job.forwards)    # even if there is no room yet

    def _away(self, worker):
        self._scheduler.remove_machine(worker)
        self._view.away(worker)
        if self._policy.lost_after_s is not None:
            self._client.processes.call_later(
                self._policy.lost_after_s,
                functools.partial(self._give_up, worker, worker.away_since))

    def _give_up(self, worker, since):
        """--lost-after is over: abandon the jobs of this machine, so that they start elsewhere."""
        attempts = self._lives.of(worker, *ALIVE)
        if worker.away_since != since or not attempts:      # there was contact meanwhile
            return
        self._view.given_up(worker, len(attempts))
        for attempt in attempts:
            self._lives.move(attempt, 'abandoned')

    def _failed(self, worker):
        """React to a machine that cannot be used: never reached, or not again in time."""
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
        if self._policy.patient and worker.retry == 'later' and not (
                worker.was_ready or standing.is_given_back):
            standing.troubles += 1
            self._later(worker, worker.reconnect)
        self._view.after_failure(worker)

    def _rebind(self, worker, other):
        """Give the attempts of a machine to the worker with the other name of its account."""
        attempts = self._lives.of(worker, *ALIVE)
        for attempt in attempts:
            self._lives.rebind(attempt, other)
        if other in self._scheduler.resources:      # else _use books them later
            self._book(other, attempts)
        if other.state == 'ready' and self._run.is_open:
            other.ask()

    # Machines that fail

    def attempt_changed(self, attempt):
        """Note what the new state of an attempt tells about its machine."""
        standing = self.standing[attempt.machine]
        self.clusters.attempt_changed(attempt)
        if attempt.state == 'placed':
            standing.freed = False
        elif attempt.state == 'ended':
            standing.troubles, standing.freed = 0, True
            self.note_outcome(attempt.machine, 'ended', attempt.result.exit_code)

    def note_outcome(self, worker, word, what):
        """Note the outcome of a machine's own job.

        The first word stays, except that failed replaces ended.  Words: ended (what: the exit
        code), failed (it could not be started, or its results could not be fetched),
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
        """Place nothing on a machine for a while; its jobs keep running."""
        if worker.state == 'ready' and worker in self._scheduler.resources:
            self._scheduler.remove_machine(worker)
            self._view.rests(worker, why)
            self._later(worker, functools.partial(self.bring_back, worker))

    def _later(self, worker, try_again):
        """Try a machine again after a delay, which doubles with each failure in a row."""
        delay_s = min(ASIDE_S * 2 ** (self.standing[worker].troubles - 1), LONGEST_ASIDE_S)
        self._client.processes.call_later(delay_s * random.uniform(0.8, 1.2), try_again)

    def bring_back(self, worker):
        """Use a machine again after its rest."""
        if worker.state == 'ready' and worker not in self._scheduler.resources:
            self._use(worker)

    def _too_late(self, worker):
        """Stop the jobs of a machine that took longer than --timeout; wait no longer for it."""
        if self.standing[worker].outcome:
            return
        self.note_outcome(worker, 'timed out', f'after {self._policy.machine_timeout_s:g} s')
        if worker.state == 'ready':
            worker.stop()
            self._client.processes.call_later(INTERRUPT_S, functools.partial(self._part, worker))
        else:
            worker.close()

    def _part(self, worker):
        """Close a machine whose jobs take too long to stop."""
        if worker.state == 'ready':
            for attempt in self._lives.of(worker, *ALIVE):
                self._view.unconfirmed(attempt)
            worker.jobs.give_up_output()
            worker.close()


def by_address(workers):
    """Return {address: the first machine that has it}."""
    return {worker.machine.address: worker for worker in reversed(workers)}


def check_books(run):
    """Assert that the books of each ready machine have just the placements of its attempts."""
    for worker, books in run.scheduler.resources.items():
        if worker.state == 'ready':
            out = sum(1 for attempt in run.lives.of(worker, *HOLDING) if attempt.placement)
            assert books.jobs == out, f'{worker.name}: allocations leaked [this is a bug]'


class Wishes:
    """What people ask of a Run while it runs, and how the Run obeys.

    cancelled: names of jobs that the run neither starts nor keeps running
    moving: keys of attempts that are stopped, so that their jobs start on other machines
    again: names of jobs that run again, and whose results still have the names of the jobs
    """

    def __init__(self, run):
        self.cancelled, self.moving, self.again = set(), set(), set()
        self._run = run

    def make_way(self, job):
        """Give the results of jobs that run again other names, when the first of these starts.

        Jobs that are cancelled before, or that fit on no machine, keep their results.
        """
        if job.name not in self.again:
            return
        run, results = self._run, self._run.client.results
        best = [books_of(run.fleet.at_best(worker)) for worker in run.workers
                if worker.state == 'ready']
        able = {waiting.name for allocation, queue in run.scheduler.kinds().items()
                if not all(books.short_of(allocation) for books in best) for waiting in queue}
        names = [name for name in run.jobs
                 if name in self.again and (name == job.name or name in able)]
        self.again.difference_update(names)
        kept = {name: results.put_aside(name) for name in names if results.is_done(name)}
        for attempt in run.lives.all_of('incomplete'):      # its files belong to these results
            if attempt.name in kept:
                attempt.job = attempt.job._replace(name=kept[attempt.name])
        if kept:
            run.view.tell(f'{count_of(len(kept), "job")} run{"s" * (len(kept) == 1)} again; '
                          f'earlier results are kept: {names_of([*kept.values()])}')

    def take_up(self, attempt):
        """Read people's requests from the record of an earlier run's attempt; return its state."""
        if attempt.record.get('cancelling'):    # and the client died, or had no contact
            self.cancelled.add(attempt.name)
        if not attempt.record.get('stopping'):
            return 'claimed'
        self.moving.add(attempt.key)        # its end is no failure, and its job starts again
        return 'stopping'

    def cancel(self, names):
        """Neither start these jobs nor keep them running."""
        run = self._run
        self.cancelled |= names
        if names:
            run.client.journal.write(event='unwanted', jobs=sorted(names), client=os.getpid())
        run.scheduler.remove(names)
        for name in names:                  # for the next run, if this one is killed
            if run.client.journal.record(name).get('state') == 'claimed':
                run.client.journal.write(event='cancelling', job=name)
        self._stop_unwanted()

    def move(self, worker):
        """Stop the jobs of a machine, and start them on others."""
        self.moving |= {attempt.key for attempt in self._run.lives.of(worker, *UNSEEN)}
        self._stop_unwanted()

    def _stop_unwanted(self):
        """Stop unwanted attempts; without contact, when their machine reports that they run."""
        for worker in self._run.workers:
            # An attempt of an earlier run has no streams until its machine was asked about it.
            worker.jobs.end([attempt for attempt in self._run.lives.of(worker, 'placed', *UNSEEN)
                             if attempt.streams and self.unwanted(attempt)])

    def unwanted(self, attempt):
        """Tell whether an attempt is to be stopped."""
        return attempt.name in self.cancelled or attempt.key in self.moving

    def changed(self, attempt):
        """Start the job of a stopped or lost attempt again, unless the job was cancelled."""
        if attempt.state == 'kept':         # its files cannot be fetched, and nobody needs them
            self._run.lives.move(attempt, 'cancelled', kept=())
            self._run.client.results.set_aside(attempt.name)
        elif attempt.state in ('cancelled', 'abandoned', *SAID_OF_FAILURE):
            self.moving.discard(attempt.key)
            if attempt.job.may_start:
                self._run.wait_again(attempt)
            else:
                self._run.fleet.note_outcome(attempt.machine, 'failed',
                                             'the job was told to stop, and has stopped')

    def rerun(self, jobs):
        """Run Jobs again that have ended, or were cancelled."""
        run, names = self._run, {job.name for job in jobs}
        if names & self.cancelled:
            run.client.journal.write(event='wanted', jobs=sorted(names & self.cancelled))
        self.cancelled -= names
        run.forget(names)
        waiting = run.scheduler.remove(run.jobs.keys())
        self.replace_waiting({job.name: job for job in (*waiting, *jobs)})

    def change(self, jobs):
        """Replace jobs that do not wait by these Jobs of the same names, {name: Job}.

        A job without forwards, whose line is gone, never starts again; a running one keeps running.
        """
        self._run.jobs.update(jobs)
        for attempt in self._run.lives.all_of(*ALIVE):
            attempt.job = jobs.get(attempt.name, attempt.job)

    def replace_waiting(self, jobs):
        """Let these jobs wait, {name: Job}, and no others."""
        run = self._run
        for job in run.scheduler.remove(run.jobs.keys()):
            if job.name not in jobs:
                del run.jobs[job.name]
        for job in sorted(jobs.values(), key=lambda job: job.line):
            run.jobs[job.name] = job
            run.scheduler.add(job)


class Clusters:
    """What a Run does with clusters: they take jobs that other machines have no room for."""

    def __init__(self, run, fleet):
        self._run, self._fleet = run, fleet
        run.scheduler.may_fit = self._may_fit

    def _may_fit(self, allocation):
        """Tell whether a machine that is no cluster may have room for such a job later."""
        fleet = self._fleet
        return any(worker.state in ('connecting', 'away') or worker.state == 'ready'
                   and worker.capacity
                   and not books_of(fleet.at_best(worker)).short_of(allocation)
                   for worker, standing in fleet.standing.items()
                   if not worker.machine.engine and not standing.is_given_back)

    def attempt_changed(self, attempt):
        """Note in the journal and the books if an attempt has begun to run on a cluster."""
        if attempt.state == 'running' and attempt.machine.machine.engine:
            journal = self._run.client.journal
            if journal.record(attempt.name).get('queued'):      # perhaps by an earlier client
                place = attempt.place or Place('')
                journal.write(event='running', job=attempt.name, number=place.number,
                              node=place.node)
            if attempt.placement:
                self._run.scheduler.began(attempt.machine, attempt.placement)

    def take_back(self):
        """Withdraw jobs from the queues of clusters for machines that have room now.

        Jobs that were queued last are withdrawn first.  A machine gets one job at a time.
        """
        scheduler = self._run.scheduler
        queued = self._run.lives.all_of('queued') if scheduler.clusters else []
        taken = {attempt.place.moves_to for attempt in queued}
        for attempt in reversed(queued):
            if not attempt.place.moves_to and attempt.job.may_start:
                machine = scheduler.room_beside_clusters(attempt.job.allocation, taken)
                if machine:
                    taken.add(machine)
                    attempt.machine.queue.withdraw(attempt, machine)


class Run:
    """Runs jobs on machines until none is left, and knows how each ended.

    First, start every job for which a machine has room.  Second, wait until something happens.
    Repeat both, until no job waits or runs and all results have arrived.

    workers: the machines, as Worker
    client: what the machines share, with the processes and the journal
    view: what a person sees, a View
    bound: {worker: the Job that is its own}, if the policy has each job on a machine of its own
    """

    def __init__(self, jobs, workers, client, view, policy, bound=None):
        self.jobs = {job.name: job for job in jobs}
        self.client, self.view, self.policy = client, view, policy
        self.lives = Lives(client.journal, self.changed)
        self.scheduler = Scheduler(policy.cluster_after_s)
        self.fleet = Fleet(self, workers, bound or {})
        self.ended = {}                     # job name -> JobResult; exit code -1: it is lost
        self.failures = []                  # those of them that failed
        self.interrupts, self.leaves = 0, False     # leaves: its jobs keep running when it stops
        self.wishes = Wishes(self)
        self.is_open = not policy.asks_late
        self._lost_by = collections.Counter()       # job name -> how often it was lost
        view.run = self

    @property
    def workers(self):
        """The machines."""
        return self.fleet.workers

    @property
    def batch(self):
        """How the names of the jobs of a batch begin; '' of a single command."""
        return (self.policy.noted or {}).get('batch', '')

    # Before the loop

    def take_up(self, job, worker, record):
        """Take up a job that an earlier run has claimed on this machine."""
        attempt = Attempt(job, worker, record['key'], record, self._how(worker))
        self.lives.restore(attempt, self.wishes.take_up(attempt))

    def open(self):
        """Ask about the jobs of an earlier run; the messages that precede theirs are printed."""
        self.is_open = True
        for worker in self.workers:
            if worker.state == 'ready':
                worker.ask()

    # The loop

    def loop(self, until=lambda: False):
        """Run all jobs; stop early if until() is true, or at an interrupt."""
        while self.unfinished and not self.interrupts and not until():
            self.fleet.log_in()
            self.place()
            if self.stuck():
                self.view.stuck()
                break
            self.fleet.clusters.take_back()
            self.look_again()
            self.view.progress()
            self.client.processes.wait(self.scheduler.wait_s())
            self.fleet.let_go()
        check_books(self)

    def interrupt(self, number=signal.SIGTERM, _frame=None):
        """Handle a signal: the first stops the run in good order, the second at once.

        At Ctrl-C the view asks first, if it can.
        """
        if number != signal.SIGINT or self.interrupts or not self.view.ask():
            self.interrupts += 1
        self.client.processes.wake()

    def leave(self):
        """Stop now; the jobs keep running."""
        self.leaves, self.interrupts = True, 2

    def place(self):
        """Start each job for which there is room."""
        for job, worker, placement in () if self.halted else self.scheduler.choose():
            self.start(job, worker, placement)

    def start(self, job, worker, placement=None):
        """Start one job; the starts of one moment are sent together."""
        self.wishes.make_way(job)
        attempt = self.client.journal.new_attempt(
            job, worker, self._how(worker), placement and placement.visible_gpus,
            own=job.own, backwards=job.backwards, **noted_of(job, worker.machine),
            **(self.policy.noted or {}))
        attempt.placement = placement
        self.lives.move(attempt, 'placed')
        worker.start(attempt)

    def _how(self, worker):
        """Return the How of an attempt on a machine."""
        return self.policy.how._replace(timeout_s=self.policy.timeout_s,
                                        show=self.view.sink(worker))

    def look_again(self):
        """Have the machines measured again: often while jobs wait, else rarely.

        While jobs wait, measure a machine at once if a job ended there and none was placed since.
        """
        if not self.client.live:
            return
        if self.scheduler.waits:
            for worker in self.scheduler.resources:
                worker.measure(0 if self.fleet.standing[worker].freed else
                               self.policy.interval_s or LIVE_S)
        else:
            for worker in {attempt.machine for attempt in self.lives.all_of(*HOLDING)
                           if attempt.placement}:
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
        """Tell whether a waiting job gets the batch's own files and fits these resources."""
        return any(job.forwards == self.policy.forwards
                   for allocation, jobs in self.scheduler.kinds().items()
                   if books is None or not books.short_of(allocation) for job in jobs)

    def stuck(self):
        """Tell whether jobs wait, and no usable machine could ever take one of them."""
        fleet = self.fleet
        if fleet.bound or not self.scheduler.waits or self.halted or fleet.count(
                'connecting') or fleet.count('away') or any(map(fleet.works, fleet.workers)):
            return False
        usable = [books_of(fleet.at_best(worker))
                  for worker in (*self.scheduler.resources, *fleet.resting_shortly())]
        return all(books.short_of(kind) for books in usable for kind in self.scheduler.kinds())

    # Changes of attempts

    def changed(self, attempt, before):
        """React to the new state of an attempt, and show it."""
        if LIFE[before].holds and not LIFE[attempt.state].holds and attempt.placement:
            self.scheduler.give_back(attempt.machine, attempt.placement)
        self.fleet.attempt_changed(attempt)
        if attempt.state == 'ended':
            self._note(attempt.result)
        self.view.changed(attempt, before)
        react = {'returned': self._returned, 'refused': self._refused, 'held': self._held,
                 'absent': self.wait_again, 'lost': self._lost, 'abandoned': self.wait_again,
                 'preempted': self.wait_again, 'kept': self._kept}.get(attempt.state)
        if before not in ('stopping', 'stopped'):
            if react:
                react(attempt)
        elif not self.interrupts and self.wishes.unwanted(attempt):
            self.wishes.changed(attempt)

    def _note(self, result):
        """Note how a job has ended."""
        self.ended[result.name] = result
        self.failures += [result] if result.exit_code else []

    def forget(self, names):
        """Forget how jobs have ended, or were lost."""
        self.failures = [result for result in self.failures if result.name not in names]
        for name in names:
            self.ended.pop(name, None)
            self._lost_by.pop(name, None)

    def _kept(self, attempt):
        self.fleet.note_outcome(attempt.machine, 'failed', 'its results could not be fetched')

    def _returned(self, attempt):
        """React to a start that was never sent: contact was lost, or nothing starts any more."""
        if self.interrupts:
            return
        if not self.fleet.bound:
            self.wait_again(attempt)
        elif attempt.machine.state != 'failed':
            self.fleet.note_outcome(attempt.machine, 'failed', attempt.why)

    def _refused(self, attempt):
        """Let the job wait again, and let the machine rest that could not start it."""
        worker = attempt.machine
        if self.interrupts:
            return
        if self.fleet.bound:
            self.fleet.note_outcome(worker, 'failed', attempt.why)
            return
        self.wait_again(attempt)
        if worker.state == 'ready' and worker in self.scheduler.resources:
            self.fleet.blame(worker)
            self.fleet.rest(worker, f'it cannot start {attempt.name}: {attempt.why}')

    def _held(self, attempt):
        """Let the job wait again: another batch took its room first.  Measure the machine soon."""
        worker = attempt.machine
        if not self.policy.probes:          # then only an engine holds a job back
            self.fleet.note_outcome(worker, 'failed', worker.queue.refusal
                                    or 'another batch has the machine')
            return
        self.wait_again(attempt)
        if worker.machine.engine and worker.queue.is_full:      # after its room was given back
            self.scheduler.note_full(worker)
        elif not worker.machine.engine:     # an engine would have given its reason
            self.scheduler.update(worker, worker.capacity._replace(reserved=True))
            worker.measure(random.uniform(1, 3))    # else two batches may yield for ever

    def _lost(self, attempt):
        """React to the failure of a machine: the job is gone for certain, without a result."""
        worker, name = attempt.machine, attempt.name
        if self.interrupts:
            return
        if self.fleet.bound:
            self.fleet.note_outcome(worker, 'failed', f'the job is gone: {attempt.why}')
            return
        self._lost_by[name] += 1
        again = self._lost_by[name] <= self.policy.retries
        is_over = attempt.job.may_start and not again
        if is_over:
            attempt.result = JobResult(name, worker.name, -1, 0.0, attempt.gpus, None,
                                       *attempt.peaks_mb, self.client.journal.started(name))
            self._note(attempt.result)
        self.view.lost(attempt, again)
        if not is_over:
            self.wait_again(attempt)
        troubles = self.fleet.blame(worker)
        if troubles >= TROUBLES:
            self.fleet.rest(worker, f'it lost {troubles} in a row')

    def wait_again(self, attempt):
        """Let a job without a result wait again, unless its line is gone from the batch file."""
        worker, job = attempt.machine, attempt.job
        if job.name in self.wishes.cancelled:
            return
        if not job.may_start:
            self.jobs.pop(job.name, None)
            self.fleet.note_outcome(worker, 'absent', 'the job never started')
        elif self.policy.probes or not self.fleet.bound:
            self.scheduler.add(job, first=True)
        elif not self.interrupts:
            self.start(job, worker)

    def machine_changed(self, worker, before):
        """React to a machine that changed its state or was measured."""
        self.fleet.changed(worker, before)

    # The end

    def cancel(self):
        """Stop all jobs on all machines, within a time; return the Attempts that may still run.

        Their partial results are set aside.
        """
        self.wishes.moving.clear()          # nothing starts again
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
        unconfirmed = [attempt for attempt in running if LIFE[attempt.state].holds]
        for attempt in unconfirmed:
            self.view.unconfirmed(attempt)
        for attempt in running:
            # The journal has these as cancelled.  If the next run finds one ended on its machine,
            # the job has not failed: that run removes what is left of it, and starts it again.
            state = next((word for word in ('dropped', 'cancelled')
                          if word in LIFE[attempt.state].then), None)
            if state and self.client.journal.record(attempt.name)['state'] != 'ended':
                self.lives.move(attempt, state, kept=())
                self.client.results.set_aside(attempt.name)
        return unconfirmed

    def _wait(self, until, unfinished):
        self.client.wait_while(
            lambda: any(worker.state == 'ready' and unfinished(worker) for worker in self.workers),
            until, lambda: self.interrupts > 1)

    def wait(self, unfinished):
        """Wait while unfinished(worker) is true of a machine, or for an interrupt."""
        while not self.interrupts and any(map(unfinished, self.workers)):
            self.client.processes.wait(1)


def noted_of(job, machine):
    """Return the facts of a job's claim that its start does not need."""
    asked = job.allocation
    noted = {'variables': sorted(dict(machine.env))} if machine.env else {}
    if machine.wrap:
        noted['wrap'] = machine.wrap
    if asked:
        noted['asked'] = {'cores': asked.cores, 'memory_mb': asked.memory_mb, 'gpus': asked.gpus}
        if asked.gpus:
            noted['asked'].update(gpu_memory_mb=asked.gpu_memory_mb,
                                  gpu_utilization=asked.gpu_utilization,
                                  reserve_gpu=asked.reserve_gpu)
        if asked.reserve:
            noted['asked']['reserve'] = True
    return noted


# ---- Phrases: times, commands, last lines and tables, as people read them ----

LAST_BYTES = 20_000                 # the end of a file, in which last lines are searched
FEW_BYTES = 2**10                   # enough for most last lines
LATER_LINES = 8                     # that may follow the line of an exception and explain it
WIDEST_PADDED = 60                  # columns of a cell in a pipe; a wider one makes its row longer

ESCAPE = re.compile(                # the sequences that colour text or move the cursor
    r'\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?'
    r'|\[?[0-?]*[ -/]*\Z|[ -/]*[0-~])')
WORD = re.compile(r"""(?s)(?:[^\s'"\\]+|\\.|'[^']*'|"(?:[^"\\]|\\.)*"|['"\\])+""")
FLAG = re.compile(r'--?[A-Za-z][^=\s]*')
SETTING = re.compile('[A-Za-z_][A-Za-z_0-9]*=')      # of a variable, in front of a program
VALUE = re.compile('(?!--?[A-Za-z]|[&|;<>()]).*', re.DOTALL)

FRAMES = re.compile(r'Traceback \(most recent call last\):|  File ".*", line [0-9]')
RANK = re.compile(r'\[rank[0-9]+\]: ?')             # torch writes it in front of each line
# Lines at the end of a stderr that do not tell why a job failed, or tell it worse than others.
NOISE = re.compile(r'''(?x)
    [\W_]*
    | (During\ handling\ of|The\ above\ exception\ was)\ .*:
    | \[Previous\ line\ repeated\ .*
    | \s+at\ .* | \s+\.\.\.\ [0-9]+\ more           # Java's and node's frames
    | \s+warnings\.warn\(.* | .*resource_tracker.*
    | note:\ run\ with\ `RUST_BACKTRACE.*
    | \++\ .*                                       # set -x
    | (real|user|sys)\s+[0-9hms.,]+                 # time
    | Command\ exited\ with\ non-zero\ status\ [0-9]+
    | make(\[[0-9]+\])?:\ .*(Error\ [0-9]+|directory\ .*)
    | logout | exit
    | .*:\ (cannot\ set\ terminal\ process\ group.*|no\ job\ control\ in\ this\ shell)
    | (.*\ line\ [0-9]+:\s+[0-9]+\ )?Aborted\b.*    # the reason is in a line before
''')


def duration_of(seconds):
    """Return a duration as people read it: 41s, 4m 12s, 1h 02m, 3d 3h."""
    minutes, seconds = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f'{days}d {hours}h'
    if hours:
        return f'{hours}h {minutes:02}m'
    return f'{minutes}m {seconds:02}s' if minutes else f'{seconds}s'


def clock_of(moment, now):
    """Return a time in seconds since 1970 as 09:12, with the day if it is far from `now`."""
    how = '%H:%M' if abs(now - moment) < 86400 / 2 else '%Y-%m-%d %H:%M'
    return time.strftime(how, time.localtime(moment))


def last_line_of(path, since=-math.inf):
    """Return the last line of a file that is not blank, fit for a terminal; '' if there is none.

    since: return '' if the file did not change since this time, in seconds since 1970
    For a progress bar this is its last state.  A line of which only the end was read begins with …
    """
    lines, is_whole = read_last_lines(path, FEW_BYTES, since)
    if not is_whole and len(lines) < 2:
        lines, _ = read_last_lines(path, LAST_BYTES, since)
    return lines[-1].strip() if lines else ''


def told_by(path):
    """Return the line of a stderr that best tells why a job failed; '' if there is none."""
    return told_in(read_last_lines(path, LAST_BYTES)[0])


def told_in(lines):
    """Return the line that best tells why a job failed, from the last lines of a stderr.

    That is the last line that is not noise; of a Python traceback near the end the line of its
    exception, since long messages continue below it.
    """
    told, raised, in_frames = [], -math.inf, False
    for line in lines:
        line = RANK.sub('', line, count=1)
        if FRAMES.match(line):
            in_frames = True
        elif line and not (in_frames and line[0].isspace()):
            if in_frames:
                in_frames, raised = False, len(told)
            if not NOISE.fullmatch(line):
                told.append(line)
    if 0 < len(told) - raised <= LATER_LINES + 1:
        return told[raised].strip()
    return (told or lines or [''])[-1].strip()


def read_last_lines(path, size, since=-math.inf):
    """Return (the lines that are not blank in the last `size` bytes of a file, whether these bytes
    are the whole file).  A file that cannot be read has no lines.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)         # it may be a fifo
    except OSError:
        return [], True
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_mtime < since:
            return [], True
        start = max(info.st_size - size, 0)
        data = os.pread(fd, size, start)
    except OSError:
        return [], True
    finally:
        os.close(fd)
    return lines_shown(data, start > 0), start == 0


def lines_shown(data, is_rest=False):
    """Return the lines of an output that are not blank, as a terminal may show them.

    is_rest: the beginning is missing.  Text that \\r would overwrite is a line of its own.
    """
    if is_rest:                         # it may begin in the middle of a character
        data = data.lstrip(bytes(range(0x80, 0xc0)))
    text = codecs.getincrementaldecoder('utf-8')('replace').decode(data)
    if '\x1b' in text:
        text = ESCAPE.sub('', text)
    lines = re.split('[\r\n]', text)
    if is_rest and lines[0].strip():
        lines[0] = f'…{lines[0]}'
    shown = (line.replace('\t', ' ').replace('\b', '').rstrip() for line in lines)
    return [printable(line) for line in shown if line]


def differing_words(commands):
    """Return (the words that all these commands share, the rest of each), for a table of them.

    Words are as typed, and a value stays with its flag.  A … stands where other words interrupt the
    shared ones.  The rests of different commands differ.  Commands that begin with different
    programs share nothing: a common `echo` in the middle of them would help nobody.
    """
    split = [words_of(command) for command in commands]
    shared = split[0] if len(split) > 1 else []
    for words in split:
        shared = common_words(shared, words)
    rests, gaps, is_mixed = [], set(), False
    for words in split:
        rest, at = [], 0
        for word in words:
            if at < len(shared) and word == shared[at]:
                at += 1
            else:
                rest.append(word)
                gaps.add(at)
                is_mixed |= not (at or SETTING.match(word))
        rests.append(' '.join(rest))
    if is_mixed or len({*rests}) < len({*map(tuple, split)}):       # as for `cp a b` and `cp b a`
        shared, rests = [], [' '.join(words) for words in split]
    pieces = [f'… {word}' if at in gaps else word for at, word in enumerate(shared)]
    return ' '.join(pieces + ['…'] * (len(shared) in gaps)) if shared else '', rests


def words_of(command):
    """Return the words of a command as they were typed, each flag together with its value."""
    command = command.replace('\\\n', ' ')
    is_plain = not any(quote in command for quote in '\'"\\')
    words = []
    for word in map(printable, command.split() if is_plain else WORD.findall(command)):
        if words and FLAG.fullmatch(words[-1]) and VALUE.fullmatch(word):
            words[-1] = f'{words[-1]} {word}'
        else:
            words.append(word)
    return words


def common_words(some, others):
    """Return words that stand in both lists, in the same order."""
    rest = iter(others)
    if all(word in rest for word in some):
        return some
    import difflib
    blocks = difflib.SequenceMatcher(None, some, others, False).get_matching_blocks()
    return [word for start, _, size in blocks for word in some[start:start + size]]


IN_ASCII = str.maketrans({'…': '...', '━': '=', '╸': '>', '─': '-', '–': '-', '×': 'x'})


def in_ascii(text):
    """Return the text in ASCII, with escapes for all other characters."""
    return text.translate(IN_ASCII).encode('ascii', 'backslashreplace').decode()


def typed_for(path, *words):
    """Return the execute_batch command for this batch file and these words, quoted for a shell."""
    import shlex
    return shlex.join(['execute_batch', path, *words])


def rerun_of(names, batch):
    """Return the option that runs these jobs of a batch again, as short as possible."""
    ranges, words = [], []
    for name in names:
        end = name_in_batch(name, batch).removeprefix('.')
        if not end.isdigit():
            words.append(end)
    for number in sorted(int(end) for end in {name_in_batch(name, batch)[1:] for name in names}
                         if end.isdigit()):
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    numbers = [f'{low}' if low == high else f'{low} {high}' if high == low + 1 else
               f'{{{low}..{high}}}' for low, high in ranges]
    return f'--rerun {" ".join([*numbers, *words])}'


def name_in_batch(name, batch):
    """Return the part of a name after the batch's, as .57; any other name as it is."""
    return name[len(batch):] if batch and name.startswith(f'{batch}.') else name


def width_of(text):
    """Return how many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.category(c) in ('Mn', 'Me', 'Cf') else
               2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in text)


def cut(text, width, mark='…', keeps_end=False):
    """Return the text in at most `width` columns; the mark stands for the part that is cut off."""
    if len(text) <= width and text.isascii() or width_of(text) <= width:
        return text
    room, kept = width - len(mark), []
    if room < 0:
        return mark[:width]
    for character in reversed(text) if keeps_end else text:
        room -= width_of(character)
        if room < 0:
            break
        kept.append(character)
    if not keeps_end:
        return ''.join(kept) + mark
    while kept and not width_of(kept[-1]):      # an accent of the character that is cut off
        kept.pop()
    return mark + ''.join(reversed(kept))


def padded_at_words(text, width):
    """Return the text with blanks between words where a terminal of this width would break a word.

    The result is one line, so that people can copy a command whole.  A text with quotes does not
    change, since blanks between quotes may matter.
    """
    if width_of(text) <= width or '"' in text or "'" in text:
        return text
    first, *words = text.split(' ')
    shown, column = [first], width_of(first) % width
    for number, word in enumerate(words, 1):
        wide = 1 + width_of(word)
        # After a word that ends in the last column, the blank would begin the next line.
        if wide <= width and column + wide + (number < len(words)) > width:
            shown.append(' ' * (width - column) + word)
            column = wide - 1
        else:
            shown.append(f' {word}')
            column = (column + wide) % width
    return ''.join(shown)


def in_columns(rows, width=None, mark='…', keep_ends=()):
    """Yield each row, a list of cells, with its cells cut or padded to columns.

    width: the columns of the terminal, to which the widest cells are cut; None: cut nothing
    keep_ends: the numbers of the cells that are cut at their beginning
    """
    widths = [max(map(width_of, cells)) for cells in zip(*rows)]
    most = WIDEST_PADDED
    if width is not None:
        room = width - 2 * (len(widths) - 1)
        most = max((cap for cap in range(1, width + 1)
                    if sum(min(cap, wide) for wide in widths) <= room), default=1)
        spare = room - sum(min(most, wide) for wide in widths)
        widths = [min(wide, most) for wide in widths[:-1]] + [most + max(spare, 0)]
    for row in rows:
        cells = row if width is None else [
            cut(cell, wide, mark, number in keep_ends)
            for number, (cell, wide) in enumerate(zip(row, widths))]
        yield [*(cell + ' ' * (min(wide, most) - width_of(cell))
                 for cell, wide in zip(cells[:-1], widths)), cells[-1]]


# ---- Report: the only place that prints ----

LONGEST_PRINTED = 64 * 1024         # bytes of a line of output that are printed in one piece
PREFIXED_BYTES = 2**16              # of output that get prefixes at a time


def shown_command(command, gpus):
    """Return the command as it is shown; gpus: the value of CUDA_VISIBLE_DEVICES, or None."""
    prefix = '' if gpus is None else f'export CUDA_VISIBLE_DEVICES={gpus} && '
    return prefix + printable(command)


FRAME_S = 0.2                       # between two drawings of a screen
ECHO = len('^C')                    # columns kept free beside the area: a terminal prints ^C there.
                                    # A ^C on a new line would make a part of the area stay


class Screen:
    """A terminal on which rich draws: rows that scroll up, and below them an area that stays.

    area: a function of the width and the height that returns the Rows of the area
    """

    def __init__(self, file, area):
        from rich.console import Console
        from rich.live import Live
        self._console = Console(file=file, highlight=False, markup=False, emoji=False)
        self._area, self._rows, self._drawn_at = area, [], -math.inf
        self._live = Live(console=self._console, auto_refresh=False, transient=True,
                          redirect_stdout=False, redirect_stderr=False)
        self._live.start()
        self._console.show_cursor(True)     # rich hides it, and a kill -9 would leave it hidden

    @staticmethod
    def is_possible(*streams):
        """Tell whether these streams are a terminal that can be drawn on, and rich is installed."""
        if not all(stream.isatty() for stream in streams) or os.environ.get('TERM', 'dumb') in (
                'dumb', 'unknown', ''):
            return False
        try:
            import rich.console  # noqa: F401
        except ImportError:
            return False
        return True

    @functools.cached_property
    def _has_unicode(self):
        """Whether the terminal shows more than ASCII; cached: rich is slow and each row asks."""
        return not self._console.options.ascii_only

    def add(self, row):
        """Let a Row, or a text of any length, scroll up with the next drawing."""
        self._rows.append(row)
        if time.monotonic() - self._drawn_at >= FRAME_S:
            self.draw()

    def draw(self):
        """Draw new events, and the area as it is now."""
        from rich.console import Group
        from rich.text import Text
        with contextlib.suppress(OSError):      # rich would use $COLUMNS
            columns, lines = os.get_terminal_size(self._console.file.fileno())
            self._console.size = (columns or 80, lines or 24)
        width = self._console.width
        rows, self._rows, self._drawn_at = self._rows, [], time.monotonic()
        area = self._area(width - ECHO, self._console.height)
        self._live.update(Group(*(self._text(row, width - ECHO) for row in area)))
        for is_cut, group in itertools.groupby(rows, key=lambda row: isinstance(row, Row)):
            text = Text('\n').join(self._text(row, width) for row in group)
            if is_cut:
                self._console.print(text, no_wrap=True, overflow='crop')
            else:                       # the terminal wraps it, so that people can copy it whole
                self._console.print(text, soft_wrap=True)
        if not rows:
            self._live.refresh()

    def close(self):
        """Remove the area; the rows that scrolled stay."""
        self._area = lambda width, height: ()
        self.draw()
        self._live.stop()

    def _text(self, row, width):
        """Return a Row, or a text, as rich draws it; a Row is fitted to the width."""
        from rich.text import Text
        if not isinstance(row, Row):
            style = 'yellow' if row.startswith('WARNING: ') else ''
            lines = (padded_at_words(self._shown(line), width) for line in row.split('\n'))
            return Text('\n'.join(lines), style)
        left, right = self._shown(row.left), self._shown(row.right)
        room = max(width - 1 - (width_of(right) + 2 if right else 0), 0)
        left = cut(left, room, self._shown('…'))
        if right:
            left += ' ' * (room - width_of(left)) + '  ' + right
        return Text(cut(left, width - 1, ''), row.style, no_wrap=True, overflow='crop')

    def _shown(self, text):
        """Return the text without control characters, and in ASCII on a terminal of ASCII."""
        return printable(text) if self._has_unicode else in_ascii(printable(text))


class Row(NamedTuple):
    """A line of a screen that is cut to its width, first at the end of its left part."""
    left: str
    right: str = ''
    style: str = ''


def with_gpus(machine, gpus):
    """Return 'lab2 GPU 1'.  gpus: the value of CUDA_VISIBLE_DEVICES, or None."""
    numbers = gpus_of(gpus)
    return machine if not numbers else (
        f'{machine} GPU{"s" * (len(numbers) > 1)} {",".join(map(str, numbers))}')


def shortened(machine):
    """Return the name of a machine in at most 20 columns; of a path its last part."""
    short = re.sub(r'\.yaml$', '', os.path.basename(machine)) or machine
    return short if len(short) <= 20 else f'{short[:12]}…{short[-7:]}'


class Reporter:
    """Events on stdout, one a line; diagnostics on stderr.  On a terminal, a Screen has both."""

    def __init__(self, verbose=False, out=None, err=None, all_on_stderr=False):
        self._err, self.verbose = err or sys.stderr, verbose
        self._out = self._err if all_on_stderr else out or sys.stdout
        self._screen = None
        self._unread = {}           # stream without a reader -> errno of the last write
        self.trouble = ''           # or why stdout cannot be written

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
        """Print bytes on stdout or stderr, 'out' or 'err'; on a Screen as lines of text."""
        stream = self._out if stream == 'out' else self._err
        if self._screen:
            for line in data.decode('utf-8', 'replace').splitlines():
                self._print(stream, printable(line))
            return
        try:
            stream.flush()
            stream.buffer.write(data)
            stream.buffer.flush()
        except OSError as error:
            self._silence(stream, error)

    def tint(self, text, number):
        """Return the text in the colour of this number, on a terminal."""
        return self._coloured(text, 31 + number % 6)

    def sent(self, machine, stage):
        """Print that the files of a Stage are on the machine."""
        files, size = stage.amount
        left_out = dict.fromkeys((*stage.copy.left_out, *stage.link.left_out))
        note = f' (left out: {", ".join(left_out)})' if left_out else ''
        took_s = time.monotonic() - stage.began
        time_text = f' in {duration_of(took_s)}' if took_s >= 1 and not stage.small else ''
        self.note(f'{machine}: sent {count_of(files, "file")}, {size_of(size)}{time_text}{note}')

    def left(self, machine, name, text):
        """Print that a job ended, but left these processes running."""
        self.note(f'{machine}: {name} has ended, but it left processes running: {text}')

    def survivors(self, machine, pids):
        """Print that these processes of the machine could not be stopped."""
        self.note(f'{machine}: could not stop process {pids}')

    def unconfirmed(self, machine, name):
        """Print that a job was told to stop, and that it may still run."""
        self.note(f'{name}: may still run on {machine}. The next run of the same '
                  'command checks that')

    def others(self, machine, word, jobs):
        """Print that a machine has these OtherJobs.  word: its word for --machines."""
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
        """Print that a job was started.  gpus: the value of CUDA_VISIBLE_DEVICES, or None."""
        self.line(f'{word}: {job.name};  {shown_command(job.command, gpus)}')

    def running(self, name, machine, since):
        """Print that a job of an earlier run runs.  since: when it was started, or None."""
        since = f' since {clock_of(since, time.time())}' if since else ''
        self.note(f'running: {name} on {machine}{since}')

    def ended(self, job, exit_code):
        """Print that a job ended."""
        self.line(f'{"failed" if exit_code else "finished"}: {job.name}; {printable(job.command)}')

    def row(self, left, right='', style=''):
        """Show a Row on the Screen, if one is open."""
        if self._screen:
            self._on_screen(self._screen.add, Row(left, right, style))

    def finding(self, mark, text):
        """Print a finding of a check; its mark, ok, note or WRONG, is a tick on a terminal."""
        tick, code = {'ok': ('✓', 32), 'note': ('!', 33), 'WRONG': ('✗', 31)}[mark]
        can_show = self._out.isatty() and self.legible(tick) == tick
        self.line(f'  {self._coloured(tick, code) if can_show else mark.ljust(5)} {text}')

    def paint(self, text, share):
        """Return the text in green, yellow or red by the share that is free, on a terminal."""
        return self._coloured(text, 32 if share > 0.5 else 33 if share > 0.1 else 31)

    def alarm(self, text):
        """Return the text in red, on a terminal."""
        return self._coloured(text, 31)

    def _coloured(self, text, code):
        plain = (not self._out.isatty() or os.environ.get('NO_COLOR')
                 or os.environ.get('TERM') == 'dumb')
        return text if plain else f'\x1b[{code}m{text}\x1b[m'

    @property
    def columns(self):
        """The columns of the terminal on stdout; None if there is none."""
        return self._size[0]

    @property
    def rows(self):
        """The lines of the terminal on stdout; None if there is none."""
        return self._size[1]

    @property
    def _size(self):
        if not self._out.isatty():
            return None, None
        try:
            columns, rows = os.get_terminal_size(self._out.fileno())
        except OSError:
            columns, rows = 0, 0
        return columns or 80, rows or 24        # some terminals do not know their size

    @property
    def mark(self):
        """The mark for text that is cut off."""
        return self.legible('…')

    def legible(self, text):
        """Return the text with escapes for the characters that the encoding of stdout lacks."""
        try:
            if not text.isascii():
                text.encode(self._out.encoding or 'utf-8')
        except UnicodeEncodeError:
            return in_ascii(text)
        return text

    def show(self, lines, again):
        """Print the lines; `again`: on a terminal, in the place of the former lines."""
        if again and self._out.isatty():
            self._out.write('\x1b[H\x1b[2J')
        for line in lines:
            self.line(line)

    @property
    def can_draw(self):
        """Tell whether there is a terminal to draw on."""
        return Screen.is_possible(self._out, self._err)

    def open_screen(self, area):
        """Draw on the terminal from now on.  area: see Screen."""
        self._screen = Screen(self._err, area)

    @property
    def has_screen(self):
        """Tell whether a Screen is open."""
        return self._screen is not None

    def draw(self):
        """Draw the present state on the terminal."""
        if self._screen:
            self._on_screen(self._screen.draw)

    def close_screen(self):
        """Stop drawing."""
        screen = self._screen
        if screen:
            self._on_screen(screen.close)
        self._screen = None

    def _on_screen(self, act, *args):
        try:
            act(*args)
        except OSError as error:    # the terminal is gone
            self._screen = None
            self._silence(self._err, error)

    def _print(self, stream, text):
        if self._screen:
            self._on_screen(self._screen.add, text)
            return
        try:
            stream.write(text + '\n')
            stream.flush()
        except OSError as error:    # as in `| head`, or on a full disk: the run continues
            self._silence(stream, error)
        except UnicodeEncodeError:
            stream.write(in_ascii(text) + '\n')
            stream.flush()

    @property
    def nobody_reads(self):
        """Tell whether stdout or stderr has no reader."""
        return bool(self._unread)

    def move_to_terminal(self):
        """Let the terminal take the place of streams without a reader; tell if there are any."""
        for stream in (self._out, self._err):
            if has_no_reader(stream.fileno()):
                self._unread[stream] = errno.EPIPE
        gone = [stream for stream, number in self._unread.items() if number == errno.EPIPE]
        try:
            with open('/dev/tty', 'wb') as terminal:
                for stream in gone:
                    os.dup2(terminal.fileno(), stream.fileno())
                    del self._unread[stream]
        except OSError:
            return False
        return bool(gone)

    def _silence(self, stream, error):
        self._unread[stream] = error.errno
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        if stream is self._out and error.errno not in (errno.EPIPE, errno.EIO):
            self.trouble = reason_of(error)
            self.warning(f'stdout cannot be written: {self.trouble}')


def has_no_reader(fd):
    """Tell whether a file descriptor is a pipe without a reader."""
    import select
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def flush_streams():
    """Write out everything that was printed."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


class OwnStreams:
    """The standard streams of this client, to which a command's output is written unchanged.

    shown: {'out' or 'err': how many first bytes were written before: `write` skips these}
    passed: {'out' or 'err': how many bytes came to `write`, with those that it skipped}
    """

    def __init__(self, processes, shown=None):
        self._left_out = {'out': 0, 'err': 0, **(shown or {})}
        self.passed = {'out': 0, 'err': 0}
        self.nobody_reads = False        # the reader of stdout or stderr is gone
        self.trouble = ''               # or why it cannot be written
        self._processes = processes

    def write(self, stream, data):
        """Write all data, even to a slow reader; after an interrupt only bytes it takes at once."""
        self.passed[stream] += len(data)
        passed_over = min(self._left_out[stream], len(data))
        self._left_out[stream] -= passed_over
        data = data[passed_over:]
        try:
            if not self.nobody_reads:
                self._processes.write_out(1 if stream == 'out' else 2, data)
        except OSError as error:
            self.nobody_reads = True
            if error.errno != errno.EPIPE:
                self.trouble = f'its std{stream} cannot be written here: {reason_of(error)}'
            self._processes.wake()

    def flush(self):
        """Do nothing: `write` keeps no bytes back."""


class Prefixer:
    """The output of a command on one machine, in whole lines that begin with the machine's name."""

    def __init__(self, reporter, head):
        self._reporter, self._head = reporter, head.encode() + b' '
        self._rest = {'out': b'', 'err': b''}

    def write(self, stream, data):
        """Print the lines that these bytes complete; print very long lines in parts."""
        for start in range(0, len(data), PREFIXED_BYTES):       # an empty line takes 60 bytes here
            piece = data[start:start + PREFIXED_BYTES]
            *lines, rest = (self._rest[stream] + piece).split(b'\n')
            if len(rest) > LONGEST_PRINTED:
                lines, rest = [*lines, rest], b''
            self._rest[stream] = rest
            self._print(stream, lines)

    def flush(self):
        """Print the rest, which has no end of line."""
        for stream, rest in self._rest.items():
            self._print(stream, [rest] if rest else [])
        self._rest = {'out': b'', 'err': b''}

    def _print(self, stream, lines):
        # Of the states that a progress bar drew over each other, print the last.
        shown = [line.rstrip(b'\r').rpartition(b'\r')[2] for line in lines]
        if shown:
            self._reporter.raw(stream, b''.join(self._head + line + b'\n' for line in shown))


# ---- Lines: which jobs of a batch file an earlier run has run ----

class Lines(NamedTuple):
    """Lines of a batch file, by state in the journal; each Job has the name of its results."""
    waiting: tuple                  # Jobs to run
    begun: tuple                    # Jobs that an earlier run started, and that are not collected
    done: tuple                     # Jobs that have results
    gone: tuple                     # Jobs that were started, but whose line is gone from the file
    left: tuple                     # names of results whose line is gone
    usual: dict                     # name of a Job's results -> its name by its line, if different

    @property
    def jobs(self):
        """All Jobs, in the order of the file."""
        return sorted((*self.waiting, *self.begun, *self.done), key=lambda job: job.line)


def match_lines(jobs, batch, results):
    """Return the Lines: match Jobs to earlier results by their commands, not by their numbers.

    jobs: None if the batch file is gone: then those that have started
    batch: the stem of the names of its jobs.

    A line without results is to be run.  If another command's results have its name, it gets the
    next free name: NAME-2.
    """
    journal = results.journal
    known = journal.jobs
    results.present.look()
    jobs = started_jobs(batch, known) if jobs is None else jobs
    found, unmatched = find_results(jobs, batch, results)
    taken = set()

    def is_taken(name, job):
        return (name in taken or journal.is_begun(name) or results.exists(name)
                or name != job.name and name in found)

    waiting, begun, done, usual = [], [], [], {}
    for job in jobs:
        name = found[job.name]
        if name:
            whose = begun if journal.is_begun(name) else done
            whose.append(job if name == job.name else job._replace(name=name))
        elif job.name not in known and results.exists(job.name):        # of an unknown command
            name = job.name
            done.append(job)
        else:
            name = name_to_run(job, known, functools.partial(is_taken, job=job))
            taken.add(name)
            waiting.append(job._replace(name=name))
        if name != job.name:
            usual[name] = job.name
    left = [name for name in unmatched if is_of_batch(name, known[name], batch)]
    gone = [Job(name, known[name]['command'], 0, None, None, as_paths(known[name].get('backwards')))
            for name in left if journal.is_begun(name)]
    return Lines(*map(tuple, (waiting, begun, done, gone)),
                 tuple(name for name in left if not journal.is_begun(name)), usual)


def started_jobs(batch, known):
    """Return the Jobs of a batch that have started, with the line that their names tell.

    known: {name: its record}
    """
    names = [name for name, record in known.items()     # NAME~1 has been run again
             if is_of_batch(name, record, batch) and '~' not in name]
    found = [re.fullmatch(re.escape(batch) + r'\.([0-9]{1,9})', name) for name in names]
    return [Job(name, known[name]['command'], int(match[1]) if match else 0, None, None,
                as_paths(known[name].get('backwards')), known[name].get('own') or '')
            for name, match in zip(names, found)]


def find_results(jobs, batch, results):
    """Return ({a job's name by its line: the name of its results, or None}, [unmatched names]).

    A line matches results of the same command.  Files and hardware that the line itself asks for
    must be the same.  Those of the batch may differ: more memory for all lines does not run all of
    them again.  First each line gets the results with its own number; the others are matched in
    the order of the journal, so that each of several equal lines has its own.
    """
    known = results.journal.jobs
    found = dict.fromkeys(job.name for job in jobs)

    def has_results(name):
        return results.journal.is_begun(name) or results.is_done(name)

    def fits(job, name):
        return known[name]['command'] == job.command and known[name].get('own', job.own) == job.own

    for job in jobs:
        if job.name in known and fits(job, job.name) and has_results(job.name):
            found[job.name] = job.name
    unmatched = dict.fromkeys(name for name in known if not found.get(name) and has_results(name))
    by_command = collections.defaultdict(list)
    for name in unmatched:
        if is_of_batch(name, known[name], batch):
            by_command[known[name]['command']].append(name)
    for job in jobs:
        names = () if found[job.name] else by_command.get(job.command, ())
        name = next((name for name in names if fits(job, name)), None)
        if name:
            names.remove(name)
            found[job.name] = name
            del unmatched[name]
    return found, list(unmatched)


def former_name(lines, batch, results):
    """Return a sentence if most of the lines have results as another batch, whose file is gone; ''
    otherwise, and if this batch has results.  The file was probably renamed.
    """
    if lines.done or lines.begun or lines.gone or lines.left:
        return ''
    wanted = {(job.command, job.own) for job in lines.waiting}
    found = collections.defaultdict(set)
    for name, record in results.journal.jobs.items():
        line = record['command'], record.get('own') or ''
        if line in wanted and record.get('batch') not in (None, batch, 'stdin') and (
                results.is_done(name)):
            found[record['batch']].add(line)
    other = max(found, key=lambda name: len(found[name]), default='')
    count = sum((job.command, job.own) in found[other] for job in lines.waiting)
    # A file in a folder: sub/grid.sh is the batch sub_grid.sh.
    paths = (other.replace('_', '/', parts) for parts in range(other.count('_') + 1))
    if 2 * count <= len(lines.waiting) or any(map(os.path.exists, paths)):
        return ''
    return (f'{count_of(count, "line")} {"has" if count == 1 else "have"} results as {other}, and '
            f'{"runs" if count == 1 else "run"} again as {batch}. To skip these lines, give the '
            'batch file its former name')


def name_to_run(job, known, is_taken):
    """Return the name of a job without results: its own, or the next free one, as free_name does.

    If an attempt of its command was cancelled or lost, it is the name of that attempt.
    known: {name: its record}
    """
    fallback = free_name(job.name, is_taken)
    for number in itertools.count(1):
        name = job.name if number == 1 else f'{job.name}-{number}'
        record = known.get(name)
        if record is None:
            return fallback
        if (record['command'] == job.command and record.get('own', job.own) == job.own
                and not is_taken(name)):
            return name


def free_name(name, is_taken):
    """Return the first of NAME, NAME-2, NAME-3, … for which is_taken(name) is false."""
    names = itertools.chain([name], (f'{name}-{number}' for number in itertools.count(2)))
    return next(itertools.filterfalse(is_taken, names))


def is_of_batch(name, record, batch):
    """Tell whether the journal's record is of a job of this batch; old records name no batch."""
    return (record['batch'] == batch if 'batch' in record else
            bool(re.fullmatch(re.escape(batch) + r'\.[0-9]+', name)))


def as_paths(value):
    """Return the paths to fetch as the journal has them: a list, or None."""
    return None if value is None else tuple(value)


# ---- Views: what a person sees of a run ----

EXPLAIN_S = 5.0             # without a start, before the view prints why nothing starts


class Elsewhere(NamedTuple):
    """A machine on which an earlier run began a job, and which this run does not use."""
    address: str
    word: str                       # its name in that run; its address if that names another now


class Plan(NamedTuple):
    """The lines of a batch file, and what a run will do with each."""
    lines: Lines
    failed_before: tuple            # JobResults of jobs that failed in an earlier run
    elsewhere: dict                 # name of a begun job -> Elsewhere
    again: tuple = ()               # names of jobs that have results, and are to run once more


def plan_lines(lines, results, machines):
    """Return the Plan for the Lines on these Machines."""
    records = [(job, results.journal.record(job.name)) for job in (*lines.begun, *lines.gone)]
    addresses = {machine.address for machine in machines}
    taken = {None, *(machine.word for machine in machines)}     # the word may have a new address
    elsewhere = {}
    for job, known in records:
        address, word = known['machine'], known.get('where')
        if address not in addresses:
            elsewhere[job.name] = Elsewhere(address, address if word in taken else word)
    failed_before = []
    for job in lines.done:
        known = results.journal.record(job.name)
        if known.get('exit_code'):
            failed_before.append(JobResult(
                job.name, known.get('where') or known['machine'], known['exit_code'], 0.0))
    return Plan(lines, tuple(failed_before), elsewhere)


def warnings_of(plan):
    """Yield (Job, warning) for each Job that is not run because an earlier run has started it."""
    lines = plan.lines
    cut_off = [job for job in lines.begun if job.name in plan.elsewhere]
    for job in sorted((*cut_off, *lines.done), key=lambda job: job.line):
        if job.name in plan.elsewhere:
            yield job, (f'WARNING: line {job.line} was started on {plan.elsewhere[job.name].word} '
                        'by an earlier run. Name that machine too, to collect the results')
        else:
            other = f' (done as {job.name})' if job.name in lines.usual else ''
            yield job, (f'WARNING: job results already exists for line {job.line}{other}, skipping '
                        'evaluation: delete if you wish to rerun')


def skipped_in_short(plan, batch, journal):
    """Yield the sentence that counts the lines with results, and names the option to run them.

    batch: how the names of its jobs begin
    """
    done, failed = plan.lines.done, plan.failed_before
    names = [job.name for job in done if job.name in journal.jobs]      # --rerun refuses others
    if done:
        which = f' ({len(failed)} of them failed: --rerun-failed)' if failed else (
            f'. To run {"it" if len(done) == 1 else "them"} again: {rerun_of(names, batch)}'
            if len(names) == len(done) else '')
        yield (f'skipped: {count_of(len(done), "line")} that '
               f'{"has" if len(done) == 1 else "have"} results{which if len(which) < 100 else ""}')


def older_files(plan, results, files, apart):
    """Return {'changed', 'deleted' or 'new': (Jobs that had other files, the paths that differ)}.

    Each Job is in the first of the three that fits.  New and deleted files are often tables or
    logs, which no job reads.

    files: the Files that are sent; apart: paths that are not compared: of the batch file, whose
    lines are, and of machine files
    """
    @functools.cache
    def changes(forwards, digest):
        now = files.manifest(forwards)
        if digest in (None, now.digest):
            return '', ()
        before = results.sent.get(digest)
        if not before:
            # An older version of this program, with other digests, kept its lists in files/.
            is_known = os.path.exists(os.path.join(results.inner, 'files', f'{digest}.json'))
            return ('', ()) if is_known else ('changed', {'(not recorded)'})
        paths = set(now.changed(before)) - apart
        old = paths & before.files.keys()
        deleted = old - now.files.keys()
        return next(((kind, found) for kind, found in (
            ('changed', old - deleted), ('deleted', deleted), ('new', paths)) if found), ('', ()))

    groups = {kind: ([], set()) for kind in ('changed', 'deleted', 'new')}
    for job in (*plan.lines.done, *plan.lines.begun):
        kind, paths = changes(job.forwards, results.journal.record(job.name).get('files'))
        if kind:
            jobs, differing = groups[kind]
            jobs.append(job)
            differing |= paths
    return groups


def file_notes(plan, results, files, path, run):
    """Yield a sentence on jobs that had older files, and others on jobs that had more or fewer.

    plan, results, files: those of older_files; path: of the batch file; run: the Run
    """
    words = [worker.machine.word for worker in run.workers]
    groups = older_files(plan, results, files, {os.path.normpath(file) for file in (
        path, *words, *(f'{word}.yaml' for word in words))})
    for kind, (jobs, paths) in groups.items():
        if not jobs:
            continue
        names = names_of(sorted(map(printable, paths)))
        if kind != 'changed':
            yield (f'{kind} files since: {names}: {count_of(len(jobs), "line")} ran '
                   f'{"without" if kind == "new" else "with"} them')
            continue
        ended = [job.name for job in jobs if not results.journal.is_begun(job.name)]
        running = len(jobs) - len(ended)
        parts = [f'{count_of(len(ended), "line")} that {"has" if len(ended) == 1 else "have"} '
                 'results had the older files'] * bool(ended)
        parts += [f'{count_of(running, "running line")} {"has" if running == 1 else "have"} '
                  'the older files'] * bool(running)
        again = f'. To run them again: {rerun_of(ended, run.batch)}' if ended else ''
        yield f'files changed since: {names}: {" and ".join(parts)}{again}'


class View:
    """A Run calls these methods.  Each view prints what its user needs; this one prints nothing."""

    run = None                              # the Run, which sets this

    def changed(self, attempt, before):
        """The state of an attempt has changed; before: the previous state."""

    def lost(self, attempt, again):
        """A machine lost a job, which has no result; again: the run starts it again."""

    def unconfirmed(self, attempt):
        """A job was told to stop, and may still run."""

    def came(self, worker):
        """Contact with a machine was made for the first time."""

    def came_back(self, worker):
        """Contact was made again."""

    def measured(self, worker):
        """A machine has reported its free resources again."""

    def away(self, worker):
        """Contact with a machine was lost; its worker reconnects."""

    def failed(self, worker, attempts):
        """A machine cannot be used, or not any more; these attempts may still run on it."""

    def after_failure(self, worker):
        """A machine failed, and is no longer among the resources."""

    def given_up(self, worker, jobs):
        """--lost-after has passed for this number of jobs."""

    def rests(self, worker, why):
        """A machine that failed jobs gets no more jobs for a while."""

    def parted(self, worker):
        """The run no longer needs a machine."""

    def sink(self, worker):
        """Return the function to call with ('out' or 'err', bytes) of its jobs' output, or None."""

    def others(self, worker, jobs):
        """A machine has these OtherJobs."""

    def progress(self):
        """The run is about to wait."""

    def stuck(self):
        """Jobs are left that no machine can run."""

    def ask(self):
        """Ctrl-C was pressed: return whether the view asks what to do.  In a signal handler."""
        return False

    def unanswered(self):
        """The run waits no longer; some machines may not have answered."""


class SpeakingView(View):
    """A view with a Reporter."""

    def __init__(self, reporter):
        self._report = reporter

    def unconfirmed(self, attempt):
        """Name the job and its machine."""
        self._report.unconfirmed(attempt.machine.name, attempt.name)

    def others(self, worker, jobs):
        """Print how many there are, and how to look at them."""
        self._report.others(worker.name, worker.machine.word, jobs)


class QuietView(SpeakingView):
    """Prints only errors: for --cancel, and where no job is started."""

    def failed(self, worker, attempts):
        """Print why the machine cannot be used."""
        self._report.note(f'{worker.name}: cannot be used: {sentence(worker.why)}')


class EarlierView(QuietView):
    """The output of execute_batch --earlier."""

    def __init__(self, reporter):
        super().__init__(reporter)
        self.found = {}                         # worker -> its OtherJobs

    def others(self, worker, jobs):
        """Note them; `show` prints them when all machines have answered."""
        self.found[worker] = jobs

    def changed(self, attempt, before):
        """Print the name of a job that was collected."""
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
        """Print what --earlier did; return the exit status: `status` if all machines answered."""
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


# What the frameworks print when a GPU has no memory left -> the reason as it is shown.
GPU_IS_FULL = {'CUDA out of memory': 'CUDA out of memory',
               'CUDA_ERROR_OUT_OF_MEMORY': 'CUDA out of memory',
               'CUBLAS_STATUS_ALLOC_FAILED': 'CUDA out of memory',
               'RESOURCE_EXHAUSTED: Out of memory': 'GPU out of memory'}
SHELL_FAILED = {126: 'a command could not be executed', 127: 'a command was not found'}
# The remote runner writes these to stderr.
KERNEL_KILLED = 'ssh-scheduler: the kernel killed'
ENDED_BY_CLUSTER = re.compile(
    "ssh-scheduler: (the job (?:ran out of memory|was cancelled.*)|the job's shell .* was killed)")


def failure_words(exit_code, machine, lines):
    """Return why a job failed, in words.  lines: the last ones of its stderr, see lines_shown."""
    for phrase, words in GPU_IS_FULL.items():
        if any(phrase in line for line in lines):
            return words
    told = told_in(lines)
    if exit_code < 0:
        return f'{machine} lost the job'
    if exit_code == 124 and told.startswith('ssh-scheduler: '):
        return told.partition(': ')[2]
    if exit_code == 137 and told.startswith(KERNEL_KILLED):
        return f'{machine} ran out of memory (signal 9)'
    by_cluster = ENDED_BY_CLUSTER.match(told) if exit_code in (137, 143) else None
    if by_cluster:
        return by_cluster[1]
    if exit_code in SHELL_FAILED:
        said = re.sub(r'^\S*: line [0-9]+: ', '', told)
        return f'exit code {exit_code}: {said or SHELL_FAILED[exit_code]}'
    if 128 < exit_code < 128 + signal.NSIG:
        with contextlib.suppress(ValueError):
            name = signal.Signals(exit_code - 128).name[3:]
            return f'killed by signal {exit_code - 128} ({name})'
    return told or f'exit code {exit_code}, empty stderr'


def names_in_short(names):
    """Return 'grid.sh.8, .9, .10 and 153 more'."""
    stem = names[0].rpartition('.')[0]
    shown = [names[0], *(name_in_batch(name, stem) for name in names[1:3])]
    return ', '.join(shown) + (f' and {len(names) - 3:,} more' if len(names) > 3 else '')


FATES = ('finished', 'failed', 'skipped', 'cancelled', 'not started', 'not collected')


class Summary:
    """The last lines of execute_batch.  options: those of the command."""

    def __init__(self, run, reporter, results, plan, options):
        self._run, self._report, self._results, self._plan = run, reporter, results, plan
        self._options = options

    def show(self, wall_s, advice):
        """Print the summary; return the exit status.  advice: lines for the next time."""
        run, report = self._run, self._report
        counted = self.counts()
        before = self._plan.failed_before
        unknown = self._not_collected()
        ended = sum(map(self._has_ended, unknown))      # the lines above have them as finished
        more = {'skipped': f' ({len(before)} of them failed)' if before else '',
                'not collected': f' ({ended} of them ended)' if ended else ''}
        counts = [f'{counted[fate]} {fate}{more.get(fate, "")}' for fate in FATES
                  if counted[fate] or fate in ('finished', 'failed')]
        self._say_first()
        report.line(f'{"interrupted" if run.interrupts else "done"}: '
                    f'{count_of(len(run.jobs), "job")}: {", ".join(counts)}, '
                    f'{self._took(wall_s)}')
        fates = self._fates()               # a cancelled job may have run again since
        stopped = len({attempt.name for attempt in run.lives.all_of('cancelled', 'dropped')
                       if fates.get(attempt.name) == 'cancelled' and not attempt.never_began})
        if stopped:
            report.note(
                f'partial results of {count_of(stopped, "cancelled job")} are in '
                f'{self._results.inner}/cancelled. The same command runs these jobs from the start')
        if not run.interrupts:
            self._say_unused()
        self._say_failures()
        for text in advice:
            report.note(text)
        self._say_left()
        for name, machine in unknown.items() if not run.leaves else ():
            state = 'has ended' if self._has_ended(name) else 'may still run'
            what = ('name that machine, too,' if name in self._plan.elsewhere else
                    'run the same command again')
            report.line(f'{name}: {state} on {machine}: {what} to collect its results')
        if run.interrupts:
            return 130
        return int(bool(run.failures or before or unknown or counted['not started']
                        or counted['cancelled']))

    def _say_first(self):
        """Print the lines above the counts."""

    def _took(self, wall_s):
        return f'{wall_s:.1f} s'

    def _not_collected(self):
        """Return {name of each job that is not collected: the machine where it is or was}."""
        left = {attempt.name: attempt.machine for attempt in self._run.lives.all_of(
            *UNCOLLECTED, 'kept')}
        return {**{name: there.word for name, there in self._plan.elsewhere.items()}, **{
            name: worker.name if worker.was_ready else worker.machine.address
            for name, worker in left.items()}}

    def _has_ended(self, name):
        """Tell whether a job has ended, whose results are not here."""
        return self._results.journal.record(name).get('state') == 'ended'

    def counts(self, is_over=True):
        """Return how many jobs have each of the FATES.  Before the end 'not collected' counts the
        jobs that run or will be collected.
        """
        fates = self._fates()
        if not is_over:
            fates.update((name, 'failed' if result.exit_code else 'finished')
                         for name, result in self._run.ended.items())
        return collections.Counter(fates.values())

    def facts(self, is_over):
        """Return the values that Hooks pass on: the word of a variable -> its value."""
        counted = self.counts(is_over)
        return {'JOBS': len(self._run.jobs), 'RESULTS': os.path.abspath(self._results.folder),
                **{fate.upper().replace(' ', '_'): counted[fate] for fate in FATES}}

    def _fates(self):
        """Return {name of a job: its fate in the words of the summary}."""
        fates = dict.fromkeys(self._run.jobs, 'not started')
        cancelled = {attempt.name for attempt in self._run.lives.all_of('cancelled', 'dropped')}
        for fate, names in (
                ('skipped', [job.name for job in self._plan.lines.done]),
                # A cancelled job may have ended in a later attempt: the words below replace this.
                ('cancelled', (cancelled | self._run.wishes.cancelled) & self._run.jobs.keys()),
                ('failed', [job.name for job in self._run.failures]),
                ('finished', [name for name, result in self._run.ended.items()
                              if not result.exit_code]),
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

    def _say_unused(self):
        """Name the machines that could not be used: the messages about them are far above."""
        workers = self._run.workers
        if any(worker.was_ready for worker in workers):
            for worker in workers:
                if (worker.state == 'failed' and not worker.was_ready
                        and 'the same account' not in worker.why):
                    self._report.note(f'{worker.name}: was not used: {sentence(worker.why)}')


class Pace:
    """An estimate of how long the rest of a batch takes, from the jobs that have ended.

    A job is expected to take the median time of its kind on its machine.  If none of these has
    ended, the median of its kind on all machines counts, else that of all jobs.
    """

    LEAST = 3                   # jobs that must have ended before there is an estimate
    MOST = 3000                 # waiting jobs to simulate; for more, the time is scaled

    def __init__(self):
        self._took = collections.defaultdict(list)      # (Allocation, machine) -> seconds, sorted
        self._count = 0

    def ended(self, allocation, machine, seconds):
        """Note how long a job took on a machine."""
        self._count += 1
        for key in {(allocation, machine), (allocation, None), (None, None)}:
            bisect.insort(self._took[key], seconds)

    def left(self, running, waiting):
        """Return (least, most) seconds until all jobs have ended; None if that is unknown.

        running: [(Allocation, machine, its age in seconds)], whose places waiting jobs take
        waiting: {Allocation: how many jobs}
        """
        if self._count < self.LEAST or not running:
            return None
        total = sum(waiting.values())
        share = min(1.0, self.MOST / total) if total else 1.0
        places = []
        for index, (allocation, machine, age_s) in enumerate(running):
            typical = self._typical(allocation, machine)
            # A job that exceeds the typical time by a minute may take another minute, or an hour.
            heapq.heappush(places, (max(abs(typical - age_s), typical / 10), index, machine))
        longest = max(place[0] for place in places)
        for allocation, count in waiting.items():
            for _ in range(math.ceil(count * share)):
                free_s, index, machine = heapq.heappop(places)
                free_s += self._typical(allocation, machine)
                longest = max(longest, free_s)
                heapq.heappush(places, (free_s, index, machine))
        return tuple(longest / share * factor for factor in self._doubt())

    def _typical(self, allocation, machine):
        took = (self._took.get((allocation, machine)) or self._took.get((allocation, None))
                or self._took[None, None])
        return took[len(took) // 2]

    def _doubt(self):
        """Return the factors of the range: the median, give or take twice its standard error."""
        took = self._took[None, None]
        spread = took[len(took) * 3 // 4] - took[len(took) // 4]
        doubt = max(0.05, 2 * 0.93 * spread / max(took[len(took) // 2], 0.01) / len(took) ** 0.5)
        return max(1 - doubt, 0.5), min(1 + doubt, 3)


def range_of(least_s, most_s):
    """Return a rough time in few words: '5h–6h', '3m'."""
    for size, unit in ((86400, 'd'), (3600, 'h'), (60, 'm'), (1, 's')):
        if most_s >= 2 * size or unit == 's':
            low, high = round(least_s / size), math.ceil(most_s / size)
            return f'{low}{unit}–{high}{unit}' if 0 < low < high else f'{max(high, 1)}{unit}'


class Keys:
    """Reads single keys from the terminal on the standard input, until it is closed."""

    MEANT = {'d': 'd', 'c': 'c', '\r': '\r', '\n': '\r', '\x1b': '\r'}

    def __init__(self):
        import termios
        import tty
        self._before = termios.tcgetattr(0)
        tty.setcbreak(0, termios.TCSADRAIN)     # Ctrl-C still sends a signal

    @staticmethod
    def can_read():
        """Tell whether keys can be read: this program is in the foreground of a terminal."""
        try:
            return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
        except OSError:
            return False

    def read(self):
        """Return the next pressed key that has a meaning, in lower case; '' if there is none."""
        import select
        while self.can_read() and select.select([0], [], [], 0)[0]:
            data = os.read(0, 1)
            if not data:
                return '\r'                     # the terminal is gone
            key = self.MEANT.get(data.decode('latin-1').lower())
            if key:
                return key
        return ''

    def close(self):
        """Restore the terminal's settings, also from the background or if the terminal is gone."""
        import termios
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, self._before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


ANSWERS = ('  d      detach: this program ends, its jobs continue',
           '  c      cancel: stop the running jobs (or Ctrl-C again)',
           '  Enter  continue; until you answer, the batch continues')


class Question:
    """What should Ctrl-C do?  A key at the terminal answers.

    While the question is open, its view calls `answer` again and again.
    """

    def __init__(self, run):
        self._run = run
        self._keys = None       # of the terminal, while the question waits for an answer
        self.is_open = self._has_ended = False

    def ask(self):
        """Ask, if a person can answer; return whether it asks.  Runs in a signal handler."""
        if self.is_open or self._has_ended or not Keys.can_read():
            return False
        self.is_open = True
        return True

    def answer(self):
        """Do what the pressed key means; return that key, or '' if there is none yet."""
        if not self.is_open or self._run.interrupts:        # the second Ctrl-C is an answer, too
            self._close()
            return ''
        self._keys = self._keys or Keys()
        key = self._keys.read()
        if key:
            self._close()
        if key == 'd':
            self._run.leave()
        elif key == 'c':
            self._run.interrupts = 1
        return key

    def end(self):
        """Ask no more."""
        self._has_ended = True
        self._close()

    def _close(self):
        self.is_open, keys, self._keys = False, self._keys, None
        if keys:
            keys.close()


class PipedQuestion(Question):
    """The Question of a client whose stdout is a pipe or a file.

    The client writes to the terminal itself: in `| tee log`, Ctrl-C has ended tee, too.
    """

    POLL_S = 0.1                # between two looks at the keys
    SAID = {'d': 'The jobs keep running.', 'c': 'The jobs are being stopped.',
            '\r': 'The batch continues.'}
    NO_READER = (' Nothing reads its output any more, so the next lines appear here. (Ctrl-C also '
                 'ends tee, but not tee -i.)')

    def __init__(self, run, reporter):
        super().__init__(run)
        self._report = reporter

    def ask(self):
        """Ask, if a person can answer; return whether it asks.  Runs in a signal handler."""
        asks = super().ask()
        if asks:
            self._run.client.processes.call_later(0, self._show)
        return asks

    def _show(self):
        self._say('Ctrl-C: press a key:', *ANSWERS)
        self._await()

    def _await(self):
        key = self.answer()
        if self.is_open:
            self._run.client.processes.call_later(self.POLL_S, self._await)
        elif key in self.SAID:
            moves = key == '\r' and self._report.move_to_terminal()
            self._say(self.SAID[key] + self.NO_READER * moves)

    @staticmethod
    def _say(*lines):
        with contextlib.suppress(OSError), open('/dev/tty', 'w', encoding='utf-8') as terminal:
            terminal.write('\n' + ''.join(f'{line}\n' for line in lines))


class Board:
    """The part of a terminal below the events: machines that connect, files on their way, running
    jobs, the counts of the batch, and the time left.

    done: how many jobs have results already, and are not run
    question: shown instead of the counts while it is open
    """

    MOST_JOBS = 10              # running jobs shown
    PACE_S = 1.0                # between two estimates of the time left

    def __init__(self, run, done, question):
        self._run, self.done, self._question = run, done, question
        self._pace, self._left, self._left_at = Pace(), '', -math.inf
        self._since = {}        # connecting Worker, or Stage being sent -> when it was first seen
        self.shows_counts, self._has_ended = False, False

    def changed(self, attempt):
        """The state of an attempt has changed."""
        if attempt.state == 'ended' and attempt.result.wall_s:
            self._pace.ended(attempt.job.allocation, attempt.machine, attempt.result.wall_s)

    def end(self):
        """Show nothing any more."""
        self._has_ended = True
        self._question.end()

    def rows(self, width, height):
        """Return the Rows for a terminal of this size."""
        if self._has_ended:
            return []
        rows = [*self._machines(width), *self._jobs(min(self.MOST_JOBS, max(height // 2 - 4, 1)))]
        rows = rows[:max(height - 5, 1)]
        end = self._choices() if self._question.is_open else (
            [self._counts(width)] if self.shows_counts else [])
        return [Row('─' * (width - 1)), *rows, *end] if rows or end else []

    def _machines(self, width):
        """Yield a Row for each machine that is not connected, or that files are sent to."""
        now = time.monotonic()
        for worker in self._run.workers:
            if worker.state == 'connecting':
                since = self._since.setdefault(worker, now)
                yield Row(f'{shortened(worker.name)}: connecting',
                          duration_of(now - since))
            elif worker.state == 'away':
                yield Row(f'{shortened(worker.name)}: not connected',
                          duration_of(now - worker.away_since))
            elif worker.state == 'ready':
                for stage in worker.contact.stages.on_their_way:
                    since = self._since.setdefault(stage, now)
                    yield sending_row(worker.name, stage, now - since, width)

    def _jobs(self, most):
        """Yield a Row for each running job that wrote most recently, and one for the rest."""
        running = sorted(self._run.lives.all_of('running'), key=moved_at, reverse=True)
        most = most if len(running) <= most else most - 1
        shown = running[:most]
        names = [name_in_batch(attempt.name, self._run.batch) for attempt in shown]
        places = [with_gpus(shortened(attempt.machine.name), attempt.gpus) for attempt in shown]
        widths = [max(map(len, column), default=0) for column in (names, places)]
        for attempt, name, place in zip(shown, names, places):
            age = duration_of(self._age_s(attempt))
            yield Row(f'{name:{widths[0]}}  {place:{widths[1]}}  {age:>7}  {last_words(attempt)}')
        if len(running) > most:
            yield Row(f' … {len(running) - most} more')

    def _age_s(self, attempt):
        """Return how many seconds an attempt has run; 0 before its start was sent."""
        since = self._run.client.journal.started(attempt.name) if attempt.state in (
            'claimed', 'running', 'stopping') else None
        return time.time() - since if since else 0.0

    def _choices(self):
        """Return the Rows that ask what Ctrl-C should do."""
        counts = ', '.join(self._alive_and_waiting())
        return [Row(f'Ctrl-C: {counts}. Press a key:', '', 'bold'),
                *map(Row, ANSWERS)]

    def _alive_and_waiting(self):
        """Return how many jobs run, and how many wait, here or in the queue of a cluster."""
        run = self._run
        running = len(run.lives.all_of('claimed', 'running', 'stopping'))
        waiting = run.scheduler.waits + len(run.lives.all_of('placed'))
        queued = len(run.lives.all_of('queued'))
        return [f'{running} running', f'{waiting} waiting', *[f'{queued} queued'] * bool(queued)]

    def _counts(self, width):
        """Return the Row with the numbers of ended, running and waiting jobs, as far as it fits."""
        ended, failed = len(self._run.ended), len(self._run.failures)
        cancelled = len(self._run.wishes.cancelled)
        return counts_row(width, ended, len(self._run.jobs) - self.done, [
            f'{ended - failed} ok', f'{failed} failed', *self._alive_and_waiting(),
            *[f'{cancelled} cancelled'] * bool(cancelled)], self._time_left())

    def _time_left(self):
        """Return how long the rest may take, in words; '' if that is unknown."""
        now = time.monotonic()
        if now - self._left_at > self.PACE_S:
            running = [(attempt.job.allocation, attempt.machine, self._age_s(attempt))
                       for attempt in self._run.lives.all_of(*HOLDING)
                       if attempt.placement and attempt.state != 'queued']
            waiting = collections.Counter({
                allocation: len(jobs) for allocation, jobs in self._run.scheduler.kinds().items()})
            waiting.update(attempt.job.allocation for attempt in self._run.lives.all_of('queued'))
            left = self._pace.left(running, {} if self._run.halted else waiting)
            self._left = f'{range_of(*left)} left' if left else ''
            self._left_at = now
        return self._left


def counts_row(width, ended, total, words, left):
    """Return the Row of the counts, with a bar and the time that is left, as far as they fit."""
    for cells, said, right in ((22, words, left), (10, words, left), (0, words, left),
                               (0, words[:3], left), (0, words, ''), (0, words[1:3], ''),
                               (0, words[1:2], ''), (0, [], '')):
        text = f' {bar_of(ended, total, cells)}{ended}/{total}   {"  ".join(said)}'.rstrip()
        if len(text) + len(right) + 3 < width:
            break
    return Row(text, right)


def bar_of(done, total, cells):
    """Return a bar that is `cells` characters wide, and two blanks; '' for a bar of no width."""
    full = round(2 * cells * done / max(total, 1))
    bar = ('━' * (full // 2) + '╸' * (full % 2)).ljust(cells, '─')
    return f'{bar}  ' if cells else ''


def sending_row(name, stage, since_s, width):
    """Return the Row of a Stage that is being sent.  since_s: how long already, in seconds."""
    files, size, sent = *stage.amount, stage.sent_bytes()
    text = f'{shortened(name)}: sending {count_of(files, "file")}, {size_of(size)}'
    if sent is None or not size:
        return Row(text, duration_of(since_s))
    share = min(sent / size, 1)
    rate = sent / max(since_s, 0.1)
    left = f'  {duration_of((size - sent) / rate)} left' if 0.01 <= share < 1 else ''
    for right in (f'{share:.0%}  {size_of(rate)}/s{left}', f'{share:.0%}{left}', f'{share:.0%}'):
        room = width - 1 - len(text) - len(right) - 4
        if room >= -2:
            break
    bar = bar_of(share, 1, min(room, 20) if room >= 8 else 0)
    return Row(f'{text}  {bar}'.rstrip(), right)


def moved_at(attempt):
    """Return when the newest output of an attempt arrived here."""
    return max((stream.moved for stream in attempt.streams.values()), default=0.0)


def last_words(attempt):
    """Return the last line of an attempt's newest output, as far as it has arrived here."""
    streams = sorted(attempt.streams.values(), key=lambda stream: stream.moved)
    lines = lines_shown(streams[-1].tail) if streams else ()
    return lines[-1].strip() if lines else ''


class TerminalSummary(Summary):
    """The summary on a terminal: failed jobs grouped by reason, and what to type next."""

    @functools.cached_property
    def _reasons(self):
        """Why jobs failed, the most frequent reason first: [(words, names of the jobs)]."""
        groups = {}                     # reason with its numbers as 0 -> (the reason, [job name])
        lines = {name: job.line for name, job in self._run.jobs.items()}
        for result in sorted((*self._run.failures, *self._plan.failed_before),
                             key=lambda result: lines.get(result.name, 0)):
            words = failure_words(result.exit_code, result.machine,
                                  self._results.last_lines(result.name, 'err'))
            key = re.sub(r'[0-9]+', '0', words)
            groups.setdefault(key, (words, []))[1].append(result.name)
        return sorted(groups.values(), key=lambda group: -len(group[1]))

    def _say_first(self):
        """Show the failed jobs by reason."""
        for words, names in self._reasons:
            left = f'failed {len(names):6,} × {words}'
            more = f' and {len(names) - 1:,} more' if len(names) > 1 else ''
            for right in (names_in_short(names), names[0] + more,
                          name_in_batch(names[0], self._run.batch) + more):
                if width_of(left) + len(right) + 3 <= self._columns:
                    break               # if none fits, the last cuts the reason least
            self._report.row(left, right, 'red')

    @property
    def _columns(self):
        return self._report.columns or 80

    def _took(self, wall_s):
        return duration_of(wall_s)

    def _say_failures(self):
        """Show what to type to see why jobs failed, and to run them again."""
        failed = [result for result in (*self._run.failures, *self._plan.failed_before)
                  if result.exit_code >= 0]
        if failed:
            places = [os.path.join(self._results.folder, f'{names[0]}.err')
                      for _, names in self._reasons]
            shown = f'look:  {places[0]}'
            for place in places[1:3]:
                if len(shown) + 2 + len(place) <= self._columns:
                    shown += f'  {place}'
            self._report.line(shown)
            path = self._options['<batch>']
            if len(failed) > 1 and path != '-':
                self._report.line(f'       {typed_for(path, "--status", "--failed")}')
            again = self._options.typed('--rerun-failed', without='--rerun')
            self._report.line(f'again: {again}')


class ToldView(SpeakingView):
    """A view that passes on what happens to jobs, to a JobLog and Hooks."""

    def __init__(self, reporter, told):
        super().__init__(reporter)
        self._told = told

    def begin(self):
        """The batch begins."""
        for other in self._told:
            other.begin(self)

    def changed(self, attempt, before):
        """The state of an attempt has changed."""
        for other in self._told:
            other.changed(attempt, before)

    def lost(self, attempt, again):
        """A machine lost a job; the others are told if the job is not started again."""
        for other in self._told if attempt.result else ():
            other.lost(attempt)


def why_impossible(jobs, empty, is_idle):
    """Return why these jobs of one Allocation fit on no machine.

    empty: (worker, its MachineResources if nobody used it) of each machine; if not is_idle, these
    are the resources that are free now
    """
    allocation = jobs[0].allocation
    more = f' (and {count_of(len(jobs) - 1, "more line")})' if len(jobs) > 1 else ''
    shorts = {books.short_of(allocation) for _, books in empty}
    why = '; '.join(f'{worker.name} {books.why_not(allocation, is_idle)}'
                    for worker, books in empty)
    if shorts == {'engine'}:
        return f'line {jobs[0].line}{more} cannot run: {sentence(why)}'
    needs = needs_in_words(allocation, shorts)
    return (f'line {jobs[0].line}{more} needs {needs}, and no machine has that '
            f'{"even when idle" if is_idle else "free"}: {sentence(why)}')


def without_gpu(job, empty, options):
    """Return what to type if this job, which fits on no machine, would fit without a GPU.

    empty: (worker, its MachineResources if nobody used it) of each machine; options: of the command
    """
    wanted = job.allocation._replace(gpus=0)
    if not job.allocation.gpus or any(books.available.gpus for _, books in empty) or all(
            books.short_of(wanted) for _, books in empty if not books.available.queue):
        return ''                       # a cluster was not asked about jobs without a GPU
    if '--num-gpus=' in job.own:
        return ' If the job needs no GPU: --no-gpu-required instead of --num-gpus in its line.'
    return (' If the jobs need no GPU, type\n'
            + options.typed('--no-gpu-required', without='--num-gpus'))


# Why a machine has no room, if only this batch uses it.
FULL_OF_OWN = re.compile('(has [0-9]+ in use by|runs [0-9]+ jobs? of) this batch')


def why_waiting(resources, allocation, count, is_own_news):
    """Return what jobs wait for: 'waiting: 2 jobs for a GPU …: lab1 has 1 in use by this batch'.

    resources: Worker -> its MachineResources; count: how many jobs wait
    is_own_news: whether to return a text, not '', if jobs of this batch alone fill all machines
    """
    reasons, shorts = collections.defaultdict(list), set()
    for worker, books in resources.items():
        short = books.short_of(allocation)
        shorts.add(short)
        reasons[books.holder(allocation) if short else 'is kept for a job that waits longer'
                ].append(worker.name)
    if reasons and not is_own_news and all(map(FULL_OF_OWN.fullmatch, reasons)):
        return ''
    what, _ = describe_short(allocation, shorts)
    machines = '; '.join(f'{"each of " * (len(names) > 1)}{names_of(names)} {reason}'
                         for reason, names in reasons.items())
    return (f'waiting: {count_of(count, "job")} for {what}: '
            f'{machines or "no machine is left"}')


def why_all_wait(scheduler, is_own_news):
    """Return why the jobs of each kind wait, a line for each; is_own_news: as for why_waiting."""
    return '\n'.join(filter(None, (
        why_waiting(scheduler.resources, allocation, len(jobs), is_own_news)
        for allocation, jobs in scheduler.kinds().items()
        if not scheduler.will_start(allocation))))


def queue_words(engine, number, why, start, now=None):
    """Return a place in a queue in words: 'Slurm 4711: others first, would start about 21:40'.

    engine: as in Machine, or '' to leave it out; start: in seconds since 1970, or None
    """
    now = time.time() if now is None else now
    parts = [why] * bool(why)
    if start and start > now:
        parts.append(f'would start about {clock_of(start, now)}')
    what = f'{engine.capitalize()} {number}' if engine else f'queued as {number}'
    return what.rstrip() + (f': {", ".join(parts)}' if parts else '')


def queue_news(attempt):
    """Yield the news of an attempt in a cluster's queue: why it waits, once; or that it moved."""
    place = attempt.place
    if attempt.state == 'absent':
        if place.moves_to:
            yield f'moved: {attempt.name}: {printable(place.moves_to.name)} became free'
    elif place.why and not place.is_told:
        attempt.place = place._replace(is_told=True)
        words = queue_words(attempt.machine.machine.engine, *place[:3])
        yield f'queued: {attempt.name} at {printable(attempt.machine.name)} ({words})'


def removed_words(attempt, again=''):
    """Return the note on a cancelled attempt that had not left the queue of a cluster.

    again: what follows if its job starts again
    """
    return (f'{attempt.name}: removed from the queue of {attempt.machine.name}. It had not '
            f'started{again}')


def what_is_left(run):
    """Return in words which jobs of a Run keep running, and how many ended or have not started."""
    queued, waits = run.lives.all_of('queued'), run.scheduler.waits
    ended = len(run.lives.all_of('ended'))
    running = [attempt for attempt in run.lives.all_of(*ALIVE) if attempt not in queued]
    parts = [f'{count_of(len(found), "job")} {"keeps" if len(found) == 1 else "keep"} {doing} '
             f'{names_of(sorted({attempt.machine.name for attempt in found}))}'
             for found, doing in ((running, 'running on'), (queued, 'a place in the queue of'))
             if found]
    parts += [f'{count_of(ended, "job")} {"has" if ended == 1 else "have"} ended'] * bool(ended)
    parts += [f'{count_of(waits, "line")} {"has" if waits == 1 else "have"} not started'
              ] * bool(waits)
    return '; '.join(parts) or 'nothing runs'


def leaves_open(why):
    """Tell whether the reason why a machine cannot be used lacks advice."""
    return not re.search('Try: |host key|was refused|too many keys|the same account', why)


def how_to_check(worker, before):
    """Return a blank and the command that checks a machine; '' if a reason has advice, or if the
    command was printed before.

    before: the reasons printed before
    """
    if not leaves_open(worker.why) or any(map(leaves_open, before)):
        return ''
    word = worker.machine.word or worker.name
    return f' To find the cause: execute_batch --check --machines {word}'


class Peaks:
    """The most that jobs were seen to use.

    kinds: {Allocation: [[MB of each job], [MB of each job on GPUs]]}
    """

    def __init__(self):
        self.kinds = {}
        # {key of an attempt whose machine was measured while it ran: its use would have been seen}
        self._would_see = {}

    def look(self, run, worker):
        """A machine was measured."""
        gpus = {gpu.index: gpu for gpu in worker.capacity.gpus} if worker.capacity else {}
        for attempt in run.lives.of(worker, 'running'):
            since = run.client.journal.started(attempt.name)
            if attempt.gpus and since and time.time() - since > REFRESH_S:
                # A process that no job is known to have may be one of this job, in a container.
                sees = all(gpu and not (gpu.unified or gpu.hidden or gpu.others)
                           for gpu in map(gpus.get, gpus_of(attempt.gpus)))
                self._would_see[attempt.key] = sees and self._would_see.get(attempt.key, True)

    def ended(self, attempt):
        """Note what a job used, if it succeeded, and ran long enough to be seen more than once."""
        result = attempt.result
        gpu_mb = result.peak_gpu_memory_mb
        if gpu_mb is None and self._would_see.get(attempt.key):
            gpu_mb = 0
        seen = self.kinds.setdefault(attempt.job.allocation, [[], []])
        if not result.exit_code and result.wall_s > 2 * REFRESH_S:
            for peaks, mb in zip(seen, (result.peak_memory_mb, gpu_mb)):
                peaks += [mb] if mb is not None else []


class BatchView(ToldView):
    """The output of execute_batch: the events on stdout, all else on stderr.

    allocation: what the batch's own options ask for; `limits` prints how many such jobs fit
    options: these options, for commands to type
    """

    SUMMARY = Summary
    IS_OWN_NEWS = True          # print, too, that jobs of this batch alone fill all machines

    def __init__(self, reporter, results, plan, allocation, options, path='', told=()):
        super().__init__(reporter, told)
        self._results, self.plan = results, plan
        self._allocation, self._options, self._path = allocation, options, path
        self.began = self._last_start = time.monotonic()
        self._explained = ('', -math.inf)       # why jobs wait, as last printed, and when
        self._unusable = {}                     # worker -> why, as last printed
        self._peaks = Peaks()
        self._lost_gpus = {}                    # worker -> the last message about its lost GPUs
        self._said_halt = False
        self._question = None                   # the Question of Ctrl-C

    def replan(self, plan):
        """Use this Plan from now on."""
        self.plan = plan

    # Before the first start

    def open(self):
        """The run is about to log in."""
        if not self._options['--dry-run']:
            self._question = PipedQuestion(self.run, self._report)

    def ask(self):
        """Ask what Ctrl-C should do, if a person is at the terminal; return whether it asks."""
        return bool(self._question) and self._question.ask()

    def names(self):
        """Print which results get another name, are incomplete, or are not in the journal."""
        lines, results = self.plan.lines, self._results
        renamed = [f'line {job.line}: {job.name}' for job in lines.waiting
                   if job.name in lines.usual and job.name not in results.journal.jobs]
        if renamed:
            self._report.note('new names for results, because other commands have the usual ones: '
                              f'{names_of(renamed)}')
        parts = [(job, here) for job in lines.done for here in [results.remnants(job.name)] if here]
        if parts:
            found = [f'line {job.line}: {" and ".join(here)}' for job, here in parts]
            paths = itertools.chain.from_iterable(here for _, here in parts)
            self._report.note(f'only a part of the results is left for {names_of(found)}. To run '
                              f'{"this line" if len(parts) == 1 else "these lines"} again: rm -r '
                              f'{" ".join(paths)}')
        self.tell(former_name(lines, self.run.batch, results))
        unknown = [job.name for job in lines.done if job.name not in results.journal.jobs]
        if unknown:
            self._report.note(f'the journal does not know which commands made {names_of(unknown)}')

    def limits(self, workers):
        """Print how many jobs of the batch's own kind fit on these machines, and on which GPUs."""
        limits, choices = {}, []
        for worker in workers:
            count, gpus = room_for(worker.capacity, self._allocation)
            limits[worker.name] = count
            choices.append(gpus)
        self._report.line(f'machine limits:  {limits}')
        self._report.line(f'machine gpu choices: {choices}')

    def check_room(self):
        """Raise if jobs wait that fit on no ready machine, as Fleet.at_best measures it."""
        run = self.run
        empty = [(worker, books_of(run.fleet.at_best(worker)))
                 for worker in run.workers if worker.state == 'ready']
        whys = [why_impossible(queue, empty, run.client.live) + without_gpu(
            queue[0], empty, self._options) for allocation, queue in run.scheduler.kinds().items()
            if all(books.short_of(allocation) for _, books in empty)]
        if whys:
            raise DoesNotFit(first_of(whys))

    def skipped(self):
        """Print which lines are not run."""
        for _, warning in warnings_of(self.plan):
            self._report.line(warning)
        for line in skipped_in_short(self.plan, self.run.batch, self._results.journal):
            self._report.note(line)

    def changed_files(self, files):
        """Print which earlier jobs had other files than jobs get now.

        files: the Files that are sent
        """
        for note in file_notes(self.plan, self._results, files, self._path, self.run):
            self._report.note(note)

    def dry_run(self):
        """Print which jobs would start now, and on which machine."""
        self.unanswered()
        books, starts = self.run.scheduler.resources, [*self.run.scheduler.choose()]
        for job, worker, placement in starts:
            wrap = worker.machine.wrap and f', wrapped in {printable(worker.machine.wrap)}'
            self._report.line(f'would start: {job.name} on {worker.name}{wrap};  '
                              f'{shown_command(job.command, placement.visible_gpus)}')
        for allocation, queue in self.run.scheduler.kinds().items():
            for job in queue:
                self._report.line(f'would wait: {job.name};  {printable(job.command)}')
            if books and not starts:
                self._report.note(why_waiting(books, allocation, len(queue), True))

    def unanswered(self):
        """Name each machine that has not answered, if nothing was printed about it yet."""
        for worker in self.run.workers:
            standing = self.run.fleet.standing[worker]
            if worker.state == 'connecting' and not worker.was_ready and not standing.troubles:
                so = 'interrupted' if self.run.interrupts else 'the batch ended without it'
                self._report.note(f'{worker.name}: {worker.unanswered(f"; {so}")}')

    # Changes of attempts

    def changed(self, attempt, before):
        """The state of an attempt has changed."""
        super().changed(attempt, before)
        if attempt.state == 'placed':
            self._last_start = time.monotonic()
            if self._report.verbose:
                scores = ', '.join(f'{worker.name} {books.score(attempt.job.allocation):.2f}'
                                   for worker, books in self.run.scheduler.resources.items())
                self._report.trace(f'{attempt.name}: to {attempt.machine.name}; scores for another '
                                   f'such job: {scores}')
        elif attempt.state == 'running':
            self._tell_start(attempt, 'running' if attempt.is_inherited and before == 'claimed'
                             else 'started')
        elif attempt.place and attempt.state in ('queued', 'absent'):
            for line in queue_news(attempt):
                self._report.line(line)
        elif attempt.state == 'preempted':
            self._report.note(f'{attempt.name}: stopped on {attempt.machine.name}: '
                              f'{sentence(attempt.why)} It starts again.')
        elif attempt.state == 'ended':
            self._say_halt()
            self._ended(attempt)
        elif attempt.state == 'cancelled' and not self.run.interrupts:
            again = '; it starts again' * (attempt.key in self.run.wishes.moving)
            self._report.note(removed_words(attempt, again) if attempt.never_began else
                              f'{attempt.name}: stopped on {attempt.machine.name}{again}. Partial '
                              f'results: {self._results.inner}/cancelled')

    def _tell_start(self, attempt, word):
        self._report.started(attempt.job, attempt.gpus, word)

    def _tell_end(self, attempt):
        self._report.ended(attempt.job, attempt.result.exit_code)

    def _ended(self, attempt):
        self._tell_end(attempt)
        self._peaks.ended(attempt)

    def lost(self, attempt, again):
        """A machine lost a job, which has no result."""
        super().lost(attempt, again)
        name, why = attempt.name, sentence(attempt.why)
        if not attempt.job.may_start:
            what = 'Its line is not in the batch file any more, so it is not started again.'
        elif again:
            what = 'It starts again.'
        else:
            what = 'The same command starts it again.'
            self._report.line(f'failed: {name}; {printable(attempt.job.command)}')
        self._report.note(f'{name}: lost on {attempt.machine.name}: {why} {what}')
        self._say_halt()

    def _say_halt(self):
        if self.run.halted and not self._said_halt:
            self._said_halt = True
            self._report.note(f'{count_of(len(self.run.failures), "job")} failed: no more jobs '
                              'start (--halt-after)')

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
        self._report.note(f'{worker.name}: connected again ({count_of(jobs, "job")} there)')

    def measured(self, worker):
        """Print that only a part of a machine's GPUs can be used, if that is new."""
        self._peaks.look(self.run, worker)
        have = worker.capacity
        if have and have.lost_gpus and have.lost_gpus != self._lost_gpus.get(worker):
            self._report.note(f'{worker.name} {have.lost_gpus}; '
                              f'{count_of(len(have.gpus), "other GPU")} can be used.')
        self._lost_gpus[worker] = have and have.lost_gpus

    def away(self, worker):
        """Contact with a machine was lost; its worker reconnects."""
        jobs = len(self.run.lives.of(worker, *UNCOLLECTED))
        left = f' ({count_of(jobs, "job")} {"keeps" if jobs == 1 else "keep"} running)' * bool(jobs)
        self._report.note(f'{worker.name}: connection lost{left}: {sentence(worker.why)} '
                          'Reconnecting.')

    def failed(self, worker, attempts):
        """A machine cannot be used, or not any more; these attempts may still run on it."""
        if attempts:
            self._report.note(f'{worker.name}: connection lost ({count_of(len(attempts), "job")} '
                              f'may still run): {sentence(worker.why)}')
        else:
            if self._unusable.get(worker) != worker.why:    # each retry fails like this
                more = how_to_check(worker, self._unusable.values())
                self._report.note(f'{worker.name}: cannot be used: {sentence(worker.why)}{more}')
            self._unusable[worker] = worker.why

    def after_failure(self, worker):
        """Warn if jobs wait that fit on none of the remaining machines."""
        run = self.run
        if run.is_open and not run.fleet.count('connecting') and run.scheduler.resources:
            try:
                self.check_room()
            except DoesNotFit as error:
                self._report.note(f'{error}')

    def given_up(self, worker, jobs):
        """--lost-after has passed for this number of jobs."""
        start = 'starts' if jobs == 1 else 'start'
        self._report.note(f'{worker.name}: no connection for {self.run.policy.lost_after_s:g} s: '
                          f'{count_of(jobs, "job")} {start} on other machines, and will be '
                          f'stopped on {worker.name} when it is back')

    def warn(self, text):
        """Show a warning."""
        self._report.warning(text)

    def tell(self, text):
        """Print a sentence, if there is one."""
        if text:
            self._report.note(text)

    def rests(self, worker, why):
        """A machine that failed jobs gets no more jobs for a while."""
        self._report.note(f'{worker.name}: gets no more jobs for a while: {sentence(why)}')

    # While nothing happens

    def begin(self):
        """From now on print why nothing starts."""
        super().begin()
        self.run.client.processes.call_later(EXPLAIN_S, self._explain)

    def _explain(self):
        """Print why nothing starts, if that is new."""
        self.run.client.processes.call_later(EXPLAIN_S / 2, self._explain)
        now = time.monotonic()
        if (now - self._last_start < EXPLAIN_S or now - self._explained[1] < 2 * EXPLAIN_S
                or self.run.interrupts):
            return
        text = why_all_wait(self.run.scheduler, self.IS_OWN_NEWS)
        reasons = re.sub(r'\b[0-9]+\b( jobs?\b)?', '', text)     # fewer waiting jobs are no news
        if reasons != self._explained[0]:
            self._explained = (reasons, now)
            if text:
                self._report.note(text)

    def stuck(self):
        """Print that no machine is left that can run the remaining jobs."""
        self._report.note(f'{count_of(self.run.scheduler.waits, "job")} not started: no machine is '
                          'left that could run them. Run the same command again when there is one.')
        if self.run.scheduler.resources:
            self._report.note(why_all_wait(self.run.scheduler, True))

    # The end

    def end(self):
        """The run is over; the summary follows."""
        if self._question:
            self._question.end()

    def stopping(self):
        """Print that an interrupt stops all jobs."""
        self._report.note('interrupted: stopping all jobs (Ctrl-C again: exit without waiting)')

    def leaving(self):
        """Print which jobs keep running, and how many lines have not started."""
        self._report.note(f'left: {what_is_left(self.run)}. The same command fetches results and '
                          'starts the rest')

    @property
    def outcome(self):
        """The Summary of the run as it is now."""
        return self.SUMMARY(self.run, self._report, self._results, self.plan, self._options)

    def summary(self):
        """Print the summary; return the exit status."""
        self.unanswered()
        return self.outcome.show(time.monotonic() - self.began, advise(self.run, self._peaks.kinds))


class TerminalView(BatchView):
    """The output of execute_batch on a terminal: a row for each event, and below them a Board."""

    SUMMARY = TerminalSummary
    IS_OWN_NEWS = False         # the counts show it
    BESIDE_COMMAND = 48         # columns of a row beside the command; if a command is longer than
                                # the rest, the words that all commands share are printed once
    MOST_SPLIT = 20_000         # up to this many jobs that takes less than a second

    def __init__(self, *args):
        super().__init__(*args)
        self._board = None
        self._widest = 0            # columns of the widest place shown, so that places are aligned
        self._untold = {}           # name -> Attempt that failed, whose stderr is on its way
        self._rests = {}            # name -> its command without the words that all commands share

    def open(self):
        """Begin to draw, before the first login."""
        self._question = Question(self.run)
        self._board = Board(self.run, len(self.plan.lines.done), self._question)
        self._report.open_screen(self._board.rows)
        self._draw()
        done = {job.name for job in self.plan.lines.done}
        commands = {name: job.command for name, job in self.run.jobs.items() if name not in done}
        room = (self._report.columns or 80) - self.BESIDE_COMMAND
        if max(map(len, commands.values()), default=0) > room and len(commands) < self.MOST_SPLIT:
            shared, rests = differing_words([*commands.values()])
            self._rests = dict(zip(commands, rests)) if shared else {}
            if shared:
                self._report.line(f'all commands: {shared}')

    def replan(self, plan):
        """Use this Plan from now on."""
        super().replan(plan)
        if self._board:
            self._board.done = len(plan.lines.done)

    def begin(self):
        """From now on also show the counts."""
        super().begin()
        self._board.shows_counts = True

    def _draw(self):
        if self._report.has_screen:
            self.run.client.processes.call_later(FRAME_S, self._draw)
            self._question.answer()
            self._report.draw()

    def skipped(self):
        """Print in one line which lines are not run."""
        for line in skipped_in_short(self.plan, self.run.batch, self._results.journal):
            self._report.line(line)
        for job, warning in warnings_of(self.plan):
            if job.name in self.plan.elsewhere:
                self._report.line(warning)

    def changed(self, attempt, before):
        """The state of an attempt has changed."""
        self._board.changed(attempt)
        super().changed(attempt, before)
        if attempt.name in self._untold and attempt.state != 'ended':
            self._tell_end(attempt)

    def _tell_start(self, attempt, word):
        self._row(word, attempt, '', '')

    def _tell_end(self, attempt):
        """Print that a job ended; if it failed, only when its stderr, with the reason, is here."""
        result, stream, why = attempt.result, attempt.streams['err'], ''
        if result.exit_code:
            if attempt.state == 'ended' and stream.content is None:
                self._untold[attempt.name] = attempt
                return
            lines = self._results.last_lines(attempt.name, 'err') if stream.content is None else (
                lines_shown(stream.content[-LAST_BYTES:]))
            why = failure_words(result.exit_code, result.machine, lines)
        self._untold.pop(attempt.name, None)
        self._row('failed' if result.exit_code else 'finished', attempt,
                  duration_of(result.wall_s), 'red' if result.exit_code else '')
        if why:
            self._report.row(f'{"":10}{why}', style='red')

    def _row(self, word, attempt, time_text, style):
        place = with_gpus(shortened(attempt.machine.name), attempt.gpus)
        self._widest = max(self._widest, len(place))
        command = self._rests.get(attempt.name, attempt.job.command)
        is_narrow = (self._report.columns or 80) < 80
        name = name_in_batch(attempt.name, self.run.batch if is_narrow else '')
        self._report.row(f'{word + ":":10}{name}  {command}',
                         f'{place:{self._widest}}  {time_text:>7}', style)

    def end(self):
        """Close the board, and print the failed jobs whose stderr has not arrived."""
        self._board.end()
        for attempt in list(self._untold.values()):
            self._tell_end(attempt)


class BoundView(SpeakingView):
    """The notes of execute_remote and execute_to, whose jobs each have a machine of their own.

    sinks: {worker: an object that has write(stream, bytes) and flush()}, for the job's output
    on_running: called with an attempt when its command has begun, or is in the queue of a cluster
    on_contact: called with a worker when contact was made, for the first time or again
    """

    def __init__(self, reporter, sinks, on_running=None, on_contact=None):
        super().__init__(reporter)
        self._sinks = sinks
        self._on_running = on_running or (lambda attempt: None)
        self.came = on_contact or (lambda worker: None)
        self._explained = False

    def warn_of_files(self, files):
        """Warn of files to send that will not be of use on a machine, or may have secrets."""
        bound = self.run.fleet.bound
        for text in files.warnings({job.forwards for job in bound.values() if job.forwards},
                                   [worker.machine for worker in bound]):
            self._report.warning(text)

    def changed(self, attempt, before):
        """The state of an attempt has changed."""
        if attempt.state in ('running', 'queued'):
            self._on_running(attempt)
        for line in queue_news(attempt) if attempt.place and attempt.state == 'queued' else ():
            self._report.note(line)

    def came_back(self, worker):
        """Contact was made again."""
        self._report.note(f'{worker.name}: connected again')
        self.came(worker)

    def away(self, worker):
        """Contact with a machine was lost; its worker reconnects."""
        has_ended = any(attempt.how.mode == 'tty' for attempt in self.run.lives.of(worker, *ALIVE))
        self._report.note(f'{worker.name}: connection lost: {sentence(worker.why)} The job '
                          f'{"has ended with its terminal" if has_ended else "keeps running"}; '
                          'reconnecting')

    def progress(self):
        """Print once what the job waits for."""
        for allocation in () if self._explained else self.run.scheduler.kinds():
            for worker, books in self.run.scheduler.resources.items():
                if self.run.fleet.standing[worker].outcome:
                    continue                # the job never fits there
                self._explained = True
                self._report.note(f'waiting for {describe(allocation)}: {worker.name} '
                                  f'{books.holder(allocation)}')

    def parted(self, worker):
        """The run no longer needs a machine."""
        if worker in self._sinks:
            self._sinks[worker].flush()

    def sink(self, worker):
        """Return the function that receives the output of the job."""
        return self._sinks[worker].write if worker in self._sinks else None

    def awaited(self):
        """Return {worker: its progress in words} for the machines without an outcome."""
        return {worker: 'not begun' if worker.state == 'new' else
                worker.unanswered() if worker.state == 'connecting' else
                'the command ran' if self.run.lives.any_of(worker, 'running') else
                'the command had not started'
                for worker in self.run.workers if not self.run.fleet.standing[worker].outcome}


def advise(run, peaks):
    """Yield a line for each kind of job that asked for far more than it used: memory, or a GPU.

    peaks: {Allocation: ([MB], [MB of a GPU])}, the most that each of its jobs used
    """
    for allocation, seen in peaks.items():
        less, used, words = less_of(allocation, *seen)
        count = sum(1 for job in run.jobs.values() if job.allocation == allocation)
        for worker in run.scheduler.resources if words else ():
            if worker.capacity.queue:       # a cluster does not tell what is free
                continue
            before, _ = room_for(worker.capacity, allocation)
            after, _ = room_for(worker.capacity, less)
            if after > before and count > before:
                condition = 'if the jobs need none, ' * (less.gpus < allocation.gpus)
                yield (f'{"; ".join(used)}: {condition}with {" ".join(words)} {worker.name} would '
                       f'run {after} at once')
                break


def less_of(allocation, memory, gpu_memory):
    """Return (an Allocation that suffices, [what jobs used, in words], [options that ask for it]).

    memory, gpu_memory: those of `peaks` in `advise`
    """
    used, words = [], []
    new = advised_mb(allocation.memory_mb, memory)
    if new < allocation.memory_mb:
        used.append(f'asked {allocation.memory_mb} MB, used at most {max(memory)}')
        words.append(f'--memory-required={new}')
        allocation = allocation._replace(memory_mb=new)
    if allocation.gpus and gpu_memory and not any(gpu_memory):
        return (allocation._replace(gpus=0), [*used, 'no job was seen to use its GPU'],
                [*words, '--no-gpu-required'])
    new = advised_mb(allocation.gpu_memory_mb, gpu_memory)
    if new < allocation.gpu_memory_mb and not allocation.reserve_gpu:
        used.append(f'asked {allocation.gpu_memory_mb} MB of a GPU, used at most '
                    f'{max(gpu_memory)}')
        words.append(f'--gpu-memory-required={new}')
        allocation = allocation._replace(gpu_memory_mb=new)
    return allocation, used, words


def advised_mb(asked_mb, seen_mb):
    """Return 1.2 times the highest peak, rounded up; asked_mb if that is over half of it."""
    if not seen_mb:
        return asked_mb
    wanted = max(seen_mb) * 1.2
    step = 10 ** max(len(str(int(wanted))) - 1, 2) // (2 if wanted >= 1000 else 1)
    rounded = math.ceil(max(wanted, 1) / step) * step
    return rounded if rounded <= asked_mb / 2 else asked_mb


# ---- Status: the state of a batch from its journal and its files; asks no machine ----

# How the last line counts states of jobs; all others count as waiting, also lost and cancelled.
COUNTED_AS = {'finished': 'finished', 'failed': 'failed', 'running': 'on a machine',
              'started': 'on a machine', 'ended': 'on a machine'}
STATUS_OPTIONS = {'--failed': 'failed', '--running': 'on a machine', '--waiting': 'waiting'}
FIRST_SHOWN = ('on a machine', 'failed', 'finished', 'waiting')     # if not all fit
NEVER_BEGAN = ('refused', 'held', 'absent')     # states in LIFE of attempts that never ran
STATUS_HEAD = ('job', 'state', 'where', 'time', 'command', 'last line')
WHERE = STATUS_HEAD.index('where')


class JobStatus(NamedTuple):
    """All facts about one job that this computer has."""
    job: Job
    state: str                      # see docs/watching.md, --json
    known: collections.abc.Mapping  # its Record; empty if it was never claimed
    folder: str                     # the folder of its output
    is_watched: bool = True         # a client runs the batch

    @property
    def counted(self):
        """How the last line of --status counts it."""
        return COUNTED_AS.get(self.state, 'waiting')

    @property
    def exit_code(self):
        """Its exit status, or None; results that the journal does not know have none."""
        has_ended = self.state in ('finished', 'failed', 'ended')
        return self.known.get('exit_code') if has_ended else None

    @property
    def machine(self):
        """The name of the machine where it runs, ran or was lost; '' while it waits."""
        known = self.known if self.state != 'waiting' else {}
        return known.get('where') or known.get('machine') or ''

    @property
    def place(self):
        """The machine with the GPUs that the job has there."""
        return with_gpus(printable(self.machine), self.known.get('gpus') if self.machine else None)

    @property
    def began(self):
        """When it was started, in seconds since 1970; None if that is not known."""
        return self.known.get('time') if self.counted != 'waiting' else None

    def output(self, stream):
        """Return the path of the file with the job's stdout ('out') or stderr ('err')."""
        return os.path.join(self.folder, f'{self.job.name}.{stream}')

    def time(self, now):
        """Return how long the job runs or took; if it may have ended, how long ago it started."""
        wall_s = self.known.get('wall_s')
        if self.state == 'running':
            return duration_of(now - self.began) if self.began else ''
        if self.state == 'started':
            return f'{duration_of(now - self.began)} ago' if self.began else ''
        return duration_of(wall_s) if self.exit_code is not None and wall_s is not None else ''

    def last_line(self):
        """Return the job's last line of output; for a failed job the line that best tells why."""
        if self.counted == 'waiting':
            return ''
        if self.exit_code:
            return told_by(self.output('err')) or last_line_of(self.output('out'))
        # Until this attempt writes something, the file may hold the output of an earlier attempt.
        since = self.began if self.known.get('attempt', 1) > 1 and self.exit_code is None else None
        return next(filter(None, (last_line_of(self.output(stream), since or -math.inf)
                                  for stream in ('out', 'err'))), '')

    def remark(self):
        """Return the job's last line of output; for a failed job, why it failed, in words; for a
        waiting job, the resources that it needs, or why it waits again after a start.
        """
        if self.exit_code:
            lines, _ = read_last_lines(self.output('err'), LAST_BYTES)
            said = lines or [last_line_of(self.output('out'))]
            return failure_words(self.exit_code, self.machine, said)
        if self.state == 'finished' and not self.known:
            return 'the journal does not know which command made these results'
        if self.counted != 'waiting':
            return self.last_line()
        if self.state == 'queued':
            return queue_words('', *self.known['queued']) + (
                '' if self.is_watched else ', when it was seen last')
        if self.state == 'cancelled' and not self.known:
            return 'the next run starts it, not this one'
        if self.known.get('aside'):
            return f'runs again; earlier results: {self.known["aside"]}'
        if not self.known:
            is_told = self.is_watched and self.job.allocation       # else it waits for a client
            return describe_briefly(self.job.allocation) if is_told else ''
        deleted = 'its results were deleted: ' * (self.known.get('state') == 'collected')
        return f'{deleted}starts from the beginning'

    def as_json(self, client):
        """Return the job as JSON.  client: the id of the process that runs the batch, or None."""
        began, ended = self.began, self.known.get('ended_at')
        return json.dumps({
            'job': self.job.name, 'line': self.job.line or None, 'state': self.state,
            'exit_code': self.exit_code, 'machine': self.machine or None,
            'gpus': list(gpus_of(self.known.get('gpus'))) if self.machine else [],
            'attempt': self.known.get('attempt'), 'started_at': began,
            'ended_at': ended if self.exit_code is not None else None,
            'wall_s': self.known.get('wall_s') if self.exit_code is not None else None,
            'command': self.job.command, 'last_line': self.last_line(), 'client': client,
            **({'queued': dict(zip(('number', 'why', 'start'), self.known['queued']))}
               if self.state == 'queued' else {})})


class BatchStatus:
    """The states of all jobs of a batch at this moment.

    jobs: None if the batch file is gone: then nobody knows which lines wait to start
    holder: the Holder of the folder's lock, or None
    """

    def __init__(self, jobs, batch, results, holder):
        self._batch, self._now = batch, time.time()
        matched, self._is_whole = match_lines(jobs, batch, results), jobs is not None
        self._holder = holder
        self._client = self._holder if self._holder and self._holder.lives and (
            self._holder.run in ('', batch)) else None
        self.jobs = [self._status(job, results) for job in (*matched.jobs, *matched.gone)]
        self._counts = collections.Counter(status.counted for status in self.jobs)

    def _status(self, job, results):
        known = results.journal.record(job.name)
        state = known.get('state')
        if state == 'claimed':
            state = ('queued' if known.get('queued') else
                     'running' if self._client else 'started')
        elif state != 'ended' and results.exists(job.name):
            state = 'failed' if known.get('exit_code') else 'finished'
        elif known.get('command') != job.command:       # another command had the job's name
            state, known = 'waiting', {}
        elif state in ('collected', 'again'):           # its results were deleted, or put aside
            state = 'waiting'
        elif known.get('how') in NEVER_BEGAN:
            state, known = 'waiting', {}
        elif self._client and state == 'cancelled' or known.get('how') == 'preempted':
            state = 'waiting'
        if self._client and COUNTED_AS.get(state, 'waiting') == 'waiting' and (
                results.journal.unwanted.get(job.name) == self._client.pid):
            state, known = 'cancelled', {}
        return JobStatus(job, state, known, results.folder, bool(self._client))

    @property
    def exit_status(self):
        """0 if all jobs have finished, else 1."""
        return int(self._counts['finished'] < len(self.jobs) or self._may_grow)

    @property
    def is_over(self):
        """Tell whether no job runs or waits any more."""
        return not (self._counts['on a machine'] or self._counts['waiting'] or self._may_grow)

    @property
    def _may_grow(self):
        """Tell whether a client may start jobs that are not among these."""
        return bool(self._client) and not self._is_whole

    def chosen(self, options):
        """Return the JobStatus of each job that the options ask for, by default of all jobs."""
        asked = {counted for option, counted in STATUS_OPTIONS.items() if options[option]}
        return [status for status in self.jobs if not asked or status.counted in asked]

    def json_lines(self, chosen):
        """Yield a JSON object for each JobStatus."""
        for status in chosen:
            yield status.as_json(self._client and self._client.pid)

    def lines(self, chosen, reporter, rows=math.inf):
        """Yield the lines for people.  rows: how many fit on the terminal."""
        columns = reporter.columns or math.inf
        opening, end = (padded_at_words(text, columns) for text in (self._opening(), self.counts()))
        yield opening
        shared, rests = differing_words([status.job.command for status in self.jobs])
        rest_of = {status.job.name: rest for status, rest in zip(self.jobs, rests)}
        # The terminal also needs 3 lines for the head, the shared words and the cursor.
        most = rows - 3 - sum(math.ceil(len(text) / columns) for text in (opening, end))
        shown = chosen if len(chosen) <= most else self._first(chosen, most - 1)
        if shown:
            yield from self._table(shown, rest_of, reporter)
        if len(shown) < len(chosen):
            yield f'… {len(chosen) - len(shown)} more'
        if shown and shared:
            yield self._to_width(f'all commands: {shared}', reporter)
        yield end

    def counts(self):
        """Return the last line.  Scripts read it, so its form must not change."""
        return f'{count_of(len(self.jobs), "job")}: ' + ', '.join(
            f'{self._counts[word]} {word}' for word in (
                'finished', 'failed', 'on a machine', 'waiting'))

    def _opening(self):
        """Return whether a client runs the batch, since when and where, and how many jobs run."""
        states = collections.Counter(status.state for status in self.jobs)
        parts = [f'{states[state]} {what}' for state, what in (
            ('running', 'running'), ('started', 'started'), ('queued', 'queued at a cluster'),
            ('ended', 'ended and not collected yet'))
            if states[state] or state == 'running' and self._client]
        # As in the last line, which counts cancelled jobs as waiting: for the next run.
        cancelled, waiting = states['cancelled'], self._counts['waiting'] - states['queued']
        numbers = 'all jobs have ended' if self.is_over else ', '.join([
            *parts, f'{waiting} waiting{f" ({cancelled} of them cancelled)" * bool(cancelled)}'])
        holder = self._holder
        since = holder and clock_of(holder.since, self._now)
        if self._client:
            where = 'here' if holder.is_here else f'on {printable(holder.computer)}'
            return (f'a client runs {where} since {since} (process {holder.pid}), {numbers}'
                    f'{self._time_left()}')
        if holder and holder.lives:
            return (f'no client runs this batch (process {holder.pid} runs '
                    f'{printable(holder.run)} here since {since}), {numbers}')
        if holder and holder.lives is None and holder.run in ('', self._batch):
            return (f'a client was started on {printable(holder.computer)} at {since} (process '
                    f'{holder.pid}); only --status on that computer tells whether it still '
                    f'runs, {numbers}')
        again = '' if self.is_over or not any(status.known for status in self.jobs) else (
            '. To continue, type the command that started it')
        return f'no client runs this batch, {numbers}{again}'

    def _time_left(self):
        """Return how long the rest may take, estimated as its client does; '' if unknown."""
        pace, running, waiting = Pace(), [], collections.Counter()
        for status in self.jobs:
            allocation, known = status.job.allocation, status.known
            if status.exit_code is not None and known.get('wall_s'):
                pace.ended(allocation, known['machine'], known['wall_s'])
            elif status.state == 'running':
                age_s = self._now - status.began if status.began else 0.0
                running.append((allocation, known['machine'], age_s))
            elif status.counted == 'waiting' and status.state != 'cancelled':
                waiting[allocation] += 1
        left = pace.left(running, waiting)
        return f', {range_of(*left)} left' if left else ''

    def _first(self, chosen, count):
        """Return the `count` JobStatus that matter most, by FIRST_SHOWN.  Among jobs of one state
        the last ones matter most, but among waiting jobs the first ones.
        """
        ranks = {counted: rank for rank, counted in enumerate(FIRST_SHOWN)}
        kept = sorted(range(len(chosen)), key=lambda at: (
            ranks[chosen[at].counted], at if chosen[at].counted == 'waiting' else -at))
        return [chosen[at] for at in sorted(kept[:max(count, 0)])]

    def _table(self, shown, rest_of, reporter):
        rows = [STATUS_HEAD, *(tuple(map(reporter.legible, (
            name_in_batch(status.job.name, self._batch),
            f'{status.state} {status.exit_code}' if status.exit_code else status.state,
            status.place, status.time(self._now), rest_of[status.job.name], status.remark())))
            for status in shown)]
        failed = {number for number, status in enumerate(shown, 1) if status.exit_code}
        for number, cells in enumerate(in_columns(rows, reporter.columns, reporter.mark, (WHERE,))):
            if number in failed:
                cells[1] = reporter.alarm(cells[1])
            yield '  '.join(cells).rstrip()

    @staticmethod
    def _to_width(text, reporter):
        text = reporter.legible(text)
        return cut(text, reporter.columns, reporter.mark) if reporter.columns else text


# ---- Completion: this section is the same in all three modules, each of which works alone ----

# The name of a value in the usage text -> the kinds of words that complete it; `files`: any path.
VALUES = {'machine': 'machines files', 'job': 'jobs', 'name': 'jobs', 'path': 'files',
          'file': 'files', 'shell': 'bash zsh fish', 'action': 'show collect remove',
          'what': 'error rename'}

# Programs for sh that print the words of these names, one a line.  They have no ' and no \\, which
# the strings of one of the three shells would read.
WORD_LISTS = {
    'machines': r'''
sed -n "s/#.*//; s/^[[:blank:]]*[Hh][Oo][Ss][Tt][[:blank:]=]//p" ~/.ssh/config 2>/dev/null |
    tr -s " \t=\"" "\n\n\n\n" | grep "^[[:alnum:]_.][[:alnum:]_.@:-]*$"
ls ~/.local/var 2>/dev/null | sed -n "s/[.]yaml$//p"
echo localhost''',
    'jobs': r'''
cat job_results/.ssh_scheduler/journal job_results/.ssh_scheduler/*/*/journal 2>/dev/null |
    sed -n "s/^{\"event\": \"claimed\", \"job\": \"\([^\"]*\)\".*/\1/p" | sort -u'''}

# In all of these the option is the last one before the word, with its value if it takes one.
BASH_COMPLETION = r'''# Completion of COMMAND for bash, made by: COMMAND --completion bash
_COMMAND_words() {      # the words of these lists that begin with $1, one a line
    local found word=$1
    shift
    for found; do
        case $found in
LISTS
        files) compgen -f -- "$word" ;;
        *) echo "$found" ;;
        esac
    done | while IFS= read -r found; do
        [[ $found != "$word"* || ! $found ]] || printf '%s\n' "$found"
    done
}
_COMMAND() {
    local IFS=$' \t\n' option='' lists='' found
    local word=${COMP_WORDS[COMP_CWORD]} place=$((COMP_CWORD - 1))
    COMPREPLY=()
    [[ $word != = ]] || { word=''; place=$COMP_CWORD; }
    if [[ ${COMP_WORDS[place]} == = ]]; then        # --option=word is three words
        ((place -= 1))
        option=${COMP_WORDS[place]}
    else
        for ((; place > 0; place--)); do
            [[ ${COMP_WORDS[place]} != -* ]] || { option=${COMP_WORDS[place]}; break; }
        done
        case $option in
        ONE_VALUE) ((place == COMP_CWORD - 1)) || option='' ;;
        esac
    fi
    [[ $word != -* || " ${COMP_WORDS[*]:0:COMP_CWORD} " == *' -- '* ]] || option=-
    case $option in
    -) lists='OPTIONS' ;;
CASES
    *) lists=files ;;
    esac
    [[ $lists == *files* ]] || compopt +o default 2>/dev/null       # of bash 4
    while IFS= read -r found; do
        COMPREPLY+=("$found")
    done < <(
        # shellcheck disable=SC2086
        _COMMAND_words "$word" $lists)
}
complete -o default -o filenames -F _COMMAND COMMAND
'''

ZSH_COMPLETION = r'''#compdef COMMAND
# Completion of COMMAND for zsh, made by: COMMAND --completion zsh
_COMMAND() {
    local place option='' lists='' found
    local -a options names
    options=(
OPTIONS
    )
    if [[ $PREFIX == --*=* ]]; then
        option=${PREFIX%%=*}
        compset -P 1 '*='
    else
        for ((place = CURRENT - 1; place > 1; place--)); do
            [[ $words[place] != -* ]] || { option=${words[place]%%=*}; break }
        done
        case $option in
        ONE_VALUE) ((place == CURRENT - 1)) && [[ $words[place] != *=* ]] || option='' ;;
        esac
        if [[ $PREFIX == -* && -z ${(M)words[1,CURRENT-1]:#--} ]]; then
            _describe -o option options
            return
        fi
    fi
    case $option in
CASES
    *) lists=files ;;
    esac
    for found in ${=lists}; do
        case $found in
LISTS
        files) _files ;;
        *) compadd -- $found ;;
        esac
    done
}
if [[ $funcstack[1] == _COMMAND ]]; then _COMMAND "$@"; else compdef _COMMAND COMMAND; fi
'''

FISH_COMPLETION = r'''# Completion of COMMAND for fish, made by: COMMAND --completion fish
function __COMMAND_after
    set -l options (string match -- '-*' (commandline -opc) | string replace -r '=.*' '')
    contains -- "$options[-1]" $argv
end
LISTS
CASES
'''


def option_texts(usage):
    """Return [(option, name of its value or None, is it a list, what it does)] of a usage text."""
    return [(match[2], match[3], bool(match[4]), ' '.join((match[5] or '').split()))
            for match in re.finditer(r'(?m)^  (-\w )?(--[a-z-]+)(?:=<([^>]+)>)?(\.\.\.)?'
                                     r'(?:  +(.*(?:\n {20,}\S.*)*)|$)', usage)]


def completion(usage, shell):
    """Return the script by which bash, zsh or fish completes the command of a usage text."""
    command = usage.partition('Usage:')[2].split()[0]
    options = option_texts(usage)
    texts = {name: re.split(r'(?<=[a-z0-9)])[.;] |\.$| \[default:', text)[0]
             for name, *_, text in options}
    kinds = {}          # the lists for a value -> the options that have such a value
    for name, value, *_ in options:
        if value:
            kinds.setdefault(VALUES.get(value, ''), []).append(name)
    needed = {name: text for name, text in WORD_LISTS.items() if name in ' '.join(kinds).split()}
    if shell == 'fish':
        return filled(FISH_COMPLETION, {
            'LISTS': '\n'.join(f"function __COMMAND_{name}\n    sh -c '{text}'\nend"
                               for name, text in needed.items()),
            'CASES': '\n'.join(fish_lines(options, texts))}, command)
    prints = {'bash': "        {}) sh -c '{}' ;;",
              'zsh': "        {}) names=(${{(f)\"$(sh -c '{}')\"}}); compadd -a names ;;"}[shell]
    parts = {
        'ONE_VALUE': '|'.join(name for name, value, is_list, _ in options if value and not is_list),
        'CASES': '\n'.join(f"    {'|'.join(names)}) lists='{lists}' ;;"
                           for lists, names in kinds.items()),
        'LISTS': '\n'.join(prints.format(*pair) for pair in needed.items())}
    if shell == 'bash':
        return filled(BASH_COMPLETION, {**parts, 'OPTIONS': ' '.join(['-h', *texts])}, command)
    about = (f'{name}:{text}'.replace("'", "'\\''") for name, text in texts.items())
    return filled(ZSH_COMPLETION, {
        **parts, 'OPTIONS': '\n'.join(f"        '{one}'" for one in about)}, command)


def fish_lines(options, texts):
    """Yield the lines by which fish completes these options, as option_texts returns them."""
    for name, value, is_list, _ in options:
        lists = VALUES.get(value, '').split()
        words = ' '.join(f'(__COMMAND_{one})' if one in WORD_LISTS else one
                         for one in lists if one != 'files')
        takes = (' -r' if 'files' in lists else ' -x') if value else ''
        words = f" -a '{words}'" if words else ''
        about = texts[name].replace('\\', '\\\\').replace("'", "\\'")
        yield f"complete -c COMMAND -l {name[2:]}{takes}{words} -d '{about}'"
        if is_list and words:
            yield f"complete -c COMMAND -n '__COMMAND_after {name}'{words}"


def filled(script, parts, command):
    """Return the script with these parts in the places of their names, for the command."""
    pattern = '|'.join(parts)
    return re.sub(pattern, lambda match: parts[match[0]], script).replace('COMMAND', command)


def check_for_shell(shell):
    """Return why --completion cannot be for this shell, or ''."""
    return '' if shell in VALUES['shell'].split() else (
        f'--completion must be bash, zsh or fish, not {shell!r}.')


# ---- Options: argv -> dict; checks the texts and makes numbers of them ----

DECIMAL = r'([0-9]+\.?[0-9]*|\.[0-9]+)'
SIZE_TEXT = re.compile(rf'{DECIMAL} ?([KMGT])(?:i?B)?', re.ASCII | re.IGNORECASE)
TIME_TEXT = re.compile('(?=.)' + ' ?'.join(rf'(?:{DECIMAL} ?{unit})?' for unit in 'dhms'),
                       re.ASCII | re.IGNORECASE)
UNIT_MB = {'K': 1 / 1024, 'M': 1, 'G': 1024, 'T': 1024 ** 2}   # as free, nvidia-smi and Slurm count
UNITS_S = (86400, 3600, 60, 1)


def plain_number(text):
    """Return the text as a number; nan if it is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def size_mb(text):
    """Return the text's size in MB: 2000, 500M, 1.5G; nan if it is no size."""
    match = SIZE_TEXT.fullmatch(text.strip())
    return float(match[1]) * UNIT_MB[match[2].upper()] if match else plain_number(text)


def seconds(text):
    """Return the text's time in seconds: 90, 10m, 1h30m; nan if it is no time."""
    match = TIME_TEXT.fullmatch(text.strip())
    if not match:
        return plain_number(text)
    return sum(float(number or 0) * unit_s for number, unit_s in zip(match.groups(), UNITS_S))


class Quantity(NamedTuple):
    """What the value of an option may be."""
    what: str
    read: collections.abc.Callable      # text -> float; nan for any other text
    unit: str = ''
    examples: str = ''


NUMBER = Quantity('a number', plain_number)
SIZE = Quantity('a size', size_mb, ' MB', ' Examples: 2000 (MB), 500M, 8G.')
TIME = Quantity('a time', seconds, ' s', ' Examples: 90 (seconds), 10m, 1h30m.')


def typed_start(command):
    """Return the words with which this command was started: execute_batch, or python3 FILE …"""
    import shutil
    script = sys.argv[0]
    if os.path.basename(script) == command:
        is_found = os.path.realpath(shutil.which(command) or '') == os.path.realpath(script)
        return [command if is_found else script]
    if os.path.realpath(script) == os.path.realpath(__file__):
        python = 'python3' if shutil.which('python3') == sys.executable else sys.executable
        return [python, script, command]
    return [command]                    # main was called by another program


class Options(dict):
    """Option or <positional> -> value.  A list is a tuple, or None if it was not given.

    given: the names of the options that the command line has; the others have their defaults.
    argv: the words of the command line, the name of the command first.
    """
    given, argv = frozenset(), ()

    def number(self, name, quantity=NUMBER, *, above=None, least=None, most=None):
        """Return option `name` as a float within the bounds: a size in MB, a time in s."""
        value = quantity.read(self[name])
        fits = (math.isfinite(value) and (above is None or value > above)
                and (least is None or value >= least) and (most is None or value <= most))
        if not fits:
            bounds = [f'above {above}' if above is not None else f'of at least {least}']
            bounds += [f'at most {most}'] if most is not None else []
            what = f'{quantity.what} {" and ".join(bounds)}{quantity.unit}'
            raise UsageError(f'{name} must be {what}, not {self[name]!r}.{quantity.examples}')
        return value

    def optional(self, name, read, **bounds):
        """Return read(name, …), a method of Options; None if the option has no value."""
        return None if self[name] is None else read(name, **bounds)

    def typed(self, added, without=None):
        """Return the command line as a shell reads it, with an option added that has no value.

        without: the name of an option to leave out, with its value or its list
        """
        import shlex
        command, *words = self.argv
        end = words.index('--') if '--' in words else len(words)
        is_list, kept, is_left_out = isinstance(self.get(without), tuple), [], False
        for place, word in enumerate(words):
            if place < end and word.partition('=')[0] == without:
                is_left_out = is_list or '=' not in word
            elif is_left_out and place < end and not word.startswith('-'):
                is_left_out = is_list
            else:
                is_left_out = False
                kept.append(word)
        return shlex.join([*typed_start(command), *[added] * (added not in self.given), *kept])

    def size_mb(self, name, **bounds):
        """Return option `name` as a number of MB within the bounds."""
        return self.number(name, SIZE, **bounds)

    def seconds(self, name, **bounds):
        """Return option `name` as a number of seconds within the bounds."""
        return self.number(name, TIME, **bounds)

    def whole_number(self, name, **bounds):
        """Return option `name` as an int within the bounds."""
        value = self.number(name, **bounds)
        if value != int(value):
            raise UsageError(f'{name} must be a whole number, not {self[name]!r}.')
        return int(value)


def hardware_words(options):
    """Return the options of the command line that are for hardware, as words."""
    kinds = option_kinds(HARDWARE_OPTIONS)
    return [name if kinds[name] == 'flag' else f'{name}={options[name]}'
            for name in sorted(options.given & kinds.keys())]


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


# The help of a command names one of these two; the command accepts the other, too, as a list.
MACHINE_FORMS = {'--machine': '--machines', '--machines': '--machine'}


def is_no_word(name, values):
    """Tell whether the last value of this list is a port, a time or a number: no <command>."""
    return (name in ('--forward', '--watch', '--cancel', '--rerun')
            and bool(values and re.fullmatch('[.:]?[0-9][0-9.:dhms]*', values[-1]))
            and not os.path.isfile(values[-1]))


def spell_out(argv, kinds, positionals):
    """Return (argv as docopt reads it, the names of the options in it).

    docopt gets --option=value, once for each word of a list, then -- and the other words.
    A list takes all words up to the next option or `--`; an empty list becomes `--option=`.
    Missing positional words are taken from the last list: `--machines a b batch.sh`.
    """
    usual = kinds
    kinds = {**{other: 'list' for name, other in MACHINE_FORMS.items() if name in usual}, **usual}
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
    lists = [(name, values) for name, values in options if kinds[name] == 'list']
    missing = positionals - len(words)
    if lists and missing > 0 and not is_no_word(*lists[-1]):
        _, values = lists[-1]
        kept = max(len(values) - missing, 0)
        words += values[kept:]
        del values[kept:]
    options = [(name if name in usual else MACHINE_FORMS[name], values)
               for name, values in options]
    spelled = []
    for name, values in options:
        spelled += [name] if values is None else [f'{name}={value}' for value in values or ['']]
    return [*spelled, '--', *words], {name for name, _ in options}


def refuse_more_machines(words):
    """Raise if more than one machine is named for a command that runs on one."""
    if len(words) > 1:
        raise UsageError(f'the command runs on one machine, and {len(words)} are named: '
                         f'{", ".join(words)}. For many machines: execute_to or execute_batch.')


def keep_one_machine(spelled, in_batch):
    """Return the words of spell_out with at most one --machine; raise if more were given.

    In a line of a batch file (in_batch) the others are ignored.
    """
    places = [place for place, word in enumerate(spelled[:spelled.index('--')])
              if word.startswith('--machine=')]
    if not in_batch:
        refuse_more_machines([spelled[place].partition('=')[2] for place in places])
    return [word for place, word in enumerate(spelled) if place not in places[1:]]


# Options that people try, since other programs have them, such as GNU parallel, sbatch, pueue and
# ssh: (these options, an option that only commands with the remedy have, the remedy).
GUESSES = tuple((frozenset(names.split()), known, remedy) for names, known, remedy in (
    ('--shell', '--follow', 'To open a shell beside a job: execute_remote --shell batch.sh.57.'),
    ('--detach --background', '--follow', 'To leave a batch: Ctrl-C, then d; its jobs keep '
     'running. To start it without a terminal: nohup execute_batch … &'),
    ('--attach', '--follow', 'To see what job 57 prints: --follow 57. To continue a batch: type '
     'the command again that started it.'),
    ('--resume --collect', '--follow', 'To continue a batch and fetch its results: type the '
     'command again that started it.'),
    ('--log --logs --output --tail', '--follow', 'To see what job 57 prints: --follow 57.'),
    ('-o --out --error', '--follow', 'The output of each job is in job_results, such as '
     'job_results/batch.sh.57.out. To see it: --follow 57.'),
    ('--list --queue --progress --bar --eta', '--follow', 'To see all jobs: --status.'),
    ('-a --arg-file --array', '--follow', 'Write each command on a line of the batch file. To '
     'write many: for i in {1..9}; do echo "python3 train.py $i"; done >batch.sh'),
    ('--dependency --depends --depends-on --after --afterok', '--follow', 'To run a batch '
     'after another one: execute_batch part1.sh … && execute_batch part2.sh …'),
    ('--env --export', '--follow', 'To set a variable of a job, write its line as: NAME=VALUE '
     'COMMAND. For all jobs: the key env of a machine file.'),
    ('--setup --prolog --prologue', '--follow', 'To prepare a machine for its jobs: the key setup '
     'of its machine file. For one job, write its line as: PREPARE && COMMAND.'),
    ('-n', '--dry-run', 'To ask for processor cores: --num-cpus 4. To start nothing: --dry-run.'),
    ('--results', '--follow', 'To see the results as a table: results_table.'),
    ('--force --restart', '--follow', 'To run jobs again: --rerun.'),
    ('--jobs --num-jobs --max-jobs -j -P', '--follow', 'To limit the number of jobs on a machine: '
     'the key max_jobs of its machine file. To write such a file: execute_to --init lab1.'),
    ('--pause', '--follow', 'To start no more jobs on a machine: --drop-machine.'),
    ('--name --job-name', '--follow', 'To name a job, write its line as: execute_remote --job-name '
     "NAME 'COMMAND'."),
    ('--background', '--detach', 'To start a job and not wait for it: --detach.'),
    ('--follow --log --logs --output --tail --resume --collect', '--attach', 'To see what a job '
     'prints, and to fetch its results: --attach NAME.'),
    ('--list --status --jobs', '--attach', 'To see what a job prints: --attach NAME. To list the '
     'names: ls job_results/.ssh_scheduler/commands. For a batch: execute_batch --status.'),
    ('--dependency --depends --depends-on --after --afterok', '--attach', 'To run a command '
     "after another one: execute_remote … 'FIRST && SECOND'."),
    ('--env --export', '--attach', "To set a variable: 'NAME=VALUE COMMAND', or the key env of a "
     'machine file.'),
    ('--setup --prolog --prologue', '--attach', "To prepare the command: 'PREPARE && COMMAND', or "
     'the key setup of a machine file.'),
    ('--interactive -it', '--tty', 'To use this terminal: --tty.'),
    ('--port -L', '--forward', 'To forward a port: --forward 8888.'),
    ('--kill --stop', '--cancel', 'To cancel a job: --cancel.'),
    ('--host --hosts --nodes --sshlogin -S', '--stdin', 'To name a machine: --machine lab1.'),
    ('--host --hosts --nodes --sshlogin -S', '--machines', 'To name machines: --machines lab1 '
     'lab2.'),
    ('--gpu --gres', '--num-gpus', 'To ask for GPUs: --num-gpus 2.'),
    ('--cores -c --cpus-per-task --threads --ntasks', '--num-cpus', 'To ask for '
     'processor cores: --num-cpus 4.'),
    ('--walltime', '--timeout', 'To limit the time of a job: --timeout 2h.'),
    ('--return --fetch', '--copy-backwards', 'To fetch files: --copy-backwards.'),
    ('--transfer --upload', '--copy-forwards', 'To send files: --copy-forwards.')))


def stands_for(name, kinds):
    """Return the remedy for an option that this command lacks: other programs have it; or ''.

    kinds: of the options of this command
    """
    for names, known, remedy in GUESSES:
        if name in names and known in kinds:
            return f' {remedy}'
    others = [pattern_of(usage).split()[0] for usage in (
        EXECUTE_BATCH_USAGE, EXECUTE_REMOTE_USAGE, EXECUTE_TO_USAGE, QUERY_MACHINES_USAGE)
        if name in option_kinds(usage)]
    return f' {name} is an option of {" and ".join(others)}.' if others else ''


def read_option(word, unread, kinds, before):
    """Return (name, its values, or None for a flag) of an option.

    unread: the words behind it, from which its value is taken; before: the options before it
    """
    name, equals, value = word.partition('=')
    if name not in kinds:
        guess = stands_for(name, kinds)
        error = UsageError(f'unknown option {name}{"" if guess else nearest(name, kinds)}.')
        error.guess = guess
        raise error
    if kinds[name] == 'list':
        return name, [value] if value else []
    if name in before:
        raise UsageError(f'{name} is given twice.')
    if kinds[name] == 'flag':
        if equals:
            raise UsageError(f'{name} takes no value.')
        return name, None
    if not equals:
        if not unread or unread[0] in kinds or unread[0] == '--':
            before = f' before {unread[0]}' if unread else ''
            raise UsageError(f'{name} needs {value_of(name)}{before}.')
        value = unread.popleft()
    return name, [value]


def value_of(name):
    """Return what an option needs, as the usage texts call it: a file, a number of cores."""
    texts = ''.join((EXECUTE_BATCH_USAGE, EXECUTE_REMOTE_USAGE, EXECUTE_TO_USAGE))
    noun = re.search(rf'(?m)^  {name}=<(\w+)>', texts)
    if not noun:
        return 'a value'
    return 'a number of cores' if noun[1] == 'cores' else (
        f'{"an" if noun[1][0] in "aeiou" else "a"} {noun[1]}')


# Words that begin a command, though this computer may have no program with such a name: bash runs
# the first ones itself, and machines of a lab have the others.
BASH_WORDS = frozenset(
    '. [ [[ { ! alias case cd command declare echo eval exec exit export for function if kill let '
    'popd printf pushd pwd read set source test time trap type ulimit umask unset until wait '
    'while'.split())
LAB_PROGRAMS = frozenset(
    'accelerate apt apt-get bash conda docker git julia jupyter make mamba module mpirun nohup '
    'nvidia-smi nvcc pip pip3 python python3 Rscript sbatch scancel screen sh sinfo squeue srun '
    'sudo systemctl tmux torchrun uv'.split())


def begins_command(word):
    """Tell whether the word begins a command of bash: a program that is here, cd, NAME=value."""
    import shutil
    return bool(word in BASH_WORDS | LAB_PROGRAMS or re.match(r'[A-Za-z_]\w*=', word, re.ASCII)
                or not word.endswith(('.yaml', '.yml')) and shutil.which(word))


HELP_OPTIONS = ('-h', '--help', '--version')


def part_words(argv, kinds, machines):
    """Return (words for this program, words of the command) of argv, whose command has no quotes.

    A list ends where a command seems to begin, but the first word of a list of machines is one.
    machines: other words that are machines for certain
    """
    # Behind a command without quotes, -h is its option.
    kinds = {**dict.fromkeys(MACHINE_FORMS, 'list'),
             **{name: kind for name, kind in kinds.items() if name not in HELP_OPTIONS}}
    own, command, unread = [], [], collections.deque(argv)
    name, listed = None, []             # the option whose list may take the next word, and its list

    def fits(word):
        """Tell whether the list may have the word."""
        is_right = (not listed or word in machines if name in MACHINE_FORMS else
                    os.path.lexists(word))
        return is_right or not (word.startswith('-') or begins_command(word))

    while unread:
        word = unread.popleft()
        option, equals, value = word.partition('=')
        if word == '--':
            own += [word] * (not command)
            command += unread
            break
        if option in kinds:
            own.append(word)
            name, listed = (option, [value] * bool(equals)) if kinds[option] == 'list' else (
                None, [])
            if kinds[option] == 'value' and not equals and unread:
                own.append(unread.popleft())
        elif name and fits(word):
            own.append(word)
            listed.append(word)
        else:
            # No option here is a minus and a letter: -l belongs to the word before it.
            if re.match('-[A-Za-z]', word) and len(listed) > (name in MACHINE_FORMS):
                command.append(own.pop())
            name, listed = None, []
            command.append(word)
    return own, command


def in_quotes(command):
    """Return the words of a command as one word for a shell, which people can read."""
    import shlex
    return one_word(shlex.join(command))


def one_word(text):
    """Return the text as one word for a shell, which people can read."""
    import shlex
    is_plain = "'" in text and not set(text) & set('"\\$`!')
    return f'"{text}"' if is_plain else shlex.quote(text)


def are_machines(words):
    """Tell whether all words but the last seem to be machines, and the last a command."""
    *machines, command = words
    return not any(begins_command(word) or os.path.exists(word)
                   or re.search(r'[\s/]|^-|\.(py|sh|R|jl)$', word) for word in machines) and (
        bool(re.search(r'\s', command)) or begins_command(command))


def missing_quotes(usage, argv, why='', in_batch=False, machines=()):
    """Return the advice to put the command in quotes, with the line to type.

    Return '' if other words are wrong.  why: the error; machines: as for part_words
    """
    import shlex
    name = pattern_of(usage).split()[0]
    own, command = part_words(argv, option_kinds(usage), machines)
    before = len([*itertools.takewhile(lambda word: not word.startswith('-'), command)])
    has_blank = any(re.search(r'\s', word) for word in command)
    if not before or len(command) < 2 or has_blank and not begins_command(command[0]) or (
            are_machines(command) or before == 1 and re.search('option --.*did you mean', why)
            or re.match('unexpected word .* .did you mean', why)):
        return ''
    try:
        parse_options(usage, [*own, shlex.join(command)], in_batch)
    except (UsageError, HelpAsked):
        return ''                       # quotes alone are no remedy
    start = [name] if in_batch else typed_start(name)
    return printable(' Put the command in quotes. Try: '
                     f'{" ".join([shlex.join([*start, *own]), in_quotes(command)])}')


def refuse_help(usage, argv):
    """Raise if -h, --help or --version seems to belong to a command without quotes."""
    kinds = option_kinds(usage)
    _, command = part_words(argv, kinds, ())
    asked = next((word for word in command if word in HELP_OPTIONS), None)
    if not asked:                       # --completion
        return
    spelled, given = spell_out(argv, kinds, 0)
    # Of `--machines lab1 lab2 -h`, lab2 is a machine; of `--machine lab1 ./x -h`, ./x is a command.
    is_command = begins_command(command[0]) or (
        given & MACHINE_FORMS.keys() and command[0] in spelled[spelled.index('--'):])
    advice = missing_quotes(usage, argv) if is_command else ''
    if advice:
        raise UsageError(f'{asked} is an option of {pattern_of(usage).split()[0]} here, not of '
                         f'{printable(command[0])}.{advice}', usage)


ONE_BATCH_FILE = 'execute_batch takes one batch file: put all lines into one.'


UNIT_WORD = re.compile('d|days?|h|hrs?|hours?|m|mins?|minutes?|s|secs?|seconds?|[kmgt](i?b)?',
                       re.IGNORECASE)


def refuse_bare_words(words, argv, usage, alone):
    """Raise if a blank separates a number from its unit, or if a word is an option without dashes.

    words: more than this command takes; alone: the options that replace its <command>, if any
    """
    quantities = {name for name, value, *_ in option_texts(usage) if value in ('time', 'size')}
    apart = [part for word in argv for part in word.split('=', 1)]
    for option, number, unit in zip(apart, apart[1:], apart[2:]):
        if (option in quantities and unit in words and UNIT_WORD.fullmatch(unit)
                and re.fullmatch('[0-9.]+', number)):
            raise UsageError(f'unexpected word {unit!r}. Write the unit without a blank: {option} '
                             f'{number}{unit[0]}.')
    kinds = option_kinds(usage)
    for word in words:
        option = f'--{word}'
        if alone and (word != words[0] or option not in alone or begins_command(word)):
            return
        if option in kinds and not os.path.exists(word):
            raise UsageError(f'unexpected word {word!r} (did you mean {option}?).')


def refuse_words(words, positionals, spelled, command, alone):
    """Raise, since the command line has more words than positionals; tell what they may mean.

    spelled: of spell_out; alone: those options in it that replace the positionals
    """
    import shlex
    given = {word.partition('=')[0] for word in spelled[:spelled.index('--')]}
    extra, hint = words[len(positionals):], ''
    if positionals == ['batch'] and os.path.isfile(words[-1]) and not os.path.exists(words[0]):
        extra = words[:-1]
    is_job = re.fullmatch(r'\.?[0-9]+', extra[0])
    late = next((word for word in extra if word.startswith('-') and word != '-'), None)
    option = '--machine' if command == 'execute_remote' else '--machines'
    if late and positionals != ['command']:
        hint = f' Words behind -- are no options: write {printable(late)} before the --.'
    elif not positionals and alone:
        noun = 'batch file' if command == 'execute_batch' else 'command'
        hint = f' {" and ".join(sorted(alone))} takes no {noun}.'
    elif positionals == ['batch'] and is_job and '--rerun-failed' in given:
        hint = f' For one job: --rerun {extra[0]}.'
    elif positionals == ['batch'] and is_job:
        hint = f' For one job: --what {extra[0]}, or --follow {extra[0]} for its output.'
    elif positionals == ['batch'] and all(map(os.path.isfile, words)):
        hint = (' Name one batch file at a time.' if given & {'--status', '--wait', '--cancel'} else
                f' {ONE_BATCH_FILE}')
    elif positionals == ['batch'] and begins_command(words[0]) and not os.path.exists(words[0]):
        hint = (' <batch> is a file with one command on each line. For one command: '
                'execute_remote.')
    elif positionals == ['command'] and are_machines(words):
        extra = words[:-1]
        if option in given and command == 'execute_remote':
            refuse_more_machines([word.partition('=')[2] for word in spelled
                                  if word.startswith(f'{option}=')] + extra)
        hint = f' To name {"a machine" if option == "--machine" else "machines"}: {option} '
        hint += f'{printable(shlex.join(extra))}.'
    elif positionals != ['command'] and option not in given:
        hint = f' To name machines: {option} {printable(shlex.join(extra))}.'
    raise UsageError(f'unexpected word {extra[0]!r}.{hint}')


def check_for_help(usage, command, words):
    """Raise HelpAsked if the words ask for help or the version."""
    if {'-h', '--help'} & {*words}:
        raise HelpAsked(usage.rstrip())
    if '--version' in words:
        raise HelpAsked(f'{command} {__version__}')


def check_for_completion(usage, spelled):
    """Raise HelpAsked, with the script for a shell, if the words of spell_out ask for that."""
    for word in spelled[:spelled.index('--')]:
        if word.startswith('--completion='):
            shell = word.partition('=')[2]
            if check_for_shell(shell):
                raise UsageError(check_for_shell(shell))
            raise HelpAsked(completion(usage, shell).rstrip())


def read_options(usage, argv, in_batch=False):
    """Return the Options of argv (without the program's name) by the usage text.

    in_batch: argv is a line of a batch file, where --help has no effect
    """
    is_for_command = re.search('(?<!=)<command>', pattern_of(usage))
    try:
        return parse_options(usage, argv, in_batch)
    except HelpAsked:
        if is_for_command:
            refuse_help(usage, argv)
        raise
    except UsageError as error:
        hint = missing_quotes(usage, argv, str(error), in_batch) if is_for_command else ''
        raise type(error)(f'{error}{hint or error.guess}', usage) from None


def pattern_of(usage):
    """Return the lines of a usage text that docopt reads as patterns."""
    return usage.partition('Usage:')[2].partition('\n\n')[0]


def parse_options(usage, argv, in_batch):
    """Return the Options of argv; a UsageError does not have the usage text yet."""
    kinds, pattern = option_kinds(usage), pattern_of(usage)
    command = pattern.split()[0]
    positionals = list(dict.fromkeys(re.findall(r'(?<![=\w])<(\w+)>', pattern)))
    # Options that replace a word, as in (<word> | --this=<x> | --that).
    instead = set(re.findall(r'(--[a-z-]+)(?:=<\w+>(?=\s+\|)|(?:=<\w+>)?(?=\)))', pattern))
    beside = set(re.findall(r'\[<\w+>\] (--[a-z-]+)', pattern))      # … or beside one
    spelled, given = spell_out(argv, kinds, 0)
    if given & instead and not (given & beside and spelled[-1] != '--'):
        positionals = []
    spelled, given = spell_out(argv, kinds, len(positionals))
    if not in_batch:
        check_for_help(usage, command, given)
        check_for_completion(usage, spelled)
    if '--machine' in kinds:
        spelled = keep_one_machine(spelled, in_batch)
    words = spelled[spelled.index('--') + 1:]
    if len(words) < len(positionals):
        raise WordMissing(f'<{positionals[len(words)]}> is missing.')
    if len(words) > len(positionals):
        refuse_bare_words(words, argv, usage, instead if positionals == ['command'] else ())
        refuse_words(words, positionals, spelled, command, given & instead)
    docopt = library('docopt')
    try:
        if not positionals:
            spelled.remove('--')        # docopt would take -- for a word
        # No help, no version, options anywhere; docopt and docopt-ng name these differently.
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
    options.given, options.argv = frozenset(given), (command, *argv)
    return options


# ---- Machine files ----

MACHINE_FOLDER = '~/.local/var'
# ssh takes the rest of the line as the value of these options, quotes included.
UNQUOTED_SSH_OPTIONS = ('proxycommand', 'localcommand', 'remotecommand', 'knownhostscommand',
                        'proxyjump')
HOST = re.compile(r'[A-Za-z0-9_][A-Za-z0-9._%-]*|(?=.*:.*:)[0-9a-fA-F:.]+(%[A-Za-z0-9_.-]+)?')


def is_text(value):
    """Tell whether the value is text that can be sent to a machine."""
    return isinstance(value, str) and not re.search('[\0\ud800-\udfff]', value)


def is_word(value):
    """Tell whether the value is printable text that no program takes for an option."""
    return is_text(value) and value and not value.startswith('-') and value.isprintable()


def fits_quotes(value):
    """Tell whether the value can stand between quotes in an ssh_config, which has no escapes."""
    return not re.search(r'["\\]', str(value))


def is_whole_number(value, least=1, most=math.inf):
    """Tell whether the value is an int within the bounds; a bool is no number here."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def are_variables(value):
    """Tell whether the value is a mapping of names of variables to text or numbers."""
    return isinstance(value, dict) and all(
        is_text(k) and re.fullmatch(r'[A-Za-z_][A-Za-z0-9_]*', k)
        and (isinstance(v, (int, float)) or is_text(v)) for k, v in value.items())


def are_ssh_options(value):
    """Tell whether the value is a mapping of ssh_config(5) options that a machine file may set."""
    return are_variables(value) and all(
        name.lower() not in ('host', 'match', 'include') and str(v).isprintable()
        and (name.lower() in UNQUOTED_SSH_OPTIONS or fits_quotes(v)) for name, v in value.items())


def are_jumps(value):
    """Tell whether the value is a list of jump hosts, as ProxyJump has it."""
    return is_word(value) and all(JUMP.fullmatch(part) for part in value.split(','))


def are_gpu_types(value):
    """Tell whether the value is a mapping of words to sizes: numbers of MB, or texts as 40G."""
    return isinstance(value, dict) and bool(value) and all(
        is_text(name) and re.fullmatch(r'[A-Za-z0-9][\w.-]*', name, re.ASCII)
        and (is_whole_number(size) or is_text(size) and 1 <= size_mb(size) < math.inf)
        for name, size in value.items())


# The words of `wrap` may have these placeholders.  Their values are digits, commas, points and the
# characters of job names, so bash takes them as plain text, quoted or not.
PLACEHOLDERS = ('cores', 'memory_mb', 'gpu_ids', 'gpus', 'name')
BRACES = re.compile(r'\{\{|\}\}|\{[^{}]*\}|[{}]')
LONGEST_WRAP = 2000                 # characters; the remote runner hands it to workers in a pipe

# Opening quote or bracket of bash -> what closes it; a ( counts only within a $(.
CLOSERS = {'"': '"', '`': '`', '$(': ')', '${': '}', '$[': ']', '(': ')'}
UNQUOTED = re.compile(r"""(?s)\\.|\$'(?:[^'\\]|\\.)*'|(?<!\$)'[^']*'|\$[({[]|.""")
QUOTED = re.compile(r'(?s)\\.|\$[({[]|.')


def is_wrap(value):
    """Tell whether the value can be the text of a `wrap`; check_wrap checks its words."""
    return (is_text(value) and value.strip() and len(value) <= LONGEST_WRAP
            and not re.search('[\1-\10\13-\37\177]', value))


def fill_placeholders(wrap, values):
    """Return the text of a `wrap` as bash gets it.  values: {placeholder: text}"""
    return BRACES.sub(lambda match: match[0][0] if match[0] in ('{{', '}}') else
                      values[match[0][1:-1]], wrap)


def check_wrap(wrap, where):
    """Raise unless a `wrap` has only known placeholders, and bash reads it as plain words.

    where: the file and the line, for messages
    """
    for match in BRACES.finditer(wrap):
        why = why_no_placeholder(match[0], wrap[:match.start()], wrap[match.start():])
        if why:
            known = ', '.join(f'{{{name}}}' for name in PLACEHOLDERS)
            raise MachineFileError(sentence(f'{where}: wrap: {why}') + ' The placeholders are '
                                   f'{known}; write {{{{ and }}}} for braces.')
    words = fill_placeholders(wrap, dict.fromkeys(PLACEHOLDERS, '0'))
    variable = re.match(r'\s*([A-Za-z_]\w*)\+?=', words, re.ASCII)
    why = (f'it begins with a variable. Write: env {variable[1]}=…' if variable else
           why_no_words(words))
    if why:
        raise MachineFileError(sentence(f'{where}: wrap must be words of one command: {why}'))


def why_no_placeholder(braces, before, behind):
    """Return what is wrong with a match of BRACES; '' for a placeholder or a doubled brace.

    before, behind: the text before the match, and the text that begins with the match
    """
    name = braces[1:-1]
    if braces in ('{{', '}}'):
        return ''
    if braces == '{':
        return f'the placeholder {printable(behind[:20])!r} is not closed'
    if braces == '}':
        return 'a } closes nothing'
    if name not in PLACEHOLDERS:
        return f'unknown placeholder {printable(braces)}{nearest(name, PLACEHOLDERS)}'
    variable = re.search(r'\$\w*\Z', before, re.ASCII)       # bash would join name and value
    if variable:
        return (f'{variable[0]}{braces} is neither a placeholder nor a variable of bash. Write '
                f'${{{braces}}} for the variable, or quotes between the two')
    return ''


def why_no_words(text):
    """Return why bash would not read the text as the words of one command; '' if it would.

    The text inside $(...) is read only to find its end: only the machine knows its output.
    """
    closers, index, begins = [], 0, True
    while index < len(text):
        is_plain = next((end for end in reversed(closers) if end not in ('}', ']')), ')') == ')'
        token = (UNQUOTED if is_plain else QUOTED).match(text, index)[0]
        index += len(token)
        if closers and token == closers[-1]:
            closers.pop()
        elif token in CLOSERS and closers[-1:] != ['`'] and (token != '(' or closers[-1:] == [')']):
            closers.append(CLOSERS[token])
        elif token == "'" and is_plain:
            closers.append(token)
            break
        elif not closers and token in ';&|<>()':
            return f'{token} stands without quotes'
        elif not closers and token in '#[' and begins:         # a comment, or the index of an array
            return f'a word begins with {token} without quotes'
        begins = token.isspace()
    return f'a {closers[-1]} is missing' if closers else ''


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
    'wrap': (f'words of bash, with at most {LONGEST_WRAP} characters', is_wrap),
    'gpus': ('a list of GPU numbers', are_gpus),
    'max_jobs': ('a number of at least 1', is_whole_number),
    'engine': ('the engine of a cluster: slurm', lambda v: is_text(v) and v in ENGINES),
    'engine_options': ('options of the engine, such as "--partition=gpu --account=lab"', is_text),
    'gpu_types': ('a mapping of types of GPUs to the memory of one, such as {a100: 40G}',
                  are_gpu_types),
    'node_folder': ('an absolute path, or a variable such as $TMPDIR',
                    lambda v: is_text(v) and NODE_FOLDER.fullmatch(v)),
}
ENGINES = ('slurm',)
OF_ENGINES = ('engine_options', 'gpu_types', 'node_folder')     # have a meaning with `engine` only
NODE_FOLDER = re.compile(r'(/|\$\{?[A-Za-z_]\w*\}?)[\w./-]*', re.ASCII)
QUEUED_JOBS = 20            # the default of max_jobs: jobs of one batch in a cluster's queue
RUNS_AGAIN = 'would run a job more than once'
SUBMITS_NO_JOB = 'would submit no job'
# Options of sbatch that the runner sets itself, or that would change what a job is -> a sentence
# on it, without the option's name.
ENGINE_TAKEN = {
    'array': RUNS_AGAIN, 'requeue': RUNS_AGAIN,
    'wrap': 'would replace the command of the job',
    'input': 'would replace the input of the job',
    **dict.fromkeys(('output', 'error', 'open-mode'), 'would move the output of the job away from '
                    'where the program fetches it: it is in job_results'),
    **dict.fromkeys(('export', 'export-file', 'get-user-env'), 'would change the environment that '
                    'the program gives to the job: use the keys env and setup'),
    'chdir': 'would take the job out of its own folder: use the key workdir',
    'job-name': 'would hide the job from the program, which finds its jobs by their names',
    'clusters': ('would hide the job from the program, which asks one cluster: write a machine '
                 'file for each cluster'),
    'wait': 'would stop the program from submitting the next job',
    'signal': 'would replace the signal with which Slurm announces the time limit to the program',
    'hold': 'would let the job wait until you release it',
    'parsable': 'is always used by the program',
    **dict.fromkeys(('test-only', 'help', 'usage', 'version'), SUBMITS_NO_JOB)}


def read_machine_file(path, name):
    """Return the Machine that the YAML file at `path` describes."""
    yaml = library('yaml')
    try:
        loader, node = parse_yaml(path)
        if not isinstance(node, yaml.MappingNode):
            raise MachineFileError(f'{path}: a machine file has lines such as "ip: lab1".')
    except MachineFileError as error:
        hint = f' If it is a list of machines, write @{path}.' if lists_machines(path) else ''
        raise MachineFileError(f'{error}{hint}') from None
    values = {}
    for key_node, value_node in node.value:
        key, where = key_node.value, f'{path}, line {key_node.start_mark.line + 1}'
        if not isinstance(key, str):
            raise MachineFileError(f'{where}: a key must be a word.')
        if key not in MACHINE_KEYS:
            likely = nearest(key, MACHINE_KEYS)
            known = '' if likely else f' The keys are {", ".join(MACHINE_KEYS)}.'
            raise MachineFileError(f'{where}: unknown key {key!r}{likely}.{known}')
        if key in values:
            raise MachineFileError(f'{where}: {key} is given twice.')
        values[key] = read_machine_value(loader, key, value_node, where)
    if 'ip' not in values:
        raise MachineFileError(f'{path}: the key ip (host name or address) is missing.')
    check_engine(values, path)
    return machine_from(values, name, path)


def lists_machines(path):
    """Tell whether each line of a file is one word that can name a machine, as in an @file."""
    lines = []
    with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding='utf-8') as file:
        lines = [line.strip() for line in file if not re.match(r'\s*(#|$)', line)]
    return bool(lines) and all(
        re.fullmatch(r'([\w.-]+@)?[\w.-]+(:[0-9]+)?', line) for line in lines)


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
        raise MachineFileError(f'{path}, line {line}: this line has a control character.') from None
    except yaml.MarkedYAMLError as error:
        line, what = explain_yaml(error, text)
        raise MachineFileError(f'{path}, line {line}: {sentence(what)}') from None
    except RecursionError:
        raise MachineFileError(f'{path}: its YAML is nested too deeply.') from None
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
    if key == 'wrap':
        check_wrap(value, where)
    if isinstance(value, dict) and key != 'gpu_types':      # as text: it may say 010 or 1.10
        return {name.value: text.value for name, text in node.value}
    return value


def explain_yaml(error, text):
    """Return (number of the line, the error) of a YAML error.

    The parser notices a missing colon, quote or bracket late, often on the next line.
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
    is_key = not before.strip() and not re.search(r':(\s|$)|^[\[{]', line)     # a key without colon
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
        env=tuple(values.get('env', {}).items()), wrap=values.get('wrap', ''),
        gpus=tuple(values['gpus']) if 'gpus' in values else None,
        max_jobs=values.get('max_jobs', QUEUED_JOBS if 'engine' in values else None),
        engine=values.get('engine', ''),
        engine_options=read_engine_options(values.get('engine_options', ''), path),
        gpu_types=tuple(sorted((int(size_mb(str(size))), name)
                               for name, size in values['gpu_types'].items()))
        if 'gpu_types' in values else None,
        node_folder=values.get('node_folder', ''))


def check_engine(values, path):
    """Raise if keys of a machine's file have no meaning with or without `engine`."""
    if 'engine' not in values:
        wrong = [key for key in OF_ENGINES if key in values]
        if wrong:
            raise MachineFileError(f'{path}: {wrong[0]} needs the key engine, such as "engine: '
                                   'slurm".')
        return
    if '\\' in values.get('workdir', ''):
        raise MachineFileError(f'{path}: workdir: Slurm takes no path with a backslash.')
    if 'gpus' in values:
        raise MachineFileError(f'{path}: the key gpus names GPUs of one machine, and engine makes '
                               'this a cluster: use engine_options or gpu_types.')
    read_engine_options(values.get('engine_options', ''), path)


def read_engine_options(text, path):
    """Return the words of engine_options; raise if one would break the work of the runner.

    path: of the machine's file
    """
    import shlex
    where = f'{path}: engine_options'
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise MachineFileError(f'{where}: {sentence(str(error))}') from None
    for word in words:
        match = re.fullmatch(r'--([a-z][a-z0-9-]*)(=.*)?', word, re.DOTALL)
        if not match:
            raise MachineFileError(f'{where}: write each option as --name or --name=value, not '
                                   f'{word!r}.')
        taken = next((name for name in ENGINE_TAKEN if name.startswith(match[1])), None)
        if taken:
            raise MachineFileError(sentence(f'{where}: remove --{taken}. It '
                                            f'{ENGINE_TAKEN[taken]}'))
    return words


def check_key(key_path, path):
    """Raise if ssh could not use this private key without a question; ssh's message is less clear.

    path: the machine's file
    """
    where = f'{path}: the key {key_path}'
    try:
        with open(key_path, 'rb') as file:
            info, text = os.fstat(file.fileno()), file.read(65536)
    except OSError as error:
        raise KeyFileError(f'{where} cannot be read: {reason_of(error)}. '
                               'Make one with ssh-keygen, or correct ssh_key_path.') from None
    if not stat.S_ISREG(info.st_mode):
        raise KeyFileError(f'{where} is not a file.')
    if info.st_uid == os.getuid() and info.st_mode & 0o077:
        raise KeyFileError(f'{where} can be read by others, so ssh refuses it. '
                               f'Try: chmod 600 {key_path}')
    if b'PRIVATE KEY' not in text:
        hint = ' (this looks like the public key: remove .pub)' if text[:4] in (
            b'ssh-', b'ecds', b'sk-s', b'sk-e') else ''
        raise KeyFileError(f'{where} is not a private key{hint}.')
    if key_has_passphrase(text):
        raise KeyFileError(f'{where} has a passphrase, which nobody could type here. Use a key '
                               'without one, or remove ssh_key_path and load the key '
                               'into ssh-agent.')


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
    try:
        return machine_at(word)
    except MachineFileError as error:
        names = re.findall(r'[^\s,]+', word)
        if names in ([], [word]) or not all(re.fullmatch(r'[\w.@:%-]+', name) for name in names):
            raise
        raise MachineFileError(f'{error} Separate machines with blanks, without commas: --machines '
                               f'{" ".join(names)}.') from None


def machine_at(word):
    """Return the Machine that [user@]host[:port] names."""
    user, at, host = word.rpartition('@')
    match = re.fullmatch(r'\[(.+)\](?::([0-9]{1,9}))?|([^:]*)(?::([0-9]{1,9}))?', host)
    host, port = (match[1] or match[3], match[2] or match[4]) if match else (host, None)
    if not HOST.fullmatch(host) or at and not USER.fullmatch(user) or (
            port and not 1 <= int(port) <= 65535):
        raise MachineFileError(f'{word!r} is neither a machine file, a name from ~/.ssh/config, '
                               'nor [user@]host[:port].')
    return Machine(name=word, host=host, username=user or None, port=int(port) if port else None)


def machine_words(words):
    """Yield the words; in place of each @file, yield the lines of that file."""
    return (word for word, _ in placed_words(words))


def placed_words(words):
    """Yield (word, '') for each word; for each line of an @file, (line, 'file, line 3: ')."""
    for word in words:
        if not word.startswith('@'):
            yield word, ''
            continue
        try:
            with open(word[1:], encoding='utf-8') as file:
                lines = [line.strip() for line in file]
        except OSError as error:
            raise MachineFileError(f'the list of machines {word} cannot be read: '
                                   f'{reason_of(error)}.') from None
        except UnicodeDecodeError:
            raise MachineFileError(f'the list of machines {word} is not UTF-8 text.') from None
        lines = [(line, f'{word[1:]}, line {number}: ') for number, line in enumerate(lines, 1)
                 if line and not line.startswith('#')]
        if not lines:
            raise MachineFileError(f'the list of machines {word} names no machine.')
        for line, where in lines:
            if re.search(r'[\s,]', line) and not any(map(os.path.isfile, machine_paths(line))):
                raise MachineFileError(f'{where}{line!r} is not one machine. Write one machine on '
                                       'each line.')
        yield from lines


HERE_TOO = ' Example: {} lab1' + (', or localhost to run here.' if LINUX else '.')


def check_machines(options, positional=None):
    """Raise unless machines are named.  positional: the word that may be missing instead."""
    if options['--machines'] is None:
        raise UsageError(f'--machines is missing.{HERE_TOO.format("--machines")}')
    if not options['--machines']:
        raise UsageError('--machines names no machine' + (
            f', or <{positional}> is missing.' if positional else '.'))


def refuse_again(machine, others):
    """Raise if one of the other Machines is this one."""
    for other in others:
        if machine.name == other.name:
            raise MachineFileError(f'the machine {machine.name} is named twice.')
        if machine.address == other.address:
            raise MachineFileError(f'{other.name} and {machine.name} are the same account, '
                                   f'{machine.address}: name one of them.')


def find_machines(words):
    """Return (the Machines, sentences on wrong machine files); raise if all files are wrong.

    A machine whose file is wrong is left out, so that the others can work.  A word that names no
    machine is an error, since a typing error should be seen before hours of work.  A machine that
    is named twice is an error, too.
    """
    machines, wrong = [], {}
    for word, where in placed_words(words):
        try:
            machine = find_machine(word)._replace(word=word)
        except MachineFileError as error:
            if not any(os.path.lexists(path) and not os.path.isdir(path)
                       for path in machine_paths(word)):
                raise MachineFileError(f'{where}{error}') from None
            machine = Machine(word, f'file of {word}')      # an address that no other has
            wrong[word] = str(error)
        refuse_again(machine, machines)
        machines.append(machine)
    if wrong and len(wrong) == len(machines):
        raise MachineFileError('\n'.join(wrong.values()))
    return [machine for machine in machines if machine.name not in wrong], [*wrong.values()]


# ---- Batch files ----

def one_command(machine, command):
    """Return what to type in place of execute_batch.  command: as one word for a shell"""
    import shlex
    return printable(' A batch file has one command on each line. To run one command: '
                     f'execute_remote --machine {shlex.quote(machine)} {command}')


def read_batch_text(path, stdin):
    """Return the text of the batch file; '-' is `stdin` (a binary stream)."""
    try:
        if path == '-':
            data = stdin.read()
        else:
            with open(path, 'rb') as file:
                data = file.read()
    except OSError as error:
        is_command = re.search(r'\S\s', path) and begins_command(path.split()[0])
        advice = one_command('MACHINE', one_word(path)) if is_command else ''
        raise BatchFileError(f'the batch file {path} cannot be read: {reason_of(error)}.'
                             f'{advice}') from None
    try:
        text = data.decode().removeprefix('\ufeff')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise BatchFileError(f'{path}, line {line}: this is not UTF-8 text.') from None
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise BatchFileError(f'{path}, line {line}: this line has a NUL character.')
    return text


def split_batch(text):
    """Yield (number of the first line, command) of each command of a batch file.

    Blank lines and lines that begin with # are counted, but are no commands.  A backslash at the
    end of a line continues the command, which keeps the backslash, since bash needs it.
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
    """Return the first part of job names: example/batch.sh -> example_batch.sh, - -> stdin."""
    if path == '-':
        return 'stdin'
    parts = [part for part in os.path.normpath(path).split('/') if part not in ('', '..')]
    return re.sub(r'[^A-Za-z0-9._+=@%-]', '_', '_'.join(parts)).lstrip('.-')[-150:] or 'batch'


def jobs_named(words, names, path, tell):
    """Return the names of the jobs that the words mean: 57, .57, or the whole name.

    names: {name: Job} of all jobs; path: of the batch file
    tell: called with a sentence for each number that means one job, and is the line of another
    """
    found, batch = {}, name_of_batch(path)
    for word in words:
        name = next((name for name in (word, f'{batch}.{word.removeprefix(".")}')
                     if name in names), None)
        if name is None:
            number = word.removeprefix('.')
            likely = many_jobs(word) or nearest(word, names) if not number.isdecimal() else next(
                (f' (line {number} is job {name})' for name, job in names.items()
                 if f'{job.line}' == number != '0'), '')
            raise UsageError(f'{batch} has no job {printable(word)}{likely}. To see its jobs: '
                             f'{typed_for(path, "--status")}')
        found[name] = None
    for note in other_lines(words, names, batch):
        tell(note)
    return list(found)


def many_jobs(word):
    """Return how to write a word such as 7-9 or 7,8, which seems to mean several jobs, or ''."""
    ends = re.fullmatch(r'\.?([0-9]+)(?:-|\.\.|:)\.?([0-9]+)', word)
    if ends:
        return f' (for several jobs write {{{ends[1]}..{ends[2]}}})'
    parts = word.split(',')
    is_list = len(parts) > 1 and all(re.fullmatch(r'\.?[0-9]+', part) for part in parts if part)
    return f' (for several jobs write {" ".join(filter(None, parts))})' if is_list else ''


def other_lines(words, names, batch):
    """Yield a sentence for each number that means one job, and is the line of another.

    Lines move when others are inserted; names stay.
    """
    at_line = {f'{job.line}': name for name, job in names.items()}
    for number in filter(str.isdecimal, words):
        name, other = f'{batch}.{number}', at_line.get(number)
        if number not in names and name in names and other not in (None, name):
            line = names[name].line
            yield (f'{number} means the job {name}{f" (line {line})" if line else ""}; line '
                   f'{number} is the job {other}')


def check_job_name(name, where, most=180):
    """Raise unless the name is a file name that is safe here and on machines.

    most: characters; fewer than file systems allow, since the program adds -2 to a name
    """
    if name.endswith('.partial'):
        raise BatchFileError(f'{where}: the job name {name!r} must not end with .partial: '
                             '--sync-back makes folders with such names.')
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
        memory_mb=math.ceil(number('--memory-required', start.memory_mb, options.size_mb,
                                   least=0)),
        reserve=options['--reserve'] or start.reserve,
        gpus=0 if options['--no-gpu-required'] else gpus,
        gpu_memory_mb=math.ceil(number('--gpu-memory-required', start.gpu_memory_mb,
                                       options.size_mb, least=0)),
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
    jobs, lines, wrong = [], {}, []
    for line, command in split_batch(text):
        job = Job(f'{stem}.{line}', command, line, whole, forwards, backwards)
        try:
            job = read_job(job, path, lines, warn)
        except BatchFileError as error:
            wrong.append((line, str(error)))
            continue
        lines[job.name] = line
        jobs.append(job)
    if wrong:
        raise WrongLines(wrong, jobs)
    if not jobs:
        raise BatchFileError(f'the batch file {path} has no command.')
    for name in lines:
        stem, end = os.path.splitext(name)
        if end in ('.out', '.err') and stem in lines:
            raise BatchFileError(f'{path}: the results of the job {name}, line {lines[name]}, '
                                 f'would lie where {stem}, line {lines[stem]}, has a stream; give '
                                 'one of them another --job-name.')
    return jobs


def read_job(job, path, lines, warn):
    """Return the Job of a line; raise if the line is wrong.

    job: as the options of the batch have it; lines: {name: line} of the jobs before it
    """
    where = f'{path}, line {job.line}'
    if re.match(r'\s*execute_remote(\s|$)', job.command):
        job = read_partial(job, where, warn)
    check_job_name(job.name, where)
    if job.name in lines:
        raise BatchFileError(f'{path}: the lines {lines[job.name]} and {job.line} have the same '
                             f'job name {job.name}; give one of them another --job-name.')
    return job


# Options of a line that change the results of its job.  The command and these options identify the
# job in a later run of the batch.  The options for memory and those of the whole batch are left
# out: a user who gives all lines more memory must not run 400 jobs again.
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
    """Return the job, changed by the options of its line, which is an execute_remote command."""
    import shlex
    try:
        words = shlex.split(without_continuations(job.command))
    except ValueError:                  # bash itself would wait for more lines
        raise BatchFileError(f'{where}: execute_remote: a quote is missing, or a word behind the '
                             'last backslash.') from None
    try:
        options = read_options(EXECUTE_REMOTE_USAGE, words[1:], in_batch=True)
        if options['--machine'] is not None:
            warn(f'{where}: --machine is ignored: machines are allocated automatically')
        for name in options.given & {'--stdin', '--tty', '--detach', '--attach', '--cancel',
                                     '--shell', '--forward', '--nice', '--timeout', '--keep-files',
                                     '--away-limit', '--verbose'}:
            instead = (' To limit the time of this job, write its command as: timeout 10m COMMAND.'
                       if name == '--timeout' else '')
            raise UsageError(f'{name} has no meaning in a batch file.{instead}')
        backwards = options['--copy-backwards']
        return job._replace(
            name=options['--job-name'] or job.name, command=options['<command>'],
            allocation=read_allocation(options, job.allocation),
            forwards=read_forwards(options, job.forwards),
            backwards=job.backwards if backwards is None else read_backwards(options),
            own=' '.join(f'{name}={json.dumps(options[name])}' for name in DECISIVE_OPTIONS
                         if name in options.given))
    except SchedulerError as error:
        raise BatchFileError(f'{where}: execute_remote: {error}') from None


def read_backwards(options):
    """Return the paths to fetch from a job; None for all files that it made or changed."""
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

# This program reads commands, each with a NUL behind it.  For each command that bash refuses it
# prints the number and the reason, also with a NUL; so it does for a here-document without its end,
# of which bash only warns.  After set -n bash runs nothing, so only bash itself prints.  Each
# command has a subshell: two commands in one could complete each other.  A bash before 4.0, as on
# macOS, would refuse correct commands, too.
SYNTAX_CHECK = r"""
((BASH_VERSINFO[0] >= 4)) || exit
number=0
while IFS= read -rd '' command; do
  if ! said=$({ eval $'set -n\n'"$command"; } 2>&1) || [[ $said == *here-document* ]]; then
    printf '%s %s\0' "$number" "$said"
  fi
  number=$((number + 1))
done
"""


# What bash reports if a line is only a part of an if, a loop or a function.
UNFINISHED = re.compile(r'unexpected end of file|unexpected token .(then|do|done|fi|else|elif|esac|'
                        r'\}|\)|;;).$')


HERE_DOCUMENT = ('a here-document (<<) has no text here, since its text and its end are on other '
                 'lines')


def advice_on_syntax(why):
    """Return what to type where bash refuses a command, or ''.  why: the words of bash"""
    if why == HERE_DOCUMENT:
        return (" Each line runs by itself: put the text into a file and write COMMAND <FILE, or "
                "write printf '%s\\n' 'LINE 1' 'LINE 2' | COMMAND.")
    unclosed = re.search(r'EOF while looking for matching .(.)', why)
    if unclosed:
        what = 'quote is missing: write another' if unclosed[1] in '"\'`' else (
            'bracket is missing: write')
        return f' A {what} {unclosed[1]} on the same line. Each line runs by itself.'
    return (' Each line runs by itself: write an if, a loop or a function on one line, or end each '
            'of its lines but the last with a backslash.') if UNFINISHED.search(why) else ''


def refuse_syntax(path, jobs, said):
    """Raise if bash refuses a command of the jobs.  said: what SYNTAX_CHECK printed (bytes)."""
    kinds = collections.defaultdict(list)       # the advice, or the reason -> (reason, job)
    for text in said.decode('utf-8', 'replace').split('\0')[:-1]:
        number, complaint = text.split(' ', 1)
        first_line = complaint.split('\n')[0]           # bash: eval: line 2: why
        why = printable(first_line.rpartition(': line ')[2].partition(': ')[2])
        if re.search('warning: .*here-document', first_line):
            why = HERE_DOCUMENT
        kinds[advice_on_syntax(why) or why].append((why, jobs[int(number)]))
    if kinds:
        raise WrongLines([(found[0][1].line, sentence(
            f'{path}, {lines_of([job for _, job in found])}: '
            f'{"" if found[0][0] == HERE_DOCUMENT else "bash refuses this command: "}'
            f'{found[0][0]}') + advice_on_syntax(found[0][0])) for found in kinds.values()])


# Commands that change only the shell that runs them, or wait for processes of that shell: (first
# words, pattern of the rest, whether `setup` of a machine file can have them).  Messages name the
# first word and the pattern's group.
SETTINGS = (
    ('export source . declare typeset unset eval', '() .+', True),
    ('conda mamba micromamba pyenv', '( (?:activate|deactivate|shell))(?: .*)?', True),
    ('spack ml module', '( (?:load|add|use|unload|rm|swap|switch|purge))(?: .*)?', True),
    ('ml workon', '()(?: .*)?', True),
    ('cd pushd popd', '()(?: .*)?', False),
    ('set shopt alias unalias ulimit umask trap', '() .+', False),
    ('wait', '()(?: .*)?', False),
    ('NAME=value', '()(?: NAME=value)*', False))
SETTING_WORDS = frozenset(word for words, _, _ in SETTINGS for word in words.split())


def setting_of(command):
    """Return (how the command begins, whether `setup` can have it) if it only changes its shell.

    None for any other command.
    """
    import shlex
    first = re.match(r'\s*([\w./-]+)(?=\s|$)', command)      # unquoted, and no NAME=value
    if first and first[1] not in SETTING_WORDS:
        return None                         # most lines; shlex would take 2.5 s for 50,000 lines
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
    first = command.partition(' ')[0]
    for words, pattern, by_setup in SETTINGS:
        match = first in words.split() and re.fullmatch(pattern, command[len(first):])
        if match:
            return first + match[1], by_setup
    return None


def warn_of_settings(path, jobs, warn):
    """Warn, once for each kind, of lines that do nothing since each line has its own shell."""
    kinds = collections.defaultdict(list)
    for job in jobs:
        kinds[setting_of(job.command)].append(job)
    kinds.pop(None, None)
    for (begin, by_setup), useless in kinds.items():
        if begin == 'wait':
            warn(f'{path}, {lines_of(useless)}: wait does not wait for other lines, since each '
                 'line runs by itself. Write the lines that run later into a second batch file: '
                 'execute_batch part1.sh … && execute_batch part2.sh …')
            continue
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

    path: the folder relative to the current one; '' for the current one
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
        elif kind in '-+HS' and not only_receiver:      # P and R are for the receiver only
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
    """The files to send: entries in an order in which each folder comes before its contents."""
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

    def __init__(self, exclude, option, never=(), filtered=True):
        self.entries = {}               # path -> Entry
        self.left_out = set()           # in words
        self._option = option           # for messages: the option that names the paths
        self._exclude = [compile_rule(pattern) for pattern in exclude]
        self._never = never             # paths that are left out without a message
        # folder -> the rules that apply inside it; None: .rsync-filter files are not read
        self._rules = {} if filtered else None

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
            raise FilesError(f'{self._option}: you may not read {path}. Leave it out with '
                             '--exclude.')
        if kind == 'd' and not os.access(path or '.', os.R_OK | os.X_OK):
            raise FilesError(f'{self._option}: you may not read the folder {path or "."}. Leave it '
                             'out with --exclude.')

    def _wanted(self, path, is_folder):
        """Tell whether to send the path; if not, note why."""
        folder, _, name = path.rpartition('/')
        if path in self._never:
            return False
        if name in NEVER_SENT:
            if path != 'job_results':       # every project has this folder; do not mention it
                self.left_out.add(name)
            return False
        text = bytes_as_text(path)
        for rule in [*self._exclude, *self._rules_inside(folder)]:
            if rule.applies(text, is_folder):
                if not rule.include:
                    self.left_out.add('files that the exclude rules name')
                return rule.include
        return True

    def _rules_inside(self, folder):
        if self._rules is None:
            return []
        if folder not in self._rules:
            inherited = self._rules_inside(os.path.dirname(folder)) if folder else []
            own, cleared = read_filter_file(folder or '.', folder)
            self._rules[folder] = own if cleared else own + inherited
        return self._rules[folder]


def scan_tree(paths, exclude, option='--copy-forwards', never=(), filtered=True):
    """Return the Tree of these paths, relative to the current folder.

    Rules apply in this order: the paths in `never`, .git and job_results; those of `exclude`; those
    of each folder's .rsync-filter, nearest folder first.  The first rule that applies decides.
    Without `filtered`, .rsync-filter is a file like any other.
    """
    walk = Walk(exclude, option, never, filtered)
    for path in paths:
        check_named(path, option)
        try:
            walk.add('' if path == '.' else path)
        except OSError as error:
            raise FilesError(f'{option} {path}: {error.filename} cannot be read: '
                             f'{reason_of(error)}.') from None
    return Tree(tuple(walk.entries.values()), tuple(sorted(walk.left_out)))


# A Manifest reads file contents while logins are under way.  To be done in that time, it reads only
# the CONTENTS smallest files, at most CONTENTS_BYTES in all.
CONTENTS, CONTENTS_BYTES = 5000, 32 * 2**20
TO = '-> '                  # in front of the target of a link


def is_inside(path):
    """Tell whether a path may be sent: it is relative, and does not lead out of its folder."""
    return (os.path.normpath(path) == path and path[:1] != '/'
            and not {'..', '.', *NEVER_SENT}.intersection(path.split('/')))


class Manifest:
    """The files that a job was given, to compare them with later ones, and to send them again.

    files: {path: [mode, size, time of change in ns, content]}; the content is a digest of the
    file's bytes, '-> TARGET' for a link, or '' for a file that is compared by size and time
    linked: the paths of --link-forwards, whose files' contents are not read
    empty: the empty folders
    digest: 16 hex digits of files and linked, without the times of files that have a digest
    """

    def __init__(self, files, linked=(), empty=()):
        import hashlib
        self.files, self.linked, self.empty = files, tuple(linked), tuple(empty)
        rows = [[path, mode, size, content or ns]
                for path, (mode, size, ns, content) in sorted(files.items())]
        self.digest = hashlib.blake2b(json.dumps([rows, self.linked]).encode(),
                                      digest_size=8).hexdigest()

    @classmethod
    def of(cls, copy, link, linked=()):
        """Return the Manifest of the files of the two Trees of Forwards; linked: Forwards.link."""
        entries = [entry for entry in copy.entries if entry.kind != 'd']
        contents = {entry.path: TO + entry.target for entry in entries if entry.kind == 'l'}
        files, total = [entry for entry in entries if entry.kind == 'f'], 0
        for entry in sorted(files, key=lambda entry: (entry.size, entry.path))[:CONTENTS]:
            total += entry.size
            if total > CONTENTS_BYTES:
                break
            with contextlib.suppress(OSError):          # a file that is gone fails when it is sent
                contents[entry.path] = content_digest(read_file(entry.path))
        entries += [entry for entry in link.entries if entry.kind != 'd']
        folders = {entry.path for entry in copy.entries if entry.kind == 'd'}
        empty = sorted(folders - {os.path.dirname(entry.path) for entry in copy.entries})
        return cls({entry.path: [entry.mode, entry.size, entry.mtime_ns,
                                 contents.get(entry.path, '')] for entry in entries},
                   linked, empty)

    def changed(self, older):
        """Return the paths that differ from an older Manifest, sorted."""
        def differ(path):
            one, other = self.files.get(path), older.files.get(path)
            if not (one and other) or one[:2] != other[:2]:
                return True
            return one[3] != other[3] if one[3] and other[3] else one[2] != other[2]

        return sorted(filter(differ, self.files.keys() | older.files.keys()))


def read_file(path):
    """Return the bytes of a file."""
    with open(path, 'rb') as file:
        return file.read()


def content_digest(data):
    """Return 32 hex digits that stand for these bytes."""
    import hashlib
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def differs_now(path, manifest):
    """Tell whether a file that was sent differs from the one here now, or is gone."""
    mode, size, ns, content = manifest.files[path]
    try:
        info = os.lstat(path)
        if content.startswith(TO):
            return not stat.S_ISLNK(info.st_mode) or TO + os.readlink(path) != content
        if not stat.S_ISREG(info.st_mode) or info.st_size != size:
            return True
        return content_digest(read_file(path)) != content if content else info.st_mtime_ns != ns
    except OSError:
        return True


def was_touched(path, manifest):
    """Tell whether a file that was sent now has another size or time here, or is gone."""
    _, size, ns, content = manifest.files[path]
    try:
        info = os.lstat(path)
    except OSError:
        return True
    return info.st_mtime_ns != ns or info.st_size != size and not content.startswith(TO)


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
    """Return the paths of the links in these Trees that work here, but not on a machine.

    linked: the paths of --link-forwards, which on a machine are links from `copy` into `link`.
    A link is lost if its target is not sent, or is a path of this computer; each machine has its
    own SYSTEM_FOLDERS.
    """
    # Path on the machine -> target of the link there, or None; a tuple is a path from the top.
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
            return False                    # the path leaves the sent files
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


LARGE_BYTES = 500e6         # give advice if more than this is sent to a machine


def advise_on_size(tree, machines):
    """Return advice on the largest path to send, and how to leave it out; '' if all is small."""
    total = tree.size
    if total <= LARGE_BYTES:
        return ''
    below = collections.Counter()               # path of a folder or file -> its bytes
    for entry in tree.entries:
        path = entry.path if entry.size else ''
        while path:
            below[path] += entry.size
            path = os.path.dirname(path)
    top = ''
    while True:                                 # go down while one path holds more than half
        inside = [(size, path) for path, size in below.items() if os.path.dirname(path) == top]
        size, path = max(inside, default=(0, ''))
        if size <= (total if not top else below[top]) / 2 and top or not path:
            break
        top = path
    import shlex
    word = shlex.quote(top)
    return (f'{size_of(total)} are sent to {"each of " * (machines > 1)}'
            f'{count_of(machines, "machine")}, {size_of(below[top])} of it {printable(top)}.\n'
            f'To leave it out: --exclude {word}\n'
            f'To send it once, for reading: --link-forwards {word}')


def check_named(path, option):
    """Raise unless the path that the user named exists and lies in the current folder."""
    here = os.path.realpath('.')
    if path == '.' and here in ('/', os.path.realpath(os.path.expanduser('~'))):
        raise FilesError(f'all of {here} would be sent to every machine. Start from a folder of '
                         'its own, or name the paths with --copy-forwards (without a path: '
                         'no files).')
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


def check_files(path, jobs, usual):
    """Raise unless all files that the jobs send exist; name the lines that have other files.

    path: of the batch file; usual: the Forwards of the batch
    """
    lines, wrong = collections.defaultdict(list), []
    for job in jobs:
        lines[job.forwards].append(job)
    for forwards, same in lines.items():
        try:
            check_forwards(forwards)
        except FilesError as error:
            if forwards == usual:
                raise
            wrong.append(f'{path}, {lines_of(same)}: {error}')
    if wrong:
        raise FilesError(first_of(wrong))


# ---- Archives: tar, for small trees, and where one side has no rsync ----

def archive(placed):
    """Yield a tar archive (POSIX pax) of (name in it, Entry) pairs, in pieces.

    A file that shrinks while it is read is filled with zeros.  A file that grows is cut, and a file
    that is gone is left out.  So the archive stays whole; rsync would not do better.
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
    """Return the time of change of an archive's member in ns; tarfile's float is less exact."""
    text = member.pax_headers.get('mtime', '')
    match = re.fullmatch(r'(-?)([0-9]{1,11})(?:\.([0-9]{1,9})[0-9]*)?', text)
    if not match:
        return int(member.mtime) * 10**9 if 0 <= member.mtime < 10**11 else 0
    ns = int(match[2]) * 10**9 + int((match[3] or '0').ljust(9, '0'))
    return -ns if match[1] else ns


def make_parents(folder, names):
    """Return the folder with these names below `folder`, made as needed; None if one is no folder.

    Each name is checked: os.makedirs would follow a link that leads out of `folder`.
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

    Make the folders that lead to it, and the member itself if it is a folder.
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
    """Make the file or link `target`, which does not exist yet, from an archive's member."""
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

    It makes only files, folders and links, all inside `folder`, and follows no link.  tarfile's own
    filter does not ensure that (CVE-2025-4517 and others).
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
            elif not os.path.lexists(target):       # else the archive has this name twice
                unpack_file(tar, member, target)
    for target, member in reversed(folders):        # last, since new files change a folder's time
        os.chmod(target, member.mode & 0o777)
        os.utime(target, ns=(mtime_ns(member),) * 2)
    return refused


# ---- Probe: the facts that a machine reports -> Capacity ----

FEWEST_TICKS = 4            # fewer ticks (1/100 s) are too few to tell the load
NO_NVIDIA_SMI = 'has no nvidia-smi, so no GPU is known'
UNKNOWN_WORDS = ('[n/a]', 'n/a', '[not supported]')      # and not 'ERR!': such a GPU is broken


class Need(NamedTuple):
    """The resources that one job of any batch needs on a machine, and those it was seen to use.

    The job's runner records the Need there, so that other batches see promised resources.
    """
    key: str                        # job.attempt; '' for a job of another project
    user: str                       # who runs a job of another project; '' for the login's user
    cores: float
    memory_mb: int
    reserve: bool
    gpus: dict                      # index -> (MB, share of time, whether it is reserved)
    used_mb: int
    ticks: int                      # processor time, in 1/100 s


class Sample(NamedTuple):
    """Numbers of one probe, with which the next probe is compared."""
    busy: int                       # processor ticks since boot, of all processors
    total: int
    ticks: dict                     # key of a Need -> ticks of its job; of others' jobs under ''
    gpu_free_mb: dict               # index -> MB, before this batch had jobs there


def parse_probe(facts, machine, ours=(), before=None, ended_ticks=0):
    """Return the Capacity that the probe's facts, a list of (key, text), give.

    ours: the keys (job.attempt) of this batch's jobs there; resources that they use count as free
    before: the Sample of the last probe
    ended_ticks: the ticks of this batch's jobs that have ended since then

    Never raises.  A fact that cannot be read is unknown, and the batch uses no unknown resource.
    """
    values, needs = dict(facts), read_needs(facts)
    others = [need for need in needs if need.key not in ours]
    processors, usable_cores, total_mb, available_mb = read_size(facts)
    # all_mb, all_cores: what all batches may use together.  The needs of other batches are
    # subtracted whether or not their jobs use them yet.
    all_mb = available_mb + sum(min(need.used_mb, need.memory_mb) for need in needs)
    all_mb = min(all_mb, total_mb)
    free_mb = max(all_mb - sum(need.memory_mb for need in others), 0)
    busy = busy_cores(values, needs, processors, before, ended_ticks)
    all_cores = max(min(usable_cores, processors - busy), 0.0)
    free_cores = max(all_cores - sum(need.cores for need in others) / CORES_OVERLOAD, 0.0)
    first_free_mb = before.gpu_free_mb if before else {}
    gpus, limits, trouble = parse_gpus(facts, machine, needs, ours, first_free_mb, free_mb)
    for index in [gpu.index for gpu in gpus if gpu.unified]:     # these share the machine's memory
        free_mb -= sum(need.gpus[index][0] for need in others if index in need.gpus)
    if machine.gpus is not None:
        gpus, trouble = only_listed(gpus, machine.gpus, trouble)
    return Capacity(
        cores=free_cores, memory_mb=max(free_mb, 0), gpus=gpus, total_cores=usable_cores,
        total_memory_mb=total_mb, max_jobs=machine.max_jobs,
        gpu_trouble='' if gpus else trouble, lost_gpus=trouble if gpus else '',
        batch_jobs=len(others), batch_users=tuple(sorted(need.user for need in others)),
        reserved=any(need.reserve for need in others),
        limits=(thousandths(all_cores * CORES_OVERLOAD), all_mb, *limits))


def parse_queue(facts, machine, known=None):
    """Return the Queue that the facts of a cluster's probe give, a list of (key, text).

    known: the Queue of an earlier probe, whose partitions are kept if these facts name none
    Never raises: a fact that cannot be read is unknown.
    """
    values = dict(facts)
    partitions = tuple(filter(None, (
        parse_partition(line) for key, line in facts if key == 'partition')))
    jobs = values.get('own_jobs', '').split()
    own_jobs = tuple(map(int, jobs)) if len(jobs) == 2 and all(map(str.isdigit, jobs)) else None
    return Queue(values.get('engine', machine.engine).strip(), machine.max_jobs, machine.gpu_types,
                 partitions=partitions or (known.partitions if known else ()),
                 own_jobs=own_jobs or (known.own_jobs if known else (0, 0)))


def parse_partition(line):
    """Return the Partition of a line of sinfo, or None.

    line: NAME|UP|LIMIT|NODES|A/I/O/T|GRES|MB|STATE|REASON; A/I/O/T: cores that are allocated,
    idle, other and in all, sinfo(1)
    """
    fields = line.split('|', 8)
    if len(fields) != 9:
        return None
    name, up, _, nodes, cores, gpus, _, state, reason = fields
    numbers = [whole_number(text) for text in cores.split('/')]
    if len(numbers) != 4 or None in numbers or whole_number(nodes) is None:
        return None
    return Partition(name.rstrip('*'), up == 'up', int(nodes), state.rstrip('*~#$@+-'),
                     numbers[1], numbers[3], '' if gpus == '(null)' else gpus,
                     name.endswith('*'), '' if reason == 'none' else reason)


def use_in(facts, before):
    """Return how much of a machine all its users use, as a sample for `Seen`.

    before: the Sample of the last probe, or None
    """
    values = dict(facts)
    processors, cores, total_mb, available_mb = read_size(facts)
    now, busy = two_numbers(values.get('ticks')), None
    if before and now[1] - before.total >= FEWEST_TICKS:
        busy = max(now[0] - before.busy, 0) / (now[1] - before.total) * processors
    gpus = []
    for key, line in facts:
        numbers = [number_or_none(field.strip()) for field in line.split(',', 5)[:5]]
        if key == 'gpu' and len(numbers) == 5 and None not in (numbers[0], *numbers[2:]):
            index, _, total, free, share = numbers
            gpus.append([index, max(total - free, 0), total, min(share, 100) / 100])
    return {'busy_cores': round(min(decimal(values.get('load'), 0.0) if busy is None else busy,
                                    processors), 2),
            'cores': cores, 'used_memory_mb': total_mb - available_mb, 'memory_mb': total_mb,
            'gpus': gpus}


def read_size(facts):
    """Return (processors, how many of them the cgroups allow, MB in all, MB available)."""
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
            # The ticks of batches: /proc has those of each job and its descendants; a job that
            # ended meanwhile reported its own in its end event.
            by_jobs = ended_ticks + sum(max(need.ticks - before.ticks.get(need.key, 0), 0)
                                        for need in needs if need.key)
            by_jobs += max(sum(need.ticks for need in needs if not need.key)
                           - before.ticks.get('', 0), 0)
            return min(max(used - by_jobs, 0) / total, 1) * processors
    load = decimal(values.get('load'), math.inf)
    begun = two_numbers(values.get('ticks_before')) if 'ticks_before' in values else now
    used, total = now[0] - begun[0], now[1] - begun[1]
    # The ticks since the login began are few, and include the work of the login itself.  The load
    # of the last minute includes jobs that have just ended.  Real use of the machine shows in both.
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
    """Return the Needs among the facts; skip texts that cannot be read."""
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
        key, user = ('', job[1:]) if job.startswith('-') else (job, '')
        needs.append(Need(key, user, int(cores) / 1000, int(memory_mb), reserve == '1', gpus,
                          int(used_kb) // 1024, int(ticks)))
    return needs


def whole_number(text):
    """Return the text as a whole number; 0 if it is no such number."""
    return int(text) if text and re.fullmatch(r'[0-9]{1,18}', text) else 0


def two_numbers(text):
    """Return the two numbers of 'n/m', zeros for anything else."""
    first, _, second = (text or '').partition('/')
    return whole_number(first), whole_number(second)


def decimal(text, unknown):
    """Return the text as a non-negative decimal number; `unknown` if it is no such number."""
    return float(text) if text and re.fullmatch(r'[0-9]{1,9}(\.[0-9]{1,9})?', text) else unknown


def parse_gpus(facts, machine, needs, ours, first_free_mb, memory_mb):
    """Return (the Gpus, their limits as text, why there are no others) of the facts of a probe.

    first_free_mb: {index: MB} before this batch had jobs there
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


CONTEXT_MB = 100                # a process on a GPU uses more than this of its memory
DRIVER_MB = 1000                # of a GPU without a process, the driver uses less than this


def share_gpu(gpu, processes, needs, ours, first_free_mb):
    """Return (the Gpu as it is for this batch, its limits for all batches as text).

    gpu: as nvidia-smi reports it; processes: those on this GPU, as gpu_processes returns them
    """
    here = [need for need in needs if gpu.index in need.gpus]
    mine = [need.gpus[gpu.index] for need in here if need.key in ours]
    theirs = [need.gpus[gpu.index] for need in here if need.key not in ours]
    if processes:
        hides = not all(mb for mb, *_ in processes)
        used, asked = collections.Counter(), collections.Counter()      # key of a Need -> MB
        for mb, _, key in processes:
            used[key] += mb
        for need in here:
            asked[need.key or 'other'] += need.gpus[gpu.index][0]
        taken_mb = sum(min(used[key], mb) for key, mb in asked.items())
    else:
        # In a container nvidia-smi names no process.  Assume that this batch's jobs use the memory
        # that is no longer free since it began, up to what they were promised.
        taken_mb = min(max(first_free_mb - gpu.memory_mb, 0), sum(mb for mb, *_ in mine))
        hides = gpu.utilization > 0 or gpu.memory_mb < max(
            first_free_mb - CONTEXT_MB, gpu.total_memory_mb - DRIVER_MB)
    foreign = [user for _, user, key in processes if key not in ours]
    all_mb = min(gpu.memory_mb + taken_mb, max(gpu.total_memory_mb, gpu.memory_mb))
    busy = max(gpu.utilization - sum(part for _, part, _ in mine + theirs), 0.0)
    limit = f'{gpu.index}:{all_mb}:{thousandths((1 - busy) * GPU_OVERLOAD)}'
    return gpu._replace(
        memory_mb=max(all_mb - sum(mb for mb, *_ in theirs), 0),
        utilization=min(busy + sum(part for _, part, _ in theirs) / GPU_OVERLOAD, 1.0),
        others=len(foreign), users=tuple(dict.fromkeys(foreign)), batch_jobs=len(theirs),
        reserved=any(alone for *_, alone in theirs), hidden=hides), limit


def only_listed(gpus, listed, trouble):
    """Return (those of the Gpus that the machine's file lists, why one of these is missing)."""
    found = tuple(gpu for gpu in gpus if gpu.index in listed)
    trouble = '' if len(found) == len(listed) else trouble
    return found, trouble or ('' if found else 'has none of the GPUs that its file lists')


def gpu_processes(facts):
    """Return {GPU's uuid: [(MB, owner, key of its Need)]} of the processes among the facts.

    MB is 0 if nvidia-smi does not report it.  The key is 'other' for a job of another project, and
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
    """Return why the GPUs of a machine are unknown; '' if nvidia-smi answered."""
    status = values.get('nvidia_smi')
    if status is None:
        return 'was not asked for its GPUs'
    if status == 'absent':
        makers = [word for word in values.get('other_gpus', '').split() if word in ('AMD', 'Intel')]
        what = ' and '.join(f'{count_of(makers.count(maker), "GPU")} of {maker}'
                            for maker in dict.fromkeys(makers))
        return (NO_NVIDIA_SMI if not makers else
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
    listed: the indices in the machine's file; such a GPU counts as idle if its use is not reported
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
        return f'has GPU {index}, whose free memory nvidia-smi does not report'
    if used is None and index not in listed:
        return (f'has GPU {index}, whose free memory or use nvidia-smi does not report; '
                f'to use it nevertheless, write "gpus: [{index}]" in the machine file')
    used = used or 0
    if free > total or used > 100:
        return f'has GPU {index}, of which nvidia-smi reports impossible numbers'
    return Gpu(index, free, used / 100, total, uuid, name, exclusive=mode == 'Exclusive_Process',
               unified=unified)


def number_or_none(text):
    """Return a field of nvidia-smi as a number; None if it is no number."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 12 else None


def explain_gpu_line(line):
    """Return why GPUs cannot be used, from a line of nvidia-smi that describes no GPU."""
    lost = re.search(r'handle for (GPU ?[0-9A-Fa-f:.]*[0-9A-Fa-f])\W+(.*)', line)
    if lost:
        return f'has lost {printable(lost[1])} (nvidia-smi: {printable(lost[2].strip())[:100]})'
    return 'has GPUs of which nvidia-smi reports nothing that can be read'


# ---- Results: the folder job_results ----

ENDS = {'': 1, '.out': 2, '.err': 4}        # end of the name of a job's result -> a bit for it


class ResultStore:
    """The folder job_results: its lock and its files.  It replaces no file of other programs.

    job_results/NAME.out, NAME.err    the streams; they grow while the job runs
    job_results/NAME/                 its results; appears by one rename
    job_results/.ssh_scheduler/       journal, lock, incoming results

    part: a folder below .ssh_scheduler for these: commands/NAME for a job of execute_remote.  So
    the job can run beside a batch, and two clients cannot both collect the same job.
    journal: the Journal of its jobs; partials: the Partials
    """

    def __init__(self, folder, part=''):
        self.folder, self.part = folder, part
        self.inner = os.path.join(folder, '.ssh_scheduler', part).rstrip('/')
        self.journal = Journal(os.path.join(self.inner, 'journal'))
        self.sent = Sent(os.path.join(folder, '.ssh_scheduler'))
        self.seen = Seen(self.inner, self.journal)
        self.present = Presence(folder, self.journal)
        self.partials = Partials(folder, self.inner)
        self.lock = Lock(folder, part, self.inner)
        self._grown = set()             # (name, stream) that this client began to write
        self._growing = {}              # the stream that grew last: (name, stream) -> open file

    # Opening it

    def open(self, run='', asks=()):
        """Make, lock and read the folder; return self.

        run: the batch or job of this client, by which others find it: see Lock
        asks: its options for hardware, for --status
        """
        try:
            os.makedirs(self.inner, exist_ok=True)
            self.lock.take(run, asks)
            self.journal.open()
            self._end_commits()
            self._end_renames()
            self.partials.clear()
            for name in os.listdir(self.inner):
                if name.startswith('incoming-'):        # of a run that was killed
                    path = os.path.join(self.inner, name)
                    if name.endswith('.tar'):
                        os.unlink(path)
                    else:
                        self.discard(path)
        except OSError as error:
            raise unusable(self.folder, error) from None
        return self

    def peek(self, times=False):
        """Read the journal, and change nothing: another run may use the folder.  Return self."""
        try:
            self.journal.peek(times)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ResultsError(f'{self.journal.path} cannot be read: {reason_of(error)}.') from None
        return self

    def close(self):
        """Release the lock; if no job was started, leave nothing behind."""
        if not self.lock.is_held:
            return
        self.sent.close()
        self.seen.write()
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
        self.partials.close()
        self.journal.close()
        self.lock.close()

    def take_over(self, run, note):
        """Open the folder, but first stop a client that has it open for the same `run`, and wait.

        note(text) prints that.  Return the journal's jobs as they were before: name -> record.
        """
        before = self.lock.take_over(
            run, note, lambda: ResultStore(self.folder, self.part).peek().journal.jobs) or {}
        self.open()
        return before

    # Lists of what attempts left

    def is_done(self, name):
        """Tell whether the job was collected, and its results are still here."""
        return self.journal.record(name).get('state') == 'collected' and self.exists(name)

    def exists(self, name):
        """Tell whether there are results of the job that a new run would have to replace."""
        if self.journal.record(name).get('state') in ('claimed', 'ended', 'lost', 'cancelled'):
            return os.path.lexists(self._path(name))    # streams of that attempt do not count
        return bool(self.present.of(name))

    def remnants(self, name):
        """Return the paths of a job's results that are here, if some are missing; else []."""
        here = self.present.of(name)
        needed = ENDS if self.journal.record(name).get('inode') else ('.out', '.err')
        return self.paths_of(name) if any(not here & ENDS[end] for end in needed) else []

    def paths_of(self, name):
        """Return the paths of a job's results that are here."""
        here = self.present.of(name)
        return [self._path(name, end) for end in ENDS if here & ENDS[end]]

    def identities(self):
        """Return the identities of all journals in the folder, and '' if one began without any."""
        top, found = os.path.join(self.folder, '.ssh_scheduler'), set()
        commands = os.path.join(top, 'commands')
        names = os.listdir(commands) if os.path.isdir(commands) else []
        for path in (top, *(os.path.join(commands, name) for name in names)):
            found |= identity_in(os.path.join(path, 'journal'))
        return found | {self.journal.identity}

    def kept(self, machine):
        """Return {name: record} of the collected jobs with files that were not fetched from this
        machine; `kept` in the record has the paths of these files, or is True for all.
        """
        return {name: record for name, record in self.journal.jobs.items()
                if record['machine'] == machine and record['state'] in ('collected', 'earlier')
                and record.get('kept') and os.path.isdir(self._path(name))}

    # Streams

    def grow(self, name, stream, data):
        """Append to a stream of a running job; return whether that worked."""
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
            return False        # at the end the whole stream is copied, or a failure reported
        return True

    def has(self, name, stream, size):
        """Tell whether all of a stream, this many bytes, was written here while it grew."""
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
        """Remove the rest of an incoming folder."""
        remove_tree(folder)

    def commit(self, name, streams, folder, wants_folder, kept=()):
        """Put a job's results in place; the caller then moves the attempt to collected.

        streams: 'out' and 'err' -> bytes, the path of a file to move, or None if it grew in place
        kept: the paths that could not be fetched, so that their machine keeps them; True: all.
        The journal has only these paths, so that files deleted here are not fetched again.
        """
        self._stop_growing()
        for stream, content in streams.items():
            self._commit_stream(name, stream, content)
        if not wants_folder:
            return
        target = self._path(name)
        if os.path.lexists(target):
            raise ResultsError(f'another program made {target} while {name} ran: move it away')
        if not (folder and os.path.isdir(folder)):
            folder = self.incoming()
        # The machine made the folder private.  One that its owner may not write cannot be moved.
        os.chmod(folder, new_folder_mode())
        # If the client is killed after the rename, _end_commits finds the folder by its inode.
        self.journal.write(event='committing', job=name, inode=os.stat(folder).st_ino, kept=kept)
        os.rename(folder, target)

    def _commit_stream(self, name, stream, content):
        """Move or write one stream; replace only what this program wrote while it grew."""
        target = self._path(name, f'.{stream}')
        ours = (name, stream) in self._grown or self.journal.may_have_streams(name)
        self._grown.discard((name, stream))
        if content is None:
            return              # the stream grew in place and is complete
        if not isinstance(content, bytes):
            if not ours and os.path.lexists(target):
                raise ResultsError(f'another program made {target} while {name} ran: move it '
                                   'away')
            os.chmod(content, 0o666 & new_folder_mode())        # on the machine it was private
            os.replace(content, target)
            return
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if ours else os.O_EXCL)
        with open(os.open(target, flags, 0o666), 'wb') as file:
            file.write(content)

    def _end_commits(self):
        """Record results that a killed client put in place but did not record, by the inode."""
        for name, record in self.journal.jobs.items():
            if record['state'] == 'ended' and 'inode' in record:
                with contextlib.suppress(FileNotFoundError):
                    if os.lstat(self._path(name)).st_ino == record['inode']:
                        self.journal.write(event='collected', job=name, kept=record['kept'])

    def put_aside(self, name):
        """Rename the results of a job that is to run again to NAME~1, or the next free number.

        Return the new name.  No job has it, since it has a tilde.
        """
        self._stop_growing()
        kept = next(kept for number in itertools.count(1) for kept in [f'{name}~{number}']
                    if kept not in self.journal.jobs and not any(
                        os.path.lexists(self._path(kept, end)) for end in ENDS))
        self.journal.write(event='renamed', job=name, to=kept)
        try:
            self._end_renames([name])
        except OSError as error:
            raise ResultsError(f'the results of {name} cannot be kept as {kept}: '
                               f'{reason_of(error)}.') from None
        return kept

    def _end_renames(self, names=None):
        """Finish the moves that put_aside recorded: a client may have been killed in one."""
        for name in self.journal.jobs if names is None else names:
            record = self.journal.jobs[name]
            for end in ENDS if record['state'] == 'again' else ():
                old, new = self._path(name, end), self._path(record['aside'], end)
                if os.path.lexists(old) and not os.path.lexists(new):
                    os.rename(old, new)

    def add(self, name, folder):
        """Add files that a machine kept to a job's results; return the paths in their way."""
        target = self._path(name)
        return [os.path.relpath(path, target) for path in merge(folder, target)] if folder else []

    def set_aside(self, name, streams=None, folder=None):
        """Move the files of a job that was cancelled out of the way of its next run.

        streams, folder: the streams and files that its machine sent, as for commit
        """
        self._stop_growing()
        try:
            self._move_aside(name, streams or {}, folder)
        except OSError as error:
            raise ResultsError(f'the files of {name} could not be moved to {self.inner}/cancelled: '
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

    def last_lines(self, name, stream):
        """Return the last lines of a job's stream, as lines_shown has them."""
        return read_last_lines(self._path(name, f'.{stream}'), LAST_BYTES)[0]

    def _path(self, name, end=''):
        return os.path.join(self.folder, name + end)


class Lock:
    """The file that lets one client at a time use a job_results, or a part of it.

    Its lines: the client that took it last, `process PID on COMPUTER`; the batch or job that it
    runs; its options for hardware, in JSON; and, once it has ended in good order, `exit status N`.
    """

    def __init__(self, folder, part, inner):
        self._folder, self._part = folder, part
        self.path = os.path.join(inner, 'lock')
        self.asked_before = frozenset()     # ids of the requests that are older than the lock
        self._fd = None

    def take(self, run, asks):
        """Take the lock for this batch or job.  Raises FolderInUse, ResultsError or OSError."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, batch, _ = map(printable, (*read_lock(self._fd)[:2], ''))
            self.close()
            if self._part:
                raise ResultsError(f'{os.path.basename(self._part)} is in use by another run '
                                   f'({holder}). Wait for it, or stop it with Ctrl-C or with '
                                   'kill -9; after kill -9 the job keeps running.') from None
            runs = f' It runs the batch {batch}.' * bool(batch)
            raise FolderInUse(f'{self._folder} is in use by another run ({holder}).{runs} Wait for '
                              'it, add your lines to its batch file, or start from another folder.'
                              ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):     # some network file systems
                raise
        with contextlib.suppress(FileNotFoundError):
            inbox = os.path.join(os.path.dirname(self.path), 'inbox')
            self.asked_before = frozenset(name.partition('.')[0] for name in os.listdir(inbox))
        self.tell(run, asks)

    def tell(self, run, asks, again=False):
        """Write the lines about this client.

        asks: its options for hardware; again: keep the time of the file, when the client began
        """
        before = os.fstat(self._fd)
        text = f'process {os.getpid()} on {os.uname().nodename}\n{run}\n{json.dumps(asks)}\n'
        os.pwrite(self._fd, text.encode(), 0)       # so the file is never without text
        os.ftruncate(self._fd, len(text.encode()))
        if again:
            os.utime(self._fd, ns=(before.st_atime_ns, before.st_mtime_ns))

    def note_end(self, status):
        """Write the exit status of this client, for clients that wait for it."""
        if self._fd is None:
            return
        with contextlib.suppress(OSError):          # then the journal tells how the jobs ended
            os.lseek(self._fd, 0, os.SEEK_END)
            os.write(self._fd, f'exit status {status}\n'.encode())

    @property
    def is_held(self):
        """Tell whether this client has the lock."""
        return self._fd is not None

    def close(self):
        """Release the lock."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None

    def take_over(self, run, note, look):
        """Stop a client that has the lock for the same `run`, and wait for its end.

        Return the value of look(), called before the stop, or None; note(text) prints a message.
        """
        with contextlib.suppress(FileNotFoundError), open(self.path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                who, theirs, _ = read_lock(lock.fileno())
                match = re.fullmatch(r'process ([0-9]+) on (.*)', who)
                if match and theirs == run:
                    seen = look()
                    stop_client(int(match[1]), match[2], run, lock, note)
                    return seen
            except OSError:         # a file system without locks: no client has one
                pass
        return None

    @property
    def holder(self):
        """The Holder of the lock, found without taking it; None if there never was one."""
        return read_holder(self.path)

    @property
    def noted_status(self):
        """The exit status that the last client noted; None if it was killed, or still runs."""
        with contextlib.suppress(OSError), open(self.path, encoding='utf-8',
                                                errors='replace') as lock:
            match = re.search(r'^exit status ([0-9]+)$', lock.read(1000), re.M)
            return int(match[1]) if match else None
        return None


class Partials:
    """Files fetched from running jobs: job_results/NAME.partial, until the job's results are there.

    .ssh_scheduler/partial/names/NAME      a link whose text is the inode of NAME.partial: a folder
                                           with another inode is the user's, and is not removed
    .ssh_scheduler/partial/from.NUMBER     the same files again, only while rsync fetches them from
                                           a machine: TensorBoard would show these files twice
    """

    def __init__(self, folder, inner):
        self._folder, self._inner = folder, os.path.join(inner, 'partial')

    def landing(self, number, jobs):
        """Return a folder for rsync to fill; it holds the files fetched from these jobs so far.

        jobs: {folder of a job on the machine: name of the job}
        """
        path = os.path.join(self._inner, f'from.{number}')
        if os.path.lexists(path):
            remove_tree(path)
        os.makedirs(path, 0o700)
        for folder, name in jobs.items():
            if self._is_there(name):
                os.mkdir(os.path.join(path, folder))
                mirror(self._paths(name)[0], os.path.join(path, folder))
        return path

    def open(self, name):
        """Return the folder for files of a running job; None if something else has its name."""
        path, note = self._paths(name)
        if self._is_there(name):
            return path
        self.remove(name)
        os.makedirs(os.path.dirname(note), exist_ok=True)
        made = private_folder(os.path.join(self._inner, 'new'))
        os.chmod(made, new_folder_mode())
        os.symlink(str(os.stat(made).st_ino), note)
        if os.path.lexists(path):
            os.rmdir(made)
            return None
        os.rename(made, path)
        return path

    def remove(self, name):
        """Remove the fetched files of a job."""
        path, note = self._paths(name)
        if self._is_there(name):
            remove_tree(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(note)

    def clear(self):
        """Remove all fetched files, such as those that a killed client left."""
        for name in self._names():
            self.remove(name)
        if os.path.isdir(self._inner):
            remove_tree(self._inner)

    def close(self):
        """Tidy up.  If jobs keep running, their fetched files stay for the user to look at."""
        if not self._names():
            self.clear()

    def _names(self):
        """Return the names of the jobs with fetched files."""
        try:
            return os.listdir(os.path.join(self._inner, 'names'))
        except FileNotFoundError:
            return []

    def _paths(self, name):
        return (os.path.join(self._folder, f'{name}.partial'),
                os.path.join(self._inner, 'names', name))

    def _is_there(self, name):
        path, note = self._paths(name)
        try:
            return os.readlink(note) == str(os.lstat(path).st_ino)
        except FileNotFoundError:
            return False


class Presence:
    """Which of the results of jobs are in the folder: for each job the sum of its ENDS."""

    def __init__(self, folder, journal):
        self._folder, self._journal = folder, journal

    def of(self, name):
        """Return the sum for a job."""
        here = self._journal.record(name).get('here')
        if here is None:
            path = os.path.join(self._folder, name)
            here = sum(bit for end, bit in ENDS.items() if os.path.lexists(path + end))
        return here

    def look(self):
        """Look for the results of all collected jobs at once: one by one costs three calls a job.

        From now on `of` returns the results that this look found for a job, until the job is
        claimed again and gets a new Record.
        """
        jobs = self._journal.jobs
        try:
            entries = os.scandir(self._folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ResultsError(f'{self._folder} cannot be read: {reason_of(error)}.') from None
        for record in jobs.values():
            if record.state == 'collected':
                record.here = 0
        with entries:
            for path in (entry.name for entry in entries):
                self._note(path, '')
                if path[-4:] in ENDS:
                    self._note(path[:-4], path[-4:])

    def _note(self, name, end):
        record = self._journal.jobs.get(name)
        if record is not None and record.state == 'collected':
            record.here |= ENDS[end]


# Copies of sent files, and files of running jobs, leave this disk space free for results.
SPARE_BYTES = 10**9
KEPT_AT_ONCE = 64           # files copied in one step, before other events are handled
STALE_S = 3600.0            # no client takes that long to keep a set of files


class Sent:
    """The files that were sent with jobs: one folder for each set of files, named by its digest.

    sent/DIGEST/files.json      Manifest.files: what was sent
    sent/DIGEST/record.json     when, how much, how much of it is kept, and what git reports of it
    sent/DIGEST/diff.patch      how the sent files differ from git's commit; see Keeper
    sent/DIGEST/files/PATH      the files that are kept: hard links into the store
    sent/store/HASH             their contents, each once; limit_bytes in all

    The smallest files are kept first: they are code, and not data.  Several clients may write here
    at the same time, so everything appears by one rename.  A set appears when a job is about to use
    it, so no client removes a set that another one has found.  A copy is readable only for people
    who can read the original file.
    """

    def __init__(self, folder):
        self.folder = os.path.join(folder, 'sent')
        self.limit_bytes = 0            # None: record nothing at all
        self._store = os.path.join(self.folder, 'store')
        self._found = {}                # digest -> Manifest, or None if it is not known
        self._under_way = {}            # digest -> the generator that makes the set
        self._claimed = set()           # digests of sets that jobs of this client use
        self._unclaimed = {}            # digest -> the folder of a set that no job uses yet
        self._used = None               # bytes in the store

    def claim(self, manifest):
        """Put the set of files here, since a job is about to use it.  Raises OSError."""
        digest = manifest.digest
        while digest not in self._claimed:
            for _ in self.keeping(manifest):
                pass
            folder = self._unclaimed.pop(digest, None)
            if folder and not os.path.isdir(folder):    # another client removed it as stale
                self._found.pop(digest, None)
                continue
            if folder:
                try:
                    os.rename(folder, self.path(digest))
                except OSError:
                    remove_tree(folder)
                    if not os.path.isdir(self.path(digest)):
                        raise           # else another client was first
            self._claimed.add(digest)

    def keeping(self, manifest):
        """Put the set of files here; yield after every few files.  Raises OSError."""
        digest = manifest.digest
        if self.limit_bytes is None or self._found.get(digest):
            return
        if digest not in self._under_way:
            self._under_way[digest] = self._make(manifest)
        try:
            for _ in self._under_way[digest]:
                yield
        finally:
            self._under_way.pop(digest, None)

    def get(self, digest):
        """Return the Manifest that has this digest; None if it is not here."""
        if not self._found.get(digest):
            self._found[digest] = None
            with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
                record = self.record(digest)
                found = Manifest(json.loads(read_file(self.path(digest, 'files.json'))),
                                 record.get('linked', ()), record.get('empty', ()))
                if found.digest == digest and all(map(is_inside, (*found.files, *found.empty))):
                    self._found[digest] = found
        return self._found[digest]

    def record(self, digest):
        """Return the content of a set's record.json; an empty dict if the set is not here."""
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(read_file(self.path(digest, 'record.json')))
            if isinstance(record, dict) and all(isinstance(record.get(key), int)
                                                for key in ('files', 'bytes', 'kept')):
                return record
        return {}

    def path(self, digest, *names):
        """Return the path of a set, or of something in it."""
        folder = self._unclaimed.get(digest) or os.path.join(self.folder, str(digest))
        return os.path.join(folder, *names)

    def note(self, digest, patch=b'', **facts):
        """Add facts to the record of a set, and the differences to its commit.  Raises OSError."""
        if not self.record(digest):         # somebody has removed it
            return
        if patch:
            put_file(self.path(digest, 'diff.patch'), patch)
        put_file(self.path(digest, 'record.json'),
                 as_json({**self.record(digest), **facts}))

    def content(self, digest):
        """Return the bytes of this digest from the store; None if they are missing or damaged."""
        with contextlib.suppress(OSError):
            data = read_file(os.path.join(self._store, digest))
            return data if content_digest(data) == digest else None
        return None

    def close(self):
        """Remove the sets that no job used, and the files in the store for them alone."""
        unclaimed, self._unclaimed = self._unclaimed, {}
        for folder in unclaimed.values():
            remove_tree(folder)
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._store) if unclaimed else ():
                if entry.stat().st_nlink == 1:
                    os.unlink(entry.path)
            os.rmdir(self._store)       # which fails if something is in it
            os.rmdir(self.folder)

    def _make(self, manifest):
        digest, record = manifest.digest, self.record(manifest.digest)
        if not record:
            os.makedirs(self._store, exist_ok=True)
            self._remove_stale()
            folder = private_folder(os.path.join(self.folder, 'new'))
            try:
                yield from self._fill(folder, manifest)
                self._unclaimed[digest] = folder
            finally:
                if digest not in self._unclaimed:
                    remove_tree(folder)
        elif self.limit_bytes and not record['kept']:       # there was no room for copies then
            yield from self._fill(self.path(digest), manifest, record)
        self._found[digest] = manifest

    def _remove_stale(self):
        """Remove the files of clients that were killed while they stored a set.  Raises OSError."""
        before = time.time() - STALE_S
        for entry in os.scandir(self.folder):
            if entry.name.startswith('new-') and entry.stat().st_mtime < before:
                remove_tree(entry.path)
        for entry in os.scandir(self._store):
            with contextlib.suppress(FileNotFoundError):        # another client removed it
                info = entry.stat()
                if info.st_nlink == 1 and info.st_mtime < before:
                    os.unlink(entry.path)

    def _fill(self, folder, manifest, record=None):
        kept, kept_bytes, shared, folders = 0, 0, 0o444, {}
        smallest = sorted((size, path, content)
                          for path, (_, size, _, content) in manifest.files.items() if content)
        for number, (_, path, content) in enumerate(smallest, 1):
            with contextlib.suppress(OSError):          # the disk is full, or the file is gone
                mode = readers_of(path, manifest.files[path][0], folders)
                shared &= mode
                size = self._keep_file(path, content, os.path.join(folder, 'files', path), mode)
                if size is not None:
                    kept, kept_bytes = kept + 1, kept_bytes + size
            if number % KEPT_AT_ONCE == 0:
                yield
        sizes = [size for _, size, _, _ in manifest.files.values()]
        put_file(os.path.join(folder, 'files.json'), as_json(manifest.files))
        put_file(os.path.join(folder, 'record.json'), as_json({
            **(record or {}), 'version': 1, 'time': round(time.time(), 3), 'files': len(sizes),
            'bytes': sum(sizes), 'linked': manifest.linked, 'empty': manifest.empty,
            'kept': kept, 'kept_bytes': kept_bytes}))
        os.chmod(folder, new_folder_mode() & (shared >> 2) * 7 | 0o700)

    def _keep_file(self, path, content, target, mode):
        """Keep a file, or link, that has this content; return its size; None if it is not kept.

        mode: of a new copy; the store may already have a copy with another mode
        """
        if not self.limit_bytes:
            return None
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if content.startswith(TO):
            os.symlink(content[len(TO):], target)
            return 0
        try:
            return self._link(path, content, target, mode)
        except FileNotFoundError:           # another client has just removed that copy
            return self._link(path, content, target, mode)

    def _link(self, path, content, target, mode):
        kept = os.path.join(self._store, content)
        if not os.path.exists(kept):
            os.makedirs(self._store, exist_ok=True)
            size = os.stat(path).st_size
            if (self._used_bytes() + size > self.limit_bytes
                    or free_bytes(self._store) < size + SPARE_BYTES):
                return None
            data = read_file(path)
            if content_digest(data) != content:         # it has changed since
                return None
            put_file(kept, data, mode)
            self._used += len(data)
        os.link(kept, target)
        return os.stat(kept).st_size

    def _used_bytes(self):
        """Return the number of bytes in the store."""
        if self._used is None:
            self._used = sum(entry.stat().st_size for entry in os.scandir(self._store))
        return self._used


def free_bytes(folder):
    """Return how many bytes may be written to the folder's disk; some stay free for others."""
    info = os.statvfs(folder)
    return (info.f_bavail - min(info.f_blocks // 50, 2**26 // info.f_frsize)) * info.f_frsize


def readers_of(path, mode, folders):
    """Return the mode for a copy of the file at `path`: no more people can read it than the file.

    mode: that of the file; folders: a cache, {folder: the mode for all files in it}
    """
    folder = os.path.dirname(path)
    if folder and folder not in folders:
        inside = (os.stat(folder).st_mode & 0o111) << 2
        folders[folder] = readers_of(folder, inside, folders)
    return (mode & 0o444 & folders.get(folder, 0o444)) | 0o400


def put_file(path, data, mode=0o666):
    """Write a file and rename it into place, so nobody reads a part of it.  Raises OSError."""
    new = f'{path}.new-{os.getpid()}'
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), 'wb') as file:
            file.write(data)
        os.replace(new, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


SEEN_S, SEEN_SHARE = 5.0, 0.01      # between two samples: SEEN_S, or this share of the run if more


class Seen:
    """The file `seen`: samples of the use of machines, for a report.  A JSON object a line.

    A machine has at most one sample every SEEN_S, and fewer when the client has run for long: some
    hundreds in a week.  No job needs the samples, so a failure to write them is not reported.
    """

    def __init__(self, inner, journal):
        self._path, self._journal = os.path.join(inner, 'seen'), journal
        self._began, self._last = time.monotonic(), {}      # machine -> when it had a sample
        self._unwritten = []            # lines, until a job is claimed

    def add(self, machine, sample):
        """Add the use of a machine (its address), unless it had a sample lately."""
        now = time.monotonic()
        apart_s = max(SEEN_S, SEEN_SHARE * (now - self._began))
        if now - self._last.get(machine, -math.inf) < apart_s:
            return
        self._last[machine] = now
        self._unwritten.append(as_json({'machine': machine, 'time': round(time.time(), 1),
                                        **sample}))
        self.write()

    def write(self):
        """Write what was added, unless no job was ever claimed here."""
        if self._unwritten and not self._journal.is_empty:
            with contextlib.suppress(OSError), open(self._path, 'ab') as file:
                file.write(b''.join(self._unwritten))
            self._unwritten = []


def take_name(stem):
    """Return STEM, or the first of STEM-2, STEM-3, … that no job of this folder has, and take it.

    The client that makes the folder of a name has the name, so no two clients have the same one.
    """
    def cannot_take(name):
        results = ResultStore('job_results', f'commands/{name}')
        try:
            return results.exists(name) or not make_new(results.inner)
        except OSError as error:
            raise unusable(results.folder, error) from None

    return free_name(stem, cannot_take)


def make_new(path):
    """Make a folder, and those above it; return False if it is there already."""
    while True:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.mkdir(path)
        except FileExistsError:
            return False
        except FileNotFoundError:
            continue                # another client has just removed the empty folder above
        return True


def unusable(folder, error):
    """Return the ResultsError for a folder of results that failed with this error."""
    return ResultsError(f'{folder}, where results go, cannot be used: {reason_of(error)}.')


def identity_in(path):
    """Return {the identity of the journal at this path}, with '' if its first line has none."""
    found = set()
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        for number, line in enumerate(file):
            match = re.match(rb'{"event": "journal", "identity": "([0-9a-f]+)"', line)
            if match:
                return found | {match[1].decode()}
            found |= set() if number else {''}
    return found


def is_copy(journal):
    """Tell whether a journal was copied to another folder or computer, and not only moved there.

    A folder that was moved to another disk is no copy: nothing is left where it was.  If a copy of
    a moved folder is put where the folder was, the copy keeps the name of the jobs.
    """
    origin = journal.origin
    if origin.project in ('', project_name()):
        return False
    before, is_same = os.path.join(origin.folder, journal.path), False
    is_here = os.uname().nodename == origin.node    # else no folder here is that of the Origin
    with contextlib.suppress(OSError):
        is_same = (os.path.samefile(journal.path, before) if is_here else
                   os.stat(journal.path).st_ino == origin.inode)
    return not is_same and (not is_here or origin.identity in identity_in(before))


def open_own(results, run=''):
    """Open a ResultStore for jobs that start or run, as `open` does, also in a copied folder."""
    results.open(run)
    if is_copy(results.journal):
        results.journal.become_own()
    return results


def read_lock(fd):
    """Return (the process that has the lock, the batch or job that it runs, its options for
    hardware), as the file says.  Older versions do not write these options: then they are None.
    """
    lines = os.pread(fd, 1000, 0).decode('utf-8', 'replace').split('\n')
    who, run = (*lines, '')[:2]
    asks = None
    with contextlib.suppress(ValueError):
        asks = json.loads(lines[2]) if len(lines) > 3 else None
    return who, run, asks


class Holder(NamedTuple):
    """The client that took the lock of a job_results last."""
    pid: int
    computer: str
    run: str                        # the batch or job that it runs; '' of an older version
    asks: Optional[list]            # its options for hardware; None of an older version
    since: float                    # seconds since 1970
    lives: Optional[bool]           # it still has the lock; None: only `computer` can tell

    @property
    def is_here(self):
        """Tell whether it runs on this computer."""
        return self.computer == os.uname().nodename


def read_holder(path):
    """Return the Holder of the lock at this path, or None.

    If the client is on this computer, the lock is not tried: a client that starts at this moment
    would find it locked, and take that for another run.
    """
    try:
        with open(path, 'rb') as lock:
            who, run, asks = read_lock(lock.fileno())
            info = os.fstat(lock.fileno())
            has_ended = b'\nexit status ' in lock.read(1000)
            is_locked = who.endswith(f' on {os.uname().nodename}') or has_lock(lock)
    except OSError:
        return None
    match = re.fullmatch(r'process ([0-9]+) on (.*)', who)
    if not match:
        return None
    holder = Holder(int(match[1]), match[2], run, asks, info.st_mtime, None)
    if holder.is_here:
        return holder._replace(lives=has_open(holder.pid, info))
    return holder._replace(lives=False if has_ended else True if is_locked else None)


def has_lock(file):
    """Tell whether a process, maybe of another computer, has locked this file.

    False if locks do not cross the network.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def is_process(pid):
    """Tell whether there is such a process on this computer."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def has_open(pid, info):
    """Tell whether this process lives and has the file open whose os.stat is `info`.

    If that cannot be seen, as without /proc, it is enough that the process lives.
    """
    fds = f'/proc/{pid}/fd'
    try:
        if not os.path.isdir('/proc/self/fd'):
            return is_process(pid)
        for fd in os.listdir(fds):
            with contextlib.suppress(FileNotFoundError):        # it has just closed that
                if os.path.samestat(os.stat(f'{fds}/{fd}'), info):
                    return True
        return False
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError:                     # another user's
        return True


def stop_client(pid, computer, run, lock, note):
    """Stop the client that holds the lock in good order, and wait for its end.

    Only a process that has the lock file open gets a signal: the id may be another's by now.
    """
    if computer != os.uname().nodename:
        raise ResultsError(f'{run} is run by process {pid} on {computer}: type the same command '
                           'on that computer, in this folder.')
    if not has_open(pid, os.fstat(lock.fileno())):
        return
    try:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGCONT)        # it may have been stopped with Ctrl-Z
    except (FileNotFoundError, ProcessLookupError):     # it has just ended
        return
    except OSError as error:
        raise ResultsError(f'{run} is run by process {pid}, and cannot be stopped: '
                           f'{reason_of(error)}.') from None
    try:
        note(f'{run}: cancelling: process {pid} runs it')
        fcntl.flock(lock, fcntl.LOCK_SH)
    except KeyboardInterrupt:
        note(f'{run}: process {pid} is still cancelling')
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
    """Move all that lies in the folder `source` into `target`; yield the paths in `target` that are
    in the way.  Files that are the same already, as after an earlier try, are not in the way.
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


def mirror(source, target):
    """Make `target` a folder with the files of the folder `source`, as hard links, and no others.

    So a program that has a file of `target` open sees at once the data that `source` gets.
    """
    import shutil
    with os.scandir(source) as entries:
        wanted = {entry.name: entry for entry in entries}
    for name in os.listdir(target):
        path = os.path.join(target, name)
        old = os.lstat(path)
        new = wanted[name].stat(follow_symlinks=False) if name in wanted else None
        are_folders = new and stat.S_ISDIR(old.st_mode) and stat.S_ISDIR(new.st_mode)
        if not are_folders and not (new and os.path.samestat(old, new)):
            (remove_tree if stat.S_ISDIR(old.st_mode) else os.unlink)(path)
    for name, entry in wanted.items():
        path = os.path.join(target, name)
        if entry.is_dir(follow_symlinks=False):
            if not os.path.lexists(path):
                os.mkdir(path, 0o700)
            mirror(entry.path, path)
            os.chmod(path, stat.S_IMODE(entry.stat().st_mode))      # it may be private
        elif not os.path.lexists(path):
            try:
                os.link(entry.path, path, follow_symlinks=False)
            except OSError:             # the file system has no hard links
                shutil.copy2(entry.path, path, follow_symlinks=False)


def remove_tree(folder):
    """Remove a folder, also if a job has made a part of it read-only."""
    import shutil
    shutil.rmtree(folder, onerror=make_removable)


def make_removable(function, path, _):
    """Give a folder that a job made read-only the permissions that removing it needs."""
    try:
        os.chmod(os.path.dirname(path), 0o700)
        os.chmod(path, 0o700)
        function(path)
    except OSError:
        pass


# ---- Processes: the one place that starts them and the one that waits ----

TICK_S = 1.0                # the delay to notice an ended child whose pipe another process has open
KEPT_STDERR = 64 * 1024
PIPE_BYTES, WIDE_PIPE_BYTES = 2**16, 2**20      # the size of a pipe, and the most on Linux
F_SETPIPE_SZ = 1031                 # fcntl has the name since Python 3.10


class Process:
    """A child process, done when it has ended and all is read.  Processes handles its streams."""

    def __init__(self, popen, on_output, on_error, on_exit, feed, keep_stdin, deadline):
        self.popen = popen
        self.on_output = on_output          # called with bytes
        self.on_error = on_error            # the same for stderr, or None: it is kept
        self.on_exit = on_exit              # called with (exit status, stderr as bytes); see Flows
        self.feed = feed                    # iterator of bytes for its stdin, or None
        self.source = None                  # a file descriptor with more bytes for its stdin
        self.keep_stdin = keep_stdin        # else closed when all is written
        self.deadline = deadline
        self.unsent = bytearray()
        self.complaint = bytearray()
        self.reads = {}                     # fd -> open stream of the child, to read

    def write(self, data):
        """Queue data for its stdin; it goes out in the next Processes.wait."""
        self.unsent += data

    def close_stdin(self):
        """Close its stdin as soon as all that was queued is written."""
        self.keep_stdin = False

    def kill(self):
        """Kill the child and its descendants."""
        try:
            os.killpg(self.popen.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):   # macOS reports that for a zombie's group
            pass


def widen(fd):
    """Enlarge a pipe, so that programs pass on much output in fewer steps.

    Only for a pipe that was found rather full: the pipes of a user may hold 64 MB together.
    """
    if LINUX:
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, F_SETPIPE_SZ, WIDE_PIPE_BYTES)


def deaf(_number, _frame):
    """Ignore a signal without SIG_IGN, which children would inherit."""


class Processes:
    """The children of this program, and its timers: the only place that starts and awaits them."""

    def __init__(self, on_start=None, clock=time.monotonic):
        # If SIGCHLD is ignored, as by inheritance, Popen reports success for every failure.
        if signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Background commands of a script ignore these signals; jobs here would inherit that.
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
              deadline_s=None, env=None, cwd=None, terminal=False, has_input=True,
              confined=None):
        """Start argv in a session of its own and return its Process.

        terminal: it gets this program's streams, and with them the terminal, instead of pipes
        has_input: else its stdin is /dev/null
        confined: what it calls first, from confine()
        """
        if self._on_start:
            self._on_start(argv)
        pipe = None if terminal else subprocess.PIPE
        try:
            popen = subprocess.Popen(argv, stdin=pipe if has_input else subprocess.DEVNULL,
                                     stdout=pipe, stderr=pipe, bufsize=0, env=env, cwd=cwd,
                                     start_new_session=not terminal, preexec_fn=confined)
        except FileNotFoundError as error:
            if cwd and error.filename == cwd:
                raise SchedulerError(f'your HOME, the folder {cwd}, does not exist.') from None
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
        """Feed all bytes of a file descriptor of this program to the stdin of the process."""
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):      # kqueue does not report its end
                raise PermissionError
            self._selector.register(fd, selectors.EVENT_READ, process)
            process.source = fd
        except OSError:                     # a file: reading it never has to wait
            process.feed = iter(lambda: os.read(fd, 2**16), b'')

    def call_later(self, delay_s, function):
        """Have wait() call the function once, after this many seconds."""
        self._timers.append([self._clock() + delay_s, function])

    def write_out(self, fd, data):
        """Write to a stream of this program, until done or wake() is called; return the rest.

        Raises OSError if it cannot be written.
        """
        import select
        if fd not in self._outlets:
            kind = os.fstat(fd).st_mode
            free = fd
            if LINUX and stat.S_ISFIFO(kind):   # open it anew: O_NONBLOCK of fd is shared
                try:
                    free = os.open(f'/proc/self/fd/{fd}', os.O_WRONLY | os.O_NONBLOCK)
                except OSError:
                    pass
            # A ready pipe, socket or terminal takes at least PIPE_BUF bytes; a file takes all.
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
                return bytes(data)          # wake() was called, and nobody reads
        return b''

    def wake(self):
        """Make a running wait() return; may be called from a signal handler."""
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
        """Kill a child now; its on_exit is not called."""
        if process in self._children:
            process.kill()
            process.popen.wait()
            self._forget(process)

    def leave(self, process):
        """Let a child keep running; its on_exit is not called."""
        if process in self._children:
            self._forget(process)

    def close(self):
        """Kill all remaining children."""
        for process in list(self._children):
            self.end(process)
        self._selector.close()
        for fd in (*self._wakeup, *(free for fd, (free, _) in self._outlets.items() if free != fd)):
            os.close(fd)

    def _offer(self, process):
        """Watch the child's stdin if bytes wait for it, else its source; else close the stdin."""
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
        """Read from the child's source once; it is read again when these bytes are written."""
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
            data = os.read(fd, WIDE_PIPE_BYTES)
        except BlockingIOError:
            return
        if PIPE_BYTES // 2 < len(data) <= PIPE_BYTES:
            widen(fd)
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
        """Finish with a child that ended or closed its streams, once its pipes are read."""
        if process.popen.poll() is None:
            if process.reads or not process.popen.stdout:
                return
            try:
                process.popen.wait(TICK_S)  # it closed its streams, so it is about to end
            except subprocess.TimeoutExpired:
                process.kill()
                process.popen.wait()
        for fd in list(process.reads):      # only what is there: others may hold the pipes open
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
    status: int                     # its exit status, negative if a signal killed it
    text: str                       # its stderr
    full: bool = False              # it was killed because the disk here is full


class Flows:
    """Generators that wait, begun together and closed together.

    A flow yields a Process that it has started, and is sent its End; or it yields a number of
    seconds, and continues after these.  When the flows are closed, their children are killed and
    each flow is closed where it waits, so `finally` is the place to clean up.
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
            return                          # it was closed while its timer ran
        self._waiting[flow] = None
        try:
            awaited = flow.send(value)
        except StopIteration:
            self._waiting.pop(flow, None)
            return
        if flow not in self._waiting:       # the flow itself closed all flows
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
        """Close all flows, and kill their children."""
        waiting, self._waiting = self._waiting, {}
        with contextlib.ExitStack() as stack:       # all are closed, even if one cannot clean up
            for flow, process in waiting.items():
                if process:
                    self._processes.end(process)
                if not flow.gi_running:     # else _go_on closes it when it waits next
                    stack.callback(flow.close)


def ignore(_data):
    """Discard the bytes."""


PACKAGES = {'ssh': 'openssh-client', 'rsync': 'rsync', 'bash': 'bash'}


# ---- Job log, Hooks: what other programs are told of a batch ----

# The columns of GNU parallel's --joblog, and then more.
LOG_COLUMNS = ('Seq', 'Host', 'Starttime', 'JobRuntime', 'Send', 'Receive', 'Exitval', 'Signal',
               'Command', 'Name', 'GPUs', 'PeakMemoryMB', 'PeakGPUMemoryMB', 'Attempt')
LOG_ESCAPES = str.maketrans({'\\': r'\\', '\t': r'\t', '\n': r'\n', '\r': r'\r'})
# The signals of Linux that kill a process which does not catch them: bash reports 128+n for them.
DEADLY_SIGNALS = frozenset((*range(1, 17), *range(24, 28), *range(29, 32)))
LOST_EXIT_CODE = 255                # for a lost job: that of a failed ssh
HOOKS = ('--on-finish', '--on-failure')
FINISH_LIMIT_S = 3600.0             # for the command of --on-finish
FAILURE_LIMIT_S = 60.0              # for that of --on-failure, once the batch has ended
# Variables that a batch has in its environment if a hook of another batch runs it.
OUTER_FACTS = {f'SSH_SCHEDULER_{word}' for word in (
    'STATUS', 'JOB', 'MACHINE', 'EXIT_CODE', 'STDERR')}


def log_line(values):
    """Return a line of a job log as bytes: the values with tabs between them, None as nothing.

    A tab, an end of line and a backslash inside a value are written as \t, \n, \r and \\.
    """
    cells = ('' if value is None else str(value).translate(LOG_ESCAPES) for value in values)
    return os.fsencode('\t'.join(cells)) + b'\n'


def exit_and_signal(exit_code):
    """Return (Exitval, Signal) of a job, as GNU parallel has them: a signal leaves Exitval 0."""
    number = exit_code - 128
    if number in DEADLY_SIGNALS:
        return 0, number
    return LOST_EXIT_CODE if exit_code < 0 else min(exit_code, 255), 0


class JobLog:
    """The file of --joblog: a line for each end of a job.

    Each line is one write at the end of the file, so that a client which is killed leaves whole
    lines.  A line that the disk refuses is written together with a later one.  The client reads
    which ends the file has, so it does not write those again that a killed client has written.
    """

    def __init__(self, path, warn):
        self._path, self._warn = path, warn
        self._unwritten = b''
        self._is_refused = False            # the disk has refused a line, and a warning was printed
        self._ends = set()                  # (Starttime, Name, Attempt) of the lines that it has
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                self._read()
            else:
                self._unwritten = log_line(LOG_COLUMNS)
            self._write()
        except OSError as error:
            raise SchedulerError(f'--joblog {path}: this file cannot be written: '
                                 f'{reason_of(error)}.') from None

    @property
    def path_here(self):
        """The path of the file below the current folder; it starts with .. if it lies elsewhere."""
        folder, name = os.path.split(self._path)
        return os.path.relpath(os.path.join(os.path.realpath(folder), name), os.path.realpath('.'))

    def begin(self, view):
        """The batch begins."""

    def changed(self, attempt, _before):
        """The state of an attempt has changed: write a line if the attempt has ended."""
        if attempt.state == 'ended':
            self._add(attempt)

    def lost(self, attempt):
        """A machine lost a job, which is not started again."""
        self._add(attempt)

    def close(self):
        """Try once more to write the lines that the disk has refused."""
        with contextlib.suppress(OSError):
            self._write()
        os.close(self._fd)

    def _read(self):
        with open(self._path, 'rb') as file:
            *lines, rest = file.read().split(b'\n')
        if not lines and not rest:
            self._unwritten = log_line(LOG_COLUMNS)
        elif lines[:1] != [log_line(LOG_COLUMNS)[:-1]]:
            raise UsageError(f'--joblog {self._path}: this file has other columns than a job log '
                             'of execute_batch, so nothing is added to it. Name another file.')
        elif rest:                          # somebody has cut or edited the file
            self._unwritten = b'\n'
        rows = (line.split(b'\t') for line in lines)
        self._ends = {(row[2], row[9], row[13]) for row in rows if len(row) == len(LOG_COLUMNS)}

    def _add(self, attempt):
        job, result = attempt.job, attempt.result
        started = time.time() - result.wall_s if result.started is None else result.started
        received = sum(stream.size or 0 for stream in attempt.streams.values())
        line = log_line((
            job.line, result.machine, f'{started:.3f}', f'{result.wall_s:10.3f}', 0, received,
            *exit_and_signal(result.exit_code), job.command, job.name, result.gpus,
            result.peak_memory_mb, result.peak_gpu_memory_mb, attempt.record['attempt']))
        row = line[:-1].split(b'\t')
        if (row[2], row[9], row[13]) in self._ends:
            return
        self._unwritten += line
        try:
            self._write()
        except OSError as error:
            if not self._is_refused:
                self._is_refused = True
                self._warn(f'{self._path} cannot be written: {reason_of(error)}. The batch keeps '
                           'running, and adds the missing lines when the file can be written')

    def _write(self):
        written = os.write(self._fd, self._unwritten) if self._unwritten else 0
        if written < len(self._unwritten):      # the disk is full; no part of a line may stay
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unwritten = b''


class Hooks:
    """The commands of --on-finish and --on-failure, which bash runs here, each at most once.

    Their input is empty, and their output is printed as it is.  Their environment tells how the
    batch goes, and which job failed.
    """

    def __init__(self, batch, options, processes, reporter):
        self._batch, self._processes, self._report = batch, processes, reporter
        self._commands = {option: options[option] for option in HOOKS}
        self._view = None                   # the BatchView, once the batch has begun
        self._over = None                   # when the batch had ended (monotonic)
        self._first = None                  # the Attempt that failed first
        self._running = {}                  # option -> its Process
        self._interrupts = 0

    @property
    def has_begun(self):
        """Tell whether the batch has begun; else no command is run."""
        return self._view is not None

    def begin(self, view):
        """The batch begins."""
        self._view = view

    def changed(self, attempt, before):
        """The state of an attempt has changed; report a failed one when its results are here."""
        if attempt.result and attempt.result.exit_code and 'ended' in (attempt.state, before):
            self._first = self._first or attempt
            if before == 'ended':
                self._tell_of(attempt)

    def lost(self, attempt):
        """A machine lost a job, which is not started again."""
        self._first = self._first or attempt
        self._tell_of(attempt)

    def interrupt(self, *_):
        """Stop waiting for commands.  A signal handler."""
        self._interrupts += 1

    def await_failure(self):
        """The batch has ended: wait for the command of --on-failure, for a limited time."""
        self._over = time.monotonic()
        if self._first:                     # if its results have not arrived
            self._tell_of(self._first)
        self._wait(1.0)
        if self._running and not self._interrupts:
            self._report.note('waiting for the command of --on-failure, at most '
                              f'{FAILURE_LIMIT_S:g} s (Ctrl-C: leave it running)')
            self._wait(FAILURE_LIMIT_S)
        for option, process in self._running.items():
            self._processes.leave(process)
            self._report.note(f'{option}: its command keeps running here, as process '
                              f'{process.popen.pid}.')
        self._running = {}

    def finish(self, status):
        """Run the command of --on-finish, to its end or an interrupt.  status: of the batch."""
        if not self.has_begun:
            return
        self._processes, self._interrupts = Processes(), 0      # the batch has closed its own
        try:
            self._start('--on-finish', {**self._facts(True), 'STATUS': status}, FINISH_LIMIT_S)
            self._wait(math.inf)
            for option, process in self._running.items():
                self._processes.end(process)
                self._report.note(f'{option}: its command was stopped, because the client was '
                                  'interrupted.')
        finally:
            self._processes.close()

    def _tell_of(self, attempt):
        """Run the command of --on-failure for this attempt, unless it was run before."""
        if not self._commands['--on-failure']:
            return                          # saves a look at all jobs for each failure
        result, facts = attempt.result, self._facts(False)
        self._start('--on-failure', {
            **facts, 'JOB': attempt.name, 'MACHINE': result.machine,
            'EXIT_CODE': LOST_EXIT_CODE if result.exit_code < 0 else result.exit_code,
            'STDERR': os.path.join(facts['RESULTS'], f'{attempt.name}.err')})

    def _facts(self, is_over):
        seconds = (self._over or time.monotonic()) - self._view.began
        return {**self._view.outcome.facts(is_over), 'BATCH': self._batch,
                'SECONDS': round(seconds)}

    def _start(self, option, facts, limit_s=None):
        command, self._commands[option] = self._commands[option], None
        if not command:
            return
        env = {name: value for name, value in os.environ.items() if name not in OUTER_FACTS}
        env.update((f'SSH_SCHEDULER_{word}', str(value)) for word, value in facts.items())
        try:
            self._running[option] = self._processes.start(
                ['bash', '-c', command], functools.partial(self._report.raw, 'out'),
                functools.partial(self._ended, option, time.monotonic(), limit_s),
                on_error=functools.partial(self._report.raw, 'err'), has_input=False, env=env,
                deadline_s=limit_s)
        except SchedulerError as error:
            self._report.note(f'{option}: {error}')

    def _ended(self, option, began, limit_s, status, _complaint):
        """The command of an option has ended."""
        del self._running[option]
        if status == -signal.SIGKILL and limit_s and time.monotonic() - began >= limit_s:
            self._report.note(f'{option}: its command was stopped after {limit_s:g} s.')
        elif status:
            how = f'failed with exit code {status}' if status > 0 else (
                f'was killed by signal {-status}')
            self._report.note(f'{option}: its command {how}.')

    def _wait(self, limit_s):
        until = time.monotonic() + limit_s
        while self._running and not self._interrupts and time.monotonic() < until:
            self._processes.wait(0.2)


def is_below(path, folders):
    """Tell whether a path is one of these, or lies below one."""
    return any(path == folder or path.startswith(f'{folder}/') for folder in folders)


REPORT_LIMIT_S = 600.0              # for a report to be made


class HtmlReport:
    """The page of --report: results_table.py makes it anew each time, and moves it into place."""

    def __init__(self, path, interval_s, processes, reporter):
        self._path, self._interval_s = path, interval_s
        self._processes, self._report = processes, reporter
        self._program = find_results_table()
        self._child = None
        folder, name = os.path.split(path)
        # The folder job_results is made when the batch begins.
        below = os.path.relpath(self.path_here, 'job_results')
        is_beside_results = re.fullmatch(r'[^/]+\.html', below)
        if not (is_beside_results or below.startswith('..')):
            raise UsageError(f'--report {path} lies where results of jobs may be. Name another '
                             'file, such as job_results/report.html.')
        has_folder = is_beside_results or os.path.isdir(folder or '.')
        if not has_folder or not name or os.path.isdir(path):
            raise UsageError(f'--report {path}: this is no file in a folder that exists.')
        if os.path.isfile(path) and not is_page(path):
            raise UsageError(f'--report {path} is a file that this program did not write. '
                             'Name another file, or remove this one.')

    @property
    def path_here(self):
        """The path of the page below the current folder; it starts with .. if it lies elsewhere."""
        return os.path.relpath(os.path.realpath(self._path), os.path.realpath('.'))

    def begin(self, _view):
        """The batch begins."""
        if self._interval_s is not None:
            self._processes.call_later(self._interval_s, self._again)

    def changed(self, _attempt, _before):
        """The state of an attempt has changed."""

    def lost(self, _attempt):
        """A machine lost a job, which is not started again."""

    def finish(self):
        """The batch has ended, and its results are here: make the page, and wait for it."""
        self._processes = Processes()
        try:
            self._make()
            while self._child:
                self._processes.wait()
        except KeyboardInterrupt:
            self._report.note(f'{self._path} was not written: interrupted.')
        finally:
            self._processes.close()

    def _again(self):
        if not self._child:
            self._make()
        self._processes.call_later(self._interval_s, self._again)

    def _make(self):
        self._child = self._processes.start(
            [sys.executable, self._program, 'job_results', '--html', self._path], ignore,
            self._made, has_input=False, deadline_s=REPORT_LIMIT_S)

    def _made(self, status, complaint):
        self._child = None
        if status:
            why = complaint_line(complaint.decode('utf-8', 'replace')) or f'exit code {status}'
            self._report.note(f'{self._path} was not written: {sentence(why)}')


def is_page(path):
    """Tell whether a file is empty or a page for a browser."""
    try:
        with open(path, 'rb') as file:
            return file.read(15).lower() in (b'', b'<!doctype html>')
    except OSError:
        return False


def find_results_table():
    """Return the path of results_table.py; raise if it is not there."""
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), 'results_table.py')
    if not os.path.isfile(path):
        raise UsageError('--report needs results_table.py, in the same folder as '
                         f'{os.path.basename(__file__)}: {os.path.dirname(path)}')
    return path


# ---- Wire: the language of the channel ----

LONGEST_LINE = 64 * 1024
LONGEST_NOISE = 256 * 1024
LONGEST_DATA = 64 * 2**20


class WireError(Exception):
    """The other side sent something that does not belong to this language."""


def request(verb, *fields):
    """Return the bytes of a request: its verb, the number of its fields, and the fields."""
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
    """Return a number that is at least 0 and below 2**60."""
    number = int(raw) if len(raw) < 20 else -1
    if not 0 <= number < 2**60:
        raise ValueError(f'{raw[:20]!r} is out of bounds')
    return number


def time_of(raw):
    """Return seconds since 1970, or None for an empty field."""
    return number_of(raw) if raw else None


def status_of(raw):
    """Return the exit status of a job."""
    number = number_of(raw)
    if number > 999:
        raise ValueError(f'{number} is no exit code')
    return number


def stream_of(raw):
    """Return 'out' or 'err'."""
    if raw not in (b'out', b'err'):
        raise ValueError(f'no stream is called {raw!r}')
    return raw.decode()


def output_of(raw):
    """Return (bytes, size) of a stream.  raw: =TEXT, or @SIZE without the bytes (None)."""
    return (raw[1:], len(raw) - 1) if raw[:1] == b'=' else (None, number_of(raw[1:]))


FOLDER = re.compile(r'work[.0-9]+')     # where a job ran, below jobs/


def folder_of(raw):
    """Return the folder of a job."""
    folder = raw.decode('ascii', 'replace')
    if not FOLDER.fullmatch(folder):
        raise ValueError(folder)
    return folder


def entry_of(raw):
    """Return (mark, value) of an entry in the list of a job's files: see the remote runner.

    The value is a path; for 'w' the folder with the files, for 's' a number of bytes, for 'm'
    (mode, path).
    """
    mark, text = raw[:1].decode('ascii', 'replace'), os.fsdecode(raw[1:])
    if mark == 'm':
        mode, _, path = text.partition(' ')
        return mark, (int(mode, 8), path)
    read = {'w': folder_of, 's': number_of}.get(mark)
    return mark, read(raw[1:]) if read else text


def list_of(raw):
    """Return the entries of a list, each of which ends with a NUL."""
    return [entry_of(entry) for entry in raw.split(b'\0')[:-1]]


class Fields(NamedTuple):
    """The fields of an event: functions that make values of them, or raise ValueError."""
    needed: tuple = ()
    optional: tuple = ()
    rest: Optional[object] = None       # of all further ones


# The events of the remote runner.  On the wire, an event with bytes is `data SIZE WORD …`; here its
# name is WORD.  Each has a method on_EVENT in Worker, JobControl, Queued, Collector or Gauge.
EVENTS = {
    'account': Fields((bytes,)),
    'broken': Fields((text_of,), (bytes,)),
    'note': Fields((text_of,)),
    'probe': Fields((os.fsdecode, lambda raw: raw.decode('utf-8', 'replace'))),
    'ready': Fields((os.fsdecode, bytes)),
    'measured': Fields((number_of, number_of)),
    'facts': Fields((text_of, text_of, text_of)),
    'staged': Fields((os.fsdecode,)),
    'stage_failed': Fields((os.fsdecode, text_of)),
    'started': Fields(rest=os.fsdecode),
    'queued': Fields((os.fsdecode, text_of, text_of, time_of)),
    'node': Fields((os.fsdecode, text_of, text_of)),
    'unfit': Fields((text_of, text_of)),
    'full': Fields((text_of,)),
    'preempted': Fields((os.fsdecode, text_of)),
    'refused': Fields((os.fsdecode, text_of)),
    'held': Fields((os.fsdecode,)),
    'absent': Fields((os.fsdecode,)),
    'lost': Fields((os.fsdecode, text_of)),
    'used': Fields((os.fsdecode, number_of)),
    'place': Fields((os.fsdecode, folder_of)),
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
    'parted': Fields(),
}


def decode(fields):
    """Return (event, values) of the fields of an event; raise WireError if they are no event."""
    word, *raw = (fields[1:] or [b'']) if fields[0] == b'data' else fields
    word = word.decode('ascii', 'replace')
    if word not in EVENTS:
        raise WireError('it sent an unknown event')
    needed, optional, rest = EVENTS[word]
    kinds = [*needed, *optional, *[rest] * (len(raw) if rest else 0)]
    try:
        if not len(needed) <= len(raw) <= len(kinds):
            raise ValueError(f'{len(raw)} fields')
        if any(b'\0' in field for kind, field in zip(kinds, raw)
               if kind not in (bytes, list_of, output_of)):
            raise ValueError('a NUL')       # a name with a NUL could not be sent back
        return word, [kind(field) for kind, field in zip(kinds, raw)]
    except ValueError as error:
        raise WireError('it sent something that cannot be understood '
                        f'({word}: {error!r})') from error


class EventReader:
    """Bytes from the channel -> events: lists of fields (bytes).  Bounded in memory.

    Everything before a line that equals the token is noise of the login, kept in `noise`.  An event
    "data SIZE WHAT..." is yielded with its SIZE bytes as one more field.
    """

    def __init__(self, token):
        self.noise = b''
        self.greeted = False
        self._token = token.encode()
        self._buffer = b''
        self._data = None               # (fields, size) of an event whose bytes are still coming

    @property
    def pending(self):
        """The bytes that have arrived and form no event yet."""
        return self._buffer

    def feed(self, data):
        """Yield the events that are complete with these bytes."""
        self._buffer += data
        if not self.greeted:
            before, found, after = self._buffer.partition(b'\n' + self._token + b'\n')
            if not found:
                if len(before) > LONGEST_NOISE:
                    raise WireError('its login prints too much text')
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
                    raise WireError('it sent a line that is too long')
                if end < 0:
                    return
                fields = [unescape(field) for field in self._buffer[start:end].split(b'\t')]
                start = end + 1
                if fields[0] == b'data':
                    size = whole_number(fields[1].decode('ascii', 'replace')) if fields[1:] else 0
                    if len(fields) < 3 or size > LONGEST_DATA:
                        raise WireError('it announced an event that is too long')
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
# on stdin, up to a NUL; bash's read takes a byte at a time, so it takes nothing after the NUL.
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

# LogLevel is that of jump hosts; below INFO ssh does not tell why it could not reach the next one.
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

    A copy (an rsync, a tar, a follower) is a session beside the channel.  It uses the channel's
    login, or is alone, with a login of its own.  Copies are alone if sshd allows only one session
    per login: a tar through the channel would need a second protocol.
    nice: an increment, as nice(1) has it
    """

    def __init__(self, machine, run_folder, number, nice=0):
        self.machine = machine
        # nice starts the remote runner and each copy, so no job needs a process for it.  Placement
        # leaves other users their cores; niceness helps at the moment when these users start more.
        self._nice = ['nice', '-n', str(nice)] if nice else []
        self.config_path = os.path.join(run_folder, f'{number}.config')
        self.jump_path = os.path.join(run_folder, f'{number}.jump')
        self.socket_path = os.path.join(run_folder, f'{number}')

    def config(self):
        """Return the text of the ssh_config.  ssh takes the first value of each option.

        IgnoreUnknown names the options that an older ssh does not know.  It also has the values of
        IgnoreUnknown in the user's files, since ssh would not read a second IgnoreUnknown.
        """
        machine, hops = self.machine, self.machine.hops
        ignored = [words for path in self.user_configs() for words in
                   config_values(path, 'IgnoreUnknown')]
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
        """Return the text of the ssh_config of jump hosts, without any option of the machine."""
        return COMMON_SSH_OPTIONS + '  Include ' + ' '.join(
            f'"{path}"' for path in self.user_configs()) + '\n'

    def _through(self, hops):
        """Return the ProxyCommand that does what ProxyJump would do.

        With ProxyJump, ssh would use the -F of the machine for the jump host, too.  The machine's
        `Host` block would match the jump host if both have the same address.  The first hop times
        out first: its message tells most, and would be lost if a later hop gave up before it.
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

    def settings(self):
        """Return the argv that prints ssh's settings for this machine, without connecting."""
        return ['ssh', '-F', self.config_path, '-G', '--', self.machine.host]

    def copy(self, alone=False):
        """Return the argv that runs the script from its stdin on the machine, for one copy."""
        if alone:
            return self._reach(self.machine.host, '-T', *ALONE)
        return self._reach(COPY_ALIAS, '-T')

    def terminal(self, path):
        """Return the argv that runs a bash script on the machine in this terminal.

        path: of the script, without characters that a shell would read
        """
        if not self.machine.host:
            return [*self._nice, 'bash', '-p', path]
        return ['ssh', '-F', self.config_path, '-tt', '-o', 'EscapeChar ~', '--', COPY_ALIAS,
                ' '.join(['exec', *self._nice, 'bash', '-p', path])]

    def shell(self, path, has_terminal, alone=False):
        """Return the argv that runs a bash script on the machine with this program's streams.

        If it cannot go through the master it prints nothing, since the caller tries again alone.
        """
        if not self.machine.host:
            return ['bash', '-p', path]
        kind = ['-tt', '-o', 'EscapeChar ~'] if has_terminal else ['-T']
        way = ([*ALONE, '--', self.machine.host] if alone else
               ['-q', '-o', 'ProxyCommand false', '--', COPY_ALIAS])
        return ['ssh', '-F', self.config_path, *kind, *way, f'exec bash -p {path}']

    def forward(self, here, there):
        """Return the argv that makes the master forward a port of the loopback address here.

        It uses no configuration: the user's may forward other ports; `config` clears all forwards.
        """
        return ['ssh', '-F', 'none', '-S', self.socket_path, '-O', 'forward',
                '-L', f'127.0.0.1:{here}:localhost:{there}', '--', COPY_ALIAS]

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


def config_values(path, keyword, depth=0):
    """Yield the values of a keyword in an ssh_config, and in the files that it includes."""
    import glob
    try:
        with open(path, encoding='utf-8', errors='surrogateescape') as file:
            text = file.read()
    except OSError:
        return
    for word, value in re.findall(rf'(?im)^[ \t]*({keyword}|Include)[ \t=]+(\S.*)$', text):
        if word.lower() == keyword.lower():
            yield value.strip().strip('"')
        elif depth < 16:                    # the limit of ssh itself
            for pattern in value.split():
                pattern = os.path.expanduser(pattern.strip('"'))
                for inner in sorted(glob.glob(os.path.join(os.path.dirname(path), pattern))):
                    yield from config_values(inner, keyword, depth + 1)


def host_patterns():
    """Return the patterns of all `Host` lines of ~/.ssh/config, most of which are plain names."""
    values = config_values(os.path.expanduser('~/.ssh/config'), 'Host')
    return [pattern for value in values for pattern in value.replace('"', ' ').split()]


def known_names():
    """Return the names of machines in ~/.ssh/config and of the machine files that are found."""
    import glob
    names = {pattern for pattern in host_patterns() if not set(pattern) & set('*?!')}
    for folder in ('', os.path.expanduser(MACHINE_FOLDER)):
        names.update(os.path.basename(path).removesuffix('.yaml')
                     for path in glob.glob(os.path.join(glob.escape(folder), '*.yaml')))
    return names


# (Pattern of ssh's message, when to try again, the sentence to show).  'again': at once, since sshd
# was only too busy; 'never': a second try is no better and may be taken for an attack.  The message
# decides nothing else.
SSH_COMPLAINTS = (
    (r'Offending .* key in (.+):\d+\s(?:.*\n)*?Host key for (\S+) has changed', 'never',
     'the host key of {at} has changed, so this may be another machine. Was '
     'it reinstalled? Try: ssh-keygen -f "{0}" -R "{1}"'),
    (r'REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed', 'never',
     'the host key of {at} has changed, so this may be another machine'),
    (r'host key is known for \S+ and you', 'never',
     'the host key of {at} is not known: log in once with ssh, and compare the key'),
    (r'Host key verification failed', 'never', 'the host key of {at} could not be verified'),
    (r'Could not resolve hostname (\S+): Temporary failure', 'later',
     'no name server answered for the {kind} name {0}{likely}'),
    (r'Could not resolve hostname (\S+):', 'never', 'the {kind} name {0} is unknown{likely}'),
    (r'open failed: administratively prohibited', 'never',
     '{at} forbids connections to {next} (AllowTcpForwarding or PermitOpen in its sshd_config)'),
    (r'open failed: connect failed: Name or service not known', 'never',
     '{at} finds no address of {next}'),
    (r'open failed: connect failed: (.*)', 'later', '{at} cannot connect to {next}: {0}'),
    (r'stdio forwarding failed', 'later', '{at} could not connect to {next}'),
    (r'(\S+): Name or service not known', 'never', 'the host name that {0} looks for is unknown'),
    (r'(\S+): (?:command )?not found', 'never',
     'its ProxyCommand needs {0}, which is not installed here'),
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
    # If a jump host fails, its ssh prints why.  Then each ssh behind it prints that it was cut off;
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
    said = f', after it printed: {last}' if last else ''
    return ('its login shell ended before anything could run (is there an exit in one of its start '
            f'files, such as ~/.bashrc, or {FORCED}?){said}', 'never')


def name_hops(machine, why, cuts):
    """Return {word: text} for the sentences of SSH_COMPLAINTS: they name the hop that failed.

    why: the complaint of its ssh; cuts: how many ssh behind it were cut off
    """
    ways = machine.hops or ([('', '', '')] if cuts else [])     # a jump host of ~/.ssh/config
    hops = [*ways, (machine.username, machine.host, machine.port)]
    place = max(len(ways) - cuts, 0)
    user, host, port = hops[place]
    kind = 'jump host' if place < len(ways) else 'host'
    who = re.search(r'(\S+)@(\S+): Permission denied', why)
    where = re.search(r'(?:host|to|by|from|with) (?!UNKNOWN)(\S+) port (\d+)', why)
    if not port and where:              # ssh knows what ~/.ssh/config adds
        host, port = where.groups()
    elif not port:
        host, port = who[2] if who else host, ''
    name = f'{kind} {host}'.rstrip() if kind == 'jump host' else host
    likely = nearest(machine.host, known_names() - {machine.host}) if kind == 'host' else ''
    return {'user': who[1] if who else user or 'you', 'kind': kind, 'at': place_of(name, port),
            'likely': likely, 'next': place_of(*hops[min(place + 1, len(ways))][1:])}


def place_of(host, port):
    """Return how a sentence names a host and its port."""
    return f'{host} port {port}' if port else host


# ---- Client: what the machines of one run share ----

class Client:
    """All that the machines of one run share; `close` kills its processes and removes its files.

    live: while jobs wait, measure again how much the machines have free
    away_limit_s: how long to try to reconnect to a lost machine
    max_result_bytes: limit for the results of a job; None: the free space here is the limit
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
        self.project = project or project_of(results)
        self.accounts = {}              # what identifies an account -> the Worker that has it
        self.files = Files(Keeper(self))
        self.results = results
        self.starts = Starts(self)

    @property
    def journal(self):
        """The Journal of the results, or None if no job is run."""
        return self.results and self.results.journal

    @property
    def owner(self):
        """The owner that a remote runner notes on its machine.

        Another runner of this owner is left from an earlier run or a lost contact, and is stopped.
        """
        if not self.results:
            return self.batch_id
        return f'{self.results.part or "batch"} {self.journal.identity}'

    def rsync_env(self):
        """Return the environment for rsync: no RSYNC_* variables, and a HOME without .popt."""
        return {**{name: value for name, value in os.environ.items()
                   if not name.startswith('RSYNC_')}, 'HOME': self.run_folder}

    def wait_while(self, unfinished, until, hurried=lambda: False):
        """Wait while unfinished(), at most until this time (monotonic), or until hurried()."""
        while unfinished() and not hurried() and time.monotonic() < until:
            self.processes.wait(0.2)

    def close(self):
        """Kill what still runs here and remove the run folder."""
        import shutil
        self.flows.close()
        self.processes.close()
        shutil.rmtree(self.run_folder, ignore_errors=True)


class Starts:
    """The machines on which jobs are to be started: all starts of one moment share one fsync."""

    def __init__(self, client):
        self._client = client
        self._due = {}                  # JobControl -> None, in the order in which they came

    def soon(self, jobs):
        """In the next wait, start the jobs placed on a machine whose files have arrived."""
        if not self._due:
            self._client.processes.call_later(0, self._start)
        self._due[jobs] = None

    def _start(self):
        """Write all these starts to the journal, sync it to the disk, and only then send them."""
        due, self._due = self._due, {}
        claimed = [(jobs, attempt) for jobs in due for attempt in jobs.claim_placed()]
        if claimed:
            self._client.journal.sync()
        for jobs, attempt in claimed:
            jobs.send_start(attempt)


class Files:
    """The files to send, by Forwards; scanned once for all machines.

    never: paths that are never sent, such as that of a file that this program writes
    are_rebuilt: these files were sent before, see Rebuilt; .rsync-filter and git are ignored
    keeper: the Keeper, which keeps copies of the sent files
    """

    def __init__(self, keeper=None):
        self.never, self.keeper, self.are_rebuilt = set(), keeper, False
        self._trees, self._archives, self._manifests = {}, {}, {}
        self._folder_times = {}             # Forwards -> time of change of the current folder

    def trees(self, forwards):
        """Return (Tree to copy, Tree to link) of the Forwards; scanned once."""
        if forwards not in self._trees:
            self._trees[forwards] = self._scan(forwards)
        return self._trees[forwards]

    def look_again(self, forwards):
        """Scan the files again if they have changed, unless an archive of them was made already.

        A line's own files may be sent hours after the first scan.
        """
        trees = self._trees.get(forwards)
        if trees is None or forwards in self._archives or (
                self._folder_times[forwards] == os.stat('.').st_mtime_ns
                and all(is_as_seen(entry) for tree in trees for entry in tree.entries)):
            return
        with contextlib.suppress(FilesError):       # then the files that are left are sent
            self._trees[forwards] = self._scan(forwards)
            self._manifests.pop(forwards, None)

    def forget(self, forwards):
        """Forget the files of these Forwards."""
        for seen in (self._trees, self._archives, self._manifests, self._folder_times):
            seen.pop(forwards, None)

    def _scan(self, forwards):
        self._folder_times[forwards] = os.stat('.').st_mtime_ns
        return (scan_tree(forwards.copy, forwards.exclude, '--copy-forwards',
                          self.never | {*forwards.link}, not self.are_rebuilt),
                scan_tree(forwards.link, forwards.exclude, '--link-forwards', self.never,
                          not self.are_rebuilt))

    def warnings(self, all_forwards, machines):
        """Yield warnings of these Forwards: of broken links, and of variables for the Machines."""
        yield from filter(None, (self._lost_links(all_forwards),
                                 self._sent_variables(all_forwards, machines)))

    def _sent_variables(self, all_forwards, machines):
        """Return a warning of files of these Machines that have `env`, and are sent; or ''."""
        paths = [os.path.relpath(next(filter(os.path.isfile, machine_paths(machine.word)), '.'))
                 for machine in machines if machine.env]
        files = {entry.path for forwards in all_forwards for tree in self.trees(forwards)
                 for entry in tree.entries if entry.kind == 'f'} if paths else ()
        sent = [path for path in paths if path in files]
        if not sent:
            return ''
        import shlex
        has, is_sent, it = ('has', 'is', 'it') if len(sent) == 1 else ('have', 'are', 'them')
        return (f'{names_of([*map(printable, sent)])} {has} env, and {is_sent} sent to the '
                f'machines with the other files. If env has secrets, move {it} to the folder where '
                f'--machines looks, too: mkdir -p {MACHINE_FOLDER} && mv -i '
                f'{printable(shlex.join(sent))} {MACHINE_FOLDER}/')

    def _lost_links(self, all_forwards):
        """Return a warning of links in these Forwards that break on a machine; '' if none do."""
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
            self._manifests[forwards] = Manifest.of(*self.trees(forwards), forwards.link)
        return self._manifests[forwards]

    def small_archive(self, forwards):
        """Return the files of the Forwards as one tar archive, the same for all machines."""
        if forwards not in self._archives:
            for _ in range(3):
                copy, link = trees = self.trees(forwards)
                placed = [(f'copy/{entry.path}', entry) for entry in copy.entries]
                placed += [(f'link/{entry.path}', entry) for entry in link.entries]
                data, manifest = b''.join(archive(placed)), self.manifest(forwards)
                self.look_again(forwards)
                if self.trees(forwards) is trees:   # nothing changed while both were read
                    break
            # The record must match the archive, even if somebody edits the files all the time.
            self._trees[forwards], self._manifests[forwards] = trees, manifest
            self._archives[forwards] = data
        return self._archives[forwards]


GIT_LIMIT_S = 60.0          # for an answer of git
LAST_GIT_S = 5.0            # for git to answer once all else is done
DIFF_BYTES = 256 * 2**20    # of changed files; git holds them in memory to compare them
GIT_PATHS = 500             # in one call of git
MOST_LISTED = 1000          # untracked files in a record


class Keeper:
    """Keeps copies of the sent files here, and asks git for their commit, while they are sent."""

    def __init__(self, client):
        self._client = client
        self._begun, self._at_work = set(), set()       # digests of sets of files

    @property
    def is_busy(self):
        """Tell whether a record is not complete."""
        return bool(self._at_work)

    def keep(self, manifest):
        """Begin to keep these files, which are being sent."""
        sent = self._client.results and self._client.results.sent
        if manifest.digest in self._begun or not sent or sent.limit_bytes is None:
            return
        self._begun.add(manifest.digest)
        self._at_work.add(manifest.digest)
        self._client.flows.start(self._keep(sent, manifest))

    def claim(self, manifest):
        """Make sure that these files are kept: the journal is about to name them."""
        try:
            self._client.results.sent.claim(manifest)
        except OSError as error:
            raise unwritable(self._client.results.sent.folder, error) from None

    def _keep(self, sent, manifest):
        """A flow: keep the files, and then record what git reports of them."""
        try:
            for _ in sent.keeping(manifest):
                yield 0
            if (in_checkout() and not self._client.files.are_rebuilt
                    and not sent.record(manifest.digest).get('commit')):
                facts, patch = yield from self._ask_git(manifest, sent.limit_bytes)
                if facts:
                    sent.note(manifest.digest, patch, **facts)
        except (OSError, SchedulerError) as error:      # there is no git; or see `claim`
            self._client.trace(f'the record of the sent files could not be written: {error}')
        finally:
            self._at_work.discard(manifest.digest)

    def _ask_git(self, manifest, limit_bytes):
        """A flow: return (facts for the record, the differences to the commit as a patch).

        Both have only paths that were sent.  The patch is empty if the commit with the patch may
        differ from the sent files: the patch is too large, a file was edited since, or git was told
        to ignore its changes.  Raises SchedulerError if git fails: half an answer would be wrong.
        """
        head = yield from self._git('rev-parse', 'HEAD', '--abbrev-ref', 'HEAD')
        commit, branch = os.fsdecode(head).split('\n')[:2]
        differ = ('diff', '--relative', '--no-renames', '--no-ext-diff', '--no-textconv')
        changed = yield from self._git(*differ, '--name-only', '-z', commit, '--')
        listed = yield from self._git('ls-files', '-v', '-z')
        tags = {row[2:]: row[0] for row in os.fsdecode(listed).split('\0') if row}
        sent = {path for path in manifest.files if not is_below(path, manifest.linked)}
        untracked = sorted(sent.difference(tags))
        changed = sent.intersection(os.fsdecode(changed).split('\0'), tags)
        patch = yield from self._differences(manifest, differ, commit, sorted(changed), limit_bytes)
        # --assume-unchanged and --skip-worktree
        unsure = {path for path in sent if tags.get(path, 'H') not in 'HMRCK'}
        for number, path in enumerate(sorted(sent.intersection(tags))):
            if number % GIT_PATHS == 0:
                yield 0
            if was_touched(path, manifest) and differs_now(path, manifest):
                unsure.add(path)
        whole = patch is not None and not unsure
        return {'commit': commit, 'branch': branch, 'changed': sorted(changed | unsure),
                'untracked': untracked[:MOST_LISTED], 'untracked_files': len(untracked)
                }, patch if whole else b''

    def _differences(self, manifest, differ, commit, changed, limit_bytes):
        """A flow: return the patch from the commit to these files; None if it is too large."""
        patch = b''
        if not limit_bytes or sum(manifest.files[path][1] for path in changed) > DIFF_BYTES:
            return None
        for start in range(0, len(changed), GIT_PATHS):
            patch += yield from self._git(
                '--literal-pathspecs', *differ, '--binary', '--no-color', '--unified=3',
                '--submodule=short', '--src-prefix=a/', '--dst-prefix=b/', commit, '--',
                *changed[start:start + GIT_PATHS], most=limit_bytes - len(patch))
            if len(patch) > limit_bytes:
                return None
        return patch

    def _git(self, *words, most=math.inf):
        """A flow: return the output of git; kill git after `most` bytes.  git changes nothing.

        Raises SchedulerError if git fails.
        """
        said = bytearray()

        def take(data):
            said.extend(data)
            if len(said) > most:
                child.kill()

        child = self._client.processes.start(
            ['git', '-c', 'core.fsmonitor=false', *words], take, None, has_input=False,
            env=git_env(), deadline_s=GIT_LIMIT_S)
        end = yield child
        if end.status and len(said) <= most:
            raise SchedulerError(f'git: {complaint_line(end.text) or end.status}')
        return bytes(said)


# Variables that a hook of git may set: they name another repository, or change git's output.
GIT_VARIABLES = {f'GIT_{word}' for word in (
    'DIR', 'WORK_TREE', 'INDEX_FILE', 'COMMON_DIR', 'OBJECT_DIRECTORY', 'NAMESPACE', 'PREFIX',
    'ALTERNATE_OBJECT_DIRECTORIES', 'DIFF_OPTS', 'EXTERNAL_DIFF', 'LITERAL_PATHSPECS',
    'GLOB_PATHSPECS', 'NOGLOB_PATHSPECS', 'ICASE_PATHSPECS')}


def git_env():
    """Return the environment in which git reports on the current folder, and changes nothing."""
    return {**{name: value for name, value in os.environ.items() if name not in GIT_VARIABLES},
            'LC_ALL': 'C', 'GIT_OPTIONAL_LOCKS': '0', 'GIT_NO_LAZY_FETCH': '1',
            'GIT_TERMINAL_PROMPT': '0'}


def in_checkout():
    """Tell whether the current folder is in a git checkout."""
    folder = os.path.realpath('.')
    while not os.path.lexists(os.path.join(folder, '.git')):
        if folder == '/':
            return False
        folder = os.path.dirname(folder)
    return True


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
            # If another process has the number by now, a later run removes the folder.
            if match and entry.is_dir(follow_symlinks=False) and (
                    entry.stat(follow_symlinks=False).st_uid == os.getuid()) and (
                    not is_process(int(match[1]))):
                import shutil
                shutil.rmtree(entry.path, ignore_errors=True)


def allow_files(machines):
    """Raise the limit of open files as far as possible; raise an error if that is too low."""
    import resource
    least = 32 + 16 * machines          # three pipes for each ssh, rsync, tar and follower
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for goal in (65536, 10240):         # macOS allows no more, whatever it reports
        goal = goal if hard == resource.RLIM_INFINITY else min(goal, hard)
        with contextlib.suppress(ValueError, OSError):
            if soft != resource.RLIM_INFINITY and soft < goal:
                resource.setrlimit(resource.RLIMIT_NOFILE, (goal, hard))
                soft = goal
    if soft != resource.RLIM_INFINITY and soft < least:
        raise SchedulerError(f'only {soft} files may be open at a time here, and '
                             f'{count_of(machines, "machine")} may need {least}. '
                             f'Try: ulimit -n {least}, or name fewer machines.')


def project_of(results):
    """Return the name of the folder on machines for jobs of this ResultStore, or of none (None).

    A folder that is moved, or whose computer is renamed, keeps the name under which its jobs run.
    """
    if results and results.journal.origin.project and not is_copy(results.journal):
        return results.journal.origin.project
    return project_name()


# ---- Copies: files there and back, by rsync or tar ----

# Smaller trees go through the channel as tar, behind the script, before the login has even ended.
# An rsync needs a session that runs the login's start files.  In a small batch that costs as much
# as everything else.
SMALL_TREE_BYTES = 256 * 1024
SMALL_TREE_ENTRIES = 2000
COPY_LIMIT_S = 24 * 3600.0          # ServerAlive on the master ends a dead link much earlier
GUARD_S = 0.5                       # between two looks at the disk while results arrive
MANY_NAMES = 5000                   # rsync takes 4.5 s to check 40,000, and 25 s for 100,000


class Way(NamedTuple):
    """One way to carry files."""
    by_rsync: bool                  # else with tar
    alone: bool                     # with a login of its own, else over the contact's login
    trusting: bool                  # rsync does not compare names; vet does, which is faster


def carry(contact, worker, copy, is_allowed=True, trusts=False):
    """A flow: try one way of copying after another, until one works or fails for good.

    copy(way) is a flow that returns the End of the child; is_allowed: rsync may be tried; trusts:
    rsync may trust the sender.  Return (Way, End).

    Only a failure shows which options the rsync here lacks: to ask first would cost a process.
    """
    while True:
        way = Way(is_allowed and contact.rsync_works, contact.alone, trusts)
        end = yield from copy(way)
        while end.status and not end.full and contact.is_gone:
            yield TICK_S            # the lost contact made this fail, and soon closes this flow
        if end.status and not end.full and not way.alone and session_refused(end.text):
            contact.alone = True
        elif way.by_rsync and trusts and end.status == 1:       # an rsync before 3.2.5
            trusts = False
        elif way.by_rsync and end.status not in (0, 23, 24) and not end.full:
            refused = re.search(r'.*(unsafe pathname|invalid path|unrequested).*', end.text)
            if refused:
                worker.report.warning(
                    f'{worker.name}: rsync refused files of this machine, so tar fetches them: '
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
    """The files of one Forwards on one machine.  id is '' if there are none."""

    def __init__(self, stage_id, forwards, trees, manifest=None):
        self.forwards = forwards
        self.copy, self.link = trees
        self.manifest = manifest            # the Manifest of the files that jobs get
        self.ready = not (self.copy.entries or self.link.entries)
        self.id = '' if self.ready else stage_id
        self.by_rsync = False
        self.looks = 0                      # how often files changed while they were copied
        self.amount = amount_of(trees)      # (number of files, number of bytes)
        self.began = time.monotonic()
        self.carrier = None                 # the Process that sends a Tree, or the last that did
        self.arrived = 0                    # bytes of the Trees that are sent in full
        self.fed = 0                        # bytes of this Tree written to tar; 0 with rsync

    def sent_bytes(self):
        """Return about how many bytes were sent; None if that is not known.

        Linux counts the bytes that the sending process has written, other systems do not.  rsync
        could print its progress, but the rsync of macOS lacks the option for that.
        """
        with contextlib.suppress(OSError, AttributeError, TypeError):
            if LINUX:
                with open(f'/proc/{self.carrier.popen.pid}/io', 'rb') as file:
                    return self.arrived + int(re.search(rb'wchar: (\d+)', file.read())[1])
        return self.arrived + self.fed or None

    def counted(self, pieces):
        """Yield the pieces for the sending process, and count their bytes."""
        self.fed = 0
        for piece in pieces:
            self.fed += len(piece)
            yield piece

    @property
    def small(self):
        """Tell whether the files go through the channel."""
        return is_small(self.copy, self.link)

    def changed(self):
        """Look at the local files again; return whether any changed, but True only 3 times."""
        trees = [tree._replace(entries=tuple(present(tree.entries)))
                 for tree in (self.copy, self.link)]
        if self.looks > 2 or trees == [self.copy, self.link]:
            return False
        self.looks += 1
        self.copy, self.link = trees
        self.amount = amount_of(trees)
        return True


def amount_of(trees):
    """Return (how many files there are in these Trees, how many bytes)."""
    return sum(tree.files for tree in trees), sum(tree.size for tree in trees)


class Stages:
    """The Stages that one contact has sent, or is sending, by Forwards."""

    def __init__(self, contact, worker, former=()):
        self.former = [*former]             # Stages of former contacts: rsync compares with them
        self._contact, self._worker = contact, worker
        self._stages = {}                   # Forwards -> Stage
        self._may_copy = False              # the machine has reported its folder and its rsync

    @property
    def all(self):
        """Return the Stages that have files, those of former contacts first."""
        return [*self.former, *(stage for stage in self._stages.values() if stage.id)]

    @property
    def on_their_way(self):
        """Return the Stages that have not arrived in full."""
        return [stage for stage in self._stages.values() if not stage.ready]

    def prepare(self, forwards):
        """Return the Stage of these Forwards, and have it sent."""
        files = self._worker.client.files
        if forwards not in self._stages:
            files.look_again(forwards)
            if is_small(*files.trees(forwards)):
                data = files.small_archive(forwards)
            stage = self._stages[forwards] = self._stage(forwards)      # the archive's files
            self._worker.client.files.keeper.keep(stage.manifest)
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
        """Send the stages that had to wait for the machine's answer."""
        self._may_copy = True
        for stage in self._stages.values():
            if not stage.ready and not stage.small:
                self._contact.flows.start(self._send(stage))

    def staged(self, stage_id):
        """Note that the machine has all files of this stage."""
        for stage in self._stages.values():
            if stage.id == stage_id and not stage.ready:
                stage.ready = True
                self._worker.report.sent(self._worker.name, stage)

    def _freeze(self, stage):
        self._contact.send('freeze', stage.id, *stage.forwards.link)

    def _send(self, stage):
        """A flow: send a stage that is too large for the channel, and have it frozen."""
        worker, before = self._worker, stage.manifest
        while True:
            why = yield from self._send_parts(stage)
            if stage.looks:
                stage.manifest = Manifest.of(stage.copy, stage.link, stage.forwards.link)
            if not stage.changed():         # nor did files change while the Manifest read them
                break
        if why:
            self._contact.send('unsent', f'the files could not be sent: {why}')
            return
        if stage.looks:
            names = names_of([*map(printable, stage.manifest.changed(before))])
            worker.report.warning(f'{worker.name}: {names} changed after this run began, so jobs '
                                  'there have the newer files')
            worker.client.files.keeper.keep(stage.manifest)
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
            stage.arrived, stage.fed = stage.arrived + tree.size, 0
        return ''

    def _send_tree(self, stage, tree, part, way):
        """A flow: send a tree in one way; return its End."""
        contact, folder = self._contact, f'stage/{stage.id}/{part}'
        target, output = f'{contact.home}/{folder}', bytearray()
        if way.by_rsync:
            # rsync reads this client's list of files, so it sends the same files as tar.  It
            # writes into a new folder beside the cache, so it never has to delete old files.
            contact.send('folder', folder)
            paths = b''.join(b'./' + os.fsencode(entry.path) + b'\0' for entry in tree.entries)
            bases = [f'../../../cache/{part}', *(f'../../{other.id}/{part}' for other in
                                                 self.former[-3:] if other.by_rsync)]
            argv = contact.connection.rsync(['-@-1', *(f'--link-dest={base}' for base in bases)],
                                            '.', f'{target}/', 'target', way.alone)
            feed = iter([paths])
        else:
            argv = contact.connection.copy(way.alone)
            feed = stage.counted(
                chain_bytes(bytes(nul_ended(REMOTE_UNPACK, contact.token, target)),
                            archive((entry.path, entry) for entry in tree.entries)))
        stage.carrier = contact.start(argv, output.extend, feed=feed, deadline_s=COPY_LIMIT_S,
                                      env=self._worker.client.rsync_env())
        end = yield stage.carrier
        # A login shell may exit with any status, so the script that runs tar prints tar's status.
        confirmed = output.rpartition(f'\n{contact.token} '.encode())[2] == b'0\n'
        if way.by_rsync or confirmed or end.status not in (0, 24):
            return end
        return End(1, end.text or 'tar did not run on the machine')


def chain_bytes(head, pieces):
    """Yield the head, then the pieces."""
    yield head
    yield from pieces


def fetch_tree(contact, worker, names, folder, receiver, way):
    """A flow: fetch the paths ./NAME below jobs/ into an empty folder, in one way; return its End.

    receiver: a TarReceiver, used if the way is not rsync
    """
    client, source = worker.client, f'{contact.home}/jobs'
    listed = b''.join(os.fsencode(name) + b'\0' for name in names)
    confined = confine(folder) if way.by_rsync else None
    if way.by_rsync:
        # --trust-sender: rsync compares each name with all requested names; vet does so faster.
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


def vet(folder, wanted, modes=None, whole=()):
    """Remove what must not be in a folder fetched from a machine; yield (path, why) of each.

    wanted: the paths './a' that were requested.  If one of them did not arrive, why is ''.
    modes: {path: mode that it had before the machine made it readable, to send it}.
    whole: paths that may arrive, with all that is below them.
    This function opens folders only, and follows no link.  A file that stays keeps the permissions
    that its job gave it, less those that the umask here removes, as with cp: a file of mode 0600
    must not become public.
    """
    missing = {spelled_here(path): path for path in map(os.path.normpath, wanted)}
    below = {spelled_here(path) for path in map(os.path.normpath, whole)}
    allowed = with_folders([*missing, *below])
    usual, shut = new_folder_mode(), []
    for parent, folders, files in os.walk(folder):
        outer = spelled_here(os.path.relpath(parent, folder))
        for name in folders + files:
            path = os.path.join(parent, name)
            inner = spelled_here(os.path.normpath(os.path.join(outer, name)))
            info, why = os.lstat(path), ''
            is_folder, has = stat.S_ISDIR(info.st_mode), stat.S_IMODE(info.st_mode)
            missing.pop(inner, None)
            if outer in below:
                below.add(inner)
            if inner not in allowed and inner not in below:
                why = 'was not requested'
            elif stat.S_ISLNK(info.st_mode):
                if leads_out(inner, os.readlink(path)):
                    why = f'leads out of its folder, to {printable(os.readlink(path))}'
            elif is_folder or stat.S_ISREG(info.st_mode):
                mode = (modes or {}).get(inner, has) & usual
                if is_folder and mode & 0o700 != 0o700:     # opened until its content is checked
                    shut.append((path, mode))
                    mode |= 0o700
                if mode != has:
                    os.chmod(path, mode)
            else:
                why = 'is no file, folder or link'
            if why:
                yield inner, why
                (remove_tree if is_folder else os.unlink)(path)
                if is_folder:
                    folders.remove(name)
    yield from ((path, '') for path in sorted(missing.values()))
    for path, mode in reversed(shut):
        os.chmod(path, mode)


def with_folders(paths):
    """Return a set of these relative paths and of all folders above them."""
    found = set()
    for path in paths:
        while path and path not in found:
            found.add(path)
            path = os.path.dirname(path)
    return found


def leads_out(path, target):
    """Tell whether a link at this relative path leads out of the folder."""
    target = os.path.normpath(os.path.join(os.path.dirname(path), target))
    return os.path.isabs(target) or target.split('/')[0] == '..'


def spelled_here(path):
    """Return the path in the spelling used to compare paths: HFS+ decomposes letters."""
    import unicodedata
    return path if LINUX else unicodedata.normalize('NFC', path)


def take_out_twins(folder, missing, wanted):
    """Remove files whose names differ on the machine, but are one name here; return their paths.

    On a file system that ignores case, A and a are one file: the one that arrived last.
    """
    lost = {path.casefold() for path in missing if os.path.lexists(os.path.join(folder, path))}
    twins = [path for path in wanted if path.casefold() in lost]
    for path in twins:
        with contextlib.suppress(OSError):      # it is a folder, or was removed with its twin
            os.unlink(os.path.join(folder, path))
    return sorted(twins)


# Landlock (landlock(7)): the numbers are the same on all architectures but these.
OTHER_NUMBERS = ('alpha', 'mips')
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_WRITES = {1: 0b1111111110010, 2: 1 << 13, 3: 1 << 14}     # what each version adds
PR_SET_NO_NEW_PRIVS = 38


def confine(folder):
    """Return a function that a new process calls to be able to write in this folder only; None if
    the kernel cannot do that."""
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
    """Separates the bytes behind the line with the token from the noise of a login before it."""

    def __init__(self, token):
        self.found = False
        self.head = b''
        self.count = 0                      # how many bytes behind the token came so far
        self._mark = f'\n{token}\n'.encode()

    def receive(self, data):
        """Return the part of these bytes that is behind the token."""
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
    """Stores the tar stream behind the token in a file, since a pipe cannot be unpacked."""

    def __init__(self, path, token):
        self.trouble = ''                   # why the stream is not complete
        self._path, self._behind = path, AfterToken(token)
        self._file = None

    def receive(self, data):
        """Add bytes that arrived."""
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
        """Extract the stream into the folder and return the names that were refused."""
        if not self._file:
            self.trouble = self.trouble or 'nothing arrived'
            return []
        self._file.close()
        try:
            return unpack_archive(self._path, folder)
        except Exception as error:      # of any type: the bytes may be anything
            self.trouble = self.trouble or printable(str(error)) or type(error).__name__
        finally:
            self._remove()
        return []

    def close(self):
        """Remove the file, if it was not unpacked."""
        if self._file and not self._file.closed:
            self._file.close()
            self._remove()

    def _remove(self):
        with contextlib.suppress(FileNotFoundError):        # somebody removed job_results
            os.unlink(self._path)


def is_plain_file(path):
    """Tell whether the path is a regular file, not a link to one."""
    return os.path.isfile(path) and not os.path.islink(path)


# ---- Contact: one login, and all that uses it ----

CONNECT_LIMIT_S = 60.0              # login, start files, environment and probe
SLOW_LOGIN_S = 10.0                 # after this time a warning says why there is no answer
BEAT_S, SILENCE_LIMIT_S = 20.0, 90.0    # between two pings; until a silent machine counts as lost


def is_program(name):
    """Tell whether a program of this name can be started here."""
    return any(os.access(os.path.join(folder, name), os.X_OK) for folder in os.get_exec_path())


def write_configurations(connection):
    """Write the files that ssh reads for a Connection."""
    for path, text in ((connection.config_path, connection.config()),
                       (connection.jump_path, connection.jump_config())):
        try:
            with open(path, 'w', encoding='utf-8',
                      opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(text)
        except OSError as error:
            raise SchedulerError(f'there is no folder for temporary files: {path} cannot '
                                 f'be written: {reason_of(error)}.') from error


def runner_for(engine):
    """Return the remote runner for a machine, or for a cluster with this engine."""
    if not engine:
        return REMOTE_RUNNER
    return (REMOTE_RUNNER.removesuffix(REMOTE_CALL) + REMOTE_ENGINE + REMOTE_ENGINES[engine]
            + REMOTE_CALL)


class Contact:
    """One login to a machine, from connecting to its loss.

    Its ssh is the channel: requests go to the remote runner, events come back.  Copies, followers
    and timers are flows of a Contact, and end with it.  To reconnect, the Worker makes a new
    Contact, and gets no more events of the old one.

    worker: worker.hear(event, values) is called for each event.  worker.contact_lost(why, retry)
    is called once, after the last event; retry: 'again', 'later' or 'never', see SSH_COMPLAINTS.
    """

    def __init__(self, worker, number, former=()):
        client = worker.client
        self.connection = Connection(worker.machine, client.run_folder, f'{worker.number}.{number}',
                                     client.nice)
        self.id = f'{client.batch_id}.{worker.number}.{number}'
        self.token = os.urandom(16).hex()
        self.home = ''                      # the project's folder on the machine, when it is known
        self.rsync_works = False            # at both ends, as far as is known
        self.alone = False                  # each copy needs a login of its own (MaxSessions)
        self.is_over = False
        self.flows = Flows(client.processes)
        self.stages = Stages(self, worker, former)
        self._heard = time.monotonic()      # when bytes last arrived
        self._worker, self._client = worker, client
        self._reader = EventReader(self.token)
        self._process = None

    def open(self, terms):
        """Begin to log in; send the remote runner and its settings."""
        machine, client = self._worker.machine, self._client
        if machine.host:
            write_configurations(self.connection)
        self._process = client.processes.start(
            self.connection.channel(), self._receive, self._ended, keep_stdin=True,
            cwd=None if machine.host else os.path.expanduser('~'))
        runner = runner_for(machine.engine).encode()
        library = runner.removesuffix(REMOTE_CALL.encode()) + REMOTE_VISIT.encode()
        env = [f'{name}={value}' for name, value in machine.env]
        self._process.write(nul_ended(REMOTE_LOADER, len(runner)) + runner + nul_ended(
            self.token, machine.workdir, client.project, client.owner, self.id, machine.setup,
            int(terms.want_gpus), len(env), *env))
        if terms.tied:
            self.send('tie')
        if terms.checks:
            self.send('check')
        if machine.engine:
            self.send('engine', len(library), machine.node_folder, *machine.engine_options,
                      data=library)
        self.flows.start(self._warn_of_silence())
        self.flows.start(self._await_answer())

    def send(self, verb, *fields, data=b''):
        """Queue a request to the remote runner; data: bytes that follow it."""
        self._process.write(request(verb, *fields) + data)

    def start(self, argv, on_output, **settings):
        """Start a process beside the channel, for a flow to yield."""
        return self._client.processes.start(argv, on_output, None, **settings)

    def become_ready(self, home, has_rsync):
        """Send the files that had to wait until the machine was ready.

        home: the project's folder on the machine; has_rsync: the machine has rsync
        """
        self.home = home
        self.rsync_works = (has_rsync and is_program('rsync') and self.is_quiet
                            and re.fullmatch(r'/[\w./+@-]*', home) is not None)
        self.stages.begin()
        self.flows.start(self._beat())

    def close(self):
        """Close the channel when all is sent; the remote runner then exits by itself."""
        self._process.close_stdin()

    def end(self):
        """Kill its ssh and close its flows now; do not tell the Worker."""
        self.is_over = True
        self.flows.close()
        if self._process and self._process.popen.poll() is None:
            self._process.kill()

    def lose(self, why, retry='never'):
        """End the contact now, and tell the Worker why."""
        if not self.is_over:
            self.end()
            self._worker.contact_lost(why, retry)

    @property
    def is_gone(self):
        """Tell whether its ssh has ended, even if nothing has noticed that yet."""
        return self._process.popen.poll() is not None

    @property
    def is_quiet(self):
        """Tell whether the login printed nothing: rsync fails if it does."""
        return not self._reader.noise.strip()

    @property
    def noise(self):
        """Return the first line that the login printed."""
        return complaint_line(self._reader.noise.decode('utf-8', 'replace'))

    @property
    def runs_bash(self):
        """Tell whether the remote runner has answered."""
        return self._reader.greeted

    def hindrance(self):
        """Return why the machine has not reported its resources yet, if that is known."""
        if self._reader.greeted or not self._worker.machine.host:
            last = 'the programs of Slurm' if self._worker.machine.engine else 'nvidia-smi'
            return ('bash runs, but one of these is slow: the workdir, the start files of an '
                    f'interactive login, such as ~/.bashrc, or {last}')
        if not os.path.exists(self.connection.socket_path):     # ssh creates it after the login
            return ''
        said = next(filter(None, (complaint_line(text.decode('utf-8', 'replace'), -1) for text in (
            self._process.complaint, self._reader.pending))), '')
        if 'fork: retry' in said:
            return 'this account can start no more processes (ulimit -u)'
        return ('the login succeeded, but no command runs: does one of its start files, such as '
                f'~/.bashrc, wait or read?{f" It printed: {said}" if said else ""} Or is '
                f'{FORCED}?')

    def _warn_of_silence(self):
        """A flow: warn that the machine does not answer, if the reason is known."""
        worker = self._worker
        yield SLOW_LOGIN_S
        if worker.state == 'connecting' and self.hindrance():
            worker.report.warning(f'{worker.name}: no answer within {SLOW_LOGIN_S:.0f} s, still '
                                  f'waiting: {self.hindrance()}')

    def _await_answer(self):
        """A flow: give up on a machine that does not answer."""
        yield CONNECT_LIMIT_S
        if self._worker.state == 'connecting':
            why = self.hindrance()
            self.lose(f'no answer within {CONNECT_LIMIT_S:.0f} s'
                      + (f': {why}' if why else ''), 'later')

    def _beat(self):
        """A flow: ping a silent machine, and give up on one that does not answer any more."""
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
        """Lose the contact: its ssh has ended."""
        text = complaint.decode('utf-8', 'replace')
        if not self._reader.greeted:
            self.lose(*explain_login(self._worker.machine, status,
                                     self._reader.noise.decode('utf-8', 'replace'), text))
        else:
            last = complaint_line(text, -1)
            self.lose('the connection broke' + (f' ({last})' if last else ''), 'later')


# ---- Results on their way: from the machine into job_results ----

GATHER_S = 1.0                      # how long results wait for others, to share one copy
GATHER_JOBS = 200
CLEAN_JOBS = 50


class Leavings:
    """The files that an attempt left in its folder, as the remote runner lists them."""

    def __init__(self):
        self.folder = None                  # where they lie, below jobs/
        self.back = []                      # paths './a' to fetch
        self.modes = {}                     # {path: mode} of paths made readable to be fetched
        self.kept = []                      # paths that could not be fetched: they stay there
        self.size = 0                       # in bytes; 0 if it is below 1 MB
        self.too_large = False              # so that its files stay on the machine
        self.odd = []                       # (mark, path): '!' does not exist, '?' is no file


def read_leavings(entries):
    """Return the Leavings of the entries of a list: a mark and a value each, see entry_of."""
    left = Leavings()
    for mark, value in entries:         # the folder comes first: without one nothing is fetched
        if mark == '+':
            left.back.append(value)
        elif mark == 'w':
            left.folder = value
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


def why_odd(attempt, mark, path):
    """Return why a path in the Leavings of an attempt cannot be fetched; mark, path: one of odd."""
    if mark != '!':
        return f'{printable(path)} is no file, folder or link, so that is not fetched'
    if attempt.state != 'incomplete':
        return f'it did not make {printable(path)}, so that is not fetched'
    machine = attempt.machine.name
    if attempt.record['kept'] is True:      # the list is that of the end of the job, or only !.
        return (f'its files, which were too large before, are not on {machine} any more'
                if path == '.' else
                f'it did not make {printable(path)}, so that is not fetched')
    return f'{printable(path)}, which could not be fetched before, is not on {machine} any more'


class Collector:
    """Fetches the results of one machine: those of many attempts with one copy.

    It fetches the results of attempts that ended and whose list of files has arrived.  If contact
    is lost, the copy ends too; after the next login these results are fetched again.
    """

    def __init__(self, worker):
        self._worker, self._client = worker, worker.client
        self._due = None                    # when results have waited long enough for others
        self._under_way = False
        self._cleanable = []                # keys of jobs whose files on the machine nobody needs

    # Lists of what attempts left

    def add(self, attempt, entries):
        """Collect an attempt that ended; entries: its list, or only @ if the list comes later."""
        if entries == [('@', '')]:
            self._ask(attempt)
        else:
            self._list_came(attempt, entries)

    def add_kept(self):
        """Try to fetch the paths that an earlier run could not fetch, or that were too large."""
        worker = self._worker
        for name, record in self._client.results.kept(worker.machine.address).items():
            if not worker.lives.get(worker, record['key'], 'incomplete'):
                job = Job(name, record['command'], 0, None, None)
                attempt = Attempt(job, worker, record['key'], record)
                worker.lives.restore(attempt, 'incomplete')

    def resume(self):
        """On connecting, ask for lists that have not arrived, and fetch the listed files."""
        for attempt in self._worker.lives.of(self._worker, *ARRIVING):
            if attempt.leavings is None:
                self._ask(attempt)
        self.fetch_if_due()

    def _ask(self, attempt):
        if attempt.state == 'incomplete':
            kept = attempt.record['kept']
            self._worker.contact.send('again', attempt.key, *(
                path for path in (() if kept is True else kept) if '\0' not in path))
        else:
            self._worker.contact.send('list', attempt.key)

    def on_back(self, key, entries):
        """Use the list of an attempt that came after the event of its end, if it has none yet."""
        attempt = self._unlisted(key)
        if attempt:
            self._list_came(attempt, entries)

    def on_unlistable(self, key):
        """Leave the results of an attempt on its machine, which cannot send their list."""
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
            self._warn_of(attempt, f'its files are not fetched: they are {size_of(left.size)}, and '
                          f'--max-result-size is {size_of(limit)}. The same command without '
                          '--max-result-size fetches them', 'They are')
            left.back, left.too_large = [], True
        self.go_on(attempt)

    def go_on(self, attempt):
        """Put results in place or have them fetched, if their list is here and no follower runs."""
        if attempt.leavings is None or attempt.state not in ARRIVING or (
                self._worker.jobs.is_followed(attempt)):
            return
        if not self._names(attempt):        # all of it arrived with the event of its end
            self._commit(attempt, {}, None)
            return
        if self._due is None:
            self._due = time.monotonic() + GATHER_S
            self._client.processes.call_later(GATHER_S, self.fetch_if_due)
        self.fetch_if_due()

    def _warn_of_odd(self, attempt):
        """Warn of each path that cannot be fetched."""
        left, machine = attempt.leavings, self._worker.name
        for mark, path in left.odd:
            self._worker.report.warning(f'{attempt.name}: {why_odd(attempt, mark, path)}')
        if left.kept:
            self._warn_of(attempt, f'the login on {machine} may not read '
                          f'{names_of([*map(printable, left.kept)])}, so this was not fetched. '
                          'Make it readable on the machine and run the same command again')

    def _warn_of(self, attempt, what, it='It is'):
        self._worker.report.warning(
            f'{attempt.name}: {sentence(what)} {it} kept on {self._worker.name}, in '
            f'{self._worker.contact.home}/jobs/{attempt.leavings.folder}')

    # Fetching results

    def fetch_if_due(self):
        """Fetch waiting results if they waited long enough, are many, or no more can come soon."""
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
        """A flow: fetch the files of attempts into an empty folder, then put them in place."""
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
                # Only Linux can confine rsync; rsync on macOS writes wherever a machine tells it.
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
                if trouble:         # files that arrived may be incomplete, others are missing
                    self._keep(attempt, trouble)
                else:
                    self._collect(attempt, folders[-1], complaint_line(end.text))
        finally:            # also when contact is lost
            for folder, receiver in zip(folders, receivers):
                receiver.close()
                results.discard(folder)
            self._under_way = False
        self.fetch_if_due()

    def _unpack(self, receiver, folder, end):
        """Unpack the tar that arrived; return why it is not complete, or ''."""
        for name in receiver.unpack(folder):
            self._worker.report.warning(
                f'{self._worker.name}: refused the file {printable(name)}')
        if end.status not in (0, 1, 2):         # tar's own, for trouble with single files
            return complaint_line(end.text) or receiver.trouble or f'tar ended with {end.status}'
        return receiver.trouble

    def _missing_streams(self, attempt):
        """Return which streams, 'out' and 'err', are not complete here."""
        if attempt.state == 'incomplete':
            return []
        return [name for name, stream in attempt.streams.items()
                if stream.content is None and not self._has_grown(attempt, name, stream)]

    def _has_grown(self, attempt, name, stream):
        """Tell whether a whole stream was shown, and is in job_results if it is to be kept."""
        return stream.here == stream.size and (not attempt.how.keep or (
            stream.stored and self._client.results.has(attempt.name, name, stream.size)))

    def _names(self, attempt):
        """Return the paths to fetch for an attempt, below jobs/."""
        return [*(f'./{attempt.key}.{stream}' for stream in self._missing_streams(attempt)),
                *(f'./{attempt.leavings.folder}/{path[2:]}' for path in attempt.leavings.back)]

    # Putting results in place

    def _collect(self, attempt, folder, complaint):
        """Put in place the files of one attempt that arrived in `folder`."""
        streams = {stream: os.path.join(folder, f'{attempt.key}.{stream}')
                   for stream in self._missing_streams(attempt)}
        complaint = complaint or 'it did not arrive'
        left = attempt.leavings
        work = os.path.join(folder, left.folder or 'work')      # without one no file was listed
        # A machine may send anything: a link here could lead to files of the user.
        if os.path.islink(work):
            self._keep(attempt, 'a link arrived in the place of its folder')
            return
        if not all(is_plain_file(path) for path in streams.values()):
            self._keep(attempt, complaint)
            return
        refused = collections.defaultdict(list)
        try:
            if os.path.isdir(work):
                os.chmod(work, 0o700)       # its job may have taken away permissions
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
                (twins, 'the file system here does not distinguish names that differ in case only',
                 '')):
            if paths:
                left.kept += paths
                self._warn_of(attempt, f'{names_of([*map(printable, paths)])} could not be '
                              f'fetched: {sentence(why)}{hint}')
        self._commit(attempt, streams, work)

    def _commit(self, attempt, arrived, work):
        """Put the results in place; have them removed from the machine, unless it keeps some.

        arrived: {stream: path} of the streams that a copy fetched
        """
        kept = attempt.leavings.kept
        if attempt.leavings.too_large:
            kept = attempt.record['kept'] if attempt.state == 'incomplete' else True
        streams = {name: arrived.get(name, stream.content)
                   for name, stream in attempt.streams.items()}
        try:
            kept = self._put_in_place(attempt, streams, work, kept)
        except (ResultsError, OSError) as error:
            if attempt.state not in (*ARRIVING, 'cancelled'):
                raise                       # Lives.move worked, and then its callback failed
            self._keep(attempt, reason_of(error) if isinstance(error, OSError) else str(error))
            return
        if not kept:
            self._cleanable.append(attempt.key)
            self.clean(CLEAN_JOBS)

    def _put_in_place(self, attempt, streams, work, kept):
        """Move the files to their place, and note that; return which ones stay on the machine."""
        results, lives, name = self._client.results, self._worker.lives, attempt.name
        if attempt.state == 'stopped':
            lives.move(attempt, 'cancelled', kept=kept)
            results.set_aside(name, streams, work)
            return kept
        if attempt.state == 'incomplete':
            kept = kept if kept is True else [*kept, *self._add(attempt, work)]
        else:
            results.commit(name, streams, work, attempt.job.backwards != (), kept)
        for stream, bytes_here in attempt.streams.items():
            if bytes_here.shown and bytes_here.here < bytes_here.size:
                bytes_here.show_rest(results.read(name, stream, bytes_here.here))
        lives.move(attempt, 'collected', kept=kept)
        return kept

    def _add(self, attempt, work):
        """Add files that an earlier run could not fetch to the results; return the paths of those
        that stay on the machine, since job_results has other files there."""
        others = self._client.results.add(attempt.name, work)
        if others:
            self._warn_of(attempt, f'job_results/{attempt.name} has another '
                          f'{names_of([*map(printable, others)])} than {self._worker.name}, so '
                          'that was not fetched. Move the one here away and run the same '
                          'command again')
        return others

    def _keep(self, attempt, why):
        """Leave the results of an attempt on its machine."""
        self._worker.report.warning(
            f'{attempt.name}: its results could not be fetched: {sentence(why)} They are kept on '
            f'{self._worker.name}, and the same command fetches them')
        if attempt.state == 'incomplete':       # only the kept paths were not collected before
            self._worker.lives.move(attempt, 'unfetched')
        elif attempt.state != 'cancelled':
            self._worker.lives.move(attempt, 'kept')

    # Tidying up

    def forget(self, *keys):
        """Have the results of these jobs removed from the machine: nobody needs them."""
        self._cleanable += keys

    def clean(self, least=0):
        """Have the files of collected jobs removed, many at a time."""
        if len(self._cleanable) > least:
            self._client.journal.sync(results=True)
            self._worker.contact.send('clean', *self._cleanable)
            self._cleanable = []


# ---- Worker: one machine, its contact and its jobs ----

SETTLED_S = 5.0                     # for a machine to report how jobs of earlier logins ended
ENDING_S = 1.0                      # to learn that a job has ended, after its input has failed
FOLLOW_AFTER_S = 0.08               # if a job ends sooner, the event of its end has the output
BEYOND = 2**62                      # more bytes than any stream has
KILL_GRACE_S = 5
MEASURE_LEAST_S = 1.0               # between two looks at a machine's free resources
MEASURE_SHARE = 0.01                # of a core, at most, for such looks
MEASURE_LIMIT_S = 60.0              # for the answer to a look; also the longest pause after one
DRAIN_S = 10.0                      # a follower silent this long after the end of its job is dead
FACTS_S = 1.0                       # for a machine to report its facts, at the end
FAREWELL_S = 30.0                   # for tidying up on the machine
RETRY_S, LONGEST_RETRY_S = 1.0, 60.0    # before reconnecting; doubles each time


class Gauge:
    """The free resources of one machine: asks for its facts, and makes a Capacity of them.

    Asking costs the machine at most MEASURE_SHARE of a core.
    """

    def __init__(self, worker):
        self.capacity = None
        self.details = []                   # facts of `check`: (name, value, when it arrived)
        self._worker = worker
        self._facts = []                    # what the probe has reported so far
        self._is_asked = False              # a look is under way
        self._sample = None                 # the last Sample, to compare with the next one
        self._ended_keys = set()            # of jobs that ended since the last sample
        self._ended_ticks = 0               # processor time that those jobs used since then
        self._number, self._asked_at = 0, 0.0       # of the current look, else of the last one
        self._due = None                    # when the next look is due, or None
        self._cost_s = 0.0                  # seconds of a core that the last look took
        self._facts_since = None            # when a job was first claimed over this contact
        self.awaits_facts = False           # the journal has no facts of this machine yet

    def renew(self):
        """Forget a look that will not be answered, such as one over a former contact."""
        self._facts, self._due, self._is_asked, self.details = [], None, False, []
        self._facts_since, self.awaits_facts = None, False

    def on_probe(self, key, value):
        """Note one fact."""
        if key.startswith('check_') and len(self.details) < 1000:
            self.details.append((key[6:], value, time.time()))
        elif len(self._facts) < 10000:
            self._facts.append((key, value))

    def ended(self, key, cpu_ticks):
        """Note that a job has ended; cpu_ticks: the processor time that it used, in 1/100 s."""
        self._ended_keys.add(key)
        known = self._sample.ticks.get(key, 0) if self._sample else 0
        self._ended_ticks += max(cpu_ticks - known, 0)

    def understand(self):
        """Make a Capacity of the facts, and send the limits for starts to the machine."""
        worker = self._worker
        if self._facts and worker.machine.engine:
            self._understand_queue()
            return
        if not self._facts:
            raise WireError('it sent something that cannot be understood (it is ready, and did '
                            'not report its resources)')
        ours = {attempt.key for attempt in worker.lives.of(worker, *ALIVE)} | self._ended_keys
        self.capacity = parse_probe(self._facts, worker.machine, ours, self._sample,
                                    self._ended_ticks)
        if worker.client.results:
            worker.client.results.seen.add(worker.machine.address,
                                           use_in(self._facts, self._sample))
        self._sample = read_sample(self._facts,
                                   self._sample.gpu_free_mb if self._sample else None)
        for key, mb in gpu_memory(self._facts).items():
            attempt = worker.lives.get(worker, key, *ALIVE)
            if attempt:
                attempt.peaks_mb[1] = max(mb, attempt.peaks_mb[1] or 0)
        self._facts, self._ended_keys, self._ended_ticks = [], set(), 0
        if worker.client.live:
            worker.contact.send('limits', *self.capacity.limits)

    def _understand_queue(self):
        """Make a Capacity of the facts of a cluster."""
        known = self.capacity.queue if self.capacity else None
        queue = parse_queue(self._facts, self._worker.machine, known)
        self.capacity, self._facts = Capacity(0.0, 0, queue=queue._replace(
            refusals=tuple(self._worker.queue.refusals.items()))), []

    def measure(self, within_s=0.0):
        """Ask for the free resources again, within this many seconds."""
        if self._has_failed:
            self.renew()
        earliest = min(max(MEASURE_LEAST_S, self._cost_s / MEASURE_SHARE), MEASURE_LIMIT_S)
        due = time.monotonic() + max(within_s, earliest if self._sample else 0)
        if self._due is None or due < self._due:
            self._due = due
            self._worker.client.processes.call_later(max(due - time.monotonic(), 0), self._ask)

    @property
    def is_awaited(self):
        """Tell whether a look is due or under way, and has not failed."""
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

    def claims(self):
        """Ask for the machine's facts, once per contact: a job is about to be claimed there."""
        if self._facts_since is None:
            self._facts_since = time.time()
            self.awaits_facts = (self._worker.machine.address
                                 not in self._worker.client.journal.machines)
            # sent after the start of the job
            self._worker.client.processes.call_later(0, self._ask_facts)

    def _ask_facts(self):
        if self._worker.state == 'ready':
            self._worker.contact.send('facts')

    def on_facts(self, kernel, driver, python):
        """Note the machine's facts in the journal."""
        journal, address = self._worker.client.journal, self._worker.machine.address
        if python == '-':                   # a second event reports it
            python = journal.machines.get(address, {}).get('python', '')
        else:
            self.awaits_facts = False
        version = re.search(r' (\d+(?:\.\d+)+) ', f'{driver} ')
        facts = {'kernel': kernel[:80], 'driver': version and version[1],
                 'python': python.removeprefix('Python ')[:40]}
        if self.capacity:
            facts.update(cores=self.capacity.total_cores, memory_mb=self.capacity.total_memory_mb,
                         gpus=[{'index': gpu.index, 'model': gpu.name,
                                'memory_mb': gpu.total_memory_mb} for gpu in self.capacity.gpus])
        journal.note_machine(address, {name: fact for name, fact in facts.items() if fact},
                             self._facts_since or time.time())

    def on_measured(self, number, cost_cs):
        """Use the facts of a look that is complete; cost_cs: its processor time, in 1/100 s."""
        if number != self._number:
            self._facts = []                # they are of a look that was given up
        elif self._is_asked:
            self._cost_s, self._due, self._is_asked = cost_cs / 100, None, False
            self.understand()
            self._worker.run.machine_changed(self._worker, 'ready')


class Terms(NamedTuple):
    """How to log in to a machine."""
    want_gpus: bool = True          # nvidia-smi is asked
    tied: bool = False              # the jobs end with the contact
    checks: bool = False            # the machine also reports facts for --check


class Seeking:
    """How, how often and since when a Worker tries to have contact with its machine."""

    def __init__(self, terms):
        self.terms = terms
        self.asks = True                    # the machine is asked for its resources
        self.retry = 'never'                # when to try again after a failure: see SSH_COMPLAINTS
        self.began = time.monotonic()       # when the first login began
        self.was_ready = False              # there was contact
        self.contacts = 0
        self.tries = 0                      # since the last contact
        self.away_since = None


KEY = re.compile(r'[A-Za-z0-9_+=@%][A-Za-z0-9._+=@%-]*\.[0-9]+(-[0-9a-f]+)?')       # of a job


class OtherJob(NamedTuple):
    """A job on a machine that was claimed by a journal of another job_results."""
    key: str                            # NAME.ATTEMPT-IDENTITY; older versions left -IDENTITY out
    state: str                          # running, starting, ended, lost or damaged
    exit_code: int                      # if it has ended
    command: str

    @property
    def name(self):
        """Return the name that it had in its batch."""
        return self.key.rpartition('.')[0]

    @property
    def identity(self):
        """Return the identity of its journal, '' if that had none."""
        return self.key.rpartition('.')[2].partition('-')[2]


def listed_jobs(listed):
    """Return the OtherJobs of the event `others`.  listed: bytes, see REMOTE_RUNNER"""
    fields = listed.split(b'\0')[:-1]
    jobs = [OtherJob(os.fsdecode(key), word.decode('ascii', 'replace'),
                     whole_number(status.decode('ascii', 'replace')), os.fsdecode(command))
            for key, word, status, command in zip(*(iter(fields),) * 4)]
    # Keys become names of files here.
    return list({job.key: job for job in jobs if KEY.fullmatch(job.key)}.values())


class Followers:
    """Sessions beside the channel, each of which brings the output of one attempt byte for byte.

    They are flows of one contact.  A job writes to files on its machine, and its follower reads
    these files.  So execute_remote can be killed at any byte and attach again, and a slow reader
    or a broken link never delays a job.  The price is disk space on both sides.
    """

    def __init__(self, worker):
        self._worker = worker
        self._processes = {}                # key of an attempt -> the Process that brings output

    def has(self, attempt):
        """Tell whether a follower still brings output of this attempt."""
        return attempt.key in self._processes

    def start(self, attempt):
        """Begin to bring the output of an attempt, unless it ends within FOLLOW_AFTER_S."""
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
        """After the job's end, stop when all its output is here, or when no more arrives."""
        if self.has(attempt):
            if attempt.is_heard:
                self.stop(attempt)
            else:
                self._worker.contact.flows.start(self._drain(attempt))

    def _drain(self, attempt):
        """A flow: stop a follower that brings nothing more: it may have died on the machine."""
        while self.has(attempt):
            before = [stream.here for stream in attempt.streams.values()]
            yield DRAIN_S
            if before == [stream.here for stream in attempt.streams.values()]:
                self.stop(attempt)

    def stop(self, attempt):
        """Stop bringing output: all of it is here, or a copy fetches the rest."""
        if self.has(attempt):
            self._processes.pop(attempt.key).close_stdin()
            self._worker.collector.go_on(attempt)

    def close(self):
        """Stop all followers: ssh ends only after the last session on its connection."""
        while self._processes:
            self._processes.popitem()[1].close_stdin()


# The remote runner writes this to the stderr of a job that was killed together with the process
# that records its end.
KILLED_WITH_GROUP = b'with its whole process group'


def await_look(worker, is_busy):
    """A flow: wait before the next look at the jobs of a machine.

    is_busy: tells whether jobs began or ended lately.  A cluster is then looked at again sooner:
    other jobs will follow, and only a look shows that.
    """
    pause_s = REFRESH_S + len(worker.lives.of(worker, *ALIVE)) / 100
    if not worker.machine.engine:
        yield pause_s
        return
    until = time.monotonic() + pause_s
    yield HASTY_S
    while time.monotonic() < until and not is_busy():
        yield HASTY_S


class JobControl:
    """The attempts on one machine: starts and stops them, and handles the events about them."""

    def __init__(self, worker):
        self._stops = 0                     # requests to stop jobs that have no answer yet
        self._heard = -math.inf             # when a job was last started, began or ended
        self._worker, self._client = worker, worker.client
        self._followers = Followers(worker)
        self._inherited, self._killed = set(), set()    # keys of jobs that ran before this contact
        self.folders = {}                   # key -> where the job runs, below jobs/, if asked for

    def renew(self):
        """Start over with a new contact."""
        self._stops, self._followers = 0, Followers(self._worker)
        for attempt in self._worker.lives.of(self._worker, 'placed'):
            if attempt.stage:
                self._prepare(attempt)      # the new contact has not sent its files

    def close(self):
        """Stop bringing output: the contact is about to close, and the jobs keep running."""
        self._followers.close()

    # Starting

    def start(self, attempt):
        """Have a placed attempt started as soon as its files are on the machine."""
        self._prepare(attempt)
        self._open_streams(attempt)
        if self._worker.state == 'ready':
            self._client.starts.soon(self)

    def _prepare(self, attempt):
        attempt.stage = self._worker.contact.stages.prepare(attempt.job.forwards or Forwards(()))

    def _open_streams(self, attempt):
        how, grow = attempt.how, self._client.results.grow
        for stream in ('out', 'err'):
            attempt.streams[stream] = Stream(
                functools.partial(grow, attempt.name, stream) if how.keep else None,
                functools.partial(how.show, stream) if how.show else None)

    def claim_placed(self):
        """Claim in the journal the placed Attempts whose files are on the machine; return these.

        Starts has them started once the journal is on the disk.
        """
        worker, results, claimed = self._worker, self._client.results, []
        for attempt in worker.lives.of(worker, 'placed') if worker.state == 'ready' else ():
            if attempt.stage and attempt.stage.ready:
                former = results.journal.record(attempt.name)
                self._client.files.keeper.claim(attempt.stage.manifest)
                attempt.record['files'] = attempt.stage.manifest.digest
                worker.gauge.claims()
                worker.lives.move(attempt, 'claimed', **attempt.record)
                if former.get('kept') and former['machine'] == worker.machine.address:
                    worker.collector.forget(former['key'])      # its results here were deleted
                claimed.append(attempt)
        return claimed

    def send_start(self, attempt):
        """Send the start of an attempt whose claim is on the disk."""
        backwards, how = attempt.job.backwards, attempt.how
        self._heard = time.monotonic()      # the job may begin and end at once
        if self._worker.machine.wrap:
            self._worker.contact.send('wrap', attempt.key, fill_placeholders(
                self._worker.machine.wrap, values_of(attempt)))
        self._worker.contact.send(
            'start', attempt.key, attempt.stage.id, '-' if attempt.gpus is None else attempt.gpus,
            need_of(attempt, self._worker.machine), how.mode,
            '' if how.timeout_s is None else f'{how.timeout_s:.3f}', attempt.job.command,
            'changed' if backwards is None else 'paths' if backwards else 'none',
            *(backwards or ()))

    def on_started(self, *keys):
        """Note that these jobs run."""
        self._heard = time.monotonic()
        for key in keys:
            attempt = self.alive(key)
            if not attempt:
                continue
            if attempt.how.source is not None and attempt.state in ('claimed', 'queued'):
                self._worker.contact.flows.start(self._feed(attempt))
            if attempt.how.show:
                self._followers.start(attempt)
            if attempt.state in ('claimed', 'queued'):
                self._worker.lives.move(attempt, 'running')
            # There was no contact to send a request to stop it, or the request may be lost.
            if attempt.state == 'stopping' or self._worker.run.wishes.unwanted(attempt):
                self.end([attempt])

    def alive(self, key):
        """Return the attempt that was started, or asked about, over this contact; else None."""
        attempt = self._worker.lives.get(self._worker, key, *ALIVE)
        return attempt if attempt and attempt.streams else None

    # Asking, after contact was lost or this program was started again

    def ask(self):
        """Ask about each attempt that may run there; the machine revokes starts not arrived yet."""
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
        """A flow: wait until the machine has reported how jobs ended, then see _explain_killed."""
        yield SETTLED_S
        self._explain_killed()

    def _explain_killed(self):
        """Warn of what may have killed all jobs that ran before this contact, such as logind."""
        count, killed, lives = len(self._inherited), len(self._killed), self._worker.lives
        alive = {attempt.key for attempt in lives.of(self._worker, *ALIVE)}
        running, self._inherited, self._killed = self._inherited & alive, set(), set()
        if not running and (killed > 1 or 0 < killed == count):
            self._worker.report.warning(
                f'{self._worker.name}: {count_of(killed, "job")} that ran there '
                f'{"was" if killed == 1 else "were"} killed while it was not connected, '
                'though it was not restarted. If its logind kills all that a login leaves '
                '(KillUserProcesses=yes in /etc/systemd/logind.conf), ask for '
                'KillUserProcesses=no; with elogind, loginctl enable-linger is enough')

    def on_absent(self, key):
        """Note that the start of a job never arrived, and never will."""
        self.gone('absent', key)

    # Output and input

    def watch(self):
        """A flow: ask repeatedly for the new output of the jobs, and whether they live."""
        worker = self._worker
        while True:
            yield from await_look(worker, lambda: self._heard + REFRESH_S > time.monotonic())
            fields = []
            for attempt in worker.lives.of(worker, *ALIVE):
                known = [stream.here for stream in attempt.streams.values()]
                if not known or self.is_followed(attempt):
                    known = [BEYOND, BEYOND]        # a follower brings its output
                fields += [attempt.key, *known]
            if fields:
                worker.contact.send('watch', *fields)

    def on_growth(self, key, stream, offset, data):
        """Take new output of a job; offset: that of its first byte in the stream."""
        attempt = self.alive(key)
        if attempt and not self.is_followed(attempt):
            attempt.streams[stream].bring(offset, data)

    def is_followed(self, attempt):
        """Tell whether a follower still brings the output of an attempt."""
        return self._followers.has(attempt)

    def _feed(self, attempt):
        """A flow: pass the input on to the job, and then the end of the input."""
        contact = self._worker.contact
        child = contact.start(contact.connection.copy(contact.alone), ignore)
        child.write(nul_ended(REMOTE_FEED, f'{contact.home}/jobs/{attempt.key}'))
        self._client.processes.pass_on(attempt.how.source, child)
        end = yield child
        if end.status == 255:           # ssh also returns it if a job ended before its input did
            yield ENDING_S
        if attempt.state not in ALIVE or contact.is_gone:
            return
        if end.status == 255:           # any other: the job has read as much as it wanted
            why = complaint_line(end.text) or 'ssh has failed'
            self._worker.report.warning(f'{attempt.name}: its input could not be sent: '
                                        f'{sentence(why)} The job is stopped')
            contact.send('cancel', KILL_GRACE_S, attempt.key)
        else:
            contact.send('eof', attempt.key)

    def terminal(self, attempt):
        """A flow: give a job of mode tty the terminal of this client, until it ends."""
        contact = self._worker.contact
        script = 'terminal' if self._worker.machine.engine else 'tty'
        path = f'{contact.home}/jobs/{attempt.key}.more/{script}'
        yield contact.start(contact.connection.terminal(path), None, terminal=True)

    # The end of a job

    def on_ended(self, key, status, time_cs, cpu_cs, out, err, *back):
        """Note that a job has ended; back: the list of what it left."""
        attempt = self.alive(key)
        if not attempt:
            return      # its end was reported before, or another run has the job
        worker, self._heard = self._worker, time.monotonic()
        worker.gauge.ended(key, cpu_cs)
        # The processor time is unknown if the machine has nothing but the record of the end.
        was_seen = cpu_cs > 0 or time_cs > 0 and key not in self._inherited
        result = attempt.result = JobResult(
            attempt.name, worker.name, status, time_cs / 100, attempt.gpus,
            cpu_cs / 100 if was_seen else None, *attempt.peaks_mb,
            self._client.journal.started(attempt.name))
        attempt.streams['out'].complete(*out)
        attempt.streams['err'].complete(*err)
        # The results are put in place after this, so `ended` always comes before `collected`.
        if attempt.state == 'stopping':
            worker.lives.move(attempt, 'stopped')
        else:
            if key in self._inherited and attempt.how.mode != 'tty' and (
                    status in (129, 143) or KILLED_WITH_GROUP in (err[0] or b'')):
                self._killed.add(key)
            used = {name: getattr(result, name) for name in ('cpu_s', 'peak_memory_mb',
                                                             'peak_gpu_memory_mb')}
            worker.lives.move(attempt, 'ended', exit_code=status, wall_s=result.wall_s,
                              **{name: value for name, value in used.items() if value is not None})
        if self._killed and not any(self.alive(key) for key in self._inherited):
            self._explain_killed()
        worker.collector.add(attempt, list(back))
        self._followers.ended(attempt)

    def on_used(self, key, peak_kb):
        """Note how much memory the processes of a job use; keep the highest value."""
        attempt = self.alive(key)
        if attempt:
            attempt.peaks_mb[0] = max(peak_kb // 1024, attempt.peaks_mb[0] or 0)

    def on_place(self, key, folder):
        """Note the folder that a job runs in."""
        if self.alive(key):
            self.folders[key] = folder

    def on_left(self, key, text):
        """Report processes that keep running though the job that started them is about to end."""
        attempt = self.alive(key)
        if attempt and attempt.state != 'stopping':     # else they are being stopped, too
            self._worker.report.left(self._worker.name, attempt.name, text)

    def on_held(self, key):
        """Note that a job was not started, since another batch took its room first."""
        attempt = self.alive(key)
        if attempt:
            self._worker.lives.move(attempt, 'held')

    def on_refused(self, key, why):
        """Note that the machine could not start a job."""
        self.gone('refused', key, why)

    def on_lost(self, key, why):
        """Note that a job is gone without a result."""
        self.gone('lost', key, why)

    def gone(self, state, key, why=''):
        """Put an attempt into this state, in which it certainly has no result."""
        attempt = self.alive(key)
        if attempt:
            self._worker.collector.forget(key)
            self._worker.lives.move(attempt, state, why)

    # Stopping jobs

    @property
    def is_stopping(self):
        """Tell whether the machine has a request to stop jobs that it has not answered."""
        return self._stops > 0

    def end(self, attempts):
        """Stop these attempts, with all that they started; those not started become `returned`."""
        worker, keys = self._worker, []
        for attempt in attempts:
            if attempt.state == 'placed':
                worker.lives.move(attempt, 'returned', 'interrupted')
            elif worker.state == 'ready':           # else no request can be sent
                keys.append(attempt.key)
                if attempt.state in UNSEEN:
                    worker.lives.move(attempt, 'stopping')
        if keys:
            self._stops += 1
            worker.contact.send('cancel', KILL_GRACE_S, *keys)

    def on_cancelled(self, pids):
        """Note that jobs were stopped; pids: processes of theirs that could not be killed."""
        self._stops = max(self._stops - 1, 0)
        if pids:
            self._worker.report.survivors(self._worker.name, pids)

    @property
    def hears_output(self):
        """Tell whether output of stopped jobs still arrives."""
        return any(map(self.is_followed, self._worker.lives.of(self._worker, 'stopped')))

    def give_up_output(self):
        """Give up the rest of the output of stopped jobs."""
        for attempt in self._worker.lives.of(self._worker, 'stopped'):
            self._followers.stop(attempt)


class Queued:
    """The attempts in the queue of a cluster, and what its engine reports of them.

    refusals: {a need, as cluster_need writes it: why the engine refuses jobs that have it}
    """

    def __init__(self, worker):
        self.refusals = {}
        self.refusal = ''                   # why the engine last took no job
        self.is_full = False                # the reason was that its queue has too many jobs
        self._told = set()                  # the needs and the reasons of refusals so far
        self._worker = worker

    def ask_fits(self):
        """Ask, before the probe, which kinds of waiting jobs the engine would refuse."""
        worker = self._worker
        self.refusals.clear()               # it may accept now what it refused before
        limit_s = worker.run.policy.timeout_s
        kinds = {cluster_need(kind, worker.machine.gpu_types)
                 for kind in worker.run.scheduler.kinds()}
        worker.contact.send('fits', *itertools.chain.from_iterable(
            (kind, '' if limit_s is None else f'{limit_s:.3f}') for kind in sorted(kinds)))

    def on_unfit(self, need, why):
        """Note that the engine refuses jobs with this need."""
        worker, gauge = self._worker, self._worker.gauge
        is_news = not {need, why} & self._told          # also after a reconnection
        if is_news and len(worker.run.workers) > 1:     # others may take the job
            worker.report.warning(f'{worker.name}: refuses jobs: {why}')
        self._told |= {need, why}
        self.refusals[need] = self.refusal = why
        self.is_full = False
        if gauge.capacity and worker.state == 'ready':
            gauge.capacity = gauge.capacity._replace(queue=gauge.capacity.queue._replace(
                refusals=tuple(self.refusals.items())))
            worker.run.machine_changed(worker, 'ready')

    def on_full(self, why):
        """Note that the engine takes no more jobs for now."""
        if self.refusal != why:
            self._worker.report.warning(f'{self._worker.name}: takes no more jobs now: {why}')
        self.refusal, self.is_full = why, True

    def on_queued(self, key, number, why, start):
        """Note that the engine has a job, and does not run it yet."""
        worker, attempt = self._worker, self._worker.jobs.alive(key)
        if not attempt or attempt.state not in ('claimed', 'queued'):
            return
        before = attempt.place or Place('')
        # Without `why` this event answers `start` or `adopt`; an earlier `withdraw` may be lost.
        attempt.place = before._replace(number=number or before.number, why=why or before.why,
                                        start=start, moves_to=before.moves_to if why else None)
        if attempt.state == 'claimed' or attempt.place[:2] != before[:2]:
            worker.lives.move(attempt, 'queued', number=attempt.place.number,
                              why=attempt.place.why, start=start)
        if worker.run.wishes.unwanted(attempt):
            worker.jobs.end([attempt])
        elif worker.run.fleet.standing[worker].is_given_back and attempt.job.may_start and (
                not attempt.place.moves_to):
            self.withdraw(attempt)          # it was being submitted, or there was no contact

    def on_node(self, key, number, node):
        """Note where a job has begun."""
        attempt = self._worker.jobs.alive(key)
        if attempt:
            attempt.place = (attempt.place or Place(''))._replace(number=number, node=node)

    def on_preempted(self, key, why):
        """Note that a job is gone, and that neither the job nor the machine caused this."""
        self._worker.jobs.gone('preempted', key, why)

    def withdraw(self, attempt, machine=None):
        """Ask for an attempt back, unless it has begun meanwhile.  machine: where it is to run"""
        if self._worker.state == 'ready':
            attempt.place = attempt.place._replace(moves_to=machine)
            self._worker.contact.send('withdraw', attempt.key)

    def withdraw_all(self):
        """Ask for all attempts in the queue back, to run them on other machines."""
        for attempt in self._worker.lives.of(self._worker, 'queued'):
            if attempt.job.may_start:
                self.withdraw(attempt)


class Worker:
    """A machine at work for a run: the contact with it, and the jobs on it.

    state: new, connecting, ready, away (contact was lost, and the Worker tries to reconnect),
    closing, closed or failed; `why` has the reason.

    report: called with news: warning(text), sent(name, stage), left(name, job, text), survivors(…)
    run: its owner, which has `lives`, `policy` and `wishes`, and hears machine_changed(worker,
    before); for a cluster, or if its policy wants_others, it is a Run
    """

    def __init__(self, machine, client, number, report):
        self.machine, self.client, self.number, self.report = machine, client, number, report
        self.run = None
        self.state, self.why = 'new', ''
        self.same_as = None                 # the Worker that is used instead of this one
        self.contact = None
        self.gauge, self.queue = Gauge(self), Queued(self)
        self.collector, self.jobs = Collector(self), JobControl(self)
        self._seeking = Seeking(Terms())

    @property
    def name(self):
        """The machine's name."""
        return self.machine.name

    @property
    def lives(self):
        """Return the attempts of the run."""
        return self.run.lives

    @property
    def capacity(self):
        """Return the Capacity at the last look; None if the machine was not asked."""
        return self.gauge.capacity

    @property
    def busy(self):
        """Tell whether the run still waits for an attempt there, or for its results."""
        return self.lives.any_of(self, *AWAITED)

    @property
    def is_stopping(self):
        """Tell whether the machine has a request to stop jobs that it has not answered."""
        return self.jobs.is_stopping

    @property
    def was_ready(self):
        """Tell whether there was contact in this run."""
        return self._seeking.was_ready

    @property
    def retry(self):
        """Return when to try again after a failure: see SSH_COMPLAINTS."""
        return self._seeking.retry

    @property
    def hears_output(self):
        """Tell whether output of stopped jobs still arrives."""
        return self.jobs.hears_output

    @property
    def away_since(self):
        """Return when contact was lost; None if there is contact."""
        return self._seeking.away_since

    # Contact

    def connect(self, want_gpus=True, tied=False, checks=False):
        """Begin to log in; for want_gpus, tied and checks see Terms."""
        self._seeking = Seeking(Terms(want_gpus, tied, checks))
        self._log_in()

    def _log_in(self):
        self.state = 'connecting'
        self._seeking.contacts += 1
        former = self.contact.stages.all if self.contact else ()
        self.contact = Contact(self, self._seeking.contacts, former)
        self.contact.open(self._seeking.terms)

    def reconnect(self):
        """Log in again, after a failed login or a loss of contact."""
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
        """Ask for the machine's resources; the answer makes it ready."""
        self._seeking.asks = True
        if self.machine.engine:
            self.queue.ask_fits()
        self.contact.send('probe')

    def enter(self):
        """Have the machine become ready without a probe: there is no `capacity` then."""
        self._seeking.asks = False
        self.contact.send('enter')

    def unanswered(self, so=''):
        """Return the text to print behind its name: no answer yet, then `so`, then the reason."""
        why = self.contact.hindrance() or (self.why if self._seeking.tries else '')
        return (f'did not answer within {time.monotonic() - self._seeking.began:.0f} s{so}'
                + (f': {why}' if why else ''))

    def contact_lost(self, why, retry):
        """Note that contact is lost.  Attempts not started become `returned`; jobs keep running.

        If there was contact before, the Worker tries to reconnect for the client's away_limit_s.
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
        """Reconnect after a while, unless contact is lost for good; return the next state."""
        # CLOCK_MONOTONIC does not count the time that a laptop sleeps.
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
        """Have the machine tidied up and the contact closed; its jobs keep running."""
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
        """Send the files of these Forwards, if they were not sent."""
        self.contact.stages.prepare(forwards)

    def offer(self, forwards):
        """Send the files already during the login, if they are small enough for the channel."""
        if is_small(*self.client.files.trees(forwards)):
            self.prepare(forwards)

    def start(self, attempt):
        """Start a placed attempt as soon as its files are there."""
        self.jobs.start(attempt)

    def ask(self):
        """Ask about each attempt that may run there."""
        self.jobs.ask()

    def measure(self, within_s=0.0):
        """Ask for the free resources again; the answer is machine_changed."""
        self.gauge.measure(within_s)

    def stop(self):
        """Stop all jobs there."""
        self.jobs.end(self.lives.of(self, 'placed', *ALIVE))

    # Events

    def hear(self, event, values):
        """Act on an event of the remote runner."""
        if self.state == 'closing' and event not in ('finished', 'parted'):
            return          # no request can be sent any more; the next run learns of this
        # Exactly one of these parts has the handler: tests/test_structure.py.
        (handler,) = filter(None, (getattr(part, f'on_{event}', None) for part in (
            self, self.jobs, self.collector, self.gauge, self.queue)))
        handler(*values)

    def on_account(self, which):
        """Note the account of this machine.  If two names are of one account, use one of them.

        Use the first in the user's order, unless the one connected earlier has jobs or is closed.
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
        """Tell whether this run has started a job there, or got news of one."""
        return self._seeking.was_ready and any(
            not attempt.is_inherited or attempt.state not in ('claimed', 'stopping')
            for attempt in self.lives.of(self, *UNCOLLECTED))

    def on_broken(self, why, retry=b'never'):
        """Lose the contact: the remote runner cannot work."""
        self.contact.lose(why, 'later' if retry == b'later' else 'never')

    def on_note(self, text):
        """Print a note of the remote runner."""
        self.report.warning(f'{self.name}: {text}')

    def on_ready(self, home, rsync):
        """Use the machine from now on: all requested facts have arrived."""
        if self.state != 'connecting':
            raise WireError('it reported twice that it is ready')
        if self._seeking.asks:
            self.gauge.understand()
        if self.run.policy.wants_others and not self.was_ready:
            self.contact.send('others', self.client.journal.identity)
        before = 'away' if self.was_ready else 'connecting'
        self.state, self._seeking.was_ready = 'ready', True
        self._seeking.tries, self._seeking.away_since = 0, None
        self.contact.become_ready(home, rsync == b'1')
        if self.client.results:
            self._resume()
        self.run.machine_changed(self, before)
        self.client.starts.soon(self.jobs)

    def _resume(self):
        """Deal with the jobs and results that earlier runs or contacts left on the machine."""
        useless, stray = self.client.journal.remains(self.machine.address)
        self.collector.forget(*useless)     # of runs that were killed before they could tidy up
        if stray:
            self.contact.send('revoke', *stray)
        self.contact.flows.start(self.jobs.watch())
        self.collector.add_kept()
        self.collector.resume()

    def on_staged(self, stage_id):
        """Note that the machine has all files of a stage."""
        self.contact.stages.staged(stage_id)
        self.client.starts.soon(self.jobs)

    def on_stage_failed(self, _stage_id, why):
        """Lose the contact: the machine could not store the files of a stage."""
        self.contact.lose(f'the machine could not store the files: {why}')

    def on_others(self, listed=b''):
        """Show jobs that journals of other job_results claimed."""
        if not self.run.policy.wants_others:
            raise WireError('it reported jobs of others, unasked')
        jobs = listed_jobs(listed)
        if jobs:
            results = self.client.results
            known = results.identities()
            done = {record['key'] for name, record in results.journal.jobs.items()
                    if results.is_done(name)}
            jobs = [job for job in jobs if job.identity not in known and job.key not in done]
        self.run.view.others(self, jobs)

    def on_pong(self, _number):
        """Do nothing: Contact has noted that the machine answers."""

    def on_finished(self):
        """Kill ssh, now that the machine is tidy: a regular logout would take 40 ms."""
        if self.state != 'closing':
            raise WireError('it reported that it has finished, unasked')
        self.contact.lose('')
        if self.client.results:
            with contextlib.suppress(ResultsError):     # then the next run tidies up again
                self.client.journal.tidied(self.machine.address)

    def on_parted(self):
        """Kill ssh: a program that .bashrc started may hold the runner's session open."""
        if self.state == 'closing':
            self.contact.lose('')


def need_of(attempt, machine):
    """Return an attempt's needs in the form of the remote runner: cores, MB, reserve, GPUs."""
    placement = attempt.placement
    if machine.engine:
        return cluster_need(placement.allocation if placement else Allocation(gpus=0),
                            machine.gpu_types)
    if placement is None:
        return '0 0 0'
    wanted = placement.allocation
    gpus = [f'{index}:{wanted.gpu_memory_mb}:{thousandths(wanted.gpu_utilization)}:'
            f'{int(wanted.reserve_gpu)}' for index in placement.gpus]
    return ' '.join([str(thousandths(wanted.cores)), str(wanted.memory_mb),
                     str(int(wanted.reserve)), *gpus])


# The remote runner replaces these by the machine's cores and MB, on a node by the job's GPUs.
ALL_CORES, ALL_MEMORY, ITS_GPUS = '\2', '\3', '\4'


def values_of(attempt):
    """Return {placeholder of `wrap`: text} for an attempt.

    A job that asked for no resources, or for the machine, may use all cores and all memory.
    """
    placement, gpus = attempt.placement, gpus_of(attempt.gpus)
    is_cluster = bool(attempt.machine.machine.engine)
    asked = placement.allocation if placement else Allocation(reserve=not is_cluster, gpus=0)
    if is_cluster:
        gpus = [ITS_GPUS] * min(asked.gpus, 1)
    elif asked.reserve and asked.gpus:
        gpus = [gpu.index for gpu in attempt.machine.capacity.gpus]
    return {'cores': ALL_CORES if asked.reserve else f'{asked.cores:.3f}'.rstrip('0').rstrip('.'),
            'memory_mb': ALL_MEMORY if asked.reserve else str(asked.memory_mb),
            'gpu_ids': ','.join(map(str, gpus)), 'name': attempt.name,
            'gpus': str(asked.gpus if is_cluster else len(gpus))}


def gpu_memory(facts):
    """Return {key of a job: MB that its processes have on GPUs} from the facts of a probe."""
    found = collections.Counter()
    for mb, _, key in itertools.chain.from_iterable(gpu_processes(facts).values()):
        if mb:
            found[key] += mb
    return found


# ---- Visits: into a job while it runs ----

class Ports:
    """Ports of a machine, reached at the loopback address of this computer while a login lasts.

    pairs: (port here, port of the machine) of each
    """

    def __init__(self, pairs, report):
        self.pairs, self._report = pairs, report
        self.are_open = False           # or were before contact was lost

    def check(self, machine):
        """Raise if the machine is a cluster, or if a port here cannot be used."""
        import socket
        if machine.engine and self.pairs:
            here, there = self.pairs[0]
            raise UsageError(f'--forward: {machine.name} is a cluster, and the job runs on one of '
                             'its nodes, which the port would not reach. With the name of the '
                             'node, which $SLURMD_NODENAME has in the job, type: ssh -L '
                             f'{here}:NODE:{there} {machine.host}')
        for here, there in self.pairs if machine.host else ():
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(('127.0.0.1', here))
                except OSError as error:
                    why = ('is in use' if error.errno == errno.EADDRINUSE else
                           f'cannot be used: {reason_of(error)}')
                    other = here + 10000 if here < 50000 else here - 10000
                    raise SchedulerError(sentence(f'--forward: port {here} of this computer {why}')
                                         + f' Try: --forward {other}:{there}') from None

    def open(self, login):
        """A flow: have the ssh of a login (Contact or Visit) forward the ports; print each once."""
        connection = login.connection
        for here, there in self.pairs:
            if connection.machine.host:
                end = yield login.start(connection.forward(here, there), ignore)
                if end.status:
                    self._report.warning(
                        f'port {here} of this computer does not reach port {there} of '
                        f'{connection.machine.name}: {complaint_line(end.text)}')
                    continue
            if not self.are_open:
                self._report.note(f'http://localhost:{here if connection.machine.host else there} '
                                  f'reaches port {there} of {connection.machine.name}')
        self.are_open = True


def read_ports(options):
    """Return the pairs of --forward, for Ports."""
    pairs = []
    for word in dict.fromkeys(options['--forward'] or ()):     # docopt may give the last one twice
        match = re.fullmatch(r'([0-9]{1,5})(?::([0-9]{1,5}))?', word)
        here, there = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not (0 < here < 65536 and 0 < there < 65536):
            raise UsageError('--forward must be a port, or one here and one of the machine, such '
                             f'as 6006 or 8888:6006, not {word!r}.')
        if here in dict(pairs):
            raise UsageError(f'--forward names port {here} twice.')
        pairs.append((here, there))
    return pairs


NO_VISIT = {
    'absent': 'has not begun on {at}. Its client may be about to start it: try again in a moment. '
              'If no client runs, type the command again that was to start it',
    'begins': 'is about to begin on {at}: try again in a moment',
    'queues': 'waits in the queue of {at}: try again when it runs',
    'ended': 'has ended on {at}. The client that runs fetches its results; if none runs, type the '
             'command again that started it',
    'lost': 'does not run on {at} any more: the machine was restarted, or the job was killed. Its '
            'client finds that out; if none runs, type the command again that started it',
    'closed': 'runs on {at}, but its environment cannot be read there: does it run as another '
              'user?',
    'full': 'runs on {at}, but there is no room for the files of a shell, in /dev/shm or /tmp',
}


def visit_for(engine):
    """Return the script that opens a shell beside a job; engine: that of a cluster, or ''."""
    functions = runner_for(engine).removesuffix(REMOTE_CALL)
    if not engine:
        return functions + REMOTE_VISIT + REMOTE_VISIT_CALL
    return functions + REMOTE_VISIT + REMOTE_CLUSTER_VISIT + REMOTE_VISIT_CALL


HINTS = 3                   # times that a shell gets SIGHUP before it is killed


class Visit:
    """A separate login to a machine where a job runs, for a shell beside the job and for ports.

    It needs no client, and does not disturb one that runs.  The remote runner knows the processes
    of a job by marks and open files; the processes of a Visit have neither.
    """

    def __init__(self, machine, name, key, client):
        self.connection = Connection(machine, client.run_folder, 'visit')
        self._machine, self._client = machine, client
        self._name, self._key = name, key
        self._token = os.urandom(16).hex()
        self._head, self._said = AfterToken(self._token), b''
        self._process = self._shell = None
        self._end = None                # (exit status, stderr) of the login, once it has ended
        self._path = None               # of the script there that becomes the shell
        self._told = 0                  # the signal on which the shell was sent SIGHUP

    def start(self, argv, on_output):
        """Start a process, for a flow to yield."""
        return self._client.processes.start(argv, on_output, None)

    def open(self):
        """Log in and find the job; raise if the shell cannot be opened."""
        machine, processes = self._machine, self._client.processes
        if machine.host:
            write_configurations(self.connection)
        self._process = processes.start(
            self.connection.channel(), self._receive, self._ended, keep_stdin=True,
            cwd=None if machine.host else os.path.expanduser('~'))
        script = visit_for(machine.engine).encode()
        self._process.write(nul_ended(REMOTE_LOADER, len(script)) + script + nul_ended(
            self._token, machine.workdir, self._client.project, self._key))
        until = time.monotonic() + CONNECT_LIMIT_S
        while b'\n' not in self._said:
            if self._end or time.monotonic() > until:
                raise Unreachable(sentence(f'{machine.name} cannot be used: {self._why()}'))
            processes.wait(TICK_S)
        word, _, path = os.fsdecode(self._said).partition('\n')[0].partition(' ')
        if word in NO_VISIT:
            why = NO_VISIT[word].format(at=machine.name)
            raise ResultsError(sentence(f'{self._name} {why}'))
        # The path passes through a login shell, so it must be plain.
        if word != 'open' or not re.fullmatch(r'/[\w./-]+', path):
            raise Unreachable(f'{machine.name} sent something that cannot be understood.')
        self._path = path

    def run(self, ports):
        """Give this program's streams to the shell until it ends; return its exit status."""
        self._client.flows.start(ports.open(self))
        self._client.wait_while(lambda: not ports.are_open, time.monotonic() + CONNECT_LIMIT_S)
        status = self._run()
        if status == 255 and self._is_unused():         # MaxSessions of its sshd is 1
            status = self._run(alone=True)
        if self._told:                  # ssh returns 255 then
            return 128 + self._told
        if status == 255 and self._end:         # it is the status of ssh, not of the shell
            raise Unreachable(f'{self._machine.name}: connection lost: {sentence(self._why())} '
                              f'{self._name} keeps running.')
        return status if status >= 0 else 128 - status

    def _run(self, alone=False):
        """Give the shell the streams once; return the exit status, negative for a signal."""
        processes, ended = self._client.processes, []
        self._shell = processes.start(
            self.connection.shell(self._path, os.isatty(0), alone), None,
            lambda status, _: ended.append(status), terminal=True)
        # The shell has no pipes, so only SIGCHLD shows that it has ended.
        before = signal.signal(signal.SIGCHLD, lambda *_: processes.wake())
        hints = 0
        try:
            while not ended:
                processes.wait(TICK_S)
                if self._told and not ended:    # bash may miss a signal when it starts to read
                    hints += 1
                    self._shell.popen.send_signal(signal.SIGHUP if hints < HINTS else
                                                  signal.SIGKILL)
        finally:
            signal.signal(signal.SIGCHLD, before)
        return ended[0]

    def _is_unused(self):
        """Tell whether the machine reports that the shell never began; False without an answer."""
        self._said = b''
        self._process.write(b'\n')
        self._client.wait_while(lambda: not (self._end or b'\n' in self._said),
                                time.monotonic() + CONNECT_LIMIT_S)
        return self._said.startswith(b'unused')

    def interrupt(self, number, _frame):
        """Stop the shell on SIGTERM, and on Ctrl-C unless the shell has the terminal."""
        if self._shell and (number == signal.SIGTERM or not os.isatty(0)):
            self._told = number
            self._shell.popen.send_signal(signal.SIGHUP)    # a bash at a terminal ignores SIGTERM

    def close(self):
        """Have the machine remove the files of the shell, and log out."""
        if self._process:
            self._process.close_stdin()
            self._client.wait_while(lambda: not self._end, time.monotonic() + TICK_S)

    def _why(self):
        """Return why there is no contact."""
        if not self._end:
            return f'no answer within {CONNECT_LIMIT_S:.0f} s'
        status, complaint = self._end
        text = complaint.decode('utf-8', 'replace')
        if self._head.found:
            return complaint_line(text, -1) or 'the connection broke'
        return explain_login(self._machine, status, self._head.head.decode('utf-8', 'replace'),
                             text)[0]

    def _receive(self, data):
        self._said = (self._said + self._head.receive(data))[:4096]

    def _ended(self, *end):
        self._end = end


MOST_PARTS = 10_000         # files and folders of a machine: more would block this client


class SyncBack:
    """Fetches some paths of all running jobs at intervals (--sync-back): one rsync a machine.

    Results go first: when a job ends, the rsync of its machine is killed, and none begins while
    results are on their way.  The next rsync brings the rest of a file.  rsync writes in place:
    TensorBoard keeps its files open, and never looks for a newer file of the same name.
    """

    def __init__(self, paths, every_s, client, report):
        self._paths, self._every_s = paths, every_s
        self._client, self._report = client, report
        self._rsyncs = {}               # Worker -> Process
        self._said = set()              # texts or topics of warnings: each is printed once
        self._busy = set()              # Workers from which something is fetched
        self._refused = set()           # Workers from which no more is fetched

    def begin(self, view):
        """Begin to fetch, with the batch."""
        self._client.flows.start(self._keep(view.run))

    def changed(self, attempt, _before):
        """Kill the rsync when a job ends; remove partial files of the job that are obsolete."""
        worker = attempt.machine
        if attempt.state in ('ended', 'stopped') and worker in self._rsyncs:
            self._rsyncs[worker].kill()
        if attempt.state not in HOLDING:
            worker.jobs.folders.pop(attempt.key, None)
        if attempt.state in (*FORGOTTEN, 'cancelled', 'dropped'):
            self._client.results.partials.remove(attempt.name)

    def lost(self, attempt):
        """Do nothing for a job that is gone without a result, and is not started again."""

    def _keep(self, run):
        """A flow: at each interval fetch the paths from all machines."""
        while True:
            yield self._every_s
            for worker in run.workers:
                if worker.state == 'ready' and worker not in self._busy | self._refused:
                    worker.contact.flows.start(self._serve(worker))

    def _serve(self, worker):
        """A flow: ask where new jobs run, wait for results on their way, then fetch the paths."""
        self._busy.add(worker)
        try:
            unknown = [one.key for one in worker.lives.of(worker, 'running')
                       if one.key not in worker.jobs.folders]
            if unknown:
                worker.contact.send('where', *unknown)
                yield TICK_S
            while worker.lives.any_of(worker, *ARRIVING):
                yield TICK_S
            yield from self._fetch(worker)
        finally:
            self._busy.discard(worker)

    def _fetch(self, worker):
        folders, running = worker.jobs.folders, worker.lives.of(worker, 'running')
        attempts = {folders[one.key]: one for one in running if one.key in folders}
        landing = ''
        try:
            if not (attempts and worker.state == 'ready' and self._is_possible(worker)):
                return
            landing = self._client.results.partials.landing(
                worker.number, {folder: one.name for folder, one in attempts.items()})
            end = yield from self._copy(worker, landing, attempts)
            self._explain(worker, end)
            self._show(worker, landing, attempts)
        except OSError as error:
            self._warn(f'{worker.name}: the files of --sync-back could not be stored here: '
                       f'{sentence(reason_of(error))}')
        finally:
            if landing:
                remove_tree(landing)

    def _is_possible(self, worker):
        """Tell whether files can be fetched; warn once why not."""
        if not worker.contact.rsync_works:
            self._warn(f'{worker.name}: rsync cannot be used with it, so --sync-back fetches '
                       'nothing while its jobs run')
        elif free_bytes(self._client.results.folder) <= SPARE_BYTES:
            self._warn(f'less than {size_of(SPARE_BYTES)} are free here, which results may need: '
                       '--sync-back fetches nothing')
        else:
            return True
        return False

    def _copy(self, worker, landing, attempts):
        """A flow: have rsync fill the folder `landing`; return its End."""
        contact, limit = worker.contact, self._client.max_result_bytes
        options = ['-r', '--inplace', '--delete', '--delete-missing-args', '--chmod=Du+rwx,Fu+rw',
                   *([] if limit is None else [f'--max-size={limit}'])]
        argv = contact.connection.rsync(options, f'{contact.home}/jobs/', f'{landing}/', 'source',
                                        contact.alone)
        names = (f'./{folder}/{path}' for folder in attempts for path in self._paths)
        child = self._rsyncs[worker] = contact.start(
            argv, ignore, feed=iter([b''.join(os.fsencode(name) + b'\0' for name in names)]),
            deadline_s=COPY_LIMIT_S, env=self._client.rsync_env(), confined=confine(landing))
        contact.flows.start(self._guard(worker, child))
        try:
            return (yield child)
        finally:
            del self._rsyncs[worker]

    def _guard(self, worker, child):
        """A flow: kill an rsync when the disk gets full."""
        while child.popen.poll() is None:
            yield GUARD_S
            with contextlib.suppress(FileNotFoundError):    # somebody removed the folder
                if not self._is_possible(worker):
                    child.kill()

    def _explain(self, worker, end):
        """Warn once of why an rsync failed, unless it was killed here."""
        if session_refused(end.text):
            worker.contact.alone = True
        elif end.status not in (0, 23, 24) and end.status > 0:
            self._warn(f'{worker.name}: the files of --sync-back could not be fetched: '
                       f'{sentence(complaint_line(end.text) or str(end.status))}',
                       (worker, end.status))

    def _show(self, worker, landing, attempts):
        """Show the files that arrived in job_results, except those that must not be there."""
        if sum(1 for _ in itertools.islice(parts_of(landing), MOST_PARTS + 1)) > MOST_PARTS:
            self._refused.add(worker)
            self._warn(f'{worker.name}: the paths of --sync-back have more than {MOST_PARTS:,} '
                       'files there, so no more of them is fetched while jobs run')
            return
        odd = []
        for name in os.listdir(landing):
            path = os.path.join(landing, name)
            if os.path.islink(path) or name not in attempts:
                odd.append(printable(name))
            elif os.path.isdir(path) and attempts[name].state == 'running':
                self._put(worker, attempts[name], path)
        if odd:
            self._warn(f'{worker.name}: {names_of(odd)} was not requested, or is a link in the '
                       'place of a folder, and was left out', (worker, 'odd'))

    def _put(self, worker, attempt, path):
        """Show the files of one job that arrived."""
        refused = collections.defaultdict(list)
        for inner, why in vet(path, (), whole=self._paths):
            refused[why.partition(',')[0]].append(printable(inner))     # without where it leads
        for why, paths in sorted(refused.items()):
            self._warn(f'{attempt.name}: {names_of(paths)} from {worker.name} {why}, and was left '
                       'out', (attempt.name, why))
        target = self._client.results.partials.open(attempt.name)
        if target:
            mirror(path, target)
        else:
            self._warn(f'job_results/{attempt.name}.partial is not of this run: move it away, so '
                       f'that --sync-back can show {attempt.name}')

    def _warn(self, text, about=None):
        """Warn once of each topic: a machine could vary the text each time."""
        if (about or text) not in self._said:
            self._said.add(about or text)
            self._report.warning(text)


def parts_of(folder):
    """Yield the paths of all files and folders below a folder."""
    for parent, folders, files in os.walk(folder):
        yield from (os.path.join(parent, name) for name in folders + files)


def read_sync_back(options, client, report):
    """Return (the SyncBack that the options ask for,), or ()."""
    paths = options['--sync-back']
    if paths is None:
        if '--every' in options.given:
            raise UsageError('--every can only be given with --sync-back.')
        return ()
    if not paths:
        raise UsageError('--sync-back needs a path.')
    patterns = [path for path in paths if set('*?[') & set(path)]
    if patterns:
        raise UsageError(f'--sync-back takes files and folders, not patterns such as '
                         f'{patterns[0]}.')
    if not LINUX:                       # see Collector._fetch
        raise UsageError('--sync-back works on Linux only.')
    if not is_program('rsync'):
        raise SchedulerError('--sync-back needs rsync, which is missing here. Try: apt install '
                             'rsync')
    every_s = options.seconds('--every', least=1)
    return (SyncBack(inside_paths(paths, '--sync-back'), every_s, client, report),)


# ---- As a library: a machine for a program of your own ----

class MachineRunner:
    """One machine and what runs there.

    machine_info    a Machine, from find_machine('lab1.yaml')
    queue_up(command, forward_loc, backward_loc, job_name, …)   start it as soon as possible
    register_started(callback(job_name))    it runs
    register_ended(callback(job_name))      it ended, and `ended[job_name]` is its JobResult

    Further signals: register(event, callback), with the events of SIGNALS.

    It does not wait by itself: to get events, call its wait(), or Processes.wait of its session.
    spacing_s is the least time between two starts, in seconds.  The default is 0, since a start
    over the channel is no login.

        with MachineRunner(find_machine('lab1')) as runner:
            runner.register_ended(lambda name: print(name, runner.ended[name].exit_code))
            runner.queue_up('python train.py', ['train.py'], ['model'], 'first')
            runner.wait()
    """

    SIGNALS = {                         # event -> the arguments of its callbacks
        'ready': (), 'measured': (),                    # there is, or may be, a new `capacity`
        'away': ('reason',),                            # contact was lost; it will reconnect
        'failed': ('reason',),
        'started': ('job_name',), 'ended': ('job_name',),
        'collected': ('job_name',),                     # its results are in place here
        'uncollected': ('job_name',),                   # they could not be fetched
        'returned': ('job_name', 'reason'),             # it was not started
        'held': ('job_name',),                          # another batch took its room first
        'lost': ('job_name', 'reason'),                 # it is gone without a result
        'absent': ('job_name',),                        # its start never arrived
        'left': ('job_name', 'text'),                   # its processes run after its end
        'survivors': ('text',),                         # processes that could not be killed
        'sent': ('stage',), 'warning': ('text',),
    }
    EVENT_OF = {'running': 'started', 'ended': 'ended', 'collected': 'collected',
                'kept': 'uncollected', 'returned': 'returned', 'refused': 'returned',
                'held': 'held', 'lost': 'lost', 'absent': 'absent'}     # by the state in LIFE
    policy, wishes = Policy(), Wishes(None)         # as a Run has them

    def __init__(self, machine_info, session=None, number=0, spacing_s=0.0):
        if machine_info.engine:
            raise SchedulerError(f'{machine_info.name} is a cluster, and a MachineRunner places '
                                 'jobs itself. Use execute_batch or execute_remote.')
        self.machine = machine_info
        self.ended = {}                     # job name -> JobResult
        self.session = session or Client(open_own(ResultStore('job_results')), live=False)
        self.lives = Lives(self.session.journal, self._changed)
        self._worker = Worker(machine_info, self.session, number, self)
        self._worker.run = self
        self._owns_session = session is None
        self._callbacks = {event: [] for event in self.SIGNALS}
        self._spacing_s, self._next_start = spacing_s, 0.0
        self._queue = collections.deque()   # Attempts that the Worker does not have yet
        self._unheard = set()               # keys of attempts that ended before their sink had all

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
        """Signal that an attempt is in another state."""
        if before in ('stopping', 'stopped'):
            return
        if attempt.state == 'ended':
            self.ended[attempt.name] = attempt.result
            if attempt.how.show and not attempt.is_heard:
                self._unheard.add(attempt.key)      # its sink gets the rest when it is collected
                return
        elif attempt.key in self._unheard:
            self._unheard.remove(attempt.key)
            self._signal('ended', attempt.name)
        event = self.EVENT_OF.get(attempt.state)
        if event:
            self._signal(event, *(attempt.name, attempt.why)[:len(self.SIGNALS[event])])

    def machine_changed(self, worker, before):
        """Signal the machine's state."""
        event = 'measured' if before == worker.state == 'ready' else worker.state
        self._signal(event, *(worker.why,)[:len(self.SIGNALS[event])])
        if worker.state == 'ready':
            self._start_next()

    def warning(self, text):
        """Signal a warning."""
        self._signal('warning', text)

    def sent(self, _name, stage):
        """Signal that files were sent."""
        self._signal('sent', stage)

    def left(self, _name, job_name, text):
        """Signal which processes outlive their job."""
        self._signal('left', job_name, text)

    def survivors(self, _name, pids):
        """Signal which processes could not be killed."""
        self._signal('survivors', pids)

    # The machine

    @property
    def name(self):
        """The machine's name."""
        return self.machine.name

    @property
    def state(self):
        """Return the state of the machine, one of those of Worker."""
        return self._worker.state

    @property
    def reason(self):
        """Return why it failed."""
        return self._worker.why

    @property
    def capacity(self):
        """Return the Capacity that it had at the last look."""
        return self._worker.capacity

    def connect(self, want_gpus=True):
        """Begin to log in."""
        self._worker.connect(want_gpus)
        self._start_next()

    def probe(self):
        """Ask for the machine's resources; the answer makes it ready."""
        self._worker.probe()

    def measure(self, within_s=0.0):
        """Ask for the free resources again, within this many seconds; measured() is the answer."""
        self._worker.measure(within_s)

    def close(self):
        """Have the machine tidied up and the connection closed; its jobs keep running."""
        self._worker.close()

    # Jobs

    @property
    def running(self):
        """Return the names of the jobs that were started there and have not ended."""
        return [attempt.name for attempt in self.lives.of(self._worker, *ALIVE)]

    @property
    def unfinished(self):
        """Return the names of the jobs that run there, or ran there and are not collected."""
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
        """Stop all jobs there, with all that they started; signal `returned` for those not started.

        Without contact, jobs that run are not stopped.  The partial results of stopped jobs are set
        aside.  The end of a stopped job is no signal; a process that could not be killed is one:
        survivors(text).
        """
        self._worker.stop()

    def queue_up(self, command, forward_loc=(), backward_loc=None, job_name=None, *, link_loc=(),
                 exclude=(), gpus=None, placement=None, sink=None, keep=True, mode='',
                 source=None, timeout_s=None):
        """Start the bash command there as soon as its files have arrived.

        forward_loc, link_loc  paths here, to copy or to link into the job's folder
        backward_loc           paths or patterns in its folder to fetch; None: what it made or
                               changed
        job_name               the stem of its results' names; each name once in a job_results
        gpus                   the value of CUDA_VISIBLE_DEVICES, or None to leave it unset
        placement              its Placement by MachineResources: other batches then respect it
        sink                   called with ('out' or 'err', bytes) as output arrives, from byte 0 on
        keep                   put its streams into job_results, even though they have a sink
        mode                   'stdin': its input comes from the file descriptor `source`, else it
                               has none
        timeout_s              stop it after this many seconds, with exit status 124
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
        """Pass queued jobs on to the Worker, with time between them."""
        now = time.monotonic()
        while self._queue and self._may_start(now):
            attempt = self._queue.popleft()
            if attempt.state == 'placed':   # else it was returned
                self._next_start = now + self._spacing_s
                self._worker.start(attempt)
        if self._queue and self._spacing_s and self.state == 'ready':
            self.session.processes.call_later(self._next_start - now, self._start_next)

    def _may_start(self, now):
        """Tell whether the next job may be passed on at this time (monotonic)."""
        if not self._spacing_s:
            return self.state != 'new'
        return self.state == 'ready' and now >= self._next_start


# ---- Requests: what other commands ask of the client that runs a batch ----

REQUEST_S = 0.25                    # between two looks for requests
ANSWER_LIMIT_S = 30.0               # a client silent for longer is suspended, or its disk hangs
LARGEST_REQUEST = 64 * 2**20        # bytes; some have the text of a batch file
OLD_ANSWER_S = 3600.0               # nobody reads an answer that is older
REQUEST_NAME = re.compile(r'([0-9]{20}-[0-9]+)\.(request|taken)')
# Action -> {field: its type}; a list is of strings.
REQUESTS = {'cancel': {'jobs': list}, 'rerun': {'jobs': list}, 'rerun failed': {},
            'change': {'argv': list, 'text': str},
            'give back': {'machines': list, 'now': bool}, 'let go': {}}
RERUNS = {'--rerun', '--rerun-failed'}
FOLLOWED = ' is followed'           # after a job's name: the run in the lock of its follower


# If a command is typed again while the batch runs, these options may differ.
CHANGEABLE = {'--machines', *option_kinds(HARDWARE_OPTIONS), *option_kinds(FILE_OPTIONS),
              '--verbose'}


class Answer(NamedTuple):
    """What a client did about a request, or why not."""
    lines: tuple = ()
    error: str = ''
    status: int = 0                 # the exit status of the command that asked


ACTED_UNANSWERED = Answer(error='the client acted on this, and was killed before it could answer. '
                                'Look at the state of the jobs with --status.', status=1)


class Inbox:
    """The folder inbox/ of a job_results: requests by other commands to the client with its lock.

    ID.request    a JSON object: {"batch": "b.sh", "action": "cancel", "jobs": ["57"]}
    ID.taken      the same, once the client acts on it
    ID.answer     {"lines": [a sentence, …], "error": "", "status": 0}

    Each file is written under another name and renamed, so nobody reads a part of one.  IDs sort
    by time.  The command that asks waits for the answer.  If the client ends before it acts, the
    command removes the request and acts alone.  If both were killed, the next client acts on the
    request.  An id is in the journal before its answer, so no client acts twice on a request.
    """

    def __init__(self, results, batch):
        self.folder = os.path.join(results.inner, 'inbox')
        self._results, self._batch = results, batch
        self._strange = set()           # ids of requests that are not for this client to read

    # The command that asks

    def ask(self, action, **facts):
        """Return the Answer of the client; None if no client runs the batch, or it ended first.

        Raises ResultsError if the client does not answer in time.
        """
        number = f'{time.time_ns():020}-{os.getpid()}'
        holder = self._results.lock.holder
        if not (holder and holder.lives and holder.run == self._batch):
            return None
        self._put(f'{number}.request', {'batch': self._batch, 'action': action, **facts})
        try:
            return self._await(number, holder)
        except KeyboardInterrupt:
            self._take_back(number)
            raise

    def _await(self, number, holder):
        until, look_at = time.monotonic() + ANSWER_LIMIT_S, 0.0
        while True:
            answer = self._read_answer(number)
            if answer:
                return answer
            if time.monotonic() > look_at:
                look_at = time.monotonic() + REQUEST_S
                now = self._results.lock.holder
                if not now or now.lives is False or now.run != holder.run:
                    return self._read_answer(number) or self._after_the_end(number)
            if time.monotonic() > until and self._take_back(number):
                raise ResultsError(
                    f'process {holder.pid} on {printable(holder.computer)} runs '
                    f'{printable(holder.run)}, and has not answered for {ANSWER_LIMIT_S:.0f} s, so '
                    'the request was withdrawn. Was it stopped with Ctrl-Z? Try: kill -CONT '
                    f'{holder.pid}')
            time.sleep(0.02)

    def _after_the_end(self, number):
        """Return an Answer if the client acted before it ended; None if it did not."""
        if not self._take_back(number) and self._take_back(number, 'taken'):
            with contextlib.suppress(ResultsError):
                if number in ResultStore(self._results.folder).peek().journal.answered:
                    return ACTED_UNANSWERED
        return None

    def _take_back(self, number, end='request'):
        """Remove a request; return False if it is gone: then the client acts on it."""
        try:
            os.unlink(os.path.join(self.folder, f'{number}.{end}'))
        except FileNotFoundError:
            return False
        return True

    def _read_answer(self, number):
        path = os.path.join(self.folder, f'{number}.answer')
        try:
            with open(path, encoding='utf-8') as file:
                answer = Answer(**json.load(file))
        except FileNotFoundError:
            return None
        os.unlink(path)
        return answer

    def _put(self, name, content):
        path = os.path.join(self.folder, name)
        try:
            os.makedirs(self.folder, 0o700, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(f'{path}.new', flags, 0o600), 'w', encoding='utf-8') as file:
                json.dump(content, file)
            os.rename(f'{path}.new', path)
        except OSError as error:
            raise ResultsError(f'{path} cannot be written: {reason_of(error)}.') from None

    # The client

    def requests(self):
        """Yield (id, the request as a dict, or a sentence on why it cannot be read)."""
        try:
            names = sorted(os.listdir(self.folder))
        except OSError:                 # nobody has asked anything yet
            return
        for name in names:
            match = REQUEST_NAME.fullmatch(name)
            if match and match[1] not in self._strange:
                request = self._read(os.path.join(self.folder, name))
                if request is None:
                    self._strange.add(match[1])
                elif self._take(match[1], name):
                    yield match[1], request

    def _read(self, path):
        """Return a request, or why it cannot be read; None if it is not for this client."""
        try:
            info = os.lstat(path)
            if info.st_uid != os.stat(self._results.folder).st_uid:
                return None
            if not stat.S_ISREG(info.st_mode):
                return f'{path} is not a file'
            if info.st_size > LARGEST_REQUEST:
                return f'{path} is larger than {size_of(LARGEST_REQUEST)}'
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), 'rb') as file:
                request = json.loads(file.read())
        except FileNotFoundError:       # it was taken back
            return None
        except OSError as error:
            return f'{path} cannot be read: {reason_of(error)}'
        except (ValueError, RecursionError):
            return f'{path} is not JSON'
        if not is_request(request):
            return f'{path} is not a request that this version knows'
        return request if request['batch'] == self._batch else None

    def _take(self, number, name):
        """Take a request for this client; return False if its sender has taken it back."""
        try:
            os.rename(os.path.join(self.folder, name), os.path.join(self.folder, f'{number}.taken'))
        except FileNotFoundError:
            return False
        return True

    def answer(self, number, answer):
        """Answer a request and remove it; return the error if that cannot be done."""
        if number not in self._results.journal.answered:
            self._results.journal.write(event='answered', id=number)
        try:
            self._put(f'{number}.answer', answer._asdict())
            os.unlink(os.path.join(self.folder, f'{number}.taken'))
        except (ResultsError, OSError) as error:
            self._strange.add(number)   # else it would be answered again and again
            return str(error)
        return ''

    def tidy(self):
        """Remove old answers that nobody reads, since the command that asked was killed."""
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(self.folder)):
                if entry.name.endswith(('.answer', '.new')) and (
                        entry.stat(follow_symlinks=False).st_mtime < time.time() - OLD_ANSWER_S):
                    os.unlink(entry.path)


def is_request(request):
    """Tell whether this is a known request with all of its fields."""
    if not isinstance(request, dict) or not all(
            isinstance(request.get(name), str) for name in ('batch', 'action')):
        return False
    fields = REQUESTS.get(request['action'])
    return fields is not None and request.keys() == {'batch', 'action', *fields} and all(
        isinstance(request[name], kind) and (
            kind is not list or all(isinstance(word, str) for word in request[name]))
        for name, kind in fields.items())


def workers_for(machines, client, reporter, first=0):
    """Return a Worker for each Machine; first: the number of the first one in the user's order."""
    return [Worker(machine, client, number, reporter)
            for number, machine in enumerate(machines, first)]


class Editions:
    """Gives lines that are added to a running batch the files of that moment.

    batch_file: its path; a change of this file changes nothing for the jobs
    """

    def __init__(self, files, batch_file):
        self._files, self._batch_file = files, os.path.normpath(batch_file)
        self._newest = {}               # Forwards -> the same, with the edition sent last
        self._count = 0

    def of_now(self, jobs):
        """Return (the Jobs, which get the files as they are now; sentences to print about that)."""
        files, later, changed = self._files, {}, set()
        for forwards in {job.forwards for job in jobs}:
            before = self._newest.get(forwards._replace(edition=0), forwards)
            self._count += 1
            after = forwards._replace(edition=self._count)
            paths = {*files.manifest(after).changed(files.manifest(before))} - {self._batch_file}
            if not paths:               # the files need not be sent again
                files.forget(after)
                after = before
            changed |= paths
            later[forwards] = self._newest[forwards._replace(edition=0)] = after
        notes = [f'{"it gets" if len(jobs) == 1 else "they get"} the current files; changed since '
                 f'the batch began: {names_of(sorted(map(printable, changed)))}'
                 ] if changed else []
        return [job._replace(forwards=later[job.forwards]) for job in jobs], notes


def workers_in_use(run):
    """Return the Workers of a Run that were not given back."""
    return [worker for worker in run.workers if not run.fleet.standing[worker].is_given_back]


def changed_machines(run, machines):
    """Return the names of those Machines that the Run uses with other settings."""
    used = {worker.name: worker.machine for worker in workers_in_use(run)
            if worker.state != 'failed'}
    return [machine.name for machine in machines if machine.name in used
            and machine._replace(word='') != used[machine.name]._replace(word='')]


def options_that_stay(options, former, waits):
    """Yield a sentence for the options that change nothing in a batch that runs.

    former: the options that it began with; waits: how many of its lines wait
    """
    other = {name for name in options.given | former.given if options[name] != former[name]}
    fixed = sorted(other - CHANGEABLE - RERUNS)
    if fixed:
        yield f'these options stay as they were when the batch began: {", ".join(fixed)}'
    late = sorted(other & CHANGEABLE - {'--machines', '--verbose'})
    if late and not waits:
        yield f'no line waits, so these options change nothing: {", ".join(late)}'


class Desk:
    """Acts on the requests of an Inbox, for a Run.

    options: those of the command that began the batch
    """

    def __init__(self, run, options, inbox, reporter):
        self._run, self._options = run, options
        self._inbox, self._report = inbox, reporter
        self._editions = Editions(run.client.files, options['<batch>'])
        self._trouble = ''              # why only a part of a request was done
        self._is_open = True

    @property
    def _results(self):
        return self._run.client.results

    def _is_old(self, number):
        """Tell whether a request was in the inbox when this client began."""
        return number in self._results.lock.asked_before

    def open(self, is_dry=False):
        """Act on requests that a killed client left; from now on, act on new ones."""
        if not is_dry:
            self._inbox.tidy()
            self.look()

    def look(self):
        """Act on all requests in the inbox, and look again after a while."""
        if not self._is_open or self._run.interrupts:
            return
        for number, request in self._inbox.requests():
            answer = self._act(number, request)
            trouble = self._inbox.answer(number, answer)
            if trouble:
                self._report.note(f'a request was carried out, but cannot be answered: {trouble}')
            when = f', asked at {clock_of(int(number[:20]) / 1e9, time.time())}' if (
                self._is_old(number)) else ''
            self._tell(f'asked by another command{when}', answer)
        self._run.client.processes.call_later(REQUEST_S, self.look)

    def close(self):
        """Stop acting on requests."""
        self._is_open = False

    def _tell(self, head, answer):
        lines = answer.lines if len(answer.lines) < 6 else (
            *answer.lines[:3], f'and {len(answer.lines) - 3} more')
        for line in (*lines, *[answer.error] * bool(answer.error)):
            self._report.note(f'{head}: {printable(line)}')

    def _act(self, number, request):
        if isinstance(request, str):
            return Answer(error=sentence(request), status=2)
        if number in self._results.journal.answered:
            return ACTED_UNANSWERED
        if request['action'] in ('change', 'give back') and self._is_old(number):
            return Answer(error='this command was typed later, so the earlier one is ignored.',
                          status=1)
        action = {'cancel': self._cancel, 'rerun': self._rerun, 'rerun failed': self._rerun_failed,
                  'change': self._change, 'give back': self._give_back,
                  'let go': tuple}[request['action']]
        try:
            self._trouble = ''
            lines = tuple(action(**{name: request[name] for name in REQUESTS[request['action']]}))
            return Answer(lines, self._trouble, int(bool(self._trouble)))
        except SchedulerError as error:
            return Answer(error=str(error), status=error.exit_code)
        except HelpAsked:
            return Answer(error='it asks for help only.', status=2)

    # Where a job is

    def _places(self):
        """Return {name of a job: (word, name of its machine)}; words: waiting, running, away,
        stopping, fetching, kept, or elsewhere: an earlier run began it on a machine not in use.
        """
        run = self._run
        places = {job.name: ('waiting', '') for jobs in run.scheduler.kinds().values()
                  for job in jobs}
        for word, states in (('waiting', ('placed',)), ('running', UNSEEN),
                             ('stopping', ('stopping', 'stopped')),
                             ('fetching', ('ended', 'incomplete')), ('kept', ('kept',))):
            for attempt in run.lives.all_of(*states):
                is_away = word == 'running' and attempt.machine.state != 'ready'
                # An earlier run may have noted the end of the job without fetching its results.
                has_ended = self._results.journal.record(attempt.name).get('state') == 'ended'
                places[attempt.name] = ('fetching' if has_ended else 'away' if is_away else word,
                                        attempt.machine.name)
        return {**{name: ('elsewhere', there.word)
                   for name, there in run.view.plan.elsewhere.items()}, **places}

    # The actions

    def _cancel(self, jobs):
        """Cancel these jobs."""
        run, places = self._run, self._places()
        notes = []
        names = jobs_named(jobs, run.jobs, self._options['<batch>'], notes.append)
        yield from notes
        for name in names:
            word, machine = places.get(name, ('', ''))
            before = name in run.wishes.cancelled
            yield f'{name}: ' + {
                'waiting': 'cancelled; it had not started',
                'running': f'is being stopped on {machine}',
                'stopping': f'is being stopped on {machine}',
                'away': f'is stopped when {machine} is connected again',
                'elsewhere': f'may run on {machine}, and is stopped by the next run that uses it',
            }.get(word, 'was cancelled before' if before else 'has ended')
        run.wishes.cancel({name for name in names if places.get(name, ('fetching',))[0] not in (
            'fetching', 'kept')})

    def _rerun(self, jobs):
        """Run these jobs once more."""
        run, places, on_lines = self._run, self._places(), []
        names = jobs_named(jobs, run.jobs, self._options['<batch>'], on_lines.append)
        for name in names:
            word, machine = places.get(name, ('', ''))
            if word in ('running', 'away', 'stopping', 'elsewhere'):
                cancel = typed_for(self._options['<batch>'], '--cancel', name)
                raise UsageError(f'{name} {"may run" if word == "elsewhere" else "runs"} on '
                                 f'{machine}. Cancel it first: {cancel}')
            if word in ('fetching', 'kept'):
                raise ResultsError(f'the results of {name} are still on {machine}.')
            if not run.jobs[name].may_start:
                raise UsageError(f'the line of {name} is not in the batch file any more.')
        again = [run.jobs[name] for name in names if name not in places]
        self._check_gpus(again)
        again, notes = self._editions.of_now(again)
        ready, kept, trouble = {}, {}, ''
        for job in again:
            try:
                check_known(self._results, [job.name])
                if self._results.is_done(job.name):
                    kept[job.name] = self._results.put_aside(job.name)
            except ResultsError as error:
                trouble = str(error)
                break
            ready[job.name] = job
        run.wishes.rerun(ready.values())
        run.view.replan(without_results(run.view.plan, ready))
        for name in names:
            if name in places:
                yield f'{name}: waits already'
            elif name in ready:
                yield f'{name}: {runs_again(kept.get(name))}'
        yield from (*notes, *on_lines)
        if trouble:
            self._trouble = (f'{count_of(len(again) - len(ready), "job")} cannot run again: '
                             f'{trouble}')
        if run.halted:
            yield 'nothing starts in this run: as many jobs have failed as --halt-after allows'

    def _rerun_failed(self):
        """Run all jobs once more that failed."""
        failed = [name for name in failed_jobs(self._run.view.plan, self._run.failures)
                  if self._run.jobs[name].may_start]
        if not failed:
            raise UsageError('no job of the batch has failed.')
        yield from self._rerun(failed)

    def _give_back(self, machines, now):
        """Start no more jobs on these machines; now: stop their jobs, and start them elsewhere."""
        run, found = self._run, []
        used = dict.fromkeys([*workers_in_use(run), *(
            worker for worker in run.workers if run.lives.any_of(worker, *ALIVE))])
        for word in machines:
            address = None
            with contextlib.suppress(MachineFileError):
                address = find_machine(word).address
            found += [worker for worker in used if worker not in found and (
                word in (worker.name, worker.machine.word) or worker.machine.address == address)
                ] or [None]
            if found[-1] is None:
                names = ', '.join(printable(worker.name) for worker in used)
                raise UsageError(f'the batch does not use {printable(word)}; it uses {names}.')
        others = [worker for worker in workers_in_use(run) if worker not in found
                  and worker.state in ('new', 'connecting', 'ready', 'away')]
        if now and not others:
            raise UsageError('no other machine is in use, on which the jobs could run. Without '
                             '--now they run to their end; --cancel stops them.')
        for worker in found:
            run.fleet.give_back(worker)
            if now:
                run.wishes.move(worker)
            left = run.lives.any_of(worker, *ALIVE)
            end = ('its jobs run to their end, and queued ones are taken back'
                   if worker.machine.engine else 'and its jobs run to their end')
            what = ('and its jobs stop and start elsewhere' if now else end) if left else (
                'and none of its jobs runs')
            when = '' if worker.state == 'ready' or not left or not (
                now or worker.machine.engine) else ' when the machine is connected again'
            yield f'{worker.name}: gets no more jobs, {what}{when}'
        if not run.scheduler.resources and run.scheduler.waits:
            yield (f'no machine is left for {count_of(run.scheduler.waits, "job")}. The same '
                   'command with --machines adds one')

    # Other lines, or other machines

    def _change(self, argv, text):
        """Run the batch by this command line and this text of its file from now on."""
        options = read_options(EXECUTE_BATCH_USAGE, argv)
        jobs = read_jobs(options['<batch>'], text, options, self._report.warning)
        for forwards in {job.forwards for job in jobs}:
            check_forwards(forwards)
        machines, wrong = find_machines(options['--machines'] or ())
        allow_files(len(self._run.workers) + len(machines))
        parts, notes = self._change_lines(jobs)
        changed = changed_machines(self._run, machines)
        joined = self._join([machine for machine in machines if machine.name not in changed])
        self._results.lock.tell(self._run.batch, hardware_words(options), again=True)
        parts += [f'{worker.name} joins' for worker in joined]
        yield ', '.join(parts) or 'it has these lines and machines already'
        yield from notes
        yield from (f'cannot be used: {complaint}' for complaint in wrong)
        yield from (f'{name}: its machine file has changed. This batch uses it as it was'
                    for name in changed)
        unnamed = {worker.name for worker in workers_in_use(self._run)
                   } - {machine.name for machine in machines}
        if unnamed and machines:
            yield (f'{names_of(sorted(unnamed))} stays in use. To give it back: execute_batch '
                   f'{options["<batch>"]} --drop-machine {" ".join(sorted(unnamed))}')
        yield from options_that_stay(options, self._options, self._run.scheduler.waits)

    def _join(self, machines):
        """Use these Machines, too; return the Workers of those that were not in use."""
        run, joined = self._run, []
        for machine in machines:
            same = [worker for worker in run.workers if worker.machine.address == machine.address]
            for worker in same:             # a new Worker tries it again
                if worker.state == 'failed':
                    run.fleet.give_back(worker)
            if any(not run.fleet.standing[worker].is_given_back for worker in same):
                continue
            worker = next((worker for worker in same if worker.state in (
                'connecting', 'ready', 'away')), None)
            if worker:
                run.fleet.take_back(worker)
            else:
                for former in same:         # else on_account would refuse the new Worker
                    run.client.accounts = {which: other for which, other
                                           in run.client.accounts.items() if other is not former}
                (worker,) = workers_for([machine], run.client, self._report, len(run.workers))
                run.fleet.join(worker)
                for former in same:
                    for attempt in run.lives.of(former, *UNCOLLECTED):
                        run.lives.rebind(attempt, worker)
                self._take_up(worker)
            joined.append(worker)
        return joined

    def _take_up(self, worker):
        """Take up jobs that an earlier run began on this machine, which is in use only now."""
        run, plan = self._run, self._run.view.plan
        there = {name for name, (address, _) in plan.elsewhere.items()
                 if address == worker.machine.address}
        for name in there:
            run.take_up(run.jobs[name], worker, self._results.journal.record(name))
        run.view.replan(plan._replace(elsewhere={
            name: place for name, place in plan.elsewhere.items() if name not in there}))

    def _change_lines(self, jobs):
        """Run these Jobs, and no others; return (what changed, in a few words each; notes)."""
        run, results = self._run, self._results
        for attempt in run.lives.all_of('placed'):      # these wait, too: for their files
            run.lives.move(attempt, 'returned', 'the batch is changed')
        waiting = {job.name: job for kind in run.scheduler.kinds().values() for job in kind}
        alive = {attempt.name for attempt in run.lives.all_of(*AWAITED)}
        edit = edit_of(jobs, run.jobs, waiting, run.wishes.cancelled - alive,
                       results_left(results, run.batch, run.jobs),
                       lambda name: results.exists(name) or results.journal.is_begun(name))
        self._check_gpus(edit.added)
        rest = sorted(name for name in edit.gone & alive if run.jobs[name].may_start)
        added, notes = self._editions.of_now(edit.added)
        run.wishes.replace_waiting({**edit.kept, **{job.name: job for job in added}})
        run.jobs.update({job.name: job for job in edit.done})
        run.wishes.change({**edit.back, **{
            name: run.jobs[name]._replace(forwards=None) for name in edit.gone}})
        plan = run.view.plan
        run.view.replan(plan._replace(
            lines=plan.lines._replace(done=(*plan.lines.done, *edit.done))))
        return [f'{count_of(count, noun)} {what}' for count, noun, what in (
            (len(added), 'line', 'added'), (len(edit.dropped), 'waiting line', 'dropped'),
            (edit.changed, 'waiting line', 'changed'),
            (len(edit.done), 'line', 'had results before'),
        ) if count] + [f'{names_of(rest)} {"keeps" if len(rest) == 1 else "keep"} running, without '
                       'a line in the batch file'] * bool(rest), notes

    def _check_gpus(self, jobs):
        """Raise if one of these Jobs needs a GPU, and the machines were not asked for GPUs."""
        needy = [job.name for job in jobs if job.allocation.gpus]
        if needy and not self._run.policy.want_gpus:
            raise UsageError(
                f'{names_of(needy)} needs a GPU, and no job of the batch did when it began, so the '
                'machines were not asked for their GPUs. Press Ctrl-C and d to leave '
                'the batch, then type the same command again')


class Edit(NamedTuple):
    """How another text of a batch file changes a batch that runs."""
    kept: dict                      # name -> Job that waits, as the text has it now
    dropped: frozenset              # names of Jobs that waited, whose lines are gone
    gone: frozenset                 # names of other Jobs whose lines are gone
    back: dict                      # name -> Job of other lines that were gone and have returned
    added: tuple                    # Jobs to run, too
    done: tuple                     # Jobs that have results of an earlier run
    changed: int                    # how many of those kept have other options


def edit_of(jobs, known, waiting, idle, left, is_taken):
    """Return the Edit by which the batch of the `known` Jobs becomes that of these `jobs`.

    known, waiting: {name: Job} of all jobs of the batch, and of those that wait
    idle: names of cancelled jobs, which are matched last
    left: {(command, own): [names of results of earlier runs that no known job has]}
    is_taken: tells whether a job or results other than those of `known` have a name

    Two lines are the same if they have the same command and the same options of their own.  Among
    equal lines, jobs that have started are matched first, then those that wait; each first by line
    number.  A job whose line is gone keeps running if it has started.
    """
    pairs = pair_jobs(
        jobs, [job for name, job in known.items() if name not in waiting and name not in idle],
        waiting.values(), [known[name] for name in idle if name in known])
    kept, changed, added, done, back = {}, 0, [], [], {}
    for job in jobs:
        old = pairs.get(job.name)
        if old and not old.may_start:
            back[old.name] = job._replace(name=old.name)
        elif old and old.name in waiting:
            same_files = old.forwards._replace(edition=0) == job.forwards
            kept[old.name] = job._replace(
                name=old.name, forwards=old.forwards if same_files else job.forwards)
            changed += kept[old.name]._replace(line=old.line) != old
        elif not old:
            names = left.get((job.command, job.own))
            if names:
                done.append(job._replace(name=names.pop(0)))
            else:
                added.append(job)
    dropped = waiting.keys() - kept.keys()
    taken = (known.keys() - dropped) | {job.name for job in done}
    for place, job in enumerate(added):
        name = free_name(job.name, lambda name: name in taken or is_taken(name))
        taken.add(name)
        added[place] = job._replace(name=name)
    gone = known.keys() - dropped - {old.name for old in pairs.values()}
    return Edit(kept, frozenset(dropped), frozenset(gone), back, tuple(added), tuple(done),
                changed)


def pair_jobs(jobs, *groups):
    """Return {name of one of the jobs: the Job of a group that is the same line}; see edit_of."""
    pairs = {}
    for group in groups:
        by_command = collections.defaultdict(dict)
        for old in sorted(group, key=lambda old: old.line):
            # Jobs whose line is gone all have the number 0.
            by_command[old.command, old.own][old.line or old.name] = old
        for is_same_number in (True, False):
            for job in jobs:
                olds = by_command[job.command, job.own]
                place = job.line if is_same_number else next(iter(olds), None)
                if job.name not in pairs and place in olds:
                    pairs[job.name] = olds.pop(place)
    return pairs


def results_left(results, batch, known):
    """Return {(command, own): [names of results of this batch that no known job has]}."""
    left = collections.defaultdict(list)
    for name, record in results.journal.jobs.items():
        if name not in known and results.is_done(name) and is_of_batch(name, record, batch):
            left[record['command'], record.get('own') or ''].append(name)
    return left


def check_known(results, names):
    """Raise if the journal does not have one of these results: it would not be kept."""
    for name in names:
        if name not in results.journal.jobs and results.exists(name):
            raise ResultsError(f'the journal does not know which command made job_results/{name}: '
                               'move its files away.')


def without_results(plan, names):
    """Return the Plan without results of these jobs, which run again."""
    return plan._replace(
        lines=plan.lines._replace(done=tuple(job for job in plan.lines.done
                                             if job.name not in names)),
        failed_before=tuple(result for result in plan.failed_before if result.name not in names))


def failed_jobs(plan, failures=()):
    """Return the names of jobs that failed, in an earlier run or (failures, JobResults) now."""
    return [result.name for result in (*plan.failed_before, *failures)]


def runs_again(kept):
    """Return the message for a job that runs again; kept: the name of its earlier results."""
    return 'runs again' + (f'; its earlier results are {kept}' if kept else '')


# ---- Past: how exactly a job ran, and how to run it once more ----

def ask_here(argv, feed=None, env=None, limit_s=None):
    """Run a program here; return (its exit status, its stdout, its stderr as text).

    limit_s: kill it after this many seconds
    """
    said, ended = bytearray(), []
    processes = Processes()
    try:
        processes.start(argv, said.extend, lambda *end: ended.append(end), feed=feed,
                        env=env or {**os.environ, 'LC_ALL': 'C', 'BASH_ENV': ''},
                        deadline_s=limit_s)
        while not ended:
            processes.wait()
    finally:
        processes.close()
    status, complaint = ended[0]
    return status, bytes(said), complaint.decode('utf-8', 'replace')


class Past(NamedTuple):
    """One start of a job, as its journal has it."""
    name: str
    claimed: dict                   # the journal's event
    ended: dict                     # the event of its end; empty if the journal has none
    state: str                      # claimed, ended, …: its last event in the journal
    machine: dict                   # facts of the machine at that time: see Journal.machines
    place: dict = {}                # number and node in a cluster; empty elsewhere
    kept: object = ()               # the paths that were not fetched; True: all

    def in_queue(self, event):
        """Return the Past after the event that a job waits in the queue of a cluster, or ran."""
        place = {**self.place, 'number': event.get('number') or self.place.get('number')}
        if event['event'] == 'queued':
            return self._replace(state='queued', place=place)
        place['node'] = event.get('node') or '?'
        return self._replace(state='claimed', place=place, claimed={
            **self.claimed, 'time': event['time']})     # it counts from here, not from its claim

    @property
    def never_began(self):
        """Tell whether the job ended while it waited in the queue of a cluster."""
        return bool(self.place and 'node' not in self.place
                    and self.ended.get('exit_code') == 143 and not self.ended.get('wall_s'))

    @property
    def ended_at(self):
        """Return when the job ended; the journal may have heard of that later.  None: unknown."""
        began, heard = self.claimed.get('time'), self.ended.get('time')
        wall_s = self.ended.get('wall_s')
        return min(heard, began + wall_s) if began and heard and wall_s else heard

    @property
    def where(self):
        """Return the machine, as the user named it."""
        return self.claimed.get('where') or self.claimed['machine']


def find_past(word, path=None):
    """Return the Past of a job; word: its name, such as NAME or NAME~1; with a path also 57 or .57.

    path: of the batch file, or None
    """
    results = ResultStore('job_results').peek()
    batch = path and name_of_batch(path)
    name = next((name for name in (word, f'{batch}.{word.removeprefix(".")}')
                 if name in results.journal.jobs), word)
    parts = ('', f'commands/{name}') if is_file_name(name) else ()
    for part in parts:
        inner = os.path.join(results.folder, '.ssh_scheduler', part)
        past = read_past(name, os.path.join(inner, 'journal'))
        if past:
            return past
    raise UsageError(f'no job {printable(name)} has started in this folder'
                     f'{likely_job(name, results.journal.jobs)}. The jobs of a batch: '
                     f'{typed_for(path, "--status") if path else "execute_batch <batch> --status"}')


def likely_job(word, names):
    """Return ' (did you mean X?)' with the jobs that an unknown name may mean, or ''.

    A number alone means the job of this line in any batch.
    """
    number = word.removeprefix('.')
    if not number.isdigit():
        return nearest(word, names)
    likely = [name for name in names if name.endswith(f'.{number}')]
    return f' (did you mean {" or ".join(likely)}?)' if 0 < len(likely) < 4 else ''


def is_file_name(name):
    """Tell whether the name can be that of a file in a folder."""
    return '/' not in name and '\0' not in name and name not in ('', '.', '..')


def read_past(name, path):
    """Return the Past of a job from the journal at this path; None if the job is not in it."""
    found, machines = {}, collections.defaultdict(list)
    stem = name.partition('~')[0]
    try:
        lines = read_file(path).splitlines()
    except OSError:
        return None
    for line in lines:
        try:
            event = json.loads(line)
            word, job = event['event'], event.get('job')
            if word == 'machine':
                machines[event['machine']].append((event['time'], event['facts']))
            elif job != stem:
                continue
            elif word == 'claimed':
                found[job] = Past(job, event, {}, word, {})
            elif word == 'renamed' and job in found:
                found[event['to']] = found.pop(job)._replace(name=event['to'])
            elif job in found and word in ('queued', 'running'):        # on a cluster
                found[job] = found[job].in_queue(event)
            elif job in found and word in LIFE_WORDS:
                found[job] = found[job]._replace(
                    state=word, ended=event if word == 'ended' else found[job].ended,
                    kept=event.get('kept') or ())
        except (ValueError, KeyError, TypeError, AttributeError):
            continue                # `open` names a line that cannot be read
    past = found.get(name)
    if not past:
        return None
    began = past.claimed.get('time', math.inf)
    facts = [facts for since, facts in machines[past.claimed['machine']] if since <= began]
    return past._replace(machine=facts[-1] if facts else {})


LIFE_WORDS = {state.written for state in LIFE.values() if state.written}


def what_became(past, said=()):
    """Yield (head, text) of how a job ended, and when.  said: the last lines of its stderr."""
    claimed, ended, now = past.claimed, past.ended, time.time()
    states = {'claimed': 'runs, as far as is known here', 'lost': 'its machine lost the job',
              'queued': 'waits in the queue of a cluster',
              'stopping': 'was told to stop, and may still run',
              'cancelled': 'was cancelled'}
    text = states.get(past.state, '')
    if ended:
        code = ended['exit_code']
        text = (f'exit code {code}' if code else 'finished, exit code 0') + (
            ', before it began' if past.never_began else
            f', after {duration_of(ended["wall_s"])}' if 'wall_s' in ended else '') + (
            '; its results are not fetched' if past.state == 'ended' else '')
    yield 'outcome', text
    if ended.get('exit_code'):
        why = failure_words(ended['exit_code'], past.where, said)
        if why != f'exit code {ended["exit_code"]}, empty stderr':
            yield 'why', why
    if 'time' in claimed:
        until = f', ended {clock_of(past.ended_at, -math.inf)}' if past.ended_at else ''
        yield ('queued' if past.never_began or past.state == 'queued' else 'started',
               f'{clock_of(claimed["time"], now - 86400)}{until}')
    if claimed.get('attempt', 1) > 1:
        yield 'attempt', f'{claimed["attempt"]}, counted from the first start of the job'
    if claimed.get('reproduces'):
        yield 'reproduces', printable(claimed['reproduces'])


def what_is_kept(past, results):
    """Yield (head, text) of the files of a collected job that its machine keeps."""
    if past.kept and past.state == 'collected' and os.path.isdir(
            os.path.join(results.folder, past.name)):
        yield 'kept', printable(
            f'all its files, on {past.where}; the same command without --max-result-size fetches '
            'them' if past.kept is True else
            f'{names_of(past.kept)}, on {past.where}; the same command tries to fetch this again')


def where_it_ran(past):
    """Yield (head, text) of the machine of a job, and of the resources it asked for and used."""
    claimed, ended, facts = past.claimed, past.ended, past.machine
    gpus = gpus_of(claimed.get('gpus'))
    models = {gpu['index']: gpu['model'] for gpu in facts.get('gpus', ())}
    parts = [past.where]
    parts += [f'GPU {index}' + (f' ({models[index]})' if index in models else '')
              for index in gpus]
    for fact, text in ('node', 'node {}'), ('number', 'number {} in its queue'):
        if past.place.get(fact) not in (None, '?'):
            parts.append(text.format(past.place[fact]))
    yield 'machine', printable(', '.join(parts))
    known = [f'{label} {facts[key]}' for key, label in FACT_LABELS.items() if facts.get(key)]
    if known:
        yield '', printable(', '.join(known))
    if claimed.get('asked'):
        yield 'asked for', describe(allocation_of(claimed))
    used = [f'{text} {ended[key]:.0f} MB' for key, text in (
        ('peak_memory_mb', 'memory'), ('peak_gpu_memory_mb', 'memory of GPUs')) if ended.get(key)]
    if 'cpu_s' in ended:
        used.insert(0, f'processor time {duration_of(ended["cpu_s"])}')
    if used:
        yield 'used', ', '.join(used)
    if claimed.get('variables'):
        yield 'variables', printable(', '.join(claimed['variables']))
    if claimed.get('wrap'):
        yield 'wrapped in', printable(claimed['wrap'])


FACT_LABELS = {'kernel': 'Linux', 'driver': 'driver of GPUs', 'python': 'Python'}


def allocation_of(claimed):
    """Return the Allocation in a claim of the journal; None if it has none."""
    asked = claimed.get('asked')
    if not isinstance(asked, dict):
        return None
    return Allocation(**{name: value for name, value in asked.items()
                         if name in Allocation._fields})


def changed_since(manifest, batch=None):
    """Return the paths of a Manifest whose files here differ now, or are gone; of None, none.

    batch: the name of a batch, whose own file does not count, since users add lines to it
    """
    return [path for path in (manifest.files if manifest else ())
            if differs_now(path, manifest) and (batch is None or name_of_batch(path) != batch)]


def what_it_had(past, sent):
    """Yield (head, text) of the files that a job had, and of how they differ from today's."""
    digest = past.claimed.get('files')
    manifest, record = sent.get(digest), sent.record(digest)
    if not manifest or not record:
        yield 'files', 'not recorded'
        return
    folder = sent.path(digest)
    yield 'files', (f'{count_of(record["files"], "file")}, {size_of(record["bytes"])}, '
                    f'{record["kept"]} of them kept in {folder}/files')
    commit = record.get('commit')
    if commit:
        yield 'commit', f'{commit} ({printable(record["branch"])})'
        for head, paths, more in (
                ('changed', record['changed'], f': {folder}/diff.patch'
                 if os.path.exists(f'{folder}/diff.patch') else ''),
                ('not in git', record['untracked'], '')):
            if paths:
                yield head, f'{names_of([*map(printable, paths)])}{more}'
    now = changed_since(manifest, past.claimed.get('batch'))
    yield 'since then', (f'{names_of([*map(printable, now)])} changed' if now else
                         'no file changed') + f': execute_batch --reproduce {past.name}'


class Rebuilt:
    """A folder with the files that a job had, to send them once more; a context manager.

    While it is open, it is the current folder, and job_results in it is a link to the former one.

    unlike: sentences on files that are not as they were
    """

    def __init__(self, past, sent):
        self._manifest, self._sent = sent.get(past.claimed.get('files')), sent
        self._commit = sent.record(past.claimed.get('files')).get('commit')
        self._here = os.path.realpath('.')
        self._folder, self.unlike = None, []

    def __enter__(self):
        inner = os.path.join(self._here, 'job_results', '.ssh_scheduler')
        stem = f'reproduce.{os.uname().nodename}.'
        for name in os.listdir(inner):              # remove the folders of killed clients
            pid = name[len(stem):].partition('-')[0] if name.startswith(stem) else ''
            if pid.isdigit() and not is_process(int(pid)):
                remove_tree(os.path.join(inner, name))
        self._folder = private_folder(os.path.join(inner, f'{stem}{os.getpid()}'))
        try:
            self._fill()
            os.symlink('../..', os.path.join(self._folder, 'job_results'))
            os.chdir(self._folder)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        os.chdir(self._here)
        remove_tree(self._folder)

    def _fill(self):
        changed, missing = [], []
        for path, (mode, _, ns, content) in sorted(self._manifest.files.items()):
            target = os.path.join(self._folder, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if content.startswith(TO):
                os.symlink(content[len(TO):], target)
                continue
            data = self._content(path, content) if content else None
            if data is not None:
                with open(target, 'xb') as file:
                    file.write(data)
                os.chmod(target, mode)
                os.utime(target, ns=(ns, ns))
            elif not os.path.isfile(path) or os.path.islink(path):
                missing.append(printable(path))
            else:
                if differs_now(path, self._manifest):
                    changed.append(printable(path))
                self._take(path, target)
        for path in self._manifest.empty:
            os.makedirs(os.path.join(self._folder, path), exist_ok=True)
        if changed:
            self.unlike.append(f'{names_of(changed)} changed since, and no copy was kept: the job '
                               'gets the current files')
        if missing:
            is_gone, it = ('is gone', 'it') if len(missing) == 1 else ('are gone', 'them')
            self.unlike.append(f'{names_of(missing)} {is_gone}, and no copy was kept: the job '
                               f'does not get {it}')

    def _content(self, path, content):
        """Return the former content of a file; None if no copy of it exists any more."""
        data = self._sent.content(content)
        if data is None and not differs_now(path, self._manifest):
            data = read_file(path)
        if data is None and self._commit:
            data = self._committed(path, content)
        return data

    def _committed(self, path, content):
        """Return this content if the commit has it, as it is or as git checks it out."""
        for words in (['show'], ['cat-file', '--filters']):
            with contextlib.suppress(OSError, SchedulerError):      # there is no git here
                _, said, _ = ask_here(['git', *words, f'{self._commit}:./{path}'], env=git_env(),
                                      limit_s=GIT_LIMIT_S)
                if content_digest(said) == content:
                    return said
        return None

    def _take(self, path, target):
        """Link or copy the current file, which is only read and sent."""
        try:
            os.link(path, target)
        except OSError:                     # another file system, or the file of another person
            import shutil
            if os.stat(path).st_size > free_bytes(self._folder) - SPARE_BYTES:
                raise ResultsError(f'{printable(path)} has to be copied to be sent, and there is '
                                   f'no room for it in {self._folder}.') from None
            shutil.copy2(path, target)


def unlike_then(past, again):
    """Yield a text for each fact of the machine in which two Pasts differ, if both are known."""
    def models(one):
        known = {gpu['index']: gpu['model'] for gpu in one.machine.get('gpus', ())}
        return ', '.join(sorted(known.get(index, '?') for index in gpus_of(
            one.claimed.get('gpus'))))

    for label, then, now in (
            ('GPU', models(past), models(again)),
            *((label, past.machine.get(key), again.machine.get(key))
              for key, label in FACT_LABELS.items()),
            ('variables', *(', '.join(one.claimed.get('variables', ['none']))
                            for one in (past, again))),
            ('wrap', *(one.claimed.get('wrap', 'none') for one in (past, again)))):
        if then and now and then != now:
            yield printable(f'{label} {now} (then {then})')


def name_of_copy(past):
    """Return the name of the job that reproduces this one: NAME-again, or the next that is free.

    A copy that was begun and is not collected is continued under its name.
    """
    results = ResultStore('job_results').peek()
    stem = f'{past.name.replace("~", "-")}-again'

    def is_taken(name):
        journal = ResultStore('job_results', f'commands/{name}').peek().journal
        if journal.is_begun(name):
            begun = read_past(name, journal.path)
            return not begun or not continues(begun.claimed)
        return name in journal.jobs or name in results.journal.jobs or results.exists(name)

    def continues(claimed):
        """Tell whether this start reproduces the Past, and not a former job of its name."""
        return (claimed.get('reproduces') == past.name
                and claimed['command'] == past.claimed['command']
                and claimed.get('time', 0) >= past.claimed.get('time', 0))

    return free_name(stem, is_taken)


def digest_of(pieces):
    """Return the SHA-256 digest of the bytes."""
    import hashlib
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def what_came_in(past):
    """Yield a sentence on each input of the job that was not kept."""
    if past.claimed.get('input') == 'stdin':
        yield 'the standard input, which was not kept: the job gets none'
    if past.claimed.get('input') == 'tty':
        yield 'the terminal (--tty): the job gets none'


def other_files(past, again, sent):
    """Yield a sentence if a job did not get the files of the Past that it reproduces."""
    then, now = (sent.get(one.claimed.get('files')) for one in (past, again))
    if again.claimed.get('files') != past.claimed.get('files'):
        names = now.changed(then) if now and then else ()
        yield f'files: {names_of([*map(printable, names)]) or "unknown"}'


def tell_likeness(past, name, unlike, sent, reporter):
    """Print what differed for the job that reproduces a Past; compare the outputs.

    unlike: sentences on files and input
    """
    again = read_past(name, f'job_results/.ssh_scheduler/commands/{name}/journal')
    if not again or not again.ended:        # it was interrupted, or left running
        return
    unlike = [*unlike, *unlike_then(past, again)] or [*other_files(past, again, sent)]
    for text in unlike:
        reporter.line(f'not the same: {text}')
    if not unlike:
        reporter.line('the same: all files, and all that is known of the machine')
    results = ResultStore('job_results').peek()
    try:
        same = digest_of(results.read(past.name, 'out')) == digest_of(results.read(name, 'out'))
    except OSError:
        return
    reporter.line('the same: stdout' if same else 'not the same: stdout: diff '
                  f'{results.folder}/{past.name}.out {results.folder}/{name}.out')


# ---- Commands ----

LEAST_REPORT_S = 1.0        # between two pages of a report
LEAST_REDRAW_S = 0.5        # between two looks at how far a batch is
WATCH_S = 0.1               # between two looks at the output of a job in job_results


def is_known_machine(word):
    """Tell whether a machine file or a Host of ~/.ssh/config, also a pattern, has this name."""
    import fnmatch
    if any(map(os.path.isfile, machine_paths(word))):
        if not os.access(word, os.X_OK):
            return True
        with contextlib.suppress(MachineFileError):     # else a script, such as ./train.sh
            return bool(find_machine(word))
        return False
    # A pattern such as * names no machine.
    return any(re.search(r'\w', pattern) and fnmatch.fnmatchcase(word, pattern)
               for pattern in host_patterns())


def may_end_list(options, last):
    """Tell whether a list may have lost its last word: to <batch> or <command>, which is `last`."""
    argv, machines = options.argv[1:], options['--machines'] or ('--machines',)
    # Else the list of machines has a clear end.
    return '--' not in argv and (argv[-1] == options[last] or (machines[-1], options[last]) in zip(
        argv, argv[1:]))


def refuse_file(options, usage):
    """Raise if <command> seems to be missing, so that the last file to send was taken for it."""
    import shlex
    word, argv = options['<command>'] or '', options.argv[1:]
    option = next((one for one in ('--copy-forwards', '--link-forwards') if one in argv), None)
    files = argv[argv.index(option) + 1:] if option else ()
    if not files or files[-1] != word or not os.path.exists(word) or begins_command(word) or any(
            file.startswith('-') for file in files):
        return
    line = [*typed_start(options.argv[0]), *argv, '--', shlex.join(['cp', '-r', *files]) + ' ~/']
    raise WordMissing(f'<command> is missing: {printable(word)} is a file to send. The command '
                      'gets sent files in a folder of its own, so the command must copy '
                      f'what shall stay. Try: {printable(shlex.join(line))}', usage)


def refuse_programs(options, last):
    """Raise if a word of --machines begins a command: without quotes, only its end would run.

    The words `--machines lab1 sudo reboot` are two machines and the command `reboot`.  The words
    `--machines lab1 bash run.sh` are two machines and the batch file run.sh.

    last: the word behind the machines, '<command>' or '<batch>'
    """
    import shutil
    words = options['--machines']
    if not may_end_list(options, last):
        return
    machines = {words[0], *filter(is_known_machine, words)}
    wrong = next((word for word in words if word not in machines and begins_command(word)), None)
    if wrong is None:
        return
    is_bash = wrong in BASH_WORDS and not shutil.which(wrong)
    what = 'a variable' if '=' in wrong else 'a word of bash' if is_bash else 'a program'
    if last == '<batch>':
        noun = 'batch file'
        advice = one_command(words[0], in_quotes([*words[words.index(wrong):], options[last]]))
    else:
        noun = 'command'
        advice = (missing_quotes(EXECUTE_TO_USAGE, options.argv[1:], machines=machines)
                  or ' Put the command in quotes.')
    raise UsageError(f'{printable(wrong)} is {what}, not a machine. (If a machine has this name, '
                     f'write -- between the machines and the {noun}.){advice}')


# Lists of files.  A word in them is rarely the batch file.
FILE_LISTS = frozenset(('--copy-forwards', '--link-forwards', '--exclude', '--copy-backwards',
                        '--sync-back'))


def file_in_list(argv):
    """Return (option, word) of the list that seems to have taken the batch file, or None.

    argv: the words behind execute_batch
    """
    batches, kinds = known_batches(), option_kinds(EXECUTE_BATCH_USAGE)
    spelled, _ = spell_out(argv, kinds, 0)
    options = [word.partition('=')[0] for word in spelled[:spelled.index('--')]]
    for option, word in reversed([*zip(options, spelled)]):
        value = word.partition('=')[2]
        is_batch = option not in FILE_LISTS or options.count(option) > 1 and (
            value.endswith('.sh') or value and name_of_batch(value) in batches)
        if (kinds[option] == 'list' and is_batch and value in argv and os.path.isfile(value)
                and not value.endswith(('.yaml', '.yml'))):
            return option, value
    return None


def batch_of_job(word):
    """Return the batch file of a job with this whole name, such as a.sh of a.sh.57, or ''."""
    match = re.fullmatch(r'(.+)\.[0-9]+(~[0-9]+)?', word)
    return match[1] if match and os.path.isfile(match[1]) else ''


def batch_first(argv):
    """Return the sentences that follow '<batch> is missing': what to type.  argv: as above"""
    import shlex
    names, words, why = known_batches(), [*argv], ''
    taken = file_in_list(argv)
    if taken:
        option, path = taken
        words.remove(path)
        why = f' {option} takes all words up to the next option, here also {path}.'
    else:
        paths = {*filter(None, map(batch_of_job, argv))} or {*filter(os.path.isfile, names)}
        path = paths.pop() if len(paths) == 1 else ''
    if path:
        line = shlex.join([*typed_start('execute_batch'), path, *words])
        return printable(f'{why} Write the batch file first. Try: {line}')
    return f' Batches of this folder: {", ".join(map(printable, names))}.' if names else ''


def refuse_machine(options, is_new=True):
    """Raise if <batch> seems to be missing, so that the last machine or job was taken for it.

    is_new: the command only begins a batch
    """
    path, argv = options['<batch>'], options.argv[1:]
    exists = os.path.exists(path) or not is_new and is_gone(path)
    is_yaml = path.endswith(('.yaml', '.yml'))
    is_machine = False
    if not exists:
        is_machine = is_yaml or path == 'localhost' or is_known_machine(path)
    elif is_yaml:
        with contextlib.suppress(MachineFileError):     # else it may be a batch file
            is_machine = bool(find_machine(path))
    is_job = not exists and argv[-1] == path and batch_of_job(path)
    is_file = path == '-' or exists or re.search(r'[\s/]|\.[A-Za-z]\w*$', path)
    ends_list = options.given & {'--machines', '--drop-machine'} and may_end_list(
        options, '<batch>')
    if is_job or ends_list and (is_machine or not is_file):
        why = ': {} is a ' + ('job' if is_job else 'machine') if is_job or is_machine else (
            ', or there is no file {}')
        by_pipe = ' For the standard input write - as <batch>.' * (
            is_new and not file_in_list(argv))
        raise WordMissing(f'<batch> is missing{why.format(printable(path))}.{by_pipe}'
                          f'{batch_first(argv)}', EXECUTE_BATCH_USAGE)


def refuse_python(path, text):
    """Raise if a batch file of this text is a Python program."""
    if re.search(r'\.(py|ipynb)$', path) or path != '-' and re.match(
            r'#!\s*(\S*/)?(env\s+(-S\s+)?)?(\S*/)?python[0-9.]*(\s|$)', text):
        raise BatchFileError(f'{path} is a Python program.' + one_command(
            'MACHINE', in_quotes(['python3', path])))


def refuse_batch_files(options):
    """Raise if a word of --machines seems to be a second batch file."""
    ending = os.path.splitext(options['<batch>'])[1]
    for word in options['--machines'] if ending not in ('', '.yaml', '.yml') else ():
        if word.endswith(ending) and os.path.isfile(word):
            raise UsageError(f'{printable(word)} is a file like {printable(options["<batch>"])}, '
                             f'not a machine. {ONE_BATCH_FILE}')


def check_words(options, is_new):
    """Raise if a word for a machine, or that for the batch file, seems to be something else.

    is_new: as for refuse_machine; else --machines may be missing
    """
    if is_new:
        check_machines(options, 'batch')
    refuse_machine(options, is_new)
    if is_new:
        refuse_programs(options, '<batch>')
        refuse_batch_files(options)


def part_from_original(journal, options, reporter):
    """Give the journal of a copied folder its own Origin; warn of jobs that this starts again."""
    if is_copy(journal) and not options['--dry-run']:
        begun, original = [*filter(journal.is_begun, journal.jobs)], journal.origin.folder
        journal.become_own()
        if begun:
            reporter.warning(
                f'this folder is a copy of {printable(original)}. Jobs that were started there '
                f'and not collected start here again: {names_in_short(begun)}')


def execute_batch(argv):
    """Run a batch file, or do what the options ask for instead; return the exit status."""
    options = read_batch_options(argv)
    reporter = Reporter(options['--verbose'])
    check_asked(options)
    alone = next((option for option in WITHOUT_BATCH if options[option]), None)
    if alone:
        return WITHOUT_BATCH[alone](options, reporter)
    asked = next((option for option in ASKED if option in options.given), None)
    reruns = options.given & RERUNS
    check_words(options, is_new=not (asked or reruns))
    if asked:
        return ASKED[asked](read_call(options, reporter), reporter)
    text = read_batch_text(options['<batch>'], sys.stdin.buffer)
    if not reruns:
        refuse_python(options['<batch>'], text)
    jobs = read_lines(options, text, reporter.warning)
    name = name_of_batch(options['<batch>'])
    answer = ask_for_rerun(options, name) if reruns and not options['--dry-run'] else None
    if answer:
        return tell_handed(answer, options, reporter)
    if reruns and not options['--machines']:
        raise UsageError(f'no client runs {name}, so this command starts one: --machines is '
                         f'missing.{HERE_TOO.format("--machines")}')
    check_machines(options, 'batch')
    check_syntax(options['<batch>'], jobs)
    check_hooks(options)
    warn_of_settings(options['<batch>'], jobs, reporter.warning)
    machines, wrong = usable_machines(options['--machines'], reporter)
    check_files(options['<batch>'], jobs, read_forwards(options))
    policy, settings = read_policy(options), read_settings(options)
    results = ResultStore('job_results')
    results.sent.limit_bytes = read_keep_files(options)
    answer = open_or_hand_over(results, name, options, text)
    if answer:
        return tell_handed(answer, options, reporter, handed_to(results.lock.holder))
    part_from_original(results.journal, options, reporter)
    allow_files(len(machines))
    client = Client(results, reporter.trace, **settings)
    hooks = Hooks(name, options, client.processes, reporter)
    try:
        status = run_told(options, client, reporter, hooks, lambda told: run_batch(
            options, machines, jobs, client, reporter, policy, told) or wrong)
    finally:
        client.close()
        results.close()
    with interruptible(hooks.interrupt):    # the command may start another batch in this folder
        hooks.finish(status)
    return status


QUESTIONS = frozenset(('--status', '--follow', '--wait'))    # they change nothing


def read_batch_options(argv):
    """Return the Options of execute_batch.

    If <batch> is missing, name the batches known here.  For a question, take the only one.
    """
    try:
        options = read_options(EXECUTE_BATCH_USAGE, argv)
    except WordMissing as error:
        names = known_batches()
        is_question = QUESTIONS & {word.partition('=')[0] for word in argv}
        if not (is_question and len(names) == 1 and os.path.isfile(names[0])):
            raise WordMissing(f'{error}{batch_first(argv)}', error.usage) from None
        options = read_options(EXECUTE_BATCH_USAGE, [names[0], *argv])
        tell_only_batch(names[0])
    take_only_batch(options)
    word = options['<batch>'] or ''
    if f'--{word}' in option_kinds(EXECUTE_BATCH_USAGE) and not os.path.exists(word):
        raise UsageError(f'there is no batch file {word} (did you mean --{word}?).',
                         EXECUTE_BATCH_USAGE)
    return options


def take_only_batch(options):
    """Take the only batch of this folder for --what and --reproduce, if they have only a number."""
    word = options['--what'] or options['--reproduce'] or ''
    if options['<batch>'] or not re.fullmatch(r'\.?[0-9]+', word):
        return
    names = known_batches()
    if len(names) == 1:
        options['<batch>'] = names[0]
        tell_only_batch(names[0])


def tell_only_batch(name):
    """Tell which batch a command means that names none."""
    Reporter().note(f'execute_batch: the only batch of this folder is {printable(name)}')


def known_batches():
    """Return the names of the batches that job_results knows, sorted."""
    names = set()
    with contextlib.suppress(SchedulerError):
        known = ResultStore('job_results').peek().journal.jobs
        names = {record.get('batch') or name.rpartition('.')[0] for name, record in known.items()}
    return sorted(names)


def is_gone(path):
    """Tell whether a batch file is gone, and job_results or a client knows its batch."""
    if path == '-' or os.path.lexists(path):
        return False
    name, holder = name_of_batch(path), ResultStore('job_results').lock.holder
    return name in known_batches() or bool(holder and holder.lives and holder.run == name)


def past_in(options, option):
    """Return the Past of the job that an option names, by its name or its number in <batch>."""
    return find_past(options[option], options['<batch>'])


def show_what(options, reporter):
    """Show how exactly a job ran (--what); return the exit status."""
    past, results = past_in(options, '--what'), ResultStore('job_results')
    said = results.last_lines(past.name, 'err') if past.state == 'collected' else ()
    for head, text in (('command', printable(past.claimed['command'])), *what_became(past, said),
                       *what_is_kept(past, results), *where_it_ran(past),
                       *what_it_had(past, results.sent)):
        reporter.line(f'{head + ":" if head else "":12}{text}')
    return 0


NOT_OF_ONE_JOB = ('--rerun', '--rerun-failed', '--sync-back', '--joblog', '--report', *HOOKS)


def reproduce(options, reporter):
    """Run a job once more with the files that it had (--reproduce); return the exit status."""
    past = past_in(options, '--reproduce')
    for option in ('--copy-forwards', '--link-forwards', '--exclude'):
        if option in options.given:
            raise UsageError(f'{option} cannot be given with --reproduce, which sends the files '
                             'that the job had.')
    for option in NOT_OF_ONE_JOB:
        if option in options.given:
            raise UsageError(f'{option} cannot be given with --reproduce: it is for batches.')
    sent, claimed = ResultStore('job_results').sent, past.claimed
    manifest = sent.get(claimed.get('files'))
    if not manifest:
        raise ResultsError(f'the files that {past.name} had are not recorded, so it cannot be '
                           'reproduced. Its command: ' + printable(claimed['command']))
    name = options['<batch>'] = name_of_copy(past)
    machines, wrong = usable_machines(options['--machines'] or (past.where,), reporter)
    allocation = read_allocation(options, allocation_of(claimed) or Allocation(
        gpus=len(gpus_of(claimed.get('gpus')))))
    job = Job(name, claimed['command'], 1, allocation, Forwards(link=manifest.linked),
              as_paths(claimed.get('backwards')), claimed.get('own', ''))
    options['--link-forwards'] = manifest.linked
    policy = read_policy(options)
    policy = policy._replace(noted={'batch': claimed.get('batch') or name,
                                    'reproduces': past.name})
    results = ResultStore('job_results', f'commands/{name}')
    results.sent.limit_bytes = read_keep_files(options)
    open_own(results, name)
    client = Client(results, reporter.trace, **read_settings(options))
    client.files.are_rebuilt = True
    try:
        reporter.line(f'{past.name}: {printable(claimed["command"])}')
        with Rebuilt(past, sent) as rebuilt:
            status = run_batch(options, machines, [job], client, reporter, policy) or wrong
            tell_likeness(past, name, [*rebuilt.unlike, *what_came_in(past)], sent, reporter)
    finally:
        client.close()
        results.close()
    return status


class BatchCall(NamedTuple):
    """A call of execute_batch whose options and batch file were read."""
    options: Options
    text: str                       # of the batch file
    jobs: Optional[list]            # the Jobs in it, by these options; None if the file is gone
    name: str                       # of the batch


def read_call(options, reporter):
    """Return the BatchCall of options that ask for something else than a run of the batch."""
    path = options['<batch>']
    name = name_of_batch(path)
    if is_gone(path):
        reporter.note(f'there is no batch file {printable(path)} any more. These are the jobs of '
                      f'{name} that have started')
        return BatchCall(options, '', None, name)
    text = read_batch_text(path, sys.stdin.buffer)
    return BatchCall(options, text, read_lines(options, text, reporter.warning), name)


def check_asked(options):
    """Raise if options of execute_batch are given that exclude or need each other."""
    def one_of(*names):
        given = [name for name in names if name in options.given]
        if len(given) > 1:
            raise UsageError(f'{" and ".join(given)}: give one of them.')

    def only_with(name, *others):
        given = [other for other in others if other in options.given]
        if given and name not in options.given:
            raise UsageError(f'{" and ".join(given)} can only be given with {name}.')

    one_of(*ASKED, *WITHOUT_BATCH, '--dry-run')
    one_of(*ASKED, '--rerun', '--rerun-failed')
    only_with('--status', *STATUS_OPTIONS, *['--watch'] * ('--report' not in options.given))
    if '--check' not in options.given:
        only_with('--status', '--json')
    only_with('--drop-machine', '--now')
    for name in ('--rerun', '--drop-machine'):
        if options[name] == ():
            noun = 'job' if name == '--rerun' else 'machine'
            raise UsageError(f'{name} names no {noun}, or <batch> is missing.'
                             f'{batch_first(options.argv[1:])}')


def read_settings(options):
    """Return the settings of a Client by the options of execute_batch."""
    max_result_mb = options.optional('--max-result-size', options.size_mb, least=0)
    away_limit_s = options.seconds('--away-limit', least=0)
    lost_after_s = options.optional('--lost-after', options.seconds, least=0)
    if lost_after_s is not None:            # it must try to reconnect until then
        away_limit_s = max(away_limit_s, lost_after_s + LONGEST_RETRY_S)
    return {'nice': options.whole_number('--nice', least=0, most=19),
            'live': not options['--no-live'], 'away_limit_s': away_limit_s,
            'max_result_bytes': None if max_result_mb is None else int(max_result_mb * 1e6)}


def read_keep_files(options):
    """Return how many bytes of the sent files may be kept in job_results."""
    return int(options.size_mb('--keep-files', least=0) * 2**20)


def open_or_hand_over(results, name, options, text):
    """Open the results for this batch.  If a client runs it, hand the command to that client.

    Return the Answer of that client; None if the results are open.
    """
    while True:
        try:
            open_results(results, name, hardware_words(options))
            return None
        except FolderInUse as error:
            # Lines from stdin are not an edit of the running batch, which came from another pipe.
            if options['--dry-run'] or options['<batch>'] == '-':
                raise
            answer = ask_for_rerun(options, name) if options.given & RERUNS else (
                Inbox(results, name).ask('change', argv=[*options.argv[1:]], text=text))
            if answer:
                return answer
            holder = results.lock.holder
            if not holder or holder.lives is not False:     # else it has just ended: try again
                raise FolderInUse(f'{error}{after_it(holder, options)}') from None


def after_it(holder, options):
    """Return how to begin this batch after the one that the holder of the lock runs, or ''."""
    import shlex
    path = holder.run if holder and holder.lives else ''
    if not os.path.isfile(path) or name_of_batch(options['<batch>']) == path:
        return ''
    first = shlex.join([*typed_start('execute_batch'), path, '--wait'])
    own = shlex.join([*typed_start('execute_batch'), *options.argv[1:]])
    return printable(f' To start this batch when the jobs of {path} have succeeded: {first} && '
                     f'{own}')


def open_results(results, run='', asks=()):
    """Open the results; ask a command that only follows a job to release them.

    run, asks: as for ResultStore.open.  Raises FolderInUse.
    """
    for _ in range(200):
        with contextlib.suppress(FolderInUse):
            return results.open(run, asks)
        holder = results.lock.holder
        if holder and holder.lives is False:    # the new holder has not written its lines yet
            time.sleep(0.02)
        elif holder and holder.run.endswith(FOLLOWED):
            Inbox(results, holder.run).ask('let go')        # with or without an answer
        else:
            break
    return results.open(run, asks)


def ask_for_rerun(options, name):
    """Have the client that runs the batch run jobs again; return its Answer, None if none runs."""
    inbox = Inbox(ResultStore('job_results'), name)
    return inbox.ask('rerun failed') if options['--rerun-failed'] else (
        inbox.ask('rerun', jobs=[*options['--rerun']]))


def handed_to(holder):
    """Return the first words of the answer to a command that another client acted on."""
    return f'handed to the client that runs (process {holder.pid}): '


def tell_answer(answer, reporter, head='', command='execute_batch'):
    """Print the Answer of a client; return the exit status."""
    for line in answer.lines:
        reporter.line(head + printable(line))
        head = ''
    if answer.error:
        reporter.note(f'{command}: {printable(answer.error)}')
    return answer.status


def tell_handed(answer, options, reporter, head=''):
    """Print the Answer of the client that runs the batch, and how to wait for the end, since this
    command does not wait; return the exit status.
    """
    status, path = tell_answer(answer, reporter, head), options['<batch>']
    if not status and path != '-':
        reporter.note(f'To wait for the end of the batch: {typed_for(path, "--wait")}')
    return status


def run_told(options, client, reporter, hooks, run):
    """Run a batch with its job log and its command of --on-failure; return the exit status.

    run(told): runs the batch; told: objects with methods that are called at its events
    """
    log, report = None, read_report(options, client, reporter)
    others = (hooks, *report, *read_sync_back(options, client, reporter))
    if options['--joblog'] and not options['--dry-run']:
        log = JobLog(options['--joblog'], reporter.warning)
        client.files.never.add(log.path_here)
    try:
        status = run((log, *others) if log else others)
    except SchedulerError as error:
        if not hooks.has_begun:
            raise
        reporter.note(f'execute_batch: {error}')
        status = error.exit_code
    finally:
        if log:
            log.close()
    client.results.lock.note_end(status)
    client.results.close()              # the command of --on-failure may take a minute
    with interruptible(hooks.interrupt):
        hooks.await_failure()
    for page in report if hooks.has_begun else ():
        page.finish()
    return status


def read_report(options, client, reporter):
    """Return the HtmlReport that --report asks for, or nothing, as a tuple."""
    if '--report' not in options.given or options['--dry-run']:
        return ()
    interval = read_interval(options, LEAST_REPORT_S, '60')
    page = HtmlReport(options['--report'], interval, client.processes, reporter)
    client.files.never.add(page.path_here)
    return (page,)


def read_policy(options):
    """Return the Policy by the options of execute_batch."""
    return Policy(asks_late=True, wants_others=True, patient=True,
                  interval_s=LIVE_S * random.uniform(0.8, 1.2),
                  retries=options.whole_number('--retries', least=0),
                  lost_after_s=options.optional('--lost-after', options.seconds, least=0),
                  cluster_after_s=options.seconds('--cluster-after', least=0),
                  timeout_s=options.optional('--timeout', options.seconds, above=0),
                  halt_after=options.optional('--halt-after', options.whole_number, least=1),
                  noted={'batch': name_of_batch(options['<batch>'])})


def usable_machines(words, reporter):
    """Return (usable Machines, exit status: 1 if some are unusable); print why those are."""
    machines, complaints = find_machines(words)
    for complaint in complaints:
        reporter.note(f'cannot be used: {complaint}')
    return machines, int(bool(complaints))


def read_lines(options, text, warn):
    """Return the Jobs of the batch file, as read_jobs.  If it has wrong lines, name them all."""
    try:
        return read_jobs(options['<batch>'], text, options, warn)
    except WrongLines as error:
        try:
            check_syntax(options['<batch>'], error.jobs)
        except WrongLines as others:
            raise WrongLines([*error.complaints, *others.complaints]) from None
        raise


def check_syntax(path, jobs):
    """Raise if bash refuses a command of the jobs; without a bash here, check nothing."""
    doubtful = [job for job in jobs if not PLAIN_LINE.fullmatch(job.command)]
    if not doubtful:
        return                          # this saves a process before the first login
    said = b''
    with contextlib.suppress(SchedulerError):
        _, said, _ = ask_here(['bash', '-O', 'extglob', '-c', SYNTAX_CHECK],
                              (job.command.encode() + b'\0' for job in doubtful))
    refuse_syntax(path, doubtful, said)


def check_hooks(options):
    """Raise if bash refuses the command of --on-finish or --on-failure."""
    for option in HOOKS:
        command = options[option]
        status, _, complaint = ask_here(['bash', '-n', '-c', command]) if command else (0, b'', '')
        if status:
            why = complaint_line(complaint).partition(': line ')[2].partition(': ')[2]
            raise UsageError(sentence(f'{option}: bash refuses this command: {why}'))


def run_batch(options, machines, jobs, client, reporter, policy, told=()):
    """Connect, place, run, collect, clean up; return the exit status."""
    results, path, dry = client.results, options['<batch>'], options['--dry-run']
    # A job that runs once more keeps its own hardware, whatever the defaults are.
    allocation = jobs[0].allocation if 'reproduces' in policy.noted else read_allocation(options)
    lines = match_lines(jobs, name_of_batch(path), results)
    lines = lines._replace(gone=tuple(job._replace(allocation=allocation._replace(gpus=len(gpus_of(
        results.journal.record(job.name)['gpus'])))) for job in lines.gone))
    plan = plan_reruns(plan_lines(lines, results, machines), options, results, reporter)
    lines = plan.lines
    policy = policy._replace(
        forwards=None if dry else read_forwards(options),
        cluster_after_s=0.0 if dry else policy.cluster_after_s,
        want_gpus=allocation.gpus > 0 or any(job.allocation.gpus for job in lines.waiting))
    kind = TerminalView if reporter.can_draw and not dry else BatchView
    view = kind(reporter, results, plan, allocation, options, path, told)
    workers = workers_for(machines, client, reporter)
    run = Run((*lines.jobs, *lines.gone), workers, client, view, policy)
    run.wishes.again.update(plan.again)
    desk = Desk(run, options, Inbox(results, name_of_batch(path)), reporter)
    with interruptible(run.interrupt):
        try:
            take_up_lines(run, plan)
            view.open()
            view.names()
            desk.open(dry)
            results.journal.preface = [{'event': 'begun', 'batch': name_of_batch(path),
                                        'time': round(time.time(), 3)}]
            has_work = run.scheduler.waits or run.lives.all_of(*ALIVE) or any(
                results.kept(worker.machine.address) for worker in workers)
            if has_work:
                begin_batch(run, client.files, lines)
                view.limits([worker for worker in workers if worker.state == 'ready'])
                if not run.fleet.count('connecting'):
                    view.check_room()
            view.skipped()
            if dry:
                view.dry_run()
                return 0
            with contextlib.suppress(*[FilesError] * (not has_work)):
                view.changed_files(client.files)
            return finish_batch(run, view, reporter, has_work)
        finally:
            view.end()
            desk.close()
            reporter.close_screen()
            close_all(run.workers, client, lambda: run.interrupts > 1)


def plan_reruns(plan, options, results, reporter):
    """Return the Plan in which the jobs of --rerun or --rerun-failed run again."""
    lines = plan.lines
    if options['--rerun-failed']:
        names = failed_jobs(plan)
        if not names:
            reporter.note('--rerun-failed: no job of the batch has failed')
    else:
        names = jobs_named(options['--rerun'] or (), {job.name: job for job in lines.jobs},
                           options['<batch>'], reporter.note)
    names = {*names}
    begun = [job.name for job in lines.begun if job.name in names]
    if begun:
        raise UsageError(f'{names_of(begun)} may still run. First: '
                         f'{typed_for(options["<batch>"], "--cancel", *begun)}')
    again = [job for job in lines.done if job.name in names]
    if not options['--dry-run']:
        check_known(results, [job.name for job in again])
    plan = without_results(plan, names)
    waiting = tuple(sorted((*lines.waiting, *again), key=lambda job: job.line))
    return plan._replace(lines=plan.lines._replace(waiting=waiting),
                         again=tuple(job.name for job in again))


def take_up_lines(run, plan):
    """Give the jobs of a Plan to the scheduler; take up those that an earlier run has begun."""
    journal, lines = run.client.journal, plan.lines
    for job in lines.waiting:
        run.scheduler.add(job)
    worker_at = by_address(run.workers)
    for job in sorted((*lines.begun, *lines.gone), key=lambda job: job.line):
        if job.name not in plan.elsewhere:
            record = journal.record(job.name)
            run.take_up(job, worker_at[record['machine']], record)


def begin_batch(run, files, lines):
    """Log in to all machines; meanwhile look at the files."""
    run.fleet.log_in()
    for job in lines.jobs:              # an unreadable file is an error before anything starts
        if run.policy.forwards:
            files.manifest(job.forwards)
    for forwards in {job.forwards for jobs in run.scheduler.kinds().values() for job in jobs}:
        run.view.tell(forwards and advise_on_size(files.trees(forwards)[0], len(run.workers)))
    for text in files.warnings(
            {job.forwards for jobs in run.scheduler.kinds().values() for job in jobs},
            [worker.machine for worker in run.workers]) if run.policy.forwards else ():
        run.view.warn(text)
    run.fleet.meet()


def finish_batch(run, view, reporter, has_work):
    """Run the rest of a batch; return the exit status."""
    view.begin()
    try:
        if has_work:
            run.open()
            run.loop()
        if run.leaves:
            view.leaving()
        elif run.interrupts:
            view.stopping()
            run.cancel()
    finally:
        view.end()
    return view.summary()


def jobs_as_asked(options, text, jobs, words):
    """Return the Jobs of a batch file with the hardware that its client asks for.

    text: of the batch file; jobs: the Jobs by these options: right if an option is for hardware
    words: the options of the client that ran the batch last, or None.  If they cannot be read, the
    allocation of each Job is None.
    """
    if jobs is None or hardware_words(options):
        return jobs
    with contextlib.suppress(SchedulerError, TypeError):        # words of another version
        asked = read_options(EXECUTE_BATCH_USAGE, [*words, '--', options['<batch>']])
        return read_jobs(options['<batch>'], text, asked, ignore)
    return [job._replace(allocation=None) for job in jobs]


def show_status(call, reporter):
    """Show how far each job is (--status), once, or repeatedly until all have ended.

    Return the exit status: 0 if all have finished.
    """
    options, text, jobs, name = call
    interval, exit_status = read_interval(options, LEAST_REDRAW_S), 130
    try:
        while True:
            results = ResultStore('job_results').peek(times=True)
            holder = results.lock.holder
            words = holder.asks if holder and holder.run == name else None
            found = BatchStatus(jobs_as_asked(options, text, jobs, words), name, results, holder)
            exit_status, chosen = found.exit_status, found.chosen(options)
            if options['--json']:
                reporter.show(found.json_lines(chosen), False)
            else:
                rows = reporter.rows if interval and reporter.rows else math.inf
                reporter.show(found.lines(chosen, reporter, rows), interval)
            if interval is None or found.is_over or reporter.nobody_reads:
                return exit_status
            time.sleep(interval)
    except KeyboardInterrupt:
        return exit_status if interval else 130


STARTS_AGAIN = ('The next run of the batch starts cancelled jobs again. To prevent that, delete '
                'their lines')


def cancel_batch(call, reporter):
    """Cancel jobs of a batch, whatever their state (--cancel).

    Return the exit status: 0 if none may still run.
    """
    options, _, jobs, name = call
    results = ResultStore('job_results')
    if options['--cancel']:
        answer = Inbox(results, name).ask('cancel', jobs=[*options['--cancel']])
        if answer:
            status = tell_answer(answer, reporter)
            if not all(line.endswith('has ended') for line in answer.lines):
                reporter.note(STARTS_AGAIN)
            return status
    try:
        before = {}
        if options['--cancel']:
            open_results(results)
        else:
            holder = results.lock.holder
            if holder and holder.run.endswith(FOLLOWED):
                Inbox(results, holder.run).ask('let go')
            before = results.take_over(name, reporter.note)
        lines = match_lines(jobs, name, results)
        named = {job.name: job for job in (*lines.jobs, *lines.gone)}
        words = options['--cancel']
        chosen = {*jobs_named(words, named, options['<batch>'], reporter.note)} if words else None
        return cancel_alone(results, name, named, reporter, options['--machines'], before, chosen)
    finally:
        results.close()


def cancel_alone(results, batch, named, reporter, words=None, before=None, chosen=None):
    """Cancel jobs of a batch that no client runs; return the exit status.

    named: {name: Job}; words: the machines; if None, those of the jobs
    before: {name: record} before the client of the batch was stopped, if one ran
    chosen: names of the jobs to cancel; None: all
    """
    journal, before = results.journal, before or {}
    claimed = {job: known for job, known in journal.jobs.items()
               if (job in named or is_of_batch(job, known, batch)) and (
                   journal.is_begun(job) or before and any(
                       known.get(key) != before.get(job, {}).get(key)
                       for key in ('state', 'attempt')))
               and (chosen is None or job in chosen)}
    for job in sorted((chosen or set()) - claimed.keys()):
        reporter.line(f'{job}: ' + ('has ended' if results.is_done(job) else
                                    'does not run, since no client runs the batch. The same '
                                    'command starts it, unless you delete its line'))
    if chosen and not claimed:
        return 0
    words = words or dict.fromkeys(known['where'] for job, known in claimed.items()
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
            client.close()


def cancel_claimed(run, claimed, named, reporter):
    """Stop the jobs of an earlier run; report the state of each; return the exit status.

    claimed: {job name: its record in the journal}; named: {job name: Job} of the batch file
    """
    journal = run.client.journal
    # The journal has these as cancelled or lost, but their machine may not have confirmed it.
    unsure = {name for name, known in claimed.items()
              if known['key'] in journal.remains(known['machine'])[1]}
    worker_at = by_address(run.workers)
    for name, known in claimed.items():
        worker = worker_at.get(known['machine'])
        if worker and journal.is_begun(name):
            run.take_up(named[name], worker, known)
    run.interrupts = 1                  # from now on no event starts a job
    run.fleet.log_in()
    run.client.wait_while(
        lambda: any(worker.state == 'connecting' or worker.state == 'ready' and (
            run.lives.any_of(worker, 'claimed')
            or worker.busy and not run.lives.any_of(worker, *ALIVE)) for worker in run.workers),
        time.monotonic() + CONNECT_LIMIT_S, lambda: run.interrupts > 1)
    unsure |= {attempt.name for attempt in run.cancel()}
    left, cancelled = 0, []
    for name, known in claimed.items():
        state = journal.record(name)['state'] if name not in unsure else ''
        what = {'collected': 'had ended, and is collected', 'cancelled': 'stopped',
                'lost': 'did not run'}.get(state)
        left += what is None
        cancelled += [name] * (state != 'collected')
        reporter.line(f'{name}: {what or "may still run"}, on '
                      f'{known.get("where") or known["machine"]}')
    may_run = f', {left} may still run' if left else ''
    reporter.line(f'cancelled: {count_of(len(cancelled), "job")}{may_run}')
    if any(name in named and named[name].line for name in cancelled):
        reporter.note(STARTS_AGAIN)
    return 130 if run.interrupts > 1 else 1 if left else 0


def drop_machines(call, reporter):
    """Have the client that runs a batch give machines back; return the exit status."""
    options, _, jobs, name = call
    results, words = ResultStore('job_results'), [*machine_words(options['--drop-machine'])]
    answer = Inbox(results, name).ask('give back', machines=words, now=options['--now'])
    if answer:
        return tell_answer(answer, reporter)
    try:
        open_results(results)
        addresses = {machine.address for machine in find_machines(words)[0]}
        lines = match_lines(jobs, name, results)
        named = {job.name: job for job in (*lines.begun, *lines.gone)}
        there = [job for job in named if results.journal.record(job)['machine'] in addresses]
        if there and options['--now']:
            return cancel_alone(results, name, named, reporter, chosen={*there})
        reporter.line(f'no client runs {name}, so no job starts on {names_of(words)}'
                      + (f'. {count_of(len(there), "job")} may still run there; the same command '
                         'with --now cancels what runs there' if there else ''))
        return 0
    finally:
        results.close()


def wait_for_batch(call, reporter):
    """Wait until the client that runs a batch has ended (--wait); return its exit status."""
    name = call.name
    results = ResultStore('job_results')
    first = results.lock.holder
    if first and first.run == name and first.lives is None:
        raise ResultsError(f'{name} was started on {printable(first.computer)} (process '
                           f'{first.pid}): wait on that computer.')
    now, is_run = first, bool(first and first.run == name and first.lives)
    while now and now.run == name and now.lives and now.pid == first.pid:
        time.sleep(WATCH_S)
        now = results.lock.holder
    found = BatchStatus(call.jobs, name, ResultStore('job_results').peek(), None)
    if not is_run and not found.is_over:
        reporter.note('no client runs this batch, so there is nothing to wait for. To continue it, '
                      'type the command that started it')
    reporter.line(found.counts())
    noted = results.lock.noted_status if first and first.run == name else None
    return found.exit_status if noted is None else noted


def follow_job(call, reporter):
    """Show what a job prints until it has ended (--follow); return its exit status."""
    options, _, jobs, name = call
    results, path = ResultStore('job_results').peek(), options['<batch>']
    lines = match_lines(jobs, name, results)
    (job,) = jobs_named([options['--follow']], {job.name: job for job in (
        *lines.jobs, *lines.gone)}, path, reporter.note)
    return JobWatch(job, name, results, reporter, path=path).run()


class JobWatch:
    """Shows what a job of a batch prints, until it has ended.

    While a client runs the batch, only that client has contact with the machine.  It fetches the
    output into job_results, where this class reads it.  If no client runs, a JobWatch connects.

    ports: Ports to open if it connects; processes: the Processes to wait with, its own by default
    path: the batch file that the user named, if any
    """

    def __init__(self, name, batch, results, reporter, ports=None, processes=None, path=None):
        self._name, self._batch, self._path = name, batch, path
        self._results, self._report = results, reporter
        self._ports, self._processes = ports, processes
        self._shown = {'out': 0, 'err': 0}      # how many bytes of each stream
        self._attempt, self._said = 0, ''

    def run(self):
        """Return the exit status of the job; 1 if it has none."""
        while True:
            status = self._watch()
            if status is not None:
                return status
            holder = self._results.lock.holder
            if holder and holder.lives and not self.client_lives:
                self._tell(f'{self._name}: waits for process {holder.pid}, which has job_results '
                           f'({printable(holder.run)})')
            time.sleep(5 * WATCH_S)         # for a client to take the folder

    def _watch(self):
        """Return the exit status; None if another command has or wants the folder."""
        processes = self._processes or Processes()
        streams = OwnStreams(processes)
        try:
            while True:
                # In this order: if the client has ended, `_look` finds all that it wrote.
                client_lives, known = self.client_lives, self._look()
                state = known.get('state')
                if state in ('claimed', 'ended', 'collected'):
                    self._pass_on(known, streams)
                if streams.nobody_reads:
                    return 128 + signal.SIGPIPE
                if state == 'collected':
                    return known['exit_code']
                if self._is_unwanted(state) or not client_lives:
                    break
                if state not in ('claimed', 'ended'):
                    self._tell(f'{self._name} waits')
                elif state == 'claimed' and known.get('queued'):
                    self._tell(f'{self._name} is {queue_words("", *known["queued"])}')
                processes.wait(WATCH_S)
        finally:
            if not self._processes:
                processes.close()
        if state in ('claimed', 'ended') and not client_lives:
            return attach_to_batch_job(self._name, self._report, self._shown, self._ports,
                                       self._path)
        self._report.note(f'{self._name} was cancelled' if client_lives else
                          f'{self._name} waits, and no client runs {self._batch}. To run it, type '
                          'the command that started the batch')
        return 1

    def _is_unwanted(self, state):
        """Tell whether the running client will not start the job, since it was cancelled."""
        holder = self._results.lock.holder
        return state not in ('claimed', 'ended') and bool(holder) and (
            self._results.journal.unwanted.get(self._name) == holder.pid)

    def _look(self):
        """Return the current record of the job in the journal."""
        with contextlib.suppress(FileNotFoundError):
            self._results.journal.read_on()
        return self._results.journal.record(self._name)

    @property
    def client_lives(self):
        """Tell whether a client runs the batch, or another command follows the job."""
        holder = self._results.lock.holder
        return bool(holder and holder.lives and holder.run in (
            self._batch, f'{self._name}{FOLLOWED}'))

    def _tell(self, text):
        if text != self._said:
            self._said = text
            self._report.note(text)

    def _pass_on(self, known, streams):
        """Pass on the new bytes of both streams."""
        if self._attempt not in (0, known['attempt']):
            self._tell(f'{self._name} has started again (attempt {known["attempt"]})')
            self._shown = {'out': 0, 'err': 0}
        self._attempt = known['attempt']
        for stream in self._shown:
            path = os.path.join(self._results.folder, f'{self._name}.{stream}')
            with contextlib.suppress(OSError):
                # Until this attempt has written output, an earlier one's may lie there.
                if known['attempt'] > 1 and os.stat(path).st_mtime < (known.get('time') or 0):
                    continue
                for data in self._results.read(self._name, stream, self._shown[stream]):
                    self._shown[stream] += len(data)
                    streams.write(stream, data)


# The options of execute_batch that do not run the batch, but act on it: option -> function.
ASKED = {'--status': show_status, '--cancel': cancel_batch, '--follow': follow_job,
         '--wait': wait_for_batch, '--drop-machine': drop_machines}


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
    """Begin to fetch the results of the OtherJobs that have ended, under names that are free."""
    results, journal = run.client.results, run.client.journal
    names = {journal.record(name)['key']: name for name in journal.jobs if journal.is_begun(name)}
    for job in jobs:
        if job.state != 'ended':
            continue
        name = names.get(job.key)           # claimed by an --earlier=collect that was cut off
        if not name or results.exists(name):
            name = free_name(f'{job.name}-earlier', lambda name: results.exists(name)
                             or name in journal.jobs)
        if name not in names.values():
            journal.write(event='claimed', job=name, attempt=1, machine=worker.machine.address,
                          gpus=None, command=job.command, key=job.key, where=worker.machine.word,
                          batch=None)
        run.take_up(Job(name, job.command, 0, None, None), worker, journal.record(name))
    worker.ask()


# The checks of --check, in the order in which they can fail.  If a machine cannot be used, its
# list ends with the check that failed, one of CHECKS or 'engine'.
CHECKS = ('machine file', 'key file', 'host name', 'port', 'host key', 'login', 'start files',
          'bash', 'folder', 'account', 'login shell', 'space', 'inodes', 'rsync')
OF_MACHINES = ('memory', 'cores', 'GPUs', 'logout')
OF_CLUSTERS = ('engine', 'partition', 'job')
LAST_CHECKS = ('clock', 'shared folder')
OVER_SSH = CHECKS[1:7]              # not of localhost
# (Pattern of a message of this program, the check that failed); no pattern fits: the login.
FAILED_CHECKS = (
    (r'host name .* is unknown|name server|finds no address|host name that', 'host name'),
    (r'the host key of', 'host key'),
    (r'nothing listens|cannot be reached|did not answer in time|closed the connection before'
     r'|can(not| not)? connect|could not connect|forbids connections|no method in common'
     r'|ProxyCommand needs', 'port'),
    (r'start files', 'start files'),
    (r'no bash|bash has version', 'bash'),
)
# The same for messages of the remote runner; no pattern fits: the login shell.
FAILED_THERE = (
    (r'bash has version', 'bash'),
    (r'the same account', 'account'),
    (r'cannot write there|older ssh-scheduler', 'folder'),
    (r'its engine (is missing|cannot be asked)', 'engine'),
)
CLOCK_LIMIT_S = 5.0                 # by which the clock of a machine may differ
LOW_MB, LOW_INODES = 2000, 5000     # a disk with less than this left gets a note
CHECK_JOB_S = 120.0                 # for the job of a check to begin on a cluster
CHECK_LIMIT_S = 60.0                # for it to run
WAIT_FOR_NODES = 'Jobs wait until one is in service again. To look at them, there: sinfo -R'


def chosen_partitions(partitions, options):
    """Return those of the Partitions in which a job with these engine_options may run.

    If no partition is named, these are the nodes of the default one, or all if there is none.
    """
    words = [word.partition('=')[2] for word in options if re.match('--part[a-z]*=', word)]
    if words:
        return [part for part in partitions if part.name in words[-1].split(',')]
    return [part for part in partitions if part.is_default] or partitions


def out_of_service(partitions):
    """Return the states of the nodes if none of them begins jobs; else ''."""
    if not all(part.is_out for part in partitions):
        return ''
    texts = collections.defaultdict(list)
    for part in partitions:
        reason = f' ({printable(part.reason)})' if part.reason else ''
        texts[part.name].append(f'{count_of(part.nodes, "node")} '
                                f'{"is" if part.nodes == 1 else "are"} {part.state}{reason}')
    return '; '.join(f'in {printable(name)} {", ".join(texts[name])}' for name in texts)


class Finding(NamedTuple):
    """A line of a check."""
    check: str                      # of CHECKS and the like
    mark: str                       # ok, note or WRONG
    text: str


class MachineCheck:
    """The check of one machine (--check); it is the `report` of the machine's Worker.

    word: as the user named it; error: why there is no Machine, a MachineFileError
    """

    def __init__(self, word, machine=None, error=None):
        self.word, self.machine, self._error = word, machine, error
        self.name = machine.name if machine else word
        self.worker = None
        self.settings = {}                  # of ssh for this host: option -> value
        self._knows_key = False             # the host key was known before
        self._notes = []                    # what the remote runner warned of

    def warning(self, text):
        """Keep a warning of the Worker."""
        self._notes.append(text.removeprefix(f'{self.name}: '))

    def sent(self, *_):
        """Ignore that files were sent."""

    left = survivors = sent

    # Asking

    def begin(self):
        """A flow: ask ssh for its settings, then begin to log in."""
        worker, machine = self.worker, self.machine
        if machine.host:
            self.settings = yield from ssh_settings(machine, worker.client, f'{worker.number}.0')
            yield from self._look_for_host_key()
        worker.connect(checks=True)
        self._ask_more()
        worker.probe()

    def _ask_more(self):
        """Ask, before the probe, what only a machine of this kind knows."""

    def _look_for_host_key(self):
        """A flow: find out whether the host key is known."""
        name, port = self.settings.get('hostkeyalias'), self.settings.get('port', '22')
        self._knows_key = False
        if not name:
            name = self.settings.get('hostname', '')
            name = name if port == '22' else f'[{name}]:{port}'
        files = ' '.join(self.settings.get(f'{whose}knownhostsfile', '')
                         for whose in ('user', 'global')).split()
        for path in filter(os.path.isfile, map(os.path.expanduser, files)):
            end = yield self.worker.client.processes.start(
                ['ssh-keygen', '-F', name, '-f', path], ignore, None, has_input=False)
            self._knows_key = self._knows_key or end.status == 0

    def go_on(self, run):
        """Begin what the check needs next."""

    def is_done(self, _run):
        """Tell whether the check is complete."""
        return not self.worker or self.worker.state in ('ready', 'failed', 'closed')

    # What was found

    def findings(self):
        """Return (Findings, the names of the checks that were not made)."""
        names = [*CHECKS, *(OF_CLUSTERS if self.machine and self.machine.engine else OF_MACHINES),
                 *LAST_CHECKS]
        if self.machine and not self.machine.host:
            names = [name for name in names if name not in OVER_SSH]
        failed, why = self.failure()
        found = []
        for place, name in enumerate(names):
            if name == failed:
                return [*found, Finding(name, 'WRONG', why)], names[place + 1:]
            answer = getattr(self, f'_{name.replace(" ", "_").lower()}')() or ()
            found += [Finding(name, *one) for one in (
                answer if isinstance(answer, list) else [answer]) if one]
        return found, []

    def failure(self):
        """Return (the check that failed and ends the list, a sentence), or ('', '')."""
        if self._error:
            is_key = isinstance(self._error, KeyFileError)
            return 'key file' if is_key else 'machine file', str(self._error)
        worker = self.worker
        if worker.state != 'failed':
            return '', ''
        there = worker.contact.runs_bash
        failed = next((check for pattern, check in (FAILED_THERE if there else FAILED_CHECKS)
                       if re.search(pattern, worker.why)), 'login shell' if there else 'login')
        return failed, sentence(worker.why) + self._remedy(failed)

    def _remedy(self, failed):
        """Return a blank and what to do about a failed check; '' if the reason already says it."""
        machine, settings = self.machine, self.settings
        file = next(filter(os.path.isfile, machine_paths(self.word)), '')
        where = f'`{{}}` in {file}' if file else 'the name'
        if 'Try: ' in self.worker.why:
            return ''
        if failed == 'login' and 'was refused' in self.worker.why:
            import shlex
            key = ['-i', machine.ssh_key_path] if machine.ssh_key_path else []
            port = ['-p', settings['port']] if settings.get('port', '22') != '22' else []
            jump = ['-o', f'ProxyJump={machine.jump}'] if machine.jump else []
            user = settings.get('user') or machine.username
            return ' Try: ' + shlex.join(['ssh-copy-id', *key, *port, *jump, f'{user}@'
                                          f'{settings.get("hostname", machine.host)}'])
        if failed == 'host name':
            add = '' if file else f', or put `Host {machine.host}` into ~/.ssh/config'
            return (f' Correct {where.format("ip")}{add}. To look it up: getent hosts '
                    f'{machine.host}')
        if failed == 'port' and 'nothing listens' in self.worker.why:
            return (f' Correct {where.format("port")}, or start sshd there: sudo systemctl start '
                    'ssh')
        if failed == 'folder' and 'cannot write there' in self.worker.why:
            return f' Set {where.format("workdir")} to a folder that you can write there.'
        return ''

    def _note_with(self, words):
        return next((note for note in self._notes if words in note), '')

    def details(self, name):
        """Return the texts of a fact that a probe does not have."""
        return [value for key, value, _ in self.worker.gauge.details if key == name]

    def _detail(self, name):
        return next(iter(self.details(name)), '')

    # One method for each check: returns (mark, text), a list of these, or None for no line

    def _machine_file(self):
        path = next(filter(os.path.isfile, machine_paths(self.word)), '')
        return 'ok', path if path else ('this computer' if not self.machine.host else
                                        'none: ~/.ssh/config and ssh decide how to log in')

    def _key_file(self):
        return 'ok', self.machine.ssh_key_path or (
            'none in a machine file: ssh uses those of ~/.ssh/config and ssh-agent')

    def _host_name(self):
        way = f', over {self.machine.jump}' if self.machine.jump else ''
        return 'ok', self.settings.get('hostname', self.machine.host) + way

    def _port(self):
        return 'ok', f'sshd answers at port {self.settings.get("port", "22")}'

    def _host_key(self):
        return 'ok', 'known' if self._knows_key else 'new here: it is known from now on'

    def _login(self):
        return 'ok', f'as {self.settings.get("user") or "you"}'

    def _start_files(self):
        noise, holder = self.worker.contact.noise, self._detail('holder')
        advice = ' in terminals only, in ~/.bashrc behind this line: [[ $- == *i* ]] || return'
        if holder:
            return 'WRONG', (f'start {holder}, which holds each connection open, so rsync waits '
                             f'for its end. Let them start it{advice}')
        return ('note', f'print {noise[:60]!r}, which rsync cannot stand, so files are sent with '
                f'tar. Let them print{advice}') if noise else ('ok', 'print nothing')

    def _bash(self):
        return 'ok', f'version {self._detail("bash").partition("(")[0]}'

    def _folder(self):
        note = self._note_with('its workdir is on a file system')
        return ('WRONG', sentence(note)) if note else ('ok', self._detail('folder'))

    def _account(self):
        return None             # only two names of one account are worth a line

    def _login_shell(self):
        note = self._note_with('the login shell did not report its environment')
        if note:
            return 'WRONG', (f'{sentence(note)} Let its start files neither wait nor exit: look at '
                             f'~/.bashrc and ~/.profile, or what {self._detail("shell")} reads')
        return 'ok', self._detail('shell')

    def _disk(self):
        """Return (MB free, inodes free, inodes, kind of file system); 0 is unknown."""
        free, left, inodes, kind, _ = (self._detail('disk') + '    ').split(' ', 4)
        return whole_number(free), whole_number(left), whole_number(inodes), kind

    def _space(self):
        free_mb, _, _, kind = self._disk()
        if free_mb >= LOW_MB:
            return 'ok', f'{free_mb / 1024:.1f} GB free ({kind})'
        return 'note', (f'only {free_mb} MB are free where jobs run. To see the largest files: '
                        f'du -sh {self._detail("folder")}')

    def _inodes(self):
        _, left, inodes, _ = self._disk()
        if not inodes:
            return None         # as on btrfs
        if left >= LOW_INODES:
            return 'ok', f'{left} free'
        return 'note', (f'only {left} more files and folders fit where jobs run. Remove some: '
                        f'du --inodes -s {self._detail("folder")}')

    def _rsync(self):
        there = self._detail('rsync')
        if there and is_program('rsync'):
            return 'ok', f'version {there}'
        where = 'here' if there else 'there'
        return 'note', (f'is not {where}, so tar sends all files again each time. Install it '
                        f'{where}: sudo apt install rsync')

    def _memory(self):
        have = self.worker.capacity
        return 'ok', f'{free_gb(have.memory_mb, have.total_memory_mb)} free'

    def _cores(self):
        have = self.worker.capacity
        return [('ok', f'{free_of(have.cores, have.total_cores)} free'), self._unused_engine()]

    def _unused_engine(self):
        """Return a note if this is a machine of a cluster, whose file does not say so."""
        parts = [printable(part.rstrip('*')) for part in self.details('partition')]
        if not parts:
            return None
        file = next(filter(os.path.isfile, machine_paths(self.word)), '')
        how = (f'add this line to {file}: engine: slurm' if file else
               f'write a machine file: execute_to --init {self.word}')
        noun = 'partition' if len(parts) == 1 else 'partitions'
        return 'note', (f'Slurm is there, with the {noun} {", ".join(parts)}, but jobs would run '
                        'on this machine itself. To use Slurm, '
                        f'{how if self.machine.host else "name a login node"}')

    def _gpus(self):
        have, lines = self.worker.capacity, []
        for gpu in have.gpus:
            users = f', used by {", ".join(map(printable, gpu.users))}' if gpu.users else ''
            jobs = f', {count_of(gpu.batch_jobs, "batch job")}' if gpu.batch_jobs else ''
            lines.append(('ok', f'{gpu.index}: {printable(gpu.name)}, '
                          f'{free_gb(gpu.memory_mb, gpu.total_memory_mb)} free{users}{jobs}'))
        trouble = have.gpu_trouble or have.lost_gpus
        if trouble in (NO_NVIDIA_SMI, 'has an nvidia-smi, but no GPU'):
            return 'note', (f'{sentence(f"none: it {trouble}")} Jobs need --no-gpu-required to '
                            'run here')
        if trouble:
            lines.append(('WRONG', f'{sentence(f"it {trouble}")} Look there: nvidia-smi'))
        return lines

    def _logout(self):
        if self._detail('logout') != 'kills':
            return 'ok', 'nothing known stops jobs when the connection is lost'
        return 'WRONG', ('logind ends all that a login leaves, so jobs end when the connection is '
                         'lost. Ask for KillUserProcesses=no in /etc/systemd/logind.conf; with '
                         'elogind, loginctl enable-linger is enough')

    def _clock(self):
        told, came = next(((whole_number(value), when) for key, value, when
                           in self.worker.gauge.details if key == 'clock'), (0, 0))
        ahead_s = told - int(came)
        if abs(ahead_s) <= CLOCK_LIMIT_S:
            return 'ok', f'{abs(ahead_s)} s from the one here'
        where = 'ahead of' if ahead_s > 0 else 'behind'
        return 'note', (f'it is {duration_of(abs(ahead_s))} {where} the one here, so times of '
                        'files and jobs mislead. Set it there: sudo timedatectl set-ntp true')

    def _shared_folder(self):
        """Name the machines of this check that see the same folder."""
        batch, run = self.worker.client.batch_id, self.worker.run
        parts = [value.rpartition('.')[0].rpartition('.') for key, value, _
                 in self.worker.gauge.details if key == 'beside']
        names = dict.fromkeys(worker.name for worker in run.workers for part in parts
                              if part[::2] == (batch, str(worker.number)))
        return names and ('ok', f'{", ".join(names)} has the same home, which is safe: the jobs of '
                                'each have folders of their own. Files that jobs write elsewhere '
                                'in the home are shared')


class ClusterCheck(MachineCheck):
    """The check of a cluster, which runs a job there."""

    def __init__(self, word, machine):
        super().__init__(word, machine)
        self._needs = {}                    # type of GPU, or '' for no GPU -> as cluster_need
        self._job_since = self._waits_for = None    # when the cluster got ready; why its job ended

    def _ask_more(self):
        self._needs = {'': cluster_need(Allocation(gpus=0), None), **{
            name: cluster_need(Allocation(), ((mb, name),)) for mb, name in
            self.machine.gpu_types or () if mb >= Allocation().gpu_memory_mb}}
        self.worker.contact.send('fits', *(
            field for need in self._needs.values() for field in (need, f'{CHECK_LIMIT_S:.3f}')))

    def go_on(self, run):
        """Run a job as soon as there is contact; stop it if it does not begin."""
        worker, job = self.worker, worker_job(run, self.worker)
        if not job or worker.state != 'ready':
            return
        if self._job_since is None:
            self._job_since = time.monotonic()
            if not self._needs_no_job():
                run.start(job, worker)
        elif (self._waits_for is None and time.monotonic() > self._job_since + CHECK_JOB_S
              and not run.lives.any_of(worker, 'running')):
            self._waits_for = next((attempt.place.why for attempt in run.lives.of(worker, *ALIVE)
                                    if attempt.place and attempt.place.why), 'nobody knows why')
            worker.stop()

    def is_done(self, run):
        """Tell whether the check is complete."""
        return super().is_done(run) and (
            self.worker.state != 'ready' or not worker_job(run, self.worker)
            or self._job_since is not None and not self.worker.busy)

    def _needs_no_job(self):
        """Tell whether a job would surely not run on this cluster."""
        return (self._note_with('does not answer') or self._refusal('')
                or out_of_service(self._partitions()))

    def _refusal(self, kind):
        """Return why the engine refuses a job with a GPU of this type, or with none ('')."""
        return self.worker.queue.refusals.get(self._needs[kind], '')

    def _partitions(self):
        return chosen_partitions(self.worker.capacity.queue.partitions,
                                 self.machine.engine_options)

    # What was found: see MachineCheck

    def _engine(self):
        note = self._note_with('does not answer')
        return ('WRONG', f'{sentence(note)} Try there: sinfo') if note else (
            'ok', self.worker.capacity.queue.engine)

    def _partition(self):
        if self._note_with('does not answer'):
            return None         # the check before this one tells
        options, parts, why = self.machine.engine_options, self._partitions(), self._refusal('')
        named = f' with {" ".join(options)}' if options else ''
        out = out_of_service(parts)
        if out:                 # the engine would refuse a test, but not a job
            return 'note', f'no node takes jobs now: {out}. {WAIT_FOR_NODES}'
        if why:
            return 'WRONG', (f'it refuses a job{named}: {sentence(why)} Correct engine_options in '
                             f'{self.word}; the partitions: sinfo')
        names = dict.fromkeys(part.name for part in self.worker.capacity.queue.partitions)
        return [('ok', f'takes jobs{named}: {", ".join(names)}'),
                *(self._gpu_type(kind, parts) for kind in self._needs if self._refusal(kind))]

    def _gpu_type(self, kind, parts):
        """Return (mark, text) for a type of GPU with which the engine refuses a job."""
        out = out_of_service([part for part in parts if kind in part.gpu_types])
        if out:
            return 'note', f'no node with GPUs of the type {kind} takes jobs now: {out}. ' + (
                WAIT_FOR_NODES)
        types = sorted({name for part in parts for name in part.gpu_types})
        known = (f'Its types are {", ".join(types)}.' if types else
                 'Slurm knows no types of its GPUs.' if any(part.gpus for part in parts) else
                 'Its nodes have no GPUs.')
        return 'WRONG', (f'it refuses a job with a GPU of the type {kind}: '
                         f'{sentence(self._refusal(kind))} {known} Correct gpu_types in '
                         f'{self.word}')

    def _job(self):
        run, worker = self.worker.run, self.worker
        word, what = run.fleet.standing[worker].outcome or ('', '')
        if self._needs_no_job():
            return 'note', 'none was submitted'
        if self._waits_for:
            return 'note', (f'it did not run within {duration_of(CHECK_JOB_S)} and was taken back '
                            f'({self._waits_for}). To look at the queue: squeue')
        if (word, what) == ('ended', 0):
            said = b''.join(run.client.results.read(worker_job(run, worker).name, 'out')).decode(
                'utf-8', 'replace')
            return 'ok', f'ran on {printable(said.strip())}, which sees {self._detail("folder")}'
        why = f'it failed with exit code {what}' if word == 'ended' else what
        return 'WRONG', sentence(why) + ('' if 'workdir' in why else (
            ' To see what became of it, there: sacct -S now-1hour'))


def worker_job(run, worker):
    """Return the Job that a check runs on a cluster, or None."""
    return run.fleet.bound.get(worker)


def ssh_settings(machine, client, number):
    """A flow: return {option: value} that ssh would use for a machine: the first value of each.

    number: one that no other Connection of this run has
    """
    connection, said = Connection(machine, client.run_folder, number), bytearray()
    write_configurations(connection)
    yield client.processes.start(connection.settings(), said.extend, None, has_input=False)
    settings = {}
    for line in said.decode('utf-8', 'replace').splitlines():
        name, _, value = line.partition(' ')
        settings.setdefault(name, value)
    return settings


def read_checks(words):
    """Return a MachineCheck for each word of --machines, whatever is wrong with it."""
    checks = []
    for word in machine_words(words):
        machine = error = None
        try:
            machine = find_machine(word)._replace(word=word)
            refuse_again(machine, [check.machine for check in checks if check.machine])
        except MachineFileError as caught:
            error = caught
        checks.append(MachineCheck(word, None, error) if error else
                      ClusterCheck(word, machine) if machine.engine else
                      MachineCheck(word, machine))
    return checks


def check_run(checks, client):
    """Return the Run of the machines of a check; each cluster gets a job."""
    bound = {}
    for number, check in enumerate(checks):
        if check.machine:
            check.worker = Worker(check.machine, client, number, check)
            if check.machine.engine:
                bound[check.worker] = Job(f'check.{number}', 'hostname', 0, None, Forwards(()), ())
    policy = Policy(probes=False, want_gpus=True, timeout_s=CHECK_LIMIT_S)
    return Run(bound.values(), [check.worker for check in checks if check.worker], client, View(),
               policy, bound)


def check_each_machine(options, reporter):
    """Print what is right and wrong with each machine (--check); return the exit status."""
    check_machines(options)
    checks = read_checks(options['--machines'])
    allow_files(len(checks))
    client = Client(None, reporter.trace, live=False, project=f'check-{os.urandom(8).hex()}')
    results = None
    try:
        if any(check.machine and check.machine.engine for check in checks):
            results = client.results = ResultStore(f'{client.run_folder}/results')
            results.open()
        run = check_run(checks, client)
        with interruptible(run.interrupt):
            try:
                wrong = await_checks(checks, run, reporter, options['--json'])
                if run.interrupts:
                    run.cancel()
            finally:
                close_all(run.workers, client, lambda: run.interrupts > 1)
        return 130 if run.interrupts else int(wrong or bool(reporter.trouble))
    finally:
        client.close()
        if results:
            results.close()


def await_checks(checks, run, reporter, as_json):
    """Show the checks in order, each when it is done; tell whether anything is wrong."""
    for check in checks:
        if check.worker:
            run.client.flows.start(check.begin())
    left, wrong = collections.deque(checks), False
    while left and not run.interrupts and not reporter.nobody_reads:
        for check in left:
            if check.worker:
                check.go_on(run)
        while left and left[0].is_done(run):
            wrong |= show_check(left.popleft(), reporter, as_json)
        if left:
            run.client.processes.wait(1)
    for check in left:
        reporter.note(f'{check.name}: {check.worker.unanswered("; interrupted")}'
                      if check.worker and check.worker.state == 'connecting' else
                      f'{check.name}: the check was interrupted')
    return wrong


def show_check(check, reporter, as_json):
    """Print the findings about a machine; tell whether anything is wrong."""
    findings, unchecked = check.findings()
    wrong = any(finding.mark == 'WRONG' for finding in findings)
    if as_json:
        reporter.line(json.dumps({
            'machine': check.name, 'is_usable': not wrong,
            'findings': [finding._asdict() for finding in findings], 'not_checked': unchecked}))
        return wrong
    reporter.line(printable(check.name))
    width = max(len(finding.check) for finding in findings) + 2
    for before, finding in zip([None, *findings], findings):
        head = '' if before and before.check == finding.check else finding.check
        reporter.finding(finding.mark, f'{head:{width}}{finding.text}'.rstrip())
    if unchecked:
        reporter.line(f'  not checked: {", ".join(unchecked)}')
    return wrong


# The options of execute_batch that need no batch file: option -> function.
WITHOUT_BATCH = {'--earlier': earlier_jobs, '--what': show_what, '--reproduce': reproduce,
                 '--check': check_each_machine}


@contextlib.contextmanager
def interruptible(handler):
    """Have SIGINT and SIGTERM call the handler, unless the parent process had them ignored."""
    before = {number: signal.signal(number, handler)
              for number in (signal.SIGINT, signal.SIGTERM)
              if signal.getsignal(number) not in (signal.SIG_IGN, deaf)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def execute_remote(argv):
    """Run one command on one machine; return its exit status, or 2, 125 or 130."""
    options = read_options(EXECUTE_REMOTE_USAGE, argv)
    reporter = Reporter(options['--verbose'], all_on_stderr=True)
    named = {name for name in ('--job-name', '--attach', '--cancel', '--shell')
             if options[name] is not None}
    if len(named) > 1:
        raise UsageError(f'{" and ".join(sorted(named))}: give one of them.')
    by_name = named - {'--job-name'}
    if not by_name and not options['--machine']:
        raise UsageError(f'--machine is missing.{HERE_TOO.format("--machine")}')
    refuse_file(options, EXECUTE_REMOTE_USAGE)
    if options['--machine']:
        words = [*machine_words([options['--machine']])]        # it may also be an @file
        refuse_more_machines(words)
        options['--machine'] = words[0]
    for one, other in (('--tty', '--detach'), ('--tty', '--stdin'), ('--detach', '--stdin'),
                       ('--detach', '--attach'), ('--tty', '--attach'), ('--stdin', '--attach'),
                       ('--detach', '--shell'), ('--tty', '--shell'), ('--stdin', '--shell'),
                       ('--forward', '--detach'), ('--forward', '--cancel')):
        if options[one] and options[other]:
            raise UsageError(f'{one} and {other}: give one of them.')
    name = (options[next(iter(named))] if named else
            take_name(new_name(options['<command>'])))
    check_job_name(name, next(iter(named), '--job-name'))
    ports = Ports(read_ports(options), reporter)
    if options['--shell']:
        return open_shell(name, options['--machine'], ports, reporter)
    batch = batch_of(name) if by_name else None
    if batch:
        return (cancel_batch_job(name, batch, reporter) if options['--cancel'] else
                watch_batch_job(name, batch, ports, reporter))
    results = ResultStore('job_results', f'commands/{name}')
    results.sent.limit_bytes = read_keep_files(options)
    try:
        before = results.take_over(name, reporter.note) if options['--cancel'] else {}
        if not options['--cancel']:
            open_own(results, name)
        order = CommandOrder(name, options, results, reporter, ports)
        answer = order.answer_from_journal(stopped=bool(before))
        return order.run() if answer is None else answer
    finally:
        results.close()


def job_that_runs(name, word=None):
    """Return (record, Machine, name of the folder on it) of any job that may run, even while a
    client runs it.

    word: the machine, as the user named it, or None
    """
    for part in (f'commands/{name}', ''):
        results = ResultStore('job_results', part).peek()
        known = results.journal.record(name)
        if known:
            break
    else:
        raise ResultsError(f'no job {name} has started in this folder'
                           f'{likely_job(name, results.journal.jobs)}. If it is one of a batch, '
                           'it may wait: execute_batch <batch> --status shows that.')
    if known['state'] == 'collected':
        raise ResultsError(f'the job {name} has ended, and its results are here: look at '
                           f'job_results/{name}')
    if known['state'] == 'again':
        raise ResultsError(f'the job {name} waits: it is to run again.')
    if known['state'] not in ('claimed', 'ended'):
        raise ResultsError(f'the job {name} does not run: it was {known["state"]}. To start it '
                           'again, type the command again that started it.')
    word = word or known['where']
    machine = find_machine(word)._replace(word=word)
    if known['machine'] != machine.address:
        raise ResultsError(f'the job {name} was started on {known["machine"]}, not on '
                           f'{machine.address}: name that machine, or none.')
    return known, machine, project_of(results)


def open_shell(name, word, ports, reporter):
    """Open a shell beside a job that runs (--shell); return its exit status.

    word: the machine, as the user named it, or None
    """
    known, machine, project = job_that_runs(name, word)
    ports.check(machine)
    client = Client(trace=reporter.trace, project=project)
    visit = Visit(machine, name, known['key'], client)
    try:
        visit.open()
        with interruptible(visit.interrupt):
            return visit.run(ports)
    finally:
        visit.close()
        client.close()


def batch_of(name):
    """Return the batch of the job with this name; None if execute_remote started the job."""
    if os.path.isdir(os.path.join('job_results', '.ssh_scheduler', 'commands', name)):
        return None
    results = ResultStore('job_results').peek()
    known, holder = results.journal.record(name), results.lock.holder
    if known:
        return known.get('batch') or name.rpartition('.')[0]
    # The journal does not have jobs that wait: only the client of their batch knows these.
    return holder.run if holder and holder.lives and name.startswith(f'{holder.run}.') else None


def cancel_batch_job(name, batch, reporter):
    """Cancel a job of a batch by its whole name; return the exit status."""
    results = ResultStore('job_results')
    answer = Inbox(results, batch).ask('cancel', jobs=[name])
    if answer:
        return tell_answer(answer, reporter, command='execute_remote')
    try:
        open_results(results)
        known = results.journal.record(name)
        if not known:
            raise ResultsError(f'{name} has not started, and no client runs {batch} any more.')
        job = Job(name, known['command'], 0, None, None, as_paths(known.get('backwards')))
        return cancel_alone(results, batch, {name: job}, reporter, chosen={name})
    finally:
        results.close()


def watch_batch_job(name, batch, ports, reporter):
    """Show what a job of a batch prints until it has ended (--attach); return its exit status."""
    results = ResultStore('job_results').peek()
    watch = JobWatch(name, batch, results, reporter, ports)
    if not (ports.pairs and watch.client_lives):
        return watch.run()
    # The client has the contact, but forwards no ports for other commands: so log in separately.
    known, machine, project = job_that_runs(name)
    ports.check(machine)
    client = Client(trace=reporter.trace, project=project)
    visit = Visit(machine, name, known['key'], client)
    try:
        visit.open()
        client.flows.start(ports.open(visit))
        return JobWatch(name, batch, results, reporter, processes=client.processes).run()
    finally:
        visit.close()
        client.close()


def attach_to_batch_job(name, reporter, shown, ports=None, path=None):
    """Show the output of a job of a batch that no client runs, and fetch its results at the end.

    Return its exit status; None if another command has the folder, or wants it.
    shown: {'out' or 'err': how many bytes were shown before}; updated if the command makes way
    path: the batch file that the user named, if any
    """
    results = ResultStore('job_results')
    inbox = Inbox(results, f'{name}{FOLLOWED}')
    try:
        try:
            results.open(f'{name}{FOLLOWED}')
        except FolderInUse:
            return None                 # a client has just begun, or another command follows, too
        options = read_options(EXECUTE_REMOTE_USAGE, [f'--attach={name}'])
        options['<batch>'] = path
        order = CommandOrder(name, options, results, reporter, ports or Ports((), reporter), shown,
                             inbox)
        answer = order.answer_from_journal(stopped=False)
        status = order.run() if answer is None else answer
        return None if order.makes_way else status
    finally:
        for number, _ in inbox.requests():
            inbox.answer(number, Answer())
        results.close()


# The most telling word of a command: the name of a script, or of a Python module.
TELLING = re.compile(
    r"""(?:^|[\s/=('"])(\w[\w-]*)\.(?:py|sh|bash|R|r|jl|pl|rb|js|lua|m)(?![\w.])"""
    r'|\bpython[0-9.]*(?:\s+-\w+)*?\s+-m\s+(?:\w+\.)*(\w+)', re.ASCII)


def new_name(command):
    """Return a name for an unnamed job, made of its command and the day: train-0412."""
    match = TELLING.search(command)
    word = (match[1] or match[2]) if match else first_program(command)
    plain = re.sub(r'[^A-Za-z0-9_.]+', '-', word)[:24].strip('-.') or 'command'
    return f'{plain}-{time.strftime("%m%d")}'


def first_program(command):
    """Return the first program of a command, after those that only change the shell, as cd."""
    for part in re.split(r'[;&|()\n]+', command):
        words = re.sub(r"""(?:^|(?<=\s))\w+=(?:"[^"]*"|'[^']*'|\S)*""", '', part).split()
        if words and words[0] not in SETTING_WORDS:
            return os.path.basename(words[0].strip('\'"'))
    return ''


def to_delete(results, name, with_journal=False):
    """Return the command that deletes the results of a job, and its own journal if asked for."""
    import shlex
    paths = results.paths_of(name) + [os.path.dirname(results.journal.path)] * with_journal
    return shlex.join(['rm', '-r', *paths])


def typed_for_job(option, name, path=None):
    """Return the command that attaches to a job or cancels it.  path: its batch file, if named"""
    if not path:
        return f'execute_remote {option}={name}'
    number = name_in_batch(name, name_of_batch(path)).removeprefix('.')
    return typed_for(path, option.replace('attach', 'follow'), number)


def print_name(name):
    """Print a job's name on stdout; return the exit status."""
    reporter = Reporter()
    reporter.line(name)
    return TRANSPORT_FAILED if reporter.trouble else 0


class CommandOrder:
    """One call of execute_remote: it starts, attaches to, shows again or cancels a job.

    shown: how many bytes of the job's output were shown already, see OwnStreams
    inbox: an Inbox or None; this call releases job_results for a command that has a request in it
    """

    def __init__(self, name, options, results, reporter, ports, shown=None, inbox=None):
        self._name, self._options, self._shown, self._inbox = name, options, shown, inbox
        self._results, self._report, self._ports = results, reporter, ports
        self._known = results.journal.record(name)
        self._mode = 'tty' if options['--tty'] else 'stdin' if options['--stdin'] else ''
        self.makes_way = self._has_begun = self._lacks_terminal = False
        self._unconfirmed = []              # Attempts that were told to stop, and may still run
        self._streams = None                # OwnStreams

    @property
    def _by_name(self):
        """Return the name of the job to watch or cancel; None if one is to start."""
        return self._options['--attach'] or self._options['--cancel']

    # Answers without contact to the machine

    def answer_from_journal(self, stopped):
        """Return the exit status if the journal suffices; None if not; raise if the call is wrong.

        stopped: another client of this job was stopped, to cancel it
        """
        options, name, known = self._options, self._name, self._known
        state, there = known.get('state'), self._results.exists(name)
        if self._by_name and not known:
            raise ResultsError(f'no job {name} was started from this folder: job_results knows '
                               'nothing of it.')
        if not self._by_name and known and known['command'] != options['<command>']:
            instead = (f'cancel it: execute_remote --cancel={name}'
                       if state in ('claimed', 'ended') else
                       f'delete it: {to_delete(self._results, name, True)}')
            raise ResultsError(f'the job {name} exists, with another command: '
                               f'{printable(known["command"])}. Choose another --job-name, or '
                               f'{instead}')
        if state == 'collected' and there:
            if self._results.kept(known['machine']) and not options['--cancel']:
                self._fetch_kept()
            return self._show_again()
        if there:
            raise ResultsError(f'there are results of {name} already. Choose another --job-name, '
                               f'or delete them: {to_delete(self._results, name)}')
        if stopped and state == 'cancelled':
            return self._tell_cancelled(
                known['where'],
                known['key'] not in self._results.journal.remains(known['machine'])[1])
        if self._by_name and state not in ('claimed', 'ended'):
            raise ResultsError(f'the job {name} does not run: it was {state}.')
        return None

    def _fetch_kept(self):
        """Try again to fetch files that could not be fetched after the end of the job."""
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
        """Print the output of a job that ended in an earlier run; return its exit status."""
        if self._options['--cancel']:
            self._report.note(f'{self._name}: it has ended already')
            return 0
        if self._options['--detach']:
            return print_name(self._name)
        self._report.warning(f'job results already exists for {self._name}, showing them: delete '
                             f'if you wish to rerun: {to_delete(self._results, self._name)}')
        changed = changed_since(self._results.sent.get(self._known.get('files')))
        if changed:
            self._report.note(f'files changed since: {names_of([*map(printable, changed)])}')
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

    # Work on the machine

    def run(self):
        """Start, watch or cancel the job on the machine; return the exit status."""
        options, known = self._options, self._known
        word = options['--machine'] or known['where']
        machine = find_machine(word)._replace(word=word)
        running = self._results.journal.is_begun(self._name)
        if running and known['machine'] != machine.address:
            raise ResultsError(f'the job {self._name} was started on {known["machine"]}, not on '
                               f'{machine.address}: name that machine, or choose another '
                               '--job-name.')
        self._ports.check(machine)
        hardware = options.given & set(option_kinds(HARDWARE_OPTIONS))
        allocation = read_allocation(options) if hardware else None
        client = Client(self._results, self._report.trace, live=bool(hardware),
                        nice=options.whole_number('--nice', least=0, most=19),
                        away_limit_s=options.seconds('--away-limit', least=0))
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
        """Return the Job; its forwards are None if it is only watched or cancelled."""
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
        self._streams = OwnStreams(client.processes, self._shown)
        is_silent = options['--detach'] or options['--cancel'] or self._mode == 'tty'
        how = How(self._mode, 0 if self._mode == 'stdin' else None)
        policy = Policy(
            probes=bool(job.allocation),
            want_gpus=bool(job.allocation and job.allocation.gpus), wants_others=True, how=how,
            timeout_s=options.optional('--timeout', options.seconds, above=0),
            noted={'where': self._known.get('where') or options['--machine'],
                   'detach': options['--detach'],
                   **({'input': self._mode} if self._mode in ('stdin', 'tty') else {})})
        view = BoundView(self._report, {} if is_silent else {worker: self._streams},
                         self._on_running, self._on_contact)
        return Run([job], [worker], client, view, policy, {worker: job})

    def _on_contact(self, worker):
        worker.contact.flows.start(self._ports.open(worker.contact))

    def _on_running(self, attempt):
        """Act when the command has begun, in this run or an earlier one, or a cluster queues it."""
        if attempt.state == 'queued':       # --detach and --cancel do not wait for its start
            self._has_begun |= bool({'--detach', '--cancel'} & self._options.given)
            return
        self._has_begun = True
        if self._mode == 'tty' and not attempt.is_inherited:
            client = attempt.machine.client
            client.flows.start(self._give_terminal(attempt))
        if attempt.is_inherited and not self._options['--cancel']:
            self._report.running(self._name, attempt.machine.name, self._known.get('time'))

    def _give_terminal(self, attempt):
        """A flow: give the command this terminal; note if the machine has no free terminal."""
        yield from attempt.machine.jobs.terminal(attempt)
        # The end of a job on a node of a cluster is reported later.
        yield 10 if attempt.machine.machine.engine else 2
        self._lacks_terminal = attempt.state in ALIVE

    def _finish(self, run, worker):
        """Run the job to its end, or as far as the options ask; return the exit status."""
        options, name, streams = self._options, self._name, self._streams
        if not (options['--job-name'] or self._by_name or options['--detach']):
            self._report.note(f'job {name} on {worker.name}')
        if not self._results.journal.is_begun(self._name):
            run.view.warn_of_files(run.client.files)

        def until():
            return (streams.nobody_reads or self._lacks_terminal or self.makes_way
                    or {'--detach', '--cancel'} & options.given and self._has_begun)

        def look():
            self.makes_way = self.makes_way or any(True for _ in self._inbox.requests())
            run.client.processes.call_later(REQUEST_S, look)

        if self._inbox:
            look()

        def interrupt(number, _):
            # Once the job has the terminal, Ctrl-C is for the job.
            if self._mode != 'tty' or number != signal.SIGINT or not self._has_begun:
                run.interrupt()

        with interruptible(interrupt):
            try:
                run.loop(until)
                if self.makes_way:
                    for stream, size in self._streams.passed.items():
                        self._shown[stream] = max(self._shown[stream], size)
                    return None
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
        """Stop the job, and print what became of it."""
        if worker.state == 'connecting':
            self._report.note(f'{worker.name}: {worker.unanswered("; interrupted")}')
        if not worker.busy or worker.state == 'failed' and not worker.was_ready:
            return
        attempts = run.lives.all_of(*ALIVE)
        self._unconfirmed = run.cancel()
        if self._unconfirmed:
            return
        state = self._results.journal.record(self._name).get('state')
        if state in ('claimed', 'ended'):
            self._tell_how_to_return(worker.name)
        elif attempts and attempts[0].never_began:
            self._report.note(removed_words(attempts[0]))
        elif state != 'collected' or self._options['--cancel']:
            self._tell_cancelled(worker.name)

    # Messages

    def _tell_cancelled(self, machine, surely=True):
        """Print that the job was stopped, and where its partial results are; return the status."""
        if not surely:
            self._report.unconfirmed(machine, self._name)
            return 1
        self._report.note(f'{self._name}: stopped on {machine}. Partial results are in '
                          f'{self._results.inner}/cancelled')
        return 0

    def _tell_how_to_return(self, machine):
        """Print what to type to return to the job, which this call no longer follows."""
        name, known = self._name, self._results.journal.record(self._name)
        watch, cancel = self._typed('--attach'), self._typed('--cancel')
        if known.get('state') == 'ended':
            self._report.note(f'{name}: it has ended, and its results are on {machine}: {watch} '
                              'fetches them')
        elif known.get('state') == 'claimed':
            does = 'waits in the queue of' if known.get('queued') else 'runs on'
            self._report.note(f'{name} {does} {machine}. To watch it again: {watch}  To cancel it: '
                              f'{cancel}')

    def _typed(self, option):
        return typed_for_job(option, self._name, self._options.get('<batch>'))

    def _unread(self):
        """Return the exit status for output that cannot be written; print why, if that is known."""
        if not self._streams.trouble:
            return 128 + signal.SIGPIPE
        self._report.note(f'{self._name}: {sentence(self._streams.trouble)}')
        return TRANSPORT_FAILED

    def _exit_status(self, run, worker):
        """Return the exit status, and report what went wrong."""
        name, options = self._name, self._options
        if run.interrupts:
            return 130
        if self._streams.nobody_reads:
            return self._unread()
        if self._lacks_terminal:
            self._report.note(f'{name}: {worker.name} has no free terminal.')
            return TRANSPORT_FAILED
        word, what = run.fleet.standing[worker].outcome or ('started', 0)
        if word == 'lost' and self._results.journal.record(name)['state'] == 'ended':
            what = (f'{worker.name}: connection lost: {sentence(what)} The job has ended; '
                    f'{self._typed("--attach")} fetches its results')
        elif word == 'lost':
            what = (f'{worker.name}: connection lost: {sentence(what)} The job keeps running; '
                    f'{self._typed("--attach")} shows its output')
        elif word == 'unreachable':
            what = f'{worker.name} cannot be used: {what}'
        if options['--cancel']:
            if word != 'started':
                self._report.note(f'{name}: it has ended already' if word == 'ended' else
                                  f'{name}: {what}')
            unsure = any(attempt.name == name for attempt in self._unconfirmed)
            return int(unsure or word not in ('started', 'ended', 'absent'))
        if word == 'started' or options['--detach'] and word == 'ended':
            return print_name(self._name)
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
    if options['--init'] is not None:
        return begin_machine_file(options, reporter)
    check_machines(options, 'command')
    refuse_file(options, EXECUTE_TO_USAGE)
    refuse_programs(options, '<command>')
    timeout_s = options.optional('--timeout', options.seconds, above=0)
    at_once = options.whole_number('--fanout', least=1)
    nice = options.whole_number('--nice', least=0, most=19)
    machines, wrong = usable_machines(options['--machines'], reporter)
    for machine in machines:
        if machine.engine:
            reporter.note(f'{machine.name} is a cluster: the command runs on its login node')
    machines = [machine._replace(engine='') for machine in machines]
    allow_files(min(len(machines), at_once))
    backwards = read_backwards(options) or ()
    forwards = read_forwards(options, Forwards(()))
    check_forwards(forwards)
    name, is_kept = options['--job-name'] or new_name(options['<command>']), bool(
        backwards or options['--job-name'])
    check_job_name(name, '--job-name')
    policy = Policy(probes=False, tied=True, at_once=at_once,
                    machine_timeout_s=timeout_s, how=How(keep=is_kept))
    if is_kept and not options['--job-name']:
        name = take_name(name)
    client = Client(None, reporter.trace, nice=nice, live=False)
    results = client.results = ResultStore(
        *(['job_results', f'commands/{name}'] if is_kept else [f'{client.run_folder}/results']))
    results.sent.limit_bytes = 0 if is_kept else None
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
    view.warn_of_files(client.files)
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
    """Return a machine's name in a form that can be part of a job's name."""
    return re.sub(r'[^A-Za-z0-9._+=@%-]', '_', name)[-100:]


def check_new(jobs, results):
    """Raise if two jobs have the same name, or if there are results of a job already."""
    names = collections.Counter(job.name for job in jobs)
    for name, count in names.items():
        check_job_name(name, '--job-name', 200)
        if count > 1:
            raise MachineFileError(f'two machines have results of the same name {name}.')
        if results.exists(name) or results.journal.record(name):
            raise ResultsError(f'there are results of {name} already. Choose another --job-name, '
                               f'or delete them: {to_delete(results, name, True)}')


def gather(jobs, outcomes, results, reporter, differences):
    """Print equal outputs once; differences: print the others as a diff against the first."""
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
    """Print a head and the output, with a newline at its end; print nothing without output."""
    printed = b''
    for piece in pieces:
        if not printed:
            reporter.raw(stream, f'---- {head}\n'.encode())
        reporter.raw(stream, piece)
        printed = piece
    if printed and not printed.endswith(b'\n'):
        reporter.raw(stream, b'\n')


LONGEST_DIFFERENCE = 2**20      # bytes; the time to compare grows with their square, at worst


def difference(results, first, other, stream, first_name, names):
    """Yield the lines of diff -u between a stream of the first job and that of another."""
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


SMALL_HOME_MB = 20_000              # suggest another workdir if the home has less free
NETWORK_DISKS = ('nfs', 'nfs4', 'lustre', 'gpfs', 'smb', 'smb2', 'cifs', 'ceph', 'fuseblk')
# Options to copy from ~/.ssh/config, unless the other keys of the machine file imply them.
KEPT_SSH_OPTIONS = ('proxycommand', 'hostkeyalias', 'userknownhostsfile', 'certificatefile',
                    'hostkeyalgorithms', 'kexalgorithms', 'ciphers')
ACCEPTED_KEY = re.compile(r'debug1: Server accepts key: (.+) \S+ SHA256:\S+')


def begin_machine_file(options, reporter):
    """Write the file of a machine from what a login finds (--init); return the exit status."""
    alone = sorted(options.given - {'--init', '--verbose'})
    if alone:
        raise UsageError(f'{" and ".join(alone)} cannot be given with --init.')
    machine = machine_at(options['--init'])
    name = plain_name(machine.host)
    path = os.path.join(os.path.expanduser(MACHINE_FOLDER), f'{name}.yaml')
    if os.path.lexists(path):
        raise MachineFileError(f'{path} is there already, and no file is replaced. To look at the '
                               f'machine: execute_batch --check --machines {name}')
    allow_files(1)
    client = Client(None, reporter.trace, live=False, project=f'check-{os.urandom(8).hex()}')
    check = MachineCheck(options['--init'], machine)
    run = check_run([check], client)
    found = FoundMachine(check, name)
    with interruptible(run.interrupt):
        try:
            client.flows.start(check.begin())
            while not check.is_done(run) and not run.interrupts:
                client.processes.wait(1)
            if check.worker.state == 'ready':
                check.worker.contact.flows.start(found.look_closer())
                while check.worker.state == 'ready' and not (found.is_whole or run.interrupts):
                    client.processes.wait(1)
        finally:
            close_all(run.workers, client, lambda: run.interrupts)
            client.close()
    if run.interrupts:
        return 130
    if not found.is_whole:
        reporter.note(f'{check.name} cannot be used: {check.failure()[1]}')
        return 1
    put_new_file(path, found.text())
    reporter.line(f'wrote {path}')
    reporter.line(f'next: execute_batch --check --machines {name}')
    return 0


def put_new_file(path, text):
    """Write a new file, and its folder if that is missing; raise if the file exists."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, 'x', encoding='utf-8') as file:
            file.write(text)
    except OSError as error:
        raise MachineFileError(f'{path} cannot be written: {reason_of(error)}.') from None


class FoundMachine:
    """What a login found out about a machine, as a machine file.

    check: a MachineCheck; name: of the file, without .yaml
    """

    def __init__(self, check, name):
        self.is_whole = False
        self._check, self._name = check, name
        self._key = self._offered = ''      # _offered: the accepted key; _key: its file, if usable
        self._options = {}                  # of ssh, which only ~/.ssh/config sets

    def look_closer(self):
        """A flow: find out which key ssh used, and which options the file needs."""
        worker, settings = self._check.worker, self._check.settings
        argv = worker.contact.connection.copy(alone=True)
        # The script that copy() runs is empty here.
        end = yield worker.contact.start([argv[0], '-v', *argv[1:]], ignore, feed=iter([b'\0']))
        match = None
        for match in ACCEPTED_KEY.finditer(end.text):
            self._offered = match[1]
        if match and os.path.isfile(self._offered):
            with contextlib.suppress(KeyFileError):
                check_key(self._offered, '')
                self._key = self._offered
        machine = self._check.machine
        plain = Machine(self._name, settings.get('hostname', machine.host),
                        settings.get('user'), int(settings.get('port', 22)),
                        self._key or None, settings.get('proxyjump'))
        others = yield from ssh_settings(plain, worker.client, f'{worker.number}.1000')
        for option in KEPT_SSH_OPTIONS:
            value = settings.get(option, '')
            if option == 'userknownhostsfile':
                value = value.split(' ')[0]
            if value and value != others.get(option, '').split(' ')[0] and not (
                    option == 'proxycommand' and settings.get('proxyjump')):
                self._options[option] = value
        self.is_whole = True

    def text(self):
        """Return the text of the file."""
        check, lines = self._check, []
        settings, machine = check.settings, check.machine
        keys = {'name': self._name, 'ip': settings.get('hostname', machine.host),
                'username': settings.get('user'), 'port': int(settings.get('port', 22)),
                'ssh_key_path': self._key, 'proxy_jump': settings.get('proxyjump'),
                'ssh_options': self._options}
        lines.append(f'# {check.word}, as a login found it on {time.strftime("%Y-%m-%d")}. For all '
                     'keys see docs/options.md of ssh-scheduler.')
        lines += [f'{key}: {as_yaml(value)}' for key, value in keys.items()
                  if value and not (key == 'proxy_jump' and value == 'none')]
        if not self._key and self._offered:
            lines.append(f'# The key was {self._offered}, from ssh-agent: it has to run when jobs '
                         'start.')
        lines += self._engine_lines() or self._machine_lines()
        return '\n'.join(lines) + '\n'

    def _disks(self, name):
        """Yield (MB free, kind of file system, folder) for each fact of this name."""
        for value in self._check.details(name):
            free, _, _, kind, folder = (value + '    ').split(' ', 4)
            yield whole_number(free), kind, folder.rstrip()

    def _engine_lines(self):
        """Return the lines for a cluster; none if the machine has no Slurm that answers."""
        parts = self._check.details('partition')
        if not parts:
            return []
        best = next((part for part in parts if part.endswith('*')), parts[0])
        folders = [folder for _, kind, folder in self._disks('scratch') if kind in NETWORK_DISKS]
        where = f'{folders[0]}/.ssh_scheduler' if folders else '~/.ssh_scheduler'
        known = ', '.join(part.rstrip('*') for part in parts)
        return ['engine: slurm',
                f'# The partitions are {printable(known)}. To choose one, and your account:',
                f'# engine_options: --partition={best.rstrip("*")} --account=NAME',
                '# A folder that the nodes see, too:', f'workdir: {as_yaml(where)}']

    def _machine_lines(self):
        """Return the lines for a machine that is no cluster; all are comments."""
        lines = []
        free_mb, kind, _ = next(self._disks('disk'), (0, '', ''))
        room = sorted(((mb, folder) for mb, other, folder in self._disks('scratch')
                       if other not in NETWORK_DISKS and mb > free_mb), reverse=True)
        if room and (free_mb < SMALL_HOME_MB or kind in NETWORK_DISKS):
            lines += [f'# The home has {free_mb / 1024:.1f} GB free ({kind}), this folder '
                      f'{room[0][0] / 1024:.1f} GB:',
                      f'# workdir: {as_yaml(room[0][1])}']
        gpus = self._check.worker.capacity.gpus
        lines += [f'# GPU {gpu.index}: {printable(gpu.name)}, {gpu.total_memory_mb} MB'
                  for gpu in gpus]
        if gpus:
            lines.append(f'# gpus: {[gpu.index for gpu in gpus]}      # to use some of them only')
        return lines


def as_yaml(value):
    """Return the value as one line of YAML; a word stays unquoted if YAML reads it as itself."""
    yaml = library('yaml')
    if isinstance(value, str):
        with contextlib.suppress(yaml.YAMLError):
            if yaml.safe_load(value) == value and not re.search('[#:{},&*]', value):
                return value
    return json.dumps(value)



def query_machines(argv):
    """Show the free resources of machines; return the exit status."""
    options = read_options(QUERY_MACHINES_USAGE, argv)
    reporter = Reporter(options['--verbose'])
    check_machines(options)
    interval = read_interval(options, int(MEASURE_LEAST_S))
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


def read_interval(options, least, usual='5'):
    """Return the seconds of --watch, or None; least: the lowest number that makes sense."""
    if options['--watch'] is None:
        return None
    if len(options['--watch']) > 1:
        raise UsageError('--watch takes one time.')
    options['--watch'] = (options['--watch'] or (usual,))[0]
    return options.seconds('--watch', least=least)


def watch_machines(run, reporter, interval, allocation, as_json):
    """Show the resources of the machines, once or every `interval` seconds until an interrupt."""
    while True:
        run.wait(lambda worker: worker.state == 'connecting' or worker.gauge.is_awaited)
        if run.interrupts:
            return
        if as_json:
            reporter.show(json_lines(run.workers, allocation), False)
        else:
            reporter.show(machine_table(run.workers, allocation, reporter.paint,
                                        reporter.columns), interval)
        if interval is None or reporter.nobody_reads:
            return
        run.client.wait_while(lambda: True, time.monotonic() + interval, lambda: run.interrupts)
        for worker in run.workers:
            worker.measure()


def close_all(workers, client, hurried=lambda: False):
    """Have all machines tidied up; wait until that is done or hurried() is true."""
    client.wait_while(lambda: any(worker.state == 'ready' and worker.gauge.awaits_facts
                                  for worker in workers), time.monotonic() + FACTS_S, hurried)
    for worker in workers:
        worker.close()
    client.wait_while(lambda: any(worker.state == 'closing' for worker in workers),
                      time.monotonic() + FAREWELL_S, hurried)
    client.wait_while(lambda: client.files.keeper.is_busy, time.monotonic() + LAST_GIT_S, hurried)


def json_lines(workers, allocation):
    """Yield one JSON object for each machine; memory in MB, utilization from 0 to 1."""
    for worker in workers:
        found = {'machine': worker.name}
        if worker.state != 'ready':
            yield json.dumps({**found, 'error': worker.why})
            continue
        have = worker.capacity
        if have.queue:
            found.update(queue_as_json(have.queue))
            if allocation:
                found['jobs_fit'] = room_for(have, allocation)[0]
            yield json.dumps(found)
            continue
        found.update(
            cores_free=round(have.cores, 3), cores_total=have.total_cores,
            memory_free_mb=have.memory_mb, memory_total_mb=have.total_memory_mb,
            batch_jobs=have.batch_jobs, batch_users=dict(collections.Counter(have.batch_users)),
            gpu_trouble=have.gpu_trouble or have.lost_gpus or None,
            gpus=[{'index': gpu.index, 'name': gpu.name, 'uuid': gpu.uuid,
                   'memory_free_mb': gpu.memory_mb, 'memory_total_mb': gpu.total_memory_mb,
                   'utilization': round(gpu.utilization, 3), 'users': list(gpu.users),
                   'processes': gpu.others, 'batch_jobs': gpu.batch_jobs} for gpu in have.gpus])
        if allocation:
            found['jobs_fit'] = room_for(have, allocation)[0]
        yield json.dumps(found)


def queue_as_json(queue):
    """Return all facts of a cluster as a JSON object."""
    running, waiting = queue.own_jobs
    return {'engine': queue.engine, 'own_jobs_running': running, 'own_jobs_waiting': waiting,
            'max_jobs': queue.max_jobs, 'partitions': [
                {'name': part.name, 'up': part.is_up, 'nodes': part.nodes, 'state': part.state,
                 'reason': part.reason or None, 'cores_idle': part.idle_cores,
                 'cores_total': part.cores, 'gpus_of_a_node': part.gpus or None}
                for part in queue.partitions]}


SHORTEST_NAME = 12              # characters: no name of a machine is cut to fewer


class TableRow(NamedTuple):
    """A line of the table: cells (text, share that is free or None), and behind them a text.

    may_cut: the text may be cut if the terminal is too narrow
    """
    cells: tuple
    text: str = ''
    may_cut: bool = True


def machine_table(workers, allocation, paint, columns=None):
    """Yield the lines of a table: the free and total resources of each machine and its GPUs.

    paint(text, share) colours a text by the share that is free.
    columns: the width of the terminal, to which the table is shortened; None for no limit
    """
    rows = [TableRow(tuple((title, None) for title in (
        'machine', 'free cores, GPUs', 'free memory', 'busy')), 'used by')]
    for worker in workers:
        rows += machine_rows(worker, allocation)
    widths = table_widths(rows, columns)
    for row in rows:
        yield table_line(row, widths, paint, columns)
    yield machine_sum(workers, allocation)


def machine_rows(worker, allocation):
    """Yield the TableRows of a machine: one for itself, one for each of its GPUs."""
    have, name = worker.capacity, (printable(worker.name), None)
    if worker.state != 'ready':
        yield TableRow((name,), f'cannot be used: {worker.why}', may_cut=False)
        return
    if have.queue:
        yield from cluster_rows(name, have, allocation)
        return
    jobs = collections.Counter(f'user {user}' if user.isdigit() else printable(user) or 'you'
                               for user in have.batch_users)
    notes = [such_jobs(room_for(have, allocation)[0])] if allocation else []
    notes += ['batch jobs: ' + ', '.join(f'{user} {jobs[user]}' for user in jobs)] if jobs else []
    trouble = have.gpu_trouble or have.lost_gpus
    if trouble == NO_NVIDIA_SMI:        # usual without a GPU: it needs no row of its own
        notes, trouble = [*notes, 'no nvidia-smi'], ''
    cores = free_of(have.cores, have.total_cores)
    yield TableRow((name, (f'{cores} cores', have.cores / max(have.total_cores, 0.01)),
                    free_memory(have.memory_mb, have.total_memory_mb), ('', None)),
                   '; '.join(notes))
    for gpu in have.gpus:
        short = re.sub('^(NVIDIA |GeForce |Tesla )+', '', printable(gpu.name))
        users = ', '.join(map(printable, gpu.users))
        uses = [f'{users} ({count_of(gpu.others, "process")})'] if gpu.others else []
        uses += [count_of(gpu.batch_jobs, 'batch job')] if gpu.batch_jobs else []
        yield TableRow((('', None), (f'GPU {gpu.index} {short}', None),
                        free_memory(gpu.memory_mb, gpu.total_memory_mb),
                        (f'{gpu.utilization:.0%}', 1 - gpu.utilization)), ', '.join(uses))
    if trouble:
        yield TableRow((('', None),), trouble, may_cut=False)


def cluster_rows(name, have, allocation):
    """Yield the TableRows of a cluster: one for itself, one for each of its partitions."""
    queue = have.queue
    notes = []
    if allocation:
        why = books_of(have).why_not(allocation)
        notes = [why or 'takes such jobs']
    notes.append('your jobs: {} running, {} waiting'.format(*queue.own_jobs))
    yield TableRow((name, (queue.engine, None), ('', None), ('', None)), '; '.join(notes))
    for part in dict.fromkeys(part.name for part in queue.partitions):
        nodes = [one for one in queue.partitions if one.name == part]
        idle_nodes = sum(one.nodes for one in nodes if one.state == 'idle')
        cores = sum(one.idle_cores for one in nodes), sum(one.cores for one in nodes)
        gpus = sorted({one.gpus for one in nodes if one.gpus})
        text = (f'{printable(part)}: {idle_nodes} of '
                f'{count_of(sum(one.nodes for one in nodes), "node")} idle')
        out = collections.Counter()
        for one in nodes:
            out[one.state] += one.nodes * one.is_out
        text += ''.join(f', {count} {state}' for state, count in out.items() if count)
        text += f'; each with {", ".join(map(printable, gpus))}' if gpus else ''
        text += '' if all(one.is_up for one in nodes) else '; takes no jobs'
        yield TableRow((('', None), (f'{free_of(*cores)} cores', cores[0] / max(cores[1], 1)),
                        ('', None), ('', None)), text)


def table_widths(rows, columns):
    """Return the width of each column; names are shortened if the table is too wide."""
    widths = [max(len(row.cells[place][0]) for row in rows if len(row.cells) > place)
              for place in range(4)]
    if columns:
        shortest_gpu = max(len(row.cells[1][0]) for row in rows if len(row.cells) > 1
                           and not row.cells[1][0].startswith('GPU '))
        over = (sum(widths) + 2 * len(widths) - columns
                + max(len(row.text) for row in rows if row.may_cut))
        for place, least in enumerate((SHORTEST_NAME, shortest_gpu)):
            less = min(max(over, 0), max(widths[place] - least, 0))
            widths[place], over = widths[place] - less, over - less
    return widths


def free_memory(free_mb, total_mb):
    """Return the cell for memory."""
    return free_gb(free_mb, total_mb), free_mb / max(total_mb, 1)


def free_of(free, total):
    """Return 'FREE of TOTAL', in whole numbers if TOTAL is large."""
    places = 1 if total < 100 else 0
    return f'{free:.{places}f} of {round(total, places):g}'


def free_gb(free_mb, total_mb):
    """Return how much memory is free of all, as 15.6 of 31.2 GB."""
    return f'{free_of(free_mb / 1024, total_mb / 1024)} GB'


def table_line(row, widths, paint, columns):
    """Return a TableRow as a line."""
    line, length = '', 0
    for place, ((text, share), width) in enumerate(zip(row.cells, widths)):
        text = shorten(text, width, 0 if place else (width - 1) // 2)
        padding = ' ' * (width - len(text))
        shown = text if share is None else paint(text, share)
        line += (padding + shown if place > 1 else shown + padding) + '  '
        length += width + 2
    text = row.text
    if columns and row.may_cut:
        text = shorten(text, columns - length)
    return (line + text).rstrip()


def shorten(text, width, end=0):
    """Return the text with an ellipsis in front of its last `end` characters if it is too long."""
    if len(text) <= width:
        return text
    return f'{text[:width - 1 - end]}…{text[len(text) - end:]}' if width > 0 else ''


def machine_sum(workers, allocation):
    """Return the last line of the table: how many machines answer, and all free resources."""
    answering = [worker.capacity for worker in workers if worker.state == 'ready']
    ready = [have for have in answering if not have.queue]
    gpus = [gpu for have in ready for gpu in have.gpus]
    free = sum(is_free(gpu) for gpu in gpus)
    text = (f'{len(answering)} of {count_of(len(workers), "machine")} '
            f'{"answers" if len(answering) == 1 else "answer"}')
    if ready:
        cores = free_of(sum(have.cores for have in ready), sum(have.total_cores for have in ready))
        clusters = len(answering) - len(ready)
        where = f' beside the {"cluster" if clusters == 1 else "clusters"}' if clusters else ''
        text += (f'; free{where}: {cores} cores, '
                 + (f'{free} of {count_of(len(gpus), "GPU")}' if gpus else 'no GPU'))
    if ready and allocation:
        fit = sum(room_for(have, allocation)[0] for have in ready)
        text += f'; {such_jobs(fit)}'
    return text


def such_jobs(count):
    """Return the words for this number of jobs that fit."""
    return f'{count_of(count, "such job")} {"fits" if count == 1 else "fit"}'


def is_free(gpu):
    """Tell whether nobody uses the GPU: no process, no batch job, hardly any memory and time."""
    return not (gpu.others or gpu.batch_jobs) and gpu.utilization < 0.1 and (
        gpu.memory_mb > 0.9 * gpu.total_memory_mb)


def open_streams():
    """Open closed standard streams: else the next file that is opened would become one."""
    for fd, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # gets the lowest free number, fd
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, 'w' if fd else 'r', closefd=False))


def check_surroundings():
    """Raise if the current folder is gone, or the locale is not UTF-8."""
    try:
        os.getcwd()
    except OSError:
        raise SchedulerError('the current folder was removed: cd to another folder.') from None
    if sys.getfilesystemencoding() != 'utf-8':      # machines would get names with other bytes
        raise SchedulerError('the locale here is not UTF-8. Try: export PYTHONUTF8=1')


COMMANDS = {
    'execute_batch': execute_batch,
    'execute_remote': execute_remote,
    'execute_to': execute_to,
    'query_machines': query_machines,
}


def usage_beside(error):
    """Return the few lines on usage that follow a UsageError: all of it would hide the error."""
    import shlex
    if error.usage == OVERVIEW:
        return error.usage.partition('\n\n')[2].partition('\n\n')[0]
    example = error.usage.rpartition('\n\nExample:\n')[2].strip()
    return (f'Example: {example}\n' * ('Try: ' not in str(error)) +
            f'All options: {shlex.join([*typed_start(example.split()[0]), "--help"])}')


def main(argv=None):
    """Run the command that argv (sys.argv) names by its first or second word; exit with its status.

    An installed executable or a link is named like the command; otherwise the next word names it:
    python3 ssh_scheduler.py execute_batch …  Without a command, all commands are listed.
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
            reporter.note(usage_beside(error))
        status = error.exit_code
    except KeyboardInterrupt:
        status = 130
    if is_called:
        sys.exit(status)
    flush_streams()         # a normal exit of Python would take as long as a tenth of a login
    os._exit(status)


# ---- The remote runner: runs on the machine ----

# One runner serves one contact with a machine: it reads requests, gives jobs to workers, and
# reports what becomes of the jobs.  A worker is a process beside the runner; it runs one job after
# the other and records how each ends.  A worker does not need the runner: if the runner is killed,
# each worker runs its job to the end, and exits.  So all that must outlive the runner is in files.
#
# The folder of a project, WORKDIR/PROJECT:
#
#   jobs/       the files of jobs and of workers
#   stage/ID/   copy/ and link/ as they were sent (`unpack`, or `folder` and rsync).  freeze makes
#               links in copy/ to link/, and the file `list`, which names all in copy/.  `finish`
#               makes the stage the cache, or removes it
#   cache/      copy/ and link/ of the last batch that went well (`finish`).  rsync writes
#               the next stage beside it, with hard links to its unchanged files (--link-dest)
#   run.HOST.PID.RANDOM/        of one runner; a later runner removes that of a killed one (tidy):
#     self                      PID START BOOT_ID; its owner; the contact, BATCH.MACHINE.NUMBER
#     events, signals           FIFOs: events; which tasks of look_around are done
#     log                       a file: error messages
#     kills                     how many processes the kernel had killed for lack of memory (look)
#     to.NUMBER, idle           FIFOs: the jobs for each worker; which workers are free
#     environment*              what the login and the setup leave (capture_login, sort_functions)
#     functions, functions.all  what the bash of a job reads first (load_functions)
#     login*, setup.*, gpus.*   what the login, the setup and nvidia-smi printed
#     back.*, chunk.*, others.*, again.KEY        bytes on their way to the client
#     cache/, claims/           the former cache, until it is removed; claims that are not shared
#
# The files of a job, in jobs/, and who writes what.  KEY is NAME.ATTEMPT-IDENTITY.  IDENTITY names
# the journal that claimed the job, since numbers of attempts begin anew when a job_results is
# removed:
#
#   KEY         the command, which bash runs from this file; after it, as a comment, the record (see
#               below).  The runner that creates this file begins the job (take).  A runner that
#               creates it without a command prevents the job (revoke).  If the disk is too full for
#               the record of the end, the file is renamed to KEY ended STATUS WALL...  (record)
#   .out .err   the output of the job; both exist once it begins (launch).  .err also has the lines
#               of ssh-scheduler, such as why it stopped the job
#   .back       the list of what the job left, if it left anything (list_results)
#   .more/      what only some jobs have:
#     in, eof     with --stdin: FIFOs: the input; and a line once it is complete (keep_input)
#     wait, tty   with a terminal: scripts.  wait runs in place of the job; tty runs the job in the
#                 session that has the terminal (prepare_tty)
#     exports     with a terminal: the environment of the job, its folder, and the arguments of
#                 bash, for tty (launch)
#     code        with a terminal: a FIFO that hands the exit status from tty to wait (wait)
#     late        exists if the job reached its time limit (keep_time)
#
# What a worker has, in jobs/.  WORKER is PID.RANDOM of the runner and a number:
#
#   work.WORKER.N       the folder where a job runs: empty, or a copy of a stage.  If the job leaves
#                       it unchanged, the next job gets it; else the job keeps it, and N grows
#   work.WORKER.alive   a FIFO that all processes of a job have open
#
# The folder of claims of a user, /dev/shm/ssh_scheduler.UID, for the batches of all users to read:
#
#   PROJECT.work.WORKER     80 bytes: PID START BOOT_ID of the worker; then the need of its job:
#                           CORES MB RESERVE GPU:MB:TIME:RESERVE...; in a second line the key of
#                           the job, and the worker's processor time before the job (claim_needs).
#                           Empty when the job has ended
#   PROJECT.KEY.back        the list of what the job left, if the disk of jobs/ is full
#                           (list_results)
#
# The record of a job, and (->) which records may follow.  A record ends with the job's folder:
#
#   starting PID START BOOT_ID    the worker has the job, or will get it (take); once the job has
#                                 begun, .out exists  -> ended, lost
#   ended STATUS WALL             its exit status, 137 if its processes were killed with the worker;
#                                 how long it ran, in hundredths of a second, if known; then `left`
#                                 if processes of the job still run, with the worker's FIFO open; or
#                                 `untold` if the worker exited before it reported the end
#   lost                          the job is gone, its end unknown (ask_about, last_words_of)
#   revoked                       it never began, and never will (revoke)
#   queued                        an engine has it: see REMOTE_ENGINE
#   damaged                       read_record returns this word for an incomplete record  -> lost
#
# Requests.  Each is VERB COUNT FIELD..., with a NUL behind each; -> shows the events that answer.
#
#   probe                   report what the machine has, then do as `enter` does  -> probe
#   enter                   wait for the login, and be ready for jobs  -> note, broken, ready
#   check                   report more than a probe does, for people  -> probe
#   tie                     stop all jobs when the channel ends
#   engine BYTES FOLDER WORD...     read BYTES bytes, which follow: the functions for nodes.  From
#                           the machine file of a cluster: FOLDER, where a node has the folders of
#                           jobs, if not in jobs/; WORD: further words for the engine
#   fits NEED LIMIT...      report which of these needs the engine would refuse  -> unfit
#   measure NUMBER          report again what the machine has  -> probe, measured
#   facts                   report versions: of kernel, GPU driver and Python  -> facts
#   limits CORES MB GPU:MB:TIME...      start a job only if all batches together stay within these
#   unpack ID BYTES         unpack BYTES bytes of tar, which follow  -> stage_failed, broken
#   folder PATH             make a folder that rsync will fill
#   unsent WHY              report why files could not be sent, and if the disk is full  -> broken
#   freeze ID LINK...       a stage is complete; make its links  -> staged, stage_failed, broken
#   start KEY STAGE GPUS NEED MODE LIMIT COMMAND BACK PATH...
#                           start a job.  MODE: '', stdin or tty; LIMIT: '' or seconds; BACK: none,
#                           changed or paths; NEED: as in a claim, or for an engine CORES MB RESERVE
#                           GPUS KIND  -> started, queued, held, refused, left, note, and as `adopt`
#   wrap KEY WORDS          the next `start` of KEY runs the job in the wrapper WORDS, which bash
#                           reads; in WORDS, \2 and \3 stand for the cores and the MB of the machine
#   cancel SECONDS KEY...   stop jobs; kill them after the seconds  -> ended, cancelled
#   adopt KEY...            prevent a job that has not begun, or report its state
#                           -> absent, queued, started, ended, lost
#   withdraw KEY...         prevent queued jobs that have not begun  -> absent
#   revoke KEY...           prevent a job, or stop it; then remove it
#   others IDENTITY         report the jobs of other journals on this machine  -> others, data
#   ping NUMBER             answer  -> pong
#   eof KEY                 the input of a job is complete
#   where KEY...            report in which folder jobs run  -> place
#   watch (KEY OUT ERR)...  look at jobs; the client has OUT and ERR bytes of their streams
#                           -> used, data, and as `adopt`
#   list KEY                send the list of what a job left  -> data, unlistable
#   again KEY PATH...       send a list of these paths, as they are now  -> data, unlistable
#   clean KEY...            remove jobs whose results are safe
#   finish STAGE STAGE...   make the first, if it is not '', the cache; remove the rest  -> finished
#
# Events.  Each is a line of fields with tabs between them.
#
#   account WHICH           the first event; WHICH is equal for two names of one account
#   broken WHY              the machine cannot be used; `later` follows if it may recover
#   note TEXT               a warning
#   probe NAME VALUE        something that the machine has
#   ready HOME RSYNC        jobs can start; HOME is the project's folder, RSYNC 1 or 0
#   measured NUMBER COST    `measure` is answered; it took COST hundredths of a second, apart from
#                           nvidia-smi
#   facts KERNEL DRIVER PYTHON      versions, from /proc and python3; first with - as PYTHON
#   staged ID               jobs can have this stage
#   stage_failed ID WHY     the stage could not be stored
#   started KEY...          jobs run
#   queued KEY NUMBER WHY TIME      the engine has a job under this number, and does not run it yet;
#                           WHY, in words; TIME, when the job is expected to run; both may be empty
#   node KEY NUMBER NODE    the engine runs the job under this number, on this node; comes
#                           before `started`
#   unfit NEED WHY          the engine refuses jobs with this need
#   full WHY                the engine takes no more jobs before one of this account has ended
#   held KEY                a job did not start: other batches, or the engine, leave no room
#   refused KEY WHY         a job did not start
#   absent KEY              a job never began, and never will
#   lost KEY WHY            a job is gone without a result
#   preempted KEY WHY       the same, but neither the job nor the machine failed
#   ended KEY STATUS WALL CPU OUT ERR ENTRY...
#                           a job has ended.  WALL, CPU: hundredths of a second; CPU is 0 if only a
#                           record is left, and WALL is 0 if the record does not have it; OUT, ERR:
#                           =TEXT or @BYTES; ENTRY: as in the list of what the job left, or only @
#                           if the list is long
#   left KEY PIDS           processes of an ended job that still run
#   place KEY FOLDER        a job runs in this folder, below jobs/
#   used KEY KB             the most memory that a running job had
#   cancelled PIDS          `cancel` is done, and could not stop these
#   unlistable KEY          the list is too long to be sent
#   others                  no job of other journals is on this machine
#   pong NUMBER             the runner lives
#   finished                all files that are no longer needed are removed
#   parted                  the runner exits, since the channel was closed
#   data SIZE back KEY, data SIZE growth KEY STREAM OFFSET, data SIZE others
#                           SIZE bytes follow: a list; new bytes of a stream; for each job of
#                           another journal KEY, word, number and command.  A NUL ends each
#
# A list begins with wFOLDER, the folder of all its paths; then +PATH, made by the job; -PATH, not
# readable; mMODE PATH, the mode of a path before it was made readable; !PATH, missing; ?PATH,
# neither file nor folder nor link; sBYTES, the size of all files together, if large.

# These variables change the behaviour of bash, or of programs that the scripts below use.  All
# other variables of the login stay: on some machines programs work only with LD_* and the like.
REMOTE_CLEAN = r'''
set +o posix
unset -v POSIXLY_CORRECT TMOUT FUNCNEST GLOBIGNORE EXECIGNORE BASH_COMPAT CDPATH LANG "${!LC_@}" \
  TAR_OPTIONS TAPE GREP_OPTIONS QUOTING_STYLE TIME_STYLE BLOCK_SIZE BLOCKSIZE _POSIX2_VERSION
'''

# bash reads a pipe byte by byte, which would take 10 ms for the runner; head does not.
REMOTE_LOADER = 'read -rt 9999 -d ""; eval "$(head -c "$REPLY")"'

REMOTE_RUNNER = r'''
# The remote runner: runs on the machine, under bash 4.2 or later, while the channel is open.  Its
# stdin: this text; then the header, and requests, each VERB COUNT FIELD..., a NUL behind each.  Its
# stdout: one event a line, fields between tabs (\t, \n and \\ escaped), raw bytes after a line
# "data".  Only `writer` writes to it, so that events never mix.
#
# shellcheck disable=SC2015     # A && B || continue: continue if A or B fails
# shellcheck disable=SC2016     # $ in single quotes: for another bash to expand
''' + REMOTE_CLEAN + r'''
JOB_OOM_SCORE=500           # when memory is short, the kernel kills a job before other processes
GPU_LIMIT_S=20              # for nvidia-smi's answer
OLD_DAYS=14                 # after which files of earlier batches are removed
LONGEST_LIST=60000000       # bytes: the names of what a job left, about a million files
# The boot id of a machine that reports none.  The time of the boot (btime) cannot replace it: that
# changes when the clock is set.
NO_BOOT_ID=00000000-0000-0000-0000-000000000000

# A variable of the environment stays exported when it gets another value.  So this unsets all whose
# names are in lowercase, as the names of the variables below are.
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
# File descriptors: of the requests, of the events, and of the FIFO that reports the end of the
# login shell or nvidia-smi.  How many of these two the runner waits for; the process group of the
# login shell; the pid of `writer`.
requests='' events='' signals='' waiting=0 capturing='' writing=''
# What the machine has: the numbers of a probe, the limits for new jobs, the environment of jobs.
cores='' busy='' total='' busy_before='' total_before='' smi=nvidia-smi limits=()
environment=() assignments='' by_env=() dropped=()
# The assignments of BASH_ENV for a usual job and for one that gets all functions.  A job gets all
# if its command has $x, `x` or ". x" in the place of a command, or a word that `named` matches.
functions='' all_functions='' named=''
by_value=$'[;&|(){`!\n][ \t]*("?[$`]|\\.[ \t])'
# The files and links of the stages, which no job made: "STAGE ENTRY" and "STAGE ./PATH".
declare -A sent=() linked=()
tied=''                     # 1 if the jobs are stopped when the channel ends
finished=''                 # 1 if `finish` has removed all unused files
engine_name=''              # of a cluster: see REMOTE_ENGINE
arrived=()                  # the stages that were sent
removing=()                 # the pids of processes that remove files
looking=''                  # the last process of `look`, as `identify` returns it
survivors=''                # the pids that end_processes could not kill
declare -A claimant_seen=() # PID START BOOT_ID of a claim -> when that process was seen
declare -A begun=()         # the jobs that began under this runner and were not removed
sane_need=''                # the need of the last valid claim
# The workers by number: what `identify` returns for each, the pipe to it, the folder where its next
# job runs ("gone" if it takes no more), its stage, its processor time, and its age: how many stages
# had arrived when it started.  Then the free workers; how many workers and stages there were so
# far; the descriptor of the FIFO of free workers; how the names of all workers begin.
worker_self=() worker_fd=() worker_folder=() worker_stage=() worker_ticks=() worker_age=()
free=() hired=0 age=0 idle='' prefix=''
file_limit=''               # how many files the login may have open
leftovers=()                # files and folders of workers that have ended
# The environment of a job: the part that its worker has, and the part that each job is given.
inherited='' apart=''
# The jobs requested since the last start_pending, in order, and their fields by KEY.
pending=()
declare -A stage_of=() gpus_of=() need_of=() mode_of=() limit_of=() command_of=() back_of=()
declare -A paths_of=() wrap_of=()

say() {                     # writes $1: an event of at most 4096 bytes, which a pipe never splits
  printf '%s\n' "$1" >&"$events"
}

say_text() {                # writes the event $1 with the texts that follow as fields, escaped
  local event=$1 text
  shift
  for text; do
    escape "${text:0:1000}"
    event+=$'\t'$REPLY
  done
  say "$event"
}

escape() {                  # REPLY: the text $1 with backslash, tab and newline escaped
  REPLY=${1//\\/\\\\}
  REPLY=${REPLY//$'\t'/\\t}
  REPLY=${REPLY//$'\n'/\\n}
}

beside() {                  # runs $@ in the background, so that the next request need not wait
  apart_from_workers "$@" {requests}<&- &
  disown "$!"
}

apart_from_workers() {      # runs $@ without the pipes to workers, which would keep workers alive
  local fd
  for fd in "${worker_fd[@]}"; do exec {fd}>&-; done
  "$@"
}

complaint() {               # REPLY: the last error in the log, without "line 7: " in front
  # If no process can be started, this function fails, with the text of no_process in REPLY.
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

explain_full() {            # REPLY: the error $1, and which of disk, inodes and quota are used up
  local dir=$home total left size blocks
  while [[ ! -e $dir && $dir == */* ]]; do dir=${dir%/*}; done
  IFS=: read -r total left size blocks < <(stat -f -c %c:%d:%b:%a -- "$dir/.")
  REPLY=$1
  # /proc has no blocks, and a read-only image none that are free; neither is full.
  [[ $blocks != 0 || $size == 0 || $1 == *'Read-only file system'* || $1 == *'No space left'* ]] ||
    REPLY+=' (the disk of the machine is full)'
  [[ $left != 0 || $total == 0 ]] || REPLY+=' (no inode is left for one more file: see df -i)'
  [[ $1 != *'quota exceeded'* ]] || REPLY+=' (of bytes, or of files: see quota -s)'
}

no_process() {              # REPLY: a text that no process can be started; starts none itself
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
  [[ ${fields[0]} != Z ]] || return 1   # a zombie: its parent has not waited for it yet
  REPLY="$1 ${fields[19]} $boot_id"
}

read_clocks() {             # REPLY: hundredths of a second since boot; clock: the time of the boot
  read -r REPLY _ </proc/uptime
  printf -v clock '%(%s)T' -1
  clock=$((clock - ${REPLY%.*}))
  REPLY=${REPLY/./}
}

# ---- Machine ----

# bash makes the assignments of a line NAME=VALUE ... COMMAND after it has expanded the command.  So
# no name can collide with a variable of this shell.  Unlike env(1) this costs no process (0.45 ms a
# job), and ps does not show the values to other users.
enter() {                   # becomes the program $@ in the environment that `assign` prepared
  exec 3>&2 2>/dev/null     # hides a warning of bash: the program warns of a missing locale, too
  export -n SSH_SCHEDULER_CAPTURE "${dropped[@]}"
  eval "$assignments"'exec "${by_env[@]}" "$@" 2>&3 3>&-'
}

assign() {                  # sets assignments, by_env, dropped, inherited, apart from $environment
  local entry name entries
  local -A given=()
  assignments='' by_env=() dropped=() inherited='' apart=''
  for entry in "${environment[@]}"; do
    name=${entry%%=*}
    case $name in
      # bash cannot assign to these, or an assignment has further effects
      [0-9]* | *[!A-Za-z0-9_]* | BASHOPTS | SHELLOPTS | UID | EUID | PPID | GROUPS | \
        FUNCNAME | BASH_[!E]* | POSIXLY_CORRECT) by_env+=("$entry") ;;
      *)
        given[$name]=1
        printf -v entry '%s=%q ' "$name" "${entry#*=}"
        assignments+=$entry
        if is_apart "$name"; then apart+=$entry; else inherited+=$entry; fi ;;
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

is_apart() {                # succeeds if the variable $1 would change a worker or its programs
  case $1 in
    [a-z_]* | PATH | LANG* | LC_* | LD_* | GLIBC_* | GCONV_* | LOCPATH | MALLOC_*) ;;
    BASH* | IFS | PS4 | TMOUT | FUNCNEST | GLOBIGNORE | EXECIGNORE | CDPATH | TIMEFORMAT) ;;
    OPT* | REPLY | RANDOM | SRANDOM | SECONDS | LINENO | EPOCH* | HIST* | DIRSTACK) ;;
    PIPESTATUS | MAPFILE | READLINE* | COPROC* | DU | DU_* | HOSTNAME | CHILD_MAX) ;;
    TAR_* | TAPE | GREP_* | QUOTING_STYLE | TIME_STYLE | *BLOCK*SIZE | POSIX*) ;;
    JOB_OOM_SCORE | GPU_LIMIT_S | OLD_DAYS | LONGEST_LIST | NO_BOOT_ID | DUMP_FUNCTIONS) ;;
    *) return 1 ;;
  esac
}

read_entries() {            # entries: the NAME=VALUE entries of the file $1, each ending with a NUL
  local entry
  entries=()
  while IFS= read -rd '' entry; do [[ $entry != [!=]*=* ]] || entries+=("$entry"); done <"$1"
}

read_environment() {        # environment: the entries of $1, without those that differ by job
  local name entry entries word
  environment=()
  read_entries "$1"
  for entry in "${entries[@]}"; do
    name=${entry%%=*}
    case $name in
      PWD | OLDPWD | SHLVL | _ | CUDA_VISIBLE_DEVICES | SSH_CLIENT | SSH_CONNECTION) continue ;;
      SSH_SCHEDULER_CAPTURE | SSH_SCHEDULER_JOB | SSH_SCHEDULER_ID) continue ;;
      SLURM_CONF) ;;
      # On a cluster neither jobs nor the engine's programs get these: they change its requests.
      SLURM_* | SQUEUE_* | SACCT_* | SCANCEL_* | SINFO_* | SBATCH_WAIT | SBATCH_ARRAY_INX | \
        SSH_TTY | DISPLAY) [[ ! $engine_name ]] || continue ;;
      BASH_FUNC_*'%%' | BASH_FUNC_*'()') [[ ! -s $1.functions ]] || continue ;;
      SHELLOPTS | BASHOPTS)             # options such as pipefail, but not those for terminals
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
  } >"$SSH_SCHEDULER_CAPTURE.functions"
  (
    \builtin complete -p; \builtin shopt -s extdebug; IFS=$'\''\n'\''
    \builtin declare -F $(\builtin compgen -A function)
  ) >"$SSH_SCHEDULER_CAPTURE.completion" 2>/dev/null'

capture_login() {           # writes the environment of an interactive login to $run/environment
  local to=$run/environment shell=${SHELL:-$BASH} entries
  [[ ! $setup ]] || to=$run/login       # then run_setup writes the environment
  read_entries "/proc/$$/environ"
  ask_shell
  if [[ ! -s $to ]]; then
    printf '%s\0' "${entries[@]}" >"$to"
    printf '%s\n' "$shell" >"$run/login.silent"
  fi
  [[ ! $setup ]] || run_setup
  sort_functions 2>/dev/null
}

ask_shell() {               # for capture_login: fills $to; sets shell to the last shell that ran
  local dump probe next how=-l
  # A start file may exec another shell.  That shell reads the probe from its stdin.
  probe='(readlink "/proc/$PPID/exe"; tr "\0" " " <"/proc/$PPID/cmdline")'
  probe+=' >"$SSH_SCHEDULER_CAPTURE.shell"; exec /usr/bin/env -0 >"$SSH_SCHEDULER_CAPTURE.before"'
  probe="/bin/sh -c '$probe'"
  for _ in 1 2 3; do
    environment=("${entries[@]}" "SSH_SCHEDULER_CAPTURE=$to")
    assign
    next=
    dump='exec /usr/bin/env -0 >"$SSH_SCHEDULER_CAPTURE"'
    [[ $shell != */bash ]] || dump=$DUMP_FUNCTIONS$'\n\\builtin '$dump
    case ${shell##*/} in                # csh accepts -l only alone, and with -c it has no $prompt
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

run_setup() {               # for capture_login: adds what the setup of the machine file sets
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

load_environment() {        # fills environment, for `enter`; reports what could not be read
  local entry name=$run/environment status
  if [[ $setup && ! -s $name ]]; then
    { read -r status <"$run/setup.status"; } || status='no answer in time'
    say_text broken "setup failed ($status): $(tail -n 1 "$run/setup.err")"
    return
  fi
  if [[ ! -s $name ]]; then
    say_text note 'the login shell did not report its environment in time'
    name=/proc/$$/environ
  elif IFS= read -r entry <"$run/login.silent"; then
    say_text note "the login shell did not report its environment: a start file of $entry ends it, \
or starts another program. So jobs have the environment of a command over ssh"
  fi
  read_environment "$name"
  environment+=("${machine_environment[@]}")
  load_functions
  environment=(PYTHONUNBUFFERED=1 "${environment[@]}")
  assign
} 2>/dev/null

# bash-completion has 84 functions, which would cost the bash of each job 2.7 ms.  So functions that
# only an interactive shell calls are set aside, until a job names one: completion functions, known
# by `complete` or by the file that defines them; those of git's prompt; and their helpers, whose
# names begin with _.  Exported functions, and those that any other function names, stay.
sort_functions() (          # for capture_login: writes the names set aside, and all other functions
  local line lines names name word text more=1 ends=$' \t\n!"#$%&\'()*+,-./:;<=>?@[\\]^`{|}~'
  local -A known=() aside=()
  mapfile -t lines < <(cat "$run/"*.completion)
  mapfile -t names < <(compgen -A function)
  unset -f "${names[@]}"    # only the functions of the login count
  # shellcheck disable=SC1091
  . "$run/environment.functions"        # from here on, a function may have the name of a builtin
  set -f
  IFS=$ends                 # separates the words of a text
  while IFS=' ' builtin read -r _ word name; do         # declare -f NAME, or -fx if it is exported
    [[ $word != -f || $name == *[!A-Za-z0-9_]* ]] || known[$name]=1
  done < <(builtin declare -F)
  for line in "${lines[@]}"; do         # complete ... -F NAME ..., or NAME LINE FILE
    case $line in
      'complete'*' -F '*) line=${line#* -F } ;;
      *' '*/bash-completion/* | *' '*/bash_completion | *' '*/bash_completion.d/*) ;;
      *' '*/git-sh-prompt | *' '*/git-prompt.sh) ;;
      *) continue ;;
    esac
    name=${line%% *}
    [[ ! ${known[$name]-} ]] || aside[$name]=1
  done
  ((${#aside[@]})) || return
  while [[ $more ]]; do                 # the helpers that they name are set aside, too
    more='' text=$(builtin declare -f "${!aside[@]}")
    for word in $text; do
      [[ $word != _* || ! ${known[$word]-} || ${aside[$word]-} ]] || aside[$word]=1 more=1
    done
  done
  more=1
  while [[ $more ]]; do                 # a function that the others name is not set aside
    more='' text=$(builtin unset -f "${!aside[@]}"; builtin declare -f)
    for word in $text; do
      [[ ! $word || ! ${aside[$word]-} ]] || { builtin unset -v "aside[$word]"; more=1; }
    done
  done
  builtin unset -f "${!aside[@]}"
  { builtin echo shopt -s extglob; builtin declare -f; builtin shopt -p extglob; } \
    >"$run/environment.kept"
  for name in "${!aside[@]}"; do builtin echo "$name"; done >"$run/environment.aside"
)

# bash reads the functions at its start; programs that it runs inherit those that are exported.
load_functions() {          # for load_environment: sets functions, all_functions and named
  local entry bash_env=
  for entry in "${environment[@]}"; do [[ $entry != BASH_ENV=* ]] || bash_env=${entry#*=}; done
  offer_functions environment.functions functions.all
  all_functions=$REPLY functions=$REPLY
  [[ -s $run/environment.aside ]] || return
  offer_functions environment.kept functions
  functions=$REPLY
  while read -r entry; do [[ $entry == _* ]] || named+=\|$entry; done <"$run/environment.aside"
  named="(eval|source|complete|compgen|declare|typeset|type$named)[^A-Za-z0-9_./-]"
  named="[^A-Za-z0-9_./-](-?_|$named|(do|then|else)[[:blank:]]+\"?[\$\`])"
}

offer_functions() {         # for load_functions: REPLY: makes bash read file $2, made of file $1
  REPLY=$(<"$run/$1")
  [[ $bash_env || ($REPLY && $REPLY != $'shopt -s extglob\nshopt -u extglob') ]] ||
    { REPLY=; return; }
  {
    if [[ $bash_env ]]; then            # $bash_env may choose GPUs, as .bashrc may: undo that
      printf 'export BASH_ENV=%q ssh_scheduler_gpus=${CUDA_VISIBLE_DEVICES-none}\n' "$bash_env"
      printf '. "$BASH_ENV"\nexport CUDA_VISIBLE_DEVICES=$ssh_scheduler_gpus\n'
      printf '[[ $ssh_scheduler_gpus != none ]] || unset -v CUDA_VISIBLE_DEVICES\n'
      printf 'unset -v ssh_scheduler_gpus\n'
    else
      printf 'builtin unset -v BASH_ENV\n'
    fi
    printf '%s\n' "$REPLY"
  } >"$run/$2"
  printf -v REPLY 'BASH_ENV=%q ' "$run/$2"
}

functions_of() {            # for launch: REPLY: the assignment of BASH_ENV, if any, for the job
  local text=$'\n'$command$'\n'
  REPLY=$functions          # regular expressions without ^ and $ are cheap: 30 us for both
  [[ ! $named || ! ($text =~ $by_value || $text =~ $named) ]] || REPLY=$all_functions
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
  # nproc respects affinity, but would also obey OMP_NUM_THREADS
  [[ $proc != /proc ]] || REPLY=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
}

nvidia() {                  # asks nvidia-smi $1; its answer goes to gpus.$2, its errors to gpus.err
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

# nvidia-smi may hang so that not even SIGKILL ends it.  So each wait for it has a deadline, after
# which the process in gpus.pid is killed.  While that process exists, no other one is started.
query_gpus() {              # writes the answers of nvidia-smi to $run/gpus.*
  local core=index,uuid,memory.total,memory.free,utilization.gpu status total free busy
  type -P "$smi" >/dev/null || { echo absent >"$run/gpus.status"; return; }
  nvidia --query-gpu="$core,compute_mode,mig.mode.current,name" list
  status=$?
  if ((status == 2)); then  # an old driver refuses the query for one unknown field
    nvidia --query-gpu="$core,name" list
    status=$?
    ((status)) || status=old
  fi
  [[ $status != 137 ]] || return        # give_up_gpus killed it
  : >"$run/gpus.apps"
  case $status in
    0 | old | 14 | 15)      # ask for processes only if memory or time of a GPU is in use
      while IFS=', ' read -r _ _ total free busy _; do
        [[ $free != "$total" || $busy != 0 || $total == *[!0-9]* ]] || continue
        nvidia --query-compute-apps=gpu_uuid,pid,used_memory apps || (($? == 15)) ||
          : >"$run/gpus.apps"
        break
      done <"$run/gpus.list" ;;
  esac
  echo "$status" >"$run/gpus.status"
}

query_gpus_again() {        # in the environment of the jobs, if nvidia-smi is found only there
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

give_up_gpus() {            # kills nvidia-smi, if it still runs, and discards its status
  local pid
  read -r pid <"$run/gpus.pid" && kill -KILL "$pid"
  [[ ! -e $run/gpus.status ]] || rm -f -- "$run/gpus.status"
} 2>/dev/null

say_gpus() {                # reports what query_gpus found; say_claims must have filled claim_of
  local status line
  { read -r status <"$run/gpus.status"; } 2>/dev/null || status=timeout
  say_text probe nvidia_smi "$status"
  case $status in
    absent) say_other_gpus ;;
    timeout) ;;
    0 | old | 14 | 15)      # 14: an infoROM warning, with a valid answer; 15: a GPU is lost
      while IFS= read -r line; do say_text probe gpu "$line"; done <"$run/gpus.list"
      ((status != 15)) ||
        while IFS= read -r line; do say_text probe gpu "$line"; done <"$run/gpus.err"
      say_gpu_processes ;;
    *) IFS= read -r line < <(cat "$run/gpus.err" "$run/gpus.list")
       say_text probe gpu_error "$line" ;;
  esac
}

say_other_gpus() {          # reports GPUs of other makers, but not of bus 0: those drive a screen
  local card vendor cards=
  for card in "$sys"/class/drm/card*/device; do
    [[ $card != */card*-*/* && $(readlink -f "$card") != */0000:00:* ]] || continue
    { read -r vendor <"$card/vendor"; } 2>/dev/null || continue
    case $vendor in 0x1002) cards+=' AMD' ;; 0x8086) cards+=' Intel' ;; esac
  done
  [[ ! $cards ]] || say_text probe other_gpus "${cards# }"
}

say_gpu_processes() {       # reports the memory and the user of each process on a GPU
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

say_cgroups() {             # reports what control groups (version 1 or 2) leave of cores and memory
  local controllers path folder
  while IFS=: read -r _ controllers path; do
    case ,$controllers, in
      ,, | *,cpu,* | *,memory,*) folder=$sys/fs/cgroup${controllers:+/$controllers} ;;
      *) continue ;;
    esac
    [[ $controllers || ! -d $folder/unified ]] || folder+=/unified
    while :; do             # upwards; a container does not see the groups above its own
      say_cgroup "$folder$path"
      [[ $path == /?* ]] || break
      path=${path%/*}
    done
  done <"$proc/self/cgroup"
} 2>/dev/null

say_cgroup() {              # for say_cgroups: reports what the group with the folder $1 leaves
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
  while read -r key value; do           # cached files count as used, but the kernel can drop them
    [[ $key != inactive_file && $key != total_inactive_file ]] || cache=$value
  done <"$1/memory.stat"
  say_text probe cgroup_memory "$((limit > used - cache ? limit - used + cache : 0))/$limit"
}

# Forked processes share memory: a job certainly uses the memory of its largest process (rss), and
# at most the sum of all (peak).  Too low an rss only holds back other jobs; too high an rss would
# promise memory twice.
use_of() {                  # sets pids, rss, peak (kB), ticks of process $1 and its descendants
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

measure() {                 # reports what the machine has, and how much of that is free
  local key value busy total
  local -A claim_of=()      # pid -> the key of the job, or "other"
  read_ticks
  say_text probe ticks "$busy/$total"
  [[ $cores ]] || { count_cores; cores=$REPLY; }        # starts a process: once is enough
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

say_python() {              # $1 $2: kernel, driver; finding python3 may take long
  say_text facts "$1" "$2" "$(enter timeout 10 python3 -V)"
} 2>/dev/null

measure_again() {           # answers `measure` $1; in the background, since nvidia-smi may be slow
  local began line pid
  if [[ $want_gpus == 1 ]]; then
    # do not ask again if the last nvidia-smi still hangs: even SIGKILL did not end it
    { read -r pid <"$run/gpus.pid" && kill -0 "$pid"; } ||
      read -r -t "$GPU_LIMIT_S" line < <(query_gpus; echo) || give_up_gpus
  fi
  read_clocks
  began=$REPLY
  measure
  read_clocks
  say_text measured "$1" "$((REPLY - began))"
} 2>/dev/null

probe() {                   # waits for the login; measures if $1 is not empty; then reports "ready"
  local rsync word deadline=$((SECONDS + GPU_LIMIT_S)) missing=()
  while ((waiting > 0 && SECONDS < deadline)) &&
    read -r -t $((deadline - SECONDS)) word <&"$signals"; do
    waiting=$((waiting - 1))
    [[ $word != environment ]] || capturing=
  done
  # a login shell that waits for input would wait for ever
  [[ ! $capturing ]] || kill -KILL -- "-$capturing"
  capturing=
  [[ $want_gpus != 1 || -e $run/gpus.status ]] || give_up_gpus
  load_environment
  [[ $want_gpus != 1 ]] || query_gpus_again
  look_at_engine
  if [[ $1 ]]; then
    say_text probe ticks_before "$busy_before/$total_before"
    measure
  fi
  for word in find tar; do type -P "$word" >/dev/null || missing+=("$word"); done
  ((${#missing[@]} == 0)) || say_text broken "these programs are missing: ${missing[*]}"
  type -P rsync >/dev/null && rsync=1 || rsync=0
  say_text ready "$home" "$rsync"
}

look_at_engine() { :; }     # only a cluster has one: see REMOTE_ENGINE

# ---- Files ----

say_unstored() {            # reports why the files of stage $1 could not be stored
  if complaint; then say_text stage_failed "$1" "$REPLY"; else say_text broken "$REPLY" later; fi
}

freeze() {                  # makes links and list of the stage $1; the rest: its linked paths
  local stage=$home/stage/$1 id=$1 path entry
  shift
  {
    [[ -d $stage/copy ]] || mkdir -p -- "$stage/copy"
    (($# == 0)) || printf '%s\0' "$@" >"$stage/links"
    for path; do
      [[ $path != */* ]] || mkdir -p -- "$stage/copy/${path%/*}"
      ln -s -- "$stage/link/$path" "$stage/copy/$path"
      linked["$id ./$path"]=1
    done
    (cd -- "$stage/copy" && listing .) >"$stage/list"
  } || { say_unstored "$id"; return; }
  while IFS= read -rd '' entry; do sent["$id $entry"]=1; done <"$stage/list"
  dismiss_free              # these workers do not know the stage
  age=$((age + 1))
  say_text staged "$id"
} 2>>"$run/log"

# An unreadable file is made readable, if the login may do that, since rsync and tar must read it;
# an "m" entry with its former mode comes first.  A file or folder that stays unreadable gets the
# entry "-": otherwise such a folder would look empty.
listing() {                 # prints $@, or what is below ., with type, size and time as for rsync
  local depth=0
  [[ $1 != . ]] || depth=1
  ${at_once:+exec} find "$@" -mindepth "$depth" \
    '(' -type f ! -readable -o -type d '(' ! -readable -o ! -executable -o ! -perm -500 ')' ')' \
    -links +0 '(' -exec chmod u+rX '{}' ';' -o -true ')' \
    '(' '(' ! -readable -o -type d ! -executable ')' -printf '- %p\0' -prune -o \
    -printf 'm%m %p\0' ! -true ')' -o \
    -type d -printf 'd %p\0' -o -printf '%y %s %T@ %p\0'
}

# A job has no separate folder for results: at its end the worker lists the files that the job made
# or changed in its folder, and one rsync with a list of files fetches the results of many jobs.
# $1: folder below jobs/, $2: stage, $3: file of the list, the rest: paths (none: what changed)
list_back() {               # writes the list, unless it would be empty; fails if it cannot
  local folder=$1 id=$2 to=$3 entry path kind list='' found size=0
  shift 3
  [[ -r $home/jobs/$folder && -x $home/jobs/$folder ]] || chmod u+rwx -- "$home/jobs/$folder"
  [[ -d $home/jobs/$folder ]] || return 0
  cd -- "$home/jobs/$folder" && [[ -r . ]] || { printf '%s\0' "w$folder" -./. >"$to"; return; }
  found=(*)
  (($# || ${#found[@]})) || return 0
  while IFS= read -rd '' entry; do
    (($#)) || [[ ! ${sent["$id $entry"]+known} ]] || continue
    kind=${entry%% *}
    path=./${entry#*./}
    [[ ! ${linked["$id $path"]+known} || ! -L $path ]] || continue
    [[ $list ]] || { exec {list}>"$to" && printf 'w%s\0' "$folder" >&"$list"; } || return
    case $kind in
      f) entry=${entry#f } size=$((size + ${entry%% *})) ;;&
      [fdl]) printf '+%s\0' "$path" ;;
      -) printf -- '-%s\0' "$path" ;;
      m*) printf '%s %s\0' "$kind" "$path" ;;
      '!'*) printf '%s\0' "$entry" ;;
      *) printf '?%s\0' "$path" ;;      # a socket, a fifo, a device
    esac >&"$list" || { size=-1; break; }
  done < <(entries_of "$@")
  [[ $list ]] || return 0
  ((size < 1000000)) || printf 's%s\0' "$size" >&"$list" || size=-1
  exec {list}>&-
  ((size >= 0))
}

entries_of() {              # prints the paths $@, or all, as `listing` does; a missing one with !
  local path above rest at_once='' matches
  (($#)) || { at_once=1; listing .; }
  for path; do
    above=. rest=$path
    while [[ -x $above && $rest == */* ]]; do
      above+=/${rest%%/*} rest=${rest#*/}
      [[ ! -d $above || -x $above ]] || listing "$above" -maxdepth 0
    done
    if [[ $path == . ]]; then
      listing .
    elif [[ -e $path || -L $path ]]; then
      listing "./$path"
    elif match "$path"; then
      in_groups listing "${matches[@]}"
    elif [[ ! -d $above || -x $above ]]; then   # else a closed folder may contain the path
      printf '!%s\0' "$path"
    fi
  done
}

match() {                   # for entries_of: sets matches to the paths that the pattern $1 matches
  local IFS='' path above
  matches=()
  [[ $1 == *[*?[]* && $- != *f* ]] || return
  shopt -u dotglob
  for path in $1; do
    [[ /$path/ != */.?(.)/* ]] || continue      # .* matches these, too
    above=$path
    while [[ $above == */* ]]; do
      above=${above%/*}
      [[ ! -L $above ]] || continue 2           # a link may lead out of the folder
    done
    matches+=("./$path")
  done
  ((${#matches[@]}))
}

find_list() {               # REPLY: the file that lists what the job $1 left
  REPLY=$home/jobs/$1.back
  [[ ! -e $claims/$project.$1.back ]] || REPLY=$claims/$project.$1.back
}

send_list() {               # sends the list $2 of the job $1
  local bytes
  bytes=$(stat -c %s -- "$2")
  if ((${bytes:-0} > LONGEST_LIST)); then
    say "unlistable"$'\t'"$1"
    return
  fi
  bytes=$run/back.$1.$RANDOM            # an earlier copy may still be on its way
  cp -- "$2" "$bytes" || { bytes=$2.sent; cp -- "$2" "$bytes"; }
  say "bulk"$'\t'"$bytes"$'\t'"back"$'\t'"$1"
}

find_folder() {             # REPLY: the folder below jobs/ with what the job $1 left, or ''
  local entry=
  find_list "$1"
  [[ ! -e $REPLY ]] || IFS= read -rd '' entry <"$REPLY"
  [[ $entry =~ ^w(work[.0-9]+)$ ]] && REPLY=${BASH_REMATCH[1]} || REPLY=
}

list_again() {              # sends a list of what the paths $2... of the job $1 have now; else all
  local key=$1 to=$run/again.$1
  shift
  find_folder "$key"
  if [[ ! $REPLY || ! -d $home/jobs/$REPLY ]]; then
    printf '!%s\0' "${@:-.}" >"$to"
  elif (($#)); then
    : >"$to"
    (set -f; list_back "$REPLY" '' "$to" "$@")  # these are names, not patterns
  else
    find_list "$key"
    cp -- "$REPLY" "$to"
  fi
  send_list "$key" "$to"
} 2>/dev/null

# ---- Jobs ----

start_pending() {           # starts the jobs requested since the last call
  local key file held='' said='' taken=()
  local -A worker_for=()    # key -> the number of its worker
  ((${#pending[@]})) || return 0
  hire_all
  claim_needs || held=1
  for key in "${pending[@]}"; do
    file=$home/jobs/$key
    if [[ $held && ! -e $file ]]; then
      release
      say "held"$'\t'"$key"             # other batches leave no room for it
    elif take; then
      ((${#said} < 3000)) || { say "started$said"; said=; }
      said+=$'\t'$key
      taken+=("$key")
      begun[$key]=1
    elif is_taken; then
      beside ask_about "$key"
    else
      say_untaken
      release
    fi
  done
  [[ ! $said ]] || say "started$said"   # before the first job can report its end
  for key in "${taken[@]}"; do hand_over; done
  forget_pending
}

say_untaken() {             # for start_pending: reports why the job $key could not be taken
  complaint
  [[ ! -e $file ]] || REPLY='a job of that name exists, with another command'
  say_text refused "$key" "$REPLY"
}

forget_pending() {          # for start_pending: clears the requests, all of which are done
  pending=() stage_of=() gpus_of=() need_of=() mode_of=() limit_of=() command_of=() back_of=()
  paths_of=()
}

# Only the runner that creates the file of a job begins the job.  O_EXCL (set -C) is as atomic as
# mkdir, on NFS (version 3 and later) too, and needs no process.
take() {                    # for start_pending: begins the job $key; fails if it cannot
  local slot=${worker_for[$key]-0} made=''
  [[ ${worker_self[slot]-} ]] || return
  set -C
  {
    made=1
    set +C
    printf '%s\n#%-126s\n' "${command_of[$key]}" \
      "starting ${worker_self[slot]} ${worker_folder[slot]}" && prepare_tty
  } >"$file" && return
  set +C
  [[ ! $made ]] || rm -f -- "$file"     # the disk is full: nothing was started
  return 1
}

is_taken() {                # for start_pending: succeeds if the job $key was begun before
  local text=
  IFS= read -rd '' text <"$file"
  text=${text%$'\n'#*}
  [[ -e $file && (! $text || $text == '#'* || $text == "${command_of[$key]}") ]]
} 2>/dev/null

# The terminal of a job is a separate ssh session beside the channel, which runs `tty`.  The worker
# runs `wait` in place of the job; `wait` reads from a FIFO the exit status, or that the session was
# cut off.  So the end of a job is recorded in the same way with and without a terminal.
prepare_tty() {             # for take: writes both scripts, if the job $key wants a terminal
  [[ ${mode_of[$key]} == tty ]] || return 0
  mkdir -- "$file.more" && cat >"$file.more/wait" <<'END' && cat >"$file.more/tty" <<'END'
mkfifo "${0%/*}/code"
read -r code <"${0%/*}/code" || code=129
exit "$code"
END
more=${0%/*}
until [[ -p $more/code ]]; do sleep 0.02; done
{
  IFS= read -r assignments; IFS= read -r by_env; IFS= read -r folder; IFS= read -r program
} <"$more/exports"
exec 8>"$more/code" 9>"${folder%.*}.alive"
cd -- "$folder" || exit
trap : INT QUIT                         # Ctrl-C is for the job; this script reports how it ended
set -- "$TERM" "$BASH"
eval "$assignments TERM=\$1 $by_env \"\$2\" $program 8>&-"
echo "$?" >&8
END
}

# ---- Workers ----

# A worker is a process that runs one job after the other, so that a job costs one fork.  A job
# cannot notice the job before it: each has its own bash and process group, and its folder is as it
# was sent (prepare_folder).  A worker exits when the runner has exited.  It also exits after a job
# that left a process behind, changed the priority, or had stdin, a terminal or a time limit.
hire_all() {                # for start_pending: finds each job a worker, a free or a new one
  local key slot new=() pipes=() folders=("$home/jobs")
  hear_workers
  for key in "${pending[@]}"; do
    [[ ! -e $home/jobs/$key && ! ${worker_for[$key]-} ]] || continue    # begun, or requested twice
    find_free "${stage_of[$key]}" || {
      slot=$((hired += 1))
      new+=("$slot")
      pipes+=("$run/to.$slot" "$home/jobs/$prefix.$slot.alive")
      worker_folder[slot]=$prefix.$slot.1 worker_ticks[slot]=0
      [[ ${stage_of[$key]} ]] || folders+=("$home/jobs/$prefix.$slot.1")
    }
    worker_for[$key]=$slot worker_stage[slot]=${stage_of[$key]}
  done
  ((${#new[@]})) || return 0
  in_groups make_some_folders "${folders[@]}"
  in_groups make_some_pipes "${pipes[@]}"
  for slot in "${new[@]}"; do hire; done
}

make_some_folders() {
  mkdir -p -- "$@"
}

make_some_pipes() {
  mkfifo -- "$@"
}

find_free() {               # slot: a free worker, best with the stage $1; fails if none is free
  slot=''
  for slot in "${free[@]}"; do
    [[ ${worker_stage[slot]} != "$1" ]] || break
  done
  [[ $slot ]] && unset -v "free[$slot]"
}

hire() {                    # for hire_all: starts the worker $slot; if it cannot, `take` fails
  local fd orders
  [[ -p $run/to.$slot && -p $home/jobs/$prefix.$slot.alive ]] || return
  # Opened here: if this runner died before the worker opened the FIFO, its contents would be lost.
  exec {fd}<>"$run/to.$slot" || return
  exec {orders}<"$run/to.$slot" || return
  worker_fd[slot]=$fd
  beside work "$slot"
  exec {orders}<&-
  worker_age[slot]=$age
  ! identify "$!" || worker_self[slot]=$REPLY
}

hear_workers() {            # notes which workers are free; dismisses exited and outdated ones
  local slot folder ticks
  while read -r -t 0 -u "$idle" && read -r -u "$idle" slot folder ticks; do
    worker_folder[slot]=$folder worker_ticks[slot]=$ticks
    free[slot]=$slot
    [[ $folder != gone && ${worker_age[slot]} == "$age" ]] || dismiss
  done
}

dismiss() {                 # lets the worker $slot exit, and notes its files for removal
  local fd=${worker_fd[slot]}
  exec {fd}>&-
  leftovers+=("$home/jobs/$prefix.$slot.alive" "$run/to.$slot")
  [[ ${worker_folder[slot]} == gone ]] || leftovers+=("$home/jobs/${worker_folder[slot]}")
  unset -v "worker_fd[$slot]" "worker_self[$slot]" "worker_age[$slot]" "worker_folder[$slot]" \
    "worker_stage[$slot]" "worker_ticks[$slot]" "free[$slot]"
}

dismiss_free() {            # lets all workers exit that have no job
  local slot
  hear_workers
  for slot in "${!free[@]}"; do dismiss; done
}

release() {                 # for start_pending: frees the worker of $key, which did not start
  local slot=${worker_for[$key]-0}
  [[ ${worker_self[slot]-} ]] || return
  : >"$claims/$project.$prefix.$slot"
  free[slot]=$slot
}

hand_over() {               # for start_pending: gives the job $key to its worker
  local command=${command_of[$key]}
  ((${#command} < 2000)) || command=    # else the worker reads the file: a pipe holds 64 KiB
  printf 'key=%q stage=%q gpus=%q mode=%q limit=%q back=%q paths=%q wrap=%q command=%q\0' "$key" \
    "${stage_of[$key]}" "${gpus_of[$key]}" "${mode_of[$key]}" "${limit_of[$key]}" \
    "${back_of[$key]}" "${paths_of[$key]}" "${wrap_of[$key]-}" "$command" \
    >&"${worker_fd[${worker_for[$key]}]}"
  unset -v "wrap_of[$key]"              # not in forget_pending: later starts keep theirs
}

# The variables of a worker are global: no other code runs in its process, and the functions that
# `work` calls would see its local variables, too.
work() {                    # a worker, in a process and a group of its own; $1: its number
  # `hire` opened `orders`
  slot=$1 folder=${worker_folder[$1]} claim=$claims/$project.$prefix.$1
  pipe=$home/jobs/$prefix.$1.alive
  gpus='' mode='' limit='' back='' paths='' wrap=''     # and further variables of an order
  has='' fresh=1 baseline='' ticks=0 login_folder=$PWD
  trap : TERM INT HUP PIPE
  ulimit -Sn "$file_limit"
  exec {fd}<>"$pipe"                    # so that no open blocks
  exec {left}<"$pipe" {input}</dev/null {fd}>&- {events}>&- {signals}>&- {idle}>&-
  read -r score </proc/self/oom_score_adj && ((score >= JOB_OOM_SCORE)) ||
    echo "$JOB_OOM_SCORE" >/proc/self/oom_score_adj
  read -r _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ nice _ </proc/self/stat
  enter_environment
  [[ -d $home/jobs/$folder ]] || has=none
  read_clocks
  made=$REPLY
  while read_order && run_job; do :; done
} 2>/dev/null

read_order() {              # for work: reads fields of the next job; fails if the runner has ended
  IFS= read -rd '' -u "$orders" order && eval "$order" || return
  file=$home/jobs/$key
  [[ $command ]] || { IFS= read -rd '' command <"$file"; command=${command%$'\n'#*}; }
}

# A worker has the environment of the jobs, except what would change the worker or its programs
# (is_apart).  Each job is given that part at its start: to export everything took 0.15 ms a job.
enter_environment() {
  export -n SSH_SCHEDULER_CAPTURE "${dropped[@]}"
  eval "export $inherited"
  SHLVL=$((SHLVL - 1))                  # the worker adds no level of shells
}

run_job() {                 # for work: runs the job $key; fails if the worker can take no other
  status='' pid=''
  # shellcheck disable=SC2064            # when the trap runs, the variables of callers are gone
  trap "last_words_of $slot $folder $key" EXIT
  read_clocks
  began=$REPLY
  if prepare_folder; then
    [[ $mode != stdin ]] || keep_input
    [[ ! $limit ]] || keep_time
    launch
    [[ ! $mode$limit ]] || end_keepers
  else
    printf 'ssh-scheduler: the files of the job could not be copied into its folder\n' >>"$file.err"
    has=none
  fi
  status=${status:-125}
  # shellcheck disable=SC2064
  trap "last_words_of $slot $folder $key $status" EXIT
  conclude
}

# The output goes to files: so no job waits for a slow reader or a broken connection, and a client
# can be killed at any byte and come back.  The price is disk space on both sides.
#
# The job has a process group of its own.  So "kill 0", which is common in scripts, does not reach
# the worker, which has to record how the job ended.  And the worker sees if the job left processes
# in the group.
launch() {                  # for run_job: runs the bash of the job to its end; sets pid and status
  program=("../$key")
  printf -v own '%s=%q ' SSH_SCHEDULER_JOB "${key%.*}" SSH_SCHEDULER_ID "$project.$key"
  [[ $gpus == - ]] || own+="CUDA_VISIBLE_DEVICES=$gpus CUDA_DEVICE_ORDER=PCI_BUS_ID "
  REPLY=
  [[ ! $functions$named ]] || { functions_of; own+=$REPLY; }
  [[ ! $wrap ]] || wrap_program "$REPLY"
  if [[ $mode == tty ]]; then
    printf '%s\n' "$assignments$own" "${by_env:+$(printf '%q ' "${by_env[@]}")}" \
      "$home/jobs/$folder" "$(printf '%q ' "${program[@]}")" >"$file.more/exports"
    # shellcheck disable=SC2034          # the text of eval uses it
    program=("$file.more/wait")
  fi
  exec {out}>>"$file.out" {err}>>"$file.err" || return  # the file `out` marks the job as begun
  umask "$mask"
  set -m
  eval "$apart$own"'"${by_env[@]}" "$BASH" "${program[@]}" <&"$input" >&"$out" 2>&"$err" \
    {held}>"$pipe" {input}<&- {out}>&- {err}>&- {orders}<&- {left}<&- &'
  pid=$!
  set +m
  umask 077
  exec {out}>&- {err}>&-
  await
}

# A bash reads the words of the wrapper, in the folder and with the environment of the job, and then
# becomes the wrapper.  A container may see only that folder: so the command is passed as text, with
# $0 and line numbers as in the file.  Only the bash of the job gets the login functions.
wrap_program() {            # for launch: changes program and own; $1: the assignment of BASH_ENV
  local text=$'SSH_SCHEDULER_WRAP=(\n'$wrap$'\n)\n'
  text+='\builtin type -P -- "${SSH_SCHEDULER_WRAP-}" >/dev/null || {
    \builtin printf "ssh-scheduler: the wrapper %s is missing on this machine, or is no program \
(wrap: of the machine file)\n" "${SSH_SCHEDULER_WRAP:-\"\"}" >&2
    \builtin exit 127
  }
  \builtin '${1:+export }${1:-unset -v BASH_ENV}$'\n'
  text+='\builtin exec -- "${SSH_SCHEDULER_WRAP[@]}" "$@"'
  program=(-c "$text" "${program[@]}" bash -c "$command"$'\n' "${program[@]}")
  # The kernel takes no argument of 128 KiB: for such a command the wrapper has to see the file.
  ((${#command} < 131000)) || program=("${program[@]:0:4}" "../$key")
  own+='BASH_ENV= '
}

# A trapped signal would interrupt `wait`, and if it comes as the job ends, bash loses the status of
# the job (and reports -1).  So the worker ignores signals while it waits.  It does so only after it
# has started the job, which would inherit ignored signals.
await() {                   # for launch: waits for the job; sets status
  trap '' TERM INT HUP PIPE
  wait "$pid"
  status=$?
  trap : TERM INT HUP PIPE
}

# The input is a FIFO.  A process beside the job holds the FIFO open until `eof` reports that the
# input is complete: so the job does not take a broken connection for the end of its input.
keep_input() {              # for run_job: sets input and keeper
  mkdir -- "$file.more"
  mkfifo -- "$file.more/eof" "$file.more/in.new"
  # Both ends are open before the feeder (REMOTE_FEED) sees the FIFO: it must find a reader.
  exec {eof}<>"$file.more/eof" {both}<>"$file.more/in.new" {input}<&-
  exec {input}<"$file.more/in.new"
  mv -- "$file.more/in.new" "$file.more/in"
  # A cancel must not stop this process: the job would take its input for complete.
  { trap '' TERM; exec {left}<&- {orders}<&- {input}<&-; read -r <&"$eof"; } &
  keeper=$!
  disown "$keeper"
  exec {eof}<&- {both}<&-
}

# The time limit is kept beside the job, so that it also holds when no client is connected.
keep_time() {               # for run_job: sets watchdog, which stops the job as a cancel does
  {
    trap '' TERM
    exec {quiet}<>"$pipe" {left}<&- {orders}<&- {input}<&-
    read -r -t "$limit" <&"$quiet"      # nothing ever comes
    printf 'ssh-scheduler: stopped after %s s, its time limit\n' "$limit" >>"$file.err"
    mkdir -p -- "$file.more"
    : >"$file.more/late"
    end_jobs 5 "$key"
  } &
  watchdog=$!
}

end_keepers() {             # for run_job: stops keeper and watchdog; sets status after a time limit
  if [[ $mode == stdin ]]; then
    exec {input}<&-
    kill -KILL "$keeper"
  fi
  if [[ -e $file.more/late ]]; then
    wait "$watchdog"
    status=124              # as that of timeout(1)
  elif [[ $limit ]]; then
    kill -KILL "$watchdog"
    wait "$watchdog"
  fi
}

conclude() {                # for run_job: records and reports how the job ended
  local before=$ticks wall used next=gone
  read_clocks
  wall=$((REPLY - began))
  read_ticks_of_jobs
  used=$((ticks - before))
  ((status != 137)) || tell_lack_of_memory
  [[ ! -e $file ]] || list_results      # else the job was revoked, and its files removed
  [[ ! -e $claim ]] || : >"$claim"      # before the record, whose reader may remove the claim
  record "$file" "ended $status $wall $folder" "$command"
  if leaves_nothing && [[ $niceness == "$nice" && ! $mode$limit ]]; then
    [[ ! -e $file.back ]] || { next_folder; read_ticks_of_jobs; }       # do not charge the next job
    next=$folder
  elif [[ -e $file && ! -e $file.back ]]; then
    printf 'w%s\0' "$folder" >"$file.back"      # so that the folder is removed with the job
  fi
  # Reported first: when the client learns of the end, it may send the next job to this worker.
  printf '%s\n' "$slot $next $ticks" 1<>"$run/idle"
  say_ended "$key" "$status" "$wall" "$used"
  trap - EXIT
  [[ $next != gone ]]
}

read_ticks_of_jobs() {      # for conclude: sets niceness; sets ticks to those of ended children
  read -r _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ user_ticks system_ticks _ niceness _ </proc/self/stat
  ticks=$((user_ticks + system_ticks))
}

# The kernel counts the processes that it kills for lack of memory, whatever the limit was.  The
# last look at the jobs has noted the count (look).
tell_lack_of_memory() {     # for conclude: writes to the job's stderr if it was killed for that
  local before
  read -r before <"$run/kills" && count_kills && ((REPLY > before)) &&
    echo "ssh-scheduler: the kernel killed a process for lack of memory, and then this job ended" \
      >>"$file.err"
}

count_kills() {             # REPLY: how many processes the kernel has killed for lack of memory
  local name
  while read -r name REPLY; do [[ $name != oom_kill ]] || return 0; done <"$proc/vmstat"
  return 1
}

list_results() {            # for conclude: lists what the job left; a failure sets status 125
  local listed
  if is_untouched; then
    [[ $back == paths ]] || return
  else
    baseline=
    [[ $back != none ]] || return
  fi
  eval "listed=($paths)"
  ! list_back "$folder" "$stage" "$file.back" "${listed[@]}" || return
  printf 'note\t%s: the disk of the machine is full; its output may be incomplete\n' "${key%.*}" \
    1<>"$run/events"
  # The folder of claims is usually in memory.
  list_back "$folder" "$stage" "$claims/$project.$key.back" "${listed[@]}" || ((status)) ||
    status=125
}

leaves_nothing() {          # for conclude: succeeds if all that the job started has ended
  # read returns at once if no process has the FIFO open.  One that is about to exit gets 0.1 s.
  read -r -t 0.1 <&"$left"
  if (($? > 128)); then
    say_left
    return 1
  fi
  [[ ! $pid ]] || ! kill -0 -- "-$pid"
}

say_left() {                # for leaves_nothing: records and reports that processes still run
  local other comm text='' count=0
  [[ ! -e $file ]] || record "$file" "ended $status $wall left $folder" "$command"
  while read -r other; do
    [[ $other != "$BASHPID" ]] && { read -r comm <"/proc/$other/comm"; } || continue
    count=$((count + 1))
    escape "$comm"
    ((count > 5)) || text+="${text:+, }$REPLY ($other)"
  done < <(exec {left}<&-; holders "$key")
  ((count < 6)) || text+=" and $((count - 5)) more"
  ((count == 0)) || printf 'left\t%s\t%s\n' "$key" "$text" 1<>"$run/events"
}

last_words_of() {           # records the end of job $3 of worker $1; $2: folder; $4: status or ''
  : >"$claims/$project.$prefix.$1"
  if [[ $4 ]]; then
    record "$home/jobs/$3" "ended $4 untold $2"         # the next look at the job reports it
  else
    record "$home/jobs/$3" "lost $2"
    no_process
    printf 'refused\t%s\t%s\n' "$3" "$REPLY" 1<>"$run/events"
  fi
}

# ---- Folders of workers ----

# Each job has its own copy of what was sent.  If a job leaves its copy untouched, the next one gets
# it, since copying and removing costs more than a job.  A copy is untouched if the latest change
# (ctime) of anything in it is the same as before: whatever a job does to a file, its mode or its
# folder renews the ctime, and no program can set it.  A du runs beside the worker and prints the
# latest ctime when asked through a pipe.  A kernel notes times in steps of up to 10 ms: so an
# answer of du counts only if the copy was older than that, and compared with what was sent.
prepare_folder() {          # for run_job: enters a folder that is as it was sent
  [[ $has == "$stage" ]] && { [[ $fresh$baseline ]] || is_as_sent; } || make_folder || return
  fresh=
  [[ . -ef $home/jobs/$folder ]] || cd -- "$home/jobs/$folder" || return
  OLDPWD=$login_folder
}

make_folder() {             # copies the stage into a new folder; fails if that is impossible
  [[ ! -e $home/jobs/$folder ]] || remove "$home/jobs/$folder"
  has=$stage fresh=1 baseline=''
  if [[ $stage ]]; then
    cp -a --reflink=auto -- "$home/stage/$stage/copy" "$home/jobs/$folder"
  else
    mkdir -- "$home/jobs/$folder"
  fi 2>>"$file.err" || return
  read_clocks
  made=$REPLY
}

next_folder() {             # leaves the present folder to the job that has run
  folder=${folder%.*}.$((${folder##*.} + 1)) has=none baseline=''
}

is_as_sent() {              # compares the folder with what was sent, names and modes included
  local sent_as='700 d .'
  ((began - made > 2)) || sleep 0.03
  ask_du || return
  baseline=$answer since=$clock
  [[ ! $stage ]] || sent_as=$(describe "$home/stage/$stage/copy")
  [[ $(describe "$home/jobs/$folder") == "$sent_as" ]] || baseline=
  [[ $baseline ]]
}

describe() {                # prints the files in the folder $1; of a stage only a checksum
  cd -- "$1" || return
  if [[ $stage ]]; then
    find . -type d -printf '%m d %T@ %p\0' -o -printf '%m %y %s %T@ %l %p\0' | sort -z | cksum
  else
    find . -printf '%m %y %p\n'
  fi
}

is_untouched() {            # succeeds if nothing has changed in the folder since is_as_sent
  [[ $baseline ]] && ((clock - since < 2 && since - clock < 2)) &&      # else the clock was set
    ask_du && [[ $answer == "$baseline" ]] && since=$clock
}

# Errors of du come through the same pipe, so that each question gets an answer.  A read with a time
# limit would take 0.1 ms more: bash then waits for each byte separately.
ask_du() {                  # answer: when anything in the folder was last changed
  local path
  if [[ ! ${DU[1]-} ]]; then
    coproc DU {
      cd -- "$home/jobs" && exec {left}<&- {orders}<&- \
        du -sl --time=ctime --time-style=+%s.%N --files0-from=- 2>&1
    }
  fi
  printf '%s\0' "$folder" >&"${DU[1]}" &&
    IFS=$'\t' read -r -u "${DU[0]}" _ answer path && [[ $path == "$folder" ]] ||
    { end_du; return 1; }
}

end_du() {                  # stops du, whose answer was not the expected one
  [[ ! ${DU_PID-} ]] || { kill "$DU_PID"; wait "$DU_PID"; }
}

# ---- Records ----

# The record is the last line of the file of a job, after the command: a comment, for the bash that
# runs the file.  A new record is written over the old one, not renamed into its place.  A rename
# costs a process, and a full disk refuses a new file, but not these 128 bytes, which have been
# there since the job was taken.  An incomplete record reads as `damaged`.
record() {                  # $1: the file of a job, $2: its record, $3: its command, if known
  local text=${3-}$'\n'
  [[ -e $1 ]] || return                 # the job was removed; the redirection would create it again
  if (($# == 2)); then
    IFS= read -rd '' text <"$1"
    text=${text%#*}
  fi
  # If even that fails, the name of the file gets the result, which needs no space.
  printf '%s#%-126s\n' "$text" "$2" 1<>"$1" || [[ $2 != ended* ]] || mv -- "$1" "$1 $2"
}

read_record() {             # $1: the file of a job; sets word, value, more and folder
  local line='' other now
  word=damaged value='' more='' folder=''
  if [[ -e $1 ]]; then
    ! IFS= read -rd '' line <"$1" || return 0   # no command has a NUL
    ((${#line} < 128)) || line=${line: -128}
    line=${line%$'\n'}
    line=${line##*$'\n'}
  else
    for other in "$1 ended "*; do line="#${other#"$1 "}"; done
  fi
  line=${line%"${line##*[! ]}"}
  other='revoked|queued|lost|ended [0-9]{1,3}( [0-9]{1,15})?|starting [1-9][0-9]* [0-9]+ [0-9a-f-]+'
  [[ $line =~ ^#($other)( untold| left)?( (work[.0-9]+))?$ ]] || return 0
  folder=${BASH_REMATCH[5]} more=${BASH_REMATCH[3]# }
  word=${BASH_REMATCH[1]%% *} value=${BASH_REMATCH[1]#* }
  if [[ $value == *" $NO_BOOT_ID" ]]; then      # a start in the future was before a restart
    line=${value#* }
    read -r now _ </proc/uptime
    ((10#${line%% *} <= 10#${now/./})) || value=${value%% *}" ${line%% *} ${NO_BOOT_ID//0/f}"
  fi
}

is_alive() {                # succeeds if the process that `identify` once printed as $1 still runs
  identify "${1%% *}" && [[ $REPLY == "$1" ]]
}

say_ended() {               # $1: key, $2: exit status, $3, $4: wall and processor time (cs)
  local file=$home/jobs/$1 event entry back=
  event=ended$'\t'$1$'\t'$2$'\t'$3$'\t'$4
  REPLY='='
  [[ ! -s $file.out ]] || stream_text "$file.out"
  event+=$'\t'$REPLY
  REPLY='='
  [[ ! -s $file.err ]] || stream_text "$file.err"
  event+=$'\t'$REPLY
  find_list "$1"
  if [[ -s $REPLY ]]; then
    while ((${#back} < 1000)) && IFS= read -rd '' entry; do
      escape "$entry"
      back+=$'\t'$REPLY
    done <"$REPLY"
    ((${#back} < 1000)) || back=$'\t'@  # asked for with "list"
  fi
  # The FIFO is opened by name: a worker does not hold it open.  Without a runner nobody reads it.
  printf '%s\n' "$event$back" 1<>"$run/events"
}

say_recorded_end() {        # $1: key; value: STATUS WALL, or STATUS alone, as in its record
  [[ $value == *' '* ]] || value+=' 0'
  say_ended "$1" "${value%% *}" "${value#* }" 0
}

stream_text() {             # REPLY: "=TEXT" of the file $1 if it is a short text, else "@BYTES"
  local text=
  if IFS= read -rd '' -n 601 text <"$1" || ((${#text} > 600)); then
    REPLY=@$(stat -c %s -- "$1")        # longer than that, or with a NUL
  else
    escape "$text"
    REPLY="=$REPLY"
  fi
}

# The state of a job is reported once: if the job runs, `look` notices its end, at most 2 s later.
# Asking in a loop took 1.6 % of a core for each job.  One process asks about all jobs, since a
# search of /proc is expensive, and many searches at once would overload a busy machine.
ask_about() {               # reports the state of the jobs $@, which were begun before
  local key file word value more folder tries asked=("$@") later lost=()
  local -A why=()
  for ((tries = 0; tries < 20 && ${#asked[@]}; tries++)); do
    ((tries == 0)) || sleep 0.1
    later=()
    for key in "${asked[@]}"; do
      is_alive "$self" || return        # the runner has ended
      file=$home/jobs/$key
      read_record "$file"
      is_told || later+=("$key")
    done
    asked=("${later[@]}")
  done
  lost+=("${asked[@]}")
  ((${#lost[@]})) || return
  for key in "${lost[@]}"; do           # first: else another process may record a kill
    read_record "$home/jobs/$key"
    record "$home/jobs/$key" "lost${folder:+ $folder}"
  done
  end_processes 5 "${lost[@]}"          # processes may still run; the jobs may start again
  for key in "${lost[@]}"; do
    say_text lost "$key" "${why[$key]-the job ended without an exit code}"
  done
} 2>/dev/null

is_told() {                 # for ask_about: reports the state of $key; fails while that may change
  [[ $word != starting || ! -e $file.more/script ]] || word=queued      # on a node of a cluster
  case $word in
    revoked) say "absent"$'\t'"$key" ;;         # repeated: the first answer may have been lost
    ended) say_recorded_end "$key" ;;
    lost) lost+=("$key") ;;
    queued)
      say_text broken "this folder has jobs in the queue of a cluster: put into the machine \
file the line \`engine:\` again" ;;
    starting)
      if [[ $value != *" $boot_id" ]]; then
        why[$key]='the machine was restarted'
        lost+=("$key")
      elif is_alive "$value"; then
        [[ -e $file.out ]] || ((tries == 19)) || return         # its files are being copied
        say "started"$'\t'"$key"
      else
        read_record "$file"             # a worker records the end before it exits
        [[ $word == starting ]] || return
        is_left_told
      fi ;;
    *) return 1 ;;
  esac
}

# A job has begun if its file `out` exists: the worker creates that and then begins the job.
is_left_told() {            # for is_told: reports the state of $key, whose worker has exited
  if [[ ! -e $file.out ]]; then
    lost+=("$key")          # its worker never began it
  elif [[ $(holders "$key") ]]; then
    say "started"$'\t'"$key"
  else
    record_killed "$key"
  fi
}

look() {                    # $@: (KEY OUT ERR)...; sends what follows these bytes of the streams
  local files=() size file chunk count=0 unclear=()
  local -A since what
  ! count_kills || echo "$REPLY" >"$run/kills"
  while (($#)); do
    look_at "$1"
    for file in "out $2" "err $3"; do
      files+=("$home/jobs/$1.${file% *}")
      since["$home/jobs/$1.${file% *}"]=${file#* }
      what["$home/jobs/$1.${file% *}"]=$1$'\t'${file/ /$'\t'}
    done
    shift 3
  done
  while read -r size file; do
    ((size > since["$file"])) || continue
    count=$((count + 1))
    chunk=$run/chunk.$BASHPID.$count    # not inside the pipe, whose parts have pids of their own
    tail -c "+$((since["$file"] + 1))" -- "$file" | head -c 262144 >"$chunk"
    say "bulk"$'\t'"$chunk"$'\t'"growth"$'\t'"${what["$file"]}"
  done < <(in_groups sizes_of "${files[@]}")
  ((${#unclear[@]} == 0)) || is_alive "$looking" || ask_about "${unclear[@]}"
} 2>/dev/null

sizes_of() {
  stat -c '%s %n' -- "$@"
}

look_at() {                 # for look: reports the memory of the job $1, or adds it to unclear
  local word value more folder pids rss peak ticks
  read_record "$home/jobs/$1"
  if [[ $word == starting ]] && is_alive "$value"; then
    use_of "${value%% *}"
    ((peak == 0)) || say "used"$'\t'"$1"$'\t'"$peak"
  elif [[ $word == starting || $more == untold || ! ${begun[$1]-} ]]; then
    unclear+=("$1")         # else its worker reports the end, in more detail
  fi
}

list_others() {             # reports the jobs on this machine that journals other than $1 claimed
  local file id runner who word value more folder command list=$run/others.$RANDOM
  local -A led=()           # identities of journals whose clients are connected
  for file in "$home"/run.*; do
    { read -r runner && IFS= read -r who; } <"$file/self" || continue
    [[ $file == */"run.${HOSTNAME:-here}."* ]] && ! is_alive "$runner" || led["${who##* }"]=1
  done
  for file in "$home"/jobs/*; do
    id=${file##*.}
    [[ $id == *-* ]] && id=${id#*-} || continue         # else the name is no KEY
    id=${id%% *} file=${file%%" ended "*}
    [[ $id != "$1" && ! ${led["$id"]-} ]] || continue
    read_record "$file"
    if [[ $word == starting ]]; then
      word=running
      runs_still || { read_record "$file"; word=${word/starting/lost}; }
    fi
    word=${word/queued/starting}
    IFS= read -rd '' command <"$file"
    [[ $word == revoked ]] || printf '%s\0' "${file##*/}" "$word" "${value%% *}" \
      "${command%$'\n#'*}"
  done >"$list"
  if [[ -s $list ]]; then
    say "bulk"$'\t'"$list"$'\t'"others"
  else
    say others
  fi
} 2>/dev/null

runs_still() {              # for list_others: succeeds if the job of $file, which has begun, runs
  is_alive "$value"
}

# ---- Needs of others ----

# Batches see each other's jobs by claims.  The claim of a job is a file with its worker's pid and
# its need, in a folder of the machine where no user can change another's files.  A runner claims
# first, then adds up all claims; if these exceed the limits from the client, the runner empties its
# claim again.  Of two runners that claim at once, at least one sees the claim of the other: so no
# lock is needed, which a killed batch could leave behind.  A claim is ignored if its process is
# gone, if it is empty, or if it makes no sense.
own_claims() {              # makes the folder of claims; uses none that belongs to another user
  [[ -e $claims || -L $claims ]] || mkdir -m 755 -- "$claims"
  [[ -d $claims && ! -L $claims && -O $claims ]] || { claims=$run/claims; mkdir -p -- "$claims"; }
} 2>/dev/null

claim_needs() {             # claims what the pending jobs need; fails if others leave no room
  local key slot file
  own_claims                # another batch may have removed the folder at its end
  umask 022
  for key in "${!worker_for[@]}"; do
    slot=${worker_for[$key]}
    [[ ! ${worker_self[slot]-} ]] || printf '%-80s%s\n%s %s\n' "${worker_self[slot]}" \
      "${need_of[$key]}" "$key" "${worker_ticks[slot]}" >"$claims/$project.$prefix.$slot"
  done
  umask 077
  ((${#limits[@]})) || return 0
  for file in "$shared"/ssh_scheduler.*/*; do
    [[ $file == "$claims/$project."* || ! -s $file ]] || { fits_all; return; }
  done
}

fits_all() {                # succeeds if all claims on this machine are within the limits
  local file process need key base word cores=0 memory=0 ours=0 all=0 alone=0 gpu mb time reserved
  local mine=() jobs=() gpu_mb=() gpu_time=() gpu_alone=()      # by the GPU's index
  for file in "$claims/$project."*; do add_claim; done
  for file in "$shared"/ssh_scheduler.*/*; do   # with many batches, stop when the machine is full
    [[ $file != "$claims/$project."* ]] && add_claim && ! has_room && return 1
  done
  has_room || return
  for word in "${limits[@]:2}"; do
    IFS=: read -r gpu mb time <<<"$word"
    [[ ${mine[gpu]-} ]] || continue
    ((jobs[gpu] == 1 || (gpu_alone[gpu] == 0 && gpu_time[gpu] <= time))) || return
    ((gpu_mb[gpu] <= mb)) || return
  done
}

add_claim() {               # for fits_all: adds the claim of $file; fails if there is none
  read_claim "$file" || return
  # shellcheck disable=SC2086            # numbers and colons: read_claim checked that
  set -- $need
  all=$((all + 1)) cores=$((cores + $1)) memory=$((memory + $2)) alone=$((alone + $3))
  [[ ! $key ]] || ours=$((ours + 1))
  shift 3
  for word; do
    IFS=: read -r gpu mb time reserved <<<"$word"
    [[ ! $key ]] || mine[gpu]=1
    ((jobs[gpu] += 1, gpu_mb[gpu] += mb, gpu_time[gpu] += time, gpu_alone[gpu] += reserved))
  done
}

has_room() {                # for fits_all: succeeds if cores and memory are enough so far
  # one job may start however busy the processors of the machine are
  ((alone == 0 || all == 1)) && ((memory <= limits[1] && (cores <= limits[0] || ours == 1)))
}

read_claim() {              # sets process, need, key, base of the claim $1; fails if it has none
  local pid start boot
  [[ -s $1 && -f $1 && ! -L $1 ]] || return 1   # opening a FIFO would block
  key='' base=0
  { read -r -n 4000 pid start boot need && { read -r -n 400 key base || :; }; } 2>/dev/null <"$1" ||
    return 1
  [[ $need == "$sane_need" ]] || is_sane || return 1
  [[ $pid == [1-9]* && $pid != *[!0-9]* && ${#pid} -lt 10 ]] || return 1
  process=$pid
  [[ $1 == "$claims/$project."* ]] || key=
  [[ $base == [1-9]* && $base != *[!0-9]* && ${#base} -lt 10 ]] || base=0
  is_there
}

# A search for a process costs more than reading its claim.  So a process that was seen counts as
# alive for two seconds more: this may delay a start, but never overfills a machine.
is_there() {                # for read_claim: succeeds if the process of the claim exists
  local claimant="$pid $start $boot" error
  ((SECONDS - ${claimant_seen[$claimant]:--9} > 2)) || return 0
  if identify "$pid"; then
    [[ $REPLY == "$claimant" ]] || return
  else                      # if /proc hides other users' processes, kill still finds them
    error=$({ LC_ALL=C kill -0 "$pid"; } 2>&1)
    [[ $error == *permitted* && $boot == "$boot_id" ]] || return
  fi
  ((${#claimant_seen[@]} < 2000)) || claimant_seen=()
  claimant_seen[$claimant]=$SECONDS
}

is_sane() {                 # for read_claim: checks the need, since another user may write anything
  local number='(0|[1-9][0-9]{0,8})'
  [[ $need =~ ^$number\ $number\ [01](\ $number:$number:$number:[01])*$ ]] && sane_need=$need
}

say_claims() {              # reports what each job of any batch claims and uses
  local file process need key base pids rss peak ticks pid
  local -A user_of=()       # folder of claims -> the name of its user; '' for this user
  for file in "$shared"/ssh_scheduler.*/*; do
    read_claim "$file" || continue
    use_of "$process"
    for pid in "${pids[@]}"; do claim_of["$pid"]=${key:-other}; done
    [[ $key ]] || name_claimant "${file%/*}"
    say_text probe claim "$rss $((ticks - base)) ${key:--${user_of[${file%/*}]}} $need"
  done
}

name_claimant() {           # for say_claims: sets user_of for the folder of claims $1
  local user number
  [[ ! ${user_of[$1]+x} ]] || return 0
  user_of[$1]=
  [[ -O $1 ]] || read -r user number < <(stat -c '%U %u' -- "$1" 2>/dev/null)
  [[ $user != UNKNOWN ]] || user=$number
  user_of[$1]=$user
}

# ---- Ending ----

revoke() {                  # takes the job $1, so that it never begins; fails if it was taken
  local file=$home/jobs/$1 word value more folder revoked=''
  read_record "$file"       # the name of the file may have the record of an end
  [[ $word != ended ]] || return
  [[ -d $home/jobs ]] || mkdir -p -- "$home/jobs"
  set -C
  { printf '#%-126s\n' revoked >"$file"; } && revoked=1
  set +C
  [[ $revoked ]]
} 2>/dev/null

# The client that holds the lock of a job_results owns its runners.  An old runner, of an earlier
# client or of a contact that this client lost (sshd keeps it for minutes), must not act on requests
# that are left in its pipe: the client places those jobs again.  A runner of the same client under
# another name of this account stays: `account` tells the client, which drops one name.
end_old_runners() {         # kills old runners; the jobs that they started keep running
  local dir runner who which tries
  for dir in "$home/run.${HOSTNAME:-here}."*; do
    which=                  # BATCH.MACHINE.NUMBER
    { read -r runner && IFS= read -r who && { read -r which || :; }; } <"$dir/self" &&
      [[ $who == "$owner" ]] || continue
    [[ ${which%.*.*} != "${client%.*.*}" || ${which%.*} == "${client%.*}" ]] || continue
    for ((tries = 0; tries < 100; tries++)); do
      is_alive "$runner" || break
      kill -KILL "${runner%% *}"
      sleep 0.02
    done
  done
} 2>/dev/null

end_jobs() {                # stops the jobs $2...: TERM, after $1 seconds KILL; sets survivors
  local key word value more folder
  end_processes "$@"
  shift
  for key; do
    read_record "$home/jobs/$key"
    [[ $word == starting ]] && ! is_alive "$value" || continue
    read_record "$home/jobs/$key"       # a worker records the end before it exits
    [[ $word == ended ]] || record_killed "$key"
  done
} 2>/dev/null

record_killed() {           # records the end of the job $1, whose worker is gone
  local key=$1 file=$home/jobs/$1 word value more folder
  read_record "$file"
  if [[ $word != ended ]]; then         # no other process was faster
    echo 'ssh-scheduler: the job was killed with its whole process group' >>"$file.err"
    # list all files: it is no longer known which were sent
    [[ ! $folder ]] || (list_back "$folder" '' "$file.back" .)
    value=137
    record "$file" "ended 137${folder:+ $folder}"
  fi
  say_recorded_end "$key"
}

end_processes() {           # as end_jobs, but without records: stops all that the jobs started
  local until=$((SECONDS + $1)) signal=TERM tries=0 clear=0 pause=5 seconds awaited ended
  local -A workers=() groups=()         # pid of a worker -> the key of its job; groups of jobs
  local living=()
  shift
  # Processes that start during one search are found by the next.
  while ((clear < 2 && tries < 40)); do
    find_living "$@"
    if ((${#living[@]} == 0)); then
      if [[ $awaited ]] && ((SECONDS < until + 20)); then
        sleep 0.02
        continue
      fi
      # Only some time after the end of a job, its record tells that processes of the job are left.
      ((clear || ! tries)) || [[ ! $ended ]] || sleep 0.2
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

say_killed() {              # for end_processes: notes the kill in the stderr of the jobs
  local key
  for key in "${workers[@]}"; do
    echo 'ssh-scheduler: the job did not stop after SIGTERM, and was killed' \
      >>"$home/jobs/$key.err"
  done
}

# Processes get the signal in the order in which they began: a shell that gets it only after its
# child has ended continues with its next command.  No SIGSTOP comes first: if the runner died in
# between, the processes would stay stopped for ever.
#
# Workers are found after all processes were read: a worker that still has the job then had no other
# job before.  In the other order, its next job could be taken for this one, and be killed.
find_living() {             # sets living: the pids of what the jobs $@ started, without workers
  local pid key index since=()          # by start time and pid
  local -A parent=() group=() mine=()
  living=() awaited='' ended='' workers=()
  read_processes
  for key; do find_worker; done
  for pid in "${!workers[@]}" $(holders "$@"); do mine[$pid]=1; done
  for pid in "${!parent[@]}"; do
    [[ ! ${workers[${parent[$pid]}]-} || ${group[$pid]} != "$pid" ]] || groups[$pid]=1
  done
  for ((index = 1; index;)); do         # until no further child is found
    index=0
    for pid in "${!parent[@]}"; do
      [[ ! ${mine[$pid]-} ]] || continue
      [[ ${mine[${parent[$pid]}]-} || ${groups[${group[$pid]}]-} ]] || continue
      mine[$pid]=1 index=1
    done
  done
  for pid in "${since[@]}"; do
    [[ ! ${mine[$pid]-} || ${workers[$pid]-} ]] || living+=("$pid")
  done
}

find_worker() {             # for find_living: adds the worker of $key, if that has not ended
  local word value more folder
  read_record "$home/jobs/$key"
  [[ $word != ended || $more == left ]] || ended=1
  [[ $word == starting ]] && is_alive "$value" || return
  workers[${value%% *}]=$key
  [[ -e $home/jobs/$key.out ]] || awaited=1     # it is about to begin the job
}

read_processes() {          # for find_living: parent, group and since of all processes
  local pid stat fields
  for stat in /proc/[1-9]*/stat; do
    { IFS= read -r fields <"$stat"; } || continue
    pid=${fields%% *}
    # shellcheck disable=SC2206            # numbers, behind a name with any blanks and brackets
    fields=(${fields##*) })
    [[ ${fields[0]} != Z ]] || { unset -v "mine[$pid]"; continue; }
    [[ $pid != "$BASHPID" ]] || continue
    parent[$pid]=${fields[1]} group[$pid]=${fields[2]} since[fields[19] << 22 | pid]=$pid
  done
}

# A process that leaves its session, its parent and its environment still has the FIFO of the worker
# open, since it inherited that.  One that closes all files and clears its environment is not found;
# only control groups could find it.
holders() {                 # prints the pids of what the jobs $@ started
  in_groups holders_of_some "$@" | sort -u
}

holders_of_some() {
  local key pattern tests=() marks=() keys=() word value more folder found path link
  local -A left=()
  for key; do
    marks+=(-e "SSH_SCHEDULER_ID=$project.$key")
    read_record "$home/jobs/$key"
    # If an ended job left no process, its worker uses the FIFO for the next job.
    [[ $folder && ($word != ended || $more == left) ]] || continue
    keys+=("$key")
    pattern=$home/jobs/${folder%.*}.alive
    pattern=${pattern//\\/\\\\}
    pattern=${pattern//\[/\\[}
    pattern=${pattern//\*/\\*}
    tests+=(-o -lname "${pattern//\?/\\?}" -printf '%p %l\n')
  done
  found=$(
    ((${#tests[@]} == 0)) || find /proc/[1-9]*/fd "${tests[@]:1}"
    grep -lzsxF "${marks[@]}" /proc/[1-9]*/environ
  )
  for key in "${keys[@]}"; do           # a job may have ended while `find` ran
    read_record "$home/jobs/$key"
    [[ $word == ended && $more != left ]] || left[$home/jobs/${folder%.*}.alive]=1
  done
  while read -r path link; do
    path=${path#/proc/}
    [[ ! $path || ($link && ! ${left[$link]-}) ]] || printf '%s\n' "${path%%/*}"
  done < <(printf '%s\n' "$found")     # a here-string needs a file, and the disk may be full
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

# Each process is named: a bare `wait` waits for all, and never returns if a <(...) has just ended.
wait_removed() {            # waits until all removals are done
  ((${#removing[@]} == 0)) || wait "${removing[@]}"
  removing=()
}

farewell() {                # without a `finish`: stops tied jobs, removes stages no job needs
  wait_removed
  if [[ $finished ]]; then              # what asks the login or nvidia-smi may write into $run late
    [[ ! -e $run ]] || rm -rf -- "$run"
    return 0
  fi
  give_up_gpus
  if [[ $tied ]] && ((${#begun[@]})); then
    end_begun
  fi
  ! is_unused || tidy "${arrived[@]}"
}

end_begun() {               # for farewell: stops and removes all jobs that began under this runner
  end_jobs 5 "${!begun[@]}"
  (remove_jobs "${!begun[@]}")
}

is_unused() {               # succeeds if no job is left: jobs/ has only files of workers
  local file
  for file in "$home/jobs"/*; do
    [[ ${file##*/} =~ ^work[.0-9]+(\.alive)?$ ]] || return 1
  done
}

# A runner that starts meanwhile makes its own folder first.  So either that folder is seen here, or
# `common` lacks the files that the runner makes later.  Shared folders are removed only if empty.
tidy() {                    # removes $@, and all files that are no longer needed
  local dir value others='' gone=("$@" "$run") common
  dismiss_free
  gone+=("${leftovers[@]}")
  leftovers=()
  common=("$home/stage"/* "$home/jobs"/* "$home/news"/* "$home/lib"/* "$home/excluded"
    "$claims/$project."*)
  # Else, of two runners that exit at once, each would leave the shared folders to the other.
  echo leaves >"$run/self"
  if is_unused; then        # a job that is left may need these files
    for dir in "$home"/run.*; do
      [[ $dir != "$run" ]] || continue
      for _ in {1..20}; do  # without `self` it starts, or is being removed
        { read -r value <"$dir/self"; } && break
        [[ -d $dir ]] || continue 2
        value=
        sleep 0.05
      done
      if [[ ! $value ]] || is_alive "$value"; then
        others=1
      elif [[ $dir == */"run.${HOSTNAME:-here}."* ]]; then
        gone+=("$dir")
      elif [[ $value != leaves ]]; then # it may run on another login node
        others=1
      fi
    done
    [[ $others ]] || gone+=("${common[@]}")
  fi
  remove "$claims/$project.$prefix."* "${gone[@]}"
  rmdir -- "$claims" "$home/stage" "$home/jobs" "$home/news" "$home/lib" "$home"
} 2>/dev/null

# The files sent last are kept for the next batch, but not for ever.  Results that nobody has
# fetched stay: a user may be away for three weeks.
forget_old() {              # removes what batches of other folders left, if it is two weeks old
  local dir entry found hex='[0-9a-f][0-9a-f][0-9a-f][0-9a-f]'
  # shellcheck disable=SC2206            # it is a pattern
  found=("${home%/*}"/*-$hex$hex$hex)
  [[ ${found[*]} && ${found[*]} != "$home" ]] || return 0       # this saves two processes
  while IFS= read -rd '' dir; do
    # Each run renews the time of its folder.  A folder with anything else is not removed.
    [[ -O $dir && -d $dir/cache && $dir != "$home" ]] || continue
    for entry in "$dir"/* "$dir"/cache/*; do
      case ${entry#"$dir/"} in
        cache | cache/copy | cache/link | stage | news | excluded | lib | run.*) ;;
        *) continue 2 ;;
      esac
    done
    remove "$dir"
  done < <(find "${home%/*}" -mindepth 1 -maxdepth 1 -type d -name "*-$hex$hex$hex" \
    -mtime "+$OLD_DAYS" -print0)
} 2>/dev/null

remove_jobs() {             # removes all files of the jobs $@
  local key gone=()
  cd -- "$home/jobs" || return
  for key; do
    gone+=("$key" "$key.out" "$key.err")
    [[ -e $key ]] || gone+=("$key ended "*)
    [[ ! -e $key.more ]] || gone+=("$key.more")
    find_folder "$key"
    [[ ! $REPLY ]] || gone+=("$REPLY" "$key.back" "$claims/$project.$key.back")
  done
  remove "${gone[@]}"
} 2>/dev/null

remove() {                  # removes $@, even without permissions, which a job may have changed
  in_groups remove_some "$@"
}

remove_some() {
  rm -rf -- "$@" || { chmod -R u+rwx -- "$@"; rm -rf -- "$@"; }
} 2>/dev/null

# ---- Channel ----

main() {
  exec {requests}<&0 </dev/null         # nothing else may read the requests
  read_header || return
  # This comes first, so that the client can tell "bash runs" from "ready".
  printf '\n%s\n' "$token"
  if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 402)); then
    printf 'broken\tits bash has version %s, and 4.2 or later is needed: %s\n' "$BASH_VERSION" \
      'install a newer one, or put one in front in the PATH of the login'
    return 0
  fi
  find_home
  raise_file_limit
  end_old_runners
  make_folders || return 0
  open_events
  say_text account "$account"
  look_around
  serve
  start_pending
  farewell
  trap - EXIT
  say parted
}

read_header() {             # reads the header; fails if the channel was cut
  local field count
  for field in token workdir project owner client setup want_gpus count; do
    IFS= read -rd '' -u "$requests" "$field" || return
  done
  while ((count-- > 0)); do
    IFS= read -rd '' -u "$requests" field || return
    machine_environment+=("$field")
  done
}

find_home() {               # sets the folders, and the identity of this runner
  local field
  # A container may have the right numbers in other folders, and so do the machines of the tests.
  proc=${SSH_SCHEDULER_PROC:-/proc} sys=${SSH_SCHEDULER_SYS:-/sys}
  shared=${SSH_SCHEDULER_SHARED:-/dev/shm}
  workdir=${workdir:-'~/.ssh_scheduler'}
  # shellcheck disable=SC2088            # the ~ that a machine file may begin its workdir with
  [[ $workdir != '~' && $workdir != '~/'* ]] || workdir=$HOME${workdir#'~'}
  home=$workdir/$project
  { IFS= read -r HOSTNAME <"/proc/sys/kernel/hostname"; } 2>/dev/null   # not the inherited one
  while read -r field uid _ && [[ $field != Uid: ]]; do
    [[ $field != Umask: ]] || mask=$uid
  done </proc/self/status
  prefix=work.$$.$RANDOM$RANDOM         # pids begin anew after a restart
  run=$home/run.${HOSTNAME:-here}.${prefix#work.}
  mask=${mask:-$(umask)}    # /proc has Umask since Linux 4.7; asking bash costs a process
  umask 077
  { IFS= read -r boot_id <"$proc/sys/kernel/random/boot_id"; } 2>/dev/null
  boot_id=${boot_id:-$NO_BOOT_ID}
  identify "$$"
  self=$REPLY
}

# The runner has a file open for each worker.  Jobs keep the limit of the login.
raise_file_limit() {        # sets file_limit
  local first second third hard
  while read -r first second third file_limit hard _; do
    [[ "$first $second $third" != 'Max open files' ]] || { ulimit -Sn "$hard"; return; }
  done </proc/self/limits
} 2>/dev/null

# The client compares the accounts of its machines: looking for living runners here would miss two
# that run one after the other.
make_folders() {            # sets account and claims; if it cannot, reports why and fails
  local said
  if has_older_jobs; then
    say_older_jobs
    return 1
  fi
  if ! said=$({ mkdir -p -- "$home/stage" "$home/jobs" "$run" &&
    mkfifo -- "$run/events" "$run/signals" "$run/idle" && echo 'for no known reason' >"$run/log" &&
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

# An older version made a folder for each job.  This version cannot collect such a job, and must not
# take it for one that never began.
has_older_jobs() {          # succeeds if jobs of such a version are here
  local pipe
  for pipe in "$home/jobs"/*/alive; do
    [[ ! -p $pipe || ${pipe%/alive} =~ /work\.[.0-9]+$ ]] || return 0
  done
  return 1
}

say_older_jobs() {
  escape "jobs of an older ssh-scheduler are there, in $home/jobs: end that batch with the version \
that began it, or remove this folder"
  printf 'broken\t%s\n' "$REPLY"
}

open_events() {             # from now on `writer` writes all events, and errors go to the log
  exec {events}<>"$run/events" {signals}<>"$run/signals" {idle}<>"$run/idle"
  printf '%s\n%s\n%s\n' "$self" "$owner" "$client" >"$run/self"
  set -m                    # every background process in a process group of its own
  # The writer does not hold its own pipe open: so it exits when no other process can write.
  writer <"$run/events" 2>>"$run/log" {events}>&- {signals}>&- {idle}>&- {requests}<&- &
  writing=$!
  disown "$!"
  exec >/dev/null 2>>"$run/log"
  trap last_words EXIT
  shopt -s nullglob dotglob
}

writer() {                  # the only writer to the channel; reads events from stdin
  local line file size ready=
  while IFS= read -r line; do
    case $line in
      bulk$'\t'*)           # bulk FILE WHAT...: writes the size of the file, and its bytes
        printf %s "$ready"
        ready=
        line=${line#*$'\t'}
        file=${line%%$'\t'*}
        {                   # opened first: it may be removed at any moment
          size=$(stat -L -c %s /dev/stdin) && printf 'data\t%s\t%s\n' "$size" "${line#*$'\t'}" &&
            cat
        } <"$file"
        rm -f -- "$file" ;;
      parted)               # the last event
        ready+=$line$'\n'
        break ;;
      *)                    # events that come together cross the network together
        ready+=$line$'\n'
        if ((${#ready} > 8000)) || ! read -r -t 0; then
          printf %s "$ready"
          ready=
        fi ;;
    esac
  done
  printf %s "$ready"
}

# If bash cannot fork, it tries for 15 s and then exits.  It still runs its exit trap, nothing more.
last_words() {              # reports why the runner exits, and which jobs it did not begin
  local key
  [[ -e $run ]] || return 0
  ! complaint || return 0
  for key in "${pending[@]}"; do
    [[ -e $home/jobs/$key ]] || say_text refused "$key" "$REPLY"
  done
  say_text broken "$REPLY" later
}

look_around() {             # starts the slow tasks, before the client asks for their results
  read_ticks
  busy_before=$busy total_before=$total
  { capture_login; echo environment >&"$signals"; } {events}>&- {idle}>&- {requests}<&- &
  capturing=$!
  disown "$!"
  waiting=1
  [[ $want_gpus == 1 ]] || return
  { query_gpus; echo gpus >&"$signals"; } {events}>&- {idle}>&- {requests}<&- &
  disown "$!"
  waiting=2
}

serve() {                   # acts on requests until the channel ends
  local verb fields
  while :; do
    # Starts that arrive together share two processes, which make the files of new workers.
    if ((${#pending[@]})) && ! read -r -t 0 -u "$requests"; then start_pending; fi
    read_request || return
    if declare -F "do_$verb"; then      # stdout is /dev/null
      "do_$verb" "${fields[@]}"
    else
      say_text broken "unknown request: $verb"
    fi
  done
}

read_request() {            # sets verb and fields: the next request; fails if it was cut off
  local count index=0
  fields=()
  IFS= read -rd '' -u "$requests" verb && IFS= read -rd '' -u "$requests" count || return
  while ((index++ < count)); do IFS= read -rd '' -u "$requests" "fields[index]" || return; done
}

do_probe() { probe measure; }

do_enter() { probe ''; }

do_check() {                # the client sends this before `probe`
  local value file
  printf -v value '%(%s)T' -1
  say_text probe check_clock "$value"
  say_text probe check_bash "$BASH_VERSION"
  say_text probe check_shell "${SHELL-}"
  say_text probe check_folder "${home%/*}"
  read -r _ _ value _ < <(timeout 5 rsync --version)
  say_text probe check_rsync "$value"
  say_disk check_disk "$home"
  find_logind
  say_text probe check_logout "$REPLY"
  say_holders
  for file in "$home"/run.*/self; do    # also of other machines that share this folder
    { read -r _ && read -r _ && read -r value; } <"$file"
    [[ $value == "$client" ]] || say_text probe check_beside "$value"
  done
  for value in "${SCRATCH-}" "${WORK-}" {/scratch,/localscratch,/local,/data}{/"$USER",}; do
    [[ ! -d $value || ! -w $value ]] || say_disk check_scratch "$value"
  done
  type -P sbatch >/dev/null || return 0
  while read -r value; do say_text probe check_partition "$value"; done < <(
    timeout 10 sinfo -h -o %P)
} 2>/dev/null

# sshd ends a session only when no process can write to it any more.  Copies by rsync, for example,
# would wait for a program that a start file began in the background.
say_holders() {             # reports the programs that hold the session open
  local folder name
  for folder in /proc/[0-9]*; do
    if [[ $folder/fd/1 -ef /proc/$writing/fd/1 && ${folder#/proc/} != "$writing" ]]; then
      read -r name <"$folder/comm" && say_text probe check_holder "$name"
    fi
  done
}

say_disk() {                # reports as fact $1 the MB and inodes that are left in the folder $2
  local free size inodes all kind
  read -r free size inodes all kind < <(timeout 5 stat -f -c '%a %S %d %c %T' -- "$2")
  say_text probe "$1" "$((free * size / 1048576)) $inodes $all $kind $2"
}

find_logind() {             # REPLY: kills, spares or '': what logind does to processes at a logout
  local file line etc=${SSH_SCHEDULER_ETC:-/etc}
  REPLY=
  ((uid)) || return         # root is excluded, by default
  read -r _ line < <(timeout 5 busctl get-property org.freedesktop.login1 \
    /org/freedesktop/login1 org.freedesktop.login1.Manager KillUserProcesses)
  [[ $line ]] || for file in "$etc"/{systemd,elogind}/logind.conf{,.d/*.conf}; do
    while read -r line; do
      [[ $line != KillUserProcesses=* ]] || REPLY=${line#*=}
    done <"$file"
  done
  case $line$REPLY in
    *true | *yes | *on | *1) REPLY=kills ;;
    *false | *no | *off | *0) REPLY=spares ;;
    *) REPLY= ;;
  esac
  # elogind spares the processes of a user who lingers.
  [[ ! -e /var/lib/elogind/linger/${USER-} || ! ${USER-} ]] || REPLY=spares
} 2>/dev/null

do_tie() { tied=1; }

do_measure() { beside measure_again "$1"; }

do_limits() { limits=("$@"); }

do_facts() {
  local kernel='' driver=''
  { read -r kernel <"$proc/sys/kernel/osrelease"; read -r driver <"$proc/driver/nvidia/version"; }
  say_text facts "$kernel" "$driver" -
  beside say_python "$kernel" "$driver"
} 2>/dev/null

do_unpack() {               # STAGE BYTES, and that many bytes of tar follow
  arrived+=("$home/stage/$1")
  mkdir -p -- "$home/stage/$1/copy"
  # The rest of an archive that cannot be unpacked must not be taken for requests.
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
  pending+=("$1") finished=''
  [[ -d $home/jobs ]] || mkdir -p -- "$home/jobs"       # a runner that left may have removed it
  stage_of[$1]=$2 gpus_of[$1]=$3 need_of[$1]=$4 mode_of[$1]=$5 limit_of[$1]=$6 command_of[$1]=$7
  back_of[$1]=$8
  REPLY=
  (($# == 8)) || printf -v REPLY '%q ' "${@:9}"
  paths_of[$1]=$REPLY
}

do_wrap() {                 # KEY WORDS
  fill_wrap "$2"
  wrap_of[$1]=$REPLY
}

fill_wrap() {               # REPLY: the words $1, in which \2 and \3 stand for cores and MB
  local word mb
  REPLY=$1
  [[ $1 == *[$'\2\3']* ]] || return 0
  [[ $cores ]] || { count_cores; cores=$REPLY; }
  while read -r word mb _ && [[ $word != MemTotal: ]]; do :; done <"$proc/meminfo"
  word=${1//$'\2'/$cores}
  REPLY=${word//$'\3'/$((mb / 1024))}
}

do_cancel() {               # SECONDS KEY...
  start_pending             # a job to cancel may have come just now
  beside cancel "$@"
}

cancel() {
  end_jobs "$@"
  say "cancelled"$'\t'"$survivors"
}

do_adopt() { beside revoke_or_ask "$@"; }               # KEY...

# If a job may have been started, this first tries to take it (revoke), and asks about it only if
# that fails.  A job that was taken here never began and never will; the client places it again as a
# new attempt.
revoke_or_ask() {
  local key begun_before=()
  for key; do
    if revoke "$key"; then say "absent"$'\t'"$key"; else begun_before+=("$key"); fi
  done
  ask_about "${begun_before[@]}"
}

do_revoke() {               # KEY...
  revoke_all "$@" &
  removing+=("$!")
}

revoke_all() {
  local key own=()
  for key; do
    [[ ! -e $home/jobs/$key.more/script ]] || continue          # the engine of a cluster has it
    revoke "$key"
    own+=("$key")
  done
  end_processes 5 "${own[@]}"
  remove_jobs "${own[@]}"
}

do_others() { beside list_others "$1"; }

do_ping() { say "pong"$'\t'"$1"; }

do_eof() {                  # KEY
  [[ ! -p $home/jobs/$1.more/eof ]] || echo 1<>"$home/jobs/$1.more/eof"
}

do_where() { beside say_folders "$@"; }

say_folders() {             # reports in which folders the jobs $@ run
  local key word value more folder
  for key; do
    read_record "$home/jobs/$key"
    [[ ! $folder ]] || say "place"$'\t'"$key"$'\t'"$folder"
  done
} 2>/dev/null

do_watch() {                # (KEY OUT ERR)...
  start_pending             # a job without any file would count as lost
  beside look "$@"
  identify "$!" && looking=$REPLY
}

do_list() {                 # KEY
  find_list "$1"
  send_list "$1" "$REPLY"
}

do_again() { beside list_again "$@"; }

do_clean() {                # KEY...
  local key
  for key; do unset -v "begun[$key]"; done
  hear_workers
  { remove_jobs "$@"; remove "${leftovers[@]}"; } &
  removing+=("$!")
  leftovers=()
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
  finished=1
  say finished
  forget_old
}

main
'''
REMOTE_CALL = 'main\n'       # the last line; other programs use the functions without it

REMOTE_ENGINE = r'''
# ---- The engine of a cluster ----

# On the login node of a cluster the runner starts no job.  It submits a batch script for each,
# which the engine runs on a node as soon as there is room.  On the node the script does what a
# worker does on other machines.  So these functions replace those above of the same names.
#
# The section behind this one has what depends on the engine: mainly engine_submit, engine_list,
# engine_fate and engine_cancel.
#
# A job runs once, whatever the engine reports or does.  Its script makes a file with a name of its
# own, and then a link `begun` to it.  If the engine has the script twice, only one of the two can
# make the link, and that one runs the job (FENCE).  To prevent a job, the runner makes the link.
#
# Files of the login node and of the nodes, in jobs/KEY.more, on a file system that all of them see:
#
#   script        the batch script for the engine; written last
#   orders        the variables that the script reads (write_orders)
#   peak, near    of its node: the most memory that the job had, in kB; the time limit is near
#   functions     what the bash of the job reads first
#   terminal      with a terminal: a script that takes the terminal to the node
#   submitting    PID START BOOT_ID HOST of the process that is about to submit the job, or empty
#   unsure        the last answer of the engine, if it was unclear; its time: the last try
#   tries         how often the job was submitted again, after no clear answer
#   engine        the number of the job in the engine
#   claim.RUN, begun    see above; the text is RUN NODE, or "cancel"
#   engine.out    what the engine itself prints about the job
#   cancel        exists if the job is to be stopped
#   said          further events, a line each
#   events, quiet     FIFOs of its node: for such events; and one in which nothing ever comes
#   missing       exists if the engine did not list the job; its time: the first such list
#   fate          what the engine reported of the end of a job that left no record
#   in, eof       with --stdin: a file that grows, and its full size, once that is known; in.node: a
#                 FIFO of its node
#
# and in news/, where one listing shows the state of all jobs:
#
#   KEY.began             the job runs
#   KEY.ended.STATUS.TOLD.WALL.CPU.OUT.ERR.BACK
#                         the job has ended.  TOLD: no, or why the script was told to stop it: told,
#                         limit or cancel.  WALL, CPU: as in the event `ended`.  OUT, ERR, BACK:
#                         sizes in bytes of what the job left.  The name has all this, so it is
#                         enough to list the folder
#
# Beside jobs/ are
#
#   lib/RUNNER/library    all these functions, for the nodes
#   lib/RUNNER/enter      runs a program, such as one of the engine, in the login's environment
#   excluded              NODE TIME WHY of nodes that could not start a job
#
# The record of such a job, see above, is at first
#
#   queued                the engine has it, or will get it  -> starting, ended, revoked, lost
#
# and `starting` once it runs on a node, with PID START BOOT_ID of the process there.

ENGINE_LIMIT_S=30           # for the engine to answer a question
SUBMIT_LIMIT_S=150          # for the engine to accept a job, which may wait for room in its tables
SUBMITTED_S=2               # for the submission of jobs, before the next list
LISTING_S=15                # between two lists of all jobs, at least
LONGEST_LISTING_S=120
SILENCE_S=120               # without an answer, until a note is sent
MISSING_S=60                # how long a job must be unlisted before the engine is asked why
RECORD_S=5                  # for the record of a job whose script has ended, by the engine's word
LAG_S=270                   # until this node surely sees a file that another node wrote
NEAR_S=60                   # before a time limit of the cluster, its job is stopped
CANCEL_S=20                 # for a script to stop its job, before the engine is told to
MOST_EXCLUDED=3             # refuse a job once this many nodes could not begin jobs
EXCLUDED_S=3600             # how long a node gets no job after it could not start one

node_folder='' engine_words=()          # of the machine file
wanted=()                   # what do_fits got before look_at_engine
declare -A ours=()          # the jobs that this client has begun or asked about
declare -A started=()       # jobs whose start was reported: their news may stay until a job ends
declare -A hurried=()       # jobs for which the engine was asked at once why they were stopped
is_looked_at=''             # 1 if look_at_engine was called
is_silent=''                # 1 if the engine did not answer then
judging='' judge_due=0      # the process that judges jobs; when the next one may begin
doubtful=()                 # jobs that have ended, by the engine's word, and left no record so far
lib=''                      # the folder lib/RUNNER of this runner

do_engine() {               # BYTES FOLDER WORD..., and that many bytes of these functions
  node_folder=$2 engine_words=("${@:3}")
  head -c "$1" <&"$requests" | { cat >"$run/library" || { cat >/dev/null; false; }; } || {
    complaint
    say_text broken "$REPLY" later
  }
}

do_wrap() { wrap_of[$1]=$2; }           # KEY WORDS; the node fills in the numbers

do_fits() {                 # (NEED LIMIT)...: report which of these the engine would refuse
  if [[ $is_looked_at ]]; then beside say_unfit "$@"; else wanted+=("$@"); fi
}

say_unfit() {
  local answer
  while (($#)); do
    answer=
    engine_test "$1" "$2" || say_text unfit "$1" "$answer"
    shift 2
  done
}

look_at_engine() {          # checks for the engine, once the environment is known
  local missing
  missing=$(enter /bin/sh -c 'for p; do command -v "$p" >/dev/null || echo "$p"; done' sh \
    "${engine_programs[@]}" | tr '\n' ' ')
  if [[ $missing ]]; then
    say_text broken "its engine is missing: ${missing% } is not in the PATH of a login"
    return
  fi
  missing=$(engine_lacks)
  if [[ $missing ]]; then
    say_text broken "its engine cannot be asked: $missing" later
    return
  fi
  warn_of_disk
  if ! engine_look; then
    say_text note "$engine_name does not answer: ${answer:-it printed nothing}"
    ! engine_is_silent "$answer" || is_silent=1 wanted=()       # each question would take long
  fi
  is_looked_at=1
  say_unfit "${wanted[@]}"
  wanted=()
}

warn_of_disk() {            # warns if the type of the disk shows that nodes do not see it
  local kind dir=$home
  kind=$(stat -f -c %T -- "$dir") || return
  case $kind in
    tmpfs | ramfs | overlayfs)
      say_text note "the nodes cannot see the workdir, a $kind of this login node: let \
\`workdir\` be a folder that the nodes see, too" ;;
  esac
} 2>/dev/null

measure() {                 # reports only the engine, which alone knows what is free
  say_text probe engine "$engine_name $engine_version"
  [[ $want_gpus != 1 || $is_measured || $is_silent ]] || engine_overview
  is_measured=1
}

# ---- Queueing ----

start_pending() {           # queues the jobs requested since the last call
  local key file taken=()
  ((${#pending[@]})) || return 0
  for key in "${pending[@]}"; do
    file=$home/jobs/$key
    ours[$key]=1
    if take; then
      taken+=("$key")
      begun[$key]=1
    elif is_taken; then
      beside ask_about "$key"
    else
      say_untaken
    fi
  done
  if ((${#taken[@]})); then
    beside submit_all "${taken[@]}"
    # A list made now would lack these jobs, and the next list would come only LISTING_S later.
    ((judge_due > SECONDS)) || judge_due=$((SECONDS + SUBMITTED_S))
  fi
  for key in "${pending[@]}"; do unset -v "wrap_of[$key]"; done
  forget_pending
}

take() {                    # for start_pending: begins the job $key; fails if it cannot
  local made='' folder more=$file.more
  hired=$((hired + 1))
  folder=$prefix.$hired.1
  set -C
  {
    made=1
    set +C
    printf '%s\n#%-126s\n' "${command_of[$key]}" "queued $folder" && prepare_tty &&
      write_orders
  } >"$file" && return
  set +C
  [[ ! $made ]] || remove "$file" "$more"       # the disk is full: nothing was queued
  return 1
}

# Waiting jobs need the library after this runner has exited.  Each runner writes its own library,
# since a node may be reading that of another.
write_library() {           # for write_orders: sets lib
  local to=$home/lib/${run##*/run.}
  mkdir -p -- "$to" "$home/news" && write_enter >"$to/enter" && cp -- "$run/library" "$to" &&
    lib=$to
}

write_orders() {            # for take: writes all files of the job $key
  local command=${command_of[$key]} name heed_s
  [[ -d $more ]] || mkdir -- "$more" || return
  [[ $lib ]] || write_library || return
  REPLY=
  [[ ! $functions$named ]] || functions_of
  name=$REPLY
  if [[ $name ]]; then
    eval "$name"            # BASH_ENV=FILE
    cp -- "$BASH_ENV" "$more/functions" || return
    unset -v BASH_ENV
  fi
  engine_limit
  heed_s=$((REPLY < 10 * NEAR_S ? REPLY - REPLY / 10 : 0))
  printf '%s=%q\n' project "$project" key "$key" folder "$folder" stage "${stage_of[$key]}" \
    need "${need_of[$key]}" mode "${mode_of[$key]}" limit "${limit_of[$key]}" \
    back "${back_of[$key]}" paths "${paths_of[$key]}" mask "$mask" kill_wait "$engine_kill_wait" \
    lib "$lib" wrap "${wrap_of[$key]-}" home "$home" node_folder "$node_folder" \
    heed_s "$heed_s" \
    >"$more/orders" || return
  [[ ${mode_of[$key]} != tty ]] || write_terminal >"$more/terminal" || return
  write_script >"$more/script"
}

write_enter() {             # for write_library: prints `exec $@` with the login's environment
  local words=''
  ((${#by_env[@]} == 0)) || printf -v words '%q ' "${by_env[@]}"
  printf 'eval %q\n' "${assignments}exec $words\"\$@\""
}

# A shell option that comes with the environment (SHELLOPTS) must not stop the script.
write_script() {            # for write_orders: prints the batch script
  local text more_quoted lib_quoted
  printf -v more_quoted %q "$more"
  printf -v lib_quoted %q "$lib"
  printf -v text '%s\n' '#!/bin/bash' 'set +eufn +o posix' "cd -- ${more_quoted} || exit 121" \
    "$engine_self" \
    'echo "$me $node" >"claim.$me" && ln "claim.$me" begun' \
    '[[ begun -ef claim.$me ]] || exit 0     # another began it, or it was taken back' \
    ". $lib_quoted/library && run_on_node; exit 121"
  printf '%s' "$text"       # in one piece
}

write_terminal() {          # for write_orders: prints the script that takes a terminal to the node
  printf 'more=%q\n' "$more"
  printf '%s\n' 'until [[ -s $more/exports ]]; do [[ -e $more/script ]] || exit; sleep 0.1; done' \
    'read -r me node <"$more/begun"' "set -- $engine_step --pty \"\$BASH\" \"\$more/tty\""
  printf '. %q/enter\n' "$lib"
}

submit_all() {              # beside the runner: submits the jobs $@, one after the other
  local key
  identify "$BASHPID"
  for key; do printf '%s\n' "$REPLY ${HOSTNAME:-here}" >"$home/jobs/$key.more/submitting"; done
  for key; do submit; done
} 2>>"$run/log"

submit() {                  # for submit_all: submits the job $key, and reports the result
  local more=$home/jobs/$key.more answer='' word need limit
  [[ -e $more/script && ! -e $more/begun ]] || return
  need=${need_of[$key]-} limit=${limit_of[$key]-}
  [[ $need ]] ||            # another process queued it
    { read -r need && read -r limit; } < <(. "$more/orders" && printf '%s\n' "$need" "$limit")
  engine_submit
  if [[ ! -e $more/script || -e $more/claim.cancel ]]; then     # it was revoked meanwhile
    engine_cancel "$key" ''
    return
  fi
  word=${answer%% *} answer=${answer#"$word"}
  case $word in
    id)
      write_number "${answer# }"
      [[ ! -e $more/unsure ]] || rm -f -- "$more/unsure"
      say_text queued "$key" "${answer# }" '' '' ;;
    unknown)
      printf '%s\n' "${answer# }" >"$more/unsure" ;;
    nodes) refuse_queued "${answer# }" ;;
    full | refused)
      if take_fence; then   # in case the engine has the job all the same
        if [[ $word == full ]]; then
          say_text full "${answer# }"
        else
          say_text unfit "$need" "${answer# }"
        fi
        record "$home/jobs/$key" revoked
        remove_jobs "$key"
        say "held"$'\t'"$key"
      fi ;;
  esac
  [[ ! -e $more/submitting ]] || : >"$more/submitting"
} 2>>"$run/log"

take_fence() {              # makes sure that the job $key never begins; fails if it has begun
  local more=$home/jobs/$key.more
  [[ -d $more ]] || mkdir -p -- "$more"
  [[ -e $more/claim.cancel ]] || echo cancel >"$more/claim.cancel" || return
  ln -- "$more/claim.cancel" "$more/begun"
  [[ $more/begun -ef $more/claim.cancel ]]
} 2>/dev/null

give_up_queued() {          # removes the fenced job $key, here and in the engine
  local more=$home/jobs/$key.more id=
  record "$home/jobs/$key" revoked
  { read -r id <"$more/engine"; } 2>/dev/null
  engine_cancel "$key" "$id"
  remove_jobs "$key"
}

# ---- News ----

hear_news() {               # reports what the nodes have written
  local file name key size path
  local -A sizes=()
  local ended=() files=() gone=()
  for file in "$home/news/"*; do
    name=${file##*/}
    case $name in
      *.began)
        key=${name%.began}
        [[ ${ours[$key]-} ]] || continue        # it is a job of another client
        gone+=("$file")
        [[ ${started[$key]-} ]] || { started[$key]=1; say_node; say "started"$'\t'"$key"; } ;;
      *.ended.*)
        key=${name%.ended.*}
        [[ ${ours[$key]-} ]] || continue
        ended+=("$file")
        [[ $name == *.0.0.0 ]] ||       # it left no output to wait for
          files+=("$home/jobs/$key.out" "$home/jobs/$key.err" "$home/jobs/$key.back") ;;
    esac
  done
  ((${#ended[@]})) || return 0
  ((${#files[@]} == 0)) ||
    while read -r size path; do sizes["$path"]=$size; done < <(in_groups sizes_of "${files[@]}")
  for file in "${ended[@]}"; do hear_end; done
  ((${#gone[@]} == 0)) || remove "${gone[@]}"
} 2>/dev/null

say_node() {                # reports where the job $key has begun
  local owner='' node=''
  { read -r owner node <"$home/jobs/$key.more/begun"; } 2>/dev/null
  say_text node "$key" "${owner%.*}" "${node:-?}"
}

hear_end() {                # for hear_news: acts on $file, the end of a job
  local fields key code told wall cpu out err back line
  fields=${file##*.ended.} key=${file##*/}
  key=${key%.ended.*}
  IFS=. read -r code told wall cpu out err back <<<"$fields"
  [[ -e $home/jobs/$key ]] || { gone+=("$file"); return; }
  # Only the engine knows why it told the script to stop the job.
  if [[ $told == told ]]; then
    [[ ${hurried[$key]-} ]] || { hurried[$key]=1 judge_due=0; }
    return
  fi
  # Wait until this node sees all that the node of the job has written.
  if ((${sizes["$home/jobs/$key.out"]:-0} < out || ${sizes["$home/jobs/$key.err"]:-0} < err ||
    ${sizes["$home/jobs/$key.back"]:-0} < back)); then
    is_younger "$file" "$LAG_S" && return
  fi
  [[ ! -e $home/jobs/$key.more/said ]] ||
    while IFS= read -r line; do say "$line"; done <"$home/jobs/$key.more/said"
  [[ $told != limit ]] || code=124
  end_queued "$code" "$wall" "$cpu"
  gone+=("$file")
}

end_queued() {              # records and reports that the job $key ended with $1 after $2 (cs)
  local file=$home/jobs/$key word value more folder
  read_record "$file"
  [[ $word == ended ]] || record "$file" "ended $1 $2${folder:+ $folder}"
  say_ended "$key" "$1" "$2" "${3:-0}"
}

is_younger() {              # succeeds if the file $1 was written less than $2 seconds ago
  local written now
  printf -v now '%(%s)T' -1
  written=$(stat -c %Y -- "$1") && ((now - written < $2))
}

do_watch() {                # (KEY OUT ERR)...
  hear_news
  beside look "$@"
  identify "$!" && looking=$REPLY
  judge_when_due
}

look_at() { :; }            # for look: the state of jobs is in news/

judge_when_due() {          # asks the engine about all jobs, unless that was done lately
  local cost
  [[ ! $judging ]] || ! is_alive "$judging" || return 0
  ((SECONDS >= judge_due)) || return 0
  { read -r cost <"$run/judged"; } 2>/dev/null || cost=0
  cost=$((cost * 20 / 100))
  judge_due=$((cost > LONGEST_LISTING_S ? LONGEST_LISTING_S : cost < LISTING_S ? LISTING_S : cost))
  judge_due=$((judge_due + SECONDS))
  beside judge_all
  identify "$!" && judging=$REPLY
}

# ---- Judging: acting on the state of jobs in the engine ----

judge_all() {               # beside the runner: acts on the state of all jobs, from one list
  local line key name file began ids=() states=() reasons=() starts=() nodes=() list
  local -A of=()            # name in the engine -> indices of its jobs in these lists
  read_clocks
  began=$REPLY
  if ! list=$(engine_list); then
    say_silence
    return
  fi
  end_silence
  read_clocks
  echo "$((REPLY - began))" >"$run/judged"
  while IFS='|' read -r id state reason start node name; do
    [[ $id ]] || continue
    of["$name"]+=" ${#ids[@]}"
    ids+=("$id") states+=("$state") reasons+=("$reason") starts+=("$start") nodes+=("$node")
  done <<<"$list"
  for file in "$home/jobs/"*.more; do
    key=${file##*/}
    key=${key%.more}
    [[ ! ${ours[$key]-} || ! -e $file/script ]] || judge
    engine_name_of "$key"
    unset -v "of[$REPLY]"
  done
  for name in "${!of[@]}"; do           # jobs that were removed here still wait in the engine
    [[ $name == "sshs-$project."* ]] || continue
    for key in ${of["$name"]}; do
      [[ ${states[key]} != PENDING ]] || engine_cancel '' "${ids[key]}" waiting
    done
  done
  judge_doubtful
} 2>>"$run/log"

# A script writes its record before it ends.  The engine reports the end later.  So this node sees
# the record at the next list of the folder, unless it keeps an old list.  NFS makes a new one after
# a change of the folder by this node itself.
judge_doubtful() {          # for judge_all: settles the doubtful jobs that still have no record
  local key more word value folder owner id found
  ((${#doubtful[@]})) || return 0
  sleep "$RECORD_S"
  : >"$home/news/.look.$BASHPID" && rm -f -- "$home/news/.look.$BASHPID"
  for key in "${doubtful[@]}"; do
    read_record "$home/jobs/$key"
    more=$home/jobs/$key.more owner=
    { read -r owner _ <"$more/begun"; } 2>/dev/null
    found=("$home/news/$key.ended."*)
    [[ $word == queued || $word == starting ]] && ((${#found[@]} == 0)) && [[ $owner ]] || continue
    id=${owner%.*}
    settle surely
  done
}

say_silence() {             # reports that the engine has not answered for SILENCE_S
  [[ -e $run/silent ]] || : >"$run/silent"
  is_younger "$run/silent" "$SILENCE_S" || [[ -e $run/silent.said ]] || {
    : >"$run/silent.said"
    say_text note "$engine_name does not answer. Its jobs keep running or waiting, \
and the queries are repeated"
  }
}

end_silence() {
  [[ ! -e $run/silent.said ]] || say_text note "$engine_name answers again"
  rm -f -- "$run/silent" "$run/silent.said"
}

judge() {                   # for judge_all: acts on what is known of the job $key
  local more word value folder owner='' at alive=() over=() id='' listed=''
  read_record "$home/jobs/$key"
  more=$home/jobs/$key.more
  [[ $word == queued || $word == starting ]] || return
  { read -r owner _ <"$more/begun"; } 2>/dev/null
  [[ $owner != cancel ]] || { give_up_queued; return; }
  engine_name_of "$key"
  for at in ${of["$REPLY"]-}; do
    if engine_is_over "${states[at]}"; then over+=("$at"); else alive+=("$at"); fi
  done
  for file in "$home/news/$key.ended."*; do
    [[ $file != *.told.* ]] || settle_told
    return                  # hear_end does the rest
  done
  if [[ $owner ]]; then
    judge_begun
  elif ((${#alive[@]})); then
    adopt_oldest
  else
    judge_unseen
  fi
}

judge_begun() {             # for judge: the job $key has begun as $owner
  id=${owner%.*}
  for at in "${alive[@]}"; do
    if [[ ${ids[at]} != "$id" ]]; then
      engine_cancel "$key" "${ids[at]}" waiting         # a second submission, too late
    elif [[ ${states[at]} != PENDING ]]; then
      listed=1
    fi
  done
  note_number "$id"
  if [[ $listed ]]; then
    rm -f -- "$more/missing"
    [[ ! -e $more/cancel ]] || is_younger "$more/cancel" "$CANCEL_S" || engine_cancel "$key" "$id"
  elif ((${#over[@]})) || is_missing "$MISSING_S"; then
    settle
  fi
}

adopt_oldest() {            # for judge: the job waits; if it waits twice, the older one stays
  local first=${alive[0]} start
  for at in "${alive[@]}"; do ((${ids[at]%%_*} >= ${ids[first]%%_*})) || first=$at; done
  note_number "${ids[first]}"
  for at in "${alive[@]}"; do
    ((at == first)) || engine_cancel "$key" "${ids[at]}" waiting
  done
  rm -f -- "$more/missing" "$more/unsure"
  if engine_never "${reasons[first]}"; then
    engine_reason PENDING "${reasons[first]}"
    refuse_need "$REPLY"
    return
  fi
  engine_reason "${states[first]}" "${reasons[first]}"
  start=
  [[ ${starts[first]} != 20* ]] || start=$(enter date -d "${starts[first]}" +%s)
  say_text queued "$key" "${ids[first]}" "$REPLY" "$start"
}

judge_unseen() {            # for judge: the job has not begun, and does not wait in the engine
  local said='' tries=0 pid since boot host
  if { read -r pid since boot host <"$more/submitting"; }; then         # it is being submitted
    if [[ $host == "${HOSTNAME:-here}" ]]; then
      ! is_alive "$pid $since $boot" || return 0
    else
      ! is_younger "$more/submitting" "$((2 * SUBMIT_LIMIT_S))" || return 0
    fi
  fi
  if ((${#over[@]})) || { [[ -e $more/engine ]] && is_missing "$MISSING_S"; }; then
    { read -r id <"$more/engine"; } || id=${ids[over[0]]-}
    settle
  elif [[ ! -e $more/engine ]]; then
    # If an earlier submission still arrives, only that or the new one can begin (FENCE).
    is_younger "$more/script" "$((2 * engine_timeout))" && return
    [[ -e $more/unsure ]] && is_younger "$more/unsure" "$((2 * engine_timeout))" && return
    { IFS= read -r said <"$more/unsure"; read -r tries <"$more/tries"; }
    if ((tries >= 3)) && ! engine_is_silent "$said"; then
      refuse_queued "$engine_name refuses the job: $said"
    else
      echo "$((tries + 1))" >"$more/tries"
      submit
    fi
  fi
}

note_number() {             # notes the number of the job in the engine, if it is new
  local known=
  { read -r known <"$more/engine"; }
  [[ $known == "$1" ]] || write_number "$1"
}

write_number() {            # writes the number of the job in the engine, in one piece
  printf '%s\n' "$1" >"$more/engine"
}

is_missing() {              # succeeds if the engine has not listed the job for $1 seconds
  [[ -e $more/missing ]] || : >"$more/missing"
  ! is_younger "$more/missing" "$1"
}

# engine_fate sets fate, code, node, by and because.  The values of fate:
#   alive, gone (nothing is known), ended (code: its status), killed, memory, time, cancelled,
#   node_failed, preempted, unstarted (the node could not begin), unwritable (the node cannot write
#   in the workdir), requeued
#
# ran: for how many seconds the job ran.
settle() {                  # for judge: reports how a job without a record of its end ended
  local fate code node by ran because wait_s=$MISSING_S
  engine_fate
  [[ $fate != alive ]] || return 0
  if [[ ! $owner ]]; then
    settle_unbegun
    return
  fi
  # The engine forgets jobs: so a file keeps its answer.  A node may have written a record that this
  # node cannot see yet: so wait for that.
  case $fate in
    gone)
      { IFS=$'\t' read -r fate code node by ran because <"$more/fate"; } 2>/dev/null ||
        fate=gone ;;
    *) printf '%s\t%s\t%s\t%s\t%s\t%s\n' "$fate" "${code:--}" "${node:--}" "${by:--}" \
         "${ran:-0}" "${because:--}" >"$more/fate" ;;
  esac
  [[ $by != - ]] || by=
  [[ $ran != *[!0-9]* ]] || ran=0
  # After these the job does not start again, so a late record changes little.
  case $fate in
    gone | ended) wait_s=$LAG_S ;;
    killed | memory | time) wait_s=$RECORD_S ;;
    cancelled) [[ ! $by && $engine_accounting ]] || wait_s=$RECORD_S ;;
  esac
  if ! is_missing "$wait_s" && ! [[ ${1-} && $wait_s == "$RECORD_S" ]]; then
    ((wait_s != RECORD_S)) || doubtful+=("$key")
    return 0
  fi
  end_by_fate || case $fate in
    ended) end_untold "$code" "$engine_name reports this exit code; the job left no record" ;;
    killed) end_untold 137 "the job's shell on the node was killed" ;;
    memory) end_untold 137 "the job ran out of memory: $because" ;;
    *) lose_queued lost "$engine_name does not know the job any more" ;;
  esac
}

end_by_fate() {             # for settle, settle_told: reports an end by the engine; else fails
  case $fate in
    time) end_untold 124 'the job reached the time limit of the cluster' ;;
    cancelled) end_untold 143 "the job was cancelled${by:+ by $by}" ;;
    preempted) lose_queued preempted 'another job took its place' ;;
    requeued) lose_queued preempted 'the job was put back into the queue after it had begun' ;;
    node_failed) lose_queued lost "the node $node failed" ;;
    *) return 1 ;;
  esac
  return 0
}

settle_unbegun() {          # for settle: the job $key has not begun, and the engine has it no more
  take_fence || return 0
  case $fate in
    cancelled)
      if [[ -e $more/cancel ]]; then
        say "absent"$'\t'"$key"
        give_up_queued
      else
        end_untold 143 "the job was cancelled${by:+ by $by} before it began"
      fi ;;
    unstarted) without_node "the node $node could not start the job: $because" ;;
    unwritable)
      without_node "the node $node cannot write in ${home%/*}: let \`workdir\` be a folder that \
the nodes see" ;;
    *) refuse_queued "$engine_name removed the job before it began${because:+: $because}" ;;
  esac
}

settle_told() {             # for judge: asks why the script was told to stop its job
  local fate code node by ran because
  id=${owner%.*}
  engine_fate
  [[ -e $more/cancel ]] && fate=ended   # the client cancelled it
  code=${file##*.ended.} code=${code%%.*}
  [[ $fate == alive ]] || end_by_fate || end_untold "$code"
}

end_untold() {              # reports an end.  $1: exit status, $2: text for its stderr
  local word value folder more wall=0 file=$home/jobs/$key
  read_record "$file"
  [[ ! ${2-} ]] || printf 'ssh-scheduler: %s\n' "$2" >>"$file.err"
  for wall in "$home/news/$key.ended."*; do IFS=. read -r _ _ wall _ <<<"${wall##*.ended.}"; done
  ((wall)) || wall=$((${ran:-0} * 100))
  say_peak
  [[ -e $file.back || ! $folder ]] || (list_back "$folder" '' "$file.back" .)
  end_queued "$1" "$wall"
  rm -f -- "$home/news/$key."*
}

say_peak() {                # for end_untold: reports the most memory that the job $key had
  local most
  { read -r most <"$home/jobs/$key.more/peak"; } 2>/dev/null || return 0
  say "used"$'\t'"$key"$'\t'"$most"
}

lose_queued() {             # $1: lost or preempted, $2: why.  The client may start the job anew
  local word value folder more
  read_record "$home/jobs/$key"
  record "$home/jobs/$key" "lost${folder:+ $folder}"
  rm -f -- "$home/news/$key."*
  engine_cancel "$key" "$id"
  if [[ $1 == lost ]]; then
    say_text lost "$key" "$2"
  else
    say_text preempted "$key" "$2"
  fi
}

refuse_need() {             # $1: why no job with this need ever runs here
  local need
  need=$(. "$more/orders" && printf '%s' "$need")
  take_fence || return 0
  say_text unfit "$need" "$1"
  give_up_queued
  say "held"$'\t'"$key"
}

refuse_queued() {           # fences and refuses the job; $1: why it could not begin
  take_fence || return 0
  say_text refused "$key" "$1"
  give_up_queued
}

without_node() {            # excludes $node, which could not begin the job $key; $1: why
  local nodes
  printf '%s %(%s)T %s\n' "${node:-?}" -1 "$1" >>"$home/excluded"
  read_excluded
  IFS=, read -ra nodes <<<"$REPLY"
  if [[ ! $node ]] || ((${#nodes[@]} >= MOST_EXCLUDED)); then   # the cluster is at fault
    refuse_queued "$1"
  else
    say_text preempted "$key" "$1"
    give_up_queued
  fi
}

read_excluded() {           # REPLY: the nodes that get no job for now, separated by commas
  local name since now
  printf -v now '%(%s)T' -1
  REPLY=
  while read -r name since _; do
    [[ $since && ,$REPLY, != *,"$name",* ]] && ((now - since < EXCLUDED_S)) &&
      REPLY+=${REPLY:+,}$name
  done <"$home/excluded"
} 2>/dev/null

# ---- Asked by the client ----

do_adopt() {                # KEY...
  local key
  for key; do ours[$key]=1; done
  beside revoke_or_ask "$@"
}

ask_about() {               # reports the state of the jobs $@, which were queued before
  local key word value more folder unknown='' owner id
  hear_news
  for key; do
    read_record "$home/jobs/$key"
    more=$home/jobs/$key.more owner=
    case $word in
      revoked) say "absent"$'\t'"$key" ;;
      ended) say_recorded_end "$key" ;;
      lost) say_text lost "$key" 'the job ended without an exit code' ;;
      *)
        { read -r owner _ <"$more/begun"; } 2>/dev/null
        if [[ $owner && $owner != cancel ]]; then
          say_node
          say "started"$'\t'"$key"
        elif [[ $owner || ! -e $more/script ]] && take_fence; then
          give_up_queued
          say "absent"$'\t'"$key"
        else
          id=
          { read -r id <"$more/engine"; } 2>/dev/null
          say_text queued "$key" "$id" '' ''
          unknown=1
        fi ;;
    esac
  done
  [[ ! $unknown ]] || judge_all
} 2>/dev/null

do_withdraw() {             # KEY...: take back jobs that have not begun
  start_pending
  beside withdraw_all "$@"
}

withdraw_all() {
  local key
  for key; do
    if take_fence; then
      give_up_queued
      say "absent"$'\t'"$key"
    fi
  done
}

cancel() {                  # SECONDS KEY...: stops jobs
  local key
  for key in "${@:2}"; do stop_queued; done
  say "cancelled"$'\t'
}

stop_queued() {             # stops the job $key, whose script looks for the file `cancel`
  local more=$home/jobs/$key.more word value folder
  read_record "$home/jobs/$key"
  more=$home/jobs/$key.more
  case $word in
    queued | starting)
      if take_fence; then
        give_up_queued
        say "absent"$'\t'"$key"
      else
        : >"$more/cancel"
      fi ;;
    ended) say_recorded_end "$key" ;;
  esac
} 2>/dev/null

end_begun() { revoke_all "${!begun[@]}"; }      # for farewell

revoke_all() {              # KEY...: prevents or stops these jobs, and removes them
  local key tries found id
  for key; do
    ! revoke "$key" || continue
    stop_queued
    for ((tries = 0; tries < 120; tries++)); do
      found=("$home/news/$key.ended."*)
      [[ -e $home/jobs/$key.more/cancel && ${#found[@]} == 0 ]] || break
      sleep 0.5
    done
    if ((tries == 120)); then
      id=
      { read -r id <"$home/jobs/$key.more/engine"; } 2>/dev/null
      engine_cancel "$key" "$id"
    fi
  done
  remove_jobs "$@"
}

# The file of each job is removed first: see run_on_node.
remove_jobs() {             # removes all files of the jobs $@
  local key gone=() word value more folder
  cd -- "$home/jobs" || return
  for key; do
    read_record "$home/jobs/$key"
    gone+=("$key" "$key.out" "$key.err" "$key.back" "$key.more" "$home/news/$key."*)
    [[ -e $key ]] || gone+=("$key ended "*)
    [[ ! $folder ]] || gone+=("$folder" "${folder%.*}.alive")
  done
  remove "${gone[@]}"
} 2>/dev/null

do_eof() {                  # KEY
  local size
  size=$(stat -c %s -- "$home/jobs/$1.more/in") || size=0
  echo "$size" >"$home/jobs/$1.more/eof"
} 2>/dev/null

runs_still() {              # for list_others: succeeds if the job of $file, which has begun, runs
  local found=("$home/news/${file##*/}.ended."*)
  ((${#found[@]} == 0))
}

# ---- On a node ----

run_on_node() {             # runs the job, once the batch script has the fence, in KEY.more
  local worker watcher told='' forwarded='' status='' wall='' used='' grace kill_wait=30 began
  shopt -s nullglob dotglob
  eval "$(<orders)"
  umask 077
  # remove_jobs removes this file first.  So no job begins after its link `begun` was removed.
  [[ -e $home/jobs/$key ]] || exit 0
  file=$home/jobs/$key more=$home/jobs/$key.more shared=/tmp proc=/proc sys=/sys
  { IFS= read -r boot_id <"$proc/sys/kernel/random/boot_id"; } 2>/dev/null
  boot_id=${boot_id:-$NO_BOOT_ID}
  run=$more pipe=$home/jobs/${folder%.*}.alive
  mkfifo -- "$pipe" "$run/events" "$run/quiet" || exit 121
  exec {events}<>"$run/events" {quiet}<>"$run/quiet"
  claims=/dev/null          # no list is written there: the login node would not find it
  ! count_kills || echo "$REPLY" >"$run/kills"
  trap 'told=told' TERM
  trap heed_limit USR1
  trap 'told=${told:-cancel}' HUP
  read_clocks
  began=$REPLY
  read_node_environment
  set -m
  work_on_node &
  worker=$!
  set +m
  watch_on_node &
  watcher=$!
  grace=$((kill_wait - 5 > 5 ? 5 : kill_wait - 5 < 1 ? 1 : kill_wait - 5))
  while :; do
    wait "$worker"
    [[ $told != limit || $forwarded ]] ||
      echo 'ssh-scheduler: the job reached the time limit of the cluster' >>"$file.err"
    [[ ! $told || $forwarded ]] || { forwarded=1; end_processes "$grace" "$key"; }
    kill -0 "$worker" 2>/dev/null || break
  done
  trap '' USR1              # a job that has ended by now has not reached its limit
  kill "$watcher"
  { read -r status wall used <"$run/result"; } 2>/dev/null || end_unrecorded
  bring_home
  tell_end
  exit "$status"
} 2>>engine.out

# Slurm announces its limit when it looks, every 30 s: so up to 30 s before that is due, or once the
# job begins.  Of a limit below 10 minutes, a job gets nine tenths.
heed_limit() {              # for run_on_node: stops the job, as its limit is near
  if ((SECONDS < heed_s)); then
    : >"$run/near"          # the watcher sends the signal again
  else
    # Slurm may send USR1 after TERM.  Then the runner still asks the engine why (told).
    told=${told:-limit}
  fi
}

watch_on_node() {           # for run_on_node: looks for orders, and measures the memory of the job
  local pids rss peak ticks most=0 tick=0
  until read -r -t 1 -u "$quiet"; do
    [[ ! -e $more/cancel ]] || kill -HUP "$$"
    if [[ -e $run/near ]] && ((SECONDS >= heed_s)); then
      rm -f -- "$run/near"
      kill -USR1 "$$"
    fi
    ((tick++ % 2 == 0)) || continue
    use_of "$worker"
    # Few writes to a shared file system: only once the peak is 3 % higher.
    ((peak > most + most / 32)) && most=$peak && echo "$most" >"$run/peak.new" &&
      mv -f -- "$run/peak.new" "$run/peak"
  done
}

read_node_environment() {   # the job gets the environment of its script
  local visible=()
  [[ ! ${CUDA_VISIBLE_DEVICES+x} ]] || visible=("CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES")
  engine_name=              # so that the variables of the engine stay
  read_environment "/proc/$$/environ"
  environment+=("${visible[@]}" CUDA_DEVICE_ORDER=PCI_BUS_ID)
  assign
  functions='' all_functions='' named=''
  [[ ! -e $more/functions ]] || printf -v functions 'BASH_ENV=%q ' "$more/functions"
  all_functions=$functions
}

work_on_node() {            # the worker of this one job
  local entry
  slot=0 gpus=- claim=$run/claim
  fill_wrap "$wrap"
  wrap=${REPLY//$'\4'/${CUDA_VISIBLE_DEVICES-}}
  has='' fresh=1 baseline='' ticks=0 login_folder=$HOME
  trap : TERM INT HUP PIPE
  trap - USR1
  IFS= read -rd '' command <"$file"
  command=${command%$'\n'#*}
  exec {fd}<>"$pipe"
  exec {orders}</dev/null {left}<"$pipe" {input}</dev/null {fd}>&- {events}>&- {quiet}>&-
  has=none
  if [[ $stage ]]; then
    while IFS= read -rd '' entry; do sent["$stage $entry"]=1; done <"$home/stage/$stage/list"
    [[ ! -e $home/stage/$stage/links ]] ||
      while IFS= read -rd '' entry; do linked["$stage ./$entry"]=1; done <"$home/stage/$stage/links"
  fi
  read -r _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ nice _ </proc/self/stat
  enter_environment
  read_clocks
  made=$REPLY
  identify "$BASHPID"
  record "$file" "starting $REPLY $folder" "$command"
  : >"$home/news/$key.began"
  freeze_record
  run_job
} 2>/dev/null

make_folder() {             # makes the job's copy of the files; with node_folder on the node's disk
  local to=$home/jobs/$folder disk=''
  has=$stage fresh=1 baseline=''
  if [[ $node_folder ]]; then
    eval "disk=$node_folder"             # a path, or a variable: the client checked that
    if [[ $disk != /* ]]; then
      printf 'ssh-scheduler: node_folder: %s is no folder on this node\n' "$node_folder"
      return 1
    fi
    disk+=/ssh_scheduler.${folder#work.}
    # The job is run as ../KEY, as in every folder of jobs.
    mkdir -p -- "${disk%/*}" && mkdir -m 700 -- "$disk" && ln -s -- "$disk/work" "$to" &&
      ln -s -- "$file" "$disk/$key" || return
    to=$disk/work
  fi
  if [[ $stage ]]; then
    cp -a --reflink=auto -- "$home/stage/$stage/copy" "$to"
  else
    mkdir -- "$to"
  fi || return
  read_clocks
  made=$REPLY
} 2>>"$file.err" >&2

bring_home() {              # for run_on_node: moves the results from the node's disk to jobs/
  local to=$home/jobs/$folder disk entry
  [[ -L $to ]] || return 0
  disk=$(readlink -- "$to")
  if [[ ! -e $file.back ]] || copy_home 2>>"$file.err"; then
    remove "${disk%/work}"
  else
    printf 'ssh-scheduler: its results could not be copied here; they are on the node %s, in %s\n' \
      "${SLURMD_NODENAME:-$HOSTNAME}" "$disk" >>"$file.err"
    rm -f -- "$file.back"
    ((status)) || status=125
  fi
  [[ ! -L $to ]] || rm -f -- "$to"
}

copy_home() (               # for bring_home: copies what the list of the job names
  set -o pipefail
  mkdir -- "$to.new" &&
    while IFS= read -rd '' entry; do
      [[ $entry != +* ]] || printf '%s\0' "${entry#+}"
    done <"$file.back" | tar -cf - -C "$disk" --null --no-recursion -T - |
    tar -xpf - -C "$to.new" && rm -- "$to" && mv -- "$to.new" "$to"
)

freeze_record() {           # leaves the record of the end to the runner, which first asks why
  record() { :; }
  say_left() { :; }         # a cluster kills what is left when the script exits
  say_ended() { printf '%s\n' "$2 $3 $4" >"$run/result"; }
  last_words_of() { [[ ! $4 ]] || printf '%s\n' "$4 0 0" >"$run/result"; }
}

end_unrecorded() {          # for run_on_node: its worker was killed
  read_clocks
  wall=$((REPLY - began)) used=0
  [[ ! $told ]] || { status=143; return; }
  status=137
  echo 'ssh-scheduler: the job was killed with its whole process group' >>"$file.err"
  [[ -e $file.back ]] || (list_back "$folder" '' "$file.back" .)
}

tell_end() {                # for run_on_node: writes the end where the login node looks for it
  local line path name=$key.ended.$status.${told:-no}.$wall.$used
  while read -r -t 0 -u "$events" && IFS= read -r -u "$events" line; do
    printf '%s\n' "$line" >>"$more/said"
  done
  { read -r line <"$run/peak"; } 2>/dev/null &&
    printf 'used\t%s\t%s\n' "$key" "$line" >>"$more/said"
  for path in out err back; do
    if [[ -s $file.$path ]]; then name+=.$(stat -c %s -- "$file.$path"); else name+=.0; fi
  done
  : >"$home/news/$name"
  # Nobody reads the news of a job that was lost and removed because its node was unreachable.
  [[ -e $file ]] || rm -f -- "$home/news/$name"
}

# The functions of REMOTE_VISIT, which come after these in the library of a node, do the rest.
visit_on_node() {           # $1: KEY.more; runs a shell beside the job, in a step of the engine
  local word value folder process='' to
  local -A parent=() group=() mine=()
  eval "$(<"$1/orders")"
  shopt -s nullglob dotglob
  { IFS= read -r boot_id </proc/sys/kernel/random/boot_id; } 2>/dev/null
  boot_id=${boot_id:-$NO_BOOT_ID}
  for _ in {1..50}; do
    read_record "$home/jobs/$key"
    ! find_process || break
    sleep 0.1
  done
  if [[ ! $process ]]; then
    echo "ssh-scheduler: ${key%.*} has ended, or is about to begin" >&2
    exit 1
  fi
  to=$(mktemp -d -- /tmp/ssh_scheduler_shell.XXXXXXXX) && write_shell || exit
  "$BASH" "$to/shell"
  word=$?
  remove "$to" "$to.pid"
  exit "$word"
}

# A FIFO does not reach from the login node to another machine: so the input is a file that grows.
keep_input() {              # for run_job: sets input and keeper
  mkfifo -- "$run/in.node"
  exec {both}<>"$run/in.node" {input}<&-
  exec {input}<"$run/in.node"
  { trap '' TERM; exec {left}<&- {orders}<&- {input}<&-; bring_input; } >&"$both" {both}<&- &
  keeper=$!
  disown "$keeper"
  exec {both}<&-
}

bring_input() {             # for keep_input: writes the input as it grows, until it is complete
  local from=$file.more/in known=0 size complete=''
  while :; do
    { read -r complete <"$file.more/eof"; } 2>/dev/null         # its full size in bytes
    size=$(stat -c %s -- "$from" 2>/dev/null) || size=0
    if ((size > known)); then
      tail -c "+$((known + 1))" -- "$from" | head -c "$((size - known))" || return
      known=$size
    elif [[ $complete ]] && ((known >= complete)); then
      return
    else
      sleep 0.2
    fi
  done
}
'''

REMOTE_SLURM = r'''
# ---- Slurm ----

# The sources: sbatch(1), squeue(1), scontrol(1), sacct(1), and what Slurm 22.05 does.
# Another engine is a section like this one; see docs/internals.md, "Another engine".

engine_name=Slurm engine_version=''
engine_timeout=10 engine_kill_wait=30 engine_accounting=''      # in seconds; Slurm's own defaults
engine_programs=(sbatch squeue scancel scontrol)
# In the script: the id of its run, which no other run has, and the node.
engine_self='me=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0} node=$SLURMD_NODENAME'
# On the login node: what runs a program beside the job whose run is $me; --pty gives a terminal.
engine_step='srun --jobid="${me%%.*}" --overlap --quiet'

slurm() {                   # becomes the program $2... of Slurm, with a time limit of $1 seconds
  enter timeout -k 5 "$@"
}

# Without this file each program of Slurm waits for 60 s.
engine_lacks() {            # prints what is wrong if the file that SLURM_CONF names cannot be read
  # shellcheck disable=SC2016            # another shell expands it, in the environment of a login
  enter /bin/sh -c '[ -z "$SLURM_CONF" ] || [ -r "$SLURM_CONF" ] || printf "%s cannot be read%s" \
    "$SLURM_CONF" " (SLURM_CONF of the login, or of env in the machine file)"'
}

engine_look() {             # reads the controller's configuration; if it cannot, sets answer, fails
  local lines key value
  if ! lines=$( (slurm "$ENGINE_LIMIT_S" scontrol show config) 2>&1); then
    answer=${lines##*$'\n'}
    return 1
  fi
  while read -r key _ value _; do
    case $key in
      SLURM_VERSION) engine_version=$value ;;
      MessageTimeout) engine_timeout=${value%%[!0-9]*} ;;
      KillWait) engine_kill_wait=${value%%[!0-9]*} ;;
      AccountingStorageType) [[ $value == */none || $value == '(null)' ]] || engine_accounting=1 ;;
    esac
  done <<<"$lines"
}

engine_overview() {         # reports what the cluster has, for people
  local line running=0 waiting=0
  while IFS= read -r line; do say_text probe partition "$line"; done < <(
    slurm "$ENGINE_LIMIT_S" sinfo -h --format='%P|%a|%l|%D|%C|%G|%m|%T|%E')
  while IFS= read -r line; do
    case $line in PENDING) waiting=$((waiting + 1)) ;; *) running=$((running + 1)) ;; esac
  done < <(slurm "$ENGINE_LIMIT_S" squeue -h -u "$uid" -o %T)
  say_text probe own_jobs "$running $waiting"
} 2>>"$run/log"

engine_name_of() {          # REPLY: the name in Slurm of the job with the key $1, and of no other
  local text=$1 char
  REPLY=sshs-$project.
  while [[ $text ]]; do
    char=${text%%[!A-Za-z0-9.-]*}
    REPLY+=$char text=${text#"$char"}
    [[ ! $text ]] || { printf -v char '_%02X' "'$text"; REPLY+=$char text=${text#?}; }
  done
}

words_for() {               # words: the options of sbatch for the need $1 and the time limit $2 (s)
  local cores mb alone gpus kind limit=${2%.*}
  read -r cores mb alone gpus kind <<<"$1"
  words=(--parsable --no-requeue --propagate=NONE --export=ALL --chdir=/ --open-mode=append
    --nodes=1 --ntasks=1 "--cpus-per-task=$cores" "--mem=$((mb > 0 ? mb : 1))M"
    "--signal=B:USR1@$NEAR_S")
  ((gpus == 0)) || words+=("--gres=gpu:${kind:+$kind:}$gpus")
  ((alone == 0)) || words+=(--exclusive)
  # The runner's own limit is exact: Slurm checks its limits every 30 s, and counts minutes.
  [[ ! $limit ]] || words+=("--time=$(((limit + engine_kill_wait + 150) / 60 + 1))")
}

engine_limit() {            # REPLY: the time limit of the machine file in seconds; else empty
  local word time=''
  for word in "${engine_words[@]}"; do [[ $word != --time=* ]] || time=${word#*=}; done
  slurm_seconds "$time"
}

# While nodes are drained or down, --test-only takes them for missing: sbatch accepts such jobs, and
# they wait.  Then only sbatch itself can tell.
engine_test() {             # $1: need, $2: limit; fails, and sets answer, if Slurm would refuse
  local words=() lines
  words_for "$1" "$2"
  lines=$( (slurm "$ENGINE_LIMIT_S" sbatch --test-only "${words[@]}" --output=/dev/null \
    "${engine_words[@]}" --wrap true) 2>&1) && return
  slurm_refusal "$lines"
  case $lines in
    *'node configuration is not available'*) nodes_are_missing ;;
    *'allocation failure'* | *'sbatch: error'*) engine_is_silent "$lines" ;;
    *'unrecognized option'* | *'invalid option'* | *'requires an argument'* | *'ambiguous'*)
      return 1 ;;                       # of getopt, on engine_options
  esac
}

nodes_are_missing() {       # succeeds if some nodes are out of use, so that their jobs wait
  local state
  while IFS= read -r state; do
    [[ ! $state =~ drain|down|fail|maint|unk|power|reboot|\* ]] || return 0
  done < <(slurm "$ENGINE_LIMIT_S" sinfo -h -o %T)
  return 1
}

slurm_refusal() {           # answer: the reason in $1, the output of sbatch
  local line
  answer=
  while IFS= read -r line; do
    line=${line#sbatch: } line=${line#error: }
    line=${line#'Batch job submission failed: '} line=${line#'allocation failure: '}
    [[ ! $line ]] || answer+=${answer:+. }$line
  done <<<"$1"
}

engine_is_silent() {        # succeeds if $1 means that the controller did not answer
  [[ ! $1 || $1 == *'Socket timed out'* || $1 == *'Unable to contact slurm controller'* ||
    $1 == *'Zero Bytes'* || $1 == *'Unexpected message'* || $1 == *'Connection refused'* ||
    $1 == *'Transport endpoint'* || $1 == *'Connection reset'* ]]
}

engine_submit() {           # submits $key; answer: id ID, or unknown, full, refused, nodes WHY
  local words=() lines line status name avoided
  words_for "$need" "$limit"
  engine_name_of "$key"
  name=$REPLY
  read_excluded
  avoided=$REPLY
  for line in "${engine_words[@]}"; do
    [[ $line != --exclude=* || ! $avoided ]] || avoided+=,${line#*=}
  done
  lines=$( (slurm "$SUBMIT_LIMIT_S" sbatch "${words[@]}" "--job-name=$name" --dependency=singleton \
    "--output=${more//%/%%}/engine.out" "${engine_words[@]}" ${avoided:+"--exclude=$avoided"} \
    <"$more/script") 2>&1)
  status=$?
  while IFS= read -r line; do
    if [[ $line =~ ^[0-9]+(\;.*)?$ ]]; then
      answer="id ${line%%;*}"
      return
    fi
  done <<<"$lines"
  slurm_refusal "$lines"
  case $lines in
    *AssocMaxSubmitJobLimit* | *QOSMax*Submit* | *'job submit limit'* | *AssocGrpSubmit*)
      answer="full $answer" ;;
    *'node configuration is not available'* | *'nvalid partition'* | *'nvalid account'* | \
      *'nvalid qos'* | *'nvalid feature'* | *'nvalid node name'* | *'nvalid generic resource'* | \
      *'nvalid job array'* | *'equested time limit is invalid'* | *'too long'* | \
      *'nrecognized option'*)
      if [[ $avoided ]]; then           # all suitable nodes are excluded
        read -r _ _ answer < <(tail -n 1 -- "$home/excluded")
        rm -f -- "$home/excluded"
        answer="nodes $answer, and no other node is left"
      else
        answer="refused $answer"
      fi ;;
    *) ((status != 255)) && answer="unknown $answer" || answer="refused $answer" ;;
  esac
}

engine_list() {             # prints ID|STATE|REASON|START|NODE|NAME of each job; fails if silent
  slurm "$ENGINE_LIMIT_S" squeue -h -u "$uid" -t all -r -o '%i|%T|%r|%S|%N|%j'
} 2>>"$run/log"

engine_is_over() {          # succeeds if the state $1 is final
  case $1 in
    COMPLETED | FAILED | CANCELLED* | TIMEOUT | DEADLINE | NODE_FAIL | BOOT_FAIL | PREEMPTED | \
      OUT_OF_MEMORY | REVOKED) ;;
    *) return 1 ;;
  esac
}

engine_never() {            # succeeds if a job that waits for the reason $1 waits for ever
  [[ $1 == PartitionTimeLimit || $1 == PartitionConfig || $1 == BadConstraints ]]
}

engine_reason() {           # REPLY: why a job waits, in words.  $1: its state, $2: the reason
  REPLY=
  [[ $1 == PENDING ]] || return 0
  case $2 in
    None | '') ;;
    Resources) REPLY='no room now' ;;
    Priority) REPLY='others first' ;;
    Dependency) REPLY='an older job of that name has not ended' ;;
    BeginTime) REPLY='its start time is later' ;;
    JobHeldUser) REPLY='you hold the job' ;;
    JobHeldAdmin) REPLY='an administrator holds the job' ;;
    PartitionTimeLimit) REPLY='it asks for more time than the partition allows' ;;
    PartitionConfig | BadConstraints) REPLY='the job can never run here' ;;
    PartitionDown | PartitionInactive) REPLY='the partition is down' ;;
    ReqNodeNotAvail* | 'Nodes required'*) REPLY='nodes are down or reserved' ;;
    'launch failed'*) REPLY='the node could not start the job' ;;
    QOSMax*PerUser* | AssocMaxJobsLimit | AssocGrp* | QOSGrp* | MaxJobsPer*)
      REPLY="your account may use no more now ($2)" ;;
    Licenses) REPLY='no license is free' ;;
    *) REPLY=$2 ;;
  esac
}

# engine_cancel reports nothing: the next list shows what became of the job.
engine_cancel() {           # cancels the key $1, or number $2 if known; $3: only if it waits
  engine_name_of "$1"
  if [[ $2 ]]; then
    (slurm "$ENGINE_LIMIT_S" scancel ${3:+--state=PENDING} "$2")
  else
    (slurm "$ENGINE_LIMIT_S" scancel --name="$REPLY")
  fi
} 2>>"$run/log"

engine_fate() {             # sets the fate of the job $key with the number $id: see settle
  local line state='' reason='' status='' restarts=0 run_number=${owner#*.}
  fate=gone code='' node='' by='' ran=0 because=''
  [[ $id ]] || return 0
  ask_slurm || { fate=alive; return; }
  [[ $state ]] || return 0
  { because=$(tail -n 1 -- "$more/engine.out"); } 2>/dev/null
  because=${because#slurmstepd*: error: }
  case $state in
    PENDING | RUNNING | REQUEUED | COMPLETING | CONFIGURING)
      fate=alive
      [[ $owner && $owner != cancel ]] && ((restarts > run_number)) && fate=requeued ;;
    COMPLETED)
      fate='ended' code=0
      ((restarts <= ${run_number:-0})) || fate=requeued ;;
    TIMEOUT | DEADLINE) fate='time' ;;
    OUT_OF_MEMORY) fate=memory ;;
    PREEMPTED) fate=preempted ;;
    NODE_FAIL | BOOT_FAIL) fate=node_failed ;;
    CANCELLED*)
      fate=cancelled
      [[ $owner || ! $node ]] || fate=unstarted ;;
    FAILED) slurm_failure ;;
    *) fate=alive ;;
  esac
} 2>>"$run/log"

slurm_failure() {           # for engine_fate: sets fate and code of a job that FAILED with $status
  fate='ended' code=${status%%:*}
  case $owner:$status in
    :0:53 | :121:*) fate=unwritable ;;
    *:0:9)
      fate=killed
      [[ $(<"$more/engine.out") != *'memory limit'* ]] || fate=memory ;;
    *:0:[1-9]*) code=$((128 + ${status#*:})) ;;
  esac
  [[ $owner || $fate == unwritable ]] || because=${reason:-$because}
}

ask_slurm() {               # for engine_fate: sets state, reason, status, restarts, node, ran
  local name
  engine_name_of "$key"
  name=$REPLY
  line=$( (slurm "$ENGINE_LIMIT_S" scontrol show job -o "$id") 2>&1) || {
    [[ $line == *'nvalid job id'* ]] || return
    line=
  }
  if [[ " $line " == *" JobName=$name "* ]]; then       # Slurm reuses numbers
    line=" $line "
    state=${line#* JobState=} reason=${line#* Reason=} status=${line#* ExitCode=}
    restarts=${line#* Restarts=} node=${line#* NodeList=}
    state=${state%% *} reason=${reason%% *} status=${status%% *} restarts=${restarts%% *}
    node=${node%% *}
    [[ $node != '(null)' ]] || node=
    ran=${line#* RunTime=}
    slurm_seconds "${ran%% *}"
    ran=${REPLY:-0}
  fi
  [[ ! $engine_accounting ]] || [[ $state && $state != CANCELLED ]] || ask_accounting
}

ask_accounting() {          # for ask_slurm: the same from the database, which lags by seconds
  local number said code nodes took known
  IFS='|' read -r number said code nodes took known < <(slurm "$ENGINE_LIMIT_S" sacct -X -n -P \
    --format=JobIDRaw,State,ExitCode,NodeList,Elapsed,JobName -j "$id") || return 0
  [[ $known != allocation ]] || { [[ $state ]] || fate=alive; return 1; }
  [[ $known == "$name" ]] || return 0
  if [[ $said == 'CANCELLED by '* ]]; then
    by=$(id -nu -- "${said#CANCELLED by }") || by="the user ${said#CANCELLED by }"
    said=CANCELLED
  fi
  [[ ! $state ]] || return 0
  state=$said status=$code node=$nodes
  [[ $node != None* ]] || node=
  slurm_seconds "$took"
  ran=${REPLY:-0}
}

slurm_seconds() {           # REPLY: $1, a time of Slurm such as 1-02:03:04, in seconds; else empty
  local days=0 parts
  REPLY=
  [[ $1 =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || return 0
  IFS=: read -ra parts <<<"${1#*-}"
  if [[ $1 == *-* ]]; then              # D-H, D-H:M, D-H:M:S
    days=${1%-*} parts=("${parts[@]}" 0 0)
  elif ((${#parts[@]} < 3)); then       # M, M:S
    parts=(0 "${parts[@]}" 0)
  fi
  REPLY=$((10#$days * 86400 + 10#${parts[0]} * 3600 + 10#${parts[1]} * 60 + 10#${parts[2]}))
}
'''

# `engine:` of a machine file -> its part of the runner
REMOTE_ENGINES = {'slurm': REMOTE_SLURM}

# Runs on the machine while a shell is open beside a job: finds the job, and writes the files that
# the shell reads.  The functions of the remote runner stand in front of it.
REMOTE_VISIT = r'''
visit() {                   # stdin: token, workdir, project, key of the job; exits when stdin ends
  local key field word value more folder process='' to=''
  local -A parent=() group=() mine=()
  exec {requests}<&0 </dev/null
  for field in token workdir project key; do
    IFS= read -rd '' -u "$requests" "${field?}" || return
  done
  printf '\n%s\n' "$token"
  find_home
  find_job
  if [[ $word == open ]]; then
    word=full
    [[ -w $shared ]] || shared=/tmp
    to=$(mktemp -d -- "$shared/ssh_scheduler_shell.XXXXXXXX") && write_shell &&
      word="open $to/shell"
  fi
  printf '%s\n' "$word"
  while read -r -u "$requests"; do      # the client asks whether the shell has begun
    [[ -e $to/shell ]] && echo unused || echo used
  done
  # The client has exited.  Stop a shell that it left, and what runs in its foreground.
  ! { read -r process <"$to.pid"; } || kill -HUP -- "-${process:-0}" || kill -HUP "$process"
  [[ ! $to ]] || remove "$to" "$to.pid"
} 2>/dev/null

find_job() {                # sets word; and process: the bash of the job $key, if there is one
  local tries
  for ((tries = 0; tries < 20; tries++)); do
    ((tries == 0)) || sleep 0.1
    read_record "$home/jobs/$key"
    case $word in
      starting) ;;
      damaged | revoked) word=absent ;&
      *) return ;;
    esac
    find_process && break
  done
  if [[ $process ]]; then
    [[ -r /proc/$process/environ ]] && word=open || word=closed
  elif is_alive "$value"; then
    word=begins
  else
    word=lost
  fi
}

# The bash of a job is its first process, usually a child of its worker.  The watchdog of a time
# limit has the FIFO open, too, but is in the process group of the worker.
find_process() {            # sets process to the bash of the job; fails while there is none
  local pid worker=${value%% *} since=()
  parent=() group=() mine=() process=''
  for pid in $(holders "$key"); do mine[$pid]=1; done
  read_processes
  for pid in "${since[@]}"; do
    [[ ${parent[$pid]} != "$worker" || ${group[$pid]} != "$pid" ]] || mine[$pid]=1
    [[ ${mine[$pid]-} && ${group[$pid]} != "$worker" ]] || continue
    has_begun "$pid" "$worker" || continue
    process=$pid
    return
  done
  return 1
}

has_begun() {               # fails while the process $1 is only a copy of the worker $2
  local entries copied
  read_entries "/proc/$2/environ"
  copied=${entries[*]}
  read_entries "/proc/$1/environ"
  [[ ! $copied || ${entries[*]} != "$copied" ]]
} 2>/dev/null

write_shell() {             # writes three files for bash to read: shell, environment and rc
  local entry name entries known='' odd=() exports=''
  read_entries "/proc/$process/environ"
  ((${#entries[@]})) || return
  for entry in "${entries[@]}"; do
    name=${entry%%=*}
    case $name in
      PWD | OLDPWD | SHLVL | _ | TERM | SSH_SCHEDULER_ID | BASH_ENV) ;;
      UID | EUID | PPID | GROUPS | SHELLOPTS | BASHOPTS | FUNCNAME | BASH_[!E]*) ;;
      [0-9]* | *[!A-Za-z0-9_]*) odd+=("$entry") ;;
      *)
        known+=" | $name"
        printf -v entry 'export %s=%q\n' "$name" "${entry#*=}"
        exports+=$entry ;;
    esac
  done
  write_environment >"$to/environment" && write_rc >"$to/rc" && write_start >"$to/shell"
}

write_environment() {       # for write_shell: prints what sets the environment of the job in a bash
  printf '%s\n' 'for ssh_scheduler_name in $(compgen -e); do case $ssh_scheduler_name in'
  printf '  PWD | OLDPWD | SHLVL | _ | TERM | SSH_* %s) ;;\n' "$known"
  printf '%s\n' '  *) unset -v "$ssh_scheduler_name" ;; esac; done' 'unset -v ssh_scheduler_name'
  printf '%s' "$exports"
}

# A start file may choose GPUs or a Python, as the login of the job did before its `setup`.  So the
# environment of the job is set again after the start file.
write_rc() {                # for write_shell: prints the commands that the shell reads first
  local to_read=''
  for entry in "${entries[@]}"; do [[ $entry != BASH_ENV=* ]] || to_read=${entry#*=}; done
  printf '[[ $- != *i* || ! -r ~/.bashrc ]] || . ~/.bashrc\n. %q 2>/dev/null\n' "$to/environment"
  printf 'rm -rf -- %q\nunset -v BASH_ENV\n' "$to"
  [[ ! -e $to_read ]] || printf 'export BASH_ENV=%q; . "$BASH_ENV"\n' "$to_read"
  printf 'if [[ $- == *i* ]]; then\nPS1=%q$PS1\n' "(${key%.*}) "
  printf 'ssh_scheduler_tell() {\n[[ ! -e /proc/%s ]] || return 0\n' "$process"
  printf 'echo %q\n' "ssh-scheduler: ${key%.*} has ended; files that are made here now will be lost"
  printf 'PROMPT_COMMAND=${PROMPT_COMMAND#ssh_scheduler_tell;}\n}\n'
  printf 'PROMPT_COMMAND="ssh_scheduler_tell;${PROMPT_COMMAND-}"\nfi\n'
}

write_start() {             # for write_shell: prints the commands that start the shell
  printf 'echo "$$" >%q\n' "$to.pid"
  printf 'rm -f -- %q\ncd -- %q || exit\n' "$to/shell" "$home/jobs/$folder"
  printf '. %q 2>/dev/null\n' "$to/environment"
  printf '[ -t 0 ] && set -- --rcfile %q -i || export BASH_ENV=%q\n' "$to/rc" "$to/rc"
  printf 'exec '
  ((${#odd[@]} == 0)) || printf '%q ' /usr/bin/env -- "${odd[@]}"
  printf '%q "$@"\n' "$BASH"
}
'''
REMOTE_VISIT_CALL = 'visit\n'

# The same on the login node of a cluster: the shell is opened on the node, as a step of the job.
REMOTE_CLUSTER_VISIT = r'''
find_job() {                # sets word
  local more=$home/jobs/$key.more owner='' found
  read_record "$home/jobs/$key"
  more=$home/jobs/$key.more
  case $word in
    queued | starting) ;;
    damaged | revoked) word=absent ;&
    *) return ;;
  esac
  { read -r owner _ <"$more/begun"; } 2>/dev/null
  found=("$home/news/$key.ended."*)
  if [[ ! -e $more/script || $owner == cancel ]]; then
    word=absent
  elif [[ ! $owner ]]; then
    word=queues
  elif [[ -e ${found[0]} ]]; then
    word='ended'
  else
    word=open
  fi
} 2>/dev/null

write_shell() {             # writes one file for bash to read
  local more=$home/jobs/$key.more lib
  lib=$(. "$more/orders" && printf '%s' "$lib")
  {
    printf 'echo "$$" >%q\nrm -f -- %q\nmore=%q\n' "$to.pid" "$to/shell" "$more"
    printf '%s\n' 'read -r me node <"$more/begun"' "set -- $engine_step" \
      '[[ ! -t 0 ]] || set -- "$@" --pty'
    printf 'set -- "$@" "$BASH" -c %q "$more"\n. %q/enter\n' \
      '. "$0/orders"; . "$lib/library"; visit_on_node "$0"' "$lib"
  } >"$to/shell"
}
'''

# Runs on the machine, beside a job: sends its output, as it grows, while the client listens.
REMOTE_FOLLOW = REMOTE_CLEAN + r'''
main() {                    # stdin: token, file of the job, known bytes of out and of err
  local token file out err
  IFS= read -rd '' token && IFS= read -rd '' file && IFS= read -rd '' out && IFS= read -rd '' err ||
    return
  printf '\n%s\n' "$token"
  printf '\n%s\n' "$token" >&2
  until [[ -e $file.out && -e $file.err ]]; do    # both exist when the job begins
    read -r -t 0.02
    (($? > 128)) || return
  done
  follow "$file.out" "$out" &
  follow "$file.err" "$err" >&2 &
  read -r
  kill %1 %2
}

# tail takes 8 KB at a time, which is slow for much output: cat sends what is already there.
follow() {                  # writes the file $1 from byte $2 on, and then all that is added to it
  local known=$2 word=
  if ((known == 0)) && [[ -s $1 ]]; then
    cat <&3
    while [[ $word != pos: ]]; do read -r word known || return; done </proc/self/fdinfo/3
  fi 3<"$1"
  exec tail -c "+$((known + 1))" -s 0.1 -f -- "$1"
} </dev/null 2>/dev/null
set -m
main
'''

# Runs on the machine, beside a job: passes its own standard input on to the job.
REMOTE_FEED = REMOTE_CLEAN + r'''
main() {                    # stdin: file of the job, then its input
  local file
  IFS= read -rd '' file || return
  until [[ -p $file.more/in ]]; do
    [[ ! -e $file.more/script ]] || exec cat >>"$file.more/in"  # on a cluster: see keep_input
    [[ -e $file ]] || return
    sleep 0.02
  done
  # Opened to read and write, a FIFO does not block.  Then this descriptor is closed, so that cat
  # fails when the job does not read any more.
  exec {both}<>"$file.more/in"
  exec 1>"/dev/fd/$both" {both}<&-
  exec cat
}
main
'''

# Runs on the machine, for one copy: unpacks a tar archive from stdin, or packs the paths on stdin.
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
