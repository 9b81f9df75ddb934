"""Newton-BMA where parameters have neighbours."""
