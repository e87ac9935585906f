"""The telemetry store: where finished transactions live, and the questions asked of them."""
