"""The three ways to use the program: installed, as one copied file, and vendored and imported.

The tests use a copy of this folder, never the folder itself, so they leave nothing in it.
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
import tarfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MODULES = ('ssh_scheduler.py', 'combine_folders.py', 'results_table.py')
COMMANDS = ('execute_remote', 'execute_batch', 'execute_to', 'query_machines')
ALONE = ('combine_folders', 'results_table')        # each a file that needs no other
EXECUTABLES = (*COMMANDS, *ALONE)

# Variables that a developer may have set.  Programs that inherit them would behave differently.
MEDDLING = ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV', 'UV_PYTHON', 'PIP_TARGET', 'PIP_USER',
            'MAKEFLAGS', 'MAKELEVEL')


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


def developing(program):
    """Return the path of a program of requirements-dev.txt."""
    return Path(sys.executable).parent / program


def assert_helps(done, command):
    """Assert that the command showed its usage on stdout and nothing else happened."""
    assert (done.returncode, done.stderr) == (0, ''), f'{done.args}\n{done.stderr}'
    assert re.search(rf'(?im)^\s*usage:\s+{command}\b', done.stdout), done.stdout


def copy_project(to):
    """Copy the files that a clone would have, without those that tools made."""
    made = shutil.ignore_patterns('.git', '.venv', '.*_cache', '.hypothesis', '__pycache__',
                                  '*.egg-info', 'build', 'dist', 'job_results')
    shutil.copytree(ROOT, to, ignore=made)
    return to


@pytest.fixture
def copied_file(tmp_path):
    """ssh_scheduler.py alone in an empty folder, as on a lab machine."""
    return Path(shutil.copy2(ROOT / 'ssh_scheduler.py', tmp_path))


# --- Installed -----------------------------------------------------------------------------------


@pytest.fixture(scope='session')
def clone(tmp_path_factory):
    """A git repository with the project, the source of the installations that README shows."""
    if not shutil.which('git'):
        pytest.skip('git is missing, and the installation that README shows starts from a clone')
    folder = tmp_path_factory.mktemp('packaging')
    clone = copy_project(folder / 'clone')
    somebody = ('-c', 'user.name=somebody', '-c', 'user.email=somebody@example.org')
    must_run('git', 'init', '-q', cwd=clone)
    must_run('git', 'add', '-A', cwd=clone)
    must_run('git', *somebody, 'commit', '-q', '--no-verify', '-m', 'all of it', cwd=clone)
    return clone


@pytest.fixture(scope='session')
def installed(clone):
    """A fresh virtual environment with the project installed."""
    folder = clone.parent
    must_run(sys.executable, '-m', 'venv', folder / 'venv', cwd=folder)
    python = folder / 'venv/bin/python'
    must_run(python, '-m', 'pip', 'install', f'git+file://{clone}', cwd=folder)
    return folder / 'venv'


@pytest.fixture(scope='session')
def metadata(installed):
    """The metadata of the installed package."""
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


@pytest.mark.parametrize('words', [['uv', 'tool', 'install'], ['pipx', 'install']])
def test_the_installations_of_readme(clone, tmp_path, words):
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    assert f'\n$ {" ".join(words)} git+https://' in readme
    folders = {'UV_TOOL_DIR': 'tools', 'UV_TOOL_BIN_DIR': 'bin', 'UV_CACHE_DIR': 'cache',
               'PIPX_HOME': 'tools', 'PIPX_BIN_DIR': 'bin', 'PIPX_MAN_DIR': 'man'}
    environment = {name: str(tmp_path / folder) for name, folder in folders.items()}
    must_run(developing(words[0]), *words[1:], '--python', sys.executable, f'git+file://{clone}',
             cwd=tmp_path, environment={**environment, 'UV_PYTHON_DOWNLOADS': 'never'})
    for command in EXECUTABLES:
        assert_helps(run(tmp_path / 'bin' / command, '--help', cwd=tmp_path), command)


def test_the_version_is_the_one_in_the_file(metadata):
    source = (ROOT / 'ssh_scheduler.py').read_text(encoding='utf-8')
    assert f"\n__version__ = '{metadata['version']}'\n" in source


def files_of(executable):
    """Return the files of an executable: itself, its man page and its completions."""
    return {f'bin/{executable}', f'share/man/man1/{executable}.1',
            f'share/bash-completion/completions/{executable}',
            f'share/zsh/site-functions/_{executable}',
            f'share/fish/vendor_completions.d/{executable}.fish'}


def test_what_is_named_is_installed_and_nothing_else(metadata):
    files = [path for path in metadata['files'] if '__pycache__' not in path]
    ours = {path for path in files if not path.split('/')[0].endswith('.dist-info')}
    assert ours == {
        *MODULES, *(f'{Path(name).stem}-stubs/__init__.pyi' for name in MODULES),
        *(f'../../../{file}' for name in EXECUTABLES for file in files_of(name))}
    assert any(path.endswith('LICENSE') for path in files)
    assert metadata['license'] == 'MIT'


@pytest.fixture(scope='session')
def distributions(tmp_path_factory):
    """Return the files of `python -m build`: {'.gz': the sdist, '.whl': the wheel made of it}."""
    pytest.importorskip('build', reason='build is not installed: make venv does it')
    clone = copy_project(tmp_path_factory.mktemp('release') / 'clone')
    must_run(sys.executable, '-m', 'build', cwd=clone)
    return {path.suffix: path for path in (clone / 'dist').iterdir()}


def test_a_release_has_the_version_and_no_more_than_it_needs(distributions):
    version = re.search(r"(?m)^__version__ = '(.*)'$", (ROOT / MODULES[0]).read_text())[1]
    assert {kind: path.name for kind, path in distributions.items()} == {
        '.gz': f'ssh_scheduler-{version}.tar.gz',
        '.whl': f'ssh_scheduler-{version}-py3-none-any.whl'}
    with tarfile.open(distributions['.gz']) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    assert {*MODULES, 'setup.py', 'LICENSE', 'README.md', 'CHANGELOG.md', '.ci/manual'} <= names
    assert not [name for name in names if re.match('(build|share|job_results|bench)/', name)]


def test_a_release_installs_and_works(distributions, tmp_path):
    venv = tmp_path / 'venv'
    must_run(sys.executable, '-m', 'venv', venv, cwd=tmp_path)
    must_run(venv / 'bin/python', '-m', 'pip', 'install', distributions['.whl'], cwd=tmp_path)
    for name in EXECUTABLES:
        assert_helps(run(venv / 'bin' / name, '--help', cwd=tmp_path), name)
        assert [file for file in files_of(name) if not (venv / file).is_file()] == []
        for shell, file in (('bash', f'bash-completion/completions/{name}'),
                            ('zsh', f'zsh/site-functions/_{name}'),
                            ('fish', f'fish/vendor_completions.d/{name}.fish')):
            said = must_run(venv / 'bin' / name, '--completion', shell, cwd=tmp_path)
            assert (venv / 'share' / file).read_text(encoding='utf-8') == said
    folder = tmp_path / 'project'
    folder.mkdir()
    (folder / 'b.sh').write_text('echo "it runs"\n')
    must_run(venv / 'bin/execute_batch', 'b.sh', '--machines', 'localhost', '--no-gpu-required',
             '--memory-required=1', cwd=folder, environment={'HOME': str(tmp_path)})
    assert (folder / 'job_results/b.sh.1.out').read_text() == 'it runs\n'
    assert 'b.sh.1' in must_run(venv / 'bin/results_table', '--csv=-', cwd=folder)


PROGRAM = '''
from combine_folders import Result, combine_folders
from results_table import results_table
from ssh_scheduler import Allocation, MachineResources, MachineRunner, find_machine

with MachineRunner(find_machine('lab1')) as runner:
    runner.register_ended(lambda name: print(name, runner.ended[name].exit_code + 1))
    runner.queue_up('python train.py', ['train.py'], ['model'], 'first', timeout_s=2.5)
    runner.wait()
    if runner.capacity:
        books = MachineResources(runner.capacity)
        gpus: tuple[int, ...] = books.allocate(Allocation(memory_mb=100)).gpus
result: Result = combine_folders('all', 'a', 'b', on_conflict='rename')
rows = results_table(where='lr>0', sort=['lr'])
rows[0]['lr']
'''


def test_a_type_checker_knows_the_installed_library(installed, tmp_path):
    pytest.importorskip('mypy', reason='mypy is not installed: make venv does it')
    wrong = (("'first', timeout_s=2.5", "7, timeout_s='2.5'", 2), ("'rename'", "'rename it'", 1),
             ("where='lr>0'", 'where=0', 1), ('memory_mb=100', "memory_mb='1G'", 1),
             ('runner.capacity)', 'None)', 1), ('exit_code + 1', "exit_code + ''", 1))
    texts = [PROGRAM, *(PROGRAM.replace(*change[:2]) for change in wrong)]
    for number, text in enumerate(texts):
        (tmp_path / f'user{number}.py').write_text(text)
    done = run(sys.executable, '-m', 'mypy', '--strict', '--python-executable',
               installed / 'bin/python', '.', cwd=tmp_path)
    found = [len(re.findall(rf'(?m)^user{number}\.py:\d+: error', done.stdout))
             for number in range(len(texts))]
    assert found == [0, *(change[2] for change in wrong)], done.stdout + done.stderr


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
    """Run the copied file with a Python that has no site-packages.

    has: the modules that this Python can import nevertheless.
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
    # uv may not use this machine's cache, and may not download a Python.
    environment = {'UV_CACHE_DIR': str(folder / 'cache'), 'UV_PYTHON_DOWNLOADS': 'never'}
    done = run(
        developing('uv'), 'run', '--quiet', '--python', sys.executable, *words, '--help',
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
    # -S: without site-packages, so only the standard library can be imported.
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


# --- The oldest Python, the Makefile, and what stands beside the program -------------------------


def test_the_changelog_has_the_version_below_what_is_not_released():
    first, second = re.findall(r'(?m)^## (.*)$', (ROOT / 'CHANGELOG.md').read_text())[:2]
    version = re.search(r"(?m)^__version__ = '(.*)'$", (ROOT / MODULES[0]).read_text())[1]
    assert first == '[Unreleased]'
    assert re.fullmatch(rf'\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d', second)


def test_the_workflow_checks_on_the_oldest_python_and_the_newest(tmp_path):
    path = ROOT / '.github/workflows/ci.yml'
    job = yaml.safe_load(path.read_text())['jobs']['test']
    oldest = read_script_block(ROOT / 'ssh_scheduler.py')['requires-python']
    assert job['strategy']['matrix'] == {'python': [oldest.replace('>=', ''), '3.x']}
    assert [step['run'] for step in job['steps'] if 'run' in step] == [
        'sudo -H make check test PYTHON="$(command -v python3)"']
    if shutil.which('actionlint'):
        must_run('actionlint', path, cwd=tmp_path)


def test_a_report_of_a_bug_has_what_the_check_says():
    form = yaml.safe_load((ROOT / '.github/ISSUE_TEMPLATE/bug.yml').read_text())
    assert form['name'] and form['description']
    parts = {part['id']: part for part in form['body']}
    assert '`execute_batch --check --machines ...`' in parts['check']['attributes']['label']
    assert parts['check']['validations'] == {'required': True}
    assert {part['type'] for part in form['body']} <= {'textarea', 'input'}


def test_make_check_looks_at_all_shell_scripts():
    scripts = {path for folder in ('.ci', 'example', 'tests') for path in (ROOT / folder).rglob('*')
               if path.parent.name != '__pycache__'         # where files come and go
               and path.is_file() and (path.suffix == '.sh' or re.match(
                   b'#!.*sh\n', path.read_bytes()[:30]))}
    words = re.search(r'shellcheck --shell=bash (.*)', (ROOT / 'Makefile').read_text())[1].split()
    assert {path for word in words for path in ROOT.glob(word)} == scripts and len(scripts) > 9


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
    (tmp_path / 'example').mkdir()
    (tmp_path / 'example/demo.sh').touch()
    for name in ('Makefile', 'requirements-dev.txt', 'setup.py'):
        shutil.copy2(ROOT / name, tmp_path)
    for name in ('one', 'two'):     # a fake, whose .venv/bin/python does nothing, without error
        (tmp_path / name).write_text(f'''#!/bin/sh
            [ "$*" != "-m venv --clear .venv" ] || {{
                rm -rf .venv; mkdir -p .venv/bin; ln -s /bin/true .venv/bin/python; echo {name}; }}
        ''')
        (tmp_path / name).chmod(0o755)
    said = [must_run('make', target, f'PYTHON=./{name}', cwd=tmp_path).splitlines()
            for target, name in (('venv', 'one'), ('venv', 'one'), ('demo', 'two'),
                                 ('venv', 'two'), ('venv', 'two'), ('venv', 'one'))]
    program, rest = ([line for line in said[0] if word in line]
                     for word in ('.venv with the program', 'requirements-dev.txt'))
    nothing = ["make: Nothing to be done for 'venv'."]
    assert said == [[*program, 'one', *rest], nothing, [*program, 'two'], rest, nothing,
                    [*program, 'one', *rest]]
