"""Many devices: the mesh, what lies where on it, and joining hosts."""
