"""The three ways to use the program: installed, as one copied file, and vendored and imported.

What is tried is a copy of this folder, never the folder itself, so nothing is left in it.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ('ssh_scheduler.py', 'combine_folders.py', 'results_table.py')
COMMANDS = ('execute_remote', 'execute_batch', 'execute_to', 'query_machines')
ALONE = ('combine_folders', 'results_table')        # each a file that needs no other
EXECUTABLES = (*COMMANDS, *ALONE)

# Set where a developer works and inherited by what we start: they would change what is tried.
MEDDLING = ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'UV_PYTHON', 'PIP_TARGET', 'PIP_USER',
            'MAKEFLAGS')


def run(*argv, cwd, environment=None):
    """Run a command to its end and return it with its output, whatever its status."""
    env = {name: value for name, value in os.environ.items() if name not in MEDDLING}
    env['PYTHONDONTWRITEBYTECODE'] = '1'
    env.update(environment or {})
    return subprocess.run(
        [str(word) for word in argv],
        cwd=cwd, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )


def must_run(*argv, cwd, environment=None):
    """Run a command that has to succeed and return what it wrote to stdout."""
    done = run(*argv, cwd=cwd, environment=environment)
    assert done.returncode == 0, f'{done.args}\n{done.stdout}{done.stderr}'
    return done.stdout


def assert_helps(done, command):
    """The command showed its usage on stdout and nothing else happened."""
    assert (done.returncode, done.stderr) == (0, ''), f'{done.args}\n{done.stderr}'
    assert re.search(rf'(?im)^\s*usage:\s+{command}\b', done.stdout), done.stdout


def copy_project(to):
    """Copy what a clone would hold: neither hidden folders nor what tools made."""
    made = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'build', 'dist', 'job_results')
    shutil.copytree(ROOT, to, ignore=made)
    return to


@pytest.fixture
def copied_file(tmp_path):
    """ssh_scheduler.py alone in an empty folder, as on a lab machine."""
    return Path(shutil.copy2(ROOT / 'ssh_scheduler.py', tmp_path))


# --- Installed -----------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def installed(tmp_path_factory):
    """A fresh virtual environment with the project installed from a git clone, as README says."""
    if not shutil.which('git'):
        pytest.skip('git is missing, and the installation that README shows starts from a clone')
    folder = tmp_path_factory.mktemp('packaging')
    clone = copy_project(folder / 'clone')
    somebody = ('-c', 'user.name=somebody', '-c', 'user.email=somebody@example.org')
    must_run('git', 'init', '-q', cwd=clone)
    must_run('git', 'add', '-A', cwd=clone)
    must_run('git', *somebody, 'commit', '-q', '--no-verify', '-m', 'all of it', cwd=clone)

    must_run(sys.executable, '-m', 'venv', folder / 'venv', cwd=folder)
    python = folder / 'venv/bin/python'
    must_run(python, '-m', 'pip', 'install', f'git+file://{clone}', cwd=folder)
    return folder / 'venv'


@pytest.fixture(scope='session')
def metadata(installed):
    """What was built, as the installed package says it."""
    code = """if True:
        import json
        from importlib.metadata import distribution
        package = distribution('ssh-scheduler')
        print(json.dumps({
            'version': package.version,
            'requires': package.requires,
            'python': package.metadata['Requires-Python'],
            'license': package.metadata['License'] or package.metadata['License-Expression'],
            'files': [str(path) for path in package.files],
        }))
    """
    return json.loads(must_run(installed / 'bin/python', '-c', code, cwd=installed))


@pytest.mark.parametrize('command', EXECUTABLES)
def test_an_installed_executable_shows_its_help(installed, tmp_path, command):
    assert_helps(run(installed / 'bin' / command, '--help', cwd=tmp_path), command)


def test_the_version_is_the_one_in_the_file(metadata):
    source = (ROOT / 'ssh_scheduler.py').read_text(encoding='utf-8')
    assert f"\n__version__ = '{metadata['version']}'\n" in source


def test_three_modules_and_six_executables_are_installed_and_nothing_else(metadata):
    files = [path for path in metadata['files'] if '__pycache__' not in path]
    ours = {path for path in files if not path.split('/')[0].endswith('.dist-info')}
    assert ours == {*MODULES, *(f'../../../bin/{name}' for name in EXECUTABLES)}
    assert any(path.endswith('LICENSE') for path in files)
    assert metadata['license'] == 'MIT'


def test_the_demo_runs_its_batch_and_leaves_nothing_behind(installed, tmp_path):
    environment = {
        'PATH': f'{installed / "bin"}{os.pathsep}{os.environ["PATH"]}',
        'TMPDIR': str(tmp_path),
    }
    shown = must_run('bash', ROOT / 'example/demo.sh', cwd=tmp_path, environment=environment)
    assert len(re.findall(r'(?m)^finished: example_batch_script\.sh\.[1-4]; ', shown)) == 4, shown
    assert 'local.sh runs on ' in shown
    assert list(tmp_path.iterdir()) == []


# --- One file ------------------------------------------------------------------------------------


def test_the_file_can_be_executed():
    for name in MODULES:
        assert (ROOT / name).stat().st_mode & stat.S_IXUSR, name
        assert (ROOT / name).read_text(encoding='utf-8').startswith('#!/usr/bin/env python3\n')


@pytest.mark.parametrize('command', COMMANDS)
def test_a_copied_file_takes_the_command_as_its_first_word(copied_file, command):
    done = run(sys.executable, copied_file.name, command, '--help', cwd=copied_file.parent)
    assert_helps(done, command)


@pytest.mark.parametrize('command', COMMANDS)
def test_a_copied_file_runs_as_a_module(copied_file, command):
    done = run(sys.executable, '-m', 'ssh_scheduler', command, '--help', cwd=copied_file.parent)
    assert_helps(done, command)


@pytest.mark.parametrize('command', COMMANDS)
def test_a_symlink_is_the_command_that_it_is_named_after(copied_file, tmp_path, command):
    (tmp_path / 'bin').mkdir()
    link = tmp_path / 'bin' / command
    link.symlink_to(copied_file)
    # `#!/usr/bin/env python3` has to find the Python that has docopt.
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    assert_helps(run(link, '--help', cwd=tmp_path, environment={'PATH': path}), command)


@pytest.fixture
def run_bare(copied_file):
    """Run the copied file by a Python without site-packages: what is missing there is missing.

    has: the modules that it has all the same.
    """
    def run_it(*words, has=()):
        for name in has:
            place = Path(importlib.util.find_spec(name).origin)
            place = place.parent if place.name == '__init__.py' else place
            os.symlink(place, copied_file.parent / place.name)
        return run(sys.executable, '-S', copied_file, *words, cwd=copied_file.parent,
                   environment={'HOME': str(copied_file.parent)})

    return run_it


@pytest.mark.parametrize('command', COMMANDS)
def test_help_needs_nothing_but_python(run_bare, command):
    assert_helps(run_bare(command, '--help'), command)
    assert run_bare(command, '--version').returncode == 0
    assert run_bare('--help').stderr == ''


@pytest.mark.parametrize('words', [
    ['execute_batch', 'b', '--machines', 'a'], ['execute_to', '--machines', 'a', '--', 'true'],
    ['execute_remote', '--machine', 'a', 'true'], ['query_machines', '--machines', 'a']])
@pytest.mark.parametrize('has', [[], ['docopt']])
def test_a_missing_library_is_one_sentence(run_bare, copied_file, words, has):
    missing = 'yaml' if has else 'docopt'
    (copied_file.parent / 'a').write_text('ip: nowhere')
    (copied_file.parent / 'b').write_text('true')
    done = run_bare(*words, has=has)
    assert (done.returncode, done.stdout) == (2, ''), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'{words[0]}: {sys.executable} has no module {missing}. Try: '
                           f'{sys.executable} -m pip install docopt-ng PyYAML rich, or use uv')
    needed = read_script_block(ROOT / 'ssh_scheduler.py')['dependencies']
    assert line.partition('pip install ')[2].partition(',')[0].split() == sorted(
        needed, key=['docopt-ng', 'PyYAML', 'rich'].index)


def test_a_library_that_fails_is_not_said_to_be_missing(run_bare, copied_file):
    (copied_file.parent / 'docopt.py').write_text('import no_such_module_of_docopt')
    done = run_bare('execute_to', '--machines', 'a', '--', 'true')
    assert 'no_such_module_of_docopt' in done.stderr and 'pip install' not in done.stderr


def read_script_block(path):
    """Return requires-python and dependencies of a file's inline metadata block (PEP 723)."""
    # The pattern of PEP 723 for the one type that it has. tomllib is younger than Python 3.9, but
    # a TOML string and a TOML list of strings are Python literals too.
    pattern = r'(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$'
    blocks = re.findall(pattern, path.read_text(encoding='utf-8'))
    assert len(blocks) == 1, f'{path.name} has {len(blocks)} metadata blocks'
    text = re.sub(r'(?m)^# ?', '', blocks[0][0])
    values = re.findall(r'(?ms)^([\w-]+) = (\[.*?\]|".*?")$', text)
    return {name: ast.literal_eval(value) for name, value in values}


def test_the_script_block_says_what_setup_py_says(metadata):
    block = read_script_block(ROOT / 'ssh_scheduler.py')
    assert block == {'requires-python': metadata['python'], 'dependencies': metadata['requires']}


@pytest.mark.parametrize('name', ALONE)
def test_a_file_that_stands_alone_needs_nothing_but_python(tmp_path, name):
    copied = shutil.copy2(ROOT / f'{name}.py', tmp_path)
    assert read_script_block(Path(copied))['dependencies'] == []
    assert_helps(run(sys.executable, '-S', copied, '--help', cwd=tmp_path), name)


@pytest.mark.parametrize('words', [['ssh_scheduler.py', 'execute_batch'], ['combine_folders.py'],
                                   ['results_table.py']])
def test_uv_runs_the_copied_file(copied_file, words):
    folder = copied_file.parent
    for name in ALONE:
        shutil.copy2(ROOT / f'{name}.py', folder)
    if not shutil.which('uv') or run('uv', '--version', cwd=folder).returncode != 0:
        pytest.skip('uv is not installed')
    # Neither this machine's cache nor a Python that uv would have to download.
    environment = {'UV_CACHE_DIR': str(folder / 'cache'), 'UV_PYTHON_DOWNLOADS': 'never'}
    done = run(
        'uv', 'run', '--quiet', '--python', sys.executable, *words, '--help',
        cwd=folder, environment=environment,
    )
    assert_helps(done, words[-1].replace('.py', ''))


# --- Vendored ------------------------------------------------------------------------------------

IMPORT_AND_WATCH = r'''
import importlib, json, os, signal, sys, threading

def state():
    """What an import could change for the program around it."""
    return {
        'environment': dict(os.environ),
        'folder': os.getcwd(),
        'signals': [repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        'threads': threading.active_count(),
        'umask': [os.umask(0o22), os.umask(0o22)][0],
        'excepthook': repr(sys.excepthook),
        'streams': [id(sys.stdin), id(sys.stdout), id(sys.stderr)],
        'path': list(sys.path),
    }

FORBIDDEN = ('os.exec', 'os.fork', 'os.forkpty', 'os.link', 'os.mkdir', 'os.posix_spawn',
             'os.remove', 'os.rename', 'os.rmdir', 'os.symlink', 'os.system', 'socket.bind',
             'socket.connect', 'subprocess.Popen')
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
vendored = os.path.abspath('vendored')
acts = []

def watch(event, args):
    if event in FORBIDDEN:
        acts.append(f'{event} {args}')
    if event == 'open' and isinstance(args[2], int) and args[2] & WRITING:
        acts.append(f'writes {args[0]}')
    # Looking for a compiled copy of the module is Python's own doing.
    if event == 'open' and str(args[0]).startswith(vendored) and '__pycache__' not in args[0]:
        acts.append(f'reads {os.path.relpath(args[0], vendored)}')

sys.modules.update(yaml=None, docopt=None, rich=None)
os.umask(0o22)
before = state()
sys.addaudithook(watch)
importlib.import_module('vendored.' + sys.argv[1])
seen = list(acts)
after = state()
print(json.dumps({'before': before, 'after': after, 'acts': seen}))
'''


@pytest.mark.parametrize('name', ['ssh_scheduler', *ALONE])
def test_importing_a_vendored_copy_has_no_effect(tmp_path, name):
    (tmp_path / 'vendored').mkdir()
    (tmp_path / 'home').mkdir()
    shutil.copy2(ROOT / f'{name}.py', tmp_path / 'vendored')
    # -S: without site-packages, so what is not of the standard library cannot be imported.
    done = run(
        sys.executable, '-S', '-c', IMPORT_AND_WATCH, name, cwd=tmp_path,
        environment={'HOME': str(tmp_path / 'home')},
    )
    assert (done.returncode, done.stderr) == (0, '')
    report = json.loads(done.stdout)
    assert report['after'] == report['before']
    assert report['acts'] == [f'reads {name}.py']
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*'))
    assert left == ['home', 'vendored', f'vendored/{name}.py']


# --- The oldest Python, and the Makefile ---------------------------------------------------------


def test_nothing_newer_than_python_3_9_is_used():
    pytest.importorskip('vermin', reason='vermin is not installed')
    files = [str(ROOT / name) for name in MODULES]
    code = 'from vermin import main; main()'
    done = run(sys.executable, '-c', code, '-t=3.9-', '--no-tips', '--violations', *files, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_lists_its_targets(tmp_path):
    if not shutil.which('make'):
        pytest.skip('make is not installed')
    listed = re.findall(r'(?m)^  make (\w+) +\S', must_run('make', '-C', ROOT, cwd=tmp_path))
    phony = re.search(r'(?m)^\.PHONY: (.*)$', (ROOT / 'Makefile').read_text(encoding='utf-8'))
    assert set(listed) == set(phony.group(1).split()) - {'packages'}


def test_the_venv_is_of_the_python_that_make_was_told(tmp_path):
    for name in ('Makefile', 'requirements-dev.txt', 'setup.py'):
        shutil.copy2(ROOT / name, tmp_path)
    for name in ('one', 'two'):             # it makes a .venv that can do all, and nothing
        (tmp_path / name).write_text(f'''#!/bin/sh
            [ "$*" != "-m venv --clear .venv" ] || {{
                rm -rf .venv; mkdir -p .venv/bin; ln -s /bin/true .venv/bin/python; echo {name}; }}
        ''')
        (tmp_path / name).chmod(0o755)
    said = [must_run('make', '-s', 'venv', f'PYTHON=./{name}', cwd=tmp_path)
            for name in ('one', 'one', 'two', 'two', 'one')]
    assert said == ['one\n', '', 'two\n', '', 'one\n']
