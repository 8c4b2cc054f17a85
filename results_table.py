#!/usr/bin/env python3
# ssh-scheduler: https://github.com/benblack769/ssh-scheduler.  MIT licence, see LICENSE.
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Make one table of the results of jobs: what differs in their commands, and what came out.

    job_results, ... --> Jobs: what the journals tell of each        (Reading)
                           |
          commands ------> parameters: the words that differ         (Parameters)
          files, streams > metrics: numbers with names               (Numbers, Metrics)
                           |
                         Table: columns, and rows of Cells           (Columns)
                           |
                         chosen, averaged, sorted                    (Means, Choosing)
                           |
          terminal, CSV, JSON, Markdown, LaTeX                       (Forms, Screen)

A Cell has a value, for programs, and a text, for people: 3720.4 and 1h 02m.  A Column may be only
for programs (the whole command) or have another name for people (where).

The journal is a JSON object a line, and is only added to; so it is read while a batch runs, and a
last line without an end is left for the next time.  Of streams only the ends are read, since they
may have 100 MB.  Nothing is written below job_results.

Sections: Usage, Words, Errors, Records, Numbers, Reading, Parameters, Metrics, Columns, Means,
Choosing, Forms, Screen; and the edge: Function, Options, Terminal, Command.  A section uses only
what stands above it.

As a library: results_table() and TableError keep their documented behaviour; everything else may
change.  Importing has no effect.
"""
import codecs
import collections
import contextlib
import csv
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
Make one table of the results of jobs: what differs in their commands, the
metrics that they wrote, how they ended, how long they took and where they ran.

Usage:
  results_table [options] [--] [<results>...]
  results_table --help

  <results>: a folder job_results, or results in one (job_results/grid.sh.*);
  by default ./job_results. A batch may be running. Nothing there is changed.
  On a terminal the table is cut to its width. In a pipe it is CSV.

Columns:
  The words that differ: --lr=0.1, --lr 0.1 and lr=0.1 are lr, words without a
  name arg1, arg2, a flag is yes. Then the metrics, exit (… while the job runs),
  time, MB and GPU MB (the most memory that was seen in use), and where.
  Metrics are the numbers of metrics.json or results.json in the job's folder
  and of the files of --from; of jobs without these the last `name: number`,
  `name=number`, and JSON object on a line, of their stdout, and the numbers of
  lines that have nothing else, such as `epoch 9: loss 0.31`.

Options:
  --metric=<name=regex>   A metric that is found otherwise: the last match in
                          stdout, else in stderr: 'acc=best accuracy (\\S+)'.
                          May be given several times.
  --from=<files>          Files in the job's folder, such as 'runs/*.csv': of
                          CSV the last value of each column; .json and .jsonl,
                          too. May be given several times.
  --where=<test>          Only rows for which this holds: 'lr>0.001', 'exit=0',
                          'loss!=nan', 'time<1h'. The operators are = != < <=
                          > >=. May be given several times; all must hold.
  --mean-over=<names>     Mean, sample standard deviation and number of jobs
                          that differ in these parameters only: seed, or
                          seed,fold. Takes jobs that finished with exit 0. Time
                          is the mean, too; MB and GPU MB are the largest.
  --unfinished            With --mean-over: take all other jobs, too.
  --sort=<columns>        Sort by these columns: lr,-val_acc; - is descending.
  --columns=<columns>     Only these columns, in this order: lr,val_acc,exit.
  --earlier               Also the results of jobs that were run again (NAME~1).

Output:
  --wide                  The whole table, whatever the width; also in a pipe.
  --csv=<file>            Write CSV to this file; - is stdout.
  --json                  Write a JSON object for each row, one a line. Numbers
                          that JSON lacks are the strings nan, inf and -inf.
  --markdown              Write a table for Markdown.
  --latex                 Write a tabular for LaTeX, which needs booktabs.
  -h --help               Show this.

CSV and JSON have time_s in seconds, memory_mb, gpu_memory_mb, machine, gpus,
state (finished, failed, running, ended: not fetched yet, lost, cancelled) and
the whole command. Names of both kinds work in --where, --sort and --columns.

Exit status: 0, 2 for wrong usage or results that cannot be read, 130
interrupted.
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
    """Return what the system said, as 'No space left on device', without numbers."""
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


# ---- Records: frozen ----

class Place(NamedTuple):
    """A folder job_results."""
    folder: str                 # as the user wrote it
    names: Optional[tuple]      # what was asked for in it; None: all


class Job(NamedTuple):
    """What the journal knows of a job; None is unknown."""
    name: str
    folder: str                 # the job_results that it lies in
    state: str                  # finished, failed, running, ended, lost, cancelled, earlier, or ''
    batch: str = ''             # the name of its batch; '' for one of execute_remote
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

    def path(self, end=''):
        """Return the path of its folder, or with .out or .err of a stream."""
        return os.path.join(self.folder, self.name + end)


class Reading(NamedTuple):
    """A number (or a text) as it was found, with its unit."""
    value: object
    unit: str = ''
    text: str = ''              # as it was written, where people may see it so


class Cell(NamedTuple):
    """One cell of the table."""
    value: object = None        # a number, a text, or None, which is an empty cell
    text: str = ''              # the same for people
    unit: str = ''              # of the value, for --where


EMPTY = Cell()

PARAMETER, METRIC, FACT = 'parameter', 'metric', 'fact'
BOTH, PROGRAMS, PEOPLE = 'both', 'programs', 'people'


class Column(NamedTuple):
    """One column of the table."""
    key: str                    # its name for programs
    head: str                   # its name for people
    kind: str                   # PARAMETER, METRIC or FACT
    readers: str = BOTH         # who sees it unless it is asked for by name


class Wishes(NamedTuple):
    """What the user asked for; the usage text explains each."""
    metrics: tuple = ()         # (name, compiled pattern)
    files: tuple = ()
    tests: tuple = ()           # (column, sign, operand)
    mean_over: tuple = ()
    sort: tuple = ()            # (column, is descending)
    columns: tuple = ()
    unfinished: bool = False
    earlier: bool = False


class Table(NamedTuple):
    """The table.  rows: a dictionary each, key of a column -> Cell; an empty cell has no key."""
    columns: tuple
    rows: list
    shared: tuple               # lines with the words that all commands of a batch have
    jobs: tuple                 # the Job of each row; where rows are means, all Jobs


# ---- Numbers: text to numbers, and numbers to text ----

# Each unit's family, and how many of the first unit of the family it is.  Those that are not here
# are dropped.  k is 1000 of anything, but kB and the like are powers of 1024, as in nvidia-smi.
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
# Behind a number nothing may stand that makes it another thing: a version, a date, an address, a
# time of the day, a hash, a decimal comma, or how far a progress bar is.
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
    """Return the int or float that a text of DIGITS or WORDS is."""
    text = text.replace(',', '').replace('_', '')
    is_whole = text.lstrip('+-').isdecimal() and len(text) < 300      # a float ends at 1e308
    return int(text) if is_whole else float(text)


def plain_number(text):
    """Return the number that a word is, or None; 007 and 1,000 are words."""
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


def short_number(value):
    """Return a number in at most six digits, for people."""
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
    """Return Cells for the Readings of one metric: in one unit, whichever each was written in.

    Where all have the same unit the numbers stay; 91% and 0.9 become 0.91 and 0.9.
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


# ---- Reading: what the journals tell of each job ----

BOOKKEEPING = '.ssh_scheduler'
PARTIAL = '.partial'            # the end of a folder with what a running job has written so far
STREAM = re.compile(r'(.+)\.(?:out|err)', re.DOTALL)
NUMBERED = re.compile(r'(.+)\.[0-9]+', re.DOTALL)       # how a version without `batch` named jobs


def find_places(words):
    """Return the Places that the words of the command line mean."""
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
    """Return (the folder job_results, the name of a result in it or None for all)."""
    path = word.rstrip('/') or word
    folder, name = os.path.split(path)
    folder = folder or '.'
    may_be_partial = name.endswith(PARTIAL) and has_journals(folder)
    if is_results_folder(path) and not may_be_partial:
        return path, None
    if has_journals(folder) or os.path.exists(f'{path}.out') or (
            STREAM.fullmatch(name) and os.path.lexists(path)):
        return folder, name
    if not os.path.lexists(path):
        advice = ('Start in the folder of the batch, or name one: results_table FOLDER'
                  if path == 'job_results' else '')
        raise TableError(f'{printable(word)} is not there. {advice}'.rstrip())
    if glob.glob(os.path.join('job_results', glob.escape(name) + '.*')):
        raise TableError(f'{printable(word)} is not a result. Try: '
                         f'results_table job_results/{printable(name)}.*')
    raise TableError(f'{printable(word)} has no results of jobs. Name a folder job_results, or '
                     'results in one.')


def has_journals(folder):
    """Tell whether batches wrote journals into a folder.

    The workdir of a machine may have the same name, ~/.ssh_scheduler, but has none of these.
    """
    return any(os.path.exists(os.path.join(folder, BOOKKEEPING, name))
               for name in ('journal', 'commands'))


def is_results_folder(path):
    """Tell whether a path is a folder of results: one with a journal, or at least with streams."""
    return has_journals(path) or bool(
        os.path.isdir(path) and not os.path.exists(f'{path}.out')
        and glob.glob(os.path.join(glob.escape(path), '*.out')))


def read_jobs(place, report):
    """Return the Jobs of a Place in the order of their names, without results that were deleted."""
    known = read_journals(place.folder)
    present = set(os.listdir(place.folder))
    streams = {match[1] for match in map(STREAM.fullmatch, present.difference(known)) if match}
    if place.names is None:
        names = streams.union(known)
    else:
        batches = collections.defaultdict(list)
        for name, facts in known.items():
            batches[batch_of(name, facts)].append(name)
        names, strange = {}, []
        for name in place.names:
            match = STREAM.fullmatch(name)
            stem = name if name in known or not match else match[1]
            if name not in known and is_partial(place.folder, name, known):
                continue
            if stem in known or stem in streams:
                names[stem] = True
            elif name in batches:
                names.update(dict.fromkeys(batches[name]))
            else:
                strange.append(printable(os.path.join(place.folder, name)))
        if strange:
            report(f'left out, since no job has such results: {names_of(strange)}')
    jobs = [job_from(name, known.get(name, {}), place.folder) for name in names]
    return [job for job in sorted(jobs, key=lambda job: naturally(job.name))
            if job.state not in ('finished', 'failed', 'earlier', '') or job.name in present
            or job.name in streams]


def is_partial(folder, name, known):
    """Tell whether a name is that of a folder with what a job has written so far."""
    job = name[:-len(PARTIAL)]
    return name.endswith(PARTIAL) and (job in known or os.path.lexists(
        os.path.join(folder, BOOKKEEPING, 'partial', 'names', job)))


def read_journals(folder):
    """Return {name of a job: its facts} of all journals in a job_results."""
    inner = os.path.join(folder, BOOKKEEPING)
    paths = [os.path.join(inner, 'journal'),
             *sorted(glob.glob(os.path.join(glob.escape(inner), 'commands', '*', 'journal')))]
    known = {}
    for path in paths:
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
            if not line.endswith(b'\n'):        # it is being written
                break
            if not line.strip():
                continue
            try:
                apply(json.loads(line), known)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise TableError(f'{printable(path)}, line {number} cannot be read. Look at that '
                                 'line; the results of all other jobs can be read once it is '
                                 'repaired.') from None


def apply(event, known):
    """Have the facts tell what an event of the journal says; unknown events say nothing."""
    word = event['event']
    if word == 'claimed':
        known[event['job']] = {**event, 'state': 'running'}
    elif word == 'renamed':
        known[event['to']] = {**known.pop(event['job']), 'state': 'earlier'}
    elif word == 'ended':
        known[event['job']].update(event, state='ended', time=known[event['job']].get('time'))
    elif word in ('collected', 'lost', 'cancelled'):
        facts = known[event['job']]
        facts['state'] = word if word != 'collected' else (
            'failed' if facts.get('exit_code') else 'finished')


def batch_of(name, facts):
    """Return the name of a job's batch; '' if it has none."""
    match = NUMBERED.fullmatch(name)
    return str((facts['batch'] if 'batch' in facts else match and match[1]) or '')


def job_from(name, facts, folder):
    """Return the Job that the facts of a journal describe."""
    machine = str(facts.get('where') or facts.get('machine') or '')
    short = re.sub(r'\.yaml$', '', os.path.basename(machine)) or machine
    has_ended = facts.get('state') in ('ended', 'finished', 'failed', 'earlier')

    def text(key):
        return '' if facts.get(key) is None else str(facts[key])

    def number(key, is_known=True):
        return facts[key] if is_known and is_number(facts.get(key)) else None

    return Job(
        name, folder, facts.get('state', ''), batch_of(name, facts), text('command'), short,
        ','.join(re.findall('[0-9]+', text('gpus'))), text('files'),
        number('exit_code', has_ended), number('time'), number('wall_s', has_ended),
        number('peak_memory_mb', has_ended), number('peak_gpu_memory_mb', has_ended),
        number('attempt') or 1)


# ---- Parameters: the words in which commands differ ----

TOKEN = re.compile(r"""(?sx)
    (?: [^\s'"\\;&|<>()$`]+ | \\. | '[^']*' | "(?:[^"\\]|\\.)*" | \$\([^()]*\) | `[^`]*`
      | ['"\\$`] )+
    | [;&|<>()]+""")
OPERATOR = re.compile('[;&|<>()]+')
SETTING = re.compile(r'(?s)[-+~]*([A-Za-z_][\w./@-]*)=(.*)')    # --lr=0.1, lr=0.1, +model.lr=0.1
FLAG = re.compile(r'--?[A-Za-z][^=\s]*')
GLUED_FLAG = re.compile(r'-([A-Za-z])(-?[0-9.]+(?:[eE][-+]?[0-9]+)?)')      # -n5


class Word(NamedTuple):
    """A word of a command, or a flag with its value."""
    name: object                # of what it sets; the number of a word without a name
    value: str
    typed: str


def tokens_of(command):
    """Return the words of a command as they were typed, and its operators."""
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
    """Return the flags that take no value, as far as the commands, lists of tokens, show it.

    Such a flag stands somewhere before another flag, an operator or the end, or two commands are
    the same but for it.  All other flags take the word that follows.
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


def find_parameters(commands, batches):
    """Return (names, [{name: text} of each command], {batch: the words that all its commands
    share, with … between}).

    batches: the batch of each command.  Names are those of the words that differ, in their order.
    Words with a name are compared with all commands, those without with the same batch: programs
    that differ between batches are no parameters.
    """
    tokens = [tokens_of(command) for command in commands]
    switches = find_switches(tokens)
    split = [words_of(one, switches) for one in tokens]
    names, parameters = {}, [{} for _ in commands]
    differing = differing_names([words for words in split if words])
    differing = {name for name in differing if not isinstance(name, int)}
    shared = {}
    for batch in dict.fromkeys(batches):
        numbers = [number for number, other in enumerate(batches) if other == batch]
        members = [split[number] for number in numbers if split[number]]
        bare = sorted(name for name in differing_names(members) if isinstance(name, int))
        called = {name: f'arg{number}' for number, name in enumerate(bare, 1)}
        called.update(dict.fromkeys(differing))
        for number in numbers:
            for word in split[number]:
                if word.name in called:
                    parameters[number][called[word.name] or word.name] = word.value
            names.update(dict.fromkeys(parameters[number]))
        shared[batch] = shared_words(members, called)
    return list(names), parameters, shared


def differing_names(split):
    """Return the names of the Words in which commands differ, or that some of them lack."""
    values = collections.defaultdict(collections.Counter)
    for words in split:
        for word in words:
            values[word.name][word.value] += 1
    return {name for name, counts in values.items() if [*counts.values()] != [len(split)]}


def shared_words(split, differing):
    """Return the words that all these commands share, with … where others stand."""
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

NEAR_BYTES, FAR_BYTES = 2**16, 2**18    # of a stream, in which metrics are looked for
STEP_BYTES = 2**20                      # of a stream that are searched at once for a --metric
LONGEST_LINE = 400                      # in which `name number` is looked for

ESCAPE = re.compile(                    # the sequences that colour text or move the cursor
    r'\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])')
NOT_NAMES = re.compile(r'^(?:DEBUG|INFO|WARNING|WARN|ERROR|CRITICAL) +| +(?:is|was)$')
NAME_WORD = r'[^\W\d][\w./@%-]*'
NAME_BEFORE = re.compile(rf'((?:{NAME_WORD} ){{0,4}}{NAME_WORD}(?: ?\([\w @./%-]+\))?)'
                         r'''["']?[ \t]*\Z''')
LAST_WORD = re.compile(rf'(?<![\w?&])({NAME_WORD})' r'''["']?[ \t]*\Z''')
# cuda:0 and host:8080 are no metrics, so without a space only a fraction counts.
FRACTION = rf'[-+]?[0-9]*\.[0-9]|[-+]?[0-9]+(?:[eE]|%)|{WORDS}\b'
SEPARATED = re.compile(rf'(?:=[ \t]*|:[ \t]+|:(?={FRACTION}))'
                       rf'(?:(?:tensor|np\.\w+)\()?{VALUE}')
# What may stand between pairs of a name and a number.
BETWEEN = re.compile(r'(?:[\s,;|:()\[\]{}│┃*>#]| - )*')
PAIR = re.compile(rf'''(?P<name>{NAME_WORD}(?: {NAME_WORD}){{0,2}})["']?[\s:=|│┃]+{VALUE}''')
NUMBERS = re.compile(rb'[0-9](?<![A-Za-z_0-9][0-9])[0-9.]*')    # but for the 1 of top1


@contextlib.contextmanager
def opened(path, since=-math.inf):
    """Open a file: (descriptor, size); (None, 0) for what is no file or cannot be read.

    since: a file that did not change since this time, in seconds since 1970, is not read
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
    """Return (the last `size` bytes of a file, whether that is all of it); None if it has none."""
    with opened(path, since) as (fd, whole):
        with contextlib.suppress(OSError):
            size = min(size, whole)             # pread takes memory for all that it may read
            return fd and (os.pread(fd, size, whole - size), whole == size)


def lines_of(data, is_whole=True):
    """Return the lines of an output, as bytes; what a progress bar overwrites is a line, too.

    is_whole: the first line has its beginning
    """
    lines = data.replace(b'\r', b'\n').split(b'\n')
    return lines if is_whole or len(lines) < 2 else lines[1:]


def decoded(data):
    """Return text without what colours it, whatever bytes it has."""
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

    Of lines that differ in their numbers only, the last is looked at: they have the same names.
    """
    lines = lines_of(data, is_whole)
    shapes = NUMBERS.sub(b'0', b'\n'.join(lines)).split(b'\n')
    found = {}
    last = {shape: number for number, shape in enumerate(shapes) if may_have_number(shape)}
    for number in sorted(last.values()):
        for name, reading in metrics_of_line(decoded(lines[number])):
            found.pop(name, None)       # the order is that of the last lines
            found[name] = reading
    return found


def may_have_number(shape):
    """Tell whether a line in which each number is 0 may have one, also nan or inf."""
    lower = shape.lower()
    return b'0' in lower or b'nan' in lower or b'inf' in lower


def only_pairs(line):
    """Return (name, Reading) of each `name number`, if a line has nothing else; else nothing."""
    pairs, at = [], BETWEEN.match(line).end()
    while at < len(line):
        match = PAIR.match(line, at)
        if not match:
            return []
        pairs.append((NOT_NAMES.sub('', match['name']), reading_of(match)))
        at = BETWEEN.match(line, match.end()).end()
    # `GPU 0` alone is no metric, as `loss 0.31` is one.
    is_telling = len(pairs) > 1 or pairs and isinstance(pairs[0][1].value, float)
    return pairs if is_telling else []


def metrics_of_line(line):
    """Return (name, Reading) of each number with a name in a line."""
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
    """Return what a JSON text says; NaN and Infinity may stand in it.  Raises ValueError."""
    return json.loads(text, parse_int=number_of)


def flat(value, prefix=''):
    """Yield (name, Reading) of the numbers, texts and truth values in an object; inner names are
    joined with dots, and lists are passed over."""
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
    """Return the last match of a pattern in a file, which is searched from its end, or None."""
    with opened(path, since) as (fd, start), contextlib.suppress(OSError):
        begun = b''                     # of a line, of which an earlier step has the beginning
        while fd and start:
            step = min(STEP_BYTES, start)
            start -= step
            data = os.pread(fd, step, start).replace(b'\r', b'\n') + begun
            begun, _, data = data.partition(b'\n') if start else (b'', b'', data)
            for match in reversed([*pattern.finditer(decoded(data))]):
                return match
    return None


def files_matching(folder, pattern):
    """Return the paths below a folder that a pattern matches.

    ** follows no links to folders, unlike that of glob: such links may lead in circles.
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
    """Yield a folder and those in it whose names do not begin with a dot."""
    for path, names, _ in os.walk(folder):
        names[:] = [name for name in names if not name.startswith('.')]
        yield path


def file_metrics(job, patterns, report):
    """Return {name: Reading} of metrics.json or results.json, and of the files that were named."""
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
    """Return {name: Reading} of a JSON file; of a list the last object."""
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
                if line.endswith('\n'):         # else it is being written
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
    with contextlib.suppress(csv.Error):        # such as a text that is too long for csv
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


def find_metrics(jobs, wishes, report):
    """Return (names, [{name: Cell} of each job]).

    Where jobs of a batch have files with metrics, others of it (which failed, or still run) only
    have metrics of the same names, whatever else stands in their streams.
    """
    filed = [file_metrics(job, wishes.files, report) for job in jobs]
    names_in_files = collections.defaultdict(set)
    for job, metrics in zip(jobs, filed):
        names_in_files[job.folder, job.batch].update(metrics)
    found = []
    for job, metrics in zip(jobs, filed):
        # Until it says something there may be the output of an earlier attempt.
        since = job.began or 0 if job.state == 'running' and job.attempt > 1 else -math.inf
        known = names_in_files[job.folder, job.batch]
        if not metrics:
            said = stream_metrics(job.path('.out'), since)
            metrics = {name: said[name] for name in said if not known or name in known}
        asked = {name: matched_metric(job, pattern, since) for name, pattern in wishes.metrics}
        found.append({**{name: one for name, one in asked.items() if one},
                      **{name: one for name, one in metrics.items() if name not in asked}})
    names = dict.fromkeys(name for name, _ in wishes.metrics)
    # The order of a job that finished is the best one; of one that fails only a part is there.
    for _, metrics in sorted(zip(jobs, found), key=lambda pair: pair[0].state != 'finished'):
        names.update(dict.fromkeys(metrics))
    rows = [{} for _ in jobs]
    for name in names:
        having = [number for number, metrics in enumerate(found) if name in metrics]
        for number, cell in zip(having, unified([found[number][name] for number in having])):
            rows[number][name] = cell
    return list(names), rows


# ---- Columns: from jobs to a table ----

JOB, FOLDER, BATCH, JOBS, EXIT = (
    Column(key, key, FACT) for key in ('job', 'folder', 'batch', 'jobs', 'exit'))
STATE = Column('state', 'state', FACT, PROGRAMS)
TIME, MEMORY = Column('time_s', 'time', FACT), Column('memory_mb', 'MB', FACT)
GPU_MEMORY = Column('gpu_memory_mb', 'GPU MB', FACT)
WHERE = Column('machine', 'where', FACT)
GPUS, COMMAND = (Column(key, key, FACT, PROGRAMS) for key in ('gpus', 'command'))
FILES = Column('files', 'files', FACT)
LEADING = (FOLDER, BATCH, JOB)
TRAILING = (EXIT, STATE, TIME, MEMORY, GPU_MEMORY, WHERE, GPUS, FILES, COMMAND)
OFTEN_EMPTY = (FOLDER, BATCH, MEMORY, GPU_MEMORY, FILES)       # columns that are left out then
RESERVED = {name for column in (*LEADING, JOBS, *TRAILING) for name in column[:2]}
DIGEST = 8                          # characters of a digest that are shown



def make_table(jobs, wishes, report, now):
    """Return the Table of the Jobs: a row for each.  now: seconds since 1970."""
    parameters, values, shared = find_parameters(
        [job.command for job in jobs], [job.batch for job in jobs])
    metrics, cells = find_metrics(jobs, wishes, report)
    values = [{name: parameter_cell(text) for name, text in row.items()} for row in values]
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
    return Table((*(column for column in LEADING if column in kept), *columns,
                  *(column for column in TRAILING if column in kept)),
                 rows, shared_lines(shared), tuple(jobs))


def shared_lines(shared):
    """Return the lines that say what all commands of each batch share."""
    if len(shared) == 1:
        return tuple(f'all commands: {words}' for words in shared.values() if words)
    return tuple(f'{printable(batch)}: {words}' for batch, words in shared.items()
                 if batch and words)


def parameter_cell(text):
    """Return the Cell of a word of a command; people see it as it was typed."""
    number = plain_number(text)
    return Cell(text if number is None else number, text)


def is_echo(name, values, cells):
    """Tell whether a metric only repeats the parameter of its name, in all jobs that have it."""
    pairs = [(given.get(name, EMPTY).value, found[name].value)
             for given, found in zip(values, cells) if name in found]
    return bool(pairs) and all(one == other for one, other in pairs)


def facts_of(jobs, now):
    """Return [{column's key: Cell}] of what the journals tell of the Jobs."""
    has_batches = len({job.batch for job in jobs}) > 1
    has_folders = len({job.folder for job in jobs}) > 1
    has_files = len({job.files for job in jobs if job.files}) > 1
    facts = []
    for job in jobs:
        is_numbered = job.batch and job.name.startswith(f'{job.batch}.')
        short = job.name[len(job.batch):] if is_numbered else job.name
        time_s = now - job.began if job.state == 'running' and job.began else job.wall_s
        numbers = f' GPU{"s" * ("," in job.gpus)} {job.gpus}' if job.gpus else ''
        found = {
            JOB: Cell(job.name, short), EXIT: exit_cell(job), STATE: cell_of(job.state or None),
            TIME: EMPTY if time_s is None else Cell(round(time_s, 3), duration_of(time_s)),
            FOLDER: cell_of(job.folder if has_folders else None),
            BATCH: cell_of(job.batch or None if has_batches else None),
            MEMORY: cell_of(job.memory_mb), GPU_MEMORY: cell_of(job.gpu_memory_mb),
            WHERE: Cell(job.machine, job.machine + numbers) if job.machine else EMPTY,
            GPUS: cell_of(job.gpus or None), COMMAND: cell_of(job.command or None),
            FILES: cell_of(job.files[:DIGEST] or None if has_files else None)}
        facts.append({column.key: cell for column, cell in found.items() if cell != EMPTY})
    return facts


def exit_cell(job):
    """Return the Cell of an exit status; of a job without one people see why."""
    if job.exit_code is not None:
        return Cell(job.exit_code, str(job.exit_code))
    return Cell(None, '…' if job.state == 'running' else job.state)


def find_column(table, name):
    """Return the Column that has this name for programs or people."""
    for column in table.columns:
        if name in (column.key, column.head):
            return column
    names = [printable(column.head) for column in table.columns if column.readers != PROGRAMS]
    raise UsageError(f'there is no column {printable(name)}. Columns: {", ".join(names[:40])}'
                     f'{", …" * (len(names) > 40)}')


# ---- Means: rows that differ in some parameters only, as one ----

def averaged(table, names, takes_all, report):
    """Return the Table with means over the parameters `names`: a row for each group of Jobs.

    takes_all: jobs that failed or still run, too
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
        if takes_all or job.state == '' or (
                job.state in ('finished', 'earlier') and job.exit_code == 0):
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
    """Return what equal values have in common: 0.1 and 1e-1, and nan and nan."""
    value = cell.value
    if isinstance(value, float) and value.is_integer():
        value = int(value)              # the other way round large numbers would lose digits
    return repr(value) if is_number(value) else value


def spread_keys(column):
    """Return the names of the columns with the deviation and the count of a metric."""
    return f'{column.key} std', f'{column.key} count'


def means_of(rows, metrics):
    """Return {key: Cell} with mean and deviation of each metric, and its count where some lack.

    Of memory it is the most: that is what the next jobs have to ask for.
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
    """Return (mean, sample standard deviation) of floats; of one value there is no deviation."""
    count = len(values)
    mean = sum(value / count for value in values)       # their sum may be too large for a float
    if count < 2:
        return values[0], None
    with contextlib.suppress(OverflowError, ValueError):
        return mean, math.sqrt(math.fsum((value - mean) * (value - mean) for value in values)
                               / (count - 1))
    return mean, math.nan


def mean_text(mean, deviation):
    """Return a mean as people read it: rounded to two digits of its deviation."""
    if not deviation:
        return short_number(mean)
    if not math.isfinite(deviation) or not 1e-4 <= abs(mean) < 1e6:
        return f'{mean:.4g} ± {deviation:.2g}'
    digits = min(max(1 - math.floor(math.log10(deviation)), 0),
                 max(5 - math.floor(math.log10(abs(mean))), 0))
    return f'{mean:.{digits}f} ± {deviation:.{digits}f}'


# ---- Choosing: which rows and columns, and in which order ----

TESTS = {'<': operator.lt, '<=': operator.le, '>': operator.gt, '>=': operator.ge}


def filtered(table, tests):
    """Return the Table with the rows for which all tests hold: (column, sign, operand)."""
    tests = [(find_column(table, name), sign, operand) for name, sign, operand in tests]
    kept = [(row, job) for row, job in zip(table.rows, table.jobs) if all(
        holds(row.get(column.key, EMPTY), sign, operand) for column, sign, operand in tests)]
    return table._replace(rows=[row for row, _ in kept], jobs=tuple(job for _, job in kept))


def in_unit(reading, unit):
    """Return the number of a Reading in the unit of a Cell, or None if it has no such unit.

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
    """Tell whether a Cell has nothing that could be before or behind others."""
    return cell.value is None or is_number(cell.value) and math.isnan(cell.value)


def order_of(cell):
    """Return a key that sorts numbers before texts."""
    return (0, cell.value, []) if is_number(cell.value) else (1, 0, naturally(cell.value))


def in_order(table, sort):
    """Return the Table sorted by (column, is descending); empty cells and nan are last."""
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

FORMULA = tuple('=+-@\t\r\n＝＋－＠')      # how a cell begins that a spreadsheet may compute

LATEX = {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}',
         '…': r'\dots{}', '±': r'$\pm$', '<': r'\textless{}', '>': r'\textgreater{}',
         '|': r'\textbar{}', '"': "''", **{c: f'\\{c}' for c in '&%$#_{}'}}


def columns_for(table, readers):
    """Return the columns that PROGRAMS or PEOPLE see."""
    return [column for column in table.columns if column.readers in (BOTH, readers)]


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
    # A line that is empty would be no row.
    return ''.join((','.join(map(quoted, row)) or '""') + '\n' for row in rows)


def quoted(text):
    """Return a text in quotes if CSV needs them; Python's csv forgets that for \\r."""
    return '"{}"'.format(text.replace('"', '""')) if re.search('[",\r\n]', text) else text


def csv_text(cell, column):
    """Return the text of a cell in CSV: a parameter as it was typed, all else with all digits."""
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
    """Tell whether a column has numbers, for people, and nothing else."""
    cells = [row[column.key] for row in table.rows if column.key in row]
    return bool(cells) and all(is_number(cell.value) or cell.value is None for cell in cells)


def cells_for_people(table, columns):
    """Return the texts of the rows."""
    return [[printable(row.get(column.key, EMPTY).text) for column in columns]
            for row in table.rows]


def as_markdown(table):
    """Return the table for Markdown, below the words that all commands have."""
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
        # Behind \\ and \midrule these would begin an argument.
        return f'{{}}{text}' if text.lstrip().startswith(('[', '*')) else text

    columns = columns_for(table, PEOPLE)
    kinds = ''.join('r' if is_numeric(table, column) else 'l' for column in columns)
    return '\n'.join([
        r'% needs \usepackage{booktabs}', *(f'% {shared}' for shared in table.shared),
        rf'\begin{{tabular}}{{{kinds}}}', r'\toprule',
        line(printable(column.head) for column in columns), r'\midrule',
        *map(line, cells_for_people(table, columns)), r'\bottomrule', r'\end{tabular}', ''])


# ---- Screen: the table for a terminal ----

SHORTEST = 12                       # columns of a terminal that a cell is cut to, at most
HIDDEN_FIRST = (MEMORY, FILES, GPU_MEMORY, FOLDER, WHERE, TIME)     # where not all fit
COUNTER = re.compile('(?i)(epoch|step|iter(ation)?|batch)s?')


def cut(text, width):
    """Return the text in at most `width` columns; … stands for what is cut off."""
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
    """Return the columns that may be hidden, the first one first.

    The last metrics go first, before them those that count or have one value only.
    """
    def is_dull(column):
        values = {identity(row[column.key]) for row in table.rows if column.key in row}
        return len(values) < 2 or bool(COUNTER.fullmatch(column.key))

    ranked = sorted((column for column in columns if column.kind == METRIC), key=is_dull)
    facts = [column for column in HIDDEN_FIRST if column in columns]
    parameters = [column for column in columns if column.kind == PARAMETER]
    return [*reversed(ranked[3:]), *facts, *reversed(ranked[1:3]), *reversed(parameters[1:])]


def fitted(table, width):
    """Return (columns, how wide each is) that fit the width; None: all, whole."""
    columns = columns_for(table, PEOPLE)
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
    """Return the lines for a terminal, the table and what is around it.

    width: the columns of the terminal; None: whole.  style(text, code): the text in bold (1) or in
    red (31)
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
    """Return the last line: how many jobs the table has, and how they are."""
    states = collections.Counter(job.state for job in table.jobs)
    counts = [f'{states[state]:,} {state}' for state in (
        'finished', 'failed', 'running', 'ended', 'lost', 'cancelled', 'earlier') if states[state]]
    jobs = many(len(table.jobs), 'job')
    groups = f'{many(len(table.rows), "row")} of ' if JOBS in table.columns else ''
    return f'{groups}{jobs}{": " if counts else ""}{", ".join(counts)}'


# ---- Function ----

TEST = re.compile(r'(?s)\s*(.+?)\s*(<=|>=|==|!=|<|>|=)\s*(.*?)\s*')


def results_table(*results, metric=(), from_=(), where=(), mean_over=(), unfinished=False,
                  sort=(), columns=(), earlier=False, report=None):
    """Return the table of the results of jobs as a list of dictionaries, a row each.

    results are paths: folders job_results, or results in them; by default job_results.  The
    keywords are the options of the command; each may be a text or a list of texts.  All rows have
    the same keys, in the order of the columns; an empty cell is None.  report(sentence) is called
    with what a user should know, such as that results of different files are mixed.

    All errors are TableErrors whose text is for users.
    """
    wishes = read_wishes(metric, from_, where, mean_over, unfinished, sort, columns, earlier)
    return as_dictionaries(read_table(results, wishes, report or (lambda sentence: None)))


def as_list(value):
    """Return a text, or a list of texts, as a list."""
    return [value] if isinstance(value, str) else list(value)


def names_in(value):
    """Return the names in 'a,b' or ['a', 'b']."""
    return [name.strip() for one in as_list(value) for name in one.split(',') if name.strip()]


def read_wishes(metric, from_, where, mean_over, unfinished, sort, columns, earlier):
    """Return the Wishes that the options say."""
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
        tuple(names_in(columns)), unfinished, earlier)


def read_table(results, wishes, report):
    """Return the Table of the results with all that the Wishes ask for."""
    places = find_places([os.fsdecode(path) for path in results] or ['job_results'])
    try:
        jobs = [job for place in places for job in read_jobs(place, report)]
    except OSError as error:
        raise TableError(f'{printable(str(error.filename))} cannot be read: '
                         f'{reason_of(error)}.') from None
    earlier = [job for job in jobs if job.state == 'earlier']
    if earlier and not wishes.earlier:
        jobs = [job for job in jobs if job.state != 'earlier']
        if any(place.names for place in places):
            report(f'left out: {many(len(earlier), "result")} of jobs that were run again '
                   '(--earlier shows them)')
    if not jobs:
        report('there are no results yet.')
        return Table((JOB,), [], (), ())
    table = filtered(make_table(jobs, wishes, report, time.time()), wishes.tests)
    if not table.rows:
        report(f'none of {many(len(jobs), "job")} fits --where')
    advise(table, report)
    if wishes.mean_over:
        table = averaged(table, wishes.mean_over, wishes.unfinished, report)
    table = in_order(table, wishes.sort)
    return with_columns(table, wishes.columns) if wishes.columns else table


def advise(table, report):
    """Report what could mislead a reader of the table."""
    files = collections.Counter(job.files[:DIGEST] for job in table.jobs if job.files)
    if len(files) > 1:
        counts = names_of([f'{many(count, "job")} ran with {digest}'
                           for digest, count in files.most_common(4)])
        first = files.most_common(1)[0][0]
        report(f'results of {len(files)} different sets of files are mixed: {counts}'
               f'{", …" * (len(files) > 4)}. For one of them: --where files={first}')
    batches = collections.Counter(job.batch for job in table.jobs if job.batch)
    if len(batches) > 1:
        first = table.jobs[0]
        path = first.path()[:-len(first.name)] + (first.batch or next(iter(batches)))
        report(f'these are jobs of {len(batches)} batches. For one of them: '
               f'results_table {printable(path)}.*')
    if table.jobs and not any(column.kind == METRIC for column in table.columns):
        report('no metrics were found. Have jobs print lines such as `loss: 0.31` or write '
               "metrics.json, or try: --metric 'loss=final loss (\\S+)'")


# ---- Options: from argv to the arguments of the function ----

SEVERAL = ('--metric', '--from', '--where')
FORMS = {'--csv': as_csv, '--json': as_json, '--markdown': as_markdown, '--latex': as_latex}


def option_kinds():
    """Return {option: 'flag' | 'value'} as the usage text describes them."""
    lines = re.findall(r'(?m)^  (-\w )?(--[a-z-]+)(=<[^>]+>)?  ', USAGE)
    kinds = {long: 'value' if value else 'flag' for _, long, value in lines}
    return {**kinds, **{short.strip(): kinds[long] for short, long, _ in lines if short}}


def read_options(argv):
    """Return (words, {option: value}); those of SEVERAL are lists, a flag is True."""
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
                raise UsageError(f'unknown option {printable(name)}{nearest(name, kinds)}.')
            if kinds[name] == 'flag':
                if equals:
                    raise UsageError(f'{name} takes no value.')
                options[name] = True
                continue
            if not equals:
                value = next(rest, None)
                if value is None:
                    raise UsageError(f'{name} needs a value.')
            if name in SEVERAL:
                options.setdefault(name, []).append(value)
            elif name in options:
                raise UsageError(f'{name} is there twice.')
            else:
                options[name] = value
    return words, options


def nearest(word, known):
    """Return ' (did you mean X?)' with the known words that this one may stand for, or ''.

    It may be the beginning of one, have typing errors, or name its parts in another order.
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


def check_output(path):
    """Raise unless a file may be written there: what jobs brought back is never overwritten."""
    folder = os.path.realpath(os.path.dirname(path) or '.')
    while folder != os.path.dirname(folder):
        if has_journals(folder):
            raise UsageError(f'--csv {printable(path)}: results_table writes nothing into a folder '
                             'of results. Name another file.')
        folder = os.path.dirname(folder)
    if os.path.isdir(path):
        raise UsageError(f'--csv {printable(path)}: this is a folder. Name a file.')


# ---- Terminal: the only printer ----

class Terminal:
    """The table goes to stdout, sentences go to stderr."""

    def __init__(self):
        self._out, self._err = sys.stdout, sys.stderr
        self._sentences = {}

    @property
    def shows(self):
        """Tell whether a person looks at stdout."""
        return self._out is not None and self._out.isatty()

    @property
    def width(self):
        """The columns of the terminal."""
        try:
            return os.get_terminal_size(self._out.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def style(self, text, code):
        """Return the text in bold or in red, where the terminal can show that."""
        is_plain = (not text or not self.shows or os.environ.get('NO_COLOR')
                    or os.environ.get('TERM', 'dumb') == 'dumb')
        return text if is_plain else f'\x1b[{code}m{text}\x1b[0m'

    def say(self, sentence):
        """Print this sentence at the end: nobody sees it in front of a long table."""
        self._sentences[sentence] = True

    def end(self):
        """Say the sentences, each once."""
        for sentence in self._sentences:
            self.complain(f'results_table: {sentence}')

    def complain(self, text):
        write(self._err, f'{text}\n')

    def put(self, text):
        write(self._out, text)

    def put_lines(self, text):
        """Print lines for programs; a terminal gets them without what could move its cursor."""
        self.put('\n'.join(map(printable, text.split('\n'))) if self.shows else text)


def write(stream, text):
    """Write a text as far as the stream's encoding can."""
    if stream is None:                  # it was closed before we began, as by `>&-`
        return
    try:
        try:
            text.encode(stream.encoding or 'utf-8')
        except UnicodeEncodeError:
            text = text.replace('…', '...').replace('±', '+-')
            text = text.encode(stream.encoding, 'backslashreplace').decode(stream.encoding)
        stream.write(text)
        stream.flush()
    except BrokenPipeError:             # as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def write_file(path, text):
    """Write a file; it appears when it is complete.  Raises OSError."""
    path = os.path.realpath(path)
    data = text.encode('utf-8', 'backslashreplace')
    if os.path.exists(path) and not os.path.isfile(path):       # such as a fifo, or /dev/stdout
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


def show_usage():
    """Print the usage text."""
    write(sys.stdout, USAGE)


# ---- Command: from argv to the exit status ----

def run(argv, terminal):
    """Do what the command line says."""
    words, options = read_options(argv)
    forms = [name for name in (*FORMS, '--wide') if name in options]
    if len(forms) > 1:
        raise UsageError(f'{names_of(forms)}: give one of them.')
    path = options.get('--csv', '-')
    if path != '-':
        check_output(path)
    wishes = read_wishes(
        *(options.get(name, ()) for name in ('--metric', '--from', '--where', '--mean-over')),
        '--unfinished' in options, *(options.get(name, ()) for name in ('--sort', '--columns')),
        '--earlier' in options)
    table = read_table(words, wishes, terminal.say)
    if not forms and terminal.shows or forms == ['--wide']:
        width = None if forms else terminal.width
        for line in as_screen(table, width, terminal.style) if table.rows else ():
            terminal.put(f'{line}\n')
        return
    text = FORMS[forms[0] if forms else '--csv'](table)
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


def main():
    """Run the command; return its exit status."""
    argv = sys.argv[1:]
    before_end = argv[:argv.index('--')] if '--' in argv else argv
    if '--help' in before_end or '-h' in before_end:
        show_usage()
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


if __name__ == '__main__':
    sys.exit(main())
