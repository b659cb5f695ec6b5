"""How many replicas a load needs: a simulator of gateway, router, autoscaler and engines, calibrated on a run."""
