"""The whole stack small enough for a laptop CPU. The trainer meets it only as paths in a YAML."""
