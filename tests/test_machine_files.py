"""Machine files and names -> Machine, and the configuration that ssh gets for it."""
import os
import re
import subprocess

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ssh_scheduler
from ssh_scheduler import MACHINE_KEYS, Machine, MachineFileError

ANY = settings(deadline=None, derandomize=True, max_examples=300,
               suppress_health_check=[HealthCheck.function_scoped_fixture])

SPEC = """\
username: ben       # Replace with your username on the machine
ip: 105.29.123.241  # Replace with your machine's url or IP address
port: 22    # leave at default value of 22 unless you know what you are doing
# replace with a path to an ssh key to the machine (MUST BE PASSWORDLESS SSH KEY)
# for a guide on how to set up passwordless ssh see a guide such as
# https://www.redhat.com/sysadmin/passwordless-ssh
ssh_key_path: ~/.ssh/id_ssh_key
"""


def keygen(path, *options):
    subprocess.run(['ssh-keygen', '-q', '-f', str(path), *options], check=True)
    return path


@pytest.fixture(scope='module')
def key(tmp_path_factory):
    """A private key without a passphrase.  No test may change it."""
    return keygen(tmp_path_factory.mktemp('key') / 'key', '-t', 'ed25519', '-N', '')


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty HOME, and an empty current folder."""
    (tmp_path / 'home' / '.local' / 'var').mkdir(parents=True)
    (tmp_path / 'here').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path / 'here')
    return tmp_path / 'home'


def read(text, name='lab1.yaml'):
    """Return the Machine of a file in the current folder that has this text (or these bytes)."""
    with open('lab1.yaml', 'wb') as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return ssh_scheduler.read_machine_file('lab1.yaml', name)


def complaint(text):
    with pytest.raises(MachineFileError) as caught:
        read(text)
    return str(caught.value)


# ---- Content of a file ----

def test_the_file_of_the_spec(home, key):
    (home / '.ssh').mkdir()
    path = home / '.ssh' / 'id_ssh_key'
    path.write_bytes(key.read_bytes())
    path.chmod(0o600)
    assert read(SPEC) == Machine(name='lab1.yaml', host='105.29.123.241', username='ben', port=22,
                                 ssh_key_path=str(path))


def test_one_key_is_enough(home):
    assert read('ip: lab1') == Machine(name='lab1.yaml', host='lab1', port=22)


def test_every_key(home, key):
    machine = read(f"""\
ip: gpu-1.lab.example.org
username: first.last
port: 2222
ssh_key_path: {key}
name: lab one
proxy_jump: me@gate:2200,inner
ssh_options:
  UserKnownHostsFile: /a b/known
  Compression: yes
  ConnectTimeout: 010
workdir: ~/scratch
setup: |
  module load cuda
  export A=1
env:
  A: x y
  VERSION: 1.10
  MODE: 0755
  FLAG: true
  EMPTY: ''
wrap: nice -n 5
gpus: [2, 0]
max_jobs: 4
""")
    assert machine == Machine(
        name='lab one', host='gpu-1.lab.example.org', username='first.last', port=2222,
        ssh_key_path=str(key), proxy_jump='me@gate:2200,inner',
        ssh_options=(('UserKnownHostsFile', '/a b/known'), ('Compression', 'yes'),
                     ('ConnectTimeout', '010')),
        workdir='~/scratch', setup='module load cuda\nexport A=1\n',
        env=(('A', 'x y'), ('VERSION', '1.10'), ('MODE', '0755'), ('FLAG', 'true'), ('EMPTY', '')),
        wrap='nice -n 5', gpus=(2, 0), max_jobs=4)
    assert set(ssh_scheduler.MACHINE_KEYS) == {
        'ip', 'username', 'port', 'ssh_key_path', 'name', 'proxy_jump', 'ssh_options', 'workdir',
        'setup', 'env', 'wrap', 'gpus', 'max_jobs',
        'engine', 'engine_options', 'gpu_types', 'node_folder'}


def test_no_gpus_are_not_all_gpus(home):
    assert read('ip: a\ngpus: []').gpus == ()
    assert read('ip: a').gpus is None


def test_yaml_is_read_as_yaml(home):
    text = '\ufeff{ip: "lab1", env: &e {A: a}, ssh_options: {}}\n'
    assert read(text).env == (('A', 'a'),)
    assert read(text.replace('\n', '\r\n').encode()).host == 'lab1'
    assert read('ip: a\nenv:\n  <<: {A: 1, B: 2}\n  B: 03\n').env == (('A', '1'), ('B', '03'))


@pytest.mark.parametrize(('key_', 'values'), [
    ('ip', ['a', '10.0.0.1', '::1', 'fe80::1%eth0', 'a_b.c-d', 'x1']),
    ('username', ['a', 'first.last', 'a-b_c', '_a', 'DOM+me', 'me@uni.example', 'ünal', '007x']),
    ('port', [1, 65535]),
    ('name', ['a', 'my machine', 'é/ü']),
    ('proxy_jump', ['a', 'u@a', 'u@a:22', 'a,b@c', '[::1]:22', 'u@[fe80::1]']),
    ('workdir', ['/', '/a b', '~', '~/a', '/scratch/$USER']),
    ('setup', ['', 'a; b', '-x', 'é\n']),
    ('env', [{}, {'A': ''}, {'_a1': '-x'}]),
    ('gpus', [[], [0], [7, 1]]),
    ('max_jobs', [1, 1000]),
    ('ssh_options', [{}, {'Ciphers': '-3des-cbc'}, {'ProxyCommand': 'a "b" \\c'}]),
])
def test_good_values(home, key_, values):
    for value in values:
        read(yaml.safe_dump({'ip': 'a', key_: value}, allow_unicode=True))


@pytest.mark.parametrize(('key_', 'values'), [
    ('ip', [1, 10.5, None, '', '-a', '-oProxyCommand=x', 'a b', 'a@b', 'a:22', ':', 'a\nb', ['a'],
            {}, True, 'é', 'a/b', '*', 'a;b', '\0', '%h', '$(a)', 'a\\b']),
    ('username', [1, None, '', '-a', '-l', 'a b', 'a:b', 'a/b', 'a\nb', '@', ['a'], False, '$(a)',
                  '`a`', "a'b", 'a"b', 'a;b', 'a|b', '\x1b[m', '%r', 'a\\b', '!a', '\ud800']),
    ('port', ['22', 0, -1, 65536, 2.0, None, True, [22], '']),
    ('ssh_key_path', [1, None, '', '-i', 'a\nb', ['a'], 'a"b', 'a\\b', True, 'a\0']),
    ('name', [1, None, '', '-a', 'a\nb', '\x1b[31m', ['a'], 'a\u2028b']),
    ('proxy_jump', [1, None, '', '-a', '-oProxyCommand=x', 'a,-b', 'a b', 'a,', ',a', 'u@-b',
                    '-u@b', 'a;b', '$(a)', 'a:b', 'a\n', '`a`@b', '@b']),
    ('ssh_options', [None, [], 'a', 1, {'A': None}, {'A': []}, {1: 'a'}, {'-A': 'a'}, {'A b': 'a'},
                     {'': 'a'}, {'A': 'b\nc'}, {'A': 'b"'}, {'A': 'b\\'}, {'A': '\0'},
                     {'Host': '*'}, {'match': 'all'}, {'Include': 'x'}]),
    ('workdir', [1, None, '', '-a', 'a', './a', '~a', '../a', '/a\nb', ['/a'], '$HOME/a']),
    ('setup', [1, None, ['a'], {}, True, 'a\0b', '\ud800']),
    ('env', [None, [], 'a', ['A=b'], {'A': None}, {'A': ['b']}, {'1A': 'b'}, {'A-B': 'c'},
             {'A=B': 'c'}, {'': 'a'}, {1: 'a'}, {'A': 'b\0'}, {'A': '\udcff'}]),
    ('gpus', [None, 1, '0', [None], ['0'], [-1], [0.5], [True], {}, {0: 1}]),
    ('max_jobs', [None, 0, -1, '4', 1.5, True, [1]]),
    ('gpu_types', [None, [], {}, 'a100', {'a100': '40X'}, {'a100': 0}, {'a100': '0G'}, {'a': 'inf'},
                   {'a100': 'nan'}, {'a100': 1.5}, {'a100': True}, {'a100': None}, {'a b': '40G'}]),
])
def test_a_bad_value_is_named(home, key_, values):
    for value in values:
        values = {'name': 'a', 'ip': 'a', key_: value}
        expected, _ = ssh_scheduler.MACHINE_KEYS[key_]
        # YAML accepts some characters only in escaped form
        text = '\n'.join(f'{name}: {json_like(values[name])}' for name in values)
        line = list(values).index(key_) + 1
        assert complaint(text) == (
            f'lab1.yaml, line {line}: {key_} must be {expected}, not {value!r}.'), text


def test_the_memory_of_a_type_of_gpus_may_have_a_unit(home):
    types = '{a100: 40G, v100: 16000, t4: "16 GB", p: 0x10}'
    assert read(f'ip: a\nengine: slurm\ngpu_types: {types}\n').gpu_types == (
        (16, 'p'), (16000, 'v100'), (16384, 't4'), (40960, 'a100'))


@pytest.mark.parametrize(('options', 'expected'), [
    ('--array=1-3', 'remove --array. It would run a job more than once.'),
    ('--requeue', 'remove --requeue. It would run a job more than once.'),
    ('--output=x', 'remove --output. It would move the output of the job away from where the '
     'program fetches it: it is in job_results.'),
    ('--err=x', 'remove --error. It would move the output of the job away'),
    ('--export=NONE', 'remove --export. It would change the environment that the program gives to '
     'the job: use the keys env and setup.'),
    ('--chdir=/tmp', 'remove --chdir. It would take the job out of its own folder: use the key '
     'workdir.'),
    ('--job-name=x', 'remove --job-name. It would hide the job from the program, which finds its'),
    ('--hold', 'remove --hold. It would let the job wait until you release it.')])
def test_an_option_of_slurm_that_cannot_be_used_has_its_own_reason(home, options, expected):
    said = complaint(f'ip: a\nengine: slurm\nengine_options: --partition=a {options}\n')
    assert said.startswith(f'lab1.yaml: engine_options: {expected}')


def json_like(value):
    """Return the value in YAML's flow style, in ASCII."""
    if isinstance(value, dict):
        return '{%s}' % ', '.join(f'{json_like(k)}: {json_like(v)}' for k, v in value.items())
    if isinstance(value, list):
        return f'[{", ".join(map(json_like, value))}]'
    if isinstance(value, str):
        return '"%s"' % ''.join(c if c.isascii() and c.isalnum() else f'\\u{ord(c):04x}'
                                for c in value)
    return 'null' if value is None else str(value).lower()


@pytest.mark.parametrize(('text', 'expected'), [
    ('ip: a\nprot: 22', "line 2: unknown key 'prot' (did you mean port?)."),
    ('user: me\nip: a', "line 1: unknown key 'user' (did you mean username?)."),
    ('\n\nip: a\nssh_key: x', "line 4: unknown key 'ssh_key' (did you mean ssh_key_path?)."),
    ('IP: a', "line 1: unknown key 'IP' (did you mean ip?)."),
    ('gpu: [0]', "line 1: unknown key 'gpu' (did you mean gpu_types or gpus?)."),
    # username is too different
    ('hostname: a', "line 1: unknown key 'hostname'. The keys are ip, username, port, "),
    ('zebra: a', f"line 1: unknown key 'zebra'. The keys are {', '.join(MACHINE_KEYS)}."),
    ('1: a', "line 1: unknown key '1'."),
    ('"\\e[m": a', r"line 1: unknown key '\x1b[m'."),
    ('? [a, b]\n: c', 'line 1: a key must be a word.'),
    ('? {a: b}\n: c', 'line 1: a key must be a word.'),
    ('ip: a\nport: 1\nip: b', 'line 3: ip is given twice.'),
    ('username: me\nport: 22', None),
    ('ip: a\n b: c\n', 'line 2: this is not YAML: mapping values are not allowed here.'),
    ('ip: [a', 'line 1: this is not YAML: '),
    # The error names the line that lacks something, not the line at which YAML notices it.
    ('a\nb: c\n', 'line 1: this is not "key: value": \'a\'.'),
    ('username ben\nip: a', 'line 1: this is not "key: value": \'username ben\'.'),
    (SPEC.replace(':', '', 1), 'line 1: this is not "key: value": \'username ben\'.'),
    (SPEC.replace('ip:', 'ip'), 'line 2: this is not "key: value": \'ip 105.29.123.241\'.'),
    (SPEC.replace('ssh_key_path:', 'ssh_key_path'),
     'line 7: this is not "key: value": \'ssh_key_path ~/.ssh/id_ssh_key\'.'),
    ('# a: b\nip:a\nport: 22', 'line 2: this is not "key: value": \'ip:a\'.'),
    ('ip: a\r\nport 22 # x: y\r\n\r\nname: b', 'line 2: this is not "key: value": \'port 22\'.'),
    ('ip: a\nport 22', 'line 2: this is not "key: value": \'port 22\'.'),
    ('ip: a\nenv:\n  A 1\n  B: 2', 'line 3: this is not "key: value": \'A 1\'.'),
    ('ip: a\nenv:\n  A: 1\n  B 2\n\n  C: 3', 'line 4: this is not "key: value": \'B 2\'.'),
    ('ip: a\nname: "x\nport: 22\n\n', 'line 2: this is not YAML: found unexpected end of stream.'),
    ('ip: a\ngpus: [0\nname: b', "line 2: this is not YAML: expected ',' or ']', but got ':'."),
    ('{\nip: a\nport: 22}', "line 1: this is not YAML: expected ',' or '}', but got ':'."),
    ('ip: a\nname: b: c', 'line 2: this is not YAML: mapping values are not allowed here.'),
    ('ip: a\ngpus:\n- 0\nname: b: c', 'line 4: this is not YAML: mapping values are not allowed'),
    ('ip: a\nsetup: |\n  x y\nname: b: c', 'line 4: this is not YAML: mapping values are not'),
    ('ip: a\n\tport: 1', 'line 2: this is not YAML: found character '),
    ('ip: *x', "line 1: this is not YAML: found undefined alias 'x'."),
    ('ip: a\n---\nip: b', 'line 2: this is not YAML: but found another document.'),
    ('ip: a\nname: \x01', 'line 2: this line has a control character.'),
    (b'ip: a\n\nname: \xe9', 'line 3: this is not UTF-8 text.'),
    ('ip: a\nname: !!python/name:os.system x', 'line 2: name: could not determine a constructor'),
    ('ip: a\nname: 2020-13-32', 'line 2: name: its value is not YAML.'),
    ('ip: a\nport: !!int x', 'line 2: port: its value is not YAML.'),
    ('ip: a\nport: !!bool x', 'line 2: port: its value is not YAML.'),
    ('ip: a\nenv: &e {A: *e}', 'line 2: env: found unconstructable recursive node.'),
    ('ip: a\nport: 1' + '0' * 300,
     'line 2: port must be a number from 1 to 65535, not 1' + '0' * 199 + '.'),
])
def test_a_wrong_file_is_named_with_its_line(home, text, expected):
    if expected is None:
        assert complaint(text) == 'lab1.yaml: the key ip (host name or address) is missing.'
    else:
        assert complaint(text).startswith(f'lab1.yaml, {expected}')


@pytest.mark.parametrize('text', ['', '\n# note\n', 'ip lab1', 'ip lab1\nlab2', '- ip: a', '[]',
                                  '~', '"ip: a"'])
def test_a_file_that_is_no_mapping(home, text):
    assert complaint(text) == 'lab1.yaml: a machine file has lines such as "ip: lab1".'


@pytest.mark.parametrize('text', ['lab1', 'lab1\nlab2\n', '# a\nlab1\n\n# b\nben@lab2:2222\n'])
def test_a_list_of_machines_is_no_machine_file(home, text):
    assert complaint(text).endswith(' If it is a list of machines, write @lab1.yaml.')


@pytest.mark.parametrize('text', ['[' * 5000, 'ip: a\nname: ' + '{a: ' * 3000 + '}' * 3000],
                         ids=['lists', 'mappings'])
def test_a_file_that_is_nested_too_deeply(home, text):
    assert complaint(text).startswith('lab1.yaml')


def test_a_file_that_cannot_be_read(home):
    os.mkdir('folder.yaml')
    for name, reason in [('none.yaml', 'No such file or directory'),
                         ('folder.yaml', 'Is a directory')]:
        with pytest.raises(MachineFileError) as caught:
            ssh_scheduler.read_machine_file(name, name)
        assert str(caught.value) == f'{name}: cannot be read: {reason}.'


# ---- Any text ----

KEYS = st.sampled_from([*ssh_scheduler.MACHINE_KEYS, 'user', '<<', '? a'])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates()
    | st.sampled_from(['a', '-a', '22', '*', '!!int x', '~/a', '&x', '2020-99-99', '0b', '1:99',
                       '=', '!', '!!binary é', '!!timestamp x', '!!float y', '!!set {a}', '|']),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(max_size=3) | KEYS, value,
                                                                max_size=3), max_leaves=5)
DUMPED = st.dictionaries(KEYS | st.text(), VALUES, max_size=5).map(
    lambda value: yaml.safe_dump(value, allow_unicode=True).encode('utf-8', 'replace'))
WRITTEN = st.lists(st.tuples(KEYS, VALUES), max_size=5).map(
    lambda pairs: '\n'.join(f'{key}: {value}' for key, value in pairs).encode('utf-8', 'replace'))
BROKEN = st.tuples(DUMPED | WRITTEN, st.integers(0, 60), st.binary(max_size=2)).map(
    lambda parts: parts[0][:parts[1]] + parts[2] + parts[0][parts[1]:])


@ANY
@given(data=st.binary(max_size=60) | st.text(max_size=60).map(str.encode) | DUMPED | WRITTEN
       | BROKEN)
@example(b'ip: a\nport: !!timestamp x')
@example(b'ip: a\nport: 0b')
@example(b'ip: "\\U01000000"')
@example(b'ip: "\\UFFFFFFFF"')
@example(b'ip: a\nport: 1' + b'0' * 5000)
@example(b'ip: a\nenv: {A: 1' + b'0' * 5000 + b'}')
def test_any_file_is_a_machine_or_one_sentence(home, data):
    try:
        machine = read(data)
    except MachineFileError as error:
        sentence = str(error)
        assert sentence.startswith('lab1.yaml') and sentence.endswith('.'), sentence
        assert '\n' not in sentence and 'Node(' not in sentence
    else:
        assert machine.host and not machine.host.startswith('-')
        assert all(isinstance(v, str) for pair in machine.env + machine.ssh_options for v in pair)
        ssh_scheduler.nul_ended(machine.workdir, machine.setup, *map('='.join, machine.env))


# ---- Finding a machine ----

def test_a_file_is_found_as_given_with_yaml_and_in_the_home(home):
    def found(word):
        return ssh_scheduler.find_machine(word)

    private = home / '.local' / 'var'
    (private / 'lab1.yaml').write_text('ip: four')
    assert (found('lab1').host, found('lab1').name) == ('four', 'lab1')
    assert (found('lab1.yaml').host, found('lab1.yaml').name) == ('four', 'lab1.yaml')
    (private / 'lab1').write_text('ip: three')
    assert found('lab1').host == 'three'
    with open('lab1.yaml', 'w') as file:
        file.write('ip: two')
    assert (found('lab1').host, found('lab1.yaml').host) == ('two', 'two')
    with open('lab1', 'w') as file:
        file.write('ip: one')
    assert found('lab1').host == 'one'
    assert found(str(private / 'lab1')).host == 'three'


def test_a_folder_is_no_machine_file(home):
    os.mkdir('lab1')
    assert ssh_scheduler.find_machine('lab1') == Machine(name='lab1', host='lab1')


def test_a_missing_file_is_named(home):
    for word in ('lab1.yaml', 'a/lab1', './lab1', '/lab1.yml'):
        with pytest.raises(MachineFileError) as caught:
            ssh_scheduler.find_machine(word)
        where = os.path.join(home, '.local/var', word)
        assert str(caught.value) == f'there is no machine file {word}, nor {where}.'


@pytest.mark.parametrize(('word', 'host', 'user', 'port'), [
    ('lab1', 'lab1', None, None),
    ('me@lab1', 'lab1', 'me', None),
    ('me@lab1:2222', 'lab1', 'me', 2222),
    ('lab1:22', 'lab1', None, 22),
    ('lab1:65535', 'lab1', None, 65535),
    ('[::1]:22', '::1', None, 22),
    ('[::1]', '::1', None, None),
    ('::1', '::1', None, None),
    ('me@fe80::1%eth0', 'fe80::1%eth0', 'me', None),
    ('me@[fe80::1%eth0]:22', 'fe80::1%eth0', 'me', 22),
    ('me@uni.example@lab1', 'lab1', 'me@uni.example', None),
])
def test_a_name_is_a_machine_without_a_file(home, word, host, user, port):
    machine = ssh_scheduler.find_machine(word)
    assert machine == Machine(name=word, host=host, username=user, port=port)


def test_this_machine_needs_no_ssh(home):
    for word in ('localhost', ':'):
        with open(word, 'w') as file:
            file.write('ip: elsewhere')
        machine = ssh_scheduler.find_machine(word)
        assert machine == Machine(name=word) and machine.address == 'localhost'


@pytest.mark.parametrize('word', [
    '', '@', 'me@', '@lab1', '-lab1', 'me@-lab1', '-me@lab1', '-oProxyCommand=x', 'lab1:', 'lab1:0',
    'lab1:65536', 'lab1:x', 'lab1:-1', 'lab1:٣', 'lab1:' + '1' * 5000, 'a b', 'me@a b', 'lab*',
    'me:x@lab1', '[lab1', '[::1]:', '[]', ':22', 'é', '$(a)', 'a;b', '\x1b[m@lab1', 'lab1\n'])
def test_a_word_that_names_no_machine(home, word):
    with pytest.raises(MachineFileError) as caught:
        ssh_scheduler.find_machine(word)
    assert str(caught.value).partition(' Separate')[0] == NO_MACHINE.format(repr(word))


NO_MACHINE = '{} is neither a machine file, a name from ~/.ssh/config, nor [user@]host[:port].'


@pytest.mark.parametrize(('word', 'machines'), [
    ('lab1,lab2', 'lab1 lab2'), ('lab1,', 'lab1'), (',', None), ('me@lab1:22, lab2', 'me@lab1:22 '
     'lab2'), ('lab1 lab2', 'lab1 lab2'), ('lab1,l*', None), ('lab*', None)])
def test_several_machines_in_one_word_are_shown_apart(home, word, machines):
    with pytest.raises(MachineFileError) as caught:
        ssh_scheduler.find_machine(word)
    hint = f' Separate machines with blanks, without commas: --machines {machines}.'
    assert str(caught.value) == NO_MACHINE.format(repr(word)) + hint * bool(machines)


@pytest.mark.parametrize(('line', 'expected'), [
    ('lab1 lab2', "hosts, line 3: 'lab1 lab2' is not one machine. Write one machine on each line."),
    ('lab1,lab2', "hosts, line 3: 'lab1,lab2' is not one machine. Write one machine on each line."),
    ('lab*', 'hosts, line 3: ' + NO_MACHINE.format("'lab*'")),
    ('no.yaml', 'hosts, line 3: there is no machine file no.yaml, nor ')])
def test_the_line_of_a_list_that_names_no_machine_is_named(home, line, expected):
    with open('hosts', 'w') as file:
        file.write(f'# mine\nlab0\n{line}\n')
    with pytest.raises(MachineFileError) as caught:
        ssh_scheduler.find_machines(['other', '@hosts'])
    assert str(caught.value).startswith(expected)


def test_a_machine_file_in_a_list_may_have_a_blank_in_its_name(home):
    for name, text in (('my lab, one.yaml', 'ip: a'), ('hosts', 'my lab, one\n')):
        with open(name, 'w') as file:
            file.write(text)
    assert ssh_scheduler.find_machines(['@hosts'])[0][0].host == 'a'


def test_machines_are_named_once(home):
    machines, _ = ssh_scheduler.find_machines(('b', 'a', 'localhost'))
    assert [machine.name for machine in machines] == ['b', 'a', 'localhost']
    with pytest.raises(MachineFileError) as caught:
        ssh_scheduler.find_machines(('a', 'b', 'a'))
    assert str(caught.value) == 'the machine a is named twice.'


BAD_FILES = {'key': 'ip: a\nprot: 1', 'yaml': 'ip a\nport: 22', 'empty': '',
             'no_key': 'ip: a\nssh_key_path: /none'}


def write_files(**texts):
    for name, text in texts.items():
        with open(f'{name}.yaml', 'w') as file:
            file.write(text)
    os.symlink('gone', 'link.yaml')
    return [f'{name}.yaml' for name in (*texts, 'link')]


def test_a_file_that_is_wrong_leaves_the_others(home):
    bad = write_files(**BAD_FILES)
    with open('good.yaml', 'w') as file:
        file.write('ip: b')
    machines, complaints = ssh_scheduler.find_machines([*bad[:2], 'good.yaml', *bad[2:], 'c'])
    assert [machine.word for machine in machines] == ['good.yaml', 'c']
    for name, complaint_ in zip(bad, complaints):
        with pytest.raises(MachineFileError) as caught:
            ssh_scheduler.find_machine(name)
        assert str(caught.value) == complaint_ and name in complaint_
    assert len(complaints) == len(bad)
    assert ssh_scheduler.find_machines(()) == ([], [])


def test_files_that_are_all_wrong_are_an_error(home):
    bad = write_files(**BAD_FILES)
    with pytest.raises(MachineFileError) as caught:
        ssh_scheduler.find_machines(bad)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(bad) and all(name in line for name, line in zip(bad, lines))


@pytest.mark.parametrize(('words', 'expected'), [
    (['key.yaml', 'good', 'key.yaml'], 'the machine key.yaml is named twice.'),
    (['good', 'key.yaml', 'good'], 'the machine good is named twice.'),
    (['key.yaml', 'good', 'me@good:0'], "'me@good:0' is neither a machine file, "),
    (['key.yaml', 'good', 'none.yaml'], 'there is no machine file none.yaml, nor '),
    (['key.yaml', 'good', '*.yml'], 'there is no machine file *.yml, nor '),
    (['key.yaml', 'good', '.'], "'.' is neither "), (['key.yaml', 'good', ''], "'' is neither "),
    (['key.yaml', '@none'], 'the list of machines @none cannot be read')])
def test_words_that_are_wrong_are_an_error_beside_a_file_that_is(home, words, expected):
    write_files(**BAD_FILES)
    with pytest.raises(MachineFileError) as caught:
        ssh_scheduler.find_machines(words)
    assert str(caught.value).startswith(expected)


def test_accounts_are_named_once(run_cli, home):
    for name, way in (('a', ''), ('b', ''), ('c', 'proxy_jump: gate\n'),
                      ('d', 'proxy_jump: other\n'), ('e', 'ssh_options: {User: you}\n'),
                      ('f', 'ssh_options: {proxycommand: nc x}\n')):
        (home.parent / 'here' / f'{name}.yaml').write_text(f'ip: h\nusername: me\n{way}')
    others = [f'{name}.yaml' for name in 'acdef']
    assert [machine.name for machine in ssh_scheduler.find_machines(others)[0]] == others
    for words, account in ((('a.yaml', 'c.yaml', 'b.yaml'), 'me@h:22'),
                           (('localhost', 'a.yaml', ':'), 'localhost')):
        done = run_cli('execute_to', '--machines', *words, '--', 'true')
        assert (done.returncode, done.stdout, done.stderr) == (
            2, '', f'execute_to: {words[0]} and {words[-1]} are the same account, {account}: '
            'name one of them.\n')


@pytest.mark.parametrize(('machine', 'address'), [
    (Machine('a', 'h'), 'h'), (Machine('a', 'h', 'me'), 'me@h'),
    (Machine('a', 'h', 'me', 22), 'me@h:22'), (Machine('a', '::1', None, 22), '::1:22'),
    (Machine('a', 'h', 'me', 22, proxy_jump='gate'), 'me@h:22 via gate'),
    (Machine('a', 'h', ssh_options=(('Compression', 'yes'), ('ProxyJump', 'gate'))),
     'h ProxyJump=gate'),
    (Machine('localhost'), 'localhost')])
def test_the_address_in_the_journal(machine, address):
    assert machine.address == address


# ---- Keys ----

def key_complaint(path):
    with pytest.raises(MachineFileError) as caught:
        ssh_scheduler.check_key(str(path), 'lab1.yaml')
    where = f'lab1.yaml: the key {path}'
    assert str(caught.value).startswith(where)
    return str(caught.value)[len(where):]


FORMATS = [('-t', 'ed25519'), ('-t', 'ecdsa'), ('-t', 'ecdsa', '-m', 'PEM'),
           ('-t', 'rsa', '-b', '1024', '-m', 'PEM'), ('-t', 'ecdsa', '-m', 'PKCS8')]


@pytest.mark.parametrize('options', FORMATS)
def test_a_key_with_a_passphrase_is_refused(tmp_path, options):
    open_key = keygen(tmp_path / 'open', *options, '-N', '')
    ssh_scheduler.check_key(str(open_key), 'lab1.yaml')
    locked = keygen(tmp_path / 'locked', *options, '-N', 'secret')
    assert key_complaint(locked).startswith(' has a passphrase, which nobody could type here.')


def test_a_missing_key_is_named(tmp_path):
    assert key_complaint(tmp_path / 'none').startswith(
        ' cannot be read: No such file or directory. Make one with ssh-keygen')
    assert key_complaint(tmp_path).startswith(' cannot be read: Is a directory.')
    assert key_complaint('/dev/null') == ' is not a file.'


@pytest.mark.parametrize('mode', [0o640, 0o604, 0o610, 0o666, 0o602])
def test_a_key_that_others_can_read_is_refused(tmp_path, key, mode):
    path = tmp_path / 'key'
    path.write_bytes(key.read_bytes())
    path.chmod(mode)
    assert key_complaint(path) == (
        f' can be read by others, so ssh refuses it. Try: chmod 600 {path}')
    path.chmod(0o400)
    ssh_scheduler.check_key(str(path), 'lab1.yaml')


def test_a_public_key_is_refused(tmp_path, key):
    path = tmp_path / 'key'
    for start in (None, 'ssh-rsa', 'ecdsa-sha2-nistp256', 'sk-ssh-ed25519@openssh.com',
                  'sk-ecdsa-sha2-nistp256@openssh.com'):
        text = key.with_name('key.pub').read_text()
        path.write_text(text if start is None else f'{start} {text.partition(" ")[2]}')
        path.chmod(0o600)
        assert key_complaint(path) == (
            ' is not a private key (this looks like the public key: remove .pub).')
    path.write_text('hello')
    assert key_complaint(path) == ' is not a private key.'


@ANY
@given(body=st.binary(max_size=80))
def test_a_broken_key_is_no_crash(body):
    """ssh itself reports what is wrong with the key."""
    ssh_scheduler.key_has_passphrase(b'-----BEGIN OPENSSH PRIVATE KEY-----\n' + body)


def test_the_key_of_a_file_is_checked(home, key):
    with pytest.raises(MachineFileError) as caught:
        read('ip: a\nssh_key_path: ~/none')
    assert str(caught.value).startswith(
        f'lab1.yaml: the key {home}/none cannot be read: No such file')
    os.symlink(key, 'key')
    assert read('ip: a\nssh_key_path: key').ssh_key_path == 'key'


# ---- How ssh reads the configuration ----

@pytest.fixture
def ssh_sees(home, tmp_path):
    """Return {option: value} that the real ssh reads in a Connection's configuration."""
    def see(machine, alias=None, user_config=''):
        connection = ssh_scheduler.Connection(machine, str(tmp_path), 7)
        if user_config:
            (tmp_path / 'user_config').write_text(user_config)
            connection.user_configs = lambda: [str(tmp_path / 'user_config')]
        with open(connection.config_path, 'w') as file:
            file.write(connection.config())
        done = subprocess.run(
            ['ssh', '-G', '-F', connection.config_path, '--', alias or machine.host],
            capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return dict(line.partition(' ')[::2] for line in done.stdout.splitlines())

    return see


FORCED = {
    'requesttty': 'false', 'sessiontype': 'default', 'stdinnull': 'no',
    'forkafterauthentication': 'no', 'permitlocalcommand': 'no', 'clearallforwardings': 'yes',
    'forwardagent': 'no', 'forwardx11': 'no', 'tunnel': 'false', 'updatehostkeys': 'false',
    'visualhostkey': 'no', 'controlpersist': 'no',
}
DEFAULTS = {
    'batchmode': 'yes', 'numberofpasswordprompts': '0', 'stricthostkeychecking': 'accept-new',
    'connecttimeout': '15', 'serveraliveinterval': '15', 'serveralivecountmax': '4',
    'loglevel': 'ERROR',
}
MEDDLING = {
    'RequestTTY': 'force', 'SessionType': 'none', 'StdinNull': 'yes', 'Tunnel': 'yes',
    'ForkAfterAuthentication': 'yes', 'PermitLocalCommand': 'yes', 'ClearAllForwardings': 'no',
    'ForwardAgent': 'yes', 'ForwardX11': 'yes', 'UpdateHostKeys': 'yes', 'VisualHostKey': 'yes',
    'ControlPersist': 'yes', 'ControlMaster': 'no', 'ControlPath': '/elsewhere',
    'RemoteCommand': 'false', 'EscapeChar': '!', 'LogLevel': 'DEBUG',
}


def forced_of(seen):
    return {name: seen[name] for name in FORCED}


def defaults_of(seen):
    return {name: seen[name] for name in DEFAULTS}


def test_ssh_reads_the_connection_of_a_machine(ssh_sees, tmp_path, key):
    seen = ssh_sees(Machine('a', 'Lab1.example.org', 'me@uni', 2222, str(key), 'gate:22,inner'))
    assert (seen['user'], seen['hostname'], seen['port']) == ('me@uni', 'lab1.example.org', '2222')
    assert (seen['identityfile'], seen['identitiesonly']) == (str(key), 'yes')
    assert (seen['proxycommand'], seen['controlmaster']) == (
        f"ssh -F {tmp_path}/7.jump -o ConnectTimeout=20 -W '[%h]:%p' -J 'gate:22' -- inner", 'true')
    assert seen['controlpath'] == str(tmp_path / '7')
    assert (forced_of(seen), defaults_of(seen)) == (FORCED, {**DEFAULTS, 'connecttimeout': '25'})
    assert 'remotecommand' not in seen


def test_a_name_alone_leaves_the_rest_to_the_user_s_configuration(ssh_sees):
    seen = ssh_sees(Machine('gpu', 'gpu'), user_config="""\
User someone
Host gpu
  HostName gpu.example.org
  Port 2200
  IdentityFile /some/key
  ProxyJump gate
  ServerAliveCountMax 99
""")
    assert (seen['user'], seen['hostname'], seen['port']) == ('someone', 'gpu.example.org', '2200')
    assert (seen['identityfile'], seen['proxyjump']) == ('/some/key', 'gate')
    assert (forced_of(seen), defaults_of(seen)) == (FORCED, DEFAULTS)


def test_the_user_s_configuration_cannot_change_what_is_forced(ssh_sees, tmp_path):
    lines = [f'{name} {value}\n' for name, value in MEDDLING.items()]
    for user_config in (''.join(lines), 'Host *\n' + ''.join(lines)):
        seen = ssh_sees(Machine('a', 'a'), user_config=user_config)
        assert (forced_of(seen), defaults_of(seen)) == (FORCED, DEFAULTS)
        assert seen['controlpath'] == str(tmp_path / '7') and seen['controlmaster'] == 'true'
        assert 'remotecommand' not in seen and seen['escapechar'] == 'none'


def test_an_ssh_that_does_not_know_all_options_reads_the_configuration(ssh_sees, monkeypatch):
    """An ssh before OpenSSH 8.7: the later options get names here that no ssh knows."""
    for name in ('FORCED_SSH_OPTIONS', 'LATER_SSH_OPTIONS'):
        value = getattr(ssh_scheduler, name)
        for option in ssh_scheduler.LATER_SSH_OPTIONS if name[0] == 'F' else ():
            value = value.replace(f'  {option} ', f'  {option}X ')
        monkeypatch.setattr(ssh_scheduler, name, value if name[0] == 'F' else
                            [f'{option}X' for option in value])
    seen = ssh_sees(Machine('a', 'a', 'me'))
    assert (seen['user'], seen['requesttty']) == ('me', 'false')


def test_what_the_user_has_ssh_ignore_stays_ignored(ssh_sees, home):
    """A ~/.ssh/config that is shared with macOS has it: IgnoreUnknown UseKeychain."""
    (home / 'included').write_text('ignoreunknown=Two*,Three\n')
    seen = ssh_sees(Machine('a', 'a'), user_config=(
        f'IgnoreUnknown "UseKeychain"\nInclude {home}/includ*\nInclude none\nUseKeychain yes\n'
        'TwoAndMore yes\nThree 3\nUser someone\n'))
    assert (seen['user'], forced_of(seen)) == ('someone', FORCED)


def test_the_options_of_a_machine_cannot_change_what_is_forced(ssh_sees, tmp_path):
    seen = ssh_sees(Machine('a', 'a', ssh_options=tuple(MEDDLING.items())))
    assert forced_of(seen) == FORCED
    assert seen['controlpath'] == str(tmp_path / '7') and seen['controlmaster'] == 'true'
    assert 'remotecommand' not in seen and seen['escapechar'] == 'none'
    assert seen['loglevel'] == 'DEBUG'          # a default, which only the machine's options change


def test_the_machine_s_options_come_before_the_user_s(ssh_sees):
    seen = ssh_sees(Machine('a', 'a', port=22, ssh_options=(('ConnectTimeout', '3'),)),
                    user_config='Port 99\nConnectTimeout 99\nCompression yes\n')
    assert (seen['port'], seen['connecttimeout'], seen['compression']) == ('22', '3', 'yes')


def test_values_with_blanks_and_percents_survive(ssh_sees):
    seen = ssh_sees(Machine(
        'a', 'a', ssh_key_path='/the keys/100% mine', ssh_options=(
            ('UserKnownHostsFile', '/a b/#known'), ('ProxyCommand', 'nc -x "a  b" %h %p # c'),
            ('KnownHostsCommand', '/bin/my keys %H'), ('SetEnv', 'A=b c'))))
    # The configuration has %% for a %, and ssh -G prints it unchanged.
    assert seen['identityfile'] == '/the keys/100%% mine'
    assert seen['userknownhostsfile'] == '/a b/#known'
    assert seen['proxycommand'] == 'nc -x "a  b" %h %p # c'
    assert seen['knownhostscommand'] == '/bin/my keys %H'
    assert seen['setenv'] == 'A=b c'


def test_a_proxy_jump_among_the_options(ssh_sees, tmp_path):
    for value, words in (('me@gate:22', "-l me -p 22 -- gate"), ('[fe80::1]', '-- fe80::1'),
                         ('a,b@[::1]:7,me@x@c', "-J 'a,b@[::1]:7' -l me@x -- c")):
        options = (('proxyjump', value), ('ConnectTimeout', '3'))
        seen = ssh_sees(Machine('a', 'a', ssh_options=options),
                        user_config='ProxyJump gate\nProxyUseFdpass yes\nUser you\n')
        start, _, rest = seen['proxycommand'].partition(" -W '[%h]:%p' ")
        assert start.startswith(f'ssh -F {tmp_path}/7.jump -o ConnectTimeout=') and rest == words
        assert ('proxyjump' not in seen, seen['proxyusefdpass'], seen['connecttimeout']) == (
            True, 'no', '3')
    for value in ('none', 'ssh://me@gate:22'):          # ssh itself interprets these
        seen = ssh_sees(Machine('a', 'a', ssh_options=(('ProxyJump', value),)))
        assert 'proxycommand' not in seen


def test_a_jump_host_reads_nothing_of_the_machine_s(tmp_path, home):
    connection = ssh_scheduler.Connection(
        Machine('a', 'a', 'me', 2222, proxy_jump='a:22'), str(tmp_path), 7)
    with open(connection.jump_path, 'w') as file:
        file.write(connection.jump_config())
    seen = subprocess.run(['ssh', '-G', '-F', connection.jump_path, 'a'], capture_output=True,
                          text=True).stdout.splitlines()
    assert {'port 22', 'batchmode yes', 'loglevel INFO'} <= {*seen} and 'user me' not in seen


@pytest.mark.parametrize('host', ['::1', 'fe80::1%lo', '10.0.0.1', 'a_b'])
def test_an_address_of_any_kind_has_its_options(ssh_sees, host):
    seen = ssh_sees(Machine('a', host, 'me', 2222))
    assert (seen['hostname'], seen['user'], seen['port']) == (host, 'me', '2222')


def test_copies_go_through_the_master_or_not_at_all(ssh_sees, tmp_path):
    machine = Machine('a', 'a', 'me', 2222, ssh_options=(('ProxyCommand', 'nc %h %p'),))
    seen = ssh_sees(machine, ssh_scheduler.COPY_ALIAS,
                    'ControlMaster auto\nControlPath none\nProxyJump gate\nHostName a\n')
    assert seen['controlmaster'] == 'false'
    assert seen['controlpath'] == str(tmp_path / '7')
    refusal = subprocess.run(seen['proxycommand'], shell=True, capture_output=True, text=True)
    assert (refusal.returncode, refusal.stderr) == (1, ssh_scheduler.NO_MASTER + '\n')
    assert forced_of(seen) == FORCED and 'proxyjump' not in seen


def test_the_arguments_of_ssh_and_rsync_hold_no_value_of_the_user(tmp_path):
    """The values stand in the configuration, so none can become an option or shell code."""
    machine = Machine('a', 'lab1', 'me', 2222, '/key', 'gate', (('Compression', 'yes'),))
    connection = ssh_scheduler.Connection(machine, str(tmp_path), 7)
    config = f'{tmp_path}/7.config'
    run = f"exec bash -pc '{ssh_scheduler.BOOTSTRAP}'"
    assert connection.channel() == ['ssh', '-F', config, '-T', '--', 'lab1', run]
    assert connection.copy() == ['ssh', '-F', config, '-T', '--', ssh_scheduler.COPY_ALIAS,
                                 connection.copy()[-1]]
    assert re.fullmatch(r"exec bash -pc '[^']+'", connection.channel()[-1])
    argv = connection.rsync(['-x'], 'from', 'to', 'target')
    assert argv[argv.index('-e') + 1] == f'ssh -F {config}'
    assert argv[-3:] == ['--', 'from', f'{ssh_scheduler.COPY_ALIAS}:to']
    assert connection.rsync([], 'from', 'to', 'source')[-2:] == [
        f'{ssh_scheduler.COPY_ALIAS}:from', 'to']
    alone = ['-o', 'ControlMaster=no', '-o', 'ControlPath=none']
    assert connection.copy(alone=True) == ['ssh', '-F', config, '-T', *alone, '--', 'lab1', run]
    argv = connection.rsync([], 'from', 'to', 'target', alone=True)
    assert argv[argv.index('-e') + 1] == f'ssh -F {config} {" ".join(alone)}'
    assert argv[-2:] == ['from', 'lab1:to']


def test_this_machine_is_reached_by_bash_alone(tmp_path):
    connection = ssh_scheduler.Connection(Machine('localhost'), str(tmp_path), 0)
    assert connection.channel()[:2] == connection.copy()[:2] == ['bash', '-pc']
    argv = connection.rsync([], 'from', 'to', 'target')
    assert argv[-3:] == ['--', 'from', 'to'] and '-e' not in argv
