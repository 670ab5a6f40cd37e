#!/bin/sh
# The main job from end to end on a synthetic set, in the folder given: about three minutes on two CPU cores. Goes on
# with what is there already, and deletes nothing.
set -eu
folder=$1
if [ -e "$folder" ]; then
    echo "$folder is there: the demo goes on with what is in it, and deletes nothing (another: make demo DEMO=FOLDER)"
fi
mkdir -p "$folder"
cd "$folder"
unset ALEXNET_SHARDS ALEXNET_RUNS

if [ ! -d images/train ]; then
    alexnet-prep synth images --classes 10 --train 1000 --val 200
fi
if [ ! -e shards/manifest.json ]; then
    alexnet-prep shard images --samples-per-shard 125
fi
if [ ! -e shards/color.json ]; then
    alexnet-prep pca
fi
if [ ! -e runs/demo ]; then
    alexnet-train --recipe demo --gpus 0
elif [ -e runs/demo/checkpoints/last.pt ]; then
    command alexnet-train --resume demo --gpus 0
else
    command alexnet-train --recipe demo --gpus 0 --resume auto
fi
echo
alexnet-eval demo --gpus 0
alexnet-bench loader --recipe demo --gpus 0 --seconds 6
alexnet-report demo
echo
echo "done: open $folder/runs/demo/report.html"
