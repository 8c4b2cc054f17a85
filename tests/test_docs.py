"""README.md and docs/ are true: their commands run as shown, and what they name exists.

A block of Markdown between ``` lines is one of these, or a test fails:

    with lines that begin with `$ `    each such command is typed at two machines, real sshds with
                                       the names lab1 and lab2 in ~/.ssh/config, and must print
                                       what the page shows below it: see `plain`
    ```yaml                            a machine file: it is read
    ```python                          it is run
    behind <!-- not run: WHY -->       not run

A line that is `…` alone stands for any lines.  A block that shows no output has commands to type:
they have to succeed.  `cat FILE` of a file that does not exist makes that file.
The blocks of a page run in one folder, one after the other.  <!-- scene: NAME --> before a block
begins a new folder, which SCENES[NAME] prepares.

DOCS=write pytest -n0 tests/test_docs.py puts what was printed into the pages.
"""
import ast
import collections
import contextlib
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest
import rig
import yaml
from batching import Gate, wait_until
from terminals import Terminal

import combine_folders
import results_table
import ssh_scheduler

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
WRITE = os.environ.get('DOCS') == 'write'
HELP = {'execute_batch': ssh_scheduler.EXECUTE_BATCH_USAGE,
        'execute_remote': ssh_scheduler.EXECUTE_REMOTE_USAGE,
        'execute_to': ssh_scheduler.EXECUTE_TO_USAGE,
        'query_machines': ssh_scheduler.QUERY_MACHINES_USAGE,
        'results_table': results_table.USAGE, 'combine_folders': combine_folders.USAGE}
OPTION = re.compile(r'(?<![\w-])--[a-z][a-z-]*[a-z]')


# ---- Pages -> blocks -> commands ----

class Block(NamedTuple):
    page: Path
    line: int           # of its first line, from 0
    language: str
    lines: list
    why_not: str        # the reason not to run it; '' if it is run
    scene: str          # the scene that begins with this block; '' if the last one continues

    @property
    def place(self):
        return f'{self.page.relative_to(ROOT)}, line {self.line + 1}'

    @property
    def is_typed(self):
        return any(line.startswith('$ ') for line in self.lines)


class Command(NamedTuple):
    typed: str
    shown: list         # the lines below the command
    line: int           # of the first of these lines, in the page


def blocks_of(page):
    """Return the blocks of a page, each with the notes of the comments before it."""
    found, notes, lines = [], {}, page.read_text(encoding='utf-8').splitlines()
    at = 0
    while at < len(lines):
        comment = re.match(r' *<!-- (not run|scene): (.+) -->$', lines[at])
        fence = re.match(r'( *)```(\w*)$', lines[at])
        if fence:
            end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == '```')
            inner = [line[len(fence[1]):] for line in lines[at + 1:end]]
            found.append(Block(page, at + 1, fence[2], inner, notes.get('not run', ''),
                               notes.get('scene', '')))
            at = end
        if comment:
            notes[comment[1]] = comment[2]
        elif lines[at].strip():
            notes = {}
        at += 1
    return found


def commands_of(block):
    """Return the commands of a block, continued lines joined, with what is shown below each."""
    found, at = [], 0
    while at < len(block.lines):
        assert block.lines[at].startswith('$ '), f'{block.place}: no command begins the block'
        typed = block.lines[at][2:]
        while typed.endswith('\\'):
            at += 1
            typed = typed[:-1] + block.lines[at].strip()
        at += 1
        first = at
        while at < len(block.lines) and not block.lines[at].startswith('$ '):
            at += 1
        found.append(Command(typed, block.lines[first:at], block.line + first))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def scenes():
    """Return lists of blocks; those of one list follow each other in one folder."""
    found = []
    for block in BLOCKS:
        if block.why_not or not (block.is_typed or block.language == 'python'):
            continue
        if not found or block.scene or found[-1][0].page != block.page:
            found.append([])
        found[-1].append(block)
    return found


# ---- Output without the parts that differ from run to run ----

DIFFERS = [
    (r'\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?', 'DAY'), (r'\b\d\d:\d\d\b', 'CLOCK'),
    (r'\b[0-9a-f]{12,40}\b', 'DIGEST'), (r'(process|port|pid) \d+', r'\1 N'),
    (r'127\.0\.0\.1', 'HOST'), (r'[\d.,]+ (?:bytes|kB|MB|GB)\b', 'SIZE'),
    (r'\b[\d.]+( s\b|s\b)|\b\d+[mhd] \d\d[smh]\b', 'TIME'),
    (r'(VISIBLE_DEVICES=|GPU )\d', r'\1N'), (r'(\bon |^.*  )lab[12](?= GPU|[ ,]|$)', r'\1LAB'),
    (r'(Slurm )\d+.*(?=\))', r'\1N'), (r'[\d.]+( of [\d.]+ (?:cores|SIZE))', r'N\1'),
    (r'^used: .*', 'used: N'), (r'Linux \S+', 'Linux N'),
    (r'Python [\d.]+', 'Python N'), (r' *[─-]{9,}', ' ----'), (r'  +', '  '),
]


def plain(line):
    for pattern, text in DIFFERS:
        line = re.sub(pattern, text, line)
    return line.rstrip()


def without_memory(lines):
    """Return the lines without a table's memory columns: short jobs end before a measurement."""
    heads = [line for line in lines if re.search(r'  time  (.*  )?(GPU )?MB(  |$)', line)]
    if not heads:
        return lines
    first = lines.index(heads[0])
    begins, ends = re.search(r'(GPU )?MB( +|$)', heads[0]).span()
    if ends == len(heads[0]):           # the last column
        ends = max(map(len, lines))

    def is_row(place):
        return place >= first and not re.match(r'\d+ (job|row)', lines[place])

    return without_memory([line[:begins] + line[ends:] if is_row(place) else line
                           for place, line in enumerate(lines)])


def is_shown(printed, shown, any_order):
    """Tell whether the lines that were printed are those that a page shows."""
    printed, shown = ([*map(plain, without_memory(lines))] for lines in (printed, shown))
    if any_order:
        printed, shown = sorted(printed), sorted(shown)
    if '…' not in shown:
        return printed == shown
    pattern = ''.join('(?:.*\n)*' if line == '…' else re.escape(f'{line}\n') for line in shown)
    return bool(re.fullmatch(pattern, ''.join(f'{line}\n' for line in printed)))


def has_any_order(printed):
    """Tell whether several machines print these lines, so that their order may differ."""
    machines = {line[:4] for line in printed if re.match(r'lab[12]: ', line)}
    return len(machines) > 1 or any(re.match('(done|interrupted): ', line) for line in printed)


# ---- The computer of a reader ----

class Place:
    """A folder in which commands are typed, with the commands installed and two machines."""

    def __init__(self, folder, env, machines):
        self.folder, self.machines, self.status = folder, machines, 0
        programs = folder.parent / 'bin'
        programs.mkdir()
        for name in HELP:       # as if installed: the pages type these names
            module = name if name in ('results_table', 'combine_folders') else 'ssh_scheduler'
            (programs / name).symlink_to(ROOT / f'{module}.py')
        python = Path(sys.executable).parent
        self.env = {**env, 'PATH': f'{programs}:{python}:{env["PATH"]}'}
        config = Path(env['HOME'], '.ssh/config')
        config.parent.mkdir()
        config.write_text(''.join(
            f'Host {machine.name}\n  HostName {machine.address}\n  Port {machine.port}\n'
            f'  User {machine.user}\n  IdentityFile {machine.key}\n'
            f'  UserKnownHostsFile {machine.known_hosts}\n' for machine in machines))

    def put(self, name, text):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def type(self, command):
        """Type a command; return the lines that it prints, on either stream."""
        made = re.fullmatch(r'cat (\S+)', command.typed)
        if made and not (self.folder / made[1]).exists():
            self.put(made[1], ''.join(f'{line}\n' for line in command.shown))
        if command.typed.startswith('results_table'):
            return self._on_terminal(command.typed)
        done = subprocess.run(['bash', '-c', f'(exit {self.status})\n{command.typed}'],
                              cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, timeout=120,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.status = done.returncode
        return done.stdout.splitlines()

    def _on_terminal(self, typed):
        """Type a command at a terminal, since it prints CSV in a pipe."""
        terminal = Terminal(['bash', '-c', typed], columns=100, env=self.env, cwd=self.folder)
        try:
            self.status = terminal.end()
            return '\n'.join(terminal.whole).rstrip().splitlines()
        finally:
            terminal.close()

    def start(self, typed):
        """Start a command, and leave it running."""
        return subprocess.Popen(['bash', '-c', f'exec {typed}'], cwd=self.folder, env=self.env,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)


EXPERIMENTS = '''\
# learning rates
python3 train.py --lr 0.001 --seed 1
python3 train.py --lr 0.01 --seed 1
python3 train.py --lr 0.1 --seed 1
python3 train.py --lr 10 --seed 1
'''


@contextlib.contextmanager
def experiments(place):
    """Four experiments, the last of which fails."""
    shutil.copy(ROOT / 'example/train.py', place.folder)
    place.put('experiments.sh', EXPERIMENTS)
    yield


@contextlib.contextmanager
def done(place):
    """The four experiments, after their run."""
    with experiments(place):
        place.type(Command('execute_batch experiments.sh --machines lab1 lab2', [], 0))
        assert place.status == 1
        yield


@contextlib.contextmanager
def example(place):
    """The folder example of the repository, as in a clone."""
    shutil.copytree(ROOT / 'example', place.folder / 'example')
    yield


@contextlib.contextmanager
def running(place):
    """Of the four experiments, one has finished, one has failed, one runs, and one waits."""
    gate = Gate(place.folder.parent / 'gate')
    code = (ROOT / 'example/train.py').read_text()
    held = f'if args.lr == 0.01:\n    open({str(gate.path("hold"))!r}).read()\n'
    place.put('train.py', code.replace("print(f'test_loss", f"{held}print(f'test_loss"))
    note, first, held, waits, fails = EXPERIMENTS.splitlines()
    place.put('experiments.sh', ''.join(f'{line}\n' for line in (
        note, first, f"execute_remote --num-gpus=2 '{held}'", fails,
        f"execute_remote --num-gpus=2 '{waits}'")))
    output = place.folder / 'job_results/experiments.sh.3.out'
    journal = place.folder / 'job_results/.ssh_scheduler/journal'
    client, said = place.start('execute_batch experiments.sh --machines lab1 lab2'), ''
    try:
        while said.count('finished: ') + said.count('failed: ') < 2:
            line = client.stdout.readline()
            assert line, said
            said += line
        wait_until(lambda: output.exists() and 'epoch 19' in output.read_text(), 'its output')
        wait_until(lambda: journal.read_text().count('"event": "collected"') == 2, 'their results')
        yield
    finally:
        gate.open('hold')
        client.terminate()
        client.communicate(timeout=rig.SAFETY_NET_S)
        gate.close()


SCENES = {'experiments': experiments, 'done': done, 'example': example, 'running': running}


@pytest.fixture(scope='module')
def machines():
    """lab1 has 16 cores and two GPUs, lab2 8 cores and one."""
    def gpus(count, name, memory_mb):
        return [{'index': i, 'memory_total_mb': memory_mb, 'name': name} for i in range(count)]

    with rig.Machine('lab1', cores=16, memory_mb=48800,
                     gpus=gpus(2, 'NVIDIA GeForce RTX 3090', 24576)) as lab1:
        with rig.Machine('lab2', cores=8, memory_mb=29300,
                         gpus=gpus(1, 'NVIDIA GeForce RTX 2080 Ti', 11264)) as lab2:
            yield lab1, lab2


@pytest.fixture
def place(project, client_env, machines):
    yield Place(project, client_env, machines)
    for machine in machines:
        machine.kill_processes()


# ---- The commands, for real ----

@pytest.fixture(scope='module')
def changes():
    """{page: output that differs from the page}; DOCS=write puts it into the pages.

    The pages are written at the end, so that line numbers stay valid until then.
    """
    changes = collections.defaultdict(list)
    yield changes
    for page in changes if WRITE else ():
        rewrite(page, changes[page])


def rewrite(page, changes):
    """Put the lines that were printed into the page: changes are (first line, how many, lines)."""
    lines = page.read_text(encoding='utf-8').splitlines()
    for first, count, printed in sorted(changes, reverse=True):
        indent = re.match(' *', lines[first - 1])[0]
        lines[first:first + count] = [f'{indent}{line}'.rstrip() for line in printed]
    page.write_text('\n'.join(lines) + '\n', encoding='utf-8')


def name_of(blocks):
    return f'{blocks[0].page.name}-{blocks[0].line}'


@pytest.mark.parametrize('blocks', scenes(), ids=name_of)
def test_what_is_shown_is_what_is_printed(place, blocks, changes):
    with SCENES[blocks[0].scene or 'experiments'](place):
        for block in blocks:
            if block.language == 'python':
                run_python(place, block)
                continue
            commands = commands_of(block)
            only_typed = not any(command.shown for command in commands)
            for command in commands:
                printed = place.type(command)
                where = f'{block.place}\n$ {command.typed}\n' + '\n'.join(printed)
                assert place.status not in (2, 126, 127), where
                if only_typed:
                    assert place.status == 0, where
                elif not is_shown(printed, command.shown, has_any_order(printed)):
                    assert WRITE and '…' not in command.shown, (
                        f'{where}\n---- the page has\n' + '\n'.join(command.shown))
                    changes[block.page].append((command.line, len(command.shown), printed))


def run_python(place, block):
    done = subprocess.run([sys.executable, '-c', '\n'.join(block.lines)], cwd=place.folder,
                          env={**place.env, 'PYTHONPATH': str(ROOT)}, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, f'{block.place}\n{done.stdout}{done.stderr}'


def test_each_block_is_run_or_says_why_not():
    left = [block.place for block in BLOCKS if not (
        block.why_not or block.is_typed or block.language in ('yaml', 'python'))]
    assert left == []
    assert [b.scene for b in BLOCKS if b.scene and b.scene not in SCENES] == []
    assert sum(block.is_typed and not block.why_not for block in BLOCKS) > 20


@pytest.mark.parametrize('block', [b for b in BLOCKS if b.language == 'yaml' and not b.why_not],
                         ids=lambda block: f'{block.page.name}-{block.line}')
def test_a_machine_file_is_one(project, block):
    text = '\n'.join(block.lines)
    has_ip = 'ip' in yaml.safe_load(text)
    Path('lab.yaml').write_text(text if has_ip else f'ip: 192.0.2.1\n{text}')
    try:
        ssh_scheduler.read_machine_file('lab.yaml', 'lab')
    except ssh_scheduler.MachineFileError as error:
        assert 'id_ssh_key' in str(error), error        # this computer lacks the key of the example


@pytest.mark.parametrize('printed, shown, any_order', [
    (['a'], ['b'], False), (['a', 'b'], ['a'], False), (['a'], ['a', 'b'], True),
    (['a', 'b'], ['b', 'a'], False), (['x', 'b'], ['a', '…'], False),
    (['job  time  MB  exit', '1    7s    17  0'], ['job  time  exit', '1    7s    1'], False),
    (['failed: a; x'], ['finished: a; x'], True), (['3 jobs'], ['4 jobs'], False),
])
def test_a_difference_is_seen(printed, shown, any_order):
    assert not is_shown(printed, shown, any_order)


def test_memory_of_short_jobs_is_no_difference():
    assert is_shown(['all: x', 'job  time  MB  GPU MB  exit', '1    7s    17          0', '2 jobs'],
                    ['all: x', 'job  time  exit', '1    7s    0', '2 jobs'], False)
    assert is_shown(['lr  time  MB', '1   7s    17', '2 rows of 3 jobs'],
                    ['lr  time', '1   7s', '2 rows of 3 jobs'], False)


# ---- What the pages name ----

TEXT = {page: page.read_text(encoding='utf-8') for page in PAGES}


def anchors_of(page):
    """Return the anchors of the page's headings, as GitHub makes them."""
    return {re.sub(r'[^\w -]', '', heading.lower()).strip().replace(' ', '-')
            for heading in re.findall(r'(?m)^#+ (.+)$', page.read_text(encoding='utf-8'))}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r'\]\(([^)\s]+)\)', TEXT[page])
    for link in links:
        if re.match('https?:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_a_link_leads_to_each_page():
    texts = [*TEXT.values(), (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8')]
    assert [page.name for page in PAGES[1:] if not any(
        re.search(rf'\]\((docs/)?{page.name}[)#]', text) for text in texts)] == []


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_options_that_are_named_exist(page):
    known = {name for usage in HELP.values() for name in OPTION.findall(usage)}
    ours = re.sub(r'(?m)^.*(?:apptainer|docker|sbatch|pip|rsync|parallel|Slurm|#).*$', '',
                  '\n'.join(re.findall(r'`(--[^`]+)`', TEXT[page])))
    assert {*OPTION.findall(ours)} - known - OF_OTHERS == set()


# Options of sbatch, docker, git and the like, which the pages name.
OF_OTHERS = {'--option', '--name', '--array', '--wrap', '--requeue', '--time', '--assume-unchanged'}


def section(page, title):
    """The text of a section of a page in docs/, with the sections below it."""
    text = TEXT[ROOT / 'docs' / page]
    depth = re.search(rf'(?m)^(#+) {re.escape(title)}$', text)
    assert depth, f'{page} has no section {title}'
    text = re.sub(r'(?ms)^ *```.*?^ *```$', '', text[depth.end():])
    return re.split(rf'(?m)^#{{1,{len(depth[1])}}} ', text)[0]


@pytest.mark.parametrize('command', HELP)
def test_the_reference_has_each_option(command):
    shared = ''.join(section('options.md', title) for title in (
        'All commands', 'Files', 'Hardware')) if command in (
            'execute_batch', 'execute_remote', 'execute_to', 'query_machines') else ''
    has = {*OPTION.findall(section('options.md', command) + shared)}
    assert {*re.findall(rf'(?m)^  (?:-h )?({OPTION.pattern})', HELP[command])} - has == set()


def test_the_reference_has_each_key_of_a_machine_file():
    keys = {*re.findall(r'(?m)^\| `(\w+)`', section('options.md', 'Machine files'))}
    assert keys == {*ssh_scheduler.MACHINE_KEYS}


def test_the_defaults_are_those_of_the_help():
    """A row of the reference, `| --option | default | …`, has the default of the help."""
    seen = 0
    for command, usage in HELP.items():
        text = section('options.md', command) + ''.join(
            section('options.md', title) for title in ('Hardware', 'Files'))
        for entry in re.split(r'(?m)^  (?=-)', usage):
            default = re.search(r'\[default:\s+([^\]]+)\]', entry)
            row = default and re.search(
                rf'(?m)^\| `{OPTION.match(entry)[0]}\b[^|]*\| ([^|]*?) \|.*$', text)
            if row:
                assert default[1] == row[1] or f'`{default[1]}`' in row[0], (command, row[0])
                seen += 1
    assert seen > 20


def texts_of_the_programs():
    """Yield the texts in the programs, with … in place of each value."""
    for module in (ssh_scheduler, results_table, combine_folders):
        tree = ast.parse(Path(module.__file__).read_text(encoding='utf-8'))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                yield ''.join(part.value if isinstance(part, ast.Constant) else '…'
                              for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r'\{\w+\}', '…', node.value)


OF_OTHER_PROGRAMS = {'CUDA out of memory'}


def test_messages_that_are_explained_exist():
    texts = [re.sub(r'\s+', ' ', text) for text in texts_of_the_programs()]
    messages = re.findall(r'(?m)^\| `([^`]+)` \|', TEXT[ROOT / 'docs/troubleshooting.md'])
    assert len(messages) > 25
    assert [message for message in messages if message not in OF_OTHER_PROGRAMS and not any(
        re.search('.*'.join(map(re.escape, message.split('…'))), text) for text in texts)] == []


def test_the_picture_is_that_of_the_program():
    picture = '\n'.join(blocks_of(ROOT / 'docs/how-it-works.md')[0].lines)
    assert 'REMOTE_RUNNER' in picture and picture.strip() in ssh_scheduler.__doc__


def test_figures_are_those_of_the_bench():
    table = TEXT[PAGES[0]].partition('| figure | measured |\n')[2].partition('\n\n')[0]
    figures = re.findall(r'[\d.]+ (?:s\b|ms|MB|jobs/s)', re.sub(r'(?m)^\|[^|]*\|', '', table))
    results = (ROOT / 'bench/RESULTS.md').read_text(encoding='utf-8')
    assert len(figures) > 5 and [figure for figure in figures if figure not in results] == []


def test_readme_is_short():
    words = re.sub(r'(?s)<!--.*?-->|```.*?```', '', TEXT[PAGES[0]]).split()
    assert len(words) <= 1500


@pytest.mark.parametrize('picture', sorted((ROOT / 'docs/pictures').glob('*.[sp][vn]g')),
                         ids=lambda path: path.name)
def test_pictures_are_small_and_stand_alone(picture):
    assert picture.stat().st_size < 150_000
    assert any(picture.name in text for text in TEXT.values())
    if picture.suffix == '.svg':
        tree = xml.etree.ElementTree.fromstring(picture.read_text(encoding='utf-8'))
        assert tree.tag.endswith('svg')
        addresses = re.findall(r'https?://[^"\s]+', picture.read_text(encoding='utf-8'))
        assert {*addresses} == {'http://www.w3.org/2000/svg'}
