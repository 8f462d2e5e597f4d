"""From a checkpoint, a picture and drags to a video."""
