"""A whole sweep with scikit-learn on two machines, by the commands of docs/results.md.

From the batch file to CSV, to LaTeX, to a page, and to a repeated job after the code has changed.
"""
import csv
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = Path('job_results')


def commands():
    """The command lines of the section, without the machines' names."""
    section = (ROOT / 'docs/results.md').read_text().partition('\n## A whole sweep\n')[2]
    block = re.search(r'(?s)```\n(.*?)```', section.partition('\n## ')[0])[1]
    lines = [line[2:] for line in block.splitlines() if line.startswith('$ ')]
    assert len(lines) == 8, lines
    return lines


@pytest.fixture
def shell(project, scheduler, client_env, lab1, lab2):
    """Run a line of the section with bash in a project that has its example: shell(line)."""
    shutil.copytree(ROOT / 'example', project / 'example')
    programs = project.parent / 'bin'
    programs.mkdir()
    for name, file in (('execute_batch', scheduler), ('results_table', ROOT / 'results_table.py')):
        words = [sys.executable, str(file), *[name] * (file == scheduler)]
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (programs / name).chmod(0o755)
    activate = Path(sys.executable).parent / 'activate'
    for name, machine in (('lab1', lab1), ('lab2', lab2)):
        shutil.copy(machine.yaml(setup=f'. {activate}'), project / f'{name}.yaml')
        machine.yaml()
    env = {**client_env, 'PATH': f'{programs}:{client_env["PATH"]}'}
    return lambda line: subprocess.run(['bash', '-c', line], env=env, timeout=120,
                                       capture_output=True, text=True, check=False)


def test_from_a_batch_file_to_a_table_a_page_and_the_same_again(shell, project):
    lines = commands()
    done = {line: shell(line) for line in lines[:2]}
    batch = done[lines[1]]
    assert 'started: digits.sh.12' in batch.stdout and batch.returncode == 1, batch
    where = {json.loads(line)['where'] for line in
             (RESULTS / '.ssh_scheduler/journal').read_text().splitlines() if '"claimed"' in line}
    assert len(where) == 2
    failed = [line for line in batch.stdout.splitlines() if line.startswith('failed: ')]
    assert failed and all('--lr 10 ' in line for line in failed)

    shown = shell(lines[2])
    assert (shown.returncode, 'wrote job_results/table.csv' in shown.stderr) == (0, True), shown
    rows = list(csv.DictReader(Path('job_results/table.csv').read_text().splitlines()))
    assert [row['lr'] for row in rows][:2] == ['0.1', '0.01'] and rows[0]['jobs'] == '3'
    assert float(rows[0]['val_acc']) > 0.9 > float(rows[-1]['val_acc'])

    paper = shell(lines[3])
    assert re.search(r'(?m)^0\.1 & 3 & 0\.9\d+ \$\\pm\$ 0\.0\d+ \\\\$', paper.stdout), paper

    page = shell(lines[4])
    assert page.returncode == 0, page
    text = Path('job_results/report.html').read_text()
    assert 'the loss explodes' in text and 'val_acc' in text and 'digits.sh.7' in text

    then = (RESULTS / 'digits.sh.4.out').read_bytes()
    assert shell(lines[5]).returncode == 0
    what = shell(lines[6])
    assert 'since then: example/digits/train.py changed' in what.stdout, what
    again = shell(lines[7])
    assert again.returncode == 0 and 'the same: stdout' in again.stdout, again
    assert 'the same: all files' in again.stdout
    assert (RESULTS / 'digits.sh.4-again.out').read_bytes() == then
    code = (project / 'example/digits/train.py').read_text()
    assert code != (ROOT / 'example/digits/train.py').read_text()
