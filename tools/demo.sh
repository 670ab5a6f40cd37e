#!/bin/sh
# The main job from end to end on a synthetic set, into the folder given: about three minutes on two CPU cores.
set -eu
folder=$1
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"
unset ALEXNET_SHARDS ALEXNET_RUNS

alexnet-prep synth images --classes 10 --train 1000 --val 200
alexnet-prep shard images --samples-per-shard 125
alexnet-prep pca
alexnet-train --recipe demo --gpus 0
echo
alexnet-eval demo --gpus 0
alexnet-bench loader --recipe demo --gpus 0 --seconds 6
alexnet-report demo
