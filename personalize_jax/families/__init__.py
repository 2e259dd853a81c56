"""Families of pretrained text-to-image models, one file each, behind the protocol in `base`."""
