"""Each screen of a batch as a person sees it, from real runs: the files of tests/golden/.

`make golden` writes them anew.  Then look at each that changed as a person would at 2 a.m.

Of four machines, two work, with two GPUs each, one is off, and one never answers.  Gates hold jobs
and copies until a screen is taken, so that screens differ only in times, rates, ports and process
ids: see `steady`.
"""
import concurrent.futures
import difflib
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import rig
from batching import Gate
from terminals import Terminal

GOLDEN = Path(__file__).parent / 'golden'
SIZES = (80, 24), (60, 20), (200, 50)
HELD = ('1', '2', '3', 'last')      # gates at which jobs wait while screens are taken
HOLDS = {5: 5, 50: 21, 400: 40}     # number of jobs -> the job that waits, as jobs 1 to 3 do

# What a job does depends on its number.  Until the gates open, all other jobs share one GPU.
TRAIN = r'''
n=${SSH_SCHEDULER_JOB##*.}
smi=$(command -v nvidia-smi)            # the job seems to use its GPU
echo "GPU-00000000-0000-0000-0000-00000000000$CUDA_VISIBLE_DEVICES, $$, 100" \
  >>"${smi%/*}/../gpus.apps"
case $n in
    1) echo 'epoch 57: loss 0.44'; read -r <GATE.1;;
    2) printf ' 10%%|#         | 12/117\r 20%%|##        | 24/117\r'; read -r <GATE.2;;
    3) echo 'loading data'; read -r <GATE.3;;
    4) read -r <GATE.first;;&
    HOLDS) read -r <GATE.last;;
    *[48]) echo 'Traceback (most recent call last):
  File "train.py", line 31, in <module>
    main()
RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB' >&2; exit 1;;
    *7) exit 3;;
    *15) train_model;;
    *29) kill -9 $$;;
esac
echo 'epoch 90: loss 0.31'
'''

# An rsync that reads the first 10 MB, and the rest once the file FREE exists.  So does tar, which
# brings the files if the session of rsync fails, as on a busy computer.
HALF = '''#!/bin/bash
exec PROGRAM "$@" < <({
    dd bs=64k count=10000000 iflag=count_bytes status=none
    until [ -e FREE ]; do sleep 0.02; done
    cat
} 2>/dev/null)
'''


def steady(line, columns):
    """Return a line of a screen without what differs from run to run.

    Times, rates and shares are replaced; those in a column keep their right edge.
    """
    def right(pattern, text, line):
        """Replace a match at the end of the line, behind blanks; keep its right edge."""
        return re.sub(rf' +({pattern})$', lambda match: text.rjust(len(match[0])), line)

    line = re.sub(r'(port |^)\d{5}(?=\D)', r'\g<1>22222', line)
    line = re.sub(r'\(process \d+\)', '(process 4711)', line)
    line = re.sub(r'since \d\d:\d\d', 'since 09:12', line)
    line = re.sub(r'( in| within) \d+( ?)s\b', r'\1 9\2s', line)
    line = re.sub(r'(, |^)\d+s$', r'\g<1>9s', line)           # of the batch; it may be wrapped
    line = re.sub(r'( running .*  \d+m) \d\ds', r'\1 30s', line)
    time_text = r'\d+[smh](?: \d\d[smh])?'
    if ': sending ' in line:
        return right(rf'(?:[━╸─]+ +)?\d+%  [\d.]+ \w+/s(?:  {time_text} left)?',
                     f'{"━" * 10 if columns > 60 else ""}     50%  2.5 MB/s'
                     + '  9s left' * (' left' in line), line)
    if re.match(r' \S*( +)?\d+/\d+ ', line):
        if columns > 60:
            line = right(r'\S+ left', '9s left', line)
        else:       # the length of the time left, if known, decides what else has room
            line = re.sub(r'( +\d+ waiting)?( +\S+ left)?$', '', line)
    line = re.sub(rf'^(\.\d+ +lab\d GPU \d)( +){time_text}(?=  |$)',
                  lambda match: match[1] + '9s'.rjust(len(match[0]) - len(match[1])), line)
    return right(f' {time_text}', '9s', line)


def steady_order(lines):
    """Return the lines, with neighbours sorted if their order differs from run to run.

    They belong to jobs that start at once, or to running jobs: the last to write comes first.
    """
    def number(line):
        return int(re.search(r'\.(\d+) ', line)[1])

    def kind(line):
        return re.match(r'started: |\.\d+ +\S+ GPU \d +9s|', line)[0][:1]

    shown = []
    for line in lines:
        place = len(shown)
        while kind(line) and place and kind(shown[place - 1]) == kind(line) and (
                number(shown[place - 1]) > number(line)):
            place -= 1
        shown.insert(place, line)
    return shown


class Scene:
    """A batch on a terminal of one size, with machines and a folder of its own."""

    def __init__(self, size, count, machines, folder, scheduler, env):
        self.size, self.count, self.machines, self.folder = size, count, machines, folder
        self.outside = folder / 'outside'
        self.project, self.programs = folder / 'project', folder / 'bin'
        for path in (folder, self.outside, self.project, self.programs):
            path.mkdir()
        # As if installed: the commands that the program shows begin with this name.
        (self.programs / 'execute_batch').symlink_to(scheduler)
        self.env = {**env, 'PATH': f'{self.programs}:{env["PATH"]}'}
        self.gate = Gate(folder / 'gate')
        for name in (*HELD, 'first'):
            self.gate.path(name)
        for machine in machines:
            known = {'UserKnownHostsFile': str(machine.known_hosts)}
            # The client gives up on the silent machine after ConnectTimeout, 15 s by default.
            shutil.copy(machine.yaml(ssh_options={**known, 'ConnectTimeout': 100}), self.project)
        for machine in machines[:2]:
            for name in ('rsync', 'tar'):
                script = HALF.replace('PROGRAM', rig.program(name))
                machine._script(name, script.replace('FREE', str(self.free(machine))))
        machines[2].stop()
        machines[3].freeze()
        (self.project / 'train.sh').write_text(TRAIN.replace(
            'GATE.', f'{self.gate.folder}/').replace('HOLDS', str(HOLDS[count])))
        self.grow('data.bin', 20_000_000)
        (self.project / 'experiments.sh').write_text(''.join(
            f'bash train.sh --lr {10 ** (n % 4) / 1000:g} --seed {n}\n'
            for n in range(1, count + 1)))
        self.text = ''                  # of the golden file

    def free(self, machine):
        """Return the file that must exist before the machine's rsync reads the rest."""
        return self.outside / f'free.{machine.name}'

    def grow(self, name, size):
        with open(self.project / name, 'wb') as file:
            file.truncate(size)

    def _table(self, lines):
        """Return the lines of --status as a golden file has them.

        The head becomes one line, since the process id decides where it breaks.  Lines in the
        middle are left out if the terminal has no room for all.
        """
        rows = self.size[1]
        head = next(at for at, line in enumerate(lines) if line.startswith('job '))
        lines = [' '.join(' '.join(lines[:head]).split()), *lines[head:]]
        return [*lines[:rows - 9], '(and so on)', *lines[-8:]] if len(lines) > rows else lines

    @property
    def name(self):
        return '{}x{}-{}.txt'.format(*self.size, self.count)

    def terminal(self, *options, cwd=None):
        argv = [sys.executable, self.programs / 'execute_batch', 'experiments.sh', *options]
        return Terminal(argv, *self.size, env=self.env, cwd=cwd or self.project)

    def take(self, name, shown, since=''):
        """Keep what the terminal shows, from the last line that begins with `since`."""
        columns, rows = self.size
        lines, before = [], None
        while lines != before:          # until another picture, 0.25 s later, shows the same
            before = lines
            shown.settle()
            text = '\n'.join(shown.whole).rstrip()
            lines = [steady(line, columns) for line in text.split('\n')]
            if lines != before:
                shown.watch(0.25)
        if since:
            first = next(at for at, line in enumerate(lines) if re.match(since, line))
            lines = lines[first:]
        if name == 'status':
            lines = self._table(lines)
        self.text += '\n'.join([f'==== {name}', *steady_order(lines)[-rows:], '', ''])

    def play(self):
        """Run the batch and take all screens."""
        shown = self.terminal('--machines', *(machine.name for machine in self.machines))
        try:
            self._start(shown)
            self._run(shown)
            self._end(shown)
        finally:
            shown.close()
            self.gate.close()
        self._again()

    def play_large(self):
        """Send a folder that is large by accident, and cancel that."""
        (self.project / 'checkpoints').mkdir()
        self.grow('checkpoints/last.ckpt', 3_000_000_000)
        shown = self.terminal('--machines', *(machine.name for machine in self.machines))
        try:
            shown.until(lambda text: self._waits(text) and len(re.findall(r' 0%  \d', text)) == 2)
            self.take('large', shown)
            shown.press('\x03')
            shown.until(lambda text: 'Press a key' in text)
            shown.press('c')
            shown.end()
            self.take('cancelled', shown)
        finally:
            shown.close()

    def _waits(self, text):
        """Tell whether the machines are shown, lab3 has failed, and then the progress is shown."""
        return 'choices' in text and 'lab3: cannot' in text and f' 0/{self.count} ' in text

    def _start(self, shown):
        first, second = self.machines[:2]
        shown.until(lambda text: self._waits(text) and len(
            re.findall(' [2-7][0-9]%', text)) == 2)
        self.take('start', shown)
        self.free(second).touch()
        shown.until(lambda text: '2 running' in text and '24/117' in text)
        self.take('sending', shown)
        self.free(first).touch()
        shown.until(lambda text: '4 running' in text and 'epoch 57' in text and 'loading' in text)

    def _run(self, shown):
        self.gate.open('first')
        ended = HOLDS[self.count] - 4
        shown.until(lambda text: f' {ended}/{self.count} ' in text and '4 running' in text
                    and re.search(rf'^\.{HOLDS[self.count]} ', text, re.M)
                    and (ended < 3 or ' left' in text or self.size[0] == 60))
        self.take('running', shown)
        shown.press('\x03')
        shown.until(lambda text: 'Press a key' in text)
        self.take('question', shown)
        shown.press('\r')
        shown.until(lambda text: 'Press a key' not in text)
        self._status()

    def _status(self):
        """Take --status in a copy of the folder, where jobs seem to run for 20 to 80 minutes."""
        there = self.folder / 'there'
        inner = there / 'job_results/.ssh_scheduler'
        shutil.copytree(self.project, there)
        (inner / 'lock').unlink()
        os.link(self.project / 'job_results/.ssh_scheduler/lock', inner / 'lock')
        events = [json.loads(line) for line in (inner / 'journal').read_text().splitlines()]
        for event in events:
            number = int(event.get('job', '.0').rpartition('.')[2])
            took_s = 1230 + 1260.0 * number % 3600
            if event['event'] == 'claimed':
                event['time'] = time.time() - took_s
            if event['event'] == 'ended':
                event['wall_s'] = took_s
        (inner / 'journal').write_text(''.join(f'{json.dumps(event)}\n' for event in events))
        shown = self.terminal('--status', cwd=there)
        try:
            shown.end()
            self.take('status', shown)
        finally:
            shown.close()

    def _end(self, shown):
        if self.count > 5:              # else the last screen names lab4
            self.machines[3].stop()
            shown.until(lambda text: 'lab4: cannot be used' in text)
        for name in HELD:
            self.gate.open(name)
        shown.end()
        self.take('end', shown, since='lab4: did not|failed  ')

    def _again(self):
        shown = self.terminal('--machines', 'lab1')
        try:
            shown.end()
            self.take('again', shown)
        finally:
            shown.close()


def compare(found):
    """Compare with the golden files, or write them anew."""
    if os.environ.get('GOLDEN') == 'write':
        GOLDEN.mkdir(exist_ok=True)
        for name, text in found.items():
            (GOLDEN / name).parent.mkdir(exist_ok=True)
            (GOLDEN / name).write_text(text)
        return
    differences = []
    for name, text in found.items():
        path = GOLDEN / name
        golden = path.read_text() if path.exists() else ''
        differences += difflib.unified_diff(golden.splitlines(), text.splitlines(), name,
                                            'as it is now', lineterm='')
    if differences:
        pytest.fail('\n'.join([*differences, 'If that is better: make golden']), pytrace=False)


@pytest.fixture
def scenes(lab, tmp_path, scheduler, client_env):
    """Make a Scene for each size of a terminal: scenes(number of jobs)."""
    return lambda count: [
        Scene(size, count, [lab(name=f'lab{n}', gpus=rig.fake_gpus(
            2, memory_free_mb=15900)) for n in (1, 2, 3, 4)],
              tmp_path / str(size[0]), scheduler, client_env) for size in SIZES]


def at_once(acts):
    """Call all functions at once, since each of them waits most of the time."""
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for act in [threads.submit(act) for act in acts]:
            act.result()


@pytest.mark.parametrize('count', HOLDS)
def test_screens(scenes, count):
    played = scenes(count)
    at_once([scene.play for scene in played])
    compare({scene.name: scene.text for scene in played})


def test_a_folder_that_is_large_by_accident(scenes):
    played = scenes(5)
    at_once([scene.play_large for scene in played])
    compare({scene.name.replace('5.txt', 'large.txt'): scene.text for scene in played})
