"""Event files as TensorBoard understands them."""

import io
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog


def read_all(folder):
    """Every (step, tag, value), in the order in which it was written; pictures are uint8 [H, W, 3]."""
    return [value for events in _files(folder) for event in events for value in _values(event)]


def read(folder):
    """{tag: {step: value}} without what a later file says was done again; a step may occur once."""
    kept = []
    for events in _files(folder):
        for event in events:
            if event.session_log.status == SessionLog.START:
                kept = [(step, *value) for step, *value in kept if step < event.step]
            kept += _values(event)
    found = {}
    for step, tag, value in kept:
        assert step not in found.setdefault(tag, {}), f"{tag} of step {step} is there twice"
        found[tag][step] = value
    return found


def _files(folder):
    return [list(_events(file.read_bytes())) for file in sorted(folder.iterdir())]


def _events(data):
    """Records are a length, its checksum, the bytes and theirs."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def _values(event):
    for value in event.summary.value:
        if value.HasField("image"):
            picture = np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
            assert picture.shape == (value.image.height, value.image.width, value.image.colorspace)
            yield event.step, value.tag, picture
        else:
            yield event.step, value.tag, value.simple_value
