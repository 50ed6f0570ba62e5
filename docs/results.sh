#!/bin/sh
# Trains and scores every row of the table in docs/results.md that needs no download but VOC:
#     sh docs/results.sh DIR              DIR holds VOCdevkit/VOC2007, with its test split
#     sh docs/results.sh DIR --compile    the same on a GPU, as CUDA graphs
# On one core with AMX it takes about 9 hours. A run's scores on val and test go to
# runs/results/NAME/scores, by the paper's protocol and at the images' own resolution with void left out.
set -e
data=$1
more=$2
run() {
    name=$1
    shift
    python train.py "$@" --data "$data" --out "runs/results/$name" $more
    for split in val test; do
        python evaluate.py "runs/results/$name/best.pt" --data "$data" --split $split --void-as-background
        python evaluate.py "runs/results/$name/best.pt" --data "$data" --split $split
    done
}

run fcn --model fcn --init xavier_uniform --size 96 --epochs 150
run fcn-flip --model fcn --init xavier_uniform --augment flip --size 96 --epochs 150
run fcn-flip-cosine --model fcn --init xavier_uniform --augment flip --cosine --size 96 --epochs 150
run fcn-flip-cosine-weights --model fcn --init xavier_uniform --augment flip --cosine --class-weights --size 96 --epochs 150
run fcn-affine --model fcn --augment --size 64 --epochs 500
run fcn-affine-cosine --model fcn --augment --cosine --size 64 --epochs 500 --lr 2e-3
run fcn-affine-cosine-weights --model fcn --augment --cosine --class-weights enet --size 64 --epochs 500 --lr 2e-3
run fcn-defaults --model fcn --augment --cosine
run darrennet-paper --model darrennet --augment flip --cosine --class-weights --size 96 --epochs 150
run unet --model unet --augment --cosine --size 64 --epochs 200

# The defaults, and two more seeds of them.
run darrennet --model darrennet --augment --cosine
for seed in 1 2; do
    run darrennet-seed$seed --model darrennet --augment --cosine --seed $seed
done

# The network that was shipped until the fourth round of docs/experiments.md, in half precision.
run darrennet-longer --model darrennet --augment --cosine --epochs 1400
