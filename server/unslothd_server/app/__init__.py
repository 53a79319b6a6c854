"""What the service does, in its own words: models, trainings, event logs. Knows neither gRPC nor torch."""
