"""An rsync that sends files that nobody requested: hostile_rsync.py ENTRIES --server --sender …

It stands in for rsync on a machine and speaks protocol 30 of rsync, as far as a sender has to.  Its
file list is that of the JSON file ENTRIES: [[name, mode, target of a link], …], names in Latin-1,
where {work} is the job's folder on the machine.  All files have the same content, so the order in
which the receiver sorts them does not matter.
"""
import hashlib
import json
import signal
import stat
import struct
import sys

CONTENT = b'evil\n'
NDX_DONE = -1
ITEM_BASIS, ITEM_XNAME, ITEM_TRANSFER = 1 << 11, 1 << 12, 1 << 15
SAME_UID_AND_GID, LONG_NAME = 0b11000, 1 << 6
MPLEX_DATA = 7 << 24
PIECES = bytearray()


def read_raw(size):
    """Read exactly this many bytes."""
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        sys.exit(12)                    # the client has closed the connection
    return data


def read(size):
    """Read this many bytes of the multiplexed stream: pieces, each with a header."""
    while len(PIECES) < size:
        PIECES.extend(read_raw(struct.unpack('<I', read_raw(4))[0] & 0xffffff))
    data = bytes(PIECES[:size])
    del PIECES[:size]
    return data


def read_int():
    return struct.unpack('<i', read(4))[0]


def write(data):
    """Send the data as one piece with a header."""
    sys.stdout.buffer.write(struct.pack('<I', MPLEX_DATA | len(data)) + data)
    sys.stdout.buffer.flush()


def varlong(number, least):
    """Return a number as rsync packs it: the first byte also tells how many bytes follow."""
    data = bytearray(number.to_bytes(8, 'little'))
    while len(data) > least and not data[-1]:
        data.pop()
    bit = 1 << (7 + least - len(data))
    if data[-1] >= bit:
        return bytes([~(bit - 1) & 0xff]) + data
    top = data.pop()
    return bytes([top | (~(2 * bit - 1) & 0xff) if len(data) >= least else top]) + data


def read_index(last):
    """Read the index of a requested file, sent as the difference to the last one."""
    byte = read(1)[0]
    if byte == 0:
        return NDX_DONE
    if byte != 0xfe:
        return last + byte
    high, low = read(2)
    if high & 0x80:
        return int.from_bytes(bytes([low]) + read(2) + bytes([high & 0x7f]), 'little')
    return last + (high << 8) + low


def write_index(index, last):
    assert 0 < index - last < 0xfe
    write(bytes([index - last]))


def entry(name, mode, target):
    """Return an entry of the file list."""
    size = len(CONTENT) if stat.S_ISREG(mode) else 0
    data = bytes([SAME_UID_AND_GID | LONG_NAME]) + varlong(len(name), 1) + name
    data += varlong(size, 3) + varlong(10**9, 4) + struct.pack('<I', mode)
    return data + (varlong(len(target), 1) + target if stat.S_ISLNK(mode) else b'')


def greet():
    """Agree on the protocol; return the folder of the first requested name."""
    sys.stdout.buffer.write(struct.pack('<i', 30) + b'\0' + struct.pack('<i', 1))
    sys.stdout.buffer.flush()
    read_raw(4)                         # the client's protocol
    while True:
        size = read_int()               # of a filter of the client
        if not size:
            break
        read(size)
    asked = bytearray()
    while not asked.endswith(b'\0\0'):     # the names are not multiplexed
        asked += read_raw(1)
    return bytes(asked).split(b'/')[1]         # ./work.…/…


def send_files():
    """Send the requested files until the client requests no more."""
    phase, last, sent = 0, -1, -1
    while phase < 3:
        index = read_index(last)
        if index == NDX_DONE:
            phase += 1
            write(b'\0')
            continue
        last = index
        flags, = struct.unpack('<H', read(2))
        assert not flags & (ITEM_BASIS | ITEM_XNAME)
        write_index(index, sent)
        sent = index
        write(struct.pack('<H', flags))
        if flags & ITEM_TRANSFER:
            count, block, strong, rest = sums = [read_int() for _ in range(4)]
            read(count * (4 + strong))
            write(struct.pack('<4i', *sums) + struct.pack('<i', len(CONTENT)) + CONTENT
                  + struct.pack('<i', 0) + hashlib.md5(CONTENT).digest())


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with open(sys.argv[1]) as file:
        entries = json.load(file)
    work = greet()
    for name, mode, target in entries:
        write(entry(name.encode('latin-1').replace(b'{work}', work), mode,
                    target.encode('latin-1').replace(b'{work}', work)))
    write(b'\0')                                  # the end of the list
    send_files()
    write(varlong(0, 3) * 5)                        # statistics
    read(1)                                         # the client's goodbye


main()
