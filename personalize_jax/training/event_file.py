"""Event files, which TensorBoard reads.

tensorboardX brings the format. Its own `SummaryWriter` is not used: it writes from a queue, so that a process that is
killed loses what is in it, and one whose disk is full waits for it for ever.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from personalize_jax.runtime.files import naming


@contextlib.contextmanager
def event_file(folder: Path, first_step: int) -> Iterator[Callable[[int, Mapping[str, float | np.ndarray]], None]]:
    """Open a new file beside those of earlier calls, and yield a function that writes the values of a step to it.

    The function takes a step and values by tag: numbers, written as float32, and pictures, uint8 [H, W, 3]. They are on
    the disk when it returns.

    Args:
        folder: the folder of one part of a run; made if missing.
        first_step: the first step of this file, from which on TensorBoard ignores the values in earlier files.

    Raises:
        OSError: the file cannot be written.
    """
    # Here, as importing it imports PyTorch where that is installed, which takes seconds.
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    from personalize_jax.pipeline.pictures import encode_png  # with it come the networks, which flags do not need

    def value_of(tag: str, value: float | np.ndarray) -> Summary.Value:
        if not isinstance(value, np.ndarray):
            return Summary.Value(tag=tag, simple_value=value)
        height, width, channels = value.shape
        png = encode_png(value, {})
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)
        return Summary.Value(tag=tag, image=image)

    def write_event(**fields: Any) -> None:
        with naming(file):
            writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
            writer.flush()

    def write(step: int, values: Mapping[str, float | np.ndarray]) -> None:
        write_event(step=step, summary=Summary(value=[value_of(tag, value) for tag, value in values.items()]))

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"events.out.tfevents.{time.time_ns()}"  # TensorBoard reads files in the order of their names
    with naming(file):
        writer = RecordWriter(str(file))
    with contextlib.closing(writer):
        write_event(file_version="brain.Event:2")
        write_event(step=first_step, session_log=SessionLog(status=SessionLog.START))
        yield write
