"""Checks that each job ran exactly once: compares the jobs' own notes with journal and report.

A line of a batch from ledger_line() notes its start and its end in three places: the ledger of its
machine, which no fault of the network or of the disk touches, its stdout, and a file `ran` in its
folder.  check_exactly_once() compares these with the journal and with the report.
"""
import json
import re
import shlex
from collections import defaultdict
from pathlib import Path

RAN = 'ran'         # the file that each such job makes in its folder
THERE_ALREADY = re.compile(r'WARNING: job results already exists for line (\d+),')


def ledger_line(job_command):
    """Return a line for a batch that runs the command and notes its start and its end."""
    return f'noted {shlex.quote(job_command)}'      # a program that every machine of the rig has


def ledgers_of(machines):
    """Return {account: ledger} of the machines, as check_exactly_once takes it."""
    return {machine.account: machine.ledger for machine in machines}


def check_exactly_once(ledgers, results='job_results', stdout='', journal=None, jobs=(),
                       backwards=True, again=False):
    """Raise an AssertionError with all contradictions, if a job did not run exactly once.

    ledgers     {account: file}, or machines
    stdout      the output of the program; for several runs, a list
    journal     the file; by default, the journal in `results`
    jobs        names of jobs that must have run and be reported; others may be missing
    backwards   whether the program fetched the jobs' folders
    again       whether a job that has ended may run again if the journal gave up that attempt:
                an interrupt or a power cut may hit a job at the moment of its end
    """
    if not isinstance(ledgers, dict):
        ledgers = ledgers_of(ledgers)
    results = Path(results)
    runs = read_ledgers(ledgers)
    reported = read_report([stdout] if isinstance(stdout, str) else stdout, again)
    journal = read_journal(journal or results / '.ssh_scheduler/journal')
    wrong = []
    for job in sorted({*runs, *reported, *journal, *jobs}):
        said = reported.get(job)
        wrong += check_runs(job, runs[job], journal.get(job, []), again)
        wrong += check_journal(job, runs[job], journal.get(job, []), said)
        if said in ('finished', 'skipped', 'failed'):
            wrong += check_reported(job, runs[job], said)
        if said in ('finished', 'skipped'):
            wrong += check_result(job, runs[job], results, backwards)
        elif job in jobs and said is None:
            wrong.append(f'{job} is missing in the report.')
    assert not wrong, '\n'.join(wrong)


# ---- Readers ----

def read_ledgers(ledgers):
    """Return {job: {(attempt, account): [words]}}."""
    runs = defaultdict(lambda: defaultdict(list))
    for account, file in ledgers.items():
        for line in Path(file).read_text().splitlines():
            job, attempt, word = line.rsplit(' ', 2)
            runs[job][int(attempt), account].append(word)
    return runs


def read_report(texts, again=False):
    """Return {job: 'started', 'skipped', 'finished' or 'failed'}, as last reported.

    A run may report the end of a job only once, unless `again`: a user may rerun jobs.
    A job is skipped if it has results already: a killed run may not have reported these.
    """
    reported = {}
    for text in texts:
        ended = {}
        for line in text.splitlines():
            word, _, rest = line.partition(': ')
            job = rest.partition(';')[0]
            if word in ('finished', 'failed') and ';' in rest:
                assert again or job not in ended, (f'{job} is reported {ended[job]} and then '
                                                   f'{word}, by one run.')
                ended[job] = word
            if word in ('finished', 'failed', 'started') and ';' in rest:
                reported[job] = word
            summary = re.fullmatch(r'(?:done|interrupted): ([0-9]+) jobs?: (.*), [0-9.]+ s', line)
            if summary:
                counts = map(int, re.findall('(?:^|, )([0-9]+) ', summary[2]))
                assert sum(counts) == int(summary[1]), f'The counts do not add up: {line}'
            there = THERE_ALREADY.match(line)
            if there and reported.get(f'batch.sh.{there[1]}') != 'failed':
                reported[f'batch.sh.{there[1]}'] = 'skipped'
    return reported


def read_journal(path):
    """Return {job: [event]}; ignore an unfinished last line."""
    events = defaultdict(list)
    *lines, _torn = path.read_bytes().split(b'\n') if path.exists() else [b'']
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            # These events are not about a job, or do not change one.
            if event['event'] not in ('tidied', 'journal', 'answered', 'unwanted', 'wanted',
                                      'begun', 'machine'):
                events[event['job']].append(event)
        except (ValueError, KeyError, TypeError):
            raise AssertionError(f'The journal has no event in line {number}: {line!r}') from None
    return events


# ---- Checks: each yields a sentence for each error ----

def check_runs(job, runs, events, again):
    """Yield sentences if the job started more often than once, plus once per attempt given up."""
    for (attempt, account), words in runs.items():
        if words.count('start') > 1:
            yield (f'{job} ran twice: attempt {attempt} was started {words.count("start")} times '
                   f'on {account}.')
        if 'start' not in words or words.count('end') > 1:
            yield f'{job}: the ledger of {account} makes no sense: {words} of attempt {attempt}.'
    starts, whole = sorted(runs), sorted(key for key, words in runs.items() if 'end' in words)
    excused = sum(event['event'] in ('lost', 'cancelled', 'renamed') for event in events)
    if len(starts) > 1 + excused:
        yield f'{job} ran twice: {these(starts)}; the journal gave up {excused}.'
    asked = sum(event['event'] == 'renamed' for event in events)
    if len(whole) > 1 + (excused if again else asked):
        yield f'{job} ran twice from its start to its end: {these(whole)}.'


def these(keys):
    return ', '.join(f'attempt {attempt} on {account}' for attempt, account in keys)


def check_journal(job, runs, events, said):
    state, claim, code = None, {}, None
    for event in events:
        word = event['event']
        if word == 'claimed':
            again = claim and event['attempt'] == claim['attempt']
            if again and event['machine'] != claim['machine']:
                yield (f'The journal contradicts itself: attempt {claim["attempt"]} of {job} is '
                       f'claimed on {claim["machine"]} and on {event["machine"]}.')
            if not again and state not in (None, 'lost', 'cancelled', 'renamed'):
                yield (f'The journal contradicts itself: {job} is claimed anew (attempt '
                       f'{event["attempt"]}), but was {state}.')
            if again and state == 'collected' or event['attempt'] < claim.get('attempt', 1):
                yield (f'The journal contradicts itself: attempt {event["attempt"]} of {job} is '
                       f'claimed again, but was {state}.')
            claim = event
        elif word in ('lost', 'cancelled') and state == 'collected':
            yield f'The journal contradicts itself: {job} is {word}, but was collected.'
        elif not claim or word in ('committing', 'collected') and state != 'ended' or (
                word in ('queued', 'running', 'cancelling', 'stopping') and state != 'claimed'):
            yield f'The journal contradicts itself: {job} is {word}, but was {state}.'
        if word == 'ended':
            code = event['exit_code']
        if word == 'renamed' and state != 'collected':
            yield f'The journal contradicts itself: {job} runs again, but was {state}.'
        state = state if word in ('queued', 'running', 'committing', 'cancelling',
                                  'stopping') else word

    claims = {(event['attempt'], event['machine']) for event in events
              if event['event'] == 'claimed'}
    for key in runs:
        if key not in claims:
            yield f'The journal contradicts: {job} ran as {these([key])}, which was not claimed.'
    if said == 'finished' and (state != 'collected' or code):
        yield (f'The journal contradicts: {job} is reported finished, but there it is {state}, '
               f'with exit code {code}.')
    if said == 'skipped' and (state not in ('ended', 'collected') or code):
        yield (f'The journal contradicts: {job} has results, but there it is {state}, with exit '
               f'code {code}.')
    if said == 'failed' and state == 'collected' and code == 0:
        yield f'The journal contradicts: {job} is reported failed, but there its exit code is 0.'
    if said not in ('finished', 'failed', 'skipped') and state in ('ended', 'collected'):
        yield f'The journal contradicts: {job} is {state} there, but is not reported as ended.'


def check_reported(job, runs, said):
    if said == 'finished' and not any('end' in words for words in runs.values()):
        how = 'began and did not end' if runs else 'never ran'
        yield f'{job} is reported finished, but it {how}.'


def check_result(job, runs, results, backwards):
    """Yield a sentence for each part of the result that is not from the last whole attempt."""
    whole = sorted(attempt for (attempt, _account), words in runs.items() if 'end' in words)
    if not whole:
        return              # check_reported() finds a false report
    start, end = (f'{job} {whole[-1]} {word}' for word in ('start', 'end'))
    out, err, folder = results / f'{job}.out', results / f'{job}.err', results / job
    files = [out, folder / RAN] if backwards else [out]
    for path in (err, *files):
        if not path.is_file():
            yield f'{job} is reported finished, but its result is missing: {path}'
            continue
        text = path.read_text(errors='replace')
        lines = text.splitlines()
        if path == err or [text.count(start), text.count(end)] == [1, 1] and (
                lines[0] == start and text.endswith(end + '\n')):
            continue
        if not text or lines[0] == start and end not in text:
            yield f'The result of {job} is partial: {path} ends with {lines[-1:]}.'
        else:
            yield (f'The result of {job} was overwritten: {path} goes from {lines[0]!r} to '
                   f'{lines[-1]!r}, and its attempt {whole[-1]} was run.')
