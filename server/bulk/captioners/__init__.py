"""What captions a run's items: an engine here, a service, or Ray."""
