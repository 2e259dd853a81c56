"""Other people's files: diffusers' folders, scheduler files, tables of weights, vocabularies, the Hugging Face hub."""
