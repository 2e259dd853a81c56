"""Run a command on a Cloud TPU VM, from requesting the machine to deleting it.

    python -m launch.tpu_vm --name=rex --type=v5litepod-16 --zone=us-west4-a --spot --copy=photos -- \
        python -m personalize_jax.personalize --config=configs/stable_diffusion.py:2.1 --images=photos \
        --class_noun=dog --workdir=gs://BUCKET/rex --multihost

The machine is a queued resource. Once it is there, the code and its environment are installed on it, and every worker
runs the command detached from the connection, so that it survives a dropped connection. If the machine is preempted,
or the command stops itself (exit status 75) or leaves its run unfinished, everything is repeated, and the run resumes
from its checkpoints.

If HF_TOKEN is set here, for models that need a licence, it is copied to the workers as the file of a login, and never
appears on a command line.

The machine is deleted at the end, whether the program is done, failed, or could not be run. It is kept with --keep, and
when this command is interrupted (Ctrl-C) or fails itself: it then tells how to watch the run again, which is the same
command, and how to delete the machine.
"""

import os
import re
import shutil
import signal
import sys
from pathlib import Path

from absl import flags

from launch import payload, worker
from launch.gcloud import RUNTIME_VERSIONS, WORKER_SIZE, Machine
from launch.lifecycle import Launch
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError

_NAME = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"
_ZONE = r"[a-z]+-[a-z]+[0-9]+-[a-z]"
_TYPE = r"v[0-9a-z]+-[0-9]+"
_PROJECT = r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]"
_VERSION = r"[a-z0-9][-.a-z0-9]*"


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("name", None, "Name of the machine: lower-case letters, digits and dashes.")
    flags.DEFINE_string("type", None, "Accelerator type, such as v5litepod-16, v6e-8, v4-32.")
    flags.DEFINE_string("zone", None, "Zone, such as us-west4-a.")
    flags.DEFINE_string("project", None, "Google Cloud project; by default gcloud's.")
    flags.DEFINE_string("version", None, "Image of the machine; by default Google's for the type and JAX.")
    flags.DEFINE_bool("spot", False, "Whether the machine may be preempted, and costs less.")
    flags.DEFINE_multi_string("copy", [], "A file or folder that git ignores, to be copied, too; may be repeated.")
    flags.DEFINE_bool("keep", False, "Do not delete the machine at the end.")
    flags.DEFINE_integer("max_restarts", 20, "How often to restart the program after preemptions.", lower_bound=0)
    flags.DEFINE_float("poll", 10.0, "Seconds between two polls of the machine.", lower_bound=0.0)
    flags.DEFINE_string("logs", "runs/tpu_vm", "Folder of a folder of logs with the machine's name.")
    flags.DEFINE_bool("dry_run", False, "Print every command of a run without failures, and run none.")


def main(argv: list[str]) -> None:
    """The command; exits with the status of the program that it ran."""
    arguments = flags.FLAGS
    launch = prepare(arguments, argv[1:])
    for end in (signal.SIGTERM, signal.SIGHUP):  # handled like Ctrl-C, to tell the user that the machine still runs
        if signal.getsignal(end) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(end, signal.default_int_handler)
    sys.exit(launch.run(arguments.max_restarts, arguments.keep))


def prepare(arguments: flags.FlagValues, command_line: list[str]) -> Launch:
    """Check everything that can be checked before anything costs, and pack the code.

    Args:
        arguments: values of this command's flags.
        command_line: the command to run.

    Raises:
        UserError: the command could not run, or its results would be lost.
    """
    machine = requested_machine(arguments)
    program = payload.read_command(command_line)
    if program.local_outputs and not arguments.keep:
        raise UserError(
            f"{program.local_outputs[0]} would be on the machine's own disk and be deleted with it; write to a bucket, "
            "such as --workdir=gs://BUCKET/rex, or --keep the machine."
        )
    if program.local_outputs and machine.spot:
        print(f"{program.local_outputs[0]} is on the machine's own disk: a preemption loses it.", file=sys.stderr)
    files = payload.project_files(arguments.copy)
    payload.check_inputs(program, files)
    check_workers(program, machine.accelerator_type)
    token = os.environ.get("HF_TOKEN", "")
    if program.is_gated and not token:
        raise UserError(
            "DeepFloyd IF asks for its licence: accept it on the Hugging Face hub, and set HF_TOKEN here to an access "
            "token, which is brought to the machine; or give a bucket's folder by --config.pretrained."
        )
    for name in program.hub_names:
        print(f"{name} is no folder here; it is taken for a name on the Hugging Face hub.", file=sys.stderr)
    if not machine.dry_run and shutil.which("gcloud") is None:
        raise UserError("gcloud was not found; install it from https://cloud.google.com/sdk/docs/install.")
    folder = Path(arguments.logs) / machine.name
    payload.pack(files, archive := folder / worker.ARCHIVE)
    return Launch(machine, program, archive, folder, arguments.poll, token)


def check_workers(program: payload.Program, accelerator_type: str) -> None:
    """Check that a command of the project runs as one program on several workers.

    Raises:
        UserError: each worker would run on its own.
    """
    if program.module is None or int(accelerator_type.rpartition("-")[2]) <= WORKER_SIZE:
        return
    if not program.takes_multihost:
        generation = accelerator_type.partition("-")[0]
        raise UserError(
            f"{program.module} runs on one worker, and a {accelerator_type} has several; give --type={generation}-"
            f"{WORKER_SIZE} or smaller."
        )
    if not {"--multihost", "--multihost=true", "--multihost=True", "--multihost=1"} & set(program.command):
        raise UserError(f"A {accelerator_type} has several workers; add --multihost to the command after --.")


def requested_machine(arguments: flags.FlagValues) -> Machine:
    """The machine that the flags describe.

    Raises:
        UserError: a flag is invalid.
    """
    for flag, pattern, example in (
        ("name", _NAME, "rex-1, at most 63 lower-case letters, digits and dashes"),
        ("type", _TYPE, "v5litepod-16"),
        ("zone", _ZONE, "us-west4-a"),
        ("project", _PROJECT, "my-project-1"),
        ("version", _VERSION, "v2-alpha-tpuv5-lite"),
    ):
        value = getattr(arguments, flag)
        if value is not None and not re.fullmatch(pattern, value):
            raise UserError(f"--{flag}={value!r} cannot be; give such as {example}.")
    generation = arguments.type.partition("-")[0]
    if not arguments.version and generation not in RUNTIME_VERSIONS:
        raise UserError(
            f"--type={arguments.type} is of no generation known here ({', '.join(RUNTIME_VERSIONS)}); "
            "give its runtime version by --version."
        )
    return Machine(
        arguments.name,
        arguments.type,
        arguments.zone,
        arguments.project,
        arguments.version or RUNTIME_VERSIONS[generation],
        arguments.spot,
        arguments.dry_run,
    )


if __name__ == "__main__":
    command.run(main, define_flags, required=("name", "type", "zone"), takes_words=True)
