"""A rendered world of named objects in named places: scenes, renderer, captions and their dataset."""
