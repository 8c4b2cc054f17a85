"""Fit a line to noisy points by gradient descent, and print its loss on other points."""
import argparse
import math
import random

parser = argparse.ArgumentParser()
parser.add_argument('--lr', type=float, required=True)
parser.add_argument('--seed', type=int, required=True)
parser.add_argument('--epochs', type=int, default=20)
args = parser.parse_args()

random.seed(args.seed)
points = [(x / 50, 3 * x / 50 + 1 + random.gauss(0, 0.3)) for x in range(100)]
train, test = points[::2], points[1::2]
slope = offset = 0.0


def loss(some):
    return sum((slope * x + offset - y) ** 2 for x, y in some) / len(some)


for epoch in range(args.epochs):
    errors = [(slope * x + offset - y, x) for x, y in train]
    slope -= args.lr * 2 * sum(error * x for error, x in errors) / len(train)
    offset -= args.lr * 2 * sum(error for error, _ in errors) / len(train)
    print(f'epoch {epoch}: loss {loss(train):.4f}')
    if math.isinf(slope) or loss(train) > 1e6:
        raise SystemExit('the loss explodes: choose a smaller --lr')
print(f'test_loss: {loss(test):.4f}')
