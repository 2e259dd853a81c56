"""Lines of `metrics.jsonl`."""

import json

# Keys of a line that differ from run to run of the same training.
MEASURED = (
    *("seconds", "step_seconds", "images_per_second", "device_memory_gib"),
    *("tflops_per_second", "model_flops_utilization"),
)


def lines_of(directory):
    """The lines of a training's directory."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def metrics_of(directory):
    """The lines without what is measured of the machine."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines_of(directory)]
