"""Copies of configurations with other values."""

from ml_collections import ConfigDict


def changed(config: ConfigDict, **changes: object) -> ConfigDict:
    """A locked copy of a configuration with other values, by dotted key with __ for the dots."""
    copy = config.copy_and_resolve_references().unlock()
    copy.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return copy.lock()
