"""AdaGrad-BMA and its kin on networks."""
