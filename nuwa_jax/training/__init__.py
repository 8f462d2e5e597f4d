"""The curriculum, the train step and the loop."""
