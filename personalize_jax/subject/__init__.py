"""From a few images of one subject to the labelled dataset that a cascade is tuned on (specification, steps 202-208).

Reading order: `images` -> `class_noun` -> `identifier` -> `dataset`.
"""
