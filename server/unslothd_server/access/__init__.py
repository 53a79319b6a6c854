"""Who may call and what, how much of it, and the record of it; knows neither gRPC nor what is called."""
