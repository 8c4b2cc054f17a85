#!/usr/bin/env python3
# ssh-scheduler: https://github.com/benblack769/ssh-scheduler.  MIT licence, see LICENSE.
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Make one table of the results of jobs: the parameters of their commands, and their metrics.

    job_results, ... --> Jobs: the facts of each, from the journals  (Reading)
                           |
          commands ------> parameters: the words that differ         (Parameters)
          files, streams > metrics: numbers with names               (Numbers, Metrics)
                           |
                         Table: columns, and rows of Cells           (Columns)
                           |
                         chosen, averaged, sorted                    (Means, Choosing)
                           |
          terminal, CSV, JSON, Markdown, LaTeX                       (Forms, Screen)
          a page: the table, the times of jobs, their streams        (Report, Page)

A Cell has a value, for programs, and a text, for people: 3720.4 and 1h 02m.  A Column may be only
for programs (the whole command) or have another name for people (where).

A journal has one JSON object a line, and batches only append lines.  So the program can read a
journal while a batch runs; it ignores a last line without a newline.  A stream may have 100 MB, so
the program reads only the end, or pieces for curves; only --metric may search all of it.
Below job_results the program writes only tables and pages that the user names there.

Sections: Usage, Words, Errors, Records, Numbers, Reading, Lines, Parameters, Metrics, Columns,
Means, Choosing, Forms, Screen, Report; the edge: Function, Completion, Options, Terminal, Command;
and Page.  A section uses only the sections above it, and the texts of Page, which stand last.

As a library: results_table() and TableError keep their documented behaviour; everything else may
change.  Importing has no effect.
"""
import codecs
import collections
import contextlib
import csv
import fnmatch
import functools
import glob
import itertools
import json
import math
import operator
import os
import re
import shlex
import stat
import sys
import time
from typing import NamedTuple, Optional

# ---- Usage: the text that read_options parses ----

USAGE = """\
Make one table of the results of jobs. Each row has the words in which the
commands differ, the metrics, the exit code, the time and the machine of a job.

Usage:
  results_table [options] [--] [<results>...]
  results_table --help | --completion=<shell>

  <results> is a folder job_results, or one that has it, a batch (grid.sh), or
  results (job_results/grid.sh.*); by default ./job_results. The batch may still
  run. Results are never changed.
  On a terminal the table is cut to its width. In a pipe it is CSV.

Columns:
  The words that differ: --lr=0.1, --lr 0.1 and lr=0.1 are lr, words without a
  name arg1, arg2, a flag is yes. Then the metrics, exit (… while the job runs),
  time, MB and GPU MB (the peak of the memory in use; empty if a job ended
  before the first look at it, as after 1 s, or while no client ran), where,
  files (a digest of the files that were sent, if these differ between jobs),
  and command, if lines of a batch differ in the syntax of the shell (; | for):
  arg1 and arg2 are of lines with the same syntax.
  In front stand folder and batch, if there are several, and job; jobs is the
  number of jobs of a mean. A job that has not started has no row. Of several
  batches a terminal shows words that few jobs have only with --wide.
  Metrics are the numbers of metrics.json or results.json in the job's folder
  and of the files of --from. For jobs without these: the last `name: number`,
  `name=number`, and JSON object on a line, of their stdout, and the numbers of
  lines that have nothing else, such as `epoch 9: loss 0.31`. If other jobs of
  the batch have such files, a job that failed or still runs has only metrics
  that others have; a line tells which are left out, and --columns shows them.

Options:
  --sort=<columns>        Sort by these columns: lr,-val_acc; - is descending.
  --columns=<columns>     Show only these columns, in this order:
                          lr,val_acc,exit.
  --where=<test>          Show only rows for which this holds: 'lr>0.001',
                          'exit=0', 'loss!=nan', 'time<1h', 'job=3'. The
                          operators are = != < <= > >=. ONE test; for more give
                          the option again, and all must hold.
  --mean-over=<names>     Show mean, sample standard deviation and number of
                          jobs that differ in these parameters only: seed, or
                          seed,fold. Takes jobs that finished with exit 0. Time
                          is the mean, too; MB and GPU MB are the largest.
  --unfinished            With --mean-over: take all other jobs, too.
  --metric=<name=regex>   Add a metric: the last match in stdout, else in
                          stderr: 'acc=best accuracy (\\S+)'. May be given
                          several times.
  --from=<files>          Read metrics from files in the job's folder, such as
                          'runs/*.csv': of CSV the last value of each column;
                          .json and .jsonl, too. May be given several times.
  --earlier               Show also the results of jobs that were run again
                          (NAME~1), and of jobs that reproduce others
                          (NAME-again). Without it NAME~1 is there only if the
                          newest attempt of NAME has no results.
  --current               Leave out jobs whose lines are no longer in their
                          batch file, since you changed or deleted these
                          lines. Jobs of execute_remote stay.

Output:
  --wide                  Print the whole table, also in a pipe.
  --csv=<file>            Write CSV to this file; - is stdout. A file in
                          job_results is not sent with the next batch:
                          job_results/table.csv.
  --json                  Write a JSON object for each row, one a line. Numbers
                          that JSON lacks are the strings nan, inf and -inf.
  --markdown              Write a table for Markdown.
  --latex                 Write a tabular for LaTeX, which needs booktabs.
  --html=<file>           Write a page for a browser, without network: table,
                          timeline, use of the machines, plots, curves, causes
                          of failures, last lines of outputs, and commands:
                          job_results/report.html.
  -h --help               Show this help.
  --completion=<shell>    Print the script by which bash, zsh or fish completes
                          this command; the shell reads it at its start.

CSV and JSON have time_s in seconds, memory_mb, gpu_memory_mb, machine, gpus,
state (finished, failed, running, started: no client knows whether it still
runs, ended: not fetched yet, lost, cancelled, earlier) and the whole command.
Names of both kinds work in --where, --sort and --columns.

Exit code: 0; 2 wrong usage or results that cannot be read; 130 interrupted.

Example:
  results_table --mean-over seed --sort=-val_acc
"""


# ---- Words: how names, counts and times are shown ----

def printable(text):
    """Return the text on one line, fit for a terminal: no control characters, no escapes."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def many(count, noun):
    """Return '1 job', '2,000 jobs'."""
    return f'{count:,} {noun}{"" if count == 1 else "s"}'


def names_of(names):
    """Return 'a', 'a and b', 'a, b and c'."""
    *most, last = names
    return f'{", ".join(most)} and {last}' if most else last


def reason_of(error):
    """Return the system's message, such as 'No space left on device', without numbers."""
    return error.strerror or str(error)


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


def width_of(text):
    """Return how many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.category(c) in ('Mn', 'Me', 'Cf') else
               2 if unicodedata.east_asian_width(c) in 'WF' else 1 for c in text)


def some_of(names):
    """Return 'a, b and c', or 'a, b, c and 7 more'."""
    return names_of([*names[:3], *[f'{len(names) - 3:,} more'] * (len(names) > 3)])


def alike(word, known):
    """Return ' (did you mean X?)' with the known name that is most like the word, or ''.

    Names that differ from the word in digits only are no proposals: grid.sh.9 for grid.sh.99.
    """
    import difflib

    def letters(text):
        return re.sub('[0-9]+', '', text)

    spelled = {name.lower(): name for name in known if letters(name) != letters(word)}
    found = difflib.get_close_matches(word.lower(), spelled, 1, 0.7)
    return f' (did you mean {printable(spelled[found[0]])}?)' if found else ''


def naturally(text):
    """Return a key that sorts grid.sh.9 before grid.sh.10."""
    return [(0, int(part), '') if part.isdecimal() else (1, 0, part)
            for part in re.split('([0-9]+)', text) if part]


# ---- Errors: each a sentence, with what to do ----

class TableError(Exception):
    """Anything that a user can cause; shown without a traceback."""
    exit_code = 2


class UsageError(TableError):
    """The command line is wrong."""


class NoSuchResults(TableError):
    """No job has the results that the user named."""


# ---- Records: frozen ----

class Place(NamedTuple):
    """A folder job_results."""
    folder: str                 # as the user wrote it
    names: Optional[tuple]      # of the results that the user named; None: all


class Job(NamedTuple):
    """The facts of a job from the journal; None: unknown."""
    name: str
    folder: str                 # the job_results that it lies in
    state: str                  # one of STATES
    batch: str = ''             # the name of its batch; '' for a job of execute_remote
    command: str = ''
    machine: str = ''
    gpus: str = ''              # the numbers, as 0,1
    files: str = ''             # the digest of the files that were sent
    exit_code: Optional[int] = None
    began: Optional[float] = None       # seconds since 1970
    wall_s: Optional[float] = None
    memory_mb: Optional[int] = None
    gpu_memory_mb: Optional[int] = None
    attempt: int = 1
    own: str = ''               # the options of its line that change its results
    copy_of: str = ''           # the job that it reproduces
    is_left: bool = False       # it has no results yet, and no client fetches them
    stands_for: str = ''        # the job whose newest attempt has no results, of which these are
                                # the newest earlier ones

    def path(self, end=''):
        """Return the path of the job's folder, or of its stream with the end .out or .err."""
        return os.path.join(self.folder, self.name + end)

    def ended_well(self):
        """Tell whether the job finished with exit status 0, as far as is known."""
        return self.state == '' or self.state in ('finished', 'earlier') and self.exit_code == 0


class Reading(NamedTuple):
    """A number (or a text) from a file or a stream, with its unit."""
    value: object
    unit: str = ''
    text: str = ''              # the number as the job wrote it; '': format the value


class Cell(NamedTuple):
    """One cell of the table."""
    value: object = None        # a number, a text, or None, which is an empty cell
    text: str = ''              # the value for people
    unit: str = ''              # of the value, for --where


EMPTY = Cell()

PARAMETER, METRIC, FACT = 'parameter', 'metric', 'fact'
BOTH, PROGRAMS, PEOPLE = 'both', 'programs', 'people'
RARE = 'rare'                       # readers of a column that a terminal shows only with --wide


class Column(NamedTuple):
    """One column of the table."""
    key: str                    # its name for programs
    head: str                   # its name for people
    kind: str                   # PARAMETER, METRIC or FACT
    readers: str = BOTH         # who sees it, unless --columns names it


class Wishes(NamedTuple):
    """The options of the user; the usage text explains each."""
    metrics: tuple = ()         # (name, compiled pattern)
    files: tuple = ()
    tests: tuple = ()           # (column, sign, operand)
    mean_over: tuple = ()
    sort: tuple = ()            # (column, is descending)
    columns: tuple = ()
    unfinished: bool = False
    earlier: bool = False
    current: bool = False


class Table(NamedTuple):
    """The table.  rows: a dictionary each, key of a column -> Cell; an empty cell has no key."""
    columns: tuple
    rows: list
    commands: dict              # batch -> the words that all its commands share, or None
    jobs: tuple                 # the Job of each row; if rows are means, all Jobs
    has_numbers: bool = True    # jobs have metrics, perhaps only ones that repeat a parameter

    @property
    def shared(self):
        """A line for each batch with the words that all its commands share."""
        batches = {job.batch for job in self.jobs}
        shared = {batch: words for batch, words in self.commands.items() if batch in batches}
        if len(shared) == 1:
            return tuple(f'all commands: {words}' for words in shared.values() if words)
        return tuple(f'{printable(batch)}: {words}' for batch, words in shared.items()
                     if batch and words)


# ---- Numbers: text to numbers, and numbers to text ----

# {family: {unit: its value in the unit of the family}}.  The program drops other units.
# k is 1000 of anything, but kB and the like are powers of 1024, as in nvidia-smi.
FAMILIES = {
    's': {'s': 1, 'sec': 1, 'secs': 1, 'second': 1, 'seconds': 1, 'ms': 1e-3, 'us': 1e-6,
          'µs': 1e-6, 'ns': 1e-9, 'm': 60, 'min': 60, 'mins': 60, 'minute': 60, 'minutes': 60,
          'h': 3600, 'hr': 3600, 'hrs': 3600, 'hour': 3600, 'hours': 3600},
    'MB': {'B': 1 / 1024**2, 'bytes': 1 / 1024**2, **{
        letters + end: 1024**power for power, both in ((-1, 'kK'), (0, 'M'), (1, 'G'), (2, 'T'))
        for letters in both for end in ('B', 'iB')}},
    '': {'': 1, '%': 0.01, 'k': 1e3, 'K': 1e3, 'M': 1e6, 'G': 1e9},
}
FAMILY = {unit: family for family, units in FAMILIES.items() for unit in units}

DIGITS = (r'[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)'
          r'(?:[eE][-+]?[0-9]+)?')
WORDS = r'[-+]?(?:[nN]a[nN]|NAN|[iI]nf(?:inity)?|INF(?:INITY)?)'
# A number must not be part of something else: of a version, a date, an address, a time of the day,
# a hash, a number with a decimal comma, or the percentage of a progress bar.
ENDS = r'(?![\w@%])(?![,:][0-9])(?![.-]\w)(?!/[0-9]+/)(?!(?<=%)\|)'
SPACED = '|'.join(sorted((unit for unit in FAMILY if len(unit) > 1 or unit in ('s', '%', 'h')),
                         key=len, reverse=True))
GLUED = '|'.join(sorted(filter(None, FAMILY), key=len, reverse=True))
VALUE = (
    r'(?:(?P<hours>[0-9]+) ?h(?:ours?)?,? (?P<minutes>[0-9]+) ?m(?:in)?\b'
    r'(?:,? (?P<rest>[0-9]+) ?s\b)?'
    r'|(?P<only>[0-9]+) ?m(?:in)?,? ?(?P<seconds>[0-9]+(?:\.[0-9]+)?) ?s\b'
    rf'|(?P<number>{DIGITS}|{WORDS})'
    rf'(?:(?P<glued>{GLUED})|[ ](?P<spaced>{SPACED})|[A-Za-z]+/[A-Za-z]+)?{ENDS})')
QUANTITY = re.compile(VALUE)
PLAIN = re.compile(r'[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?'
                   rf'|{WORDS}')


def number_of(text):
    """Return a text of DIGITS or WORDS as an int or a float."""
    text = text.replace(',', '').replace('_', '')
    is_whole = text.lstrip('+-').isdecimal() and len(text) < 300      # floats reach up to 1e308
    return int(text) if is_whole else float(text)


def plain_number(text):
    """Return a word as a number, or None if it is none; 007 and 1,000 are words."""
    return number_of(text) if PLAIN.fullmatch(text) else None


def reading_of(match):
    """Return the Reading of a match of VALUE."""
    if match['number'] is None:
        hours, minutes = int(match['hours'] or 0), int(match['minutes'] or match['only'])
        seconds = number_of(match['rest'] or match['seconds'] or '0')
        return Reading(hours * 3600 + minutes * 60 + seconds, 's')
    text = match['number']
    return Reading(number_of(text), match['glued'] or match['spaced'] or '',
                   text if PLAIN.fullmatch(text) and len(text) <= 8 else '')


def is_number(value):
    return isinstance(value, (int, float))


def is_finite(value):
    """Tell whether a value of a file is a finite float, or an int that fits into 64 bits."""
    return (isinstance(value, int) and abs(value) < 2**63
            or isinstance(value, float) and math.isfinite(value))


def short_number(value):
    """Return a number with at most six significant digits, for people; small integers whole."""
    if isinstance(value, int) and abs(value) < 10**9:
        return str(value)
    return f'{value:.6g}'


def exact_number(value):
    """Return a number as Python and spreadsheets read it: 0.1, 1e-05, nan."""
    return repr(value)


def cell_of(value, text='', unit=''):
    """Return the Cell of a value."""
    if value is None:
        return EMPTY
    return Cell(value, text or (short_number(value) if is_number(value) else str(value)), unit)


def unified(readings):
    """Return Cells for the Readings of one metric, converted to one unit.

    Numbers that all have the same unit stay as they are; 91% and 0.9 become 0.91 and 0.9.
    """
    units = {reading.unit for reading in readings if is_number(reading.value)}
    families = {FAMILY[unit] for unit in units}
    if len(units) < 2 or len(families) > 1:
        return [cell_of(reading.value, reading.text, reading.unit) for reading in readings]
    family = families.pop()
    scale = FAMILIES[family]
    return [cell_of(reading.value * scale[reading.unit]
                    if is_number(reading.value) and reading.unit else reading.value,
                    '' if reading.unit else reading.text, family) for reading in readings]


# ---- Reading: the facts of each job, from the journals ----

RESULTS, BOOKKEEPING = 'job_results', '.ssh_scheduler'
# Files that this program writes beside results.  No other file with such a name is a result.
WRITTEN = ('.csv', '.html', '.json', '.md', '.tex')
NEVER_BEGAN = ('refused', 'held', 'absent')     # how an attempt was lost that never ran
UNSTARTED = 'unstarted'         # the state of a job that was cancelled before it started
STARTED = 'started'             # the state of a job that may still run: no client knows
MOST_SETS = 50                  # sets of files to compare at most
PARTIAL = '.partial'            # suffix of a folder that has the files of a running job so far
STATES = ('finished', 'failed', 'running', STARTED, 'ended', 'lost', 'cancelled', 'earlier', '')
STREAM = re.compile(r'(.+)\.(?:out|err)', re.DOTALL)
NUMBERED = re.compile(r'(.+)\.[0-9]+', re.DOTALL)       # for old journals without `batch`


def find_places(words):
    """Return the Places that the words of the command line name."""
    asked = {}                          # real path -> [folder as written, {names} or None for all]
    for word in words:
        folder, name = find_place(word)
        entry = asked.setdefault(os.path.realpath(folder), [folder, {}])
        if name is None:
            entry[1] = None
        elif entry[1] is not None:
            entry[1][name] = True
    return [Place(folder, None if names is None else tuple(names))
            for folder, names in asked.values()]


def find_place(word):
    """Return (the folder job_results, the name of a result in it or None for all).

    The word may also be a folder that has a job_results, or the file of a batch.
    """
    path = word.rstrip('/') or word
    folder, name = os.path.split(path)
    folder = folder or '.'
    inner = RESULTS if path == '.' else os.path.join(path, RESULTS)
    may_be_partial = name.endswith(PARTIAL) and has_journals(folder)
    if is_results_folder(path) and not may_be_partial:
        return (inner if has_journals(inner) and not has_journals(path) else path), None
    if has_journals(folder) or os.path.exists(f'{path}.out') or (
            STREAM.fullmatch(name) and os.path.lexists(path)):
        return folder, name
    if is_results_folder(inner):
        return inner, None
    found = find_in_project(path)
    if found:
        return found
    if not os.path.lexists(path):
        advice = ('Start in the folder of the batch, or name one: results_table FOLDER'
                  if path == RESULTS else '')
        raise TableError(f'{printable(word)} does not exist{proposed_for(path)}. {advice}'.rstrip())
    raise TableError(f'{printable(word)} has no results of jobs. Name a folder job_results, or '
                     'results in one.')


def find_in_project(path):
    """Return (job_results, name) if that folder has such a batch or job; else None.

    The path is that of a batch file, or a name without its folder.  Look into the job_results of
    the current folder, and into the one beside the file.
    """
    folder, name = os.path.split(path)
    for results, one in ((RESULTS, name_of_batch(path)), (os.path.join(folder, RESULTS), name)):
        if one and is_results_folder(results) and named_by(one, *read_catalogue(results)[:2]):
            return results, one
    return None


def proposed_for(path):
    """Return ' (did you mean X?)' with the batch or job that the user may have meant, or ''."""
    if not is_results_folder(RESULTS):
        return ''
    known, batches, _ = read_catalogue(RESULTS)
    return alike(path, [RESULTS, *filter(None, batches), *known])


def name_of_batch(path):
    """Return the name that execute_batch gives to a batch: example_grid.sh for example/grid.sh."""
    parts = [part for part in os.path.normpath(path).split('/') if part not in ('', '..')]
    return re.sub(r'[^A-Za-z0-9._+=@%-]', '_', '_'.join(parts)).lstrip('.-')[-150:]


def has_journals(folder):
    """Tell whether batches wrote journals into a folder.

    The workdir of a machine may have the same name, ~/.ssh_scheduler, but has no journals.
    """
    return any(os.path.exists(os.path.join(folder, BOOKKEEPING, name))
               for name in ('journal', 'commands'))


def is_results_folder(path):
    """Tell whether a path is a folder of results: one with a journal, or at least with streams."""
    return has_journals(path) or bool(
        os.path.isdir(path) and not os.path.exists(f'{path}.out')
        and glob.glob(os.path.join(glob.escape(path), '*.out')))


def read_all(places, report):
    """Return the Jobs of all Places; raise NoSuchResults if no job has any of the results."""
    jobs, missing = [], []
    for place in places:
        try:
            jobs += read_jobs(place, report)
        except NoSuchResults as error:
            missing.append(error)
    if missing and len(missing) == len(places):
        raise missing[0]
    for error in missing:
        report(str(error))
    return jobs


def read_catalogue(folder):
    """Return ({name: facts} of all jobs, {batch: [names]}, the names in the folder)."""
    known, present = read_facts(folder), set(os.listdir(folder))
    streams = {match[1] for match in map(STREAM.fullmatch, present.difference(known)) if match}
    present.update(streams)
    for name in streams.difference(known):
        known[name] = {}
    batches = collections.defaultdict(list)
    for name, facts in known.items():
        batches[batch_of(name, facts)].append(name)
    return known, batches, present


def named_by(name, known, batches):
    """Return the names of the jobs that a job's name, a stream, a batch or a pattern names."""
    match = STREAM.fullmatch(name)
    stem = name if name in known or not match else match[1]
    if stem in known:
        return [stem]
    return batches.get(name) or fnmatch.filter(known, name)


def read_jobs(place, report):
    """Return the Jobs of a Place in the order of their names, without deleted results.

    Raise NoSuchResults if the folder has jobs and none of the named ones.
    """
    known, batches, present = read_catalogue(place.folder)
    names = known if place.names is None else choose_names(place, known, batches, report)
    stands = stand_ins(known, present)
    chosen = sorted({*names, *(stands[name] for name in names if name in stands)}, key=naturally)
    stood_for = {stand: name for name, stand in stands.items()}
    unstarted = [name for name in chosen if known[name].get('state') == UNSTARTED]
    told = [name for name in unstarted if name not in stands]
    if told:
        report(f'left out, since cancelled before the start: {printable(some_of(told))}')
    jobs = [job_from(name, known[name], place.folder)._replace(stands_for=stood_for.get(name, ''))
            for name in chosen if name not in unstarted]
    return [job for job in with_equal_files(jobs, place.folder)
            if job.state not in ('finished', 'failed', 'earlier', '') or job.name in present]


def stand_ins(known, present):
    """Return {NAME: NAME~N} of the jobs whose newest attempt has no results, but earlier ones have:
    the newest of these.  That attempt was cancelled or lost, or waits for its start.
    """
    found = {}
    for name in sorted((name for name in known if '~' in name), key=naturally):
        job, facts = name.rpartition('~')[0], known[name]
        is_result = facts.get('state') == 'earlier' and not facts.get('reproduces')
        if is_result and name in present and (
                job not in known or known[job].get('state') in (UNSTARTED, 'lost', 'cancelled')):
            found[job] = name
    return found


def choose_names(place, known, batches, report):
    """Return {name} of the jobs that the user named in a Place; report names of no job."""
    names, strange, written = {}, [], []
    for name in place.names:
        if name not in known and is_partial(place.folder, name, known):
            continue
        path = os.path.join(place.folder, name)
        if found := named_by(name, known, batches):
            names.update(dict.fromkeys(found))
        else:
            is_written = name.endswith(WRITTEN) and os.path.isfile(path)
            (written if is_written else strange).append(name)
    if not names:
        strange += written          # the user typed job_results/*, and wants no row for them
    if not strange:
        return names
    paths = [printable(os.path.join(place.folder, name)) for name in strange]
    if not names and known:
        is_near = batch_of(strange[0], {}) in batches      # the batch is right, the number is not
        proposal = '' if is_near else alike(strange[0], [*filter(None, batches), *known])
        raise NoSuchResults(f'no job has such results: {some_of(paths)}{proposal}. '
                            f'{printable(place.folder)} has {inventory(batches)}.')
    report(f'left out, since no job has such results: {names_of(paths)}')
    return names


def inventory(batches):
    """Return '7 jobs of grid.sh (grid.sh.2 to grid.sh.8)' of {batch: [names of its jobs]}."""
    parts = []
    for batch, names in sorted(batches.items(), key=lambda item: (not item[0], item)):
        first, *_, last = sorted([*names, *names], key=naturally)
        span = first if first == last else f'{first} to {last}'
        parts.append(f'{many(len(names), "job")} of {batch} ({span})' if batch else
                     f'{many(len(names), "job")} of execute_remote ({span})')
    return printable(some_of(parts))


def with_equal_files(jobs, folder):
    """Return the Jobs with one digest for files that differ only in the batch file.

    Users add lines to a batch file, which changes nothing for the jobs of other lines.
    """
    pairs = list(dict.fromkeys((job.files, job.batch) for job in jobs if job.files))
    if not 1 < len(pairs) <= MOST_SETS:
        return jobs
    first, found = {}, {}
    for digest, batch in pairs:
        found[digest, batch] = first.setdefault(what_they_had(folder, digest, batch), digest)
    return [job._replace(files=found.get((job.files, job.batch), '')) for job in jobs]


def what_they_had(folder, digest, batch):
    """Return a value that is equal for equal sets of sent files; ignore the batch file."""
    return frozenset(files_of(folder, digest, {batch}).items()) or digest


def files_of(folder, digest, batches):
    """Return {path: text of its mode, size and content} of a digest's files; {} if unknown.

    batches: the names of the batches whose batch files are left out
    """
    path = os.path.join(folder, BOOKKEEPING, 'sent', digest, 'files.json')
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        with open(path, encoding='utf-8') as file:
            files = json.load(file)
        return {name: json.dumps((mode, size, content or changed))
                for name, (mode, size, changed, content) in files.items()
                if re.sub(r'[^A-Za-z0-9._+=@%-]', '_', name).lstrip('.-')[-150:] not in batches}
    return {}


def only_added(jobs):
    """Return (paths that some of the Jobs did not have, how many Jobs); None if files differ.

    Such a path is often a table or a log that somebody wrote beside the code.
    """
    batches = {job.batch for job in jobs}
    sets = collections.Counter((job.folder, job.files) for job in jobs if job.files)
    if len(sets) > MOST_SETS:
        return None
    known = {one: files_of(*one, batches) for one in sets}
    ordered = sorted(known.values(), key=len)
    if not ordered[0] or any(not few.items() <= more.items()
                             for few, more in zip(ordered, ordered[1:])):
        return None
    return (sorted(ordered[-1].keys() - ordered[0].keys()),
            sum(count for one, count in sets.items() if len(known[one]) < len(ordered[-1])))


def is_partial(folder, name, known):
    """Tell whether a folder of this name has the files of a running job so far."""
    job = name[:-len(PARTIAL)]
    return name.endswith(PARTIAL) and (job in known or os.path.lexists(
        os.path.join(folder, BOOKKEEPING, 'partial', 'names', job)))


def journals_in(folder):
    """Return the paths of the journals in a job_results: one of batches, others of commands."""
    inner = os.path.join(folder, BOOKKEEPING)
    return [os.path.join(inner, 'journal'),
            *sorted(glob.glob(os.path.join(glob.escape(inner), 'commands', '*', 'journal')))]


def read_facts(folder):
    """Return {name of a job: its facts} of all journals in a job_results, with `is_left`."""
    known = read_journals(folder)
    left = left_jobs(known)
    # A client may have fetched results since the first look, and have ended before the look for it.
    again = read_journals(folder) if left else known
    for name in left:
        if again.get(name) == known[name]:
            state = again[name]['state']
            again[name].update(is_left=True, state=STARTED if state == 'running' else state)
    return again


def left_jobs(known):
    """Return the names of the jobs without results that surely no client fetches."""
    left, unwatched = [], functools.lru_cache(None)(is_unwatched)
    for name, facts in known.items():
        if facts.get('state') in ('running', 'ended') and unwatched(
                os.path.dirname(facts['journal']), batch_of(name, facts)):
            left.append(name)
    return left


def is_unwatched(inner, batch):
    """Tell whether surely no client runs a batch, or the command to which a folder belongs.

    Do not try the lock: a client that starts at this moment would take that for another client.
    Its lines name the process that had it last, the computer, and the batch.  If that is another
    computer, only an exit status behind these lines tells that the process has ended.
    """
    try:
        with open(os.path.join(inner, 'lock'), 'rb') as lock:
            text, info = lock.read(10**5).decode('utf-8', 'replace'), os.fstat(lock.fileno())
    except OSError:
        return False
    match = re.match(r'process ([0-9]+) on (.*)\n(.*)', text)
    if not match:
        return False
    if '\nexit status ' in text or batch and match[3] not in ('', batch):
        return True
    return match[2] == os.uname().nodename and not has_open(match[1], info)


def has_open(pid, info):
    """Tell whether a process lives and has the file open whose os.stat is `info`.

    If that cannot be seen, as without /proc or of another user, it is enough that it lives.
    """
    fds = f'/proc/{pid}/fd'
    try:
        if not os.path.isdir('/proc/self/fd'):
            os.kill(int(pid), 0)
            return True
        for number in os.listdir(fds):
            with contextlib.suppress(FileNotFoundError):        # it has just closed that
                if os.path.samestat(os.stat(f'{fds}/{number}'), info):
                    return True
        return False
    except (FileNotFoundError, ProcessLookupError):
        return False
    except (OSError, OverflowError):
        return True


def read_journals(folder):
    """Return {name of a job: its facts} of all journals in a job_results."""
    known = {}
    for path in journals_in(folder):
        with contextlib.suppress(FileNotFoundError):
            try:
                read_journal(path, known)
            except FileNotFoundError:
                raise
            except OSError as error:
                raise TableError(f'{printable(path)} cannot be read: {reason_of(error)}.') from None
    return known


def read_journal(path, known):
    """Add the facts of a journal's jobs to {name: facts}.  Raises OSError."""
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b'\n'):        # a client is still writing it
                break
            if not line.strip():
                continue
            try:
                apply({**json.loads(line), 'journal': path}, known)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise TableError(f'{printable(path)}, line {number} cannot be read. Look at that '
                                 'line; the results of all other jobs can be read once it is '
                                 'repaired.') from None


def apply(event, known):
    """Update {name: facts} with an event of the journal; ignore unknown events."""
    word = event['event']
    if word == 'claimed':
        known[event['job']] = {**event, 'state': 'running'}
    elif word == 'renamed':
        known[event['to']] = {**known.pop(event['job']), 'state': 'earlier'}
    elif word == 'unwanted':
        for name in event['jobs']:
            known.setdefault(name, {'state': UNSTARTED})
    elif word == 'wanted':
        for name in event['jobs']:
            if known.get(name, {}).get('state') == UNSTARTED:
                del known[name]
    elif word == 'running':             # the job has left the queue of a cluster
        known[event['job']]['time'] = event.get('time')
    elif word == 'ended':
        known[event['job']].update(event, state='ended', time=known[event['job']].get('time'))
    elif word == 'lost' and event.get('how') in NEVER_BEGAN:
        known.pop(event['job'], None)
    elif word == 'cancelled' and event['job'] not in known:
        pass                            # it never began, since it was told to stop before
    elif word in ('collected', 'lost', 'cancelled'):
        facts = known[event['job']]
        facts['state'] = word if word != 'collected' else (
            'failed' if facts.get('exit_code') else 'finished')


def batch_of(name, facts):
    """Return the name of a job's batch; '' if it has none."""
    match = NUMBERED.fullmatch(name)
    return str((facts['batch'] if 'batch' in facts else match and match[1]) or '')


def job_from(name, facts, folder):
    """Return a Job made of the facts of a journal."""
    machine = str(facts.get('where') or facts.get('machine') or '')
    short = re.sub(r'\.yaml$', '', os.path.basename(machine)) or machine
    has_ended = facts.get('state') in ('ended', 'finished', 'failed', 'earlier')

    def text(key):
        return '' if facts.get(key) is None else str(facts[key])

    def number(key, is_known=True):
        return facts[key] if is_known and is_finite(facts.get(key)) else None

    return Job(
        name, folder, facts.get('state', ''), batch_of(name, facts), text('command'), short,
        ','.join(re.findall('[0-9]+', text('gpus'))), text('files'),
        number('exit_code', has_ended), number('time'), number('wall_s', has_ended),
        number('peak_memory_mb', has_ended), number('peak_gpu_memory_mb', has_ended),
        number('attempt') or 1, text('own'), text('reproduces'), facts.get('is_left') is True)


# ---- Lines: which jobs are of lines that their batch file still has ----

def find_gone(jobs):
    """Return (gone, troubles): what the batch files of the Jobs tell.

    gone: {(folder, name): path of the batch file, which no longer has the line of this job}
    troubles: [that no job of a batch is left out, and why]
    """
    batches, gone, troubles = collections.defaultdict(list), {}, []
    for job in jobs:
        if job.batch and job.command:
            batches[job.folder, job.batch].append(job)
    for (folder, batch), members in batches.items():
        try:
            path, lines = read_batch(folder, batch)
        except TableError as error:
            troubles.append(f'leaves out no job of {printable(batch)}: {error}')
            continue
        # Earlier results, and a job that reproduces another, belong to the job that they stem from.
        stems = {stem_of(job): job for job in sorted(members, key=is_derived, reverse=True)}
        kept = jobs_of_lines(stems, batch, lines)
        gone.update(((folder, job.name), path) for job in members if stem_of(job) not in kept)
    return gone, troubles


def is_derived(job):
    """Tell whether there is, or was, another job whose results are those of the line."""
    return bool(job.copy_of) or job.state == 'earlier' and not job.stands_for


def stem_of(job):
    """Return the name of the job whose earlier results these are, or which they reproduce."""
    name = job.copy_of or job.stands_for or job.name
    return re.sub('~[0-9]+$', '', name) if job.state == 'earlier' else name


def jobs_of_lines(jobs, batch, lines):
    """Return the names of the jobs that stand for lines of a batch file.

    jobs: {name: Job}; lines: [(number, line)]

    Compare commands, as execute_batch does, for numbers of lines change.  Of more jobs than lines
    with a command, take those with the newest options, then those with the numbers of the lines.
    """
    commands = {f'{batch}.{number}': commands_in(line) for number, line in lines}
    same, kept = collections.defaultdict(list), set()
    for name, job in jobs.items():
        same[job.command].append(name)
    for command, names in same.items():
        newest = max((jobs[name] for name in names), key=lambda job: job.began or 0).own
        names.sort(key=lambda name: (jobs[name].own != newest,
                                     command not in commands.get(name, ()), naturally(name)))
    for found in commands.values():
        names = next((same[command] for command in found if same.get(command)), [])
        kept.update(names[:1])
        del names[:1]
    return kept


def commands_in(line):
    """Return the commands that a line of a batch file may mean: the line itself, or the last words
    of an execute_remote command, whose options are not parsed here."""
    if not re.match(r'\s*execute_remote(\s|$)', line):
        return [line]
    found = []
    for text in (line, line.replace('\\\n', '')):
        with contextlib.suppress(ValueError):
            words = shlex.split(text)
            found += [' '.join(words[at:]) for at in range(len(words) - 1, 0, -1)]
    return found


def read_batch(folder, batch):
    """Return (path, [(number of the first line, line)]) of the file of a batch.

    folder: the job_results, beside which the file lies.  Raise TableError if it cannot be read.
    """
    project = os.path.normpath(os.path.join(folder, os.pardir))
    absolute = name_of_batch(os.path.abspath(project))
    names = [batch, *[batch[len(absolute) + 1:]] * batch.startswith(f'{absolute}_')]
    path = next(filter(None, (file_called(project, name) for name in names)), None)
    if path is None:
        where = 'this folder' if project == os.curdir else printable(project)
        raise TableError(f'its batch file was not found in {where}')
    path = os.path.normpath(path)
    try:
        with open(path, 'rb') as file:
            text = file.read().decode().removeprefix('\ufeff')
    except OSError as error:
        raise TableError(f'{printable(path)} cannot be read: {reason_of(error)}') from None
    except UnicodeDecodeError:
        raise TableError(f'{printable(path)} is not UTF-8 text') from None
    return path, [*split_batch(text)]


def file_called(folder, name):
    """Return the path of the file below a folder that gives its batch this name, or None: of
    example/grid.sh for example_grid.sh."""
    entries = []
    if os.path.isfile(os.path.join(folder, name)):
        return os.path.join(folder, name)
    with contextlib.suppress(OSError):
        entries = [(name_of_batch(entry), os.path.join(folder, entry))
                   for entry in sorted(os.listdir(folder))]
    for start, path in entries:
        if start == name and os.path.isfile(path):
            return path
    for start, path in entries:
        found = file_called(path, name[len(start) + 1:]) if (
            start and name.startswith(f'{start}_') and os.path.isdir(path)) else None
        if found:
            return found
    return None


def split_batch(text):
    """Yield (number of the first line, command) of each command of a batch file: lines that begin
    with # are none, and a backslash at the end of a line continues it."""
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


# ---- Parameters: the words in which commands differ ----

TOKEN = re.compile(r"""(?sx)
    (?: [^\s'"\\;&|<>()$`]+ | \\. | '[^']*' | "(?:[^"\\]|\\.)*" | \$\([^()]*\) | `[^`]*`
      | ['"\\$`] )+
    | [;&|<>()]+""")
OPERATOR = re.compile('[;&|<>()]+')
SETTING = re.compile(r'(?s)[-+~]*([A-Za-z_][\w./@-]*)=(.*)')    # --lr=0.1, lr=0.1, +model.lr=0.1
FLAG = re.compile(r'--?[A-Za-z][^=\s]*')
GLUED_FLAG = re.compile(r'-([A-Za-z])(-?[0-9.]+(?:[eE][-+]?[0-9]+)?)')      # -n5
KEYWORDS = frozenset('if then elif else fi for select while until do done case esac { } !'.split())


class Word(NamedTuple):
    """A word of a command, or a flag with its value."""
    name: object                # of the parameter; a number for a word without a name
    value: str
    typed: str


def tokens_of(command):
    """Return the words of a command, as typed, and its operators."""
    command = command.replace('\\\n', ' ')
    return TOKEN.findall(command)


def unquoted(word):
    """Return a word without its quotes."""
    if not re.search('[\'"\\\\]', word):
        return word
    try:
        parts = shlex.split(word)
    except ValueError:
        return word
    return parts[0] if len(parts) == 1 else word


def find_switches(commands):
    """Return the flags that take no value, as far as the commands (lists of tokens) show it.

    Such a flag stands somewhere before another flag, an operator or the end, or two commands
    differ only in this flag.  All other flags take the next word.
    """
    switches, doubtful = set(), set()
    for tokens in commands:
        for token, following in itertools.zip_longest(tokens, tokens[1:], fillvalue=''):
            if FLAG.fullmatch(token):
                has_value = following and not FLAG.match(following) and (
                    not OPERATOR.match(following))
                (doubtful if has_value else switches).add(token)
    whole = set(map(tuple, commands))
    for tokens in commands:
        for flag in doubtful.difference(switches).intersection(tokens):
            at = tokens.index(flag)
            if (*tokens[:at], *tokens[at + 1:]) in whole:
                switches.add(flag)
    return switches


def words_of(tokens, switches):
    """Return the Words of a command; switches: the flags that take no value."""
    words, used, rest = [], collections.Counter(), iter(tokens)
    bare = itertools.count()

    def add(name, value, typed):
        used[name] += 1
        words.append(Word(name if used[name] == 1 else f'{name}-{used[name]}', value, typed))

    for token in rest:
        setting, glued = SETTING.fullmatch(token), GLUED_FLAG.fullmatch(token)
        if setting or glued:
            match = setting or glued
            add(match[1], unquoted(match[2]), token)
        elif not FLAG.fullmatch(token):
            words.append(Word(next(bare), unquoted(token), token))
        elif token in switches:
            add(token.lstrip('-'), 'yes', token)
        else:
            value = next(rest)
            add(token.lstrip('-'), unquoted(value), f'{token} {value}')
    return words


def shape_of(words):
    """Return the operators and keywords of a command's Words without a name, and '' for each other
    one; () if there are none: the syntax of the shell, by which commands can be compared.

    A keyword is one only where a command begins.
    """
    shape, begins = [], True
    for word in words:
        if isinstance(word.name, int):
            is_syntax = OPERATOR.fullmatch(word.typed) or begins and word.typed in KEYWORDS
            shape.append(word.typed if is_syntax else '')
            begins = bool(is_syntax) and not re.search('[<>]', word.typed)
    return tuple(shape) if any(shape) else ()


def find_parameters(commands, batches):
    """Return (names, [{name: text} of each command], {batch: the words that all its commands
    share, with … between; None if the commands have different shapes}).

    batches: the batch of each command.  names: of the words that differ, in their order.
    Compare words with a name across all commands, but words without a name only between commands
    of one shape in a batch: programs that differ between batches are no parameters.
    """
    tokens = [tokens_of(command) for command in commands]
    switches = find_switches(tokens)
    split = [words_of(one, switches) for one in tokens]
    names, parameters = {}, [{} for _ in commands]
    differing = differing_names([words for words in split if words])
    differing = {name for name in differing if not isinstance(name, int)}
    groups, shared = collections.defaultdict(list), dict.fromkeys(batches, '')
    for number, batch in enumerate(batches):
        if split[number]:
            groups[batch, shape_of(split[number])].append(number)
    shapes = collections.Counter(batch for batch, _ in groups)
    for (batch, _), numbers in groups.items():
        members = [split[number] for number in numbers]
        bare = sorted(name for name in differing_names(members) if isinstance(name, int))
        called = {name: f'arg{number}' for number, name in enumerate(bare, 1)}
        called.update(dict.fromkeys(differing))
        for number in numbers:
            for word in split[number]:
                if word.name in called:
                    parameters[number][called[word.name] or word.name] = word.value
            names.update(dict.fromkeys(parameters[number]))
        shared[batch] = shared_words(members, called) if shapes[batch] == 1 else None
    return list(names), parameters, shared


def differing_names(split):
    """Return the names of the Words in which commands differ, or that some commands lack."""
    values = collections.defaultdict(collections.Counter)
    for words in split:
        for word in words:
            values[word.name][word.value] += 1
    return {name for name, counts in values.items() if [*counts.values()] != [len(split)]}


def shared_words(split, differing):
    """Return the words that all these commands share, with … for the others."""
    pieces = []
    for word in split[0] if split else ():
        piece = '…' if word.name in differing else word.typed
        if piece != '…' or pieces[-1:] != ['…']:
            pieces.append(piece)
    there = {word.name for words in split for word in words}
    if '…' not in pieces and there.intersection(differing):
        pieces.append('…')
    return printable(' '.join(pieces)) if pieces != ['…'] else ''


# ---- Metrics: numbers with names, in files and at the ends of streams ----

NEAR_BYTES, FAR_BYTES = 2**16, 2**18    # of the end of a stream, to search for metrics
STEP_BYTES = 2**20                      # of a stream, to search at a time for a --metric
LONGEST_LINE = 400                      # characters of a line to search for `name number`

ESCAPE = re.compile(                    # the sequences that colour text or move the cursor
    r'\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])')
NOT_NAMES = re.compile(r'^(?:DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL) +| +(?:is|was)$')
NAME_WORD = r'[^\W\d][\w./@%-]*'
NAME_BEFORE = re.compile(rf'((?:{NAME_WORD} ){{0,4}}{NAME_WORD}(?: ?\([\w @./%-]+\))?)'
                         r'''["']?[ \t]*\Z''')
LAST_WORD = re.compile(rf'(?<![\w?&])({NAME_WORD})' r'''["']?[ \t]*\Z''')
# cuda:0 and host:8080 are no metrics, so a colon without a space needs a fraction behind it.
FRACTION = rf'[-+]?[0-9]*\.[0-9]|[-+]?[0-9]+(?:[eE]|%)|{WORDS}\b'
SEPARATED = re.compile(rf'(?:=[ \t]*|:[ \t]+|:(?={FRACTION}))'
                       rf'(?:(?:tensor|np\.\w+)\()?{VALUE}')
# What may stand between pairs of a name and a number.
BETWEEN = re.compile(r'(?:[\s,;|:()\[\]{}│┃*>#]| - )*')
PAIR = re.compile(rf'''(?P<name>{NAME_WORD}(?: {NAME_WORD}){{0,2}})["']?[\s:=|│┃]+{VALUE}''')
NUMBERS = re.compile(rb'[0-9](?<![A-Za-z_0-9][0-9])[0-9.]*')    # without the 1 of top1


@contextlib.contextmanager
def opened(path, since=-math.inf):
    """Open a file and yield (descriptor, size); (None, 0) if it is no file or not readable.

    since: do not read a file that has not changed since this time, in seconds since 1970
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)         # it may be a fifo
    except OSError:
        yield None, 0
        return
    try:
        info = os.fstat(fd)
        is_file = stat.S_ISREG(info.st_mode) and info.st_mtime >= since
        yield (fd, info.st_size) if is_file else (None, 0)
    finally:
        os.close(fd)


def read_end(path, size, since=-math.inf):
    """Return (the last `size` bytes of a file, whether these are all); None if it is unreadable."""
    with opened(path, since) as (fd, whole):
        with contextlib.suppress(OSError):
            size = min(size, whole)             # pread allocates memory for the whole size
            if fd is not None:
                return os.pread(fd, size, whole - size), whole == size
    return None


def lines_of(data, is_whole=True):
    """Return the lines of an output, as bytes; each state of a progress bar is a line, too.

    is_whole: whether the first line has its beginning
    """
    lines = data.replace(b'\r', b'\n').split(b'\n')
    return lines if is_whole or len(lines) < 2 else lines[1:]


def decoded(data):
    """Return the bytes as text, without escape sequences; accept any bytes."""
    text = codecs.decode(data, 'utf-8', 'replace').replace('\b', '')
    return ESCAPE.sub('', text) if '\x1b' in text else text


def stream_metrics(path, since=-math.inf):
    """Return {name: Reading} of the last numbers with names in a stream."""
    for size in (NEAR_BYTES, FAR_BYTES):
        end = read_end(path, size, since)
        found = metrics_in(*end) if end else {}
        if found or not end or end[1]:
            return found
    return {}


def metrics_in(data, is_whole=True):
    """Return {name: Reading} of the last numbers with names in an output.

    Of lines that differ only in their numbers, read the last one: all have the same names.
    """
    lines = lines_of(data, is_whole)
    shapes = NUMBERS.sub(b'0', b'\n'.join(lines)).split(b'\n')
    found = {}
    last = {shape: number for number, shape in enumerate(shapes) if may_have_number(shape)}
    for number in sorted(last.values()):
        for name, reading in metrics_of_line(decoded(lines[number])):
            found.pop(name, None)       # names are in the order of their last lines
            found[name] = reading
    return found


def may_have_number(shape):
    """Tell whether a line may have a number, nan or inf; in its shape each number is 0."""
    lower = shape.lower()
    return b'0' in lower or b'nan' in lower or b'inf' in lower


def only_pairs(line):
    """Return [(name, Reading)] of each `name number` if a line has nothing else; else []."""
    pairs, at = [], BETWEEN.match(line).end()
    while at < len(line):
        match = PAIR.match(line, at)
        if not match:
            return []
        pairs.append((NOT_NAMES.sub('', match['name']), reading_of(match)))
        at = BETWEEN.match(line, match.end()).end()
    # `GPU 0` alone is no metric, but `loss 0.31` is one.
    is_telling = len(pairs) > 1 or pairs and isinstance(pairs[0][1].value, float)
    return pairs if is_telling else []


def metrics_of_line(line):
    """Return [(name, Reading)] of each number with a name in a line."""
    line = line.strip()
    if line.startswith('{') and line.endswith('}'):
        with contextlib.suppress(ValueError, RecursionError):
            return [(name, reading) for name, reading in flat(decode_json(line))
                    if is_number(reading.value)]
    pairs = only_pairs(line) if len(line) <= LONGEST_LINE else []
    if pairs:
        return pairs
    for match in SEPARATED.finditer(line):
        before = line[max(match.start() - 80, 0):match.start()]
        name = (LAST_WORD if match[0][0] == '=' else NAME_BEFORE).search(before)
        if name:
            pairs.append((NOT_NAMES.sub('', name[1]), reading_of(match)))
    return pairs


def decode_json(text):
    """Return the value of a JSON text, which may have NaN and Infinity.  Raises ValueError."""
    return json.loads(text, parse_int=number_of)


def flat(value, prefix=''):
    """Yield (name, Reading) of the numbers, texts and truth values in an object; join inner names
    with dots, and skip lists."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        name = f'{prefix}{name}'
        if isinstance(inner, dict):
            yield from flat(inner, f'{name}.')
        elif isinstance(inner, bool):
            yield name, Reading('yes' if inner else 'no')
        elif is_number(inner):
            yield name, Reading(inner)
        elif isinstance(inner, str) and inner:
            number = plain_number(inner)
            yield name, Reading(inner if number is None else number)


def matched_metric(job, pattern, since):
    """Return the Reading of the last match of a pattern in stdout, else in stderr; or None."""
    for end in ('.out', '.err'):
        match = last_match(job.path(end), pattern, since)
        if match:
            text = next(filter(None, match.groups()), '') if pattern.groups else match[0]
            quantity = QUANTITY.search(text.strip())
            plain = quantity and quantity.start() == 0
            return reading_of(quantity) if plain else Reading(printable(text.strip()))
    return None


def last_match(path, pattern, since):
    """Search a file backward from its end; return the last match of a pattern, or None."""
    with opened(path, since) as (fd, start), contextlib.suppress(OSError):
        begun = b''                     # the rest of a line that begins before `start`
        while fd is not None and start:
            step = min(STEP_BYTES, start)
            start -= step
            data = os.pread(fd, step, start).replace(b'\r', b'\n') + begun
            begun, _, data = data.partition(b'\n') if start else (b'', b'', data)
            for match in reversed([*pattern.finditer(decoded(data))]):
                return match
    return None


def files_matching(folder, pattern):
    """Return the paths below a folder that a pattern matches.

    Unlike glob's, ** follows no links to folders: such links may lead in circles.
    """
    paths = {folder}
    *parts, last = pattern.split('/')
    for part in [*parts, *(['**', '*'] if last == '**' else [last])]:
        if part == '**':
            paths = {below for path in paths for below in folders_below(path)}
        else:
            paths = {found for path in paths
                     for found in glob.glob(os.path.join(glob.escape(path), part))}
    return paths


def folders_below(folder):
    """Yield a folder and all folders below it whose names do not begin with a dot."""
    for path, names, _ in os.walk(folder):
        names[:] = [name for name in names if not name.startswith('.')]
        yield path


def file_metrics(job, patterns, report):
    """Return {name: Reading} of metrics.json or results.json, and of files that match patterns."""
    found = {}
    for name in ('metrics.json', 'results.json'):
        if not found:
            found = json_metrics(os.path.join(job.path(), name), report)
    for pattern in patterns:
        added = {}
        for path in sorted(files_matching(job.path(), pattern), key=naturally):
            if path.endswith(('.json', '.jsonl')):
                added.update(json_metrics(path, report))
            else:
                added.update(csv_metrics(path))
        found = {**added, **found}
    return found


def json_metrics(path, report):
    """Return {name: Reading} of a JSON file; if it is a list, of its last object."""
    end = read_end(path, 2**31)
    if not end:
        return {}
    text = decoded(end[0]).lstrip('\ufeff')
    if path.endswith('.jsonl'):
        return json_lines_metrics(path, text, report)
    try:
        value = decode_json(text)
    except (ValueError, RecursionError):
        report(f'{printable(path)} is not JSON; its metrics are left out.')
        return {}
    if isinstance(value, list):
        value = value[-1] if value else {}
    return dict(flat(value))


def json_lines_metrics(path, text, report):
    """Return {name: Reading} of the last value of each name in a text with an object a line."""
    found = {}
    for line in re.findall('[^\\n]+\\n?', text):
        if line.strip():
            try:
                found.update(flat(decode_json(line)))
            except (ValueError, RecursionError):
                if line.endswith('\n'):         # else a job is still writing it
                    report(f'{printable(path)} has lines that are not JSON; they are left out.')
    return found


def csv_metrics(path):
    """Return {name: Reading} of the last value of each column of a CSV file with a head."""
    end = read_end(path, FAR_BYTES)
    if not end:
        return {}
    data, is_whole = end
    head = decoded(data if is_whole else first_bytes(path)).lstrip('\ufeff').split('\n')[0]
    mark = max(',;\t', key=head.count)
    lines = decoded(b'\n'.join(lines_of(data, is_whole))).split('\n')[int(is_whole):]
    found = {}
    with contextlib.suppress(csv.Error):        # for example a text that is too long for csv
        names = next(csv.reader([head.strip('\r')], delimiter=mark), [])
        for row in csv.reader(lines, delimiter=mark):
            for name, text in zip(names, row) if len(row) == len(names) else ():
                if name.strip() and text.strip():
                    found[name.strip()] = text.strip()
    return {name: Reading(text if plain_number(text) is None else plain_number(text))
            for name, text in found.items()}


def first_bytes(path):
    """Return the beginning of a file; b'' if it cannot be read."""
    try:
        with open(path, 'rb') as file:
            return file.read(NEAR_BYTES)
    except OSError:
        return b''


def printed_since(job):
    """Return the time from which on the streams are those of the newest attempt, else -inf.

    Until a job that runs again prints something, its streams may be those of an earlier attempt.
    """
    runs = job.state in ('running', STARTED)
    return job.began or 0 if runs and job.attempt > 1 else -math.inf


def printed_metrics(jobs, filed, named):
    """Return ([{name: Reading} of each job's stdout], [names that were left out]).

    filed: [{name: Reading} of the files of each job]; named: the names that the user asks for

    If jobs of a batch have files with metrics, its jobs that failed or still run probably lack
    theirs, and what they print may be noise.  Then such a job has only metrics that other jobs of
    the batch have.  Of a job that ended well without a file, take all; of a job with a file, only
    what the user asks for.
    """
    outputs = [{} if metrics and named <= metrics.keys() else
               stream_metrics(job.path('.out'), printed_since(job))
               for job, metrics in zip(jobs, filed)]
    batches = [(job.folder, job.batch) for job in jobs]
    with_files = {batch for batch, metrics in zip(batches, filed) if metrics}
    known, left_out, printed = collections.defaultdict(set), set(), []
    for job, batch, metrics, said in zip(jobs, batches, filed, outputs):
        known[batch].update(metrics or (said if job.ended_well() else ()))
    for batch, metrics, said in zip(batches, filed, outputs):
        if metrics:
            said = {name: said[name] for name in said if name in named and name not in metrics}
        elif batch in with_files:
            kept = known[batch] | named
            left_out |= said.keys() - kept
            said = {name: said[name] for name in said if name in kept}
        printed.append(said)
    return printed, sorted(left_out, key=naturally)


def find_metrics(jobs, wishes, named, report):
    """Return (names, [{name: Cell} of each job]).

    named: the names that the user asks for, which printed_metrics leaves out of no job
    """
    filed = [file_metrics(job, wishes.files, report) for job in jobs]
    printed, left_out = printed_metrics(jobs, filed, named)
    found = []
    for job, metrics, said in zip(jobs, filed, printed):
        asked = {name: matched_metric(job, pattern, printed_since(job))
                 for name, pattern in wishes.metrics}
        found.append({**{name: one for name, one in asked.items() if one},
                      **{name: one for name, one in (*metrics.items(), *said.items())
                         if name not in asked}})
    if not wishes.columns:
        report_left_out(left_out, report)
    report_unmet(jobs, wishes, found, report)
    names = dict.fromkeys(name for name, _ in wishes.metrics)
    # Use the order of a job that finished: a job that failed has only some of the names.
    for _, metrics in sorted(zip(jobs, found), key=lambda pair: pair[0].state != 'finished'):
        names.update(dict.fromkeys(metrics))
    rows = [{} for _ in jobs]
    for name in names:
        having = [number for number, metrics in enumerate(found) if name in metrics]
        for number, cell in zip(having, unified([found[number][name] for number in having])):
            rows[number][name] = cell
    return list(names), rows


def report_left_out(names, report):
    """Report the names of metrics that printed_metrics left out, and how to see them."""
    if names:
        them = 'it' if len(names) == 1 else 'them'
        typed = shlex.quote(','.join(['job', *names[:3]]))
        report(f'left out: {printable(some_of(names))}, since only outputs of jobs that failed or '
               f'still run have {them}. To see {them}: --columns={printable(typed)}')


def report_unmet(jobs, wishes, found, report):
    """Report each --metric and --from of which no job has anything.  found: [{name: Reading}]"""
    for name, _ in wishes.metrics:
        if not any(name in metrics for metrics in found):
            report(f'--metric {printable(name)}: no output of {many(len(jobs), "job")} has a match')
    for pattern in wishes.files:
        if any(files_matching(job.path(), pattern) for job in jobs):
            continue
        below = f'**/{pattern}'
        is_below = any(files_matching(job.path(), below) for job in jobs)
        advice = f"Try: --from '{printable(below)}'" if is_below else (
            f'A path begins in the folder of the job: {printable(jobs[0].path(""))}/')
        report(f'--from {printable(pattern)}: none of {many(len(jobs), "job")} has such a file. '
               f'{advice}')


# ---- Columns: from jobs to a table ----

JOB, FOLDER, BATCH, JOBS, EXIT = (
    Column(key, key, FACT) for key in ('job', 'folder', 'batch', 'jobs', 'exit'))
STATE = Column('state', 'state', FACT, PROGRAMS)
TIME, MEMORY = Column('time_s', 'time', FACT), Column('memory_mb', 'MB', FACT)
GPU_MEMORY = Column('gpu_memory_mb', 'GPU MB', FACT)
WHERE = Column('machine', 'where', FACT)
GPUS, COMMAND = (Column(key, key, FACT, PROGRAMS) for key in ('gpus', 'command'))
FILES = Column('files', 'files', FACT)
WHOLE = COMMAND._replace(readers=BOTH)          # if commands of a batch have different shapes
LEADING = (FOLDER, BATCH, JOB)
TRAILING = (EXIT, STATE, TIME, MEMORY, GPU_MEMORY, WHERE, GPUS, FILES, COMMAND)
OFTEN_EMPTY = (FOLDER, BATCH, MEMORY, GPU_MEMORY, FILES)       # leave these out if they are empty
RESERVED = {name for column in (*LEADING, JOBS, *TRAILING) for name in column[:2]}
DIGEST = 8                          # characters of a digest to show


def make_table(jobs, wishes, report, now):
    """Return the Table with a row for each Job.  now: seconds since 1970."""
    parameters, values, shared = find_parameters(
        [job.command for job in jobs], [job.batch for job in jobs])
    metrics, cells = find_metrics(
        jobs, wishes, named_metrics(wishes, parameters), report)
    values = [{name: parameter_cell(text) for name, text in row.items()} for row in values]
    has_numbers = bool(metrics)
    metrics = [name for name in metrics if not is_echo(name, values, cells)]
    columns, taken = [], set(RESERVED)
    renamed = {PARAMETER: {}, METRIC: {}}
    for kind, names in ((PARAMETER, parameters), (METRIC, metrics)):
        for name in names:
            others = (f'{kind} {name}{number}' for number in itertools.chain(
                [''], itertools.count(2)))
            key = next(free for free in itertools.chain([name], others) if free not in taken)
            taken.add(key)
            renamed[kind][name] = key
            columns.append(Column(key, key, kind))
    facts = facts_of(jobs, now)
    rows = [{**{renamed[PARAMETER][name]: cell for name, cell in given.items()},
             **{renamed[METRIC][name]: cell for name, cell in found.items()
                if name in renamed[METRIC]}, **fact}
            for given, found, fact in zip(values, cells, facts)]
    kept = {column for column in (*LEADING, *TRAILING) if column not in OFTEN_EMPTY
            or any(column.key in fact for fact in facts)}
    trailing = [column for column in TRAILING if column in kept]
    if None in shared.values():
        trailing[-1] = WHOLE
    return Table((*(column for column in LEADING if column in kept), *columns, *trailing),
                 rows, shared, tuple(jobs), has_numbers)


def named_metrics(wishes, parameters):
    """Return the names in --columns, --where and --sort that may be those of metrics."""
    names = {*wishes.columns, *(name for name, *_ in (*wishes.tests, *wishes.sort))}
    return {name.removeprefix('metric ') for name in names.difference(RESERVED, parameters)}


def parameter_cell(text):
    """Return the Cell of a word of a command; people see the word as typed."""
    number = plain_number(text)
    return Cell(text if number is None else number, text)


def is_echo(name, values, cells):
    """Tell whether a metric only repeats the parameter of its name in all jobs that have it."""
    pairs = [(given.get(name, EMPTY).value, found[name].value)
             for given, found in zip(values, cells) if name in found]
    return bool(pairs) and all(one == other for one, other in pairs)


def facts_of(jobs, now):
    """Return [{column's key: Cell}] with the facts of each Job."""
    has_batches = len({job.batch for job in jobs}) > 1
    has_folders = len({job.folder for job in jobs}) > 1
    has_files = len({job.files for job in jobs if job.files}) > 1
    facts = []
    for job in jobs:
        is_numbered = job.batch and job.name.startswith(f'{job.batch}.')
        short = job.name[len(job.batch):] if is_numbered else job.name
        numbers = f' GPU{"s" * ("," in job.gpus)} {job.gpus}' if job.gpus else ''
        found = {
            JOB: Cell(job.name, short), EXIT: exit_cell(job), STATE: cell_of(job.state or None),
            TIME: time_cell(job, now),
            FOLDER: cell_of(job.folder if has_folders else None),
            BATCH: cell_of(job.batch or None if has_batches else None),
            MEMORY: cell_of(job.memory_mb), GPU_MEMORY: cell_of(job.gpu_memory_mb),
            WHERE: Cell(job.machine, job.machine + numbers) if job.machine else EMPTY,
            GPUS: cell_of(job.gpus or None), COMMAND: cell_of(job.command or None),
            FILES: cell_of(job.files[:DIGEST] or None if has_files else None)}
        facts.append({column.key: cell for column, cell in found.items() if cell != EMPTY})
    return facts


def time_cell(job, now):
    """Return the Cell of a job's time; of a job that may still run, only when it started."""
    if job.state == STARTED and job.began:
        return Cell(None, f'{duration_of(now - job.began)} ago')
    time_s = now - job.began if job.state == 'running' and job.began else job.wall_s
    return EMPTY if time_s is None else Cell(round(time_s, 3), duration_of(time_s))


def exit_cell(job):
    """Return the Cell of an exit status; if there is none, its text is the state of the job."""
    if job.exit_code is not None:
        return Cell(job.exit_code, str(job.exit_code))
    return Cell(None, '…' if job.state == 'running' else job.state)


def find_column(table, name):
    """Return the Column that has this name for programs or people."""
    for column in table.columns:
        if name in (column.key, column.head):
            return column
    heads = [column.head for column in columns_for(table, PEOPLE)]
    known = {*heads, *(column.key for column in table.columns)}
    parts, advice = name.split(), alike(name, known)
    if len(parts) > 1 and known.issuperset(parts):
        advice = f' (join names by commas: {printable(",".join(parts))})'
    raise UsageError(f'there is no column {printable(name)}{advice}. '
                     f'Columns: {", ".join(map(printable, heads[:40]))}{", …" * (len(heads) > 40)}')


def columns_for(table, readers):
    """Return the columns that PROGRAMS or PEOPLE see."""
    return [column for column in table.columns if column.readers in (BOTH, RARE, readers)]


def with_rare_columns(table):
    """Return the Table of jobs with its RARE columns marked: parameters that no job has.

    In a table of several batches these are also the parameters that less than a tenth of the jobs
    have, or only commands of execute_remote.
    """
    batches = [job.batch for job in table.jobs]
    has_several = len(set(batches)) > 1

    def is_rare(column):
        having = [batch for row, batch in zip(table.rows, batches) if column.key in row]
        return column.kind == PARAMETER and (not having or has_several and (
            10 * len(having) < len(batches) or not any(having)))

    return table._replace(columns=tuple(
        column._replace(readers=RARE) if is_rare(column) else column for column in table.columns))


# ---- Means: rows that differ in some parameters only, as one ----

def averaged(table, names, takes_all, report):
    """Return the Table with means over the parameters `names`: a row for each group of Jobs.

    takes_all: whether to include jobs that failed or still run
    """
    over = [find_column(table, name) for name in names]
    for column in over:
        if column.kind != PARAMETER:
            raise UsageError(f'--mean-over takes a parameter, in which commands differ; '
                             f'{printable(column.head)} is not one.')
    kept = [column for column in table.columns if column not in over and (
        column.kind == PARAMETER or column in (FOLDER, BATCH))]
    groups, left_out = collections.defaultdict(list), collections.Counter()
    for row, job in zip(table.rows, table.jobs):
        if takes_all or job.ended_well():
            groups[tuple(identity(row.get(column.key, EMPTY)) for column in kept)].append(row)
        else:
            left_out[job.state] += 1
    others = [printable(column.head) for at, column in enumerate(kept)
              if column.kind == PARAMETER and len({group[at] for group in groups}) > 1]
    if others and all(len(members) == 1 for members in groups.values()):
        report(f'each mean is of one job, since all jobs differ in {names_of(others)}, too. For '
               f'means over these: --mean-over={",".join([*names, *others])}')
    if left_out:
        words = names_of([f'{count} {word}' for word, count in left_out.items()])
        report(f'left out of the means: {words} (--unfinished takes them)')
    metrics = [column for column in (*table.columns,)
               if column.kind == METRIC or column in (TIME, MEMORY, GPU_MEMORY)]
    rows = [{**{column.key: members[0][column.key] for column in kept
                if column.key in members[0]}, JOBS.key: cell_of(len(members)),
             **means_of(members, metrics)} for members in groups.values()]
    shown = []
    for column in metrics:
        shown += [column._replace(key=key, head=head, readers=readers)
                  for key, head, readers in ((column.key, column.head, BOTH),
                                             *((key, key, PROGRAMS) for key in spread_keys(column)))
                  if any(key in row for row in rows)]
    return table._replace(columns=(*kept, JOBS, *shown), rows=rows)


def identity(cell):
    """Return a key that is the same for equal values: for 0.1 and 1e-1, and for nan and nan."""
    value = cell.value
    if isinstance(value, float) and value.is_integer():
        value = int(value)              # turning ints into floats would cost large ones digits
    return repr(value) if is_number(value) else value


def spread_keys(column):
    """Return the names of the columns with the deviation and the count of a metric."""
    return f'{column.key} std', f'{column.key} count'


def means_of(rows, metrics):
    """Return {key: Cell} with mean and deviation of each metric, and its count if rows lack it.

    For memory return the maximum instead, which the next jobs have to request.
    """
    found = {}
    for column in metrics:
        values = [row[column.key].value for row in rows if column.key in row]
        values = [float(value) for value in values if is_number(value)]
        if not values:
            continue
        if column in (MEMORY, GPU_MEMORY):
            found[column.key] = cell_of(round(max(values)))
            continue
        mean, deviation = mean_and_deviation(values)
        std, count = spread_keys(column)
        text = duration_of(mean) if column == TIME else mean_text(mean, deviation)
        found[column.key] = Cell(
            mean, text if len(values) == len(rows) else f'{text} (of {len(values)})')
        if column.kind == METRIC:
            if deviation is not None:
                found[std] = cell_of(deviation)
            if len(values) < len(rows):
                found[count] = cell_of(len(values))
    return found


def mean_and_deviation(values):
    """Return (mean, sample standard deviation) of floats; the deviation of one value is None."""
    count = len(values)
    mean = sum(value / count for value in values)       # the plain sum may exceed a float
    if count < 2:
        return values[0], None
    with contextlib.suppress(OverflowError, ValueError):
        return mean, math.sqrt(math.fsum((value - mean) * (value - mean) for value in values)
                               / (count - 1))
    return mean, math.nan


def mean_text(mean, deviation):
    """Return a mean for people, rounded to two digits of its deviation."""
    if not deviation:
        return short_number(mean)
    if not math.isfinite(deviation) or not 1e-4 <= abs(mean) < 1e6:
        return f'{mean:.4g} ± {deviation:.2g}'
    digits = min(max(1 - math.floor(math.log10(deviation)), 0),
                 max(5 - math.floor(math.log10(abs(mean))), 0))
    return f'{mean:.{digits}f} ± {deviation:.{digits}f}'


# ---- Choosing: which rows and columns, and in which order ----

TEST = re.compile(r'(?s)\s*(.+?)\s*(<=|>=|==|!=|<|>|=)\s*(.*?)\s*')
JOINED = re.compile(r'(?i)\s+(and|or|&&?|\|\|?)\s+|\s*[,;]\s*')
MISSPELT = {'=>': '>=', '=<': '<=', '<>': '!=', '=!': '!='}
JOB_NUMBER = re.compile(r'\.?([0-9]+(?:[~-].*)?)')      # 3 and .3 for grid.sh.3, 3~1, 3-again
NOT_ENDED = ('…', STARTED, 'ended', 'lost', 'cancelled')    # texts of exit_cell without a status
TESTS = {'<': operator.lt, '<=': operator.le, '>': operator.gt, '>=': operator.ge}


def filtered(table, tests):
    """Return the Table with the rows for which all tests (column, sign, operand) hold."""
    for name, sign, operand in tests:
        column = find_column(table, name)
        cells = [row.get(column.key, EMPTY) for row in table.rows]
        check_test(column._replace(head=name), sign, operand, cells)
    tests = [(find_column(table, name), sign, operand) for name, sign, operand in tests]
    kept = [(row, job) for row, job in zip(table.rows, table.jobs) if all(
        holds(row.get(column.key, EMPTY), sign, in_batch(operand, column, job))
        for column, sign, operand in tests)]
    return table._replace(rows=[row for row, _ in kept], jobs=tuple(job for _, job in kept))


def in_batch(operand, column, job):
    """Return the operand of a test; if it is the number of a job, the name in this Job's batch."""
    match = JOB_NUMBER.fullmatch(operand) if column.key == JOB.key and job.batch else None
    return f'{job.batch}.{match[1]}' if match else operand


def check_test(column, sign, operand, cells):
    """Raise UsageError if a test can hold for no value of its column, whatever rows there are.

    A text that a Cell has is right in any case.  The head of the column is its name as typed.
    """
    if not operand or any(operand in (cell.text, str(cell.value)) for cell in cells):
        return
    name = printable(column.head)
    check_joined(column, sign, operand)
    if sign == '!=' or column.key == JOB.key and JOB_NUMBER.fullmatch(operand):
        return                          # != holds for all values of another kind
    typed = f'--where {printable(column.head + sign + operand)}'
    if right := MISSPELT.get(sign + operand[:1]):
        raise UsageError(f"{typed}: the operator is {right}. Type: "
                         f"--where '{name}{right}{printable(operand[1:].strip())}'")
    is_exit = column.key == EXIT.key
    numbers = [cell for cell in cells if is_number(cell.value)]
    has_texts = any(isinstance(cell.value, str) for cell in cells)
    is_plain = plain_number(operand) is not None
    quantity = None if is_plain else QUANTITY.fullmatch(operand)
    if not is_plain and not quantity:
        is_state = is_exit and sign not in TESTS and operand in NOT_ENDED
        is_numeric = numbers or is_exit or column.key in (
            TIME.key, MEMORY.key, GPU_MEMORY.key)
        if is_numeric and not has_texts and not is_state:
            advice = ' For the states of jobs: --where state=failed' * is_exit
            raise UsageError(f'{typed}: {printable(operand)} is not a number, and {name} has only '
                             f'numbers.{advice}')
    elif sign in TESTS and has_texts and not numbers:
        raise UsageError(f'{typed}: {name} has no numbers, so none is above or below '
                         f'{printable(operand)}.')
    elif quantity and numbers and all(
            in_unit(reading_of(quantity), cell.unit) is None for cell in numbers):
        raise UsageError(f'{typed}: {name} is in {numbers[0].unit}, so give '
                         f'{printable(operand)} in that unit.')


def check_joined(column, sign, operand):
    """Raise UsageError if an operand goes on with another test: 'lr>0.1 and loss<0.5'."""
    joints = JOINED.finditer(operand) if column.key != COMMAND.key else ()
    for joint in joints:
        rest = operand[joint.end():]
        if TEST.fullmatch(rest):
            first = printable(column.head + sign + operand[:joint.start()])
            if (joint[1] or '').lower() in ('or', '|', '||'):
                raise UsageError(f"--where has no {joint[1]}. Make a table for each test: "
                                 f"--where '{first}', then --where '{printable(rest)}'")
            raise UsageError('--where takes one test. Give it again for each: '
                             f"--where '{first}' --where '{printable(rest)}'")


def in_unit(reading, unit):
    """Return the number of a Reading in the unit of a Cell, or None if it cannot be converted.

    A Cell without a unit has seconds, MB or a plain number.
    """
    family = FAMILY[reading.unit]
    if unit and FAMILY[unit] != family:
        return None
    scale = FAMILIES[family]
    return reading.value if reading.unit == unit else (
        reading.value * scale[reading.unit] / scale.get(unit, 1))


def holds(cell, sign, operand):
    """Tell whether a test holds for a Cell; only != holds for an empty one."""
    number = plain_number(operand)
    quantity = QUANTITY.fullmatch(operand) if number is None else None
    if quantity:
        number = in_unit(reading_of(quantity), cell.unit)
    both = is_number(cell.value) and number is not None
    if sign in ('=', '!='):
        is_equal = operand in (cell.text, str(cell.value)) or both and cell.value == number
        return is_equal == (sign == '=')
    if both:
        return TESTS[sign](cell.value, number)
    is_text = isinstance(cell.value, str) and number is None
    return is_text and TESTS[sign](naturally(cell.value), naturally(operand))


def is_missing(cell):
    """Tell whether a Cell has no place in an order: it is empty or nan."""
    return cell.value is None or is_number(cell.value) and math.isnan(cell.value)


def order_of(cell):
    """Return a key that sorts numbers before texts."""
    return (0, cell.value, []) if is_number(cell.value) else (1, 0, naturally(cell.value))


def in_order(table, sort):
    """Return the Table sorted by (column, is descending), with empty cells and nan last."""
    order = range(len(table.rows))
    for name, is_descending in reversed(sort):
        key = find_column(table, name).key
        cells = [(number, table.rows[number].get(key, EMPTY)) for number in order]
        present = sorted(((order_of(cell), number) for number, cell in cells
                          if not is_missing(cell)),
                         key=operator.itemgetter(0), reverse=is_descending)
        order = [*(number for _, number in present),
                 *(number for number, cell in cells if is_missing(cell))]
    jobs = table.jobs if JOBS in table.columns else tuple(table.jobs[number] for number in order)
    return table._replace(rows=[table.rows[number] for number in order], jobs=jobs)


def with_columns(table, names):
    """Return the Table with these columns only."""
    return table._replace(columns=tuple(
        find_column(table, name)._replace(readers=BOTH) for name in names))


# ---- Forms: the table as text for programs and papers ----

FORMULA = tuple('=+-@\t\r\n＝＋－＠')      # a spreadsheet may compute a cell that begins with these

LATEX = {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
         '…': r'\dots{}', '±': r'$\pm$', '<': r'\textless{}', '>': r'\textgreater{}',
         '|': r'\textbar{}', '"': "''", **{c: f'\\{c}' for c in '&%$#_{}'}}


def as_dictionaries(table):
    """Return the rows as dictionaries with all columns; an empty cell is None."""
    keys = [column.key for column in columns_for(table, PROGRAMS)]
    return [{key: row.get(key, EMPTY).value for key in keys} for row in table.rows]


def as_csv(table):
    """Return the table as CSV."""
    columns = columns_for(table, PROGRAMS)
    rows = [[harmless(column.key) for column in columns], *(
        [csv_text(row.get(column.key, EMPTY), column) for column in columns]
        for row in table.rows)]
    # An empty line would not be a row.
    return ''.join((','.join(map(quoted, row)) or '""') + '\n' for row in rows)


def quoted(text):
    """Return a text in quotes if CSV needs them; Python's csv forgets them for \\r."""
    return '"{}"'.format(text.replace('"', '""')) if re.search('[",\r\n]', text) else text


def csv_text(cell, column):
    """Return the text of a cell for CSV: a parameter as typed, other numbers with all digits."""
    if is_number(cell.value):
        return cell.text if column.kind == PARAMETER else exact_number(cell.value)
    return '' if cell.value is None else harmless(cell.value)


def harmless(text):
    """Return a text that a spreadsheet shows instead of computing it."""
    return f"'{text}" if text.startswith(FORMULA) else text


def as_json(table):
    """Return the table as JSON objects, one a line."""
    def valid(value):
        is_strange = isinstance(value, float) and not math.isfinite(value)
        return exact_number(value) if is_strange else value

    return ''.join(json.dumps({key: valid(value) for key, value in row.items()}) + '\n'
                   for row in as_dictionaries(table))


def is_numeric(table, column):
    """Tell whether a column has numbers and no texts; people see it aligned to the right."""
    cells = [row[column.key] for row in table.rows if column.key in row]
    return bool(cells) and all(is_number(cell.value) or cell.value is None for cell in cells)


def cells_for_people(table, columns):
    """Return the texts of the rows."""
    return [[printable(row.get(column.key, EMPTY).text) for column in columns]
            for row in table.rows]


def as_markdown(table):
    """Return the table in Markdown, below the words that all commands share."""
    columns = columns_for(table, PEOPLE)
    rows = [[printable(column.head) for column in columns], None,
            *cells_for_people(table, columns)]
    rows = [row and [re.sub(r'([\\|`*_~&<\[])', r'\\\1', cell) for cell in row] for row in rows]
    widths = [max(3, *(width_of(row[at]) for row in rows if row)) for at in range(len(columns))]
    rows[1] = ['-' * (width - 1) + (':' if is_numeric(table, column) else '-')
               for column, width in zip(columns, widths)]
    lines = ['| ' + ' | '.join(cell + ' ' * (width - width_of(cell))
                               for cell, width in zip(row, widths)) + ' |' for row in rows]
    return '\n'.join([*(f'    {shared}\n' for shared in table.shared), *lines, ''])


def as_latex(table):
    """Return the table as a tabular for LaTeX, with the rules of booktabs."""
    def line(cells):
        text = ' & '.join(''.join(LATEX.get(c, c) for c in cell) for cell in cells) + r' \\'
        # After \\ and \midrule these characters would begin an argument.
        return f'{{}}{text}' if text.lstrip().startswith(('[', '*')) else text

    columns = columns_for(table, PEOPLE)
    kinds = ''.join('r' if is_numeric(table, column) else 'l' for column in columns)
    return '\n'.join([
        r'% needs \usepackage{booktabs}', *(f'% {shared}' for shared in table.shared),
        rf'\begin{{tabular}}{{{kinds}}}', r'\toprule',
        line(printable(column.head) for column in columns), r'\midrule',
        *map(line, cells_for_people(table, columns)), r'\bottomrule', r'\end{tabular}', ''])


def check_output(option, path):
    """Raise UsageError if the path is a folder, or lies where only results of jobs may be.

    A table or a page may lie in job_results itself, which is never sent to machines.
    """
    given = f'{option} {printable(path)}'
    if os.path.isdir(path):
        raise UsageError(f'{given}: this is a folder. Name a file.')
    place, name = os.path.split(os.path.realpath(path))
    folder = place
    while folder != os.path.dirname(folder):
        if has_journals(folder):
            is_beside = folder == place and name.endswith(WRITTEN)
            if is_beside and name not in read_journals(folder):
                return
            raise UsageError(f'{given}: results_table does not write where results of jobs may '
                             'be. Name another file, such as job_results/'
                             f'{"report.html" if option == "--html" else "table.csv"}.')
        folder = os.path.dirname(folder)


def write_file(path, text):
    """Write a file, which appears only when it is complete.  Raises OSError."""
    path = os.path.realpath(path)
    data = text.encode('utf-8', 'backslashreplace')
    if os.path.exists(path) and not os.path.isfile(path):       # a fifo, or /dev/stdout
        with open(path, 'wb') as file:
            file.write(data)
        return
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'wb') as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


# ---- Screen: the table for a terminal ----

SHORTEST = 12                       # hide a column before cells get narrower than this
HIDDEN_FIRST = (WHOLE, MEMORY, FILES, GPU_MEMORY, FOLDER, WHERE, TIME)     # if not all columns fit
COUNTER = re.compile('(?i)(epoch|step|iter(ation)?|batch)s?')


def cut(text, width):
    """Return the text in at most `width` columns, with … for the rest."""
    if width_of(text) <= width:
        return text
    kept, room = [], width - 1
    for character in text:
        room -= width_of(character)
        if room < 0:
            break
        kept.append(character)
    return ''.join(kept) + '…'


def hiding_order(table, columns):
    """Return the columns that may be hidden, in the order in which to hide them.

    First all metrics but three, then facts, two more metrics, and all parameters but the first.
    Metrics that count, or have only one value, come before the other metrics.
    """
    def is_dull(column):
        values = {identity(row[column.key]) for row in table.rows if column.key in row}
        return len(values) < 2 or bool(COUNTER.fullmatch(column.key))

    ranked = sorted((column for column in columns if column.kind == METRIC), key=is_dull)
    facts = [column for column in HIDDEN_FIRST if column in columns]
    parameters = [column for column in columns if column.kind == PARAMETER]
    return [*reversed(ranked[3:]), *facts, *reversed(ranked[1:3]), *reversed(parameters[1:])]


def fitted(table, width):
    """Return (columns, their widths) that fit the width; with None all columns, uncut."""
    columns = [column for column in columns_for(table, PEOPLE)
               if width is None or column.readers != RARE]
    wide = {column: max(map(width_of, [printable(column.head), *(
        printable(row.get(column.key, EMPTY).text) for row in table.rows)])) for column in columns}
    hiding = iter(hiding_order(table, columns))
    while width is not None:
        room = width - 2 * (len(columns) - 1)
        most = max((cap for cap in range(1, width + 1)
                    if sum(min(cap, wide[column]) for column in columns) <= room), default=1)
        hidden = next(hiding, None) if most < min(SHORTEST, max(
            wide[column] for column in columns)) else None
        if hidden is None:
            return columns, [min(most, wide[column]) for column in columns]
        columns.remove(hidden)
    return columns, [wide[column] for column in columns]


def as_screen(table, width, style):
    """Return the lines for a terminal, the table and its notes.

    width: the columns of the terminal; None: unlimited.  style(text, code): returns the text in
    bold (1) or in red (31)
    """
    columns, widths = fitted(table, width)
    lines = [line if width is None else cut(line, width) for line in table.shared]
    rows = [[printable(column.head) for column in columns], *cells_for_people(table, columns)]
    failed = [False, *(bool(row.get(EXIT.key, EMPTY).value) for row in table.rows)]
    for number, row in enumerate(rows):
        cells = [cut(cell, wide) for cell, wide in zip(row, widths)]
        padded = [cell + ' ' * (wide - width_of(cell)) for cell, wide in zip(cells, widths)]
        padded[-1] = cells[-1]
        if failed[number] and EXIT in columns:
            at = columns.index(EXIT)
            padded[at] = padded[at].replace(cells[at], style(cells[at], 31), 1)
        line = '  '.join(padded).rstrip()
        lines.append(line if number else style(line, 1))
    hidden = [printable(column.head) for column in columns_for(table, PEOPLE)
              if column not in columns]
    if hidden:
        more = f'{many(len(hidden), "more column")} with --wide: {", ".join(hidden)}'
        lines.append(cut(more, width))
    return [*lines, counts_of(table)]


def counts_of(table):
    """Return the last line: the number of jobs, and of those in each state."""
    states = collections.Counter(job.state for job in table.jobs)
    counts = [f'{states[state]:,} {state}' for state in STATES if state and states[state]]
    jobs = many(len(table.jobs), 'job')
    are_means = any(JOBS.key in row for row in table.rows)     # --columns may leave out the column
    groups = f'{many(len(table.rows), "row")} of ' if are_means else ''
    return f'{groups}{jobs}{": " if counts else ""}{", ".join(counts)}'


# ---- Report: what the page shows, as data for its script ----

PAGE_BYTES = 95 * 10**5             # of a page at most, whatever jobs wrote
TAILS_BYTES = 3 * 2**20             # of the ends of all streams together
TAIL_BYTES = 2**13                  # of the end of one stream
COMMANDS_BYTES = 4 * 10**6          # of all commands together, without their common prefix
CURVE_JOBS = 1000                   # jobs of which a page has curves
CURVES_BYTES = 48 * 2**20           # to read of the streams of all jobs together, for curves
CURVE_BYTES = 2**20                 # to read of one stream, for curves
PIECE_BYTES = 2**16                 # of each piece to read of a longer stream
CURVE_POINTS = 100_000              # of all curves together
CURVE_NAMES = 12                    # curves of one job
SAMPLES = 60_000                    # of the use of machines, all together
LAST_LINE = 160                     # characters of a job's last line
PATHS = 200                         # changed files to list

COUNTED = re.compile(r'(?i)\b(epoch|step|iteration|iter|batch)s?[ :=#(\[]{1,3}([0-9]{1,15})\b')
PLAIN_NAME = re.compile(r'[\w.~-]+', re.ASCII)      # a URL needs no escapes for it
USED = ('peak_memory_mb', 'peak_gpu_memory_mb')
ASKED = ('memory_mb', 'gpu_memory_mb', 'cores', 'gpus')

# Patterns that show why a job failed, from its stderr or its exit code.
GPU_IS_FULL = re.compile('CUDA out of memory|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED'
                         '|RESOURCE_EXHAUSTED: Out of memory')
FRAMES = re.compile(r'Traceback \(most recent call last\):|  File ".*", line [0-9]')
NOISE = re.compile(r'[\W_]*|(During handling of|The above exception was) .*:|\++ .*'
                   r'|\s+at .*|\s+warnings\.warn\(.*|note: run with `RUST_BACKTRACE.*')
SIGNALS = {2: 'INT', 6: 'ABRT', 8: 'FPE', 9: 'KILL', 11: 'SEGV', 13: 'PIPE', 15: 'TERM'}


def is_time(value):
    """Tell whether a value is a plausible time in seconds since 1970 (before the year 5138)."""
    return is_finite(value) and 0 <= value < 10**11


class Story(NamedTuple):
    """The history that the journals of a folder tell.

    An attempt is a dictionary with the facts of the events claimed, ended and so on.
    """
    attempts: dict              # name of a job -> its attempts in the order of time
    before: dict                # name of a job -> the names of its earlier results
    begun: dict                 # batch -> the times at which a client started to run it
    facts: dict                 # machine -> its facts
    short: dict                 # machine -> its name for people
    seen: dict                  # machine -> its samples


def objects_in(path):
    """Yield the JSON objects of a file that has one a line; skip what cannot be read."""
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
                if isinstance(value, dict) and line.endswith(b'\n'):
                    yield value


def read_story(folder):
    """Return the Story of a job_results."""
    story = Story({}, {}, {}, {}, {}, {})
    inner = os.path.join(folder, BOOKKEEPING)
    for path in journals_in(folder):
        for event in objects_in(path):
            with contextlib.suppress(KeyError, TypeError):      # skip an event of another shape
                retell({**event, 'folder': folder}, story)
    for sample in objects_in(os.path.join(inner, 'seen')):
        if is_time(sample.get('time')) and isinstance(sample.get('machine'), str):
            story.seen.setdefault(sample['machine'], []).append(sample)
    return story


def retell(event, story):
    """Add an event of a journal to a Story."""
    word, name, time_s = event['event'], event.get('job'), event.get('time')
    if word == 'begun':
        story.begun.setdefault(event['batch'], []).append(time_s)
    elif word == 'machine':
        story.facts[event['machine']] = event['facts']
    elif word == 'claimed':
        attempts = story.attempts.setdefault(name, [])
        if attempts and attempts[-1]['state'] == 'running':
            attempts[-1].update(state='lost', until=time_s)
        attempts.append({**event, 'state': 'running'})
        story.short[str(event['machine'])] = job_from(name, event, '').machine
    elif word == 'renamed':
        story.attempts[event['to']] = story.attempts.pop(name)
        story.before.setdefault(name, []).append(event['to'])
    elif word == 'running':             # before, the job waited in the queue of a cluster
        story.attempts[name][-1]['time'] = time_s
    elif word == 'ended':
        last = story.attempts[name][-1]
        last.update(event, state='ended', until=time_s, time=last.get('time'))
    elif word == 'lost' and event.get('how') in NEVER_BEGAN:
        story.attempts[name].pop()
    elif word == 'cancelled' and not story.attempts.get(name):
        pass
    elif word in ('collected', 'lost', 'cancelled'):
        last = story.attempts[name][-1]
        last.setdefault('until', time_s)
        last['state'] = word if word != 'collected' else (
            'failed' if last.get('exit_code') else 'finished')


def span_of(one):
    """Return (start, end or None while it runs) of an attempt; None if the start is unknown."""
    began, wall_s, until = one.get('time'), one.get('wall_s'), one.get('until')
    if not is_time(began):
        return None
    if one['state'] == 'running':
        return began, None
    end = began + wall_s if is_finite(wall_s) else until
    return began, max(end, began) if is_time(end) else began


def waited_since(one, former, story):
    """Return the time at which a job began to wait for this attempt, or None.

    former: the job's previous attempt, or None
    """
    begun = [time_s for time_s in story.begun.get(one.get('batch'), ())
             if is_time(time_s) and time_s <= one['time']]
    freed = former and span_of(former)
    times = [*begun[-1:], *([freed[1]] if freed and freed[1] and freed[1] <= one['time'] else [])]
    return max(times, default=None)


def attempts_of(job, story, shown):
    """Return the attempts of a Job, and those of its earlier results without a row of their own.

    shown: (folder, name) of all jobs that have a row
    """
    base = job.stands_for or job.name
    names = [name for name in story.before.get(base, ()) if (job.folder, name) not in shown]
    own = [job.name, *[base] * (bool(job.stands_for) and (job.folder, base) not in shown)]
    attempts = [one for name in (*names, *own) for one in story.attempts.get(name, ())]
    if job.state == STARTED and attempts:
        # It may have ended meanwhile, so its bar reaches to its last output.
        attempts[-1].update(state=STARTED, until=last_output(job) or attempts[-1].get('time'))
    return attempts


def last_output(job):
    """Return when the streams of a Job grew last, in seconds since 1970, or None."""
    times = []
    for end in ('.out', '.err'):
        with contextlib.suppress(OSError):
            times.append(os.stat(job.path(end)).st_mtime)
    return max(times, default=None)


# -- Why jobs failed --

def text_of(data):
    """Return an output for people: of an overwritten line the last state, without escapes."""
    lines = decoded(data).replace('\r\n', '\n').split('\n')
    lines = [line.rstrip('\r').rpartition('\r')[2] for line in lines]
    return '\n'.join(line if line.isprintable() else '\t'.join(map(printable, line.split('\t')))
                     for line in lines)


def telling_line(lines):
    """Return the line of a stderr that best explains why a job failed; '' if there is none.

    It is the last line that is not noise, or the line of the exception of a Python traceback.
    """
    told, raised, in_frames = [], None, False
    for line in lines:
        if FRAMES.match(line):
            in_frames = True
        elif line.strip() and not (in_frames and line[0].isspace()):
            if in_frames:
                in_frames, raised = False, len(told)
            if not NOISE.fullmatch(line):
                told.append(line)
    if raised is not None and raised < len(told) <= raised + 9:     # a message may have more lines
        return told[raised].strip()
    return (told or [''])[-1].strip()


def reason_words(job, lines):
    """Return a text on why a Job failed.  lines: the last ones of its stderr."""
    told, code = telling_line(lines), job.exit_code
    if job.state == 'lost' or code is None or code < 0:
        return f'{job.machine or "its machine"} lost the job'
    if any(map(GPU_IS_FULL.search, lines)):
        return f'exit code {code}: GPU out of memory'
    if told.startswith('ssh-scheduler: the kernel killed'):
        return f'exit code {code}: {job.machine} ran out of memory'
    if 128 < code < 160 and not told.startswith('ssh-scheduler: '):
        name = SIGNALS.get(code - 128)
        return f'killed by signal {code - 128}{f" ({name})" if name else ""}'
    told = re.sub(r'^ssh-scheduler: |^\S*: line [0-9]+: ', '', told)
    return f'exit code {code}: {cut(told, LAST_LINE)}' if told else (
        f'exit code {code}, empty stderr')


# -- Ends of streams --

def stream_sizes(job):
    """Return the sizes of stdout and stderr in bytes; None for one that is no file."""
    sizes = []
    for end in ('.out', '.err'):
        try:
            info = os.stat(job.path(end))
            sizes.append(info.st_size if stat.S_ISREG(info.st_mode) else None)
        except OSError:
            sizes.append(None)
    return sizes


def level(sizes, room):
    """Return the most bytes to show of each stream, so that all streams fit into the room."""
    most = TAIL_BYTES
    while most > 1 and sum(min(size, most) for size in sizes) > room:
        most *= 0.9
    return int(most) if most > 1 else 0


def tail_limits(jobs, sizes, room):
    """Return the number of bytes to show of each Job's streams: more if the Job failed."""
    failed = [bool(job.exit_code) for job in jobs]
    limits, left = {}, room // 2
    for which in (True, False):
        of_these = [size or 0 for fails, pair in zip(failed, sizes) if fails == which
                    for size in pair]
        limits[which] = level(of_these, left)
        left = room - sum(min(size, limits[which]) for size in of_these)
    return [limits[fails] for fails in failed]


def tail_of(path, size):
    """Return the text of the last bytes of a stream, starting with a whole line."""
    data, is_whole = read_end(path, size) or (b'', True)
    if not is_whole:
        data = data.partition(b'\n')[2] or data
    return text_of(data).strip('\n')


def ends_of(job, sizes, limit):
    """Return (tail of stdout, tail of stderr, the last line, the reason of a failure or '')."""
    out, err = (tail_of(job.path(end), max(limit, 1024)) if size else ''
                for end, size in zip(('.out', '.err'), sizes))
    reason = reason_words(job, err.split('\n')) if job.state in ('failed', 'lost') or (
        job.exit_code) else ''
    last = next((line.strip() for text in (out, err) for line in reversed(text.split('\n'))
                 if line.strip()), '')
    # The reason needs at least 1024 bytes of stderr, but the page shows at most `limit` characters.
    return (*(text if len(text) <= limit else text[len(text) - limit:] for text in (out, err)),
            cut(last, LAST_LINE), reason)


# -- Curves --

def pieces_of(path, most):
    """Return (lines of a stream, the number of lines of the stream that each represents).

    Of a stream with more than `most` bytes read only pieces at equal distances.
    """
    with opened(path) as (fd, size), contextlib.suppress(OSError):
        if fd is None:
            return [], 1
        if size <= most:
            return lines_of(os.pread(fd, size, 0)), 1
        step = min(PIECE_BYTES, most)
        count = max(most // step, 1)
        lines = []
        for number in range(count):
            at = (size - step) * number // max(count - 1, 1)
            lines += lines_of(os.pread(fd, step, at), number == 0)[:-1]
        return lines, size / (count * step)
    return [], 1


def evenly(items, most):
    """Return at most `most` items at equal distances, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[number * (len(items) - 1) // max(most - 1, 1)] for number in range(most)]


def counted(line, ordinal):
    """Return (name, number) of the counter of a line: Epoch 3/50, step [3]; else ('', ordinal)."""
    match = COUNTED.search(line[:LONGEST_LINE])
    return (match[1].lower(), int(match[2])) if match else ('', ordinal)


def curves_in(lines, share, points):
    """Return {name: [[x], [y], name of x]} of numbers that have one name in several lines.

    x is the counter of the same line, such as an epoch, or the ordinal number of the value.
    share: the number of lines of the stream that each of these lines represents
    """
    shapes = NUMBERS.sub(b'0', b'\n'.join(lines)).split(b'\n')
    groups = collections.defaultdict(list)
    for number, shape in enumerate(shapes):
        if may_have_number(shape):
            groups[shape].append(number)
    chosen, ordinal = [], {}
    for numbers in groups.values():
        ordinal.update((number, round((place + 1) * share)) for place, number in enumerate(numbers))
        chosen += evenly(numbers, points)
    found = collections.defaultdict(list)
    for number in evenly(sorted(chosen), 4 * points):
        line = decoded(lines[number])
        pairs = metrics_of_line(line)
        counter = next(((name, reading.value) for name, reading in pairs
                        if COUNTER.fullmatch(name)), None) or counted(line, ordinal[number])
        for name, reading in pairs:
            if not COUNTER.fullmatch(name) and is_number(reading.value):
                found[name].append((counter[1], rounded(reading.value, 5), counter[0]))
    curves = {}
    for name, values in [*found.items()][:CURVE_NAMES]:
        counters = {counter for _, _, counter in values}
        values = evenly(values, points)
        if len(values) > 1:
            one = counters.pop() if len(counters) == 1 else ''
            xs = [x for x, _, _ in values]
            xs = xs if len(counters) == 0 else [*range(1, len(values) + 1)]
            curves[name] = [xs, [y for _, y, _ in values], one]
    return curves


def find_curves(jobs):
    """Return ({number of a job: its curves}, the number of jobs that were searched)."""
    numbers = evenly([number for number, job in enumerate(jobs) if job.state != 'lost'],
                     CURVE_JOBS)
    if not numbers:
        return {}, 0
    most = min(max(CURVES_BYTES // len(numbers), PIECE_BYTES // 2), CURVE_BYTES)
    points = min(max(CURVE_POINTS // len(numbers) // 3, 16), 200)
    found = {}
    for number in numbers:
        lines, share = pieces_of(jobs[number].path('.out'), most)
        curves = curves_in(lines, share, points) if len(lines) > 1 else {}
        if curves:
            found[number] = curves
    return found, len(numbers)


def rounded(value, digits):
    """Return a number with this number of digits, for a drawing; nan and inf as a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return exact_number(value)
    short = float(f'{value:.{digits}g}')
    return int(short) if abs(short) < 2**53 and short == int(short) else short


# -- Machines --

def samples_of(samples, most, origin):
    """Return the use of a machine over time, as at most `most` averages of neighbouring samples.

    The lists have equal lengths: shares of cores and memory, and of each GPU's time and memory;
    None is unknown.
    """
    samples = sorted(samples, key=lambda one: one['time'])
    size = -(-len(samples) // most)
    groups = [samples[at:at + size] for at in range(0, len(samples), size)]

    def mean(group, value):
        values = [found for found in map(value, group) if is_finite(found)]
        return round(sum(values) / len(values), 3) if values else None

    def share(part, whole):
        return lambda one: (one[part] / one[whole] if is_finite(one.get(part))
                            and is_finite(one.get(whole)) and one[whole] > 0 else None)

    def of_gpu(index, value):
        def find(one):
            for gpu in one['gpus'] if isinstance(one.get('gpus'), list) else ():
                if isinstance(gpu, list) and len(gpu) == 4 and gpu[0] == index:
                    return value(gpu) if all(map(is_finite, gpu[1:])) else None
            return None
        return find

    indexes = sorted({gpu[0] for one in samples if isinstance(one.get('gpus'), list)
                      for gpu in one['gpus'] if isinstance(gpu, list) and gpu
                      and isinstance(gpu[0], int)})
    return {
        't': [round(group[0]['time'] - origin, 1) for group in groups],
        'cores': [mean(group, share('busy_cores', 'cores')) for group in groups],
        'memory': [mean(group, share('used_memory_mb', 'memory_mb')) for group in groups],
        'gpus': {str(index): {
            'busy': [mean(group, of_gpu(index, lambda gpu: gpu[3])) for group in groups],
            'memory': [mean(group, of_gpu(index, lambda gpu: gpu[1] / gpu[2] if gpu[2] else None))
                       for group in groups]} for index in indexes}}


def facts_text(facts):
    """Return {name: text} of a journal's facts about a machine; gpus is a list."""
    if not isinstance(facts, dict):
        return {}
    gpus = facts.get('gpus')
    found = {key: printable(str(facts[key])) for key in ('kernel', 'cores', 'memory_mb', 'driver',
                                                         'python') if facts.get(key) is not None}
    if isinstance(gpus, list):
        found['gpus'] = [{'index': gpu.get('index'), 'model': printable(str(gpu.get('model', ''))),
                          'memory_mb': gpu.get('memory_mb')} for gpu in gpus
                         if isinstance(gpu, dict) and isinstance(gpu.get('index'), int)]
    return found


def machines_of(stories, used, window):
    """Return {name of a machine for people: its facts and its use} of all Stories.

    used: the names of the machines that had jobs.  Include another machine only if it has samples
    in the window.  window: (from, to, the origin of the page's times)
    """
    begin, end, origin = window
    found, names = {}, {}
    for folder, story in stories.items():
        for machine in (*story.short, *story.facts, *story.seen):
            name = story.short.get(machine, re.sub(':22$', '', machine))
            names.setdefault(name, {})[folder, machine] = True
    all_samples = {name: [one for folder, machine in pairs
                          for one in stories[folder].seen.get(machine, ())
                          if begin <= one['time'] <= end]
                   for name, pairs in names.items()}
    names = {name: names[name] for name in names if name in used or all_samples[name]}
    series = sum(2 + 2 * len(one[0].get('gpus') or ()) for one in all_samples.values() if one)
    most = min(max(SAMPLES // max(series, 1), 24), 240)
    for name, pairs in sorted(names.items(), key=lambda item: naturally(item[0])):
        facts = {}
        for folder, machine in pairs:
            facts.update(facts_text(stories[folder].facts.get(machine)))
        use = samples_of(all_samples[name], most, origin) if all_samples[name] else None
        found[name] = {'name': printable(name), 'facts': facts, 'use': use}
    return found


# -- What ran --

def provenance(jobs, links):
    """Return a list with the facts of each set of sent files, the most used first."""
    counts = collections.Counter((job.folder, job.files) for job in jobs if job.files)
    found = []
    for (folder, digest), count in counts.most_common(50):
        inner = os.path.join(folder, BOOKKEEPING, 'sent', os.path.basename(digest))
        record = next(objects_in_whole(os.path.join(inner, 'record.json')), {})
        one = {'digest': printable(digest), 'jobs': count}
        for key in ('commit', 'branch'):
            if isinstance(record.get(key), str):
                one[key] = printable(record[key])
        for key in ('time', 'files', 'bytes', 'kept', 'kept_bytes'):
            if is_finite(record.get(key)):
                one[key] = record[key]
        for key in ('changed', 'untracked'):
            if isinstance(record.get(key), list):
                one[key] = [printable(str(path)) for path in record[key][:PATHS]]
                one[f'{key}_count'] = len(record[key])
        for key, name in (('diff', 'diff.patch'), ('list', 'files.json')):
            if os.path.isfile(os.path.join(inner, name)):
                one[key] = links(os.path.join(inner, name))
        found.append(one)
    return found


def objects_in_whole(path):
    """Yield the content of a file if it is a JSON object."""
    data, is_whole = read_end(path, 2**24) or (b'', False)
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data) if is_whole else None
        if isinstance(value, dict):
            yield value


# -- All of it --

def linker(folder):
    """Return a function: path -> its address in the links of a page that lies in the folder."""
    from urllib.parse import quote
    folder = os.path.realpath(folder)

    def address(path):
        # The last component may be a symlink to another place, so resolve only its folder.
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return './' + quote(os.fsencode(os.path.relpath(real, folder)))

    return address


def column_data(table, column):
    """Return a column of the table for the page: its values, and the texts if they say more."""
    cells = [row.get(column.key, EMPTY) for row in table.rows]
    values = [rounded(cell.value, 9) if is_number(cell.value) else
              None if cell.value is None else printable(str(cell.value)) for cell in cells]
    texts = [printable(cell.text) for cell in cells]
    if column.kind == METRIC or all(text == ('' if value is None else str(value))
                                    for text, value in zip(texts, values)):
        texts = None
    elif all(isinstance(value, str) or value is None for value in values) and (
            column is not JOB):
        values, texts = texts, None
    return {'key': printable(column.key), 'head': printable(column.head), 'kind': column.kind,
            'numeric': is_numeric(table, column), 'values': listed(values),
            'texts': texts and listed(texts)}


def listed(values):
    """Return a list unchanged or, if many values repeat, as {levels: the distinct values, codes}.
    """
    numbers = {}
    if len(values) < 50 or len(set(values)) > len(values) // 4:
        return values
    codes = [numbers.setdefault(value, len(numbers)) for value in values]
    return {'levels': list(numbers), 'codes': codes}


def job_data(jobs, stories, all_attempts, origin, machines, room):
    """Return the facts of each Job for the page, as lists of equal length, and the tails.

    room: the number of bytes for all tails
    """
    sizes = [stream_sizes(job) for job in jobs]
    limits = tail_limits(jobs, sizes, room)
    commands = [printable(job.command) for job in jobs]
    prefix = os.path.commonprefix(commands) if len(jobs) > 1 else ''
    most = max(COMMANDS_BYTES // len(jobs), 200)
    numbers = {name: number for number, name in enumerate(machines)}
    found = collections.defaultdict(list)
    found.update(prefix=prefix, tails={})
    for number, (job, attempts) in enumerate(zip(jobs, all_attempts)):
        story = stories[job.folder]
        *tails, last, reason = ends_of(job, sizes[number], limits[number])
        found['name'].append(printable(job.name))
        found['state'].append(STATES.index(job.state))
        found['exit'].append(job.exit_code if is_finite(job.exit_code) else None)
        found['command'].append(cut(commands[number][len(prefix):], most))
        found['last'].append(last)
        found['reason'].append(reason)
        found['sizes'].append(sizes[number])
        found['attempts'].append([attempt_data(one, former, story, origin, numbers)
                               for former, one in zip([None, *attempts], attempts) if span_of(one)])
        ended = [one for one in attempts if 'exit_code' in one] if job.stands_for else []
        latest = (ended or attempts or [{}])[-1]
        found['used'].append(used_by(latest))
        found['asked'].append(asked_by(latest))
        if any(tails):
            found['tails'][number] = tails
    found['reason'] = listed(found['reason'])
    return found


def window_of(stories, all_attempts, now):
    """Return (time of the first start or wait, time of the last end, origin of times)."""
    begins, ends = [], []
    for attempts in all_attempts:
        for one in filter(span_of, attempts):
            began, ended = span_of(one)
            begun = stories[one['folder']].begun.get(one.get('batch'), ())
            begins += [began, *(time_s for time_s in begun
                                if is_time(time_s) and time_s <= began)][:2]
            ends.append(now if ended is None else ended)
    begin = min(begins, default=now)
    return begin, max(ends, default=now), math.floor(begin)


def attempt_data(one, former, story, origin, numbers):
    """Return [waited since, began, ended, state, machine, GPUs, exit code] of an attempt."""
    began, ended = span_of(one)
    since = waited_since(one, former, story)
    machine = story.short.get(str(one.get('machine')), '')
    gpus = [int(gpu) for gpu in re.findall('[0-9]+', str(one.get('gpus') or ''))]
    return [None if since is None else round(since - origin, 2), round(began - origin, 2),
            None if ended is None else round(ended - origin, 2), STATES.index(one['state']),
            numbers.get(machine, -1), gpus,
            one['exit_code'] if is_finite(one.get('exit_code')) else None]


def used_by(one):
    """Return [MB, MB of the GPU, cores] that an attempt used; None is unknown."""
    cpu_s, wall_s = one.get('cpu_s'), one.get('wall_s')
    cores = cpu_s / wall_s if is_finite(cpu_s) and is_finite(wall_s) and wall_s >= 1 else None
    return [*(one[key] if is_finite(one.get(key)) else None for key in USED),
            None if cores is None else round(cores, 2)]


def asked_by(one):
    """Return [MB, MB of the GPU, cores, GPUs] that an attempt requested; None: not requested."""
    asked = one.get('asked')
    return [asked[key] if isinstance(asked, dict) and is_finite(asked.get(key)) else None
            for key in ASKED]


def report_data(table, notes, folder, now, room=TAILS_BYTES):
    """Return the data of the page of a Table, for JSON.

    notes: sentences; folder: the page's; now: seconds since 1970; room: bytes for all tails
    """
    stories = {one: read_story(one) for one in dict.fromkeys(job.folder for job in table.jobs)}
    shown = {(job.folder, job.name) for job in table.jobs}
    attempts = [attempts_of(job, stories[job.folder], shown) for job in table.jobs]
    *window, origin = window_of(stories, attempts, now)
    used = {stories[one['folder']].short.get(str(one.get('machine')))
            for some in attempts for one in some}
    machines = machines_of(stories, used, (*window, origin))
    links = linker(folder)
    jobs = job_data(table.jobs, stories, attempts, origin, machines, room) if table.jobs else {}
    curves, looked = find_curves(table.jobs)
    if table.jobs:
        places = {one: f"{links(os.path.join(one, ''))}/" for one in stories}
        jobs['folder'] = listed([places[job.folder] for job in table.jobs])
        jobs['links'] = {number: links(job.path()) for number, job in enumerate(table.jobs)
                         if not PLAIN_NAME.fullmatch(job.name)}
    variables = {str(name) for some in attempts for one in some
                 if isinstance(one.get('variables'), list) for name in one['variables']}
    batches = [batch for batch in dict.fromkeys(job.batch for job in table.jobs) if batch]
    return {
        'made': round(now, 1), 'origin': origin, 'states': STATES,
        'running': any(job.state == 'running' for job in table.jobs),
        'title': printable(', '.join(batches[:4]) + ', …' * (len(batches) > 4)) or 'results',
        'places': [printable(one) for one in stories], 'notes': [*notes],
        'shared': [*table.shared],
        # Behind all others, RARE columns push none out of sight.
        'columns': [column_data(table, column) for column in sorted(
            columns_for(table, PEOPLE), key=lambda column: column.readers == RARE)],
        'jobs': jobs, 'machines': [*machines.values()], 'curves': curves, 'looked': looked,
        'sent': provenance(table.jobs, links), 'variables': sorted(map(printable, variables))}


UNSAFE = re.compile('[<>&\u007f-\u009f\u2028\u2029\ud800-\udfff\ufffe\uffff]')


def safe_json(value):
    """Return JSON that is safe in a page: it has no markup, and UTF-8 can encode it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':'))
    return UNSAFE.sub(lambda match: f'\\u{ord(match[0]):04x}', text)


def write_page(table, notes, path, now):
    """Write the page of a Table; return its size in bytes.  now: seconds since 1970."""
    page = as_html(table, notes, os.path.dirname(path) or '.', now)
    write_file(path, page)
    return len(page.encode('utf-8', 'backslashreplace'))


def as_html(table, notes, folder, now):
    """Return the page of a Table; shorten the tails until it fits into PAGE_BYTES."""
    for room in (TAILS_BYTES, TAILS_BYTES // 4, TAILS_BYTES // 20, 0):
        data = report_data(table, notes, folder, now, room)
        page = page_of(data['title'], safe_json(data))
        if len(page.encode('utf-8', 'backslashreplace')) <= PAGE_BYTES:
            break
    return page


def page_of(title, data):
    """Return the page with its data; the page permits only its own style and script."""
    import base64
    import hashlib
    import html

    def fingerprint(text):
        return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    parts = {'TITLE': html.escape(title), 'DATA': data, 'STYLE': PAGE_STYLE, 'SCRIPT': PAGE_SCRIPT,
             'STYLE_HASH': fingerprint(PAGE_STYLE), 'SCRIPT_HASH': fingerprint(PAGE_SCRIPT)}
    return re.sub('@([A-Z_]+)@', lambda match: parts[match[1]], PAGE_HTML)


# ---- Function ----

def results_table(*results, metric=(), from_=(), where=(), mean_over=(), unfinished=False,
                  sort=(), columns=(), earlier=False, current=False, report=None, html=None):
    """Return the table of the results of jobs as a list of dictionaries, a row each.

    results are paths: folders job_results, or results in them; by default job_results.  The
    keywords are the options of the command; each may be a text or a list of texts.  All rows have
    the same keys, in the order of the columns; an empty cell is None.  The function calls
    report(sentence) with warnings, such as that results of different files are mixed.  If html is
    a path, it also writes a page for a browser there.

    All errors are TableErrors whose text is for users.
    """
    wishes = read_wishes(
        metric, from_, where, mean_over, unfinished, sort, columns, earlier, current)
    notes = {}
    if html is not None:
        check_page(os.fsdecode(html), wishes)

    def note(sentence):
        notes[sentence] = True
        if report:
            report(sentence)

    table = read_table(results, wishes, note)
    if html is not None:
        put_page(table, notes, os.fsdecode(html))
    return as_dictionaries(table)


def check_page(path, wishes):
    """Raise UsageError if a page of these Wishes may not be written to the path."""
    if wishes.mean_over:
        raise UsageError('--html shows all jobs, and their means over any parameter: leave '
                         '--mean-over out.')
    check_output('--html', path)


def put_page(table, notes, path):
    """Write the page of a Table; return its size in bytes.  Raises TableError."""
    try:
        return write_page(table, notes, path, time.time())
    except OSError as error:
        raise TableError(f'{printable(path)} cannot be written: {reason_of(error)}.') from None


def as_list(value):
    """Return a text, or a list of texts, as a list."""
    return [value] if isinstance(value, str) else list(value)


def names_in(value):
    """Return the names in 'a,b' or ['a', 'b']."""
    return [name.strip() for one in as_list(value) for name in one.split(',') if name.strip()]


def read_wishes(metric, from_, where, mean_over, unfinished, sort, columns, earlier, current):
    """Return the Wishes of the options; raise UsageError if one is wrong."""
    metrics, tests = [], []
    for text in as_list(metric):
        name, equals, pattern = text.partition('=')
        if not equals or not name or not pattern:
            raise UsageError(f"--metric needs a name and a regular expression: "
                             f"--metric 'acc=best accuracy (\\S+)', not {printable(text)}.")
        try:
            metrics.append((name.strip(), re.compile(pattern, re.MULTILINE)))
        except re.error as error:
            raise UsageError(f'--metric {printable(text)}: this regular expression is wrong: '
                             f'{error}.') from None
    for text in as_list(from_):
        if os.path.isabs(text) or '..' in text.split('/'):
            raise UsageError(f"--from {printable(text)}: name files in the folders of jobs, such "
                             "as 'runs/*.csv'.")
    for text in as_list(where):
        match = TEST.fullmatch(text)
        if not match or not match[3] and match[2] in TESTS:
            raise UsageError(f"--where {printable(text)} is no test. Try: --where 'lr>0.001', in "
                             'quotes, since a shell writes to a file behind >.')
        tests.append((match[1], match[2].replace('==', '='), match[3]))
    return Wishes(
        tuple(metrics), tuple(as_list(from_)), tuple(tests), tuple(names_in(mean_over)),
        tuple((name[name.startswith('-'):], name.startswith('-')) for name in names_in(sort)),
        tuple(names_in(columns)), unfinished, earlier, current)


def read_table(results, wishes, report):
    """Return the Table of the results, filtered, averaged and sorted by the Wishes."""
    try:
        places = find_places([os.fsdecode(path) for path in results] or [RESULTS])
        jobs = read_all(places, report)
    except OSError as error:
        raise TableError(f'{printable(str(error.filename))} cannot be read: '
                         f'{reason_of(error)}.') from None
    every, jobs = jobs, jobs if wishes.earlier else newest(jobs, report)
    gone, troubles = find_gone(jobs)
    if wishes.current:
        jobs = current(jobs, gone, troubles, report)
    if not jobs:
        report('there are no other results.' if every else 'there are no results yet.')
        return Table((JOB,), [], {}, ())
    table = filtered(make_table(jobs, wishes, report, time.time()), wishes.tests)
    if not table.rows:
        report(f'none of {many(len(jobs), "job")} fits --where')
    advise(table, report)
    old = [job for job in table.jobs if (job.folder, job.name) in gone]
    if old:
        report(f'{many(len(old), "job")} ran lines that {files_without(old, gone)} no longer has '
               '(--current leaves them out)')
    if not (table.has_numbers or wishes.columns or wishes.tests or wishes.sort):
        report('no metrics were found. Have jobs print lines such as `loss: 0.31` or write '
               "metrics.json, or try: --metric 'loss=final loss (\\S+)'")
    table = with_rare_columns(table)
    if wishes.mean_over:
        table = averaged(table, wishes.mean_over, wishes.unfinished, report)
    table = in_order(table, wishes.sort)
    return with_columns(table, wishes.columns) if wishes.columns else table


def newest(jobs, report):
    """Return the Jobs without earlier results, and without jobs that reproduce others.

    The newest attempt of a job may have no results, as after a --cancel.  Then take the newest
    earlier ones in its place.
    """
    stands = [job for job in jobs if job.stands_for]
    if stands:
        pairs = some_of([f'{job.name} for {job.stands_for}' for job in stands])
        report('earlier results stand for jobs whose newest attempt has none: '
               f'{printable(pairs)}')
    empty = {(job.folder, job.stands_for) for job in stands}
    kept = [job for job in jobs if job.stands_for or not (
        job.state == 'earlier' or job.copy_of or (job.folder, job.name) in empty)]
    count = len(jobs) - len(kept) - sum((job.folder, job.name) in empty for job in jobs)
    if count:
        report(f'left out: {many(count, "result")} of jobs that were run again '
               '(--earlier shows them)')
    return kept


def current(jobs, gone, troubles, report):
    """Return the Jobs whose lines are in their batch files; see find_gone."""
    for why in troubles:
        report(f'--current {why}')
    old = [job for job in jobs if (job.folder, job.name) in gone]
    if old:
        report(f'left out: {many(len(old), "job")} that ran lines that {files_without(old, gone)} '
               'no longer has')
    return [job for job in jobs if (job.folder, job.name) not in gone]


def files_without(jobs, gone):
    """Return the paths of the batch files that no longer have the lines of these Jobs."""
    return printable(' or '.join(dict.fromkeys(gone[job.folder, job.name] for job in jobs)))


def report_left(jobs, report):
    """Report the jobs whose results no client fetches, and what to type."""
    left = [job for job in jobs if job.is_left]
    if not left:
        return
    started = sum(job.state == STARTED for job in left)
    ended = len(left) - started
    parts = [*[f'{many(started, "job")} may still run'] * bool(started),
             *[f'{many(ended, "job")} ended'] * bool(ended)]
    batches = [*dict.fromkeys(job.batch for job in left if job.batch)]
    typed = [f'the command that started {some_of(batches)}'] if batches else []
    typed += [f'execute_remote --attach={job.name}' for job in left if not job.batch][:1]
    report(f'{names_of(parts)}, but no client fetches the results. Type: '
           f'{printable(names_of(typed))}')


def report_unknown(jobs, report):
    """Report the folders with results that no journal has, such as those of combine_folders."""
    unknown = collections.Counter(job.folder for job in jobs if not job.state)
    for folder, count in unknown.items():
        is_copy = not has_journals(folder) and os.path.basename(os.path.realpath(folder)) != RESULTS
        advice = ('. If combine_folders made it, name the folders that it combined: '
                  f'results_table one/{RESULTS} two/{RESULTS}')
        report(f'{printable(folder)} has no journal of {many(count, "job")}, so commands, exit '
               f'codes, times and machines are unknown{advice * is_copy}')


def advise(table, report):
    """Report facts that could mislead a reader of the table."""
    report_left(table.jobs, report)
    report_unknown(table.jobs, report)
    files = collections.Counter(job.files[:DIGEST] for job in table.jobs if job.files)
    parted = only_added(table.jobs) if len(files) > 1 else ((), 0)
    if parted is None:
        counts = names_of([f'{many(count, "job")} ran with {digest}'
                           for digest, count in files.most_common(4)])
        first = files.most_common(1)[0][0]
        report(f'results of {len(files)} different sets of files are mixed: {counts}'
               f'{", …" * (len(files) > 4)}. For one of them: --where files={first}')
    elif parted[0]:
        added, count = parted
        paths = [*map(printable, added[:3]), *[f'{len(added) - 3} more'] * (len(added) > 3)]
        report(f'{many(count, "job")} ran without {names_of(paths)}, which other jobs had')
    batches = collections.Counter(job.batch for job in table.jobs if job.batch)
    if len(batches) > 1:
        first = table.jobs[0]
        path = first.path()[:-len(first.name)] + (first.batch or next(iter(batches)))
        report(f'these are jobs of {len(batches)} batches. For one of them: '
               f'results_table {printable(path)}')


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


# ---- Options: from argv to the arguments of the function ----

SEVERAL = ('--metric', '--from', '--where')
LISTS = ('--sort', '--columns', '--mean-over')
FORMS = {'--csv': as_csv, '--json': as_json, '--markdown': as_markdown, '--latex': as_latex}

# {options of other programs: what to type here}
GUESSES = {
    '-o -O --out --output --output-file --outfile --file --save --export --tsv':
        'To write the table to a file: --csv=t.csv.',
    '-f --format': 'The forms of the table are --csv=t.csv, --json, --markdown, --latex and '
                   '--html=page.html.',
    '--excel --xlsx': 'Spreadsheets read CSV: --csv=t.csv.',
    '--filter --select --query --grep': "To choose rows: --where 'lr>0.001'.",
    '--fields --cols': 'To choose columns: --columns=lr,loss.',
    '--order --order-by --reverse': 'To sort: --sort=-loss, where - is descending.',
    '--group-by --groupby --average --avg --mean': 'For means: --mean-over=seed.',
    '--all': 'To see results of jobs that were run again, too: --earlier. To see all columns: '
             '--wide.'}


def option_kinds():
    """Return {option: 'flag' | 'value'} of the usage text."""
    lines = re.findall(r'(?m)^  (-\w )?(--[a-z-]+)(=<[^>]+>)?  ', USAGE)
    kinds = {long: 'value' if value else 'flag' for _, long, value in lines}
    return {**kinds, **{short.strip(): kinds[long] for short, long, _ in lines if short}}


def read_options(argv):
    """Return (words, {option: value}); an option of SEVERAL has a list, a flag has True."""
    kinds, words, options = option_kinds(), [], {}
    rest = iter(argv)
    for word in rest:
        if word == '--':
            words += rest
        elif not word.startswith('-') or word == '-':
            words.append(word)
        else:
            name, equals, value = word.partition('=')
            if name not in kinds:
                raise UsageError(f'unknown option {printable(name)}{meant_by(name, kinds)}')
            if kinds[name] == 'flag':
                if equals:
                    raise UsageError(f'{name} takes no value.')
                options[name] = True
                continue
            if not equals:
                value = next(rest, None)
                check_value(name, value, kinds)
            if name in SEVERAL:
                options.setdefault(name, []).append(value)
            elif name in options:
                raise UsageError(f'{name} is given twice.')
            else:
                options[name] = value
    return words, options


def check_value(name, value, kinds):
    """Raise UsageError if the word behind an option cannot be its value: there is none (None), or
    it is the next option, as in --csv --where."""
    why = ''
    if value is not None:
        if not value.startswith('--') or value.partition('=')[0] not in kinds:
            return
        why = f', and {printable(value)} is an option'
    what = re.search(rf'(?m)^  {name}=(<[^>]+>)', USAGE)[1]
    stdout = ', or --csv=- for stdout' if name == '--csv' else ''
    typed = f'. Type: {name}={what}{stdout}' if why or stdout else '.'
    raise UsageError(f'{name} needs a value{why}{typed}')


def meant_by(name, kinds):
    """Return the end of the sentence about an unknown option: what to type in its place."""
    guess = next((remedy for names, remedy in GUESSES.items() if name in names.split()), '')
    return f'. {guess}' if guess else f'{nearest(name, kinds)}.'


def check_lists(argv):
    """Raise UsageError if words behind an option, which are no results, seem to belong to it.

    Users type --columns lr acc, --sort lr -acc and --where 'lr>1' 'loss<2'.
    """
    words = argv[:argv.index('--')] if '--' in argv else argv
    for at, word in enumerate(words):
        name, equals, value = word.partition('=')
        if name not in (*LISTS, '--where'):
            continue
        value, *ahead = [value, *words[at + 1:]] if equals else words[at + 1:] or ['']
        more = list(itertools.takewhile(functools.partial(is_stray, name), ahead))
        if more and name == '--where':
            tests = ' '.join(f"--where '{printable(test)}'" for test in (value, *more))
            raise UsageError(f'--where takes one test. Give it again for each: {tests}')
        if more:
            names = ','.join(one.strip(',') for one in (value, *more))
            raise UsageError(f'{name} takes names that are joined by commas: '
                             f'{name}={printable(names)}')


def is_stray(option, word):
    """Tell whether a word behind the value of an option is a further value, and no results."""
    if word.startswith('-'):            # descending, as in --sort
        return option == '--sort' and word[1:2] not in ('', '-') and word not in option_kinds()
    if '/' in word or option == '--where' and not TEST.fullmatch(word):
        return False
    return not os.path.lexists(word) and not any(
        os.path.lexists(path) for path in (f'{word}/job_results', f'job_results/{word}')
    ) and not glob.glob(os.path.join('job_results', glob.escape(word) + '.*'))


def nearest(word, known):
    """Return ' (did you mean X?)' with the known words that the user may have meant, or ''.

    The word may be the beginning of one, have typing errors, or have its parts in another order.
    --no-x never stands for x, nor the other way round.
    """
    import difflib

    def parts(text):
        return re.findall('[^-_]+', text.lower())

    def likeness(other):
        for order in itertools.permutations(parts(other)):
            spelled = ''.join(order)
            for beginning in {spelled, spelled[:len(typed)]}:
                share = difflib.SequenceMatcher(None, typed, beginning).ratio()
                yield share, list(order) == parts(other), beginning == spelled

    typed, found = ''.join(parts(word)), {}
    for other in sorted(known) if typed else ():
        negates = 'no' in parts(other)
        if negates == typed.startswith('no') or not negates and parts(word)[0] != 'no' and (
                parts(other)[0][0] == 'n'):
            found.setdefault(max(likeness(other)), []).append(other)
    best = max(found, default=(0,))
    alike = found[best] if best[0] >= 0.7 else []
    return f' (did you mean {" or ".join(alike)}?)' if 0 < len(alike) < 4 else ''


# ---- Terminal: the only printer ----

class Terminal:
    """The table goes to stdout, sentences go to stderr."""

    def __init__(self):
        self._out, self._err = sys.stdout, sys.stderr
        self._sentences = {}

    @property
    def shows(self):
        """Tell whether stdout is a terminal."""
        return self._out is not None and self._out.isatty()

    @property
    def width(self):
        """The columns of the terminal."""
        try:
            return os.get_terminal_size(self._out.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def style(self, text, code):
        """Return the text in bold or in red if the terminal can show that."""
        is_plain = (not text or not self.shows or os.environ.get('NO_COLOR')
                    or os.environ.get('TERM', 'dumb') == 'dumb')
        return text if is_plain else f'\x1b[{code}m{text}\x1b[0m'

    def say(self, sentence):
        """Keep this sentence for end(): a long table would push it out of sight."""
        self._sentences[sentence] = True

    def end(self):
        """Print each sentence once."""
        for sentence in self._sentences:
            self.complain(f'results_table: {sentence}')

    def complain(self, text):
        write(self._err, f'{text}\n')

    def put(self, text):
        write(self._out, text)

    def put_lines(self, text):
        """Print lines for programs; on a terminal without control characters."""
        self.put('\n'.join(map(printable, text.split('\n'))) if self.shows else text)


def write(stream, text):
    """Write a text; replace characters that the stream's encoding lacks."""
    if stream is None:                  # it was closed before the start, as by `>&-`
        return
    try:
        try:
            text.encode(stream.encoding or 'utf-8')
        except UnicodeEncodeError:
            text = text.replace('…', '...').replace('±', '+-')
            text = text.encode(stream.encoding, 'backslashreplace').decode(stream.encoding)
        stream.write(text)
        stream.flush()
    except BrokenPipeError:             # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def show(text):
    """Print the text that the user requested: the usage, or a completion."""
    write(sys.stdout, text)


# ---- Command: from argv to the exit status ----

def run(argv, terminal):
    """Run the command line."""
    check_lists(argv)
    words, options = read_options(argv)
    if '--completion' in options:
        shell = options['--completion']
        if check_for_shell(shell):
            raise UsageError(check_for_shell(shell))
        show(completion(USAGE, shell))
        return
    forms = [name for name in (*FORMS, '--html', '--wide') if name in options]
    if len(forms) > 1:
        raise UsageError(f'{names_of(forms)}: give one of them.')
    wishes = read_wishes(
        *(options.get(name, ()) for name in ('--metric', '--from', '--where', '--mean-over')),
        '--unfinished' in options, *(options.get(name, ()) for name in ('--sort', '--columns')),
        '--earlier' in options, '--current' in options)
    path = options.get('--csv', options.get('--html', '-'))
    if forms == ['--html']:
        check_page(path, wishes)
    elif path != '-':
        check_output('--csv', path)
    notes = {}
    table = read_table(words, wishes, lambda sentence: notes.update({sentence: True}))
    for note in notes:
        terminal.say(note)
    if forms == ['--html']:
        run_page(table, notes, path, terminal)
    elif not forms and terminal.shows or forms == ['--wide']:
        width = None if forms else terminal.width
        for line in as_screen(table, width, terminal.style) if table.rows else ():
            terminal.put(f'{line}\n')
    else:
        run_form(table, FORMS[forms[0] if forms else '--csv'], path, terminal)


def run_form(table, form, path, terminal):
    """Write the table for programs or papers."""
    text = form(table)
    if path == '-':
        terminal.put_lines(text)
        return
    try:
        write_file(path, text)
    except OSError as error:
        raise TableError(f'{printable(path)} cannot be written: {reason_of(error)}.') from None
    columns = columns_for(table, PROGRAMS)
    terminal.say(f'wrote {printable(path)}: {many(len(table.rows), "row")}, '
                 f'{many(len(columns), "column")}')


def run_page(table, notes, path, terminal):
    """Write the page for a browser."""
    if path == '-':
        terminal.put_lines(as_html(table, notes, '.', time.time()))
        return
    size = put_page(table, notes, path)
    terminal.say(f'wrote {printable(path)}: {many(len(table.jobs), "job")}, '
                 f'{size / 10**6:.1f} MB')


def main():
    """Run the command; return its exit status."""
    argv = sys.argv[1:]
    before_end = argv[:argv.index('--')] if '--' in argv else argv
    if '--help' in before_end or '-h' in before_end:
        show(USAGE)
        return 0
    terminal = Terminal()
    try:
        run(argv, terminal)
    except TableError as error:
        terminal.complain(f'results_table: {error}')
        if isinstance(error, UsageError):
            terminal.complain(USAGE.partition('\n\n')[2].partition('\n\n')[0])
        return error.exit_code
    except KeyboardInterrupt:
        terminal.complain('results_table: interrupted.')
        return 130
    terminal.end()
    return 0


# ---- Page: the texts of a page for a browser ----

PAGE_HTML = r'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none';
  form-action 'none'; style-src 'sha256-@STYLE_HASH@'; script-src 'sha256-@SCRIPT_HASH@'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="generator" content="results_table">
<title>@TITLE@: results</title>
<style>@STYLE@</style>
</head>
<body>
<a class="skip" href="#table">Skip to the table</a>
<header>
  <h1 id="title">@TITLE@</h1>
  <p id="lead" class="muted"></p>
  <div id="shares" class="shares"></div>
  <nav id="nav" aria-label="Sections"></nav>
</header>
<main>
  <noscript><p>This page draws its table and plots with a script of its own. Please allow scripts
  for it, or type: results_table --wide</p></noscript>
  <ul id="glance" class="glance" aria-label="At a glance" hidden></ul>
  <div id="notes" class="notes" role="note" hidden></div>
  <section id="table" aria-labelledby="table-head">
    <h2 id="table-head">Jobs</h2>
    <div id="shared"></div>
    <div class="controls">
      <label class="wide">Filter <input type="search" id="filter" autocomplete="off"
        spellcheck="false" aria-describedby="filter-help"></label>
      <span id="states" class="controls" role="group" aria-label="Filter by outcome"></span>
    </div>
    <p id="filter-help" class="hint">Words, or tests such as
      <code id="filter-example">exit=0</code>. The plots and curves below show the same
      jobs. A click on a head sorts.</p>
    <div class="scroll" role="region" aria-labelledby="table-head" tabindex="0">
      <table><thead id="heads"></thead><tbody id="rows"></tbody></table></div>
    <div class="controls" id="pages"><button id="page-before" type="button">Previous</button>
      <span id="page-now" role="status" aria-live="polite"></span>
      <button id="page-after" type="button">Next</button></div>
  </section>
  <section id="timeline" aria-labelledby="timeline-head">
    <h2 id="timeline-head">Timeline</h2>
    <p class="hint">A bar is a job. Point at it, or move with the arrow keys; a click or Enter opens
      its output. A dotted line: the job waited. The right column: for how much of the time the
      machine or GPU had a job.</p>
    <div class="swatches" id="legend"></div>
    <div class="controls" role="group" aria-label="Part of the time">
      <button type="button" id="zoom-in">Zoom in</button>
      <button type="button" id="zoom-out">Zoom out</button>
      <button type="button" id="earlier">Earlier</button>
      <button type="button" id="later">Later</button>
      <button type="button" id="zoom-all">All</button></div>
    <div id="time-axis"></div>
    <div id="lanes" role="group" aria-label="Jobs by machine and GPU, over time"></div>
  </section>
  <section id="machines" aria-labelledby="machines-head">
    <h2 id="machines-head">Machines</h2>
    <p id="machines-hint" class="hint"></p>
    <div id="machines-body"></div>
  </section>
  <section id="asked" aria-labelledby="asked-head">
    <h2 id="asked-head">Asked for and used</h2>
    <p id="asked-hint" class="hint"></p>
    <div id="asked-body"></div>
  </section>
  <section id="parameters" aria-labelledby="parameters-head">
    <h2 id="parameters-head">Parameters and metrics</h2>
    <p id="explained"></p>
    <div class="controls" id="plot-controls"></div>
    <div id="plot"></div>
    <p id="plot-hint" class="hint"></p>
    <details id="plot-details"><summary>The same as a table</summary>
      <div id="plot-table"></div></details>
  </section>
  <section id="curves" aria-labelledby="curves-head">
    <h2 id="curves-head">Curves</h2>
    <div class="controls" id="curve-controls"></div>
    <fieldset class="choices" id="curve-jobs"><legend>Jobs</legend></fieldset>
    <div id="curve-plot"></div>
    <p id="curve-hint" class="hint"></p>
    <details id="curve-details"><summary>The same as a table</summary>
      <div id="curve-table"></div></details>
  </section>
  <section id="failures" aria-labelledby="failures-head">
    <h2 id="failures-head">Failures</h2>
    <div id="failures-body"></div>
  </section>
  <section id="ran" aria-labelledby="ran-head">
    <h2 id="ran-head">What ran</h2>
    <div id="ran-body"></div>
  </section>
</main>
<footer id="foot"></footer>
<dialog id="details" aria-labelledby="details-head"></dialog>
<div id="tip" aria-hidden="true" hidden></div>
<svg id="patterns" width="0" height="0" aria-hidden="true" focusable="false"></svg>
<script type="application/json" id="data">@DATA@</script>
<script>@SCRIPT@</script>
</body>
</html>
'''

PAGE_STYLE = r'''
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --raised: #f4f4f1; --ink: #1d2126; --muted: #5d646c; --rule: #d9d9d4;
  --accent: #1f5f99; --mark: #fff3c4;
  --finished: #4f8ac0; --failed: #c94a10; --running: #d9a514; --ended: #9cc3e3;
  --lost: #8450a0; --cancelled: #8d9298; --on-bar: #ffffff;
  --c0: #0b66a8; --c1: #d55e00; --c2: #008a63; --c3: #b0478f; --c4: #8a6d00; --c5: #2f9bd0;
  --c6: #5b4bb5; --c7: #6b6b6b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16191d; --raised: #1f2329; --ink: #e4e6e8; --muted: #9aa3ac; --rule: #353b43;
    --accent: #7db8ec; --mark: #4a4012;
    --finished: #5b9bd3; --failed: #ee7a3c; --running: #e3b94a; --ended: #335f83;
    --lost: #b58ad0; --cancelled: #868d95; --on-bar: #0d1116;
    --c0: #58a6e0; --c1: #f08a3c; --c2: #35c297; --c3: #e08ac2; --c4: #d9bd45; --c5: #8fd0f2;
    --c6: #a99bf0; --c7: #b3b3b3;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums;
}
header, main, footer, dialog { overflow-wrap: anywhere; }
header, main, footer { max-width: 1240px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 20px; }
h1 { font-size: 24px; font-weight: 650; line-height: 1.2; margin: 0 0 2px; letter-spacing: -.01em; }
h2 { font-size: 17px; font-weight: 650; margin: 0 0 4px; }
h3 { font-size: 14px; font-weight: 650; margin: 16px 0 4px; }
section { border-top: 1px solid var(--rule); padding: 18px 0 24px; scroll-margin-top: 4px; }
p { margin: 0 0 8px; max-width: 96ch; }
#lead { max-width: none; }
.muted, .hint { color: var(--muted); }
.hint { font-size: 12.5px; max-width: 110ch; }
a { color: var(--accent); }
code, pre, .code { font-size: .92em;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
[hidden] { display: none !important; }
nav { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0 14px; font-size: 13px; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.glance { list-style: none; margin: 0 0 14px; padding: 10px 14px; background: var(--raised);
  border-radius: 6px; }
.glance li { display: grid; grid-template-columns: 9em minmax(0, 1fr); gap: 0 12px;
  padding: 3px 0;
  max-width: none; }
.glance .what { color: var(--muted); }
.notes { border-left: 3px solid var(--running); margin: 0 0 14px; padding: 2px 12px; }
.notes p { margin: 3px 0; }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 8px; top: 8px; background: var(--paper); padding: 6px 10px; z-index: 9; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
button, select, input { font: inherit; color: inherit; }
button, select, input[type=search] { background: var(--paper); border: 1px solid var(--rule);
  border-radius: 5px; padding: 3px 9px; min-height: 30px; max-width: 100%; }
button { cursor: pointer; }
button:hover:not(:disabled) { border-color: var(--accent); }
button:disabled { color: var(--muted); cursor: default; opacity: .6; }
button[aria-pressed=true] { background: var(--accent); color: var(--paper);
  border-color: var(--accent); }
button.plain { border: 0; background: none; padding: 0; min-height: 0; text-align: inherit;
  color: inherit; }
button.link { border: 0; background: none; padding: 0; min-height: 0; color: var(--accent);
  text-decoration: underline; text-underline-offset: 2px; }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; margin: 8px 0; }
.controls label { overflow-wrap: normal; display: inline-flex; align-items: center; gap: 6px;
  color: var(--muted);
  max-width: 100%; }
.controls label > select, .controls label > input { color: var(--ink); min-width: 0; }
input[type=search] { width: 24em; }
.shares { height: 10px; border-radius: 3px; overflow: hidden; margin: 8px 0; }
.shares svg { display: block; width: 100%; height: 10px; }
/* Tables */
.scroll { overflow-x: auto; position: relative; }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; }
th, td { text-align: left; padding: 3px 14px 3px 0; vertical-align: baseline; white-space: nowrap;
  border-bottom: 1px solid var(--rule); unicode-bidi: plaintext; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; }
td.number, th.number { text-align: right; }
td.long { max-width: 26em; overflow: hidden; text-overflow: ellipsis; }
th button.plain { font-weight: 600; }
th button.plain:hover { color: var(--accent); }
th[aria-sort] button::after { content: "\2195"; opacity: .35; padding-left: 3px; }
th[aria-sort=ascending] button::after { content: "\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\2193"; opacity: 1; }
#table th:first-child, #table td:first-child { position: sticky; left: 0;
  background: var(--paper); z-index: 1; }
tbody tr:hover td { background: var(--raised); }
.parameter { font-weight: 500; }
.first-metric { border-left: 1px solid var(--rule); padding-left: 14px; }
.bad { color: var(--failed); font-weight: 600; }
.sign { display: inline-block; width: 1.3em; font-weight: 700; }
.sign.finished { color: var(--finished); } .sign.failed { color: var(--failed); }
.sign.running, .sign.started { color: var(--running); } .sign.lost { color: var(--lost); }
.sign.cancelled, .sign.ended, .sign.earlier { color: var(--muted); }
#machines-body td, #asked-body td { vertical-align: middle; }
/* Drawings */
svg { display: block; }
svg text { fill: var(--muted); font-size: 11.5px; font-family: inherit; }
svg text.strong { fill: var(--ink); font-weight: 600; }
svg .axis { stroke: var(--rule); } svg .grid { stroke: var(--rule); stroke-width: .6; }
.mark { cursor: pointer; }
.bar.finished { fill: var(--finished); } .bar.running { fill: url(#is-running); }
.bar.failed { fill: url(#is-failed); } .bar.ended { fill: url(#is-ended); }
.bar.lost { fill: url(#is-lost); } .bar.cancelled { fill: url(#is-cancelled); }
.bar.started { fill: url(#is-started); }
.bar.earlier, .bar.unknown { fill: var(--cancelled); }
.bar { stroke: var(--paper); stroke-width: .7; }
.bar.before { opacity: .75; stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 2; }
.faded { opacity: .16; }
.mark:focus, .mark.on { outline: none; stroke: var(--ink); stroke-width: 2; }
text.on-bar { fill: var(--on-bar); pointer-events: none; font-size: 10.5px; }
.wait { stroke: var(--muted); stroke-width: 1; stroke-dasharray: 1.5 2.5; }
.wait.strong { stroke: var(--ink); stroke-width: 1.6; pointer-events: none; }
.waiting { fill: var(--muted); opacity: .3; }
.swatches { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px; color: var(--muted);
  margin: 4px 0; }
.swatches span { min-width: 0; display: inline-flex; align-items: center; gap: 6px; }
#lanes { max-height: 62vh; overflow-y: auto; overflow-x: hidden; }
.lane-line { stroke: var(--rule); stroke-width: .7; }
.busy-area { fill: var(--c0); opacity: .28; } .busy-line { stroke: var(--c0); fill: none; }
.memory-line { stroke: var(--c1); fill: none; stroke-dasharray: 3 2; }
.had-job { fill: var(--finished); } .cursor { stroke: var(--ink); }
.asked { stroke: var(--ink); stroke-width: 2; }
svg { color: var(--c0); }
.dot { fill: currentColor; fill-opacity: .55; stroke: currentColor; stroke-width: .8; }
.dot.small { fill-opacity: .35; stroke-opacity: .5; }
.dot.other { fill: var(--paper); stroke-dasharray: 2 1.5; stroke-width: 1.3; }
.means, .halo { pointer-events: none; }
.halo * { stroke: var(--paper); stroke-width: 4.5; opacity: .8; }
.mean { fill: none; stroke-width: 2; } .spread { stroke-width: 1.3; }
.curve { fill: none; stroke-width: 1.5; } .curve.thin { stroke-width: 1; opacity: .6; }
.curve.mark:focus, .curve.mark.on { stroke-width: 3.2; opacity: 1; stroke: var(--ink); }
#tip { position: fixed; z-index: 20; max-width: min(460px, calc(100vw - 16px));
  background: var(--ink); color: var(--paper); font-size: 12.5px; line-height: 1.4;
  padding: 7px 10px; border-radius: 5px; pointer-events: none; overflow-wrap: anywhere; }
#tip div:first-child { font-weight: 650; }
#tip .code { opacity: .85; }
.choices { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr));
  gap: 0 14px; max-height: 140px; overflow-y: auto;
  border: 1px solid var(--rule); border-radius: 5px; padding: 5px 9px; margin: 6px 0; }
.choices legend { color: var(--muted); font-size: 12.5px; padding: 0 4px; }
.choices .row { grid-column: 1 / -1; display: flex; gap: 14px; }
.choices label span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.choices label { display: flex; min-width: 0; gap: 5px; align-items: center; font-size: 12.5px; }
.failure { display: grid; grid-template-columns: 3.5em minmax(0, 1fr); gap: 0 10px; padding: 7px 0;
  border-bottom: 1px solid var(--rule); }
.failure .count { text-align: right; font-weight: 650; font-size: 16px; color: var(--failed); }
.failure .reason { overflow-wrap: anywhere; unicode-bidi: plaintext; }
.failure .jobs { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 13px; margin-top: 2px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 8px 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; unicode-bidi: plaintext; }
dialog { border: 1px solid var(--rule); border-radius: 8px; background: var(--paper);
  color: var(--ink); width: min(940px, calc(100vw - 16px)); max-height: calc(100vh - 32px);
  padding: 16px 20px 20px; }
dialog::backdrop { background: rgb(0 0 0 / .45); }
dialog .top { display: flex; justify-content: space-between; gap: 12px; align-items: start; }
pre { background: var(--raised); padding: 9px 11px; border-radius: 5px; overflow: auto;
  max-height: 42vh; margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: 12px; unicode-bidi: plaintext; }
details > summary { cursor: pointer; color: var(--muted); font-size: 13px; }
footer { color: var(--muted); font-size: 12.5px; padding-top: 4px; padding-bottom: 32px; }
@media (max-width: 640px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  .glance li { grid-template-columns: minmax(0, 1fr); padding: 5px 0; }
  h1 { font-size: 20px; }
  input[type=search] { width: 100%; }
  .controls label.wide { width: 100%; }
  dialog { padding: 12px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 5px; }
}
@page { size: A4 landscape; margin: 12mm; }
@media print {
  :root { color-scheme: light; }
  body { font-size: 10pt; }
  nav, .controls, .choices, .skip, #tip, .hint, details:not([open]) { display: none !important; }
  header, main, footer { max-width: none; padding: 0; }
  section { padding: 10px 0; }
  #parameters, #curves { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  tr, .failure, svg { break-inside: avoid; }
  #lanes, pre { max-height: none; overflow: visible; }
  .scroll { overflow: visible; }
  svg { max-width: 100%; height: auto; }
  #machines-body svg, #asked-body svg { max-width: 34vw; }
  table { font-size: 8pt; } th, td { padding-right: 8px; }
  th[aria-sort] button::after { content: ""; }
  td.long { white-space: normal; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
@media print and (prefers-color-scheme: dark) {
  :root {
    --paper: #fff; --raised: #f4f4f1; --ink: #1d2126; --muted: #5d646c; --rule: #d9d9d4;
    --accent: #1f5f99; --finished: #4f8ac0; --failed: #c94a10; --ended: #9cc3e3;
    --c0: #0b66a8; --c1: #d55e00; --c2: #008a63; --c3: #b0478f; --on-bar: #fff;
  }
}
'''

PAGE_SCRIPT = r'''
'use strict';

// The data is text from jobs: it becomes text nodes and attributes here, and never markup.

// ---- Elements ----

const data = JSON.parse(document.getElementById('data').textContent);
const SVG = 'http://www.w3.org/2000/svg';

function fill(node, facts, children) {
  for (const [name, value] of Object.entries(facts || {})) {
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, value === true ? '' : value);
    }
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== '') node.append(child);
  }
  return node;
}

function el(name, facts, ...children) {
  return fill(document.createElement(name), facts, children);
}

function draw(name, facts, ...children) {
  return fill(document.createElementNS(SVG, name), facts, children);
}

function byId(id) {
  return document.getElementById(id);
}

function put(id, ...children) {
  byId(id).replaceChildren(...children.flat(Infinity).filter(child => child !== ''));
}

function button(text, act, facts) {
  return el('button', {type: 'button', click: act, ...facts}, text);
}

function choice(id, label, options, chosen, act) {
  const select = el('select', {id, change: act},
    options.map(([value, text]) => el('option', {value, selected: value === chosen}, text)));
  return el('label', {}, label, select);
}

const NUMERIC = /^((under )?[\d.,]+( ?%|s|m \d+s|h \d+m|d \d+h)?|no job)?$/;

function looksNumeric(value) {
  return value === null || typeof value === 'number'
    || (typeof value === 'string' && NUMERIC.test(value));
}

function tableOf(heads, rows, caption) {
  const numeric = heads.map((_, at) => rows.every(row => looksNumeric(row[at])));
  const cell = (name, value, at, more) => el(name,
    {class: numeric[at] ? 'number' : null, ...more},
    value instanceof Node || Array.isArray(value) ? value : shown(value));
  const facts = {class: 'scroll', tabindex: 0, role: 'region', 'aria-label': caption};
  return el('div', facts, el('table', {},
    el('thead', {}, el('tr', {}, heads.map((head, at) => cell('th', head, at, {scope: 'col'})))),
    el('tbody', {}, rows.map(row => el('tr', {}, row.map((value, at) => cell('td', value, at)))))));
}

// ---- Words ----

function many(count, noun) {
  return `${count.toLocaleString('en')} ${noun}${count === 1 ? '' : 's'}`;
}

function shown(value) {
  if (value === null || value === undefined) return '';
  if (typeof value !== 'number') return value;
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return String(value);
  return String(Number(value.toPrecision(value < 1000 ? 4 : 6)));
}

function cellText(value) {
  return typeof value === 'number' ? String(Number(value.toPrecision(6))) : value ?? '';
}

function percent(share) {
  if (share === null) return '';
  return share > 0 && share < 0.01 ? 'under 1 %' : `${Math.round(100 * share)} %`;
}

function durationOf(seconds) {
  if (seconds < 10) return `${Math.round(10 * seconds) / 10}s`;
  let minutes = Math.floor(Math.round(seconds) / 60);
  const rest = Math.round(seconds) % 60, two = number => String(number).padStart(2, '0');
  if (!minutes) return `${rest}s`;
  let hours = Math.floor(minutes / 60);
  if (!hours) return `${minutes}m ${two(rest)}s`;
  minutes %= 60;
  const days = Math.floor(hours / 24);
  return days ? `${days}d ${hours % 24}h` : `${hours}h ${two(minutes)}m`;
}

const DAY = {month: 'short', day: 'numeric'};
const CLOCK = {hour: '2-digit', minute: '2-digit', hourCycle: 'h23'};

// A time is in seconds since the origin of the page.
function dateOf(time) {
  return new Date(1000 * (data.origin + time));
}

const formats = new Map();

// Making a format takes a browser longer than using it a hundred times, so keep each format.
function dateText(time, facts) {
  const key = JSON.stringify(facts);
  if (!formats.has(key)) formats.set(key, new Intl.DateTimeFormat('en', facts));
  const date = dateOf(time);
  return Number.isNaN(date.getTime()) ? '?' : formats.get(key).format(date);
}

function timeOf(time, withDay = true) {
  const second = span.length < 7200 ? '2-digit' : undefined;
  return dateText(time, {...(withDay ? DAY : {}), ...CLOCK, second});
}

// Return 'Nov 27, 09:32:04 to 09:32:45'. to: null if the job still runs.
function rangeOfTimes(from, to) {
  if (to === null) return `${timeOf(from)} to now`;
  const day = time => dateOf(time).toDateString();
  return `${timeOf(from)} to ${timeOf(to, day(from) !== day(to))}`;
}

function bytesOf(count) {
  if (count < 1000) return many(count, 'byte');
  const units = ['kB', 'MB', 'GB', 'TB'];
  const power = Math.min(Math.floor(Math.log10(count) / 3), units.length);
  return `${Number((count / 1000 ** power).toPrecision(3))} ${units[power - 1]}`;
}

function listOf(texts, most = 4) {
  const some = texts.slice(0, most);
  if (texts.length > most) return `${some.join(', ')} and ${texts.length - most} more`;
  return some.length < 2 ? some.join('') : `${some.slice(0, -1).join(', ')} and ${some.at(-1)}`;
}

const SIGNS = {finished: '\u2713', failed: '\u2715', running: '\u25b8', started: '\u25b9',
  ended: '\u25cb', lost: '?', cancelled: '\u2013', earlier: '\u21ba', unknown: '\u00b7'};
const MEANINGS = {started: 'started, and may still run: no client fetches its results',
  ended: 'ended, its results are not fetched yet', unknown: 'no journal has it'};

// ---- Jobs ----

function expand(list) {
  return Array.isArray(list) ? list : list.codes.map(code => list.levels[code]);
}

function stateName(code) {
  return data.states[code] || 'unknown';
}

function readJobs(raw) {
  if (!raw.name) return [];
  const reasons = expand(raw.reason), folders = expand(raw.folder);
  return raw.name.map((name, n) => {
    const attempts = raw.attempts[n].map(([since, began, ended, state, machine, gpus, exit]) => ({
      job: n, since, began, ended, state: stateName(state), machine, gpus, exit}));
    if (attempts.length) attempts.at(-1).isLatest = true;
    return {n, name, state: stateName(raw.state[n]), exit: raw.exit[n], attempts,
      command: raw.prefix + raw.command[n], last: raw.last[n], reason: reasons[n],
      sizes: raw.sizes[n], folder: folders[n], used: raw.used[n], asked: raw.asked[n]};
  });
}

function readColumns(raw) {
  const isJob = column => column.key === 'job';       // it comes first, and opens the job
  return [...raw.filter(isJob), ...raw.filter(one => !isJob(one))].map(column => {
    const values = expand(column.values);
    const texts = column.texts ? expand(column.texts) : values.map(cellText);
    return {...column, values, texts};
  });
}

const jobs = readJobs(data.jobs);
const columns = readColumns(data.columns);
const parameters = columns.filter(column => column.kind === 'parameter');
const metrics = columns.filter(column => column.kind === 'metric' && column.numeric);
const now = data.made - data.origin;
const span = spanOf(jobs);

function spanOf(some) {
  let from = Infinity, to = -Infinity;
  for (const job of some) {
    for (const one of job.attempts) {
      from = Math.min(from, one.since ?? one.began);
      to = Math.max(to, one.ended ?? now);
    }
  }
  if (from > to) [from, to] = [0, 1];
  return {from, to: Math.max(to, from + 0.1), length: Math.max(to - from, 0.1)};
}

function shortName(job) {
  const column = columns.find(one => one.key === 'job');
  return column ? column.texts[job.n] : job.name;
}

function settingsOf(job) {
  return parameters.filter(one => one.values[job.n] !== null)
    .map(one => `${one.head}=${one.texts[job.n]}`).join(' ');
}

function whereOf(one) {
  if (one.machine < 0) return '';
  const name = data.machines[one.machine].name;
  if (!one.gpus.length) return name;
  return `${name} GPU${one.gpus.length > 1 ? 's' : ''} ${one.gpus.join(', ')}`;
}

// Return the lines of a tip about a job and one of its attempts; the first line is the head.
function tellJob(job, one = job.attempts.at(-1)) {
  const lines = [`${job.name}: ${one ? one.state : job.state}`
    + (one && !one.isLatest ? ', an earlier attempt' : '')];
  if (job.command) lines.push(job.command);
  if (one) {
    const length = (one.ended ?? now) - one.began;
    lines.push(`${rangeOfTimes(one.began, one.ended)}: ${durationOf(length)}`
      + (whereOf(one) && ` on ${whereOf(one)}`));
    if (one.since !== null) lines.push(`waited ${durationOf(one.began - one.since)} before`);
  }
  const exit = one ? one.exit : job.exit, [memory, gpuMemory] = job.used, facts = [];
  if (exit !== null) facts.push(`exit code ${exit}`);
  if (memory !== null) facts.push(`memory ${shown(memory)} MB`);
  if (gpuMemory !== null) facts.push(`GPU memory ${shown(gpuMemory)} MB`);
  if (facts.length) lines.push(facts.join(', '));
  if (job.reason) lines.push(job.reason);
  if (job.last) lines.push(`last line: ${job.last}`);
  return lines;
}

// ---- The filter: the jobs that pass it, and the drawings that follow it ----

const chosen = {text: '', states: new Set(), reason: null, jobs, passes: jobs.map(() => true)};
const followers = [];
const SIGNED = /^([^<>=!]+)(<=|>=|!=|=|<|>)(.+)$/;
let haystacks = null;

function haystackOf(job) {
  haystacks = haystacks || new Array(jobs.length);
  haystacks[job.n] = haystacks[job.n] || [job.name, job.command, job.state, job.reason, job.last,
    ...columns.map(column => column.texts[job.n])].join('\n').toLowerCase();
  return haystacks[job.n];
}

// Return a function that tells whether a job passes one word of the filter.
function testOf(word) {
  const match = SIGNED.exec(word);
  const name = match && match[1].toLowerCase();
  const column = match && columns.find(one => [one.key, one.head].some(
    text => text.toLowerCase() === name));
  if (!column) return job => haystackOf(job).includes(word.toLowerCase());
  const number = Number(match[3]), sign = match[2];
  return job => {
    const value = column.values[job.n], text = column.texts[job.n];
    const same = text === match[3] || value === match[3] || (value !== null && value === number);
    if (sign === '=') return same;
    if (sign === '!=') return !same;
    if (typeof value !== 'number' || Number.isNaN(number)) return false;
    return {'<': value < number, '<=': value <= number, '>': value > number,
      '>=': value >= number}[sign];
  };
}

function choose() {
  const tests = chosen.text.split(/\s+/).filter(Boolean).map(testOf);
  chosen.passes = jobs.map(job => (!chosen.states.size || chosen.states.has(job.state))
    && (!chosen.reason || reasonKey(job) === chosen.reason.key)
    && tests.every(test => test(job)));
  chosen.jobs = jobs.filter(job => chosen.passes[job.n]);
  showTable();
  showReason();
  later(followers);
}

// Call these functions in turn, with pauses to handle input; drop those of an earlier call.
let waiting = [];

function later(acts) {
  const begin = !waiting.length;
  waiting = [...acts];
  if (begin) setTimeout(doNext);
}

function doNext() {
  const until = performance.now() + 12;
  while (waiting.length && performance.now() < until) waiting.shift()();
  if (waiting.length) setTimeout(doNext);
}

// ---- The table of jobs ----

// isPaper: the page is being printed. Its heads are texts: browsers do not repeat buttons.
const table = {rows: [], isPaper: false, column: null, descending: false, page: 0, size: 50};
const collator = new Intl.Collator('en', {numeric: true});

function compare(one, other) {
  if (typeof one === 'number' && typeof other === 'number') return one - other;
  if (typeof one === 'number') return -1;
  if (typeof other === 'number') return 1;
  return collator.compare(one, other);
}

function isMissing(value) {
  return value === null || value === 'nan';
}

function sortRows() {
  table.rows = chosen.jobs.map(job => job.n);
  if (!table.column) return;
  const values = table.column.values, turn = table.descending ? -1 : 1;
  const number = value => ({inf: Infinity, '-inf': -Infinity})[value] ?? value;
  const there = table.rows.filter(n => !isMissing(values[n]));
  there.sort((a, b) => turn * compare(number(values[a]), number(values[b])) || a - b);
  table.rows = [...there, ...table.rows.filter(n => isMissing(values[n]))];
}

function sortBy(column) {
  if (table.column !== column) [table.column, table.descending] = [column, false];
  else if (!table.descending) table.descending = true;
  else table.column = null;
  table.page = 0;
  showTable();
}

function showHeads() {
  const firstMetric = columns.find(column => column.kind === 'metric');
  put('heads', el('tr', {}, columns.map(column => {
    const direction = table.column !== column ? 'none' :
      table.descending ? 'descending' : 'ascending';
    return el('th', {scope: 'col', 'aria-sort': direction, 'data-key': column.key,
      class: `${column.numeric ? 'number' : ''} ${column === firstMetric ? 'first-metric' : ''}`},
    table.isPaper ? column.head : button(column.head, () => sortBy(column), {class: 'plain'}));
  })));
}

function rowOf(job) {
  const firstMetric = columns.find(column => column.kind === 'metric');
  return el('tr', {'data-job': job.n}, columns.map((column, at) => {
    const text = column.texts[job.n];
    const isBad = column.key === 'exit' && job.exit;
    const kind = [column.numeric ? 'number' : '', column.kind, isBad ? 'bad' : '',
      column === firstMetric ? 'first-metric' : '', text.length > 28 ? 'long' : ''].join(' ');
    if (at) return el('td', {class: kind, title: text.length > 28 ? text : null}, text);
    return el('td', {}, el('span', {class: `sign ${job.state}`, 'aria-hidden': 'true',
      title: job.state}, SIGNS[job.state]),
    button(text || job.name, () => openJob(job), {class: 'link',
      'aria-label': `${job.name}, ${job.state}: open its output`}));
  }));
}

function showTable() {
  sortRows();
  const heads = byId('heads');
  const focused = heads.contains(document.activeElement)
    && document.activeElement.closest('th').dataset.key;
  showHeads();
  if (focused) [...heads.querySelectorAll('th')].find(
    head => head.dataset.key === focused)?.querySelector('button').focus();
  const count = table.rows.length, last = Math.max(Math.ceil(count / table.size) - 1, 0);
  table.page = Math.min(Math.max(table.page, 0), last);
  const from = table.page * table.size, to = Math.min(from + table.size, count);
  put('rows', table.rows.slice(from, to).map(n => rowOf(jobs[n])));
  byId('page-before').disabled = table.page === 0;
  byId('page-after').disabled = table.page === last;
  byId('page-before').hidden = byId('page-after').hidden = last === 0;
  const all = count === jobs.length ? '' : ` of ${jobs.length.toLocaleString('en')}`;
  byId('page-now').textContent = last === 0 ? `${many(count, 'job')}${all}` :
    `${(from + 1).toLocaleString('en')} to ${to.toLocaleString('en')} of ${many(count, 'job')}`;
}

function turnPage(step) {
  table.page += step;
  showTable();
}

// Return [state, count] in the order of the states.
function inOrder(counts) {
  return data.states.map(state => state || 'unknown').filter(state => counts.has(state))
    .map(state => [state, counts.get(state)]);
}

function showStates() {
  const counts = new Map();
  for (const job of jobs) counts.set(job.state, (counts.get(job.state) || 0) + 1);
  put('states', inOrder(counts).map(([state, count]) => button(
    [el('span', {class: `sign ${state}`, 'aria-hidden': 'true'}, SIGNS[state]),
      `${count.toLocaleString('en')} ${state}`],
    event => {
      if (!chosen.states.delete(state)) chosen.states.add(state);
      event.currentTarget.setAttribute('aria-pressed', chosen.states.has(state));
      choose();
    }, {'aria-pressed': chosen.states.has(state), 'data-state': state})),
  button('', () => { chosen.reason = null; choose(); }, {id: 'only-reason', hidden: true}));
}

function showReason() {
  const one = byId('only-reason');
  one.hidden = chosen.reason === null;
  const words = chosen.reason?.words;
  one.textContent = `only: ${words} \u2715`;
  one.setAttribute('aria-label', `Only jobs that failed so: ${words}. Show all again`);
}

function beginTable() {
  put('shared', data.shared.map(line => el('p', {class: 'code muted'}, line)));
  const example = parameters.find(one => one.numeric) || columns.find(one => one.numeric);
  if (example) {
    byId('filter-example').textContent = `${example.head}>${example.texts.find(Boolean)}`;
  }
  byId('filter').value = chosen.text;
  let pending = 0;
  byId('filter').addEventListener('input', () => {
    clearTimeout(pending);
    pending = setTimeout(() => {
      chosen.text = byId('filter').value;
      table.page = 0;
      choose();
    }, 80);
  });
  byId('page-before').addEventListener('click', () => turnPage(-1));
  byId('page-after').addEventListener('click', () => turnPage(1));
  showStates();
}

// ---- The output of a job ----

function linksOf(job) {
  const address = end => (data.jobs.links[job.n] ?? job.folder
    + encodeURIComponent(job.name)) + end;
  const link = (text, end) => el('a', {href: address(end)}, text);
  return [job.sizes[0] === null ? null : link('stdout', '.out'), job.sizes[1] === null ? null :
    link('stderr', '.err'), job.state === 'running' ? null : link('folder', '/')].filter(Boolean);
}

function streamPart(name, text, size) {
  if (size === null) return [el('h3', {}, name), el('p', {class: 'muted'}, 'There is no file.')];
  const shown = size > 0 && !text ? ', not in this page' :
    size > text.length + 1 ? ', its end' : '';
  const part = [el('h3', {}, `${name}: ${bytesOf(size)}${shown}`)];
  if (text) part.push(el('pre', {tabindex: 0, 'aria-label': name}, text));
  return part;
}

function factsPart(job) {
  const pairs = [['Command', el('span', {class: 'code'}, job.command)]];
  for (const one of job.attempts) {
    const waited = one.since === null ? '' : `, after waiting ${durationOf(one.began - one.since)}`;
    const exit = one.exit === null ? one.state : `${one.state}, exit code ${one.exit}`;
    const length = durationOf((one.ended ?? now) - one.began), where = whereOf(one);
    pairs.push([one.isLatest ? 'Ran' : 'Earlier attempt', `${rangeOfTimes(one.began, one.ended)} `
      + `(${length})${where && ` on ${where}`}${waited}: ${exit}`]);
  }
  if (job.reason) pairs.push(['Why it failed', job.reason]);
  const used = [['MB', 0], ['MB of GPU memory', 1], ['cores', 2]].map(([unit, at]) => {
    const asked = job.asked[at] === null ? '' : ` (asked for ${shown(job.asked[at])})`;
    return job.used[at] === null ? '' : `${shown(job.used[at])} ${unit}${asked}`;
  }).filter(Boolean);
  if (used.length) pairs.push(['Used', used.join(', ')]);
  const values = columns.filter(one => one.kind !== 'fact' && one.values[job.n] !== null);
  if (values.length) pairs.push(['Values', values.map(one => `${one.head} ${one.texts[job.n]}`)
    .join(', ')]);
  return el('dl', {}, pairs.map(([what, text]) => [el('dt', {}, what), el('dd', {}, text)]));
}

function openJob(job) {
  const dialog = byId('details'), [out, err] = data.jobs.tails[job.n] || ['', ''];
  const parts = [streamPart('stdout', out, job.sizes[0]), streamPart('stderr', err, job.sizes[1])];
  if (job.exit) parts.reverse();
  const links = linksOf(job);
  hideTip();
  dialog.replaceChildren(
    el('div', {class: 'top'}, el('h2', {id: 'details-head'},
      el('span', {class: `sign ${job.state}`, 'aria-hidden': 'true'}, SIGNS[job.state]),
      `${job.name}: ${job.state}`),
    button('Close', () => dialog.close(), {autofocus: true})),
    factsPart(job), ...parts.flat(),
    links.length ? el('p', {class: 'files'}, 'Files: ', links.flatMap(
      (link, at) => at ? [', ', link] : [link])) : '');
  dialog.showModal();
}

// ---- Marks: the parts of drawings that can be pointed at, focused and opened ----

function hideTip() {
  byId('tip').hidden = true;
  byId('wait-of')?.replaceChildren();
  document.querySelectorAll('.mark.on').forEach(mark => mark.classList.remove('on'));
}

function showTip(lines, box) {
  const tip = byId('tip');
  tip.replaceChildren(...lines.map((line, at) => el('div',
    {class: at === 1 && lines.length > 3 ? 'code' : null}, line)));
  tip.hidden = false;
  const left = Math.min(Math.max(box.left, 8), innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(left, 8)}px`;
  const below = Math.min(box.bottom + 8, innerHeight - tip.offsetHeight - 4);
  tip.style.top = `${above > 4 ? above : below}px`;
}

// After scrolling, show the tip of the focused mark again; hide a tip that the pointer opened.
function followTip() {
  const one = document.activeElement, mark = one && one.closest('.mark');
  if (byId('tip').hidden) return;
  if (mark) mark.dispatchEvent(new FocusEvent('focusin', {bubbles: true}));
  else if (one && one.matches('svg[tabindex]')) one.dispatchEvent(new FocusEvent('focus'));
  else hideTip();
}

function visibleBox(mark) {
  const box = mark.getBoundingClientRect(), middle = (box.left + box.right) / 2;
  return box.width > 300 ? {left: middle, top: box.top, bottom: box.bottom} : box;
}

function neighbour(mark, marks, key) {
  const at = marks.indexOf(mark);
  if (key === 'ArrowRight') return marks[at + 1];
  if (key === 'ArrowLeft') return marks[at - 1];
  if (key === 'Home') return marks[0];
  if (key === 'End') return marks.at(-1);
  const box = mark.getBoundingClientRect(), up = key === 'ArrowUp';
  const x = (box.left + box.right) / 2, y = (box.top + box.bottom) / 2;
  let best = null, least = Infinity;
  for (const other of marks) {
    const its = other.getBoundingClientRect(), step = (its.top + its.bottom) / 2 - y;
    if (other === mark || (up ? step > -1 : step < 1)) continue;
    const aside = Math.max(its.left - x, x - its.right, 0);
    const far = 3 * Math.abs(step) + aside;
    if (far < least) [best, least] = [other, far];
  }
  return best;
}

// Show tips at the marks of a drawing. tell(mark): the lines; open(mark): called on a click.
function bindMarks(area, tell, open) {
  const markOf = event => event.target.closest && event.target.closest('.mark');
  const show = (mark, box) => { hideTip(); mark.classList.add('on'); showTip(tell(mark), box); };
  area.addEventListener('pointerover', event => {
    const mark = markOf(event);
    if (!mark) return;
    const box = mark.getBoundingClientRect(), isWide = box.width > 300;
    show(mark, isWide || mark.classList.contains('curve')
      ? {left: event.clientX, top: event.clientY - 6, bottom: event.clientY + 12} : box);
  });
  area.addEventListener('pointerout', event => { if (markOf(event)) hideTip(); });
  area.addEventListener('focusin', event => {
    const mark = markOf(event);
    if (!mark) return;
    area.querySelectorAll('.mark[tabindex="0"]').forEach(one => one.setAttribute('tabindex', -1));
    mark.setAttribute('tabindex', 0);
    show(mark, visibleBox(mark));
  });
  area.addEventListener('focusout', hideTip);
  area.addEventListener('click', event => { if (markOf(event)) open(markOf(event)); });
  area.addEventListener('keydown', event => {
    const mark = markOf(event);
    if (!mark) return;
    if (event.key === 'Enter' || event.key === ' ') open(mark);
    else if (/^(Arrow|Home|End)/.test(event.key)) {
      const next = neighbour(mark, [...area.querySelectorAll('.mark')], event.key);
      if (next) { next.setAttribute('tabindex', 0); next.focus(); }
    } else return;
    event.preventDefault();
  });
}

function isReachable(area) {
  const first = area.querySelector('.mark');
  if (first && !area.querySelector('.mark[tabindex="0"]')) first.setAttribute('tabindex', 0);
}

// ---- Axes ----

function niceStep(length, most) {
  const rough = length / Math.max(most, 1), power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find(one => one * power >= rough) * power;
}

function linearScale(low, high, from, to, room = 70) {
  if (low === high) {
    const aside = Math.abs(low) / 2 || 1;
    [low, high] = [low - aside, high + aside];
  }
  const at = value => from + (value - low) / (high - low) * (to - from);
  const step = niceStep(high - low, Math.abs(to - from) / room), ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high + step / 1e6; n++) {
    ticks.push(Number((n * step).toPrecision(12)));
  }
  return {at, ticks};
}

function logScale(low, high, from, to) {
  const [a, b] = low === high ? [Math.log10(low) - 0.5, Math.log10(low) + 0.5] :
    [Math.log10(low), Math.log10(high)];
  const at = value => from + (Math.log10(value) - a) / (b - a) * (to - from);
  const each = Math.max(Math.ceil((b - a) / (Math.abs(to - from) / 60)), 1), ticks = [];
  for (let n = Math.ceil(a - 1e-9); n <= b + 1e-9; n++) if (n % each === 0) ticks.push(10 ** n);
  if (ticks.length > 2) return {at, ticks: ticks.map(tick => Number(tick.toPrecision(3)))};
  for (let n = Math.floor(a); n <= b; n++) {
    for (const part of [2, 5]) {
      const tick = part * 10 ** n;
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return {at, ticks: ticks.sort((x, y) => x - y).map(tick => Number(tick.toPrecision(3)))};
}

function spansDecades(values, ratio) {
  const low = Math.min(...values), high = Math.max(...values);
  return low > 0 && high / low >= ratio;
}

function scaleFor(values, isLog, from, to, pad = 0.05) {
  const finite = values.filter(Number.isFinite);
  let low = finite.length ? finite.reduce((a, b) => Math.min(a, b)) : 0;
  let high = finite.length ? finite.reduce((a, b) => Math.max(a, b)) : 1;
  if (isLog) return logScale(low / (high / low) ** pad, high * (high / low) ** pad, from, to);
  const room = (high - low) * pad;
  return linearScale(low - room, high + room, from, to, from > to ? 40 : 70);
}

const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200,
  86400, 172800, 604800];

function timeTicks(from, to, most) {
  const step = STEPS.find(one => (to - from) / one <= most) || niceStep(to - from, most);
  const zone = 60 * dateOf(from).getTimezoneOffset(), ticks = [];
  let at = Math.ceil((data.origin + from - zone) / step) * step - data.origin + zone;
  for (; at <= to; at += step) ticks.push(at);
  return {ticks, text: time => dateText(time, step >= 86400 ? DAY :
    {...CLOCK, second: step < 60 ? '2-digit' : undefined})};
}

function yAxis(scale, left, right, label) {
  return [scale.ticks.map(tick => [
    draw('line', {class: 'grid', x1: left, x2: right, y1: scale.at(tick), y2: scale.at(tick)}),
    draw('text', {x: left - 6, y: scale.at(tick) + 4, 'text-anchor': 'end'}, shown(tick))]),
  draw('text', {class: 'strong', x: 0, y: 12}, label)];
}

function picture(width, height, facts, ...children) {
  return draw('svg', {width, height, viewBox: `0 0 ${width} ${height}`, ...facts}, ...children);
}

function widthOf(id) {
  return Math.max(byId(id).clientWidth, 240);
}

// ---- The timeline ----

const view = {from: span.from, to: span.to, lanes: [], rows: [], height: 0, focus: null};

function laneKey(machine, gpu) {
  return `${machine}/${gpu}`;
}

// Return the lanes, in the order of machines and GPUs: {machine, gpu (null: none), attempts}.
function findLanes() {
  const lanes = new Map();
  const lane = (machine, gpu) => {
    const key = laneKey(machine, gpu);
    if (!lanes.has(key)) lanes.set(key, {machine, gpu, attempts: []});
    return lanes.get(key);
  };
  data.machines.forEach((one, machine) => {
    (one.facts.gpus || []).forEach(gpu => lane(machine, gpu.index));
    Object.keys(one.use ? one.use.gpus : {}).forEach(gpu => lane(machine, Number(gpu)));
  });
  for (const job of jobs) {
    for (const one of job.attempts) {
      const gpus = one.gpus.length ? one.gpus : [null];
      gpus.forEach(gpu => lane(one.machine, gpu).attempts.push(one));
    }
  }
  data.machines.forEach((_, machine) => {
    if (![...lanes.values()].some(one => one.machine === machine)) lane(machine, null);
  });
  const found = [...lanes.values()].filter(one => one.machine >= 0);
  found.sort((a, b) => a.machine - b.machine || (a.gpu ?? -1) - (b.gpu ?? -1));
  return found;
}

function laneName(lane) {
  const name = data.machines[lane.machine].name;
  return lane.gpu === null ? name : `${name} GPU ${lane.gpu}`;
}

// Spread the attempts of a lane over the fewest rows in which none overlap.
function packed(attempts) {
  const rows = [], ends = [];
  attempts.sort((a, b) => a.began - b.began || a.job - b.job);
  for (const one of attempts) {
    let at = ends.findIndex(end => end <= one.began + 1e-6);
    if (at < 0) at = rows.push([]) - 1;
    rows[at].push(one);
    ends[at] = Math.max(one.ended ?? now, one.began);
  }
  return rows.length ? rows : [[]];
}

// Return the share of the time in which at least one of the attempts ran.
function busyShare(attempts) {
  let busy = 0, until = -Infinity;
  for (const one of [...attempts].sort((a, b) => a.began - b.began)) {
    const end = one.ended ?? now;
    busy += Math.max(end - Math.max(one.began, until), 0);
    until = Math.max(until, end);
  }
  return Math.min(busy / span.length, 1);
}

function gutters() {
  const width = widthOf('lanes');
  const longest = Math.max(...view.lanes.map(lane => laneName(lane).length), 6);
  const left = Math.min(7 * longest + 14, width < 560 ? 96 : 230);
  return {left, right: width - 46, width};
}

function beginTimeline() {
  view.lanes = findLanes();
  byId('timeline').hidden = !view.lanes.length;
  if (!view.lanes.length) return;
  const packs = view.lanes.map(lane => packed(lane.attempts));
  const count = packs.reduce((sum, rows) => sum + rows.length, 0);
  const height = count <= 40 ? 18 : count <= 120 ? 13 : 9;
  let y = 2;
  view.lanes.forEach((lane, at) => {
    lane.y = y;
    lane.share = busyShare(lane.attempts);
    for (const attempts of packs[at]) {
      const own = packs[at].length === 1 ? 18 : height;
      view.rows.push({lane, attempts, y, height: own});
      y += own;
    }
    y = Math.max(y, lane.y + 16) + 5;
    lane.bottom = y - 3;
  });
  view.height = y;
  if (view.lanes.length <= 40) view.lanes.forEach(lane => unfolded.add(lane.machine));
  showLegend();
  bindMarks(byId('lanes'), tellBar, openBar);
  byId('lanes').addEventListener('scroll', () => requestAnimationFrame(showLanes));
  byId('lanes').addEventListener('focusin', showWait);
  byId('lanes').addEventListener('pointerover', showWait);
  const acts = {'zoom-in': () => zoom(0.5), 'zoom-out': () => zoom(2), earlier: () => shift(-0.5),
    later: () => shift(0.5), 'zoom-all': () => zoom(Infinity)};
  for (const [id, act] of Object.entries(acts)) byId(id).addEventListener('click', act);
  followers.push(showLanes);
}

function showLegend() {
  const states = new Set(jobs.flatMap(job => job.attempts.map(one => one.state)));
  const box = {x: 1, y: 1, width: 24, height: 10};
  const swatch = (kind, text) => el('span', {}, draw('svg', {width: 26, height: 12,
    'aria-hidden': 'true'}, draw('rect', {class: `bar ${kind}`, ...box})), text);
  const before = jobs.some(job => job.attempts.length > 1);
  const there = data.states.map(state => state || 'unknown').filter(state => states.has(state));
  put('legend', there.map(state => swatch(state, MEANINGS[state] || state)),
    before ? swatch('finished before', 'an earlier attempt (dashed edge)') : '');
}

function zoom(by) {
  const middle = (view.from + view.to) / 2;
  const half = Math.min(Math.max((view.to - view.from) * by, span.length / 4000), span.length) / 2;
  [view.from, view.to] = [middle - half, middle + half];
  shift(0);
}

function shift(share) {
  const length = view.to - view.from;
  const from = Math.min(Math.max(view.from + share * length, span.from), span.to - length);
  [view.from, view.to] = [from, from + length];
  showTimeline();
}

function showTimeline() {
  if (!view.lanes.length) return;
  const isAll = view.to - view.from >= 0.999 * span.length;
  byId('zoom-out').disabled = byId('zoom-all').disabled = isAll;
  byId('earlier').disabled = view.from <= span.from + 1e-9;
  byId('later').disabled = view.to >= span.to - 1e-9;
  showTimeAxis();
  showLanes();
}

// Return [[time, the number of jobs that wait from this time on]].
function waitingSteps() {
  const changes = [];
  for (const job of jobs) {
    for (const one of job.attempts) {
      if (one.since !== null) changes.push([one.since, 1], [one.began, -1]);
    }
  }
  changes.sort((a, b) => a[0] - b[0]);
  let count = 0;
  return changes.map(([time, by]) => [time, count += by]);
}

function showTimeAxis() {
  const {left, right, width} = gutters(), scale = linearScale(view.from, view.to, left, right);
  const {ticks, text} = timeTicks(view.from, view.to, (right - left) / 90);
  const steps = waitingSteps(), most = Math.max(...steps.map(one => one[1]), 0);
  const parts = [];
  if (most) {
    let path = `M${left},38`, y = 38;
    for (const [time, count] of evenlyOf(steps, 2000)) {
      const x = Math.min(Math.max(scale.at(time), left), right);
      path += `L${x.toFixed(1)},${y}`;
      y = 38 - 32 * count / most;
      path += `L${x.toFixed(1)},${y.toFixed(1)}`;
    }
    path += `L${right},${y.toFixed(1)}L${right},38Z`;
    parts.push(draw('path', {class: 'waiting', d: path}),
      draw('text', {class: 'strong', x: 0, y: 32}, 'waiting'),
      draw('text', {x: right + 5, y: 32}, most.toLocaleString('en')));
  }
  const top = most ? 42 : 4;
  parts.push(draw('line', {class: 'axis', x1: left, x2: right, y1: top, y2: top}));
  for (const tick of ticks) {
    const x = scale.at(tick);
    parts.push(draw('line', {class: 'axis', x1: x, x2: x, y1: top, y2: top + 5}),
      draw('text', {x, y: top + 17, 'text-anchor': 'middle'}, text(tick)));
  }
  const label = `Axis from ${timeOf(view.from)} to ${timeOf(view.to)}`
    + (most ? `; at most ${many(most, 'job')} waited` : '');
  put('time-axis', picture(width, top + 22, {role: 'img', 'aria-label': label}, parts));
}

function evenlyOf(list, most) {
  if (list.length <= most) return list;
  return Array.from({length: most}, (_, n) => list[Math.round(n * (list.length - 1) / (most - 1))]);
}

// Draw only the visible rows; draw one bar for neighbours that are too thin to tell apart.
function showLanes() {
  if (!view.lanes.length) return;
  const area = byId('lanes'), {left, right, width} = gutters();
  const scale = linearScale(view.from, view.to, left, right);
  const top = view.all ? 0 : area.scrollTop - 200;
  const bottom = view.all ? view.height : area.scrollTop + Math.max(area.clientHeight, 500) + 200;
  const parts = [draw('g', {id: 'wait-of'})], visible = one => one.y < bottom && one.y >= top;
  const focused = area.contains(document.activeElement) && document.activeElement.dataset.key;
  for (const lane of view.lanes) {
    if (lane.y > bottom || lane.bottom < top) continue;
    const idle = lane.share < 0.005 ? 'no job' : percent(lane.share), y = lane.bottom;
    parts.push(draw('line', {class: 'lane-line', x1: 0, x2: width, y1: y, y2: y}),
      draw('svg', {x: 0, y: lane.y, width: left - 8, height: 18},
        draw('text', {class: 'strong', x: 0, y: 13}, laneName(lane))),
      draw('text', {x: right + 5, y: lane.y + 13}, idle));
  }
  view.rows.filter(visible).forEach(row => parts.push(...barsOf(row, scale, left, right)));
  put('lanes', picture(width, view.height, {}, parts));
  isReachable(area);
  if (focused) area.querySelector(`[data-key="${focused}"]`)?.focus({preventScroll: true});
}

function barsOf(row, scale, left, right) {
  const waits = [], bars = [];
  let end = left, open = null;
  for (const one of row.attempts) {
    const x = Math.max(scale.at(one.began), left);
    const to = Math.min(scale.at(one.ended ?? now), right);
    if (to < left || x > right) { end = Math.max(end, Math.min(to, right)); continue; }
    const since = one.since === null ? x : Math.max(scale.at(one.since), end);
    if (x - since > 3) waits.push(draw('line', {class: 'wait', x1: since, x2: x - 1,
      y1: row.y + row.height / 2, y2: row.y + row.height / 2}));
    end = to;
    const thin = to - x < 2.2;
    if (open && thin && open.state === one.state && x - open.x < 2.2) open.attempts.push(one);
    else {
      open = {attempts: [one], state: one.state, x, to};
      bars.push(open);
    }
    open.to = Math.max(open.to, to);
    if (!thin) open = null;
  }
  return [...waits, ...bars.map(bar => barOf(bar, row))];
}

function barOf({attempts, state, x, to}, row) {
  const [one] = attempts, job = jobs[one.job], width = Math.max(to - x, 1.6);
  const passes = attempts.some(other => chosen.passes[other.job]);
  const key = `${one.job}-${job.attempts.indexOf(one)}-${row.lane.gpu}`;
  const label = attempts.length > 1
    ? `${many(attempts.length, 'job')}, ${state}: zoom in to see each`
    : tellJob(job, one).filter((_, at) => at !== 1).join('; ');
  const kinds = [state, one.isLatest ? '' : 'before', passes ? '' : 'faded'].join(' ');
  const facts = {class: `mark bar ${kinds}`, x: x.toFixed(1), y: row.y + 1,
    width: width.toFixed(1), height: row.height - 2, rx: 1.5,
    role: 'button', tabindex: -1, 'aria-label': label, 'data-key': key, 'data-job': one.job,
    'data-attempt': job.attempts.indexOf(one), 'data-count': attempts.length};
  const bar = draw('rect', facts);
  const text = shortName(job);
  if (row.height < 14 || width < 7 * text.length + 8 || state !== 'finished' || !passes) return bar;
  return [bar, draw('text', {class: 'on-bar', x: x + 5, y: row.y + row.height / 2 + 3.7}, text)];
}

function barAttempt(mark) {
  return jobs[mark.dataset.job].attempts[mark.dataset.attempt];
}

function tellBar(mark) {
  const one = barAttempt(mark), count = Number(mark.dataset.count);
  if (count > 1) return [`${many(count, 'job')}, ${one.state}`, 'Zoom in to see each.'];
  return tellJob(jobs[one.job], one);
}

function openBar(mark) {
  if (mark.dataset.count === '1') return openJob(jobs[mark.dataset.job]);
  const one = barAttempt(mark), length = (view.to - view.from) / 8;
  [view.from, view.to] = [one.began - length / 2, one.began + length / 2];
  return shift(0);
}

// Draw a line for the time that the job of this bar waited.
function showWait(event) {
  const group = byId('wait-of'), mark = event.target.closest('.mark');
  if (!group || !mark) return;
  const one = barAttempt(mark), {left, right} = gutters();
  const scale = linearScale(view.from, view.to, left, right);
  const y = Number(mark.getAttribute('y')) + Number(mark.getAttribute('height')) / 2;
  const from = one.since === null ? 0 : Math.max(scale.at(one.since), left);
  const to = scale.at(one.began);
  group.parentNode.append(group);
  group.replaceChildren(...(one.since !== null && to > from ? [
    draw('line', {class: 'wait strong', x1: from, x2: to, y1: y, y2: y})] : []));
}

// ---- Machines: their use over time ----

function meanOf(values) {
  const there = values.filter(value => typeof value === 'number');
  return there.length ? there.reduce((sum, value) => sum + value, 0) / there.length : null;
}

function leastOf(values) {
  const there = values.filter(value => typeof value === 'number');
  return there.length ? there.reduce((a, b) => Math.min(a, b)) : null;
}

function mostOf(values) {
  const there = values.filter(value => typeof value === 'number');
  return there.length ? there.reduce((a, b) => Math.max(a, b)) : null;
}

// Return a row for each machine and GPU, with its attempts and its recorded use.
function useRows() {
  const of = data.machines.map(() => []);
  jobs.forEach(job => job.attempts.forEach(one => of[one.machine]?.push(one)));
  return data.machines.flatMap((one, machine) => {
    const attempts = of[machine];
    const gpus = view.lanes.filter(lane => lane.machine === machine && lane.gpu !== null);
    const {cores = null, memory = null, t = null} = one.use || {};
    const own = {name: one.name, machine, attempts, gpus: gpus.length, what: 'cores', times: t,
      busy: cores, memory};
    return [own, ...gpus.map(({gpu}) => {
      const seen = one.use && one.use.gpus[gpu];
      return {name: `${one.name} GPU ${gpu}`, machine, isGpu: true, what: 'GPU',
        attempts: attempts.filter(other => other.gpus.includes(gpu)), busy: seen && seen.busy,
        memory: seen && seen.memory, times: one.use && one.use.t};
    })];
  });
}

function linePath(xs, ys) {
  let path = '', pen = 'M';
  xs.forEach((x, at) => {
    if (ys[at] === null || !Number.isFinite(ys[at])) pen = 'M';
    else {
      path += `${pen}${x.toFixed(1)},${ys[at].toFixed(1)}`;
      pen = 'L';
    }
  });
  return path;
}

// Return [[from, to)] of the parts of a series; a null or a long time without samples ends one.
function unbroken(times, values) {
  const steps = times.slice(1).map((time, at) => time - times[at]).sort((a, b) => a - b);
  const usual = steps[Math.floor(steps.length / 2)] || 1, parts = [];
  let from = null;
  times.forEach((time, at) => {
    const gap = at && time - times[at - 1] > 6 * usual;
    if (from !== null && (values[at] === null || gap)) { parts.push([from, at]); from = null; }
    if (values[at] !== null && from === null) from = at;
  });
  if (from !== null) parts.push([from, times.length]);
  return parts;
}

// Return at least two points: a single point would draw no line.
function atLeastTwo(xs, ys) {
  return xs.length > 1 ? [xs, ys] : [[xs[0] - 2, xs[0] + 2], [ys[0], ys[0]]];
}

function useChart(row, width) {
  const height = 44, scale = linearScale(span.from, span.to, 0, width), parts = [];
  const y = share => 33 - 31 * Math.min(share, 1);
  parts.push(draw('line', {class: 'grid', x1: 0, x2: width, y1: y(0), y2: y(0)}),
    draw('line', {class: 'grid', x1: 0, x2: width, y1: y(1), y2: y(1)}));
  const marks = [...row.attempts].sort((a, b) => a.began - b.began).reduce((path, one) => {
    const x = scale.at(one.began), to = Math.max(scale.at(one.ended ?? now), x + 0.8);
    if (to <= path.end) return path;
    const from = Math.max(x, path.end);
    return {d: `${path.d}M${from.toFixed(1)},36H${to.toFixed(1)}V39H${from.toFixed(1)}Z`, end: to};
  }, {d: '', end: 0});
  parts.push(draw('path', {class: 'had-job', d: marks.d}));
  for (const [from, to] of row.busy ? unbroken(row.times, row.busy) : []) {
    const [xs, ys] = atLeastTwo(row.times.slice(from, to).map(scale.at),
      row.busy.slice(from, to).map(y));
    const line = linePath(xs, ys), floor = `L${xs.at(-1)},${y(0)}L${xs[0]},${y(0)}Z`;
    parts.push(draw('path', {class: 'busy-area', d: line + floor}),
      draw('path', {class: 'busy-line', d: line}));
  }
  for (const [from, to] of row.memory ? unbroken(row.times, row.memory) : []) {
    parts.push(draw('path', {class: 'memory-line', d: linePath(...atLeastTwo(
      row.times.slice(from, to).map(scale.at), row.memory.slice(from, to).map(y)))}));
  }
  const cursor = draw('line', {class: 'cursor', y1: 0, y2: 40, x1: -9, x2: -9});
  const label = `${row.name} over time: ` + (!row.busy ? 'nothing was seen'
    : `${row.what} busy ${percent(meanOf(row.busy))} in the mean, `
      + `memory at most ${percent(mostOf(row.memory))}`);
  const chart = picture(width, height, {role: 'img', 'aria-label': label, tabindex: 0},
    parts, cursor);
  bindCursor(chart, cursor, row, scale, width);
  return chart;
}

function bindCursor(chart, cursor, row, scale, width) {
  let at = 0;
  const times = row.times || [];
  const show = () => {
    if (!times.length) return;
    const x = scale.at(times[at]), box = chart.getBoundingClientRect();
    fill(cursor, {x1: x, x2: x}, []);
    const parts = [[row.what, row.busy], ['memory', row.memory]].filter(
      ([, values]) => values && values[at] !== null).map(
      ([what, values]) => `${what} ${percent(values[at])}`);
    const running = row.attempts.filter(
      one => one.began <= times[at] && (one.ended ?? now) >= times[at]);
    showTip([`${row.name}, ${timeOf(times[at])}`, parts.join(', ') || 'nothing was seen',
      many(running.length, 'job')], {left: box.left + x, top: box.top, bottom: box.bottom});
  };
  const hide = () => { fill(cursor, {x1: -9, x2: -9}, []); hideTip(); };
  chart.addEventListener('pointermove', event => {
    const x = event.clientX - chart.getBoundingClientRect().left;
    const time = span.from + x / width * span.length;
    const later = times.findIndex(one => one > time);
    at = later < 0 ? times.length - 1 : Math.max(later - 1, 0);
    show();
  });
  chart.addEventListener('pointerleave', hide);
  chart.addEventListener('focus', show);
  chart.addEventListener('blur', hide);
  chart.addEventListener('keydown', event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    at = Math.min(Math.max(at + step * Math.ceil(times.length / 60), 0), times.length - 1);
    show();
    event.preventDefault();
  });
}

const unfolded = new Set();
const MOST_ROWS = 300;

// Return the name in a row; for a machine with GPUs, a button that shows or hides these.
function foldButton(row) {
  if (row.isGpu) return el('span', {class: 'muted'}, row.name);
  if (!row.gpus) return el('span', {class: 'parameter'}, row.name);
  const isOpen = unfolded.has(row.machine);
  return button([isOpen ? '\u25be ' : '\u25b8 ', row.name], () => {
    if (!unfolded.delete(row.machine)) unfolded.add(row.machine);
    showMachines();
    byId('machines-body').querySelector(`[data-machine="${row.machine}"]`)?.focus();
  }, {class: 'plain', 'aria-expanded': isOpen, 'data-machine': row.machine,
    'aria-label': `${row.name} and its GPUs`});
}

function showMachines() {
  byId('machines').hidden = !data.machines.length;
  if (!data.machines.length) return;
  const all = useRows(), rows = all.filter(row => !row.isGpu || unfolded.has(row.machine))
    .slice(0, MOST_ROWS), isSeen = all.some(row => row.busy && row.busy.some(one => one !== null));
  byId('machines-hint').textContent = isSeen
    ? 'Area: how busy the cores or the GPU were. Dashed line: memory in use. Both count all '
      + 'processes of the machine. Blue marks below: your jobs.'
    : 'How busy the machines were was not recorded. The marks show when they ran your jobs.';
  const width = Math.min(Math.max(widthOf('machines-body') - (isSeen ? 520 : 340), 150), 620);
  const heads = ['', 'over time', 'jobs', 'had a job', 'idle for'];
  if (isSeen) heads.push('busy, mean', 'memory, most');
  const cells = rows.map(row => {
    const share = busyShare(row.attempts), idle = (1 - share) * span.length;
    const found = [foldButton(row), useChart(row, width),
      new Set(row.attempts.map(one => one.job)).size,
      row.attempts.length ? percent(share) : 'no job', durationOf(idle)];
    if (isSeen) found.push(row.busy ? percent(meanOf(row.busy)) : '',
      row.memory ? percent(mostOf(row.memory)) : '');
    return found;
  });
  put('machines-body', tableOf(heads, cells, 'Machines and GPUs'), rows.length < MOST_ROWS ? ''
    : el('p', {class: 'hint'}, `Only the first ${MOST_ROWS} rows are shown.`));
}

// ---- Asked for and used ----

const RESOURCES = [['memory', 'MB', 0], ['GPU memory', 'MB', 1], ['cores', '', 2]];

function askedGroups() {
  return RESOURCES.flatMap(([what, unit, at]) => {
    const groups = new Map();
    for (const job of jobs) {
      if (job.used[at] === null) continue;
      if (!groups.has(job.asked[at])) groups.set(job.asked[at], []);
      groups.get(job.asked[at]).push(job);
    }
    return [...groups].sort((a, b) => compare(a[0] ?? -1, b[0] ?? -1)).map(([asked, members]) => ({
      what, unit, at, asked, jobs: members.sort((a, b) => a.used[at] - b.used[at])}));
  });
}

function useStrip(group, width) {
  const {at, asked} = group, values = group.jobs.map(job => job.used[at]);
  const scale = linearScale(0, Math.max(asked || 0, ...values.slice(-1)) * 1.05 || 1, 4, width - 4);
  const parts = [draw('line', {class: 'axis', x1: 4, x2: width - 4, y1: 43, y2: 43})];
  const counts = new Map();
  for (const job of evenlyOf(group.jobs, 300)) {
    const x = Math.round(scale.at(job.used[at]) * 2) / 2, place = Math.round(x / 5);
    const level = counts.get(place) || 0, step = 3.4;
    counts.set(place, level + 1);
    parts.push(draw('circle', {class: 'mark dot', cx: x, cy: Math.max(38 - step * level, 4), r: 3,
      'data-job': job.n, role: 'button', tabindex: -1,
      'aria-label': `${job.name} used ${shown(job.used[at])} ${group.unit}`}));
  }
  if (asked !== null) {
    const x = scale.at(asked);
    parts.push(draw('line', {class: 'asked', x1: x, x2: x, y1: 6, y2: 50}));
  }
  const strip = picture(width, 52, {role: 'group',
    'aria-label': `${group.what} that jobs used`}, parts);
  const jobOf = mark => jobs[mark.dataset.job];
  bindMarks(strip, mark => tellJob(jobOf(mark)), mark => openJob(jobOf(mark)));
  isReachable(strip);
  return strip;
}

function showAsked() {
  const groups = askedGroups();
  byId('asked').hidden = !jobs.length;
  if (!groups.length) {
    byId('asked-hint').textContent = 'The use by jobs was not measured.';
    return;
  }
  byId('asked-hint').textContent = 'A dot is a job, the upright line is the request. '
    + 'Cores are processor time divided by time, for jobs that ran at least a second.';
  const width = Math.min(Math.max(widthOf('asked-body') - 560, 160), 420);
  put('asked-body', tableOf(['', 'asked for', 'used', 'least', 'middle', 'most', ''],
    groups.map(group => {
      const used = group.jobs.map(job => job.used[group.at]), most = used.at(-1);
      const over = group.asked === null ? 0 : used.filter(one => one > group.asked).length;
      const say = group.asked === null || !group.asked ? '' :
        over ? `${many(over, 'job')} used more` : `at most ${percent(most / group.asked)} of it`;
      return [`${group.what}${group.unit && `, ${group.unit}`} (${many(used.length, 'job')})`,
        group.asked === null ? 'nothing' : String(shown(group.asked)), useStrip(group, width),
        used[0], used[Math.floor(used.length / 2)], most, say];
    }), 'Asked for and used'));
}

// ---- Parameters and metrics ----

const COUNTER = /^(epoch|step|iter(ation)?|batch)s?$/i;
const REPEATS = /^(seed|fold|run|rep|repeat|repetition|trial|id|replica)s?$/i;
const COLOURS = 8;
const MOST_MEANS = 40;
const plot = {metric: null, parameter: null, group: null, log: null};

function isGood(job) {
  return ['finished', 'earlier', 'unknown'].includes(job.state) && !job.exit;
}

function levelsOf(column, some) {
  return [...new Set(some.map(job => column.values[job.n]).filter(value => value !== null))]
    .sort(compare);
}

function textOf(column, value) {
  return column.texts[column.values.indexOf(value)] || shown(value);
}

// Sort the values of a parameter into at most `most` grades. If there are few values, each is one.
// Many numbers become ranges with equally many jobs. Of many words, the last grade has the rest.
function gradesOf(column, some, most) {
  const levels = levelsOf(column, some);
  if (levels.length <= most) {
    return {all: levels.map(value => ({x: value, text: textOf(column, value)})),
      of: job => levels.indexOf(column.values[job.n])};
  }
  if (levels.some(value => typeof value !== 'number')) {
    return {all: levels.slice(0, most).map((value, at) => ({x: value,
      text: at < most - 1 ? textOf(column, value) : `${levels.length - at} others`})),
    of: job => Math.min(levels.indexOf(column.values[job.n]), most - 1)};
  }
  const values = some.map(job => column.values[job.n]).filter(value => value !== null);
  values.sort(compare);
  const count = Math.min(most, 12), ends = Array.from({length: count},
    (_, at) => values[Math.ceil((at + 1) * values.length / count) - 1]);
  const isLog = spansDecades(levels, 50);
  const all = [...new Set(ends)].map((end, at, kept) => {
    const own = values.filter(value => value <= end && (!at || value > kept[at - 1]));
    const middle = isLog ? Math.sqrt(own[0] * end) : (own[0] + end) / 2;
    const text = own[0] === end ? shown(end) : `${shown(own[0])} to ${shown(end)}`;
    return {x: middle, end, text};
  });
  return {all, of: job => all.findIndex(one => column.values[job.n] <= one.end), isRange: true};
}

function spreadOf(values) {
  const mean = meanOf(values);
  const square = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return {mean, deviation: values.length > 1 ? Math.sqrt(square / (values.length - 1)) : null};
}

// Return the groups of good jobs with one value of a parameter (and another one), and their means.
function meansOf(some, metric, parameter, group = null) {
  const isWords = some.some(job => typeof parameter.values[job.n] === 'string');
  const found = new Map(), grades = gradesOf(parameter, some, isWords ? Infinity : MOST_MEANS);
  for (const job of some) {
    const y = metric.values[job.n];
    if (!isGood(job) || !Number.isFinite(y) || parameter.values[job.n] === null) continue;
    const at = grades.of(job), part = group ? group.of(job) : 0, key = `${at}/${part}`;
    if (!found.has(key)) found.set(key, {...grades.all[at], part, values: []});
    found.get(key).values.push(y);
  }
  return [...found.values()].map(one => ({...one, ...spreadOf(one.values)}));
}

// Return the share of a metric's variance that a parameter explains, or null. The share is the
// adjusted R squared, which many values with few jobs each do not raise by themselves.
function explainedBy(some, metric, parameter) {
  const groups = meansOf(some, metric, parameter), all = groups.flatMap(one => one.values);
  if (groups.length < 2 || all.length <= groups.length) return null;
  const square = (values, mean) => values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  const whole = square(all, meanOf(all));
  const within = groups.reduce((sum, one) => sum + square(one.values, one.mean), 0);
  if (!whole) return null;
  return Math.max(1 - within / (all.length - groups.length) / (whole / (all.length - 1)), 0);
}

function bestMetric() {
  const useful = metrics.filter(one => !COUNTER.test(one.head)
    && new Set(one.values.filter(Number.isFinite)).size > 1);
  const named = word => useful.find(one => new RegExp(`(^|[^a-z])${word}`, 'i').test(one.head));
  return named('test') || named('val') || named('eval') || useful[0] || metrics[0] || null;
}

function bestParameter(metric) {
  const varying = parameters.filter(one => levelsOf(one, jobs).length > 1);
  const shares = varying.map(one => explainedBy(jobs, metric, one) ?? -1);
  const ranked = varying.map((one, at) => [shares[at] - (REPEATS.test(one.head) ? 2 : 0), one]);
  ranked.sort((a, b) => b[0] - a[0]);
  return ranked.length ? ranked[0][1] : parameters[0] || null;
}

// Return the sentence that tells for which value of the parameter the mean is lowest and highest.
function extremesOf(metric, parameter) {
  const means = meansOf(jobs, metric, parameter).sort((a, b) => a.mean - b.mean);
  if (means.length < 2) return '';
  const say = one => `${shown(Number(one.mean.toPrecision(4)))} at ${parameter.head} = `
    + `${one.text} (${one.values.length > 1 ? `mean of ${many(one.values.length, 'job')}`
      : '1 job'})`;
  return `lowest ${say(means[0])}, highest ${say(means.at(-1))}`;
}

function shapeOf(kind, x, y, r) {
  const shapes = [
    `M${x - r},${y}a${r},${r} 0 1 0 ${2 * r},0a${r},${r} 0 1 0 ${-2 * r},0Z`,
    `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
    `M${x},${y - 1.3 * r}l${1.3 * r},${2.3 * r}h${-2.6 * r}Z`,
    `M${x},${y - 1.4 * r}l${1.4 * r},${1.4 * r}l${-1.4 * r},${1.4 * r}l${-1.4 * r},${-1.4 * r}Z`,
    `M${x},${y + 1.3 * r}l${1.3 * r},${-2.3 * r}h${-2.6 * r}Z`];
  return shapes[kind % shapes.length];
}

function colour(at) {
  return `var(--c${Math.min(at, COLOURS - 1)})`;
}

// Return the values that an axis must reach: those of good jobs, if there are any. The huge values
// of a job that diverged would leave no room for the others.
function rangeOf(some, valuesOf) {
  const good = some.filter(isGood).flatMap(valuesOf).filter(Number.isFinite);
  return good.length ? good : some.flatMap(valuesOf).filter(Number.isFinite);
}

function withinEdges(scale, bottom, top) {
  const at = value => Math.min(Math.max(scale.at(value), top), bottom);
  const isOutside = value => !(scale.at(value) >= top - 1 && scale.at(value) <= bottom + 1);
  return {...scale, at, isOutside};
}

function plotData() {
  const {metric, parameter, group} = plot;
  const there = chosen.jobs.filter(job => parameter.values[job.n] !== null
    && metric.values[job.n] !== null && (!group || group.values[job.n] !== null));
  const drawn = there.filter(job => Number.isFinite(metric.values[job.n]));
  const parts = group && gradesOf(group, there, COLOURS);
  const levels = levelsOf(parameter, drawn);
  const isWords = levels.some(one => typeof one !== 'number');
  return {there, drawn, parts, levels, isWords, isLogX: !isWords && spansDecades(levels, 50),
    isLogY: plot.log ?? spansDecades(rangeOf(drawn, job => [metric.values[job.n]]), 1000),
    means: meansOf(drawn, metric, parameter, parts)};
}

function xAxis(found, left, right, bottom) {
  const {levels, isWords, isLogX} = found;
  if (isWords) {
    const width = (right - left) / levels.length;
    const at = value => left + (levels.indexOf(value) + 0.5) * width;
    const most = found.isTilted ? 15 : Math.max(Math.floor(width / 7), 3);
    const each = Math.ceil(levels.length * 14 / (right - left));
    const marks = levels.filter((_, n) => n % each === 0).map(value => {
      const text = textOf(plot.parameter, value), x = at(value), y = bottom + 18;
      return draw('text', found.isTilted ? {'text-anchor': 'end',
        transform: `translate(${x + 4},${y - 6}) rotate(-40)`} : {x, y, 'text-anchor': 'middle'},
      text.length > most ? `${text.slice(0, most - 1)}\u2026` : text, draw('title', {}, text));
    });
    return {at, marks, width};
  }
  const scale = scaleFor(levels, isLogX, left + 12, right - 12, 0.03);
  // The values that were tried are the best ticks, where there is room for them.
  const near = levels.some((value, n) => n && scale.at(value) - scale.at(levels[n - 1]) < 46);
  const ticks = near ? scale.ticks : levels;
  const marks = ticks.map(tick => {
    const x = scale.at(tick), text = near ? shown(tick) : textOf(plot.parameter, tick);
    return [draw('line', {class: 'axis', x1: x, x2: x, y1: bottom, y2: bottom + 5}),
      draw('text', {x, y: bottom + 18, 'text-anchor': 'middle'}, text)];
  });
  return {at: scale.at, marks, width: 0};
}

function pointsOf(found, x, y) {
  const {metric, parameter} = plot, count = found.parts ? found.parts.all.length : 1;
  const shift = at => (at - (count - 1) / 2) * (count > 1 ? Math.min(6, 30 / count) : 0);
  const isMany = found.drawn.length > 300, half = Math.min(0.4 * x.width, 22);
  const points = evenlyOf(found.drawn, 2500).map(job => {
    const part = found.parts ? Math.max(found.parts.of(job), 0) : 0;
    const jitter = x.width ? ((job.n * 0.618) % 1 - 0.5) * Math.min(x.width * 0.5, 40) : 0;
    const kinds = `${isGood(job) ? '' : 'other'} ${isMany ? 'small' : ''}`;
    const label = `${job.name}, ${job.state}: ${settingsOf(job)}, `
      + `${metric.head} ${metric.texts[job.n]}`;
    return draw('path', {class: `mark dot ${kinds}`, role: 'button', tabindex: -1,
      color: colour(part), 'data-job': job.n,
      'data-part': part, d: shapeOf(part, x.at(parameter.values[job.n]) + shift(part) + jitter,
        y.at(metric.values[job.n]), isMany ? 2.5 : 4),
      'aria-label': label});
  });
  const means = Array.from({length: count}, (_, part) => {
    const own = found.means.filter(one => one.part === part).sort((a, b) => compare(a.x, b.x));
    const spots = own.map(one => [x.at(one.x) + shift(part), y.at(one.mean), one]);
    const whiskers = spots.filter(([, , one]) => one.deviation && !found.isLogY).map(
      ([at, , one]) => draw('line', {class: 'spread', stroke: colour(part), x1: at, x2: at,
        y1: y.at(one.mean - one.deviation), y2: y.at(one.mean + one.deviation)}));
    if (x.width) return [...whiskers, spots.map(([at, height]) => draw('line', {class: 'mean',
      stroke: colour(part), x1: at - half, x2: at + half, y1: height, y2: height}))];
    const middles = spots.map(([at, height]) => draw('line', {class: 'mean', stroke: colour(part),
      x1: at - 9, x2: at + 9, y1: height, y2: height}));
    return [...whiskers, spots.length > 30 ? '' : middles, draw('path', {class: 'mean',
      stroke: colour(part), d: linePath(spots.map(one => one[0]), spots.map(one => one[1]))})];
  });
  const behind = means.flat(Infinity).map(one => one && one.cloneNode());
  return [points, draw('g', {class: 'halo'}, behind), draw('g', {class: 'means'}, means)];
}

function showPlot() {
  if (!plot.metric || !plot.parameter) return;
  const found = plotData(), {metric, parameter, group} = plot;
  const width = widthOf('plot'), left = 66, longest = Math.max(...found.levels.map(
    level => textOf(parameter, level).length), 1);
  found.isTilted = found.isWords && longest * 7 > (width - left) / found.levels.length;
  const bottom = 304, height = bottom + (found.isTilted ? 104 : 46);
  const ys = rangeOf(found.drawn, job => [metric.values[job.n]]);
  const spread = found.isLogY ? [] : found.means.flatMap(
    one => [one.mean - (one.deviation || 0), one.mean + (one.deviation || 0)]);
  byId('plot-log').checked = found.isLogY;
  byId('plot-log-of').textContent = metric.head;
  if (!found.drawn.length) {
    put('plot', el('p', {}, 'No chosen job has numbers of both.'));
    put('plot-table');
    byId('plot-hint').textContent = '';
    return;
  }
  const x = xAxis(found, left, width - 8, bottom);
  const isLog = found.isLogY && ys.every(one => one > 0);
  const y = withinEdges(scaleFor([...ys, ...spread], isLog, bottom, 26), bottom, 26);
  found.outside = found.drawn.filter(job => y.isOutside(metric.values[job.n])).length;
  const label = `${metric.head} over ${parameter.head}, ${many(found.drawn.length, 'job')}; `
    + 'the table below has the means';
  put('plot', picture(width, height, {role: 'group', 'aria-label': label},
    yAxis(y, left, width - 8, metric.head), x.marks,
    draw('line', {class: 'axis', x1: left, x2: width - 8, y1: bottom, y2: bottom}),
    draw('text', {class: 'strong', x: (left + width) / 2, y: height - 6, 'text-anchor': 'middle'},
      parameter.head), pointsOf(found, x, y)), group ? partLegend(found) : '');
  isReachable(byId('plot'));
  showPlotWords(found);
}

function partLegend(found) {
  return el('div', {class: 'swatches'}, found.parts.all.map((one, at) => el('span', {},
    draw('svg', {width: 14, height: 14, 'aria-hidden': 'true'}, draw('path',
      {d: shapeOf(at, 7, 7, 4), fill: colour(at)})),
    `${plot.group.head} = ${one.text}`)));
}

function showPlotWords(found) {
  const {metric, parameter, group} = plot;
  const strange = found.there.length - found.drawn.length;
  const others = found.drawn.filter(job => !isGood(job)).length;
  const count = found.drawn.length;
  const cut = count > 2500 ? `2,500 of ${many(count, 'job')} are drawn.` : '';
  byId('plot-hint').textContent = ['A mark is a job. The line goes through the means of jobs that '
    + 'finished well', found.isLogY ? '.' : '; whiskers are one sample standard deviation.',
  others ? ` Hollow marks failed or still run: ${others}.` : '',
  found.outside ? ` At the edge, since they lie beyond it: ${found.outside}.` : '',
  strange ? ` Not drawn, since they are no finite numbers: ${strange}.` : '',
  found.isLogX ? ` The axis of ${parameter.head} is logarithmic, since its values span decades.`
    : '', ` ${cut}`].join('');
  const rows = [...found.means].sort((a, b) => a.mean - b.mean).slice(0, 500).map(one => [
    ...(group ? [found.parts.all[one.part].text] : []), one.text, one.values.length,
    one.mean, one.deviation, Math.min(...one.values), Math.max(...one.values)]);
  put('plot-table', tableOf([...(group ? [group.head] : []), parameter.head, 'jobs',
    `mean ${metric.head}`, 'deviation', 'lowest', 'highest'], rows, 'Means'));
}

function pick(list, event) {
  return list[Number(event.target.value)] ?? null;
}

function showExplained() {
  const shares = parameters.map(one => [explainedBy(chosen.jobs, plot.metric, one), one])
    .filter(([share]) => share !== null).sort((a, b) => b[0] - a[0]);
  const texts = shares.map(
    ([share, one], at) => `${one.head}${at ? '' : ' explains'} ${percent(share)}`);
  byId('explained').textContent = shares.length > 1
    ? `Of the differences in ${plot.metric.head}, ${texts.join(', ')}.` : '';
}

function beginPlot() {
  plot.metric = bestMetric();
  plot.parameter = plot.metric && bestParameter(plot.metric);
  byId('parameters').hidden = !plot.metric || !plot.parameter;
  if (byId('parameters').hidden) return;
  const index = list => list.map((one, at) => [String(at), one.head]);
  const redraw = () => { showExplained(); showPlot(); };
  put('plot-controls',
    choice('plot-metric', 'Metric', index(metrics), String(metrics.indexOf(plot.metric)),
      event => { plot.metric = pick(metrics, event); plot.log = null; redraw(); }),
    choice('plot-parameter', 'over', index(parameters), String(parameters.indexOf(plot.parameter)),
      event => { plot.parameter = pick(parameters, event); redraw(); }),
    choice('plot-group', 'a line for each', [['', 'nothing'], ...index(parameters)], '',
      event => { plot.group = event.target.value ? pick(parameters, event) : null; redraw(); }),
    el('label', {}, el('input', {type: 'checkbox', id: 'plot-log', change: event => {
      plot.log = event.target.checked;
      redraw();
    }}), 'logarithmic axis of ', el('span', {id: 'plot-log-of'})));
  bindMarks(byId('plot'), mark => [...tellJob(jobs[mark.dataset.job]),
    `${plot.metric.head} ${plot.metric.texts[mark.dataset.job]}`],
  mark => openJob(jobs[mark.dataset.job]));
  followers.push(redraw);
}

// ---- Curves ----

const DASHES = ['', '7 3', '2 2', '9 3 2 3'];
const curve = {name: '', colour: null, picked: null, log: null, most: 40, listed: 200};

function curveNames() {
  const counts = new Map();
  for (const one of Object.values(data.curves)) {
    for (const name of Object.keys(one)) counts.set(name, (counts.get(name) || 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1]).map(one => one[0]);
}

function curveJobs() {
  return chosen.jobs.filter(job => data.curves[job.n] && data.curves[job.n][curve.name]);
}

function pickedJobs() {
  const there = curveJobs();
  return curve.picked ? there.filter(job => curve.picked.has(job.n)) : evenlyOf(there, curve.most);
}

function curveColours(some) {
  const grades = curve.colour && gradesOf(curve.colour, some, COLOURS);
  return {grades, of: job => grades ? Math.max(grades.of(job), 0) : some.indexOf(job) % COLOURS};
}

function showCurveJobs() {
  const picked = pickedJobs(), shownJobs = new Set(picked.map(job => job.n));
  const others = curveJobs().filter(job => !shownJobs.has(job.n));
  const there = [...picked.slice(0, 400), ...evenlyOf(others, curve.listed)];
  there.sort((a, b) => a.n - b.n);
  const set = jobs => { curve.picked = new Set(jobs.map(job => job.n)); showCurves(); };
  put('curve-jobs', el('legend', {}, `Jobs: ${shownJobs.size} of ${curveJobs().length} are drawn`),
    el('span', {class: 'row'}, button('All', () => set(there), {id: 'curves-all', class: 'link'}),
      button('None', () => set([]), {id: 'curves-none', class: 'link'})),
    there.map(job => el('label', {title: settingsOf(job)}, el('input', {type: 'checkbox',
      checked: shownJobs.has(job.n), 'data-job': job.n, change: event => {
        const picked = new Set(pickedJobs().map(one => one.n));
        if (event.target.checked) picked.add(job.n);
        else picked.delete(job.n);
        curve.picked = picked;
        drawCurves();
      }}), el('span', {}, `${shortName(job)} ${settingsOf(job)}`))));
}

function showCurves() {
  if (!curve.name) return;
  showCurveJobs();
  drawCurves();
}

function drawCurves() {
  const some = pickedJobs(), of = job => data.curves[job.n][curve.name];
  byId('curve-jobs').querySelector('legend').textContent =
    `Jobs: ${some.length} of ${curveJobs().length} are drawn`;
  const ys = rangeOf(some, job => of(job)[1]);
  if (!ys.length) {
    put('curve-plot', el('p', {}, 'No job with numbers is chosen.'));
    put('curve-table');
    return;
  }
  const positive = ys.every(value => value > 0);
  const isLog = positive && (curve.log ?? spansDecadesOf(ys, 1000));
  byId('curve-log').checked = isLog;
  byId('curve-log-of').textContent = curve.name;
  const width = widthOf('curve-plot'), height = 340, left = 66, bottom = height - 46;
  const xs = some.flatMap(job => of(job)[0]);
  const x = scaleFor(xs, false, left, width - 10, 0), y = scaleFor(ys, isLog, bottom, 26);
  const isWhole = xs.every(Number.isInteger), place = curveColours(some);
  const ticks = x.ticks.filter(tick => !isWhole || Number.isInteger(tick));
  const lines = some.map(job => {
    const [a, b] = of(job), at = place.of(job);
    return draw('path', {class: `mark curve ${some.length > 40 ? 'thin' : ''}`, stroke: colour(at),
      'stroke-dasharray': DASHES[at % DASHES.length] || null, 'data-job': job.n, tabindex: -1,
      role: 'button', 'aria-label': `${job.name}: ${settingsOf(job)}, ${curve.name} from `
        + `${shown(b[0])} to ${shown(b.at(-1))}`,
      d: linePath(a.map(x.at), b.map(value => Number.isFinite(value) ? y.at(value) : null))});
  });
  const counter = mostUsed(some.map(job => of(job)[2])) || 'number of the value in the output';
  put('curve-plot', picture(width, height, {role: 'group',
    'aria-label': `${curve.name} over ${counter} of ${many(some.length, 'job')}`},
  yAxis(y, left, width - 10, curve.name), ticks.map(tick => draw('text',
    {x: x.at(tick), y: bottom + 18, 'text-anchor': 'middle'}, shown(tick))),
  draw('line', {class: 'axis', x1: left, x2: width - 10, y1: bottom, y2: bottom}),
  draw('text', {class: 'strong', x: (left + width) / 2, y: height - 6, 'text-anchor': 'middle'},
    counter), draw('svg', {y: 22, width, height: bottom - 20,
    viewBox: `0 22 ${width} ${bottom - 20}`}, lines)), curveLegend(some, place));
  isReachable(byId('curve-plot'));
  put('curve-table', tableOf(['job', 'settings', 'values', 'first', 'lowest', 'highest', 'last'],
    some.slice(0, 300).map(job => {
      const values = of(job)[1], finite = values.filter(Number.isFinite);
      return [job.name, settingsOf(job), values.length, values[0], leastOf(finite),
        mostOf(finite), values.at(-1)];
    }), 'Curves'));
}

function spansDecadesOf(values, ratio) {
  const low = leastOf(values), high = mostOf(values);
  return low > 0 && high / low >= ratio;
}

function mostUsed(texts) {
  const counts = new Map();
  texts.forEach(text => counts.set(text, (counts.get(text) || 0) + 1));
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0];
}

function curveLegend(some, place) {
  const line = at => draw('svg', {width: 26, height: 10, 'aria-hidden': 'true'}, draw('line',
    {x1: 1, x2: 25, y1: 5, y2: 5, stroke: colour(at), 'stroke-width': 2,
      'stroke-dasharray': DASHES[at % DASHES.length] || null}));
  const entries = curve.colour
    ? place.grades.all.map(one => `${curve.colour.head} = ${one.text}`)
    : some.length <= COLOURS ? some.map(job => `${shortName(job)} ${settingsOf(job)}`) : [];
  return el('div', {class: 'swatches'}, entries.slice(0, 30).map(
    (text, at) => el('span', {}, line(at), text)));
}

function beginCurves() {
  const names = curveNames();
  byId('curves').hidden = !names.length;
  if (!names.length) return;
  const wanted = plot.metric && plot.metric.key;
  curve.name = names.includes(wanted) ? wanted : names[0];
  curve.colour = plot.parameter;
  put('curve-controls',
    choice('curve-name', 'Curve', names.map(name => [name, name]), curve.name,
      event => { curve.name = event.target.value; curve.log = curve.picked = null; showCurves(); }),
    choice('curve-colour', 'a colour for each', [['', 'job'],
      ...parameters.map((one, at) => [String(at), one.head])],
    curve.colour ? String(parameters.indexOf(curve.colour)) : '', event => {
      curve.colour = event.target.value ? pick(parameters, event) : null;
      showCurves();
    }),
    el('label', {}, el('input', {type: 'checkbox', id: 'curve-log', change: event => {
      curve.log = event.target.checked;
      showCurves();
    }}), 'logarithmic axis of ', el('span', {id: 'curve-log-of'})));
  const few = data.looked >= jobs.length ? '' : ` The outputs of ${many(data.looked, 'job')}, from `
    + `all over the ${jobs.length.toLocaleString('en')}, were read for this.`;
  byId('curve-hint').textContent = 'Numbers that stand in several lines of an output under one '
    + `name; of long outputs a selection.${few}`;
  bindMarks(byId('curve-plot'), mark => tellJob(jobs[mark.dataset.job]),
    mark => openJob(jobs[mark.dataset.job]));
  followers.push(showCurves);
}

// ---- Failures ----

function reasonKey(job) {
  return job.reason.replace(/[0-9]+/g, '0');
}

function failureGroups() {
  const groups = new Map();
  for (const job of jobs.filter(one => one.reason)) {
    const key = reasonKey(job);
    if (!groups.has(key)) groups.set(key, {key, words: job.reason, jobs: []});
    groups.get(key).jobs.push(job);
  }
  return [...groups.values()].sort((a, b) => b.jobs.length - a.jobs.length);
}

// Return the fewest of the settings, one or two, that no good job has together.
function culprits(shared, good, mayPair) {
  const has = (job, settings) => settings.every(
    ([column, value]) => column.values[job.n] === value);
  const candidates = [...shared.map(one => [one]), ...(mayPair ? shared.flatMap(
    (one, at) => shared.slice(at + 1).map(other => [one, other])) : [])];
  return (good.length && candidates.find(settings => !good.some(job => has(job, settings)))) || [];
}

// Return a text: settings that all these jobs share and no good job has, and a shared machine.
function sharedBy(some) {
  const good = jobs.filter(isGood), said = [], shared = [];
  for (const column of parameters) {
    const value = column.values[some[0].n];
    if (value === null || some.some(job => column.values[job.n] !== value)) continue;
    shared.push([column, value]);
  }
  const settings = culprits(shared, good, some.length > 1);
  if (settings.length) said.push(`${listOf(settings.map(([column, value]) =>
    `${column.head} = ${textOf(column, value)}`))}, with which no job finished well`);
  const places = new Set(some.map(job => job.attempts.at(-1)?.machine));
  const [place] = places;
  const several = new Set(jobs.map(job => job.attempts.at(-1)?.machine)).size > 1;
  if (some.length > 1 && places.size === 1 && place >= 0 && several) {
    said.push(`all ran on ${data.machines[place].name}`);
  }
  return said.join('; ');
}

function failureOf(group) {
  const shared = sharedBy(group.jobs), some = group.jobs.slice(0, 6);
  const show = button('Show in the table', () => {
    chosen.reason = {key: group.key, words: group.words};
    table.page = 0;
    choose();
    byId('table').scrollIntoView();
  }, {class: 'link'});
  return el('div', {class: 'failure'}, el('div', {class: 'count'}, `${group.jobs.length}\u00d7`),
    el('div', {}, el('div', {class: 'reason'}, group.words),
      shared ? el('div', {class: 'muted'}, shared) : '',
      el('div', {class: 'jobs'}, some.map(job => button(job.name, () => openJob(job),
        {class: 'link', 'aria-label': `${job.name}: open its output`})),
      group.jobs.length > some.length ? `and ${group.jobs.length - some.length} more` : '', show)));
}

function showFailures() {
  const groups = failureGroups();
  put('failures-body', groups.length ? groups.slice(0, 100).map(failureOf)
    : el('p', {}, jobs.length ? 'No job failed.' : 'There are no jobs yet.'));
}

// ---- What ran ----

function pathsPart(what, paths, count) {
  if (!paths || !count) return '';
  const more = count > paths.length ? `, and ${count - paths.length} more` : '';
  return el('details', {}, el('summary', {}, `${what}: ${count}`),
    el('p', {class: 'code'}, paths.join(', ') + more));
}

function sentOf(one) {
  const branch = one.branch ? ` on ${one.branch}` : '';
  const commit = one.commit ? `commit ${one.commit.slice(0, 12)}${branch}` : '';
  const state = one.commit && !one.changed_count && !one.untracked_count ? ', unchanged' : '';
  const files = one.files === undefined ? ''
    : `${many(one.files, 'file')}, ${bytesOf(one.bytes || 0)}`;
  const links = [['the differences to the commit', one.diff], ['the list of files', one.list]]
    .filter(([, link]) => link).map(([text, href]) => el('a', {href}, text));
  return el('div', {}, el('h3', {}, `Files ${one.digest.slice(0, 8)}: ${many(one.jobs, 'job')}`),
    el('p', {}, [commit + state, files].filter(Boolean).join(' \u00b7 ')
      || 'These files were not recorded.'),
    pathsPart('Files that differ from the commit', one.changed, one.changed_count),
    pathsPart('Files that the commit does not have', one.untracked, one.untracked_count),
    links.length ? el('p', {}, 'See ', links.map((link, at) => at ? [', ', link] : link)) : '');
}

function gigabytes(megabytes) {
  return `${shown(Math.round(megabytes / 102.4) / 10)} GB`;
}

function showRan() {
  const rows = data.machines.filter(one => Object.keys(one.facts).length).map(({name, facts}) => [
    name, facts.cores || '', facts.memory_mb ? gigabytes(facts.memory_mb) : '',
    listOf([...new Set((facts.gpus || []).map(gpu => gpu.model))].map(model => {
      const count = facts.gpus.filter(gpu => gpu.model === model).length;
      return count > 1 ? `${count} \u00d7 ${model}` : model;
    })), facts.driver || '', facts.kernel || '', facts.python || '']);
  const mixed = data.sent.length > 1
    ? el('p', {}, `These jobs ran with ${data.sent.length} different sets of files.`) : '';
  put('ran-body', mixed, data.sent.map(sentOf),
    data.sent.length ? '' : el('p', {}, 'Which files the jobs ran with was not recorded.'),
    data.variables.length ? el('p', {},
      'Environment variables that jobs received (their names): ',
      el('span', {class: 'code'}, data.variables.join(', '))) : '',
    rows.length ? [el('h3', {}, 'Machines'), tableOf(['machine', 'cores', 'memory', 'GPUs',
      'driver', 'kernel', 'Python'], rows, 'Facts of machines')]
      : el('p', {class: 'muted'}, 'Facts of the machines were not recorded.'));
}

// ---- The top of the page ----

function showLead() {
  const length = span.to - span.from, seconds = jobs.reduce((sum, job) => sum + job.attempts.reduce(
    (all, one) => all + (one.ended ?? now) - one.began, 0), 0);
  const gpus = view.lanes.filter(lane => lane.gpu !== null).length;
  const parts = [many(jobs.length, 'job')];
  if (jobs.some(job => job.attempts.length)) {
    parts.push(`${rangeOfTimes(span.from, span.to)} (${durationOf(length)})`,
      `${durationOf(seconds)} of job time`);
  }
  if (data.machines.length) parts.push(many(data.machines.length, 'machine')
    + (gpus ? `, ${many(gpus, 'GPU')}` : ''));
  parts.push(data.places.join(', '));
  byId('lead').textContent = parts.join(' \u00b7 ');
  const made = dateText(now, {...DAY, year: 'numeric', ...CLOCK, second: '2-digit'});
  byId('foot').textContent = `Made by results_table, ${made}. Times are of this computer's zone.`;
  const counts = new Map();
  for (const job of jobs) counts.set(job.state, (counts.get(job.state) || 0) + 1);
  let x = 0;
  const bars = inOrder(counts).map(([state, count]) => {
    const width = 1000 * count / jobs.length;
    x += width;
    return draw('rect', {class: `bar ${state}`, x: x - width, y: 0, width, height: 10});
  });
  put('shares', draw('svg', {viewBox: '0 0 1000 10', preserveAspectRatio: 'none', role: 'img',
    'aria-label': [...counts].map(([state, count]) => `${count} ${state}`).join(', ')}, bars));
  byId('shares').hidden = !jobs.length;
}

function showNav() {
  const sections = [...document.querySelectorAll('main > section')].filter(one => !one.hidden);
  put('nav', sections.map(one => el('a', {href: `#${one.id}`},
    one.querySelector('h2').textContent)));
}

// Return the sentence about the machines and GPUs that idled.
function idleWords() {
  const rows = useRows(), gpus = rows.filter(row => row.isGpu && row.attempts.length);
  const some = rows.filter(row => row.isGpu || !rows.some(other => other.isGpu
    && other.machine === row.machine && (other.attempts.length || !row.attempts.length)));
  if (some.length < 2) return '';
  const shares = some.map(row => [busyShare(row.attempts), row.name]).sort((a, b) => a[0] - b[0]);
  const idle = shares.filter(([share]) => share < 0.5);
  const rest = shares.filter(([share]) => share >= 0.5);
  if (!idle.length) return `each ${gpus.length ? 'GPU' : 'machine'} had a job for at least `
    + `${percent(shares[0][0])} of the time`;
  const say = ([share, name]) => share < 0.005 ? `${name} had no job` :
    `${name} idled ${percent(1 - share)} of the time`;
  return `${listOf(idle.map(say), 3)}${rest.length ? `; ${rest.length === 1 ? rest[0][1]
    : `the other ${rest.length}`} had a job for at least ${percent(rest[0][0])} of it` : ''}`;
}

function showGlance() {
  const lines = [];
  const add = (what, text, id) => { if (text) lines.push(el('li', {}, el('a', {class: 'what',
    href: `#${id}`}, what), el('span', {}, text))); };
  if (data.running) add('as of', `${timeOf(now)}: ${many(jobs.filter(
    job => job.state === 'running').length, 'job')} running`, 'timeline');
  if (plot.metric && plot.parameter) add(plot.metric.head, extremesOf(plot.metric, plot.parameter),
    'parameters');
  add('machines', jobs.length ? idleWords() : '', 'machines');
  const groups = failureGroups();
  const reasons = groups.map(one => `${one.jobs.length}\u00d7 ${one.words}`);
  add('failures', listOf(reasons, 3), 'failures');
  put('glance', lines);
  byId('glance').hidden = !lines.length;
  put('notes', data.notes.map(note => el('p', {},
    note.replace(/^[a-z](?=[a-z]* )/, letter => letter.toUpperCase()))));
  byId('notes').hidden = !data.notes.length;
}

function definePatterns() {
  const pattern = (id, size, base, ...marks) => draw('pattern', {id, width: size, height: size,
    patternUnits: 'userSpaceOnUse'}, draw('rect', {width: size, height: size, fill: base}), marks);
  const line = (d, stroke, width) => draw('path', {d, stroke, 'stroke-width': width, fill: 'none'});
  byId('patterns').append(draw('defs', {},
    pattern('is-failed', 6, 'var(--failed)', line('M-1,7L7,-1M-1,1L1,-1M5,7L7,5', 'var(--paper)',
      1.4)),
    pattern('is-running', 8, 'var(--running)', line('M4,0V8', 'var(--paper)', 2)),
    pattern('is-started', 8, 'var(--running)', line('M4,0V8M0,4H8', 'var(--paper)', 2)),
    pattern('is-ended', 5, 'var(--ended)', draw('circle', {cx: 2.5, cy: 2.5, r: 1,
      fill: 'var(--ink)'})),
    pattern('is-lost', 6, 'var(--lost)', line('M-1,7L7,-1M-1,-1L7,7', 'var(--paper)', 1.1)),
    pattern('is-cancelled', 4, 'var(--cancelled)', line('M0,2H4', 'var(--paper)', 1.2))));
}

// ---- Reloading: the page of a running batch loads itself again ----

const RELOAD_S = 30;

function remember() {
  const selects = [...document.querySelectorAll('select')].map(one => [one.id, one.value]);
  const kept = {text: chosen.text, states: [...chosen.states], column: table.column?.key,
    descending: table.descending, page: table.page, selects, y: scrollY,
    reload: byId('reload')?.checked};
  try { sessionStorage.setItem('results_table', JSON.stringify(kept)); } catch { /* not allowed */ }
}

function recall() {
  try {
    if (performance.getEntriesByType('navigation')[0]?.type !== 'reload') return {};
    return JSON.parse(sessionStorage.getItem('results_table')) || {};
  } catch { return {}; }
}

function restoreTable(kept) {
  chosen.text = kept.text || '';
  chosen.states = new Set(kept.states || []);
  table.column = columns.find(one => one.key === kept.column) || null;
  table.descending = Boolean(kept.descending);
  table.page = kept.page || 0;
}

function restoreRest(kept) {
  for (const [id, value] of kept.selects || []) {
    const select = byId(id);
    const isThere = select && [...select.options].some(one => one.value === value);
    if (!isThere || select.value === value) continue;
    select.value = value;
    select.dispatchEvent(new Event('change'));
  }
  if (kept.y) scrollTo(0, kept.y);
}

function beginReloading(kept) {
  if (!data.running) return;
  const box = el('input', {type: 'checkbox', id: 'reload', checked: kept.reload !== false});
  byId('lead').after(el('p', {class: 'controls'}, el('label', {}, box,
    `The batch runs. Load this page again every ${RELOAD_S} s`)));
  setInterval(() => {
    if (box.checked && !byId('details').open && !document.hidden) location.reload();
  }, 1000 * RELOAD_S);
}

// ---- Beginning ----

function redrawAll() {
  showTimeline();
  if (data.machines.length) showMachines();
  showAsked();
  showPlot();
  showCurves();
}

function beginDrawings() {
  let width = document.body.clientWidth, pending = 0;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    clearTimeout(pending);
    pending = setTimeout(redrawAll, 100);
  }).observe(document.body);
  addEventListener('keydown', event => { if (event.key === 'Escape') hideTip(); });
  addEventListener('scroll', followTip, {passive: true, capture: true});
  addEventListener('beforeprint', () => printed(true));
  addEventListener('afterprint', () => printed(false));
  addEventListener('pagehide', remember);
}

// Paper cannot turn pages or scroll: print up to 2,000 jobs, and all bar rows if at most 400.
function printed(isPaper) {
  table.size = isPaper ? 2000 : 50;
  table.isPaper = isPaper;
  view.all = isPaper && view.rows.length <= 400;
  showTable();
  showLanes();
}

function begin() {
  const kept = recall();
  restoreTable(kept);
  definePatterns();
  beginTable();
  choose();
  performance.mark('table');
  const rest = [beginTimeline, showTimeline, showLead, showMachines, showAsked, beginPlot,
    beginCurves, () => { if (plot.metric) { showExplained(); showPlot(); } }, showCurves,
    showFailures, showRan, showGlance, showNav, beginDrawings, () => beginReloading(kept),
    () => restoreRest(kept),
    () => { document.documentElement.dataset.ready = 'yes'; performance.mark('ready'); }];
  const next = () => {
    const until = performance.now() + 30;
    while (rest.length && performance.now() < until) rest.shift()();
    if (rest.length) setTimeout(next);
  };
  next();
}

begin();
'''


if __name__ == '__main__':
    sys.exit(main())
