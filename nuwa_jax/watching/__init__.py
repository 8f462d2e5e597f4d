"""What a run does while it runs: its arithmetic, its time, its health."""
