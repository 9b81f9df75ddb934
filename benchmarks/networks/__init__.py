"""Mini-BMA, Adam-BMA and AdaGrad-BMA on networks."""
