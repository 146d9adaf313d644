"""What Prometheus and the log say."""
