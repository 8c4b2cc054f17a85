"""The program is killed at each point of its life at which it changes something: see crash.py.

By default, each test tries a third of the points, another third each.  CRASHES=all tries all.
"""
import concurrent.futures
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batching import NO_GPU
from ledgers import check_exactly_once, ledger_line

PROGRAM = Path(__file__).with_name('crash.py')
COMMANDS = ('echo one', 'echo two >made; mkdir deep; wc -c <big >deep/size',
            'head -c 100000 /dev/zero | tr "\\0" x; echo')
JOBS = [f'batch.sh.{n}' for n in range(1, 4)]
AT_A_TIME = 3


class Life:
    """One batch in a folder of its own, with a ledger of its own.

    like: another Life, on localhost, whose project and ledger are copied
    """

    def __init__(self, folder, machine, word, env, commands=COMMANDS, like=None):
        self.folder, self.project, self.ledger = folder, folder / 'project', folder / 'ledger'
        self.env = {**env, 'CRASH_LOG': str(folder / 'points'), 'RIG_LEDGER': str(self.ledger)}
        self.argv = [sys.executable, PROGRAM, 'execute_batch', 'batch.sh', *NO_GPU,
                     '--machines', word]
        self.jobs = [f'batch.sh.{n}' for n, _ in enumerate(commands, 1)]
        if like:
            shutil.copytree(like.project, self.project, symlinks=True)
            shutil.copy(like.ledger, self.ledger)
            return
        self.project.mkdir(parents=True)
        self.ledger.touch()
        (self.project / 'big').write_bytes(bytes(300_000))
        # A job of localhost has the variables of the client; a machine of the rig has its own.
        prefix = '' if word == 'localhost' else f'RIG_LEDGER={self.ledger} '
        (self.project / 'batch.sh').write_text(''.join(
            f'{prefix}{machine.bin}/{ledger_line(command)}\n' for command in commands))

    def run(self, point=0, request=None):
        """Run the batch to that point, or to its end.

        request: at the point, another command sends this request, and the run is not killed
        """
        env = {**self.env, 'CRASH_AT': str(point)}
        if request:
            env['CRASH_REQUEST'] = json.dumps(request)
        return subprocess.run(self.argv, cwd=self.project, stdin=subprocess.DEVNULL, env=env,
                              capture_output=True, text=True, timeout=60)

    def until_done(self, first):
        """Run the batch until all its jobs have results; return these runs, the first one, too."""
        runs = [first, self.run()]
        return runs if runs[-1].returncode == 0 else [*runs, self.run()]

    def ask(self, request):
        """Leave a request for the next client, as another command does."""
        inbox = self.project / 'job_results/.ssh_scheduler/inbox'
        inbox.mkdir(0o700, parents=True, exist_ok=True)
        (inbox / f'{time.time_ns():020}-1.request').write_text(json.dumps(request))

    def check(self, machine_name, *runs):
        """Raise unless each job ran once, or again only because of a request."""
        check_exactly_once({machine_name: self.ledger}, self.project / 'job_results',
                           [run.stdout for run in runs], jobs=self.jobs, again=True)

    def points(self):
        """Return the points that all runs passed, as 'NUMBER WHAT'."""
        return (self.folder / 'points').read_text().splitlines()

    def different_points(self):
        """Return the numbers of the points at which a kill leaves different states.

        A point before a step leaves the same state as the point after the last step, unless the
        program waited meanwhile.  Of points with the same text, such as in the middle of a large
        copy, only the first and the last one are returned.
        """
        texts = [point.partition(' ')[2] for point in self.points()]
        places = {}
        for number, text in enumerate(texts, 1):
            places.setdefault(text, []).append(number)
        return [number for number, text in enumerate(texts, 1)
                if number in (places[text][0], places[text][-1]) and (
                    number == 1 or not text.startswith('before') or text.endswith('after a wait'))]


def tried(points, third):
    """Return the points of third 0, 1 or 2.  Pairs stay together: amid a write, and after it."""
    return [point for place, point in enumerate(points)
            if os.environ.get('CRASHES') == 'all' or place // 2 % 3 == third]


@pytest.mark.parametrize('where', ['localhost', 'ssh'])
def test_each_job_runs_once_wherever_the_program_is_killed(lab, client_env, tmp_path, where):
    machine = lab()
    word, account, env = str(machine.yaml()), machine.account, client_env
    if where == 'localhost':
        word = account = 'localhost'
        env = {**client_env, 'SSH_SCHEDULER_PROC': str(machine.proc)}   # its /proc shows free cores

    def live(point):
        """Kill a life at this point; return the fault that this causes, or ''."""
        life = Life(tmp_path / str(point), machine, word, env)
        first, last = life.run(point), life.run()
        said = f'{first.stderr}{last.stdout}{last.stderr}'
        try:
            assert first.returncode in (0, -signal.SIGKILL) and last.returncode == 0
            assert 'Traceback' not in said
            check_exactly_once({account: life.ledger}, life.project / 'job_results',
                               [first.stdout, last.stdout], jobs=JOBS)
            assert (life.project / 'job_results/batch.sh.2/deep/size').read_text() == '300000\n'
            assert (life.project / 'job_results/batch.sh.3.out').stat().st_size > 100_000
            assert not [*(life.project / 'job_results/.ssh_scheduler').glob('incoming*')]
        except AssertionError as error:
            return f'{life.points()[point - 1]}: {error}\n{said}'
        return ''

    whole = Life(tmp_path / 'whole', machine, word, env)
    assert whole.run().returncode == 0
    with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as lives:
        points = whole.different_points()
        wrong = [text for text in lives.map(live, tried(points, int(where == 'ssh'))) if text]
    assert not wrong, '\n'.join(wrong)
