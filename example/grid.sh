python3 example/train.py --lr 0.01 --seed 1 --epochs 50
python3 example/train.py --lr 0.01 --seed 2 --epochs 50
python3 example/train.py --lr 0.01 --seed 3 --epochs 50
python3 example/train.py --lr 0.1 --seed 1 --epochs 50
python3 example/train.py --lr 0.1 --seed 2 --epochs 50
python3 example/train.py --lr 0.1 --seed 3 --epochs 50
python3 example/train.py --lr 1 --seed 1 --epochs 50
