"""Planning: which mesh, remat and microbatch fit a chip topology, and how fast they would be."""
