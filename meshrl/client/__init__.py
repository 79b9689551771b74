"""Using: the mesh, remote envs and remote agents."""
