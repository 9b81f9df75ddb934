"""What the studies share: results, data sets."""
