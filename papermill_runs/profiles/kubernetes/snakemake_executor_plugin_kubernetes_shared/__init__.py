"""Snakemake's executor for Kubernetes, for jobs that share a volume with whoever starts them.

By itself it assumes that nothing is shared, and would copy each declared file to a store and back;
a study hands over whole folders, which are on the volume already.
"""

import os
import shlex
from dataclasses import replace

import snakemake_executor_plugin_kubernetes as plain
from kubernetes.client import V1EmptyDirVolumeSource, V1Volume, V1VolumeMount
from snakemake_executor_plugin_kubernetes import ExecutorSettings  # noqa: F401  (Snakemake asks)

common_settings = replace(
    plain.common_settings,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    auto_deploy_default_storage_provider=False,
)


def give_shared_memory(job):
    "Room for processes that talk to each other: a container has 64 MB, too little for several cards."
    pod = job.spec.template.spec
    memory = V1EmptyDirVolumeSource(medium="Memory")
    pod.volumes.append(V1Volume(name="shared-memory", empty_dir=memory))
    mount = V1VolumeMount(name="shared-memory", mount_path="/dev/shm")
    pod.containers[0].volume_mounts.append(mount)


class Executor(plain.Executor):
    "Jobs begin in this folder."

    def __post_init__(self):
        super().__post_init__()
        submit = self.batchapi.create_namespaced_job

        def submit_with_memory(namespace, job):
            give_shared_memory(job)
            return submit(namespace, job)

        self.batchapi.create_namespaced_job = submit_with_memory

    def get_job_exec_prefix(self, job):
        return f"cd {shlex.quote(os.getcwd())}"
