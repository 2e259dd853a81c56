"""A computer whose gcloud is the stub, and a small project on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from launch import payload
from launch.gcloud import Machine
from launch.lifecycle import Launch

STUB = Path(__file__).with_name("stub_gcloud.py")
COMMANDS = {
    "sudo": 'exec "$@"',
    "gcsfuse": 'mkdir -p "${@: -1}"',
    "mountpoint": "exit 1",
}


class Cloud:
    """Where launches happen.

    Attributes:
        folder: the stub's.
        project: a git checkout in place of this project.
    """

    def __init__(self, folder, monkeypatch):
        self.folder = folder / "cloud"
        self.project = folder / "project"
        self.logs = folder / "logs"
        executables = self.folder / "bin"
        executables.mkdir(parents=True)
        for name, body in COMMANDS.items():
            executable(executables / name, f"#!/bin/bash\n{body}\n")
        local = folder / "local_bin"
        local.mkdir()
        executable(local / "gcloud", f'#!/bin/bash\nexec "{sys.executable}" -I -S "{STUB}" "$@"\n')
        monkeypatch.setenv("PATH", f"{local}:{os.environ['PATH']}")
        monkeypatch.setenv("STUB_GCLOUD", str(self.folder))
        self.project.mkdir()
        (self.project / "requirements.txt").write_text("numpy==1.2.3\njax==4.5.6\n")
        (self.project / ".gitignore").write_text("photos/\nruns/\n")
        subprocess.run(["git", "init", "-q"], cwd=self.project, check=True)
        monkeypatch.setattr(payload, "ROOT", self.project)
        self.scene()

    def scene(self, **events):
        (self.folder / "scene.json").write_text(json.dumps(events))

    def script(self, text):
        """The program of the project; it is started as `bash program.sh`."""
        (self.project / "program.sh").write_text(text)

    def launch(self, *command, keep=False, max_restarts=3, name="rex", dry_run=False, token=""):
        """The exit status of a launch."""
        machine = Machine(name, "v5litepod-16", "us-west4-a", None, "v2-alpha-tpuv5-lite", True, dry_run)
        program = payload.read_command(command or ("bash", "program.sh"))
        payload.pack(payload.project_files([]), archive := self.logs / "code.tar.gz")
        return Launch(machine, program, archive, self.logs, 0.001, token).run(max_restarts, keep)

    def calls(self, *words):
        """The gcloud commands so far that have these words."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if all(word in line for word in words)]

    @property
    def exists(self):
        return json.loads((self.folder / "state.json").read_text())["resource"] is not None


def executable(file, text):
    file.write_text(text)
    file.chmod(0o755)
