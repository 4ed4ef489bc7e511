"""Beyond one machine, as far as one machine goes.

Agents that meet on loopback; Debian's Slurm with one or two nodes here; Kubernetes played by a
server that holds every job against the schema and runs its command. What needs Slurm or the extra
`cluster` is skipped where these are not installed.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from conftest import ROOT
from test_sft import metrics, params, prompts  # noqa: F401  (a fixture)

from recnb import studies
from recnb.launch import torchrun
from recnb.stages import BadInput
from recnb.studies import check_profile, find_profile

PROFILES = ROOT / "papermill_runs/profiles"
RECIPE = """
task: poi
title: a test
cities:
  alpha:
    checkins: {dataset: made, num_users: 12, num_pois: 30, num_days: 30, seed: 1}
    profiles: {provider: statistics}
"""
TRAINED = """
common:
  model: {model_checkpoint: tiny-llama}
  sft:
    {num_epochs: 100, max_steps: 150, save_steps: 5, batch_size: 2, max_length: 2048,
     warmup_steps: 1}
runs: {one: {city: alpha, prompts: {profile: text}}}
"""


# More machines than one


def find_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def warm(copies, monkeypatch):
    "Processes begin as copies of one that has imported everything."
    for name, value in {**copies.forks, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)


def train(out, prompts, **launch):
    lines, others = [], []

    def show(line):
        lines.append(line)
        if found := re.match("waiting for the other machines; on each, in (.*): (.*)", line):
            others.append(subprocess.Popen(shlex.split(found[2]), cwd=found[1]))

    p = params(prompts, out, max_steps=2)
    made = torchrun("recnb.poi.sft", p, show=show, **launch)
    assert not any(other.wait(60) for other in others)
    return made, lines, len(others)


def test_machines_meet_by_the_command_that_is_printed(prompts, tmp_path, warm):
    endpoint = f"127.0.0.1:{find_port()}"
    two, lines, others = train(tmp_path / "two", prompts, nnodes=2, rdzv_endpoint=endpoint)
    one, _, none = train(tmp_path / "one", prompts, nproc_per_node=2)
    assert (others, none) == (1, 0) and two.manifest["processes"] == 2
    assert metrics(two.path) == metrics(one.path)
    assert any("steps" in line for line in lines)  # whichever of them is here is shown


SRUN = """#!/bin/sh
while case $1 in -*) ;; *) false;; esac; do shift; done
"$@" & "$@" && wait $!
"""


def test_in_a_job_of_slurm_an_agent_starts_on_each_machine(prompts, tmp_path, monkeypatch, warm):
    "A stand-in for srun starts them here; the real one is tried below."
    with pytest.raises(BadInput, match="rdzv_endpoint"):
        torchrun("recnb.poi.sft", {}, nnodes=2)
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(find_port()))
    monkeypatch.setattr(socket, "gethostname", lambda: "127.0.0.1")
    made, lines, others = train(tmp_path / "two", prompts, nnodes=2)
    assert made.manifest["processes"] == 2 and not others
    assert not any(line.startswith("waiting") for line in lines)


# Profiles


@pytest.mark.parametrize("name", ["slurm", "kubernetes"])
def test_a_profile_without_its_plugin_is_refused(name, tmp_path):
    if find_spec(f"snakemake_executor_plugin_{name}") is None:
        with pytest.raises(BadInput, match="an executor that is installed"):
            check_profile(PROFILES / name)
    else:
        check_profile(PROFILES / name)
    with pytest.raises(BadInput, match=f"a profile; did you mean '?{name}"):
        find_profile(name + "s")


def write_profile(folder, name, **changed):
    "A profile of this repository for a test: no waiting, and what the test's cluster is called."
    made = folder / "profile"
    shutil.copytree(PROFILES / name, made, ignore=shutil.ignore_patterns("__pycache__"))
    said = yaml.safe_load((made / "config.yaml").read_text())
    quick = {"latency-wait": 5, "seconds-between-status-checks": 1, "cores": 1, "jobs": 4}
    (made / "config.yaml").write_text(yaml.safe_dump(said | quick | changed))
    return made


def start_study(folder, recipe, profile, *more, **environment):
    (folder / "r.yaml").write_text(recipe)
    out = ["--out", str(folder / "out"), "--cluster", str(profile)]
    return subprocess.Popen(
        [sys.executable, "-m", "recnb.studies", "--recipe", str(folder / "r.yaml"), *out, *more],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as from a terminal
    )


WATCHER = """
import sys, time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    open(sys.argv[1], "w").close()
"""


@pytest.fixture
def deaf():
    "As in a process that a shell began in the background."
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_watches_over_jobs_is_interrupted_when_a_study_ends(tmp_path, monkeypatch, deaf):
    "Snakemake cancels its jobs when it is interrupted, and only then."

    def stop(line, journal):
        raise KeyboardInterrupt

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(studies, "_pass_on_jobs", stop)
    command = [sys.executable, "-c", WATCHER, str(tmp_path / "cancelled")]
    with open(tmp_path / "log", "w") as log, pytest.raises(KeyboardInterrupt):
        studies._run_snakemake(command, log, None, "slurm")
    assert (tmp_path / "cancelled").exists()


# Kubernetes


def has(module):
    return find_spec(module) is not None


class Kubernetes(ThreadingHTTPServer):
    "As much of the interface as the plugin asks; what it is given must fit the schema."

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.jobs, self.commands, self.refused, self.secrets = {}, {}, [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def accept(self, made):
        "Hold an object against its schema, and run the command of a job."
        import kubernetes_validate

        try:
            kubernetes_validate.validate(made, "1.31", strict=True)
        except Exception as e:
            self.refused.append(str(e))
            return 422
        if made["kind"] == "Job":
            name = made["metadata"]["name"]
            container = made["spec"]["template"]["spec"]["containers"][0]
            command = [*container["command"], *container["args"]]
            self.jobs[name] = made
            self.commands[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        return 201

    def tell(self, name):
        "A job with its status."
        code = self.commands[name].poll()
        status = {} if code is None else {"failed" if code else "succeeded": 1}
        return self.jobs[name] | {"status": status}


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, code, body):
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def read(self):
        return json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")

    def do_POST(self):
        made, kinds = self.read(), dict(jobs="Job", secrets="Secret")
        kind = kinds[urlsplit(self.path).path.split("/")[-1]]
        made |= dict(kind=kind, apiVersion="batch/v1" if kind == "Job" else "v1")
        self.answer(self.server.accept(made), made)

    def do_GET(self):
        url = urlsplit(self.path)
        if url.path.endswith("/pods"):
            assert parse_qs(url.query)["labelSelector"]
            return self.answer(200, dict(kind="PodList", apiVersion="v1", items=[], metadata={}))
        self.answer(200, self.server.tell(url.path.split("/")[-2]))

    def do_DELETE(self):
        self.read()
        self.answer(200, dict(kind="Status", apiVersion="v1", status="Success"))


@pytest.fixture
def cluster(tmp_path):
    server = Kubernetes()
    host = f"http://127.0.0.1:{server.server_port}"
    named = dict(name="here", cluster=dict(server=host))
    context = dict(name="here", context=dict(cluster="here", user="me"))
    told = dict(apiVersion="v1", kind="Config", clusters=[named], contexts=[context])
    told |= {"users": [dict(name="me", user={})], "current-context": "here"}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(told))
    yield server
    server.shutdown()
    for command in server.commands.values():
        command.kill()


@pytest.mark.skipif(not has("kubernetes") or not has("kubernetes_validate"), reason="extra cluster")
def test_jobs_of_kubernetes_fit_its_schema_and_do_the_work(tmp_path, cluster):
    "With a card in the budget, so that a card is asked for where a model would be."
    profile = write_profile(tmp_path, "kubernetes")
    baseline = "baselines: {sthgcn: {city: alpha, sthgcn: {num_epochs: 1, max_steps: 2}}}"
    more = ["--card", "A100 80GB"]
    kube = dict(KUBECONFIG=str(tmp_path / "kubeconfig"))
    study = start_study(tmp_path, f"{RECIPE}{baseline}", profile, *more, **kube)
    said = study.communicate(timeout=300)[0]
    assert study.returncode == 0 and not cluster.refused, (said, cluster.refused)
    assert "data_poi: done in" in said and (tmp_path / "out/table.txt").exists()
    asked = []
    for job in cluster.jobs.values():
        pod = job["spec"]["template"]["spec"]
        assert pod["containers"][0]["image"] == "python:3.11"
        mounted = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounted["recnb"] == "/shared" and mounted["shared-memory"] == "/dev/shm"
        asked.append(pod["containers"][0]["resources"]["requests"])
    assert [x.get("nvidia.com/gpu") for x in asked] == [None, "1", None]
    assert all(x["memory"] and x["cpu"] for x in asked)


# Slurm

SLURM = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=300
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=64000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=64000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CONFIG = Path("/etc/slurm/slurm.conf")  # where a step of a job looks, whatever its environment says
WANTED = ("munged", "slurmctld", "slurmd", "srun", "sbatch")


def find_missing():
    "Why Slurm cannot be started here; nothing where it can."
    os.environ["PATH"] += ":/usr/sbin"
    if missing := [name for name in WANTED if not shutil.which(name)]:
        return f"needs Debian's slurm-wlm and munge: no {missing[0]}"
    if not has("snakemake_executor_plugin_slurm"):
        return "needs the extra cluster"
    return "" if os.getuid() == 0 and not CONFIG.exists() else "needs root and no other Slurm"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    "Two nodes of Slurm, both on this machine."
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    said = SLURM.format(
        folder=folder, host=socket.gethostname(), ports=[find_port() for _ in range(3)]
    )
    (folder / "slurm.conf").write_text(said)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.symlink_to(folder / "slurm.conf")
    own = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file")]
    own += [f"--{name}={folder}/munge.{name}" for name in ("log-file", "seed-file")]
    commands = [["munged", "--foreground", "--force", f"--key-file={folder}/key", *own]]
    commands += [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    running = []
    try:
        for command in commands:
            log = open(folder / f"{command[0]}{len(running)}.log", "w")
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
            time.sleep(0.5)
        ready = ["sinfo", "--noheader", "--format=%t %D"]
        for _ in range(100):
            told = subprocess.run(ready, capture_output=True, text=True).stdout.split()
            if told == ["idle", "2"]:
                break
            time.sleep(0.2)
        assert told == ["idle", "2"], [p.read_text()[-2000:] for p in folder.glob("*.log")]
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], timeout=20)  # of a test that failed on the way
        for process in reversed(running):
            process.terminate()
            process.wait(20)
        CONFIG.unlink()


def start_slurm_study(tmp_path, nodes=1):
    "A study whose training is a job of Slurm."
    logs = {"slurm-logdir": str(tmp_path / "logs"), "slurm-keep-successful-logs": True}
    alone = {"slurm-no-account": True, "slurm-status-command": "squeue"}
    first = {"slurm-init-seconds-before-status-checks": 1}
    profile = write_profile(tmp_path, "slurm", **logs, **alone, **first)
    launch = f"nnodes: {nodes}, nproc_per_node: 1" if nodes > 1 else ""
    recipe = f"{RECIPE}{TRAINED}".replace("common:", f"common:\n  launch: {{sft: {{{launch}}}}}")
    return start_study(tmp_path, recipe, profile)


def wait_until(study, holds, seconds=300):
    "Whether something holds before a study ends."
    end = time.monotonic() + seconds
    while study.poll() is None and not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return study.poll() is None and holds()


def list_jobs(*states):
    "The jobs of Slurm: id and number of nodes of each."
    asked = ["squeue", "--noheader", "--format=%i %D", *(f"--states={s}" for s in states)]
    return subprocess.run(asked, capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(bool(find_missing()), reason=find_missing())
def test_a_study_that_is_stopped_cancels_its_jobs(tmp_path, slurm):
    "With Ctrl-C. None is left, and none trains on."
    study, out = start_slurm_study(tmp_path), tmp_path / "out"
    kept = out / "runs/one/sft.partial"
    if not wait_until(study, lambda: list(kept.glob("checkpoints/*-*")) and list_jobs("running")):
        raise AssertionError(study.communicate()[0])
    study.send_signal(signal.SIGINT)
    said = study.communicate(timeout=150)[0]
    assert study.returncode == 130 and "the same command goes on" in said, said
    for _ in range(100):
        if not list_jobs("running", "pending", "completing"):
            break
        time.sleep(0.2)
    assert not list_jobs("running", "pending", "completing")
    steps = (kept / "metrics.jsonl").read_text().splitlines()
    time.sleep(2)
    assert 5 <= len(steps) == len((kept / "metrics.jsonl").read_text().splitlines()) < 150


@pytest.mark.skipif(bool(find_missing()), reason=find_missing())
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_killed_job_of_slurm_is_begun_again_and_goes_on(tmp_path, slurm, nodes):
    "A recipe through the plugin; its training, on one machine or on two, is killed on the way."
    study, out = start_slurm_study(tmp_path, nodes), tmp_path / "out"
    kept = out / "runs/one/sft.partial/checkpoints"
    begun = wait_until(study, lambda: list(kept.glob("*-*")))
    told = list_jobs("running")
    assert begun and told[1:] == [str(nodes)], (told, study.communicate()[0])
    steps = (out / "runs/one/sft.partial/metrics.jsonl").read_text().splitlines()[:5]
    subprocess.run(["scancel", told[0]], check=True)
    said = study.communicate(timeout=400)[0]
    assert study.returncode == 0 and (out / "table.txt").exists(), said
    assert "train_poi: done in" in said and said.count("has been submitted") == 5
    whole = (out / "runs/one/sft/metrics.jsonl").read_text().splitlines()
    assert whole[:5] == steps and len(whole) == 150  # to the time that each took: gone on from
    made = json.loads((out / "runs/one/sft/manifest.json").read_text())
    assert made["processes"] == nodes
