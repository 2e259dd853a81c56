"""Event files, which TensorBoard reads.

tensorboardX brings the format. Its own `SummaryWriter` is not used: it writes from a queue, so that a process that is
killed loses what is in it, and one whose disk is full waits for it for ever.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from personalize_jax.pipeline.pictures import encode_png
from personalize_jax.runtime.files import naming


class EventFile:
    """A file of numbers and pictures by tag and step; what is written is on the disk."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open a new file beside those of earlier calls.

        Args:
            folder: of one training; made if missing.
            first_step: from this step on, TensorBoard leaves out what the other files hold: it is done again.

        Raises:
            OSError: it cannot be written.
        """
        # Here, as importing it imports PyTorch where that is installed, which takes seconds.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"events.out.tfevents.{time.time_ns()}"  # read in the order of their names
        with naming(self._file):
            self._writer = RecordWriter(str(self._file))
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers by tag, as float32; raises OSError where they cannot be."""
        self._write_values(step, [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write pictures, uint8 [H, W, 3], by tag; raises OSError where they cannot be."""
        values = []
        for tag, pixels in pictures.items():
            height, width, channels = pixels.shape
            png = encode_png(pixels, {})
            image = self._summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
            values.append(self._summary.Value(tag=tag, image=image))
        self._write_values(step, values)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write_values(self, step: int, values: list) -> None:
        self._write(self._event(step=step, summary=self._summary(value=values)))

    def _write(self, event: object) -> None:
        event.wall_time = time.time()
        with naming(self._file):
            self._writer.write(event.SerializeToString())
            self._writer.flush()
