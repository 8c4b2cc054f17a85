"""Draw the pictures of README.md anew, from a real batch on two real sshds.

    .venv/bin/python docs/pictures/make.py

terminal.svg shows the screen while twelve jobs run, three at a time.  report.png shows
the page of results_table with their results; it needs Chromium and playwright.
"""
import html
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / 'tests'))
import rig  # noqa: E402
from terminals import Terminal  # noqa: E402

COLUMNS, ROWS = 96, 26
JOBS = [f'python3 train.py --lr {lr} --seed {seed}'
        for seed in (1, 2, 3) for lr in ('0.1', '10', '0.01', '0.2')]
TYPED = 'execute_batch experiments.sh --machines lab1 lab2'
# The colours of the SVG: background, text, and those of the terminal.
PAGE, TEXT = '#1e2127', '#d7dae0'
COLOURS = {'red': '#e06c75', 'green': '#98c379', 'brown': '#e5c07b', 'yellow': '#e5c07b',
           'blue': '#61afef', 'magenta': '#c678dd', 'cyan': '#56b6c2', 'white': TEXT,
           'black': '#5c6370', 'brightblack': '#7f848e'}
WIDE, HIGH, EDGE, BAR = 7.8, 18, 14, 30     # a cell in pixels; the edge; the bar above the text


# ---- A terminal as SVG ----

def runs_of(row, columns):
    """Yield (column, text, style) of each piece of a line of pyte's screen, without blanks."""
    cells = [row[x] for x in range(columns)]
    for style, group in itertools.groupby(enumerate(cells), lambda cell: (
            cell[1].fg, cell[1].bold, cell[1].data == ' ')):
        group = list(group)
        if not style[2]:
            yield group[0][0], ''.join(cell.data for _, cell in group), style[:2]


def colour_of(name):
    return COLOURS.get(name, f'#{name}' if re.fullmatch('[0-9a-f]{6}', name) else TEXT)


def svg_of(rows, columns, title):
    """Return lines of pyte's screen as SVG.  Each piece has a fixed width, so any font will do."""
    wide, high = columns * WIDE + 2 * EDGE, len(rows) * HIGH + BAR + EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {high:g}" '
        f'width="{wide:g}" height="{high:g}" role="img" aria-label="{html.escape(title)}">',
        f'<rect width="100%" height="100%" rx="8" fill="{PAGE}"/>',
        *(f'<circle cx="{EDGE + 4 + 16 * n}" cy="15" r="5" fill="{colour}"/>'
          for n, colour in enumerate(('#e06c75', '#e5c07b', '#98c379'))),
        '<g font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,monospace" font-size="13" '
        'xml:space="preserve">']
    for number, row in enumerate(rows):
        for column, text, (colour, bold) in runs_of(row, columns):
            parts.append(
                f'<text x="{EDGE + column * WIDE:g}" y="{BAR + 13 + number * HIGH}" '
                f'textLength="{len(text) * WIDE:g}" fill="{colour_of(colour)}"'
                f'{" font-weight=%sbold%s" % (chr(34), chr(34)) if bold else ""}>'
                f'{html.escape(text, quote=False)}</text>')
    return '\n'.join([*parts, '</g>', '</svg>', ''])


# ---- A batch ----

def prepare(folder, machines):
    """Fill the folder with the experiments; return (project, environment for its commands)."""
    project, programs, home = folder / 'project', folder / 'bin', folder / 'home'
    for path in (project, programs, home / '.ssh', home / 'tmp'):
        path.mkdir(parents=True)
    code = (ROOT / 'example/train.py').read_text()
    for old, new in (('default=20', 'default=60'), ('import random', 'import random\nimport time'),
                     ('    print(f', '    time.sleep(0.1)\n    print(f')):
        assert old in code
        code = code.replace(old, new)           # epochs must take a while
    (project / 'train.py').write_text(code)
    (project / 'experiments.sh').write_text('\n'.join(JOBS) + '\n')
    for name, file in (('execute_batch', 'ssh_scheduler'), ('results_table', 'results_table')):
        (programs / name).symlink_to(ROOT / f'{file}.py')   # advice shows the program's name
    (home / '.ssh/config').write_text(''.join(
        f'Host {machine.name}\n  HostName {machine.address}\n  Port {machine.port}\n'
        f'  User {machine.user}\n  IdentityFile {machine.key}\n'
        f'  UserKnownHostsFile {machine.known_hosts}\n' for machine in machines))
    return project, {**os.environ, 'HOME': str(home), 'TMPDIR': str(home / 'tmp'),
                     'PATH': f'{programs}:{Path(sys.executable).parent}:{os.environ["PATH"]}'}


def photograph(project, env):
    """Run the batch on a terminal; return the terminal's lines when some jobs have ended."""
    prompt = f"printf '\\033[1m$ %s\\033[m\\n' {shlex.quote(TYPED)}; exec {TYPED}"
    terminal = Terminal(['bash', '-c', prompt], COLUMNS, ROWS, env, project)
    try:
        for count in 1, 2, 3, 4:      # one by one, so that `until` does not time out
            terminal.until(lambda text, count=count: text.count('finished: ') >= count)
        terminal.until(lambda text: 'failed: ' in text and ' left' in text and len(re.findall(
            r'(?m)^\.\d+ .*epoch \d', text)) == 3, 'jobs that run, and the time left')
        screen = terminal._screen
        rows = [*screen.history.top, *(screen.buffer[y] for y in range(screen.lines))]
        rows = [[row[x] for x in range(COLUMNS)] for row in rows]
        while all(cell.data == ' ' for cell in rows[-1]):
            rows.pop()
        terminal.end()
        return rows
    finally:
        terminal.close()


def page_as_png(project, env):
    from playwright import sync_api
    subprocess.run(['results_table', '--html', 'report.html'], cwd=project, env=env, check=True)
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=rig.program('chromium'),
                                         args=['--no-sandbox'])
        page = browser.new_page(viewport={'width': 1000, 'height': 760})
        page.goto((project / 'report.html').as_uri())
        page.wait_for_selector('html[data-ready]')
        page.screenshot(path=HERE / 'report.png')
        browser.close()


def main():
    def gpus(count, name, memory_mb):
        return [{'index': i, 'memory_total_mb': memory_mb, 'name': name} for i in range(count)]

    folder = rig.temporary_folder('pictures')
    try:
        with rig.Machine('lab1', gpus=gpus(2, 'NVIDIA GeForce RTX 3090', 24576), cores=16) as lab1:
            with rig.Machine('lab2', gpus=gpus(1, 'NVIDIA GeForce RTX 2080 Ti', 11264)) as lab2:
                project, env = prepare(folder, (lab1, lab2))
                rows = photograph(project, env)
                (HERE / 'terminal.svg').write_text(svg_of(rows, COLUMNS, TYPED))
                page_as_png(project, env)
    finally:
        rig.remove(folder)
        rig.remove_shared_farms()


if __name__ == '__main__':
    main()
