"""Add up the numbers in FOLDER/numbers.txt and write FOLDER/sum.txt: python3 test.py FOLDER"""

import sys
from pathlib import Path

folder = Path(sys.argv[1])
total = sum(int(line) for line in (folder / 'numbers.txt').read_text().split())
(folder / 'sum.txt').write_text(f'{total}\n')
print(f'{folder}: {total}')
