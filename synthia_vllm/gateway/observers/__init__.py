"""What is noted of each exchange: metrics, traces, the log, the bill. All are told of the same few moments."""
