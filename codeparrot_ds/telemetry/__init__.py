"""What a rank measures while it trains: metrics, trackers, profiles, times of ranks and parts of a step."""
