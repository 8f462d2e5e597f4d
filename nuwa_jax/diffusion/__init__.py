"""The mathematics of noise: pure functions on arrays and a `denoise` callable."""
