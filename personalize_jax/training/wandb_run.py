"""A run of Weights & Biases that belongs to a run directory."""

import contextlib
import importlib
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

FILE = "wandb.json"
VERSION = "0.31.0"  # that this was written for


class WandbRun:
    """The W&B run of a run directory, for all of its trainings, pictures and scores.

    `wandb.json` in that directory keeps the run's id, so that a later call continues the run, and the last step sent of
    each part, so that a step which is done again is not sent again. The file is written before the step is sent: the
    last steps before a machine breaks down may be missing at W&B, while `metrics.jsonl` has them.
    """

    def __init__(self, workdir: Path, project: str, name: str | None = None) -> None:
        """Prepare the run; nothing is sent or written before `running`.

        Args:
            workdir: the run directory.
            project: the project of Weights & Biases.
            name: the run's name there; by default the directory's.

        Raises:
            UserError: wandb is not installed, or the file is damaged.
        """
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise UserError(
                f"--wandb={project} needs Weights & Biases, which is not installed ({error}): "
                f"pip install wandb=={VERSION}, or leave the flag out."
            ) from error
        self._file, self._project = workdir / FILE, project
        self._name = name or workdir.resolve().name
        self._run: Any = None
        self._progress = {"id": secrets.token_hex(4), "steps": {}} | self._read().get(project, {})

    @contextlib.contextmanager
    def running(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Begin or continue the run at W&B, and mark it as finished or failed afterwards.

        Args:
            config: the run's configuration, which W&B shows.

        Raises:
            UserError: Weights & Biases refuses the run.
        """
        self._save_progress()
        try:
            self._run = self._wandb.init(
                project=self._project,
                id=self._progress["id"],
                resume="allow",
                name=self._name,
                dir=str(self._file.parent),
                config=dict(config),
                allow_val_change=True,  # the numbers of steps may differ from what the run began with
            )
        except self._wandb.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"Weights & Biases cannot be used for --wandb={self._project} ({reason}): sign in by wandb login, set "
                "WANDB_MODE=offline, or leave the flag out."
            ) from error
        try:
            yield
        except BaseException:
            self._run.finish(exit_code=1)
            raise
        self._run.finish()

    def write(self, part: str, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        """Send numbers, and pictures as uint8 [H, W, 3], unless that step of the part has been sent before.

        Args:
            part: the part of the run, such as "base"; W&B shows part/name over part/step.
            step: the part's own step.
            values: numbers and pictures by name.
        """
        if step <= self._progress["steps"].get(part, -1):
            return
        self._progress["steps"][part] = step
        self._save_progress()
        self._run.define_metric(f"{part}/*", step_metric=f"{part}/step")
        row = {
            f"{part}/{name}": self._wandb.Image(value, caption=name) if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }
        self._run.log({f"{part}/step": step, **row})

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._file.read_text()) if self._file.exists() else {}
        except ValueError as error:
            raise UserError(f"{self._file} is damaged ({error}); delete it, and a new W&B run is begun.") from error

    def _save_progress(self) -> None:
        write_text(self._file, json.dumps(self._read() | {self._project: self._progress}, indent=2))
