"""Several replicas as one endpoint: Ray Serve places and heals them, `ReplicaPool` hides their loss."""
