"""The commands of `lorasb`, one per module: `add_arguments(parser)` and `run(options)`."""
