"""Learn to read handwritten digits with scikit-learn, and print the accuracy after each epoch."""
import argparse

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.utils import shuffle

parser = argparse.ArgumentParser()
parser.add_argument('--lr', type=float, required=True)
parser.add_argument('--seed', type=int, required=True)
parser.add_argument('--epochs', type=int, default=8)
args = parser.parse_args()

images, labels = load_digits(return_X_y=True)
train_x, val_x, train_y, val_y = train_test_split(
    images / 16, labels, test_size=0.3, random_state=args.seed, stratify=labels)
model = MLPClassifier((32,), solver='sgd', learning_rate_init=args.lr, random_state=args.seed)
for epoch in range(1, args.epochs + 1):
    batch_x, batch_y = shuffle(train_x, train_y, random_state=epoch)
    for start in range(0, len(batch_x), 64):
        model.partial_fit(batch_x[start:start + 64], batch_y[start:start + 64],
                          classes=list(range(10)))
    if model.loss_ > 60:
        raise SystemExit('the loss explodes: choose a smaller --lr')
    print(f'epoch {epoch}: loss={model.loss_:.4f} val_acc={model.score(val_x, val_y):.4f}')
