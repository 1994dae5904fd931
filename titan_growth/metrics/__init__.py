"""What a run reports: records, sinks, throughput meter, recorder and profiler."""
