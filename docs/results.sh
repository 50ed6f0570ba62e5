#!/bin/sh
# Trains and scores every row of the README's table that needs no download:
#     sh docs/results.sh DIR        DIR holds VOCdevkit/VOC2007
# On one core it takes about 12 hours. A run's scores go to runs/NAME/paper (the paper's protocol) and
# runs/NAME/own (the images' own resolution, void left out).
set -e
data=$1
run() {
    name=$1
    shift
    python train.py "$@" --data "$data" --out "runs/$name"
    python evaluate.py "runs/$name/best.pt" --data "$data" --void-as-background --out "runs/$name/paper"
    python evaluate.py "runs/$name/best.pt" --data "$data" --out "runs/$name/own"
}

run fcn --model fcn --init xavier_uniform --size 96 --epochs 150
run fcn-flip --model fcn --init xavier_uniform --augment flip --size 96 --epochs 150
run fcn-flip-cosine --model fcn --init xavier_uniform --augment flip --cosine --size 96 --epochs 150
run fcn-flip-cosine-weights --model fcn --init xavier_uniform --augment flip --cosine --class-weights --size 96 --epochs 150
run fcn-affine --model fcn --augment --size 64 --epochs 500
run fcn-affine-cosine --model fcn --augment --cosine --size 64 --epochs 500 --lr 2e-3
run fcn-affine-cosine-weights --model fcn --augment --cosine --class-weights --size 64 --epochs 500 --lr 2e-3
run darrennet-paper --model darrennet --augment flip --cosine --class-weights --size 96 --epochs 150
run unet --model unet --augment --cosine --size 64 --epochs 60

run darrennet-224 --model darrennet --augment --cosine --no-progressive

# The defaults, with two seeds.
run defaults --model darrennet --augment --cosine
run defaults-1 --model darrennet --augment --cosine --seed 1

# What is shipped, and two more seeds of its first two steps.
run darrennet --model darrennet --augment --cosine --size 64 --epochs 900 --lr 2e-3
run darrennet-2 --model darrennet --augment --cosine --size 128 --epochs 160 --encoder-weights runs/darrennet/best.pt
run darrennet-3 --model darrennet --augment --cosine --size 128 --epochs 200 --batch-size 8 --encoder-weights runs/darrennet-2/best.pt
for seed in 1 2; do
    run seed$seed --model darrennet --augment --cosine --size 64 --epochs 900 --lr 2e-3 --seed $seed
    run seed$seed-2 --model darrennet --augment --cosine --size 128 --epochs 160 --encoder-weights runs/seed$seed/best.pt --seed $seed
done
