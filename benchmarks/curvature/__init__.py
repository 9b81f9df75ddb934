"""Newton-BMA on problems without locality."""
