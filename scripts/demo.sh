#!/usr/bin/env bash
# From a bare machine to a trained language model: data, training on a mesh, another mesh, evaluation.
#
#   bash scripts/demo.sh [--keep]
#
# Eight fake CPU devices show the mechanics of sharding, not its speed. The run lies in runs/demo and
# starts afresh each time; --keep continues the one that is there.
#
# JAXSCALE_DEMO_STEPS         steps on the first mesh (default: 80)
# JAXSCALE_DEMO_RESUME_STEPS  further steps on the second mesh (default: 40)
# JAXSCALE_DEMO_WORKDIR       another, new folder for the run
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$ROOT"

STEPS="${JAXSCALE_DEMO_STEPS:-80}"
TOTAL=$((STEPS + ${JAXSCALE_DEMO_RESUME_STEPS:-40}))
WORKDIR="${JAXSCALE_DEMO_WORKDIR:-runs/demo}"
CONFIG=configs/lm.py:tiny

heading() {
  printf '\n== %s\n' "$1"
}

# Everything that depends on the number of steps, so that a few steps make a demo as well.
SCHEDULE=(
  --config.optimizer.schedule_steps="$TOTAL"
  --config.optimizer.warmup_steps="$((TOTAL / 10))"
  --config.train.log_every="$((STEPS > 16 ? STEPS / 16 : 1))"
  --config.train.eval_every=0
  --config.train.sample_every="$STEPS"
)

# Show a command as its user would type it, and run it.
run() {
  local word shown=""
  for word in "$@"; do
    [[ "$word" == *" "* ]] && word="'$word'"
    shown+=" $word"
  done
  echo "\$ jaxscale$shown"
  "$VENV_PYTHON" -m jaxscale "$@"
}

train() {
  run train --config "$CONFIG" --workdir "$WORKDIR" --devices=cpu:8 "$@" "${SCHEDULE[@]}"
}

# Print the summary from the files of the run.
summarize() {
  "$VENV_PYTHON" - "$WORKDIR" <<'PYTHON'
import pathlib, sys
from jaxscale import records

workdir = pathlib.Path(sys.argv[1])
lines = records.read_lines(workdir / records.METRICS_FILE)
steps = [line for line in lines if line[records.KIND] == records.KIND_TRAIN]
score = records.read_json(workdir / "evaluate.json")["rows"][0]
first, last = steps[0], steps[-1]
print(f"loss           {first[records.LOSS]:.3f} at step {first[records.STEP]}, "
      f"{last[records.LOSS]:.3f} at step {last[records.STEP]}")
print(f"bits per byte  {score[records.BITS_PER_BYTE]:.3f} model, "
      f"{score[records.BIGRAM_BITS_PER_BYTE]:.3f} bigram, "
      f"{score[records.UNIGRAM_BITS_PER_BYTE]:.3f} unigram, on the same held-out documents")
PYTHON
}

if [[ "${1:-}" != --keep && -z "${JAXSCALE_DEMO_WORKDIR:-}" ]]; then
  rm -rf "$ROOT/runs/demo"
fi

heading "Set-up"
setup_venv
SECONDS=0

heading "Data: the standard library's own source, tokenized once"
run prepare --config "$CONFIG"

heading "Training on 8 fake devices: data=2, fsdp=2, tensor=2"
train --config.mesh.data=2 --config.mesh.fsdp=2 --config.mesh.tensor=2 \
  --config.train.steps="$STEPS"

heading "The same run, resumed on another mesh: sequence=2, tensor=4"
train --config.mesh.data=1 --config.mesh.sequence=2 --config.mesh.tensor=4 \
  --config.train.steps="$TOTAL"

heading "Evaluation on held-out documents"
run evaluate --workdir "$WORKDIR" --batches=64 --baselines --json "$WORKDIR/evaluate.json"

heading "A sample"
run generate --workdir "$WORKDIR" --prompt "def "

heading "Summary, after $((SECONDS / 60)) min $((SECONDS % 60)) s"
summarize
cat <<END
look next      $WORKDIR/metrics.jsonl has every figure; configs/lm.py has larger models;
               jaxscale doctor says what this machine can do; README.md leads on
END
