"""Results of a broken or hostile machine: nothing is written outside, and nothing too large."""
import json
import os
import shutil
import stat
import time

import pytest
from batching import NO_GPU, RESULTS, assert_clean, result, tree_of

import ssh_scheduler as s


@pytest.fixture
def came(tmp_path):
    """A folder that came from a machine, beside a canary that must stay as it is."""
    (tmp_path / 'canary').mkdir()
    (tmp_path / 'canary/file').write_text('alive')
    folder = tmp_path / 'came'
    folder.mkdir()
    before = tree_of(tmp_path / 'canary')
    yield folder
    assert tree_of(tmp_path / 'canary') == before


def test_only_what_was_asked_for_stays(came):
    (came / 'a/b').mkdir(parents=True)
    (came / 'a/b/asked').write_text('x')
    (came / 'a/b/not').write_text('x')
    (came / 'more/below').mkdir(parents=True)
    (came / 'more/below/file').write_text('x')
    found = sorted(s.vet(str(came), ['./a/b/asked']))
    assert found == [('a/b/not', 'was not requested'), ('more', 'was not requested')]
    assert sorted(tree_of(came)) == [b'a', b'a/b', b'a/b/asked']


@pytest.mark.parametrize('target', ['../canary', '/etc/passwd', 'a/../../canary/file', '..', '/'])
def test_links_that_lead_out_go(came, target):
    (came / 'link').symlink_to(target)
    assert list(s.vet(str(came), ['./link'])) == [
        ('link', f'leads out of its folder, to {target}')]
    assert os.listdir(came) == []


@pytest.mark.parametrize('target', ['file', './file', 'a/../file', 'nothing', '.'])
def test_links_that_stay_inside_stay(came, target):
    (came / 'link').symlink_to(target)
    assert list(s.vet(str(came), ['./link'])) == []
    assert os.readlink(came / 'link') == target


def test_links_are_judged_from_their_own_folder(came):
    (came / 'a').mkdir()
    (came / 'a/in').symlink_to('../file')
    (came / 'a/out').symlink_to('../../file')
    assert [path for path, _ in s.vet(str(came), ['./a/in', './a/out'])] == ['a/out']


def test_a_link_in_the_place_of_a_folder_is_not_followed(came, tmp_path):
    (came / 'a').symlink_to(tmp_path / 'canary')
    found = list(s.vet(str(came), ['./a/file']))
    assert [path for path, _ in found] == ['a', 'a/file'] and os.listdir(came) == []


def test_all_that_is_below_a_whole_path_stays(came):
    for path in ('a/b/c', 'a/other', 'ab', 'one'):
        (came / path).parent.mkdir(parents=True, exist_ok=True)
        (came / path).write_text('x')
    (came / 'a/b/in').symlink_to('../c')
    (came / 'a/b/out').symlink_to('../../../c')
    found = sorted(s.vet(str(came), [], whole=['./a/b/', 'one', 'none']))
    assert found == [('a/b/out', 'leads out of its folder, to ../../../c'),
                     ('a/other', 'was not requested'), ('ab', 'was not requested')]
    assert sorted(tree_of(came)) == [b'a', b'a/b', b'a/b/c', b'a/b/in', b'one']
    assert [*s.vet(str(came), [], whole=['.'])] == []


def test_what_did_not_come_is_told(came):
    (came / 'a').mkdir()
    (came / 'a/file').write_text('x')
    assert list(s.vet(str(came), ['./a/file', './a/no', './none'])) == [('a/no', ''), ('none', '')]


def test_a_folder_that_cannot_be_read_hides_nothing(came):
    (came / 'shut').mkdir()
    (came / 'shut/link').symlink_to('/etc')
    (came / 'shut/program').write_text('x')
    (came / 'shut/program').chmod(0o6755)
    (came / 'shut').chmod(0)
    found = list(s.vet(str(came), ['./shut', './shut/link', './shut/program']))
    assert found == [('shut/link', 'leads out of its folder, to /etc')]
    assert stat.S_IMODE((came / 'shut').stat().st_mode) == 0
    (came / 'shut').chmod(0o700)
    assert stat.S_IMODE((came / 'shut/program').stat().st_mode) == 0o755


def test_no_rights_and_no_devices_come(came):
    os.mkfifo(came / 'fifo')
    (came / 'program').write_text('x')
    (came / 'program').chmod(0o6755)
    (came / 'shut').mkdir()
    (came / 'shut/file').write_text('x')
    assert list(s.vet(str(came), ['./fifo', './program', './shut'])) == [
        ('fifo', 'is no file, folder or link'), ('shut/file', 'was not requested')]
    assert stat.S_IMODE((came / 'program').stat().st_mode) == 0o755


@pytest.fixture
def processes():
    made = s.Processes()
    yield made
    made.close()


def run_confined(processes, folder, command):
    """Run a command that may write only in the folder; return (exit status, stderr)."""
    confined = s.confine(str(folder))
    if confined is None:
        pytest.skip('this kernel has no Landlock')
    ended = []
    processes.start(['bash', '-c', command], lambda data: None,
                    lambda status, complaint: ended.append((status, complaint.decode())),
                    confined=confined)
    until = time.monotonic() + 30
    while not ended:
        assert time.monotonic() < until
        processes.wait(1)
    return ended[0]


def test_a_confined_process_writes_in_its_folder(processes, came):
    status, _ = run_confined(processes, came, f'cd {came} && mkdir a && echo x >a/b && mv a/b a/c '
                             '&& ln -s c a/d && rm a/d && echo >/dev/null && cat /etc/passwd')
    assert status == 0
    assert (came / 'a/c').read_text() == 'x\n'


@pytest.mark.parametrize('command', [
    'echo x >>../canary/file', ': >../canary/file', 'rm ../canary/file', 'mkdir ../canary/new',
    'mv ../canary/file .', 'ln -s x ../canary/link', 'mkfifo ../canary/fifo', 'rmdir ../canary',
    'echo x >../canary/new', 'touch here; mv here ../canary', 'ln ../canary/file here',
    'bash -c "bash -c \'echo x >../canary/new\'"'])
def test_a_confined_process_writes_nowhere_else(processes, came, command):
    status, complaint = run_confined(processes, came, f'cd {came} || exit 0; {command}')
    assert status != 0
    assert 'Permission denied' in complaint or 'cross-device' in complaint


def test_what_leads_out_is_left_out_with_a_sentence(batches, lab1):
    done = batches.run(['ln -s /etc/passwd out; ln -s made in; echo x >made'], [lab1], *NO_GPU)
    assert done.returncode == 0
    assert (f'WARNING: batch.sh.1: out from {lab1.yaml()} leads out of its folder, to /etc/passwd, '
            'and was left out') in done.stderr
    assert sorted(tree_of(RESULTS / 'batch.sh.1')) == [b'in', b'made']
    assert_clean(lab1)


def test_what_is_larger_than_it_may_be_stays_there(batches, run_cli, lab):
    machine = lab()
    lines = ['head -c 3000000 /dev/zero >large; echo said', 'echo small >small']
    done = batches.run(lines, [machine], '--max-result-size=2', *NO_GPU)
    assert done.returncode == 0
    warning = ('batch.sh.1: its files are not fetched: they are 3.0 MB, and --max-result-size is '
               '2.0 MB. The same command without --max-result-size fetches them. They are kept on ')
    assert warning in done.stderr, done.stderr
    assert result('batch.sh.1') == b'said\n' and os.listdir(RESULTS / 'batch.sh.1') == []
    assert (RESULTS / 'batch.sh.2/small').read_text() == 'small\n'
    (kept,) = machine.home.glob('.ssh_scheduler/*/jobs/work.*/large')
    assert kept.stat().st_size == 3_000_000 and str(kept.parent) in done.stderr

    def kept_by_what():
        said = run_cli('execute_batch', '--what', 'batch.sh.1').stdout
        return [line.split()[1:] for line in said.splitlines() if line.startswith('kept:')]

    text = f'all its files, on {machine.yaml()}; the same command without --max-result-size'
    assert kept_by_what() == [[*text.split(), 'fetches', 'them']]
    again = batches.run(None, [machine], '--max-result-size=2.5', *NO_GPU)
    assert '2.5 MB' in again.stderr and kept.exists() and kept_by_what(), again.stderr
    fetched = batches.run(None, [machine], *NO_GPU)         # though no line runs
    assert (fetched.returncode, fetched.stderr.count('WARNING')) == (0, 0), fetched.stderr
    assert (RESULTS / 'batch.sh.1/large').stat().st_size == 3_000_000 and not kept_by_what()
    assert_clean(machine)


def test_a_path_that_a_job_did_not_make_does_not_hide_what_was_too_large(batches, lab):
    machine, paths = lab(), ('--copy-backwards', 'large', 'none')
    batches.run(['head -c 3000000 /dev/zero >large'], [machine], '--max-result-size=2', *NO_GPU,
                *paths)
    fetched = batches.run(None, [machine], *NO_GPU, *paths)
    assert (RESULTS / 'batch.sh.1/large').stat().st_size == 3_000_000
    assert [line for line in fetched.stderr.splitlines() if 'WARNING' in line] == [
        'WARNING: batch.sh.1: it did not make none, so that is not fetched']
    assert_clean(machine)


@pytest.mark.parametrize('limit', [(), ('--max-result-size=2',)], ids=['fetched', 'still'])
def test_what_was_too_large_belongs_to_the_earlier_results_of_a_job_that_runs_again(
        batches, lab, limit, ledger):
    machine = lab()
    line = (f'echo ran >>{ledger}; n=$(wc -l <{ledger}); head -c 3000000 /dev/zero >large$n; '
            '[ $n = 1 ] || sleep 3')
    batches.run([line], [machine], '--max-result-size=2', *NO_GPU)
    again = batches.run(None, [machine], '--rerun', '1', *NO_GPU, *limit)
    assert again.returncode == 0 and 'could not be fetched' not in again.stderr, again.stderr
    wrote = [json.loads(text) for text in (RESULTS / '.ssh_scheduler/journal').open()]
    words = [one['event'] for one in wrote if one.get('job') == 'batch.sh.1']
    assert words == [*('claimed ended committing collected renamed'.split()),
                     *('claimed ended committing collected'.split())]
    batches.run(None, [machine], *NO_GPU)
    assert [os.listdir(RESULTS / name) for name in ('batch.sh.1~1', 'batch.sh.1')] == [
        ['large1'], ['large2']]
    assert_clean(machine)


def test_what_was_too_large_and_is_gone_is_told_once(batches, lab):
    machine = lab()
    batches.run(['head -c 3000000 /dev/zero >large'], [machine], '--max-result-size=2', *NO_GPU)
    shutil.rmtree(*machine.home.glob('.ssh_scheduler/*/jobs'))
    gone = f'its files, which were too large before, are not on {machine.yaml()} any more'
    assert gone in batches.run(None, [machine], *NO_GPU).stderr
    assert gone not in batches.run(None, [machine], *NO_GPU).stderr


def test_a_terabyte_that_is_none_does_not_fill_the_disk_here(batches, lab):
    machine = lab()
    done = batches.run(['truncate -s 1T huge; echo said'], [machine], *NO_GPU)
    assert done.returncode == 1
    assert 'its results could not be fetched: they are 1.1 TB, and the disk here' in done.stderr
    assert not os.path.lexists(RESULTS / 'batch.sh.1')
    (huge,) = machine.home.glob('.ssh_scheduler/*/jobs/work.*/huge')
    huge.unlink()
    (back,) = huge.parents[1].glob('batch.sh.1.1-*.back')
    back.unlink()
    again = batches.run(None, [machine], *NO_GPU)       # the job did not run again
    assert again.returncode == 0, again.stderr
    assert result('batch.sh.1') == b'said\n'
