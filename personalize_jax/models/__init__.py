"""Networks in Flax Linen, one file each. The rest of the package sees `apply(params, ...)` and pytrees of arrays."""
