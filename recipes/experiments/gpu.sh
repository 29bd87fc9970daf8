#!/usr/bin/env bash
# The runs that docs/results.md reports of a GPU: vision transformers trained, pruned and recovered there, BERT-base's shape
# measured there, and the gate tried on its processors meanwhile.
#
#   recipes/experiments/gpu.sh fashion fashion_mnist.npz OUT          # ViT-S from scratch
#   recipes/experiments/gpu.sh cifar cifar10.npz OUT encoders/dinov2-small
#   recipes/experiments/gpu.sh bert encoders/bert-base-random OUT
#   recipes/experiments/gpu.sh gate OUT STREAMS SECONDS
set -euo pipefail
what=$1
recipes="$(cd "$(dirname "$0")" && pwd)"
cli=(python3 -m deploy_prune)
log() { echo "[$(date +%T)] $*"; }

same() { # NAME TASK DATA OUT: what every experiment on a model is given
  echo --model "models/$1" --task "$2" --data "$3" --device "${DEVICE:-cuda}" --out "$4"
}

vit() { # NAME TASK DATA OUT [KEEPS]: a seed of `vit` each in a process of its own
  local name=$1 out=$4 seed
  for seed in 0 1 2; do
    # shellcheck disable=SC2046
    OMP_NUM_THREADS=3 "${cli[@]}" experiment vit $(same "$@") --keep "${5:-}" --seeds "$seed" --stem "$name-vit-$seed" \
      > "$out/$name-vit-$seed.log" 2>&1 &
  done
}

recover() { # NAME TASK DATA OUT EPOCHS LRS AUGMENTS: every way of recovery at 0.7 tried, a seed after the other
  local name=$1 out=$4 seed
  for seed in 0 1 2; do
    # shellcheck disable=SC2046
    OMP_NUM_THREADS=4 "${cli[@]}" experiment recover $(same "$@") --seeds "$seed" --recover-epochs "$5" --recover-batch 64 \
      --recover-lr "$6" --recover-augment "$7" --stem "$name-recover-$seed" > "$out/$name-recover-$seed.log" 2>&1 ||
      log "recovery failed"
    log "recovered with seed $seed"
  done
}

merge() { # NAME OUT: the seeds of each experiment in one document
  python3 "$recipes/merge.py" "$2/$1" "$2/$1"-vit-[0-9].json || log "no vit"
  python3 "$recipes/merge.py" "$2/$1-recover" "$2/$1"-recover-[0-9].json || log "no recovery"
}

case $what in
  fashion)
    data=$2 out=$3
    log "train"
    python3 "$recipes/vision.py" train "$data" models/vit-s-fashion --task fashion_mnist --epochs "${EPOCHS:-16}" --batch 512
    log "experiments"
    vit vit-s-fashion fashion_mnist "$data" "$out"
    recover vit-s-fashion fashion_mnist "$data" "$out" 4 1e-5 none
    wait
    merge vit-s-fashion "$out"
    ;;
  cifar)
    data=$2 out=$3
    log "train"
    python3 "$recipes/vision.py" train "$data" models/dinov2-s-cifar --task cifar10 --encoder "$4" --image 112 \
      --epochs "${EPOCHS:-20}" --batch 128 --lr 1e-4
    log "experiments"
    vit dinov2-s-cifar cifar10 "$data" "$out" 0.8,0.7,0.6,0.5
    recover dinov2-s-cifar cifar10 "$data" "$out" 20 1e-5,3e-5,1e-4 none,flip
    wait
    merge dinov2-s-cifar "$out"
    ;;
  bert)
    log "make"
    [ -d shapes/bert-base-gpu ] || python3 "$recipes/shapes.py" make "$2" shapes/bert-base-gpu --formats onnx --precisions fp32
    log "measure"
    measure=("$recipes/shapes.py" measure shapes/bert-base-gpu "$3/bert-base-gpu.jsonl" --seconds 3)
    runtimes=torch-cuda
    for pair in CUDA:ort-cuda Tensorrt:ort-tensorrt; do # those whose wheels and libraries are there
      python3 -c "import onnxruntime as o; o.preload_dlls(); assert '${pair%%:*}ExecutionProvider' in o.get_available_providers()" \
        2> /dev/null && runtimes+=,${pair##*:} || log "without ${pair##*:}"
    done
    python3 "${measure[@]}" --runtimes "$runtimes" --batches 1,8,32 --seqs 128 --precisions fp32,fp16
    python3 "${measure[@]}" --runtimes "$runtimes" --batches 32 --seqs 384 --precisions fp32,fp16
    # Every model is compiled anew in its own process: few cells, of the models that answer the question.
    for runtime in torch-compile-cuda torch-graphs-cuda; do
      python3 "${measure[@]}" --runtimes $runtime --batches 1,32 --seqs 128 --precisions fp32,fp16 --models dense,0.5
    done
    python3 "$recipes/shapes.py" keep "$3/bert-base-gpu.jsonl" "$3/bert-base-gpu.json"
    ;;
  gate)
    out=$2
    python3 "$recipes/gate_trials.py" model gate-base.onnx
    python3 "$recipes/gate_trials.py" copies gate-base.onnx gate --inner 0,2000,2400,2800,8000,16000
    for stream in $(seq "$3"); do
      timeout "$4" python3 "$recipes/gate_trials.py" trials gate "$out/gate-$stream.jsonl" --count 1000 --seconds 60 \
        > "$out/gate-$stream.log" 2>&1 &
    done
    wait || true
    ;;
esac
log "done"
