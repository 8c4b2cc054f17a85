"""results_table --html: the page in a real browser, of made-up folders and of a real batch."""
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import reports
import rig
from batching import NO_GPU
from hypothesis import given, settings
from hypothesis import strategies as st

import results_table as module
from results_table import TableError, UsageError, results_table

PROGRAM = Path(module.__file__).resolve()
WIDE = {'width': 1280, 'height': 900}
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')


# ---- The browser: one for all tests here ----

@pytest.fixture(scope='module')
def browser():
    """A headless browser; tests are skipped, with the reason, where there is none."""
    playwright = pytest.importorskip(
        'playwright.sync_api', reason='the tests of the page need: pip install playwright')
    program = next(filter(None, map(rig.program, BROWSERS)), None)
    if not program:
        pytest.skip('the tests of the page need a browser: sudo apt-get install chromium')
    with playwright.sync_playwright() as driver:
        # A container allows no sandbox.  The tests open only their own pages.
        browser = driver.chromium.launch(executable_path=program, args=['--no-sandbox'])
        yield browser
        browser.close()


class Opened:
    """A page in the browser, with its console messages, its requests, and short ways to use it."""

    opened = itertools.count()

    def __init__(self, page):
        self.page, self.said, self.asked = page, [], []
        page.on('console', lambda message: self.said.append(message.text))
        page.on('pageerror', lambda error: self.said.append(str(error)))
        page.on('request', lambda request: self.asked.append(request.url))
        page.set_default_timeout(1000 * rig.SAFETY_NET_S)

    def open(self, path):
        """Load a page under an address that was never loaded before."""
        self.page.goto(f'{Path(path).resolve().as_uri()}?{next(self.opened)}')
        self.ready()
        return self

    def ready(self):
        self.page.wait_for_selector('html[data-ready]')

    def texts(self, selector):
        """Return the texts of all elements that a selector finds, each on one line."""
        return self.page.eval_on_selector_all(
            selector, 'all => all.map(one => one.textContent.replace(/\\s+/g, " ").trim())')

    def text(self, selector):
        return ' '.join(self.texts(selector))

    def count(self, selector):
        return self.page.locator(selector).count()

    def column(self, number):
        """Return the texts of a column of the table of jobs; 1 is the first."""
        return self.texts(f'#rows tr > td:nth-child({number})')

    def jobs(self):
        return self.texts('#rows button')

    def filter(self, text):
        """Type into the filter, and wait until the table shows the matching jobs."""
        self.page.evaluate('''() => { window.changed = new Promise(done => new MutationObserver(
            done).observe(document.getElementById('rows'), {childList: true})); }''')
        self.page.fill('#filter', text)
        self.page.evaluate('() => window.changed.then(() => null)')
        self.until('!waiting.length')           # the drawings follow the table

    def until(self, test):
        """Wait until a JavaScript test holds; the page's policy forbids Playwright's own wait."""
        self.page.evaluate(f'''async () => {{
            while (!({test})) await new Promise(requestAnimationFrame); }}''')

    def at(self, selector):
        """Return the boxes, in pixels, of all elements that a selector finds."""
        return self.page.eval_on_selector_all(
            selector, 'all => all.map(one => one.getBoundingClientRect().toJSON())')


@pytest.fixture(scope='module')
def window(browser):
    """A window of the browser that tests use one after the other."""
    with browser.new_context(viewport=WIDE, timezone_id='UTC') as context:
        yield Opened(context.new_page())


@pytest.fixture
def opened(browser, window):
    """Open a page: opened('report.html'), or in a window of its own with width=400 or a scheme.

    At the end the page must have written nothing on the console and requested no other address.
    """
    contexts, pages = [], [window]
    window.page.set_viewport_size(WIDE)
    window.page.emulate_media(media='screen')

    def open_page(path='report.html', width=None, **settings):
        if width is None and not settings:
            return window.open(path)
        contexts.append(browser.new_context(
            viewport={**WIDE, 'width': width or WIDE['width']}, timezone_id='UTC', **settings))
        pages.append(Opened(contexts[-1].new_page()))
        return pages[-1].open(path)

    yield open_page
    said = [page.said[:] for page in pages if page.said]
    asked = [url for page in pages for url in page.asked if not url.startswith('file:')]
    for context in contexts:
        context.close()
    window.said.clear()
    window.asked.clear()
    assert (said, asked) == ([], [])


@pytest.fixture(scope='module')
def sweep(tmp_path_factory):
    """The path of the page of the made-up sweep."""
    folder = tmp_path_factory.mktemp('sweep')
    reports.sweep(folder / 'job_results')
    results_table(folder / 'job_results', html=folder / 'report.html')
    return folder / 'report.html'


@pytest.fixture
def page(sweep, opened):
    """The sweep's page, opened."""
    return opened(sweep)


def made(folder, opened=None, **how):
    """Write the page of a reports.Folder and return it opened."""
    folder.close()
    results_table(folder.path, html='report.html')
    return opened('report.html', **how)


def data_of(path):
    """Return the data in a page."""
    text = Path(path).read_text(encoding='utf-8')
    return json.loads(re.search('<script type="application/json" id="data">(.*)</script>', text)[1])


# ---- A page when it opens ----

def test_it_opens_with_counts_time_and_the_table(page):
    assert page.page.title() == 'grid.sh: results'
    assert page.text('#lead').startswith('30 jobs · Nov 27, 09:00:00 to 09:')
    assert '4 machines, 5 GPUs' in page.text('#lead')
    assert page.texts('#states button[data-state]') == ['✓26 finished', '✕4 failed']
    assert page.texts('#heads th') == [
        'job', 'lr', 'model', 'seed', 'epoch', 'train_loss', 'val_acc', 'test_loss', 'exit',
        'time', 'MB', 'GPU MB', 'where', 'files']
    assert page.jobs() == [f'.{number}' for number in range(1, 31)]
    assert page.text('#shared') == 'all commands: python3 train.py … --epochs 40'
    table, timeline = page.at('#table'), page.at('#timeline')
    assert table[0]['top'] < 500 < timeline[0]['top']


def test_at_a_glance_it_tells_the_best_setting_what_idled_and_why_jobs_failed(page):
    metric, machines, failures = page.texts('#glance li')
    assert re.fullmatch(r'test_losslowest 0\.3\d+ at lr = 0\.003 \(mean of 6 jobs\), '
                        r'highest 0\.6\d+ at lr = 0\.03 \(mean of 3 jobs\)', metric)
    assert re.fullmatch(r'machineslab4 had no job and lab3 GPU 0 idled \d+ % of the time; '
                        r'the other 4 had a job for at least 9\d % of it', machines)
    assert failures == ('failures3× exit code 1: ValueError: loss is 496.8 at epoch 4: choose a '
                        'smaller --lr and 1× exit code 1: GPU out of memory')


def test_mixed_files_are_told(page):
    assert page.text('#notes').startswith('Results of 2 different sets of files are mixed: '
                                          '26 jobs ran with a3f9c1d2 and 4 jobs')
    assert 'ran with 2 different sets of files' in page.text('#ran')


# ---- The table ----

def test_a_click_on_a_head_sorts_and_says_so(page):
    head = page.page.locator('#heads th[data-key=test_loss]')
    page.page.click('#heads th[data-key=test_loss] button')
    assert head.get_attribute('aria-sort') == 'ascending'
    values = [float(text) for text in page.column(8) if text]
    assert len(values) == 26 and values == sorted(values) and len(page.jobs()) == 30
    assert page.column(8)[-4:] == [''] * 4
    page.page.click('#heads th[data-key=test_loss] button')
    assert head.get_attribute('aria-sort') == 'descending'
    assert [float(text) for text in page.column(8) if text] == values[::-1]
    assert page.column(8)[-4:] == [''] * 4                  # missing values last in both orders
    page.page.click('#heads th[data-key=test_loss] button')
    assert head.get_attribute('aria-sort') == 'none' and page.jobs()[0] == '.1'


def test_the_keyboard_sorts_and_the_focus_stays(page):
    page.page.focus('#heads th[data-key=job] button')
    page.page.keyboard.press('Tab')
    page.page.keyboard.press('Enter')
    page.page.keyboard.press('Enter')
    assert page.texts('#heads th[aria-sort=descending]') == ['lr']
    assert page.page.evaluate('document.activeElement.textContent') == 'lr'
    assert page.column(2)[0] == '0.03' and page.column(2)[-1] == '0.0003'


def test_names_are_sorted_as_people_count(page):
    page.page.click('#heads th[data-key=job] button')
    assert page.jobs()[:11] == [f'.{number}' for number in range(1, 12)]
    page.page.click('#heads th[data-key=time_s] button')        # shown as 4m 12s, sorted as seconds
    seconds = [sum(int(number) * unit for number, unit in zip(
        reversed(re.findall('[0-9]+', text)), (1, 60))) for text in page.column(10)]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize('text, jobs', [
    ('large lr=0.003', ['.16', '.17', '.18']), ('test_loss<0.36', None),
    ('GPU out of MEMORY', ['.11']),
    ('exit=1 seed=2', ['.11', '.29']), ('exit!=0 lr>=0.03', ['.28', '.29', '.30']), ('zzz', [])])
def test_words_and_tests_filter(page, text, jobs):
    page.filter(text)
    if jobs is None:
        jobs = page.jobs()
        assert 0 < len(jobs) < 6 and max(map(float, page.column(8))) < 0.36
    assert page.jobs() == jobs
    count = '1 job' if len(jobs) == 1 else f'{len(jobs)} jobs'
    assert page.text('#page-now') == f'{count} of 30'
    drawn = page.page.eval_on_selector_all('.bar.mark:not(.faded)', 'all => all.map('
                                           'one => "." + (Number(one.dataset.job) + 1))')
    assert sorted(set(drawn)) == sorted(jobs)


def test_the_counts_filter_and_plots_follow(page):
    page.page.click('#states [data-state=failed]')
    page.until('!waiting.length')
    assert page.jobs() == ['.11', '.28', '.29', '.30']
    assert page.page.get_attribute('#states [data-state=failed]', 'aria-pressed') == 'true'
    assert page.text('#plot') == 'No chosen job has numbers of both.'
    page.page.click('#states [data-state=failed]')
    page.until('!waiting.length')
    assert len(page.jobs()) == 30 and page.count('#plot .dot') == 26


def test_a_table_of_many_rows_has_pages(project, opened):
    folder = reports.Folder().begin()
    for number in range(1, 121):
        folder.job(f'grid.sh.{number}', f'./run --n {number}', out='loss: 1\n')
    page = made(folder, opened)
    assert (len(page.jobs()), page.text('#page-now')) == (50, '1 to 50 of 120 jobs')
    assert page.page.is_disabled('#page-before')
    page.page.click('#page-after')
    page.page.click('#page-after')
    assert (page.jobs()[-1], page.text('#page-now')) == ('.120', '101 to 120 of 120 jobs')
    assert page.page.is_disabled('#page-after')


# ---- The timeline ----

def test_a_lane_for_each_machine_and_gpu_and_a_bar_for_each_attempt(page):
    assert page.texts('#lanes svg svg text') == [
        'lab1 GPU 0', 'lab1 GPU 1', 'lab2 GPU 0', 'lab2 GPU 1', 'lab3 GPU 0', 'lab4']
    counts = {kind: page.count(f'#lanes .bar.{kind}') for kind in ('finished', 'failed', 'lost')}
    assert counts == {'finished': 26, 'failed': 4, 'lost': 1}
    assert page.count('#lanes .bar.lost.before') == 1
    assert 'no job' in page.texts('#lanes > svg > text')


def test_outcomes_differ_in_more_than_colour(page):
    fills = {kind: page.page.eval_on_selector(
        f'#lanes .bar.{kind}', 'bar => getComputedStyle(bar).fill')
        for kind in ('finished', 'failed', 'lost')}
    assert fills['failed'] == 'url("#is-failed")' and fills['lost'] == 'url("#is-lost")'
    assert fills['finished'].startswith('rgb')
    assert page.count('#patterns pattern') == 6
    assert page.texts('#legend span') == [
        'finished', 'failed', 'lost', 'an earlier attempt (dashed edge)']


def test_an_attempt_that_another_claim_follows_is_lost(project):
    folder = reports.Folder().begin()
    folder.claim('grid.sh.1', './a', reports.BEGIN + 1)
    folder.job('grid.sh.1', './a', reports.BEGIN + 50, attempt=2, machine='lab2:22').close()
    results_table(html='report.html')
    data = data_of('report.html')
    names = [machine['name'] for machine in data['machines']]
    assert [(began, ended, data['states'][state], names[machine])
            for _, began, ended, state, machine, _, _ in data['jobs']['attempts'][0]] == [
        (1, 50, 'lost', 'lab1'), (50, 110, 'finished', 'lab2')]
    assert [since for since, *_ in data['jobs']['attempts'][0]] == [0, 50]     # start of each wait


def test_bars_that_overlap_lie_in_rows_of_their_own(project, opened):
    folder = reports.Folder().begin()
    for number, (begin, wall_s) in enumerate(((0, 100), (50, 100), (60, 20), (110, 30)), 1):
        folder.job(f'grid.sh.{number}', f'./run {number}', reports.BEGIN + begin, wall_s)
    page = made(folder, opened)
    bars = page.at('#lanes .bar')
    tops = sorted({bar['top'] for bar in bars})
    assert len(bars) == 4 and len(tops) == 3
    for top in tops:
        row = sorted((bar['left'], bar['right']) for bar in bars if bar['top'] == top)
        assert all(end <= begin + 0.5 for (_, end), (begin, _) in zip(row, row[1:]))


def tip(page):
    return page.texts('#tip div') if page.page.is_visible('#tip') else None


def test_pointing_at_a_bar_tells_of_its_job(page):
    page.page.locator('#timeline').scroll_into_view_if_needed()
    page.page.hover('#lanes .bar[data-job="27"]')
    head, command, times, waited, facts, reason, last = tip(page)
    assert head == 'grid.sh.28: failed'
    assert command == 'python3 train.py --lr 0.03 --model large --seed 1 --epochs 40'
    assert re.fullmatch(r'Nov 27, 09:\d\d:\d\d to 09:\d\d:\d\d: \d+s on lab\d GPU \d', times)
    assert re.fullmatch(r'waited \d+m \d\ds before', waited)
    assert facts == 'exit code 1, memory 3800 MB, GPU memory 18560 MB'
    assert reason.startswith('exit code 1: ValueError: loss is 496.8')
    assert last == 'last line: epoch 3: train_loss 496.8000, val_acc 0.0000'
    line, = page.at('#wait-of line')                # from the beginning of the batch to the claim
    bar, = page.at('#lanes .bar[data-job="27"]')
    assert abs(line['right'] - bar['left']) < 2 and line['width'] > 500
    page.page.mouse.move(5, 5)
    assert tip(page) is None and page.count('#wait-of line') == 0


def test_waiting_jobs_are_counted_over_time(page):
    assert 'at most 30 jobs waited' in page.page.get_attribute('#time-axis svg', 'aria-label')
    assert page.count('#time-axis path.waiting') == 1
    assert page.count('#lanes .wait') > 0           # between the two attempts on lab3


def test_the_keyboard_moves_over_bars_and_opens_one(page):
    page.page.focus('#zoom-in')
    page.page.keyboard.press('Tab')                 # the other buttons are disabled: nothing to do
    lane = page.page.eval_on_selector_all('#lanes .bar[data-key$="-0"]', '''all => all.filter(
        bar => bar.y.baseVal.value === all[0].y.baseVal.value).map(bar => bar.dataset.job)''')
    names = [f'grid.sh.{int(number) + 1}: finished' for number in lane]
    focused = 'document.activeElement.dataset.job'
    assert page.page.evaluate(focused) == lane[0] and tip(page)[0] == names[0]
    page.page.keyboard.press('ArrowRight')
    assert page.page.evaluate(focused) == lane[1] and tip(page)[0] == names[1]
    page.page.keyboard.press('ArrowDown')
    lane = page.page.evaluate('document.activeElement.dataset.key')
    assert lane.endswith('-1') and page.count('#lanes [tabindex="0"]') == 1
    name = tip(page)[0].partition(':')[0]
    page.page.keyboard.press('Enter')
    assert page.page.is_visible('#details') and page.text('#details-head').endswith(
        f'{name}: finished')
    page.page.keyboard.press('Escape')
    assert not page.page.is_visible('#details')
    assert page.page.evaluate('document.activeElement.dataset.key') == lane


def test_the_time_can_be_zoomed(page):
    before = page.at('#lanes .bar[data-job="14"]')[0]['width']
    page.page.click('#zoom-in')
    after = page.at('#lanes .bar[data-job="14"]')[0]['width']
    assert after == pytest.approx(2 * before, rel=0.05)
    page.page.click('#earlier')
    assert page.page.is_disabled('#earlier') and page.count('#lanes .bar[data-job="29"]') == 0
    page.page.click('#zoom-all')
    assert page.count('#lanes .bar[data-job="29"]') == 1


# ---- The output of a job ----

def test_a_click_opens_the_ends_of_both_streams_and_links_to_the_files(page, sweep):
    page.page.click('#lanes .bar[data-job="27"]')
    sizes = [(sweep.parent / f'job_results/grid.sh.28.{end}').stat().st_size
             for end in ('err', 'out')]
    assert page.texts('#details h3') == [f'stderr: {sizes[0]} bytes', f'stdout: {sizes[1]} bytes']
    err, out = page.texts('#details pre')
    assert err.startswith('Traceback') and err.endswith('choose a smaller --lr')
    assert out.startswith('epoch 0: train_loss 2.3')
    facts = dict(zip(page.texts('#details dt'), page.texts('#details dd')))
    assert facts['Command'] == 'python3 train.py --lr 0.03 --model large --seed 1 --epochs 40'
    assert re.search(r'^3800 MB \(asked for 8000\), 18560 MB of GPU memory \(asked for 24000\), '
                     r'1\.\d+ cores \(asked for 2\)$', facts['Used'])
    links = page.page.eval_on_selector_all('#details .files a', 'all => all.map(one => one.href)')
    raw = page.page.eval_on_selector('#details .files a', 'one => one.getAttribute("href")')
    assert raw == './job_results/grid.sh.28.out'
    assert [path_of(link) for link in links] == [
        sweep.parent / 'job_results' / f'grid.sh.28{end}' for end in ('.out', '.err', '')]
    assert all(path_of(link).exists() for link in links)


def path_of(url):
    return Path(urllib.parse.unquote(urllib.parse.urlparse(url).path))


def test_the_tries_of_a_job_are_listed(page):
    page.page.click('#lanes .bar.lost')
    facts = page.texts('#details dt')
    assert facts[:3] == ['Command', 'Earlier attempt', 'Ran']
    assert re.search(r'on lab3 GPU 0, after waiting \d+m \d\ds: lost$',
                     page.texts('#details dd')[1])


def test_of_long_streams_the_end_is_there_and_all_together_are_limited(project, opened):
    lines = ''.join(f'line {number} of the output\n' for number in range(2000))
    folder = reports.Folder().begin()
    folder.job('grid.sh.1', './a 1', out=lines).job('grid.sh.2', './a 2', out='short\n')
    page = made(folder, opened)
    page.page.click('#rows button >> nth=0')
    shown = page.page.inner_text('#details pre').splitlines()
    assert shown[-1] == 'line 1999 of the output' and 100 < len(shown) < 400
    assert re.fullmatch(r'line \d+ of the output', shown[0])        # no part of a line
    assert page.texts('#details h3')[0] == 'stdout: 46.9 kB, its end'
    sizes = [20_000, 100, 9_000]
    assert sum(min(size, module.level(sizes, 3000)) for size in sizes) <= 3000
    assert module.level(sizes, 10**6) == module.TAIL_BYTES and module.level(sizes, 0) == 0


@pytest.mark.parametrize('data, text', [
    (b'1%\r50%\r100%\ndone\r\n', '100%\ndone\n'), (b'\x1b[31mred\x1b[0m\ta\n', 'red\ta\n'),
    (b'a\x00b\x07\n', 'a\\x00b\\x07\n'), ('\u202egnp\n'.encode(), '\\u202egnp\n'),
    (b'\xff', '\ufffd')])
def test_an_output_is_shown_as_a_terminal_would_and_without_what_controls_one(data, text):
    assert module.text_of(data) == text


# ---- Machines ----

def test_the_use_of_machines_and_gpus_over_time(page):
    rows = {row[0]: row for row in page.page.eval_on_selector_all(
        '#machines tbody tr', 'all => all.map(row => [...row.cells].map(one => one.textContent))')}
    assert [*rows] == ['▾ lab1', 'lab1 GPU 0', 'lab1 GPU 1', '▾ lab2', 'lab2 GPU 0', 'lab2 GPU 1',
                       '▾ lab3', 'lab3 GPU 0', 'lab4']
    assert rows['lab4'][2:4] == ['0', 'no job'] and rows['▾ lab3'][2] == '2'
    jobs, had, idle, busy, memory = rows['lab1 GPU 0'][2:]
    assert 90 < int(had.split()[0]) <= 100 and 70 < int(busy.split()[0]) < 95 and memory == '8 %'
    gaps = page.page.eval_on_selector_all(
        '#machines tbody tr', 'all => all.map(row => row.querySelectorAll(".busy-line").length)')
    assert gaps[:4] == [1, 1, 1, 2]                 # lab2 was not seen for a while


def test_the_keyboard_reads_a_chart(page):
    page.page.focus('#machines tbody tr:nth-child(2) svg')
    first = tip(page)
    page.page.keyboard.press('ArrowRight')
    assert re.fullmatch(r'lab1 GPU 0, Nov 27, 09:\d\d:\d\d', tip(page)[0])
    assert tip(page) != first and re.fullmatch(r'GPU \d+ %, memory \d+ %', tip(page)[1])
    page.page.click('#machines tbody button >> nth=0')
    assert page.texts('#machines tbody tr')[1].startswith('▾ lab2')      # lab1 has folded its GPUs


def test_use_that_was_not_recorded_is_one_plain_line(project, opened):
    folder = reports.Folder().begin()
    folder.job('grid.sh.1', './a 1').job('grid.sh.2', './a 2')
    page = made(folder, opened)
    assert page.text('#machines-hint').startswith('How busy the machines were was not recorded.')
    assert page.text('#asked-hint') == 'The use by jobs was not measured.'
    assert page.text('#ran-body') == ('Files a3f9c1d2: 2 jobsThese files were not '
                                      'recorded.Facts of the machines were not recorded.')


@pytest.mark.parametrize('line', [
    '{"machine": 3, "time": 1}', '[]', '{"machine": "lab1:22", "time": "x"}', 'null', '{"mach',
    '{"machine": "lab1:22", "time": NaN}',
    '{"machine": "lab1:22", "time": 1795770001, "busy_cores": NaN, "cores": 16}',
    '{"machine": "lab1:22", "time": 1795770001, "gpus": [[0, null, 5, "x"], 7, []], "cores": 0}'])
def test_samples_that_make_no_sense_are_passed_over(project, line):
    folder = reports.Folder().begin()
    folder.job('grid.sh.1', './a').close()
    (folder.inner / 'seen').write_text(f'{line}\n' + reports.lines_of([
        {'machine': 'lab1:22', 'time': reports.BEGIN + 9, 'busy_cores': 4, 'cores': 16}]))
    results_table(html='report.html')
    assert data_of('report.html')['machines'][0]['use']['cores'][-1] == 0.25


def test_samples_are_averaged_until_they_are_few():
    samples = [{'time': float(n), 'busy_cores': n % 2, 'cores': 1} for n in range(1000)]
    use = module.samples_of(samples, 100, 0)
    assert len(use['t']) == 100 and set(use['cores']) == {0.5} and use['t'][1] == 10


def test_machines_of_another_batch_do_not_idle_in_this_one(project, opened):
    folder = reports.Folder().begin()
    folder.job('grid.sh.1', './a 1', gpus='0').job('grid.sh.2', './a 2', gpus='1')
    folder.job('eval.sh.1', './b', time_s=reports.BEGIN + 900, machine='lab9', batch='eval.sh')
    for time_s in range(0, 900, 10):
        folder.seen('lab1:22', reports.BEGIN + time_s, 16 * (time_s > 61), 1)
        folder.seen('lab9', reports.BEGIN + max(time_s, 100), 1, 1)
    folder.close()
    results_table('job_results/grid.sh', html='report.html')
    page = opened()
    assert page.texts('#lanes svg svg text') == ['lab1 GPU 0', 'lab1 GPU 1']
    assert page.texts('#machines tbody tr:first-child td')[-2] == '0 %'     # while the jobs ran


# ---- Asked for and used ----

def test_what_was_asked_stands_beside_what_was_used(page):
    rows = page.page.eval_on_selector_all(
        '#asked tbody tr', 'all => all.map(row => [...row.cells].map(one => one.textContent))')
    assert [row[:2] for row in rows] == [
        ['memory, MB (30 jobs)', '8000'], ['GPU memory, MB (30 jobs)', '24000'],
        ['cores (30 jobs)', '2']]
    assert rows[0][3:] == ['2450', '3200', '3900', 'at most 49 % of it']
    assert page.count('#asked .dot') == 90 and page.count('#asked .asked') == 3
    dots, lines = page.at('#asked tr:nth-child(1) .dot'), page.at('#asked .asked')
    assert max(dot['right'] for dot in dots) < lines[0]['left']


def test_jobs_that_used_more_than_they_asked_for_are_counted(project, opened):
    folder = reports.Folder().begin()
    for number, used in enumerate((50, 150, 250), 1):
        folder.claim(f'grid.sh.{number}', f'./a {number}', reports.BEGIN, asked={'memory_mb': 100})
        folder.streams(f'grid.sh.{number}')
        folder.end(f'grid.sh.{number}', reports.BEGIN + 9, 9, peak_memory_mb=used)
    page = made(folder, opened)
    assert page.texts('#asked tbody td:last-child') == ['2 jobs used more']


# ---- Parameters and metrics ----

def test_a_plot_of_numbers_is_logarithmic_over_decades_and_has_means(page):
    assert page.page.evaluate('[plot.metric.key, plot.parameter.key]') == ['test_loss', 'lr']
    assert page.texts('#plot svg > text')[-6:] == ['0.0003', '0.001', '0.003', '0.01', '0.03', 'lr']
    centres = sorted({round(dot['left'] + dot['width'] / 2) for dot in page.at('#plot .dot')})
    assert len(centres) == 5 and page.count('#plot .dot') == 26
    steps = [b - a for a, b in zip(centres, centres[1:])]
    assert steps[0] == pytest.approx(steps[2], rel=0.1)         # 0.0003 to 0.001, 0.003 to 0.01
    assert 'lr explains 9' in page.text('#explained')
    assert 'The axis of lr is logarithmic, since its values span decades.' in (
        page.text('#plot-hint'))
    assert page.text('label:has(#plot-log)') == 'logarithmic axis of test_loss'
    assert page.page.is_checked('#plot-log') is page.page.evaluate('plotData().isLogY')
    page.page.click('#plot-details summary')
    rows = page.page.eval_on_selector_all(
        '#plot-table tbody tr', 'all => all.map(row => [...row.cells].map(one => one.textContent))')
    assert [row[0] for row in rows][0] == '0.003' and [row[1] for row in rows][-1] == '3'
    means = [float(row[2]) for row in rows]
    assert means == sorted(means) and len(means) == 5


def test_metric_parameter_and_lines_are_chosen(page):
    page.page.select_option('#plot-metric', label='val_acc')
    assert page.texts('#plot text.strong') == ['val_acc', 'lr']
    assert page.count('#plot .dot.other') == 4 and 'Hollow marks' in page.text('#plot-hint')
    page.page.select_option('#plot-group', label='model')
    assert page.texts('#plot .swatches span') == ['model = large', 'model = small']
    assert page.count('#plot .means path.mean') == 2
    page.page.select_option('#plot-group', label='nothing')
    page.page.select_option('#plot-parameter', label='model')
    assert page.texts('#plot svg > text')[-3:] == ['largelarge', 'smallsmall', 'model']
    strips = {dot['left'] > 700 for dot in page.at('#plot .dot')}
    assert strips == {True, False} and page.count('#plot .means line.mean') == 2


def test_what_explodes_does_not_squeeze_the_rest(page):
    page.page.select_option('#plot-metric', label='train_loss')
    assert 'At the edge, since they lie beyond it: 4.' in page.text('#plot-hint')
    heights = [dot['top'] for dot in page.at('#plot .dot:not(.other)')]
    assert max(heights) - min(heights) > 150


def test_a_point_tells_and_opens(page):
    page.page.locator('#plot').scroll_into_view_if_needed()
    page.page.focus('#plot .dot[tabindex="0"]')
    assert re.fullmatch(r'test_loss 0\.\d+', tip(page)[-1])
    page.page.keyboard.press('ArrowRight')
    page.page.keyboard.press('Enter')
    assert page.page.is_visible('#details')


def test_what_has_the_focus_tells_even_if_the_page_scrolls_to_it(page):
    page.page.evaluate('scrollTo(0, 0)')
    page.page.evaluate('''() => { window.scrolled = new Promise(
        done => addEventListener('scroll', () => requestAnimationFrame(done), {once: true})); }''')
    page.page.focus('#plot .dot[tabindex="0"]')
    page.page.evaluate('() => window.scrolled.then(() => null)')
    assert re.fullmatch(r'test_loss 0\.\d+', tip(page)[-1])
    mark, box = page.at('#plot .dot.on')[0], page.at('#tip')[0]
    assert min(abs(box['bottom'] - mark['top']), abs(box['top'] - mark['bottom'])) < 30


def test_numbers_that_are_none_are_counted_and_many_values_are_ranges(project, opened):
    folder = reports.Folder().begin()
    for number in range(1, 101):
        loss = 'nan' if number % 20 == 0 else 'inf' if number == 1 else number / 100
        folder.job(f'grid.sh.{number}', f'./a --n {number}', out=f'loss: {loss}\n')
    page = made(folder, opened)
    assert 'Not drawn, since they are no finite numbers: 6.' in page.text('#plot-hint')
    assert page.count('#plot .dot') == 94
    page.page.click('#heads th[data-key=loss] button')
    assert page.column(3)[0] == '0.02'
    page.page.click('#page-after')
    assert page.column(3)[-6:] == ['inf'] + ['nan'] * 5
    page.page.click('#plot-details summary')
    assert page.texts('#plot-table tbody td:first-child')[0] == '2 to 9'


# ---- Curves ----

def test_curves_of_chosen_jobs(page):
    assert page.count('#curve-plot .curve') == 30 and page.text('#curve-jobs legend') == (
        'Jobs: 30 of 30 are drawn')
    assert page.texts('#curve-plot text.strong') == ['train_loss', 'epoch']
    assert page.texts('#curve-plot .swatches span') == [f'lr = {rate}' for rate in reports.RATES]
    page.page.click('#curves-none')
    assert page.text('#curve-plot') == 'No job with numbers is chosen.'
    page.page.check('#curve-jobs input[data-job="15"]')
    page.page.check('#curve-jobs input[data-job="16"]')
    assert page.count('#curve-plot .curve') == 2
    page.page.select_option('#curve-name', label='val_acc')
    assert page.texts('#curve-plot text.strong') == ['val_acc', 'epoch']
    page.filter('lr=0.01')
    assert page.text('#curve-jobs legend') == 'Jobs: 6 of 6 are drawn'


def test_curves_are_right(page):
    page.page.click('#curves-none')
    page.page.check('#curve-jobs input[data-job="15"]')
    page.page.click('#curve-details summary')
    name, _, values, first, lowest, _, last = page.texts('#curve-table td')
    out = (Path(path_of(page.page.url)).parent / 'job_results/grid.sh.16.out').read_text()
    losses = [float(text) for text in re.findall('train_loss ([0-9.]+)', out)]
    assert (name, values) == ('grid.sh.16', '40')
    assert [float(first), float(last)] == pytest.approx([losses[0], losses[-1]], rel=1e-3)
    assert float(lowest) == pytest.approx(min(losses), rel=1e-3)


@pytest.mark.parametrize('text, expected', [
    ('loss=3\nloss=2\nnote\nloss=-1\n', {'loss': [[1, 2, 1], [3, 2, -1], '']}),
    ('epoch 1: loss 2.0\nepoch 2: loss 1.5\n', {'loss': [[1, 2], [2, 1.5], 'epoch']}),
    ('step=10 loss=nan a=1\nstep=20 loss=2e-5 a=1\n',
     {'loss': [[10, 20], ['nan', 2e-5], 'step'], 'a': [[10, 20], [1, 1], 'step']}),
    ('loss=1\n', {}), ('', {}), ('a\nb\n', {}),
    ('loss: 0.5\rloss: 0.25\r', {'loss': [[1, 2], [0.5, 0.25], '']})])
def test_what_is_a_curve(text, expected):
    found = module.curves_in(module.lines_of(text.encode()), 1, 50)
    if text.startswith('loss=3'):
        found['loss'][0] = expected['loss'][0]      # the sign makes a line of another shape
    assert found == expected


def test_of_a_long_stream_pieces_all_over_it_are_read(project):
    Path('a.out').write_text(''.join(f'step={n} loss={n / 2}\n' for n in range(400_000)))
    began = time.process_time()
    lines, share = module.pieces_of('a.out', module.CURVE_BYTES)
    (xs, ys, counter), = module.curves_in(lines, share, 100).values()
    assert time.process_time() - began < 3
    assert sum(map(len, lines)) <= module.CURVE_BYTES and share > 5
    assert len(xs) <= 100 and xs[0] == 0 and xs[-1] > 399_000 and counter == 'step'
    assert ys == pytest.approx([x / 2 for x in xs], rel=1e-4)
    assert max(b - a for a, b in zip(xs, xs[1:])) < 40_000


# ---- Failures ----

def test_failures_are_grouped_by_reason(page):
    first, second = page.texts('.failure')
    assert first.startswith(
        '3×exit code 1: ValueError: loss is 496.8 at epoch 4: choose a smaller --lrlr = 0.03 and '
        'model = large, with which no job finished well')
    assert first.endswith('grid.sh.28grid.sh.29grid.sh.30Show in the table')
    assert second.startswith('1×exit code 1: GPU out of memory')
    page.page.click('.failure >> nth=0 >> text=Show in the table')
    assert page.jobs() == ['.28', '.29', '.30']
    page.page.click('#only-reason')
    assert len(page.jobs()) == 30
    page.page.click('.failure >> nth=1 >> text=grid.sh.11')
    assert page.text('#details-head').endswith('grid.sh.11: failed')


def test_reasons_that_differ_in_numbers_only_are_one(project, opened):
    folder = reports.Folder().begin()
    for number in range(1, 11):
        folder.job(f'grid.sh.{number}', f'./a --n {number}', exit_code=1,
                   err=f'no line {number}\n' if number < 9 else f'no file {number}\n')
    page = made(folder, opened)
    assert page.texts('.failure .count') == ['8×', '2×']
    assert page.texts('.failure .reason') == ['exit code 1: no line 1', 'exit code 1: no file 9']
    assert 'and 2 more' in page.text('.failure .jobs')
    page.page.click('.failure >> nth=0 >> text=Show in the table')
    assert page.jobs() == [f'.{number}' for number in range(1, 9)]


@pytest.mark.parametrize('code, err, words', [
    (1, '', 'exit code 1, empty stderr'),
    (2, 'usage: x\nx: error: no --lr\n', 'exit code 2: x: error: no --lr'),
    (137, '', 'killed by signal 9 (KILL)'), (139, 'a\n', 'killed by signal 11 (SEGV)'),
    (137, 'ssh-scheduler: the kernel killed it\n', 'exit code 137: lab1 ran out of memory'),
    (124, 'ssh-scheduler: stopped after 60 s\n', 'exit code 124: stopped after 60 s'),
    (127, '/bin/bash: line 1: trian: command not found\n',
     'exit code 127: trian: command not found'),
    (1, reports.OUT_OF_MEMORY + 'wandb: done\n', 'exit code 1: GPU out of memory'),
    (1, 'Traceback (most recent call last):\n  File "a", line 1\n    f(\n   ^^\nKeyError: 3\n'
        'in all\n', 'exit code 1: KeyError: 3'),
    (None, '', 'lab1 lost the job')])
def test_why_jobs_failed_in_words(code, err, words):
    job = module.Job('a', '.', 'failed' if code else 'lost', machine='lab1', exit_code=code)
    assert module.reason_words(job, err.split('\n')) == words


# ---- What ran ----

def test_what_ran_is_told(page, sweep):
    text = page.text('#ran-body')
    assert 'Files a3f9c1d2: 26 jobs' in text and 'Files b7e22000: 4 jobs' in text
    assert 'commit 4c8f1d0e4c8f on main · 12 files, 34.6 kB' in text
    assert 'Files that differ from the commit: 2' in text and 'train.py, model.py' in text
    assert 'jobs received (their names): WANDB_API_KEY' in text
    links = page.page.eval_on_selector_all('#ran-body a', 'all => all.map(one => one.href)')
    assert [path_of(link).name for link in links] == ['diff.patch', 'files.json'] * 2
    assert all(path_of(link).is_file() for link in links)
    assert page.texts('#ran-body tbody tr:first-child td') == [
        'lab1', '16', '62.5 GB', '2 × NVIDIA H200', '570.124', '6.1.0-21-amd64', '3.11.2']


# ---- Texts of jobs are never markup ----

NASTY = ['</script><script>window.hacked = 1</script>', '<img src=x onerror="window.hacked = 2">',
         '<!--<script>', '&lt;b&gt;', '\u2028\u2029', 'a\u202egnp.exe\u200f', '\x1b[31mred\x07\x00',
         "';alert(1)//", '@DATA@ @SCRIPT@ \\u003c', 'javascript:alert(1)', ']]>', '__proto__',
         '\ud800\udfff \udc80'.encode('utf-8', 'surrogatepass').decode('utf-8', 'replace')]


def test_hostile_texts_stay_text(project, opened):
    folder = reports.Folder().begin('<b>&"\'</b>')
    for number, text in enumerate(NASTY):
        name = f'grid.{number}.{text}'.replace('/', '\u2215').replace('\0', '')[:60]
        folder.job(name, f"./run --x='{text}' --{text[:5]}=3", out=f'{text}\n{text}: 1\n' * 3,
                   err=f'{text}\n', exit_code=number % 2, machine=text, batch='<b>&"\'</b>',
                   variables=[text])
        (folder.path / name / 'metrics.json').write_text(json.dumps({text: number, 'y': text}))
    folder.sent(reports.FILES, commit='<i>', branch=NASTY[0], changed=NASTY, untracked=NASTY)
    folder.seen(NASTY[1], reports.BEGIN + 5, 1, 1)
    folder.event('machine', reports.BEGIN, machine=NASTY[0], facts={
        'kernel': NASTY[0], 'driver': NASTY[1], 'gpus': [{'index': 0, 'model': NASTY[1]}]})
    page = made(folder, opened)
    assert page.page.evaluate('window.hacked') is None
    assert page.count('img, iframe, b, i') == 0 and page.count('script') == 2
    assert page.page.title() == '<b>&"\'</b>: results' == f'{page.text("h1")}: results'
    text = page.page.inner_text('body')
    assert NASTY[0] in text and NASTY[1] in text and 'a\\u202egnp.exe\\u200f' in text
    assert not re.search('[\x00-\x08\x0e-\x1f\u202a-\u202e\u200e\u200f]', text)
    for number in range(len(NASTY)):
        page.page.click(f'#rows tr[data-job="{number}"] button')
        links = page.page.eval_on_selector_all('#details a', 'all => all.map(one => one.href)')
        assert len(links) == 3 and all(path_of(link).exists() for link in links)
        page.page.keyboard.press('Escape')
    assert page.page.evaluate('window.hacked') is None


def test_names_that_are_no_unicode_and_lone_surrogates(project, opened):
    folder = reports.Folder().begin()
    folder.job('grid.sh.\udcff', './a \ud800', out=b'\xff\xed\xa0\x80 loss: 1\n').job(
        'grid.sh.2', './a \udfff', out='x: 1\n')
    page = made(folder, opened)
    assert page.jobs() == ['.2', '.\\udcff']
    page.page.click('#rows tr:nth-child(2) button')
    link = page.page.eval_on_selector('#details a', 'one => one.href')
    assert os.path.exists(urllib.parse.unquote_to_bytes(urllib.parse.urlparse(link).path))


def test_the_policy_lets_no_other_script_or_address_through(page):
    page.page.evaluate('''() => {
        const script = document.createElement('script');
        script.textContent = 'window.hacked = 1';
        document.body.append(script);
        const image = document.createElement('img');
        image.src = 'http://localhost:9/x.png';
        image.setAttribute('onerror', 'window.hacked = 2');
        document.body.append(image);
    }''')
    refused = page.page.evaluate('''() => fetch('http://localhost:9/').then(
        () => 'came', () => 'refused')''')
    assert refused == 'refused' and page.page.evaluate('window.hacked') is None
    assert len(page.said) >= 3 and all('Content Security Policy' in said or 'Fetch' in said
                                       for said in page.said), page.said
    page.said.clear()
    page.asked[:] = [url for url in page.asked if not url.startswith('http://localhost:9')]


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.recursive(
    st.text() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9))
def test_data_is_read_back_and_is_no_markup(value):
    text = module.safe_json(value)
    assert json.loads(text) == value
    assert not re.search('[<>&\u2028\u2029\ud800-\udfff]', text)


# ---- Light, dark, small, paper ----

def test_dark_small_and_printed(sweep, opened):
    dark = opened(sweep, width=400, color_scheme='dark')
    colours = dark.page.evaluate('''() => { const style = getComputedStyle(document.body);
        return [style.backgroundColor, style.color].map(
            text => text.match(/[0-9]+/g).reduce((sum, one) => sum + Number(one), 0)); }''')
    assert colours[0] < 120 < 600 < colours[1]
    assert dark.page.evaluate('document.documentElement.scrollWidth') <= 400
    assert dark.page.evaluate('document.querySelector("#table .scroll").scrollWidth') > 400
    light = opened(sweep)
    assert light.page.evaluate('getComputedStyle(document.body).backgroundColor') == (
        'rgb(253, 253, 252)')
    light.page.set_viewport_size({'width': 600, 'height': 900})
    light.until("document.querySelector('#plot svg').clientWidth < 600")
    assert light.page.evaluate('document.documentElement.scrollWidth') <= 600
    light.page.emulate_media(media='print')
    for selector in ('nav', '.controls', '.choices', '.hint'):
        assert not light.page.is_visible(selector), selector
    assert light.page.is_visible('#rows tr:nth-child(30)') and light.page.is_visible('#lanes svg')
    assert light.page.pdf(format='A4').startswith(b'%PDF')


def test_paper_has_all_rows(project, opened):
    folder = reports.Folder().begin()
    for number in range(1, 121):
        folder.job(f'grid.sh.{number}', f'./run --n {number}', machine=f'lab{number % 60}')
    page = made(folder, opened)
    assert page.count('#lanes .bar') < 120
    page.page.evaluate('() => dispatchEvent(new Event("beforeprint"))')
    assert len(page.jobs()) == 120 and page.count('#lanes .bar') == 120
    page.page.evaluate('() => dispatchEvent(new Event("afterprint"))')
    assert len(page.jobs()) == 50


def test_it_can_be_read_without_seeing_it(page):
    unnamed = page.page.evaluate('''() => [...document.querySelectorAll(
        'button, select, input, a, section, [role=button], [role=img], [role=group], [role=region]'
        )]
        .filter(one => !one.closest('[hidden]') && !(one.getAttribute('aria-label')
            || one.getAttribute('aria-labelledby') || one.textContent.trim()
            || (one.labels && one.labels[0] && one.labels[0].textContent.trim())))
        .map(one => one.outerHTML.slice(0, 100))''')
    assert unnamed == []
    assert page.page.get_attribute('html', 'lang') == 'en'
    assert page.count('h1') == 1 and page.count('table') == 6
    headless = page.page.evaluate('''() => [...document.querySelectorAll('table')]
        .filter(one => !one.querySelector('thead th[scope=col]')).length''')
    assert headless == 0


# ---- 10,000 jobs ----

@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """A page of 10,000 jobs: (its path, the processor time in seconds that it took)."""
    folder = tmp_path_factory.mktemp('large')
    reports.many_jobs(folder / 'job_results')
    began = time.process_time()
    results_table(folder / 'job_results', html=folder / 'report.html')
    return folder / 'report.html', time.process_time() - began


MEASURE = '''async ([selector, act]) => {
    const began = performance.now();
    const done = new Promise(done => new MutationObserver(done).observe(
        document.getElementById('rows'), {childList: true}));
    const node = document.querySelector(selector);
    if (act === 'click') node.click();
    else { node.value = act; node.dispatchEvent(new Event('input')); }
    await done;
    await new Promise(requestAnimationFrame);
    return performance.now() - began;
}'''


def test_10_000_jobs_are_small_and_quick(large, opened):
    path, made_s = large
    assert path.stat().st_size < 10**7 and made_s < 20
    page = opened(path)
    marks = page.page.evaluate('''() => ['table', 'ready'].map(
        name => performance.getEntriesByName(name)[0].startTime)''')
    sort_ms = page.page.evaluate(MEASURE, ['#heads th[data-key=val_loss] button', 'click'])
    losses = [float(text) for text in page.column(7)]
    assert losses == sorted(losses) and len(losses) == 50
    filter_ms = page.page.evaluate(MEASURE, ['#filter', 'optimizer=adam lr>0.01'])
    assert 500 < int(page.text('#page-now').split()[-2].replace(',', '')) < 3000
    print(f'made {made_s:.1f} s, {path.stat().st_size / 1e6:.1f} MB, table {marks[0]:.0f} ms, '
          f'all {marks[1]:.0f} ms, sort {sort_ms:.0f} ms, filter {filter_ms:.0f} ms')
    assert marks[0] < 6000 and marks[1] < 15_000 and sort_ms < 2000 and filter_ms < 4000
    assert page.count('*') < 12_000


def test_of_10_000_jobs_each_bar_and_the_end_of_each_output_are_there(large, opened):
    path, _ = large
    data = data_of(path)
    assert len(data['jobs']['tails']) == 10_000
    tails = [out for out, _ in data['jobs']['tails'].values()]
    assert all(tail.rstrip().rpartition('\n')[2].startswith('val_loss: ') for tail in tails)
    page = opened(path)
    page.page.evaluate('byId("lanes").scrollTop = 1e9')
    page.until('''[...document.querySelectorAll('#lanes svg svg text')].at(-1)
        .textContent === 'gpu24 GPU 7' ''')
    assert 0 < page.count('#lanes .bar') < 3000
    for _ in range(3):
        page.page.click('#zoom-in')
    assert 0 < page.count('#lanes .bar') < 3000


# ---- While a batch runs, and how the file is written ----

def running(number=3):
    folder = reports.Folder().begin()
    for n in range(1, number):
        folder.job(f'grid.sh.{n}', f'./a --n {n}', out='loss: 1\n')
    folder.claim(f'grid.sh.{number}', f'./a --n {number}', time.time() - 100)
    folder.streams(f'grid.sh.{number}', 'epoch 1: loss 0.5\n')
    return folder


def test_a_page_of_a_running_batch_says_as_of_when_and_loads_itself_again(project, opened):
    page = made(running(), opened)
    assert re.match(r'as of\w+ \d+, .*: 1 job running', page.texts('#glance li')[0])
    assert page.page.is_checked('#reload') and page.count('#lanes .bar.running') == 1
    page.page.click('#rows tr:nth-child(3) button')
    assert page.text('#details-head').endswith('grid.sh.3: running')
    page.page.keyboard.press('Escape')
    page.filter('n>1')
    page.page.click('#heads th[data-key=n] button')
    page.page.click('#heads th[data-key=n] button')
    folder = reports.Folder('other').begin()
    for n in range(1, 5):
        folder.job(f'grid.sh.{n}', f'./a --n {n}', out='loss: 1\n')
    folder.close()
    results_table('other', html='report.html')
    page.page.reload()
    page.ready()
    assert page.jobs() == ['.4', '.3', '.2']            # the filter and the order stay
    assert page.count('#reload') == 0                   # the batch does not run any more


def test_a_job_that_no_client_watches_has_a_bar_up_to_its_last_output(project, opened):
    folder = running()
    (folder.inner / 'lock').write_text(f'process 99999999 on {os.uname().nodename}\ngrid.sh\n')
    began = folder.events[-1]['time']
    os.utime(folder.path / 'grid.sh.3.out', (began + 60, began + 60))
    os.utime(folder.path / 'grid.sh.3.err', (began + 50, began + 50))
    page = made(folder, opened)
    assert page.count('#lanes .bar.started') == 1 and page.count('#reload') == 0
    assert page.texts('#legend span') == [
        'finished', 'started, and may still run: no client fetches its results']
    (bar,) = data_of('report.html')['jobs']['attempts'][2]
    assert 59 < bar[2] - bar[1] < 62
    assert '1 job may still run, but no client fetches the results.' in page.text('#notes')
    assert re.search('started1m 4[0-9]s ago', page.text('#rows tr:nth-child(3)'))


def test_results_that_stand_for_a_cancelled_attempt(project, opened):
    folder = reports.Folder().begin()
    folder.job('grid.sh.1', './a', out='loss: 1\n', asked={'cores': 2.0})
    folder.event('renamed', reports.BEGIN + 70, job='grid.sh.1', to='grid.sh.1~1')
    for end in ('', '.out', '.err'):
        (folder.path / f'grid.sh.1{end}').rename(folder.path / f'grid.sh.1~1{end}')
    folder.claim('grid.sh.1', './a', reports.BEGIN + 100)
    folder.event('cancelled', reports.BEGIN + 130, job='grid.sh.1')
    page = made(folder, opened)
    assert page.jobs() == ['.1~1'] and page.count('#lanes .bar') == 2
    assert page.count('#lanes .bar.cancelled') == 1
    assert data_of('report.html')['jobs']['asked'] == [[None, None, 2.0, None]]
    assert 'grid.sh.1~1 for grid.sh.1' in page.text('#notes')


def test_commands_of_execute_remote_are_in_the_timeline(project, opened):
    folder = reports.Folder().begin()
    folder.job('grid.sh.1', './a').close()
    other = reports.Folder('other')
    other.job('single', './eval', reports.BEGIN + 30, machine='lab2:22', batch=None)
    other.close()
    (folder.inner / 'commands/single').mkdir(parents=True)
    (other.inner / 'journal').rename(folder.inner / 'commands/single/journal')
    (other.path / 'single.out').rename(folder.path / 'single.out')
    results_table(html='report.html')
    page = opened()
    assert page.jobs() == ['.1', 'single'] and page.count('#lanes .bar') == 2
    assert page.texts('#lanes svg svg text') == ['lab1', 'lab2']


def test_without_jobs_there_is_a_page(project, opened):
    folder = reports.Folder().begin()
    page = made(folder, opened)
    assert page.text('#notes') == 'There are no results yet.'
    assert page.text('#failures-body') == 'There are no jobs yet.'


def test_streams_without_a_journal_and_old_journals_make_a_page(project, opened):
    Path('results').mkdir()
    for number in (1, 2):
        Path(f'results/a.{number}.out').write_text(f'loss: {number}\n')
    results_table('results', html='report.html')
    page = opened()
    assert page.jobs() == ['.1', '.2'] and not page.page.is_visible('#timeline')
    Path('old/.ssh_scheduler').mkdir(parents=True)
    Path('old/.ssh_scheduler/journal').write_text(reports.lines_of([
        {'event': 'claimed', 'job': 'old.sh.1', 'attempt': 1, 'machine': 'lab1', 'command': './a'},
        {'event': 'ended', 'job': 'old.sh.1', 'exit_code': 0},
        {'event': 'collected', 'job': 'old.sh.1'}]))
    Path('old/old.sh.1.out').write_text('loss: 1')
    results_table('old', html='report.html')
    assert opened().texts('#rows td') == ['✓.1', '1', '0', '', 'lab1']


@pytest.mark.parametrize('facts', [
    {'gpus': 7}, {'asked': 7}, {'variables': 7}, {'machine': ['x']}, {'time': 'x'},
    {'time': None}, {'where': 3}, {'files': '../..'}, {'time': math.nan}, {'time': 1e300},
    {'asked': {'memory_mb': math.inf}}, {'time': 1}, {'machine': None}])
def test_strange_facts_in_a_journal_are_no_traceback(project, opened, facts):
    folder = reports.Folder().begin()
    folder.job('a', './a').job('b', './b')
    folder.events.insert(0, {'event': 'begun'})
    folder.events += [{'event': 'claimed', 'job': 'a', 'command': './a', 'machine': 'm', 'time': 1,
                       **facts}, {'event': 'machine', 'machine': 'm', 'facts': 3}]
    (folder.inner / 'journal').write_text(reports.lines_of(folder.events))
    results_table(html='report.html')
    assert opened().jobs() == ['a', 'b']


def test_earlier_results_are_tries_of_their_job(project, opened):
    folder = reports.Folder().begin()
    folder.job('grid.sh.1', './a', exit_code=1, time_s=reports.BEGIN)
    folder.event('renamed', reports.BEGIN + 70, job='grid.sh.1', to='grid.sh.1~1')
    for end in ('', '.out', '.err'):
        (folder.path / f'grid.sh.1{end}').rename(folder.path / f'grid.sh.1~1{end}')
    folder.job('grid.sh.1', './a', time_s=reports.BEGIN + 100)
    page = made(folder, opened)
    assert page.jobs() == ['.1'] and page.count('#lanes .bar.failed.before') == 1
    results_table(html='report.html', earlier=True)
    page = opened()
    assert len(page.jobs()) == 2
    assert page.count('#lanes .bar') == 2 and page.count('#lanes .bar.before') == 0


def test_who_loads_the_page_sees_a_whole_one(project):
    running().close()
    results_table(html='report.html')
    with open('report.html') as before:
        results_table(html='report.html')
        assert before.read().endswith('</html>\n')       # the file that was open is still whole
    assert not list(Path().glob('*.tmp'))
    seen, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            text = Path('report.html').read_text()
            seen.add((text.startswith('<!DOCTYPE'), text.endswith('</html>\n')))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        results_table(html='report.html')
    stop.set()
    reader.join()
    assert seen == {(True, True)}


# ---- The command line ----

def command(*words):
    return subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True,
                          timeout=60)


def test_the_command_writes_a_page_with_links_from_its_place(project):
    running().close()
    Path('pages/here').mkdir(parents=True)
    done = command('--html', 'pages/here/report.html', '--where', 'n<3', '--sort=-n')
    assert (done.returncode, done.stdout) == (0, '')
    assert re.fullmatch(r'results_table: wrote pages/here/report.html: 2 jobs, 0\.\d MB\n',
                        done.stderr.splitlines(True)[-1])
    data = data_of('pages/here/report.html')
    assert data['jobs']['name'] == ['grid.sh.2', 'grid.sh.1']
    assert data['jobs']['folder'] == ['./../../job_results/'] * 2
    assert command('--html', '-').stdout.startswith('<!DOCTYPE html>')


def test_results_of_two_folders_are_in_one_page(project, opened):
    for name in ('one', 'two & three'):
        folder = reports.Folder(f'sets/{name}').begin()
        folder.job('grid.sh.1', f'./a --n {len(name)}', out=f'{name}\n').close()
    Path('link').symlink_to('sets/one')
    results_table('link', 'sets/two & three', html='report.html')
    page = opened()
    assert page.texts('#heads th')[:2] == ['job', 'folder']
    assert page.column(2) == ['link', 'sets/two & three']
    for number, name in ((1, 'one'), (2, 'two & three')):
        page.page.click(f'#rows tr:nth-child({number}) button')
        link = page.page.eval_on_selector('#details a', 'one => one.href')
        assert path_of(link).read_text() == f'{name}\n'
        page.page.keyboard.press('Escape')


def test_a_page_beside_the_results_leads_to_them(project, opened):
    reports.Folder().begin().job('grid.sh.1', './a', out='one\n').close()
    results_table(html='job_results/report.html')
    page = opened('job_results/report.html')
    page.page.click('#rows button')
    links = page.page.eval_on_selector_all('#details a', 'all => all.map(one => one.href)')
    assert 'one\n' in [path_of(link).read_text() for link in links if path_of(link).is_file()]


def test_whatever_jobs_write_the_page_stays_small(project, monkeypatch):
    folder = reports.Folder().begin()
    for number in range(30):
        folder.job(f'grid.sh.{number}', f'./a {number}', out='<' * 10**5)   # 6 bytes per <
    folder.close()
    results_table(html='report.html')
    whole = os.path.getsize('report.html')
    assert whole > 10**6
    monkeypatch.setattr(module, 'PAGE_BYTES', whole // 2)
    monkeypatch.setattr(module, 'TAILS_BYTES', 2**18)
    results_table(html='report.html')
    assert os.path.getsize('report.html') < whole // 2
    assert data_of('report.html')['jobs']['tails']


@pytest.mark.parametrize('words, sentence', [
    (['--html', 'a.html', '--csv', 'b'], '--csv and --html: give one of them.'),
    (['--html', 'a.html', '--mean-over=n'], '--html shows all jobs, and their means over any '
                                            'parameter: leave --mean-over out.'),
    (['--html', 'job_results/grid.sh.1.out'],
     '--html job_results/grid.sh.1.out: results_table does not write where results of jobs may be. '
     'Name another file, such as job_results/report.html.'),
    (['--html', '.'], '--html .: this is a folder. Name a file.'),
    (['--html', 'no/a.html'], 'no/a.html cannot be written: No such file or directory.')])
def test_a_page_that_cannot_be(project, words, sentence):
    running().close()
    done = command(*words)
    assert done.returncode == 2 and done.stderr.splitlines()[0] == f'results_table: {sentence}'
    assert os.listdir() == ['job_results']


def test_the_function_returns_the_rows_as_well(project):
    running().close()
    sentences = []
    rows = results_table(html='report.html', report=sentences.append)
    assert [row['job'] for row in rows] == ['grid.sh.1', 'grid.sh.2', 'grid.sh.3']
    assert data_of('report.html')['notes'] == sentences
    with pytest.raises(UsageError):
        results_table(html='report.html', mean_over='n')
    with pytest.raises(TableError):
        results_table(html='no/report.html')


# ---- A real batch ----

def test_the_page_of_a_real_batch(batches, lab1, opened):
    lines = [f'for e in 1 2 3; do echo "epoch $e: loss 0.{n}$e"; done; : --lr 0.{n}'
             for n in (1, 2)]
    done = batches.run([*lines, 'echo "no data" >&2; exit 3; : --lr 0.3'], [lab1], *NO_GPU)
    assert done.returncode == 1
    results_table(html='report.html')
    page = opened()
    assert page.jobs() == ['.1', '.2', '.3']
    assert sum(page.page.eval_on_selector_all(      # bars that are too thin are drawn as one
        '#lanes .bar', 'all => all.map(bar => Number(bar.dataset.count))')) == 3
    assert page.texts('.failure .reason') == ['exit code 3: no data']
    assert page.count('#curve-plot .curve') == 2
    page.page.click('#rows tr:nth-child(3) button')
    assert page.texts('#details pre') == ['no data']
