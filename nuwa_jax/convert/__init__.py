"""Released checkpoints to our parameters and back: names, layouts, streaming, the command."""
