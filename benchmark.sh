#!/usr/bin/env bash
# The benchmark: seeds x environments x methods, one training run each, in
# runs/ENVIRONMENT__METHOD__SEED.
#
#   SUITE=paper ./benchmark.sh --dry-run                print the commands
#   SUITE=paper WORKERS=2 ./benchmark.sh                run them, two at a time
#   SUITE=paper sbatch --array=0-265 benchmark.sh       SLURM: task N runs line N, the first is 0
#
# Finished runs are skipped and interrupted ones resumed, so the same command again does what is
# left. --help prints this. Variables:
#   SUITE     quick (default; minutes), mujoco, paper or procgen
#   SEEDS     "11 12 13", for rat, rat_shared, trpo and ppo also 14 and 15; quick: "1"
#   WORKERS   processes side by side, one thread each (1)
#   METHODS   some of the suite's methods: "rat npg"
#   ENVS      other environments than the suite's
#   EXTRA     arguments for every run: "--total-timesteps 10000000"
#   RUNS      folder of the run folders (runs)
#   PYTHON    interpreter (python)
#   VECTORIZATION   sync or envpool (envpool where installed, else sync); not for procgen
set -uo pipefail

declare -A script=(
  [rat]="rat_continuous.py"
  [rat_shared]="rat_shared.py"
  [npg]="npg_cg.py"
  [trpo]="npg_cg.py --line-search"
  [rank1]="npg_rank1.py"
  [acktr]="acktr.py"
  [acktr_shared]="acktr.py --shared"
  [ppo]="sophia_ppo.py"
  [sophia]="sophia_ppo.py --optimizer sophia"
  [diag]="sophia_ppo.py --optimizer diag"
)

fail() {
  echo "benchmark.sh: $*" >&2
  exit 2
}

if [[ $* == --help || $* == -h ]]; then
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0"
  exit
fi

# The suite, and what the variables change of it
suite=${SUITE:-quick}
known="rat rat_shared npg trpo rank1 acktr acktr_shared ppo sophia diag"
five=" rat rat_shared trpo ppo " # the methods with five seeds, the others have three
seeds="11 12 13 14 15"
steps=""
case $suite in
  quick)
    envs="InvertedPendulum-v5"
    seeds="1"
    steps="--total-timesteps 60000"
    ;;
  mujoco)
    envs="Hopper-v4 HalfCheetah-v4 Walker2d-v4 Humanoid-v4"
    ;;
  paper)
    envs="Swimmer-v4 Hopper-v4 HalfCheetah-v4 Walker2d-v4 Ant-v5 Humanoid-v4 HumanoidStandup-v4"
    ;;
  procgen) # the games with a published result to hold against; ENVS takes any of the 16
    envs="starpilot bossfight bigfish"
    known="rat ppo"
    seeds="11 12 13"
    script=([rat]="rat_procgen.py" [ppo]="rat_procgen.py --kaczmarz ppo")
    ;;
  *)
    fail "SUITE=$suite is unknown, take quick, mujoco, paper or procgen."
    ;;
esac
envs=${ENVS:-$envs}
methods=${METHODS:-$known}
seeds=${SEEDS:-$seeds}
workers=${WORKERS:-1}
runs=${RUNS:-runs}
python=${PYTHON:-python}
[[ $workers =~ ^[1-9][0-9]*$ ]] || fail "WORKERS=$workers must be a positive integer."
[[ $# == 0 || $* == --dry-run ]] ||
  fail "$* is not understood, the arguments are --dry-run and --help, all else is a variable."
for method in $methods; do
  [[ -v script[$method] ]] ||
    fail "METHODS: $method is unknown in SUITE=$suite, take some of: $known."
done

here=$(dirname "$0") # not for sbatch, which runs a copy elsewhere
[[ -f $here/rat_continuous.py ]] || here=${SLURM_SUBMIT_DIR:-.}
cd "$here" && [[ -f rat_continuous.py ]] ||
  fail "there is no rat_continuous.py in $here, submit from the checkout."
command -v "$python" >/dev/null ||
  fail "PYTHON=$python is not there, name an interpreter or activate its environment."
vectorization=""
if [[ $suite != procgen ]]; then
  has_envpool="import importlib.util as u, sys; sys.exit(u.find_spec('envpool') is None)"
  vectorization=${VECTORIZATION:-$("$python" -c "$has_envpool" && echo envpool || echo sync)}
  vectorization="--vectorization $vectorization"
fi

# The runs
names=()
commands=() # quoted for the shell
for seed in $seeds; do # outermost, so that a part of the set is balanced
  for env in $envs; do
    for method in $methods; do
      [[ -z ${SEEDS:-} && $seed -gt 13 && $five != *" $method "* ]] && continue
      name=${env//\//_}__${method}__$seed
      options="--env-id $env --seed $seed $steps $vectorization ${EXTRA:-}"
      read -ra words <<<"${script[$method]} $options"
      words=("$python" "${words[@]}" --output-dir "$runs" --run-name "$name")
      printf -v command '%q ' "${words[@]}"
      names+=("$name")
      commands+=("${command% }")
    done
  done
done
export OMP_NUM_THREADS=1
if [[ ${1:-} == --dry-run ]]; then
  printf 'OMP_NUM_THREADS=1 %s\n' "${commands[@]}"
  exit
fi
queue=("${!names[@]}")
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  last=$((${#names[@]} - 1))
  ((SLURM_ARRAY_TASK_ID <= last)) ||
    fail "array task $SLURM_ARRAY_TASK_ID: the last line is $last."
  queue=("$SLURM_ARRAY_TASK_ID")
fi
mkdir -p "$runs/log" || fail "RUNS=$runs cannot be written."

declare -A running=() # process id -> index of the run
finished=0
skipped=0
failed=()
stopped=""

settings() { # of command $1: script and options, but for the number of steps and the folder
  sed -E 's/^.* ([^ ]+\.py )/\1/; s/ --total-timesteps [0-9]+//g; s/ --output-dir .*//' <<<"$1"
}

start() { # start run $1 in the background, unless there is nothing to do
  local name=${names[$1]} words before resumed=""
  local folder=$runs/$name log=$runs/log/$name.log
  eval "words=(${commands[$1]})"
  if [[ -f $folder/finished ]]; then
    before=$(<"$folder/finished")
    if [[ $before == "${commands[$1]}" ]]; then
      skipped=$((skipped + 1))
      return
    fi
    if [[ $(settings "$before") != "$(settings "${commands[$1]}")" ]]; then
      failed+=("$name: $folder is of another command, take another RUNS: $before")
      echo "FAILED: ${failed[-1]}"
      return
    fi
  fi
  exec 9>>"$log"
  # The log is locked while a run's output holds it, 9 is flock's answer to that
  if command -v flock >/dev/null && { flock -n -E 9 9; (($? == 9)); }; then
    echo "busy: $name runs in another process"
    skipped=$((skipped + 1))
    return
  fi
  if [[ -f $folder/checkpoint.pt ]]; then
    words+=(--resume)
    resumed=", resumed"
  elif [[ -d $folder && ! -s $folder/progress.csv && ! -f $folder/finished ]]; then
    rm -f "$folder"/{config.json,progress.csv,checkpoint.*,events.*} # killed at its very start
    rmdir "$folder"
  fi
  echo "${commands[$1]}${resumed:+ --resume}" >&9
  "${words[@]}" </dev/null >&9 2>&1 9>&- &
  running[$!]=$1
  exec 9>&-
  echo "started: $name ($((queued + 1)) of ${#queue[@]}$resumed)"
}

outcome() { # the last line of log $1, or the sentence where tyro has drawn a box around it
  awk '
    /^╭/ { text = ""; box = "message"; next }
    /^╰/ { box = ""; next }
    /^│ ──/ { box = "help"; next }
    box == "message" { gsub(/^│ *| *│$/, ""); text = text (text == "" ? "" : " ") $0 }
    box == "" && NF { text = $0 }
    END { print text }
  ' "$1"
}

reap() { # count the run of process $1, which has ended
  local status=0 name=${names[${running[$1]}]} log text
  wait "$1" || status=$?
  log=$runs/log/$name.log
  text=$(outcome "$log")
  if [[ $status == 0 ]]; then
    finished=$((finished + 1))
    echo "${commands[${running[$1]}]}" >"$runs/$name/finished"
    echo "finished: $name: $text"
  elif [[ -n $stopped ]]; then
    echo "stopped: $name"
  else
    failed+=("$name: exit code $status, $log: $text")
    echo "FAILED: ${failed[-1]}"
  fi
  unset "running[$1]"
}

stop() { # no new runs; those that run end at their last checkpoint
  stopped=$1
  echo "stopping ${#running[@]} runs, the same command resumes them" >&2
  ((${#running[@]})) && kill -TERM "${!running[@]}" 2>/dev/null
}
trap 'stop 130' INT
trap 'stop 143' TERM

queued=0
while ((${#running[@]})) || { [[ -z $stopped ]] && ((queued < ${#queue[@]})); }; do
  while [[ -z $stopped ]] && ((queued < ${#queue[@]} && ${#running[@]} < workers)); do
    start "${queue[queued]}"
    queued=$((queued + 1))
  done
  sleep 0.5
  for pid in "${!running[@]}"; do
    kill -0 "$pid" 2>/dev/null || reap "$pid"
  done
done

echo "$finished finished, $skipped skipped, ${#failed[@]} failed, of ${#queue[@]} runs"
((${#failed[@]})) && printf 'FAILED: %s\n' "${failed[@]}" >&2
[[ -z $stopped ]] || exit "$stopped"
((${#failed[@]} == 0))
