"""The limits of CONTRIBUTING and the rules of the sections, as .ci/measure finds them."""

import ast
import collections
import runpy
from pathlib import Path

import planted
import pytest

ROOT = Path(__file__).resolve().parent.parent
MEASURE = runpy.run_path(str(ROOT / '.ci' / 'measure'))


def broken(findings):
    """Return {(kind, name): value} of the findings above a limit; of equal names the largest."""
    above = sorted((one for one in findings if one.breaks), key=lambda one: one.value)
    return {(kind, name): value for kind, name, value, _ in above}


@pytest.mark.parametrize('name', ['ssh_scheduler.py', 'combine_folders.py', 'results_table.py'])
def test_nothing_is_above_the_limits(name):
    _, findings = MEASURE['measure_file'](str(ROOT / name))
    assert broken(findings) == {}


@pytest.mark.parametrize('name', ['ssh_scheduler.py', 'combine_folders.py', 'results_table.py'])
def test_no_name_of_a_file_has_two_meanings(name):
    """A second definition would hold in all functions, also in those above it."""
    bound = collections.Counter()
    for node in ast.parse((ROOT / name).read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound[node.name] += 1
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in getattr(node, 'targets', None) or [node.target]:
                bound.update(one.id for one in ast.walk(target) if isinstance(one, ast.Name))
    assert [one for one, times in bound.items() if times > 1 and one != '_'] == []


@pytest.mark.parametrize('fault', planted.FAULTS)
def test_each_fault_that_is_planted_has_its_place(fault):
    text = (ROOT / 'ssh_scheduler.py').read_text(encoding='utf-8')
    *_, changes = planted.FAULTS[fault]
    assert planted.plant(text, changes) != text


# --- The measures find the faults of made-up sources ---------------------------------------------


def measured(text, starter='Inner', writer='Outer'):
    """Return {(kind, name): value} of the limits that a made-up source breaks."""
    return broken(MEASURE['measure'](MEASURE['Source'](text), starter, writer))


def function(lines, name='long'):
    return f'def {name}():\n' + '    x = 1\n' * (lines - 1)


def nested(depth):
    lines = ['    ' * level + 'if x:\n' for level in range(1, depth + 1)]
    return 'def deep(x):\n' + ''.join(lines) + '    ' * (depth + 1) + 'x()\n'


def many_attributes(count):
    return 'class Wide:\n  def f(self):\n    ' + '; '.join(f'self.a{n} = {n}' for n in range(count))


def bash(name, lines):
    return f"REMOTE = r'''\n{name}() {{\n" + '  :\n' * (lines - 2) + "}\n'''\n"


@pytest.mark.parametrize('text, expected', [      # of two, the first keeps the limit
    ('class Long:\n' + '    x = 1\n' * 299, {}),
    ('class Long:\n' + '    x = 1\n' * 300, {('class lines', 'Long'): 301}),
    (many_attributes(14), {}),
    (many_attributes(15), {('class attributes', 'Wide'): 15}),
    ('class Record(NamedTuple):\n' + ''.join(f'    a{n}: int\n' for n in range(15)), {}),
    (function(50), {}),
    (function(51), {('function lines', 'long'): 51}),
    (nested(4), {}),
    (nested(5), {('nesting', 'deep'): 5}),
    ('def many(x):\n    if x:\n        x()\n' + '    elif x:\n        x()\n' * 9, {}),
    (bash('run', 50) + bash('do_run', 25), {}),
    (bash('run', 51), {('bash function lines', 'run'): 51}),
    (bash('do_run', 26), {('bash verb lines', 'do_run'): 26}),
])
def test_sizes(text, expected):
    assert measured(text) == expected


SECTIONS = """
# ---- First: what is read first ----
{first}
# ---- Inner ----
{inner}
# ---- Outer: it writes ----
{outer}
"""


def in_sections(first='', inner='', outer=''):
    return measured(SECTIONS.format(first=first, inner=inner, outer=outer))


def test_a_section_uses_only_what_stands_above():
    helper = 'def helper(): return 1'
    assert in_sections(first=helper, outer='def f(): return helper()') == {}
    assert in_sections(first='def f(): return helper()\n' + helper) == {}
    assert in_sections(first='def f(helper): return helper()', inner=helper) == {}
    assert in_sections(first='def f(): return REMOTE_X', inner='REMOTE_X = 1') == {}
    broken = {('uses what stands below', 'section First uses helper'): 1}
    assert in_sections(first='def f(): return helper()', inner=helper) == broken
    assert in_sections(first='class A:\n  def f(self): return [helper for _ in ""]',
                       inner='helper, other = 1, 2') == broken
    assert in_sections(first="TEXT = r'''\n# ---- Outer ----\n'''\ndef f(): return helper()",
                       inner=helper) == broken


@pytest.mark.parametrize('text', [
    'subprocess.run(x)', 'os.fork()', 'os.posix_spawn(x)', 'os.execv()', 'os.system(x)',
    'pty.spawn(x)', 'from subprocess import run'])
def test_one_section_starts_processes(text):
    assert in_sections(inner=text, first='import subprocess; os.fspath(x)') == {}
    assert in_sections(outer=f'def f(): {text}') == {('starts processes', 'f'): 1}
    assert in_sections(outer=text) == {('starts processes', 'section Outer'): 1}


@pytest.mark.parametrize('text', ['print(1)', 'x = sys.stdout', 'sys.stderr.write(x)',
                                  'os.write(1, x)', 'write_out(1 if x else 2, y)'])
def test_one_section_writes_to_our_streams(text):
    assert in_sections(outer=text, first='os.write(fd, x); sys.stdin.read(1)') == {}
    assert in_sections(first=f'def f(): {text}') == {('writes to our streams', 'f'): 1}


@pytest.mark.parametrize('text', ['channel is self._channel', 'self.channel is not channel',
                                  'contact == machine.contact', 'self.contact != x'])
def test_nothing_asks_whether_a_link_is_stale(text):
    assert in_sections(first='def f(channel): return channel is None or channel.gone') == {}
    assert in_sections(first=f'class A:\n  def f(self): return {text}') == {
        ('asks if a link is stale', 'A.f'): 1}


def test_one_class_changes_a_jobs_state():
    text = 'class {}:\n  def f(self, attempt): attempt.state, attempt.why = "ended", ""'
    assert in_sections(first=text.format('Lives')) == {}
    assert in_sections(first='def f(attempt): return attempt.state') == {}
    assert in_sections(first=text.format('Other')) == {("changes a job's state", 'Other.f'): 1}
