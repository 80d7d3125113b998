"""Training: data readers, fitting of preprocessing, the trainer, checkpoints, metrics and evaluation."""
