"""CPU cores of a machine without a GPU, divided between the replicas on it. No Ray in here."""
