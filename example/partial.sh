execute_remote --copy-forwards example/example1 example/test.py --copy-backwards example/example1 --job-name example1 'python3 example/test.py example/example1'
execute_remote --copy-forwards example/example2 example/test.py --copy-backwards example/example2 --job-name example2 'python3 example/test.py example/example2'
