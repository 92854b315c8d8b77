"""The steps of the pipeline, one file each; they know nothing of each other."""
