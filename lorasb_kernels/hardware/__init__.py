"""What GPUs can do, and how long a kernel of known work takes on one: a model without a GPU."""
