"""Ways for a process to be killed in the midst of a personalisation."""

import os
import signal
import time

from personalize_jax import personalization, showcase
from personalize_jax.training import loop, prior


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_call(module, name, count):
    """Replace a function by one that kills its process when it is called for the count-th time."""
    function, calls = getattr(module, name), []

    def dying(*args, **kwargs):
        calls.append(0)
        return die() if len(calls) == count else function(*args, **kwargs)

    setattr(module, name, dying)


def die_in_training(directory):
    """Die after step 4 of that training, once the checkpoint of step 3 is there."""
    write = loop.MetricsLog.write

    def dying(log, step, metrics):
        write(log, step, metrics)
        if log.file.parent.name == directory and step == 4:
            while not (log.file.parent / "checkpoints" / "3").exists():
                time.sleep(0.01)
            die()

    loop.MetricsLog.write = dying


def die_writing_the_subject():
    die_in_call(personalization, "write_dataset", 1)


def die_drawing_class_images():
    die_in_call(prior, "save_png", 2)


def die_enlarging_class_images():
    die_in_call(prior, "save_png", 6)


def die_tuning_base():
    die_in_training("base")


def die_tuning_super_resolution():
    die_in_training("super_resolution")


def die_tuning_without_prior():
    die_in_training("base_without_prior")


def die_saving_samples():
    die_in_call(showcase, "save_png", 2)


def die_reporting():
    die_in_call(showcase, "report_html", 1)


# What is there after each, and was not before, in the order in which a run reaches them.
DEATHS = {
    die_writing_the_subject: "config.json",
    die_drawing_class_images: "class_images/base/00000.png",
    die_enlarging_class_images: "class_images/base/00003.png",
    die_tuning_base: "base/checkpoints/3",
    die_tuning_super_resolution: "super_resolution/checkpoints/3",
    die_tuning_without_prior: "base_without_prior/checkpoints/3",
    die_saving_samples: "samples/a-V-dog-in-the-snow-0000.png",
    die_reporting: "gallery.png",
}
