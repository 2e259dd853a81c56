"""A command of several processes, the last of which fails at its share of the work."""

import errno
import os

import jax
from absl import flags

from personalize_jax.runtime import command, hosts

ERRORS = {
    "full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here/picture.png"),
    "mistake": TypeError("a number was expected"),
}


def define_flags() -> None:
    command.define_multihost()
    flags.DEFINE_enum("by", None, list(ERRORS), "How it fails.")


def write() -> None:
    if jax.process_index() == jax.process_count() - 1:
        raise ERRORS[flags.FLAGS.by]


def main(_: list[str]) -> None:
    hosts.each_does(write)


if __name__ == "__main__":
    command.run(main, define_flags, required=("by",))
