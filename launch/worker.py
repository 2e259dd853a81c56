"""The shell scripts that install, start, watch and stop a program on the workers.

A program runs detached from the connection that started it. The home directory of each worker has

    personalize_jax/    the code, with its environment
    launch/             files of the program: `command` (its digest), `pid`, `log`, and, once it has ended, `status`

gcloud runs a script again where the connection dropped, so every script may run twice.
"""

import base64
import hashlib
import shlex
from collections.abc import Sequence

CODE = "personalize_jax"
ARCHIVE = "code.tar.gz"
LOG = "launch/log"
TOKEN = "hf_token"  # the copied file, which is then moved to where the Hugging Face hub's login puts it
BUCKETS = "/gcs"  # Vertex AI mounts buckets there, too

ABSENT = "absent"  # no program was started
RUNNING = "running"
LOST = "lost"  # the program has ended without a status: it was killed, or the worker was restarted

_LOGIN = ".cache/huggingface"
_UV = "0.13.9"
_PYTHON = "3.12"  # the images' own is too old
_ALIVE = 'kill -0 -- "-$(cat pid)" 2>/dev/null'


def digest(command: Sequence[str]) -> str:
    """A short digest that identifies a command."""
    return hashlib.sha256(shlex.join(command).encode()).hexdigest()[:16]


def install(jax_version: str) -> str:
    """Unpack the code and install its environment."""
    return (
        f"mkdir -p {CODE} && tar -xzf {ARCHIVE} -C {CODE} && cd {CODE} && "
        '{ [ -x "$HOME/.local/bin/uv" ] || '
        f"curl -LsSf https://astral.sh/uv/{_UV}/install.sh | UV_NO_MODIFY_PATH=1 sh; }} && "
        f'"$HOME/.local/bin/uv" venv --quiet --allow-existing --python {_PYTHON} .venv && '
        '"$HOME/.local/bin/uv" pip install --quiet --python .venv -r requirements.txt '
        f"{shlex.quote(f'jax[tpu]=={jax_version}')}"
    )


def mount(bucket: str) -> str:
    """Mount a bucket at /gcs/<bucket>, with gcsfuse.

    The mount allows renaming directories, as is done with complete checkpoints, and caches nothing, so that workers see
    each other's files at once.
    """
    folder = f"{BUCKETS}/{bucket}"
    source = "https://packages.cloud.google.com/apt"
    key = "/usr/share/keyrings/cloud.google.asc"
    return (
        f"{{ command -v gcsfuse >/dev/null || {{ curl -fsSL {source}/doc/apt-key.gpg | sudo tee {key} >/dev/null && "
        f'echo "deb [signed-by={key}] {source} gcsfuse-$(lsb_release -cs) main" | '
        "sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null && "
        "sudo apt-get -qq -o DPkg::Lock::Timeout=600 update && "
        "sudo apt-get -qq -y -o DPkg::Lock::Timeout=600 install gcsfuse; }; } && "
        f'sudo mkdir -p {folder} && {{ mountpoint -q {folder} || {{ sudo chown "$(id -u)" {folder} && '
        "gcsfuse --implicit-dirs --rename-dir-limit=1000000 "
        f"--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 {bucket} {folder}; }}; }}"
    )


def keep_token() -> str:
    """Move an access token for the Hugging Face hub to where its library looks for one; others cannot read it."""
    return f"umask 077 && mkdir -p {_LOGIN} && {{ [ ! -e {TOKEN} ] || mv {TOKEN} {_LOGIN}/token; }}"


def forget_token() -> str:
    """Delete the access token."""
    return f"rm -f {TOKEN} {_LOGIN}/token"


def start(command: Sequence[str]) -> str:
    """Start a program, unless one was started."""
    program = (
        f"cd ../{CODE} && . .venv/bin/activate && export PYTHONUNBUFFERED=1 && {shlex.join(command)}; "
        "echo $? > ../launch/ended && mv ../launch/ended ../launch/status"
    )
    return (
        "mkdir launch 2>/dev/null || exit 0; cd launch && "
        f"{{ setsid nohup bash -c {shlex.quote(program)} >log 2>&1 </dev/null & }} && "
        f"echo $! > pid && echo {digest(command)} > command"
    )


def stop() -> str:
    """End the program, which has a minute to save, and remove its files."""
    return (
        "cd launch 2>/dev/null || exit 0; if [ -e pid ]; then "
        f'kill -TERM -- "-$(cat pid)" 2>/dev/null; for i in $(seq 600); do {_ALIVE} || break; sleep 0.1; done; '
        'kill -KILL -- "-$(cat pid)" 2>/dev/null; fi; cd .. && rm -rf launch'
    )


def status() -> str:
    """Print the program's status, see `read_statuses`."""
    return (
        f"cd launch 2>/dev/null && [ -e command ] || {{ echo - {ABSENT}; exit 0; }}; "
        f"if [ -e status ]; then state=$(cat status); elif {_ALIVE}; then state={RUNNING}; "
        # It may have ended between the two tests.
        f'elif [ -e status ]; then state=$(cat status); else state={LOST}; fi; echo "$(cat command) $state"'
    )


def read_statuses(output: str) -> list[tuple[str, str]]:
    """The output of `status` on each worker: the command's digest, and ABSENT, RUNNING, LOST or an exit status."""
    return [(words[0], words[1]) for line in output.splitlines() if len(words := line.split()) == 2]


def new_log(offset: int) -> str:
    """Print the log from a byte on, see `read_log`."""
    return f"echo; tail -c +{offset + 1} {LOG} | base64 -w0; echo"


def read_log(output: str) -> bytes:
    """The output of `new_log`; where it ran twice, that of the last time."""
    lines = output.split()
    return base64.b64decode(lines[-1]) if lines else b""


def manifest(workdir: str) -> str:
    """Print a run's manifest, or nothing where there is none."""
    return f"cd {CODE} && cat -- {shlex.quote(f'{workdir}/manifest.json')} 2>/dev/null || true"
