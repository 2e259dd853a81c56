"""Ways for a process to be killed, or asked to stop, in the midst of a personalisation."""

import os
import signal
import time

from personalize_jax.evaluation import showcase
from personalize_jax.method import personalization
from personalize_jax.pipeline import kept
from personalize_jax.training import tracking, trained


def signal_in_call(number, module, name, count):
    """Replace a function by one that sends its process a signal when it is called for the count-th time."""
    function, calls = getattr(module, name), []

    def signalling(*args, **kwargs):
        calls.append(0)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(module, name, signalling)


def die_in_call(module, name, count):
    signal_in_call(signal.SIGKILL, module, name, count)


def die_in_training(directory):
    """Die after step 4 of that training, once the checkpoint of step 3 is there."""
    write = tracking.TrainingLog.write

    def dying(log, step, metrics):
        write(log, step, metrics)
        if log.file.parent.name == directory and step == 4:
            while not (log.file.parent / "checkpoints" / "3").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    tracking.TrainingLog.write = dying


def die_writing_the_subject():
    die_in_call(personalization, "write_dataset", 1)


def die_drawing_class_images():
    die_in_call(kept, "save_png", 2)


def die_enlarging_class_images():
    die_in_call(kept, "save_png", 5)  # of base there are three left, then


def die_tuning_base():
    die_in_training("base")


def die_tuning_super_resolution():
    die_in_training("super_resolution")


def die_saving_what_was_trained():
    die_in_call(trained, "save_params", 1)


def die_tuning_without_prior():
    die_in_training("base_without_prior")


def die_saving_samples():
    die_in_call(kept, "save_png", 2)


def die_reporting():
    die_in_call(showcase, "write_text", 2)  # of the report, after metrics and gallery


# What is there after each, and was not before, in the order in which a run reaches them.
DEATHS = {
    die_writing_the_subject: "manifest.json",
    die_drawing_class_images: "class_images/base/00000.png",
    die_enlarging_class_images: "class_images/base/00003.png",
    die_tuning_base: "base/checkpoints/3",
    die_tuning_super_resolution: "super_resolution/checkpoints/3",
    die_saving_what_was_trained: "super_resolution/checkpoints/6",
    die_tuning_without_prior: "base_without_prior/checkpoints/3",
    die_saving_samples: "samples/a-V-dog-in-the-snow-0000.png",
    die_reporting: "gallery.png",
}


def stop_saving_the_second_picture():
    signal_in_call(signal.SIGTERM, kept, "save_png", 2)


def stop_tuning_base():
    signal_in_call(signal.SIGINT, tracking.TrainingLog, "write", 2)


# After each, the phase that was not finished, and what is there: what was being done, and nothing of what comes next.
STOPS = {
    stop_saving_the_second_picture: ("class images", "class_images/base/00002.png", "class_images/base/00003.png"),
    stop_tuning_base: ("tuning base", "base/checkpoints/4", "base/checkpoints/6"),
}
