#!/usr/bin/env bash
# mlperf-logging 4.1.68: the compliance checker, under its own rules for hpc 3.0.0, calls a log compliant whose run was
# aborted, whose run ended before its only evaluation, or whose clock runs backwards from one line to the next. It asks which
# keys are there, how often, and for some their value; status and the order of times are not looked at. A log without its
# run_stop is refused. Whoever reads "SUCCESS" as "the target was met in that time" reads too much.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mlperf-logging==4.1.68
cat >"$folder/log.py" <<'PY'
import json
import sys

how = sys.argv[1]
clock = [1_700_000_000_000]


def say(key, value=None, event="POINT_IN_TIME", **metadata):
    clock[0] += -10 if how == "backwards" else 10
    line = {"namespace": "", "time_ms": clock[0], "event_type": event, "key": key, "value": value}
    print(":::MLLOG " + json.dumps({**line, "metadata": {"file": "run.py", "lineno": 1, **metadata}}))


def begins(key, **metadata):
    say(key, None, "INTERVAL_START", **metadata)


def ends(key, **metadata):
    say(key, None, "INTERVAL_END", **metadata)


FACTS = {
    "submission_benchmark": "cosmoflow", "submission_org": "org", "submission_division": "open",
    "submission_status": "onprem", "submission_platform": "platform", "number_of_nodes": 1,
    "accelerators_per_node": 1, "cache_clear": True, "global_batch_size": 64, "train_samples": 524288,
    "eval_samples": 65536, "opt_name": "sgd", "opt_base_learning_rate": 0.1, "opt_learning_rate_warmup_epochs": 1,
    "opt_learning_rate_warmup_factor": 1, "opt_learning_rate_decay_boundary_epochs": [1],
    "opt_learning_rate_decay_factor": [0.5], "dropout": 0.5, "opt_weight_decay": 0.0, "seed": 1,
    "gradient_accumulation_steps": 1,
}
begins("init_start")
for key, value in FACTS.items():
    say(key, value)
ends("init_stop")
begins("run_start")
begins("epoch_start", epoch_num=1)
ends("epoch_stop", epoch_num=1)
if how == "stopped-first":
    ends("run_stop", status="success")
begins("eval_start", epoch_num=1)
say("eval_error", 0.1, epoch_num=1)
ends("eval_stop", epoch_num=1)
if how != "stopped-first":
    ends("run_stop", status="aborted" if how == "aborted" else "success")
PY
cd "$folder"
for how in as-it-should-be aborted stopped-first backwards missing; do
    venv/bin/python log.py "$how" >run.log
    [ "$how" != missing ] || sed -i '/run_stop/d' run.log
    outcome=refused
    venv/bin/python -W ignore -m mlperf_logging.compliance_checker --usage hpc --ruleset 3.0.0 --log_output said run.log >out 2>&1 && outcome=compliant
    echo "$how: $outcome"
    [ "$outcome" = "$([ "$how" = missing ] && echo refused || echo compliant)" ] || { tail -20 out; exit 1; }
done
# Seen:
# as-it-should-be: compliant
# aborted: compliant
# stopped-first: compliant
# backwards: compliant
# missing: refused
