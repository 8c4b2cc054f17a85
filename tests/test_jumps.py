"""Jump hosts: real ones, at the machine's own address; and the error message for each hop."""
import pytest
import rig
from batching import NO_GPU, RESULTS, assert_clean, constants, result, with_constants

from ssh_scheduler import Machine, explain_login


def at(machine):
    return f'127.0.0.1:{machine.port}'


def place(machine):
    return f'127.0.0.1 port {machine.port}'


@pytest.fixture
def ssh_config(client_home):
    """Write the ~/.ssh/config of the user, who knows these jump hosts and has keys for them."""
    def write(*hops, text='', known=None):
        (client_home / '.ssh').mkdir(exist_ok=True)
        file = client_home / '.ssh/known'
        file.write_text(''.join(hop.known_hosts.read_text() for hop in hops)
                        if known is None else known)
        (client_home / '.ssh/config').write_text(
            text + 'Host *\n  User ben\n' + ''.join(f'  IdentityFile {hop.key}\n' for hop in hops)
            + f'  UserKnownHostsFile {file}\n')
        return file

    return write


def asked(machine):
    """Return the number of connections to the machine."""
    return machine.log.read_text().count('Connection from')


# ---- Jump hosts that work ----

@pytest.mark.parametrize('sessions', ['', 'MaxSessions 1'])
@pytest.mark.parametrize('chain', [1, 2])
def test_a_jump_host_at_the_machine_s_own_address(batches, lab, ssh_config, chain, sessions):
    machine, *hops = lab(sshd_options=sessions), *(lab() for _ in range(chain))
    ssh_config(*hops)
    with open('data', 'wb') as file:
        file.write(bytes(400_000))          # rsync copies a file of this size
    jump = ','.join(map(at, hops))
    done = batches.run(['cp data copy; echo here'], [machine.yaml(proxy_jump=jump)], *NO_GPU)
    assert (done.returncode, result('batch.sh.1')) == (0, b'here\n'), done.stderr
    assert (RESULTS / 'batch.sh.1/copy').stat().st_size == 400_000
    assert min(map(asked, hops)) >= 1 and (machine.logins() > 1) == bool(sessions)
    assert_clean(machine, cache=True)


def test_one_account_direct_and_by_a_jump_host(run_cli, lab, ssh_config, tmp_path):
    machine, jump = lab(), lab()
    ssh_config(jump)
    by_jump = tmp_path / 'by_jump.yaml'
    by_jump.write_text(machine.yaml(proxy_jump=at(jump)).read_text())
    direct = machine.yaml()
    done = run_cli('execute_to', '--machines', by_jump, direct, '--', 'echo here')
    assert (done.returncode, done.stdout.count('here\n')) == (1, 1)
    assert 'are the same account, ' in done.stderr and done.stderr.count('\n') == 1


# ---- Jump hosts that fail ----

def broken(why, machine, jump, lab, ssh_config):
    """Return a jump that fails, and how its error message begins."""
    here, there = place(jump), place(machine)
    if why == 'key':
        other = lab()
        ssh_config(other, known=jump.known_hosts.read_text())
        return at(jump), f'the login as ben at jump host {here} was refused (publickey was tried): '
    if why == 'user':
        return f'nobody@{at(jump)}', f'the login as nobody at jump host {here} was refused '
    if why == 'port':
        port = rig.free_port()
        return f'127.0.0.1:{port}', f'nothing listens at jump host 127.0.0.1 port {port}'
    if why == 'name':
        return 'no-such.invalid', 'the jump host name no-such.invalid is unknown'
    if why == 'forbidden':
        return at(jump), (f'jump host {here} forbids connections to {there} (AllowTcpForwarding or '
                          'PermitOpen in its sshd_config)')
    key = lab().known_hosts.read_text().split(' ', 1)[1]
    if why == 'alias':
        file = ssh_config(jump, text='Host 127.0.0.1\n  HostKeyAlias gate\n', known=f'gate {key}')
        name = 'gate'
    else:
        file = ssh_config(jump, known=f'[127.0.0.1]:{jump.port} {key}')
        name = f'[127.0.0.1]:{jump.port}'
    return at(jump), (f'the host key of jump host {here} has changed, so this may '
                      f'be another machine. Was it reinstalled? Try: ssh-keygen -f "{file}" -R '
                      f'"{name}"')


@pytest.mark.parametrize('why', ['key', 'user', 'port', 'name', 'forbidden', 'changed key',
                                 'alias'])
def test_what_is_wrong_with_a_jump_host_is_said_of_it_at_once(
        run_cli, lab, ssh_config, why):
    machine = lab()
    jump = lab(sshd_options='AllowTcpForwarding no' if why == 'forbidden' else '')
    ssh_config(jump)
    way, words = broken(why, machine, jump, lab, ssh_config)
    file = machine.yaml(proxy_jump=way)
    done = run_cli('execute_to', '--machines', file, '--', 'true')
    assert done.returncode == 1 and done.stderr.startswith(f'unreachable: {file} ({words}')
    assert done.stderr.count('\n') == 1
    assert (asked(jump), asked(machine)) == (int(why not in ('port', 'name')), 0)


@pytest.mark.parametrize('bad', [0, 1])
@pytest.mark.parametrize('why', ['forbidden', 'user'])
def test_of_a_chain_the_hop_that_fails_is_named(run_cli, lab, ssh_config, bad, why):
    machine = lab()
    hops = [lab(), lab()]
    if why == 'forbidden':
        hops[bad] = lab(sshd_options='AllowTcpForwarding no')
    ssh_config(*hops)
    names = [f'nobody@{at(hop)}' if number == bad and why == 'user' else at(hop)
             for number, hop in enumerate(hops)]
    done = run_cli('execute_to', '--machines', machine.yaml(proxy_jump=','.join(names)), '--',
                   'true')
    beyond = place([*hops, machine][bad + 1])
    words = {'forbidden': f'jump host {place(hops[bad])} forbids connections to {beyond}',
             'user': f'the login as nobody at jump host {place(hops[bad])} was refused'}[why]
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert [asked(hop) for hop in hops] == [1, bad] and asked(machine) == 0


@pytest.mark.parametrize('why', ['port', 'key', 'changed key'])
def test_what_is_wrong_with_a_machine_is_not_said_of_its_jump_host(
        run_cli, lab, ssh_config, tmp_path, why):
    machine, jump = lab(), lab()
    ssh_config(jump)
    port, key = machine.port, machine.key
    known = tmp_path / 'known'
    known.write_text(machine.known_hosts.read_text())
    words = {'key': f'the login as ben at {place(machine)} was refused',
             'changed key': f'the host key of {place(machine)} has changed, so '
             f'this may be another machine. Was it reinstalled? Try: ssh-keygen -f "{known}" -R '
             f'"[127.0.0.1]:{machine.port}"'}.get(why)
    if why == 'port':
        port = rig.free_port()
        words = (f'jump host {place(jump)} cannot connect to 127.0.0.1 port {port}: Connection '
                 'refused')
    elif why == 'key':
        key = lab().key
    else:
        known.write_text(f'[127.0.0.1]:{port} {jump.known_hosts.read_text().split(" ", 1)[1]}')
    file = machine.yaml(port=port, ssh_key_path=str(key), proxy_jump=at(jump),
                        ssh_options={'UserKnownHostsFile': str(known), 'IdentityAgent': 'none'})
    done = run_cli('execute_to', '--machines', file, '--', 'true')
    assert done.returncode == 1 and f'unreachable: {file} ({words}' in done.stderr, done.stderr
    assert asked(jump) == 1


def test_a_jump_host_of_the_user_s_configuration(run_cli, lab, ssh_config):
    machine, jump = lab(), lab()
    text = (f'Host gpu\n  HostName 127.0.0.1\n  Port {machine.port}\n  ProxyJump gate\n'
            f'Host gate\n  HostName 127.0.0.1\n  Port {jump.port}\n')
    ssh_config(jump, machine, text=text)
    done = run_cli('execute_to', '--machines', 'gpu', '--', 'echo here')
    assert (done.returncode, done.stdout) == (0, 'gpu: here\n'), done.stderr
    ssh_config(machine, known=jump.known_hosts.read_text(), text=text)
    done = run_cli('execute_to', '--machines', 'gpu', '--', 'true')
    assert done.stderr.startswith('unreachable: gpu (the login as ben at jump host 127.0.0.1 was ')
    jump.stop()
    done = run_cli('execute_to', '--machines', 'gpu', '--', 'true')
    assert done.stderr == f'unreachable: gpu (nothing listens at jump host {place(jump)})\n'
    jump.start()


@with_constants
def test_a_jump_host_that_hangs_is_named(run_cli, lab, ssh_config):
    machine, jump = lab(), lab()
    ssh_config(jump)
    jump.freeze()
    done = run_cli('execute_to', '--machines', machine.yaml(proxy_jump=at(jump)), '--', 'true',
                   env=constants(HOP_LIMIT_S=3))
    jump.thaw()
    assert f'(jump host {place(jump)} did not answer in time' in done.stderr


# ---- Messages of ssh, and the error messages made of them ----

CLOSED = 'kex_exchange_identification: Connection closed by remote host\n'
DIRECT = Machine('a', 'a', 'me', 22)
JUMPING = Machine('a', 'a', 'me', 22, proxy_jump='you@gate,inner:7')
ALIAS = Machine('a', 'a')


RECORDED = [
    # OpenSSH 9.2
    (ALIAS, 'ssh: connect to host 10.0.0.1 port 2200: Connection refused\n',
     'nothing listens at 10.0.0.1 port 2200', 'later'),
    (ALIAS, 'someone@10.0.0.1: Permission denied (publickey,password).\n',
     'the login as someone at 10.0.0.1 was refused (publickey,password was tried): is', 'never'),
    (DIRECT, CLOSED, 'a port 22 closed the connection before the login', 'again'),
    (DIRECT, '/etc/ssh/ssh_config line 5: Unsupported option "x"\n' + CLOSED,
     'a port 22 closed the connection before the login', 'again'),
    (JUMPING, CLOSED, 'a port 22 closed the connection before the login', 'again'),
    (JUMPING, 'kex_exchange_identification: read: Connection reset by peer\n'
     'Connection reset by 10.0.0.1 port 22\n' + CLOSED + 'Connection closed by UNKNOWN port '
     '65535\n' + CLOSED,
     'jump host 10.0.0.1 port 22 closed the connection before the login', 'again'),
    (JUMPING, '*** restricted access ***\nchannel 0: open failed: connect failed: No route to '
     'host\nstdio forwarding failed\n' + CLOSED,
     'jump host inner port 7 cannot connect to a port 22: No route to host', 'later'),
    (JUMPING, 'channel 0: open failed: connect failed: Name or service not known\n' + CLOSED,
     'jump host inner port 7 finds no address of a port 22', 'never'),
    (DIRECT, 'Unable to negotiate with 10.0.0.1 port 22: no matching host key type found. Their '
     'offer: ssh-rsa\n', 'a port 22 and ssh here have no method in common: no matching host key '
     'type found. Their offer: ssh-rsa', 'never'),
    (DIRECT, 'ssh: Could not resolve hostname a: Temporary failure in name resolution\n',
     'no name server answered for the host name a', 'later'),
    (DIRECT, 'sh: 1: exec: nc: not found\n' + CLOSED,
     'its ProxyCommand needs nc, which is not installed here', 'never'),
    # other builds than Debian's do not print the command
    (DIRECT, '@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\nOffending ED25519 key '
     'in /home/me/my known:3\nHost key for [a]:7 has changed and you have requested strict '
     'checking.\nHost key verification failed.\n',
     'the host key of a port 22 has changed, so this may be another machine. Was '
     'it reinstalled? Try: ssh-keygen -f "/home/me/my known" -R "[a]:7"', 'never'),
    # OpenSSH 7.4, and a jump host of ~/.ssh/config
    (DIRECT, 'Permission denied (publickey).\r\nssh_exchange_identification: Connection closed by '
     'remote host\n', 'the login as you at jump host was refused (publickey was tried)', 'never'),
    (DIRECT, 'stdio forwarding failed\n' + CLOSED, 'jump host could not connect to a port 22',
     'later'),
]


@pytest.mark.parametrize('machine, complaint, sentence, again', RECORDED,
                         ids=range(len(RECORDED)))
def test_what_is_said_of_a_login_that_failed(machine, complaint, sentence, again):
    said, when = explain_login(machine, 255, '', complaint)
    assert (said[:len(sentence)], when) == (sentence, again)
    assert not said.endswith('.')
