"""A command of several processes, the last of which finds its disk full."""

import errno
import os

import jax

from personalize_jax import command, hosts


def write() -> None:
    if jax.process_index() == jax.process_count() - 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "here/picture.png")


def main(_: list[str]) -> None:
    hosts.each_does(write)


if __name__ == "__main__":
    command.run(main, command.define_multihost, required=())
