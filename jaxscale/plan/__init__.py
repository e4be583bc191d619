"""The planner: which mesh, remat and batch suit a slice of TPUs, and how long a step would take."""
