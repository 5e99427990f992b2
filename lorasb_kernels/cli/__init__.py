"""The commands of `lorasb`, one a module: `add_arguments(parser)` and `run(options)`."""
