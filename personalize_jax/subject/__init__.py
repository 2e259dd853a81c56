"""Makes the labelled dataset that a model is tuned on of a few photos of a subject (specification, steps 202-208).

Reading order: `images` -> `class_noun` -> `identifier` -> `dataset`.
"""
