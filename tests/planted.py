"""Plants faults in the protocol, one at a time, and prints which test finds each.

    make planted        or    .venv/bin/python tests/planted.py [WORD]...

Each fault is a small change of the text of ssh_scheduler.py that breaks one guarantee.  The tests
of the protocol run with a changed copy: first the single cases, then the model with its usual
number of examples, or with PROTOCOL_EXAMPLES.  The exit status is 1 if no test finds a fault.  With
WORDs, try only the faults that have one of them in their names.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = 'ssh_scheduler.py'
CASES = ['tests/test_protocol.py', '-k', 'not no_fault']
MODEL = ['tests/test_protocol.py', '-k', 'no_fault']
CRASHES = ['tests/test_crashes.py', '-k', 'localhost']
REQUESTS = ['tests/test_requests.py', '-k', 'single_jobs or put_aside or away']
CLUSTERS = ['tests/test_slurm.py', '-k', 'fence or whatever or killed or come or waits']
LIMIT_S = 900

# name: tests to run, and pairs of texts: one that the program has once, and its replacement
FAULTS = {
    # on the machine
    'a job is begun by each who wants it (no O_EXCL)': (CASES, MODEL, (
        ('|| return\n  set -C\n  {\n', '|| return\n  set +C\n  {\n'),)),
    'a job that is revoked may yet begin': (CASES, MODEL, (
        ('{ printf \'#%-126s\\n\' revoked >"$file"; } && revoked=1', 'revoked=1'),)),
    'the end of a job is said before it is recorded': (CASES, MODEL, (
        ('  record "$file" "ended $status $wall $folder" "$command"\n  if leaves_nothing',
         '  if leaves_nothing'),
        ('"$wall" "$used"\n',
         '"$wall" "$used"\n  sleep 1\n'
         '  record "$file" "ended $status $wall $folder" "$command"\n'))),
    'a job that is lost is recorded as one that ended well': (CASES, MODEL, (
        ('"lost${folder:+ $folder}"\n  done\n', '"ended 0${folder:+ $folder}"\n  done\n'),)),
    'old runners live on': (CASES, MODEL, (
        ('      kill -KILL "${runner%% *}"\n', ''),)),
    # at a cluster
    'a batch script runs the job without the fence': (CLUSTERS, (
        ("    '[[ begun -ef claim.$me ]] || exit 0 ", "    'true || exit 0 "),
        # else the second run of a job would exit, because the FIFOs exist already
        ('"$run/events" "$run/quiet" || exit 121', '"$run/events" "$run/quiet"'))),
    'a job that may run is taken back': (CLUSTERS, (
        ('  [[ $more/begun -ef $more/claim.cancel ]]\n', '  true\n'),)),
    'no answer of sbatch is taken for a refusal': (CLUSTERS, (
        ('answer="unknown $answer" || ', 'answer="refused $answer" || '),)),
    'a job that Slurm still has is handed over again': (CLUSTERS, (
        ('  elif ((${#alive[@]})); then\n    adopt_oldest\n', ''),)),
    # in the client
    'a start is sent before the journal has it': (CRASHES, (
        ('attempt.stage.ready:\n', 'attempt.stage.ready and not attempt.why:\n'
         '                attempt.why = "sent"\n'),
        ("                worker.lives.move(attempt, 'claimed', **attempt.record)\n",
         '                later = self._client.processes.call_later     # after the next writes\n'
         '                later(0, functools.partial(later, 0, functools.partial(\n'
         '                    worker.lives.move, attempt, "claimed", **attempt.record)))\n'))),
    'the client does not ask how its jobs stand': (CASES, MODEL, (
        ("            worker.contact.send('adopt', *self._inherited)\n", ''),)),
    'a job is placed again with the number that it had': (CASES, MODEL, (
        (".get('attempt', 0) + 1\n", ".get('attempt', 1)\n"),)),
    'the end of a job is believed twice': (CASES, MODEL, (
        ("key, *ALIVE)\n        return attempt if attempt and attempt.streams else None\n",
         "key, *ALIVE, 'ended')\n"
         "        return attempt if attempt and attempt.streams else None\n"),)),
    'a list is taken for which nobody asked': (CASES, MODEL, (
        ('return attempt if attempt and attempt.leavings is None else None', 'return attempt'),)),
    'what a stream grew by is taken from any byte on': (CASES, MODEL, (
        ("new = data[self.here - offset:] if offset <= self.here else b''", 'new = data'),)),
    'a job is removed before its results are here': (CASES, MODEL, (
        ('        if entries == [(\'@\', \'\')]:\n',
         "        self._worker.contact.send('clean', attempt.key)\n"
         '        if entries == [(\'@\', \'\')]:\n'),)),
    'an event of a contact that is over is believed': (CASES, MODEL, (
        ('                if not self.is_over:\n                    self._hand_on',
         '                if True:\n                    self._hand_on'),)),
    'a job that found no room is taken for one that runs': (CASES, MODEL, (
        ("            self._worker.lives.move(attempt, 'held')\n",
         "            self._worker.lives.move(attempt, 'running')\n"),)),
    # requests of users
    'a job that was cancelled starts again': (REQUESTS, MODEL, (
        ('        if job.name in self.wishes.cancelled:\n            return\n', ''),)),
    'what was promised of a cancel is lost with the client': (REQUESTS, (
        ("        if attempt.record.get('cancelling'):", '        if False:'),)),
    'results are put aside by halves': (REQUESTS, (
        ('            self._end_commits()\n            self._end_renames()\n',
         '            self._end_commits()\n'),)),
    'a job on a machine that was away is not cancelled there': (REQUESTS, (
        ("if attempt.state == 'stopping' or self._worker.run.wishes.unwanted(attempt):",
         "if attempt.state == 'stopping':"),)),
}


def plant(text, changes):
    """Return the text with these changes; raise ValueError if an old text is not there once."""
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f'this is there {text.count(old)} times: {old!r}')
        text = text.replace(old, new)
    return text


def find(text, tries):
    """Return the test that fails with this text of the program, and its error; or ''."""
    with tempfile.TemporaryDirectory(prefix='planted-') as folder:
        shutil.copytree(HERE, Path(folder, 'tests'), ignore=shutil.ignore_patterns('__pycache__'))
        shutil.copy(HERE.parent / 'pyproject.toml', folder)
        Path(folder, PROGRAM).write_text(text)
        for arguments in tries:
            status, said = run_tests(folder, arguments)
            if status not in (0, 1):
                raise ValueError(f'pytest cannot run: {said[-2000:]}')
            if status:
                test, why = (match[1] if match else 'unknown' for match in (
                    re.search(pattern, said, re.M) for pattern in (
                        r'^(?:FAILED|ERROR) \S+::(\S+)', '^E +(.*)')))
                return f'{test}\n    {why[:110]}'
    return ''


def run_tests(folder, arguments):
    """Run pytest in this folder; return its exit status and its output."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'pytest', '-x', '-q', '-p', 'no:cacheprovider', *arguments],
        cwd=folder, env={**os.environ, 'PYTHONPATH': folder}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)      # so that pytest stops its processes
        process.communicate()
        raise
    return process.returncode, said


def main(words):
    text, missed = (HERE.parent / PROGRAM).read_text(), 0
    for name, (*tries, changes) in FAULTS.items():
        if words and not any(word in name for word in words):
            continue
        began = time.monotonic()
        try:
            found = find(plant(text, changes), tries)
        except (ValueError, subprocess.TimeoutExpired) as error:
            found, name = '', f'{name}: {error}'
        missed += not found
        print(f'{name:55} {time.monotonic() - began:4.0f} s  {found or "NOT FOUND"}', flush=True)
    return 1 if missed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
