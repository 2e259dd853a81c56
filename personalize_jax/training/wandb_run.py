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
    """One run for all trainings of a run directory, and for its pictures.

    `wandb.json` there keeps its id, by which a call that resumes goes on with the same run, and how far each part of it
    has come: a step is sent once, also where a call does it again. It is kept before it is sent. So what a machine
    that breaks down could not send any more is missing there; `metrics.jsonl` has it.
    """

    def __init__(self, workdir: Path, project: str, name: str | None = None) -> None:
        """Ready to be started; nothing is sent or written yet.

        Args:
            workdir: the run directory.
            project: of Weights & Biases.
            name: that the run is shown by; by default the directory's.

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
        self._workdir, self._project = workdir, project
        self._name = name or workdir.resolve().name
        self._run: Any = None
        self._kept = {"id": secrets.token_hex(4), "steps": {}} | self._read().get(project, {})

    @contextlib.contextmanager
    def running(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Begin the run or go on with it; end it after, well or not.

        Args:
            config: of the run, to be shown with it.

        Raises:
            UserError: Weights & Biases does not let it begin.
        """
        self._keep()
        try:
            self._run = self._wandb.init(
                project=self._project,
                id=self._kept["id"],
                resume="allow",
                name=self._name,
                dir=str(self._workdir),
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

    def scalars(self, part: str, step: int, values: Mapping[str, float]) -> None:
        """Send numbers of one part of the run, such as "base", unless that step has been sent.

        Args:
            part: the numbers are shown as part/name over part/step.
            step: of the part, counted on its own.
            values: by name.
        """
        if step <= self._kept["steps"].get(part, -1):
            return
        self._kept["steps"][part] = step
        self._keep()
        self._run.define_metric(f"{part}/*", step_metric=f"{part}/step")
        self._run.log({f"{part}/step": step, **{f"{part}/{name}": value for name, value in values.items()}})

    def pictures(self, part: str, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Send pictures, uint8 [H, W, 3], by name, as `scalars` does."""
        self.scalars(part, step, {name: self._wandb.Image(pixels, caption=name) for name, pixels in pictures.items()})

    def _read(self) -> dict[str, Any]:
        file = self._workdir / FILE
        try:
            return json.loads(file.read_text()) if file.exists() else {}
        except ValueError as error:
            raise UserError(f"{file} is damaged ({error}); delete it, and a new W&B run is begun.") from error

    def _keep(self) -> None:
        write_text(self._workdir / FILE, json.dumps(self._read() | {self._project: self._kept}, indent=2))
