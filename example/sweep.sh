bash example/measure.sh 1
bash example/measure.sh 2
bash example/measure.sh 3
